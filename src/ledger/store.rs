//! The ledger's SQL, but for that of holds and their ends: see `batch`.

use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbRow, DbTx, args};
use crate::id::Wallet;
use crate::ledger::batch::ALL_DAYS;
use crate::ledger::{Balance, Entry, Hold, Receipt, Spending, UsageTotal};
use crate::money::{MicroUsdc, PicoUsd};
use crate::pricing::{Dialect, Reported, Terms, Unit, Usage};

/// What entries there are beside charges, which `batch` writes.
#[derive(Copy, Clone)]
pub enum Kind {
    Topup,
    Reversal,
    Debt,
    Repayment,
    Withdrawal,
    Adjustment,
}

/// An entry to be: `amount` added to the balance.
pub struct Booking<'a> {
    pub kind: Kind,
    /// What it is for: a payment, a request, an adjustment. Of each kind there is one for each.
    pub reference: &'a str,
    pub amount: MicroUsdc,
    pub note: Option<String>,
}

impl<'a> Booking<'a> {
    pub fn new(kind: Kind, reference: &'a str, amount: MicroUsdc) -> Self {
        Self { kind, reference, amount, note: None }
    }
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Topup => "topup",
            Self::Reversal => "reversal",
            Self::Debt => "debt",
            Self::Repayment => "repayment",
            Self::Withdrawal => "withdrawal",
            Self::Adjustment => "adjustment",
        }
    }

    /// The account on the other side.
    fn contra(self) -> &'static str {
        match self {
            Self::Topup | Self::Reversal | Self::Withdrawal => "treasury",
            Self::Debt | Self::Repayment => "debt",
            Self::Adjustment => "operator",
        }
    }
}

pub async fn ensure_wallet(tx: &mut DbTx, wallet: Wallet, now: Timestamp) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO wallets (address, created_at_ms) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        args![wallet, now],
    )
    .await
    .map(drop)
}

/// Changes a wallet's balance and writes the entry that says why.
pub async fn book(
    tx: &mut DbTx,
    wallet: Wallet,
    booking: Booking<'_>,
    now: Timestamp,
) -> Result<Balance, DbError> {
    let Booking { kind, reference, amount, note } = booking;
    // What moves between a wallet and its debt changes both alike.
    let debt = if kind.contra() == "debt" { amount } else { MicroUsdc::ZERO };
    let row = tx
        .row(
            "UPDATE wallets
             SET balance_micro = balance_micro + $2, debt_micro = debt_micro + $3, seq = seq + 1
             WHERE address = $1 RETURNING balance_micro, locked_micro, debt_micro, seq",
            args![wallet, amount, debt],
        )
        .await?
        .ok_or_else(|| DbError::Corrupt(format!("no wallet {wallet}")))?;
    let after = read_balance_row(&row)?;
    let out_of_range = || DbError::Corrupt(format!("balance of {wallet} out of range"));
    let before = after.balance.checked_sub(amount).ok_or_else(out_of_range)?;
    let contra = MicroUsdc::ZERO.checked_sub(amount).ok_or_else(out_of_range)?;
    tx.execute(
        "INSERT INTO entries (wallet, seq, kind, reference, amount_micro, balance_before_micro,
                              balance_after_micro, contra_account, contra_micro, note, created_at_ms)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        args![
            wallet,
            row.int("seq")?,
            kind.as_str(),
            reference,
            amount,
            before,
            after.balance,
            kind.contra(),
            contra,
            note,
            now
        ],
    )
    .await?;
    Ok(after)
}

/// What each key of a wallet has spent and holds, of all days and of one.
pub async fn spending_of_keys(
    db: &Db,
    wallet: Wallet,
    day: i64,
) -> Result<HashMap<i64, (Spending, Spending)>, DbError> {
    let rows = db
        .rows(
            "SELECT s.* FROM key_spending s JOIN api_keys k ON k.id = s.api_key_id
             WHERE k.wallet = $1 AND s.day IN (0, $2)",
            args![wallet, day],
        )
        .await?;
    let mut keys: HashMap<i64, (Spending, Spending)> = HashMap::new();
    for row in rows {
        let read = Spending { spent: row.micro("spent_micro")?, held: row.micro("held_micro")? };
        let key = keys.entry(row.int("api_key_id")?).or_default();
        match row.int("day")? {
            ALL_DAYS => key.0 = read,
            _ => key.1 = read,
        }
    }
    Ok(keys)
}

