//! How often and how much at once: limits per wallet, per key and, where nobody has said yet who
//! they are, per address.
//!
//! The counters are in memory and start empty. Nodes of one database tell each other what they count
//! ([`Exchange`]), so that a limit holds for all of them together, but for the last two seconds or so.
//! What a key may spend is not counted here: the ledger holds that, in the database.

mod address;
mod exchange;
mod store;
mod window;

pub use exchange::{EVERY as EXCHANGE_EVERY, Exchange};

pub use address::{Network, NotANetwork, client_address};

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::{Clock, Timestamp};
use crate::id::Wallet;
use window::{Span, Window};

/// Counters that are kept of callers and, apart from them, of strangers. Beyond that those go first
/// that were used the longest ago.
const MAX_COUNTERS: usize = 100_000;

/// The configured limits; 0 is none.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Rates {
    /// Of a wallet, with whichever keys.
    pub requests_per_minute: u32,
    pub requests_per_day: u32,
    /// Of a wallet, at the same time.
    pub concurrent_requests: u32,
    /// Of an address, where there is no principal yet.
    pub unauthenticated_per_minute: u32,
    /// Of an address, and of the payer that a payment names.
    pub failed_payments_per_minute: u32,
}

/// Where somebody stands with the limit that is nearest.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Standing {
    pub limit: u32,
    pub remaining: u32,
    /// When all of the limit is there again, if nothing more is asked for.
    pub resets_at: Timestamp,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LimitError {
    #[error("{} requests a {} are let through for this {of}", standing.limit, period)]
    Rate { standing: Standing, of: &'static str, period: &'static str, retry_after_s: i64 },
    #[error("this wallet has {0} requests under way, as many as it may")]
    Concurrent(u32),
    #[error("too many payments were refused within a minute")]
    FailedPayments { retry_after_s: i64 },
}

/// Whom something is counted for. As text, `kind:whom`.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
enum Subject {
    WalletByMinute(Wallet),
    WalletByDay(Wallet),
    Key(i64),
    Address(IpAddr),
    FailingAddress(IpAddr),
    FailingPayer(Wallet),
}

impl Subject {
    fn span(self) -> Span {
        if matches!(self, Self::WalletByDay(_)) { Span::DAY } else { Span::MINUTE }
    }

    fn is_stranger(self) -> bool {
        matches!(self, Self::Address(_) | Self::FailingAddress(_) | Self::FailingPayer(_))
    }
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::WalletByMinute(wallet) => write!(f, "minute:{}", wallet.key()),
            Self::WalletByDay(wallet) => write!(f, "day:{}", wallet.key()),
            Self::Key(id) => write!(f, "key:{id}"),
            Self::Address(address) => write!(f, "address:{address}"),
            Self::FailingAddress(address) => write!(f, "failing-address:{address}"),
            Self::FailingPayer(wallet) => write!(f, "failing-payer:{}", wallet.key()),
        }
    }
}

impl std::str::FromStr for Subject {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (kind, whom) = text.split_once(':').ok_or(())?;
        let wallet = || whom.parse().map_err(|_| ());
        let address = || whom.parse().map_err(|_| ());
        match kind {
            "minute" => wallet().map(Self::WalletByMinute),
            "day" => wallet().map(Self::WalletByDay),
            "key" => whom.parse().map(Self::Key).map_err(|_| ()),
            "address" => address().map(Self::Address),
            "failing-address" => address().map(Self::FailingAddress),
            "failing-payer" => wallet().map(Self::FailingPayer),
            _ => Err(()),
        }
    }
}

/// One limit that a request must stay within.
struct Bound {
    subject: Subject,
    limit: u32,
    span: Span,
    of: &'static str,
}

/// The limits of this process. Cheap to clone.
#[derive(Clone)]
pub struct Limits(Arc<Parts>);

struct Parts {
    rates: Rates,
    clock: Clock,
    callers: Mutex<Counters>,
    strangers: Mutex<Counters>,
    /// Requests under way, of wallets that have any.
    running: Mutex<HashMap<Wallet, u32>>,
}

impl Limits {
    pub fn new(rates: Rates, clock: Clock) -> Self {
        Self(Arc::new(Parts {
            rates,
            clock,
            callers: Mutex::default(),
            strangers: Mutex::default(),
            running: Mutex::default(),
        }))
    }

