//! The SQL of a batch: one statement for all of its rows of a table.
//!
//! The wallets' rows are taken first, in the order of their addresses: two nodes with wallets in common
//! wait for each other and never in a circle. Whatever else is read or written belongs to these wallets,
//! so that it cannot change meanwhile.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};
use std::sync::LazyLock;

use serde::Serialize;

use crate::clock::Timestamp;
use crate::db::{DbError, DbRow, DbTx, SetWise, Several, set_wise, those_in};
use crate::id::Wallet;
use crate::ledger::batch::{Account, Caps, KeptSpending, Name, Open, Operation, Page, Past};
use crate::ledger::store::{NO_KEY, read_hold, terms_json, units_json};
use crate::ledger::{Balance, HOLD_LOST, Outcome, Spending};
use crate::money::{MicroUsdc, PicoUsd};

const TAKE_WALLETS: SetWise = those_in!(
    "SELECT address, balance_micro, locked_micro, debt_micro, seq, frozen_reason FROM wallets WHERE address",
    TEXT,
    "",
    // As strong as the UPDATE that follows, and no stronger: who refers to a wallet need not wait.
    "ORDER BY address FOR NO KEY UPDATE"
);

const FIND_HOLDS: SetWise = those_in!("SELECT * FROM holds WHERE id", TEXT);

const FIND_RECEIPTS: SetWise =
    those_in!("SELECT id, wallet, outcome, charged_micro, reason FROM receipts WHERE id", TEXT);

// LIMIT has PostgreSQL look each of them up, as SQLite does by CROSS JOIN: a table that it thinks small
// would be read whole.
const FIND_CLAIMS: SetWise = set_wise!(
    "SELECT c.wallet, c.name, c.request_hash, c.request_id,
            (SELECT receipts.outcome FROM receipts WHERE receipts.id = c.request_id) AS outcome
     FROM",
    [wallet TEXT, name TEXT],
    "CROSS JOIN claims c ON c.wallet = r.wallet AND c.name = r.name",
    "CROSS JOIN LATERAL (
         SELECT * FROM claims WHERE claims.wallet = r.wallet AND claims.name = r.name LIMIT 1
     ) c"
);

const FIND_SPENDING: SetWise = set_wise!(
    "SELECT s.api_key_id, s.day, s.spent_micro, s.held_micro FROM",
    [api_key_id BIGINT, day BIGINT],
    "CROSS JOIN key_spending s ON s.api_key_id = r.api_key_id AND s.day = r.day",
    "CROSS JOIN LATERAL (
         SELECT * FROM key_spending k WHERE k.api_key_id = r.api_key_id AND k.day = r.day LIMIT 1
     ) s"
);

const FIND_CAPS: SetWise =
    those_in!("SELECT id, spend_cap_micro, spend_cap_per_day_micro FROM api_keys WHERE id", BIGINT);

const INSERT_WALLETS: SetWise = set_wise!(
    "INSERT INTO wallets (address, created_at_ms) SELECT r.address, r.created_at_ms FROM",
    [address TEXT, created_at_ms BIGINT],
    "WHERE TRUE ON CONFLICT DO NOTHING"
);

// They are all there, so that none is inserted: an INSERT finds each by its key whatever PostgreSQL
// thinks of the table, where an UPDATE of many might read it whole.
const UPDATE_WALLETS: SetWise = set_wise!(
    "INSERT INTO wallets (address, balance_micro, locked_micro, seq, created_at_ms)
     SELECT r.address, r.balance_micro, r.locked_micro, r.seq, 0 FROM",
    [address TEXT, balance_micro BIGINT, locked_micro BIGINT, seq BIGINT],
    "WHERE TRUE ON CONFLICT (address) DO UPDATE
     SET balance_micro = excluded.balance_micro, locked_micro = excluded.locked_micro, seq = excluded.seq"
);

const INSERT_HOLDS: SetWise = set_wise!(
    "INSERT INTO holds (id, wallet, node, api_key_id, amount_micro, terms, created_at_ms)
     SELECT r.id, r.wallet, r.node, r.api_key_id, r.amount_micro, r.terms, r.created_at_ms FROM",
    [id TEXT, wallet TEXT, node TEXT, api_key_id BIGINT, amount_micro BIGINT, terms TEXT, created_at_ms BIGINT],
    ""
);

const DELETE_HOLDS: SetWise = those_in!("DELETE FROM holds WHERE id", TEXT);

