//! What a client is still sending when it is refused.
//!
//! A connection closed with bytes unread is reset, and the reset can overtake the answer: the client
//! then sees a broken pipe and no reason. So the rest of a refused body is read and thrown away,
//! within bounds (RFC 9112, section 9.6).

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// As much as is thrown away, and …
const MAX_BYTES: usize = 64 << 20;
/// … for as long.
const MAX_TIME: Duration = Duration::from_secs(10);

/// A request's body that can still be read when its handler is done with it.
#[derive(Clone)]
pub struct Leftover(Arc<Mutex<Body>>);

impl Leftover {
    pub fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(body)))
    }

    /// Reads what is left, and forgets it.
    pub async fn discard(mut self) {
        let read = async {
            let mut bytes = 0;
            while let Some(Ok(frame)) = self.frame().await {
                bytes += frame.data_ref().map_or(0, Bytes::len);
                if bytes > MAX_BYTES {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(MAX_TIME, read).await;
    }

    fn with<T>(&self, read: impl FnOnce(Pin<&mut Body>) -> T) -> T {
        let mut body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        read(Pin::new(&mut body))
    }
}

impl HttpBody for Leftover {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.with(|body| body.poll_frame(context))
    }

    fn is_end_stream(&self) -> bool {
        self.with(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.with(|body| body.size_hint())
    }
}
