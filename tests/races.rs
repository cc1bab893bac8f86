//! Many at once: no balance goes below zero, nothing is paid or credited twice.

use std::collections::HashSet;

use serde_json::json;

use crate::support::eventually;
use crate::support::gateway::{Answer, Customer, DEAR, Gateway, Setup, ask, ask_stream, micro};
use crate::support::wallet::TestWallet;

/// As many as the requirement names.
const REQUESTS: usize = 300;

#[tokio::test]
async fn three_hundred_requests_share_a_balance_for_some() {
    three_hundred(Setup::usual()).await;
}

#[tokio::test]
async fn three_hundred_requests_share_a_balance_for_some_on_postgres() {
    let database_url = Some(crate::support::postgres::fresh_database().await);
    three_hundred(Setup { database_url, ..Setup::usual() }).await;
}

async fn three_hundred(setup: Setup) {
    let gateway = Gateway::start_with(setup).await;
    // A hold is about a dollar and the charge about a cent: most are refused, and each that ends
    // makes room for the next, so holds and settlements race all the way.
    let customer = gateway.customer("20").await;
    let start = gateway.balance(&customer.wallet).await.balance;
    let mut body = ask("Hello");
    body["model"] = DEAR.into();
    body["max_tokens"] = 800.into();
    let calls = (0..REQUESTS).map(|_| gateway.chat(&customer, &body));
    let answers = futures_util::future::join_all(calls).await;
    let (paid, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 200);
    assert!(!paid.is_empty() && !refused.is_empty(), "{} paid, {} refused", paid.len(), refused.len());
    for answer in refused {
        answer.error(402, "insufficient_balance");
        assert!(answer.header("payment-required").is_some());
    }
    let charges: u64 = paid.iter().map(|answer| answer.number("x-charged-usdc")).sum();
    let end = gateway.balance(&customer.wallet).await;
    assert_eq!((end.balance, end.locked), (start - charges, 0));
    // Each balance named in an answer is one that was: none twice, none below the last.
    let named: HashSet<_> = paid.iter().map(|answer| answer.number("x-balance-usdc")).collect();
    assert_eq!(named.len(), paid.len());
    assert_eq!(named.iter().min(), Some(&end.balance));
    gateway.audit();
}

#[tokio::test]
async fn a_balance_for_exactly_so_many_holds_serves_exactly_so_many_at_a_time() {
    let upstream = crate::support::upstream::ScriptedUpstream::start().await;
    let chain = crate::support::chain::TestChain::shared();
    let gateway = Gateway::start(&chain, &upstream.base_url).await;
    let answer = crate::support::upstream::completion(Some(crate::support::upstream::usage(20, 9)));
    let script = crate::support::upstream::Script::json(200, &answer);
    upstream.play(crate::support::upstream::Script::held_back(script));
    // One request tells how much is held for each like it.
    let mut body = ask("Hello");
    body["model"] = DEAR.into();
    body["max_tokens"] = 800.into();
    let probe = gateway.customer("1").await;
    upstream.open_gate();
    let id = gateway.chat(&probe, &body).await.expect(200).header("x-request-id").unwrap().to_owned();
    let hold = gateway.receipt(&probe, &id).await["hold_usdc"].as_u64().unwrap();

    let customer = gateway.customer("0").await;
    let usd = format!("{}.{:06}", hold * 10 / 1_000_000, hold * 10 % 1_000_000);
    gateway.top_up(&customer.wallet, &usd).await;
    // The upstream answers nobody until all have been held or refused.
    let gateway = std::sync::Arc::new(gateway);
    let calls: Vec<_> = (0..40)
        .map(|_| {
            let (gateway, customer, body) = (gateway.clone(), customer.clone(), body.clone());
            tokio::spawn(async move { gateway.chat(&customer, &body).await.status })
        })
        .collect();
    crate::support::eventually("ten are at the upstream", async || {
        (upstream.received().len() == 11).then_some(())
    })
    .await;
    crate::support::eventually("the others are refused", async || {
        (calls.iter().filter(|call| call.is_finished()).count() == 30).then_some(())
    })
    .await;
    let full = gateway.balance(&customer.wallet).await;
    assert_eq!((full.balance, full.locked), (hold * 10, hold * 10));
    for _ in 0..10 {
        upstream.open_gate();
    }
    let mut statuses = Vec::new();
    for call in calls {
        statuses.push(call.await.unwrap());
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [vec![200; 10], vec![402; 30]].concat());
    assert_eq!(upstream.received().len(), 11, "the upstream was asked for what was not held");
    assert_eq!(gateway.settled(&customer).await.locked, 0);
}

