//! The program around the API: its configuration, its subcommands, how it starts and stops.

use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use alloy::primitives::address;
use serde_json::json;

use crate::support::TempDir;
use crate::support::gateway::{Gateway, MODEL, Setup, UPSTREAM_KEY, ask, farebox_command};
use crate::support::wallet::TestWallet;

const RELAYER: &str = "0x59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d";

/// A configuration that is good, to be spoilt.
fn good() -> String {
    let mut setup = Setup::without_chain("http://127.0.0.1:9", "http://127.0.0.1:9/v1");
    setup.pay_to = address!("00000000000000000000000000000000000000aB");
    // Its files are where it is run.
    setup.toml("127.0.0.1:8080", Path::new(""))
}

/// Runs `farebox ARGS --config FILE` on this text, with the secrets set.
fn farebox(args: &[&str], text: &str, env: &[(&str, &str)]) -> Output {
    let directory = TempDir::new();
    let file = directory.path().join("farebox.toml");
    std::fs::write(&file, text).unwrap();
    let mut command = farebox_command();
    command.current_dir(directory.path()).args(args).arg("--config").arg(&file);
    command.env("FAREBOX_RELAYER_KEY", RELAYER).env("UPSTREAM_KEY", UPSTREAM_KEY);
    command.envs(env.iter().copied().filter(|(_, value)| !value.is_empty()));
    for (name, _) in env.iter().filter(|(_, value)| value.is_empty()) {
        command.env_remove(name);
    }
    command.output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn check_config_says_what_would_be_served() {
    let output = farebox(&["check-config"], &good(), &[]);
    assert!(output.status.success(), "{output:?}");
    let text = stdout(&output);
    let line = text.lines().find(|line| line.starts_with(MODEL)).unwrap_or_else(|| panic!("{text}"));
    // As billed, markup included.
    for part in ["0.18", "0.72", "0.09"] {
        assert!(line.split_whitespace().any(|word| word == part), "{part} is not in {line}");
    }
    assert!(!text.contains(UPSTREAM_KEY) && !text.contains(&RELAYER[2..]), "{text}");
}

#[test]
fn a_mistake_in_the_configuration_names_its_place() {
    let pay_to = good().lines().find(|line| line.starts_with("pay_to")).unwrap().to_owned();
    let zero = format!("pay_to = \"0x{}\"", "0".repeat(40));
    let more_models = |line: &str| good().replacen("prompt = \"0.15\"", line, 1);
    for (what, text, env, place) in [
        ("an unknown key", format!("lisen = \"x\"\n{}", good()), &[][..], "lisen"),
        ("an unknown key in a table", good().replace("[limits]", "[limits]\nkeys = 5"), &[], "keys"),
        ("an unknown key of a model", more_models("promt = \"1\", prompt = \"0.15\""), &[], "promt"),
        ("a price that is a word", more_models("prompt = \"cheap\""), &[], "price.prompt"),
        ("a price with a comma", more_models("prompt = \"0,15\""), &[], "price.prompt"),
        ("a price below zero", more_models("prompt = \"-1\""), &[], "price.prompt"),
        ("a price that is a float", more_models("prompt = 0.15"), &[], "prompt"),
        ("a zero treasury", good().replace(&pay_to, &zero), &[], "pay_to"),
        ("a treasury that is none", good().replace(&pay_to, "pay_to = \"0x12\""), &[], "pay_to"),
        ("no treasury", good().replace(&pay_to, ""), &[], "pay_to"),
        ("no relayer key", good(), &[("FAREBOX_RELAYER_KEY", "")], "FAREBOX_RELAYER_KEY"),
        (
            "a facilitator's secret in its address",
            good(),
            &[("FAREBOX_FACILITATOR_URL", "https://user:word@facilitator.example/x402")],
            "facilitator_url",
        ),
        (
            "a facilitator's address with a query",
            good(),
            &[("FAREBOX_FACILITATOR_URL", "https://facilitator.example/x402?key=1")],
            "facilitator_url",
        ),
        (
            "a secret that no header can hold",
            good(),
            &[
                ("FAREBOX_FACILITATOR_URL", "https://facilitator.example"),
                ("FAREBOX_FACILITATOR_AUTH", "two\nlines"),
            ],
            "FAREBOX_FACILITATOR_AUTH",
        ),
        ("no upstream key", good(), &[("UPSTREAM_KEY", "")], "UPSTREAM_KEY"),
        (
            "a provider without models",
            good() + "\n[[providers]]\nname = \"idle\"\nbase_url = \"http://127.0.0.1:9/v1\"\n",
            &[],
            "idle",
        ),
        (
            "a model of an unknown provider",
            good().replacen("provider = \"openai\"", "provider = \"nobody\"", 1),
            &[],
            "nobody",
        ),
        ("a model twice", good().replace("openai/small", "openai/dear"), &[], "openai/dear"),
        (
            "an unknown wire format",
            good().replace("name = \"openai\"\n", "name = \"openai\"\nkind = \"smoke\"\n"),
            &[],
            "kind",
        ),
        ("an unknown network", good().replace("eip155:8453", "eip155:424242"), &[], "asset"),
        ("a network that is none", good().replace("eip155:8453", "base"), &[], "network"),
        (
            "bounds the wrong way round",
            good().replace("[limits]", "min_topup_usd = \"5\"\nmax_topup_usd = \"1\"\n[limits]"),
            &[],
            "min_topup_usd",
        ),
        ("no payments", "listen = \"127.0.0.1:0\"".to_owned(), &[], "[payments]"),
        ("no TOML", "listen = ".to_owned(), &[], "line 1"),
        ("a database of another kind", good().replace("sqlite://", "mysql://"), &[], "database_url"),
        ("a number that is none", good(), &[("FAREBOX_MARKUP_BPS", "lots")], "FAREBOX_MARKUP_BPS"),
    ] {
        for subcommand in ["check-config", "serve"] {
            let output = farebox(&[subcommand], &text, env);
            let said = stderr(&output);
            assert!(!output.status.success(), "{what} ({subcommand}) is taken: {}", stdout(&output));
            assert!(output.status.code().is_some(), "{what}: {output:?}");
            assert!(said.contains(place), "{what} ({subcommand}) does not name {place}: {said}");
            assert!(!said.contains("panicked") && !said.contains(UPSTREAM_KEY), "{what}: {said}");
        }
    }
    // A key that is no key is seen before anything is served, and is not shown.
    let output = farebox(&["serve"], &good(), &[("FAREBOX_RELAYER_KEY", "0x1234567890abcdef")]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("FAREBOX_RELAYER_KEY"), "{output:?}");
    assert!(!stderr(&output).contains("1234567890abcdef"), "{output:?}");
}

#[test]
fn without_a_configuration_one_line_says_what_to_do() {
    let directory = TempDir::new();
    for args in [&["serve"][..], &[]] {
        let output = farebox_command().current_dir(directory.path()).args(args).output().unwrap();
        assert!(!output.status.success());
        assert_eq!(stdout(&output), "");
        let said = stderr(&output);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("farebox init") && said.contains("farebox.toml"), "{said}");
    }
}

