//! Chat completions requests (OpenAI API reference, *Create chat completion*), read and written.

use crate::formats::chat::ChatRequest;
use crate::formats::conversation::{
    Call, Conversation, Effort, Format, Media, MediaKind, Names, Part, Reasoning, Role, Sampling, Source,
    Thinking, Tool, ToolChoice, ToolResult, Turn, push_part,
};
use crate::formats::json::{ObjectText, list, quote};
use crate::formats::members::Members;
use crate::formats::request::{BadRequest, bad_value, unsupported};
use crate::formats::translate::{HARMLESS, join_texts, no_place_for, refuse_kind};
use crate::pricing::{Offer, Reasoning as Policy};

pub(super) const NAMES: Names = Names {
    turns: "messages",
    one_call: "parallel_tool_calls",
    format: "response_format",
    reasoning: "reasoning_effort",
    verbosity: "verbosity",
    max_tokens: "max_tokens",
};

const KNOWN: &[&str] = &[
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "response_format",
    "verbosity",
    "reasoning_effort",
    "thinking",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "store",
    "modalities",
    "service_tier",
];

/// Reads a request that its parser has found priceable.
pub fn read(request: &ChatRequest<'_>, offer: &Offer) -> Result<Conversation, BadRequest> {
    let body = Members::of(request.object().clone());
    body.only(KNOWN, HARMLESS)?;
    body.nothing_but("n", &["1"])?;
    body.nothing_but("logprobs", &["false"])?;
    body.nothing_but("top_logprobs", &["0"])?;
    body.nothing_but("logit_bias", &["{}"])?;
    body.nothing_but("store", &["false"])?;
    let (mut system, mut turns) = (Vec::new(), Vec::new());
    for message in body.objects("messages")? {
        read_message(&message, &mut system, &mut turns)?;
    }
    let parallel = body.flag("parallel_tool_calls")?.unwrap_or(true);
    Ok(Conversation {
        names: &NAMES,
        system,
        turns,
        tools: body.objects("tools")?.iter().map(read_tool).collect::<Result<_, _>>()?,
        tool_choice: read_tool_choice(&body, read_named)?,
        one_call: !parallel,
        max_tokens: request.max_tokens_for(offer),
        sampling: read_sampling(&body)?,
        stop: read_stop(&body)?,
        format: read_format(&body)?,
        verbosity: body.text("verbosity")?,
        reasoning: match offer.reasoning {
            Policy::Strip => Reasoning::default(),
            _ => read_reasoning(&body)?,
        },
        stream: request.stream,
    })
}

pub(super) fn read_sampling(body: &Members<'_>) -> Result<Sampling, BadRequest> {
    Ok(Sampling {
        temperature: body.number("temperature")?,
        top_p: body.number("top_p")?,
        top_k: body.number("top_k")?,
        seed: body.number("seed")?,
        presence_penalty: body.number("presence_penalty")?,
        frequency_penalty: body.number("frequency_penalty")?,
    })
}

fn read_stop(body: &Members<'_>) -> Result<Vec<String>, BadRequest> {
    if body.is_text("stop") {
        return Ok(body.text("stop")?.into_iter().collect());
    }
    Ok(body.texts("stop")?.unwrap_or_default())
}

fn read_reasoning(body: &Members<'_>) -> Result<Reasoning, BadRequest> {
    let thinking = body.object("thinking")?.map(|thinking| read_thinking(&thinking)).transpose()?;
    Ok(Reasoning { thinking, effort: read_effort(body, "reasoning_effort")? })
}

pub(super) fn read_effort(body: &Members<'_>, key: &str) -> Result<Option<Effort>, BadRequest> {
    let Some(word) = body.text(key)? else { return Ok(None) };
    let effort = Effort::parse(&word);
    let wrong = || bad_value(&body.at(key), "must be none, minimal, low, medium, high, xhigh or max");
    effort.ok_or_else(wrong).map(Some)
}

/// `thinking`, as Anthropic has it and others have taken it up.
pub(super) fn read_thinking(thinking: &Members<'_>) -> Result<Thinking, BadRequest> {
    // How thoughts are shown is a matter of taste that no other provider asks for.
    thinking.only(&["type", "budget_tokens"], &["display"])?;
    match thinking.must_text("type")?.as_str() {
        "enabled" => match thinking.whole("budget_tokens")? {
            Some(budget) => Ok(Thinking::Budget(budget)),
            None => Ok(Thinking::Adaptive),
        },
        "disabled" => Ok(Thinking::Off),
        "adaptive" => Ok(Thinking::Adaptive),
        _ => Err(thinking.refuse("type")),
    }
}

