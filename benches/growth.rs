//! Whether anything that a request waits for grows with what is in the books: the same requests and the same
//! reads on books that are nearly empty, on some of 10,000 wallets and 100,000 entries, and on some of a million
//! wallets and ten million entries, in turn.
//! And how many bytes a request leaves behind.
//!
//! `make bench-growth`. `BENCH_WALLETS` and `BENCH_ENTRIES` say how large the large books are,
//! `BENCH_SECONDS` and `BENCH_ROUNDS` how long and how often each load is measured, `BENCH_ONLY` on which
//! database. The large books take about 10 GB on each database, one after the other, and go at the end.

#![allow(
    clippy::unwrap_used,
    clippy::float_arithmetic,
    clippy::disallowed_methods,
    dead_code,
    reason = "where something is missing there is nothing to measure; the tests use the rest of what they share"
)]

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use farebox::auth::Keys;
use farebox::clock::{Clock, Timestamp};
use farebox::db::{Access, Arg, Db};
use farebox::id::{Entropy, Wallet};
use farebox::ledger::Ledger;
use farebox::pricing::Terms;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, SqliteConnection};

use common::{CREDIT, USAGE_SHORT, forget, fsync_micros, measure, run_one, usage};
use support::books;
use support::gateway::{Setup, UPSTREAM_KEY, farebox_command};
use support::postgres::Postgres;
use support::process::Process;

/// Wallets that are in use at the same time, spread over all there are.
const ACTIVE: i64 = 64;
const CALLERS: [usize; 2] = [1, 64];
/// Rows written by one statement.
const CHUNK: i64 = 500_000;
/// Of each read so many are made, and the middle one is given.
const READS: usize = 401;
const STARTS: usize = 5;
/// A page of receipts.
const PAGE: i64 = 20;
/// When the history was made: within one UTC day.
const THEN_MS: i64 = 1_775_563_200_000;
/// What OpenAI's API reports.
const USAGE_LONG: &str = r#"{"prompt_tokens":200,"completion_tokens":100,"total_tokens":300,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}"#;

/// How much is in the books. The first wallet has a tenth of the entries, the others have alike.
#[derive(Copy, Clone)]
struct Size {
    wallets: i64,
    /// Charges of the first wallet …
    of_first: i64,
    /// … and of each other. Beside them each wallet has the entry of its top-up.
    of_others: i64,
}

impl Size {
    const SMALL: Self = Self { wallets: ACTIVE, of_first: 0, of_others: 0 };
    /// Enough wallets that each of those in use has pages of its own, as it has in the large books.
    const MEDIUM: (i64, i64) = (10_000, 100_000);

    fn new(wallets: i64, entries: i64) -> Self {
        let of_first = entries / 10;
        Self { wallets, of_first, of_others: ((entries - wallets - of_first) / (wallets - 1)).max(0) }
    }

    fn charges(self) -> i64 {
        self.of_first + self.of_others * (self.wallets - 1)
    }

    fn entries(self) -> i64 {
        self.wallets + self.charges()
    }
}

/// Books of a size, open.
struct Books {
    size: Size,
    url: String,
    db: Db,
    ledger: Ledger,
}

#[derive(Copy, Clone)]
enum Load {
    OneWallet,
    Wallets,
    Keys,
    /// Not of those in use alone: each request's wallet is another of all there are.
    Anybody,
}

impl Load {
    const ALL: [Self; 4] = [Self::OneWallet, Self::Wallets, Self::Keys, Self::Anybody];

    fn name(self) -> &'static str {
        match self {
            Self::OneWallet => "one wallet, that with the longest history",
            Self::Wallets => "64 wallets",
            Self::Keys => "64 wallets with keys",
            Self::Anybody => "any wallet",
        }
    }

    /// Whose a request is.
    fn of(self, size: Size, number: u64) -> (Wallet, Option<i64>) {
        let number = i64::try_from(number).unwrap();
        let active = number % ACTIVE * (size.wallets / ACTIVE);
        match self {
            Self::OneWallet => (wallet(0), None),
            Self::Wallets => (wallet(active), None),
            Self::Keys => (wallet(active), Some(active + 1)),
            Self::Anybody => (wallet(number.wrapping_mul(7_919).rem_euclid(size.wallets)), None),
        }
    }
}

