//! What is sold beside conversation: embeddings, pictures, speech and transcriptions. A request in any of their
//! formats and its answer, behind one face.

use std::sync::Arc;

use bytes::Bytes;

use crate::formats::answer::{Delivered, Forward, NotAnAnswer, text_bytes};
use crate::formats::conversation::UpstreamFormat;
use crate::formats::embeddings::EmbeddingsRequest;
use crate::formats::exchange::UpstreamRequest;
use crate::formats::images::ImagesRequest;
use crate::formats::json::{Object, quote, with_member};
use crate::formats::multipart::Form;
use crate::formats::request::{
    BadRequest, Bounds, Refused, is_either, is_priced, is_sold_by_tokens, refuse_name, unsupported,
};
use crate::formats::sound;
use crate::formats::speech::SpeechRequest;
use crate::formats::sse::Event;
use crate::formats::transcription::TranscriptionRequest;
use crate::money::{MicroUsdc, parse_decimal};
use crate::pricing::{Dialect, Offer, Prices, Reported, Terms, Unit, Usage};

/// Refuses parts of a form as members of these names are refused.
pub(super) fn refuse_parts(form: &Form<'_>, refused: &[Refused]) -> Result<(), BadRequest> {
    // Brackets, and points, stand behind the name of what holds the field.
    let base = |name| str::split(name, ['[', '.']).next().unwrap_or(name);
    form.sizes().try_for_each(|(name, ..)| refuse_name(base(name), refused))
}

/// Refuses an offer whose provider does not speak as OpenAI does.
pub(super) fn check_upstream(offer: &Offer, format: UpstreamFormat) -> Result<(), BadRequest> {
    match format {
        UpstreamFormat::Chat | UpstreamFormat::Responses => Ok(()),
        UpstreamFormat::Messages | UpstreamFormat::Gemini => {
            let message =
                format!("{} has a provider that is not asked for this: choose another model", offer.id);
            Err(unsupported("model", message))
        }
    }
}

/// The formats, by what they are for.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Medium {
    Embeddings,
    Images,
    ImageEdits,
    Speech,
    Transcriptions,
}

impl Medium {
    /// Where it is, behind the base URL of an upstream, and behind ours.
    pub fn path(self) -> &'static str {
        match self {
            Self::Embeddings => "embeddings",
            Self::Images => "images/generations",
            Self::ImageEdits => "images/edits",
            Self::Speech => "audio/speech",
            Self::Transcriptions => "audio/transcriptions",
        }
    }
}

