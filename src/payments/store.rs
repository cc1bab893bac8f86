//! The payments journal's SQL. A payment moves from one state to the next by a statement that
//! names the states it may come from, so that of two who try only one succeeds.

use alloy::primitives::{B256, Bytes, U256};

use crate::chain::{Authorization, Fees, FoundTransfer, SignedTx};
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbRow, DbTx, args};
use crate::id::Wallet;
use crate::money::MicroUsdc;
use crate::payments::facilitator::Facilitation;
use crate::payments::{Kind, Payment, State};

/// A payment on its way into the journal.
pub struct NewPayment<'a> {
    pub kind: Kind,
    pub chain_id: i64,
    pub asset: Wallet,
    pub authorization: &'a Authorization,
    pub value: MicroUsdc,
    pub signature: &'a [u8],
    pub request_hash: Option<&'a str>,
    pub identifier: Option<&'a str>,
    /// Verified, or broadcast by somebody else; mined, where its transfer is what it began with.
    pub state: State,
    pub seen_block: i64,
    pub found: Option<&'a FoundTransfer>,
}

/// Writes a payment down, unless its authorization is there already.
pub async fn insert(tx: &mut DbTx, new: &NewPayment<'_>, now: Timestamp) -> Result<Option<i64>, DbError> {
    let authorization = new.authorization;
    let id = tx.next_id("payments").await?;
    let found = new.found;
    let inserted = tx
        .execute(
            "INSERT INTO payments (id, chain_id, asset, from_wallet, nonce, to_wallet, value_micro,
                                   valid_after, valid_before, signature, state, seen_block,
                                   created_at_ms, updated_at_ms, request_hash, identifier, kind, tx_hash,
                                   block_number, block_hash, log_index)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $13, $14, $15, $16, $17, $18,
                     $19, $20)
             ON CONFLICT (chain_id, asset, from_wallet, nonce) DO NOTHING",
            args![
                id,
                new.chain_id,
                new.asset,
                authorization.from,
                hex_of(authorization.nonce.as_slice()),
                authorization.to,
                new.value,
                seconds(authorization.valid_after)?,
                seconds(authorization.valid_before)?,
                hex_of(new.signature),
                new.state.as_str(),
                new.seen_block,
                now,
                new.request_hash.map(str::to_owned),
                new.identifier.map(str::to_owned),
                new.kind.as_str(),
                found.map(|found| hex_of(found.tx_hash.as_slice())),
                found.map(|found| number(found.block_number)).transpose()?,
                found.map(|found| hex_of(found.block_hash.as_slice())),
                found.map(|found| number(found.log_index)).transpose()?
            ],
        )
        .await?;
    Ok((inserted == 1).then_some(id))
}

/// Unix seconds of a `uint256`, exactly: an altered one would not be what was signed.
fn seconds(value: U256) -> Result<i64, DbError> {
    i64::try_from(value).map_err(|_| DbError::Corrupt("a time out of range".into()))
}

/// Payments of one state, or of all, newest first.
pub async fn newest(db: &Db, state: Option<State>, limit: i64) -> Result<Vec<Payment>, DbError> {
    let state = state.map(|state| state.as_str().to_owned());
    let rows = db
        .rows(
            "SELECT * FROM payments WHERE $1 IS NULL OR state = $1 ORDER BY id DESC LIMIT $2",
            args![state, limit],
        )
        .await?;
    rows.iter().map(read).collect()
}

