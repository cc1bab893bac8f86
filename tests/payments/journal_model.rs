//! Random interleavings of settling, paying out, sweeping, crashes and what a chain and other people do, on a real
//! chain: whatever the order, the journal says in the end what the chain says.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use alloy::primitives::keccak256;
use farebox::chain::Depth;
use farebox::payments::Kind;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::payments::bench::*;

/// Traces on each database, the same ones each time; `JOURNAL_TRACES` asks for as many new ones.
const TRACES: u32 = 12;
/// Steps of a trace, at the least and the most.
const STEPS: std::ops::Range<usize> = 60..90;
const PAYERS: usize = 3;
/// What a payer has at first: enough for two payments.
const FUNDS: u64 = 2 * FIVE_USD;
/// What a payer takes out again at a time, under one of so many names.
const TAKEN: MicroUsdc = MicroUsdc::new(1_500_000);
const NAMES: usize = 3;
/// Authorizations are good for this long, so that a warp or two ends them.
const VALID_SECONDS: i64 = 600;
/// Longer than any is, the treasury's own among them.
const ALL_EXPIRED_SECONDS: i64 = 2 * 3600;
/// Rounds in which everything comes to rest once the chain is left alone.
const ROUNDS: usize = 40;

/// The moves that a payment may make, written down here anew.
const MOVES: &[(State, &[State])] = &[
    (State::Verified, &[State::Signed, State::Mined, State::Expired, State::Cancelled]),
    (State::Signed, &[State::Broadcast, State::Mined, State::Expired, State::Cancelled]),
    (State::Broadcast, &[State::Verified, State::Mined, State::Expired, State::Cancelled]),
    (State::Mined, &[State::Broadcast, State::Credited]),
    // What is paid out makes both steps in one.
    (State::Credited, &[State::Finalized, State::Reorged]),
    (State::Expired, &[State::Verified]),
    (State::Cancelled, &[State::Verified]),
    (State::Finalized, &[]),
    (State::Reorged, &[]),
];