/// A request in one of these formats, parsed as far as its price needs.
pub enum Request<'a> {
    Embeddings(EmbeddingsRequest<'a>),
    Images(ImagesRequest<'a>),
    Speech(SpeechRequest<'a>),
    Transcription(TranscriptionRequest<'a>),
}

impl<'a> Request<'a> {
    pub fn parse(medium: Medium, content_type: Option<&str>, body: &'a [u8]) -> Result<Self, BadRequest> {
        Ok(match medium {
            Medium::Embeddings => Self::Embeddings(EmbeddingsRequest::parse(body)?),
            Medium::Images => Self::Images(ImagesRequest::parse(body)?),
            Medium::ImageEdits => Self::Images(ImagesRequest::parse_edit(content_type, body)?),
            Medium::Speech => Self::Speech(SpeechRequest::parse(body)?),
            Medium::Transcriptions => Self::Transcription(TranscriptionRequest::parse(content_type, body)?),
        })
    }

    pub fn medium(&self) -> Medium {
        match self {
            Self::Embeddings(_) => Medium::Embeddings,
            Self::Images(request) if request.is_edit() => Medium::ImageEdits,
            Self::Images(_) => Medium::Images,
            Self::Speech(_) => Medium::Speech,
            Self::Transcription(_) => Medium::Transcriptions,
        }
    }

    /// What a form says, whatever its boundary; `None` of what is none.
    pub fn pieces(&self) -> Option<Vec<&'a [u8]>> {
        match self {
            Self::Images(request) => request.form().map(Form::pieces),
            Self::Transcription(request) => Some(request.form().pieces()),
            Self::Embeddings(_) | Self::Speech(_) => None,
        }
    }

    pub fn model(&self) -> &str {
        match self {
            Self::Embeddings(request) => &request.model,
            Self::Images(request) => &request.model,
            Self::Speech(request) => &request.model,
            Self::Transcription(request) => &request.model,
        }
    }

    pub fn is_stream(&self) -> bool {
        match self {
            Self::Embeddings(_) => false,
            Self::Images(request) => request.stream,
            Self::Speech(request) => request.stream,
            Self::Transcription(request) => request.stream,
        }
    }

    /// What is offered, at the prices that this request can come to.
    pub fn narrow(&self, offer: &Arc<Offer>) -> Result<Arc<Offer>, BadRequest> {
        match self {
            Self::Images(request) => request.narrow(offer),
            _ => Ok(Arc::clone(offer)),
        }
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        match self {
            Self::Embeddings(request) => request.bounds(offer),
            Self::Images(request) => request.bounds(offer),
            Self::Speech(request) => request.bounds(offer),
            Self::Transcription(request) => request.bounds(offer),
        }
    }

    /// What an upstream is sent for it: one that speaks as OpenAI does, and no other.
    pub fn to_upstream(&self, offer: &Offer, format: UpstreamFormat) -> Result<UpstreamRequest, BadRequest> {
        check_upstream(offer, format)?;
        let json = || "application/json".to_owned();
        let (content_type, body) = match self {
            Self::Embeddings(request) => (json(), request.upstream_body(offer)),
            Self::Images(request) => (request.upstream_content_type(), request.upstream_body(offer)),
            Self::Speech(request) => (json(), request.upstream_body(offer)),
            Self::Transcription(request) => (request.form().content_type(), request.upstream_body(offer)),
        };
        let headers = vec![("content-type", content_type)];
        Ok(UpstreamRequest {
            format: UpstreamFormat::Chat,
            path: self.medium().path().to_owned(),
            headers,
            body,
        })
    }

    /// How its answer is read.
    pub fn reading(&self) -> Reading {
        match self {
            Self::Embeddings(request) => request.reading(),
            Self::Images(request) => request.reading(),
            Self::Speech(request) => request.reading(),
            Self::Transcription(request) => request.reading(),
        }
    }
}

/// What a whole answer is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Format {
    /// A JSON object with `data`.
    Data,
    /// The same, of pictures that were asked for like this.
    Images {
        size: Option<String>,
        quality: Option<String>,
    },
    Sound(SpokenAs),
    /// A JSON object with `text`.
    Transcript,
    /// Text that is not JSON.
    Text,
}

/// How sound is kept.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum SpokenAs {
    File,
    /// 24,000 samples of 16 bits a second (OpenAI, *Text to speech*, supported output formats).
    Pcm,
}

const PCM_BYTES_A_MILLISECOND: u64 = 48;

/// How the answer to a request is read: what is kept of the request until then.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reading {
    /// As the client asked for it.
    pub(super) model: String,
    pub(super) format: Format,
    pub(super) dialect: Dialect,
    /// What was counted in the request itself: the characters, the length of a recording.
    pub(super) counted: Usage,
    /// Tokens, where an answer does not tell; `None`: as many as were held for.
    pub(super) estimate: Option<Usage>,
    /// What there is beside sound that is charged by the second, for want of a report.
    pub(super) beside_sound: Usage,
    /// The same of an answer that broke off, beside what came of it.
    pub(super) estimate_of_part: Option<Usage>,
}

/// What an answer used.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Used {
    /// As the upstream reports it, or as it was counted here.
    Known(Usage),
    /// As it probably was.
    Estimated(Usage),
    /// Nobody can tell: as much as was held for.
    Unknown,
}

impl Reading {
    pub(super) fn of_json(model: &str, dialect: Dialect) -> Self {
        let (format, model) = (Format::Data, model.to_owned());
        let (counted, beside_sound) = (Usage::NONE, Usage::NONE);
        Self { model, format, dialect, counted, estimate: None, beside_sound, estimate_of_part: None }
    }