const INSERT_CHARGES: SetWise = set_wise!(
    "INSERT INTO entries (wallet, seq, kind, reference, amount_micro, balance_before_micro,
                          balance_after_micro, contra_account, contra_micro, created_at_ms)
     SELECT r.wallet, r.seq, 'charge', r.reference, r.amount_micro, r.balance_before_micro,
            r.balance_before_micro + r.amount_micro, 'revenue', -r.amount_micro, r.created_at_ms FROM",
    [wallet TEXT, seq BIGINT, reference TEXT, amount_micro BIGINT, balance_before_micro BIGINT, created_at_ms BIGINT],
    ""
);

const INSERT_RECEIPTS: SetWise = set_wise!(
    "INSERT INTO receipts (id, wallet, api_key_id, model, outcome, reason, hold_micro, charged_micro,
                           cost_pico, prompt_tokens, cached_tokens, completion_tokens, usage_raw,
                           usage_units, upstream_cost_pico, terms, created_at_ms, ended_at_ms)
     SELECT r.id, r.wallet, r.api_key_id, r.model, r.outcome, r.reason, r.hold_micro, r.charged_micro,
            r.cost_pico, r.prompt_tokens, r.cached_tokens, r.completion_tokens, r.usage_raw,
            r.usage_units, r.upstream_cost_pico, r.terms, r.created_at_ms, r.ended_at_ms FROM",
    [
        id TEXT, wallet TEXT, api_key_id BIGINT, model TEXT, outcome TEXT, reason TEXT, hold_micro BIGINT,
        charged_micro BIGINT, cost_pico BIGINT, prompt_tokens BIGINT, cached_tokens BIGINT,
        completion_tokens BIGINT, usage_raw TEXT, usage_units TEXT, upstream_cost_pico BIGINT, terms TEXT, created_at_ms BIGINT, ended_at_ms BIGINT
    ],
    ""
);

const ADD_USAGE: SetWise = set_wise!(
    "INSERT INTO usage_totals (wallet, api_key_id, request_count, prompt_tokens, completion_tokens,
                               charged_micro, revenue_pico)
     SELECT r.wallet, r.api_key_id, r.request_count, r.prompt_tokens, r.completion_tokens,
            r.charged_micro, r.revenue_pico FROM",
    [
        wallet TEXT, api_key_id BIGINT, request_count BIGINT, prompt_tokens BIGINT, completion_tokens BIGINT,
        charged_micro BIGINT, revenue_pico BIGINT
    ],
    "WHERE TRUE ON CONFLICT (wallet, api_key_id) DO UPDATE SET
         request_count = usage_totals.request_count + excluded.request_count,
         prompt_tokens = usage_totals.prompt_tokens + excluded.prompt_tokens,
         completion_tokens = usage_totals.completion_tokens + excluded.completion_tokens,
         charged_micro = usage_totals.charged_micro + excluded.charged_micro,
         revenue_pico = usage_totals.revenue_pico + excluded.revenue_pico"
);

// A key is of one wallet, whose row is taken.
const KEEP_SPENDING: SetWise = set_wise!(
    "INSERT INTO key_spending (api_key_id, day, spent_micro, held_micro)
     SELECT r.api_key_id, r.day, r.spent_micro, r.held_micro FROM",
    [api_key_id BIGINT, day BIGINT, spent_micro BIGINT, held_micro BIGINT],
    "WHERE TRUE ON CONFLICT (api_key_id, day) DO UPDATE
     SET spent_micro = excluded.spent_micro, held_micro = excluded.held_micro"
);

const KEEP_CLAIMS: SetWise = set_wise!(
    "INSERT INTO claims (wallet, name, request_hash, request_id, created_at_ms)
     SELECT r.wallet, r.name, r.request_hash, r.request_id, r.created_at_ms FROM",
    [wallet TEXT, name TEXT, request_hash TEXT, request_id TEXT, created_at_ms BIGINT],
    "WHERE TRUE ON CONFLICT (wallet, name) DO UPDATE
     SET request_id = excluded.request_id, created_at_ms = excluded.created_at_ms"
);

/// What a batch reads, in this order: the wallets' rows are taken first.
static READS: LazyLock<Several> = LazyLock::new(|| {
    Several::new(&[TAKE_WALLETS, FIND_HOLDS, FIND_RECEIPTS, FIND_CLAIMS, FIND_SPENDING, FIND_CAPS])
});

/// What it writes.
static WRITES: LazyLock<Several> = LazyLock::new(|| {
    Several::new(&[
        UPDATE_WALLETS,
        INSERT_HOLDS,
        DELETE_HOLDS,
        INSERT_CHARGES,
        INSERT_RECEIPTS,
        ADD_USAGE,
        KEEP_SPENDING,
        KEEP_CLAIMS,
    ])
});

