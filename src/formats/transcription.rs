//! Transcriptions (OpenAI API reference, *Create transcription*): a recording in, its text out, whole or as events.

use bytes::Bytes;

use crate::formats::media::{Format, Reading, refuse_parts};
use crate::formats::multipart::Form;
use crate::formats::request::{
    BadRequest, Bounds, Need, Refused, SERVICE_TIER, bad_value, check_kind, is_priced, is_sold_by_tokens,
    most_tokens, unsupported, within_context,
};
use crate::formats::sound::{self, Length};
use crate::pricing::{Dialect, ModelKind, Offer, Unit, Units, Usage};

/// Fields that are read here, and so must not mean something else to the upstream.
const INTERPRETED: &[&str] = &["model", "file", "prompt", "response_format", "stream"];

/// Fields that would buy something the catalogue has no price for, or escape the bounds.
const NOT_PRICED: &[Refused] = &[
    SERVICE_TIER,
    ("known_speaker_references", BESIDE_FILE),
    ("url", ELSEWHERE),
    ("file_url", ELSEWHERE),
    ("file_id", ELSEWHERE),
];

const BESIDE_FILE: &str = "recordings beside the file are not bounded here: leave it out";
const ELSEWHERE: &str = "a recording elsewhere cannot be bounded: send it as `file`";

/// Fields that never become prompt; any other, known or not, is taken to.
const NOT_PROMPT: &[&str] = &[
    "model",
    "response_format",
    "stream",
    "temperature",
    "timestamp_granularities",
    "include",
    "chunking_strategy",
];
/// A name of a language is no longer (RFC 5646, section 4.4.1), and what is longer is none.
const LONGEST_LANGUAGE: u64 = 35;

/// No model hears more tokens in a millisecond, or says more: they have 10 to 50 a second.
const MOST_TOKENS_A_SECOND: u64 = 100;
/// As many as are taken where a stream broke off before it told: OpenAI's models hear so many.
const ESTIMATED_TOKENS_A_SECOND: u64 = 10;
/// Longer recordings than this do not fit in a request.
const MOST_HOURS: u64 = 100;
/// What is billed by whole seconds is rounded up to them.
const SECOND_MS: u64 = 1000;

/// A request for a transcription, parsed as far as its price needs.
pub struct TranscriptionRequest<'a> {
    form: Form<'a>,
    pub model: String,
    pub stream: bool,
    prompt_bytes: u64,
    is_json: bool,
    is_cut: bool,
    /// How long the recording is, where that can be measured.
    length: Option<Length>,
}

