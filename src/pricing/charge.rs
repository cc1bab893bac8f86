//! From tokens and prices to a quote before a request and a charge after it.

use serde::{Deserialize, Serialize};

use crate::money::{MarkupBps, MicroUsdc, PicoUsd, UnitPrice};
use crate::pricing::usage::Usage;

/// At cost, per token.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Prices {
    pub prompt: UnitPrice,
    pub cached_prompt: UnitPrice,
    pub completion: UnitPrice,
}

/// What one request was agreed to cost, frozen when it is held and kept on its receipt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Terms {
    pub model: String,
    pub provider: String,
    pub upstream_model: String,
    pub prices: Prices,
    pub markup_bps: u32,
}

/// The most a request can cost, known before it runs.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Quote {
    /// No prompt of this request has more tokens.
    pub prompt_bound: u64,
    /// Nor does all it may produce.
    pub completion_bound: u64,
    pub amount: MicroUsdc,
}

/// What a request cost and what is charged for it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Charge {
    pub cost: PicoUsd,
    pub charged: MicroUsdc,
    /// What the charge would have been above the hold: the operator's loss, to be looked into.
    pub above_hold: MicroUsdc,
}

impl Serialize for UnitPrice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i64(self.get())
    }
}

impl<'de> Deserialize<'de> for UnitPrice {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        i64::deserialize(deserializer).map(Self::new)
    }
}

impl Serialize for Prices {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        PricesPico::from(*self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Prices {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        PricesPico::deserialize(deserializer).map(Into::into)
    }
}

/// How prices are kept in the books: the unit is in the name.
#[derive(Serialize, Deserialize)]
struct PricesPico {
    prompt_pico: UnitPrice,
    cached_prompt_pico: UnitPrice,
    completion_pico: UnitPrice,
}

impl From<Prices> for PricesPico {
    fn from(p: Prices) -> Self {
        Self { prompt_pico: p.prompt, cached_prompt_pico: p.cached_prompt, completion_pico: p.completion }
    }
}

impl From<PricesPico> for Prices {
    fn from(p: PricesPico) -> Self {
        Self { prompt: p.prompt_pico, cached_prompt: p.cached_prompt_pico, completion: p.completion_pico }
    }
}

impl Terms {
    pub fn markup(&self) -> MarkupBps {
        MarkupBps::new(self.markup_bps)
    }

    /// What `usage` costs at these prices. `None` only where the sum leaves 128 bits.
    pub fn cost(&self, usage: &Usage) -> Option<PicoUsd> {
        let prompt = self.prices.prompt.times(usage.uncached())?;
        let cached = self.prices.cached_prompt.times(usage.cached)?;
        let completion = self.prices.completion.times(usage.completion)?;
        prompt.checked_add(cached)?.checked_add(completion)
    }

    /// The charge for `usage`: cost and markup rounded up once, never above the hold.
    pub fn charge(&self, usage: &Usage, hold: MicroUsdc) -> Option<Charge> {
        let cost = self.cost(usage)?;
        let full = cost.charge(self.markup())?;
        let charged = full.min(hold);
        Some(Charge { cost, charged, above_hold: full.checked_sub(charged)? })
    }
}

/// What a request of at most so many tokens can cost under `terms`, at the dearest it can come.
pub fn quote(terms: &Terms, prompt_bound: u64, completion_bound: u64) -> Option<Quote> {
    let dearest_prompt = terms.prices.prompt.max(terms.prices.cached_prompt);
    let prompt = dearest_prompt.times(prompt_bound)?;
    let completion = terms.prices.completion.times(completion_bound)?;
    let amount = prompt.checked_add(completion)?.charge(terms.markup())?;
    Some(Quote { prompt_bound, completion_bound, amount })
}

impl Quote {
    /// The most completion tokens that `available` pays for with this prompt, `None` if not even one.
    pub fn affordable_completion(&self, terms: &Terms, available: MicroUsdc) -> Option<u64> {
        // The amount grows with the tokens, so the largest that fits is found by halving.
        let fits = |tokens| quote(terms, self.prompt_bound, tokens).is_some_and(|q| q.amount <= available);
        if !fits(1) {
            return None;
        }
        let (mut fitting, mut too_many) = (1, self.completion_bound.saturating_add(1));
        while fitting + 1 < too_many {
            let middle = fitting + (too_many - fitting) / 2;
            if fits(middle) { fitting = middle } else { too_many = middle }
        }
        Some(fitting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn terms(prompt: i64, cached: i64, completion: i64) -> Terms {
        Terms {
            model: "openai/gpt-5-mini".into(),
            provider: "openai".into(),
            upstream_model: "gpt-5-mini".into(),
            prices: Prices {
                prompt: UnitPrice::new(prompt),
                cached_prompt: UnitPrice::new(cached),
                completion: UnitPrice::new(completion),
            },
            markup_bps: 2000,
        }
    }

    #[test]
    fn the_contracts_vector_is_eleven() {
        let usage = Usage { prompt: 20, completion: 9, ..Usage::default() };
        let charge = terms(150_000, 75_000, 600_000).charge(&usage, MicroUsdc::new(1000)).unwrap();
        assert_eq!(charge.charged, MicroUsdc::new(11));
        assert_eq!(charge.above_hold, MicroUsdc::ZERO);
    }

    #[test]
    fn the_hold_is_the_ceiling() {
        let usage = Usage { prompt: 20, completion: 9, ..Usage::default() };
        let charge = terms(150_000, 75_000, 600_000).charge(&usage, MicroUsdc::new(4)).unwrap();
        assert_eq!((charge.charged, charge.above_hold), (MicroUsdc::new(4), MicroUsdc::new(7)));
    }

    #[test]
    fn terms_are_kept_as_integers() {
        let terms = terms(150_000, 75_000, 600_000);
        let json = serde_json::to_string(&terms).unwrap();
        assert!(json.contains(r#""prompt_pico":150000"#), "{json}");
        assert_eq!(serde_json::from_str::<Terms>(&json).unwrap(), terms);
    }

    proptest! {
        /// Within its bounds no request can cost more than was held for it.
        #[test]
        fn a_quote_covers_every_usage(
            p in 0i64..100_000_000, c in 0i64..100_000_000, o in 0i64..100_000_000,
            prompt in 0u64..200_000, cached in 0u64..200_000, completion in 0u64..200_000,
            spare_prompt in 0u64..100, spare_completion in 0u64..100,
        ) {
            let terms = terms(p, c, o);
            let quote = quote(&terms, prompt + spare_prompt, completion + spare_completion).unwrap();
            let usage = Usage { prompt, cached: cached.min(prompt), completion, reasoning: 0 };
            let charge = terms.charge(&usage, quote.amount).unwrap();
            prop_assert_eq!(charge.above_hold, MicroUsdc::ZERO);
        }

        #[test]
        fn the_affordable_limit_is_the_largest(o in 1i64..100_000_000, prompt in 0u64..10_000, bound in 1u64..100_000, available in 0i64..10_000_000) {
            let terms = terms(150_000, 75_000, o);
            let available = MicroUsdc::new(available);
            let asked = quote(&terms, prompt, bound).unwrap();
            let fits = |n| quote(&terms, prompt, n).unwrap().amount <= available;
            match asked.affordable_completion(&terms, available) {
                None => prop_assert!(!fits(1)),
                Some(n) => {
                    prop_assert!(n <= bound && fits(n));
                    prop_assert!(n == bound || !fits(n + 1));
                }
            }
        }
    }
}
