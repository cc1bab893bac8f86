//! How anything is sold, whatever it is: a request is read in its format, priced, paid for, and answered in the same
//! format, whatever its upstream speaks. What there is to buy is in `conversation` and `media`.

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts as _, Request as HttpRequest};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::app::App;
use crate::formats::goods::{Goods, Request};
use crate::http::extract::{RawBody, RequestId};
use crate::http::limits::Limit;
use crate::http::purchase::{Buyer, Purchase, Sale};
use crate::http::{ApiError, json_bytes, key_limits, names, set_header, x402};
use crate::id::Wallet;
use crate::metering::{Asked, MeteringError, Order, PaidAnswer, Replay};
use crate::money::MicroUsdc;
use crate::payments::wire::Example;
use crate::pricing::ModelKind;
use crate::providers::Moment;

/// Where something is for sale.
#[derive(Copy, Clone)]
pub struct Endpoint {
    pub path: &'static str,
    pub description: &'static str,
    pub goods: Goods,
    /// Models of which kind are sold there.
    pub kind: ModelKind,
    pub body_type: BodyType,
    /// As what answers come that are not JSON; `None`: there are none.
    pub answered_as: Option<&'static str>,
    /// Whether it can be answered with events.
    pub has_events: bool,
    /// The members that most requests have; others are read too, or passed on to the upstream.
    pub request_schema: fn() -> Value,
    pub answer_schema: fn() -> Value,
    /// A request for a model of this name and its answer.
    pub example: fn(&str) -> Example,
}

/// As what a request is sent.
#[derive(Copy, Clone, PartialEq, Eq)]
pub enum BodyType {
    Json,
    Form,
}

impl BodyType {
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Form => "multipart/form-data",
        }
    }

    /// The same in x402's catalogues of what is for sale.
    pub fn in_bazaar(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Form => "form-data",
        }
    }
}

/// What every answer's usage has, in whatever words beside it.
pub fn charged_usage_schema() -> Value {
    json!({
        "type": "object",
        "required": ["charged_usdc"],
        "properties": {"charged_usdc": {"type": "integer", "description": "Micro-USDC."}},
    })
}

/// By which a client of Anthropic's asks for what is not in its API yet.
const ANTHROPIC_BETA: HeaderName = HeaderName::from_static("anthropic-beta");

/// A request for something that is for sale, as far as it is the same for all.
pub struct Incoming {
    buyer: Buyer,
    limit: Limit,
    id: String,
    headers: HeaderMap,
    body: Bytes,
}

impl FromRequest<App> for Incoming {
    type Rejection = ApiError;

    async fn from_request(request: HttpRequest, app: &App) -> Result<Self, ApiError> {
        let (mut parts, body) = request.into_parts();
        let buyer = Buyer::from_request_parts(&mut parts, app).await?;
        let limit = Limit::from_request_parts(&mut parts, app).await?;
        let RequestId(id) = RequestId::from_request_parts(&mut parts, app).await?;
        let headers = parts.headers.clone();
        let RawBody(body) = RawBody::from_request(HttpRequest::from_parts(parts, body), app).await?;
        Ok(Self { buyer, limit, id, headers, body })
    }
}

pub async fn sell(app: &App, endpoint: &Endpoint, incoming: Incoming) -> Result<Response, ApiError> {
    let Incoming { buyer, limit, id, headers, body } = incoming;
    if let Buyer::Known(principal) = &buyer {
        limit.admit(app, principal)?;
    }
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let request = Request::parse(endpoint.goods, content_type, &body)?;
    let catalog = app.catalog.current();
    let offer = catalog.get(request.model()).ok_or_else(|| unknown_model(request.model()))?;
    if let Buyer::Known(principal) = &buyer {
        key_limits::check_model(principal, &offer.id)?;
    }
    let betas = headers.get(ANTHROPIC_BETA).and_then(|value| value.to_str().ok());
    let asked = Asked { request: &request, body: &body, content_type, id: &id, betas };
    let quoted = app.metering.quote(&asked, &catalog, offer)?;
    let unavailable = quoted.check_available(Moment::now()).err();
    let sale = Sale {
        path: endpoint.path,
        description: endpoint.description,
        price: quoted.price(),
        unavailable,
        pieces: request.pieces(&body),
        model: request.model(),
        example: endpoint.example,
    };
    let purchase = match sale.to(app, buyer, &headers, &limit).await? {
        Ok(purchase) => purchase,
        Err(payment_required) => return Ok(payment_required),
    };
    let wallet = purchase.principal.wallet;
    let order = Order { id, principal: purchase.principal.clone(), claim: purchase.claim.clone() };
    let answered = if request.is_stream() {
        app.metering.stream(order, quoted).await.map(event_stream)
    } else {
        app.metering.answer(order, quoted).await.map(paid_answer)
    };
    let answered = match answered {
        Ok(response) => Ok(response),
        Err(MeteringError::Claimed(claimed)) if claimed.is_same_request => {
            replayed(app, wallet, &claimed.request_id).await
        }
        Err(MeteringError::Claimed(_)) => Err(purchase.name_is_taken()),
        Err(error) => Err(explain(app, &sale, &purchase, &request, error)),
    };
    // Also of a request that failed, the payment has been made, and its payer is told so.
    Ok(purchase.with_receipt(app, answered.into_response()))
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

pub fn unknown_model(id: &str) -> ApiError {
    let shown: String = id.chars().take(100).collect();
    ApiError::not_found("model_not_found", format!("there is no model {shown:?}: GET /v1/models lists them"))
        .with_param("model")
}

/// An empty balance is answered with the payment that would cover the request.
fn explain(
    app: &App,
    sale: &Sale<'_>,
    purchase: &Purchase,
    request: &Request<'_>,
    error: MeteringError,
) -> ApiError {
    let MeteringError::Insufficient { required, available, affordable } = error else { return error.into() };
    // No money would bring it about.
    if let Some(unavailable) = &sale.unavailable {
        return unavailable.clone().into();
    }
    let missing = required.checked_sub(available).unwrap_or(required);
    let advice =
        match (request.limit_name(), affordable.and_then(|completion| request.limit_within(completion))) {
            (Some(limit), Some(tokens)) => {
                format!("the largest {limit} this balance affords is {tokens}: lower {limit} or top up")
            }
            (Some(limit), None) => format!("this balance affords no {limit} at all: lower {limit} or top up"),
            (None, _) => "ask for less or top up".to_owned(),
        };
    let message = format!(
        "this request may cost {} USDC and {} USDC are available; {advice}",
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
    if let Some(content_type) = &paid.content_type {
        set_header(&mut response, CONTENT_TYPE, content_type);
    }
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
