//! Who may answer a request, and in which order they are asked.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;

use crate::formats::conversation::{ClientFormat, UpstreamFormat};
use crate::formats::exchange::UpstreamRequest;
use crate::formats::goods::{Exchange, Goods, Request};
use crate::formats::messages;
use crate::formats::request::{BadRequest, Bounds};
use crate::metering::MeteringError;
use crate::money::{MarkupBps, MicroUsdc};
use crate::pricing::{self, Catalog, Offer, Quote, Reasoning, Terms};
use crate::providers::{Blame, Moment, Providers, Readiness, Turn, Upstream, UpstreamError};

/// One request is sent on no more often than this, whoever there is to ask.
const MAX_ATTEMPTS: usize = 8;
/// Keys of one route that are tried, so that they leave something for the others.
const MAX_KEYS: usize = 3;
/// Requests that were sent and never answered: each may be billed for, and takes all the time that there is.
const MAX_UNANSWERED: usize = 2;

/// An offer that may answer a request, and what it then costs at most.
pub struct Route {
    pub upstream: Upstream,
    pub offer: Arc<Offer>,
    pub terms: Terms,
    pub bounds: Bounds,
    pub quote: Quote,
}

impl Route {
    /// `None` where no sum of bounded tokens and prices can be held.
    fn new(
        request: &Request<'_>,
        offer: &Arc<Offer>,
        id: &str,
        providers: &Providers,
        markup: MarkupBps,
    ) -> Result<Self, MeteringError> {
        let upstream = providers.get(&offer.provider).ok_or(MeteringError::Unpriceable)?.clone();
        request.check_upstream(offer, upstream.format())?;
        let offer = &request.narrow(offer)?;
        let bounds = request.bounds(offer)?;
        // Whoever serves it, it is the model that was asked for.
        let terms = Terms { model: id.to_owned(), ..offer.terms(markup) };
        let quote = pricing::quote(&terms, bounds.most()).ok_or(MeteringError::Unpriceable)?;
        Ok(Self { upstream, offer: Arc::clone(offer), terms, bounds, quote })
    }

    /// Of a model that may be asked to reason, nobody can tell how much it did.
    pub fn may_reason_unseen(&self) -> bool {
        self.offer.reasoning != Reasoning::Reject
    }
}

/// A request that has a model to be found for.
pub struct Asked<'a> {
    pub request: &'a Request<'a>,
    /// What it was read from, and as what that came.
    pub body: &'a Bytes,
    pub content_type: Option<&'a str>,
    pub id: &'a str,
    /// What its client asks for of what is not in Anthropic's API yet.
    pub betas: Option<&'a str>,
}

/// What an upstream is sent, and how its answer is read.
pub type Prepared = (UpstreamRequest, Exchange);

/// A request, whoever may answer it, and what it costs at most.
pub struct Quoted {
    goods: Goods,
    content_type: Option<String>,
    body: Bytes,
    id: String,
    betas: Option<String>,
    /// Unix seconds.
    created: i64,
    first: Prepared,
    /// At least one, in the order in which they are asked.
    pub routes: Vec<Route>,
}

impl Quoted {
    /// Checks a request against the offer it names and those that may stand in, and prices it. One that the
    /// first cannot serve is refused; of the others those that could not are passed over.
    pub fn new(
        Asked { request, body, content_type, id, betas }: &Asked<'_>,
        created: i64,
        catalog: &Catalog,
        offer: &Arc<Offer>,
        (providers, markup): (&Providers, MarkupBps),
    ) -> Result<Self, MeteringError> {
        let route = |offer: &Arc<Offer>, name: &str| Route::new(request, offer, name, providers, markup);
        let own = route(offer, &offer.id)?;
        let betas = betas.map(str::to_owned);
        let first = prepare(request, &own, (id, created), betas.as_deref())?;
        let mut routes = vec![own];
        let fallbacks = offer.fallbacks.iter().filter_map(|id| catalog.get(id));
        routes.extend(fallbacks.filter_map(|fallback| route(fallback, &offer.id).ok()));
        let (goods, body, content_type) =
            (request.goods(), Bytes::clone(body), content_type.map(str::to_owned));
        Ok(Self { goods, content_type, body, id: (*id).to_owned(), betas, created, first, routes })
    }

    /// The one that is asked first.
    pub fn first(&self) -> &Route {
        &self.routes[0]
    }

    /// What the request can cost at most, whoever answers it.
    pub fn price(&self) -> MicroUsdc {
        self.dearest().quote.amount
    }

    pub fn dearest(&self) -> &Route {
        let dearer = |one: &'_ &Route, other: &'_ &Route| one.quote.amount.cmp(&other.quote.amount);
        self.routes.iter().max_by(dearer).unwrap_or(self.first())
    }

    /// An error where nobody who could take the request is to be asked at the moment.
    pub fn check_available(&self, now: Moment) -> Result<(), UpstreamError> {
        let mut soonest = None;
        for (index, route) in self.routes.iter().enumerate() {
            match route.upstream.readiness(now) {
                Readiness::Open(until) => soonest = soonest.into_iter().chain([until]).min(),
                Readiness::Well | Readiness::Cooling if self.prepare(index).is_some() => return Ok(()),
                Readiness::Well | Readiness::Cooling => {}
            }
        }
        let retry_after = soonest.map_or_else(Default::default, |soonest| soonest.since(now));
        Err(UpstreamError::Unavailable { retry_after })
    }

