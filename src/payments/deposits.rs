//! Plain deposits: USDC that was sent to the treasury without an authorization that we know of.
//!
//! The chain's final blocks are searched for transfers to `pay_to`, from a cursor on that the database keeps. Each
//! becomes a row of the journal, `mined` and in suspense, until its wallet is known: then it is credited as
//! every payment is. A transfer by authorization is written down under that authorization's nonce, so that it
//! and the payload, whichever comes first, are one payment.

use alloy::primitives::{B256, U256, keccak256};

use crate::chain::{Arrival, Authorization, FoundTransfer};
use crate::clock::Timestamp;
use crate::config;
use crate::db::{DbError, DbTx};
use crate::failpoint;
use crate::id::Wallet;
use crate::ledger::Ledger;
use crate::money::MicroUsdc;
use crate::payments::settle::book_credit;
use crate::payments::store::{self, DepositCursor, NewPayment};
use crate::payments::{Journal, Kind, Payment, PaymentError, Payments, SWEEP_LIMIT, State};

/// Blocks searched before the cursor is moved: a search that is cut off begins there again.
const BLOCKS_AT_ONCE: u64 = 10_000;
/// Searches before what they have found is credited: a first one may have a long past before it.
const SEARCHES_A_SWEEP: usize = 4;
/// Blocks before the cursor that are searched again, in case that an endpoint had not all of their logs.
const OVERLAP_BLOCKS: u64 = 64;

impl Payments {
    /// Looks for deposits in what has become final, and credits those whose wallet is known.
    pub async fn look_for_deposits(&self) -> Result<(), PaymentError> {
        let Some(config) = self.0.config.deposits.clone() else { return Ok(()) };
        let searched = self.search(&config).await;
        self.credit_known(&config).await?;
        searched
    }

    async fn search(&self, config: &config::Deposits) -> Result<(), PaymentError> {
        for _ in 0..SEARCHES_A_SWEEP {
            let cursor = self.deposit_cursor(config).await?;
            let receiver = self.0.config.pay_to;
            // Only what is new is worth a search; then what is before it is looked at as well.
            let tip = self.0.chain.finalized().await?.number;
            if cursor.next_block > tip {
                return Ok(());
            }
            let from_block = cursor.next_block.saturating_sub(OVERLAP_BLOCKS).max(cursor.first_block);
            let arrivals = self.0.chain.final_arrivals(receiver, from_block, BLOCKS_AT_ONCE).await?;
            let Some(arrivals) = arrivals.filter(|arrivals| arrivals.searched_to > cursor.next_block) else {
                return Ok(());
            };
            for arrival in &arrivals.agreed {
                self.note_arrival(arrival).await?;
            }
            failpoint::reached("deposits_noted");
            let mut tx = self.0.db.begin().await?;
            let (chain_id, asset) = (self.chain_id(), self.asset());
            store::move_deposit_cursor(&mut tx, chain_id, asset, receiver, arrivals.searched_to).await?;
            tx.commit().await?;
            failpoint::reached("deposits_searched");
        }
        Ok(())
    }

    /// Where the search goes on. The first begins where it is told to, or with what becomes final from now on:
    /// what arrived before anybody looked may have been dealt with by hand.
    async fn deposit_cursor(&self, config: &config::Deposits) -> Result<DepositCursor, PaymentError> {
        let (chain_id, asset, receiver) = (self.chain_id(), self.asset(), self.0.config.pay_to);
        if let Some(cursor) = store::deposit_cursor(&self.0.db, chain_id, asset, receiver).await? {
            return Ok(cursor);
        }
        let first = match config.from_block {
            Some(block) => block,
            None => self.0.chain.final_block_to_begin_at().await?,
        };
        let mut tx = self.0.db.begin().await?;
        store::begin_deposits(&mut tx, chain_id, asset, receiver, first).await?;
        tx.commit().await?;
        // Another node may have been first, and have begun elsewhere.
        let cursor = store::deposit_cursor(&self.0.db, chain_id, asset, receiver).await?;
        let cursor = cursor.ok_or(PaymentError::Unavailable("the search was not begun".into()))?;
        tracing::info!(%receiver, block = cursor.first_block, "the search for deposits begins");
        Ok(cursor)
    }

