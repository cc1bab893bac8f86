//! `farebox audit`: every invariant of the books recomputed on a live database, from one instant of
//! it, and the credits compared with the treasury's incoming transfers on the chain.

mod store;

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use alloy::primitives::U256;

use crate::chain::{Chain, ChainError};
use crate::db::{Db, DbError, DbTx};
use crate::id::Wallet;
use crate::ledger::{Outcome, Receipt};
use crate::money::MicroUsdc;
use crate::payments::{self, Payment, State};

/// Rows that are named when a check finds some.
const NAMED: usize = 3;

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    Ok,
    /// The books contradict themselves or the chain.
    Drift,
    /// Nothing is wrong with the books, but the operator should know.
    Warning,
    /// Could not be looked at.
    Skipped,
}

impl Verdict {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Drift => "DRIFT",
            Self::Warning => "warning",
            Self::Skipped => "skipped",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Row {
    pub check: &'static str,
    pub verdict: Verdict,
    pub detail: String,
}

/// What the audit found, a row a check.
#[derive(Clone, Debug, Default)]
pub struct Report(pub Vec<Row>);

impl Report {
    pub fn has_drift(&self) -> bool {
        self.0.iter().any(|row| row.verdict == Verdict::Drift)
    }

    /// Whether everything could be looked at, also what is compared with the chain.
    pub fn is_whole(&self) -> bool {
        self.0.iter().all(|row| row.verdict != Verdict::Skipped)
    }

    fn add(&mut self, check: &'static str, verdict: Verdict, detail: impl Into<String>) {
        self.0.push(Row { check, verdict, detail: detail.into() });
    }

