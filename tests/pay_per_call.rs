//! Requests paid for by themselves: a signed header buys one answer, and what it leaves is its payer's.

use std::sync::Arc;

use farebox::payments::wire::Payload;
use serde_json::{Value, json};

use crate::support::chain::{BYSTANDER, TestChain, USDC};
use crate::support::eventually;
use crate::support::gateway::{Answer, Call, DEAR, Gateway, Setup, ask, ask_stream, micro};
use crate::support::postgres::fresh_database;
use crate::support::upstream::{Script, ScriptedUpstream, completion, usage};
use crate::support::wallet::{SignedPayment, TestWallet};

const CHAT: &str = "/v1/chat/completions";
/// The least that is asked for at once.
const CENT: u64 = 10_000;

/// A wallet that is not known here, with a dollar on the chain.
async fn stranger(gateway: &Gateway) -> TestWallet {
    let wallet = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro("1")).await;
    wallet
}

fn payment(gateway: &Gateway, wallet: &TestWallet, micro: u64) -> SignedPayment {
    wallet.authorization(gateway.setup.pay_to, micro).sign()
}

fn paid(gateway: &Gateway, payment: &SignedPayment, body: &Value) -> Call {
    gateway.post(CHAT).header("payment-signature", &payment.v2_header()).json(body)
}

fn charged(answer: &Answer) -> u64 {
    answer.number("x-charged-usdc")
}

/// On both databases, with a treasury and a relayer of the test's own.
async fn on_both(test: impl AsyncFn(&Gateway)) {
    for database_url in [None, Some(fresh_database().await)] {
        println!("on {database_url:?}");
        let gateway = Gateway::start_with(Setup { database_url, ..Setup::usual() }).await;
        test(&gateway).await;
        gateway.audit();
    }
}

#[tokio::test]
async fn without_a_credential_both_versions_are_told_what_it_costs() {
    let gateway = Gateway::usual().await;
    for call in [gateway.post(CHAT), gateway.post(CHAT).header("authorization", "Bearer x402")] {
        let answer = call.json(&ask("Hello")).send().await.expect(402);
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        let v2 = answer.decoded("payment-required");
        assert_eq!(v2["x402Version"], 2);
        assert_eq!(v2["resource"]["url"], gateway.url(CHAT));
        assert_eq!(v2["accepts"][0]["amount"], CENT.to_string());
        assert_eq!(v2["accepts"][0]["network"], "eip155:8453");
        let v1 = answer.json();
        assert_eq!((&v1["x402Version"], &v1["error"]), (&json!(1), &json!("payment required")));
        let terms = v1["accepts"].as_array().unwrap();
        assert_eq!(terms.len(), 1);
        assert_eq!((&terms[0]["network"], &terms[0]["maxAmountRequired"]), (&json!("base"), &json!("10000")));
        assert_eq!(terms[0]["resource"], gateway.url(CHAT));
    }
    // A dear request costs what it may cost at most, to the micro-USDC.
    let mut dear = ask("Hello");
    dear["model"] = DEAR.into();
    let asked = gateway.post(CHAT).json(&dear).send().await.expect(402).decoded("payment-required");
    let asked: u64 = asked["accepts"][0]["amount"].as_str().unwrap().parse().unwrap();
    let customer = gateway.customer("5").await;
    let answer = gateway.chat(&customer, &dear).await.expect(200);
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    assert_eq!(receipt["hold_usdc"], asked);
    // What is wrong is wrong before anybody pays; a wrong key is no missing one.
    let mut unknown = ask("Hello");
    unknown["model"] = "no/model".into();
    gateway.post(CHAT).json(&unknown).send().await.expect(404);
    let wrong = gateway.post(CHAT).header("authorization", "Bearer sk-wrong").json(&ask("Hello"));
    wrong.send().await.error(401, "invalid_api_key");
}

