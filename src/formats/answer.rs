//! What answers in every format have in common, whole or as streams.

use bytes::Bytes;

use crate::formats::json::{Object, length};
use crate::formats::request::estimate_tokens;

/// Why an upstream's 200 is no answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotAnAnswer {
    /// It holds an error in place of an answer.
    Error,
    Nonsense,
}

/// What to do with an event of an upstream's stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Forward {
    Send(Bytes),
    /// It says nothing that the client asked for.
    Skip,
    /// The stream is complete. What ends it for the client is held back until it is settled.
    Done,
    /// The upstream says that it failed.
    Failed,
    Nonsense,
}

/// How much of an answer has been delivered, for when nobody reports its usage.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Delivered {
    bytes: u64,
    chunks: u64,
}

impl Delivered {
    /// A piece with so many bytes of output.
    pub(super) fn add(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.chunks += u64::from(bytes > 0);
    }

    pub(super) fn anything(&self) -> bool {
        self.bytes > 0
    }

    /// Output tokens delivered so far: no chunk with output has less than one.
    pub(super) fn estimated_tokens(&self) -> u64 {
        estimate_tokens(self.bytes).max(self.chunks)
    }
}

/// The bytes of a text, without its quotes.
pub(super) fn text_bytes(object: &Object<'_>, key: &str) -> u64 {
    object.get_non_null(key).map_or(0, |json| length(json).saturating_sub(2))
}
