//! A remote facilitator that settles payments, before a relayer of ours does or instead of one.
//!
//! It is told of a payment that the journal has, and what it answers decides nothing: a payment is
//! credited from the token's logs alone, and has failed only once it cannot be carried out any more. So
//! its answers say when to ask again, and what to tell a payer who waits.
//!
//! Sources: the x402 specification, facilitator interface of versions 1 and 2 (`POST /verify`,
//! `POST /settle`, `GET /supported`), and what the published facilitators and their clients read and send.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{Client, Method, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::chain::{Authorization, ChainError, with_v_27};
use crate::clock::Timestamp;
use crate::config;
use crate::failpoint;
use crate::payments::settle::Step;
use crate::payments::wire::{Reason, Requirement, SCHEME, v1_network};
use crate::payments::{Kind, Payment, PaymentError, Payments, State, store, unpoisoned};

/// A facilitator waits for the transaction's receipt, a few blocks; what takes longer the chain tells us.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(12);
const VERIFY_TIMEOUT: Duration = Duration::from_secs(5);
const SUPPORTED_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than `/verify` and `/settle` may take together: so long nobody else asks for the same payment.
const RESERVED_SECONDS: i64 = 20;
/// Far above any answer; one that is larger is not read to its end.
const MAX_ANSWER_BYTES: usize = 256 << 10;
/// Calls at once; what is above waits for its next look.
const MAX_CALLS_AT_ONCE: usize = 32;
/// Calls for one payment that have brought nothing before a relayer of ours sends it.
const CALLS_BEFORE_RELAYER: i64 = 2;
/// Calls for one payment where there is no relayer: with the pauses between them about twenty minutes.
const MOST_CALLS: i64 = 12;
/// The pause after the first call that failed; each after it is twice as long, up to …
const FIRST_PAUSE_SECONDS: i64 = 1;
/// … this.
const LONGEST_PAUSE_SECONDS: i64 = 300;
/// What the facilitator says it has sent is given this long to be seen in the chain.
const SENT_PAUSE_SECONDS: i64 = 30;
/// What it says is pending it asks its chain for when it is asked again.
const PENDING_PAUSE_SECONDS: i64 = 10;
/// How often it is asked what it supports.
const SUPPORTED_EVERY: Duration = Duration::from_secs(60);
/// The same while it does not support what we need, or does not say.
const SUPPORTED_AGAIN: Duration = Duration::from_secs(10);
/// A reason longer than this is none.
const MAX_REASON_BYTES: usize = 100;
/// What a refusal without a reason that can be repeated is called, as in the reference client.
const NO_REASON: &str = "unexpected_settle_error";

/// How far a facilitator has got with a payment. All zero and `None` where none was asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facilitation {
    pub calls: i64,
    pub next_call_at: Timestamp,
    /// The code that it refused with last, where nobody else can send the payment.
    pub refusal: Option<String>,
}

impl Payment {
    /// The facilitator's reason, while it refuses to settle a payment that is not at an end.
    pub fn refused_so_far(&self) -> Option<&str> {
        self.facilitation.refusal.as_deref().filter(|_| self.state == State::Verified)
    }
}

/// The version of x402 that a facilitator is spoken to in. Payers sign the same in both.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Version {
    V1,
    V2,
}

/// What a call to `/settle` came to.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Answer {
    /// It says that it has carried the payment out, by this transaction if that is one.
    Sent(Option<String>),
    /// It says that it has sent the payment, and does not know yet what became of it.
    Pending,
    /// It will not carry the payment out, for this reason.
    Refused(String),
    /// It did not answer, or nothing that x402 knows.
    Failed(String),
}

