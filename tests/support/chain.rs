//! anvil with Circle's own USDC, from the state that `scripts/setup.sh test` has made.

use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use alloy::primitives::{Address, Bytes, address};
use serde_json::{Value, json};

use super::process::Process;
use super::{PATIENCE, TempDir, eventually, http_client, tool};

/// Where USDC is on Base, and here.
pub const USDC: Address = address!("833589fCD6eDb6E08f4c7C32D4f71b54bdA02913");
pub const CHAIN_ID: u64 = 8453;
/// anvil's first account, which may mint; anvil signs for it.
pub const MINTER: Address = address!("f39Fd6e51aad88F6F4ce6aB8827279cffFb92266");
/// The token's roles: see `tests/clients/devchain.mjs`.
pub const PAUSER: Address = address!("3C44CdDdB6a900fa2b585dd299e03d12FA4293BC");
pub const BLACKLISTER: Address = address!("90F79bf6EB2c4f870365E785982E1f101E93b906");
/// An account with ETH and no role, for a bystander's transactions.
pub const BYSTANDER: Address = address!("976EA74026E726554dB657fA54763abd0C3a0aa9");

pub struct TestChain {
    pub url: String,
    http: reqwest::Client,
    process: Process,
    /// Where it puts states of earlier blocks, which it leaves behind when it is killed.
    _states: TempDir,
}

impl TestChain {
    /// A chain of the test's own, to stop, reorganise and break.
    pub fn start() -> Self {
        let mut command =
            Command::new(tool("ANVIL", "tests/clients/node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil"));
        command.args([
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--chain-id",
            "8453",
            "--slots-in-an-epoch",
            "1",
        ]);
        command.arg("--load-state").arg(tool("USDC_STATE", "build/usdc-state.json"));
        let states = TempDir::new();
        command.arg("--cache-path").arg(states.path());
        let mut process = Process::spawn("anvil", &mut command);
        let line = process.wait_for_line(PATIENCE, |line| line.starts_with("Listening on ")).unwrap();
        let url = format!("http://{}", line.trim_start_matches("Listening on ").trim());
        Self { url, http: http_client(), process, _states: states }
    }

    /// One for all tests that run at the moment and only pay on it.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<TestChain>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let started = Arc::new(Self::start());
            *shared = Arc::downgrade(&started);
            started
        })
    }

    /// One JSON-RPC call that must succeed.
    pub async fn rpc(&self, method: &str, params: Value) -> Value {
        self.try_rpc(method, params.clone()).await.unwrap_or_else(|e| panic!("{method} {params}: {e}"))
    }

    pub async fn try_rpc(&self, method: &str, params: Value) -> Result<Value, String> {
        let call = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let answer = self
            .http
            .post(&self.url)
            .header("content-type", "application/json")
            .timeout(Duration::from_secs(20))
            .body(call.to_string())
            .send()
            .await
            .map_err(|e| e.to_string())?;
        let bytes = answer.bytes().await.map_err(|e| e.to_string())?;
        let answer: Value = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        match answer.get("error") {
            Some(error) => Err(error.to_string()),
            None => Ok(answer["result"].clone()),
        }
    }

    /// Sends a transaction from an account that anvil signs for, and waits until it is mined.
    /// Answers its hash. It must succeed.
    pub async fn send(&self, from: Address, to: Address, data: &str) -> String {
        self.send_transaction(json!({"from": from, "to": to, "data": data, "gas": "0x100000"})).await
    }

    /// The same for any transaction that anvil takes.
    pub async fn send_transaction(&self, transaction: Value) -> String {
        let call = json!([transaction]);
        // anvil counts the account's nonces itself, and of two tests that send at once gives both one.
        let hash = eventually("anvil takes the transaction", async || {
            match self.try_rpc("eth_sendTransaction", call.clone()).await {
                // Two with one nonce, either while the first is in the pool or once it is mined.
                Err(error) if error.contains("nonce too low") || error.contains("underpriced") => None,
                sent => Some(sent.unwrap_or_else(|e| panic!("eth_sendTransaction {call}: {e}"))),
            }
        })
        .await;
        let hash = hash.as_str().unwrap().to_owned();
        let receipt = eventually("the transaction is mined", async || {
            Some(self.rpc("eth_getTransactionReceipt", json!([hash])).await).filter(|r| !r.is_null())
        })
        .await;
        assert_eq!(receipt["status"], "0x1", "a transaction of the test reverted: {receipt}");
        hash
    }

    /// Sends a transaction without waiting for it, dearly to be mined before others; whether it
    /// succeeds, and whether anvil takes it at all, is all the same.
    pub async fn submit(&self, from: Address, to: Address, data: &str, dearly: bool) {
        let tip = if dearly { "0x174876e800" } else { "0x1" };
        let call = json!([{
            "from": from, "to": to, "data": data, "gas": "0x40000",
            "maxFeePerGas": "0x2540be40000", "maxPriorityFeePerGas": tip,
        }]);
        let _ = self.try_rpc("eth_sendTransaction", call).await;
    }

    /// Makes USDC for a wallet.
    pub async fn mint(&self, to: Address, micro: u64) {
        let data = format!("0x40c10f19{}{micro:064x}", word(to));
        self.send(MINTER, USDC, &data).await;
    }

    /// What a wallet holds on the chain, in micro-USDC.
    pub async fn usdc_of(&self, wallet: Address) -> u64 {
        let call = json!([{"to": USDC, "data": format!("0x70a08231{}", word(wallet))}, "latest"]);
        let answer = self.rpc("eth_call", call).await;
        u64::from_str_radix(answer.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
    }

    /// The code at an address: empty where there is none.
    pub async fn code_of(&self, address: Address) -> Bytes {
        let code = self.rpc("eth_getCode", json!([address, "latest"])).await;
        code.as_str().unwrap().parse().unwrap()
    }

    /// How many transactions of an account are in the chain.
    pub async fn sent_by(&self, account: Address) -> u64 {
        let count = self.rpc("eth_getTransactionCount", json!([account, "latest"])).await;
        u64::from_str_radix(count.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
    }

    /// Waits until a transaction has been sent that no block holds yet.
    pub async fn transaction_in_the_pool(&self) {
        eventually("a transaction waits for its block", async || {
            (self.rpc("txpool_status", json!([])).await["pending"] != "0x0").then_some(())
        })
        .await;
    }

    /// 100 ETH, for gas.
    pub async fn give_gas(&self, to: Address) {
        self.rpc("anvil_setBalance", json!([to, "0x56bc75e2d63100000"])).await;
    }

    pub async fn mine(&self, blocks: u64) {
        self.rpc("anvil_mine", json!([format!("{blocks:#x}")])).await;
    }

    pub async fn head(&self) -> u64 {
        let number = self.rpc("eth_blockNumber", json!([])).await;
        u64::from_str_radix(number.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
    }

    /// Whether transactions are mined as they come, as they are at first.
    pub async fn set_automine(&self, on: bool) {
        self.rpc("evm_setAutomine", json!([on])).await;
    }

    pub fn log(&self) -> String {
        self.process.output()
    }

    /// Ends the chain, as an outage of the RPC endpoint would look.
    pub fn kill_9(&mut self) {
        self.process.kill_9();
    }
}

/// An address as an argument of a call.
pub fn word(address: Address) -> String {
    format!("{:0>64}", hex::encode(address))
}
