//! From usage and prices to a quote before a request and a charge after it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::money::{MarkupBps, MicroUsdc, PicoUsd, UnitPrice};
use crate::pricing::prices::{PriceVersion, Prices, UnitPrices, shared};
use crate::pricing::unit::{Unit, Units};
use crate::pricing::usage::Usage;

/// What one request was agreed to cost, frozen when it is held and kept on its receipt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Terms {
    pub model: String,
    pub provider: String,
    pub upstream_model: String,
    #[serde(with = "shared")]
    pub prices: Arc<Prices>,
    pub markup_bps: u32,
    /// Of the catalogue that the prices are from; those of old have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price_version: Option<PriceVersion>,
}

/// The most that a request can use.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Most {
    /// No prompt of this request has more tokens, of whatever kind …
    pub prompt_tokens: u64,
    /// … nor has all that it may produce.
    pub completion_tokens: u64,
    /// The units that its tokens can be billed as.
    pub tokens: Units,
    /// What it can use of what are not tokens: pictures, milliseconds, characters, searches.
    pub others: Usage,
}

impl Most {
    /// Of a request of text.
    pub fn of_text(prompt_tokens: u64, completion_tokens: u64) -> Self {
        Self { prompt_tokens, completion_tokens, tokens: Units::OF_TEXT, others: Usage::NONE }
    }

    /// All units that there can be any of.
    pub fn units(&self) -> Units {
        let tokens = self.tokens.iter().filter(|unit| {
            let most = if unit.is_prompt() { self.prompt_tokens } else { self.completion_tokens };
            most > 0
        });
        tokens.chain(self.others.units().iter()).collect()
    }

    /// What a request that uses so much can cost at most at these prices.
    fn cost(&self, prices: &Prices) -> Option<PicoUsd> {
        // Of a longer prompt each token may cost less, so that the dearest need not be the longest.
        let mut dearest = PicoUsd::ZERO;
        for (prompt_tokens, rates) in prices.stretches(self.prompt_tokens) {
            let prompt = self.dearest(&rates, Unit::is_prompt).times(prompt_tokens)?;
            let completion = self.dearest(&rates, Unit::is_completion).times(self.completion_tokens)?;
            let tokens = prompt.checked_add(completion)?;
            dearest = dearest.max(tokens.checked_add(cost_of_others(&rates, &self.others)?)?);
        }
        Some(dearest)
    }

    fn dearest(&self, rates: &UnitPrices, is_of: fn(Unit) -> bool) -> UnitPrice {
        let units = self.tokens.iter().filter(|unit| is_of(*unit));
        units.map(|unit| rates.charged(unit)).max().unwrap_or(UnitPrice::ZERO)
    }
}

/// What is used beside tokens. There is a call in every request, whether it was counted or not.
fn cost_of_others(rates: &UnitPrices, usage: &Usage) -> Option<PicoUsd> {
    let others = [Unit::Image, Unit::Millisecond, Unit::Character, Unit::Search];
    let call = rates.charged(Unit::Call).times(usage.count(Unit::Call).max(1))?;
    others
        .into_iter()
        .try_fold(call, |sum, unit| sum.checked_add(rates.charged(unit).times(usage.count(unit))?))
}

/// The most a request can cost, known before it runs.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Quote {
    pub most: Most,
    pub amount: MicroUsdc,
}

/// What a request cost and what is charged for it.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Charge {
    pub cost: PicoUsd,
    pub charged: MicroUsdc,
    /// What the charge would have been above the hold: the operator's loss, to be looked into.
    pub above_hold: MicroUsdc,
    /// What was used and has no price: charged as what stands in for it, or not at all.
    pub unpriced: Units,
}

impl Terms {
    pub fn markup(&self) -> MarkupBps {
        MarkupBps::new(self.markup_bps)
    }

    /// The terms of a request for pictures of this size and quality: see [`Prices::for_image`]. Called again with
    /// what the answer says that they are, it has their very price.
    pub fn for_image(&self, size: Option<&str>, quality: Option<&str>) -> Option<Self> {
        Some(Self { prices: Arc::new(self.prices.for_image(size, quality)?), ..self.clone() })
    }

