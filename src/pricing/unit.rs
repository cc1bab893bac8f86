//! What providers bill by.

use std::fmt;

/// Something that is counted and has a price each. Those of a prompt and those of a completion are disjoint:
/// a token is counted under one of them.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Unit {
    /// A token of the prompt that is none of the others.
    Prompt,
    /// A prompt token read from a cache.
    CachedPrompt,
    /// A prompt token written to a cache, for five minutes or however long the provider keeps it by default.
    CacheWrite,
    /// One written for an hour.
    CacheWrite1h,
    /// A prompt token of sound.
    AudioIn,
    /// One of sound, read from a cache.
    CachedAudio,
    /// A prompt token of a picture or of a film's pictures.
    ImageIn,
    /// One of a picture, read from a cache.
    CachedImage,
    /// A token of the completion that is none of the others.
    Completion,
    /// A completion token that the model thought and did not say.
    Reasoning,
    /// A completion token of sound.
    AudioOut,
    /// A completion token of a picture.
    ImageOut,
    /// A picture, where pictures are billed by the piece.
    Image,
    /// A thousandth of a second of sound or film.
    Millisecond,
    /// A character of text that is spoken.
    Character,
    /// The request itself.
    Call,
    /// A search that the provider made, or a source that it read.
    Search,
}

/// How a unit is spelt.
struct Names {
    unit: Unit,
    /// In the configuration, under `price`.
    config: &'static str,
    /// In the books and in receipts: how many of it were used.
    counted: &'static str,
    /// In the books: pico-USD for one.
    pico: &'static str,
    /// How many of it a price in the configuration is for.
    per: u32,
}

const fn names(
    unit: Unit,
    config: &'static str,
    counted: &'static str,
    pico: &'static str,
    per: u32,
) -> Names {
    Names { unit, config, counted, pico, per }
}

const MILLION: u32 = 1_000_000;

/// Every unit, in the order of [`Unit`].
const NAMES: [Names; Unit::COUNT] = [
    names(Unit::Prompt, "prompt", "prompt_tokens", "prompt_pico", MILLION),
    names(Unit::CachedPrompt, "cached_prompt", "cached_prompt_tokens", "cached_prompt_pico", MILLION),
    names(Unit::CacheWrite, "cache_write", "cache_write_tokens", "cache_write_pico", MILLION),
    names(Unit::CacheWrite1h, "cache_write_1h", "cache_write_1h_tokens", "cache_write_1h_pico", MILLION),
    names(Unit::AudioIn, "audio_in", "audio_in_tokens", "audio_in_pico", MILLION),
    names(Unit::CachedAudio, "cached_audio", "cached_audio_tokens", "cached_audio_pico", MILLION),
    names(Unit::ImageIn, "image_in", "image_in_tokens", "image_in_pico", MILLION),
    names(Unit::CachedImage, "cached_image", "cached_image_tokens", "cached_image_pico", MILLION),
    names(Unit::Completion, "completion", "completion_tokens", "completion_pico", MILLION),
    names(Unit::Reasoning, "reasoning", "reasoning_tokens", "reasoning_pico", MILLION),
    names(Unit::AudioOut, "audio_out", "audio_out_tokens", "audio_out_pico", MILLION),
    names(Unit::ImageOut, "image_out", "image_out_tokens", "image_out_pico", MILLION),
    names(Unit::Image, "per_image", "images", "image_pico", 1),
    names(Unit::Millisecond, "per_second", "milliseconds", "millisecond_pico", 1000),
    names(Unit::Character, "per_million_characters", "characters", "character_pico", MILLION),
    names(Unit::Call, "per_call", "calls", "call_pico", 1),
    names(Unit::Search, "per_search", "searches", "search_pico", 1),
];

impl Unit {
    pub const COUNT: usize = 17;

    /// All units, in the order they are declared in.
    pub fn all() -> impl Iterator<Item = Self> {
        NAMES.iter().map(|names| names.unit)
    }

    pub(super) const fn index(self) -> usize {
        self as usize
    }

