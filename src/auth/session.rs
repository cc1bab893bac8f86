//! Sessions: a token that a signed-in wallet's browser carries for an hour.
//!
//! A JSON Web Token (RFC 7519) signed by HS256 (RFC 7515 and 7518, section 3.2), always under one and
//! the same header: with no choice of algorithm there is nothing to talk us into another one.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use crate::auth::{Principal, SigningKey, store};
use crate::clock::{Clock, Timestamp};
use crate::config::{self, Config};
use crate::db::{Db, DbError};
use crate::id::{Entropy, Wallet};

/// `{"alg":"HS256","typ":"JWT"}`
const HEADER: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9";
const ISSUER: &str = "farebox";
/// Ours have less than half of it.
const MAX_TOKEN_BYTES: usize = 1024;
/// What was revoked is remembered for this much longer than it would have lasted, as the clocks of
/// several nodes may differ.
const SKEW_SECONDS: i64 = 300;

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("this is no session token of this gateway: POST /v1/auth/session makes one")]
    Invalid,
    #[error("the session has expired: sign in again at POST /v1/auth/session")]
    Expired,
    #[error("the session was revoked: sign in again at POST /v1/auth/session")]
    Revoked,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What a token says (RFC 7519, section 4.1).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    /// The wallet.
    sub: String,
    iat: i64,
    exp: i64,
    jti: String,
    /// The wallet's generation of sessions; absent where it has not revoked them all of late.
    #[serde(skip_serializing_if = "Option::is_none")]
    r#gen: Option<String>,
}

/// A session that has just begun.
pub struct NewSession {
    pub token: SecretString,
    pub expires_at: Timestamp,
}

/// The sessions of all wallets.
#[derive(Clone)]
pub struct Sessions {
    db: Db,
    clock: Clock,
    entropy: Entropy,
    key: SigningKey,
    audience: String,
    lifetime_seconds: i64,
}

impl Sessions {
    pub fn new(db: Db, clock: Clock, entropy: Entropy, key: SigningKey, config: &Config) -> Self {
        // A deployment is named by where its payments go: its nodes share that, and another with the
        // same secret does not take its tokens.
        let audience = format!("{}:{}", config.payments.network(), config.payments.pay_to);
        let lifetime_seconds = i64::from(config.auth.session_minutes) * 60;
        Self { db, clock, entropy, key, audience, lifetime_seconds }
    }

    /// Begins a session of a wallet that has just signed in.
    pub async fn begin(&self, wallet: Wallet) -> Result<NewSession, SessionError> {
        let now = self.clock.now();
        let expires_at = Timestamp::from_seconds(now.seconds() + self.lifetime_seconds);
        let claims = Claims {
            iss: ISSUER.into(),
            aud: self.audience.clone(),
            sub: wallet.to_string(),
            iat: now.seconds(),
            exp: expires_at.seconds(),
            jti: hex::encode(self.entropy.bytes::<16>()),
            r#gen: store::session_generation(&self.db, wallet).await?,
        };
        Ok(NewSession { token: SecretString::from(write(&self.key, &claims)), expires_at })
    }

    /// The principal that a token stands for.
    pub async fn authenticate(&self, token: &SecretString) -> Result<Principal, SessionError> {
        let (wallet, claims) = self.check(token)?;
        let known = store::session_state(&self.db, &claims.jti, wallet).await?;
        let other_generation = known.generation.is_some() && known.generation != claims.r#gen;
        if known.revoked || other_generation {
            return Err(SessionError::Revoked);
        }
        Ok(Principal::of_wallet(wallet))
    }

    /// Ends the session of this token; one that has ended so already has, all the same.
    pub async fn revoke(&self, token: &SecretString) -> Result<(), SessionError> {
        let (_, claims) = self.check(token)?;
        let forget_at = Timestamp::from_seconds(claims.exp).plus_seconds(SKEW_SECONDS);
        let mut tx = self.db.begin().await?;
        store::revoke_session(&mut tx, &claims.jti, forget_at).await?;
        Ok(tx.commit().await?)
    }

    /// Ends all of a wallet's sessions.
    pub async fn revoke_all(&self, wallet: Wallet) -> Result<(), SessionError> {
        // By then the longest that any configuration allows is over.
        let longest = i64::from(config::MAX_SESSION_MINUTES) * 60 + SKEW_SECONDS;
        let forget_at = self.clock.now().plus_seconds(longest);
        let generation = hex::encode(self.entropy.bytes::<8>());
        let mut tx = self.db.begin().await?;
        store::renew_generation(&mut tx, wallet, &generation, forget_at).await?;
        Ok(tx.commit().await?)
    }

    /// Forgets revocations of what has expired by itself.
    pub async fn forget_stale(&self) -> Result<(), SessionError> {
        let mut tx = self.db.begin().await?;
        store::forget_sessions(&mut tx, self.clock.now()).await?;
        Ok(tx.commit().await?)
    }

