//! A conversation apart from the format it came in: what one format's reader makes and another's
//! writer takes, so that four formats need four readers and writers and not one for each pair.
//!
//! Numbers, schemas and arguments stay the JSON text they came as: nothing is rounded or reordered.

/// The formats that clients speak.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum ClientFormat {
    /// `POST /v1/chat/completions`, OpenAI.
    Chat,
    /// `POST /v1/responses`, OpenAI.
    Responses,
    /// `POST /v1/messages`, Anthropic.
    Messages,
}

/// The formats that upstreams are spoken to in.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum UpstreamFormat {
    Chat,
    Responses,
    Messages,
    /// `generateContent` and `streamGenerateContent`, Google.
    Gemini,
}

/// What a model is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conversation {
    /// What the client's format calls its members, for messages about them.
    pub names: &'static Names,
    /// Instructions, in their order. Where a format takes them in the middle of a conversation and
    /// another only at its beginning, they come there.
    pub system: Vec<String>,
    pub turns: Vec<Turn>,
    pub tools: Vec<Tool>,
    pub tool_choice: Option<ToolChoice>,
    /// Whether the model may call but one tool in a turn.
    pub one_call: bool,
    pub max_tokens: u64,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub format: Option<Format>,
    pub verbosity: Option<String>,
    pub reasoning: Reasoning,
    pub stream: bool,
}

/// Names of members in a client's format.
#[derive(PartialEq, Eq, Debug)]
pub struct Names {
    pub turns: &'static str,
    pub one_call: &'static str,
    pub format: &'static str,
    pub reasoning: &'static str,
    pub verbosity: &'static str,
    pub max_tokens: &'static str,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Role {
    User,
    Assistant,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Turn {
    pub role: Role,
    pub parts: Vec<Part>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
    Text(String),
    Media(Media),
    /// What a model thought, as far as it shows it. The signature is its provider's, who wants it back.
    Thinking {
        text: String,
        signature: Option<String>,
    },
    /// Thoughts that only their provider can read.
    Redacted(String),
    /// The model's words for not answering.
    Refusal(String),
    Call(Call),
    Result(ToolResult),
}

/// A picture, a document or a sound.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Media {
    pub kind: MediaKind,
    pub source: Source,
    /// A document's file name or title.
    pub name: Option<String>,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum MediaKind {
    Image,
    Document,
    Audio,
}

impl MediaKind {
    pub fn word(self) -> &'static str {
        match self {
            Self::Image => "an image",
            Self::Document => "a document",
            Self::Audio => "audio",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    Base64 {
        media_type: String,
        data: String,
    },
    Url(String),
    /// A document that is plain text.
    Text(String),
}

impl Source {
    /// A URL as it stands in a request: a `data:` URL holds its bytes itself.
    pub fn from_url(url: String) -> Result<Self, &'static str> {
        let Some(rest) = url.strip_prefix("data:") else { return Ok(Self::Url(url)) };
        let (head, data) = rest.split_once(',').ok_or("is a data URL without data")?;
        let media_type = head.strip_suffix(";base64").ok_or("is a data URL that is not base64")?;
        let media_type = media_type.split(';').next().unwrap_or_default();
        if media_type.is_empty() {
            return Err("is a data URL that does not say its media type");
        }
        Ok(Self::Base64 { media_type: media_type.to_owned(), data: data.to_owned() })
    }

    /// As one URL; `None` for plain text.
    pub fn to_url(&self) -> Option<String> {
        match self {
            Self::Base64 { media_type, data } => Some(format!("data:{media_type};base64,{data}")),
            Self::Url(url) => Some(url.clone()),
            Self::Text(_) => None,
        }
    }
}

/// A tool that the model wants run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Call {
    pub id: String,
    pub name: String,
    /// A JSON text, as the model wrote it; not always valid JSON.
    pub arguments: String,
    /// Google's signature of the thoughts that led to it.
    pub signature: Option<String>,
}

/// What a text of arguments that is no object stands under, where an object is needed (Anthropic,
/// *Fine-grained tool streaming*).
const INVALID_JSON: &str = "INVALID_JSON";

impl Call {
    /// The arguments as an object's text.
    pub fn arguments_object(&self) -> String {
        use crate::formats::json::{Object, ObjectText};
        let arguments = self.arguments.trim();
        if arguments.is_empty() {
            return "{}".to_owned();
        }
        match Object::parse(arguments.as_bytes()) {
            Ok(_) => arguments.to_owned(),
            Err(_) => ObjectText::new().text(INVALID_JSON, &self.arguments).end(),
        }
    }
}

