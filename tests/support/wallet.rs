//! A wallet: signs in (EIP-4361) and pays (EIP-3009), rightly or wrongly as a test likes.

use std::borrow::Cow;

use alloy::primitives::{Address, B256, U256, eip191_hash_message};
use alloy::signers::SignerSync as _;
use alloy::signers::local::PrivateKeySigner;
use alloy::sol_types::{Eip712Domain, SolStruct as _};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use farebox::id::Entropy;
use serde_json::{Value, json};

use super::chain::{CHAIN_ID, USDC};
use super::{in_seconds, random_hex, unix_seconds};

alloy::sol! {
    /// EIP-3009.
    struct TransferWithAuthorization {
        address from;
        address to;
        uint256 value;
        uint256 validAfter;
        uint256 validBefore;
        bytes32 nonce;
    }
}

#[derive(Clone)]
pub struct TestWallet {
    signer: PrivateKeySigner,
}

impl TestWallet {
    pub fn random() -> Self {
        Self { signer: PrivateKeySigner::from_bytes(&Entropy.bytes().into()).unwrap() }
    }

    pub fn address(&self) -> Address {
        self.signer.address()
    }

    /// The address as answers show it, EIP-55 checksummed.
    pub fn shown(&self) -> String {
        self.address().to_string()
    }

    pub fn private_key(&self) -> String {
        format!("{:#x}", self.signer.to_bytes())
    }

    /// Signs a text as wallets do (EIP-191).
    pub fn sign_text(&self, text: &str) -> String {
        format!("0x{}", hex::encode(self.signer.sign_message_sync(text.as_bytes()).unwrap().as_bytes()))
    }

    pub fn sign_hash(&self, hash: B256) -> Vec<u8> {
        self.signer.sign_hash_sync(&hash).unwrap().as_bytes().to_vec()
    }

    /// A message that signs this wallet in at `host:port`, to be changed and then signed.
    pub fn siwe(&self, host: &str) -> Siwe {
        Siwe {
            domain: host.to_owned(),
            address: self.shown(),
            uri: format!("http://{host}/"),
            version: "1".into(),
            chain_id: CHAIN_ID.to_string(),
            nonce: random_hex::<8>(),
            issued_at: in_seconds(0),
            expiration_time: None,
            not_before: None,
            wallet: self.clone(),
        }
    }

    /// An authorization of this wallet's USDC for `to`, to be changed and then signed.
    pub fn authorization(&self, to: Address, value_micro: u64) -> Authorization {
        Authorization {
            from: self.address(),
            to,
            value: value_micro.to_string(),
            valid_after: "0".into(),
            // anvil's clock runs ahead of ours when it mines often.
            valid_before: (unix_seconds() + 3600).to_string(),
            nonce: B256::from(Entropy.bytes::<32>()),
            domain_name: "USD Coin".into(),
            domain_version: "2".into(),
            wallet: self.clone(),
        }
    }
}

/// An EIP-4361 message in parts.
#[derive(Clone)]
pub struct Siwe {
    pub domain: String,
    pub address: String,
    pub uri: String,
    pub version: String,
    pub chain_id: String,
    pub nonce: String,
    pub issued_at: String,
    pub expiration_time: Option<String>,
    pub not_before: Option<String>,
    wallet: TestWallet,
}

impl Siwe {
    pub fn text(&self) -> String {
        let Self { domain, address, uri, version, chain_id, nonce, issued_at, .. } = self;
        let mut text = format!(
            "{domain} wants you to sign in with your Ethereum account:\n{address}\n\nSign in to Farebox.\n\n\
             URI: {uri}\nVersion: {version}\nChain ID: {chain_id}\nNonce: {nonce}\nIssued At: {issued_at}"
        );
        if let Some(at) = &self.expiration_time {
            text += &format!("\nExpiration Time: {at}");
        }
        if let Some(at) = &self.not_before {
            text += &format!("\nNot Before: {at}");
        }
        text
    }

    pub fn sign(&self) -> SignedIn {
        self.sign_with(|hash| self.wallet.sign_hash(hash))
    }

