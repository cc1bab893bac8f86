//! A stream on its way from an upstream to a client.

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use crate::claims::MAX_KEPT_BYTES;
use crate::formats::chat::{Forward, StreamTap};
use crate::formats::sse::{Event, Splitter};
use crate::metering::CLIENT_STALL;
use crate::metering::open_hold::OpenHold;
use crate::providers::{AnswerStream, UpstreamError};
use crate::tasks::Tasks;

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

    fn into_bytes(self) -> Bytes {
        match self {
            Self::Nothing => Bytes::new(),
            Self::One(event) => event,
            Self::Several(several) => several.freeze(),
        }
    }
}

/// A stream from an upstream to a client, and the hold that pays for it.
pub struct LiveStream {
    pub answer: AnswerStream,
    pub splitter: Splitter,
    pub tap: StreamTap,
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

    /// Passes events on as they come, no faster than the client takes them.
    pub async fn forward(&mut self, tasks: &Tasks) -> End {
        let client = self.client.clone();
        let (mut client_gone, mut aborted) = (pin!(client.closed()), pin!(tasks.aborted()));
        loop {
            let piece = tokio::select! {
                piece = self.answer.next() => piece,
                () = &mut client_gone => return End::ClientGone,
                () = &mut aborted => return End::Stopping,
            };
            let (passed, end) = match piece {
                Ok(Some(bytes)) => self.pass(&bytes),
                Ok(None) => self.pass_rest(),
                Err(error) => return End::Failed(error),
            };
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
        let passed = passed.into_bytes();
        self.note_sent(&passed);
        (passed, end)
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
        self.note_sent(&passed);
        let is_whole = self.tap.is_finished();
        let unsaid = || if is_whole { End::Complete } else { End::Failed(UpstreamError::BrokeOff) };
        (passed, Some(end.unwrap_or_else(unsaid)))
    }

    pub async fn next_event(&mut self) -> Result<Option<Event>, UpstreamError> {
        loop {
            match self.splitter.next_event() {
                Ok(Some(event)) => return Ok(Some(event)),
                Ok(None) => {}
                Err(_) => return Err(UpstreamError::Nonsense),
            }
            match self.answer.next().await? {
                Some(bytes) => self.splitter.push(&bytes),
                None => return Ok(std::mem::take(&mut self.splitter).rest()),
            }
        }
    }
}
