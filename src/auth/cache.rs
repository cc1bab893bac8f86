//! Keys that were asked for a moment ago, so that a busy one is not looked up for each request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::auth::Principal;

/// How long a key is taken for what it was. A change on another node is seen here by then; well within the
/// second that is promised, since reading it takes time as well.
const FRESH: Duration = Duration::from_millis(500);
/// Keys remembered at once. Each has a few hundred bytes, and one that is not found is only looked up.
const MOST: usize = 10_000;

/// A key by the hash under which it is kept.
pub type Hash = [u8; 32];

/// Only keys that are good are remembered: what is no key must not push out what is one.
#[derive(Clone, Default)]
pub struct KeyCache(Arc<Mutex<Remembered>>);

#[derive(Default)]
struct Remembered {
    keys: HashMap<Hash, Known>,
    /// Counts the changes made here. What was read before one is not remembered after it.
    changes: u64,
}

struct Known {
    principal: Principal,
    read_at: Instant,
}

/// Taken before a key is read from the database.
#[derive(Copy, Clone)]
pub struct Before(u64);

impl KeyCache {
    /// The principal of a key that was read a moment ago; otherwise what [`Self::remember`] asks for.
    pub fn find(&self, hash: &Hash, now: Instant) -> Result<Principal, Before> {
        let remembered = self.remembered();
        match remembered.keys.get(hash) {
            Some(known) if now.saturating_duration_since(known.read_at) < FRESH => {
                Ok(known.principal.clone())
            }
            _ => Err(Before(remembered.changes)),
        }
    }

    /// Keeps what was read at or after `read_at`, unless a key was changed here meanwhile.
    pub fn remember(&self, before: Before, hash: Hash, principal: &Principal, read_at: Instant) {
        let mut remembered = self.remembered();
        if remembered.changes != before.0 {
            return;
        }
        if remembered.keys.len() >= MOST && !remembered.keys.contains_key(&hash) {
            let is_fresh = |known: &Known| read_at.saturating_duration_since(known.read_at) < FRESH;
            remembered.keys.retain(|_, known| is_fresh(known));
            if remembered.keys.len() >= MOST {
                return;
            }
        }
        remembered.keys.insert(hash, Known { principal: principal.clone(), read_at });
    }

    /// Forgets a key that is being changed here, when what is returned is dropped: once the change is
    /// committed, and before anybody is told of it.
    pub fn forget_after(&self, id: i64) -> Forgetting<'_> {
        Forgetting { cache: self, id }
    }

    fn forget(&self, id: i64) {
        let mut remembered = self.remembered();
        remembered.changes = remembered.changes.wrapping_add(1);
        remembered.keys.retain(|_, known| known.principal.api_key_id != Some(id));
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Forgetting<'a> {
    cache: &'a KeyCache,
    id: i64,
}

impl Drop for Forgetting<'_> {
    fn drop(&mut self) {
        self.cache.forget(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Wallet;

    fn key(id: i64) -> Principal {
        Principal { api_key_id: Some(id), ..Principal::of_wallet(Wallet([1; 20].into())) }
    }

    #[test]
    fn a_key_is_known_for_a_moment() {
        let (cache, now) = (KeyCache::default(), Instant::now());
        let before = cache.find(&[1; 32], now).unwrap_err();
        cache.remember(before, [1; 32], &key(1), now);
        assert_eq!(cache.find(&[1; 32], now).ok(), Some(key(1)));
        assert_eq!(cache.find(&[1; 32], now + FRESH - Duration::from_millis(1)).ok(), Some(key(1)));
        assert!(cache.find(&[1; 32], now + FRESH).is_err());
        assert!(cache.find(&[2; 32], now).is_err());
    }

    #[test]
    fn a_change_is_seen_at_once() {
        let (cache, now) = (KeyCache::default(), Instant::now());
        for id in [1, 2] {
            let hash = [u8::try_from(id).unwrap(); 32];
            let before = cache.find(&hash, now).unwrap_err();
            cache.remember(before, hash, &key(id), now);
        }
        let change = cache.forget_after(1);
        assert!(cache.find(&[1; 32], now).is_ok());
        drop(change);
        assert!(cache.find(&[1; 32], now).is_err());
        assert_eq!(cache.find(&[2; 32], now).ok(), Some(key(2)));
    }

    #[test]
    fn what_was_read_before_a_change_is_not_remembered_after_it() {
        let (cache, now) = (KeyCache::default(), Instant::now());
        let before = cache.find(&[1; 32], now).unwrap_err();
        cache.forget(1);
        cache.remember(before, [1; 32], &key(1), now);
        assert!(cache.find(&[1; 32], now).is_err());
    }

    #[test]
    fn a_bounded_number_is_remembered_and_stale_ones_make_room() {
        let (cache, now) = (KeyCache::default(), Instant::now());
        let hash = |number: usize| {
            let mut hash = [0; 32];
            hash[..8].copy_from_slice(&number.to_be_bytes());
            hash
        };
        for number in 0..MOST + 5 {
            let before = cache.find(&hash(number), now).unwrap_err();
            cache.remember(before, hash(number), &key(1), now);
        }
        assert!(cache.find(&hash(MOST - 1), now).is_ok());
        assert!(cache.find(&hash(MOST), now).is_err());
        let later = now + FRESH;
        let before = cache.find(&hash(MOST), later).unwrap_err();
        cache.remember(before, hash(MOST), &key(1), later);
        assert!(cache.find(&hash(MOST), later).is_ok());
        assert_eq!(cache.remembered().keys.len(), 1);
    }
}