#[tokio::test]
async fn a_payment_buys_one_answer_and_what_it_leaves_is_the_payers() {
    on_both(async |gateway| {
        let wallet = stranger(gateway).await;
        let payment = payment(gateway, &wallet, CENT);
        let body = ask("Hello");
        // A key beside it is ignored: also one that is wrong.
        let call = paid(gateway, &payment, &body).header("authorization", "Bearer sk-wrong");
        let answer = call.send().await.expect(200);
        let cost = charged(&answer);
        assert!(cost > 0 && cost < CENT);
        assert_eq!(answer.number("x-balance-usdc"), CENT - cost);
        assert_eq!(answer.json()["usage"]["charged_usdc"], cost);
        for (name, network) in [("payment-response", "eip155:8453"), ("x-payment-response", "base")] {
            let receipt = answer.decoded(name);
            assert_eq!((&receipt["success"], &receipt["network"]), (&json!(true), &json!(network)));
            assert_eq!(receipt["payer"], wallet.shown());
        }
        assert_eq!(gateway.chain().usdc_of(wallet.address()).await, micro("1") - CENT);
        assert_eq!(gateway.balance(&wallet).await.balance, CENT - cost);

        // The same again is the same answer, and costs nothing more.
        let again = paid(gateway, &payment, &body).send().await.expect(200);
        assert_eq!(again.header("idempotent-replayed"), Some("true"));
        assert_eq!((again.json(), charged(&again)), (answer.json(), cost));
        assert_eq!(again.decoded("payment-response"), answer.decoded("payment-response"));
        // With anything else it is good for nothing, and a leaked header cannot spend the rest.
        let other = paid(gateway, &payment, &ask("Hello again")).send().await;
        other.error(402, "payment_already_used");
        // As a top-up it is what it was.
        let topup = gateway.post("/v1/topup").header("x-payment", &payment.v1_header());
        let topup = topup.send().await.expect(200);
        assert_eq!(topup.json()["credited_usdc"], CENT);
        // Anybody can send what they have read off the chain, and learns nothing of what its payer has now; nor is it
        // said that anything else was served for it.
        assert_eq!(topup.json()["balance_usdc"], CENT);
        assert!(topup.decoded("payment-response").get("extensions").is_none(), "{topup:?}");
        assert_eq!(gateway.balance(&wallet).await.balance, CENT - cost);

        // And what was a top-up buys no request by itself.
        let topup = self::payment(gateway, &wallet, micro("0.5"));
        gateway.chain().mint(wallet.address(), micro("1")).await;
        let topup_of_one = wallet.authorization(gateway.setup.pay_to, micro("1")).sign();
        let call = gateway.post("/v1/topup").json(&json!({"amount": 1}));
        call.header("x-payment", &topup_of_one.v1_header()).send().await.expect(200);
        paid(gateway, &topup_of_one, &body).send().await.error(402, "payment_already_used");
        // One below the least for a top-up is good for a request.
        paid(gateway, &topup, &body).send().await.expect(200);
    })
    .await;
}

#[tokio::test]
async fn a_stream_is_paid_for_before_its_first_byte_and_replayed_as_a_stream() {
    on_both(async |gateway| {
        let wallet = stranger(gateway).await;
        let payment = payment(gateway, &wallet, CENT);
        let body = ask_stream("Hello");
        let answer = paid(gateway, &payment, &body).send().await.expect(200);
        assert!(answer.header("content-type").unwrap().starts_with("text/event-stream"));
        assert_eq!(answer.decoded("payment-response")["success"], true);
        assert!(answer.text().ends_with("data: [DONE]\n\n"), "{answer:?}");
        let left = gateway.balance(&wallet).await.balance;
        assert!(left < CENT);
        let again = paid(gateway, &payment, &body).send().await.expect(200);
        assert_eq!(
            (again.text(), again.header("content-type")),
            (answer.text(), answer.header("content-type"))
        );
        assert_eq!(again.header("idempotent-replayed"), Some("true"));
        assert_eq!(gateway.balance(&wallet).await.balance, left);
    })
    .await;
}

