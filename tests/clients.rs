//! Clients that nobody here wrote, from the package registries, against the real gateway.

use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use crate::support::chain::TestChain;
use crate::support::gateway::{Gateway, MODEL, Setup, UPSTREAM_KEY, every_kind, every_kinds_models, micro};
use crate::support::model_server::ModelServer;
use crate::support::wallet::TestWallet;
use crate::support::{project_root, tool};

const TOPUP_USD: &str = "2";
/// Of a chain that others use as well.
const BETWEEN_BLOCKS: Duration = Duration::from_millis(300);

/// A house for one client: a gateway, a funded wallet, and a key of it with a balance.
struct House {
    gateway: Gateway,
    wallet: TestWallet,
    api_key: String,
    poor_api_key: String,
}

impl House {
    async fn open() -> Self {
        Self::open_with(Setup::usual()).await
    }

    async fn open_with(setup: Setup) -> Self {
        let gateway = Gateway::start_with(setup).await;
        let customer = gateway.customer("5").await;
        gateway.chain().mint(customer.wallet.address(), micro("10")).await;
        let poor = gateway.customer("0").await;
        Self { gateway, wallet: customer.wallet, api_key: customer.key.secret, poor_api_key: poor.key.secret }
    }

    /// Runs a program of `tests/clients`, which exits 0 only if everything it checks holds.
    fn run(&self, program: &mut Command) {
        let program = program
            .env("FAREBOX_URL", self.gateway.url(""))
            .env("RPC_URL", &self.gateway.chain().url)
            .env("WALLET_KEY", self.wallet.private_key())
            .env("API_KEY", &self.api_key)
            .env("POOR_API_KEY", &self.poor_api_key)
            .env("MODEL", MODEL)
            .env("TOPUP_USD", TOPUP_USD);
        run(program);
    }

    async fn run_topup(&self, program: &mut Command) {
        let before = self.gateway.balance(&self.wallet).await;
        self.run(program);
        let after = self.gateway.balance(&self.wallet).await;
        assert_eq!(after.balance, before.balance + micro(TOPUP_USD));
        self.gateway.audit();
    }
}

/// A house for a wallet that nobody here knows, with so much on the chain: what it buys it pays for
/// with the request, or tops up before. Payer, treasury and ledger must agree to the micro-USDC afterwards.
async fn buy_without_an_account(usd: &str, program: &mut Command) {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro(usd)).await;
    let house = House { gateway, wallet, api_key: String::new(), poor_api_key: String::new() };
    house.run(program);
    let House { gateway, wallet, .. } = house;
    let paid = micro(usd) - gateway.chain().usdc_of(wallet.address()).await;
    assert_eq!(gateway.chain().usdc_of(gateway.setup.pay_to).await, paid, "the treasury has it");
    let charged = gateway.usage_without_key(&wallet).await["total_charged_usdc"].as_u64().unwrap();
    assert!(charged > 0 && charged < paid);
    assert_eq!(gateway.balance(&wallet).await.balance, paid - charged, "what was overpaid is the payer's");
    gateway.audit();
}

