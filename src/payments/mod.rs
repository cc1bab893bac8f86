//! Payments: from a signed USDC authorization to a credit in the ledger, once.
//!
//! A payment is verified, written down, signed for by the relayer, broadcast, and credited from the
//! chain's own logs. Every step is in the database before the next one needs it, so whoever picks a
//! payment up, after a crash or on another node, goes on from where it stands.

mod deposits;
mod facilitator;
mod finality;
mod relayers;
mod settle;
mod store;
mod verify;
pub mod wire;
mod withdrawals;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use alloy::primitives::U256;
use tokio::sync::{Semaphore, watch};

use crate::chain::{Authorization, Chain, ChainError, SignedTx, TokenCheckError};
use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::db::{Db, DbError, DbTx};
use crate::id::Wallet;
use crate::ledger::{Ledger, LedgerError};
use crate::money::MicroUsdc;
use crate::tasks::Tasks;
use facilitator::{Facilitation, Facilitator};
use wire::{Payload, Reason};

/// How long a request waits for its settlement; then it is told that it is pending.
pub const SETTLEMENT_WAIT: Duration = Duration::from_secs(15);
/// How often unfinished payments are picked up, and credited ones looked at for finality.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// Payments looked at in one sweep.
const SWEEP_LIMIT: i64 = 500;
/// Verifications at once; more are told to come back.
const MAX_ADMISSIONS: usize = 64;
/// Payments moved at once; more wait for their turn.
const MAX_STEPS: usize = 32;
/// Of those that have been under way for a while.
const MAX_LATE_STEPS: usize = 8;
/// How long a payment may take to be verified: it asks the chain several times.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(30);
/// So long a payer's name for a payment is remembered: as long as answers are kept.
const IDENTIFIER_SECONDS: i64 = 86_400;
/// A payment unfinished for longer than this is worth an operator's look.
const SLOW_SECONDS: i64 = 600;
/// And a withdrawal that is sent and not final for longer than this: finality takes some twenty minutes on Base.
const SLOW_FINALITY_SECONDS: i64 = 3600;

pub use deposits::all_in_suspense;
pub use withdrawals::{WithdrawalError, all_withdrawals};

/// What a row of the journal is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// An authorization that its payer has sent us.
    Authorization,
    /// A transfer that has arrived, and is final, without one that we knew of.
    Deposit,
    /// An authorization of the treasury's, to a wallet that takes out of its balance.
    Withdrawal,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Authorization, Self::Deposit, Self::Withdrawal];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Authorization => "authorization",
            Self::Deposit => "deposit",
            Self::Withdrawal => "withdrawal",
        }
    }
}

impl std::str::FromStr for Kind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or(())
    }
}

/// One signed authorization, of a payer's or of the treasury's, or one deposit, and where it stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Payment {
    pub id: i64,
    pub chain_id: u64,
    pub asset: Wallet,
    pub kind: Kind,
    /// Of a deposit its transfer: there are no times in it, and where no authorization was used, no nonce that
    /// anybody signed.
    pub authorization: Authorization,
    pub value: MicroUsdc,
    pub signature: Vec<u8>,
    pub state: State,
    /// The head when it was verified.
    pub seen_block: i64,
    pub tx_hash: Option<String>,
    pub block_number: Option<i64>,
    pub block_hash: Option<String>,
    /// Of the token's `Transfer`, in that block.
    pub log_index: Option<i64>,
    /// The request it was made for; `None` for a top-up.
    pub request_hash: Option<String>,
    /// Whom the operator has given a deposit to, where that is not its sender.
    pub beneficiary: Option<Wallet>,
    pub last_error: Option<String>,
    pub facilitation: Facilitation,
    pub created_at: Timestamp,
    /// When it was moved last.
    pub updated_at: Timestamp,
}

impl Payment {
    /// The wallet that is credited with it, or whose balance it leaves.
    pub fn wallet(&self) -> Wallet {
        match self.kind {
            Kind::Withdrawal => self.authorization.to,
            Kind::Authorization | Kind::Deposit => self.beneficiary.unwrap_or(self.authorization.from),
        }
    }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum State {
    Verified,
    Signed,
    Broadcast,
    Mined,
    Credited,
    Finalized,
    Expired,
    Cancelled,
    Reorged,
}

impl Payment {
    /// The network as CAIP-2 spells it.
    pub fn network(&self) -> String {
        format!("eip155:{}", self.chain_id)
    }
}

impl State {
    pub const ALL: [Self; 9] = [
        Self::Verified,
        Self::Signed,
        Self::Broadcast,
        Self::Mined,
        Self::Credited,
        Self::Finalized,
        Self::Expired,
        Self::Cancelled,
        Self::Reorged,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Verified => "verified",
            Self::Signed => "signed",
            Self::Broadcast => "broadcast",
            Self::Mined => "mined",
            Self::Credited => "credited",
            Self::Finalized => "finalized",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Reorged => "reorged",
        }
    }

