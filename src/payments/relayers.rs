//! The relayers' side of settling: their account nonces, fees and gas.
//!
//! A chain takes an account's transactions in the order of their nonces, so one that is stuck holds up
//! all behind it, whichever payments they are for.

use std::ops::Range;

use alloy::primitives::U256;

use crate::chain::{ChainError, Depth, RelayedCall};
use crate::id::Wallet;
use crate::payments::store::{self, OpenTransaction};
use crate::payments::{PaymentError, Payments, RelayerGas, unpoisoned};

/// A transaction not mined for this long is replaced: four blocks on Base, so that its successor can be
/// mined while the payer still waits for the answer.
const STUCK_SECONDS: i64 = 8;
/// Account nonces filled at one look; there is never more than one gap unless an endpoint lied.
const FILLED_AT_ONCE: u64 = 16;
/// A relayer that cannot pay for this many transfers at the present fee is low on gas.
const FEW_TRANSFERS: u64 = 50;
const TRANSFER_GAS: u64 = 100_000;

/// A gauge is a float in the Prometheus format; it is read by people, and no sum rests on it.
#[expect(clippy::cast_precision_loss, reason = "shown, never reckoned with")]
fn show_gas(relayer: Wallet, wei: U256) {
    let gwei = i64::try_from(wei / U256::from(1_000_000_000_u64)).unwrap_or(i64::MAX);
    metrics::gauge!("farebox_relayer_gas_gwei", "relayer" => relayer.to_string()).set(gwei as f64);
}

impl Payments {
    /// The relayer that sends the next transaction for a payment: they take turns, as far as they
    /// have gas.
    pub(super) fn relayer_for(&self, payment_id: i64) -> Wallet {
        let mut relayers: Vec<_> = self.0.chain.relayers().collect();
        let low: Vec<_> = self.gas().iter().filter(|gas| gas.is_low).map(|gas| gas.relayer).collect();
        if low.len() < relayers.len() {
            relayers.retain(|relayer| !low.contains(relayer));
        }
        let turn = payment_id.rem_euclid(i64::try_from(relayers.len()).unwrap_or(1).max(1));
        relayers[usize::try_from(turn).unwrap_or_default()]
    }

    async fn look_at_gas(&self) -> Result<(), PaymentError> {
        let chain = &self.0.chain;
        let transfer = U256::from(chain.fees().await?.max_fee) * U256::from(TRANSFER_GAS);
        let mut gas = Vec::new();
        for relayer in chain.relayers() {
            let wei = chain.gas_balance(relayer).await?;
            show_gas(relayer, wei);
            gas.push(RelayerGas { relayer, wei, is_low: wei < transfer * U256::from(FEW_TRANSFERS) });
        }
        *unpoisoned(&self.0.gas) = gas;
        Ok(())
    }

    /// A nonce that the chain does not take holds up all behind it: what got lost is sent again,
    /// and what is stuck is replaced by the same call at a higher fee.
    pub(super) async fn tend_relayers(&self) -> Result<(), PaymentError> {
        let looked = self.look_at_gas().await;
        for relayer in store::relayers(&self.0.db, self.chain_id()).await? {
            if let Err(error) = self.tend(relayer).await {
                tracing::warn!(%relayer, %error, "a stuck transaction is not replaced yet");
            }
        }
        looked
    }

    async fn tend(&self, relayer: Wallet) -> Result<(), PaymentError> {
        let now = self.0.clock.now();
        let settled = self.0.chain.taken_nonces(relayer, Depth::Finalized).await?;
        let mut tx = self.0.db.begin().await?;
        store::mark_settled(&mut tx, self.chain_id(), relayer, settled, now).await?;
        tx.commit().await?;
        let taken = self.0.chain.taken_nonces(relayer, Depth::Head).await?;
        let lowest = store::lowest_open(&self.0.db, self.chain_id(), relayer, taken).await?;
        let Some(open) = lowest.filter(|open| open.created_at.plus_seconds(STUCK_SECONDS) <= now) else {
            return Ok(());
        };
        // A nonce below that is nobody's is what it waits for.
        let gap = taken..open.signed.account_nonce;
        if gap.is_empty() { self.replace(&open).await } else { self.fill(relayer, gap).await }
    }

    async fn replace(&self, open: &OpenTransaction) -> Result<(), PaymentError> {
        let chain = &self.0.chain;
        let Some(payment) = store::get(&self.0.db, open.payment_id).await? else { return Ok(()) };
        let old = &open.signed;
        // The old one may only have been dropped; nodes refuse it if they have it.
        let resent = chain.broadcast(&old.raw).await;
        let Some(fees) = chain.replacement_fees(old.fees).await? else {
            tracing::warn!(tx = %old.hash, "a transaction is stuck at the highest fee allowed");
            return Ok(resent?);
        };
        let settlement = match chain.settlement_call(&payment.authorization, &payment.signature).await {
            // It cannot be settled so any more, and its nonce is waited for all the same.
            Err(ChainError::Reverted(_)) => RelayedCall::nothing(old.relayer),
            settlement => settlement?,
        };
        let signed = match chain.sign(old.relayer, settlement, old.account_nonce, fees) {
            Ok(signed) => signed,
            Err(error @ ChainError::UnknownRelayer(_)) => {
                tracing::warn!(%error, tx = %old.hash, "a stuck transaction cannot be replaced");
                return Ok(());
            }
            Err(other) => return Err(other.into()),
        };
        let mut tx = self.0.db.begin().await?;
        store::insert_transaction(&mut tx, payment.id, &signed, self.0.clock.now()).await?;
        tx.commit().await?;
        tracing::info!(payment = payment.id, old = %old.hash, new = %signed.hash, "a stuck transaction is replaced");
        Ok(chain.broadcast(&signed.raw).await?)
    }

    /// Fills account nonces that were never signed for, or not by us, and that later ones wait for.
    /// Nothing rests on these transactions, so they are not kept: if one is lost, the next look makes
    /// another.
    async fn fill(&self, relayer: Wallet, gap: Range<u64>) -> Result<(), PaymentError> {
        let chain = &self.0.chain;
        tracing::warn!(%relayer, from = gap.start, to = gap.end, "a gap in a relayer's account nonces is filled");
        let now = chain.fees().await?;
        // Above what a filler of the look before offered, unless the cap forbids it.
        let fees = chain.replacement_fees(now).await?.unwrap_or(now);
        for nonce in gap.take(usize::try_from(FILLED_AT_ONCE).unwrap_or(usize::MAX)) {
            chain.broadcast(&chain.sign(relayer, RelayedCall::nothing(relayer), nonce, fees)?.raw).await?;
        }
        Ok(())
    }
}
