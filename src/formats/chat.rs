//! The chat completions format (OpenAI API reference, *Create chat completion*): what a request
//! asks for and can cost at most, and the few members that change on the way there and back.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::formats::answer::{Delivered, text_bytes};
pub use crate::formats::answer::{Forward, NotAnAnswer};
use crate::formats::json::{Object, each, length, length_of, quote, with_member};
pub use crate::formats::request::{BadRequest, Bounds};
use crate::formats::request::{
    DEFAULT_MAX_TOKENS, Prompt, Refused, bad, bad_value, each_of, estimate_tokens, missing, optional,
    parse_body, refuse_members, required, token_limit,
};
use crate::formats::sse::Event;
use crate::money::MicroUsdc;
use crate::pricing::{Dialect, Offer, Reasoning, Reported, Usage};

/// Most choices a request can ask for (OpenAI API reference, `n`).
pub(super) const MAX_CHOICES: u64 = 128;

/// A chat request, parsed as far as its price needs.
pub struct ChatRequest<'a> {
    object: Object<'a>,
    pub model: String,
    pub stream: bool,
    /// Whether the client asked for the usage of its stream.
    pub wants_usage: bool,
    choices: u64,
    max_tokens: Option<u64>,
    prompt: Prompt,
    /// Tokens that may be billed as output beyond the limit: those of a rejected prediction.
    prediction_bytes: u64,
}

/// Members that never become prompt; any other, known or not, is taken to.
const NOT_PROMPT: &[&str] = &[
    "model",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "n",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "user",
    "metadata",
    "store",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prediction",
];

/// Members that are read here, and so must not mean something else to the upstream.
const INTERPRETED: &[&str] = &[
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "stream",
    "stream_options",
    "tools",
    "functions",
    "prediction",
    "service_tier",
    "modalities",
    "thinking",
    "reasoning_effort",
];

/// Members that would buy something the catalogue has no price for, or escape the bounds.
const NOT_PRICED: &[Refused] = &[
    ("chat_template", "a prompt of another template cannot be bounded: leave it out"),
    ("audio", "audio is not priced here: leave it out"),
    ("best_of", "choices beyond those of n are not priced here: leave it out"),
];

impl<'a> ChatRequest<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Self, BadRequest> {
        let object = parse_body(body, INTERPRETED)?;
        let model: String = required(&object, "model")?;
        let messages = object.get_non_null("messages").ok_or_else(|| missing("messages"))?;
        let stream = optional(&object, "stream", "must be true or false")?.unwrap_or(false);
        let wants_usage = wants_usage(&object)?;
        let choices = optional(&object, "n", "must be a whole number")?.unwrap_or(1);
        if choices == 0 || choices > MAX_CHOICES {
            return Err(bad_value("n", format!("n must be between 1 and {MAX_CHOICES}")));
        }
        refuse_unpriced(&object)?;
        Ok(Self {
            model,
            stream,
            wants_usage,
            choices,
            max_tokens: max_tokens(&object)?,
            prompt: Prompt::measure(&object, messages)?,
            prediction_bytes: object.get_non_null("prediction").map_or(0, length),
            object,
        })
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        if offer.reasoning == Reasoning::Reject {
            for field in REASONING_FIELDS {
                if self.object.get_non_null(field).is_some() {
                    let message = format!("{field} is not supported for {}: leave it out", offer.id);
                    return Err(bad("unsupported_parameter", field, message));
                }
            }
        }
        let max_tokens = self.max_tokens_for(offer);
        if max_tokens > offer.max_output_tokens {
            let message = format!(
                "max_tokens is {max_tokens} and {} gives at most {}: ask for less",
                offer.id, offer.max_output_tokens
            );
            return Err(bad_value("max_tokens", message));
        }
        let completion = max_tokens.saturating_mul(self.choices).saturating_add(self.prediction_bytes);
        self.prompt.bounds(completion, offer, "messages")
    }

    pub fn choices(&self) -> u64 {
        self.choices
    }

    /// The largest `max_tokens` with which no more than `completion` tokens can come, if there is one.
    pub fn limit_within(&self, completion: u64) -> Option<u64> {
        let tokens = completion.checked_sub(self.prediction_bytes)? / self.choices;
        (tokens > 0).then_some(tokens)
    }

    pub(super) fn object(&self) -> &Object<'a> {
        &self.object
    }

    pub(super) fn max_tokens_for(&self, offer: &Offer) -> u64 {
        self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS.min(offer.max_output_tokens))
    }

    /// The body for the upstream: the client's, but for the model's name there, the limit under the
    /// field that is read there, and in streams the request for usage.
    pub fn upstream_body(&self, offer: &Offer) -> Bytes {
        let mut object = self.object.clone();
        object.set("model", quote(&offer.upstream_model));
        for name in LIMIT_FIELDS {
            if name != offer.max_tokens_field {
                object.remove(name);
            }
        }
        object.set(&offer.max_tokens_field, self.max_tokens_for(offer).to_string());
        if offer.reasoning == Reasoning::Strip {
            REASONING_FIELDS.iter().for_each(|field| object.remove(field));
        }
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

/// The two names of the output limit.
const LIMIT_FIELDS: [&str; 2] = ["max_tokens", "max_completion_tokens"];
/// What asks a model to reason unseen.
const REASONING_FIELDS: [&str; 2] = ["thinking", "reasoning_effort"];

/// Whether `stream_options` asks for the usage.
pub(super) fn wants_usage(object: &Object<'_>) -> Result<bool, BadRequest> {
    let Some(options) = optional::<Object<'_>>(object, "stream_options", "must be an object")? else {
        return Ok(false);
    };
    if options.ambiguous_key(&["include_usage"]).is_some() {
        return Err(bad_value("stream_options", "stream_options must hold each member once"));
    }
    Ok(optional(&options, "include_usage", "must be true or false")?.unwrap_or(false))
}