    /// Counts a request of a wallet, with a key that may have a limit of its own. A request that is
    /// refused counts nowhere. `None`: nothing limits it.
    pub fn request(&self, wallet: Wallet, key: Option<(i64, u32)>) -> Result<Option<Standing>, LimitError> {
        let rates = &self.0.rates;
        let minute = Span::MINUTE;
        let (by_minute, by_day) = (Subject::WalletByMinute(wallet), Subject::WalletByDay(wallet));
        let mut bounds = vec![
            Bound { subject: by_minute, limit: rates.requests_per_minute, span: minute, of: "wallet" },
            Bound { subject: by_day, limit: rates.requests_per_day, span: Span::DAY, of: "wallet" },
        ];
        if let Some((id, limit)) = key {
            bounds.push(Bound { subject: Subject::Key(id), limit, span: minute, of: "key" });
        }
        unpoisoned(&self.0.callers).take(&bounds, self.0.clock.now())
    }

    /// Counts a request of nobody known.
    pub fn unauthenticated(&self, address: IpAddr) -> Result<Option<Standing>, LimitError> {
        let subject = Subject::Address(address::counted_as_one(address));
        let limit = self.0.rates.unauthenticated_per_minute;
        let bounds = [Bound { subject, limit, span: Span::MINUTE, of: "address" }];
        unpoisoned(&self.0.strangers).take(&bounds, self.0.clock.now())
    }

    /// What was counted here and nobody else knows of yet, of so many at most.
    fn take_fresh(&self, most: usize) -> Vec<(Subject, u32)> {
        let mut fresh = unpoisoned(&self.0.callers).take_fresh(most);
        fresh.extend(unpoisoned(&self.0.strangers).take_fresh(most - fresh.len()));
        fresh
    }

    /// Takes back what could not be told.
    fn give_back_fresh(&self, fresh: Vec<(Subject, u32)>) {
        for (subject, count) in fresh {
            let counters = if subject.is_stranger() { &self.0.strangers } else { &self.0.callers };
            unpoisoned(counters).give_back_fresh(subject, count);
        }
    }

    /// Counts what has come to other nodes.
    fn count_elsewhere(&self, counts: impl IntoIterator<Item = (Subject, u32)>) {
        let now = self.0.clock.now();
        for (subject, count) in counts {
            let counters = if subject.is_stranger() { &self.0.strangers } else { &self.0.callers };
            unpoisoned(counters).add(subject, now, count);
        }
    }

    /// Takes a place among a wallet's requests under way, to be kept for as long as it is.
    pub fn place(&self, wallet: Wallet) -> Result<Place, LimitError> {
        let limit = self.0.rates.concurrent_requests;
        let mut running = unpoisoned(&self.0.running);
        let count = running.get(&wallet).copied().unwrap_or_default();
        if limit > 0 && count >= limit {
            return Err(LimitError::Concurrent(limit));
        }
        running.insert(wallet, count.saturating_add(1));
        Ok(Place { limits: self.clone(), wallet })
    }

    /// Whether a payment may be looked at, which costs calls to the chain.
    ///
    /// What a payer is blamed for anybody can have sent in its name. So that no stranger can shut a
    /// payer out, the payer's count is held only against an address that has failed itself.
    pub fn may_pay(&self, address: IpAddr, payer: Wallet) -> Result<(), LimitError> {
        let limit = self.0.rates.failed_payments_per_minute;
        if limit == 0 {
            return Ok(());
        }
        let now = self.0.clock.now();
        let mut strangers = unpoisoned(&self.0.strangers);
        let address = Subject::FailingAddress(address::counted_as_one(address));
        let of_address = strangers.count(address, now);
        let of_payer = strangers.count(Subject::FailingPayer(payer), now);
        let subject = match (of_address, of_payer) {
            (failed, _) if failed >= limit => address,
            (1.., failed) if failed >= limit => Subject::FailingPayer(payer),
            _ => return Ok(()),
        };
        Err(LimitError::FailedPayments { retry_after_s: strangers.wait_s(subject, limit, now) })
    }

    /// Counts a payment that was refused.
    pub fn payment_failed(&self, address: IpAddr, payer: Wallet) {
        if self.0.rates.failed_payments_per_minute == 0 {
            return;
        }
        let now = self.0.clock.now();
        let mut strangers = unpoisoned(&self.0.strangers);
        strangers.count_one(Subject::FailingAddress(address::counted_as_one(address)), now);
        strangers.count_one(Subject::FailingPayer(payer), now);
    }
}

/// One of a wallet's requests under way. Dropped, it makes room.
pub struct Place {
    limits: Limits,
    wallet: Wallet,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut running = unpoisoned(&self.limits.0.running);
        match running.get_mut(&self.wallet) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(running.remove(&self.wallet)),
        }
    }
}

