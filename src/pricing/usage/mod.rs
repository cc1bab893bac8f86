//! What an upstream says was used, brought into counts that cannot overlap.
//!
//! Providers agree neither on names nor on what is counted inside what: cached tokens are a part of the
//! prompt here and beside it there, and so is what a model thought of its completion. A file a format reads
//! them, each quirk with the provider that has it; a token is counted once, under one [`Unit`].

mod anthropic;
mod gemini;
mod media;
mod members;
mod ollama;
mod openai;

#[cfg(test)]
mod tests;

pub use anthropic::AnthropicUsage;

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap as _, Serializer};

use crate::money::PicoUsd;
use crate::pricing::unit::{Unit, Units};
use members::Members;

/// How many of each unit one request used. Each token is in one bucket.
///
/// Small enough to be copied: no request has four thousand million of anything, and what claims to is more than
/// a report may say.
#[derive(Copy, Clone, PartialEq, Eq, Default)]
pub struct Usage([u32; Unit::COUNT]);

/// In which words usage is reported.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// Chat completions, and those who copy them: `prompt_tokens`, `completion_tokens`. Embeddings have no
    /// completion.
    OpenAi,
    Embeddings,
    /// `input_tokens`, `output_tokens` with details inside them: the Responses API.
    Responses,
    /// `input_tokens` with what caches took beside them: the Messages API.
    Anthropic,
    /// `usageMetadata`.
    Gemini,
    /// Ollama's own API: `prompt_eval_count`, `eval_count`, in the answer itself.
    Ollama,
    /// Pictures: output tokens are a picture's unless told otherwise.
    Images,
    /// Text of sound: by tokens, or by its duration.
    Transcription,
    /// Sound of text: output tokens are sound.
    Speech,
}

/// What an upstream reports of a request.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Reported {
    pub usage: Usage,
    /// What it says that it charges us, where it says so.
    pub cost: Option<PicoUsd>,
}

impl Reported {
    /// Reads the JSON of a report of usage.
    ///
    /// `None` where it does not say how much there was in all: null, absent, negative, fractional. A zero is
    /// a zero. Details are parts of the total and cannot exceed it: where they do, the total stands, and what
    /// is left of them after those named before is taken. Details that are unreadable are not there.
    pub fn read(dialect: Dialect, json: &str) -> Option<Self> {
        let report = Members::parse(json)?;
        let usage = match dialect {
            Dialect::OpenAi => openai::chat(&report)?,
            Dialect::Embeddings => openai::embeddings(&report)?,
            Dialect::Responses => openai::responses(&report)?,
            Dialect::Anthropic => {
                let mut usage = AnthropicUsage::default();
                usage.add(&report);
                usage.usage()?
            }
            Dialect::Gemini => gemini::generate(&report)?,
            Dialect::Ollama => ollama::chat(&report)?,
            Dialect::Images => media::images(&report)?,
            Dialect::Transcription => media::transcription(&report)?,
            Dialect::Speech => media::speech(&report)?,
        };
        usage.is_plausible().then(|| Self { usage, cost: reported_cost(&report) })
    }

    /// The same, of what may be no report at all: what an upstream says that it charges.
    pub fn cost_in(json: &str) -> Option<PicoUsd> {
        // Most say nothing of it, and need not be taken apart for that.
        if json.contains("cost") { reported_cost(&Members::parse(json)?) } else { None }
    }
}

/// Ten-billionths of a USD, in pico-USD: what xAI counts in.
const PICO_PER_TICK: i128 = 100;

/// A number of USD (OpenRouter; DeepInfra calls it an estimate), an object with a total (Perplexity), or
/// ticks of a USD (xAI).
fn reported_cost(report: &Members<'_>) -> Option<PicoUsd> {
    let usd = |members: &Members<'_>, key| {
        let cost = PicoUsd::parse_usd_rounded_up(members.text(key)?).ok()?;
        (cost >= PicoUsd::ZERO).then_some(cost)
    };
    usd(report, "cost")
        .or_else(|| usd(&report.object("cost")?, "total_cost"))
        .or_else(|| usd(report, "estimated_cost"))
        .or_else(|| Some(PicoUsd::new(i128::from(report.count("cost_in_usd_ticks")?) * PICO_PER_TICK)))
}

/// More tokens than this in one request is nonsense, and would not fit the books: ten times the longest
/// context there is.
const MAX_TOKENS: u64 = 100_000_000;
/// As many milliseconds are a month, as many characters a library. Less than what `u32` ends at.
const MAX_OTHERS: u64 = 3_000_000_000;

