//! The public contract over HTTP, row by row, good and bad.

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD};
use farebox::http::{Access, route_table};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::eventually;
use crate::support::gateway::{
    Customer, DEAR, Gateway, MODEL, SMALL, Setup, UPSTREAM_KEY, ask, ask_stream, members, micro,
};
use crate::support::media::{usual_request, with_media};
use crate::support::wallet::{Siwe, TestWallet};
use crate::support::{chain, in_seconds, in_time, unix_seconds};

const USDC: &str = "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913";
const EXPOSED: [&str; 10] = [
    "payment-required",
    "payment-response",
    "x-payment-response",
    "retry-after",
    "x-request-id",
    "x-charged-usdc",
    "x-balance-usdc",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
];

/// RFC 3339 with milliseconds and `Z`.
#[track_caller]
fn assert_time(value: &Value) {
    let text = value.as_str().unwrap_or_else(|| panic!("no time: {value}"));
    let shape: String = text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000Z", "{text}");
}

// --- Routes and who may use them ---

#[test]
fn the_routes_are_those_of_the_contract() {
    let mut table: Vec<_> =
        route_table().into_iter().map(|(method, path, access)| (path, method.to_string(), access)).collect();
    let mut contract: Vec<_> = [
        ("/health", "GET", Access::Public),
        ("/ready", "GET", Access::Public),
        ("/v1/status", "GET", Access::Public),
        ("/v1/reserves", "GET", Access::Public),
        ("/v1/reserves/proof", "GET", Access::Caller),
        ("/v1/models", "GET", Access::Public),
        ("/openapi.json", "GET", Access::Public),
        ("/docs", "GET", Access::Public),
        ("/llms.txt", "GET", Access::Public),
        ("/v1/topup", "POST", Access::X402),
        ("/v1/topups/{wallet}", "GET", Access::Caller),
        ("/v1/withdrawals", "POST", Access::Siwe),
        ("/v1/withdrawals", "GET", Access::Caller),
        ("/v1/withdrawals/{id}", "GET", Access::Caller),
        ("/v1/auth/nonce", "GET", Access::Public),
        ("/v1/auth/session", "POST", Access::Siwe),
        ("/v1/auth/session/revoke", "POST", Access::Session),
        ("/v1/auth/keys", "POST", Access::Owner),
        ("/v1/auth/keys", "GET", Access::Owner),
        ("/v1/auth/keys/{key_id}", "DELETE", Access::Owner),
        ("/v1/auth/keys/{key_id}", "PATCH", Access::Owner),
        ("/v1/auth/keys/{key_id}/rotate", "POST", Access::Owner),
        ("/v1/chat/completions", "POST", Access::Priced),
        ("/v1/messages", "POST", Access::Priced),
        ("/v1/messages/count_tokens", "POST", Access::Caller),
        ("/v1/responses", "POST", Access::Priced),
        ("/v1/completions", "POST", Access::Priced),
        ("/v1/embeddings", "POST", Access::Priced),
        ("/v1/images/generations", "POST", Access::Priced),
        ("/v1/images/edits", "POST", Access::Priced),
        ("/v1/audio/speech", "POST", Access::Priced),
        ("/v1/audio/transcriptions", "POST", Access::Priced),
        ("/v1/usage/{wallet}", "GET", Access::Caller),
        ("/v1/requests", "GET", Access::Caller),
        ("/v1/requests/{id}", "GET", Access::Caller),
    ]
    .map(|(path, method, access)| (path, method.to_owned(), access))
    .into();
    let order = |a: &(&str, String, Access), b: &(&str, String, Access)| (a.0, &a.1).cmp(&(b.0, &b.1));
    table.sort_by(order);
    contract.sort_by(order);
    assert_eq!(table, contract);
}

#[tokio::test]
async fn every_route_is_public_or_asks_who_calls() {
    let treasury = TestWallet::random();
    let env = vec![("FAREBOX_TREASURY_KEY".into(), treasury.private_key())];
    let setup = Setup { pay_to: treasury.address(), env, ..Setup::usual() };
    let gateway = Gateway::start_with(with_media(setup)).await;
    // Without it there are no reserves to be asked for. Of blocks that it has not made itself anvil has no state.
    for _ in 0..3 {
        gateway.chain().rpc("evm_mine", json!([])).await;
    }
    let published = gateway.run_with(&["audit", "--publish"]);
    assert!(published.status.success(), "{published:?}");
    assert!(gateway.run_with(&["audit", "--publish"]).status.success());
    for (method, path, access) in route_table() {
        let wallet = TestWallet::random().shown();
        let path = path.replace("{wallet}", &wallet).replace("{key_id}", "1").replace("{id}", "req_1");
        let call = gateway.request(method.clone(), &path);
        let call = usual_request(&gateway, &path).unwrap_or(call);
        let call = match path.as_str() {
            "/v1/topup" => call.json(&json!({"amount": 5})),
            "/v1/chat/completions" | "/v1/messages" => call.json(&ask("Hello")),
            "/v1/responses" => call.json(&json!({"model": MODEL, "input": "Hello"})),
            _ => call,
        };
        let answer = call.send().await;
        let what = format!("{method} {path}: {answer:?}");
        match access {
            Access::Public => assert_eq!(answer.status, 200, "{what}"),
            Access::X402 | Access::Priced => assert_eq!(answer.status, 402, "{what}"),
            // A signed message in the body: without a body there is nothing to read, let alone refuse.
            Access::Siwe => assert_eq!(answer.status, 400, "{what}"),
            Access::Caller | Access::Owner | Access::Session => assert_eq!(answer.status, 401, "{what}"),
        }
        // A wrong key never helps, and where a key is asked for it is always 401.
        let mut call = gateway.request(method.clone(), &path).header("authorization", "Bearer sk-wrong");
        if path == "/v1/chat/completions" {
            call = call.json(&ask("Hello"));
        }
        let wrong = call.send().await;
        if matches!(access, Access::Priced | Access::Caller) {
            assert_eq!((wrong.status, &wrong.json()["error"]["code"]), (401, &json!("invalid_api_key")));
        }
    }
}

#[tokio::test]
async fn unknown_paths_and_methods_are_errors_of_the_usual_shape() {
    let gateway = Gateway::usual().await;
    for path in ["/", "/nope", "/v1", "/v1/nope", "/v1/models/", "/health/x", "/v1/chat/completions/x"] {
        gateway.get(path).send().await.error(404, "not_found");
    }
    for (method, path, allowed) in [
        (Method::GET, "/v1/chat/completions", "POST"),
        (Method::GET, "/v1/topup", "POST"),
        (Method::POST, "/v1/models", "GET"),
        (Method::PUT, "/health", "GET"),
        (Method::DELETE, "/v1/auth/keys", "POST"),
        (Method::DELETE, "/v1/auth/keys", "GET"),
    ] {
        let answer = gateway.request(method.clone(), path).send().await;
        answer.error(405, "method_not_allowed");
        let allow = answer.header("allow").unwrap_or_else(|| panic!("{method} {path}: no Allow"));
        assert!(allow.contains(allowed), "{method} {path}: {allow}");
        assert!(!allow.contains(method.as_str()), "{method} {path}: {allow}");
    }
}

#[tokio::test]
async fn every_answer_has_an_id_of_its_own() {
    let gateway = Gateway::usual().await;
    let mut ids = std::collections::HashSet::new();
    for path in ["/health", "/v1/nope", "/v1/models", "/v1/requests"] {
        let answer = gateway.get(path).send().await;
        assert!(ids.insert(answer.header("x-request-id").unwrap().to_owned()), "{answer:?}");
    }
}

// --- Health, status, models ---

