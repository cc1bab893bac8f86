//! The SQL of sign-ins, sessions and keys.

use crate::auth::{ApiKey, Principal, Purpose};
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbRow, DbTx, args};
use crate::id::Wallet;

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
            "SELECT COUNT(*) AS live FROM api_keys WHERE wallet = $1 AND revoked_at_ms IS NULL",
            args![wallet],
        )
        .await?;
    row.map_or(Ok(0), |row| row.int("live"))
}

pub async fn insert_key(
    tx: &mut DbTx,
    wallet: Wallet,
    key_sha256: &str,
    label: Option<String>,
    now: Timestamp,
) -> Result<i64, DbError> {
    let id = tx.next_id("api_keys").await?;
    tx.execute(
        "INSERT INTO api_keys (id, wallet, key_sha256, label, created_at_ms) VALUES ($1, $2, $3, $4, $5)",
        args![id, wallet, key_sha256, label, now],
    )
    .await?;
    Ok(id)
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
    let read = |row: &DbRow| {
        Ok(ApiKey {
            id: row.int("id")?,
            label: row.text_or_null("label")?,
            created_at: row.time("created_at_ms")?,
            revoked_at: row.time_or_null("revoked_at_ms")?,
        })
    };
    rows.iter().map(read).collect()
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
    let sql = "SELECT id, wallet FROM api_keys WHERE key_sha256 = $1 AND revoked_at_ms IS NULL";
    let row = db.row(sql, args![key_sha256]).await?;
    let read = |row: DbRow| Ok(Principal { wallet: row.wallet("wallet")?, api_key_id: Some(row.int("id")?) });
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
