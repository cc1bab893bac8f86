//! What is served, beside what a list says.

use std::fmt;

use crate::money::UnitPrice;
use crate::pricelist::Listing;
use crate::pricing::{Offer, Prices, Unit, UnitPrices};

/// A price that is not the same on both sides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    pub unit: Unit,
    /// Of prompts above so many tokens; `None`: below all tiers.
    pub above: Option<u64>,
    pub served: Option<UnitPrice>,
    pub listed: Option<UnitPrice>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let usd = |price: Option<UnitPrice>| match price {
            Some(price) => price.to_usd_per(self.unit.per()),
            None => "nothing".to_owned(),
        };
        write!(f, "{}", self.unit.config_key())?;
        if let Some(above) = self.above {
            write!(f, " above {above}")?;
        }
        write!(f, ": served at {}, listed at {}", usd(self.served), usd(self.listed))
    }
}

/// What would be charged otherwise: a price that is not listed, and comes to the same by what stands in for it, is
/// no difference. What neither side lists differs only because another price does, which is said.
pub fn compare(offer: &Offer, listing: &Listing) -> Vec<Difference> {
    let (served, listed) = (&*offer.prices, &listing.prices);
    let mut thresholds: Vec<u64> =
        served.tiers().iter().chain(listed.tiers()).map(|tier| tier.above).collect();
    thresholds.sort_unstable();
    thresholds.dedup();
    let mut found = Vec::new();
    for above in [None].into_iter().chain(thresholds.into_iter().map(Some)) {
        for unit in Unit::all() {
            let (ours, theirs) = (price(served, unit, above), price(listed, unit, above));
            // What differs below differs here as well, and has been said.
            let is_said =
                above.is_some() && price(served, unit, None) == ours && price(listed, unit, None) == theirs;
            if ours != theirs
                && !is_said
                && (is_listed(served, unit, above) || is_listed(listed, unit, above))
            {
                found.push(Difference { unit, above, served: ours, listed: theirs });
            }
        }
    }
    found
}

fn price(prices: &Prices, unit: Unit, above: Option<u64>) -> Option<UnitPrice> {
    let rates = rates(prices, above);
    rates.is_priced(unit).then(|| rates.charged(unit))
}

fn is_listed(prices: &Prices, unit: Unit, above: Option<u64>) -> bool {
    rates(prices, above).listed(unit).is_some()
}

fn rates(prices: &Prices, above: Option<u64>) -> UnitPrices {
    prices.at(above.map_or(0, |above| above.saturating_add(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pricing::{ModelKind, Reasoning, Tier};
    use std::sync::Arc;

    fn prices(listed: &[(Unit, i64)], tiers: &[(u64, Unit, i64)]) -> Prices {
        let with = |rates: UnitPrices, unit, pico| rates.with(unit, UnitPrice::new(pico));
        let rates =
            listed.iter().fold(UnitPrices::default(), |rates, (unit, pico)| with(rates, *unit, *pico));
        let tier = |(above, unit, pico): &(u64, Unit, i64)| Tier {
            above: *above,
            rates: with(UnitPrices::default(), *unit, *pico),
        };
        Prices::new(rates, tiers.iter().map(tier).collect(), Vec::new())
    }

    fn found(served: Prices, listed: Prices) -> Vec<String> {
        let offer = Offer {
            id: "p/m".into(),
            kind: ModelKind::Chat,
            provider: "p".into(),
            upstream_model: "m".into(),
            context_length: 1,
            max_output_tokens: 1,
            max_tokens_field: "max_tokens".into(),
            reasoning: Reasoning::Reject,
            fallbacks: Vec::new(),
            image_tokens: Vec::new(),
            prices: Arc::new(served),
            price_version: None,
            created: 0,
        };
        let listing = Listing {
            provider: "p".into(),
            name: "m".into(),
            kind: ModelKind::Chat,
            context_length: 1,
            max_output_tokens: 1,
            prices: listed,
        };
        compare(&offer, &listing).iter().map(Difference::to_string).collect()
    }

    #[test]
    fn only_what_is_charged_otherwise_differs() {
        let base = [(Unit::Prompt, 150_000), (Unit::Completion, 600_000)];
        let spelt_out = [&base[..], &[(Unit::CachedPrompt, 150_000), (Unit::Reasoning, 600_000)]].concat();
        assert_eq!(found(prices(&base, &[]), prices(&spelt_out, &[])), Vec::<String>::new());

        let cached = [&base[..], &[(Unit::CachedPrompt, 75_000)]].concat();
        assert_eq!(
            found(prices(&base, &[]), prices(&cached, &[])),
            ["cached_prompt: served at 0.15, listed at 0.075"]
        );
        let search = [&base[..], &[(Unit::Search, 10_000_000_000)]].concat();
        assert_eq!(
            found(prices(&search, &[]), prices(&base, &[])),
            ["per_search: served at 0.01, listed at nothing"]
        );
        assert_eq!(
            found(prices(&base, &[]), prices(&base, &[(200_000, Unit::Completion, 900_000)])),
            ["completion above 200000: served at 0.6, listed at 0.9"]
        );
        assert_eq!(
            found(prices(&base, &[]), prices(&cached, &[(200_000, Unit::Completion, 900_000)])),
            [
                "cached_prompt: served at 0.15, listed at 0.075",
                "completion above 200000: served at 0.6, listed at 0.9",
            ],
            "what differs below is not said again"
        );
    }
}