#[tokio::test]
async fn health_is_exactly_ok() {
    let gateway = Gateway::usual().await;
    let answer = gateway.get("/health").send().await.expect(200);
    assert_eq!(answer.body, r#"{"status":"ok"}"#);
    assert_eq!(answer.header("content-type"), Some("application/json"));
}

#[tokio::test]
async fn ready_names_its_checks() {
    let gateway = Gateway::usual().await;
    let ready = gateway.get("/ready").send().await.expect(200).json();
    assert_eq!(
        ready,
        json!({"status": "ready", "checks": {"database": "ok", "chain": "ok", "journal": "ok"}})
    );
}

#[tokio::test]
async fn without_a_chain_it_is_degraded_and_still_serves() {
    let setup = Setup { rpc_url: "http://127.0.0.1:9".into(), ..Setup::usual() };
    let gateway = Gateway::start_with(setup).await;
    let ready = gateway.get("/ready").send().await.expect(200).json();
    assert_eq!(ready["status"], "degraded");
    assert_eq!(ready["checks"]["database"], "ok");
    assert_ne!(ready["checks"]["chain"], "ok");
    assert_eq!(gateway.get("/v1/status").send().await.json()["payments"], "unavailable");

    // Signing in and asking for terms need no chain; a payment does, and says that it took nothing.
    let wallet = TestWallet::random();
    gateway.key_for(&wallet).await;
    gateway.post("/v1/topup").json(&json!({"amount": 5})).send().await.expect(402);
    let payment = wallet.authorization(gateway.setup.pay_to, micro("5")).sign();
    let call =
        gateway.post("/v1/topup").json(&json!({"amount": 5})).header("x-payment", &payment.v1_header());
    let answer = call.send().await;
    let error = answer.error(503, "payments_unavailable");
    assert!(error["message"].as_str().unwrap().contains("nothing was taken"), "{error}");
    assert!(answer.header("retry-after").is_some(), "{answer:?}");
    assert_eq!(gateway.balance(&wallet).await.balance, 0);
}

#[tokio::test]
async fn status_says_what_an_agent_needs_to_know() {
    let gateway = Gateway::usual().await;
    let status = gateway.get("/v1/status").send().await.expect(200).json();
    assert_eq!(
        status,
        json!({
            "version": env!("CARGO_PKG_VERSION"), "network": "eip155:8453", "asset": USDC,
            "asset_name": "USD Coin", "asset_decimals": 6, "pay_to": gateway.setup.pay_to.to_string(),
            "markup_bps": 2000, "min_topup_usd": "1", "max_topup_usd": "10000", "payments": "ok",
            "receipt_signer": status["receipt_signer"],
            "receipt_signers": [{
                "address": status["receipt_signer"], "since": status["receipt_signers"][0]["since"],
                "revoked_at": null,
            }],
        })
    );
}

#[tokio::test]
async fn models_are_listed_with_their_prices() {
    let gateway = Gateway::usual().await;
    let answer = gateway.get("/v1/models").send().await.expect(200);
    let list = answer.json();
    assert_eq!(members(&list), ["data", "object"]);
    assert_eq!(list["object"], "list");
    let row = |id: &str| {
        let rows = list["data"].as_array().unwrap();
        rows.iter().find(|row| row["id"] == id).unwrap_or_else(|| panic!("no {id} in {list}")).clone()
    };
    let mut ours = row(MODEL);
    let created = ours.as_object_mut().unwrap().remove("created").unwrap();
    assert!((unix_seconds() - created.as_i64().unwrap()).abs() < 600, "{created}");
    assert_eq!(
        ours,
        json!({
            "id": "openai/gpt-5-mini", "object": "model", "owned_by": "openai", "name": "gpt-5-mini",
            "provider": "openai", "contextLength": 128_000, "maxOutputTokens": 16_384,
            "promptPricePer1MTokens": 0.15, "completionPricePer1M": 0.60,
            "pricing": {"prompt": "0.18", "completion": "0.72"}, "status": "live",
        })
    );
    assert_eq!(row(SMALL)["created"], 1_700_000_000);
    assert_eq!(row(DEAR)["pricing"], json!({"prompt": "120", "completion": "1200"}));
    // A price is written as the decimal it is, not as the nearest binary fraction.
    assert!(answer.text().contains(r#""promptPricePer1MTokens":0.15,"#), "{}", answer.text());
}

// --- Top-ups ---

fn terms_v2(gateway: &Gateway, amount: u64) -> Value {
    json!({
        "scheme": "exact", "network": "eip155:8453", "amount": amount.to_string(), "asset": USDC,
        "payTo": gateway.setup.pay_to.to_string(), "maxTimeoutSeconds": 300,
        "extra": {"name": "USD Coin", "version": "2"},
    })
}

#[tokio::test]
async fn a_topup_without_a_payment_names_its_terms() {
    let gateway = Gateway::usual().await;
    let answer = gateway.post("/v1/topup").json(&json!({"amount": 5})).send().await.expect(402);
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    let mut body = answer.json();
    let description = body["resource"]["description"].take();
    assert!(description.as_str().is_some_and(|text| !text.is_empty()), "{body}");
    let url = gateway.url("/v1/topup");
    let resource = json!({"url": url, "description": null, "mimeType": "application/json"});
    let mut terms = terms_v2(&gateway, 5_000_000);
    terms["maxAmountRequired"] = "5000000".into();
    terms["extra"]["decimals"] = 6.into();
    assert_eq!(
        body,
        json!({"x402Version": 2, "error": "payment required", "resource": resource, "accepts": [terms]})
    );

    // The header is strict: v2 decoders may refuse members they do not know.
    let mut header = answer.decoded("payment-required");
    assert_eq!(header["resource"]["description"].take(), description);
    let extensions = header.as_object_mut().unwrap().remove("extensions").unwrap();
    assert_eq!(members(&extensions), ["payment-identifier"]);
    assert_eq!(
        header,
        json!({
            "x402Version": 2, "error": "payment required", "resource": resource,
            "accepts": [terms_v2(&gateway, 5_000_000)],
        })
    );
}

#[tokio::test]
async fn a_v1_client_gets_a_strict_v1_body() {
    let gateway = Gateway::usual().await;
    let answer = gateway.post("/v1/topup?x402=1").json(&json!({"amount": "2.5"})).send().await.expect(402);
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    let body = answer.json();
    let description = body["accepts"][0]["description"].clone();
    assert!(description.is_string());
    assert_eq!(
        body,
        json!({
            "x402Version": 1, "error": "payment required",
            "accepts": [{
                "scheme": "exact", "network": "base", "maxAmountRequired": "2500000",
                "resource": gateway.url("/v1/topup"), "description": description,
                "mimeType": "application/json", "payTo": gateway.setup.pay_to.to_string(),
                "maxTimeoutSeconds": 300, "asset": USDC, "extra": {"name": "USD Coin", "version": "2"},
            }],
        })
    );
    assert_eq!(answer.decoded("payment-required")["x402Version"], 2);
}

#[tokio::test]
async fn amounts_are_decimals_within_bounds() {
    let gateway = Gateway::usual().await;
    for (amount, micro) in [
        ("1", 1_000_000_u64),
        ("\"1\"", 1_000_000),
        ("1.0", 1_000_000),
        ("\"1.000001\"", 1_000_001),
        ("1.000001", 1_000_001),
        ("1.1", 1_100_000),
        // Neither has a float that is it.
        ("4.35", 4_350_000),
        ("9999.999999", 9_999_999_999),
        ("10000", 10_000_000_000),
        ("\"10000.000000\"", 10_000_000_000),
    ] {
        let body = format!("{{\"amount\": {amount}}}");
        let answer = gateway.post("/v1/topup").body(body).send().await.expect(402).json();
        assert_eq!(answer["accepts"][0]["amount"], micro.to_string(), "{amount}");
    }
    for body in [
        "",
        "{}",
        r#"{"amount": null}"#,
        r#"{"amount": 0}"#,
        r#"{"amount": 0.999999}"#,
        r#"{"amount": "0.99"}"#,
        r#"{"amount": 10000.000001}"#,
        r#"{"amount": 10001}"#,
        r#"{"amount": -5}"#,
        r#"{"amount": "-5"}"#,
        r#"{"amount": "+5"}"#,
        r#"{"amount": 5.0000001}"#,
        r#"{"amount": "1.2345678"}"#,
        r#"{"amount": "five"}"#,
        r#"{"amount": ""}"#,
        r#"{"amount": " 5"}"#,
        r#"{"amount": "5,00"}"#,
        r#"{"amount": "$5"}"#,
        r#"{"amount": "0x5"}"#,
        r#"{"amount": "NaN"}"#,
        r#"{"amount": "Infinity"}"#,
        r#"{"amount": 1e400}"#,
        r#"{"amount": 99999999999999999999999999999999999999999}"#,
        r#"{"amount": true}"#,
        r#"{"amount": [5]}"#,
        r#"{"amount": {"usd": 5}}"#,
    ] {
        let answer = gateway.post("/v1/topup").body(body).send().await;
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
        let error = answer.error(400, "invalid_amount");
        assert_eq!(error["param"], "amount", "{body}");
    }
    for body in ["{", "[]", "5", "\"5\"", "{\"amount\": }"] {
        assert_eq!(gateway.post("/v1/topup").body(body).send().await.status, 400, "{body}");
    }
}

#[tokio::test]
async fn a_payment_is_read_in_every_envelope_encoding_and_header() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro("100")).await;
    let mut credited = 0;
    for (number, engine) in
        [BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD].iter().enumerate()
    {
        for (version, name) in
            [(1, "x-payment"), (2, "payment-signature"), (1, "Payment-Signature"), (2, "X-PAYMENT")]
        {
            let payment = wallet.authorization(gateway.setup.pay_to, 1_000_000).sign();
            let mut envelope = if version == 1 { payment.v1() } else { payment.v2() };
            // So that the two alphabets differ, and so that there is something to pad.
            envelope["extensions"] = json!({"note": "~~~???>>>\u{ff}\u{ff}", "pad": "x".repeat(number)});
            let header = engine.encode(envelope.to_string());
            if number >= 2 {
                assert!(header.contains(['-', '_']), "{header}");
            }
            let call = gateway.post("/v1/topup").json(&json!({"amount": 1})).header(name, &header);
            let answer = call.send().await.expect(200);
            credited += 1_000_000;
            let body = answer.json();
            let tx_hash = body["tx_hash"].as_str().unwrap();
            assert!(tx_hash.len() == 66 && tx_hash.starts_with("0x"), "{body}");
            assert_eq!(
                body,
                json!({
                    "balance_usdc": credited, "credited_usdc": 1_000_000, "wallet": wallet.shown(),
                    "tx_hash": tx_hash, "topup_id": body["topup_id"].as_i64().unwrap(),
                    "receipt": body["receipt"],
                })
            );
            for (header, network) in [("payment-response", "eip155:8453"), ("x-payment-response", "base")] {
                let receipt = answer.decoded(header);
                assert_eq!(receipt["success"], true, "{receipt}");
                assert_eq!(receipt["transaction"], tx_hash, "{receipt}");
                assert_eq!(receipt["network"], network, "{receipt}");
                assert_eq!(receipt["payer"], wallet.shown(), "{receipt}");
            }
        }
    }
    assert_eq!(gateway.balance(&wallet).await.balance, credited);
    assert_eq!(gateway.chain().usdc_of(gateway.setup.pay_to).await, credited);
    gateway.audit();
}

#[tokio::test]
async fn without_a_body_the_authorised_value_is_the_amount() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro("20000")).await;
    let pay = async |value: u64| {
        let payment = wallet.authorization(gateway.setup.pay_to, value).sign();
        gateway.post("/v1/topup").header("x-payment", &payment.v2_header()).send().await
    };
    assert_eq!(pay(2_345_678).await.expect(200).json()["credited_usdc"], 2_345_678);
    for value in [0, 999_999, 10_000_000_001] {
        pay(value).await.error(400, "invalid_amount");
    }
    assert_eq!(gateway.balance(&wallet).await.balance, 2_345_678);
}

