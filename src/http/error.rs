//! Every error a client can see, in the OpenAI shape, and the one place where modules' errors
//! become one. What is internal is logged here and not shown.

use axum::http::header::{HeaderName, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;

use crate::attest::AttestError;
use crate::auth::{KeyError, SessionError, SiweError, SiwxError};
use crate::db::DbError;
use crate::formats::conversation::ClientFormat;
use crate::formats::errors::ErrorText;
use crate::formats::request::BadRequest;
use crate::http::purchase;
use crate::ledger::{KeyCap, LedgerError};
use crate::limits::LimitError;
use crate::metering::MeteringError;
use crate::payments::{PaymentError, WithdrawalError};
use crate::providers::UpstreamError;
use crate::reserves::ReservesError;

/// An answer that is an error: `{"error":{"message","type","code","param"}}`.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    param: Option<String>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), param: None, headers: Vec::new() }
    }

    pub fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub fn unauthorized(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, code, message)
            .with_header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
    }

    pub fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// Something of ours failed. `cause` is logged; the client is told to come back.
    pub fn unavailable(cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, "a request failed");
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "unavailable",
            "the gateway cannot serve this at the moment; nothing was charged: try again shortly",
        )
        .with_header(RETRY_AFTER, HeaderValue::from_static("1"))
    }

    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            402 => "billing_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }
}

#[derive(Serialize, JsonSchema)]
pub struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Clone, Serialize, JsonSchema)]
struct ErrorDetail {
    /// What to do next, for people.
    message: String,
    r#type: &'static str,
    /// For programs; docs/ERRORS.md lists them.
    code: &'static str,
    /// The member of the request that it is about.
    param: Option<String>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let kind = self.kind();
        let error = ErrorDetail { message: self.message, r#type: kind, code: self.code, param: self.param };
        let body = ErrorBody { error: error.clone() };
        let mut response = super::json(self.status, &body);
        response.headers_mut().extend(self.headers);
        response.extensions_mut().insert(error);
        response
    }
}

/// Tells the error that an answer is, if it is one, as clients of this format know it.
pub fn retold(response: Response, format: ClientFormat, request_id: &str) -> Response {
    let (parts, body) = response.into_parts();
    let Some(error) = parts.extensions.get::<ErrorDetail>() else {
        return Response::from_parts(parts, body);
    };
    let text = ErrorText {
        status: parts.status.as_u16(),
        code: error.code,
        message: &error.message,
        param: error.param.as_deref(),
        request_id: Some(request_id),
    };
    let body = text.body(format);
    Response::from_parts(parts, body.into())
}

impl From<BadRequest> for ApiError {
    fn from(error: BadRequest) -> Self {
        let api = Self::invalid(error.code, error.message);
        match error.param {
            Some(param) => api.with_param(param),
            None => api,
        }
    }
}

impl From<AttestError> for ApiError {
    fn from(error: AttestError) -> Self {
        Self::unavailable(&error)
    }
}

impl From<ReservesError> for ApiError {
    fn from(error: ReservesError) -> Self {
        Self::unavailable(&error)
    }
}

impl From<DbError> for ApiError {
    fn from(error: DbError) -> Self {
        Self::unavailable(&error)
    }
}

impl From<LedgerError> for ApiError {
    fn from(error: LedgerError) -> Self {
        match &error {
            LedgerError::Frozen(_) => {
                let message = format!("{error}: ask the operator");
                Self::new(StatusCode::FORBIDDEN, "wallet_frozen", message)
            }
            LedgerError::KeyCap(cap) => key_cap_reached(cap),
            LedgerError::Overloaded => {
                let message = format!("{error}; nothing was charged: try again in a second");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message)
                    .with_header(RETRY_AFTER, HeaderValue::from_static("1"))
            }
            _ => Self::unavailable(&error),
        }
    }
}

