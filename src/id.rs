//! Names of things: wallets, requests, API keys.

use std::fmt;
use std::str::FromStr;

use alloy::primitives::Address;

/// An EVM address: the account, the payer, and the owner of everything else.
/// Shown EIP-55 checksummed, stored in lower case, read in any case.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Wallet(pub Address);

impl Wallet {
    /// The stored form: `0x` and 40 lower-case hex digits.
    pub fn key(self) -> String {
        self.stored().as_str().to_owned()
    }

    /// The same, made where it stands.
    pub fn stored(self) -> StoredWallet {
        let mut text = *b"0x0000000000000000000000000000000000000000";
        if let Some(digits) = text.get_mut(2..) {
            // Forty digits are what twenty bytes take.
            let _ = hex::encode_to_slice(self.0, digits);
        }
        StoredWallet(text)
    }
}

/// A wallet as the books name it.
#[derive(Copy, Clone)]
pub struct StoredWallet([u8; 42]);

impl StoredWallet {
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Display for Wallet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.to_checksum(None))
    }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not an address: 0x and 40 hex digits are expected")]
pub struct NotAnAddress;

impl FromStr for Wallet {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).ok_or(NotAnAddress)?;
        let bytes: [u8; 20] = hex::decode(digits).ok().and_then(|b| b.try_into().ok()).ok_or(NotAnAddress)?;
        Ok(Self(Address::from(bytes)))
    }
}

/// Random bytes from the operating system, handed in so that a test can fix them.
#[derive(Clone)]
pub struct Entropy;

impl Entropy {
    #[expect(clippy::disallowed_methods, reason = "the one place that draws randomness")]
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        // The system's generator fails only where no program could go on safely.
        getrandom::fill(&mut bytes).expect("the operating system gives randomness");
        bytes
    }

    /// `req_`, 48 bits of the time in milliseconds and 80 random ones: names a request, its hold, its
    /// receipt. Ids of one time stand together in the indexes, so that a commit touches few pages.
    pub fn request_id(&self, now_ms: i64) -> String {
        request_id(now_ms, self.bytes())
    }
}

fn request_id(now_ms: i64, rest: [u8; 10]) -> String {
    let mut id = [0; 16];
    id[..6].copy_from_slice(&now_ms.to_be_bytes()[2..]);
    id[6..].copy_from_slice(&rest);
    format!("req_{}", hex::encode(id))
}

/// The first id that a request of a time can have: all of earlier ones come before it.
pub fn first_request_id(ms: i64) -> String {
    request_id(ms, [0; 10])
}

/// When a request got its id, in milliseconds; `None` for what is none of ours.
pub fn time_of_request(id: &str) -> Option<i64> {
    let hex = id.strip_prefix("req_").filter(|hex| hex.len() == 32)?;
    let id: [u8; 16] = hex::decode(hex).ok()?.try_into().ok()?;
    let mut ms = [0; 8];
    ms[2..].copy_from_slice(&id[..6]);
    Some(i64::from_be_bytes(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_in_the_order_of_their_times() {
        let ids = [1_775_563_200_000, 1_775_563_200_001, 1_775_563_264_000].map(|ms| Entropy.request_id(ms));
        assert!(ids.is_sorted(), "{ids:?}");
        assert_eq!(ids[0].len(), "req_".len() + 32);
        assert_ne!(ids[0], Entropy.request_id(1_775_563_200_000));
    }

    #[test]
    fn a_request_id_tells_its_time() {
        let id = Entropy.request_id(1_775_563_200_001);
        assert_eq!(time_of_request(&id), Some(1_775_563_200_001));
        assert!(first_request_id(1_775_563_200_001) <= id && id < first_request_id(1_775_563_200_002));
        for other in ["", "req_", "req_1_0", "req_4e2b286fe2c0a1b63a4ed968", &id[4..], &format!("{id}0")] {
            assert_eq!(time_of_request(other), None, "{other}");
        }
    }

    #[test]
    fn a_wallet_is_read_in_any_case_and_shown_checksummed() {
        let shown = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed";
        for text in [shown.to_owned(), shown.to_lowercase(), shown.to_uppercase()] {
            let wallet: Wallet = text.parse().unwrap();
            assert_eq!(wallet.to_string(), shown);
            assert_eq!(wallet.key(), shown.to_lowercase());
        }
        for bad in [
            "",
            "0x",
            "5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
            "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAe",
            "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAez",
        ] {
            assert_eq!(bad.parse::<Wallet>(), Err(NotAnAddress));
        }
    }
}
