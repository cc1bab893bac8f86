//! A purchase: who pays for a request, and how. By a balance, or by a payment that comes with the
//! request itself and buys just that: the payer's wallet is credited with it first, and what the
//! request leaves of it stays that wallet's.

use axum::extract::FromRequestParts;
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::json;

use crate::app::App;
use crate::auth::{Principal, siwx};
use crate::claims::{self, Claim};
use crate::http::extract::{Caller, single};
use crate::http::limits::Limit;
use crate::http::{ApiError, json as json_answer, names, x402};
use crate::ledger::LedgerError;
use crate::money::MicroUsdc;
use crate::payments::wire::{self, Example, Payload, Reason, Requirement};
use crate::payments::{Payment, PaymentError};
use crate::providers::UpstreamError;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// As long as those that others take.
const MAX_KEY_CHARS: usize = 255;

/// What a request says of who pays for it. A payment decides; a key beside it is ignored.
pub enum Buyer {
    Known(Principal),
    Payer(Box<Payload>),
    Nobody,
}

impl FromRequestParts<App> for Buyer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        if let Some(header) = x402::payment_header(&parts.headers)? {
            let payload =
                Payload::parse(header).map_err(|e| ApiError::invalid("invalid_payload", e.to_string()))?;
            return Ok(Self::Payer(Box::new(payload)));
        }
        match Option::<Caller>::from_request_parts(parts, app).await? {
            Some(Caller(principal)) => Ok(Self::Known(principal)),
            None => Ok(Self::Nobody),
        }
    }
}

/// What is for sale at a path, at what a request can cost at most.
pub struct Sale<'a> {
    pub path: &'static str,
    pub description: &'static str,
    pub price: MicroUsdc,
    /// Why nobody can be asked for it at the moment. Such a request is answered only if it was before.
    pub unavailable: Option<UpstreamError>,
    /// What the request says, in pieces.
    pub pieces: Vec<&'a [u8]>,
    pub model: &'a str,
    /// Such a request and its answer, for those who come upon the path in a catalogue of what is for sale.
    pub example: fn(&str) -> Example,
}

/// A request that is paid for, as far as its wallet's balance goes.
pub struct Purchase {
    /// Where it was made.
    path: &'static str,
    pub principal: Principal,
    pub claim: Option<Claim>,
    /// The payment that came with it.
    pub payment: Option<Payment>,
    /// Whether it is an earlier one, for which another of its name was sent.
    pub is_stand_in: bool,
}

/// Why a payment was not taken.
enum NotTaken {
    TooLittle { missing: MicroUsdc },
    Payment(PaymentError),
    Answered(ApiError),
}

impl From<PaymentError> for NotTaken {
    fn from(error: PaymentError) -> Self {
        Self::Payment(error)
    }
}

