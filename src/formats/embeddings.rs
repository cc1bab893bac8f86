//! Embeddings (OpenAI API reference, *Create embeddings*): texts or tokens in, a vector for each out.

use bytes::Bytes;
use serde_json::value::RawValue;

use crate::formats::json::{Object, each, length, quote};
use crate::formats::media::Reading;
use crate::formats::request::{
    BadRequest, Bounds, Need, Refused, SERVICE_TIER, bad_value, check_kind, estimate_tokens, missing,
    most_tokens, parse_body, refuse_members, required, within_context,
};
use crate::pricing::{Dialect, ModelKind, Offer, Unit, Units, Usage};

/// Members that are read here, and so must not mean something else to the upstream.
const INTERPRETED: &[&str] = &["model", "input"];

/// Members that would buy something the catalogue has no price for, or escape the bounds.
const NOT_PRICED: &[Refused] = &[
    SERVICE_TIER,
    ("messages", "conversations cannot be bounded here: send texts as `input`"),
    ("inputs", "parts that are not text cannot be bounded here: send texts as `input`"),
];

/// Members that never become prompt; any other, known or not, may stand before each of the inputs.
const NOT_PROMPT: &[&str] = &["model", "input", "dimensions", "encoding_format", "user"];

/// Most texts or lists of tokens in a request (OpenAI API reference, *Create embeddings*, `input`: an array has 2,048
/// items or less).
const MAX_INPUTS: usize = 2048;

/// A request for embeddings, parsed as far as its price needs.
pub struct EmbeddingsRequest<'a> {
    object: Object<'a>,
    pub model: String,
    inputs: Vec<Input>,
}

/// One text, or one list of tokens.
#[derive(Copy, Clone)]
pub(super) enum Input {
    /// So many bytes of text at most.
    Text(u64),
    Tokens(u64),
}

impl Input {
    /// A text, or a list of tokens.
    fn read(json: &str) -> Option<Self> {
        if json.starts_with('"') {
            return Some(Self::Text(length(json)));
        }
        let mut count = 0;
        each(json, |_: u32| count += 1).ok().map(|()| Self::Tokens(count))
    }

    /// Its tokens, where nobody counted them.
    pub(super) fn estimate(&self) -> u64 {
        match self {
            Self::Text(bytes) => estimate_tokens(*bytes),
            Self::Tokens(count) => *count,
        }
    }
}

impl<'a> EmbeddingsRequest<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Self, BadRequest> {
        let object = parse_body(body, INTERPRETED)?;
        let model: String = required(&object, "model")?;
        refuse_members(&object, NOT_PRICED)?;
        let inputs = inputs(&object, "input")?;
        Ok(Self { object, model, inputs })
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        check_kind(offer, ModelKind::Embedding)?;
        let beside = self.object.members().filter(|(key, _)| !NOT_PROMPT.contains(key));
        let beside: u64 = beside.map(|(_, value)| length(value)).sum();
        let most = |input: &Input| match input {
            Input::Text(bytes) => within_context(most_tokens(bytes.saturating_add(beside)), offer),
            Input::Tokens(count) => *count,
        };
        let prompt = self.inputs.iter().map(most).fold(0, u64::saturating_add);
        Need {
            prompt,
            estimated_prompt: self.estimate(),
            tokens: Units::NONE.with(Unit::Prompt),
            ..Need::default()
        }
        .bounds(offer)
    }

    fn estimate(&self) -> u64 {
        self.inputs.iter().map(Input::estimate).fold(0, u64::saturating_add)
    }

    /// The body for the upstream: the client's, but for the model's name there.
    pub fn upstream_body(&self, offer: &Offer) -> Bytes {
        let mut object = self.object.clone();
        object.set("model", quote(&offer.upstream_model));
        object.to_bytes().into()
    }

    pub fn reading(&self) -> Reading {
        let estimate = Some(Usage::NONE.with(Unit::Prompt, self.estimate()));
        Reading { estimate, ..Reading::of_json(&self.model, Dialect::Embeddings) }
    }
}

