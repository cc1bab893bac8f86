//! The messages format (Anthropic API reference, *Create a Message*): what a request asks for and can
//! cost at most, and the few members that change on the way there and back.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::formats::answer::{Delivered, Forward, NotAnAnswer, text_bytes};
use crate::formats::conversation::{GOOGLE, UpstreamFormat};
use crate::formats::exchange::{COUNT_TOKENS_PATH, UpstreamRequest};
use crate::formats::json::{Object, ObjectText, each, length, length_of, list, quote, with_member};
use crate::formats::request::{
    BadRequest, Bounds, Prompt, Refused, bad, bad_value, each_of, estimate_tokens, missing, optional,
    parse_body, part, refuse_members, required, token_limit, unsupported,
};
use crate::formats::sse::Event;
use crate::money::MicroUsdc;
use crate::pricing::{Offer, Reasoning};

/// A messages request, parsed as far as its price needs.
pub struct MessagesRequest<'a> {
    object: Object<'a>,
    pub model: String,
    pub stream: bool,
    pub max_tokens: u64,
    prompt: Prompt,
}

/// Members that never become prompt; any other, known or not, is taken to.
const NOT_PROMPT: &[&str] = &[
    "model",
    "max_tokens",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "stop_sequences",
    "metadata",
    "service_tier",
    "cache_control",
    "diagnostics",
];

/// Members that are read here, and so must not mean something else to the upstream.
const INTERPRETED: &[&str] = &[
    "model",
    "messages",
    "system",
    "max_tokens",
    "stream",
    "tools",
    "thinking",
    "output_config",
    "service_tier",
    "context_management",
    "speed",
    "inference_geo",
];

/// Members that would buy something the catalogue has no price for, or escape the bounds.
const NOT_PRICED: &[Refused] = &[
    ("container", "containers are not priced here: leave it out"),
    ("mcp_servers", "servers that the provider calls are not priced here: leave it out"),
    ("compaction", "compaction by the provider is not priced here: leave it out"),
    ("fallback_credit_token", "other models are not priced here: leave it out"),
    ("thread", "what the provider has kept cannot be bounded: send the messages themselves"),
    ("billing_policy", "the provider's bill is the operator's: leave it out"),
    ("betas", "betas are the operator's to choose: leave it out"),
    ("anthropic_beta", "betas are the operator's to choose: leave it out"),
];

impl<'a> MessagesRequest<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Self, BadRequest> {
        let object = parse_body(body, INTERPRETED)?;
        let model: String = required(&object, "model")?;
        let max_tokens = token_limit(&object, "max_tokens")?.ok_or_else(|| missing("max_tokens"))?;
        let stream = optional(&object, "stream", "must be true or false")?.unwrap_or(false);
        let prompt = measure(&object)?;
        Ok(Self { model, stream, max_tokens, prompt, object })
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        refuse_reasoning(&self.object, offer)?;
        if self.max_tokens > offer.max_output_tokens {
            let message = format!(
                "max_tokens is {} and {} gives at most {}: ask for less",
                self.max_tokens, offer.id, offer.max_output_tokens
            );
            return Err(bad_value("max_tokens", message));
        }
        self.prompt.bounds(self.max_tokens, offer, "messages")
    }

    /// The largest `max_tokens` with which no more than `completion` tokens can come, if there is one.
    pub fn limit_within(&self, completion: u64) -> Option<u64> {
        (completion > 0).then_some(completion)
    }

    /// The body for an upstream of this format: the client's, but for the model's name there, and for
    /// thoughts of other providers' models.
    pub fn upstream_body(&self, offer: &Offer) -> Bytes {
        renamed(self.object.clone(), &self.prompt, offer)
    }

    pub(super) fn object(&self) -> &Object<'a> {
        &self.object
    }
}

/// A question of how many tokens a prompt has: `POST /v1/messages/count_tokens`.
pub struct CountTokens<'a> {
    object: Object<'a>,
    pub model: String,
    prompt: Prompt,
}

