//! One upstream: where it is, the keys it takes, and how it is asked.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use metrics::Histogram;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Body, Client, StatusCode, Url};
use secrecy::{ExposeSecret as _, SecretString};

use crate::config;
use crate::formats::conversation::UpstreamFormat;
use crate::formats::errors::{Refusal, read_refusal};
use crate::formats::exchange::UpstreamRequest;
use crate::providers::health::{Health, Moment, State};
use crate::providers::{Blame, UpstreamError};

/// Far above any answer; an upstream that sends more is broken.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Enough of an error's body to read its message.
const MAX_ERROR_BYTES: usize = 64 << 10;
const ERROR_TIMEOUT: Duration = Duration::from_secs(5);
/// As much of an upstream's message as goes on to the client.
const MAX_MESSAGE_CHARS: usize = 1000;
/// More paths than there are models are none of ours: their URLs are made each time.
const MAX_URLS: usize = 4096;

/// One upstream. Cheap to clone.
#[derive(Clone)]
pub struct Upstream(Arc<Parts>);

struct Parts {
    name: String,
    format: UpstreamFormat,
    client: Client,
    base_url: Url,
    /// By the path behind the base URL, put together once.
    urls: RwLock<HashMap<String, Url>>,
    /// At least one, of an upstream that takes none too.
    keys: Vec<Key>,
    /// Whose turn it is.
    next_key: AtomicUsize,
    health: Health,
    /// Looked up by its labels once.
    seconds: OnceLock<Histogram>,
    first_byte_timeout: Duration,
    idle_timeout: Duration,
    cooldown: Duration,
    failures_before_cooldown: u32,
}

struct Key {
    secret: Option<SecretString>,
    /// What goes with every request; `None` if the key is nothing that a header may hold.
    headers: Option<HeaderMap>,
    health: Health,
}

/// Leave to ask an upstream once, with one of its keys.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Turn(usize);

/// How an upstream or its best key fares.
pub type Readiness = State;

/// A whole answer.
pub struct Whole {
    /// What it says that it is.
    pub content_type: Option<String>,
    pub body: Bytes,
}

/// An answer on its way, read piece by piece. Without its head, whose headers would keep the whole buffer
/// that it was read into for as long as a stream is open.
#[derive(Debug)]
pub struct AnswerStream {
    body: Body,
    idle_timeout: Duration,
}

impl Upstream {
    pub fn new(client: Client, config: &config::Provider) -> Self {
        let key = |secret: Option<&SecretString>| Key {
            headers: headers(config.format, secret),
            secret: secret.cloned(),
            health: Health::default(),
        };
        let keys: Vec<_> = config.api_keys.iter().map(|secret| key(Some(secret))).collect();
        Self(Arc::new(Parts {
            name: config.name.clone(),
            format: config.format,
            client,
            base_url: config.base_url.clone(),
            urls: RwLock::default(),
            keys: if keys.is_empty() { vec![key(None)] } else { keys },
            next_key: AtomicUsize::new(0),
            health: Health::default(),
            seconds: OnceLock::new(),
            first_byte_timeout: config.first_byte_timeout,
            idle_timeout: config.idle_timeout,
            cooldown: config.cooldown,
            failures_before_cooldown: config.failures_before_cooldown,
        }))
    }

    /// The format that it is spoken to in.
    pub fn format(&self) -> UpstreamFormat {
        self.0.format
    }

    /// How it fares with the best of its keys.
    pub fn readiness(&self, now: Moment) -> Readiness {
        let states = self.0.keys.iter().map(|key| self.readiness_with(key, now));
        states.min().unwrap_or(State::Well)
    }

    fn readiness_with(&self, key: &Key, now: Moment) -> Readiness {
        self.0.health.state(now).max(key.health.state(now))
    }

    /// Leave to ask it with a key that was not used before: one that fares well or, where `cooling`, one that
    /// had better be left alone.
    pub fn turn(&self, now: Moment, cooling: bool, used: impl Fn(Turn) -> bool) -> Option<Turn> {
        let Parts { keys, health, cooldown, .. } = &*self.0;
        let first = if keys.len() > 1 { self.0.next_key.fetch_add(1, Ordering::Relaxed) } else { 0 };
        let wanted = if cooling { State::Cooling } else { State::Well };
        let mut in_turn = (0..keys.len()).map(|i| first.wrapping_add(i) % keys.len());
        let turn = in_turn.find(|i| self.readiness_with(&keys[*i], now) == wanted && !used(Turn(*i)))?;
        health.may_ask(now, *cooldown).then_some(Turn(turn))
    }

