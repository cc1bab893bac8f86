//! A request in any client's format and its answer from an upstream of any other: what passes through
//! as it is, and what is translated, behind one face.

use bytes::Bytes;

use crate::formats::answer::{Delivered, Forward, NotAnAnswer};
use crate::formats::chat::{self, ChatRequest};
use crate::formats::conversation::{
    Block, ClientFormat, Conversation, Part, Step, UpstreamFormat, WholeAnswer,
};
use crate::formats::errors::ErrorText;
use crate::formats::messages::{self, MessagesRequest};
use crate::formats::request::{BadRequest, Bounds, estimate_tokens};
use crate::formats::responses::{self, ResponsesRequest};
use crate::formats::sse::Event;
use crate::formats::translate::{
    Heard, Reply, chat_answer, chat_request, gemini_answer, gemini_request, messages_answer,
    messages_request, responses_answer, responses_request,
};
use crate::money::MicroUsdc;
use crate::pricing::{Dialect, Offer};

/// The mark of a request's id, which the ids made of it do without: some clients' may have 40 letters.
const REQUEST: &str = "req_";

/// A request in one of the formats that clients speak, parsed as far as its price needs.
pub enum Request<'a> {
    Chat(ChatRequest<'a>),
    Messages(MessagesRequest<'a>),
    Responses(ResponsesRequest<'a>),
}

/// What an upstream is sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UpstreamRequest {
    /// The format in which it answers.
    pub format: UpstreamFormat,
    /// Behind the upstream's base URL, with its query.
    pub path: String,
    /// Beside those that every request to it has.
    pub headers: Vec<(&'static str, String)>,
    pub body: Bytes,
}

impl UpstreamFormat {
    /// The format that an upstream is spoken to in by such a client: responses only where the client
    /// speaks them too, since whoever takes them takes chat completions.
    pub fn spoken_with(self, client: ClientFormat) -> Self {
        match (self, client) {
            (Self::Responses, ClientFormat::Responses) => Self::Responses,
            (Self::Responses, _) => Self::Chat,
            (other, _) => other,
        }
    }

    /// Whether what a client sends passes through as it is.
    pub fn is_of(self, client: ClientFormat) -> bool {
        matches!(
            (self, client),
            (Self::Chat, ClientFormat::Chat)
                | (Self::Responses, ClientFormat::Responses)
                | (Self::Messages, ClientFormat::Messages)
        )
    }

    /// In which words it reports usage.
    pub fn dialect(self) -> Dialect {
        match self {
            Self::Chat => Dialect::OpenAi,
            Self::Responses => Dialect::Responses,
            Self::Messages => Dialect::Anthropic,
            Self::Gemini => Dialect::Gemini,
        }
    }

    /// Where requests for `model` go, behind the upstream's base URL.
    pub fn path(self, model: &str, stream: bool) -> String {
        match (self, stream) {
            (Self::Chat, _) => "chat/completions".to_owned(),
            (Self::Responses, _) => "responses".to_owned(),
            (Self::Messages, _) => "messages".to_owned(),
            (Self::Gemini, false) => format!("models/{}:generateContent", bare(model)),
            (Self::Gemini, true) => format!("models/{}:streamGenerateContent?alt=sse", bare(model)),
        }
    }
}

/// Where an upstream that counts tokens is asked to, behind its base URL: one that speaks messages.
pub const COUNT_TOKENS_PATH: &str = "messages/count_tokens";

impl UpstreamFormat {
    /// The header that bears a key, and what stands in it before the key.
    pub fn key_header(self) -> (&'static str, &'static str) {
        match self {
            Self::Chat | Self::Responses => ("authorization", "Bearer "),
            Self::Messages => ("x-api-key", ""),
            Self::Gemini => ("x-goog-api-key", ""),
        }
    }

    /// What else every request says in its head.
    pub fn headers(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Messages => &[("anthropic-version", "2023-06-01")],
            Self::Chat | Self::Responses | Self::Gemini => &[],
        }
    }
}

fn bare(model: &str) -> &str {
    model.strip_prefix("models/").unwrap_or(model)
}

impl<'a> Request<'a> {
    pub fn parse(format: ClientFormat, body: &'a [u8]) -> Result<Self, BadRequest> {
        Ok(match format {
            ClientFormat::Chat => Self::Chat(ChatRequest::parse(body)?),
            ClientFormat::Messages => Self::Messages(MessagesRequest::parse(body)?),
            ClientFormat::Responses => Self::Responses(ResponsesRequest::parse(body)?),
        })
    }

    pub fn format(&self) -> ClientFormat {
        match self {
            Self::Chat(_) => ClientFormat::Chat,
            Self::Messages(_) => ClientFormat::Messages,
            Self::Responses(_) => ClientFormat::Responses,
        }
    }

    pub fn model(&self) -> &str {
        match self {
            Self::Chat(request) => &request.model,
            Self::Messages(request) => &request.model,
            Self::Responses(request) => &request.model,
        }
    }

    pub fn is_stream(&self) -> bool {
        match self {
            Self::Chat(request) => request.stream,
            Self::Messages(request) => request.stream,
            Self::Responses(request) => request.stream,
        }
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        match self {
            Self::Chat(request) => request.bounds(offer),
            Self::Messages(request) => request.bounds(offer),
            Self::Responses(request) => request.bounds(offer),
        }
    }

    /// The largest output limit with which no more than `completion` tokens can come, if there is one.
    pub fn limit_within(&self, completion: u64) -> Option<u64> {
        match self {
            Self::Chat(request) => request.limit_within(completion),
            Self::Messages(request) => request.limit_within(completion),
            Self::Responses(request) => request.limit_within(completion),
        }
    }

    /// What the format calls that limit.
    pub fn limit_name(&self) -> &'static str {
        match self {
            Self::Chat(_) | Self::Messages(_) => "max_tokens",
            Self::Responses(_) => "max_output_tokens",
        }
    }

    /// What an upstream of this format is sent for it. What it has no place for is refused by name.
    pub fn to_upstream(&self, offer: &Offer, format: UpstreamFormat) -> Result<UpstreamRequest, BadRequest> {
        let format = format.spoken_with(self.format());
        let path = format.path(&offer.upstream_model, self.is_stream());
        Ok(UpstreamRequest { format, path, headers: Vec::new(), body: self.upstream_body(offer, format)? })
    }

    fn upstream_body(&self, offer: &Offer, format: UpstreamFormat) -> Result<Bytes, BadRequest> {
        if format.is_of(self.format()) {
            return Ok(match self {
                Self::Chat(request) => request.upstream_body(offer),
                Self::Messages(request) => request.upstream_body(offer),
                Self::Responses(request) => request.upstream_body(offer),
            });
        }
        let conversation = self.conversation(offer)?;
        let model = &offer.upstream_model;
        let body = match format {
            UpstreamFormat::Chat | UpstreamFormat::Responses => {
                chat_request::write(&conversation, model, &offer.max_tokens_field)
            }
            UpstreamFormat::Messages => messages_request::write(&conversation, model),
            UpstreamFormat::Gemini => gemini_request::write(&conversation, model),
        };
        body.map(Bytes::from)
    }

    /// The request apart from its format.
    pub fn conversation(&self, offer: &Offer) -> Result<Conversation, BadRequest> {
        match self {
            Self::Chat(request) => chat_request::read(request, offer),
            Self::Messages(request) => messages_request::read(request, offer),
            Self::Responses(request) => responses_request::read(request, offer),
        }
    }

    /// How its answer is read, which comes from an upstream of this format. `id` is the request's own,
    /// `created` in Unix seconds.
    pub fn exchange(&self, format: UpstreamFormat, id: &str, created: i64) -> Exchange {
        let (choices, wants_usage, repeated) = match self {
            Self::Chat(request) => (request.choices(), request.wants_usage, String::new()),
            Self::Messages(_) => (1, true, String::new()),
            Self::Responses(request) => (1, true, responses_answer::repeated(request.object())),
        };
        let id = id.strip_prefix(REQUEST).unwrap_or(id).to_owned();
        Exchange {
            client: self.format(),
            upstream: format.spoken_with(self.format()),
            choices,
            reply: Reply { id, model: self.model().to_owned(), created, wants_usage, repeated },
        }
    }
}

