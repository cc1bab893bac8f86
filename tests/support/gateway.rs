//! The gateway as its users meet it: the real binary, started on files of its own, spoken to over HTTP.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::sync::Arc;

use alloy::primitives::Address;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use reqwest::Method;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};

use super::chain::TestChain;
use super::model_server::ModelServer;
use super::process::Process;
use super::wallet::{SignedIn, TestWallet};
use super::{PATIENCE, TempDir, eventually, free_port, http_client, in_time};

/// The model of the contract's example: $0.15, $0.60 and for cached prompts $0.075 a million tokens.
pub const MODEL: &str = "openai/gpt-5-mini";
/// The same prices; its upstream takes the limit as `max_tokens`, and its limits are small.
pub const SMALL: &str = "openai/small";
/// It may reason unseen.
pub const REASONING: &str = "openai/reasoning";
/// What asks it to reason is taken out.
pub const STRIPPED: &str = "openai/stripped";
/// $100 and $1000 a million tokens, for balances that end soon.
pub const DEAR: &str = "openai/dear";
/// What the upstream is shown; clients never may be.
pub const UPSTREAM_KEY: &str = "sk-upstream-0123456789abcdef-secret";
/// Tests ask as often as they like, but for those of the limits.
pub const NO_RATES: &str = "requests_per_minute = 0\nrequests_per_day = 0\nunauthenticated_per_minute = 0\nfailed_payments_per_minute = 0";
/// Tries at a port that somebody else may take first.
const START_TRIES: usize = 5;

/// How a gateway is started. The defaults serve five models of one upstream on an SQLite file.
#[derive(Clone)]
pub struct Setup {
    pub chain: Option<Arc<TestChain>>,
    /// Kept up for as long as the gateway is.
    pub model_server: Option<Arc<ModelServer>>,
    pub rpc_url: String,
    pub upstream_url: String,
    /// `None`: a file of the gateway's own.
    pub database_url: Option<String>,
    pub first_byte_timeout_s: u32,
    pub idle_timeout_s: u32,
    pub relayer: TestWallet,
    pub pay_to: Address,
    /// Lines of TOML for the file's top, `[payments]` and `[limits]`, and whole tables for its end.
    pub top: String,
    pub payments: String,
    pub limits: String,
    /// The lines of `[limits]` that bound how often things are asked for.
    pub rates: String,
    pub tables: String,
    /// More variables of the environment.
    pub env: Vec<(String, String)>,
}

impl Setup {
    /// On the shared chain, in front of the shared model server.
    pub fn usual() -> Self {
        let model_server = ModelServer::shared();
        let setup = Self::new(&TestChain::shared(), &model_server.base_url);
        Self { model_server: Some(model_server), ..setup }
    }

    pub fn new(chain: &Arc<TestChain>, upstream_url: &str) -> Self {
        Self { chain: Some(chain.clone()), ..Self::without_chain(&chain.url, upstream_url) }
    }

    /// For an endpoint that is no chain of ours: nobody is given gas there.
    pub fn without_chain(rpc_url: &str, upstream_url: &str) -> Self {
        Self {
            chain: None,
            model_server: None,
            rpc_url: rpc_url.to_owned(),
            upstream_url: upstream_url.to_owned(),
            database_url: None,
            first_byte_timeout_s: 20,
            idle_timeout_s: 10,
            relayer: TestWallet::random(),
            pay_to: TestWallet::random().address(),
            top: String::new(),
            payments: String::new(),
            limits: String::new(),
            rates: NO_RATES.to_owned(),
            tables: String::new(),
            env: Vec::new(),
        }
    }

