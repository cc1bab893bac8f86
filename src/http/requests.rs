//! `GET /v1/requests` and `/v1/requests/{id}`: receipts.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::app::App;
use crate::archive;
use crate::clock::Timestamp;
use crate::http::extract::{Caller, Page, PathText};
use crate::http::{ApiError, json};
use crate::id;
use crate::ledger::Receipt;

pub async fn list(State(app): State<App>, caller: Caller, page: Page) -> Result<Response, ApiError> {
    let before = page.parse_cursor(parse_cursor)?;
    let mut receipts = app.ledger.receipts(caller.0.wallet, before, page.rows()).await?;
    let next_cursor =
        page.cut(&mut receipts, |receipt| format!("{}.{}", receipt.created_at.millis(), receipt.id));
    let data = receipts.iter().map(render).collect();
    let archived_before = archive::archived_before(&app.db).await?.map(Timestamp::rfc3339);
    Ok(json(StatusCode::OK, &ReceiptList { data, next_cursor, archived_before }))
}

pub async fn get(
    State(app): State<App>,
    PathText(id): PathText,
    caller: Caller,
) -> Result<Response, ApiError> {
    if let Some(receipt) = app.ledger.receipt(caller.0.wallet, &id).await? {
        return Ok(json(StatusCode::OK, &render(&receipt)));
    }
    let archived_before = archive::archived_before(&app.db).await?;
    let began = id::time_of_request(&id).map(Timestamp::from_millis);
    Err(match archived_before.filter(|before| began.is_some_and(|began| began < *before)) {
        Some(before) => archived(before),
        None => ApiError::not_found("request_not_found", "this wallet has no finished request of that id"),
    })
}

/// Also where there never was one of that id: which there were only the archive knows.
fn archived(before: Timestamp) -> ApiError {
    let message = format!(
        "receipts of requests of before {} have been moved to the operator's archive: ask the operator for \
         it by its id",
        before.rfc3339()
    );
    ApiError::new(StatusCode::GONE, "request_archived", message)
}

/// A receipt's time and id, as `next_cursor` gives them.
fn parse_cursor(cursor: &str) -> Option<(Timestamp, String)> {
    let (ms, id) = cursor.split_once('.')?;
    Some((Timestamp::from_millis(ms.parse().ok()?), id.to_owned()))
}

/// What a request used, at which prices, what it cost and what was charged for it.
#[derive(Serialize, JsonSchema)]
pub struct ReceiptBody {
    id: String,
    object: &'static str,
    wallet: String,
    api_key_id: Option<i64>,
    model: String,
    provider: String,
    upstream_model: String,
    /// `settled`, `estimated` or `released`.
    outcome: &'static str,
    /// Why it ended otherwise than by a whole answer with usage.
    reason: Option<String>,
    usage: UsageBody,
    /// The upstream's own words, byte for byte.
    usage_reported: Option<Box<RawValue>>,
    prices: PricesBody,
    /// Basis points added to cost.
    markup_bps: u32,
    /// Micro-USDC that were held.
    hold_usdc: i64,
    /// USD, a decimal.
    cost_usd: String,
    /// Micro-USDC.
    charged_usdc: i64,
    /// RFC 3339.
    created_at: String,
    /// RFC 3339.
    ended_at: String,
}

/// Tokens. Cached ones are among the prompt's, reasoning ones among the completion's.
#[derive(Serialize, JsonSchema)]
struct UsageBody {
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
    reasoning_tokens: u64,
}

#[derive(Serialize, JsonSchema)]
struct PricesBody {
    unit: &'static str,
    prompt: String,
    cached_prompt: String,
    completion: String,
}

#[derive(Serialize, JsonSchema)]
pub struct ReceiptList {
    data: Vec<ReceiptBody>,
    /// Where the next page begins; null at the end.
    next_cursor: Option<String>,
    /// RFC 3339. Receipts of requests of before this may have been moved to the operator's archive; absent
    /// where none were.
    #[serde(skip_serializing_if = "Option::is_none")]
    archived_before: Option<String>,
}

fn render(receipt: &Receipt) -> ReceiptBody {
    let terms = &receipt.terms;
    let usage = &receipt.usage;
    ReceiptBody {
        id: receipt.id.clone(),
        object: "request",
        wallet: receipt.wallet.to_string(),
        api_key_id: receipt.api_key_id,
        model: terms.model.clone(),
        provider: terms.provider.clone(),
        upstream_model: terms.upstream_model.clone(),
        outcome: receipt.outcome.as_str(),
        reason: receipt.reason.clone(),
        usage: UsageBody {
            prompt_tokens: usage.prompt,
            cached_tokens: usage.cached,
            completion_tokens: usage.completion,
            reasoning_tokens: usage.reasoning,
        },
        usage_reported: receipt.usage_raw.clone().and_then(|raw| RawValue::from_string(raw).ok()),
        prices: PricesBody {
            unit: "USD per 1M tokens, at cost",
            prompt: terms.prices.prompt.to_usd_per_million(),
            cached_prompt: terms.prices.cached_prompt.to_usd_per_million(),
            completion: terms.prices.completion.to_usd_per_million(),
        },
        markup_bps: terms.markup_bps,
        hold_usdc: receipt.hold.get(),
        cost_usd: receipt.cost.to_usd(),
        charged_usdc: receipt.charged.get(),
        created_at: receipt.created_at.rfc3339(),
        ended_at: receipt.ended_at.rfc3339(),
    }
}
