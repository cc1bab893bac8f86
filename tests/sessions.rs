//! Sessions: a wallet signs in once, and its token is good wherever a key or a signature is.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use farebox::auth::{SessionError, Sessions, SigningKey};
use farebox::clock::Clock;
use farebox::config::{Config, ConfigError};
use farebox::id::Entropy;
use reqwest::Method;
use secrecy::SecretString;
use serde_json::{Value, json};

use crate::support::books::{Books, both, wallet};
use crate::support::gateway::{Answer, Gateway, Setup, ask, ask_stream, members};
use crate::support::postgres::fresh_database;
use crate::support::wallet::TestWallet;
use crate::support::{random_hex, unix_seconds};

const SECRET: &str = "thirty-two bytes of secret or more";

impl Gateway {
    /// Signs a wallet in, and returns its session's token.
    async fn session(&self, wallet: &TestWallet) -> String {
        let began =
            self.post("/v1/auth/session").json(&self.sign_in(wallet).body()).send().await.expect(201).json();
        began["session_token"].as_str().unwrap().to_owned()
    }

    async fn with_token(&self, method: Method, path: &str, token: &str) -> Answer {
        self.request(method, path).header("authorization", &format!("Bearer {token}")).send().await
    }

    async fn read_with(&self, token: &str) -> Answer {
        self.with_token(Method::GET, "/v1/requests", token).await
    }
}

#[tokio::test]
async fn a_session_is_good_wherever_a_key_or_a_signature_is() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    gateway.top_up(&wallet, "1").await;
    let signed = gateway.sign_in(&wallet).body();
    let before = unix_seconds();
    let began = gateway.post("/v1/auth/session").json(&signed).send().await.expect(201);
    assert_eq!(began.header("cache-control"), Some("no-store"));
    let body = began.json();
    assert_eq!(members(&body), ["expires_at", "session_token", "wallet"]);
    assert_eq!(body["wallet"], wallet.shown());
    let token = body["session_token"].as_str().unwrap();
    let claims: Value =
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap())
            .unwrap();
    let lasts = claims["exp"].as_i64().unwrap() - before;
    assert!((3600..3660).contains(&lasts), "{lasts}");
    // The message was for this one sign-in.
    gateway.post("/v1/auth/session").json(&signed).send().await.error(401, "siwe_nonce_used");

    let bearer = format!("Bearer {token}");
    let chat = gateway
        .post("/v1/chat/completions")
        .header("authorization", &bearer)
        .json(&ask("Hello"))
        .send()
        .await;
    assert_eq!(chat.expect(200).number("x-charged-usdc"), 11);
    let stream = gateway.post("/v1/chat/completions").header("authorization", &bearer);
    let stream = stream.json(&ask_stream("Hello")).send().await.expect(200);
    assert!(stream.text().ends_with("data: [DONE]\n\n"), "{stream:?}");

    let get = async |path: &str| gateway.with_token(Method::GET, path, token).await;
    let usage = get(&format!("/v1/usage/{}", wallet.address())).await.expect(200).json();
    assert_eq!(usage["balance_usdc"], 1_000_000 - 22);
    assert_eq!(usage["keys"][0]["api_key_id"], Value::Null);
    assert_eq!(usage["keys"][0]["request_count"], 2);
    let receipts = get("/v1/requests").await.expect(200).json();
    let id = receipts["data"][0]["id"].as_str().unwrap().to_owned();
    get(&format!("/v1/requests/{id}")).await.expect(200);
    let topups = get(&format!("/v1/topups/{}", wallet.address())).await.expect(200).json();
    assert_eq!(topups["topups"].as_array().unwrap().len(), 1);
    let another = TestWallet::random().address();
    get(&format!("/v1/usage/{another}")).await.error(403, "not_your_wallet");

    // Keys: with a body, and without one.
    let keys = gateway.post("/v1/auth/keys").header("authorization", &bearer);
    let key = keys.json(&json!({"label": "by session"})).send().await.expect(201).json();
    assert_eq!(key["label"], "by session");
    gateway.with_token(Method::POST, "/v1/auth/keys", token).await.expect(201);
    let listed = get("/v1/auth/keys").await.expect(200).json();
    assert_eq!(listed["data"].as_array().unwrap().len(), 2);
    let path = format!("/v1/auth/keys/{}", key["id"]);
    assert_eq!(
        gateway.with_token(Method::DELETE, &path, token).await.expect(200).json(),
        json!({"revoked": true})
    );
    gateway.read_with(key["key"].as_str().unwrap()).await.error(401, "invalid_api_key");
    gateway.audit();
}