/// How the answer to a request is read and told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Exchange {
    client: ClientFormat,
    upstream: UpstreamFormat,
    choices: u64,
    reply: Reply,
}

impl Exchange {
    /// Of what is answered as chats are, by whoever speaks as OpenAI does.
    pub fn of_chat(model: &str, choices: u64, wants_usage: bool) -> Self {
        let (client, upstream) = (ClientFormat::Chat, UpstreamFormat::Chat);
        let (id, model, repeated) = (String::new(), model.to_owned(), String::new());
        Self { client, upstream, choices, reply: Reply { id, model, created: 0, wants_usage, repeated } }
    }

    pub fn client(&self) -> ClientFormat {
        self.client
    }

    /// The format of the upstream's answers, and of its reports of usage.
    pub fn upstream(&self) -> UpstreamFormat {
        self.upstream
    }

    /// In which words the upstream reports usage.
    pub fn dialect(&self) -> Dialect {
        self.upstream.dialect()
    }

    /// Reads a whole answer.
    pub fn read<'a>(&'a self, body: &'a [u8]) -> Result<Answer<'a>, NotAnAnswer> {
        if self.upstream.is_of(self.client) {
            return Ok(match self.client {
                ClientFormat::Chat => Answer::Chat(&self.reply, chat::Answer::parse(body)?),
                ClientFormat::Messages => Answer::Messages(&self.reply, messages::Answer::parse(body)?),
                ClientFormat::Responses => Answer::Responses(&self.reply, responses::Answer::parse(body)?),
            });
        }
        let whole = match self.upstream {
            UpstreamFormat::Chat | UpstreamFormat::Responses => chat_answer::read(body, &self.reply.id)?,
            UpstreamFormat::Messages => messages_answer::read(body)?,
            UpstreamFormat::Gemini => gemini_answer::read(body, &self.reply.id)?,
        };
        let usage_raw = usage_of(self.upstream, body);
        Ok(Answer::Translated { exchange: self, whole, usage_raw })
    }