impl Answer {
    fn label(&self) -> &'static str {
        match self {
            Self::Sent(_) => "ok",
            Self::Pending => "pending",
            Self::Refused(_) => "refused",
            Self::Failed(_) => "failed",
        }
    }

    /// For the operator, in the journal and in the log.
    fn note(&self) -> String {
        match self {
            Self::Sent(Some(tx)) => format!("the facilitator says that it has sent {tx}"),
            Self::Sent(None) => "the facilitator says that it has sent it".to_owned(),
            Self::Pending => "the facilitator says that it is pending".to_owned(),
            Self::Refused(reason) => format!("the facilitator refuses: {reason}"),
            Self::Failed(why) => format!("the facilitator has not answered: {why}"),
        }
    }

    /// Seconds until it is asked again, after so many calls.
    fn pause_seconds(&self, calls: i64) -> i64 {
        match self {
            Self::Sent(_) => SENT_PAUSE_SECONDS,
            Self::Pending => PENDING_PAUSE_SECONDS,
            Self::Refused(_) | Self::Failed(_) => {
                // More doublings than this are above the longest pause.
                let doublings = u32::try_from(calls.saturating_sub(1)).unwrap_or(u32::MAX).min(16);
                FIRST_PAUSE_SECONDS.saturating_mul(1 << doublings).min(LONGEST_PAUSE_SECONDS)
            }
        }
    }
}

/// What the facilitator has shown of itself.
struct Standing {
    version: Version,
    /// Of `/supported`: what is wrong, if something is.
    offers: Result<(), String>,
    /// Of the last call that went past it.
    failing: Option<String>,
}

pub struct Facilitator {
    client: Client,
    /// Without a slash at its end.
    base_url: String,
    /// The host alone, for the log: the rest of an address may hold a key.
    host: String,
    auth: Option<HeaderValue>,
    resource: String,
    places: Arc<Semaphore>,
    standing: Mutex<Standing>,
}

impl Facilitator {
    pub fn new(config: &config::Facilitator) -> Result<Self, ChainError> {
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            // A redirect could carry payment and secret to somebody else.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| ChainError::Unreachable(e.to_string()))?;
        Ok(Self {
            client,
            base_url: config.url.as_str().trim_end_matches('/').to_owned(),
            host: config.url.host_str().unwrap_or_default().to_owned(),
            auth: config.auth.as_ref().and_then(header_of),
            resource: config.resource.clone(),
            places: Arc::new(Semaphore::new(MAX_CALLS_AT_ONCE)),
            standing: Mutex::new(Standing {
                version: Version::V2,
                offers: Err("it was not asked yet what it supports".to_owned()),
                failing: None,
            }),
        })
    }

    fn health(&self) -> Result<(), String> {
        let standing = unpoisoned(&self.standing);
        standing.offers.clone()?;
        standing.failing.clone().map_or(Ok(()), Err)
    }

    /// Whether the last call that has ended went past it.
    fn is_failing(&self) -> bool {
        unpoisoned(&self.standing).failing.is_some()
    }

    /// Whether some payment is being shown to it now.
    fn is_asked(&self) -> bool {
        self.places.available_permits() < MAX_CALLS_AT_ONCE
    }

    /// Asks what it supports, and keeps the version that it is spoken to in from now on.
    async fn look_at_supported(&self, payments: &config::Payments) {
        let supported = self.supported().await;
        let offers = supported.and_then(|supported| supported.version_for(payments));
        let mut standing = unpoisoned(&self.standing);
        if let Ok(version) = offers {
            standing.version = version;
        }
        let offers = offers.map(drop);
        if standing.offers != offers {
            match &offers {
                Ok(()) => tracing::info!(host = self.host, "the facilitator settles our payments"),
                Err(why) => tracing::warn!(host = self.host, why, "the facilitator is not of use"),
            }
        }
        standing.offers = offers;
    }

    async fn supported(&self) -> Result<Supported, String> {
        let called = self.call(Method::GET, "supported", None, SUPPORTED_TIMEOUT).await;
        let read = called.and_then(|(status, body)| {
            if status.is_success() {
                read("supported", status, &body)
            } else {
                Err(said("supported", status))
            }
        });
        count("supported", if read.is_ok() { "ok" } else { "failed" });
        read
    }

