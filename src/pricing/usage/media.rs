//! Pictures and sound (OpenAI API reference: *Create image*, *Create transcription*, *Create speech*).
//!
//! What is billed by the piece, the second or the character is counted by who knows the request: the number
//! of pictures, the length of a recording that its answer does not tell, the characters that are spoken.

use crate::money::parse_decimal;
use crate::pricing::unit::Unit;
use crate::pricing::usage::members::Members;
use crate::pricing::usage::{Total, Usage};

/// Of a picture that is made or changed. Without details all of the output is of pictures.
pub fn images(report: &Members<'_>) -> Option<Usage> {
    let usage = input(report)?;
    let output = report.count("output_tokens")?;
    let details = report.object("output_tokens_details");
    let text = details.and_then(|details| details.count("text_tokens")).unwrap_or(0);
    Some(Total::of(output).part(Unit::Completion, text).rest(Unit::ImageOut, usage))
}

/// Of sound that is written down: tokens, or how long it is.
pub fn transcription(report: &Members<'_>) -> Option<Usage> {
    if let Some(seconds) = report.text("seconds") {
        return Some(Usage::NONE.with(Unit::Millisecond, milliseconds(seconds)?));
    }
    let output = report.count("output_tokens")?;
    Some(Total::of(output).rest(Unit::Completion, input(report)?))
}

/// Of text that is spoken, where the answer says tokens.
pub fn speech(report: &Members<'_>) -> Option<Usage> {
    let output = report.count("output_tokens")?;
    Some(Total::of(output).rest(Unit::AudioOut, input(report)?))
}

/// The input by what it is of. Transcriptions spell the details' name without the plural.
fn input(report: &Members<'_>) -> Option<Usage> {
    let prompt = report.count("input_tokens")?;
    let details = report.object("input_tokens_details").or_else(|| report.object("input_token_details"));
    let part = |key| details.as_ref().and_then(|details| details.count(key)).unwrap_or(0);
    let of_cached = details.as_ref().and_then(|details| details.object("cached_tokens_details"));
    let cached_images = of_cached.and_then(|details| details.count("image_tokens")).unwrap_or(0);
    let cached = part("cached_tokens");
    let cached_images = cached_images.min(cached);
    Some(
        Total::of(prompt)
            .part(Unit::CachedImage, cached_images)
            .part(Unit::CachedPrompt, cached - cached_images)
            .part(Unit::AudioIn, part("audio_tokens"))
            .part(Unit::ImageIn, part("image_tokens").saturating_sub(cached_images))
            .rest(Unit::Prompt, Usage::NONE),
    )
}

/// Seconds as a JSON number, in thousandths, rounded up.
fn milliseconds(seconds: &str) -> Option<u64> {
    let (milliseconds, has_rest) = parse_decimal(seconds, 3).ok()?;
    u64::try_from(milliseconds).ok()?.checked_add(u64::from(has_rest))
}
