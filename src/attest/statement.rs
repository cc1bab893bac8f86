//! What is signed, as typed data (EIP-712), and how a signed text is checked.
//!
//! The typed data has the members that matter by name, and the whole text as `contents`: the object's JSON in
//! the order it came, without whitespace and without the members that are not signed. So every byte of it
//! counts, and members that come to it later do not change the types.

use std::borrow::Cow;

use alloy::primitives::{Address, B256, U256};
use alloy::sol_types::{Eip712Domain, SolStruct as _};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::attest::{Signature, X402_RECEIPT_VERSION, X402Receipt};
use crate::chain::recover;
use crate::formats::json::Object;
use crate::id::Wallet;

/// The member that a signature is in.
const SIGNATURE: &str = "signature";
/// The upstream's own words, which need not survive being read and written again: of them the hash is signed.
const REPORTED: &str = "usage_reported";
const REPORTED_HASH: &str = "usage_reported_sha256";
/// Ours are below 4 KiB.
const MAX_BYTES: usize = 1 << 20;

mod typed {
    alloy::sol! {
        struct RequestReceipt {
            string id;
            address wallet;
            string model;
            string provider;
            string outcome;
            uint256 hold_usdc;
            uint256 charged_usdc;
            uint256 cost_pico_usd;
            string prices_version;
            string created_at;
            string ended_at;
            string contents;
        }

        struct PaymentReceipt {
            uint256 id;
            address wallet;
            uint256 amount_usdc;
            string network;
            address asset;
            address pay_to;
            string tx_hash;
            string status;
            string created_at;
            string updated_at;
            string contents;
        }

        struct Reserves {
            uint256 number;
            bytes32 root;
            uint256 wallets;
            uint256 liabilities_usdc;
            uint256 reserves_usdc;
            string network;
            address asset;
            address pay_to;
            uint256 block_number;
            bytes32 block_hash;
            string taken_at;
            string contents;
        }

        /// x402's own (specs/extensions/extension-offer-and-receipt.md, section 5.3).
        struct Receipt {
            uint256 version;
            string network;
            string resourceUrl;
            string payer;
            uint256 issuedAt;
            string transaction;
        }
    }
}

/// What an object is, by its `object` member.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    RequestReceipt,
    PaymentReceipt,
    Reserves,
}

impl Kind {
    const ALL: [Self; 3] = [Self::RequestReceipt, Self::PaymentReceipt, Self::Reserves];

    /// The name of the typed data.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RequestReceipt => "RequestReceipt",
            Self::PaymentReceipt => "PaymentReceipt",
            Self::Reserves => "Reserves",
        }
    }

    /// The `object` member of what is signed so.
    pub fn object(self) -> &'static str {
        match self {
            Self::RequestReceipt => "request",
            Self::PaymentReceipt => "topup",
            Self::Reserves => "reserves",
        }
    }
}

/// A text that can be signed.
pub enum Statement {
    RequestReceipt(typed::RequestReceipt),
    PaymentReceipt(typed::PaymentReceipt),
    Reserves(typed::Reserves),
}

#[derive(Deserialize)]
struct ObjectName {
    object: String,
}

#[derive(Deserialize)]
struct RequestMembers {
    id: String,
    wallet: Address,
    model: String,
    provider: String,
    outcome: String,
    hold_usdc: u64,
    charged_usdc: u64,
    cost_pico_usd: String,
    prices: PricesMembers,
    created_at: String,
    ended_at: String,
}

#[derive(Deserialize)]
struct PricesMembers {
    version: Option<String>,
}

#[derive(Deserialize)]
struct PaymentMembers {
    id: u64,
    wallet: Address,
    amount_usdc: u64,
    network: String,
    asset: Address,
    pay_to: Address,
    tx_hash: Option<String>,
    status: String,
    created_at: String,
    updated_at: String,
}

#[derive(Deserialize)]
struct ReservesMembers {
    number: u64,
    root: B256,
    wallets: u64,
    liabilities_usdc: u64,
    reserves_usdc: u64,
    network: String,
    asset: Address,
    pay_to: Address,
    block_number: u64,
    block_hash: B256,
    taken_at: String,
}

