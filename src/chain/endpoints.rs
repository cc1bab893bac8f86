//! The RPC endpoints: one that answers is found, one that fails, lags or contradicts is put aside.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use alloy::providers::{Provider as _, RootProvider};
use alloy::rpc::client::RpcClient;
use alloy::transports::http::Http;
use alloy::transports::{RpcError, TransportErrorKind};
use reqwest::Url;

use crate::chain::ChainError;

/// One call to one endpoint may take this long.
const RPC_TIMEOUT: Duration = Duration::from_secs(10);
/// An endpoint that failed is asked last for this long.
const ASIDE: Duration = Duration::from_secs(30);
/// A head this far behind the highest seen is no reorganisation, but a node that lags.
const LAG_BLOCKS: u64 = 32;
/// For so long the highest head seen is what others are measured by.
const HIGHEST_COUNTS: Duration = Duration::from_secs(60);

pub struct Endpoints {
    all: Vec<Endpoint>,
    /// The highest block any endpoint has shown, and when.
    highest: Mutex<(u64, Instant)>,
}

pub struct Endpoint {
    pub rpc: RootProvider,
    /// The host alone: the rest of an address may hold a key.
    pub host: String,
    /// Set once it was seen to serve the chain that is configured; until then it is not asked.
    is_right_chain: AtomicBool,
    aside_since: Mutex<Option<Instant>>,
}

impl Endpoints {
    pub fn new(urls: &[Url]) -> Result<Self, ChainError> {
        let client = reqwest::Client::builder()
            .timeout(RPC_TIMEOUT)
            .connect_timeout(RPC_TIMEOUT)
            .build()
            .map_err(|e| ChainError::Unreachable(e.to_string()))?;
        let endpoint = |url: &Url| Endpoint {
            rpc: RootProvider::new(RpcClient::new(Http::with_client(client.clone(), url.clone()), false)),
            host: url.host_str().unwrap_or_default().to_owned(),
            is_right_chain: AtomicBool::new(false),
            aside_since: Mutex::new(None),
        };
        Ok(Self { all: urls.iter().map(endpoint).collect(), highest: Mutex::new((0, Instant::now())) })
    }

    /// Those that were seen to serve the right chain.
    pub fn checked(&self) -> impl Iterator<Item = &Endpoint> {
        self.all.iter().filter(|endpoint| endpoint.is_right_chain.load(Ordering::Acquire))
    }

    pub fn configured(&self) -> usize {
        self.all.len()
    }

    /// Asks endpoints not checked yet which chain they serve. Returns one that serves another; an
    /// error if none was ever seen to serve the right one.
    pub async fn check_chain(&self, expected: u64) -> Result<Option<(String, u64)>, ChainError> {
        let (mut failed, mut wrong) = (None, None);
        for endpoint in &self.all {
            if endpoint.is_right_chain.load(Ordering::Acquire) {
                continue;
            }
            match endpoint.call(endpoint.rpc.get_chain_id().into_future()).await {
                Ok(actual) if actual == expected => endpoint.is_right_chain.store(true, Ordering::Release),
                Ok(actual) => wrong = Some((endpoint.host.clone(), actual)),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if wrong.is_none() && self.checked().next().is_none() => Err(error),
            _ => Ok(wrong),
        }
    }

    /// Asks each endpoint in turn until one answers, those put aside last.
    pub async fn ask<'a, T, F>(&'a self, call: impl Fn(&'a RootProvider) -> F) -> Result<T, ChainError>
    where
        F: Future<Output = Result<T, RpcError<TransportErrorKind>>>,
    {
        let (aside, ready): (Vec<_>, Vec<_>) = self.checked().partition(|endpoint| endpoint.is_aside());
        let mut last = ChainError::Unreachable("none has been reached yet".into());
        for endpoint in ready.into_iter().chain(aside) {
            match endpoint.call(call(&endpoint.rpc)).await {
                // A refusal may be this endpoint's own, a limit of its plan; a revert is the chain's.
                Err(error @ (ChainError::Unreachable(_) | ChainError::Refused(_))) => last = error,
                answered => return answered,
            }
        }
        Err(last)
    }

    /// Takes note of a head; an error if it lies so far back that its endpoint must be lagging.
    pub fn note_head(&self, head: u64) -> Result<(), ChainError> {
        let mut highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        let (highest_seen, seen_at) = *highest;
        // A height that nobody reaches again was a false one, and is not held against the others.
        if head >= highest_seen || seen_at.elapsed() > HIGHEST_COUNTS {
            *highest = (head, Instant::now());
        } else if head.saturating_add(LAG_BLOCKS) < highest_seen {
            let highest = highest_seen;
            return Err(ChainError::Unreachable(format!(
                "the head {head} lies behind {highest}, seen before"
            )));
        }
        Ok(())
    }
}

impl Endpoint {
    /// Waits for one call's answer, within bounds, and puts the endpoint aside if there is none.
    pub async fn call<T>(
        &self,
        call: impl Future<Output = Result<T, RpcError<TransportErrorKind>>>,
    ) -> Result<T, ChainError> {
        // An endpoint's address may hold its key, so no error text of the transport is kept.
        let why = match tokio::time::timeout(RPC_TIMEOUT, call).await {
            Ok(Ok(answer)) => {
                *self.aside_since.lock().unwrap_or_else(PoisonError::into_inner) = None;
                return Ok(answer);
            }
            Ok(Err(RpcError::ErrorResp(error))) => return Err(refusal(error.code, &error.message)),
            Ok(Err(RpcError::Transport(TransportErrorKind::HttpError(error)))) => {
                format!("HTTP {}", error.status)
            }
            Ok(Err(_)) => "the connection failed".into(),
            Err(_) => format!("no answer within {} s", RPC_TIMEOUT.as_secs()),
        };
        self.put_aside(&why);
        Err(ChainError::Unreachable(why))
    }

    /// Asks this endpoint last from now on, for a while.
    pub fn put_aside(&self, why: &str) {
        let mut since = self.aside_since.lock().unwrap_or_else(PoisonError::into_inner);
        if since.replace(Instant::now()).is_none() {
            tracing::warn!(endpoint = self.host, why, "an RPC endpoint is put aside");
            metrics::counter!("farebox_rpc_put_aside_total", "endpoint" => self.host.clone()).increment(1);
        }
    }

    fn is_aside(&self) -> bool {
        let since = self.aside_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| since.elapsed() < ASIDE)
    }
}

/// geth, reth and anvil give a revert the code 3; others only say the word.
fn refusal(code: i64, message: &str) -> ChainError {
    if code == 3 || message.contains("revert") {
        ChainError::Reverted(message.to_owned())
    } else {
        ChainError::Refused(message.to_owned())
    }
}
