//! `GET /v1/requests` and `/v1/requests/{id}`: receipts.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::app::App;
use crate::clock::Timestamp;
use crate::http::extract::{Page, Reader};
use crate::http::{ApiError, json};
use crate::ledger::Receipt;

pub async fn list(State(app): State<App>, reader: Reader, page: Page) -> Result<Response, ApiError> {
    let before = page.parse_cursor(parse_cursor)?;
    let mut receipts = app.ledger.receipts(reader.0.wallet, before, page.rows()).await?;
    let next_cursor =
        page.cut(&mut receipts, |receipt| format!("{}.{}", receipt.created_at.millis(), receipt.id));
    let data: Vec<_> = receipts.iter().map(render).collect();
    Ok(json(StatusCode::OK, &json!({"data": data, "next_cursor": next_cursor})))
}

pub async fn get(
    State(app): State<App>,
    Path(id): Path<String>,
    reader: Reader,
) -> Result<Response, ApiError> {
    let receipt = app.ledger.receipt(reader.0.wallet, &id).await?;
    let receipt = receipt.ok_or_else(|| {
        ApiError::not_found("request_not_found", "this wallet has no finished request of that id")
    })?;
    Ok(json(StatusCode::OK, &render(&receipt)))
}

/// A receipt's time and id, as `next_cursor` gives them.
fn parse_cursor(cursor: &str) -> Option<(Timestamp, String)> {
    let (ms, id) = cursor.split_once('.')?;
    Some((Timestamp::from_millis(ms.parse().ok()?), id.to_owned()))
}

fn render(receipt: &Receipt) -> Value {
    let terms = &receipt.terms;
    let usage = &receipt.usage;
    let raw = receipt.usage_raw.clone().and_then(|raw| RawValue::from_string(raw).ok());
    json!({
        "id": receipt.id,
        "object": "request",
        "wallet": receipt.wallet.to_string(),
        "api_key_id": receipt.api_key_id,
        "model": terms.model,
        "provider": terms.provider,
        "upstream_model": terms.upstream_model,
        "outcome": receipt.outcome.as_str(),
        "reason": receipt.reason,
        "usage": {
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
            "reasoning_tokens": usage.reasoning,
        },
        "usage_reported": raw,
        "prices": {
            "unit": "USD per 1M tokens, at cost",
            "prompt": terms.prices.prompt.to_usd_per_million(),
            "cached_prompt": terms.prices.cached_prompt.to_usd_per_million(),
            "completion": terms.prices.completion.to_usd_per_million(),
        },
        "markup_bps": terms.markup_bps,
        "hold_usdc": receipt.hold.get(),
        "cost_usd": receipt.cost.to_usd(),
        "charged_usdc": receipt.charged.get(),
        "created_at": receipt.created_at.rfc3339(),
        "ended_at": receipt.ended_at.rfc3339(),
    })
}