/// Holds of other nodes that have given their lease back, or whose lease ran out before `dead_before`.
pub async fn orphans(db: &Db, node: &str, dead_before: Timestamp, limit: i64) -> Result<Vec<Hold>, DbError> {
    let rows = db
        .rows(
            "SELECT h.* FROM holds h LEFT JOIN nodes n ON n.id = h.node
             WHERE h.node <> $1 AND (n.id IS NULL OR n.lease_expires_ms < $2) LIMIT $3",
            args![node, dead_before, limit],
        )
        .await?;
    rows.iter().map(read_hold).collect()
}

pub async fn open_holds(db: &Db) -> Result<(i64, MicroUsdc), DbError> {
    let sql = "SELECT COUNT(*) AS holds, CAST(COALESCE(SUM(amount_micro), 0) AS BIGINT) AS locked FROM holds";
    let row = db.row(sql, args![]).await?.ok_or_else(|| DbError::Corrupt("no count".into()))?;
    Ok((row.int("holds")?, row.micro("locked")?))
}

/// The key id under which calls without a key are totalled; keys count from 1.
pub const NO_KEY: i64 = 0;

pub async fn usage_totals(db: &Db, wallet: Wallet) -> Result<Vec<UsageTotal>, DbError> {
    let rows =
        db.rows("SELECT * FROM usage_totals WHERE wallet = $1 ORDER BY api_key_id", args![wallet]).await?;
    let read = |row: &DbRow| {
        let api_key_id = row.int("api_key_id")?;
        Ok(UsageTotal {
            api_key_id: (api_key_id != NO_KEY).then_some(api_key_id),
            request_count: row.int("request_count")?,
            prompt_tokens: row.int("prompt_tokens")?,
            completion_tokens: row.int("completion_tokens")?,
            charged: row.micro("charged_micro")?,
            revenue: PicoUsd::new(row.int("revenue_pico")?.into()),
        })
    };
    rows.iter().map(read).collect()
}

pub async fn read_balance(db: &Db, wallet: Wallet) -> Result<Balance, DbError> {
    let row = db.row(SELECT_BALANCE, args![wallet]).await?;
    row.as_ref().map(read_balance_row).transpose().map(Option::unwrap_or_default)
}

const SELECT_BALANCE: &str = "SELECT balance_micro, locked_micro, debt_micro FROM wallets WHERE address = $1";

/// The balance, with the wallet's row kept from others until this transaction ends.
pub async fn locked_balance(tx: &mut DbTx, wallet: Wallet) -> Result<Balance, DbError> {
    let row = tx
        .row(
            "UPDATE wallets SET locked_micro = locked_micro WHERE address = $1
             RETURNING balance_micro, locked_micro, debt_micro",
            args![wallet],
        )
        .await?;
    row.as_ref().map(read_balance_row).transpose().map(Option::unwrap_or_default)
}

pub async fn receipt_of(db: &Db, wallet: Wallet, id: &str) -> Result<Option<Receipt>, DbError> {
    let row = db.row("SELECT * FROM receipts WHERE id = $1 AND wallet = $2", args![id, wallet]).await?;
    row.as_ref().map(read_receipt).transpose()
}

pub async fn receipt(db: &Db, id: &str) -> Result<Option<Receipt>, DbError> {
    let row = db.row("SELECT * FROM receipts WHERE id = $1", args![id]).await?;
    row.as_ref().map(read_receipt).transpose()
}

