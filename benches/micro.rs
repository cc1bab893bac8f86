//! What single steps of a request take, on one core and without a network.
//!
//! `make bench-micro`.

#![allow(
    clippy::unwrap_used,
    clippy::float_arithmetic,
    clippy::disallowed_methods,
    dead_code,
    reason = "where something is missing there is nothing to measure; the tests use the rest of what they share"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::fmt::Write as _;
use std::sync::Arc;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use farebox::attest::Attestor;
use farebox::auth::{Nonces, Purpose, SigningKey, Siwe};
use farebox::chain::{Chain, recover};
use farebox::clock::Clock;
use farebox::config::Config;
use farebox::db::{Access, Db};
use farebox::formats::chat::{ChatRequest, Forward, StreamTap};
use farebox::formats::sse::Splitter;
use farebox::id::{Entropy, Wallet};
use farebox::money::MicroUsdc;
use farebox::payments::wire::Payload;
use farebox::pricing;
use farebox::reserves::tree::{Leaf, fold};
use support::TempDir;
use support::gateway::{MODEL, Setup, UPSTREAM_KEY};
use support::wallet::{TestWallet, header};

const HOST: &str = "127.0.0.1:8080";
/// Chunks with text in a stream.
const CHUNKS: usize = 100;
/// A segment of a TCP connection over Ethernet: what a stream comes in.
const SEGMENT_BYTES: usize = 1448;

fn main() {
    farebox::install_crypto();
    divan::main();
}

/// The configuration that the tests have, without a chain.
fn config(directory: &TempDir) -> Config {
    let setup = Setup::without_chain("http://127.0.0.1:1", "http://127.0.0.1:1/v1");
    let file = directory.path().join("farebox.toml");
    std::fs::write(&file, setup.toml(HOST, directory.path())).unwrap();
    let secrets =
        [("FAREBOX_RELAYER_KEY", setup.relayer.private_key()), ("UPSTREAM_KEY", UPSTREAM_KEY.to_owned())];
    let secrets = secrets.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Config::load(&file, &secrets).unwrap()
}

/// A chat request of so many messages of 200 bytes, as a client sends it.
fn chat_body(messages: usize) -> Vec<u8> {
    let text = "All work and no play makes Jack a dull boy. ".repeat(5)[..200].to_owned();
    let messages: Vec<_> =
        (0..messages).map(|_| serde_json::json!({"role": "user", "content": text})).collect();
    serde_json::json!({"model": MODEL, "messages": messages, "max_tokens": 512, "temperature": 0.7})
        .to_string()
        .into_bytes()
}

/// From a body's bytes to what is to be held.
#[divan::bench(args = [1, 20, 200])]
fn quote(bencher: Bencher<'_, '_>, messages: usize) {
    let config = config(&TempDir::new());
    let offer = Arc::clone(config.catalog.get(MODEL).unwrap());
    let body = chat_body(messages);
    bencher.counter(BytesCount::new(body.len())).bench(|| {
        let request = ChatRequest::parse(black_box(&body)).unwrap();
        let bounds = request.bounds(&offer).unwrap();
        let terms = offer.terms(config.markup);
        pricing::quote(&terms, bounds.most()).unwrap()
    });
}

