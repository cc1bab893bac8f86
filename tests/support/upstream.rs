//! An upstream that does, byte for byte, what a test says: for faults that no real model server can
//! be asked for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// What is done with one request, in order. The connection is closed at the end.
#[derive(Clone, Default)]
pub struct Script(Vec<Step>);

#[derive(Clone)]
enum Step {
    Send(Bytes),
    /// Waits until the test opens the gate once more.
    Gate,
    /// Says nothing for this long.
    Silence(Duration),
}

impl Script {
    /// Hangs up without a word.
    pub fn hang_up() -> Self {
        Self::default()
    }

    /// A whole answer.
    pub fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<String>) -> Self {
        let body = body.into();
        let mut head =
            format!("HTTP/1.1 {status} Status\r\ncontent-length: {}\r\nconnection: close\r\n", body.len());
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        Self(vec![Step::Send((head + "\r\n" + &body).into())])
    }

    pub fn json(status: u16, body: &Value) -> Self {
        Self::answer(status, &[("content-type", "application/json")], body.to_string())
    }

    /// The beginning of a stream of events.
    pub fn stream() -> Self {
        Self::stream_of_type("text/event-stream")
    }

    pub fn stream_of_type(content_type: &str) -> Self {
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        );
        Self(vec![Step::Send(head.into())])
    }

    /// Bytes of the stream, as they are.
    pub fn raw(mut self, bytes: &str) -> Self {
        self.0.push(Step::Send(format!("{:x}\r\n{bytes}\r\n", bytes.len()).into()));
        self
    }

    /// An event with this data.
    pub fn event(self, data: &Value) -> Self {
        self.raw(&format!("data: {data}\n\n"))
    }

    /// All of another script, behind a gate.
    pub fn held_back(script: Self) -> Self {
        Self([vec![Step::Gate], script.0].concat())
    }

    pub fn gate(mut self) -> Self {
        self.0.push(Step::Gate);
        self
    }

    pub fn silence(mut self, duration: Duration) -> Self {
        self.0.push(Step::Silence(duration));
        self
    }

    /// The stream's proper end: `[DONE]`, and the end of the body.
    pub fn done(self) -> Self {
        self.raw("data: [DONE]\n\n").end()
    }

    /// The end of the body. A script without one is cut off in the middle of it.
    pub fn end(mut self) -> Self {
        self.0.push(Step::Send(Bytes::from_static(b"0\r\n\r\n")));
        self
    }
}

/// A request as it came in.
#[derive(Clone, Debug)]
pub struct Received {
    /// The request line and the headers, in lower case.
    pub head: String,
    pub body: Bytes,
}

impl Received {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// The server. It plays its latest script to every request.
pub struct ScriptedUpstream {
    /// The OpenAI base URL.
    pub base_url: String,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

struct Shared {
    script: Mutex<Script>,
    received: Mutex<Vec<Received>>,
    gate: Semaphore,
    /// Bytes that the gateway has taken, or that are on their way to it.
    sent_bytes: AtomicUsize,
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((connection, _)) = listener.accept().await {
        let shared = shared.clone();
        tokio::spawn(async move { shared.serve(connection).await });
    }
}

impl ScriptedUpstream {
    /// Answers as the contract's example: 20 prompt and 9 completion tokens.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}/v1", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            script: Mutex::new(Script::json(200, &completion(Some(usage(20, 9))))),
            received: Mutex::default(),
            gate: Semaphore::new(0),
            sent_bytes: AtomicUsize::new(0),
        });
        let server = tokio::spawn(listen(listener, shared.clone()));
        Self { base_url, shared, server }
    }

    /// Takes no connections any more.
    pub async fn go_away(&mut self) {
        self.server.abort();
        let _ = (&mut self.server).await;
    }

    /// Takes them again, where it did before.
    pub async fn come_back(&mut self) {
        let address = self.base_url.trim_start_matches("http://").trim_end_matches("/v1");
        self.server = tokio::spawn(listen(TcpListener::bind(address).await.unwrap(), self.shared.clone()));
    }

    /// What it does from now on.
    pub fn play(&self, script: Script) {
        *self.shared.script.lock().unwrap() = script;
    }

    /// Lets one request pass a gate.
    pub fn open_gate(&self) {
        self.shared.gate.add_permits(1);
    }

    pub fn sent_bytes(&self) -> usize {
        self.shared.sent_bytes.load(Ordering::SeqCst)
    }

    pub fn received(&self) -> Vec<Received> {
        self.shared.received.lock().unwrap().clone()
    }

    pub fn last_received(&self) -> Received {
        self.received().pop().expect("a request")
    }
}

impl Drop for ScriptedUpstream {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Shared {
    /// An error is a gateway that hung up, which is all the same here.
    async fn serve(&self, mut connection: TcpStream) -> Option<()> {
        connection.set_nodelay(true).ok()?;
        let received = read_request(&mut connection).await?;
        self.received.lock().unwrap().push(received);
        let script = self.script.lock().unwrap().clone();
        for step in script.0 {
            match step {
                Step::Send(bytes) => {
                    connection.write_all(&bytes).await.ok()?;
                    self.sent_bytes.fetch_add(bytes.len(), Ordering::SeqCst);
                }
                Step::Gate => self.gate.acquire().await.ok()?.forget(),
                Step::Silence(duration) => tokio::time::sleep(duration).await,
            }
        }
        connection.shutdown().await.ok()
    }
}

async fn read_request(connection: &mut TcpStream) -> Option<Received> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if connection.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |text| {
        text.trim().parse().unwrap_or_else(|_| panic!("a content-length that is none: {text}"))
    });
    let mut body = bytes.split_off(head_end);
    while body.len() < length {
        if connection.read_buf(&mut body).await.ok()? == 0 {
            return None;
        }
    }
    Some(Received { head, body: body.into() })
}

pub fn usage(prompt: u64, completion: u64) -> Value {
    json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
}

/// A whole chat completion.
pub fn completion(usage: Option<Value>) -> Value {
    let mut body = json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1_700_000_000, "model": "upstream-name",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "A wallet is enough."}, "finish_reason": "stop"}],
    });
    if let Some(usage) = usage {
        body["usage"] = usage;
    }
    body
}

/// A chunk of a streamed completion.
pub fn chunk(content: &str) -> Value {
    json!({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "upstream-name",
        "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": null}],
    })
}

/// The last chunk with a choice.
pub fn last_chunk() -> Value {
    let mut last = chunk("");
    last["choices"] = json!([{"index": 0, "delta": {}, "finish_reason": "stop"}]);
    last
}

/// The chunk that only holds the usage.
pub fn usage_chunk(usage: Value) -> Value {
    let mut last = chunk("");
    last["choices"] = json!([]);
    last["usage"] = usage;
    last
}

/// What an upstream says of an error.
pub fn error(message: &str, code: &str) -> Value {
    json!({"error": {"message": message, "type": "upstream_error", "code": code, "param": null}})
}
