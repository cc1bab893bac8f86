//! Messages requests (Anthropic API reference, *Create a Message*), read and written.

use crate::formats::conversation::{
    Call, Conversation, Effort, Format, Media, MediaKind, Names, Part, Reasoning, Role, Sampling, Source,
    Thinking, Tool, ToolChoice, ToolResult, Turn, google_signature, mark_google, push_part,
};
use crate::formats::json::{ObjectText, list, quote};
use crate::formats::members::Members;
use crate::formats::messages::MessagesRequest;
use crate::formats::request::{BadRequest, bad_value, unsupported};
use crate::formats::translate::chat_request::{media, read_effort, read_thinking};
use crate::formats::translate::{HARMLESS, join_texts, no_place_for, refuse_kind, result_text};
use crate::pricing::{Offer, Reasoning as Policy};

pub(super) const NAMES: Names = Names {
    turns: "messages",
    one_call: "tool_choice.disable_parallel_tool_use",
    format: "output_config.format",
    reasoning: "thinking",
    verbosity: "verbosity",
    max_tokens: "max_tokens",
};

const KNOWN: &[&str] = &[
    "model",
    "messages",
    "system",
    "max_tokens",
    "tools",
    "tool_choice",
    "stop_sequences",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "thinking",
    "output_config",
    "output_format",
];

/// Reads a request that its parser has found priceable.
pub fn read(request: &MessagesRequest<'_>, offer: &Offer) -> Result<Conversation, BadRequest> {
    let body = Members::of(request.object().clone());
    body.only(KNOWN, HARMLESS)?;
    let mut system = match body.json("system") {
        None => Vec::new(),
        Some(_) => vec![join_texts(&read_content(&body, "system")?, "system")?],
    };
    let mut turns = Vec::new();
    for message in body.objects("messages")? {
        message.only(&["role", "content"], &[])?;
        let parts = read_content(&message, "content")?;
        match message.must_text("role")?.as_str() {
            "user" => turns.push(Turn { role: Role::User, parts }),
            "assistant" => turns.push(Turn { role: Role::Assistant, parts }),
            "system" => system.push(join_texts(&parts, message.place())?),
            _ => return Err(refuse_kind(&message, "role", "its role is not known")),
        }
    }
    let (tool_choice, one_call) = read_tool_choice(&body)?;
    let config = body.object("output_config")?;
    let mut reasoning = Reasoning::default();
    if offer.reasoning != Policy::Strip {
        reasoning.thinking = body.object("thinking")?.map(|thinking| read_thinking(&thinking)).transpose()?;
    }
    let mut format = body.object("output_format")?.map(|format| read_format(&format)).transpose()?;
    if let Some(config) = config {
        config.only(&["effort", "format"], &[])?;
        if offer.reasoning != Policy::Strip {
            reasoning.effort = read_effort(&config, "effort")?;
        }
        format = config.object("format")?.map(|format| read_format(&format)).transpose()?.or(format);
    }
    Ok(Conversation {
        names: &NAMES,
        system,
        turns,
        tools: body.objects("tools")?.iter().map(read_tool).collect::<Result<_, _>>()?,
        tool_choice,
        one_call,
        max_tokens: request.max_tokens,
        sampling: Sampling {
            temperature: body.number("temperature")?,
            top_p: body.number("top_p")?,
            top_k: body.number("top_k")?,
            ..Sampling::default()
        },
        stop: body.texts("stop_sequences")?.unwrap_or_default(),
        format,
        verbosity: None,
        reasoning,
        stream: request.stream,
    })
}

fn read_format(format: &Members<'_>) -> Result<Format, BadRequest> {
    if format.must_text("type")? != "json_schema" {
        return Err(refuse_kind(format, "type", "its type is not known"));
    }
    format.only(&["type", "schema"], &[])?;
    format.must_object("schema")?;
    let schema = format.object_json("schema")?.unwrap_or_default();
    // Here a schema is always held to.
    Ok(Format::Schema { name: None, description: None, schema, strict: Some(true) })
}

fn read_content(members: &Members<'_>, key: &str) -> Result<Vec<Part>, BadRequest> {
    if members.json(key).is_none() || members.is_text(key) {
        return Ok(vec![Part::Text(members.must_text(key)?)]);
    }
    let mut parts = Vec::new();
    for block in members.objects(key)? {
        push_part(&mut parts, read_block(&block)?);
    }
    Ok(parts)
}

