//! A batch on PostgreSQL: as few statements as it takes, each over all rows, because each is a way to the
//! server and back.
//!
//! The wallets' rows are taken first, in the order of their addresses: two nodes with wallets in common
//! wait for each other and never in a circle. Whatever else is read or written belongs to these wallets,
//! so that it cannot change meanwhile. It is read by a statement of its own, which sees what those who had
//! the wallets before have committed.

use std::collections::BTreeSet;

use sqlx::postgres::{PgPool, PgRow};
use sqlx::{Postgres, Row as _, Transaction};

use crate::clock::Timestamp;
use crate::db::{DbError, DbRow};
use crate::id::Wallet;
use crate::ledger::batch::{
    Account, Caps, End, KeptSpending, Loaded, Name, Open, Operation, Page, Past, Store, pico,
};
use crate::ledger::store::{NO_KEY, read_hold, terms_json, units_json};
use crate::ledger::{Balance, Spending};
use crate::money::MicroUsdc;

// PostgreSQL plans these statements for good when a table is still small, and would read it whole ever
// after: so it is told not to.
const BEGIN: &str = "BEGIN; SET LOCAL enable_seqscan = off";
const BEGIN_RELAXED: &str = "BEGIN; SET LOCAL enable_seqscan = off; SET LOCAL synchronous_commit = off";

// As strong as the update that follows, and no stronger: who refers to a wallet need not wait.
const TAKE_WALLETS: &str = "
SELECT address, balance_micro, locked_micro, debt_micro, seq, frozen_reason FROM wallets
WHERE address = ANY($1) ORDER BY address FOR NO KEY UPDATE";

const INSERT_WALLETS: &str = "
INSERT INTO wallets (address, created_at_ms) SELECT address, $2 FROM unnest($1::text[]) AS r (address)
ON CONFLICT DO NOTHING";

// Rows of every kind in the same columns. LIMIT has each of those that are found by two columns looked up:
// a table that it thinks small would be read whole.
const READ: &str = "
SELECT 'hold' AS kind, id AS a, wallet AS b, NULL AS c, NULL AS d, amount_micro AS m, NULL::bigint AS n,
       NULL::bigint AS o, NULL::bigint AS p
FROM holds WHERE id = ANY($1)
UNION ALL
SELECT 'receipt', id, wallet, outcome, reason, charged_micro, NULL, NULL, NULL FROM receipts WHERE id = ANY($1)
UNION ALL
SELECT 'spending', NULL, NULL, NULL, NULL, s.spent_micro, s.held_micro, s.api_key_id, s.day
FROM unnest($2::bigint[], $3::bigint[]) AS r (api_key_id, day) CROSS JOIN LATERAL (
    SELECT * FROM key_spending k WHERE k.api_key_id = r.api_key_id AND k.day = r.day LIMIT 1
) s
UNION ALL
SELECT 'caps', NULL, NULL, NULL, NULL, spend_cap_micro, spend_cap_per_day_micro, id, NULL
FROM api_keys WHERE id = ANY($4)";

const READ_NAMES: &str = "
SELECT c.wallet, c.name, c.request_hash, c.request_id,
       (SELECT receipts.outcome FROM receipts WHERE receipts.id = c.request_id) AS outcome
FROM unnest($1::text[], $2::text[]) AS r (wallet, name) CROSS JOIN LATERAL (
    SELECT * FROM claims WHERE claims.wallet = r.wallet AND claims.name = r.name LIMIT 1
) c";

const READ_HOLDS: &str = "SELECT * FROM holds WHERE id = ANY($1)";

