//! Driving a payment from where it stands to where it rests: sign, broadcast, watch, credit.
//!
//! Several may drive the same payment, in one process or on two nodes: each step is a conditional
//! move in the database, so it is taken once, and broadcasting the same bytes again harms nobody.

use std::time::Duration;

use tokio::sync::watch;

use crate::chain::{Block, ChainError, FoundTransfer, TxStatus};
use crate::payments::store;
use crate::payments::{Payment, PaymentError, Payments, SETTLEMENT_WAIT, SWEEP_LIMIT, State, unpoisoned};

/// The first look after a broadcast; each look after it waits half as long again, up to …
const FIRST_LOOK: Duration = Duration::from_millis(200);
/// … this.
const LONGEST_LOOK: Duration = Duration::from_secs(5);
/// Looks at our own transaction between two at the logs, which somebody else's would be in.
const LOOKS_PER_LOG_SEARCH: u32 = 4;
/// So long after its simulation a payment is signed for without another look at the chain.
const FRESH_SECONDS: i64 = 10;

impl Payments {
    /// Waits until a payment is at rest, or for [`SETTLEMENT_WAIT`], and returns where it stands.
    pub(super) async fn follow(&self, id: i64) -> Result<Payment, PaymentError> {
        let mut at_rest = self.drive(id);
        // Neither a time-out nor a driver that stopped is an error: the journal says what is so.
        let _ = tokio::time::timeout(SETTLEMENT_WAIT, at_rest.wait_for(|at_rest| *at_rest)).await;
        store::get(&self.0.db, id)
            .await?
            .ok_or_else(|| PaymentError::Unavailable("the payment is not in the journal".into()))
    }