/// A stream as OpenAI's API sends it: chunks, the usage, the end.
fn canned_stream() -> Vec<u8> {
    let mut stream = String::new();
    let chunk = |more: &str| {
        format!(
            "data: {{\"id\":\"chatcmpl-9f8Xq2mYzJ1\",\"object\":\"chat.completion.chunk\",\"created\":1775563200,\
             \"model\":\"gpt-5-mini-2025-08-07\",\"service_tier\":\"default\",\"system_fingerprint\":null,{more}}}\n\n"
        )
    };
    for number in 0..CHUNKS {
        let more = format!(
            "\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word{number}\"}},\"logprobs\":null,\
             \"finish_reason\":null}}],\"usage\":null"
        );
        write!(stream, "{}", chunk(&more)).unwrap();
    }
    stream += &chunk("\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":null");
    stream += &chunk(
        "\"choices\":[],\"usage\":{\"prompt_tokens\":20,\"completion_tokens\":100,\"total_tokens\":120,\
         \"prompt_tokens_details\":{\"cached_tokens\":0,\"audio_tokens\":0}}",
    );
    stream += "data: [DONE]\n\n";
    stream.into_bytes()
}

/// A whole stream: split into events, each read for its usage and text, and written anew for the client.
#[divan::bench]
fn sse_tap(bencher: Bencher<'_, '_>) {
    let stream = canned_stream();
    let bencher = bencher.counter(BytesCount::new(stream.len())).counter(ItemsCount::new(CHUNKS + 3));
    bencher.bench(|| {
        let (mut splitter, mut tap) = (Splitter::default(), StreamTap::new(MODEL, false, 1));
        let (mut sent, mut done) = (0, false);
        for segment in stream.chunks(SEGMENT_BYTES) {
            splitter.push(black_box(segment));
            while let Some(event) = splitter.next_event().unwrap() {
                match tap.event(&event) {
                    Forward::Send(bytes) => sent += bytes.len(),
                    Forward::Done => done = true,
                    Forward::Skip => {}
                    Forward::Failed | Forward::Nonsense => unreachable!("the stream is a whole one"),
                }
            }
        }
        assert!(done && tap.usage().is_some());
        sent
    });
}

/// Who signed a hash: what both of the next two contain.
#[divan::bench]
fn recover_a_signer(bencher: Bencher<'_, '_>) {
    let wallet = TestWallet::random();
    let hash = Entropy.bytes::<32>().into();
    let signature = wallet.sign_hash(hash);
    bencher.bench(|| recover(black_box(hash), &signature).unwrap());
}

/// A sign-in whose nonce is known, as one that reads: its text, names, times and signature, and a look
/// into SQLite.
#[divan::bench]
fn siwe(bencher: Bencher<'_, '_>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let directory = TempDir::new();
    let config = config(&directory);
    let verifier = runtime.block_on(async {
        let db = Db::open(&config.database_url, Access::Serve).await.unwrap();
        let signing = SigningKey::load(&db, &Entropy, Clock::System.now(), None).await.unwrap();
        let nonces = Nonces::new(&signing, Clock::System, Entropy);
        let chain = Arc::new(Chain::new(&config.payments, Clock::System).unwrap());
        Siwe::new(db, Clock::System, &config.auth, chain, nonces)
    });
    let wallet = TestWallet::random();
    let signed = wallet.siwe(HOST).sign();
    bencher.bench_local(|| {
        let verified = verifier.verify(black_box(&signed.message), &signed.signature, Purpose::Read);
        assert_eq!(runtime.block_on(verified).unwrap(), Wallet(wallet.address()));
    });
}

/// What of a payment can be checked without the chain: the header, the terms, the signed hash (EIP-712),
/// and who signed it.
#[divan::bench]
fn x402(bencher: Bencher<'_, '_>) {
    let config = config(&TempDir::new());
    let chain = Chain::new(&config.payments, Clock::System).unwrap();
    let wallet = TestWallet::random();
    let payment = wallet.authorization(config.payments.pay_to.0, 5_000_000).sign().v2();
    let sent = header(&payment);
    bencher.bench(|| {
        let payload = Payload::parse(black_box(sent.as_bytes())).unwrap();
        payload.check_offered(&config.payments).unwrap();
        let hash = payload.authorization.signing_hash(chain.domain());
        assert_eq!(recover(hash, &payload.signature), Some(payload.authorization.from.0));
    });
}

/// A payment's receipt: read, hashed as typed data (EIP-712), signed.
#[divan::bench]
fn receipt(bencher: Bencher<'_, '_>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let directory = TempDir::new();
    let config = config(&directory);
    let attestor = runtime.block_on(async {
        let db = Db::open(&config.database_url, Access::Serve).await.unwrap();
        Attestor::load(&db, &Entropy, Clock::System.now(), None, 8453).await.unwrap()
    });
    let address = Wallet(TestWallet::random().address());
    let contents = format!(
        r#"{{"id":1,"object":"topup","wallet":"{address}","amount_usdc":5000000,"status":"finalized","tx_hash":"0x{0}","network":"eip155:8453","asset":"{address}","pay_to":"{address}","created_at":"2026-04-07T12:00:00.000Z","updated_at":"2026-04-07T12:00:00.000Z"}}"#,
        "ab".repeat(32)
    );
    bencher.bench(|| attestor.sign(black_box(&contents)).unwrap());
}

/// A page of a published tree: 256 leaves, and what they come to.
#[divan::bench]
fn reserves_page(bencher: Bencher<'_, '_>) {
    let leaf = |number: u8| Leaf {
        wallet: Wallet([number; 20].into()),
        balance: MicroUsdc::new(i64::from(number)),
        salt: [number; 16],
    };
    let leaves: Vec<_> = (0..=u8::MAX).map(leaf).collect();
    bencher.counter(ItemsCount::new(leaves.len())).bench(|| {
        let nodes: Vec<_> = black_box(&leaves).iter().map(|leaf| leaf.node().unwrap()).collect();
        fold(&nodes).unwrap()
    });
}
