//! Chat completions answers (OpenAI API reference, *The chat completion object*, *The chat completion
//! chunk object*), read and written, whole and as streams.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::formats::answer::NotAnAnswer;
use crate::formats::conversation::{Block, Call, Counts, Part, Step, Stop, WholeAnswer};
use crate::formats::json::{ObjectText, list, quote};
use crate::formats::sse::Event;
use crate::formats::translate::chat_request::{write_call, write_signature};
use crate::formats::translate::messages_request::{write_redacted, write_thinking};
use crate::formats::translate::{Heard, Reply, call_id};
use crate::money::MicroUsdc;
use crate::pricing::{Dialect, Reported};

#[derive(Deserialize)]
struct Completion<'a> {
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, alias = "message")]
    delta: Option<Delta<'a>>,
    finish_reason: Option<String>,
}

/// A message, or more of one. Thoughts stand in a field that some providers call otherwise.
#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    refusal: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    tool_calls: Option<Vec<ToolCall>>,
}

#[derive(Deserialize)]
struct ToolCall {
    index: Option<usize>,
    id: Option<String>,
    function: Option<Function>,
    extra_content: Option<Extra>,
}

#[derive(Deserialize)]
struct Function {
    name: Option<String>,
    arguments: Option<String>,
}

#[derive(Deserialize)]
struct Extra {
    google: Option<Google>,
}

#[derive(Deserialize)]
struct Google {
    thought_signature: Option<String>,
}

impl Delta<'_> {
    fn thoughts(&self) -> Option<&str> {
        self.reasoning_content.as_deref().or(self.reasoning.as_deref()).filter(|text| !text.is_empty())
    }

    /// A text, which a few providers send as a list of parts.
    fn text(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct TextPart {
            text: Option<String>,
        }
        let raw = self.content?.get();
        let text = serde_json::from_str::<String>(raw).ok().or_else(|| {
            let parts: Vec<TextPart> = serde_json::from_str(raw).ok()?;
            Some(parts.into_iter().filter_map(|part| part.text).collect())
        })?;
        Some(text).filter(|text| !text.is_empty())
    }

    fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref().filter(|text| !text.is_empty())
    }
}

impl ToolCall {
    fn signature(&self) -> Option<String> {
        self.extra_content.as_ref()?.google.as_ref()?.thought_signature.clone()
    }

    fn name(&self) -> Option<&str> {
        self.function.as_ref()?.name.as_deref().filter(|name| !name.is_empty())
    }

    fn arguments(&self) -> &str {
        self.function.as_ref().and_then(|function| function.arguments.as_deref()).unwrap_or_default()
    }
}

fn read_stop(reason: &str) -> Stop {
    match reason {
        "length" => Stop::MaxTokens,
        "tool_calls" | "function_call" => Stop::Calls,
        "content_filter" => Stop::Refused,
        _ => Stop::End,
    }
}

/// Reads a whole answer; calls that have no id get one from `seed`.
pub fn read(body: &[u8], seed: &str) -> Result<WholeAnswer, NotAnAnswer> {
    let completion: Completion<'_> = serde_json::from_slice(body).map_err(|_| NotAnAnswer::Nonsense)?;
    if completion.error.is_some() {
        return Err(NotAnAnswer::Error);
    }
    let choice = completion.choices.and_then(|choices| choices.into_iter().next());
    let choice = choice.ok_or(NotAnAnswer::Nonsense)?;
    let mut parts = Vec::new();
    if let Some(message) = choice.delta {
        if let Some(text) = message.thoughts() {
            parts.push(Part::Thinking { text: text.to_owned(), signature: None });
        }
        parts.extend(message.text().map(Part::Text));
        parts.extend(message.refusal().map(|text| Part::Refusal(text.to_owned())));
        for (i, call) in message.tool_calls.unwrap_or_default().into_iter().enumerate() {
            parts.push(Part::Call(Call {
                name: call.name().unwrap_or_default().to_owned(),
                arguments: call.arguments().to_owned(),
                signature: call.signature(),
                id: call.id.unwrap_or_else(|| call_id(seed, i)),
            }));
        }
    }
    let stop = choice.finish_reason.as_deref().map_or(Stop::End, read_stop);
    Ok(WholeAnswer { stop, counts: completion.usage.and_then(|raw| counts(raw.get())), parts })
}

