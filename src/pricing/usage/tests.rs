use super::*;
use proptest::prelude::*;

fn read(dialect: Dialect, json: &str) -> Option<Usage> {
    Reported::read(dialect, json).map(|reported| reported.usage)
}

fn of(counts: &[(Unit, u64)]) -> Usage {
    counts.iter().fold(Usage::NONE, |usage, (unit, count)| usage.with(*unit, *count))
}

#[test]
fn zero_is_zero_and_missing_is_missing() {
    let zero = r#"{"prompt_tokens":0,"completion_tokens":0}"#;
    assert_eq!(read(Dialect::OpenAi, zero), Some(Usage::default()));
    for missing in [
        "null",
        "{}",
        r#"{"prompt_tokens":3}"#,
        r#"{"prompt_tokens":3,"completion_tokens":null}"#,
        r#"{"prompt_tokens":-3,"completion_tokens":1}"#,
        r#"{"prompt_tokens":3.5,"completion_tokens":1}"#,
        r#"{"prompt_tokens":3,"completion_tokens":99999999999999}"#,
        r#"{"prompt_tokens":"3","completion_tokens":1}"#,
        "[]",
        "\"many\"",
    ] {
        assert_eq!(read(Dialect::OpenAi, missing), None, "{missing}");
    }
    for (dialect, missing) in [
        (Dialect::Anthropic, r#"{"output_tokens":5}"#),
        (Dialect::Anthropic, r#"{"input_tokens":5}"#),
        (Dialect::Responses, r#"{"input_tokens":5}"#),
        (Dialect::Gemini, r#"{"candidatesTokenCount":5}"#),
        (Dialect::Ollama, r#"{"prompt_eval_count":5}"#),
        (Dialect::Transcription, r#"{"type":"duration","seconds":"long"}"#),
        (Dialect::Transcription, r#"{"type":"duration","seconds":-1}"#),
        (Dialect::Images, r#"{"input_tokens":5}"#),
        (Dialect::Embeddings, r#"{"completion_tokens":5}"#),
    ] {
        assert_eq!(read(dialect, missing), None, "{missing}");
    }
}

#[test]
fn details_may_be_null_or_full_or_unreadable() {
    let json = r#"{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15,
        "prompt_tokens_details":{"cached_tokens":4,"audio_tokens":0},"completion_tokens_details":null}"#;
    let usage = read(Dialect::OpenAi, json).unwrap();
    assert_eq!(usage, Usage::tokens(6, 5).with(Unit::CachedPrompt, 4));
    let odd = r#"{"prompt_tokens":10,"completion_tokens":5,"prompt_tokens_details":[],
        "completion_tokens_details":{"reasoning_tokens":"two"},"cost":"free"}"#;
    assert_eq!(read(Dialect::OpenAi, odd), Some(Usage::tokens(10, 5)));
}

/// A name, the words and the report, and how it is counted.
type Case = (&'static str, Dialect, &'static str, &'static [(Unit, u64)]);

/// What providers send, in the shape that each documents, and how it is counted.
#[test]
fn each_provider_is_read_in_its_own_words() {
    use Dialect::*;
    use Unit::*;
    let cases: &[Case] = &[
        (
            "OpenAI: cached and sound inside the prompt, reasoning and sound inside the completion",
            OpenAi,
            r#"{"prompt_tokens":1117,"completion_tokens":546,"total_tokens":1663,
                "prompt_tokens_details":{"cached_tokens":1024,"audio_tokens":60},
                "completion_tokens_details":{"reasoning_tokens":200,"audio_tokens":300,
                "accepted_prediction_tokens":10,"rejected_prediction_tokens":5}}"#,
            &[
                (Prompt, 33),
                (CachedPrompt, 1024),
                (AudioIn, 60),
                (Completion, 46),
                (Reasoning, 200),
                (AudioOut, 300),
            ],
        ),
        (
            "OpenAI's realtime models say what was cached",
            Responses,
            r#"{"total_tokens":253,"input_tokens":132,"output_tokens":121,
                "input_tokens_details":{"text_tokens":119,"audio_tokens":13,"image_tokens":0,"cached_tokens":64,
                "cached_tokens_details":{"text_tokens":60,"audio_tokens":4,"image_tokens":0}},
                "output_tokens_details":{"text_tokens":30,"audio_tokens":91}}"#,
            &[
                (Prompt, 59),
                (CachedPrompt, 60),
                (CachedAudio, 4),
                (AudioIn, 9),
                (Completion, 30),
                (AudioOut, 91),
            ],
        ),
        (
            "OpenAI, Responses API",
            Responses,
            r#"{"input_tokens":328,"input_tokens_details":{"cached_tokens":100},"output_tokens":52,
                "output_tokens_details":{"reasoning_tokens":40},"total_tokens":380}"#,
            &[(Prompt, 228), (CachedPrompt, 100), (Completion, 12), (Reasoning, 40)],
        ),
        (
            "Anthropic: caches beside the input",
            Anthropic,
            r#"{"input_tokens":2048,"cache_read_input_tokens":1800,"cache_creation_input_tokens":248,
                "cache_creation":{"ephemeral_5m_input_tokens":148,"ephemeral_1h_input_tokens":100},
                "output_tokens":503,"server_tool_use":{"web_search_requests":2},"service_tier":"standard"}"#,
            &[
                (Prompt, 2048),
                (CachedPrompt, 1800),
                (CacheWrite, 148),
                (CacheWrite1h, 100),
                (Completion, 503),
                (Search, 2),
            ],
        ),
        (
            "Anthropic, without saying for how long",
            Anthropic,
            r#"{"input_tokens":10,"cache_creation_input_tokens":7,"cache_read_input_tokens":null,"output_tokens":1}"#,
            &[(Prompt, 10), (CacheWrite, 7), (Completion, 1)],
        ),
        (
            "Gemini: cached inside the prompt, thoughts and tools beside",
            Gemini,
            r#"{"promptTokenCount":300,"cachedContentTokenCount":100,"candidatesTokenCount":50,
                "thoughtsTokenCount":70,"toolUsePromptTokenCount":20,"totalTokenCount":440,
                "promptTokensDetails":[{"modality":"TEXT","tokenCount":150},{"modality":"AUDIO","tokenCount":90},
                {"modality":"IMAGE","tokenCount":60}],
                "cacheTokensDetails":[{"modality":"AUDIO","tokenCount":30},{"modality":"TEXT","tokenCount":70}],
                "candidatesTokensDetails":[{"modality":"TEXT","tokenCount":10},{"modality":"IMAGE","tokenCount":40}]}"#,
            &[
                (Prompt, 100),
                (CachedPrompt, 70),
                (CachedAudio, 30),
                (AudioIn, 60),
                (ImageIn, 60),
                (Completion, 10),
                (ImageOut, 40),
                (Reasoning, 70),
            ],
        ),
        ("Gemini leaves zeros out", Gemini, r#"{"promptTokenCount":8,"totalTokenCount":8}"#, &[(Prompt, 8)]),
        (
            "Gemini where it speaks as OpenAI: what it thought is in the total alone",
            OpenAi,
            r#"{"prompt_tokens":10,"completion_tokens":5,"total_tokens":115}"#,
            &[(Prompt, 10), (Completion, 5), (Reasoning, 100)],
        ),
        (
            "OpenRouter",
            OpenAi,
            r#"{"prompt_tokens":194,"completion_tokens":2,"total_tokens":196,"cost":0.95,"is_byok":false,
                "cost_details":{"upstream_inference_cost":19},
                "prompt_tokens_details":{"cached_tokens":10,"cache_write_tokens":100,"audio_tokens":0,"video_tokens":0},
                "completion_tokens_details":{"reasoning_tokens":0,"image_tokens":0},
                "server_tool_use":{"web_search_requests":3}}"#,
            &[(Prompt, 84), (CachedPrompt, 10), (CacheWrite, 100), (Completion, 2), (Search, 3)],
        ),
        (
            "DeepSeek: hits and misses are the prompt",
            OpenAi,
            r#"{"prompt_tokens":100,"completion_tokens":50,"total_tokens":150,"prompt_cache_hit_tokens":64,
                "prompt_cache_miss_tokens":36,"completion_tokens_details":{"reasoning_tokens":20}}"#,
            &[(Prompt, 36), (CachedPrompt, 64), (Completion, 30), (Reasoning, 20)],
        ),
        (
            "Groq: times beside tokens",
            OpenAi,
            r#"{"queue_time":0.037493756,"prompt_tokens":18,"prompt_time":0.000680594,"completion_tokens":556,
                "completion_time":0.463333333,"total_tokens":574,"total_time":0.464013927,
                "prompt_tokens_details":{"cached_tokens":8}}"#,
            &[(Prompt, 10), (CachedPrompt, 8), (Completion, 556)],
        ),
        (
            "Mistral: sound by the second, its tokens in the total alone",
            OpenAi,
            r#"{"prompt_audio_seconds":203,"prompt_tokens":4,"total_tokens":3264,"completion_tokens":635}"#,
            &[(Prompt, 4), (Completion, 635), (Millisecond, 203_000)],
        ),
        (
            "xAI: reasoning beside the completion, sources read",
            OpenAi,
            r#"{"prompt_tokens":32,"completion_tokens":9,"total_tokens":135,"num_sources_used":4,
                "prompt_tokens_details":{"text_tokens":32,"audio_tokens":0,"image_tokens":0,"cached_tokens":6},
                "completion_tokens_details":{"reasoning_tokens":94,"audio_tokens":0}}"#,
            &[(Prompt, 26), (CachedPrompt, 6), (Completion, 9), (Reasoning, 94), (Search, 4)],
        ),
        (
            "xAI, Responses API: reasoning inside, searches by tool",
            Responses,
            r#"{"input_tokens":9212,"input_tokens_details":{"cached_tokens":3072},"output_tokens":3417,
                "output_tokens_details":{"reasoning_tokens":17},"total_tokens":12629,"num_sources_used":0,
                "cost_in_usd_ticks":318319000,
                "server_side_tool_usage_details":{"web_search_calls":1,"x_search_calls":3,"mcp_calls":0}}"#,
            &[(Prompt, 6140), (CachedPrompt, 3072), (Completion, 3400), (Reasoning, 17), (Search, 4)],
        ),
        (
            "Together",
            OpenAi,
            r#"{"prompt_tokens":40,"completion_tokens":25,"total_tokens":65,"cached_tokens":16}"#,
            &[(Prompt, 24), (CachedPrompt, 16), (Completion, 25)],
        ),
        (
            "Perplexity: citations and reasoning beside all that is totalled",
            OpenAi,
            r#"{"prompt_tokens":33,"completion_tokens":7163,"total_tokens":7196,"citation_tokens":20016,
                "num_search_queries":36,"reasoning_tokens":193524,"search_context_size":"low",
                "cost":{"input_tokens_cost":0.0,"output_tokens_cost":0.057,"request_cost":0.006,"total_cost":0.819}}"#,
            &[(Prompt, 20_049), (Completion, 7163), (Reasoning, 193_524), (Search, 36)],
        ),
        (
            "vLLM",
            OpenAi,
            r#"{"prompt_tokens":7,"total_tokens":23,"completion_tokens":16,"prompt_tokens_details":null}"#,
            &[(Prompt, 7), (Completion, 16)],
        ),
        (
            "Ollama, its own API: the answer itself",
            Ollama,
            r#"{"model":"llama3.2","message":{"role":"assistant","content":"Hi"},"done":true,
                "total_duration":5191566416,"prompt_eval_count":26,"eval_count":298,"eval_duration":4799921000}"#,
            &[(Prompt, 26), (Completion, 298)],
        ),
        ("Ollama, a prompt that was cached", Ollama, r#"{"eval_count":3}"#, &[(Completion, 3)]),
        ("embeddings", Embeddings, r#"{"prompt_tokens":8,"total_tokens":8}"#, &[(Prompt, 8)]),
        ("embeddings by Voyage", Embeddings, r#"{"total_tokens":10}"#, &[(Prompt, 10)]),
        (
            "a picture",
            Images,
            r#"{"total_tokens":4474,"input_tokens":314,"output_tokens":4160,
                "input_tokens_details":{"text_tokens":14,"image_tokens":300}}"#,
            &[(Prompt, 14), (ImageIn, 300), (ImageOut, 4160)],
        ),
        (
            "a picture with words",
            Images,
            r#"{"input_tokens":14,"output_tokens":100,"output_tokens_details":{"text_tokens":10,"image_tokens":90}}"#,
            &[(Prompt, 14), (ImageOut, 90), (Completion, 10)],
        ),
        (
            "a transcription by tokens",
            Transcription,
            r#"{"type":"tokens","input_tokens":14,"input_token_details":{"text_tokens":10,"audio_tokens":4},
                "output_tokens":101,"total_tokens":115}"#,
            &[(Prompt, 10), (AudioIn, 4), (Completion, 101)],
        ),
        (
            "a transcription by duration",
            Transcription,
            r#"{"type":"duration","seconds":9.0001}"#,
            &[(Millisecond, 9001)],
        ),
        (
            "speech",
            Speech,
            r#"{"input_tokens":14,"output_tokens":101,"total_tokens":115}"#,
            &[(Prompt, 14), (AudioOut, 101)],
        ),
    ];
    for (name, dialect, json, counts) in cases {
        assert_eq!(read(*dialect, json), Some(of(counts)), "{name}");
    }
}

