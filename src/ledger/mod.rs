//! The books: balances, holds, settlements and receipts, on LEDGER's invariants.
//!
//! A **hold** locks the most a request can cost. It ends exactly once, *settled* at the real
//! charge or *released*, and its end deletes the hold's row and writes the receipt and the entry in
//! one transaction, so that no crash can leave half of it. `available = balance − locked`, and the
//! database itself refuses a balance below what is locked.
//!
//! Holds and ends of many requests go into the books together: see [`writer`].

mod batch;
mod store;
mod writer;

pub use store::read_receipt;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::Histogram;

use crate::claims::{Claim, Claimed};
use crate::clock::{Clock, Timestamp};
use crate::db::{Db, DbError, DbTx};
use crate::id::Wallet;
use crate::money::{MicroUsdc, PicoUsd};
use crate::pricing::{Charge, Terms, Usage};
use batch::Operation;
use store::{Booking, Kind};
use writer::{Told, Writer};

/// A node renews its lease this often …
pub const LEASE_RENEWAL: Duration = Duration::from_secs(10);
/// … and is taken for dead when it has not for this long.
const LEASE_SECONDS: i64 = 60;
/// The reason on the receipt of a hold whose row was lost.
pub const HOLD_LOST: &str = "hold_lost";
/// A node gone for this long will not come back under its name.
const LONG_GONE_SECONDS: i64 = 86_400;
/// Receipts and holds ended by one sweep; the next sweep takes the rest.
const SWEEP_LIMIT: i64 = 500;

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("{required} micro-USDC are required and {} are available", balance.available())]
    Insufficient { required: MicroUsdc, balance: Balance },
    #[error("the key's spend cap is reached")]
    KeyCap(KeyCap),
    #[error("{0} exists with other terms")]
    Conflict(String),
    /// The hold's claim is another request's already.
    #[error("request {} has this name", .0.request_id)]
    Claimed(Claimed),
    #[error("the wallet is frozen: {0}")]
    Frozen(String),
    #[error("there is no wallet {0} in the books")]
    UnknownWallet(Wallet),
    #[error("an amount left the range of the books")]
    OutOfRange,
    /// More holds wait to be written than can be soon. This one does not wait.
    #[error("more requests are waiting to be held for than the books can take at once")]
    Overloaded,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What a wallet owns and how much of it open holds have locked.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Balance {
    pub balance: MicroUsdc,
    pub locked: MicroUsdc,
    /// What the wallet owes for top-ups that the chain undid; repaid first by later ones.
    pub debt: MicroUsdc,
}

impl Balance {
    pub fn available(self) -> MicroUsdc {
        self.balance.checked_sub(self.locked).unwrap_or_default()
    }
}

/// What a key has spent, and what its open holds may still cost.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Spending {
    pub spent: MicroUsdc,
    pub held: MicroUsdc,
}

/// The cap of a key's that a hold would overrun: spent + held + required > cap.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct KeyCap {
    pub cap: MicroUsdc,
    pub spending: Spending,
    pub required: MicroUsdc,
    /// When a cap per day begins anew; a cap of all days never does.
    pub resets_at: Option<Timestamp>,
}

/// An amount locked on a wallet for one request, and the terms it runs under.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hold {
    /// The request's id.
    pub id: String,
    pub wallet: Wallet,
    pub api_key_id: Option<i64>,
    pub amount: MicroUsdc,
    pub terms: Terms,
    pub created_at: Timestamp,
}

#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// Charged by the usage that the upstream reported.
    Settled,
    /// Charged by what could be known without a report.
    Estimated,
    /// Nothing was charged.
    Released,
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Settled => "settled",
            Self::Estimated => "estimated",
            Self::Released => "released",
        }
    }
}

impl std::str::FromStr for Outcome {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Settled, Self::Estimated, Self::Released].into_iter().find(|o| o.as_str() == text).ok_or(())
    }
}

