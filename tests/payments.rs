//! Payments against a real chain with Circle's real USDC: credited once, whatever happens around them.

mod faulty_rpc;

use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::{Address, B256, U256, address};
use alloy::signers::SignerSync as _;
use alloy::signers::local::PrivateKeySigner;
use alloy::sol_types::{SolCall, SolStruct as _, eip712_domain};
use farebox::audit::{self, Verdict};
use farebox::clock::Clock;
use farebox::config;
use farebox::db::{Access, Db};
use farebox::id::Wallet;
use farebox::ledger::Ledger;
use farebox::money::MicroUsdc;
use farebox::payments::wire::{Payload, Reason};
use farebox::payments::{ChainHealth, Payment, PaymentError, Payments, State};
use farebox::tasks::Tasks;
use serde_json::{Value, json};
use tokio::sync::Barrier;

use self::faulty_rpc::{Fault, FaultyRpc};
use crate::support::books::{Books, balance};
use crate::support::chain::{BLACKLISTER, BYSTANDER, CHAIN_ID, PAUSER, TestChain, USDC, word};
use crate::support::wallet::{Authorization, TestWallet};
use crate::support::{eventually, in_time, unix_seconds};

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
const STRANGER: Address = address!("00000000000000000000000000000000000057a9");
const FIVE_USD: u64 = 5_000_000;
/// Long enough for a payment to be credited, if it were going to be, on a chain that mines at once.
const A_MOMENT: Duration = Duration::from_millis(700);
/// The chain's logs are searched seldom, once a payment has waited for a while.
const RETRIES: usize = 1;

/// A chain, the books of a gateway, and the accounts it is configured with.
struct Bench {
    chain: TestChain,
    books: Books,
    relayer: TestWallet,
    treasury: Address,
}

/// Runs a test on a chain and a database of its own, for each kind of database.
async fn each(test: impl AsyncFn(&Bench)) {
    for books in [Books::sqlite().await, Books::postgres().await] {
        println!("on {}", books.db.kind());
        let bench = Bench::new(books).await;
        test(&bench).await;
        bench.books.discard().await;
    }
}

impl Bench {
    async fn new(books: Books) -> Self {
        let chain = TestChain::start();
        let relayer = TestWallet::random();
        chain.give_gas(relayer.address()).await;
        Self { chain, books, relayer, treasury: TestWallet::random().address() }
    }

    fn config(&self) -> config::Payments {
        config::Payments {
            chain_id: CHAIN_ID,
            token: config::Token { address: Wallet(USDC), name: "USD Coin".into(), version: "2".into() },
            rpc_urls: vec![self.chain.url.parse().unwrap()],
            pay_to: Wallet(self.treasury),
            min_topup: MicroUsdc::new(1_000_000),
            max_topup: MicroUsdc::new(10_000_000_000),
            confirmations: 1,
            max_unfinalized: MicroUsdc::ZERO,
            max_fee_gwei: 10,
            erc6492_factories: Vec::new(),
            relayer_keys: self.relayer.private_key().into(),
        }
    }

    /// A process that takes payments, with its chain checked.
    async fn node(&self) -> Node {
        self.node_with(|_| {}).await
    }

    async fn node_with(&self, change: impl FnOnce(&mut config::Payments)) -> Node {
        let mut config = self.config();
        change(&mut config);
        let node = Node::new(&self.books.db, config);
        assert_eq!(node.payments.check_chain().await, ChainHealth::Ok);
        node
    }

    /// A wallet with USDC on the chain.
    async fn payer(&self, micro: u64) -> TestWallet {
        let payer = TestWallet::random();
        self.chain.mint(payer.address(), micro).await;
        payer
    }

    /// An authorization of five dollars for the treasury.
    fn authorization(&self, payer: &TestWallet) -> Authorization {
        payer.authorization(self.treasury, FIVE_USD)
    }

    /// Transactions that the relayer has in the chain.
    async fn sent_by_relayer(&self) -> Value {
        self.chain.rpc("eth_getTransactionCount", json!([self.relayer.address(), "latest"])).await
    }

    /// Somebody else carries an authorization out.
    async fn front_run(&self, payload: &Payload) -> String {
        self.chain.send(BYSTANDER, USDC, &transfer_call(payload)).await
    }

    /// A transaction that is mined before those that wait, with the next block.
    async fn send_dearly(&self, from: Address, data: String) {
        let call = json!([{
            "from": from, "to": USDC, "data": data, "gas": "0x40000",
            "maxFeePerGas": "0x2540be40000", "maxPriorityFeePerGas": "0x174876e8000",
        }]);
        self.chain.rpc("eth_sendTransaction", call).await;
    }

