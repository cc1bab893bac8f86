//! Who a request acts for: sign-in with a wallet (EIP-4361) and the API keys a wallet makes.

pub mod keys;
pub mod siwe;
mod store;

pub use keys::{ApiKey, KeyError, Keys};
pub use siwe::{Purpose, Siwe, SiweError};

use crate::id::Wallet;

/// The wallet a request acts for, and the key it came with, if it came with one.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Principal {
    pub wallet: Wallet,
    pub api_key_id: Option<i64>,
}
