//! The chain, as far as the gateway has to do with it: one token's state, logs and transfers.
//!
//! Several RPC endpoints may be configured; a call goes to the first that answers. An endpoint that
//! cannot be reached is [`ChainError::Unreachable`]; one that answers with an error has answered.

mod token;

use std::future::Future;
use std::time::Duration;

use alloy::consensus::{SignableTransaction as _, TxEip1559, TxEnvelope};
use alloy::eips::eip2718::Encodable2718 as _;
use alloy::eips::{BlockId, BlockNumberOrTag};
use alloy::network::TxSignerSync as _;
use alloy::primitives::{Address, B256, Bytes, TxKind, U256};
use alloy::providers::{Provider as _, RootProvider};
use alloy::rpc::client::RpcClient;
use alloy::rpc::types::{Filter, Log, TransactionInput, TransactionRequest};
use alloy::signers::local::PrivateKeySigner;
use alloy::sol_types::SolEvent as _;
use alloy::transports::http::Http;
use alloy::transports::{RpcError, TransportErrorKind};
use secrecy::{ExposeSecret as _, SecretString};

pub use token::{Authorization, TokenDomain};

use crate::config::Payments;
use crate::id::{Entropy, Wallet};
use crate::money::MicroUsdc;
use token::usdc;

/// One call to one endpoint may take this long.
const RPC_TIMEOUT: Duration = Duration::from_secs(10);
/// Blocks asked for in one `eth_getLogs`; public endpoints refuse much more.
const LOG_BLOCKS: u64 = 2_000;
/// Gas for one transfer by authorization: measured 79,000, or 96,000 into a new account; a smart
/// wallet's own check comes on top. More than this is never paid for.
const GAS_LIMIT: u64 = 300_000;

#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// No endpoint answered: nobody knows what the chain thinks.
    #[error("no RPC endpoint answers: {0}")]
    Unreachable(String),
    /// The call would revert, and why the contract says so.
    #[error("reverted: {0}")]
    Reverted(String),
    /// An endpoint answered that it will not: a refused transaction, a limit.
    #[error("refused by the RPC endpoint: {0}")]
    Refused(String),
    #[error("{FAREBOX_RELAYER_KEY} is not a private key", FAREBOX_RELAYER_KEY = crate::config::RELAYER_KEY)]
    BadRelayerKey,
    #[error("an RPC endpoint answered with nonsense: {0}")]
    Nonsense(String),
}

/// What is wrong with the token at the configured address: a mistake that no retry mends.
#[derive(Debug, thiserror::Error)]
pub enum TokenMismatch {
    #[error("the RPC endpoint serves chain {actual}, and payments.network says {expected}")]
    Chain { expected: u64, actual: u64 },
    #[error(
        "the token {asset} signs in another EIP-712 domain than payments.asset_name {name:?} and \
         asset_version {version:?} make: its separator is {actual}, ours {expected}"
    )]
    Domain { asset: Wallet, name: String, version: String, expected: B256, actual: B256 },
}

#[derive(Debug, thiserror::Error)]
pub enum TokenCheckError {
    #[error(transparent)]
    Mismatch(#[from] TokenMismatch),
    #[error(transparent)]
    Chain(#[from] ChainError),
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Block {
    pub number: u64,
    /// Unix seconds.
    pub timestamp: u64,
}

/// A transfer by authorization, as the chain's logs have it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FoundTransfer {
    pub tx_hash: B256,
    pub block_number: u64,
    pub block_hash: B256,
    /// Of the `Transfer` log.
    pub log_index: u64,
}

/// What became of a transaction of ours.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum TxStatus {
    Unknown,
    Succeeded { block: u64 },
    Reverted { block: u64 },
}

/// A transaction signed and not yet sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SignedTx {
    pub hash: B256,
    pub raw: Bytes,
}

/// What a transaction offers for its gas, in wei per unit (EIP-1559).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Fees {
    pub max_fee: u128,
    pub max_priority_fee: u128,
}

/// A key and the account it is for.
pub struct RelayerKey {
    pub secret: String,
    pub address: Wallet,
}

/// The link to one chain and one token on it, and the account that pays for gas.
pub struct Chain {
    endpoints: Vec<RootProvider>,
    chain_id: u64,
    asset: Wallet,
    domain: TokenDomain,
    relayer: PrivateKeySigner,
}