#[tokio::test]
async fn two_headers_must_hold_one_payment() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro("5")).await;
    let sign = || wallet.authorization(gateway.setup.pay_to, 1_000_000).sign().v2_header();
    let (one, other) = (sign(), sign());
    let pay = async |first: &str, second: &str| {
        let call = gateway.post("/v1/topup").json(&json!({"amount": 1}));
        call.header("x-payment", first).header("payment-signature", second).send().await
    };
    pay(&one, &other).await.error(400, "conflicting_payments");
    assert_eq!(gateway.balance(&wallet).await.balance, 0);
    assert_eq!(pay(&one, &one).await.expect(200).json()["balance_usdc"], 1_000_000);
}

#[tokio::test]
async fn what_cannot_be_read_as_a_payment_is_400() {
    let gateway = Gateway::usual().await;
    let good = TestWallet::random().authorization(gateway.setup.pay_to, 1_000_000).sign();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut envelope = good.v2();
        change(&mut envelope);
        crate::support::wallet::header(&envelope)
    };
    let headers = [
        "not base64!".to_owned(),
        "AAAA".to_owned(),
        BASE64_STANDARD.encode("no json"),
        BASE64_STANDARD.encode("{}"),
        BASE64_STANDARD.encode("[]"),
        changed(&|e| e["payload"] = json!({})),
        changed(&|e| e["payload"] = json!("0x")),
        changed(&|e| e["payload"]["signature"] = json!("nonsense")),
        changed(&|e| e["payload"]["authorization"]["from"] = json!("0x1234")),
        changed(&|e| e["payload"]["authorization"]["value"] = json!("five")),
        changed(&|e| e["payload"]["authorization"]["value"] = json!("-1")),
        changed(&|e| e["payload"]["authorization"]["nonce"] = json!("0x12")),
        changed(&|e| e["payload"]["authorization"]["validBefore"] = json!("1".repeat(90))),
        changed(&|e| e["accepted"] = json!({})),
    ];
    for header in headers {
        let answer =
            gateway.post("/v1/topup").json(&json!({"amount": 1})).header("x-payment", &header).send().await;
        assert_eq!(answer.status, 400, "{header}: {answer:?}");
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error", "{header}");
    }
}

#[tokio::test]
async fn a_refused_payment_says_why_and_brings_fresh_terms() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let stranger = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro("1")).await;
    let pay_to = gateway.setup.pay_to;
    let draft = |value: u64| wallet.authorization(pay_to, value);
    let mut to_stranger = draft(1_000_000);
    to_stranger.to = stranger.address();
    let mut early = draft(1_000_000);
    early.valid_after = (unix_seconds() + 600).to_string();
    let mut late = draft(1_000_000);
    late.valid_before = unix_seconds().to_string();
    let mut sepolia = draft(1_000_000);
    sepolia.domain_name = "USDC".into();
    let mut version_one = draft(1_000_000);
    version_one.domain_version = "1".into();
    let mut theirs = draft(1_000_000);
    theirs.from = stranger.address();
    let envelope = |change: &dyn Fn(&mut Value)| {
        let mut envelope = draft(1_000_000).sign().v2();
        change(&mut envelope);
        envelope
    };

    let table = [
        (envelope(&|e| e["x402Version"] = 3.into()), "1", "invalid_x402_version"),
        (envelope(&|e| e["accepted"]["scheme"] = "upto".into()), "1", "unsupported_scheme"),
        (envelope(&|e| e["accepted"]["network"] = "eip155:1".into()), "1", "invalid_network"),
        (to_stranger.sign().v2(), "1", "invalid_exact_evm_recipient_mismatch"),
        (draft(1_000_000).sign().v2(), "2", "invalid_exact_evm_payload_authorization_value_mismatch"),
        (draft(999_999).sign().v1(), "1", "invalid_exact_evm_payload_authorization_value_mismatch"),
        (early.sign().v2(), "1", "invalid_exact_evm_payload_authorization_valid_after"),
        (late.sign().v2(), "1", "invalid_exact_evm_payload_authorization_valid_before"),
        (sepolia.sign().v2(), "1", "invalid_exact_evm_signature"),
        (version_one.sign().v2(), "1", "invalid_exact_evm_signature"),
        (theirs.sign().v2(), "1", "invalid_exact_evm_signature"),
        (draft(1_000_000).with_signature(&[7; 64]).v2(), "1", "invalid_exact_evm_failed_to_parse_signature"),
        (draft(1_000_001).sign().v2(), "1.000001", "invalid_exact_evm_insufficient_balance"),
    ];
    for (payment, usd, code) in table {
        for path in ["/v1/topup", "/v1/topup?x402=1"] {
            let call = gateway.post(path).json(&json!({"amount": usd}));
            let answer = call.header("x-payment", &crate::support::wallet::header(&payment)).send().await;
            assert_eq!(answer.status, 402, "{code}: {answer:?}");
            assert_eq!(answer.header("cache-control"), Some("no-store"));
            let (header, body) = (answer.decoded("payment-required"), answer.json());
            assert_eq!(header["error"], code);
            let sentence = body["error"].as_str().unwrap();
            assert!(sentence.starts_with(&format!("{code}: ")), "{sentence}");
            assert!(sentence.len() > code.len() + 12, "it says nothing to a person: {sentence}");
            assert_eq!(header["accepts"], json!([terms_v2(&gateway, micro(usd))]));
            let version = if path.contains('?') { 1 } else { 2 };
            assert_eq!(body["x402Version"], version);
            assert_eq!(body["accepts"][0]["maxAmountRequired"], micro(usd).to_string());
        }
    }
    assert_eq!(gateway.chain().usdc_of(wallet.address()).await, micro("1"));
    let refused =
        gateway.get(&format!("/v1/topups/{}{}", wallet.address(), gateway.sign_in(&wallet).query()));
    assert_eq!(refused.send().await.expect(200).json()["topups"], json!([]));
}

#[tokio::test]
async fn the_same_payment_again_is_the_same_payment() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro("10")).await;
    let payment = wallet.authorization(gateway.setup.pay_to, 5_000_000);
    let pay = async |header: String| {
        gateway.post("/v1/topup").json(&json!({"amount": 5})).header("x-payment", &header).send().await
    };
    let first = pay(payment.sign().v1_header()).await.expect(200).json();
    for header in [payment.sign().v1_header(), payment.sign().v2_header()] {
        assert_eq!(pay(header).await.expect(200).json(), first);
    }
    // Another amount under the same nonce is another payment, and one that cannot be.
    let mut other = payment.clone();
    other.value = "4000000".into();
    let call = gateway.post("/v1/topup").json(&json!({"amount": 4}));
    let answer = call.header("x-payment", &other.sign().v1_header()).send().await.expect(402);
    assert_eq!(answer.decoded("payment-required")["error"], "invalid_exact_evm_nonce_already_used");
    assert_eq!(gateway.chain().usdc_of(gateway.setup.pay_to).await, 5_000_000);
    gateway.audit();
}