static NEW_WALLETS: LazyLock<Several> = LazyLock::new(|| Several::new(&[INSERT_WALLETS]));

/// What was found: the rows, or that the wallets of some ends have none yet.
pub enum Loaded<'a> {
    Page(Box<Page<'a>>),
    NoWallets(BTreeSet<Wallet>),
}

/// Takes the wallets' rows and reads what else the operations are about.
pub async fn load<'a>(tx: &mut DbTx, operations: &[&'a Operation]) -> Result<Loaded<'a>, DbError> {
    let mut page = Page::about(operations);
    let wallets: BTreeSet<_> = operations.iter().map(|operation| operation.wallet()).collect();
    let addresses: Vec<_> = wallets.iter().map(|wallet| wallet.key()).collect();
    let ids: Vec<_> = page.requests.keys().copied().collect();
    let ids = json(&ids)?;
    // Only holds are bound by caps.
    let held = operations.iter().filter(|operation| operation.is_hold());
    let keys: BTreeSet<_> = held.clone().filter_map(|operation| operation.about().api_key_id).collect();
    let lists = vec![json(&addresses)?, ids.clone(), ids, named(&page)?, spent(&page)?, json(&keys)?];
    let mut found = tx.all(&READS, lists).await?.into_iter().map(|outcome| outcome.rows);
    let mut next = || found.next().unwrap_or_default();

    for row in next() {
        page.accounts.insert(row.wallet("address")?, read_account(&row)?);
    }
    // Of those that are held again everything is compared.
    let again: HashSet<_> = held.map(|hold| hold.about().id.as_str()).collect();
    for row in next() {
        let id = row.text("id")?;
        let whole = if again.contains(id.as_str()) { Some(Box::new(read_hold(&row)?)) } else { None };
        let open = Open::Kept { wallet: row.wallet("wallet")?, amount: row.micro("amount_micro")?, whole };
        if let Some(request) = page.requests.get_mut(id.as_str()) {
            request.open = Some(open);
        }
    }
    for row in next() {
        let past = read_past(&row)?;
        if let Some(request) = page.requests.get_mut(row.text("id")?.as_str()) {
            request.ended = Some(past);
        }
    }
    // An end whose hold was lost is booked all the same, also where its wallet's row was lost with it.
    let is_lost = |end: &&&Operation| {
        let request = page.requests.get(end.about().id.as_str());
        request.is_none_or(|request| request.open.is_none() && request.ended.is_none())
    };
    let ends = operations.iter().filter(|operation| !operation.is_hold());
    let unknown = ends.filter(is_lost).map(|end| end.wallet());
    let unknown: BTreeSet<_> = unknown.filter(|wallet| !page.accounts.contains_key(wallet)).collect();
    if !unknown.is_empty() {
        return Ok(Loaded::NoWallets(unknown));
    }
    for row in next() {
        let outcome = row.text_or_null("outcome")?;
        let found = Name {
            request_hash: Cow::Owned(row.text("request_hash")?),
            request_id: Cow::Owned(row.text("request_id")?),
            was_released: outcome.is_some_and(|outcome| outcome == Outcome::Released.as_str()),
            is_changed: false,
        };
        let (wallet, name) = (row.wallet("wallet")?, row.text("name")?);
        if let Some(place) = page.claims.get_mut(&wallet).and_then(|names| names.get_mut(name.as_str())) {
            *place = Some(found);
        }
    }
    for row in next() {
        let spending = Spending { spent: row.micro("spent_micro")?, held: row.micro("held_micro")? };
        let kept = KeptSpending { spending, is_there: true, is_changed: false };
        page.spending.insert((row.int("api_key_id")?, row.int("day")?), kept);
    }
    for row in next() {
        let cap = |column| Ok::<_, DbError>(row.int_or_null(column)?.map(MicroUsdc::new));
        let caps = Caps { ever: cap("spend_cap_micro")?, per_day: cap("spend_cap_per_day_micro")? };
        page.caps.insert(row.int("id")?, caps);
    }
    Ok(Loaded::Page(Box::new(page)))
}

/// The names that the operations come with.
fn named(page: &Page<'_>) -> Result<String, DbError> {
    #[derive(Serialize)]
    struct Key<'a> {
        wallet: String,
        name: &'a str,
    }
    let names = page.claims.iter().flat_map(|(wallet, names)| names.keys().map(|name| (*wallet, *name)));
    json(&names.map(|(wallet, name)| Key { wallet: wallet.key(), name }).collect::<Vec<_>>())
}