impl Chain {
    pub fn new(config: &Payments) -> Result<Self, ChainError> {
        let client = reqwest::Client::builder()
            .timeout(RPC_TIMEOUT)
            .connect_timeout(RPC_TIMEOUT)
            .build()
            .map_err(|e| ChainError::Unreachable(e.to_string()))?;
        let endpoints = config.rpc_urls.iter().map(|url| {
            let transport = Http::with_client(client.clone(), url.clone());
            RootProvider::new(RpcClient::new(transport, false))
        });
        Ok(Self {
            endpoints: endpoints.collect(),
            chain_id: config.chain_id,
            asset: config.token.address,
            domain: TokenDomain::new(&config.token, config.chain_id),
            relayer: relayer(&config.relayer_key)?,
        })
    }

    /// A fresh key for the account that pays for gas.
    pub fn generate_relayer_key(entropy: &Entropy) -> RelayerKey {
        loop {
            // All but one in 2^128 of these are keys.
            if let Ok(signer) = PrivateKeySigner::from_bytes(&entropy.bytes().into()) {
                let secret = format!("{:#x}", signer.to_bytes());
                return RelayerKey { secret, address: Wallet(signer.address()) };
            }
        }
    }

    pub fn chain_id(&self) -> u64 {
        self.chain_id
    }

    pub fn domain(&self) -> &TokenDomain {
        &self.domain
    }

    pub fn relayer(&self) -> Wallet {
        Wallet(self.relayer.address())
    }

    /// Compares the chain and the token's EIP-712 domain with what is configured.
    pub async fn check_token(&self) -> Result<(), TokenCheckError> {
        let actual = self.ask(|rpc| async move { rpc.get_chain_id().await }).await?;
        if actual != self.chain_id {
            return Err(TokenMismatch::Chain { expected: self.chain_id, actual }.into());
        }
        let actual = self.read_token(&usdc::DOMAIN_SEPARATORCall {}).await?;
        let expected = self.domain.separator();
        if actual != expected {
            return Err(TokenMismatch::Domain {
                asset: self.asset,
                name: self.domain.name().to_owned(),
                version: self.domain.version().to_owned(),
                expected,
                actual,
            }
            .into());
        }
        Ok(())
    }

    pub async fn head(&self) -> Result<Block, ChainError> {
        self.block(BlockNumberOrTag::Latest).await
    }

    /// The newest block that will not be undone.
    pub async fn finalized(&self) -> Result<Block, ChainError> {
        self.block(BlockNumberOrTag::Finalized).await
    }

    async fn block(&self, tag: BlockNumberOrTag) -> Result<Block, ChainError> {
        let block = self.ask(|rpc| async move { rpc.get_block_by_number(tag).await }).await?;
        let block = block.ok_or_else(|| ChainError::Nonsense(format!("there is no {tag} block")))?;
        Ok(Block { number: block.header.number, timestamp: block.header.timestamp })
    }

    /// Whether an account has code: a contract wallet, or an EIP-7702 delegation.
    pub async fn has_code(&self, wallet: Wallet) -> Result<bool, ChainError> {
        let code = self.ask(|rpc| async move { rpc.get_code_at(wallet.0).await }).await?;
        Ok(!code.is_empty())
    }

    pub async fn token_balance(&self, wallet: Wallet) -> Result<U256, ChainError> {
        self.read_token(&usdc::balanceOfCall { account: wallet.0 }).await
    }

    /// Whether an authorization was used, or cancelled: the token does not tell the two apart.
    pub async fn is_nonce_used(&self, from: Wallet, nonce: B256) -> Result<bool, ChainError> {
        self.read_token(&usdc::authorizationStateCall { authorizer: from.0, nonce }).await
    }

    /// The relayer's balance of the chain's own coin, in wei.
    pub async fn gas_balance(&self) -> Result<U256, ChainError> {
        let relayer = self.relayer.address();
        self.ask(|rpc| async move { rpc.get_balance(relayer).await }).await
    }

    /// The account nonce of the relayer's next transaction, those waiting to be mined counted.
    pub async fn relayer_nonce(&self) -> Result<u64, ChainError> {
        let relayer = self.relayer.address();
        self.ask(|rpc| async move { rpc.get_transaction_count(relayer).pending().await }).await
    }

