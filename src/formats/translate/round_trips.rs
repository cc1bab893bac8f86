//! What has a place in both formats comes back as it was.

use proptest::prelude::*;

use crate::formats::conversation::{
    Call, ClientFormat, Conversation, Effort, Format, Media, MediaKind, Part, Reasoning, Role, Sampling,
    Source, Thinking, Tool, ToolChoice, ToolResult, Turn,
};
use crate::formats::exchange::Request;
use crate::formats::golden::offer;
use crate::formats::translate::{chat_request, messages_request, no_place_for};

const CHAT_MODEL: &str = "gemini-behind-chat";
const MESSAGES_MODEL: &str = "claude-opus-5";

fn text() -> impl Strategy<Value = String> {
    // What is blank is left out for Anthropic.
    prop_oneof!["[a-z ]{0,11}[a-z]", "\\PC{0,11}[a-z]", Just("\"\\\n\u{1f600}\u{0}".to_owned())]
}

fn id() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9_-]{1,20}"
}

/// The text of an object, in no order that a map would give it.
fn object() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("{}".to_owned()),
        Just(r#"{"z":1.50,"a":[1e3,null],"ä":"\n\"","n":123456789012345678901}"#.to_owned()),
        text().prop_map(|text| serde_json::json!({"type": "object", "text": text}).to_string()),
    ]
}

fn media() -> impl Strategy<Value = Part> {
    let source = prop_oneof![
        text().prop_map(|path| Source::Url(format!("https://example.com/{path}"))),
        "[A-Za-z0-9+/]{4,16}".prop_map(|data| Source::Base64 { media_type: "image/png".into(), data }),
    ];
    source.prop_map(|source| Part::Media(Media { kind: MediaKind::Image, source, name: None }))
}

fn user_turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        text().prop_map(|text| vec![Part::Text(text)]),
        (media(), proptest::collection::vec(prop_oneof![media(), text().prop_map(Part::Text)], 0..3))
            .prop_map(|(first, rest)| std::iter::once(first).chain(rest).collect()),
    ]
    .prop_map(|parts| Turn { role: Role::User, parts })
}

fn call() -> impl Strategy<Value = Call> {
    (id(), "[a-z_]{1,9}", object()).prop_map(|(id, name, arguments)| Call {
        id,
        name,
        arguments,
        signature: None,
    })
}

/// What a model says, calls, and is answered.
fn model_turns() -> impl Strategy<Value = Vec<Turn>> {
    let said = proptest::option::of(text());
    (said, proptest::collection::vec((call(), text()), 0..4)).prop_map(|(said, calls)| {
        let mut parts: Vec<Part> = said.into_iter().map(Part::Text).collect();
        let mut results = Vec::new();
        for (call, result) in calls {
            results.push(Part::Result(ToolResult {
                call_id: call.id.clone(),
                parts: vec![Part::Text(result)],
                is_error: false,
            }));
            parts.push(Part::Call(call));
        }
        let mut turns = Vec::new();
        if !parts.is_empty() {
            turns.push(Turn { role: Role::Assistant, parts });
        }
        if !results.is_empty() {
            turns.push(Turn { role: Role::User, parts: results });
        }
        turns
    })
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let rounds = proptest::collection::vec((user_turn(), model_turns()), 1..4);
    (rounds, user_turn()).prop_map(|(rounds, last)| {
        let rounds = rounds.into_iter().flat_map(|(user, model)| std::iter::once(user).chain(model));
        rounds.chain([last]).collect()
    })
}

fn tools() -> impl Strategy<Value = Vec<Tool>> {
    let tool = ("[a-z_]{1,9}", proptest::option::of(text()), object(), proptest::option::of(any::<bool>()));
    let tool = tool.prop_map(|(name, description, parameters, strict)| Tool {
        name,
        description,
        parameters: Some(parameters),
        strict,
    });
    proptest::collection::vec(tool, 0..3)
}

fn choice() -> impl Strategy<Value = Option<ToolChoice>> {
    proptest::option::of(prop_oneof![
        Just(ToolChoice::Auto),
        Just(ToolChoice::Required),
        "[a-z_]{1,9}".prop_map(ToolChoice::Named),
    ])
}