    /// Signed by other means than the wallet's key, over the hash of the text (EIP-191).
    pub fn sign_with(&self, sign: impl FnOnce(B256) -> Vec<u8>) -> SignedIn {
        let message = self.text();
        let signature = format!("0x{}", hex::encode(sign(eip191_hash_message(&message))));
        SignedIn { message, signature }
    }
}

/// A message and its signature.
#[derive(Clone, Debug)]
pub struct SignedIn {
    pub message: String,
    pub signature: String,
}

impl SignedIn {
    pub fn body(&self) -> Value {
        json!({"message": self.message, "signature": self.signature})
    }

    /// As it travels in a URL, with the leading `?`.
    pub fn query(&self) -> String {
        format!("?message={}&signature={}", percent_encoded(&self.message), self.signature)
    }
}

fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

/// An EIP-3009 authorization in parts, as x402 carries them.
#[derive(Clone)]
pub struct Authorization {
    pub from: Address,
    pub to: Address,
    pub value: String,
    pub valid_after: String,
    pub valid_before: String,
    pub nonce: B256,
    pub domain_name: String,
    pub domain_version: String,
    wallet: TestWallet,
}

impl Authorization {
    /// What the payer signs: the hash of the typed data (EIP-712).
    pub fn hash(&self) -> B256 {
        let number = |text: &str| U256::from_str_radix(text, 10).unwrap_or_default();
        let domain = Eip712Domain::new(
            Some(Cow::Owned(self.domain_name.clone())),
            Some(Cow::Owned(self.domain_version.clone())),
            Some(U256::from(CHAIN_ID)),
            Some(USDC),
            None,
        );
        let message = TransferWithAuthorization {
            from: self.from,
            to: self.to,
            value: number(&self.value),
            validAfter: number(&self.valid_after),
            validBefore: number(&self.valid_before),
            nonce: self.nonce,
        };
        message.eip712_signing_hash(&domain)
    }

    pub fn signature(&self) -> Vec<u8> {
        self.wallet.sign_hash(self.hash())
    }

    pub fn sign(&self) -> SignedPayment {
        self.with_signature(&self.signature())
    }

    pub fn with_signature(&self, signature: &[u8]) -> SignedPayment {
        SignedPayment {
            payload: json!({
                "signature": format!("0x{}", hex::encode(signature)),
                "authorization": {
                    "from": self.from.to_string(),
                    "to": self.to.to_string(),
                    "value": self.value,
                    "validAfter": self.valid_after,
                    "validBefore": self.valid_before,
                    "nonce": self.nonce.to_string(),
                },
            }),
        }
    }
}

/// A signed payment, to be put into either envelope.
#[derive(Clone)]
pub struct SignedPayment {
    pub payload: Value,
}

impl SignedPayment {
    /// The v1 envelope.
    pub fn v1(&self) -> Value {
        json!({"x402Version": 1, "scheme": "exact", "network": "base", "payload": self.payload})
    }

    /// The v2 envelope, as the published clients fill it.
    pub fn v2(&self) -> Value {
        let authorization = &self.payload["authorization"];
        json!({
            "x402Version": 2,
            "accepted": {
                "scheme": "exact",
                "network": "eip155:8453",
                "amount": authorization["value"],
                "asset": USDC.to_string(),
                "payTo": authorization["to"],
                "maxTimeoutSeconds": 300,
                "extra": {"name": "USD Coin", "version": "2"},
            },
            "payload": self.payload,
        })
    }

    /// The v2 envelope with the payer's name for the payment (payment-identifier).
    pub fn named_header(&self, id: &str) -> String {
        let mut envelope = self.v2();
        envelope["extensions"] = json!({"payment-identifier": {"info": {"required": false, "id": id}}});
        header(&envelope)
    }

    pub fn v1_header(&self) -> String {
        header(&self.v1())
    }

    pub fn v2_header(&self) -> String {
        header(&self.v2())
    }
}

/// A value as x402's headers carry it.
pub fn header(value: &Value) -> String {
    BASE64_STANDARD.encode(value.to_string())
}
