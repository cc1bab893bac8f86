//! The limits of a key as they travel in JSON: read strictly, because a cap that is misspelt and
//! passed over would be no cap.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::app::App;
use crate::auth::{KeyLimits, LimitChanges, Principal};
use crate::clock::Timestamp;
use crate::http::ApiError;
use crate::money::MicroUsdc;

/// More models than anybody lists one by one.
const MAX_MODELS: usize = 200;
/// Far above what one key can send.
const MAX_PER_MINUTE: u32 = 1_000_000;

const EXPIRES_AT: &str = "expires_at";
const SPEND_CAP: &str = "spend_cap_usdc";
const SPEND_CAP_PER_DAY: &str = "spend_cap_per_day_usdc";
const ALLOWED_MODELS: &str = "allowed_models";
const REQUESTS_PER_MINUTE: &str = "requests_per_minute";

/// Reads the limits out of a body whose other members are `others`. A limit that is null is taken away.
pub fn parse(app: &App, body: &[u8], others: &[&str]) -> Result<LimitChanges, ApiError> {
    if body.trim_ascii().is_empty() {
        return Ok(LimitChanges::default());
    }
    let members: Map<String, Value> = serde_json::from_slice(body)
        .map_err(|e| ApiError::invalid("invalid_json", format!("the body must be a JSON object: {e}")))?;
    let mut changes = LimitChanges::default();
    for (name, value) in &members {
        match name.as_str() {
            EXPIRES_AT => changes.expires_at = Some(unless_null(value, |value| expiry(app, value))?),
            SPEND_CAP => changes.spend_cap = Some(unless_null(value, |value| amount(SPEND_CAP, value))?),
            SPEND_CAP_PER_DAY => {
                let read = |value: &Value| amount(SPEND_CAP_PER_DAY, value);
                changes.spend_cap_per_day = Some(unless_null(value, read)?);
            }
            ALLOWED_MODELS => {
                let read = |value: &Value| models(app, value);
                changes.allowed_models = Some(unless_null(value, read)?.map(Into::into));
            }
            REQUESTS_PER_MINUTE => {
                changes.requests_per_minute = Some(unless_null(value, per_minute)?);
            }
            other if others.contains(&other) => {}
            other => {
                let shown: String = other.chars().take(100).collect();
                let message = format!("{shown:?} is not known here: see docs/API.md");
                return Err(ApiError::invalid("unsupported_parameter", message).with_param(shown));
            }
        }
    }
    Ok(changes)
}

fn unless_null<T>(
    value: &Value,
    read: impl FnOnce(&Value) -> Result<T, ApiError>,
) -> Result<Option<T>, ApiError> {
    if value.is_null() { Ok(None) } else { read(value).map(Some) }
}

fn invalid(name: &'static str, must: &str) -> ApiError {
    ApiError::invalid("invalid_value", format!("{name} must be {must}")).with_param(name)
}

fn expiry(app: &App, value: &Value) -> Result<Timestamp, ApiError> {
    let at = value.as_str().and_then(Timestamp::parse_rfc3339);
    at.filter(|at| *at > app.clock.now()).ok_or_else(|| {
        invalid(EXPIRES_AT, "an RFC 3339 time in the future, such as \"2030-01-31T12:00:00Z\", or null")
    })
}

fn amount(name: &'static str, value: &Value) -> Result<MicroUsdc, ApiError> {
    let micro = value.as_i64().filter(|micro| *micro >= 0);
    micro.map(MicroUsdc::new).ok_or_else(|| {
        invalid(name, "a whole number of micro-USDC (1000000 is one USDC), not below 0, or null")
    })
}

fn models(app: &App, value: &Value) -> Result<Vec<String>, ApiError> {
    let must = || invalid(ALLOWED_MODELS, "a list of 1 to 200 ids of models, or null");
    let list = value.as_array().filter(|list| (1..=MAX_MODELS).contains(&list.len())).ok_or_else(must)?;
    let mut ids = BTreeSet::new();
    let catalog = app.catalog.current();
    for id in list {
        let id = id.as_str().ok_or_else(must)?;
        if catalog.get(id).is_none() {
            let shown: String = id.chars().take(100).collect();
            let message =
                format!("{ALLOWED_MODELS} names {shown:?}, which is no model: GET /v1/models lists them");
            return Err(ApiError::invalid("invalid_value", message).with_param(ALLOWED_MODELS));
        }
        ids.insert(id.to_owned());
    }
    Ok(ids.into_iter().collect())
}

fn per_minute(value: &Value) -> Result<u32, ApiError> {
    let limit = value.as_u64().and_then(|limit| u32::try_from(limit).ok());
    limit
        .filter(|limit| (1..=MAX_PER_MINUTE).contains(limit))
        .ok_or_else(|| invalid(REQUESTS_PER_MINUTE, "a whole number from 1 to 1000000, or null"))
}

/// The JSON Schema of the members that [`parse`] reads.
pub fn schema() -> Map<String, Value> {
    let amount = json!({"type": ["integer", "null"], "minimum": 0, "description": "Micro-USDC."});
    let members = json!({
        EXPIRES_AT: {"type": ["string", "null"], "format": "date-time"},
        SPEND_CAP: amount,
        SPEND_CAP_PER_DAY: amount,
        ALLOWED_MODELS: {"type": ["array", "null"], "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_MODELS},
        REQUESTS_PER_MINUTE: {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_PER_MINUTE},
    });
    members.as_object().cloned().unwrap_or_default()
}

/// A key's limits; null: no such limit.
#[derive(Serialize, JsonSchema)]
pub struct LimitsBody {
    /// RFC 3339.
    expires_at: Option<String>,
    /// Micro-USDC, of all days.
    spend_cap_usdc: Option<i64>,
    /// Micro-USDC a UTC day.
    spend_cap_per_day_usdc: Option<i64>,
    /// Ids of models.
    allowed_models: Option<Vec<String>>,
    requests_per_minute: Option<u32>,
}

impl LimitsBody {
    pub fn of(limits: &KeyLimits) -> Self {
        Self {
            expires_at: limits.expires_at.map(Timestamp::rfc3339),
            spend_cap_usdc: limits.spend_cap.map(MicroUsdc::get),
            spend_cap_per_day_usdc: limits.spend_cap_per_day.map(MicroUsdc::get),
            allowed_models: limits.allowed_models.as_deref().map(<[String]>::to_vec),
            requests_per_minute: limits.requests_per_minute,
        }
    }
}

/// Only those that a key has.
pub fn without_nulls<S: Serializer>(limits: &LimitsBody, serializer: S) -> Result<S::Ok, S::Error> {
    let limits = serde_json::to_value(limits).map_err(serde::ser::Error::custom)?;
    let mut map = serializer.serialize_map(None)?;
    for (name, limit) in limits.as_object().into_iter().flatten().filter(|(_, limit)| !limit.is_null()) {
        map.serialize_entry(name, limit)?;
    }
    map.end()
}

/// Whether the caller's key may call a model.
pub fn check_model(caller: &Principal, model: &str) -> Result<(), ApiError> {
    if caller.may_call(model) {
        return Ok(());
    }
    let allowed = caller.key_limits.allowed_models.as_deref().unwrap_or_default().join(", ");
    let message = format!("this key may not call {model}; it may call {allowed}");
    let status = axum::http::StatusCode::FORBIDDEN;
    Err(ApiError::new(status, "model_not_allowed", message).with_param("model"))
}
