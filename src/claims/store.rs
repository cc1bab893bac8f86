//! The SQL of kept answers, and of forgetting claims. They are made with their holds: see `ledger::batch`.

use bytes::Bytes;

use crate::claims::{KeptAnswer, Kind};
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbTx, args};

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
