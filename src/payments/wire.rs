//! x402 on the wire, versions 1 and 2: what we ask for, what we are sent, what we confirm.
//!
//! Sources: the x402 specification (v1 and v2 core, *exact* scheme on EVM, HTTP transport), and what
//! the published clients read and send. Nothing a client says about our terms is believed.

use alloy::primitives::{B256, U256};
use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::chain::Authorization;
use crate::config::Payments;
use crate::money::MicroUsdc;

/// The name of the extension by which a payer names a payment (specs/extensions/payment_identifier.md).
const PAYMENT_IDENTIFIER: &str = "payment-identifier";
/// An identifier's length, as the extension bounds it.
const IDENTIFIER_CHARS: std::ops::RangeInclusive<usize> = 16..=128;
/// Seconds a payer is given to sign and send.
const MAX_TIMEOUT_SECONDS: u64 = 300;
/// A header larger than this is no payment.
const MAX_HEADER_BYTES: usize = 16 << 10;

/// Why a payment is refused, as the reference facilitator spells it. Clients compare these.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    InvalidVersion,
    UnsupportedScheme,
    InvalidNetwork,
    InvalidPayload,
    UnparseableSignature,
    InvalidSignature,
    RecipientMismatch,
    ValueMismatch,
    ValidAfter,
    ValidBefore,
    NonceAlreadyUsed,
    InsufficientBalance,
    SimulationFailed,
    TransactionFailed,
    SettlementPending,
}

impl Reason {
    pub fn code(self) -> &'static str {
        match self {
            Self::InvalidVersion => "invalid_x402_version",
            Self::UnsupportedScheme => "unsupported_scheme",
            Self::InvalidNetwork => "invalid_network",
            Self::InvalidPayload => "invalid_payload",
            Self::UnparseableSignature => "invalid_exact_evm_failed_to_parse_signature",
            Self::InvalidSignature => "invalid_exact_evm_signature",
            Self::RecipientMismatch => "invalid_exact_evm_recipient_mismatch",
            Self::ValueMismatch => "invalid_exact_evm_payload_authorization_value_mismatch",
            Self::ValidAfter => "invalid_exact_evm_payload_authorization_valid_after",
            Self::ValidBefore => "invalid_exact_evm_payload_authorization_valid_before",
            Self::NonceAlreadyUsed => "invalid_exact_evm_nonce_already_used",
            Self::InsufficientBalance => "invalid_exact_evm_insufficient_balance",
            Self::SimulationFailed => "invalid_exact_evm_transaction_simulation_failed",
            Self::TransactionFailed => "invalid_exact_evm_transaction_failed",
            Self::SettlementPending => "settlement_pending",
        }
    }
}

/// What is asked for: an amount for a resource.
#[derive(Clone, Debug)]
pub struct Requirement {
    pub amount: MicroUsdc,
    /// Absolute URL of what is paid for.
    pub resource: String,
    pub description: &'static str,
    /// x402's extensions that the version 2 terms declare.
    pub extensions: Option<Value>,
}

impl Requirement {
    /// A strict v2 `PaymentRequired`, for the `PAYMENT-REQUIRED` header.
    pub fn v2(&self, payments: &Payments, error: &str) -> Value {
        let mut terms = json!({
            "x402Version": 2,
            "error": error,
            "resource": self.resource_v2(),
            "accepts": [{
                "scheme": SCHEME,
                "network": payments.network(),
                "amount": self.amount.to_string(),
                "asset": payments.token.address.to_string(),
                "payTo": payments.pay_to.to_string(),
                "maxTimeoutSeconds": MAX_TIMEOUT_SECONDS,
                "extra": extra(payments),
            }],
        });
        if let Some(extensions) = &self.extensions {
            terms["extensions"] = extensions.clone();
        }
        terms
    }

    /// The 402 body: the same terms, with the names that older clients look for beside the new ones.
    pub fn body(&self, payments: &Payments, error: &str) -> Value {
        let mut body = Self { extensions: None, ..self.clone() }.v2(payments, error);
        body["accepts"][0]["maxAmountRequired"] = self.amount.to_string().into();
        body["accepts"][0]["extra"]["decimals"] = 6.into();
        body
    }

