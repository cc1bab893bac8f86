//! Many operations decided one after the other, each as if those before it had been committed alone. In
//! memory: a [`Store`] brings the rows that they are about and writes down what has become of them.

mod postgres_store;
mod sqlite_store;

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

pub use postgres_store::PostgresStore;
pub use sqlite_store::SqliteStore;

use crate::claims::{Claim, Claimed};
use crate::clock::Timestamp;
use crate::db::DbError;
use crate::id::Wallet;
use crate::ledger::{Balance, Ended, Ending, HOLD_LOST, Hold, KeyCap, LedgerError, Outcome, Spending};
use crate::money::{MicroUsdc, PicoUsd};

/// The day under which a key's whole spending is totalled.
pub const ALL_DAYS: i64 = 0;

/// What the ledger is asked to do. Both are answered by what was charged, of a hold nothing, and by the
/// balance that is left.
pub enum Operation {
    Hold { hold: Hold, claim: Option<Claim> },
    End(Ending),
}

impl Operation {
    pub fn wallet(&self) -> Wallet {
        self.about().wallet
    }

    pub fn is_hold(&self) -> bool {
        matches!(self, Self::Hold { .. })
    }

    /// Whether it must be on the disk before anybody is told of it. A hold that is lost costs nobody but
    /// the operator; one that a claim came with would let its request run twice.
    pub fn must_last(&self) -> bool {
        !matches!(self, Self::Hold { claim: None, .. })
    }

    fn about(&self) -> &Hold {
        match self {
            Self::Hold { hold, .. } => hold,
            Self::End(ending) => &ending.hold,
        }
    }
}

/// Where a batch's rows are. What was begun and is not committed never happened.
pub trait Store: Sized {
    /// The database.
    type Home: Clone;

    /// Waits until a batch can be written.
    async fn turn(home: &Self::Home) -> Result<Self, DbError>;

    /// Begins a transaction; if it need not last, its commit does not wait for the disk.
    async fn begin(&mut self, must_last: bool) -> Result<(), DbError>;

    /// Reads what the operations are about, and keeps others from changing it.
    async fn load<'a>(&mut self, operations: &'a [Operation], now: Timestamp) -> Result<Loaded<'a>, DbError>;

    /// Writes down what has become of it.
    async fn write(&mut self, page: &Page<'_>, node: &str, now: Timestamp) -> Result<(), DbError>;

    async fn commit(&mut self) -> Result<(), DbError>;
}

/// What was found.
pub enum Loaded<'a> {
    Page(Box<Page<'a>>),
    /// Nothing: there were wallets without a row, which have one when this is committed.
    NewWallets,
}

/// The rows that a batch is about: as they were, and as they are to be.
#[derive(Default)]
pub struct Page<'a> {
    accounts: HashMap<Wallet, Account>,
    /// Of each operation, by its id.
    requests: HashMap<&'a str, Request<'a>>,
    /// By wallet and name: who has it.
    claims: HashMap<Wallet, HashMap<&'a str, Option<Name<'a>>>>,
    caps: HashMap<i64, Caps>,
    /// What keys have spent and hold, by key and day.
    spending: HashMap<(i64, i64), KeptSpending>,
    /// Holds that have ended and whose rows are there.
    removed: Vec<&'a str>,
    charges: Vec<ChargeEntry<'a>>,
    ends: Vec<End<'a>>,
    used: HashMap<(Wallet, Option<i64>), Used>,
}

/// A wallet's row.
#[derive(Default)]
struct Account {
    balance: Balance,
    /// The number of its newest entry.
    seq: i64,
    frozen_reason: Option<String>,
    is_changed: bool,
}

#[derive(Default)]
struct Request<'a> {
    /// Whether it is asked to be held for, so that everything is compared if it is already.
    is_to_be_held: bool,
    open: Option<Open<'a>>,
    ended: Option<Past>,
}

/// A hold that has not ended.
enum Open<'a> {
    /// Its row is there. `whole` is read only where the same hold is asked for again.
    Kept { wallet: Wallet, amount: MicroUsdc, whole: Option<Box<Hold>> },
    /// By this batch, so that its row is still to be written.
    Made(&'a Hold),
}