    /// Lets so many seconds pass on the chain, in blocks that are final afterwards.
    async fn warp(&self, seconds: i64) {
        self.chain.rpc("evm_increaseTime", json!([seconds])).await;
        self.chain.mine(4).await;
    }

    /// Whatever happened, the books agree with themselves and with the chain, to the micro-USDC.
    async fn assert_reconciled(&self, node: &Node) {
        let report = self.audit(node).await;
        assert!(report.0.iter().all(|row| row.verdict == Verdict::Ok), "{report}");
        let credited =
            "SELECT CAST(COALESCE(SUM(amount_micro), 0) AS BIGINT) AS n FROM entries WHERE kind = 'topup'";
        let arrived = self.chain.usdc_of(self.treasury).await;
        assert_eq!(i64::try_from(arrived), Ok(self.books.number(credited).await));
    }

    async fn audit(&self, node: &Node) -> audit::Report {
        let chain = Some((node.payments.chain().as_ref(), Wallet(self.treasury)));
        audit::run(&self.books.db, chain).await.unwrap()
    }
}

/// One process that takes payments.
#[derive(Clone)]
struct Node {
    payments: Payments,
    ledger: Ledger,
    tasks: Tasks,
}

impl Node {
    fn new(db: &Db, config: config::Payments) -> Self {
        farebox::install_crypto();
        let tasks = Tasks::default();
        let ledger = Ledger::new(db.clone(), Clock::System, "node".into());
        let payments =
            Payments::new(db.clone(), ledger.clone(), config, Clock::System, tasks.clone()).unwrap();
        Self { payments, ledger, tasks }
    }

    /// Sends a payment, and again for as long as it is pending, as clients are told to.
    async fn pay(&self, payload: &Payload) -> Payment {
        let mut payment = in_time("a payment", self.payments.pay(payload, None)).await.unwrap();
        for _ in 0..RETRIES {
            if payment.state.status() != "pending" {
                break;
            }
            payment = in_time("a payment", self.payments.pay(payload, None)).await.unwrap();
        }
        payment
    }

    async fn refusal(&self, payload: &Payload) -> (Reason, String) {
        match in_time("a refusal", self.payments.pay(payload, None)).await {
            Err(PaymentError::Refused { reason, sentence }) => (reason, sentence),
            other => panic!("not refused: {other:?}"),
        }
    }

    /// Sends a payment as a client does that goes away without waiting for the end.
    async fn pay_and_leave(&self, payload: &Payload) {
        let waited = tokio::time::timeout(A_MOMENT, self.payments.pay(payload, None)).await;
        assert!(waited.is_err(), "it was not to be at rest so soon: {waited:?}");
    }

    async fn payment_of(&self, payer: &TestWallet) -> Option<Payment> {
        let mut payments = self.payments.of_wallet(Wallet(payer.address()), None, 10).await.unwrap();
        assert!(payments.len() <= 1, "one authorization is one payment: {payments:?}");
        payments.pop()
    }

    /// Waits until a payer's payment is in a state.
    async fn until(&self, payer: &TestWallet, state: State) -> Payment {
        eventually(&format!("the payment is {}", state.as_str()), async || {
            self.payment_of(payer).await.filter(|payment| payment.state == state)
        })
        .await
    }

    async fn balance_of(&self, payer: &TestWallet) -> i64 {
        let balance = self.ledger.balance(Wallet(payer.address())).await.unwrap();
        assert_eq!(balance.locked, MicroUsdc::ZERO);
        balance.balance.get()
    }

    /// Runs what a server runs in the background: it picks up what nobody drives.
    fn run(&self) {
        let payments = self.payments.clone();
        self.tasks.spawn_service(async move { payments.run().await });
    }

    /// Ends this process's work where it stands, as a crash does.
    async fn crash(self) {
        self.tasks.stop();
        self.tasks.abort();
        in_time("the tasks to end", self.tasks.idle()).await;
    }
}

fn payload(authorization: &Authorization) -> Payload {
    Payload::parse(authorization.sign().v2_header().as_bytes()).unwrap()
}

fn transfer_call(payload: &Payload) -> String {
    payload.authorization.transfer_call(&payload.signature).to_string()
}

fn call(call: &impl SolCall) -> String {
    format!("0x{}", hex::encode(call.abi_encode()))
}

