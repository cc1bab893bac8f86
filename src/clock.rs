//! Time as a value that is handed in, so that a test can set it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;

const MS_PER_DAY: i64 = 86_400_000;

/// Unix time in milliseconds.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    pub const fn from_millis(ms: i64) -> Self {
        Self(ms)
    }

    pub const fn from_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_mul(1000))
    }

    pub const fn millis(self) -> i64 {
        self.0
    }

    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    pub const fn plus_seconds(self, seconds: i64) -> Self {
        Self(self.0.saturating_add(seconds.saturating_mul(1000)))
    }

    /// The UTC day this is in, counted from 1970.
    pub const fn utc_day(self) -> i64 {
        self.0.div_euclid(MS_PER_DAY)
    }

    /// When the UTC day this is in ends.
    pub const fn end_of_utc_day(self) -> Self {
        Self(self.utc_day().saturating_add(1).saturating_mul(MS_PER_DAY))
    }

    /// Any RFC 3339 time, cut to milliseconds.
    pub fn parse_rfc3339(text: &str) -> Option<Self> {
        let at = OffsetDateTime::parse(text, &Rfc3339).ok()?;
        i64::try_from(at.unix_timestamp_nanos().div_euclid(1_000_000)).ok().map(Self)
    }

    /// RFC 3339 with milliseconds and `Z`, as every time in an answer.
    pub fn rfc3339(self) -> String {
        let format =
            format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000_000)
            .ok()
            .and_then(|at| at.format(&format).ok())
            .unwrap_or_else(|| "9999-12-31T23:59:59.999Z".into())
    }
}

/// The system's clock, or one that stands where a test put it.
#[derive(Clone, Debug)]
pub enum Clock {
    System,
    Fixed(Arc<AtomicI64>),
}

impl Clock {
    pub fn fixed(at: Timestamp) -> Self {
        Self::Fixed(Arc::new(AtomicI64::new(at.0)))
    }

    #[expect(clippy::disallowed_methods, reason = "the one place that reads the system's time")]
    pub fn now(&self) -> Timestamp {
        match self {
            Self::Fixed(ms) => Timestamp(ms.load(Ordering::SeqCst)),
            Self::System => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
            }
        }
    }

    /// Moves a fixed clock; the system's clock is not ours to move.
    pub fn advance_seconds(&self, seconds: i64) {
        if let Self::Fixed(ms) = self {
            ms.fetch_add(seconds.saturating_mul(1000), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc3339_with_milliseconds() {
        assert_eq!(Timestamp::from_millis(1_775_563_200_007).rfc3339(), "2026-04-07T12:00:00.007Z");
        assert_eq!(Timestamp::from_millis(0).rfc3339(), "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn times_are_read_in_any_zone() {
        let noon = Some(Timestamp::from_millis(1_775_563_200_007));
        for text in ["2026-04-07T12:00:00.007Z", "2026-04-07T14:00:00.0079+02:00"] {
            assert_eq!(Timestamp::parse_rfc3339(text), noon, "{text}");
        }
        for bad in ["", "2026-04-07", "2026-04-07T12:00:00", "1775563200", "2026-13-07T12:00:00Z"] {
            assert_eq!(Timestamp::parse_rfc3339(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_day_begins_at_midnight_utc() {
        let noon = Timestamp::from_millis(1_775_563_200_007);
        assert_eq!(noon.end_of_utc_day().rfc3339(), "2026-04-08T00:00:00.000Z");
        assert_eq!(noon.end_of_utc_day().utc_day(), noon.utc_day() + 1);
        assert_eq!(noon.end_of_utc_day().plus_seconds(-1).utc_day(), noon.utc_day());
    }
}
