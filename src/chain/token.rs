//! USDC's own interface: the calls, the events, and the EIP-712 domain that payments are signed in.

use std::borrow::Cow;

use alloy::primitives::{B256, Bytes, U256};
use alloy::sol_types::{Eip712Domain, SolCall as _, SolStruct as _};

use crate::config::Token;
use crate::id::Wallet;

/// The parts of Circle's FiatTokenV2_2 that are used here.
pub mod usdc {
    alloy::sol! {
        function DOMAIN_SEPARATOR() external view returns (bytes32);
        function balanceOf(address account) external view returns (uint256);
        function authorizationState(address authorizer, bytes32 nonce) external view returns (bool);
        function transfer(address to, uint256 value) external returns (bool);
        function transferWithAuthorization(
            address from, address to, uint256 value, uint256 validAfter, uint256 validBefore,
            bytes32 nonce, bytes signature
        ) external;

        event AuthorizationUsed(address indexed authorizer, bytes32 indexed nonce);
        event AuthorizationCanceled(address indexed authorizer, bytes32 indexed nonce);
        event Transfer(address indexed from, address indexed to, uint256 value);

        /// What a payer signs (EIP-3009).
        struct TransferWithAuthorization {
            address from;
            address to;
            uint256 value;
            uint256 validAfter;
            uint256 validBefore;
            bytes32 nonce;
        }
    }
}

/// A signed permission to move tokens (EIP-3009, `transferWithAuthorization`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Authorization {
    pub from: Wallet,
    pub to: Wallet,
    pub value: U256,
    /// Unix seconds; the token takes it strictly after …
    pub valid_after: U256,
    /// … and strictly before.
    pub valid_before: U256,
    pub nonce: B256,
}

impl Authorization {
    /// The hash that the payer signed (EIP-712).
    pub fn signing_hash(&self, domain: &TokenDomain) -> B256 {
        let message = usdc::TransferWithAuthorization {
            from: self.from.0,
            to: self.to.0,
            value: self.value,
            validAfter: self.valid_after,
            validBefore: self.valid_before,
            nonce: self.nonce,
        };
        message.eip712_signing_hash(&domain.0)
    }

    /// The token call that carries it out. USDC's variant with `bytes` takes every kind of
    /// signature: a key's, or a contract wallet's.
    pub fn transfer_call(&self, signature: &[u8]) -> Bytes {
        let call = usdc::transferWithAuthorizationCall {
            from: self.from.0,
            to: self.to.0,
            value: self.value,
            validAfter: self.valid_after,
            validBefore: self.valid_before,
            nonce: self.nonce,
            signature: with_v_27(signature).into(),
        };
        call.abi_encode().into()
    }
}

/// A key's signature with the `v` that the token insists on; any other is left as it is.
pub fn with_v_27(signature: &[u8]) -> Vec<u8> {
    let mut signature = signature.to_vec();
    if signature.len() == 65
        && let Some(v @ (0 | 1)) = signature.last_mut()
    {
        *v += 27;
    }
    signature
}

/// The EIP-712 domain of the token.
#[derive(Clone, Debug)]
pub struct TokenDomain(Eip712Domain);

impl TokenDomain {
    pub fn new(token: &Token, chain_id: u64) -> Self {
        Self(Eip712Domain::new(
            Some(Cow::Owned(token.name.clone())),
            Some(Cow::Owned(token.version.clone())),
            Some(U256::from(chain_id)),
            Some(token.address.0),
            None,
        ))
    }

    pub fn separator(&self) -> B256 {
        self.0.separator()
    }

    pub fn name(&self) -> &str {
        self.0.name.as_deref().unwrap_or_default()
    }

    pub fn version(&self) -> &str {
        self.0.version.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloy::primitives::b256;

    #[test]
    fn the_domain_is_bases() {
        let token = Token {
            address: "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913".parse().unwrap(),
            name: "USD Coin".into(),
            version: "2".into(),
        };
        assert_eq!(
            TokenDomain::new(&token, 8453).separator(),
            b256!("02fa7265e7c5d81118673727957699e4d68f74cd74b7db77da710fe8a2c7834f")
        );
    }

    #[test]
    fn v_is_what_the_token_takes() {
        let with_v = |v: u8| [vec![1; 64], vec![v]].concat();
        assert_eq!(with_v_27(&with_v(0)), with_v(27));
        assert_eq!(with_v_27(&with_v(1)), with_v(28));
        assert_eq!(with_v_27(&with_v(28)), with_v(28));
        assert_eq!(with_v_27(&[0, 1]), [0, 1]);
    }
}
