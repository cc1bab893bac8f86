//! The RPC endpoints: one that answers is found, one that fails, lags or contradicts is put aside.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use alloy::eips::BlockNumberOrTag;
use alloy::providers::{Provider as _, RootProvider};
use alloy::rpc::client::RpcClient;
use alloy::transports::http::Http;
use alloy::transports::{RpcError, TransportErrorKind};
use futures_util::future::join_all;
use reqwest::Url;

use crate::chain::sighting::{Depth, QUORUM};
use crate::chain::{Block, ChainError};
use crate::clock::Clock;

/// One call to one endpoint may take this long.
const RPC_TIMEOUT: Duration = Duration::from_secs(10);
/// For so long an endpoint that contradicted two others is asked last.
const DISTRUST: Duration = Duration::from_secs(600);
/// A head this far below one that the same endpoint has shown is no reorganisation.
const LAG_BLOCKS: u64 = 32;
/// A head this much older than another endpoint's is that of a node which has fallen behind.
const LAG_SECONDS: u64 = 60;
/// For so long a head counts for what later ones are measured by; one that nobody reaches again was
/// a false one, and is not held against anybody for longer.
const HEAD_COUNTS: Duration = Duration::from_secs(60);

pub struct Endpoints {
    all: Vec<Endpoint>,
    clock: Clock,
}

pub struct Endpoint {
    pub rpc: RootProvider,
    /// The host alone: the rest of an address may hold a key.
    pub host: String,
    /// Set once it was seen to serve the chain that is configured; until then it is not asked.
    is_right_chain: AtomicBool,
    standing: Mutex<Standing>,
}

/// What an endpoint has shown lately.
#[derive(Default)]
struct Standing {
    /// It did not answer, or lags; until it answers again.
    is_failing: bool,
    distrusted_since: Option<Instant>,
    /// Its highest head, and when it showed that.
    head: Option<(Block, Instant)>,
}

impl Standing {
    fn recent_head(&self) -> Option<Block> {
        self.head.filter(|(_, seen_at)| seen_at.elapsed() < HEAD_COUNTS).map(|(head, _)| head)
    }

    fn is_aside(&self) -> bool {
        self.is_failing || self.distrusted_since.is_some_and(|since| since.elapsed() < DISTRUST)
    }
}

impl Endpoints {
    pub fn new(urls: &[Url], clock: Clock) -> Result<Self, ChainError> {
        let client = reqwest::Client::builder()
            .timeout(RPC_TIMEOUT)
            .connect_timeout(RPC_TIMEOUT)
            .build()
            .map_err(|e| ChainError::Unreachable(e.to_string()))?;
        let endpoint = |url: &Url| Endpoint {
            rpc: RootProvider::new(RpcClient::new(Http::with_client(client.clone(), url.clone()), false)),
            host: url.host_str().unwrap_or_default().to_owned(),
            is_right_chain: AtomicBool::new(false),
            standing: Mutex::default(),
        };
        Ok(Self { all: urls.iter().map(endpoint).collect(), clock })
    }

    /// Those that were seen to serve the right chain.
    pub fn checked(&self) -> impl Iterator<Item = &Endpoint> {
        self.all.iter().filter(|endpoint| endpoint.is_right_chain.load(Ordering::Acquire))
    }

    pub fn configured(&self) -> usize {
        self.all.len()
    }

    /// How many must say the same for it to be believed.
    pub fn needed(&self) -> usize {
        self.configured().min(QUORUM)
    }

    /// Those whose word counts now: the ones not put aside, or all while there is none.
    pub fn trusted(&self) -> Vec<&Endpoint> {
        let ready: Vec<_> = self.checked().filter(|endpoint| !endpoint.standing().is_aside()).collect();
        if ready.is_empty() { self.checked().collect() } else { ready }
    }

