//! A JSON object taken apart only at its top: members keep their order, and their values the very
//! bytes they came in. What the gateway has no business with passes through it unread.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// More members than an object of a request or of an answer has. Each takes many times the memory of its text.
const MAX_MEMBERS: usize = 1024;

/// The members of an object, each value as its JSON text.
#[derive(Clone, Debug)]
pub struct Object<'a> {
    members: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

impl<'a> Object<'a> {
    /// Parses one JSON object; anything else, or anything behind it, is an error.
    pub fn parse(text: &'a [u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// The same of an object with any number of members: one that no client sends.
    pub fn parse_large(text: &'a [u8]) -> Result<Self, serde_json::Error> {
        let mut reader = serde_json::Deserializer::from_slice(text);
        let object = reader.deserialize_map(Members { most: usize::MAX })?;
        reader.end().map(|()| object)
    }

    /// The JSON text of a member; of the last one, should there be several.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.members.iter().rev().find(|(k, _)| k == key).map(|(_, value)| value.as_ref())
    }

    /// Like [`Self::get`], where null counts as absent.
    pub fn get_non_null(&self, key: &str) -> Option<&str> {
        self.get(key).filter(|value| *value != "null")
    }

    pub fn members(&self) -> impl Iterator<Item = (&str, &str)> {
        self.members.iter().map(|(key, value)| (key.as_ref(), value.as_ref()))
    }

    /// A key that another reader may take for another: one that occurs twice, or that only case tells
    /// from another or from one of `names`. Go's JSON decoder folds case, and the last one wins there.
    pub fn ambiguous_key(&self, names: &[&str]) -> Option<&str> {
        let mut keys: Vec<(Cow<'_, str>, &str)> =
            self.members.iter().map(|(key, _)| (fold(key), key.as_ref())).collect();
        if let Some((_, key)) = keys.iter().find(|(fold, key)| names.contains(&fold.as_ref()) && fold != key)
        {
            return Some(key);
        }
        keys.sort_unstable();
        keys.windows(2).find(|pair| pair[0].0 == pair[1].0).map(|pair| pair[1].1)
    }

    /// Sets a member to `value`, a JSON text: in its place if it is there, else at the end.
    pub fn set(&mut self, key: &str, value: impl Into<Cow<'a, str>>) {
        let value = value.into();
        match self.members.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.members.push((Cow::Owned(key.to_owned()), value)),
        }
    }

    pub fn remove(&mut self, key: &str) {
        self.members.retain(|(k, _)| k != key);
    }

    pub fn write_to(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        for (i, (key, value)) in self.members.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            // Into memory, and of what is a string: it cannot fail.
            let _ = serde_json::to_writer(&mut *out, key);
            out.push(b':');
            out.extend_from_slice(value.as_bytes());
        }
        out.push(b'}');
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let size = self.members.iter().map(|(key, value)| key.len() + value.len() + 8).sum();
        let mut out = Vec::with_capacity(size);
        self.write_to(&mut out);
        out
    }
}

/// A key as a reader sees it that folds case as Go's decoder does.
fn fold(key: &str) -> Cow<'_, str> {
    if key.bytes().all(|byte| byte.is_ascii() && !byte.is_ascii_uppercase()) {
        return Cow::Borrowed(key);
    }
    key.chars().map(fold_letter).collect()
}

fn fold_letter(c: char) -> char {
    match c {
        'ſ' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    }
}

/// Whether such a reader takes a key for this name, which is in small letters.
pub fn is_like(key: &str, name: &str) -> bool {
    // No letter is folded into one of more bytes.
    key.len() >= name.len() && key.chars().map(fold_letter).eq(name.chars())
}

/// A string as JSON text.
pub fn quote(text: &str) -> String {
    // Nothing that is a string fails to be written as one.
    serde_json::to_string(text).unwrap_or_default()
}

/// An object's text with one member set; `None` if the text is no object.
pub fn with_member(object: &str, key: &str, value: &str) -> Option<String> {
    let mut object = Object::parse(object.as_bytes()).ok()?;
    object.set(key, value);
    String::from_utf8(object.to_bytes()).ok()
}

/// The bytes of a JSON text.
pub fn length(json: &str) -> u64 {
    u64::try_from(json.len()).unwrap_or(u64::MAX)
}

pub fn length_of<T>(list: &[T]) -> u64 {
    u64::try_from(list.len()).unwrap_or(u64::MAX)
}

/// Takes the items of a list one by one, and keeps none: there may be very many.
pub fn each<'a, T: Deserialize<'a>>(json: &'a str, take: impl FnMut(T)) -> Result<(), serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_str(json);
    reader.deserialize_seq(Items(take, PhantomData))?;
    reader.end()
}

struct Items<T, F: FnMut(T)>(F, PhantomData<T>);

impl<'de, T: Deserialize<'de>, F: FnMut(T)> Visitor<'de> for Items<T, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        while let Some(item) = list.next_element()? {
            (self.0)(item);
        }
        Ok(())
    }
}

/// Builds the text of an object, member by member.
#[derive(Debug)]
pub struct ObjectText(String);

impl ObjectText {
    pub fn new() -> Self {
        Self("{".to_owned())
    }

