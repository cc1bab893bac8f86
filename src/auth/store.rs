//! The SQL of sign-ins, sessions and keys.

use std::sync::Arc;

use crate::auth::{ApiKey, KeyLimits, Principal, Purpose};
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbRow, DbTx, args};
use crate::id::Wallet;
use crate::money::MicroUsdc;

/// Uses a nonce for the first time; `false` if it was used before.
pub async fn claim_nonce(
    tx: &mut DbTx,
    wallet: Wallet,
    nonce: &str,
    purpose: Purpose,
    expires: Timestamp,
) -> Result<bool, DbError> {
    let inserted = tx
        .execute(
            "INSERT INTO siwe_nonces (wallet, nonce, purpose, expires_at_ms) VALUES ($1, $2, $3, $4)
             ON CONFLICT (wallet, nonce) DO NOTHING",
            args![wallet, nonce, purpose.as_str(), expires],
        )
        .await?;
    Ok(inserted == 1)
}

/// Writes down that a wallet has been here.
pub async fn know_wallet(tx: &mut DbTx, wallet: Wallet, now: Timestamp) -> Result<(), DbError> {
    let sql = "INSERT INTO wallets (address, created_at_ms) VALUES ($1, $2) ON CONFLICT DO NOTHING";
    tx.execute(sql, args![wallet, now]).await.map(drop)
}

pub async fn nonce_purpose(db: &Db, wallet: Wallet, nonce: &str) -> Result<Option<String>, DbError> {
    let sql = "SELECT purpose FROM siwe_nonces WHERE wallet = $1 AND nonce = $2";
    db.row(sql, args![wallet, nonce]).await?.map(|row| row.text("purpose")).transpose()
}

pub async fn forget_nonces(tx: &mut DbTx, now: Timestamp) -> Result<(), DbError> {
    tx.execute("DELETE FROM siwe_nonces WHERE expires_at_ms < $1", args![now]).await.map(drop)
}

/// Counts a wallet's live keys, with its row kept from others until the transaction ends, so that
/// two requests cannot both make the last one.
pub async fn lock_and_count_live(tx: &mut DbTx, wallet: Wallet, now: Timestamp) -> Result<i64, DbError> {
    tx.execute(
        "INSERT INTO wallets (address, created_at_ms) VALUES ($1, $2)
         ON CONFLICT (address) DO UPDATE SET created_at_ms = wallets.created_at_ms",
        args![wallet, now],
    )
    .await?;
    let row = tx
        .row(
            "SELECT COUNT(*) AS live FROM api_keys WHERE wallet = $1 AND revoked_at_ms IS NULL
             AND (expires_at_ms IS NULL OR expires_at_ms > $2)",
            args![wallet, now],
        )
        .await?;
    row.map_or(Ok(0), |row| row.int("live"))
}

pub async fn insert_key(
    tx: &mut DbTx,
    wallet: Wallet,
    key: &ApiKey,
    key_sha256: &str,
) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO api_keys (id, wallet, key_sha256, label, created_at_ms) VALUES ($1, $2, $3, $4, $5)",
        args![key.id, wallet, key_sha256, key.label.clone(), key.created_at],
    )
    .await?;
    set_limits(tx, key).await
}

pub async fn set_limits(tx: &mut DbTx, key: &ApiKey) -> Result<(), DbError> {
    let limits = &key.limits;
    let models = limits.allowed_models.as_deref().map(serde_json::to_string).transpose();
    let models = models.map_err(|e| DbError::Corrupt(format!("allowed_models: {e}")))?;
    tx.execute(
        "UPDATE api_keys SET expires_at_ms = $2, spend_cap_micro = $3, spend_cap_per_day_micro = $4,
                             allowed_models = $5, requests_per_minute = $6
         WHERE id = $1",
        args![
            key.id,
            limits.expires_at.map(Timestamp::millis),
            limits.spend_cap.map(MicroUsdc::get),
            limits.spend_cap_per_day.map(MicroUsdc::get),
            models,
            limits.requests_per_minute.map(i64::from)
        ],
    )
    .await
    .map(drop)
}

pub async fn set_secret(tx: &mut DbTx, id: i64, key_sha256: &str) -> Result<(), DbError> {
    tx.execute("UPDATE api_keys SET key_sha256 = $2 WHERE id = $1", args![id, key_sha256]).await.map(drop)
}

/// One key of a wallet, with the wallet's row kept from others until the transaction ends.
pub async fn lock_key(tx: &mut DbTx, wallet: Wallet, id: i64) -> Result<Option<ApiKey>, DbError> {
    let sql = "UPDATE wallets SET created_at_ms = created_at_ms WHERE address = $1";
    tx.execute(sql, args![wallet]).await?;
    let row = tx.row("SELECT * FROM api_keys WHERE id = $1 AND wallet = $2", args![id, wallet]).await?;
    row.as_ref().map(read_key).transpose()
}

fn read_key(row: &DbRow) -> Result<ApiKey, DbError> {
    Ok(ApiKey {
        id: row.int("id")?,
        label: row.text_or_null("label")?,
        created_at: row.time("created_at_ms")?,
        revoked_at: row.time_or_null("revoked_at_ms")?,
        limits: read_limits(row)?,
    })
}

