//! Public price lists, as others keep them, and costs beside those that LiteLLM works out from its own.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::sync::Arc;

use farebox::config::Config;
use farebox::money::{PicoUsd, UnitPrice};
use farebox::pricelist::{PriceList, Source};
use farebox::pricing::{Dialect, Prices, Reported, Terms, Unit, Usage};
use serde_json::{Value, json};

use crate::support::chain::TestChain;
use crate::support::gateway::{Customer, Gateway, MODEL, Setup, ask};
use crate::support::upstream::{Script, ScriptedUpstream, completion, usage};
use crate::support::{eventually, project_root, tool};

/// What LiteLLM says of one request.
struct Row {
    model: String,
    words: String,
    usage: Value,
    usd: f64,
}

/// LiteLLM's own list, and the costs that it works out from it.
struct LiteLlm {
    entries: HashMap<String, Value>,
    list: PriceList,
    rows: Vec<Row>,
    errors: usize,
}

impl LiteLlm {
    fn ask() -> Self {
        let script = project_root().join("tests/clients/litellm_costs.py");
        let output =
            Command::new(tool("CLIENTS_PYTHON", "build/venv/bin/python")).arg(script).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut lines = said.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let path = lines.next().unwrap()["list"].as_str().unwrap().to_owned();
        let text = fs::read_to_string(path).unwrap();
        let (mut rows, mut errors) = (Vec::new(), 0);
        for line in lines {
            let word = |key: &str| line[key].as_str().map(str::to_owned);
            match word("usd") {
                Some(usd) => rows.push(Row {
                    model: word("model").unwrap(),
                    words: word("words").unwrap(),
                    usage: line["usage"].clone(),
                    usd: usd.parse().unwrap(),
                }),
                None => errors += 1,
            }
        }
        Self {
            entries: serde_json::from_str(&text).unwrap(),
            list: PriceList::read(Some(Source::LiteLlm), &text).unwrap(),
            rows,
            errors,
        }
    }

    fn prices(&self) -> HashMap<String, &Prices> {
        self.list.listings.iter().map(|listing| (listing.id(), &listing.prices)).collect()
    }

    /// The id that an entry has here.
    fn id(&self, model: &str) -> String {
        let provider = self.entries[model]["litellm_provider"].as_str().unwrap_or_default();
        let name = model.strip_prefix(&format!("{provider}/")).unwrap_or(model);
        format!("{provider}/{name}")
    }
}

fn usage_of(row: &Row) -> Usage {
    let dialect = match row.words.as_str() {
        "openai" => Dialect::OpenAi,
        "anthropic" => Dialect::Anthropic,
        "embeddings" => Dialect::Embeddings,
        "seconds" => Dialect::Transcription,
        "characters" => {
            return Usage::NONE.with(Unit::Character, row.usage["characters"].as_u64().unwrap());
        }
        other => panic!("{other}"),
    };
    Reported::read(dialect, &row.usage.to_string()).unwrap().usage
}

fn cost(prices: &Prices, usage: &Usage) -> PicoUsd {
    let terms = Terms {
        model: "p/m".into(),
        provider: "p".into(),
        upstream_model: "m".into(),
        prices: Arc::new(prices.clone()),
        markup_bps: 0,
        price_version: None,
    };
    terms.cost(usage).unwrap()
}

/// Whether a float is this amount, as far as a sum of products of floats can be.
fn is_same(ours: PicoUsd, theirs_usd: f64) -> bool {
    let ours: f64 = ours.to_usd().parse().unwrap();
    (ours - theirs_usd).abs() <= 1e-9 * ours.abs().max(theirs_usd.abs())
}

/// Whether a difference is of a kind: by the request, the entry of the list, and what was read of both.
type Explains = fn(&Row, &Value, &Prices, &Usage) -> bool;