fn number(variable: &str, default: i64) -> i64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::main]
async fn main() {
    let large = Size::new(number("BENCH_WALLETS", 1_000_000), number("BENCH_ENTRIES", 10_000_000));
    let round = Duration::from_secs(u64::try_from(number("BENCH_SECONDS", 2)).unwrap());
    let rounds = number("BENCH_ROUNDS", 3);
    let only = std::env::var("BENCH_ONLY").unwrap_or_default();
    // On the disk that the build is on: what is in memory is not durable.
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(&directory).unwrap();
    println!("fsync of 8 KiB: {} µs", fsync_micros(&directory));
    println!(
        "large: {} wallets, {} entries, {} receipts, of which the first wallet has {}",
        large.wallets,
        large.entries(),
        large.charges(),
        large.of_first
    );
    for kind in ["sqlite", "postgres"].into_iter().filter(|kind| kind.contains(&only)) {
        let server = if kind == "postgres" { Some(Postgres::durable().await) } else { None };
        let file = |name: &str| directory.join(format!("growth-{name}.db"));
        let url = async |name: &str| match &server {
            Some(server) => server.fresh_database().await,
            None => {
                forget(&file(name));
                format!("sqlite://{}", file(name).display())
            }
        };
        let bytes = url("bytes").await;
        measure_bytes(kind, &bytes).await;
        let mut both = Vec::new();
        let medium = Size::new(Size::MEDIUM.0, Size::MEDIUM.1);
        for (name, size) in [("small", Size::SMALL), ("medium", medium), ("large", large)] {
            both.push(filled(url(name).await, size, &file(name)).await);
        }
        measure_growth(kind, &both, round, rounds).await;
        for books in &both {
            if books.size.entries() <= 1_000_000 {
                books::assert_no_drift(&books.db).await;
                println!("{kind}: the books of {} entries were audited and agree", books.size.entries());
            }
            books.db.close().await;
        }
        // A file of SQLite's is given back when nobody has a handle on it any more.
        let urls = both.into_iter().map(|books| books.url).collect::<Vec<_>>();
        measure_starts(kind, &urls).await;
        for name in ["bytes", "small", "medium", "large"] {
            forget(&file(name));
        }
    }
}

// ---- books

fn wallet(number: i64) -> Wallet {
    format!("0x{number:040}").parse().unwrap()
}

/// A request of the history; ids of later ones come after it.
fn id_of(charge: i64) -> String {
    format!("req_019d67d0{charge:024}")
}

/// Makes books of a size, by statements over many rows at once.
async fn filled(url: String, size: Size, file: &Path) -> Books {
    let began = Instant::now();
    // Migrated first, and filled with nobody else at it.
    Db::open(&url, Access::Serve).await.unwrap().close().await;
    let statements = fill_statements(size, books::terms());
    if url.starts_with("sqlite") {
        let mut connection = SqliteConnection::connect(&url).await.unwrap();
        let fast = "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -4000000";
        connection.execute(fast).await.unwrap();
        for statement in statements {
            connection.execute(AssertSqlSafe(statement)).await.unwrap();
        }
        connection.execute("PRAGMA journal_mode = WAL").await.unwrap();
        connection.close().await.unwrap();
        std::fs::File::open(file).unwrap().sync_all().unwrap();
    } else {
        let mut connection = PgConnection::connect(&url).await.unwrap();
        // What the rows refer to is there, and need not be looked up for each; checks are made.
        let fast = "SET session_replication_role = replica; SET synchronous_commit = off";
        connection.execute(fast).await.unwrap();
        for statement in statements {
            connection.execute(AssertSqlSafe(statement)).await.unwrap();
        }
        connection.execute("VACUUM ANALYZE").await.unwrap();
        connection.execute("CHECKPOINT").await.unwrap();
        connection.close().await.unwrap();
    }
    let db = Db::open(&url, Access::Serve).await.unwrap();
    let ledger = Ledger::new(db.clone(), Clock::System, "bench".into());
    println!("{}: {} entries made in {} s", db.kind(), size.entries(), began.elapsed().as_secs());
    Books { size, url, db, ledger }
}

