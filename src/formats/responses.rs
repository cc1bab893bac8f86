//! The responses format (OpenAI API reference, *Create a model response*): what a request asks for and
//! can cost at most, and the few members that change on the way there and back.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::formats::answer::{Delivered, Forward, NotAnAnswer, text_bytes};
use crate::formats::conversation::{ANTHROPIC, ANTHROPIC_REDACTED, GOOGLE, UNSEALED};
use crate::formats::json::{Object, length, length_of, list, quote, with_member};
use crate::formats::request::{
    BadRequest, Bounds, DEFAULT_MAX_TOKENS, Prompt, Refused, bad_value, each_of, estimate_tokens, missing,
    optional, parse_body, part, refuse_members, required, token_limit, unsupported,
};
use crate::formats::sse::Event;
use crate::money::MicroUsdc;
use crate::pricing::{Offer, Reasoning};

/// A responses request, parsed as far as its price needs.
pub struct ResponsesRequest<'a> {
    object: Object<'a>,
    pub model: String,
    pub stream: bool,
    max_output_tokens: Option<u64>,
    prompt: Prompt,
}

/// Members that never become prompt; any other, known or not, is taken to.
const NOT_PROMPT: &[&str] = &[
    "model",
    "max_output_tokens",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_logprobs",
    "user",
    "metadata",
    "client_metadata",
    "store",
    "include",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "truncation",
];

/// Members that are read here, and so must not mean something else to the upstream.
const INTERPRETED: &[&str] = &[
    "model",
    "input",
    "instructions",
    "max_output_tokens",
    "stream",
    "tools",
    "reasoning",
    "service_tier",
    "background",
    "max_tool_calls",
];

/// Members that would buy something the catalogue has no price for, or escape the bounds.
const NOT_PRICED: &[Refused] = &[
    ("conversation", "what the provider has kept cannot be bounded: send the whole conversation as `input`"),
    (
        "previous_response_id",
        "what the provider has kept cannot be bounded: send the whole conversation as `input`",
    ),
    ("prompt", "prompts that the provider keeps cannot be bounded: send their text"),
    ("context_management", "compaction by the provider is not priced here: leave it out"),
    ("moderation", "moderation is not priced here: leave it out"),
];

impl<'a> ResponsesRequest<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Self, BadRequest> {
        let object = parse_body(body, INTERPRETED)?;
        let model: String = required(&object, "model")?;
        let stream = optional(&object, "stream", "must be true or false")?.unwrap_or(false);
        refuse_unpriced(&object)?;
        Ok(Self {
            model,
            stream,
            max_output_tokens: token_limit(&object, "max_output_tokens")?,
            prompt: measure(&object)?,
            object,
        })
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        if offer.reasoning == Reasoning::Reject && asks_to_reason(&self.object)? {
            let message = format!("reasoning is not supported for {}: leave it out", offer.id);
            return Err(unsupported("reasoning", message));
        }
        let completion = self.max_tokens_for(offer);
        if completion > offer.max_output_tokens {
            let message = format!(
                "max_output_tokens is {completion} and {} gives at most {}: ask for less",
                offer.id, offer.max_output_tokens
            );
            return Err(bad_value("max_output_tokens", message));
        }
        self.prompt.bounds(completion, offer, "input")
    }

    /// The largest `max_output_tokens` with which no more than `completion` tokens can come, if there
    /// is one.
    pub fn limit_within(&self, completion: u64) -> Option<u64> {
        (completion > 0).then_some(completion)
    }

    pub(super) fn max_tokens_for(&self, offer: &Offer) -> u64 {
        self.max_output_tokens.unwrap_or(DEFAULT_MAX_TOKENS.min(offer.max_output_tokens))
    }

    /// The body for an upstream of this format: the client's, but for the model's name there, the
    /// limit, which is always sent, and thoughts of other providers' models.
    pub fn upstream_body(&self, offer: &Offer) -> Bytes {
        let mut object = self.object.clone();
        object.set("model", quote(&offer.upstream_model));
        object.set("max_output_tokens", self.max_tokens_for(offer).to_string());
        if offer.reasoning == Reasoning::Strip {
            object.remove("reasoning");
        }
        if self.prompt.foreign_thoughts {
            let input = object.get("input").and_then(without_foreign_thoughts);
            input.into_iter().for_each(|input| object.set("input", input));
        }
        object.to_bytes().into()
    }

    pub(super) fn object(&self) -> &Object<'a> {
        &self.object
    }
}