#[derive(Clone, Debug)]
enum Step {
    /// A payer signs an authorization and sends it to a node.
    Accept {
        node: usize,
        payer: usize,
    },
    /// One that was sent before is sent again.
    Again {
        node: usize,
        payment: Index,
    },
    /// A payer asks a node to pay it back, or asks once more.
    Withdraw {
        node: usize,
        payer: usize,
        name: usize,
    },
    Move {
        node: usize,
        payment: Index,
    },
    /// Both nodes move the same payment at once.
    Race {
        payment: Index,
    },
    /// A node dies in the middle of a move, or of its upkeep.
    Cut {
        node: usize,
        payment: Index,
        polls: u32,
    },
    CutUpkeep {
        node: usize,
        polls: u32,
    },
    Upkeep {
        node: usize,
    },
    Mine {
        blocks: u64,
    },
    Warp {
        seconds: i64,
    },
    /// The newest blocks are replaced by empty ones.
    Reorg {
        blocks: u64,
    },
    /// Nodes forget what waits to be mined.
    Forget,
    FrontRun {
        payment: Index,
        dearly: bool,
    },
    Cancel {
        payment: Index,
        dearly: bool,
    },
    Drain {
        payer: usize,
    },
    Refill {
        payer: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let payment = || any::<Index>();
    prop_oneof![
        4 => (0..2_usize, 0..PAYERS).prop_map(|(node, payer)| Step::Accept { node, payer }),
        1 => (0..2_usize, payment()).prop_map(|(node, payment)| Step::Again { node, payment }),
        3 => (0..2_usize, 0..PAYERS, 0..NAMES)
            .prop_map(|(node, payer, name)| Step::Withdraw { node, payer, name }),
        14 => (0..2_usize, payment()).prop_map(|(node, payment)| Step::Move { node, payment }),
        4 => payment().prop_map(|payment| Step::Race { payment }),
        5 => (0..2_usize, payment(), 1..40_u32)
            .prop_map(|(node, payment, polls)| Step::Cut { node, payment, polls }),
        1 => (0..2_usize, 1..60_u32).prop_map(|(node, polls)| Step::CutUpkeep { node, polls }),
        3 => (0..2_usize).prop_map(|node| Step::Upkeep { node }),
        6 => (1..3_u64).prop_map(|blocks| Step::Mine { blocks }),
        1 => (30..400_i64).prop_map(|seconds| Step::Warp { seconds }),
        2 => (1..3_u64).prop_map(|blocks| Step::Reorg { blocks }),
        1 => Just(Step::Forget),
        1 => (payment(), any::<bool>()).prop_map(|(payment, dearly)| Step::FrontRun { payment, dearly }),
        1 => (payment(), any::<bool>()).prop_map(|(payment, dearly)| Step::Cancel { payment, dearly }),
        1 => (0..PAYERS).prop_map(|payer| Step::Drain { payer }),
        1 => (0..PAYERS).prop_map(|payer| Step::Refill { payer }),
    ]
}

#[test]
fn whatever_happens_in_whatever_order_the_journal_ends_as_the_chain_does_on_sqlite() {
    check(|| async { Books::sqlite().await });
}

#[test]
fn whatever_happens_in_whatever_order_the_journal_ends_as_the_chain_does_on_postgres() {
    check(|| async { Books::postgres().await });
}

fn check<F: Future<Output = Books>>(books: impl Fn() -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let asked = std::env::var("JOURNAL_TRACES").ok();
    let cases = asked.as_ref().map_or(TRACES, |text| text.parse().unwrap());
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 60,
        max_shrink_time: 60_000,
        ..Config::default()
    };
    let ends: std::cell::RefCell<BTreeMap<(&str, &str), u32>> = std::cell::RefCell::default();
    let mut runner = match asked {
        Some(_) => TestRunner::new(config),
        None => TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
    };
    runner
        .run(&prop::collection::vec(step(), STEPS), |trace| {
            runtime.block_on(async {
                let world = World::new(books().await).await;
                for (kind, state) in world.run(&trace).await {
                    *ends.borrow_mut().entry((kind.as_str(), state.as_str())).or_default() += 1;
                }
            });
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
    println!("{:?}", ends.borrow());
    let ends = ends.borrow();
    let are_final = |kind: Kind| ends.contains_key(&(kind.as_str(), "finalized"));
    let is_enough = are_final(Kind::Authorization) && are_final(Kind::Withdrawal) && ends.len() >= 3;
    assert!(is_enough, "the traces reach too little: {ends:?}");
}

struct World {
    bench: Bench,
    treasury: TestWallet,
    clock: Clock,
    nodes: Vec<Node>,
    payers: Vec<TestWallet>,
    /// Payments as they were signed, whether or not they are in the journal.
    signed: Vec<Payload>,
    /// The state that what is in the journal was last seen in.
    seen: BTreeMap<B256, State>,
}

impl World {
    async fn new(books: Books) -> Self {
        let treasury = TestWallet::random();
        let bench = Bench { treasury: treasury.address(), ..Bench::new(books).await };
        let clock = Clock::fixed(Clock::System.now());
        let mut world = Self {
            bench,
            treasury,
            clock,
            nodes: Vec::new(),
            payers: Vec::new(),
            signed: Vec::new(),
            seen: BTreeMap::new(),
        };
        world.nodes = vec![world.node().await, world.node().await];
        for _ in 0..PAYERS {
            let payer = world.payer().await;
            world.payers.push(payer);
        }
        // The chain has a past that can be undone, and a final block that is known.
        world.bench.chain.mine(6).await;
        world.nodes[0].payments.upkeep().await.unwrap();
        world.bench.chain.set_automine(false).await;
        world
    }

    async fn node(&self) -> Node {
        let key = self.treasury.private_key();
        self.bench.node_at(self.clock.clone(), |config| config.treasury_key = Some(key.into())).await
    }

    /// A wallet with something here, which will be final, and more on the chain.
    async fn payer(&mut self) -> TestWallet {
        let payer = self.bench.payer(FIVE_USD + FUNDS).await;
        self.bench.chain.rpc("anvil_impersonateAccount", json!([payer.address()])).await;
        self.bench.chain.give_gas(payer.address()).await;
        let first = payload(&self.bench.authorization(&payer));
        assert_eq!(self.nodes[0].pay(&first).await.state, State::Credited);
        self.signed.push(first);
        payer
    }

    async fn run(mut self, trace: &[Step]) -> Vec<(Kind, State)> {
        for step in trace {
            self.apply(step).await;
            self.check_moves().await;
            self.check_books().await;
        }
        self.come_to_rest().await;
        let ends = self.check_against_the_chain().await;
        self.bench.books.discard().await;
        ends
    }

    async fn apply(&mut self, step: &Step) {
        let chain = &self.bench.chain;
        match step {
            Step::Accept { node, payer } => {
                let mut authorization = self.bench.authorization(&self.payers[*payer]);
                authorization.valid_before = (self.clock.now().seconds() + VALID_SECONDS).to_string();
                let payload = payload(&authorization);
                // What is refused is not in the journal, and may still be carried out by somebody else.
                let _ = self.nodes[*node].payments.accept(&payload, None).await;
                self.signed.push(payload);
            }
            Step::Again { node, payment } => {
                let _ = self.nodes[*node].payments.accept(payment.get(&self.signed), None).await;
            }
            Step::Withdraw { node, payer, name } => {
                let wallet = Wallet(self.payers[*payer].address());
                let payments = &self.nodes[*node].payments;
                let _ = payments.accept_withdrawal(wallet, TAKEN, &name.to_string()).await;
            }
            Step::Move { node, payment } => {
                if let Some(id) = self.id_of(payment).await {
                    let _ = self.nodes[*node].payments.step_once(id).await;
                }
            }
            Step::Race { payment } => {
                if let Some(id) = self.id_of(payment).await {
                    let (one, two) = (&self.nodes[0].payments, &self.nodes[1].payments);
                    let _ = tokio::join!(one.step_once(id), two.step_once(id));
                }
            }
            Step::Cut { node, payment, polls } => {
                if let Some(id) = self.id_of(payment).await {
                    cut_off(*polls, self.nodes[*node].payments.step_once(id)).await;
                    self.restart(*node).await;
                }
            }
            Step::CutUpkeep { node, polls } => {
                cut_off(*polls, self.nodes[*node].payments.upkeep()).await;
                self.restart(*node).await;
            }
            Step::Upkeep { node } => {
                let _ = self.nodes[*node].payments.upkeep().await;
            }
            Step::Mine { blocks } => chain.mine(*blocks).await,
            Step::Warp { seconds } => {
                self.clock.advance_seconds(*seconds);
                chain.rpc("evm_increaseTime", json!([seconds])).await;
                chain.mine(1).await;
            }
            Step::Reorg { blocks } => {
                chain.rpc("anvil_reorg", json!([blocks, []])).await;
            }
            Step::Forget => {
                chain.rpc("anvil_dropAllTransactions", json!([])).await;
            }
            Step::FrontRun { payment, dearly } => {
                // What is paid out can be read off the journal's transaction, and be sent by anybody as well.
                let journal = self.journal().await;
                let out = journal.into_values().filter(|payment| payment.kind == Kind::Withdrawal);
                let out = out.map(|payment| paid_out(&payment));
                let all: Vec<_> = self.signed.iter().map(transfer_call).chain(out).collect();
                let sent: &String = payment.get(&all);
                chain.submit(BYSTANDER, USDC, sent, *dearly).await;
            }
            Step::Cancel { payment, dearly } => {
                let authorization = &payment.get(&self.signed).authorization;
                let payer = self.payers.iter().find(|payer| payer.address() == authorization.from.0);
                let cancellation = cancel(payer.unwrap(), authorization.nonce);
                chain.submit(BYSTANDER, USDC, &cancellation, *dearly).await;
            }
            Step::Drain { payer } => {
                let payer = self.payers[*payer].address();
                let value = U256::from(chain.usdc_of(payer).await);
                let away = call(&transferCall { to: STRANGER, value });
                chain.submit(payer, USDC, &away, true).await;
            }
            Step::Refill { payer } => {
                let mint = format!("0x40c10f19{}{FIVE_USD:064x}", word(self.payers[*payer].address()));
                chain.submit(MINTER, USDC, &mint, true).await;
            }
        }
    }

    async fn id_of(&self, index: &Index) -> Option<i64> {
        let ids: Vec<_> = self.journal().await.into_values().map(|payment| payment.id).collect();
        (!ids.is_empty()).then(|| *index.get(&ids))
    }

    /// All there is in the journal, by nonce.
    async fn journal(&self) -> BTreeMap<B256, Payment> {
        let mut journal = BTreeMap::new();
        for payer in &self.payers {
            let (wallet, payments) = (Wallet(payer.address()), &self.nodes[0].payments);
            let mut of_payer = payments.of_wallet(wallet, None, 1000).await.unwrap();
            of_payer.extend(payments.withdrawals_of(wallet, None, 1000).await.unwrap());
            journal.extend(of_payer.into_iter().map(|payment| (payment.authorization.nonce, payment)));
        }
        journal
    }

    async fn restart(&mut self, node: usize) {
        self.nodes[node] = self.node().await;
    }

    /// Each payment has moved as payments may; with two nodes at work, by two steps at most, of which what is
    /// paid out makes its last two at once.
    async fn check_moves(&mut self) {
        let journal = self.journal().await;
        for (nonce, before) in &self.seen {
            let Some(payment) = journal.get(nonce) else { panic!("a payment has left the journal") };
            let steps = if payment.kind == Kind::Withdrawal { 3 } else { 2 };
            let now = payment.state;
            assert!(reaches(*before, now, steps), "a payment went from {before:?} to {now:?}");
        }
        self.seen = journal.into_iter().map(|(nonce, payment)| (nonce, payment.state)).collect();
    }

    /// What the wallets have is what their credited payments are worth without what was paid out, and what is being
    /// paid out is locked.
    async fn check_books(&self) {
        let books = &self.bench.books;
        let credited = books
            .number(
                "SELECT CAST(COALESCE(SUM(CASE WHEN kind = 'withdrawal' THEN -value_micro ELSE value_micro END), 0)
                        AS BIGINT) AS n
                 FROM payments WHERE state IN ('credited', 'finalized')",
            )
            .await;
        let balances =
            books.number("SELECT CAST(COALESCE(SUM(balance_micro), 0) AS BIGINT) AS n FROM wallets").await;
        let leaving = books
            .number(
                "SELECT CAST(COALESCE(SUM(value_micro), 0) AS BIGINT) AS n FROM payments
                 WHERE kind = 'withdrawal' AND state IN ('verified', 'signed', 'broadcast', 'mined')",
            )
            .await;
        let locked =
            books.number("SELECT CAST(COALESCE(SUM(locked_micro), 0) AS BIGINT) AS n FROM wallets").await;
        let shared = books
            .number(
                "SELECT COUNT(*) AS n FROM (SELECT account_nonce FROM payment_transactions
                 GROUP BY account_nonce HAVING COUNT(DISTINCT payment_id) > 1) AS twice",
            )
            .await;
        assert_eq!((balances, locked), (credited, leaving));
        assert_eq!(shared, 0, "an account nonce was given to two payments");
    }