/// The output limit, under either of its names.
fn max_tokens(object: &Object<'_>) -> Result<Option<u64>, BadRequest> {
    let read = |key| token_limit(object, key);
    match (read(LIMIT_FIELDS[0])?, read(LIMIT_FIELDS[1])?) {
        (Some(a), Some(b)) if a != b => {
            Err(bad_value("max_tokens", "max_tokens and max_completion_tokens differ: send one of them"))
        }
        (a, b) => Ok(a.or(b)),
    }
}

fn refuse_unpriced(object: &Object<'_>) -> Result<(), BadRequest> {
    refuse_members(object, NOT_PRICED)?;
    let tier: Option<Cow<'_, str>> = optional(object, "service_tier", "must be a string")?;
    if tier.is_some_and(|tier| !matches!(tier.as_ref(), "auto" | "default")) {
        return Err(bad(
            "unsupported_parameter",
            "service_tier",
            "only the default service tier is priced here",
        ));
    }
    let modalities: Option<Vec<String>> = optional(object, "modalities", "must be a list of strings")?;
    if modalities.is_some_and(|list| list.iter().any(|modality| modality != "text")) {
        return Err(bad("unsupported_parameter", "modalities", "only text output is priced here"));
    }
    each_of(object, "tools", "must be a list of tools", |_, tool: Object<'_>| {
        if tool.ambiguous_key(&["type"]).is_none()
            && matches!(tool.get("type"), Some(r#""function""# | r#""custom""#))
        {
            return Ok(());
        }
        let message = "tools that the provider runs itself are not priced here: send functions only";
        Err(bad("unsupported_parameter", "tools", message))
    })
}

impl Prompt {
    fn measure(object: &Object<'_>, messages: &str) -> Result<Self, BadRequest> {
        let expected = "messages must be a list of at least one message";
        let list: Vec<&RawValue> =
            serde_json::from_str(messages).map_err(|_| bad_value("messages", expected))?;
        if list.is_empty() {
            return Err(bad_value("messages", expected));
        }
        let has_tools = object.get_non_null("tools").is_some() || object.get_non_null("functions").is_some();
        let has_schema = object.get_non_null("response_format").is_some();
        let mut prompt = Self {
            messages: length_of(&list),
            toolsets: u64::from(has_tools) + u64::from(has_schema),
            ..Self::of_members(object, NOT_PROMPT, "messages")
        };
        for (i, message) in list.into_iter().enumerate() {
            prompt.add_message(message).map_err(|problem| {
                bad_value(&format!("messages[{i}]"), format!("messages[{i}] {problem}"))
            })?;
        }
        Ok(prompt)
    }

    fn add_message(&mut self, raw: &RawValue) -> Result<(), &'static str> {
        let unreadable = "must be an object with each member once, spelt as the API spells it";
        let message = Object::parse(raw.get().as_bytes()).map_err(|_| unreadable)?;
        if message.ambiguous_key(&["role", "content", "audio"]).is_some() {
            return Err(unreadable);
        }
        // An earlier spoken answer, by its id: its tokens are not in these bytes.
        if message.get_non_null("audio").is_some() {
            self.parts_not_text += 1;
            self.has_audio = true;
        }
        let content = message.get("content").unwrap_or("null");
        match content.as_bytes().first() {
            Some(b'[') => {
                let mut are_readable = true;
                let read = each(content, |part: Object<'_>| {
                    are_readable &= part.ambiguous_key(&["type", "text"]).is_none();
                    match part.get("type") {
                        Some(r#""text""# | r#""refusal""#) => {
                            self.text_bytes += part.get("text").map_or(0, length);
                        }
                        Some(r#""input_audio""# | r#""audio_url""#) => {
                            self.parts_not_text += 1;
                            self.has_audio = true;
                        }
                        _ => self.parts_not_text += 1,
                    }
                });
                read.map_err(|_| "has content that is no list of parts")?;
                if are_readable { Ok(()) } else { Err(unreadable) }
            }
            Some(b'"' | b'n') => {
                self.text_bytes += length(raw.get());
                Ok(())
            }
            _ => Err("has content that is neither text nor a list of parts"),
        }
    }
}

