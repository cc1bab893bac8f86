//! Public price lists read into offers: LiteLLM's, models.dev's and OpenRouter's.
//!
//! A list is somebody's word for what a provider asks. It is read exactly, decimal for decimal, and whatever
//! of it has no place here is counted by its name: a price that is dropped unseen is one that nobody pays.
//! Pure: who fetches a list, and what becomes of it, is the caller's business.

mod diff;
mod litellm;
mod models_dev;
mod openrouter;
mod render;

pub use diff::{Difference, compare};
pub use render::to_toml;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use crate::formats::json::Object;
use crate::money::{MoneyError, UnitPrice};
use crate::pricing::{ModelKind, Prices, Tier, Unit, UnitPrices};

/// Whose list it is, and so in which words.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// `model_prices_and_context_window.json`: USD for one.
    LiteLlm,
    /// `api.json`: USD per million tokens.
    ModelsDev,
    /// The answer of `/api/v1/models`: USD for one, as strings.
    OpenRouter,
}

impl Source {
    pub const NAMES: [&'static str; 3] = ["litellm", "models.dev", "openrouter"];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::LiteLlm => "litellm",
            Self::ModelsDev => "models.dev",
            Self::OpenRouter => "openrouter",
        }
    }

    /// By its shape.
    fn of(list: &Object<'_>) -> Self {
        if list.get("data").is_some_and(|data| data.starts_with('[')) {
            return Self::OpenRouter;
        }
        let first = list.members().next().and_then(|(_, value)| Object::parse_large(value.as_bytes()).ok());
        if first.is_some_and(|first| first.get("models").is_some()) { Self::ModelsDev } else { Self::LiteLlm }
    }
}

impl std::str::FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::LiteLlm, Self::ModelsDev, Self::OpenRouter]
            .into_iter()
            .find(|source| source.as_str() == text)
            .ok_or_else(|| format!("is none of {}", Self::NAMES.join(", ")))
    }
}

/// A model as a list has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listing {
    /// By the list's name for it.
    pub provider: String,
    /// What the provider calls the model.
    pub name: String,
    pub kind: ModelKind,
    pub context_length: u64,
    pub max_output_tokens: u64,
    pub prices: Prices,
}

impl Listing {
    pub fn id(&self) -> String {
        format!("{}/{}", self.provider, self.name)
    }
}

/// A list, and what of it could not be read into one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PriceList {
    /// In the list's order.
    pub listings: Vec<Listing>,
    /// Names of prices that have no unit here, each with how many models have it.
    pub not_mapped: BTreeMap<String, usize>,
    /// Models that are left out, by the reason.
    pub left_out: BTreeMap<String, Vec<String>>,
    /// Where the listing of an id is, and what the list calls it.
    ids: HashMap<String, (usize, String)>,
}

#[derive(Debug, thiserror::Error)]
pub enum PriceListError {
    #[error("it is no JSON object: {0}")]
    NotJson(#[from] serde_json::Error),
    #[error("nothing in it is a model that can be sold: is it a list of {}?", Source::NAMES.join(", "))]
    Empty,
}

impl PriceList {
    /// Reads a list; without a `source` its shape tells whose it is.
    pub fn read(source: Option<Source>, text: &str) -> Result<Self, PriceListError> {
        let list = Object::parse_large(text.as_bytes())?;
        let mut read = Self::default();
        match source.unwrap_or_else(|| Source::of(&list)) {
            Source::LiteLlm => litellm::read(&list, &mut read),
            Source::ModelsDev => models_dev::read(&list, &mut read),
            Source::OpenRouter => openrouter::read(&list, &mut read),
        }
        if read.listings.is_empty() { Err(PriceListError::Empty) } else { Ok(read) }
    }

    /// Takes a model in, if what it costs can be told exactly and is what such a model is sold by.
    fn take(&mut self, model: &str, draft: Draft) {
        for key in &draft.not_mapped {
            *self.not_mapped.entry(key.clone()).or_default() += 1;
        }
        let listing = match draft.finish() {
            Ok(listing) => listing,
            Err(why) => return self.leave_out(model, why),
        };
        let next = self.listings.len();
        match self.ids.entry(listing.id()) {
            Entry::Vacant(place) => {
                place.insert((next, model.to_owned()));
                self.listings.push(listing);
            }
            // Of two the one that names its provider is meant where the provider is named.
            Entry::Occupied(mut place) if model == place.key().as_str() => {
                let (at, other) = place.get().clone();
                place.insert((at, model.to_owned()));
                self.listings[at] = listing;
                self.leave_out(&other, TWICE.into());
            }
            Entry::Occupied(_) => self.leave_out(model, TWICE.into()),
        }
    }

