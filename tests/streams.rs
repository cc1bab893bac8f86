//! Streamed chat: what passes through, when it is settled, and every way it can end.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::gateway::{Balance, Customer, EventStream, Gateway, MODEL, REASONING, Setup, ask_stream};
use crate::support::upstream::{Script, ScriptedUpstream, chunk, error, last_chunk, usage, usage_chunk};
use crate::support::{chain::TestChain, eventually};

const BALANCE: u64 = 1_000_000;

/// A gateway before an upstream that does as it is told, and somebody with a dollar.
async fn scripted() -> (Gateway, ScriptedUpstream, Customer) {
    scripted_with(|_| {}).await
}

async fn scripted_with(change: impl FnOnce(&mut Setup)) -> (Gateway, ScriptedUpstream, Customer) {
    let upstream = ScriptedUpstream::start().await;
    let mut setup = Setup::new(&TestChain::shared(), &upstream.base_url);
    change(&mut setup);
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("1").await;
    (gateway, upstream, customer)
}

/// The plain answer in five chunks, without its end.
fn five_chunks() -> Script {
    ["A ", "wallet ", "is ", "enough", "."]
        .iter()
        .fold(Script::stream(), |script, text| script.event(&chunk(text)))
}

fn whole() -> Script {
    five_chunks().event(&last_chunk()).event(&usage_chunk(usage(20, 9))).done()
}

fn parsed(event: &str) -> Value {
    serde_json::from_str(event).unwrap_or_else(|e| panic!("{e}: {event}"))
}

/// Checks that a stream ends in an error, and returns what came before it.
fn before_the_error(mut events: Vec<String>) -> Vec<String> {
    let last = events.pop().expect("an event");
    let error = parsed(&last);
    assert!(error["error"]["message"].is_string(), "the last event is no error: {last}");
    assert_eq!(crate::support::gateway::members(&error["error"]), ["code", "message", "param", "type"]);
    assert_eq!(error["error"]["type"], "server_error");
    assert!(events.iter().all(|event| event != "[DONE]"), "[DONE] in a stream that failed: {events:?}");
    events
}

/// A hold's end as the books show it: the receipt of an ended request, and a balance that agrees.
async fn ended(gateway: &Gateway, customer: &Customer, id: &str) -> Value {
    let receipt = gateway.receipt_in_time(customer, id).await;
    let (hold, charged) = (receipt["hold_usdc"].as_u64().unwrap(), receipt["charged_usdc"].as_u64().unwrap());
    assert!(charged <= hold, "charged above the hold: {receipt}");
    let balance = gateway.settled(customer).await;
    assert_eq!(balance.locked, 0);
    receipt
}

async fn spent(gateway: &Gateway, customer: &Customer) -> u64 {
    let Balance { balance, locked, .. } = gateway.settled(customer).await;
    assert_eq!(locked, 0);
    BALANCE - balance
}

