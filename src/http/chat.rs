//! `POST /v1/chat/completions`.

use axum::body::Body;
use axum::extract::{FromRequestParts, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::mpsc;

use crate::app::App;
use crate::formats::chat::ChatRequest;
use crate::http::extract::{KeyCaller, RawBody, RequestId};
use crate::http::{ApiError, json_bytes, names, set_header, topup};
use crate::metering::{MeteringError, PaidAnswer};
use crate::money::MicroUsdc;

pub async fn completions(
    State(app): State<App>,
    NoPayment: NoPayment,
    KeyCaller(caller): KeyCaller,
    RequestId(id): RequestId,
    RawBody(body): RawBody,
) -> Result<Response, ApiError> {
    let request = ChatRequest::parse(&body)?;
    let offer = app.config.catalog.get(&request.model).ok_or_else(|| unknown_model(&request.model))?;
    let bounds = request.bounds(offer)?;
    let explain = |error| explain(&app, &request, error);
    if request.stream {
        let events = app.metering.stream(id, caller, &request, bounds, offer).await.map_err(explain)?;
        return Ok(event_stream(events));
    }
    let paid = app.metering.answer(id, caller, &request, bounds, offer).await.map_err(explain)?;
    Ok(paid_answer(paid))
}

/// No payment came with the request: one that would not be used must not be passed over in silence.
pub struct NoPayment;

impl FromRequestParts<App> for NoPayment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        let paying = [names::X_PAYMENT, names::PAYMENT_SIGNATURE];
        if !paying.iter().any(|name| parts.headers.contains_key(name)) {
            return Ok(Self);
        }
        let message = "payments are taken at POST /v1/topup: top up there, then call with an API key; nothing was taken";
        Err(ApiError::invalid("payment_not_accepted_here", message))
    }
}

fn unknown_model(id: &str) -> ApiError {
    let shown: String = id.chars().take(100).collect();
    ApiError::not_found("model_not_found", format!("there is no model {shown:?}: GET /v1/models lists them"))
        .with_param("model")
}

/// An empty balance is answered with the top-up that would cover the request.
fn explain(app: &App, request: &ChatRequest<'_>, error: MeteringError) -> ApiError {
    let MeteringError::Insufficient { required, available, affordable } = error else { return error.into() };
    let missing = required.checked_sub(available).unwrap_or(required);
    let affordable = match affordable.and_then(|completion| request.limit_within(completion)) {
        Some(tokens) => format!("the largest max_tokens this balance affords is {tokens}"),
        None => "this balance affords no max_tokens at all".to_owned(),
    };
    let message = format!(
        "this request may cost {} USDC and {} USDC are available; {affordable}: lower max_tokens or top up",
        required.to_usd(),
        available.to_usd()
    );
    ApiError::new(StatusCode::PAYMENT_REQUIRED, "insufficient_balance", message)
        .with_header(names::PAYMENT_REQUIRED, topup::quote_header(app, missing))
}

fn paid_answer(paid: PaidAnswer) -> Response {
    let mut response = json_bytes(StatusCode::OK, paid.body);
    let mut amount =
        |name: HeaderName, amount: MicroUsdc| set_header(&mut response, name, &amount.to_string());
    amount(names::X_CHARGED_USDC, paid.ended.charged);
    amount(names::X_BALANCE_USDC, paid.ended.balance.balance);
    response
}

/// Server-sent events, each sent when it is there and buffered by nobody.
fn event_stream(mut events: mpsc::Receiver<Bytes>) -> Response {
    let events = futures_util::stream::poll_fn(move |context| events.poll_recv(context));
    let mut response = Response::new(Body::from_stream(events.map(Ok::<_, std::convert::Infallible>)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}
