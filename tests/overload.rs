//! More than the books can take at once, as a client sees it.

use farebox::app::App;
use farebox::clock::Clock;
use farebox::config::Config;
use farebox::db::{Arg, Db, DbTx};
use farebox::http;
use farebox::id::{Entropy, Wallet};
use farebox::ledger::{Hold, LedgerError};
use farebox::money::MicroUsdc;
use futures_util::FutureExt as _;
use futures_util::future::join_all;
use reqwest::Method;
use tokio::net::TcpListener;

use crate::support::books::{assert_no_drift, credit, terms};
use crate::support::gateway::{Answer, ApiKey, Call, Setup, UPSTREAM_KEY, ask, ask_stream};
use crate::support::postgres::fresh_database;
use crate::support::upstream::{Script, ScriptedUpstream, completion, usage};
use crate::support::wallet::TestWallet;
use crate::support::{TempDir, http_client, in_time};

/// Of one wallet: see `ledger::writer`.
const WAITING_HOLDS_OF_A_WALLET: usize = 1024;

#[tokio::test]
async fn a_hold_too_many_is_refused_over_http_and_costs_nothing_on_sqlite() {
    overload(None).await;
}

#[tokio::test]
async fn a_hold_too_many_is_refused_over_http_and_costs_nothing_on_postgres() {
    overload(Some(fresh_database().await)).await;
}

/// Keeps a wallet's holds from being made: on SQLite everybody's.
async fn take(db: &Db, wallet: Wallet) -> DbTx {
    let mut tx = db.begin().await.unwrap();
    let sql = "UPDATE wallets SET locked_micro = locked_micro WHERE address = $1";
    tx.execute(sql, vec![Arg::from(wallet)]).await.unwrap();
    tx
}

/// The gateway runs in this process: its books can then be blocked, and its queue filled without a
/// thousand connections.
async fn overload(database_url: Option<String>) {
    let upstream = ScriptedUpstream::start().await;
    upstream.play(Script::json(200, &completion(Some(usage(20, 9)))));
    let directory = TempDir::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let setup = Setup { database_url, ..Setup::without_chain("http://127.0.0.1:1", &upstream.base_url) };
    let file = directory.path().join("farebox.toml");
    std::fs::write(&file, setup.toml(&host, directory.path())).unwrap();
    let secrets =
        [("FAREBOX_RELAYER_KEY", setup.relayer.private_key()), ("UPSTREAM_KEY", UPSTREAM_KEY.into())];
    let secrets = secrets.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let app = App::start(Config::load(&file, &secrets).unwrap(), Clock::System).await.unwrap();
    app.tasks.spawn_service(http::serve(listener, http::router(app.clone()), app.tasks.clone()));
    let client = http_client();
    let call = |method: Method, path: &str| Call(client.request(method, format!("http://{host}{path}")));

    let wallet = TestWallet::random();
    let owner = Wallet(wallet.address());
    let mut tx = app.db.begin().await.unwrap();
    let payment = tx.next_id("payments").await.unwrap();
    credit(&app.ledger, &mut tx, owner, MicroUsdc::new(1_000_000), payment).await.unwrap();
    tx.commit().await.unwrap();
    let made = call(Method::POST, "/v1/auth/keys").json(&wallet.siwe(&host).sign().body()).send().await;
    let made = made.expect(201).json();
    let key = ApiKey { id: made["id"].as_i64().unwrap(), secret: made["key"].as_str().unwrap().to_owned() };
    let chat = async |body: &serde_json::Value| -> Answer {
        call(Method::POST, "/v1/chat/completions").key(&key).json(body).send().await
    };
    chat(&ask("Hello")).await.expect(200);

    let taken = take(&app.db, owner).await;
    let mut waiting = Vec::new();
    loop {
        let now = Clock::System.now();
        let id = Entropy.request_id(now.millis());
        let amount = MicroUsdc::new(1);
        let hold = Hold { id, wallet: owner, api_key_id: None, amount, terms: terms(), created_at: now };
        let ledger = app.ledger.clone();
        let mut held = async move { ledger.hold(&hold).await }.boxed();
        match (&mut held).now_or_never() {
            None => waiting.push(held),
            Some(Err(LedgerError::Overloaded)) => break,
            Some(other) => panic!("it was to wait or to be refused: {other:?}"),
        }
        // One may be under way when the others wait.
        assert!(waiting.len() <= WAITING_HOLDS_OF_A_WALLET + 1, "there is no end of it");
        tokio::task::yield_now().await;
    }
    let asked = upstream.received().len();
    for body in [ask("Hello"), ask_stream("Hello")] {
        let answer = chat(&body).await;
        let error = answer.error(503, "overloaded");
        assert_eq!(answer.number("retry-after"), 1);
        assert!(answer.header("x-request-id").is_some() && answer.header("x-charged-usdc").is_none());
        assert!(error["message"].as_str().unwrap().contains("nothing was charged"), "{error}");
    }
    assert_eq!(upstream.received().len(), asked, "what is not held for has gone out");

    drop(taken);
    let held = i64::try_from(waiting.len()).unwrap();
    for held in in_time("the holds that wait", join_all(waiting)).await {
        held.unwrap();
    }
    // It recovers, and of those that were refused there is no trace.
    let answer = chat(&ask("Hello")).await.expect(200);
    assert_eq!(answer.number("x-charged-usdc"), 11);
    let balance = app.ledger.balance(owner).await.unwrap();
    assert_eq!((balance.balance, balance.locked), (MicroUsdc::new(1_000_000 - 22), MicroUsdc::new(held)));
    assert_eq!(app.ledger.receipts(owner, None, 100).await.unwrap().len(), 2);
    assert_eq!(app.ledger.open_holds().await.unwrap().0, held);
    assert_no_drift(&app.db).await;
    app.shut_down(std::time::Duration::from_secs(5)).await;
}