    /// The word for it in the public API.
    pub fn status(self) -> &'static str {
        match self {
            Self::Verified | Self::Signed | Self::Broadcast | Self::Mined => "pending",
            Self::Credited => "credited",
            Self::Finalized => "finalized",
            Self::Expired | Self::Cancelled => "failed",
            Self::Reorged => "reversed",
        }
    }

    pub fn is_credited(self) -> bool {
        matches!(self, Self::Credited | Self::Finalized)
    }
}

impl std::str::FromStr for State {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or(())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PaymentError {
    /// The payer must change something: a reason that programs read and a sentence that people do.
    #[error("{}: {sentence}", reason.code())]
    Refused { reason: Reason, sentence: String },
    #[error("this wallet has as many unfinished payments as it may: let them finish first")]
    TooManyUnfinished,
    /// Each was sent at our expense and brought nothing.
    #[error("too many payments of this wallet came to nothing today: try again tomorrow")]
    TooManyFailed,
    /// With no amount asked for, the authorised value must lie within the bounds.
    #[error("the authorised value is outside of what is taken")]
    OutOfBounds,
    /// One payment buys one request, and this one was made for another, or for a top-up.
    #[error("this payment was made for another request, or for none")]
    MadeForAnother,
    /// The payer has given this payment a name that another payment of its has, for something else.
    #[error("this payment identifier was sent with another request before")]
    IdentifierReused,
    /// The payment may be in the journal, and then it goes on by itself: another must not be signed.
    #[error("what became of the payment is not known at the moment: {0}")]
    Uncertain(String),
    /// Nothing was taken; the same payment can be sent again.
    #[error("payments are not possible at the moment: {0}")]
    Unavailable(String),
    #[error(transparent)]
    Db(#[from] DbError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl PaymentError {
    /// What went wrong on our side once a payment had been sent here must not make anybody sign another:
    /// this one may be in the journal.
    pub fn once_sent(self) -> Self {
        match self {
            Self::Db(cause) => Self::Uncertain(cause.to_string()),
            Self::Ledger(cause) => Self::Uncertain(cause.to_string()),
            other => other,
        }
    }
}

impl From<ChainError> for PaymentError {
    fn from(error: ChainError) -> Self {
        Self::Unavailable(error.to_string())
    }
}

fn refused(reason: Reason, sentence: impl Into<String>) -> PaymentError {
    PaymentError::Refused { reason, sentence: sentence.into() }
}

/// What is known of the link to the chain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ChainHealth {
    Unchecked,
    Ok,
    Unreachable(String),
    /// The token is not what the configuration says: no retry mends that.
    Mismatch(String),
}

/// What a relayer has left to pay for gas.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RelayerGas {
    pub relayer: Wallet,
    pub wei: U256,
    /// It would not pay for many more transfers at the present fee.
    pub is_low: bool,
}

/// The payments part of the gateway. Cheap to clone.
#[derive(Clone)]
pub struct Payments(Arc<Parts>);

struct Parts {
    db: Db,
    ledger: Ledger,
    chain: Arc<Chain>,
    config: config::Payments,
    clock: Clock,
    tasks: Tasks,
    health: Mutex<ChainHealth>,
    gas: Mutex<Vec<RelayerGas>>,
    facilitator: Option<Facilitator>,
    /// Set once the chain and the token were seen to be what is configured.
    token_checked: AtomicBool,
    /// Verifications at once: each costs several calls to the chain, and comes from anybody.
    admissions: Semaphore,
    /// Steps of payments at once.
    steps: Semaphore,
    late_steps: Semaphore,
    /// Payments being driven by this process; the value is true when one is at rest, and while it was
    /// refused by a facilitator.
    driven: Mutex<HashMap<i64, watch::Receiver<bool>>>,
}

impl Payments {
    pub fn new(
        db: Db,
        ledger: Ledger,
        config: config::Payments,
        clock: Clock,
        tasks: Tasks,
    ) -> Result<Self, ChainError> {
        let chain = Arc::new(Chain::new(&config, clock.clone())?);
        let facilitator = config.facilitator.as_ref().map(Facilitator::new).transpose()?;
        Ok(Self(Arc::new(Parts {
            db,
            ledger,
            chain,
            config,
            clock,
            tasks,
            health: Mutex::new(ChainHealth::Unchecked),
            gas: Mutex::default(),
            facilitator,
            token_checked: AtomicBool::new(false),
            admissions: Semaphore::new(MAX_ADMISSIONS),
            steps: Semaphore::new(MAX_STEPS),
            late_steps: Semaphore::new(MAX_LATE_STEPS),
            driven: Mutex::default(),
        })))
    }

