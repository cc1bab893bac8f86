//! One paid request: quote → hold → upstream → settle or release → receipt.
//!
//! From the hold on everything runs to its end, whether its client waits for it or not, so that one that
//! goes away leaves nothing half done.

mod live_stream;
mod open_hold;
mod route;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::auth::Principal;
use crate::claims::{Claim, Claimed, KeptAnswer, KeptAnswers, Kind};
use crate::clock::Clock;
use crate::formats::conversation::UpstreamFormat;
use crate::formats::errors::ErrorText;
use crate::formats::goods::Tap;
use crate::formats::messages::CountTokens;
use crate::formats::request::BadRequest;
use crate::id::Wallet;
use crate::ledger::{Ended, Ending, Hold, Ledger, LedgerError, Outcome};
use crate::limits::{LimitError, Limits};
use crate::money::{MarkupBps, MicroUsdc};
use crate::pricing::{Catalog, Offer};
use crate::providers::{Moment, Providers, Readiness, UpstreamError};
use crate::tasks::Tasks;
use live_stream::{End, LiveStream, Reading};
use open_hold::{Delivered, OpenHold, WhenLate, book_until_done};
use route::{Attempts, Client};

pub use route::{Asked, Quoted};

/// Events on their way to a client that reads slowly; the upstream waits when they are this many.
const CLIENT_BUFFER_EVENTS: usize = 16;
/// A client that takes nothing for this long is taken to be gone.
const CLIENT_STALL: Duration = Duration::from_secs(60);
/// How long a stream is read on for its usage when its client has gone …
const DRAIN: Duration = Duration::from_secs(30);
/// … and how many at once: each costs a connection and nobody reads it.
const MAX_DRAINS: usize = 64;
/// How long a count of tokens is waited for.
const COUNT_TIMEOUT: Duration = Duration::from_secs(10);
/// The reason on the receipt of a request that our own stop cut off.
const STOPPED: &str = "gateway_stopped";

#[derive(Debug, thiserror::Error)]
pub enum MeteringError {
    /// The wallet cannot cover the worst case; it could cover one of `affordable` output tokens.
    #[error("{required} micro-USDC are required and {available} are available")]
    Insufficient { required: MicroUsdc, available: MicroUsdc, affordable: Option<u64> },
    #[error("the request cannot be priced")]
    Unpriceable,
    #[error(transparent)]
    BadRequest(#[from] BadRequest),
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
    /// What it is; `None`: JSON.
    pub content_type: Option<String>,
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

    /// Checks and prices a request for `offer`, at today's prices: what it can cost at most, whoever answers it.
    pub fn quote(
        &self,
        asked: &Asked<'_>,
        catalog: &Catalog,
        offer: &Arc<Offer>,
    ) -> Result<Quoted, MeteringError> {
        let Parts { providers, markup, clock, .. } = &*self.0;
        Quoted::new(asked, clock.now().seconds(), catalog, offer, (providers, *markup))
    }

    /// How long a prompt is: as its upstream says, where that counts, else about as long.
    ///
    /// It is free, so it is asked in passing: it waits for nobody, and what comes of it says nothing of how the
    /// upstream fares with what is paid for.
    pub async fn count_tokens(
        &self,
        wallet: Wallet,
        request: &CountTokens<'_>,
        offer: &Offer,
    ) -> Result<Bytes, MeteringError> {
        let _place = self.0.limits.place(wallet)?;
        let upstream = self.0.providers.get(&offer.provider);
        let upstream = upstream.filter(|upstream| upstream.format() == UpstreamFormat::Messages);
        let turn = upstream.and_then(|upstream| Some((upstream, upstream.turn_in_passing(Moment::now())?)));
        let Some((upstream, turn)) = turn else { return Ok(request.estimate(offer)) };
        let asked = request.to_upstream(offer);
        match tokio::time::timeout(COUNT_TIMEOUT, upstream.whole(turn, &asked)).await {
            Ok(Err(error @ UpstreamError::BadRequest { .. })) => Err(error.into()),
            Ok(Ok(counted)) => {
                Ok(CountTokens::read(&counted.body).unwrap_or_else(|| request.estimate(offer)))
            }
            Ok(Err(_)) | Err(_) => Ok(request.estimate(offer)),
        }
    }

    /// Whether an offer, or one that may stand in for it, has been answering.
    pub fn is_available(&self, catalog: &Catalog, offer: &Offer) -> bool {
        let now = Moment::now();
        let fallbacks = offer.fallbacks.iter().filter_map(|id| catalog.get(id)).map(AsRef::as_ref);
        std::iter::once(offer).chain(fallbacks).any(|offer| {
            let upstream = self.0.providers.get(&offer.provider);
            upstream.is_some_and(|upstream| upstream.readiness(now) == Readiness::Well)
        })
    }

    /// Runs a request to its whole answer. The answer is settled when this returns; the request is
    /// run and settled also when the future is dropped.
    pub async fn answer(&self, order: Order, quoted: Quoted) -> Result<PaidAnswer, MeteringError> {
        let (metering, client) = (self.clone(), Client::default());
        let _waiting = client.waiting();
        let run = async move {
            let open = metering.begin(order, &quoted).await?;
            metering.answer_whole(open, Attempts::new(&quoted, &client)).await
        };
        self.0.tasks.see_through(run).await
    }

    /// Runs a request whose answer is streamed. Returns when there is output, or has been none for a while; the
    /// receiver then yields what the client gets, and the last event comes after the settlement.
    pub async fn stream(&self, order: Order, quoted: Quoted) -> Result<mpsc::Receiver<Bytes>, MeteringError> {
        let (metering, client) = (self.clone(), Client::default());
        let _waiting = client.waiting();
        let run = async move {
            let open = metering.begin(order, &quoted).await?;
            metering.begin_stream(open, Attempts::new(&quoted, &client)).await
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
            Some(KeptAnswer { kind: Kind::Stream, body, .. }) => Replay::Stream(body),
            Some(KeptAnswer { kind: Kind::Json, content_type, body }) => {
                let balance = self.0.ledger.balance(wallet).await?;
                Replay::Answer(PaidAnswer { body, content_type, ended: Ended { charged, balance } })
            }
        })
    }

