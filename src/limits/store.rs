//! The SQL of what nodes tell each other.

use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbRow, DbTx, args};

/// One telling of one node.
pub struct Round {
    pub node: String,
    pub number: i64,
}

pub async fn tell(
    tx: &mut DbTx,
    node: &str,
    number: i64,
    counts: &str,
    now: Timestamp,
) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO limit_rounds (node, round, counts, at_ms) VALUES ($1, $2, $3, $4)",
        args![node, number, counts, now],
    )
    .await
    .map(drop)
}

pub async fn forget(tx: &mut DbTx, before: Timestamp) -> Result<(), DbError> {
    tx.execute("DELETE FROM limit_rounds WHERE at_ms < $1", args![before]).await.map(drop)
}

/// The rounds in which others have told something since a time, each node's in their order.
pub async fn told(db: &Db, node: &str, since: Timestamp) -> Result<Vec<Round>, DbError> {
    let sql = "SELECT node, round FROM limit_rounds WHERE at_ms > $2 AND node <> $1 ORDER BY node, round";
    let read = |row: &DbRow| Ok(Round { node: row.text("node")?, number: row.int("round")? });
    db.rows(sql, args![node, since]).await?.iter().map(read).collect()
}

/// What was told in a round, while it is there.
pub async fn counts(db: &Db, round: &Round) -> Result<Option<String>, DbError> {
    let sql = "SELECT counts FROM limit_rounds WHERE node = $1 AND round = $2";
    let row = db.row(sql, args![round.node.as_str(), round.number]).await?;
    row.map(|row| row.text("counts")).transpose()
}