#[tokio::test]
async fn topups_are_listed_newest_first_in_pages() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    for usd in ["2", "3"] {
        gateway.top_up(&customer.wallet, usd).await;
    }
    let list = async |query: &str| {
        let path = format!("/v1/topups/{}{query}", customer.wallet.address().to_string().to_lowercase());
        gateway.get(&path).key(&customer.key).send().await
    };
    let all = list("").await.expect(200).json();
    assert_eq!(members(&all), ["network", "next_cursor", "topups", "wallet"]);
    assert_eq!(all["wallet"], customer.wallet.shown());
    assert_eq!(all["network"], "eip155:8453");
    assert_eq!(all["next_cursor"], Value::Null);
    let rows = all["topups"].as_array().unwrap();
    let amounts: Vec<_> = rows.iter().map(|row| row["amount_usdc"].as_u64().unwrap()).collect();
    assert_eq!(amounts, [3_000_000, 2_000_000, 1_000_000]);
    for row in rows {
        let named = ["amount_usdc", "created_at", "id", "network", "status", "tx_hash", "wallet"];
        let more = ["asset", "from", "kind", "object", "pay_to", "signature", "updated_at"];
        let mut all = [named.as_slice(), more.as_slice()].concat();
        all.sort_unstable();
        assert_eq!(members(row), all);
        assert_eq!(row["kind"], "payment");
        assert!(matches!(row["status"].as_str(), Some("credited" | "finalized")), "{row}");
        assert_time(&row["created_at"]);
    }

    let ids = |page: &Value| -> Vec<_> {
        page["topups"].as_array().unwrap().iter().map(|row| row["id"].as_i64().unwrap()).collect()
    };
    let first = list("?limit=2").await.expect(200).json();
    let cursor = first["next_cursor"].as_str().expect("a cursor").to_owned();
    let second = list(&format!("?limit=2&cursor={cursor}")).await.expect(200).json();
    assert_eq!([ids(&first), ids(&second)].concat(), ids(&all));
    assert_eq!(second["next_cursor"], Value::Null);
    assert_eq!(list("?limit=3").await.json()["next_cursor"], Value::Null);

    for query in ["?limit=0", "?limit=101", "?limit=-1", "?limit=x"] {
        assert_eq!(list(query).await.error(400, "invalid_limit")["param"], "limit");
    }
    list("?cursor=nonsense").await.error(400, "invalid_cursor");
    let other = format!("/v1/topups/{}", TestWallet::random().address());
    gateway.get(&other).key(&customer.key).send().await.error(403, "not_your_wallet");
    gateway.get("/v1/topups/0x12").key(&customer.key).send().await.error(400, "invalid_wallet");
}

// --- Signing in, and keys ---

#[tokio::test]
async fn a_sign_in_that_is_not_good_is_refused_in_its_own_words() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let (host, port) = gateway.host.split_once(':').unwrap();
    let changed = |change: &dyn Fn(&mut Siwe)| {
        let mut message = wallet.siwe(&gateway.host);
        change(&mut message);
        message
    };
    let mut messages_seen = std::collections::HashSet::new();
    for (message, code, word) in [
        (changed(&|m| m.domain = "evil.example".into()), "siwe_wrong_domain", "domain"),
        // Without its port the domain is another one.
        (changed(&|m| m.domain = host.into()), "siwe_wrong_domain", host),
        (changed(&|m| m.domain = format!("{host}:1")), "siwe_wrong_domain", port),
        (changed(&|m| m.uri = "https://evil.example/".into()), "siwe_wrong_uri", "uri"),
        (changed(&|m| m.uri = format!("http://{host}/")), "siwe_wrong_uri", "port"),
        (changed(&|m| m.chain_id = "1".into()), "siwe_wrong_chain", "8453"),
        (changed(&|m| m.issued_at = in_seconds(-600)), "siwe_stale", "5 minutes"),
        (changed(&|m| m.issued_at = in_seconds(600)), "siwe_issued_in_future", "future"),
        (changed(&|m| m.expiration_time = Some(in_seconds(-1))), "siwe_expired", "expired"),
        (changed(&|m| m.not_before = Some(in_seconds(600))), "siwe_not_yet_valid", "not-before"),
        (changed(&|m| m.address = TestWallet::random().shown()), "siwe_wrong_signature", "signature"),
    ] {
        let signed = message.sign();
        let made = gateway.post("/v1/auth/keys").json(&signed.body()).send().await;
        let error = made.error(401, code);
        let text = error["message"].as_str().unwrap();
        assert!(text.contains(word), "{code}: {text}");
        messages_seen.insert(text.to_owned());
        // The same in a URL.
        let read = gateway.get(&format!("/v1/auth/keys{}", signed.query())).send().await;
        read.error(401, code);
    }
    assert_eq!(messages_seen.len(), 11, "each reason has its own words: {messages_seen:?}");

    // Nothing was made by any of these, and none of them used its nonce up.
    let keys = gateway.get(&format!("/v1/auth/keys{}", gateway.sign_in(&wallet).query())).send().await;
    assert_eq!(keys.expect(200).json()["data"], json!([]));
}

#[tokio::test]
async fn a_sign_in_within_the_rules_is_taken() {
    let gateway = Gateway::usual().await;
    let (_, port) = gateway.host.split_once(':').unwrap();
    let localhost = format!("localhost:{port}");
    let wallet = TestWallet::random();
    let changed = |change: &dyn Fn(&mut Siwe)| {
        let mut message = wallet.siwe(&gateway.host);
        change(&mut message);
        message.sign()
    };
    for signed in [
        // Where the public address is a loopback, both of its names are meant.
        wallet.siwe(&localhost).sign(),
        changed(&|m| m.uri = format!("http://{}/any/path?x=1#y", gateway.host)),
        changed(&|m| m.issued_at = in_seconds(30)),
        changed(&|m| m.issued_at = in_seconds(-290)),
        changed(&|m| m.expiration_time = Some(in_seconds(60))),
        changed(&|m| m.not_before = Some(in_seconds(-60))),
        changed(&|m| m.nonce = "12345678".into()),
    ] {
        let answer = gateway.post("/v1/auth/keys").json(&signed.body()).send().await;
        assert_eq!(answer.status, 201, "{signed:?}: {answer:?}");
    }
}

#[tokio::test]
async fn what_is_no_sign_in_at_all_is_400() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let good = gateway.sign_in(&wallet);
    let changed = |change: &dyn Fn(&mut Siwe)| {
        let mut message = wallet.siwe(&gateway.host);
        change(&mut message);
        message.sign().body()
    };
    for body in [
        json!({"message": "hello", "signature": good.signature}),
        json!({"message": "", "signature": good.signature}),
        changed(&|m| m.nonce = "1234567".into()),
        changed(&|m| m.nonce = "with spaces".into()),
        changed(&|m| m.version = "2".into()),
        changed(&|m| m.issued_at = "yesterday".into()),
        changed(&|m| m.chain_id = "Base".into()),
        changed(&|m| m.address = "0x1234".into()),
        json!({"message": good.message, "signature": "nonsense"}),
        json!({"message": good.message, "signature": "0xzz"}),
        json!({"message": good.message}),
        json!({"signature": good.signature}),
        json!({"message": 5, "signature": good.signature}),
        json!({}),
        json!([]),
    ] {
        let answer = gateway.post("/v1/auth/keys").json(&body).send().await;
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    gateway.post("/v1/auth/keys").body("{").send().await.expect(400);
    gateway.get("/v1/auth/keys?message=hello&signature=0x12").send().await.expect(400);
    // A signature of the right form by nobody is refused rather than not understood.
    let body = json!({"message": good.message, "signature": format!("0x{}", "11".repeat(65))});
    gateway.post("/v1/auth/keys").json(&body).send().await.error(401, "siwe_wrong_signature");
}