impl Usage {
    pub const NONE: Self = Self([0; Unit::COUNT]);

    /// So many tokens of text.
    pub fn tokens(prompt: u64, completion: u64) -> Self {
        Self::NONE.with(Unit::Prompt, prompt).with(Unit::Completion, completion)
    }

    /// The same with so many of a unit; of more than fit, as many as do.
    #[must_use]
    pub fn with(mut self, unit: Unit, count: u64) -> Self {
        self.0[unit.index()] = u32::try_from(count).unwrap_or(u32::MAX);
        self
    }

    pub fn count(&self, unit: Unit) -> u64 {
        self.0[unit.index()].into()
    }

    /// Tokens of the prompt, of all kinds.
    pub fn prompt_tokens(&self) -> u64 {
        self.sum(Unit::is_prompt)
    }

    /// Those of them that were read from a cache.
    pub fn cached_tokens(&self) -> u64 {
        self.sum(Unit::is_cached)
    }

    /// Tokens of the completion, of all kinds.
    pub fn completion_tokens(&self) -> u64 {
        self.sum(Unit::is_completion)
    }

    fn sum(&self, is_counted: fn(Unit) -> bool) -> u64 {
        let counted = Unit::all().filter(|unit| is_counted(*unit));
        counted.fold(0, |sum, unit| sum.saturating_add(self.count(unit)))
    }

    /// What there is of each unit that there is any of.
    pub fn iter(&self) -> impl Iterator<Item = (Unit, u64)> {
        Unit::all().map(|unit| (unit, self.count(unit))).filter(|(_, count)| *count > 0)
    }

    /// The units that there is any of.
    pub fn units(&self) -> Units {
        self.iter().map(|(unit, _)| unit).collect()
    }

    /// With as many tokens of text more as make so many of prompt and of completion, where there are fewer.
    #[must_use]
    pub fn at_least(self, prompt: u64, completion: u64) -> Self {
        let more =
            |unit, wanted: u64, there: u64| self.count(unit).saturating_add(wanted.saturating_sub(there));
        self.with(Unit::Prompt, more(Unit::Prompt, prompt, self.prompt_tokens()))
            .with(Unit::Completion, more(Unit::Completion, completion, self.completion_tokens()))
    }

    fn is_plausible(&self) -> bool {
        let is_few = |(unit, count): (Unit, u64)| {
            let is_token = unit.is_prompt() || unit.is_completion();
            count <= if is_token { MAX_TOKENS } else { MAX_OTHERS }
        };
        self.iter().all(is_few)
            && self.prompt_tokens() <= MAX_TOKENS
            && self.completion_tokens() <= MAX_TOKENS
    }
}

/// A total of tokens, and the parts of it that are taken out one after the other.
struct Total {
    usage: Usage,
    left: u64,
}

impl Total {
    fn of(tokens: u64) -> Self {
        Self { usage: Usage::NONE, left: tokens }
    }

    /// So many of it are of this unit, or what is left of it.
    fn part(mut self, unit: Unit, count: u64) -> Self {
        let taken = count.min(self.left);
        self.left -= taken;
        let before = self.usage.count(unit);
        self.usage = self.usage.with(unit, before.saturating_add(taken));
        self
    }

    /// The rest of it is of this one. Parts of another total are added.
    fn rest(self, unit: Unit, others: Usage) -> Usage {
        let left = self.left;
        let whole = self.part(unit, left).usage;
        whole.iter().fold(others, |sum, (unit, count)| sum.with(unit, sum.count(unit).saturating_add(count)))
    }
}

impl fmt::Debug for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// As the books keep it: what there is any of, by its key.
impl Serialize for Usage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (unit, count) in self.iter() {
            map.serialize_entry(unit.counted_key(), &count)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Usage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Counts;

        impl<'de> Visitor<'de> for Counts {
            type Value = Usage;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("counts by unit")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Usage, A::Error> {
                let mut usage = Usage::NONE;
                while let Some((key, count)) = map.next_entry::<String, u64>()? {
                    let unit = Unit::all().find(|unit| unit.counted_key() == key);
                    let unit = unit.ok_or_else(|| serde::de::Error::custom(format!("no unit is {key}")))?;
                    usage = usage.with(unit, count);
                }
                Ok(usage)
            }
        }

        deserializer.deserialize_map(Counts)
    }
}
