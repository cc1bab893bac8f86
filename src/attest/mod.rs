//! What the gateway signs, so that its word can be held against it without asking it again: receipts of
//! requests and of payments, and what is published of the reserves. EIP-712 typed data, by a key that is for
//! nothing else.
//!
//! Nothing is signed before somebody asks for it, and no signature is kept: signatures are deterministic (RFC
//! 6979), so that the same text signed by the same key is the same again.

mod statement;
mod store;

pub use statement::{Kind, Refused, Verified, report_hash, verify, without_whitespace};

use std::sync::{Arc, PoisonError, RwLock};

use alloy::primitives::B256;
use alloy::signers::SignerSync as _;
use alloy::signers::local::PrivateKeySigner;
use schemars::JsonSchema;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::auth;
use crate::clock::Timestamp;
use crate::config::RECEIPT_KEY;
use crate::db::{Db, DbError};
use crate::id::{Entropy, Wallet};
use statement::{Statement, x402_receipt_hash};

/// What the database calls the key that it keeps.
const SECRET: &str = "receipts";

#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    #[error("{RECEIPT_KEY} is not a private key: `openssl rand -hex 32` makes one")]
    BadKey,
    #[error("{0} is not the key that the server signs receipts with: set {RECEIPT_KEY} as it has it")]
    NotTheServers(Wallet),
    #[error("the database keeps no key for receipts: set {RECEIPT_KEY} as the server has it")]
    NoKey,
    #[error("a text of ours cannot be signed: {0}")]
    NotAStatement(String),
    #[error("signing failed: {0}")]
    Signing(String),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// A signature, beside what it is of. With it the rest of the object it is in can be checked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// The primary type of the typed data: `RequestReceipt`, `PaymentReceipt` or `Reserves`.
    pub r#type: String,
    /// Of the domain.
    pub chain_id: u64,
    /// The address of the key. Whether that is the gateway's, `/v1/status` says.
    pub signer: String,
    /// 65 bytes, hex: r, s, v.
    pub value: String,
}

/// A key that receipts are, or once were, signed with.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct KnownKey {
    pub address: Wallet,
    pub since: Timestamp,
    pub revoked_at: Option<Timestamp>,
}

/// Signs for the gateway. Cheap to clone.
#[derive(Clone)]
pub struct Attestor(Arc<Parts>);

struct Parts {
    db: Db,
    key: PrivateKeySigner,
    chain_id: u64,
    known: RwLock<Vec<KnownKey>>,
}

impl Attestor {
    /// The key is the operator's; without one, the first node to start draws one, and the database keeps it,
    /// so that restarts and other nodes sign alike. Which keys there were the database remembers.
    pub async fn load(
        db: &Db,
        entropy: &Entropy,
        now: Timestamp,
        configured: Option<&SecretString>,
        chain_id: u64,
    ) -> Result<Self, AttestError> {
        let key = match configured {
            Some(secret) => parse_key(secret)?,
            None => kept_key(db, entropy, now).await?,
        };
        let mut tx = db.begin().await?;
        store::remember(&mut tx, Wallet(key.address()), now).await?;
        tx.commit().await?;
        let known = store::known(db).await?;
        if known.iter().any(|known| known.address.0 == key.address() && known.revoked_at.is_some()) {
            let key = RECEIPT_KEY;
            tracing::error!("receipts are signed by a key that was revoked: set {key} to another");
        }
        Ok(Self::new(db, key, chain_id, known))
    }

    /// The same for a command beside the server, which draws no key and makes none known.
    pub async fn of_server(
        db: &Db,
        configured: Option<&SecretString>,
        chain_id: u64,
    ) -> Result<Self, AttestError> {
        let key = match configured {
            Some(secret) => parse_key(secret)?,
            None => {
                let kept = auth::kept_secret(db, SECRET).await?.ok_or(AttestError::NoKey)?;
                read_kept(kept)?
            }
        };
        let (known, address) = (store::known(db).await?, Wallet(key.address()));
        if store::in_use(db).await? == Some(address) {
            Ok(Self::new(db, key, chain_id, known))
        } else {
            Err(AttestError::NotTheServers(address))
        }
    }