#[tokio::test]
async fn a_nonce_has_the_purpose_of_its_first_use() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let create = async |signed: &Value| gateway.post("/v1/auth/keys").json(signed).send().await;

    let writing = gateway.sign_in(&wallet);
    create(&writing.body()).await.expect(201);
    create(&writing.body()).await.error(401, "siwe_nonce_used");
    let read = gateway.get(&format!("/v1/auth/keys{}", writing.query())).send().await;
    read.error(401, "siwe_nonce_used");

    let reading = gateway.sign_in(&wallet);
    for _ in 0..3 {
        gateway.get(&format!("/v1/auth/keys{}", reading.query())).send().await.expect(200);
        gateway.get(&format!("/v1/usage/{}{}", wallet.address(), reading.query())).send().await.expect(200);
    }
    create(&reading.body()).await.error(401, "siwe_nonce_for_reading");
    gateway.delete("/v1/auth/keys/1").json(&reading.body()).send().await.error(401, "siwe_nonce_for_reading");
    // It still reads.
    gateway.get(&format!("/v1/auth/keys{}", reading.query())).send().await.expect(200);

    // A write that fails has used its message up.
    let failing = gateway.sign_in(&wallet);
    gateway.delete("/v1/auth/keys/424242").json(&failing.body()).send().await.error(404, "key_not_found");
    create(&failing.body()).await.error(401, "siwe_nonce_used");

    // Another wallet's nonce is its own.
    let mut same_nonce = TestWallet::random().siwe(&gateway.host);
    let mut mine = wallet.siwe(&gateway.host);
    same_nonce.nonce = "sharednonce1".into();
    mine.nonce = "sharednonce1".into();
    create(&mine.sign().body()).await.expect(201);
    create(&same_nonce.sign().body()).await.expect(201);
}

#[tokio::test]
async fn one_sign_in_at_the_same_time_makes_one_key() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let body = gateway.sign_in(&wallet).body();
    let calls = (0..10).map(|_| gateway.post("/v1/auth/keys").json(&body).send());
    let mut statuses: Vec<_> =
        futures_util::future::join_all(calls).await.iter().map(|answer| answer.status).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [vec![201], vec![401; 9]].concat());
}

#[tokio::test]
async fn a_key_is_made_listed_and_revoked() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let mut body = gateway.sign_in(&wallet).body();
    body["label"] = "my-app".into();
    let answer = gateway.post("/v1/auth/keys").json(&body).send().await.expect(201);
    let made = answer.json();
    assert_eq!(members(&made), ["created_at", "id", "key", "label"]);
    let key = made["key"].as_str().unwrap();
    let digits = key.strip_prefix("sk-").unwrap();
    assert!(digits.len() == 64 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{key}");
    assert_eq!(made["label"], "my-app");
    assert_time(&made["created_at"]);
    let unnamed = gateway.key_for(&wallet).await;

    let list = async || {
        let path = format!("/v1/auth/keys{}", gateway.sign_in(&wallet).query());
        let answer = gateway.get(&path).send().await.expect(200);
        assert!(!answer.text().contains(digits), "a list shows a key");
        answer.json()["data"].clone()
    };
    let rows = list().await;
    assert_eq!(rows.as_array().unwrap().len(), 2);
    assert_eq!(rows[0]["id"], unnamed.id);
    assert_eq!(rows[0]["label"], Value::Null);
    for member in ["id", "label", "created_at", "revoked_at"] {
        assert!(rows[1].get(member).is_some(), "{rows}");
    }
    assert_eq!(rows[1]["revoked_at"], Value::Null);

    let id = made["id"].as_i64().unwrap();
    let requests = async |key: &str| {
        gateway.get("/v1/requests").header("authorization", &format!("Bearer {key}")).send().await
    };
    requests(key).await.expect(200);
    let revoke = async |by: &TestWallet, id: i64| {
        gateway.delete(&format!("/v1/auth/keys/{id}")).json(&gateway.sign_in(by).body()).send().await
    };
    revoke(&TestWallet::random(), id).await.error(404, "key_not_found");
    requests(key).await.expect(200);
    assert_eq!(revoke(&wallet, id).await.expect(200).json(), json!({"revoked": true}));
    requests(key).await.error(401, "invalid_api_key");
    assert_eq!(revoke(&wallet, id).await.expect(200).json(), json!({"revoked": true}));
    requests(&unnamed.secret).await.expect(200);
    assert_time(&list().await[1]["revoked_at"]);
    for unknown in ["424242", "nonsense", "-1", "99999999999999999999"] {
        let path = format!("/v1/auth/keys/{unknown}");
        let answer = gateway.delete(&path).json(&gateway.sign_in(&wallet).body()).send().await;
        answer.error(404, "key_not_found");
    }

    // Where a client cannot send a body with DELETE, the message travels in the query.
    let path = format!("/v1/auth/keys/{}{}", unnamed.id, gateway.sign_in(&wallet).query());
    let answer = gateway.delete(&path).send().await.expect(200);
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
    requests(&unnamed.secret).await.error(401, "invalid_api_key");
}

#[tokio::test]
async fn a_wallet_has_only_so_many_live_keys() {
    let setup = Setup { limits: "keys_per_wallet = 2".into(), ..Setup::usual() };
    let gateway = Gateway::start_with(setup).await;
    let wallet = TestWallet::random();
    let first = gateway.key_for(&wallet).await;
    gateway.key_for(&wallet).await;
    let create = async |wallet: &TestWallet| {
        gateway.post("/v1/auth/keys").json(&gateway.sign_in(wallet).body()).send().await
    };
    create(&wallet).await.error(409, "too_many_keys");
    create(&TestWallet::random()).await.expect(201);
    let path = format!("/v1/auth/keys/{}", first.id);
    gateway.delete(&path).json(&gateway.sign_in(&wallet).body()).send().await.expect(200);
    create(&wallet).await.expect(201);
    create(&wallet).await.error(409, "too_many_keys");
}

#[tokio::test]
async fn keys_are_listed_in_pages() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let mut made = Vec::new();
    for _ in 0..3 {
        made.insert(0, gateway.key_for(&wallet).await.id);
    }
    let page = async |more: &str| {
        let path = format!("/v1/auth/keys{}{more}", gateway.sign_in(&wallet).query());
        gateway.get(&path).send().await.expect(200).json()
    };
    let ids = |page: &Value| -> Vec<_> {
        page["data"].as_array().unwrap().iter().map(|row| row["id"].as_i64().unwrap()).collect()
    };
    let first = page("&limit=2").await;
    let second = page(&format!("&limit=2&cursor={}", first["next_cursor"].as_str().unwrap())).await;
    assert_eq!([ids(&first), ids(&second)].concat(), made);
    assert_eq!(second["next_cursor"], Value::Null);
}

#[tokio::test]
async fn a_label_that_is_no_name_is_refused() {
    let gateway = Gateway::usual().await;
    for label in [json!("x".repeat(101)), json!("two\nlines")] {
        let mut body = gateway.sign_in(&TestWallet::random()).body();
        body["label"] = label;
        let answer = gateway.post("/v1/auth/keys").json(&body).send().await;
        assert_eq!(answer.error(400, "invalid_label")["param"], "label");
    }
}

#[tokio::test]
async fn a_key_goes_under_either_header() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let (one, other) = (gateway.key_for(&wallet).await.secret, gateway.key_for(&wallet).await.secret);
    let read = async |headers: &[(&str, String)]| {
        let call = gateway.get("/v1/requests");
        headers.iter().fold(call, |call, (name, value)| call.header(name, value)).send().await
    };
    let bearer = |key: &str| ("authorization", format!("Bearer {key}"));
    let x_api_key = |key: &str| ("x-api-key", key.to_owned());
    read(&[bearer(&one)]).await.expect(200);
    read(&[x_api_key(&one)]).await.expect(200);
    read(&[("authorization", format!("bearer {one}"))]).await.expect(200);
    read(&[bearer(&one), x_api_key(&one)]).await.expect(200);
    read(&[bearer(&one), x_api_key(&other)]).await.error(400, "conflicting_credentials");
    for wrong in [
        bearer(&format!("sk-{}", "0".repeat(64))),
        bearer(""),
        bearer(&one[..20]),
        bearer(&one.to_uppercase()),
        x_api_key("sk-"),
        ("authorization", one.clone()),
        ("authorization", format!("Basic {one}")),
    ] {
        let answer = read(std::slice::from_ref(&wrong)).await;
        let message = answer.error(401, "invalid_api_key")["message"].to_string();
        assert!(!message.contains(&one[..16]), "{wrong:?}: {message}");
    }
}

#[tokio::test]
async fn a_signed_url_is_kept_out_of_caches_and_referrers() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let signed = gateway.sign_in(&wallet);
    let wrong = signed.query().replace("Version%3A%201", "Version%3A%202");
    for path in [
        format!("/v1/auth/keys{}", signed.query()),
        format!("/v1/usage/{}{}", wallet.address(), signed.query()),
        format!("/v1/topups/{}{}", wallet.address(), signed.query()),
        format!("/v1/requests{}", signed.query()),
        // Refused ones as well.
        format!("/v1/auth/keys{wrong}"),
        format!("/v1/nope{}", signed.query()),
    ] {
        let answer = gateway.get(&path).send().await;
        assert_eq!(answer.header("cache-control"), Some("no-store"), "{path}: {answer:?}");
        assert_eq!(answer.header("referrer-policy"), Some("no-referrer"), "{path}: {answer:?}");
    }
}

