//! A chain with Circle's real USDC, books, and processes that take payments, for the tests beside this file.

use std::sync::Arc;
pub use std::time::Duration;

pub use alloy::primitives::{Address, B256, U256, address};
pub use alloy::signers::SignerSync as _;
pub use alloy::signers::local::PrivateKeySigner;
pub use alloy::sol_types::{SolCall, SolStruct as _, eip712_domain};
pub use farebox::audit::{self, Verdict};
pub use farebox::clock::Clock;
pub use farebox::config;
pub use farebox::db::{Access, Db};
pub use farebox::id::Wallet;
pub use farebox::ledger::{Ending, Ledger};
pub use farebox::money::MicroUsdc;
pub use farebox::payments::wire::{Payload, Reason};
pub use farebox::payments::{ChainHealth, Payment, PaymentError, Payments, State};
pub use farebox::tasks::Tasks;
pub use serde_json::{Value, json};
use tokio::sync::Barrier;

pub use crate::payments::faulty_rpc::{Fault, FaultyRpc};
pub use crate::support::books::{Books, balance};
pub use crate::support::chain::{BLACKLISTER, BYSTANDER, CHAIN_ID, MINTER, PAUSER, TestChain, USDC, word};
pub use crate::support::wallet::{Authorization, TestWallet};
pub use crate::support::{eventually, in_time, unix_seconds};

alloy::sol! {
    function cancelAuthorization(address authorizer, bytes32 nonce, bytes signature) external;
    function transfer(address to, uint256 value) external returns (bool);
    function blacklist(address account) external;
    function pause() external;

    struct CancelAuthorization {
        address authorizer;
        bytes32 nonce;
    }
}

/// Where nobody's money should go.
pub const STRANGER: Address = address!("00000000000000000000000000000000000057a9");
pub const FIVE_USD: u64 = 5_000_000;
/// Long enough for a payment to be credited, if it were going to be, on a chain that mines at once.
pub const A_MOMENT: Duration = Duration::from_millis(700);
/// The chain's logs are searched seldom, once a payment has waited for a while.
pub const RETRIES: usize = 1;

/// A chain, the books of a gateway, and the accounts it is configured with.
pub struct Bench {
    pub chain: TestChain,
    pub books: Books,
    pub relayer: TestWallet,
    pub treasury: Address,
}

/// Runs a test on a chain and a database of its own, for each kind of database.
pub async fn each(test: impl AsyncFn(&Bench)) {
    for books in [Books::sqlite().await, Books::postgres().await] {
        println!("on {}", books.db.kind());
        let bench = Bench::new(books).await;
        test(&bench).await;
        bench.books.discard().await;
    }
}

impl Bench {
    pub async fn new(books: Books) -> Self {
        let chain = TestChain::start();
        let relayer = TestWallet::random();
        chain.give_gas(relayer.address()).await;
        Self { chain, books, relayer, treasury: TestWallet::random().address() }
    }

    pub fn config(&self) -> config::Payments {
        config::Payments {
            chain_id: CHAIN_ID,
            token: config::Token { address: Wallet(USDC), name: "USD Coin".into(), version: "2".into() },
            rpc_urls: vec![self.chain.url.parse().unwrap()],
            pay_to: Wallet(self.treasury),
            min_topup: MicroUsdc::new(1_000_000),
            max_topup: MicroUsdc::new(10_000_000_000),
            confirmations: 1,
            min_inline: MicroUsdc::new(10_000),
            max_unfinalized: MicroUsdc::ZERO,
            max_fee_gwei: 10,
            erc6492_factories: Vec::new(),
            deposits: None,
            withdrawals: config::Withdrawals {
                min: MicroUsdc::new(1_000_000),
                wallet_daily: MicroUsdc::ZERO,
                daily: MicroUsdc::ZERO,
            },
            treasury_key: None,
            relayer_keys: self.relayer.private_key().into(),
            facilitator: None,
        }
    }

    /// A process that takes payments, with its chain checked.
    pub async fn node(&self) -> Node {
        self.node_with(|_| {}).await
    }

    pub async fn node_with(&self, change: impl FnOnce(&mut config::Payments)) -> Node {
        self.node_at(Clock::System, change).await
    }

