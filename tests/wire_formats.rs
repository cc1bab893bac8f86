//! Chat, responses and messages over HTTP, over upstreams of every kind: what is sold, how it is named, paid for,
//! sent again, and how it fails. What the translations say is held by `formats::golden`, and by official clients in
//! `clients`.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::chain::TestChain;
use crate::support::gateway::{
    Answer, Customer, Gateway, Setup, UPSTREAM_KEY, every_kind, every_kinds_models, members, micro,
};
use crate::support::upstream::{Script, ScriptedUpstream};
use crate::support::wallet::TestWallet;

const BALANCE: u64 = 1_000_000;
/// Path, and a request for a model that says this.
type Format = (&'static str, fn(&str, &str) -> Value);

const FORMATS: [Format; 3] = [
    (
        "/v1/chat/completions",
        |model, text| json!({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 64}),
    ),
    ("/v1/responses", |model, text| json!({"model": model, "input": text, "max_output_tokens": 64})),
    (
        "/v1/messages",
        |model, text| json!({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 64}),
    ),
];

fn streamed(mut body: Value) -> Value {
    body["stream"] = true.into();
    body
}

/// Behind an upstream that does what it is told, which is a provider of every kind.
async fn scripted() -> (Gateway, ScriptedUpstream, Customer) {
    let upstream = ScriptedUpstream::start().await;
    let mut setup = every_kind(Setup::new(&TestChain::shared(), &upstream.base_url));
    setup.tables =
        setup.tables.replace("api_key_env", "first_byte_timeout_s = 1\nidle_timeout_s = 1\napi_key_env");
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("1").await;
    (gateway, upstream, customer)
}

async fn send(gateway: &Gateway, customer: &Customer, path: &str, body: &Value) -> Answer {
    gateway.post(path).key(&customer.key).json(body).send().await
}

#[tokio::test]
async fn what_is_sent_again_is_answered_again_byte_for_byte() {
    let gateway = Gateway::start_with(every_kind(Setup::usual())).await;
    let customer = gateway.customer("1").await;
    let mut spent = 0;
    for (upstream, model) in every_kinds_models() {
        for (path, body) in FORMATS {
            for body in [body(model, "Hello"), streamed(body(model, "Hello"))] {
                let key = format!("{upstream}-{path}-{}", body["stream"]);
                let ask = async || {
                    let call = gateway.post(path).key(&customer.key).header("idempotency-key", &key);
                    call.json(&body).send().await.expect(200)
                };
                let first = ask().await;
                spent += 11;
                let again = ask().await;
                assert_eq!(again.header("idempotent-replayed"), Some("true"), "{key}");
                assert_eq!(again.text(), first.text(), "{key}");
                assert_eq!(again.header("content-type"), first.header("content-type"));
                assert_eq!(again.header("x-charged-usdc"), first.header("x-charged-usdc"));
            }
        }
    }
    assert_eq!(gateway.settled(&customer).await.balance, BALANCE - spent);
    gateway.audit();
}

#[tokio::test]
async fn a_payment_buys_an_answer_in_each_format() {
    let gateway = Gateway::start_with(every_kind(Setup::usual())).await;
    for (path, body) in FORMATS {
        let wallet = TestWallet::random();
        gateway.chain().mint(wallet.address(), micro("1")).await;
        let body = body("anthropic/model", "Hello");
        let terms = gateway.post(path).json(&body).send().await.expect(402).decoded("payment-required");
        assert_eq!(terms["resource"]["url"], gateway.url(path));
        let amount: u64 = terms["accepts"][0]["amount"].as_str().unwrap().parse().unwrap();
        let payment = wallet.authorization(gateway.setup.pay_to, amount).sign();
        let paid = async || {
            let call = gateway.post(path).header("payment-signature", &payment.v2_header());
            call.json(&body).send().await.expect(200)
        };
        let (first, again) = (paid().await, paid().await);
        assert_eq!((first.number("x-charged-usdc"), again.text()), (11, first.text()));
        // For another path it is good for nothing, though the body be the same.
        let other = if path == "/v1/messages" { "/v1/chat/completions" } else { "/v1/messages" };
        let call = gateway.post(other).header("payment-signature", &payment.v2_header());
        let refused = call.json(&FORMATS[0].1("anthropic/model", "Hello")).send().await;
        assert_eq!(refused.json()["error"]["code"], "payment_already_used", "{refused:?}");
        assert_eq!(gateway.balance(&wallet).await.balance, amount - 11);
    }
    gateway.audit();
}

#[tokio::test]
async fn errors_of_messages_are_told_as_anthropic_tells_them() {
    let gateway = Gateway::start_with(every_kind(Setup::usual())).await;
    let (customer, poor) = (gateway.customer("1").await, gateway.customer("0").await);
    let told = |answer: Answer, status: u16, kind: &str, code: &str| {
        let body = answer.json();
        let id = answer.header("request-id").unwrap();
        assert_eq!((answer.status, members(&body)), (status, vec!["error", "request_id", "type"]), "{body}");
        assert_eq!(members(&body["error"]), ["code", "message", "param", "type"]);
        assert_eq!((&body["type"], &body["request_id"]), (&json!("error"), &json!(id)));
        assert_eq!((&body["error"]["type"], &body["error"]["code"]), (&json!(kind), &json!(code)), "{body}");
        assert_eq!(answer.header("x-request-id"), Some(id));
        assert_eq!(answer.header("content-type"), Some("application/json"));
    };
    let ask = FORMATS[2].1;
    for path in ["/v1/messages", "/v1/messages/count_tokens"] {
        let send = async |body: Value| send(&gateway, &customer, path, &body).await;
        let wrong = gateway.post(path).header("x-api-key", "sk-wrong").json(&ask("gemini/model", "x"));
        told(wrong.send().await, 401, "authentication_error", "invalid_api_key");
        told(send(ask("no/model", "x")).await, 404, "not_found_error", "model_not_found");
        told(
            send(json!({"model": "gemini/model"})).await,
            400,
            "invalid_request_error",
            "missing_required_parameter",
        );
        let huge = gateway.post(path).key(&customer.key).body(vec![b' '; 21 << 20]);
        told(huge.send().await, 413, "request_too_large", "body_too_large");
    }
    let mut dear = ask("openai/dear", "x");
    dear["max_tokens"] = 9000.into();
    told(send(&gateway, &poor, "/v1/messages", &dear).await, 402, "billing_error", "insufficient_balance");
    // What nobody has paid for is no error of theirs, but terms.
    let terms = gateway.post("/v1/messages").json(&ask("gemini/model", "x")).send().await.expect(402);
    assert_eq!(terms.json()["x402Version"], 1);
}

#[tokio::test]
async fn each_kind_of_upstream_is_asked_as_it_wants_to_be() {
    let (gateway, upstream, customer) = scripted().await;
    // What it answers is of no matter here; what it was asked is.
    upstream.play(Script::json(400, &json!({"error": {"message": "no"}})));
    for (model, format, path, key) in [
        ("openai/gpt-5-mini", 1, "/v1/chat/completions", "authorization: bearer "),
        ("openai/gpt-5-mini", 2, "/v1/chat/completions", "authorization: bearer "),
        ("responses/model", 0, "/v1/chat/completions", "authorization: bearer "),
        ("responses/model", 1, "/v1/responses", "authorization: bearer "),
        ("responses/model", 2, "/v1/chat/completions", "authorization: bearer "),
        ("anthropic/model", 0, "/v1/messages", "x-api-key: "),
        ("anthropic/model", 2, "/v1/messages", "x-api-key: "),
        ("gemini/model", 0, "/v1beta/models/model:generatecontent", "x-goog-api-key: "),
    ] {
        let (own, body) = FORMATS[format];
        let call = gateway.post(own).key(&customer.key).json(&body(model, "Hello"));
        let betas = "claude-code-20250219, files-api-2025-04-14,interleaved-thinking-2025-05-14,context-1m-2025-08-07";
        call.header("anthropic-beta", betas).send().await.expect(400);
        let received = upstream.last_received();
        let head = received.head.to_ascii_lowercase();
        assert!(head.starts_with(&format!("post {path} http/1.1\r\n")), "{own} for {model}: {head}");
        assert!(head.contains(&format!("\r\n{key}{}\r\n", UPSTREAM_KEY.to_ascii_lowercase())), "{head}");
        assert_eq!(head.matches(&UPSTREAM_KEY.to_ascii_lowercase()).count(), 1, "{head}");
        assert_eq!(
            head.contains("\r\nanthropic-version: 2023-06-01\r\n"),
            model == "anthropic/model",
            "{head}"
        );
        // A client's own wishes pass where its own format is spoken, if they cost nothing.
        let passed = "\r\nanthropic-beta: claude-code-20250219,interleaved-thinking-2025-05-14\r\n";
        assert_eq!(head.contains("anthropic-beta"), model == "anthropic/model" && format == 2, "{head}");
        assert_eq!(head.contains(passed), model == "anthropic/model" && format == 2, "{head}");
    }
    let count = gateway.post("/v1/messages/count_tokens").key(&customer.key);
    upstream.play(Script::json(200, &json!({"input_tokens": 4711})));
    let counted = count.json(&FORMATS[2].1("anthropic/model", "Hello")).send().await.expect(200);
    assert_eq!(counted.json(), json!({"input_tokens": 4711}));
    assert!(upstream.last_received().head.starts_with("post /v1/messages/count_tokens "));
    assert_eq!(gateway.settled(&customer).await.balance, BALANCE);
}

/// The beginning of a stream of each kind of upstream, without its end, and what was said of usage in it.
fn begun(provider: &str) -> (Script, u64, u64) {
    let script = Script::stream();
    match provider {
        "openai" => {
            let chunk = json!({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "12345678"}}]});
            (script.event(&chunk), 0, 0)
        }
        "responses" => {
            let delta = json!({"type": "response.output_text.delta", "item_id": "i", "output_index": 0, "content_index": 0, "delta": "12345678", "sequence_number": 1});
            (script.raw(&format!("event: response.output_text.delta\ndata: {delta}\n\n")), 0, 0)
        }
        "anthropic" => {
            let start = json!({"type": "message_start", "message": {"type": "message", "role": "assistant", "content": [], "usage": {"input_tokens": 40, "output_tokens": 1}}});
            let block = json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}});
            let delta = json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "12345678"}});
            let script =
                [("message_start", start), ("content_block_start", block), ("content_block_delta", delta)]
                    .into_iter()
                    .fold(script, |script, (name, data)| {
                        script.raw(&format!("event: {name}\ndata: {data}\n\n"))
                    });
            (script, 40, 1)
        }
        _ => {
            let piece = json!({"candidates": [{"content": {"role": "model", "parts": [{"text": "12345678"}]}, "index": 0}],
                "usageMetadata": {"promptTokenCount": 40, "candidatesTokenCount": 1, "totalTokenCount": 41}});
            (script.event(&piece), 40, 1)
        }
    }
}