    /// A strict v1 body: one foreign entry would make the whole list unreadable to v1 clients.
    pub fn v1(&self, payments: &Payments, error: &str) -> Value {
        json!({
            "x402Version": 1,
            "error": error,
            "accepts": [{
                "scheme": SCHEME,
                "network": v1_network(payments),
                "maxAmountRequired": self.amount.to_string(),
                "resource": self.resource,
                "description": self.description,
                "mimeType": MIME_TYPE,
                "payTo": payments.pay_to.to_string(),
                "maxTimeoutSeconds": MAX_TIMEOUT_SECONDS,
                "asset": payments.token.address.to_string(),
                "extra": extra(payments),
            }],
        })
    }

    fn resource_v2(&self) -> Value {
        json!({"url": self.resource, "description": self.description, "mimeType": MIME_TYPE})
    }
}

pub(super) const SCHEME: &str = "exact";
const MIME_TYPE: &str = "application/json";

fn extra(payments: &Payments) -> Value {
    json!({"name": payments.token.name, "version": payments.token.version})
}

/// The network as v1 spells it; where v1 has no name for it, as v2 does.
pub(super) fn v1_network(payments: &Payments) -> String {
    match payments.chain_id {
        8453 => "base".into(),
        84532 => "base-sepolia".into(),
        _ => payments.network(),
    }
}

/// What a 402 holds at `extensions["payment-identifier"]`: a payer may name its payment, and need not.
pub fn payment_identifier_extension() -> (&'static str, Value) {
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "required": {"type": "boolean"},
            "id": {
                "type": "string",
                "minLength": IDENTIFIER_CHARS.start(),
                "maxLength": IDENTIFIER_CHARS.end(),
                "pattern": "^[a-zA-Z0-9_-]+$",
            },
        },
        "required": ["required"],
    });
    (PAYMENT_IDENTIFIER, json!({"info": {"required": false}, "schema": schema}))
}

/// A request to one of our paths and its answer, for discovery.
pub struct Example {
    pub body: Value,
    /// `json` or `form-data`.
    pub body_type: &'static str,
    /// The JSON Schema of such bodies.
    pub schema: Value,
    pub answer: Value,
}

/// What a 402 holds at `extensions["bazaar"]`: how to call the path (specs/extensions/bazaar.md).
pub fn bazaar_extension(example: &Example) -> (&'static str, Value) {
    let info = json!({
        "input": {"type": "http", "method": "POST", "bodyType": example.body_type, "body": example.body},
        "output": {"type": "json", "example": example.answer},
    });
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "input": {
                "type": "object",
                "properties": {
                    "type": {"const": "http"},
                    "method": {"const": "POST"},
                    "bodyType": {"const": example.body_type},
                    "body": example.schema,
                },
                "required": ["type", "method", "bodyType", "body"],
                "additionalProperties": false,
            },
            "output": {"type": "object"},
        },
        "required": ["input"],
    });
    ("bazaar", json!({"info": info, "schema": schema}))
}

/// A receipt for the `PAYMENT-RESPONSE` and `X-PAYMENT-RESPONSE` headers.
pub struct SettlementResponse<'a> {
    /// Or the code of what was wrong.
    pub outcome: Result<(), &'a str>,
    pub tx_hash: &'a str,
    pub payer: String,
    pub amount: MicroUsdc,
    /// x402's extensions to it, by their names.
    pub extensions: Option<Value>,
}

impl SettlementResponse<'_> {
    pub fn v2(&self, payments: &Payments) -> Value {
        self.render(payments.network())
    }

    pub fn v1(&self, payments: &Payments) -> Value {
        self.render(v1_network(payments))
    }

    fn render(&self, network: String) -> Value {
        let mut receipt = json!({
            "success": self.outcome.is_ok(),
            "transaction": self.tx_hash,
            "network": network,
            "payer": self.payer,
            "amount": self.amount.to_string(),
        });
        if let Err(reason) = self.outcome {
            receipt["errorReason"] = reason.into();
        }
        if let Some(extensions) = &self.extensions {
            receipt["extensions"] = extensions.clone();
        }
        receipt
    }
}

/// What a settlement's answer holds at `extensions["offer-receipt"]`: the receipt that a gateway has signed
/// (specs/extensions/extension-offer-and-receipt.md).
pub fn offer_receipt_extension(receipt: &Value) -> (&'static str, Value) {
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"receipt": {
            "type": "object",
            "properties": {
                "format": {"type": "string"},
                "payload": {"type": "object"},
                "signature": {"type": "string"},
            },
            "required": ["format", "signature"],
        }},
        "required": ["receipt"],
    });
    ("offer-receipt", json!({"info": {"receipt": receipt}, "schema": schema}))
}

