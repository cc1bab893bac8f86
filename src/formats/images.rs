//! Pictures (OpenAI API reference, *Create image*, *Create image edit*): a description in, with or without pictures
//! to change, and pictures out, whole or as events.

use std::sync::Arc;

use bytes::Bytes;

use crate::formats::json::{Object, length, quote};
use crate::formats::media::{Format, Reading, refuse_parts};
use crate::formats::multipart::Form;
use crate::formats::request::{
    BadRequest, Bounds, Need, Refused, SERVICE_TIER, bad_value, check_kind, is_priced, is_sold_by_tokens,
    missing, most_tokens, optional, parse_body, refuse_members, required, unsupported, within_context,
};
use crate::pricing::{Dialect, ModelKind, Offer, Unit, Units, Usage};

/// Members that are read here, and so must not mean something else to the upstream.
const INTERPRETED: &[&str] = &["model", "prompt", "n", "size", "quality", "stream", "partial_images"];

/// Members that would buy something the catalogue has no price for, or escape the bounds.
const NOT_PRICED: &[Refused] = &[
    SERVICE_TIER,
    ("width", SIZE),
    ("height", SIZE),
    ("aspect_ratio", SIZE),
    ("resolution", SIZE),
    ("image_size", SIZE),
    ("megapixels", SIZE),
    ("num_images", NUMBER),
    ("num_images_per_prompt", NUMBER),
    ("num_outputs", NUMBER),
    ("num_outputs_per_prompt", NUMBER),
    ("number_of_images", NUMBER),
    ("num_samples", NUMBER),
    ("samples", NUMBER),
    ("batch_size", NUMBER),
    ("sequential_image_generation", NUMBER),
    ("steps", STEPS),
    ("num_inference_steps", STEPS),
    ("upscale", "other sizes than `size` are not priced here: leave it out"),
    ("hd", "name the quality as `quality`"),
    ("image_format", "name the format as `output_format`"),
];

const SIZE: &str = "name the size as `size`";
const NUMBER: &str = "name the number of pictures as `n`";
const STEPS: &str = "steps are not priced here: leave it out";
const TO_CHANGE: &str = "pictures to change are sent to /v1/images/edits";

/// To a route that is told what to draw, and to no other.
const NOT_GENERATED: &[Refused] = &[
    ("image", TO_CHANGE),
    ("images", TO_CHANGE),
    ("image_url", TO_CHANGE),
    ("image_urls", TO_CHANGE),
    ("input_image", TO_CHANGE),
    ("reference_images", TO_CHANGE),
];

/// Members that never become prompt; any other, known or not, is taken to.
const NOT_PROMPT: &[&str] = &[
    "model",
    "n",
    "size",
    "quality",
    "stream",
    "partial_images",
    "background",
    "moderation",
    "output_compression",
    "output_format",
    "response_format",
    "style",
    "user",
];

/// Most pictures that a request can ask for (OpenAI API reference, `n`).
const MAX_IMAGES: u64 = 10;
const MAX_PARTIAL_IMAGES: u64 = 3;
/// What each picture that is shown before it is ready takes more (OpenAI, *Image generation*, partial images).
const TOKENS_A_PARTIAL_IMAGE: u64 = 100;

/// A request for pictures, parsed as far as its price needs.
pub struct ImagesRequest<'a> {
    source: Source<'a>,
    pub model: String,
    pub stream: bool,
    images: u64,
    partial_images: u64,
    size: Option<String>,
    quality: Option<String>,
    prompt_bytes: u64,
}