/// SQL that both databases take. `i` counts, and is written in decimal digits into what is hex.
fn fill_statements(size: Size, terms: Terms) -> Vec<String> {
    let Size { wallets, of_first, of_others } = size;
    let charge = terms.charge(&usage(), CREDIT).unwrap();
    let (charged, cost, credit) = (charge.charged.get(), charge.cost.get(), CREDIT.get());
    let revenue = i128::from(charged) * 1_000_000 - cost;
    let (prompt, completion) = (usage().prompt_tokens(), usage().completion_tokens());
    let (model, terms) = (terms.model.clone(), serde_json::to_string(&terms).unwrap());
    let padded = |number: &str, digits: usize| {
        let zeros = "0".repeat(digits);
        format!("substr('{zeros}' || CAST({number} AS TEXT), length(CAST({number} AS TEXT)) + 1)")
    };
    let address = |number: &str| format!("'0x' || {}", padded(number, 40));
    let (owner, each, id) = (
        address("i"),
        format!("CAST(CASE WHEN i = 0 THEN {of_first} ELSE {of_others} END AS BIGINT)"),
        padded("i", 24),
    );
    // Of the charges, counted from 0: those of the first wallet, then each other's.
    let others = of_others.max(1);
    let number = format!("CASE WHEN i < {of_first} THEN 0 ELSE 1 + (i - {of_first}) / {others} END");
    let place = format!("CASE WHEN i < {of_first} THEN i ELSE (i - {of_first}) % {others} END");
    let charge_owner = address(&format!("({number})"));
    let day = THEN_MS / 86_400_000;

    let over = |count: i64, statement: &str| {
        let starts = (0..count).step_by(usize::try_from(CHUNK).unwrap());
        let chunks = starts.map(|from| {
            let last = (from + CHUNK).min(count) - 1;
            format!(
                "{statement} FROM (WITH RECURSIVE n (i) AS (SELECT CAST({from} AS BIGINT) UNION ALL
                     SELECT i + 1 FROM n WHERE i < {last}) SELECT i FROM n) n"
            )
        });
        chunks.collect::<Vec<_>>()
    };
    let mut all = Vec::new();
    all.extend(over(
        wallets,
        &format!(
            "INSERT INTO wallets (address, balance_micro, locked_micro, seq, created_at_ms)
             SELECT {owner}, {credit} - ({each}) * {charged}, 0, 1 + ({each}), {THEN_MS}"
        ),
    ));
    all.extend(over(
        wallets,
        &format!(
            "INSERT INTO payments (id, chain_id, asset, from_wallet, nonce, to_wallet, value_micro, valid_after,
                                   valid_before, signature, state, seen_block, tx_hash, block_number, log_index,
                                   created_at_ms, updated_at_ms)
             SELECT i + 1, 8453, {usdc}, {owner}, '0x' || {nonce}, {usdc}, {credit}, 0, 1,
                    '0x' || {nonce} || {nonce} || '1b', 'finalized', 1, '0x' || {nonce}, 1, 1, {THEN_MS}, {THEN_MS}",
            usdc = address("99"),
            nonce = padded("i", 64),
        ),
    ));
    all.extend(over(
        wallets,
        &format!(
            "INSERT INTO entries (wallet, seq, kind, reference, amount_micro, balance_before_micro,
                                  balance_after_micro, contra_account, contra_micro, created_at_ms)
             SELECT {owner}, 1, 'topup', CAST(i + 1 AS TEXT), {credit}, 0, {credit}, 'treasury', -{credit}, {THEN_MS}"
        ),
    ));
    all.extend(over(
        wallets,
        &format!(
            "INSERT INTO api_keys (id, wallet, key_sha256, created_at_ms, spend_cap_micro)
             SELECT i + 1, {owner}, {hash}, {THEN_MS}, {credit}",
            hash = padded("i", 64),
        ),
    ));
    if size.charges() > 0 {
        all.extend(over(
            size.charges(),
            &format!(
                "INSERT INTO receipts (id, wallet, api_key_id, model, outcome, reason, hold_micro, charged_micro,
                                       cost_pico, prompt_tokens, cached_tokens, completion_tokens, usage_raw,
                                       terms, created_at_ms, ended_at_ms)
                 SELECT 'req_019d67d0' || {id}, {charge_owner}, ({number}) + 1, '{model}', 'settled', NULL, 5000,
                        {charged}, {cost}, {prompt}, 0, {completion}, '{USAGE_SHORT}', '{terms}', {THEN_MS} + i,
                        {THEN_MS} + i"
            ),
        ));
        all.extend(over(
            size.charges(),
            &format!(
                "INSERT INTO entries (wallet, seq, kind, reference, amount_micro, balance_before_micro,
                                      balance_after_micro, contra_account, contra_micro, created_at_ms)
                 SELECT {charge_owner}, ({place}) + 2, 'charge', 'req_019d67d0' || {id}, -{charged},
                        {credit} - ({place}) * {charged}, {credit} - (({place}) + 1) * {charged}, 'revenue',
                        {charged}, {THEN_MS} + i"
            ),
        ));
        for key_day in [0, day] {
            all.extend(over(
                wallets,
                &format!(
                    "INSERT INTO key_spending (api_key_id, day, spent_micro, held_micro)
                     SELECT i + 1, {key_day}, ({each}) * {charged}, 0"
                ),
            ));
        }
        all.extend(over(
            wallets,
            &format!(
                "INSERT INTO usage_totals (wallet, api_key_id, request_count, prompt_tokens, completion_tokens,
                                           charged_micro, revenue_pico)
                 SELECT {owner}, i + 1, {each}, ({each}) * {prompt}, ({each}) * {completion},
                        ({each}) * {charged}, ({each}) * {revenue}"
            ),
        ));
    }
    for sequence in ["payments", "api_keys"] {
        all.push(format!("INSERT INTO sequences (name, value) VALUES ('{sequence}', {wallets})"));
    }
    all
}