    /// Watches a stream past.
    pub fn tap(&self) -> Tap {
        let model = &self.reply.model;
        let kind = if !self.upstream.is_of(self.client) {
            Kind::Translated(Box::new(Translation::new(self)))
        } else {
            match self.client {
                ClientFormat::Chat => {
                    Kind::Chat(chat::StreamTap::new(model, self.reply.wants_usage, self.choices))
                }
                ClientFormat::Messages => Kind::Messages(messages::StreamTap::new(model)),
                ClientFormat::Responses => Kind::Responses(responses::StreamTap::new(model)),
            }
        };
        Tap { client: self.client, kind }
    }
}

/// The upstream's own report of usage in a whole answer, as it is.
fn usage_of(format: UpstreamFormat, body: &[u8]) -> Option<String> {
    let key = match format {
        UpstreamFormat::Gemini => "usageMetadata",
        _ => "usage",
    };
    let object = crate::formats::json::Object::parse(body).ok()?;
    object.get_non_null(key).map(str::to_owned)
}

/// A whole answer.
pub enum Answer<'a> {
    Chat(&'a Reply, chat::Answer<'a>),
    Messages(&'a Reply, messages::Answer<'a>),
    Responses(&'a Reply, responses::Answer<'a>),
    Translated { exchange: &'a Exchange, whole: WholeAnswer, usage_raw: Option<String> },
}

