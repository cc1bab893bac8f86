//! A hold and how it ends: exactly once. One that is dropped by a bug is released.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use metrics::Counter;

use crate::claims::{KeptAnswers, Kind};
use crate::formats::goods::Tap;
use crate::formats::media::Used;
use crate::formats::request::Bounds;
use crate::ledger::{Ended, Ending, Hold, Ledger, LedgerError, Outcome};
use crate::limits::Place;
use crate::metering::route::Route;
use crate::money::{MicroUsdc, PicoUsd};
use crate::pricing::{Charge, Dialect, Reported, Terms, Usage};
use crate::tasks::Tasks;

/// How long an answer waits for its settlement while the database is away.
const SETTLE_WAIT: Duration = Duration::from_secs(15);
/// A settlement is tried again this often until the database is back.
const SETTLE_RETRY: Duration = Duration::from_millis(500);

/// What came of a request, as far as it is known.
pub struct Delivered {
    pub reported: Option<Reported>,
    pub usage_raw: Option<String>,
    /// 0 where it is of no matter.
    pub estimated_completion: u64,
    /// What was used, of what is no conversation.
    pub used: Option<Used>,
    /// Whether this is all there was to come: then a report of usage is the last word.
    pub is_whole: bool,
}

impl Delivered {
    /// Counting what was delivered takes a look at all of it, which only a report of the whole can save.
    pub fn new(
        dialect: Dialect,
        usage_raw: Option<&str>,
        estimate_completion: impl FnOnce() -> u64,
        is_whole: bool,
    ) -> Self {
        let reported = usage_raw.and_then(|raw| Reported::read(dialect, raw));
        let is_known = is_whole && reported.is_some();
        Self {
            reported,
            usage_raw: usage_raw.map(str::to_owned),
            estimated_completion: if is_known { 0 } else { estimate_completion() },
            used: None,
            is_whole,
        }
    }

    pub fn from_tap(tap: &Tap, dialect: Dialect, is_whole: bool) -> Self {
        Self::new(dialect, tap.usage_raw(), || tap.estimated_completion(), is_whole)
    }

    /// Whether the upstream says that there was any output.
    pub fn is_reported(&self) -> bool {
        self.reported.is_some_and(|reported| reported.usage.completion_tokens() > 0)
    }

    /// What the upstream says that it charges, also in a report that says nothing else of use.
    fn upstream_cost(&self) -> Option<PicoUsd> {
        match (&self.reported, &self.usage_raw) {
            (Some(reported), _) => reported.cost,
            (None, Some(raw)) => Reported::cost_in(raw),
            (None, None) => None,
        }
    }
}

/// How a hold is to end by what was delivered.
pub struct Due {
    outcome: Outcome,
    reason: Option<String>,
    usage: Usage,
    usage_raw: Option<String>,
    upstream_cost: Option<PicoUsd>,
    charge: Charge,
}

impl Due {
    /// Micro-USDC, should nothing come between.
    pub fn charged(&self) -> MicroUsdc {
        self.charge.charged
    }
}

/// What to do about a settlement that the database does not take in time.
#[derive(Copy, Clone, PartialEq, Eq)]
pub enum WhenLate {
    /// The client has its answer, so it is settled when the database is back.
    KeepTrying,
    /// The answer is withheld, so nothing is charged for it.
    Release,
}

/// A hold that has not ended.
pub struct OpenHold {
    /// Taken when it ends.
    pub hold: Option<Hold>,
    pub bounds: Bounds,
    pub may_reason_unseen: bool,
    /// What it can cost at most with the one who answers; held is what the dearest of all can.
    pub ceiling: MicroUsdc,
    /// Where the answer is kept, if it may be asked for again.
    pub kept: Option<KeptAnswers>,
    pub ledger: Ledger,
    pub tasks: Tasks,
    /// Among the wallet's requests under way; given back with the hold.
    pub _place: Place,
}

