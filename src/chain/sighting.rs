//! Whether a transfer is in the chain, and who says so.
//!
//! One endpoint may lie or lag, so where several are configured each is asked, and money is only
//! believed in when two have the same log.

use alloy::eips::BlockNumberOrTag;
use alloy::primitives::U256;
use alloy::providers::Provider as _;
use alloy::rpc::types::{Filter, Log};
use alloy::sol_types::SolEvent as _;
use serde::Deserialize;

use crate::chain::endpoints::{Endpoint, none_reached};
use crate::chain::token::usdc;
use crate::chain::{Authorization, Block, Chain, ChainError, FoundTransfer};
use crate::id::Wallet;

/// Blocks asked for in one `eth_getLogs`; public endpoints refuse much more.
const LOG_BLOCKS: u64 = 2_000;
/// Blocks in which a payment's transfer is looked for: two days on Base, where an authorization is
/// good for one. A head further on than that is no reason to ask for ever.
const MAX_BLOCKS: u64 = 100_000;
/// Endpoints that must say so before a payment is taken to have come to nothing, if so many are there.
pub const QUORUM: usize = 2;
/// An endpoint this far past a block has had time to see its logs.
const PAST_BLOCKS: u64 = 2;

/// Up to where the chain is looked at.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Depth {
    Head,
    /// The newest block that will not be undone.
    Finalized,
}

/// What the endpoints make of a transfer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Sighting {
    /// No endpoint that answers has it.
    Nowhere,
    /// Two have it alike, or the only one configured does.
    Agreed(FoundTransfer),
    /// One has it, and no other could be asked or is that far.
    Alone(FoundTransfer),
    /// One has it, and another, which is past it, has not.
    Disputed(FoundTransfer),
}

impl Sighting {
    /// The transfer, unless the endpoints contradict each other.
    pub fn undisputed(&self) -> Option<&FoundTransfer> {
        match self {
            Self::Agreed(found) | Self::Alone(found) => Some(found),
            Self::Nowhere | Self::Disputed(_) => None,
        }
    }
}

/// A sighting, and how far those who were asked have come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct View {
    pub sighting: Sighting,
    /// The lowest of the numbers of their newest blocks, and the earliest of their times: none of them alone can
    /// bring forward what is waited for.
    pub tip: Block,
    /// How many answered.
    pub answers: usize,
    /// Whether enough answered for a no to count: two, where two are configured.
    pub is_quorate: bool,
}

/// What receipts of all types have. Those of a rollup are of more types than Ethereum's: every block of Base begins
/// with one.
#[derive(Debug, Deserialize)]
struct LogsOfReceipt {
    logs: Vec<Log>,
}

struct Answer<'a> {
    endpoint: &'a Endpoint,
    tip: Block,
    found: Option<FoundTransfer>,
}

impl Chain {
    /// Looks for the transfer an authorization paid for, whoever sent it: the token's own
    /// `AuthorizationUsed` and, at the next log index of that transaction, the `Transfer` of this
    /// value to this receiver. `authorizationState` alone would not do: cancelling sets it too.
    pub async fn sight(
        &self,
        authorization: &Authorization,
        from_block: u64,
        depth: Depth,
    ) -> Result<View, ChainError> {
        let asset = self.asset;
        let asked = self.endpoints.trusted().into_iter().map(|endpoint| async move {
            let tip = match depth {
                Depth::Head => self.endpoints.head_of(endpoint).await?,
                Depth::Finalized => endpoint.tip(depth).await?,
            };
            let to_block = tip.number.min(from_block.saturating_add(MAX_BLOCKS));
            let found = endpoint.find_transfer(asset, authorization, from_block, to_block).await?;
            Ok::<_, ChainError>(Answer { endpoint, tip, found })
        });
        let mut answers = Vec::new();
        let mut failed = none_reached();
        for asked in futures_util::future::join_all(asked).await {
            match asked {
                Ok(answer) => answers.push(answer),
                Err(error) => failed = error,
            }
        }
        let Some(tip) = answers.iter().map(|answer| answer.tip).reduce(earliest) else {
            return Err(failed);
        };
        let sighting = compare(&answers, self.endpoints.configured());
        let is_quorate = answers.len() >= self.endpoints.needed();
        Ok(View { sighting, tip, answers: answers.len(), is_quorate })
    }

