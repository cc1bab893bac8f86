//! The SQL of what nodes tell each other.

use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbTx, args};

/// What a node has counted since it last told.
pub struct Round {
    pub node: String,
    pub number: i64,
    pub counts: String,
}

pub async fn tell(tx: &mut DbTx, round: &Round, now: Timestamp) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO limit_rounds (node, round, counts, at_ms) VALUES ($1, $2, $3, $4)",
        args![round.node.as_str(), round.number, round.counts.as_str(), now],
    )
    .await
    .map(drop)
}

pub async fn forget(tx: &mut DbTx, before: Timestamp) -> Result<(), DbError> {
    tx.execute("DELETE FROM limit_rounds WHERE at_ms < $1", args![before]).await.map(drop)
}

/// What others have told since a time, each node's rounds in their order.
pub async fn hear(db: &Db, node: &str, since: Timestamp) -> Result<Vec<Round>, DbError> {
    let sql =
        "SELECT node, round, counts FROM limit_rounds WHERE at_ms > $2 AND node <> $1 ORDER BY node, round";
    let read = |row: &crate::db::DbRow| {
        Ok(Round { node: row.text("node")?, number: row.int("round")?, counts: row.text("counts")? })
    };
    db.rows(sql, args![node, since]).await?.iter().map(read).collect()
}