/// Items without thoughts that this format's own provider has not sealed: it refuses them, and a
/// conversation that another model began could not go on. `None` if they cannot be read.
fn without_foreign_thoughts(input: &str) -> Option<String> {
    let items: Vec<&RawValue> = serde_json::from_str(input).ok()?;
    let is_own = |item: &&str| Object::parse(item.as_bytes()).is_ok_and(|item| !is_foreign(&item));
    Some(list(items.iter().map(|raw| raw.get()).filter(is_own)))
}

/// Whether an item is a thought that was sealed here.
fn is_foreign(item: &Object<'_>) -> bool {
    let sealed = item.get_non_null("encrypted_content");
    let sealed = sealed.and_then(|raw| serde_json::from_str::<Cow<'_, str>>(raw).ok());
    let marks = [GOOGLE, ANTHROPIC, ANTHROPIC_REDACTED, UNSEALED];
    sealed.is_some_and(|sealed| marks.iter().any(|mark| sealed.starts_with(mark)))
}

/// Whether `reasoning` asks for any: an effort of none asks for the opposite.
fn asks_to_reason(object: &Object<'_>) -> Result<bool, BadRequest> {
    let reasoning: Option<Object<'_>> = optional(object, "reasoning", "must be an object")?;
    let Some(reasoning) = reasoning else { return Ok(false) };
    Ok(reasoning.members().any(|(_, value)| value != "null") && reasoning.get("effort") != Some(r#""none""#))
}

fn refuse_unpriced(object: &Object<'_>) -> Result<(), BadRequest> {
    refuse_members(object, NOT_PRICED)?;
    if optional(object, "background", "must be true or false")?.unwrap_or(false) {
        return Err(unsupported(
            "background",
            "an answer can only be had while its request waits: leave it out",
        ));
    }
    let tier: Option<Cow<'_, str>> = optional(object, "service_tier", "must be a string")?;
    if tier.is_some_and(|tier| !matches!(tier.as_ref(), "auto" | "default")) {
        return Err(unsupported("service_tier", "only the default service tier is priced here"));
    }
    each_of(object, "tools", "must be a list of tools", |i, tool: Object<'_>| {
        if tool.ambiguous_key(&["type"]).is_none()
            && matches!(tool.get("type"), Some(r#""function""# | r#""custom""#))
        {
            return Ok(());
        }
        let message = "tools that the provider runs itself are not priced here: send functions only";
        Err(unsupported(&format!("tools[{i}].type"), message))
    })
}

fn measure(object: &Object<'_>) -> Result<Prompt, BadRequest> {
    let input = object.get_non_null("input").ok_or_else(|| missing("input"))?;
    let mut prompt = Prompt {
        toolsets: ["tools", "text"].iter().map(|key| u64::from(object.get_non_null(key).is_some())).sum(),
        // One for the instructions.
        messages: 2,
        ..Prompt::of_members(object, NOT_PROMPT, "input")
    };
    if input.starts_with('"') {
        prompt.text_bytes += length(input);
        return Ok(prompt);
    }
    let expected = "input must be a text or a list of at least one item";
    let list: Vec<&RawValue> = serde_json::from_str(input).map_err(|_| bad_value("input", expected))?;
    if list.is_empty() {
        return Err(bad_value("input", expected));
    }
    prompt.messages = length_of(&list).saturating_add(1);
    for (i, item) in list.into_iter().enumerate() {
        add_item(item.get(), &format!("input[{i}]"), &mut prompt)?;
    }
    Ok(prompt)
}

fn add_item(json: &str, at: &str, prompt: &mut Prompt) -> Result<(), BadRequest> {
    let item = part(json, at, &["type", "role", "content", "output", "id", "encrypted_content", "file_id"])?;
    match item.get_non_null("type") {
        None | Some(r#""message""#) => {
            add_content(item.get("content").unwrap_or("null"), &format!("{at}.content"), prompt)
        }
        Some(r#""function_call_output""# | r#""custom_tool_call_output""#) => {
            add_content(item.get("output").unwrap_or("null"), &format!("{at}.output"), prompt)
        }
        Some(r#""function_call""# | r#""custom_tool_call""#) => {
            prompt.text_bytes += length(json);
            Ok(())
        }
        // Thoughts are sealed, and what is sealed is no shorter than what it hides. Those that the
        // provider has kept are named by their id alone, and can be of any length.
        Some(r#""reasoning""#) if item.get_non_null("encrypted_content").is_some() => {
            prompt.text_bytes += length(json);
            prompt.foreign_thoughts |= is_foreign(&item);
            Ok(())
        }
        Some(r#""reasoning""#) => {
            prompt.parts_not_text += 1;
            Ok(())
        }
        Some(kind) => {
            let kind: String = kind.chars().take(100).collect();
            let message =
                format!("{kind}: what the provider keeps or has done itself cannot be bounded here");
            Err(unsupported(&format!("{at}.type"), message))
        }
    }
}

fn add_content(json: &str, at: &str, prompt: &mut Prompt) -> Result<(), BadRequest> {
    if json.starts_with('"') {
        prompt.text_bytes += length(json);
        return Ok(());
    }
    let parts: Vec<&RawValue> = serde_json::from_str(json)
        .map_err(|_| bad_value(at, format!("{at} must be a text or a list of parts")))?;
    for (i, raw) in parts.into_iter().enumerate() {
        let at = format!("{at}[{i}]");
        let part = part(raw.get(), &at, &["type", "text", "file_id"])?;
        // Files by id are the operator's, whoever names them.
        if part.get_non_null("file_id").is_some() {
            let message = "files that the provider keeps are not served here: send their content";
            return Err(unsupported(&format!("{at}.file_id"), message));
        }
        match part.get("type") {
            Some(r#""input_text""# | r#""output_text""# | r#""refusal""# | r#""text""#) => {
                prompt.text_bytes += length(raw.get());
            }
            _ => prompt.parts_not_text += 1,
        }
    }
    Ok(())
}

/// A whole answer from an upstream of this format.
pub struct Answer<'a> {
    object: Object<'a>,
}

impl<'a> Answer<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Self, NotAnAnswer> {
        let object = Object::parse(body).map_err(|_| NotAnAnswer::Nonsense)?;
        if object.get_non_null("error").is_some() || object.get("status") == Some(r#""failed""#) {
            return Err(NotAnAnswer::Error);
        }
        match object.get("output") {
            Some(output) if output.starts_with('[') => Ok(Self { object }),
            _ => Err(NotAnAnswer::Nonsense),
        }
    }

    pub fn usage_raw(&self) -> Option<&str> {
        self.object.get_non_null("usage")
    }

    /// Output tokens, where the answer does not say how many there were.
    pub fn estimated_completion(&self) -> u64 {
        let output = self.object.get("output").unwrap_or("[]");
        match serde_json::from_str::<Vec<Object<'_>>>(output) {
            Ok(items) => estimate_tokens(items.iter().map(item_bytes).sum()),
            // Not the shape we know, but output all the same.
            Err(_) => estimate_tokens(length(output)),
        }
    }

    /// The answer for the client: the model by the name it asked for, and what was charged.
    pub fn render(mut self, model: &str, charged: MicroUsdc) -> Bytes {
        finish(&mut self.object, &quote(model), Some(charged));
        self.object.to_bytes().into()
    }
}