/// A wallet's payments in a token that are not at rest, and those that have been credited since `since`.
pub async fn under_way(
    tx: &mut DbTx,
    chain_id: i64,
    asset: Wallet,
    wallet: Wallet,
    since: Timestamp,
) -> Result<Vec<Payment>, DbError> {
    let rows = tx
        .rows(
            "SELECT * FROM payments
             WHERE from_wallet = $1 AND state IN ('verified', 'signed', 'broadcast', 'mined')
             AND chain_id = $2 AND asset = $3 AND kind = 'authorization'
             UNION ALL
             SELECT * FROM payments
             WHERE from_wallet = $1 AND updated_at_ms > $4 AND state IN ('credited', 'finalized')
             AND chain_id = $2 AND asset = $3 AND kind = 'authorization'",
            args![wallet, chain_id, asset, since],
        )
        .await?;
    rows.iter().map(read).collect()
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

/// A wallet's first payment of a name that came to something since a time, or still may.
pub async fn first_named(
    tx: &mut DbTx,
    wallet: Wallet,
    identifier: &str,
    since: Timestamp,
) -> Result<Option<Payment>, DbError> {
    let row = tx
        .row(
            "SELECT * FROM payments WHERE from_wallet = $1 AND identifier = $2
             AND (created_at_ms > $3 AND state IN ('credited', 'finalized')
                  OR state IN ('verified', 'signed', 'broadcast', 'mined')) ORDER BY id LIMIT 1",
            args![wallet, identifier, since],
        )
        .await?;
    row.as_ref().map(read).transpose()
}

pub async fn get(db: &Db, id: i64) -> Result<Option<Payment>, DbError> {
    let row = db.row("SELECT * FROM payments WHERE id = $1", args![id]).await?;
    row.as_ref().map(read).transpose()
}

/// A wallet's payments, and what arrived for it otherwise, newest first, older than `before`.
pub async fn of_wallet(
    db: &Db,
    wallet: Wallet,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<Payment>, DbError> {
    let rows = db
        .rows(
            "SELECT * FROM payments WHERE from_wallet = $1 AND id < $2 AND kind <> 'withdrawal'
             AND beneficiary IS NULL
             UNION ALL
             SELECT * FROM payments WHERE beneficiary = $1 AND id < $2
             ORDER BY id DESC LIMIT $3",
            args![wallet, before.unwrap_or(i64::MAX), limit],
        )
        .await?;
    rows.iter().map(read).collect()
}

/// Payments of this token that are not at rest yet, a page of them by id. What becomes of a deposit is not
/// the chain's affair any more.
pub async fn unfinished(
    db: &Db,
    chain_id: i64,
    asset: Wallet,
    after: i64,
    limit: i64,
) -> Result<Vec<i64>, DbError> {
    let rows = db
        .rows(
            "SELECT id FROM payments WHERE state IN ('verified', 'signed', 'broadcast', 'mined')
             AND chain_id = $1 AND asset = $2 AND id > $3 AND kind <> 'deposit' ORDER BY id LIMIT $4",
            args![chain_id, asset, after, limit],
        )
        .await?;
    rows.iter().map(|row| row.int("id")).collect()
}

/// Credited payments of this token that are not final yet, a page of them by id.
pub async fn unfinalized(
    db: &Db,
    chain_id: i64,
    asset: Wallet,
    after: i64,
    limit: i64,
) -> Result<Vec<Payment>, DbError> {
    let rows = db
        .rows(
            "SELECT * FROM payments WHERE state = 'credited' AND chain_id = $1 AND asset = $2 AND id > $3
             ORDER BY id LIMIT $4",
            args![chain_id, asset, after, limit],
        )
        .await?;
    rows.iter().map(read).collect()
}

/// How many payments there are in each state. Nearly all are final, and grow for ever: they are not counted
/// one by one. Ids are given without a gap and none is taken out, so they are what is left.
pub async fn count_by_state(db: &Db) -> Result<Vec<(String, i64)>, DbError> {
    let rows = db
        .rows(
            "WITH others AS (
                 SELECT state, COUNT(*) AS n FROM payments
                 WHERE state IN ('verified', 'signed', 'broadcast', 'mined', 'credited', 'expired', 'cancelled',
                                 'failed', 'reorged')
                 GROUP BY state
             )
             SELECT state, n FROM others
             UNION ALL
             SELECT 'finalized', CAST((SELECT COALESCE(MAX(id), 0) FROM payments)
                                      - (SELECT COALESCE(SUM(n), 0) FROM others) AS BIGINT)",
            args![],
        )
        .await?;
    rows.iter().map(|row| Ok((row.text("state")?, row.int("n")?))).collect()
}

/// Account nonces that somebody else may have used between two of ours: a chain that says more is not
/// believed.
pub const MAX_NONCE_JUMP: i64 = 1_000;

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
             SET next_nonce = CASE WHEN next_nonce < $3 AND $3 - next_nonce <= $4 THEN $3 ELSE next_nonce END + 1
             WHERE chain_id = $1 AND address = $2 RETURNING next_nonce",
            args![chain_id, relayer, on_chain, MAX_NONCE_JUMP],
        )
        .await?;
    let next = row.ok_or_else(|| DbError::Corrupt("the relayer has no row".into()))?.int("next_nonce")?;
    Ok(next - 1)
}

