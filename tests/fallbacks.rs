//! Whom a request is sent to when the first cannot answer it: other keys, other providers, nobody for a while.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::chain::TestChain;
use crate::support::eventually;
use crate::support::gateway::{Answer, Customer, Gateway, Setup};
use crate::support::upstream::{
    Script, ScriptedUpstream, chunk, completion, error, last_chunk, usage, usage_chunk,
};

const BALANCE: u64 = 1_000_000;
/// Asked first; falls back to [`SECOND`], which has twice its prices and another format.
const FIRST: &str = "first/model";
const SECOND: &str = "second/model";
/// With nobody to fall back to.
const ALONE: &str = "first/alone";
/// 20 and 9 tokens: at the first one's prices 8.4 micro-USDC, and a fifth on top, rounded up.
const FIRST_CHARGE: u64 = 11;
const SECOND_CHARGE: u64 = 21;
const KEYS: [&str; 2] = ["sk-first-one", "sk-first-two"];

struct House {
    gateway: Gateway,
    first: ScriptedUpstream,
    second: ScriptedUpstream,
    customer: Customer,
}

impl House {
    async fn open() -> Self {
        let (first, second) = (ScriptedUpstream::start().await, ScriptedUpstream::start().await);
        let mut setup = Setup::new(&TestChain::shared(), &first.base_url);
        setup.env.push(("FIRST_KEYS".into(), KEYS.join(", ")));
        let timeouts =
            "first_byte_timeout_s = 1\nidle_timeout_s = 1\ncooldown_s = 1\nfailures_before_cooldown = 2";
        let model = |id: &str, provider: &str, price: &str, more: &str| {
            format!(
                "[[models]]\nid = \"{id}\"\nprovider = \"{provider}\"\ncontext_length = 128000\n\
                 max_output_tokens = 16384\nprice = {price}\n{more}\n"
            )
        };
        let price = "{ prompt = \"0.15\", completion = \"0.60\" }";
        let dearer = "{ prompt = \"0.30\", completion = \"1.20\" }";
        setup.tables = [
            format!(
                "[[providers]]\nname = \"first\"\nbase_url = \"{}\"\napi_key_env = \"FIRST_KEYS\"\n{timeouts}\n",
                first.base_url
            ),
            format!(
                "[[providers]]\nname = \"second\"\nkind = \"anthropic\"\nbase_url = \"{}\"\n{timeouts}\n",
                second.base_url
            ),
            model(FIRST, "first", price, &format!("fallbacks = [\"{SECOND}\"]")),
            model(ALONE, "first", price, ""),
            model("first/unseen", "first", price, &format!("reasoning = \"allow\"\nfallbacks = [\"{SECOND}\"]")),
            model("first/unseen-alone", "first", price, "reasoning = \"allow\""),
            model(SECOND, "second", dearer, ""),
        ]
        .join("\n");
        let gateway = Gateway::start_with(setup).await;
        let customer = gateway.customer("1").await;
        second.play(message());
        Self { gateway, first, second, customer }
    }

    async fn ask(&self, model: &str) -> Answer {
        self.gateway.chat(&self.customer, &ask(model)).await
    }

    async fn ask_stream(&self, model: &str) -> Answer {
        let mut body = ask(model);
        body["stream"] = true.into();
        self.gateway.chat(&self.customer, &body).await
    }

    async fn receipt(&self, answer: &Answer) -> Value {
        self.gateway.receipt_in_time(&self.customer, answer.header("x-request-id").unwrap()).await
    }

    /// How often each has been asked.
    fn asked(&self) -> (usize, usize) {
        (self.first.received().len(), self.second.received().len())
    }

    /// Nothing was charged but this, and nothing is locked.
    async fn check_spent(&self, spent: u64) {
        assert_eq!(self.gateway.settled(&self.customer).await.balance, BALANCE - spent);
        self.gateway.audit();
    }

    async fn status_of(&self, model: &str) -> String {
        let list = self.gateway.get("/v1/models").send().await.expect(200).json();
        let row = list["data"].as_array().unwrap().iter().find(|row| row["id"] == model).unwrap().clone();
        row["status"].as_str().unwrap().to_owned()
    }
}

fn ask(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
}

/// What the second answers, in its own format.
fn message() -> Script {
    Script::json(
        200,
        &json!({
            "id": "msg_1", "type": "message", "role": "assistant", "model": "model",
            "content": [{"type": "text", "text": "Second."}], "stop_reason": "end_turn",
            "usage": {"input_tokens": 20, "output_tokens": 9},
        }),
    )
}