    /// Leave to ask it something that is nobody's request, where that is in nobody's way.
    pub fn turn_in_passing(&self, now: Moment) -> Option<Turn> {
        let Parts { keys, health, .. } = &*self.0;
        let key = keys.iter().position(|key| key.health.is_well(now));
        key.filter(|_| health.is_well(now)).map(Turn)
    }

    /// Notes that a turn came to an answer, right or wrong.
    pub fn answered(&self) {
        if self.0.health.answered() {
            tracing::info!(provider = %self.0.name, "a provider answers again");
        }
    }

    /// Notes that a turn came to what was asked for.
    pub fn succeeded(&self) {
        self.answered();
        self.0.health.succeeded();
    }

    /// Notes what came of a turn instead.
    pub fn failed(&self, turn: Turn, error: &UpstreamError, now: Moment) {
        let Parts { name, health, cooldown, failures_before_cooldown: most, .. } = &*self.0;
        let Some(key) = self.0.keys.get(turn.0) else { return };
        let blame = error.blames();
        let is_let_be = match blame {
            Blame::Request | Blame::Model => {
                self.answered();
                false
            }
            Blame::Pause(pause) => {
                self.answered();
                key.health.cool(now, pause);
                false
            }
            Blame::Key => {
                self.answered();
                key.health.cool(now, *cooldown);
                true
            }
            Blame::Upstream => {
                self.answered();
                let is_enough = health.erred() >= *most;
                if is_enough {
                    health.cool(now, *cooldown);
                }
                is_enough
            }
            Blame::Absence => {
                let is_enough = health.was_absent() >= *most;
                if is_enough {
                    health.open(now, *cooldown);
                }
                is_enough
            }
        };
        let labels = [("provider", name.clone()), ("reason", error.cause().to_owned())];
        metrics::counter!("farebox_upstream_failures_total", &labels).increment(1);
        if is_let_be {
            metrics::counter!("farebox_upstream_cooldowns_total", &labels).increment(1);
            tracing::warn!(
                provider = %name, key = turn.0, cause = error.cause(), cooldown_s = cooldown.as_secs(),
                "a provider, or this key to it, is let be for a while"
            );
        }
    }

    /// Asks for a whole answer.
    pub async fn whole(&self, turn: Turn, request: &UpstreamRequest) -> Result<Whole, UpstreamError> {
        let (headers, mut answer) = self.send(turn, request).await?;
        let mut whole = BytesMut::new();
        while let Some(piece) = answer.next().await? {
            if whole.len() + piece.len() > MAX_ANSWER_BYTES {
                return Err(UpstreamError::Nonsense);
            }
            whole.extend_from_slice(&piece);
        }
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(Whole { content_type, body: whole.freeze() })
    }

    /// Asks for a stream of events.
    pub async fn stream(&self, turn: Turn, request: &UpstreamRequest) -> Result<AnswerStream, UpstreamError> {
        let (headers, answer) = self.send(turn, request).await?;
        let content_type = headers.get(CONTENT_TYPE);
        let is_stream = content_type.is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        if is_stream { Ok(answer) } else { Err(UpstreamError::Nonsense) }
    }

    async fn send(
        &self,
        Turn(key): Turn,
        request: &UpstreamRequest,
    ) -> Result<(HeaderMap, AnswerStream), UpstreamError> {
        let key = self.0.keys.get(key).ok_or(UpstreamError::Unreachable)?;
        let mut headers = key.headers.clone().ok_or(UpstreamError::Unreachable)?;
        for (name, value) in &request.headers {
            let value = HeaderValue::try_from(value).map_err(|_| UpstreamError::Unreachable)?;
            headers.insert(HeaderName::from_static(name), value);
        }
        let url = self.url(&request.path);
        let sending = self.0.client.post(url).headers(headers).body(request.body.clone()).send();
        let sent = Instant::now();
        let response = tokio::time::timeout(self.0.first_byte_timeout, sending).await;
        let name = || metrics::histogram!("farebox_upstream_seconds", "provider" => self.0.name.clone());
        self.0.seconds.get_or_init(name).record(sent.elapsed());
        let mut response = match response {
            Err(_) => return Err(UpstreamError::Silent),
            Ok(Err(error)) => return Err(transport_error(&error)),
            Ok(Ok(response)) => response,
        };
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let answer = AnswerStream { body: response.into(), idle_timeout: self.0.idle_timeout };
        if status == StatusCode::OK {
            return Ok((headers, answer));
        }
        Err(refusal(request.format, key, status, &headers, answer).await)
    }

