//! How many requests the ledger holds for and settles in a second, durably, and beside it what
//! PostgreSQL does in the same run on the same server when every change of a balance is a transaction of
//! its own.
//!
//! `make bench-ledger`. `BENCH_SECONDS` says how long each figure is measured for, and `BENCH_ONLY` which:
//! `BENCH_ONLY="postgres, one wallet, 512"`.

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
use std::process::Command;
use std::time::Duration;

use farebox::clock::Clock;
use farebox::db::{Access, Arg, Db};
use farebox::id::Wallet;
use farebox::ledger::Ledger;

use common::{CREDIT, forget, fsync_micros, measure, millis};
use support::books;
use support::postgres::{self, Postgres};

/// As many as pgbench's rows.
const WALLETS: usize = 10_000;
/// Requests under way at the same time.
const CALLERS: [usize; 3] = [1, 64, 512];
const PGBENCH_CLIENTS: [usize; 2] = [16, 64];
/// One conditional UPDATE a transaction.
const CONDITIONAL_UPDATE: &str = "\\set id random(1, :wallets)
UPDATE accounts SET balance_micro = balance_micro - 1 WHERE id = :id AND balance_micro >= 1;
";

#[derive(Copy, Clone)]
enum Load {
    ManyWallets,
    /// Each with an API key, whose spending is counted.
    ManyKeys,
    OneWallet,
}

impl Load {
    const ALL: [Self; 3] = [Self::ManyWallets, Self::ManyKeys, Self::OneWallet];

    fn name(self) -> &'static str {
        match self {
            Self::ManyWallets => "10,000 wallets",
            Self::ManyKeys => "10,000 wallets and keys",
            Self::OneWallet => "one wallet",
        }
    }

    /// Whose a request is.
    fn of(self, number: u64) -> (Wallet, Option<i64>) {
        let number = usize::try_from(number).unwrap() % WALLETS;
        match self {
            Self::ManyWallets => (wallet(number), None),
            Self::ManyKeys => (wallet(number), Some(key_of(number))),
            Self::OneWallet => (wallet(0), None),
        }
    }
}

#[tokio::main]
async fn main() {
    let seconds = std::env::var("BENCH_SECONDS").map_or(4, |text| text.parse().expect("a number of seconds"));
    let round = Duration::from_secs(seconds);
    // On the disk that the build is on: what is in memory is not durable.
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(&directory).unwrap();
    println!("fsync of 8 KiB: {} µs", fsync_micros(&directory));

    let only = std::env::var("BENCH_ONLY").unwrap_or_default();
    let server = Postgres::durable().await;
    let mut updates = [0; 4];
    if only.is_empty() {
        let loads = [
            (WALLETS, PGBENCH_CLIENTS[0]),
            (WALLETS, PGBENCH_CLIENTS[1]),
            (1, PGBENCH_CLIENTS[0]),
            (1, PGBENCH_CLIENTS[1]),
        ];
        for ((rows, clients), rate) in loads.into_iter().zip(&mut updates) {
            *rate = pgbench(&server, rows, clients, seconds).await;
            println!("pgbench, {rows} rows, {clients} clients: {rate} conditional UPDATEs a second");
        }
    }
    let [many_16, many_64, one_16, one_64] = updates;

    println!();
    println!(
        "| database | load | callers | holds settled /s | median | 99 % | failed | × pgbench 16 | × pgbench 64 |"
    );
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for database in ["sqlite", "postgres"] {
        let file = directory.join("bench.db");
        let url = if database == "sqlite" {
            forget(&file);
            format!("sqlite://{}", file.display())
        } else {
            server.fresh_database().await
        };
        let db = Db::open(&url, Access::Serve).await.unwrap();
        let ledger = Ledger::new(db.clone(), Clock::System, "bench".into());
        prepare(&db, &ledger).await;
        for load in Load::ALL {
            for callers in CALLERS {
                if !format!("{database}, {}, {callers}", load.name()).contains(&only) {
                    continue;
                }
                let measured = measure(&ledger, callers, round, move |number| load.of(number)).await;
                let (of_16, of_64) =
                    if matches!(load, Load::OneWallet) { (one_16, one_64) } else { (many_16, many_64) };
                println!(
                    "| {database} | {} | {callers} | {} | {} | {} | {} | {} | {} |",
                    load.name(),
                    measured.pairs_per_second,
                    millis(measured.median),
                    millis(measured.slowest_percent),
                    measured.failed,
                    ratio(measured.pairs_per_second, of_16),
                    ratio(measured.pairs_per_second, of_64),
                );
            }
        }
        books::assert_no_drift(&db).await;
        db.close().await;
        forget(&file);
    }
    println!("\nThe books of both were audited and agree.");
}

fn wallet(number: usize) -> Wallet {
    let mut address = [0; 20];
    address[..8]
        .copy_from_slice(&u64::try_from(number).unwrap().wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    Wallet(address.into())
}

fn key_of(number: usize) -> i64 {
    i64::try_from(number).unwrap() + 1
}

/// Wallets with money and a key each.
async fn prepare(db: &Db, ledger: &Ledger) {
    let mut tx = db.begin().await.unwrap();
    for number in 0..WALLETS {
        let (owner, key) = (wallet(number), key_of(number));
        books::credit(ledger, &mut tx, owner, CREDIT, key).await.unwrap();
        tx.execute(
            "INSERT INTO api_keys (id, wallet, key_sha256, created_at_ms, spend_cap_micro) VALUES ($1, $2, $3, 0, $4)",
            vec![Arg::from(key), Arg::from(owner), Arg::from(format!("hash of {key}")), Arg::from(CREDIT)],
        )
        .await
        .unwrap();
    }
    tx.commit().await.unwrap();
}

/// Transactions a second of pgbench, which comes with PostgreSQL, at one conditional UPDATE each.
async fn pgbench(server: &Postgres, rows: usize, clients: usize, seconds: u64) -> u64 {
    let url = server.fresh_database().await;
    let run = |program: &str, arguments: &[&str]| {
        let done = Command::new(postgres::binaries().join(program)).args(arguments).output().unwrap();
        assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    let accounts = format!(
        "CREATE TABLE accounts (id BIGINT PRIMARY KEY, balance_micro BIGINT NOT NULL CHECK (balance_micro >= 0));
         INSERT INTO accounts SELECT n, 1000000000000 FROM generate_series(1, {rows}) n;"
    );
    run("psql", &["--quiet", "--dbname", &url, "--command", &accounts]);
    run("psql", &["--quiet", "--dbname", &url, "--command", "VACUUM ANALYZE accounts"]);
    let script = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conditional_update.sql");
    std::fs::write(&script, CONDITIONAL_UPDATE).unwrap();
    let (clients, seconds, rows) = (clients.to_string(), seconds.to_string(), format!("wallets={rows}"));
    let arguments = [
        "--no-vacuum",
        "--protocol=prepared",
        "--jobs=2",
        "--client",
        &clients,
        "--time",
        &seconds,
        "--define",
        &rows,
        "--file",
        script.to_str().unwrap(),
        &url,
    ];
    let report = run("pgbench", &arguments);
    let rate = report.lines().find_map(|line| line.strip_prefix("tps = ")).expect(&report);
    rate.split('.').next().unwrap().parse().unwrap()
}

fn ratio(ours: u64, theirs: u64) -> String {
    if theirs == 0 {
        return "not measured".to_owned();
    }
    let tenths = ours * 10 / theirs;
    format!("{}.{}", tenths / 10, tenths % 10)
}
