//! The gateway's parts, built and held together.

use std::sync::Arc;

use crate::attest::{AttestError, Attestor};
use crate::auth::{Keys, Nonces, Sessions, SigningKey, Siwe};
use crate::claims::KeptAnswers;
use crate::clock::Clock;
use crate::config::Config;
use crate::db::{Access, Db, DbError};
use crate::id::Entropy;
use crate::ledger::{LEASE_RENEWAL, Ledger, LedgerError};
use crate::limits::{EXCHANGE_EVERY, Exchange, Limits};
use crate::metering::Metering;
use crate::payments::{ChainHealth, Payments};
use crate::pricing::{LiveCatalog, PriceVersion};
use crate::providers::Providers;
use crate::tasks::Tasks;

/// How often gauges are brought up to date and stale nonces forgotten.
const HOUSEKEEPING: std::time::Duration = std::time::Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("opening the database: {0}")]
    Db(#[from] DbError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Chain(#[from] crate::chain::ChainError),
    #[error("{0}")]
    TokenMismatch(String),
    #[error(transparent)]
    Attest(#[from] AttestError),
    #[error("building the HTTP client: {0}")]
    Client(#[from] reqwest::Error),
}

/// Everything a request handler can ask for. Cheap to clone.
#[derive(Clone)]
pub struct App(Arc<Parts>);

pub struct Parts {
    pub config: Config,
    pub clock: Clock,
    pub entropy: Entropy,
    pub tasks: Tasks,
    pub db: Db,
    pub ledger: Ledger,
    pub payments: Payments,
    pub siwe: Siwe,
    pub nonces: Nonces,
    pub sessions: Sessions,
    pub keys: Keys,
    pub kept: KeptAnswers,
    pub attestor: Attestor,
    pub metering: Metering,
    pub limits: Limits,
    /// What is for sale now. `config.catalog` is what it began with.
    pub catalog: LiveCatalog,
}

impl std::ops::Deref for App {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl App {
    /// Builds the gateway. The database must be there; the chain need not.
    pub async fn start(config: Config, clock: Clock) -> Result<Self, StartError> {
        crate::install_crypto();
        let entropy = Entropy;
        let tasks = Tasks::default();
        let db = Db::open(&config.database_url, Access::Serve).await?;
        let node = hex::encode(entropy.bytes::<8>());
        let ledger = Ledger::new(db.clone(), clock.clone(), node);
        ledger.renew_lease().await?;
        let payments =
            Payments::new(db.clone(), ledger.clone(), config.payments.clone(), clock.clone(), tasks.clone())?;
        if let ChainHealth::Mismatch(why) = payments.check_chain().await {
            return Err(StartError::TokenMismatch(why));
        }
        let providers = Providers::new(&config.providers)?;
        let kept = KeptAnswers::new(db.clone(), clock.clone());
        let limits = Limits::new(config.limits.rates, clock.clone());
        let metering = Metering::new(
            ledger.clone(),
            kept.clone(),
            providers,
            clock.clone(),
            tasks.clone(),
            config.markup,
            limits.clone(),
        );
        let secret = config.auth.session_secret.as_ref();
        let signing = SigningKey::load(&db, &entropy, clock.now(), secret).await?;
        let nonces = Nonces::new(&signing, clock.clone(), entropy.clone());
        let chain = Arc::clone(payments.chain());
        let siwe = Siwe::new(db.clone(), clock.clone(), &config.auth, chain, nonces.clone());
        let sessions = Sessions::new(db.clone(), clock.clone(), entropy.clone(), signing, &config);
        let keys = Keys::new(db.clone(), clock.clone(), entropy.clone(), config.limits.keys_per_wallet);
        let receipt_key = config.receipt_key.as_ref();
        let attestor =
            Attestor::load(&db, &entropy, clock.now(), receipt_key, config.payments.chain_id).await?;
        tracing::info!(signer = %attestor.signer(), "receipts are signed by this key");
        let catalog = LiveCatalog::new(config.catalog.clone());
        tracing::info!(prices = %config.catalog.version(), "the catalogue is served");
        let app = Self(Arc::new(Parts {
            catalog,
            config,
            clock,
            entropy,
            tasks,
            db,
            ledger,
            payments,
            siwe,
            nonces,
            sessions,
            keys,
            kept,
            attestor,
            metering,
            limits,
        }));
        app.run_services();
        Ok(app)
    }

    /// Sells what another configuration lists, from the next request on, and says what its prices are called
    /// by. All else of it is read at start: an offer needs a provider that there is.
    pub fn reload(&self, config: &Config) -> Result<PriceVersion, String> {
        let unknown = config.catalog.iter().find(|offer| self.config.provider(&offer.provider).is_none());
        if let Some(offer) = unknown {
            return Err(format!("{} needs provider {}, which needs a restart", offer.id, offer.provider));
        }
        if config.markup != self.config.markup {
            tracing::warn!("another markup needs a restart; only the models are read again");
        }
        self.catalog.replace(config.catalog.clone());
        Ok(config.catalog.version())
    }

    fn run_services(&self) {
        let db = self.db.clone();
        self.tasks.spawn_service(async move { db.keep_checkpointed().await });
        let app = self.clone();
        self.tasks.spawn_service(async move { app.payments.run().await });
        let app = self.clone();
        self.tasks.spawn_service(async move { app.payments.watch_facilitator().await });
        let app = self.clone();
        self.tasks.spawn_service(async move {
            loop {
                if let Err(error) = app.ledger.renew_lease().await {
                    tracing::warn!(%error, "renewing the lease failed; it is tried again");
                }
                tokio::time::sleep(LEASE_RENEWAL).await;
            }
        });
        let app = self.clone();
        self.tasks.spawn_service(async move {
            loop {
                match app.ledger.sweep().await {
                    Ok(0) => {}
                    Ok(released) => tracing::warn!(released, "released holds of a gateway that is no more"),
                    Err(error) => tracing::warn!(%error, "sweeping holds failed; it is tried again"),
                }
                tokio::time::sleep(LEASE_RENEWAL).await;
            }
        });
        // Where only one process can serve, there is nobody to tell.
        if !self.db.is_exclusive() {
            let mut exchange = Exchange::new(
                self.limits.clone(),
                self.db.clone(),
                self.clock.clone(),
                self.ledger.node().to_owned(),
            );
            self.tasks.spawn_service(async move {
                loop {
                    if let Err(error) = exchange.round().await {
                        tracing::warn!(%error, "telling other nodes of requests failed; it is tried again");
                    }
                    tokio::time::sleep(EXCHANGE_EVERY).await;
                }
            });
        }
        let app = self.clone();
        self.tasks.spawn_service(async move {
            loop {
                app.keep_house().await;
                tokio::time::sleep(HOUSEKEEPING).await;
            }
        });
    }

    async fn keep_house(&self) {
        if let Err(error) = self.siwe.forget_stale().await {
            tracing::warn!(%error, "forgetting stale nonces failed; it is tried again");
        }
        if let Err(error) = self.kept.forget_old().await {
            tracing::warn!(%error, "forgetting old answers failed; it is tried again");
        }
        if let Err(error) = Exchange::forget_old(&self.db, &self.clock).await {
            tracing::warn!(%error, "forgetting what nodes have told failed; it is tried again");
        }
        if let Err(error) = self.sessions.forget_stale().await {
            tracing::warn!(%error, "forgetting stale revocations failed; it is tried again");
        }
        if let Err(error) = self.attestor.refresh().await {
            tracing::warn!(%error, "reading the keys of receipts failed; it is tried again");
        }
        if let Err(error) = crate::telemetry::update_gauges(self).await {
            tracing::warn!(%error, "bringing the gauges up to date failed; it is tried again");
        }
    }

    /// Lets work finish, for as long as `grace`; what is left then ends at once, and is booked.
    pub async fn shut_down(&self, grace: std::time::Duration) {
        self.tasks.stop();
        if tokio::time::timeout(grace, self.tasks.idle()).await.is_err() {
            tracing::warn!("work is still under way; it ends now");
            self.tasks.abort();
            let _ = tokio::time::timeout(LAST_GRACE, self.tasks.idle()).await;
        }
        // Whoever asked for these may be gone, and they are on their way all the same.
        let _ = tokio::time::timeout(LAST_GRACE, self.ledger.idle()).await;
        if let Err(error) = self.ledger.drop_lease().await {
            tracing::warn!(%error, "the lease was not given back; it will run out");
        }
        self.db.close().await;
    }
}

/// For settling what was cut off.
const LAST_GRACE: std::time::Duration = std::time::Duration::from_secs(5);