fn number() -> impl Strategy<Value = Option<String>> {
    proptest::option::of(prop_oneof![Just("0.70".to_owned()), Just("1".to_owned()), Just("0".to_owned())])
}

/// Conversations of what both formats have a place for.
fn conversation() -> impl Strategy<Value = Conversation> {
    let effort = proptest::option::of(prop_oneof![Just(Effort::Low), Just(Effort::High), Just(Effort::Max)]);
    let format = proptest::option::of(object());
    let stop = proptest::collection::vec(text(), 0..3);
    let limits = (2_000u64..10_000, any::<bool>(), any::<bool>(), number(), number());
    (proptest::option::of(text()), turns(), tools(), choice(), effort, format, stop, limits).prop_map(
        |(system, turns, tools, tool_choice, effort, format, stop, limits)| {
            let (max_tokens, one_call, stream, temperature, top_p) = limits;
            let tool_choice = tool_choice.filter(|_| !tools.is_empty());
            Conversation {
                names: &chat_request::NAMES,
                system: system.into_iter().collect(),
                turns,
                one_call: one_call && tool_choice.is_some(),
                tools,
                tool_choice,
                max_tokens,
                sampling: Sampling { temperature, top_p, ..Sampling::default() },
                stop,
                format: format.map(|schema| Format::Schema {
                    name: Some("answer".into()),
                    description: None,
                    schema,
                    strict: Some(true),
                }),
                verbosity: None,
                reasoning: Reasoning { thinking: None, effort },
                stream,
            }
        },
    )
}

fn read(format: ClientFormat, body: &str, model: &str) -> Conversation {
    let offer = offer(model);
    let request = Request::parse(format, body.as_bytes()).unwrap();
    request.bounds(&offer).unwrap();
    request.conversation(&offer).unwrap()
}

/// Without what one format says and another means: what its members are called, how a schema that has
/// no name is called, and that a model is to think at all.
fn bare(mut conversation: Conversation) -> Conversation {
    conversation.names = &chat_request::NAMES;
    if let Some(Format::Schema { name, .. }) = &mut conversation.format {
        *name = None;
    }
    if conversation.reasoning.thinking == Some(Thinking::Adaptive) {
        conversation.reasoning.thinking = None;
    }
    conversation
}

/// Texts side by side as one, which is how chat completions tell them.
fn texts_joined(mut conversation: Conversation) -> Conversation {
    for turn in &mut conversation.turns {
        if turn.parts.iter().all(|part| matches!(part, Part::Text(_))) {
            let texts: Vec<&str> = turn
                .parts
                .iter()
                .filter_map(|part| match part {
                    Part::Text(text) => Some(text.as_str()),
                    _ => None,
                })
                .collect();
            turn.parts = vec![Part::Text(texts.join("\n\n"))];
        }
    }
    conversation
}

/// Neighbours of one role as one turn, which is how messages tell them.
fn turns_joined(mut conversation: Conversation) -> Conversation {
    let turns = conversation
        .joined_turns()
        .into_iter()
        .map(|(role, parts)| Turn { role, parts: parts.into_iter().cloned().collect() })
        .collect();
    conversation.turns = turns;
    conversation
}

/// What is told, whoever's turns it stands in: texts side by side as one, results before words.
fn told(conversation: &Conversation) -> Vec<(Role, Part)> {
    let mut told: Vec<(Role, Part)> = Vec::new();
    for (role, parts) in conversation.joined_turns() {
        for part in parts {
            match (told.last_mut(), part) {
                (Some((last, Part::Text(text))), Part::Text(more)) if *last == role => {
                    text.push_str("\n\n");
                    text.push_str(more);
                }
                _ => told.push((role, part.clone())),
            }
        }
    }
    told
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn by_way_of_chat_completions(conversation in conversation()) {
        let body = chat_request::write(&conversation, "p/m", "max_tokens").unwrap();
        let back = read(ClientFormat::Chat, &body, CHAT_MODEL);
        prop_assert_eq!(bare(back), texts_joined(bare(conversation)));
    }

    #[test]
    fn by_way_of_messages(conversation in conversation()) {
        let body = messages_request::write(&conversation, MESSAGES_MODEL).unwrap();
        let back = read(ClientFormat::Messages, &body, MESSAGES_MODEL);
        prop_assert_eq!(bare(back), turns_joined(bare(conversation)));
    }

    #[test]
    fn by_way_of_one_after_the_other(conversation in conversation()) {
        let messages = messages_request::write(&conversation, MESSAGES_MODEL).unwrap();
        let read_back = read(ClientFormat::Messages, &messages, MESSAGES_MODEL);
        let chat = chat_request::write(&read_back, "p/m", "max_tokens").unwrap();
        let again = read(ClientFormat::Chat, &chat, CHAT_MODEL);
        let messages_again = messages_request::write(&again, MESSAGES_MODEL).unwrap();
        let back = read(ClientFormat::Messages, &messages_again, MESSAGES_MODEL);
        prop_assert_eq!(told(&back), told(&conversation));
        prop_assert_eq!(bare(Conversation { turns: Vec::new(), ..back }), bare(Conversation { turns: Vec::new(), ..conversation }));
    }
}