/// Why a cost is another one here. Each has a row of this name in docs/PRICES.md.
const EXPLAINED: &[(&str, Explains)] = &[
    ("Fireworks' cached tokens", |row, entry, prices, usage| {
        // Half of the prompt's price, where the list says nothing of a cache.
        let half = |pico: PicoUsd| PicoUsd::new(pico.get() / 2);
        let cached = prices.charged(Unit::Prompt).times(usage.cached_tokens()).unwrap();
        let as_there = cost(prices, usage).checked_sub(half(cached)).unwrap();
        entry["litellm_provider"] == "fireworks_ai"
            && entry.get("cache_read_input_token_cost").is_none()
            && is_same(as_there, row.usd)
    }),
    ("A price per request", |row, _, prices, usage| {
        let call = prices.charged(Unit::Call).times(1).unwrap();
        call > PicoUsd::ZERO && is_same(cost(prices, usage).checked_sub(call).unwrap(), row.usd)
    }),
    ("Cached sound", |row, _, prices, usage| {
        let sound = usage.count(Unit::CachedAudio);
        let as_text = usage.with(Unit::CachedAudio, 0).with(Unit::CachedPrompt, usage.cached_tokens());
        sound > 0
            && prices.rates().listed(Unit::CachedAudio).is_none()
            && prices.rates().listed(Unit::AudioIn).is_some()
            && is_same(cost(prices, &as_text), row.usd)
    }),
    ("Hours of the day", |row, entry, prices, usage| {
        let Some(off_peak) = entry.get("off_peak_pricing") else { return false };
        let keys = [
            ("input_cost_per_token", Unit::Prompt),
            ("output_cost_per_token", Unit::Completion),
            ("cache_read_input_token_cost", Unit::CachedPrompt),
            ("cache_creation_input_token_cost", Unit::CacheWrite),
        ];
        let rates = keys.iter().fold(*prices.rates(), |rates, (key, unit)| match off_peak.get(key) {
            Some(usd) => rates.with(*unit, UnitPrice::parse_usd(&usd.to_string()).unwrap()),
            None => rates,
        });
        is_same(cost(&Prices::new(rates, Vec::new(), Vec::new()), usage), row.usd)
    }),
];

#[test]
fn costs_are_litellms_or_the_difference_is_explained() {
    let litellm = LiteLlm::ask();
    let prices = litellm.prices();
    let left_out: BTreeSet<&String> = litellm.list.left_out.values().flatten().collect();
    let (mut compared, mut models) = (0, BTreeSet::new());
    let mut explained: BTreeMap<&str, usize> = BTreeMap::new();
    let mut unexplained = String::new();
    for row in &litellm.rows {
        let Some(prices) = prices.get(&litellm.id(&row.model)) else {
            assert!(left_out.contains(&row.model), "{} is gone without a word", row.model);
            continue;
        };
        let usage = usage_of(row);
        let ours = cost(prices, &usage);
        compared += 1;
        models.insert(&row.model);
        if is_same(ours, row.usd) {
            continue;
        }
        let entry = &litellm.entries[&row.model];
        match EXPLAINED.iter().find(|(_, explains)| explains(row, entry, prices, &usage)) {
            Some((name, _)) => *explained.entry(name).or_default() += 1,
            None => {
                let _ = writeln!(
                    unexplained,
                    "{} {}: {} here, {} there",
                    row.model,
                    row.usage,
                    ours.to_usd(),
                    row.usd
                );
            }
        }
    }
    println!(
        "{compared} costs of {} models compared, {} errors, {explained:?}",
        models.len(),
        litellm.errors
    );
    assert!(unexplained.is_empty(), "{} differences\n{unexplained}", unexplained.lines().count());
    assert!(models.len() >= 2000, "only {} models were compared", models.len());
    let doc = fs::read_to_string(project_root().join("docs/PRICES.md")).unwrap();
    for (name, _) in EXPLAINED {
        assert!(explained.contains_key(name), "{name:?} explains nothing any more");
        assert!(doc.contains(&format!("| {name} |")), "docs/PRICES.md does not say {name:?}");
    }
}

/// A model that everything is priced for.
const ALL: &str = r#"
[[models]]
id = "openai/all"
provider = "openai"
context_length = 400000
max_output_tokens = 1000
price = { prompt = "1", cached_prompt = "0.1", cache_write = "1.25", cache_write_1h = "2", completion = "4", reasoning = "5", audio_in = "40", audio_out = "80", image_in = "1.5", per_call = "0.005", per_search = "0.01", tiers = [{ above = 200000, prompt = "2", completion = "6" }] }

[[models]]
id = "openai/singer"
kind = "speech"
provider = "openai"
price = { per_million_characters = "15" }
"#;

