//! Two gateways on one PostgreSQL database: the account is one, whichever of them is asked.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::gateway::{Answer, Customer, DEAR, Gateway, Setup, ask, micro};
use crate::support::postgres::fresh_database;
use crate::support::wallet::TestWallet;

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