/// A whole answer from an upstream.
pub struct Answer<'a> {
    object: Object<'a>,
}

impl<'a> Answer<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Self, NotAnAnswer> {
        let object = Object::parse(body).map_err(|_| NotAnAnswer::Nonsense)?;
        if object.get_non_null("error").is_some() {
            return Err(NotAnAnswer::Error);
        }
        // No choices at no cost are none.
        let is_empty = |choices: &str| choices == "[]" && object.get_non_null("usage").is_none();
        match object.get("choices") {
            Some(choices) if choices.starts_with('[') && !is_empty(choices) => Ok(Self { object }),
            _ => Err(NotAnAnswer::Nonsense),
        }
    }

    pub fn usage_raw(&self) -> Option<&str> {
        self.object.get_non_null("usage")
    }

    pub fn usage(&self) -> Option<Usage> {
        self.usage_raw().and_then(read_usage)
    }

    /// Output tokens, where the answer does not say how many there were.
    pub fn estimated_completion(&self) -> u64 {
        let choices = self.object.get("choices").unwrap_or("[]");
        match serde_json::from_str::<Vec<Choice<'_>>>(choices) {
            Ok(choices) => estimate_tokens(choices.iter().map(Choice::output_bytes).sum()),
            // Not the shape we know, but output all the same.
            Err(_) => estimate_tokens(length(choices)),
        }
    }

    /// The answer for the client: the model by the name it asked for, and what was charged.
    pub fn render(mut self, model: &str, charged: MicroUsdc) -> Bytes {
        self.object.set("model", quote(model));
        if let Some(usage) =
            self.usage_raw().and_then(|raw| with_member(raw, "charged_usdc", &charged.to_string()))
        {
            self.object.set("usage", usage);
        }
        self.object.to_bytes().into()
    }
}

fn read_usage(report: &str) -> Option<Usage> {
    Reported::read(Dialect::OpenAi, report).map(|reported| reported.usage)
}

/// Watches an answer stream past, chunk by chunk, for its usage and for how much was delivered.
pub struct StreamTap {
    model_json: String,
    wants_usage: bool,
    usage_raw: Option<String>,
    /// Whether usage came in a chunk without choices: that one is sent last, and is the whole.
    reported_at_end: bool,
    delivered: Delivered,
    /// Choices that have not given a reason for their end yet.
    unfinished_choices: u64,
}