impl<'a> TranscriptionRequest<'a> {
    pub fn parse(content_type: Option<&str>, body: &'a [u8]) -> Result<Self, BadRequest> {
        let form = Form::parse(content_type, body)?;
        form.must_be_clear(INTERPRETED)?;
        refuse_parts(&form, NOT_PRICED)?;
        if let Some((name, ..)) = form.sizes().find(|(name, is_file, _)| *is_file && *name != "file") {
            return Err(unsupported(name, BESIDE_FILE));
        }
        let model = form.required_text("model")?.to_owned();
        let file = form.file("file")?;
        let stream = match form.text("stream")? {
            None | Some("false" | "False" | "0") => false,
            Some("true" | "True" | "1") => true,
            Some(_) => return Err(bad_value("stream", "stream must be true or false")),
        };
        let is_json = match form.text("response_format")? {
            None | Some("json" | "verbose_json" | "diarized_json") => true,
            Some("text" | "srt" | "vtt") => false,
            Some(_) => {
                let expected = "response_format must be json, text, srt, verbose_json, vtt or diarized_json";
                return Err(bad_value("response_format", expected));
            }
        };
        let may_be_prompt = |name: &str, size: u64| match name.split('[').next().unwrap_or(name) {
            "language" => size > LONGEST_LANGUAGE,
            field => !NOT_PROMPT.contains(&field),
        };
        let texts = form.sizes().filter(|(name, is_file, size)| !is_file && may_be_prompt(name, *size));
        let prompt_bytes = texts.map(|(_, _, size)| size).sum();
        let is_cut = form.sizes().any(|(name, ..)| name.starts_with("chunking_strategy"));
        let length = sound::measure_sent(file);
        Ok(Self { model, stream, prompt_bytes, is_json, is_cut, length, form })
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        check_kind(offer, ModelKind::Transcription)?;
        if self.stream && !is_sold_by_tokens(&offer.prices) {
            // OpenAI's whisper answers as if it were not there, and not with events.
            let message = format!("{} does not stream: leave stream out", offer.id);
            return Err(unsupported("stream", message));
        }
        let most_ms = match self.length {
            Some(length) => length.most_ms,
            // What is sold by the call alone needs no length.
            None if !self.needs_length(offer) => 0,
            None => {
                let message = format!("how long file is cannot be told: send {}", sound::MEASURED);
                return Err(bad_value("file", message));
            }
        };
        if most_ms > MOST_HOURS * 3600 * SECOND_MS {
            return Err(bad_value(
                "file",
                format!("file may be longer than {MOST_HOURS} hours: send a shorter one"),
            ));
        }
        let heard = self.most_heard(most_ms, offer).saturating_add(match self.prompt_bytes {
            0 => 0,
            bytes => most_tokens(bytes),
        });
        let prompt = if self.is_cut { heard } else { within_context(heard, offer) };
        let said = most_ms.div_ceil(SECOND_MS).saturating_mul(MOST_TOKENS_A_SECOND);
        let completion = match offer.max_output_tokens {
            0 => most_tokens(said),
            most if self.is_cut => most.max(said),
            most => most,
        };
        let text = Units::NONE.with(Unit::Prompt).with(Unit::CachedPrompt);
        let heard = Units::NONE.with(Unit::AudioIn).with(Unit::Completion);
        Need {
            prompt,
            completion,
            either: Some(Unit::AudioIn),
            tokens: if self.prompt_bytes > 0 { heard.with(Unit::Prompt) } else { heard },
            maybe: text.with(Unit::CachedAudio).with(Unit::Reasoning),
            others: Usage::NONE.with(Unit::Millisecond, most_ms.next_multiple_of(SECOND_MS)),
            ..Need::default()
        }
        .bounds(offer)
    }

    /// Whether the price depends on how long the recording is, and nothing else bounds it.
    fn needs_length(&self, offer: &Offer) -> bool {
        let by_token = is_priced(&offer.prices, Unit::AudioIn);
        is_priced(&offer.prices, Unit::Millisecond)
            || by_token && (self.is_cut || offer.context_length == 0 || offer.max_output_tokens == 0)
    }

    fn most_heard(&self, most_ms: u64, offer: &Offer) -> u64 {
        match self.length {
            Some(_) => most_ms.div_ceil(SECOND_MS).saturating_mul(MOST_TOKENS_A_SECOND),
            None => offer.context_length,
        }
    }

    /// The form for the upstream: the client's, but for the model's name there.
    pub fn upstream_body(&self, offer: &Offer) -> Bytes {
        self.form.with_text("model", &offer.upstream_model)
    }