fn finish(response: &mut Object<'_>, model_json: &str, charged: Option<MicroUsdc>) {
    if response.get("model").is_some() {
        response.set("model", model_json.to_owned());
    }
    let with_charge = |raw: &str| with_member(raw, "charged_usdc", &charged?.to_string());
    if let Some(usage) = response.get_non_null("usage").and_then(with_charge) {
        response.set("usage", usage);
    }
}

/// Bytes of output in an item: texts, summaries of thoughts, and of calls what the model wrote.
fn item_bytes(item: &Object<'_>) -> u64 {
    let own = ["name", "arguments", "input"].iter().map(|key| text_bytes(item, key)).sum::<u64>();
    let of_parts = |key: &str| {
        let parts = item.get_non_null(key).unwrap_or("[]");
        let parts: Vec<Object<'_>> = serde_json::from_str(parts).unwrap_or_default();
        let bytes = |part: &Object<'_>| text_bytes(part, "text").saturating_add(text_bytes(part, "refusal"));
        parts.iter().map(bytes).sum::<u64>()
    };
    own.saturating_add(of_parts("content")).saturating_add(of_parts("summary"))
}

/// Watches an answer stream past, event by event, for its usage and for how much was delivered.
pub struct StreamTap {
    model_json: String,
    usage_raw: Option<String>,
    delivered: Delivered,
    /// How many events there were.
    sequence: u64,
    /// The type of the event that ends the stream, and its data.
    last: Option<(&'static str, Bytes)>,
}

/// As much of an event as is looked at. Texts stay as they are: only their lengths are asked for.
#[derive(Deserialize)]
struct Piece<'a> {
    #[serde(borrow)]
    r#type: &'a RawValue,
    #[serde(borrow)]
    response: Option<Object<'a>>,
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    #[serde(borrow)]
    item: Option<Item<'a>>,
    sequence_number: Option<u64>,
}

