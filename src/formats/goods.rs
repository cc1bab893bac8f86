//! Whatever is for sale, a conversation or something else that a model makes, behind one face: what the pipeline
//! knows of a request and of its answer.

use std::sync::Arc;

use bytes::Bytes;

use crate::formats::answer::{Forward, NotAnAnswer};
use crate::formats::completions::CompletionsRequest;
use crate::formats::conversation::{ClientFormat, UpstreamFormat};
use crate::formats::errors::ErrorText;
use crate::formats::exchange::{self, UpstreamRequest};
use crate::formats::media::{self, Medium, Used};
use crate::formats::request::{BadRequest, Bounds};
use crate::formats::sse::Event;
use crate::money::MicroUsdc;
use crate::pricing::{Dialect, Offer, Prices, Terms};

/// What is asked for, and in which format.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Goods {
    Conversation(ClientFormat),
    /// Of the old kind.
    Completions,
    Medium(Medium),
}

/// A request, parsed as far as its price needs.
pub enum Request<'a> {
    Conversation(exchange::Request<'a>),
    Completions(CompletionsRequest<'a>),
    Medium(media::Request<'a>),
}

impl<'a> Request<'a> {
    pub fn parse(goods: Goods, content_type: Option<&str>, body: &'a [u8]) -> Result<Self, BadRequest> {
        Ok(match goods {
            Goods::Conversation(format) => Self::Conversation(exchange::Request::parse(format, body)?),
            Goods::Completions => Self::Completions(CompletionsRequest::parse(body)?),
            Goods::Medium(medium) => Self::Medium(media::Request::parse(medium, content_type, body)?),
        })
    }

    pub fn goods(&self) -> Goods {
        match self {
            Self::Conversation(request) => Goods::Conversation(request.format()),
            Self::Completions(_) => Goods::Completions,
            Self::Medium(request) => Goods::Medium(request.medium()),
        }
    }

    pub fn model(&self) -> &str {
        match self {
            Self::Conversation(request) => request.model(),
            Self::Completions(request) => &request.model,
            Self::Medium(request) => request.model(),
        }
    }

    pub fn is_stream(&self) -> bool {
        match self {
            Self::Conversation(request) => request.is_stream(),
            Self::Completions(request) => request.stream,
            Self::Medium(request) => request.is_stream(),
        }
    }

    /// What it says, in pieces: the same whenever the same is asked for. The boundary of a form is another each
    /// time that it is sent.
    pub fn pieces(&self, body: &'a [u8]) -> Vec<&[u8]> {
        match self {
            Self::Conversation(_) | Self::Completions(_) => vec![body],
            Self::Medium(request) => request.pieces().unwrap_or_else(|| vec![body]),
        }
    }

    /// What is offered, at the prices that this request can come to.
    pub fn narrow(&self, offer: &Arc<Offer>) -> Result<Arc<Offer>, BadRequest> {
        match self {
            Self::Conversation(_) | Self::Completions(_) => Ok(Arc::clone(offer)),
            Self::Medium(request) => request.narrow(offer),
        }
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        match self {
            Self::Conversation(request) => request.bounds(offer),
            Self::Completions(request) => request.bounds(offer),
            Self::Medium(request) => request.bounds(offer),
        }
    }

    /// The largest output limit with which no more than `completion` tokens can come, if there is one.
    pub fn limit_within(&self, completion: u64) -> Option<u64> {
        match self {
            Self::Conversation(request) => request.limit_within(completion),
            Self::Completions(request) => request.limit_within(completion),
            Self::Medium(_) => None,
        }
    }

    /// What the format calls that limit, if it has one.
    pub fn limit_name(&self) -> Option<&'static str> {
        match self {
            Self::Conversation(request) => Some(request.limit_name()),
            Self::Completions(_) => Some("max_tokens"),
            Self::Medium(_) => None,
        }
    }

    /// Whether an upstream of this format can be asked for it at all.
    pub fn check_upstream(&self, offer: &Offer, format: UpstreamFormat) -> Result<(), BadRequest> {
        match self {
            Self::Conversation(_) => Ok(()),
            Self::Completions(_) | Self::Medium(_) => media::check_upstream(offer, format),
        }
    }

    /// What an upstream of this format is sent for it. What it has no place for is refused by name.
    pub fn to_upstream(&self, offer: &Offer, format: UpstreamFormat) -> Result<UpstreamRequest, BadRequest> {
        match self {
            Self::Conversation(request) => request.to_upstream(offer, format),
            Self::Completions(request) => {
                media::check_upstream(offer, format)?;
                let (path, body) = ("completions".to_owned(), request.upstream_body(offer));
                Ok(UpstreamRequest { format: UpstreamFormat::Chat, path, headers: Vec::new(), body })
            }
            Self::Medium(request) => request.to_upstream(offer, format),
        }
    }

    /// How its answer is read, which comes from an upstream of this format. `id` is the request's own,
    /// `created` in Unix seconds.
    pub fn exchange(&self, format: UpstreamFormat, id: &str, created: i64) -> Exchange {
        match self {
            Self::Conversation(request) => Exchange::Conversation(request.exchange(format, id, created)),
            Self::Completions(request) => {
                let (choices, wants_usage) = (request.choices(), request.wants_usage);
                Exchange::Conversation(exchange::Exchange::of_chat(&request.model, choices, wants_usage))
            }
            Self::Medium(request) => Exchange::Medium(Box::new(request.reading())),
        }
    }
}

/// How the answer to a request is read and told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Exchange {
    Conversation(exchange::Exchange),
    Medium(Box<media::Reading>),
}