/// A JSON value as x402's headers carry it: standard base64, padded.
pub fn encode_header(value: &Value) -> String {
    BASE64_STANDARD.encode(value.to_string())
}

/// A payment as a client sent it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Payload {
    pub version: i64,
    pub scheme: String,
    pub network: String,
    pub authorization: Authorization,
    pub signature: Vec<u8>,
    /// The payer's own name for the payment: another under it is the same payment again.
    pub identifier: Option<String>,
}

/// Why a header cannot be read as a payment at all.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unparseable {
    #[error("the payment header is larger than {MAX_HEADER_BYTES} bytes")]
    TooLarge,
    #[error("the payment header is not base64")]
    NotBase64,
    #[error("the payment header does not hold an x402 payment: {0}")]
    NotAPayment(String),
}

#[derive(Deserialize)]
struct Envelope {
    #[serde(rename = "x402Version")]
    version: i64,
    // v1 names scheme and network here, v2 in the requirement that the client chose.
    scheme: Option<String>,
    network: Option<String>,
    accepted: Option<Accepted>,
    payload: Value,
    extensions: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
struct Accepted {
    scheme: Option<String>,
    network: Option<String>,
}

#[derive(Deserialize)]
struct ExactPayload {
    signature: String,
    authorization: WireAuthorization,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireAuthorization {
    from: String,
    to: String,
    value: Number,
    valid_after: Number,
    valid_before: Number,
    nonce: String,
}

/// A decimal string, as specified, or a JSON number, as some clients send.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Text(String),
    Integer(u64),
}

impl Number {
    fn read(&self, name: &str) -> Result<U256, Unparseable> {
        match self {
            Self::Integer(n) => Ok(U256::from(*n)),
            Self::Text(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
                U256::from_str_radix(text, 10).map_err(|_| not_a_payment(format!("{name} is too large")))
            }
            Self::Text(_) => Err(not_a_payment(format!("{name} is not a decimal number"))),
        }
    }
}

fn not_a_payment(why: impl Into<String>) -> Unparseable {
    Unparseable::NotAPayment(why.into())
}

impl Payload {
    /// Reads the value of `X-Payment` or `Payment-Signature`: either envelope version in either,
    /// standard or URL-safe base64, padded or not.
    pub fn parse(header: &[u8]) -> Result<Self, Unparseable> {
        if header.len() > MAX_HEADER_BYTES {
            return Err(Unparseable::TooLarge);
        }
        let json = decode_base64(header.trim_ascii()).ok_or(Unparseable::NotBase64)?;
        let envelope: Envelope = serde_json::from_slice(&json).map_err(|e| not_a_payment(e.to_string()))?;
        let exact: ExactPayload =
            serde_json::from_value(envelope.payload).map_err(|e| not_a_payment(format!("payload: {e}")))?;
        let (scheme, network) = match envelope.accepted {
            Some(accepted) => (accepted.scheme.or(envelope.scheme), accepted.network.or(envelope.network)),
            None => (envelope.scheme, envelope.network),
        };
        let wire = exact.authorization;
        let address = |name: &str, text: &str| {
            text.parse().map_err(|_| not_a_payment(format!("authorization.{name} is not an address")))
        };
        let identifier = envelope.extensions.as_ref().and_then(|named| named.get(PAYMENT_IDENTIFIER));
        Ok(Self {
            identifier: identifier.map(identifier_of).transpose()?.flatten(),
            version: envelope.version,
            scheme: scheme.ok_or_else(|| not_a_payment("scheme is missing"))?,
            network: network.ok_or_else(|| not_a_payment("network is missing"))?,
            authorization: Authorization {
                from: address("from", &wire.from)?,
                to: address("to", &wire.to)?,
                value: wire.value.read("authorization.value")?,
                valid_after: wire.valid_after.read("authorization.validAfter")?,
                valid_before: wire.valid_before.read("authorization.validBefore")?,
                nonce: nonce(&wire.nonce)?,
            },
            signature: decode_hex(&exact.signature)
                .ok_or_else(|| not_a_payment("signature is not hex beginning with 0x"))?,
        })
    }

