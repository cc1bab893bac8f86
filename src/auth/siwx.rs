//! Sign-In-With-X, x402's `sign-in-with-x` extension (specs/extensions/sign-in-with-x.md): a 402 declares
//! a challenge, and the header `SIGN-IN-WITH-X` brings it back, field by field, with a signature.
//!
//! On EVM chains what is signed is an EIP-4361 message. It is put together again from the fields, and is
//! then verified like any other; the fields themselves prove nothing and are not looked at again.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth::{Nonce, Purpose, Siwe, SiweError};
use crate::config;
use crate::id::Wallet;

/// The extension's name in `extensions`, and the header's.
pub const NAME: &str = "sign-in-with-x";
/// A header larger than this is no sign-in.
const MAX_HEADER_BYTES: usize = 16 << 10;
const STATEMENT: &str = "Sign in to Farebox to pay with this wallet's balance.";

#[derive(Debug, thiserror::Error)]
pub enum SiwxError {
    #[error("SIGN-IN-WITH-X must be base64 of the JSON that x402's sign-in-with-x specifies: {0}")]
    Malformed(String),
    #[error("{0} does not sign in here: use a chain of `supportedChains`, with the type `eip191`")]
    UnsupportedChain(String),
    #[error(transparent)]
    Siwe(#[from] SiweError),
}

/// What a 402 holds at `extensions["sign-in-with-x"]`: how to sign in for `resource`, an absolute URL.
pub fn extension(config: &config::Auth, resource: &str, nonce: &Nonce) -> Value {
    let chains = config.chain_ids.iter();
    json!({
        "info": {
            // A client signs only for the very host it has called.
            "domain": config.public_domains.first(),
            "uri": resource,
            "version": "1",
            "statement": STATEMENT,
            "nonce": nonce.text,
            "issuedAt": nonce.issued_at.rfc3339(),
            "expirationTime": nonce.expires_at.rfc3339(),
            "resources": [resource],
        },
        // Contract wallets (EIP-1271, ERC-6492) sign under this type too.
        "supportedChains":
            chains.map(|id| json!({"chainId": format!("eip155:{id}"), "type": "eip191"})).collect::<Vec<_>>(),
        "schema": schema(),
    })
}

/// The JSON Schema of the header's content, as the specification has it.
fn schema() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "domain": {"type": "string"},
            "address": {"type": "string"},
            "statement": {"type": "string"},
            "uri": {"type": "string", "format": "uri"},
            "version": {"type": "string"},
            "chainId": {"type": "string"},
            "type": {"type": "string"},
            "nonce": {"type": "string"},
            "issuedAt": {"type": "string", "format": "date-time"},
            "expirationTime": {"type": "string", "format": "date-time"},
            "notBefore": {"type": "string", "format": "date-time"},
            "requestId": {"type": "string"},
            "resources": {"type": "array", "items": {"type": "string", "format": "uri"}},
            "signature": {"type": "string"},
        },
        "required":
            ["domain", "address", "uri", "version", "chainId", "type", "nonce", "issuedAt", "signature"],
    })
}

/// Verifies the header's value, and uses its nonce up as far as `purpose` does.
pub async fn verify(siwe: &Siwe, header: &[u8], purpose: Purpose) -> Result<Wallet, SiwxError> {
    let proof = Proof::parse(header)?;
    let message = proof.message()?;
    Ok(siwe.verify_challenge(&message, &proof.signature, purpose).await?)
}

/// What the header holds. `signatureScheme` is only a hint, and is not read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Proof {
    domain: String,
    address: String,
    statement: Option<String>,
    uri: String,
    version: String,
    chain_id: String,
    r#type: String,
    nonce: String,
    issued_at: String,
    expiration_time: Option<String>,
    not_before: Option<String>,
    request_id: Option<String>,
    #[serde(default)]
    resources: Option<Vec<String>>,
    signature: String,
}

