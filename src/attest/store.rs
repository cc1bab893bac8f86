//! The SQL of the keys that receipts are signed with.

use crate::attest::KnownKey;
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbTx, args};
use crate::id::Wallet;

/// Writes a key down when it is first used, and that it is used now.
pub async fn remember(tx: &mut DbTx, address: Wallet, now: Timestamp) -> Result<(), DbError> {
    let sql = "INSERT INTO receipt_keys (address, since_ms, used_ms) VALUES ($1, $2, $2)
               ON CONFLICT (address) DO UPDATE SET used_ms = excluded.used_ms";
    tx.execute(sql, args![address, now]).await.map(drop)
}

/// The key that a server was last started with.
pub async fn in_use(db: &Db) -> Result<Option<Wallet>, DbError> {
    let sql =
        "SELECT address FROM receipt_keys ORDER BY COALESCE(used_ms, since_ms) DESC, since_ms DESC LIMIT 1";
    db.row(sql, args![]).await?.map(|row| row.wallet("address")).transpose()
}

pub async fn known(db: &Db) -> Result<Vec<KnownKey>, DbError> {
    let rows = db.rows("SELECT * FROM receipt_keys ORDER BY since_ms DESC, address", args![]).await?;
    let read = |row: &crate::db::DbRow| {
        Ok(KnownKey {
            address: row.wallet("address")?,
            since: row.time("since_ms")?,
            revoked_at: row.time_or_null("revoked_at_ms")?,
        })
    };
    rows.iter().map(read).collect()
}

pub async fn revoke(tx: &mut DbTx, address: Wallet, now: Timestamp) -> Result<bool, DbError> {
    let sql = "UPDATE receipt_keys SET revoked_at_ms = COALESCE(revoked_at_ms, $2) WHERE address = $1";
    Ok(tx.execute(sql, args![address, now]).await? == 1)
}
