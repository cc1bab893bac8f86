//! The offers: what can be bought, under which id, at which price.

use std::collections::HashMap;
use std::sync::Arc;

use crate::money::MarkupBps;
use crate::pricing::charge::{Prices, Terms};

/// A model that can be bought by the token.
#[derive(Clone, Debug)]
pub struct Offer {
    /// `provider/name`, as clients ask for it.
    pub id: String,
    /// The configured provider that serves it.
    pub provider: String,
    /// What the provider calls it.
    pub upstream_model: String,
    pub context_length: u64,
    pub max_output_tokens: u64,
    /// The field the provider reads the output limit from.
    pub max_tokens_field: String,
    pub reasoning: Reasoning,
    pub prices: Prices,
    /// Unix seconds, as `GET /v1/models` shows it.
    pub created: i64,
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

    /// What a request for this offer is agreed to cost, as it stands at this moment.
    pub fn terms(&self, markup: MarkupBps) -> Terms {
        Terms {
            model: self.id.clone(),
            provider: self.provider.clone(),
            upstream_model: self.upstream_model.clone(),
            prices: self.prices,
            markup_bps: markup.get(),
        }
    }
}

/// All offers, in the operator's order.
#[derive(Clone, Debug)]
pub struct Catalog {
    offers: Vec<Arc<Offer>>,
    by_id: HashMap<String, Arc<Offer>>,
}

impl Catalog {
    pub fn new(offers: Vec<Offer>) -> Self {
        let offers: Vec<_> = offers.into_iter().map(Arc::new).collect();
        let by_id = offers.iter().map(|offer| (offer.id.clone(), Arc::clone(offer))).collect();
        Self { offers, by_id }
    }

    /// Gives offers that have no date of their own this one, in Unix seconds.
    pub fn date_undated(&mut self, created: i64) {
        let date = |offer: &Arc<Offer>| match offer.created {
            0 => Offer { created, ..Offer::clone(offer) },
            _ => Offer::clone(offer),
        };
        *self = Self::new(self.offers.iter().map(date).collect());
    }

    pub fn get(&self, id: &str) -> Option<&Arc<Offer>> {
        self.by_id.get(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Offer>> {
        self.offers.iter()
    }
}
