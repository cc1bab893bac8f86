//! Server-sent events (WHATWG HTML, section 9.2), split out of a stream of bytes cut anywhere.

use std::borrow::Cow;

use bytes::{Buf as _, Bytes, BytesMut};
use memchr::{memchr, memchr2};

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
        while let Some(&next) = self.buffer.get(self.searched) {
            if std::mem::take(&mut self.after_cr) && next == b'\n' {
                if self.searched == 0 {
                    // The CR before it ended the last event.
                    self.buffer.advance(1);
                } else {
                    self.searched += 1;
                    self.line_start = self.searched;
                }
                continue;
            }
            let unsearched = &self.buffer[self.searched..];
            let Some(line_end) = memchr2(b'\n', b'\r', unsearched) else {
                self.searched = self.buffer.len();
                break;
            };
            self.after_cr = unsearched[line_end] == b'\r';
            let line_is_empty = self.line_start == self.searched + line_end;
            self.searched += line_end + 1;
            self.line_start = self.searched;
            if line_is_empty {
                let event = self.buffer.split_to(self.searched).freeze();
                self.searched = 0;
                self.line_start = 0;
                return Ok(Some(Event(event)));
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

/// What a line of data begins with.
const DATA: &[u8] = b"data: ";

impl Event {
    /// An event with this data.
    pub fn from_data(data: &[u8]) -> Bytes {
        Self::written(None, data.len(), |out| out.extend_from_slice(data))
    }

    /// An event of a type, with this data.
    pub fn named(name: &str, data: &[u8]) -> Bytes {
        Self::written(Some(name), data.len(), |out| out.extend_from_slice(data))
    }

    /// An event, perhaps of a type, whose data of about this length is written where it is to stand.
    pub fn written(name: Option<&str>, length: usize, write: impl FnOnce(&mut Vec<u8>)) -> Bytes {
        let mut out = Vec::with_capacity(name.map_or(0, str::len) + length + 32);
        if let Some(name) = name {
            out.extend_from_slice(b"event: ");
            out.extend_from_slice(name.as_bytes());
            out.push(b'\n');
        }
        out.extend_from_slice(DATA);
        let begin = out.len();
        write(&mut out);
        // Values are passed on as they came, and one that came in several lines goes on in several.
        if memchr(b'\n', &out[begin..]).is_some() {
            let lines = out.split_off(begin);
            for (i, line) in lines.split(|byte| *byte == b'\n').enumerate() {
                if i > 0 {
                    out.push(b'\n');
                    out.extend_from_slice(DATA);
                }
                out.extend_from_slice(line);
            }
        }
        out.extend_from_slice(b"\n\n");
        out.into()
    }

    /// The event's type, if it has one that is text.
    pub fn name(&self) -> Option<&str> {
        let names = self.lines().filter_map(|line| line.strip_prefix(b"event:"));
        names.last().and_then(|name| std::str::from_utf8(name).ok()).map(str::trim)
    }

    /// The event's data: its `data:` lines, joined. `None` for a comment or a keep-alive.
    pub fn data(&self) -> Option<Cow<'_, [u8]>> {
        let mut lines = self.lines().filter_map(|line| {
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

    /// Its lines without their ends; between a CR and its LF an empty one.
    fn lines(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = Some(self.0.as_ref());
        std::iter::from_fn(move || {
            let text = rest?;
            let line_end = memchr2(b'\n', b'\r', text);
            rest = line_end.map(|at| &text[at + 1..]);
            Some(&text[..line_end.unwrap_or(text.len())])
        })
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
    fn what_is_written_in_several_lines_is_read_as_it_was() {
        for data in ["{\"a\":[1,\n2]}", "\n", "a\n\nb", "", "one"] {
            assert_eq!(data_of(&[&Event::from_data(data.as_bytes())]), [data.as_bytes()], "{data:?}");
            let named = Event(Event::named("x", data.as_bytes()));
            assert_eq!((named.name(), named.data().as_deref()), (Some("x"), Some(data.as_bytes())));
        }
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
