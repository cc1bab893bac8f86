//! Completions of the old kind (OpenAI API reference, *Create completion*): a text in and how it goes on out, as model
//! servers and models that fill in code still have them. Answers, whole or streamed, are read as those of chats.

use bytes::Bytes;

use crate::formats::chat::{self, MAX_CHOICES};
use crate::formats::embeddings::{self, Input};
use crate::formats::json::{Object, length, quote, with_member};
use crate::formats::request::{
    BadRequest, Bounds, Need, Refused, SERVICE_TIER, bad_value, check_kind, most_tokens, optional,
    parse_body, refuse_members, required, token_limit, within_context,
};
use crate::pricing::{ModelKind, Offer, Unit, Units};

/// Members that are read here, and so must not mean something else to the upstream.
const INTERPRETED: &[&str] =
    &["model", "prompt", "suffix", "max_tokens", "n", "best_of", "stream", "stream_options"];

/// Members that would buy something the catalogue has no price for, or escape the bounds.
const NOT_PRICED: &[Refused] = &[
    SERVICE_TIER,
    ("prompt_embeds", "a prompt that is neither text nor tokens cannot be bounded: send it as `prompt`"),
    ("max_completion_tokens", "the limit is called max_tokens here"),
];

/// Members that never become prompt; any other, known or not, may stand before each of the prompts.
const NOT_PROMPT: &[&str] = &[
    "model",
    "prompt",
    "max_tokens",
    "n",
    "best_of",
    "stream",
    "stream_options",
    "echo",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "logprobs",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "user",
];

/// Output tokens when the request names no limit (API reference, `max_tokens`).
const DEFAULT_MAX_TOKENS: u64 = 16;

/// A request for completions, parsed as far as its price needs.
pub struct CompletionsRequest<'a> {
    object: Object<'a>,
    pub model: String,
    pub stream: bool,
    /// Whether the client asked for the usage of its stream.
    pub wants_usage: bool,
    prompts: Vec<Input>,
    /// Of each prompt: how many are given, and how many are written to choose from.
    choices: u64,
    written: u64,
    max_tokens: Option<u64>,
}

impl<'a> CompletionsRequest<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Self, BadRequest> {
        let object = parse_body(body, INTERPRETED)?;
        let model: String = required(&object, "model")?;
        refuse_members(&object, NOT_PRICED)?;
        let prompts = embeddings::inputs(&object, "prompt")?;
        let choices = number_of(&object, "n")?.unwrap_or(1);
        let written = number_of(&object, "best_of")?.unwrap_or(choices);
        if written < choices {
            return Err(bad_value("best_of", "best_of must not be below n"));
        }
        Ok(Self {
            model,
            stream: optional(&object, "stream", "must be true or false")?.unwrap_or(false),
            wants_usage: chat::wants_usage(&object)?,
            prompts,
            choices,
            written,
            max_tokens: token_limit(&object, "max_tokens")?,
            object,
        })
    }

    fn max_tokens_for(&self, offer: &Offer) -> u64 {
        self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS.min(offer.max_output_tokens))
    }

    /// How often the limit may be used up.
    fn times(&self) -> u64 {
        u64::try_from(self.prompts.len()).unwrap_or(u64::MAX).saturating_mul(self.written)
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        check_kind(offer, ModelKind::Chat)?;
        let max_tokens = self.max_tokens_for(offer);
        if max_tokens > offer.max_output_tokens {
            let message = format!(
                "max_tokens is {max_tokens} and {} gives at most {}: ask for less",
                offer.id, offer.max_output_tokens
            );
            return Err(bad_value("max_tokens", message));
        }
        let beside = self.object.members().filter(|(key, _)| !NOT_PROMPT.contains(key));
        let beside: u64 = beside.map(|(_, value)| length(value)).sum();
        let most = |prompt: &Input| match prompt {
            Input::Text(bytes) => within_context(most_tokens(bytes.saturating_add(beside)), offer),
            Input::Tokens(count) => count.saturating_add(most_tokens(beside)),
        };
        Need {
            prompt: self.prompts.iter().map(most).fold(0, u64::saturating_add),
            completion: max_tokens.saturating_mul(self.times()),
            estimated_prompt: self.prompts.iter().map(Input::estimate).fold(0, u64::saturating_add),
            tokens: Units::NONE.with(Unit::Prompt).with(Unit::Completion),
            maybe: Units::OF_TEXT,
            ..Need::default()
        }
        .bounds(offer)
    }

    /// The largest `max_tokens` with which no more than `completion` tokens can come, if there is one.
    pub fn limit_within(&self, completion: u64) -> Option<u64> {
        Some(completion / self.times()).filter(|tokens| *tokens > 0)
    }

    /// Choices that a stream has to end.
    pub fn choices(&self) -> u64 {
        u64::try_from(self.prompts.len()).unwrap_or(u64::MAX).saturating_mul(self.choices)
    }

    /// The body for the upstream: the client's, but for the model's name there, the limit, and in streams the request
    /// for usage.
    pub fn upstream_body(&self, offer: &Offer) -> Bytes {
        let mut object = self.object.clone();
        object.set("model", quote(&offer.upstream_model));
        object.set("max_tokens", self.max_tokens_for(offer).to_string());
        if self.stream {
            // Parsing has seen that what is there is an object.
            let given = object.get_non_null("stream_options").unwrap_or("{}");
            if let Some(options) = with_member(given, "include_usage", "true") {
                object.set("stream_options", options);
            }
        }
        object.to_bytes().into()
    }
}