    /// The chain goes on and nobody disturbs it: every payment comes to rest.
    async fn come_to_rest(&mut self) {
        self.bench.chain.set_automine(true).await;
        let at_rest = [State::Finalized, State::Expired, State::Cancelled, State::Reorged];
        let mut refusals = Vec::new();
        for round in 0..ROUNDS {
            self.bench.chain.mine(4).await;
            let journal = self.journal().await;
            if journal.values().all(|payment| at_rest.contains(&payment.state)) {
                return;
            }
            for payment in journal.values() {
                let stepped = self.nodes[round % 2].payments.step_once(payment.id).await;
                refusals.extend(stepped.err().map(|error| format!("payment {}: {error}", payment.id)));
            }
            let kept = self.nodes[round % 2].payments.upkeep().await;
            refusals.extend(kept.err().map(|error| error.to_string()));
            if round == ROUNDS / 2 {
                // What cannot go through any more expires.
                self.clock.advance_seconds(ALL_EXPIRED_SECONDS);
                // To a time, not by one: a block that is undone takes along what time it had skipped.
                let now = self.clock.now().seconds();
                self.bench.chain.rpc("evm_setNextBlockTimestamp", json!([now])).await;
            }
        }
        for payment in self.journal().await.values().filter(|payment| !at_rest.contains(&payment.state)) {
            let (id, state, why) = (payment.id, payment.state, &payment.last_error);
            println!("payment {id} is {state:?} for {why:?}");
            self.explain(payment).await;
        }
        refusals.dedup();
        panic!("not every payment came to rest: {refusals:#?}");
    }

