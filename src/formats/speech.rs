//! Speech (OpenAI API reference, *Create speech*): a text in, its sound out, whole or as events.

use bytes::Bytes;

use crate::formats::json::{Object, length, quote};
use crate::formats::media::{Format, Reading, SpokenAs};
use crate::formats::request::{
    BadRequest, Bounds, Need, Refused, SERVICE_TIER, bad_value, check_kind, estimate_tokens, is_priced,
    most_tokens, optional, parse_body, refuse_members, required, unsupported, within_context,
};
use crate::money::parse_decimal;
use crate::pricing::{Dialect, ModelKind, Offer, Unit, Units, Usage};

/// Members that are read here, and so must not mean something else to the upstream.
const INTERPRETED: &[&str] =
    &["model", "input", "instructions", "response_format", "speed", "stream_format", "stream"];

/// Members that would buy something the catalogue has no price for, or escape the bounds: texts that nobody counted.
const NOT_PRICED: &[Refused] =
    &[SERVICE_TIER, ("text", INPUT), ("inputs", INPUT), ("ssml", INPUT), ("script", INPUT)];

const INPUT: &str = "what is to be spoken is sent as `input`";

/// Members that never become prompt; any other, known or not, is taken to.
const NOT_PROMPT: &[&str] = &["model", "voice", "response_format", "speed", "stream_format", "stream"];

/// No voice takes longer for a character, at the speed of 1. It is an assumption: people, and models, take a
/// seventh of it.
const MOST_MS_A_CHARACTER: u64 = 500;

/// Voices begin and end with silence, however little they say and however fast.
const LEAST_MS: u64 = 1000;

/// No model makes more tokens of a second: they make 20 to 50.
const MOST_TOKENS_A_SECOND: u64 = 100;

/// A request for speech, parsed as far as its price needs.
pub struct SpeechRequest<'a> {
    object: Object<'a>,
    pub model: String,
    /// Whether the sound comes in events.
    pub stream: bool,
    characters: u64,
    prompt_bytes: u64,
    /// In thousandths.
    speed: u64,
    spoken_as: SpokenAs,
}

impl<'a> SpeechRequest<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Self, BadRequest> {
        let object = parse_body(body, INTERPRETED)?;
        let model: String = required(&object, "model")?;
        let input: String = required(&object, "input")?;
        refuse_members(&object, NOT_PRICED)?;
        if optional::<bool>(&object, "stream", "must be true or false")?.unwrap_or(false) {
            return Err(unsupported("stream", "a stream of speech is asked for by stream_format: \"sse\""));
        }
        let stream_format: Option<String> = optional(&object, "stream_format", "must be a string")?;
        let stream = match stream_format.as_deref() {
            None | Some("audio") => false,
            Some("sse") => true,
            Some(_) => return Err(bad_value("stream_format", "stream_format must be audio or sse")),
        };
        let format: Option<String> = optional(&object, "response_format", "must be a string")?;
        let prompt = object.members().filter(|(key, _)| !NOT_PROMPT.contains(key));
        Ok(Self {
            model,
            stream,
            characters: u64::try_from(input.chars().count()).unwrap_or(u64::MAX),
            prompt_bytes: prompt.map(|(_, value)| length(value)).sum(),
            speed: speed(&object)?,
            spoken_as: if format.as_deref() == Some("pcm") { SpokenAs::Pcm } else { SpokenAs::File },
            object,
        })
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        check_kind(offer, ModelKind::Speech)?;
        let by_second = is_priced(&offer.prices, Unit::Millisecond);
        if self.stream && by_second && !is_priced(&offer.prices, Unit::AudioOut) {
            let message =
                format!("{} is sold by the second, which events do not tell: leave it out", offer.id);
            return Err(unsupported("stream_format", message));
        }
        let most_ms =
            self.characters.saturating_mul(MOST_MS_A_CHARACTER).saturating_mul(1000).div_ceil(self.speed);
        let most_ms = most_ms.max(LEAST_MS);
        Need {
            prompt: within_context(most_tokens(self.prompt_bytes), offer),
            completion: self.most_spoken(most_ms, offer),
            either: Some(Unit::AudioOut),
            tokens: Units::NONE.with(Unit::Prompt).with(Unit::AudioOut),
            others: self.counted().with(Unit::Millisecond, most_ms),
            ..Need::default()
        }
        .bounds(offer)
    }

    /// Tokens of sound: as many as the model has, or as there are in the longest that it can be.
    fn most_spoken(&self, most_ms: u64, offer: &Offer) -> u64 {
        let most = most_ms.div_ceil(1000).saturating_mul(MOST_TOKENS_A_SECOND);
        if offer.max_output_tokens == 0 { most } else { most.min(offer.max_output_tokens) }
    }

    fn counted(&self) -> Usage {
        Usage::NONE.with(Unit::Character, self.characters)
    }

    /// The body for the upstream: the client's, but for the model's name there.
    pub fn upstream_body(&self, offer: &Offer) -> Bytes {
        let mut object = self.object.clone();
        object.set("model", quote(&offer.upstream_model));
        object.to_bytes().into()
    }

    pub fn reading(&self) -> Reading {
        let format = Format::Sound(self.spoken_as);
        let beside_sound = Usage::NONE.with(Unit::Prompt, estimate_tokens(self.prompt_bytes));
        Reading {
            format,
            counted: self.counted(),
            beside_sound,
            ..Reading::of_json(&self.model, Dialect::Speech)
        }
    }
}

