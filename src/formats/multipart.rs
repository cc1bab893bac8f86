//! `multipart/form-data` (RFC 7578, RFC 2046 section 5.1), read so that no other reader can read anything else:
//! what may be read in two ways is refused. Values stay where they are, in the bytes that came.

use std::ops::Range;

use bytes::Bytes;

use crate::formats::request::{BadRequest, bad_value, missing};

/// More parts than any request has.
const MAX_PARTS: usize = 128;
/// More than the head of a part has.
const MAX_HEAD_BYTES: usize = 4096;
/// Longest boundary (RFC 2046, section 5.1.1).
const MAX_BOUNDARY_BYTES: usize = 70;

/// A form, part by part.
pub struct Form<'a> {
    body: &'a [u8],
    boundary: String,
    parts: Vec<Part>,
}

struct Part {
    name: String,
    is_file: bool,
    head: Range<usize>,
    value: Range<usize>,
}

fn unreadable(problem: &str) -> BadRequest {
    BadRequest {
        code: "invalid_multipart",
        param: None,
        message: format!("the body must be multipart/form-data, as SDKs send it: {problem}"),
    }
}

impl<'a> Form<'a> {
    pub fn parse(content_type: Option<&str>, body: &'a [u8]) -> Result<Self, BadRequest> {
        let boundary = content_type.and_then(boundary);
        let boundary = boundary.ok_or_else(|| unreadable("its Content-Type has no boundary of its own"))?;
        let mut parts = Vec::new();
        let delimiter = format!("\r\n--{boundary}");
        let mut at = delimiter.len() - 2;
        if !body.starts_with(&delimiter.as_bytes()[2..]) {
            return Err(unreadable("it does not begin with its boundary"));
        }
        loop {
            match body.get(at..).unwrap_or_default() {
                [b'-', b'-'] | [b'-', b'-', b'\r', b'\n'] => return Ok(Self { body, boundary, parts }),
                [b'\r', b'\n', ..] => at += 2,
                _ => return Err(unreadable("a boundary does not stand on a line of its own")),
            }
            if parts.len() == MAX_PARTS {
                return Err(unreadable("it has too many parts"));
            }
            let head = find(&body[at..], b"\r\n\r\n").filter(|length| *length <= MAX_HEAD_BYTES);
            let head = head.ok_or_else(|| unreadable("a part has no head"))?;
            let start = at + head + 4;
            if body[start..].starts_with(&delimiter.as_bytes()[2..]) {
                return Err(unreadable("a value without bytes has no line of its own"));
            }
            let length = find(&body[start..], delimiter.as_bytes());
            let end = start + length.ok_or_else(|| unreadable("it is cut off"))?;
            if holds_boundary(&body[start..end], &boundary) {
                return Err(unreadable("a value holds what others take for the end of it"));
            }
            parts.push(Part::read(body, at..at + head, start..end)?);
            at = end + delimiter.len();
        }
    }

    /// The header that the form goes on under.
    pub fn content_type(&self) -> String {
        // Between quotes, whatever it is made of.
        format!("multipart/form-data; boundary=\"{}\"", self.boundary)
    }

    /// Refuses names that another reader may take for these: spelt otherwise, in brackets, or there twice.
    pub fn must_be_clear(&self, names: &[&str]) -> Result<(), BadRequest> {
        for name in names {
            let is_like = |part: &&Part| {
                let base = part.name.split('[').next().unwrap_or_default();
                base.trim().eq_ignore_ascii_case(name)
            };
            let mut like = self.parts.iter().filter(is_like);
            match (like.next(), like.next()) {
                (None, _) => {}
                (Some(only), None) if only.name == *name => {}
                _ => return Err(bad_value(name, "is there twice, or not spelt as the API spells it")),
            }
        }
        Ok(())
    }