#[derive(Deserialize)]
struct Item<'a> {
    #[serde(borrow)]
    name: Option<&'a RawValue>,
}

impl StreamTap {
    /// For a client that asked for `model` by this name.
    pub fn new(model: &str) -> Self {
        Self {
            model_json: quote(model),
            usage_raw: None,
            delivered: Delivered::default(),
            sequence: 0,
            last: None,
        }
    }

    /// Reads one event and says what the client gets of it: the very bytes, but for the model's name.
    pub fn event(&mut self, event: &Event) -> Forward {
        let Some(data) = event.data() else { return Forward::Send(event.0.clone()) };
        if data.trim_ascii() == b"[DONE]" {
            // Some say so after their last event, others nowhere.
            return if self.last.is_some() { Forward::Done } else { Forward::Nonsense };
        }
        let Ok(piece) = serde_json::from_slice::<Piece<'_>>(&data) else { return Forward::Nonsense };
        self.sequence = piece.sequence_number.map_or(self.sequence, |number| number.saturating_add(1));
        match piece.r#type.get() {
            r#""error""# | r#""response.failed""# | r#""response.cancelled""# => return Forward::Failed,
            r#""response.completed""# => return self.end("response.completed", &data, piece.response),
            r#""response.incomplete""# => return self.end("response.incomplete", &data, piece.response),
            r#""response.output_item.added""# => {
                let name = piece.item.and_then(|item| item.name);
                self.delivered.add(name.map_or(0, |name| length(name.get()).saturating_sub(2)));
            }
            _ => {}
        }
        if let Some(response) = piece.response {
            return match self.renamed(&data, response, None) {
                Some(renamed) => Forward::Send(with_name(event, &renamed)),
                None => Forward::Nonsense,
            };
        }
        self.delivered.add(piece.delta.map_or(0, |delta| length(delta.get()).saturating_sub(2)));
        Forward::Send(event.0.clone())
    }

    fn end(&mut self, name: &'static str, data: &[u8], response: Option<Object<'_>>) -> Forward {
        let Some(response) = response else { return Forward::Nonsense };
        self.usage_raw = response.get_non_null("usage").map(str::to_owned);
        self.last = Some((name, Bytes::copy_from_slice(data)));
        Forward::Done
    }

    /// The event with the model by the name that the client asked for.
    fn renamed(&self, data: &[u8], response: Object<'_>, charged: Option<MicroUsdc>) -> Option<Vec<u8>> {
        let mut object = Object::parse(data).ok()?;
        let mut response = response;
        finish(&mut response, &self.model_json, charged);
        object.set("response", String::from_utf8(response.to_bytes()).ok()?);
        Some(object.to_bytes())
    }

    /// What ends the stream, to be sent when it is settled, with what was charged. Nothing, if the
    /// upstream has not said how it ended.
    pub fn last(&self, charged: MicroUsdc) -> Bytes {
        let Some((name, data)) = &self.last else { return Bytes::new() };
        let response = Object::parse(data).ok();
        let response = response.as_ref().and_then(|object| object.get("response"));
        let renamed = response
            .and_then(|raw| Object::parse(raw.as_bytes()).ok())
            .and_then(|response| self.renamed(data, response, Some(charged)));
        Event::named(name, renamed.as_deref().unwrap_or(data))
    }

    /// The number that the next event has.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    pub fn usage_raw(&self) -> Option<&str> {
        self.usage_raw.as_deref()
    }

    /// Whether the report of usage is the last word, however the stream ends.
    pub fn is_reported_at_end(&self) -> bool {
        self.usage_raw.is_some()
    }

    pub fn delivered_anything(&self) -> bool {
        self.delivered.anything()
    }

    /// Whether the answer was whole, should the stream end now without saying so.
    pub fn is_finished(&self) -> bool {
        self.last.is_some()
    }

    /// Output tokens delivered so far.
    pub fn estimated_completion(&self) -> u64 {
        self.delivered.estimated_tokens()
    }
}