impl Open<'_> {
    fn is(&self, hold: &Hold) -> bool {
        match self {
            Self::Kept { whole, .. } => whole.as_deref() == Some(hold),
            Self::Made(made) => *made == hold,
        }
    }

    fn is_ended_by(&self, ending: &Ending) -> bool {
        let (wallet, amount) = match self {
            Self::Kept { wallet, amount, .. } => (*wallet, *amount),
            Self::Made(hold) => (hold.wallet, hold.amount),
        };
        (wallet, amount) == (ending.hold.wallet, ending.hold.amount)
    }
}

/// What a receipt says that an end must agree with to be the same end.
struct Past {
    wallet: Wallet,
    outcome: Outcome,
    charged: MicroUsdc,
    was_lost: bool,
}

impl Past {
    fn new(wallet: Wallet, outcome: &str, charged: MicroUsdc, reason: Option<&str>) -> Result<Self, DbError> {
        let outcome = outcome.parse().map_err(|()| DbError::Corrupt(format!("outcome {outcome}")))?;
        Ok(Self { wallet, outcome, charged, was_lost: reason == Some(HOLD_LOST) })
    }

    fn is_same_as(&self, ending: &Ending) -> bool {
        // What was lost may have been charged less than was asked for.
        let same_charge = self.charged == ending.charge.charged || self.was_lost;
        same_charge && self.wallet == ending.hold.wallet && self.outcome == ending.outcome
    }
}

/// A claim's row.
struct Name<'a> {
    request_hash: Cow<'a, str>,
    request_id: Cow<'a, str>,
    /// Whether its request came to nothing before this batch.
    was_released: bool,
    is_changed: bool,
}

impl Name<'_> {
    /// As the books have it, with what became of its request.
    fn kept(request_hash: String, request_id: String, outcome: Option<&str>) -> Self {
        Self {
            request_hash: Cow::Owned(request_hash),
            request_id: Cow::Owned(request_id),
            was_released: outcome == Some(Outcome::Released.as_str()),
            is_changed: false,
        }
    }
}

/// What a key may spend at most.
#[derive(Copy, Clone, Default)]
struct Caps {
    ever: Option<MicroUsdc>,
    per_day: Option<MicroUsdc>,
}

#[derive(Copy, Clone, Default)]
struct KeptSpending {
    spending: Spending,
    is_there: bool,
    is_changed: bool,
}

/// The entry of a charge. Its amount is below zero.
struct ChargeEntry<'a> {
    wallet: Wallet,
    seq: i64,
    reference: &'a str,
    amount: MicroUsdc,
    balance_before: MicroUsdc,
}

/// A receipt to be written.
struct End<'a> {
    ending: &'a Ending,
    charged: MicroUsdc,
    was_lost: bool,
    cost_pico: i64,
    upstream_cost_pico: Option<i64>,
    prompt_tokens: i64,
    cached_tokens: i64,
    completion_tokens: i64,
}

impl End<'_> {
    fn reason(&self) -> Option<&str> {
        if self.was_lost { Some(HOLD_LOST) } else { self.ending.reason.as_deref() }
    }
}

/// What is to be added to a key's total of usage.
#[derive(Copy, Clone, Default)]
struct Used {
    request_count: i64,
    prompt_tokens: i64,
    completion_tokens: i64,
    charged: MicroUsdc,
    revenue: PicoUsd,
}

impl<'a> Page<'a> {
    /// An empty page with a place for each row that the operations are about.
    fn about(operations: &'a [Operation]) -> Self {
        let mut page = Self::default();
        for operation in operations {
            let hold = operation.about();
            let request = page.requests.entry(hold.id.as_str()).or_default();
            request.is_to_be_held |= operation.is_hold();
            if let Some(key) = hold.api_key_id {
                for day in [ALL_DAYS, hold.created_at.utc_day()] {
                    page.spending.entry((key, day)).or_default();
                }
                // Only holds are bound by caps.
                if operation.is_hold() {
                    page.caps.entry(key).or_default();
                }
            }
            if let Operation::Hold { hold, claim: Some(claim) } = operation {
                page.claims.entry(hold.wallet).or_default().entry(&claim.name).or_default();
            }
        }
        page
    }