// ---- what is measured

/// The same on each of the books in turn, and how much more the last takes than the first.
async fn measure_growth(kind: &str, both: &[Books], round: Duration, rounds: i64) {
    println!(
        "\n| {kind}, hold and settle | callers | a second: small, medium, large | median µs | failed | a second, large / small | large / medium |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for load in Load::ALL {
        for callers in CALLERS {
            let mut measured: [Vec<common::Measured>; 3] = Default::default();
            for _ in 0..rounds {
                for (books, measured) in both.iter().zip(&mut measured) {
                    let size = books.size;
                    let who = move |number| load.of(size, number);
                    measured.push(measure(&books.ledger, callers, round, who).await);
                }
            }
            let rates =
                measured.each_ref().map(|all| middle(all.iter().map(|m| u128::from(m.pairs_per_second))));
            let medians = measured.each_ref().map(|all| middle(all.iter().map(|m| m.median.as_micros())));
            let failed: u64 = measured.iter().flatten().map(|m| m.failed).sum();
            println!(
                "| {} | {callers} | {}, {}, {} | {}, {}, {} | {failed} | {} | {} |",
                load.name(),
                rates[0],
                rates[1],
                rates[2],
                medians[0],
                medians[1],
                medians[2],
                hundredths(rates[2], rates[0]),
                hundredths(rates[2], rates[1]),
            );
        }
    }
    println!("\n| {kind}, read | small, medium, large µs | large / small | large / medium |");
    println!("| --- | ---: | ---: | ---: |");
    let mut found = Vec::new();
    for books in both {
        found.push(reads(books).await);
    }
    for (place, (name, small)) in found[0].iter().enumerate() {
        let (medium, large) = (found[1][place].1, found[2][place].1);
        let (of_small, of_medium) = (hundredths(large, *small), hundredths(large, medium));
        println!("| {name} | {small}, {medium}, {large} | {of_small} | {of_medium} |");
    }
}

