//! Withdrawals: unspent balance back to the wallet that it is of, and to no other.
//!
//! A withdrawal is a row of the journal as payments are, the other way round: the treasury's key signs a
//! `TransferWithAuthorization` to the wallet, and the relayers carry it out. Its nonce is made of what the wallet
//! calls the withdrawal by, and the token takes a nonce once, so that whatever is sent again, or forgotten by a
//! database that was restored, is not paid twice. From the request to the end the amount is locked on the
//! wallet; it leaves the balance in the transaction that finds the transfer in a final block, and is let go of
//! when the authorization has expired there without one.

use alloy::primitives::{B256, U256, keccak256};

use crate::chain::{Authorization, ChainError, FoundTransfer};
use crate::clock::Timestamp;
use crate::db::{DbError, DbTx};
use crate::failpoint;
use crate::id::Wallet;
use crate::ledger::{Balance, LedgerError};
use crate::money::MicroUsdc;
use crate::payments::settle::Step;
use crate::payments::store::{self, NewPayment};
use crate::payments::verify::HEAD_MARGIN_BLOCKS;
use crate::payments::{Kind, Payment, PaymentError, Payments, State};

/// How long a withdrawal's authorization is good. One that cannot be carried out is given back when that is over
/// for good; no congestion of the chain lasts for longer.
const VALID_SECONDS: i64 = 3600;
/// Withdrawals of a wallet that no block holds yet: each costs gas.
const MAX_UNFINISHED: i64 = 5;
const DAY_SECONDS: i64 = 86_400;

#[derive(Debug, thiserror::Error)]
pub enum WithdrawalError {
    #[error("this gateway pays nothing out: it has no key of the treasury's")]
    Off,
    #[error("the least that can be withdrawn is {} USD", .0.to_usd())]
    TooLittle(MicroUsdc),
    #[error(
        "{} USDC can be withdrawn now: what is available, without what has been paid in and is not final yet",
        withdrawable.to_usd()
    )]
    NotWithdrawable { withdrawable: MicroUsdc },
    #[error("the wallet owes {} USDC for top-ups that the chain undid: that is repaid first", .0.to_usd())]
    InDebt(MicroUsdc),
    #[error("the wallet has {MAX_UNFINISHED} withdrawals under way")]
    TooManyUnfinished,
    #[error("{} USD may be withdrawn a day {whose}", cap.to_usd())]
    DailyCap { cap: MicroUsdc, whose: &'static str, retry_after_s: i64 },
    /// The same name was given to a withdrawal of another amount.
    #[error("a withdrawal of another amount was asked for under this name")]
    NameReused,
    /// The token would not carry it out: the wallet is on its issuer's blacklist, say.
    #[error("the token refuses the transfer: {0}")]
    Refused(String),
    #[error("the treasury does not hold that much at the moment")]
    TreasuryShort,
    /// Nothing was locked.
    #[error("withdrawals are not possible at the moment: {0}")]
    Unavailable(String),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Db(#[from] DbError),
}

impl From<ChainError> for WithdrawalError {
    fn from(error: ChainError) -> Self {
        Self::Unavailable(error.to_string())
    }
}

impl From<PaymentError> for WithdrawalError {
    fn from(error: PaymentError) -> Self {
        match error {
            PaymentError::Db(error) => Self::Db(error),
            PaymentError::Ledger(error) => Self::Ledger(error),
            other => Self::Unavailable(other.to_string()),
        }
    }
}

impl Payment {
    /// The word for a withdrawal's state in the public API.
    pub fn withdrawal_status(&self) -> &'static str {
        match self.state {
            State::Verified | State::Signed | State::Broadcast => "pending",
            State::Mined => "sent",
            State::Credited | State::Finalized => "finalized",
            State::Expired | State::Cancelled | State::Reorged => "failed",
        }
    }
}

impl Payments {
    /// Whether there is a key to pay with.
    pub fn pays_out(&self) -> bool {
        self.0.chain.has_treasury_key()
    }

    /// Sends a part of a wallet's balance back to it, and returns once that is certain to happen or to be given
    /// back. `name` is the wallet's for this withdrawal: under one there is one, however often it is asked for.
    pub async fn withdraw(
        &self,
        wallet: Wallet,
        amount: MicroUsdc,
        name: &str,
    ) -> Result<Payment, WithdrawalError> {
        let accepted = self.accept_withdrawal(wallet, amount, name).await?;
        drop(self.drive(accepted.id));
        Ok(accepted)
    }