    /// Wallets that need a row and have none. An end whose hold was lost is booked all the same, also
    /// where its wallet's row was lost with it.
    fn lost_wallets(&self, operations: &[Operation]) -> BTreeSet<Wallet> {
        let is_lost = |end: &&Operation| {
            let request = self.requests.get(end.about().id.as_str());
            request.is_none_or(|request| request.open.is_none() && request.ended.is_none())
        };
        let ends = operations.iter().filter(|operation| !operation.is_hold());
        let wallets = ends.filter(is_lost).map(Operation::wallet);
        wallets.filter(|wallet| !self.accounts.contains_key(wallet)).collect()
    }

    pub fn decide(&mut self, operation: &'a Operation) -> Result<Ended, LedgerError> {
        match operation {
            Operation::Hold { hold, claim } => {
                let balance = self.hold(hold, claim.as_ref())?;
                Ok(Ended { charged: MicroUsdc::ZERO, balance })
            }
            Operation::End(ending) => self.end(ending),
        }
    }

    /// Whether there is anything to write down.
    pub fn is_changed(&self) -> bool {
        self.accounts.values().any(|account| account.is_changed)
    }

    fn changed_accounts(&self) -> impl Iterator<Item = (Wallet, &Account)> {
        self.accounts
            .iter()
            .filter(|(_, account)| account.is_changed)
            .map(|(wallet, account)| (*wallet, account))
    }

