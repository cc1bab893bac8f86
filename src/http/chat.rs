//! `POST /v1/chat/completions`.

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::app::App;
use crate::formats::chat::ChatRequest;
use crate::http::extract::{RawBody, RequestId};
use crate::http::limits::Limit;
use crate::http::purchase::{Buyer, Purchase, Sale};
use crate::http::{ApiError, json_bytes, key_limits, names, set_header, x402};
use crate::id::Wallet;
use crate::metering::{MeteringError, Order, PaidAnswer, Replay};
use crate::money::MicroUsdc;
use crate::payments::wire::Example;

/// Where chat is for sale.
pub const PATH: &str = "/v1/chat/completions";

pub async fn completions(
    State(app): State<App>,
    buyer: Buyer,
    limit: Limit,
    RequestId(id): RequestId,
    headers: HeaderMap,
    RawBody(body): RawBody,
) -> Result<Response, ApiError> {
    if let Buyer::Known(principal) = &buyer {
        limit.admit(&app, principal)?;
    }
    let request = ChatRequest::parse(&body)?;
    let catalog = app.catalog.current();
    let offer = catalog.get(&request.model).ok_or_else(|| unknown_model(&request.model))?;
    if let Buyer::Known(principal) = &buyer {
        key_limits::check_model(principal, &offer.id)?;
    }
    let bounds = request.bounds(offer)?;
    let quoted = app.metering.quote(bounds, offer)?;
    let sale = Sale {
        path: PATH,
        description: "One chat completion",
        price: quoted.price(),
        body: &body,
        model: &request.model,
        example,
    };
    let purchase = match sale.to(&app, buyer, &headers, &limit).await? {
        Ok(purchase) => purchase,
        Err(payment_required) => return Ok(payment_required),
    };
    let wallet = purchase.principal.wallet;
    let order = Order { id, principal: purchase.principal.clone(), claim: purchase.claim.clone() };
    let answered = if request.stream {
        app.metering.stream(order, &request, quoted, offer).await.map(event_stream)
    } else {
        app.metering.answer(order, &request, quoted, offer).await.map(paid_answer)
    };
    let answered = match answered {
        Ok(response) => Ok(response),
        Err(MeteringError::Claimed(claimed)) if claimed.is_same_request => {
            replayed(&app, wallet, &claimed.request_id).await
        }
        Err(MeteringError::Claimed(_)) => Err(purchase.name_is_taken()),
        Err(error) => Err(explain(&app, &sale, &purchase, &request, error)),
    };
    // Also of a request that failed, the payment has been made, and its payer is told so.
    Ok(purchase.with_receipt(&app, answered.into_response()))
}

/// The members that most requests have; others are read too, or passed on to the upstream.
pub fn request_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
            "max_tokens": {"type": "integer", "minimum": 1},
            "stream": {"type": "boolean"},
        },
        "required": ["model", "messages"],
    })
}

pub fn answer_schema() -> Value {
    json!({
        "type": "object",
        "required": ["model", "usage"],
        "properties": {
            "model": {"type": "string"},
            "choices": {"type": "array", "items": {"type": "object"}},
            "usage": {
                "type": "object",
                "required": ["charged_usdc"],
                "properties": {"charged_usdc": {"type": "integer", "description": "Micro-USDC."}},
            },
        },
    })
}

pub fn example(model: &str) -> Example {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    Example {
        body: json!({"model": model, "messages": [message("user", "Hello")], "max_tokens": 200}),
        schema: request_schema(),
        answer: json!({
            "object": "chat.completion",
            "model": model,
            "choices": [{"index": 0, "message": message("assistant", "Hello."), "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10, "charged_usdc": 3},
        }),
    }
}

/// The answer to a request that was run before.
async fn replayed(app: &App, wallet: Wallet, request_id: &str) -> Result<Response, ApiError> {
    let mut response = match app.metering.replay(wallet, request_id).await? {
        Replay::Answer(paid) => paid_answer(paid),
        Replay::Stream(events) => event_stream_of(Body::from(events)),
        Replay::Running => {
            let message = format!(
                "request {request_id}, which this one repeats, is still being run: ask again shortly"
            );
            return Err(ApiError::new(StatusCode::CONFLICT, "request_in_progress", message)
                .with_header(RETRY_AFTER, HeaderValue::from_static("1")));
        }
        Replay::NotKept { charged } => {
            let message = format!(
                "request {request_id}, which this one repeats, was charged {charged} micro-USDC and its answer is \
                 not kept: GET /v1/requests/{request_id} has the receipt; to ask anew, send it under a new name"
            );
            return Err(ApiError::new(StatusCode::CONFLICT, "answer_not_kept", message));
        }
    };
    response.headers_mut().insert(names::IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    Ok(response)
}

fn unknown_model(id: &str) -> ApiError {
    let shown: String = id.chars().take(100).collect();
    ApiError::not_found("model_not_found", format!("there is no model {shown:?}: GET /v1/models lists them"))
        .with_param("model")
}

/// An empty balance is answered with the payment that would cover the request.
fn explain(
    app: &App,
    sale: &Sale<'_>,
    purchase: &Purchase,
    request: &ChatRequest<'_>,
    error: MeteringError,
) -> ApiError {
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
    if purchase.is_stand_in {
        // Another payment of this name would not be taken either.
        let message = format!("{message}; a further payment needs a payment-identifier of its own");
        return ApiError::new(StatusCode::PAYMENT_REQUIRED, "insufficient_balance", message);
    }
    ApiError::new(StatusCode::PAYMENT_REQUIRED, "insufficient_balance", message).with_header(
        names::PAYMENT_REQUIRED,
        x402::quote_header(app, &sale.terms(app, missing), "insufficient_balance"),
    )
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
    event_stream_of(Body::from_stream(events.map(Ok::<_, std::convert::Infallible>)))
}

fn event_stream_of(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}
