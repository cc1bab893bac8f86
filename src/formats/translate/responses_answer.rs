//! Responses answers (OpenAI API reference, *The response object*, *Streaming events*), written, whole
//! and as streams.

use std::collections::BTreeMap;

use crate::formats::conversation::{Block, Call, Counts, Part, Step, Stop, WholeAnswer, mark_google};
use crate::formats::json::{Object, ObjectText, list};
use crate::formats::sse::Event;
use crate::formats::translate::Reply;
use crate::formats::translate::responses_request::{seal, seal_redacted};
use crate::money::MicroUsdc;

/// Members of a request that its answer repeats, with what they are where the request has none.
const REPEATED: &[(&str, &str)] = &[
    ("instructions", "null"),
    ("max_output_tokens", "null"),
    ("metadata", "{}"),
    ("parallel_tool_calls", "true"),
    ("reasoning", r#"{"effort":null,"summary":null}"#),
    ("temperature", "null"),
    ("text", r#"{"format":{"type":"text"}}"#),
    ("tool_choice", r#""auto""#),
    ("tools", "[]"),
    ("top_p", "null"),
];

/// What the answer to a request repeats of it, as an object's text.
pub fn repeated(request: &Object<'_>) -> String {
    let mut written = ObjectText::new();
    for (key, otherwise) in REPEATED {
        written.json(key, request.get_non_null(key).unwrap_or(otherwise));
    }
    written.end()
}

fn write_counts(counts: &Counts, charged: MicroUsdc) -> String {
    let of_input = ObjectText::new()
        .number("cached_tokens", counts.cached)
        .number("cache_write_tokens", counts.cache_written)
        .end();
    let of_output = ObjectText::new().number("reasoning_tokens", counts.reasoning).end();
    ObjectText::new()
        .number("input_tokens", counts.prompt)
        .json("input_tokens_details", &of_input)
        .number("output_tokens", counts.completion)
        .json("output_tokens_details", &of_output)
        .number("total_tokens", counts.prompt.saturating_add(counts.completion))
        .json("charged_usdc", &charged.to_string())
        .end()
}

/// How far a response has come.
enum Status<'a> {
    InProgress,
    Ended { stop: &'a Stop, has_refusal: bool },
}

fn write_response(reply: &Reply, status: &Status<'_>, output: &str, usage: Option<String>) -> String {
    let mut incomplete = None;
    let word = match status {
        Status::InProgress => "in_progress",
        Status::Ended { stop, has_refusal } => {
            incomplete = reason(stop, *has_refusal);
            if incomplete.is_some() { "incomplete" } else { "completed" }
        }
    };
    let incomplete = incomplete.map(|reason| ObjectText::new().text("reason", reason).end());
    let mut written = ObjectText::new();
    written
        .text("id", &format!("resp_{}", reply.id))
        .text("object", "response")
        .json("created_at", &reply.created.to_string())
        .text("status", word)
        .json("background", "false")
        .json("error", "null")
        .json("incomplete_details", incomplete.as_deref().unwrap_or("null"))
        .text("model", &reply.model)
        .json("output", output)
        .json("previous_response_id", "null")
        .json("store", "false")
        .text("truncation", "disabled");
    if let Ok(repeated) = Object::parse(reply.repeated.as_bytes()) {
        for (key, value) in repeated.members() {
            written.json(key, value);
        }
    }
    written.json("usage", usage.as_deref().unwrap_or("null")).end()
}

/// Why a response is not complete, if it is not. A refusal in words is a whole answer.
fn reason(stop: &Stop, has_refusal: bool) -> Option<&'static str> {
    match stop {
        Stop::MaxTokens => Some("max_output_tokens"),
        Stop::Refused if !has_refusal => Some("content_filter"),
        _ => None,
    }
}

/// Writes a whole answer.
pub fn write(answer: &WholeAnswer, reply: &Reply, charged: MicroUsdc) -> String {
    let mut items: Vec<String> = Vec::new();
    for part in &answer.parts {
        let item = |items: &[String], kind: &str| item_id(kind, reply, items.len());
        match part {
            Part::Text(text) => {
                items.push(message(&item(&items, "msg"), "completed", &list([text_part(text)])));
            }
            Part::Refusal(text) => {
                items.push(message(&item(&items, "msg"), "completed", &list([refusal_part(text)])));
            }
            Part::Thinking { text, signature } => {
                items.push(reasoning(&item(&items, "rs"), text, &seal(signature.as_deref())));
            }
            Part::Redacted(data) => {
                items.push(reasoning(&item(&items, "rs"), "", &seal_redacted(data)));
            }
            Part::Call(call) => {
                if let Some(signature) = &call.signature {
                    items.push(reasoning(&item(&items, "rs"), "", &mark_google(signature)));
                }
                items.push(function_call(&item(&items, "fc"), "completed", call));
            }
            Part::Media(_) | Part::Result(_) => {}
        }
    }
    let has_refusal = answer.parts.iter().any(|part| matches!(part, Part::Refusal(_)));
    let status = Status::Ended { stop: &answer.stop, has_refusal };
    let usage = answer.counts.map(|counts| write_counts(&counts, charged));
    write_response(reply, &status, &list(items), usage)
}

fn item_id(kind: &str, reply: &Reply, number: usize) -> String {
    format!("{kind}_{}_{number}", reply.id)
}

fn text_part(text: &str) -> String {
    ObjectText::new()
        .text("type", "output_text")
        .text("text", text)
        .json("annotations", "[]")
        .json("logprobs", "[]")
        .end()
}

fn refusal_part(text: &str) -> String {
    ObjectText::new().text("type", "refusal").text("refusal", text).end()
}

fn message(id: &str, status: &str, content: &str) -> String {
    ObjectText::new()
        .text("id", id)
        .text("type", "message")
        .text("status", status)
        .text("role", "assistant")
        .json("content", content)
        .end()
}

fn summary_part(text: &str) -> String {
    ObjectText::new().text("type", "summary_text").text("text", text).end()
}

/// A thought. It is always sealed, if only to say that it is not: what comes back is then known from
/// what OpenAI keeps under an id.
fn reasoning(id: &str, text: &str, sealed: &str) -> String {
    let summary = if text.is_empty() { "[]".to_owned() } else { list([summary_part(text)]) };
    ObjectText::new()
        .text("id", id)
        .text("type", "reasoning")
        .json("summary", &summary)
        .text("encrypted_content", sealed)
        .end()
}

fn function_call(id: &str, status: &str, call: &Call) -> String {
    ObjectText::new()
        .text("id", id)
        .text("type", "function_call")
        .text("status", status)
        .text("call_id", &call.id)
        .text("name", &call.name)
        .text("arguments", &call.arguments)
        .end()
}

/// Writes a stream.
#[derive(Default)]
pub struct StreamWriter {
    has_begun: bool,
    sequence: u64,
    /// Items that have begun, by the number of their block; their places are in the order they began.
    open: BTreeMap<usize, Item>,
    /// All items, the finished as they are.
    items: Vec<Option<String>>,
    stop: Option<Stop>,
    has_refusal: bool,
    counts: Option<Counts>,
}

struct Item {
    place: usize,
    id: String,
    kind: Kind,
    text: String,
    sealed: String,
}

enum Kind {
    Text,
    Refusal,
    Thinking,
    Call { id: String, name: String },
}

impl StreamWriter {
    pub fn step(&mut self, step: &Step, reply: &Reply, out: &mut Vec<u8>) {
        if !matches!(step, Step::Counts(_)) {
            self.begin(reply, out);
        }
        match step {
            Step::Open { index, block } => self.open(*index, block, reply, out),
            Step::More { index, text } => self.more(*index, text, out),
            Step::Signature { index, signature } => {
                if let Some(item) = self.open.get_mut(index) {
                    item.sealed.push_str(signature);
                }
            }
            Step::Close { index } => {
                if let Some(item) = self.open.remove(index) {
                    self.close(&item, "completed", out);
                }
            }
            Step::Stop(stop) => self.stop = Some(stop.clone()),
            Step::Counts(counts) => self.counts = Some(*counts),
        }
    }

    fn begin(&mut self, reply: &Reply, out: &mut Vec<u8>) {
        if self.has_begun {
            return;
        }
        self.has_begun = true;
        let response = write_response(reply, &Status::InProgress, "[]", None);
        for name in ["response.created", "response.in_progress"] {
            self.event(name, ObjectText::new().json("response", &response), out);
        }
    }

    /// An event of this type, with its number in the stream.
    fn event(&mut self, name: &str, members: &mut ObjectText, out: &mut Vec<u8>) {
        let event = members.text("type", name).number("sequence_number", self.sequence).end();
        self.sequence += 1;
        out.extend_from_slice(&Event::named(name, event.as_bytes()));
    }

    fn open(&mut self, index: usize, block: &Block, reply: &Reply, out: &mut Vec<u8>) {
        let kind = match block {
            Block::Text => Kind::Text,
            Block::Refusal => Kind::Refusal,
            Block::Thinking => Kind::Thinking,
            Block::Redacted(data) => {
                let item = reasoning(&self.next_id("rs", reply), "", &seal_redacted(data));
                return self.whole_item(item, out);
            }
            Block::Call { id, name, signature } => {
                if let Some(signature) = signature {
                    let sealed = mark_google(signature);
                    let item = reasoning(&self.next_id("rs", reply), "", &sealed);
                    self.whole_item(item, out);
                }
                Kind::Call { id: id.clone(), name: name.clone() }
            }
        };
        let id = self.next_id(kind.prefix(), reply);
        let item = Item { place: self.items.len(), id, kind, text: String::new(), sealed: String::new() };
        self.items.push(None);
        let begun = item.write("in_progress");
        let place = item.place;
        self.event("response.output_item.added", &mut item_event(place, &begun), out);
        if let Some(part) = item.content_part() {
            self.event("response.content_part.added", item.part_event().json("part", &part), out);
        }
        self.has_refusal |= matches!(item.kind, Kind::Refusal);
        self.open.insert(index, item);
    }

    fn next_id(&self, kind: &str, reply: &Reply) -> String {
        item_id(kind, reply, self.items.len())
    }

    /// An item that comes at once.
    fn whole_item(&mut self, item: String, out: &mut Vec<u8>) {
        let place = self.items.len();
        self.event("response.output_item.added", &mut item_event(place, &item), out);
        self.event("response.output_item.done", &mut item_event(place, &item), out);
        self.items.push(Some(item));
    }

    fn more(&mut self, index: usize, text: &str, out: &mut Vec<u8>) {
        let Some(mut item) = self.open.remove(&index) else { return };
        match item.kind {
            Kind::Text => {
                let mut event = item.part_event();
                event.text("delta", text).json("logprobs", "[]");
                self.event("response.output_text.delta", &mut event, out);
            }
            Kind::Refusal => self.event("response.refusal.delta", item.part_event().text("delta", text), out),
            Kind::Thinking => {
                if item.text.is_empty() {
                    let mut event = item.summary_event();
                    event.json("part", &summary_part(""));
                    self.event("response.reasoning_summary_part.added", &mut event, out);
                }
                let mut event = item.summary_event();
                self.event("response.reasoning_summary_text.delta", event.text("delta", text), out);
            }
            Kind::Call { .. } => {
                let mut event = item.event();
                self.event("response.function_call_arguments.delta", event.text("delta", text), out);
            }
        }
        item.text.push_str(text);
        self.open.insert(index, item);
    }

    fn close(&mut self, item: &Item, status: &str, out: &mut Vec<u8>) {
        match &item.kind {
            Kind::Text => {
                let mut event = item.part_event();
                event.text("text", &item.text).json("logprobs", "[]");
                self.event("response.output_text.done", &mut event, out);
            }
            Kind::Refusal => {
                self.event("response.refusal.done", item.part_event().text("refusal", &item.text), out);
            }
            Kind::Thinking if item.text.is_empty() => {}
            Kind::Thinking => {
                let mut event = item.summary_event();
                self.event("response.reasoning_summary_text.done", event.text("text", &item.text), out);
                let mut event = item.summary_event();
                event.json("part", &summary_part(&item.text));
                self.event("response.reasoning_summary_part.done", &mut event, out);
            }
            Kind::Call { name, .. } => {
                let mut event = item.event();
                event.text("name", name).text("arguments", &item.text);
                self.event("response.function_call_arguments.done", &mut event, out);
            }
        }
        if let Some(part) = item.content_part() {
            self.event("response.content_part.done", item.part_event().json("part", &part), out);
        }
        let done = item.write(status);
        self.event("response.output_item.done", &mut item_event(item.place, &done), out);
        self.items[item.place] = Some(done);
    }

    fn close_all(&mut self, status: &str, out: &mut Vec<u8>) {
        for item in std::mem::take(&mut self.open).into_values() {
            self.close(&item, status, out);
        }
    }

    /// What ends the stream when it is settled: the whole response once more.
    pub fn last(&mut self, reply: &Reply, charged: MicroUsdc) -> Vec<u8> {
        let mut out = Vec::new();
        self.begin(reply, &mut out);
        let stop = self.stop.clone().unwrap_or(Stop::End);
        let incomplete = reason(&stop, self.has_refusal).is_some();
        self.close_all(if incomplete { "incomplete" } else { "completed" }, &mut out);
        let status = Status::Ended { stop: &stop, has_refusal: self.has_refusal };
        let usage = self.counts.map(|counts| write_counts(&counts, charged));
        let response = write_response(reply, &status, &list(self.items.iter().flatten()), usage);
        let name = if incomplete { "response.incomplete" } else { "response.completed" };
        self.event(name, ObjectText::new().json("response", &response), &mut out);
        out
    }

    /// The number that the next event has.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
}

impl Kind {
    fn prefix(&self) -> &'static str {
        match self {
            Self::Text | Self::Refusal => "msg",
            Self::Thinking => "rs",
            Self::Call { .. } => "fc",
        }
    }
}

impl Item {
    fn write(&self, status: &str) -> String {
        let is_done = status != "in_progress";
        match &self.kind {
            Kind::Text | Kind::Refusal => {
                let part = self.content_part().filter(|_| is_done);
                message(&self.id, status, &list(part))
            }
            Kind::Thinking => {
                let signature = Some(self.sealed.as_str()).filter(|signature| !signature.is_empty());
                reasoning(&self.id, &self.text, &seal(signature))
            }
            Kind::Call { id, name } => {
                let call = Call {
                    id: id.clone(),
                    name: name.clone(),
                    arguments: self.text.clone(),
                    signature: None,
                };
                function_call(&self.id, status, &call)
            }
        }
    }

    /// The one part of a message, as far as it is told.
    fn content_part(&self) -> Option<String> {
        match self.kind {
            Kind::Text => Some(text_part(&self.text)),
            Kind::Refusal => Some(refusal_part(&self.text)),
            Kind::Thinking | Kind::Call { .. } => None,
        }
    }

    /// The members that events about an item have …
    fn event(&self) -> ObjectText {
        let mut event = ObjectText::new();
        event.text("item_id", &self.id).json("output_index", &self.place.to_string());
        event
    }

    /// … about its one part …
    fn part_event(&self) -> ObjectText {
        let mut event = self.event();
        event.number("content_index", 0);
        event
    }

    /// … and about its one summary.
    fn summary_event(&self) -> ObjectText {
        let mut event = self.event();
        event.number("summary_index", 0);
        event
    }
}

fn item_event(place: usize, item: &str) -> ObjectText {
    let mut event = ObjectText::new();
    event.json("output_index", &place.to_string()).json("item", item);
    event
}
