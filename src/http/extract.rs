//! What handlers ask for as arguments: the caller, the request's id, the body, a page of a list.

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, OptionalFromRequestParts, Path, Query, Request};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, Uri};
use bytes::Bytes;
use http_body_util::LengthLimitError;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use crate::app::App;
use crate::auth::{Principal, Purpose, session, siwx};
use crate::http::{ApiError, names};
use crate::id::Wallet;

/// A body that is not here by then is not coming.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// A signed message, or an amount.
const SMALL_BODY_BYTES: usize = 64 << 10;
const DEFAULT_PAGE: i64 = 20;
const LARGEST_PAGE: i64 = 100;

/// Names the request, its hold and its receipt.
#[derive(Clone)]
pub struct RequestId(pub String);

impl FromRequestParts<App> for RequestId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| ApiError::unavailable(&"a request has no id"))
    }
}

/// Who calls, however it was proved: by an API key, by a session's token, by a `SIGN-IN-WITH-X` header
/// or, to read, by a signed message in the query. `Option<Caller>` is for routes that serve others too:
/// `None` where no proof came; a wrong one is an error all the same.
pub struct Caller(pub Principal);

impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        if let Some(caller) = Self::find(parts, app).await? {
            return Ok(caller);
        }
        Err(ApiError::unauthorized(
            "missing_credentials",
            "send an API key or a session's token as `Authorization: Bearer …`, or sign in: an EIP-4361 \
             message and its signature as ?message=…&signature=…",
        ))
    }
}

impl OptionalFromRequestParts<App> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Option<Self>, ApiError> {
        Self::find(parts, app).await
    }
}

impl Caller {
    async fn find(parts: &Parts, app: &App) -> Result<Option<Self>, ApiError> {
        // A wallet that signs decides; whatever key an SDK insists on sending is then of no matter.
        if let Some(wallet) = sign_in_header(parts, app).await? {
            return Ok(Some(Self(Principal::of_wallet(wallet))));
        }
        if let Some(credential) = credential(&parts.headers)? {
            return Ok(Some(Self(credential.authenticate(app).await?)));
        }
        let signed = if purpose(parts) == Purpose::Read { Signed::from_query(parts)? } else { None };
        let Some(signed) = signed else { return Ok(None) };
        let wallet = signed.verify(app, Purpose::Read).await?;
        Ok(Some(Self(Principal::of_wallet(wallet))))
    }

    /// Whether this caller may read what is `wallet`'s.
    pub fn check(&self, wallet: Wallet) -> Result<(), ApiError> {
        if self.0.wallet == wallet {
            return Ok(());
        }
        let message =
            format!("you are {}; what is another wallet's only that wallet can read", self.0.wallet);
        Err(ApiError::new(StatusCode::FORBIDDEN, "not_your_wallet", message))
    }
}

/// What a request may do with a signature: a GET repeats, anything else happens once.
fn purpose(parts: &Parts) -> Purpose {
    if matches!(parts.method, Method::GET | Method::HEAD) { Purpose::Read } else { Purpose::Write }
}

/// The wallet itself, for what no API key may do: by a `SIGN-IN-WITH-X` header, by a signed message, or by
/// the token of a session that began with one. In this order; API keys are passed over.
pub struct Owner {
    pub wallet: Wallet,
    /// What came with the proof, or instead of it.
    pub asked: Signed,
    /// The whole body, where there was one to read.
    pub body: Bytes,
}

impl FromRequest<App> for Owner {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let purpose = purpose(&parts);
        let asked = if parts.method == Method::POST { None } else { Signed::from_query(&parts)? };
        let mut whole = Bytes::new();
        let asked = match asked {
            None if purpose == Purpose::Write => {
                whole = read_body(&parts.headers, body, SMALL_BODY_BYTES).await?;
                Signed::from_whole_body(&whole)?
            }
            in_query => in_query,
        };
        let wallet = if let Some(wallet) = sign_in_header(&parts, app).await? {
            wallet
        } else if let Some(signed) = asked.as_ref().filter(|asked| asked.is_there()) {
            signed.verify(app, purpose).await?
        } else if let Some(token) = session_token(&parts.headers)? {
            app.sessions.authenticate(&token).await?.wallet
        } else if let Some(incomplete) = &asked {
            // Says what it lacks.
            incomplete.verify(app, purpose).await?
        } else {
            return Err(ApiError::unauthorized(
                "missing_credentials",
                "only the wallet itself may do this: send an EIP-4361 message and its signature, or a \
                 session's token as `Authorization: Bearer …`",
            ));
        };
        Ok(Self { wallet, asked: asked.unwrap_or_default(), body: whole })
    }
}

