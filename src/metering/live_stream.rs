//! A stream on its way from an upstream to a client.

use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::claims::MAX_KEPT_BYTES;
use crate::formats::answer::Forward;
use crate::formats::goods::Tap;
use crate::formats::sse::Splitter;
use crate::metering::CLIENT_STALL;
use crate::metering::open_hold::OpenHold;
use crate::pricing::Dialect;
use crate::providers::{AnswerStream, Turn, Upstream, UpstreamError};
use crate::tasks::Tasks;

/// For so long a stream without output is kept from its client, who sees no head of an answer until then: less
/// than proxies and clients wait for one.
const UNTIL_OUTPUT: Duration = Duration::from_secs(5);
/// As much as comes before output in any format, several times.
const MAX_HELD_BACK_BYTES: usize = 64 << 10;

/// How a stream came to its end.
pub enum End {
    Complete,
    Failed(UpstreamError),
    ClientGone,
    Stopping,
}

impl End {
    /// How an event ends the stream that it is not passed on of.
    fn said(by: Forward) -> Self {
        match by {
            Forward::Failed => Self::Failed(UpstreamError::BrokeOff),
            Forward::Nonsense => Self::Failed(UpstreamError::Nonsense),
            Forward::Done | Forward::Send(_) | Forward::Skip => Self::Complete,
        }
    }
}

/// Events on their way to the client together, because they came together.
#[derive(Default)]
enum Passed {
    #[default]
    Nothing,
    One(Bytes),
    Several(BytesMut),
}

impl Passed {
    fn add(&mut self, event: Bytes) {
        if event.is_empty() {
            return;
        }
        *self = match std::mem::take(self) {
            Self::Nothing => Self::One(event),
            Self::One(first) => {
                let mut several = BytesMut::with_capacity(4 * (first.len() + event.len()));
                several.extend_from_slice(&first);
                several.extend_from_slice(&event);
                Self::Several(several)
            }
            Self::Several(mut several) => {
                several.extend_from_slice(&event);
                Self::Several(several)
            }
        };
    }

    fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::One(event) => event.len(),
            Self::Several(several) => several.len(),
        }
    }

    fn into_bytes(self) -> Bytes {
        match self {
            Self::Nothing => Bytes::new(),
            Self::One(event) => event,
            Self::Several(several) => several.freeze(),
        }
    }
}

/// An answer that an upstream streams, as its client gets it.
pub struct Reading {
    answer: AnswerStream,
    splitter: Splitter,
    pub tap: Tap,
}

impl Reading {
    pub fn new(answer: AnswerStream, tap: Tap) -> Self {
        Self { answer, splitter: Splitter::default(), tap }
    }

    /// Reads on until there is output, or the end. What failed before can be asked of somebody else, so nothing
    /// is passed on until then, unless that takes long. What there is for the client, and how it ended if it did.
    pub async fn begin(&mut self) -> Result<(Bytes, Option<End>), UpstreamError> {
        let mut begun = Passed::default();
        let deadline = Instant::now() + UNTIL_OUTPUT;
        loop {
            let Ok(next) = tokio::time::timeout_at(deadline, self.next()).await else {
                return Ok((begun.into_bytes(), None));
            };
            let (passed, end) = next;
            begun.add(passed);
            match end {
                Some(End::Failed(error)) if !self.tap.delivered_anything() => return Err(error),
                None if !self.tap.delivered_anything() && begun.len() <= MAX_HELD_BACK_BYTES => {}
                end => return Ok((begun.into_bytes(), end)),
            }
        }
    }

    fn is_empty(&self) -> bool {
        !self.tap.delivered_anything() && self.tap.usage_raw().is_none() && !self.tap.is_finished()
    }

