//! The chain, as far as the gateway has to do with it: one token's state, logs and transfers.
//!
//! Several RPC endpoints may be configured; a call goes to the first that answers, and whether a
//! transfer is in the chain all of them are asked ([`Chain::sight`]).

mod arrivals;
mod endpoints;
mod sighting;
mod smart_wallet;
mod token;

use alloy::consensus::{SignableTransaction as _, TxEip1559, TxEnvelope};
use alloy::eips::BlockId;
use alloy::eips::eip2718::Encodable2718 as _;
use alloy::network::TxSignerSync as _;
use alloy::primitives::{Address, B256, Bytes, TxKind, U256};
use alloy::providers::{Provider as _, RootProvider};
use alloy::rpc::types::{Filter, Log, TransactionInput, TransactionRequest};
use alloy::signers::SignerSync as _;
use alloy::signers::local::PrivateKeySigner;
use alloy::sol_types::{SolCall, SolEvent as _};
use alloy::transports::{RpcError, TransportErrorKind};
use secrecy::{ExposeSecret as _, SecretString};
use std::future::{Future, IntoFuture as _};

pub use arrivals::{Arrival, Arrivals};
pub use sighting::{Depth, Sighting, View};
pub use token::{Authorization, TokenDomain, with_v_27};

use crate::clock::Clock;
use crate::config::Payments;
use crate::id::{Entropy, Wallet};
use crate::money::MicroUsdc;
use endpoints::{Endpoints, none_reached};
use sighting::{found, transfer_value};
use token::usdc;

/// Gas for one transfer by authorization: measured 79,000, or 96,000 into a new account; a smart
/// wallet's own check comes on top. More than this is never paid for.
const GAS_LIMIT: u64 = 300_000;
const WEI_PER_GWEI: u128 = 1_000_000_000;

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
    #[error("{TREASURY_KEY} is not a private key", TREASURY_KEY = crate::config::TREASURY_KEY)]
    BadTreasuryKey,
    #[error(
        "{TREASURY_KEY} is the key of {actual}, and payments.pay_to is {expected}: withdrawals are paid from there",
        TREASURY_KEY = crate::config::TREASURY_KEY
    )]
    OtherTreasury { expected: Wallet, actual: Wallet },
    #[error(
        "{TREASURY_KEY} is one of the relayers' keys: the account that pays gas must not be the treasury",
        TREASURY_KEY = crate::config::TREASURY_KEY
    )]
    TreasuryIsRelayer,
    #[error("there is no key of the treasury's")]
    NoTreasuryKey,
    #[error("there is no key for the relayer {0} any more")]
    UnknownRelayer(Wallet),
    #[error("an RPC endpoint answered with nonsense: {0}")]
    Nonsense(String),
}

/// What is wrong with the token at the configured address: a mistake that no retry mends.
#[derive(Debug, thiserror::Error)]
pub enum TokenMismatch {
    #[error("the RPC endpoint at {host} serves chain {actual}, and payments.network says {expected}")]
    Chain { host: String, expected: u64, actual: u64 },
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

/// What an account holds of the token in a block that will not be undone.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct FinalBalance {
    pub block: Block,
    pub block_hash: B256,
    pub balance: U256,
}

/// A transfer by authorization, as the chain's logs have it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
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
    pub relayer: Wallet,
    pub account_nonce: u64,
    pub fees: Fees,
    pub hash: B256,
    pub raw: Bytes,
}

/// What a relayer's transaction does.
pub struct RelayedCall {
    pub to: Address,
    pub input: Bytes,
    pub gas_limit: u64,
}

impl RelayedCall {
    /// Sends nothing to itself: it only takes up an account nonce.
    pub fn nothing(relayer: Wallet) -> Self {
        Self { to: relayer.0, input: Bytes::new(), gas_limit: 21_000 }
    }
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
    endpoints: Endpoints,
    chain_id: u64,
    asset: Wallet,
    domain: TokenDomain,
    /// The accounts that pay for gas; each sends in its own order, so several settle in parallel.
    relayers: Vec<PrivateKeySigner>,
    /// Signs what is paid out; it sends nothing itself.
    treasury: Option<PrivateKeySigner>,
    max_fee_wei: u128,
    /// Contracts that may deploy a wallet on the way (ERC-6492).
    factories: Vec<Wallet>,
}