    pub fn toml(&self, address: &str, directory: &Path) -> String {
        let Self { rpc_url, upstream_url, pay_to, top, payments, limits, rates, tables, .. } = self;
        let database_url = self.database_url.clone();
        let database_url =
            database_url.unwrap_or_else(|| format!("sqlite://{}", directory.join("farebox.db").display()));
        let mut text = format!(
            "listen = \"{address}\"\npublic_url = \"http://{address}\"\ndatabase_url = \"{database_url}\"\n{top}\n\
             [payments]\nnetwork = \"eip155:8453\"\nrpc_urls = [\"{rpc_url}\"]\npay_to = \"{pay_to}\"\n{payments}\n\
             [limits]\n{limits}\n{rates}\n\
             [[providers]]\nname = \"openai\"\nbase_url = \"{upstream_url}\"\napi_key_env = \"UPSTREAM_KEY\"\n\
             first_byte_timeout_s = {}\nidle_timeout_s = {}\n",
            self.first_byte_timeout_s, self.idle_timeout_s
        );
        let price = "{ prompt = \"0.15\", completion = \"0.60\", cached_prompt = \"0.075\" }";
        let dear = "{ prompt = \"100\", completion = \"1000\" }";
        for (id, upstream_model, context, output, more, price) in [
            (MODEL, "gpt-5-mini", 128_000, 16_384, "max_tokens_field = \"max_completion_tokens\"", price),
            (SMALL, "small-upstream", 4_000, 100, "created = 1700000000", price),
            (REASONING, "reasoning-upstream", 128_000, 16_384, "reasoning = \"allow\"", price),
            (STRIPPED, "stripped-upstream", 128_000, 16_384, "reasoning = \"strip\"", price),
            (DEAR, "dear-upstream", 128_000, 16_384, "", dear),
        ] {
            text += &format!(
                "\n[[models]]\nid = \"{id}\"\nprovider = \"openai\"\nupstream_model = \"{upstream_model}\"\n\
                 context_length = {context}\nmax_output_tokens = {output}\n{more}\nprice = {price}\n"
            );
        }
        text + "\n" + tables
    }
}

/// Beside the usual ones a provider of each kind, all of them the same model server, with a model each at the
/// prices of [`MODEL`].
pub fn every_kind(mut setup: Setup) -> Setup {
    let v1 = setup.upstream_url.clone();
    for (name, kind, base_url) in [
        ("responses", "kind = \"openai\"\nresponses = true", v1.clone()),
        ("anthropic", "kind = \"anthropic\"", v1.clone()),
        ("gemini", "kind = \"gemini\"", format!("{v1}beta")),
    ] {
        setup.tables += &format!(
            "[[providers]]\nname = \"{name}\"\n{kind}\nbase_url = \"{base_url}\"\napi_key_env = \"UPSTREAM_KEY\"\n\n\
             [[models]]\nid = \"{name}/model\"\nprovider = \"{name}\"\ncontext_length = 128000\n\
             max_output_tokens = 16384\n\
             price = {{ prompt = \"0.15\", completion = \"0.60\", cached_prompt = \"0.075\" }}\n\n"
        );
    }
    setup
}

/// Its models, by their providers.
pub fn every_kinds_models() -> BTreeMap<&'static str, &'static str> {
    BTreeMap::from([
        ("openai", MODEL),
        ("responses", "responses/model"),
        ("anthropic", "anthropic/model"),
        ("gemini", "gemini/model"),
    ])
}

pub struct Gateway {
    /// `127.0.0.1:port`, as sign-ins name it.
    pub host: String,
    pub setup: Setup,
    directory: TempDir,
    process: Process,
    client: reqwest::Client,
    /// What earlier processes of this gateway wrote.
    earlier: String,
}

impl Gateway {
    /// On the shared chain, in front of the shared model server.
    pub async fn usual() -> Self {
        Self::start_with(Setup::usual()).await
    }

    /// A gateway between a chain and an upstream, ready for requests.
    pub async fn start(chain: &Arc<TestChain>, upstream_url: &str) -> Self {
        Self::start_with(Setup::new(chain, upstream_url)).await
    }

    pub async fn start_with(setup: Setup) -> Self {
        if let Some(chain) = &setup.chain {
            chain.give_gas(setup.relayer.address()).await;
        }
        let mut last = String::new();
        for _ in 0..START_TRIES {
            let directory = TempDir::new();
            // Sign-ins name host and port, so the port must be known before the gateway starts.
            let host = format!("127.0.0.1:{}", free_port());
            std::fs::write(directory.path().join("farebox.toml"), setup.toml(&host, directory.path()))
                .unwrap();
            match launch(&setup, directory.path(), &host) {
                Ok(process) => {
                    let earlier = String::new();
                    return Self { host, setup, directory, process, client: http_client(), earlier };
                }
                Err(why) => last = why,
            }
            assert!(last.contains("cannot listen"), "{last}");
        }
        panic!("{last}");
    }