/// What came of a call: texts and pictures.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ToolResult {
    pub call_id: String,
    pub parts: Vec<Part>,
    pub is_error: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// A JSON schema.
    pub parameters: Option<String>,
    pub strict: Option<bool>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToolChoice {
    Auto,
    None,
    /// One of them, whichever.
    Required,
    Named(String),
}

/// Numbers as their JSON texts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sampling {
    pub temperature: Option<String>,
    pub top_p: Option<String>,
    pub top_k: Option<String>,
    pub seed: Option<String>,
    pub presence_penalty: Option<String>,
    pub frequency_penalty: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Format {
    /// Any JSON object.
    Json,
    Schema {
        name: Option<String>,
        description: Option<String>,
        schema: String,
        strict: Option<bool>,
    },
}

/// How much a model is to think before it answers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Reasoning {
    pub thinking: Option<Thinking>,
    pub effort: Option<Effort>,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Thinking {
    Off,
    /// As many tokens at most.
    Budget(u64),
    /// As much as the model finds fit.
    Adaptive,
}

#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Effort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    XHigh,
    Max,
}

impl Effort {
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "none" => Self::None,
            "minimal" => Self::Minimal,
            "low" => Self::Low,
            "medium" => Self::Medium,
            "high" => Self::High,
            "xhigh" => Self::XHigh,
            "max" => Self::Max,
            _ => return None,
        })
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::XHigh => "xhigh",
            Self::Max => "max",
        }
    }
}

impl Conversation {
    /// The turns with neighbours of one role made one, for formats in which the roles alternate. The
    /// results of calls come first in theirs, right behind the calls.
    pub fn joined_turns(&self) -> Vec<(Role, Vec<&Part>)> {
        let mut joined: Vec<(Role, Vec<&Part>)> = Vec::new();
        for turn in &self.turns {
            match joined.last_mut() {
                Some((role, parts)) if *role == turn.role => parts.extend(&turn.parts),
                _ => joined.push((turn.role, turn.parts.iter().collect())),
            }
        }
        for (_, parts) in &mut joined {
            parts.sort_by_key(|part| !matches!(part, Part::Result(_)));
        }
        joined.retain(|(_, parts)| !parts.is_empty());
        joined
    }
}

/// A whole answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WholeAnswer {
    /// Texts, thoughts, refusals and calls.
    pub parts: Vec<Part>,
    pub stop: Stop,
    pub counts: Option<Counts>,
}

/// Why an answer ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    End,
    MaxTokens,
    /// One of the request's stop sequences, which the provider may have named.
    Sequence(Option<String>),
    Calls,
    /// The model or its provider would not go on.
    Refused,
}

/// What was used, as clients are shown it. What is charged is read from the upstream's own report.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// All of the prompt, also what came from a cache or went into one.
    pub prompt: u64,
    pub cached: u64,
    pub cache_written: u64,
    /// All of the output, thoughts too.
    pub completion: u64,
    pub reasoning: u64,
}

/// One step of an answer that comes in pieces. Blocks are numbered in the order they open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    Open {
        index: usize,
        block: Block,
    },
    /// More of a text, a thought, a refusal or a call's arguments.
    More {
        index: usize,
        text: String,
    },
    Signature {
        index: usize,
        signature: String,
    },
    Close {
        index: usize,
    },
    Stop(Stop),
    Counts(Counts),
}

/// What a block of a streamed answer is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Block {
    Text,
    Thinking,
    Redacted(String),
    Refusal,
    Call { id: String, name: String, signature: Option<String> },
}

/// Marks on sealed thoughts, where a format has one place for everybody's: each provider refuses what
/// another sealed, or nobody.
pub(super) const GOOGLE: &str = "google:";
pub(super) const ANTHROPIC: &str = "anthropic:";
pub(super) const ANTHROPIC_REDACTED: &str = "anthropic-redacted:";
pub(super) const UNSEALED: &str = "unsealed:";

/// A signature of Google's as it stands among others'.
pub(super) fn mark_google(signature: &str) -> String {
    format!("{GOOGLE}{signature}")
}

/// A signature of Google's, if it is one.
pub(super) fn google_signature(signature: &str) -> Option<&str> {
    signature.strip_prefix(GOOGLE)
}

/// Adds a part that was read after another: a thought that is nothing but Google's signature belongs
/// to the call behind it.
pub(super) fn push_part(parts: &mut Vec<Part>, mut part: Part) {
    if let (Part::Call(call), Some(Part::Thinking { text, signature: Some(signature) })) =
        (&mut part, parts.last())
        && text.is_empty()
        && let Some(google) = google_signature(signature)
    {
        call.signature = Some(google.to_owned());
        parts.pop();
    }
    parts.push(part);
}
