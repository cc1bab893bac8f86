//! Books to test with: a fresh database of each kind, holds and endings, and credits with a payment
//! behind them.

use std::fs;
use std::path::{Path, PathBuf};

use farebox::clock::{Clock, Timestamp};
use farebox::db::{Access, Arg, Db, DbError, DbTx};
use farebox::id::{Entropy, Wallet};
use farebox::ledger::{Balance, Ending, Hold, Ledger, LedgerError, Outcome};
use farebox::money::{MicroUsdc, UnitPrice};
use farebox::pricing::{Prices, Terms, Usage};
use std::sync::Arc;

use crate::support::postgres;

/// When the fixed clocks of the tests begin.
pub const NOW: Timestamp = Timestamp::from_seconds(1_775_563_200);

/// Runs a test on a fresh SQLite file, then on a fresh PostgreSQL database.
pub async fn both(test: impl AsyncFn(&Books)) {
    for books in [Books::sqlite().await, Books::postgres().await] {
        // Shown only where the test fails, and then says on which database.
        println!("on {}", books.db.kind());
        test(&books).await;
        books.discard().await;
    }
}

/// A database with a server's handle on it.
pub struct Books {
    pub db: Db,
    pub url: String,
    pub clock: Clock,
    pub scratch: Scratch,
}

impl Books {
    pub async fn sqlite() -> Self {
        let scratch = Scratch::new();
        let url = format!("sqlite://{}", scratch.path().join("books.db").display());
        Self::open(url, scratch).await
    }

    pub async fn postgres() -> Self {
        Self::open(postgres::fresh_database().await, Scratch::new()).await
    }

    async fn open(url: String, scratch: Scratch) -> Self {
        let db = Db::open(&url, Access::Serve).await.unwrap();
        Self { db, url, clock: Clock::fixed(NOW), scratch }
    }

    /// The ledger of a node called `node`.
    pub fn ledger(&self, node: &str) -> Ledger {
        Ledger::new(self.db.clone(), self.clock.clone(), node.to_owned())
    }

    pub fn is_postgres(&self) -> bool {
        self.db.kind() == "postgres"
    }

    /// Runs one statement as somebody with the database's password could, past the program.
    pub async fn sql(&self, statement: &'static str) -> Result<u64, DbError> {
        let mut tx = self.db.begin().await?;
        let rows = tx.execute(statement, vec![]).await?;
        tx.commit().await?;
        Ok(rows)
    }

    /// Runs a statement that changes one row.
    pub async fn sql_with(&self, statement: &'static str, args: Vec<Arg>) {
        let mut tx = self.db.begin().await.unwrap();
        assert_eq!(tx.execute(statement, args).await.unwrap(), 1);
        tx.commit().await.unwrap();
    }

    /// The one integer that a query called `n` selects.
    pub async fn number(&self, query: &'static str) -> i64 {
        self.db.row(query, vec![]).await.unwrap().unwrap().int("n").unwrap()
    }

    /// Credits a wallet for a new payment, and returns the payment's id.
    pub async fn credit(&self, wallet: Wallet, micro: i64) -> i64 {
        let mut tx = self.db.begin().await.unwrap();
        let id = tx.next_id("payments").await.unwrap();
        credit(&self.ledger("cashier"), &mut tx, wallet, MicroUsdc::new(micro), id).await.unwrap();
        tx.commit().await.unwrap();
        id
    }

