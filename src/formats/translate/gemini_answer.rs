//! `generateContent` and `streamGenerateContent` answers (Gemini API reference), read whole and as
//! streams.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::formats::answer::NotAnAnswer;
use crate::formats::conversation::{Block, Call, Counts, Part, Step, Stop, WholeAnswer};
use crate::formats::translate::{Heard, call_id};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer<'a> {
    #[serde(borrow)]
    candidates: Option<Vec<Candidate<'a>>>,
    prompt_feedback: Option<Feedback>,
    #[serde(borrow)]
    usage_metadata: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Feedback {
    block_reason: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Candidate<'a> {
    #[serde(borrow)]
    content: Option<Content<'a>>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Content<'a> {
    #[serde(borrow)]
    parts: Option<Vec<GeminiPart<'a>>>,
}

/// Parts of other kinds than these come only of tools that the provider runs itself.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct GeminiPart<'a> {
    text: Option<String>,
    #[serde(default)]
    thought: bool,
    thought_signature: Option<String>,
    #[serde(borrow)]
    function_call: Option<FunctionCall<'a>>,
}

#[derive(Deserialize)]
struct FunctionCall<'a> {
    id: Option<String>,
    name: String,
    #[serde(borrow)]
    args: Option<&'a RawValue>,
}

/// Ends that the model, or those who watch it, did not mean as one.
const REFUSED: &[&str] = &[
    "SAFETY",
    "RECITATION",
    "LANGUAGE",
    "OTHER",
    "BLOCKLIST",
    "PROHIBITED_CONTENT",
    "SPII",
    "MALFORMED_FUNCTION_CALL",
    "UNEXPECTED_TOOL_CALL",
    "TOO_MANY_TOOL_CALLS",
    "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT",
    "IMAGE_RECITATION",
    "IMAGE_OTHER",
    "NO_IMAGE",
];

fn read_stop(reason: &str, has_calls: bool) -> Stop {
    match reason {
        "MAX_TOKENS" => Stop::MaxTokens,
        refused if REFUSED.contains(&refused) => Stop::Refused,
        _ if has_calls => Stop::Calls,
        _ => Stop::End,
    }
}

/// Reads a report of usage: thoughts are beside what was answered.
pub fn counts(raw: &str) -> Option<Counts> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Report {
        prompt_token_count: u64,
        tool_use_prompt_token_count: Option<u64>,
        cached_content_token_count: Option<u64>,
        candidates_token_count: Option<u64>,
        thoughts_token_count: Option<u64>,
    }
    let report: Report = serde_json::from_str(raw).ok()?;
    let reasoning = report.thoughts_token_count.unwrap_or(0);
    Some(Counts {
        prompt: report.prompt_token_count.saturating_add(report.tool_use_prompt_token_count.unwrap_or(0)),
        cached: report.cached_content_token_count.unwrap_or(0),
        cache_written: 0,
        completion: report.candidates_token_count.unwrap_or(0).saturating_add(reasoning),
        reasoning,
    })
}

/// Reads a whole answer; calls that have no id get one from `seed`.
pub fn read(body: &[u8], seed: &str) -> Result<WholeAnswer, NotAnAnswer> {
    let mut reader = StreamReader::new(seed);
    let mut steps = Vec::new();
    match reader.event(body, &mut steps) {
        Heard::Failed => return Err(NotAnAnswer::Error),
        Heard::Steps if reader.finished => {}
        _ => return Err(NotAnAnswer::Nonsense),
    }
    let mut answer = WholeAnswer { parts: Vec::new(), stop: Stop::End, counts: None };
    for step in steps {
        match step {
            Step::Open { block: Block::Text, .. } => answer.parts.push(Part::Text(String::new())),
            Step::Open { block: Block::Call { id, name, signature }, .. } => {
                answer.parts.push(Part::Call(Call { id, name, arguments: String::new(), signature }));
            }
            Step::Open { .. } => answer.parts.push(Part::Thinking { text: String::new(), signature: None }),
            Step::More { text, .. } => match answer.parts.last_mut() {
                Some(Part::Text(told) | Part::Thinking { text: told, .. }) => told.push_str(&text),
                Some(Part::Call(call)) => call.arguments.push_str(&text),
                _ => {}
            },
            Step::Stop(stop) => answer.stop = stop,
            Step::Counts(counts) => answer.counts = Some(counts),
            Step::Signature { .. } | Step::Close { .. } => {}
        }
    }
    Ok(answer)
}