    /// The same files and address again, after the process has ended.
    pub fn restart(&mut self) {
        self.earlier += &self.process.output();
        self.process = launch(&self.setup, self.directory.path(), &self.host).unwrap();
    }

    /// Ends the process and starts it again as `change` makes its setup.
    pub fn reconfigure(&mut self, change: impl FnOnce(&mut Setup)) {
        self.kill_9();
        change(&mut self.setup);
        let toml = self.setup.toml(&self.host, self.directory.path());
        std::fs::write(self.config(), toml).unwrap();
        self.restart();
    }

    /// Like [`Self::restart`], for a process that may die before it is ready; whether it is.
    pub fn try_restart(&mut self) -> bool {
        self.earlier += &self.process.output();
        match launch(&self.setup, self.directory.path(), &self.host) {
            Ok(process) => {
                self.process = process;
                true
            }
            Err(_) => false,
        }
    }

    pub fn kill_9(&mut self) {
        self.process.kill_9();
    }

    /// Whether the process has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.process.has_ended()
    }

    /// Asks it to stop; does not wait.
    pub fn terminate(&self) {
        self.process.terminate();
    }

    /// Has it read its models again, from this text of its configuration; does not wait.
    pub fn reload(&self, config: &str) {
        std::fs::write(self.config(), config).unwrap();
        self.process.signal("HUP");
    }

    pub async fn wait_for_exit(&mut self) -> ExitStatus {
        self.process.wait(PATIENCE + PATIENCE).await
    }

    pub fn config(&self) -> PathBuf {
        self.directory.path().join("farebox.toml")
    }

    pub fn database(&self) -> PathBuf {
        self.directory.path().join("farebox.db")
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn logs(&self) -> String {
        format!("{}{}", self.earlier, self.process.output())
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.host)
    }

    /// Runs `farebox SUBCOMMAND` on this gateway's configuration.
    pub fn run(&self, subcommand: &str) -> Output {
        self.run_with(&[subcommand])
    }

    /// Runs `farebox ARGS` on this gateway's configuration.
    pub fn run_with(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// `farebox ARGS` on this gateway's configuration, not yet run.
    pub fn command(&self, args: &[&str]) -> Command {
        command(&self.setup, self.directory.path(), args)
    }

    /// `farebox audit`, which must find no drift and leave nothing out.
    pub fn audit(&self) {
        let audit = self.run("audit");
        assert!(audit.status.success(), "farebox audit: {audit:#?}");
        let report = String::from_utf8(audit.stdout).unwrap();
        assert!(!report.contains("skipped"), "{report}");
    }

    pub fn request(&self, method: Method, path: &str) -> Call {
        Call(self.client.request(method, self.url(path)))
    }

    pub fn get(&self, path: &str) -> Call {
        self.request(Method::GET, path)
    }

    pub fn post(&self, path: &str) -> Call {
        self.request(Method::POST, path)
    }

    pub fn delete(&self, path: &str) -> Call {
        self.request(Method::DELETE, path)
    }

    /// A fresh message that signs `wallet` in here.
    pub fn sign_in(&self, wallet: &TestWallet) -> SignedIn {
        wallet.siwe(&self.host).sign()
    }

    /// Makes an API key for a wallet.
    pub async fn key_for(&self, wallet: &TestWallet) -> ApiKey {
        let made =
            self.post("/v1/auth/keys").json(&self.sign_in(wallet).body()).send().await.expect(201).json();
        ApiKey { id: made["id"].as_i64().unwrap(), secret: made["key"].as_str().unwrap().to_owned() }
    }

    /// Tops a wallet up with real USDC, which is minted for it first.
    pub async fn top_up(&self, wallet: &TestWallet, usd: &str) -> Value {
        let micro = micro(usd);
        self.chain().mint(wallet.address(), micro).await;
        let payment = wallet.authorization(self.setup.pay_to, micro).sign();
        let call = self.post("/v1/topup").json(&json!({"amount": usd}));
        let topup = call.header("x-payment", &payment.v2_header()).send().await.expect(200).json();
        assert_eq!(topup["credited_usdc"], micro);
        topup
    }

    /// A fresh wallet with an API key and a balance (`"0"`: none).
    pub async fn customer(&self, usd: &str) -> Customer {
        let wallet = TestWallet::random();
        if usd != "0" {
            self.top_up(&wallet, usd).await;
        }
        let key = self.key_for(&wallet).await;
        Customer { wallet, key }
    }

    /// What a wallet owns here, read with its signature.
    pub async fn balance(&self, wallet: &TestWallet) -> Balance {
        let path = format!("/v1/usage/{}{}", wallet.address(), self.sign_in(wallet).query());
        Balance::read(&self.get(&path).send().await.expect(200).json())
    }

    /// The row of a wallet's usage for calls without a key, read with its signature.
    pub async fn usage_without_key(&self, wallet: &TestWallet) -> Value {
        let path = format!("/v1/usage/{}{}", wallet.address(), self.sign_in(wallet).query());
        let usage = self.get(&path).send().await.expect(200).json();
        let rows = usage["keys"].as_array().unwrap();
        rows.iter().find(|row| row["api_key_id"].is_null()).unwrap().clone()
    }

    /// Waits until nothing of a wallet's is locked, and answers what it then owns.
    pub async fn settled(&self, customer: &Customer) -> Balance {
        let path = format!("/v1/usage/{}", customer.wallet.address());
        eventually("all holds have ended", async || {
            let usage = self.get(&path).key(&customer.key).send().await.expect(200).json();
            Some(Balance::read(&usage)).filter(|balance| balance.locked == 0)
        })
        .await
    }

    pub fn chain(&self) -> &TestChain {
        self.setup.chain.as_ref().expect("a chain to pay on")
    }

    pub async fn chat(&self, customer: &Customer, body: &Value) -> Answer {
        self.post("/v1/chat/completions").key(&customer.key).json(body).send().await
    }

    /// Asks for a stream and returns at its head, which must be a 200.
    pub async fn stream(&self, customer: &Customer, body: &Value) -> EventStream {
        let call = self.post("/v1/chat/completions").key(&customer.key).json(body);
        let response = in_time("the head of a stream", call.0.send()).await.unwrap();
        let id = response.headers().get("x-request-id").map(|id| id.to_str().unwrap().to_owned());
        if response.status() != 200 {
            let answer = Answer::read(response).await;
            panic!("no stream, but {answer:?}");
        }
        EventStream { id: id.unwrap(), headers: response.headers().clone(), response, buffer: String::new() }
    }

    pub async fn receipt(&self, customer: &Customer, id: &str) -> Value {
        let call = self.get(&format!("/v1/requests/{id}")).key(&customer.key);
        call.send().await.expect(200).json()
    }

    /// Waits for the receipt of a request that is still being settled.
    pub async fn receipt_in_time(&self, customer: &Customer, id: &str) -> Value {
        eventually("the receipt is there", async || {
            let answer = self.get(&format!("/v1/requests/{id}")).key(&customer.key).send().await;
            (answer.status == 200).then(|| answer.json())
        })
        .await
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- what the gateway at {} said ---\n{}", self.host, self.logs());
        }
    }
}

