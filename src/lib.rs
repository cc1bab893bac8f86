//! Farebox: an AI gateway where the wallet is the account.
//!
//! A wallet signs in and gets an API key, or pays by a signed USDC authorization; every request is
//! priced, held, run, and settled at cost plus markup. The modules, in reading order:

pub mod app;
pub mod archive;
pub mod attest;
pub mod audit;
pub mod auth;
pub mod chain;
pub mod claims;
pub mod clock;
pub mod config;
pub mod db;
pub mod failpoint;
pub mod formats;
pub mod http;
pub mod id;
pub mod ledger;
pub mod limits;
pub mod metering;
pub mod money;
pub mod payments;
pub mod pricelist;
pub mod pricing;
pub mod providers;
pub mod reserves;
pub mod tasks;
pub mod telemetry;

/// Makes ring the cryptography of every TLS connection. Must come before the first HTTP client.
pub fn install_crypto() {
    // A second installation is refused, and that is all the same: there is only one kind.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