/// Moves a payment from `from` to `to`: the one statement that does. `false`, if it is not in `from`
/// any more: somebody else has moved it. A move that payments cannot make the database refuses.
pub async fn advance(
    tx: &mut DbTx,
    id: i64,
    from: State,
    to: State,
    why: Option<&str>,
    now: Timestamp,
) -> Result<bool, DbError> {
    let moved = tx
        .execute(
            "UPDATE payments SET state = $3, last_error = $4, updated_at_ms = $5 WHERE id = $1 AND state = $2",
            args![id, from.as_str(), to.as_str(), why.map(str::to_owned), now],
        )
        .await?;
    Ok(moved == 1)
}

/// Notes where a payment's transfer is in the chain.
pub async fn locate(tx: &mut DbTx, id: i64, found: &FoundTransfer) -> Result<(), DbError> {
    tx.execute(
        "UPDATE payments SET tx_hash = $2, block_number = $3, block_hash = $4, log_index = $5 WHERE id = $1",
        args![
            id,
            hex_of(found.tx_hash.as_slice()),
            number(found.block_number)?,
            hex_of(found.block_hash.as_slice()),
            number(found.log_index)?
        ],
    )
    .await
    .map(drop)
}

/// Notes that the block which a payment's transfer was in is gone: its place may be another's.
pub async fn displace(tx: &mut DbTx, id: i64) -> Result<(), DbError> {
    tx.execute(
        "UPDATE payments SET tx_hash = NULL, block_number = NULL, block_hash = NULL, log_index = NULL WHERE id = $1",
        args![id],
    )
    .await
    .map(drop)
}

/// Of a wallet's payments, what is credited and not final yet.
pub async fn unfinalized_value(tx: &mut DbTx, wallet: Wallet) -> Result<MicroUsdc, DbError> {
    let row = tx
        .row(
            "SELECT CAST(COALESCE(SUM(value_micro), 0) AS BIGINT) AS value FROM payments
             WHERE from_wallet = $1 AND state = 'credited'",
            args![wallet],
        )
        .await?;
    row.map_or(Ok(MicroUsdc::ZERO), |row| row.micro("value"))
}

/// Keeps a signed transaction, before anybody sees it, and names it on its payment.
pub async fn insert_transaction(
    tx: &mut DbTx,
    payment_id: i64,
    signed: &SignedTx,
    now: Timestamp,
) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO payment_transactions (tx_hash, payment_id, relayer, account_nonce, raw, max_fee_wei,
                                           priority_fee_wei, created_at_ms)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING",
        args![
            hex_of(signed.hash.as_slice()),
            payment_id,
            signed.relayer,
            number(signed.account_nonce)?,
            hex_of(&signed.raw),
            signed.fees.max_fee.to_string(),
            signed.fees.max_priority_fee.to_string(),
            now
        ],
    )
    .await?;
    tx.execute(
        "UPDATE payments SET tx_hash = $2 WHERE id = $1 AND state IN ('verified', 'signed', 'broadcast')",
        args![payment_id, hex_of(signed.hash.as_slice())],
    )
    .await
    .map(drop)
}

/// The transactions signed for a payment, newest first.
pub async fn transactions(db: &Db, payment_id: i64) -> Result<Vec<SignedTx>, DbError> {
    let rows = db
        .rows(
            "SELECT * FROM payment_transactions WHERE payment_id = $1 ORDER BY created_at_ms DESC, tx_hash",
            args![payment_id],
        )
        .await?;
    rows.iter().map(read_transaction).collect()
}

pub async fn count_transactions(tx: &mut DbTx, payment_id: i64) -> Result<usize, DbError> {
    let sql = "SELECT COUNT(*) AS n FROM payment_transactions WHERE payment_id = $1";
    let count = tx.row(sql, args![payment_id]).await?.map_or(Ok(0), |row| row.int("n"))?;
    usize::try_from(count).map_err(|_| DbError::Corrupt("a count below zero".into()))
}

