//! Limits: how often, how much at once, from where; and that nothing is held or charged beyond them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use farebox::config::Config;
use serde_json::json;

use crate::support::chain::TestChain;
use crate::support::eventually;
use crate::support::gateway::{Answer, ApiKey, Customer, Gateway, Setup, ask, ask_stream, micro};
use crate::support::unix_seconds;
use crate::support::upstream::{Script, ScriptedUpstream, completion, usage};
use crate::support::wallet::TestWallet;

/// No limits but these, in front of an upstream that counts.
async fn start(rates: &str) -> (Gateway, ScriptedUpstream) {
    let none = [
        "requests_per_minute",
        "requests_per_day",
        "unauthenticated_per_minute",
        "failed_payments_per_minute",
    ];
    let others: Vec<_> =
        none.iter().filter(|name| !rates.contains(*name)).map(|name| format!("{name} = 0")).collect();
    let rates = format!("{rates}\n{}", others.join("\n"));
    let upstream = ScriptedUpstream::start().await;
    let setup = Setup { rates, ..Setup::new(&TestChain::shared(), &upstream.base_url) };
    (Gateway::start_with(setup).await, upstream)
}

/// A refusal of the given kind, with a time to come back.
#[track_caller]
fn assert_limited(answer: &Answer, code: &str) -> u64 {
    let error = answer.error(429, code);
    let retry_after = answer.number("retry-after");
    assert!((1..=86_400).contains(&retry_after), "{answer:?}");
    assert!(error["message"].as_str().unwrap().contains("again"), "{error}");
    assert_eq!(answer.header("x-charged-usdc"), None);
    retry_after
}

#[tokio::test]
async fn a_wallet_is_limited_and_told_where_it_stands() {
    let (gateway, upstream) = start("requests_per_minute = 4").await;
    let customer = gateway.customer("5").await;
    let other_key = gateway.key_for(&customer.wallet).await;
    let mut charged = 0;
    for remaining in [3, 2] {
        let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
        assert_eq!(answer.number("x-ratelimit-limit"), 4);
        assert_eq!(answer.number("x-ratelimit-remaining"), remaining);
        let resets_in = i64::try_from(answer.number("x-ratelimit-reset")).unwrap() - unix_seconds();
        assert!((50..=61).contains(&resets_in), "{answer:?}");
        charged += answer.number("x-charged-usdc");
    }
    // What is refused for another reason counts and says so too.
    let bad = gateway.chat(&customer, &json!({"messages": []})).await;
    bad.error(400, "missing_required_parameter");
    assert_eq!(bad.number("x-ratelimit-remaining"), 1);
    // All keys of a wallet count together, and streams like any other call.
    let other = Customer { key: other_key, ..customer.clone() };
    upstream.play(
        Script::stream()
            .event(&crate::support::upstream::chunk("Hi"))
            .event(&crate::support::upstream::last_chunk())
            .event(&crate::support::upstream::usage_chunk(usage(20, 9)))
            .done(),
    );
    let mut stream = gateway.stream(&other, &ask_stream("Hello")).await;
    assert_eq!(stream.headers["x-ratelimit-remaining"], "0");
    stream.rest().await;
    charged += gateway.receipt(&other, &stream.id).await["charged_usdc"].as_u64().unwrap();

    for (caller, body) in [(&customer, ask("Hello")), (&other, ask_stream("Hello")), (&other, json!({}))] {
        let refused = gateway.chat(caller, &body).await;
        let retry_after = assert_limited(&refused, "rate_limited");
        assert!(retry_after <= 60, "{refused:?}");
        assert_eq!((refused.number("x-ratelimit-limit"), refused.number("x-ratelimit-remaining")), (4, 0));
    }
    assert_eq!(upstream.received().len(), 3, "a limited request reached the upstream");
    assert_eq!(gateway.balance(&customer.wallet).await.balance, micro("5") - charged);
    let receipts = gateway.get("/v1/requests").key(&customer.key).send().await.expect(200).json();
    assert_eq!(receipts["data"].as_array().unwrap().len(), 3, "a limited request was held");
    // Others are not affected, and reading is not limited.
    let another = gateway.customer("5").await;
    upstream.play(Script::json(200, &completion(Some(usage(20, 9)))));
    gateway.chat(&another, &ask("Hello")).await.expect(200);
    gateway.audit();
}