impl Statement {
    pub fn read(contents: &str) -> Result<Self, String> {
        let said = |e: serde_json::Error| e.to_string();
        let name: ObjectName = serde_json::from_str(contents).map_err(said)?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.object() == name.object);
        let kind = kind.ok_or_else(|| format!("there is no signature of the object {:?}", name.object))?;
        let uint = |value: u64| U256::from(value);
        Ok(match kind {
            Kind::RequestReceipt => {
                let read: RequestMembers = serde_json::from_str(contents).map_err(said)?;
                let cost = U256::from_str_radix(&read.cost_pico_usd, 10);
                Self::RequestReceipt(typed::RequestReceipt {
                    id: read.id,
                    wallet: read.wallet,
                    model: read.model,
                    provider: read.provider,
                    outcome: read.outcome,
                    hold_usdc: uint(read.hold_usdc),
                    charged_usdc: uint(read.charged_usdc),
                    cost_pico_usd: cost.map_err(|e| format!("cost_pico_usd: {e}"))?,
                    prices_version: read.prices.version.unwrap_or_default(),
                    created_at: read.created_at,
                    ended_at: read.ended_at,
                    contents: contents.to_owned(),
                })
            }
            Kind::PaymentReceipt => {
                let read: PaymentMembers = serde_json::from_str(contents).map_err(said)?;
                Self::PaymentReceipt(typed::PaymentReceipt {
                    id: uint(read.id),
                    wallet: read.wallet,
                    amount_usdc: uint(read.amount_usdc),
                    network: read.network,
                    asset: read.asset,
                    pay_to: read.pay_to,
                    tx_hash: read.tx_hash.unwrap_or_default(),
                    status: read.status,
                    created_at: read.created_at,
                    updated_at: read.updated_at,
                    contents: contents.to_owned(),
                })
            }
            Kind::Reserves => {
                let read: ReservesMembers = serde_json::from_str(contents).map_err(said)?;
                Self::Reserves(typed::Reserves {
                    number: uint(read.number),
                    root: read.root,
                    wallets: uint(read.wallets),
                    liabilities_usdc: uint(read.liabilities_usdc),
                    reserves_usdc: uint(read.reserves_usdc),
                    network: read.network,
                    asset: read.asset,
                    pay_to: read.pay_to,
                    block_number: uint(read.block_number),
                    block_hash: read.block_hash,
                    taken_at: read.taken_at,
                    contents: contents.to_owned(),
                })
            }
        })
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::RequestReceipt(_) => Kind::RequestReceipt,
            Self::PaymentReceipt(_) => Kind::PaymentReceipt,
            Self::Reserves(_) => Kind::Reserves,
        }
    }

    /// EIP-712, `encode(domainSeparator, hashStruct(message))`.
    pub fn signing_hash(&self, chain_id: u64) -> B256 {
        let domain = domain("Farebox", chain_id);
        match self {
            Self::RequestReceipt(message) => message.eip712_signing_hash(&domain),
            Self::PaymentReceipt(message) => message.eip712_signing_hash(&domain),
            Self::Reserves(message) => message.eip712_signing_hash(&domain),
        }
    }
}

fn domain(name: &'static str, chain_id: u64) -> Eip712Domain {
    Eip712Domain::new(
        Some(Cow::Borrowed(name)),
        Some(Cow::Borrowed("1")),
        Some(U256::from(chain_id)),
        None,
        None,
    )
}

/// The domain's chain is 1 on every network: the network is in the message.
pub fn x402_receipt_hash(receipt: &X402Receipt<'_>) -> B256 {
    let message = typed::Receipt {
        version: U256::from(X402_RECEIPT_VERSION),
        network: receipt.network.to_owned(),
        resourceUrl: receipt.resource_url.to_owned(),
        payer: receipt.payer.to_string(),
        issuedAt: U256::from(u64::try_from(receipt.issued_at.seconds()).unwrap_or_default()),
        transaction: receipt.transaction.to_owned(),
    };
    message.eip712_signing_hash(&domain("x402 receipt", 1))
}

/// A signed text that is as it was signed. Whether the signer is a gateway's the text cannot say itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verified {
    pub kind: Kind,
    /// Of the domain: the gateway's.
    pub chain_id: u64,
    pub signer: Wallet,
    pub contents: String,
}

/// Why a text is not what was signed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    #[error("it is not a signed object of a gateway: {0}")]
    Unreadable(String),
    #[error("usage_reported is not what usage_reported_sha256 says")]
    OtherReport,
    #[error("the signature is of something else, or not by {0}: what it says was changed")]
    OtherText(String),
}

/// Checks a signed object, given as its JSON: as it was answered, or with whitespace that was added.
pub fn verify(text: &str) -> Result<Verified, Refused> {
    let unreadable = |why: &str| Refused::Unreadable(why.to_owned());
    if text.len() > MAX_BYTES {
        return Err(unreadable("it is too large"));
    }
    let compact = without_whitespace(text);
    let mut object = Object::parse(compact.as_bytes()).map_err(|e| Refused::Unreadable(e.to_string()))?;
    // Of a member that is there twice other readers may take the other one.
    if let Some(key) = object.ambiguous_key(&[]) {
        return Err(Refused::Unreadable(format!("{key} is there twice")));
    }
    let signature = object.get(SIGNATURE).ok_or_else(|| unreadable("it has no signature"))?;
    let signature: Signature =
        serde_json::from_str(signature).map_err(|e| Refused::Unreadable(format!("signature: {e}")))?;
    check_report(&object)?;
    object.remove(SIGNATURE);
    object.remove(REPORTED);
    let contents = String::from_utf8(object.to_bytes()).map_err(|_| unreadable("it is not UTF-8"))?;
    let statement = Statement::read(&contents).map_err(Refused::Unreadable)?;
    let signer =
        signer_of(&signature, &statement).ok_or_else(|| Refused::OtherText(signature.signer.clone()))?;
    Ok(Verified { kind: statement.kind(), chain_id: signature.chain_id, signer, contents })
}

