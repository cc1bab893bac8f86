//! Whether a payment is what we asked for and will go through. Preconditions, in this order, each
//! with a reason of its own:
//!
//! 1. version, scheme and network are ones that we offer: our own terms count, not what the client
//!    says that it accepted;
//! 2. the receiver is ours and the value is what is asked;
//! 3. it is valid now, and long enough to be mined;
//! 4. the signature is the payer's, as the token itself will check it;
//! 5. the transfer, simulated on the pending block, succeeds.

use std::sync::atomic::Ordering;

use alloy::primitives::U256;

use crate::chain::{self, Authorization, ChainError};
use crate::money::MicroUsdc;
use crate::payments::store::{self, NewPayment};
use crate::payments::wire::{Payload, Reason};
use crate::payments::{ChainHealth, PaymentError, Payments, refused};

/// The token is strict about `validAfter`, and a block's time may be a second behind ours.
const VALID_AFTER_MARGIN_SECONDS: u64 = 1;
/// Time enough for a block or three.
const VALID_BEFORE_MARGIN_SECONDS: u64 = 6;
/// How far back to look for an authorization that somebody else has sent already.
const LOOK_BACK_BLOCKS: u64 = 2_000;

impl Payments {
    /// Checks a payment against our own terms, and returns its value.
    pub(super) fn check_terms(
        &self,
        payload: &Payload,
        amount: Option<MicroUsdc>,
    ) -> Result<MicroUsdc, PaymentError> {
        let config = &self.0.config;
        payload.check_offered(config).map_err(|reason| {
            refused(reason, format!("use x402 version 1 or 2, scheme exact, network {}", config.network()))
        })?;
        let authorization = &payload.authorization;
        if authorization.to != config.pay_to {
            let sentence = format!("authorize the transfer to {}", config.pay_to);
            return Err(refused(Reason::RecipientMismatch, sentence));
        }
        let value = chain::micro(authorization.value);
        match amount {
            Some(amount) if value == Some(amount) => Ok(amount),
            Some(amount) => {
                Err(refused(Reason::ValueMismatch, format!("authorize exactly {amount} micro-USDC")))
            }
            None => value
                .filter(|value| (config.min_topup..=config.max_topup).contains(value))
                .ok_or(PaymentError::OutOfBounds),
        }
    }

    /// Verifies a payment that is not known yet and writes it down. Returns its id.
    pub(super) async fn admit(&self, payload: &Payload, value: MicroUsdc) -> Result<i64, PaymentError> {
        if !self.0.token_checked.load(Ordering::Acquire) {
            return Err(unavailable(match self.health() {
                ChainHealth::Mismatch(_) => "the token is not the one configured",
                _ => "the chain has not been reached yet",
            }));
        }
        self.check_times(&payload.authorization)?;
        let head = self.0.chain.head().await?;
        self.check_signature(payload).await?;
        let seen_block = match self.0.chain.simulate(&payload.authorization, &payload.signature).await {
            Ok(()) => head.number,
            Err(ChainError::Reverted(why)) => self.explain_revert(payload, head.number, &why).await?,
            Err(other) => return Err(other.into()),
        };
        let new = NewPayment {
            chain_id: self.chain_id(),
            asset: self.asset(),
            authorization: &payload.authorization,
            value,
            signature: &payload.signature,
            seen_block: i64::try_from(seen_block).map_err(|_| unavailable("the head is out of range"))?,
        };
        let mut tx = self.0.db.begin().await?;
        if let Some(id) = store::insert(&mut tx, &new, self.0.clock.now()).await? {
            tx.commit().await?;
            tracing::info!(payment = id, wallet = %payload.authorization.from, %value, "payment verified");
            return Ok(id);
        }
        drop(tx);
        // The same payload came in twice, and the other one was quicker.
        match self.find(payload).await? {
            Some(known) => self.same_payment(payload, &known),
            None => Err(unavailable("the payment was not written down")),
        }
    }

    fn check_times(&self, authorization: &Authorization) -> Result<(), PaymentError> {
        let now = u64::try_from(self.0.clock.now().seconds()).unwrap_or_default();
        if authorization.valid_after > U256::from(now.saturating_sub(VALID_AFTER_MARGIN_SECONDS)) {
            return Err(refused(Reason::ValidAfter, "the authorization is not valid yet: sign one that is"));
        }
        if authorization.valid_before < U256::from(now.saturating_add(VALID_BEFORE_MARGIN_SECONDS)) {
            return Err(refused(
                Reason::ValidBefore,
                "the authorization has expired, or is about to: sign one that lasts a minute or more",
            ));
        }
        Ok(())
    }

    async fn check_signature(&self, payload: &Payload) -> Result<(), PaymentError> {
        let authorization = &payload.authorization;
        let hash = authorization.signing_hash(self.0.chain.domain());
        if chain::recover(hash, &payload.signature) == Some(authorization.from.0) {
            return Ok(());
        }
        // Of an account with code the token asks the code; the simulation does that for us.
        if self.0.chain.has_code(authorization.from).await? {
            return Ok(());
        }
        if payload.signature.len() != 65 {
            return Err(refused(Reason::UnparseableSignature, "the signature is not 65 bytes of r, s and v"));
        }
        Err(refused(
            Reason::InvalidSignature,
            format!(
                "sign TransferWithAuthorization as {} in the domain name {:?}, version {:?}, chain {}",
                authorization.from,
                self.0.chain.domain().name(),
                self.0.chain.domain().version(),
                self.0.config.chain_id
            ),
        ))
    }

    /// Finds out why the transfer would revert. If somebody else has carried it out already, the
    /// money is here: then it is no failure, and the block where it arrived is returned.
    async fn explain_revert(&self, payload: &Payload, head: u64, why: &str) -> Result<u64, PaymentError> {
        let authorization = &payload.authorization;
        let chain = &self.0.chain;
        if chain.is_nonce_used(authorization.from, authorization.nonce).await? {
            let from_block = head.saturating_sub(LOOK_BACK_BLOCKS);
            let head = chain.head().await?.number;
            return match chain.find_transfer(authorization, from_block, head).await? {
                Some(found) => Ok(found.block_number),
                None => Err(refused(
                    Reason::NonceAlreadyUsed,
                    "this authorization was used or cancelled: sign a new one with a fresh nonce",
                )),
            };
        }
        let balance = chain.token_balance(authorization.from).await?;
        if balance < authorization.value {
            return Err(refused(
                Reason::InsufficientBalance,
                format!("{} holds {balance} micro-USDC on this network", authorization.from),
            ));
        }
        if chain.has_code(authorization.from).await? {
            return Err(refused(
                Reason::InvalidSignature,
                format!("the wallet's contract, or the token, refuses the authorization ({why})"),
            ));
        }
        Err(refused(Reason::SimulationFailed, format!("the token refuses the transfer ({why})")))
    }
}

fn unavailable(why: &str) -> PaymentError {
    PaymentError::Unavailable(why.to_owned())
}