fn read_block(block: &Members<'_>) -> Result<Part, BadRequest> {
    match block.must_text("type")?.as_str() {
        "tool_use" => {
            block.only(&["type", "id", "name", "input"], &["cache_control", "caller"])?;
            block.must_object("input")?;
            Ok(Part::Call(Call {
                id: block.must_text("id")?,
                name: block.must_text("name")?,
                arguments: block.object_json("input")?.unwrap_or_default(),
                signature: None,
            }))
        }
        "tool_result" => {
            block.only(&["type", "tool_use_id", "content", "is_error"], &["cache_control"])?;
            let parts = match block.json("content") {
                None => Vec::new(),
                Some(_) if block.is_text("content") => vec![Part::Text(block.must_text("content")?)],
                Some(_) => block.objects("content")?.iter().map(read_plain).collect::<Result<_, _>>()?,
            };
            let is_error = block.flag("is_error")?.unwrap_or(false);
            Ok(Part::Result(ToolResult { call_id: block.must_text("tool_use_id")?, parts, is_error }))
        }
        "thinking" | "redacted_thinking" => read_thought(block),
        _ => read_plain(block),
    }
}

/// Thoughts, which chat completions carry in the same shape.
pub(super) fn read_thought(block: &Members<'_>) -> Result<Part, BadRequest> {
    match block.must_text("type")?.as_str() {
        "thinking" => {
            block.only(&["type", "thinking", "signature"], &["cache_control"])?;
            let signature = block.text("signature")?.filter(|signature| !signature.is_empty());
            Ok(Part::Thinking { text: block.must_text("thinking")?, signature })
        }
        "redacted_thinking" => {
            block.only(&["type", "data"], &["cache_control"])?;
            Ok(Part::Redacted(block.must_text("data")?))
        }
        _ => Err(refuse_kind(block, "type", "it is no thought")),
    }
}