/// A gateway that sells such a model, in front of an upstream that says what it is told to.
async fn with_units() -> (Gateway, ScriptedUpstream, Customer) {
    let upstream = ScriptedUpstream::start().await;
    let mut setup = Setup::new(&TestChain::shared(), &upstream.base_url);
    setup.tables = ALL.to_owned();
    let gateway = Gateway::start_with(setup).await;
    let customer = gateway.customer("50").await;
    (gateway, upstream, customer)
}

fn ask_of(model: &str, content: Value) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 200})
}

#[tokio::test]
async fn a_receipt_shows_every_unit_and_what_the_upstream_charges() {
    let (gateway, upstream, customer) = with_units().await;
    upstream.play(Script::json(
        200,
        &completion(Some(json!({
            "prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100, "cost": 0.0000123,
            "prompt_tokens_details": {"cached_tokens": 300, "cache_write_tokens": 200},
            "completion_tokens_details": {"reasoning_tokens": 60},
        }))),
    ));
    let answer = gateway.chat(&customer, &ask_of("openai/all", "x".repeat(1000).into())).await.expect(200);
    // 500 × 1 + 300 × 0.1 + 200 × 1.25 + 40 × 4 + 60 × 5 are 1240 millionths, and the call 5000.
    assert_eq!(answer.number("x-charged-usdc"), 6_240 * 12 / 10);
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    assert_eq!(receipt["outcome"], "settled", "{receipt}");
    assert_eq!(
        receipt["usage_units"],
        json!({
            "prompt_tokens": 500, "cached_prompt_tokens": 300, "cache_write_tokens": 200, "completion_tokens": 40,
            "reasoning_tokens": 60,
        })
    );
    assert_eq!(
        receipt["usage"],
        json!({"prompt_tokens": 1000, "cached_tokens": 300, "completion_tokens": 100, "reasoning_tokens": 60})
    );
    assert_eq!(receipt["unpriced_units"], json!([]));
    assert_eq!(
        (&receipt["cost_usd"], &receipt["upstream_cost_usd"]),
        (&json!("0.00624"), &json!("0.0000123"))
    );
    assert_eq!(receipt["prices"]["tiers"][0]["above_prompt_tokens"], 200_000);
    assert_eq!(receipt["prices"]["per_unit"]["searches"], "0.01");
    gateway.audit();
}

#[tokio::test]
async fn a_tier_is_charged_for_the_whole_request_and_held_for_before() {
    let (gateway, upstream, customer) = with_units().await;
    let reported = json!({"prompt_tokens": 200_001, "completion_tokens": 200, "total_tokens": 200_201});
    upstream.play(Script::json(200, &completion(Some(reported))));
    let long = ask_of("openai/all", "x".repeat(250_000).into());
    let answer = gateway.chat(&customer, &long).await.expect(200);
    let cost = 200_001 * 2 + 200 * 6 + 5000;
    assert_eq!(answer.number("x-charged-usdc"), (cost * 12_u64).div_ceil(10));
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    // 250 thousand tokens at 2 (a token kept in a cache for an hour costs no more there), and 200 at 6.
    let hold = receipt["hold_usdc"].as_u64().unwrap();
    assert!((606_000..610_000).contains(&(hold - 1_440)), "{hold}");
    gateway.audit();
}

