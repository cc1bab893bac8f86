//! What the benches of the ledger have in common: a request as the gateway books it, callers that make one
//! after the other, and how figures are shown.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farebox::clock::Clock;
use farebox::id::{Entropy, Wallet};
use farebox::ledger::{Ending, Hold, Ledger, Outcome};
use farebox::money::MicroUsdc;
use farebox::pricing::Usage;
use farebox::tasks::Tasks;

use crate::support::books;

/// A dollar a million tokens: enough for every round.
pub const CREDIT: MicroUsdc = MicroUsdc::new(1_000_000_000_000);
const HOLD: MicroUsdc = MicroUsdc::new(5000);
/// What each request is reported to have used, in few words …
pub const USAGE_SHORT: &str = r#"{"prompt_tokens":200,"completion_tokens":100,"total_tokens":300}"#;

/// What one round came to.
pub struct Measured {
    pub pairs_per_second: u64,
    pub failed: u64,
    /// Of a hold and its end together.
    pub median: Duration,
    pub slowest_percent: Duration,
}

/// Callers that hold and settle, each one request after the other, until the time is over. `who` says whose
/// the next request is, by its number.
pub async fn measure(
    ledger: &Ledger,
    callers: usize,
    round: Duration,
    who: impl Fn(u64) -> (Wallet, Option<i64>) + Copy + Send + 'static,
) -> Measured {
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
                    let (owner, key) = who(next.fetch_add(1, Ordering::Relaxed));
                    let began = Instant::now();
                    if run_one(&ledger, owner, key, USAGE_SHORT).await {
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

/// Holds for a request and settles it. Whether both were done.
pub async fn run_one(ledger: &Ledger, wallet: Wallet, api_key_id: Option<i64>, reported: &str) -> bool {
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
    let usage = usage();
    let charge = hold.terms.charge(&usage, hold.amount).unwrap();
    let usage_raw = Some(reported.to_owned());
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

pub fn usage() -> Usage {
    Usage::tokens(200, 100)
}

/// The middle one of many writes that wait for the disk, as each commit does.
pub fn fsync_micros(directory: &Path) -> u128 {
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
pub fn forget(file: &Path) {
    for suffix in ["", "-wal", "-shm", ".lock", "-journal"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", file.display()));
    }
}

pub fn millis(time: Duration) -> String {
    let tenths = time.as_micros() / 100;
    format!("{}.{} ms", tenths / 10, tenths % 10)
}