/// How fast it is spoken, in thousandths.
fn speed(object: &Object<'_>) -> Result<u64, BadRequest> {
    let Some(text) = object.get_non_null("speed") else { return Ok(1000) };
    let speed = parse_decimal(text, 3).ok().and_then(|(speed, _)| u64::try_from(speed).ok());
    let expected = || bad_value("speed", "speed must be a number between 0.25 and 4");
    speed.filter(|speed| (250..=4000).contains(speed)).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::answer::Forward;
    use crate::formats::answer::NotAnAnswer;
    use crate::formats::media::Used;
    use crate::formats::media::tests::{event, offer, used};
    use crate::money::{MarkupBps, MicroUsdc};
    use crate::pricing::quote as price;

    const BODY: &str = r#"{"model":"p/m","input":"Grüße \u00e9","voice":"alloy"}"#;

    fn parse(body: &str) -> SpeechRequest<'_> {
        SpeechRequest::parse(body.as_bytes()).unwrap()
    }

    #[test]
    fn characters_are_counted_and_not_bytes() {
        let tts = offer(ModelKind::Speech, &[(Unit::Character, 15_000_000)]);
        let bounds = parse(BODY).bounds(&tts).unwrap();
        assert_eq!(bounds.others, Usage::NONE.with(Unit::Character, 7));
        assert_eq!((bounds.prompt, bounds.completion), (0, 0));
        let used = used(&parse(BODY).reading(), "ID3 and so on", &tts);
        assert_eq!(used, Used::Known(Usage::NONE.with(Unit::Character, 7)));
    }

    #[test]
    fn sound_by_the_second_is_measured() {
        let tts = offer(ModelKind::Speech, &[(Unit::Millisecond, 250_000)]);
        let body = BODY.replace("\"voice\"", r#""response_format":"pcm","speed":0.5,"voice""#);
        assert_eq!(parse(&body).bounds(&tts).unwrap().others.count(Unit::Millisecond), 7 * 500 * 2);
        let pcm = "x".repeat(48_001);
        let measured = Used::Known(Usage::NONE.with(Unit::Millisecond, 1001));
        assert_eq!(used(&parse(&body).reading(), &pcm, &tts), measured);
        // What cannot be measured is charged as what was held.
        assert_eq!(used(&parse(BODY).reading(), &pcm, &tts), Used::Unknown);
        let events = BODY.replace("\"voice\"", r#""stream_format":"sse","voice""#);
        assert_eq!(parse(&events).bounds(&tts).unwrap_err().param.as_deref(), Some("stream_format"));
    }

    #[test]
    fn of_the_shortest_text_a_second_is_held_for() {
        let tts = offer(ModelKind::Speech, &[(Unit::Millisecond, 250_000)]);
        for (input, speed, ms) in
            [("", "1", 1000), ("a", "1", 1000), ("abcdefg", "4", 1000), ("abc", "1", 1500)]
        {
            let body =
                format!(r#"{{"model":"p/m","input":"{input}","response_format":"pcm","speed":{speed}}}"#);
            let request = parse(&body);
            let bounds = request.bounds(&tts).unwrap();
            assert_eq!(bounds.others, Usage::NONE.with(Unit::Millisecond, ms), "{input}");
            // However long it turns out, no more is charged than was held.
            let terms = tts.terms(MarkupBps::new(2000));
            let held = price(&terms, bounds.most()).unwrap().amount;
            let Used::Known(spoken) = used(&request.reading(), &"x".repeat(480_000), &tts) else {
                panic!("it is measured")
            };
            assert_eq!(spoken.count(Unit::Millisecond), 10_000);
            assert_eq!(terms.charge(&spoken, held).unwrap().charged, held);
        }
    }

    #[test]
    fn sound_by_the_token_is_bounded_by_the_model_and_told_by_events() {
        let tokens = offer(ModelKind::Speech, &[(Unit::Prompt, 600_000), (Unit::AudioOut, 12_000_000)]);
        // Seven characters, of half a second each, and a hundred tokens a second begun.
        let bounds = parse(BODY).bounds(&tokens).unwrap();
        assert_eq!((bounds.completion, bounds.others), (400, Usage::NONE));
        let tokens = Offer { max_output_tokens: 300, ..tokens };
        assert_eq!(parse(BODY).bounds(&tokens).unwrap().completion, 300);
        assert!(bounds.tokens.has(Unit::AudioOut) && bounds.tokens.has(Unit::Prompt));
        assert_eq!(used(&parse(BODY).reading(), "ID3", &tokens), Used::Unknown);

        let body = BODY.replace("\"voice\"", r#""stream_format":"sse","voice""#);
        let request = parse(&body);
        assert!(request.stream);
        let mut tap = request.reading().tap();
        let delta = event(r#"{"type":"speech.audio.delta","audio":"AAAA"}"#);
        assert_eq!(tap.event(&delta), Forward::Send(delta.0.clone()));
        assert!(tap.delivered_anything() && !tap.is_finished());
        assert_eq!(tap.used(&tokens.prices), Used::Unknown);
        let done = event(
            r#"{"type":"speech.audio.done","usage":{"input_tokens":14,"output_tokens":101,"total_tokens":115}}"#,
        );
        assert_eq!(tap.event(&done), Forward::Done);
        let usage = Usage::NONE.with(Unit::Prompt, 14).with(Unit::AudioOut, 101);
        assert_eq!(tap.used(&tokens.prices), Used::Known(usage));
        assert_eq!(
            tap.last(MicroUsdc::new(9)),
            "data: {\"type\":\"speech.audio.done\",\"usage\":{\"input_tokens\":14,\"output_tokens\":101,\"total_tokens\":115,\"charged_usdc\":9}}\n\n"
        );
    }

    #[test]
    fn sound_with_two_prices_is_charged_by_one_of_them() {
        let prices = [(Unit::Prompt, 600_000), (Unit::AudioOut, 12_000_000), (Unit::Millisecond, 250_000)];
        let both = offer(ModelKind::Speech, &prices);
        let body = BODY.replace("\"voice\"", r#""response_format":"pcm","voice""#);
        // The dearer is held: 400 tokens at most, or 3,500 milliseconds.
        let bounds = parse(&body).bounds(&both).unwrap();
        assert_eq!((bounds.completion, bounds.others), (400, Usage::NONE));
        let prices = [(Unit::Prompt, 600_000), (Unit::AudioOut, 12_000_000), (Unit::Millisecond, 2_500_000)];
        let bounds = parse(&body).bounds(&offer(ModelKind::Speech, &prices)).unwrap();
        assert_eq!(bounds.others, Usage::NONE.with(Unit::Millisecond, 3500));
        assert!(!bounds.tokens.has(Unit::AudioOut) && bounds.tokens.has(Unit::Prompt));
        // Nobody says what it used, and it lasts a second; the text is about so long.
        let second = Usage::NONE.with(Unit::Millisecond, 1000).with(Unit::Prompt, 4);
        assert_eq!(used(&parse(&body).reading(), &"x".repeat(48_000), &both), Used::Estimated(second));
        assert_eq!(used(&parse(BODY).reading(), "what cannot be measured", &both), Used::Unknown);
        let events = BODY.replace("\"voice\"", r#""stream_format":"sse","voice""#);
        let mut tap = parse(&events).reading().tap();
        tap.event(&event(r#"{"type":"speech.audio.done","usage":{"input_tokens":14,"output_tokens":101}}"#));
        let usage = Usage::NONE.with(Unit::Prompt, 14).with(Unit::AudioOut, 101);
        assert_eq!(tap.used(&both.prices), Used::Known(usage));
    }

    #[test]
    fn what_is_no_sound_is_no_answer() {
        let reading = parse(BODY).reading();
        let read = |content_type: &str, body: &str| reading.read(Some(content_type), body.as_bytes()).err();
        assert_eq!(read("audio/mpeg", "ID3"), None);
        assert_eq!(read("application/octet-stream", "ID3"), None);
        assert_eq!(read("audio/mpeg", ""), Some(NotAnAnswer::Nonsense));
        assert_eq!(read("text/html", "<html>"), Some(NotAnAnswer::Nonsense));
        assert_eq!(read("application/json", r#"{"error":{"message":"no"}}"#), Some(NotAnAnswer::Error));
        assert_eq!(read("application/json", r#"{"ok":true}"#), Some(NotAnAnswer::Nonsense));
        let kind = |content_type: &str| reading.read(Some(content_type), b"ID3").unwrap().content_type();
        assert_eq!(kind("audio/mpeg").as_deref(), Some("audio/mpeg"));
        assert_eq!(kind("image/svg+xml").as_deref(), Some("application/octet-stream"));
        assert_eq!(kind("audio/x\r\nset-cookie: a").as_deref(), Some("application/octet-stream"));
    }

    #[test]
    fn bad_requests_name_their_field() {
        for (members, param) in [
            (r#""input":"a""#, "model"),
            (r#""model":"m""#, "input"),
            (r#""model":"m","input":["a"]"#, "input"),
            (r#""model":"m","input":"a","speed":0"#, "speed"),
            (r#""model":"m","input":"a","speed":0.1"#, "speed"),
            (r#""model":"m","input":"a","speed":"2""#, "speed"),
            (r#""model":"m","input":"a","speed":4.1"#, "speed"),
            (r#""model":"m","input":"a","stream":true"#, "stream"),
            (r#""model":"m","input":"a","stream_format":"x""#, "stream_format"),
            (r#""model":"m","input":"a","fallbacks":["x"]"#, "fallbacks"),
            (r#""model":"m","input":"a","text":"b""#, "text"),
            (r#""model":"m","input":"a","Text":"b""#, "Text"),
            (r#""model":"m","input":"a","inputs":["b"]"#, "inputs"),
            (r#""model":"m","input":"a","ssml":"<p/>""#, "ssml"),
            (r#""model":"m","input":"a","script":"b""#, "script"),
            (r#""model":"m","input":"a","Speed":4"#, "Speed"),
        ] {
            let body = format!("{{{members}}}");
            let error = SpeechRequest::parse(body.as_bytes()).err().expect(members);
            assert_eq!(error.param.as_deref(), Some(param), "{members}");
        }
        let request = parse(BODY);
        let error = request.bounds(&offer(ModelKind::Transcription, &[])).unwrap_err();
        assert!(error.message.ends_with("/v1/audio/transcriptions"), "{}", error.message);
        assert_eq!(
            request.upstream_body(&offer(ModelKind::Speech, &[])),
            r#"{"model":"upstream-m","input":"Grüße \u00e9","voice":"alloy"}"#
        );
    }
}
