//! Messages answers (Anthropic API reference, *Create a Message*, *Streaming Messages*), read and
//! written, whole and as streams.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::formats::answer::NotAnAnswer;
use crate::formats::conversation::{Block, Call, Counts, Part, Step, Stop, WholeAnswer, mark_google};
use crate::formats::json::{ObjectText, list, quote};
use crate::formats::messages::Usage;
use crate::formats::sse::Event;
use crate::formats::translate::messages_request::{
    write_call, write_call_signature, write_redacted, write_text, write_thinking,
};
use crate::formats::translate::{Heard, Reply};
use crate::money::MicroUsdc;

#[derive(Deserialize)]
struct Message<'a> {
    r#type: String,
    #[serde(borrow)]
    content: Option<Vec<ContentBlock<'a>>>,
    stop_reason: Option<String>,
    stop_sequence: Option<String>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

/// Blocks of other types than these come only of tools that the provider runs itself.
#[derive(Deserialize)]
struct ContentBlock<'a> {
    r#type: String,
    text: Option<String>,
    thinking: Option<String>,
    signature: Option<String>,
    data: Option<String>,
    id: Option<String>,
    name: Option<String>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
}

fn read_stop(reason: &str, sequence: Option<String>) -> Stop {
    match reason {
        "max_tokens" | "model_context_window_exceeded" => Stop::MaxTokens,
        "stop_sequence" => Stop::Sequence(sequence),
        "tool_use" => Stop::Calls,
        "refusal" => Stop::Refused,
        _ => Stop::End,
    }
}

/// Reads a whole answer.
pub fn read(body: &[u8]) -> Result<WholeAnswer, NotAnAnswer> {
    let message: Message<'_> = serde_json::from_slice(body).map_err(|_| NotAnAnswer::Nonsense)?;
    if message.r#type == "error" {
        return Err(NotAnAnswer::Error);
    }
    let content = message.content.ok_or(NotAnAnswer::Nonsense)?;
    let stop = message.stop_reason.as_deref();
    Ok(WholeAnswer {
        parts: content.into_iter().filter_map(read_block).collect(),
        stop: stop.map_or(Stop::End, |reason| read_stop(reason, message.stop_sequence)),
        counts: message.usage.and_then(|raw| counts(raw.get())),
    })
}

fn read_block(block: ContentBlock<'_>) -> Option<Part> {
    Some(match block.r#type.as_str() {
        "text" => Part::Text(block.text?),
        "thinking" => Part::Thinking {
            text: block.thinking?,
            signature: block.signature.filter(|signature| !signature.is_empty()),
        },
        "redacted_thinking" => Part::Redacted(block.data?),
        "tool_use" => Part::Call(Call {
            id: block.id?,
            name: block.name?,
            arguments: block.input.map_or("{}", RawValue::get).to_owned(),
            signature: None,
        }),
        _ => return None,
    })
}

/// Reads a report of usage: what came from the cache or went into it is beside the input.
pub fn counts(raw: &str) -> Option<Counts> {
    #[derive(Deserialize)]
    struct Report {
        input_tokens: Option<u64>,
        output_tokens: u64,
        cache_read_input_tokens: Option<u64>,
        cache_creation_input_tokens: Option<u64>,
        output_tokens_details: Option<OfOutput>,
    }
    #[derive(Deserialize)]
    struct OfOutput {
        thinking_tokens: Option<u64>,
    }
    let report: Report = serde_json::from_str(raw).ok()?;
    let cached = report.cache_read_input_tokens.unwrap_or(0);
    let cache_written = report.cache_creation_input_tokens.unwrap_or(0);
    Some(Counts {
        prompt: report.input_tokens.unwrap_or(0).saturating_add(cached).saturating_add(cache_written),
        cached,
        cache_written,
        completion: report.output_tokens,
        reasoning: report.output_tokens_details.and_then(|of| of.thinking_tokens).unwrap_or(0),
    })
}

