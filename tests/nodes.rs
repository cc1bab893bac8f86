//! Two gateways on one PostgreSQL database: the account is one, whichever of them is asked.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use farebox::db::{Access, Db};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use serde_json::{Value, json};

use crate::support::chain::TestChain;
use crate::support::gateway::{Answer, Call, Customer, DEAR, Gateway, Setup, ask, micro};
use crate::support::postgres::{Postgres, fresh_database};
use crate::support::upstream::{Script, ScriptedUpstream, completion, usage};
use crate::support::wallet::TestWallet;
use crate::support::{PATIENCE, eventually};

async fn two_nodes() -> (Gateway, Gateway) {
    let setup = Setup { database_url: Some(fresh_database().await), ..Setup::usual() };
    let first = Gateway::start_with(setup.clone()).await;
    (first, Gateway::start_with(setup).await)
}

fn dear(max_tokens: u64) -> Value {
    let mut body = ask("Hello");
    body["model"] = DEAR.into();
    body["max_tokens"] = max_tokens.into();
    body
}

#[tokio::test]
async fn a_key_made_at_one_node_is_good_at_the_other_until_it_is_revoked() {
    let (one, other) = two_nodes().await;
    let customer = one.customer("1").await;
    other.chat(&customer, &ask("Hello")).await.expect(200);
    assert_eq!(one.balance(&customer.wallet).await, other.balance(&customer.wallet).await);
    let path = format!("/v1/auth/keys/{}", customer.key.id);
    one.delete(&path).json(&one.sign_in(&customer.wallet).body()).send().await.expect(200);
    one.chat(&customer, &ask("Hello")).await.error(401, "invalid_api_key");
    let deadline = Instant::now() + Duration::from_secs(1);
    while other.get("/v1/requests").key(&customer.key).send().await.status != 401 {
        assert!(Instant::now() < deadline, "a revoked key is good elsewhere after a second");
    }
}

#[tokio::test]
async fn a_nonce_used_at_one_node_is_used_at_the_other() {
    let setup = Setup { database_url: Some(fresh_database().await), ..Setup::usual() };
    let one = Gateway::start_with(setup.clone()).await;
    let same_domain = Setup { top: format!("{}\n", setup.top), ..setup };
    let env = vec![("FAREBOX_SIWE_DOMAINS".to_owned(), one.host.clone())];
    let other = Gateway::start_with(Setup { env, ..same_domain }).await;
    let signed = one.sign_in(&TestWallet::random()).body();
    one.post("/v1/auth/keys").json(&signed).send().await.expect(201);
    other.post("/v1/auth/keys").json(&signed).send().await.error(401, "siwe_nonce_used");
}

#[tokio::test]
async fn two_nodes_cannot_spend_the_same_cent() {
    let (one, other) = two_nodes().await;
    let customer = one.customer("10").await;
    let body = dear(800);
    let calls = (0..120).map(|number| {
        let node = if number % 2 == 0 { &one } else { &other };
        node.chat(&customer, &body)
    });
    let answers = futures_util::future::join_all(calls).await;
    assert!(answers.iter().all(|answer| matches!(answer.status, 200 | 402)), "{answers:?}");
    let charges: u64 = answers
        .iter()
        .filter(|answer| answer.status == 200)
        .map(|answer| answer.number("x-charged-usdc"))
        .sum();
    let end = one.balance(&customer.wallet).await;
    assert_eq!((end.balance, end.locked), (micro("10") - charges, 0));
    one.audit();
}

