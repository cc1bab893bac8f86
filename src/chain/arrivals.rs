//! What has arrived at an address for good: transfers in final blocks that enough endpoints show alike.

use std::collections::{BTreeSet, HashMap, HashSet};

use alloy::primitives::B256;
use alloy::rpc::types::{Filter, Log};
use alloy::sol_types::SolEvent as _;
use futures_util::future::join_all;

use crate::chain::endpoints::{Endpoint, none_reached};
use crate::chain::sighting::{found, transfer_value};
use crate::chain::token::usdc;
use crate::chain::{Block, Chain, ChainError, FoundTransfer, micro};
use crate::id::Wallet;
use crate::money::MicroUsdc;

/// Senders named in one `eth_getLogs`: what USDC logs of everybody's authorizations is far more.
const SENDERS_AT_ONCE: usize = 50;

/// Final blocks of endpoints that are both well are no further apart: ten minutes of Base.
const ABOUT_THE_SAME_BLOCKS: u64 = 300;

/// A transfer to us.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Arrival {
    pub from: Wallet,
    pub value: MicroUsdc,
    pub found: FoundTransfer,
    /// Of the authorization that it carried out (EIP-3009); `None` for a plain transfer.
    pub nonce: Option<B256>,
}

/// What a search has found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Arrivals {
    /// In the order of the chain. All of these are agreed upon.
    pub agreed: Vec<Arrival>,
    /// Up to this block, which is not among them, nothing else has arrived.
    pub searched_to: u64,
}

struct Answer<'a> {
    endpoint: &'a Endpoint,
    arrivals: HashSet<Arrival>,
}

impl Chain {
    /// Searches final blocks from `from_block` on, `most_blocks` of them at the most. `None`: none of them is
    /// final yet.
    ///
    /// Where two endpoints are configured, or more, two must call a block final and show a transfer in
    /// it, with the same block hash. The search ends before a transfer that they contradict each other about.
    pub async fn final_arrivals(
        &self,
        receiver: Wallet,
        from_block: u64,
        most_blocks: u64,
    ) -> Result<Option<Arrivals>, ChainError> {
        let needed = self.endpoints.needed();
        let (tips, tip) = self.agreed_tips().await?;
        if from_block > tip.number {
            return Ok(None);
        }
        let to_block = tip.number.min(from_block.saturating_add(most_blocks.saturating_sub(1)));
        let asked = tips.iter().filter(|(tip, _)| tip.number >= to_block).map(|(_, endpoint)| async move {
            let arrivals = endpoint.arrivals(self.asset, receiver, from_block, to_block).await?;
            Ok::<_, ChainError>(Answer { endpoint, arrivals: arrivals.into_iter().collect() })
        });
        let mut answers = Vec::new();
        let mut failed = none_reached();
        for asked in join_all(asked).await {
            match asked {
                Ok(answer) => answers.push(answer),
                Err(error) => failed = error,
            }
        }
        if answers.len() < needed {
            return Err(too_few(answers.len(), needed, failed));
        }
        Ok(Some(agree(&answers, needed, to_block)))
    }

    /// The newest final block, for a search that begins there for good: enough must name about the same.
    pub async fn final_block_to_begin_at(&self) -> Result<u64, ChainError> {
        let (tips, tip) = self.agreed_tips().await?;
        let newest = tips.first().map_or(tip.number, |(newest, _)| newest.number);
        let apart = newest.saturating_sub(tip.number);
        if apart > ABOUT_THE_SAME_BLOCKS {
            return Err(ChainError::Nonsense(format!("the endpoints' final blocks are {apart} apart")));
        }
        Ok(tip.number)
    }

    /// What endpoints call the newest final block, the newest first, and the newest that enough of them call final.
    async fn agreed_tips(&self) -> Result<(Vec<(Block, &Endpoint)>, Block), ChainError> {
        let needed = self.endpoints.needed();
        let (tips, failed) = self.endpoints.final_tips().await;
        match needed.checked_sub(1).and_then(|last| tips.get(last)) {
            Some(&(tip, _)) => Ok((tips, tip)),
            None => Err(too_few(tips.len(), needed, failed)),
        }
    }
}

fn too_few(answers: usize, needed: usize, failed: ChainError) -> ChainError {
    match answers {
        0 => failed,
        _ => ChainError::Unreachable(format!("{answers} of {needed} that must agree answer ({failed})")),
    }
}

