//! The members of an object in a request that is to be translated. Here nothing may be overlooked:
//! a member that nobody knows could be the one that mattered.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::formats::json::Object;
use crate::formats::request::{BadRequest, bad, bad_value, unsupported};

pub(super) struct Members<'a> {
    object: Object<'a>,
    /// Where it stands in the request: `messages[2].content[0]`, or nothing for the request itself.
    at: String,
}

impl<'a> Members<'a> {
    pub(super) fn of(object: Object<'a>) -> Self {
        Self { object, at: String::new() }
    }

    pub(super) fn parse(json: &'a str, at: impl Into<String>) -> Result<Self, BadRequest> {
        let at = at.into();
        match Object::parse(json.as_bytes()) {
            Ok(object) => Ok(Self { object, at }),
            Err(_) => Err(bad_value(&at, format!("{at} must be an object"))),
        }
    }

    /// The place of a member.
    pub(super) fn at(&self, key: &str) -> String {
        if self.at.is_empty() { key.to_owned() } else { format!("{}.{key}", self.at) }
    }

    pub(super) fn place(&self) -> &str {
        &self.at
    }

    /// Refuses all members but these. What is `harmless` loses nothing that is answered for when it
    /// is left out; null says nothing anywhere.
    pub(super) fn only(&self, known: &[&str], harmless: &[&str]) -> Result<(), BadRequest> {
        if let Some(key) = self.object.ambiguous_key(known) {
            return Err(bad_value(&self.at(key), "is there twice, or not spelt as the API spells it"));
        }
        let unknown =
            |(key, value): &(&str, &str)| *value != "null" && !known.contains(key) && !harmless.contains(key);
        match self.object.members().find(unknown) {
            Some((key, _)) => Err(self.refuse(key)),
            None => Ok(()),
        }
    }

    /// The refusal of a member that the upstream has no place for.
    pub(super) fn refuse(&self, key: &str) -> BadRequest {
        let at = self.at(key);
        unsupported(&at, format!("{at} cannot be translated for this model's provider: leave it out"))
    }

    /// Refuses a member unless it has one of these JSON texts, which ask for nothing.
    pub(super) fn nothing_but(&self, key: &str, nothing: &[&str]) -> Result<(), BadRequest> {
        match self.json(key) {
            Some(value) if !nothing.contains(&value) => Err(self.refuse(key)),
            _ => Ok(()),
        }
    }

    /// The JSON text of a member that is there and not null.
    pub(super) fn json(&self, key: &str) -> Option<&str> {
        self.object.get_non_null(key)
    }

    fn read<'b, T: Deserialize<'b>>(&'b self, key: &str, expected: &str) -> Result<Option<T>, BadRequest> {
        let wrong = || bad_value(&self.at(key), format!("{} must be {expected}", self.at(key)));
        self.json(key).map(|json| serde_json::from_str(json).map_err(|_| wrong())).transpose()
    }

    fn missing(&self, key: &str) -> BadRequest {
        let at = self.at(key);
        bad("missing_required_parameter", &at, format!("{at} is required"))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<String>, BadRequest> {
        self.read(key, "a string")
    }

    pub(super) fn must_text(&self, key: &str) -> Result<String, BadRequest> {
        self.text(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, BadRequest> {
        self.read(key, "true or false")
    }

    pub(super) fn whole(&self, key: &str) -> Result<Option<u64>, BadRequest> {
        self.read(key, "a whole number")
    }

    /// A number as its JSON text.
    pub(super) fn number(&self, key: &str) -> Result<Option<String>, BadRequest> {
        let number: Option<serde_json::Number> = self.read(key, "a number")?;
        Ok(number.and(self.json(key)).map(str::to_owned))
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<Vec<&RawValue>>, BadRequest> {
        self.read(key, "a list")
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<String>>, BadRequest> {
        self.read(key, "a list of strings")
    }

    /// The objects of a list, each with its place.
    pub(super) fn objects(&self, key: &str) -> Result<Vec<Members<'_>>, BadRequest> {
        let list = self.list(key)?.unwrap_or_default();
        let members = list.into_iter().enumerate();
        members.map(|(i, raw)| Members::parse(raw.get(), format!("{}[{i}]", self.at(key)))).collect()
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Members<'_>>, BadRequest> {
        self.json(key).map(|json| Members::parse(json, self.at(key))).transpose()
    }

    pub(super) fn must_object(&self, key: &str) -> Result<Members<'_>, BadRequest> {
        self.object(key)?.ok_or_else(|| self.missing(key))
    }

    /// An object's JSON text, as it is.
    pub(super) fn object_json(&self, key: &str) -> Result<Option<String>, BadRequest> {
        Ok(self.object(key)?.and(self.json(key)).map(str::to_owned))
    }

    /// Whether a member is a text and not a list of parts.
    pub(super) fn is_text(&self, key: &str) -> bool {
        self.json(key).is_some_and(|json| json.starts_with('"'))
    }
}
