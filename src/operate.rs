//! The operator's commands on the books: they work beside a running server, on the same database.

use std::path::Path;

use clap::Subcommand;
use farebox::clock::Clock;
use farebox::db::{Access, Db};
use farebox::id::{Entropy, Wallet};
use farebox::ledger::Ledger;
use farebox::money::MicroUsdc;
use farebox::payments::{Journal, State};

use crate::{Failure, load};

/// Payments listed when no other number is asked for.
const LISTED: i64 = 50;

#[derive(Subcommand)]
pub enum PaymentsCommand {
    /// List payments, newest first.
    List {
        /// Only those in this state: verified, signed, broadcast, mined, credited, finalized, expired,
        /// cancelled or reorged.
        #[arg(long)]
        state: Option<String>,
        #[arg(long, default_value_t = LISTED, value_parser = clap::value_parser!(i64).range(1..))]
        limit: i64,
    },
    /// Show one payment and the transactions signed for it.
    Show { id: i64 },
    /// Have a payment that expired or was cancelled looked at again by the running server.
    Retry { id: i64 },
}

#[derive(Subcommand)]
pub enum WalletCommand {
    /// Show a wallet's balance, locked amount, debt and last entries.
    Show { wallet: String },
    /// Stop a wallet from making new holds; it is told the reason.
    Freeze {
        wallet: String,
        #[arg(value_parser = not_blank)]
        reason: String,
    },
    /// Let a frozen wallet go on.
    Unfreeze { wallet: String },
    /// Add to a wallet's balance, or take from what is available: an entry, with a reason.
    #[command(allow_negative_numbers = true)]
    Adjust {
        wallet: String,
        /// USD, with up to six decimals; below zero it is taken.
        usd: String,
        #[arg(value_parser = not_blank)]
        reason: String,
        /// Names the adjustment: with the same name it is made once, however often it is asked for.
        #[arg(long, value_parser = not_blank)]
        reference: Option<String>,
    },
}

/// What is written into the books for people to read must say something.
fn not_blank(text: &str) -> Result<String, &'static str> {
    if text.trim().is_empty() { Err("it must not be blank") } else { Ok(text.to_owned()) }
}

fn failure(message: impl Into<String>) -> Failure {
    Failure { status: 1, message: message.into() }
}

/// An address as somebody has typed it: where it is in mixed case, that is its checksum (EIP-55).
fn wallet_of(text: &str) -> Result<Wallet, Failure> {
    let wallet: Wallet = text.parse()?;
    let is_mixed = |text: &str| {
        text.contains(|c: char| c.is_ascii_lowercase()) && text.contains(|c: char| c.is_ascii_uppercase())
    };
    let digits = text.get(2..).unwrap_or_default();
    if is_mixed(digits) && wallet.to_string().get(2..) != Some(digits) {
        return Err(failure(format!("the checksum of {text} is wrong: it was mistyped")));
    }
    Ok(wallet)
}

async fn open(path: &Path) -> Result<Db, Failure> {
    let config = load(path)?;
    Ok(Db::open(&config.database_url, Access::Inspect).await?)
}

pub async fn payments(path: &Path, command: PaymentsCommand) -> Result<(), Failure> {
    let journal = Journal::new(open(path).await?, Clock::System);
    match command {
        PaymentsCommand::List { state, limit } => {
            let state = state.map(|text| text.parse::<State>()).transpose();
            let state =
                state.map_err(|()| failure("there is no such state; see --help for those there are"))?;
            println!("{:>8} {:<10} {:>14} {:<42} created", "id", "state", "micro-USDC", "wallet");
            for payment in journal.list(state, limit).await? {
                println!(
                    "{:>8} {:<10} {:>14} {:<42} {}",
                    payment.id,
                    payment.state.as_str(),
                    payment.value.get(),
                    payment.authorization.from.to_string(),
                    payment.created_at.rfc3339()
                );
            }
        }
        PaymentsCommand::Show { id } => {
            let (payment, transactions) =
                journal.show(id).await?.ok_or_else(|| failure(format!("there is no payment {id}")))?;
            let none = || "-".to_owned();
            println!("id            {}", payment.id);
            println!("state         {}", payment.state.as_str());
            println!("wallet        {}", payment.authorization.from);
            println!("to            {}", payment.authorization.to);
            println!("micro-USDC    {}", payment.value.get());
            println!("nonce         {}", payment.authorization.nonce);
            println!("valid before  {} (Unix seconds)", payment.authorization.valid_before);
            println!("transaction   {}", payment.tx_hash.unwrap_or_else(none));
            println!("block         {}", payment.block_number.map_or_else(none, |block| block.to_string()));
            println!("last note     {}", payment.last_error.unwrap_or_else(none));
            println!("created       {}", payment.created_at.rfc3339());
            for signed in transactions {
                println!(
                    "signed        {} by {} nonce {}",
                    signed.hash, signed.relayer, signed.account_nonce
                );
            }
        }
        PaymentsCommand::Retry { id } => {
            if !journal.retry(id).await? {
                return Err(failure(format!(
                    "payment {id} is not one that expired or was cancelled: only those can be looked at again"
                )));
            }
            println!("payment {id} will be looked at again by the running server within seconds");
        }
    }
    Ok(())
}

pub async fn wallet(path: &Path, command: WalletCommand) -> Result<(), Failure> {
    let ledger = Ledger::new(open(path).await?, Clock::System, "operator".into());
    match command {
        WalletCommand::Show { wallet } => {
            let wallet = wallet_of(&wallet)?;
            let balance = ledger.balance(wallet).await?;
            println!("wallet      {wallet}");
            println!("balance     {} USDC", balance.balance.to_usd());
            println!("locked      {} USDC", balance.locked.to_usd());
            println!("available   {} USDC", balance.available().to_usd());
            println!("debt        {} USDC", balance.debt.to_usd());
            println!("frozen      {}", ledger.frozen(wallet).await?.unwrap_or_else(|| "no".into()));
            for entry in ledger.entries(wallet, LISTED).await? {
                println!(
                    "{:>8} {:<10} {:>14} {:>14} {} {}",
                    entry.seq,
                    entry.kind,
                    entry.amount.get(),
                    entry.balance_after.get(),
                    entry.reference,
                    entry.note.unwrap_or_default()
                );
            }
        }
        WalletCommand::Freeze { wallet, reason } => {
            ledger.freeze(wallet_of(&wallet)?, Some(reason)).await?;
            println!("frozen: no new hold is made; what is held already is settled");
        }
        WalletCommand::Unfreeze { wallet } => {
            ledger.freeze(wallet_of(&wallet)?, None).await?;
            println!("unfrozen");
        }
        WalletCommand::Adjust { wallet, usd, reason, reference } => {
            let amount = MicroUsdc::parse_usd(&usd)
                .map_err(|e| failure(format!("{usd:?} is no amount of USD such as 5 or -0.25: {e}")))?;
            if amount == MicroUsdc::ZERO {
                return Err(failure("an adjustment needs an amount other than zero"));
            }
            let reference = reference.unwrap_or_else(|| format!("adj_{}", hex::encode(Entropy.bytes::<8>())));
            let balance = ledger.adjust(wallet_of(&wallet)?, amount, &reference, &reason).await?;
            println!("{reference}: the balance is {} USDC now", balance.balance.to_usd());
        }
    }
    Ok(())
}