fn read_message(
    message: &Members<'_>,
    system: &mut Vec<String>,
    turns: &mut Vec<Turn>,
) -> Result<(), BadRequest> {
    match message.must_text("role")?.as_str() {
        "system" | "developer" => {
            message.only(&["role", "content"], HARMLESS)?;
            system.push(join_texts(&read_content(message)?, message.place())?);
        }
        "user" => {
            message.only(&["role", "content"], HARMLESS)?;
            turns.push(Turn { role: Role::User, parts: read_content(message)? });
        }
        "assistant" => turns.push(read_assistant(message)?),
        "tool" => {
            message.only(&["role", "content", "tool_call_id"], &["name", "cache_control"])?;
            let call_id = message.must_text("tool_call_id")?;
            let result = ToolResult { call_id, parts: read_content(message)?, is_error: false };
            match turns.last_mut() {
                // The results of one turn's calls are one turn.
                Some(turn) if matches!(turn.parts.last(), Some(Part::Result(_))) => {
                    turn.parts.push(Part::Result(result));
                }
                _ => turns.push(Turn { role: Role::User, parts: vec![Part::Result(result)] }),
            }
        }
        "function" => return Err(refuse_kind(message, "role", "send tools and tool messages instead")),
        _ => return Err(refuse_kind(message, "role", "its role is not known")),
    }
    Ok(())
}

/// What is only of use where it came from: thoughts without a signature, in fields of several
/// providers, are no part of the conversation, and notes on an earlier answer are none either.
const HARMLESS_OF_ASSISTANT: &[&str] =
    &["reasoning_content", "reasoning", "reasoning_details", "annotations", "cache_control"];

fn read_assistant(message: &Members<'_>) -> Result<Turn, BadRequest> {
    let known = ["role", "content", "refusal", "tool_calls", "thinking_blocks"];
    message.only(&known, HARMLESS_OF_ASSISTANT)?;
    let mut parts = Vec::new();
    for block in message.objects("thinking_blocks")? {
        parts.push(super::messages_request::read_thought(&block)?);
    }
    if message.json("content").is_some() {
        parts.extend(read_content(message)?);
    }
    parts.extend(message.text("refusal")?.map(Part::Refusal));
    for call in message.objects("tool_calls")? {
        push_part(&mut parts, Part::Call(read_call(&call)?));
    }
    Ok(Turn { role: Role::Assistant, parts })
}

fn read_call(call: &Members<'_>) -> Result<Call, BadRequest> {
    if call.text("type")?.is_some_and(|kind| kind != "function") {
        return Err(refuse_kind(call, "type", "only functions are called there"));
    }
    call.only(&["id", "type", "function", "extra_content"], &["index"])?;
    let function = call.must_object("function")?;
    function.only(&["name", "arguments"], &[])?;
    Ok(Call {
        id: call.must_text("id")?,
        name: function.must_text("name")?,
        arguments: function.must_text("arguments")?,
        signature: signature(call)?,
    })
}

/// Google's signature, where its own OpenAI-compatible API has it.
fn signature(call: &Members<'_>) -> Result<Option<String>, BadRequest> {
    let Some(extra) = call.object("extra_content")? else { return Ok(None) };
    let Some(google) = extra.object("google")? else { return Ok(None) };
    google.text("thought_signature")
}

fn read_content(message: &Members<'_>) -> Result<Vec<Part>, BadRequest> {
    if message.json("content").is_none() || message.is_text("content") {
        return Ok(vec![Part::Text(message.must_text("content")?)]);
    }
    message.objects("content")?.iter().map(read_part).collect()
}

fn read_part(part: &Members<'_>) -> Result<Part, BadRequest> {
    let harmless = &["cache_control", "prompt_cache_breakpoint"];
    match part.must_text("type")?.as_str() {
        "text" => {
            part.only(&["type", "text"], harmless)?;
            Ok(Part::Text(part.must_text("text")?))
        }
        "refusal" => {
            part.only(&["type", "refusal"], harmless)?;
            Ok(Part::Refusal(part.must_text("refusal")?))
        }
        "image_url" => {
            part.only(&["type", "image_url"], harmless)?;
            let image = part.must_object("image_url")?;
            // How closely a picture is looked at is each provider's own affair.
            image.only(&["url"], &["detail"])?;
            Ok(media(MediaKind::Image, read_url(&image, "url")?, None))
        }
        "input_audio" => {
            part.only(&["type", "input_audio"], harmless)?;
            let audio = part.must_object("input_audio")?;
            audio.only(&["data", "format"], &[])?;
            let media_type = format!("audio/{}", audio.must_text("format")?);
            let source = Source::Base64 { media_type, data: audio.must_text("data")? };
            Ok(media(MediaKind::Audio, source, None))
        }
        "file" => {
            part.only(&["type", "file"], harmless)?;
            let file = part.must_object("file")?;
            file.only(&["file_data", "filename"], &[])?;
            Ok(media(MediaKind::Document, read_url(&file, "file_data")?, file.text("filename")?))
        }
        _ => Err(refuse_kind(part, "type", "its type is not known")),
    }
}

