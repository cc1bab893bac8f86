//! A batch on SQLite: prepared statements, a row at a time. Each is a call into a library, so that nothing
//! is gained by putting many rows into one.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, Type, ValueRef};
use rusqlite::{CachedStatement, Error, OptionalExtension as _, Params, Row, params};

use crate::clock::Timestamp;
use crate::db::{DbError, SqliteFile, SqliteTurn};
use crate::id::{StoredWallet, Wallet};
use crate::ledger::batch::{
    Account, Caps, KeptSpending, Loaded, Name, Open, Operation, Page, Past, Store, pico,
};
use crate::ledger::store::{NO_KEY, read_terms, terms_json, units_json};
use crate::ledger::{Balance, Hold, Spending};
use crate::money::MicroUsdc;

const FIND_WALLET: &str = "SELECT balance_micro, locked_micro, debt_micro, seq, frozen_reason
     FROM wallets WHERE address = ?1";
const INSERT_WALLET: &str = "INSERT INTO wallets (address, created_at_ms) VALUES (?1, ?2)";
const FIND_HOLD: &str = "SELECT wallet, amount_micro, id, api_key_id, terms, created_at_ms
     FROM holds WHERE id = ?1";
const FIND_RECEIPT: &str = "SELECT wallet, outcome, charged_micro, reason FROM receipts WHERE id = ?1";
const FIND_CLAIM: &str = "SELECT request_hash, request_id,
            (SELECT receipts.outcome FROM receipts WHERE receipts.id = claims.request_id)
     FROM claims WHERE wallet = ?1 AND name = ?2";
const FIND_SPENDING: &str = "SELECT spent_micro, held_micro FROM key_spending
     WHERE api_key_id = ?1 AND day = ?2";
const FIND_CAPS: &str = "SELECT spend_cap_micro, spend_cap_per_day_micro FROM api_keys WHERE id = ?1";

const UPDATE_WALLET: &str = "UPDATE wallets SET balance_micro = ?2, locked_micro = ?3, seq = ?4
     WHERE address = ?1";
const INSERT_HOLD: &str =
    "INSERT INTO holds (id, wallet, node, api_key_id, amount_micro, terms, created_at_ms)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
const DELETE_HOLD: &str = "DELETE FROM holds WHERE id = ?1";
const INSERT_CHARGE: &str = "INSERT INTO entries (wallet, seq, kind, reference, amount_micro,
            balance_before_micro, balance_after_micro, contra_account, contra_micro, created_at_ms)
     VALUES (?1, ?2, 'charge', ?3, ?4, ?5, ?5 + ?4, 'revenue', -?4, ?6)";
const INSERT_RECEIPT: &str =
    "INSERT INTO receipts (id, wallet, api_key_id, model, outcome, reason, hold_micro,
            charged_micro, cost_pico, prompt_tokens, cached_tokens, completion_tokens, usage_raw, terms,
            created_at_ms, ended_at_ms, usage_units, upstream_cost_pico)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)";
const ADD_USAGE: &str = "INSERT INTO usage_totals (wallet, api_key_id, request_count, prompt_tokens,
            completion_tokens, charged_micro, revenue_pico)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
     ON CONFLICT (wallet, api_key_id) DO UPDATE SET
         request_count = usage_totals.request_count + excluded.request_count,
         prompt_tokens = usage_totals.prompt_tokens + excluded.prompt_tokens,
         completion_tokens = usage_totals.completion_tokens + excluded.completion_tokens,
         charged_micro = usage_totals.charged_micro + excluded.charged_micro,
         revenue_pico = usage_totals.revenue_pico + excluded.revenue_pico";
const KEEP_SPENDING: &str = "INSERT INTO key_spending (api_key_id, day, spent_micro, held_micro)
     VALUES (?1, ?2, ?3, ?4)
     ON CONFLICT (api_key_id, day) DO UPDATE
     SET spent_micro = excluded.spent_micro, held_micro = excluded.held_micro";
const KEEP_CLAIM: &str = "INSERT INTO claims (wallet, name, request_hash, request_id, created_at_ms)
     VALUES (?1, ?2, ?3, ?4, ?5)
     ON CONFLICT (wallet, name) DO UPDATE
     SET request_id = excluded.request_id, created_at_ms = excluded.created_at_ms";

/// The turn to write to the file.
pub struct SqliteStore(SqliteTurn);

impl Store for SqliteStore {
    type Home = SqliteFile;

    async fn turn(file: &SqliteFile) -> Result<Self, DbError> {
        file.turn().await.map(Self)
    }

    async fn begin(&mut self, must_last: bool) -> Result<(), DbError> {
        self.0.begin(must_last)
    }