/// A fault in mid-stream is told in the client's format, what was delivered is paid for, and nothing stays locked.
#[tokio::test]
async fn a_stream_that_fails_half_way_ends_in_an_error_of_the_clients_format() {
    let (gateway, upstream, customer) = scripted().await;
    for (provider, model) in every_kinds_models() {
        for (path, body) in FORMATS {
            // Only a client of its own format is answered as `/responses` answers.
            let spoken = if provider == "responses" && path != "/v1/responses" { "openai" } else { provider };
            let (begun, prompt, _) = begun(spoken);
            // Longer than any event may be; once is enough.
            let huge =
                || (0..20).fold(begun.clone().raw("data: "), |script, _| script.raw(&"x".repeat(1 << 20)));
            let huge = (path == "/v1/messages").then(huge).map(|script| ("a huge line", script));
            for (what, script) in [
                ("cut", begun.clone()),
                ("nonsense", begun.clone().raw("data: <html>\n\n").end()),
                ("silence", begun.clone().silence(Duration::from_secs(600))),
            ]
            .into_iter()
            .chain(huge)
            {
                upstream.play(script);
                let what = format!("{path} over {provider}, {what}");
                let answer =
                    send(&gateway, &customer, path, &streamed(body(model, "Hello"))).await.expect(200);
                let text = answer.text();
                assert!(text.contains("12345678") && text.contains("stream_failed"), "{what}: {text}");
                let ends = ["[DONE]", "message_stop", "response.completed"];
                assert!(!ends.iter().any(|end| text.contains(end)), "{what}: {text}");
                let last = text.trim_end().rsplit("\n\n").next().unwrap().to_owned();
                let data: Value = serde_json::from_str(last.rsplit_once("data: ").unwrap().1).unwrap();
                match path {
                    "/v1/chat/completions" => assert_eq!(members(&data), ["error"], "{what}"),
                    _ => {
                        assert!(last.starts_with("event: error\n"), "{what}: {last}");
                        assert_eq!(data["type"], "error", "{what}");
                    }
                }
                let receipt =
                    gateway.receipt_in_time(&customer, answer.header("x-request-id").unwrap()).await;
                assert_eq!(receipt["outcome"], "estimated", "{what}: {receipt}");
                // Two tokens were delivered, as far as eight letters say; the prompt is as reported, or estimated.
                let used = &receipt["usage"];
                assert_eq!(used["completion_tokens"], 2, "{what}: {receipt}");
                if prompt > 0 {
                    assert_eq!(used["prompt_tokens"], prompt, "{what}: {receipt}");
                }
            }
        }
    }
    assert_eq!(gateway.settled(&customer).await.locked, 0);
    gateway.audit();
}

