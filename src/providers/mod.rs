//! The upstreams that answers come from.

mod health;
mod upstream;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

pub use health::Moment;
pub use upstream::{AnswerStream, Readiness, Turn, Upstream, Whole};

use crate::config;

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
    /// Our account there is empty.
    #[error("the provider refused the request with status {status}")]
    Exhausted { status: u16 },
    #[error("the provider cannot be reached")]
    Unreachable,
    #[error("the provider sent what is no answer")]
    Nonsense,
    #[error("the provider's answer broke off")]
    BrokeOff,
    #[error("the provider did not answer in time")]
    Silent,
    /// It has failed so often that nobody asks it for a while.
    #[error("the model is not available at the moment")]
    Unavailable { retry_after: Duration },
}

/// Who is at fault where an upstream did not answer, which says whom to ask next.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Blame {
    /// Whoever is asked the same will say the same.
    Request,
    /// Another key may do: for so long this one is asked last.
    Pause(Duration),
    /// Another key may do: this one is refused.
    Key,
    /// This model there; the upstream is well.
    Model,
    /// It is there, and answers with errors, or not at all.
    Upstream,
    /// It is not there.
    Absence,
}

/// How long an upstream is let be that says nothing of how long it wants to be …
const PAUSE: Duration = Duration::from_secs(5);
/// … and at most, whatever it says.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

impl UpstreamError {
    /// A word for the receipt and the metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::RateLimited { .. } => "upstream_rate_limited",
            Self::BadRequest { .. } => "upstream_bad_request",
            // How full our account there is, is nothing to tell a client.
            Self::Refused { .. } | Self::Exhausted { .. } => "upstream_refused",
            Self::Unreachable => "upstream_unreachable",
            Self::Nonsense => "upstream_nonsense",
            Self::BrokeOff => "upstream_broke_off",
            Self::Silent => "upstream_silent",
            Self::Unavailable { .. } => "model_unavailable",
        }
    }

    /// The same for the operator.
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Exhausted { .. } => "account_exhausted",
            Self::Refused { status: 401 | 403 } => "key_refused",
            other => other.reason(),
        }
    }

    pub fn blames(&self) -> Blame {
        match self {
            Self::BadRequest { .. } => Blame::Request,
            Self::RateLimited { retry_after } => {
                let seconds = retry_after.as_deref().and_then(|text| text.trim().parse().ok());
                Blame::Pause(seconds.map_or(PAUSE, Duration::from_secs).min(LONGEST_PAUSE))
            }
            Self::Refused { status: 401 | 403 } | Self::Exhausted { .. } => Blame::Key,
            Self::Refused { status: 500.. } => Blame::Upstream,
            Self::Refused { .. } | Self::Unavailable { .. } => Blame::Model,
            // What was sent may be the reason that nothing came back.
            Self::Nonsense | Self::BrokeOff | Self::Silent => Blame::Upstream,
            Self::Unreachable => Blame::Absence,
        }
    }
}

/// All configured upstreams, by name. Cheap to clone.
#[derive(Clone)]
pub struct Providers(Arc<HashMap<String, Upstream>>);

impl Providers {
    pub fn new(configs: &[config::Provider]) -> Result<Self, reqwest::Error> {
        // A client holds its connections, and the time that one may take to be made; most share one.
        let mut clients: HashMap<Duration, reqwest::Client> = HashMap::new();
        let mut upstreams = HashMap::new();
        for config in configs {
            let client = match clients.get(&config.connect_timeout) {
                Some(client) => client.clone(),
                None => {
                    let client = client(config.connect_timeout)?;
                    clients.insert(config.connect_timeout, client.clone());
                    client
                }
            };
            upstreams.insert(config.name.clone(), Upstream::new(client, config));
        }
        Ok(Self(Arc::new(upstreams)))
    }

    pub fn get(&self, name: &str) -> Option<&Upstream> {
        self.0.get(name)
    }
}

fn client(connect_timeout: Duration) -> Result<reqwest::Client, reqwest::Error> {
    reqwest::Client::builder()
        .connect_timeout(connect_timeout)
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .tcp_nodelay(true)
        // A redirect could carry the key to somebody else.
        .redirect(reqwest::redirect::Policy::none())
        .build()
}
