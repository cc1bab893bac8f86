//! `POST /v1/topup` (x402) and the history of top-ups.

use axum::extract::State;
use axum::http::header::{HeaderValue, RETRY_AFTER};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::Response;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::app::App;
use crate::attest::{self, AttestError, Attestor, Signature};
use crate::http::extract::{Caller, Page, PathText, SmallBody, wallet_in_path};
use crate::http::limits::Limit;
use crate::http::{ApiError, json, x402};
use crate::money::MicroUsdc;
use crate::payments::wire::{Payload, Reason, Requirement, payment_identifier_extension};
use crate::payments::{Kind, Payment, PaymentError};

pub const PATH: &str = "/v1/topup";

/// A top-up that is credited. Amounts are micro-USDC.
#[derive(Serialize, JsonSchema)]
pub struct Credited {
    /// What the wallet had when this was credited.
    balance_usdc: i64,
    credited_usdc: i64,
    /// Who was credited.
    wallet: String,
    tx_hash: String,
    topup_id: i64,
    /// What can be shown to others, as `GET /v1/topups/{wallet}` has it.
    receipt: Topup,
}

/// A payment that is on its way: the same one, sent again, tells what became of it.
#[derive(Serialize, JsonSchema)]
pub struct Pending {
    /// `pending`.
    status: &'static str,
    topup_id: i64,
    tx_hash: Option<String>,
}

#[derive(Serialize, JsonSchema)]
pub struct TopupList {
    wallet: String,
    /// CAIP-2.
    network: String,
    topups: Vec<Topup>,
    /// Where the next page begins; null at the end.
    next_cursor: Option<String>,
}

/// A payment, where it stands, and the gateway's signature of that.
#[derive(Serialize, JsonSchema)]
struct Topup {
    #[serde(flatten)]
    contents: TopupContents,
    signature: Signature,
}

#[derive(Serialize, JsonSchema)]
struct TopupContents {
    id: i64,
    object: &'static str,
    /// Who is credited.
    wallet: String,
    /// The payer: the same, unless the operator has given a deposit to another wallet.
    from: String,
    /// `payment`, by an authorization that was sent here; or `deposit`, sent to the treasury on the chain.
    kind: &'static str,
    /// Micro-USDC.
    amount_usdc: i64,
    /// `pending`, `credited`, `finalized`, `failed` or `reversed`.
    status: &'static str,
    tx_hash: Option<String>,
    /// CAIP-2.
    network: String,
    /// The token.
    asset: String,
    /// Where it went.
    pay_to: String,
    /// RFC 3339.
    created_at: String,
    /// RFC 3339: when it came to this.
    updated_at: String,
}

pub async fn topup(
    State(app): State<App>,
    uri: Uri,
    headers: HeaderMap,
    limit: Limit,
    SmallBody(body): SmallBody,
) -> Result<Response, ApiError> {
    let amount = requested_amount(&app, &body)?;
    // `?x402=1` asks for a body that is strict x402 v1.
    let strict_v1 = uri.query().is_some_and(|query| query.split('&').any(|part| part == "x402=1"));
    let Some(header) = x402::payment_header(&headers)? else {
        let amount = amount.ok_or_else(|| invalid_amount(&app))?;
        return Ok(payment_required(&app, amount, strict_v1, None));
    };
    let payload = Payload::parse(header).map_err(|e| ApiError::invalid("invalid_payload", e.to_string()))?;
    let payer = payload.authorization.from;
    limit.admit_payment(&app, payer)?;
    match app.payments.pay(&payload, amount).await {
        Ok(payment) => report(&app, &payment, amount, strict_v1).await,
        Err(PaymentError::Refused { reason, sentence }) => {
            limit.payment_refused(&app, payer);
            // Without an amount the fresh terms ask for what was authorised, where that is allowed.
            let (min, max) = (app.config.payments.min_topup, app.config.payments.max_topup);
            let authorised = payload.value();
            let amount = amount.or(authorised.filter(|value| (min..=max).contains(value))).unwrap_or(min);
            Ok(payment_required(&app, amount, strict_v1, Some((reason, sentence))))
        }
        Err(PaymentError::OutOfBounds) => Err(invalid_amount(&app)),
        Err(other) => Err(other.once_sent().into()),
    }
}

pub async fn list(
    State(app): State<App>,
    PathText(wallet): PathText,
    caller: Caller,
    page: Page,
) -> Result<Response, ApiError> {
    let wallet = wallet_in_path(&wallet)?;
    caller.check(wallet)?;
    let before = page.parse_cursor(|cursor| cursor.parse().ok())?;
    let mut payments = app.payments.of_wallet(wallet, before, page.rows()).await?;
    let next_cursor = page.cut(&mut payments, |payment| payment.id.to_string());
    let attestor = app.attestor.clone();
    // A hundred signatures take as many tenths of a millisecond, for which others should not wait.
    let signed = tokio::task::spawn_blocking(move || {
        payments.iter().map(|payment| signed(&attestor, payment)).collect::<Result<_, _>>()
    });
    let body = TopupList {
        wallet: wallet.to_string(),
        network: app.config.payments.network(),
        topups: signed.await.map_err(|e| ApiError::unavailable(&e))??,
        next_cursor,
    };
    Ok(json(StatusCode::OK, &body))
}