fn signer_of(signature: &Signature, statement: &Statement) -> Option<Wallet> {
    let bytes = hex::decode(signature.value.strip_prefix("0x")?).ok()?;
    // One signature has one spelling: lower case, and 27 or 28 at its end.
    let is_plain = !signature.value.bytes().any(|byte| byte.is_ascii_uppercase());
    let is_plain = is_plain && matches!(bytes.last(), Some(27 | 28));
    let signer = recover(statement.signing_hash(signature.chain_id), &bytes).map(Wallet)?;
    let is_said = signature.r#type == statement.kind().as_str() && signature.signer == signer.to_string();
    (is_plain && is_said).then_some(signer)
}

/// Where the upstream's own words are there, they must be those that the hash is of. Without them nothing is
/// lost of what was signed.
fn check_report(object: &Object<'_>) -> Result<(), Refused> {
    let expected = object.get_non_null(REPORTED_HASH).unwrap_or("null");
    let found = match object.get(REPORTED) {
        None => return Ok(()),
        Some("null") => "null".to_owned(),
        Some(reported) => format!("\"{}\"", report_hash(reported)),
    };
    if found == expected { Ok(()) } else { Err(Refused::OtherReport) }
}

/// SHA-256 of what an upstream reported, without whitespace between its parts, hex.
pub fn report_hash(reported: &str) -> String {
    hex::encode(Sha256::digest(without_whitespace(reported)))
}

/// A JSON text without the whitespace between its parts (RFC 8259, section 2).
pub fn without_whitespace(json: &str) -> String {
    let (mut in_string, mut is_escaped) = (false, false);
    let is_kept = |c: &char| {
        let is_space = matches!(c, ' ' | '\t' | '\n' | '\r');
        let kept = in_string || !is_space;
        if is_escaped {
            is_escaped = false;
        } else if *c == '\\' {
            is_escaped = in_string;
        } else if *c == '"' {
            in_string = !in_string;
        }
        kept
    };
    json.chars().filter(is_kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use std::collections::BTreeMap;

    #[test]
    fn whitespace_between_the_parts_is_taken_out() {
        let pretty = "{\n  \"a b\" : [ 1,\t2 ],\r\n \"c\": \"x \\\" y\\\\\" , \"d\": null }\n";
        assert_eq!(without_whitespace(pretty), r#"{"a b":[1,2],"c":"x \" y\\","d":null}"#);
    }

    #[test]
    fn only_what_is_known_can_be_signed() {
        for bad in ["", "[]", "{}", r#"{"object":"model"}"#, r#"{"object":"topup","id":-1}"#] {
            assert!(Statement::read(bad).is_err(), "{bad}");
        }
    }

    /// Whoever checks a signature has the types from there.
    #[test]
    fn the_types_are_those_that_the_documents_publish() {
        let page = include_str!("../../docs/PROOFS.md");
        let (_, rest) = page.split_once("```json fields.json\n").unwrap();
        let published: BTreeMap<String, String> =
            serde_json::from_str(rest.split_once("```").unwrap().0).unwrap();
        let types = [
            typed::RequestReceipt::eip712_root_type(),
            typed::PaymentReceipt::eip712_root_type(),
            typed::Reserves::eip712_root_type(),
        ];
        for (kind, encoded) in Kind::ALL.into_iter().zip(types) {
            let fields = published[kind.as_str()].replace(", ", ",");
            assert_eq!(encoded, format!("{}({fields})", kind.as_str()));
        }
        assert_eq!(published.len(), Kind::ALL.len());
    }

    /// As `hashReceiptTypedData` of x402's package hashes it.
    #[test]
    fn x402s_receipt_is_hashed_as_its_package_does() {
        let receipt = X402Receipt {
            network: "eip155:8453",
            resource_url: "https://api.example.com/premium-data",
            payer: "0x857b06519E91e3A54538791bDbb0E22373e36b66".parse().unwrap(),
            issued_at: Timestamp::from_seconds(1_703_123_456),
            transaction: "",
        };
        assert_eq!(
            format!("{}", x402_receipt_hash(&receipt)),
            "0x060dbcfb87035bac821d6baa07fdab2ec109e6f06deaa00e037c2c1f4fbe6f8b"
        );
    }
}