    /// Locks what is asked for and writes it down, unless it is known. Nothing is sent yet.
    ///
    /// Preconditions, in this order: withdrawals are on; the chain is known; the amount is not too small; the wallet
    /// is neither frozen nor in debt, and the amount withdrawable; the treasury's account has no code; the token
    /// would carry it out; the treasury has it; and, with the wallet's row taken, once more that it is
    /// withdrawable, and within the caps.
    ///
    /// A signature of the treasury's is money to whoever reads it. No endpoint of the chain's is shown one before
    /// what it takes is locked.
    pub async fn accept_withdrawal(
        &self,
        wallet: Wallet,
        amount: MicroUsdc,
        name: &str,
    ) -> Result<Payment, WithdrawalError> {
        if !self.pays_out() {
            return Err(WithdrawalError::Off);
        }
        let nonce = nonce_of(wallet, name);
        if let Some(known) = self.known_withdrawal(wallet, nonce, amount).await? {
            return Ok(known);
        }
        let refusal = match self.ask(wallet, amount, nonce).await {
            Ok(Some(id)) => {
                tracing::info!(payment = id, %wallet, amount_micro = amount.get(), "a withdrawal is on its way");
                let written = store::get(&self.0.db, id).await?;
                return written
                    .ok_or_else(|| WithdrawalError::Unavailable("it is not in the journal".into()));
            }
            Ok(None) => WithdrawalError::Unavailable("it was not written down".into()),
            Err(refusal) => refusal,
        };
        // It was asked for twice, and the other was quicker: then this one is refused for what that one took.
        self.known_withdrawal(wallet, nonce, amount).await?.ok_or(refusal)
    }

    /// Writes a withdrawal down that is not known yet; `None` if by then it is.
    async fn ask(
        &self,
        wallet: Wallet,
        amount: MicroUsdc,
        nonce: B256,
    ) -> Result<Option<i64>, WithdrawalError> {
        if !self.is_token_checked() {
            return Err(WithdrawalError::Unavailable("the chain has not been reached yet".into()));
        }
        let min = self.0.config.withdrawals.min;
        if amount < min {
            return Err(WithdrawalError::TooLittle(min));
        }
        if wallet == self.0.config.pay_to {
            return Err(WithdrawalError::Refused("the treasury cannot pay itself".into()));
        }
        // Asked again below; what cannot be is not to cost calls to the chain.
        self.check_standing(wallet).await?;
        let withdrawable = self.withdrawable(wallet).await?;
        if withdrawable < amount {
            return Err(WithdrawalError::NotWithdrawable { withdrawable });
        }
        let _place = self.place_to_verify().await?;
        let treasury = self.0.config.pay_to;
        let authorization = self.authorize(wallet, amount, nonce)?;
        let head = self.0.chain.head().await?.number;
        let held = self.0.chain.pending_balance(treasury).await?;
        if self.0.chain.is_nonce_used(treasury, nonce).await? {
            let why = "what was asked for under this name was paid, or called off, and is in no journal here";
            return Err(WithdrawalError::Refused(why.into()));
        }
        if self.0.chain.has_code(treasury).await? {
            // The token then asks the account, and not its key, whether a signature is good (EIP-7702, EIP-1271).
            let why = "the treasury's account has code, so that its key alone does not pay out";
            return Err(WithdrawalError::Unavailable(why.into()));
        }
        match self.0.chain.simulate_payout(&authorization).await {
            Ok(()) => {}
            // Read again: what has left in between is why.
            Err(ChainError::Reverted(why)) => {
                let is_short = self.0.chain.pending_balance(treasury).await? < authorization.value;
                return Err(if is_short {
                    WithdrawalError::TreasuryShort
                } else {
                    WithdrawalError::Refused(why)
                });
            }
            Err(other) => return Err(other.into()),
        }
        let signature = self.0.chain.sign_authorization(&authorization)?;
        let seen_block = i64::try_from(head.saturating_sub(HEAD_MARGIN_BLOCKS));
        let new = NewPayment {
            kind: Kind::Withdrawal,
            chain_id: self.chain_id(),
            asset: self.asset(),
            authorization: &authorization,
            value: amount,
            signature: &signature,
            request_hash: None,
            identifier: None,
            state: State::Verified,
            seen_block: seen_block
                .map_err(|_| WithdrawalError::Unavailable("the head is out of range".into()))?,
            found: None,
        };
        self.write_withdrawal_down(&new, held).await
    }