#[tokio::test]
async fn a_payment_sent_to_both_nodes_at_once_is_one_topup() {
    let (one, other) = two_nodes().await;
    let wallet = TestWallet::random();
    one.chain().mint(wallet.address(), micro("20")).await;
    let payment = wallet.authorization(one.setup.pay_to, micro("5")).sign().v2_header();
    let calls = (0..10).map(|number| {
        let node = if number % 2 == 0 { &one } else { &other };
        node.post("/v1/topup").json(&json!({"amount": 5})).header("x-payment", &payment).send()
    });
    let answers: Vec<Answer> = futures_util::future::join_all(calls).await;
    let topups: HashSet<_> =
        answers.into_iter().map(|answer| answer.expect(200).json()["topup_id"].as_i64().unwrap()).collect();
    assert_eq!(topups.len(), 1);
    assert_eq!(other.balance(&wallet).await.balance, micro("5"));
    assert_eq!(one.chain().usdc_of(one.setup.pay_to).await, micro("5"));
    one.audit();
}

#[tokio::test]
async fn a_hundred_times_one_payment_at_two_nodes_is_one_transfer() {
    a_hundred_times_one_payment(Some(fresh_database().await), 2).await;
}

#[tokio::test]
async fn a_hundred_times_one_payment_at_one_node_is_one_transfer() {
    a_hundred_times_one_payment(None, 1).await;
}

/// No block is made until the transfer is on its way, so that the hundred overlap.
async fn a_hundred_times_one_payment(database_url: Option<String>, nodes: usize) {
    let chain = Arc::new(TestChain::start());
    let setup = Setup { database_url, ..Setup::new(&chain, "http://127.0.0.1:9/v1") };
    let mut gateways = Vec::new();
    for _ in 0..nodes {
        gateways.push(Gateway::start_with(setup.clone()).await);
    }
    let wallet = TestWallet::random();
    chain.mint(wallet.address(), micro("5")).await;
    let payment = wallet.authorization(setup.pay_to, micro("5")).sign().v2_header();
    let send = async |number: usize| {
        let call = gateways[number % nodes].post("/v1/topup").json(&json!({"amount": 5}));
        call.header("x-payment", &payment).send().await
    };
    chain.set_automine(false).await;
    let (answers, ()) = tokio::join!(futures_util::future::join_all((0..100).map(&send)), async {
        chain.transaction_in_the_pool().await;
        chain.mine(1).await;
        chain.set_automine(true).await;
    });

    let mut bodies = HashSet::new();
    for (number, mut answer) in answers.into_iter().enumerate() {
        let deadline = Instant::now() + PATIENCE;
        while answer.status == 202 {
            assert_eq!(answer.json()["status"], "pending", "{answer:?}");
            assert!(Instant::now() < deadline, "a payment stays pending: {answer:?}");
            answer = send(number).await;
        }
        let answer = answer.expect(200);
        let receipt = answer.decoded("payment-response");
        assert_eq!((&receipt["success"], &receipt["payer"]), (&json!(true), &json!(wallet.shown())));
        assert_eq!(receipt["transaction"], answer.json()["tx_hash"]);
        bodies.insert(answer.text());
    }
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    assert_eq!(chain.sent_by(setup.relayer.address()).await, 1, "transactions of the relayer");
    assert_eq!(chain.usdc_of(setup.pay_to).await, micro("5"));
    for gateway in &gateways {
        assert_eq!(gateway.balance(&wallet).await.balance, micro("5"));
    }
    gateways[0].audit();
}

#[tokio::test]
async fn a_living_node_keeps_the_holds_of_its_streams_while_another_starts() {
    let upstream = crate::support::upstream::ScriptedUpstream::start().await;
    let chain = crate::support::chain::TestChain::shared();
    let setup =
        Setup { database_url: Some(fresh_database().await), ..Setup::new(&chain, &upstream.base_url) };
    let one = Gateway::start_with(setup.clone()).await;
    let customer: Customer = one.customer("1").await;
    let first = crate::support::upstream::chunk("A wallet");
    let usage = crate::support::upstream::usage_chunk(crate::support::upstream::usage(20, 9));
    upstream.play(crate::support::upstream::Script::stream().event(&first).gate().event(&usage).done());
    let mut stream = one.stream(&customer, &crate::support::gateway::ask_stream("Hello")).await;
    stream.next().await.unwrap();
    let other = Gateway::start_with(setup).await;
    assert!(other.balance(&customer.wallet).await.locked > 0, "a living node's hold was ended");
    upstream.open_gate();
    assert_eq!(stream.rest().await, ["[DONE]"]);
    assert_eq!(other.receipt(&customer, &stream.id).await["charged_usdc"], 11);
}

