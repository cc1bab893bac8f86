//! `/v1/auth/keys`: a signed-in wallet makes, lists, limits, rotates and revokes its API keys.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, HeaderValue};
use axum::response::Response;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value, json};

use crate::app::App;
use crate::auth::{ApiKey, KeyLimits};
use crate::http::extract::{Owner, Page, PathText};
use crate::http::{ApiError, json, key_limits};

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
    let row = |key: &ApiKey| {
        let mut row = describe(key);
        key_limits::show_spending(spending.get(&key.id).copied().unwrap_or_default(), &mut row);
        row
    };
    let data: Vec<_> = keys.iter().map(row).collect();
    Ok(json(StatusCode::OK, &json!({"data": data, "next_cursor": next_cursor})))
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
    let mut body = describe(&key);
    key_limits::show_spending(spending.get(&id).copied().unwrap_or_default(), &mut body);
    Ok(json(StatusCode::OK, &body))
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

/// A key with its secret, which no cache may keep. Limits are there where it has some.
fn shown_once(status: StatusCode, key: &ApiKey, secret: &SecretString) -> Response {
    let mut body = Map::new();
    key_limits::show(&key.limits, &mut body);
    body.retain(|_, limit| !limit.is_null());
    body.insert("id".into(), json!(key.id));
    body.insert("key".into(), json!(secret.expose_secret()));
    body.insert("label".into(), json!(key.label));
    body.insert("created_at".into(), json!(key.created_at.rfc3339()));
    let mut response = json(status, &body);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn describe(key: &ApiKey) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert("id".into(), json!(key.id));
    row.insert("label".into(), json!(key.label));
    row.insert("created_at".into(), json!(key.created_at.rfc3339()));
    row.insert("revoked_at".into(), json!(key.revoked_at.map(|at| at.rfc3339())));
    key_limits::show(&key.limits, &mut row);
    row
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
    Ok(json(StatusCode::OK, &json!({"revoked": true})))
}