    fn new(db: &Db, key: PrivateKeySigner, chain_id: u64, known: Vec<KnownKey>) -> Self {
        Self(Arc::new(Parts { db: db.clone(), key, chain_id, known: RwLock::new(known) }))
    }

    /// The address of the key that signs now.
    pub fn signer(&self) -> Wallet {
        Wallet(self.0.key.address())
    }

    /// All keys there have been, newest first.
    pub fn known_keys(&self) -> Vec<KnownKey> {
        self.0.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads anew which keys there have been: other nodes and the operator's commands write them too.
    pub async fn refresh(&self) -> Result<(), AttestError> {
        let known = store::known(&self.0.db).await?;
        *self.0.known.write().unwrap_or_else(PoisonError::into_inner) = known;
        Ok(())
    }

    /// Signs an object: `contents` is its JSON without whitespace, and without the members that a signature
    /// is not of. About 0.1 ms of work.
    pub fn sign(&self, contents: &str) -> Result<Signature, AttestError> {
        let statement = Statement::read(contents).map_err(AttestError::NotAStatement)?;
        let value = self.sign_hash(statement.signing_hash(self.0.chain_id))?;
        Ok(Signature {
            r#type: statement.kind().as_str().to_owned(),
            chain_id: self.0.chain_id,
            signer: self.signer().to_string(),
            value,
        })
    }

    /// The receipt that x402's offer-receipt extension has for a payment, as its package of version 2.27
    /// makes and reads it.
    pub fn x402_receipt(&self, receipt: &X402Receipt<'_>) -> Result<Value, AttestError> {
        let signature = self.sign_hash(x402_receipt_hash(receipt))?;
        let payload = json!({
            "version": X402_RECEIPT_VERSION,
            "network": receipt.network,
            "resourceUrl": receipt.resource_url,
            "payer": receipt.payer.to_string(),
            "issuedAt": receipt.issued_at.seconds(),
            "transaction": receipt.transaction,
        });
        Ok(json!({"format": "eip712", "payload": payload, "signature": signature}))
    }

    fn sign_hash(&self, hash: B256) -> Result<String, AttestError> {
        let signature = self.0.key.sign_hash_sync(&hash).map_err(|e| AttestError::Signing(e.to_string()))?;
        Ok(format!("0x{}", hex::encode(signature.as_bytes())))
    }
}

/// Of the payload's fields.
const X402_RECEIPT_VERSION: u64 = 1;

/// What such a receipt says: this payer paid here, and was served.
pub struct X402Receipt<'a> {
    /// CAIP-2.
    pub network: &'a str,
    pub resource_url: &'a str,
    pub payer: Wallet,
    pub issued_at: Timestamp,
    pub transaction: &'a str,
}

/// Says that what a key signs is worth nothing any more; whether there was such a key.
pub async fn revoke_key(db: &Db, address: Wallet, now: Timestamp) -> Result<bool, DbError> {
    let mut tx = db.begin().await?;
    let found = store::revoke(&mut tx, address, now).await?;
    tx.commit().await?;
    Ok(found)
}

/// All keys there have been, newest first.
pub async fn known_keys(db: &Db) -> Result<Vec<KnownKey>, DbError> {
    store::known(db).await
}

/// Whether a configured key is one at all.
pub fn check_key(configured: &SecretString) -> Result<Wallet, AttestError> {
    parse_key(configured).map(|key| Wallet(key.address()))
}

fn parse_key(secret: &SecretString) -> Result<PrivateKeySigner, AttestError> {
    secret.expose_secret().trim().parse().map_err(|_| AttestError::BadKey)
}

async fn kept_key(db: &Db, entropy: &Entropy, now: Timestamp) -> Result<PrivateKeySigner, AttestError> {
    let drawn = loop {
        // All but one in 2^128 of these are keys.
        let drawn = entropy.bytes::<32>();
        if PrivateKeySigner::from_bytes(&drawn.into()).is_ok() {
            break hex::encode(drawn);
        }
    };
    read_kept(auth::keep_secret(db, SECRET, &drawn, now).await?)
}

fn read_kept(kept: String) -> Result<PrivateKeySigner, AttestError> {
    parse_key(&SecretString::from(kept)).map_err(|_| DbError::Corrupt("the key of receipts".into()).into())
}