#[tokio::test]
async fn an_api_key_makes_no_keys_and_no_sessions() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("0").await;
    for (method, path) in [
        (Method::GET, "/v1/auth/keys"),
        (Method::POST, "/v1/auth/keys"),
        (Method::DELETE, "/v1/auth/keys/1"),
        (Method::POST, "/v1/auth/session/revoke"),
    ] {
        gateway.with_token(method, path, &customer.key.secret).await.error(401, "missing_credentials");
    }
    gateway
        .with_token(Method::POST, "/v1/auth/session", &customer.key.secret)
        .await
        .error(400, "invalid_json");
    // A message that was read with begins no session, and one that is wrong none either.
    let signed = gateway.sign_in(&customer.wallet);
    gateway.get(&format!("/v1/requests{}", signed.query())).send().await.expect(200);
    let begin = async |body: Value| gateway.post("/v1/auth/session").json(&body).send().await;
    begin(signed.body()).await.error(401, "siwe_nonce_for_reading");
    let mut body = gateway.sign_in(&customer.wallet).body();
    body["signature"] = gateway.sign_in(&TestWallet::random()).signature.into();
    begin(body).await.error(401, "siwe_wrong_signature");
    begin(json!({"message": "hello", "signature": "0x00"})).await.error(400, "siwe_malformed");
    begin(json!({})).await.error(400, "missing_required_parameter");
}

#[tokio::test]
async fn a_session_ends_when_it_is_revoked() {
    let mut gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let (one, other) = (gateway.session(&customer.wallet).await, gateway.session(&customer.wallet).await);
    let strangers = gateway.session(&TestWallet::random()).await;
    let revoke = async |gateway: &Gateway, token: &str| {
        gateway.with_token(Method::POST, "/v1/auth/session/revoke", token).await
    };
    // Twice is as good as once: the first answer may have been lost.
    for _ in 0..2 {
        assert_eq!(revoke(&gateway, &one).await.expect(200).json(), json!({"revoked": true}));
    }
    let chat = gateway.post("/v1/chat/completions").header("authorization", &format!("Bearer {one}"));
    chat.json(&ask("Hello")).send().await.error(401, "session_revoked");
    gateway.read_with(&one).await.error(401, "session_revoked");
    gateway.with_token(Method::POST, "/v1/auth/keys", &one).await.error(401, "session_revoked");
    gateway.read_with(&other).await.expect(200);

    // A restart neither ends sessions nor brings them back.
    gateway.terminate();
    assert!(gateway.wait_for_exit().await.success());
    gateway.restart();
    gateway.read_with(&one).await.error(401, "session_revoked");
    gateway.read_with(&other).await.expect(200);

    // All of the wallet's, by its signature; its key and other wallets are not concerned.
    let signed = gateway.sign_in(&customer.wallet).body();
    let all = gateway.post("/v1/auth/session/revoke").json(&signed).send().await.expect(200);
    assert_eq!(all.json(), json!({"revoked": true}));
    gateway.post("/v1/auth/session/revoke").json(&signed).send().await.error(401, "siwe_nonce_used");
    gateway.read_with(&other).await.error(401, "session_revoked");
    gateway.read_with(&strangers).await.expect(200);
    gateway.read_with(&customer.key.secret).await.expect(200);
    let next = gateway.session(&customer.wallet).await;
    gateway.read_with(&next).await.expect(200);
}

