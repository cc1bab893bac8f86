//! What an upstream can do wrong, and what comes of it: a status, a code, a charge, a hold's end.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::chain::TestChain;
use crate::support::eventually;
use crate::support::gateway::{
    Customer, Gateway, MODEL, REASONING, SMALL, STRIPPED, Setup, UPSTREAM_KEY, ask, ask_stream,
};
use crate::support::upstream::{Script, ScriptedUpstream, completion, error, usage};

const BALANCE: u64 = 1_000_000;

async fn scripted() -> (Gateway, ScriptedUpstream, Customer) {
    let upstream = ScriptedUpstream::start().await;
    let mut setup = Setup::new(&TestChain::shared(), &upstream.base_url);
    setup.first_byte_timeout_s = 1;
    setup.idle_timeout_s = 1;
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("1").await;
    (gateway, upstream, customer)
}

/// An upstream's answer that is not one, and what the client gets instead.
struct Fault {
    what: &'static str,
    script: Script,
    status: u16,
    /// Only where the request is not to blame: of those the text is ours.
    message: Option<&'static str>,
    retry_after: Option<&'static str>,
}

fn fault(what: &'static str, script: Script, status: u16) -> Fault {
    Fault { what, script, status, message: None, retry_after: None }
}

fn faults_before_an_answer() -> Vec<Fault> {
    let json_error = |status: u16, code: &str| Script::json(status, &error("Upstream says: no.", code));
    let limited = |headers: &[(&str, &str)]| {
        Script::answer(429, headers, error("Slow down.", "rate_limit_exceeded").to_string())
    };
    let leak = error(&format!("Incorrect API key provided: {UPSTREAM_KEY}."), "invalid_api_key");
    let told = Some("Upstream says: no.");
    vec![
        Fault { message: told, ..fault("400", json_error(400, "invalid_value"), 400) },
        Fault { message: told, ..fault("413", json_error(413, "too_large"), 413) },
        Fault { message: told, ..fault("422", json_error(422, "unprocessable"), 422) },
        fault("400 without a message", Script::answer(400, &[], "no"), 400),
        fault("401", Script::json(401, &leak), 502),
        fault("402", json_error(402, "payment_required"), 502),
        fault("403", json_error(403, "forbidden"), 502),
        fault("404", json_error(404, "model_not_found"), 502),
        fault("408", json_error(408, "timeout"), 502),
        fault("418", json_error(418, "teapot"), 502),
        Fault { retry_after: Some("7"), ..fault("429", limited(&[("retry-after", "7")]), 429) },
        fault("429 without Retry-After", limited(&[]), 429),
        fault("429 of an empty account", json_error(429, "insufficient_quota"), 502),
        fault("500", json_error(500, "server_error"), 502),
        fault("502", Script::answer(502, &[("content-type", "text/html")], "<html>"), 502),
        fault("503", json_error(503, "overloaded"), 502),
        fault("529", json_error(529, "overloaded"), 502),
        fault("a redirect", Script::answer(302, &[("location", "http://127.0.0.1:9/")], ""), 502),
        fault("204", Script::answer(204, &[], ""), 502),
        fault("a page", Script::answer(200, &[("content-type", "text/html")], "<html>Login</html>"), 502),
        fault("an error in a 200", Script::json(200, &error("overloaded", "overloaded")), 502),
        fault("JSON that is no answer", Script::json(200, &json!({"hello": 1})), 502),
        fault("a list", Script::json(200, &json!([1])), 502),
        fault("an empty body", Script::json(200, &Value::Null), 502),
        fault("half an answer", Script::stream_of_type("application/json").raw("{\"choices\":["), 502),
        fault("a hang-up", Script::hang_up(), 502),
        fault("silence", Script::hang_up().silence(Duration::from_secs(600)), 504),
        fault(
            "silence in the middle",
            Script::stream_of_type("application/json")
                .raw("{\"choices\":[")
                .silence(Duration::from_secs(600)),
            504,
        ),
    ]
}