    /// Its key under `price` in the configuration.
    pub fn config_key(self) -> &'static str {
        NAMES[self.index()].config
    }

    /// Its key where it is counted.
    pub fn counted_key(self) -> &'static str {
        NAMES[self.index()].counted
    }

    /// Its key where its price is kept, in pico-USD for one.
    pub fn pico_key(self) -> &'static str {
        NAMES[self.index()].pico
    }

    /// How many of it prices are written for: a million tokens, a second's thousand milliseconds, one picture.
    pub fn per(self) -> u32 {
        NAMES[self.index()].per
    }

    /// Whether it is a token of the prompt.
    pub fn is_prompt(self) -> bool {
        self < Self::Completion
    }

    /// Whether it is a token of the completion.
    pub fn is_completion(self) -> bool {
        (Self::Completion..Self::Image).contains(&self)
    }

    /// Whether it was read from a cache.
    pub fn is_cached(self) -> bool {
        matches!(self, Self::CachedPrompt | Self::CachedAudio | Self::CachedImage)
    }

    /// Those whose price it is charged at: the first of them that has one.
    pub fn priced_as(self) -> &'static [Self] {
        match self {
            Self::Prompt => &[Self::Prompt],
            Self::CachedPrompt => &[Self::CachedPrompt, Self::Prompt],
            Self::CacheWrite => &[Self::CacheWrite, Self::Prompt],
            Self::CacheWrite1h => &[Self::CacheWrite1h, Self::CacheWrite, Self::Prompt],
            Self::AudioIn => &[Self::AudioIn, Self::Prompt],
            Self::CachedAudio => &[Self::CachedAudio, Self::AudioIn, Self::CachedPrompt, Self::Prompt],
            Self::ImageIn => &[Self::ImageIn, Self::Prompt],
            Self::CachedImage => &[Self::CachedImage, Self::ImageIn, Self::CachedPrompt, Self::Prompt],
            Self::Completion => &[Self::Completion],
            Self::Reasoning => &[Self::Reasoning, Self::Completion],
            Self::AudioOut => &[Self::AudioOut, Self::Completion],
            Self::ImageOut => &[Self::ImageOut, Self::Completion],
            Self::Image => &[Self::Image],
            Self::Millisecond => &[Self::Millisecond],
            Self::Character => &[Self::Character],
            Self::Call => &[Self::Call],
            Self::Search => &[Self::Search],
        }
    }

    /// Whether the price of `other` is the usual one for it, rather than what is taken for want of its own:
    /// sound costs several times what text does, and so does a picture that is made.
    pub fn is_usually_priced_as(self, other: Self) -> bool {
        match self {
            Self::AudioIn | Self::CachedAudio => matches!(other, Self::AudioIn | Self::CachedAudio),
            Self::AudioOut | Self::ImageOut => other == self,
            _ => true,
        }
    }
}

/// A set of units.
#[derive(Copy, Clone, PartialEq, Eq, Default)]
pub struct Units(u32);

impl Units {
    pub const NONE: Self = Self(0);
    /// What the prompt and the completion of a request of text can be billed as: a provider may cache whatever
    /// it likes, and let the model think.
    pub const OF_TEXT: Self = Self::NONE
        .with(Unit::Prompt)
        .with(Unit::CachedPrompt)
        .with(Unit::CacheWrite)
        .with(Unit::CacheWrite1h)
        .with(Unit::Completion)
        .with(Unit::Reasoning);

    #[must_use]
    pub const fn with(self, unit: Unit) -> Self {
        Self(self.0 | 1 << unit.index())
    }

    #[must_use]
    pub const fn without(self, unit: Unit) -> Self {
        Self(self.0 & !(1 << unit.index()))
    }

    #[must_use]
    pub const fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    pub const fn has(self, unit: Unit) -> bool {
        self.0 & (1 << unit.index()) != 0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn iter(self) -> impl Iterator<Item = Unit> {
        Unit::all().filter(move |unit| self.has(*unit))
    }
}

impl FromIterator<Unit> for Units {
    fn from_iter<I: IntoIterator<Item = Unit>>(units: I) -> Self {
        units.into_iter().fold(Self::NONE, Self::with)
    }
}

impl fmt::Debug for Units {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Their keys where they are counted, between commas.
impl fmt::Display for Units {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, unit) in self.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{}", unit.counted_key())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_has_names_of_its_own() {
        for (i, names) in NAMES.iter().enumerate() {
            assert_eq!(names.unit.index(), i);
            for other in &NAMES[..i] {
                assert_ne!(names.config, other.config);
                assert_ne!(names.counted, other.counted);
                assert_ne!(names.pico, other.pico);
            }
            assert_eq!(names.unit.priced_as().first(), Some(&names.unit));
            // What stands in for a unit is of the same side.
            for other in names.unit.priced_as() {
                assert_eq!(names.unit.is_prompt(), other.is_prompt());
                assert_eq!(names.unit.is_completion(), other.is_completion());
            }
        }
        assert_eq!(Unit::all().filter(|unit| unit.is_prompt()).count(), 8);
        assert_eq!(Unit::all().filter(|unit| unit.is_completion()).count(), 4);
    }

    #[test]
    fn a_set_holds_what_was_put_in() {
        let set = Units::NONE.with(Unit::Search).with(Unit::AudioIn);
        assert!(set.has(Unit::Search) && !set.has(Unit::Call) && !set.is_empty());
        assert_eq!(set.to_string(), "audio_in_tokens, searches");
        assert_eq!(set.without(Unit::Search), Units::NONE.with(Unit::AudioIn));
    }
}