    /// Has a payment settled. One that it has refused before is shown to `/verify` first.
    async fn settle(&self, payment: &Payment, config: &config::Payments) -> Answer {
        let version = unpoisoned(&self.standing).version;
        let request = request(version, payment, &self.resource, config);
        let mut answer = None;
        if payment.facilitation.refusal.is_some() {
            let called = self.call(Method::POST, "verify", Some(&request), VERIFY_TIMEOUT).await;
            answer = verified(called);
            count("verify", answer.as_ref().map_or("ok", Answer::label));
        }
        let answer = match answer {
            Some(answer) => answer,
            None => {
                let called = self.call(Method::POST, "settle", Some(&request), SETTLE_TIMEOUT).await;
                let answer = settled(called);
                count("settle", answer.label());
                answer
            }
        };
        let failing = if let Answer::Failed(why) = &answer { Some(why.clone()) } else { None };
        unpoisoned(&self.standing).failing = failing;
        answer
    }

    /// One call and its whole answer, bounded in time and size. What went wrong is said without addresses.
    async fn call(
        &self,
        method: Method,
        endpoint: &'static str,
        body: Option<&Value>,
        timeout: Duration,
    ) -> Result<(StatusCode, Vec<u8>), String> {
        let mut request = self.client.request(method, format!("{}/{endpoint}", self.base_url));
        if let Some(auth) = &self.auth {
            request = request.header(AUTHORIZATION, auth.clone());
        }
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
        }
        let began = Instant::now();
        let called = tokio::time::timeout(timeout, async {
            let transport = |e: reqwest::Error| format!("{endpoint}: {}", cause(&e.without_url()));
            let mut response = request.send().await.map_err(transport)?;
            let mut bytes = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(transport)? {
                if bytes.len().saturating_add(chunk.len()) > MAX_ANSWER_BYTES {
                    return Err(format!("{endpoint}: its answer is above {MAX_ANSWER_BYTES} bytes"));
                }
                bytes.extend_from_slice(&chunk);
            }
            Ok((response.status(), bytes))
        });
        let called = called.await;
        let seconds = metrics::histogram!("farebox_facilitator_seconds", "endpoint" => endpoint);
        seconds.record(began.elapsed());
        called.unwrap_or_else(|_| Err(format!("{endpoint}: no answer within {} seconds", timeout.as_secs())))
    }
}

impl Payments {
    /// How the facilitator fares; `None` where none is configured.
    pub fn facilitator_health(&self) -> Option<Result<(), String>> {
        self.0.facilitator.as_ref().map(Facilitator::health)
    }

    /// Asks the facilitator, as long as the server runs, what it supports.
    pub async fn watch_facilitator(&self) {
        let Some(facilitator) = &self.0.facilitator else { return };
        loop {
            facilitator.look_at_supported(&self.0.config).await;
            let is_of_use = unpoisoned(&facilitator.standing).offers.is_ok();
            tokio::time::sleep(if is_of_use { SUPPORTED_EVERY } else { SUPPORTED_AGAIN }).await;
        }
    }

    /// Moves a verified payment on by the facilitator; `None`, if it is not its turn.
    pub(super) async fn by_facilitator(&self, payment: &Payment) -> Result<Option<Step>, PaymentError> {
        // What goes out a relayer of ours sends.
        if self.0.facilitator.is_none() || payment.kind != Kind::Authorization {
            return Ok(None);
        }
        let is_first = payment.facilitation.calls == 0 && self.is_fresh(payment);
        // It may be in the chain, whatever was answered; or its time is over.
        if !is_first && let Some(step) = self.look(payment).await? {
            return Ok(Some(step));
        }
        if !self.is_facilitators_turn(payment, is_first).await? {
            return Ok(None);
        }
        let is_refused = payment.refused_so_far().is_some();
        Ok(Some(if is_refused { Step::Refused } else { Step::Wait }))
    }