// The wallets are all there, so that none is inserted: an INSERT finds each by its key whatever PostgreSQL
// thinks of the table, where an UPDATE of many might read it whole.
const WRITE: &str = "
WITH updated_wallets AS (
    INSERT INTO wallets (address, balance_micro, locked_micro, seq, created_at_ms)
    SELECT r.*, 0 FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[]) AS r
    ON CONFLICT (address) DO UPDATE SET
        balance_micro = excluded.balance_micro, locked_micro = excluded.locked_micro, seq = excluded.seq
    RETURNING 1
), made_holds AS (
    INSERT INTO holds (id, wallet, api_key_id, amount_micro, terms, created_at_ms, node)
    SELECT r.*, $11
    FROM unnest($5::text[], $6::text[], $7::bigint[], $8::bigint[], $9::text[], $10::bigint[]) AS r
    RETURNING 1
), ended_holds AS (
    DELETE FROM holds WHERE id = ANY($12) RETURNING 1
), charges AS (
    INSERT INTO entries (wallet, seq, reference, amount_micro, balance_before_micro, balance_after_micro,
                         contra_micro, kind, contra_account, created_at_ms)
    SELECT r.*, r.before + r.amount, -r.amount, 'charge', 'revenue', $18
    FROM unnest($13::text[], $14::bigint[], $15::text[], $16::bigint[], $17::bigint[])
        AS r (wallet, seq, reference, amount, before)
    RETURNING 1
), new_receipts AS (
    INSERT INTO receipts (id, wallet, api_key_id, model, outcome, reason, hold_micro, charged_micro, cost_pico,
                          prompt_tokens, cached_tokens, completion_tokens, usage_raw, terms, created_at_ms,
                          usage_units, upstream_cost_pico, ended_at_ms)
    SELECT r.*, $18
    FROM unnest($19::text[], $20::text[], $21::bigint[], $22::text[], $23::text[], $24::text[], $25::bigint[],
                $26::bigint[], $27::bigint[], $28::bigint[], $29::bigint[], $30::bigint[], $31::text[],
                $32::text[], $33::bigint[], $45::text[], $46::bigint[]) AS r
    RETURNING 1
), usage AS (
    INSERT INTO usage_totals (wallet, api_key_id, request_count, prompt_tokens, completion_tokens,
                              charged_micro, revenue_pico)
    SELECT r.* FROM unnest($34::text[], $35::bigint[], $36::bigint[], $37::bigint[], $38::bigint[],
                           $39::bigint[], $40::bigint[]) AS r
    ON CONFLICT (wallet, api_key_id) DO UPDATE SET
        request_count = usage_totals.request_count + excluded.request_count,
        prompt_tokens = usage_totals.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = usage_totals.completion_tokens + excluded.completion_tokens,
        charged_micro = usage_totals.charged_micro + excluded.charged_micro,
        revenue_pico = usage_totals.revenue_pico + excluded.revenue_pico
    RETURNING 1
), spending AS (
    INSERT INTO key_spending (api_key_id, day, spent_micro, held_micro)
    SELECT r.* FROM unnest($41::bigint[], $42::bigint[], $43::bigint[], $44::bigint[]) AS r
    ON CONFLICT (api_key_id, day) DO UPDATE
    SET spent_micro = excluded.spent_micro, held_micro = excluded.held_micro
    RETURNING 1
)
SELECT (SELECT COUNT(*) FROM updated_wallets), (SELECT COUNT(*) FROM made_holds),
       (SELECT COUNT(*) FROM ended_holds), (SELECT COUNT(*) FROM charges),
       (SELECT COUNT(*) FROM new_receipts), (SELECT COUNT(*) FROM usage), (SELECT COUNT(*) FROM spending)";

const KEEP_NAMES: &str = "
INSERT INTO claims (wallet, name, request_hash, request_id, created_at_ms)
SELECT r.*, $5 FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS r
ON CONFLICT (wallet, name) DO UPDATE
SET request_id = excluded.request_id, created_at_ms = excluded.created_at_ms";

/// A connection and the transaction on it, once it has begun.
pub struct PostgresStore {
    pool: PgPool,
    tx: Option<Transaction<'static, Postgres>>,
}

impl Store for PostgresStore {
    type Home = PgPool;

    async fn turn(pool: &PgPool) -> Result<Self, DbError> {
        Ok(Self { pool: pool.clone(), tx: None })
    }

    async fn begin(&mut self, must_last: bool) -> Result<(), DbError> {
        // One that was not committed is undone before another begins.
        self.tx = None;
        self.tx = Some(self.pool.begin_with(if must_last { BEGIN } else { BEGIN_RELAXED }).await?);
        Ok(())
    }