#[test]
fn a_message_is_put_together_from_its_stream() {
    let mut usage = AnthropicUsage::default();
    usage.absorb(r#"{"input_tokens":25,"cache_read_input_tokens":5,"output_tokens":1}"#);
    usage.absorb(r#"{"output_tokens":15}"#);
    usage.absorb("not a report");
    assert_eq!(usage.usage(), Some(Usage::tokens(25, 15).with(Unit::CachedPrompt, 5)));
}

#[test]
fn what_the_upstream_charges_is_read_where_it_says_so() {
    let cost = |json| Reported::cost_in(json).map(PicoUsd::get);
    assert_eq!(cost(r#"{"prompt_tokens":1,"cost":0.00014}"#), Some(140_000_000));
    assert_eq!(cost(r#"{"cost":1.4e-4}"#), Some(140_000_000));
    assert_eq!(cost(r#"{"cost":{"total_cost":0.819}}"#), Some(819_000_000_000));
    assert_eq!(cost(r#"{"estimated_cost":2.5e-05}"#), Some(25_000_000));
    assert_eq!(cost(r#"{"cost_in_usd_ticks":318319000}"#), Some(31_831_900_000));
    assert_eq!(cost(r#"{"cost":0}"#), Some(0));
    for none in [r#"{"cost":-1}"#, r#"{"cost":"free"}"#, r#"{"cost":null}"#, "{}", "cost", r#"{"cost":{}}"#] {
        assert_eq!(cost(none), None, "{none}");
    }
}

#[test]
fn more_text_makes_up_what_is_missing() {
    let usage = Usage::tokens(5, 0).with(Unit::CachedPrompt, 5).with(Unit::Reasoning, 3);
    assert_eq!(usage.at_least(12, 7), usage.with(Unit::Prompt, 7).with(Unit::Completion, 4));
    assert_eq!(usage.at_least(1, 1), usage);
}

/// A number that may be missing, null, too large for what it is a part of, or no number.
fn number() -> impl Strategy<Value = Option<String>> {
    prop_oneof![
        6 => (0u64..100_000).prop_map(|n| Some(n.to_string())),
        2 => Just(Some("0".to_owned())),
        2 => Just(None),
        1 => Just(Some("null".to_owned())),
        1 => Just(Some("-4".to_owned())),
        1 => Just(Some("\"7\"".to_owned())),
        1 => Just(Some("18446744073709551615".to_owned())),
    ]
}

fn total() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0u64), 0u64..100_000]
}

fn object(members: &[(&str, &Option<String>)]) -> String {
    let members = members.iter().filter_map(|(key, value)| Some(format!("\"{key}\":{}", value.as_ref()?)));
    format!("{{{}}}", members.collect::<Vec<_>>().join(","))
}

/// What a number says, on its own terms.
fn said(number: &Option<String>) -> u64 {
    number.as_ref().and_then(|text| text.parse().ok()).unwrap_or(0)
}

proptest! {
    /// Whatever is claimed, the buckets are disjoint and sum to the totals.
    #[test]
    fn openai_buckets_sum(
        prompt in total(), completion in total(),
        details in proptest::collection::vec(number(), 12), is_responses in any::<bool>(),
    ) {
        let [cached, audio, image, write, cached_audio, cached_image, reasoning, audio_out, image_out, hit, flat, searches] =
            &details[..] else { unreachable!() };
        let of_cached = object(&[("audio_tokens", cached_audio), ("image_tokens", cached_image)]);
        let of_prompt = object(&[
            ("cached_tokens", cached), ("audio_tokens", audio), ("image_tokens", image),
            ("cache_write_tokens", write), ("cached_tokens_details", &Some(of_cached)),
        ]);
        let of_completion = object(&[
            ("reasoning_tokens", reasoning), ("audio_tokens", audio_out), ("image_tokens", image_out),
        ]);
        let (input, output, dialect) = if is_responses {
            ("input", "output", Dialect::Responses)
        } else {
            ("prompt", "completion", Dialect::OpenAi)
        };
        let json = object(&[
            (&format!("{input}_tokens"), &Some(prompt.to_string())),
            (&format!("{output}_tokens"), &Some(completion.to_string())),
            (&format!("{input}_tokens_details"), &Some(of_prompt)),
            (&format!("{output}_tokens_details"), &Some(of_completion)),
            ("prompt_cache_hit_tokens", hit), ("cached_tokens", flat), ("num_search_queries", searches),
        ]);
        let Some(usage) = read(dialect, &json) else {
            // Only a nonsense number of searches makes a report nonsense.
            prop_assert!(said(searches) > MAX_OTHERS);
            return Ok(());
        };
        prop_assert_eq!(usage.prompt_tokens(), prompt);
        prop_assert_eq!(usage.completion_tokens(), completion);
        prop_assert_eq!(usage.count(Unit::Reasoning), said(reasoning).min(completion));
        prop_assert!(usage.cached_tokens() <= prompt);
        prop_assert!(usage.count(Unit::AudioIn) <= said(audio) && usage.count(Unit::ImageIn) <= said(image));
        prop_assert_eq!(usage.count(Unit::Search), said(searches));
    }

    /// A total that is larger than its two sides is believed: what is not accounted for was thought.
    #[test]
    fn a_total_above_its_sides_counts(prompt in total(), completion in total(), reasoning in total(), is_said in any::<bool>()) {
        let all = prompt + completion + reasoning;
        let said = is_said.then(|| reasoning.to_string());
        let details = object(&[("reasoning_tokens", &said)]);
        let json = format!(r#"{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{all},"completion_tokens_details":{details}}}"#);
        let usage = read(Dialect::OpenAi, &json).unwrap();
        prop_assert_eq!(usage, Usage::tokens(prompt, completion).with(Unit::Reasoning, reasoning));
    }

    #[test]
    fn anthropic_buckets_sum(input in total(), output in total(), parts in proptest::collection::vec(number(), 5)) {
        let [read_, written, of_5m, of_1h, thinking] = &parts[..] else { unreachable!() };
        let of_written = object(&[("ephemeral_5m_input_tokens", of_5m), ("ephemeral_1h_input_tokens", of_1h)]);
        let json = object(&[
            ("input_tokens", &Some(input.to_string())), ("output_tokens", &Some(output.to_string())),
            ("cache_read_input_tokens", read_), ("cache_creation_input_tokens", written),
            ("cache_creation", &Some(of_written)),
            ("output_tokens_details", &Some(object(&[("thinking_tokens", thinking)]))),
        ]);
        let said_written = if written.as_ref().is_some_and(|text| text.parse::<u64>().is_ok()) {
            said(written)
        } else {
            said(of_5m).saturating_add(said(of_1h))
        };
        let all = input.saturating_add(said(read_)).saturating_add(said_written);
        match read(Dialect::Anthropic, &json) {
            None => prop_assert!(all > MAX_TOKENS),
            Some(usage) => {
                prop_assert_eq!(usage.prompt_tokens(), all);
                prop_assert_eq!(usage.count(Unit::CacheWrite) + usage.count(Unit::CacheWrite1h), said_written);
                prop_assert_eq!(usage.completion_tokens(), output);
                prop_assert_eq!(usage.count(Unit::Prompt), input);
            }
        }
    }

    #[test]
    fn gemini_buckets_sum(
        prompt in total(), cached in total(), tools in total(), candidates in total(), thoughts in total(),
        kinds in proptest::collection::vec((0usize..4, 0usize..6, 0u64..50_000), 0..8),
    ) {
        let lists = ["promptTokensDetails", "cacheTokensDetails", "candidatesTokensDetails", "toolUsePromptTokensDetails"];
        let modalities = ["TEXT", "AUDIO", "IMAGE", "VIDEO", "DOCUMENT", "SMELL"];
        let details: Vec<_> = lists.iter().enumerate().map(|(list, name)| {
            let of_list = kinds.iter().filter(|(at, _, _)| *at == list);
            let entries: Vec<_> = of_list
                .map(|(_, kind, count)| format!(r#"{{"modality":"{}","tokenCount":{count}}}"#, modalities[*kind]))
                .collect();
            format!(r#""{name}":[{}]"#, entries.join(","))
        }).collect();
        let json = format!(
            r#"{{"promptTokenCount":{prompt},"cachedContentTokenCount":{cached},"toolUsePromptTokenCount":{tools},"candidatesTokenCount":{candidates},"thoughtsTokenCount":{thoughts},{}}}"#,
            details.join(",")
        );
        let usage = read(Dialect::Gemini, &json).unwrap();
        prop_assert_eq!(usage.prompt_tokens(), prompt + tools);
        prop_assert_eq!(usage.cached_tokens(), cached.min(prompt));
        prop_assert_eq!(usage.completion_tokens(), candidates + thoughts);
        prop_assert_eq!(usage.count(Unit::Reasoning), thoughts);
    }

    #[test]
    fn pictures_and_sound_sum(input in total(), output in total(), parts in proptest::collection::vec(number(), 6)) {
        let [cached, cached_image, audio, image, text, text_out] = &parts[..] else { unreachable!() };
        let of_input = object(&[
            ("cached_tokens", cached), ("audio_tokens", audio), ("image_tokens", image), ("text_tokens", text),
            ("cached_tokens_details", &Some(object(&[("image_tokens", cached_image)]))),
        ]);
        let of_output = object(&[("text_tokens", text_out)]);
        for (dialect, name) in [
            (Dialect::Images, "input_tokens_details"),
            (Dialect::Transcription, "input_token_details"),
            (Dialect::Speech, "input_tokens_details"),
        ] {
            let json = object(&[
                ("input_tokens", &Some(input.to_string())), ("output_tokens", &Some(output.to_string())),
                (name, &Some(of_input.clone())), ("output_tokens_details", &Some(of_output.clone())),
            ]);
            let usage = read(dialect, &json).unwrap();
            prop_assert_eq!((usage.prompt_tokens(), usage.completion_tokens()), (input, output));
        }
    }

    /// No text makes it stumble.
    #[test]
    fn anything_may_come(json in "\\PC{0,60}") {
        for dialect in [Dialect::OpenAi, Dialect::Gemini, Dialect::Anthropic, Dialect::Ollama] {
            read(dialect, &json);
        }
    }
}