/// The keys and days whose spending they change.
fn spent(page: &Page<'_>) -> Result<String, DbError> {
    #[derive(Serialize)]
    struct Key {
        api_key_id: i64,
        day: i64,
    }
    let keys = page.spending.keys().map(|(key, day)| Key { api_key_id: *key, day: *day });
    json(&keys.collect::<Vec<_>>())
}

/// Gives wallets their rows, where they have none.
pub async fn insert_wallets(
    tx: &mut DbTx,
    wallets: &BTreeSet<Wallet>,
    now: Timestamp,
) -> Result<(), DbError> {
    #[derive(Serialize)]
    struct Row {
        address: String,
        created_at_ms: i64,
    }
    let rows: Vec<_> =
        wallets.iter().map(|wallet| Row { address: wallet.key(), created_at_ms: now.millis() }).collect();
    tx.all(&NEW_WALLETS, vec![json(&rows)?]).await.map(drop)
}

/// Writes down what has become of a page's rows.
pub async fn write(tx: &mut DbTx, page: &Page<'_>, node: &str, now: Timestamp) -> Result<(), DbError> {
    let now = now.millis();
    let lists = vec![
        wallets(page)?,
        holds(page, node)?,
        List::of(&page.removed)?,
        charges(page, now)?,
        receipts(page, now)?,
        usage(page)?,
        spending(page)?,
        claims(page, now)?,
    ];
    let rows: Vec<_> = lists.iter().map(|list| list.rows).collect();
    let outcomes = tx.all(&WRITES, lists.into_iter().map(|list| list.json).collect()).await?;
    for (outcome, rows) in outcomes.iter().zip(rows) {
        if usize::try_from(outcome.touched) != Ok(rows) {
            let touched = outcome.touched;
            return Err(DbError::Corrupt(format!("{touched} rows of {rows} were there to be written")));
        }
    }
    Ok(())
}

/// Rows to be written.
struct List {
    json: String,
    rows: usize,
}

impl List {
    fn of<T: Serialize>(rows: &[T]) -> Result<Self, DbError> {
        Ok(Self { json: json(rows)?, rows: rows.len() })
    }
}

fn wallets(page: &Page<'_>) -> Result<List, DbError> {
    #[derive(Serialize)]
    struct Row {
        address: String,
        balance_micro: i64,
        locked_micro: i64,
        seq: i64,
    }
    let changed = page.accounts.iter().filter(|(_, account)| account.is_changed);
    let rows: Vec<_> = changed
        .map(|(wallet, account)| Row {
            address: wallet.key(),
            balance_micro: account.balance.balance.get(),
            locked_micro: account.balance.locked.get(),
            seq: account.seq,
        })
        .collect();
    List::of(&rows)
}

fn holds(page: &Page<'_>, node: &str) -> Result<List, DbError> {
    #[derive(Serialize)]
    struct Row<'a> {
        id: &'a str,
        wallet: String,
        node: &'a str,
        api_key_id: Option<i64>,
        amount_micro: i64,
        terms: String,
        created_at_ms: i64,
    }
    let mut rows = Vec::new();
    for request in page.requests.values() {
        // One that has ended meanwhile never has a row.
        if let Some(Open::Made(hold)) = &request.open {
            rows.push(Row {
                id: &hold.id,
                wallet: hold.wallet.key(),
                node,
                api_key_id: hold.api_key_id,
                amount_micro: hold.amount.get(),
                terms: terms_json(&hold.terms)?,
                created_at_ms: hold.created_at.millis(),
            });
        }
    }
    List::of(&rows)
}

fn charges(page: &Page<'_>, now: i64) -> Result<List, DbError> {
    #[derive(Serialize)]
    struct Row<'a> {
        wallet: String,
        seq: i64,
        reference: &'a str,
        amount_micro: i64,
        balance_before_micro: i64,
        created_at_ms: i64,
    }
    let rows = page.charges.iter().map(|charge| Row {
        wallet: charge.wallet.key(),
        seq: charge.seq,
        reference: charge.reference,
        amount_micro: charge.amount.get(),
        balance_before_micro: charge.balance_before.get(),
        created_at_ms: now,
    });
    List::of(&rows.collect::<Vec<_>>())
}

