//! The payments journal's SQL. A payment moves from one state to the next by a statement that
//! names the states it may come from, so that of two who try only one succeeds.

use alloy::primitives::{B256, Bytes, U256};

use crate::chain::{Authorization, FoundTransfer, SignedTx};
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbRow, DbTx, args};
use crate::id::Wallet;
use crate::money::MicroUsdc;
use crate::payments::{Payment, State};

/// A verified payment on its way into the journal.
pub struct NewPayment<'a> {
    pub chain_id: i64,
    pub asset: Wallet,
    pub authorization: &'a Authorization,
    pub value: MicroUsdc,
    pub signature: &'a [u8],
    pub seen_block: i64,
}

/// Writes a payment down, unless its authorization is there already.
pub async fn insert(tx: &mut DbTx, new: &NewPayment<'_>, now: Timestamp) -> Result<Option<i64>, DbError> {
    let authorization = new.authorization;
    let id = tx.next_id("payments").await?;
    let inserted = tx
        .execute(
            "INSERT INTO payments (id, chain_id, asset, from_wallet, nonce, to_wallet, value_micro,
                                   valid_after, valid_before, signature, state, seen_block,
                                   created_at_ms, updated_at_ms)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 'verified', $11, $12, $12)
             ON CONFLICT (chain_id, asset, from_wallet, nonce) DO NOTHING",
            args![
                id,
                new.chain_id,
                new.asset,
                authorization.from,
                hex_of(authorization.nonce.as_slice()),
                authorization.to,
                new.value,
                seconds(authorization.valid_after),
                seconds(authorization.valid_before),
                hex_of(new.signature),
                new.seen_block,
                now
            ],
        )
        .await?;
    Ok((inserted == 1).then_some(id))
}

/// Unix seconds of a `uint256`; "for ever" is as late as the books can say.
fn seconds(value: U256) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub async fn find(
    db: &Db,
    chain_id: i64,
    asset: Wallet,
    from: Wallet,
    nonce: B256,
) -> Result<Option<Payment>, DbError> {
    let row = db
        .row(
            "SELECT * FROM payments WHERE chain_id = $1 AND asset = $2 AND from_wallet = $3 AND nonce = $4",
            args![chain_id, asset, from, hex_of(nonce.as_slice())],
        )
        .await?;
    row.as_ref().map(read).transpose()
}

pub async fn get(db: &Db, id: i64) -> Result<Option<Payment>, DbError> {
    let row = db.row("SELECT * FROM payments WHERE id = $1", args![id]).await?;
    row.as_ref().map(read).transpose()
}