/// Of a wallet's payments, those for which the chain has taken a transaction of ours since a time and
/// that have brought nothing.
pub async fn sent_in_vain(tx: &mut DbTx, wallet: Wallet, since: Timestamp) -> Result<i64, DbError> {
    let row = tx
        .row(
            "SELECT COUNT(*) AS n FROM payments
             WHERE from_wallet = $1 AND state IN ('verified', 'signed', 'broadcast', 'expired', 'cancelled')
             AND id IN (SELECT payment_id FROM payment_transactions WHERE settled_at_ms > $2)",
            args![wallet, since],
        )
        .await?;
    row.map_or(Ok(0), |row| row.int("n"))
}

/// A transaction whose account nonce the chain has not taken for good.
pub struct OpenTransaction {
    pub payment_id: i64,
    pub signed: SignedTx,
    pub created_at: Timestamp,
}

/// The relayers that have sent on a chain, today's and earlier ones.
pub async fn relayers(db: &Db, chain_id: i64) -> Result<Vec<Wallet>, DbError> {
    let rows = db.rows("SELECT address FROM relayers WHERE chain_id = $1", args![chain_id]).await?;
    rows.iter().map(|row| row.wallet("address")).collect()
}

/// Of a relayer's transactions that the chain has not taken, from a nonce on, the newest of the lowest
/// nonce: all others wait for it.
pub async fn lowest_open(
    db: &Db,
    chain_id: i64,
    relayer: Wallet,
    from: u64,
) -> Result<Option<OpenTransaction>, DbError> {
    let row = db
        .row(
            "SELECT * FROM payment_transactions
             WHERE relayer = $2 AND account_nonce >= $3 AND settled_at_ms IS NULL
             AND payment_id IN (SELECT id FROM payments WHERE chain_id = $1)
             ORDER BY account_nonce, created_at_ms DESC LIMIT 1",
            args![chain_id, relayer, number(from)?],
        )
        .await?;
    let read = |row: DbRow| {
        Ok(OpenTransaction {
            payment_id: row.int("payment_id")?,
            signed: read_transaction(&row)?,
            created_at: row.time("created_at_ms")?,
        })
    };
    row.map(read).transpose()
}

/// Takes note that the chain has taken a relayer's nonces below `below` for good.
pub async fn mark_settled(
    tx: &mut DbTx,
    chain_id: i64,
    relayer: Wallet,
    below: u64,
    now: Timestamp,
) -> Result<(), DbError> {
    tx.execute(
        "UPDATE payment_transactions SET settled_at_ms = $4
         WHERE relayer = $2 AND account_nonce < $3 AND settled_at_ms IS NULL
         AND payment_id IN (SELECT id FROM payments WHERE chain_id = $1)",
        args![chain_id, relayer, number(below)?, now],
    )
    .await
    .map(drop)
}

/// Reserves the next call to the facilitator for one of those who would make it, until a time: whoever
/// has seen as many `calls` as there were. `false`: another makes it, or the payment has moved on.
pub async fn reserve_call(tx: &mut DbTx, id: i64, calls: i64, until: Timestamp) -> Result<bool, DbError> {
    let reserved = tx
        .execute(
            "UPDATE payments SET facilitator_calls = facilitator_calls + 1, facilitator_next_ms = $3
             WHERE id = $1 AND facilitator_calls = $2 AND state IN ('verified', 'credited')",
            args![id, calls, until],
        )
        .await?;
    Ok(reserved == 1)
}

/// Gives a payment that the facilitator was never shown to a relayer: it has had all its calls. `false` if it was
/// shown meanwhile.
pub async fn leave_to_relayer(tx: &mut DbTx, id: i64, all_calls: i64) -> Result<bool, DbError> {
    let sql = "UPDATE payments SET facilitator_calls = $2
               WHERE id = $1 AND facilitator_calls = 0 AND state IN ('verified', 'credited')";
    Ok(tx.execute(sql, args![id, all_calls]).await? == 1)
}

/// Keeps what a call to the facilitator came to, and when the next may be made.
pub async fn note_answer(
    tx: &mut DbTx,
    id: i64,
    next: Timestamp,
    refusal: Option<&str>,
    note: &str,
) -> Result<(), DbError> {
    tx.execute(
        "UPDATE payments SET facilitator_next_ms = $2, facilitator_refusal = $3,
                             last_error = CASE WHEN state = 'verified' THEN $4 ELSE last_error END
         WHERE id = $1",
        args![id, next, refusal.map(str::to_owned), note],
    )
    .await
    .map(drop)
}

