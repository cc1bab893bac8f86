//! Conversations in each format, and what each of the others makes of them, as they stand in
//! `tests/formats`. With `FAREBOX_BLESS` set the expected ones are written anew, to be read over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::formats::answer::Forward;
use crate::formats::chat::tests::offer as chat_offer;
use crate::formats::conversation::{ClientFormat, UpstreamFormat};
use crate::formats::errors::ErrorText;
use crate::formats::exchange::{Exchange, Request};
use crate::formats::sse::{Event, Splitter};
use crate::money::MicroUsdc;
use crate::pricing::{Offer, Reasoning};

const CLIENTS: [(&str, ClientFormat); 3] = [
    ("chat", ClientFormat::Chat),
    ("messages", ClientFormat::Messages),
    ("responses", ClientFormat::Responses),
];
const UPSTREAMS: [(&str, UpstreamFormat, &str); 3] = [
    ("chat", UpstreamFormat::Chat, "gpt-5-mini"),
    ("messages", UpstreamFormat::Messages, "claude-sonnet-4-5"),
    ("gemini", UpstreamFormat::Gemini, "gemini-3-flash"),
];
const CHARGED: MicroUsdc = MicroUsdc::new(11);

pub(super) fn offer(upstream_model: &str) -> Offer {
    Offer { upstream_model: upstream_model.into(), reasoning: Reasoning::Allow, ..chat_offer() }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/formats")
}