    pub async fn fees(&self) -> Result<Fees, ChainError> {
        let fees = self.ask(|rpc| async move { rpc.estimate_eip1559_fees().await }).await?;
        Ok(Fees { max_fee: fees.max_fee_per_gas, max_priority_fee: fees.max_priority_fee_per_gas })
    }

    /// Runs the transfer without sending it, on the pending block: on the latest one, seconds old,
    /// a fresh authorization is not valid yet.
    pub async fn simulate(&self, authorization: &Authorization, signature: &[u8]) -> Result<(), ChainError> {
        let input = authorization.transfer_call(signature);
        let call = self.token_call(input).from(self.relayer.address()).gas_limit(GAS_LIMIT);
        let pending = BlockId::pending();
        self.ask(|rpc| {
            let call = call.clone();
            async move { rpc.call(call).block(pending).await }
        })
        .await
        .map(drop)
    }

    /// Signs the transfer for one account nonce. Nothing is sent.
    pub fn sign(
        &self,
        authorization: &Authorization,
        signature: &[u8],
        account_nonce: u64,
        fees: Fees,
    ) -> Result<SignedTx, ChainError> {
        let mut tx = TxEip1559 {
            chain_id: self.chain_id,
            nonce: account_nonce,
            gas_limit: GAS_LIMIT,
            max_fee_per_gas: fees.max_fee,
            max_priority_fee_per_gas: fees.max_priority_fee,
            to: TxKind::Call(self.asset.0),
            value: U256::ZERO,
            access_list: Default::default(),
            input: authorization.transfer_call(signature),
        };
        let signed = self.relayer.sign_transaction_sync(&mut tx);
        let signed = tx.into_signed(signed.map_err(|e| ChainError::Nonsense(e.to_string()))?);
        let envelope = TxEnvelope::from(signed);
        Ok(SignedTx { hash: *envelope.tx_hash(), raw: envelope.encoded_2718().into() })
    }

    /// Sends signed bytes. Sending the same again is no error: the chain has them already.
    pub async fn broadcast(&self, raw: &[u8]) -> Result<(), ChainError> {
        let sent = self.ask(|rpc| async move { rpc.send_raw_transaction(raw).await.map(drop) }).await;
        match sent {
            Err(ChainError::Refused(why)) if is_already_there(&why) => Ok(()),
            other => other,
        }
    }

    pub async fn tx_status(&self, hash: B256) -> Result<TxStatus, ChainError> {
        let receipt = self.ask(|rpc| async move { rpc.get_transaction_receipt(hash).await }).await?;
        Ok(match receipt {
            Some(receipt) => match (receipt.block_number, receipt.status()) {
                (Some(block), true) => TxStatus::Succeeded { block },
                (Some(block), false) => TxStatus::Reverted { block },
                (None, _) => TxStatus::Unknown,
            },
            None => TxStatus::Unknown,
        })
    }

