//! What requests in every format have in common: how they are refused, how their members are read,
//! and how much prompt they can come to.

use serde::Deserialize;

use crate::formats::json::{Object, each, is_like, length};
use crate::money::MarkupBps;
use crate::pricing::{ModelKind, Most, Offer, Prices, Unit, Units, Usage, quote};

/// Output tokens when the request names no limit.
pub(super) const DEFAULT_MAX_TOKENS: u64 = 1024;
/// Tokens that a chat template puts around one message, generously.
const TOKENS_AROUND_MESSAGE: u64 = 16;
/// Tokens of what a model is told before the first message by its template: gpt-oss has about as many.
const TOKENS_AROUND_REQUEST: u64 = 64;
/// Tokens of a provider's own instructions where there are tools: Anthropic documents up to 346, and
/// up to 700 for one of the tools that it defines itself. A schema for the answer has some, too.
const TOKENS_AROUND_TOOLS: u64 = 1024;
/// What a part that is not text is taken for where no usage tells; providers document 85 to 1,600
/// tokens for an image.
const ESTIMATED_TOKENS_A_PART: u64 = 1000;
/// Bytes of English text in a token, on average, where no usage tells.
const ESTIMATED_BYTES_A_TOKEN: u64 = 4;

/// A request that cannot be served as it is. `param` names the field at fault.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct BadRequest {
    pub code: &'static str,
    pub param: Option<String>,
    pub message: String,
}

pub(super) fn bad(code: &'static str, param: &str, message: impl Into<String>) -> BadRequest {
    BadRequest { code, param: Some(param.to_owned()), message: message.into() }
}

pub(super) fn bad_value(param: &str, message: impl Into<String>) -> BadRequest {
    bad("invalid_value", param, message)
}

pub(super) fn unsupported(param: &str, message: impl Into<String>) -> BadRequest {
    bad("unsupported_parameter", param, message)
}

/// The body as an object whose `interpreted` members cannot mean something else to another reader.
pub(super) fn parse_body<'a>(body: &'a [u8], interpreted: &[&str]) -> Result<Object<'a>, BadRequest> {
    let object = Object::parse(body).map_err(|e| BadRequest {
        code: "invalid_json",
        param: None,
        message: format!("the body must be a JSON object: {e}"),
    })?;
    match object.ambiguous_key(interpreted) {
        Some(key) => Err(bad_value(key, "is there twice, or not spelt as the API spells it")),
        None => Ok(object),
    }
}

/// An object in which these members cannot be mistaken.
pub(super) fn part<'a>(json: &'a str, at: &str, interpreted: &[&str]) -> Result<Object<'a>, BadRequest> {
    let unreadable =
        || bad_value(at, format!("{at} must be an object with each member once, spelt as the API spells it"));
    let object = Object::parse(json.as_bytes()).map_err(|_| unreadable())?;
    if object.ambiguous_key(interpreted).is_some() { Err(unreadable()) } else { Ok(object) }
}

pub(super) fn required<'a, T: Deserialize<'a>>(object: &'a Object<'_>, key: &str) -> Result<T, BadRequest> {
    let value = object.get_non_null(key);
    let value = value.ok_or_else(|| missing(key))?;
    serde_json::from_str(value).map_err(|_| bad_value(key, format!("{key} must be a string")))
}

pub(super) fn missing(key: &str) -> BadRequest {
    bad("missing_required_parameter", key, format!("{key} is required"))
}

pub(super) fn optional<'a, T: Deserialize<'a>>(
    object: &'a Object<'_>,
    key: &str,
    expected: &str,
) -> Result<Option<T>, BadRequest> {
    let parse = |value| serde_json::from_str(value).map_err(|_| bad_value(key, format!("{key} {expected}")));
    object.get_non_null(key).map(parse).transpose()
}

/// Looks at the items of a list one by one, if there is a list, up to one that is refused.
pub(super) fn each_of<'a, T: Deserialize<'a>>(
    object: &'a Object<'_>,
    key: &str,
    expected: &str,
    mut look: impl FnMut(usize, T) -> Result<(), BadRequest>,
) -> Result<(), BadRequest> {
    let Some(list) = object.get_non_null(key) else { return Ok(()) };
    let (mut looked, mut i) = (Ok(()), 0);
    let read = each(list, |item| {
        if looked.is_ok() {
            looked = look(i, item);
        }
        i += 1;
    });
    read.map_err(|_| bad_value(key, format!("{key} {expected}")))?;
    looked
}