impl Answer<'_> {
    /// The upstream's report of usage, in its own format.
    pub fn usage_raw(&self) -> Option<&str> {
        match self {
            Self::Chat(_, answer) => answer.usage_raw(),
            Self::Messages(_, answer) => answer.usage_raw(),
            Self::Responses(_, answer) => answer.usage_raw(),
            Self::Translated { usage_raw, .. } => usage_raw.as_deref(),
        }
    }

    /// Output tokens, where the answer does not say how many there were.
    pub fn estimated_completion(&self) -> u64 {
        match self {
            Self::Chat(_, answer) => answer.estimated_completion(),
            Self::Messages(_, answer) => answer.estimated_completion(),
            Self::Responses(_, answer) => answer.estimated_completion(),
            Self::Translated { whole, .. } => estimate_tokens(whole.parts.iter().map(output_bytes).sum()),
        }
    }

    /// The answer in the client's format, with what was charged.
    pub fn render(self, charged: MicroUsdc) -> Bytes {
        match self {
            Self::Chat(reply, answer) => answer.render(&reply.model, charged),
            Self::Messages(reply, answer) => answer.render(&reply.model, charged),
            Self::Responses(reply, answer) => answer.render(&reply.model, charged),
            Self::Translated { exchange, whole, .. } => {
                let write = match exchange.client {
                    ClientFormat::Chat => chat_answer::write,
                    ClientFormat::Messages => messages_answer::write,
                    ClientFormat::Responses => responses_answer::write,
                };
                write(&whole, &exchange.reply, charged).into()
            }
        }
    }
}