    async fn load<'a>(&mut self, operations: &'a [Operation], now: Timestamp) -> Result<Loaded<'a>, DbError> {
        let mut page = Page::about(operations);
        self.read_wallets(&mut page, operations)?;
        self.read_requests(&mut page)?;
        self.read_keys(&mut page)?;
        self.read_names(&mut page)?;
        for wallet in page.lost_wallets(operations) {
            touch(&mut self.0.prepare(INSERT_WALLET)?, params![wallet.stored(), now.millis()])?;
            page.accounts.insert(wallet, Account::default());
        }
        Ok(Loaded::Page(Box::new(page)))
    }

    async fn write(&mut self, page: &Page<'_>, node: &str, now: Timestamp) -> Result<(), DbError> {
        self.write_wallets(page)?;
        self.write_holds(page, node)?;
        self.write_charges(page, now)?;
        self.write_receipts(page, now)?;
        self.write_usage(page)?;
        self.write_spending(page)?;
        self.write_names(page, now)
    }

    async fn commit(&mut self) -> Result<(), DbError> {
        self.0.commit()
    }
}

impl SqliteStore {
    fn read_wallets(&self, page: &mut Page<'_>, operations: &[Operation]) -> Result<(), DbError> {
        let mut find = self.0.prepare(FIND_WALLET)?;
        for wallet in operations.iter().map(Operation::wallet) {
            if page.accounts.contains_key(&wallet) {
                continue;
            }
            if let Some(account) = find.query_row([wallet.stored()], read_account).optional()? {
                page.accounts.insert(wallet, account);
            }
        }
        Ok(())
    }

    fn read_requests(&self, page: &mut Page<'_>) -> Result<(), DbError> {
        let (mut find_hold, mut find_receipt) = (self.0.prepare(FIND_HOLD)?, self.0.prepare(FIND_RECEIPT)?);
        for (id, request) in &mut page.requests {
            let is_to_be_held = request.is_to_be_held;
            let open = find_hold.query_row([id], |row| read_open(row, is_to_be_held));
            request.open = open.optional()?;
            request.ended = find_receipt.query_row([id], read_past).optional()?;
        }
        Ok(())
    }

    fn read_keys(&self, page: &mut Page<'_>) -> Result<(), DbError> {
        let mut find = self.0.prepare(FIND_SPENDING)?;
        for ((key, day), kept) in &mut page.spending {
            if let Some(spending) = find.query_row([key, day], read_spending).optional()? {
                *kept = KeptSpending { spending, is_there: true, is_changed: false };
            }
        }
        let mut find = self.0.prepare(FIND_CAPS)?;
        for (key, caps) in &mut page.caps {
            *caps = find.query_row([key], read_caps).optional()?.unwrap_or_default();
        }
        Ok(())
    }

    fn read_names(&self, page: &mut Page<'_>) -> Result<(), DbError> {
        for (wallet, names) in &mut page.claims {
            let mut find = self.0.prepare(FIND_CLAIM)?;
            for (name, place) in names {
                *place = find.query_row(params![wallet.stored(), name], read_name).optional()?;
            }
        }
        Ok(())
    }

    fn write_wallets(&self, page: &Page<'_>) -> Result<(), DbError> {
        let mut update = self.0.prepare(UPDATE_WALLET)?;
        for (wallet, Account { balance, seq, .. }) in page.changed_accounts() {
            touch(&mut update, params![wallet.stored(), balance.balance, balance.locked, seq])?;
        }
        Ok(())
    }

    fn write_holds(&self, page: &Page<'_>, node: &str) -> Result<(), DbError> {
        let mut insert = self.0.prepare(INSERT_HOLD)?;
        for hold in page.made_holds() {
            let terms = terms_json(&hold.terms)?;
            let row = params![
                hold.id,
                hold.wallet.stored(),
                node,
                hold.api_key_id,
                hold.amount,
                terms,
                hold.created_at.millis(),
            ];
            touch(&mut insert, row)?;
        }
        let mut delete = self.0.prepare(DELETE_HOLD)?;
        for id in &page.removed {
            touch(&mut delete, [id])?;
        }
        Ok(())
    }

    fn write_charges(&self, page: &Page<'_>, now: Timestamp) -> Result<(), DbError> {
        let mut insert = self.0.prepare(INSERT_CHARGE)?;
        for charge in &page.charges {
            let row = params![
                charge.wallet.stored(),
                charge.seq,
                charge.reference,
                charge.amount,
                charge.balance_before,
                now.millis(),
            ];
            touch(&mut insert, row)?;
        }
        Ok(())
    }

