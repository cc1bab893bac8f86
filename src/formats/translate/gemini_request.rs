//! `generateContent` requests (Gemini API reference), written.

use std::collections::HashMap;

use crate::formats::conversation::{
    Call, Conversation, Effort, Format, Media, MediaKind, Part, Role, Source, Thinking, Tool, ToolChoice,
    ToolResult,
};
use crate::formats::json::{ObjectText, list, quote};
use crate::formats::request::{BadRequest, bad_value, unsupported};
use crate::formats::translate::{no_place_for, result_text};

/// Writes a conversation as a request for `model`, which stands in the path and not in the body.
pub fn write(conversation: &Conversation, model: &str) -> Result<String, BadRequest> {
    let mut body = ObjectText::new();
    let system: Vec<String> =
        conversation.system.iter().filter(|text| !text.is_empty()).map(|text| write_text(text)).collect();
    if !system.is_empty() {
        body.json("systemInstruction", &ObjectText::new().json("parts", &list(system)).end());
    }
    body.json("contents", &write_contents(conversation, model)?);
    if !conversation.tools.is_empty() {
        if conversation.one_call {
            return Err(no_place_for(conversation.names.one_call));
        }
        let functions = list(conversation.tools.iter().map(write_tool));
        body.json("tools", &list([ObjectText::new().json("functionDeclarations", &functions).end()]));
    }
    body.maybe("toolConfig", conversation.tool_choice.as_ref().map(write_tool_choice));
    body.json("generationConfig", &write_config(conversation, model)?);
    Ok(body.end())
}

fn write_contents(conversation: &Conversation, model: &str) -> Result<String, BadRequest> {
    let mut names: HashMap<&str, &str> = HashMap::new();
    let mut contents = Vec::new();
    for (role, parts) in conversation.joined_turns() {
        let (mut written, mut from_results) = (Vec::new(), Vec::new());
        let mut wants_signature = wants_signatures(model);
        for part in parts {
            match part {
                Part::Text(text) | Part::Refusal(text) if text.is_empty() => {}
                Part::Text(text) | Part::Refusal(text) => written.push(write_text(text)),
                Part::Media(media) => written.push(write_media(media)),
                Part::Call(call) => {
                    names.insert(&call.id, &call.name);
                    written.push(write_call(call, wants_signature));
                    // Of calls side by side the first one bears it.
                    wants_signature = false;
                }
                Part::Result(result) => {
                    let name = names.get(result.call_id.as_str()).ok_or_else(|| {
                        let message = format!("the result of {:?} answers no call before it", result.call_id);
                        bad_value(conversation.names.turns, message)
                    })?;
                    written.push(write_result(result, name));
                    from_results.extend(media_of(result));
                }
                // What another model thought is of no use here, and what this one thought comes back
                // with the calls that it led to.
                Part::Thinking { .. } | Part::Redacted(_) => {}
            }
        }
        // Results stay together, and pictures that came with them follow all.
        written.extend(from_results);
        contents.extend(write_turn(role, written));
    }
    Ok(list(contents))
}

fn write_turn(role: Role, parts: Vec<String>) -> Option<String> {
    let role = match role {
        Role::User => "user",
        Role::Assistant => "model",
    };
    let written = || ObjectText::new().text("role", role).json("parts", &list(&parts)).end();
    (!parts.is_empty()).then(written)
}

/// Whether a model refuses calls of its own that come back without the signature of its thoughts: all
/// do since Gemini 3 (Gemini API, *Thought signatures*).
fn wants_signatures(model: &str) -> bool {
    !is_before_3(model)
}

fn is_before_3(model: &str) -> bool {
    ["gemini-1", "gemini-2", "gemma"].iter().any(|old| model.contains(old))
}

/// What stands in for a signature that a client did not keep, or of a call that another model made;
/// the same page names it.
const NO_SIGNATURE: &str = "skip_thought_signature_validator";

fn write_text(text: &str) -> String {
    ObjectText::new().text("text", text).end()
}

fn write_call(call: &Call, wants_signature: bool) -> String {
    let function = ObjectText::new()
        .text("id", &call.id)
        .text("name", &call.name)
        .json("args", &call.arguments_object())
        .end();
    let signature = call.signature.as_deref().or(wants_signature.then_some(NO_SIGNATURE));
    ObjectText::new().json("functionCall", &function).maybe("thoughtSignature", signature.map(quote)).end()
}

fn write_result(result: &ToolResult, name: &str) -> String {
    let key = if result.is_error { "error" } else { "output" };
    let text = result_text(&ToolResult { is_error: false, ..result.clone() });
    let response = ObjectText::new()
        .text("id", &result.call_id)
        .text("name", name)
        .json("response", &ObjectText::new().text(key, &text).end())
        .end();
    ObjectText::new().json("functionResponse", &response).end()
}

fn media_of(result: &ToolResult) -> impl Iterator<Item = String> {
    result.parts.iter().filter_map(|part| match part {
        Part::Media(media) => Some(write_media(media)),
        _ => None,
    })
}