fn output_bytes(part: &Part) -> u64 {
    let bytes = match part {
        Part::Text(text) | Part::Refusal(text) | Part::Thinking { text, .. } => text.len(),
        Part::Call(call) => call.name.len().saturating_add(call.arguments.len()),
        Part::Redacted(_) | Part::Media(_) | Part::Result(_) => 0,
    };
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Watches an answer stream past, event by event: what of it goes to the client, its usage, and how
/// much was delivered.
pub struct Tap {
    client: ClientFormat,
    kind: Kind,
}

enum Kind {
    Chat(chat::StreamTap),
    Messages(messages::StreamTap),
    Responses(responses::StreamTap),
    Translated(Box<Translation>),
}

/// Runs the same method on whatever kind of tap it is.
macro_rules! on_kind {
    ($kind:expr, $tap:ident => $call:expr) => {
        match $kind {
            Kind::Chat($tap) => $call,
            Kind::Messages($tap) => $call,
            Kind::Responses($tap) => $call,
            Kind::Translated($tap) => $call,
        }
    };
}

impl Tap {
    /// Reads one event and says what the client gets of it.
    pub fn event(&mut self, event: &Event) -> Forward {
        on_kind!(&mut self.kind, tap => tap.event(event))
    }

    /// What ends the stream for the client, to be sent when it is settled. To be asked for once, after
    /// [`Forward::Done`], or at the stream's end if it [is finished](Self::is_finished).
    pub fn last(&mut self, charged: MicroUsdc) -> Bytes {
        match &mut self.kind {
            Kind::Chat(_) => Event::from_data(b"[DONE]"),
            Kind::Messages(tap) => tap.last(charged),
            Kind::Responses(tap) => tap.last(charged),
            Kind::Translated(tap) => tap.last(charged),
        }
    }

    /// The last event of a stream that failed.
    pub fn failure(&self, error: &ErrorText<'_>) -> Bytes {
        let sequence = match &self.kind {
            Kind::Responses(tap) => tap.sequence(),
            Kind::Translated(tap) => tap.sequence(),
            Kind::Chat(_) | Kind::Messages(_) => 0,
        };
        error.event(self.client, sequence)
    }

    /// The upstream's report of usage so far, in its own format.
    pub fn usage_raw(&self) -> Option<&str> {
        on_kind!(&self.kind, tap => tap.usage_raw())
    }

    /// Whether the report of usage is the last word, however the stream ends.
    pub fn is_reported_at_end(&self) -> bool {
        on_kind!(&self.kind, tap => tap.is_reported_at_end())
    }

    pub fn delivered_anything(&self) -> bool {
        on_kind!(&self.kind, tap => tap.delivered_anything())
    }

    /// Whether the answer was whole, should the stream end now without saying so.
    pub fn is_finished(&self) -> bool {
        on_kind!(&self.kind, tap => tap.is_finished())
    }

    /// Output tokens delivered so far.
    pub fn estimated_completion(&self) -> u64 {
        on_kind!(&self.kind, tap => tap.estimated_completion())
    }
}

/// A stream in one format read, and told in another.
struct Translation {
    reader: Reader,
    writer: Writer,
    reply: Reply,
    delivered: Delivered,
    /// Kept only for its room.
    steps: Vec<Step>,
}

enum Reader {
    Chat(chat_answer::StreamReader),
    Messages(messages_answer::StreamReader),
    Gemini(gemini_answer::StreamReader),
}

enum Writer {
    Chat(chat_answer::StreamWriter),
    Messages(messages_answer::StreamWriter),
    Responses(responses_answer::StreamWriter),
}

macro_rules! on_reader {
    ($reader:expr, $it:ident => $call:expr) => {
        match $reader {
            Reader::Chat($it) => $call,
            Reader::Messages($it) => $call,
            Reader::Gemini($it) => $call,
        }
    };
}

impl Translation {
    fn new(exchange: &Exchange) -> Self {
        let seed = &exchange.reply.id;
        Self {
            reader: match exchange.upstream {
                UpstreamFormat::Chat | UpstreamFormat::Responses => {
                    Reader::Chat(chat_answer::StreamReader::new(seed))
                }
                UpstreamFormat::Messages => Reader::Messages(messages_answer::StreamReader::default()),
                UpstreamFormat::Gemini => Reader::Gemini(gemini_answer::StreamReader::new(seed)),
            },
            writer: match exchange.client {
                ClientFormat::Chat => Writer::Chat(chat_answer::StreamWriter::default()),
                ClientFormat::Messages => Writer::Messages(messages_answer::StreamWriter::default()),
                ClientFormat::Responses => Writer::Responses(responses_answer::StreamWriter::default()),
            },
            reply: exchange.reply.clone(),
            delivered: Delivered::default(),
            steps: Vec::new(),
        }
    }

    fn event(&mut self, event: &Event) -> Forward {
        // A comment keeps a connection alive in any format.
        let Some(data) = event.data() else { return Forward::Send(event.0.clone()) };
        self.steps.clear();
        match on_reader!(&mut self.reader, reader => reader.event(&data, &mut self.steps)) {
            Heard::Steps => {}
            Heard::Done => return Forward::Done,
            Heard::Failed => return Forward::Failed,
            Heard::Nonsense => return Forward::Nonsense,
        }
        self.delivered.add(self.steps.iter().map(step_bytes).sum());
        let mut out = Vec::new();
        for step in &self.steps {
            match &mut self.writer {
                Writer::Chat(writer) => writer.step(step, &self.reply, &mut out),
                Writer::Messages(writer) => writer.step(step, &self.reply, &mut out),
                Writer::Responses(writer) => writer.step(step, &self.reply, &mut out),
            }
        }
        if out.is_empty() { Forward::Skip } else { Forward::Send(out.into()) }
    }

    fn last(&mut self, charged: MicroUsdc) -> Bytes {
        match &mut self.writer {
            Writer::Chat(writer) => writer.last(&self.reply, charged).into(),
            Writer::Messages(writer) => writer.last(&self.reply, charged).into(),
            Writer::Responses(writer) => writer.last(&self.reply, charged).into(),
        }
    }

    fn sequence(&self) -> u64 {
        match &self.writer {
            Writer::Responses(writer) => writer.sequence(),
            Writer::Chat(_) | Writer::Messages(_) => 0,
        }
    }

    fn usage_raw(&self) -> Option<&str> {
        on_reader!(&self.reader, reader => reader.usage_raw())
    }

    fn is_reported_at_end(&self) -> bool {
        on_reader!(&self.reader, reader => reader.is_reported_at_end())
    }

    fn is_finished(&self) -> bool {
        on_reader!(&self.reader, reader => reader.is_finished())
    }

    fn delivered_anything(&self) -> bool {
        self.delivered.anything()
    }

    fn estimated_completion(&self) -> u64 {
        self.delivered.estimated_tokens()
    }
}

/// Bytes of output in a step: texts, and of calls what the model wrote.
fn step_bytes(step: &Step) -> u64 {
    let bytes = match step {
        Step::More { text, .. } => text.len(),
        Step::Open { block: Block::Call { name, .. }, .. } => name.len(),
        _ => 0,
    };
    u64::try_from(bytes).unwrap_or(u64::MAX)
}