    /// Asks endpoints not checked yet which chain they serve, and those that failed whether they are
    /// back. Returns one that serves another chain; an error if none was ever seen to serve the
    /// right one.
    pub async fn check(&self, expected: u64) -> Result<Option<(String, u64)>, ChainError> {
        let probe = async |endpoint: &Endpoint| {
            if !endpoint.is_right_chain.load(Ordering::Acquire) {
                let actual = endpoint.call(endpoint.rpc.get_chain_id().into_future()).await?;
                if actual != expected {
                    return Ok(Some((endpoint.host.clone(), actual)));
                }
                endpoint.is_right_chain.store(true, Ordering::Release);
            } else if endpoint.standing().is_failing {
                self.head_of(endpoint).await?;
            }
            Ok(None)
        };
        let (mut failed, mut wrong) = (None, None);
        for probed in join_all(self.all.iter().map(probe)).await {
            match probed {
                Ok(other_chain) => wrong = wrong.or(other_chain),
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
        self.first(|endpoint| endpoint.call(call(&endpoint.rpc))).await
    }

    /// The lowest of the newest blocks that endpoints show which do not lag: that far they all are.
    pub async fn head(&self) -> Result<Block, ChainError> {
        let asked = join_all(self.trusted().into_iter().map(|endpoint| self.head_of(endpoint))).await;
        let (mut lowest, mut failed) = (None, none_reached());
        for asked in asked {
            match (asked, lowest) {
                (Ok(head), Some(Block { number, .. })) if head.number >= number => {}
                (Ok(head), _) => lowest = Some(head),
                (Err(error), _) => failed = error,
            }
        }
        lowest.ok_or(failed)
    }

    /// The newest block that enough of them call final; where fewer answer, that all of those do.
    pub async fn finalized(&self) -> Result<Block, ChainError> {
        let (tips, failed) = self.final_tips().await;
        let enough = self.needed().min(tips.len());
        let last = enough.checked_sub(1).and_then(|last| tips.get(last));
        match last {
            Some((tip, _)) => Ok(*tip),
            // Also of those put aside, before nobody is asked.
            None => self.first(|endpoint| endpoint.tip(Depth::Finalized)).await.map_err(|_| failed),
        }
    }

    /// What each of those whose word counts calls the newest final block, the newest first; and why one did not answer.
    pub async fn final_tips(&self) -> (Vec<(Block, &Endpoint)>, ChainError) {
        let asked = self.trusted().into_iter().map(|endpoint| async move {
            let tip = endpoint.tip(Depth::Finalized).await;
            (tip, endpoint)
        });
        let (mut tips, mut failed) = (Vec::new(), none_reached());
        for (tip, endpoint) in join_all(asked).await {
            match tip {
                Ok(tip) => tips.push((tip, endpoint)),
                Err(error) => failed = error,
            }
        }
        tips.sort_by_key(|(tip, _)| std::cmp::Reverse(tip.number));
        (tips, failed)
    }

    async fn first<'a, T, F>(&'a self, call: impl Fn(&'a Endpoint) -> F) -> Result<T, ChainError>
    where
        F: Future<Output = Result<T, ChainError>>,
    {
        let (aside, ready): (Vec<_>, Vec<_>) = self.checked().partition(|e| e.standing().is_aside());
        let mut last = none_reached();
        for endpoint in ready.into_iter().chain(aside) {
            match call(endpoint).await {
                // A revert is the chain's word; a refusal may be this endpoint's own, a limit of its plan.
                Err(error @ ChainError::Reverted(_)) => return Err(error),
                Err(error) => last = error,
                answered => return answered,
            }
        }
        Err(last)
    }

    /// An endpoint's newest block. One that lags is put aside, and what it says is no answer.
    pub async fn head_of(&self, endpoint: &Endpoint) -> Result<Block, ChainError> {
        let head = endpoint.tip(Depth::Head).await?;
        let others = self.checked().filter(|other| !std::ptr::eq(*other, endpoint));
        let newest =
            others.filter_map(|other| other.standing().recent_head()).map(|head| head.timestamp).max();
        // A block from the future is somebody's lie, and no measure for others.
        let now = u64::try_from(self.clock.now().seconds()).unwrap_or_default();
        let newest = newest.unwrap_or_default().min(now);
        let mut standing = endpoint.standing();
        let shown = standing.recent_head();
        let fell_back = shown.is_some_and(|shown| head.number.saturating_add(LAG_BLOCKS) < shown.number);
        if fell_back || head.timestamp.saturating_add(LAG_SECONDS) < newest {
            let why = format!("its head {} lags behind", head.number);
            endpoint.fail(&mut standing, &why);
            return Err(ChainError::Unreachable(why));
        }
        if shown.is_none_or(|shown| head.number >= shown.number) {
            standing.head = Some((head, Instant::now()));
        }
        standing.is_failing = false;
        Ok(head)
    }
}

/// No endpoint was seen to serve the right chain.
pub fn none_reached() -> ChainError {
    ChainError::Unreachable("none has been reached yet".into())
}

impl Endpoint {
    /// Waits for one call's answer, within bounds, and puts the endpoint aside if there is none.
    pub async fn call<T>(
        &self,
        call: impl Future<Output = Result<T, RpcError<TransportErrorKind>>>,
    ) -> Result<T, ChainError> {
        // An endpoint's address may hold its key, so no error text of the transport is kept.
        let why = match tokio::time::timeout(RPC_TIMEOUT, call).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(RpcError::ErrorResp(error))) => return Err(refusal(error.code, &error.message)),
            Ok(Err(RpcError::Transport(TransportErrorKind::HttpError(error)))) => {
                format!("HTTP {}", error.status)
            }
            Ok(Err(RpcError::DeserError { .. })) => "its answer is not what was asked for".into(),
            Ok(Err(_)) => "the connection failed".into(),
            Err(_) => format!("no answer within {} s", RPC_TIMEOUT.as_secs()),
        };
        self.fail(&mut self.standing(), &why);
        Err(ChainError::Unreachable(why))
    }

    pub async fn tip(&self, depth: Depth) -> Result<Block, ChainError> {
        let tag = match depth {
            Depth::Head => BlockNumberOrTag::Latest,
            Depth::Finalized => BlockNumberOrTag::Finalized,
        };
        let block = self.call(self.rpc.get_block_by_number(tag).into_future()).await?;
        let block = block.ok_or_else(|| ChainError::Nonsense(format!("there is no {tag} block")))?;
        Ok(Block { number: block.header.number, timestamp: block.header.timestamp })
    }

    /// Asks this endpoint last from now on, for a while: two others contradict it.
    pub fn distrust(&self) {
        let mut standing = self.standing();
        if !standing.is_aside() {
            self.report("it contradicts two others about a transfer");
        }
        standing.distrusted_since = Some(Instant::now());
    }

    fn fail(&self, standing: &mut Standing, why: &str) {
        if !standing.is_aside() {
            self.report(why);
        }
        standing.is_failing = true;
    }

    fn report(&self, why: &str) {
        tracing::warn!(endpoint = self.host, why, "an RPC endpoint is put aside");
        metrics::counter!("farebox_rpc_put_aside_total", "endpoint" => self.host.clone()).increment(1);
    }

    /// Whole at every instant, so a panic elsewhere does not spoil it.
    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What nodes say of an execution that failed in another way than by a revert, such as by using up
/// its gas: the contract's doing too. Each kind of node has words of its own; spaces are left out.
const FAILED_EXECUTION: [&str; 9] = [
    "outofgas",
    "memoryoog",
    "invalidopcode",
    "invalidfeopcode",
    "opcodenotfound",
    "invalidjump",
    "stackunderflow",
    "stackoverflow",
    "stacklimit",
];

/// geth, reth and anvil give a revert the code 3; others only say the word.
fn refusal(code: i64, message: &str) -> ChainError {
    let words = message.to_ascii_lowercase().replace(' ', "");
    if code == 3 || words.contains("revert") || FAILED_EXECUTION.iter().any(|failed| words.contains(failed)) {
        ChainError::Reverted(message.to_owned())
    } else {
        ChainError::Refused(message.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_contract_does_is_told_from_what_an_endpoint_will_not_do() {
        for (code, message) in [
            (3, "execution reverted: FiatTokenV2: invalid signature"),
            (-32000, "execution reverted"),
            (-32000, "out of gas"),
            (-32003, "out of gas: gas required exceeds: 500000"),
            (-32603, "EVM error OutOfGas"),
            (-32603, "EVM error MemoryOOG"),
            (-32603, "EVM error InvalidFEOpcode"),
            (-32000, "invalid opcode: INVALID"),
            (-32000, "invalid jump destination"),
            (-32000, "stack underflow (0 <=> 1)"),
            (-32000, "stack limit reached 1024 (1023)"),
        ] {
            assert!(matches!(refusal(code, message), ChainError::Reverted(_)), "{message}");
        }
        for (code, message) in [
            (-32005, "limit exceeded"),
            (-32000, "nonce too low"),
            (-32000, "intrinsic gas too low"),
            (-32000, "missing trie node"),
            (-32602, "query exceeds max block range 2000"),
        ] {
            assert!(matches!(refusal(code, message), ChainError::Refused(_)), "{message}");
        }
    }
}