fn agree(answers: &[Answer<'_>], needed: usize, to_block: u64) -> Arrivals {
    let mut agreed: Vec<Arrival> = Vec::new();
    let mut searched_to = to_block.saturating_add(1);
    let seen: HashSet<&Arrival> = answers.iter().flat_map(|answer| &answer.arrivals).collect();
    for arrival in seen {
        let (alike, against): (Vec<_>, Vec<_>) =
            answers.iter().partition(|answer| answer.arrivals.contains(arrival));
        if alike.len() >= needed {
            agreed.push(arrival.clone());
            if needed > 1 {
                against.iter().for_each(|other| other.endpoint.distrust());
            }
        } else if needed > 1 && against.len() >= needed {
            // Made up: those who are enough to be believed have searched its block, too.
            let (FoundTransfer { tx_hash, block_number, .. }, value) = (&arrival.found, arrival.value);
            tracing::error!(%tx_hash, block_number, %value, "a deposit is not believed: two endpoints have not got it");
            alike.iter().for_each(|other| other.endpoint.distrust());
        } else {
            tracing::error!(
                tx = %arrival.found.tx_hash, block = arrival.found.block_number,
                "the RPC endpoints contradict each other about a deposit"
            );
            searched_to = searched_to.min(arrival.found.block_number);
        }
    }
    agreed.sort_by_key(|arrival| (arrival.found.block_number, arrival.found.log_index));
    Arrivals { agreed, searched_to }
}

impl Endpoint {
    /// Transfers to `receiver` in a range of blocks, but for those of nothing and those of its own.
    async fn arrivals(
        &self,
        asset: Wallet,
        receiver: Wallet,
        from_block: u64,
        to_block: u64,
    ) -> Result<Vec<Arrival>, ChainError> {
        let transfers = Filter::new()
            .address(asset.0)
            .event_signature(usdc::Transfer::SIGNATURE_HASH)
            .topic2(receiver.0.into_word());
        let logs = self.logs(&transfers, from_block, to_block).await?;
        let mut arrivals: Vec<_> = logs.iter().filter_map(arrival).collect();
        arrivals.retain(|arrival| arrival.from != receiver && arrival.value > MicroUsdc::ZERO);
        let used = self.authorizations_of(asset, &arrivals).await?;
        for arrival in &mut arrivals {
            let before = arrival.found.log_index.checked_sub(1);
            let place = before.map(|index| (arrival.found.tx_hash, arrival.found.block_hash, index));
            arrival.nonce = place
                .and_then(|place| used.get(&place))
                .filter(|(authorizer, _)| *authorizer == arrival.from)
                .map(|(_, nonce)| *nonce);
        }
        Ok(arrivals)
    }

    /// The authorizations that the senders of these have used in the same blocks, by their logs' places.
    async fn authorizations_of(
        &self,
        asset: Wallet,
        arrivals: &[Arrival],
    ) -> Result<HashMap<(B256, B256, u64), (Wallet, B256)>, ChainError> {
        let blocks = arrivals.iter().map(|arrival| arrival.found.block_number);
        let (Some(first), Some(last)) = (blocks.clone().min(), blocks.max()) else {
            return Ok(HashMap::new());
        };
        let senders: BTreeSet<_> = arrivals.iter().map(|arrival| arrival.from).collect();
        let senders: Vec<B256> = senders.into_iter().map(|sender| sender.0.into_word()).collect();
        let mut used = HashMap::new();
        for senders in senders.chunks(SENDERS_AT_ONCE) {
            let filter = Filter::new()
                .address(asset.0)
                .event_signature(usdc::AuthorizationUsed::SIGNATURE_HASH)
                .topic1(senders.to_vec());
            for log in self.logs(&filter, first, last).await? {
                let event = usdc::AuthorizationUsed::decode_log(&log.inner);
                if let (Ok(event), Some(place)) = (event, found(&log)) {
                    let place = (place.tx_hash, place.block_hash, place.log_index);
                    used.insert(place, (Wallet(event.authorizer), event.nonce));
                }
            }
        }
        Ok(used)
    }
}

fn arrival(log: &Log) -> Option<Arrival> {
    let from = usdc::Transfer::decode_log(&log.inner).ok()?.from;
    Some(Arrival { from: Wallet(from), value: micro(transfer_value(log)?)?, found: found(log)?, nonce: None })
}