/// Starts `count` payments at the same moment.
async fn at_once(count: usize, pay: impl Fn(usize) -> (Node, Payload)) -> Vec<Payment> {
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

// ---- what is taken

#[tokio::test]
async fn a_top_up_is_credited_once_from_the_chains_logs() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD + 1).await;
        let payload = payload(&bench.authorization(&payer));
        let payment = node.pay(&payload).await;
        assert_eq!((payment.state, payment.value), (State::Credited, MicroUsdc::new(5_000_000)));
        assert_eq!(payment.authorization, payload.authorization);
        assert_eq!(node.ledger.balance(Wallet(payer.address())).await.unwrap(), balance(5_000_000, 0));
        assert_eq!(bench.chain.usdc_of(payer.address()).await, 1);

        let receipt =
            bench.chain.rpc("eth_getTransactionReceipt", json!([payment.tx_hash.as_ref().unwrap()])).await;
        assert_eq!(receipt["status"], "0x1");
        assert_eq!(receipt["blockNumber"], format!("{:#x}", payment.block_number.unwrap()));
        let log = &receipt["logs"][1];
        assert_eq!(log["logIndex"], format!("{:#x}", payment.log_index.unwrap()));
        assert_eq!(log["topics"][2], format!("0x{}", word(bench.treasury)));

        // Again, in the other envelope, with the amount said: the same payment.
        let again = Payload { version: 1, network: "base".into(), ..payload };
        let amount = Some(MicroUsdc::new(5_000_000));
        assert_eq!(node.payments.pay(&again, amount).await.unwrap(), payment);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.sent_by_relayer().await, "0x1");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn every_spelling_of_a_good_signature_is_taken() {
    each(async |bench| {
        let node = bench.node().await;
        for (version, spell) in [(1, 0), (2, 27)] {
            let payer = bench.payer(FIVE_USD).await;
            let mut payload = payload(&bench.authorization(&payer));
            payload.version = version;
            *payload.signature.last_mut().unwrap() -= 27 - spell;
            assert_eq!(node.pay(&payload).await.state, State::Credited);
            assert_eq!(node.balance_of(&payer).await, 5_000_000);
        }
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn of_a_wallet_with_code_its_code_decides() {
    each(async |bench| {
        let node = bench.node().await;
        // Answers EIP-1271's magic value, whatever it is asked.
        let agreeing = format!("0x7f1626ba7e{}5f5260205ff3", "00".repeat(28));
        let payer = bench.payer(FIVE_USD).await;
        bench.chain.rpc("anvil_setCode", json!([payer.address(), agreeing])).await;
        let mut taken = payload(&bench.authorization(&payer));
        taken.signature = vec![0x12; 100];
        assert_eq!(node.pay(&taken).await.state, State::Credited);

        // Answers zero: then its key's good signature is worth nothing, because the token asks the code.
        let payer = bench.payer(FIVE_USD).await;
        bench.chain.rpc("anvil_setCode", json!([payer.address(), "0x60205ff3"])).await;
        let refused = payload(&bench.authorization(&payer));
        assert_eq!(node.refusal(&refused).await.0, Reason::InvalidSignature);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_times_the_same_payload_at_once_is_one_payment() {
    each(async |bench| {
        let node = bench.node().await;
        // Enough for several, so that only we stand in the way.
        let payer = bench.payer(10 * FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        let payments = at_once(100, |_| (node.clone(), payload.clone())).await;
        assert!(payments.iter().all(|payment| *payment == payments[0]), "{payments:?}");
        assert_eq!(payments[0].state, State::Credited);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.sent_by_relayer().await, "0x1");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_payload_to_two_nodes_at_once_is_one_payment() {
    let bench = Bench::new(Books::postgres().await).await;
    let elsewhere = Db::open(&bench.books.url, Access::Serve).await.unwrap();
    let nodes = [bench.node().await, Node::new(&elsewhere, bench.config())];
    assert_eq!(nodes[1].payments.check_chain().await, ChainHealth::Ok);
    let payer = bench.payer(10 * FIVE_USD).await;
    let payload = payload(&bench.authorization(&payer));
    let payments = at_once(100, |number| (nodes[number % 2].clone(), payload.clone())).await;
    assert!(payments.iter().all(|payment| *payment == payments[0]), "{payments:?}");
    assert_eq!(payments[0].state, State::Credited);
    assert_eq!(nodes[0].balance_of(&payer).await, 5_000_000);
    assert_eq!(bench.sent_by_relayer().await, "0x1");
    bench.assert_reconciled(&nodes[0]).await;
    elsewhere.close().await;
    bench.books.discard().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_payers_at_two_nodes_share_one_relayer() {
    let bench = Bench::new(Books::postgres().await).await;
    let elsewhere = Db::open(&bench.books.url, Access::Serve).await.unwrap();
    let nodes = [bench.node().await, Node::new(&elsewhere, bench.config())];
    assert_eq!(nodes[1].payments.check_chain().await, ChainHealth::Ok);
    let mut payers = Vec::new();
    for _ in 0..24 {
        payers.push(bench.payer(FIVE_USD).await);
    }
    let payloads: Vec<_> = payers.iter().map(|payer| payload(&bench.authorization(payer))).collect();
    let payments = at_once(24, |number| (nodes[number % 2].clone(), payloads[number].clone())).await;
    assert!(payments.iter().all(|payment| payment.state == State::Credited), "{payments:?}");
    assert_eq!(bench.sent_by_relayer().await, "0x18");
    bench.assert_reconciled(&nodes[0]).await;
    elsewhere.close().await;
    bench.books.discard().await;
}

// ---- what is refused, and with which code

#[tokio::test]
async fn what_is_not_on_our_terms_is_refused_before_anything_is_asked_of_the_chain() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(10 * FIVE_USD).await;
        let good = payload(&bench.authorization(&payer));

        let version = Payload { version: 3, ..good.clone() };
        assert_eq!(node.refusal(&version).await.0, Reason::InvalidVersion);
        let scheme = Payload { scheme: "upto".into(), ..good.clone() };
        assert_eq!(node.refusal(&scheme).await.0, Reason::UnsupportedScheme);
        for network in ["base-sepolia", "eip155:1", ""] {
            let network = Payload { network: network.into(), ..good.clone() };
            assert_eq!(node.refusal(&network).await.0, Reason::InvalidNetwork);
        }
        let (reason, sentence) = node.refusal(&payload(&payer.authorization(STRANGER, FIVE_USD))).await;
        assert_eq!(reason, Reason::RecipientMismatch);
        assert!(sentence.contains(&bench.treasury.to_string()), "{sentence}");

        let other_amount = node.payments.pay(&good, Some(MicroUsdc::new(6_000_000))).await;
        assert!(matches!(other_amount, Err(PaymentError::Refused { reason: Reason::ValueMismatch, .. })));
        for value in [0, 999_999, 10_000_000_001] {
            let out_of_bounds = payload(&payer.authorization(bench.treasury, value));
            let result = node.payments.pay(&out_of_bounds, None).await;
            assert!(matches!(result, Err(PaymentError::OutOfBounds)), "{value}: {result:?}");
        }

        let mut early = bench.authorization(&payer);
        early.valid_after = (unix_seconds() + 60).to_string();
        assert_eq!(node.refusal(&payload(&early)).await.0, Reason::ValidAfter);
        for seconds in [-10, 3] {
            let mut late = bench.authorization(&payer);
            late.valid_before = (unix_seconds() + seconds).to_string();
            assert_eq!(node.refusal(&payload(&late)).await.0, Reason::ValidBefore);
        }
        assert_eq!(bench.books.number("SELECT COUNT(*) AS n FROM payments").await, 0);
        assert_eq!(bench.sent_by_relayer().await, "0x0");
    })
    .await;
}

#[tokio::test]
async fn a_bad_signature_is_refused() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let authorization = bench.authorization(&payer);
        let good = payload(&authorization);

        let mut other_domain = authorization.clone();
        other_domain.domain_version = "1".into();
        let (reason, sentence) = node.refusal(&payload(&other_domain)).await;
        assert_eq!(reason, Reason::InvalidSignature);
        assert!(sentence.contains("USD Coin") && sentence.contains("\"2\""), "{sentence}");

        let mut of_another = authorization.clone();
        of_another.from = bench.payer(FIVE_USD).await.address();
        assert_eq!(node.refusal(&payload(&of_another)).await.0, Reason::InvalidSignature);

        // The other half of the curve says the same thing, and the token refuses it.
        let order = U256::from_be_bytes(
            alloy::primitives::b256!("fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141").0,
        );
        let mut high_s = good.clone();
        let s = U256::from_be_slice(&good.signature[32..64]);
        high_s.signature[32..64].copy_from_slice(&(order - s).to_be_bytes::<32>());
        high_s.signature[64] = if good.signature[64] == 27 { 28 } else { 27 };
        assert_eq!(node.refusal(&high_s).await.0, Reason::InvalidSignature);

        for v in [2, 26, 29, 37, 255] {
            let mut odd = good.clone();
            odd.signature[64] = v;
            assert_eq!(node.refusal(&odd).await.0, Reason::InvalidSignature, "v {v}");
        }
        for length in [0, 64, 66] {
            let mut cut = good.clone();
            cut.signature.resize(length, 0);
            assert_eq!(node.refusal(&cut).await.0, Reason::UnparseableSignature, "{length} bytes");
        }
        assert_eq!(bench.books.number("SELECT COUNT(*) AS n FROM payments").await, 0);

        // None of it stands in the way of the good one.
        assert_eq!(node.pay(&good).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn what_the_token_would_refuse_is_refused_and_says_why() {
    each(async |bench| {
        let node = bench.node().await;
        let poor = bench.payer(FIVE_USD - 1).await;
        let (reason, sentence) = node.refusal(&payload(&bench.authorization(&poor))).await;
        assert_eq!(reason, Reason::InsufficientBalance);
        assert!(sentence.contains("4999999"), "{sentence}");

        // Its nonce went to another transfer.
        let spent = bench.payer(2 * FIVE_USD).await;
        let first = spent.authorization(STRANGER, 1_000_000);
        let mut second = bench.authorization(&spent);
        second.nonce = first.nonce;
        bench.front_run(&payload(&first)).await;
        assert_eq!(node.refusal(&payload(&second)).await.0, Reason::NonceAlreadyUsed);

        // Cancelling sets the same flag as using.
        let cancelling = bench.payer(FIVE_USD).await;
        let cancelled = bench.authorization(&cancelling);
        bench.chain.send(BYSTANDER, USDC, &cancel(&cancelling, cancelled.nonce)).await;
        assert_eq!(node.refusal(&payload(&cancelled)).await.0, Reason::NonceAlreadyUsed);

        let blacklisted = bench.payer(FIVE_USD).await;
        let blacklist = call(&blacklistCall { account: blacklisted.address() });
        bench.chain.send(BLACKLISTER, USDC, &blacklist).await;
        let (reason, sentence) = node.refusal(&payload(&bench.authorization(&blacklisted))).await;
        assert_eq!(reason, Reason::SimulationFailed);
        assert!(sentence.contains("blacklisted"), "{sentence}");

        let payer = bench.payer(FIVE_USD).await;
        bench.chain.send(PAUSER, USDC, &call(&pauseCall {})).await;
        let (reason, sentence) = node.refusal(&payload(&bench.authorization(&payer))).await;
        assert_eq!(reason, Reason::SimulationFailed);
        assert!(sentence.contains("paused"), "{sentence}");

        assert_eq!(bench.books.number("SELECT COUNT(*) AS n FROM payments").await, 0);
        assert_eq!(bench.sent_by_relayer().await, "0x0", "no gas was spent on any of it");
    })
    .await;
}

/// The payer's own cancellation of an authorization, for anybody to send.
fn cancel(payer: &TestWallet, nonce: B256) -> String {
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

#[tokio::test]
async fn a_nonce_is_good_for_one_authorization() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(10 * FIVE_USD).await;
        let first = bench.authorization(&payer);
        let mut other = payer.authorization(bench.treasury, 2 * FIVE_USD);
        other.nonce = first.nonce;

        // While the first is under way …
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload(&first)).await;
        assert_eq!(node.refusal(&payload(&other)).await.0, Reason::NonceAlreadyUsed);
        // … and once it has arrived.
        bench.chain.set_automine(true).await;
        bench.chain.mine(1).await;
        assert_eq!(node.pay(&payload(&first)).await.state, State::Credited);
        assert_eq!(node.refusal(&payload(&other)).await.0, Reason::NonceAlreadyUsed);

        // Another's with the same nonce is another.
        let neighbour = bench.payer(FIVE_USD).await;
        let mut same_nonce = bench.authorization(&neighbour);
        same_nonce.nonce = first.nonce;
        assert_eq!(node.pay(&payload(&same_nonce)).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

// ---- somebody else sends it first

#[tokio::test]
async fn sent_by_somebody_else_before_we_hear_of_it() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        let theirs = bench.front_run(&payload).await;
        bench.chain.mine(5).await;
        let payment = node.pay(&payload).await;
        assert_eq!((payment.state, payment.tx_hash), (State::Credited, Some(theirs)));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.sent_by_relayer().await, "0x0", "there was nothing left to spend gas on");
        assert_eq!(node.pay(&payload).await.id, payment.id);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn sent_by_somebody_else_while_ours_waits_to_be_mined() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let ours = node.until(&payer, State::Broadcast).await.tx_hash.unwrap();
        bench.send_dearly(BYSTANDER, transfer_call(&payload)).await;
        bench.chain.mine(1).await;
        let receipt = bench.chain.rpc("eth_getTransactionReceipt", json!([ours])).await;
        assert_eq!(receipt["status"], "0x0", "theirs came first and ours reverted");

        let payment = node.pay(&payload).await;
        assert_eq!(payment.state, State::Credited);
        assert_ne!(payment.tx_hash, Some(ours), "credited by the transaction that paid");
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn sent_by_somebody_else_after_ours_was_dropped() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let paid = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&paid).await;
        let ours = node.until(&payer, State::Broadcast).await.tx_hash.unwrap();
        bench.chain.rpc("anvil_dropTransaction", json!([ours])).await;
        bench.send_dearly(BYSTANDER, transfer_call(&paid)).await;
        bench.chain.mine(1).await;
        bench.chain.set_automine(true).await;
        let payment = node.pay(&paid).await;
        assert_eq!(payment.state, State::Credited);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);

        // Ours left a gap in the relayer's account nonces: nobody else's payment may hang on it.
        node.run();
        let next = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&payload(&bench.authorization(&next))).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

// ---- the chain takes its time

#[tokio::test]
async fn a_payment_not_mined_is_pending_and_the_same_later() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let pending = node.until(&payer, State::Broadcast).await;
        assert_eq!(pending.state.status(), "pending");
        assert_eq!(node.balance_of(&payer).await, 0);
        bench.chain.mine(1).await;
        let credited = node.pay(&payload).await;
        assert_eq!((credited.id, credited.tx_hash), (pending.id, pending.tx_hash));
        assert_eq!(credited.state, State::Credited);
        assert_eq!(bench.sent_by_relayer().await, "0x1");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_transaction_that_a_node_forgot_is_sent_again_byte_for_byte() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let sent = node.until(&payer, State::Broadcast).await;
        bench.chain.rpc("anvil_dropTransaction", json!([sent.tx_hash])).await;
        bench.chain.set_automine(true).await;
        let payment = node.pay(&payload).await;
        assert_eq!((payment.state, payment.tx_hash), (State::Credited, sent.tx_hash));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn as_many_confirmations_are_waited_for_as_configured() {
    each(async |bench| {
        let node = bench.node_with(|config| config.confirmations = 3).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        for _ in 0..2 {
            node.pay_and_leave(&payload).await;
            let sent = node.until(&payer, State::Mined).await;
            eventually("it is mined", async || {
                let receipt = bench.chain.rpc("eth_getTransactionReceipt", json!([sent.tx_hash])).await;
                (!receipt.is_null()).then_some(())
            })
            .await;
            assert_eq!(node.balance_of(&payer).await, 0);
            bench.chain.mine(1).await;
        }
        let payment = node.pay(&payload).await;
        assert_eq!(payment.state, State::Credited);
        let mined = u64::try_from(payment.block_number.unwrap()).unwrap();
        assert_eq!(bench.chain.head().await, mined + 2, "the block it is mined in is the first");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_credit_becomes_final_with_its_block() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let credited = node.pay(&payload(&bench.authorization(&payer))).await;
        assert_eq!(credited.state, State::Credited);
        // With one slot an epoch, a block is final after two more.
        bench.chain.mine(3).await;
        node.run();
        let finalized = node.until(&payer, State::Finalized).await;
        assert_eq!((finalized.id, finalized.tx_hash), (credited.id, credited.tx_hash));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
        node.crash().await;
    })
    .await;
}

#[tokio::test]
async fn a_credit_whose_block_was_reorganised_is_final_where_its_transfer_is_then() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let credited = node.pay(&payload(&bench.authorization(&payer))).await;
        bench.chain.mine(1).await;
        // The two last blocks are replaced, and the transfer is in the second of the new ones.
        let raw = bench.books.db.row("SELECT raw FROM payment_transactions", vec![]).await.unwrap().unwrap();
        bench.chain.rpc("anvil_reorg", json!([2, [[raw.text("raw").unwrap(), 1]]])).await;
        bench.chain.mine(3).await;
        node.run();
        let finalized = node.until(&payer, State::Finalized).await;
        assert_eq!(finalized.block_number, credited.block_number.map(|block| block + 1));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
        node.crash().await;
    })
    .await;
}

#[tokio::test]
async fn a_payer_who_empties_the_wallet_in_time_is_not_credited() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let payload = payload(&authorization);
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let ours = node.until(&payer, State::Broadcast).await.tx_hash.unwrap();
        bench.chain.rpc("anvil_impersonateAccount", json!([payer.address()])).await;
        bench.chain.give_gas(payer.address()).await;
        let away = call(&transferCall { to: STRANGER, value: U256::from(FIVE_USD) });
        bench.send_dearly(payer.address(), away).await;
        bench.chain.mine(1).await;
        let receipt = bench.chain.rpc("eth_getTransactionReceipt", json!([ours])).await;
        assert_eq!(receipt["status"], "0x0", "there was nothing left to transfer");
        bench.chain.set_automine(true).await;

        // Until its time is over it may still go through, so it has not failed.
        node.pay_and_leave(&payload).await;
        assert_eq!(node.payment_of(&payer).await.unwrap().state.status(), "pending");
        bench.warp(1200).await;
        let ended = node.pay(&payload).await;
        assert_eq!((ended.state, ended.state.status()), (State::Expired, "failed"));
        assert_eq!(node.balance_of(&payer).await, 0);
        assert_eq!(bench.sent_by_relayer().await, "0x1", "our gas is spent on it once");

        // The next payer is served as ever.
        let next = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&self::payload(&valid_after_warp(bench, &next))).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

/// An authorization that is still good once the chain's time is ahead of ours.
fn valid_after_warp(bench: &Bench, payer: &TestWallet) -> Authorization {
    let mut authorization = bench.authorization(payer);
    authorization.valid_before = (unix_seconds() + 80_000).to_string();
    authorization
}

#[tokio::test]
async fn an_authorization_cancelled_in_time_is_not_credited() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let payload = payload(&authorization);
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        node.until(&payer, State::Broadcast).await;
        bench.send_dearly(BYSTANDER, cancel(&payer, authorization.nonce)).await;
        bench.chain.mine(1).await;
        bench.chain.set_automine(true).await;
        bench.warp(1200).await;
        let ended = node.pay(&payload).await;
        assert_eq!((ended.state, ended.state.status()), (State::Cancelled, "failed"));
        assert_eq!(node.balance_of(&payer).await, 0);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

// ---- crashes and outages

#[tokio::test]
async fn without_a_chain_nothing_is_taken() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));

        // The chain was never reached …
        let mut config = bench.config();
        config.rpc_urls = vec!["http://127.0.0.1:1".parse().unwrap()];
        let blind = Node::new(&bench.books.db, config);
        assert!(matches!(blind.payments.check_chain().await, ChainHealth::Unreachable(_)));
        let result = in_time("an answer", blind.payments.pay(&payload, None)).await;
        assert!(matches!(result, Err(PaymentError::Unavailable(_))), "{result:?}");

        // … or went away, at any point before the payment is in the journal.
        let node = bench.node_with(|config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
        for method in ["eth_getBlockByNumber", "eth_call"] {
            rpc.break_methods(&[(method, Fault::Unreachable)]);
            let result = in_time("an answer", node.payments.pay(&payload, None)).await;
            assert!(matches!(result, Err(PaymentError::Unavailable(_))), "{method}: {result:?}");
            rpc.mend();
        }
        assert_eq!(bench.books.number("SELECT COUNT(*) AS n FROM payments").await, 0);
        assert_eq!(node.pay(&payload).await.state, State::Credited, "and it is good once the chain is back");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_second_endpoint_stands_in_for_the_first() {
    each(async |bench| {
        let node =
            bench.node_with(|config| config.rpc_urls.insert(0, "http://127.0.0.1:1".parse().unwrap())).await;
        let payer = bench.payer(FIVE_USD).await;
        // Only one of the two answers, and its word alone counts when the block is final.
        let payload = payload(&bench.authorization(&payer));
        node.pay_and_leave(&payload).await;
        node.until(&payer, State::Mined).await;
        bench.chain.mine(3).await;
        assert_eq!(node.pay(&payload).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

/// Calls that fail, and the state in which they stop a payment on its way.
const STOPS: &[(&[(&str, Fault)], State)] = &[
    (&[("eth_getTransactionCount", Fault::Unreachable)], State::Verified),
    (&[("eth_sendRawTransaction", Fault::Unreachable)], State::Signed),
    // The endpoint has taken the transaction, and nobody hears of it.
    (&[("eth_sendRawTransaction", Fault::AnswerLost), ("eth_getLogs", Fault::Unreachable)], State::Signed),
    (&[("eth_getTransactionReceipt", Fault::Unreachable)], State::Broadcast),
    (&[("eth_getLogs", Fault::Unreachable)], State::Broadcast),
];

#[tokio::test]
async fn a_process_started_anew_finishes_what_the_last_one_began() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        for (number, (faults, stops_in)) in STOPS.iter().enumerate() {
            let before = bench.node_with(|config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
            let payer = bench.payer(10 * FIVE_USD).await;
            rpc.break_methods(faults);
            before.pay_and_leave(&payload(&bench.authorization(&payer))).await;
            let stopped = before.until(&payer, *stops_in).await;
            before.crash().await;
            rpc.mend();

            let after = bench.node().await;
            after.run();
            let credited = after.until(&payer, State::Credited).await;
            assert_eq!(credited.id, stopped.id);
            assert_eq!(after.balance_of(&payer).await, 5_000_000, "stopped in {stops_in:?}");
            assert_eq!(bench.chain.usdc_of(payer.address()).await, 9 * FIVE_USD);
            assert_eq!(bench.sent_by_relayer().await, format!("{:#x}", number + 1));
            after.crash().await;
        }
        bench.assert_reconciled(&bench.node().await).await;
    })
    .await;
}

#[tokio::test]
async fn an_outage_on_the_way_only_delays() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        let node = bench.node_with(|config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
        for (faults, stops_in) in STOPS {
            let payer = bench.payer(10 * FIVE_USD).await;
            let payload = payload(&bench.authorization(&payer));
            rpc.break_methods(faults);
            node.pay_and_leave(&payload).await;
            node.until(&payer, *stops_in).await;
            rpc.mend();
            assert_eq!(node.pay(&payload).await.state, State::Credited, "delayed in {stops_in:?}");
            assert_eq!(node.balance_of(&payer).await, 5_000_000);
        }
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_relayer_without_gas_delays_and_loses_nothing() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let paid = payload(&bench.authorization(&payer));
        bench.chain.rpc("anvil_setBalance", json!([bench.relayer.address(), "0x0"])).await;
        node.pay_and_leave(&paid).await;
        let stuck = node.until(&payer, State::Signed).await;
        assert!(stuck.last_error.is_some(), "the operator can see why");
        bench.chain.give_gas(bench.relayer.address()).await;
        let payment = node.pay(&paid).await;
        assert_eq!((payment.id, payment.state), (stuck.id, State::Credited));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_payment_that_could_never_be_sent_ends_and_the_next_one_goes_through() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let paid = payload(&authorization);
        bench.chain.rpc("anvil_setBalance", json!([bench.relayer.address(), "0x0"])).await;
        node.pay_and_leave(&paid).await;
        node.until(&payer, State::Signed).await;
        bench.warp(1200).await;
        assert_eq!(node.until(&payer, State::Expired).await.state.status(), "failed");

        // Its account nonce was never used: the next payment must not wait for it.
        bench.chain.give_gas(bench.relayer.address()).await;
        node.run();
        let next = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&payload(&valid_after_warp(bench, &next))).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn sent_by_somebody_else_when_we_cannot_send() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let paid = payload(&bench.authorization(&payer));
        bench.chain.rpc("anvil_setBalance", json!([bench.relayer.address(), "0x0"])).await;
        node.pay_and_leave(&paid).await;
        node.until(&payer, State::Signed).await;
        let theirs = bench.front_run(&paid).await;
        let payment = node.pay(&paid).await;
        assert_eq!((payment.state, payment.tx_hash), (State::Credited, Some(theirs)));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

// ---- the books against the chain

#[tokio::test]
async fn the_audit_compares_the_books_with_the_chain() {
    each(async |bench| {
        const ON_CHAIN: &str = "each credit has its transfer on the chain";
        let node = bench.node().await;
        let payer = bench.payer(3 * FIVE_USD).await;
        node.pay(&payload(&bench.authorization(&payer))).await;
        bench.assert_reconciled(&node).await;
        let verdict_of = async |check: &str| {
            let report = bench.audit(&node).await;
            report.0.iter().find(|row| row.check == check).map(|row| (row.verdict, row.detail.clone()))
        };

        // Money that came without a payment, and money the operator has taken: to be known, no drift.
        bench.front_run(&payload(&bench.authorization(&payer))).await;
        let (verdict, _) = verdict_of("each transfer to the treasury is credited").await.unwrap();
        assert_eq!(verdict, Verdict::Warning);
        bench.chain.rpc("anvil_impersonateAccount", json!([bench.treasury])).await;
        bench.chain.give_gas(bench.treasury).await;
        let away = call(&transferCall { to: STRANGER, value: U256::from(2 * FIVE_USD) });
        bench.chain.send(bench.treasury, USDC, &away).await;
        let (verdict, detail) = verdict_of("the treasury holds what wallets are owed").await.unwrap();
        assert_eq!((verdict, detail.as_str()), (Verdict::Warning, "0 micro-USDC held, 5000000 owed"));
        assert!(!bench.audit(&node).await.has_drift());

        // A credit that the chain does not know.
        assert_eq!(bench.books.sql("UPDATE payments SET log_index = log_index + 7").await.unwrap(), 1);
        assert_eq!(verdict_of(ON_CHAIN).await.unwrap().0, Verdict::Drift);
    })
    .await;
}
