//! The words of the Messages API (Anthropic API reference, *Messages*; *Prompt caching*; *Streaming*).

use crate::pricing::unit::Unit;
use crate::pricing::usage::members::Members;
use crate::pricing::usage::{Total, Usage};

/// The usage of a message, put together from what its stream says of it at the start (`message_start`) and at
/// the end (`message_delta`): what is said again replaces what was said before.
///
/// `input_tokens` are those that no cache had to do with; what was read from caches and written to them is
/// beside them. Thinking is inside the output.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct AnthropicUsage {
    input: Option<u64>,
    cache_read: Option<u64>,
    /// To caches of any kind …
    cache_write: Option<u64>,
    /// … and of each.
    write_5m: Option<u64>,
    write_1h: Option<u64>,
    output: Option<u64>,
    thinking: Option<u64>,
    searches: Option<u64>,
}

impl AnthropicUsage {
    /// Takes in a `usage` member.
    pub fn absorb(&mut self, json: &str) {
        if let Some(report) = Members::parse(json) {
            self.add(&report);
        }
    }

    pub(super) fn add(&mut self, report: &Members<'_>) {
        let take = |place: &mut Option<u64>, path: &[&str]| *place = report.first(&[path]).or(*place);
        take(&mut self.input, &["input_tokens"]);
        take(&mut self.cache_read, &["cache_read_input_tokens"]);
        take(&mut self.cache_write, &["cache_creation_input_tokens"]);
        take(&mut self.write_5m, &["cache_creation", "ephemeral_5m_input_tokens"]);
        take(&mut self.write_1h, &["cache_creation", "ephemeral_1h_input_tokens"]);
        take(&mut self.output, &["output_tokens"]);
        take(&mut self.thinking, &["output_tokens_details", "thinking_tokens"]);
        take(&mut self.searches, &["server_tool_use", "web_search_requests"]);
    }

    /// The counts, if both sides have been told.
    pub fn usage(&self) -> Option<Usage> {
        let (input, output) = (self.input?, self.output?);
        let (write_5m, write_1h) = (self.write_5m.unwrap_or(0), self.write_1h.unwrap_or(0));
        let written = self.cache_write.unwrap_or(write_5m.saturating_add(write_1h));
        let usage = Usage::NONE.with(Unit::CachedPrompt, self.cache_read.unwrap_or(0));
        let usage = Total::of(written).part(Unit::CacheWrite1h, write_1h).rest(Unit::CacheWrite, usage);
        let usage = usage.with(Unit::Prompt, input).with(Unit::Search, self.searches.unwrap_or(0));
        let thinking = self.thinking.unwrap_or(0);
        let usage = Total::of(output).part(Unit::Reasoning, thinking).rest(Unit::Completion, usage);
        Some(usage).filter(Usage::is_plausible)
    }
}