/// How a hold ends. It carries the hold's terms, so that it can be booked even where a crash of
/// the database took the hold's row with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ending {
    pub hold: Hold,
    pub outcome: Outcome,
    pub reason: Option<String>,
    pub usage: Usage,
    pub usage_raw: Option<String>,
    /// What the upstream says that it charges for it.
    pub upstream_cost: Option<PicoUsd>,
    pub charge: Charge,
}

impl Ending {
    pub fn released(hold: Hold, reason: &str) -> Self {
        Self {
            hold,
            outcome: Outcome::Released,
            reason: Some(reason.into()),
            usage: Usage::default(),
            usage_raw: None,
            upstream_cost: None,
            charge: Charge::default(),
        }
    }
}

/// A hold's end as the books have it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Receipt {
    pub id: String,
    pub wallet: Wallet,
    pub api_key_id: Option<i64>,
    pub outcome: Outcome,
    pub reason: Option<String>,
    pub terms: Terms,
    pub hold: MicroUsdc,
    pub charged: MicroUsdc,
    pub cost: PicoUsd,
    pub usage: Usage,
    pub usage_raw: Option<String>,
    pub upstream_cost: Option<PicoUsd>,
    pub created_at: Timestamp,
    pub ended_at: Timestamp,
}

/// One line of the journal of money, as its wallet sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub seq: i64,
    pub kind: String,
    pub reference: String,
    pub amount: MicroUsdc,
    pub balance_after: MicroUsdc,
    pub note: Option<String>,
    pub created_at: Timestamp,
}

/// What calls through one key (`None`: without a key) have used so far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UsageTotal {
    pub api_key_id: Option<i64>,
    pub request_count: i64,
    pub prompt_tokens: i64,
    pub completion_tokens: i64,
    pub charged: MicroUsdc,
    pub revenue: PicoUsd,
}

/// What a hold's end left behind.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Ended {
    pub charged: MicroUsdc,
    pub balance: Balance,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Ledger(Arc<Parts>);

struct Parts {
    db: Db,
    clock: Clock,
    /// Names this process among those that share the database.
    node: String,
    /// Since when this node's lease has been renewed without a gap, and until when it holds.
    lease: Mutex<Option<Lease>>,
    writer: Writer,
    seconds: OperationSeconds,
}

/// How long operations took, looked up by their labels once.
struct OperationSeconds {
    hold: LazyLock<Histogram>,
    end: LazyLock<Histogram>,
}

#[derive(Copy, Clone)]
struct Lease {
    since: Timestamp,
    until: Timestamp,
}

impl Ledger {
    pub fn new(db: Db, clock: Clock, node: String) -> Self {
        let writer = Writer::new(&db, clock.clone(), node.clone());
        let seconds = OperationSeconds {
            hold: LazyLock::new(|| metrics::histogram!("farebox_ledger_seconds", "operation" => "hold")),
            end: LazyLock::new(|| metrics::histogram!("farebox_ledger_seconds", "operation" => "end")),
        };
        Self(Arc::new(Parts { db, clock, node, lease: Mutex::default(), writer, seconds }))
    }

    /// The name of this process among those that share the database.
    pub fn node(&self) -> &str {
        &self.0.node
    }

    /// Locks `hold.amount` if that much is available. The same hold again is the same result;
    /// another under its id is a conflict.
    pub async fn hold(&self, hold: &Hold) -> Result<Balance, LedgerError> {
        self.make_hold(hold, None, Told::WhenCommitted).await
    }

    /// The same for who goes on at once: returns when it is certain that the hold fits, and does not wait
    /// for its commit. Should that fail, the hold's end is booked all the same, as that of one that was lost.
    pub async fn hold_early(&self, hold: &Hold) -> Result<Balance, LedgerError> {
        self.make_hold(hold, None, Told::WhenDecided).await
    }