    /// In which words the upstream reports usage.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Reads a whole answer, which came as this type.
    pub fn read<'a>(&'a self, content_type: Option<&str>, body: &'a [u8]) -> Result<Answer<'a>, NotAnAnswer> {
        // A text may be what somebody said who speaks JSON: only what it comes as tells that it is some.
        let may_be_json = self.format != Format::Text || content_type.is_some_and(is_json);
        let object = may_be_json.then(|| Object::parse(body).ok()).flatten();
        if object.as_ref().is_some_and(|object| object.get_non_null("error").is_some()) {
            return Err(NotAnAnswer::Error);
        }
        let has = |key: &str, begins: char| {
            object.as_ref().and_then(|object| object.get(key)).is_some_and(|value| value.starts_with(begins))
        };
        let is_one = match &self.format {
            Format::Data | Format::Images { .. } => has("data", '['),
            Format::Transcript => has("text", '"'),
            Format::Text => std::str::from_utf8(body).is_ok(),
            Format::Sound(_) => {
                let is_text = content_type.is_some_and(|value| value.trim_start().starts_with("text/"));
                !body.is_empty() && object.is_none() && !is_text
            }
        };
        let content_type = content_type.map(str::to_owned);
        if is_one {
            Ok(Answer { reading: self, content_type, body, object })
        } else {
            Err(NotAnAnswer::Nonsense)
        }
    }

    /// Watches a stream past.
    pub fn tap(&self) -> StreamTap {
        StreamTap {
            reading: self.clone(),
            usage_raw: None,
            last: None,
            is_over: false,
            size: None,
            quality: None,
            delivered: Delivered::default(),
        }
    }

    /// What was used of what the prices list, by what was reported and what was counted.
    fn used(
        &self,
        prices: &Prices,
        reported: Option<Usage>,
        counted: Usage,
        estimate: Option<Usage>,
    ) -> Used {
        let by_tokens = is_sold_by_tokens(prices);
        // A report of seconds says nothing of tokens. Of no tokens it says that there were none.
        let is_of_tokens = |usage: &Usage| usage.count(Unit::Millisecond) == 0 || usage.prompt_tokens() > 0;
        let tokens = reported.filter(is_of_tokens);
        if self.is_either(prices) {
            // Whatever is reported is the sound; without a report of tokens it is what was measured.
            return tokens.map_or_else(|| self.used_by_second(reported, counted), Used::Known);
        }
        let mut used = match (by_tokens, tokens, estimate) {
            (false, ..) => Usage::NONE,
            (true, Some(tokens), _) => of_tokens(&tokens),
            (true, None, Some(estimate)) => of_tokens(&estimate),
            (true, None, None) => return Used::Unknown,
        };
        for unit in [Unit::Image, Unit::Millisecond, Unit::Character, Unit::Search] {
            let reported = reported.map_or(0, |reported| reported.count(unit));
            let count = if reported > 0 { reported } else { counted.count(unit) };
            if is_priced(prices, unit) {
                if count == 0 && unit == Unit::Millisecond {
                    return Used::Unknown;
                }
                used = used.with(unit, count);
            }
        }
        if by_tokens && tokens.is_none() { Used::Estimated(used) } else { Used::Known(used) }
    }

    /// Whether sound has a price by the token and by the second.
    fn is_either(&self, prices: &Prices) -> bool {
        match self.dialect {
            Dialect::Speech => is_either(prices, Unit::AudioOut),
            Dialect::Transcription => is_either(prices, Unit::AudioIn),
            _ => false,
        }
    }

    fn used_by_second(&self, reported: Option<Usage>, counted: Usage) -> Used {
        let reported = reported.map_or(0, |reported| reported.count(Unit::Millisecond));
        let ms = if reported > 0 { reported } else { counted.count(Unit::Millisecond) };
        match (ms, reported) {
            (0, _) => Used::Unknown,
            (_, 0) => Used::Estimated(self.beside_sound.with(Unit::Millisecond, ms)),
            _ => Used::Known(Usage::NONE.with(Unit::Millisecond, ms)),
        }
    }