    /// A member whose value is this JSON text.
    pub fn json(&mut self, key: &str, value: &str) -> &mut Self {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        self.0.push_str(&quote(key));
        self.0.push(':');
        self.0.push_str(value);
        self
    }

    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.json(key, &quote(value))
    }

    pub fn number(&mut self, key: &str, value: u64) -> &mut Self {
        self.json(key, &value.to_string())
    }

    /// A member only if there is a value for it.
    pub fn maybe(&mut self, key: &str, value: Option<impl AsRef<str>>) -> &mut Self {
        match value {
            Some(value) => self.json(key, value.as_ref()),
            None => self,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.len() == 1
    }

    pub fn end(&mut self) -> String {
        self.0.push('}');
        std::mem::take(&mut self.0)
    }
}

impl Default for ObjectText {
    fn default() -> Self {
        Self::new()
    }
}

/// The text of a list of these JSON texts.
pub fn list<T: AsRef<str>>(items: impl IntoIterator<Item = T>) -> String {
    let mut text = "[".to_owned();
    for item in items {
        if text.len() > 1 {
            text.push(',');
        }
        text.push_str(item.as_ref());
    }
    text.push(']');
    text
}

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Members { most: MAX_MEMBERS })
    }
}

struct Members {
    most: usize,
}

impl<'de> Visitor<'de> for Members {
    type Value = Object<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        // No room ahead of the members: there may be a list of very many objects without any.
        let mut members = Vec::new();
        while let Some((Key(key), value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
            if members.len() == self.most {
                return Err(A::Error::custom(format_args!("it may have {} members at most", self.most)));
            }
            members.push((key, Cow::Borrowed(value.get())));
        }
        Ok(Object { members })
    }
}

/// A key borrowed from the text where it has no escapes.
#[derive(serde::Deserialize)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_keep_their_bytes_and_order() {
        let text = br#"{ "b" : 1.0e+2 , "a\u0062" : [ 1,  2 ], "n":null}"#;
        let mut object = Object::parse(text).unwrap();
        assert_eq!(object.get("ab"), Some("[ 1,  2 ]"));
        assert_eq!(object.get_non_null("n"), None);
        object.set("b", "7");
        object.set("new", quote("x\"y"));
        object.remove("n");
        assert_eq!(object.to_bytes(), br#"{"b":7,"ab":[ 1,  2 ],"new":"x\"y"}"#);
    }

    #[test]
    fn duplicates_are_seen_through_escapes() {
        let object = Object::parse(br#"{"max_tokens":1,"max\u005ftokens":9}"#).unwrap();
        assert_eq!(object.ambiguous_key(&[]), Some("max_tokens"));
        for (text, key) in
            [(r#"{"N":1}"#, "N"), ("{\"\u{17f}tream\":1}", "ſtream"), (r#"{"x":1,"X":2}"#, "x")]
        {
            assert_eq!(Object::parse(text.as_bytes()).unwrap().ambiguous_key(&["n", "stream"]), Some(key));
        }
        assert_eq!(Object::parse(br#"{"n":1,"Other":2}"#).unwrap().ambiguous_key(&["n"]), None);
    }

    #[test]
    fn a_key_is_like_a_name_whatever_its_case() {
        for key in ["stream_k", "Stream_K", "STREAM_K", "\u{17f}tream_\u{212a}"] {
            assert!(is_like(key, "stream_k"), "{key}");
        }
        for key in ["stream", "stream_kk", "streamk", "strëam_k", ""] {
            assert!(!is_like(key, "stream_k"), "{key}");
        }
    }

    #[test]
    fn an_object_may_have_so_many_members() {
        let object = |count: usize| {
            let members: Vec<_> = (0..count).map(|i| format!("\"{i}\":{i}")).collect();
            format!("{{{}}}", members.join(","))
        };
        assert!(Object::parse(object(MAX_MEMBERS).as_bytes()).is_ok());
        let many = object(MAX_MEMBERS + 1);
        let error = Object::parse(many.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with("it may have 1024 members at most"), "{error}");
        assert!(with_member(&many, "a", "1").is_none());
        assert_eq!(Object::parse_large(many.as_bytes()).unwrap().members().count(), MAX_MEMBERS + 1);
        assert!(Object::parse_large(b"{}x").is_err());
    }

    #[test]
    fn a_list_is_read_item_by_item() {
        let mut read = Vec::new();
        assert!(each(" [1, 2 ,3] ", |item: u32| read.push(item)).is_ok());
        assert_eq!(read, [1, 2, 3]);
        for bad in ["[1,\"a\"]", "[1", "[1]x", "{}", "1", "null", ""] {
            assert!(each(bad, |_: u32| {}).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_one_whole_object_is_taken() {
        for bad in [&b"[]"[..], b"{", b"{}x", b"", b"null", b"{\"a\":}", b"{\"a\":\"\xff\"}"] {
            assert!(Object::parse(bad).is_err(), "{bad:?}");
        }
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let _ = Object::parse(deep.as_bytes());
    }

    proptest! {
        #[test]
        fn round_trips(members in proptest::collection::btree_map("\\PC{0,8}", any::<Option<i64>>(), 0..8)) {
            let text = serde_json::to_vec(&members).unwrap();
            prop_assert_eq!(Object::parse(&text).unwrap().to_bytes(), text);
        }
    }
}
