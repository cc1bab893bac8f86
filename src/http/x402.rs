//! x402 over HTTP: the payment in a request, the terms in a 402, the receipt in an answer.

use axum::http::header::{HeaderValue, RETRY_AFTER};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

use crate::app::App;
use crate::attest::X402Receipt;
use crate::http::extract::single;
use crate::http::{ApiError, json, names, set_header};
use crate::money::MicroUsdc;
use crate::payments::Payment;
use crate::payments::wire::{
    Reason, Requirement, SettlementResponse, encode_header, offer_receipt_extension,
};

/// The payment, under either of its headers.
pub fn payment_header(headers: &HeaderMap) -> Result<Option<&[u8]>, ApiError> {
    match (single(headers, &names::PAYMENT_SIGNATURE)?, single(headers, &names::X_PAYMENT)?) {
        (Some(a), Some(b)) if a != b => {
            let message = "Payment-Signature and X-Payment hold different payments: send one";
            Err(ApiError::invalid("conflicting_payments", message))
        }
        (a, b) => Ok(a.or(b)),
    }
}

/// What is asked for at one of our paths.
pub fn requirement(app: &App, path: &str, description: &'static str, amount: MicroUsdc) -> Requirement {
    Requirement { amount, resource: resource(app, path), description, extensions: None }
}

/// The absolute URL of one of our paths.
fn resource(app: &App, path: &str) -> String {
    let base = app.config.public_url.as_str().trim_end_matches('/');
    format!("{base}{path}")
}

/// x402's extensions that the terms declare, by their names.
pub fn extensions<const N: usize>(declared: [(&'static str, Value); N]) -> Value {
    Value::Object(declared.into_iter().map(|(name, extension)| (name.to_owned(), extension)).collect())
}

/// The `PAYMENT-REQUIRED` header for these terms.
pub fn quote_header(app: &App, terms: &Requirement, error: &str) -> HeaderValue {
    let quote = encode_header(&terms.v2(&app.config.payments, error));
    // Base64 is always a header value.
    HeaderValue::try_from(quote).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// 402 with terms; after a refusal, with what was wrong: a code in the header, a sentence in the body.
pub fn payment_required(
    app: &App,
    terms: &Requirement,
    strict_v1: bool,
    refusal: Option<(Reason, String)>,
) -> Response {
    let payments = &app.config.payments;
    let (code, sentence) = match refusal {
        None => ("payment required", "payment required".to_owned()),
        Some((reason, sentence)) => (reason.code(), format!("{}: {sentence}", reason.code())),
    };
    let body: Value = if strict_v1 { terms.v1(payments, &sentence) } else { terms.body(payments, &sentence) };
    let mut response = json(StatusCode::PAYMENT_REQUIRED, &body);
    response.headers_mut().insert(names::PAYMENT_REQUIRED, quote_header(app, terms, code));
    response
}

/// The answer to a payment that a facilitator has refused and that is not at an end: no terms, so that
/// nobody signs another while this one may still be carried out.
pub fn refused_so_far(app: &App, payment: &Payment, reason: &str) -> Response {
    let sentence = format!(
        "{reason}: the facilitator has refused to settle this payment, and is asked again for a while. Nothing \
         was taken so far, but it still may be until second {} of Unix time: until then send the same payment \
         again to hear of it, and do not sign another",
        payment.authorization.valid_before
    );
    let body =
        json!({"x402Version": 1, "error": sentence, "topup_id": payment.id, "tx_hash": payment.tx_hash});
    let mut response = json(StatusCode::PAYMENT_REQUIRED, &body);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    response.headers_mut().insert(names::X_SHOULD_RETRY, HeaderValue::from_static("false"));
    add_receipt(app, response, payment, Err(reason), None)
}

/// Adds what became of a payment to an answer, in the headers of both versions.
pub fn with_receipt(
    app: &App,
    response: Response,
    payment: &Payment,
    outcome: Result<(), Reason>,
) -> Response {
    add_receipt(app, response, payment, outcome.map_err(Reason::code), None)
}

/// The same of a payment that bought what is answered: with a receipt that the gateway signs.
pub fn with_signed_receipt(app: &App, response: Response, payment: &Payment, path: &str) -> Response {
    let network = payment.network();
    let signed = app.attestor.x402_receipt(&X402Receipt {
        network: &network,
        resource_url: &resource(app, path),
        payer: payment.authorization.from,
        // Fixed, so that a payment has one receipt however often it is asked for.
        issued_at: payment.created_at,
        transaction: payment.tx_hash.as_deref().unwrap_or_default(),
    });
    // Without it the answer is whole all the same.
    let signed =
        signed.inspect_err(|error| tracing::error!(%error, "a payment's receipt is not signed")).ok();
    let signed = signed.map(|receipt| extensions([offer_receipt_extension(&receipt)]));
    add_receipt(app, response, payment, Ok(()), signed)
}

fn add_receipt(
    app: &App,
    mut response: Response,
    payment: &Payment,
    outcome: Result<(), &str>,
    extensions: Option<Value>,
) -> Response {
    let payments = &app.config.payments;
    let receipt = SettlementResponse {
        outcome,
        tx_hash: payment.tx_hash.as_deref().unwrap_or_default(),
        payer: payment.authorization.from.to_string(),
        amount: payment.value,
        extensions,
    };
    set_header(&mut response, names::PAYMENT_RESPONSE, &encode_header(&receipt.v2(payments)));
    set_header(&mut response, names::X_PAYMENT_RESPONSE, &encode_header(&receipt.v1(payments)));
    response
}