impl<'a> CountTokens<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Self, BadRequest> {
        let object = parse_body(body, INTERPRETED)?;
        Ok(Self { model: required(&object, "model")?, prompt: measure(&object)?, object })
    }

    /// What an upstream of this format is sent, which counts for nothing.
    pub fn to_upstream(&self, offer: &Offer) -> UpstreamRequest {
        UpstreamRequest {
            format: UpstreamFormat::Messages,
            path: COUNT_TOKENS_PATH.to_owned(),
            headers: Vec::new(),
            body: renamed(self.object.clone(), &self.prompt, offer),
        }
    }

    /// The answer where it does, if it is one.
    pub fn read(counted: &[u8]) -> Option<Bytes> {
        let tokens = serde_json::from_str(Object::parse(counted).ok()?.get("input_tokens")?).ok()?;
        Some(Self::answer(tokens))
    }

    fn answer(tokens: u64) -> Bytes {
        ObjectText::new().number("input_tokens", tokens).end().into()
    }

    /// The answer where the upstream does not count: about as many as there will be. Agents ask to
    /// know when to shorten a conversation, for which that does, and an error would stop them.
    pub fn estimate(&self, offer: &Offer) -> Bytes {
        let tokens = self.prompt.estimate().min(offer.context_length).max(1);
        Self::answer(tokens)
    }
}

/// The header by which a client asks for what is not in the API yet.
pub const BETA_HEADER: &str = "anthropic-beta";
/// What may be asked for so: what costs nothing that is not held for and charged. Claude Code does not work without some.
const PASSED_BETAS: &[&str] = &[
    "claude-code-",
    "computer-use-",
    "context-management-",
    "effort-",
    "extended-cache-ttl-",
    "fine-grained-tool-streaming-",
    "interleaved-thinking-",
    "model-context-window-exceeded-",
    "output-128k-",
    "pdfs-",
    "prompt-caching-",
    "structured-outputs-",
    "token-counting-",
    "token-efficient-tools-",
];
/// A long context costs more, and is for models that are sold with one.
const LONG_CONTEXT: (&str, u64) = ("context-1m-", 200_000);

/// Those of a header's that go on to the upstream.
pub fn passed_betas(header: &str, context_length: u64) -> Option<String> {
    let is_passed = |beta: &&str| {
        PASSED_BETAS.iter().any(|known| beta.starts_with(known))
            || (beta.starts_with(LONG_CONTEXT.0) && context_length > LONG_CONTEXT.1)
    };
    let passed: Vec<_> = header.split(',').map(str::trim).filter(is_passed).collect();
    (!passed.is_empty()).then(|| passed.join(","))
}

fn renamed(mut object: Object<'_>, prompt: &Prompt, offer: &Offer) -> Bytes {
    object.set("model", quote(&offer.upstream_model));
    if prompt.foreign_thoughts {
        let messages = object.get("messages").and_then(without_foreign_thoughts);
        messages.into_iter().for_each(|messages| object.set("messages", messages));
    }
    if offer.reasoning == Reasoning::Strip {
        object.remove("thinking");
        strip_effort(&mut object);
    }
    object.to_bytes().into()
}

/// Messages without thoughts that this format's own provider has not signed: it refuses them, and a
/// conversation that another model began could not go on. `None` if they cannot be read.
fn without_foreign_thoughts(messages: &str) -> Option<String> {
    let messages: Vec<Object<'_>> = serde_json::from_str(messages).ok()?;
    let mut kept = Vec::new();
    for mut message in messages {
        if let Some(content) = message.get("content").filter(|content| content.starts_with('[')) {
            let blocks: Vec<&RawValue> = serde_json::from_str(content).ok()?;
            let own: Vec<&str> = blocks.iter().map(|raw| raw.get()).filter(|raw| !is_foreign(raw)).collect();
            if own.is_empty() && !blocks.is_empty() {
                continue;
            }
            let content = list(own);
            message.set("content", content);
        }
        kept.push(String::from_utf8(message.to_bytes()).ok()?);
    }
    Some(list(kept))
}

/// Whether a block is a thought that was signed by nobody, or by Google.
fn is_foreign(block: &str) -> bool {
    let Ok(block) = Object::parse(block.as_bytes()) else { return false };
    if block.get("type") != Some(r#""thinking""#) {
        return false;
    }
    let signature = block.get("signature").and_then(|raw| serde_json::from_str::<String>(raw).ok());
    signature.is_some_and(|signature| signature.is_empty() || signature.starts_with(GOOGLE))
}

fn strip_effort(object: &mut Object<'_>) {
    let Some(raw) = object.get_non_null("output_config") else { return };
    let Ok(mut config) = Object::parse(raw.as_bytes()) else { return };
    config.remove("effort");
    // It came out of a string, so it is one.
    let stripped = String::from_utf8(config.to_bytes()).ok().filter(|text| text != "{}");
    match stripped {
        Some(config) => object.set("output_config", config),
        None => object.remove("output_config"),
    }
}