fn number_of(object: &Object<'_>, key: &str) -> Result<Option<u64>, BadRequest> {
    let number = optional(object, key, "must be a whole number")?;
    match number {
        Some(number) if number == 0 || number > MAX_CHOICES => {
            Err(bad_value(key, format!("{key} must be between 1 and {MAX_CHOICES}")))
        }
        number => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::chat::tests::offer;

    fn bounds(members: &str) -> Bounds {
        let body = format!(r#"{{"model":"p/m"{members}}}"#);
        CompletionsRequest::parse(body.as_bytes()).unwrap().bounds(&offer()).unwrap()
    }

    #[test]
    fn every_prompt_and_every_choice_is_bounded() {
        let one = bounds(r#","prompt":"Say""#);
        assert_eq!((one.prompt, one.completion, one.estimated_prompt), (5 + 80, 16, 2));
        assert_eq!(one.tokens, Units::OF_TEXT);
        let many = bounds(r#","prompt":["Say","it"],"n":2,"best_of":3,"max_tokens":10,"suffix":"1234""#);
        assert_eq!((many.prompt, many.completion), (5 + 4 + 2 * (6 + 80), 60));
        let tokens = bounds(r#","prompt":[[1,2],[3]],"max_tokens":10"#);
        assert_eq!((tokens.prompt, tokens.completion), (3 + 2 * 80, 20));
    }

    #[test]
    fn bad_requests_name_their_field() {
        for (members, param) in [
            ("", "prompt"),
            (r#","prompt":{"text":"a"}"#, "prompt"),
            (r#","prompt":[]"#, "prompt"),
            (r#","prompt":"a","n":0"#, "n"),
            (r#","prompt":"a","n":2,"best_of":1"#, "best_of"),
            (r#","prompt":"a","best_of":129"#, "best_of"),
            (r#","prompt":"a","max_tokens":0"#, "max_tokens"),
            (r#","prompt":"a","max_tokens":16385"#, "max_tokens"),
            (r#","prompt":"a","Best_Of":9"#, "Best_Of"),
            (r#","prompt":"a","prompt_embeds":"x""#, "prompt_embeds"),
            (r#","prompt":"a","models":["x"]"#, "models"),
            (r#","prompt":"a","Max_Completion_Tokens":9"#, "Max_Completion_Tokens"),
            (r#","prompt":"a","n_predict":9000"#, "n_predict"),
            (r#","prompt":"a","N_Predict":9000"#, "N_Predict"),
            (r#","prompt":"a","max_new_tokens":9000"#, "max_new_tokens"),
            (r#","prompt":"a","use_beam_search":true"#, "use_beam_search"),
        ] {
            let body = format!(r#"{{"model":"p/m"{members}}}"#);
            let error = match CompletionsRequest::parse(body.as_bytes()) {
                Err(error) => error,
                Ok(request) => request.bounds(&offer()).expect_err(members),
            };
            assert_eq!(error.param.as_deref(), Some(param), "{members}");
        }
    }

    #[test]
    fn a_limit_is_always_sent_and_usage_always_asked_for() {
        let body = br#"{"prompt":"a","model":"p/m","stream":true,"suffix":"b"}"#;
        let request = CompletionsRequest::parse(body).unwrap();
        assert!(request.stream && !request.wants_usage);
        assert_eq!(
            request.upstream_body(&offer()),
            r#"{"prompt":"a","model":"gpt-5-mini-2026","stream":true,"suffix":"b","max_tokens":16,"stream_options":{"include_usage":true}}"#
        );
        assert_eq!(
            (request.limit_within(40), request.limit_within(0), request.choices()),
            (Some(40), None, 1)
        );
    }
}