/// Reads a report of usage: what was cached and thought is within the totals.
pub fn counts(raw: &str) -> Option<Counts> {
    #[derive(Deserialize)]
    struct Report {
        prompt_tokens: u64,
        completion_tokens: u64,
        prompt_tokens_details: Option<OfPrompt>,
        completion_tokens_details: Option<OfCompletion>,
    }
    #[derive(Deserialize)]
    struct OfPrompt {
        cached_tokens: Option<u64>,
        cache_write_tokens: Option<u64>,
    }
    #[derive(Deserialize)]
    struct OfCompletion {
        reasoning_tokens: Option<u64>,
    }
    let report: Report = serde_json::from_str(raw).ok()?;
    let of_prompt = report.prompt_tokens_details;
    Some(Counts {
        prompt: report.prompt_tokens,
        cached: of_prompt.as_ref().and_then(|of| of.cached_tokens).unwrap_or(0),
        cache_written: of_prompt.as_ref().and_then(|of| of.cache_write_tokens).unwrap_or(0),
        completion: report.completion_tokens,
        reasoning: report.completion_tokens_details.and_then(|of| of.reasoning_tokens).unwrap_or(0),
    })
}

/// Reads a stream.
pub struct StreamReader {
    seed: String,
    opened: usize,
    /// The text, thought or refusal that is being told.
    prose: Option<(Prose, usize)>,
    calls: Vec<OpenCall>,
    finished: bool,
    usage_raw: Option<String>,
    reported_at_end: bool,
}

#[derive(Copy, Clone, PartialEq, Eq)]
enum Prose {
    Text,
    Thinking,
    Refusal,
}

struct OpenCall {
    /// Its number and id in the stream.
    number: usize,
    id: Option<String>,
    block: usize,
    arguments: String,
    is_closed: bool,
}

impl StreamReader {
    /// Calls that have no id get one from `seed`.
    pub fn new(seed: &str) -> Self {
        Self {
            seed: seed.to_owned(),
            opened: 0,
            prose: None,
            calls: Vec::new(),
            finished: false,
            usage_raw: None,
            reported_at_end: false,
        }
    }

    pub fn event(&mut self, data: &[u8], steps: &mut Vec<Step>) -> Heard {
        if data.trim_ascii() == b"[DONE]" {
            return Heard::Done;
        }
        let Ok(chunk) = serde_json::from_slice::<Completion<'_>>(data) else { return Heard::Nonsense };
        if chunk.error.is_some() {
            return Heard::Failed;
        }
        let choice = chunk.choices.and_then(|choices| choices.into_iter().next());
        if let Some(usage) =
            chunk.usage.map(RawValue::get).filter(|raw| Reported::read(Dialect::OpenAi, raw).is_some())
        {
            self.reported_at_end |= choice.is_none();
            self.usage_raw = Some(usage.to_owned());
            steps.extend(counts(usage).map(Step::Counts));
        }
        let Some(choice) = choice else { return Heard::Steps };
        if let Some(delta) = choice.delta
            && !self.delta(&delta, steps)
        {
            return Heard::Nonsense;
        }
        if let Some(reason) = choice.finish_reason.filter(|reason| !reason.is_empty() && !self.finished) {
            self.close_prose(steps);
            self.close_calls(true, steps);
            self.finished = true;
            steps.push(Step::Stop(read_stop(&reason)));
        }
        Heard::Steps
    }

    /// `false` if a call goes on that was over.
    fn delta(&mut self, delta: &Delta<'_>, steps: &mut Vec<Step>) -> bool {
        if let Some(text) = delta.thoughts() {
            self.prose(Prose::Thinking, text.to_owned(), steps);
        }
        if let Some(text) = delta.text() {
            self.prose(Prose::Text, text, steps);
        }
        if let Some(text) = delta.refusal() {
            self.prose(Prose::Refusal, text.to_owned(), steps);
        }
        delta.tool_calls.iter().flatten().all(|call| self.call(call, steps))
    }

    fn open(&mut self, block: Block, steps: &mut Vec<Step>) -> usize {
        self.close_prose(steps);
        self.close_calls(false, steps);
        let index = self.opened;
        self.opened += 1;
        steps.push(Step::Open { index, block });
        index
    }

    fn prose(&mut self, kind: Prose, text: String, steps: &mut Vec<Step>) {
        let index = match self.prose {
            Some((open, index)) if open == kind => index,
            _ => {
                let block = match kind {
                    Prose::Text => Block::Text,
                    Prose::Thinking => Block::Thinking,
                    Prose::Refusal => Block::Refusal,
                };
                self.open(block, steps)
            }
        };
        self.prose = Some((kind, index));
        steps.push(Step::More { index, text });
    }

