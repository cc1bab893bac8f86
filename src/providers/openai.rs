//! Upstreams that speak the OpenAI API, as most do.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use metrics::Histogram;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Body, Client, StatusCode, Url};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use crate::config;
use crate::providers::UpstreamError;

/// Far above any answer; an upstream that sends more is broken.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Enough of an error's body to read its message.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// As much of an upstream's message as goes on to the client.
const MAX_MESSAGE_CHARS: usize = 1000;

/// One upstream.
#[derive(Clone)]
pub struct OpenAi {
    name: String,
    client: Client,
    chat_url: Url,
    api_key: Option<SecretString>,
    /// What goes with every request; `None` if the key is nothing that a header may hold.
    headers: Option<HeaderMap>,
    /// Looked up by its labels once.
    upstream_seconds: Arc<OnceLock<Histogram>>,
    first_byte_timeout: Duration,
    idle_timeout: Duration,
}

/// An answer on its way, read piece by piece. Without its head, whose headers would keep the whole buffer
/// that it was read into for as long as a stream is open.
#[derive(Debug)]
pub struct AnswerStream {
    body: Body,
    idle_timeout: Duration,
}

impl OpenAi {
    pub fn new(client: Client, config: &config::Provider) -> Self {
        let mut chat_url = config.base_url.clone();
        chat_url.set_path(&format!("{}/chat/completions", config.base_url.path().trim_end_matches('/')));
        Self {
            name: config.name.clone(),
            client,
            chat_url,
            headers: headers(config.api_key.as_ref()),
            upstream_seconds: Arc::default(),
            api_key: config.api_key.clone(),
            first_byte_timeout: config.first_byte_timeout,
            idle_timeout: config.idle_timeout,
        }
    }

    /// Asks for a whole answer.
    pub async fn chat(&self, body: Bytes) -> Result<Bytes, UpstreamError> {
        let (_, mut answer) = self.send(body).await?;
        let mut whole = BytesMut::new();
        while let Some(piece) = answer.next().await? {
            if whole.len() + piece.len() > MAX_ANSWER_BYTES {
                return Err(UpstreamError::Nonsense);
            }
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }

    /// Asks for a stream of events.
    pub async fn chat_stream(&self, body: Bytes) -> Result<AnswerStream, UpstreamError> {
        let (headers, answer) = self.send(body).await?;
        let content_type = headers.get(CONTENT_TYPE);
        let is_stream = content_type.is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        if is_stream { Ok(answer) } else { Err(UpstreamError::Nonsense) }
    }

    async fn send(&self, body: Bytes) -> Result<(HeaderMap, AnswerStream), UpstreamError> {
        let headers = self.headers.clone().ok_or(UpstreamError::Unreachable)?;
        let request = self.client.post(self.chat_url.clone()).headers(headers).body(body).send();
        let sent = Instant::now();
        let response = tokio::time::timeout(self.first_byte_timeout, request).await;
        let seconds = self
            .upstream_seconds
            .get_or_init(|| metrics::histogram!("farebox_upstream_seconds", "provider" => self.name.clone()));
        seconds.record(sent.elapsed());
        let mut response = match response {
            Err(_) => return Err(UpstreamError::Silent),
            Ok(Err(error)) => return Err(transport_error(&error)),
            Ok(Ok(response)) => response,
        };
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let answer = AnswerStream { body: response.into(), idle_timeout: self.idle_timeout };
        if status == StatusCode::OK {
            return Ok((headers, answer));
        }
        Err(self.refusal(status, &headers, answer).await)
    }

    /// What a status other than 200 means to the client.
    async fn refusal(
        &self,
        status: StatusCode,
        headers: &HeaderMap,
        mut answer: AnswerStream,
    ) -> UpstreamError {
        let retry_after = headers.get(RETRY_AFTER);
        let retry_after = retry_after.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut body = BytesMut::new();
        while body.len() < MAX_ERROR_BYTES
            && let Ok(Some(piece)) = answer.next().await
        {
            body.extend_from_slice(&piece);
        }
        let error = serde_json::from_slice::<ErrorBody>(&body).ok().and_then(|body| body.error);
        let code = error.as_ref().and_then(|error| error.code.as_ref()).and_then(|code| code.as_str());
        match status.as_u16() {
            // Our account there is empty: that is no limit the client can wait out.
            429 if code == Some("insufficient_quota") => UpstreamError::Refused { status: 429 },
            429 => UpstreamError::RateLimited { retry_after },
            status @ (400 | 413 | 422) => {
                let message = error.and_then(|error| error.message);
                let message = message.unwrap_or_else(|| "the provider found the request invalid".into());
                UpstreamError::BadRequest { status, message: self.without_secrets(&message) }
            }
            status => UpstreamError::Refused { status },
        }
    }

    fn without_secrets(&self, message: &str) -> String {
        let message: String = message.chars().take(MAX_MESSAGE_CHARS).collect();
        match &self.api_key {
            Some(key) => message.replace(key.expose_secret(), "[key]"),
            None => message,
        }
    }
}

impl AnswerStream {
    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, UpstreamError> {
        loop {
            let frame = tokio::time::timeout(self.idle_timeout, self.body.frame()).await;
            match frame.map_err(|_| UpstreamError::Silent)? {
                None => return Ok(None),
                Some(Err(_)) => return Err(UpstreamError::BrokeOff),
                // What is no data is a trailer.
                Some(Ok(frame)) => {
                    if let Ok(piece) = frame.into_data() {
                        return Ok(Some(piece));
                    }
                }
            }
        }
    }
}

fn headers(api_key: Option<&SecretString>) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(key) = api_key {
        let mut bearer = HeaderValue::try_from(format!("Bearer {}", key.expose_secret())).ok()?;
        bearer.set_sensitive(true);
        headers.insert(AUTHORIZATION, bearer);
    }
    Some(headers)
}

fn transport_error(error: &reqwest::Error) -> UpstreamError {
    if error.is_timeout() { UpstreamError::Silent } else { UpstreamError::Unreachable }
}

#[derive(Deserialize)]
struct ErrorBody {
    error: Option<ErrorMember>,
}

#[derive(Deserialize)]
struct ErrorMember {
    message: Option<String>,
    code: Option<serde_json::Value>,
}