#[tokio::test]
async fn a_fault_before_an_answer_costs_nothing() {
    let (gateway, upstream, customer) = scripted().await;
    for Fault { what, script, status, message, retry_after } in faults_before_an_answer() {
        upstream.play(script);
        let answer = gateway.chat(&customer, &ask("Hello")).await;
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        let code = answer.json()["error"]["code"].as_str().unwrap().to_owned();
        let error = answer.error(status, &code);
        let text = error["message"].as_str().unwrap();
        match message {
            Some(message) => assert!(text.contains(message), "{what}: {text}"),
            None => assert!(!text.contains("Upstream says"), "{what}: {text}"),
        }
        assert!(!answer.text().contains(UPSTREAM_KEY), "{what}: {answer:?}");
        if status == 429 {
            let seconds = answer.number("retry-after").to_string();
            assert_eq!(seconds, retry_after.map_or(seconds.clone(), str::to_owned), "{what}");
        }
        let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
        assert_eq!(
            (&receipt["outcome"], &receipt["charged_usdc"]),
            (&json!("released"), &json!(0)),
            "{what}"
        );
        let balance = gateway.balance(&customer.wallet).await;
        assert_eq!((balance.balance, balance.locked), (BALANCE, 0), "{what}");
    }
    gateway.audit();
}

#[tokio::test]
async fn a_fault_before_a_stream_is_an_answer_with_a_status() {
    let (gateway, upstream, customer) = scripted().await;
    let of_streams = |fault: &Fault| !fault.what.contains("answer") && !fault.what.contains("middle");
    let whole_answer =
        fault("an answer in place of a stream", Script::json(200, &completion(Some(usage(20, 9)))), 502);
    let html = Script::stream_of_type("text/html").raw("data: {}\n\n").done();
    let wrong_type = fault("a stream of another type", html, 502);
    let faults = faults_before_an_answer().into_iter().filter(of_streams);
    for Fault { what, script, status, .. } in faults.chain([whole_answer, wrong_type]) {
        upstream.play(script);
        let answer = gateway.chat(&customer, &ask_stream("Hello")).await;
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        assert!(answer.json()["error"]["message"].is_string(), "{what}: {answer:?}");
        assert!(!answer.text().contains(UPSTREAM_KEY), "{what}: {answer:?}");
        let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
        assert_eq!(
            (&receipt["outcome"], &receipt["charged_usdc"]),
            (&json!("released"), &json!(0)),
            "{what}"
        );
    }
    let balance = gateway.balance(&customer.wallet).await;
    assert_eq!((balance.balance, balance.locked), (BALANCE, 0));
}

#[tokio::test]
async fn an_upstream_that_is_not_there_is_502() {
    let setup = Setup { upstream_url: "http://127.0.0.1:9/v1".into(), ..Setup::usual() };
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("1").await;
    for body in [ask("Hello"), ask_stream("Hello")] {
        let answer = gateway.chat(&customer, &body).await;
        answer.error(502, "upstream_unreachable");
        assert!(!answer.text().contains("127.0.0.1:9"), "{answer:?}");
    }
    assert_eq!(gateway.settled(&customer).await.balance, BALANCE);
}

#[tokio::test]
async fn an_upstreams_message_does_not_carry_its_key() {
    let (gateway, upstream, customer) = scripted().await;
    let leak = error(&format!("Bad request by {UPSTREAM_KEY}: temperature"), "invalid_value");
    upstream.play(Script::json(400, &leak));
    let answer = gateway.chat(&customer, &ask("Hello")).await.expect(400);
    assert!(answer.text().contains("temperature"), "{answer:?}");
    assert!(!answer.text().contains(UPSTREAM_KEY), "{answer:?}");
    assert!(!gateway.logs().contains(UPSTREAM_KEY));
}

#[tokio::test]
async fn an_answer_of_the_published_server_that_fails_is_told_apart() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    for (trigger, status) in [
        ("[rate-limited]", 429),
        ("[no-quota]", 502),
        ("[bad-request]", 400),
        ("[denied]", 502),
        ("[broken]", 502),
        ("[nonsense]", 502),
        ("[hang-up]", 502),
    ] {
        for body in [ask(trigger), ask_stream(trigger)] {
            let answer = gateway.chat(&customer, &body).await;
            assert_eq!(answer.status, status, "{trigger}: {answer:?}");
            assert!(!answer.text().contains("sk-upstream-secret"), "{answer:?}");
            if status == 429 {
                assert_eq!(answer.header("retry-after"), Some("7"));
            }
        }
    }
    let balance = gateway.balance(&customer.wallet).await;
    assert_eq!((balance.balance, balance.locked), (BALANCE, 0));
}