    /// The holds whose rows are to be written. One that has ended meanwhile never has a row.
    fn made_holds(&self) -> impl Iterator<Item = &'a Hold> {
        self.requests.values().filter_map(|request| match request.open {
            Some(Open::Made(hold)) => Some(hold),
            _ => None,
        })
    }

    fn changed_spending(&self) -> impl Iterator<Item = (i64, i64, Spending)> {
        let changed = self.spending.iter().filter(|(_, kept)| kept.is_changed);
        changed.map(|((key, day), kept)| (*key, *day, kept.spending))
    }

    fn changed_names(&self) -> impl Iterator<Item = (Wallet, &str, &Name<'a>)> {
        let named =
            self.claims.iter().flat_map(|(wallet, names)| names.iter().map(move |named| (*wallet, named)));
        let kept = named.filter_map(|(wallet, (name, kept))| Some((wallet, *name, kept.as_ref()?)));
        kept.filter(|(.., kept)| kept.is_changed)
    }

    fn balance(&self, wallet: Wallet) -> Balance {
        self.accounts.get(&wallet).map(|account| account.balance).unwrap_or_default()
    }

    fn hold(&mut self, hold: &'a Hold, claim: Option<&'a Claim>) -> Result<Balance, LedgerError> {
        // Before the money: an answer that is there already is worth asking for with none left.
        if let Some(claimed) = claim.and_then(|claim| self.claimed(hold.wallet, claim)) {
            return Err(LedgerError::Claimed(claimed));
        }
        let balance = self.balance(hold.wallet);
        match self.requests.get(hold.id.as_str()) {
            Some(Request { open: Some(open), .. }) if open.is(hold) => return Ok(balance),
            None | Some(Request { open: None, ended: None, .. }) => {}
            Some(_) => return Err(LedgerError::Conflict(hold.id.clone())),
        }
        let account = self.accounts.get_mut(&hold.wallet);
        if let Some(reason) = account.as_ref().and_then(|account| account.frozen_reason.clone()) {
            return Err(LedgerError::Frozen(reason));
        }
        // Where both fall short it is the cap that is named: a top-up would not help.
        if let Some(cap) = hold.api_key_id.and_then(|key| overrun(&self.caps, &self.spending, key, hold)) {
            return Err(LedgerError::KeyCap(cap));
        }
        let account = account.filter(|_| hold.amount <= balance.available());
        let account = account.ok_or(LedgerError::Insufficient { required: hold.amount, balance })?;
        let locked = balance.locked.checked_add(hold.amount).ok_or(LedgerError::OutOfRange)?;
        if let Some(key) = hold.api_key_id {
            count(&mut self.spending, key, hold, MicroUsdc::ZERO, hold.amount)?;
        }

        account.balance.locked = locked;
        account.is_changed = true;
        let balance = account.balance;
        self.requests.entry(&hold.id).or_default().open = Some(Open::Made(hold));
        if let Some(claim) = claim {
            let name = Name {
                request_hash: Cow::Borrowed(&claim.request_hash),
                request_id: Cow::Borrowed(&hold.id),
                was_released: false,
                is_changed: true,
            };
            self.claims.entry(hold.wallet).or_default().insert(&claim.name, Some(name));
        }
        Ok(balance)
    }

    /// Who has a name, unless it is free: nobody has it, or one that asked for the same and came to
    /// nothing.
    fn claimed(&self, wallet: Wallet, claim: &'a Claim) -> Option<Claimed> {
        let name = self.claims.get(&wallet)?.get(claim.name.as_str())?.as_ref()?;
        let request = self.requests.get(name.request_id.as_ref());
        let ended = request.and_then(|request| request.ended.as_ref());
        let was_released = name.was_released || ended.is_some_and(|past| past.outcome == Outcome::Released);
        let is_same_request = name.request_hash == claim.request_hash;
        let is_free = was_released && is_same_request;
        (!is_free).then(|| Claimed { request_id: name.request_id.clone().into_owned(), is_same_request })
    }

    fn end(&mut self, ending: &'a Ending) -> Result<Ended, LedgerError> {
        let hold = &ending.hold;
        if ending.charge.charged > hold.amount {
            return Err(LedgerError::OutOfRange);
        }
        let balance = self.balance(hold.wallet);
        let (unlock, charged, was_lost) = match self.requests.get(hold.id.as_str()) {
            Some(Request { open: Some(open), .. }) if open.is_ended_by(ending) => {
                (hold.amount, ending.charge.charged, false)
            }
            Some(Request { open: None, ended: Some(past), .. }) if past.is_same_as(ending) => {
                return Ok(Ended { charged: past.charged, balance });
            }
            None | Some(Request { open: None, ended: None, .. }) => {
                (MicroUsdc::ZERO, ending.charge.charged.min(balance.available()), true)
            }
            Some(_) => return Err(LedgerError::Conflict(hold.id.clone())),
        };

        // Whatever can be out of range is found before anything is changed.
        let end = End {
            ending,
            charged,
            was_lost,
            cost_pico: pico(ending.charge.cost)?,
            // What an upstream claims may be anything, and what is out of range is not worth keeping.
            upstream_cost_pico: ending.upstream_cost.and_then(|cost| pico(cost).ok()),
            prompt_tokens: tokens(ending.usage.prompt_tokens())?,
            cached_tokens: tokens(ending.usage.cached_tokens())?,
            completion_tokens: tokens(ending.usage.completion_tokens())?,
        };
        let used = if ending.outcome == Outcome::Released { None } else { Some(self.used_with(&end)?) };
        let out_of_range = || LedgerError::OutOfRange;
        let after = Balance {
            balance: balance.balance.checked_sub(charged).ok_or_else(out_of_range)?,
            locked: balance.locked.checked_sub(unlock).ok_or_else(out_of_range)?,
            ..balance
        };
        let amount = MicroUsdc::ZERO.checked_sub(charged).ok_or_else(out_of_range)?;
        let no_wallet = || DbError::Corrupt(format!("no wallet {}", hold.wallet));
        let account = self.accounts.get_mut(&hold.wallet).ok_or_else(no_wallet)?;
        if let Some(key) = hold.api_key_id {
            let day = hold.created_at.utc_day();
            let is_there = |day| self.spending.get(&(key, day)).is_some_and(|kept| kept.is_there);
            // What was lost took these with it.
            let has_rows = is_there(ALL_DAYS) && is_there(day);
            if !was_lost && !has_rows {
                return Err(DbError::Corrupt(format!("no spending of key {key} on day {day}")).into());
            }
            let freed = MicroUsdc::ZERO.checked_sub(unlock).ok_or_else(out_of_range)?;
            count(&mut self.spending, key, hold, charged, freed)?;
        }

        account.balance = after;
        account.is_changed = true;
        if charged != MicroUsdc::ZERO {
            account.seq += 1;
            self.charges.push(ChargeEntry {
                wallet: hold.wallet,
                seq: account.seq,
                reference: &hold.id,
                amount,
                balance_before: balance.balance,
            });
        }
        let request = self.requests.entry(&hold.id).or_default();
        if let Some(Open::Kept { .. }) = request.open.take() {
            self.removed.push(&hold.id);
        }
        request.ended = Some(Past { wallet: hold.wallet, outcome: ending.outcome, charged, was_lost });
        if let Some(used) = used {
            self.used.insert((hold.wallet, hold.api_key_id), used);
        }
        self.ends.push(end);
        Ok(Ended { charged, balance: after })
    }

    /// What a key will have used in this batch, with one more end.
    fn used_with(&self, end: &End<'_>) -> Result<Used, LedgerError> {
        let hold = &end.ending.hold;
        let so_far = self.used.get(&(hold.wallet, hold.api_key_id)).copied().unwrap_or_default();
        let revenue = end.charged.to_pico().checked_sub(end.ending.charge.cost);
        let add = || {
            Some(Used {
                request_count: so_far.request_count.checked_add(1)?,
                prompt_tokens: so_far.prompt_tokens.checked_add(end.prompt_tokens)?,
                completion_tokens: so_far.completion_tokens.checked_add(end.completion_tokens)?,
                charged: so_far.charged.checked_add(end.charged)?,
                revenue: so_far.revenue.checked_add(revenue?)?,
            })
        };
        add().ok_or(LedgerError::OutOfRange)
    }
}