#[tokio::test]
async fn streams_and_answers_race_over_one_balance() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("5").await;
    let body = |streamed: bool| {
        let mut body = if streamed { ask_stream("Hello") } else { ask("Hello") };
        body["model"] = DEAR.into();
        body["max_tokens"] = 800.into();
        body
    };
    let calls = (0..60).map(|number| {
        let body = body(number % 2 == 0);
        let call = gateway.post("/v1/chat/completions").key(&customer.key).json(&body);
        call.send()
    });
    let answers = futures_util::future::join_all(calls).await;
    assert!(answers.iter().all(|answer| matches!(answer.status, 200 | 402)), "{answers:?}");
    let end = gateway.settled(&customer).await;
    assert_eq!(micro("5") - end.balance, charged_by_receipts(&gateway, &customer).await);
    gateway.audit();
}

async fn charged_by_receipts(gateway: &Gateway, customer: &Customer) -> u64 {
    let list = gateway.get("/v1/requests?limit=100").key(&customer.key).send().await.expect(200).json();
    list["data"].as_array().unwrap().iter().map(|row| row["charged_usdc"].as_u64().unwrap()).sum()
}

#[tokio::test]
async fn one_payment_sent_twenty_times_at_once_is_one_topup() {
    twenty_payments(Setup::usual()).await;
}

#[tokio::test]
async fn one_payment_sent_twenty_times_at_once_is_one_topup_on_postgres() {
    let database_url = Some(crate::support::postgres::fresh_database().await);
    twenty_payments(Setup { database_url, ..Setup::usual() }).await;
}

async fn twenty_payments(setup: Setup) {
    let gateway = Gateway::start_with(setup).await;
    let wallet = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro("100")).await;
    let payment = wallet.authorization(gateway.setup.pay_to, micro("5")).sign();
    let pay = |number: usize| {
        let header = if number.is_multiple_of(2) { payment.v1_header() } else { payment.v2_header() };
        gateway.post("/v1/topup").json(&json!({"amount": 5})).header("x-payment", &header).send()
    };
    let answers: Vec<Answer> = futures_util::future::join_all((0..20).map(pay)).await;
    let mut topups = HashSet::new();
    for answer in &answers {
        assert_eq!(answer.status, 200, "{answer:?}");
        topups.insert(answer.json()["topup_id"].as_i64().unwrap());
        assert_eq!(answer.json()["balance_usdc"], micro("5"));
    }
    assert_eq!(topups.len(), 1, "{topups:?}");
    assert_eq!(gateway.balance(&wallet).await.balance, micro("5"));
    assert_eq!(gateway.chain().usdc_of(gateway.setup.pay_to).await, micro("5"));
    gateway.audit();
}

#[tokio::test]
async fn twenty_payments_of_one_wallet_at_once_are_all_credited() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro("20")).await;
    let pay = async |_| {
        let payment = wallet.authorization(gateway.setup.pay_to, micro("1")).sign().v1_header();
        // Pending is not refused: the same payment is sent again, as clients are told to.
        eventually("the payment is credited", async || {
            let call = gateway.post("/v1/topup").json(&json!({"amount": 1})).header("x-payment", &payment);
            let answer = call.send().await;
            assert!(matches!(answer.status, 200 | 202), "{answer:?}");
            (answer.status == 200).then_some(())
        })
        .await;
    };
    futures_util::future::join_all((0..20).map(pay)).await;
    assert_eq!(gateway.balance(&wallet).await.balance, micro("20"));
    gateway.audit();
}