    /// The text of a field. An empty one says nothing.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>, BadRequest> {
        let Some(part) = self.parts.iter().find(|part| part.name == name) else { return Ok(None) };
        if part.is_file {
            return Err(bad_value(name, format!("{name} must be a field, not a file")));
        }
        let text = std::str::from_utf8(&self.body[part.value.clone()]);
        let text = text.map_err(|_| bad_value(name, format!("{name} must be text in UTF-8")))?;
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    pub fn required_text(&self, name: &str) -> Result<&'a str, BadRequest> {
        self.text(name)?.ok_or_else(|| missing(name))
    }

    pub fn file(&self, name: &str) -> Result<&'a [u8], BadRequest> {
        let part = self.parts.iter().find(|part| part.name == name).ok_or_else(|| missing(name))?;
        if part.is_file {
            Ok(&self.body[part.value.clone()])
        } else {
            Err(bad_value(name, format!("{name} must be a file, with a filename")))
        }
    }

    /// The names of the parts and the sizes of their values, files or not.
    pub fn sizes(&self) -> impl Iterator<Item = (&str, bool, u64)> {
        self.parts.iter().map(|part| {
            (part.name.as_str(), part.is_file, u64::try_from(part.value.len()).unwrap_or(u64::MAX))
        })
    }

    /// Its parts one after the other, each as its head and its value, without the boundary.
    pub fn pieces(&self) -> Vec<&'a [u8]> {
        let body = self.body;
        self.parts.iter().flat_map(|part| [&body[part.head.clone()], &body[part.value.clone()]]).collect()
    }

    /// The body with another text in one field, which is there. Its part no longer says how long it is.
    pub fn with_text(&self, name: &str, text: &str) -> Bytes {
        let Some(part) = self.parts.iter().find(|part| part.name == name) else {
            return Bytes::copy_from_slice(self.body);
        };
        let (before, after) = (&self.body[..part.head.start], &self.body[part.value.end..]);
        // Parsing has seen that it is UTF-8.
        let head = std::str::from_utf8(&self.body[part.head.clone()]).unwrap_or_default();
        let is_kept = |line: &&str| !line.split(':').next().is_some_and(is_length);
        let head = head.split("\r\n").filter(is_kept).collect::<Vec<_>>().join("\r\n");
        [before, head.as_bytes(), b"\r\n\r\n", text.as_bytes(), after].concat().into()
    }
}

fn is_length(header: &str) -> bool {
    header.eq_ignore_ascii_case("content-length")
}

impl Part {
    fn read(body: &[u8], place: Range<usize>, value: Range<usize>) -> Result<Self, BadRequest> {
        let head = std::str::from_utf8(&body[place.clone()])
            .map_err(|_| unreadable("the head of a part is not UTF-8"))?;
        let mut disposition = None;
        for line in head.split("\r\n") {
            if line.contains(['\r', '\n', '\0']) || line.starts_with([' ', '\t']) {
                return Err(unreadable("the head of a part is broken into lines otherwise"));
            }
            let (name, text) = line.split_once(':').ok_or_else(|| unreadable("a header has no colon"))?;
            match name.to_ascii_lowercase().as_str() {
                "content-disposition" if disposition.is_some() => {
                    return Err(unreadable("a part has two names"));
                }
                "content-disposition" => disposition = Some(text.trim()),
                // Another encoding, and files in files.
                "content-type" if is_plain(text) => {}
                // Some readers go by it, and not by the boundary: OkHttp writes it, and aiohttp reads it.
                "content-length" if text.trim() == value.len().to_string() => {}
                "content-length" => {
                    return Err(unreadable("the Content-Length of a part is not that of its value"));
                }
                "content-transfer-encoding" if text.trim().eq_ignore_ascii_case("binary") => {}
                other if other.starts_with("x-") => {}
                _ => return Err(unreadable(&format!("{name} is not understood there"))),
            }
        }
        let (kind, parameters) =
            disposition.and_then(parameters).ok_or_else(|| unreadable("a part has no name"))?;
        if !kind.eq_ignore_ascii_case("form-data") {
            return Err(unreadable("a part is no form-data"));
        }
        let mut name = None;
        let (mut is_file, mut is_renamed) = (false, false);
        for (key, text) in parameters {
            match key.to_ascii_lowercase().as_str() {
                "name" if name.is_none() => name = Some(text),
                "filename" if !is_file && !text.is_empty() => is_file = true,
                // What a filename is in other letters, for who can read them.
                "filename*" => is_renamed = true,
                _ => return Err(unreadable("a part has two names, or something else beside its name")),
            }
        }
        let name = name.ok_or_else(|| unreadable("a part has no name"))?;
        if is_renamed && !is_file {
            return Err(unreadable("a part has a filename for some readers only"));
        }
        let is_clear =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'[' | b']');
        if name.is_empty() || !name.bytes().all(is_clear) || name == "_charset_" {
            return Err(unreadable("a name has letters that are in none"));
        }
        Ok(Self { name: name.to_owned(), is_file, head: place, value })
    }
}