#[derive(Deserialize)]
struct Piece<'a> {
    r#type: String,
    index: Option<u64>,
    #[serde(borrow)]
    message: Option<Start<'a>>,
    #[serde(borrow)]
    content_block: Option<ContentBlock<'a>>,
    delta: Option<Delta>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Start<'a> {
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Delta {
    text: Option<String>,
    thinking: Option<String>,
    signature: Option<String>,
    partial_json: Option<String>,
    stop_reason: Option<String>,
    stop_sequence: Option<String>,
}

/// Reads a stream.
#[derive(Default)]
pub struct StreamReader {
    opened: usize,
    /// The numbers that open blocks have in the stream, and here.
    open: Vec<(u64, usize)>,
    finished: bool,
    usage: Usage,
    reported_at_end: bool,
}

impl StreamReader {
    pub fn event(&mut self, data: &[u8], steps: &mut Vec<Step>) -> Heard {
        let Ok(piece) = serde_json::from_slice::<Piece<'_>>(data) else { return Heard::Nonsense };
        match piece.r#type.as_str() {
            "error" => return Heard::Failed,
            "message_stop" => return Heard::Done,
            "message_start" => self.report(piece.message.and_then(|message| message.usage), steps),
            "content_block_start" => {
                if let (Some(number), Some(block)) = (piece.index, piece.content_block) {
                    self.start(number, block, steps);
                }
            }
            "content_block_delta" => {
                if let (Some(number), Some(delta)) = (piece.index, piece.delta) {
                    self.delta(number, delta, steps);
                }
            }
            "content_block_stop" => {
                let stopped = self.open.iter().position(|(number, _)| Some(*number) == piece.index);
                if let Some(at) = stopped {
                    let (_, index) = self.open.remove(at);
                    steps.push(Step::Close { index });
                }
            }
            "message_delta" => {
                self.reported_at_end |= piece.usage.is_some();
                self.report(piece.usage, steps);
                let delta = piece.delta;
                if let Some(Delta { stop_reason: Some(reason), stop_sequence, .. }) = delta {
                    self.finished = true;
                    steps.push(Step::Stop(read_stop(&reason, stop_sequence)));
                }
            }
            _ => {}
        }
        Heard::Steps
    }

    fn report(&mut self, usage: Option<&RawValue>, steps: &mut Vec<Step>) {
        if let Some(usage) = usage {
            self.usage.merge(usage.get());
            steps.extend(self.usage.raw().and_then(counts).map(Step::Counts));
        }
    }

    fn start(&mut self, number: u64, block: ContentBlock<'_>, steps: &mut Vec<Step>) {
        let (opened, text) = match block.r#type.as_str() {
            "text" => (Block::Text, block.text),
            "thinking" => (Block::Thinking, block.thinking),
            "redacted_thinking" => (Block::Redacted(block.data.unwrap_or_default()), None),
            "tool_use" => {
                let (id, name) = (block.id.unwrap_or_default(), block.name.unwrap_or_default());
                (Block::Call { id, name, signature: None }, None)
            }
            _ => return,
        };
        let index = self.opened;
        self.opened += 1;
        self.open.push((number, index));
        steps.push(Step::Open { index, block: opened });
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            steps.push(Step::More { index, text });
        }
    }

    fn delta(&mut self, number: u64, delta: Delta, steps: &mut Vec<Step>) {
        let Some((_, index)) = self.open.iter().find(|(at, _)| *at == number) else { return };
        let index = *index;
        let text = delta.text.or(delta.thinking).or(delta.partial_json).filter(|text| !text.is_empty());
        steps.extend(text.map(|text| Step::More { index, text }));
        steps.extend(delta.signature.map(|signature| Step::Signature { index, signature }));
    }

    pub fn usage_raw(&self) -> Option<&str> {
        self.usage.raw()
    }

    pub fn is_reported_at_end(&self) -> bool {
        self.reported_at_end
    }

    pub fn is_finished(&self) -> bool {
        self.finished
    }
}