    fn write_receipts(&self, page: &Page<'_>, now: Timestamp) -> Result<(), DbError> {
        let mut insert = self.0.prepare(INSERT_RECEIPT)?;
        for end in &page.ends {
            let (ending, hold) = (end.ending, &end.ending.hold);
            let row = params![
                hold.id,
                hold.wallet.stored(),
                hold.api_key_id,
                hold.terms.model,
                ending.outcome.as_str(),
                end.reason(),
                hold.amount,
                end.charged,
                end.cost_pico,
                end.prompt_tokens,
                end.cached_tokens,
                end.completion_tokens,
                ending.usage_raw,
                terms_json(&hold.terms)?,
                hold.created_at.millis(),
                now.millis(),
                units_json(&ending.usage)?,
                end.upstream_cost_pico,
            ];
            touch(&mut insert, row)?;
        }
        Ok(())
    }

    fn write_usage(&self, page: &Page<'_>) -> Result<(), DbError> {
        let mut add = self.0.prepare(ADD_USAGE)?;
        for ((wallet, key), used) in &page.used {
            let row = params![
                wallet.stored(),
                key.unwrap_or(NO_KEY),
                used.request_count,
                used.prompt_tokens,
                used.completion_tokens,
                used.charged,
                pico(used.revenue)?,
            ];
            touch(&mut add, row)?;
        }
        Ok(())
    }

    fn write_spending(&self, page: &Page<'_>) -> Result<(), DbError> {
        let mut keep = self.0.prepare(KEEP_SPENDING)?;
        for (key, day, Spending { spent, held }) in page.changed_spending() {
            touch(&mut keep, params![key, day, spent, held])?;
        }
        Ok(())
    }

    fn write_names(&self, page: &Page<'_>, now: Timestamp) -> Result<(), DbError> {
        for (wallet, name, kept) in page.changed_names() {
            let row = params![wallet.stored(), name, kept.request_hash, kept.request_id, now.millis()];
            touch(&mut self.0.prepare(KEEP_CLAIM)?, row)?;
        }
        Ok(())
    }
}

/// Runs a statement that touches one row.
fn touch(statement: &mut CachedStatement<'_>, row: impl Params) -> Result<(), DbError> {
    match statement.execute(row)? {
        1 => Ok(()),
        touched => Err(DbError::Corrupt(format!("{touched} rows were there to be written, and not one"))),
    }
}

impl ToSql for StoredWallet {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.as_str().to_sql()
    }
}

impl FromSql for Wallet {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        value.as_str()?.parse().map_err(FromSqlError::other)
    }
}

impl ToSql for MicroUsdc {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.get().into())
    }
}

impl FromSql for MicroUsdc {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        value.as_i64().map(Self::new)
    }
}

fn read_account(row: &Row<'_>) -> rusqlite::Result<Account> {
    let balance = Balance { balance: row.get(0)?, locked: row.get(1)?, debt: row.get(2)? };
    Ok(Account { balance, seq: row.get(3)?, frozen_reason: row.get(4)?, is_changed: false })
}

fn read_open<'a>(row: &Row<'_>, is_to_be_held: bool) -> rusqlite::Result<Open<'a>> {
    let (wallet, amount) = (row.get(0)?, row.get(1)?);
    let whole = if is_to_be_held {
        Some(Box::new(Hold {
            wallet,
            amount,
            id: row.get(2)?,
            api_key_id: row.get(3)?,
            terms: parsed(4, read_terms(row.get_ref(4)?.as_str()?))?,
            created_at: Timestamp::from_millis(row.get(5)?),
        }))
    } else {
        None
    };
    Ok(Open::Kept { wallet, amount, whole })
}

fn read_past(row: &Row<'_>) -> rusqlite::Result<Past> {
    let (outcome, reason) = (row.get_ref(1)?.as_str()?, row.get_ref(3)?.as_str_or_null()?);
    parsed(1, Past::new(row.get(0)?, outcome, row.get(2)?, reason))
}

fn read_name<'a>(row: &Row<'_>) -> rusqlite::Result<Name<'a>> {
    Ok(Name::kept(row.get(0)?, row.get(1)?, row.get_ref(2)?.as_str_or_null()?))
}

fn read_spending(row: &Row<'_>) -> rusqlite::Result<Spending> {
    Ok(Spending { spent: row.get(0)?, held: row.get(1)? })
}

fn read_caps(row: &Row<'_>) -> rusqlite::Result<Caps> {
    Ok(Caps { ever: row.get(0)?, per_day: row.get(1)? })
}

fn parsed<T>(column: usize, read: Result<T, DbError>) -> rusqlite::Result<T> {
    read.map_err(|error| Error::FromSqlConversionFailure(column, Type::Text, error.into()))
}