impl Proof {
    /// Base64, standard or URL-safe, padded or not.
    fn parse(header: &[u8]) -> Result<Self, SiwxError> {
        let malformed = |why: &str| SiwxError::Malformed(why.to_owned());
        if header.len() > MAX_HEADER_BYTES {
            return Err(malformed("it is too large"));
        }
        let standard = |byte: &u8| match byte {
            b'-' => b'+',
            b'_' => b'/',
            other => *other,
        };
        let text: Vec<u8> = header.trim_ascii().iter().map(standard).collect();
        let text = text.strip_suffix(b"==").or(text.strip_suffix(b"=")).unwrap_or(&text);
        let json = BASE64_STANDARD_NO_PAD.decode(text).map_err(|_| malformed("it is not base64"))?;
        serde_json::from_slice(&json).map_err(|e| SiwxError::Malformed(e.to_string()))
    }

    /// The EIP-4361 message that the fields stand for, as the published clients write it.
    fn message(&self) -> Result<String, SiwxError> {
        let chain = self.chain_id.strip_prefix("eip155:").filter(|id| id.parse::<u64>().is_ok());
        let (Some(chain), "eip191" | "eip1271" | "eip6492") = (chain, self.r#type.as_str()) else {
            let shown = format!("{} with the type {}", self.chain_id, self.r#type);
            return Err(SiwxError::UnsupportedChain(shown.chars().take(100).collect()));
        };
        let Self { domain, address, uri, version, nonce, issued_at, .. } = self;
        let mut text = format!("{domain} wants you to sign in with your Ethereum account:\n{address}\n\n");
        if let Some(statement) = &self.statement {
            text += statement;
            text.push('\n');
        }
        let _ = write!(
            text,
            "\nURI: {uri}\nVersion: {version}\nChain ID: {chain}\nNonce: {nonce}\nIssued At: {issued_at}"
        );
        for (name, value) in [
            ("Expiration Time", &self.expiration_time),
            ("Not Before", &self.not_before),
            ("Request ID", &self.request_id),
        ] {
            if let Some(value) = value {
                let _ = write!(text, "\n{name}: {value}");
            }
        }
        if let Some(resources) = &self.resources {
            text += "\nResources:";
            for resource in resources {
                let _ = write!(text, "\n- {resource}");
            }
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD};

    use super::*;
    use crate::clock::Timestamp;

    fn auth() -> config::Auth {
        config::Auth {
            siwe_domains: vec!["app.example.com".into()],
            public_domains: vec!["api.example.com".into()],
            chain_ids: vec![8453, 1],
            session_minutes: 60,
            require_server_nonce: false,
            session_secret: None,
        }
    }

    fn proof() -> Value {
        json!({
            "domain": "api.example.com",
            "address": "0x857b06519E91e3A54538791bDbb0E22373e36b66",
            "uri": "https://api.example.com/premium-data",
            "version": "1",
            "chainId": "eip155:8453",
            "type": "eip191",
            "nonce": "a1b2c3d4e5f67890a1b2c3d4e5f67890",
            "issuedAt": "2024-01-15T10:30:00.000Z",
            "expirationTime": "2024-01-15T10:35:00.000Z",
            "statement": "Sign in to access premium data",
            "resources": ["https://api.example.com/premium-data"],
            "signatureScheme": "eip191",
            "signature": "0x00",
        })
    }

    fn message(proof: &Value) -> Result<String, SiwxError> {
        Proof::parse(BASE64_STANDARD.encode(proof.to_string()).as_bytes())?.message()
    }

    #[test]
    fn the_extension_is_that_of_the_specification() {
        let nonce = Nonce {
            text: "a1b2c3d4e5f67890a1b2c3d4e5f67890".into(),
            issued_at: Timestamp::from_millis(1_775_563_200_007),
            expires_at: Timestamp::from_seconds(1_775_563_500),
        };
        let mut extension = extension(&auth(), "https://api.example.com/v1/chat/completions", &nonce);
        let schema = extension.as_object_mut().unwrap().remove("schema").unwrap();
        assert_eq!(
            extension,
            json!({
                "info": {
                    "domain": "api.example.com",
                    "uri": "https://api.example.com/v1/chat/completions",
                    "version": "1",
                    "statement": STATEMENT,
                    "nonce": "a1b2c3d4e5f67890a1b2c3d4e5f67890",
                    "issuedAt": "2026-04-07T12:00:00.007Z",
                    "expirationTime": "2026-04-07T12:05:00.000Z",
                    "resources": ["https://api.example.com/v1/chat/completions"],
                },
                "supportedChains": [
                    {"chainId": "eip155:8453", "type": "eip191"}, {"chainId": "eip155:1", "type": "eip191"},
                ],
            })
        );
        // All that a client must send back is described, and can be read here.
        let properties = schema["properties"].as_object().unwrap();
        for name in schema["required"].as_array().unwrap() {
            let name = name.as_str().unwrap();
            assert!(properties.contains_key(name), "{name}");
            let mut without = proof();
            without.as_object_mut().unwrap().remove(name);
            assert!(matches!(message(&without), Err(SiwxError::Malformed(_))), "{name}");
        }
    }

    #[test]
    fn the_message_is_that_of_the_specification() {
        let expected = "api.example.com wants you to sign in with your Ethereum account:\n\
            0x857b06519E91e3A54538791bDbb0E22373e36b66\n\n\
            Sign in to access premium data\n\n\
            URI: https://api.example.com/premium-data\nVersion: 1\nChain ID: 8453\n\
            Nonce: a1b2c3d4e5f67890a1b2c3d4e5f67890\nIssued At: 2024-01-15T10:30:00.000Z\n\
            Expiration Time: 2024-01-15T10:35:00.000Z\n\
            Resources:\n- https://api.example.com/premium-data";
        assert_eq!(message(&proof()).unwrap(), expected);
        expected.parse::<::siwe::Message>().unwrap();

        let mut bare = proof();
        for name in ["statement", "expirationTime", "resources", "signatureScheme"] {
            bare.as_object_mut().unwrap().remove(name);
        }
        bare["notBefore"] = "2024-01-15T10:30:00.000Z".into();
        bare["requestId"] = "one".into();
        let text = message(&bare).unwrap();
        assert!(text.contains("36b66\n\n\nURI: "), "{text}");
        assert!(text.ends_with("\nNot Before: 2024-01-15T10:30:00.000Z\nRequest ID: one"), "{text}");
        text.parse::<::siwe::Message>().unwrap();
    }

    #[test]
    fn any_base64_is_read_and_nothing_else() {
        let text = proof().to_string();
        for header in [
            BASE64_STANDARD.encode(&text),
            BASE64_STANDARD_NO_PAD.encode(&text),
            BASE64_URL_SAFE.encode(&text),
            BASE64_URL_SAFE_NO_PAD.encode(&text),
        ] {
            assert!(Proof::parse(header.as_bytes()).is_ok(), "{header}");
        }
        for header in ["", "%", "e30=", "bnVsbA==", &text, &"A".repeat(MAX_HEADER_BYTES + 1)] {
            assert!(matches!(Proof::parse(header.as_bytes()), Err(SiwxError::Malformed(_))), "{header}");
        }
    }

    #[test]
    fn other_chains_are_refused() {
        for (chain, kind) in [
            ("solana:5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp", "ed25519"),
            ("eip155:8453", "ed25519"),
            ("eip155:", "eip191"),
            ("eip155:8453\nNonce: 1", "eip191"),
            ("8453", "eip191"),
        ] {
            let mut proof = proof();
            proof["chainId"] = chain.into();
            proof["type"] = kind.into();
            assert!(matches!(message(&proof), Err(SiwxError::UnsupportedChain(_))), "{chain} {kind}");
        }
        let mut contract = proof();
        contract["type"] = "eip1271".into();
        assert!(message(&contract).is_ok());
    }
}