    /// One whose time the test sets.
    pub async fn node_at(&self, clock: Clock, change: impl FnOnce(&mut config::Payments)) -> Node {
        let mut config = self.config();
        change(&mut config);
        let node = Node::with_clock(&self.books.db, config, clock);
        assert_eq!(node.payments.check_chain().await, ChainHealth::Ok);
        node
    }

    /// A wallet with USDC on the chain.
    pub async fn payer(&self, micro: u64) -> TestWallet {
        let payer = TestWallet::random();
        self.chain.mint(payer.address(), micro).await;
        payer
    }

    /// An authorization of five dollars for the treasury.
    pub fn authorization(&self, payer: &TestWallet) -> Authorization {
        payer.authorization(self.treasury, FIVE_USD)
    }

    /// Transactions that the relayer has in the chain.
    pub async fn sent_by_relayer(&self) -> Value {
        self.chain.rpc("eth_getTransactionCount", json!([self.relayer.address(), "latest"])).await
    }

    /// What was sent here was refused before it cost anything.
    pub async fn assert_untouched(&self) {
        assert_eq!(self.books.number("SELECT COUNT(*) AS n FROM payments").await, 0);
        assert_eq!(self.sent_by_relayer().await, "0x0");
    }

    /// Somebody else carries an authorization out.
    pub async fn front_run(&self, payload: &Payload) -> String {
        self.chain.send(BYSTANDER, USDC, &transfer_call(payload)).await
    }

    /// A transaction that is mined before those that wait, with the next block.
    pub async fn send_dearly(&self, from: Address, data: String) {
        self.send_dearly_to(from, USDC, data).await;
    }

    pub async fn send_dearly_to(&self, from: Address, to: Address, data: String) {
        let call = json!([{
            "from": from, "to": to, "data": data, "gas": "0x100000",
            "maxFeePerGas": "0x2540be40000", "maxPriorityFeePerGas": "0x174876e8000",
        }]);
        self.chain.rpc("eth_sendTransaction", call).await;
    }

    /// Lets so many seconds pass on the chain, in blocks that are final afterwards.
    pub async fn warp(&self, seconds: i64) {
        self.chain.rpc("evm_increaseTime", json!([seconds])).await;
        self.chain.mine(4).await;
    }

    /// Whatever happened, the books agree with themselves and with the chain, to the micro-USDC.
    pub async fn assert_reconciled(&self, node: &Node) {
        let report = self.audit(node).await;
        assert!(report.0.iter().all(|row| row.verdict == Verdict::Ok), "{report}");
        let credited =
            "SELECT CAST(COALESCE(SUM(amount_micro), 0) AS BIGINT) AS n FROM entries WHERE kind = 'topup'";
        let arrived = self.chain.usdc_of(self.treasury).await;
        assert_eq!(i64::try_from(arrived), Ok(self.books.number(credited).await));
    }

    pub async fn audit(&self, node: &Node) -> audit::Report {
        let chain = Some((node.payments.chain().as_ref(), Wallet(self.treasury)));
        audit::run(&self.books.db, chain).await.unwrap()
    }
}

/// One process that takes payments.
#[derive(Clone)]
pub struct Node {
    pub payments: Payments,
    pub ledger: Ledger,
    pub tasks: Tasks,
}

impl Node {
    pub fn new(db: &Db, config: config::Payments) -> Self {
        Self::with_clock(db, config, Clock::System)
    }

    pub fn with_clock(db: &Db, config: config::Payments, clock: Clock) -> Self {
        farebox::install_crypto();
        let tasks = Tasks::default();
        let ledger = Ledger::new(db.clone(), clock.clone(), "node".into());
        let payments = Payments::new(db.clone(), ledger.clone(), config, clock, tasks.clone()).unwrap();
        Self { payments, ledger, tasks }
    }

    /// Sends a payment, and again for as long as it is pending, as clients are told to.
    pub async fn pay(&self, payload: &Payload) -> Payment {
        let mut payment = in_time("a payment", self.payments.pay(payload, None)).await.unwrap();
        for _ in 0..RETRIES {
            if payment.state.status() != "pending" {
                break;
            }
            payment = in_time("a payment", self.payments.pay(payload, None)).await.unwrap();
        }
        payment
    }