/// Whether a part of this type is what its bytes are.
fn is_plain(content_type: &str) -> bool {
    let content_type = content_type.trim().to_ascii_lowercase();
    match content_type.split_once("charset") {
        _ if content_type.starts_with("multipart/") => false,
        None => true,
        Some((_, charset)) => {
            let charset = charset.trim_matches([' ', '=', '"']);
            matches!(charset, "utf-8" | "us-ascii")
        }
    }
}

/// Whether a value holds the boundary at the beginning of a line, however that ends: some readers ask for no more.
fn holds_boundary(value: &[u8], boundary: &str) -> bool {
    let delimiter = format!("--{boundary}");
    let mut rest = value;
    while let Some(at) = find(rest, delimiter.as_bytes()) {
        if at > 0 && matches!(rest[at - 1], b'\n' | b'\r') {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

/// The boundary that a Content-Type names.
fn boundary(content_type: &str) -> Option<String> {
    let (kind, parameters) = parameters(content_type)?;
    if !kind.eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let mut found = parameters.iter().filter(|(key, _)| key.eq_ignore_ascii_case("boundary"));
    let (Some((_, boundary)), None) = (found.next(), found.next()) else { return None };
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"'()+_,-./:=? ".contains(&byte);
    let fits = !boundary.is_empty() && boundary.len() <= MAX_BOUNDARY_BYTES && !boundary.ends_with(' ');
    (fits && boundary.bytes().all(is_allowed)).then(|| (*boundary).to_owned())
}

/// `word; key=token; key="text"`. `None` of anything else, and of texts with a backslash, which hides a quote from
/// some readers and not from others.
fn parameters(text: &str) -> Option<(&str, Vec<(&str, &str)>)> {
    let (word, mut rest) = text.split_once(';').unwrap_or((text, ""));
    let mut parameters = Vec::new();
    while !rest.trim().is_empty() {
        let (key, text) = rest.split_once('=')?;
        let (value, behind) = match text.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => text.find(';').map_or((text.trim_end(), ""), |at| (text[..at].trim_end(), &text[at..])),
        };
        let is_token = key.trim().bytes().all(|byte| byte.is_ascii_graphic() && !b"\";=".contains(&byte));
        if value.contains(['\\', '\r', '\n']) || key.trim().is_empty() || !is_token {
            return None;
        }
        parameters.push((key.trim(), value));
        rest = match behind.trim_start() {
            "" => "",
            behind => behind.strip_prefix(';')?,
        };
    }
    Some((word.trim(), parameters))
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = *wanted.first()?;
    let mut at = 0;
    while let Some(next) = bytes.get(at..)?.iter().position(|byte| *byte == first) {
        at += next;
        if bytes[at..].starts_with(wanted) {
            return Some(at);
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TYPE: Option<&str> = Some("multipart/form-data; boundary=b1");

    fn form(parts: &[(&str, &str)]) -> String {
        let parts = parts.iter().map(|(head, value)| format!("--b1\r\n{head}\r\n\r\n{value}\r\n"));
        parts.chain(["--b1--\r\n".to_owned()]).collect()
    }

    fn field(name: &str) -> String {
        format!("Content-Disposition: form-data; name=\"{name}\"")
    }

    fn refused(parts: &[(&str, &str)]) -> String {
        match Form::parse(TYPE, form(parts).as_bytes()) {
            Err(error) => error.message,
            Ok(form) => form.must_be_clear(&["model"]).unwrap_err().message,
        }
    }

    #[test]
    fn only_one_field_changes() {
        let file =
            "Content-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav";
        let body =
            form(&[(&field("model"), "openai/whisper-1"), (file, "RI\r\nFF--b1"), (&field("prompt"), "")]);
        let form = Form::parse(TYPE, body.as_bytes()).unwrap();
        assert_eq!(form.text("model").unwrap(), Some("openai/whisper-1"));
        assert_eq!(form.text("prompt").unwrap(), None);
        assert_eq!(form.file("file").unwrap(), b"RI\r\nFF--b1");
        assert_eq!(form.file("model").unwrap_err().param.as_deref(), Some("model"));
        assert_eq!(form.text("file").unwrap_err().param.as_deref(), Some("file"));
        assert_eq!(form.required_text("language").unwrap_err().code, "missing_required_parameter");
        let sent = form.with_text("model", "w");
        assert_eq!(sent, body.replace("openai/whisper-1", "w"));
        assert_eq!(form.content_type(), "multipart/form-data; boundary=\"b1\"");
    }

    #[test]
    fn what_sdks_send_is_read() {
        for (content_type, boundary) in [
            (
                "multipart/form-data; boundary=----formdata-undici-012345678901",
                "----formdata-undici-012345678901",
            ),
            ("multipart/form-data; boundary=\"a b=c\"", "a b=c"),
            ("Multipart/Form-Data;Boundary=0f0f", "0f0f"),
            ("multipart/form-data; charset=utf-8; boundary=x", "x"),
        ] {
            let body = format!(
                "--{boundary}\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--{boundary}--\r\n"
            );
            let form = Form::parse(Some(content_type), body.as_bytes()).unwrap();
            assert_eq!(form.text("model").unwrap(), Some("m"), "{content_type}");
            assert!(Form::parse(Some(&form.content_type()), body.as_bytes()).is_ok(), "{content_type}");
        }
        for wrong in
            ["application/json", "multipart/form-data", "multipart/form-data; boundary=a; boundary=b"]
        {
            assert_eq!(Form::parse(Some(wrong), b"").err().unwrap().code, "invalid_multipart", "{wrong}");
        }
        assert!(Form::parse(None, b"").is_err());
    }

    #[test]
    fn a_part_that_says_how_long_it_is_says_the_truth_or_nothing() {
        // As OkHttp writes them.
        let with_length = |name: &str, length: usize| {
            let (field, text) = (field(name), "Content-Type: text/plain; charset=utf-8");
            format!("{field}\r\n{text}\r\nContent-Length: {length}\r\nContent-Transfer-Encoding: binary")
        };
        let body = form(&[(&with_length("model", 5), "a/b-c"), (&with_length("prompt", 2), "é")]);
        let form = Form::parse(TYPE, body.as_bytes()).unwrap();
        assert_eq!((form.text("model").unwrap(), form.text("prompt").unwrap()), (Some("a/b-c"), Some("é")));
        let sent = form.with_text("model", "another");
        assert_eq!(sent, body.replace("a/b-c", "another").replace("\r\nContent-Length: 5", ""));
        assert_eq!(Form::parse(TYPE, &sent).unwrap().text("model").unwrap(), Some("another"));
    }

    #[test]
    fn what_two_readers_read_otherwise_is_refused() {
        let model = field("model");
        for parts in [
            &[(model.as_str(), "a"), (model.as_str(), "b")][..],
            &[(model.as_str(), "a"), (&field("Model"), "b")],
            &[(model.as_str(), "a"), (&field("model[]"), "b")],
            &[(&field("model[0]"), "a")],
            &[("Content-Disposition: form-data; name=\"model\"; name=\"n\"", "a")],
            &[("Content-Disposition: form-data; name=\"n\"; name*=utf-8''model", "a")],
            &[("Content-Disposition: form-data; name=\"n\"; filename=\"\\\"; name=\\\"model\"", "a")],
            &[("Content-Disposition: form-data; name=\"mo\\del\"", "a")],
            &[("Content-Disposition: form-data; name=\"mo%64el\"", "a")],
            &[("Content-Disposition: form-data; name=\"\u{17f}\"", "a")],
            &[("Content-Disposition: attachment; name=\"model\"", "a")],
            &[("Content-Disposition: form-data;\r\n name=\"model\"", "a")],
            &[(&format!("{model}\r\nContent-Transfer-Encoding: base64"), "YQ==")],
            &[(&format!("{model}\r\nContent-Length: 1"), "ab")],
            &[(&format!("{model}\r\nContent-Length: 3"), "ab")],
            &[(&format!("{model}\r\nContent-Length: +2"), "ab")],
            &[(&format!("{model}\r\nContent-Length: 02"), "ab")],
            &[(&format!("{model}\r\nContent-Length: 2\r\ncontent-length: 1"), "ab")],
            &[(&format!("{model}\r\nContent-Length : 2"), "ab")],
            &[(&format!("{model}\r\nContent-Encoding: gzip"), "ab")],
            &[(&format!("{model}\r\nContent-Type: text/plain; charset=utf-16"), "a")],
            &[(&format!("{model}\r\nContent-Type: multipart/mixed; boundary=c"), "a")],
            &[(&format!("{model}\r\n{model}"), "a")],
            &[("Content-Type: text/plain", "a")],
            &[(&field("_charset_"), "utf-16")],
            &[(model.as_str(), "a\r\n--b1 \r\nContent-Disposition: form-data; name=\"n\"\r\n\r\n7")],
            &[(model.as_str(), "a\r\n--b12\r\n")],
            &[(model.as_str(), "a\n--b1\r\nContent-Disposition: form-data; name=\"n\"\r\n\r\n7")],
            &[(model.as_str(), "a\r--b1\r\n")],
            &[("Content-Disposition: form-data; name=\"size\"; filename*=utf-8''x", "a")],
            &[("Content-Disposition: form-data; name=\"size\"; filename=\"\"", "a")],
        ] {
            assert!(!refused(parts).is_empty(), "{parts:?}");
        }
        let whole = form(&[(&model, "a")]);
        for body in [format!("preamble\r\n{whole}"), format!("{whole}epilogue"), whole.replace("\r\n", "\n")]
        {
            assert!(Form::parse(TYPE, body.as_bytes()).is_err(), "{body}");
        }
        let many = vec![(model.as_str(), "a"); MAX_PARTS + 1];
        assert!(Form::parse(TYPE, form(&many).as_bytes()).is_err());
    }

    #[test]
    fn a_form_cut_off_anywhere_is_refused() {
        let whole = form(&[(&field("model"), "a"), (&field("prompt"), "\r\n--b")]);
        // Without the line's end behind it, it is as whole.
        let whole = whole.trim_end();
        assert!(Form::parse(TYPE, whole.as_bytes()).is_ok());
        for end in 0..whole.len() {
            assert!(Form::parse(TYPE, &whole.as_bytes()[..end]).is_err(), "{end}");
        }
    }

    proptest! {
        #[test]
        fn any_value_comes_through(value in proptest::collection::vec(any::<u8>(), 0..200), text in "[ -~é]{1,20}") {
            prop_assume!(find(&value, b"\r\n--b1").is_none() && !value.starts_with(b"--b1"));
            let head = "--b1\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n";
            let rest = format!("\r\n--b1\r\n{}\r\n\r\n{text}\r\n--b1--", field("model"));
            let body = [head.as_bytes(), &value, rest.as_bytes()].concat();
            let form = Form::parse(TYPE, &body).unwrap();
            prop_assert_eq!(form.file("file").unwrap(), &value[..]);
            prop_assert_eq!(form.text("model").unwrap(), Some(text.as_str()));
            let sent = form.with_text("model", "m");
            let again = Form::parse(TYPE, &sent).unwrap();
            prop_assert_eq!(again.file("file").unwrap(), &value[..]);
            prop_assert_eq!(again.text("model").unwrap(), Some("m"));
        }

        #[test]
        fn nothing_panics(body in proptest::collection::vec(prop::sample::select(b"-b1\r\n:;=\"name ".to_vec()), 0..80)) {
            let _ = Form::parse(TYPE, &[b"--b1\r\n".as_slice(), &body].concat());
        }
    }
}