/// What is charged for a usage report, and how the hold ends.
#[tokio::test]
async fn usage_is_charged_as_it_is_reported() {
    let (gateway, upstream, customer) = scripted().await;
    let with = |prompt: u64, completion: u64, more: Value| {
        let mut usage = usage(prompt, completion);
        for (name, value) in more.as_object().unwrap() {
            usage[name] = value.clone();
        }
        usage
    };
    let cached = |tokens: u64| json!({"prompt_tokens_details": {"cached_tokens": tokens}});
    let mut spent = 0;
    for (reported, charged) in [
        (with(20, 9, json!({})), 11),
        // 10 × 0.15 + 10 × 0.075 + 9 × 0.60 = 7.65; × 1.2 = 9.18
        (with(20, 9, cached(10)), 10),
        (with(20, 9, cached(0)), 11),
        (with(20, 9, cached(20)), 9),
        // Cached tokens are some of the prompt's, so there cannot be more of them.
        (with(20, 9, cached(99)), 9),
        (with(20, 9, json!({"prompt_tokens_details": null, "completion_tokens_details": null})), 11),
        // Reasoning tokens are some of the completion's: not counted twice.
        (with(20, 9, json!({"completion_tokens_details": {"reasoning_tokens": 5}})), 11),
        (with(0, 0, json!({})), 0),
        (with(1, 0, json!({})), 1),
        (with(0, 1, json!({})), 1),
        // 25 × 0.60 × 1.2 = 18 exactly: nothing to round up.
        (with(0, 25, json!({})), 18),
    ] {
        upstream.play(Script::json(200, &completion(Some(reported.clone()))));
        let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
        assert_eq!(answer.number("x-charged-usdc"), charged, "{reported}");
        assert_eq!(answer.json()["usage"]["charged_usdc"], charged, "{reported}");
        spent += charged;
        assert_eq!(answer.number("x-balance-usdc"), BALANCE - spent, "{reported}");
        let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
        assert_eq!(receipt["outcome"], "settled", "{reported}");
        assert_eq!(receipt["usage_reported"], reported);
    }
    gateway.audit();
}

#[tokio::test]
async fn an_answer_without_usage_is_charged_at_an_estimate() {
    let (gateway, upstream, customer) = scripted().await;
    for reported in
        [None, Some(Value::Null), Some(json!({})), Some(json!("20")), Some(json!({"prompt_tokens": "x"}))]
    {
        upstream.play(Script::json(200, &completion(reported.clone())));
        let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
        let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
        assert_eq!(receipt["outcome"], "estimated", "{reported:?}: {receipt}");
        let charged = receipt["charged_usdc"].as_u64().unwrap();
        assert!(charged > 0 && charged <= receipt["hold_usdc"].as_u64().unwrap(), "{receipt}");
        assert_eq!(answer.number("x-charged-usdc"), charged);
    }
    let mut body = ask("Hello");
    body["model"] = REASONING.into();
    let answer = gateway.chat(&customer, &body).await.expect(200);
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    assert_eq!(receipt["charged_usdc"], receipt["hold_usdc"], "{receipt}");
}

#[tokio::test]
async fn nothing_is_charged_above_the_hold() {
    let (gateway, upstream, customer) = scripted().await;
    upstream.play(Script::json(200, &completion(Some(usage(1_000_000, 1_000_000)))));
    let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    assert_eq!(receipt["charged_usdc"], receipt["hold_usdc"]);
    assert_eq!(answer.number("x-charged-usdc"), receipt["hold_usdc"].as_u64().unwrap());
    eventually("the operator is told", async || gateway.logs().contains("more than its hold").then_some(()))
        .await;
    gateway.audit();
}