    pub(super) fn form(&self) -> &Form<'a> {
        &self.form
    }

    pub fn reading(&self) -> Reading {
        let ms = self.length.map_or(0, |length| length.ms);
        let tokens = ms.div_ceil(SECOND_MS).saturating_mul(ESTIMATED_TOKENS_A_SECOND);
        Reading {
            format: if self.is_json { Format::Transcript } else { Format::Text },
            counted: Usage::NONE.with(Unit::Millisecond, ms),
            estimate_of_part: self.length.map(|_| Usage::NONE.with(Unit::AudioIn, tokens)),
            ..Reading::of_json(&self.model, Dialect::Transcription)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::answer::{Forward, NotAnAnswer};
    use crate::formats::media::Used;
    use crate::formats::media::tests::{event, offer, used};
    use crate::formats::sound::tests::wav;
    use crate::money::MicroUsdc;

    const TYPE: Option<&str> = Some("multipart/form-data; boundary=b1");

    fn form(fields: &[(&str, &str)], file: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        for (name, value) in fields {
            let field = format!("--b1\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
            body.extend_from_slice(field.as_bytes());
        }
        body.extend_from_slice(
            b"--b1\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n",
        );
        body.extend_from_slice(file);
        body.extend_from_slice(b"\r\n--b1--\r\n");
        body
    }

    fn whisper() -> Offer {
        offer(ModelKind::Transcription, &[(Unit::Millisecond, 100_000)])
    }

    fn by_token() -> Offer {
        let prices = [(Unit::Prompt, 2_500_000), (Unit::AudioIn, 6_000_000), (Unit::Completion, 10_000_000)];
        Offer { context_length: 16_000, max_output_tokens: 2000, ..offer(ModelKind::Transcription, &prices) }
    }

    /// What comes of a request for a second and a half of sound with these fields, and model.
    fn with<T>(fields: &[(&str, &str)], look: impl FnOnce(TranscriptionRequest<'_>) -> T) -> T {
        let fields = [&[("model", "p/m")], fields].concat();
        let body = form(&fields, &wav(16_000, 24_000));
        look(TranscriptionRequest::parse(TYPE, &body).unwrap())
    }

    fn refused(fields: &[(&str, &str)], file: &[u8], offer: &Offer) -> Option<String> {
        let body = form(fields, file);
        let error = match TranscriptionRequest::parse(TYPE, &body) {
            Err(error) => error,
            Ok(request) => request.bounds(offer).unwrap_err(),
        };
        error.param
    }

    #[test]
    fn a_second_begun_is_held_for_and_what_was_measured_is_charged() {
        let bounds = with(&[], |request| request.bounds(&whisper()).unwrap());
        assert_eq!(bounds.others.count(Unit::Millisecond), 2000);
        assert_eq!((bounds.prompt, bounds.completion), (0, 0));
        let ms = |ms| Used::Known(Usage::NONE.with(Unit::Millisecond, ms));
        for (format, answer, expected) in [
            ("json", r#"{"text":"Hi","usage":{"type":"duration","seconds":2}}"#, ms(2000)),
            ("json", r#"{"text":"Hi"}"#, ms(1500)),
            ("verbose_json", r#"{"text":"Hi","duration":1.4999,"segments":[]}"#, ms(1500)),
            ("verbose_json", r#"{"text":"Hi","duration":0}"#, ms(1500)),
            ("verbose_json", r#"{"text":"Hi","duration":1.2}"#, ms(1200)),
            ("srt", "1\n00:00:00,000 --> 00:00:01,000\nHi\n", ms(1500)),
            ("text", "Hi\n", ms(1500)),
        ] {
            let reading = with(&[("response_format", format)], |request| request.reading());
            assert_eq!(used(&reading, answer, &whisper()), expected, "{answer}");
        }
    }

    #[test]
    fn tokens_are_bounded_by_the_sound_and_the_context() {
        let bounds = with(&[], |request| request.bounds(&by_token()).unwrap());
        assert_eq!((bounds.prompt, bounds.completion), (200, 2000));
        assert_eq!(bounds.others, Usage::NONE);
        let bounds = with(&[("prompt", "Farebox")], |request| request.bounds(&by_token()).unwrap());
        assert!(bounds.prompt == 287 && bounds.tokens.has(Unit::Prompt));
        // What nobody here knows may be told to the model too, and so may a name that is no name.
        let text = "x".repeat(36);
        for (fields, bytes) in [
            (&[("context", "Farebox"), ("prompt", "")][..], 7),
            (&[("hotwords[0]", "Fare"), ("hotwords[1]", "box"), ("prompt", "Farebox")], 14),
            (&[("language", &text)], 36),
        ] {
            let bounds = with(fields, |request| request.bounds(&by_token()).unwrap());
            assert_eq!(bounds.prompt, 280 + bytes, "{fields:?}");
            assert!(bounds.tokens.has(Unit::Prompt), "{fields:?}");
        }
        let harmless = [
            ("language", "de"),
            ("temperature", "0.5"),
            ("timestamp_granularities[]", "word"),
            ("response_format", "json"),
            ("include[]", "logprobs"),
            ("stream", "true"),
        ];
        assert_eq!(with(&harmless, |request| request.bounds(&by_token()).unwrap().prompt), 200);
        let reading = with(&[], |request| request.reading());
        let answer = r#"{"text":"Hi","usage":{"type":"tokens","input_tokens":14,"input_token_details":{"text_tokens":0,"audio_tokens":14},"output_tokens":5,"total_tokens":19}}"#;
        let usage = Usage::NONE.with(Unit::AudioIn, 14).with(Unit::Completion, 5);
        assert_eq!(used(&reading, answer, &by_token()), Used::Known(usage));
        assert_eq!(used(&reading, r#"{"text":"Hi"}"#, &by_token()), Used::Unknown);
        // Seconds are no tokens.
        let seconds = r#"{"text":"Hi","usage":{"type":"duration","seconds":27}}"#;
        assert_eq!(used(&reading, seconds, &by_token()), Used::Unknown);
        // Sound that cannot be measured may fill the context, but not several of them.
        let body = form(&[("model", "p/m")], b"\x00\x01unknown");
        let request = TranscriptionRequest::parse(TYPE, &body).unwrap();
        assert_eq!(request.bounds(&by_token()).unwrap().prompt, 16_000);
        let cut = [("model", "m"), ("chunking_strategy", "auto")];
        assert_eq!(refused(&cut, b"\x00\x01unknown", &by_token()).as_deref(), Some("file"));
    }

    #[test]
    fn sound_with_two_prices_is_charged_by_one_of_them() {
        let prices =
            [(Unit::AudioIn, 6_000_000), (Unit::Completion, 10_000_000), (Unit::Millisecond, 100_000)];
        let both = Offer { max_output_tokens: 10, ..offer(ModelKind::Transcription, &prices) };
        let bounds = with(&[], |request| request.bounds(&both).unwrap());
        assert_eq!((bounds.prompt, bounds.others), (200, Usage::NONE));
        let reading = with(&[], |request| request.reading());
        let tokens = r#"{"text":"Hi","usage":{"type":"tokens","input_tokens":14,"input_token_details":{"audio_tokens":14},"output_tokens":5}}"#;
        let usage = Usage::NONE.with(Unit::AudioIn, 14).with(Unit::Completion, 5);
        assert_eq!(used(&reading, tokens, &both), Used::Known(usage));
        let seconds = r#"{"text":"Hi","usage":{"type":"duration","seconds":2}}"#;
        assert_eq!(used(&reading, seconds, &both), Used::Known(Usage::NONE.with(Unit::Millisecond, 2000)));
        let nothing = Used::Estimated(Usage::NONE.with(Unit::Millisecond, 1500));
        assert_eq!(used(&reading, r#"{"text":"Hi"}"#, &both), nothing);
    }

    #[test]
    fn bad_requests_name_their_field() {
        let sound = wav(16_000, 100);
        for (fields, param) in [
            (&[][..], "model"),
            (&[("model", "m"), ("stream", "yes")], "stream"),
            (&[("model", "m"), ("response_format", "xml")], "response_format"),
            (
                &[("model", "m"), ("known_speaker_references[]", "data:audio/wav;base64,")],
                "known_speaker_references",
            ),
            (&[("model", "m"), ("file_url", "http://x")], "file_url"),
            (&[("model", "m"), ("fallbacks", "x")], "fallbacks"),
            (&[("model", "m"), ("File_URL", "http://x")], "File_URL"),
            (&[("model", "m"), ("plugins[0][id]", "web")], "plugins"),
            (&[("model", "m"), ("audio\"; filename=\"b.wav", "RIFF")], "audio"),
            (&[("model", "m"), ("Stream", "true")], "stream"),
            (&[("model", "m"), ("stream", "true")], "stream"),
            (&[("model", "m"), ("file", "x")], "file"),
        ] {
            assert_eq!(refused(fields, &sound, &whisper()).as_deref(), Some(param), "{fields:?}");
        }
        assert_eq!(refused(&[("model", "m")], b"no sound", &whisper()).as_deref(), Some("file"));
        assert_eq!(refused(&[("model", "m")], &wav(1, 400_000), &whisper()).as_deref(), Some("file"));
        let speech = offer(ModelKind::Speech, &[]);
        assert_eq!(refused(&[("model", "m")], &sound, &speech).as_deref(), Some("model"));
        let streamed = [("model", "m"), ("stream", "true")];
        assert_eq!(refused(&streamed, &sound, &whisper()).as_deref(), Some("stream"));
        // What is sold by the call needs no length.
        let call = offer(ModelKind::Transcription, &[(Unit::Call, 1)]);
        let body = form(&[("model", "m")], b"no sound");
        assert_eq!(
            TranscriptionRequest::parse(TYPE, &body).unwrap().bounds(&call).unwrap().others,
            Usage::NONE
        );
        assert_eq!(TranscriptionRequest::parse(None, &body).err().unwrap().code, "invalid_multipart");
    }

    #[test]
    fn only_the_model_changes() {
        let body = form(&[("model", "p/m"), ("language", "de")], &wav(16_000, 100));
        let request = TranscriptionRequest::parse(TYPE, &body).unwrap();
        let expected = form(&[("model", "upstream-m"), ("language", "de")], &wav(16_000, 100));
        assert_eq!(request.upstream_body(&whisper()), expected);
    }

    #[test]
    fn a_stream_tells_its_usage_at_the_end() {
        let mut tap = with(&[("stream", "true")], |request| {
            assert!(request.stream);
            request.reading().tap()
        });
        let delta = event(r#"{"type":"transcript.text.delta","delta":"Hi"}"#);
        assert_eq!(tap.event(&delta), Forward::Send(delta.0.clone()));
        let broken = Usage::NONE.with(Unit::AudioIn, 20).with(Unit::Completion, 1);
        assert_eq!(tap.used(&by_token().prices), Used::Estimated(broken));
        let done = r#"{"type":"transcript.text.done","text":"Hi","usage":{"type":"tokens","input_tokens":14,"input_token_details":{"text_tokens":4,"audio_tokens":10},"output_tokens":5}}"#;
        assert_eq!(tap.event(&event(done)), Forward::Done);
        let usage = Usage::NONE.with(Unit::Prompt, 4).with(Unit::AudioIn, 10).with(Unit::Completion, 5);
        assert_eq!(tap.used(&by_token().prices), Used::Known(usage));
        let last = tap.last(MicroUsdc::new(7));
        assert!(last.ends_with(b"\"output_tokens\":5,\"charged_usdc\":7}}\n\n"), "{last:?}");
        assert_eq!(tap.event(&event(r#"{"error":{"message":"no"}}"#)), Forward::Failed);
    }

    #[test]
    fn what_is_no_transcript_is_no_answer() {
        let json = with(&[], |request| request.reading());
        assert_eq!(json.read(None, b"{}").err(), Some(NotAnAnswer::Nonsense));
        assert_eq!(json.read(None, b"Hi").err(), Some(NotAnAnswer::Nonsense));
        assert_eq!(json.read(None, br#"{"error":{}}"#).err(), Some(NotAnAnswer::Error));
        let text = with(&[("response_format", "text")], |request| request.reading());
        let json = Some("Application/JSON; charset=utf-8");
        assert_eq!(text.read(json, br#"{"error":{}}"#).err(), Some(NotAnAnswer::Error));
        assert_eq!(text.read(None, b"\xff\xfe").err(), Some(NotAnAnswer::Nonsense));
        // Some know no format but JSON.
        assert_eq!(text.read(json, br#"{"text":"Hi"}"#).unwrap().content_type(), None);
    }

    #[test]
    fn a_transcript_of_somebody_who_speaks_json_is_a_text() {
        let said = r#"{"error":"none","duration":9,"usage":{"type":"duration","seconds":9}}"#;
        for format in ["text", "srt", "vtt"] {
            let reading = with(&[("response_format", format)], |request| request.reading());
            for content_type in [None, Some("text/plain; charset=utf-8"), Some("application/jsonl")] {
                let answer = reading.read(content_type, said.as_bytes()).unwrap();
                assert_eq!(answer.content_type().as_deref(), Some("text/plain; charset=utf-8"));
                let heard = Usage::NONE.with(Unit::Millisecond, 1500);
                assert_eq!(answer.used(&whisper().prices), Used::Known(heard));
                assert_eq!(answer.render(MicroUsdc::new(3)), said);
            }
        }
    }
}