/// Tokens made here, with the gateway's own secret: of all of them only the first is as it should be.
#[tokio::test]
async fn only_tokens_of_our_making_are_taken() {
    let env = vec![("FAREBOX_SESSION_SECRET".to_owned(), SECRET.to_owned())];
    let gateway = Gateway::start_with(Setup { env, ..Setup::usual() }).await;
    let wallet = TestWallet::random();
    let now = unix_seconds();
    let claims = json!({
        "iss": "farebox", "aud": format!("eip155:8453:{}", gateway.setup.pay_to), "sub": wallet.shown(),
        "iat": now, "exp": now + 60, "jti": random_hex::<16>(),
    });
    let with = |name: &str, value: Value| {
        let mut claims = claims.clone();
        claims[name] = value;
        claims
    };
    let without = |name: &str| {
        let mut claims = claims.clone();
        claims.as_object_mut().unwrap().remove(name);
        claims
    };
    let hs256 = r#"{"alg":"HS256","typ":"JWT"}"#;
    let token = |secret: &str, header: &str, claims: &Value| {
        let encode = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
        let signed = format!("{}.{}", encode(header), encode(&claims.to_string()));
        let signature = SigningKey::new(secret.as_bytes()).sign(signed.as_bytes());
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    };
    let ours = token(SECRET, hs256, &claims);
    gateway.read_with(&ours).await.expect(200);
    let unsigned = |header: &str| {
        let token = token(SECRET, header, &claims);
        token[..=token.rfind('.').unwrap()].to_owned()
    };
    let (_, signature) = ours.rsplit_once('.').unwrap();
    let of_another = token(SECRET, hs256, &with("sub", TestWallet::random().shown().into()));
    for (what, wrong) in [
        ("alg none", unsigned(r#"{"alg":"none","typ":"JWT"}"#)),
        ("alg none, signed", token(SECRET, r#"{"alg":"none","typ":"JWT"}"#, &claims)),
        ("another alg", token(SECRET, r#"{"alg":"HS512","typ":"JWT"}"#, &claims)),
        ("an alg with public keys", token(SECRET, r#"{"alg":"RS256","typ":"JWT"}"#, &claims)),
        ("no signature", unsigned(hs256)),
        ("another secret", token("another secret of thirty-two bytes", hs256, &claims)),
        ("another's claims", format!("{}.{signature}", of_another.rsplit_once('.').unwrap().0)),
        ("another issuer", token(SECRET, hs256, &with("iss", "somebody".into()))),
        ("another audience", token(SECRET, hs256, &with("aud", "eip155:8453:0x00".into()))),
        ("no wallet", token(SECRET, hs256, &with("sub", "nobody".into()))),
        ("no end", token(SECRET, hs256, &without("exp"))),
        ("no id", token(SECRET, hs256, &without("jti"))),
        ("no JSON", format!("{}.{}.", &ours[..10], "e30")),
        ("nothing", "..".to_owned()),
    ] {
        let answer = gateway.read_with(&wrong).await;
        println!("{what}: {}", answer.status);
        answer.error(401, "invalid_session");
        let keys = gateway.with_token(Method::POST, "/v1/auth/keys", &wrong).await;
        keys.error(401, "invalid_session");
    }
    let expired = token(SECRET, hs256, &with("exp", (now - 1).into()));
    gateway.read_with(&expired).await.error(401, "session_expired");
    // A token is a bearer's; beside another credential it is one too many.
    let key = gateway.key_for(&wallet).await.secret;
    let both = gateway.get("/v1/requests").header("authorization", &format!("Bearer {ours}"));
    both.header("x-api-key", &key).send().await.error(400, "conflicting_credentials");
}

#[tokio::test]
async fn a_gateway_may_insist_on_nonces_of_its_own() {
    let env = vec![("FAREBOX_REQUIRE_SERVER_NONCE".to_owned(), "true".to_owned())];
    let gateway = Gateway::start_with(Setup { env, ..Setup::usual() }).await;
    let wallet = TestWallet::random();
    let signed = async || {
        let given = gateway.get("/v1/auth/nonce").send().await.expect(200);
        assert_eq!(given.header("cache-control"), Some("no-store"));
        let given = given.json();
        assert_eq!(members(&given), ["expires_at", "nonce"]);
        let mut message = wallet.siwe(&gateway.host);
        message.nonce = given["nonce"].as_str().unwrap().to_owned();
        message.sign()
    };
    let begin = async |body: Value| gateway.post("/v1/auth/session").json(&body).send().await;
    let mut of_another = wallet.siwe(&gateway.host);
    of_another.nonce = Gateway::usual().await.get("/v1/auth/nonce").send().await.json()["nonce"]
        .as_str()
        .unwrap()
        .to_owned();
    for signed in [gateway.sign_in(&wallet), of_another.sign()] {
        begin(signed.body()).await.error(401, "siwe_nonce_unknown");
        gateway.post("/v1/auth/keys").json(&signed.body()).send().await.error(401, "siwe_nonce_unknown");
        let path = format!("/v1/requests{}", signed.query());
        gateway.get(&path).send().await.error(401, "siwe_nonce_unknown");
    }
    let message = signed().await;
    begin(message.body()).await.expect(201);
    begin(message.body()).await.error(401, "siwe_nonce_used");
    let reading = signed().await;
    for _ in 0..2 {
        gateway.get(&format!("/v1/requests{}", reading.query())).send().await.expect(200);
    }
    gateway.post("/v1/auth/keys").json(&signed().await.body()).send().await.expect(201);
}

#[tokio::test]
async fn nodes_of_one_database_take_each_others_sessions_and_revocations() {
    let setup = Setup { database_url: Some(fresh_database().await), ..Setup::usual() };
    let (one, other) = tokio::join!(Gateway::start_with(setup.clone()), Gateway::start_with(setup.clone()));
    let customer = one.customer("1").await;
    let (first, second) = (one.session(&customer.wallet).await, other.session(&customer.wallet).await);
    for node in [&one, &other] {
        for token in [&first, &second] {
            let chat = node.post("/v1/chat/completions").header("authorization", &format!("Bearer {token}"));
            chat.json(&ask("Hello")).send().await.expect(200);
        }
    }
    let ends_within_a_second = async |node: &Gateway, token: &str| {
        let deadline = Instant::now() + Duration::from_secs(1);
        while node.read_with(token).await.status != 401 {
            assert!(Instant::now() < deadline, "a revoked session is good elsewhere after a second");
        }
        node.read_with(token).await.error(401, "session_revoked");
    };
    one.with_token(Method::POST, "/v1/auth/session/revoke", &first).await.expect(200);
    ends_within_a_second(&other, &first).await;
    other.read_with(&second).await.expect(200);
    let signed = other.sign_in(&customer.wallet).body();
    other.post("/v1/auth/session/revoke").json(&signed).send().await.expect(200);
    ends_within_a_second(&one, &second).await;
    // A nonce of one node is known at the other.
    let mut message = customer.wallet.siwe(&other.host);
    message.nonce = one.get("/v1/auth/nonce").send().await.json()["nonce"].as_str().unwrap().to_owned();
    other.post("/v1/auth/session").json(&message.sign().body()).send().await.expect(201);
    // A node with a secret of its own is another house.
    let env = vec![("FAREBOX_SESSION_SECRET".to_owned(), SECRET.to_owned())];
    let apart = Gateway::start_with(Setup { env, ..setup }).await;
    let third = one.session(&customer.wallet).await;
    other.read_with(&third).await.expect(200);
    apart.read_with(&third).await.error(401, "invalid_session");
}

fn config(auth: &str, env: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let text = format!(
        "[payments]\nrpc_urls = [\"http://127.0.0.1:1\"]\n\
         pay_to = \"0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed\"\n[auth]\n{auth}\n\
         [[providers]]\nname = \"local\"\nbase_url = \"http://127.0.0.1:2/v1\"\n\
         [[models]]\nid = \"local/model\"\nprovider = \"local\"\ncontext_length = 1000\n\
         max_output_tokens = 100\nprice = {{ prompt = \"1\", completion = \"1\" }}\n"
    );
    let mut all: HashMap<_, _> =
        env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    all.insert("FAREBOX_RELAYER_KEY".to_owned(), TestWallet::random().private_key());
    Config::parse(&text, "farebox.toml", &all)
}

#[test]
fn a_wrong_setting_of_sessions_is_named() {
    let said = |auth: &str, env: &[(&str, &str)]| config(auth, env).unwrap_err().to_string();
    assert!(said("session_minutes = 0", &[]).contains("auth.session_minutes"));
    assert!(said("session_minutes = 1441", &[]).contains("auth.session_minutes"));
    let short = said("", &[("FAREBOX_SESSION_SECRET", &SECRET[..31])]);
    assert!(short.contains("FAREBOX_SESSION_SECRET") && !short.contains(&SECRET[..31]), "{short}");
    let flag = said("", &[("FAREBOX_REQUIRE_SERVER_NONCE", "perhaps")]);
    assert!(flag.contains("FAREBOX_REQUIRE_SERVER_NONCE") && flag.contains("true or false"), "{flag}");
    let usual = config("", &[]).unwrap().auth;
    assert_eq!((usual.session_minutes, usual.require_server_nonce), (60, false));
    assert!(usual.session_secret.is_none());
    let set =
        config("session_minutes = 5\nrequire_server_nonce = true", &[("FAREBOX_SESSION_SECRET", SECRET)]);
    let set = set.unwrap().auth;
    assert_eq!((set.session_minutes, set.require_server_nonce), (5, true));
    assert!(set.session_secret.is_some());
}

/// The sessions of one node of these books.
async fn sessions(books: &Books, clock: &Clock, auth: &str) -> Sessions {
    let config = config(auth, &[]).unwrap();
    let key = SigningKey::load(&books.db, &Entropy, clock.now(), None).await.unwrap();
    Sessions::new(books.db.clone(), clock.clone(), Entropy, key, &config)
}

#[tokio::test]
async fn a_session_lasts_as_long_as_it_says_and_what_is_known_of_it_not_much_longer() {
    both(async |books| {
        let clock = books.clock.clone();
        let (here, there) =
            (sessions(books, &clock, "session_minutes = 5").await, sessions(books, &clock, "").await);
        assert_eq!(books.number("SELECT COUNT(*) AS n FROM secrets").await, 1);
        let began = here.begin(wallet(1)).await.unwrap();
        assert_eq!(began.expires_at, clock.now().plus_seconds(300));
        clock.advance_seconds(299);
        for node in [&here, &there] {
            let principal = node.authenticate(&began.token).await.unwrap();
            assert_eq!((principal.wallet, principal.api_key_id), (wallet(1), None));
        }
        let revoked = here.begin(wallet(1)).await.unwrap();
        there.revoke(&revoked.token).await.unwrap();
        assert!(matches!(here.authenticate(&revoked.token).await, Err(SessionError::Revoked)));
        clock.advance_seconds(1);
        for node in [&here, &there] {
            assert!(matches!(node.authenticate(&began.token).await, Err(SessionError::Expired)));
        }
        assert!(matches!(here.revoke(&began.token).await, Err(SessionError::Expired)));

        // All at once: what began before is over, what begins at the same moment is not.
        let before = here.begin(wallet(1)).await.unwrap();
        let of_another = here.begin(wallet(2)).await.unwrap();
        for _ in 0..2 {
            there.revoke_all(wallet(1)).await.unwrap();
            assert!(matches!(here.authenticate(&before.token).await, Err(SessionError::Revoked)));
        }
        let after = here.begin(wallet(1)).await.unwrap();
        here.authenticate(&after.token).await.unwrap();
        here.authenticate(&of_another.token).await.unwrap();

        let known = async || {
            books.number("SELECT COUNT(*) AS n FROM revoked_sessions").await
                + books.number("SELECT COUNT(*) AS n FROM session_generations").await
        };
        here.forget_stale().await.unwrap();
        assert_eq!(known().await, 2);
        // The longest session there can be, a day, and what clocks may differ by.
        clock.advance_seconds(24 * 3600 + 300);
        here.forget_stale().await.unwrap();
        assert_eq!(known().await, 1);
        clock.advance_seconds(1);
        here.forget_stale().await.unwrap();
        assert_eq!(known().await, 0);
        // With nothing known of it any more, a session that began before is no better for it.
        assert!(matches!(here.authenticate(&before.token).await, Err(SessionError::Expired)));
        let fresh = here.begin(wallet(1)).await.unwrap();
        there.authenticate(&fresh.token).await.unwrap();
        let foreign = SecretString::from("sk-no.token.at all");
        assert!(matches!(here.authenticate(&foreign).await, Err(SessionError::Invalid)));
    })
    .await;
}

#[tokio::test]
async fn nodes_that_start_at_once_agree_on_a_secret() {
    both(async |books| {
        let now = books.clock.now();
        let loads = (0..8).map(|_| SigningKey::load(&books.db, &Entropy, now, None));
        let keys = futures_util::future::join_all(loads).await;
        let signed: Vec<_> = keys.into_iter().map(|key| key.unwrap().sign(b"message")).collect();
        assert!(signed.iter().all(|one| *one == signed[0]));
        let configured = SecretString::from(SECRET);
        let own = SigningKey::load(&books.db, &Entropy, now, Some(&configured)).await.unwrap();
        assert_ne!(own.sign(b"message"), signed[0]);
    })
    .await;
}