fn given(name: &str) -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(folder().join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn hold_to(name: &str, actual: &BTreeMap<String, Value>) {
    let path = folder().join("expected").join(name);
    if std::env::var_os("FAREBOX_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text = serde_json::to_string_pretty(actual).unwrap();
        return std::fs::write(path, text + "\n").unwrap();
    }
    let expected: BTreeMap<String, Value> =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    for (case, value) in actual {
        assert_eq!(Some(value), expected.get(case), "{name}: {case}");
    }
    assert_eq!(actual.len(), expected.len(), "{name} holds cases that nobody makes");
}

fn parse(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

/// A request's body, with its numbers as they are written.
fn body(request: &Value) -> Vec<u8> {
    serde_json::to_vec(request).unwrap()
}

#[test]
fn requests_become_each_others() {
    for (client_name, client) in CLIENTS {
        for (upstream_name, upstream, model) in UPSTREAMS {
            if upstream.is_of(client) {
                continue;
            }
            let mut made = BTreeMap::new();
            for (case, request) in given(&format!("requests_{client_name}.json")) {
                let body = body(&request);
                let request = Request::parse(client, &body).unwrap();
                let offer = offer(model);
                request.bounds(&offer).unwrap();
                let sent = match request.to_upstream(&offer, upstream) {
                    Ok(sent) => json!({"path": sent.path, "body": parse(&sent.body)}),
                    Err(refused) => {
                        assert_eq!(refused.code, "unsupported_parameter", "{refused:?}");
                        json!({"refused": refused.param, "message": refused.message})
                    }
                };
                made.insert(case, sent);
            }
            hold_to(&format!("requests_{client_name}_to_{upstream_name}.json"), &made);
        }
    }
}

fn exchange(client: ClientFormat, upstream: UpstreamFormat) -> Exchange {
    let request: &[u8] = match client {
        ClientFormat::Chat => {
            br#"{"model":"p/m","messages":[{"role":"user","content":"?"}],"stream":true,"stream_options":{"include_usage":true}}"#
        }
        ClientFormat::Messages => {
            br#"{"model":"p/m","max_tokens":9,"messages":[{"role":"user","content":"?"}],"stream":true}"#
        }
        ClientFormat::Responses => {
            br#"{"model":"p/m","input":"?","instructions":"Be brief.","temperature":0.5,"stream":true}"#
        }
    };
    Request::parse(client, request).unwrap().exchange(upstream, "req_00ff", 1_700_000_000)
}

/// The bytes of a stream in an upstream's format.
fn stream_bytes(upstream: UpstreamFormat, events: &[Value]) -> Vec<u8> {
    let mut out = Vec::new();
    for event in events {
        let data = event.as_str().map_or_else(|| event.to_string(), str::to_owned);
        let bytes = match upstream {
            UpstreamFormat::Messages => Event::named(event["type"].as_str().unwrap(), data.as_bytes()),
            _ => Event::from_data(data.as_bytes()),
        };
        out.extend_from_slice(&bytes);
    }
    out
}

/// What a client is sent of a stream that comes in these pieces, up to its end.
fn told(exchange: &Exchange, pieces: &[&[u8]]) -> Vec<u8> {
    let mut tap = exchange.tap();
    let mut splitter = Splitter::default();
    let mut out = Vec::new();
    for piece in pieces {
        splitter.push(piece);
        while let Some(event) = splitter.next_event().unwrap() {
            match tap.event(&event) {
                Forward::Send(bytes) => out.extend_from_slice(&bytes),
                Forward::Skip => {}
                Forward::Done => {
                    out.extend_from_slice(&tap.last(CHARGED));
                    return out;
                }
                other => panic!("{other:?} at {event:?}"),
            }
        }
    }
    assert!(tap.is_finished(), "it broke off");
    assert!(tap.usage_raw().is_none() || tap.is_reported_at_end());
    out.extend_from_slice(&tap.last(CHARGED));
    out
}

/// A client's stream as its events.
fn events_of(stream: &[u8]) -> Vec<Value> {
    let mut splitter = Splitter::default();
    splitter.push(stream);
    let mut events = Vec::new();
    while let Some(event) = splitter.next_event().unwrap() {
        let data = event.data().unwrap();
        let data = serde_json::from_slice(&data).unwrap_or_else(|_| {
            assert_eq!(data.as_ref(), b"[DONE]");
            json!("[DONE]")
        });
        if let Some(name) = event.name() {
            assert_eq!(data["type"], name);
        }
        events.push(data);
    }
    assert_eq!(splitter.rest(), None);
    events
}

#[test]
fn answers_become_each_others_whole_and_as_streams() {
    for (upstream_name, upstream, _) in UPSTREAMS {
        for (client_name, client) in CLIENTS {
            if upstream.is_of(client) {
                continue;
            }
            let exchange = exchange(client, upstream);
            let mut made = BTreeMap::new();
            for (case, answer) in given(&format!("answers_{upstream_name}.json")) {
                let whole = body(&answer["whole"]);
                let read = exchange.read(&whole).unwrap();
                let reported = answer["whole"].get("usage").or_else(|| answer["whole"].get("usageMetadata"));
                assert_eq!(read.usage_raw().map(|raw| parse(raw.as_bytes())).as_ref(), reported);
                let whole = parse(&read.render(CHARGED));

                let stream = stream_bytes(upstream, answer["stream"].as_array().unwrap());
                let sent = told(&exchange, &[&stream]);
                for cut in 1..stream.len() {
                    assert!(
                        told(&exchange, &[&stream[..cut], &stream[cut..]]) == sent,
                        "{case} cut at {cut}"
                    );
                }
                let bytes: Vec<&[u8]> = stream.chunks(1).collect();
                assert!(told(&exchange, &bytes) == sent, "{case} byte by byte");

                let events = events_of(&sent);
                let gathered = gather(client, &events);
                assert_eq!(
                    gathered,
                    without_stream_differences(client, whole.clone()),
                    "{upstream_name} {case}"
                );
                made.insert(case, json!({"whole": whole, "stream": events}));
            }
            hold_to(&format!("answers_{upstream_name}_to_{client_name}.json"), &made);
        }
    }
}

/// What a client makes of a stream, as its own software does.
fn gather(client: ClientFormat, events: &[Value]) -> Value {
    match client {
        ClientFormat::Chat => gather_chat(events),
        ClientFormat::Messages => gather_messages(events),
        ClientFormat::Responses => gather_responses(events),
    }
}

fn append(text: &mut Value, more: &Value) {
    if let Some(more) = more.as_str() {
        *text = json!(text.as_str().unwrap_or_default().to_owned() + more);
    }
}

fn gather_chat(events: &[Value]) -> Value {
    let (last, events) = events.split_last().unwrap();
    assert_eq!(last, "[DONE]");
    let mut message = json!({"role": "assistant", "content": null, "refusal": null});
    let mut choice = json!({"index": 0, "logprobs": null});
    let mut whole = events[0].clone();
    for chunk in events {
        for key in ["id", "created", "model"] {
            assert_eq!(chunk[key], whole[key]);
        }
        if !chunk["usage"].is_null() {
            whole["usage"] = chunk["usage"].clone();
        }
        let Some(given) = chunk["choices"].get(0) else { continue };
        if !given["finish_reason"].is_null() {
            choice["finish_reason"] = given["finish_reason"].clone();
        }
        let delta = &given["delta"];
        for key in ["content", "refusal", "reasoning_content"] {
            if delta.get(key).is_some() {
                append(&mut message[key], &delta[key]);
            }
        }
        if let Some(blocks) = delta["thinking_blocks"].as_array() {
            if message.get("thinking_blocks").is_none() {
                message["thinking_blocks"] = json!([]);
            }
            message["thinking_blocks"].as_array_mut().unwrap().extend(blocks.clone());
        }
        for call in delta["tool_calls"].as_array().unwrap_or(&Vec::new()) {
            if message.get("tool_calls").is_none() {
                message["tool_calls"] = json!([]);
            }
            let calls = message["tool_calls"].as_array_mut().unwrap();
            let at = usize::try_from(call["index"].as_u64().unwrap()).unwrap();
            if at == calls.len() {
                let mut first = call.clone();
                first.as_object_mut().unwrap().remove("index");
                calls.push(first);
            } else {
                append(&mut calls[at]["function"]["arguments"], &call["function"]["arguments"]);
            }
        }
    }
    if message["content"] == "" {
        message["content"] = Value::Null;
    }
    choice["message"] = message;
    whole["object"] = json!("chat.completion");
    whole["choices"] = json!([choice]);
    whole
}

fn gather_messages(events: &[Value]) -> Value {
    assert_eq!(events.last().unwrap()["type"], "message_stop");
    let mut message = events[0]["message"].clone();
    let mut open = Vec::new();
    for event in &events[1..] {
        let blocks = message["content"].as_array_mut().unwrap();
        let at = event["index"].as_u64().map(|at| usize::try_from(at).unwrap());
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!(at, Some(blocks.len()));
                open.push(at.unwrap());
                let mut block = event["content_block"].clone();
                if block["type"] == "tool_use" {
                    block["input"] = json!("");
                }
                blocks.push(block);
            }
            "content_block_delta" => {
                let at = at.unwrap();
                assert!(open.contains(&at));
                let delta = &event["delta"];
                for (key, of) in [
                    ("text", "text"),
                    ("thinking", "thinking"),
                    ("signature", "signature"),
                    ("input", "partial_json"),
                ] {
                    if delta.get(of).is_some() {
                        append(&mut blocks[at][key], &delta[of]);
                    }
                }
            }
            "content_block_stop" => {
                let at = at.unwrap();
                open.retain(|open| *open != at);
                if let Some(text) = blocks[at]["input"].as_str().map(str::to_owned) {
                    blocks[at]["input"] = serde_json::from_str(&text).unwrap_or_else(|_| json!({}));
                }
            }
            "message_delta" => {
                assert!(open.is_empty());
                for key in ["stop_reason", "stop_sequence"] {
                    message[key] = event["delta"][key].clone();
                }
                message["usage"] = event["usage"].clone();
            }
            "message_stop" => {}
            other => panic!("{other}"),
        }
    }
    message
}