/// Texts, pictures and documents.
fn read_plain(block: &Members<'_>) -> Result<Part, BadRequest> {
    match block.must_text("type")?.as_str() {
        "text" => {
            // Where an earlier answer took its words from is no part of what was said.
            block.only(&["type", "text"], &["cache_control", "citations"])?;
            Ok(Part::Text(block.must_text("text")?))
        }
        "image" => {
            block.only(&["type", "source"], &["cache_control", "transformations"])?;
            Ok(media(MediaKind::Image, read_source(&block.must_object("source")?)?, None))
        }
        "document" => {
            block.only(&["type", "source", "title", "citations"], &["cache_control"])?;
            block.nothing_but("citations", &[r#"{"enabled":false}"#])?;
            let source = read_source(&block.must_object("source")?)?;
            Ok(media(MediaKind::Document, source, block.text("title")?))
        }
        _ => Err(refuse_kind(block, "type", "its type is not known there")),
    }
}

fn read_source(source: &Members<'_>) -> Result<Source, BadRequest> {
    match source.must_text("type")?.as_str() {
        "base64" => {
            source.only(&["type", "media_type", "data"], &[])?;
            let media_type = source.must_text("media_type")?;
            Ok(Source::Base64 { media_type, data: source.must_text("data")? })
        }
        "url" => {
            source.only(&["type", "url"], &[])?;
            Ok(Source::Url(source.must_text("url")?))
        }
        "text" => {
            source.only(&["type", "data", "media_type"], &[])?;
            Ok(Source::Text(source.must_text("data")?))
        }
        _ => Err(refuse_kind(source, "type", "send its bytes or its URL")),
    }
}

/// Hints to Anthropic alone: how tools are cached, streamed, and looked up.
const HARMLESS_OF_TOOL: &[&str] =
    &["cache_control", "eager_input_streaming", "defer_loading", "allowed_callers"];

fn read_tool(tool: &Members<'_>) -> Result<Tool, BadRequest> {
    if tool.text("type")?.is_some_and(|kind| kind != "custom") {
        return Err(refuse_kind(tool, "type", "only tools with a schema of their own are offered there"));
    }
    tool.only(&["type", "name", "description", "input_schema", "strict"], HARMLESS_OF_TOOL)?;
    tool.must_object("input_schema")?;
    Ok(Tool {
        name: tool.must_text("name")?,
        description: tool.text("description")?,
        parameters: tool.object_json("input_schema")?,
        strict: tool.flag("strict")?,
    })
}

fn read_tool_choice(body: &Members<'_>) -> Result<(Option<ToolChoice>, bool), BadRequest> {
    let Some(choice) = body.object("tool_choice")? else { return Ok((None, false)) };
    choice.only(&["type", "name", "disable_parallel_tool_use"], &[])?;
    let one_call = choice.flag("disable_parallel_tool_use")?.unwrap_or(false);
    let choice = match choice.must_text("type")?.as_str() {
        "auto" => ToolChoice::Auto,
        "any" => ToolChoice::Required,
        "none" => ToolChoice::None,
        "tool" => ToolChoice::Named(choice.must_text("name")?),
        _ => return Err(refuse_kind(&choice, "type", "its type is not known")),
    };
    Ok((Some(choice), one_call))
}

/// The least that can be thought here.
const LEAST_BUDGET: u64 = 1024;

/// Writes a conversation as a request for `model`.
pub fn write(conversation: &Conversation, model: &str) -> Result<String, BadRequest> {
    let names = conversation.names;
    let mut body = ObjectText::new();
    body.text("model", model).number("max_tokens", conversation.max_tokens);
    let system: Vec<&String> = conversation.system.iter().filter(|text| !text.trim().is_empty()).collect();
    match system.as_slice() {
        [] => {}
        [text] => drop(body.text("system", text)),
        texts => drop(body.json("system", &list(texts.iter().map(|text| write_text(text))))),
    }
    let mut messages = Vec::new();
    for (role, parts) in conversation.joined_turns() {
        messages.extend(write_turn(role, &parts, names)?);
    }
    body.json("messages", &list(messages));
    if !conversation.tools.is_empty() {
        body.json("tools", &list(conversation.tools.iter().map(write_tool)));
    }
    body.maybe("tool_choice", write_tool_choice(conversation));
    let sampling = &conversation.sampling;
    refuse_number("seed", sampling.seed.as_deref())?;
    refuse_number("presence_penalty", sampling.presence_penalty.as_deref())?;
    refuse_number("frequency_penalty", sampling.frequency_penalty.as_deref())?;
    if conversation.verbosity.as_deref().is_some_and(|verbosity| verbosity != "medium") {
        return Err(no_place_for(names.verbosity));
    }
    body.maybe("temperature", sampling.temperature.as_ref())
        .maybe("top_p", sampling.top_p.as_ref())
        .maybe("top_k", sampling.top_k.as_ref());
    if !conversation.stop.is_empty() {
        body.json("stop_sequences", &list(conversation.stop.iter().map(|stop| quote(stop))));
    }
    write_reasoning(conversation, model, &mut body)?;
    if conversation.stream {
        body.json("stream", "true");
    }
    Ok(body.end())
}

/// A number that has no place here, unless it is one that changes nothing.
fn refuse_number(field: &str, number: Option<&str>) -> Result<(), BadRequest> {
    match number {
        None => Ok(()),
        Some("0" | "0.0") if field != "seed" => Ok(()),
        Some(_) => Err(no_place_for(field)),
    }
}

/// `thinking`, and `output_config` with effort and format.
fn write_reasoning(
    conversation: &Conversation,
    model: &str,
    body: &mut ObjectText,
) -> Result<(), BadRequest> {
    let Reasoning { thinking, effort } = &conversation.reasoning;
    let mut config = ObjectText::new();
    let asked = effort.filter(|effort| *effort > Effort::None);
    let may_budget = !continues_without_thought(conversation);
    let budget =
        |tokens: u64| ObjectText::new().text("type", "enabled").number("budget_tokens", tokens).end();
    let thinking = match (thinking, asked) {
        (Some(Thinking::Off), _) => Some(r#"{"type":"disabled"}"#.to_owned()),
        (None, None) => None,
        (Some(Thinking::Budget(tokens)), _) => may_budget.then(|| budget(*tokens)),
        (_, asked) if takes_budget(model) => {
            let tokens = budget_for(asked.unwrap_or(Effort::Medium), conversation)?;
            may_budget.then(|| budget(tokens))
        }
        (_, effort) => {
            config.maybe("effort", effort.map(|effort| quote(effort_word(effort))));
            Some(r#"{"type":"adaptive"}"#.to_owned())
        }
    };
    body.maybe("thinking", thinking);
    match &conversation.format {
        None => {}
        Some(Format::Json) => {
            let message = "this model's API has no JSON mode without a schema: send type json_schema";
            return Err(unsupported(conversation.names.format, message));
        }
        Some(Format::Schema { schema, .. }) => {
            config
                .json("format", &ObjectText::new().text("type", "json_schema").json("schema", schema).end());
        }
    }
    if !config.is_empty() {
        body.json("output_config", &config.end());
    }
    Ok(())
}

/// Whether the model goes on after calls whose thoughts the client did not keep, or that were made
/// without any. With a budget it may only go on from its own thoughts (Anthropic, *Extended thinking*,
/// *Tool use*), so that this once it goes on without.
fn continues_without_thought(conversation: &Conversation) -> bool {
    let turns = conversation.joined_turns();
    let [.., (Role::Assistant, called), (Role::User, results)] = turns.as_slice() else { return false };
    let has_results = results.iter().any(|part| matches!(part, Part::Result(_)));
    let is_own = |part: &&&Part| match part {
        Part::Redacted(_) => true,
        Part::Thinking { signature: Some(signature), .. } => google_signature(signature).is_none(),
        _ => false,
    };
    has_results && called.first().filter(is_own).is_none()
}

/// Whether a model is told in tokens how much to think: those before Claude Opus 4.6 are, later ones
/// judge for themselves by an effort (Anthropic, *Extended thinking*, *Effort*).
fn takes_budget(model: &str) -> bool {
    let version = |text: &str| text.parse::<u32>().ok().filter(|number| *number < 100);
    let mut numbers = model.split(['-', '.', '@']).filter_map(version);
    match (numbers.next(), numbers.next()) {
        (Some(major), minor) => (major, minor.unwrap_or(0)) <= (4, 5),
        (None, _) => false,
    }
}

/// The share of its output that a model may think, for an effort.
fn budget_for(effort: Effort, conversation: &Conversation) -> Result<u64, BadRequest> {
    let max_tokens = conversation.max_tokens;
    if max_tokens <= LEAST_BUDGET {
        let message = format!(
            "this model thinks with at least {LEAST_BUDGET} tokens, and {} is {max_tokens}: raise it above, or do \
             not ask for reasoning",
            conversation.names.max_tokens
        );
        return Err(bad_value(conversation.names.max_tokens, message));
    }
    let percent = match effort {
        Effort::None | Effort::Minimal => 10,
        Effort::Low => 20,
        Effort::Medium => 50,
        Effort::High => 80,
        Effort::XHigh | Effort::Max => 90,
    };
    let share = max_tokens.saturating_mul(percent) / 100;
    Ok(share.max(LEAST_BUDGET))
}

/// The words for effort that there are here.
fn effort_word(effort: Effort) -> &'static str {
    match effort {
        Effort::None | Effort::Minimal => Effort::Low.as_str(),
        other => other.as_str(),
    }
}

fn write_turn(role: Role, parts: &[&Part], names: &'static Names) -> Result<Option<String>, BadRequest> {
    let mut blocks = Vec::new();
    for part in parts {
        write_blocks(part, names, &mut blocks)?;
    }
    if blocks.is_empty() {
        return Ok(None);
    }
    let role = match role {
        Role::User => "user",
        Role::Assistant => "assistant",
    };
    Ok(Some(ObjectText::new().text("role", role).json("content", &list(blocks)).end()))
}

/// A blank text is refused there and says nothing, and a thought that is not signed, or by another
/// provider, would be refused too.
fn write_blocks(part: &Part, names: &'static Names, blocks: &mut Vec<String>) -> Result<(), BadRequest> {
    match part {
        Part::Text(text) | Part::Refusal(text) if text.trim().is_empty() => {}
        Part::Text(text) | Part::Refusal(text) => blocks.push(write_text(text)),
        Part::Media(media) => blocks.push(write_media(media, names)?),
        Part::Thinking { text, signature: Some(signature) } if google_signature(signature).is_none() => {
            blocks.push(write_thinking(text, signature));
        }
        Part::Thinking { .. } => {}
        Part::Redacted(data) => blocks.push(write_redacted(data)),
        Part::Call(call) => blocks.push(write_call(call)),
        Part::Result(result) => blocks.push(write_result(result, names)?),
    }
    Ok(())
}

pub(super) fn write_text(text: &str) -> String {
    ObjectText::new().text("type", "text").text("text", text).end()
}

pub(super) fn write_thinking(text: &str, signature: &str) -> String {
    ObjectText::new().text("type", "thinking").text("thinking", text).text("signature", signature).end()
}

pub(super) fn write_redacted(data: &str) -> String {
    ObjectText::new().text("type", "redacted_thinking").text("data", data).end()
}

/// A thought that holds nothing but the signature of the call behind it.
pub(super) fn write_call_signature(call: &Call) -> Option<String> {
    call.signature.as_deref().map(|signature| write_thinking("", &mark_google(signature)))
}

pub(super) fn write_call(call: &Call) -> String {
    ObjectText::new()
        .text("type", "tool_use")
        .text("id", &call_id(&call.id))
        .text("name", &call.name)
        .json("input", &call.arguments_object())
        .end()
}

/// An id with the letters that are taken here; a call and its result are changed alike.
fn call_id(id: &str) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') { c } else { '_' };
    id.chars().map(letter).collect()
}

fn write_result(result: &ToolResult, names: &'static Names) -> Result<String, BadRequest> {
    let mut written = ObjectText::new();
    written.text("type", "tool_result").text("tool_use_id", &call_id(&result.call_id));
    let has_media = result.parts.iter().any(|part| matches!(part, Part::Media(_)));
    if has_media {
        let mut blocks = Vec::new();
        for part in &result.parts {
            write_blocks(part, names, &mut blocks)?;
        }
        written.json("content", &list(blocks));
    } else if !result.parts.is_empty() {
        let plain = ToolResult { is_error: false, ..result.clone() };
        written.text("content", &result_text(&plain));
    }
    if result.is_error {
        written.json("is_error", "true");
    }
    Ok(written.end())
}

fn write_media(media: &Media, names: &'static Names) -> Result<String, BadRequest> {
    let kind = match media.kind {
        MediaKind::Image => "image",
        MediaKind::Document => "document",
        MediaKind::Audio => return Err(unsupported(names.turns, "this model's API takes no audio")),
    };
    let mut source = ObjectText::new();
    match &media.source {
        Source::Base64 { media_type, data } => {
            source.text("type", "base64").text("media_type", media_type).text("data", data)
        }
        Source::Url(url) => source.text("type", "url").text("url", url),
        Source::Text(text) => source.text("type", "text").text("media_type", "text/plain").text("data", text),
    };
    let mut written = ObjectText::new();
    written.text("type", kind).json("source", &source.end());
    Ok(written.maybe("title", media.name.as_deref().map(quote)).end())
}

fn write_tool(tool: &Tool) -> String {
    ObjectText::new()
        .text("name", &tool.name)
        .maybe("description", tool.description.as_deref().map(quote))
        // A schema is asked for here; a function without parameters takes none.
        .json("input_schema", tool.parameters.as_deref().unwrap_or(r#"{"type":"object","properties":{}}"#))
        .maybe("strict", tool.strict.map(|strict| strict.to_string()))
        .end()
}

fn write_tool_choice(conversation: &Conversation) -> Option<String> {
    let has_tools = !conversation.tools.is_empty();
    let choice = match (&conversation.tool_choice, conversation.one_call && has_tools) {
        (Some(choice), _) => choice,
        (None, true) => &ToolChoice::Auto,
        (None, false) => return None,
    };
    let mut written = ObjectText::new();
    match choice {
        ToolChoice::Auto => written.text("type", "auto"),
        ToolChoice::Required => written.text("type", "any"),
        ToolChoice::Named(name) => written.text("type", "tool").text("name", name),
        ToolChoice::None => return Some(written.text("type", "none").end()),
    };
    if conversation.one_call {
        written.json("disable_parallel_tool_use", "true");
    }
    Some(written.end())
}
