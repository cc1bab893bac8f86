//! The words of Ollama's own API (Ollama API reference, *Generate a chat completion*).

use crate::pricing::unit::Unit;
use crate::pricing::usage::Usage;
use crate::pricing::usage::members::Members;

/// The prompt's count is left out where all of it was read from a cache, which costs nothing.
pub fn chat(report: &Members<'_>) -> Option<Usage> {
    let completion = report.count("eval_count")?;
    let prompt = report.count("prompt_eval_count").unwrap_or(0);
    Some(Usage::NONE.with(Unit::Prompt, prompt).with(Unit::Completion, completion))
}