fn write_stop(stop: &Stop) -> &'static str {
    match stop {
        Stop::End => "end_turn",
        Stop::MaxTokens => "max_tokens",
        Stop::Sequence(_) => "stop_sequence",
        Stop::Calls => "tool_use",
        Stop::Refused => "refusal",
    }
}

fn write_sequence(stop: &Stop) -> String {
    match stop {
        Stop::Sequence(Some(sequence)) => quote(sequence),
        _ => "null".to_owned(),
    }
}

/// Writes a report of usage; what came from the cache or went into it is beside the input.
fn write_counts(counts: &Counts, charged: Option<MicroUsdc>) -> String {
    let input = counts.prompt.saturating_sub(counts.cached).saturating_sub(counts.cache_written);
    ObjectText::new()
        .number("input_tokens", input)
        .number("cache_creation_input_tokens", counts.cache_written)
        .number("cache_read_input_tokens", counts.cached)
        .number("output_tokens", counts.completion)
        .maybe("charged_usdc", charged.map(|charged| charged.to_string()))
        .end()
}

/// Writes a whole answer. A client reads its usage without asking, so that where the upstream reports
/// none there are zeros.
pub fn write(answer: &WholeAnswer, reply: &Reply, charged: MicroUsdc) -> String {
    let mut blocks = Vec::new();
    for part in &answer.parts {
        match part {
            Part::Text(text) | Part::Refusal(text) => blocks.push(write_text(text)),
            Part::Thinking { text, signature } => {
                blocks.push(write_thinking(text, signature.as_deref().unwrap_or_default()));
            }
            Part::Redacted(data) => blocks.push(write_redacted(data)),
            Part::Call(call) => {
                blocks.extend(write_call_signature(call));
                blocks.push(write_call(call));
            }
            Part::Media(_) | Part::Result(_) => {}
        }
    }
    let counts = answer.counts.unwrap_or_default();
    let usage = write_counts(&counts, Some(charged));
    write_message(reply, &list(blocks), Some(&answer.stop), &usage)
}

fn write_message(reply: &Reply, content: &str, stop: Option<&Stop>, usage: &str) -> String {
    ObjectText::new()
        .text("id", &format!("msg_{}", reply.id))
        .text("type", "message")
        .text("role", "assistant")
        .text("model", &reply.model)
        .json("content", content)
        .json("stop_reason", &stop.map_or_else(|| "null".to_owned(), |stop| quote(write_stop(stop))))
        .json("stop_sequence", &stop.map_or_else(|| "null".to_owned(), write_sequence))
        .json("usage", usage)
        .end()
}

/// Writes a stream.
#[derive(Default)]
pub struct StreamWriter {
    has_begun: bool,
    opened: u64,
    /// Open blocks: their numbers in the answer and in the stream, and how more of them is called.
    open: Vec<(usize, u64, More)>,
    stop: Option<Stop>,
    counts: Counts,
}

#[derive(Copy, Clone)]
enum More {
    Text,
    Thinking,
    Input,
}

impl StreamWriter {
    pub fn step(&mut self, step: &Step, reply: &Reply, out: &mut Vec<u8>) {
        if !matches!(step, Step::Counts(_)) {
            self.begin(reply, out);
        }
        match step {
            Step::Open { index, block } => self.open(*index, block, out),
            Step::More { index, text } => {
                if let Some((number, more)) = self.number(*index) {
                    write_delta(number, &write_more(more, text), out);
                }
            }
            Step::Signature { index, signature } => {
                if let Some((number, _)) = self.number(*index) {
                    write_delta(number, &write_signature(signature), out);
                }
            }
            Step::Close { index } => {
                if let Some((number, _)) = self.number(*index) {
                    self.open.retain(|(at, ..)| at != index);
                    write_end(number, out);
                }
            }
            Step::Stop(stop) => self.stop = Some(stop.clone()),
            Step::Counts(counts) => self.counts = *counts,
        }
    }