    /// Looks for the transfer an authorization paid for, whoever sent it: the token's own
    /// `AuthorizationUsed` and, at the next log index of that transaction, the `Transfer` of this
    /// value to this receiver. `authorizationState` alone would not do: cancelling sets it too.
    pub async fn find_transfer(
        &self,
        authorization: &Authorization,
        from_block: u64,
        to_block: u64,
    ) -> Result<Option<FoundTransfer>, ChainError> {
        let used = Filter::new()
            .address(self.asset.0)
            .event_signature(usdc::AuthorizationUsed::SIGNATURE_HASH)
            .topic1(authorization.from.0.into_word())
            .topic2(authorization.nonce);
        for used in self.logs(used, from_block, to_block).await? {
            let (Some(block), Some(index)) = (used.block_number, used.log_index) else { continue };
            let transfers = Filter::new()
                .address(self.asset.0)
                .event_signature(usdc::Transfer::SIGNATURE_HASH)
                .topic1(authorization.from.0.into_word())
                .topic2(authorization.to.0.into_word());
            let next = self.logs(transfers, block, block).await?.into_iter().find(|log| {
                log.log_index == index.checked_add(1)
                    && log.transaction_hash == used.transaction_hash
                    && log.block_hash == used.block_hash
            });
            let Some(log) = next else { continue };
            if transfer_value(&log) != Some(authorization.value) {
                continue;
            }
            if let Some(found) = found(&log) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Every transfer of the token to `receiver` in a range of blocks, with its value.
    pub async fn transfers_to(
        &self,
        receiver: Wallet,
        from_block: u64,
        to_block: u64,
    ) -> Result<Vec<(FoundTransfer, U256)>, ChainError> {
        let filter = Filter::new()
            .address(self.asset.0)
            .event_signature(usdc::Transfer::SIGNATURE_HASH)
            .topic2(receiver.0.into_word());
        let logs = self.logs(filter, from_block, to_block).await?;
        Ok(logs.iter().filter_map(|log| Some((found(log)?, transfer_value(log)?))).collect())
    }

    async fn logs(&self, filter: Filter, from: u64, to: u64) -> Result<Vec<Log>, ChainError> {
        let mut logs = Vec::new();
        let mut start = from;
        while start <= to {
            let end = to.min(start.saturating_add(LOG_BLOCKS - 1));
            let filter = filter.clone().from_block(start).to_block(end);
            let found = self.ask(|rpc| {
                let filter = filter.clone();
                async move { rpc.get_logs(&filter).await }
            });
            logs.extend(found.await?.into_iter().filter(|log| !log.removed));
            start = end.saturating_add(1);
        }
        Ok(logs)
    }

    async fn read_token<C: alloy::sol_types::SolCall>(&self, call: &C) -> Result<C::Return, ChainError> {
        let call = self.token_call(call.abi_encode().into());
        let output = self
            .ask(|rpc| {
                let call = call.clone();
                async move { rpc.call(call).await }
            })
            .await?;
        C::abi_decode_returns(&output).map_err(|e| ChainError::Nonsense(e.to_string()))
    }

    fn token_call(&self, input: Bytes) -> TransactionRequest {
        TransactionRequest::default().to(self.asset.0).input(TransactionInput::new(input))
    }

    /// Asks each endpoint in turn until one answers.
    async fn ask<'a, T, F>(&'a self, call: impl Fn(&'a RootProvider) -> F) -> Result<T, ChainError>
    where
        F: Future<Output = Result<T, RpcError<TransportErrorKind>>>,
    {
        let mut last = String::from("none is configured");
        for rpc in &self.endpoints {
            match tokio::time::timeout(RPC_TIMEOUT, call(rpc)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(RpcError::ErrorResp(error))) => return Err(refusal(error.code, &error.message)),
                // An endpoint's address may hold its key, so no error text of the transport is kept.
                Ok(Err(RpcError::Transport(TransportErrorKind::HttpError(error)))) => {
                    last = format!("HTTP {}", error.status);
                }
                Ok(Err(_)) => last = "the connection failed".into(),
                Err(_) => last = format!("no answer within {} s", RPC_TIMEOUT.as_secs()),
            }
        }
        Err(ChainError::Unreachable(last))
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

fn relayer(key: &SecretString) -> Result<PrivateKeySigner, ChainError> {
    key.expose_secret().trim().parse().map_err(|_| ChainError::BadRelayerKey)
}

/// The words that geth, reth and anvil answer with when they have a transaction already.
fn is_already_there(why: &str) -> bool {
    let why = why.to_ascii_lowercase();
    ["already known", "already imported", "nonce too low", "already in mempool"]
        .iter()
        .any(|words| why.contains(words))
}

fn transfer_value(log: &Log) -> Option<U256> {
    usdc::Transfer::decode_log(&log.inner).ok().map(|transfer| transfer.value)
}

fn found(log: &Log) -> Option<FoundTransfer> {
    Some(FoundTransfer {
        tx_hash: log.transaction_hash?,
        block_number: log.block_number?,
        block_hash: log.block_hash?,
        log_index: log.log_index?,
    })
}

/// Micro-USDC from the token's own integer, where it fits the books.
pub fn micro(value: U256) -> Option<MicroUsdc> {
    i64::try_from(value).ok().map(MicroUsdc::new)
}

/// The address that an ECDSA signature over `hash` recovers to, taken as the token's own code takes
/// it: 65 bytes, `s` in the lower half (EIP-2), `v` 27 or 28, or 0 or 1 from wallets that say so.
pub fn recover(hash: B256, signature: &[u8]) -> Option<Address> {
    if signature.len() != 65 || !matches!(signature.last(), Some(0 | 1 | 27 | 28)) {
        return None;
    }
    let signature = alloy::primitives::Signature::from_raw(signature).ok()?;
    if signature.normalize_s().is_some() {
        return None;
    }
    signature.recover_address_from_prehash(&hash).ok().filter(|address| !address.is_zero())
}