#[tokio::test]
async fn what_has_no_price_is_refused_before_or_said_after() {
    let (gateway, upstream, customer) = with_units().await;
    let sound = json!([{"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}]);
    let refused = gateway.chat(&customer, &ask_of(MODEL, sound.clone())).await;
    let error = refused.error(400, "unsupported_parameter");
    assert!(error.to_string().contains("audio_in_tokens"), "{error}");
    assert!(upstream.received().is_empty(), "nothing is asked of the upstream");

    let sung = ask_of("openai/singer", "Hello".into());
    gateway.chat(&customer, &sung).await.error(400, "invalid_value");
    let models = gateway.get("/v1/models").send().await.expect(200).json();
    let models = models["data"].as_array().unwrap().clone();
    let singer = models.iter().find(|model| model["id"] == "openai/singer").unwrap();
    assert_eq!(
        (&singer["kind"], &singer["pricing"]["per_unit"]),
        (&json!("speech"), &json!({"characters": "0.000018"}))
    );
    assert!(models.iter().any(|model| model["id"] == MODEL && model.get("kind").is_none()));

    // Where it has a price it is run.
    let of_sound = json!({
        "prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"audio_tokens": 90},
    });
    upstream.play(Script::json(200, &completion(Some(of_sound.clone()))));
    let answer = gateway.chat(&customer, &ask_of("openai/all", sound)).await.expect(200);
    assert_eq!(answer.number("x-charged-usdc"), ((10 + 90 * 40 + 4 + 5000) * 12_u64).div_ceil(10));

    // Of a request of text nobody could know: sound is charged as text, and said everywhere.
    let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
    let receipt = gateway.receipt(&customer, answer.header("x-request-id").unwrap()).await;
    assert_eq!(receipt["unpriced_units"], json!(["audio_in_tokens"]));
    // 100 × 0.15 + 0.6, and 20 %.
    assert_eq!(receipt["charged_usdc"], 19);
    assert!(gateway.logs().contains("a request used what has no price"), "{}", gateway.logs());
    gateway.audit();
}

#[tokio::test]
async fn prices_change_between_requests_and_never_within_one() {
    let (gateway, upstream, customer) = with_units().await;
    let config = fs::read_to_string(gateway.config()).unwrap();
    let dearer = config.replace("prompt = \"0.15\"", "prompt = \"1500\"");
    assert_ne!(config, dearer);
    let listed = async || {
        let models = gateway.get("/v1/models").send().await.expect(200).json();
        let models = models["data"].as_array().unwrap().clone();
        models.iter().find(|model| model["id"] == MODEL).unwrap()["pricing"]["prompt"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(listed().await, "0.18");

    // A request that runs while the prices change.
    let whole = Script::json(200, &completion(Some(usage(20, 9))));
    upstream.play(Script::held_back(whole.clone()));
    let running = async {
        let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
        (answer.number("x-charged-usdc"), answer.header("x-request-id").unwrap().to_owned())
    };
    let changing = async {
        eventually("the upstream is asked", async || (!upstream.received().is_empty()).then_some(())).await;
        gateway.reload(&dearer);
        eventually("the new price is listed", async || (listed().await == "1800").then_some(())).await;
        upstream.open_gate();
    };
    let ((charged, old), ()) = tokio::join!(running, changing);
    assert_eq!(charged, 11, "it is charged by the prices that it began with");

    upstream.play(whole);
    let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
    assert_eq!(answer.number("x-charged-usdc"), (20 * 1500 * 10 + 9 * 6) * 12_u64 / 100 + 1);
    let version = async |id: &str| gateway.receipt(&customer, id).await["prices"]["version"].clone();
    let (old, new) = (version(&old).await, version(answer.header("x-request-id").unwrap()).await);
    assert!(old.is_string() && new.is_string() && old != new, "{old} {new}");

    // What is wrong is not taken, nor what needs a restart, and the log says why.
    let refused = "the models are not read again";
    for (wrong, why) in [
        (dearer.replace("prompt = \"1500\"", "prompt = \"cheap\""), "price.prompt"),
        (
            dearer
                .replace("name = \"openai\"", "name = \"other\"")
                .replace("provider = \"openai\"", "provider = \"other\""),
            "needs a restart",
        ),
    ] {
        let before = gateway.logs().matches(refused).count();
        gateway.reload(&wrong);
        eventually("it is refused", async || {
            (gateway.logs().matches(refused).count() > before).then_some(())
        })
        .await;
        assert!(gateway.logs().contains(why), "{why}: {}", gateway.logs());
        assert_eq!(listed().await, "1800");
    }
    gateway.reload(&config);
    eventually("the old price is listed", async || (listed().await == "0.18").then_some(())).await;
    let answer = gateway.chat(&customer, &ask("Hello")).await.expect(200);
    assert_eq!(
        version(answer.header("x-request-id").unwrap()).await,
        old,
        "the same prices have the same name"
    );
    gateway.audit();
}

/// A list with all that can be mapped and some that cannot.
const LIST: &str = r#"{
  "gpt-5-mini": {"litellm_provider": "openai", "mode": "chat", "max_input_tokens": 128000, "max_output_tokens": 16384,
    "input_cost_per_token": 1.5e-07, "output_cost_per_token": 6e-07, "cache_read_input_token_cost": 7.5e-08,
    "cache_creation_input_token_cost": 1.875e-07, "input_cost_per_token_above_200k_tokens": 3e-07,
    "search_context_cost_per_query": {"low": 0.01, "medium": 0.01, "high": 0.01}, "input_cost_per_token_batches": 1e-07},
  "whisper": {"litellm_provider": "openai", "mode": "audio_transcription", "input_cost_per_second": 0.0001},
  "openai/tts \"1\"": {"litellm_provider": "openai", "mode": "audio_speech", "input_cost_per_character": 1.5e-05},
  "embed": {"litellm_provider": "openai", "mode": "embedding", "max_input_tokens": 8191, "input_cost_per_token": 2e-08},
  "draw": {"litellm_provider": "openai", "mode": "image_generation", "output_cost_per_image": 0.039},
  "too-fine": {"litellm_provider": "openai", "mode": "embedding", "max_input_tokens": 1, "input_cost_per_token": 1.23e-13},
  "rank": {"litellm_provider": "openai", "mode": "rerank"}
}"#;

#[tokio::test]
async fn a_list_is_imported_and_what_is_served_is_held_against_it() {
    let gateway =
        Gateway::start_with(Setup::without_chain("http://127.0.0.1:9", "http://127.0.0.1:9/v1")).await;
    let list = gateway.directory().join("list.json");
    fs::write(&list, LIST).unwrap();
    let list = list.to_str().unwrap();
    let said = |output: &std::process::Output| {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };

    let (status, toml, report) =
        said(&gateway.run_with(&["catalog", "import", list, "--rename", "openai=house"]));
    assert_eq!(status, Some(0), "{report}");
    for line in [
        "not mapped: input_cost_per_token_batches (1 models)",
        "left out, input_cost_per_token is finer than a pico-USD for one: 1 models (too-fine)",
        "left out, is for rerank: 1 models (rank)",
        "5 of 5 models are printed",
    ] {
        assert!(report.contains(line), "{report}");
    }
    // It is a configuration, and says what the list says.
    let tables = format!("[[providers]]\nname = \"house\"\nbase_url = \"http://127.0.0.1:9/v1\"\n{toml}");
    let text = format!("{}\n{tables}", fs::read_to_string(gateway.config()).unwrap());
    let env = [("FAREBOX_RELAYER_KEY", "11".repeat(32)), ("UPSTREAM_KEY", "x".to_owned())];
    let env = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let config = Config::parse(&text, "farebox.toml", &env).unwrap();
    let read = PriceList::read(None, LIST).unwrap();
    assert_eq!(read.listings.len(), 5);
    for listing in &read.listings {
        let offer = config.catalog.get(&format!("house/{}", listing.name)).unwrap();
        assert_eq!((&*offer.prices, offer.kind), (&listing.prices, listing.kind), "{}", listing.name);
    }

    let (status, toml, _) = said(&gateway.run_with(&["catalog", "import", list, "--filter", "whis"]));
    assert_eq!((status, toml.matches("[[models]]").count()), (Some(0), 1));
    assert!(toml.contains("price = { per_second = \"0.0001\" }"), "{toml}");
    assert_eq!(said(&gateway.run_with(&["catalog", "import", list, "--filter", "nothing"])).0, Some(1));
    assert_eq!(said(&gateway.run_with(&["catalog", "import", "/nowhere.json"])).0, Some(2));

    let (status, differences, report) = said(&gateway.run_with(&["catalog", "diff", list]));
    assert_eq!(status, Some(1), "{report}");
    let lines: Vec<_> = differences.lines().collect();
    assert_eq!(
        lines,
        [
            format!("{MODEL} cache_write: served at 0.15, listed at 0.1875"),
            format!("{MODEL} per_search: served at nothing, listed at 0.01"),
            format!("{MODEL} prompt above 200000: served at 0.15, listed at 0.3"),
        ]
    );
    assert!(report.contains("is not listed"), "{report}");

    // A list that says what is served is no difference. It is fetched, too.
    let same = LIST
        .replace("\"cache_creation_input_token_cost\": 1.875e-07, \"input_cost_per_token_above_200k_tokens\": 3e-07,", "")
        .replace("{\"low\": 0.01, \"medium\": 0.01, \"high\": 0.01}", "null");
    let upstream = ScriptedUpstream::start().await;
    upstream.play(Script::answer(200, &[], same));
    let url = upstream.base_url.clone();
    let output = tokio::task::spawn_blocking(move || {
        let output = gateway.run_with(&["catalog", "diff", &url]);
        said(&output)
    });
    let (status, differences, report) = output.await.unwrap();
    assert_eq!((status, differences.as_str()), (Some(0), ""), "{report}");
}
