//! What anyone may ask: is it up, what does it take, what does it sell.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::app::App;
use crate::attest::KnownKey;
use crate::clock::Timestamp;
use crate::http::json;
use crate::money::MicroUsdc;
use crate::payments::{ChainHealth, RelayerGas};
use crate::pricing::{ModelKind, Offer, Unit};

#[derive(Serialize, JsonSchema)]
pub struct Health {
    status: &'static str,
}

pub async fn health() -> Response {
    json(StatusCode::OK, &Health { status: "ok" })
}

#[derive(Serialize, JsonSchema)]
pub struct Ready {
    /// `ready`, or `degraded`.
    status: &'static str,
    checks: Checks,
}

/// Each `ok`, or what is wrong.
#[derive(Serialize, JsonSchema)]
struct Checks {
    database: &'static str,
    chain: String,
    journal: String,
    /// Where one is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    facilitator: Option<String>,
}

/// Ready for requests with an API key: only the database must be there for those.
pub async fn ready(State(app): State<App>) -> Response {
    // At once, since a database that is away is waited for.
    let (database, slow) = tokio::join!(app.db.ping(), app.payments.slow());
    let journal = match slow {
        Ok(0) => "ok".to_owned(),
        Ok(slow) => format!("{slow} payments have been unfinished for more than 10 minutes"),
        Err(_) => "cannot be read".to_owned(),
    };
    let chain = match app.payments.health() {
        ChainHealth::Ok => low_gas(&app.payments.gas()).unwrap_or_else(|| "ok".to_owned()),
        ChainHealth::Unchecked => "not checked yet".to_owned(),
        ChainHealth::Unreachable(why) | ChainHealth::Mismatch(why) => why,
    };
    let facilitator = app.payments.facilitator_health();
    let facilitator = facilitator.map(|health| health.err().unwrap_or_else(|| "ok".to_owned()));
    let settles = facilitator.as_ref().is_none_or(|health| health == "ok");
    let all_ok = database.is_ok() && journal == "ok" && chain == "ok" && settles;
    let serving = database.is_ok() && !app.tasks.is_stopping();
    let body = Ready {
        status: if all_ok && serving { "ready" } else { "degraded" },
        checks: Checks {
            database: if database.is_ok() { "ok" } else { "does not answer" },
            chain,
            journal,
            facilitator,
        },
    };
    json(if serving { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &body)
}

/// Which relayers will soon not be able to send top-ups, if there are any.
fn low_gas(gas: &[RelayerGas]) -> Option<String> {
    let low: Vec<_> = gas.iter().filter(|gas| gas.is_low).map(|gas| gas.relayer.to_string()).collect();
    (!low.is_empty()).then(|| format!("low on gas, send ETH to the relayer: {}", low.join(", ")))
}

#[derive(Serialize, JsonSchema)]
pub struct Status {
    version: &'static str,
    /// CAIP-2.
    network: String,
    /// The token that is taken.
    asset: String,
    asset_name: String,
    asset_decimals: u8,
    /// The treasury.
    pay_to: String,
    /// Basis points added to cost.
    markup_bps: u32,
    min_topup_usd: String,
    max_topup_usd: String,
    /// `ok`, or `unavailable`.
    payments: &'static str,
    /// On which terms USDC that is just sent to `pay_to` is credited; absent: it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    deposits: Option<Deposits>,
    /// On which terms balances are paid out again; absent: they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    withdrawals: Option<Withdrawals>,
    /// The address of the key that receipts are signed with now.
    receipt_signer: String,
    /// That, and those of before, newest first: what they have signed is the gateway's too.
    receipt_signers: Vec<ReceiptSigner>,
}

#[derive(Serialize, JsonSchema)]
struct ReceiptSigner {
    address: String,
    /// RFC 3339: when it was first used.
    since: String,
    /// RFC 3339. Somebody else may have this key: what it signs is worth nothing any more. Null for all others.
    revoked_at: Option<String>,
}

#[derive(Serialize, JsonSchema)]
struct Withdrawals {
    min_usd: String,
    /// Of a wallet within 24 hours; absent: any amount.
    #[serde(skip_serializing_if = "Option::is_none")]
    wallet_day_usd: Option<String>,
}

#[derive(Serialize, JsonSchema)]
struct Deposits {
    min_usd: String,
}

/// What an agent needs to know before it pays.
pub async fn status(State(app): State<App>) -> Response {
    let payments = &app.config.payments;
    let up = app.payments.health() == ChainHealth::Ok;
    let body = Status {
        version: env!("CARGO_PKG_VERSION"),
        network: payments.network(),
        asset: payments.token.address.to_string(),
        asset_name: payments.token.name.clone(),
        asset_decimals: 6,
        pay_to: payments.pay_to.to_string(),
        markup_bps: app.config.markup.get(),
        min_topup_usd: payments.min_topup.to_usd(),
        max_topup_usd: payments.max_topup.to_usd(),
        payments: if up { "ok" } else { "unavailable" },
        receipt_signer: app.attestor.signer().to_string(),
        receipt_signers: app.attestor.known_keys().into_iter().map(receipt_signer).collect(),
        deposits: payments.deposits.as_ref().map(|deposits| Deposits { min_usd: deposits.min.to_usd() }),
        withdrawals: app.payments.pays_out().then(|| {
            let terms = &payments.withdrawals;
            let daily = Some(terms.wallet_daily).filter(|cap| *cap > MicroUsdc::ZERO);
            Withdrawals { min_usd: terms.min.to_usd(), wallet_day_usd: daily.map(MicroUsdc::to_usd) }
        }),
    };
    json(StatusCode::OK, &body)
}

fn receipt_signer(key: KnownKey) -> ReceiptSigner {
    ReceiptSigner {
        address: key.address.to_string(),
        since: key.since.rfc3339(),
        revoked_at: key.revoked_at.map(Timestamp::rfc3339),
    }
}

#[derive(Serialize, JsonSchema)]
pub struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

/// A model as `GET /v1/models` lists it. The names are uneven; clients exist.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Model {
    id: String,
    object: &'static str,
    created: i64,
    #[serde(rename = "owned_by")]
    owned_by: String,
    name: String,
    provider: String,
    context_length: u64,
    max_output_tokens: u64,
    /// USD per million, at cost: a decimal written as a JSON number.
    #[serde(rename = "promptPricePer1MTokens")]
    #[schemars(with = "f64")]
    prompt_price: Box<RawValue>,
    /// The same.
    #[serde(rename = "completionPricePer1M")]
    #[schemars(with = "f64")]
    completion_price: Box<RawValue>,
    pricing: Pricing,
    /// `live`, or `unavailable` while whoever serves it has been failing, and a request is likely to fail.
    status: &'static str,
    /// `embedding`, `image`, `speech` or `transcription`; absent: chat.
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
}