    /// What `usage` costs at these prices. `None` only where the sum leaves 128 bits.
    pub fn cost(&self, usage: &Usage) -> Option<PicoUsd> {
        let rates = self.prices.at(usage.prompt_tokens());
        let tokens = usage.iter().filter(|(unit, _)| unit.is_prompt() || unit.is_completion());
        tokens.into_iter().try_fold(cost_of_others(&rates, usage)?, |sum, (unit, count)| {
            sum.checked_add(rates.charged(unit).times(count)?)
        })
    }

    /// The charge for `usage`: cost and markup rounded up once, never above the hold.
    pub fn charge(&self, usage: &Usage, hold: MicroUsdc) -> Option<Charge> {
        let cost = self.cost(usage)?;
        let full = cost.charge(self.markup())?;
        let charged = full.min(hold);
        let above_hold = full.checked_sub(charged)?;
        Some(Charge { cost, charged, above_hold, unpriced: self.prices.unpriced_in(usage) })
    }

    /// What a request could use and these prices say nothing of. One that has any is refused.
    pub fn unpriced(&self, most: &Most) -> Units {
        self.prices.unpriced(most.units())
    }
}

/// What a request can cost under `terms` that uses so much at most, at the dearest it can come.
pub fn quote(terms: &Terms, most: Most) -> Option<Quote> {
    let amount = most.cost(&terms.prices)?.charge(terms.markup())?;
    Some(Quote { most, amount })
}