/// A choice of an answer, or of a chunk of one.
#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, alias = "message")]
    delta: Option<Object<'a>>,
    /// Of a completion of the old kind.
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    finish_reason: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ToolCall<'a> {
    #[serde(borrow)]
    function: Option<Object<'a>>,
}

impl Choice<'_> {
    /// Bytes of output: texts without their quotes, and of calls what the model wrote.
    fn output_bytes(&self) -> u64 {
        let Some(delta) = &self.delta else {
            return self.text.map_or(0, |text| length(text.get()).saturating_sub(2));
        };
        let texts = ["content", "reasoning", "reasoning_content", "refusal"];
        let texts: u64 = texts.iter().map(|key| text_bytes(delta, key)).sum();
        let calls = delta.get_non_null("tool_calls").map_or(0, |json| {
            match serde_json::from_str::<Vec<ToolCall<'_>>>(json) {
                Ok(calls) => calls.iter().filter_map(|call| call.function.as_ref()).map(call_bytes).sum(),
                Err(_) => length(json),
            }
        });
        // The one call of old.
        let call = delta.get_non_null("function_call").map_or(0, length);
        texts.saturating_add(calls).saturating_add(call)
    }
}

fn call_bytes(function: &Object<'_>) -> u64 {
    text_bytes(function, "name").saturating_add(text_bytes(function, "arguments"))
}

impl StreamTap {
    /// For a request of so many `choices`, from a client that asked for `model` by this name.
    pub fn new(model: &str, wants_usage: bool, choices: u64) -> Self {
        Self {
            model_json: quote(model),
            wants_usage,
            unfinished_choices: choices,
            usage_raw: None,
            reported_at_end: false,
            delivered: Delivered::default(),
        }
    }

    /// Reads one event and says what the client gets of it.
    pub fn event(&mut self, event: &Event) -> Forward {
        let Some(data) = event.data() else { return Forward::Send(event.0.clone()) };
        if data.trim_ascii() == b"[DONE]" {
            return Forward::Done;
        }
        let Ok(mut object) = Object::parse(&data) else { return Forward::Nonsense };
        if object.get_non_null("error").is_some() {
            return Forward::Failed;
        }
        let empty = self.count(object.get_non_null("choices"));
        let report = object.get_non_null("usage").map(str::to_owned);
        let readable = report.clone().filter(|report| read_usage(report).is_some());
        self.reported_at_end |= empty && readable.is_some();
        self.usage_raw = readable.or(self.usage_raw.take());
        if !self.wants_usage {
            if empty && report.is_some() {
                return Forward::Skip;
            }
            object.remove("usage");
        }
        if object.get("model").is_some() {
            object.set("model", self.model_json.as_str());
        }
        Forward::Send(Event::written(None, data.len() + self.model_json.len(), |out| object.write_to(out)))
    }