    /// What is authorised, where the books can hold it.
    pub fn value(&self) -> Option<MicroUsdc> {
        crate::chain::micro(self.authorization.value)
    }

    /// Whether version, scheme and network are ones that we offer. The network is taken in either
    /// version's spelling.
    pub fn check_offered(&self, payments: &Payments) -> Result<(), Reason> {
        if !matches!(self.version, 1 | 2) {
            return Err(Reason::InvalidVersion);
        }
        if self.scheme != SCHEME {
            return Err(Reason::UnsupportedScheme);
        }
        if self.network != payments.network() && self.network != v1_network(payments) {
            return Err(Reason::InvalidNetwork);
        }
        Ok(())
    }
}

/// The `id` of a payment-identifier extension: a client that names none sends back what was declared.
fn identifier_of(extension: &Value) -> Result<Option<String>, Unparseable> {
    let is_named = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    match extension.pointer("/info/id") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) if IDENTIFIER_CHARS.contains(&id.len()) && id.bytes().all(is_named) => {
            Ok(Some(id.clone()))
        }
        Some(_) => Err(not_a_payment(
            "the id of payment-identifier must be 16 to 128 letters, digits, hyphens or underscores",
        )),
    }
}

fn nonce(text: &str) -> Result<B256, Unparseable> {
    let bytes = decode_hex(text).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    bytes.map(B256::from).ok_or_else(|| not_a_payment("authorization.nonce is not 32 bytes of hex"))
}

fn decode_hex(text: &str) -> Option<Vec<u8>> {
    hex::decode(text.strip_prefix("0x")?).ok()
}

fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    let lenient = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    [alphabet::STANDARD, alphabet::URL_SAFE]
        .iter()
        .find_map(|alphabet| GeneralPurpose::new(alphabet, lenient).decode(text).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD};

    fn exact() -> Value {
        json!({
            "signature": format!("0x{}", "ab".repeat(65)),
            "authorization": {
                "from": "0x857b06519E91e3A54538791bDbb0E22373e36b66",
                "to": "0x209693Bc6afc0C5328bA36FaF03C514EF312287C",
                "value": "5000000", "validAfter": "0", "validBefore": "1740672154",
                "nonce": format!("0x{}", "f3".repeat(32)),
            },
        })
    }

    #[test]
    fn both_envelopes_in_every_base64() {
        let v1 = json!({"x402Version": 1, "scheme": "exact", "network": "base", "payload": exact()});
        let v2 = json!({"x402Version": 2, "accepted": {"scheme": "exact", "network": "eip155:8453"}, "payload": exact()});
        for (envelope, network) in [(v1, "base"), (v2, "eip155:8453")] {
            let text = envelope.to_string();
            for header in [
                BASE64_STANDARD.encode(&text),
                BASE64_STANDARD_NO_PAD.encode(&text),
                BASE64_URL_SAFE.encode(&text),
                BASE64_URL_SAFE_NO_PAD.encode(&text),
            ] {
                let payload = Payload::parse(header.as_bytes()).unwrap();
                assert_eq!(payload.network, network);
                assert_eq!(payload.authorization.value, U256::from(5_000_000));
            }
        }
    }

    #[test]
    fn what_is_no_payment_says_why() {
        let parse = |value: Value| Payload::parse(encode_header(&value).as_bytes());
        let with = |pointer: &str, new: Value| {
            let mut v = json!({"x402Version": 1, "scheme": "exact", "network": "base", "payload": exact()});
            *v.pointer_mut(pointer).unwrap() = new;
            v
        };
        assert_eq!(Payload::parse(b"%%%"), Err(Unparseable::NotBase64));
        assert_eq!(Payload::parse(&[b'a'; MAX_HEADER_BYTES + 1]), Err(Unparseable::TooLarge));
        for value in [
            json!({}),
            json!([]),
            with("/payload", json!({})),
            with("/scheme", json!(null)),
            with("/payload/authorization/value", json!("5.0")),
            with("/payload/authorization/value", json!(-5)),
            with("/payload/authorization/value", json!("9".repeat(90))),
            with("/payload/authorization/nonce", json!("0x12")),
            with("/payload/authorization/from", json!("0x12")),
            with("/payload/signature", json!("zz")),
        ] {
            assert!(matches!(parse(value.clone()), Err(Unparseable::NotAPayment(_))), "{value}");
        }
    }
}