pub async fn note_error(tx: &mut DbTx, id: i64, why: &str) -> Result<(), DbError> {
    tx.execute("UPDATE payments SET last_error = $2 WHERE id = $1", args![id, why]).await.map(drop)
}

pub fn read(row: &DbRow) -> Result<Payment, DbError> {
    let uint = |column| {
        u64::try_from(row.int(column)?)
            .map(U256::from)
            .map_err(|_| DbError::Corrupt(format!("{column} below zero")))
    };
    Ok(Payment {
        id: row.int("id")?,
        chain_id: u64::try_from(row.int("chain_id")?)
            .map_err(|_| DbError::Corrupt("chain_id below zero".into()))?,
        asset: row.wallet("asset")?,
        kind: row.parsed("kind")?,
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
        block_hash: row.text_or_null("block_hash")?,
        log_index: row.int_or_null("log_index")?,
        request_hash: row.text_or_null("request_hash")?,
        beneficiary: row
            .text_or_null("beneficiary")?
            .is_some()
            .then(|| row.wallet("beneficiary"))
            .transpose()?,
        last_error: row.text_or_null("last_error")?,
        facilitation: Facilitation {
            calls: row.int("facilitator_calls")?,
            next_call_at: row.time("facilitator_next_ms")?,
            refusal: row.text_or_null("facilitator_refusal")?,
        },
        created_at: row.time("created_at_ms")?,
        updated_at: row.time("updated_at_ms")?,
    })
}

fn read_transaction(row: &DbRow) -> Result<SignedTx, DbError> {
    Ok(SignedTx {
        relayer: row.wallet("relayer")?,
        account_nonce: u64::try_from(row.int("account_nonce")?)
            .map_err(|_| DbError::Corrupt("account_nonce below zero".into()))?,
        fees: Fees { max_fee: row.parsed("max_fee_wei")?, max_priority_fee: row.parsed("priority_fee_wei")? },
        hash: b256(row, "tx_hash")?,
        raw: Bytes::from(bytes(row, "raw")?),
    })
}

