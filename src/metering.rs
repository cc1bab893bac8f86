//! One paid request: quote → hold → upstream → settle or release → receipt.
//!
//! From the hold on everything runs in a task of its own, so that a client that goes away leaves
//! nothing half done. An [`OpenHold`] ends exactly once; one that is dropped by a bug is released.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

use metrics::Counter;

use crate::auth::Principal;
use crate::claims::{Claim, Claimed, KeptAnswer, KeptAnswers, Kind, MAX_KEPT_BYTES};
use crate::clock::Clock;
use crate::formats::chat::{Answer, Bounds, ChatRequest, Forward, StreamTap};
use crate::formats::sse::{Event, Splitter};
use crate::id::Wallet;
use crate::ledger::{Ended, Ending, Hold, Ledger, LedgerError, Outcome};
use crate::limits::{LimitError, Limits, Place};
use crate::money::{MarkupBps, MicroUsdc};
use crate::pricing::{self, Charge, Offer, Quote, Reasoning, Reported, Terms, Usage};
use crate::providers::{AnswerStream, OpenAi, Providers, UpstreamError};
use crate::tasks::Tasks;

/// Events on their way to a client that reads slowly; the upstream waits when they are this many.
const CLIENT_BUFFER_EVENTS: usize = 16;
/// A client that takes nothing for this long is taken to be gone.
const CLIENT_STALL: Duration = Duration::from_secs(60);
/// How long a stream is read on for its usage when its client has gone …
const DRAIN: Duration = Duration::from_secs(30);
/// … and how many at once: each costs a connection and nobody reads it.
const MAX_DRAINS: usize = 64;
/// How long an answer waits for its settlement while the database is away.
const SETTLE_WAIT: Duration = Duration::from_secs(15);
/// The end of a stream that is whole.
const DONE: &[u8] = b"data: [DONE]\n\n";
/// The reason on the receipt of a request that our own stop cut off.
const STOPPED: &str = "gateway_stopped";
/// A settlement is tried again this often until the database is back.
const SETTLE_RETRY: Duration = Duration::from_millis(500);

#[derive(Debug, thiserror::Error)]
pub enum MeteringError {
    /// The wallet cannot cover the worst case; it could cover one of `affordable` output tokens.
    #[error("{required} micro-USDC are required and {available} are available")]
    Insufficient { required: MicroUsdc, available: MicroUsdc, affordable: Option<u64> },
    #[error("the request cannot be priced")]
    Unpriceable,
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Limited(#[from] LimitError),
    /// The answer is there, but the database did not take its settlement in time.
    #[error("the settlement did not come through in time")]
    SettlementLate,
    #[error("the server is stopping")]
    Stopping,
    /// Another request has the order's name: this one, if it asks for the same, is answered as that one.
    #[error("request {} has this name", .0.request_id)]
    Claimed(Claimed),
}

/// Who asks, and by which names: the request's own, and the one it may be sent again by.
pub struct Order {
    pub id: String,
    pub principal: Principal,
    pub claim: Option<Claim>,
}

/// What becomes of a request that is sent again.
pub enum Replay {
    /// It is still being run.
    Running,
    /// It was run and charged, and its answer is not kept.
    NotKept {
        charged: MicroUsdc,
    },
    Answer(PaidAnswer),
    /// The whole stream as it was sent.
    Stream(Bytes),
}

/// A whole answer and what was charged for it.
pub struct PaidAnswer {
    pub body: Bytes,
    pub ended: Ended,
}

/// Takes requests through the pipeline. Cheap to clone.
#[derive(Clone)]
pub struct Metering(Arc<Parts>);

struct Parts {
    ledger: Ledger,
    kept: KeptAnswers,
    providers: Providers,
    clock: Clock,
    tasks: Tasks,
    markup: MarkupBps,
    limits: Limits,
    drains: Arc<Semaphore>,
}

/// What is known of a request before it is held.
pub struct Quoted {
    terms: Terms,
    bounds: Bounds,
    quote: Quote,
    may_reason_unseen: bool,
}

impl Quoted {
    /// What the request can cost at most.
    pub fn price(&self) -> MicroUsdc {
        self.quote.amount
    }
}

impl Metering {
    pub fn new(
        ledger: Ledger,
        kept: KeptAnswers,
        providers: Providers,
        clock: Clock,
        tasks: Tasks,
        markup: MarkupBps,
        limits: Limits,
    ) -> Self {
        let drains = Arc::new(Semaphore::new(MAX_DRAINS));
        Self(Arc::new(Parts { ledger, kept, providers, clock, tasks, markup, limits, drains }))
    }