    pub fn config(&self) -> &config::Payments {
        &self.0.config
    }

    pub fn chain(&self) -> &Arc<Chain> {
        &self.0.chain
    }

    /// Looks at the chain, and at its token until that has been seen right once.
    pub async fn check_chain(&self) -> ChainHealth {
        let checked = if self.is_token_checked() {
            if let Err(error @ TokenCheckError::Mismatch(_)) = self.0.chain.check_endpoints().await {
                tracing::error!(%error, "an RPC endpoint is not used");
            }
            self.0.chain.head().await.map(drop).map_err(TokenCheckError::from)
        } else {
            self.0.chain.check_token().await
        };
        let health = match checked {
            Ok(()) => {
                self.0.token_checked.store(true, Ordering::Release);
                ChainHealth::Ok
            }
            Err(TokenCheckError::Chain(error)) => ChainHealth::Unreachable(error.to_string()),
            Err(TokenCheckError::Mismatch(mismatch)) => ChainHealth::Mismatch(mismatch.to_string()),
        };
        *unpoisoned(&self.0.health) = health.clone();
        health
    }

    fn is_token_checked(&self) -> bool {
        self.0.token_checked.load(Ordering::Acquire)
    }

    /// What the last look at the chain found.
    pub fn health(&self) -> ChainHealth {
        unpoisoned(&self.0.health).clone()
    }

    /// Takes a payment: verifies it, settles it on the chain, credits its payer.
    ///
    /// Returns when the payment is at rest, or still pending after [`SETTLEMENT_WAIT`]. The same
    /// payment at the same time or later is the same payment.
    pub async fn pay(&self, payload: &Payload, amount: Option<MicroUsdc>) -> Result<Payment, PaymentError> {
        let id = self.accept(payload, amount).await?;
        self.follow(id).await.map_err(|error| PaymentError::Uncertain(error.to_string()))
    }

    /// Takes a payment that comes with the request it is made for, and is good for no other. `known` is
    /// what [`Self::recognise`] has found.
    pub async fn pay_for(
        &self,
        payload: &Payload,
        request_hash: &str,
        known: Option<Payment>,
    ) -> Result<Payment, PaymentError> {
        let id = match known {
            Some(known) => {
                self.look_again(&known).await?;
                known.id
            }
            None => {
                let value = self.value_within(payload, self.0.config.min_inline)?;
                self.admit_in_time(payload, value, Some(request_hash)).await?
            }
        };
        self.follow(id).await.map_err(|error| PaymentError::Uncertain(error.to_string()))
    }

    async fn admit_in_time(
        &self,
        payload: &Payload,
        value: MicroUsdc,
        request_hash: Option<&str>,
    ) -> Result<i64, PaymentError> {
        let admitted = tokio::time::timeout(ADMISSION_TIMEOUT, self.admit(payload, value, request_hash));
        let late = || PaymentError::Uncertain("verifying the payment took too long".into());
        admitted.await.unwrap_or_else(|_| Err(late()))
    }

    /// The payment that this one is: the same, sent again, or the first that its payer has given this
    /// name. `None` for one that is new, which is then seen to be on our terms. It must be for the same
    /// request, or both for none.
    pub async fn recognise(
        &self,
        payload: &Payload,
        request_hash: Option<&str>,
    ) -> Result<Option<Payment>, PaymentError> {
        if let Some(known) = self.find(payload).await? {
            // On the terms of its day, and signed to the satisfaction of that day.
            self.check_made_for(payload, &known, request_hash).await?;
            return Ok(Some(known));
        }
        self.check_terms(payload)?;
        if payload.identifier.is_none() {
            return Ok(None);
        }
        // Nobody else is told of what a payer has sent.
        self.check_payer(payload).await?;
        self.named_before(payload, request_hash).await
    }

    /// The first payment of a name, of a payload that is known to be its payer's.
    async fn named_before(
        &self,
        payload: &Payload,
        request_hash: Option<&str>,
    ) -> Result<Option<Payment>, PaymentError> {
        if payload.identifier.is_none() {
            return Ok(None);
        }
        let mut tx = self.0.db.snapshot().await?;
        let first = self.first_named(&mut tx, payload).await?;
        drop(tx);
        let Some(first) = first else { return Ok(None) };
        let authorization = &payload.authorization;
        if self.0.chain.is_nonce_used(authorization.from, authorization.nonce).await? {
            // Somebody has carried this one out: its money is a payment of its own, whatever its name.
            return Ok(None);
        }
        same_request(payload, &first, request_hash)?;
        Ok(Some(first))
    }

