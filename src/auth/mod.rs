//! Who a request acts for: sign-in with a wallet (EIP-4361, x402's Sign-In-With-X), the sessions that
//! begin so, and the API keys a wallet makes.

mod cache;
pub mod keys;
mod limits;
pub mod nonce;
mod secret;
pub mod session;
pub mod siwe;
pub mod siwx;
mod store;

pub use keys::{ApiKey, KeyError, Keys};
pub use limits::{KeyLimits, LimitChanges};
pub use nonce::{Nonce, Nonces};
pub use secret::{SigningKey, keep_secret, kept_secret};
pub use session::{NewSession, SessionError, Sessions};
pub use siwe::{Purpose, Siwe, SiweError};
pub use siwx::SiwxError;

use crate::id::Wallet;

/// The wallet a request acts for, and the key it came with, if it came with one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Principal {
    pub wallet: Wallet,
    pub api_key_id: Option<i64>,
    /// Those of the key; without one there are none.
    pub key_limits: KeyLimits,
}
