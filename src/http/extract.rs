//! What handlers ask for as arguments: the caller, the request's id, the body, a page of a list.

use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, StatusCode, Uri};
use bytes::Bytes;
use http_body_util::LengthLimitError;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use crate::app::App;
use crate::auth::{Principal, Purpose};
use crate::http::{ApiError, names};
use crate::id::Wallet;

/// A body that is not here by then is not coming.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// A signed message, or an amount.
const SMALL_BODY_BYTES: usize = 64 << 10;
/// What clients send that pay for each request, where their SDK insists on a key.
const NO_KEY: &str = "x402";
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

/// The caller, proved by an API key.
pub struct KeyCaller(pub Principal);

impl KeyCaller {
    /// The caller, if the request carries a key; one that is wrong is an error.
    pub async fn if_any(parts: &Parts, app: &App) -> Result<Option<Self>, ApiError> {
        match api_key(&parts.headers)? {
            Some(key) => Ok(Some(Self(authenticate(app, &key).await?))),
            None => Ok(None),
        }
    }
}

/// The caller, proved by an API key or by a signed message in the query: enough to read.
pub struct Reader(pub Principal);

impl FromRequestParts<App> for Reader {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        if let Some(key) = api_key(&parts.headers)? {
            return Ok(Self(authenticate(app, &key).await?));
        }
        let wallet = SiweReader::from_request_parts(parts, app).await?.0;
        Ok(Self(Principal { wallet, api_key_id: None }))
    }
}

impl Reader {
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

/// The wallet that signed the message in the query.
pub struct SiweReader(pub Wallet);

impl FromRequestParts<App> for SiweReader {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let signed = Signed::from_query(parts)?.ok_or_else(|| {
            ApiError::unauthorized(
                "missing_credentials",
                "sign in: send an EIP-4361 message and its signature as ?message=…&signature=… (where only \
                 a wallet's own data is read, an API key will do)",
            )
        })?;
        Ok(Self(signed.verify(app, Purpose::Read).await?))
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
        let path = Path::<String>::from_request_parts(parts, app).await;
        path.map(|Path(text)| Self(text))
            .map_err(|_| ApiError::invalid("invalid_path", "the path cannot be read: it must be UTF-8"))
    }
}

/// A signed message, as it travels in a query or in a JSON body.
#[derive(Deserialize)]
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
        Ok((signed.message.is_some() || signed.signature.is_some()).then_some(signed))
    }

    pub fn from_body(body: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map_err(|e| {
            let message = format!("the body must be JSON {{message, signature, label?}}: {e}");
            ApiError::invalid("invalid_json", message)
        })
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
        read_body(request, app.config.max_body_bytes).await.map(Self)
    }
}

/// The whole body of a request that comes without a key, and so may only be small.
pub struct SmallBody(pub Bytes);

impl FromRequest<App> for SmallBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &App) -> Result<Self, ApiError> {
        read_body(request, SMALL_BODY_BYTES).await.map(Self)
    }
}

async fn read_body(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("the body is larger than {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    if announced.and_then(|value| value.parse::<usize>().ok()).is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_TIMEOUT, to_bytes(request.into_body(), limit)).await {
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

/// The key a request carries, under either of its headers.
fn api_key(headers: &HeaderMap) -> Result<Option<SecretString>, ApiError> {
    let text = |name: &HeaderName| {
        let value = single(headers, name)?;
        Ok::<_, ApiError>(value.map(|value| std::str::from_utf8(value).unwrap_or_default()))
    };
    let bearer = match text(&AUTHORIZATION)? {
        None => None,
        Some(value) => Some(bearer_token(value).ok_or_else(|| {
            ApiError::unauthorized("invalid_api_key", "Authorization must be `Bearer sk-…`")
        })?),
    };
    let bearer = bearer.filter(|token| *token != NO_KEY);
    let key = match (bearer, text(&names::X_API_KEY)?) {
        (Some(a), Some(b)) if a != b => {
            let message = "Authorization and X-API-Key name different keys: send one";
            return Err(ApiError::invalid("conflicting_credentials", message));
        }
        (a, b) => a.or(b),
    };
    Ok(key.map(SecretString::from))
}

fn bearer_token(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

async fn authenticate(app: &App, key: &SecretString) -> Result<Principal, ApiError> {
    app.keys.authenticate(key).await?.ok_or_else(|| {
        let shown: String = key.expose_secret().chars().take(6).collect();
        let message =
            format!("the API key {shown}… is not known here, or was revoked; POST /v1/auth/keys makes one");
        ApiError::unauthorized("invalid_api_key", message)
    })
}
