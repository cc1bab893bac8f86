//! Sign-In with Ethereum (EIP-4361): a message that names us, freshly signed by a wallet.

use std::sync::Arc;

use alloy::primitives::eip191_hash_message;
use reqwest::Url;

use crate::auth::{Nonces, store};
use crate::chain::{self, Chain};
use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::db::{Db, DbError};
use crate::id::Wallet;

/// A message is good for this long after it was issued.
const FRESH_SECONDS: i64 = 300;
/// How far a client's clock may be ahead of ours, or behind.
const SKEW_SECONDS: i64 = 60;
/// Longer than any wallet's message.
const MAX_MESSAGE_BYTES: usize = 4096;
/// Longer than any nonce a client would make; it is an index of the database.
const MAX_NONCE_CHARS: usize = 128;

/// What a signed message is used for. The first use of a wallet's nonce fixes its purpose.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// May be repeated until the message is stale.
    Read,
    /// Once.
    Write,
}

impl Purpose {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SiweError {
    #[error("the message is not a valid EIP-4361 message: {0}")]
    Malformed(String),
    #[error("the signature must be hex, beginning with 0x")]
    MalformedSignature,
    #[error("the message is for the domain {named:?}: sign one for {expected}")]
    Domain { named: String, expected: String },
    #[error("the message's uri {uri:?} is not on its domain: sign one whose uri has the same host and port")]
    Uri { uri: String },
    #[error("the message is for chain {named}: sign one for chain {expected}")]
    Chain { named: u64, expected: String },
    #[error("the message was issued more than 5 minutes ago: sign a new one")]
    Stale,
    #[error("the message was issued in the future: check the clock and sign a new one")]
    IssuedInTheFuture,
    #[error("the message has expired: sign a new one")]
    Expired,
    #[error("the message is not valid yet: its not-before time has not come")]
    NotYetValid,
    #[error("the signature is not by {0}: sign the very text of the message with that wallet")]
    Signature(Wallet),
    #[error("the wallet's contract cannot be asked at the moment: try again shortly")]
    ChainUnavailable,
    #[error(
        "the nonce is not one that this gateway gave, or its 5 minutes are over: GET /v1/auth/nonce gives one"
    )]
    NonceUnknown,
    #[error("the nonce was used for a change already: sign a message with a new nonce")]
    NonceUsed,
    #[error("the nonce was used for reading and cannot make changes: sign a message with a new nonce")]
    NonceIsForReading,
    #[error(transparent)]
    Db(#[from] DbError),
}

impl SiweError {
    /// Whether what was sent cannot even be read, rather than being refused.
    pub fn is_malformed(&self) -> bool {
        matches!(self, Self::Malformed(_) | Self::MalformedSignature)
    }
}

/// The verifier of sign-ins.
#[derive(Clone)]
pub struct Siwe {
    db: Db,
    clock: Clock,
    domains: Vec<String>,
    /// Those that this gateway is reached by.
    public_domains: Vec<String>,
    chain_ids: Vec<u64>,
    nonces: Nonces,
    /// Whether only nonces of ours are taken, wherever a message comes.
    require_server_nonce: bool,
    /// Asked what a contract wallet says to a signature.
    chain: Arc<Chain>,
}

impl Siwe {
    pub fn new(db: Db, clock: Clock, config: &config::Auth, chain: Arc<Chain>, nonces: Nonces) -> Self {
        Self {
            db,
            clock,
            domains: config.siwe_domains.clone(),
            public_domains: config.public_domains.clone(),
            chain_ids: config.chain_ids.clone(),
            nonces,
            require_server_nonce: config.require_server_nonce,
            chain,
        }
    }

    /// Verifies a signed message and uses its nonce up, as far as `purpose` uses it.
    pub async fn verify(
        &self,
        message: &str,
        signature: &str,
        purpose: Purpose,
    ) -> Result<Wallet, SiweError> {
        self.verify_with(message, signature, purpose, &self.domains, self.require_server_nonce).await
    }

    /// Verifies the answer to a challenge of ours (x402's Sign-In-With-X): its nonce must be ours, and its
    /// domain may also be the one that this gateway is reached by, as its client insists.
    pub async fn verify_challenge(
        &self,
        message: &str,
        signature: &str,
        purpose: Purpose,
    ) -> Result<Wallet, SiweError> {
        let domains = [&self.public_domains[..], &self.domains[..]].concat();
        self.verify_with(message, signature, purpose, &domains, true).await
    }

    /// In this order: the message parses; it names our domain, a URI on it, a chain of ours; it is
    /// fresh, begun and not expired; its nonce is ours, where that is asked; the wallet signed it; its
    /// nonce is good for this.
    async fn verify_with(
        &self,
        message: &str,
        signature: &str,
        purpose: Purpose,
        domains: &[String],
        server_nonce: bool,
    ) -> Result<Wallet, SiweError> {
        let signed = parse(message)?;
        let signature = signature.strip_prefix("0x").and_then(|digits| hex::decode(digits).ok());
        let signature = signature.ok_or(SiweError::MalformedSignature)?;
        self.check_names(&signed, domains)?;
        self.check_times(&signed)?;
        if server_nonce && !self.nonces.is_ours(&signed.nonce) {
            return Err(SiweError::NonceUnknown);
        }
        let wallet = Wallet(signed.address.into());
        self.check_signature(message, &signature, wallet).await?;
        self.use_nonce(wallet, &signed.nonce, purpose).await?;
        Ok(wallet)
    }

