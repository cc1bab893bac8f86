//! The operator's commands on the books: they work beside a running server, on the same database.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use farebox::archive::{self, Archive, Archiver, FILE_RECEIPTS};
use farebox::attest::{self, Attestor};
use farebox::clock::{Clock, Timestamp};
use farebox::db::{Access, Db};
use farebox::http;
use farebox::id::{Entropy, Wallet};
use farebox::ledger::Ledger;
use farebox::money::MicroUsdc;
use farebox::payments::{Journal, State};
use farebox::reserves;

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
    /// List deposits that are nobody's yet: of wallets that never signed in nor paid, of less than
    /// min_deposit_usd, or of a relayer.
    Suspense {
        #[arg(long, default_value_t = LISTED, value_parser = clap::value_parser!(i64).range(1..))]
        limit: i64,
    },
    /// Credit a deposit that is in suspense, for a reason: to its sender, or to another wallet.
    Attribute {
        id: i64,
        #[arg(value_parser = not_blank)]
        reason: String,
        /// The wallet that it is for, where that is not its sender.
        #[arg(long)]
        to: Option<String>,
    },
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

#[derive(Subcommand)]
pub enum ReceiptsCommand {
    /// Move the receipts of requests that began and ended before a time into files of JSON lines, and take
    /// them out of the database. What an interrupted run began is finished first.
    Archive {
        /// A day (2026-01-31, its beginning in UTC), a time (RFC 3339), or how many days ago (90). Two days
        /// ago at the latest.
        #[arg(long, value_name = "TIME")]
        before: String,
        /// The directory for the files; an interrupted run goes on with its file there.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Receipts in a file at most; there are as many files as it takes.
        #[arg(long, default_value_t = FILE_RECEIPTS, value_parser = clap::value_parser!(i64).range(1..))]
        per_file: i64,
    },
    /// Print a receipt as the API answers it, signed; with --dir, one that was moved into a file there too.
    Show {
        id: String,
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// List the keys that receipts are, or were, signed with.
    Keys,
    /// Say that somebody else may have a key that receipts were signed with: /v1/status then tells so of it.
    RevokeKey { address: String },
    /// List the files that receipts were moved into.
    Archives,
    /// Hold the files in a directory against what the database knows of them: SHA-256, receipts, charges.
    Check {
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
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
    let db = open(path).await?;
    let ledger = Ledger::new(db.clone(), Clock::System, "operator".into());
    let journal = Journal::new(db, Clock::System);
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
                    payment.wallet().to_string(),
                    payment.created_at.rfc3339()
                );
            }
        }
        PaymentsCommand::Show { id } => {
            let (payment, transactions) =
                journal.show(id).await?.ok_or_else(|| failure(format!("there is no payment {id}")))?;
            let none = || "-".to_owned();
            println!("id            {}", payment.id);
            println!("kind          {}", payment.kind.as_str());
            println!("state         {}", payment.state.as_str());
            println!("wallet        {}", payment.wallet());
            println!("from          {}", payment.authorization.from);
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
        PaymentsCommand::Suspense { limit } => {
            println!("{:>8} {:>14} {:<42} {:<66} created", "id", "micro-USDC", "sender", "transaction");
            for deposit in journal.suspense(limit).await? {
                println!(
                    "{:>8} {:>14} {:<42} {:<66} {}",
                    deposit.id,
                    deposit.value.get(),
                    deposit.authorization.from.to_string(),
                    deposit.tx_hash.unwrap_or_default(),
                    deposit.created_at.rfc3339()
                );
            }
            let (deposits, value) = journal.count_suspense().await?;
            println!("{deposits} deposits of {} USDC in all", value.to_usd());
        }
        PaymentsCommand::Attribute { id, reason, to } => {
            let to = to.as_deref().map(wallet_of).transpose()?;
            if !journal.attribute(&ledger, id, to, &reason).await? {
                return Err(failure(format!(
                    "payment {id} is not a deposit in suspense: `farebox payments suspense` lists those"
                )));
            }
            println!("payment {id} is credited");
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

pub async fn receipts(path: &Path, command: ReceiptsCommand) -> Result<(), Failure> {
    match command {
        ReceiptsCommand::Archive { before, out, per_file } => {
            let before = time_of(&before, Clock::System.now())?;
            let archiver = Archiver::new(open(path).await?, Clock::System, out)?;
            let mut made = archiver.resume().await?;
            let mut any = made.is_some();
            loop {
                if let Some(archive) = &made {
                    println!("{}", line_of(archive));
                }
                made = archiver.archive(before, per_file).await?;
                if made.is_none() {
                    break;
                }
                any = true;
            }
            if !any {
                println!("there is no receipt to archive of before {}", before.rfc3339());
            }
        }
        ReceiptsCommand::Show { id, dir } => show_receipt(path, &id, dir.as_deref()).await?,
        ReceiptsCommand::Keys => {
            for key in attest::known_keys(&open(path).await?).await? {
                let revoked =
                    key.revoked_at.map_or_else(String::new, |at| format!(", revoked {}", at.rfc3339()));
                println!("{} since {}{revoked}", key.address, key.since.rfc3339());
            }
        }
        ReceiptsCommand::RevokeKey { address } => {
            let key = wallet_of(&address)?;
            if !attest::revoke_key(&open(path).await?, key, Clock::System.now()).await? {
                return Err(failure(format!("no receipt was ever signed by {key}")));
            }
            println!("{key} is revoked; where it is still the key that signs, set another and restart");
        }
        ReceiptsCommand::Archives => {
            for archive in archive::list(&open(path).await?).await? {
                println!("{}", line_of(&archive));
            }
        }
        ReceiptsCommand::Check { dir } => {
            let (mut bad, archives) = (0, archive::list(&open(path).await?).await?);
            for archive in &archives {
                if let Err(why) = archive::check(archive, &dir) {
                    bad += 1;
                    println!("{why}");
                }
            }
            if bad > 0 {
                return Err(failure(format!(
                    "{bad} of {} files are not as they were written",
                    archives.len()
                )));
            }
            println!("{} files are as they were written", archives.len());
        }
    }
    Ok(())
}

async fn show_receipt(path: &Path, id: &str, directory: Option<&Path>) -> Result<(), Failure> {
    let config = load(path)?;
    let db = Db::open(&config.database_url, Access::Inspect).await?;
    let ledger = Ledger::new(db.clone(), Clock::System, "operator".into());
    let mut receipt = ledger.any_receipt(id).await?;
    if let (None, Some(directory)) = (&receipt, directory) {
        receipt = archive::find(&db, directory, id).await?;
    }
    let Some(receipt) = receipt else {
        let place =
            if directory.is_some() { "nor in those files" } else { "; --dir names the archive's directory" };
        return Err(failure(format!("there is no receipt {id} in the database{place}")));
    };
    let (key, chain_id) = (config.receipt_key.as_ref(), config.payments.chain_id);
    let attestor = Attestor::of_server(&db, key, chain_id).await?;
    println!("{}", serde_json::to_string(&http::signed_receipt(&attestor, &receipt)?)?);
    Ok(())
}

/// Checks a file that a gateway signed, by nothing but what is in it and what is expected of it.
pub fn verify(
    file: &Path,
    signer: Option<&str>,
    root: Option<&str>,
    wallet: Option<&str>,
) -> Result<(), Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|e| failure(format!("{} cannot be read: {e}", file.display())))?;
    let signed_by = if reserves::is_proof(&text) {
        let proof = reserves::verify_proof(&text).map_err(|e| failure(e.to_string()))?;
        check_root(&proof.root, root)?;
        check_signer(proof.signer, signer)?;
        check_wallet(&proof.wallet.to_string(), wallet)?;
        println!(
            "reserves {}: {} is owed {} of {} micro-USDC in all, beside {} that {} held in block {}; root {}; as {} signed it",
            proof.number,
            proof.wallet,
            proof.balance,
            proof.liabilities,
            proof.reserves,
            proof.pay_to,
            proof.block_number,
            proof.root,
            proof.signer
        );
        proof.signer
    } else {
        let verified = attest::verify(&text).map_err(|e| failure(e.to_string()))?;
        let object: serde_json::Value = serde_json::from_str(&verified.contents)?;
        let member = |name: &str| object[name].as_str().unwrap_or("none");
        check_root(member("root"), root)?;
        check_signer(verified.signer, signer)?;
        check_wallet(member("wallet"), wallet)?;
        let (kind, chain_id, by) = (verified.kind.as_str(), verified.chain_id, verified.signer);
        println!("{kind} of chain {chain_id}: as {by} signed it");
        verified.signer
    };
    if signer.is_none() {
        println!("whether {signed_by} is the gateway's key its /v1/status says: --signer compares it");
    }
    Ok(())
}

