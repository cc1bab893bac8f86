//! `/v1/withdrawals`: a wallet takes unspent balance out, to itself.

use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, HeaderValue};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::app::App;
use crate::auth::Purpose;
use crate::clock::Timestamp;
use crate::http::extract::{Caller, Page, PathText, Signed, SmallBody};
use crate::http::purchase::idempotency_key;
use crate::http::{ApiError, json};
use crate::money::MicroUsdc;
use crate::payments::{Payment, WithdrawalError};

/// A withdrawal, and its receipt. Amounts are micro-USDC.
#[derive(Serialize, JsonSchema)]
pub struct WithdrawalBody {
    id: i64,
    /// Whose it is, and where it goes.
    wallet: String,
    amount_usdc: i64,
    /// `pending`; `sent`, in a block that is not final yet; `finalized`; or `failed`, and the amount is the
    /// wallet's again.
    status: &'static str,
    /// Of the transaction that carries it out, or may; null until one is signed.
    tx_hash: Option<String>,
    block_number: Option<i64>,
    /// Of the treasury's authorization (EIP-3009), which the token carries out once.
    nonce: String,
    /// RFC 3339. By then it is sent, or never will be.
    valid_before: String,
    /// Why it failed.
    reason: Option<String>,
    /// RFC 3339.
    created_at: String,
    /// RFC 3339.
    updated_at: String,
}

#[derive(Serialize, JsonSchema)]
pub struct WithdrawalList {
    wallet: String,
    /// CAIP-2.
    network: String,
    /// Micro-USDC that could be withdrawn now, but for the caps of a day.
    withdrawable_usdc: i64,
    withdrawals: Vec<WithdrawalBody>,
    /// Where the next page begins; null at the end.
    next_cursor: Option<String>,
}

pub async fn create(
    State(app): State<App>,
    headers: HeaderMap,
    SmallBody(body): SmallBody,
) -> Result<Response, ApiError> {
    if !app.payments.pays_out() {
        return Err(WithdrawalError::Off.into());
    }
    // What cannot be asked for is not to use a signature up.
    let key = idempotency_key(&headers)?;
    let amount = requested_amount(&app, &body)?;
    let signed = Signed::from_body(&body)?;
    let wallet = signed.verify(&app, Purpose::Write).await?;
    let name = match key {
        Some(key) => format!("key {key}"),
        // A message is good for one change, so it names one.
        None => format!("message {}", signed.message()),
    };
    let withdrawal = app.payments.withdraw(wallet, amount, &name).await?;
    let status = match withdrawal.withdrawal_status() {
        "pending" | "sent" => StatusCode::ACCEPTED,
        _ => StatusCode::OK,
    };
    Ok(unstored(json(status, &describe(&withdrawal))))
}

pub async fn list(State(app): State<App>, Caller(caller): Caller, page: Page) -> Result<Response, ApiError> {
    let before = page.parse_cursor(|cursor| cursor.parse().ok())?;
    let mut withdrawals = app.payments.withdrawals_of(caller.wallet, before, page.rows()).await?;
    let next_cursor = page.cut(&mut withdrawals, |withdrawal| withdrawal.id.to_string());
    let withdrawable = match app.payments.pays_out() {
        true => app.payments.withdrawable(caller.wallet).await?,
        false => MicroUsdc::ZERO,
    };
    let body = WithdrawalList {
        wallet: caller.wallet.to_string(),
        network: app.config.payments.network(),
        withdrawable_usdc: withdrawable.get(),
        withdrawals: withdrawals.iter().map(describe).collect(),
        next_cursor,
    };
    Ok(unstored(json(StatusCode::OK, &body)))
}

pub async fn get(
    State(app): State<App>,
    PathText(id): PathText,
    Caller(caller): Caller,
) -> Result<Response, ApiError> {
    let found = match id.parse() {
        Ok(id) => app.payments.withdrawal(caller.wallet, id).await?,
        Err(_) => None,
    };
    let found = found.ok_or_else(|| {
        let message = "this wallet has no such withdrawal: GET /v1/withdrawals lists them";
        ApiError::not_found("withdrawal_not_found", message)
    })?;
    Ok(unstored(json(StatusCode::OK, &describe(&found))))
}

fn describe(withdrawal: &Payment) -> WithdrawalBody {
    let status = withdrawal.withdrawal_status();
    let authorization = &withdrawal.authorization;
    let valid_before = i64::try_from(authorization.valid_before).unwrap_or_default();
    WithdrawalBody {
        id: withdrawal.id,
        wallet: withdrawal.wallet().to_string(),
        amount_usdc: withdrawal.value.get(),
        status,
        tx_hash: withdrawal.tx_hash.clone(),
        block_number: withdrawal.block_number.filter(|_| status != "pending"),
        nonce: authorization.nonce.to_string(),
        valid_before: Timestamp::from_seconds(valid_before).rfc3339(),
        reason: withdrawal.last_error.clone().filter(|_| status == "failed"),
        created_at: withdrawal.created_at.rfc3339(),
        updated_at: withdrawal.updated_at.rfc3339(),
    }
}

/// The body's `amount`, exactly as it is written.
fn requested_amount(app: &App, body: &[u8]) -> Result<MicroUsdc, ApiError> {
    #[derive(Deserialize)]
    struct Wire {
        amount: Option<Box<RawValue>>,
    }
    let wire: Wire = serde_json::from_slice(body).map_err(|_| {
        let message = "the body must be a JSON object {amount, message, signature}";
        ApiError::invalid("invalid_json", message)
    })?;
    let min = app.config.payments.withdrawals.min;
    let raw = wire.amount.as_deref().map(RawValue::get).unwrap_or_default();
    // A decimal string without escapes, or a JSON number: either way its text is the decimal.
    let text = raw.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(raw);
    match MicroUsdc::parse_usd(text) {
        Ok(amount) if amount >= min => Ok(amount),
        _ => Err(WithdrawalError::TooLittle(min).into()),
    }
}

fn unstored(mut response: Response) -> Response {
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