/// A limit of output tokens.
pub(super) fn token_limit(object: &Object<'_>, key: &str) -> Result<Option<u64>, BadRequest> {
    let expected = "must be a whole number above 0";
    match optional::<u64>(object, key, expected)? {
        Some(0) => Err(bad_value(key, format!("{key} {expected}"))),
        other => Ok(other),
    }
}

/// The name of a member, in small letters, and why it is refused.
pub(super) type Refused = (&'static str, &'static str);

const ONE_MODEL: &str = "a list of models cannot be priced: name one in `model`";
const ONE_UPSTREAM: &str = "the upstream is the operator's to choose: leave it out";
const NO_SEARCH: &str = "web searches are not priced here: leave it out";
const ONE_LIMIT: &str = "the output limit has another name here: use the API's own";

/// Members that, in whatever format, would send a request elsewhere, buy something that nothing is held for, or
/// escape the bounds.
const EVERYWHERE: &[Refused] = &[
    ("models", ONE_MODEL),
    ("model_list", ONE_MODEL),
    ("fallbacks", ONE_MODEL),
    ("route", "other routes are not priced here: leave it out"),
    ("preset", "presets are not priced here: leave it out"),
    ("api_base", ONE_UPSTREAM),
    ("base_url", ONE_UPSTREAM),
    // By these a router chooses among providers, whose prices differ.
    ("provider", ONE_UPSTREAM),
    ("provideroptions", ONE_UPSTREAM),
    ("extra_body", "its members belong into the request itself"),
    ("plugins", "plugins are not priced here: leave it out"),
    ("web_search_options", NO_SEARCH),
    ("search_parameters", NO_SEARCH),
    ("search_settings", NO_SEARCH),
    ("enable_search", NO_SEARCH),
    // llama.cpp takes the first before `max_tokens`, and TGI has the second.
    ("n_predict", ONE_LIMIT),
    ("max_new_tokens", ONE_LIMIT),
    // llama.cpp takes it before `n`.
    ("n_cmpl", "the number of choices is `n` here"),
    ("use_beam_search", "beams are not priced here: leave it out"),
];

/// To formats that have no tier which costs as usual.
pub(super) const SERVICE_TIER: Refused =
    ("service_tier", "only the default service tier is priced here: leave it out");

/// Refuses what a member of such a name would buy or escape, also by who folds case.
pub(super) fn refuse_members(object: &Object<'_>, refused: &[Refused]) -> Result<(), BadRequest> {
    let mut members = object.members().filter(|(_, value)| *value != "null");
    members.try_for_each(|(name, _)| refuse_name(name, refused))
}

/// The same of a single name.
pub(super) fn refuse_name(name: &str, refused: &[Refused]) -> Result<(), BadRequest> {
    match EVERYWHERE.iter().chain(refused).find(|(field, _)| is_like(name, field)) {
        Some((_, message)) => Err(unsupported(name, *message)),
        None => Ok(()),
    }
}

/// The most tokens a request can use, and what it is taken to use where nobody says.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Bounds {
    pub prompt: u64,
    pub completion: u64,
    pub estimated_prompt: u64,
    /// What the tokens can be billed as.
    pub tokens: Units,
    /// What it can use of what are not tokens.
    pub others: Usage,
}

impl Bounds {
    /// All of it used, as the dearest units that its tokens may be billed as: what is charged for where nobody can
    /// tell what was.
    pub fn all(&self, prices: &Prices) -> Usage {
        let dearest = |is_of: fn(Unit) -> bool| {
            let units = self.tokens.iter().filter(|unit| is_of(*unit));
            units.max_by_key(|unit| prices.charged(*unit))
        };
        let sides =
            [(dearest(Unit::is_prompt), self.prompt), (dearest(Unit::is_completion), self.completion)];
        sides.iter().fold(self.others, |usage, (unit, count)| match unit {
            Some(unit) => usage.with(*unit, *count),
            None => usage,
        })
    }