fn check_signer(signer: Wallet, expected: Option<&str>) -> Result<(), Failure> {
    let expected = expected.map(wallet_of).transpose()?;
    match expected.filter(|expected| *expected != signer) {
        Some(expected) => Err(failure(format!("it is signed by {signer}, not by {expected}"))),
        None => Ok(()),
    }
}

fn check_wallet(wallet: &str, expected: Option<&str>) -> Result<(), Failure> {
    let expected = expected.map(wallet_of).transpose()?;
    match expected.filter(|expected| expected.to_string() != wallet) {
        Some(expected) => Err(failure(format!("it is about {wallet}, not about {expected}"))),
        None => Ok(()),
    }
}

fn check_root(root: &str, expected: Option<&str>) -> Result<(), Failure> {
    match expected.filter(|expected| !root.eq_ignore_ascii_case(expected)) {
        Some(expected) => Err(failure(format!("its root is {root}, not {expected}"))),
        None => Ok(()),
    }
}

fn line_of(archive: &Archive) -> String {
    let Archive { id, file, removed, before, .. } = archive;
    let Some(contents) = &archive.contents else {
        return format!("{id:>6} {file} is not written yet");
    };
    let (receipts, charged, sha256) = (contents.receipts, contents.charged.to_usd(), &contents.sha256);
    let state = if archive.is_finished() { String::new() } else { format!(", {removed} taken out so far") };
    format!(
        "{id:>6} {file} {receipts} receipts of before {}{state}, {charged} USDC charged, sha256 {sha256}",
        before.rfc3339()
    )
}

/// A day, a time, or a number of days ago.
fn time_of(text: &str, now: Timestamp) -> Result<Timestamp, Failure> {
    let days_ago = text.strip_suffix('d').unwrap_or(text).parse::<u32>().ok();
    let days_ago = days_ago.map(|days| now.plus_seconds(-86_400 * i64::from(days)));
    let time = days_ago.or_else(|| Timestamp::parse_rfc3339(text));
    let time = time.or_else(|| Timestamp::parse_rfc3339(&format!("{text}T00:00:00Z")));
    time.ok_or_else(|| {
        failure(format!("{text:?} is no day such as 2026-01-31, no time, and no number of days"))
    })
}