/// What a model thought is held for, reported and charged as the provider says, and shown on the receipt.
#[tokio::test]
async fn reasoning_is_passed_on_held_for_and_shown() {
    let upstream = ScriptedUpstream::start().await;
    let mut setup = every_kind(Setup::new(&TestChain::shared(), &upstream.base_url));
    setup.tables =
        setup.tables.replace("max_output_tokens = 16384", "max_output_tokens = 16384\nreasoning = \"allow\"");
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("1").await;

    // Of chat's effort Anthropic's thinking is made.
    let mut body = FORMATS[0].1("anthropic/model", "Hello");
    body["max_tokens"] = 4000.into();
    body["reasoning_effort"] = "low".into();
    upstream.play(Script::json(
        200,
        &json!({
            "type": "message", "role": "assistant", "stop_reason": "end_turn",
            "content": [
                {"type": "thinking", "thinking": "Well.", "signature": "c2ln"},
                {"type": "text", "text": "Hi."},
            ],
            "usage": {"input_tokens": 20, "output_tokens": 900, "output_tokens_details": {"thinking_tokens": 880}},
        }),
    ));
    let answer = send(&gateway, &customer, "/v1/chat/completions", &body).await.expect(200);
    let asked = upstream.last_received().json();
    assert!(asked["thinking"].is_object() || asked["output_config"]["effort"] == "low", "{asked}");
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "Hi.");
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    // (20 × 0.15 + 900 × 0.60) × 1.2 = 651.6.
    assert_eq!(
        (&receipt["charged_usdc"], &receipt["usage"]["completion_tokens"]),
        (&json!(652), &json!(900))
    );
    assert!(receipt["hold_usdc"].as_u64().unwrap() >= 2880, "{receipt}");

    // Of Anthropic's thinking OpenAI's effort is made; what it thought is in the completion and on the receipt.
    let mut body = FORMATS[2].1("openai/reasoning", "Hello");
    body["max_tokens"] = 4000.into();
    body["thinking"] = json!({"type": "enabled", "budget_tokens": 2000});
    upstream.play(Script::json(
        200,
        &json!({
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 900, "total_tokens": 920,
                "completion_tokens_details": {"reasoning_tokens": 880}},
        }),
    ));
    let answer = send(&gateway, &customer, "/v1/messages", &body).await.expect(200);
    assert!(upstream.last_received().json()["reasoning_effort"].is_string());
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    assert_eq!((&receipt["charged_usdc"], &receipt["usage"]["reasoning_tokens"]), (&json!(652), &json!(880)));

    // Where the operator does not allow it, it is refused by name, in each format.
    for (path, body, field) in [
        ("/v1/chat/completions", json!({"reasoning_effort": "low"}), "reasoning_effort"),
        ("/v1/responses", json!({"reasoning": {"effort": "low"}}), "reasoning"),
        ("/v1/messages", json!({"thinking": {"type": "enabled", "budget_tokens": 2000}}), "thinking"),
    ] {
        let (_, ask) = FORMATS.into_iter().find(|(other, _)| *other == path).unwrap();
        let mut asked = ask("openai/gpt-5-mini", "Hello");
        asked.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        if path == "/v1/messages" {
            asked["max_tokens"] = 4000.into();
        }
        let refused = send(&gateway, &customer, path, &asked).await.expect(400);
        let error = refused.json()["error"].clone();
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("unsupported_parameter"), &json!(field)),
            "{error}"
        );
    }
}
