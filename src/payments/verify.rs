//! Whether a payment is what we asked for and will go through. Preconditions, each with a reason of its
//! own, in this order; but where something of its payer would be told, the signature comes first:
//!
//! 1. version, scheme and network are ones that we offer: our own terms count, not what the client
//!    says that it accepted;
//! 2. the receiver is ours and the value is what is asked;
//! 3. it is valid now, and long enough to be mined, unless its transfer is in the chain already;
//! 4. the signature is the payer's, as the token itself will check it;
//! 5. the transfer, simulated on the pending block, succeeds.

use std::collections::HashSet;
use std::time::Duration;

use alloy::primitives::{B256, U256};
use tokio::sync::SemaphorePermit;

use crate::chain::{Authorization, ChainError, Depth, Sighting};
use crate::failpoint;
use crate::money::MicroUsdc;
use crate::payments::store::{self, NewPayment};
use crate::payments::wire::{Payload, Reason};
use crate::payments::{ChainHealth, Kind, Payment, PaymentError, Payments, State, refused, same_request};

/// The token is strict about `validAfter`, and a block's time may be a second behind ours.
const VALID_AFTER_MARGIN_SECONDS: u64 = 1;
/// Time enough for a block or three.
const VALID_BEFORE_MARGIN_SECONDS: u64 = 6;
/// A payment is watched until its authorization ends, so that must not be never.
const LONGEST_VALID_SECONDS: u64 = 86_400;
/// Blocks by which two endpoints, or two looks at one, may differ.
pub(super) const HEAD_MARGIN_BLOCKS: u64 = 64;
/// Unfinished payments of one wallet: more would let it fill the journal, and spend our gas.
const MAX_UNFINISHED: usize = 50;
/// A payment credited since then may have left its wallet after the balance was read: longer than an
/// admission takes, and two nodes' clocks differ.
const JUST_CREDITED_SECONDS: i64 = 60;
/// By so much a block's time may be behind ours.
const EXPIRED_MARGIN_SECONDS: i64 = 120;
/// Payments of one wallet that were sent and came to nothing within a day: a wallet that is a contract
/// can agree to the simulation and burn the gas of what is sent.
const MAX_SENT_IN_VAIN: i64 = 5;
const DAY_SECONDS: i64 = 86_400;
/// How long a payment waits for its turn to be verified.
const ADMISSION_WAIT: Duration = Duration::from_secs(10);
/// Blocks in which logs may still be on their way to an endpoint.
const JUST_NOW_BLOCKS: u64 = 8;
/// How far back to look for an authorization that somebody else has sent already; Base makes a
/// block every two seconds.
const LOOK_BACK_BLOCKS: u64 = LONGEST_VALID_SECONDS / 2;

impl Payments {
    /// Checks a payment against our own terms.
    pub(super) fn check_terms(&self, payload: &Payload) -> Result<(), PaymentError> {
        let config = &self.0.config;
        payload.check_offered(config).map_err(|reason| {
            refused(reason, format!("use x402 version 1 or 2, scheme exact, network {}", config.network()))
        })?;
        if payload.authorization.to != config.pay_to {
            let sentence = format!("authorize the transfer to {}", config.pay_to);
            return Err(refused(Reason::RecipientMismatch, sentence));
        }
        // What the treasury sends to itself brings it nothing.
        if payload.authorization.from == config.pay_to {
            return Err(refused(
                Reason::RecipientMismatch,
                "pay from another wallet than the one that is paid",
            ));
        }
        Ok(())
    }

    /// What is authorised, if it is not too little nor too much.
    pub(super) fn value_within(
        &self,
        payload: &Payload,
        at_least: MicroUsdc,
    ) -> Result<MicroUsdc, PaymentError> {
        let value = payload.value().filter(|value| (at_least..=self.0.config.max_topup).contains(value));
        value.ok_or(PaymentError::OutOfBounds)
    }

    /// Whether the authorised value is what is asked for, where something is.
    pub(super) fn check_amount(
        &self,
        payload: &Payload,
        amount: Option<MicroUsdc>,
    ) -> Result<MicroUsdc, PaymentError> {
        let value = payload.value();
        match amount {
            Some(amount) if value != Some(amount) => {
                Err(refused(Reason::ValueMismatch, format!("authorize exactly {amount} micro-USDC")))
            }
            _ => value.ok_or(PaymentError::OutOfBounds),
        }
    }