    /// Writes down what arrived, unless the journal has it.
    async fn note_arrival(&self, arrival: &Arrival) -> Result<(), PaymentError> {
        // Most of what is searched again is here already. Where an endpoint keeps an authorization's log from us, its
        // payment may be credited already.
        if store::is_placed(&self.0.db, self.chain_id(), &arrival.found).await? {
            return Ok(());
        }
        let nonce = match arrival.nonce {
            None => own_nonce(&arrival.found),
            Some(nonce) => {
                let known =
                    store::find(&self.0.db, self.chain_id(), self.asset(), arrival.from, nonce).await?;
                match known {
                    None => nonce,
                    Some(known) if self.is_the_transfer_of(arrival, &known) => {
                        return self.look_again_at(&known).await;
                    }
                    // The payer has used the nonce for another transfer than the one sent to us.
                    Some(_) => own_nonce(&arrival.found),
                }
            }
        };
        let authorization = Authorization {
            from: arrival.from,
            to: self.0.config.pay_to,
            value: U256::from(u64::try_from(arrival.value.get()).unwrap_or_default()),
            valid_after: U256::ZERO,
            valid_before: U256::ZERO,
            nonce,
        };
        let seen_block = i64::try_from(arrival.found.block_number);
        let new = NewPayment {
            kind: Kind::Deposit,
            chain_id: self.chain_id(),
            asset: self.asset(),
            authorization: &authorization,
            value: arrival.value,
            signature: &[],
            request_hash: None,
            identifier: None,
            state: State::Mined,
            seen_block: seen_block.map_err(|_| PaymentError::Unavailable("a block out of range".into()))?,
            found: Some(&arrival.found),
        };
        let mut tx = self.0.db.begin().await?;
        // Not committed, its number is not used up.
        let id = match store::insert(&mut tx, &new, self.0.clock.now()).await {
            Ok(Some(id)) => id,
            Ok(None) => return Ok(()),
            // Its place is that of a payment under way. One transfer is not to hold up the search for all others.
            Err(error) if error.is_unique_violation() => {
                tracing::error!(tx = %arrival.found.tx_hash, %error, "a transfer is in the journal as another");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        tx.commit().await?;
        failpoint::reached("deposit_noted");
        tracing::info!(
            payment = id, wallet = %arrival.from, amount_micro = arrival.value.get(),
            tx = %arrival.found.tx_hash, "a deposit has arrived"
        );
        Ok(())
    }

    /// Whether a transfer is the one that a payment is about, and not another under the same nonce.
    fn is_the_transfer_of(&self, arrival: &Arrival, known: &Payment) -> bool {
        known.authorization.to == self.0.config.pay_to && known.value == arrival.value
    }

    /// A payment that ended without its transfer, which is there after all, goes on.
    async fn look_again_at(&self, known: &Payment) -> Result<(), PaymentError> {
        if matches!(known.state, State::Expired | State::Cancelled) {
            let mut tx = self.0.db.begin().await?;
            let why = Some("its transfer has turned up");
            store::advance(&mut tx, known.id, known.state, State::Verified, why, self.0.clock.now()).await?;
            tx.commit().await?;
        }
        Ok(())
    }

    /// Credits what waits for wallets that have signed in or paid since.
    async fn credit_known(&self, config: &config::Deposits) -> Result<(), PaymentError> {
        let mut last = 0;
        loop {
            let (chain_id, asset) = (self.chain_id(), self.asset());
            let page = store::claimable(&self.0.db, chain_id, asset, config.min, last, SWEEP_LIMIT).await?;
            let Some(deposit) = page.last() else { return Ok(()) };
            last = deposit.id;
            for deposit in page {
                // What the operator's own accounts send is not a customer's, whoever has signed in as them.
                if self.0.chain.relayers().any(|relayer| relayer == deposit.authorization.from) {
                    continue;
                }
                if let Err(error) = self.credit_deposit(&deposit).await {
                    tracing::warn!(payment = deposit.id, %error, "a deposit is not credited; it is tried again");
                }
            }
        }
    }

    pub(super) async fn credit_deposit(&self, deposit: &Payment) -> Result<(), PaymentError> {
        let mut tx = self.0.db.begin().await?;
        let now = self.0.clock.now();
        if !book_deposit(&mut tx, &self.0.ledger, deposit, None, now).await? {
            return Ok(());
        }
        failpoint::reached("deposit_crediting");
        tx.commit().await?;
        failpoint::reached("deposit_credited");
        metrics::counter!("farebox_deposits_credited_micro_total")
            .increment(u64::try_from(deposit.value.get()).unwrap_or_default());
        tracing::info!(
            payment = deposit.id, wallet = %deposit.wallet(), amount_micro = deposit.value.get(),
            "deposit credited"
        );
        Ok(())
    }

    /// How many deposits are in suspense, and what they come to.
    pub async fn suspense(&self) -> Result<(i64, MicroUsdc), PaymentError> {
        Ok(store::count_suspense(&self.0.db).await?)
    }

    /// The block that the search for deposits goes on at; `None` while there is none.
    pub async fn deposits_searched_to(&self) -> Result<Option<u64>, PaymentError> {
        if self.0.config.deposits.is_none() {
            return Ok(None);
        }
        let receiver = self.0.config.pay_to;
        let cursor = store::deposit_cursor(&self.0.db, self.chain_id(), self.asset(), receiver).await?;
        Ok(cursor.map(|cursor| cursor.next_block))
    }
}

/// Credits a deposit, which is final as it is; `false` if it is not in suspense any more.
async fn book_deposit(
    tx: &mut DbTx,
    ledger: &Ledger,
    deposit: &Payment,
    why: Option<&str>,
    now: Timestamp,
) -> Result<bool, PaymentError> {
    Ok(book_credit(tx, ledger, deposit, why, now).await?
        && store::advance(tx, deposit.id, State::Credited, State::Finalized, why, now).await?)
}

impl Journal {
    /// What has arrived and is nobody's yet, newest first.
    pub async fn suspense(&self, limit: i64) -> Result<Vec<Payment>, DbError> {
        store::suspense(&self.db, limit).await
    }

    /// How many deposits are in suspense, and what they come to.
    pub async fn count_suspense(&self) -> Result<(i64, MicroUsdc), DbError> {
        store::count_suspense(&self.db).await
    }

    /// Credits a deposit in suspense to a wallet, for a reason; `false` if it is not in suspense.
    pub async fn attribute(
        &self,
        ledger: &Ledger,
        id: i64,
        wallet: Option<Wallet>,
        reason: &str,
    ) -> Result<bool, PaymentError> {
        let Some(mut deposit) = store::get(&self.db, id).await? else { return Ok(false) };
        if deposit.kind != Kind::Deposit {
            return Ok(false);
        }
        let mut tx = self.db.begin().await?;
        if let Some(wallet) = wallet.filter(|wallet| *wallet != deposit.authorization.from) {
            if !store::set_beneficiary(&mut tx, id, wallet).await? {
                return Ok(false);
            }
            deposit.beneficiary = Some(wallet);
        }
        let credited = book_deposit(&mut tx, ledger, &deposit, Some(reason), self.clock.now()).await?;
        tx.commit().await?;
        Ok(credited)
    }
}

/// Deposits that nobody has claimed, for comparing the books with the chain.
pub async fn all_in_suspense(tx: &mut DbTx) -> Result<Vec<Payment>, DbError> {
    store::all_in_suspense(tx).await
}

/// The name of a plain transfer among authorizations. It is final, so its place is its identity.
fn own_nonce(found: &FoundTransfer) -> B256 {
    let place = [found.tx_hash.as_slice(), &found.log_index.to_be_bytes()].concat();
    keccak256([b"farebox deposit".as_slice(), &place].concat())
}
