//! The public API: parsing at the edge, rendering at the end, nothing of substance between.

mod conversation;
mod error;
mod extract;
mod inference;
mod key_limits;
mod keys;
mod leftover;
mod limits;
mod media;
mod middleware;
mod openapi;
mod purchase;
mod requests;
mod reserves;
mod server;
mod session;
mod status;
mod topup;
mod usage;
mod withdrawals;
mod x402;

use axum::Router;
use axum::body::Body;
use axum::handler::Handler;
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use axum::routing::{MethodFilter, on};
use serde::Serialize;

use crate::app::App;

pub use error::ApiError;
pub use middleware::metrics_router;
pub use requests::signed as signed_receipt;
pub use server::serve;

/// What a route asks of its caller.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Access {
    Public,
    /// A payment, which authorizes itself.
    X402,
    /// A payment for the request itself, or whoever may call.
    Priced,
    /// An API key, a session, a `SIGN-IN-WITH-X` header; to read, a signed message too.
    Caller,
    /// The wallet itself: as above, but no API key.
    Owner,
    /// A signed message in the body.
    Siwe,
    /// The token of the session that it ends, or a signed message.
    Session,
}

/// All routes, a line each.
fn routes() -> Routes {
    Routes::default()
        .get("/health", Access::Public, status::health)
        .get("/ready", Access::Public, status::ready)
        .get("/openapi.json", Access::Public, openapi::document)
        .get("/docs", Access::Public, openapi::page)
        .get("/llms.txt", Access::Public, openapi::llms)
        .get("/v1/status", Access::Public, status::status)
        .get("/v1/models", Access::Public, status::models)
        .post(topup::PATH, Access::X402, topup::topup)
        .get("/v1/topups/{wallet}", Access::Caller, topup::list)
        .post("/v1/withdrawals", Access::Siwe, withdrawals::create)
        .get("/v1/withdrawals", Access::Caller, withdrawals::list)
        .get("/v1/withdrawals/{id}", Access::Caller, withdrawals::get)
        .get("/v1/auth/nonce", Access::Public, session::nonce)
        .post("/v1/auth/session", Access::Siwe, session::create)
        .post("/v1/auth/session/revoke", Access::Session, session::revoke)
        .post("/v1/auth/keys", Access::Owner, keys::create)
        .get("/v1/auth/keys", Access::Owner, keys::list)
        .patch("/v1/auth/keys/{key_id}", Access::Owner, keys::change)
        .delete("/v1/auth/keys/{key_id}", Access::Owner, keys::revoke)
        .post("/v1/auth/keys/{key_id}/rotate", Access::Owner, keys::rotate)
        .post(conversation::CHAT.path, Access::Priced, conversation::chat)
        .post(conversation::RESPONSES.path, Access::Priced, conversation::responses)
        .post(conversation::MESSAGES.path, Access::Priced, conversation::messages)
        .post(conversation::COMPLETIONS.path, Access::Priced, conversation::completions)
        .post(media::EMBEDDINGS.path, Access::Priced, media::embeddings)
        .post(media::IMAGES.path, Access::Priced, media::images)
        .post(media::IMAGE_EDITS.path, Access::Priced, media::image_edits)
        .post(media::SPEECH.path, Access::Priced, media::speech)
        .post(media::TRANSCRIPTIONS.path, Access::Priced, media::transcriptions)
        .post(conversation::COUNT_TOKENS_PATH, Access::Caller, conversation::count_tokens)
        .get("/v1/usage/{wallet}", Access::Caller, usage::usage)
        .get("/v1/requests", Access::Caller, requests::list)
        .get("/v1/requests/{id}", Access::Caller, requests::get)
        .get("/v1/reserves", Access::Public, reserves::latest)
        .get("/v1/reserves/proof", Access::Caller, reserves::proof)
}

/// The gateway as a service.
pub fn router(app: App) -> Router {
    let router = routes().router.fallback(not_found).method_not_allowed_fallback(method_not_allowed);
    middleware::wrap(router, &app).with_state(app)
}

/// Every route with what it asks of its caller, for the test that compares the two.
pub fn route_table() -> Vec<(Method, &'static str, Access)> {
    routes().table
}

#[derive(Default)]
struct Routes {
    router: Router<App>,
    table: Vec<(Method, &'static str, Access)>,
}

impl Routes {
    fn get<T: 'static>(self, path: &'static str, access: Access, handler: impl Handler<T, App>) -> Self {
        self.add(Method::GET, MethodFilter::GET, path, access, handler)
    }

    fn post<T: 'static>(self, path: &'static str, access: Access, handler: impl Handler<T, App>) -> Self {
        self.add(Method::POST, MethodFilter::POST, path, access, handler)
    }

    fn patch<T: 'static>(self, path: &'static str, access: Access, handler: impl Handler<T, App>) -> Self {
        self.add(Method::PATCH, MethodFilter::PATCH, path, access, handler)
    }

    fn delete<T: 'static>(self, path: &'static str, access: Access, handler: impl Handler<T, App>) -> Self {
        self.add(Method::DELETE, MethodFilter::DELETE, path, access, handler)
    }

    fn add<T: 'static>(
        mut self,
        method: Method,
        filter: MethodFilter,
        path: &'static str,
        access: Access,
        handler: impl Handler<T, App>,
    ) -> Self {
        self.table.push((method, path, access));
        Self { router: self.router.route(path, on(filter, handler)), ..self }
    }
}

async fn not_found() -> ApiError {
    ApiError::not_found("not_found", "there is nothing at this path: the API is under /v1/")
}

async fn method_not_allowed() -> ApiError {
    let message = "this path does not take that method: see the Allow header";
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// A JSON answer.
fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => json_bytes(status, body),
        // None of our answers can fail to serialize; should one, the status says so.
        Err(_) => json_bytes(StatusCode::INTERNAL_SERVER_ERROR, Vec::new()),
    }
}

fn json_bytes(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Sets a header whose value is made of characters that every header may hold.
fn set_header(response: &mut Response, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// The headers that are ours and x402's.
mod names {
    use axum::http::HeaderName;

    pub const PAYMENT_REQUIRED: HeaderName = HeaderName::from_static("payment-required");
    pub const PAYMENT_RESPONSE: HeaderName = HeaderName::from_static("payment-response");
    pub const X_PAYMENT_RESPONSE: HeaderName = HeaderName::from_static("x-payment-response");
    pub const PAYMENT_SIGNATURE: HeaderName = HeaderName::from_static("payment-signature");
    pub const X_PAYMENT: HeaderName = HeaderName::from_static("x-payment");
    pub const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
    pub const SIGN_IN_WITH_X: HeaderName = HeaderName::from_static("sign-in-with-x");
    /// A client that must not try again by itself reads this: the OpenAI SDKs do.
    pub const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
    pub const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
    /// Under which Anthropic's clients look for the request's id.
    pub const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
    pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
    pub const X_CHARGED_USDC: HeaderName = HeaderName::from_static("x-charged-usdc");
    pub const X_BALANCE_USDC: HeaderName = HeaderName::from_static("x-balance-usdc");
    pub const X_RATELIMIT_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
    pub const X_RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
    pub const X_RATELIMIT_RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
}