    /// Prints what the chain says of a payment that should be at rest.
    async fn explain(&self, payment: &Payment) {
        let chain = self.nodes[0].payments.chain();
        let authorization = &payment.authorization;
        let used = chain.is_nonce_used(authorization.from, authorization.nonce).await;
        let spent = chain.was_spent(authorization, 0).await;
        println!("nonce used {used:?}, spent otherwise {spent:?}, seen block {}", payment.seen_block);
        println!("final {:?}, valid before {}", chain.finalized().await, authorization.valid_before);
        for depth in [Depth::Head, Depth::Finalized] {
            println!("{depth:?} {:?}", chain.sight(authorization, 0, depth).await);
        }
        let pool = self.bench.chain.rpc("txpool_content", json!([])).await;
        println!("in the pool: {pool}");
    }

    /// Credited is what the chain's own logs say was paid for an authorization of the journal, paid out what they
    /// say of the treasury's, and nothing else.
    async fn check_against_the_chain(&self) -> Vec<(Kind, State)> {
        let used = self.used_on_chain().await;
        let journal = self.journal().await;
        let arrived = self.signed.iter().filter(|signed| used.contains(&signed.authorization.nonce)).count();
        for payment in journal.values() {
            let is_final = payment.state == State::Finalized;
            assert_eq!(is_final, used.contains(&payment.authorization.nonce), "{payment:#?}");
        }
        let worth = |payer: Option<&TestWallet>| -> i64 {
            let of_payer = journal.values().filter(|payment| {
                payer.is_none_or(|payer| payment.wallet() == Wallet(payer.address()))
                    && payment.state == State::Finalized
            });
            let signed = |payment: &Payment| match payment.kind {
                Kind::Withdrawal => -payment.value.get(),
                Kind::Authorization | Kind::Deposit => payment.value.get(),
            };
            of_payer.map(signed).sum()
        };
        // What nobody has sent to us has arrived all the same, if it was carried out.
        let unknown = arrived - journal.values().filter(|payment| is_in(payment)).count();
        let unknown = i64::try_from(u64::try_from(unknown).unwrap() * FIVE_USD).unwrap();
        let held = i64::try_from(self.bench.chain.usdc_of(self.bench.treasury).await).unwrap();
        assert_eq!(held, worth(None) + unknown);
        for payer in &self.payers {
            let balance = self.nodes[0].ledger.balance(Wallet(payer.address())).await.unwrap();
            assert_eq!(
                (balance.balance.get(), balance.locked, balance.debt),
                (worth(Some(payer)), MicroUsdc::ZERO, MicroUsdc::ZERO)
            );
        }
        let report = self.bench.audit(&self.nodes[0]).await;
        assert!(!report.has_drift(), "{report}");
        journal.into_values().map(|payment| (payment.kind, payment.state)).collect()
    }