impl Quote {
    /// The most completion tokens that `available` pays for with this prompt, `None` if not even one.
    pub fn affordable_completion(&self, terms: &Terms, available: MicroUsdc) -> Option<u64> {
        // The amount grows with the tokens, so the largest that fits is found by halving.
        let fits = |completion_tokens| {
            let most = Most { completion_tokens, ..self.most };
            quote(terms, most).is_some_and(|q| q.amount <= available)
        };
        if !fits(1) {
            return None;
        }
        let (mut fitting, mut too_many) = (1, self.most.completion_tokens.saturating_add(1));
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
    use crate::pricing::prices::{ImagePrice, Tier};
    use proptest::prelude::*;

    fn with_prices(prices: Prices) -> Terms {
        Terms {
            model: "openai/gpt-5-mini".into(),
            provider: "openai".into(),
            upstream_model: "gpt-5-mini".into(),
            prices: Arc::new(prices),
            markup_bps: 2000,
            price_version: None,
        }
    }

    fn terms(prompt: i64, cached: i64, completion: i64) -> Terms {
        let price = UnitPrice::new;
        with_prices(Prices::of_text(price(prompt), price(cached), price(completion)))
    }

    fn rates(listed: &[(Unit, i64)]) -> UnitPrices {
        listed
            .iter()
            .fold(UnitPrices::default(), |rates, (unit, pico)| rates.with(*unit, UnitPrice::new(*pico)))
    }

    fn plain(listed: &[(Unit, i64)]) -> Terms {
        with_prices(Prices::new(rates(listed), Vec::new(), Vec::new()))
    }

    #[test]
    fn the_contracts_vector_is_eleven() {
        let charge =
            terms(150_000, 75_000, 600_000).charge(&Usage::tokens(20, 9), MicroUsdc::new(1000)).unwrap();
        assert_eq!(charge.charged, MicroUsdc::new(11));
        assert_eq!(charge.above_hold, MicroUsdc::ZERO);
    }

    #[test]
    fn the_hold_is_the_ceiling() {
        let charge =
            terms(150_000, 75_000, 600_000).charge(&Usage::tokens(20, 9), MicroUsdc::new(4)).unwrap();
        assert_eq!((charge.charged, charge.above_hold), (MicroUsdc::new(4), MicroUsdc::new(7)));
    }

    #[test]
    fn terms_are_kept_as_integers() {
        let terms = terms(150_000, 75_000, 600_000);
        let json = serde_json::to_string(&terms).unwrap();
        assert!(json.contains(r#""prompt_pico":150000"#), "{json}");
        assert_eq!(serde_json::from_str::<Terms>(&json).unwrap(), terms);
    }

    #[test]
    fn terms_of_old_are_still_read() {
        let old = r#"{"model":"openai/gpt-5-mini","provider":"openai","upstream_model":"gpt-5-mini",
            "prices":{"prompt_pico":150000,"cached_prompt_pico":75000,"completion_pico":600000},"markup_bps":2000}"#;
        assert_eq!(serde_json::from_str::<Terms>(old).unwrap(), terms(150_000, 75_000, 600_000));
    }

    #[test]
    fn all_that_is_agreed_is_kept_and_a_price_nobody_knows_is_an_error() {
        let tier = Tier { above: 200_000, rates: rates(&[(Unit::Prompt, 5), (Unit::CacheWrite1h, 0)]) };
        let image = ImagePrice {
            size: Some("1024x1024".into()),
            quality: None,
            price: UnitPrice::new(40_000_000_000),
        };
        let all: Vec<_> = Unit::all().zip(1..).collect();
        let prices = Prices::new(rates(&all), vec![tier], vec![image]);
        let terms = Terms { price_version: Some(PriceVersion::new(0xab)), ..with_prices(prices) };
        let json = serde_json::to_string(&terms).unwrap();
        for part in [
            r#""tiers":[{"above_prompt_tokens":200000,"prompt_pico":5,"cache_write_1h_pico":0}]"#,
            r#""images":[{"size":"1024x1024","image_pico":40000000000}]"#,
            r#""millisecond_pico":14"#,
            r#""price_version":"00000000000000ab""#,
        ] {
            assert!(json.contains(part), "{json}");
        }
        assert_eq!(serde_json::from_str::<Terms>(&json).unwrap(), terms);
        let unknown = json.replace("millisecond_pico", "furlong_pico");
        assert!(serde_json::from_str::<Terms>(&unknown).unwrap_err().to_string().contains("furlong_pico"));
    }

    #[test]
    fn what_has_no_price_of_its_own_is_charged_as_what_it_is_a_kind_of() {
        let terms = plain(&[(Unit::Prompt, 10), (Unit::Completion, 100)]);
        let charged = |unit| {
            let charge = terms.charge(&Usage::NONE.with(unit, 1), MicroUsdc::new(1_000_000)).unwrap();
            (charge.cost.get(), charge.unpriced.has(unit))
        };
        for unit in
            [Unit::CachedPrompt, Unit::CacheWrite, Unit::CacheWrite1h, Unit::ImageIn, Unit::CachedImage]
        {
            assert_eq!(charged(unit), (10, false), "{unit:?}");
        }
        assert_eq!(charged(Unit::Reasoning), (100, false));
        // Sound and pictures that are made cost more than text: charged as text, and said.
        assert_eq!(charged(Unit::AudioIn), (10, true));
        assert_eq!(charged(Unit::CachedAudio), (10, true));
        assert_eq!(charged(Unit::AudioOut), (100, true));
        assert_eq!(charged(Unit::ImageOut), (100, true));
        // Nothing stands in for these.
        for unit in [Unit::Image, Unit::Millisecond, Unit::Character, Unit::Search] {
            assert_eq!(charged(unit), (0, true), "{unit:?}");
        }
        let priced = plain(&[
            (Unit::AudioIn, 40),
            (Unit::CacheWrite, 12),
            (Unit::ImageIn, 7),
            (Unit::CachedPrompt, 1),
        ]);
        assert_eq!(priced.cost(&Usage::NONE.with(Unit::CachedAudio, 1)), Some(PicoUsd::new(40)));
        assert_eq!(priced.cost(&Usage::NONE.with(Unit::CacheWrite1h, 1)), Some(PicoUsd::new(12)));
        assert_eq!(priced.cost(&Usage::NONE.with(Unit::CachedImage, 1)), Some(PicoUsd::new(7)));
    }

    #[test]
    fn a_tier_is_for_the_whole_request_and_keeps_what_it_does_not_list() {
        let base = rates(&[(Unit::Prompt, 10), (Unit::CachedPrompt, 1), (Unit::Completion, 100)]);
        let high = Tier { above: 200, rates: rates(&[(Unit::Prompt, 20), (Unit::Completion, 150)]) };
        let higher = Tier { above: 300, rates: rates(&[(Unit::CachedPrompt, 3)]) };
        let terms = with_prices(Prices::new(base, vec![higher, high], Vec::new()));
        let cost = |prompt, cached| {
            terms.cost(&Usage::tokens(prompt, 1).with(Unit::CachedPrompt, cached)).unwrap().get()
        };
        assert_eq!(cost(150, 50), 150 * 10 + 50 + 100, "at the threshold it is not above it");
        assert_eq!(cost(151, 50), 151 * 20 + 50 + 150);
        assert_eq!(cost(251, 50), 251 * 20 + 50 * 3 + 150);
    }

    #[test]
    fn a_call_is_charged_once_and_a_picture_as_listed() {
        let terms = plain(&[(Unit::Call, 5_000_000), (Unit::Search, 7)]);
        assert_eq!(terms.cost(&Usage::NONE).unwrap().get(), 5_000_000);
        assert_eq!(
            terms.cost(&Usage::NONE.with(Unit::Call, 1).with(Unit::Search, 2)).unwrap().get(),
            5_000_014
        );
        assert!(terms.unpriced(&Most::of_text(0, 0)).is_empty());

        let image = |size: &str, quality: &str, pico| ImagePrice {
            size: Some(size.into()),
            quality: Some(quality.into()),
            price: UnitPrice::new(pico),
        };
        let images =
            vec![image("s", "low", 1), image("s", "high", 3), image("l", "low", 2), image("l", "high", 9)];
        let prices = Prices::new(UnitPrices::default(), Vec::new(), images);
        let one = Usage::NONE.with(Unit::Image, 1);
        let cost = |size, quality| {
            let terms = with_prices(prices.clone()).for_image(size, quality)?;
            Some(terms.cost(&one).unwrap().get())
        };
        assert_eq!(cost(Some("s"), Some("high")), Some(3));
        assert_eq!(cost(Some("s"), Some("auto")), Some(3), "what is not said is the dearest it can be");
        assert_eq!(cost(None, None), Some(9));
        assert_eq!(cost(Some("xl"), None), None);
        assert_eq!(with_prices(prices.clone()).cost(&one).unwrap().get(), 9);
        assert!(with_prices(prices).charge(&one, MicroUsdc::new(9)).unwrap().unpriced.is_empty());
    }

    #[test]
    fn what_may_be_used_and_has_no_price_is_known_before() {
        let terms = terms(1, 1, 1);
        assert!(terms.unpriced(&Most::of_text(10, 10)).is_empty());
        let sound = Most { tokens: Units::OF_TEXT.with(Unit::AudioIn), ..Most::of_text(10, 10) };
        assert_eq!(terms.unpriced(&sound), Units::NONE.with(Unit::AudioIn));
        let search = Most { others: Usage::NONE.with(Unit::Search, 1), ..Most::of_text(10, 10) };
        assert_eq!(terms.unpriced(&search), Units::NONE.with(Unit::Search));
        let embedding = plain(&[(Unit::Prompt, 1)]);
        assert!(embedding.unpriced(&Most::of_text(10, 0)).is_empty());
        assert!(embedding.unpriced(&Most::of_text(10, 1)).has(Unit::Completion));
    }

    fn any_rates() -> impl Strategy<Value = UnitPrices> {
        let price = proptest::option::of(0i64..100_000_000);
        proptest::collection::vec(price, Unit::COUNT).prop_map(|prices| {
            let listed = Unit::all().zip(prices).filter_map(|(unit, price)| Some((unit, price?)));
            rates(&listed.collect::<Vec<_>>())
        })
    }

    fn any_prices() -> impl Strategy<Value = Prices> {
        let tier = (0u64..400_000, any_rates()).prop_map(|(above, rates)| Tier { above, rates });
        (any_rates(), proptest::collection::vec(tier, 0..3))
            .prop_map(|(rates, tiers)| Prices::new(rates, tiers, Vec::new()))
    }

    fn any_usage() -> impl Strategy<Value = Usage> {
        proptest::collection::vec(prop_oneof![2 => Just(0u64), 3 => 0u64..100_000], Unit::COUNT).prop_map(
            |counts| Unit::all().zip(counts).fold(Usage::NONE, |usage, (unit, n)| usage.with(unit, n)),
        )
    }

    proptest! {
        /// Within its bounds no request can cost more than was held for it, whatever tokens it is made of and
        /// whichever tier it comes to.
        #[test]
        fn a_quote_covers_every_usage(
            prices in any_prices(), usage in any_usage(), fewer in any_usage(),
            spare_prompt in 0u64..100_000, spare_completion in 0u64..100,
        ) {
            let terms = with_prices(prices);
            let others = usage.iter().filter(|(unit, _)| !unit.is_prompt() && !unit.is_completion());
            let most = Most {
                prompt_tokens: usage.prompt_tokens() + spare_prompt,
                completion_tokens: usage.completion_tokens() + spare_completion,
                tokens: usage.units(),
                others: others.fold(Usage::NONE, |others, (unit, count)| others.with(unit, count)),
            };
            let quote = quote(&terms, most).unwrap();
            prop_assert_eq!(terms.charge(&usage, quote.amount).unwrap().above_hold, MicroUsdc::ZERO);
            // And of one that uses less of some.
            let less = Unit::all().fold(Usage::NONE, |less, unit| {
                less.with(unit, usage.count(unit).min(fewer.count(unit)))
            });
            prop_assert_eq!(terms.charge(&less, quote.amount).unwrap().above_hold, MicroUsdc::ZERO);
        }

        /// The charge, worked out again in the plainest way there is.
        #[test]
        fn a_charge_is_the_sum_of_what_each_unit_costs(prices in any_prices(), usage in any_usage()) {
            let mut listed: Vec<_> = Unit::all().map(|unit| prices.rates().listed(unit)).collect();
            let prompt: u64 = Unit::all().filter(|unit| unit.is_prompt()).map(|unit| usage.count(unit)).sum();
            for tier in prices.tiers() {
                if prompt > tier.above {
                    for (i, unit) in Unit::all().enumerate() {
                        listed[i] = tier.rates.listed(unit).or(listed[i]);
                    }
                }
            }
            let of = |unit: Unit| listed[Unit::all().position(|u| u == unit).unwrap()];
            let price = |unit: Unit| match unit {
                Unit::CachedPrompt | Unit::CacheWrite | Unit::ImageIn | Unit::AudioIn => of(unit).or(of(Unit::Prompt)),
                Unit::CacheWrite1h => of(unit).or(of(Unit::CacheWrite)).or(of(Unit::Prompt)),
                Unit::CachedAudio => of(unit).or(of(Unit::AudioIn)).or(of(Unit::CachedPrompt)).or(of(Unit::Prompt)),
                Unit::CachedImage => of(unit).or(of(Unit::ImageIn)).or(of(Unit::CachedPrompt)).or(of(Unit::Prompt)),
                Unit::Reasoning | Unit::AudioOut | Unit::ImageOut => of(unit).or(of(Unit::Completion)),
                unit => of(unit),
            };
            let mut cost = 0i128;
            for unit in Unit::all() {
                let count = if unit == Unit::Call { usage.count(unit).max(1) } else { usage.count(unit) };
                cost += i128::from(price(unit).map_or(0, UnitPrice::get)) * i128::from(count);
            }
            let terms = with_prices(prices);
            let charge = terms.charge(&usage, MicroUsdc::new(i64::MAX)).unwrap();
            prop_assert_eq!(charge.cost.get(), cost);
            // × 1.2, up to the next micro-USDC.
            prop_assert_eq!(i128::from(charge.charged.get()), (cost * 12 + 9_999_999) / 10_000_000);
        }

        #[test]
        fn the_affordable_limit_is_the_largest(o in 1i64..100_000_000, prompt in 0u64..10_000, bound in 1u64..100_000, available in 0i64..10_000_000) {
            let terms = terms(150_000, 75_000, o);
            let available = MicroUsdc::new(available);
            let asked = quote(&terms, Most::of_text(prompt, bound)).unwrap();
            let fits = |n| quote(&terms, Most::of_text(prompt, n)).unwrap().amount <= available;
            match asked.affordable_completion(&terms, available) {
                None => prop_assert!(!fits(1)),
                Some(n) => {
                    prop_assert!(n <= bound && fits(n));
                    prop_assert!(n == bound || !fits(n + 1));
                }
            }
        }

        #[test]
        fn prices_and_usage_are_read_back_as_they_were_kept(prices in any_prices(), usage in any_usage()) {
            let json = serde_json::to_string(&prices).unwrap();
            prop_assert_eq!(serde_json::from_str::<Prices>(&json).unwrap(), prices);
            let json = serde_json::to_string(&usage).unwrap();
            prop_assert_eq!(serde_json::from_str::<Usage>(&json).unwrap(), usage);
        }
    }
}