/// USD per million, as billed.
#[derive(Serialize, JsonSchema)]
struct Pricing {
    prompt: String,
    completion: String,
    /// Of models that do not chat: USD as billed for one of each unit that they are paid by.
    #[serde(skip_serializing_if = "Option::is_none")]
    per_unit: Option<BTreeMap<&'static str, String>>,
}

pub async fn models(State(app): State<App>) -> Response {
    let markup = app.config.markup;
    let catalog = app.catalog.current();
    let row = |offer: &'_ Arc<Offer>| -> Option<Model> {
        let price = |unit| offer.prices.charged(unit);
        let (prompt, completion) = (price(Unit::Prompt), price(Unit::Completion));
        let is_chat = offer.kind == ModelKind::Chat;
        // Of pictures by size the dearest is shown.
        let rates = offer.prices.at(0);
        let rates =
            rates.iter().map(|(unit, price)| (unit.counted_key(), price.to_billed_usd_per(1, markup)));
        Some(Model {
            id: offer.id.clone(),
            object: "model",
            created: offer.created,
            owned_by: offer.provider.clone(),
            name: offer.name().to_owned(),
            provider: offer.provider.clone(),
            context_length: offer.context_length,
            max_output_tokens: offer.max_output_tokens,
            prompt_price: RawValue::from_string(prompt.to_usd_per_million()).ok()?,
            completion_price: RawValue::from_string(completion.to_usd_per_million()).ok()?,
            pricing: Pricing {
                prompt: prompt.to_billed_usd_per_million(markup),
                completion: completion.to_billed_usd_per_million(markup),
                per_unit: (!is_chat).then(|| rates.collect()),
            },
            status: if app.metering.is_available(&catalog, offer) { "live" } else { "unavailable" },
            kind: (!is_chat).then_some(offer.kind.as_str()),
        })
    };
    let data = catalog.iter().filter_map(row).collect();
    json(StatusCode::OK, &ModelList { object: "list", data })
}