pub async fn receipts_of(
    db: &Db,
    wallet: Wallet,
    before: Option<(Timestamp, String)>,
    limit: i64,
) -> Result<Vec<Receipt>, DbError> {
    // No receipt is as late as the end of time, so without a cursor all are before it.
    let (time, id) = before.unwrap_or((Timestamp::from_millis(i64::MAX), String::new()));
    // Compared as one, the index goes straight to it. Of an OR PostgreSQL reads all that is newer first.
    let rows = db
        .rows(
            "SELECT * FROM receipts
             WHERE wallet = $1 AND (created_at_ms, id) < ($2, $3)
             ORDER BY created_at_ms DESC, id DESC LIMIT $4",
            args![wallet, time, id, limit],
        )
        .await?;
    rows.iter().map(read_receipt).collect()
}

pub async fn renew_lease(tx: &mut DbTx, node: &str, expires: Timestamp) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO nodes (id, lease_expires_ms) VALUES ($1, $2)
         ON CONFLICT (id) DO UPDATE SET lease_expires_ms = excluded.lease_expires_ms",
        args![node, expires],
    )
    .await
    .map(drop)
}

/// Forgets nodes that are long gone and left nothing behind.
pub async fn forget_nodes(tx: &mut DbTx, gone_before: Timestamp) -> Result<(), DbError> {
    tx.execute(
        "DELETE FROM nodes WHERE lease_expires_ms < $1
         AND NOT EXISTS (SELECT 1 FROM holds WHERE holds.node = nodes.id)",
        args![gone_before],
    )
    .await
    .map(drop)
}

pub async fn drop_lease(tx: &mut DbTx, node: &str) -> Result<(), DbError> {
    tx.execute("DELETE FROM nodes WHERE id = $1", args![node]).await.map(drop)
}

fn read_balance_row(row: &DbRow) -> Result<Balance, DbError> {
    Ok(Balance {
        balance: row.micro("balance_micro")?,
        locked: row.micro("locked_micro")?,
        debt: row.micro("debt_micro")?,
    })
}

pub fn read_hold(row: &DbRow) -> Result<Hold, DbError> {
    Ok(Hold {
        id: row.text("id")?,
        wallet: row.wallet("wallet")?,
        api_key_id: row.int_or_null("api_key_id")?,
        amount: row.micro("amount_micro")?,
        terms: read_terms(&row.text("terms")?)?,
        created_at: row.time("created_at_ms")?,
    })
}

pub fn read_receipt(row: &DbRow) -> Result<Receipt, DbError> {
    let usage_raw = row.text_or_null("usage_raw")?;
    Ok(Receipt {
        id: row.text("id")?,
        wallet: row.wallet("wallet")?,
        api_key_id: row.int_or_null("api_key_id")?,
        outcome: row.parsed("outcome")?,
        reason: row.text_or_null("reason")?,
        terms: read_terms(&row.text("terms")?)?,
        hold: row.micro("hold_micro")?,
        charged: row.micro("charged_micro")?,
        cost: PicoUsd::new(row.int("cost_pico")?.into()),
        usage: read_usage(row, usage_raw.as_deref())?,
        usage_raw,
        upstream_cost: row.int_or_null("upstream_cost_pico")?.map(|pico| PicoUsd::new(pico.into())),
        created_at: row.time("created_at_ms")?,
        ended_at: row.time("ended_at_ms")?,
    })
}

/// What was used by unit; where that is not kept, the columns say all of it.
fn read_usage(row: &DbRow, usage_raw: Option<&str>) -> Result<Usage, DbError> {
    if let Some(units) = row.text_or_null("usage_units")? {
        return serde_json::from_str(&units).map_err(|e| DbError::Corrupt(format!("usage_units: {e}")));
    }
    let tokens = |column| {
        u64::try_from(row.int(column)?).map_err(|_| DbError::Corrupt(format!("{column} below zero")))
    };
    let (prompt, cached) = (tokens("prompt_tokens")?, tokens("cached_tokens")?);
    let completion = tokens("completion_tokens")?;
    // Receipts from before units were kept have it in the report alone.
    let reported = usage_raw.and_then(|raw| Reported::read(Dialect::OpenAi, raw));
    let reasoning = reported.map_or(0, |reported| reported.usage.count(Unit::Reasoning)).min(completion);
    Ok(Usage::tokens(prompt.saturating_sub(cached), completion - reasoning)
        .with(Unit::CachedPrompt, cached)
        .with(Unit::Reasoning, reasoning))
}

