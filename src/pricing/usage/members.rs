//! A JSON object taken apart at its top, as far as a report of usage needs: whatever is not what is looked
//! for is not there, so that a provider's new word never hides the old ones.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

pub struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Members<'a> {
    /// `None` of anything but one object.
    pub fn parse(json: &'a str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }

    /// The JSON text of a member.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.get())
    }

    /// A whole number, zero or above.
    pub fn count(&self, key: &str) -> Option<u64> {
        // Rust would take a sign as well, which JSON does not have.
        self.text(key).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok()
    }

    pub fn object(&self, key: &str) -> Option<Self> {
        Self::parse(self.text(key)?)
    }

    pub fn list(&self, key: &str) -> Vec<Self> {
        self.text(key).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
    }

    pub fn string(&self, key: &str) -> Option<String> {
        serde_json::from_str(self.text(key)?).ok()
    }

    /// The first number that is there, each at a path of keys.
    pub fn first(&self, paths: &[&[&str]]) -> Option<u64> {
        paths.iter().find_map(|path| match path {
            [key] => self.count(key),
            [parent, key] => self.object(parent)?.count(key),
            _ => None,
        })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::with_capacity(8);
                while let Some((Key(key), value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    members.push((key, value));
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

/// A key borrowed from the text where it has no escapes.
#[derive(serde::Deserialize)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);