    /// Verifies a payment that is not known yet and writes it down. Returns its id.
    pub(super) async fn admit(
        &self,
        payload: &Payload,
        value: MicroUsdc,
        request_hash: Option<&str>,
    ) -> Result<i64, PaymentError> {
        if !self.is_token_checked() {
            return Err(unavailable(match self.health() {
                ChainHealth::Mismatch(_) => "the token is not the one configured",
                _ => "the chain has not been reached yet",
            }));
        }
        let _place = self.place_to_verify().await?;
        // Whoever waited may have waited for the same payment.
        if let Some(known) = self.find(payload).await? {
            self.check_made_for(payload, &known, request_hash).await?;
            return Ok(known.id);
        }
        if let Some(first) = self.named_before(payload, request_hash).await? {
            return Ok(first.id);
        }
        if let Err(refusal) = self.check_times(&payload.authorization) {
            // It was carried out in time, if the books have lost it since: then the money is here.
            if !self.has_arrived(payload).await? {
                return Err(refusal);
            }
        }
        self.check_signature(payload).await?;
        // Another endpoint may be a little ahead of the one that says where the head is.
        let head = self.0.chain.head().await?.number;
        let simulated = self.0.chain.simulate(&payload.authorization, &payload.signature).await;
        let (state, seen_block) = match simulated {
            Ok(()) => (State::Verified, head.saturating_sub(HEAD_MARGIN_BLOCKS)),
            // Somebody else has sent it, so there is nothing for us to send: it is only watched.
            Err(ChainError::Reverted(why)) => match self.explain_revert(payload, head, &why).await {
                Ok(seen_block) => (State::Broadcast, seen_block),
                Err(refusal) => {
                    // Another node may have written it down and carried it out meanwhile.
                    let Some(known) = self.find(payload).await? else { return Err(refusal) };
                    self.check_made_for(payload, &known, request_hash).await?;
                    return Ok(known.id);
                }
            },
            Err(other) => return Err(other.into()),
        };
        // Who sends what is in the chain already may have read it there: it is its payer's, and buys nothing.
        let is_public = state == State::Broadcast && request_hash.is_some();
        let new = NewPayment {
            kind: Kind::Authorization,
            chain_id: self.chain_id(),
            asset: self.asset(),
            authorization: &payload.authorization,
            value,
            signature: &payload.signature,
            request_hash: request_hash.filter(|_| !is_public),
            // One that is here already is nobody's stand-in.
            identifier: payload.identifier.as_deref().filter(|_| state == State::Verified),
            state,
            seen_block: i64::try_from(seen_block).map_err(|_| unavailable("the head is out of range"))?,
            found: None,
        };
        match self.write_down(payload, &new).await? {
            WrittenDown::As(id) if is_public => {
                drop(self.drive(id));
                Err(PaymentError::MadeForAnother)
            }
            WrittenDown::As(id) => Ok(id),
            WrittenDown::Named(first) => {
                same_request(payload, &first, request_hash)?;
                Ok(first.id)
            }
            // The same payload came in twice, and the other one was quicker.
            WrittenDown::There => {
                let known = self.find(payload).await?;
                let known = known.ok_or_else(|| unavailable("the payment was not written down"))?;
                self.check_made_for(payload, &known, request_hash).await?;
                Ok(known.id)
            }
        }
    }

