//! The upstreams that answers come from.

mod openai;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

pub use openai::{AnswerStream, OpenAi};

use crate::config;

/// Establishing a connection, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle connections kept to each upstream, so that a burst need not connect anew.
const IDLE_CONNECTIONS: usize = 256;

/// Why an upstream gave no answer, or no whole one. None of its text goes on to a client but the
/// message of a request it found wrong.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("the provider is rate-limiting this gateway")]
    RateLimited { retry_after: Option<String> },
    /// The request is at fault: the upstream's own 400, 413 or 422.
    #[error("{message}")]
    BadRequest { status: u16, message: String },
    #[error("the provider refused the request with status {status}")]
    Refused { status: u16 },
    #[error("the provider cannot be reached")]
    Unreachable,
    #[error("the provider sent what is no answer")]
    Nonsense,
    #[error("the provider's answer broke off")]
    BrokeOff,
    #[error("the provider did not answer in time")]
    Silent,
}

impl UpstreamError {
    /// A word for the receipt and the metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::RateLimited { .. } => "upstream_rate_limited",
            Self::BadRequest { .. } => "upstream_bad_request",
            Self::Refused { .. } => "upstream_refused",
            Self::Unreachable => "upstream_unreachable",
            Self::Nonsense => "upstream_nonsense",
            Self::BrokeOff => "upstream_broke_off",
            Self::Silent => "upstream_silent",
        }
    }
}

/// All configured upstreams, by name.
#[derive(Clone)]
pub struct Providers(Arc<HashMap<String, OpenAi>>);

impl Providers {
    pub fn new(configs: &[config::Provider]) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .tcp_nodelay(true)
            // A redirect could carry the key to somebody else.
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        let adapters =
            configs.iter().map(|config| (config.name.clone(), OpenAi::new(client.clone(), config)));
        Ok(Self(Arc::new(adapters.collect())))
    }

    pub fn get(&self, name: &str) -> Option<&OpenAi> {
        self.0.get(name)
    }
}