/// A hash as the books have it.
pub fn hex_of(bytes: &[u8]) -> String {
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
/// Of withdrawals that wait for nothing but finality, since before another.
pub async fn unfinished_since(db: &Db, before: Timestamp, sent_before: Timestamp) -> Result<i64, DbError> {
    let row = db
        .row(
            "SELECT COUNT(*) AS n FROM payments
             WHERE state IN ('verified', 'signed', 'broadcast', 'mined') AND created_at_ms < $1
             AND kind <> 'deposit' AND (kind <> 'withdrawal' OR state <> 'mined' OR created_at_ms < $2)",
            args![before, sent_before],
        )
        .await?;
    row.map_or(Ok(0), |row| row.int("n"))
}

pub async fn all_credited(tx: &mut DbTx) -> Result<Vec<Payment>, DbError> {
    let sql = "SELECT * FROM payments WHERE state IN ('credited', 'finalized') AND kind <> 'withdrawal' ORDER BY id";
    tx.rows(sql, args![]).await?.iter().map(read).collect()
}

/// All that has arrived and is nobody's yet.
pub async fn all_in_suspense(tx: &mut DbTx) -> Result<Vec<Payment>, DbError> {
    let sql = "SELECT * FROM payments WHERE kind = 'deposit' AND state = 'mined' ORDER BY id";
    tx.rows(sql, args![]).await?.iter().map(read).collect()
}

/// Of what is in suspense, the newest.
pub async fn suspense(db: &Db, limit: i64) -> Result<Vec<Payment>, DbError> {
    let sql = "SELECT * FROM payments WHERE kind = 'deposit' AND state = 'mined' ORDER BY id DESC LIMIT $1";
    db.rows(sql, args![limit]).await?.iter().map(read).collect()
}

/// How many deposits are in suspense, and what they come to.
pub async fn count_suspense(db: &Db) -> Result<(i64, MicroUsdc), DbError> {
    let sql = "SELECT COUNT(*) AS n, CAST(COALESCE(SUM(value_micro), 0) AS BIGINT) AS value FROM payments
               WHERE kind = 'deposit' AND state = 'mined'";
    let row = db.row(sql, args![]).await?.ok_or_else(|| DbError::Corrupt("no count".into()))?;
    Ok((row.int("n")?, row.micro("value")?))
}

/// Deposits in suspense of at least a value whose wallet has come to be known, a page of them by id.
pub async fn claimable(
    db: &Db,
    chain_id: i64,
    asset: Wallet,
    at_least: MicroUsdc,
    after: i64,
    limit: i64,
) -> Result<Vec<Payment>, DbError> {
    let rows = db
        .rows(
            "SELECT p.* FROM payments p JOIN wallets w ON w.address = p.from_wallet
             WHERE p.kind = 'deposit' AND p.state = 'mined' AND p.value_micro >= $3
             AND p.chain_id = $1 AND p.asset = $2 AND p.id > $4 ORDER BY p.id LIMIT $5",
            args![chain_id, asset, at_least, after, limit],
        )
        .await?;
    rows.iter().map(read).collect()
}

/// Whether a transfer is some payment's for good: credited, or a deposit in suspense.
pub async fn is_placed(db: &Db, chain_id: i64, found: &FoundTransfer) -> Result<bool, DbError> {
    let row = db
        .row(
            "SELECT id FROM payments WHERE chain_id = $1 AND tx_hash = $2 AND log_index = $3
             AND (state IN ('credited', 'finalized') OR kind = 'deposit')",
            args![chain_id, hex_of(found.tx_hash.as_slice()), number(found.log_index)?],
        )
        .await?;
    Ok(row.is_some())
}

/// Gives a deposit in suspense to a wallet; `false` if it is not in suspense.
pub async fn set_beneficiary(tx: &mut DbTx, id: i64, wallet: Wallet) -> Result<bool, DbError> {
    let sql = "UPDATE payments SET beneficiary = $2 WHERE id = $1 AND kind = 'deposit' AND state = 'mined'";
    Ok(tx.execute(sql, args![id, wallet]).await? == 1)
}

/// The search for deposits to an address: the block it began at, and the one it goes on at.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct DepositCursor {
    pub first_block: u64,
    pub next_block: u64,
}

pub async fn deposit_cursor(
    db: &Db,
    chain_id: i64,
    asset: Wallet,
    receiver: Wallet,
) -> Result<Option<DepositCursor>, DbError> {
    let sql = "SELECT * FROM deposit_cursors WHERE chain_id = $1 AND asset = $2 AND receiver = $3";
    let read = |row: DbRow| {
        let block = |column| {
            u64::try_from(row.int(column)?).map_err(|_| DbError::Corrupt(format!("{column} below zero")))
        };
        Ok(DepositCursor { first_block: block("first_block")?, next_block: block("next_block")? })
    };
    db.row(sql, args![chain_id, asset, receiver]).await?.map(read).transpose()
}

/// Begins a search, unless there is one.
pub async fn begin_deposits(
    tx: &mut DbTx,
    chain_id: i64,
    asset: Wallet,
    receiver: Wallet,
    first_block: u64,
) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO deposit_cursors (chain_id, asset, receiver, first_block, next_block)
         VALUES ($1, $2, $3, $4, $4) ON CONFLICT DO NOTHING",
        args![chain_id, asset, receiver, number(first_block)?],
    )
    .await
    .map(drop)
}

/// Moves it on; of two nodes that search the one that is behind moves nothing.
pub async fn move_deposit_cursor(
    tx: &mut DbTx,
    chain_id: i64,
    asset: Wallet,
    receiver: Wallet,
    next_block: u64,
) -> Result<(), DbError> {
    tx.execute(
        "UPDATE deposit_cursors SET next_block = $4
         WHERE chain_id = $1 AND asset = $2 AND receiver = $3 AND next_block < $4",
        args![chain_id, asset, receiver, number(next_block)?],
    )
    .await
    .map(drop)
}