fn launch(setup: &Setup, directory: &Path, host: &str) -> Result<Process, String> {
    let mut process = Process::spawn("farebox", &mut command(setup, directory, &["serve"]));
    let ready = format!("farebox listens on http://{host}");
    process.wait_for_line(PATIENCE, |line| line == ready).map(|_| process)
}

fn command(setup: &Setup, directory: &Path, args: &[&str]) -> Command {
    let mut command = farebox_command();
    command
        .args(args)
        .arg("--config")
        .arg(directory.join("farebox.toml"))
        .env("FAREBOX_RELAYER_KEY", setup.relayer.private_key())
        .env("UPSTREAM_KEY", UPSTREAM_KEY)
        .envs(setup.env.iter().map(|(name, value)| (name, value)));
    command
}

/// The binary, with an empty environment: what is set for whoever runs the tests is nothing to it.
pub fn farebox_command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farebox"));
    command.env_clear();
    command
}

/// `"1.50"` as micro-USDC.
pub fn micro(usd: &str) -> u64 {
    let (whole, fraction) = usd.split_once('.').unwrap_or((usd, ""));
    format!("{whole}{fraction:0<6}").parse().unwrap()
}

#[derive(Clone, Debug)]
pub struct ApiKey {
    pub id: i64,
    pub secret: String,
}

