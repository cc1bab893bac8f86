//! Nonces that we give out and know again without keeping them: each carries its end and our mark.
//!
//! That one is good for a single change is not their business but [`crate::auth::Siwe`]'s, which
//! remembers the nonces that were used.

use crate::auth::SigningKey;
use crate::clock::{Clock, Timestamp};
use crate::id::Entropy;

/// As long as a signed message is fresh.
const LIFETIME_SECONDS: i64 = 300;
/// Its end as Unix seconds, and as many random bytes. Nonces of one second need only differ for each
/// wallet.
const BODY_BYTES: usize = 8;
/// Of the HMAC. A guess at 64 bits has 5 minutes, and gains no more than a nonce, which anyone may ask
/// for. The whole is 32 hex digits, as x402's `sign-in-with-x` specifies.
const MARK_BYTES: usize = 8;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Nonce {
    /// Alphanumeric, as EIP-4361 has it.
    pub text: String,
    pub issued_at: Timestamp,
    pub expires_at: Timestamp,
}

#[derive(Clone)]
pub struct Nonces {
    key: SigningKey,
    clock: Clock,
    entropy: Entropy,
}

impl Nonces {
    pub fn new(key: &SigningKey, clock: Clock, entropy: Entropy) -> Self {
        Self { key: key.derive("farebox nonce 1"), clock, entropy }
    }

    pub fn issue(&self) -> Nonce {
        let issued_at = self.clock.now();
        let end = issued_at.plus_seconds(LIFETIME_SECONDS).seconds();
        // Until the year 2106.
        let end = u32::try_from(end).unwrap_or(u32::MAX);
        let mut bytes = [end.to_be_bytes(), self.entropy.bytes()].concat();
        let mark = self.key.sign(&bytes);
        bytes.extend_from_slice(&mark[..MARK_BYTES]);
        Nonce { text: hex::encode(bytes), issued_at, expires_at: Timestamp::from_seconds(end.into()) }
    }

    /// Whether a nonce is one of ours whose time is not over.
    pub fn is_ours(&self, nonce: &str) -> bool {
        // In another case it would be another nonce to who remembers the used ones.
        let Ok(bytes) = hex::decode(nonce) else { return false };
        if hex::encode(&bytes) != nonce {
            return false;
        }
        let Some((body, mark)) = bytes.split_at_checked(BODY_BYTES) else { return false };
        let Some((end, _)) = body.split_first_chunk() else { return false };
        mark.len() == MARK_BYTES
            && self.key.has_signed(body, mark)
            && Timestamp::from_seconds(u32::from_be_bytes(*end).into()) > self.clock.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nonces(secret: &[u8]) -> (Nonces, Clock) {
        let clock = Clock::fixed(Timestamp::from_seconds(1_775_563_200));
        (Nonces::new(&SigningKey::new(secret), clock.clone(), Entropy), clock)
    }

    #[test]
    fn a_nonce_is_ours_for_five_minutes() {
        let (nonces, clock) = nonces(b"secret");
        let nonce = nonces.issue();
        assert!(nonce.text.len() == 32 && nonce.text.bytes().all(|b| b.is_ascii_hexdigit()));
        assert_ne!(nonces.issue().text, nonce.text);
        assert_eq!(nonce.expires_at, nonce.issued_at.plus_seconds(300));
        clock.advance_seconds(299);
        assert!(nonces.is_ours(&nonce.text));
        clock.advance_seconds(1);
        assert!(!nonces.is_ours(&nonce.text));
    }

    #[test]
    fn what_others_made_is_not_ours() {
        let (ours, _) = nonces(b"secret");
        let (others, _) = nonces(b"another");
        let nonce = ours.issue().text;
        for wrong in [
            String::new(),
            "iXr6gUokmzsk7f9tp".into(),
            others.issue().text,
            nonce[2..].to_owned(),
            // A shorter mark is easier to guess.
            nonce[..18].to_owned(),
            nonce[..16].to_owned(),
            format!("{nonce}00"),
            // Its end is such that it has a letter.
            nonce.to_uppercase(),
            // A later end.
            format!("ffffffff{}", &nonce[8..]),
        ] {
            assert!(!ours.is_ours(&wrong), "{wrong}");
        }
        for at in 0..nonce.len() {
            let mut changed = nonce.clone().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            assert!(!ours.is_ours(&String::from_utf8(changed).unwrap()), "{at}");
        }
    }
}
