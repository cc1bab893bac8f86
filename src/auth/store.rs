//! The SQL of sign-ins and keys.

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