    /// What `route` is sent; `None` where its format has no place for the request.
    fn prepare(&self, route: usize) -> Option<Cow<'_, Prepared>> {
        if route == 0 {
            return Some(Cow::Borrowed(&self.first));
        }
        let request = Request::parse(self.goods, self.content_type.as_deref(), &self.body).ok()?;
        let name = (self.id.as_str(), self.created);
        prepare(&request, self.routes.get(route)?, name, self.betas.as_deref()).ok().map(Cow::Owned)
    }
}

fn prepare(
    request: &Request<'_>,
    Route { upstream, offer, .. }: &Route,
    (id, created): (&str, i64),
    betas: Option<&str>,
) -> Result<Prepared, BadRequest> {
    let mut asked = request.to_upstream(offer, upstream.format())?;
    if asked.format == UpstreamFormat::Messages
        && request.goods() == Goods::Conversation(ClientFormat::Messages)
    {
        let passed = betas.and_then(|betas| messages::passed_betas(betas, offer.context_length));
        asked.headers.extend(passed.map(|betas| (messages::BETA_HEADER, betas)));
    }
    Ok((asked, request.exchange(upstream.format(), id, created)))
}

/// The attempts at one request: each route with each of its keys at most once, those that fare well before
/// those that had better be left alone.
pub struct Attempts<'a> {
    quoted: &'a Quoted,
    used: Vec<(usize, Turn)>,
    /// Routes that are not asked again, whatever keys there are.
    given_up: Vec<usize>,
    unanswered: usize,
    client: &'a Client,
    first_error: Option<UpstreamError>,
}

/// Whether somebody still waits for an answer. Cheap to clone.
#[derive(Clone, Default)]
pub struct Client(Arc<AtomicBool>);

/// Says that nobody does, when it is dropped.
pub struct Waiting(Client);

impl Client {
    /// To be kept for as long as the answer is waited for.
    pub fn waiting(&self) -> Waiting {
        Waiting(self.clone())
    }

    fn has_left(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// One of them.
pub struct Attempt<'a> {
    pub route: &'a Route,
    pub turn: Turn,
    index: usize,
    prepared: Cow<'a, Prepared>,
}

impl Attempt<'_> {
    /// What the upstream is sent.
    pub fn asked(&self) -> &UpstreamRequest {
        &self.prepared.0
    }

    /// How its answer is read.
    pub fn exchange(&self) -> &Exchange {
        &self.prepared.1
    }
}

impl<'a> Attempts<'a> {
    pub fn new(quoted: &'a Quoted, client: &'a Client) -> Self {
        let (used, given_up) = (Vec::new(), Vec::new());
        Self { quoted, used, given_up, unanswered: 0, client, first_error: None }
    }

    /// The next, or why there is none.
    pub fn next(&mut self, now: Moment) -> Result<Attempt<'a>, UpstreamError> {
        if self.used.len() < MAX_ATTEMPTS
            && let Some(attempt) = self.find(now)
        {
            self.used.push((attempt.index, attempt.turn));
            return Ok(attempt);
        }
        let nobody = || UpstreamError::Unavailable { retry_after: Duration::ZERO };
        let unavailable = || self.quoted.check_available(now).err().unwrap_or_else(nobody);
        Err(self.first_error.take().unwrap_or_else(unavailable))
    }

    fn find(&self, now: Moment) -> Option<Attempt<'a>> {
        for cooling in [false, true] {
            for (index, route) in self.quoted.routes.iter().enumerate() {
                let tried = self.used.iter().filter(|(route, _)| *route == index).count();
                if self.given_up.contains(&index) || tried >= MAX_KEYS {
                    continue;
                }
                // Before its turn, which may be the only one for a while and not to be wasted.
                let Some(prepared) = self.quoted.prepare(index) else { continue };
                let used = |turn| self.used.contains(&(index, turn));
                if let Some(turn) = route.upstream.turn(now, cooling, used) {
                    return Some(Attempt { route, turn, index, prepared });
                }
            }
        }
        None
    }

    /// Notes that an attempt came to nothing. An error where another would, too.
    pub fn failed(
        &mut self,
        attempt: &Attempt<'_>,
        error: UpstreamError,
        now: Moment,
    ) -> Result<(), UpstreamError> {
        attempt.route.upstream.failed(attempt.turn, &error, now);
        self.unanswered += usize::from(error == UpstreamError::Silent);
        if self.unanswered >= MAX_UNANSWERED || self.client.has_left() {
            return Err(self.first_error.take().unwrap_or(error));
        }
        match error.blames() {
            Blame::Request if attempt.index == 0 => return Err(error),
            // What another finds wrong need not be the request's fault: it was made for the first.
            Blame::Request => self.given_up.push(attempt.index),
            Blame::Upstream | Blame::Absence | Blame::Model => self.given_up.push(attempt.index),
            Blame::Key | Blame::Pause(_) => {}
        }
        self.first_error.get_or_insert(error);
        Ok(())
    }
}