    /// Where a path behind the base URL is.
    fn url(&self, path: &str) -> Url {
        if let Some(url) = self.0.urls.read().unwrap_or_else(PoisonError::into_inner).get(path) {
            return url.clone();
        }
        let url = under(&self.0.base_url, path);
        let mut urls = self.0.urls.write().unwrap_or_else(PoisonError::into_inner);
        if urls.len() < MAX_URLS {
            urls.insert(path.to_owned(), url.clone());
        }
        url
    }
}

/// The URL of a path with its query. What the base URL has of a query stays: some take their version there.
fn under(base: &Url, path: &str) -> Url {
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    let mut url = base.clone();
    url.set_path(&format!("{}/{path}", base.path().trim_end_matches('/')));
    let queries: Vec<_> = base.query().into_iter().chain(query).collect();
    url.set_query((!queries.is_empty()).then(|| queries.join("&")).as_deref());
    url
}

/// What a status other than 200 means to the client.
async fn refusal(
    format: UpstreamFormat,
    key: &Key,
    status: StatusCode,
    headers: &HeaderMap,
    mut answer: AnswerStream,
) -> UpstreamError {
    let retry_after = headers.get(RETRY_AFTER);
    let retry_after = retry_after.and_then(|value| value.to_str().ok()).map(str::to_owned);
    let mut body = BytesMut::new();
    let read = async {
        while body.len() < MAX_ERROR_BYTES
            && let Ok(Some(piece)) = answer.next().await
        {
            body.extend_from_slice(&piece);
        }
    };
    // Of one that takes longer the status says enough.
    let _ = tokio::time::timeout(ERROR_TIMEOUT, read).await;
    let status = status.as_u16();
    match read_refusal(format, status, &body) {
        Refusal::RateLimited => UpstreamError::RateLimited { retry_after },
        Refusal::Exhausted => UpstreamError::Exhausted { status },
        Refusal::BadRequest { message } => {
            let message = message.unwrap_or_else(|| "the provider found the request invalid".into());
            UpstreamError::BadRequest { status, message: key.taken_out_of(&message) }
        }
        Refusal::Overloaded | Refusal::Refused => UpstreamError::Refused { status },
    }
}

impl Key {
    fn taken_out_of(&self, message: &str) -> String {
        let message = match &self.secret {
            Some(key) => message.replace(key.expose_secret(), "[key]"),
            None => message.to_owned(),
        };
        message.chars().take(MAX_MESSAGE_CHARS).collect()
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

fn headers(format: UpstreamFormat, key: Option<&SecretString>) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    for (name, value) in format.headers() {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    if let Some(key) = key {
        let (name, before) = format.key_header();
        let mut value = HeaderValue::try_from(format!("{before}{}", key.expose_secret())).ok()?;
        value.set_sensitive(true);
        headers.insert(HeaderName::from_static(name), value);
    }
    Some(headers)
}

fn transport_error(error: &reqwest::Error) -> UpstreamError {
    if error.is_connect() {
        UpstreamError::Unreachable
    } else if error.is_timeout() {
        UpstreamError::Silent
    } else {
        UpstreamError::BrokeOff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_put_under_the_base_url() {
        let at = |base: &str, path| under(&base.parse().unwrap(), path).to_string();
        assert_eq!(at("http://u/v1/", "responses"), "http://u/v1/responses");
        assert_eq!(at("http://u", "messages"), "http://u/messages");
        assert_eq!(
            at("http://u/v1beta", "models/g-2:streamGenerateContent?alt=sse"),
            "http://u/v1beta/models/g-2:streamGenerateContent?alt=sse"
        );
        assert_eq!(at("http://u/o?v=1", "chat/completions"), "http://u/o/chat/completions?v=1");
        assert_eq!(at("http://u/o?v=1", "m:s?alt=sse"), "http://u/o/m:s?v=1&alt=sse");
    }
}