    /// What the client gets of the next piece, and how the stream ended if it did.
    pub async fn next(&mut self) -> (Bytes, Option<End>) {
        let (passed, end) = match self.answer.next().await {
            Ok(Some(bytes)) => self.pass(&bytes),
            Ok(None) => self.pass_rest(),
            Err(error) => (Bytes::new(), Some(End::Failed(error))),
        };
        match end {
            // An end to nothing at all is no answer.
            Some(End::Complete) if self.is_empty() => (passed, Some(End::Failed(UpstreamError::Nonsense))),
            end => (passed, end),
        }
    }

    /// What the client gets of a piece of the answer, and how the stream ended if it did: of all events
    /// that it makes whole.
    fn pass(&mut self, piece: &[u8]) -> (Bytes, Option<End>) {
        self.splitter.push(piece);
        let mut passed = Passed::default();
        let end = loop {
            match self.splitter.next_event() {
                Ok(Some(event)) => match self.tap.event(&event) {
                    Forward::Send(bytes) => passed.add(bytes),
                    Forward::Skip => {}
                    ends => break Some(End::said(ends)),
                },
                Ok(None) => break None,
                Err(_) => break Some(End::Failed(UpstreamError::Nonsense)),
            }
        };
        (passed.into_bytes(), end)
    }

    /// The same of what is left when the answer has ended.
    fn pass_rest(&mut self) -> (Bytes, Option<End>) {
        let rest = std::mem::take(&mut self.splitter).rest();
        let (mut passed, mut end) = (Bytes::new(), None);
        match rest.map(|event| self.tap.event(&event)) {
            None | Some(Forward::Skip) => {}
            Some(Forward::Send(bytes)) => passed = bytes,
            Some(ends) => end = Some(End::said(ends)),
        }
        let is_whole = self.tap.is_finished();
        let unsaid = || if is_whole { End::Complete } else { End::Failed(UpstreamError::BrokeOff) };
        (passed, Some(end.unwrap_or_else(unsaid)))
    }
}

/// A stream from an upstream to a client, and the hold that pays for it.
pub struct LiveStream {
    pub upstream: Upstream,
    /// By which it was asked.
    pub turn: Turn,
    pub reading: Reading,
    /// In which words its usage is reported.
    pub dialect: Dialect,
    pub client: mpsc::Sender<Bytes>,
    /// What the client was sent, or would have been: `None` where nobody may ask for it again, or it
    /// has become too much.
    pub sent: Option<Vec<u8>>,
    pub open: OpenHold,
}

impl LiveStream {
    pub fn note_sent(&mut self, bytes: &[u8]) {
        if let Some(sent) = &mut self.sent {
            sent.extend_from_slice(bytes);
        }
        if self.sent.as_ref().is_some_and(|sent| sent.len() > MAX_KEPT_BYTES) {
            self.sent = None;
        }
    }

    /// Passes on what it began with, and then events as they come, no faster than the client takes them.
    pub async fn forward(&mut self, begun: Bytes, end: Option<End>, tasks: &Tasks) -> End {
        let client = self.client.clone();
        let (mut client_gone, mut aborted) = (pin!(client.closed()), pin!(tasks.aborted()));
        let (mut passed, mut end) = (begun, end);
        loop {
            self.note_sent(&passed);
            if !passed.is_empty() {
                let sent = tokio::select! {
                    sent = tokio::time::timeout(CLIENT_STALL, client.send(passed)) => sent,
                    () = &mut aborted => return End::Stopping,
                };
                if !matches!(sent, Ok(Ok(()))) {
                    // Where the end is here already, there is nothing to read on for.
                    return end.unwrap_or(End::ClientGone);
                }
            }
            if let Some(end) = end {
                return end;
            }
            (passed, end) = tokio::select! {
                next = self.reading.next() => next,
                () = &mut client_gone => return End::ClientGone,
                () = &mut aborted => return End::Stopping,
            };
        }
    }

    /// Reads on for the usage, with nobody to pass anything on to. Whether it came to its end.
    pub async fn read_on(&mut self) -> bool {
        loop {
            let (passed, end) = self.reading.next().await;
            self.note_sent(&passed);
            if let Some(end) = end {
                return matches!(end, End::Complete);
            }
        }
    }
}
