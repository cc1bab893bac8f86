//! The SQL of the keys that receipts are signed with.

use crate::attest::KnownKey;
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbTx, args};
use crate::id::Wallet;

/// Writes a key down when it is first used.
pub async fn remember(tx: &mut DbTx, address: Wallet, now: Timestamp) -> Result<(), DbError> {
    let sql = "INSERT INTO receipt_keys (address, since_ms) VALUES ($1, $2) ON CONFLICT (address) DO NOTHING";
    tx.execute(sql, args![address, now]).await.map(drop)
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