    fn begin(&mut self, reply: &Reply, out: &mut Vec<u8>) {
        if self.has_begun {
            return;
        }
        self.has_begun = true;
        let usage = write_counts(&self.counts, None);
        let message = write_message(reply, "[]", None, &usage);
        let start = ObjectText::new().text("type", "message_start").json("message", &message).end();
        out.extend_from_slice(&Event::named("message_start", start.as_bytes()));
    }

    fn number(&self, index: usize) -> Option<(u64, More)> {
        self.open.iter().find(|(at, ..)| *at == index).map(|(_, number, more)| (*number, *more))
    }

    fn open(&mut self, index: usize, block: &Block, out: &mut Vec<u8>) {
        let (content, more) = match block {
            Block::Text | Block::Refusal => (write_text(""), More::Text),
            Block::Thinking => (write_thinking("", ""), More::Thinking),
            Block::Redacted(data) => (write_redacted(data), More::Thinking),
            Block::Call { id, name, signature } => {
                if let Some(signature) = signature {
                    let number = self.start(&write_thinking("", ""), out);
                    write_delta(number, &write_signature(&mark_google(signature)), out);
                    write_end(number, out);
                }
                let call =
                    Call { id: id.clone(), name: name.clone(), arguments: String::new(), signature: None };
                (write_call(&call), More::Input)
            }
        };
        let number = self.start(&content, out);
        self.open.push((index, number, more));
    }

    fn start(&mut self, content: &str, out: &mut Vec<u8>) -> u64 {
        let number = self.opened;
        self.opened += 1;
        let start = ObjectText::new()
            .text("type", "content_block_start")
            .number("index", number)
            .json("content_block", content)
            .end();
        out.extend_from_slice(&Event::named("content_block_start", start.as_bytes()));
        number
    }

    /// What ends the stream when it is settled: why it ended, its usage, and that it has.
    pub fn last(&mut self, reply: &Reply, charged: MicroUsdc) -> Vec<u8> {
        let mut out = Vec::new();
        self.begin(reply, &mut out);
        for (_, number, _) in self.open.drain(..) {
            write_end(number, &mut out);
        }
        let stop = self.stop.clone().unwrap_or(Stop::End);
        let delta = ObjectText::new()
            .text("stop_reason", write_stop(&stop))
            .json("stop_sequence", &write_sequence(&stop))
            .end();
        let last = ObjectText::new()
            .text("type", "message_delta")
            .json("delta", &delta)
            .json("usage", &write_counts(&self.counts, Some(charged)))
            .end();
        out.extend_from_slice(&Event::named("message_delta", last.as_bytes()));
        out.extend_from_slice(&Event::named("message_stop", br#"{"type":"message_stop"}"#));
        out
    }
}

fn write_more(more: More, text: &str) -> String {
    let (kind, field) = match more {
        More::Text => ("text_delta", "text"),
        More::Thinking => ("thinking_delta", "thinking"),
        More::Input => ("input_json_delta", "partial_json"),
    };
    ObjectText::new().text("type", kind).text(field, text).end()
}

fn write_signature(signature: &str) -> String {
    ObjectText::new().text("type", "signature_delta").text("signature", signature).end()
}

fn write_delta(number: u64, delta: &str, out: &mut Vec<u8>) {
    let delta = ObjectText::new()
        .text("type", "content_block_delta")
        .number("index", number)
        .json("delta", delta)
        .end();
    out.extend_from_slice(&Event::named("content_block_delta", delta.as_bytes()));
}

fn write_end(number: u64, out: &mut Vec<u8>) {
    let stop = ObjectText::new().text("type", "content_block_stop").number("index", number).end();
    out.extend_from_slice(&Event::named("content_block_stop", stop.as_bytes()));
}
