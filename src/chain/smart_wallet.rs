//! Wallets that are contracts: their own word counts for a signature (EIP-1271), also before they
//! are deployed (ERC-6492), if the contract that would deploy them is one we allow.
//!
//! The deployment and the call that needs it go through Multicall3 in one piece, so that neither a
//! simulation nor a transaction of ours can do the one without the other.

use alloy::eips::BlockId;
use alloy::primitives::{Address, B256, Bytes, address};
use alloy::providers::Provider as _;
use alloy::rpc::types::{TransactionInput, TransactionRequest};
use alloy::sol_types::{SolCall as _, SolValue as _};

use crate::chain::{Authorization, Chain, ChainError, GAS_LIMIT, RelayedCall};
use crate::id::Wallet;

mod abi {
    alloy::sol! {
        function isValidSignature(bytes32 hash, bytes signature) external view returns (bytes4);

        struct Call3 {
            address target;
            bool allowFailure;
            bytes callData;
        }
        struct Result3 {
            bool success;
            bytes returnData;
        }
        function aggregate3(Call3[] calls) external payable returns (Result3[] returnData);
    }
}

/// At the same address on every chain it is deployed to (mds1/multicall).
const MULTICALL3: Address = address!("cA11bde05977b3631167028862bE2a173976CA11");
/// What `isValidSignature` answers for yes (EIP-1271).
const MAGIC: [u8; 4] = [0x16, 0x26, 0xba, 0x7e];
/// What a signature ends with that brings its wallet's deployment along (ERC-6492).
const WRAPPED: [u8; 32] = [
    0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64,
    0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92, 0x64, 0x92,
];
/// Gas for a wallet's own check in a sign-in; passkey wallets use up to about 350,000.
const CHECK_GAS: u64 = 500_000;
/// Gas where a wallet is deployed on the way.
const DEPLOY_GAS: u64 = 1_500_000;

/// A contract that would deploy a wallet.
pub struct Factory {
    pub address: Address,
    pub is_allowed: bool,
}

/// A signature and the deployment that it needs.
struct Wrapped {
    factory: Address,
    deploy: Bytes,
    signature: Bytes,
}

impl Wrapped {
    fn parse(signature: &[u8]) -> Option<Self> {
        let (head, tail) = signature.split_at_checked(signature.len().checked_sub(WRAPPED.len())?)?;
        if tail != WRAPPED {
            return None;
        }
        let (factory, deploy, signature) = <(Address, Bytes, Bytes)>::abi_decode_params(head).ok()?;
        Some(Self { factory, deploy, signature })
    }
}

impl Chain {
    /// Whether a wallet that is a contract takes `signature` for its own. The answer of one that is
    /// not, and of one whose factory is not allowed, is no.
    pub async fn is_valid_signature(
        &self,
        wallet: Wallet,
        hash: B256,
        signature: &[u8],
    ) -> Result<bool, ChainError> {
        let wrapped = Wrapped::parse(signature);
        let inner = wrapped.as_ref().map_or(signature, |wrapped| wrapped.signature.as_ref());
        let check: Bytes =
            abi::isValidSignatureCall { hash, signature: Bytes::copy_from_slice(inner) }.abi_encode().into();
        if self.has_code(wallet).await? {
            let answer = self.dry_run(wallet.0, check, CHECK_GAS).await?;
            return Ok(answer.is_some_and(|answer| says_yes(&answer)));
        }
        let Some(wrapped) = wrapped.filter(|wrapped| self.allows_factory(wrapped.factory)) else {
            return Ok(false);
        };
        let input = after_deployment(&wrapped, wallet.0, check);
        let Some(answer) = self.dry_run(MULTICALL3, input, DEPLOY_GAS).await? else { return Ok(false) };
        let Ok(results) = abi::aggregate3Call::abi_decode_returns(&answer) else { return Ok(false) };
        Ok(results.last().is_some_and(|result| result.success && says_yes(&result.returnData)))
    }

    /// The call that carries out an authorization; for a wallet that is not deployed yet, its
    /// deployment and the transfer in one.
    pub async fn settlement_call(
        &self,
        authorization: &Authorization,
        signature: &[u8],
    ) -> Result<RelayedCall, ChainError> {
        let transfer = |signature: &[u8]| {
            let input = authorization.transfer_call(signature);
            RelayedCall { to: self.asset.0, input, gas_limit: GAS_LIMIT }
        };
        let Some(wrapped) = Wrapped::parse(signature) else { return Ok(transfer(signature)) };
        // To make a wallet where one is uses up all the gas there is, and none is left for the transfer.
        if self.has_code(authorization.from).await? {
            return Ok(transfer(&wrapped.signature));
        }
        if !self.allows_factory(wrapped.factory) {
            return Err(ChainError::Reverted(format!("the factory {} is not allowed here", wrapped.factory)));
        }
        let input = after_deployment(&wrapped, self.asset.0, transfer(&wrapped.signature).input);
        Ok(RelayedCall { to: MULTICALL3, input, gas_limit: DEPLOY_GAS })
    }

    /// The factory by which a signature would have its wallet deployed.
    pub fn factory_of(&self, signature: &[u8]) -> Option<Factory> {
        let address = Wrapped::parse(signature)?.factory;
        Some(Factory { address, is_allowed: self.allows_factory(address) })
    }

    fn allows_factory(&self, factory: Address) -> bool {
        self.factories.contains(&Wallet(factory))
    }

    /// What a call answers within a bound of gas, which bounds the answer's size too; `None` if it
    /// reverts.
    async fn dry_run(&self, to: Address, input: Bytes, gas: u64) -> Result<Option<Bytes>, ChainError> {
        let call = TransactionRequest::default().to(to).input(TransactionInput::new(input)).gas_limit(gas);
        let answer = self
            .ask(|rpc| {
                let call = call.clone();
                async move { rpc.call(call).block(BlockId::latest()).await }
            })
            .await;
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(ChainError::Reverted(_)) => Ok(None),
            Err(other) => Err(other),
        }
    }
}

/// The factory's call and then another. Where somebody has deployed the wallet meanwhile, the first
/// may fail cheaply, which is all the same.
fn after_deployment(wrapped: &Wrapped, target: Address, call: Bytes) -> Bytes {
    let deploy = abi::Call3 { target: wrapped.factory, allowFailure: true, callData: wrapped.deploy.clone() };
    let then = abi::Call3 { target, allowFailure: false, callData: call };
    abi::aggregate3Call { calls: vec![deploy, then] }.abi_encode().into()
}

/// One word that begins with the magic value.
fn says_yes(answer: &[u8]) -> bool {
    answer.len() == 32 && answer.starts_with(&MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapped_signature_is_taken_apart() {
        let (factory, deploy, inner) =
            (Address::repeat_byte(7), Bytes::from(vec![1, 2]), Bytes::from(vec![3; 65]));
        let head = (factory, deploy.clone(), inner.clone()).abi_encode_params();
        let wrapped = Wrapped::parse(&[head.as_slice(), &WRAPPED].concat()).unwrap();
        assert_eq!((wrapped.factory, wrapped.deploy, wrapped.signature), (factory, deploy, inner));
        assert!(Wrapped::parse(&head).is_none());
        assert!(Wrapped::parse(&WRAPPED).is_none());
        assert!(Wrapped::parse(&[]).is_none());
    }
}
