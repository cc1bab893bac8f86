//! The plainest gateway there is: reads a request, forwards it over a pooled client, passes the answer back
//! as it comes. No key, no price, no books, no log. `make bench` measures Farebox against it.
//!
//!   passthrough LISTEN=UPSTREAM …      127.0.0.1:8081=http://127.0.0.1:9001
#![allow(clippy::disallowed_methods, reason = "a program of its own, which nothing shuts down with grace")]

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::serve::ListenerExt as _;
use tokio::net::TcpListener;

const PATH: &str = "/v1/chat/completions";
/// As Farebox keeps.
const IDLE_CONNECTIONS: usize = 256;

#[derive(Clone)]
struct Upstream {
    client: reqwest::Client,
    url: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .tcp_nodelay(true)
        .redirect(reqwest::redirect::Policy::none())
        .build()?;
    let mut servers = Vec::new();
    for pair in std::env::args().skip(1) {
        let (listen, upstream) = pair.split_once('=').ok_or("say LISTEN=UPSTREAM")?;
        let upstream = Upstream { client: client.clone(), url: format!("{upstream}{PATH}") };
        let router = Router::new().route(PATH, post(forward)).with_state(upstream);
        let listener = TcpListener::bind(listen).await?.tap_io(|stream| drop(stream.set_nodelay(true)));
        servers.push(tokio::spawn(async { axum::serve(listener, router).await }));
    }
    println!("ready");
    for server in servers {
        server.await??;
    }
    Ok(())
}

async fn forward(State(upstream): State<Upstream>, mut headers: HeaderMap, body: Bytes) -> Response {
    let mut request = upstream.client.post(&upstream.url).body(body);
    for name in [AUTHORIZATION, CONTENT_TYPE] {
        if let Some(value) = headers.remove(&name) {
            request = request.header(name, value);
        }
    }
    let Ok(answer) = request.send().await else { return StatusCode::BAD_GATEWAY.into_response() };
    let status = answer.status();
    let content_type = answer.headers().get(CONTENT_TYPE).cloned();
    let mut response = Response::new(Body::from_stream(answer.bytes_stream()));
    *response.status_mut() = status;
    if let Some(content_type) = content_type {
        response.headers_mut().insert(CONTENT_TYPE, content_type);
    }
    response
}