fn gather_responses(events: &[Value]) -> Value {
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let last = events.last().unwrap();
    let done: Vec<&Value> =
        events.iter().filter(|event| event["type"] == "response.output_item.done").collect();
    let mut items = vec![Value::Null; done.len()];
    for event in done {
        items[usize::try_from(event["output_index"].as_u64().unwrap()).unwrap()] = event["item"].clone();
    }
    assert_eq!(last["response"]["output"], json!(items));
    // The deltas come to what their items hold.
    for item in &items {
        let told: String = events
            .iter()
            .filter(|event| event["item_id"] == item["id"])
            .filter_map(|event| event["delta"].as_str())
            .collect();
        let held = [&item["arguments"], &item["content"][0]["text"], &item["content"][0]["refusal"]];
        let held = held.into_iter().chain([&item["summary"][0]["text"]]).find_map(Value::as_str);
        assert_eq!(told, held.unwrap_or_default());
    }
    last["response"].clone()
}

/// A stream opens with an empty text, so that no text and an empty one are one in it.
fn without_stream_differences(client: ClientFormat, mut whole: Value) -> Value {
    if client == ClientFormat::Chat && whole["choices"][0]["message"]["content"] == "" {
        whole["choices"][0]["message"]["content"] = Value::Null;
    }
    whole
}

#[test]
fn a_stream_in_the_clients_own_format_passes_wherever_it_is_cut() {
    let given_of = |name: &str| given(&format!("answers_{name}.json"));
    for (name, client, upstream) in [
        ("chat", ClientFormat::Chat, UpstreamFormat::Chat),
        ("messages", ClientFormat::Messages, UpstreamFormat::Messages),
    ] {
        let exchange = exchange(client, upstream);
        for (case, answer) in given_of(name) {
            let events = answer["stream"].as_array().unwrap();
            let stream = stream_bytes(upstream, events);
            let sent = told(&exchange, &[&stream]);
            for cut in 1..stream.len() {
                assert!(told(&exchange, &[&stream[..cut], &stream[cut..]]) == sent, "{case} cut at {cut}");
            }
            // What the client sees differs by the model's name and what was charged, and by nothing else.
            let mut expected = events.clone();
            for event in &mut expected {
                for path in ["/model", "/message/model"] {
                    if let Some(model) = event.pointer_mut(path) {
                        *model = json!("p/m");
                    }
                }
                if event["type"] == "message_delta" {
                    event["usage"]["charged_usdc"] = json!(11);
                }
            }
            assert_eq!(events_of(&sent), expected, "{case}");
        }
    }
}