    /// Whether a payment is the facilitator's to send, and not a relayer's of ours; then it is asked, if it
    /// is time to. `can_go_through`: the payment was seen to, just now.
    pub(super) async fn is_facilitators_turn(
        &self,
        payment: &Payment,
        can_go_through: bool,
    ) -> Result<bool, PaymentError> {
        let Some(facilitator) = &self.0.facilitator else { return Ok(false) };
        if payment.kind != Kind::Authorization {
            return Ok(false);
        }
        let now = self.0.clock.now();
        let Facilitation { calls, next_call_at, .. } = payment.facilitation;
        if now < next_call_at {
            return Ok(true);
        }
        if calls >= if self.has_relayer() { CALLS_BEFORE_RELAYER } else { MOST_CALLS } {
            return Ok(!self.has_relayer());
        }
        if !can_go_through && !self.may_send_again(payment).await? {
            return Ok(true);
        }
        // While its calls fail one payment at a time tries it, if a relayer can see to the others.
        if calls == 0 && self.has_relayer() && facilitator.is_failing() && facilitator.is_asked() {
            let mut tx = self.0.db.begin().await?;
            // Another node may have been quicker to show it.
            let is_left = store::leave_to_relayer(&mut tx, payment.id, CALLS_BEFORE_RELAYER).await?;
            tx.commit().await?;
            return Ok(!is_left);
        }
        let Ok(place) = Arc::clone(&facilitator.places).try_acquire_owned() else { return Ok(true) };
        let mut tx = self.0.db.begin().await?;
        if store::reserve_call(&mut tx, payment.id, calls, now.plus_seconds(RESERVED_SECONDS)).await? {
            tx.commit().await?;
            failpoint::reached("asking");
            self.ask_facilitator(payment, place);
        }
        Ok(true)
    }

    /// Asks the facilitator in a task of its own: the chain is looked at meanwhile.
    fn ask_facilitator(&self, payment: &Payment, place: OwnedSemaphorePermit) {
        let (payments, payment) = (self.clone(), payment.clone());
        self.0.tasks.spawn(async move {
            let asked = async {
                let Some(facilitator) = &payments.0.facilitator else { return };
                let answer = facilitator.settle(&payment, &payments.0.config).await;
                failpoint::reached("answered");
                if let Err(error) = payments.note(&payment, &answer).await {
                    // The reservation runs out, and it is asked again.
                    tracing::warn!(payment = payment.id, %error, "the facilitator's answer was not kept");
                }
            };
            tokio::select! {
                () = asked => {}
                () = payments.0.tasks.aborted() => {}
            }
            drop(place);
        });
    }

    async fn note(&self, payment: &Payment, answer: &Answer) -> Result<(), PaymentError> {
        let calls = payment.facilitation.calls.saturating_add(1);
        let next = self.0.clock.now().plus_seconds(answer.pause_seconds(calls));
        // Where a relayer of ours is next, the payment is on its way all the same.
        let refusal = match answer {
            Answer::Refused(reason) if !self.has_relayer() => Some(reason.as_str()),
            _ => None,
        };
        let note = answer.note();
        tracing::info!(payment = payment.id, calls, note, "the facilitator was asked to settle a payment");
        let mut tx = self.0.db.begin().await?;
        store::note_answer(&mut tx, payment.id, next, refusal, &note).await?;
        tx.commit().await?;
        failpoint::reached("facilitated");
        Ok(())
    }

    pub(super) fn has_relayer(&self) -> bool {
        self.0.chain.relayers().next().is_some()
    }
}

fn header_of(secret: &SecretString) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(secret.expose_secret()).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn count(endpoint: &'static str, outcome: &'static str) {
    metrics::counter!("farebox_facilitator_calls_total", "endpoint" => endpoint, "outcome" => outcome)
        .increment(1);
}