// --- Chat completions ---

#[tokio::test]
async fn a_request_is_charged_as_in_the_contracts_example() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("5").await;
    let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
    let body = answer.json();
    assert_eq!(body["usage"]["prompt_tokens"], 20);
    assert_eq!(body["usage"]["completion_tokens"], 9);
    assert_eq!(body["usage"]["charged_usdc"], 11);
    assert_eq!(body["model"], MODEL);
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(answer.number("x-charged-usdc"), 11);
    assert_eq!(answer.number("x-balance-usdc"), 5_000_000 - 11);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let balance = gateway.balance(&customer.wallet).await;
    assert_eq!((balance.balance, balance.locked), (5_000_000 - 11, 0));

    // The receipt, to the last member.
    let id = answer.header("x-request-id").unwrap().to_owned();
    let mut receipt = gateway.receipt(&customer, &id).await;
    for time in ["created_at", "ended_at"] {
        assert_time(&receipt.as_object_mut().unwrap().remove(time).unwrap());
    }
    let hold = receipt["hold_usdc"].take().as_u64().unwrap();
    assert!((11..1_000).contains(&hold), "{hold}");
    let version = receipt["prices"]["version"].take();
    assert_eq!(version.as_str().map(str::len), Some(16), "{version}");
    let reported = receipt["usage_reported"].take();
    assert_eq!(reported["prompt_tokens"], 20);
    assert_eq!(reported.get("charged_usdc"), None);
    let hash = receipt["usage_reported_sha256"].take();
    assert_eq!(hash.as_str().map(str::len), Some(64), "{hash}");
    let signature = receipt.as_object_mut().unwrap().remove("signature").unwrap();
    assert_eq!(signature["type"], "RequestReceipt");
    assert_eq!(
        receipt,
        json!({
            "id": id, "object": "request", "wallet": customer.wallet.shown(), "api_key_id": customer.key.id,
            "model": MODEL, "provider": "openai", "upstream_model": "gpt-5-mini",
            "outcome": "settled", "reason": null,
            "usage": {"prompt_tokens": 20, "cached_tokens": 0, "completion_tokens": 9, "reasoning_tokens": 0},
            "usage_units": {"prompt_tokens": 20, "completion_tokens": 9}, "unpriced_units": [],
            "usage_reported": null, "usage_reported_sha256": null,
            "prices": {
                "unit": "USD per 1M tokens, at cost", "prompt": "0.15", "cached_prompt": "0.075", "completion": "0.6",
                "per_unit": {
                    "prompt_tokens": "0.00000015", "cached_prompt_tokens": "0.000000075",
                    "completion_tokens": "0.0000006",
                },
                "tiers": [], "images": [], "version": null,
            },
            "markup_bps": 2000, "hold_usdc": null, "cost_usd": "0.0000084", "cost_pico_usd": "8400000",
            "upstream_cost_usd": null, "charged_usdc": 11,
        })
    );
}

#[tokio::test]
async fn a_body_is_json_whatever_its_content_type_says() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream"] {
        let call =
            gateway.post("/v1/chat/completions").key(&customer.key).header("content-type", content_type);
        call.body(ask("Hello").to_string()).send().await.expect(200);
        let call = gateway.post("/v1/topup").header("content-type", content_type);
        call.body("{\"amount\": 5}").send().await.expect(402);
        let body = gateway.sign_in(&TestWallet::random()).body().to_string();
        let call = gateway.post("/v1/auth/keys").header("content-type", content_type);
        call.body(body).send().await.expect(201);
    }
    let call = gateway.post("/v1/chat/completions").key(&customer.key);
    call.body(ask("Hello").to_string()).send().await.expect(200);
}

#[tokio::test]
async fn a_request_at_fault_is_told_which_field() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let with = |member: &str, value: Value| {
        let mut body = ask("Hello");
        body[member] = value;
        body
    };
    let without = |member: &str| {
        let mut body = ask("Hello");
        body.as_object_mut().unwrap().remove(member);
        body
    };
    for (body, status, code, param) in [
        (without("model"), 400, "missing_required_parameter", Some("model")),
        (without("messages"), 400, "missing_required_parameter", Some("messages")),
        (with("model", Value::Null), 400, "missing_required_parameter", Some("model")),
        (with("model", json!(5)), 400, "invalid_value", Some("model")),
        (with("model", json!("openai/gpt-0")), 404, "model_not_found", Some("model")),
        (with("model", json!("gpt-5-mini")), 404, "model_not_found", Some("model")),
        (with("messages", json!([])), 400, "invalid_value", Some("messages")),
        (with("messages", json!("Hello")), 400, "invalid_value", Some("messages")),
        (with("messages", json!(["Hello"])), 400, "invalid_value", Some("messages[0]")),
        (
            with("messages", json!([{"role": "user", "content": 5}])),
            400,
            "invalid_value",
            Some("messages[0]"),
        ),
        (with("max_tokens", json!(0)), 400, "invalid_value", Some("max_tokens")),
        (with("max_tokens", json!(-1)), 400, "invalid_value", Some("max_tokens")),
        (with("max_tokens", json!("64")), 400, "invalid_value", Some("max_tokens")),
        (with("max_tokens", json!(1.5)), 400, "invalid_value", Some("max_tokens")),
        (with("max_tokens", json!(16_385)), 400, "invalid_value", Some("max_tokens")),
        (with("max_tokens", json!(u64::MAX)), 400, "invalid_value", Some("max_tokens")),
        (with("max_completion_tokens", json!(65)), 400, "invalid_value", Some("max_tokens")),
        (with("n", json!(0)), 400, "invalid_value", Some("n")),
        (with("n", json!("two")), 400, "invalid_value", Some("n")),
        (with("stream", json!("yes")), 400, "invalid_value", Some("stream")),
        (with("stream_options", json!(true)), 400, "invalid_value", Some("stream_options")),
        (with("reasoning_effort", json!("low")), 400, "unsupported_parameter", Some("reasoning_effort")),
        (with("thinking", json!({"type": "enabled"})), 400, "unsupported_parameter", Some("thinking")),
        (json!([]), 400, "invalid_json", None),
        (json!("Hello"), 400, "invalid_json", None),
    ] {
        let answer = gateway.chat(&customer, &body).await;
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        let error = answer.error(status, code);
        assert_eq!(error["param"], param.map_or(Value::Null, Value::from), "{body}");
    }
    for raw in ["", "{", "{\"model\":", "{}x", "{\"a\":1}{\"a\":2}"] {
        let call = gateway.post("/v1/chat/completions").key(&customer.key).body(raw);
        assert_eq!(call.send().await.status, 400, "{raw}");
    }
    // A reader that takes the first and one that takes the last must not differ over the price.
    let twice = r#"{"model":"openai/gpt-5-mini","max_tokens":1,"messages":[{"role":"user","content":"Hi"}],"max_tokens":16000}"#;
    let call = gateway.post("/v1/chat/completions").key(&customer.key).body(twice);
    assert_eq!(call.send().await.error(400, "invalid_value")["param"], "max_tokens");
    // None of these cost anything or left anything behind.
    assert_eq!(gateway.balance(&customer.wallet).await.available, 1_000_000);
    let requests = gateway.get("/v1/requests").key(&customer.key).send().await.expect(200).json();
    assert_eq!(requests["data"], json!([]));
}

#[tokio::test]
async fn a_models_own_limit_is_the_default_where_it_is_lower() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let mut body = ask("Hello");
    body["model"] = SMALL.into();
    body["max_tokens"] = 101.into();
    gateway.chat(&customer, &body).await.error(400, "invalid_value");
    body["max_tokens"] = 100.into();
    gateway.chat(&customer, &body).await.expect(200);
    body.as_object_mut().unwrap().remove("max_tokens");
    gateway.chat(&customer, &body).await.expect(200);
}