    /// Prices a request by its bounds, at today's prices.
    pub fn quote(&self, bounds: Bounds, offer: &Offer) -> Result<Quoted, MeteringError> {
        let terms = offer.terms(self.0.markup);
        let quote = pricing::quote(&terms, bounds.most());
        let quote = quote.ok_or(MeteringError::Unpriceable)?;
        // Of a model that may be asked to reason, nobody can tell how much it did.
        let may_reason_unseen = offer.reasoning != Reasoning::Reject;
        Ok(Quoted { terms, bounds, quote, may_reason_unseen })
    }

    /// Runs a request to its whole answer. The answer is settled when this returns; the request is
    /// run and settled also when the future is dropped.
    pub async fn answer(
        &self,
        order: Order,
        request: &ChatRequest<'_>,
        quoted: Quoted,
        offer: &Offer,
    ) -> Result<PaidAnswer, MeteringError> {
        let upstream = self.upstream(offer)?.clone();
        let body = request.upstream_body(offer);
        let model = request.model.clone();
        let metering = self.clone();
        let run = async move {
            let open = metering.begin(order, quoted).await?;
            answer_whole(open, &upstream, body, &model).await
        };
        self.0.tasks.see_through(run).await
    }

    /// Runs a request whose answer is streamed. Returns when the upstream has begun to answer; the
    /// receiver then yields what the client gets, and the last event comes after the settlement.
    pub async fn stream(
        &self,
        order: Order,
        request: &ChatRequest<'_>,
        quoted: Quoted,
        offer: &Offer,
    ) -> Result<mpsc::Receiver<Bytes>, MeteringError> {
        let upstream = self.upstream(offer)?.clone();
        let body = request.upstream_body(offer);
        let tap = StreamTap::new(&request.model, request.wants_usage, request.choices());
        let metering = self.clone();
        let run = async move {
            let open = metering.begin(order, quoted).await?;
            let answer = tokio::select! {
                answer = upstream.chat_stream(body) => answer,
                () = metering.0.tasks.aborted() => {
                    open.release(STOPPED).await;
                    return Err(MeteringError::Stopping);
                }
            };
            match answer {
                Err(error) => {
                    open.release(error.reason()).await;
                    Err(error.into())
                }
                Ok(answer) => {
                    let (client, events) = mpsc::channel(CLIENT_BUFFER_EVENTS);
                    let sent = open.kept.is_some().then(Vec::new);
                    let stream =
                        LiveStream { answer, splitter: Splitter::default(), tap, client, sent, open };
                    // By itself from here on: it goes no faster than its client, and on without one.
                    metering.0.tasks.spawn(metering.clone().pump(stream));
                    Ok(events)
                }
            }
        };
        self.0.tasks.see_through(run).await
    }

    /// What becomes of a request whose order was claimed before, by a request of the same wallet.
    pub async fn replay(&self, wallet: Wallet, request_id: &str) -> Result<Replay, MeteringError> {
        let receipt = match self.0.ledger.receipt(wallet, request_id).await? {
            Some(receipt) if receipt.outcome != Outcome::Released => receipt,
            // Not ended; or it has just come to nothing, and its name is free from now on.
            _ => return Ok(Replay::Running),
        };
        let charged = receipt.charged;
        let kept = self.0.kept.find(request_id).await.map_err(LedgerError::from)?;
        Ok(match kept {
            None => Replay::NotKept { charged },
            Some(KeptAnswer { kind: Kind::Stream, body }) => {
                Replay::Stream([body.as_ref(), DONE].concat().into())
            }
            Some(KeptAnswer { kind: Kind::Json, body }) => match Answer::parse(&body) {
                Ok(answer) => {
                    let balance = self.0.ledger.balance(wallet).await?;
                    let body = answer.render(&receipt.terms.model, charged);
                    Replay::Answer(PaidAnswer { body, ended: Ended { charged, balance } })
                }
                Err(_) => Replay::NotKept { charged },
            },
        })
    }