fn refuse_reasoning(object: &Object<'_>, offer: &Offer) -> Result<(), BadRequest> {
    if offer.reasoning != Reasoning::Reject {
        return Ok(());
    }
    let refused = |field: &str| {
        Err(unsupported(field, format!("{field} is not supported for {}: leave it out", offer.id)))
    };
    let thinking: Option<Object<'_>> = optional(object, "thinking", "must be an object")?;
    if thinking.is_some_and(|thinking| thinking.get("type") != Some(r#""disabled""#)) {
        return refused("thinking");
    }
    let config: Option<Object<'_>> = optional(object, "output_config", "must be an object")?;
    if config.is_some_and(|config| config.get_non_null("effort").is_some()) {
        return refused("output_config.effort");
    }
    Ok(())
}

fn measure(object: &Object<'_>) -> Result<Prompt, BadRequest> {
    refuse_unpriced(object)?;
    let messages = object.get_non_null("messages").ok_or_else(|| missing("messages"))?;
    let expected = "messages must be a list of at least one message";
    let list: Vec<&RawValue> = serde_json::from_str(messages).map_err(|_| bad_value("messages", expected))?;
    if list.is_empty() {
        return Err(bad_value("messages", expected));
    }
    let mut prompt = Prompt {
        messages: length_of(&list).saturating_add(1),
        toolsets: toolsets(object)?.saturating_add(schemas(object)),
        ..Prompt::of_members(object, NOT_PROMPT, "messages")
    };
    if let Some(system) = object.get_non_null("system") {
        // Its bytes are counted with the members; here it is seen that it is nothing but text.
        let mut apart = Prompt::default();
        add_content(system, "system", true, &mut apart)?;
        prompt.parts_not_text += apart.parts_not_text;
    }
    for (i, message) in list.into_iter().enumerate() {
        let at = format!("messages[{i}]");
        let message = part(message.get(), &at, &["role", "content"])?;
        let content = message.get("content").unwrap_or("null");
        add_content(content, &format!("{at}.content"), true, &mut prompt)?;
    }
    Ok(prompt)
}

/// Counts a text or a list of blocks; in a tool's result, which is a block, there are none within.
fn add_content(json: &str, at: &str, may_nest: bool, prompt: &mut Prompt) -> Result<(), BadRequest> {
    if json.starts_with('"') {
        prompt.text_bytes += length(json);
        return Ok(());
    }
    let blocks: Vec<&RawValue> = serde_json::from_str(json)
        .map_err(|_| bad_value(at, format!("{at} must be a text or a list of blocks")))?;
    for (i, block) in blocks.into_iter().enumerate() {
        add_block(block.get(), &format!("{at}[{i}]"), may_nest, prompt)?;
    }
    Ok(())
}

fn add_block(json: &str, at: &str, may_nest: bool, prompt: &mut Prompt) -> Result<(), BadRequest> {
    let block = part(json, at, &["type", "text", "source", "content", "file_id"])?;
    match block.get("type").unwrap_or_default() {
        // Thoughts are sealed, and what is sealed is no shorter than what it hides.
        r#""text""# | r#""tool_use""# | r#""thinking""# | r#""redacted_thinking""# => {
            prompt.text_bytes += length(json);
            prompt.foreign_thoughts |= is_foreign(json);
            Ok(())
        }
        r#""tool_result""# if may_nest => match block.get_non_null("content") {
            Some(content) => add_content(content, &format!("{at}.content"), false, prompt),
            None => Ok(()),
        },
        _ => {
            refuse_files(&block, at)?;
            // A search result's source is a text.
            if let Some(source) = block.get("source").filter(|source| source.starts_with('{')) {
                let at = format!("{at}.source");
                let source = part(source, &at, &["type", "file_id", "content"])?;
                refuse_files(&source, &at)?;
                if let Some(content) = source.get_non_null("content").filter(|_| may_nest) {
                    add_content(content, &format!("{at}.content"), false, prompt)?;
                }
            }
            prompt.parts_not_text += 1;
            Ok(())
        }
    }
}

/// Files by id are the operator's, whoever names them.
fn refuse_files(object: &Object<'_>, at: &str) -> Result<(), BadRequest> {
    match object.get_non_null("file_id") {
        None => Ok(()),
        Some(_) => {
            let message = "files that the provider keeps are not served here: send their content";
            Err(unsupported(&format!("{at}.file_id"), message))
        }
    }
}

/// Whether a schema is asked to be held to, in either of its places.
fn schemas(object: &Object<'_>) -> u64 {
    u64::from(["output_config", "output_format"].iter().any(|key| object.get_non_null(key).is_some()))
}

/// Tools of Anthropic's that the client runs itself: they cost no more than their description.
const CLIENTS_OWN: &[&str] = &["bash_", "text_editor_", "memory_"];

