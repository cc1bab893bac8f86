//! API keys: made by a signed-in wallet, shown once, kept as a hash.

use std::time::Instant;

use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

use crate::auth::cache::KeyCache;
use crate::auth::{KeyLimits, LimitChanges, Principal, store};
use crate::clock::{Clock, Timestamp};
use crate::db::{Db, DbError, DbTx};
use crate::id::{Entropy, Wallet};

/// A label is a name, not a text.
const MAX_LABEL_CHARS: usize = 100;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("the label is longer than {MAX_LABEL_CHARS} characters")]
    LabelTooLong,
    #[error("the label must not hold control characters")]
    LabelNotText,
    #[error("expires_at must be in the future")]
    ExpiresInThePast,
    /// Of the caller's own.
    #[error("the API key expired at {}", .0.rfc3339())]
    Expired(Timestamp),
    #[error("the key was revoked, and stays so: make a new one")]
    Revoked,
    #[error("this wallet has {0} keys, as many as it may: revoke one first")]
    TooMany(u32),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What is known of a key; not the key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApiKey {
    pub id: i64,
    pub label: Option<String>,
    pub created_at: Timestamp,
    pub revoked_at: Option<Timestamp>,
    pub limits: KeyLimits,
}

/// The keys of all wallets.
#[derive(Clone)]
pub struct Keys {
    db: Db,
    clock: Clock,
    entropy: Entropy,
    /// 0: no limit.
    per_wallet: u32,
    cache: KeyCache,
}

impl Keys {
    pub fn new(db: Db, clock: Clock, entropy: Entropy, per_wallet: u32) -> Self {
        Self { db, clock, entropy, per_wallet, cache: KeyCache::default() }
    }

    /// Makes a key. It is returned here and can be learnt nowhere else.
    pub async fn create(
        &self,
        wallet: Wallet,
        label: Option<String>,
        limits: KeyLimits,
    ) -> Result<(ApiKey, SecretString), KeyError> {
        if let Some(label) = &label {
            check_label(label)?;
        }
        let now = self.clock.now();
        if limits.is_expired(now) {
            return Err(KeyError::ExpiresInThePast);
        }
        let secret = self.draw();
        let mut tx = self.db.begin().await?;
        self.check_room(&mut tx, wallet, now).await?;
        let id = tx.next_id("api_keys").await?;
        let key = ApiKey { id, label, created_at: now, revoked_at: None, limits };
        store::insert_key(&mut tx, wallet, &key, &sha256_hex(&secret)).await?;
        tx.commit().await?;
        Ok((key, SecretString::from(secret)))
    }

    /// A new secret. It is shown to its maker and kept nowhere.
    fn draw(&self) -> String {
        format!("sk-{}", hex::encode(self.entropy.bytes::<32>()))
    }

    /// Whether the wallet may have one more live key.
    async fn check_room(&self, tx: &mut DbTx, wallet: Wallet, now: Timestamp) -> Result<(), KeyError> {
        let live = store::lock_and_count_live(tx, wallet, now).await?;
        if self.per_wallet > 0 && live >= i64::from(self.per_wallet) {
            return Err(KeyError::TooMany(self.per_wallet));
        }
        Ok(())
    }

    /// Changes the limits of a live key of this wallet; `None` if there is no such key.
    pub async fn change(
        &self,
        wallet: Wallet,
        id: i64,
        changes: LimitChanges,
    ) -> Result<Option<ApiKey>, KeyError> {
        let now = self.clock.now();
        let mut tx = self.db.begin().await?;
        let Some(key) = store::lock_key(&mut tx, wallet, id).await? else { return Ok(None) };
        if key.revoked_at.is_some() {
            return Err(KeyError::Revoked);
        }
        let sets_expiry = changes.expires_at.is_some();
        let limits = changes.apply(key.limits.clone());
        if sets_expiry && limits.is_expired(now) {
            return Err(KeyError::ExpiresInThePast);
        }
        if key.limits.is_expired(now) && !limits.is_expired(now) {
            self.check_room(&mut tx, wallet, now).await?;
        }
        let key = ApiKey { limits, ..key };
        store::set_limits(&mut tx, &key).await?;
        self.commit(tx, id).await?;
        Ok(Some(key))
    }