    /// A check that passes when nothing is at odds with it.
    fn check(&mut self, check: &'static str, looked_at: impl fmt::Display, at_odds: &[String]) {
        if at_odds.is_empty() {
            return self.add(check, Verdict::Ok, looked_at.to_string());
        }
        let more = at_odds.len().saturating_sub(NAMED);
        let named = at_odds.iter().take(NAMED).cloned().collect::<Vec<_>>().join("; ");
        let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
        self.add(check, Verdict::Drift, format!("{named}{rest}"));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.0 {
            writeln!(f, "{:<8} {:<52} {}", row.verdict.as_str(), row.check, row.detail)?;
        }
        Ok(())
    }
}

/// Audits the database, and the chain where one is given and answers.
pub async fn run(db: &Db, chain: Option<(&Chain, Wallet)>) -> Result<Report, DbError> {
    let mut report = Report::default();
    let mut tx = db.snapshot().await?;
    for check in store::CHECKS {
        let at_odds = store::at_odds(&mut tx, check).await?;
        report.check(check.name, format_args!("{} {}", at_odds.looked_at, check.of), &at_odds.rows);
    }
    check_charges(&mut tx, &mut report).await?;
    let credited = payments::all_credited(&mut tx).await?;
    let in_suspense = payments::all_in_suspense(&mut tx).await?;
    let withdrawals = payments::all_withdrawals(&mut tx).await?;
    let owed = store::owed(&mut tx).await?;
    drop(tx);
    match chain {
        None => report.add(CREDITS_ON_CHAIN, Verdict::Skipped, "no chain was given"),
        Some((chain, treasury)) => {
            let moved = Moved { credited, in_suspense, withdrawals };
            if let Err(error) = check_chain(chain, treasury, &moved, owed, &mut report).await {
                report.add(CREDITS_ON_CHAIN, Verdict::Skipped, error.to_string());
            }
            if let Err(error) = check_withdrawals(chain, treasury, &moved, owed, &mut report).await {
                report.add(WITHDRAWALS_ON_CHAIN, Verdict::Skipped, error.to_string());
            }
        }
    }
    Ok(report)
}

const CREDITS_ON_CHAIN: &str = "each credit has its transfer on the chain";
const WITHDRAWALS_ON_CHAIN: &str = "each withdrawal has its transfer on the chain";

/// Works every receipt's charge out again from its usage and its frozen prices.
async fn check_charges(tx: &mut DbTx, report: &mut Report) -> Result<(), DbError> {
    let mut at_odds = Vec::new();
    let mut receipts = 0;
    let mut after = String::new();
    loop {
        let page = store::receipts_after(tx, &after).await?;
        let Some(last) = page.last() else { break };
        after = last.id.clone();
        receipts += page.len();
        at_odds.extend(page.iter().filter_map(wrong_charge));
    }
    report.check("charges follow from usage and prices", format_args!("{receipts} receipts"), &at_odds);
    Ok(())
}

/// What is wrong with a receipt's figures, if anything is.
fn wrong_charge(receipt: &Receipt) -> Option<String> {
    let wrong = |what: String| Some(format!("{}: {what}", receipt.id));
    if receipt.outcome == Outcome::Released {
        return None;
    }
    let Some(charge) = receipt.terms.charge(&receipt.usage, receipt.hold) else {
        return wrong("cannot be worked out".into());
    };
    if charge.cost != receipt.cost {
        return wrong(format!("cost {} where {} follows", receipt.cost.to_usd(), charge.cost.to_usd()));
    }
    let charged_otherwise = match receipt.outcome {
        // Where tokens may have been used unseen, the whole hold is charged.
        Outcome::Estimated => receipt.charged != charge.charged && receipt.charged != receipt.hold,
        _ => receipt.charged != charge.charged,
    };
    // Of a hold that a crash took, only what was left could be charged.
    let due = if receipt.outcome == Outcome::Estimated { receipt.hold } else { charge.charged };
    let excused = receipt.reason.as_deref() == Some(crate::ledger::HOLD_LOST) && receipt.charged < due;
    if charged_otherwise && !excused {
        return wrong(format!("charged {} where {} follows", receipt.charged, charge.charged));
    }
    None
}

/// What the books know to have arrived, and to have left.
struct Moved {
    credited: Vec<Payment>,
    /// Of wallets that nobody knows yet, and what is too little.
    in_suspense: Vec<Payment>,
    /// In whatever state.
    withdrawals: Vec<Payment>,
}

impl Moved {
    /// A block that is no later than any of what they know.
    fn first_block(&self) -> Option<u64> {
        let all = self.credited.iter().chain(&self.in_suspense).chain(&self.withdrawals);
        let first = all.map(|payment| payment.block_number.unwrap_or(i64::MAX).min(payment.seen_block)).min();
        first.map(|block| u64::try_from(block).unwrap_or_default())
    }
}

async fn check_chain(
    chain: &Chain,
    treasury: Wallet,
    moved: &Moved,
    owed: MicroUsdc,
    report: &mut Report,
) -> Result<(), ChainError> {
    let head = chain.head().await?.number;
    let mut at_odds = Vec::new();
    let mut uncredited = 0usize;
    let mut by_receiver: BTreeMap<Wallet, Vec<&Payment>> = BTreeMap::new();
    let Moved { credited, in_suspense, withdrawals } = moved;
    for payment in credited.iter().chain(in_suspense) {
        by_receiver.entry(payment.authorization.to).or_default().push(payment);
    }
    for (receiver, payments) in by_receiver {
        let first = payments.iter().filter_map(|p| u64::try_from(p.block_number?).ok()).min();
        let transfers = chain.transfers_to(receiver, first.unwrap_or_default(), head).await?;
        let mut on_chain: HashMap<_, _> = transfers
            .into_iter()
            .map(|(found, value)| ((found.tx_hash.to_string(), found.log_index), value))
            .collect();
        for payment in payments {
            let place = payment.tx_hash.clone().zip(payment.log_index.and_then(|i| u64::try_from(i).ok()));
            let value = place.and_then(|place| on_chain.remove(&place));
            if value != Some(payment.authorization.value) {
                at_odds.push(format!("payment {} of {} is not there", payment.id, payment.value));
            }
        }
        uncredited += on_chain.len();
    }
    report.check(CREDITS_ON_CHAIN, format_args!("{} credits up to block {head}", credited.len()), &at_odds);
    if !in_suspense.is_empty() {
        let micro: i64 = in_suspense.iter().map(|deposit| deposit.value.get()).fold(0, i64::saturating_add);
        let detail = format!(
            "{} deposits of {micro} micro-USDC wait for their wallets: farebox payments suspense",
            in_suspense.len()
        );
        report.add("each deposit is credited", Verdict::Warning, detail);
    }
    if uncredited > 0 {
        let detail = format!("{uncredited} transfers to the treasury belong to no credit");
        report.add("each transfer to the treasury is credited", Verdict::Warning, detail);
    }
    let held = chain.token_balance(treasury).await?;
    // What is in a block has left the treasury, and the balance when it is final.
    let sent = withdrawals.iter().filter(|withdrawal| withdrawal.state == State::Mined);
    let sent = sent.map(|withdrawal| withdrawal.value.get()).fold(0, i64::saturating_add);
    let owed = MicroUsdc::new(owed.get().saturating_sub(sent));
    let enough = u64::try_from(owed.get()).is_ok_and(|owed| held >= U256::from(owed));
    let verdict = if enough { Verdict::Ok } else { Verdict::Warning };
    report.add(
        "the treasury holds what wallets are owed",
        verdict,
        format!("{held} micro-USDC held, {owed} owed"),
    );
    Ok(())
}

async fn check_withdrawals(
    chain: &Chain,
    treasury: Wallet,
    moved: &Moved,
    owed: MicroUsdc,
    report: &mut Report,
) -> Result<(), ChainError> {
    let head = chain.head().await?.number;
    let mut at_odds = Vec::new();
    let (mut finals, mut unknown) = (0usize, 0usize);
    let mut by_sender: BTreeMap<Wallet, Vec<&Payment>> = BTreeMap::new();
    for withdrawal in &moved.withdrawals {
        by_sender.entry(withdrawal.authorization.from).or_default().push(withdrawal);
    }
    // Also where a restored database has forgotten that anything was ever paid out; but nothing can have been
    // before anything came in.
    let Some(first) = moved.first_block() else {
        if chain.has_treasury_key() && owed > MicroUsdc::ZERO {
            let detail = "nothing came in by the chain, so that there is no block to begin at";
            report.add(WITHDRAWALS_ON_CHAIN, Verdict::Warning, detail);
        }
        return Ok(());
    };
    by_sender.entry(treasury).or_default();
    for (sender, withdrawals) in by_sender {
        let transfers = chain.transfers_from(sender, first, head).await?;
        let mut on_chain: HashMap<_, _> = transfers
            .into_iter()
            .map(|(found, to, value)| ((found.tx_hash.to_string(), found.log_index), (to, value)))
            .collect();
        let is_final = |withdrawal: &&&Payment| withdrawal.state == State::Finalized;
        for withdrawal in withdrawals.iter().filter(is_final) {
            finals += 1;
            let index = withdrawal.log_index.and_then(|index| u64::try_from(index).ok());
            let place = withdrawal.tx_hash.clone().zip(index);
            let authorization = &withdrawal.authorization;
            let paid = place.and_then(|place| on_chain.remove(&place));
            if paid != Some((authorization.to, authorization.value)) {
                at_odds.push(format!("withdrawal {} of {} is not there", withdrawal.id, withdrawal.value));
            }
        }
        let by_nonce: HashMap<_, _> =
            withdrawals.iter().map(|withdrawal| (withdrawal.authorization.nonce, withdrawal)).collect();
        for nonce in chain.authorizations_used(sender, first, head).await? {
            match by_nonce.get(&nonce) {
                None => unknown += 1,
                Some(withdrawal) if matches!(withdrawal.state, State::Expired | State::Cancelled) => {
                    at_odds.push(format!("withdrawal {} was paid, and given back", withdrawal.id));
                }
                Some(_) => {}
            }
        }
    }
    report.check(WITHDRAWALS_ON_CHAIN, format_args!("{finals} withdrawals up to block {head}"), &at_odds);
    if unknown > 0 {
        // As after a backup was restored: what was paid since is still in balances.
        let detail =
            format!("{unknown} authorizations of the treasury were carried out that are no withdrawal here");
        report.add("each authorization of the treasury is a withdrawal", Verdict::Warning, detail);
    }
    Ok(())
}