/// Whether a URL carries a wallet's signature.
pub fn is_signed(uri: &Uri) -> bool {
    let parts = Query::<Vec<(String, String)>>::try_from_uri(uri);
    parts.is_ok_and(|Query(parts)| parts.iter().any(|(name, _)| name == "signature"))
}

/// One part of the path.
pub struct PathText(pub String);

impl FromRequestParts<App> for PathText {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let path = <Path<String> as FromRequestParts<App>>::from_request_parts(parts, app).await;
        path.map(|Path(text)| Self(text))
            .map_err(|_| ApiError::invalid("invalid_path", "the path cannot be read: it must be UTF-8"))
    }
}

/// A signed message, as it travels in a query or in a JSON body.
#[derive(Deserialize, Default)]
pub struct Signed {
    message: Option<String>,
    signature: Option<String>,
    #[serde(default)]
    pub label: Option<String>,
}

impl Signed {
    /// From the query; `None` where that holds neither part.
    pub fn from_query(parts: &Parts) -> Result<Option<Self>, ApiError> {
        let query = Query::<Self>::try_from_uri(&parts.uri);
        let Query(signed) =
            query.map_err(|_| ApiError::invalid("invalid_query", "the query cannot be read"))?;
        Ok(signed.is_there().then_some(signed))
    }

    /// From a body; `None` where that is empty.
    fn from_whole_body(body: &[u8]) -> Result<Option<Self>, ApiError> {
        if body.trim_ascii().is_empty() { Ok(None) } else { Self::from_body(body).map(Some) }
    }

    /// From a body; `None` where that holds neither part.
    pub fn from_body_if_any(body: &[u8]) -> Result<Option<Self>, ApiError> {
        Ok(Self::from_whole_body(body)?.filter(Self::is_there))
    }

    fn is_there(&self) -> bool {
        self.message.is_some() || self.signature.is_some()
    }

    pub fn from_body(body: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map_err(|e| {
            let message = format!("the body must be JSON {{message, signature, label?}}: {e}");
            ApiError::invalid("invalid_json", message)
        })
    }

    /// The message as it was sent.
    pub fn message(&self) -> &str {
        self.message.as_deref().unwrap_or_default()
    }

    pub async fn verify(&self, app: &App, purpose: Purpose) -> Result<Wallet, ApiError> {
        let part = |name: &'static str, value: &Option<String>| {
            value.clone().ok_or_else(|| {
                ApiError::invalid("missing_required_parameter", format!("{name} is required"))
                    .with_param(name)
            })
        };
        let message = part("message", &self.message)?;
        let signature = part("signature", &self.signature)?;
        Ok(app.siwe.verify(&message, &signature, purpose).await?)
    }
}

/// The whole body, whatever its Content-Type says.
pub struct RawBody(pub Bytes);

impl FromRequest<App> for RawBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        read_body(&parts.headers, body, app.config.max_body_bytes).await.map(Self)
    }
}

/// The whole body of a request that has no need of a large one.
pub struct SmallBody(pub Bytes);

impl FromRequest<App> for SmallBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &App) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        read_body(&parts.headers, body, SMALL_BODY_BYTES).await.map(Self)
    }
}

async fn read_body(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("the body is larger than {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    if announced.and_then(|value| value.parse::<usize>().ok()).is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_over_limit(&error) => Err(too_large()),
        Ok(Err(_)) | Err(_) => Err(ApiError::invalid("incomplete_body", "the body did not arrive whole")),
    }
}

fn is_over_limit(error: &axum::Error) -> bool {
    let source = std::error::Error::source(error);
    source.is_some_and(|cause| cause.is::<LengthLimitError>())
}

/// Which part of a list is asked for.
pub struct Page {
    pub limit: i64,
    pub cursor: Option<String>,
}

impl FromRequestParts<App> for Page {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        #[derive(Deserialize)]
        struct Wire {
            limit: Option<String>,
            cursor: Option<String>,
        }
        let query = Query::<Wire>::try_from_uri(&parts.uri);
        let Query(wire) =
            query.map_err(|_| ApiError::invalid("invalid_query", "the query cannot be read"))?;
        let limit = match wire.limit {
            None => DEFAULT_PAGE,
            Some(text) => {
                text.parse().ok().filter(|limit| (1..=LARGEST_PAGE).contains(limit)).ok_or_else(|| {
                    ApiError::invalid("invalid_limit", format!("limit must be between 1 and {LARGEST_PAGE}"))
                        .with_param("limit")
                })?
            }
        };
        Ok(Self { limit, cursor: wire.cursor.filter(|cursor| !cursor.is_empty()) })
    }
}

