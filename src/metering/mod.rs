//! One paid request: quote → hold → upstream → settle or release → receipt.
//!
//! From the hold on everything runs to its end, whether its client waits for it or not, so that one that
//! goes away leaves nothing half done.

mod live_stream;
mod open_hold;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

use crate::auth::Principal;
use crate::claims::{Claim, Claimed, KeptAnswer, KeptAnswers, Kind};
use crate::clock::Clock;
use crate::formats::chat::{Answer, Bounds, ChatRequest, Forward, StreamTap};
use crate::formats::sse::{Event, Splitter};
use crate::id::Wallet;
use crate::ledger::{Ended, Ending, Hold, Ledger, LedgerError, Outcome};
use crate::limits::{LimitError, Limits};
use crate::money::{MarkupBps, MicroUsdc};
use crate::pricing::{self, Offer, Quote, Reasoning, Terms};
use crate::providers::{OpenAi, Providers, UpstreamError};
use crate::tasks::Tasks;
use live_stream::{End, LiveStream};
use open_hold::{Delivered, OpenHold, WhenLate, book_until_done};

/// Events on their way to a client that reads slowly; the upstream waits when they are this many.
const CLIENT_BUFFER_EVENTS: usize = 16;
/// A client that takes nothing for this long is taken to be gone.
const CLIENT_STALL: Duration = Duration::from_secs(60);
/// How long a stream is read on for its usage when its client has gone …
const DRAIN: Duration = Duration::from_secs(30);
/// … and how many at once: each costs a connection and nobody reads it.
const MAX_DRAINS: usize = 64;
/// The end of a stream that is whole.
const DONE: &[u8] = b"data: [DONE]\n\n";
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

/// The last event of a stream that failed, in the shape of the API's errors.
fn failure_event(error: &dyn std::fmt::Display) -> Bytes {
    let body = serde_json::json!({
        "error": {"message": error.to_string(), "type": "server_error", "code": "stream_failed", "param": null}
    });
    Event::from_data(body.to_string().as_bytes())
}