#[tokio::test]
async fn an_empty_balance_is_told_what_it_affords() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let request = |max_tokens: u64| {
        let mut body = ask("Hello");
        body["model"] = DEAR.into();
        body["max_tokens"] = max_tokens.into();
        body
    };
    let answer = gateway.chat(&customer, &request(16_384)).await;
    let error = answer.error(402, "insufficient_balance");
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    let message = error["message"].as_str().unwrap();
    let numbers: Vec<&str> = message
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .filter(|part| part.starts_with(|c: char| c.is_ascii_digit()))
        .collect();
    let [required, available, affordable] = numbers[..] else { panic!("not three numbers: {message}") };
    assert_eq!(micro(available), 1_000_000, "{message}");
    let affordable: u64 = affordable.parse().unwrap();
    // The header asks for exactly what is missing …
    let terms = answer.decoded("payment-required");
    assert_eq!(terms["error"], "insufficient_balance");
    let missing = micro(required) - micro(available);
    assert_eq!(terms["accepts"], json!([terms_v2(&gateway, missing)]));
    assert_eq!(terms["resource"]["url"], gateway.url("/v1/chat/completions"));
    // … but not for less than the least that is taken at once.
    let answer = gateway.chat(&customer, &request(affordable + 1)).await;
    answer.error(402, "insufficient_balance");
    assert_eq!(answer.decoded("payment-required")["accepts"][0]["amount"], "10000");
    // What is said to be affordable is, to the token.
    let answer = gateway.chat(&customer, &request(affordable)).await.expect(200);
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    let hold = receipt["hold_usdc"].as_u64().unwrap();
    assert!(hold <= 1_000_000 && hold + 1_200 > 1_000_000, "{hold}");

    // With several choices each may have that many.
    let customer = gateway.customer("1").await;
    let mut body = request(16_384);
    body["n"] = 3.into();
    let text = gateway.chat(&customer, &body).await.error(402, "insufficient_balance")["message"].to_string();
    let digits: String =
        text.split("affords is ").nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
    let mut affordable = request(digits.parse().unwrap());
    affordable["n"] = 3.into();
    gateway.chat(&customer, &affordable).await.expect(200);

    // A wallet that never paid affords nothing, and is told so in the same shape.
    let poor = gateway.customer("0").await;
    let answer = gateway.chat(&poor, &ask("Hello")).await;
    answer.error(402, "insufficient_balance");
    assert_eq!(answer.decoded("payment-required")["accepts"][0]["amount"], "10000");
}

#[tokio::test]
async fn the_most_a_request_can_cost_is_held() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let hold_for = async |body: Value| {
        let answer = gateway.chat(&customer, &body).await.expect(200);
        let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
        receipt["hold_usdc"].as_u64().unwrap()
    };
    // Text: no more tokens than bytes, and a few for each message. 64 × 0.60 × 1.2 = 46.08.
    let short = hold_for(ask("Hello")).await;
    assert!((46 + 1..46 + 30).contains(&short), "{short}");
    let long = hold_for(ask(&"x".repeat(10_000))).await;
    assert!((short + 1_700..short + 2_000).contains(&long), "{short}, {long}");
    let mut three = ask("Hello");
    three["n"] = 3.into();
    let three = hold_for(three).await;
    assert!((short + 91..=short + 94).contains(&three), "{short}, {three}");
    // The default limit: (1024 − 64) × 0.60 × 1.2 = 691.2 more.
    let mut unlimited = ask("Hello");
    unlimited.as_object_mut().unwrap().remove("max_tokens");
    let unlimited = hold_for(unlimited).await;
    assert!((short + 690..=short + 692).contains(&unlimited), "{short}, {unlimited}");
    // Sixty bytes may name a picture of any size: ⌈(128000 × 0.15 + 64 × 0.60) × 1.2⌉.
    let picture = json!([
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    ]);
    let mut pictured = ask("");
    pictured["messages"][0]["content"] = picture;
    assert_eq!(hold_for(pictured).await, 23_087);
}

#[tokio::test]
async fn what_has_no_price_is_refused() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    for (field, value) in [
        ("service_tier", json!("priority")),
        ("modalities", json!(["text", "audio"])),
        ("audio", json!({"voice": "alloy", "format": "wav"})),
        ("web_search_options", json!({})),
        ("tools", json!([{"type": "web_search"}])),
    ] {
        let mut body = ask("Hello");
        body[field] = value;
        let answer = gateway.chat(&customer, &body).await;
        assert_eq!(answer.error(400, "unsupported_parameter")["param"], field);
    }
}

#[tokio::test]
async fn an_upload_above_the_limit_is_413() {
    let setup = Setup { top: "max_body_mb = 1".into(), ..Setup::usual() };
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("1").await;
    let fill = |bytes: usize| {
        let mut body = ask("");
        let empty = body.to_string().len();
        body["messages"][0]["content"] = "x".repeat(bytes - empty).into();
        body.to_string()
    };
    let limit = 1 << 20;
    let call = gateway.post("/v1/chat/completions").key(&customer.key).body(fill(limit));
    call.send().await.expect(200);
    let call = gateway.post("/v1/chat/completions").key(&customer.key).body(fill(limit + 1));
    call.send().await.error(413, "body_too_large");
    // Without a Content-Length as well.
    let pieces = (0..20).map(|_| Ok::<_, std::io::Error>(vec![b'x'; 64 << 10]));
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    let call = gateway.post("/v1/chat/completions").key(&customer.key).body(body);
    call.send().await.error(413, "body_too_large");
    let call = gateway.post("/v1/auth/keys").body("x".repeat(limit + 1));
    call.send().await.error(413, "body_too_large");
    let call = gateway.post("/v1/topup").body("x".repeat(limit + 1));
    call.send().await.error(413, "body_too_large");
}

#[tokio::test]
async fn a_refusal_can_be_read_after_a_large_body_was_sent() {
    let setup = Setup { top: "max_body_mb = 4".into(), ..Setup::usual() };
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("0").await;
    let key = format!("x-api-key: {}\r\n", customer.key.secret);
    // Whoever hangs up on what is still being sent resets the connection, and the answer with it:
    // then a client reports a broken pipe where it should say what was wrong.
    for (path, headers, megabytes, status) in [
        ("/v1/chat/completions", "", 3, "400"),
        ("/v1/chat/completions", "x-api-key: sk-wrong\r\n", 3, "401"),
        ("/v1/chat/completions", key.as_str(), 6, "413"),
        ("/v1/nope", "", 3, "404"),
        ("/v1/models", "", 3, "405"),
    ] {
        let what = format!("{status} for {path}");
        let answer = in_time(&what, send_all_then_read(&gateway, path, headers, megabytes << 20)).await;
        let answer = answer.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {answer:?}");
    }
}

/// Asks as a simple client does, which listens when it has said everything.
async fn send_all_then_read(
    gateway: &Gateway,
    path: &str,
    headers: &str,
    bytes: usize,
) -> std::io::Result<String> {
    let mut connection = TcpStream::connect(&gateway.host).await?;
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: {}\r\n{headers}content-length: {bytes}\r\n\r\n", gateway.host);
    connection.write_all(head.as_bytes()).await?;
    connection.write_all(&vec![b'x'; bytes]).await?;
    let mut answer = vec![0; 64];
    let length = connection.read(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

// --- Usage and receipts ---

#[tokio::test]
async fn usage_is_counted_by_key() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let second = Customer { key: gateway.key_for(&customer.wallet).await, ..customer.clone() };
    let unused = gateway.key_for(&customer.wallet).await;
    for _ in 0..2 {
        gateway.chat(&customer, &ask("Hello")).await.expect(200);
    }
    gateway.chat(&second, &ask("[tool] Hello")).await.expect(200);
    // Upstream errors are not usage.
    gateway.chat(&second, &ask("[broken]")).await.expect(502);
    let path = format!("/v1/auth/keys/{}", second.key.id);
    gateway.delete(&path).json(&gateway.sign_in(&customer.wallet).body()).send().await.expect(200);

    // 40 and 15 tokens cost 15 micro-USD, which is charged as 18; 20 and 9 cost 8.4, charged as 11.
    let path = format!("/v1/usage/{}", customer.wallet.address());
    let answer = gateway.get(&path).key(&customer.key).send().await.expect(200);
    let row = |key: i64, count: u64, prompt: u64, completion: u64, charged: u64, revenue: Value| {
        json!({
            "api_key_id": key, "label": null, "request_count": count, "total_prompt_tokens": prompt,
            "total_completion_tokens": completion, "total_charged_usdc": charged,
            "total_platform_revenue_usd": revenue,
        })
    };
    let usage = answer.json();
    assert_eq!(
        usage,
        json!({
            "wallet": customer.wallet.shown(), "balance_usdc": 1_000_000 - 40, "locked_usdc": 0,
            "available_usdc": 1_000_000 - 40,
            "keys": [
                // Twice 2.6 is 5.2: rounded once, not twice 3.
                row(customer.key.id, 2, 40, 18, 22, json!(0.000_005)),
                // Revoked, and still there.
                row(second.key.id, 1, 40, 15, 18, json!(0.000_003)),
                row(unused.id, 0, 0, 0, 0, json!(0)),
            ],
        }),
        "{}",
        answer.text()
    );
    // The wallet's signature reads the same, in any case of the address.
    let lower = customer.wallet.address().to_string().to_lowercase();
    let path = format!("/v1/usage/{lower}{}", gateway.sign_in(&customer.wallet).query());
    assert_eq!(gateway.get(&path).send().await.expect(200).json(), usage);

    let other = TestWallet::random();
    let path = format!("/v1/usage/{}", other.address());
    gateway.get(&path).key(&customer.key).send().await.error(403, "not_your_wallet");
    let path = format!("/v1/usage/{}{}", customer.wallet.address(), gateway.sign_in(&other).query());
    gateway.get(&path).send().await.error(403, "not_your_wallet");
    gateway.audit();
}

#[tokio::test]
async fn receipts_are_the_payers_and_come_in_pages() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
        ids.insert(0, answer.header("x-request-id").unwrap().to_owned());
    }
    let page = async |query: &str| {
        gateway.get(&format!("/v1/requests{query}")).key(&customer.key).send().await.expect(200).json()
    };
    let ids_of = |page: &Value| -> Vec<String> {
        page["data"].as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids_of(&page("").await), ids);
    let mut seen = Vec::new();
    let mut query = "?limit=2".to_owned();
    loop {
        let page = page(&query).await;
        seen.extend(ids_of(&page));
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        query = format!("?limit=2&cursor={cursor}");
    }
    assert_eq!(seen, ids);
    // One read alone is the one in the list, and signed.
    let mut alone = gateway.receipt(&customer, &ids[0]).await;
    assert!(alone.as_object_mut().unwrap().remove("signature").is_some());
    assert_eq!(alone, page("?limit=1").await["data"][0]);

    let stranger = gateway.customer("0").await;
    let path = format!("/v1/requests/{}", ids[0]);
    gateway.get(&path).key(&stranger.key).send().await.error(404, "request_not_found");
    gateway.get("/v1/requests/req_none").key(&customer.key).send().await.error(404, "request_not_found");
    assert_eq!(gateway.get("/v1/requests").key(&stranger.key).send().await.json()["data"], json!([]));
    let path = format!("/v1/requests/{}{}", ids[0], gateway.sign_in(&customer.wallet).query());
    gateway.get(&path).send().await.expect(200);
}