#[tokio::test]
async fn a_gateway_that_lost_its_database_says_so() {
    let url = fresh_database().await;
    let setup = Setup { database_url: Some(url.clone()), ..Setup::usual() };
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("1").await;
    crate::support::postgres::drop_database(&url).await;
    let ready = gateway.get("/ready").send().await.expect(503).json();
    assert_eq!(ready["status"], "degraded");
    assert_ne!(ready["checks"]["database"], "ok");
    gateway.get("/health").send().await.expect(200);
    for answer in [
        gateway.chat(&customer, &ask("Hello")).await,
        gateway.get("/v1/requests").key(&customer.key).send().await,
        gateway.post("/v1/auth/keys").json(&gateway.sign_in(&customer.wallet).body()).send().await,
    ] {
        let text = answer.text();
        assert_eq!(answer.status, 503, "{answer:?}");
        answer.error(503, "unavailable");
        assert!(answer.header("retry-after").is_some(), "{answer:?}");
        for internal in ["postgres", "sql", "connection", "database"] {
            assert!(
                !text.to_lowercase().contains(internal),
                "{internal} is none of the client's business: {text}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_outlives_its_database() {
    let mut server = Postgres::durable().await;
    let upstream = ScriptedUpstream::start().await;
    let chain = TestChain::shared();
    let database_url = Some(server.fresh_database().await);
    let mut gateway =
        Gateway::start_with(Setup { database_url, ..Setup::new(&chain, &upstream.base_url) }).await;
    let customer = gateway.customer("1").await;
    let payer = TestWallet::random();
    chain.mint(payer.address(), micro("2")).await;
    let payment = payer.authorization(gateway.setup.pay_to, micro("2")).sign().v2_header();
    let pay = || gateway.post("/v1/topup").json(&json!({"amount": 2})).header("x-payment", &payment).send();
    let answer = Script::json(200, &completion(Some(usage(20, 9))));
    let hello = ask("Hello");

    // One request is at its provider when the database goes, and has its answer before it is back.
    upstream.play(Script::held_back(answer.clone()));
    let (under_way, ()) = tokio::join!(gateway.chat(&customer, &hello), async {
        eventually("the request has reached its provider", async || {
            (!upstream.received().is_empty()).then_some(())
        })
        .await;
        server.kill_9();
        upstream.open_gate();
        let (chat, requests, key, payment, ready) = tokio::join!(
            gateway.chat(&customer, &hello),
            gateway.get("/v1/requests").key(&customer.key).send(),
            gateway.post("/v1/auth/keys").json(&gateway.sign_in(&payer).body()).send(),
            pay(),
            gateway.get("/ready").send(),
        );
        for answer in [chat, requests, key] {
            answer.error(503, "unavailable");
        }
        payment.error(503, "payments_unavailable");
        ready.expect(503);
        let asked = Instant::now();
        gateway.get("/health").send().await.expect(200);
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        server.restart().await;
    });
    let under_way = under_way.expect(200);
    assert_eq!(under_way.number("x-charged-usdc"), 11);

    // With nobody's help it is as it was.
    eventually("it is ready again", async || {
        (gateway.get("/ready").send().await.status == 200).then_some(())
    })
    .await;
    assert_eq!(gateway.settled(&customer).await.balance, micro("1") - 11);
    upstream.play(answer);
    gateway.chat(&customer, &hello).await.expect(200);
    assert_eq!(pay().await.expect(200).json()["credited_usdc"], micro("2"));
    assert_eq!(gateway.balance(&payer).await.balance, micro("2"));
    gateway.audit();
    assert!(!gateway.has_ended());
}

#[tokio::test]
async fn a_limit_holds_for_all_nodes_together() {
    const LIMIT: usize = 300;
    let rates = format!(
        "requests_per_minute = 0\nrequests_per_day = 0\nunauthenticated_per_minute = {LIMIT}\n\
         failed_payments_per_minute = 0"
    );
    let setup = Setup { rates, database_url: Some(fresh_database().await), ..Setup::usual() };
    let one = Gateway::start_with(setup.clone()).await;
    let other = Gateway::start_with(setup).await;
    let call =
        async |node: &Gateway| node.post("/v1/chat/completions").json(&ask("Hello")).send().await.status;
    for _ in 0..LIMIT {
        assert_eq!(call(&one).await, 402);
    }
    assert_eq!(call(&one).await, 429);
    // The other has let nothing through so far, and would let through as many by itself.
    let let_through = AtomicUsize::new(0);
    eventually("the other node has heard of it", async || match call(&other).await {
        429 => Some(()),
        status => {
            assert_eq!(status, 402);
            let_through.fetch_add(1, Ordering::Relaxed);
            None
        }
    })
    .await;
    assert!(let_through.load(Ordering::Relaxed) < LIMIT, "{let_through:?}");
    let told = "SELECT CAST(COUNT(DISTINCT node) AS BIGINT) AS n FROM limit_rounds";
    eventually("both have told", async || {
        let db = Db::open(one.setup.database_url.as_ref().unwrap(), Access::Inspect).await.unwrap();
        (db.row(told, vec![]).await.unwrap().unwrap().int("n").unwrap() == 2).then_some(())
    })
    .await;
}

/// A call to a node that may die meanwhile: what was charged, if an answer came back.
async fn charged_if_answered(call: Call) -> Option<u64> {
    let response = call.0.send().await.ok()?;
    let charged = response.headers().get("x-charged-usdc")?.to_str().ok()?.parse().ok()?;
    response.bytes().await.ok()?;
    Some(charged)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_that_die_under_load_overspend_nothing_and_book_what_they_answered() {
    let setup = Setup { database_url: Some(fresh_database().await), ..Setup::usual() };
    // Side by side, so that they migrate the database at the same time.
    let started = (0..3).map(|_| Gateway::start_with(setup.clone()));
    let mut nodes = futures_util::future::join_all(started).await;
    let customer = nodes[0].customer("40").await;
    let mut answered = 0;
    for round in 0..4 {
        let calls = (0..60).map(|number: usize| {
            let node = &nodes[number % 3];
            let call = node.post("/v1/chat/completions").key(&customer.key).json(&dear(800));
            tokio::spawn(charged_if_answered(call))
        });
        let mut calls: FuturesUnordered<_> = calls.collect();
        // It dies in the middle of its work, as the first answers come.
        for _ in 0..6 {
            answered += calls.next().await.unwrap().unwrap().unwrap_or(0);
        }
        nodes[round % 3].kill_9();
        while let Some(charged) = calls.next().await {
            answered += charged.unwrap().unwrap_or(0);
        }
        nodes[round % 3].restart();
    }
    assert!(answered > 0);
    let path =
        format!("/v1/usage/{}{}", customer.wallet.address(), nodes[0].sign_in(&customer.wallet).query());
    let usage = nodes[0].get(&path).send().await.expect(200).json();
    let booked = usage["keys"][0]["total_charged_usdc"].as_u64().unwrap();
    let balance = usage["balance_usdc"].as_u64().unwrap();
    assert_eq!(balance + booked, micro("40"));
    assert!(booked >= answered, "{answered} were answered and {booked} booked");
    // What the dead have left is locked until their leases are over, and no more than that.
    nodes[0].audit();
}
