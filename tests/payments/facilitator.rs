//! Payments settled by a remote facilitator, the published one: it is asked, and only the chain is believed.

use std::process::Command;
use std::time::Instant;

use farebox::config::Facilitator;

use crate::payments::bench::*;
use crate::support::gateway::{Answer, Gateway, Setup, ask};
use crate::support::postgres;
use crate::support::process::Process;
use crate::support::smart_wallets::Safe;
use crate::support::upstream::{Script, ScriptedUpstream};
use crate::support::wallet::SignedPayment;
use crate::support::{PATIENCE, free_port, http_client, project_root};

/// Names another transaction than the one that pays, see `tests/clients/facilitator.mjs`.
const SOME_TRANSACTION: &str = "0x5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a";
const AUTH: &str = "Bearer of-the-facilitator-0123456789";
/// As many calls as one payment is worth where no relayer stands by, and where one does.
const MOST_CALLS: usize = 12;
const CALLS_BEFORE_RELAYER: u64 = 2;

/// The reference facilitator in a process of its own.
struct Remote {
    url: String,
    account: TestWallet,
    env: Vec<(&'static str, String)>,
    process: Process,
}

impl Remote {
    async fn start(chain: &TestChain) -> Self {
        Self::with(chain, &[]).await
    }

    async fn with(chain: &TestChain, env: &[(&'static str, &str)]) -> Self {
        let account = TestWallet::random();
        chain.give_gas(account.address()).await;
        let mut all = vec![("RPC_URL", chain.url.clone()), ("RELAYER_KEY", account.private_key())];
        all.extend(env.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let (process, url) = Self::launch(&all);
        Self { url, account, env: all, process }
    }

    fn launch(env: &[(&'static str, String)]) -> (Process, String) {
        let mut command = Command::new("node");
        command.arg(project_root().join("tests/clients/facilitator.mjs"));
        command.envs(env.iter().map(|(name, value)| (*name, value)));
        let mut process = Process::spawn("the facilitator", &mut command);
        let line = process.wait_for_line(PATIENCE, |line| line.starts_with("ready ")).unwrap();
        (process, line.trim_start_matches("ready ").to_owned())
    }

    /// Where it was, after [`Self::kill_9`].
    fn restart(&mut self) {
        let port = self.url.rsplit(':').next().unwrap().to_owned();
        self.env.push(("PORT", port));
        let (process, url) = Self::launch(&self.env);
        assert_eq!(url, self.url);
        self.process = process;
    }

    fn kill_9(&mut self) {
        self.process.kill_9();
    }

    async fn behave(&self, behaviour: Value) {
        let call = http_client().post(format!("{}/behave", self.url)).body(behaviour.to_string());
        assert_eq!(call.send().await.unwrap().status(), 200);
    }

    async fn asked(&self) -> Value {
        let answer = http_client().get(format!("{}/asked", self.url)).send().await.unwrap();
        serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
    }

    async fn asked_to(&self, what: &str) -> u64 {
        self.asked().await[what].as_u64().unwrap()
    }
}

fn at(url: &str) -> Option<Facilitator> {
    Some(Facilitator {
        url: url.parse().unwrap(),
        auth: None,
        resource: "http://localhost:8080/v1/topup".into(),
    })
}

/// A process that has no relayer, and that asks a facilitator what it supports as a server does.
async fn node_of(bench: &Bench, url: &str) -> Node {
    node_with(bench, at(url), Clock::System).await
}

async fn node_with(bench: &Bench, facilitator: Option<Facilitator>, clock: Clock) -> Node {
    let node = bench
        .node_at(clock, |config| {
            config.facilitator = facilitator;
            config.relayer_keys = "".into();
        })
        .await;
    watch(&node);
    node
}

fn watch(node: &Node) {
    let payments = node.payments.clone();
    node.tasks.spawn_service(async move { payments.watch_facilitator().await });
}

async fn is_healthy(node: &Node) {
    eventually("the facilitator is of use", async || {
        node.payments.facilitator_health().unwrap().is_ok().then_some(())
    })
    .await;
}

/// Waits until something is noted on a payer's payment, and that it was not credited for it.
async fn noted(node: &Node, payer: &TestWallet, what: &str) -> Payment {
    let payment = eventually(&format!("it is noted: {what}"), async || {
        let payment = node.payment_of(payer).await?;
        payment.last_error.as_ref().is_some_and(|note| note.contains(what)).then_some(payment)
    })
    .await;
    assert_eq!(payment.state, State::Verified);
    assert_eq!(node.balance_of(payer).await, 0);
    payment
}

#[tokio::test]
async fn the_reference_facilitator_settles_in_both_versions_without_a_relayer() {
    each(async |bench| {
        for (env, version) in
            [(&[][..], 2), (&[("VERSION", "2")], 2), (&[("VERSION", "1"), ("AUTH", AUTH)], 1)]
        {
            let remote = Remote::with(&bench.chain, env).await;
            let facilitator = at(&remote.url).map(|it| Facilitator { auth: Some(AUTH.into()), ..it });
            let node = node_with(bench, facilitator, Clock::System).await;
            is_healthy(&node).await;
            let payer = bench.payer(FIVE_USD + 1).await;
            // As some wallets write it: the token wants 27 more.
            let authorization = bench.authorization(&payer);
            let mut signature = authorization.signature();
            *signature.last_mut().unwrap() %= 27;
            let payload = signed_payload(&authorization, &signature);
            let payment = node.pay(&payload).await;
            assert_eq!(payment.state, State::Credited);
            assert_eq!(node.balance_of(&payer).await, 5_000_000);
            assert_eq!(bench.chain.usdc_of(payer.address()).await, 1);
            assert_eq!(bench.chain.sent_by(remote.account.address()).await, 1);
            // In the other envelope: the same payment, and nobody is asked.
            let again = Payload { version: 1, network: "base".into(), ..payload };
            assert_eq!(node.pay(&again).await.id, payment.id);
            assert_eq!(remote.asked().await["versions"], json!([version]));
            assert_eq!((remote.asked_to("settle").await, remote.asked_to("verify").await), (1, 0));
        }
        assert_eq!(bench.sent_by_relayer().await, "0x0");
        bench.assert_reconciled(&node_of(bench, "http://127.0.0.1:1").await).await;
    })
    .await;
}

#[tokio::test]
async fn a_contract_wallets_signature_reaches_the_facilitator_as_it_is() {
    each(async |bench| {
        let remote = Remote::start(&bench.chain).await;
        let node = node_of(bench, &remote.url).await;
        let safe = Safe::deployed(&bench.chain).await;
        bench.chain.mint(safe.address, FIVE_USD).await;
        let mut authorization = bench.authorization(&TestWallet::random());
        authorization.from = safe.address;
        let payload = signed_payload(&authorization, &safe.sign(authorization.hash()));
        assert_eq!(node.pay(&payload).await.state, State::Credited);
        assert_eq!(node.balance_at(safe.address).await, 5_000_000);
        assert_eq!(bench.chain.sent_by(remote.account.address()).await, 1);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn what_the_facilitator_says_is_pending_is_credited_once_it_is_mined() {
    each(async |bench| {
        let remote = Remote::with(&bench.chain, &[("WAIT_MS", "300")]).await;
        let node = node_of(bench, &remote.url).await;
        let payer = bench.payer(10 * FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let pending = noted(&node, &payer, "pending").await;
        assert_eq!((pending.state.status(), pending.refused_so_far()), ("pending", None));
        bench.chain.set_automine(true).await;
        bench.chain.mine(1).await;
        let payment = node.pay(&payload).await;
        assert_eq!((payment.id, payment.state), (pending.id, State::Credited));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.chain.sent_by(remote.account.address()).await, 1);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn one_that_says_it_has_paid_and_has_not_brings_no_credit_ever() {
    each(async |bench| {
        let remote = Remote::start(&bench.chain).await;
        remote.behave(json!({"as": "lying"})).await;
        let clock = Clock::fixed(Clock::System.now());
        let node = node_with(bench, at(&remote.url), clock.clone()).await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let payload = payload(&authorization);
        node.pay_and_leave(&payload).await;
        let claimed = noted(&node, &payer, SOME_TRANSACTION).await;
        assert_eq!((claimed.state.status(), &claimed.tx_hash), ("pending", &None), "its word is not ours");

        // It is asked again, and lies again.
        clock.advance_seconds(31);
        node.payments.step_once(claimed.id).await.unwrap();
        eventually("it is asked again", async || (remote.asked_to("settle").await == 2).then_some(())).await;
        noted(&node, &payer, SOME_TRANSACTION).await;

        bench.warp(1200).await;
        let ended = node.until(&payer, State::Expired).await;
        assert_eq!(ended.state.status(), "failed");
        assert!(ended.last_error.unwrap().contains("expired"));
        assert_eq!(node.pay(&payload).await.state, State::Expired);
        assert_eq!(node.balance_of(&payer).await, 0);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn one_that_names_another_transaction_is_credited_by_the_one_that_paid() {
    each(async |bench| {
        let remote = Remote::start(&bench.chain).await;
        remote.behave(json!({"as": "mistaken"})).await;
        let node = node_of(bench, &remote.url).await;
        let payer = bench.payer(FIVE_USD).await;
        let payment = node.pay(&payload(&bench.authorization(&payer))).await;
        assert_eq!(payment.state, State::Credited);
        let hash = payment.tx_hash.unwrap();
        assert_ne!(hash, SOME_TRANSACTION);
        let receipt = bench.chain.rpc("eth_getTransactionReceipt", json!([hash])).await;
        assert_eq!(receipt["from"], remote.account.shown().to_lowercase());
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn one_that_answers_late_does_not_delay_the_credit() {
    each(async |bench| {
        let remote = Remote::start(&bench.chain).await;
        remote.behave(json!({"as": "late"})).await;
        let node = node_of(bench, &remote.url).await;
        let payer = bench.payer(FIVE_USD).await;
        let began = Instant::now();
        let payment = node.pay(&payload(&bench.authorization(&payer))).await;
        assert_eq!(payment.state, State::Credited);
        assert!(began.elapsed() < Duration::from_millis(4500), "it waited for the answer");
        // The answer comes when the payment is at rest, and moves nothing.
        eventually("the answer is kept", async || {
            let payment = node.payment_of(&payer).await?;
            (payment.facilitation.next_call_at > Clock::System.now().plus_seconds(21)).then_some(())
        })
        .await;
        assert_eq!(node.payment_of(&payer).await.unwrap().last_error, None);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_refusal_is_told_at_once_and_is_not_the_end() {
    each(async |bench| {
        let remote = Remote::start(&bench.chain).await;
        remote.behave(json!({"as": "refusing", "reason": "insufficient_funds"})).await;
        let node = node_of(bench, &remote.url).await;
        let payer = bench.payer(10 * FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        let began = Instant::now();
        let refused = node.payments.pay(&payload, None).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(8), "nobody is kept waiting for nothing");
        assert_eq!((refused.state, refused.refused_so_far()), (State::Verified, Some("insufficient_funds")));
        let again = node.payments.pay(&payload, None).await.unwrap();
        assert_eq!((again.id, again.refused_so_far()), (refused.id, Some("insufficient_funds")));
        // It is shown to it first, and says yes now; then it is settled.
        remote.behave(json!({"as": "healthy"})).await;
        let credited = node.until(&payer, State::Credited).await;
        assert_eq!((credited.id, credited.refused_so_far()), (refused.id, None));
        assert!(remote.asked_to("verify").await >= 1);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.chain.sent_by(remote.account.address()).await, 1);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn what_it_refuses_somebody_else_may_still_carry_out() {
    each(async |bench| {
        let remote = Remote::start(&bench.chain).await;
        remote.behave(json!({"as": "refusing", "reason": "invalid_payload"})).await;
        let node = node_of(bench, &remote.url).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        let refused = node.payments.pay(&payload, None).await.unwrap();
        assert_eq!(refused.refused_so_far(), Some("invalid_payload"));
        let theirs = bench.front_run(&payload).await;
        let credited = node.until(&payer, State::Credited).await;
        assert_eq!((credited.id, credited.tx_hash), (refused.id, Some(theirs)));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_relayer_of_ours_sends_what_the_facilitator_does_not() {
    each(async |bench| {
        let remote = Remote::start(&bench.chain).await;
        remote.behave(json!({"as": "refusing", "reason": "insufficient_funds"})).await;
        let node = bench.node_with(|config| config.facilitator = at(&remote.url)).await;
        let payer = bench.payer(10 * FIVE_USD).await;
        let payment = node.pay(&payload(&bench.authorization(&payer))).await;
        assert_eq!((payment.state, payment.refused_so_far()), (State::Credited, None));
        assert_eq!(bench.sent_by_relayer().await, "0x1");
        assert_eq!(remote.asked_to("settle").await, CALLS_BEFORE_RELAYER);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        // While it settles, the relayer has nothing to do.
        remote.behave(json!({"as": "healthy"})).await;
        let next = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&payload(&bench.authorization(&next))).await.state, State::Credited);
        assert_eq!(bench.sent_by_relayer().await, "0x1");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_facilitator_that_dies_and_comes_back_settles_once() {
    each(async |bench| {
        let mut remote = Remote::with(&bench.chain, &[("WAIT_MS", "20000")]).await;
        let node = node_of(bench, &remote.url).await;
        // Before it has heard of the payment …
        remote.kill_9();
        let first = bench.payer(10 * FIVE_USD).await;
        node.pay_and_leave(&payload(&bench.authorization(&first))).await;
        noted(&node, &first, "has not answered").await;
        remote.restart();
        node.until(&first, State::Credited).await;
        assert_eq!(node.balance_of(&first).await, 5_000_000);
        // … and when it has sent it, and has not answered.
        let second = bench.payer(10 * FIVE_USD).await;
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload(&bench.authorization(&second))).await;
        in_time("it sends", bench.chain.transaction_in_the_pool()).await;
        remote.kill_9();
        noted(&node, &second, "has not answered").await;
        bench.chain.set_automine(true).await;
        bench.chain.mine(1).await;
        node.until(&second, State::Credited).await;
        assert_eq!(node.balance_of(&second).await, 5_000_000);
        assert_eq!(bench.chain.sent_by(remote.account.address()).await, 2);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn whatever_else_it_answers_decides_nothing_and_takes_us_nowhere() {
    each(async |bench| {
        let elsewhere = ScriptedUpstream::start().await;
        let broken = ScriptedUpstream::start().await;
        let node = node_of(bench, &broken.base_url).await;
        let location = format!("{}/settle", elsewhere.base_url);
        let success = json!({"success": true, "transaction": SOME_TRANSACTION, "network": "eip155:8453"});
        let refusal = json!({"success": false, "errorReason": "server_error"});
        for (script, noted_as) in [
            (Script::json(500, &success), "HTTP 500"),
            (Script::json(503, &refusal), "HTTP 503"),
            (Script::json(404, &success), "HTTP 404"),
            (Script::json(200, &json!({"ok": true})), "HTTP 200"),
            (Script::answer(200, &[], "<html>settled</html>"), "HTTP 200"),
            (Script::answer(200, &[], "x".repeat(1 << 20)), "above 262144 bytes"),
            (Script::answer(307, &[("location", &location)], ""), "HTTP 307"),
            (Script::answer(302, &[("location", &location)], success.to_string()), "HTTP 302"),
            (Script::hang_up(), "has not answered"),
            (Script::hang_up().silence(Duration::from_secs(25)), "no answer within 12 seconds"),
        ] {
            broken.play(script);
            let payer = bench.payer(FIVE_USD).await;
            let payload = payload(&bench.authorization(&payer));
            node.pay_and_leave(&payload).await;
            let payment = noted(&node, &payer, noted_as).await;
            assert_eq!((payment.state.status(), payment.refused_so_far()), ("pending", None));
            // The journal has it, and the chain says what became of it.
            bench.front_run(&payload).await;
            node.until(&payer, State::Credited).await;
        }
        assert!(elsewhere.received().is_empty(), "a redirect was followed");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_refusal_that_is_no_code_is_not_repeated_to_anybody() {
    let bench = Bench::new(Books::sqlite().await).await;
    let broken = ScriptedUpstream::start().await;
    let node = node_of(&bench, &broken.base_url).await;
    for reason in [json!("<script>alert(1)</script>"), json!("a".repeat(101)), json!(""), Value::Null] {
        broken.play(Script::json(400, &json!({"success": false, "errorReason": reason})));
        let payer = bench.payer(FIVE_USD).await;
        let refused = node.payments.pay(&payload(&bench.authorization(&payer)), None).await.unwrap();
        assert_eq!(refused.refused_so_far(), Some("unexpected_settle_error"));
    }
}

#[tokio::test]
async fn it_is_asked_a_bounded_number_of_times_and_seldom() {
    each(async |bench| {
        let broken = ScriptedUpstream::start().await;
        broken.play(Script::json(500, &json!({})));
        let clock = Clock::fixed(Clock::System.now());
        let node = bench
            .node_at(clock.clone(), |config| {
                config.facilitator = at(&broken.base_url);
                config.relayer_keys = "".into();
            })
            .await;
        let payer = bench.payer(FIVE_USD).await;
        node.pay_and_leave(&payload(&bench.authorization(&payer))).await;
        let id = noted(&node, &payer, "HTTP 500").await.id;
        let mut pauses = Vec::new();
        for calls in 2..=MOST_CALLS {
            let payment = node.payment_of(&payer).await.unwrap();
            let pause = payment.facilitation.next_call_at.seconds() - clock.now().seconds();
            pauses.push(pause);
            // A moment too early nobody asks.
            clock.advance_seconds(pause - 1);
            node.payments.step_once(id).await.unwrap();
            assert_eq!(broken.received().len(), calls - 1);
            clock.advance_seconds(1);
            eventually("it is asked, and the answer is kept", async || {
                node.payments.step_once(id).await.unwrap();
                let payment = node.payment_of(&payer).await?;
                let pause = payment.facilitation.next_call_at.seconds() - clock.now().seconds();
                (broken.received().len() == calls && pause != 20).then_some(())
            })
            .await;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        clock.advance_seconds(400);
        for _ in 0..3 {
            node.payments.step_once(id).await.unwrap();
        }
        tokio::time::sleep(A_MOMENT).await;
        assert_eq!(broken.received().len(), MOST_CALLS);
        assert_eq!(node.balance_of(&payer).await, 0);
    })
    .await;
}

#[tokio::test]
async fn while_it_hangs_a_relayer_sees_to_all_but_one() {
    each(async |bench| {
        let hanging = ScriptedUpstream::start().await;
        hanging.play(Script::json(500, &json!({})));
        let node = bench.node_at(Clock::System, |config| config.facilitator = at(&hanging.base_url)).await;
        // It has failed: both calls that a payment is worth.
        let first = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&payload(&bench.authorization(&first))).await.state, State::Credited);
        let calls = hanging.received().len() + 1;
        hanging.play(Script::hang_up().silence(Duration::from_secs(60)));
        let waiting = bench.payer(FIVE_USD).await;
        node.pay_and_leave(&payload(&bench.authorization(&waiting))).await;
        eventually("it is asked", async || (hanging.received().len() == calls).then_some(())).await;
        for _ in 0..3 {
            let payer = bench.payer(FIVE_USD).await;
            let payment = node.pay(&payload(&bench.authorization(&payer))).await;
            assert_eq!(payment.state, State::Credited);
        }
        assert_eq!(hanging.received().len(), calls);
        assert_eq!(node.payment_of(&waiting).await.unwrap().state.status(), "pending");
    })
    .await;
}

#[tokio::test]
async fn one_that_is_slow_and_has_not_failed_is_shown_all() {
    let bench = Bench::new(Books::sqlite().await).await;
    let slow = ScriptedUpstream::start().await;
    slow.play(Script::hang_up().silence(Duration::from_secs(60)));
    let node = bench.node_at(Clock::System, |config| config.facilitator = at(&slow.base_url)).await;
    for asked in 1..=3 {
        let payer = bench.payer(FIVE_USD).await;
        node.pay_and_leave(&payload(&bench.authorization(&payer))).await;
        eventually("it is asked", async || (slow.received().len() == asked).then_some(())).await;
    }
    assert_eq!(bench.sent_by_relayer().await, "0x0");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_ask_for_the_same_payment_once() {
    let bench = Bench::new(Books::postgres().await).await;
    let remote = Remote::start(&bench.chain).await;
    let elsewhere = Db::open(&bench.books.url, Access::Serve).await.unwrap();
    let mut config = bench.config();
    (config.facilitator, config.relayer_keys) = (at(&remote.url), "".into());
    let nodes = [Node::new(&bench.books.db, config.clone()), Node::new(&elsewhere, config)];
    for node in &nodes {
        assert_eq!(node.payments.check_chain().await, ChainHealth::Ok);
    }
    let payer = bench.payer(10 * FIVE_USD).await;
    let payload = payload(&bench.authorization(&payer));
    let payments = at_once(50, |number| (nodes[number % 2].clone(), payload.clone())).await;
    assert!(payments.iter().all(|payment| payment.state == State::Credited), "{payments:?}");
    assert_eq!(nodes[0].balance_of(&payer).await, 5_000_000);
    assert_eq!(remote.asked_to("settle").await, 1);
    bench.assert_reconciled(&nodes[0]).await;
    elsewhere.close().await;
    bench.books.discard().await;
}

#[tokio::test]
async fn a_transfer_that_the_chain_undoes_is_asked_for_again() {
    each(async |bench| {
        let remote = Remote::start(&bench.chain).await;
        let node = bench
            .node_with(|config| {
                config.facilitator = at(&remote.url);
                config.relayer_keys = "".into();
                config.confirmations = 1;
            })
            .await;
        let payer = bench.payer(10 * FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.mine(3).await;
        let credited = node.pay(&payload).await;
        assert_eq!(credited.state, State::Credited);
        bench.chain.rpc("anvil_reorg", json!([1, []])).await;
        assert_eq!(bench.chain.usdc_of(payer.address()).await, 10 * FIVE_USD, "it is undone");
        // The time comes at which the facilitator may be asked again.
        bench.books.sql("UPDATE payments SET facilitator_next_ms = 0").await.unwrap();
        eventually("the transfer is in the chain again", async || {
            node.payments.upkeep().await.unwrap();
            (bench.chain.usdc_of(payer.address()).await == 9 * FIVE_USD).then_some(())
        })
        .await;
        bench.chain.mine(3).await;
        node.payments.upkeep().await.unwrap();
        let settled = node.payment_of(&payer).await.unwrap();
        assert_eq!((settled.id, settled.state), (credited.id, State::Finalized));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

// ---- the whole gateway

fn setup(chain: &std::sync::Arc<TestChain>, url: &str, database_url: Option<String>) -> Setup {
    Setup {
        database_url,
        payments: format!("facilitator_url = \"{url}\""),
        // No relayer's key.
        env: vec![("FAREBOX_RELAYER_KEY".into(), String::new())],
        ..Setup::new(chain, "http://127.0.0.1:9/v1")
    }
}

async fn send(gateway: &Gateway, payment: &SignedPayment) -> Answer {
    let call = gateway.post("/v1/topup").json(&json!({"amount": 5}));
    call.header("x-payment", &payment.v2_header()).send().await
}

async fn topups(gateway: &Gateway, wallet: &TestWallet) -> Value {
    let path = format!("/v1/topups/{}{}", wallet.address(), gateway.sign_in(wallet).query());
    gateway.get(&path).send().await.expect(200).json()["topups"].clone()
}

/// Dies at each step around a call to the facilitator, and is started again.
async fn killed_around_the_call(database_url: Option<String>) {
    let chain = std::sync::Arc::new(TestChain::start());
    let remote = Remote::start(&chain).await;
    let mut gateway = Gateway::start_with(setup(&chain, &remote.url, database_url)).await;
    for (number, place) in ["verified", "asking", "answered", "facilitated"].into_iter().enumerate() {
        let crash = ("FAREBOX_CRASH_AT".to_owned(), place.to_owned());
        gateway.reconfigure(|setup| setup.env.push(crash.clone()));
        let payer = TestWallet::random();
        chain.mint(payer.address(), 10 * FIVE_USD).await;
        let payment = payer.authorization(gateway.setup.pay_to, FIVE_USD).sign();
        let call = gateway.post("/v1/topup").json(&json!({"amount": 5}));
        // It may have been told of the credit just before, where the chain was quicker than the answer.
        let _ = in_time("an end", call.header("x-payment", &payment.v2_header()).0.send()).await;
        assert!(!gateway.wait_for_exit().await.success(), "it has not died at {place}");
        gateway.reconfigure(|setup| setup.env.retain(|variable| *variable != crash));
        // Nobody sends it again: what is in the journal goes on by itself.
        eventually(&format!("killed at {place}, it is credited"), async || {
            let topups = topups(&gateway, &payer).await;
            let status = topups[0]["status"].as_str()?;
            ["credited", "finalized"].contains(&status).then_some(())
        })
        .await;
        let answer = send(&gateway, &payment).await.expect(200).json();
        assert_eq!(answer["balance_usdc"], FIVE_USD, "killed at {place}");
        assert_eq!(chain.usdc_of(payer.address()).await, 9 * FIVE_USD);
        assert_eq!(chain.sent_by(remote.account.address()).await, u64::try_from(number + 1).unwrap());
    }
    gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_around_the_call_it_credits_once_on_sqlite() {
    killed_around_the_call(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_around_the_call_it_credits_once_on_postgres() {
    let url = postgres::fresh_database().await;
    killed_around_the_call(Some(url.clone())).await;
    postgres::drop_database(&url).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payer_is_told_what_the_facilitator_says_and_not_to_sign_again() {
    let chain = std::sync::Arc::new(TestChain::start());
    let remote = Remote::with(&chain, &[("AUTH", AUTH)]).await;
    let metrics = format!("127.0.0.1:{}", free_port());
    let mut setup = setup(&chain, &remote.url, None);
    setup.env.push(("FAREBOX_FACILITATOR_AUTH".into(), AUTH.into()));
    setup.top = format!("metrics_listen = \"{metrics}\"");
    let gateway = Gateway::start_with(setup).await;
    eventually("it is ready", async || {
        let ready = gateway.get("/ready").send().await.expect(200).json();
        (ready["checks"]["facilitator"] == "ok" && ready["status"] == "ready").then_some(())
    })
    .await;

    remote.behave(json!({"as": "refusing", "reason": "insufficient_funds"})).await;
    let payer = TestWallet::random();
    chain.mint(payer.address(), 10 * FIVE_USD).await;
    let mut authorization = payer.authorization(gateway.setup.pay_to, FIVE_USD);
    authorization.valid_before = (unix_seconds() + 600).to_string();
    let payment = authorization.sign();
    let refused = send(&gateway, &payment).await.expect(402);
    let receipt = refused.decoded("payment-response");
    assert_eq!((&receipt["success"], &receipt["errorReason"]), (&json!(false), &json!("insufficient_funds")));
    assert_eq!(refused.decoded("x-payment-response")["network"], "base");
    assert_eq!(refused.header("payment-required"), None, "nothing to sign");
    assert_eq!(refused.header("retry-after"), Some("5"));
    let body = refused.json();
    assert!(body["error"].as_str().unwrap().starts_with("insufficient_funds: "), "{body}");
    assert!(body["accepts"].is_null(), "{body}");
    let again = send(&gateway, &payment).await.expect(402).json();
    assert_eq!(again["topup_id"], body["topup_id"]);
    let listed = topups(&gateway, &payer).await;
    assert_eq!((listed[0]["status"].as_str(), listed.as_array().unwrap().len()), (Some("pending"), 1));
    let shown = gateway.run_with(&["payments", "show", &body["topup_id"].to_string()]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("the facilitator refuses: insufficient_funds"));

    // Its time is over: it has failed, and another may be signed.
    chain.rpc("evm_increaseTime", json!([1200])).await;
    chain.mine(4).await;
    let failed = eventually("it has failed", async || {
        let answer = send(&gateway, &payment).await.expect(402);
        answer.json()["accepts"].is_array().then_some(answer)
    })
    .await;
    assert!(failed.json()["error"].as_str().unwrap().contains("expired"), "{failed:?}");
    assert_eq!(topups(&gateway, &payer).await[0]["status"], "failed");

    let text =
        http_client().get(format!("http://{metrics}/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(
        text.contains("farebox_facilitator_calls_total{endpoint=\"settle\",outcome=\"refused\"}"),
        "{text}"
    );
    assert!(text.contains("farebox_facilitator_seconds_count{endpoint=\"settle\"}"), "{text}");
    assert!(!gateway.logs().contains("of-the-facilitator"), "the secret is in the log");
    gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_whose_payment_is_refused_is_run_once_when_that_is_settled() {
    let chain = std::sync::Arc::new(TestChain::start());
    let remote = Remote::start(&chain).await;
    let upstream = ScriptedUpstream::start().await;
    let setup = Setup { upstream_url: upstream.base_url.clone(), ..setup(&chain, &remote.url, None) };
    let gateway = Gateway::start_with(setup).await;
    remote.behave(json!({"as": "refusing", "reason": "insufficient_funds"})).await;
    let payer = TestWallet::random();
    chain.mint(payer.address(), 10 * FIVE_USD).await;
    let payment = payer.authorization(gateway.setup.pay_to, FIVE_USD).sign().v1_header();
    let body = ask("A word, please.");
    let send = || gateway.post("/v1/chat/completions").json(&body).header("x-payment", &payment).send();

    let refused = send().await.expect(402);
    assert_eq!(refused.decoded("x-payment-response")["errorReason"], "insufficient_funds");
    assert_eq!((refused.header("payment-required"), refused.header("x-should-retry")), (None, Some("false")));
    assert!(refused.json()["accepts"].is_null(), "{refused:?}");
    assert!(upstream.received().is_empty(), "nothing is run for what is not paid");

    remote.behave(json!({"as": "healthy"})).await;
    let answer = eventually("it is settled, and run", async || {
        let answer = send().await;
        (answer.status == 200).then_some(answer)
    })
    .await;
    assert_eq!(answer.decoded("x-payment-response")["success"], true);
    assert_eq!(send().await.expect(200).json(), answer.json(), "the same answer again");
    assert_eq!(upstream.received().len(), 1);
    assert_eq!(chain.usdc_of(payer.address()).await, 9 * FIVE_USD);
    gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_facilitator_that_is_of_no_use_is_named_by_ready() {
    let chain = std::sync::Arc::new(TestChain::start());
    let other = ScriptedUpstream::start().await;
    let kind = json!({"x402Version": 2, "scheme": "exact", "network": "eip155:1"});
    other.play(Script::json(200, &json!({"kinds": [kind]})));
    let gateway = Gateway::start_with(setup(&chain, &other.base_url, None)).await;
    let ready = eventually("it is asked", async || {
        let ready = gateway.get("/ready").send().await.expect(200).json();
        ready["checks"]["facilitator"].as_str()?.contains("eip155:8453").then_some(ready)
    })
    .await;
    assert_eq!(ready["status"], "degraded");
    assert!(other.received()[0].head.starts_with("get /v1/supported "));
}