#[tokio::test]
async fn a_stream_passes_through_but_for_its_model() {
    let (gateway, upstream, customer) = scripted().await;
    let mut strange = chunk("A wallet");
    strange["system_fingerprint"] = "fp_1".into();
    strange["x_unknown"] = json!({"nested": [1, 2.50, "é"]});
    strange["choices"][0]["logprobs"] = json!({"content": []});
    // Bytes that a parser and a renderer would not give back: spaces, an escape, a number's form.
    let odd = r#"{"id": "x" ,"model":"upstream-name","choices":[{"index":0,"delta":{"content":"\u00e9"},"p":1.50}] , "e":1e3}"#;
    let script = Script::stream()
        .raw(": a comment\n\n")
        .event(&strange)
        .raw(&format!("data: {odd}\n\n"))
        .raw(": another\n\n")
        .event(&last_chunk())
        .event(&usage_chunk(usage(20, 9)))
        .done();
    upstream.play(script);
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    assert!(stream.headers["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    assert!(stream.headers["cache-control"].to_str().unwrap().contains("no-"));
    assert!(!stream.headers.contains_key("content-length"));

    let mut seen = Vec::new();
    while let Some(event) = stream.next_raw().await {
        seen.push(event);
    }
    strange["model"] = MODEL.into();
    let mut last = last_chunk();
    last["model"] = MODEL.into();
    assert_eq!(seen[0], ": a comment");
    assert_eq!(parsed(seen[1].strip_prefix("data: ").unwrap()), strange);
    let odd_sent = seen[2].strip_prefix("data: ").unwrap();
    assert!(odd_sent.contains(r#"[{"index":0,"delta":{"content":"\u00e9"},"p":1.50}]"#), "{odd_sent}");
    assert!(odd_sent.contains("1e3"), "{odd_sent}");
    assert_eq!(parsed(odd_sent)["model"], MODEL);
    assert_eq!(seen[3], ": another");
    assert_eq!(parsed(seen[4].strip_prefix("data: ").unwrap()), last);
    assert_eq!(seen[5..], ["data: [DONE]"]);
}

#[tokio::test]
async fn an_event_is_forwarded_when_it_comes() {
    let (gateway, upstream, customer) = scripted().await;
    let gated = ["one", "two", "three"]
        .iter()
        .fold(Script::stream(), |script, text| script.event(&chunk(text)).gate())
        .event(&usage_chunk(usage(20, 3)))
        .done();
    upstream.play(gated);
    // The head and each event are here while the upstream still holds the next back.
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    for text in ["one", "two", "three"] {
        let event = parsed(&stream.next().await.unwrap());
        assert_eq!(event["choices"][0]["delta"]["content"], text);
        upstream.open_gate();
    }
    assert_eq!(stream.rest().await, ["[DONE]"]);
}

#[tokio::test]
async fn the_upstream_is_always_asked_for_usage_and_the_client_gets_it_if_it_asked() {
    let (gateway, upstream, customer) = scripted().await;
    let mut shared = chunk("wallet");
    shared["usage"] = usage(20, 4);
    let mut nulled = chunk("A ");
    nulled["usage"] = Value::Null;
    let script = Script::stream()
        .event(&nulled)
        .event(&shared)
        .event(&last_chunk())
        .event(&usage_chunk(usage(20, 9)))
        .done();
    upstream.play(script);

    // Unasked, in three ways; the chunk that is only usage is left out, of others only the member.
    for options in [json!(null), json!({"include_usage": false}), json!({"x": 1})] {
        let mut body = ask_stream("Hello");
        if !options.is_null() {
            body["stream_options"] = options.clone();
        }
        let events = gateway.stream(&customer, &body).await.rest().await;
        let chunks: Vec<_> = events[..events.len() - 1].iter().map(|event| parsed(event)).collect();
        assert_eq!(chunks.len(), 3, "{options}: {events:?}");
        assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()), "{options}: {events:?}");
        assert_eq!(chunks[1]["choices"][0]["delta"]["content"], "wallet");
        let sent = upstream.last_received().json();
        assert_eq!(sent["stream_options"]["include_usage"], true, "{options}: {sent}");
        if options.get("x").is_some() {
            assert_eq!(sent["stream_options"]["x"], 1);
        }
    }

    let mut body = ask_stream("Hello");
    body["stream_options"] = json!({"include_usage": true});
    let mut stream = gateway.stream(&customer, &body).await;
    let id = stream.id.clone();
    let events = stream.rest().await;
    let chunks: Vec<_> = events[..events.len() - 1].iter().map(|event| parsed(event)).collect();
    assert_eq!(chunks.len(), 4, "{events:?}");
    assert_eq!(chunks[0].get("usage"), Some(&Value::Null));
    assert_eq!(chunks[3]["usage"]["completion_tokens"], 9);
    assert_eq!(chunks[3]["choices"], json!([]));
    // The last report is the one that counts, and it counts once.
    let receipt = gateway.receipt(&customer, &id).await;
    assert_eq!(receipt["charged_usdc"], 11);
    assert_eq!(spent(&gateway, &customer).await, 4 * 11);
}

#[tokio::test]
async fn usage_that_only_comes_with_choices_is_charged() {
    let (gateway, upstream, customer) = scripted().await;
    let mut last = last_chunk();
    last["usage"] = usage(20, 9);
    upstream.play(five_chunks().event(&last).done());
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    let events = stream.rest().await;
    assert_eq!(events.len(), 7, "{events:?}");
    assert!(!events.iter().any(|event| event.contains("usage")), "{events:?}");
    assert_eq!(parsed(&events[5])["choices"][0]["finish_reason"], "stop");
    let receipt = gateway.receipt(&customer, &stream.id).await;
    assert_eq!((&receipt["outcome"], &receipt["charged_usdc"]), (&json!("settled"), &json!(11)));
}

#[tokio::test]
async fn the_settlement_is_committed_before_done_is_sent() {
    let (gateway, upstream, customer) = scripted().await;
    upstream.play(whole());
    for round in 1..=20 {
        let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
        let mut last = String::new();
        while let Some(event) = stream.next().await {
            last = event;
            if last == "[DONE]" {
                break;
            }
        }
        assert_eq!(last, "[DONE]");
        // At once, without a wait: who has read [DONE] finds the books written.
        let receipt = gateway.receipt(&customer, &stream.id).await;
        assert_eq!(receipt["charged_usdc"], 11);
        let balance = gateway.balance(&customer.wallet).await;
        assert_eq!((balance.balance, balance.locked), (BALANCE - round * 11, 0));
    }
}

#[tokio::test]
async fn a_finished_stream_without_usage_is_charged_at_an_estimate() {
    let (gateway, upstream, customer) = scripted().await;
    upstream.play(five_chunks().event(&last_chunk()).done());
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    assert_eq!(stream.rest().await.last().unwrap(), "[DONE]");
    let receipt = ended(&gateway, &customer, &stream.id).await;
    assert_eq!(receipt["outcome"], "estimated");
    assert_eq!(receipt["usage_reported"], Value::Null);
    assert!(receipt["charged_usdc"].as_u64().unwrap() > 0, "{receipt}");
    assert!(receipt["usage"]["completion_tokens"].as_u64().unwrap() >= 5, "{receipt}");

    // A model that may have reasoned unseen has no such estimate: the hold is what is known.
    let mut body = ask_stream("Hello");
    body["model"] = REASONING.into();
    let mut stream = gateway.stream(&customer, &body).await;
    stream.rest().await;
    let receipt = ended(&gateway, &customer, &stream.id).await;
    assert_eq!(receipt["outcome"], "estimated");
    assert_eq!(receipt["charged_usdc"], receipt["hold_usdc"]);
}

#[tokio::test]
async fn an_explicit_zero_of_tokens_is_zero() {
    let (gateway, upstream, customer) = scripted().await;
    upstream.play(five_chunks().event(&last_chunk()).event(&usage_chunk(usage(0, 0))).done());
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    stream.rest().await;
    let receipt = ended(&gateway, &customer, &stream.id).await;
    assert_eq!((&receipt["outcome"], &receipt["charged_usdc"]), (&json!("settled"), &json!(0)));
}

#[tokio::test]
async fn a_stream_that_is_complete_but_for_done_is_complete() {
    let (gateway, upstream, customer) = scripted().await;
    upstream.play(five_chunks().event(&last_chunk()).event(&usage_chunk(usage(20, 9))).end());
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    assert_eq!(stream.rest().await.last().unwrap(), "[DONE]");
    assert_eq!(ended(&gateway, &customer, &stream.id).await["charged_usdc"], 11);
}

#[tokio::test]
async fn a_stream_that_breaks_is_charged_for_what_was_delivered() {
    let idle = |setup: &mut Setup| setup.idle_timeout_s = 1;
    let (gateway, upstream, customer) = scripted_with(idle).await;
    let silence = Duration::from_secs(600);
    let cases = [
        ("cut off", five_chunks()),
        ("ended too early", five_chunks().end()),
        ("silent", five_chunks().silence(silence)),
        ("no JSON", five_chunks().raw("data: {nonsense\n\n").done()),
        ("an error", five_chunks().event(&error("the model fell over sk-secret", "overloaded")).done()),
        ("half an event", five_chunks().raw("data: {\"choices\":[{\"del")),
    ];
    for (what, script) in cases {
        upstream.play(script);
        let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
        let events = before_the_error(stream.rest().await);
        assert_eq!(events.len(), 5, "{what}: {events:?}");
        let receipt = ended(&gateway, &customer, &stream.id).await;
        assert_eq!(receipt["outcome"], "estimated", "{what}: {receipt}");
        assert!(receipt["charged_usdc"].as_u64().unwrap() > 0, "{what}: {receipt}");
        // 23 bytes were delivered, and the prompt is one word: nothing near the hold is charged.
        assert!(receipt["usage"]["completion_tokens"].as_u64().unwrap() <= 23, "{what}: {receipt}");
        assert!(receipt["reason"].is_string(), "{what}: {receipt}");
    }
    // Usage that came before the break is what counts.
    upstream.play(five_chunks().event(&usage_chunk(usage(20, 9))));
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    before_the_error(stream.rest().await);
    let receipt = ended(&gateway, &customer, &stream.id).await;
    assert_eq!((&receipt["outcome"], &receipt["charged_usdc"]), (&json!("settled"), &json!(11)));
    gateway.audit();
}

#[tokio::test]
async fn a_stream_that_fails_before_any_output_costs_nothing() {
    let idle = |setup: &mut Setup| setup.idle_timeout_s = 1;
    let (gateway, upstream, customer) = scripted_with(idle).await;
    let mut role = chunk("");
    role["choices"][0]["delta"] = json!({"role": "assistant", "content": ""});
    for (what, script) in [
        ("an error at once", Script::stream().event(&error("overloaded", "overloaded")).done()),
        ("a long error", Script::stream().event(&error(&"x".repeat(9_000), "overloaded")).done()),
        ("nothing at all", Script::stream().end()),
        ("cut at once", Script::stream()),
        ("nonsense at once", Script::stream().raw("data: <html>\n\n").end()),
        ("silence at once", Script::stream().silence(Duration::from_secs(600))),
        ("a comment and silence", Script::stream().raw(": wait\n\n").silence(Duration::from_secs(600))),
        ("only a role", Script::stream().event(&role)),
        ("an end to nothing", Script::stream().done()),
    ] {
        upstream.play(script);
        // Nothing has been passed on, so that the error can still be an answer with a status of its own.
        let answer = gateway.chat(&customer, &ask_stream("Hello")).await;
        assert!(matches!(answer.status, 502 | 504), "{what}: {answer:?}");
        let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
        assert_eq!(
            (&receipt["outcome"], &receipt["charged_usdc"]),
            (&json!("released"), &json!(0)),
            "{what}"
        );
    }
    assert_eq!(spent(&gateway, &customer).await, 0);
}

/// By then its client has the head of an answer, and only the stream itself can say so.
#[tokio::test]
async fn a_stream_that_comes_late_to_nothing_costs_nothing() {
    let (gateway, upstream, customer) = scripted_with(|_| {}).await;
    upstream.play(Script::stream().silence(Duration::from_secs(6)).done());
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    assert!(before_the_error(stream.rest().await).is_empty());
    let receipt = ended(&gateway, &customer, &stream.id).await;
    assert_eq!((&receipt["outcome"], &receipt["charged_usdc"]), (&json!("released"), &json!(0)));
}

#[tokio::test]
async fn a_stream_of_the_published_server_cut_in_the_middle_ends_in_an_error() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let mut stream = gateway.stream(&customer, &ask_stream("[cut]")).await;
    let events = before_the_error(stream.rest().await);
    assert!(!events.is_empty());
    let receipt = ended(&gateway, &customer, &stream.id).await;
    assert_eq!(receipt["outcome"], "estimated");
}

/// Reads `events` of a stream, then hangs up. Fewer may come: then the stream was over.
async fn read_and_vanish(mut stream: EventStream, events: usize) -> String {
    for _ in 0..events {
        if stream.next().await.is_none() {
            break;
        }
    }
    stream.id
}

#[tokio::test]
async fn a_client_may_vanish_at_each_chunk_of_a_stream() {
    let (gateway, upstream, customer) = scripted().await;
    upstream.play(whole());
    let mut charged = 0;
    for events in 0..=7 {
        let stream = gateway.stream(&customer, &ask_stream("Hello")).await;
        let id = read_and_vanish(stream, events).await;
        let receipt = ended(&gateway, &customer, &id).await;
        // The upstream went on to its end, so its report is known and is what counts.
        assert_eq!(
            (&receipt["outcome"], &receipt["charged_usdc"]),
            (&json!("settled"), &json!(11)),
            "{events}"
        );
        charged += 11;
    }
    assert_eq!(spent(&gateway, &customer).await, charged);
    gateway.audit();
}

#[tokio::test]
async fn a_stream_is_read_on_for_its_usage_when_its_client_has_gone() {
    let (gateway, upstream, customer) = scripted().await;
    let gated = |chunks: usize| {
        (0..5).fold(Script::stream(), |script, number| {
            let script = script.event(&chunk("word "));
            if number + 1 == chunks { script.gate() } else { script }
        })
    };
    for chunks in 1..=5 {
        upstream.play(gated(chunks).event(&last_chunk()).event(&usage_chunk(usage(20, 9))).done());
        let stream = gateway.stream(&customer, &ask_stream("Hello")).await;
        let id = read_and_vanish(stream, chunks).await;
        // Gone while the upstream is in the middle of it: the hold stands until the report is there.
        upstream.open_gate();
        let receipt = ended(&gateway, &customer, &id).await;
        assert_eq!(
            (&receipt["outcome"], &receipt["charged_usdc"]),
            (&json!("settled"), &json!(11)),
            "{chunks}"
        );
    }
    assert_eq!(spent(&gateway, &customer).await, 5 * 11);
}

#[tokio::test]
async fn a_client_and_its_upstream_may_both_go() {
    let idle = |setup: &mut Setup| setup.idle_timeout_s = 1;
    let (gateway, upstream, customer) = scripted_with(idle).await;
    for script in [five_chunks().gate(), five_chunks().silence(Duration::from_secs(600))] {
        upstream.play(script);
        let stream = gateway.stream(&customer, &ask_stream("Hello")).await;
        let id = read_and_vanish(stream, 2).await;
        upstream.open_gate();
        let receipt = ended(&gateway, &customer, &id).await;
        assert_eq!(receipt["outcome"], "estimated", "{receipt}");
        assert!(receipt["charged_usdc"].as_u64().unwrap() > 0);
    }
    gateway.audit();
}

#[tokio::test]
async fn a_client_may_vanish_before_the_answers_head() {
    let (gateway, upstream, customer) = scripted().await;
    // The head is held back until the client has gone.
    upstream.play(Script::held_back(whole()));
    for body in [ask_stream("Hello"), crate::support::gateway::ask("Hello")] {
        let before = upstream.received().len();
        let call = gateway.post("/v1/chat/completions").key(&customer.key).json(&body);
        let asking = tokio::spawn(call.0.send());
        eventually("the request is at the upstream", async || {
            (upstream.received().len() > before).then_some(())
        })
        .await;
        asking.abort();
        let _ = asking.await;
        upstream.play(Script::held_back(Script::json(
            200,
            &crate::support::upstream::completion(Some(usage(20, 9))),
        )));
        upstream.open_gate();
        eventually("there is a receipt", async || {
            let list = gateway.get("/v1/requests").key(&customer.key).send().await.expect(200).json();
            let upto = usize::from(body.get("stream").is_none()) + 1;
            (list["data"].as_array().unwrap().len() == upto).then_some(())
        })
        .await;
    }
    // Both ran to their end, and were charged for.
    assert_eq!(spent(&gateway, &customer).await, 2 * 11);
}

#[tokio::test]
async fn many_clients_vanish_at_once() {
    let (gateway, upstream, customer) = scripted().await;
    upstream.play(five_chunks().gate().event(&last_chunk()).event(&usage_chunk(usage(20, 9))).done());
    let readers = (0..40).map(|number| {
        let (gateway, customer) = (&gateway, &customer);
        async move {
            let stream = gateway.stream(customer, &ask_stream("Hello")).await;
            read_and_vanish(stream, number % 6).await
        }
    });
    let ids = futures_util::future::join_all(readers).await;
    for _ in &ids {
        upstream.open_gate();
    }
    for id in &ids {
        assert_eq!(ended(&gateway, &customer, id).await["charged_usdc"], 11);
    }
    assert_eq!(spent(&gateway, &customer).await, 40 * 11);
    gateway.audit();
}

#[tokio::test]
async fn a_stop_lets_a_stream_finish() {
    let (mut gateway, upstream, customer) = scripted().await;
    upstream.play(five_chunks().gate().event(&last_chunk()).event(&usage_chunk(usage(20, 9))).done());
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    for _ in 0..5 {
        stream.next().await.unwrap();
    }
    gateway.terminate();
    eventually("it is stopping", async || gateway.logs().contains("stopping").then_some(())).await;
    upstream.open_gate();
    assert_eq!(stream.rest().await.last().unwrap(), "[DONE]");
    assert_eq!(gateway.wait_for_exit().await.code(), Some(0));

    gateway.restart();
    assert_eq!(gateway.receipt(&customer, &stream.id).await["charged_usdc"], 11);
    assert_eq!(spent(&gateway, &customer).await, 11);
    gateway.audit();
}

#[tokio::test]
async fn a_stop_settles_what_its_client_no_longer_waits_for() {
    let (mut gateway, upstream, customer) = scripted().await;
    upstream.play(five_chunks().gate().event(&last_chunk()).event(&usage_chunk(usage(20, 9))).done());
    let stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    let id = read_and_vanish(stream, 5).await;
    gateway.terminate();
    eventually("it is stopping", async || gateway.logs().contains("stopping").then_some(())).await;
    upstream.open_gate();
    assert_eq!(gateway.wait_for_exit().await.code(), Some(0));
    gateway.restart();
    assert_eq!(gateway.receipt(&customer, &id).await["charged_usdc"], 11);
    assert_eq!(spent(&gateway, &customer).await, 11);
}

#[tokio::test]
async fn a_stop_ends_what_does_not_finish_and_charges_what_was_delivered() {
    let patient = |setup: &mut Setup| setup.idle_timeout_s = 300;
    let (mut gateway, upstream, customer) = scripted_with(patient).await;
    upstream.play(five_chunks().silence(Duration::from_secs(600)));
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    for _ in 0..5 {
        stream.next().await.unwrap();
    }
    let since = std::time::Instant::now();
    gateway.terminate();
    // The grace is half a minute; nothing that hangs makes it longer than that and a little.
    let status = gateway.wait_for_exit().await;
    assert_eq!(status.code(), Some(0));
    assert!(since.elapsed() < Duration::from_secs(45), "{:?}", since.elapsed());
    gateway.restart();
    let receipt = gateway.receipt(&customer, &stream.id).await;
    assert_eq!(receipt["outcome"], "estimated", "{receipt}");
    let charged = receipt["charged_usdc"].as_u64().unwrap();
    assert!(charged > 0 && charged < receipt["hold_usdc"].as_u64().unwrap(), "{receipt}");
    assert_eq!(spent(&gateway, &customer).await, charged);
    gateway.audit();
}

#[tokio::test]
async fn a_slow_reader_holds_its_upstream_back() {
    let (gateway, upstream, customer) = scripted().await;
    let text = "x".repeat(64 << 10);
    let chunks = 1_000;
    let script = (0..chunks).fold(Script::stream(), |script, _| script.event(&chunk(&text)));
    upstream.play(script.event(&usage_chunk(usage(20, 9))).done());
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    stream.next().await.unwrap();
    // Until nothing more goes into the buffers on the way, which are the only ones there are.
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = upstream.sent_bytes();
        if now == before {
            break;
        }
        before = now;
    }
    let whole = chunks * text.len();
    assert!(before < whole / 2, "the gateway took {before} of {whole} bytes from the upstream by itself");
    let rest = stream.rest().await;
    assert_eq!((rest.len(), rest.last().unwrap().as_str()), (chunks, "[DONE]"));
}