    async fn load<'a>(&mut self, operations: &'a [Operation], now: Timestamp) -> Result<Loaded<'a>, DbError> {
        let mut page = Page::about(operations);
        self.take_wallets(&mut page, operations).await?;
        self.read_rows(&mut page).await?;
        self.read_names(&mut page).await?;
        let lost = page.lost_wallets(operations);
        if lost.is_empty() {
            return Ok(Loaded::Page(Box::new(page)));
        }
        // Committed alone: an insertion among rows that are taken in order would break the order.
        self.insert_wallets(&lost, now).await?;
        Ok(Loaded::NewWallets)
    }

    async fn write(&mut self, page: &Page<'_>, node: &str, now: Timestamp) -> Result<(), DbError> {
        self.write_rows(page, node, now).await?;
        self.write_names(page, now).await
    }

    async fn commit(&mut self) -> Result<(), DbError> {
        self.tx.take().ok_or(DbError::Abandoned)?.commit().await?;
        Ok(())
    }
}

impl PostgresStore {
    fn tx(&mut self) -> Result<&mut sqlx::PgConnection, DbError> {
        Ok(&mut **self.tx.as_mut().ok_or(DbError::Abandoned)?)
    }

    async fn take_wallets(&mut self, page: &mut Page<'_>, operations: &[Operation]) -> Result<(), DbError> {
        let wallets: BTreeSet<_> = operations.iter().map(Operation::wallet).collect();
        let addresses: Vec<_> = wallets.into_iter().map(Wallet::key).collect();
        let rows = sqlx::query(TAKE_WALLETS).bind(addresses).fetch_all(self.tx()?).await?;
        for row in rows.into_iter().map(DbRow::Postgres) {
            page.accounts.insert(row.wallet("address")?, read_account(&row)?);
        }
        Ok(())
    }

    async fn read_rows(&mut self, page: &mut Page<'_>) -> Result<(), DbError> {
        let ids: Vec<_> = page.requests.keys().copied().collect();
        let (keys, days): (Vec<_>, Vec<_>) = page.spending.keys().copied().unzip();
        let capped: Vec<_> = page.caps.keys().copied().collect();
        let query = sqlx::query(READ).bind(ids).bind(keys).bind(days).bind(capped);
        let mut again = Vec::new();
        for row in query.fetch_all(self.tx()?).await? {
            match row.try_get("kind")? {
                "hold" => {
                    let id: &str = row.try_get("a")?;
                    let Some(request) = page.requests.get_mut(id) else { continue };
                    if request.is_to_be_held {
                        again.push(id.to_owned());
                    }
                    let (wallet, amount) = (wallet(&row, "b")?, micro(&row, "m")?);
                    request.open = Some(Open::Kept { wallet, amount, whole: None });
                }
                "receipt" => {
                    let id: &str = row.try_get("a")?;
                    let Some(request) = page.requests.get_mut(id) else { continue };
                    let (outcome, reason) = (row.try_get("c")?, row.try_get("d")?);
                    request.ended = Some(Past::new(wallet(&row, "b")?, outcome, micro(&row, "m")?, reason)?);
                }
                "spending" => {
                    let spending = Spending { spent: micro(&row, "m")?, held: micro(&row, "n")? };
                    let kept = KeptSpending { spending, is_there: true, is_changed: false };
                    page.spending.insert((row.try_get("o")?, row.try_get("p")?), kept);
                }
                _ => {
                    let cap =
                        |column| Ok::<_, DbError>(row.try_get::<Option<i64>, _>(column)?.map(MicroUsdc::new));
                    page.caps.insert(row.try_get("o")?, Caps { ever: cap("m")?, per_day: cap("n")? });
                }
            }
        }
        if again.is_empty() { Ok(()) } else { self.read_whole_holds(page, again).await }
    }