    /// A place among the verifications that run at once.
    pub(super) async fn place_to_verify(&self) -> Result<SemaphorePermit<'_>, PaymentError> {
        match tokio::time::timeout(ADMISSION_WAIT, self.0.admissions.acquire()).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(unavailable("too many payments are being verified")),
        }
    }

    /// Whether a payload is the payment that is known, and that was made for the same.
    pub(super) async fn check_made_for(
        &self,
        payload: &Payload,
        known: &Payment,
        request_hash: Option<&str>,
    ) -> Result<(), PaymentError> {
        self.same_payment(payload, known).await?;
        match request_hash {
            Some(hash) if known.request_hash.as_deref() != Some(hash) => Err(PaymentError::MadeForAnother),
            _ => Ok(()),
        }
    }

    /// Writes a verified payment down, within its wallet's bounds.
    ///
    /// What the wallet holds must cover this payment and all that are under way, or were a moment ago:
    /// the simulation has seen it alone. Of those some may have left the wallet already; which, only the
    /// chain knows, and it is asked between two tries and not inside of a transaction.
    async fn write_down(&self, payload: &Payload, new: &NewPayment<'_>) -> Result<WrittenDown, PaymentError> {
        let from = new.authorization.from;
        let mut held = match new.state {
            State::Verified => self.0.chain.pending_balance(from).await?,
            // For what somebody else has carried out nothing need be held any more, nor gas be spent.
            _ => U256::MAX,
        };
        let mut gone = HashSet::new();
        loop {
            let (under_way, promised) = match self.try_write_down(payload, new, held, &gone).await? {
                Ok(written) => return Ok(written),
                Err(NotCovered { under_way, promised }) => (under_way, promised),
            };
            let known = gone.len();
            for payment in under_way {
                let nonce = payment.authorization.nonce;
                if !gone.contains(&nonce) && self.0.chain.is_nonce_used(from, nonce).await? {
                    gone.insert(nonce);
                }
            }
            // Each try finds one more that has left, or is the last.
            if gone.len() == known {
                return Err(not_covered(promised, held));
            }
            // Read after the nonces: what is known to have left is not in it any more.
            held = self.0.chain.pending_balance(from).await?;
        }
    }

    /// Writes a payment down if `held` covers it and all that are under way, but for those `gone`.
    async fn try_write_down(
        &self,
        payload: &Payload,
        new: &NewPayment<'_>,
        held: U256,
        gone: &HashSet<B256>,
    ) -> Result<Result<WrittenDown, NotCovered>, PaymentError> {
        let from = new.authorization.from;
        let now = self.0.clock.now();
        let mut tx = self.0.db.begin().await?;
        let Some(id) = store::insert(&mut tx, new, now).await? else { return Ok(Ok(WrittenDown::There)) };
        // Numbering payments orders those who insert, so each sees all that came before it.
        if new.identifier.is_some()
            && let Some(first) = self.first_named(&mut tx, payload).await?
            && first.id != id
        {
            return Ok(Ok(WrittenDown::Named(Box::new(first))));
        }
        if new.state == State::Verified {
            let under_way = {
                let since = now.plus_seconds(-JUST_CREDITED_SECONDS);
                store::under_way(&mut tx, new.chain_id, new.asset, from, since).await?
            };
            // What has expired will not leave any more, though that is not final yet.
            let still_valid = now.plus_seconds(-EXPIRED_MARGIN_SECONDS).seconds();
            let still_valid = U256::from(u64::try_from(still_valid).unwrap_or_default());
            let unfinished = under_way.iter().filter(|payment| !payment.state.is_credited());
            if unfinished.count() > MAX_UNFINISHED {
                return Err(PaymentError::TooManyUnfinished);
            }
            let can_leave = |payment: &&Payment| {
                let authorization = &payment.authorization;
                !gone.contains(&authorization.nonce) && authorization.valid_before >= still_valid
            };
            let to_leave = under_way.iter().filter(can_leave);
            let promised = to_leave.map(|payment| payment.authorization.value).sum::<U256>();
            if held < promised {
                return Ok(Err(NotCovered { under_way, promised }));
            }
            if store::sent_in_vain(&mut tx, from, now.plus_seconds(-DAY_SECONDS)).await? >= MAX_SENT_IN_VAIN {
                return Err(PaymentError::TooManyFailed);
            }
        }
        tx.commit().await?;
        failpoint::reached("verified");
        tracing::info!(payment = id, wallet = %from, value = %new.value, "payment verified");
        Ok(Ok(WrittenDown::As(id)))
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
        if authorization.valid_before > U256::from(now.saturating_add(LONGEST_VALID_SECONDS)) {
            let sentence = "the authorization is valid for too long: sign one that ends within a day";
            return Err(refused(Reason::ValidBefore, sentence));
        }
        Ok(())
    }

    /// Whether an authorization's transfer is in the chain.
    async fn has_arrived(&self, payload: &Payload) -> Result<bool, PaymentError> {
        let (authorization, chain) = (&payload.authorization, &self.0.chain);
        if !chain.is_nonce_used(authorization.from, authorization.nonce).await? {
            return Ok(false);
        }
        let from_block = chain.head().await?.number.saturating_sub(LOOK_BACK_BLOCKS);
        let view = chain.sight(authorization, from_block, Depth::Head).await?;
        if view.sighting == Sighting::Nowhere {
            // Another transfer, or a cancellation; or its logs are still on their way.
            return if chain.was_spent(authorization, from_block).await? {
                Ok(false)
            } else {
                Err(PaymentError::Uncertain("the authorization was used, and no log says by what".into()))
            };
        }
        Ok(true)
    }

    pub(super) async fn check_signature(&self, payload: &Payload) -> Result<(), PaymentError> {
        let authorization = &payload.authorization;
        if self.is_signed_by_key(payload) {
            return Ok(());
        }
        // Of an account with code, or one that gets it on the way, the token asks the code; the
        // simulation does that for us.
        if self.is_asked_of_code(payload).await? {
            return Ok(());
        }
        if let Some(factory) = self.0.chain.factory_of(&payload.signature) {
            let factory = factory.address;
            let sentence =
                format!("the factory {factory} may not deploy wallets here: deploy the wallet first");
            return Err(refused(Reason::UnparseableSignature, sentence));
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

    /// Whether it is a contract's word that counts for the signature, and not a key.
    async fn is_asked_of_code(&self, payload: &Payload) -> Result<bool, ChainError> {
        let chain = &self.0.chain;
        let factory = chain.factory_of(&payload.signature);
        Ok(factory.is_some_and(|factory| factory.is_allowed)
            || chain.has_code(payload.authorization.from).await?)
    }

    /// Finds out why the transfer would revert. If somebody else has carried it out already, the
    /// money is here: then it is no failure, and the block where it arrived is returned.
    async fn explain_revert(&self, payload: &Payload, head: u64, why: &str) -> Result<u64, PaymentError> {
        let authorization = &payload.authorization;
        let chain = &self.0.chain;
        // A key's signature was checked before; a contract's is looked at only now, and before
        // anything else, as in the token: what is not the payer's must not cost us a search.
        let hash = authorization.signing_hash(chain.domain());
        if self.is_asked_of_code(payload).await?
            && !chain.is_valid_signature(authorization.from, hash, &payload.signature).await?
        {
            let from = authorization.from;
            let sentence =
                format!("the contract of the wallet {from} does not take the signature for its own ({why})");
            return Err(refused(Reason::InvalidSignature, sentence));
        }
        if chain.is_nonce_used(authorization.from, authorization.nonce).await? {
            // As far back as a valid authorization can have been sent.
            let from_block = head.saturating_sub(LOOK_BACK_BLOCKS);
            let view = chain.sight(authorization, from_block, Depth::Head).await?;
            match view.sighting {
                Sighting::Nowhere => {}
                Sighting::Disputed(_) => return Ok(from_block),
                Sighting::Agreed(found) | Sighting::Alone(found) => {
                    return Ok(found.block_number.saturating_sub(HEAD_MARGIN_BLOCKS));
                }
            }
            // Used only just now, its logs may not be everywhere yet: that is no time to send the
            // payer away. What was used earlier and left no transfer in all that time never paid us.
            let earlier = head.saturating_sub(JUST_NOW_BLOCKS);
            let spent = chain.was_spent(authorization, from_block).await?;
            let (from, nonce) = (authorization.from, authorization.nonce);
            if spent || chain.was_nonce_used_at(from, nonce, earlier).await? {
                return Err(refused(
                    Reason::NonceAlreadyUsed,
                    "this authorization was used or cancelled: sign a new one with a fresh nonce",
                ));
            }
            return Ok(from_block);
        }
        let balance = chain.pending_balance(authorization.from).await?;
        if balance < authorization.value {
            return Err(refused(
                Reason::InsufficientBalance,
                format!("{} holds {balance} micro-USDC on this network", authorization.from),
            ));
        }
        Err(refused(Reason::SimulationFailed, format!("the token refuses the transfer ({why})")))
    }
}

fn unavailable(why: &str) -> PaymentError {
    PaymentError::Unavailable(why.to_owned())
}

/// What came of writing a payment down.
enum WrittenDown {
    /// It has this id.
    As(i64),
    /// It was there already.
    There,
    /// Another of its wallet was there under its name.
    Named(Box<Payment>),
}

/// The wallet does not hold what is promised by its payments under way, the new one among them.
struct NotCovered {
    under_way: Vec<Payment>,
    promised: U256,
}

/// A wallet can authorise the same coins many times over, and each would be sent at our expense.
fn not_covered(promised: U256, held: U256) -> PaymentError {
    refused(
        Reason::InsufficientBalance,
        format!("{promised} micro-USDC are authorised in payments not finished yet, and {held} are there"),
    )
}
