//! Responses requests (OpenAI API reference, *Create a model response*), read.

use crate::formats::conversation::{
    ANTHROPIC, ANTHROPIC_REDACTED, Call, Conversation, Format, MediaKind, Names, Part, Reasoning, Role,
    Sampling, Source, Tool, ToolResult, Turn, UNSEALED, google_signature, push_part,
};
use crate::formats::members::Members;
use crate::formats::request::{BadRequest, bad_value};
use crate::formats::responses::ResponsesRequest;
use crate::formats::translate::chat_request::{
    declared, media, read_effort, read_sampling, read_schema, read_tool_choice, read_url,
};
use crate::formats::translate::{HARMLESS, join_texts, refuse_kind};
use crate::pricing::{Offer, Reasoning as Policy};

pub(super) const NAMES: Names = Names {
    turns: "input",
    one_call: "parallel_tool_calls",
    format: "text.format",
    reasoning: "reasoning",
    verbosity: "text.verbosity",
    max_tokens: "max_output_tokens",
};

const KNOWN: &[&str] = &[
    "model",
    "input",
    "instructions",
    "max_output_tokens",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "temperature",
    "top_p",
    "top_logprobs",
    "text",
    "reasoning",
    "include",
    "store",
    "truncation",
    "background",
];

/// What can be asked to come with an answer, and comes or cannot be there: results of tools that the
/// provider would have run itself.
const INCLUDABLE: &[&str] = &[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];

/// A thought's signature as `encrypted_content`, with a mark that says whose it is.
pub(super) fn seal(signature: Option<&str>) -> String {
    match signature {
        None => UNSEALED.to_owned(),
        Some(google) if google_signature(google).is_some() => google.to_owned(),
        Some(anthropic) => format!("{ANTHROPIC}{anthropic}"),
    }
}

pub(super) fn seal_redacted(data: &str) -> String {
    format!("{ANTHROPIC_REDACTED}{data}")
}