    fn read_usage(&self, report: &str) -> Option<Usage> {
        let read = |dialect| Reported::read(dialect, report).map(|reported| reported.usage);
        match self.dialect {
            // Mistral reports them in the words of its chat.
            Dialect::Transcription => read(Dialect::Transcription).or_else(|| read(Dialect::OpenAi)),
            dialect => read(dialect),
        }
    }

    /// The terms at which pictures that turned out like this are charged.
    fn terms(&self, terms: &Terms, size: Option<&str>, quality: Option<&str>) -> Option<Terms> {
        let Format::Images { size: asked_size, quality: asked_quality } = &self.format else { return None };
        let size = size.or(asked_size.as_deref());
        terms.for_image(size, quality.or(asked_quality.as_deref()))
    }
}

/// Whether a Content-Type is that of JSON, with or without parameters.
fn is_json(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default();
    kind.trim().eq_ignore_ascii_case("application/json")
}

fn of_tokens(usage: &Usage) -> Usage {
    let tokens = usage.iter().filter(|(unit, _)| unit.is_prompt() || unit.is_completion());
    tokens.fold(Usage::NONE, |usage, (unit, count)| usage.with(unit, count))
}

/// A whole answer.
pub struct Answer<'a> {
    reading: &'a Reading,
    /// As what it came.
    content_type: Option<String>,
    body: &'a [u8],
    object: Option<Object<'a>>,
}

impl Answer<'_> {
    /// The upstream's report of usage, as it is.
    pub fn usage_raw(&self) -> Option<&str> {
        self.object.as_ref().and_then(|object| object.get_non_null("usage"))
    }

    /// What it used of what these prices list.
    pub fn used(&self, prices: &Prices) -> Used {
        let reported = self.usage_raw().and_then(|report| self.reading.read_usage(report));
        self.reading.used(prices, reported, self.counted(prices), self.reading.estimate)
    }

    /// What is counted in the answer, and in its request, of what these prices list.
    fn counted(&self, prices: &Prices) -> Usage {
        let counted = self.reading.counted;
        match &self.reading.format {
            Format::Images { .. } => counted.with(Unit::Image, self.images()),
            // Measuring takes a look at all of it.
            Format::Sound(_) if !is_priced(prices, Unit::Millisecond) => counted,
            Format::Sound(SpokenAs::Pcm) => {
                let bytes = u64::try_from(self.body.len()).unwrap_or(u64::MAX);
                counted.with(Unit::Millisecond, bytes.div_ceil(PCM_BYTES_A_MILLISECOND))
            }
            Format::Sound(SpokenAs::File) => {
                let length = sound::measure(self.body);
                counted.with(Unit::Millisecond, length.map_or(0, |length| length.ms))
            }
            // How long the recording was, as the upstream heard it.
            Format::Transcript => match self.duration_ms() {
                Some(ms) => counted.with(Unit::Millisecond, ms),
                None => counted,
            },
            Format::Data | Format::Text => counted,
        }
    }

    fn images(&self) -> u64 {
        let data = self.object.as_ref().and_then(|object| object.get("data")).unwrap_or("[]");
        let list = serde_json::from_str::<Vec<&serde_json::value::RawValue>>(data).unwrap_or_default();
        u64::try_from(list.len()).unwrap_or(u64::MAX)
    }

    /// A `duration` in seconds, if there is one above 0.
    fn duration_ms(&self) -> Option<u64> {
        let (ms, has_rest) = parse_decimal(self.object.as_ref()?.get_non_null("duration")?, 3).ok()?;
        u64::try_from(ms).ok()?.checked_add(u64::from(has_rest)).filter(|ms| *ms > 0)
    }

    /// The terms at which it is charged, where it tells more of them than the request did.
    pub fn terms(&self, terms: &Terms) -> Option<Terms> {
        let text = |key: &str| -> Option<String> {
            serde_json::from_str(self.object.as_ref()?.get_non_null(key)?).ok()
        };
        self.reading.terms(terms, text("size").as_deref(), text("quality").as_deref())
    }

    /// The answer for the client: as it came, but for the model by the name it asked for, and what was charged
    /// where there is a report of usage to say it in.
    pub fn render(self, charged: MicroUsdc) -> Bytes {
        let Some(mut object) = self.object else { return Bytes::copy_from_slice(self.body) };
        if object.get("model").is_some() {
            object.set("model", quote(&self.reading.model));
        }
        if let Some(usage) = object.get_non_null("usage").and_then(|usage| with_charge(usage, charged)) {
            object.set("usage", usage);
        }
        object.to_bytes().into()
    }

    /// What the client gets it as; `None`: JSON. Of sound that is what the upstream says, if it is sound.
    pub fn content_type(&self) -> Option<String> {
        let is_sound = |kind: &&str| {
            let name = kind.strip_prefix("audio/").unwrap_or_default();
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
        };
        match (&self.object, &self.reading.format) {
            (Some(_), _) => None,
            (None, Format::Sound(_)) => {
                let kind = self.content_type.as_deref().filter(is_sound);
                Some(kind.unwrap_or("application/octet-stream").to_owned())
            }
            (None, _) => Some("text/plain; charset=utf-8".to_owned()),
        }
    }
}

