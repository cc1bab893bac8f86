//! What is sold beside conversation: embeddings, pictures, speech and transcriptions, each as its published clients
//! ask for it, held for at the most that it can come to and charged as it turned out.

use serde_json::{Value, json};

use crate::support::chain::TestChain;
use crate::support::gateway::{Answer, Call, Customer, Gateway, MODEL, Setup, micro};
use crate::support::media::{
    EMBEDDER_BY_TOKEN, LISTENER, LISTENER_BY_TOKEN, PAINTER, PAINTER_BY_TOKEN, VOICE, VOICE_BY_TOKEN, form,
    post_form, usual_request, wav, with_media,
};
use crate::support::postgres::fresh_database;
use crate::support::upstream::{Script, ScriptedUpstream, error};
use crate::support::wallet::TestWallet;

const COMPLETIONS: &str = "/v1/completions";
const EMBEDDINGS: &str = "/v1/embeddings";
const IMAGES: &str = "/v1/images/generations";
const EDITS: &str = "/v1/images/edits";
const SPEECH: &str = "/v1/audio/speech";
const TRANSCRIPTIONS: &str = "/v1/audio/transcriptions";

/// A gateway before an upstream that does as it is told, and somebody with a dollar.
async fn scripted() -> (Gateway, ScriptedUpstream, Customer) {
    let upstream = ScriptedUpstream::start().await;
    let setup = with_media(Setup::new(&TestChain::shared(), &upstream.base_url));
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("1").await;
    (gateway, upstream, customer)
}

fn id(answer: &Answer) -> &str {
    answer.header("x-request-id").unwrap()
}

/// Pico-USD at cost as micro-USDC with the markup, rounded up once: worked out here apart from the gateway.
fn billed(pico: u64) -> u64 {
    (pico * 12).div_ceil(10_000_000)
}

/// Checks what was held and charged for an answer, in pico-USD at cost, and that all who tell of it agree.
async fn was_charged(gateway: &Gateway, customer: &Customer, answer: &Answer, held: u64, cost: u64) -> Value {
    let receipt = gateway.receipt(customer, id(answer)).await;
    assert_eq!(receipt["hold_usdc"], billed(held), "{receipt}");
    assert_eq!(receipt["charged_usdc"], billed(cost), "{receipt}");
    assert_eq!(answer.number("x-charged-usdc"), billed(cost));
    assert_eq!(receipt["unpriced_units"], json!([]), "{receipt}");
    let balance = gateway.settled(customer).await;
    assert_eq!(answer.number("x-balance-usdc"), balance.balance);
    receipt
}

async fn ask(gateway: &Gateway, customer: &Customer, path: &str, body: &Value) -> Answer {
    gateway.post(path).key(&customer.key).json(body).send().await
}

fn transcription(gateway: &Gateway, fields: &[(&str, &str)], file: &[u8]) -> Call {
    post_form(gateway, TRANSCRIPTIONS, "b1", form("b1", fields, ("file", file)))
}

#[tokio::test]
async fn embeddings_are_charged_by_their_tokens() {
    let (gateway, upstream, customer) = scripted().await;
    let vector = json!({"object": "embedding", "index": 0, "embedding": "AACAPg=="});
    let mut answer = json!({
        "object": "list", "data": [vector], "model": "upstream-name",
        "usage": {"prompt_tokens": 80_000, "total_tokens": 80_000},
    });
    upstream.play(Script::json(200, &answer));
    // A million bytes are cut to what the model reads of each text.
    let body =
        json!({"model": EMBEDDER_BY_TOKEN, "input": vec!["x".repeat(9000); 10], "encoding_format": "base64"});
    let given = ask(&gateway, &customer, EMBEDDINGS, &body).await.expect(200);
    was_charged(&gateway, &customer, &given, 10 * 8192 * 20_000, 80_000 * 20_000).await;
    let sent = upstream.last_received();
    assert!(sent.head.starts_with("post /v1/embeddings "), "{}", sent.head);
    assert_eq!(sent.json()["model"], "embedder-by-token");
    assert_eq!(sent.json()["encoding_format"], "base64");
    answer["model"] = EMBEDDER_BY_TOKEN.into();
    answer["usage"]["charged_usdc"] = billed(80_000 * 20_000).into();
    assert_eq!(given.json(), answer);

    // Tokens are counted; nobody says what was used, so it is those.
    upstream.play(Script::json(200, &json!({"data": []})));
    let body = json!({"model": EMBEDDER_BY_TOKEN, "input": [vec![7; 3000], vec![7; 2000]]});
    let given = ask(&gateway, &customer, EMBEDDINGS, &body).await.expect(200);
    let receipt = was_charged(&gateway, &customer, &given, 5000 * 20_000, 5000 * 20_000).await;
    assert_eq!((&receipt["outcome"], &receipt["reason"]), (&json!("estimated"), &json!("usage_missing")));
    gateway.audit();
}