    fn upstream(&self, offer: &Offer) -> Result<&OpenAi, MeteringError> {
        self.0.providers.get(&offer.provider).ok_or(MeteringError::Unpriceable)
    }

    /// Holds what a request can cost at most.
    async fn begin(&self, order: Order, quoted: Quoted) -> Result<OpenHold, MeteringError> {
        let Parts { ledger, tasks, .. } = &*self.0;
        let place = self.0.limits.place(order.principal.wallet)?;
        let hold = Hold {
            id: order.id,
            wallet: order.principal.wallet,
            api_key_id: order.principal.api_key_id,
            amount: quoted.quote.amount,
            terms: quoted.terms,
            created_at: self.0.clock.now(),
        };
        let held = match &order.claim {
            Some(claim) => ledger.hold_claimed(&hold, claim).await,
            None => ledger.hold_early(&hold).await,
        };
        match held {
            Ok(_) => {}
            Err(LedgerError::Claimed(claimed)) => return Err(MeteringError::Claimed(claimed)),
            Err(LedgerError::Insufficient { required, balance }) => {
                let available = balance.available();
                let affordable = quoted.quote.affordable_completion(&hold.terms, available);
                return Err(MeteringError::Insufficient { required, available, affordable });
            }
            Err(LedgerError::Db(error)) => {
                // Whether the hold was made nobody knows: its commit may have come through. It is
                // ended, so that it cannot lock the wallet's money for ever.
                let ending = Ending::released(hold, "gateway_error");
                tasks.spawn(book_until_done(ledger.clone(), tasks.clone(), ending, None));
                return Err(LedgerError::Db(error).into());
            }
            Err(other) => return Err(other.into()),
        }
        metrics::counter!("farebox_holds_total").increment(1);
        Ok(OpenHold {
            hold: Some(hold),
            bounds: quoted.bounds,
            may_reason_unseen: quoted.may_reason_unseen,
            kept: order.claim.map(|_| self.0.kept.clone()),
            ledger: ledger.clone(),
            tasks: tasks.clone(),
            _place: place,
        })
    }

    /// Passes a stream on until it ends, one way or another, and ends its hold.
    async fn pump(self, mut stream: LiveStream) {
        let end = stream.forward(&self.0.tasks).await;
        // Of a stream that is open, only what forwards it takes memory.
        Box::pin(self.finish(stream, end)).await;
    }

    /// Ends the hold of a stream that has ended, and then the client's answer.
    async fn finish(&self, mut stream: LiveStream, end: End) {
        let (is_whole, reason) = match &end {
            End::Complete => (true, None),
            End::Failed(error) => (false, Some(error.reason())),
            End::Stopping => (false, Some(STOPPED)),
            End::ClientGone => (self.drain(&mut stream).await, Some("client_gone")),
        };
        let LiveStream { tap, client, sent, open, .. } = stream;
        if let (true, Some(sent)) = (is_whole, &sent) {
            open.keep(Kind::Stream, sent).await;
        }
        let nothing_came =
            !tap.delivered_anything() && tap.usage().is_none_or(|usage| usage.completion_tokens() == 0);
        let settled = if nothing_came && matches!(end, End::Failed(_) | End::Stopping) {
            open.release(reason.unwrap_or(STOPPED)).await
        } else {
            let delivered = Delivered::from_tap(&tap, is_whole || tap.is_reported_at_end());
            open.settle(delivered, reason, WhenLate::KeepTrying).await
        };
        let last = match (&end, settled) {
            (End::Complete, Some(_)) => Bytes::from_static(DONE),
            (End::Complete, None) => failure_event(&MeteringError::SettlementLate),
            (End::Failed(error), _) => failure_event(error),
            (End::Stopping | End::ClientGone, _) => failure_event(&MeteringError::Stopping),
        };
        // If nobody is there to read it, that is all the same.
        let _ = tokio::time::timeout(CLIENT_STALL, client.send(last)).await;
    }