#[test]
fn init_writes_a_file_that_is_good_once_it_is_filled_in() {
    let directory = TempDir::new();
    let run = |args: &[&str], env: &[(&str, &str)]| {
        farebox_command().current_dir(directory.path()).args(args).envs(env.iter().copied()).output().unwrap()
    };
    let output = run(&["init"], &[]);
    assert!(output.status.success(), "{output:?}");
    let said = stdout(&output);
    let file = directory.path().join("farebox.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let key = said.split("FAREBOX_RELAYER_KEY=").nth(1).and_then(|rest| rest.split_whitespace().next());
    let key = key.unwrap_or_else(|| panic!("no key in {said}"));
    assert!(key.len() == 66 && key.starts_with("0x"), "{key}");
    assert!(said.contains("check-config"), "{said}");
    assert!(text.lines().filter(|line| line.contains('#')).count() > 10, "it explains nothing: {text}");
    assert!(!text.contains(&key[2..]), "the key is in the file");

    // Not as it is: where the money goes must be said first.
    let names: Vec<_> = text.lines().filter_map(|line| line.trim().strip_prefix("api_key_env = ")).collect();
    let mut env = vec![("FAREBOX_RELAYER_KEY", key)];
    env.extend(names.iter().map(|name| (name.split('"').nth(1).unwrap(), "sk-test")));
    let output = run(&["check-config"], &env);
    assert!(!output.status.success() && stderr(&output).contains("pay_to"), "{output:?}");

    let pay_to = TestWallet::random().shown();
    std::fs::write(&file, text.replace(&format!("0x{}", "0".repeat(40)), &pay_to)).unwrap();
    let output = run(&["check-config"], &env);
    assert!(output.status.success(), "{output:?}");
    assert!(stdout(&output).contains(&pay_to), "{output:?}");

    // A second time it leaves everything alone, and the key is fresh elsewhere.
    assert!(!run(&["init"], &[]).status.success());
    assert!(std::fs::read_to_string(&file).unwrap().contains(&pay_to));
    let elsewhere = directory.path().join("other.toml");
    let output = run(&["init", "--config", elsewhere.to_str().unwrap()], &[]);
    assert!(output.status.success() && elsewhere.exists(), "{output:?}");
    assert!(!stdout(&output).contains(key), "two gateways with one key");
}

#[test]
fn every_plain_key_can_come_from_the_environment() {
    let wallet = TestWallet::random().shown();
    for (name, value, shown) in [
        ("FAREBOX_LISTEN", "127.0.0.1:9999", "127.0.0.1:9999"),
        ("FAREBOX_PUBLIC_URL", "https://gw.example", "gw.example"),
        ("FAREBOX_PAY_TO", wallet.as_str(), wallet.as_str()),
        ("FAREBOX_NETWORK", "eip155:84532", "eip155:84532"),
        ("FAREBOX_MIN_TOPUP_USD", "2.5", "2.5"),
        ("FAREBOX_MAX_TOPUP_USD", "77", "77"),
        ("FAREBOX_MARKUP_BPS", "0", "0.15"),
        ("FAREBOX_SIWE_DOMAINS", "one.example, two.example:8080", "two.example:8080"),
    ] {
        let output = farebox(&["check-config"], &good(), &[(name, value)]);
        assert!(output.status.success(), "{name}: {output:?}");
        assert!(stdout(&output).contains(shown), "{name}: {}", stdout(&output));
        assert!(!stdout(&farebox(&["check-config"], &good(), &[])).contains(shown), "{name} shows nothing");
    }
    // Lists are separated by commas; each address must be one.
    let urls = [("FAREBOX_RPC_URLS", "http://127.0.0.1:9, http://127.0.0.1:10")];
    assert!(farebox(&["check-config"], &good(), &urls).status.success());
    let output = farebox(&["check-config"], &good(), &[("FAREBOX_RPC_URLS", "http://127.0.0.1:9,nonsense")]);
    assert!(!output.status.success() && stderr(&output).contains("rpc_urls"), "{output:?}");
}

#[tokio::test]
async fn the_environment_overrides_the_file_of_a_running_gateway() {
    let mut setup = Setup { limits: "keys_per_wallet = 5".into(), ..Setup::usual() };
    for (name, value) in [("KEYS_PER_WALLET", "1"), ("MIN_TOPUP_USD", "3"), ("MAX_BODY_MB", "1")] {
        setup.env.push((format!("FAREBOX_{name}"), value.into()));
    }
    let gateway = Gateway::start_with(setup).await;
    assert_eq!(gateway.get("/v1/status").send().await.json()["min_topup_usd"], "3");
    let wallet = TestWallet::random();
    gateway.key_for(&wallet).await;
    let again = gateway.post("/v1/auth/keys").json(&gateway.sign_in(&wallet).body()).send().await;
    again.error(409, "too_many_keys");
    gateway.post("/v1/topup").json(&json!({"amount": 2})).send().await.error(400, "invalid_amount");
    gateway.post("/v1/topup").body("x".repeat((1 << 20) + 1)).send().await.error(413, "body_too_large");
}

#[tokio::test]
async fn an_empty_file_is_served_within_a_second() {
    let mut gateway = Gateway::usual().await;
    gateway.terminate();
    assert!(gateway.wait_for_exit().await.success());
    for end in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{end}", gateway.database().display()));
    }
    let since = Instant::now();
    gateway.restart();
    gateway.get("/health").send().await.expect(200);
    // The requirement is a second; the rest is for a machine that runs other tests as well.
    assert!(since.elapsed() < Duration::from_secs(3), "{:?}", since.elapsed());
}