impl Chain {
    pub fn new(config: &Payments, clock: Clock) -> Result<Self, ChainError> {
        Ok(Self {
            endpoints: Endpoints::new(&config.rpc_urls, clock)?,
            chain_id: config.chain_id,
            asset: config.token.address,
            domain: TokenDomain::new(&config.token, config.chain_id),
            treasury: treasury(config)?,
            relayers: relayers(&config.relayer_keys)?,
            factories: config.erc6492_factories.clone(),
            max_fee_wei: u128::from(config.max_fee_gwei).saturating_mul(WEI_PER_GWEI),
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

    pub fn relayers(&self) -> impl Iterator<Item = Wallet> {
        self.relayers.iter().map(|signer| Wallet(signer.address()))
    }

    /// Compares the chain and the token's EIP-712 domain with what is configured.
    pub async fn check_token(&self) -> Result<(), TokenCheckError> {
        self.check_endpoints().await?;
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

    /// Asks endpoints that could not be reached before which chain they serve. One that serves
    /// another is never used; it is reported here.
    pub async fn check_endpoints(&self) -> Result<(), TokenCheckError> {
        match self.endpoints.check(self.chain_id).await? {
            Some((host, actual)) => {
                Err(TokenMismatch::Chain { host, expected: self.chain_id, actual }.into())
            }
            None => Ok(()),
        }
    }

    pub async fn head(&self) -> Result<Block, ChainError> {
        self.endpoints.head().await
    }

    /// The newest block that will not be undone.
    pub async fn finalized(&self) -> Result<Block, ChainError> {
        self.endpoints.finalized().await
    }

    /// The hash of the block that the chain has at a height now.
    pub async fn block_hash(&self, number: u64) -> Result<Option<B256>, ChainError> {
        let block = self.ask(|rpc| async move { rpc.get_block_by_number(number.into()).await }).await?;
        Ok(block.map(|block| block.header.hash))
    }

    /// Whether an account has code: a contract wallet, or an EIP-7702 delegation.
    pub async fn has_code(&self, wallet: Wallet) -> Result<bool, ChainError> {
        let code = self.ask(|rpc| async move { rpc.get_code_at(wallet.0).await }).await?;
        Ok(!code.is_empty())
    }

    pub async fn token_balance(&self, wallet: Wallet) -> Result<U256, ChainError> {
        self.read_token(&usdc::balanceOfCall { account: wallet.0 }).await
    }

    /// What a wallet holds in the newest final block. The block is named by its hash when it is asked
    /// (EIP-1898), so that the balance is that block's and no other's.
    pub async fn final_balance(&self, wallet: Wallet) -> Result<FinalBalance, ChainError> {
        let block = self.finalized().await?;
        let gone = || ChainError::Nonsense(format!("there is no block {} that was final", block.number));
        let block_hash = self.block_hash(block.number).await?.ok_or_else(gone)?;
        let call = usdc::balanceOfCall { account: wallet.0 };
        let balance = self.read_token_at(&call, BlockId::hash(block_hash)).await?;
        Ok(FinalBalance { block, block_hash, balance })
    }

    /// What a wallet holds once what waits to be mined is, the block that nonces are read at too: the
    /// least that an endpoint says, since one that is behind shows what has left.
    pub async fn pending_balance(&self, wallet: Wallet) -> Result<U256, ChainError> {
        let balances = self.ask_each(&usdc::balanceOfCall { account: wallet.0 }).await?;
        balances.into_iter().min().ok_or_else(none_reached)
    }

    /// What each endpoint answers to a call of the token, on the pending block; an error if none does.
    async fn ask_each<C: SolCall>(&self, call: &C) -> Result<Vec<C::Return>, ChainError> {
        let request = self.token_call(call.abi_encode().into());
        let asked = self.endpoints.trusted().into_iter().map(|endpoint| {
            let call = endpoint.rpc.call(request.clone()).block(BlockId::pending());
            async move { endpoint.call(call.into_future()).await }
        });
        let (mut answers, mut failed) = (Vec::new(), none_reached());
        for asked in futures_util::future::join_all(asked).await {
            match asked {
                Ok(output) => {
                    let answer = C::abi_decode_returns(&output);
                    answers.push(answer.map_err(|e| ChainError::Nonsense(e.to_string()))?);
                }
                Err(error) => failed = error,
            }
        }
        if answers.is_empty() { Err(failed) } else { Ok(answers) }
    }

    /// Whether an authorization was used, or cancelled: the token does not tell the two apart. Every
    /// endpoint is asked, and one that says so is enough: a no ends a payment.
    pub async fn is_nonce_used(&self, from: Wallet, nonce: B256) -> Result<bool, ChainError> {
        let says = self.ask_each(&usdc::authorizationStateCall { authorizer: from.0, nonce }).await?;
        Ok(says.into_iter().any(|is_used| is_used))
    }

    /// Whether it had been by an earlier block. An endpoint that keeps no state that old is taken to
    /// say yes: it has had the time to see the logs.
    pub async fn was_nonce_used_at(&self, from: Wallet, nonce: B256, block: u64) -> Result<bool, ChainError> {
        let call = usdc::authorizationStateCall { authorizer: from.0, nonce };
        match self.read_token_at(&call, block.into()).await {
            Err(ChainError::Refused(_)) => Ok(true),
            used => used,
        }
    }

    /// A relayer's balance of the chain's own coin, in wei.
    pub async fn gas_balance(&self, relayer: Wallet) -> Result<U256, ChainError> {
        self.ask(|rpc| async move { rpc.get_balance(relayer.0).await }).await
    }

    /// How many transactions of a relayer the chain has taken, so far or for good: the lowest that an
    /// endpoint says, since a nonce too high would leave a gap before it. Where an endpoint has no
    /// state that far back, none is known to be taken for good.
    pub async fn taken_nonces(&self, relayer: Wallet, depth: Depth) -> Result<u64, ChainError> {
        let at = match depth {
            Depth::Head => BlockId::latest(),
            Depth::Finalized => BlockId::finalized(),
        };
        let asked = self.endpoints.trusted().into_iter().map(|endpoint| async move {
            let count = endpoint.rpc.get_transaction_count(relayer.0).block_id(at);
            match endpoint.call(count.into_future()).await {
                Err(ChainError::Refused(_)) if depth == Depth::Finalized => Ok(0),
                taken => taken,
            }
        });
        let (mut lowest, mut failed) = (None, none_reached());
        for asked in futures_util::future::join_all(asked).await {
            match asked {
                Ok(taken) => lowest = Some(lowest.map_or(taken, |lowest: u64| lowest.min(taken))),
                Err(error) => failed = error,
            }
        }
        lowest.ok_or(failed)
    }

    /// What to offer for gas now, within the configured cap.
    pub async fn fees(&self) -> Result<Fees, ChainError> {
        let fees = self.ask(|rpc| async move { rpc.estimate_eip1559_fees().await }).await?;
        Ok(self
            .capped(Fees { max_fee: fees.max_fee_per_gas, max_priority_fee: fees.max_priority_fee_per_gas }))
    }

    /// What a replacement must offer: nodes want a tenth more than the transaction it replaces.
    /// `None` if the cap does not allow that.
    pub async fn replacement_fees(&self, replaced: Fees) -> Result<Option<Fees>, ChainError> {
        let now = self.fees().await?;
        let more = |wei: u128| wei.saturating_add(wei / 8).saturating_add(1);
        let fees = self.capped(Fees {
            max_fee: now.max_fee.max(more(replaced.max_fee)),
            max_priority_fee: now.max_priority_fee.max(more(replaced.max_priority_fee)),
        });
        let enough = fees.max_fee >= more(replaced.max_fee)
            && fees.max_priority_fee >= more(replaced.max_priority_fee);
        Ok(enough.then_some(fees))
    }

    fn capped(&self, fees: Fees) -> Fees {
        let max_fee = fees.max_fee.min(self.max_fee_wei);
        Fees { max_fee, max_priority_fee: fees.max_priority_fee.min(max_fee) }
    }

    /// Runs the transfer without sending it, on the pending block: on the latest one, seconds old,
    /// a fresh authorization is not valid yet.
    pub async fn simulate(&self, authorization: &Authorization, signature: &[u8]) -> Result<(), ChainError> {
        let settlement = self.settlement_call(authorization, signature).await?;
        let relayer = self.relayers.first().map(PrivateKeySigner::address).unwrap_or_default();
        let call = TransactionRequest::default()
            .from(relayer)
            .to(settlement.to)
            .input(TransactionInput::new(settlement.input))
            .gas_limit(settlement.gas_limit);
        let pending = BlockId::pending();
        self.ask(|rpc| {
            let call = call.clone();
            async move { rpc.call(call).block(pending).await }
        })
        .await
        .map(drop)
    }

    /// Runs a plain transfer out of the treasury without sending it, on the pending block: whether the token would
    /// carry an authorization of it out, without one that anybody could keep.
    pub async fn simulate_payout(&self, authorization: &Authorization) -> Result<(), ChainError> {
        let Authorization { from, to, value, .. } = authorization;
        let transfer = usdc::transferCall { to: to.0, value: *value };
        let call = self.token_call(transfer.abi_encode().into()).from(from.0);
        self.ask(|rpc| {
            let call = call.clone();
            async move { rpc.call(call).block(BlockId::pending()).await }
        })
        .await
        .map(drop)
    }

    /// Whether there is a key for a relayer: there is none any more for one that was changed.
    pub fn has_key_of(&self, relayer: Wallet) -> bool {
        self.signer(relayer).is_ok()
    }

    fn signer(&self, relayer: Wallet) -> Result<&PrivateKeySigner, ChainError> {
        let signer = self.relayers.iter().find(|signer| signer.address() == relayer.0);
        signer.ok_or(ChainError::UnknownRelayer(relayer))
    }

    pub fn has_treasury_key(&self) -> bool {
        self.treasury.is_some()
    }

    /// Signs an authorization of the treasury's. Nothing is sent.
    pub fn sign_authorization(&self, authorization: &Authorization) -> Result<Vec<u8>, ChainError> {
        let treasury = self.treasury.as_ref().ok_or(ChainError::NoTreasuryKey)?;
        let hash = authorization.signing_hash(&self.domain);
        let signature = treasury.sign_hash_sync(&hash).map_err(|e| ChainError::Nonsense(e.to_string()))?;
        Ok(signature.as_bytes().to_vec())
    }

    /// Signs a call for one account nonce of a relayer of ours. Nothing is sent.
    pub fn sign(
        &self,
        relayer: Wallet,
        call: RelayedCall,
        account_nonce: u64,
        fees: Fees,
    ) -> Result<SignedTx, ChainError> {
        let mut tx = TxEip1559 {
            chain_id: self.chain_id,
            nonce: account_nonce,
            gas_limit: call.gas_limit,
            max_fee_per_gas: fees.max_fee,
            max_priority_fee_per_gas: fees.max_priority_fee,
            to: TxKind::Call(call.to),
            value: U256::ZERO,
            access_list: Default::default(),
            input: call.input,
        };
        let signed = self.signer(relayer)?.sign_transaction_sync(&mut tx);
        let signed = tx.into_signed(signed.map_err(|e| ChainError::Nonsense(e.to_string()))?);
        let envelope = TxEnvelope::from(signed);
        let (hash, raw) = (*envelope.tx_hash(), envelope.encoded_2718().into());
        Ok(SignedTx { relayer, account_nonce, fees, hash, raw })
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

    /// Every transfer of the token to `receiver` in a range of blocks, with its value; but for those of
    /// nothing and those of its own, which bring nothing.
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
        let logs = self.logs(&filter, from_block, to_block).await?;
        let brings_something = |log: &&Log| {
            let from = log.topics().get(1);
            from != Some(&receiver.0.into_word()) && transfer_value(log).is_some_and(|value| !value.is_zero())
        };
        let logs = logs.iter().filter(brings_something);
        Ok(logs.filter_map(|log| Some((found(log)?, transfer_value(log)?))).collect())
    }

    /// Every transfer of the token by `sender` in a range of blocks, with its receiver and value.
    pub async fn transfers_from(
        &self,
        sender: Wallet,
        from_block: u64,
        to_block: u64,
    ) -> Result<Vec<(FoundTransfer, Wallet, U256)>, ChainError> {
        let filter = Filter::new()
            .address(self.asset.0)
            .event_signature(usdc::Transfer::SIGNATURE_HASH)
            .topic1(sender.0.into_word());
        let logs = self.logs(&filter, from_block, to_block).await?;
        let receiver = |log: &Log| usdc::Transfer::decode_log(&log.inner).ok().map(|event| Wallet(event.to));
        Ok(logs.iter().filter_map(|log| Some((found(log)?, receiver(log)?, transfer_value(log)?))).collect())
    }

    /// The nonces of an account's authorizations that were carried out in a range of blocks.
    pub async fn authorizations_used(
        &self,
        authorizer: Wallet,
        from_block: u64,
        to_block: u64,
    ) -> Result<Vec<B256>, ChainError> {
        let filter = Filter::new()
            .address(self.asset.0)
            .event_signature(usdc::AuthorizationUsed::SIGNATURE_HASH)
            .topic1(authorizer.0.into_word());
        let logs = self.logs(&filter, from_block, to_block).await?;
        let nonce = |log: &Log| usdc::AuthorizationUsed::decode_log(&log.inner).ok().map(|event| event.nonce);
        Ok(logs.iter().filter_map(nonce).collect())
    }

    async fn read_token<C: SolCall>(&self, call: &C) -> Result<C::Return, ChainError> {
        self.read_token_at(call, BlockId::latest()).await
    }

    async fn read_token_at<C: SolCall>(&self, call: &C, block: BlockId) -> Result<C::Return, ChainError> {
        let call = self.token_call(call.abi_encode().into());
        let output = self
            .ask(|rpc| {
                let call = call.clone();
                async move { rpc.call(call).block(block).await }
            })
            .await?;
        C::abi_decode_returns(&output).map_err(|e| ChainError::Nonsense(e.to_string()))
    }

    fn token_call(&self, input: Bytes) -> TransactionRequest {
        TransactionRequest::default().to(self.asset.0).input(TransactionInput::new(input))
    }

    async fn ask<'a, T, F>(&'a self, call: impl Fn(&'a RootProvider) -> F) -> Result<T, ChainError>
    where
        F: Future<Output = Result<T, RpcError<TransportErrorKind>>>,
    {
        self.endpoints.ask(call).await
    }
}

fn relayers(keys: &SecretString) -> Result<Vec<PrivateKeySigner>, ChainError> {
    // Where a facilitator settles, there need be none.
    if keys.expose_secret().is_empty() {
        return Ok(Vec::new());
    }
    let parse = |key: &str| key.trim().parse().map_err(|_| ChainError::BadRelayerKey);
    keys.expose_secret().split(',').map(parse).collect()
}

/// The treasury's key, if there is one, which must be `pay_to`'s and nobody else's.
fn treasury(config: &Payments) -> Result<Option<PrivateKeySigner>, ChainError> {
    let Some(key) = &config.treasury_key else { return Ok(None) };
    let key =
        key.expose_secret().trim().parse::<PrivateKeySigner>().map_err(|_| ChainError::BadTreasuryKey)?;
    let (expected, actual) = (config.pay_to, Wallet(key.address()));
    if actual != expected {
        return Err(ChainError::OtherTreasury { expected, actual });
    }
    if relayers(&config.relayer_keys)?.iter().any(|relayer| relayer.address() == actual.0) {
        return Err(ChainError::TreasuryIsRelayer);
    }
    Ok(Some(key))
}

/// The words that geth, reth and anvil answer with when they have a transaction already.
fn is_already_there(why: &str) -> bool {
    let why = why.to_ascii_lowercase();
    ["already known", "already imported", "nonce too low", "already in mempool"]
        .iter()
        .any(|words| why.contains(words))
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