    /// What can be told without the database, in this order: our header; our signature; our issuer and
    /// audience; a wallet; not expired.
    fn check(&self, token: &SecretString) -> Result<(Wallet, Claims), SessionError> {
        let claims = read(&self.key, token.expose_secret()).ok_or(SessionError::Invalid)?;
        if claims.iss != ISSUER || claims.aud != self.audience {
            return Err(SessionError::Invalid);
        }
        let wallet = claims.sub.parse().map_err(|_| SessionError::Invalid)?;
        if Timestamp::from_seconds(claims.exp) <= self.clock.now() {
            return Err(SessionError::Expired);
        }
        Ok((wallet, claims))
    }
}

/// Whether a credential has the form of a token: three parts between dots. API keys have no dot.
pub fn is_token(text: &str) -> bool {
    text.bytes().filter(|b| *b == b'.').count() == 2
}

fn write(key: &SigningKey, claims: &Claims) -> String {
    // A struct of strings and numbers can be written.
    let claims = serde_json::to_vec(claims).unwrap_or_default();
    let signed = format!("{HEADER}.{}", BASE64_URL_SAFE_NO_PAD.encode(claims));
    let signature = BASE64_URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()));
    format!("{signed}.{signature}")
}

fn read(key: &SigningKey, token: &str) -> Option<Claims> {
    if token.len() > MAX_TOKEN_BYTES {
        return None;
    }
    let (signed, signature) = token.rsplit_once('.')?;
    let (header, claims) = signed.split_once('.')?;
    let signature: [u8; 32] = BASE64_URL_SAFE_NO_PAD.decode(signature).ok()?.try_into().ok()?;
    if header != HEADER || !key.has_signed(signed.as_bytes(), &signature) {
        return None;
    }
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"a secret of thirty-two bytes, or more";

    fn claims() -> Claims {
        Claims {
            iss: ISSUER.into(),
            aud: "eip155:8453:0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed".into(),
            sub: "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed".into(),
            iat: 1_775_563_200,
            exp: 1_775_566_800,
            jti: "00".repeat(16),
            r#gen: None,
        }
    }

    fn encoded(text: &str) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(text)
    }

    #[test]
    fn a_token_is_signed_as_rfc_7515_has_it() {
        // Appendix A.1 of the RFC.
        let secret = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow";
        let key = SigningKey::new(&BASE64_URL_SAFE_NO_PAD.decode(secret).unwrap());
        let signed = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
        let signature = BASE64_URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()));
        assert_eq!(signature, "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
        // Signed well, and yet not ours: the header is another.
        assert_eq!(read(&key, &format!("{signed}.{signature}")), None);
    }

    #[test]
    fn a_token_is_read_as_it_was_written() {
        let key = SigningKey::new(SECRET);
        assert_eq!(HEADER, encoded(r#"{"alg":"HS256","typ":"JWT"}"#));
        let with_generation = Claims { r#gen: Some("0123".into()), ..claims() };
        for claims in [claims(), with_generation] {
            let token = write(&key, &claims);
            assert!(is_token(&token) && token.len() < MAX_TOKEN_BYTES / 2);
            assert_eq!(read(&key, &token), Some(claims));
        }
    }

    #[test]
    fn any_other_header_is_refused_however_it_is_signed() {
        let key = SigningKey::new(SECRET);
        let body = encoded(&serde_json::to_string(&claims()).unwrap());
        for header in [
            r#"{"alg":"none","typ":"JWT"}"#,
            r#"{"alg":"None"}"#,
            r#"{"alg":"HS512","typ":"JWT"}"#,
            r#"{"alg":"RS256","typ":"JWT"}"#,
            r#"{"typ":"JWT","alg":"HS256"}"#,
            r#"{"alg":"HS256","typ":"JWT","crit":["exp"]}"#,
            "{}",
            "",
        ] {
            let signed = format!("{}.{body}", encoded(header));
            let signature = BASE64_URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()));
            for token in [format!("{signed}.{signature}"), format!("{signed}.")] {
                assert_eq!(read(&key, &token), None, "{header}");
            }
        }
    }

    #[test]
    fn a_token_that_was_tampered_with_is_refused() {
        let key = SigningKey::new(SECRET);
        let token = write(&key, &claims());
        for at in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(read(&key, &changed), None, "{at}: {changed}");
        }
        let (signed, signature) = token.rsplit_once('.').unwrap();
        for wrong in [
            signed.to_owned(),
            format!("{signed}."),
            format!("{signed}.{}", &signature[..22]),
            format!("{token}="),
            format!("{token}.{signature}"),
            format!("{token}{}", "A".repeat(MAX_TOKEN_BYTES)),
            "..".into(),
            String::new(),
        ] {
            assert_eq!(read(&key, &wrong), None, "{wrong}");
        }
        assert_eq!(read(&SigningKey::new(b"another secret of thirty-two bytes"), &token), None);
        assert_eq!(read(&key.derive("farebox nonce 1"), &token), None);
    }
}