    /// Whether the token's logs say that the authorization's nonce was used, for whatever other
    /// transfer, or cancelled.
    pub async fn was_spent(
        &self,
        authorization: &Authorization,
        from_block: u64,
    ) -> Result<bool, ChainError> {
        let events =
            vec![usdc::AuthorizationUsed::SIGNATURE_HASH, usdc::AuthorizationCanceled::SIGNATURE_HASH];
        let filter = Filter::new()
            .address(self.asset.0)
            .event_signature(events)
            .topic1(authorization.from.0.into_word())
            .topic2(authorization.nonce);
        let mut failed = none_reached();
        for endpoint in self.endpoints.trusted() {
            let spent = async {
                let head = self.endpoints.head_of(endpoint).await?.number;
                let to_block = head.min(from_block.saturating_add(MAX_BLOCKS));
                let is_used = !endpoint.logs(&filter, from_block, to_block).await?.is_empty();
                // The same log may be that of the transfer that is looked for.
                let paid = endpoint.find_transfer(self.asset, authorization, from_block, to_block);
                Ok(is_used && paid.await?.is_none())
            };
            match spent.await {
                Ok(spent) => return Ok(spent),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Logs from whichever endpoint gives them.
    pub async fn logs(&self, filter: &Filter, from: u64, to: u64) -> Result<Vec<Log>, ChainError> {
        let mut failed = none_reached();
        for endpoint in self.endpoints.trusted() {
            match endpoint.logs(filter, from, to).await {
                Ok(logs) => return Ok(logs),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }
}

fn earliest(one: Block, other: Block) -> Block {
    Block { number: one.number.min(other.number), timestamp: one.timestamp.min(other.timestamp) }
}

fn compare(answers: &[Answer<'_>], configured: usize) -> Sighting {
    let mut alone = Sighting::Nowhere;
    for answer in answers {
        let Some(found) = &answer.found else { continue };
        let alike = answers.iter().filter(|other| other.found.as_ref() == Some(found)).count();
        let against = answers.iter().filter(|other| {
            other.found.as_ref() != Some(found)
                && other.tip.number >= found.block_number.saturating_add(PAST_BLOCKS)
        });
        if alike > 1 || configured == 1 {
            against.for_each(|other| other.endpoint.distrust());
            return Sighting::Agreed(found.clone());
        }
        let mut against = against.peekable();
        if against.peek().is_some() {
            tracing::error!(tx = %found.tx_hash, "the RPC endpoints contradict each other about a transfer");
            alone = Sighting::Disputed(found.clone());
        } else if alone == Sighting::Nowhere {
            alone = Sighting::Alone(found.clone());
        }
    }
    alone
}

impl Endpoint {
    async fn find_transfer(
        &self,
        asset: Wallet,
        authorization: &Authorization,
        from_block: u64,
        to_block: u64,
    ) -> Result<Option<FoundTransfer>, ChainError> {
        let used = Filter::new()
            .address(asset.0)
            .event_signature(usdc::AuthorizationUsed::SIGNATURE_HASH)
            .topic1(authorization.from.0.into_word())
            .topic2(authorization.nonce);
        for used in self.logs(&used, from_block, to_block).await? {
            let (Some(block), Some(index)) = (used.block_number, used.log_index) else { continue };
            let transfers = Filter::new()
                .address(asset.0)
                .event_signature(usdc::Transfer::SIGNATURE_HASH)
                .topic1(authorization.from.0.into_word())
                .topic2(authorization.to.0.into_word());
            let next = self.logs(&transfers, block, block).await?.into_iter().find(|log| {
                log.log_index == index.checked_add(1)
                    && log.transaction_hash == used.transaction_hash
                    && log.block_hash == used.block_hash
            });
            let Some(log) = next else { continue };
            if transfer_value(&log) == Some(authorization.value)
                && let Some(found) = found(&log)
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    pub async fn logs(&self, filter: &Filter, from: u64, to: u64) -> Result<Vec<Log>, ChainError> {
        let mut logs = Vec::new();
        let mut start = from;
        let mut blocks = LOG_BLOCKS;
        while start <= to {
            let end = to.min(start.saturating_add(blocks - 1));
            let filter = filter.clone().from_block(start).to_block(end);
            match self.call(self.rpc.get_logs(&filter)).await {
                Ok(found) => {
                    logs.extend(found.into_iter().filter(|log| !log.removed));
                    start = end.saturating_add(1);
                }
                // Each provider has a limit of its own, down to ten blocks.
                Err(ChainError::Refused(_)) if blocks > 1 => blocks /= 2,
                // More in one block than it has an answer for, which anybody can bring about.
                Err(ChainError::Refused(_)) => {
                    logs.extend(self.logs_by_receipts(&filter, start).await?);
                    start = end.saturating_add(1);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(logs)
    }

    /// The same logs of one block, from its receipts, which have no such limit.
    async fn logs_by_receipts(&self, filter: &Filter, block: u64) -> Result<Vec<Log>, ChainError> {
        let params = (BlockNumberOrTag::Number(block),);
        let asked = self.rpc.raw_request("eth_getBlockReceipts".into(), params);
        let receipts: Option<Vec<LogsOfReceipt>> = self.call(asked).await?;
        let receipts = receipts.ok_or_else(|| ChainError::Nonsense(format!("there is no block {block}")))?;
        let logs = receipts.into_iter().flat_map(|receipt| receipt.logs);
        Ok(logs.filter(|log| filter.rpc_matches(log) && !log.removed).collect())
    }
}

pub fn transfer_value(log: &Log) -> Option<U256> {
    usdc::Transfer::decode_log(&log.inner).ok().map(|transfer| transfer.value)
}

pub fn found(log: &Log) -> Option<FoundTransfer> {
    Some(FoundTransfer {
        tx_hash: log.transaction_hash?,
        block_number: log.block_number?,
        block_hash: log.block_hash?,
        log_index: log.log_index?,
    })
}