    /// What is asked to be held for again is compared with all of what is there.
    async fn read_whole_holds(&mut self, page: &mut Page<'_>, ids: Vec<String>) -> Result<(), DbError> {
        let rows = sqlx::query(READ_HOLDS).bind(ids).fetch_all(self.tx()?).await?;
        for row in rows.into_iter().map(DbRow::Postgres) {
            let hold = read_hold(&row)?;
            if let Some(request) = page.requests.get_mut(hold.id.as_str()) {
                let (wallet, amount) = (hold.wallet, hold.amount);
                request.open = Some(Open::Kept { wallet, amount, whole: Some(Box::new(hold)) });
            }
        }
        Ok(())
    }

    async fn read_names(&mut self, page: &mut Page<'_>) -> Result<(), DbError> {
        if page.claims.is_empty() {
            return Ok(());
        }
        let names =
            page.claims.iter().flat_map(|(wallet, names)| names.keys().map(|name| (wallet.key(), *name)));
        let (wallets, names): (Vec<_>, Vec<_>) = names.unzip();
        for row in sqlx::query(READ_NAMES).bind(wallets).bind(names).fetch_all(self.tx()?).await? {
            let found =
                Name::kept(row.try_get("request_hash")?, row.try_get("request_id")?, row.try_get("outcome")?);
            let names = page.claims.get_mut(&wallet(&row, "wallet")?);
            if let Some(place) = names.and_then(|names| names.get_mut(row.try_get::<&str, _>("name").ok()?)) {
                *place = Some(found);
            }
        }
        Ok(())
    }

    async fn insert_wallets(&mut self, wallets: &BTreeSet<Wallet>, now: Timestamp) -> Result<(), DbError> {
        let addresses: Vec<_> = wallets.iter().map(|wallet| wallet.key()).collect();
        sqlx::query(INSERT_WALLETS).bind(addresses).bind(now.millis()).execute(self.tx()?).await?;
        Ok(())
    }

    async fn write_rows(&mut self, page: &Page<'_>, node: &str, now: Timestamp) -> Result<(), DbError> {
        let accounts: Vec<_> = page.changed_accounts().collect();
        let holds: Vec<_> = page.made_holds().collect();
        let spending: Vec<_> = page.changed_spending().collect();
        let used: Vec<_> = page.used.iter().collect();
        let terms_of_holds =
            holds.iter().map(|hold| terms_json(&hold.terms)).collect::<Result<Vec<_>, _>>()?;
        let terms =
            page.ends.iter().map(|end| terms_json(&end.ending.hold.terms)).collect::<Result<Vec<_>, _>>()?;
        let units =
            page.ends.iter().map(|end| units_json(&end.ending.usage)).collect::<Result<Vec<_>, _>>()?;
        let reasons: Vec<_> = page.ends.iter().map(End::reason).collect();
        let revenue = used.iter().map(|(_, used)| pico(used.revenue)).collect::<Result<Vec<_>, _>>()?;
        let query = sqlx::query(WRITE)
            .bind(column(&accounts, |(wallet, _)| wallet.key()))
            .bind(column(&accounts, |(_, account)| account.balance.balance.get()))
            .bind(column(&accounts, |(_, account)| account.balance.locked.get()))
            .bind(column(&accounts, |(_, account)| account.seq))
            .bind(column(&holds, |hold| hold.id.as_str()))
            .bind(column(&holds, |hold| hold.wallet.key()))
            .bind(column(&holds, |hold| hold.api_key_id))
            .bind(column(&holds, |hold| hold.amount.get()))
            .bind(terms_of_holds)
            .bind(column(&holds, |hold| hold.created_at.millis()))
            .bind(node)
            .bind(&page.removed)
            .bind(column(&page.charges, |charge| charge.wallet.key()))
            .bind(column(&page.charges, |charge| charge.seq))
            .bind(column(&page.charges, |charge| charge.reference))
            .bind(column(&page.charges, |charge| charge.amount.get()))
            .bind(column(&page.charges, |charge| charge.balance_before.get()))
            .bind(now.millis())
            .bind(column(&page.ends, |end| end.ending.hold.id.as_str()))
            .bind(column(&page.ends, |end| end.ending.hold.wallet.key()))
            .bind(column(&page.ends, |end| end.ending.hold.api_key_id))
            .bind(column(&page.ends, |end| end.ending.hold.terms.model.as_str()))
            .bind(column(&page.ends, |end| end.ending.outcome.as_str()))
            .bind(reasons)
            .bind(column(&page.ends, |end| end.ending.hold.amount.get()))
            .bind(column(&page.ends, |end| end.charged.get()))
            .bind(column(&page.ends, |end| end.cost_pico))
            .bind(column(&page.ends, |end| end.prompt_tokens))
            .bind(column(&page.ends, |end| end.cached_tokens))
            .bind(column(&page.ends, |end| end.completion_tokens))
            .bind(column(&page.ends, |end| end.ending.usage_raw.as_deref()))
            .bind(terms)
            .bind(column(&page.ends, |end| end.ending.hold.created_at.millis()))
            .bind(column(&used, |((wallet, _), _)| wallet.key()))
            .bind(column(&used, |((_, key), _)| key.unwrap_or(NO_KEY)))
            .bind(column(&used, |(_, used)| used.request_count))
            .bind(column(&used, |(_, used)| used.prompt_tokens))
            .bind(column(&used, |(_, used)| used.completion_tokens))
            .bind(column(&used, |(_, used)| used.charged.get()))
            .bind(revenue)
            .bind(column(&spending, |(key, ..)| *key))
            .bind(column(&spending, |(_, day, _)| *day))
            .bind(column(&spending, |(.., spending)| spending.spent.get()))
            .bind(column(&spending, |(.., spending)| spending.held.get()))
            .bind(units)
            .bind(column(&page.ends, |end| end.upstream_cost_pico));
        let touched = query.fetch_one(self.tx()?).await?;
        let expected = [
            accounts.len(),
            holds.len(),
            page.removed.len(),
            page.charges.len(),
            page.ends.len(),
            used.len(),
            spending.len(),
        ];
        for (at, expected) in expected.into_iter().enumerate() {
            check_touched(touched.try_get::<i64, _>(at)?, expected)?;
        }
        Ok(())
    }