    /// Checks that a payment is its payer's, before anything is told of that wallet.
    pub async fn check_payer(&self, payload: &Payload) -> Result<(), PaymentError> {
        if self.is_signed_by_key(payload) {
            return Ok(());
        }
        // What a contract says of it costs calls to the chain, and anybody can make us ask.
        let _place = self.place_to_verify().await?;
        self.check_signature(payload).await?;
        let authorization = &payload.authorization;
        let hash = authorization.signing_hash(self.0.chain.domain());
        if self.0.chain.is_valid_signature(authorization.from, hash, &payload.signature).await? {
            return Ok(());
        }
        Err(refused(
            Reason::InvalidSignature,
            "the wallet's contract does not take the signature for its own",
        ))
    }

    /// Whether the key of its payer's address has signed it.
    fn is_signed_by_key(&self, payload: &Payload) -> bool {
        let hash = payload.authorization.signing_hash(self.0.chain.domain());
        crate::chain::recover(hash, &payload.signature) == Some(payload.authorization.from.0)
    }

    /// Verifies a payment and writes it down, unless it is known; returns its id. Nothing is sent yet.
    ///
    /// With `amount` given the authorised value must equal it, else it must lie within the
    /// configured bounds.
    pub async fn accept(&self, payload: &Payload, amount: Option<MicroUsdc>) -> Result<i64, PaymentError> {
        let known = self.recognise(payload, None).await?;
        self.check_amount(payload, amount)?;
        match known {
            Some(known) => {
                self.look_again(&known).await?;
                Ok(known.id)
            }
            None => {
                let value = self.value_within(payload, self.0.config.min_topup)?;
                self.admit_in_time(payload, value, None).await
            }
        }
    }

    /// A wallet's payments, newest first, older than `before`.
    pub async fn of_wallet(
        &self,
        wallet: Wallet,
        before: Option<i64>,
        limit: i64,
    ) -> Result<Vec<Payment>, PaymentError> {
        Ok(store::of_wallet(&self.0.db, wallet, before, limit).await?)
    }

    /// Keeps the chain checked, unfinished payments moving, credited ones finalized, and deposits looked for.
    pub async fn run(&self) {
        // A search over a long past must not hold up payments.
        tokio::join!(self.keep_moving(), self.keep_looking());
    }

    async fn keep_looking(&self) {
        if self.0.config.deposits.is_none() {
            return;
        }
        loop {
            if self.is_token_checked()
                && let Err(error) = self.look_for_deposits().await
            {
                tracing::warn!(%error, "looking for deposits failed; it is tried again");
            }
            tokio::time::sleep(SWEEP_EVERY).await;
        }
    }

    async fn keep_moving(&self) {
        loop {
            self.check_chain().await;
            // Nothing is done on a chain, or with a token, that was never seen to be the right one.
            if self.is_token_checked() {
                let swept = match self.pick_up().await {
                    Ok(()) => self.upkeep().await,
                    failed => failed,
                };
                if let Err(error) = swept {
                    tracing::warn!(%error, "sweeping payments failed; it is tried again");
                }
            }
            tokio::time::sleep(SWEEP_EVERY).await;
        }
    }

    /// Drives payments that nobody drives: those that a process which is no more has left.
    async fn pick_up(&self) -> Result<(), PaymentError> {
        let mut last = 0;
        loop {
            let page =
                store::unfinished(&self.0.db, self.chain_id(), self.asset(), last, SWEEP_LIMIT).await?;
            let Some(id) = page.last() else { return Ok(()) };
            last = *id;
            for id in page {
                self.drive(id);
            }
        }
    }

    /// Keeps the relayers' transactions moving, and follows credited payments until they are final.
    pub async fn upkeep(&self) -> Result<(), PaymentError> {
        let tended = self.tend_relayers().await;
        self.follow_to_finality().await?;
        tended
    }

    /// What the relayers had left when that was last looked at.
    pub fn gas(&self) -> Vec<RelayerGas> {
        unpoisoned(&self.0.gas).clone()
    }

    /// Payments by state, for the metrics.
    pub async fn count_by_state(&self) -> Result<Vec<(String, i64)>, PaymentError> {
        Ok(store::count_by_state(&self.0.db).await?)
    }