impl Page {
    /// Reads the cursor, which only an earlier answer of ours can have given.
    pub fn parse_cursor<T>(&self, parse: impl Fn(&str) -> Option<T>) -> Result<Option<T>, ApiError> {
        let read = |cursor: &String| {
            parse(cursor).ok_or_else(|| {
                ApiError::invalid("invalid_cursor", "cursor must be a next_cursor of this list")
                    .with_param("cursor")
            })
        };
        self.cursor.as_ref().map(read).transpose()
    }

    /// Cuts a list that was read one row longer than asked for, and tells where the next page begins.
    pub fn cut<T>(&self, rows: &mut Vec<T>, cursor: impl Fn(&T) -> String) -> Option<String> {
        let limit = usize::try_from(self.limit).unwrap_or(usize::MAX);
        let more = rows.len() > limit;
        rows.truncate(limit);
        rows.last().filter(|_| more).map(cursor)
    }

    /// How many rows to read to know whether there is a next page.
    pub fn rows(&self) -> i64 {
        self.limit.saturating_add(1)
    }
}

/// The wallet in a path, in any case.
pub fn wallet_in_path(text: &str) -> Result<Wallet, ApiError> {
    text.parse()
        .map_err(|_| ApiError::invalid("invalid_wallet", "the path must name a wallet: 0x and 40 hex digits"))
}

/// The value of a header that may come once. Twice and different, it says nothing we could trust.
pub fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a [u8]>, ApiError> {
    let mut values = headers.get_all(name).iter().map(|value| value.as_bytes());
    let first = values.next();
    if values.any(|other| Some(other) != first) {
        let message = format!("the header {name} is there twice, with different values: send one");
        return Err(ApiError::invalid("conflicting_headers", message));
    }
    Ok(first)
}

/// The wallet that a `SIGN-IN-WITH-X` header signs in.
async fn sign_in_header(parts: &Parts, app: &App) -> Result<Option<Wallet>, ApiError> {
    let Some(header) = single(&parts.headers, &names::SIGN_IN_WITH_X)? else { return Ok(None) };
    Ok(Some(siwx::verify(&app.siwe, header, purpose(parts)).await?))
}

/// What a request carries in `Authorization` or `X-API-Key`.
enum Credential {
    ApiKey(SecretString),
    Session(SecretString),
}

impl Credential {
    async fn authenticate(&self, app: &App) -> Result<Principal, ApiError> {
        match self {
            Self::Session(token) => Ok(app.sessions.authenticate(token).await?),
            Self::ApiKey(key) => app.keys.authenticate(key).await?.ok_or_else(|| {
                let shown: String = key.expose_secret().chars().take(6).collect();
                let message = format!(
                    "the API key {shown}… is not known here, or was revoked; POST /v1/auth/keys makes one"
                );
                ApiError::unauthorized("invalid_api_key", message)
            }),
        }
    }
}

/// The credential under either of its headers.
fn credential(headers: &HeaderMap) -> Result<Option<Credential>, ApiError> {
    let bearer = match header_text(headers, &AUTHORIZATION)? {
        None => None,
        Some(value) => Some(bearer_token(value).ok_or_else(|| {
            ApiError::unauthorized("invalid_api_key", "Authorization must be `Bearer sk-…`")
        })?),
    };
    let bearer = bearer.filter(|token| *token != NO_CREDENTIAL);
    let key = match (bearer, header_text(headers, &names::X_API_KEY)?) {
        (Some(a), Some(b)) if a != b => {
            let message = "Authorization and X-API-Key name different keys: send one";
            return Err(ApiError::invalid("conflicting_credentials", message));
        }
        (a, b) => a.or(b),
    };
    Ok(key.map(|key| {
        let secret = SecretString::from(key);
        if session::is_token(key) { Credential::Session(secret) } else { Credential::ApiKey(secret) }
    }))
}

/// The session's token in `Authorization`; `None` where that holds something else, such as an API key.
pub fn session_token(headers: &HeaderMap) -> Result<Option<SecretString>, ApiError> {
    let bearer = header_text(headers, &AUTHORIZATION)?.and_then(bearer_token);
    Ok(bearer.filter(|token| session::is_token(token)).map(SecretString::from))
}

/// What stands where an SDK will not go without an API key, in requests that pay or sign by themselves.
const NO_CREDENTIAL: &str = "x402";

fn header_text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ApiError> {
    let value = single(headers, name)?;
    Ok(value.map(|value| std::str::from_utf8(value).unwrap_or_default()))
}

fn bearer_token(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}