#[tokio::test]
async fn a_key_and_a_day_have_limits_of_their_own() {
    let (gateway, _upstream) = start("requests_per_day = 4").await;
    let customer = gateway.customer("5").await;
    let mut body = gateway.sign_in(&customer.wallet).body();
    body["requests_per_minute"] = 2.into();
    let made = gateway.post("/v1/auth/keys").json(&body).send().await.expect(201).json();
    let key = ApiKey { id: made["id"].as_i64().unwrap(), secret: made["key"].as_str().unwrap().to_owned() };
    let agent = Customer { key, ..customer.clone() };
    for remaining in [1, 0] {
        let answer = gateway.chat(&agent, &ask("Hello")).await.expect(200);
        assert_eq!(
            (answer.number("x-ratelimit-limit"), answer.number("x-ratelimit-remaining")),
            (2, remaining)
        );
    }
    let refused = gateway.chat(&agent, &ask("Hello")).await;
    assert!(assert_limited(&refused, "rate_limited") <= 60);
    assert!(refused.text().contains("key"), "{refused:?}");
    // The owner's own key goes on, within the wallet's day.
    for remaining in [1, 0] {
        let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
        assert_eq!(
            (answer.number("x-ratelimit-limit"), answer.number("x-ratelimit-remaining")),
            (4, remaining)
        );
    }
    let refused = gateway.chat(&customer, &ask("Hello")).await;
    assert!(assert_limited(&refused, "rate_limited") > 86_000, "{refused:?}");
}

#[tokio::test]
async fn a_wallet_has_so_many_requests_under_way_and_no_more() {
    let (gateway, upstream) = start("concurrent_requests = 2").await;
    let customer = gateway.customer("5").await;
    upstream.play(Script::held_back(Script::json(200, &completion(Some(usage(20, 9))))));
    let gateway = Arc::new(gateway);
    let call = || {
        let (gateway, customer) = (gateway.clone(), customer.clone());
        tokio::spawn(async move { gateway.chat(&customer, &ask("Hello")).await })
    };
    let (first, second) = (call(), call());
    eventually("two are at the upstream", async || (upstream.received().len() == 2).then_some(())).await;
    assert_limited(&gateway.chat(&customer, &ask("Hello")).await, "too_many_concurrent_requests");
    // A client that goes away leaves its request running, and that keeps its place.
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    assert_limited(&gateway.chat(&customer, &ask("Hello")).await, "too_many_concurrent_requests");
    assert_eq!(upstream.received().len(), 2);
    upstream.open_gate();
    upstream.open_gate();
    second.await.unwrap().expect(200);
    gateway.settled(&customer).await;
    upstream.play(Script::json(200, &completion(Some(usage(20, 9)))));
    eventually("there is room again", async || {
        (gateway.chat(&customer, &ask("Hello")).await.status == 200).then_some(())
    })
    .await;
    gateway.audit();
}

#[tokio::test]
async fn nobody_known_is_limited_by_address_and_keys_are_not() {
    // A top-up and a sign-in make the customer; four more are let through.
    let (gateway, upstream) = start("unauthenticated_per_minute = 6").await;
    let customer = gateway.customer("5").await;
    let quote = gateway.post("/v1/topup").json(&json!({"amount": 5})).send().await.expect(402);
    assert_eq!((quote.number("x-ratelimit-limit"), quote.number("x-ratelimit-remaining")), (6, 3));
    let wrong = gateway.post("/v1/chat/completions").header("x-api-key", "sk-wrong").json(&ask("Hello"));
    wrong.send().await.error(401, "invalid_api_key");
    gateway.post("/v1/chat/completions").json(&ask("Hello")).send().await.expect(402);
    let signed = format!("/v1/auth/keys{}", gateway.sign_in(&customer.wallet).query());
    assert_eq!(gateway.get(&signed).send().await.expect(200).number("x-ratelimit-remaining"), 0);
    // Forged headers of proxies that nobody trusts change nothing, nor does a key where none counts.
    for address in ["9.9.9.1", "9.9.9.2"] {
        let quote = gateway.post("/v1/topup").json(&json!({"amount": 5})).header("x-forwarded-for", address);
        assert_limited(&quote.send().await, "rate_limited");
        let quote = gateway.post("/v1/topup").json(&json!({"amount": 5})).key(&customer.key);
        assert_limited(&quote.send().await, "rate_limited");
        let wrong = gateway.post("/v1/chat/completions").header("x-api-key", "sk-wrong").json(&ask("Hello"));
        assert_limited(&wrong.header("x-forwarded-for", address).send().await, "rate_limited");
        assert_limited(&gateway.get(&signed).send().await, "rate_limited");
    }
    // Who has a key, and what is for anybody, is not affected.
    gateway.chat(&customer, &ask("Hello")).await.expect(200);
    gateway.get("/v1/requests").key(&customer.key).send().await.expect(200);
    for path in ["/health", "/ready", "/v1/status", "/v1/models"] {
        assert_eq!(gateway.get(path).send().await.expect(200).header("x-ratelimit-limit"), None);
    }
    assert_eq!(upstream.received().len(), 1);
}