/// An event with other data, under the name it came with.
fn with_name(event: &Event, data: &[u8]) -> Bytes {
    match event.name() {
        Some(name) => Event::named(name, data),
        None => Event::from_data(data),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::chat::tests::offer as chat_offer;
    use crate::pricing::{Units, Usage};

    fn offer() -> Offer {
        Offer { reasoning: Reasoning::Allow, ..chat_offer() }
    }

    fn request(members: &str) -> String {
        format!(r#"{{"model":"p/m","input":"hi"{members}}}"#)
    }

    fn of_input(input: &str) -> String {
        format!(r#"{{"model":"p/m","input":{input}}}"#)
    }

    fn refused(body: &str, offer: &Offer) -> Option<String> {
        let error = match ResponsesRequest::parse(body.as_bytes()) {
            Err(error) => error,
            Ok(request) => request.bounds(offer).expect_err(body),
        };
        assert!(!error.message.is_empty());
        error.param
    }

    fn bounds(body: &str) -> Bounds {
        ResponsesRequest::parse(body.as_bytes()).unwrap().bounds(&offer()).unwrap()
    }

    #[test]
    fn what_cannot_be_priced_or_bounded_is_refused_by_name() {
        for (members, param) in [
            (r#","background":true"#, "background"),
            (r#","conversation":"c""#, "conversation"),
            (r#","Conversation":"c""#, "Conversation"),
            (r#","Models":["a"]"#, "Models"),
            (r#","enable_search":true"#, "enable_search"),
            (r#","previous_response_id":"r""#, "previous_response_id"),
            (r#","prompt":{"id":"p"}"#, "prompt"),
            (r#","context_management":[]"#, "context_management"),
            (r#","service_tier":"flex""#, "service_tier"),
            (r#","tools":[{"type":"web_search"}]"#, "tools[0].type"),
            (r#","tools":[{"type":"function","name":"f"},{"type":"mcp","server_url":"u"}]"#, "tools[1].type"),
            (r#","tools":[{"type":"function","Type":"code_interpreter"}]"#, "tools[0].type"),
            (r#","max_output_tokens":0"#, "max_output_tokens"),
            (r#","max_output_tokens":16385"#, "max_output_tokens"),
            (r#","Previous_response_id":"r""#, "Previous_response_id"),
            (r#","reasoning":7"#, "reasoning"),
        ] {
            let offer = Offer { reasoning: Reasoning::Reject, ..offer() };
            assert_eq!(refused(&request(members), &offer).as_deref(), Some(param), "{members}");
        }
        for (input, param) in [
            (r#"[{"type":"item_reference","id":"i"}]"#, "input[0].type"),
            (r#"[{"type":"compaction","encrypted_content":"e"}]"#, "input[0].type"),
            (r#"[{"type":"web_search_call","id":"i"}]"#, "input[0].type"),
            (
                r#"[{"role":"user","content":[{"type":"input_file","file_id":"f"}]}]"#,
                "input[0].content[0].file_id",
            ),
            (
                r#"[{"type":"function_call_output","output":[{"type":"input_image","file_id":"f"}]}]"#,
                "input[0].output[0].file_id",
            ),
            (r#"[{"role":"user","Content":"x"}]"#, "input[0]"),
            ("[]", "input"),
            ("7", "input"),
        ] {
            assert_eq!(refused(&of_input(input), &offer()).as_deref(), Some(param), "{input}");
        }
        assert_eq!(refused(r#"{"model":"m"}"#, &offer()).as_deref(), Some("input"));
        let reject = Offer { reasoning: Reasoning::Reject, ..offer() };
        let effort = request(r#","reasoning":{"effort":"low"}"#);
        assert_eq!(refused(&effort, &reject).as_deref(), Some("reasoning"));
        let none = request(r#","reasoning":{"effort":"none","summary":"auto"}"#);
        assert!(ResponsesRequest::parse(none.as_bytes()).unwrap().bounds(&reject).is_ok());
    }

    #[test]
    fn the_prompt_bound_counts_bytes_and_what_is_not_text_is_the_whole_context() {
        assert_eq!(
            bounds(&request("")),
            Bounds {
                prompt: 4 + 2 * 16 + 64,
                completion: 1024,
                estimated_prompt: 1,
                tokens: Units::OF_TEXT,
                others: Usage::NONE
            }
        );
        let sealed =
            format!(r#"[{{"type":"reasoning","summary":[],"encrypted_content":"{}"}}]"#, "x".repeat(5000));
        assert!((5000..6000).contains(&bounds(&of_input(&sealed)).prompt));
        let calls = r#"[{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},{"type":"function_call_output","call_id":"c","output":"x"}]"#;
        assert!(bounds(&of_input(calls)).prompt < 1000);
        for unseen in [
            r#"[{"type":"reasoning","id":"rs_1","summary":[]}]"#,
            r#"[{"role":"user","content":[{"type":"input_image","image_url":"u"}]}]"#,
            r#"[{"type":"function_call_output","call_id":"c","output":[{"type":"input_image","image_url":"u"}]}]"#,
            r#"[{"role":"user","content":[{"type":"input_te\u0078t","text":"x"}]}]"#,
        ] {
            assert_eq!(bounds(&of_input(unseen)).prompt, 128_000, "{unseen}");
        }
        let instructions = request(r#","instructions":"0123456789""#);
        assert!(bounds(&instructions).prompt >= bounds(&request("")).prompt + 12);
        let tools = request(r#","tools":[{"type":"function","name":"f","parameters":{}}]"#);
        assert!(bounds(&tools).prompt > 1024);
    }

    #[test]
    fn model_and_limit_change_and_nothing_else() {
        let body = request(r#","stream":true,"x":{"a":[1, 2.50]},"reasoning":{"effort":"low"}"#);
        let request = ResponsesRequest::parse(body.as_bytes()).unwrap();
        assert_eq!(
            request.upstream_body(&offer()),
            r#"{"model":"gpt-5-mini-2026","input":"hi","stream":true,"x":{"a":[1, 2.50]},"reasoning":{"effort":"low"},"max_output_tokens":1024}"#
        );
        let strip = Offer { reasoning: Reasoning::Strip, ..offer() };
        assert!(!request.upstream_body(&strip).windows(9).any(|bytes| bytes == b"reasoning"));
        assert_eq!((request.limit_within(0), request.limit_within(9)), (None, Some(9)));
    }

    #[test]
    fn thoughts_of_other_models_are_left_out() {
        let own = r#"{"type":"reasoning","summary":[ ],"encrypted_content":"gAAAA"}"#;
        let said = r#"{"role":"assistant", "content":"anthropic:"}"#;
        let foreign = |sealed: &str| format!(r#"{{"type":"reasoning","encrypted_content":"{sealed}"}}"#);
        let items = [
            foreign("anthropic:x"),
            own.to_owned(),
            foreign("google:x"),
            foreign("anthropic-redacted:x"),
            foreign("unsealed:"),
            said.to_owned(),
        ];
        let body = of_input(&list(items));
        let sent = ResponsesRequest::parse(body.as_bytes()).unwrap().upstream_body(&offer());
        let sent = String::from_utf8(sent.to_vec()).unwrap();
        assert!(sent.contains(&format!(r#""input":[{own},{said}],"#)), "{sent}");
    }

    #[test]
    fn an_answer_keeps_all_but_model_and_usage() {
        let body = br#"{"id":"r","object":"response","error":null,"model":"up","output":[{"type":"message","content":[{"type":"output_text","text":"12345678"}]}],"usage":{"input_tokens":1},"x":[1, 2]}"#;
        let answer = Answer::parse(body).unwrap();
        assert_eq!((answer.usage_raw(), answer.estimated_completion()), (Some(r#"{"input_tokens":1}"#), 2));
        assert_eq!(
            answer.render("p/m", MicroUsdc::new(11)),
            r#"{"id":"r","object":"response","error":null,"model":"p/m","output":[{"type":"message","content":[{"type":"output_text","text":"12345678"}]}],"usage":{"input_tokens":1,"charged_usdc":11},"x":[1, 2]}"#
        );
        assert_eq!(Answer::parse(br#"{"error":{"message":"no"}}"#).err(), Some(NotAnAnswer::Error));
        assert_eq!(Answer::parse(br#"{"status":"failed","output":[]}"#).err(), Some(NotAnAnswer::Error));
        assert_eq!(Answer::parse(b"{}").err(), Some(NotAnAnswer::Nonsense));
    }

    fn event(name: &str, members: &str) -> Event {
        Event(Event::named(name, format!(r#"{{"type":"{name}",{members}}}"#).as_bytes()))
    }

    #[test]
    fn a_stream_passes_as_it_is_and_its_end_is_held_back() {
        let mut tap = StreamTap::new("p/m");
        let created = |model: &str| {
            event(
                "response.created",
                &format!(r#""response":{{"model":"{model}","usage":null}},"sequence_number":0"#),
            )
        };
        assert_eq!(tap.event(&created("up")), Forward::Send(created("p/m").0));
        let delta = event(
            "response.output_text.delta",
            r#""delta":"12345678", "sequence_number":4,"obfuscation":"xxxxxxxx""#,
        );
        assert_eq!(tap.event(&delta), Forward::Send(delta.0.clone()));
        let call = event("response.output_item.added", r#""item":{"name":"weather"}"#);
        assert_eq!(tap.event(&call), Forward::Send(call.0.clone()));
        assert_eq!((tap.estimated_completion(), tap.sequence()), (4, 5));
        assert!(!tap.is_finished() && !tap.is_reported_at_end());
        assert!(tap.last(MicroUsdc::new(1)).is_empty());
        let end = |rest: &str| {
            event("response.incomplete", &format!(r#""response":{{{rest}}},"sequence_number":5"#))
        };
        assert_eq!(
            tap.event(&end(r#""model":"up","usage":{"input_tokens":3,"output_tokens":2}"#)),
            Forward::Done
        );
        assert!(tap.is_finished() && tap.is_reported_at_end());
        assert_eq!(tap.usage_raw(), Some(r#"{"input_tokens":3,"output_tokens":2}"#));
        assert_eq!(
            tap.last(MicroUsdc::new(11)),
            end(r#""model":"p/m","usage":{"input_tokens":3,"output_tokens":2,"charged_usdc":11}"#).0
        );
        assert_eq!(tap.event(&event("response.failed", r#""response":{}"#)), Forward::Failed);
        assert_eq!(tap.event(&event("error", r#""message":"x""#)), Forward::Failed);
        assert_eq!(tap.event(&Event(Event::from_data(b"{nonsense"))), Forward::Nonsense);
    }
}