impl Exchange {
    /// In which words the upstream reports usage.
    pub fn dialect(&self) -> Dialect {
        match self {
            Self::Conversation(exchange) => exchange.dialect(),
            Self::Medium(reading) => reading.dialect(),
        }
    }

    /// Reads a whole answer, which came as this type.
    pub fn read<'a>(&'a self, content_type: Option<&str>, body: &'a [u8]) -> Result<Answer<'a>, NotAnAnswer> {
        Ok(match self {
            Self::Conversation(exchange) => Answer::Conversation(exchange.read(body)?),
            Self::Medium(reading) => Answer::Medium(reading.read(content_type, body)?),
        })
    }

    /// Watches a stream past.
    pub fn tap(&self) -> Tap {
        match self {
            Self::Conversation(exchange) => Tap::Conversation(exchange.tap()),
            Self::Medium(reading) => Tap::Medium(Box::new(reading.tap())),
        }
    }
}

/// A whole answer.
pub enum Answer<'a> {
    Conversation(exchange::Answer<'a>),
    Medium(media::Answer<'a>),
}

impl Answer<'_> {
    /// The upstream's report of usage, in its own format.
    pub fn usage_raw(&self) -> Option<&str> {
        match self {
            Self::Conversation(answer) => answer.usage_raw(),
            Self::Medium(answer) => answer.usage_raw(),
        }
    }

    /// Output tokens of a conversation, where the answer does not say how many there were.
    pub fn estimated_completion(&self) -> u64 {
        match self {
            Self::Conversation(answer) => answer.estimated_completion(),
            Self::Medium(_) => 0,
        }
    }

    /// What was used of what these prices list, where that is more than what the upstream reports.
    pub fn used(&self, prices: &Prices) -> Option<Used> {
        match self {
            Self::Conversation(_) => None,
            Self::Medium(answer) => Some(answer.used(prices)),
        }
    }

    /// The terms at which it is charged, where it tells more of them than the request did.
    pub fn terms(&self, terms: &Terms) -> Option<Terms> {
        match self {
            Self::Conversation(_) => None,
            Self::Medium(answer) => answer.terms(terms),
        }
    }

    /// What the client gets it as; `None`: JSON.
    pub fn content_type(&self) -> Option<String> {
        match self {
            Self::Conversation(_) => None,
            Self::Medium(answer) => answer.content_type(),
        }
    }

    /// The answer in the client's format, with what was charged.
    pub fn render(self, charged: MicroUsdc) -> Bytes {
        match self {
            Self::Conversation(answer) => answer.render(charged),
            Self::Medium(answer) => answer.render(charged),
        }
    }
}

/// Watches an answer stream past, event by event: what of it goes to the client, its usage, and how much was
/// delivered.
pub enum Tap {
    Conversation(exchange::Tap),
    Medium(Box<media::StreamTap>),
}

impl Tap {
    /// Reads one event and says what the client gets of it.
    pub fn event(&mut self, event: &Event) -> Forward {
        match self {
            Self::Conversation(tap) => tap.event(event),
            Self::Medium(tap) => tap.event(event),
        }
    }

    /// What ends the stream for the client, to be sent when it is settled.
    pub fn last(&mut self, charged: MicroUsdc) -> Bytes {
        match self {
            Self::Conversation(tap) => tap.last(charged),
            Self::Medium(tap) => tap.last(charged),
        }
    }

    /// The last event of a stream that failed.
    pub fn failure(&self, error: &ErrorText<'_>) -> Bytes {
        match self {
            Self::Conversation(tap) => tap.failure(error),
            Self::Medium(_) => error.event(ClientFormat::Chat, 0),
        }
    }

    /// The upstream's report of usage so far, in its own format.
    pub fn usage_raw(&self) -> Option<&str> {
        match self {
            Self::Conversation(tap) => tap.usage_raw(),
            Self::Medium(tap) => tap.usage_raw(),
        }
    }

    /// Whether the report of usage is the last word, however the stream ends.
    pub fn is_reported_at_end(&self) -> bool {
        match self {
            Self::Conversation(tap) => tap.is_reported_at_end(),
            Self::Medium(tap) => tap.is_finished(),
        }
    }

    pub fn delivered_anything(&self) -> bool {
        match self {
            Self::Conversation(tap) => tap.delivered_anything(),
            Self::Medium(tap) => tap.delivered_anything(),
        }
    }

    /// Whether the answer was whole, should the stream end now without saying so.
    pub fn is_finished(&self) -> bool {
        match self {
            Self::Conversation(tap) => tap.is_finished(),
            Self::Medium(tap) => tap.is_finished(),
        }
    }

    /// Output tokens of a conversation delivered so far.
    pub fn estimated_completion(&self) -> u64 {
        match self {
            Self::Conversation(tap) => tap.estimated_completion(),
            Self::Medium(_) => 0,
        }
    }

    /// What was used so far of what these prices list, where that is more than what the upstream reports.
    pub fn used(&self, prices: &Prices) -> Option<Used> {
        match self {
            Self::Conversation(_) => None,
            Self::Medium(tap) => Some(tap.used(prices)),
        }
    }

    /// The terms at which it is charged, where it tells more of them than the request did.
    pub fn terms(&self, terms: &Terms) -> Option<Terms> {
        match self {
            Self::Conversation(_) => None,
            Self::Medium(tap) => tap.terms(terms),
        }
    }
}
