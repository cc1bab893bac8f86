//! `/v1/auth/session` and `/v1/auth/nonce`: a wallet signs in once, and a browser has a token for an hour.

use axum::extract::{FromRequest as _, Request, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, HeaderValue};
use axum::response::Response;
use schemars::JsonSchema;
use secrecy::ExposeSecret as _;
use serde::Serialize;

use crate::app::App;
use crate::auth::Purpose;
use crate::http::extract::{Signed, SmallBody, session_token};
use crate::http::{ApiError, json};

#[derive(Serialize, JsonSchema)]
pub struct NonceBody {
    nonce: String,
    /// RFC 3339.
    expires_at: String,
}

#[derive(Serialize, JsonSchema)]
pub struct SessionBody {
    /// Good as `Authorization: Bearer …` wherever an API key is.
    session_token: String,
    /// RFC 3339.
    expires_at: String,
    wallet: String,
}

#[derive(Serialize, JsonSchema)]
pub struct Revoked {
    pub revoked: bool,
}

pub async fn nonce(State(app): State<App>) -> Response {
    let nonce = app.nonces.issue();
    let body = NonceBody { nonce: nonce.text, expires_at: nonce.expires_at.rfc3339() };
    unstored(json(StatusCode::OK, &body))
}

pub async fn create(State(app): State<App>, SmallBody(body): SmallBody) -> Result<Response, ApiError> {
    let wallet = Signed::from_body(&body)?.verify(&app, Purpose::Write).await?;
    let session = app.sessions.begin(wallet).await?;
    let body = SessionBody {
        session_token: session.token.expose_secret().to_owned(),
        expires_at: session.expires_at.rfc3339(),
        wallet: wallet.to_string(),
    };
    Ok(unstored(json(StatusCode::CREATED, &body)))
}

/// A signed message ends all of the wallet's sessions; without one, the token that came ends its own.
pub async fn revoke(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let token = session_token(request.headers())?;
    let SmallBody(body) = SmallBody::from_request(request, &app).await?;
    match (Signed::from_body_if_any(&body)?, token) {
        (Some(signed), _) => {
            let wallet = signed.verify(&app, Purpose::Write).await?;
            app.sessions.revoke_all(wallet).await?;
        }
        (None, Some(token)) => app.sessions.revoke(&token).await?,
        (None, None) => {
            return Err(ApiError::unauthorized(
                "missing_credentials",
                "send the session's token as `Authorization: Bearer …` to end it, or a signed message \
                 {message, signature} to end all of the wallet's sessions",
            ));
        }
    }
    Ok(json(StatusCode::OK, &Revoked { revoked: true }))
}

fn unstored(mut response: Response) -> Response {
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