    fn call(&mut self, delta: &ToolCall, steps: &mut Vec<Step>) -> bool {
        let number = delta.index.unwrap_or(0);
        // Some providers number all calls alike, and tell them apart by their ids.
        let is_it = |call: &OpenCall| call.number == number && (delta.id.is_none() || delta.id == call.id);
        let at = match self.calls.iter().rposition(is_it) {
            Some(at) => at,
            None => {
                let id = delta.id.clone().unwrap_or_else(|| call_id(&self.seed, self.calls.len()));
                let name = delta.name().unwrap_or_default().to_owned();
                let block = self.open(Block::Call { id, name, signature: delta.signature() }, steps);
                let id = delta.id.clone();
                self.calls.push(OpenCall { number, id, block, arguments: String::new(), is_closed: false });
                self.calls.len() - 1
            }
        };
        let call = &mut self.calls[at];
        let more = delta.arguments();
        if more.is_empty() || call.is_closed {
            return more.trim().is_empty();
        }
        call.arguments.push_str(more);
        steps.push(Step::More { index: call.block, text: more.to_owned() });
        true
    }

    fn close_prose(&mut self, steps: &mut Vec<Step>) {
        if let Some((_, index)) = self.prose.take() {
            steps.push(Step::Close { index });
        }
    }

    /// Closes the calls that are over: nothing says so, but arguments that are whole JSON are whole.
    fn close_calls(&mut self, all: bool, steps: &mut Vec<Step>) {
        for call in self.calls.iter_mut().filter(|call| !call.is_closed) {
            if all || serde_json::from_str::<&RawValue>(&call.arguments).is_ok() {
                call.is_closed = true;
                steps.push(Step::Close { index: call.block });
            }
        }
    }

    pub fn usage_raw(&self) -> Option<&str> {
        self.usage_raw.as_deref()
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
        Stop::End | Stop::Sequence(_) => "stop",
        Stop::MaxTokens => "length",
        Stop::Calls => "tool_calls",
        Stop::Refused => "content_filter",
    }
}

pub fn write_counts(counts: &Counts, charged: MicroUsdc) -> String {
    let of_prompt = ObjectText::new()
        .number("cached_tokens", counts.cached)
        .number("cache_write_tokens", counts.cache_written)
        .end();
    let of_completion = ObjectText::new().number("reasoning_tokens", counts.reasoning).end();
    ObjectText::new()
        .number("prompt_tokens", counts.prompt)
        .number("completion_tokens", counts.completion)
        .number("total_tokens", counts.prompt.saturating_add(counts.completion))
        .json("prompt_tokens_details", &of_prompt)
        .json("completion_tokens_details", &of_completion)
        .json("charged_usdc", &charged.to_string())
        .end()
}

/// Writes a whole answer.
pub fn write(answer: &WholeAnswer, reply: &Reply, charged: MicroUsdc) -> String {
    let choice = ObjectText::new()
        .number("index", 0)
        .json("message", &write_message(&answer.parts))
        .json("logprobs", "null")
        .text("finish_reason", write_stop(&answer.stop))
        .end();
    let mut written = head("chat.completion", reply);
    written.json("choices", &list([choice]));
    written.maybe("usage", answer.counts.map(|counts| write_counts(&counts, charged))).end()
}

fn head(object: &str, reply: &Reply) -> ObjectText {
    let mut written = ObjectText::new();
    written
        .text("id", &format!("chatcmpl-{}", reply.id))
        .text("object", object)
        .json("created", &reply.created.to_string())
        .text("model", &reply.model);
    written
}

/// Thoughts stand beside the content: as a text that many clients show, and as blocks with their
/// signatures, for those that send them back.
fn write_message(parts: &[Part]) -> String {
    let (mut content, mut refusal, mut thoughts) = (String::new(), String::new(), String::new());
    let (mut has_content, mut blocks, mut calls) = (false, Vec::new(), Vec::new());
    for part in parts {
        match part {
            Part::Text(text) => {
                has_content = true;
                content.push_str(text);
            }
            Part::Refusal(text) => refusal.push_str(text),
            Part::Thinking { text, signature } => {
                thoughts.push_str(text);
                blocks.extend(signature.as_ref().map(|signature| write_thinking(text, signature)));
            }
            Part::Redacted(data) => blocks.push(write_redacted(data)),
            Part::Call(call) => calls.push(write_call(call)),
            Part::Media(_) | Part::Result(_) => {}
        }
    }
    let or_null = |text: &str, is_there: bool| if is_there { quote(text) } else { "null".to_owned() };
    let mut message = ObjectText::new();
    message
        .text("role", "assistant")
        .json("content", &or_null(&content, has_content))
        .json("refusal", &or_null(&refusal, !refusal.is_empty()));
    if !thoughts.is_empty() {
        message.text("reasoning_content", &thoughts);
    }
    if !blocks.is_empty() {
        message.json("thinking_blocks", &list(blocks));
    }
    if !calls.is_empty() {
        message.json("tool_calls", &list(calls));
    }
    message.end()
}

