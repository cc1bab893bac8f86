//! `GET /v1/requests` and `/v1/requests/{id}`: receipts.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::app::App;
use crate::archive;
use crate::attest::{self, AttestError, Attestor, Signature};
use crate::clock::Timestamp;
use crate::http::extract::{Caller, Page, PathText};
use crate::http::{ApiError, json};
use crate::id;
use crate::ledger::Receipt;
use crate::money::PicoUsd;
use crate::pricing::{Terms, Unit, UnitPrices, Usage};

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
        return Ok(json(StatusCode::OK, &signed(&app.attestor, &receipt)?));
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
    #[serde(flatten)]
    contents: ReceiptContents,
    /// The upstream's own words, byte for byte.
    usage_reported: Option<Box<RawValue>>,
    /// The gateway's, of all but `usage_reported`; in lists there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    signature: Option<Signature>,
}

/// What is signed of a receipt.
#[derive(Serialize, JsonSchema)]
struct ReceiptContents {
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
    /// Everything that was used, by unit: each token under one of them. Only what there is any of.
    #[schemars(with = "std::collections::BTreeMap<String, u64>")]
    usage_units: Usage,
    /// The units of these that had no price: charged as text where they are tokens, else not at all.
    unpriced_units: Vec<&'static str>,
    /// Of `usage_reported`, hex; null where that is.
    usage_reported_sha256: Option<String>,
    prices: PricesBody,
    /// Basis points added to cost.
    markup_bps: u32,
    /// Micro-USDC that were held.
    hold_usdc: i64,
    /// USD, a decimal.
    cost_usd: String,
    /// The same, exactly: millionths of a millionth of a USD, a whole number.
    cost_pico_usd: String,
    /// What the upstream said that it charges, USD; null where it did not say.
    upstream_cost_usd: Option<String>,
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

/// As agreed when the request was held. Of what is not listed, the price of what it is a kind of was taken.
#[derive(Serialize, JsonSchema)]
struct PricesBody {
    unit: &'static str,
    prompt: String,
    cached_prompt: String,
    completion: String,
    /// All that is listed, each as USD for one of its unit: those below all tiers.
    per_unit: BTreeMap<&'static str, String>,
    /// Those of prompts of more than so many tokens.
    tiers: Vec<TierBody>,
    images: Vec<ImageBody>,
    /// Of the catalogue they are from; null on receipts of old.
    version: Option<String>,
}

#[derive(Serialize, JsonSchema)]
struct TierBody {
    above_prompt_tokens: u64,
    per_unit: BTreeMap<&'static str, String>,
}

#[derive(Serialize, JsonSchema)]
struct ImageBody {
    size: Option<String>,
    quality: Option<String>,
    /// For a picture.
    usd: String,
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

/// A receipt with the gateway's signature.
pub fn signed(attestor: &Attestor, receipt: &Receipt) -> Result<ReceiptBody, AttestError> {
    let body = render(receipt);
    let contents =
        serde_json::to_string(&body.contents).map_err(|e| AttestError::NotAStatement(e.to_string()))?;
    Ok(ReceiptBody { signature: Some(attestor.sign(&contents)?), ..body })
}

fn render(receipt: &Receipt) -> ReceiptBody {
    let terms = &receipt.terms;
    let usage = &receipt.usage;
    let unpriced = terms.prices.unpriced_in(usage);
    let usage_reported = receipt.usage_raw.clone().and_then(|raw| RawValue::from_string(raw).ok());
    let contents = ReceiptContents {
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
            prompt_tokens: usage.prompt_tokens(),
            cached_tokens: usage.cached_tokens(),
            completion_tokens: usage.completion_tokens(),
            reasoning_tokens: usage.count(Unit::Reasoning),
        },
        usage_units: *usage,
        unpriced_units: unpriced.iter().map(Unit::counted_key).collect(),
        usage_reported_sha256: usage_reported.as_ref().map(|reported| attest::report_hash(reported.get())),
        prices: prices_body(terms),
        markup_bps: terms.markup_bps,
        hold_usdc: receipt.hold.get(),
        cost_usd: receipt.cost.to_usd(),
        cost_pico_usd: receipt.cost.get().to_string(),
        upstream_cost_usd: receipt.upstream_cost.map(PicoUsd::to_usd),
        charged_usdc: receipt.charged.get(),
        created_at: receipt.created_at.rfc3339(),
        ended_at: receipt.ended_at.rfc3339(),
    };
    ReceiptBody { contents, usage_reported, signature: None }
}

fn prices_body(terms: &Terms) -> PricesBody {
    let prices = &terms.prices;
    let million = |unit| prices.charged(unit).to_usd_per_million();
    let tiers = prices.tiers().iter();
    let images = prices.images().iter();
    PricesBody {
        unit: "USD per 1M tokens, at cost",
        prompt: million(Unit::Prompt),
        cached_prompt: million(Unit::CachedPrompt),
        completion: million(Unit::Completion),
        per_unit: per_unit(prices.rates()),
        tiers: tiers
            .map(|tier| TierBody { above_prompt_tokens: tier.above, per_unit: per_unit(&tier.rates) })
            .collect(),
        images: images
            .map(|image| ImageBody {
                size: image.size.clone(),
                quality: image.quality.clone(),
                usd: image.price.to_usd_per(1),
            })
            .collect(),
        version: terms.price_version.map(|version| version.to_string()),
    }
}

fn per_unit(rates: &UnitPrices) -> BTreeMap<&'static str, String> {
    rates.iter().map(|(unit, price)| (unit.counted_key(), price.to_usd_per(1))).collect()
}