    /// The same for a request that has a name: it is held for only if the name is free.
    pub async fn hold_claimed(&self, hold: &Hold, claim: &Claim) -> Result<Balance, LedgerError> {
        self.make_hold(hold, Some(claim.clone()), Told::WhenCommitted).await
    }

    async fn make_hold(&self, hold: &Hold, claim: Option<Claim>, told: Told) -> Result<Balance, LedgerError> {
        let operation = Operation::Hold { hold: hold.clone(), claim };
        let held = timed(&self.0.seconds.hold, self.0.writer.submit(operation, told)).await;
        held.map(|held| held.balance)
    }

    /// Ends a hold. The same end again is the same result; another end is a conflict, and the
    /// first stands.
    pub async fn end(&self, ending: &Ending) -> Result<Ended, LedgerError> {
        let operation = Operation::End(ending.clone());
        timed(&self.0.seconds.end, self.0.writer.submit(operation, Told::WhenCommitted)).await
    }

    /// Resolves when no hold and no end is on its way into the books any more.
    pub async fn idle(&self) {
        self.0.writer.idle().await;
    }

    /// Adds what arrived for a payment, inside the transaction that marks the payment credited.
    /// A second credit for the same payment is refused by the database.
    pub async fn credit(
        &self,
        tx: &mut DbTx,
        wallet: Wallet,
        amount: MicroUsdc,
        payment_id: i64,
    ) -> Result<Balance, LedgerError> {
        let now = self.0.clock.now();
        store::ensure_wallet(tx, wallet, now).await?;
        let reference = payment_id.to_string();
        let balance = store::book(tx, wallet, Booking::new(Kind::Topup, &reference, amount), now).await?;
        let repaid = balance.debt.min(amount);
        if repaid == MicroUsdc::ZERO {
            return Ok(balance);
        }
        let repayment = Booking::new(Kind::Repayment, &reference, negative(repaid)?);
        Ok(store::book(tx, wallet, repayment, now).await?)
    }

    /// The balance that the credit for a payment has left its wallet.
    pub async fn balance_when_credited(&self, payment_id: i64) -> Result<MicroUsdc, LedgerError> {
        Ok(store::balance_when_credited(&self.0.db, &payment_id.to_string()).await?)
    }

    /// Takes back what was credited for a payment that the chain undid, inside the transaction that
    /// marks it so. What is no longer available becomes the wallet's debt: lent to it first, so that
    /// the balance is there to be taken and never falls below what is locked. Returns the new debt.
    pub async fn reverse(
        &self,
        tx: &mut DbTx,
        wallet: Wallet,
        amount: MicroUsdc,
        payment_id: i64,
    ) -> Result<MicroUsdc, LedgerError> {
        let now = self.0.clock.now();
        let reference = payment_id.to_string();
        let available = store::locked_balance(tx, wallet).await?.available();
        let lent = amount.checked_sub(available.min(amount)).ok_or(LedgerError::OutOfRange)?;
        if lent > MicroUsdc::ZERO {
            store::book(tx, wallet, Booking::new(Kind::Debt, &reference, lent), now).await?;
        }
        let reversal = Booking::new(Kind::Reversal, &reference, negative(amount)?);
        store::book(tx, wallet, reversal, now).await?;
        Ok(lent)
    }

    /// A wallet's balance, with its row kept from others until the transaction ends. A frozen wallet is refused.
    pub async fn take(&self, tx: &mut DbTx, wallet: Wallet) -> Result<Balance, LedgerError> {
        let balance = store::locked_balance(tx, wallet).await?;
        match store::frozen_reason_in(tx, wallet).await? {
            Some(reason) => Err(LedgerError::Frozen(reason)),
            None => Ok(balance),
        }
    }

    /// Locks what a withdrawal is to take, inside the transaction that writes it down; the database refuses more
    /// than there is.
    pub async fn lock(&self, tx: &mut DbTx, wallet: Wallet, amount: MicroUsdc) -> Result<(), LedgerError> {
        Ok(store::change_locked(tx, wallet, amount).await?)
    }