/// Counters by whom they are for, a bounded number of them.
#[derive(Default)]
struct Counters(HashMap<Subject, Counter>);

struct Counter {
    window: Window,
    used_at_ms: i64,
    /// Counted here, and not told to others yet.
    fresh: u32,
}

impl Counters {
    /// Counts one event against all bounds, or against none and says which refuses it for longest.
    fn take(&mut self, bounds: &[Bound], now: Timestamp) -> Result<Option<Standing>, LimitError> {
        let mut refused: Option<(&Bound, i64)> = None;
        for bound in bounds.iter().filter(|bound| bound.limit > 0) {
            if self.count(bound.subject, now) < bound.limit {
                continue;
            }
            let wait_s = self.wait_s(bound.subject, bound.limit, now);
            if refused.is_none_or(|(_, longest)| wait_s > longest) {
                refused = Some((bound, wait_s));
            }
        }
        if let Some((bound, retry_after_s)) = refused {
            let standing = self.standing(bound, now);
            let period = if bound.span == Span::DAY { "day" } else { "minute" };
            return Err(LimitError::Rate { standing, of: bound.of, period, retry_after_s });
        }
        let mut nearest: Option<Standing> = None;
        for bound in bounds.iter().filter(|bound| bound.limit > 0) {
            self.count_one(bound.subject, now);
            let standing = self.standing(bound, now);
            if nearest.is_none_or(|nearest| standing.remaining < nearest.remaining) {
                nearest = Some(standing);
            }
        }
        Ok(nearest)
    }

    fn standing(&mut self, bound: &Bound, now: Timestamp) -> Standing {
        let remaining = bound.limit.saturating_sub(self.count(bound.subject, now));
        let empty_at = self.0.get(&bound.subject).map_or(i64::MIN, |counter| counter.window.is_empty_at_ms());
        Standing { limit: bound.limit, remaining, resets_at: Timestamp::from_millis(empty_at).max(now) }
    }

    fn count(&mut self, subject: Subject, now: Timestamp) -> u32 {
        self.0.get_mut(&subject).map_or(0, |counter| counter.window.count(now.millis()))
    }

    /// Whole seconds, rounded up, until one more fits.
    fn wait_s(&self, subject: Subject, limit: u32, now: Timestamp) -> i64 {
        let room_at = self.0.get(&subject).map_or(i64::MIN, |counter| counter.window.has_room_at_ms(limit));
        let wait_ms = room_at.saturating_sub(now.millis());
        wait_ms.saturating_add(999).div_euclid(1000).max(1)
    }

    /// Counts one event that has come here.
    fn count_one(&mut self, subject: Subject, now: Timestamp) {
        let counter = self.add(subject, now, 1);
        counter.fresh = counter.fresh.saturating_add(1);
    }

    fn add(&mut self, subject: Subject, now: Timestamp, times: u32) -> &mut Counter {
        if self.0.len() >= MAX_COUNTERS && !self.0.contains_key(&subject) {
            self.make_room(now);
        }
        let new = || Counter { window: Window::new(subject.span()), used_at_ms: 0, fresh: 0 };
        let counter = self.0.entry(subject).or_insert_with(new);
        counter.window.add(now.millis(), times);
        counter.used_at_ms = now.millis();
        counter
    }

    fn take_fresh(&mut self, most: usize) -> Vec<(Subject, u32)> {
        let fresh = self.0.iter_mut().filter(|(_, counter)| counter.fresh > 0).take(most);
        fresh.map(|(subject, counter)| (*subject, std::mem::take(&mut counter.fresh))).collect()
    }

    fn give_back_fresh(&mut self, subject: Subject, count: u32) {
        if let Some(counter) = self.0.get_mut(&subject) {
            counter.fresh = counter.fresh.saturating_add(count);
        }
    }

    /// Forgets what has run out and, if that is not half of all, what was used the longest ago. Half
    /// at a time, so that the next of these is far off.
    fn make_room(&mut self, now: Timestamp) {
        self.0.retain(|_, counter| counter.window.count(now.millis()) > 0);
        let excess = self.0.len().saturating_sub(MAX_COUNTERS / 2);
        if excess == 0 {
            return;
        }
        let mut used: Vec<i64> = self.0.values().map(|counter| counter.used_at_ms).collect();
        let (_, pivot, _) = used.select_nth_unstable(excess - 1);
        let pivot = *pivot;
        self.0.retain(|_, counter| counter.used_at_ms > pivot);
    }
}

fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_seconds(1_775_563_200);

    fn limits(rates: Rates) -> (Limits, Clock) {
        let clock = Clock::fixed(NOW);
        (Limits::new(rates, clock.clone()), clock)
    }

    fn wallet(number: u8) -> Wallet {
        Wallet([number; 20].into())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn retry_after(refused: Result<Option<Standing>, LimitError>) -> i64 {
        match refused {
            Err(LimitError::Rate { retry_after_s, standing, .. }) => {
                assert_eq!(standing.remaining, 0);
                retry_after_s
            }
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn a_wallet_is_limited_over_a_sliding_minute() {
        let (limits, clock) = limits(Rates { requests_per_minute: 3, ..Rates::default() });
        for remaining in [2, 1, 0] {
            let standing = limits.request(wallet(1), None).unwrap().unwrap();
            assert_eq!((standing.limit, standing.remaining), (3, remaining));
            assert!(standing.resets_at >= clock.now().plus_seconds(60));
            clock.advance_seconds(10);
        }
        // The first came 30 seconds ago; being refused does not count and makes nothing longer.
        for _ in 0..5 {
            assert_eq!(retry_after(limits.request(wallet(1), None)), 30);
        }
        limits.request(wallet(2), None).unwrap();
        clock.advance_seconds(29);
        assert_eq!(retry_after(limits.request(wallet(1), None)), 1);
        clock.advance_seconds(1);
        limits.request(wallet(1), None).unwrap();
        assert_eq!(retry_after(limits.request(wallet(1), None)), 10);
    }

    #[test]
    fn a_day_is_limited_beside_its_minutes() {
        let rates = Rates { requests_per_minute: 2, requests_per_day: 3, ..Rates::default() };
        let (limits, clock) = limits(rates);
        limits.request(wallet(1), None).unwrap();
        limits.request(wallet(1), None).unwrap();
        assert_eq!(retry_after(limits.request(wallet(1), None)), 60);
        clock.advance_seconds(3600);
        let standing = limits.request(wallet(1), None).unwrap().unwrap();
        assert_eq!((standing.limit, standing.remaining), (3, 0));
        assert_eq!(retry_after(limits.request(wallet(1), None)), 86_400 - 3600);
        clock.advance_seconds(86_400 - 3600);
        limits.request(wallet(1), None).unwrap();
    }

    #[test]
    fn a_key_has_a_limit_of_its_own_within_its_wallets() {
        let (limits, _) = limits(Rates { requests_per_minute: 3, ..Rates::default() });
        let standing = limits.request(wallet(1), Some((7, 1))).unwrap().unwrap();
        assert_eq!((standing.limit, standing.remaining), (1, 0));
        assert_eq!(retry_after(limits.request(wallet(1), Some((7, 1)))), 60);
        // What the key was refused was not counted for the wallet.
        limits.request(wallet(1), Some((8, 10))).unwrap();
        limits.request(wallet(1), None).unwrap();
        retry_after(limits.request(wallet(1), Some((8, 10))));
    }

    #[test]
    fn zero_is_no_limit() {
        let (limits, _) = limits(Rates::default());
        for _ in 0..10_000 {
            assert_eq!(limits.request(wallet(1), None), Ok(None));
            assert_eq!(limits.unauthenticated(ip("1.2.3.4")), Ok(None));
            limits.payment_failed(ip("1.2.3.4"), wallet(1));
            assert_eq!(limits.may_pay(ip("1.2.3.4"), wallet(1)), Ok(()));
        }
        assert!(unpoisoned(&limits.0.callers).0.is_empty() && unpoisoned(&limits.0.strangers).0.is_empty());
    }

    #[test]
    fn strangers_are_limited_by_address() {
        let (limits, clock) = limits(Rates { unauthenticated_per_minute: 1, ..Rates::default() });
        limits.unauthenticated(ip("2001:db8::1")).unwrap();
        assert_eq!(retry_after(limits.unauthenticated(ip("2001:db8::2"))), 60);
        limits.unauthenticated(ip("2001:db8:0:1::1")).unwrap();
        clock.advance_seconds(60);
        limits.unauthenticated(ip("2001:db8::1")).unwrap();
    }

    #[test]
    fn places_are_given_back() {
        let (limits, _) = limits(Rates { concurrent_requests: 2, ..Rates::default() });
        let first = limits.place(wallet(1)).unwrap();
        let second = limits.place(wallet(1)).unwrap();
        assert_eq!(limits.place(wallet(1)).err(), Some(LimitError::Concurrent(2)));
        drop(limits.place(wallet(2)).unwrap());
        drop(first);
        let third = limits.place(wallet(1)).unwrap();
        assert!(limits.place(wallet(1)).is_err());
        drop((second, third));
        assert!(unpoisoned(&limits.0.running).is_empty());
    }

    #[test]
    fn refused_payments_are_bounded_and_shut_no_payer_out() {
        let (limits, clock) = limits(Rates { failed_payments_per_minute: 3, ..Rates::default() });
        let (bad, good) = (ip("1.2.3.4"), ip("5.6.7.8"));
        for _ in 0..3 {
            limits.may_pay(bad, wallet(1)).unwrap();
            limits.payment_failed(bad, wallet(1));
        }
        let refused = Err(LimitError::FailedPayments { retry_after_s: 60 });
        // The address is refused, whoever it names; the payer goes on from where it has not failed …
        assert_eq!(limits.may_pay(bad, wallet(2)), refused);
        assert_eq!(limits.may_pay(good, wallet(1)), Ok(()));
        // … and who spreads one payer over addresses gets one failure from each.
        limits.payment_failed(good, wallet(1));
        assert_eq!(limits.may_pay(good, wallet(1)), refused);
        assert_eq!(limits.may_pay(good, wallet(2)), Ok(()));
        clock.advance_seconds(60);
        assert_eq!(limits.may_pay(bad, wallet(1)), Ok(()));
    }

    #[test]
    fn counters_are_bounded_and_the_oldest_go_first() {
        let (limits, clock) = limits(Rates { requests_per_minute: 1, ..Rates::default() });
        let many = |from: usize, to: usize| {
            for number in from..to {
                let mut bytes = [0; 20];
                bytes[..8].copy_from_slice(&number.to_be_bytes());
                limits.request(Wallet(bytes.into()), None).unwrap();
            }
        };
        many(0, MAX_COUNTERS / 2);
        clock.advance_seconds(1);
        many(MAX_COUNTERS / 2, MAX_COUNTERS);
        limits.request(wallet(255), None).unwrap();
        assert!(unpoisoned(&limits.0.callers).0.len() <= MAX_COUNTERS / 2 + 1);
        // The later half is still known, and so is the newest.
        retry_after(limits.request(wallet(255), None));
        let mut bytes = [0; 20];
        bytes[..8].copy_from_slice(&(MAX_COUNTERS - 1).to_be_bytes());
        retry_after(limits.request(Wallet(bytes.into()), None));
    }

    #[test]
    fn a_subject_is_what_its_text_says() {
        for subject in [
            Subject::WalletByMinute(wallet(1)),
            Subject::WalletByDay(wallet(2)),
            Subject::Key(7),
            Subject::Address(ip("2001:db8::1")),
            Subject::FailingAddress(ip("10.0.0.1")),
            Subject::FailingPayer(wallet(3)),
        ] {
            assert_eq!(subject.to_string().parse(), Ok(subject));
        }
        for text in ["", "minute", "minute:1", "key:x", "other:1"] {
            assert_eq!(text.parse::<Subject>(), Err(()), "{text}");
        }
    }

    #[test]
    fn what_came_elsewhere_counts_and_is_not_told_again() {
        let rates = Rates { requests_per_minute: 5, unauthenticated_per_minute: 1, ..Rates::default() };
        let (here, clock) = limits(rates);
        let there = Limits::new(rates, clock.clone());
        for _ in 0..3 {
            here.request(wallet(1), None).unwrap();
        }
        here.unauthenticated(ip("10.0.0.1")).unwrap();
        let told = here.take_fresh(10);
        assert!(here.take_fresh(10).is_empty());
        there.count_elsewhere(told.iter().copied());
        assert!(there.take_fresh(10).is_empty(), "nobody tells what others have told");
        assert_eq!(there.request(wallet(1), None).unwrap().unwrap().remaining, 1);
        there.request(wallet(1), None).unwrap();
        assert_eq!(retry_after(there.request(wallet(1), None)), 60);
        assert!(there.unauthenticated(ip("10.0.0.1")).is_err());
        // What could not be told is told later, with what came meanwhile.
        here.request(wallet(1), None).unwrap();
        here.give_back_fresh(told);
        assert_eq!(here.take_fresh(1).len(), 1);
        assert_eq!(here.take_fresh(10).len(), 1);
    }
}