    async fn write_names(&mut self, page: &Page<'_>, now: Timestamp) -> Result<(), DbError> {
        let names: Vec<_> = page.changed_names().collect();
        if names.is_empty() {
            return Ok(());
        }
        let query = sqlx::query(KEEP_NAMES)
            .bind(column(&names, |(wallet, ..)| wallet.key()))
            .bind(column(&names, |(_, name, _)| *name))
            .bind(column(&names, |(.., kept)| kept.request_hash.as_ref()))
            .bind(column(&names, |(.., kept)| kept.request_id.as_ref()))
            .bind(now.millis());
        let touched = query.execute(self.tx()?).await?.rows_affected();
        check_touched(touched, names.len())
    }
}

/// One column of many rows.
fn column<R, V>(rows: &[R], value: impl Fn(&R) -> V) -> Vec<V> {
    rows.iter().map(value).collect()
}

fn check_touched<N>(touched: N, expected: usize) -> Result<(), DbError>
where
    usize: TryFrom<N>,
    N: Copy + std::fmt::Display,
{
    if usize::try_from(touched).is_ok_and(|touched| touched == expected) {
        return Ok(());
    }
    Err(DbError::Corrupt(format!("{touched} rows of {expected} were there to be written")))
}

fn wallet(row: &PgRow, column: &str) -> Result<Wallet, DbError> {
    let text: &str = row.try_get(column)?;
    text.parse().map_err(|_| DbError::Corrupt(format!("{column} {text}")))
}

fn micro(row: &PgRow, column: &str) -> Result<MicroUsdc, DbError> {
    Ok(MicroUsdc::new(row.try_get(column)?))
}

fn read_account(row: &DbRow) -> Result<Account, DbError> {
    let balance = Balance {
        balance: row.micro("balance_micro")?,
        locked: row.micro("locked_micro")?,
        debt: row.micro("debt_micro")?,
    };
    let frozen_reason = row.text_or_null("frozen_reason")?;
    Ok(Account { balance, seq: row.int("seq")?, frozen_reason, is_changed: false })
}