/// Paying would not help, so no terms of a top-up come with it.
fn key_cap_reached(reached: &KeyCap) -> ApiError {
    let KeyCap { cap, spending, required, resets_at } = reached;
    let (period, resets) = match resets_at {
        Some(at) => (" a day", format!("it begins anew at {}", at.rfc3339())),
        None => ("", "it does not begin anew".to_owned()),
    };
    let message = format!(
        "this key may spend {} USDC{period}: {} are spent, {} are held by requests under way, and this one \
         may cost {}; {resets}: lower max_tokens, or have the wallet raise the cap with PATCH /v1/auth/keys/{{id}}",
        cap.to_usd(),
        spending.spent.to_usd(),
        spending.held.to_usd(),
        required.to_usd(),
    );
    ApiError::new(StatusCode::PAYMENT_REQUIRED, "key_spend_cap_reached", message)
}

impl From<LimitError> for ApiError {
    fn from(error: LimitError) -> Self {
        let refused = |code, retry_after_s: i64, message| {
            metrics::counter!("farebox_limited_total", "code" => code).increment(1);
            Self::new(StatusCode::TOO_MANY_REQUESTS, code, message)
                .with_header(RETRY_AFTER, HeaderValue::from(retry_after_s))
        };
        match &error {
            LimitError::Rate { retry_after_s, .. } => refused(
                "rate_limited",
                *retry_after_s,
                format!("{error}; nothing was charged: try again in {retry_after_s} seconds"),
            ),
            LimitError::Concurrent(_) => refused(
                "too_many_concurrent_requests",
                1,
                format!("{error}; nothing was charged: try again when one has ended"),
            ),
            LimitError::FailedPayments { retry_after_s } => refused(
                "too_many_failed_attempts",
                *retry_after_s,
                format!(
                    "{error}; this one was not looked at and nothing was taken: send the same payment \
                     again in {retry_after_s} seconds"
                ),
            ),
        }
    }
}

impl From<KeyError> for ApiError {
    fn from(error: KeyError) -> Self {
        match error {
            KeyError::LabelTooLong | KeyError::LabelNotText => {
                Self::invalid("invalid_label", error.to_string()).with_param("label")
            }
            KeyError::ExpiresInThePast => {
                Self::invalid("invalid_value", error.to_string()).with_param("expires_at")
            }
            KeyError::Expired(_) => {
                let message = format!("{error}: its wallet can move its expires_at, or make another key");
                Self::unauthorized("api_key_expired", message)
            }
            KeyError::Revoked => Self::new(StatusCode::CONFLICT, "key_revoked", error.to_string()),
            KeyError::TooMany(_) => Self::new(StatusCode::CONFLICT, "too_many_keys", error.to_string()),
            KeyError::Db(cause) => cause.into(),
        }
    }
}

impl From<SiweError> for ApiError {
    fn from(error: SiweError) -> Self {
        let code = match &error {
            SiweError::Malformed(_) => "siwe_malformed",
            SiweError::MalformedSignature => "siwe_signature_malformed",
            SiweError::Domain { .. } => "siwe_wrong_domain",
            SiweError::Uri { .. } => "siwe_wrong_uri",
            SiweError::Chain { .. } => "siwe_wrong_chain",
            SiweError::Stale => "siwe_stale",
            SiweError::IssuedInTheFuture => "siwe_issued_in_future",
            SiweError::Expired => "siwe_expired",
            SiweError::NotYetValid => "siwe_not_yet_valid",
            SiweError::Signature(_) => "siwe_wrong_signature",
            SiweError::NonceUnknown => "siwe_nonce_unknown",
            SiweError::NonceUsed => "siwe_nonce_used",
            SiweError::NonceIsForReading => "siwe_nonce_for_reading",
            SiweError::ChainUnavailable => {
                return Self::new(StatusCode::SERVICE_UNAVAILABLE, "chain_unavailable", error.to_string())
                    .with_header(RETRY_AFTER, HeaderValue::from_static("5"));
            }
            SiweError::Db(cause) => return Self::unavailable(cause),
        };
        if error.is_malformed() {
            Self::invalid(code, error.to_string())
        } else {
            Self::unauthorized(code, error.to_string())
        }
    }
}

