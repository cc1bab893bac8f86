//! Whether an upstream, or one of its keys, is worth asking: a circuit breaker.
//!
//! One that took no connection a few times in a row is *open*: nobody asks it until it has had time to recover;
//! then one request does, and if that goes well, all do again. One that has asked for a pause, or that comes to
//! errors only, is *cooling*: it is asked where nobody else is left. More than that nothing brings about that was
//! sent a request, since the request can be the reason for it, and no client is to take a model away from the others.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Milliseconds of the process's own clock, which never goes back.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Moment(u64);

static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);

impl Moment {
    pub fn now() -> Self {
        // Never the zero that stands for none.
        Self(millis(BEGINNING.elapsed()).saturating_add(1))
    }

    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(millis(duration)))
    }

    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The better before the worse.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum State {
    Well,
    /// Asked where nobody else is left.
    Cooling,
    /// Not asked. It may be from this moment on.
    Open(Moment),
}

/// Read at every request, so it is a few words that nobody locks.
#[derive(Default, Debug)]
pub struct Health {
    /// Errors in a row.
    errors: AtomicU32,
    /// Times in a row that there was no answer at all.
    absences: AtomicU32,
    /// 0: it is not open.
    open_until: AtomicU64,
    cooling_until: AtomicU64,
}

impl Health {
    pub fn state(&self, now: Moment) -> State {
        let open_until = self.open_until.load(Ordering::Relaxed);
        if open_until > now.0 {
            return State::Open(Moment(open_until));
        }
        if self.cooling_until.load(Ordering::Relaxed) > now.0 { State::Cooling } else { State::Well }
    }

    /// Whether it is well without anybody having to try.
    pub fn is_well(&self, now: Moment) -> bool {
        self.open_until.load(Ordering::Relaxed) == 0 && self.state(now) == State::Well
    }

    /// Whether it may be asked now. Of those who come when it was open and has had its time, the first may; the
    /// others wait for what comes of that, but no longer than `probing`.
    pub fn may_ask(&self, now: Moment, probing: Duration) -> bool {
        let open_until = self.open_until.load(Ordering::Relaxed);
        if open_until == 0 {
            return true;
        }
        let until = now.plus(probing).0;
        open_until <= now.0
            && self
                .open_until
                .compare_exchange(open_until, until, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Notes that it answered, rightly or wrongly. Whether it had been open.
    pub fn answered(&self) -> bool {
        reset(&self.absences);
        self.open_until.load(Ordering::Relaxed) != 0 && self.open_until.swap(0, Ordering::Relaxed) != 0
    }

    /// Notes that it answered as it should.
    pub fn succeeded(&self) {
        reset(&self.errors);
        if self.cooling_until.load(Ordering::Relaxed) != 0 {
            self.cooling_until.store(0, Ordering::Relaxed);
        }
    }

    /// Notes an error. How many there are in a row.
    pub fn erred(&self) -> u32 {
        count(&self.errors)
    }

    /// Notes that there was no answer. How many times in a row.
    pub fn was_absent(&self) -> u32 {
        count(&self.absences)
    }

    pub fn open(&self, now: Moment, cooldown: Duration) {
        self.open_until.store(now.plus(cooldown).0, Ordering::Relaxed);
    }

    /// Puts it behind all others for a while.
    pub fn cool(&self, now: Moment, pause: Duration) {
        self.cooling_until.fetch_max(now.plus(pause).0, Ordering::Relaxed);
    }
}

fn reset(counter: &AtomicU32) {
    // Read first: all requests share it, and most have nothing to change.
    if counter.load(Ordering::Relaxed) != 0 {
        counter.store(0, Ordering::Relaxed);
    }
}

fn count(counter: &AtomicU32) -> u32 {
    // What comes to the end of the count has been failing for long, and a few more make no difference.
    counter.fetch_add(1, Ordering::Relaxed).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_was_open_is_tried_by_one() {
        let health = Health::default();
        assert_eq!((health.was_absent(), health.was_absent()), (1, 2));
        assert_eq!((health.answered(), health.was_absent()), (false, 1));
        health.open(Moment(1000), SECOND);
        assert_eq!(health.state(Moment(1999)), State::Open(Moment(2000)));
        assert!(!health.may_ask(Moment(1999), SECOND));
        // One probe, and nobody beside it.
        assert!(health.may_ask(Moment(2000), SECOND));
        assert!(!health.may_ask(Moment(2000), SECOND));
        assert!(health.answered() && !health.answered());
        assert_eq!(health.state(Moment(2100)), State::Well);
        assert!(health.may_ask(Moment(2100), SECOND));
    }

    #[test]
    fn a_probe_that_nobody_hears_of_again_is_followed_by_another() {
        let health = Health::default();
        health.open(Moment(1), SECOND);
        assert!(health.may_ask(Moment(1001), SECOND));
        assert!(!health.may_ask(Moment(2000), SECOND));
        assert!(health.may_ask(Moment(2001), SECOND));
    }

    #[test]
    fn one_that_cools_is_not_open() {
        let health = Health::default();
        health.cool(Moment(1), SECOND);
        // A shorter pause takes nothing away from a longer one.
        health.cool(Moment(2), SECOND / 2);
        assert_eq!(health.state(Moment(1000)), State::Cooling);
        assert!(health.may_ask(Moment(1000), SECOND));
        assert_eq!(health.state(Moment(1001)), State::Well);
        assert_eq!((health.erred(), health.erred()), (1, 2));
        health.cool(Moment(1001), SECOND);
        health.succeeded();
        assert_eq!(health.erred(), 1);
        assert_eq!(health.state(Moment(1001)), State::Well);
    }
}