    /// Reads a stream on for its usage, now that its client has gone, for a while and not too many.
    /// Whether it came to its end.
    async fn drain(&self, stream: &mut LiveStream) -> bool {
        let Ok(_permit): Result<OwnedSemaphorePermit, _> = Arc::clone(&self.0.drains).try_acquire_owned()
        else {
            return false;
        };
        let deadline = Instant::now() + DRAIN;
        let read = async {
            loop {
                match stream.next_event().await {
                    Ok(Some(event)) => match stream.tap.event(&event) {
                        Forward::Send(bytes) => stream.note_sent(&bytes),
                        Forward::Skip => {}
                        Forward::Done => return true,
                        Forward::Failed | Forward::Nonsense => return false,
                    },
                    Ok(None) => return stream.tap.is_finished(),
                    Err(_) => return false,
                }
            }
        };
        tokio::select! {
            is_whole = tokio::time::timeout_at(deadline, read) => is_whole.unwrap_or(false),
            () = self.0.tasks.aborted() => false,
        }
    }
}

/// Runs a held request to its whole answer and settles it.
async fn answer_whole(
    open: OpenHold,
    upstream: &OpenAi,
    body: Bytes,
    model: &str,
) -> Result<PaidAnswer, MeteringError> {
    let answered = tokio::select! {
        answered = upstream.chat(body) => answered,
        () = open.tasks.aborted() => {
            open.release(STOPPED).await;
            return Err(MeteringError::Stopping);
        }
    };
    let body = match answered {
        Ok(body) => body,
        Err(error) => {
            open.release(error.reason()).await;
            return Err(error.into());
        }
    };
    let Ok(answer) = Answer::parse(&body) else {
        open.release(UpstreamError::Nonsense.reason()).await;
        return Err(UpstreamError::Nonsense.into());
    };
    let delivered = Delivered {
        usage: answer.usage(),
        usage_raw: answer.usage_raw().map(str::to_owned),
        estimated_completion: answer.estimated_completion(),
        is_whole: true,
    };
    open.keep(Kind::Json, &body).await;
    let settled = open.settle(delivered, None, WhenLate::Release).await;
    let ended = settled.ok_or(MeteringError::SettlementLate)?;
    Ok(PaidAnswer { body: answer.render(model, ended.charged), ended })
}

/// How a stream came to its end.
enum End {
    Complete,
    Failed(UpstreamError),
    ClientGone,
    Stopping,
}

impl End {
    /// How an event ends the stream that it is not passed on of.
    fn said(by: Forward) -> Self {
        match by {
            Forward::Failed => Self::Failed(UpstreamError::BrokeOff),
            Forward::Nonsense => Self::Failed(UpstreamError::Nonsense),
            Forward::Done | Forward::Send(_) | Forward::Skip => Self::Complete,
        }
    }
}

/// Events on their way to the client together, because they came together.
#[derive(Default)]
enum Passed {
    #[default]
    Nothing,
    One(Bytes),
    Several(BytesMut),
}

impl Passed {
    fn add(&mut self, event: Bytes) {
        *self = match std::mem::take(self) {
            Self::Nothing => Self::One(event),
            Self::One(first) => {
                let mut several = BytesMut::with_capacity(4 * (first.len() + event.len()));
                several.extend_from_slice(&first);
                several.extend_from_slice(&event);
                Self::Several(several)
            }
            Self::Several(mut several) => {
                several.extend_from_slice(&event);
                Self::Several(several)
            }
        };
    }

    fn into_bytes(self) -> Bytes {
        match self {
            Self::Nothing => Bytes::new(),
            Self::One(event) => event,
            Self::Several(several) => several.freeze(),
        }
    }
}

/// A stream from an upstream to a client, and the hold that pays for it.
struct LiveStream {
    answer: AnswerStream,
    splitter: Splitter,
    tap: StreamTap,
    client: mpsc::Sender<Bytes>,
    /// What the client was sent, or would have been: `None` where nobody may ask for it again, or it
    /// has become too much.
    sent: Option<Vec<u8>>,
    open: OpenHold,
}

impl LiveStream {
    fn note_sent(&mut self, bytes: &[u8]) {
        if let Some(sent) = &mut self.sent {
            sent.extend_from_slice(bytes);
        }
        if self.sent.as_ref().is_some_and(|sent| sent.len() > MAX_KEPT_BYTES) {
            self.sent = None;
        }
    }