#[test]
fn a_stream_that_fails_ends_as_its_clients_format_has_it() {
    let error = ErrorText {
        status: 502,
        code: "stream_failed",
        message: "it broke off",
        param: None,
        request_id: Some("req_00ff"),
    };
    for (_, client) in CLIENTS {
        for (_, upstream, _) in UPSTREAMS {
            let mut tap = exchange(client, upstream).tap();
            let failed = match upstream {
                UpstreamFormat::Messages => Event(Event::named("error", br#"{"type":"error","error":{}}"#)),
                _ => Event(Event::from_data(br#"{"error":{"message":"no"}}"#)),
            };
            assert_eq!(tap.event(&failed), Forward::Failed);
            assert_eq!(tap.event(&Event(Event::from_data(b"{nonsense"))), Forward::Nonsense);
            assert!(!tap.delivered_anything() && !tap.is_finished());
            let [event] = events_of(&tap.failure(&error)).try_into().unwrap();
            assert_eq!(event["error"]["message"], "it broke off");
            if client == ClientFormat::Responses {
                assert_eq!(
                    (&event["message"], &event["sequence_number"]),
                    (&json!("it broke off"), &json!(0))
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever an upstream sends and a client asks, there is an answer to it.
    #[test]
    fn nothing_that_comes_is_too_strange(
        places in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0usize..12), 1..4),
        which in any::<prop::sample::Index>(),
    ) {
        let spoil = |mut bytes: Vec<u8>| {
            for (place, byte, gone) in &places {
                let at = place.index(bytes.len());
                let end = (at + gone).min(bytes.len());
                bytes.splice(at..end, [*byte]);
            }
            bytes
        };
        for (client_name, client) in CLIENTS {
            let requests = given(&format!("requests_{client_name}.json"));
            let request = requests.values().nth(which.index(requests.len())).unwrap();
            let spoilt = spoil(body(request));
            for (upstream_name, upstream, model) in UPSTREAMS {
                if let Ok(request) = Request::parse(client, &spoilt) {
                    let _ = request.bounds(&offer(model));
                    let _ = request.to_upstream(&offer(model), upstream);
                }
                let exchange = exchange(client, upstream);
                let answers = given(&format!("answers_{upstream_name}.json"));
                let answer = answers.values().nth(which.index(answers.len())).unwrap();
                if let Ok(answer) = exchange.read(&spoil(body(&answer["whole"]))) {
                    answer.estimated_completion();
                    parse(&answer.render(CHARGED));
                }
                let mut tap = exchange.tap();
                let mut splitter = Splitter::default();
                splitter.push(&spoil(stream_bytes(upstream, answer["stream"].as_array().unwrap())));
                let mut sent = Vec::new();
                while let Some(event) = splitter.next_event().unwrap() {
                    if let Forward::Send(bytes) = tap.event(&event) {
                        sent.extend_from_slice(&bytes);
                    }
                }
                tap.last(CHARGED);
            }
        }
    }
}

#[test]
fn numbers_and_schemas_keep_their_text() {
    let request = br#"{"model":"p/m","temperature":0.70,"seed":12345678901234567890,
        "tools":[{"type":"function","function":{"name":"f","parameters":{"z":1.0,"a":{"maximum":1e400}}}}],
        "messages":[{"role":"user","content":"?"},{"role":"assistant","tool_calls":[
            {"id":"c","type":"function","function":{"name":"f","arguments":"{\"b\":1.00,\"a\":123456789012345678901}"}}]}]}"#;
    let request = Request::parse(ClientFormat::Chat, request).unwrap();
    let sent = request.to_upstream(&offer("gemini-2.5-pro"), UpstreamFormat::Gemini).unwrap();
    let sent = String::from_utf8(sent.body.to_vec()).unwrap();
    for text in [
        r#""temperature":0.70"#,
        r#""seed":12345678901234567890"#,
        r#""parametersJsonSchema":{"z":1.0,"a":{"maximum":1e400}}"#,
        r#""args":{"b":1.00,"a":123456789012345678901}"#,
    ] {
        assert!(sent.contains(text), "{text} is not in {sent}");
    }
}

#[test]
fn a_comment_keeps_the_connection_of_any_client_alive() {
    let comment = Event(Bytes::from_static(b": still working\n\n"));
    for (_, client) in CLIENTS {
        for (_, upstream, _) in UPSTREAMS {
            let mut tap = exchange(client, upstream).tap();
            assert_eq!(tap.event(&comment), Forward::Send(comment.0.clone()));
            assert!(!tap.delivered_anything() && !tap.is_finished());
        }
    }
}