    /// Lets go of it, inside the transaction that ends the withdrawal without a transfer.
    pub async fn unlock(&self, tx: &mut DbTx, wallet: Wallet, amount: MicroUsdc) -> Result<(), LedgerError> {
        Ok(store::change_locked(tx, wallet, negative(amount)?).await?)
    }

    /// Takes what was locked out of the balance, inside the transaction that marks the withdrawal final. A second
    /// time is refused by the database.
    pub async fn withdraw(
        &self,
        tx: &mut DbTx,
        wallet: Wallet,
        amount: MicroUsdc,
        payment_id: i64,
    ) -> Result<Balance, LedgerError> {
        self.unlock(tx, wallet, amount).await?;
        let reference = payment_id.to_string();
        let withdrawal = Booking::new(Kind::Withdrawal, &reference, negative(amount)?);
        Ok(store::book(tx, wallet, withdrawal, self.0.clock.now()).await?)
    }

    /// The operator's own entry, `amount` added or taken, with the reason on it. `reference` names
    /// it: the same adjustment again is the same entry, another under its name is a conflict.
    pub async fn adjust(
        &self,
        wallet: Wallet,
        amount: MicroUsdc,
        reference: &str,
        reason: &str,
    ) -> Result<Balance, LedgerError> {
        let now = self.0.clock.now();
        let mut tx = self.0.db.begin().await?;
        store::ensure_wallet(&mut tx, wallet, now).await?;
        let balance = store::locked_balance(&mut tx, wallet).await?;
        if let Some(made) = store::find_adjustment(&mut tx, reference).await? {
            let same = made == (wallet, amount);
            return if same { Ok(balance) } else { Err(LedgerError::Conflict(reference.to_owned())) };
        }
        balance.balance.checked_add(amount).ok_or(LedgerError::OutOfRange)?;
        let taken = negative(amount)?;
        if taken > balance.available() {
            return Err(LedgerError::Insufficient { required: taken, balance });
        }
        let adjustment = Booking::new(Kind::Adjustment, reference, amount);
        let adjustment = Booking { note: Some(reason.to_owned()), ..adjustment };
        let balance = match store::book(&mut tx, wallet, adjustment, now).await {
            Err(error) if error.is_unique_violation() => {
                return Err(LedgerError::Conflict(reference.to_owned()));
            }
            booked => booked?,
        };
        tx.commit().await?;
        Ok(balance)
    }

    /// Stops a wallet from making new holds, for a reason it is told; `None` lets it again.
    pub async fn freeze(&self, wallet: Wallet, reason: Option<String>) -> Result<(), LedgerError> {
        let mut tx = self.0.db.begin().await?;
        if !store::set_frozen(&mut tx, wallet, reason).await? {
            return Err(LedgerError::UnknownWallet(wallet));
        }
        Ok(tx.commit().await?)
    }

    /// A wallet's entries, newest first.
    pub async fn entries(&self, wallet: Wallet, limit: i64) -> Result<Vec<Entry>, LedgerError> {
        Ok(store::entries_of(&self.0.db, wallet, limit).await?)
    }

    /// Why a wallet is frozen, if it is.
    pub async fn frozen(&self, wallet: Wallet) -> Result<Option<String>, LedgerError> {
        Ok(store::frozen_reason(&self.0.db, wallet).await?)
    }

    pub async fn balance(&self, wallet: Wallet) -> Result<Balance, LedgerError> {
        Ok(store::read_balance(&self.0.db, wallet).await?)
    }

    pub async fn receipt(&self, wallet: Wallet, id: &str) -> Result<Option<Receipt>, LedgerError> {
        Ok(store::receipt_of(&self.0.db, wallet, id).await?)
    }

    /// The receipt of an id, whosever it is.
    pub async fn any_receipt(&self, id: &str) -> Result<Option<Receipt>, LedgerError> {
        Ok(store::receipt(&self.0.db, id).await?)
    }