fn receipts(page: &Page<'_>, now: i64) -> Result<List, DbError> {
    #[derive(Serialize)]
    struct Row<'a> {
        id: &'a str,
        wallet: String,
        api_key_id: Option<i64>,
        model: &'a str,
        outcome: &'static str,
        reason: Option<&'a str>,
        hold_micro: i64,
        charged_micro: i64,
        cost_pico: i64,
        prompt_tokens: i64,
        cached_tokens: i64,
        completion_tokens: i64,
        usage_raw: Option<&'a str>,
        usage_units: Option<String>,
        upstream_cost_pico: Option<i64>,
        terms: String,
        created_at_ms: i64,
        ended_at_ms: i64,
    }
    let mut rows = Vec::new();
    for end in &page.ends {
        let (ending, hold) = (end.ending, &end.ending.hold);
        rows.push(Row {
            id: &hold.id,
            wallet: hold.wallet.key(),
            api_key_id: hold.api_key_id,
            model: &hold.terms.model,
            outcome: ending.outcome.as_str(),
            reason: if end.was_lost { Some(HOLD_LOST) } else { ending.reason.as_deref() },
            hold_micro: hold.amount.get(),
            charged_micro: end.charged.get(),
            cost_pico: end.cost_pico,
            prompt_tokens: end.prompt_tokens,
            cached_tokens: end.cached_tokens,
            completion_tokens: end.completion_tokens,
            usage_raw: ending.usage_raw.as_deref(),
            usage_units: units_json(&ending.usage)?,
            upstream_cost_pico: end.upstream_cost_pico,
            terms: terms_json(&hold.terms)?,
            created_at_ms: hold.created_at.millis(),
            ended_at_ms: now,
        });
    }
    List::of(&rows)
}

fn usage(page: &Page<'_>) -> Result<List, DbError> {
    #[derive(Serialize)]
    struct Row {
        wallet: String,
        api_key_id: i64,
        request_count: i64,
        prompt_tokens: i64,
        completion_tokens: i64,
        charged_micro: i64,
        revenue_pico: i64,
    }
    let mut rows = Vec::new();
    for ((wallet, key), used) in &page.used {
        rows.push(Row {
            wallet: wallet.key(),
            api_key_id: key.unwrap_or(NO_KEY),
            request_count: used.request_count,
            prompt_tokens: used.prompt_tokens,
            completion_tokens: used.completion_tokens,
            charged_micro: used.charged.get(),
            revenue_pico: pico(used.revenue)?,
        });
    }
    List::of(&rows)
}

fn spending(page: &Page<'_>) -> Result<List, DbError> {
    #[derive(Serialize)]
    struct Row {
        api_key_id: i64,
        day: i64,
        spent_micro: i64,
        held_micro: i64,
    }
    let changed = page.spending.iter().filter(|(_, kept)| kept.is_changed);
    let rows = changed.map(|((key, day), kept)| Row {
        api_key_id: *key,
        day: *day,
        spent_micro: kept.spending.spent.get(),
        held_micro: kept.spending.held.get(),
    });
    List::of(&rows.collect::<Vec<_>>())
}

fn claims(page: &Page<'_>, now: i64) -> Result<List, DbError> {
    #[derive(Serialize)]
    struct Row<'a> {
        wallet: String,
        name: &'a str,
        request_hash: &'a str,
        request_id: &'a str,
        created_at_ms: i64,
    }
    let mut rows = Vec::new();
    let claims =
        page.claims.iter().flat_map(|(wallet, names)| names.iter().map(move |named| (wallet, named)));
    for (wallet, (name, claim)) in claims {
        if let Some(claim) = claim.as_ref().filter(|claim| claim.is_changed) {
            rows.push(Row {
                wallet: wallet.key(),
                name,
                request_hash: &claim.request_hash,
                request_id: &claim.request_id,
                created_at_ms: now,
            });
        }
    }
    List::of(&rows)
}

fn json<T: Serialize + ?Sized>(rows: &T) -> Result<String, DbError> {
    serde_json::to_string(rows).map_err(|e| DbError::Corrupt(format!("rows: {e}")))
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

fn read_past(row: &DbRow) -> Result<Past, DbError> {
    Ok(Past {
        wallet: row.wallet("wallet")?,
        outcome: row.parsed("outcome")?,
        charged: row.micro("charged_micro")?,
        was_lost: row.text_or_null("reason")?.is_some_and(|reason| reason == HOLD_LOST),
    })
}

pub fn count(tokens: u64) -> Result<i64, DbError> {
    i64::try_from(tokens).map_err(|_| DbError::Corrupt(format!("{tokens} tokens")))
}

pub fn pico(amount: PicoUsd) -> Result<i64, DbError> {
    i64::try_from(amount.get()).map_err(|_| DbError::Corrupt(format!("{} pico-USD", amount.get())))
}
