//! The words of Gemini and Vertex AI (Gemini API reference, *UsageMetadata*).

use crate::pricing::unit::Unit;
use crate::pricing::usage::members::Members;
use crate::pricing::usage::{Total, Usage};

/// `promptTokenCount` has in it what was read from a cache; what was thought, and what tools put into the
/// prompt, are beside it and beside the candidates. Zeros are left out. Documents are billed as text.
pub fn generate(report: &Members<'_>) -> Option<Usage> {
    let count = |key| report.count(key).unwrap_or(0);
    let prompt = report.count("promptTokenCount")?;
    let tools = count("toolUsePromptTokenCount");
    // The Live API says `response` for `candidates`.
    let candidates = report.first(&[&["candidatesTokenCount"], &["responseTokenCount"]]).unwrap_or(0);

    let all = Kinds::of(report, "promptTokensDetails");
    let of_tools = Kinds::of(report, "toolUsePromptTokensDetails");
    let cached = count("cachedContentTokenCount").min(prompt);
    let of_cached = Kinds::of(report, "cacheTokensDetails");
    let usage = Total::of(cached)
        .part(Unit::CachedAudio, of_cached.audio)
        .part(Unit::CachedImage, of_cached.images)
        .rest(Unit::CachedPrompt, Usage::NONE);
    let audio = all.audio.saturating_sub(usage.count(Unit::CachedAudio)).saturating_add(of_tools.audio);
    let images = all.images.saturating_sub(usage.count(Unit::CachedImage)).saturating_add(of_tools.images);
    let usage = Total::of((prompt - cached).saturating_add(tools))
        .part(Unit::AudioIn, audio)
        .part(Unit::ImageIn, images)
        .rest(Unit::Prompt, usage);
    let details = if report.text("candidatesTokensDetails").is_some() {
        "candidatesTokensDetails"
    } else {
        "responseTokensDetails"
    };
    let made = Kinds::of(report, details);
    let usage = Total::of(candidates)
        .part(Unit::AudioOut, made.audio)
        .part(Unit::ImageOut, made.images)
        .rest(Unit::Completion, usage);
    Some(usage.with(Unit::Reasoning, count("thoughtsTokenCount")))
}

/// Tokens by what they are of.
#[derive(Default)]
struct Kinds {
    audio: u64,
    images: u64,
}

impl Kinds {
    fn of(report: &Members<'_>, key: &str) -> Self {
        let mut kinds = Self::default();
        for detail in report.list(key) {
            let count = detail.count("tokenCount").unwrap_or(0);
            match detail.string("modality").as_deref() {
                Some("AUDIO") => kinds.audio = kinds.audio.saturating_add(count),
                Some("IMAGE" | "VIDEO") => kinds.images = kinds.images.saturating_add(count),
                _ => {}
            }
        }
        kinds
    }
}