    /// Receipts of a wallet, newest first, older than `before` (a receipt's time and id).
    pub async fn receipts(
        &self,
        wallet: Wallet,
        before: Option<(Timestamp, String)>,
        limit: i64,
    ) -> Result<Vec<Receipt>, LedgerError> {
        Ok(store::receipts_of(&self.0.db, wallet, before, limit).await?)
    }

    pub async fn usage_totals(&self, wallet: Wallet) -> Result<Vec<UsageTotal>, LedgerError> {
        Ok(store::usage_totals(&self.0.db, wallet).await?)
    }

    /// What each key of a wallet has spent and holds: of all days, and of today (UTC). A key that was
    /// never used is not there.
    pub async fn spending_of_keys(
        &self,
        wallet: Wallet,
    ) -> Result<HashMap<i64, (Spending, Spending)>, LedgerError> {
        Ok(store::spending_of_keys(&self.0.db, wallet, self.0.clock.now().utc_day()).await?)
    }

    /// Says that this node is alive, so that nobody ends its holds.
    pub async fn renew_lease(&self) -> Result<(), LedgerError> {
        let now = self.0.clock.now();
        let until = now.plus_seconds(LEASE_SECONDS);
        let mut tx = self.0.db.begin().await?;
        store::renew_lease(&mut tx, &self.0.node, until).await?;
        store::forget_nodes(&mut tx, now.plus_seconds(-LONG_GONE_SECONDS)).await?;
        tx.commit().await?;
        let mut lease = self.0.lease.lock().unwrap_or_else(PoisonError::into_inner);
        let since = lease.filter(|lease| lease.until >= now).map_or(now, |lease| lease.since);
        *lease = Some(Lease { since, until });
        Ok(())
    }

    /// Whether this node may judge others by their leases: only once its own has held for as long as
    /// one lasts. After an outage of the database all have lapsed, and all are to be given the time
    /// to come back.
    fn may_judge(&self) -> bool {
        let lease = *self.0.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease.is_some_and(|lease| lease.since.plus_seconds(LEASE_SECONDS) <= self.0.clock.now())
    }

    /// Says that this node is gone, so that what it left can be ended at once.
    pub async fn drop_lease(&self) -> Result<(), LedgerError> {
        let mut tx = self.0.db.begin().await?;
        store::drop_lease(&mut tx, &self.0.node).await?;
        Ok(tx.commit().await?)
    }

    /// Releases the holds of nodes that are no more, and returns how many.
    ///
    /// Whether such a request reached its upstream nobody can tell any more. Its user got no whole
    /// answer and did not cause the death, so nothing is charged.
    pub async fn sweep(&self) -> Result<usize, LedgerError> {
        // Only one process can serve from an SQLite file, so there every other node is dead.
        let dead_before = match self.0.db.is_exclusive() {
            true => Timestamp::from_millis(i64::MAX),
            false if self.may_judge() => self.0.clock.now(),
            // Only those that said goodbye.
            false => Timestamp::from_millis(0),
        };
        let orphans = store::orphans(&self.0.db, &self.0.node, dead_before, SWEEP_LIMIT).await?;
        let mut released = 0;
        for hold in orphans {
            match self.end(&Ending::released(hold, "gateway_stopped")).await {
                Ok(_) => released += 1,
                // Another node was quicker, or the owner lives after all.
                Err(LedgerError::Conflict(_)) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(released)
    }

    /// How many holds are open, and how much they lock.
    pub async fn open_holds(&self) -> Result<(i64, MicroUsdc), LedgerError> {
        Ok(store::open_holds(&self.0.db).await?)
    }
}

async fn timed<T>(seconds: &Histogram, work: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let done = work.await;
    seconds.record(began.elapsed());
    done
}

fn negative(amount: MicroUsdc) -> Result<MicroUsdc, LedgerError> {
    MicroUsdc::ZERO.checked_sub(amount).ok_or(LedgerError::OutOfRange)
}
