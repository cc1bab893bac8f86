//! How many requests the ledger holds for and settles in a second, durably, and beside it what
//! PostgreSQL does in the same run on the same server when every change of a balance is a transaction of
//! its own.
//!
//! `make bench-ledger`. `BENCH_SECONDS` says how long each figure is measured for, and `BENCH_ONLY` which:
//! `BENCH_ONLY="postgres, one wallet, 512"`.

#![expect(clippy::unwrap_used, reason = "where something is missing there is nothing to measure")]

#[expect(dead_code, reason = "the tests use the rest")]
#[path = "../tests/support/books.rs"]
mod books;
#[expect(dead_code, reason = "the tests use the rest")]
#[path = "../tests/support/postgres.rs"]
mod postgres;

/// Where the tests have them.
mod support {
    pub(crate) use super::postgres;
}

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farebox::clock::Clock;
use farebox::db::{Access, Arg, Db};
use farebox::id::{Entropy, Wallet};
use farebox::ledger::{Ending, Hold, Ledger, Outcome};
use farebox::money::MicroUsdc;
use farebox::pricing::Usage;
use farebox::tasks::Tasks;

use postgres::Postgres;

/// As many as pgbench's rows.
const WALLETS: usize = 10_000;
/// Requests under way at the same time.
const CALLERS: [usize; 3] = [1, 64, 512];
const PGBENCH_CLIENTS: [usize; 2] = [16, 64];
/// A dollar a million tokens: enough for every round.
const CREDIT: MicroUsdc = MicroUsdc::new(1_000_000_000_000);
const HOLD: MicroUsdc = MicroUsdc::new(5000);
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
}

/// What one round came to.
struct Measured {
    pairs_per_second: u64,
    failed: u64,
    /// Of a hold and its end together.
    median: Duration,
    slowest_percent: Duration,
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
                let measured = measure(&ledger, load, callers, round).await;
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

/// Callers that hold and settle, each one request after the other, until the time is over.
async fn measure(ledger: &Ledger, load: Load, callers: usize, round: Duration) -> Measured {
    let (is_over, failed, next) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (runner, began) = (Tasks::default(), Instant::now());
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            let (ledger, is_over, failed, next) =
                (ledger.clone(), is_over.clone(), failed.clone(), next.clone());
            runner.spawn(async move {
                let mut times = Vec::new();
                while !is_over.load(Ordering::Relaxed) {
                    let number = usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap() % WALLETS;
                    let (owner, key) = match load {
                        Load::ManyWallets => (wallet(number), None),
                        Load::ManyKeys => (wallet(number), Some(key_of(number))),
                        Load::OneWallet => (wallet(0), None),
                    };
                    let began = Instant::now();
                    if run_one(&ledger, owner, key).await {
                        times.push(began.elapsed());
                    } else {
                        failed.fetch_add(1, Ordering::Relaxed);
                        // As Retry-After says, more or less.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
                times
            })
        })
        .collect();
    tokio::time::sleep(round).await;
    is_over.store(true, Ordering::Relaxed);
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await.unwrap());
    }
    let elapsed = began.elapsed();
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    Measured {
        pairs_per_second: u64::try_from(times.len() as u128 * 1_000_000 / elapsed.as_micros()).unwrap(),
        failed: failed.load(Ordering::Relaxed),
        median: at(50),
        slowest_percent: at(99),
    }
}

async fn run_one(ledger: &Ledger, wallet: Wallet, api_key_id: Option<i64>) -> bool {
    let terms = books::terms();
    let now = Clock::System.now();
    let hold = Hold {
        id: Entropy.request_id(now.millis()),
        wallet,
        api_key_id,
        amount: HOLD,
        terms,
        created_at: now,
    };
    if ledger.hold(&hold).await.is_err() {
        return false;
    }
    let usage = Usage::tokens(200, 100);
    let charge = hold.terms.charge(&usage, hold.amount).unwrap();
    let usage_raw = Some(r#"{"prompt_tokens":200,"completion_tokens":100,"total_tokens":300}"#.to_owned());
    let ending = Ending {
        hold,
        outcome: Outcome::Settled,
        reason: None,
        usage,
        usage_raw,
        upstream_cost: None,
        charge,
    };
    ledger.end(&ending).await.is_ok()
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

/// The middle one of many writes that wait for the disk, as each commit does.
fn fsync_micros(directory: &Path) -> u128 {
    use std::io::{Seek as _, Write as _};
    let path = directory.join("fsync");
    let mut file = std::fs::File::create(&path).unwrap();
    let mut times: Vec<_> = (0..101)
        .map(|_| {
            let began = Instant::now();
            file.rewind().unwrap();
            file.write_all(&[1; 8192]).unwrap();
            file.sync_data().unwrap();
            began.elapsed()
        })
        .collect();
    times.sort_unstable();
    std::fs::remove_file(&path).unwrap();
    times[times.len() / 2].as_micros()
}

/// Removes an SQLite file and what stands beside it.
fn forget(file: &Path) {
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", file.display()));
    }
}

fn millis(time: Duration) -> String {
    let tenths = time.as_micros() / 100;
    format!("{}.{} ms", tenths / 10, tenths % 10)
}

fn ratio(ours: u64, theirs: u64) -> String {
    if theirs == 0 {
        return "not measured".to_owned();
    }
    let tenths = ours * 10 / theirs;
    format!("{}.{}", tenths / 10, tenths % 10)
}