fn read_limits(row: &DbRow) -> Result<KeyLimits, DbError> {
    let corrupt = |what: String| DbError::Corrupt(format!("limits of a key: {what}"));
    let models = row.text_or_null("allowed_models")?;
    let models = models.map(|text| serde_json::from_str::<Vec<String>>(&text)).transpose();
    let per_minute = row.int_or_null("requests_per_minute")?.map(u32::try_from).transpose();
    Ok(KeyLimits {
        expires_at: row.time_or_null("expires_at_ms")?,
        spend_cap: row.int_or_null("spend_cap_micro")?.map(MicroUsdc::new),
        spend_cap_per_day: row.int_or_null("spend_cap_per_day_micro")?.map(MicroUsdc::new),
        allowed_models: models.map_err(|e| corrupt(e.to_string()))?.map(Arc::from),
        requests_per_minute: per_minute.map_err(|e| corrupt(e.to_string()))?,
    })
}

pub async fn keys_of(
    db: &Db,
    wallet: Wallet,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<ApiKey>, DbError> {
    let rows = db
        .rows(
            "SELECT * FROM api_keys WHERE wallet = $1 AND id < $2 ORDER BY id DESC LIMIT $3",
            args![wallet, before.unwrap_or(i64::MAX), limit],
        )
        .await?;
    rows.iter().map(read_key).collect()
}

pub async fn revoke_key(tx: &mut DbTx, wallet: Wallet, id: i64, now: Timestamp) -> Result<bool, DbError> {
    let found = tx
        .execute(
            "UPDATE api_keys SET revoked_at_ms = COALESCE(revoked_at_ms, $3) WHERE id = $1 AND wallet = $2",
            args![id, wallet, now],
        )
        .await?;
    Ok(found == 1)
}

pub async fn live_key(db: &Db, key_sha256: &str) -> Result<Option<Principal>, DbError> {
    let sql = "SELECT * FROM api_keys WHERE key_sha256 = $1 AND revoked_at_ms IS NULL";
    let row = db.row(sql, args![key_sha256]).await?;
    let read = |row: DbRow| {
        Ok(Principal {
            wallet: row.wallet("wallet")?,
            api_key_id: Some(row.int("id")?),
            key_limits: read_limits(&row)?,
        })
    };
    row.map(read).transpose()
}

/// Keeps a secret under this name unless there is one, and returns the one that is there.
pub async fn keep_secret(
    tx: &mut DbTx,
    name: &'static str,
    value: &str,
    now: Timestamp,
) -> Result<String, DbError> {
    tx.execute(
        "INSERT INTO secrets (name, value, created_at_ms) VALUES ($1, $2, $3) ON CONFLICT (name) DO NOTHING",
        args![name, value, now],
    )
    .await?;
    let row = tx.row("SELECT value FROM secrets WHERE name = $1", args![name]).await?;
    row.ok_or_else(|| DbError::Corrupt("a secret was not kept".into()))?.text("value")
}

pub async fn kept_secret(db: &Db, name: &'static str) -> Result<Option<String>, DbError> {
    let row = db.row("SELECT value FROM secrets WHERE name = $1", args![name]).await?;
    row.map(|row| row.text("value")).transpose()
}

/// What the database knows against a session.
pub struct SessionState {
    pub revoked: bool,
    pub generation: Option<String>,
}

pub async fn session_state(db: &Db, id: &str, wallet: Wallet) -> Result<SessionState, DbError> {
    let sql = "SELECT (SELECT COUNT(*) FROM revoked_sessions WHERE id = $1) AS revoked,
                      (SELECT generation FROM session_generations WHERE wallet = $2) AS generation";
    let row = db.row(sql, args![id, wallet]).await?;
    let row = row.ok_or_else(|| DbError::Corrupt("a query of one row has none".into()))?;
    Ok(SessionState { revoked: row.int("revoked")? > 0, generation: row.text_or_null("generation")? })
}

pub async fn session_generation(db: &Db, wallet: Wallet) -> Result<Option<String>, DbError> {
    let sql = "SELECT generation FROM session_generations WHERE wallet = $1";
    db.row(sql, args![wallet]).await?.map(|row| row.text("generation")).transpose()
}

pub async fn revoke_session(tx: &mut DbTx, id: &str, forget_at: Timestamp) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO revoked_sessions (id, expires_at_ms) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING",
        args![id, forget_at],
    )
    .await
    .map(drop)
}

pub async fn renew_generation(
    tx: &mut DbTx,
    wallet: Wallet,
    generation: &str,
    forget_at: Timestamp,
) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO session_generations (wallet, generation, expires_at_ms) VALUES ($1, $2, $3)
         ON CONFLICT (wallet) DO UPDATE SET generation = $2, expires_at_ms = $3",
        args![wallet, generation, forget_at],
    )
    .await
    .map(drop)
}

pub async fn forget_sessions(tx: &mut DbTx, now: Timestamp) -> Result<(), DbError> {
    tx.execute("DELETE FROM revoked_sessions WHERE expires_at_ms < $1", args![now]).await?;
    tx.execute("DELETE FROM session_generations WHERE expires_at_ms < $1", args![now]).await.map(drop)
}