/// Sees that no tool is run by the provider, and counts the descriptions that are its own.
fn toolsets(object: &Object<'_>) -> Result<u64, BadRequest> {
    let mut toolsets = u64::from(object.get_non_null("tools").is_some());
    each_of(object, "tools", "must be a list of tools", |i, tool: Object<'_>| {
        let at = format!("tools[{i}]");
        if tool.ambiguous_key(&["type"]).is_some() {
            return Err(bad_value(
                &at,
                format!("{at} must hold each member once, spelt as the API spells it"),
            ));
        }
        let kind: Option<String> = optional(&tool, "type", "must be a string")?;
        match kind.as_deref() {
            None | Some("custom") => {}
            Some(kind) if CLIENTS_OWN.iter().any(|own| kind.starts_with(own)) => toolsets += 1,
            Some(kind) => {
                let kind: String = kind.chars().take(100).collect();
                let message = format!(
                    "{kind}: tools that the provider runs itself are not priced here: send tools of your own only"
                );
                return Err(bad("unsupported_parameter", &format!("{at}.type"), message));
            }
        }
        Ok(())
    })?;
    Ok(toolsets)
}

fn refuse_unpriced(object: &Object<'_>) -> Result<(), BadRequest> {
    refuse_members(object, NOT_PRICED)?;
    let word = |key: &str| optional::<String>(object, key, "must be a string");
    if word("service_tier")?.is_some_and(|tier| !matches!(tier.as_str(), "auto" | "standard_only")) {
        return Err(unsupported("service_tier", "only the default service tier is priced here"));
    }
    if word("speed")?.is_some_and(|speed| speed != "standard") {
        return Err(unsupported("speed", "only the standard speed is priced here"));
    }
    if word("inference_geo")?.is_some_and(|geo| geo != "global") {
        return Err(unsupported("inference_geo", "where inference runs is not priced here: leave it out"));
    }
    let management: Option<Object<'_>> = optional(object, "context_management", "must be an object")?;
    let edits = management.as_ref().and_then(|management| management.get_non_null("edits"));
    // What clears away makes a prompt shorter; what compacts it is another answer, unpriced.
    let mut do_clear = true;
    let read = each(edits.unwrap_or("[]"), |edit: Object<'_>| {
        do_clear &= edit.ambiguous_key(&["type"]).is_none()
            && edit.get("type").is_some_and(|kind| kind.starts_with(r#""clear_"#));
    });
    read.map_err(|_| bad_value("context_management", "context_management.edits must be a list"))?;
    if !do_clear {
        let message = "only edits that clear are priced here: leave the others out";
        return Err(unsupported("context_management", message));
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
        match (object.get("type"), object.get("content")) {
            (Some(r#""error""#), _) => Err(NotAnAnswer::Error),
            (Some(r#""message""#), Some(content)) if content.starts_with('[') => Ok(Self { object }),
            _ => Err(NotAnAnswer::Nonsense),
        }
    }

    pub fn usage_raw(&self) -> Option<&str> {
        self.object.get_non_null("usage")
    }

    /// Output tokens, where the answer does not say how many there were.
    pub fn estimated_completion(&self) -> u64 {
        let content = self.object.get("content").unwrap_or("[]");
        match serde_json::from_str::<Vec<Object<'_>>>(content) {
            Ok(blocks) => estimate_tokens(blocks.iter().map(block_bytes).sum()),
            // Not the shape we know, but output all the same.
            Err(_) => estimate_tokens(length(content)),
        }
    }

    /// The answer for the client: the model by the name it asked for, and what was charged.
    pub fn render(mut self, model: &str, charged: MicroUsdc) -> Bytes {
        self.object.set("model", quote(model));
        let usage = self.usage_raw().and_then(|raw| with_member(raw, "charged_usdc", &charged.to_string()));
        if let Some(usage) = usage {
            self.object.set("usage", usage);
        }
        self.object.to_bytes().into()
    }
}

/// Bytes of output in a block: texts, thoughts, and of calls what the model wrote.
fn block_bytes(block: &Object<'_>) -> u64 {
    let input = block.get_non_null("input").map_or(0, length);
    ["text", "thinking", "name"].iter().map(|key| text_bytes(block, key)).sum::<u64>().saturating_add(input)
}

/// Watches an answer stream past, event by event, for its usage and for how much was delivered.
pub struct StreamTap {
    model_json: String,
    usage: Usage,
    /// Whether the closing report of usage has come.
    reported_at_end: bool,
    has_stopped: bool,
    delivered: Delivered,
    /// Why the answer ended, held back with what follows.
    ending: Option<Bytes>,
}

/// Usage as it comes in a stream: the prompt's at the beginning, the output's at the end, and of a
/// member that comes in both the later.
#[derive(Default)]
pub(super) struct Usage(Option<String>);

impl Usage {
    pub(super) fn merge(&mut self, report: &str) {
        let Ok(report) = Object::parse(report.as_bytes()) else { return };
        let earlier = self.0.take().unwrap_or_else(|| "{}".to_owned());
        let Ok(mut merged) = Object::parse(earlier.as_bytes()) else { return };
        for (key, value) in report.members() {
            if value != "null" || merged.get(key).is_none() {
                merged.set(key, value.to_owned());
            }
        }
        self.0 = String::from_utf8(merged.to_bytes()).ok();
    }

    pub(super) fn raw(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

/// As much of an event as is looked at.
#[derive(Deserialize)]
struct Piece<'a> {
    #[serde(borrow)]
    r#type: &'a RawValue,
    #[serde(borrow)]
    message: Option<Object<'a>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    content_block: Option<Delta<'a>>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

/// A block, or more of one. Texts stay as they are: only their lengths are asked for.
#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    thinking: Option<&'a RawValue>,
    #[serde(borrow)]
    partial_json: Option<&'a RawValue>,
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    stop_reason: Option<&'a RawValue>,
}

impl Delta<'_> {
    fn output_bytes(&self) -> u64 {
        let texts = [self.text, self.thinking, self.partial_json, self.name];
        texts.iter().flatten().map(|text| length(text.get()).saturating_sub(2)).sum()
    }
}

impl StreamTap {
    /// For a client that asked for `model` by this name.
    pub fn new(model: &str) -> Self {
        Self {
            model_json: quote(model),
            usage: Usage::default(),
            reported_at_end: false,
            has_stopped: false,
            delivered: Delivered::default(),
            ending: None,
        }
    }

    /// Reads one event and says what the client gets of it: the very bytes, but for the model's name.
    pub fn event(&mut self, event: &Event) -> Forward {
        let Some(data) = event.data() else { return Forward::Send(event.0.clone()) };
        let Ok(piece) = serde_json::from_slice::<Piece<'_>>(&data) else { return Forward::Nonsense };
        match piece.r#type.get() {
            r#""error""# => return Forward::Failed,
            r#""message_stop""# => return Forward::Done,
            r#""message_start""# => return self.start(&data, piece.message),
            r#""message_delta""# => {
                if let Some(usage) = piece.usage {
                    self.usage.merge(usage.get());
                    self.reported_at_end = true;
                }
                self.has_stopped |= piece.delta.is_some_and(|delta| delta.stop_reason.is_some());
                // Should another come, the first was not the last.
                let earlier = self.ending.replace(event.0.clone());
                return earlier.map_or(Forward::Skip, Forward::Send);
            }
            _ => {
                let parts = [piece.delta, piece.content_block];
                self.delivered.add(parts.iter().flatten().map(Delta::output_bytes).sum());
            }
        }
        Forward::Send(event.0.clone())
    }

    fn start(&mut self, data: &[u8], message: Option<Object<'_>>) -> Forward {
        let (Some(mut message), Ok(mut object)) = (message, Object::parse(data)) else {
            return Forward::Nonsense;
        };
        if let Some(usage) = message.get_non_null("usage") {
            self.usage.merge(usage);
        }
        message.set("model", self.model_json.as_str());
        let Ok(message) = String::from_utf8(message.to_bytes()) else { return Forward::Nonsense };
        object.set("message", message);
        Forward::Send(Event::named("message_start", &object.to_bytes()))
    }

    /// What ends the stream, to be sent when it is settled, with what was charged.
    pub fn last(&self, charged: MicroUsdc) -> Bytes {
        let mut last = Vec::new();
        if let Some(ending) = &self.ending {
            let event = Event(ending.clone());
            let data = event.data().and_then(|data| with_charge(&data, charged));
            last.extend_from_slice(&data.map_or(ending.clone(), |data| Event::named("message_delta", &data)));
        }
        last.extend_from_slice(&Event::named("message_stop", br#"{"type":"message_stop"}"#));
        last.into()
    }

    pub fn usage_raw(&self) -> Option<&str> {
        self.usage.raw()
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
        self.has_stopped
    }

    /// Output tokens delivered so far.
    pub fn estimated_completion(&self) -> u64 {
        self.delivered.estimated_tokens()
    }
}

/// An event's data with what was charged among its usage.
fn with_charge(data: &[u8], charged: MicroUsdc) -> Option<Vec<u8>> {
    let mut object = Object::parse(data).ok()?;
    let usage = with_member(object.get_non_null("usage")?, "charged_usdc", &charged.to_string())?;
    object.set("usage", usage);
    Some(object.to_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::chat::tests::offer as chat_offer;

    fn offer() -> Offer {
        Offer { reasoning: Reasoning::Allow, ..chat_offer() }
    }

    fn request(members: &str) -> String {
        format!(
            r#"{{"model":"p/m","max_tokens":100,"messages":[{{"role":"user","content":"hi"}}]{members}}}"#
        )
    }

    fn of_content(content: &str) -> String {
        format!(r#"{{"model":"p/m","max_tokens":100,"messages":[{{"role":"user","content":{content}}}]}}"#)
    }

    fn refused(body: &str, offer: &Offer) -> Option<String> {
        let error = match MessagesRequest::parse(body.as_bytes()) {
            Err(error) => error,
            Ok(request) => request.bounds(offer).expect_err(body),
        };
        assert!(!error.message.is_empty());
        error.param
    }

    fn bounds(body: &str) -> Bounds {
        MessagesRequest::parse(body.as_bytes()).unwrap().bounds(&offer()).unwrap()
    }

    #[test]
    fn what_cannot_be_priced_or_bounded_is_refused_by_name() {
        for (members, param) in [
            (r#","container":"c""#, "container"),
            (r#","mcp_servers":[]"#, "mcp_servers"),
            (r#","compaction":{}"#, "compaction"),
            (r#","fallbacks":["a"]"#, "fallbacks"),
            (r#","Fallbacks":["a"]"#, "Fallbacks"),
            (r#","Container":"c""#, "Container"),
            (r#","plugins":[]"#, "plugins"),
            (r#","Max_Tokens":9"#, "Max_Tokens"),
            (r#","thread":{}"#, "thread"),
            (r#","betas":["x"]"#, "betas"),
            (r#","speed":"fast""#, "speed"),
            (r#","inference_geo":"us""#, "inference_geo"),
            (r#","service_tier":"priority""#, "service_tier"),
            (r#","context_management":{"edits":[{"type":"compact_20260112"}]}"#, "context_management"),
            (r#","tools":[{"type":"web_search_20250305","name":"web_search"}]"#, "tools[0].type"),
            (r#","tools":[{"name":"a","input_schema":{}},{"type":"mcp_toolset"}]"#, "tools[1].type"),
            (r#","tools":[{"type":"computer_20250124","name":"computer"}]"#, "tools[0].type"),
            (r#","tools":[{"type":"custom","Type":"code_execution_20250825"}]"#, "tools[0]"),
            (r#","Max_Tokens":100000"#, "Max_Tokens"),
            (r#","max_tokens":1"#, "max_tokens"),
            (r#","stream":"yes""#, "stream"),
            (r#","system":7"#, "system"),
        ] {
            assert_eq!(refused(&request(members), &offer()).as_deref(), Some(param), "{members}");
        }
        for (content, param) in [
            (
                r#"[{"type":"image","source":{"type":"file","file_id":"f"}}]"#,
                "messages[0].content[0].source.file_id",
            ),
            (
                r#"[{"type":"image","source":{"type":"url","url":"u","File_id":"f"}}]"#,
                "messages[0].content[0].source",
            ),
            (r#"[{"type":"container_upload","file_id":"f"}]"#, "messages[0].content[0].file_id"),
            (
                r#"[{"type":"document","source":{"type":"content","content":[{"type":"image","source":{"file_id":"f"}}]}}]"#,
                "messages[0].content[0].source.content[0].source.file_id",
            ),
            (
                r#"[{"type":"tool_result","tool_use_id":"t","content":[{"type":"image","source":{"file_id":"f"}}]}]"#,
                "messages[0].content[0].content[0].source.file_id",
            ),
            (r#"[{"type":"text","Type":"image"}]"#, "messages[0].content[0]"),
            ("7", "messages[0].content"),
        ] {
            assert_eq!(refused(&of_content(content), &offer()).as_deref(), Some(param), "{content}");
        }
        assert_eq!(refused("{}", &offer()).as_deref(), Some("model"));
        assert_eq!(refused(r#"{"model":"m"}"#, &offer()).as_deref(), Some("max_tokens"));
        assert_eq!(refused(r#"{"model":"m","max_tokens":0}"#, &offer()).as_deref(), Some("max_tokens"));
        let much = request("").replace("100", "16385");
        assert_eq!(refused(&much, &offer()).as_deref(), Some("max_tokens"));
    }

    #[test]
    fn reasoning_is_refused_stripped_or_let_through() {
        let asks = request(
            r#","thinking":{"type":"enabled","budget_tokens":2000},"output_config":{"effort":"high","format":{"type":"json_schema","schema":{}}}"#,
        );
        let effort = request(r#","output_config":{"effort":"low"}"#);
        let off = request(r#","thinking":{"type":"disabled"}"#);
        let reject = Offer { reasoning: Reasoning::Reject, ..offer() };
        assert_eq!(refused(&asks, &reject).as_deref(), Some("thinking"));
        assert_eq!(refused(&effort, &reject).as_deref(), Some("output_config.effort"));
        assert!(MessagesRequest::parse(off.as_bytes()).unwrap().bounds(&reject).is_ok());
        let strip = Offer { reasoning: Reasoning::Strip, ..offer() };
        let sent = |body: &str, offer: &Offer| {
            let request = MessagesRequest::parse(body.as_bytes()).unwrap();
            String::from_utf8(request.upstream_body(offer).to_vec()).unwrap()
        };
        assert!(
            sent(&asks, &strip)
                .ends_with(r#""output_config":{"format":{"type":"json_schema","schema":{}}}}"#)
        );
        assert!(!sent(&asks, &strip).contains("thinking"));
        assert!(!sent(&effort, &strip).contains("output_config"));
        assert_eq!(sent(&asks, &offer()), asks.replace("p/m", "gpt-5-mini-2026"));
    }

    #[test]
    fn the_prompt_bound_counts_bytes_and_what_is_not_text_is_the_whole_context() {
        let messages = r#"[{"role":"user","content":"hi"}]"#;
        assert_eq!(bounds(&request("")).prompt, u64::try_from(messages.len()).unwrap() + 2 * 16 + 64);
        assert_eq!(bounds(&request("")).completion, 100);
        let thought = format!(r#"[{{"type":"redacted_thinking","data":"{}"}}]"#, "x".repeat(5000));
        let bound = bounds(&of_content(&thought)).prompt;
        assert!((5000..6000).contains(&bound), "{bound}");
        let result = r#"[{"type":"tool_result","tool_use_id":"t","content":[{"type":"text","text":"x"}]}]"#;
        assert!(bounds(&of_content(result)).prompt < 1000);
        for picture in [
            r#"[{"type":"image","source":{"type":"url","url":"u"}}]"#,
            r#"[{"type":"tool_result","tool_use_id":"t","content":[{"type":"image","source":{"type":"url","url":"u"}}]}]"#,
            r#"[{"type":"document","source":{"type":"base64","data":"x"}}]"#,
            r#"[{"type":"te\u0078t","text":"x"}]"#,
        ] {
            assert_eq!(bounds(&of_content(picture)).prompt, 128_000, "{picture}");
        }
        let picture = request(r#","system":[{"type":"image","source":{"type":"url","url":"u"}}]"#);
        assert_eq!(bounds(&picture).prompt, 128_000);
        let tools = |tools: &str| bounds(&request(&format!(r#","tools":[{tools}]"#))).prompt;
        let bash = r#"{"type":"bash_20250124","name":"bash"}"#;
        let own = r#"{"name":"f","input_schema":{}}"#;
        assert!(tools(own) > bounds(&request("")).prompt + 1024);
        assert!(tools(&format!("{bash},{own}")) > tools(own) + 1024);
        assert!(bounds(&request(r#","unknown":"0123456789""#)).prompt >= bounds(&request("")).prompt + 10);
    }

    #[test]
    fn a_count_is_asked_for_or_estimated() {
        let body = br#"{"model":"p/m","messages":[{"role":"user","content":"twelve bytes"}],"tools":[]}"#;
        let count = CountTokens::parse(body).unwrap();
        assert_eq!(
            count.to_upstream(&offer()).body,
            r#"{"model":"gpt-5-mini-2026","messages":[{"role":"user","content":"twelve bytes"}],"tools":[]}"#
        );
        assert_eq!(count.estimate(&offer()), r#"{"input_tokens":4}"#);
        assert!(CountTokens::parse(br#"{"model":"p/m"}"#).is_err());
    }

    #[test]
    fn thoughts_of_other_models_are_left_out() {
        let own = r#"{"type":"thinking", "thinking":"t","signature":"s"}"#;
        let call = r#"{"type":"tool_use","id":"c","name":"f","input":{"a": 1.0}}"#;
        let foreign =
            |signature: &str| format!(r#"{{"type":"thinking","thinking":"t","signature":"{signature}"}}"#);
        let asked = r#"{"role":"user","content":"hi"}"#;
        let said = |blocks: &[&str]| format!(r#"{{"role":"assistant","content":{}}}"#, list(blocks));
        let body = |messages: &[&str]| {
            format!(r#"{{"model":"gpt-5-mini-2026","max_tokens":9,"messages":{}}}"#, list(messages))
        };
        let sent = |body: &str| {
            let request = MessagesRequest::parse(body.as_bytes()).unwrap();
            String::from_utf8(request.upstream_body(&offer()).to_vec()).unwrap()
        };
        let (nobody, google) = (foreign(""), foreign("google:x"));
        assert_eq!(
            sent(&body(&[asked, &said(&[&nobody, own, &google, call]), &said(&[&nobody]), asked])),
            body(&[asked, &said(&[own, call]), asked])
        );
        let untouched = body(&[asked, &said(&[own, call])]);
        assert_eq!(sent(&untouched), untouched);
    }

    #[test]
    fn an_answer_keeps_all_but_model_and_usage() {
        let body = br#"{"id":"m","type":"message","model":"up","content":[{"type":"text","text":"12345678"}],"usage":{"input_tokens":1},"x":[1, 2]}"#;
        let answer = Answer::parse(body).unwrap();
        assert_eq!((answer.usage_raw(), answer.estimated_completion()), (Some(r#"{"input_tokens":1}"#), 2));
        assert_eq!(
            answer.render("p/m", MicroUsdc::new(11)),
            r#"{"id":"m","type":"message","model":"p/m","content":[{"type":"text","text":"12345678"}],"usage":{"input_tokens":1,"charged_usdc":11},"x":[1, 2]}"#
        );
        assert_eq!(Answer::parse(br#"{"type":"error","error":{}}"#).err(), Some(NotAnAnswer::Error));
        for nonsense in [&b"<html>"[..], b"{}", br#"{"type":"message"}"#, b"[]"] {
            assert_eq!(Answer::parse(nonsense).err(), Some(NotAnAnswer::Nonsense));
        }
    }

    fn event(name: &str, members: &str) -> Event {
        Event(Event::named(name, format!(r#"{{"type":"{name}",{members}}}"#).as_bytes()))
    }

    #[test]
    fn a_stream_passes_as_it_is_and_its_end_is_held_back() {
        let mut tap = StreamTap::new("p/m");
        let start = event(
            "message_start",
            r#""message":{"model":"up","usage":{"input_tokens":3,"output_tokens":1}}"#,
        );
        let Forward::Send(sent) = tap.event(&start) else { panic!("not sent") };
        assert_eq!(
            sent,
            event(
                "message_start",
                r#""message":{"model":"p/m","usage":{"input_tokens":3,"output_tokens":1}}"#
            )
            .0
        );
        assert!(!tap.is_reported_at_end() && !tap.delivered_anything());
        for members in [
            r#""index":0,"delta":{"type":"text_delta","text":"1234"}"#,
            r#""index":0, "delta":{"type":"thinking_delta","thinking":"12\n"}"#,
            r#""index":1,"delta":{"type":"input_json_delta","partial_json":"{}"}"#,
        ] {
            let delta = event("content_block_delta", members);
            assert_eq!(tap.event(&delta), Forward::Send(delta.0.clone()));
        }
        assert_eq!(tap.estimated_completion(), 3);
        assert!(tap.delivered_anything() && !tap.is_finished());
        let end = event(
            "message_delta",
            r#""delta":{"stop_reason":"end_turn"},"usage":{"input_tokens":null,"output_tokens":7}"#,
        );
        assert_eq!(tap.event(&end), Forward::Skip);
        assert_eq!(tap.usage_raw(), Some(r#"{"input_tokens":3,"output_tokens":7}"#));
        assert!(tap.is_reported_at_end() && tap.is_finished());
        assert_eq!(
            tap.event(&Event(Event::named("message_stop", br#"{"type":"message_stop"}"#))),
            Forward::Done
        );
        let last = String::from_utf8(tap.last(MicroUsdc::new(11)).to_vec()).unwrap();
        assert_eq!(
            last,
            "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\
             \"usage\":{\"input_tokens\":null,\"output_tokens\":7,\"charged_usdc\":11}}\n\n\
             event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
        );
        assert_eq!(tap.event(&event("error", r#""error":{}"#)), Forward::Failed);
        assert_eq!(tap.event(&Event(Event::from_data(b"{nonsense"))), Forward::Nonsense);
    }
}