    /// How many payments have been unfinished for longer than they should.
    pub async fn slow(&self) -> Result<i64, PaymentError> {
        let since = |seconds: i64| self.0.clock.now().plus_seconds(-seconds);
        Ok(store::unfinished_since(&self.0.db, since(SLOW_SECONDS), since(SLOW_FINALITY_SECONDS)).await?)
    }

    /// The first payment of a name, while it is remembered or not at rest.
    async fn first_named(&self, tx: &mut DbTx, payload: &Payload) -> Result<Option<Payment>, DbError> {
        let Some(identifier) = &payload.identifier else { return Ok(None) };
        let since = self.0.clock.now().plus_seconds(-IDENTIFIER_SECONDS);
        store::first_named(tx, payload.authorization.from, identifier, since).await
    }

    async fn find(&self, payload: &Payload) -> Result<Option<Payment>, PaymentError> {
        let (from, nonce) = (payload.authorization.from, payload.authorization.nonce);
        Ok(store::find(&self.0.db, self.chain_id(), self.asset(), from, nonce).await?)
    }

    /// Whether `payload` is the payment we know under its nonce.
    async fn same_payment(&self, payload: &Payload, known: &Payment) -> Result<(), PaymentError> {
        let (sent, known_as) = (&payload.authorization, &known.authorization);
        let is_same = match known.kind {
            // A wallet may sign the same authorization in more than one way.
            Kind::Authorization => {
                sent == known_as && (payload.signature == known.signature || self.is_signed_by_key(payload))
            }
            // Carried out before it was sent to us. A nonce is used once, so of those that the payer has signed
            // with this one it is the one.
            Kind::Deposit => {
                let is_like = (sent.from, sent.to, sent.value, sent.nonce)
                    == (known_as.from, known_as.to, known_as.value, known_as.nonce)
                    // Otherwise it is not the payer's any more.
                    && known.beneficiary.is_none();
                if is_like {
                    self.check_payer(payload).await?;
                }
                is_like
            }
            // Of the treasury's own, which pays nothing in.
            Kind::Withdrawal => false,
        };
        if is_same {
            return Ok(());
        }
        Err(refused(
            Reason::NonceAlreadyUsed,
            "another authorization with this nonce was sent before: sign a new one with a fresh nonce",
        ))
    }

    fn chain_id(&self) -> i64 {
        i64::try_from(self.0.config.chain_id).unwrap_or(i64::MAX)
    }

    fn asset(&self) -> Wallet {
        self.0.config.token.address
    }
}

/// The first payment of a name stands for all that are sent under it, if they are for the same.
fn same_request(payload: &Payload, first: &Payment, request_hash: Option<&str>) -> Result<(), PaymentError> {
    // What is the same top-up only its amount can tell.
    let same_value = request_hash.is_some() || payload.value() == Some(first.value);
    if first.request_hash.as_deref() == request_hash && same_value {
        return Ok(());
    }
    Err(PaymentError::IdentifierReused)
}

/// What the locks here guard is whole at every instant, so a panic elsewhere does not spoil it.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The journal as the operator sees it, without a chain.
pub struct Journal {
    db: Db,
    clock: Clock,
}

impl Journal {
    pub fn new(db: Db, clock: Clock) -> Self {
        Self { db, clock }
    }

    /// Payments, newest first, of one state or of all.
    pub async fn list(&self, state: Option<State>, limit: i64) -> Result<Vec<Payment>, DbError> {
        store::newest(&self.db, state, limit).await
    }

    /// A payment and the transactions signed for it.
    pub async fn show(&self, id: i64) -> Result<Option<(Payment, Vec<SignedTx>)>, DbError> {
        let Some(payment) = store::get(&self.db, id).await? else { return Ok(None) };
        Ok(Some((payment, store::transactions(&self.db, id).await?)))
    }

    /// Has a payment that ended without its transfer looked at again; whether it is such a one. What a withdrawal
    /// was to take is its wallet's again by then.
    pub async fn retry(&self, id: i64) -> Result<bool, DbError> {
        if store::get(&self.db, id).await?.is_some_and(|payment| payment.kind == Kind::Withdrawal) {
            return Ok(false);
        }
        let mut tx = self.db.begin().await?;
        let why = Some("the operator asked for another look");
        for ended in [State::Expired, State::Cancelled] {
            if store::advance(&mut tx, id, ended, State::Verified, why, self.clock.now()).await? {
                tx.commit().await?;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Every payment that is credited, for comparing the books with the chain.
pub async fn all_credited(tx: &mut crate::db::DbTx) -> Result<Vec<Payment>, DbError> {
    store::all_credited(tx).await
}