fn message_stream() -> Script {
    let event = |script: Script, kind: &str, mut data: Value| {
        data["type"] = kind.into();
        script.raw(&format!("event: {kind}\ndata: {data}\n\n"))
    };
    let start = json!({"message": {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "model", "content": [],
        "usage": {"input_tokens": 20, "output_tokens": 1},
    }});
    let block = json!({"index": 0, "content_block": {"type": "text", "text": ""}});
    let text = json!({"index": 0, "delta": {"type": "text_delta", "text": "Second."}});
    let end = json!({"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}});
    [
        ("message_start", start),
        ("content_block_start", block),
        ("content_block_delta", text),
        ("content_block_stop", json!({"index": 0})),
        ("message_delta", end),
        ("message_stop", json!({})),
    ]
    .into_iter()
    .fold(Script::stream(), |script, (kind, data)| event(script, kind, data))
    .end()
}

fn chat_stream() -> Script {
    Script::stream().event(&chunk("First.")).event(&last_chunk()).event(&usage_chunk(usage(20, 9))).done()
}

fn refusal(status: u16) -> Script {
    Script::json(status, &error("no", "refused"))
}

/// What somebody else may answer where the first did not.
fn faults() -> Vec<(&'static str, Script)> {
    vec![
        ("404", refusal(404)),
        ("500", refusal(500)),
        ("503", refusal(503)),
        ("a page", Script::answer(200, &[("content-type", "text/html")], "<html>")),
        ("an error in a 200", Script::json(200, &error("overloaded", "overloaded"))),
        ("half an answer", Script::stream_of_type("application/json").raw("{\"choices\":[")),
        ("a hang-up", Script::hang_up()),
        ("silence", Script::hang_up().silence(Duration::from_secs(600))),
    ]
}

#[tokio::test]
async fn another_answers_what_the_first_cannot_and_is_who_is_paid() {
    let house = House::open().await;
    let mut spent = 0;
    for (what, script) in faults() {
        house.first.play(script);
        let answer = house.ask(FIRST).await.expect(200);
        let body = answer.json();
        // The client's format and the model it asked for, whoever answers.
        assert_eq!(body["choices"][0]["message"]["content"], "Second.", "{what}");
        assert_eq!(
            (&body["model"], &body["usage"]["charged_usdc"]),
            (&json!(FIRST), &json!(SECOND_CHARGE)),
            "{what}"
        );
        let receipt = house.receipt(&answer).await;
        assert_eq!(
            (&receipt["model"], &receipt["provider"], &receipt["outcome"], &receipt["charged_usdc"]),
            (&json!(FIRST), &json!("second"), &json!("settled"), &json!(SECOND_CHARGE)),
            "{what}"
        );
        assert_eq!(receipt["prices"]["completion"], "1.2", "{what}");
        spent += SECOND_CHARGE;
        house.check_spent(spent).await;
    }
}

#[tokio::test]
async fn the_hold_is_for_the_dearest_and_the_charge_for_who_answers() {
    let house = House::open().await;
    let answer = house.ask(FIRST).await.expect(200);
    let receipt = house.receipt(&answer).await;
    assert_eq!((&receipt["provider"], &receipt["charged_usdc"]), (&json!("first"), &json!(FIRST_CHARGE)));
    let alone = house.receipt(&house.ask(ALONE).await.expect(200)).await;
    let second = house.receipt(&house.ask(SECOND).await.expect(200)).await;
    assert_eq!(receipt["hold_usdc"], second["hold_usdc"]);
    assert!(alone["hold_usdc"].as_u64() < second["hold_usdc"].as_u64(), "{alone}");
    house.check_spent(2 * FIRST_CHARGE + SECOND_CHARGE).await;
}

/// Where nobody can tell what was used, the most that it can be with the one who answered is charged.
#[tokio::test]
async fn what_nobody_can_tell_costs_no_more_than_with_who_answered() {
    let house = House::open().await;
    house.first.play(Script::json(200, &completion(None)));
    let alone = house.receipt(&house.ask("first/unseen-alone").await.expect(200)).await;
    let first = house.receipt(&house.ask("first/unseen").await.expect(200)).await;
    assert_eq!(alone["charged_usdc"], alone["hold_usdc"], "{alone}");
    assert_eq!(first["charged_usdc"], alone["charged_usdc"], "{first}");
    assert!(first["hold_usdc"].as_u64() > first["charged_usdc"].as_u64(), "{first}");
}

#[tokio::test]
async fn a_stream_is_taken_over_until_there_is_output_and_not_after() {
    let house = House::open().await;
    house.second.play(message_stream());
    let mut role = chunk("");
    role["choices"][0]["delta"] = json!({"role": "assistant", "content": ""});
    let mut spent = 0;
    let failing = || Script::stream().event(&error("overloaded", "overloaded")).done();
    for (what, script) in [
        ("an error at once", failing()),
        (
            "an error after the role",
            Script::stream().event(&role).event(&error("overloaded", "overloaded")).done(),
        ),
        ("cut after the role", Script::stream().event(&role)),
        ("a whole answer", Script::json(200, &completion(Some(usage(20, 9))))),
        ("500", refusal(500)),
    ] {
        house.first.play(script);
        let answer = house.ask_stream(FIRST).await.expect(200);
        let text = answer.text();
        assert!(text.contains("Second.") && text.ends_with("data: [DONE]\n\n"), "{what}: {text}");
        // Nothing is seen of the one that failed.
        assert_eq!(text.matches("\"role\"").count(), 1, "{what}: {text}");
        let receipt = house.receipt(&answer).await;
        assert_eq!(
            (&receipt["provider"], &receipt["charged_usdc"]),
            (&json!("second"), &json!(SECOND_CHARGE)),
            "{what}"
        );
        spent += SECOND_CHARGE;
    }
    house.check_spent(spent).await;

    // With output on its way, what follows cannot be another's.
    eventually("the first has had its pause", async || {
        (house.status_of(ALONE).await == "live").then_some(())
    })
    .await;
    house
        .first
        .play(Script::stream().event(&chunk("Begun")).event(&error("overloaded", "overloaded")).done());
    let (_, asked) = house.asked();
    let answer = house.ask_stream(FIRST).await.expect(200);
    assert!(answer.text().contains("Begun") && answer.text().contains("stream_failed"), "{answer:?}");
    let receipt = house.receipt(&answer).await;
    assert_eq!((&receipt["provider"], &receipt["outcome"]), (&json!("first"), &json!("estimated")));
    assert_eq!(house.asked().1, asked);
}

#[tokio::test]
async fn a_request_that_is_at_fault_is_asked_of_nobody_else() {
    let house = House::open().await;
    for status in [400, 413, 422] {
        house.first.play(refusal(status));
        house.ask(FIRST).await.error(status, "upstream_bad_request");
    }
    // What the first has no place for is refused before anybody is asked.
    let mut body = ask(FIRST);
    body["audio"] = json!({"voice": "x"});
    house.gateway.chat(&house.customer, &body).await.expect(400);
    assert_eq!(house.asked(), (3, 0));
    house.check_spent(0).await;
}

#[tokio::test]
async fn what_a_fallback_finds_wrong_is_not_the_clients_fault() {
    let house = House::open().await;
    house.first.play(refusal(529));
    house.second.play(refusal(400));
    house.ask(FIRST).await.error(502, "upstream_refused");
    assert_eq!(house.asked(), (1, 1));
    house.check_spent(0).await;
}

/// A report above what the one who answered could come to is not made good by what was held for another.
#[tokio::test]
async fn a_report_beyond_all_bounds_is_charged_as_who_answered_could_cost() {
    let house = House::open().await;
    let alone = house.receipt(&house.ask(ALONE).await.expect(200)).await;
    house.first.play(Script::json(200, &completion(Some(usage(1_000_000, 1_000_000)))));
    let receipt = house.receipt(&house.ask(FIRST).await.expect(200)).await;
    assert_eq!((&receipt["provider"], &receipt["charged_usdc"]), (&json!("first"), &alone["hold_usdc"]));
}

#[tokio::test]
async fn a_fallback_that_cannot_take_the_request_is_passed_over() {
    let house = House::open().await;
    house.first.play(refusal(500));
    // The second's format has no place for several choices.
    let mut body = ask(FIRST);
    body["n"] = 2.into();
    let answer = house.gateway.chat(&house.customer, &body).await;
    answer.error(502, "upstream_refused");
    assert_eq!(house.asked(), (1, 0));
    house.check_spent(0).await;
}

#[tokio::test]
async fn when_nobody_answers_the_client_is_told_why_the_first_did_not() {
    let house = House::open().await;
    house.first.play(refusal(404));
    house.second.play(refusal(500));
    let answer = house.ask(FIRST).await;
    answer.error(502, "upstream_refused");
    let receipt = house.receipt(&answer).await;
    assert_eq!(
        (&receipt["outcome"], &receipt["reason"], &receipt["charged_usdc"]),
        (&json!("released"), &json!("upstream_refused"), &json!(0))
    );
    house.check_spent(0).await;
}

/// The key that a request came with.
fn key_of(head: &str) -> &str {
    let (_, rest) = head.split_once("authorization: bearer ").unwrap();
    rest.split("\r\n").next().unwrap()
}

#[tokio::test]
async fn keys_take_turns_and_one_that_is_refused_or_limited_comes_last() {
    let house = House::open().await;
    let used = |from: usize| -> Vec<String> {
        let received = house.first.received();
        received[from..].iter().map(|received| key_of(&received.head).to_owned()).collect()
    };
    for _ in 0..4 {
        house.ask(ALONE).await.expect(200);
    }
    let turns = used(0);
    assert_eq!(
        (turns[0] == turns[2], turns[1] == turns[3], turns[0] != turns[1]),
        (true, true, true),
        "{turns:?}"
    );

    for (status, headers) in [(429, vec![("retry-after", "600")]), (401, vec![])] {
        let house = House::open().await;
        let used = || -> Vec<String> {
            house.first.received().iter().map(|received| key_of(&received.head).to_owned()).collect()
        };
        // Both keys are tried before anything is said; the first fault is what the client is told.
        house.first.play(Script::answer(status, &headers, error("no", "no").to_string()));
        let answer = house.ask(ALONE).await;
        assert_eq!(answer.status, if status == 429 { 429 } else { 502 });
        let tried = used();
        assert_eq!((tried.len(), tried[0] != tried[1]), (2, true), "{tried:?}");
        // Now both are let be, and asked all the same where there is nobody else …
        house.first.play(Script::json(200, &completion(Some(usage(20, 9)))));
        house.ask(ALONE).await.expect(200);
        assert_eq!(used().len(), 3);
        // … and not where there is.
        let answer = house.ask(FIRST).await.expect(200);
        assert_eq!(house.receipt(&answer).await["provider"], "second");
        assert_eq!(used().len(), 3);
    }
}

#[tokio::test]
async fn one_that_cannot_be_reached_is_let_be_and_tried_again() {
    let mut house = House::open().await;
    assert_eq!((house.status_of(ALONE).await, house.status_of(FIRST).await), ("live".into(), "live".into()));
    // What was paid for before is answered then, too.
    let named = async |house: &House| {
        let call = house.gateway.post("/v1/chat/completions").key(&house.customer.key);
        call.header("idempotency-key", "once").json(&ask(ALONE)).send().await
    };
    let once = named(&house).await.expect(200);
    house.first.go_away().await;
    for _ in 0..2 {
        house.ask(ALONE).await.error(502, "upstream_unreachable");
    }
    let (before, _) = house.asked();
    // It is open: nobody waits for it, and nothing is held.
    let answer = house.ask(ALONE).await;
    answer.error(503, "model_unavailable");
    assert_eq!(answer.number("retry-after"), 1);
    // Nobody is asked to pay for it either: no stranger, and nobody who has too little and may have asked before.
    let unpaid = house.gateway.post("/v1/chat/completions").json(&ask(ALONE)).send().await;
    unpaid.error(503, "model_unavailable");
    let pauper = house.gateway.customer("0").await;
    for customer in [&pauper, &house.customer] {
        let call = house.gateway.post("/v1/chat/completions").key(&customer.key);
        let named = call.header("idempotency-key", "another").json(&ask(ALONE)).send().await;
        named.error(503, "model_unavailable");
        assert_eq!(named.number("retry-after"), 1);
    }
    let again = named(&house).await.expect(200);
    assert_eq!((again.header("idempotent-replayed"), again.text()), (Some("true"), once.text()));
    // The second cannot be told of two choices, so that with the first away nobody can.
    let mut two = ask(FIRST);
    two["n"] = 2.into();
    house.gateway.chat(&house.customer, &two).await.error(503, "model_unavailable");
    assert_eq!(
        (house.status_of(ALONE).await, house.status_of(FIRST).await),
        ("unavailable".into(), "live".into())
    );
    let answer = house.ask(FIRST).await.expect(200);
    assert_eq!(house.receipt(&answer).await["provider"], "second");
    assert_eq!(house.asked().0, before);

    house.first.come_back().await;
    eventually("it is tried again", async || (house.ask(ALONE).await.status == 200).then_some(())).await;
    assert_eq!(house.status_of(ALONE).await, "live");
    house.ask(ALONE).await.expect(200);
    house.check_spent(SECOND_CHARGE + 3 * FIRST_CHARGE).await;
}

/// Each may bill for what it was sent and did not answer in time, and the client waits all the while.
#[tokio::test]
async fn what_two_did_not_answer_in_time_is_asked_of_nobody_else() {
    let house = House::open().await;
    let silence = || Script::hang_up().silence(Duration::from_secs(600));
    house.first.play(silence());
    house.second.play(silence());
    house.ask(FIRST).await.error(504, "upstream_timeout");
    assert_eq!(house.asked(), (1, 1));
    // Two keys of one alone are two requests as well.
    house.ask(ALONE).await.error(504, "upstream_timeout");
    assert_eq!(house.asked(), (2, 1));
    house.check_spent(0).await;
}

#[tokio::test]
async fn for_a_client_that_has_gone_nobody_else_is_asked() {
    let house = House::open().await;
    house.first.play(Script::held_back(refusal(500)));
    let call = house.gateway.post("/v1/chat/completions").key(&house.customer.key).json(&ask(FIRST));
    let waiting = tokio::spawn(call.0.send());
    eventually("the first is asked", async || (house.asked().0 == 1).then_some(())).await;
    waiting.abort();
    let _ = waiting.await;
    // Of a connection that is gone the gateway hears when it looks: its log has no line of that.
    eventually("the hold is there", async || {
        Some(house.gateway.balance(&house.customer.wallet).await.locked).filter(|locked| *locked > 0)
    })
    .await;
    house.first.open_gate();
    house.check_spent(0).await;
    assert_eq!(house.asked(), (1, 0));
}

/// What a client sends can be the reason that nothing comes back, and must not take the model from the others.
#[tokio::test]
async fn requests_that_are_never_answered_do_not_close_the_model_for_another() {
    let house = House::open().await;
    for script in [Script::hang_up(), Script::hang_up().silence(Duration::from_secs(600))] {
        for _ in 0..3 {
            house.first.play(script.clone());
            let status = house.ask(ALONE).await.status;
            assert!(matches!(status, 502 | 504), "{status}");
        }
    }
    house.first.play(chat_stream());
    house.ask_stream(ALONE).await.expect(200);
}

/// Streams that begin and never go on are failures like any other.
#[tokio::test]
async fn a_provider_whose_streams_all_break_off_comes_last() {
    let house = House::open().await;
    house.first.play(Script::stream().event(&chunk("Begun")));
    for _ in 0..2 {
        let answer = house.ask_stream(ALONE).await.expect(200);
        assert!(answer.text().contains("stream_failed"), "{answer:?}");
    }
    let answer = house.ask(FIRST).await.expect(200);
    assert_eq!(house.receipt(&answer).await["provider"], "second");
}

/// What is free tells nothing of how a provider fares, and what it says is not passed on unread.
#[tokio::test]
async fn counting_tokens_is_in_nobodys_way() {
    let house = House::open().await;
    let count = async || {
        let call = house.gateway.post("/v1/messages/count_tokens").key(&house.customer.key);
        call.json(&ask(SECOND)).send().await
    };
    let estimate = json!({"input_tokens": 2});
    for script in [
        refusal(500),
        refusal(429),
        refusal(401),
        Script::hang_up(),
        Script::answer(200, &[], "<html>"),
        Script::json(200, &json!({"input_tokens": "many"})),
        Script::hang_up().silence(Duration::from_secs(600)),
    ] {
        house.second.play(script);
        for _ in 0..2 {
            assert_eq!(count().await.expect(200).json(), estimate);
        }
    }
    assert_eq!(house.status_of(SECOND).await, "live");
    house.second.play(Script::json(200, &json!({"input_tokens": 7, "more": "words"})));
    assert_eq!(count().await.expect(200).json(), json!({"input_tokens": 7}));
    house.second.play(refusal(400));
    assert_eq!(count().await.expect(400).json()["error"]["code"], "upstream_bad_request");
}

/// An error can be of the client's own making, and must not take the model from the others.
#[tokio::test]
async fn errors_of_one_client_do_not_close_the_model_for_another() {
    let house = House::open().await;
    for status in [500, 403, 402, 500, 500, 401] {
        house.first.play(refusal(status));
        house.ask(ALONE).await.expect(502);
    }
    house.first.play(chat_stream());
    let answer = house.ask_stream(ALONE).await.expect(200);
    assert!(answer.text().contains("First."), "{answer:?}");
}
