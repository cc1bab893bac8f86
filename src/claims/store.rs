//! The SQL of kept answers, and of forgetting claims. They are made with their holds: see `ledger::batch`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;

use crate::claims::{KeptAnswer, Kind};
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbTx, args};

pub async fn keep(
    tx: &mut DbTx,
    request_id: &str,
    (kind, content_type): (Kind, Option<&str>),
    body: &str,
    now: Timestamp,
) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO kept_answers (request_id, kind, content_type, body, created_at_ms) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT DO NOTHING",
        args![request_id, kind.as_str(), content_type.map(str::to_owned), body, now],
    )
    .await
    .map(drop)
}

pub async fn kept(db: &Db, request_id: &str) -> Result<Option<KeptAnswer>, DbError> {
    let sql = "SELECT kind, content_type, body FROM kept_answers WHERE request_id = $1";
    let Some(row) = db.row(sql, args![request_id]).await? else { return Ok(None) };
    let kind = if row.text("kind")? == Kind::Stream.as_str() { Kind::Stream } else { Kind::Json };
    let (content_type, body) = (row.text_or_null("content_type")?, row.text("body")?);
    let body = match content_type {
        Some(_) => STANDARD.decode(body).map_err(|e| DbError::Corrupt(format!("a kept answer: {e}")))?.into(),
        None => Bytes::from(body),
    };
    Ok(Some(KeptAnswer { kind, content_type, body }))
}

pub async fn forget(tx: &mut DbTx, before: Timestamp, names: &str) -> Result<(), DbError> {
    tx.execute("DELETE FROM kept_answers WHERE created_at_ms < $1", args![before]).await?;
    tx.execute("DELETE FROM claims WHERE created_at_ms < $1 AND name LIKE $2", args![before, names])
        .await
        .map(drop)
}