/// The names of reads and the microseconds that the middle one of many takes.
async fn reads(books: &Books) -> Vec<(&'static str, u128)> {
    let ledger = &books.ledger;
    let owner = wallet(0);
    let keys = Keys::new(books.db.clone(), Clock::System, Entropy, 20);
    // Enough for a page, also where there was nothing.
    for _ in 0..2 * PAGE {
        assert!(run_one(ledger, owner, Some(1), USAGE_SHORT).await);
    }
    let page = ledger.receipts(owner, None, PAGE).await.unwrap();
    assert_eq!(i64::try_from(page.len()).unwrap(), PAGE);
    let newest = page[0].id.clone();
    // In the midst of the history of the wallet, where there is one.
    let past = books.size.of_first / 2;
    let (before, oldest) = if past > 0 {
        ((Timestamp::from_millis(THEN_MS + past), id_of(past)), id_of(0))
    } else {
        let last = page.last().unwrap();
        ((last.created_at, last.id.clone()), last.id.clone())
    };
    let mut found = Vec::new();
    macro_rules! read {
        ($name:literal, $work:expr) => {
            let mut times = Vec::new();
            for _ in 0..READS {
                let began = Instant::now();
                $work;
                times.push(began.elapsed().as_micros());
            }
            found.push(($name, middle(times.into_iter())));
        };
    }
    read!("a balance", ledger.balance(owner).await.unwrap());
    read!("/v1/usage: balance, totals, keys", {
        ledger.balance(owner).await.unwrap();
        ledger.usage_totals(owner).await.unwrap();
        keys.list(owner, None, i64::MAX).await.unwrap();
    });
    read!("what keys have spent", ledger.spending_of_keys(owner).await.unwrap());
    read!("/v1/requests: the newest 20", ledger.receipts(owner, None, PAGE).await.unwrap());
    read!("/v1/requests: 20 in the midst", {
        let page = ledger.receipts(owner, Some(before.clone()), PAGE).await.unwrap();
        assert_eq!(i64::try_from(page.len()).unwrap(), PAGE);
    });
    read!("/v1/requests/{id}: the newest", ledger.receipt(owner, &newest).await.unwrap().unwrap());
    read!("/v1/requests/{id}: the oldest", ledger.receipt(owner, &oldest).await.unwrap().unwrap());
    read!("the last 50 entries (wallet show)", ledger.entries(owner, 50).await.unwrap());
    read!("a sweep for holds of the dead", ledger.sweep().await.unwrap());
    read!("open holds (a gauge)", ledger.open_holds().await.unwrap());
    // As `payments::store` has it.
    let by_state = "WITH others AS (
            SELECT state, COUNT(*) AS n FROM payments
            WHERE state IN ('verified', 'signed', 'broadcast', 'mined', 'credited', 'expired', 'cancelled',
                            'failed', 'reorged')
            GROUP BY state
        )
        SELECT state, n FROM others
        UNION ALL
        SELECT 'finalized', CAST((SELECT COALESCE(MAX(id), 0) FROM payments)
                                 - (SELECT COALESCE(SUM(n), 0) FROM others) AS BIGINT)";
    read!("payments by state (a gauge)", books.db.rows(by_state, vec![]).await.unwrap());
    found
}