/// The innermost of an error's causes, which says most.
fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// What `/verify` and `/settle` are sent. Our own terms, for exactly what was authorised, stand for what the
/// payer chose: a facilitator compares the two, and the payer has signed neither.
fn request(version: Version, payment: &Payment, resource: &str, config: &config::Payments) -> Value {
    let terms = Requirement {
        amount: payment.value,
        resource: resource.to_owned(),
        description: "A payment for AI model calls",
        extensions: None,
    };
    let payload = exact_payload(&payment.authorization, &payment.signature);
    let (number, paid, mut offered) = match version {
        Version::V1 => {
            let network = v1_network(config);
            let paid = json!({"x402Version": 1, "scheme": SCHEME, "network": network, "payload": payload});
            (1, paid, terms.v1(config, ""))
        }
        Version::V2 => {
            let offered = terms.v2(config, "");
            let paid = json!({
                "x402Version": 2,
                "resource": offered["resource"],
                "accepted": offered["accepts"][0],
                "payload": payload,
            });
            (2, paid, offered)
        }
    };
    json!({
        "x402Version": number,
        "paymentPayload": paid,
        "paymentRequirements": offered["accepts"][0].take(),
    })
}

/// An exact payment's `payload`; the signature as the token is to have it: a contract's as it was sent.
fn exact_payload(authorization: &Authorization, signature: &[u8]) -> Value {
    json!({
        "signature": store::hex_of(&with_v_27(signature)),
        "authorization": {
            "from": authorization.from.to_string(),
            "to": authorization.to.to_string(),
            "value": authorization.value.to_string(),
            "validAfter": authorization.valid_after.to_string(),
            "validBefore": authorization.valid_before.to_string(),
            "nonce": store::hex_of(authorization.nonce.as_slice()),
        },
    })
}

type Called = Result<(StatusCode, Vec<u8>), String>;

/// What `/settle` has said. A refusal is one with any status that does not speak of a broken server; a
/// success only with one that speaks of success.
fn settled(called: Called) -> Answer {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Settled {
        success: bool,
        error_reason: Option<String>,
        transaction: Option<String>,
    }
    let (status, body) = match called {
        Ok(called) => called,
        Err(why) => return Answer::Failed(why),
    };
    match read::<Settled>("settle", status, &body) {
        Ok(settled) if settled.success && status.is_success() => {
            Answer::Sent(settled.transaction.filter(|text| is_tx_hash(text)))
        }
        Ok(settled) if !settled.success && is_answer(status) => refusal(settled.error_reason),
        Ok(_) => Answer::Failed(said("settle", status)),
        Err(why) => Answer::Failed(why),
    }
}

/// What `/verify` has said, where that is no yes.
fn verified(called: Called) -> Option<Answer> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Verified {
        is_valid: bool,
        invalid_reason: Option<String>,
    }
    let (status, body) = match called {
        Ok(called) => called,
        Err(why) => return Some(Answer::Failed(why)),
    };
    match read::<Verified>("verify", status, &body) {
        Ok(verified) if verified.is_valid && status.is_success() => None,
        Ok(verified) if !verified.is_valid && is_answer(status) => Some(refusal(verified.invalid_reason)),
        Ok(_) => Some(Answer::Failed(said("verify", status))),
        Err(why) => Some(Answer::Failed(why)),
    }
}

fn is_answer(status: StatusCode) -> bool {
    !status.is_server_error() && !status.is_redirection()
}

/// A refusal by its code, which goes on to the payer: what is no code is not repeated.
fn refusal(reason: Option<String>) -> Answer {
    let is_code = |text: &String| {
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b':');
        (1..=MAX_REASON_BYTES).contains(&text.len()) && text.bytes().all(is_part)
    };
    match reason.filter(is_code) {
        Some(reason) if reason == Reason::SettlementPending.code() => Answer::Pending,
        reason => Answer::Refused(reason.unwrap_or_else(|| NO_REASON.to_owned())),
    }
}

