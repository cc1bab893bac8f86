//! `/v1/auth/keys`: a signed-in wallet makes, lists, limits, rotates and revokes its API keys.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, HeaderValue};
use axum::response::Response;
use schemars::JsonSchema;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;

use crate::app::App;
use crate::auth::{ApiKey, KeyLimits};
use crate::http::extract::{Owner, Page, PathText};
use crate::http::key_limits::{self, LimitsBody};
use crate::http::session::Revoked;
use crate::http::{ApiError, json};
use crate::ledger::Spending;

/// A key as lists show it: without its secret.
#[derive(Serialize, JsonSchema)]
pub struct KeyBody {
    id: i64,
    label: Option<String>,
    /// RFC 3339.
    created_at: String,
    /// RFC 3339.
    revoked_at: Option<String>,
    #[serde(flatten)]
    limits: LimitsBody,
    /// Micro-USDC, of all days.
    spent_usdc: i64,
    /// Micro-USDC, of this UTC day.
    spent_today_usdc: i64,
    /// Micro-USDC that requests under way may still cost.
    held_usdc: i64,
}

#[derive(Serialize, JsonSchema)]
pub struct KeyList {
    data: Vec<KeyBody>,
    /// Where the next page begins; null at the end.
    next_cursor: Option<String>,
}

/// A key with its secret, which is shown this once. Limits are there where it has some.
#[derive(Serialize, JsonSchema)]
pub struct NewKey {
    id: i64,
    /// `sk-` and 64 hex digits.
    key: String,
    label: Option<String>,
    /// RFC 3339.
    created_at: String,
    #[serde(flatten, serialize_with = "key_limits::without_nulls")]
    limits: LimitsBody,
}

pub async fn create(State(app): State<App>, owner: Owner) -> Result<Response, ApiError> {
    let limits = key_limits::parse(&app, &owner.body, &["message", "signature", "label"])?;
    let limits = limits.apply(KeyLimits::default());
    let (key, secret) = app.keys.create(owner.wallet, owner.asked.label, limits).await?;
    Ok(shown_once(StatusCode::CREATED, &key, &secret))
}

pub async fn list(State(app): State<App>, page: Page, owner: Owner) -> Result<Response, ApiError> {
    let before = page.parse_cursor(|cursor| cursor.parse().ok())?;
    let mut keys = app.keys.list(owner.wallet, before, page.rows()).await?;
    let next_cursor = page.cut(&mut keys, |key| key.id.to_string());
    let spending = app.ledger.spending_of_keys(owner.wallet).await?;
    let row = |key: &ApiKey| describe(key, spending.get(&key.id).copied().unwrap_or_default());
    let data = keys.iter().map(row).collect();
    Ok(json(StatusCode::OK, &KeyList { data, next_cursor }))
}

pub async fn change(
    State(app): State<App>,
    PathText(key_id): PathText,
    owner: Owner,
) -> Result<Response, ApiError> {
    let changes = key_limits::parse(&app, &owner.body, &["message", "signature"])?;
    let wallet = owner.wallet;
    let id = key_id.parse().map_err(|_| no_such_key())?;
    let key = app.keys.change(wallet, id, changes).await?.ok_or_else(no_such_key)?;
    let spending = app.ledger.spending_of_keys(wallet).await?;
    Ok(json(StatusCode::OK, &describe(&key, spending.get(&id).copied().unwrap_or_default())))
}

pub async fn rotate(
    State(app): State<App>,
    PathText(key_id): PathText,
    owner: Owner,
) -> Result<Response, ApiError> {
    let id = key_id.parse().map_err(|_| no_such_key())?;
    let (key, secret) = app.keys.rotate(owner.wallet, id).await?.ok_or_else(no_such_key)?;
    Ok(shown_once(StatusCode::OK, &key, &secret))
}

/// A key with its secret, which no cache may keep.
fn shown_once(status: StatusCode, key: &ApiKey, secret: &SecretString) -> Response {
    let body = NewKey {
        id: key.id,
        key: secret.expose_secret().to_owned(),
        label: key.label.clone(),
        created_at: key.created_at.rfc3339(),
        limits: LimitsBody::of(&key.limits),
    };
    let mut response = json(status, &body);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn describe(key: &ApiKey, (ever, today): (Spending, Spending)) -> KeyBody {
    KeyBody {
        id: key.id,
        label: key.label.clone(),
        created_at: key.created_at.rfc3339(),
        revoked_at: key.revoked_at.map(|at| at.rfc3339()),
        limits: LimitsBody::of(&key.limits),
        spent_usdc: ever.spent.get(),
        spent_today_usdc: today.spent.get(),
        held_usdc: ever.held.get(),
    }
}

fn no_such_key() -> ApiError {
    let message = "this wallet has no such key: GET /v1/auth/keys lists its keys";
    ApiError::not_found("key_not_found", message)
}

/// The signed message comes in the body or, from clients that cannot send one, in the query.
pub async fn revoke(
    State(app): State<App>,
    PathText(key_id): PathText,
    owner: Owner,
) -> Result<Response, ApiError> {
    let revoked = match key_id.parse() {
        Ok(id) => app.keys.revoke(owner.wallet, id).await?,
        Err(_) => false,
    };
    if !revoked {
        return Err(no_such_key());
    }
    Ok(json(StatusCode::OK, &Revoked { revoked: true }))
}
