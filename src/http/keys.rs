//! `/v1/auth/keys`: a signed-in wallet makes, lists and revokes its API keys.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, HeaderValue};
use axum::response::Response;
use secrecy::ExposeSecret as _;
use serde_json::json;

use crate::app::App;
use crate::http::extract::{Owner, Page, PathText};
use crate::http::{ApiError, json};

pub async fn create(State(app): State<App>, owner: Owner) -> Result<Response, ApiError> {
    let (key, secret) = app.keys.create(owner.wallet, owner.asked.label).await?;
    let body = json!({
        "id": key.id,
        "key": secret.expose_secret(),
        "label": key.label,
        "created_at": key.created_at.rfc3339(),
    });
    let mut response = json(StatusCode::CREATED, &body);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

pub async fn list(State(app): State<App>, page: Page, owner: Owner) -> Result<Response, ApiError> {
    let before = page.parse_cursor(|cursor| cursor.parse().ok())?;
    let mut keys = app.keys.list(owner.wallet, before, page.rows()).await?;
    let next_cursor = page.cut(&mut keys, |key| key.id.to_string());
    let row = |key: &crate::auth::ApiKey| {
        json!({
            "id": key.id,
            "label": key.label,
            "created_at": key.created_at.rfc3339(),
            "revoked_at": key.revoked_at.map(|at| at.rfc3339()),
        })
    };
    let data: Vec<_> = keys.iter().map(row).collect();
    Ok(json(StatusCode::OK, &json!({"data": data, "next_cursor": next_cursor})))
}

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
        let message = "this wallet has no such key: GET /v1/auth/keys lists its keys";
        return Err(ApiError::not_found("key_not_found", message));
    }
    Ok(json(StatusCode::OK, &json!({"revoked": true})))
}