fn with_charge(usage: &str, charged: MicroUsdc) -> Option<String> {
    with_member(usage, "charged_usdc", &charged.to_string())
}

/// Watches a stream of events past. Its last one, which tells the usage, is held back until that is settled.
pub struct StreamTap {
    reading: Reading,
    usage_raw: Option<String>,
    last: Option<Event>,
    /// Whether the upstream has ended it, with or without what was asked for.
    is_over: bool,
    size: Option<String>,
    quality: Option<String>,
    delivered: Delivered,
}

/// What ends a stream, by its type.
const LAST: [&str; 4] = [
    "\"speech.audio.done\"",
    "\"transcript.text.done\"",
    "\"image_generation.completed\"",
    "\"image_edit.completed\"",
];

/// How the types of events end that hold a picture before it is ready.
const PARTIAL_IMAGE: &str = ".partial_image\"";

impl StreamTap {
    /// Reads one event and says what the client gets of it.
    pub fn event(&mut self, event: &Event) -> Forward {
        let forward = self.read(event);
        self.is_over |= !matches!(forward, Forward::Send(_) | Forward::Skip);
        forward
    }

    fn read(&mut self, event: &Event) -> Forward {
        let Some(data) = event.data() else { return Forward::Send(event.0.clone()) };
        if data.trim_ascii() == b"[DONE]" {
            return Forward::Done;
        }
        let Ok(object) = Object::parse(&data) else { return Forward::Nonsense };
        if object.get_non_null("error").is_some() || object.get("type") == Some("\"error\"") {
            return Forward::Failed;
        }
        if object.get("type").is_some_and(|kind| LAST.contains(&kind)) {
            let text = |key: &str| serde_json::from_str(object.get_non_null(key)?).ok();
            (self.size, self.quality) = (text("size"), text("quality"));
            self.usage_raw = object.get_non_null("usage").map(str::to_owned);
            self.last = Some(event.clone());
            return Forward::Done;
        }
        let texts = ["delta", "audio", "b64_json", "url", "text"];
        let bytes: u64 = texts.iter().map(|key| text_bytes(&object, key)).sum();
        // A picture that was begun is something, whatever it comes in.
        let is_picture = object.get("type").is_some_and(|kind| kind.ends_with(PARTIAL_IMAGE));
        self.delivered.add(if is_picture { bytes.max(1) } else { bytes });
        Forward::Send(event.0.clone())
    }

    /// What ends the stream, to be sent when it is settled, with what was charged.
    pub fn last(&self, charged: MicroUsdc) -> Bytes {
        let Some(event) = &self.last else { return Event::from_data(b"[DONE]") };
        let charged = event.data().and_then(|data| {
            let mut object = Object::parse(&data).ok()?;
            let usage = with_charge(object.get_non_null("usage")?, charged)?;
            object.set("usage", usage);
            Some(object.to_bytes())
        });
        match (charged, event.name()) {
            (None, _) => event.0.clone(),
            (Some(data), None) => Event::from_data(&data),
            (Some(data), Some(name)) => Event::named(name, &data),
        }
    }