/// The inputs that a member holds, each by its size.
pub(super) fn inputs(object: &Object<'_>, key: &str) -> Result<Vec<Input>, BadRequest> {
    let json = object.get_non_null(key).ok_or_else(|| missing(key))?;
    if json.starts_with('"') {
        return Ok(vec![Input::Text(length(json))]);
    }
    // Only so many are kept, however many there are.
    let (mut tokens, mut inputs) = (0_u64, Vec::new());
    let (mut is_known, mut is_too_long) = (true, false);
    let read = each(json, |item: &RawValue| match Input::read(item.get()) {
        _ if is_token(item.get()) => tokens += 1,
        Some(_) if inputs.len() == MAX_INPUTS => is_too_long = true,
        Some(input) => inputs.push(input),
        None => is_known = false,
    });
    if read.is_ok() && is_known {
        match (tokens, inputs.is_empty()) {
            (1.., true) => return Ok(vec![Input::Tokens(tokens)]),
            (0, false) if is_too_long => {
                let message =
                    format!("{key} has more than {MAX_INPUTS} items: send them in several requests");
                return Err(bad_value(key, message));
            }
            (0, false) => return Ok(inputs),
            _ => {}
        }
    }
    let expected = "must be a text, a list of texts, a list of tokens, or a list of such lists";
    Err(bad_value(key, format!("{key} {expected}")))
}