    pub async fn refusal(&self, payload: &Payload) -> (Reason, String) {
        match in_time("a refusal", self.payments.pay(payload, None)).await {
            Err(PaymentError::Refused { reason, sentence }) => (reason, sentence),
            other => panic!("not refused: {other:?}"),
        }
    }

    /// Sends a payment as a client does that goes away without waiting for the end.
    pub async fn pay_and_leave(&self, payload: &Payload) {
        let waited = tokio::time::timeout(A_MOMENT, self.payments.pay(payload, None)).await;
        assert!(waited.is_err(), "it was not to be at rest so soon: {waited:?}");
    }

    pub async fn payment_of(&self, payer: &TestWallet) -> Option<Payment> {
        let mut payments = self.payments.of_wallet(Wallet(payer.address()), None, 10).await.unwrap();
        assert!(payments.len() <= 1, "one authorization is one payment: {payments:?}");
        payments.pop()
    }

    /// Waits until a payer's payment is in a state.
    pub async fn until(&self, payer: &TestWallet, state: State) -> Payment {
        eventually(&format!("the payment is {}", state.as_str()), async || {
            self.payment_of(payer).await.filter(|payment| payment.state == state)
        })
        .await
    }

    pub async fn balance_of(&self, payer: &TestWallet) -> i64 {
        self.balance_at(payer.address()).await
    }

    pub async fn balance_at(&self, address: Address) -> i64 {
        let balance = self.ledger.balance(Wallet(address)).await.unwrap();
        assert_eq!(balance.locked, MicroUsdc::ZERO);
        balance.balance.get()
    }

    /// Runs what a server runs in the background: it picks up what nobody drives.
    pub fn run(&self) {
        let payments = self.payments.clone();
        self.tasks.spawn_service(async move { payments.run().await });
    }

    /// Ends this process's work where it stands, as a crash does.
    pub async fn crash(self) {
        self.tasks.stop();
        self.tasks.abort();
        in_time("the tasks to end", self.tasks.idle()).await;
    }
}

pub fn payload(authorization: &Authorization) -> Payload {
    signed_payload(authorization, &authorization.signature())
}

pub fn signed_payload(authorization: &Authorization, signature: &[u8]) -> Payload {
    Payload::parse(authorization.with_signature(signature).v2_header().as_bytes()).unwrap()
}

pub fn transfer_call(payload: &Payload) -> String {
    payload.authorization.transfer_call(&payload.signature).to_string()
}

pub fn call(call: &impl SolCall) -> String {
    format!("0x{}", hex::encode(call.abi_encode()))
}

/// Starts `count` payments at the same moment.
pub async fn at_once(count: usize, pay: impl Fn(usize) -> (Node, Payload)) -> Vec<Payment> {
    let barrier = Arc::new(Barrier::new(count));
    let tasks: Vec<_> = (0..count)
        .map(|number| {
            let ((node, payload), barrier) = (pay(number), barrier.clone());
            tokio::spawn(async move {
                barrier.wait().await;
                node.pay(&payload).await
            })
        })
        .collect();
    let mut payments = Vec::new();
    for task in tasks {
        payments.push(task.await.unwrap());
    }
    payments
}

/// The payer's own cancellation of an authorization, for anybody to send.
pub fn cancel(payer: &TestWallet, nonce: B256) -> String {
    let domain = eip712_domain! {
        name: "USD Coin",
        version: "2",
        chain_id: CHAIN_ID,
        verifying_contract: USDC,
    };
    let hash = CancelAuthorization { authorizer: payer.address(), nonce }.eip712_signing_hash(&domain);
    let signer: PrivateKeySigner = payer.private_key().parse().unwrap();
    let signature = signer.sign_hash_sync(&hash).unwrap().as_bytes().to_vec();
    call(&cancelAuthorizationCall { authorizer: payer.address(), nonce, signature: signature.into() })
}

/// An authorization that is still good once the chain's time is ahead of ours.
pub fn valid_after_warp(bench: &Bench, payer: &TestWallet) -> Authorization {
    let mut authorization = bench.authorization(payer);
    authorization.valid_before = (unix_seconds() + 80_000).to_string();
    authorization
}