#[tokio::test]
async fn a_request_passes_through_but_for_what_the_contract_names() {
    let (gateway, upstream, customer) = scripted().await;
    // Spaces, escapes, number forms and members nobody has heard of.
    let sent = format!(
        r#"{{"temperature": 0.70, "messages": [ {{"role":"user","content":"caf\u00e9 ☕","x":1e2}} ],"model":"{MODEL}","seed":12345678901234567890,"x_unknown":{{"b":[1,  2],"a":null}},"stop":["\n"],"max_tokens":64}}"#
    );
    let answer =
        gateway.post("/v1/chat/completions").key(&customer.key).body(sent.clone()).send().await.expect(200);
    let received = upstream.last_received();
    let expected = sent
        .replace(r#""temperature": 0.70, "messages": "#, r#""temperature":0.70,"messages":"#)
        .replace(MODEL, "gpt-5-mini")
        .replace(r#","max_tokens":64"#, r#","max_completion_tokens":64"#);
    assert_eq!(received.text(), expected);
    assert!(received.head.starts_with("post /v1/chat/completions http/1.1"), "{}", received.head);
    assert!(received.head.contains(&format!("authorization: bearer {UPSTREAM_KEY}")), "{}", received.head);
    assert!(received.head.contains("content-type: application/json"), "{}", received.head);
    assert!(!received.head.contains(&customer.key.secret), "the client's key went on: {}", received.head);

    // And back: only the model and the charge are ours.
    let mut body = completion(Some(usage(20, 9)));
    body["model"] = MODEL.into();
    body["usage"]["charged_usdc"] = 11.into();
    assert_eq!(answer.json(), body);
    let odd = r#"{"id": "x" , "choices":[ {"index":0,"message":{"content":"\u00e9"},"p":1.50} ],"model":"m","e":1e3}"#;
    upstream.play(Script::answer(200, &[("content-type", "application/json")], odd));
    let text = gateway.chat(&customer, &ask("Hello")).await.expect(200).text();
    assert!(text.contains(r#"[ {"index":0,"message":{"content":"\u00e9"},"p":1.50} ]"#), "{text}");
    assert!(text.contains(r#""e":1e3"#), "{text}");
}

#[tokio::test]
async fn the_output_limit_goes_under_the_name_the_upstream_reads() {
    let (gateway, upstream, customer) = scripted().await;
    for (model, given, name, limit) in [
        (MODEL, Some(("max_tokens", 64)), "max_completion_tokens", 64),
        (MODEL, Some(("max_completion_tokens", 64)), "max_completion_tokens", 64),
        (MODEL, None, "max_completion_tokens", 1024),
        (SMALL, Some(("max_completion_tokens", 64)), "max_tokens", 64),
        (SMALL, Some(("max_tokens", 64)), "max_tokens", 64),
        (SMALL, None, "max_tokens", 100),
    ] {
        let mut body = json!({"model": model, "messages": [{"role": "user", "content": "Hello"}]});
        if let Some((name, limit)) = given {
            body[name] = limit.into();
        }
        gateway.chat(&customer, &body).await.expect(200);
        let sent = upstream.last_received().json();
        assert_eq!(sent[name], limit, "{model} {given:?}: {sent}");
        let other = if name == "max_tokens" { "max_completion_tokens" } else { "max_tokens" };
        assert_eq!(sent.get(other), None, "{model} {given:?}: {sent}");
    }
}

#[tokio::test]
async fn what_asks_to_reason_is_allowed_or_stripped_as_configured() {
    let (gateway, upstream, customer) = scripted().await;
    let ask_of = |model: &str| {
        let mut body = ask("Hello");
        body["model"] = model.into();
        body["reasoning_effort"] = "low".into();
        body
    };
    gateway.chat(&customer, &ask_of(REASONING)).await.expect(200);
    assert_eq!(upstream.last_received().json()["reasoning_effort"], "low");
    gateway.chat(&customer, &ask_of(STRIPPED)).await.expect(200);
    assert_eq!(upstream.last_received().json().get("reasoning_effort"), None);
    let before = upstream.received().len();
    gateway.chat(&customer, &ask_of(MODEL)).await.error(400, "unsupported_parameter");
    assert_eq!(upstream.received().len(), before, "a refused request went on");
}

#[tokio::test]
async fn a_huge_line_ends_a_stream_and_not_the_gateway() {
    let (gateway, upstream, customer) = scripted().await;
    let line = "x".repeat(1 << 20);
    let script = (0..20).fold(Script::stream().raw("data: "), |script, _| script.raw(&line));
    upstream.play(script.done());
    let answer = gateway.chat(&customer, &ask_stream("Hello")).await;
    answer.error(502, "upstream_invalid_answer");
    assert_eq!(gateway.settled(&customer).await.balance, BALANCE);
}