fn is_token(json: &str) -> bool {
    json.parse::<u32>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::media::Used;
    use crate::formats::media::tests::{offer, used};
    use crate::money::MicroUsdc;

    fn embedding() -> Offer {
        Offer { context_length: 8192, ..offer(ModelKind::Embedding, &[(Unit::Prompt, 20_000)]) }
    }

    fn bounds(input: &str) -> Bounds {
        let body = format!(r#"{{"model":"p/m","input":{input}}}"#);
        EmbeddingsRequest::parse(body.as_bytes()).unwrap().bounds(&embedding()).unwrap()
    }

    #[test]
    fn every_input_is_bounded() {
        assert_eq!(bounds(r#""Hello""#).prompt, 7 + 16 + 64);
        assert_eq!(bounds(r#""Hello""#).estimated_prompt, 2);
        assert_eq!(bounds(r#"["Hello","you"]"#).prompt, 7 + 5 + 2 * (16 + 64));
        assert_eq!(bounds("[1, 2, 3]").prompt, 3);
        assert_eq!(bounds("[[1,2],[3]]").prompt, 3);
        let long = format!("[\"{}\",\"a\"]", "é".repeat(8000));
        assert_eq!(bounds(&long).prompt, 8192 + 3 + 16 + 64);
        // What nobody here knows may stand before each.
        let body = br#"{"model":"p/m","input":["a","b"],"instruction":"0123456789"}"#;
        let bounds = EmbeddingsRequest::parse(body).unwrap().bounds(&embedding()).unwrap();
        assert_eq!(bounds.prompt, 2 * (3 + 12 + 16 + 64));
    }

    #[test]
    fn so_many_inputs_are_taken_and_as_many_tokens_as_come() {
        let list = |item: &str, count: usize| format!("[{}]", vec![item; count].join(","));
        for item in ["\"a\"", "[1]"] {
            assert!(bounds(&list(item, MAX_INPUTS)).prompt > 0);
            for count in [MAX_INPUTS + 1, 500_000] {
                let body = format!(r#"{{"model":"m","input":{}}}"#, list(item, count));
                let error = EmbeddingsRequest::parse(body.as_bytes()).err().unwrap();
                assert_eq!(error.param.as_deref(), Some("input"));
                assert!(error.message.contains("more than 2048 items"), "{}", error.message);
            }
        }
        assert_eq!(bounds(&list("7", 10_000)).prompt, 10_000);
        assert_eq!(bounds(&format!("[{}]", list("7", 10_000))).prompt, 10_000);
    }

    #[test]
    fn bad_requests_name_their_field() {
        for (body, param) in [
            (r#"{"input":"a"}"#, "model"),
            (r#"{"model":"m"}"#, "input"),
            (r#"{"model":"m","input":[]}"#, "input"),
            (r#"{"model":"m","input":{"image":"x"}}"#, "input"),
            (r#"{"model":"m","input":[{"content":[]}]}"#, "input"),
            (r#"{"model":"m","input":[1,"a"]}"#, "input"),
            (r#"{"model":"m","input":["a",1]}"#, "input"),
            (r#"{"model":"m","input":[[1],2]}"#, "input"),
            (r#"{"model":"m","input":[[1,"a"]]}"#, "input"),
            (r#"{"model":"m","input":[[[1]]]}"#, "input"),
            (r#"{"model":"m","input":[1.5]}"#, "input"),
            (r#"{"model":"m","input":[-1]}"#, "input"),
            (r#"{"model":"m","input":["a",null]}"#, "input"),
            (r#"{"model":"m","input":"a","Input":"b"}"#, "Input"),
            (r#"{"model":"m","input":"a","messages":[]}"#, "messages"),
            (r#"{"model":"m","input":"a","Messages":[]}"#, "Messages"),
            (r#"{"model":"m","input":"a","api_base":"x"}"#, "api_base"),
            (r#"{"model":"m","input":"a","API_Base":"x"}"#, "API_Base"),
            (r#"{"model":"m","input":"a","service_tier":"flex"}"#, "service_tier"),
            (r#"{"model":"m","input":"a","plugins":[]}"#, "plugins"),
            (r#"{"model":"m","input":"a","web_search_options":{}}"#, "web_search_options"),
            (r#"{"model":"m","input":"a","search_parameters":{}}"#, "search_parameters"),
            (r#"{"model":"m","input":"a","search_settings":{}}"#, "search_settings"),
            (r#"{"model":"m","input":"a","enable_search":true}"#, "enable_search"),
        ] {
            let error = EmbeddingsRequest::parse(body.as_bytes()).err().expect(body);
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
        let request = EmbeddingsRequest::parse(br#"{"model":"m","input":"a"}"#).unwrap();
        let error = request.bounds(&Offer { kind: ModelKind::Chat, ..embedding() }).unwrap_err();
        assert!(error.message.ends_with("ask for it at /v1/chat/completions"), "{}", error.message);
    }

    #[test]
    fn only_the_model_changes_and_usage_is_read() {
        let body = br#"{"input":["a",  "b"],"model":"p/m","encoding_format":"base64","dimensions":3}"#;
        let request = EmbeddingsRequest::parse(body).unwrap();
        assert_eq!(
            request.upstream_body(&embedding()),
            r#"{"input":["a",  "b"],"model":"upstream-m","encoding_format":"base64","dimensions":3}"#
        );
        let reading = request.reading();
        let answer = r#"{"object":"list","data":[{"object":"embedding","index":0,"embedding":"AAAA"}],"model":"x","usage":{"prompt_tokens":8,"total_tokens":8}}"#;
        assert_eq!(used(&reading, answer, &embedding()), Used::Known(Usage::tokens(8, 0)));
        let rendered = reading.read(None, answer.as_bytes()).unwrap().render(MicroUsdc::new(3));
        assert_eq!(
            rendered,
            r#"{"object":"list","data":[{"object":"embedding","index":0,"embedding":"AAAA"}],"model":"p/m","usage":{"prompt_tokens":8,"total_tokens":8,"charged_usdc":3}}"#
        );
        let silent = r#"{"data":[],"model":"x"}"#;
        assert_eq!(used(&reading, silent, &embedding()), Used::Estimated(Usage::tokens(2, 0)));
    }
}
