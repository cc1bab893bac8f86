//! What each unit costs, at cost, and what is agreed for one request.

use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap as _, Serializer};

use crate::money::UnitPrice;
use crate::pricing::catalog::ModelKind;
use crate::pricing::unit::{Unit, Units};
use crate::pricing::usage::Usage;

/// Prices by unit; of those without, what [`Unit::priced_as`] says is taken.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct UnitPrices([Option<UnitPrice>; Unit::COUNT]);

impl UnitPrices {
    #[must_use]
    pub fn with(mut self, unit: Unit, price: UnitPrice) -> Self {
        self.0[unit.index()] = Some(price);
        self
    }

    /// The price that is listed for a unit.
    pub fn listed(&self, unit: Unit) -> Option<UnitPrice> {
        self.0[unit.index()]
    }

    pub fn iter(&self) -> impl Iterator<Item = (Unit, UnitPrice)> {
        Unit::all().filter_map(|unit| Some((unit, self.listed(unit)?)))
    }

    /// The price that a unit is charged at, and whose it is.
    pub fn price(&self, unit: Unit) -> Option<(Unit, UnitPrice)> {
        unit.priced_as().iter().find_map(|by| Some((*by, self.listed(*by)?)))
    }

    /// What is charged for a unit: its own price, or that of another where it has none.
    pub fn charged(&self, unit: Unit) -> UnitPrice {
        self.price(unit).map_or(UnitPrice::ZERO, |(_, price)| price)
    }

    /// Whether a unit has a price, its own or the usual one.
    pub fn is_priced(&self, unit: Unit) -> bool {
        self.price(unit).is_some_and(|(by, _)| unit.is_usually_priced_as(by))
    }

    /// These over others: what is not listed here is as it is there.
    fn over(self, below: Self) -> Self {
        self.iter().fold(below, |rates, (unit, price)| rates.with(unit, price))
    }
}

/// Other prices for the whole of a request whose prompt is long.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Tier {
    /// From one token more than this on, of any kind.
    pub above: u64,
    /// What is listed for it; the rest is as in the tier below.
    pub rates: UnitPrices,
}

/// What a picture costs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImagePrice {
    /// As the request names it, `1024x1024`; `None`: any.
    pub size: Option<String>,
    /// `low`, `hd` …; `None`: any.
    pub quality: Option<String>,
    pub price: UnitPrice,
}

/// The prices of an offer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Prices {
    rates: UnitPrices,
    /// By length, shortest first.
    tiers: Vec<Tier>,
    images: Vec<ImagePrice>,
}

impl Prices {
    /// Tiers may come in any order; of two for the same length the later one counts.
    pub fn new(rates: UnitPrices, mut tiers: Vec<Tier>, images: Vec<ImagePrice>) -> Self {
        tiers.sort_by_key(|tier| tier.above);
        Self { rates, tiers, images }
    }

    /// So much for each token of the prompt, read from a cache or not, and of the completion.
    pub fn of_text(prompt: UnitPrice, cached: UnitPrice, completion: UnitPrice) -> Self {
        let rates = UnitPrices::default().with(Unit::Prompt, prompt).with(Unit::CachedPrompt, cached);
        Self::new(rates.with(Unit::Completion, completion), Vec::new(), Vec::new())
    }

    /// As listed, below all tiers.
    pub fn rates(&self) -> &UnitPrices {
        &self.rates
    }

    pub fn tiers(&self) -> &[Tier] {
        &self.tiers
    }

    pub fn images(&self) -> &[ImagePrice] {
        &self.images
    }

    /// What a unit is charged at where no tier applies.
    pub fn charged(&self, unit: Unit) -> UnitPrice {
        self.rates.charged(unit)
    }

    /// The prices of a request with a prompt of so many tokens.
    pub fn at(&self, prompt_tokens: u64) -> UnitPrices {
        let passed = self.tiers.iter().take_while(|tier| tier.above < prompt_tokens);
        passed.fold(self.with_images(), |rates, tier| tier.rates.over(rates))
    }

    /// Each stretch of prompt lengths up to `most`: the longest prompt of it, and its prices.
    pub(super) fn stretches(&self, most: u64) -> impl Iterator<Item = (u64, UnitPrices)> {
        let ends = self.tiers.iter().map(|tier| tier.above).take_while(move |above| *above < most);
        ends.chain([most]).map(|longest| (longest, self.at(longest)))
    }

    /// The base prices, where a picture is charged as the dearest that is listed.
    fn with_images(&self) -> UnitPrices {
        match self.images.iter().map(|image| image.price).max() {
            Some(dearest) => self.rates.with(Unit::Image, dearest),
            None => self.rates,
        }
    }

    /// Those of `units` that have no price, own or usual, at any length.
    pub fn unpriced(&self, units: Units) -> Units {
        let rates = self.with_images();
        units.iter().filter(|unit| !rates.is_priced(*unit)).collect()
    }

    /// The prices of a request for a picture of this size and quality: of those listed for pictures only what
    /// can apply is left. What is not said (`None`, or `auto`) can be anything. `None` where nothing that is
    /// listed fits.
    pub fn for_image(&self, size: Option<&str>, quality: Option<&str>) -> Option<Self> {
        let said = |text: Option<&str>| text.filter(|text| *text != "auto").map(str::to_owned);
        let (size, quality) = (said(size), said(quality));
        let fits = |listed: &Option<String>, said: &Option<String>| {
            listed.is_none() || said.is_none() || listed == said
        };
        let fitting = self.images.iter();
        let fitting =
            fitting.filter(|image| fits(&image.size, &size) && fits(&image.quality, &quality)).cloned();
        let mut images: Vec<_> = fitting.collect();
        // Where one is listed for just this, those for anything do not apply.
        let is_exact = |image: &ImagePrice| {
            (size.is_none() || image.size == size) && (quality.is_none() || image.quality == quality)
        };
        if size.is_some() && quality.is_some() && images.iter().any(is_exact) {
            images.retain(is_exact);
        }
        if images.is_empty() && !self.images.is_empty() {
            return None;
        }
        Some(Self { rates: self.rates, tiers: self.tiers.clone(), images })
    }