    /// Writes a withdrawal down as it is in a state, and what it has done to its wallet by then.
    pub async fn withdraw(&self, wallet: Wallet, micro: i64, state: &'static str) {
        let (ledger, amount) = (self.ledger("cashier"), MicroUsdc::new(micro));
        let mut tx = self.db.begin().await.unwrap();
        let id = tx.next_id("payments").await.unwrap();
        ledger.lock(&mut tx, wallet, amount).await.unwrap();
        if state == "finalized" {
            ledger.withdraw(&mut tx, wallet, amount, id).await.unwrap();
        }
        tx.execute(
            "INSERT INTO payments (id, chain_id, asset, from_wallet, nonce, to_wallet, value_micro, valid_after,
                                   valid_before, signature, state, seen_block, tx_hash, block_number, log_index,
                                   created_at_ms, updated_at_ms, kind)
             VALUES ($1, 8453, $2, '0x9999999999999999999999999999999999999999', $3, $2, $4, 0, 1, '0x', $5, 1, $3,
                     1, 1, 0, 0, 'withdrawal')",
            vec![
                Arg::from(id),
                Arg::from(wallet),
                Arg::from(format!("0x{id:064x}")),
                Arg::from(amount),
                Arg::from(state),
            ],
        )
        .await
        .unwrap();
        tx.commit().await.unwrap();
    }

    pub async fn discard(self) {
        self.db.close().await;
        if self.is_postgres() {
            postgres::drop_database(&self.url).await;
        }
    }
}

/// Credits a wallet and writes down the payment that it is for.
pub async fn credit(
    ledger: &Ledger,
    tx: &mut DbTx,
    wallet: Wallet,
    amount: MicroUsdc,
    payment_id: i64,
) -> Result<Balance, LedgerError> {
    let balance = ledger.credit(tx, wallet, amount, payment_id).await?;
    let of_the_payment = format!("0x{payment_id:064x}");
    tx.execute(
        "INSERT INTO payments (id, chain_id, asset, from_wallet, nonce, to_wallet, value_micro, valid_after,
                               valid_before, signature, state, seen_block, tx_hash, block_number, log_index,
                               created_at_ms, updated_at_ms)
         VALUES ($1, 8453, $2, $2, $3, $2, $4, 0, 1, '0x', 'credited', 1, $3, 1, 1, 0, 0)",
        vec![Arg::from(payment_id), Arg::from(wallet), Arg::from(of_the_payment), Arg::from(amount)],
    )
    .await?;
    Ok(balance)
}

/// A directory that goes when it is dropped; in memory where the system offers that, because each
/// commit on SQLite waits for the disk.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let path = parent.join(format!("farebox-{}", hex::encode(Entropy.bytes::<8>())));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn wallet(number: u8) -> Wallet {
    Wallet([number; 20].into())
}

/// USD 0.15 a million prompt tokens, 0.60 completion, and 20 %.
pub fn terms() -> Terms {
    Terms {
        model: "test/model".into(),
        provider: "test".into(),
        upstream_model: "model".into(),
        prices: Arc::new(Prices::of_text(
            UnitPrice::new(150_000),
            UnitPrice::new(75_000),
            UnitPrice::new(600_000),
        )),
        markup_bps: 2000,
        price_version: None,
    }
}

pub fn hold(id: impl Into<String>, wallet: Wallet, micro: i64) -> Hold {
    Hold {
        id: id.into(),
        wallet,
        api_key_id: None,
        amount: MicroUsdc::new(micro),
        terms: terms(),
        created_at: NOW,
    }
}

/// A hundred completion tokens are 72 micro-USDC under [`terms`], exactly.
pub fn completion(tokens: u64) -> Usage {
    Usage::tokens(0, tokens)
}

/// The end of a hold by what was used, charged as the prices say.
pub fn settled(hold: &Hold, usage: Usage) -> Ending {
    Ending {
        hold: hold.clone(),
        outcome: Outcome::Settled,
        reason: None,
        usage,
        usage_raw: None,
        upstream_cost: None,
        charge: hold.terms.charge(&usage, hold.amount).unwrap(),
    }
}

pub fn balance(balance: i64, locked: i64) -> Balance {
    Balance { balance: MicroUsdc::new(balance), locked: MicroUsdc::new(locked), debt: MicroUsdc::ZERO }
}

/// Audits the books without a chain; they must agree with themselves.
pub async fn assert_no_drift(db: &Db) {
    let report = farebox::audit::run(db, None).await.unwrap();
    assert!(!report.has_drift(), "{report}");
}