#[tokio::test]
async fn too_little_is_not_taken_and_what_is_there_counts() {
    let gateway = Gateway::usual().await;
    let wallet = stranger(&gateway).await;
    let mut dear = ask("Hello");
    dear["model"] = DEAR.into();
    let asked = |answer: &Answer| -> u64 {
        answer.decoded("payment-required")["accepts"][0]["amount"].as_str().unwrap().parse().unwrap()
    };
    let price = asked(&gateway.post(CHAT).json(&dear).send().await.expect(402));
    let refused = |answer: Answer| {
        let code = "invalid_exact_evm_payload_authorization_value_mismatch";
        assert_eq!(answer.decoded("payment-required")["error"], code);
        assert!(answer.json()["error"].as_str().unwrap().starts_with(code));
        answer
    };
    let short = paid(&gateway, &payment(&gateway, &wallet, price - 1), &dear).send().await.expect(402);
    assert_eq!(asked(&refused(short)), price);
    let tiny = paid(&gateway, &payment(&gateway, &wallet, CENT - 1), &ask("Hello")).send().await.expect(402);
    assert_eq!(asked(&refused(tiny)), CENT);
    // Of another's balance nobody learns anything.
    let mut forged = wallet.authorization(gateway.setup.pay_to, CENT);
    forged.from = gateway.customer("5").await.wallet.address();
    let answer = paid(&gateway, &forged.sign(), &dear).send().await.expect(402);
    assert_eq!(answer.decoded("payment-required")["error"], "invalid_exact_evm_signature");
    assert_eq!(asked(&answer), price);
    assert_eq!(gateway.chain().usdc_of(wallet.address()).await, micro("1"), "nothing was taken");

    // With a balance, only the rest is asked for; together they cover it.
    let first = payment(&gateway, &wallet, CENT + 5_000);
    let cost = charged(&paid(&gateway, &first, &ask("Hello")).send().await.expect(200));
    let missing = price - (CENT + 5_000 - cost);
    let short = paid(&gateway, &payment(&gateway, &wallet, missing - 1), &dear).send().await.expect(402);
    assert_eq!(asked(&refused(short)), missing);
    paid(&gateway, &payment(&gateway, &wallet, missing), &dear).send().await.expect(200);
    gateway.audit();
}

#[tokio::test]
async fn a_settlement_that_takes_its_time_is_pending_without_terms() {
    let chain = Arc::new(TestChain::start());
    let upstream = ScriptedUpstream::start().await;
    let gateway = Gateway::start(&chain, &upstream.base_url).await;
    let wallet = stranger(&gateway).await;
    let payment = payment(&gateway, &wallet, CENT);
    chain.set_automine(false).await;
    let pending = paid(&gateway, &payment, &ask("Hello")).send().await.expect(402);
    assert_eq!(pending.header("payment-required"), None, "nobody shall sign again");
    assert_eq!(pending.header("x-should-retry"), Some("false"));
    assert!(pending.json()["error"].as_str().unwrap().starts_with("settlement_pending"));
    assert_eq!(pending.json()["accepts"], Value::Null);
    let receipt = pending.decoded("payment-response");
    assert_eq!((&receipt["success"], &receipt["errorReason"]), (&json!(false), &json!("settlement_pending")));
    assert!(upstream.received().is_empty());
    chain.set_automine(true).await;
    chain.mine(1).await;
    upstream.play(Script::json(200, &completion(Some(usage(20, 9)))));
    let answer = paid(&gateway, &payment, &ask("Hello")).send().await.expect(200);
    assert_eq!(charged(&answer), 11);
    assert_eq!(chain.usdc_of(wallet.address()).await, micro("1") - CENT);
    gateway.audit();
}