/// How long the program takes until it serves.
async fn measure_starts(kind: &str, urls: &[String]) {
    println!("\n| {kind}, from the start to serving | small, medium, large ms | large / small |");
    println!("| --- | ---: | ---: |");
    let mut times: [Vec<u128>; 3] = Default::default();
    for _ in 0..STARTS {
        for (url, times) in urls.iter().zip(&mut times) {
            times.push(start(url).await.as_millis());
        }
    }
    let [small, medium, large] = times.map(|times| middle(times.into_iter()));
    let ratio = hundredths(large, small);
    println!("| the middle one of {STARTS} starts | {small}, {medium}, {large} | {ratio} |");
}

async fn start(url: &str) -> Duration {
    let directory = support::TempDir::new();
    let database_url = Some(url.to_owned());
    let setup = Setup { database_url, ..Setup::without_chain("http://127.0.0.1:1", "http://127.0.0.1:1/v1") };
    let file = directory.path().join("farebox.toml");
    std::fs::write(&file, setup.toml("127.0.0.1:0", directory.path())).unwrap();
    let mut command = farebox_command();
    command.args(["serve", "--config"]).arg(&file);
    command.env("FAREBOX_RELAYER_KEY", setup.relayer.private_key()).env("UPSTREAM_KEY", UPSTREAM_KEY);
    let began = Instant::now();
    let mut process = Process::spawn("farebox", &mut command);
    process.wait_for_line(support::PATIENCE, |line| line.starts_with("farebox listens")).unwrap();
    let took = began.elapsed();
    process.terminate();
    process.wait(support::PATIENCE).await;
    took
}

/// What a settled request leaves in the database, tables and indexes, and how it is shared out.
async fn measure_bytes(kind: &str, url: &str) {
    const REQUESTS: i64 = 50_000;
    const WALLETS: i64 = 1000;
    let books = filled(
        url.to_owned(),
        Size { wallets: WALLETS, ..Size::SMALL },
        Path::new(url.strip_prefix("sqlite://").unwrap_or_default()),
    )
    .await;
    let before = sizes(&books.db).await;
    let mut next = 0;
    while next < REQUESTS {
        let batch = (next..next + 500).map(|number| {
            let owner = number.wrapping_mul(7_919).rem_euclid(WALLETS);
            run_one(&books.ledger, wallet(owner), Some(owner + 1), USAGE_LONG)
        });
        assert!(futures_util::future::join_all(batch).await.into_iter().all(|done| done));
        next += 500;
    }
    let after = sizes(&books.db).await;
    println!("\n| {kind}, {REQUESTS} settled requests of {WALLETS} wallets | bytes a request |");
    println!("| --- | ---: |");
    let mut sum = 0;
    for (name, bytes) in &after {
        let grown = bytes - before.iter().find(|(other, _)| other == name).map_or(0, |(_, bytes)| *bytes);
        sum += grown;
        if grown / REQUESTS > 0 {
            println!("| {name} | {} |", grown / REQUESTS);
        }
    }
    println!("| together | {} |", sum / REQUESTS);
    books.db.close().await;
}

/// The bytes of each table and index.
async fn sizes(db: &Db) -> Vec<(String, i64)> {
    let sql = if db.kind() == "sqlite" {
        "SELECT name, CAST(SUM(pgsize) AS BIGINT) AS bytes FROM dbstat WHERE name <> $1 GROUP BY name ORDER BY name"
    } else {
        "SELECT c.relname::text AS name, pg_relation_size(c.oid) AS bytes
         FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
         WHERE s.nspname = 'public' AND c.relkind IN ('r', 'i') AND c.relname <> $1 ORDER BY 1"
    };
    let rows = db.rows(sql, vec![Arg::from("nothing")]).await.unwrap();
    rows.iter().map(|row| (row.text("name").unwrap(), row.int("bytes").unwrap())).collect()
}

// ---- figures

fn middle(all: impl Iterator<Item = u128>) -> u128 {
    let mut all: Vec<_> = all.collect();
    all.sort_unstable();
    all.get(all.len() / 2).copied().unwrap_or_default()
}

fn hundredths(a: u128, b: u128) -> String {
    let hundredths = a * 100 / b.max(1);
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}