/// What has no place on the other side, in requests that pass through to their own.
#[test]
fn what_has_no_place_is_refused_by_its_name() {
    use crate::formats::conversation::UpstreamFormat::{Chat, Gemini, Messages};
    let chat = |members: &str| {
        format!(r#"{{"model":"p/m","messages":[{{"role":"user","content":"?"}}],{members}}}"#)
    };
    let message = |message: &str| format!(r#"{{"model":"p/m","messages":[{message}]}}"#);
    let anthropic = |members: &str| {
        format!(r#"{{"model":"p/m","max_tokens":9,"messages":[{{"role":"user","content":"?"}}],{members}}}"#)
    };
    let content = |content: &str| {
        format!(r#"{{"model":"p/m","max_tokens":9,"messages":[{{"role":"user","content":[{content}]}}]}}"#)
    };
    let responses = |members: &str| format!(r#"{{"model":"p/m","input":"?",{members}}}"#);
    for (client, body, upstream, param) in [
        (ClientFormat::Chat, chat(r#""n":2"#), Messages, "n"),
        (ClientFormat::Chat, chat(r#""logprobs":true"#), Gemini, "logprobs"),
        (ClientFormat::Chat, chat(r#""top_logprobs":3"#), Messages, "top_logprobs"),
        (ClientFormat::Chat, chat(r#""logit_bias":{"1":2}"#), Messages, "logit_bias"),
        (ClientFormat::Chat, chat(r#""seed":1"#), Messages, "seed"),
        (ClientFormat::Chat, chat(r#""presence_penalty":0.5"#), Messages, "presence_penalty"),
        (ClientFormat::Chat, chat(r#""store":true"#), Messages, "store"),
        (ClientFormat::Chat, chat(r#""x_unknown":1"#), Messages, "x_unknown"),
        (ClientFormat::Chat, chat(r#""prediction":{"type":"content","content":"x"}"#), Gemini, "prediction"),
        (ClientFormat::Chat, chat(r#""verbosity":"low""#), Messages, "verbosity"),
        (
            ClientFormat::Chat,
            chat(r#""response_format":{"type":"json_object"}"#),
            Messages,
            "response_format",
        ),
        (ClientFormat::Chat, chat(r#""functions":[]"#), Messages, "functions"),
        (
            ClientFormat::Chat,
            chat(r#""tools":[{"type":"custom","custom":{"name":"c"}}]"#),
            Messages,
            "tools[0].type",
        ),
        (
            ClientFormat::Chat,
            chat(r#""tool_choice":{"type":"allowed_tools","allowed_tools":{}}"#),
            Gemini,
            "tool_choice.type",
        ),
        (
            ClientFormat::Chat,
            message(r#"{"role":"user","name":"Ann","content":"?"}"#),
            Messages,
            "messages[0].name",
        ),
        (
            ClientFormat::Chat,
            message(r#"{"role":"user","content":[{"type":"file","file":{"file_id":"f"}}]}"#),
            Messages,
            "messages[0].content[0].file.file_id",
        ),
        (
            ClientFormat::Chat,
            message(
                r#"{"role":"user","content":[{"type":"input_audio","input_audio":{"data":"x","format":"wav"}}]}"#,
            ),
            Messages,
            "messages",
        ),
        (
            ClientFormat::Chat,
            message(r#"{"role":"assistant","audio":{"id":"a"}}"#),
            Gemini,
            "messages[0].audio",
        ),
        (ClientFormat::Messages, anthropic(r#""top_k":5"#), Chat, "top_k"),
        (
            ClientFormat::Messages,
            anthropic(r#""tools":[{"type":"bash_20250124","name":"bash"}]"#),
            Chat,
            "tools[0].type",
        ),
        (
            ClientFormat::Messages,
            anthropic(
                r#""tool_choice":{"type":"auto","disable_parallel_tool_use":true},"tools":[{"name":"f","input_schema":{}}]"#,
            ),
            Gemini,
            "tool_choice.disable_parallel_tool_use",
        ),
        (
            ClientFormat::Messages,
            content(r#"{"type":"search_result","source":"s","title":"t","content":[]}"#),
            Chat,
            "messages[0].content[0].type",
        ),
        (
            ClientFormat::Messages,
            content(r#"{"type":"document","source":{"type":"url","url":"https://x/y.pdf"}}"#),
            Chat,
            "messages",
        ),
        (ClientFormat::Responses, responses(r#""store":true"#), Messages, "store"),
        (ClientFormat::Responses, responses(r#""truncation":"auto""#), Chat, "truncation"),
        (ClientFormat::Responses, responses(r#""max_tool_calls":2"#), Gemini, "max_tool_calls"),
        (
            ClientFormat::Responses,
            responses(r#""tools":[{"type":"custom","name":"c"}]"#),
            Chat,
            "tools[0].type",
        ),
    ] {
        let offer = offer("some-model");
        let request = Request::parse(client, body.as_bytes()).unwrap();
        let refused = request.to_upstream(&offer, upstream).unwrap_err();
        assert_eq!(refused.param.as_deref(), Some(param), "{body}");
        assert_eq!(refused.code, no_place_for("x").code, "{body}");
        assert!(refused.message.len() > 20, "{refused:?}");
    }
}

#[test]
fn claude_thinks_by_budget_or_by_effort() {
    let body = |max_tokens: u64, turns: &str| {
        format!(
            r#"{{"model":"p/m","max_tokens":{max_tokens},"reasoning_effort":"medium","messages":[{{"role":"user","content":"?"}}{turns}]}}"#
        )
    };
    let sent = |model: &str, body: &str| {
        let offer = offer(model);
        let conversation =
            Request::parse(ClientFormat::Chat, body.as_bytes()).unwrap().conversation(&offer).unwrap();
        messages_request::write(&conversation, model)
    };
    let effort = r#""thinking":{"type":"adaptive"},"output_config":{"effort":"medium"}"#;
    let budget = r#""thinking":{"type":"enabled","budget_tokens":2000}"#;
    for (model, expected) in [
        ("claude-3-7-sonnet-20250219", budget),
        ("claude-opus-4-20250514", budget),
        ("claude-haiku-4-5-20251001", budget),
        ("claude-sonnet-4-6", effort),
        ("claude-opus-4-8", effort),
        ("claude-sonnet-5", effort),
        ("claude-fable-5-2", effort),
    ] {
        let sent = sent(model, &body(4000, "")).unwrap();
        assert!(sent.contains(expected), "{model}: {sent}");
    }
    assert_eq!(sent("claude-haiku-4-5", &body(1024, "")).unwrap_err().param.as_deref(), Some("max_tokens"));
    // After calls without their thoughts it cannot go on thinking by a budget.
    let loop_of = |thoughts: &str| {
        let call = r#"{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}"#;
        body(
            4000,
            &format!(
                r#",{{"role":"assistant",{thoughts}"tool_calls":[{call}]}},{{"role":"tool","tool_call_id":"c","content":"x"}}"#
            ),
        )
    };
    assert!(!sent("claude-haiku-4-5", &loop_of("")).unwrap().contains("budget_tokens"));
    let signed = r#""thinking_blocks":[{"type":"thinking","thinking":"t","signature":"s"}],"#;
    assert!(sent("claude-haiku-4-5", &loop_of(signed)).unwrap().contains("budget_tokens"));
    assert!(sent("claude-opus-5", &loop_of("")).unwrap().contains("adaptive"));
}