    /// The nonces of authorizations that were used in a transaction that also moved coins to the treasury, or from it.
    async fn used_on_chain(&self) -> BTreeSet<B256> {
        let logs = async |topics: Value| {
            let filter =
                json!([{"address": USDC, "fromBlock": "0x0", "toBlock": "latest", "topics": topics}]);
            let logs = self.bench.chain.rpc("eth_getLogs", filter).await;
            logs.as_array().unwrap().clone()
        };
        let (treasury, transfer) =
            (format!("0x{}", word(self.bench.treasury)), keccak256("Transfer(address,address,uint256)"));
        let mut moved = logs(json!([transfer, null, treasury])).await;
        moved.extend(logs(json!([transfer, treasury])).await);
        let moved: BTreeSet<_> = moved.iter().map(|log| log["transactionHash"].to_string()).collect();
        let used = logs(json!([keccak256("AuthorizationUsed(address,bytes32)")])).await;
        used.iter()
            .filter(|log| moved.contains(&log["transactionHash"].to_string()))
            .map(|log| log["topics"][2].as_str().unwrap().parse().unwrap())
            .collect()
    }
}

/// What carries out an authorization of the treasury's.
fn paid_out(withdrawal: &Payment) -> String {
    format!("0x{}", hex::encode(withdrawal.authorization.transfer_call(&withdrawal.signature)))
}

/// Whether it has come in.
fn is_in(payment: &Payment) -> bool {
    payment.kind == Kind::Authorization && payment.state == State::Finalized
}

fn reaches(from: State, to: State, steps: u32) -> bool {
    let next = MOVES.iter().find(|(state, _)| *state == from).map_or(&[][..], |(_, next)| next);
    from == to || (steps > 0 && next.iter().any(|next| reaches(*next, to, steps - 1)))
}

/// Begins some work and drops it after it has been polled so often, as a crash does.
pub async fn cut_off(polls: u32, work: impl Future) {
    let mut work = pin!(work);
    let mut left = polls;
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        work.as_mut().poll(context).map(drop)
    })
    .await;
}