    fn leave_out(&mut self, model: &str, why: String) {
        self.left_out.entry(why).or_default().push(model.to_owned());
    }
}

const TWICE: &str = "is there under another name";

/// A model while it is being read.
struct Draft {
    listing: Listing,
    rates: UnitPrices,
    tiers: BTreeMap<u64, UnitPrices>,
    /// Names of prices that have no unit here.
    not_mapped: Vec<String>,
    /// Why it cannot be taken.
    problem: Option<String>,
}

impl Draft {
    fn new(provider: &str, name: &str, kind: ModelKind, limits: (u64, u64)) -> Self {
        let listing = Listing {
            provider: provider.replace('/', "-"),
            name: name.to_owned(),
            kind,
            context_length: limits.0,
            max_output_tokens: limits.1,
            prices: Prices::default(),
        };
        let (rates, tiers) = (UnitPrices::default(), BTreeMap::new());
        Self { listing, rates, tiers, not_mapped: Vec::new(), problem: None }
    }

    /// Notes a price: the JSON text of USD for `per` of a unit, above so many tokens of prompt.
    fn price(&mut self, key: &str, unit: Unit, per: u32, above: Option<u64>, json: &str) {
        match parse_price(per, json) {
            Ok(price) => {
                let rates = match above {
                    None => &mut self.rates,
                    Some(above) => self.tiers.entry(above).or_default(),
                };
                *rates = rates.with(unit, price);
            }
            Err(MoneyError::FinerThanPico) => {
                self.problem = Some(format!("{key} is finer than a pico-USD for one"));
            }
            Err(MoneyError::OutOfRange) => self.problem = Some(format!("{key} is below zero or too large")),
            Err(_) => self.problem = Some(format!("{key} is no number")),
        }
    }

    fn finish(self) -> Result<Listing, String> {
        if let Some(problem) = self.problem {
            return Err(problem);
        }
        let tiers = self.tiers.into_iter().map(|(above, rates)| Tier { above, rates }).collect();
        let prices = Prices::new(self.rates, tiers, Vec::new());
        let kind = self.listing.kind;
        if let Some(missing) = prices.missing_for(kind) {
            let keys: Vec<_> = missing.iter().map(|unit| unit.config_key()).collect();
            return Err(format!("has no {} price for a {} model", keys.join(" or "), kind.as_str()));
        }
        let needs_context = matches!(kind, ModelKind::Chat | ModelKind::Embedding);
        if needs_context && self.listing.context_length == 0 {
            return Err("says nothing of its context's length".into());
        }
        if kind == ModelKind::Chat && self.listing.max_output_tokens == 0 {
            return Err("says nothing of how much it gives at most".into());
        }
        if self.listing.name.is_empty() || self.listing.provider.is_empty() {
            return Err("has no name or no provider".into());
        }
        Ok(Listing { prices, ..self.listing })
    }
}

/// The JSON text of a number, or of a string with one.
fn parse_price(per: u32, json: &str) -> Result<UnitPrice, MoneyError> {
    let text = json.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(json);
    UnitPrice::parse_usd_per(per, text)
}

fn object<'a>(parent: &'a Object<'_>, key: &str) -> Option<Object<'a>> {
    Object::parse_large(parent.get(key)?.as_bytes()).ok()
}

fn string(parent: &Object<'_>, key: &str) -> Option<String> {
    serde_json::from_str(parent.get(key)?).ok()
}

/// A whole number of tokens; some write it as a decimal that ends in zero, or as a string.
fn tokens(parent: &Object<'_>, key: &str) -> Option<u64> {
    let text = parent.get(key)?.trim_matches('"');
    let (tokens, has_rest) = crate::money::parse_decimal(text, 0).ok()?;
    u64::try_from(tokens).ok().filter(|_| !has_rest)
}