    /// Counts what a chunk delivers, and says whether it has no choices at all.
    fn count(&mut self, choices: Option<&str>) -> bool {
        let Some(raw) = choices else { return true };
        let Ok(choices) = serde_json::from_str::<Vec<Choice<'_>>>(raw) else {
            // Not the shape we know, but output all the same.
            self.delivered.add(length(raw));
            return false;
        };
        for choice in &choices {
            self.delivered.add(choice.output_bytes());
            if choice.finish_reason.is_some() {
                self.unfinished_choices = self.unfinished_choices.saturating_sub(1);
            }
        }
        choices.is_empty()
    }

    pub fn usage_raw(&self) -> Option<&str> {
        self.usage_raw.as_deref()
    }

    pub fn usage(&self) -> Option<Usage> {
        self.usage_raw().and_then(read_usage)
    }

    /// Whether the report of usage is the last word, however the stream ends.
    pub fn is_reported_at_end(&self) -> bool {
        self.reported_at_end
    }

    pub fn delivered_anything(&self) -> bool {
        self.delivered.anything()
    }

    /// Whether the answer was whole, should the stream end now without saying so.
    pub fn is_finished(&self) -> bool {
        self.unfinished_choices == 0
    }

    /// Output tokens delivered so far: no chunk with output has less than one.
    pub fn estimated_completion(&self) -> u64 {
        self.delivered.estimated_tokens()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::money::UnitPrice;
    use crate::pricing::{ModelKind, Prices, Unit};
    use std::sync::Arc;

    pub(in crate::formats) fn offer() -> Offer {
        Offer {
            id: "openai/gpt-5-mini".into(),
            kind: ModelKind::Chat,
            provider: "openai".into(),
            upstream_model: "gpt-5-mini-2026".into(),
            context_length: 128_000,
            max_output_tokens: 16_384,
            max_tokens_field: "max_completion_tokens".into(),
            reasoning: Reasoning::Reject,
            fallbacks: Vec::new(),
            image_tokens: Vec::new(),
            prices: Arc::new(Prices::of_text(
                UnitPrice::new(150_000),
                UnitPrice::new(75_000),
                UnitPrice::new(600_000),
            )),
            price_version: None,
            created: 0,
        }
    }

    fn request(members: &str) -> String {
        format!(r#"{{"model":"openai/gpt-5-mini","messages":[{{"role":"user","content":"hi"}}]{members}}}"#)
    }

    fn refused(body: &str) -> BadRequest {
        let error = match ChatRequest::parse(body.as_bytes()) {
            Err(error) => error,
            Ok(request) => request.bounds(&offer()).unwrap_err(),
        };
        assert!(!error.message.is_empty());
        error
    }

    #[test]
    fn what_the_contract_names_changes_and_nothing_else() {
        let body =
            request(r#", "max_tokens":7,"x_unknown":{"a":[1, 2.50]},"stream":true,"stream_options":{"y":1}"#);
        let request = ChatRequest::parse(body.as_bytes()).unwrap();
        assert_eq!(
            request.upstream_body(&offer()),
            r#"{"model":"gpt-5-mini-2026","messages":[{"role":"user","content":"hi"}],"x_unknown":{"a":[1, 2.50]},"stream":true,"stream_options":{"y":1,"include_usage":true},"max_completion_tokens":7}"#
        );
        assert!(request.stream && !request.wants_usage);
    }

    #[test]
    fn a_limit_is_always_sent_and_defaults_to_1024() {
        let body = request("");
        let request = ChatRequest::parse(body.as_bytes()).unwrap();
        let sent = request.upstream_body(&offer());
        assert!(sent.ends_with(br#""max_completion_tokens":1024}"#), "{sent:?}");
        assert_eq!(request.bounds(&offer()).unwrap().completion, 1024);
    }

    #[test]
    fn bad_requests_name_their_field() {
        for (members, param) in [
            (r#","max_tokens":0"#, "max_tokens"),
            (r#","max_tokens":-1"#, "max_tokens"),
            (r#","max_tokens":1.5"#, "max_tokens"),
            (r#","max_tokens":16385"#, "max_tokens"),
            (r#","max_tokens":1,"max_completion_tokens":2"#, "max_tokens"),
            (r#","max_tokens":1,"max_tokens":99999"#, "max_tokens"),
            (r#","n":0"#, "n"),
            (r#","n":129"#, "n"),
            (r#","stream":"yes""#, "stream"),
            (r#","stream_options":[]"#, "stream_options"),
            (r#","reasoning_effort":"low""#, "reasoning_effort"),
            (r#","thinking":{"type":"enabled"}"#, "thinking"),
            (r#","service_tier":"priority""#, "service_tier"),
            (r#","modalities":["text","audio"]"#, "modalities"),
            (r#","models":["a"]"#, "models"),
            (r#","web_search_options":{}"#, "web_search_options"),
            (r#","tools":[{"type":"web_search"}]"#, "tools"),
            (r#","tools":[{"type":"web_search"},{"type":"function"}]"#, "tools"),
            (r#","tools":{}"#, "tools"),
            (r#","tools":[{"type":"function","Type":"web_search"}]"#, "tools"),
            (r#","Max_Tokens":100000"#, "Max_Tokens"),
            (r#","N":50"#, "N"),
            (r#","stream_options":{"Include_Usage":true}"#, "stream_options"),
            (r#","chat_template":"{{x}}""#, "chat_template"),
            (r#","Web_Search_Options":{}"#, "Web_Search_Options"),
            (r#","n_predict":100000"#, "n_predict"),
            (r#","n":1,"n_cmpl":8"#, "n_cmpl"),
            (r#","provider":{"only":["dear"]}"#, "provider"),
            (r#","providerOptions":{"gateway":{"order":["dear"]}}"#, "providerOptions"),
            (r#","max_new_tokens":100000"#, "max_new_tokens"),
            (r#","use_beam_search":true"#, "use_beam_search"),
            (r#","best_of":20"#, "best_of"),
        ] {
            assert_eq!(refused(&request(members)).param.as_deref(), Some(param), "{members}");
        }
        assert_eq!(refused("{}").param.as_deref(), Some("model"));
        assert_eq!(refused(r#"{"model":"m"}"#).param.as_deref(), Some("messages"));
        assert_eq!(refused(r#"{"model":"m","messages":[]}"#).param.as_deref(), Some("messages"));
        assert_eq!(refused(r#"{"model":"m","messages":[7]}"#).param.as_deref(), Some("messages[0]"));
        let hidden_picture =
            r#"{"model":"m","messages":[{"role":"user","content":[{"type":"text","Type":"image_url"}]}]}"#;
        assert_eq!(refused(hidden_picture).param.as_deref(), Some("messages[0]"));
        assert_eq!(refused("[]").code, "invalid_json");
        let many: String = (0..1023).map(|i| format!(",\"x{i}\":0")).collect();
        let error = refused(&request(&many));
        assert_eq!(error.code, "invalid_json");
        assert!(error.message.contains("it may have 1024 members at most"), "{}", error.message);
    }

    #[test]
    fn the_prompt_bound_counts_bytes_and_a_picture_is_the_whole_context() {
        let bound = |body: &str| ChatRequest::parse(body.as_bytes()).unwrap().bounds(&offer()).unwrap();
        let messages = r#"[{"role":"user","content":"hi"}]"#;
        assert_eq!(bound(&request("")).prompt, u64::try_from(messages.len()).unwrap() + 16 + 64);
        let picture = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"what"},{"type":"image_url","image_url":{"url":"http://x/y.png"}}]}]}"#;
        assert_eq!(bound(picture).prompt, 128_000);
        assert!(bound(picture).estimated_prompt < 2_000);
        let long = format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}]}}"#,
            "x".repeat(1_000_000)
        );
        assert_eq!(bound(&long).prompt, 128_000);
        // Tools, schemas and members nobody knows become prompt as well.
        assert!(bound(&request(r#","unknown":"0123456789""#)).prompt >= bound(&request("")).prompt + 10);
        assert_eq!(bound(&request(r#","n":3,"max_tokens":5"#)).completion, 15);
    }

    #[test]
    fn only_a_model_for_chat_chats() {
        let body = request("");
        let request = ChatRequest::parse(body.as_bytes()).unwrap();
        let error = request.bounds(&Offer { kind: ModelKind::Speech, ..offer() }).unwrap_err();
        assert_eq!((error.code, error.param.as_deref()), ("invalid_value", Some("model")));
    }

    #[test]
    fn sound_is_taken_where_it_has_a_price() {
        let body = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"input_audio","input_audio":{"data":"","format":"wav"}}]}]}"#;
        let request = ChatRequest::parse(body.as_bytes()).unwrap();
        let error = request.bounds(&offer()).unwrap_err();
        assert_eq!(error.code, "unsupported_parameter");
        assert!(error.message.contains("no price for audio_in_tokens"), "{}", error.message);
        let rates = offer().prices.rates().with(Unit::AudioIn, UnitPrice::new(40_000_000));
        let prices = Arc::new(Prices::new(rates, Vec::new(), Vec::new()));
        let bounds = request.bounds(&Offer { prices, ..offer() }).unwrap();
        assert!(bounds.tokens.has(Unit::AudioIn) && bounds.tokens.has(Unit::CachedAudio));
        assert_eq!(bounds.prompt, 128_000);
        // A picture is billed as text where it has no price of its own.
        let picture = body.replace("input_audio", "image_url");
        let bounds = ChatRequest::parse(picture.as_bytes()).unwrap().bounds(&offer()).unwrap();
        assert!(bounds.tokens.has(Unit::ImageIn) && !bounds.tokens.has(Unit::AudioIn));
    }

    #[test]
    fn an_answer_keeps_all_but_model_and_usage() {
        let body = br#"{"id":"c1","model":"gpt-5-mini-2026","choices":[{"index":0}],"usage":{"prompt_tokens":1,"completion_tokens":2},"x":[1, 2]}"#;
        let answer = Answer::parse(body).unwrap();
        assert_eq!(
            answer.render("openai/gpt-5-mini", MicroUsdc::new(11)),
            r#"{"id":"c1","model":"openai/gpt-5-mini","choices":[{"index":0}],"usage":{"prompt_tokens":1,"completion_tokens":2,"charged_usdc":11},"x":[1, 2]}"#
        );
        assert_eq!(Answer::parse(br#"{"error":{"message":"no"}}"#).err(), Some(NotAnAnswer::Error));
        assert_eq!(Answer::parse(b"<html>").err(), Some(NotAnAnswer::Nonsense));
        assert_eq!(Answer::parse(b"{}").err(), Some(NotAnAnswer::Nonsense));
    }

    fn event(data: &str) -> Event {
        Event(Event::from_data(data.as_bytes()))
    }

    #[test]
    fn usage_reaches_only_the_client_that_asked() {
        let shared = event(
            r#"{"model":"u","choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":1,"completion_tokens":1}}"#,
        );
        let alone = event(r#"{"model":"u","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}"#);
        let null = event(r#"{"model":"u","choices":[{"delta":{}}],"usage":null}"#);

        let mut unasked = StreamTap::new("p/m", false, 1);
        assert_eq!(
            unasked.event(&shared),
            Forward::Send(event(r#"{"model":"p/m","choices":[{"delta":{"content":"a"}}]}"#).0)
        );
        assert_eq!(
            unasked.event(&null),
            Forward::Send(event(r#"{"model":"p/m","choices":[{"delta":{}}]}"#).0)
        );
        assert_eq!(unasked.usage().unwrap().completion_tokens(), 1);
        assert_eq!(unasked.event(&alone), Forward::Skip);
        assert_eq!(unasked.usage().unwrap().completion_tokens(), 4);

        let mut asked = StreamTap::new("p/m", true, 1);
        assert_eq!(
            asked.event(&alone),
            Forward::Send(
                event(r#"{"model":"p/m","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}"#).0
            )
        );
        assert_eq!(asked.event(&event("[DONE]")), Forward::Done);
    }

    #[test]
    fn output_is_counted_and_errors_are_not() {
        let mut tap = StreamTap::new("p/m", false, 1);
        assert_eq!(
            tap.event(&event(r#"{"error":{"message":"a long story of what went wrong"}}"#)),
            Forward::Failed
        );
        assert!(!tap.delivered_anything());
        tap.event(&event(r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#));
        assert!(!tap.delivered_anything());
        tap.event(&event(r#"{"choices":[{"delta":{"content":"12345678"}}]}"#));
        tap.event(&event(r#"{"choices":[{"delta":{"content":"1"},"finish_reason":"stop"}]}"#));
        assert_eq!(tap.estimated_completion(), 3);
        tap.event(&event(r#"{"choices":[{"text":"12345678"}]}"#));
        assert_eq!(tap.estimated_completion(), 5);
        assert!(tap.is_finished());
        assert_eq!(tap.event(&event("{nonsense")), Forward::Nonsense);
        let comment = Event(Bytes::from_static(b": still working\n\n"));
        assert_eq!(tap.event(&comment), Forward::Send(comment.0.clone()));
    }
}