pub(super) fn media(kind: MediaKind, source: Source, name: Option<String>) -> Part {
    Part::Media(Media { kind, source, name })
}

pub(super) fn read_url(members: &Members<'_>, key: &str) -> Result<Source, BadRequest> {
    let at = members.at(key);
    Source::from_url(members.must_text(key)?).map_err(|problem| bad_value(&at, format!("{at} {problem}")))
}

fn read_tool(tool: &Members<'_>) -> Result<Tool, BadRequest> {
    if tool.must_text("type")? != "function" {
        return Err(refuse_kind(tool, "type", "only functions are offered there"));
    }
    tool.only(&["type", "function"], &["cache_control"])?;
    let function = tool.must_object("function")?;
    function.only(&["name", "description", "parameters", "strict"], &[])?;
    declared(&function)
}

/// A function as it is declared: in chat completions within its tool, in responses as the tool.
pub(super) fn declared(function: &Members<'_>) -> Result<Tool, BadRequest> {
    Ok(Tool {
        name: function.must_text("name")?,
        description: function.text("description")?,
        parameters: function.object_json("parameters")?,
        strict: function.flag("strict")?,
    })
}

fn read_named(choice: &Members<'_>) -> Result<String, BadRequest> {
    choice.only(&["type", "function"], &[])?;
    let function = choice.must_object("function")?;
    function.only(&["name"], &[])?;
    function.must_text("name")
}