#[tokio::test]
async fn a_trusted_proxy_is_believed_as_far_as_it_can_know() {
    let rates = "unauthenticated_per_minute = 2\ntrusted_proxies = [\"127.0.0.1\", \"10.0.0.0/8\"]";
    let (gateway, _upstream) = start(rates).await;
    let quote = async |forwarded: &str| {
        let call = gateway.post("/v1/topup").json(&json!({"amount": 5}));
        call.header("x-forwarded-for", forwarded).send().await
    };
    // Each client has its own count; what it forges stands left of what the proxy adds.
    for (number, client) in ["9.9.9.1", "9.9.9.2", "2001:db8::1"].into_iter().enumerate() {
        for try_number in 0..2 {
            quote(&format!("8.8.{number}.{try_number}, {client}, 10.1.2.3")).await.expect(402);
        }
        assert_limited(&quote(&format!("8.8.{number}.9, {client}")).await, "rate_limited");
    }
    // A network of one client is one client.
    assert_limited(&quote("2001:db8::2").await, "rate_limited");
    // What the proxies themselves send is theirs.
    gateway.post("/v1/topup").json(&json!({"amount": 5})).send().await.expect(402);
}

#[tokio::test]
async fn refused_payments_are_bounded_before_the_chain_is_asked() {
    let rates = "failed_payments_per_minute = 3\ntrusted_proxies = [\"127.0.0.1\"]";
    let (gateway, _upstream) = start(rates).await;
    let (poor, rich) = (TestWallet::random(), TestWallet::random());
    gateway.chain().mint(rich.address(), micro("5")).await;
    let pay = async |payer: &TestWallet, address: &str| {
        let payment = payer.authorization(gateway.setup.pay_to, micro("5")).sign();
        let call = gateway.post("/v1/topup").json(&json!({"amount": 5})).header("x-forwarded-for", address);
        call.header("x-payment", &payment.v2_header()).send().await
    };
    for _ in 0..3 {
        let refused = pay(&poor, "9.9.9.1").await.expect(402);
        assert!(refused.text().contains("insufficient_balance"), "{refused:?}");
    }
    // The address is done for now, whoever it says pays, and nothing of a good payment is taken.
    let refused = pay(&poor, "9.9.9.1").await;
    assert!(assert_limited(&refused, "too_many_failed_attempts") <= 60);
    assert_limited(&pay(&rich, "9.9.9.1").await, "too_many_failed_attempts");
    assert_eq!(gateway.chain().usdc_of(rich.address()).await, micro("5"));
    // The payer gets one more from each other address, and others pay as ever.
    pay(&poor, "9.9.9.2").await.expect(402);
    assert_limited(&pay(&poor, "9.9.9.2").await, "too_many_failed_attempts");
    pay(&rich, "9.9.9.2").await.expect(200);
}

#[test]
fn limits_have_defaults_and_name_what_is_wrong_with_them() {
    let setup =
        Setup { rates: String::new(), ..Setup::without_chain("http://127.0.0.1:1", "http://127.0.0.1:1/v1") };
    let env = HashMap::from([
        ("FAREBOX_RELAYER_KEY".to_owned(), setup.relayer.private_key()),
        ("UPSTREAM_KEY".to_owned(), "sk-test".to_owned()),
    ]);
    let parse =
        |setup: &Setup, env| Config::parse(&setup.toml("127.0.0.1:8080", Path::new("/tmp")), "toml", env);
    let rates = parse(&setup, &env).unwrap().limits.rates;
    assert_eq!((rates.requests_per_minute, rates.requests_per_day), (60, 10_000));
    assert!(rates.concurrent_requests > 0 && rates.unauthenticated_per_minute > 0);
    let wrong = Setup { rates: "trusted_proxies = [\"10.0.0.0/33\"]".into(), ..setup.clone() };
    let error = parse(&wrong, &env).unwrap_err().to_string();
    assert!(error.contains("limits.trusted_proxies") && error.contains("10.0.0.0/33"), "{error}");
    let mut overridden = env.clone();
    overridden.insert("FAREBOX_TRUSTED_PROXIES".into(), "::1, 192.168.0.0/16".into());
    assert_eq!(parse(&setup, &overridden).unwrap().limits.trusted_proxies.len(), 2);
}
