//! The offers: what can be bought, under which id, at which price.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use sha2::{Digest as _, Sha256};

use crate::money::MarkupBps;
use crate::pricing::charge::Terms;
use crate::pricing::prices::{PriceVersion, Prices};
use crate::pricing::unit::Unit;

/// A model that can be bought.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// `provider/name`, as clients ask for it.
    pub id: String,
    pub kind: ModelKind,
    /// The configured provider that serves it.
    pub provider: String,
    /// What the provider calls it.
    pub upstream_model: String,
    /// Tokens of prompt and completion together; 0 where the model has no such limit, as one that speaks.
    pub context_length: u64,
    /// 0 for an embedding.
    pub max_output_tokens: u64,
    /// The field the provider reads the output limit from.
    pub max_tokens_field: String,
    pub reasoning: Reasoning,
    /// Ids of other offers, which are asked in turn where this one cannot answer.
    pub fallbacks: Vec<String>,
    /// Of pictures, the most tokens that one has: see [`Self::most_image_tokens`].
    pub image_tokens: Vec<ImageTokens>,
    pub prices: Arc<Prices>,
    /// Of the catalogue it is in; `None` until it is in one.
    pub price_version: Option<PriceVersion>,
    /// Unix seconds, as `GET /v1/models` shows it.
    pub created: i64,
}

/// The most tokens that a picture has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageTokens {
    /// As the request names it, `1024x1024`; `None`: any.
    pub size: Option<String>,
    /// `low`, `high` …; `None`: any.
    pub quality: Option<String>,
    pub most: u64,
}

/// What a model makes of what.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelKind {
    #[default]
    Chat,
    Embedding,
    Image,
    Speech,
    Transcription,
}

impl ModelKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Embedding => "embedding",
            Self::Image => "image",
            Self::Speech => "speech",
            Self::Transcription => "transcription",
        }
    }

    /// What must have a price: one of each list.
    pub fn required(self) -> &'static [&'static [Unit]] {
        match self {
            Self::Chat => &[&[Unit::Prompt], &[Unit::Completion]],
            Self::Embedding => &[&[Unit::Prompt]],
            Self::Image => &[&[Unit::Image, Unit::ImageOut, Unit::Call]],
            Self::Speech => &[&[Unit::Character, Unit::AudioOut, Unit::Millisecond, Unit::Call]],
            Self::Transcription => &[&[Unit::Millisecond, Unit::AudioIn, Unit::Call]],
        }
    }
}

/// What to do with a request that asks a model to reason unseen.
#[derive(Copy, Clone, PartialEq, Eq, Debug, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reasoning {
    Reject,
    Strip,
    Allow,
}

impl Offer {
    /// The id without its provider: `gpt-5-mini`.
    pub fn name(&self) -> &str {
        self.id.split_once('/').map_or(self.id.as_str(), |(_, name)| name)
    }

    /// The most tokens that a picture of this size and quality has, where that is listed: just for it, or
    /// for anything. What is not said (`None`, or `auto`) can be anything.
    pub fn most_image_tokens(&self, size: Option<&str>, quality: Option<&str>) -> Option<u64> {
        let said = |text: Option<&str>| text.filter(|text| *text != "auto").map(str::to_owned);
        let (size, quality) = (said(size), said(quality));
        let is_this = |row: &&ImageTokens| row.size == size && row.quality == quality;
        if size.is_some()
            && quality.is_some()
            && let Some(row) = self.image_tokens.iter().find(is_this)
        {
            return Some(row.most);
        }
        let fits = |listed: &Option<String>, said: &Option<String>| {
            listed.is_none() || said.is_none() || listed == said
        };
        let rows =
            self.image_tokens.iter().filter(|row| fits(&row.size, &size) && fits(&row.quality, &quality));
        rows.map(|row| row.most).max()
    }

    /// What a request for this offer is agreed to cost, as it stands at this moment.
    pub fn terms(&self, markup: MarkupBps) -> Terms {
        Terms {
            model: self.id.clone(),
            provider: self.provider.clone(),
            upstream_model: self.upstream_model.clone(),
            prices: Arc::clone(&self.prices),
            markup_bps: markup.get(),
            price_version: self.price_version,
        }
    }
}

/// All offers, in the operator's order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Catalog {
    offers: Vec<Arc<Offer>>,
    by_id: HashMap<String, Arc<Offer>>,
    version: PriceVersion,
}

impl Catalog {
    pub fn new(offers: Vec<Offer>) -> Self {
        let version = version_of(&offers);
        let dated = |offer| Arc::new(Offer { price_version: Some(version), ..offer });
        let offers: Vec<_> = offers.into_iter().map(dated).collect();
        let by_id = offers.iter().map(|offer| (offer.id.clone(), Arc::clone(offer))).collect();
        Self { offers, by_id, version }
    }

    /// Gives offers that have no date of their own this one, in Unix seconds.
    pub fn date_undated(&mut self, created: i64) {
        let date = |offer: &Arc<Offer>| match offer.created {
            0 => Offer { created, ..Offer::clone(offer) },
            _ => Offer::clone(offer),
        };
        *self = Self::new(self.offers.iter().map(date).collect());
    }

    /// What its prices are called by. The same prices have the same name on every node.
    pub fn version(&self) -> PriceVersion {
        self.version
    }

    pub fn get(&self, id: &str) -> Option<&Arc<Offer>> {
        self.by_id.get(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Offer>> {
        self.offers.iter()
    }
}

/// The beginning of a hash over every id and its prices, whatever their order.
fn version_of(offers: &[Offer]) -> PriceVersion {
    // Prices are maps of integers: there is nothing about them that could not be written.
    let text = |offer: &Offer| serde_json::to_string(offer.prices.as_ref()).unwrap_or_default();
    let mut lines: Vec<_> = offers.iter().map(|offer| format!("{} {}\n", offer.id, text(offer))).collect();
    lines.sort_unstable();
    let hash = Sha256::digest(lines.concat());
    PriceVersion::new(hash.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// The catalogue that is served, which another can take the place of while requests run. One that has begun
/// keeps what it began with. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LiveCatalog(Arc<RwLock<Arc<Catalog>>>);

impl LiveCatalog {
    pub fn new(catalog: Catalog) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(catalog))))
    }

    /// As it is now: read once for each request.
    pub fn current(&self) -> Arc<Catalog> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Serves another from now on.
    pub fn replace(&self, catalog: Catalog) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(catalog);
    }
}