fn signed(attestor: &Attestor, payment: &Payment) -> Result<Topup, AttestError> {
    let contents = TopupContents {
        id: payment.id,
        object: attest::Kind::PaymentReceipt.object(),
        kind: match payment.kind {
            Kind::Deposit => "deposit",
            // Withdrawals are not among these.
            Kind::Authorization | Kind::Withdrawal => "payment",
        },
        wallet: payment.wallet().to_string(),
        from: payment.authorization.from.to_string(),
        amount_usdc: payment.value.get(),
        status: payment.state.status(),
        tx_hash: payment.tx_hash.clone(),
        network: payment.network(),
        asset: payment.asset.to_string(),
        pay_to: payment.authorization.to.to_string(),
        created_at: payment.created_at.rfc3339(),
        updated_at: payment.updated_at.rfc3339(),
    };
    let text = serde_json::to_string(&contents).map_err(|e| AttestError::NotAStatement(e.to_string()))?;
    Ok(Topup { signature: attestor.sign(&text)?, contents })
}

/// The body's `amount`, exactly as it is written; `None` for an empty body.
fn requested_amount(app: &App, body: &[u8]) -> Result<Option<MicroUsdc>, ApiError> {
    #[derive(Deserialize)]
    struct Wire {
        amount: Option<Box<RawValue>>,
    }
    if body.trim_ascii().is_empty() {
        return Ok(None);
    }
    let wire: Wire = serde_json::from_slice(body).map_err(|_| {
        ApiError::invalid("invalid_json", "the body must be a JSON object such as {\"amount\": 5}")
    })?;
    let Some(raw) = wire.amount else { return Ok(None) };
    // A decimal string without escapes, or a JSON number: either way its text is the decimal.
    let text = raw.get();
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    let amount = MicroUsdc::parse_usd(text).map_err(|_| invalid_amount(app))?;
    let payments = &app.config.payments;
    if amount < payments.min_topup || amount > payments.max_topup {
        return Err(invalid_amount(app));
    }
    Ok(Some(amount))
}

fn invalid_amount(app: &App) -> ApiError {
    let payments = &app.config.payments;
    let message = format!(
        "amount must be USD between {} and {}, with at most 6 decimals, such as {{\"amount\": 5}}",
        payments.min_topup.to_usd(),
        payments.max_topup.to_usd()
    );
    ApiError::invalid("invalid_amount", message).with_param("amount")
}

/// What a top-up of an amount asks for.
fn terms(app: &App, amount: MicroUsdc) -> Requirement {
    let terms = x402::requirement(app, PATH, "Top up the paying wallet's Farebox balance", amount);
    Requirement { extensions: Some(x402::extensions([payment_identifier_extension()])), ..terms }
}

/// 402 with terms; after a refusal, with what was wrong: a code in the header, a sentence in the body.
fn payment_required(
    app: &App,
    amount: MicroUsdc,
    strict_v1: bool,
    refusal: Option<(Reason, String)>,
) -> Response {
    x402::payment_required(app, &terms(app, amount), strict_v1, refusal)
}

/// What became of a payment: credited, still pending, or no longer possible.
async fn report(
    app: &App,
    payment: &Payment,
    amount: Option<MicroUsdc>,
    strict_v1: bool,
) -> Result<Response, ApiError> {
    if payment.state.is_credited() {
        // Not what there is now: anybody can send what they have read off the chain, and of a balance only its
        // owner is told.
        let balance = app.ledger.balance_when_credited(payment.id).await;
        let balance = balance.map_err(|e| PaymentError::Uncertain(e.to_string()))?;
        let body = Credited {
            balance_usdc: balance.get(),
            credited_usdc: payment.value.get(),
            wallet: payment.wallet().to_string(),
            tx_hash: payment.tx_hash.clone().unwrap_or_default(),
            topup_id: payment.id,
            receipt: signed(&app.attestor, payment)?,
        };
        let response = json(StatusCode::OK, &body);
        // One that was made for a request was not served here.
        return Ok(if payment.request_hash.is_none() {
            x402::with_signed_receipt(app, response, payment, PATH)
        } else {
            x402::with_receipt(app, response, payment, Ok(()))
        });
    }
    if let Some(reason) = payment.refused_so_far() {
        return Ok(x402::refused_so_far(app, payment, reason));
    }
    if payment.state.status() == "pending" {
        let body = Pending { status: "pending", topup_id: payment.id, tx_hash: payment.tx_hash.clone() };
        let mut response = json(StatusCode::ACCEPTED, &body);
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
        return Ok(x402::with_receipt(app, response, payment, Err(Reason::SettlementPending)));
    }
    let why = payment.last_error.as_deref().unwrap_or("the transfer did not go through");
    let refusal = (Reason::TransactionFailed, format!("{why}; nothing was taken: sign a new payment"));
    let response = payment_required(app, amount.unwrap_or(payment.value), strict_v1, Some(refusal));
    Ok(x402::with_receipt(app, response, payment, Err(Reason::TransactionFailed)))
}