#[tokio::test]
async fn completions_of_the_old_kind_are_charged_like_chats() {
    let (gateway, upstream, customer) = scripted().await;
    let choice = json!({"text": " enough for all.", "index": 0, "logprobs": null, "finish_reason": "stop"});
    let usage = json!({"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29});
    let answer = json!({"id": "cmpl-1", "object": "text_completion", "model": "upstream-name", "choices": [choice], "usage": usage});
    upstream.play(Script::json(200, &answer));
    let mut body =
        json!({"model": MODEL, "prompt": ["A wallet is", "You"], "n": 2, "max_tokens": 100, "stop": "."});
    let given = ask(&gateway, &customer, COMPLETIONS, &body).await.expect(200);
    let held = (13 + 5 + 2 * 80) * 150_000 + 400 * 600_000;
    was_charged(&gateway, &customer, &given, held, 20 * 150_000 + 9 * 600_000).await;
    assert_eq!((&given.json()["model"], &given.json()["usage"]["charged_usdc"]), (&json!(MODEL), &json!(11)));
    let sent = upstream.last_received();
    assert!(sent.head.starts_with("post /v1/completions "), "{}", sent.head);
    assert_eq!((&sent.json()["model"], &sent.json()["max_tokens"]), (&json!("gpt-5-mini"), &json!(100)));

    let chunk = |text: &str, reason: Value| json!({"object": "text_completion", "model": "u", "choices": [{"text": text, "index": 0, "finish_reason": reason}]});
    let last = json!({"object": "text_completion", "model": "u", "choices": [], "usage": usage});
    let begun = Script::stream().event(&chunk(" enough for all.", Value::Null));
    upstream.play(begun.clone().event(&chunk("", json!("stop"))).event(&last).done());
    body = json!({"model": MODEL, "prompt": "A wallet is", "stream": true});
    let given = ask(&gateway, &customer, COMPLETIONS, &body).await.expect(200);
    assert!(
        given.text().ends_with("data: [DONE]\n\n") && !given.text().contains("usage"),
        "{}",
        given.text()
    );
    assert_eq!(gateway.receipt_in_time(&customer, id(&given)).await["charged_usdc"], 11);
    assert_eq!(upstream.last_received().json()["stream_options"]["include_usage"], true);
    // One that is cut off: the prompt, and the sixteen letters that came.
    upstream.play(begun);
    let given = ask(&gateway, &customer, COMPLETIONS, &body).await.expect(200);
    let receipt = gateway.receipt_in_time(&customer, id(&given)).await;
    assert_eq!(receipt["charged_usdc"], billed(4 * 150_000 + 4 * 600_000), "{receipt}");
    gateway.audit();
}

#[tokio::test]
async fn pictures_are_held_for_at_the_dearest_and_charged_as_they_turned_out() {
    let (gateway, upstream, customer) = scripted().await;
    let cent: u64 = 10_000_000_000;
    upstream.play(Script::json(
        200,
        &json!({"created": 1, "data": [{"url": "http://x/1"}, {"url": "http://x/2"}]}),
    ));
    for (body, held, cost) in [
        (json!({"size": "1024x1024", "quality": "standard", "n": 3}), 3 * 4 * cent, 2 * 4 * cent),
        // Nobody says in which quality they are.
        (json!({"size": "1024x1024", "n": 2}), 2 * 8 * cent, 2 * 8 * cent),
    ] {
        let mut body = body;
        body["model"] = PAINTER.into();
        body["prompt"] = "A wallet".into();
        let given = ask(&gateway, &customer, IMAGES, &body).await.expect(200);
        let receipt = was_charged(&gateway, &customer, &given, held, cost).await;
        assert_eq!(
            (&receipt["outcome"], &receipt["usage_units"]),
            (&json!("settled"), &json!({"images": 2}))
        );
        assert_eq!(given.json()["data"][1]["url"], "http://x/2");
    }
    // An answer that says what it is has the price of just that, and its receipt no other.
    upstream.play(Script::json(
        200,
        &json!({"data": [{"b64_json": "AA"}], "size": "1024x1024", "quality": "standard"}),
    ));
    let body = json!({"model": PAINTER, "prompt": "A wallet", "quality": "auto"});
    let given = ask(&gateway, &customer, IMAGES, &body).await.expect(200);
    let receipt = was_charged(&gateway, &customer, &given, 8 * cent, 4 * cent).await;
    assert_eq!(
        receipt["prices"]["images"],
        json!([{"size": "1024x1024", "quality": "standard", "usd": "0.04"}])
    );

    // By the token: what is listed for this size and quality is held.
    let usage = json!({
        "input_tokens": 20, "output_tokens": 272, "total_tokens": 292,
        "input_tokens_details": {"text_tokens": 20, "image_tokens": 0},
    });
    upstream.play(Script::json(200, &json!({"data": [{"b64_json": "AA"}], "usage": usage})));
    let body =
        json!({"model": PAINTER_BY_TOKEN, "prompt": "A wallet", "size": "1024x1024", "quality": "low"});
    let given = ask(&gateway, &customer, IMAGES, &body).await.expect(200);
    // The quotes are two bytes, and around a prompt are 80 tokens at most.
    let held = (10 + 80) * 5_000_000 + 272 * 40_000_000;
    was_charged(&gateway, &customer, &given, held, 20 * 5_000_000 + 272 * 40_000_000).await;
    assert_eq!(given.json()["usage"]["charged_usdc"], given.number("x-charged-usdc"));
    gateway.audit();
}

#[tokio::test]
async fn pictures_to_change_are_passed_on_as_they_came() {
    let (gateway, upstream, customer) = scripted().await;
    let usage = json!({
        "input_tokens": 420, "output_tokens": 272,
        "input_tokens_details": {"text_tokens": 20, "image_tokens": 400},
    });
    upstream.play(Script::json(200, &json!({"data": [{"b64_json": "AA"}], "usage": usage})));
    let fields =
        [("model", PAINTER_BY_TOKEN), ("prompt", "Brighter"), ("size", "1024x1024"), ("quality", "low")];
    let body = form("x y", &fields, ("image[]", b"\x89PNG\r\n\x1a\n--x"));
    let call = gateway.post(EDITS).header("content-type", "multipart/form-data; boundary=\"x y\"").body(body);
    let given = call.key(&customer.key).send().await.expect(200);
    let held = 65_536 * 10_000_000 + 272 * 40_000_000;
    was_charged(&gateway, &customer, &given, held, 20 * 5_000_000 + 400 * 10_000_000 + 272 * 40_000_000)
        .await;
    let sent = upstream.last_received();
    assert!(
        sent.head.contains("post /v1/images/edits ") && sent.head.contains("boundary=\"x y\""),
        "{}",
        sent.head
    );
    let fields = [("model", "painter-by-token"), fields[1], fields[2], fields[3]];
    assert_eq!(sent.body, form("x y", &fields, ("image[]", b"\x89PNG\r\n\x1a\n--x")));
}

#[tokio::test]
async fn sound_comes_as_it_is_and_its_characters_are_charged() {
    let (gateway, upstream, customer) = scripted().await;
    upstream.play(Script::answer(200, &[("content-type", "audio/mpeg")], "ID3 \u{1} sound"));
    let body = json!({"model": VOICE, "input": "Grüße", "voice": "alloy"});
    let given = ask(&gateway, &customer, SPEECH, &body).await.expect(200);
    assert_eq!(
        (given.header("content-type"), given.text().as_str()),
        (Some("audio/mpeg"), "ID3 \u{1} sound")
    );
    let receipt = was_charged(&gateway, &customer, &given, 5 * 15_000_000, 5 * 15_000_000).await;
    assert_eq!(
        (&receipt["outcome"], &receipt["usage_units"]),
        (&json!("settled"), &json!({"characters": 5}))
    );

    // Of sound by the token a file says nothing: the hold. Its events do.
    let body = json!({"model": VOICE_BY_TOKEN, "input": "Hello", "voice": "alloy"});
    let given = ask(&gateway, &customer, SPEECH, &body).await.expect(200);
    // Five characters take three seconds at most.
    let held = (7 + 80) * 600_000 + 300 * 12_000_000;
    let receipt = was_charged(&gateway, &customer, &given, held, held).await;
    assert_eq!((&receipt["outcome"], &receipt["reason"]), (&json!("estimated"), &json!("usage_missing")));
    let done = json!({"type": "speech.audio.done", "usage": {"input_tokens": 5, "output_tokens": 101}});
    let delta = json!({"type": "speech.audio.delta", "audio": "AAAA"});
    upstream.play(Script::stream().event(&delta).event(&done).end());
    let mut body = body;
    body["stream_format"] = "sse".into();
    let given = ask(&gateway, &customer, SPEECH, &body).await.expect(200);
    let cost = billed(5 * 600_000 + 101 * 12_000_000);
    // The rest of it is as it came.
    let told = done.to_string().replace("101}", &format!("101,\"charged_usdc\":{cost}}}"));
    assert_eq!(given.text(), format!("data: {delta}\n\ndata: {told}\n\n"));
    assert_eq!(gateway.receipt_in_time(&customer, id(&given)).await["charged_usdc"], cost);
    gateway.audit();
}

#[tokio::test]
async fn recordings_are_measured_before_they_are_sent_on() {
    let (gateway, upstream, customer) = scripted().await;
    let ms = 100_000;
    for (format, answer, content_type, cost) in [
        (
            "json",
            json!({"text": "Hi", "usage": {"type": "duration", "seconds": 2}}).to_string(),
            "application/json",
            2000 * ms,
        ),
        ("verbose_json", json!({"text": "Hi", "duration": 1.4}).to_string(), "application/json", 1400 * ms),
        ("srt", "1\n00:00:00,000 --> 00:00:01,000\nHi\n".to_owned(), "text/plain; charset=utf-8", 1500 * ms),
    ] {
        upstream.play(Script::answer(200, &[("content-type", "text/html")], answer.clone()));
        let fields = [("model", LISTENER), ("response_format", format)];
        let given = transcription(&gateway, &fields, &wav(1500)).key(&customer.key).send().await.expect(200);
        assert_eq!(given.header("content-type"), Some(content_type));
        was_charged(&gateway, &customer, &given, 2000 * ms, cost).await;
        match format {
            "srt" => assert_eq!(given.text(), answer),
            _ => assert_eq!(given.json()["text"], "Hi"),
        }
    }
    // A head that says a second, and an hour behind it.
    let mut hour = wav(1000);
    hour.resize(hour.len() + 16_000 * 2 * 300, 0);
    upstream.play(Script::json(200, &json!({"text": "Hi", "usage": {"type": "duration", "seconds": 301}})));
    let given =
        transcription(&gateway, &[("model", LISTENER)], &hour).key(&customer.key).send().await.expect(200);
    was_charged(&gateway, &customer, &given, 301_000 * ms, 301_000 * ms).await;
    // One that the provider finds longer than it can be costs its hold, and the operator is told.
    upstream.play(Script::json(200, &json!({"text": "Hi", "usage": {"type": "duration", "seconds": 99}})));
    let given = transcription(&gateway, &[("model", LISTENER)], &wav(1000))
        .key(&customer.key)
        .send()
        .await
        .expect(200);
    assert_eq!(given.number("x-charged-usdc"), billed(1000 * ms));
    assert!(gateway.logs().contains("a request cost more than its hold"));

    let usage = json!({
        "type": "tokens", "input_tokens": 15, "input_token_details": {"text_tokens": 0, "audio_tokens": 15},
        "output_tokens": 4, "total_tokens": 19,
    });
    let delta = json!({"type": "transcript.text.delta", "delta": "Hi"});
    let done = json!({"type": "transcript.text.done", "text": "Hi", "usage": usage});
    upstream.play(Script::stream().event(&delta).event(&done).done());
    let fields = [("model", LISTENER_BY_TOKEN), ("stream", "true")];
    let given = transcription(&gateway, &fields, &wav(1500)).key(&customer.key).send().await.expect(200);
    assert_eq!(given.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let cost = billed(15 * 6_000_000 + 4 * 10_000_000);
    assert!(given.text().ends_with(&format!("\"charged_usdc\":{cost}}}}}\n\n")), "{}", given.text());
    let receipt = gateway.receipt_in_time(&customer, id(&given)).await;
    assert_eq!(
        (&receipt["hold_usdc"], &receipt["charged_usdc"]),
        (&json!(billed(200 * 6_000_000 + 2000 * 10_000_000)), &json!(cost))
    );
    gateway.audit();
}

#[tokio::test]
async fn what_is_refused_or_fails_costs_nothing() {
    let (gateway, upstream, customer) = scripted().await;
    let speech = json!({"model": VOICE, "input": "Hello", "voice": "alloy"});
    let refused = [
        (EMBEDDINGS, json!({"model": VOICE, "input": "Hello"}), "model"),
        (EMBEDDINGS, json!({"model": EMBEDDER_BY_TOKEN, "input": [{"image": "x"}]}), "input"),
        (IMAGES, json!({"model": PAINTER, "prompt": "A wallet", "size": "256x256"}), "size"),
        (IMAGES, json!({"model": PAINTER, "prompt": "A wallet", "n": 11}), "n"),
        (SPEECH, json!({"model": VOICE, "input": "Hello", "speed": 0.1}), "speed"),
        (
            "/v1/chat/completions",
            json!({"model": VOICE, "messages": [{"role": "user", "content": "Hi"}]}),
            "model",
        ),
    ];
    for (path, body, param) in refused {
        let refused = ask(&gateway, &customer, path, &body).await.expect(400).json();
        assert_eq!(refused["error"]["param"], param, "{refused}");
    }
    let chat = ask(&gateway, &customer, EMBEDDINGS, &json!({"model": VOICE, "input": "Hello"})).await;
    assert!(chat.text().contains("ask for it at /v1/audio/speech"), "{}", chat.text());
    let text = transcription(&gateway, &[("model", LISTENER)], b"text").key(&customer.key).send().await;
    assert_eq!(text.error(400, "invalid_value")["param"], "file");
    let twice = transcription(&gateway, &[("model", LISTENER), ("model", VOICE)], &wav(1)).key(&customer.key);
    assert_eq!(twice.send().await.error(400, "invalid_value")["param"], "model");
    gateway
        .post(TRANSCRIPTIONS)
        .key(&customer.key)
        .json(&json!({}))
        .send()
        .await
        .error(400, "invalid_multipart");
    assert_eq!(upstream.received().len(), 0);

    for (script, status) in [
        (Script::json(400, &error("The voice is unknown.", "invalid_value")), 400),
        (Script::json(429, &error("Slow down.", "rate_limit_exceeded")), 429),
        (Script::json(200, &json!({"ok": true})), 502),
        (Script::json(200, &error("No.", "x")), 502),
        (Script::answer(200, &[("content-type", "audio/mpeg")], ""), 502),
        (Script::hang_up(), 502),
    ] {
        upstream.play(script);
        let failed = ask(&gateway, &customer, SPEECH, &speech).await;
        assert_eq!(failed.status, status, "{failed:?}");
        let receipt = gateway.receipt_in_time(&customer, id(&failed)).await;
        assert_eq!((&receipt["outcome"], &receipt["charged_usdc"]), (&json!("released"), &json!(0)));
    }
    assert_eq!(gateway.settled(&customer).await.balance, micro("1"));
    gateway.audit();
}

#[tokio::test]
async fn a_client_that_leaves_leaves_nothing_half_done() {
    let (gateway, upstream, customer) = scripted().await;
    let whole = Script::answer(200, &[("content-type", "audio/mpeg")], "ID3");
    upstream.play(Script::held_back(whole));
    let body = json!({"model": VOICE, "input": "Hello", "voice": "alloy"});
    let call = gateway.post(SPEECH).key(&customer.key).json(&body).0.send();
    let asked = tokio::spawn(call);
    crate::support::eventually("the upstream is asked", async || {
        (!upstream.received().is_empty()).then_some(())
    })
    .await;
    asked.abort();
    upstream.open_gate();
    let balance = crate::support::eventually("it is settled", async || {
        Some(gateway.settled(&customer).await.balance).filter(|balance| *balance < micro("1"))
    })
    .await;
    assert_eq!(balance, micro("1") - billed(5 * 15_000_000));

    // A stream that breaks off is charged for what came, and its failure is told.
    let partial = json!({"type": "transcript.text.delta", "delta": "Hello there"});
    upstream.play(Script::stream().event(&partial));
    let fields = [("model", LISTENER_BY_TOKEN), ("stream", "true")];
    let given = transcription(&gateway, &fields, &wav(1500)).key(&customer.key).send().await.expect(200);
    assert!(given.text().contains("\"code\":\"stream_failed\""), "{}", given.text());
    let receipt = gateway.receipt_in_time(&customer, id(&given)).await;
    // Ten tokens a second were heard, and a token is four letters.
    assert_eq!(receipt["charged_usdc"], billed(20 * 6_000_000 + 3 * 10_000_000), "{receipt}");
    assert_eq!(receipt["outcome"], "estimated");
    gateway.audit();
}

#[tokio::test]
async fn a_picture_that_was_begun_is_charged_whoever_leaves() {
    let (gateway, upstream, customer) = scripted().await;
    // Shown where it is, and not in the event; the upstream then says no more.
    let begun = json!({"type": "image_generation.partial_succeeded", "url": "http://x/1"});
    upstream.play(Script::stream().event(&begun).gate());
    let body = json!({"model": PAINTER, "prompt": "A wallet", "size": "1024x1024", "stream": true});
    let mut leaving = gateway.post(IMAGES).key(&customer.key).json(&body).0.send().await.unwrap();
    let id = leaving.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert_eq!(leaving.chunk().await.unwrap().unwrap(), format!("data: {begun}\n\n"));
    drop(leaving);
    upstream.open_gate();
    let receipt = gateway.receipt_in_time(&customer, &id).await;
    assert_eq!(
        (&receipt["outcome"], &receipt["usage_units"], &receipt["charged_usdc"]),
        (&json!("estimated"), &json!({"images": 1}), &json!(billed(80_000_000_000))),
        "{receipt}"
    );
    gateway.audit();
}

#[tokio::test]
async fn an_answer_of_any_type_is_given_again() {
    for database_url in [None, Some(fresh_database().await)] {
        let upstream = ScriptedUpstream::start().await;
        let setup = Setup { database_url, ..Setup::new(&TestChain::shared(), &upstream.base_url) };
        let gateway = Gateway::start_with(with_media(setup)).await;
        let customer = gateway.customer("1").await;
        upstream.play(Script::answer(200, &[("content-type", "audio/mpeg")], "ID3\0\u{1}"));
        let body = json!({"model": VOICE, "input": "Hello", "voice": "alloy"});
        let speak = async || {
            let call = gateway.post(SPEECH).key(&customer.key).header("idempotency-key", "one");
            call.json(&body).send().await.expect(200)
        };
        let (first, again) = (speak().await, speak().await);
        assert_eq!(again.header("idempotent-replayed"), Some("true"));
        assert_eq!((first.header("content-type"), &first.body), (again.header("content-type"), &again.body));
        assert_eq!(again.header("content-type"), Some("audio/mpeg"));

        // A form is the same under any boundary, and another with another file.
        upstream.play(Script::answer(200, &[], "Hi\n"));
        let write = async |boundary: &str, file: &[u8]| {
            let fields = [("model", LISTENER), ("response_format", "text")];
            let call = post_form(&gateway, TRANSCRIPTIONS, boundary, form(boundary, &fields, ("file", file)));
            call.key(&customer.key).header("idempotency-key", "two").send().await
        };
        let first = write("b1", &wav(1000)).await.expect(200);
        let again = write("another", &wav(1000)).await.expect(200);
        assert_eq!(again.header("idempotent-replayed"), Some("true"));
        assert_eq!(
            (again.text().as_str(), again.header("content-type")),
            ("Hi\n", first.header("content-type"))
        );
        write("b1", &wav(1001)).await.error(409, "idempotency_key_reused");
        assert_eq!(upstream.received().len(), 2);
        gateway.audit();
    }
}

#[tokio::test]
async fn a_wallet_pays_for_each_with_the_request() {
    let gateway = Gateway::start_with(with_media(Setup::usual())).await;
    for path in [COMPLETIONS, EMBEDDINGS, IMAGES, EDITS, SPEECH, TRANSCRIPTIONS] {
        let wallet = TestWallet::random();
        gateway.chain().mint(wallet.address(), micro("1")).await;
        let asked = usual_request(&gateway, path).unwrap().send().await.expect(402);
        let terms = asked.decoded("payment-required");
        let amount: u64 = terms["accepts"][0]["amount"].as_str().unwrap().parse().unwrap();
        let body_type = if matches!(path, EDITS | TRANSCRIPTIONS) { "form-data" } else { "json" };
        assert_eq!(terms["extensions"]["bazaar"]["info"]["input"]["bodyType"], body_type, "{path}");
        let payment = wallet.authorization(gateway.setup.pay_to, amount).sign();
        let call = usual_request(&gateway, path).unwrap().header("payment-signature", &payment.v2_header());
        let answer = call.send().await.expect(200);
        assert!(answer.header("payment-response").is_some());
        let charged = answer.number("x-charged-usdc");
        assert!(charged > 0 && charged <= amount, "{path}: {charged} of {amount}");
        assert_eq!(gateway.balance(&wallet).await.balance, amount - charged, "{path}");
    }
    gateway.audit();
}

#[tokio::test]
async fn a_balance_that_is_too_small_is_told_what_would_do() {
    let gateway = Gateway::start_with(with_media(Setup::usual())).await;
    let customer = gateway.customer("0").await;
    let answer = usual_request(&gateway, IMAGES).unwrap().key(&customer.key).send().await;
    let error = answer.error(402, "insufficient_balance");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("may cost 0.096 USDC") && message.ends_with("ask for less or top up"),
        "{message}"
    );
    assert!(answer.header("payment-required").is_some());
}

#[tokio::test]
async fn a_key_is_held_to_its_models() {
    let gateway = Gateway::start_with(with_media(Setup::usual())).await;
    let customer = gateway.customer("1").await;
    let path = format!("/v1/auth/keys/{}", customer.key.id);
    let mut change = gateway.sign_in(&customer.wallet).body();
    change["allowed_models"] = json!([LISTENER]);
    gateway.request(reqwest::Method::PATCH, &path).json(&change).send().await.expect(200);
    usual_request(&gateway, TRANSCRIPTIONS).unwrap().key(&customer.key).send().await.expect(200);
    usual_request(&gateway, SPEECH).unwrap().key(&customer.key).send().await.expect(403);
}

/// What the official clients were charged, by the receipts: worked out again from what each says was used.
async fn receipts_add_up(gateway: &Gateway, customer: &Customer, at_least: usize) {
    let page = gateway.get("/v1/requests?limit=100").key(&customer.key).send().await.expect(200).json();
    let receipts = page["data"].as_array().unwrap();
    assert!(receipts.len() >= at_least, "{} receipts", receipts.len());
    let mut sum = 0;
    for receipt in receipts {
        let price = |unit: &str| -> u64 {
            let usd =
                match (unit, &receipt["prices"]["per_unit"][unit], receipt["prices"]["images"].as_array()) {
                    ("images", _, Some(images)) if !images.is_empty() => {
                        images.iter().map(|image| image["usd"].as_str().unwrap()).max().unwrap()
                    }
                    (_, usd, _) => usd.as_str().unwrap_or_else(|| panic!("no price for {unit}: {receipt}")),
                };
            let (whole, fraction) = usd.split_once('.').unwrap_or((usd, ""));
            format!("{whole}{fraction:0<12}").parse().unwrap()
        };
        let used = receipt["usage_units"].as_object().unwrap();
        let mut cost: u64 = used.iter().map(|(unit, count)| count.as_u64().unwrap() * price(unit)).sum();
        if receipt["outcome"] != "released" && receipt["prices"]["per_unit"].get("calls").is_some() {
            cost += price("calls");
        }
        assert_eq!(receipt["charged_usdc"], billed(cost), "{receipt}");
        assert!(receipt["charged_usdc"].as_u64() <= receipt["hold_usdc"].as_u64(), "{receipt}");
        sum += billed(cost);
    }
    assert_eq!(gateway.settled(customer).await.balance, micro("5") - sum);
    gateway.audit();
}

async fn run_client(program: &mut std::process::Command) {
    let gateway = Gateway::start_with(with_media(Setup::usual())).await;
    let customer = gateway.customer("5").await;
    let program = program.env("FAREBOX_URL", gateway.url("")).env("API_KEY", &customer.key.secret);
    crate::clients::run(program);
    receipts_add_up(&gateway, &customer, 9).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_openai_client_for_node_makes_all_of_it() {
    run_client(&mut crate::clients::node("media_node.mjs")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_openai_client_for_python_makes_all_of_it() {
    run_client(&mut crate::clients::python("media_python.py")).await;
}