    /// The most that can be billed.
    pub fn most(&self) -> Most {
        let tokens = Most::of_text(self.prompt, self.completion);
        Most { tokens: self.tokens, others: self.others, ..tokens }
    }
}

/// Refuses a model that is for something else.
pub(super) fn check_kind(offer: &Offer, kind: ModelKind) -> Result<(), BadRequest> {
    if offer.kind == kind {
        return Ok(());
    }
    let (id, is_for, path) = (&offer.id, offer.kind.as_str(), sold_at(offer.kind));
    Err(bad_value(
        "model",
        format!("{id} is a model for {is_for}, not for {}: ask for it at {path}", kind.as_str()),
    ))
}

/// Where models of a kind are for sale.
fn sold_at(kind: ModelKind) -> &'static str {
    match kind {
        ModelKind::Chat => "/v1/chat/completions",
        ModelKind::Embedding => "/v1/embeddings",
        ModelKind::Image => "/v1/images/generations or /v1/images/edits",
        ModelKind::Speech => "/v1/audio/speech",
        ModelKind::Transcription => "/v1/audio/transcriptions",
    }
}

/// Whether a unit has a price, its own or the usual one.
pub(super) fn is_priced(prices: &Prices, unit: Unit) -> bool {
    prices.unpriced(Units::NONE.with(unit)).is_empty()
}

/// Whether any tokens have a price: else a model is sold by something else, and they do not count.
pub(super) fn is_sold_by_tokens(prices: &Prices) -> bool {
    prices.rates().iter().any(|(unit, _)| unit.is_prompt() || unit.is_completion())
}

/// The most that a request can need of a model that is not for chat, however that is sold.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Need {
    pub(super) prompt: u64,
    pub(super) completion: u64,
    pub(super) estimated_prompt: u64,
    /// What its tokens are billed as …
    pub(super) tokens: Units,
    /// … or may be, where it has a price.
    pub(super) maybe: Units,
    pub(super) others: Usage,
    /// Sound that is billed by these tokens, or else by the second: where both have a price, they are for the same.
    pub(super) either: Option<Unit>,
}

impl Need {
    /// Of what the model is sold by. What is used for certain must have a price.
    pub(super) fn bounds(self, offer: &Offer) -> Result<Bounds, BadRequest> {
        let prices = &offer.prices;
        let others = self.others.iter().filter(|(unit, _)| is_priced(prices, *unit));
        let others = others.fold(Usage::NONE, |usage, (unit, count)| usage.with(unit, count));
        let maybe = self.maybe.iter().filter(|unit| is_priced(prices, *unit)).collect();
        let bounds = match is_sold_by_tokens(prices) {
            true => Bounds {
                prompt: self.prompt,
                completion: self.completion,
                estimated_prompt: self.estimated_prompt.min(self.prompt),
                tokens: self.tokens.and(maybe),
                others,
            },
            false => Bounds { prompt: 0, completion: 0, estimated_prompt: 0, tokens: Units::NONE, others },
        };
        let unpriced = prices.unpriced(bounds.most().units());
        if unpriced.is_empty() {
            return Ok(match self.either {
                Some(sound) if is_either(prices, sound) => dearer(bounds, offer),
                _ => bounds,
            });
        }
        Err(unsupported("model", format!("{} has no price for {unpriced}: choose another model", offer.id)))
    }
}

/// Whether sound has a price by these tokens and by the second, of which one or the other is charged.
pub(super) fn is_either(prices: &Prices, sound: Unit) -> bool {
    prices.rates().listed(sound).is_some() && is_priced(prices, Unit::Millisecond)
}

/// Of sound that may be charged by its tokens or by the second, what costs more: with all that is beside it.
fn dearer(bounds: Bounds, offer: &Offer) -> Bounds {
    let by_token = Bounds { others: bounds.others.with(Unit::Millisecond, 0), ..bounds };
    let terms = offer.terms(MarkupBps::new(0));
    let cost = |bounds: &Bounds| quote(&terms, bounds.most()).map(|quote| quote.amount);
    let sound = |unit: &Unit| matches!(unit, Unit::AudioIn | Unit::CachedAudio | Unit::AudioOut);
    let text = bounds.tokens.iter().filter(|unit| !sound(unit)).collect();
    let by_second = Bounds { tokens: text, ..bounds };
    if cost(&by_token) >= cost(&by_second) { by_token } else { by_second }
}