#[tokio::test]
async fn an_upstreams_error_leaves_a_receipt_that_charges_nothing() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let answer = gateway.chat(&customer, &ask("[broken]")).await.expect(502);
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    assert_eq!(receipt["outcome"], "released");
    assert_eq!(receipt["charged_usdc"], 0);
    assert_eq!(receipt["cost_usd"], "0");
    assert!(receipt["reason"].is_string(), "{receipt}");
}

// --- Browsers ---

#[tokio::test]
async fn a_preflight_allows_what_it_is_asked_for() {
    let gateway = Gateway::usual().await;
    let asked = "authorization, content-type, x-payment, x-stainless-lang, access-control-expose-headers";
    for (path, method) in [
        ("/v1/chat/completions", "POST"),
        ("/v1/topup", "POST"),
        ("/v1/auth/keys/1", "DELETE"),
        ("/v1/usage/0x0", "GET"),
        ("/v1/nope", "POST"),
    ] {
        let call = gateway.request(Method::OPTIONS, path).header("origin", "https://dapp.example");
        let call = call.header("access-control-request-method", method);
        let answer = call.header("access-control-request-headers", asked).send().await.expect(200);
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"), "{path}");
        let allowed = answer.header("access-control-allow-headers").unwrap().to_lowercase();
        for name in asked.split(", ") {
            assert!(allowed.contains(name), "{path}: {name} is not in {allowed}");
        }
        assert!(answer.header("access-control-allow-methods").unwrap().contains(method), "{path}");
    }
}

#[tokio::test]
async fn scripts_may_read_the_headers_of_every_answer() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let poor = gateway.customer("0").await;
    let call = |call: crate::support::gateway::Call| call.header("origin", "https://dapp.example").send();
    let chat = |customer: &Customer, body: &Value| {
        gateway.post("/v1/chat/completions").key(&customer.key).json(body)
    };
    for (status, answer) in [
        (200, call(gateway.get("/health")).await),
        (200, call(chat(&customer, &ask("Hello"))).await),
        (200, call(chat(&customer, &ask_stream("Hello"))).await),
        (402, call(gateway.post("/v1/topup").json(&json!({"amount": 5}))).await),
        (402, call(chat(&poor, &ask("Hello"))).await),
        (401, call(gateway.get("/v1/requests")).await),
        (404, call(gateway.get("/v1/nope")).await),
        (405, call(gateway.get("/v1/topup")).await),
        (502, call(chat(&customer, &ask("[broken]"))).await),
    ] {
        assert_eq!(answer.status, status, "{answer:?}");
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"), "{answer:?}");
        let exposed = answer.header("access-control-expose-headers").unwrap().to_lowercase();
        let exposed: Vec<_> = exposed.split(',').map(str::trim).collect();
        for name in EXPOSED {
            assert!(exposed.contains(&name), "{name} is not in {exposed:?}");
        }
    }
}

#[tokio::test]
async fn origins_can_be_limited() {
    let setup = Setup { top: "cors_origins = [\"https://dapp.example\"]".into(), ..Setup::usual() };
    let gateway = Gateway::start_with(setup).await;
    let allowed = async |origin: &str| {
        let answer = gateway.get("/v1/models").header("origin", origin).send().await.expect(200);
        answer.header("access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(allowed("https://dapp.example").await.as_deref(), Some("https://dapp.example"));
    assert_eq!(allowed("https://evil.example").await, None);
}

// --- What must not be seen ---

#[tokio::test]
async fn no_secret_is_in_the_logs() {
    for format in ["text", "json"] {
        let mut setup = Setup { top: format!("log_format = \"{format}\""), ..Setup::usual() };
        setup.env.push(("FAREBOX_LOG".into(), "farebox=trace,info".into()));
        let gateway = Gateway::start_with(setup).await;
        let customer = gateway.customer("1").await;
        let payment = customer.wallet.authorization(gateway.setup.pay_to, 1_000_000).sign();
        gateway.post("/v1/topup").header("x-payment", &payment.v2_header()).send().await.expect(402);
        gateway.chat(&customer, &ask("Hello")).await.expect(200);
        gateway.chat(&customer, &ask("[denied] what I ask is mine")).await.expect(502);
        gateway.chat(&customer, &ask("[bad-request]")).await.expect(400);
        let signed = gateway.sign_in(&customer.wallet);
        let usage = format!("/v1/usage/{}{}", customer.wallet.address(), signed.query());
        gateway.get(&usage).send().await.expect(200);
        gateway.get(&usage.replace("&signature=0x", "&signature=0x00")).send().await.expect(401);
        let wrong_key = format!("sk-{}", "5ec4e7".repeat(11));
        gateway.get("/v1/requests").header("x-api-key", &wrong_key).send().await.expect(401);

        let logs = gateway.logs();
        assert!(logs.contains("/v1/chat/completions"), "nothing is logged: {logs}");
        let relayer = gateway.setup.relayer.private_key();
        let signature = payment.payload["signature"].as_str().unwrap().to_owned();
        for (what, secret) in [
            ("an API key", &customer.key.secret[3..]),
            ("a wrong API key", &wrong_key[3..]),
            ("the relayer's key", &relayer[2..]),
            ("the upstream's key", UPSTREAM_KEY),
            ("a sign-in's signature", &signed.signature[2..]),
            ("a payment's signature", &signature[2..]),
            ("a payment", payment.v2_header().as_str()),
            ("a question", "what I ask is mine"),
        ] {
            assert!(!logs.contains(secret), "{what} is in the logs ({format}): {logs}");
        }
        if format == "json" {
            for line in logs.lines().filter(|line| !line.starts_with("farebox listens")) {
                serde_json::from_str::<Value>(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            }
        }
    }
}

#[tokio::test]
async fn metrics_are_served_on_their_own_address() {
    let port = crate::support::free_port();
    let setup = Setup { top: format!("metrics_listen = \"127.0.0.1:{port}\""), ..Setup::usual() };
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("1").await;
    gateway.chat(&customer, &ask("Hello")).await.expect(200);
    gateway.get("/metrics").send().await.error(404, "not_found");
    let url = format!("http://127.0.0.1:{port}/metrics");
    // The relayers' gas is looked at in the background.
    let text = eventually("the relayer's gas is shown", async || {
        let answer = crate::support::http_client().get(&url).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        Some(answer.text().await.unwrap()).filter(|text| text.contains("farebox_relayer_gas_gwei"))
    })
    .await;
    for name in [
        "farebox_http_requests_total",
        "farebox_holds_ended_total",
        "farebox_charged_micro_total",
        "farebox_tokens_total",
        "farebox_upstream_seconds",
        "farebox_ledger_seconds",
        "farebox_relayer_gas_gwei",
        "farebox_open_holds",
    ] {
        assert!(text.contains(name), "no {name} in {text}");
    }
    assert!(
        text.lines().any(|line| line.starts_with("farebox_charged_micro_total{") && line.ends_with(" 11")),
        "{text}"
    );
    assert!(!text.contains(&customer.wallet.shown()), "metrics name wallets");
}

#[test]
fn the_token_here_is_the_token_there() {
    assert_eq!(chain::USDC.to_string(), USDC);
}