impl From<SiwxError> for ApiError {
    fn from(error: SiwxError) -> Self {
        match error {
            SiwxError::Malformed(_) => Self::invalid("siwx_malformed", error.to_string()),
            SiwxError::UnsupportedChain(_) => Self::unauthorized("siwx_unsupported_chain", error.to_string()),
            SiwxError::Siwe(error) => error.into(),
        }
    }
}

impl From<SessionError> for ApiError {
    fn from(error: SessionError) -> Self {
        let code = match &error {
            SessionError::Invalid => "invalid_session",
            SessionError::Expired => "session_expired",
            SessionError::Revoked => "session_revoked",
            SessionError::Db(cause) => return Self::unavailable(cause),
        };
        Self::unauthorized(code, error.to_string())
    }
}

impl From<UpstreamError> for ApiError {
    fn from(error: UpstreamError) -> Self {
        let message = error.to_string();
        let bad_gateway =
            |code| Self::new(StatusCode::BAD_GATEWAY, code, format!("{message}: nothing was charged"));
        match error {
            UpstreamError::RateLimited { retry_after } => {
                let seconds = retry_after.and_then(|value| HeaderValue::try_from(value).ok());
                Self::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "upstream_rate_limited",
                    format!("{message}: try again later"),
                )
                .with_header(RETRY_AFTER, seconds.unwrap_or(HeaderValue::from_static("5")))
            }
            UpstreamError::BadRequest { status, .. } => {
                let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
                Self::new(status, "upstream_bad_request", message)
            }
            UpstreamError::Silent => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "upstream_timeout",
                format!("{message}: nothing was charged"),
            ),
            UpstreamError::Refused { .. } | UpstreamError::Exhausted { .. } => {
                bad_gateway("upstream_refused")
            }
            UpstreamError::Unavailable { retry_after } => {
                let seconds = retry_after.as_secs().max(1);
                let message = format!(
                    "{message}, since its provider has been failing; nothing was charged: try again in {seconds} \
                     seconds, or ask another model (GET /v1/models says which are live)"
                );
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "model_unavailable", message)
                    .with_header(RETRY_AFTER, HeaderValue::from(seconds))
            }
            UpstreamError::Unreachable => bad_gateway("upstream_unreachable"),
            UpstreamError::Nonsense => bad_gateway("upstream_invalid_answer"),
            UpstreamError::BrokeOff => bad_gateway("upstream_broke_off"),
        }
    }
}

/// Without [`MeteringError::Insufficient`], whose answer quotes a top-up: see `http::inference`.
impl From<MeteringError> for ApiError {
    fn from(error: MeteringError) -> Self {
        match error {
            MeteringError::Insufficient { .. } => {
                Self::new(StatusCode::PAYMENT_REQUIRED, "insufficient_balance", error.to_string())
            }
            MeteringError::Unpriceable => {
                Self::invalid("unpriceable", "the request cannot be priced: ask for less")
            }
            MeteringError::BadRequest(error) => error.into(),
            MeteringError::Upstream(error) => error.into(),
            MeteringError::Ledger(error) => error.into(),
            MeteringError::Limited(error) => error.into(),
            MeteringError::SettlementLate => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "settlement_late",
                "the answer could not be settled in time and is withheld: the receipt of this request says \
                 whether it was charged all the same; try again shortly",
            )
            .with_header(RETRY_AFTER, HeaderValue::from_static("5")),
            MeteringError::Stopping | MeteringError::Claimed(_) => Self::unavailable(&error),
        }
    }
}