    pub fn usage_raw(&self) -> Option<&str> {
        self.usage_raw.as_deref()
    }

    pub fn delivered_anything(&self) -> bool {
        self.delivered.anything()
    }

    /// Whether the answer is whole.
    pub fn is_finished(&self) -> bool {
        self.last.is_some()
    }

    /// What was used so far, of what these prices list.
    pub fn used(&self, prices: &Prices) -> Used {
        let reading = &self.reading;
        let reported = self.usage_raw().and_then(|report| reading.read_usage(report));
        let counted = match &reading.format {
            Format::Images { .. } => reading.counted.with(Unit::Image, self.images()),
            _ => reading.counted,
        };
        let said = self.delivered.estimated_tokens();
        let part = reading.estimate_of_part.map(|usage| usage.with(Unit::Completion, said));
        let estimate = if self.is_finished() { reading.estimate } else { part };
        reading.used(prices, reported, counted, estimate)
    }

    /// A stream is of one picture, which is made also for who leaves before it comes. Only where the upstream has ended
    /// it without any was there none.
    fn images(&self) -> u64 {
        u64::from(self.is_finished() || self.delivered_anything() || !self.is_over)
    }

    /// The terms at which it is charged, where it tells more of them than the request did.
    pub fn terms(&self, terms: &Terms) -> Option<Terms> {
        self.reading.terms(terms, self.size.as_deref(), self.quality.as_deref())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::formats::chat::tests::offer as chat_offer;
    use crate::formats::sound::tests::wav;
    use crate::money::{MarkupBps, UnitPrice};
    use crate::pricing::{ModelKind, UnitPrices, quote as quote_of};
    use proptest::prelude::*;

    pub(in crate::formats) fn offer(kind: ModelKind, listed: &[(Unit, i64)]) -> Offer {
        let rates = listed
            .iter()
            .fold(UnitPrices::default(), |rates, (unit, pico)| rates.with(*unit, UnitPrice::new(*pico)));
        Offer {
            id: "p/m".into(),
            kind,
            upstream_model: "upstream-m".into(),
            context_length: 0,
            max_output_tokens: 0,
            prices: Arc::new(Prices::new(rates, Vec::new(), Vec::new())),
            ..chat_offer()
        }
    }

    pub(in crate::formats) fn used(reading: &Reading, answer: &str, offer: &Offer) -> Used {
        reading.read(None, answer.as_bytes()).unwrap().used(&offer.prices)
    }

    pub(in crate::formats) fn event(data: &str) -> Event {
        Event(Event::from_data(data.as_bytes()))
    }

    /// One of each kind, with what it is asked.
    fn sold() -> Vec<(Offer, Request<'static>)> {
        let parse = |medium, body: &'static str| {
            let content_type = Some("multipart/form-data; boundary=b");
            Request::parse(medium, content_type, body.as_bytes()).unwrap()
        };
        let edit = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\np\r\n--b\r\nContent-Disposition: form-data; name=\"image\"; filename=\"a\"\r\n\r\nx\r\n--b--";
        let transcription = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nx\r\n--b--";
        let image = [
            (Unit::Prompt, 5),
            (Unit::ImageIn, 10),
            (Unit::CachedPrompt, 1),
            (Unit::ImageOut, 40),
            (Unit::Image, 7),
        ];
        let listener = [(Unit::Prompt, 2), (Unit::AudioIn, 6), (Unit::Completion, 10), (Unit::Call, 3)];
        let speech = [(Unit::Prompt, 1), (Unit::AudioOut, 12), (Unit::Character, 9)];
        vec![
            (
                offer(ModelKind::Embedding, &[(Unit::Prompt, 20)]),
                parse(Medium::Embeddings, r#"{"model":"m","input":["abc","d"]}"#),
            ),
            (offer(ModelKind::Image, &image), parse(Medium::Images, r#"{"model":"m","prompt":"p","n":3}"#)),
            (offer(ModelKind::Image, &image), parse(Medium::ImageEdits, edit)),
            (offer(ModelKind::Speech, &speech), parse(Medium::Speech, r#"{"model":"m","input":"Hello"}"#)),
            (offer(ModelKind::Transcription, &listener), parse(Medium::Transcriptions, transcription)),
        ]
    }

    fn held(offer: Offer, request: &Request<'_>) -> (Terms, Bounds, MicroUsdc) {
        let offer = Offer { context_length: 4000, max_output_tokens: 900, ..offer };
        let (terms, bounds) = (offer.terms(MarkupBps::new(2000)), request.bounds(&offer).unwrap());
        let hold = quote_of(&terms, bounds.most()).unwrap().amount;
        (terms, bounds, hold)
    }

    #[test]
    fn where_nobody_can_tell_the_hold_is_what_was_used() {
        for (offer, request) in sold() {
            let (terms, bounds, hold) = held(offer, &request);
            let charge = terms.charge(&bounds.all(&terms.prices), hold).unwrap();
            assert_eq!(
                (charge.charged, charge.above_hold, charge.unpriced.is_empty()),
                (hold, MicroUsdc::ZERO, true)
            );
            assert!(hold > MicroUsdc::ZERO);
        }
    }

    #[test]
    fn sound_is_measured_where_its_length_has_a_price() {
        let request = Request::parse(Medium::Speech, None, br#"{"model":"m","input":"Hello"}"#).unwrap();
        let (reading, file) = (request.reading(), wav(16_000, 24_000));
        let counted = |unit| {
            let answer = reading.read(Some("audio/wav"), &file).unwrap();
            answer.counted(&offer(ModelKind::Speech, &[(unit, 9)]).prices).count(Unit::Millisecond)
        };
        assert_eq!(
            (counted(Unit::Millisecond), counted(Unit::Character), counted(Unit::AudioOut)),
            (1500, 0, 0)
        );
    }

    #[test]
    fn only_who_speaks_as_openai_does_is_asked() {
        for (offer, request) in sold() {
            assert!(request.to_upstream(&offer, UpstreamFormat::Responses).is_ok());
            for format in [UpstreamFormat::Messages, UpstreamFormat::Gemini] {
                let error = request.to_upstream(&offer, format).unwrap_err();
                assert_eq!((error.code, error.param.as_deref()), ("unsupported_parameter", Some("model")));
            }
        }
    }

    proptest! {
        /// Whatever is used within the bounds, in whichever of the units that it may be billed as.
        #[test]
        fn no_use_within_the_bounds_costs_more_than_the_hold(
            which in 0..5_usize, shares in proptest::collection::vec(0..=100_u64, Unit::COUNT),
        ) {
            let (offer, request) = sold().swap_remove(which);
            let (terms, bounds, hold) = held(offer, &request);
            let (mut prompt, mut completion) = (bounds.prompt, bounds.completion);
            let mut usage = bounds.others;
            for (unit, share) in Unit::all().zip(shares) {
                let left = if unit.is_prompt() { &mut prompt } else { &mut completion };
                if bounds.tokens.has(unit) {
                    let taken = *left * share / 100;
                    *left -= taken;
                    usage = usage.with(unit, taken);
                }
            }
            let charge = terms.charge(&usage, hold).unwrap();
            prop_assert_eq!(charge.above_hold, MicroUsdc::ZERO);
            prop_assert!(charge.unpriced.is_empty());
        }

        /// No answer and no event, however broken, is more than it is.
        #[test]
        fn nothing_panics(which in 0..5_usize, body in "\\PC{0,60}|[{}\\[\\]\",:a-z0-9 ]{0,60}") {
            let (offer, request) = sold().swap_remove(which);
            let reading = request.reading();
            if let Ok(answer) = reading.read(None, body.as_bytes()) {
                let _ = (answer.used(&offer.prices), answer.content_type());
                let _ = answer.render(MicroUsdc::new(1));
            }
            let mut tap = reading.tap();
            let _ = (tap.event(&event(&body)), tap.used(&offer.prices), tap.last(MicroUsdc::new(1)));
        }
    }
}