#[tokio::test]
async fn a_request_that_came_to_nothing_can_be_sent_again_with_its_payment() {
    let upstream = ScriptedUpstream::start().await;
    let gateway = Gateway::start(&TestChain::shared(), &upstream.base_url).await;
    let wallet = stranger(&gateway).await;
    let payment = payment(&gateway, &wallet, CENT);
    upstream.play(Script::json(500, &json!({"error": {"message": "no"}})));
    paid(&gateway, &payment, &ask("Hello")).send().await.expect(502);
    assert_eq!(gateway.balance(&wallet).await.balance, CENT, "paid, and nothing was charged");
    upstream.play(Script::json(200, &completion(Some(usage(20, 9)))));
    let answer = paid(&gateway, &payment, &ask("Hello")).send().await.expect(200);
    assert_eq!((charged(&answer), answer.number("x-balance-usdc")), (11, CENT - 11));
    assert_eq!(answer.header("idempotent-replayed"), None);
    assert_eq!(upstream.received().len(), 2);
    let again = paid(&gateway, &payment, &ask("Hello")).send().await.expect(200);
    assert_eq!((again.text(), upstream.received().len()), (answer.text(), 2));
    gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_payment_on_many_requests_at_once_buys_one() {
    on_both(async |gateway| {
        let wallet = stranger(gateway).await;
        let payment = payment(gateway, &wallet, CENT);
        let asks: Vec<_> = (0..10).map(|number| ask(&format!("Hello {}", number % 2))).collect();
        let answers =
            futures_util::future::join_all(asks.iter().map(|body| paid(gateway, &payment, body).send()))
                .await;
        let (mut bought, mut used) = (Vec::new(), 0);
        for (number, answer) in answers.into_iter().enumerate() {
            match answer.status {
                200 => bought.push(number % 2),
                409 => drop(answer.error(409, "request_in_progress")),
                _ => {
                    answer.error(402, "payment_already_used");
                    used += 1;
                }
            }
        }
        assert_eq!(used, 5, "one of the two requests was first, and every other is refused");
        assert!(bought.iter().all(|which| *which == bought[0]) && !bought.is_empty(), "{bought:?}");
        let usage = gateway.usage_without_key(&wallet).await;
        assert_eq!((usage["request_count"].as_u64(), usage["total_charged_usdc"].as_u64().unwrap()), {
            let left = gateway.balance(&wallet).await.balance;
            (Some(1), CENT - left)
        });
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_idempotency_key_sent_many_times_at_once_is_run_and_charged_once() {
    on_both(async |gateway| {
        let customer = gateway.customer("1").await;
        for body in [ask("Hello"), ask_stream("Hello")] {
            let before = gateway.settled(&customer).await.balance;
            let key = format!("order-{}", body["stream"]);
            let send = || {
                let call = gateway.post(CHAT).key(&customer.key).header("idempotency-key", &key);
                call.json(&body).send()
            };
            let answers = futures_util::future::join_all((0..64).map(|_| send())).await;
            let mut texts = std::collections::BTreeSet::new();
            for answer in answers {
                match answer.status {
                    200 => drop(texts.insert(answer.text())),
                    _ => {
                        assert_eq!(answer.header("retry-after"), Some("1"));
                        answer.error(409, "request_in_progress");
                    }
                }
            }
            assert_eq!(texts.len(), 1);
            let again = eventually("the answer is there", async || {
                Some(send().await).filter(|answer| answer.status == 200)
            })
            .await;
            assert!(texts.contains(&again.text()));
            assert_eq!(again.header("idempotent-replayed"), Some("true"));
            let once = gateway.chat(&customer, &ask("Hello")).await.expect(200);
            let after = gateway.settled(&customer).await.balance;
            assert_eq!(before - after, 2 * charged(&once), "the 64 cost what one costs");

            // Under the same key nothing else; another wallet's key of the same name is another.
            let other = gateway.post(CHAT).key(&customer.key).header("idempotency-key", &key);
            other.json(&ask("Something else")).send().await.error(409, "idempotency_key_reused");
            let neighbour = gateway.customer("1").await;
            let theirs = gateway.post(CHAT).key(&neighbour.key).header("idempotency-key", &key);
            assert_eq!(theirs.json(&body).send().await.expect(200).header("idempotent-replayed"), None);
        }
        for bad in ["", "two words", &"x".repeat(256)] {
            let call = gateway.post(CHAT).key(&customer.key).header("idempotency-key", bad);
            call.json(&ask("Hello")).send().await.error(400, "invalid_idempotency_key");
        }
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_is_there_is_given_again_with_no_money_left() {
    let upstream = ScriptedUpstream::start().await;
    let gateway = Gateway::start(&TestChain::shared(), &upstream.base_url).await;
    let customer = gateway.customer("1").await;
    let mut body = ask("Hello");
    body["model"] = DEAR.into();
    let send = || gateway.post(CHAT).key(&customer.key).header("idempotency-key", "once").json(&body).send();
    upstream.play(Script::json(200, &completion(Some(usage(8_000, 64)))));
    let answer = send().await.expect(200);
    // The rest is spent otherwise, down to less than this costs.
    for _ in 0..30 {
        if gateway.chat(&customer, &body).await.status != 200 {
            break;
        }
    }
    gateway.chat(&customer, &body).await.error(402, "insufficient_balance");
    assert_eq!(send().await.expect(200).text(), answer.text());
    // One that is too large to keep is told of, and not run again.
    let mut large = completion(Some(usage(20, 9)));
    large["choices"][0]["message"]["content"] = "x".repeat(9 << 20).into();
    upstream.play(Script::json(200, &large));
    let customer = gateway.customer("1").await;
    let send = |key: &'static str| {
        gateway.post(CHAT).key(&customer.key).header("idempotency-key", key).json(&ask("Long")).send()
    };
    let runs = upstream.received().len();
    send("large").await.expect(200);
    send("large").await.error(409, "answer_not_kept");
    assert_eq!(upstream.received().len(), runs + 1);
    gateway.audit();
}

#[tokio::test]
async fn a_payment_is_receipted_also_where_its_request_failed() {
    let upstream = ScriptedUpstream::start().await;
    let gateway = Gateway::start(&TestChain::shared(), &upstream.base_url).await;
    let wallet = stranger(&gateway).await;
    let payment = payment(&gateway, &wallet, CENT);
    upstream.play(Script::hang_up());
    let answer = paid(&gateway, &payment, &ask("Hello")).send().await;
    answer.error(502, "upstream_broke_off");
    assert_eq!(answer.decoded("payment-response")["success"], true, "the money is the payer's balance");
    assert_eq!(gateway.balance(&wallet).await.balance, CENT);
    gateway.audit();
}

#[tokio::test]
async fn a_payment_made_on_earlier_terms_still_gets_its_answer() {
    let mut gateway = Gateway::usual().await;
    let wallet = stranger(&gateway).await;
    let payment = payment(&gateway, &wallet, CENT);
    let body = ask("Hello");
    let answer = paid(&gateway, &payment, &body).send().await.expect(200);
    let old_treasury = gateway.setup.pay_to;
    gateway.reconfigure(|setup| setup.pay_to = TestWallet::random().address());
    let again = paid(&gateway, &payment, &body).send().await.expect(200);
    assert_eq!(again.text(), answer.text());
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    // A new one must be on the terms of today.
    let old_terms = wallet.authorization(old_treasury, CENT).sign();
    let refused = paid(&gateway, &old_terms, &body).send().await.expect(402);
    assert_eq!(refused.decoded("payment-required")["error"], "invalid_exact_evm_recipient_mismatch");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payment_that_has_a_name_is_taken_once_however_often_it_is_signed() {
    on_both(async |gateway| {
        let wallet = stranger(gateway).await;
        let body = ask("Hello");
        let named = |wallet: &TestWallet, id: &str| payment(gateway, wallet, CENT).named_header(id);
        let send = async |header: &str, body: &Value| {
            gateway.post(CHAT).header("payment-signature", header).json(body).send().await
        };
        // Signed by many at once, as by a client that has lost its state.
        let id = "order-2026-0001-aaaa";
        let headers: Vec<_> = (0..16).map(|_| named(&wallet, id)).collect();
        let answers = futures_util::future::join_all(headers.iter().map(|header| send(header, &body))).await;
        for answer in answers.iter().filter(|answer| answer.status != 200) {
            answer.error(409, "request_in_progress");
        }
        let again = eventually("the answer is there", async || {
            Some(send(&named(&wallet, id), &body).await).filter(|answer| answer.status == 200)
        })
        .await;
        assert_eq!(again.header("idempotent-replayed"), Some("true"));
        assert_eq!(gateway.chain().usdc_of(wallet.address()).await, micro("1") - CENT, "one was taken");
        let usage = gateway.usage_without_key(&wallet).await;
        assert_eq!(usage["request_count"], 1);
        assert_eq!(gateway.balance(&wallet).await.balance, CENT - charged(&again));

        // It is good for that request only, and only its payer is told of it.
        send(&named(&wallet, id), &ask("Other")).await.error(409, "payment_identifier_reused");
        let mut forged = payment(gateway, &wallet, CENT);
        let stranger = payment(gateway, &TestWallet::random(), CENT);
        forged.payload["signature"] = stranger.payload["signature"].clone();
        let refused = send(&forged.named_header(id), &body).await.expect(402);
        assert_eq!(refused.decoded("payment-required")["error"], "invalid_exact_evm_signature");
        let neighbour = self::stranger(gateway).await;
        let theirs = send(&named(&neighbour, id), &body).await.expect(200);
        assert_eq!(theirs.header("idempotent-replayed"), None, "another wallet's name is another");
        for bad in ["short", "has spaces in it, sir", &"x".repeat(129)] {
            send(&named(&wallet, bad), &body).await.error(400, "invalid_payload");
        }

        // One that somebody else has carried out is here already, and so it is credited like any other; but whoever
        // sends it may have read it off the chain.
        let second = wallet.authorization(gateway.setup.pay_to, CENT);
        let header = second.sign().named_header(id);
        let carried_out = Payload::parse(header.as_bytes()).unwrap();
        let call = carried_out.authorization.transfer_call(&carried_out.signature).to_string();
        gateway.chain().send(BYSTANDER, USDC, &call).await;
        send(&header, &body).await.error(402, "payment_already_used");
        assert_eq!(gateway.chain().usdc_of(wallet.address()).await, micro("1") - 2 * CENT);
        eventually("it is credited", async || {
            let balance = gateway.balance(&wallet).await.balance;
            (balance == 2 * CENT - charged(&again)).then_some(())
        })
        .await;
        assert_eq!(gateway.usage_without_key(&wallet).await["request_count"], 1);

        // A top-up is named too.
        gateway.chain().mint(wallet.address(), micro("5")).await;
        let topup = async |usd: &str| {
            let header = wallet.authorization(gateway.setup.pay_to, micro(usd)).sign();
            let header = header.named_header("topup-2026-0001-aaaa");
            gateway.post("/v1/topup").header("payment-signature", &header).send().await
        };
        let first = topup("2").await.expect(200).json()["topup_id"].clone();
        assert_eq!(topup("2").await.expect(200).json()["topup_id"], first);
        topup("1").await.error(409, "payment_identifier_reused");
        assert_eq!(gateway.chain().usdc_of(wallet.address()).await, micro("4") - 2 * CENT);
    })
    .await;
}

#[tokio::test]
async fn what_was_paid_with_is_no_means_to_use_up_its_payers_limits() {
    let rates = "requests_per_minute = 3\nrequests_per_day = 0\nunauthenticated_per_minute = 0\n\
                 failed_payments_per_minute = 5";
    let gateway = Gateway::start_with(Setup { rates: rates.into(), ..Setup::usual() }).await;
    let wallet = stranger(&gateway).await;
    let payment = payment(&gateway, &wallet, CENT);
    paid(&gateway, &payment, &ask("Hello")).send().await.expect(200);
    // Authorization and signature are on the chain now, for anybody to send.
    let steal = || paid(&gateway, &payment, &ask("Something dear")).header("x-api-key", "sk-junk").send();
    for _ in 0..5 {
        steal().await.error(402, "payment_already_used");
    }
    steal().await.error(429, "too_many_failed_attempts");
    let key = gateway.key_for(&wallet).await;
    gateway.post(CHAT).key(&key).json(&ask("Mine")).send().await.expect(200);
}

#[tokio::test]
async fn nothing_is_taken_from_a_frozen_wallet() {
    let gateway = Gateway::usual().await;
    let wallet = stranger(&gateway).await;
    paid(&gateway, &payment(&gateway, &wallet, CENT), &ask("Hello")).send().await.expect(200);
    let frozen = gateway.run_with(&["wallet", "freeze", &wallet.shown(), "asked to"]);
    assert!(frozen.status.success(), "{frozen:?}");
    let refused = paid(&gateway, &payment(&gateway, &wallet, CENT), &ask("Hello again")).send().await;
    refused.error(403, "wallet_frozen");
    assert_eq!(gateway.chain().usdc_of(wallet.address()).await, micro("1") - CENT);
}