    /// The withdrawal of a name, if there is one, which must be of the same amount.
    async fn known_withdrawal(
        &self,
        wallet: Wallet,
        nonce: B256,
        amount: MicroUsdc,
    ) -> Result<Option<Payment>, WithdrawalError> {
        // Whichever treasury it is paid from.
        match store::find_withdrawal(&self.0.db, wallet, nonce).await? {
            Some(known) if known.value != amount => Err(WithdrawalError::NameReused),
            known => Ok(known),
        }
    }

    /// That a wallet may take anything out at all.
    async fn check_standing(&self, wallet: Wallet) -> Result<(), WithdrawalError> {
        if let Some(reason) = self.0.ledger.frozen(wallet).await? {
            return Err(LedgerError::Frozen(reason).into());
        }
        let debt = self.0.ledger.balance(wallet).await?.debt;
        if debt > MicroUsdc::ZERO { Err(WithdrawalError::InDebt(debt)) } else { Ok(()) }
    }

    fn authorize(
        &self,
        wallet: Wallet,
        amount: MicroUsdc,
        nonce: B256,
    ) -> Result<Authorization, WithdrawalError> {
        let out_of_range = || WithdrawalError::Unavailable("a number out of range".into());
        let value = u64::try_from(amount.get()).map_err(|_| out_of_range())?;
        let valid_before = self.0.clock.now().plus_seconds(VALID_SECONDS).seconds();
        Ok(Authorization {
            from: self.0.config.pay_to,
            to: wallet,
            value: U256::from(value),
            valid_after: U256::ZERO,
            valid_before: U256::from(u64::try_from(valid_before).map_err(|_| out_of_range())?),
            nonce,
        })
    }

    /// Locks the amount and writes the withdrawal down, in one transaction; `None` if it is there already.
    async fn write_withdrawal_down(
        &self,
        new: &NewPayment<'_>,
        held: U256,
    ) -> Result<Option<i64>, WithdrawalError> {
        let (wallet, now) = (new.authorization.to, self.0.clock.now());
        let mut tx = self.0.db.begin().await?;
        // Numbering orders those who insert, so that what is counted below cannot change under it.
        let Some(id) = store::insert(&mut tx, new, now).await? else { return Ok(None) };
        let balance = self.0.ledger.take(&mut tx, wallet).await?;
        if balance.debt > MicroUsdc::ZERO {
            return Err(WithdrawalError::InDebt(balance.debt));
        }
        let withdrawable = final_part(&mut tx, wallet, balance).await?;
        if withdrawable < new.value {
            return Err(WithdrawalError::NotWithdrawable { withdrawable });
        }
        if store::unsent_withdrawals(&mut tx, wallet).await? > MAX_UNFINISHED {
            return Err(WithdrawalError::TooManyUnfinished);
        }
        self.check_caps(&mut tx, wallet, now).await?;
        let to_leave =
            store::value_to_leave(&mut tx, new.chain_id, new.asset, new.authorization.from).await?;
        if held < U256::from(u64::try_from(to_leave.get()).unwrap_or(u64::MAX)) {
            return Err(WithdrawalError::TreasuryShort);
        }
        self.0.ledger.lock(&mut tx, wallet, new.value).await?;
        failpoint::reached("withdrawal_holding");
        tx.commit().await?;
        failpoint::reached("withdrawal_held");
        Ok(Some(id))
    }

    /// Checks what a day's withdrawals come to, the new one among them.
    async fn check_caps(&self, tx: &mut DbTx, wallet: Wallet, now: Timestamp) -> Result<(), WithdrawalError> {
        let config = &self.0.config.withdrawals;
        let day = store::withdrawn_since(tx, wallet, now.plus_seconds(-DAY_SECONDS)).await?;
        let caps = [
            (config.wallet_daily, day.wallet, day.wallet_first_at, "by a wallet"),
            (config.daily, day.all, day.first_at, "by all wallets together"),
        ];
        for (cap, withdrawn, first_at, whose) in caps {
            if cap > MicroUsdc::ZERO && withdrawn > cap {
                let retry_after_s = first_at.plus_seconds(DAY_SECONDS).seconds() - now.seconds();
                return Err(WithdrawalError::DailyCap { cap, whose, retry_after_s: retry_after_s.max(1) });
            }
        }
        Ok(())
    }

