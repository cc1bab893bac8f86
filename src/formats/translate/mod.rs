//! One format's requests and answers made another's, by way of a
//! [`Conversation`](crate::formats::conversation::Conversation).
//!
//! What has no place in the other format is refused by name, and not left out, but for what is
//! listed as harmless here and at each reader.

pub mod chat_answer;
pub mod chat_request;
pub mod gemini_answer;
pub mod gemini_request;
pub mod messages_answer;
pub mod messages_request;
pub mod responses_answer;
pub mod responses_request;
#[cfg(test)]
mod round_trips;

use crate::formats::conversation::{Part, ToolResult};
use crate::formats::members::Members;
use crate::formats::request::{BadRequest, unsupported};

/// What an answer says of itself to its client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// The request's own id; the answer's, its items' and its calls' are made of it.
    pub id: String,
    /// The model, by the name that the client asked for.
    pub model: String,
    /// Unix seconds.
    pub created: i64,
    /// Whether a chat client asked for the usage of its stream.
    pub wants_usage: bool,
    /// What a responses client is told again of its request, as an object's text.
    pub repeated: String,
}

/// What an event of an upstream's stream came to.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Heard {
    /// The steps that it added, if any.
    Steps,
    /// The stream is complete.
    Done,
    /// The upstream says that it failed.
    Failed,
    Nonsense,
}

/// The id of a call that its provider has given none.
fn call_id(seed: &str, number: usize) -> String {
    format!("call_{seed}_{number}")
}

/// What may be left out anywhere: names that a provider files a request under, and hints on how it
/// keeps it in its caches. The answer is the same without.
const HARMLESS: &[&str] = &[
    "metadata",
    "client_metadata",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "cache_control",
    "diagnostics",
    "service_tier",
    "context_management",
    "speed",
];

fn no_place_for(field: &str) -> BadRequest {
    unsupported(field, format!("{field} has no place in this model's API: leave it out"))
}

/// As much of what a client sent as is told it again.
const SHOWN_CHARS: usize = 100;

/// The refusal of a part, a tool or a message of its kind, which `key` says.
fn refuse_kind(members: &Members<'_>, key: &str, advice: &str) -> BadRequest {
    let at = members.at(key);
    let value: String = members.json(key).unwrap_or("null").chars().take(SHOWN_CHARS).collect();
    unsupported(&at, format!("{at} is {value}, which this model's API has no place for: {advice}"))
}

/// Texts as one; anything else among them is an error at `place`.
fn join_texts(parts: &[Part], place: &str) -> Result<String, BadRequest> {
    let text = |part: &Part| match part {
        Part::Text(text) => Ok(text.clone()),
        _ => Err(unsupported(place, format!("{place} can only hold text"))),
    };
    Ok(parts.iter().map(text).collect::<Result<Vec<_>, _>>()?.join("\n\n"))
}

/// The texts of a tool's result. Where nothing else says that it is an error, its words do.
fn result_text(result: &ToolResult) -> String {
    let texts: Vec<&str> = result
        .parts
        .iter()
        .filter_map(|part| match part {
            Part::Text(text) => Some(text.as_str()),
            _ => None,
        })
        .collect();
    let text = texts.join("\n\n");
    if result.is_error { format!("Error: {text}") } else { text }
}
