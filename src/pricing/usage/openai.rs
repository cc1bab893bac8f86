//! The words of the OpenAI API (API reference: *Create chat completion*, *Create a model response*,
//! *Create embeddings*), and what others add to them who speak it.

use crate::pricing::unit::Unit;
use crate::pricing::usage::members::Members;
use crate::pricing::usage::{Total, Usage};

/// Read from a cache, inside the prompt.
const CACHED: &[&[&str]] = &[
    &["prompt_tokens_details", "cached_tokens"],
    &["input_tokens_details", "cached_tokens"],
    // Perplexity's answers to the Responses API.
    &["input_tokens_details", "cache_read_input_tokens"],
    // DeepSeek, which says beside it how many missed: the two are the prompt.
    &["prompt_cache_hit_tokens"],
    // Moonshot and Together.
    &["cached_tokens"],
];

/// Written to a cache, inside the prompt.
const CACHE_WRITE: &[&[&str]] = &[
    // OpenRouter, and OpenAI for models that bill it.
    &["prompt_tokens_details", "cache_write_tokens"],
    &["input_tokens_details", "cache_write_tokens"],
    &["prompt_tokens_details", "cache_creation_tokens"],
    &["input_tokens_details", "cache_creation_input_tokens"],
];

/// Thought, inside the completion, unless the total says that it is beside it.
const REASONING: &[&[&str]] = &[
    &["completion_tokens_details", "reasoning_tokens"],
    &["output_tokens_details", "reasoning_tokens"],
    // Perplexity and Together.
    &["reasoning_tokens"],
];

/// Searches that the provider made.
const SEARCHES: &[&[&str]] = &[
    // OpenRouter and Anthropic's own.
    &["server_tool_use", "web_search_requests"],
    // Perplexity.
    &["num_search_queries"],
];

/// The usage of a chat completion, by OpenAI or one of those who copy it.
pub fn chat(report: &Members<'_>) -> Option<Usage> {
    let words = Words { prompt: "prompt_tokens", completion: "completion_tokens" };
    words.read(report, report.count("completion_tokens")?)
}

/// That of embeddings: there is no completion, and some (Voyage) say only the total.
pub fn embeddings(report: &Members<'_>) -> Option<Usage> {
    let prompt = report.first(&[&["prompt_tokens"], &["input_tokens"], &["total_tokens"]])?;
    Some(Total::of(prompt).rest(Unit::Prompt, Usage::NONE))
}

/// That of the Responses API.
pub fn responses(report: &Members<'_>) -> Option<Usage> {
    let words = Words { prompt: "input_tokens", completion: "output_tokens" };
    words.read(report, report.count("output_tokens")?)
}

struct Words {
    prompt: &'static str,
    completion: &'static str,
}

impl Words {
    fn read(&self, report: &Members<'_>, completion: u64) -> Option<Usage> {
        let prompt = report.count(self.prompt)?;
        let reasoning = report.first(REASONING).unwrap_or(0);
        let seconds = report.count("prompt_audio_seconds").unwrap_or(0);
        let beside = beside_completion(report, prompt, completion, reasoning, seconds);
        // Perplexity reads what it cites beside the prompt, at the prompt's price.
        let cited = report.count("citation_tokens").unwrap_or(0);

        let details = report.object(&format!("{}_details", self.prompt));
        let usage = split_prompt(report, details.as_ref(), prompt.saturating_add(cited));
        let details = report.object(&format!("{}_details", self.completion));
        let part = |key| details.as_ref().and_then(|details| details.count(key)).unwrap_or(0);
        let usage = Total::of(completion.saturating_add(beside))
            .part(Unit::Reasoning, reasoning.max(beside))
            .part(Unit::AudioOut, part("audio_tokens"))
            .part(Unit::ImageOut, part("image_tokens"))
            .rest(Unit::Completion, usage);
        // Mistral bills the sound of a prompt by the second.
        let usage = usage.with(Unit::Millisecond, seconds.saturating_mul(1000));
        Some(usage.with(Unit::Search, searches(report)))
    }
}

fn split_prompt(report: &Members<'_>, details: Option<&Members<'_>>, prompt: u64) -> Usage {
    let part = |key| details.and_then(|details| details.count(key)).unwrap_or(0);
    let (audio, images) = (part("audio_tokens"), part("image_tokens").saturating_add(part("video_tokens")));
    // Of what was read from a cache some say what it was.
    let of_cached = details.and_then(|details| details.object("cached_tokens_details"));
    let cached_part = |key| of_cached.as_ref().and_then(|details| details.count(key)).unwrap_or(0);
    let cached = report.first(CACHED).unwrap_or(0);
    let cached_audio = cached_part("audio_tokens").min(cached);
    let cached_images = cached_part("image_tokens").min(cached - cached_audio);
    Total::of(prompt)
        .part(Unit::CachedAudio, cached_audio)
        .part(Unit::CachedImage, cached_images)
        .part(Unit::CachedPrompt, cached - cached_audio - cached_images)
        .part(Unit::CacheWrite, report.first(CACHE_WRITE).unwrap_or(0))
        .part(Unit::AudioIn, audio.saturating_sub(cached_audio))
        .part(Unit::ImageIn, images.saturating_sub(cached_images))
        .rest(Unit::Prompt, Usage::NONE)
}

/// What was thought beside the completion.
///
/// xAI counts it in its total alone, and Gemini where it speaks as OpenAI does, without saying what it is.
/// Perplexity counts it in neither. A total that is less than its parts says nothing, nor does one that has
/// the tokens of sound that is billed by the second (Mistral).
fn beside_completion(
    report: &Members<'_>,
    prompt: u64,
    completion: u64,
    reasoning: u64,
    seconds: u64,
) -> u64 {
    let is_perplexity = report.count("citation_tokens").is_some();
    if is_perplexity {
        return reasoning;
    }
    let total = report.count("total_tokens").filter(|_| seconds == 0).unwrap_or(0);
    total.saturating_sub(prompt.saturating_add(completion))
}

/// xAI counts searches by tool, or, before, the sources that they read.
fn searches(report: &Members<'_>) -> u64 {
    if let Some(tools) = report.object("server_side_tool_usage_details") {
        let calls = |key| tools.count(key).unwrap_or(0);
        return calls("web_search_calls").saturating_add(calls("x_search_calls"));
    }
    report.first(SEARCHES).or_else(|| report.count("num_sources_used")).unwrap_or(0)
}