    /// How much a wallet could take out now, but for the caps.
    pub async fn withdrawable(&self, wallet: Wallet) -> Result<MicroUsdc, WithdrawalError> {
        let balance = self.0.ledger.balance(wallet).await?;
        if balance.debt > MicroUsdc::ZERO || self.0.ledger.frozen(wallet).await?.is_some() {
            return Ok(MicroUsdc::ZERO);
        }
        let mut tx = self.0.db.snapshot().await?;
        Ok(final_part(&mut tx, wallet, balance).await?)
    }

    /// A wallet's withdrawals, newest first, older than `before`.
    pub async fn withdrawals_of(
        &self,
        wallet: Wallet,
        before: Option<i64>,
        limit: i64,
    ) -> Result<Vec<Payment>, WithdrawalError> {
        Ok(store::withdrawals_of(&self.0.db, wallet, before, limit).await?)
    }

    /// One of a wallet's withdrawals.
    pub async fn withdrawal(&self, wallet: Wallet, id: i64) -> Result<Option<Payment>, WithdrawalError> {
        let found = store::get(&self.0.db, id).await?;
        Ok(found.filter(|found| found.kind == Kind::Withdrawal && found.authorization.to == wallet))
    }

    /// Withdrawals whose transfer is not final, and what they lock.
    pub async fn open_withdrawals(&self) -> Result<(i64, MicroUsdc), PaymentError> {
        Ok(store::open_withdrawals(&self.0.db).await?)
    }

    /// The one place where a withdrawal leaves the balance: its transfer is in a final block.
    pub(super) async fn settle_withdrawal(
        &self,
        withdrawal: &Payment,
        found: &FoundTransfer,
    ) -> Result<Step, PaymentError> {
        let (wallet, now) = (withdrawal.wallet(), self.0.clock.now());
        let mut tx = self.0.db.begin().await?;
        store::locate(&mut tx, withdrawal.id, found).await?;
        if !store::advance(&mut tx, withdrawal.id, State::Mined, State::Credited, None, now).await?
            || !store::advance(&mut tx, withdrawal.id, State::Credited, State::Finalized, None, now).await?
        {
            return Ok(Step::Moved);
        }
        self.0.ledger.withdraw(&mut tx, wallet, withdrawal.value, withdrawal.id).await?;
        failpoint::reached("withdrawing");
        tx.commit().await?;
        failpoint::reached("withdrawn");
        metrics::counter!("farebox_withdrawn_micro_total")
            .increment(u64::try_from(withdrawal.value.get()).unwrap_or_default());
        tracing::info!(
            payment = withdrawal.id, %wallet, amount_micro = withdrawal.value.get(), tx = %found.tx_hash,
            "a withdrawal is final"
        );
        Ok(Step::Moved)
    }

    /// Ends a payment that has no transfer and never will; what a withdrawal has locked is the wallet's again.
    pub(super) async fn end_without_transfer(
        &self,
        payment: &Payment,
        state: State,
        why: &str,
    ) -> Result<Step, PaymentError> {
        let mut tx = self.0.db.begin().await?;
        if !store::advance(&mut tx, payment.id, payment.state, state, Some(why), self.0.clock.now()).await? {
            return Ok(Step::Moved);
        }
        if payment.kind == Kind::Withdrawal {
            self.0.ledger.unlock(&mut tx, payment.wallet(), payment.value).await?;
        }
        failpoint::reached("releasing");
        tx.commit().await?;
        tracing::info!(
            payment = payment.id,
            from = payment.state.as_str(),
            to = state.as_str(),
            why,
            "payment ended without a transfer"
        );
        Ok(Step::Moved)
    }
}

/// The same for the same wallet and name, for ever and on every node.
fn nonce_of(wallet: Wallet, name: &str) -> B256 {
    keccak256([b"farebox withdrawal".as_slice(), wallet.0.as_slice(), name.as_bytes()].concat())
}

/// Of what is available, what cannot be undone any more.
async fn final_part(tx: &mut DbTx, wallet: Wallet, balance: Balance) -> Result<MicroUsdc, DbError> {
    let not_final = store::unfinalized_value(tx, wallet).await?;
    let left = balance.available().checked_sub(not_final).unwrap_or_default();
    Ok(left.max(MicroUsdc::ZERO))
}

/// Every withdrawal, for comparing the books with the chain.
pub async fn all_withdrawals(tx: &mut DbTx) -> Result<Vec<Payment>, DbError> {
    store::all_withdrawals(tx).await
}