    /// Holds what a request can cost at most.
    async fn begin(&self, order: Order, quoted: &Quoted) -> Result<OpenHold, MeteringError> {
        let Parts { ledger, tasks, .. } = &*self.0;
        let place = self.0.limits.place(order.principal.wallet)?;
        // Until one answers, it is the first one's.
        let (first, dearest) = (quoted.first(), quoted.dearest());
        let hold = Hold {
            id: order.id,
            wallet: order.principal.wallet,
            api_key_id: order.principal.api_key_id,
            amount: dearest.quote.amount,
            terms: first.terms.clone(),
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
                let affordable = dearest.quote.affordable_completion(&dearest.terms, available);
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
            bounds: first.bounds,
            may_reason_unseen: first.may_reason_unseen(),
            ceiling: first.quote.amount,
            kept: order.claim.map(|_| self.0.kept.clone()),
            ledger: ledger.clone(),
            tasks: tasks.clone(),
            _place: place,
        })
    }

    /// Asks one after the other for a whole answer, and settles the first that is one.
    async fn answer_whole(
        &self,
        mut open: OpenHold,
        mut attempts: Attempts<'_>,
    ) -> Result<PaidAnswer, MeteringError> {
        loop {
            let attempt = match attempts.next(Moment::now()) {
                Ok(attempt) => attempt,
                Err(error) => return Err(given_up(open, error).await),
            };
            let (route, exchange) = (attempt.route, attempt.exchange());
            let answered = tokio::select! {
                answered = route.upstream.whole(attempt.turn, attempt.asked()) => answered,
                () = self.0.tasks.aborted() => return Err(stopped(open).await),
            };
            let read =
                answered.and_then(|whole| match exchange.read(whole.content_type.as_deref(), &whole.body) {
                    Ok(answer) => {
                        route.upstream.succeeded();
                        open.serve(route);
                        let estimate = || answer.estimated_completion();
                        let used = answer.used(&route.terms.prices);
                        let delivered =
                            Delivered::new(exchange.dialect(), answer.usage_raw(), estimate, true);
                        let delivered = Delivered { used, ..delivered };
                        open.agree(answer.terms(&route.terms));
                        let (due, content_type) = (open.due(delivered, None), answer.content_type());
                        Ok(due.map(|due| (answer.render(due.charged()), content_type, due)))
                    }
                    Err(_) => Err(UpstreamError::Nonsense),
                });
            match read {
                Ok(Some((body, content_type, due))) => {
                    open.keep(Kind::Json, content_type.as_deref(), &body).await;
                    let settled = open.settle(due, WhenLate::Release).await;
                    let ended = settled.ok_or(MeteringError::SettlementLate)?;
                    return Ok(PaidAnswer { body, content_type, ended });
                }
                // It has ended already, which nothing does before this.
                Ok(None) => return Err(MeteringError::SettlementLate),
                Err(error) => {
                    if let Err(error) = attempts.failed(&attempt, error, Moment::now()) {
                        return Err(given_up(open, error).await);
                    }
                }
            }
        }
    }

    /// Asks one after the other for a stream, and passes on the first that begins.
    async fn begin_stream(
        &self,
        mut open: OpenHold,
        mut attempts: Attempts<'_>,
    ) -> Result<mpsc::Receiver<Bytes>, MeteringError> {
        loop {
            let attempt = match attempts.next(Moment::now()) {
                Ok(attempt) => attempt,
                Err(error) => return Err(given_up(open, error).await),
            };
            let (route, exchange) = (attempt.route, attempt.exchange());
            let begin = async {
                let answer = route.upstream.stream(attempt.turn, attempt.asked()).await?;
                let mut reading = Reading::new(answer, exchange.tap());
                let (begun, end) = reading.begin().await?;
                Ok((reading, begun, end))
            };
            let begun = tokio::select! {
                begun = begin => begun,
                () = self.0.tasks.aborted() => return Err(stopped(open).await),
            };
            match begun {
                Ok((reading, begun, end)) => {
                    // How it goes on is seen at its end.
                    route.upstream.answered();
                    open.serve(route);
                    let (client, events) = mpsc::channel(CLIENT_BUFFER_EVENTS);
                    let sent = open.kept.is_some().then(Vec::new);
                    let (upstream, turn) = (route.upstream.clone(), attempt.turn);
                    let dialect = exchange.dialect();
                    let stream = LiveStream { upstream, turn, reading, dialect, client, sent, open };
                    // By itself from here on: it goes no faster than its client, and on without one.
                    self.0.tasks.spawn(self.clone().pump(stream, begun, end));
                    return Ok(events);
                }
                Err(error) => {
                    if let Err(error) = attempts.failed(&attempt, error, Moment::now()) {
                        return Err(given_up(open, error).await);
                    }
                }
            }
        }
    }

    /// Passes a stream on until it ends, one way or another, and ends its hold.
    async fn pump(self, mut stream: LiveStream, begun: Bytes, end: Option<End>) {
        let end = stream.forward(begun, end, &self.0.tasks).await;
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
        match &end {
            End::Complete => stream.upstream.succeeded(),
            End::Failed(error) => stream.upstream.failed(stream.turn, error, Moment::now()),
            End::Stopping | End::ClientGone => {}
        }
        let LiveStream { reading, dialect, client, sent, mut open, .. } = stream;
        let mut tap = reading.tap;
        let id = open.hold.as_ref().map(|hold| hold.id.clone());
        let used = open.hold.as_ref().and_then(|hold| tap.used(&hold.terms.prices));
        let terms = open.hold.as_ref().and_then(|hold| tap.terms(&hold.terms));
        open.agree(terms);
        let delivered = Delivered::from_tap(&tap, dialect, is_whole || tap.is_reported_at_end());
        let delivered = Delivered { used, ..delivered };
        // What is reported before the end, of a stream that then failed, nobody has seen anything of.
        let is_reported = tap.is_reported_at_end() && delivered.is_reported();
        let nothing_came = !tap.delivered_anything() && !is_reported;
        let mut last = Bytes::new();
        let settled = if nothing_came && matches!(end, End::Failed(_) | End::Stopping) {
            open.release(reason.unwrap_or(STOPPED)).await
        } else if let Some(due) = open.due(delivered, reason) {
            if is_whole {
                last = tap.last(due.charged());
            }
            if let (true, Some(sent)) = (is_whole, sent) {
                open.keep(Kind::Stream, None, &[sent, last.to_vec()].concat()).await;
            }
            open.settle(due, WhenLate::KeepTrying).await
        } else {
            None
        };
        let failure = |error: &dyn std::fmt::Display| failure_event(&tap, id.as_deref(), error);
        let last = match (&end, settled) {
            (End::Complete, Some(_)) => last,
            (End::Complete, None) => failure(&MeteringError::SettlementLate),
            (End::Failed(error), _) => failure(error),
            (End::Stopping | End::ClientGone, _) => failure(&MeteringError::Stopping),
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
        tokio::select! {
            is_whole = tokio::time::timeout(DRAIN, stream.read_on()) => is_whole.unwrap_or(false),
            () = self.0.tasks.aborted() => false,
        }
    }
}

/// Ends the hold of a request that nobody answered.
async fn given_up(open: OpenHold, error: UpstreamError) -> MeteringError {
    open.release(error.reason()).await;
    error.into()
}

/// Ends the hold of a request that our own stop cuts off.
async fn stopped(open: OpenHold) -> MeteringError {
    open.release(STOPPED).await;
    MeteringError::Stopping
}

/// The last event of a stream that failed, in the client's format.
fn failure_event(tap: &Tap, request_id: Option<&str>, error: &dyn std::fmt::Display) -> Bytes {
    let message = error.to_string();
    tap.failure(&ErrorText { status: 502, code: "stream_failed", message: &message, param: None, request_id })
}