/// A wallet's withdrawals, newest first, older than `before`.
pub async fn withdrawals_of(
    db: &Db,
    wallet: Wallet,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<Payment>, DbError> {
    let rows = db
        .rows(
            "SELECT * FROM payments WHERE to_wallet = $1 AND id < $2 AND kind = 'withdrawal'
             ORDER BY id DESC LIMIT $3",
            args![wallet, before.unwrap_or(i64::MAX), limit],
        )
        .await?;
    rows.iter().map(read).collect()
}

/// A wallet's withdrawal by the nonce of its authorization.
pub async fn find_withdrawal(db: &Db, wallet: Wallet, nonce: B256) -> Result<Option<Payment>, DbError> {
    let sql = "SELECT * FROM payments WHERE to_wallet = $1 AND nonce = $2 AND kind = 'withdrawal'";
    db.row(sql, args![wallet, hex_of(nonce.as_slice())]).await?.as_ref().map(read).transpose()
}

/// How many withdrawals of a wallet no block holds yet.
pub async fn unsent_withdrawals(tx: &mut DbTx, wallet: Wallet) -> Result<i64, DbError> {
    let sql = "SELECT COUNT(*) AS n FROM payments WHERE to_wallet = $1 AND kind = 'withdrawal'
               AND state IN ('verified', 'signed', 'broadcast')";
    tx.row(sql, args![wallet]).await?.map_or(Ok(0), |row| row.int("n"))
}

/// What a treasury is to pay by withdrawals that no block holds yet.
pub async fn value_to_leave(
    tx: &mut DbTx,
    chain_id: i64,
    asset: Wallet,
    treasury: Wallet,
) -> Result<MicroUsdc, DbError> {
    let sql = "SELECT CAST(COALESCE(SUM(value_micro), 0) AS BIGINT) AS value FROM payments
               WHERE from_wallet = $3 AND state IN ('verified', 'signed', 'broadcast')
               AND kind = 'withdrawal' AND chain_id = $1 AND asset = $2";
    let row = tx.row(sql, args![chain_id, asset, treasury]).await?;
    row.map_or(Ok(MicroUsdc::ZERO), |row| row.micro("value"))
}

/// What was withdrawn since a time, or is about to be.
pub struct Withdrawn {
    pub all: MicroUsdc,
    /// Of these a wallet's.
    pub wallet: MicroUsdc,
    /// When the first of all was asked for, and of the wallet's.
    pub first_at: Timestamp,
    pub wallet_first_at: Timestamp,
}

pub async fn withdrawn_since(tx: &mut DbTx, wallet: Wallet, since: Timestamp) -> Result<Withdrawn, DbError> {
    let row = tx
        .row(
            "SELECT CAST(COALESCE(SUM(value_micro), 0) AS BIGINT) AS value,
                    CAST(COALESCE(SUM(CASE WHEN to_wallet = $1 THEN value_micro ELSE 0 END), 0) AS BIGINT) AS own,
                    CAST(COALESCE(MIN(created_at_ms), $2) AS BIGINT) AS first_at_ms,
                    CAST(COALESCE(MIN(CASE WHEN to_wallet = $1 THEN created_at_ms END), $2) AS BIGINT)
                    AS own_first_at_ms
             FROM payments
             WHERE kind = 'withdrawal' AND created_at_ms > $2 AND state NOT IN ('expired', 'cancelled')",
            args![wallet, since],
        )
        .await?
        .ok_or_else(|| DbError::Corrupt("no sum".into()))?;
    Ok(Withdrawn {
        all: row.micro("value")?,
        wallet: row.micro("own")?,
        first_at: row.time("first_at_ms")?,
        wallet_first_at: row.time("own_first_at_ms")?,
    })
}

/// How many withdrawals have not ended, and what they lock.
pub async fn open_withdrawals(db: &Db) -> Result<(i64, MicroUsdc), DbError> {
    let sql = "SELECT COUNT(*) AS n, CAST(COALESCE(SUM(value_micro), 0) AS BIGINT) AS value FROM payments
               WHERE state IN ('verified', 'signed', 'broadcast', 'mined') AND kind = 'withdrawal'";
    let row = db.row(sql, args![]).await?.ok_or_else(|| DbError::Corrupt("no count".into()))?;
    Ok((row.int("n")?, row.micro("value")?))
}

pub async fn all_withdrawals(tx: &mut DbTx) -> Result<Vec<Payment>, DbError> {
    let sql = "SELECT * FROM payments WHERE kind = 'withdrawal' ORDER BY id";
    tx.rows(sql, args![]).await?.iter().map(read).collect()
}
