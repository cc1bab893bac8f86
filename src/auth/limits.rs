//! What a key may do at most, so that it can be handed to somebody, or something, else.

use std::sync::Arc;

use crate::auth::Principal;
use crate::clock::Timestamp;
use crate::id::Wallet;
use crate::money::MicroUsdc;

/// The limits of a key; `None` is none. The caps are held by the ledger, with the hold itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KeyLimits {
    pub expires_at: Option<Timestamp>,
    pub spend_cap: Option<MicroUsdc>,
    /// Of a UTC day.
    pub spend_cap_per_day: Option<MicroUsdc>,
    /// Ids of the models it may call.
    pub allowed_models: Option<Arc<[String]>>,
    pub requests_per_minute: Option<u32>,
}

impl KeyLimits {
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

/// A change of limits: of each, `None` leaves it, `Some(None)` takes it away.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LimitChanges {
    pub expires_at: Option<Option<Timestamp>>,
    pub spend_cap: Option<Option<MicroUsdc>>,
    pub spend_cap_per_day: Option<Option<MicroUsdc>>,
    pub allowed_models: Option<Option<Arc<[String]>>>,
    pub requests_per_minute: Option<Option<u32>>,
}

impl LimitChanges {
    pub fn apply(self, limits: KeyLimits) -> KeyLimits {
        KeyLimits {
            expires_at: self.expires_at.unwrap_or(limits.expires_at),
            spend_cap: self.spend_cap.unwrap_or(limits.spend_cap),
            spend_cap_per_day: self.spend_cap_per_day.unwrap_or(limits.spend_cap_per_day),
            allowed_models: self.allowed_models.unwrap_or(limits.allowed_models),
            requests_per_minute: self.requests_per_minute.unwrap_or(limits.requests_per_minute),
        }
    }
}

impl Principal {
    /// A wallet that proved itself without a key.
    pub fn of_wallet(wallet: Wallet) -> Self {
        Self { wallet, api_key_id: None, key_limits: KeyLimits::default() }
    }

    /// Whether this caller may call a model.
    pub fn may_call(&self, model: &str) -> bool {
        let allowed = self.key_limits.allowed_models.as_ref();
        allowed.is_none_or(|allowed| allowed.iter().any(|id| id == model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_touches_what_it_names() {
        let limits = KeyLimits {
            spend_cap: Some(MicroUsdc::new(5)),
            requests_per_minute: Some(3),
            ..KeyLimits::default()
        };
        assert_eq!(LimitChanges::default().apply(limits.clone()), limits);
        let change = LimitChanges {
            spend_cap: Some(None),
            spend_cap_per_day: Some(Some(MicroUsdc::new(7))),
            ..LimitChanges::default()
        };
        let changed = change.apply(limits.clone());
        assert_eq!(
            changed,
            KeyLimits { spend_cap: None, spend_cap_per_day: Some(MicroUsdc::new(7)), ..limits }
        );
    }

    #[test]
    fn a_key_has_expired_at_its_time() {
        let at = Timestamp::from_seconds(1_775_563_200);
        let limits = KeyLimits { expires_at: Some(at), ..KeyLimits::default() };
        assert!(!limits.is_expired(at.plus_seconds(-1)));
        assert!(limits.is_expired(at));
        assert!(!KeyLimits::default().is_expired(at));
    }
}
