//! `/v1/auth/keys`: a signed-in wallet makes, lists and revokes its API keys.

use axum::extract::{FromRequest as _, Request, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, HeaderValue};
use axum::response::Response;
use secrecy::ExposeSecret as _;
use serde_json::json;

use crate::app::App;
use crate::auth::Purpose;
use crate::http::extract::{Page, PathText, Signed, SiweReader, SmallBody};
use crate::http::{ApiError, json};

pub async fn create(State(app): State<App>, SmallBody(body): SmallBody) -> Result<Response, ApiError> {
    let signed = Signed::from_body(&body)?;
    let wallet = signed.verify(&app, Purpose::Write).await?;
    let (key, secret) = app.keys.create(wallet, signed.label).await?;
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

pub async fn list(
    State(app): State<App>,
    SiweReader(wallet): SiweReader,
    page: Page,
) -> Result<Response, ApiError> {
    let before = page.parse_cursor(|cursor| cursor.parse().ok())?;
    let mut keys = app.keys.list(wallet, before, page.rows()).await?;
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

/// The signed message comes in the body or, from clients that cannot send one, in the query.
pub async fn revoke(
    State(app): State<App>,
    PathText(key_id): PathText,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let signed = match Signed::from_query(&parts)? {
        Some(signed) => signed,
        None => {
            let SmallBody(body) = SmallBody::from_request(Request::from_parts(parts, body), &app).await?;
            Signed::from_body(&body)?
        }
    };
    let wallet = signed.verify(&app, Purpose::Write).await?;
    let revoked = match key_id.parse() {
        Ok(id) => app.keys.revoke(wallet, id).await?,
        Err(_) => false,
    };
    if !revoked {
        let message = "this wallet has no such key: GET /v1/auth/keys lists its keys";
        return Err(ApiError::not_found("key_not_found", message));
    }
    Ok(json(StatusCode::OK, &json!({"revoked": true})))
}