impl OpenHold {
    /// From now on it is for the one who answers.
    pub fn serve(&mut self, route: &Route) {
        self.bounds = route.bounds;
        self.may_reason_unseen = route.may_reason_unseen();
        self.ceiling = route.quote.amount;
        if let Some(hold) = &mut self.hold
            && hold.terms != route.terms
        {
            hold.terms = route.terms.clone();
        }
    }

    /// What was delivered tells more of the terms than was known of them.
    pub fn agree(&mut self, terms: Option<Terms>) {
        if let (Some(hold), Some(terms)) = (&mut self.hold, terms) {
            hold.terms = terms;
        }
    }

    /// Keeps an answer before it is settled, if it may be asked for again.
    pub async fn keep(&self, kind: Kind, content_type: Option<&str>, body: &[u8]) {
        let (Some(kept), Some(hold)) = (&self.kept, &self.hold) else { return };
        if let Err(error) = kept.keep(&hold.id, kind, content_type, body).await {
            tracing::warn!(request = %hold.id, %error, "an answer is not kept; it cannot be asked for again");
        }
    }

    /// What is due for what was delivered, as far as that is known. `None` once it has ended.
    pub fn due(&self, delivered: Delivered, reason: Option<&str>) -> Option<Due> {
        let hold = self.hold.as_ref()?;
        let (outcome, usage) = match delivered.used {
            None => self.used(&delivered),
            Some(Used::Known(usage)) if delivered.is_whole => (Outcome::Settled, usage),
            Some(Used::Known(usage) | Used::Estimated(usage)) => (Outcome::Estimated, usage),
            Some(Used::Unknown) => (Outcome::Estimated, self.bounds.all(&hold.terms.prices)),
        };
        let unseen = match delivered.used {
            None => self.may_reason_unseen && delivered.is_whole && outcome == Outcome::Estimated,
            Some(used) => used == Used::Unknown,
        };
        let ceiling = self.ceiling.min(hold.amount);
        let charge = match hold.terms.charge(&usage, ceiling) {
            Some(charge) if unseen => Charge { charged: ceiling, ..charge },
            Some(charge) => charge,
            // No sum of bounded tokens and prices leaves 128 bits; if one did, the hold is the most.
            None => Charge { charged: ceiling, ..Charge::default() },
        };
        let reason = match (reason, outcome) {
            (Some(reason), _) => Some(reason.to_owned()),
            (None, Outcome::Estimated) => Some("usage_missing".to_owned()),
            (None, _) => None,
        };
        let upstream_cost = delivered.upstream_cost();
        Some(Due { outcome, reason, usage, usage_raw: delivered.usage_raw, upstream_cost, charge })
    }

    /// What a conversation used.
    fn used(&self, delivered: &Delivered) -> (Outcome, Usage) {
        let estimate = self.estimate(delivered.estimated_completion);
        match delivered.reported.map(|reported| reported.usage) {
            Some(usage) if delivered.is_whole => (Outcome::Settled, usage),
            // A report from before the end knows the prompt, and may not know all of the output.
            Some(usage) if usage.prompt_tokens() > 0 => {
                (Outcome::Estimated, usage.at_least(0, estimate.completion_tokens()))
            }
            Some(usage) => {
                (Outcome::Estimated, usage.at_least(estimate.prompt_tokens(), estimate.completion_tokens()))
            }
            None => (Outcome::Estimated, estimate),
        }
    }

    /// Ends the hold with what is due. `None` if the database did not take it in time.
    pub async fn settle(mut self, due: Due, when_late: WhenLate) -> Option<Ended> {
        let hold = self.hold.take()?;
        tell_of_losses(&hold, &due.charge);
        let Due { outcome, reason, usage, usage_raw, upstream_cost, charge } = due;
        self.book(Ending { hold, outcome, reason, usage, usage_raw, upstream_cost, charge }, when_late).await
    }

    /// Ends the hold without a charge.
    pub async fn release(mut self, reason: &str) -> Option<Ended> {
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

/// What a charge leaves the operator to bear is said aloud.
fn tell_of_losses(hold: &Hold, charge: &Charge) {
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
}

/// Once it is too late, the hold is released instead; the first end that commits stands.
pub async fn book_until_done(
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