    /// Gives a live key of this wallet a new secret; the old one is no longer known from then on.
    pub async fn rotate(&self, wallet: Wallet, id: i64) -> Result<Option<(ApiKey, SecretString)>, KeyError> {
        let mut tx = self.db.begin().await?;
        let Some(key) = store::lock_key(&mut tx, wallet, id).await? else { return Ok(None) };
        if key.revoked_at.is_some() {
            return Err(KeyError::Revoked);
        }
        let secret = self.draw();
        store::set_secret(&mut tx, id, &sha256_hex(&secret)).await?;
        self.commit(tx, id).await?;
        Ok(Some((key, SecretString::from(secret))))
    }

    /// A wallet's keys, revoked ones too, newest first, older than `before`.
    pub async fn list(
        &self,
        wallet: Wallet,
        before: Option<i64>,
        limit: i64,
    ) -> Result<Vec<ApiKey>, KeyError> {
        Ok(store::keys_of(&self.db, wallet, before, limit).await?)
    }

    /// Revokes a key of this wallet; whether there is such a key.
    pub async fn revoke(&self, wallet: Wallet, id: i64) -> Result<bool, KeyError> {
        let mut tx = self.db.begin().await?;
        let found = store::revoke_key(&mut tx, wallet, id, self.clock.now()).await?;
        self.commit(tx, id).await?;
        Ok(found)
    }

    /// Commits what changes a key. From then on this node knows the key as it has become, and other nodes
    /// within a second.
    async fn commit(&self, tx: DbTx, id: i64) -> Result<(), KeyError> {
        // Also where this fails, or is not waited for: nobody knows then whether the change came through.
        let _forgotten = self.cache.forget_after(id);
        Ok(tx.commit().await?)
    }

    /// The principal a key stands for; `None` for one that is unknown or revoked. One that has expired
    /// is an error of its own.
    ///
    /// It is looked up by its hash, so how long that takes says nothing of how near a guess was.
    pub async fn authenticate(&self, key: &SecretString) -> Result<Option<Principal>, KeyError> {
        let key = key.expose_secret();
        if !is_well_formed(key) {
            return Ok(None);
        }
        let hash: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let now = Instant::now();
        let principal = match self.cache.find(&hash, now) {
            Ok(principal) => principal,
            Err(before) => {
                let read = store::live_key(&self.db, &hex::encode(hash)).await?;
                let Some(principal) = read else { return Ok(None) };
                self.cache.remember(before, hash, &principal, now);
                principal
            }
        };
        match principal.key_limits.expires_at {
            Some(at) if at <= self.clock.now() => Err(KeyError::Expired(at)),
            _ => Ok(Some(principal)),
        }
    }
}

fn check_label(label: &str) -> Result<(), KeyError> {
    if label.chars().count() > MAX_LABEL_CHARS {
        return Err(KeyError::LabelTooLong);
    }
    if label.chars().any(char::is_control) {
        return Err(KeyError::LabelNotText);
    }
    Ok(())
}

/// `sk-` and 64 lower-case hex digits.
fn is_well_formed(key: &str) -> bool {
    key.strip_prefix("sk-").is_some_and(|digits| {
        digits.len() == 64 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

fn sha256_hex(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_one_form() {
        assert!(is_well_formed(&format!("sk-{}", "0a".repeat(32))));
        for bad in ["", "sk-", "x402", &format!("sk-{}", "0A".repeat(32)), &format!("sk-{}", "0a".repeat(33))]
        {
            assert!(!is_well_formed(bad), "{bad}");
        }
    }
}
