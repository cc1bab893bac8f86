//! Places where a test can have the process die at once, as a power cut or `kill -9` would end it.
//!
//! The environment variable `FAREBOX_CRASH_AT` names one; without it a failpoint is one comparison
//! with nothing. It is read once, so a running server cannot be made to crash by anybody.

use std::sync::OnceLock;

/// Dies here if this is the place that `FAREBOX_CRASH_AT` names.
pub fn reached(place: &'static str) {
    static CRASH_AT: OnceLock<Option<String>> = OnceLock::new();
    if CRASH_AT.get_or_init(|| std::env::var("FAREBOX_CRASH_AT").ok()).as_deref() == Some(place) {
        std::process::abort();
    }
}
