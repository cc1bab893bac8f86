//! The SQL of claims and kept answers.

use bytes::Bytes;

use crate::claims::{Claim, Claimed, KeptAnswer, Kind};
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbTx, args};
use crate::id::Wallet;

/// Takes a name that is free, or whose request came to nothing and asked for the same.
pub async fn insert(
    tx: &mut DbTx,
    wallet: Wallet,
    claim: &Claim,
    request_id: &str,
    now: Timestamp,
) -> Result<bool, DbError> {
    let taken = tx
        .execute(
            "INSERT INTO claims (wallet, name, request_hash, request_id, created_at_ms)
             VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (wallet, name) DO UPDATE
             SET request_id = excluded.request_id, created_at_ms = excluded.created_at_ms
             WHERE claims.request_hash = excluded.request_hash AND EXISTS (
                 SELECT 1 FROM receipts WHERE receipts.id = claims.request_id AND outcome = 'released'
             )",
            args![wallet, claim.name.as_str(), claim.request_hash.as_str(), request_id, now],
        )
        .await?;
    Ok(taken == 1)
}

pub async fn find(tx: &mut DbTx, wallet: Wallet, claim: &Claim) -> Result<Claimed, DbError> {
    let sql = "SELECT request_hash, request_id FROM claims WHERE wallet = $1 AND name = $2";
    let row = tx.row(sql, args![wallet, claim.name.as_str()]).await?;
    let row = row.ok_or_else(|| DbError::Corrupt("a claim is there and is not".into()))?;
    Ok(Claimed {
        request_id: row.text("request_id")?,
        is_same_request: row.text("request_hash")? == claim.request_hash,
    })
}

pub async fn keep(
    tx: &mut DbTx,
    request_id: &str,
    kind: Kind,
    body: &str,
    now: Timestamp,
) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO kept_answers (request_id, kind, body, created_at_ms) VALUES ($1, $2, $3, $4)
         ON CONFLICT DO NOTHING",
        args![request_id, kind.as_str(), body, now],
    )
    .await
    .map(drop)
}

pub async fn kept(db: &Db, request_id: &str) -> Result<Option<KeptAnswer>, DbError> {
    let sql = "SELECT kind, body FROM kept_answers WHERE request_id = $1";
    let Some(row) = db.row(sql, args![request_id]).await? else { return Ok(None) };
    let kind = if row.text("kind")? == Kind::Stream.as_str() { Kind::Stream } else { Kind::Json };
    Ok(Some(KeptAnswer { kind, body: Bytes::from(row.text("body")?) }))
}

pub async fn forget(tx: &mut DbTx, before: Timestamp, names: &str) -> Result<(), DbError> {
    tx.execute("DELETE FROM kept_answers WHERE created_at_ms < $1", args![before]).await?;
    tx.execute("DELETE FROM claims WHERE created_at_ms < $1 AND name LIKE $2", args![before, names])
        .await
        .map(drop)
}