/// Reads a request that its parser has found priceable.
pub fn read(request: &ResponsesRequest<'_>, offer: &Offer) -> Result<Conversation, BadRequest> {
    let body = Members::of(request.object().clone());
    body.only(KNOWN, HARMLESS)?;
    body.nothing_but("top_logprobs", &["0"])?;
    // Nothing is kept, so that nothing could be asked for later.
    body.nothing_but("store", &["false"])?;
    body.nothing_but("truncation", &[r#""disabled""#])?;
    let includes = body.texts("include")?.unwrap_or_default();
    if let Some(other) = includes.iter().find(|include| !INCLUDABLE.contains(&include.as_str())) {
        return Err(bad_value(
            "include",
            format!("include: {other:?} cannot be had from this model's provider"),
        ));
    }
    let mut system: Vec<String> = body.text("instructions")?.into_iter().collect();
    let mut turns = Vec::new();
    if body.is_text("input") {
        turns.push(Turn { role: Role::User, parts: vec![Part::Text(body.must_text("input")?)] });
    } else {
        for item in body.objects("input")? {
            read_item(&item, &mut system, &mut turns)?;
        }
    }
    let (format, verbosity) = read_text(&body)?;
    let parallel = body.flag("parallel_tool_calls")?.unwrap_or(true);
    Ok(Conversation {
        names: &NAMES,
        system,
        turns,
        tools: body.objects("tools")?.iter().map(read_tool).collect::<Result<_, _>>()?,
        tool_choice: read_tool_choice(&body, read_named)?,
        one_call: !parallel,
        max_tokens: request.max_tokens_for(offer),
        sampling: Sampling { seed: None, top_k: None, ..read_sampling(&body)? },
        stop: Vec::new(),
        format,
        verbosity,
        reasoning: match offer.reasoning {
            Policy::Strip => Reasoning::default(),
            _ => read_reasoning(&body)?,
        },
        stream: request.stream,
    })
}

fn read_reasoning(body: &Members<'_>) -> Result<Reasoning, BadRequest> {
    let Some(reasoning) = body.object("reasoning")? else { return Ok(Reasoning::default()) };
    // Summaries come where a provider has any, and other turns' thoughts where they are sent back.
    reasoning.only(&["effort", "mode"], &["summary", "generate_summary", "context"])?;
    reasoning.nothing_but("mode", &[r#""standard""#])?;
    Ok(Reasoning { thinking: None, effort: read_effort(&reasoning, "effort")? })
}

fn read_text(body: &Members<'_>) -> Result<(Option<Format>, Option<String>), BadRequest> {
    let Some(text) = body.object("text")? else { return Ok((None, None)) };
    text.only(&["format", "verbosity"], &[])?;
    let verbosity = text.text("verbosity")?;
    let Some(format) = text.object("format")? else { return Ok((None, verbosity)) };
    let format = match format.must_text("type")?.as_str() {
        "text" => None,
        "json_object" => Some(Format::Json),
        "json_schema" => {
            format.only(&["type", "name", "description", "schema", "strict"], &[])?;
            Some(read_schema(&format)?)
        }
        _ => return Err(refuse_kind(&format, "type", "its type is not known")),
    };
    Ok((format, verbosity))
}

/// What an item says of itself where it was made.
const HARMLESS_OF_ITEM: &[&str] = &["id", "status", "phase", "caller"];

fn read_item(item: &Members<'_>, system: &mut Vec<String>, turns: &mut Vec<Turn>) -> Result<(), BadRequest> {
    match item.text("type")?.as_deref() {
        None | Some("message") => read_message(item, system, turns),
        Some("function_call") => {
            item.only(&["type", "call_id", "name", "arguments"], HARMLESS_OF_ITEM)?;
            let call = Call {
                id: item.must_text("call_id")?,
                name: item.must_text("name")?,
                arguments: item.must_text("arguments")?,
                signature: None,
            };
            push_part(last_of(turns, Role::Assistant), Part::Call(call));
            Ok(())
        }
        Some("function_call_output") => {
            item.only(&["type", "call_id", "output"], HARMLESS_OF_ITEM)?;
            let parts = read_content(item, "output")?;
            let result = ToolResult { call_id: item.must_text("call_id")?, parts, is_error: false };
            last_of(turns, Role::User).push(Part::Result(result));
            Ok(())
        }
        Some("reasoning") => {
            item.only(&["type", "summary", "content", "encrypted_content"], HARMLESS_OF_ITEM)?;
            if let Some(thought) = read_thought(item)? {
                last_of(turns, Role::Assistant).push(thought);
            }
            Ok(())
        }
        Some(_) => Err(refuse_kind(item, "type", "its type is not known there")),
    }
}

/// The parts of the last turn, if it is of this role; else of a new one. Items of one role that follow
/// each other are one turn: a thought, what was said, and the calls it led to.
fn last_of(turns: &mut Vec<Turn>, role: Role) -> &mut Vec<Part> {
    if turns.last().is_none_or(|turn| turn.role != role) {
        turns.push(Turn { role, parts: Vec::new() });
    }
    let last = turns.len() - 1;
    &mut turns[last].parts
}

/// A thought that was sealed here; others are of no use to another provider.
fn read_thought(item: &Members<'_>) -> Result<Option<Part>, BadRequest> {
    let Some(sealed) = item.text("encrypted_content")? else { return Ok(None) };
    if let Some(data) = sealed.strip_prefix(ANTHROPIC_REDACTED) {
        return Ok(Some(Part::Redacted(data.to_owned())));
    }
    let signature = match sealed.strip_prefix(ANTHROPIC) {
        Some(signature) => signature.to_owned(),
        None if google_signature(&sealed).is_some() => sealed,
        None => return Ok(None),
    };
    let mut text = String::new();
    for summary in item.objects("summary")? {
        summary.only(&["type", "text"], &[])?;
        text.push_str(&summary.must_text("text")?);
    }
    Ok(Some(Part::Thinking { text, signature: Some(signature) }))
}

fn read_message(
    message: &Members<'_>,
    system: &mut Vec<String>,
    turns: &mut Vec<Turn>,
) -> Result<(), BadRequest> {
    message.only(&["type", "role", "content"], HARMLESS_OF_ITEM)?;
    let parts = read_content(message, "content")?;
    match message.must_text("role")?.as_str() {
        "system" | "developer" => system.push(join_texts(&parts, message.place())?),
        "user" => turns.push(Turn { role: Role::User, parts }),
        "assistant" => last_of(turns, Role::Assistant).extend(parts),
        _ => return Err(refuse_kind(message, "role", "its role is not known")),
    }
    Ok(())
}

fn read_content(members: &Members<'_>, key: &str) -> Result<Vec<Part>, BadRequest> {
    if members.json(key).is_none() || members.is_text(key) {
        return Ok(vec![Part::Text(members.must_text(key)?)]);
    }
    members.objects(key)?.iter().map(read_part).collect()
}

fn read_part(part: &Members<'_>) -> Result<Part, BadRequest> {
    let harmless = &["prompt_cache_breakpoint", "annotations", "logprobs"];
    match part.must_text("type")?.as_str() {
        "input_text" | "output_text" | "text" => {
            part.only(&["type", "text"], harmless)?;
            Ok(Part::Text(part.must_text("text")?))
        }
        "refusal" => {
            part.only(&["type", "refusal"], harmless)?;
            Ok(Part::Refusal(part.must_text("refusal")?))
        }
        "input_image" => {
            // How closely a picture is looked at is each provider's own affair.
            part.only(&["type", "image_url"], &["detail", "prompt_cache_breakpoint"])?;
            Ok(media(MediaKind::Image, read_url(part, "image_url")?, None))
        }
        "input_file" => {
            part.only(
                &["type", "file_data", "file_url", "filename"],
                &["detail", "prompt_cache_breakpoint"],
            )?;
            let source = match part.text("file_url")? {
                Some(url) => Source::Url(url),
                None => read_url(part, "file_data")?,
            };
            Ok(media(MediaKind::Document, source, part.text("filename")?))
        }
        _ => Err(refuse_kind(part, "type", "its type is not known")),
    }
}

fn read_tool(tool: &Members<'_>) -> Result<Tool, BadRequest> {
    if tool.must_text("type")? != "function" {
        return Err(refuse_kind(tool, "type", "only functions are offered there"));
    }
    tool.only(
        &["type", "name", "description", "parameters", "strict"],
        &["defer_loading", "allowed_callers"],
    )?;
    declared(tool)
}

fn read_named(choice: &Members<'_>) -> Result<String, BadRequest> {
    choice.only(&["type", "name"], &[])?;
    choice.must_text("name")
}
