//! Driving a payment from where it stands to where it rests: sign, broadcast, watch, credit.
//!
//! Several may drive the same payment, in one process or on two nodes: each step is a conditional
//! move in the database, so it is taken once, and broadcasting the same bytes again harms nobody.

use std::collections::BTreeSet;
use std::time::Duration;

use alloy::primitives::U256;
use tokio::sync::watch;

use crate::chain::{ChainError, Depth, FoundTransfer, Sighting, TxStatus, View};
use crate::clock::Timestamp;
use crate::db::DbTx;
use crate::failpoint;
use crate::ledger::Ledger;
use crate::money::MicroUsdc;
use crate::payments::{Kind, Payment, PaymentError, Payments, SETTLEMENT_WAIT, State, store, unpoisoned};

/// The first look after a broadcast; each look after it waits half as long again, up to …
const FIRST_LOOK: Duration = Duration::from_millis(200);
/// … this.
const LONGEST_LOOK: Duration = Duration::from_secs(5);
/// Half a block on Base: the pause between looks while somebody may be waiting for the answer.
const EAGER_LOOK: Duration = Duration::from_secs(1);
const EAGER_LOOKS: u32 = 20;
/// After so many looks, about ten minutes, a payment is looked at seldom.
const SELDOM_AFTER_LOOKS: u32 = 120;
const SELDOM_LOOK: Duration = Duration::from_secs(60);
/// Looks at our own transaction between two at the logs, which somebody else's would be in.
const LOOKS_PER_LOG_SEARCH: u32 = 4;
/// So long after its simulation a payment is signed for without another look at the chain.
const FRESH_SECONDS: i64 = 10;
/// Transactions paid for one payment; a replacement at the same account nonce counts once.
const MAX_SENT: usize = 2;
/// So long a transfer that one endpoint alone shows must have been there before it is believed to be
/// final. Finality takes longer than that on Base, so this delays only a lie.
const ALONE_SECONDS: i64 = 600;
/// A step that takes longer is begun anew at the next look.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// A payment older than this is only watched.
const SEND_SECONDS: i64 = 3600;

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
    pub(super) fn drive(&self, id: i64) -> watch::Receiver<bool> {
        let mut driven = unpoisoned(&self.0.driven);
        if let Some(at_rest) = driven.get(&id) {
            return at_rest.clone();
        }
        let (sender, at_rest) = watch::channel(false);
        driven.insert(id, at_rest.clone());
        let payments = self.clone();
        self.0.tasks.spawn(async move {
            // Also when a step panics: who comes next starts anew from the journal.
            let driven = Driven { payments: &payments, id };
            tokio::select! {
                () = payments.drive_to_rest(id, &sender) => {}
                () = payments.0.tasks.aborted() => {}
            }
            drop(driven);
            sender.send_replace(true);
        });
        at_rest
    }

    async fn drive_to_rest(&self, id: i64, waiters: &watch::Sender<bool>) {
        let mut pause = FIRST_LOOK;
        let mut looks = 0;
        loop {
            let step = match store::get(&self.0.db, id).await {
                Ok(Some(payment)) => {
                    // What has waited for long must not hold up what is new.
                    let turns = if looks < EAGER_LOOKS { &self.0.steps } else { &self.0.late_steps };
                    // Never closed, so there is always a turn to wait for.
                    let _turn = turns.acquire().await;
                    let step = tokio::time::timeout(STEP_TIMEOUT, self.step(&payment, looks)).await;
                    step.unwrap_or_else(|_| Err(PaymentError::Unavailable("a step took too long".into())))
                }
                Ok(None) => return,
                Err(error) => Err(error.into()),
            };
            match step {
                Ok(Step::AtRest) => return,
                Ok(Step::Moved) => continue,
                // Whoever waits is told at once; the payment goes on.
                Ok(Step::Refused) => tell(waiters, true),
                Ok(Step::Wait) => tell(waiters, false),
                Err(error) => tracing::warn!(payment = id, %error, "payment not moved; it is tried again"),
            }
            // The map holds one receiver; if that is all, nobody waits, and the journal will do.
            if self.0.tasks.is_stopping() && waiters.receiver_count() <= 1 {
                return;
            }
            looks += 1;
            tokio::time::sleep(pause).await;
            pause = (pause + pause / 2).min(longest_pause(looks));
        }
    }

    /// Moves a payment by one step, if it can be moved now.
    pub async fn step_once(&self, id: i64) -> Result<(), PaymentError> {
        if let Some(payment) = store::get(&self.0.db, id).await? {
            // As at a look that also searches the logs.
            self.step(&payment, LOOKS_PER_LOG_SEARCH - 1).await?;
        }
        Ok(())
    }

    async fn step(&self, payment: &Payment, looks: u32) -> Result<Step, PaymentError> {
        if payment.kind == Kind::Deposit {
            // Only its payer's payload has a deposit driven: then its wallet is known.
            if payment.state == State::Mined {
                self.credit_deposit(payment).await?;
            }
            return Ok(Step::AtRest);
        }
        match payment.state {
            State::Verified => self.sign(payment).await,
            State::Signed => self.broadcast(payment).await,
            State::Broadcast => self.watch(payment, looks).await,
            State::Mined => self.confirm(payment).await,
            State::Credited | State::Finalized | State::Expired | State::Cancelled | State::Reorged => {
                Ok(Step::AtRest)
            }
        }
    }

    /// Moves a payment on, alone: a step that changes nothing else.
    async fn advance(&self, payment: &Payment, to: State, why: Option<&str>) -> Result<Step, PaymentError> {
        let mut tx = self.0.db.begin().await?;
        store::advance(&mut tx, payment.id, payment.state, to, why, self.0.clock.now()).await?;
        tx.commit().await?;
        tracing::info!(
            payment = payment.id,
            from = payment.state.as_str(),
            to = to.as_str(),
            why,
            "payment moved"
        );
        Ok(Step::Moved)
    }

    /// Signs the transaction and keeps its bytes, before anybody sees them.
    async fn sign(&self, payment: &Payment) -> Result<Step, PaymentError> {
        if let Some(step) = self.by_facilitator(payment).await? {
            return Ok(step);
        }
        if !self.is_fresh(payment) {
            // Somebody else may have sent it, it may have expired, or no longer go through.
            if let Some(step) = self.look(payment).await? {
                return Ok(step);
            }
            if !self.may_send_again(payment).await? {
                return Ok(Step::Wait);
            }
        }
        self.sign_another(payment, State::Signed).await?;
        Ok(Step::Moved)
    }

    /// Whether its simulation was only just now, and nothing has been tried since.
    pub(super) fn is_fresh(&self, payment: &Payment) -> bool {
        // One that has come back here says why.
        payment.last_error.is_none() && payment.created_at.plus_seconds(FRESH_SECONDS) >= self.0.clock.now()
    }

    /// Signs a transaction with a relayer's next account nonce, as the payment moves to `to`; with
    /// several who try, one does.
    pub(super) async fn sign_another(&self, payment: &Payment, to: State) -> Result<(), PaymentError> {
        if !self.has_relayer() {
            return Err(PaymentError::Unavailable("there is no relayer's key to send it with".into()));
        }
        let now = self.0.clock.now();
        let chain = &self.0.chain;
        let relayer = self.relayer_for(payment.id);
        let on_chain =
            i64::try_from(chain.taken_nonces(relayer, Depth::Head).await?).map_err(|_| out_of_range())?;
        let fees = chain.fees().await?;
        let settlement = chain.settlement_call(&payment.authorization, &payment.signature).await?;
        let signed_before = store::transactions(&self.0.db, payment.id).await?.len();
        let mut tx = self.0.db.begin().await?;
        if !store::advance(&mut tx, payment.id, payment.state, to, None, now).await?
            || store::count_transactions(&mut tx, payment.id).await? != signed_before
        {
            return Ok(());
        }
        let nonce = store::next_nonce(&mut tx, self.chain_id(), relayer, on_chain).await?;
        let nonce = u64::try_from(nonce).map_err(|_| out_of_range())?;
        let signed = chain.sign(relayer, settlement, nonce, fees)?;
        store::insert_transaction(&mut tx, payment.id, &signed, now).await?;
        failpoint::reached("signing");
        tx.commit().await?;
        failpoint::reached("signed");
        Ok(())
    }

    /// Whether another transaction may be paid for: a payer who empties the wallet after each
    /// verification must not drain our gas.
    pub(super) async fn may_send_again(&self, payment: &Payment) -> Result<bool, PaymentError> {
        let sent = store::transactions(&self.0.db, payment.id).await?;
        let nonces: BTreeSet<_> = sent.iter().map(|signed| (signed.relayer, signed.account_nonce)).collect();
        let too_old = payment.created_at.plus_seconds(SEND_SECONDS) < self.0.clock.now();
        if nonces.len() >= MAX_SENT || too_old {
            return Ok(false);
        }
        match self.0.chain.simulate(&payment.authorization, &payment.signature).await {
            Ok(()) => Ok(true),
            Err(ChainError::Reverted(_)) => Ok(false),
            Err(other) => Err(other.into()),
        }
    }

    async fn broadcast(&self, payment: &Payment) -> Result<Step, PaymentError> {
        match self.send(payment).await {
            Ok(()) => {
                failpoint::reached("sent");
                let moved = self.advance(payment, State::Broadcast, None).await;
                failpoint::reached("broadcast");
                moved
            }
            // Ours cannot be sent; somebody else's may arrive, or the time may be over.
            Err(error) => self.look(payment).await?.ok_or(error),
        }
    }

    /// Sends what was signed, byte for byte.
    pub(super) async fn send(&self, payment: &Payment) -> Result<(), PaymentError> {
        for signed in store::transactions(&self.0.db, payment.id).await? {
            match self.0.chain.broadcast(&signed.raw).await {
                Err(error @ (ChainError::Refused(_) | ChainError::Reverted(_))) => {
                    let mut tx = self.0.db.begin().await?;
                    store::note_error(&mut tx, payment.id, &error.to_string()).await?;
                    tx.commit().await?;
                    return Err(error.into());
                }
                sent => sent?,
            }
        }
        Ok(())
    }

    /// Waits for the transfer, ours or another's, and sends again what got lost.
    async fn watch(&self, payment: &Payment, looks: u32) -> Result<Step, PaymentError> {
        let nothing_sent = store::transactions(&self.0.db, payment.id).await?.is_empty();
        let search = nothing_sent || looks % LOOKS_PER_LOG_SEARCH == LOOKS_PER_LOG_SEARCH - 1;
        let ours = self.our_status(payment).await?;
        if ours == TxStatus::Unknown && !search {
            return Ok(Step::Wait);
        }
        if let Some(step) = self.look(payment).await? {
            return Ok(step);
        }
        match ours {
            // Mined, and the logs are not there yet: they will be at the next look.
            TxStatus::Succeeded { .. } => Ok(Step::Wait),
            TxStatus::Reverted { .. } if search && self.may_send_again(payment).await? => {
                self.advance(payment, State::Verified, Some("the transaction reverted; another is sent"))
                    .await
            }
            TxStatus::Reverted { .. } => Ok(Step::Wait),
            TxStatus::Unknown
                if self.nonce_is_lost(payment).await? && self.may_send_again(payment).await? =>
            {
                self.advance(payment, State::Verified, Some("its account nonce was taken; another is used"))
                    .await
            }
            TxStatus::Unknown => {
                self.send(payment).await?;
                Ok(Step::Wait)
            }
        }
    }

    /// Looks for the transfer and for the authorization's end; `Some` if either moved the payment.
    pub(super) async fn look(&self, payment: &Payment) -> Result<Option<Step>, PaymentError> {
        let view = self.sight(payment, Depth::Head).await?;
        if let Some(found) = view.sighting.undisputed() {
            let mut tx = self.0.db.begin().await?;
            let now = self.0.clock.now();
            // A mined payment says where, so the place comes first; it is undone if the move fails.
            store::locate(&mut tx, payment.id, found).await?;
            if store::advance(&mut tx, payment.id, payment.state, State::Mined, None, now).await? {
                tx.commit().await?;
            }
            failpoint::reached("mined");
            return Ok(Some(Step::Moved));
        }
        match self.expiry(payment).await? {
            Some((state, why)) => self.end_without_transfer(payment, state, why).await.map(Some),
            None => Ok(None),
        }
    }

    pub(super) async fn sight(&self, payment: &Payment, depth: Depth) -> Result<View, PaymentError> {
        let from_block = u64::try_from(payment.seen_block).unwrap_or_default();
        Ok(self.0.chain.sight(&payment.authorization, from_block, depth).await?)
    }

    /// A payment's transfer in a block that will not be undone. Where several endpoints answer, two say
    /// so; of one alone finality is its own word too, so it must have stood by it for a while.
    pub(super) async fn final_transfer(
        &self,
        payment: &Payment,
    ) -> Result<Option<FoundTransfer>, PaymentError> {
        let view = self.sight(payment, Depth::Finalized).await?;
        let has_stood = payment.updated_at.plus_seconds(ALONE_SECONDS) <= self.0.clock.now();
        Ok(match view.sighting {
            Sighting::Agreed(found) => Some(found),
            Sighting::Alone(found) if view.answers == 1 && has_stood => Some(found),
            _ => None,
        })
    }

    /// What became of our transactions. One that went through counts, whichever; that an earlier one
    /// reverted says nothing of one sent after it.
    async fn our_status(&self, payment: &Payment) -> Result<TxStatus, PaymentError> {
        let mut status = TxStatus::Unknown;
        let signed = store::transactions(&self.0.db, payment.id).await?;
        let latest = signed.first().map(|signed| (signed.relayer, signed.account_nonce));
        for signed in signed {
            match self.0.chain.tx_status(signed.hash).await? {
                TxStatus::Unknown => {}
                TxStatus::Succeeded { block } => return Ok(TxStatus::Succeeded { block }),
                reverted if latest == Some((signed.relayer, signed.account_nonce)) => status = reverted,
                TxStatus::Reverted { .. } => {}
            }
        }
        Ok(status)
    }

    /// Whether none of our transactions can go through any more: the chain has taken their account
    /// nonces for others, or there is no key any more that could get a stuck one through.
    pub(super) async fn nonce_is_lost(&self, payment: &Payment) -> Result<bool, PaymentError> {
        for signed in store::transactions(&self.0.db, payment.id).await? {
            if !self.0.chain.has_key_of(signed.relayer) {
                continue;
            }
            let taken = self.0.chain.taken_nonces(signed.relayer, Depth::Finalized).await?;
            if signed.account_nonce >= taken {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Credits a transfer that is deep enough, seen by enough, and within the wallet's ceiling; or ends a
    /// withdrawal.
    async fn confirm(&self, payment: &Payment) -> Result<Step, PaymentError> {
        // What leaves a balance waits for finality, and meanwhile for nothing but that its block stays.
        if payment.kind == Kind::Withdrawal && self.is_in_a_block_that_stands(payment).await? {
            return Ok(Step::Wait);
        }
        let view = self.sight(payment, Depth::Head).await?;
        let found = match &view.sighting {
            Sighting::Nowhere => return self.displace(payment).await,
            Sighting::Disputed(_) => return Ok(Step::Wait),
            Sighting::Agreed(found) | Sighting::Alone(found) => found,
        };
        // The block it is mined in is the first confirmation.
        let confirmations = view.tip.number.saturating_add(1).saturating_sub(found.block_number);
        if confirmations < self.0.config.confirmations {
            return Ok(Step::Wait);
        }
        let is_final = self.final_transfer(payment).await?.as_ref() == Some(found);
        // What leaves a balance is not booked before it is final: nothing has to be put back then.
        let waits = payment.kind == Kind::Withdrawal || matches!(view.sighting, Sighting::Alone(_));
        if waits && !is_final {
            return Ok(Step::Wait);
        }
        if payment.kind == Kind::Withdrawal {
            return self.settle_withdrawal(payment, found).await;
        }
        self.credit(payment, found, is_final).await
    }

    /// Whether a payment is where it was seen, in a block that is not final yet.
    async fn is_in_a_block_that_stands(&self, payment: &Payment) -> Result<bool, PaymentError> {
        let Some(block) = payment.block_number.and_then(|block| u64::try_from(block).ok()) else {
            return Ok(false);
        };
        if block <= self.0.chain.finalized().await?.number {
            return Ok(false);
        }
        let hash = self.0.chain.block_hash(block).await?;
        Ok(hash.map(|hash| store::hex_of(hash.as_slice())) == payment.block_hash)
    }

    /// A transfer whose block is gone may come again elsewhere.
    async fn displace(&self, payment: &Payment) -> Result<Step, PaymentError> {
        let (why, now) = (Some("the block it was in is gone"), self.0.clock.now());
        let mut tx = self.0.db.begin().await?;
        if store::advance(&mut tx, payment.id, State::Mined, State::Broadcast, why, now).await? {
            store::displace(&mut tx, payment.id).await?;
        }
        tx.commit().await?;
        tracing::info!(payment = payment.id, "the block that a payment was in is gone");
        Ok(Step::Moved)
    }

    /// Credits a payment, unless that would put its wallet above the ceiling.
    async fn credit(
        &self,
        payment: &Payment,
        found: &FoundTransfer,
        is_final: bool,
    ) -> Result<Step, PaymentError> {
        let wallet = payment.wallet();
        let ceiling = self.0.config.max_unfinalized;
        let mut tx = self.0.db.begin().await?;
        // The place comes first: of a transfer that is another payment's already the credit is refused.
        store::locate(&mut tx, payment.id, found).await?;
        // The credit locks the wallet's row, so that of two at once the later sees the earlier.
        if !book_credit(&mut tx, &self.0.ledger, payment, None, self.0.clock.now()).await? {
            return Ok(Step::Moved);
        }
        if ceiling > MicroUsdc::ZERO
            && !is_final
            && store::unfinalized_value(&mut tx, wallet).await? > ceiling
        {
            return Ok(Step::Wait);
        }
        failpoint::reached("crediting");
        tx.commit().await?;
        failpoint::reached("credited");
        tracing::info!(
            payment = payment.id, %wallet, amount_micro = payment.value.get(), tx = %found.tx_hash,
            "payment credited"
        );
        Ok(Step::Moved)
    }

    /// How a payment has ended without a transfer, if it has: only when its time is over in a block
    /// that will not be undone, and no transfer for it is in the chain up to there.
    pub(super) async fn expiry(
        &self,
        payment: &Payment,
    ) -> Result<Option<(State, &'static str)>, PaymentError> {
        let view = self.sight(payment, Depth::Finalized).await?;
        let authorization = &payment.authorization;
        let is_over = U256::from(view.tip.timestamp) >= authorization.valid_before;
        if !is_over || !view.is_quorate || view.sighting != Sighting::Nowhere {
            return Ok(None);
        }
        if !self.0.chain.is_nonce_used(authorization.from, authorization.nonce).await? {
            return Ok(Some((State::Expired, "the authorization expired before the transfer went through")));
        }
        let from_block = u64::try_from(payment.seen_block).unwrap_or_default();
        if self.0.chain.was_spent(authorization, from_block).await? {
            return Ok(Some((
                State::Cancelled,
                "the payer cancelled the authorization, or used its nonce otherwise",
            )));
        }
        // Used, and no log says by what: then the logs we were shown are not all there are.
        tracing::error!(
            payment = payment.id,
            "an authorization was used, and its transfer is not in the logs"
        );
        Ok(None)
    }

    /// A payment that ended without its transfer is looked for once more when it is sent again.
    pub(super) async fn look_again(&self, payment: &Payment) -> Result<(), PaymentError> {
        if !matches!(payment.state, State::Expired | State::Cancelled) {
            return Ok(());
        }
        let view = self.sight(payment, Depth::Head).await?;
        if view.sighting.undisputed().is_some() {
            self.advance(payment, State::Verified, Some("its transfer has turned up")).await?;
        }
        Ok(())
    }
}

/// Says whether there is anything to wait for; who was told so already is not woken.
fn tell(waiters: &watch::Sender<bool>, at_rest: bool) {
    waiters.send_if_modified(|told| std::mem::replace(told, at_rest) != at_rest);
}

/// The one place where a payment becomes money: the move and the entry in one transaction. `false`, if somebody
/// else has moved it.
pub(super) async fn book_credit(
    tx: &mut DbTx,
    ledger: &Ledger,
    payment: &Payment,
    why: Option<&str>,
    now: Timestamp,
) -> Result<bool, PaymentError> {
    if !store::advance(tx, payment.id, State::Mined, State::Credited, why, now).await? {
        return Ok(false);
    }
    ledger.credit(tx, payment.wallet(), payment.value, payment.id).await?;
    Ok(true)
}

/// The longest pause after so many looks.
fn longest_pause(looks: u32) -> Duration {
    if looks < EAGER_LOOKS {
        EAGER_LOOK
    } else if looks < SELDOM_AFTER_LOOKS {
        LONGEST_LOOK
    } else {
        SELDOM_LOOK
    }
}

/// A payment driven by this process, until this is dropped.
struct Driven<'a> {
    payments: &'a Payments,
    id: i64,
}

impl Drop for Driven<'_> {
    fn drop(&mut self) {
        unpoisoned(&self.payments.0.driven).remove(&self.id);
    }
}

fn out_of_range() -> PaymentError {
    PaymentError::Unavailable("a number of the chain is out of range".into())
}

pub(super) enum Step {
    /// The payment is in another state now, or somebody else has moved it.
    Moved,
    /// As with [`Self::Wait`]; but a facilitator has refused it, so there is no use in waiting for it.
    Refused,
    /// It waits for the chain.
    Wait,
    AtRest,
}
