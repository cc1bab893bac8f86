//! What an upstream says was used, brought into counts that cannot overlap.

use serde::Deserialize;

/// Tokens of one request. `cached` is a part of `prompt`, `reasoning` a part of `completion`.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    pub prompt: u64,
    pub cached: u64,
    pub completion: u64,
    pub reasoning: u64,
}

impl Usage {
    /// Reads the `usage` member of a chat completion.
    ///
    /// `None` where it does not say how many prompt and completion tokens there were: null, absent,
    /// negative, fractional. A zero is a zero. Cached tokens count inside the prompt (OpenAI API
    /// reference, *prompt_tokens_details*), so no more of them than the prompt has are taken.
    pub fn from_openai(json: &str) -> Option<Self> {
        let wire: Option<WireUsage> = serde_json::from_str(json).ok()?;
        let wire = wire?;
        let (prompt, completion) = (wire.prompt_tokens?, wire.completion_tokens?);
        let cached = wire.prompt_tokens_details.and_then(|d| d.cached_tokens).unwrap_or(0);
        let reasoning = wire.completion_tokens_details.and_then(|d| d.reasoning_tokens).unwrap_or(0);
        // More tokens than this in one request is nonsense, and would not fit the books.
        if prompt > MAX_TOKENS || completion > MAX_TOKENS {
            return None;
        }
        Some(Self { prompt, cached: cached.min(prompt), completion, reasoning: reasoning.min(completion) })
    }

    /// The larger of each count, where two sources know of a part each.
    pub fn max(self, other: Self) -> Self {
        Self {
            prompt: self.prompt.max(other.prompt),
            cached: self.cached.max(other.cached),
            completion: self.completion.max(other.completion),
            reasoning: self.reasoning.max(other.reasoning),
        }
    }

    /// Prompt tokens at the full price.
    pub fn uncached(&self) -> u64 {
        self.prompt.saturating_sub(self.cached)
    }
}

/// A hundred million tokens: ten times the longest context there is.
const MAX_TOKENS: u64 = 100_000_000;

#[derive(Deserialize)]
struct WireUsage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct CompletionDetails {
    reasoning_tokens: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn zero_is_zero_and_missing_is_missing() {
        let zero = r#"{"prompt_tokens":0,"completion_tokens":0}"#;
        assert_eq!(Usage::from_openai(zero), Some(Usage::default()));
        for missing in [
            "null",
            "{}",
            r#"{"prompt_tokens":3}"#,
            r#"{"prompt_tokens":3,"completion_tokens":null}"#,
            r#"{"prompt_tokens":-3,"completion_tokens":1}"#,
            r#"{"prompt_tokens":3.5,"completion_tokens":1}"#,
            r#"{"prompt_tokens":3,"completion_tokens":99999999999999}"#,
            "[]",
            "\"many\"",
        ] {
            assert_eq!(Usage::from_openai(missing), None, "{missing}");
        }
    }

    #[test]
    fn details_may_be_null_or_full() {
        let json = r#"{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15,
            "prompt_tokens_details":{"cached_tokens":4,"audio_tokens":0},"completion_tokens_details":null}"#;
        let usage = Usage::from_openai(json).unwrap();
        assert_eq!(usage, Usage { prompt: 10, cached: 4, completion: 5, reasoning: 0 });
        assert_eq!(usage.uncached(), 6);
    }

    proptest! {
        /// Whatever is claimed, the buckets are disjoint and sum to the totals.
        #[test]
        fn buckets_sum(prompt in 0u64..1_000_000, cached in 0u64..2_000_000, completion in 0u64..1_000_000, reasoning in 0u64..2_000_000) {
            let json = format!(r#"{{"prompt_tokens":{prompt},"completion_tokens":{completion},"prompt_tokens_details":{{"cached_tokens":{cached}}},"completion_tokens_details":{{"reasoning_tokens":{reasoning}}}}}"#);
            let usage = Usage::from_openai(&json).unwrap();
            prop_assert_eq!(usage.uncached() + usage.cached, prompt);
            prop_assert!(usage.reasoning <= usage.completion);
            prop_assert_eq!(usage.completion, completion);
        }
    }
}