    /// What a model of this kind cannot be sold without and is not listed: one of these units.
    pub fn missing_for(&self, kind: ModelKind) -> Option<&'static [Unit]> {
        let rates = self.with_images();
        let is_missing = |one_of: &&&[Unit]| one_of.iter().all(|unit| rates.listed(*unit).is_none());
        kind.required().iter().find(is_missing).copied()
    }

    /// Those that `usage` has and that have no price, own or usual.
    pub fn unpriced_in(&self, usage: &Usage) -> Units {
        let rates = self.at(usage.prompt_tokens());
        usage.units().iter().filter(|unit| !rates.is_priced(*unit)).collect()
    }
}

/// A name for all the prices of a catalogue as they are: what it is made of is what it is called by.
#[derive(Copy, Clone, PartialEq, Eq, Hash)]
pub struct PriceVersion(u64);

impl PriceVersion {
    pub const fn new(number: u64) -> Self {
        Self(number)
    }
}

impl std::fmt::Display for PriceVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl std::fmt::Debug for PriceVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for PriceVersion {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PriceVersion {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map(Self).map_err(D::Error::custom)
    }
}

impl Serialize for UnitPrice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i64(self.get())
    }
}

impl<'de> Deserialize<'de> for UnitPrice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        i64::deserialize(deserializer).map(Self::new)
    }
}

const TIERS: &str = "tiers";
const ABOVE: &str = "above_prompt_tokens";
const IMAGES: &str = "images";
const SIZE: &str = "size";
const QUALITY: &str = "quality";

/// How prices are kept in the books: what is listed, each with its unit in the name, and nothing else.
impl Serialize for Prices {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (unit, price) in self.rates.iter() {
            map.serialize_entry(unit.pico_key(), &price)?;
        }
        if !self.tiers.is_empty() {
            map.serialize_entry(TIERS, &self.tiers)?;
        }
        if !self.images.is_empty() {
            map.serialize_entry(IMAGES, &self.images)?;
        }
        map.end()
    }
}

impl Serialize for Tier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry(ABOVE, &self.above)?;
        for (unit, price) in self.rates.iter() {
            map.serialize_entry(unit.pico_key(), &price)?;
        }
        map.end()
    }
}

impl Serialize for ImagePrice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if let Some(size) = &self.size {
            map.serialize_entry(SIZE, size)?;
        }
        if let Some(quality) = &self.quality {
            map.serialize_entry(QUALITY, quality)?;
        }
        map.serialize_entry(Unit::Image.pico_key(), &self.price)?;
        map.end()
    }
}

/// Whatever may stand in one of the three objects. A key that none has is an error: it would be a price that
/// was agreed and is not charged.
#[derive(Default)]
struct Listed {
    rates: UnitPrices,
    tiers: Vec<Tier>,
    images: Vec<ImagePrice>,
    above: Option<u64>,
    size: Option<String>,
    quality: Option<String>,
}

impl<'de> Deserialize<'de> for Listed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = Listed;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("prices by unit")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Listed, A::Error> {
                let mut listed = Listed::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        TIERS => listed.tiers = map.next_value()?,
                        IMAGES => listed.images = map.next_value()?,
                        ABOVE => listed.above = Some(map.next_value()?),
                        SIZE => listed.size = Some(map.next_value()?),
                        QUALITY => listed.quality = Some(map.next_value()?),
                        other => {
                            let unit = Unit::all().find(|unit| unit.pico_key() == other);
                            let unit =
                                unit.ok_or_else(|| A::Error::custom(format!("no price is {other}")))?;
                            listed.rates = listed.rates.with(unit, map.next_value()?);
                        }
                    }
                }
                Ok(listed)
            }
        }

        deserializer.deserialize_map(Keys)
    }
}

impl<'de> Deserialize<'de> for Prices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let listed = Listed::deserialize(deserializer)?;
        Ok(Self::new(listed.rates, listed.tiers, listed.images))
    }
}

impl<'de> Deserialize<'de> for Tier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let listed = Listed::deserialize(deserializer)?;
        let above = listed.above.ok_or_else(|| D::Error::missing_field(ABOVE))?;
        Ok(Self { above, rates: listed.rates })
    }
}

impl<'de> Deserialize<'de> for ImagePrice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let listed = Listed::deserialize(deserializer)?;
        let price = listed.rates.listed(Unit::Image);
        let price = price.ok_or_else(|| D::Error::missing_field(Unit::Image.pico_key()))?;
        Ok(Self { size: listed.size, quality: listed.quality, price })
    }
}

/// Prices that many requests agree on, in terms that serialize as the prices themselves.
pub(super) mod shared {
    use super::{Arc, Deserialize, Deserializer, Prices, Serialize, Serializer};

    pub fn serialize<S: Serializer>(prices: &Arc<Prices>, serializer: S) -> Result<S::Ok, S::Error> {
        prices.as_ref().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Prices>, D::Error> {
        Prices::deserialize(deserializer).map(Arc::new)
    }
}