/// Without [`PaymentError::Refused`], whose answer is x402's: see `http::topup`.
impl From<PaymentError> for ApiError {
    fn from(error: PaymentError) -> Self {
        match error {
            PaymentError::Refused { .. } => {
                Self::new(StatusCode::PAYMENT_REQUIRED, "payment_refused", error.to_string())
            }
            PaymentError::TooManyUnfinished => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_payments", error.to_string())
                    .with_header(RETRY_AFTER, HeaderValue::from_static("10"))
            }
            PaymentError::TooManyFailed => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_failed_payments", error.to_string())
                    .with_header(RETRY_AFTER, HeaderValue::from_static("3600"))
            }
            PaymentError::MadeForAnother => purchase::payment_already_used(),
            PaymentError::IdentifierReused => {
                let message = format!("{error}; nothing was taken: use a new identifier for a new request");
                Self::new(StatusCode::CONFLICT, "payment_identifier_reused", message)
            }
            PaymentError::OutOfBounds => Self::invalid("invalid_amount", error.to_string()),
            PaymentError::Unavailable(cause) => payments_unavailable(
                &cause,
                "payments are not possible at the moment and nothing was taken: send the same payment again shortly",
            ),
            PaymentError::Uncertain(cause) => payments_unavailable(
                &cause,
                "what became of the payment is not known yet: send the same payment again shortly; do not sign another",
            ),
            PaymentError::Db(cause) => cause.into(),
            PaymentError::Ledger(cause) => cause.into(),
        }
    }
}

impl From<WithdrawalError> for ApiError {
    fn from(error: WithdrawalError) -> Self {
        let conflict = |code, message: String| Self::new(StatusCode::CONFLICT, code, message);
        let wait = |code, seconds: i64, message: String| {
            Self::new(StatusCode::TOO_MANY_REQUESTS, code, message)
                .with_header(RETRY_AFTER, HeaderValue::from(seconds))
        };
        match &error {
            WithdrawalError::Off => Self::new(
                StatusCode::NOT_IMPLEMENTED,
                "withdrawals_off",
                format!("{error}: ask the operator"),
            ),
            WithdrawalError::TooLittle(_) => {
                let message = format!("{error}: amount must be USD, with at most 6 decimals");
                Self::invalid("invalid_amount", message).with_param("amount")
            }
            WithdrawalError::NotWithdrawable { .. } => {
                conflict("not_withdrawable", format!("{error}; nothing was taken: ask for less, or later"))
            }
            WithdrawalError::InDebt(_) => conflict("wallet_in_debt", format!("{error}; nothing was taken")),
            WithdrawalError::NameReused => {
                conflict("idempotency_key_reused", format!("{error}; nothing was taken: use a new key"))
            }
            WithdrawalError::Refused(_) => {
                conflict("withdrawal_refused", format!("{error}; nothing was taken"))
            }
            WithdrawalError::TooManyUnfinished => wait(
                "too_many_withdrawals",
                10,
                format!("{error}; nothing was taken: let one of them get into a block"),
            ),
            WithdrawalError::DailyCap { retry_after_s, .. } => {
                wait("withdrawal_cap_reached", *retry_after_s, format!("{error}; nothing was taken"))
            }
            WithdrawalError::TreasuryShort | WithdrawalError::Unavailable(_) => {
                tracing::warn!(%error, "a withdrawal could not be taken");
                let code = match &error {
                    WithdrawalError::TreasuryShort => "treasury_short",
                    _ => "withdrawals_unavailable",
                };
                let message = "it cannot be paid at the moment and nothing was taken: ask again later, \
                               with the same Idempotency-Key and a newly signed message";
                Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message)
                    .with_header(RETRY_AFTER, HeaderValue::from_static("30"))
            }
            WithdrawalError::Ledger(_) | WithdrawalError::Db(_) => match error {
                WithdrawalError::Ledger(frozen @ LedgerError::Frozen(_)) => frozen.into(),
                other => withdrawal_uncertain(&other),
            },
        }
    }
}

/// The database did not say whether it was written down.
fn withdrawal_uncertain(cause: &WithdrawalError) -> ApiError {
    tracing::error!(%cause, "what became of a withdrawal is not known yet");
    let message = "what became of the withdrawal is not known yet: GET /v1/withdrawals shows it if it is there; \
                   asked for again with the same Idempotency-Key, it is made once";
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "withdrawals_unavailable", message)
        .with_header(RETRY_AFTER, HeaderValue::from_static("5"))
}

fn payments_unavailable(cause: &str, message: &str) -> ApiError {
    tracing::warn!(cause, "a payment could not be taken, or not be followed");
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "payments_unavailable", message)
        .with_header(RETRY_AFTER, HeaderValue::from_static("5"))
}
