//! What becomes of a credit: final with its block, or undone with it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::chain::{Depth, Sighting};
use crate::payments::{Payment, PaymentError, Payments, SWEEP_LIMIT, State, store};

impl Payments {
    /// Marks credited payments final, and notices those whose transfer the chain has undone.
    pub(super) async fn follow_to_finality(&self) -> Result<(), PaymentError> {
        let finalized = self.0.chain.finalized().await?.number;
        let mut hashes: BTreeMap<u64, Option<String>> = BTreeMap::new();
        let mut last = 0;
        loop {
            let page =
                store::unfinalized(&self.0.db, self.chain_id(), self.asset(), last, SWEEP_LIMIT).await?;
            let Some(payment) = page.last() else { return Ok(()) };
            last = payment.id;
            for payment in page {
                let block =
                    payment.block_number.and_then(|block| u64::try_from(block).ok()).unwrap_or_default();
                if block > finalized {
                    // Not final yet: while its block is still in the chain, so is the transfer.
                    if let Entry::Vacant(vacant) = hashes.entry(block) {
                        let hash = self.0.chain.block_hash(block).await?;
                        vacant.insert(hash.map(|hash| store::hex_of(hash.as_slice())));
                    }
                    if hashes.get(&block).and_then(Option::as_ref) == payment.block_hash.as_ref() {
                        continue;
                    }
                }
                if let Err(error) = self.settle_finality(&payment).await {
                    tracing::warn!(payment = payment.id, %error, "finality not settled; it is tried again");
                }
            }
        }
    }

    async fn settle_finality(&self, payment: &Payment) -> Result<(), PaymentError> {
        let now = self.0.clock.now();
        if let Some(found) = &self.final_transfer(payment).await? {
            let mut tx = self.0.db.begin().await?;
            if store::advance(&mut tx, payment.id, State::Credited, State::Finalized, None, now).await? {
                store::locate(&mut tx, payment.id, found).await?;
            }
            return Ok(tx.commit().await?);
        }
        match self.sight(payment, Depth::Head).await?.sighting {
            Sighting::Agreed(found) | Sighting::Alone(found) => {
                let mut tx = self.0.db.begin().await?;
                store::locate(&mut tx, payment.id, &found).await?;
                return Ok(tx.commit().await?);
            }
            Sighting::Disputed(_) => return Ok(()),
            Sighting::Nowhere => {}
        }
        tracing::error!(payment = payment.id, wallet = %payment.authorization.from, "a credited transfer was undone");
        if self.expiry(payment).await?.is_some() {
            return self.reverse(payment).await;
        }
        // It can still go through. Somebody else's transaction may have brought it: then there is none
        // of ours yet.
        if self.nonce_is_lost(payment).await?
            && self.may_send_again(payment).await?
            && !self.is_facilitators_turn(payment, true).await?
        {
            self.sign_another(payment, payment.state).await?;
        }
        // A node that will not take what we have is no surprise.
        let _ = self.send(payment).await;
        Ok(())
    }

    /// Takes back what was credited for a transfer that is gone for good.
    async fn reverse(&self, payment: &Payment) -> Result<(), PaymentError> {
        let wallet = payment.authorization.from;
        let why = "the chain undid the transfer, and the authorization has expired";
        let now = self.0.clock.now();
        let mut tx = self.0.db.begin().await?;
        if !store::advance(&mut tx, payment.id, State::Credited, State::Reorged, Some(why), now).await? {
            return Ok(());
        }
        let debt = self.0.ledger.reverse(&mut tx, wallet, payment.value, payment.id).await?;
        tx.commit().await?;
        metrics::counter!("farebox_reversed_micro_total")
            .increment(u64::try_from(payment.value.get()).unwrap_or_default());
        tracing::error!(
            payment = payment.id, %wallet, amount_micro = payment.value.get(), debt_micro = debt.get(),
            "a credited payment is reversed"
        );
        Ok(())
    }
}