#[tokio::test]
async fn a_second_gateway_on_the_same_file_is_refused() {
    let gateway = Gateway::usual().await;
    let output = farebox_command()
        .args(["serve", "--config"])
        .arg(gateway.config())
        .env("FAREBOX_LISTEN", "127.0.0.1:0")
        .env("FAREBOX_RELAYER_KEY", RELAYER)
        .env("UPSTREAM_KEY", UPSTREAM_KEY)
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(stderr(&output).contains("in use"), "{output:?}");
    gateway.get("/ready").send().await.expect(200);
}

#[tokio::test]
async fn balances_keys_and_receipts_survive_a_restart() {
    let mut gateway = Gateway::usual().await;
    let customer = gateway.customer("5").await;
    let id =
        gateway.chat(&customer, &ask("Hello")).await.expect(200).header("x-request-id").unwrap().to_owned();
    let before = gateway.balance(&customer.wallet).await;
    gateway.terminate();
    assert_eq!(gateway.wait_for_exit().await.code(), Some(0));
    gateway.audit();
    gateway.restart();
    assert_eq!(gateway.balance(&customer.wallet).await, before);
    assert_eq!(gateway.receipt(&customer, &id).await["charged_usdc"], 11);
    gateway.chat(&customer, &ask("Hello")).await.expect(200);
}

