//! `GET /v1/reserves` and `/v1/reserves/proof`: what is owed and what there is, and a wallet's part of it.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;

use crate::app::App;
use crate::http::extract::Caller;
use crate::http::{ApiError, json};
use crate::reserves::{self, Publication};

/// What was published last.
pub async fn latest(State(app): State<App>) -> Result<Response, ApiError> {
    let publication = published(&app).await?;
    Ok(json(StatusCode::OK, &reserves::publication_body(&app.attestor, &publication)?))
}

/// The caller's leaf, and what leads from it to the root that was published last.
pub async fn proof(State(app): State<App>, caller: Caller) -> Result<Response, ApiError> {
    let publication = published(&app).await?;
    let wallet = caller.0.wallet;
    let Some(proof) = reserves::proof_of(&app.db, &publication, wallet).await? else {
        let message = format!(
            "the books did not know {wallet} yet at {}, when the last reserves were published: it will be in the next",
            publication.taken_at.rfc3339()
        );
        return Err(ApiError::not_found("wallet_not_in_reserves", message));
    };
    Ok(json(StatusCode::OK, &reserves::proof_body(&app.attestor, &publication, &proof)?))
}

async fn published(app: &App) -> Result<Publication, ApiError> {
    let message = "no reserves have been published: the operator does by `farebox audit --publish`";
    let latest = reserves::latest(&app.db).await?;
    latest.ok_or_else(|| ApiError::not_found("reserves_not_published", message))
}