#[tokio::test]
async fn a_stop_without_requests_is_quick_and_exits_0() {
    let mut gateway = Gateway::usual().await;
    gateway.get("/health").send().await.expect(200);
    let since = std::time::Instant::now();
    gateway.terminate();
    assert_eq!(gateway.wait_for_exit().await.code(), Some(0));
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
}

#[tokio::test]
async fn holds_of_a_gateway_that_was_killed_are_released_when_it_starts_again() {
    let (mut gateway, upstream, customer) = scripted().await;
    upstream.play(five_chunks().gate());
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
        stream.next().await.unwrap();
        streams.push(stream);
    }
    let before = gateway.balance(&customer.wallet).await;
    assert!(before.locked > 0, "{before:?}");
    gateway.kill_9();
    gateway.restart();
    let after = gateway.settled(&customer).await;
    assert_eq!((after.balance, after.locked), (BALANCE, 0));
    for stream in &streams {
        let receipt = gateway.receipt(&customer, &stream.id).await;
        assert_eq!((&receipt["outcome"], &receipt["charged_usdc"]), (&json!("released"), &json!(0)));
        assert!(receipt["reason"].is_string(), "{receipt}");
    }
    // And it serves again.
    upstream.play(whole());
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    assert_eq!(stream.rest().await.last().unwrap(), "[DONE]");
    assert_eq!(spent(&gateway, &customer).await, 11);
    gateway.audit();
}

#[tokio::test]
async fn what_was_settled_survives_a_kill() {
    let (mut gateway, upstream, customer) = scripted().await;
    upstream.play(whole());
    let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
    while stream.next().await.is_some_and(|event| event != "[DONE]") {}
    gateway.kill_9();
    gateway.restart();
    assert_eq!(gateway.receipt(&customer, &stream.id).await["charged_usdc"], 11);
    assert_eq!(spent(&gateway, &customer).await, 11);
    gateway.audit();
}