    /// Sees to it that this process drives a payment; the receiver turns true when it is at rest.
    fn drive(&self, id: i64) -> watch::Receiver<bool> {
        let mut driven = unpoisoned(&self.0.driven);
        if let Some(at_rest) = driven.get(&id) {
            return at_rest.clone();
        }
        let (sender, at_rest) = watch::channel(false);
        driven.insert(id, at_rest.clone());
        let payments = self.clone();
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = payments.drive_to_rest(id, &sender) => {}
                () = payments.0.tasks.aborted() => {}
            }
            // Out of the map first: who comes now starts anew from the journal.
            unpoisoned(&payments.0.driven).remove(&id);
            sender.send_replace(true);
        });
        at_rest
    }

    async fn drive_to_rest(&self, id: i64, waiters: &watch::Sender<bool>) {
        let mut pause = FIRST_LOOK;
        let mut looks = 0;
        loop {
            let step = match store::get(&self.0.db, id).await {
                Ok(Some(payment)) => self.step(&payment, looks).await,
                Ok(None) => return,
                Err(error) => Err(error.into()),
            };
            match step {
                Ok(Step::AtRest) => return,
                Ok(Step::Moved) => continue,
                Ok(Step::Wait) => {}
                Err(error) => tracing::warn!(payment = id, %error, "payment not moved; it is tried again"),
            }
            // The map holds one receiver; if that is all, nobody waits, and the journal will do.
            if self.0.tasks.is_stopping() && waiters.receiver_count() <= 1 {
                return;
            }
            looks += 1;
            tokio::time::sleep(pause).await;
            pause = (pause + pause / 2).min(LONGEST_LOOK);
        }
    }

    async fn step(&self, payment: &Payment, looks: u32) -> Result<Step, PaymentError> {
        match payment.state {
            State::Verified => self.sign(payment).await,
            State::Signed => self.broadcast(payment).await,
            State::Broadcast | State::Mined => self.watch(payment, looks).await,
            State::Credited
            | State::Finalized
            | State::Expired
            | State::Cancelled
            | State::Failed
            | State::Reorged => Ok(Step::AtRest),
        }
    }

    /// Signs the transaction and keeps its bytes, before anybody sees them.
    async fn sign(&self, payment: &Payment) -> Result<Step, PaymentError> {
        let fresh = payment.created_at.plus_seconds(FRESH_SECONDS) > self.0.clock.now();
        if !fresh && (self.credit_if_found(payment).await? || self.end_if_expired(payment).await?) {
            return Ok(Step::Moved);
        }
        let chain = &self.0.chain;
        let on_chain = i64::try_from(chain.relayer_nonce().await?)
            .map_err(|_| PaymentError::Unavailable("the relayer's nonce is out of range".into()))?;
        let fees = chain.fees().await?;
        let now = self.0.clock.now();
        let mut tx = self.0.db.begin().await?;
        if !store::take_for_signing(&mut tx, payment.id, now).await? {
            return Ok(Step::Moved);
        }
        let nonce = store::next_nonce(&mut tx, self.chain_id(), chain.relayer(), on_chain).await?;
        let account_nonce = u64::try_from(nonce)
            .map_err(|_| PaymentError::Unavailable("the relayer's nonce is out of range".into()))?;
        let signed = chain.sign(&payment.authorization, &payment.signature, account_nonce, fees)?;
        store::insert_transaction(&mut tx, payment.id, chain.relayer(), nonce, &signed, now).await?;
        tx.commit().await?;
        Ok(Step::Moved)
    }

    async fn broadcast(&self, payment: &Payment) -> Result<Step, PaymentError> {
        self.send(payment).await?;
        let mut tx = self.0.db.begin().await?;
        store::mark_broadcast(&mut tx, payment.id, self.0.clock.now()).await?;
        tx.commit().await?;
        tracing::info!(payment = payment.id, tx = payment.tx_hash, "payment broadcast");
        Ok(Step::Moved)
    }

    /// Sends what was signed, byte for byte.
    async fn send(&self, payment: &Payment) -> Result<(), PaymentError> {
        for signed in store::transactions(&self.0.db, payment.id).await? {
            match self.0.chain.broadcast(&signed.raw).await {
                Ok(()) => {}
                Err(error @ (ChainError::Refused(_) | ChainError::Reverted(_))) => {
                    let mut tx = self.0.db.begin().await?;
                    store::note_error(&mut tx, payment.id, &error.to_string(), self.0.clock.now()).await?;
                    tx.commit().await?;
                    return Err(error.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn watch(&self, payment: &Payment, looks: u32) -> Result<Step, PaymentError> {
        let search_logs = looks % LOOKS_PER_LOG_SEARCH == LOOKS_PER_LOG_SEARCH - 1;
        let ours = self.our_status(payment).await?;
        if (ours != TxStatus::Unknown || search_logs) && self.credit_if_found(payment).await? {
            return Ok(Step::Moved);
        }
        if search_logs {
            if self.end_if_expired(payment).await? {
                return Ok(Step::AtRest);
            }
            if ours == TxStatus::Unknown {
                // A node may have dropped it.
                self.send(payment).await?;
            }
        }
        Ok(Step::Wait)
    }

    async fn our_status(&self, payment: &Payment) -> Result<TxStatus, PaymentError> {
        for signed in store::transactions(&self.0.db, payment.id).await? {
            match self.0.chain.tx_status(signed.hash).await? {
                TxStatus::Unknown => {}
                known => return Ok(known),
            }
        }
        Ok(TxStatus::Unknown)
    }

    /// Credits a payment whose transfer the chain's logs hold, deep enough.
    async fn credit_if_found(&self, payment: &Payment) -> Result<bool, PaymentError> {
        let head = self.0.chain.head().await?;
        let Some(found) = self.find_transfer(payment, head).await? else { return Ok(false) };
        // The block it is mined in is the first confirmation.
        let confirmations = (head.number + 1).saturating_sub(found.block_number);
        if confirmations < self.0.config.confirmations {
            return Ok(false);
        }
        self.credit(payment, &found).await?;
        Ok(true)
    }

    async fn find_transfer(
        &self,
        payment: &Payment,
        up_to: Block,
    ) -> Result<Option<FoundTransfer>, PaymentError> {
        let from_block = u64::try_from(payment.seen_block).unwrap_or_default();
        Ok(self.0.chain.find_transfer(&payment.authorization, from_block, up_to.number).await?)
    }

    /// The one place where a payment becomes money: the move and the entry in one transaction.
    async fn credit(&self, payment: &Payment, found: &FoundTransfer) -> Result<(), PaymentError> {
        let mut tx = self.0.db.begin().await?;
        if !store::take_for_credit(&mut tx, payment.id, found, self.0.clock.now()).await? {
            return Ok(());
        }
        let wallet = payment.authorization.from;
        self.0.ledger.credit(&mut tx, wallet, payment.value, payment.id).await?;
        tx.commit().await?;
        tracing::info!(
            payment = payment.id, %wallet, amount_micro = payment.value.get(), tx = %found.tx_hash,
            "payment credited"
        );
        Ok(())
    }

    /// A payment has failed only when its time is over in a block that will not be undone, and no
    /// transfer for it is in the chain up to there.
    async fn end_if_expired(&self, payment: &Payment) -> Result<bool, PaymentError> {
        let finalized = self.0.chain.finalized().await?;
        let expired =
            alloy::primitives::U256::from(finalized.timestamp) >= payment.authorization.valid_before;
        if !expired || self.find_transfer(payment, finalized).await?.is_some() {
            return Ok(false);
        }
        let authorization = &payment.authorization;
        let used = self.0.chain.is_nonce_used(authorization.from, authorization.nonce).await?;
        let (state, why) = if used {
            (State::Cancelled, "the payer cancelled the authorization")
        } else {
            (State::Expired, "the authorization expired before the transfer went through")
        };
        let mut tx = self.0.db.begin().await?;
        store::mark_ended(&mut tx, payment.id, state, why, self.0.clock.now()).await?;
        tx.commit().await?;
        tracing::info!(payment = payment.id, state = state.as_str(), "payment ended without a transfer");
        Ok(true)
    }

    /// Picks up payments that nobody drives, and marks those final that have become so.
    pub(super) async fn sweep(&self) -> Result<(), PaymentError> {
        for id in store::unfinished(&self.0.db, SWEEP_LIMIT).await? {
            self.drive(id);
        }
        let finalized = self.0.chain.finalized().await?;
        let up_to = i64::try_from(finalized.number).unwrap_or(i64::MAX);
        for payment in store::credited_up_to(&self.0.db, up_to, SWEEP_LIMIT).await? {
            match self.find_transfer(&payment, finalized).await? {
                Some(found) => {
                    let mut tx = self.0.db.begin().await?;
                    store::mark_finalized(&mut tx, payment.id, &found, self.0.clock.now()).await?;
                    tx.commit().await?;
                }
                None => tracing::error!(
                    payment = payment.id, wallet = %payment.authorization.from,
                    "a credited transfer is no longer in the chain: look into it"
                ),
            }
        }
        Ok(())
    }
}

enum Step {
    /// The payment is in another state now.
    Moved,
    /// It waits for the chain.
    Wait,
    AtRest,
}