#[derive(Clone)]
pub struct Customer {
    pub wallet: TestWallet,
    pub key: ApiKey,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Balance {
    pub balance: u64,
    pub locked: u64,
    pub available: u64,
}

impl Balance {
    fn read(usage: &Value) -> Self {
        let field = |name: &str| usage[name].as_u64().unwrap_or_else(|| panic!("no {name} in {usage}"));
        let balance = Self {
            balance: field("balance_usdc"),
            locked: field("locked_usdc"),
            available: field("available_usdc"),
        };
        assert_eq!(balance.available, balance.balance - balance.locked);
        balance
    }
}

/// A request being put together.
pub struct Call(pub reqwest::RequestBuilder);

impl Call {
    pub fn key(self, key: &ApiKey) -> Self {
        self.header("authorization", &format!("Bearer {}", key.secret))
    }

    pub fn header(self, name: &str, value: &str) -> Self {
        Self(self.0.header(name, value))
    }

    pub fn json(self, body: &Value) -> Self {
        Self(self.0.header("content-type", "application/json").body(body.to_string()))
    }

    /// A body as it is, without a Content-Type.
    pub fn body(self, body: impl Into<reqwest::Body>) -> Self {
        Self(self.0.body(body))
    }

    pub async fn send(self) -> Answer {
        Answer::read(in_time("an answer", self.0.send()).await.unwrap()).await
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    async fn read(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = in_time("an answer's body", response.bytes()).await.unwrap();
        Self { status, headers, body }
    }

    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("not JSON ({e}): {self:?}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// A header that holds a whole number.
    #[track_caller]
    pub fn number(&self, name: &str) -> u64 {
        let text = self.header(name).unwrap_or_else(|| panic!("no header {name}: {self:?}"));
        text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text:?}"))
    }

    /// A header that holds base64 of JSON, as x402's do.
    #[track_caller]
    pub fn decoded(&self, name: &str) -> Value {
        let text = self.header(name).unwrap_or_else(|| panic!("no header {name}: {self:?}"));
        serde_json::from_slice(&BASE64_STANDARD.decode(text).unwrap()).unwrap()
    }

    /// Checks that it is an error of exactly the documented shape, and returns its `error` member.
    #[track_caller]
    pub fn error(&self, status: u16, code: &str) -> Value {
        let kind = match status {
            401 => "authentication_error",
            402 => "billing_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        assert_eq!(self.status, status, "{self:?}");
        let body = self.json();
        let error = &body["error"];
        assert_eq!(members(&body), ["error"], "{body}");
        assert_eq!(members(error), ["code", "message", "param", "type"], "{body}");
        assert_eq!(error["type"], kind, "{body}");
        assert_eq!(error["code"], code, "{body}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
        error.clone()
    }
}

/// The names of an object's members, sorted.
pub fn members(object: &Value) -> Vec<&str> {
    let mut names: Vec<_> = object.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    names
}

/// A stream of events being read. Dropped, it is a client that has gone away.
pub struct EventStream {
    pub id: String,
    pub headers: HeaderMap,
    response: reqwest::Response,
    buffer: String,
}

impl EventStream {
    /// The next event as it was sent, without its blank line; `None` at the stream's end.
    pub async fn next_raw(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let event = event.to_owned();
                self.buffer = rest.to_owned();
                return Some(event);
            }
            match in_time("an event", self.response.chunk()).await.unwrap() {
                Some(bytes) => self.buffer += std::str::from_utf8(&bytes).unwrap(),
                None => {
                    assert_eq!(self.buffer, "", "half an event at the end");
                    return None;
                }
            }
        }
    }

    /// The data of the next event that has some.
    pub async fn next(&mut self) -> Option<String> {
        while let Some(event) = self.next_raw().await {
            if let Some(data) = event.strip_prefix("data: ") {
                return Some(data.to_owned());
            }
        }
        None
    }

    /// All that is left, each event's data.
    pub async fn rest(&mut self) -> Vec<String> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// A chat request with one message.
pub fn ask(content: &str) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 64})
}

/// The same, streamed.
pub fn ask_stream(content: &str) -> Value {
    let mut body = ask(content);
    body["stream"] = true.into();
    body
}