enum Source<'a> {
    Generation(Object<'a>),
    Edit(Form<'a>),
}

/// What both kinds of request say, each in its way.
struct Asked {
    model: String,
    images: Option<u64>,
    stream: bool,
    partial_images: Option<u64>,
    size: Option<String>,
    quality: Option<String>,
    prompt_bytes: u64,
}

impl<'a> ImagesRequest<'a> {
    /// A request to draw.
    pub fn parse(body: &'a [u8]) -> Result<Self, BadRequest> {
        let object = parse_body(body, INTERPRETED)?;
        let model: String = required(&object, "model")?;
        let _: String = required(&object, "prompt")?;
        refuse_members(&object, NOT_PRICED)?;
        refuse_members(&object, NOT_GENERATED)?;
        let (whole, text) = ("must be a whole number", "must be a string");
        let prompt = object.members().filter(|(key, _)| !NOT_PROMPT.contains(key));
        let asked = Asked {
            model,
            images: optional(&object, "n", whole)?,
            stream: optional(&object, "stream", "must be true or false")?.unwrap_or(false),
            partial_images: optional(&object, "partial_images", whole)?,
            size: optional(&object, "size", text)?,
            quality: optional(&object, "quality", text)?,
            prompt_bytes: prompt.map(|(_, value)| length(value)).sum(),
        };
        Self::check(asked, Source::Generation(object))
    }

    /// A request to change pictures, as a form.
    pub fn parse_edit(content_type: Option<&str>, body: &'a [u8]) -> Result<Self, BadRequest> {
        let form = Form::parse(content_type, body)?;
        form.must_be_clear(INTERPRETED)?;
        refuse_parts(&form, NOT_PRICED)?;
        form.required_text("prompt")?;
        let is_picture = |name: &str| matches!(name.split('[').next(), Some("image" | "mask"));
        if !form.sizes().any(|(name, is_file, _)| is_file && name.starts_with("image") && is_picture(name)) {
            return Err(missing("image"));
        }
        if let Some((name, ..)) = form.sizes().find(|(name, is_file, _)| *is_file != is_picture(name)) {
            return Err(bad_value(
                name,
                format!("{name} must be a file if it is image or mask, and else a field"),
            ));
        }
        let whole = |name: &str| -> Result<Option<u64>, BadRequest> {
            let parse = |text: &str| {
                text.parse().map_err(|_| bad_value(name, format!("{name} must be a whole number")))
            };
            form.text(name)?.map(parse).transpose()
        };
        let texts = form.sizes().filter(|(name, is_file, _)| !is_file && !NOT_PROMPT.contains(name));
        let asked = Asked {
            model: form.required_text("model")?.to_owned(),
            images: whole("n")?,
            stream: match form.text("stream")? {
                None | Some("false" | "False" | "0") => false,
                Some("true" | "True" | "1") => true,
                Some(_) => return Err(bad_value("stream", "stream must be true or false")),
            },
            partial_images: whole("partial_images")?,
            size: form.text("size")?.map(str::to_owned),
            quality: form.text("quality")?.map(str::to_owned),
            prompt_bytes: texts.map(|(_, _, size)| size).sum(),
        };
        Self::check(asked, Source::Edit(form))
    }

    fn check(asked: Asked, source: Source<'a>) -> Result<Self, BadRequest> {
        let images = asked.images.unwrap_or(1);
        if !(1..=MAX_IMAGES).contains(&images) {
            return Err(bad_value("n", format!("n must be between 1 and {MAX_IMAGES}")));
        }
        if asked.stream && images > 1 {
            return Err(bad_value("n", "a stream is of one picture: leave n out"));
        }
        let partial_images = asked.partial_images.unwrap_or(0);
        if partial_images > MAX_PARTIAL_IMAGES {
            return Err(bad_value(
                "partial_images",
                format!("partial_images is {MAX_PARTIAL_IMAGES} at most"),
            ));
        }
        let is_size = |size: &str| {
            // Others read 01024 as 1024, and the prices have no row for it.
            let number = |text: &str| {
                text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() && !text.starts_with('0')
            };
            size == "auto"
                || size.split_once('x').is_some_and(|(width, height)| number(width) && number(height))
        };
        if asked.size.as_deref().is_some_and(|size| !is_size(size)) {
            return Err(bad_value("size", "size must be auto, or a width and a height: 1024x1024"));
        }
        let is_word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase());
        if asked.quality.as_deref().is_some_and(|quality| !is_word(quality)) {
            return Err(bad_value(
                "quality",
                "quality must be a word such as auto, low, medium, high, standard or hd",
            ));
        }
        Ok(Self {
            source,
            model: asked.model,
            stream: asked.stream,
            images,
            partial_images,
            size: asked.size,
            quality: asked.quality,
            prompt_bytes: asked.prompt_bytes,
        })
    }

    /// What is offered, at the prices that pictures of this size and quality can come to.
    pub fn narrow(&self, offer: &Arc<Offer>) -> Result<Arc<Offer>, BadRequest> {
        if offer.prices.images().is_empty() {
            return Ok(Arc::clone(offer));
        }
        let narrowed = offer.prices.for_image(self.size.as_deref(), self.quality.as_deref());
        let prices = narrowed.ok_or_else(|| self.unlisted(offer))?;
        Ok(Arc::new(Offer { prices: Arc::new(prices), ..Offer::clone(offer) }))
    }

    fn unlisted(&self, offer: &Offer) -> BadRequest {
        let any = |text: &Option<String>| text.clone().unwrap_or_else(|| "any".into());
        let listed =
            offer.prices.images().iter().map(|image| format!("{} {}", any(&image.size), any(&image.quality)));
        let message = format!(
            "{} has no price for this size and quality; it has for {}",
            offer.id,
            listed.collect::<Vec<_>>().join(", ")
        );
        bad_value("size", message)
    }

    /// Checks the request against what is offered, and bounds what it can use.
    pub fn bounds(&self, offer: &Offer) -> Result<Bounds, BadRequest> {
        check_kind(offer, ModelKind::Image)?;
        let partial = self.partial_images.saturating_mul(TOKENS_A_PARTIAL_IMAGE);
        let each = self.most_image_tokens(offer)?.saturating_add(partial);
        let tokens = Units::NONE.with(Unit::Prompt).with(Unit::ImageOut);
        let maybe = Units::NONE.with(Unit::CachedPrompt).with(Unit::Completion).with(Unit::Reasoning);
        let (prompt, tokens, maybe) = match self.source {
            Source::Generation(_) => (within_context(most_tokens(self.prompt_bytes), offer), tokens, maybe),
            // How many tokens a picture has, its bytes do not tell.
            Source::Edit(_) if is_sold_by_tokens(&offer.prices) && offer.context_length == 0 => {
                let message = format!("{} has no context_length to bound pictures to change", offer.id);
                return Err(unsupported("image", message));
            }
            Source::Edit(_) => {
                (offer.context_length, tokens.with(Unit::ImageIn), maybe.with(Unit::CachedImage))
            }
        };
        Need {
            prompt,
            completion: each.saturating_mul(self.images),
            tokens,
            maybe,
            others: Usage::NONE.with(Unit::Image, self.images),
            ..Need::default()
        }
        .bounds(offer)
    }

    /// Tokens of one picture: as many as are listed for its size and quality, else as many as the model has at most.
    fn most_image_tokens(&self, offer: &Offer) -> Result<u64, BadRequest> {
        if !is_priced(&offer.prices, Unit::ImageOut) {
            return Ok(0);
        }
        let listed = offer.most_image_tokens(self.size.as_deref(), self.quality.as_deref());
        listed.or(Some(offer.max_output_tokens).filter(|most| *most > 0)).ok_or_else(|| {
            let message = format!("how many tokens a picture of this size has is not known for {}", offer.id);
            bad_value("size", message)
        })
    }

    /// The body for the upstream: the client's, but for the model's name there.
    pub fn upstream_body(&self, offer: &Offer) -> Bytes {
        match &self.source {
            Source::Generation(object) => {
                let mut object = object.clone();
                object.set("model", quote(&offer.upstream_model));
                object.to_bytes().into()
            }
            Source::Edit(form) => form.with_text("model", &offer.upstream_model),
        }
    }

    pub(super) fn form(&self) -> Option<&Form<'a>> {
        match &self.source {
            Source::Generation(_) => None,
            Source::Edit(form) => Some(form),
        }
    }

    pub fn is_edit(&self) -> bool {
        matches!(self.source, Source::Edit(_))
    }

    pub fn upstream_content_type(&self) -> String {
        match &self.source {
            Source::Generation(_) => "application/json".to_owned(),
            Source::Edit(form) => form.content_type(),
        }
    }

    pub fn reading(&self) -> Reading {
        let format = Format::Images { size: self.size.clone(), quality: self.quality.clone() };
        Reading { format, ..Reading::of_json(&self.model, Dialect::Images) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::answer::{Forward, NotAnAnswer};
    use crate::formats::media::Used;
    use crate::formats::media::tests::{event, offer, used};
    use crate::money::{MarkupBps, MicroUsdc, UnitPrice};
    use crate::pricing::{ImagePrice, ImageTokens, Prices, quote as price};

    const TYPE: Option<&str> = Some("multipart/form-data; boundary=b1");

    fn dall_e() -> Arc<Offer> {
        let row = |size: &str, quality: &str, micro: i64| ImagePrice {
            size: Some(size.into()),
            quality: Some(quality.into()),
            price: UnitPrice::new(micro * 1_000_000),
        };
        let images = vec![
            row("1024x1024", "standard", 40_000),
            row("1024x1024", "hd", 80_000),
            row("1792x1024", "hd", 120_000),
        ];
        let prices = Arc::new(Prices::new(*offer(ModelKind::Image, &[]).prices.rates(), Vec::new(), images));
        Arc::new(Offer { prices, ..offer(ModelKind::Image, &[]) })
    }

    fn gpt_image() -> Offer {
        let prices = [(Unit::Prompt, 5_000_000), (Unit::ImageIn, 10_000_000), (Unit::ImageOut, 40_000_000)];
        let row = |size: Option<&str>, quality: Option<&str>, most| ImageTokens {
            size: size.map(str::to_owned),
            quality: quality.map(str::to_owned),
            most,
        };
        Offer {
            context_length: 65_536,
            image_tokens: vec![
                row(Some("1024x1024"), Some("low"), 272),
                row(Some("1536x1024"), Some("low"), 400),
                row(None, Some("high"), 6240),
            ],
            ..offer(ModelKind::Image, &prices)
        }
    }

    fn body(members: &str) -> String {
        format!(r#"{{"model":"p/m","prompt":"A \"wallet\""{members}}}"#)
    }

    fn parse(body: &str) -> ImagesRequest<'_> {
        ImagesRequest::parse(body.as_bytes()).unwrap()
    }

    fn form(parts: &[(&str, Option<&str>, &str)]) -> String {
        let part = |(name, file, value): &(&str, Option<&str>, &str)| {
            let file = file.map_or(String::new(), |file| format!("; filename=\"{file}\""));
            format!("--b1\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n{value}\r\n")
        };
        parts.iter().map(part).chain(["--b1--".to_owned()]).collect()
    }

    /// What is held for such a request, without markup.
    fn held(members: &str) -> i64 {
        let body = body(members);
        let request = parse(&body);
        let narrowed = request.narrow(&dall_e()).unwrap();
        let most = request.bounds(&narrowed).unwrap().most();
        price(&narrowed.terms(MarkupBps::new(0)), most).unwrap().amount.get()
    }

    #[test]
    fn pictures_by_the_piece_are_held_for_at_the_dearest_they_may_be() {
        for (members, micro) in [
            (r#","size":"1024x1024","quality":"standard""#, 40_000),
            (r#","size":"1024x1024","quality":"hd","n":3"#, 240_000),
            (r#","size":"1024x1024""#, 80_000),
            (r#","size":"1024x1024","quality":"auto""#, 80_000),
            (r#","quality":"hd""#, 120_000),
            (r#","n":10"#, 1_200_000),
            ("", 120_000),
        ] {
            assert_eq!(held(members), micro, "{members}");
        }
        for members in [r#","size":"256x256""#, r#","size":"1792x1024","quality":"standard""#] {
            let body = body(members);
            let error = parse(&body).narrow(&dall_e()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("size"), "{members}");
            assert!(error.message.contains("1792x1024 hd"), "{}", error.message);
        }
    }

    #[test]
    fn pictures_are_charged_as_they_turned_out() {
        let charge = |members: &str, answer: &str| {
            let body = body(members);
            let request = parse(&body);
            let narrowed = request.narrow(&dall_e()).unwrap();
            let (reading, terms) = (request.reading(), narrowed.terms(MarkupBps::new(0)));
            let answer = reading.read(None, answer.as_bytes()).unwrap();
            let Used::Known(usage) = answer.used(&terms.prices) else { panic!("nothing is estimated") };
            let terms = answer.terms(&terms).unwrap_or(terms);
            terms.charge(&usage, MicroUsdc::new(10_000_000)).unwrap().charged.get()
        };
        let two = r#"{"created":1,"data":[{"b64_json":"AA"},{"url":"http://x"}]"#;
        let asked = r#","size":"1024x1024","quality":"standard","n":3"#;
        assert_eq!(charge(asked, &format!("{two}}}")), 80_000);
        assert_eq!(charge("", &format!("{two},\"size\":\"1024x1024\",\"quality\":\"standard\"}}")), 80_000);
        assert_eq!(charge("", &format!("{two},\"size\":\"1024x1024\"}}")), 160_000);
        assert_eq!(charge("", &format!("{two}}}")), 240_000);
        // What an answer says and nobody has a price for changes nothing.
        assert_eq!(charge(asked, &format!("{two},\"size\":\"1792x1024\"}}")), 80_000);
        assert_eq!(charge("", r#"{"data":[]}"#), 0);
    }

    #[test]
    fn pictures_by_the_token_are_bounded_by_size_and_quality() {
        let completion = |members: &str| {
            let body = body(members);
            parse(&body).bounds(&gpt_image()).map(|bounds| bounds.completion)
        };
        assert_eq!(completion(r#","size":"1024x1024","quality":"low""#), Ok(272));
        assert_eq!(completion(r#","size":"1024x1024","quality":"low","n":4"#), Ok(1088));
        assert_eq!(completion(r#","quality":"low""#), Ok(400));
        assert_eq!(completion(r#","size":"1024x1024","quality":"auto""#), Ok(6240));
        assert_eq!(completion(""), Ok(6240));
        let partial = r#","quality":"low","stream":true,"partial_images":2"#;
        assert_eq!(completion(partial), Ok(600));
        let unknown = r#","size":"256x256","quality":"low""#;
        assert_eq!(completion(unknown).unwrap_err().param.as_deref(), Some("size"));
        let text = body(unknown);
        let bounds = parse(&text).bounds(&Offer { max_output_tokens: 9000, ..gpt_image() }).unwrap();
        assert_eq!((bounds.completion, bounds.prompt), (9000, 14 + 16 + 64));
        assert!(!bounds.tokens.has(Unit::ImageIn));
        let usage = r#"{"data":[{}],"usage":{"input_tokens":50,"output_tokens":272,"total_tokens":322,"input_tokens_details":{"text_tokens":10,"image_tokens":40}}}"#;
        let expected = Usage::NONE.with(Unit::Prompt, 10).with(Unit::ImageIn, 40).with(Unit::ImageOut, 272);
        assert_eq!(used(&parse(&text).reading(), usage, &gpt_image()), Used::Known(expected));
        assert_eq!(used(&parse(&text).reading(), r#"{"data":[{}]}"#, &gpt_image()), Used::Unknown);
    }

    #[test]
    fn pictures_to_change_come_in_a_form() {
        let picture = "\u{89}PNG\r\n";
        let body = form(&[
            ("image[]", Some("a.png"), picture),
            ("image[]", Some("b.png"), picture),
            ("mask", Some("m.png"), picture),
            ("prompt", None, "brighter"),
            ("model", None, "p/m"),
            ("n", None, "2"),
            ("size", None, "1024x1024"),
            ("quality", None, "low"),
        ]);
        let request = ImagesRequest::parse_edit(TYPE, body.as_bytes()).unwrap();
        let bounds = request.bounds(&gpt_image()).unwrap();
        assert_eq!((bounds.prompt, bounds.completion), (65_536, 544));
        assert!(bounds.tokens.has(Unit::ImageIn));
        let without = Offer { context_length: 0, ..gpt_image() };
        assert_eq!(request.bounds(&without).unwrap_err().param.as_deref(), Some("image"));
        assert_eq!(request.upstream_body(&gpt_image()), body.replace("p/m", "upstream-m"));
        for (parts, param) in [
            (&[("image", Some("a"), "x"), ("prompt", None, "p")][..], "model"),
            (&[("prompt", None, "p"), ("model", None, "m")], "image"),
            (&[("image", None, "x"), ("prompt", None, "p"), ("model", None, "m")], "image"),
            (&[("image", Some("a"), "x"), ("model", None, "m")], "prompt"),
            (
                &[("image", Some("a"), "x"), ("prompt", None, "p"), ("model", None, "m"), ("n", None, "x")],
                "n",
            ),
            (
                &[("image", Some("a"), "x"), ("prompt", None, "p"), ("model", None, "m"), ("n[]", None, "9")],
                "n",
            ),
            (
                &[
                    ("image", Some("a"), "x"),
                    ("prompt", None, "p"),
                    ("model", None, "m"),
                    ("width", None, "9"),
                ],
                "width",
            ),
            (
                &[
                    ("image", Some("a"), "x"),
                    ("prompt", None, "p"),
                    ("model", None, "m"),
                    ("Width[x]", None, "9"),
                ],
                "Width",
            ),
            (
                &[
                    ("image", Some("a"), "x"),
                    ("prompt", None, "p"),
                    ("model", None, "m"),
                    ("plugins.id", None, "9"),
                ],
                "plugins",
            ),
            (
                &[
                    ("image", Some("a"), "x"),
                    ("prompt", None, "p"),
                    ("model", None, "m"),
                    ("x", Some("f"), "9"),
                ],
                "x",
            ),
        ] {
            let error = ImagesRequest::parse_edit(TYPE, form(parts).as_bytes()).err().unwrap();
            assert_eq!(error.param.as_deref(), Some(param), "{parts:?}");
        }
    }

    #[test]
    fn bad_requests_name_their_field() {
        for (members, param) in [
            (r#","n":0"#, "n"),
            (r#","n":11"#, "n"),
            (r#","n":"2""#, "n"),
            (r#","n":2,"stream":true"#, "n"),
            (r#","size":"1024X1024""#, "size"),
            (r#","size":"""#, "size"),
            (r#","size":7"#, "size"),
            (r#","quality":"HD""#, "quality"),
            (r#","partial_images":4"#, "partial_images"),
            (r#","image":"data:""#, "image"),
            (r#","width":2048"#, "width"),
            (r#","steps":50"#, "steps"),
            (r#","models":["x"]"#, "models"),
            (r#","Width":2048"#, "Width"),
            (r#","IMAGE":"data:""#, "IMAGE"),
            (r#","image_size":"4K""#, "image_size"),
            (r#","num_images_per_prompt":9"#, "num_images_per_prompt"),
            (r#","num_outputs_per_prompt":9"#, "num_outputs_per_prompt"),
            (r#","number_of_images":9"#, "number_of_images"),
            (r#","num_samples":9"#, "num_samples"),
            (r#","image_format":"png""#, "image_format"),
            (r#","megapixels":"4""#, "megapixels"),
            (r#","hd":true"#, "hd"),
            (r#","Plugins":[]"#, "Plugins"),
            (r#","N":9"#, "N"),
        ] {
            let body = body(members);
            let error = ImagesRequest::parse(body.as_bytes()).err().expect(members);
            assert_eq!(error.param.as_deref(), Some(param), "{members}");
        }
        assert_eq!(ImagesRequest::parse(br#"{"prompt":"a"}"#).err().unwrap().param.as_deref(), Some("model"));
        assert_eq!(ImagesRequest::parse(br#"{"model":"a"}"#).err().unwrap().param.as_deref(), Some("prompt"));
        let text = body("");
        let error = parse(&text).bounds(&offer(ModelKind::Embedding, &[])).unwrap_err();
        assert!(error.message.ends_with("ask for it at /v1/embeddings"), "{}", error.message);
        // A token of the prompt is used for certain, and has no price here.
        let error = parse(&text)
            .bounds(&Offer { max_output_tokens: 1, ..offer(ModelKind::Image, &[(Unit::ImageOut, 1)]) });
        assert!(error.unwrap_err().message.contains("no price for prompt_tokens"));
    }

    #[test]
    fn a_stream_is_of_one_picture() {
        let text = body(r#","stream":true,"partial_images":1"#);
        let mut tap = parse(&text).reading().tap();
        let partial =
            event(r#"{"type":"image_generation.partial_image","b64_json":"AAAA","partial_image_index":0}"#);
        assert_eq!(tap.event(&partial), Forward::Send(partial.0.clone()));
        assert!(tap.delivered_anything() && !tap.is_finished());
        assert_eq!(tap.used(&gpt_image().prices), Used::Unknown);
        let done = crate::formats::sse::Event(crate::formats::sse::Event::named(
            "image_generation.completed",
            br#"{"type":"image_generation.completed","b64_json":"AA","size":"1024x1024","quality":"hd","usage":{"input_tokens":5,"output_tokens":372}}"#,
        ));
        assert_eq!(tap.event(&done), Forward::Done);
        let usage = Usage::NONE.with(Unit::Prompt, 5).with(Unit::ImageOut, 372);
        assert_eq!(tap.used(&gpt_image().prices), Used::Known(usage));
        assert_eq!(tap.used(&dall_e().prices), Used::Known(Usage::NONE.with(Unit::Image, 1)));
        let narrowed = tap.terms(&dall_e().terms(MarkupBps::new(0))).unwrap();
        assert_eq!(narrowed.prices.images().len(), 1);
        let last = tap.last(MicroUsdc::new(5));
        assert!(last.starts_with(b"event: image_generation.completed\ndata: {"), "{last:?}");
        assert!(last.ends_with(b"\"output_tokens\":372,\"charged_usdc\":5}}\n\n"), "{last:?}");
    }

    #[test]
    fn a_stream_that_was_left_is_a_picture_and_one_that_brought_none_is_not() {
        let text = body(r#","stream":true"#);
        let images = |events: &[&str]| {
            let mut tap = parse(&text).reading().tap();
            events.iter().for_each(|data| drop(tap.event(&event(data))));
            let Used::Known(usage) = tap.used(&dall_e().prices) else { panic!("pictures are counted") };
            (usage.count(Unit::Image), tap.delivered_anything())
        };
        let error = r#"{"error":{"message":"no"}}"#;
        assert_eq!(images(&[]), (1, false));
        assert_eq!(images(&[r#"{"type":"image_generation.queued"}"#]), (1, false));
        for ended in ["[DONE]", error, "nonsense"] {
            assert_eq!(images(&[ended]), (0, false), "{ended}");
        }
        for picture in [
            r#"{"type":"image_generation.partial_image","b64_json":"AAAA"}"#,
            r#"{"type":"image_edit.partial_image","picture":"AAAA"}"#,
            r#"{"type":"image_generation.partial_succeeded","url":"http://x/1"}"#,
        ] {
            assert_eq!(images(&[picture]), (1, true), "{picture}");
            assert_eq!(images(&[picture, error]), (1, true), "{picture}");
        }
    }

    #[test]
    fn what_is_no_picture_is_no_answer() {
        let text = body("");
        let reading = parse(&text).reading();
        assert_eq!(reading.read(None, b"{}").err(), Some(NotAnAnswer::Nonsense));
        assert_eq!(reading.read(None, b"\x89PNG").err(), Some(NotAnAnswer::Nonsense));
        assert_eq!(
            reading.read(None, br#"{"error":{"message":"no"},"data":[]}"#).err(),
            Some(NotAnAnswer::Error)
        );
    }
}