#[test]
fn the_program_explains_itself() {
    let output = farebox_command().arg("--help").output().unwrap();
    assert!(output.status.success());
    for word in ["serve", "init", "check-config", "audit", "--config"] {
        assert!(stdout(&output).contains(word), "{word}");
    }
    let version = farebox_command().arg("--version").output().unwrap();
    assert_eq!(stdout(&version).trim(), format!("farebox {}", env!("CARGO_PKG_VERSION")));
    assert!(!farebox_command().arg("sevre").output().unwrap().status.success());
}

#[test]
fn prices_of_every_unit_are_checked_and_shown() {
    let model = |kind: &str, price: &str| {
        format!(
            "{}\n[[models]]\nid = \"openai/more\"\nprovider = \"openai\"\n{kind}\nprice = {{ {price} }}\n",
            good()
        )
    };
    let chat = "context_length = 1000\nmax_output_tokens = 100";
    let text = "prompt = \"1\", completion = \"2\"";
    for (what, kind, price, named) in [
        ("a price nobody knows", chat, format!("{text}, per_furlong = \"1\""), "per_furlong"),
        (
            "a tier without a threshold",
            chat,
            format!("{text}, tiers = [{{ prompt = \"1\" }}]"),
            "price.tiers",
        ),
        ("a threshold without a tier", chat, format!("{text}, above = 5"), "price.above"),
        (
            "a tier that is there twice",
            chat,
            format!("{text}, tiers = [{{ above = 5, prompt = \"1\" }}, {{ above = 5, prompt = \"2\" }}]"),
            "above 5",
        ),
        ("a tier of nothing", chat, format!("{text}, tiers = [{{ above = 5 }}]"), "above 5"),
        (
            "a price in a tier that is a word",
            chat,
            format!("{text}, tiers = [{{ above = 5, prompt = \"low\" }}]"),
            "price.tiers (above 5).prompt",
        ),
        ("a price with an exponent", chat, "prompt = \"1e-7\", completion = \"2\"".into(), "price.prompt"),
        (
            "a second that is too fine",
            chat,
            format!("{text}, per_second = \"0.0000000001\""),
            "price.per_second",
        ),
        ("a picture's price below zero", chat, format!("{text}, per_image = \"-1\""), "price.per_image"),
        (
            "a member of a picture's price that nobody knows",
            chat,
            format!("{text}, per_image = [{{ usd = \"1\", colour = \"red\" }}]"),
            "per_image",
        ),
        ("a chat without a price of its output", chat, "prompt = \"1\"".into(), "needs completion"),
        ("a kind nobody knows", "kind = \"smell\"", text.into(), "smell"),
        (
            "a picture without a price",
            "kind = \"image\"",
            text.into(),
            "needs per_image or image_out or per_call",
        ),
        ("sound without a price", "kind = \"transcription\"", text.into(), "needs per_second or audio_in"),
        ("an embedding without a length", "kind = \"embedding\"", "prompt = \"1\"".into(), "context_length"),
        ("a chat without a length", "", text.into(), "context_length"),
    ] {
        let output = farebox(&["check-config"], &model(kind, &price), &[]);
        assert_eq!(output.status.code(), Some(2), "{what}: {output:?}");
        assert!(stderr(&output).contains(named), "{what}: {}", stderr(&output));
    }
    let all = "prompt = \"1\", completion = \"2\", cache_write = \"1.25\", per_call = \"0.005\", per_second = \"0.0001\", \
               tiers = [{ above = 200000, prompt = \"2\" }], per_image = [{ size = \"s\", usd = \"0.04\" }]";
    let output = farebox(&["check-config"], &model(chat, all), &[]);
    let text = stdout(&output);
    for part in [
        "cache_write 1.5, per_second 0.00012, per_call 0.006\n",
        "above 200000 prompt tokens: prompt 2.4\n",
        "a picture of size s and quality any: 0.048\n",
        "version ",
    ] {
        assert!(text.contains(part), "{part} is not in {text}\n{}", stderr(&output));
    }
}

#[test]
fn where_a_facilitator_settles_no_relayer_key_is_needed() {
    let env = [("FAREBOX_RELAYER_KEY", ""), ("FAREBOX_FACILITATOR_URL", "https://facilitator.example/x402")];
    let output = farebox(&["check-config"], &good(), &env);
    assert!(output.status.success(), "{output:?}");
    let text = stdout(&output);
    assert!(text.lines().any(|line| line.ends_with(" facilitator.example")), "{text}");
}
