//! Server-sent events (WHATWG HTML, section 9.2), split out of a stream of bytes cut anywhere.

use std::borrow::Cow;

use bytes::{Buf as _, Bytes, BytesMut};

/// An event larger than this is no chunk of an answer: the largest are pictures.
const MAX_EVENT_BYTES: usize = 32 << 20;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of more than {MAX_EVENT_BYTES} bytes")]
pub struct EventTooLarge;

/// One event as it was sent, with the blank line that ends it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event(pub Bytes);

/// Collects bytes until they make whole events.
#[derive(Default)]
pub struct Splitter {
    buffer: BytesMut,
    /// How far the buffer has been searched.
    searched: usize,
    /// Where the line being searched begins.
    line_start: usize,
    /// The byte before was a CR that ended a line: a LF now belongs to it.
    after_cr: bool,
}

impl Splitter {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole event, if one is there.
    pub fn next_event(&mut self) -> Result<Option<Event>, EventTooLarge> {
        while let Some(&byte) = self.buffer.get(self.searched) {
            if byte == b'\n' && self.after_cr {
                self.after_cr = false;
                if self.searched == 0 {
                    // The CR before it ended the last event.
                    self.buffer.advance(1);
                } else {
                    self.searched += 1;
                    self.line_start = self.searched;
                }
                continue;
            }
            self.after_cr = byte == b'\r';
            self.searched += 1;
            if byte == b'\n' || byte == b'\r' {
                let line_is_empty = self.line_start + 1 == self.searched;
                self.line_start = self.searched;
                if line_is_empty {
                    let event = self.buffer.split_to(self.searched).freeze();
                    self.searched = 0;
                    self.line_start = 0;
                    return Ok(Some(Event(event)));
                }
            }
        }
        if self.buffer.len() > MAX_EVENT_BYTES { Err(EventTooLarge) } else { Ok(None) }
    }

    /// What is left when the stream has ended: an event without its blank line counts.
    pub fn rest(self) -> Option<Event> {
        let mut rest = self.buffer;
        if rest.iter().all(|byte| matches!(byte, b'\n' | b'\r')) {
            return None;
        }
        rest.extend_from_slice(b"\n\n");
        Some(Event(rest.freeze()))
    }
}

impl Event {
    /// An event with one line of data.
    pub fn from_data(data: &[u8]) -> Bytes {
        let mut out = Vec::with_capacity(data.len() + 8);
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(data);
        out.extend_from_slice(b"\n\n");
        out.into()
    }

    /// An event of a type, with one line of data.
    pub fn named(name: &str, data: &[u8]) -> Bytes {
        let mut out = Vec::with_capacity(name.len() + data.len() + 16);
        out.extend_from_slice(b"event: ");
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"\ndata: ");
        out.extend_from_slice(data);
        out.extend_from_slice(b"\n\n");
        out.into()
    }

    /// The event's type, if it has one that is text.
    pub fn name(&self) -> Option<&str> {
        let lines = self.0.split(|byte| matches!(byte, b'\n' | b'\r'));
        let mut names = lines.filter_map(|line| line.strip_prefix(b"event:"));
        names.next_back().and_then(|name| std::str::from_utf8(name).ok()).map(str::trim)
    }

    /// The event's data: its `data:` lines, joined. `None` for a comment or a keep-alive.
    pub fn data(&self) -> Option<Cow<'_, [u8]>> {
        let mut lines = self.0.split(|byte| matches!(byte, b'\n' | b'\r')).filter_map(|line| {
            let value = line.strip_prefix(b"data")?;
            match value {
                [] => Some(value),
                [b':', b' ', rest @ ..] | [b':', rest @ ..] => Some(rest),
                _ => None,
            }
        });
        let first = lines.next()?;
        let Some(second) = lines.next() else { return Some(Cow::Borrowed(first)) };
        let mut joined = first.to_vec();
        for line in std::iter::once(second).chain(lines) {
            joined.push(b'\n');
            joined.extend_from_slice(line);
        }
        Some(Cow::Owned(joined))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data_of(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut splitter = Splitter::default();
        let mut events = Vec::new();
        for piece in pieces {
            splitter.push(piece);
            while let Some(event) = splitter.next_event().unwrap() {
                events.push(event);
            }
        }
        events.extend(splitter.rest());
        events.iter().filter_map(|event| event.data().map(Cow::into_owned)).collect()
    }

    const STREAM: &[u8] = b": hi\n\ndata: {\"a\":\xc3\xa9}\n\nevent: x\r\ndata:one\r\ndata: two\r\n\r\ndata: cr\r\rid: 7\n\ndata: [DONE]\n\n";

    #[test]
    fn cut_at_every_byte_it_says_the_same() {
        let whole = data_of(&[STREAM]);
        assert_eq!(whole.len(), 4);
        assert_eq!(whole[1], b"one\ntwo");
        for cut in 0..=STREAM.len() {
            assert_eq!(data_of(&[&STREAM[..cut], &STREAM[cut..]]), whole, "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = STREAM.chunks(1).collect();
        assert_eq!(data_of(&bytes), whole);
    }

    #[test]
    fn an_event_without_its_blank_line_counts_at_the_end() {
        assert_eq!(data_of(&[b"data: a\n\ndata: [DONE]"]), [b"a".to_vec(), b"[DONE]".to_vec()]);
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut splitter = Splitter::default();
        splitter.push(&vec![b'x'; MAX_EVENT_BYTES + 1]);
        assert_eq!(splitter.next_event(), Err(EventTooLarge));
    }

    proptest! {
        /// Whatever is sent, where it is cut does not matter, and no byte is lost.
        #[test]
        fn cuts_do_not_matter(parts in proptest::collection::vec(prop_oneof!["data: ", "\n", "\r", "\r\n", "\n\n", "[a-z:]{0,3}"], 0..40), seed in any::<u64>()) {
            let text = parts.concat().into_bytes();
            let mut cuts = Vec::new();
            let mut state = seed;
            for byte in &text {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                if cuts.is_empty() || state >> 63 == 0 { cuts.push(Vec::new()); }
                cuts.last_mut().unwrap().push(*byte);
            }
            let pieces: Vec<&[u8]> = cuts.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(data_of(&pieces), data_of(&[&text]));
        }
    }
}