/// The units of `usage`, where the columns of tokens do not say all of it.
pub fn units_json(usage: &Usage) -> Result<Option<String>, DbError> {
    let in_columns = [Unit::Prompt, Unit::CachedPrompt, Unit::Completion];
    if usage.iter().all(|(unit, _)| in_columns.contains(&unit)) {
        return Ok(None);
    }
    serde_json::to_string(usage).map(Some).map_err(|e| DbError::Corrupt(format!("usage_units: {e}")))
}

pub fn read_terms(json: &str) -> Result<Terms, DbError> {
    serde_json::from_str(json).map_err(|e| DbError::Corrupt(format!("terms: {e}")))
}

pub fn terms_json(terms: &Terms) -> Result<String, DbError> {
    serde_json::to_string(terms).map_err(|e| DbError::Corrupt(format!("terms: {e}")))
}

pub async fn set_frozen(tx: &mut DbTx, wallet: Wallet, reason: Option<String>) -> Result<bool, DbError> {
    let sql = "UPDATE wallets SET frozen_reason = $2 WHERE address = $1";
    Ok(tx.execute(sql, args![wallet, reason]).await? == 1)
}

const SELECT_FROZEN: &str = "SELECT frozen_reason FROM wallets WHERE address = $1";

pub async fn frozen_reason(db: &Db, wallet: Wallet) -> Result<Option<String>, DbError> {
    db.row(SELECT_FROZEN, args![wallet]).await?.map_or(Ok(None), |row| row.text_or_null("frozen_reason"))
}

pub async fn frozen_reason_in(tx: &mut DbTx, wallet: Wallet) -> Result<Option<String>, DbError> {
    tx.row(SELECT_FROZEN, args![wallet]).await?.map_or(Ok(None), |row| row.text_or_null("frozen_reason"))
}

/// Locks so much more of a balance, or less.
pub async fn change_locked(tx: &mut DbTx, wallet: Wallet, amount: MicroUsdc) -> Result<(), DbError> {
    let sql = "UPDATE wallets SET locked_micro = locked_micro + $2 WHERE address = $1";
    match tx.execute(sql, args![wallet, amount]).await? {
        1 => Ok(()),
        _ => Err(DbError::Corrupt(format!("no wallet {wallet}"))),
    }
}

/// What the credit for a payment left, a debt that it repaid taken off.
pub async fn balance_when_credited(db: &Db, payment: &str) -> Result<MicroUsdc, DbError> {
    let sql = "SELECT balance_after_micro FROM entries
               WHERE kind IN ('topup', 'repayment') AND reference = $1 ORDER BY seq DESC LIMIT 1";
    let row = db.row(sql, args![payment]).await?;
    row.ok_or_else(|| DbError::Corrupt(format!("no credit for payment {payment}")))?
        .micro("balance_after_micro")
}

/// Whose books the adjustment of this name is in, and its amount.
pub async fn find_adjustment(tx: &mut DbTx, reference: &str) -> Result<Option<(Wallet, MicroUsdc)>, DbError> {
    let sql = "SELECT wallet, amount_micro FROM entries WHERE kind = 'adjustment' AND reference = $1";
    let row = tx.row(sql, args![reference]).await?;
    row.map(|row| Ok((row.wallet("wallet")?, row.micro("amount_micro")?))).transpose()
}

pub async fn entries_of(db: &Db, wallet: Wallet, limit: i64) -> Result<Vec<Entry>, DbError> {
    let sql = "SELECT * FROM entries WHERE wallet = $1 ORDER BY seq DESC LIMIT $2";
    let read = |row: &DbRow| {
        Ok(Entry {
            seq: row.int("seq")?,
            kind: row.text("kind")?,
            reference: row.text("reference")?,
            amount: row.micro("amount_micro")?,
            balance_after: row.micro("balance_after_micro")?,
            note: row.text_or_null("note")?,
            created_at: row.time("created_at_ms")?,
        })
    };
    db.rows(sql, args![wallet, limit]).await?.iter().map(read).collect()
}
