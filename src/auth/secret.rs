//! The secret behind what this gateway gives out and takes back: session tokens and nonces.

use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;

use crate::auth::store;
use crate::clock::Timestamp;
use crate::db::{Db, DbError};
use crate::id::Entropy;

/// What the database calls it.
const NAME: &str = "session";

/// The secret that the database keeps under a name: this one, if there was none.
pub async fn keep_secret(
    db: &Db,
    name: &'static str,
    drawn: &str,
    now: Timestamp,
) -> Result<String, DbError> {
    let mut tx = db.begin().await?;
    let kept = store::keep_secret(&mut tx, name, drawn, now).await?;
    tx.commit().await?;
    Ok(kept)
}

/// A secret that the database keeps, if it does.
pub async fn kept_secret(db: &Db, name: &'static str) -> Result<Option<String>, DbError> {
    store::kept_secret(db, name).await
}

/// Signs by HMAC-SHA-256 (RFC 2104).
#[derive(Clone)]
pub struct SigningKey(Hmac<Sha256>);

impl SigningKey {
    /// The key whose secret is the operator's; without one, a secret that the first node to start
    /// draws, and that is kept in the database so that restarts and other nodes sign alike.
    pub async fn load(
        db: &Db,
        entropy: &Entropy,
        now: Timestamp,
        configured: Option<&SecretString>,
    ) -> Result<Self, DbError> {
        if let Some(secret) = configured {
            return Ok(Self::new(secret.expose_secret().as_bytes()));
        }
        let drawn = hex::encode(entropy.bytes::<32>());
        let kept = keep_secret(db, NAME, &drawn, now).await?;
        let secret = hex::decode(kept).ok().filter(|secret| secret.len() == 32);
        let secret = secret.ok_or_else(|| DbError::Corrupt("the secret of sessions".into()))?;
        Ok(Self::new(&secret))
    }

    pub fn new(secret: &[u8]) -> Self {
        Self(Hmac::new_from_slice(secret).expect("HMAC takes a key of any length"))
    }

    /// Another key from the same secret, so that what is signed for one use is nothing to another.
    #[must_use]
    pub fn derive(&self, usage: &str) -> Self {
        Self::new(&self.sign(usage.as_bytes()))
    }

    pub fn sign(&self, message: &[u8]) -> [u8; 32] {
        self.0.clone().chain_update(message).finalize().into_bytes().into()
    }

    /// Whether `signature`, or as many of its first bytes as are given, is by this key. Compared in
    /// constant time.
    pub fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        self.0.clone().chain_update(message).verify_truncated_left(signature).is_ok()
    }
}