fn write_media(media: &Media) -> String {
    match &media.source {
        Source::Base64 { media_type, data } => {
            let blob = ObjectText::new().text("mimeType", media_type).text("data", data).end();
            ObjectText::new().json("inlineData", &blob).end()
        }
        Source::Url(url) => {
            let file = ObjectText::new()
                .maybe("mimeType", media_type(url, media.kind).map(quote))
                .text("fileUri", url)
                .end();
            ObjectText::new().json("fileData", &file).end()
        }
        Source::Text(text) => write_text(text),
    }
}

/// The media type that a URL's ending tells, if it does.
fn media_type(url: &str, kind: MediaKind) -> Option<&'static str> {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let ending = path.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    Some(match ending.as_str() {
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "heic" => "image/heic",
        "pdf" => "application/pdf",
        "wav" => "audio/wav",
        "mp3" => "audio/mp3",
        _ if kind == MediaKind::Document => "application/pdf",
        _ => return None,
    })
}

fn write_tool(tool: &Tool) -> String {
    ObjectText::new()
        .text("name", &tool.name)
        .maybe("description", tool.description.as_deref().map(quote))
        .maybe("parametersJsonSchema", tool.parameters.as_ref())
        .end()
}

fn write_tool_choice(choice: &ToolChoice) -> String {
    let mut calling = ObjectText::new();
    match choice {
        ToolChoice::Auto => calling.text("mode", "AUTO"),
        ToolChoice::None => calling.text("mode", "NONE"),
        ToolChoice::Required => calling.text("mode", "ANY"),
        ToolChoice::Named(name) => {
            calling.text("mode", "ANY").json("allowedFunctionNames", &list([quote(name)]))
        }
    };
    ObjectText::new().json("functionCallingConfig", &calling.end()).end()
}

fn write_config(conversation: &Conversation, model: &str) -> Result<String, BadRequest> {
    let sampling = &conversation.sampling;
    let mut config = ObjectText::new();
    config
        .number("maxOutputTokens", conversation.max_tokens)
        .maybe("temperature", sampling.temperature.as_ref())
        .maybe("topP", sampling.top_p.as_ref())
        .maybe("topK", sampling.top_k.as_ref())
        .maybe("seed", sampling.seed.as_ref())
        .maybe("presencePenalty", sampling.presence_penalty.as_ref())
        .maybe("frequencyPenalty", sampling.frequency_penalty.as_ref());
    if !conversation.stop.is_empty() {
        config.json("stopSequences", &list(conversation.stop.iter().map(|stop| quote(stop))));
    }
    if conversation.verbosity.as_deref().is_some_and(|verbosity| verbosity != "medium") {
        return Err(no_place_for(conversation.names.verbosity));
    }
    match &conversation.format {
        None => {}
        Some(Format::Json) => drop(config.text("responseMimeType", "application/json")),
        Some(Format::Schema { schema, .. }) => {
            config.text("responseMimeType", "application/json").json("responseJsonSchema", schema);
        }
    }
    config.maybe("thinkingConfig", write_thinking(conversation, model)?);
    Ok(config.end())
}

/// Models before Gemini 3 are told in tokens how much to think, later ones by a level.
fn write_thinking(conversation: &Conversation, model: &str) -> Result<Option<String>, BadRequest> {
    let reasoning = &conversation.reasoning;
    let mut config = ObjectText::new();
    match (reasoning.thinking, reasoning.effort) {
        // What was not asked for need not be forbidden, and some models cannot help it.
        (Some(Thinking::Off), _) | (None, None) => return Ok(None),
        (Some(Thinking::Budget(tokens)), _) => drop(config.number("thinkingBudget", tokens)),
        (_, Some(Effort::None)) if is_before_3(model) => {
            return Ok(Some(config.number("thinkingBudget", 0).end()));
        }
        (_, Some(Effort::None)) => {
            let message = format!("{model} always thinks: leave the effort out, or ask for little");
            return Err(unsupported(conversation.names.reasoning, message));
        }
        (_, Some(effort)) if is_before_3(model) => drop(config.number("thinkingBudget", budget(effort))),
        (_, Some(effort)) => drop(config.text("thinkingLevel", level(effort))),
        (Some(Thinking::Adaptive), None) => {}
    }
    Ok(Some(config.json("includeThoughts", "true").end()))
}

/// Google's own translation of an effort (Gemini API, *OpenAI compatibility*).
fn budget(effort: Effort) -> u64 {
    match effort {
        Effort::None => 0,
        Effort::Minimal | Effort::Low => 1_024,
        Effort::Medium => 8_192,
        Effort::High | Effort::XHigh | Effort::Max => 24_576,
    }
}

/// The lowest level is not every model's.
fn level(effort: Effort) -> &'static str {
    match effort {
        Effort::None | Effort::Minimal | Effort::Low => "LOW",
        Effort::Medium => "MEDIUM",
        Effort::High | Effort::XHigh | Effort::Max => "HIGH",
    }
}