/// Adds to what a key has spent and holds, of the day of a hold and of all days.
fn count(
    spending: &mut HashMap<(i64, i64), KeptSpending>,
    key: i64,
    hold: &Hold,
    spent: MicroUsdc,
    held: MicroUsdc,
) -> Result<(), LedgerError> {
    let added = |day| {
        let before = spending.get(&(key, day)).copied().unwrap_or_default().spending;
        let spending = Spending {
            spent: before.spent.checked_add(spent).ok_or(LedgerError::OutOfRange)?,
            held: before.held.checked_add(held).ok_or(LedgerError::OutOfRange)?,
        };
        Ok::<_, LedgerError>(KeptSpending { spending, is_there: true, is_changed: true })
    };
    let day = hold.created_at.utc_day();
    let (ever, of_day) = (added(ALL_DAYS)?, added(day)?);
    spending.insert((key, ALL_DAYS), ever);
    spending.insert((key, day), of_day);
    Ok(())
}

/// The cap that a hold would overrun; of two the one that does not begin anew.
fn overrun(
    caps: &HashMap<i64, Caps>,
    spending: &HashMap<(i64, i64), KeptSpending>,
    key: i64,
    hold: &Hold,
) -> Option<KeyCap> {
    let caps = caps.get(&key)?;
    let over = |cap: Option<MicroUsdc>, day, resets_at: Option<Timestamp>| {
        let cap = cap?;
        let spending = spending.get(&(key, day)).copied().unwrap_or_default().spending;
        let so_far = spending.spent.checked_add(spending.held);
        let total = so_far.and_then(|so_far| so_far.checked_add(hold.amount));
        // A total out of range is above any cap.
        let is_over = total.is_none_or(|total| total > cap);
        is_over.then_some(KeyCap { cap, spending, required: hold.amount, resets_at })
    };
    over(caps.ever, ALL_DAYS, None)
        .or_else(|| over(caps.per_day, hold.created_at.utc_day(), Some(hold.created_at.end_of_utc_day())))
}

/// A count as the books keep it.
fn tokens(count: u64) -> Result<i64, DbError> {
    i64::try_from(count).map_err(|_| DbError::Corrupt(format!("{count} tokens")))
}

fn pico(amount: PicoUsd) -> Result<i64, DbError> {
    i64::try_from(amount.get()).map_err(|_| DbError::Corrupt(format!("{} pico-USD", amount.get())))
}