/// A wallet's payments, newest first, older than `before`.
pub async fn of_wallet(
    db: &Db,
    wallet: Wallet,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<Payment>, DbError> {
    let rows = db
        .rows(
            "SELECT * FROM payments WHERE from_wallet = $1 AND id < $2 ORDER BY id DESC LIMIT $3",
            args![wallet, before.unwrap_or(i64::MAX), limit],
        )
        .await?;
    rows.iter().map(read).collect()
}

/// Payments that are not at rest yet, oldest first.
pub async fn unfinished(db: &Db, limit: i64) -> Result<Vec<i64>, DbError> {
    let rows = db
        .rows(
            "SELECT id FROM payments WHERE state IN ('verified', 'signed', 'broadcast', 'mined')
             ORDER BY id LIMIT $1",
            args![limit],
        )
        .await?;
    rows.iter().map(|row| row.int("id")).collect()
}

/// Credited payments whose block is at most `block`: they may be final.
pub async fn credited_up_to(db: &Db, block: i64, limit: i64) -> Result<Vec<Payment>, DbError> {
    let rows = db
        .rows(
            "SELECT * FROM payments WHERE state = 'credited' AND block_number <= $1 ORDER BY id LIMIT $2",
            args![block, limit],
        )
        .await?;
    rows.iter().map(read).collect()
}

pub async fn count_by_state(db: &Db) -> Result<Vec<(String, i64)>, DbError> {
    let rows = db.rows("SELECT state, COUNT(*) AS n FROM payments GROUP BY state", args![]).await?;
    rows.iter().map(|row| Ok((row.text("state")?, row.int("n")?))).collect()
}

/// Gives the relayer's next account nonce. `on_chain` is what the chain expects next, for an
/// account that has sent before this database knew it.
pub async fn next_nonce(
    tx: &mut DbTx,
    chain_id: i64,
    relayer: Wallet,
    on_chain: i64,
) -> Result<i64, DbError> {
    tx.execute(
        "INSERT INTO relayers (chain_id, address, next_nonce) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        args![chain_id, relayer, on_chain],
    )
    .await?;
    let row = tx
        .row(
            "UPDATE relayers
             SET next_nonce = CASE WHEN next_nonce < $3 THEN $3 ELSE next_nonce END + 1
             WHERE chain_id = $1 AND address = $2 RETURNING next_nonce",
            args![chain_id, relayer, on_chain],
        )
        .await?;
    let next = row.ok_or_else(|| DbError::Corrupt("the relayer has no row".into()))?.int("next_nonce")?;
    Ok(next - 1)
}

/// Takes a verified payment for signing; whoever gets `true` signs it.
pub async fn take_for_signing(tx: &mut DbTx, id: i64, now: Timestamp) -> Result<bool, DbError> {
    let taken = tx
        .execute(
            "UPDATE payments SET state = 'signed', updated_at_ms = $2 WHERE id = $1 AND state = 'verified'",
            args![id, now],
        )
        .await?;
    Ok(taken == 1)
}

pub async fn insert_transaction(
    tx: &mut DbTx,
    payment_id: i64,
    relayer: Wallet,
    account_nonce: i64,
    signed: &SignedTx,
    now: Timestamp,
) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO payment_transactions (tx_hash, payment_id, relayer, account_nonce, raw, created_at_ms)
         VALUES ($1, $2, $3, $4, $5, $6)",
        args![hex_of(signed.hash.as_slice()), payment_id, relayer, account_nonce, hex_of(&signed.raw), now],
    )
    .await?;
    tx.execute(
        "UPDATE payments SET tx_hash = $2 WHERE id = $1",
        args![payment_id, hex_of(signed.hash.as_slice())],
    )
    .await
    .map(drop)
}

/// The transactions signed for a payment, newest first.
pub async fn transactions(db: &Db, payment_id: i64) -> Result<Vec<SignedTx>, DbError> {
    let rows = db
        .rows(
            "SELECT tx_hash, raw FROM payment_transactions WHERE payment_id = $1
             ORDER BY created_at_ms DESC, tx_hash",
            args![payment_id],
        )
        .await?;
    let read =
        |row: &DbRow| Ok(SignedTx { hash: b256(row, "tx_hash")?, raw: Bytes::from(bytes(row, "raw")?) });
    rows.iter().map(read).collect()
}

pub async fn mark_broadcast(tx: &mut DbTx, id: i64, now: Timestamp) -> Result<(), DbError> {
    tx.execute(
        "UPDATE payments SET state = 'broadcast', updated_at_ms = $2 WHERE id = $1 AND state = 'signed'",
        args![id, now],
    )
    .await
    .map(drop)
}

/// Marks a payment credited by the transfer that was found for it. Whoever gets `true` credits,
/// in the same transaction.
pub async fn take_for_credit(
    tx: &mut DbTx,
    id: i64,
    found: &FoundTransfer,
    now: Timestamp,
) -> Result<bool, DbError> {
    let taken = tx
        .execute(
            "UPDATE payments SET state = 'credited', tx_hash = $2, block_number = $3, block_hash = $4,
                                 log_index = $5, last_error = NULL, updated_at_ms = $6
             WHERE id = $1 AND state IN ('verified', 'signed', 'broadcast', 'mined')",
            args![
                id,
                hex_of(found.tx_hash.as_slice()),
                number(found.block_number)?,
                hex_of(found.block_hash.as_slice()),
                number(found.log_index)?,
                now
            ],
        )
        .await?;
    Ok(taken == 1)
}

