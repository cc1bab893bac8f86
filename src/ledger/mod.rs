//! The books: balances, holds, settlements and receipts, on LEDGER's invariants.
//!
//! A **hold** locks the most a request can cost. It ends exactly once, *settled* at the real
//! charge or *released*, and its end deletes the hold's row and writes the receipt and the entry in
//! one transaction, so that no crash can leave half of it. `available = balance − locked`, and the
//! database itself refuses a balance below what is locked.

mod store;

pub use store::read_receipt;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::claims::{self, Claim, Claimed};
use crate::clock::{Clock, Timestamp};
use crate::db::{Db, DbError, DbTx};
use crate::id::Wallet;
use crate::money::{MicroUsdc, PicoUsd};
use crate::pricing::{Charge, Terms, Usage};
use store::{Booking, KeySpending, Kind};

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

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
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
    pub charge: Charge,
}

impl Ending {
    pub fn released(hold: Hold, reason: &str) -> Self {
        let charge = Charge { cost: PicoUsd::ZERO, charged: MicroUsdc::ZERO, above_hold: MicroUsdc::ZERO };
        Self {
            hold,
            outcome: Outcome::Released,
            reason: Some(reason.into()),
            usage: Usage::default(),
            usage_raw: None,
            charge,
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

#[derive(Clone)]
pub struct Ledger {
    db: Db,
    clock: Clock,
    /// Names this process among those that share the database.
    node: String,
    /// Since when this node's lease has been renewed without a gap, and until when it holds.
    lease: Arc<Mutex<Option<Lease>>>,
}

#[derive(Copy, Clone)]
struct Lease {
    since: Timestamp,
    until: Timestamp,
}

impl Ledger {
    pub fn new(db: Db, clock: Clock, node: String) -> Self {
        Self { db, clock, node, lease: Arc::default() }
    }

    /// Locks `hold.amount` if that much is available. The same hold again is the same result;
    /// another under its id is a conflict.
    pub async fn hold(&self, hold: &Hold) -> Result<Balance, LedgerError> {
        timed("hold", self.hold_now(hold, None)).await
    }

    /// The same for a request that has a name: it is held for only if the name is free.
    pub async fn hold_claimed(&self, hold: &Hold, claim: &Claim) -> Result<Balance, LedgerError> {
        timed("hold", self.hold_now(hold, Some(claim))).await
    }

    async fn hold_now(&self, hold: &Hold, claim: Option<&Claim>) -> Result<Balance, LedgerError> {
        let mut tx = self.db.begin().await?;
        // Before the money: an answer that is there already is worth asking for with none left.
        if let Some(claim) = claim
            && let Some(claimed) = claims::claim(&mut tx, hold.wallet, claim, &hold.id, &self.clock).await?
        {
            return Err(LedgerError::Claimed(claimed));
        }
        let Some(balance) = store::lock(&mut tx, hold.wallet, hold.amount).await? else {
            drop(tx);
            return self.refuse_hold(hold).await;
        };
        if !store::insert_hold(&mut tx, hold, &self.node).await? {
            drop(tx);
            return self.refuse_hold(hold).await;
        }
        if let Some(key) = hold.api_key_id {
            let spending = store::hold_for_key(&mut tx, key, hold).await?;
            if let Some(cap) = overrun(&spending.without(hold.amount), hold) {
                return Err(LedgerError::KeyCap(cap));
            }
        }
        tx.commit().await?;
        Ok(balance)
    }

    /// Tells why a hold was not made: it exists, or the wallet cannot cover it.
    async fn refuse_hold(&self, hold: &Hold) -> Result<Balance, LedgerError> {
        let mut tx = self.db.snapshot().await?;
        let balance = store::balance(&mut tx, hold.wallet).await?;
        match store::find_hold(&mut tx, &hold.id).await? {
            Some(existing) if existing == *hold => Ok(balance),
            Some(_) => Err(LedgerError::Conflict(hold.id.clone())),
            None if store::find_receipt(&mut tx, &hold.id).await?.is_some() => {
                Err(LedgerError::Conflict(hold.id.clone()))
            }
            None => match store::frozen_reason_in(&mut tx, hold.wallet).await? {
                Some(reason) => Err(LedgerError::Frozen(reason)),
                None => {
                    // Where both fall short it is the cap that is named: a top-up would not help.
                    if let Some(key) = hold.api_key_id {
                        let day = hold.created_at.utc_day();
                        let spending = store::key_spending(&mut tx, key, day).await?;
                        if let Some(cap) = overrun(&spending, hold) {
                            return Err(LedgerError::KeyCap(cap));
                        }
                    }
                    Err(LedgerError::Insufficient { required: hold.amount, balance })
                }
            },
        }
    }

    /// Ends a hold. The same end again is the same result; another end is a conflict, and the
    /// first stands.
    pub async fn end(&self, ending: &Ending) -> Result<Ended, LedgerError> {
        timed("end", async {
            let mut tx = self.db.begin().await?;
            let ended = self.end_in(&mut tx, ending).await?;
            tx.commit().await?;
            Ok(ended)
        })
        .await
    }

    async fn end_in(&self, tx: &mut DbTx, ending: &Ending) -> Result<Ended, LedgerError> {
        let hold = &ending.hold;
        if ending.charge.charged > hold.amount {
            return Err(LedgerError::OutOfRange);
        }
        let mut held = store::delete_hold(tx, &hold.id, hold.wallet).await?;
        let mut lost = None;
        if held.is_none() {
            // Ended before, or lost, or only just on its way in. The wallet's row is taken first: of two
            // who find it so the second sees the first one's receipt, and a hold whose commit was still
            // under way is there now.
            store::ensure_wallet(tx, hold.wallet, self.clock.now()).await?;
            let available = store::locked_balance(tx, hold.wallet).await?.available();
            held = store::delete_hold(tx, &hold.id, hold.wallet).await?;
            lost = held.is_none().then_some(available);
        }
        if held.is_none() && store::find_hold(tx, &hold.id).await?.is_some() {
            return Err(LedgerError::Conflict(hold.id.clone()));
        }
        if held.is_some_and(|amount| amount != hold.amount) {
            return Err(LedgerError::Conflict(hold.id.clone()));
        }
        if held.is_none()
            && let Some(receipt) = store::find_receipt(tx, &hold.id).await?
        {
            let was_lost = receipt.reason.as_deref() == Some(HOLD_LOST);
            let same_charge = receipt.charged == ending.charge.charged || was_lost;
            let same_end = receipt.wallet == hold.wallet && receipt.outcome == ending.outcome;
            return if same_charge && same_end {
                let balance = store::balance(tx, hold.wallet).await?;
                Ok(Ended { charged: receipt.charged, balance })
            } else {
                Err(LedgerError::Conflict(hold.id.clone()))
            };
        }
        let unlock = held.unwrap_or_default();
        let (charged, reason) = match lost {
            None => (ending.charge.charged, ending.reason.clone()),
            Some(available) => (ending.charge.charged.min(available), Some(HOLD_LOST.to_owned())),
        };
        let now = self.clock.now();
        let balance = if charged == MicroUsdc::ZERO {
            store::unlock(tx, hold.wallet, unlock).await?
        } else {
            let charge = Booking::new(Kind::Charge, &hold.id, negative(charged)?);
            store::book(tx, hold.wallet, Booking { unlock, ..charge }, now).await?
        };
        if let Some(key) = hold.api_key_id {
            store::end_for_key(tx, key, hold, held, charged).await?;
        }
        store::insert_receipt(tx, ending, charged, reason, now).await?;
        if ending.outcome != Outcome::Released {
            let revenue = charged.to_pico().checked_sub(ending.charge.cost).ok_or(LedgerError::OutOfRange)?;
            store::add_usage(tx, ending, charged, revenue).await?;
        }
        Ok(Ended { charged, balance })
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
        let now = self.clock.now();
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
        let now = self.clock.now();
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

    /// The operator's own entry, `amount` added or taken, with the reason on it. `reference` names
    /// it: the same adjustment again is the same entry, another under its name is a conflict.
    pub async fn adjust(
        &self,
        wallet: Wallet,
        amount: MicroUsdc,
        reference: &str,
        reason: &str,
    ) -> Result<Balance, LedgerError> {
        let now = self.clock.now();
        let mut tx = self.db.begin().await?;
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
        let mut tx = self.db.begin().await?;
        if !store::set_frozen(&mut tx, wallet, reason).await? {
            return Err(LedgerError::UnknownWallet(wallet));
        }
        Ok(tx.commit().await?)
    }

    /// A wallet's entries, newest first.
    pub async fn entries(&self, wallet: Wallet, limit: i64) -> Result<Vec<Entry>, LedgerError> {
        Ok(store::entries_of(&self.db, wallet, limit).await?)
    }

    /// Why a wallet is frozen, if it is.
    pub async fn frozen(&self, wallet: Wallet) -> Result<Option<String>, LedgerError> {
        Ok(store::frozen_reason(&self.db, wallet).await?)
    }

    pub async fn balance(&self, wallet: Wallet) -> Result<Balance, LedgerError> {
        Ok(store::read_balance(&self.db, wallet).await?)
    }

    pub async fn receipt(&self, wallet: Wallet, id: &str) -> Result<Option<Receipt>, LedgerError> {
        Ok(store::receipt_of(&self.db, wallet, id).await?)
    }

    /// Receipts of a wallet, newest first, older than `before` (a receipt's time and id).
    pub async fn receipts(
        &self,
        wallet: Wallet,
        before: Option<(Timestamp, String)>,
        limit: i64,
    ) -> Result<Vec<Receipt>, LedgerError> {
        Ok(store::receipts_of(&self.db, wallet, before, limit).await?)
    }

    pub async fn usage_totals(&self, wallet: Wallet) -> Result<Vec<UsageTotal>, LedgerError> {
        Ok(store::usage_totals(&self.db, wallet).await?)
    }

    /// What each key of a wallet has spent and holds: of all days, and of today (UTC). A key that was
    /// never used is not there.
    pub async fn spending_of_keys(
        &self,
        wallet: Wallet,
    ) -> Result<HashMap<i64, (Spending, Spending)>, LedgerError> {
        Ok(store::spending_of_keys(&self.db, wallet, self.clock.now().utc_day()).await?)
    }

    /// Says that this node is alive, so that nobody ends its holds.
    pub async fn renew_lease(&self) -> Result<(), LedgerError> {
        let now = self.clock.now();
        let until = now.plus_seconds(LEASE_SECONDS);
        let mut tx = self.db.begin().await?;
        store::renew_lease(&mut tx, &self.node, until).await?;
        store::forget_nodes(&mut tx, now.plus_seconds(-LONG_GONE_SECONDS)).await?;
        tx.commit().await?;
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        let since = lease.filter(|lease| lease.until >= now).map_or(now, |lease| lease.since);
        *lease = Some(Lease { since, until });
        Ok(())
    }

    /// Whether this node may judge others by their leases: only once its own has held for as long as
    /// one lasts. After an outage of the database all have lapsed, and all are to be given the time
    /// to come back.
    fn may_judge(&self) -> bool {
        let lease = *self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease.is_some_and(|lease| lease.since.plus_seconds(LEASE_SECONDS) <= self.clock.now())
    }

    /// Says that this node is gone, so that what it left can be ended at once.
    pub async fn drop_lease(&self) -> Result<(), LedgerError> {
        let mut tx = self.db.begin().await?;
        store::drop_lease(&mut tx, &self.node).await?;
        Ok(tx.commit().await?)
    }

    /// Releases the holds of nodes that are no more, and returns how many.
    ///
    /// Whether such a request reached its upstream nobody can tell any more. Its user got no whole
    /// answer and did not cause the death, so nothing is charged.
    pub async fn sweep(&self) -> Result<usize, LedgerError> {
        // Only one process can serve from an SQLite file, so there every other node is dead.
        let dead_before = match self.db.is_exclusive() {
            true => Timestamp::from_millis(i64::MAX),
            false if self.may_judge() => self.clock.now(),
            // Only those that said goodbye.
            false => Timestamp::from_millis(0),
        };
        let orphans = store::orphans(&self.db, &self.node, dead_before, SWEEP_LIMIT).await?;
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
        Ok(store::open_holds(&self.db).await?)
    }
}

async fn timed<T>(operation: &'static str, work: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let done = work.await;
    metrics::histogram!("farebox_ledger_seconds", "operation" => operation).record(began.elapsed());
    done
}

/// The cap that a hold on top of `spending` would overrun; of two the one that does not begin anew.
fn overrun(spending: &KeySpending, hold: &Hold) -> Option<KeyCap> {
    let over = |cap: Option<MicroUsdc>, spending: Spending, resets_at| {
        let cap = cap?;
        let so_far = spending.spent.checked_add(spending.held);
        let total = so_far.and_then(|so_far| so_far.checked_add(hold.amount));
        // A total out of range is above any cap.
        let is_over = total.is_none_or(|total| total > cap);
        is_over.then_some(KeyCap { cap, spending, required: hold.amount, resets_at })
    };
    over(spending.cap, spending.ever, None)
        .or_else(|| over(spending.cap_per_day, spending.day, Some(hold.created_at.end_of_utc_day())))
}

impl KeySpending {
    /// As it was before `amount` was held.
    fn without(self, amount: MicroUsdc) -> Self {
        let before = |spending: Spending| Spending {
            held: spending.held.checked_sub(amount).unwrap_or_default(),
            ..spending
        };
        Self { ever: before(self.ever), day: before(self.day), ..self }
    }
}

fn negative(amount: MicroUsdc) -> Result<MicroUsdc, LedgerError> {
    MicroUsdc::ZERO.checked_sub(amount).ok_or(LedgerError::OutOfRange)
}
