//! `GET /v1/usage/{wallet}`: what a wallet has, and what its keys have used.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::app::App;
use crate::http::extract::{Caller, PathText, wallet_in_path};
use crate::http::{ApiError, json};
use crate::ledger::UsageTotal;
use crate::money::{MicroUsdc, PicoUsd};

/// What a wallet has and has used. Amounts in `…_usdc` are micro-USDC.
#[derive(Serialize, JsonSchema)]
pub struct WalletUsage {
    wallet: String,
    balance_usdc: i64,
    locked_usdc: i64,
    available_usdc: i64,
    /// What later top-ups repay first; absent where nothing is owed.
    #[serde(skip_serializing_if = "Option::is_none")]
    debt_usdc: Option<i64>,
    keys: Vec<KeyUsage>,
}

#[derive(Serialize, JsonSchema)]
struct KeyUsage {
    /// Null for calls without a key.
    api_key_id: Option<i64>,
    label: Option<String>,
    request_count: i64,
    total_prompt_tokens: i64,
    total_completion_tokens: i64,
    total_charged_usdc: i64,
    /// Charged − cost, rounded once to six decimals: a decimal written as a JSON number.
    #[schemars(with = "f64")]
    total_platform_revenue_usd: Option<Box<RawValue>>,
}

pub async fn usage(
    State(app): State<App>,
    PathText(wallet): PathText,
    caller: Caller,
) -> Result<Response, ApiError> {
    let wallet = wallet_in_path(&wallet)?;
    caller.check(wallet)?;
    let balance = app.ledger.balance(wallet).await?;
    let totals = app.ledger.usage_totals(wallet).await?;
    // Every key has a row, used or not; calls without a key have one if there were any.
    let mut rows: BTreeMap<Option<i64>, KeyUsage> = BTreeMap::new();
    for key in app.keys.list(wallet, None, i64::MAX).await? {
        let unused = UsageTotal::unused(Some(key.id));
        rows.insert(Some(key.id), key_usage(unused, key.label));
    }
    for total in totals {
        let label = rows.remove(&total.api_key_id).and_then(|row| row.label);
        rows.insert(total.api_key_id, key_usage(total, label));
    }
    let body = WalletUsage {
        wallet: wallet.to_string(),
        balance_usdc: balance.balance.get(),
        locked_usdc: balance.locked.get(),
        available_usdc: balance.available().get(),
        debt_usdc: Some(balance.debt.get()).filter(|debt| *debt > 0),
        keys: rows.into_values().collect(),
    };
    Ok(json(StatusCode::OK, &body))
}

fn key_usage(total: UsageTotal, label: Option<String>) -> KeyUsage {
    KeyUsage {
        api_key_id: total.api_key_id,
        label,
        request_count: total.request_count,
        total_prompt_tokens: total.prompt_tokens,
        total_completion_tokens: total.completion_tokens,
        total_charged_usdc: total.charged.get(),
        total_platform_revenue_usd: RawValue::from_string(total.revenue.to_usd_rounded()).ok(),
    }
}

impl UsageTotal {
    fn unused(api_key_id: Option<i64>) -> Self {
        Self {
            api_key_id,
            request_count: 0,
            prompt_tokens: 0,
            completion_tokens: 0,
            charged: MicroUsdc::ZERO,
            revenue: PicoUsd::ZERO,
        }
    }
}