/// Marks a credited payment final, at the place where its transfer is now.
pub async fn mark_finalized(
    tx: &mut DbTx,
    id: i64,
    found: &FoundTransfer,
    now: Timestamp,
) -> Result<(), DbError> {
    tx.execute(
        "UPDATE payments SET state = 'finalized', tx_hash = $2, block_number = $3, block_hash = $4,
                             log_index = $5, updated_at_ms = $6
         WHERE id = $1 AND state = 'credited'",
        args![
            id,
            hex_of(found.tx_hash.as_slice()),
            number(found.block_number)?,
            hex_of(found.block_hash.as_slice()),
            number(found.log_index)?,
            now
        ],
    )
    .await
    .map(drop)
}

/// Ends a payment that can no longer arrive.
pub async fn mark_ended(
    tx: &mut DbTx,
    id: i64,
    state: State,
    why: &str,
    now: Timestamp,
) -> Result<(), DbError> {
    tx.execute(
        "UPDATE payments SET state = $2, last_error = $3, updated_at_ms = $4
         WHERE id = $1 AND state IN ('verified', 'signed', 'broadcast', 'mined')",
        args![id, state.as_str(), why, now],
    )
    .await
    .map(drop)
}

pub async fn note_error(tx: &mut DbTx, id: i64, why: &str, now: Timestamp) -> Result<(), DbError> {
    tx.execute("UPDATE payments SET last_error = $2, updated_at_ms = $3 WHERE id = $1", args![id, why, now])
        .await
        .map(drop)
}

pub fn read(row: &DbRow) -> Result<Payment, DbError> {
    let uint = |column| {
        u64::try_from(row.int(column)?)
            .map(U256::from)
            .map_err(|_| DbError::Corrupt(format!("{column} below zero")))
    };
    Ok(Payment {
        id: row.int("id")?,
        authorization: Authorization {
            from: row.wallet("from_wallet")?,
            to: row.wallet("to_wallet")?,
            value: uint("value_micro")?,
            valid_after: uint("valid_after")?,
            valid_before: uint("valid_before")?,
            nonce: b256(row, "nonce")?,
        },
        value: row.micro("value_micro")?,
        signature: bytes(row, "signature")?,
        state: row.parsed("state")?,
        seen_block: row.int("seen_block")?,
        tx_hash: row.text_or_null("tx_hash")?,
        block_number: row.int_or_null("block_number")?,
        log_index: row.int_or_null("log_index")?,
        last_error: row.text_or_null("last_error")?,
        created_at: row.time("created_at_ms")?,
    })
}

fn hex_of(bytes: &[u8]) -> String {
    format!("0x{}", hex::encode(bytes))
}

fn bytes(row: &DbRow, column: &str) -> Result<Vec<u8>, DbError> {
    let text = row.text(column)?;
    let digits = text.strip_prefix("0x").unwrap_or(&text);
    hex::decode(digits).map_err(|_| DbError::Corrupt(format!("{column} is not hex")))
}

fn b256(row: &DbRow, column: &str) -> Result<B256, DbError> {
    let bytes = <[u8; 32]>::try_from(bytes(row, column)?);
    bytes.map(B256::from).map_err(|_| DbError::Corrupt(format!("{column} is not 32 bytes")))
}

fn number(value: u64) -> Result<i64, DbError> {
    i64::try_from(value).map_err(|_| DbError::Corrupt(format!("{value} from the chain")))
}

/// How many payments have been unfinished since before a time.
pub async fn unfinished_since(db: &Db, before: Timestamp) -> Result<i64, DbError> {
    let row = db
        .row(
            "SELECT COUNT(*) AS n FROM payments
             WHERE state IN ('verified', 'signed', 'broadcast', 'mined') AND created_at_ms < $1",
            args![before],
        )
        .await?;
    row.map_or(Ok(0), |row| row.int("n"))
}

pub async fn all_credited(tx: &mut DbTx) -> Result<Vec<Payment>, DbError> {
    let sql = "SELECT * FROM payments WHERE state IN ('credited', 'finalized') ORDER BY id";
    tx.rows(sql, args![]).await?.iter().map(read).collect()
}