/// Which tool is to be called: a word, or a function that `named` reads the name of.
pub(super) fn read_tool_choice(
    body: &Members<'_>,
    named: fn(&Members<'_>) -> Result<String, BadRequest>,
) -> Result<Option<ToolChoice>, BadRequest> {
    if body.json("tool_choice").is_none() {
        return Ok(None);
    }
    if body.is_text("tool_choice") {
        return read_choice_word(body, "tool_choice").map(Some);
    }
    let choice = body.must_object("tool_choice")?;
    if choice.must_text("type")? != "function" {
        return Err(refuse_kind(&choice, "type", "a list of allowed tools has no place there"));
    }
    named(&choice).map(ToolChoice::Named).map(Some)
}

fn read_choice_word(body: &Members<'_>, key: &str) -> Result<ToolChoice, BadRequest> {
    match body.must_text(key)?.as_str() {
        "auto" => Ok(ToolChoice::Auto),
        "none" => Ok(ToolChoice::None),
        "required" => Ok(ToolChoice::Required),
        _ => Err(bad_value(&body.at(key), "must be auto, none, required or one tool's name")),
    }
}

fn read_format(body: &Members<'_>) -> Result<Option<Format>, BadRequest> {
    let Some(format) = body.object("response_format")? else { return Ok(None) };
    match format.must_text("type")?.as_str() {
        "text" => Ok(None),
        "json_object" => Ok(Some(Format::Json)),
        "json_schema" => {
            format.only(&["type", "json_schema"], &[])?;
            let schema = format.must_object("json_schema")?;
            schema.only(&["name", "description", "schema", "strict"], &[])?;
            read_schema(&schema).map(Some)
        }
        _ => Err(refuse_kind(&format, "type", "its type is not known")),
    }
}

/// A schema with its name, as two formats have it.
pub(super) fn read_schema(schema: &Members<'_>) -> Result<Format, BadRequest> {
    schema.must_object("schema")?;
    Ok(Format::Schema {
        name: schema.text("name")?,
        description: schema.text("description")?,
        schema: schema.object_json("schema")?.unwrap_or_default(),
        strict: schema.flag("strict")?,
    })
}

/// A schema needs a name here; some formats have none to give.
const SCHEMA_NAME: &str = "answer";

/// Writes a conversation as a request for `model`, with its output limit in the field `limit`.
pub fn write(conversation: &Conversation, model: &str, limit: &str) -> Result<String, BadRequest> {
    let mut body = ObjectText::new();
    // A signature of Google's is wanted by its models, also behind this format, and by no others.
    let signs = model.contains("gemini");
    body.text("model", model).json("messages", &write_messages(conversation, signs)?);
    if !conversation.tools.is_empty() {
        body.json("tools", &list(conversation.tools.iter().map(write_tool)));
        if conversation.one_call {
            body.json("parallel_tool_calls", "false");
        }
    }
    body.maybe("tool_choice", conversation.tool_choice.as_ref().map(write_tool_choice));
    let sampling = &conversation.sampling;
    if sampling.top_k.is_some() {
        return Err(no_place_for("top_k"));
    }
    body.maybe("temperature", sampling.temperature.as_ref())
        .maybe("top_p", sampling.top_p.as_ref())
        .maybe("seed", sampling.seed.as_ref())
        .maybe("presence_penalty", sampling.presence_penalty.as_ref())
        .maybe("frequency_penalty", sampling.frequency_penalty.as_ref());
    if !conversation.stop.is_empty() {
        body.json("stop", &list(conversation.stop.iter().map(|stop| quote(stop))));
    }
    body.maybe("response_format", conversation.format.as_ref().map(write_format))
        .maybe("verbosity", conversation.verbosity.as_deref().map(quote))
        .maybe("reasoning_effort", effort(conversation).map(|effort| quote(effort.as_str())))
        .number(limit, conversation.max_tokens);
    if conversation.stream {
        body.json("stream", "true").json("stream_options", r#"{"include_usage":true}"#);
    }
    Ok(body.end())
}

/// The effort that comes nearest to what was asked for. A model that is left to its own devices, or
/// asked not to think, is told nothing: many know no such word.
fn effort(conversation: &Conversation) -> Option<Effort> {
    let Reasoning { thinking, effort } = &conversation.reasoning;
    effort.or(match thinking {
        Some(Thinking::Budget(0..2_048)) => Some(Effort::Low),
        Some(Thinking::Budget(2_048..16_384)) => Some(Effort::Medium),
        Some(Thinking::Budget(_)) => Some(Effort::High),
        Some(Thinking::Off | Thinking::Adaptive) | None => None,
    })
}

fn write_messages(conversation: &Conversation, signs: bool) -> Result<String, BadRequest> {
    let mut messages = Vec::new();
    if !conversation.system.is_empty() {
        messages.push(write_message("system", &quote(&conversation.system.join(BETWEEN_TEXTS))));
    }
    for turn in &conversation.turns {
        match turn.role {
            Role::User => write_user(&turn.parts, conversation.names, &mut messages)?,
            Role::Assistant => messages.extend(write_assistant(&turn.parts, conversation.names, signs)?),
        }
    }
    Ok(list(messages))
}

/// Several texts are sent as one: not every provider that speaks this format takes a list.
const BETWEEN_TEXTS: &str = "\n\n";

fn write_message(role: &str, content: &str) -> String {
    ObjectText::new().text("role", role).json("content", content).end()
}

/// Results become messages of their own, and what they hold but text a user's message behind them:
/// a result can only be text here.
fn write_user(parts: &[Part], names: &'static Names, messages: &mut Vec<String>) -> Result<(), BadRequest> {
    let (mut contents, mut from_results) = (Vec::new(), Vec::new());
    for part in parts {
        match part {
            Part::Result(result) => {
                messages.push(write_result(result));
                let media = result.parts.iter().filter(|part| matches!(part, Part::Media(_)));
                from_results.extend(media);
            }
            other => contents.push(other),
        }
    }
    from_results.extend(contents);
    if !from_results.is_empty() {
        messages.push(write_message("user", &write_content(&from_results, names)?));
    }
    Ok(())
}

fn write_result(result: &ToolResult) -> String {
    let mut text = super::result_text(result);
    if text.is_empty() && !result.parts.is_empty() {
        "What it returned follows as a message.".clone_into(&mut text);
    }
    ObjectText::new().text("role", "tool").text("tool_call_id", &result.call_id).text("content", &text).end()
}

fn write_content(parts: &[&Part], names: &'static Names) -> Result<String, BadRequest> {
    let texts: Option<Vec<&str>> = parts.iter().map(|part| as_text(part)).collect();
    if let Some(texts) = texts {
        return Ok(quote(&texts.join(BETWEEN_TEXTS)));
    }
    let parts: Result<Vec<_>, _> = parts.iter().map(|part| write_part(part, names)).collect();
    Ok(list(parts?))
}

fn as_text(part: &Part) -> Option<&str> {
    match part {
        Part::Text(text) | Part::Refusal(text) => Some(text),
        Part::Media(Media { source: Source::Text(text), .. }) => Some(text),
        _ => None,
    }
}

fn write_part(part: &Part, names: &'static Names) -> Result<String, BadRequest> {
    if let Some(text) = as_text(part) {
        return Ok(ObjectText::new().text("type", "text").text("text", text).end());
    }
    let Part::Media(media) = part else {
        return Err(unsupported(names.turns, "a user's message holds what only a model says"));
    };
    let refuse =
        |what: &str| Err(unsupported(names.turns, format!("{what} has no place in this model's API")));
    let mut written = ObjectText::new();
    match (media.kind, &media.source) {
        (MediaKind::Image, source) => {
            let url = source.to_url().unwrap_or_default();
            let image = ObjectText::new().text("url", &url).end();
            written.text("type", "image_url").json("image_url", &image);
        }
        (MediaKind::Audio, Source::Base64 { media_type, data }) => {
            let format = media_type.strip_prefix("audio/").unwrap_or(media_type);
            let audio = ObjectText::new().text("data", data).text("format", format).end();
            written.text("type", "input_audio").json("input_audio", &audio);
        }
        (MediaKind::Document, source @ Source::Base64 { .. }) => {
            let mut file = ObjectText::new();
            // The format wants a name with the bytes.
            file.text("filename", media.name.as_deref().unwrap_or("document.pdf"));
            file.text("file_data", &source.to_url().unwrap_or_default());
            written.text("type", "file").json("file", &file.end());
        }
        (kind, _) => return refuse(&format!("{} by its URL", kind.word())),
    }
    Ok(written.end())
}

/// `None` where nothing is left to say: thoughts have no place here.
fn write_assistant(parts: &[Part], names: &'static Names, signs: bool) -> Result<Option<String>, BadRequest> {
    let (mut texts, mut calls) = (Vec::new(), Vec::new());
    for part in parts {
        match part {
            Part::Text(text) | Part::Refusal(text) => texts.push(text.as_str()),
            Part::Call(call) if signs => calls.push(write_call(call)),
            Part::Call(call) => calls.push(write_call(&Call { signature: None, ..call.clone() })),
            Part::Thinking { .. } | Part::Redacted(_) => {}
            Part::Media(media) => {
                let message = format!("a model's message holds {}: leave it out", media.kind.word());
                return Err(unsupported(names.turns, message));
            }
            Part::Result(_) => {
                return Err(unsupported(names.turns, "a model's message holds a tool's result"));
            }
        }
    }
    if texts.is_empty() && calls.is_empty() {
        return Ok(None);
    }
    let mut message = ObjectText::new();
    message.text("role", "assistant");
    if texts.is_empty() {
        message.json("content", "null");
    } else {
        message.text("content", &texts.join(BETWEEN_TEXTS));
    }
    if !calls.is_empty() {
        message.json("tool_calls", &list(calls));
    }
    Ok(Some(message.end()))
}

pub(super) fn write_call(call: &Call) -> String {
    let function = ObjectText::new().text("name", &call.name).text("arguments", &call.arguments).end();
    let mut written = ObjectText::new();
    written.text("id", &call.id).text("type", "function").json("function", &function);
    written.maybe("extra_content", call.signature.as_deref().map(write_signature)).end()
}

pub(super) fn write_signature(signature: &str) -> String {
    let google = ObjectText::new().text("thought_signature", signature).end();
    ObjectText::new().json("google", &google).end()
}

fn write_tool(tool: &Tool) -> String {
    let function = ObjectText::new()
        .text("name", &tool.name)
        .maybe("description", tool.description.as_deref().map(quote))
        .maybe("parameters", tool.parameters.as_ref())
        .maybe("strict", tool.strict.map(|strict| strict.to_string()))
        .end();
    ObjectText::new().text("type", "function").json("function", &function).end()
}

fn write_tool_choice(choice: &ToolChoice) -> String {
    match choice {
        ToolChoice::Auto => quote("auto"),
        ToolChoice::None => quote("none"),
        ToolChoice::Required => quote("required"),
        ToolChoice::Named(name) => {
            let function = ObjectText::new().text("name", name).end();
            ObjectText::new().text("type", "function").json("function", &function).end()
        }
    }
}

fn write_format(format: &Format) -> String {
    let mut written = ObjectText::new();
    match format {
        Format::Json => written.text("type", "json_object"),
        Format::Schema { name, description, schema, strict } => {
            let schema = ObjectText::new()
                .text("name", name.as_deref().unwrap_or(SCHEMA_NAME))
                .maybe("description", description.as_deref().map(quote))
                .json("schema", schema)
                .maybe("strict", strict.map(|strict| strict.to_string()))
                .end();
            written.text("type", "json_schema").json("json_schema", &schema)
        }
    };
    written.end()
}