/// Writes a stream.
#[derive(Default)]
pub struct StreamWriter {
    has_begun: bool,
    /// The number of each block that is a call.
    calls: Vec<(usize, u64)>,
    refusal: Option<usize>,
    /// The thought that is being told, until its signature is known.
    thought: Option<(usize, String, String)>,
    counts: Option<Counts>,
}

impl StreamWriter {
    pub fn step(&mut self, step: &Step, reply: &Reply, out: &mut Vec<u8>) {
        if !self.has_begun && !matches!(step, Step::Counts(_)) {
            self.has_begun = true;
            write_chunk(r#"{"role":"assistant","content":""}"#, "null", reply, out);
        }
        match step {
            Step::Open { index, block } => self.open(*index, block, reply, out),
            Step::More { index, text } => self.more(*index, text, reply, out),
            Step::Signature { index, signature } => {
                if let Some((_, _, sealed)) = self.thought.as_mut().filter(|(at, ..)| at == index) {
                    sealed.push_str(signature);
                }
            }
            Step::Close { index } => self.close(*index, reply, out),
            Step::Stop(stop) => write_chunk("{}", &quote(write_stop(stop)), reply, out),
            Step::Counts(counts) => self.counts = Some(*counts),
        }
    }

    fn open(&mut self, index: usize, block: &Block, reply: &Reply, out: &mut Vec<u8>) {
        match block {
            Block::Text => {}
            Block::Refusal => self.refusal = Some(index),
            Block::Thinking => self.thought = Some((index, String::new(), String::new())),
            Block::Redacted(data) => {
                let blocks = list([write_redacted(data)]);
                write_chunk(&ObjectText::new().json("thinking_blocks", &blocks).end(), "null", reply, out);
            }
            Block::Call { id, name, signature } => {
                let number = self.calls.last().map_or(0, |(_, number)| number + 1);
                self.calls.push((index, number));
                let function = ObjectText::new().text("name", name).text("arguments", "").end();
                let call = ObjectText::new()
                    .number("index", number)
                    .text("id", id)
                    .text("type", "function")
                    .json("function", &function)
                    .maybe("extra_content", signature.as_deref().map(write_signature))
                    .end();
                write_calls(&call, reply, out);
            }
        }
    }

    fn more(&mut self, index: usize, text: &str, reply: &Reply, out: &mut Vec<u8>) {
        if let Some((_, number)) = self.calls.iter().find(|(at, _)| *at == index) {
            let function = ObjectText::new().text("arguments", text).end();
            let call = ObjectText::new().number("index", *number).json("function", &function).end();
            return write_calls(&call, reply, out);
        }
        let field = match &mut self.thought {
            Some((at, thought, _)) if *at == index => {
                thought.push_str(text);
                "reasoning_content"
            }
            _ if self.refusal == Some(index) => "refusal",
            _ => "content",
        };
        write_chunk(&ObjectText::new().text(field, text).end(), "null", reply, out);
    }

    fn close(&mut self, index: usize, reply: &Reply, out: &mut Vec<u8>) {
        let is_it = self.thought.as_ref().is_some_and(|(at, ..)| *at == index);
        let Some((_, text, signature)) = self.thought.take_if(|_| is_it) else { return };
        if !signature.is_empty() {
            let blocks = list([write_thinking(&text, &signature)]);
            write_chunk(&ObjectText::new().json("thinking_blocks", &blocks).end(), "null", reply, out);
        }
    }

    /// What ends the stream when it is settled: the usage, if it was asked for, and `[DONE]`.
    pub fn last(&self, reply: &Reply, charged: MicroUsdc) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(counts) = self.counts.filter(|_| reply.wants_usage) {
            let mut chunk = head("chat.completion.chunk", reply);
            chunk.json("choices", "[]").json("usage", &write_counts(&counts, charged));
            out.extend_from_slice(&Event::from_data(chunk.end().as_bytes()));
        }
        out.extend_from_slice(&Event::from_data(b"[DONE]"));
        out
    }
}

fn write_calls(call: &str, reply: &Reply, out: &mut Vec<u8>) {
    write_chunk(&ObjectText::new().json("tool_calls", &list([call])).end(), "null", reply, out);
}

fn write_chunk(delta: &str, finish_reason: &str, reply: &Reply, out: &mut Vec<u8>) {
    let choice = ObjectText::new()
        .number("index", 0)
        .json("delta", delta)
        .json("logprobs", "null")
        .json("finish_reason", finish_reason)
        .end();
    let chunk = head("chat.completion.chunk", reply).json("choices", &list([choice])).end();
    out.extend_from_slice(&Event::from_data(chunk.as_bytes()));
}