/// More than the tokens that are in so many bytes, and in what a model is told around them.
pub(super) fn most_tokens(bytes: u64) -> u64 {
    bytes.saturating_add(TOKENS_AROUND_MESSAGE).saturating_add(TOKENS_AROUND_REQUEST)
}

/// The same within a context, where there is one.
pub(super) fn within_context(tokens: u64, offer: &Offer) -> u64 {
    if offer.context_length == 0 { tokens } else { tokens.min(offer.context_length) }
}

/// How large the prompt can be, and how large it probably is.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Prompt {
    /// No tokenizer makes more tokens than bytes.
    pub(super) bytes: u64,
    pub(super) messages: u64,
    /// Tools whose descriptions are the provider's, any tools at all, a schema: each is told to the
    /// model with words that are not in these bytes.
    pub(super) toolsets: u64,
    pub(super) text_bytes: u64,
    pub(super) parts_not_text: u64,
    /// Whether some of them are sound, which is billed at a price of its own.
    pub(super) has_audio: bool,
    /// Whether there are thoughts of other providers' models, which the format's own refuses.
    pub(super) foreign_thoughts: bool,
}

impl Prompt {
    /// The members that can become prompt, all but those of these names.
    pub(super) fn of_members(object: &Object<'_>, not_prompt: &[&str], messages: &str) -> Self {
        let is_prompt = |key: &str| !not_prompt.contains(&key);
        let bytes = |skip: Option<&str>| {
            let members = object.members().filter(|(key, _)| is_prompt(key) && Some(*key) != skip);
            members.map(|(_, value)| length(value)).sum()
        };
        Self { bytes: bytes(None), text_bytes: bytes(Some(messages)), ..Self::default() }
    }

    /// What a request with this prompt and so much output can come to, if the offer is for it and has a price
    /// for all that it may use. What has none is at fault in `param`.
    pub(super) fn bounds(&self, completion: u64, offer: &Offer, param: &str) -> Result<Bounds, BadRequest> {
        check_kind(offer, ModelKind::Chat)?;
        let prompt = self.bound(offer.context_length);
        let estimated_prompt = self.estimate().min(prompt);
        let (tokens, others) = (self.units(offer), Usage::NONE);
        let bounds = Bounds { prompt, completion, estimated_prompt, tokens, others };
        let unpriced = offer.prices.unpriced(bounds.most().units());
        if unpriced.is_empty() {
            return Ok(bounds);
        }
        Err(unsupported(param, format!("{} has no price for {unpriced}: leave them out", offer.id)))
    }

    /// What its tokens can be billed as. A part that is not text may be a picture, or a film with sound: where
    /// that has no price, it is as if it were text.
    fn units(&self, offer: &Offer) -> Units {
        if self.parts_not_text == 0 {
            return Units::OF_TEXT;
        }
        let others = Unit::all().filter(|unit| unit.is_prompt() && offer.prices.rates().is_priced(*unit));
        let units = others.fold(Units::OF_TEXT, Units::with);
        if self.has_audio { units.with(Unit::AudioIn) } else { units }
    }

    /// More tokens than this the prompt cannot have. A link to a picture says nothing of the
    /// picture's tokens, so with any part that is not text the context's length is the bound.
    fn bound(&self, context_length: u64) -> u64 {
        if self.parts_not_text > 0 {
            return context_length;
        }
        let around =
            self.messages.saturating_mul(TOKENS_AROUND_MESSAGE).saturating_add(TOKENS_AROUND_REQUEST);
        let tools = self.toolsets.saturating_mul(TOKENS_AROUND_TOOLS);
        self.bytes.saturating_add(around).saturating_add(tools).min(context_length)
    }

    pub(super) fn estimate(&self) -> u64 {
        estimate_tokens(self.text_bytes)
            .saturating_add(self.parts_not_text.saturating_mul(ESTIMATED_TOKENS_A_PART))
    }
}

/// Tokens in so many bytes of text, where nobody counted them.
pub(super) fn estimate_tokens(bytes: u64) -> u64 {
    bytes.div_ceil(ESTIMATED_BYTES_A_TOKEN)
}