    fn check_names(&self, message: &siwe::Message, domains: &[String]) -> Result<(), SiweError> {
        let domain = message.domain.to_string().to_ascii_lowercase();
        if !domains.contains(&domain) {
            return Err(SiweError::Domain { named: domain, expected: domains.join(" or ") });
        }
        let uri = message.uri.to_string();
        let same_host = Url::parse(&uri).is_ok_and(|url| host_and_port(&url) == Some(domain));
        if !same_host {
            return Err(SiweError::Uri { uri });
        }
        if !self.chain_ids.contains(&message.chain_id) {
            let expected: Vec<_> = self.chain_ids.iter().map(u64::to_string).collect();
            return Err(SiweError::Chain { named: message.chain_id, expected: expected.join(" or ") });
        }
        Ok(())
    }

    fn check_times(&self, message: &siwe::Message) -> Result<(), SiweError> {
        let now = self.clock.now();
        let issued = timestamp(&message.issued_at);
        if issued > now.plus_seconds(SKEW_SECONDS) {
            return Err(SiweError::IssuedInTheFuture);
        }
        if issued.plus_seconds(FRESH_SECONDS + SKEW_SECONDS) < now {
            return Err(SiweError::Stale);
        }
        if message.expiration_time.as_ref().is_some_and(|at| timestamp(at) <= now) {
            return Err(SiweError::Expired);
        }
        if message.not_before.as_ref().is_some_and(|at| timestamp(at) > now) {
            return Err(SiweError::NotYetValid);
        }
        Ok(())
    }

    /// A key that recovers to the address is proof, also where the account has delegated to code
    /// (EIP-7702); of any other the wallet's contract is asked (EIP-1271).
    async fn check_signature(
        &self,
        message: &str,
        signature: &[u8],
        wallet: Wallet,
    ) -> Result<(), SiweError> {
        let hash = eip191_hash_message(message);
        if chain::recover(hash, signature) == Some(wallet.0) {
            return Ok(());
        }
        match self.chain.is_valid_signature(wallet, hash, signature).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(SiweError::Signature(wallet)),
            // While the chain is away, a signature in the form of a key's is taken for a wrong one.
            Err(_) if signature.len() == 65 => Err(SiweError::Signature(wallet)),
            Err(_) => Err(SiweError::ChainUnavailable),
        }
    }

    async fn use_nonce(&self, wallet: Wallet, nonce: &str, purpose: Purpose) -> Result<(), SiweError> {
        // A stale message is refused by its time, so its nonce need not be remembered for longer.
        let expires = self.clock.now().plus_seconds(2 * (FRESH_SECONDS + SKEW_SECONDS));
        if purpose == Purpose::Read
            && let Some(first) = store::nonce_purpose(&self.db, wallet, nonce).await?
        {
            return if first == Purpose::Read.as_str() { Ok(()) } else { Err(SiweError::NonceUsed) };
        }
        let mut tx = self.db.begin().await?;
        let first = store::claim_nonce(&mut tx, wallet, nonce, purpose, expires).await?;
        // A deposit may wait for that.
        store::know_wallet(&mut tx, wallet, self.clock.now()).await?;
        tx.commit().await?;
        if first {
            return Ok(());
        }
        let used_for = store::nonce_purpose(&self.db, wallet, nonce).await?;
        match (used_for.as_deref(), purpose) {
            (Some("read"), Purpose::Read) => Ok(()),
            (Some("read"), Purpose::Write) => Err(SiweError::NonceIsForReading),
            _ => Err(SiweError::NonceUsed),
        }
    }

    /// Forgets nonces whose messages are stale.
    pub async fn forget_stale(&self) -> Result<(), SiweError> {
        let mut tx = self.db.begin().await?;
        store::forget_nonces(&mut tx, self.clock.now()).await?;
        Ok(tx.commit().await?)
    }
}

fn parse(message: &str) -> Result<siwe::Message, SiweError> {
    if message.len() > MAX_MESSAGE_BYTES {
        return Err(SiweError::Malformed(format!("it is longer than {MAX_MESSAGE_BYTES} bytes")));
    }
    let parsed: siwe::Message =
        message.parse().map_err(|e: siwe::ParseError| SiweError::Malformed(e.to_string()))?;
    if parsed.nonce.len() > MAX_NONCE_CHARS {
        return Err(SiweError::Malformed(format!("its nonce is longer than {MAX_NONCE_CHARS} characters")));
    }
    Ok(parsed)
}

/// `host[:port]`, the port only where it is not the scheme's own.
fn host_and_port(url: &Url) -> Option<String> {
    let host = url.host_str()?;
    Some(match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    })
}

fn timestamp(at: &siwe::TimeStamp) -> Timestamp {
    let ms = at.as_ref().unix_timestamp_nanos().div_euclid(1_000_000);
    Timestamp::from_millis(i64::try_from(ms).unwrap_or(i64::MAX))
}