    /// Passes events on as they come, no faster than the client takes them.
    async fn forward(&mut self, tasks: &Tasks) -> End {
        let client = self.client.clone();
        let (mut client_gone, mut aborted) = (pin!(client.closed()), pin!(tasks.aborted()));
        loop {
            let piece = tokio::select! {
                piece = self.answer.next() => piece,
                () = &mut client_gone => return End::ClientGone,
                () = &mut aborted => return End::Stopping,
            };
            let (passed, end) = match piece {
                Ok(Some(bytes)) => self.pass(&bytes),
                Ok(None) => self.pass_rest(),
                Err(error) => return End::Failed(error),
            };
            if !passed.is_empty() {
                let sent = tokio::select! {
                    sent = tokio::time::timeout(CLIENT_STALL, client.send(passed)) => sent,
                    () = &mut aborted => return End::Stopping,
                };
                if !matches!(sent, Ok(Ok(()))) {
                    // Where the end is here already, there is nothing to read on for.
                    return end.unwrap_or(End::ClientGone);
                }
            }
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// What the client gets of a piece of the answer, and how the stream ended if it did: of all events
    /// that it makes whole.
    fn pass(&mut self, piece: &[u8]) -> (Bytes, Option<End>) {
        self.splitter.push(piece);
        let mut passed = Passed::default();
        let end = loop {
            match self.splitter.next_event() {
                Ok(Some(event)) => match self.tap.event(&event) {
                    Forward::Send(bytes) => passed.add(bytes),
                    Forward::Skip => {}
                    ends => break Some(End::said(ends)),
                },
                Ok(None) => break None,
                Err(_) => break Some(End::Failed(UpstreamError::Nonsense)),
            }
        };
        let passed = passed.into_bytes();
        self.note_sent(&passed);
        (passed, end)
    }

    /// The same of what is left when the answer has ended.
    fn pass_rest(&mut self) -> (Bytes, Option<End>) {
        let rest = std::mem::take(&mut self.splitter).rest();
        let (mut passed, mut end) = (Bytes::new(), None);
        match rest.map(|event| self.tap.event(&event)) {
            None | Some(Forward::Skip) => {}
            Some(Forward::Send(bytes)) => passed = bytes,
            Some(ends) => end = Some(End::said(ends)),
        }
        self.note_sent(&passed);
        let is_whole = self.tap.is_finished();
        let unsaid = || if is_whole { End::Complete } else { End::Failed(UpstreamError::BrokeOff) };
        (passed, Some(end.unwrap_or_else(unsaid)))
    }

    async fn next_event(&mut self) -> Result<Option<Event>, UpstreamError> {
        loop {
            match self.splitter.next_event() {
                Ok(Some(event)) => return Ok(Some(event)),
                Ok(None) => {}
                Err(_) => return Err(UpstreamError::Nonsense),
            }
            match self.answer.next().await? {
                Some(bytes) => self.splitter.push(&bytes),
                None => return Ok(std::mem::take(&mut self.splitter).rest()),
            }
        }
    }
}

/// What came of a request, as far as it is known.
struct Delivered {
    usage: Option<Usage>,
    usage_raw: Option<String>,
    estimated_completion: u64,
    /// Whether this is all there was to come: then a report of usage is the last word.
    is_whole: bool,
}

impl Delivered {
    fn from_tap(tap: &StreamTap, is_whole: bool) -> Self {
        Self {
            is_whole,
            usage: tap.usage(),
            usage_raw: tap.usage_raw().map(str::to_owned),
            estimated_completion: tap.estimated_completion(),
        }
    }
}

/// What to do about a settlement that the database does not take in time.
#[derive(Copy, Clone, PartialEq, Eq)]
enum WhenLate {
    /// The client has its answer, so it is settled when the database is back.
    KeepTrying,
    /// The answer is withheld, so nothing is charged for it.
    Release,
}

/// A hold that has not ended.
struct OpenHold {
    /// Taken when it ends.
    hold: Option<Hold>,
    bounds: Bounds,
    may_reason_unseen: bool,
    /// Where the answer is kept, if it may be asked for again.
    kept: Option<KeptAnswers>,
    ledger: Ledger,
    tasks: Tasks,
    /// Among the wallet's requests under way; given back with the hold.
    _place: Place,
}

impl OpenHold {
    /// Keeps an answer before it is settled, if it may be asked for again.
    async fn keep(&self, kind: Kind, body: &[u8]) {
        let (Some(kept), Some(hold)) = (&self.kept, &self.hold) else { return };
        if let Err(error) = kept.keep(&hold.id, kind, body).await {
            tracing::warn!(request = %hold.id, %error, "an answer is not kept; it cannot be asked for again");
        }
    }

    /// Ends the hold at the charge for what was used, as far as that is known. `None` if the database
    /// did not take it in time.
    async fn settle(
        mut self,
        delivered: Delivered,
        reason: Option<&str>,
        when_late: WhenLate,
    ) -> Option<Ended> {
        let hold = self.hold.take()?;
        let estimate = self.estimate(delivered.estimated_completion);
        let (outcome, usage) = match delivered.usage {
            Some(usage) if delivered.is_whole => (Outcome::Settled, usage),
            // A report from before the end knows the prompt, and may not know all of the output.
            Some(usage) if usage.prompt_tokens() > 0 => {
                (Outcome::Estimated, usage.at_least(0, estimate.completion_tokens()))
            }
            Some(usage) => {
                (Outcome::Estimated, usage.at_least(estimate.prompt_tokens(), estimate.completion_tokens()))
            }
            None => (Outcome::Estimated, estimate),
        };
        let unseen = self.may_reason_unseen && delivered.is_whole && outcome == Outcome::Estimated;
        let charge = match hold.terms.charge(&usage, hold.amount) {
            Some(charge) if unseen => Charge { charged: hold.amount, ..charge },
            Some(charge) => charge,
            // No sum of bounded tokens and prices leaves 128 bits; if one did, the hold is the most.
            None => Charge { charged: hold.amount, ..Charge::default() },
        };
        if !charge.unpriced.is_empty() {
            tracing::error!(
                request = %hold.id, model = %hold.terms.model, units = %charge.unpriced,
                "a request used what has no price; it is charged for the rest"
            );
            metrics::counter!("farebox_unpriced_requests_total", "model" => hold.terms.model.clone())
                .increment(1);
        }
        if charge.above_hold > MicroUsdc::ZERO {
            tracing::error!(
                request = %hold.id, model = %hold.terms.model, above_hold_micro = charge.above_hold.get(),
                "a request cost more than its hold; the operator bears the difference"
            );
            metrics::counter!("farebox_above_hold_micro_total")
                .increment(u64::try_from(charge.above_hold.get()).unwrap_or_default());
        }
        let usage_raw = delivered.usage_raw;
        let upstream_cost = usage_raw.as_deref().and_then(Reported::cost_in);
        let reason = match (reason, outcome) {
            (Some(reason), _) => Some(reason.to_owned()),
            (None, Outcome::Estimated) => Some("usage_missing".to_owned()),
            (None, _) => None,
        };
        self.book(Ending { hold, outcome, reason, usage, usage_raw, upstream_cost, charge }, when_late).await
    }

    /// Ends the hold without a charge.
    async fn release(mut self, reason: &str) -> Option<Ended> {
        let hold = self.hold.take()?;
        self.book(Ending::released(hold, reason), WhenLate::KeepTrying).await
    }

    /// The whole prompt and what was delivered, within the bounds.
    fn estimate(&self, completion: u64) -> Usage {
        Usage::tokens(self.bounds.estimated_prompt, completion.min(self.bounds.completion))
    }

    /// Writes an end into the books, again and again while the database is away.
    async fn book(&self, ending: Ending, when_late: WhenLate) -> Option<Ended> {
        let late = (when_late == WhenLate::Release).then(Arc::<AtomicBool>::default);
        let (ledger, tasks) = (self.ledger.clone(), self.tasks.clone());
        let mut booking = self.tasks.see_through(book_until_done(ledger, tasks, ending, late.clone()));
        let booked = tokio::time::timeout(SETTLE_WAIT, &mut booking).await;
        // Said before it goes on by itself.
        if let (Err(_), Some(late)) = (&booked, late) {
            late.store(true, Ordering::Relaxed);
        }
        booked.ok()?
    }
}

/// Once it is too late, the hold is released instead; the first end that commits stands.
async fn book_until_done(
    ledger: Ledger,
    tasks: Tasks,
    mut ending: Ending,
    late: Option<Arc<AtomicBool>>,
) -> Option<Ended> {
    loop {
        match ledger.end(&ending).await {
            Ok(ended) => {
                count_end(&ending, &ended);
                return Some(ended);
            }
            Err(LedgerError::Db(error)) if error.may_pass() => {
                tracing::error!(request = %ending.hold.id, %error, "a hold's end is not booked yet");
            }
            Err(error @ LedgerError::Db(_)) => {
                tracing::error!(request = %ending.hold.id, %error, "a hold's end cannot be booked: look into it");
                return None;
            }
            Err(error) => {
                tracing::error!(request = %ending.hold.id, %error, "a hold ended before, otherwise");
                return None;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(SETTLE_RETRY) => {}
            () = tasks.aborted() => return None,
        }
        if late.as_ref().is_some_and(|late| late.load(Ordering::Relaxed)) {
            ending = Ending::released(ending.hold, "settlement_late");
        }
    }
}

/// Counters of what has ended of a model in one way, each looked up by its labels once.
struct EndCounters {
    ended: Counter,
    charged_micro: Counter,
    prompt_tokens: Counter,
    completion_tokens: Counter,
}

impl EndCounters {
    fn new(model: &str, outcome: Outcome) -> Self {
        let labels = [("model", model.to_owned()), ("outcome", outcome.as_str().to_owned())];
        let tokens =
            |kind| metrics::counter!("farebox_tokens_total", "model" => model.to_owned(), "kind" => kind);
        Self {
            ended: metrics::counter!("farebox_holds_ended_total", &labels),
            charged_micro: metrics::counter!("farebox_charged_micro_total", &labels),
            prompt_tokens: tokens("prompt"),
            completion_tokens: tokens("completion"),
        }
    }
}

/// By model and outcome: those of the catalogue, so that there is a bounded number of them.
static END_COUNTERS: LazyLock<Mutex<HashMap<String, HashMap<Outcome, EndCounters>>>> =
    LazyLock::new(Mutex::default);

fn count_end(ending: &Ending, ended: &Ended) {
    let (hold, outcome) = (&ending.hold, ending.outcome);
    let model = hold.terms.model.as_str();
    {
        let mut known = END_COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains_key(model) {
            known.insert(model.to_owned(), HashMap::new());
        }
        if let Some(of_model) = known.get_mut(model) {
            let counters = of_model.entry(outcome).or_insert_with(|| EndCounters::new(model, outcome));
            counters.ended.increment(1);
            counters.charged_micro.increment(u64::try_from(ended.charged.get()).unwrap_or_default());
            counters.prompt_tokens.increment(ending.usage.prompt_tokens());
            counters.completion_tokens.increment(ending.usage.completion_tokens());
        }
    }
    tracing::info!(
        request = %hold.id, wallet = %hold.wallet, %model, outcome = outcome.as_str(), reason = ending.reason,
        prompt = ending.usage.prompt_tokens(), completion = ending.usage.completion_tokens(),
        charged_micro = ended.charged.get(), "hold ended"
    );
}

impl Drop for OpenHold {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take() {
            tracing::error!(request = %hold.id, "a hold was dropped without an end; it is released");
            let ending = Ending::released(hold, "gateway_error");
            self.tasks.spawn(book_until_done(self.ledger.clone(), self.tasks.clone(), ending, None));
        }
    }
}

/// The last event of a stream that failed, in the shape of the API's errors.
fn failure_event(error: &dyn std::fmt::Display) -> Bytes {
    let body = serde_json::json!({
        "error": {"message": error.to_string(), "type": "server_error", "code": "stream_failed", "param": null}
    });
    Event::from_data(body.to_string().as_bytes())
}
