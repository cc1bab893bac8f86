//! What the tests are written in: a gateway, a chain, wallets, upstreams, and how to wait for things.

pub mod books;
pub mod chain;
pub mod gateway;
pub mod media;
pub mod model_server;
pub mod operator;
pub mod postgres;
pub mod process;
pub mod smart_wallets;
pub mod upstream;
pub mod wallet;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farebox::clock::Clock;
use farebox::id::Entropy;
use tokio::time::Instant;

/// Longer than anything a test waits for takes on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Asks again and again until there is an answer, within [`PATIENCE`].
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "it never came to this: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Ends a wait that should have ended by itself.
pub async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("this took too long: {what}"))
}

/// `n` bytes at random, as hex.
pub fn random_hex<const N: usize>() -> String {
    hex::encode(Entropy.bytes::<N>())
}

/// The time in so many seconds from now, as messages write it.
pub fn in_seconds(seconds: i64) -> String {
    Clock::System.now().plus_seconds(seconds).rfc3339()
}

pub fn unix_seconds() -> i64 {
    Clock::System.now().seconds()
}

pub fn project_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A program or file of the test setup: where the environment says, or where `scripts/setup.sh` puts it.
pub fn tool(variable: &str, path: &str) -> PathBuf {
    let path =
        std::env::var_os(variable).map_or_else(|| project_root().join(path), |named| PathBuf::from(&named));
    assert!(path.exists(), "{} is missing: run scripts/setup.sh test", path.display());
    path
}

/// A directory that goes away with its owner.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        let path = std::env::temp_dir().join(format!("farebox-test-{}", random_hex::<8>()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A port that was free a moment ago. Another process may take it first: who binds it tries again.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A client for tests. It keeps no connection, so that several tests' runtimes can share it.
pub fn http_client() -> reqwest::Client {
    farebox::install_crypto();
    reqwest::Client::builder()
        .no_proxy()
        .pool_max_idle_per_host(0)
        .redirect(reqwest::redirect::Policy::none())
        .timeout(Duration::from_secs(60))
        .build()
        .unwrap()
}