impl Sale<'_> {
    /// Takes the payment that came with a request, if one did. An answer instead is a 402.
    pub async fn to(
        &self,
        app: &App,
        buyer: Buyer,
        headers: &HeaderMap,
        limit: &Limit,
    ) -> Result<Result<Purchase, Response>, ApiError> {
        match buyer {
            Buyer::Known(principal) => {
                let claim = idempotency_key(headers)?
                    .map(|key| Claim::of_key(key, claims::request_hash(self.path, &self.pieces)));
                if claim.is_none() {
                    self.check_available()?;
                }
                Ok(Ok(Purchase { path: self.path, principal, claim, payment: None, is_stand_in: false }))
            }
            Buyer::Nobody => {
                self.check_available()?;
                Ok(Err(self.payment_required(app, self.price, None)))
            }
            Buyer::Payer(payload) => self.to_payer(app, &payload, limit).await,
        }
    }

    async fn to_payer(
        &self,
        app: &App,
        payload: &Payload,
        limit: &Limit,
    ) -> Result<Result<Purchase, Response>, ApiError> {
        let payer = payload.authorization.from;
        limit.admit_payment(app, payer)?;
        let hash = claims::request_hash(self.path, &self.pieces);
        let refuse = |missing: MicroUsdc, reason: Reason, sentence: String| {
            Ok(Err(self.payment_required(app, missing, Some((reason, sentence)))))
        };
        let payment = match self.take(app, payload, &hash, limit).await {
            Ok(payment) => payment,
            Err(NotTaken::TooLittle { missing }) => {
                let sentence = format!("authorize {} micro-USDC or more", self.asked(app, missing));
                return refuse(missing, Reason::ValueMismatch, sentence);
            }
            Err(NotTaken::Payment(PaymentError::Refused { reason, sentence })) => {
                limit.payment_refused(app, payer);
                return refuse(self.price, reason, sentence);
            }
            Err(NotTaken::Payment(PaymentError::OutOfBounds)) => {
                let max = app.config.payments.max_topup;
                let sentence =
                    format!("authorize {} micro-USDC or more, up to {max}", self.asked(app, self.price));
                return refuse(self.price, Reason::ValueMismatch, sentence);
            }
            Err(NotTaken::Payment(error @ PaymentError::MadeForAnother)) => {
                // Anybody can have read it off the chain.
                limit.payment_refused(app, payer);
                return Err(error.into());
            }
            Err(NotTaken::Payment(other)) => return Err(other.once_sent().into()),
            Err(NotTaken::Answered(error)) => return Err(error),
        };
        let is_stand_in = payment.authorization.nonce != payload.authorization.nonce;
        if payment.state.is_credited() {
            let principal = Principal::of_wallet(payment.authorization.from);
            let claim = Some(Claim::of_payment(payment.id, hash));
            return Ok(Ok(Purchase {
                path: self.path,
                principal,
                claim,
                payment: Some(payment),
                is_stand_in,
            }));
        }
        if let Some(reason) = payment.refused_so_far() {
            return Ok(Err(x402::refused_so_far(app, &payment, reason)));
        }
        if payment.state.status() == "pending" {
            return Ok(Err(pending(app, &payment)));
        }
        let why = payment.last_error.as_deref().unwrap_or("the transfer did not go through");
        let refusal = (Reason::TransactionFailed, format!("{why}; nothing was taken: sign a new payment"));
        let response = self.payment_required(app, self.price, Some(refusal));
        Ok(Err(x402::with_receipt(app, response, &payment, Err(Reason::TransactionFailed))))
    }

    /// Takes a payment, unless it is known already, if with what its payer has it covers the price.
    ///
    /// Of a balance nothing is told but to its owner, and only its owner's requests count against its
    /// limits: so a new payment's signature is checked first, and of a known one whether it is for this
    /// request, which nobody learns from the chain.
    async fn take(
        &self,
        app: &App,
        payload: &Payload,
        hash: &str,
        limit: &Limit,
    ) -> Result<Payment, NotTaken> {
        let payer = payload.authorization.from;
        let known = app.payments.recognise(payload, Some(hash)).await?;
        if known.is_none() {
            app.payments.check_payer(payload).await?;
        }
        limit.admit(app, &Principal::of_wallet(payer)).map_err(NotTaken::Answered)?;
        if known.is_none() {
            self.check_available().map_err(NotTaken::Answered)?;
            self.check_value(app, payload).await?;
        }
        Ok(app.payments.pay_for(payload, hash, known).await?)
    }

    fn check_available(&self) -> Result<(), ApiError> {
        self.unavailable.clone().map_or(Ok(()), |error| Err(error.into()))
    }

    /// Whether a new payment and what its payer has would pay for the request.
    async fn check_value(&self, app: &App, payload: &Payload) -> Result<(), NotTaken> {
        let payer = payload.authorization.from;
        let value = payload.value().ok_or(PaymentError::OutOfBounds)?;
        if let Some(reason) = app.ledger.frozen(payer).await.map_err(PaymentError::from)? {
            return Err(NotTaken::Answered(LedgerError::Frozen(reason).into()));
        }
        let balance = app.ledger.balance(payer).await.map_err(PaymentError::from)?;
        // A debt is repaid first.
        let required = self.price.checked_add(balance.debt).ok_or(PaymentError::OutOfBounds)?;
        let missing = required.checked_sub(balance.available()).unwrap_or(required);
        if value < missing { Err(NotTaken::TooLittle { missing }) } else { Ok(()) }
    }

    /// What is asked for where so much is missing: gas must stay in proportion.
    fn asked(&self, app: &App, missing: MicroUsdc) -> MicroUsdc {
        missing.max(app.config.payments.min_inline)
    }

    pub fn terms(&self, app: &App, missing: MicroUsdc) -> Requirement {
        let terms = x402::requirement(app, self.path, self.description, self.asked(app, missing));
        let extensions = x402::extensions([
            // A wallet with a balance signs in instead of paying.
            (siwx::NAME, siwx::extension(&app.config.auth, &terms.resource, &app.nonces.issue())),
            wire::payment_identifier_extension(),
            wire::bazaar_extension(&(self.example)(self.model)),
        ]);
        Requirement { extensions: Some(extensions), ..terms }
    }

    /// Terms that clients of both versions can pay: v2 in the header, strict v1 in the body.
    fn payment_required(&self, app: &App, missing: MicroUsdc, refusal: Option<(Reason, String)>) -> Response {
        x402::payment_required(app, &self.terms(app, missing), true, refusal)
    }
}

