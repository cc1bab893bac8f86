//! Who is at the other end of a connection, also behind proxies that say so.

use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// An address, or a range of them as CIDR writes it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Network {
    base: IpAddr,
    bits: u8,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("neither an IP address nor a range such as 10.0.0.0/8")]
pub struct NotANetwork;

impl FromStr for Network {
    type Err = NotANetwork;

    fn from_str(text: &str) -> Result<Self, NotANetwork> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let base: IpAddr = address.parse().map_err(|_| NotANetwork)?;
        let most = if base.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            Some(bits) => bits.parse().ok().filter(|bits| *bits <= most).ok_or(NotANetwork)?,
            None => most,
        };
        Ok(Self { base, bits })
    }
}

impl Network {
    pub fn contains(&self, address: IpAddr) -> bool {
        let differs = match (self.base, address.to_canonical()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(a.to_bits() ^ b.to_bits()) << 96,
            (IpAddr::V6(a), IpAddr::V6(b)) => a.to_bits() ^ b.to_bits(),
            _ => return false,
        };
        differs.leading_zeros() >= u32::from(self.bits)
    }
}

/// The address a request came from: the peer's or, if that is a proxy we trust, the right-most of
/// `forwarded` that is not one too. `forwarded` is what `X-Forwarded-For` says, left to right; what
/// stands left of an address we do not trust is that address's own invention.
pub fn client_address<'a>(
    peer: IpAddr,
    forwarded: impl DoubleEndedIterator<Item = &'a str>,
    trusted: &[Network],
) -> IpAddr {
    let is_trusted = |address: IpAddr| trusted.iter().any(|network| network.contains(address));
    let mut client = peer.to_canonical();
    for hop in forwarded.rev() {
        if !is_trusted(client) {
            break;
        }
        // What cannot be read ends the chain at the last address that we know.
        let Some(address) = parse_hop(hop) else { break };
        client = address.to_canonical();
    }
    client
}

/// An address, which some proxies write with a port.
fn parse_hop(hop: &str) -> Option<IpAddr> {
    let hop = hop.trim();
    let bare = hop.strip_prefix('[').and_then(|hop| hop.strip_suffix(']')).unwrap_or(hop);
    bare.parse().ok().or_else(|| hop.parse().ok().map(|socket: std::net::SocketAddr| socket.ip()))
}

/// What is counted as one: an IPv4 address, or the 64 bits of an IPv6 address that are one's own to
/// spread over.
pub fn counted_as_one(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn networks_are_read_and_contain_what_they_say() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.1"),
            ("192.168.1.7", "192.168.1.7", "192.168.1.8"),
            ("192.168.1.7/31", "::ffff:192.168.1.6", "192.168.1.8"),
            ("0.0.0.0/0", "8.8.8.8", "::1"),
            ("::1", "::1", "::2"),
            ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::1"),
            ("::/0", "2001:db8::1", "127.0.0.1"),
        ] {
            let network: Network = network.parse().unwrap();
            assert!(network.contains(ip(inside)), "{network:?} {inside}");
            assert!(!network.contains(ip(outside)), "{network:?} {outside}");
        }
        for bad in ["", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0/8", "::1/129", "localhost", "10.0.0.0/", "*"] {
            assert_eq!(bad.parse::<Network>(), Err(NotANetwork), "{bad}");
        }
    }

    #[test]
    fn the_client_is_the_right_most_address_that_is_not_trusted() {
        let trusted: Vec<Network> = ["10.0.0.0/8", "::1"].map(|text| text.parse().unwrap()).into();
        for (peer, forwarded, client) in [
            ("1.2.3.4", vec![], "1.2.3.4"),
            // Whoever is not trusted says nothing about others.
            ("1.2.3.4", vec!["5.6.7.8"], "1.2.3.4"),
            ("10.0.0.1", vec!["5.6.7.8"], "5.6.7.8"),
            ("10.0.0.1", vec!["9.9.9.9", "5.6.7.8"], "5.6.7.8"),
            ("10.0.0.1", vec!["9.9.9.9", "5.6.7.8", "10.0.0.2"], "5.6.7.8"),
            ("::1", vec![" 5.6.7.8:1234 "], "5.6.7.8"),
            ("::ffff:10.0.0.1", vec!["[2001:db8::1]:443"], "2001:db8::1"),
            ("10.0.0.1", vec!["[2001:db8::1]"], "2001:db8::1"),
            ("10.0.0.1", vec!["5.6.7.8", "unknown"], "10.0.0.1"),
            ("10.0.0.1", vec!["10.0.0.3", "10.0.0.2"], "10.0.0.3"),
            ("10.0.0.1", vec![], "10.0.0.1"),
        ] {
            let found = client_address(ip(peer), forwarded.iter().copied(), &trusted);
            assert_eq!(found, ip(client), "{peer} {forwarded:?}");
        }
    }

    #[test]
    fn the_addresses_of_one_ipv6_network_count_as_one() {
        assert_eq!(counted_as_one(ip("2001:db8::1")), counted_as_one(ip("2001:db8::ffff:2")));
        assert_ne!(counted_as_one(ip("2001:db8::1")), counted_as_one(ip("2001:db8:0:1::1")));
        assert_eq!(counted_as_one(ip("::ffff:1.2.3.4")), ip("1.2.3.4"));
    }
}