/// Runs a program of `tests/clients` to its end.
pub fn run(program: &mut Command) {
    let output = program
        .current_dir(project_root().join("tests/clients"))
        // All is on this machine: whatever proxy there is has no part in it.
        .envs([("NO_PROXY", "*"), ("no_proxy", "*")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{program:?}\n{}", shown(&output));
    assert!(output.stdout.starts_with(b"ok  "), "it checked nothing:\n{}", shown(&output));
}

fn shown(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub fn node(program: &str) -> Command {
    let mut command = Command::new("node");
    command.arg(program);
    command
}

pub fn python(program: &str) -> Command {
    let mut command = Command::new(tool("CLIENTS_PYTHON", "build/venv/bin/python"));
    command.arg(program);
    command
}

/// Without a gateway: what is read is what `formats::golden` holds the translations to.
#[test]
fn what_is_translated_is_read_by_the_clients_of_each_format() {
    run(&mut node("formats.mjs"));
}

// Each runs on several threads, since a child is waited for on one of them.

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn openai_for_node() {
    let house = House::open().await;
    house.run(&mut node("openai_node.mjs"));
    house.gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn openai_for_python() {
    let house = House::open().await;
    house.run(&mut python("openai_python.py"));
    house.gateway.audit();
}

/// The model server spoken to in each of its formats: what clients speak is their own affair.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_format_over_upstreams_of_every_kind() {
    let house = House::open_with(every_kind(Setup::usual())).await;
    let models = serde_json::to_string(&every_kinds_models()).unwrap();
    house.run(node("wire_formats.mjs").env("MODELS", &models));
    house.run(python("anthropic_python.py").env("MODELS", &models));
    house.gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn siwe_and_viem() {
    let house = House::open().await;
    house.run(&mut node("siwe_viem.mjs"));
    house.gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sign_in_with_x_for_node() {
    let house = House::open().await;
    house.run(&mut node("siwx.mjs"));
    house.gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn x402_v2_for_node() {
    House::open().await.run_topup(&mut node("x402_v2.mjs")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn x402_v1_for_node() {
    House::open().await.run_topup(&mut node("x402_v1.mjs")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn x402_for_python() {
    House::open().await.run_topup(&mut python("x402_python.py")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn curl_with_a_payment_header() {
    let mut script = Command::new("bash");
    script.arg("curl_topup.sh");
    House::open().await.run_topup(&mut script).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn x402_v1_for_node_buys_answers() {
    buy_without_an_account("1", node("x402_chat.mjs").arg("v1")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn x402_v2_for_node_buys_answers() {
    buy_without_an_account("1", node("x402_chat.mjs").arg("v2")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn x402_for_python_buys_answers() {
    buy_without_an_account("1", &mut python("x402_chat_python.py")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn curl_buys_an_answer() {
    let mut script = Command::new("bash");
    script.arg("curl_chat.sh");
    buy_without_an_account("1", &mut script).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn x402_extensions_for_node() {
    buy_without_an_account("1", &mut node("x402_extensions.mjs")).await;
}

/// The code of docs/DAPP.md, on a page of another origin: signs in, tops up $2, pays for one call.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn chromium_runs_the_dapp() {
    buy_without_an_account("3", &mut node("browser.mjs")).await;
}

/// A page of docs/, run as it stands by a wallet that nobody here knows. The chain is the test's own,
/// since a page may stop its blocks. What the wallet paid is its balance and what its requests cost.
async fn read_docs(page: &str) {
    let models = ModelServer::shared();
    let (chain, treasury) = (Arc::new(TestChain::start()), TestWallet::random());
    let setup = Setup {
        pay_to: treasury.address(),
        env: vec![("FAREBOX_TREASURY_KEY".into(), treasury.private_key())],
        ..Setup::new(&chain, &models.base_url)
    };
    // As others' transactions make blocks, so that what a page waits for becomes final.
    let others = (page == "CURL.md").then(|| {
        tokio::spawn(async move {
            loop {
                chain.mine(1).await;
                tokio::time::sleep(BETWEEN_BLOCKS).await;
            }
        })
    });
    read_docs_at(Gateway::start_with(setup).await, page).await;
    others.inspect(|others| others.abort());
}

async fn read_docs_at(gateway: Gateway, page: &str) {
    let wallet = TestWallet::random();
    gateway.chain().mint(wallet.address(), micro("5")).await;
    let house = House { gateway, wallet, api_key: String::new(), poor_api_key: String::new() };
    let treasury_key = house.gateway.setup.env.iter().find(|(name, _)| name == "FAREBOX_TREASURY_KEY");
    house.run(
        node("run_docs.mjs")
            .arg(format!("../../docs/{page}"))
            .env("FAREBOX_BIN", env!("CARGO_BIN_EXE_farebox"))
            .env("FAREBOX_CONFIG", house.gateway.config())
            .env("FAREBOX_RELAYER_KEY", house.gateway.setup.relayer.private_key())
            .env("UPSTREAM_KEY", UPSTREAM_KEY)
            .envs(treasury_key.map(|(name, key)| (name, key))),
    );
    let House { gateway, wallet, .. } = house;
    let paid = micro("5") - gateway.chain().usdc_of(wallet.address()).await;
    let path = format!("/v1/usage/{}{}", wallet.address(), gateway.sign_in(&wallet).query());
    let usage = gateway.get(&path).send().await.expect(200).json();
    let rows = usage["keys"].as_array().unwrap();
    let charged: u64 = rows.iter().map(|row| row["total_charged_usdc"].as_u64().unwrap()).sum();
    assert!(charged > 0 && charged < paid);
    assert_eq!(usage["balance_usdc"].as_u64().unwrap(), paid - charged, "what was overpaid is the payer's");
    gateway.audit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_page_for_curl() {
    read_docs("CURL.md").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_page_for_agents() {
    read_docs("AGENTS.md").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_page_of_proofs() {
    let models = ModelServer::shared();
    let gateway = Gateway::start(&Arc::new(TestChain::start()), &models.base_url).await;
    // Others are there already, and what they paid is final.
    for usd in ["3", "2"] {
        gateway.customer(usd).await;
    }
    for _ in 0..3 {
        gateway.chain().rpc("evm_mine", serde_json::json!([])).await;
    }
    read_docs_at(gateway, "PROOFS.md").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn receipts_are_checked_by_viem_and_x402() {
    buy_without_an_account("3", &mut node("proofs.mjs")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_proof_of_reserves_is_checked_by_node() {
    let house = House::open().await;
    for usd in ["1", "2", "3"] {
        house.gateway.customer(usd).await;
    }
    let published = house.gateway.run_with(&["audit", "--publish"]);
    assert!(published.status.success(), "{published:?}");
    house.run(&mut node("reserves_proof.mjs"));
    house.gateway.audit();
}
