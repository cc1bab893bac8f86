//! An RPC endpoint in front of the real one that fails when told to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::support::{http_client, in_time};

#[derive(Copy, Clone)]
pub enum Fault {
    /// The call does not reach the chain.
    Unreachable,
    /// It does, and what it came to is lost on the way back.
    AnswerLost,
    /// The call is taken, and never answered.
    Silent,
    /// Calls of such parameters are kept waiting until the endpoint is mended.
    HeldBack(fn(&Value) -> bool),
    /// Calls of such parameters are refused, as those beyond a provider's limits are.
    Refused(fn(&Value) -> bool),
    /// The endpoint says something else than the chain: made of the call's parameters and the truth.
    Lie(fn(&Value, Value) -> Value),
}

#[derive(Clone)]
struct Relay {
    upstream: String,
    http: reqwest::Client,
    faults: Arc<Mutex<HashMap<String, Fault>>>,
    heard: Arc<Mutex<String>>,
    /// Calls that are held back now.
    waiting: watch::Sender<usize>,
}

pub struct FaultyRpc {
    pub url: String,
    faults: Arc<Mutex<HashMap<String, Fault>>>,
    heard: Arc<Mutex<String>>,
    waiting: watch::Sender<usize>,
    server: JoinHandle<()>,
}

impl FaultyRpc {
    pub async fn start(upstream: &str) -> Self {
        let (faults, heard) = (Arc::default(), Arc::default());
        let waiting = watch::Sender::new(0);
        let relay = Relay {
            upstream: upstream.to_owned(),
            http: http_client(),
            faults: Arc::clone(&faults),
            heard: Arc::clone(&heard),
            waiting: waiting.clone(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(relayed).with_state(relay);
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, faults, heard, waiting, server }
    }

    /// Makes every call of these methods fail from now on.
    pub fn break_methods(&self, faults: &[(&str, Fault)]) {
        let faults = faults.iter().map(|(method, fault)| ((*method).to_owned(), *fault));
        self.faults.lock().unwrap().extend(faults);
    }

    pub fn mend(&self) {
        self.faults.lock().unwrap().clear();
        self.waiting.send_replace(0);
    }

    /// All that it was told.
    pub fn heard(&self) -> String {
        self.heard.lock().unwrap().clone()
    }

    /// Waits until a call is held back.
    pub async fn held_back(&self) {
        let mut waiting = self.waiting.subscribe();
        in_time("a call to be held back", waiting.wait_for(|calls| *calls > 0)).await.unwrap();
    }
}

impl Drop for FaultyRpc {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn relayed(State(relay): State<Relay>, body: Bytes) -> (StatusCode, Bytes) {
    relay.heard.lock().unwrap().push_str(std::str::from_utf8(&body).unwrap());
    let call: Value = serde_json::from_slice(&body).unwrap();
    let method = call["method"].as_str().unwrap();
    let fault = relay.faults.lock().unwrap().get(method).copied();
    match fault {
        Some(Fault::Unreachable) => return (StatusCode::SERVICE_UNAVAILABLE, Bytes::new()),
        Some(Fault::Silent) => return std::future::pending().await,
        Some(Fault::HeldBack(is_meant)) if is_meant(&call["params"]) => {
            relay.waiting.send_modify(|calls| *calls += 1);
            relay.waiting.subscribe().wait_for(|calls| *calls == 0).await.unwrap();
        }
        Some(Fault::Refused(is_meant)) if is_meant(&call["params"]) => {
            let error = json!({"code": -32005, "message": "query exceeds max block range"});
            let answer = json!({"jsonrpc": "2.0", "id": call["id"], "error": error});
            return (StatusCode::OK, answer.to_string().into());
        }
        _ => {}
    }
    let answer =
        relay.http.post(&relay.upstream).header("content-type", "application/json").body(body).send().await;
    let answer = answer.unwrap().bytes().await.unwrap();
    match fault {
        Some(Fault::Lie(lie)) => {
            let mut answer: Value = serde_json::from_slice(&answer).unwrap();
            let truth = answer["result"].take();
            answer["result"] = lie(&call["params"], truth);
            (StatusCode::OK, answer.to_string().into())
        }
        Some(Fault::AnswerLost | Fault::Unreachable | Fault::Silent) => {
            (StatusCode::SERVICE_UNAVAILABLE, Bytes::new())
        }
        Some(Fault::HeldBack(_) | Fault::Refused(_)) | None => (StatusCode::OK, answer),
    }
}