impl Purchase {
    /// Adds the receipt of the payment, if one came with the request.
    pub fn with_receipt(&self, app: &App, response: Response) -> Response {
        let Some(payment) = &self.payment else { return response };
        // What is signed says that the payer was served: of a stream nobody knows that yet.
        let media = response.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
        let is_stream = media.is_some_and(|media| media.starts_with(b"text/event-stream"));
        if response.status().is_success() && !is_stream {
            x402::with_signed_receipt(app, response, payment, self.path)
        } else {
            x402::with_receipt(app, response, payment, Ok(()))
        }
    }

    /// What the name is that another request has already.
    pub fn name_is_taken(&self) -> ApiError {
        if self.payment.is_some() {
            return payment_already_used();
        }
        let message =
            "this idempotency key was sent with another body before: use a new key for a new request";
        ApiError::new(StatusCode::CONFLICT, "idempotency_key_reused", message)
    }
}

/// The payment of a settlement that has not come through yet: no terms, so that nobody signs again.
fn pending(app: &App, payment: &Payment) -> Response {
    let sentence =
        "settlement_pending: the payment is on its way; send the same request with the same payment again";
    let body =
        json!({"x402Version": 1, "error": sentence, "topup_id": payment.id, "tx_hash": payment.tx_hash});
    let mut response = json_answer(StatusCode::PAYMENT_REQUIRED, &body);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    response.headers_mut().insert(names::X_SHOULD_RETRY, HeaderValue::from_static("false"));
    x402::with_receipt(app, response, payment, Err(Reason::SettlementPending))
}

pub fn payment_already_used() -> ApiError {
    let message = "this payment was made for another request, or for a top-up, or before it was sent here: what it left \
                   is its wallet's balance; sign in to spend it (POST /v1/auth/keys), or sign a new payment";
    ApiError::new(StatusCode::PAYMENT_REQUIRED, "payment_already_used", message)
}

pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let Some(key) = single(headers, &IDEMPOTENCY_KEY)? else { return Ok(None) };
    let key = std::str::from_utf8(key).ok();
    let key = key.filter(|key| {
        (1..=MAX_KEY_CHARS).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())
    });
    key.map(Some).ok_or_else(|| {
        let message =
            format!("Idempotency-Key must be 1 to {MAX_KEY_CHARS} visible ASCII characters without spaces");
        ApiError::invalid("invalid_idempotency_key", message)
    })
}