/// Reads a stream. Nothing says that it is at its end but that it ends, after a reason.
pub struct StreamReader {
    seed: String,
    opened: usize,
    /// The text, or thought, that is being told.
    prose: Option<(bool, usize)>,
    calls: usize,
    finished: bool,
    usage_raw: Option<String>,
    reported_at_end: bool,
}

impl StreamReader {
    /// Calls that have no id get one from `seed`.
    pub fn new(seed: &str) -> Self {
        Self {
            seed: seed.to_owned(),
            opened: 0,
            prose: None,
            calls: 0,
            finished: false,
            usage_raw: None,
            reported_at_end: false,
        }
    }

    pub fn event(&mut self, data: &[u8], steps: &mut Vec<Step>) -> Heard {
        let Ok(answer) = serde_json::from_slice::<Answer<'_>>(data) else { return Heard::Nonsense };
        if answer.error.is_some() {
            return Heard::Failed;
        }
        let counted = answer.usage_metadata.map(RawValue::get).filter(|raw| counts(raw).is_some());
        if let Some(raw) = counted {
            self.usage_raw = Some(raw.to_owned());
            steps.extend(counts(raw).map(Step::Counts));
        }
        let candidate = answer.candidates.and_then(|candidates| candidates.into_iter().next());
        if let Some(candidate) = candidate {
            let parts = candidate.content.and_then(|content| content.parts).unwrap_or_default();
            for part in parts {
                self.part(part, steps);
            }
            if let Some(reason) = candidate.finish_reason {
                self.stop(read_stop(&reason, self.calls > 0), steps);
            }
        } else if answer.prompt_feedback.is_some_and(|feedback| feedback.block_reason.is_some()) {
            self.stop(Stop::Refused, steps);
        }
        self.reported_at_end |= self.finished && counted.is_some();
        Heard::Steps
    }

    fn part(&mut self, part: GeminiPart<'_>, steps: &mut Vec<Step>) {
        if let Some(call) = part.function_call {
            self.close_prose(steps);
            let id = call.id.filter(|id| !id.is_empty()).unwrap_or_else(|| call_id(&self.seed, self.calls));
            self.calls += 1;
            let block = Block::Call { id, name: call.name, signature: part.thought_signature };
            let index = self.open(block, steps);
            let text = call.args.map_or("{}", RawValue::get).to_owned();
            steps.push(Step::More { index, text });
            steps.push(Step::Close { index });
        } else if let Some(text) = part.text.filter(|text| !text.is_empty()) {
            let index = match self.prose {
                Some((is_thought, index)) if is_thought == part.thought => index,
                _ => {
                    self.close_prose(steps);
                    self.open(if part.thought { Block::Thinking } else { Block::Text }, steps)
                }
            };
            self.prose = Some((part.thought, index));
            steps.push(Step::More { index, text });
        }
    }

    fn open(&mut self, block: Block, steps: &mut Vec<Step>) -> usize {
        let index = self.opened;
        self.opened += 1;
        steps.push(Step::Open { index, block });
        index
    }

    fn close_prose(&mut self, steps: &mut Vec<Step>) {
        if let Some((_, index)) = self.prose.take() {
            steps.push(Step::Close { index });
        }
    }

    fn stop(&mut self, stop: Stop, steps: &mut Vec<Step>) {
        self.close_prose(steps);
        if !self.finished {
            self.finished = true;
            steps.push(Step::Stop(stop));
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