fn is_tx_hash(text: &str) -> bool {
    let digits = text.strip_prefix("0x");
    digits.is_some_and(|digits| digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn read<T: DeserializeOwned>(endpoint: &str, status: StatusCode, body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|_| said(endpoint, status))
}

fn said(endpoint: &str, status: StatusCode) -> String {
    format!("{endpoint}: HTTP {} and not an answer of x402", status.as_u16())
}

/// What `/supported` lists.
#[derive(Deserialize)]
struct Supported {
    kinds: Vec<SupportedKind>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SupportedKind {
    x402_version: i64,
    scheme: String,
    network: String,
}

impl Supported {
    /// The newest version in which it settles exact payments on our network.
    fn version_for(&self, payments: &config::Payments) -> Result<Version, String> {
        let has = |version: i64, networks: [&str; 2]| {
            self.kinds.iter().any(|kind| {
                kind.x402_version == version
                    && kind.scheme == SCHEME
                    && networks.contains(&kind.network.as_str())
            })
        };
        let (network, v1_network) = (payments.network(), v1_network(payments));
        // In version 2 a pattern may stand for all networks of a family.
        if has(2, [&network, "eip155:*"]) {
            Ok(Version::V2)
        } else if has(1, [&v1_network, &network]) {
            Ok(Version::V1)
        } else {
            Err(format!("it does not settle scheme {SCHEME} on {network}: use another facilitator"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn called(status: u16, body: &str) -> Called {
        Ok((StatusCode::from_u16(status).unwrap(), body.as_bytes().to_vec()))
    }

    #[test]
    fn an_answer_is_believed_to_be_no_more_than_it_says() {
        let hash = format!("0x{}", "ab".repeat(32));
        let sent = format!("{{\"success\":true,\"transaction\":\"{hash}\",\"network\":\"base\"}}");
        assert_eq!(settled(called(200, &sent)), Answer::Sent(Some(hash)));
        assert_eq!(settled(called(200, r#"{"success":true,"transaction":"0x12"}"#)), Answer::Sent(None));
        assert_eq!(settled(called(200, r#"{"success":true}"#)), Answer::Sent(None));
        let pending = r#"{"success":false,"errorReason":"settlement_pending","transaction":"0x12"}"#;
        assert_eq!(settled(called(200, pending)), Answer::Pending);
        let refused = r#"{"success":false,"errorReason":"invalid_exact_evm_signature","transaction":""}"#;
        for status in [200, 400, 402, 412] {
            let answer = settled(called(status, refused));
            assert_eq!(answer, Answer::Refused("invalid_exact_evm_signature".into()));
        }
        for reason in ["null", "\"\"", "\"two words\"", &format!("\"{}\"", "a".repeat(101))] {
            let answer = settled(called(200, &format!("{{\"success\":false,\"errorReason\":{reason}}}")));
            assert_eq!(answer, Answer::Refused(NO_REASON.into()));
        }
        for (status, body) in [
            (500, sent.as_str()),
            (404, &sent),
            (302, &sent),
            (500, refused),
            (307, refused),
            (200, "{}"),
            (200, ""),
            (200, "settled"),
            (200, r#"{"success":"true"}"#),
        ] {
            assert!(matches!(settled(called(status, body)), Answer::Failed(_)), "{status} {body}");
        }
    }

    #[test]
    fn only_a_yes_to_verify_goes_on_to_settle() {
        assert_eq!(verified(called(200, r#"{"isValid":true,"payer":"0x12"}"#)), None);
        let no = r#"{"isValid":false,"invalidReason":"invalid_exact_evm_nonce_already_used"}"#;
        let refused = Answer::Refused("invalid_exact_evm_nonce_already_used".into());
        assert_eq!(verified(called(200, no)), Some(refused.clone()));
        assert_eq!(verified(called(400, no)), Some(refused));
        for (status, body) in [(500, r#"{"isValid":true}"#), (503, no), (200, "{}"), (200, "yes")] {
            assert!(matches!(verified(called(status, body)), Some(Answer::Failed(_))), "{status} {body}");
        }
    }

    #[test]
    fn pauses_grow_up_to_a_bound() {
        let failed = Answer::Failed(String::new());
        let pauses: Vec<_> = [1, 2, 3, 9, 10, 64, i64::MAX].map(|calls| failed.pause_seconds(calls)).into();
        assert_eq!(pauses, [1, 2, 4, 256, 300, 300, 300]);
        assert_eq!(Answer::Sent(None).pause_seconds(1), 30);
    }
}
