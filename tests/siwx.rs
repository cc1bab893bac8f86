//! Sign-In-With-X: a wallet answers the challenge of a 402, and its balance pays.

use serde_json::{Value, json};

use crate::support::gateway::{Answer, Gateway, MODEL, Setup, ask};
use crate::support::in_seconds;
use crate::support::wallet::{TestWallet, header};

/// A gateway and a wallet with a balance and no key.
struct House {
    gateway: Gateway,
    wallet: TestWallet,
}

impl House {
    async fn open(usd: &str) -> Self {
        let gateway = Gateway::usual().await;
        let wallet = TestWallet::random();
        gateway.top_up(&wallet, usd).await;
        Self { gateway, wallet }
    }

    /// The challenge of a 402 for a chat.
    async fn challenge(&self) -> Value {
        let poor = self.gateway.customer("0").await;
        let refused = self.gateway.chat(&poor, &ask("Hello")).await;
        refused.error(402, "insufficient_balance");
        refused.decoded("payment-required")["extensions"]["sign-in-with-x"].clone()
    }

    /// What this wallet answers to a fresh challenge.
    async fn proof(&self) -> Value {
        self.wallet.siwx(&self.challenge().await["info"])
    }

    async fn chat(&self, proof: &Value) -> Answer {
        let call = self.gateway.post("/v1/chat/completions").json(&ask("Hello"));
        call.header("SIGN-IN-WITH-X", &header(proof)).send().await
    }
}

impl TestWallet {
    /// The specification's message, of the fields of a challenge, signed.
    fn siwx(&self, info: &Value) -> Value {
        let text = |name: &str| info[name].as_str().unwrap();
        let message = format!(
            "{} wants you to sign in with your Ethereum account:\n{}\n\n{}\n\nURI: {}\nVersion: 1\n\
             Chain ID: 8453\nNonce: {}\nIssued At: {}\nExpiration Time: {}\nResources:\n- {}",
            text("domain"),
            self.shown(),
            text("statement"),
            text("uri"),
            text("nonce"),
            text("issuedAt"),
            text("expirationTime"),
            info["resources"][0].as_str().unwrap(),
        );
        let mut proof = info.clone();
        proof["address"] = self.shown().into();
        proof["chainId"] = "eip155:8453".into();
        proof["type"] = "eip191".into();
        proof["signature"] = self.sign_text(&message).into();
        proof
    }
}

#[tokio::test]
async fn a_402_says_how_to_sign_in() {
    let house = House::open("1").await;
    let challenge = house.challenge().await;
    let url = house.gateway.url("/v1/chat/completions");
    let info = &challenge["info"];
    assert_eq!(info["domain"], house.gateway.host);
    assert_eq!((&info["uri"], &info["resources"]), (&json!(url), &json!([url])));
    assert_eq!(info["version"], "1");
    assert_eq!(challenge["supportedChains"], json!([{"chainId": "eip155:8453", "type": "eip191"}]));
    assert_eq!(challenge["schema"]["type"], "object");
    assert_ne!(house.challenge().await["info"]["nonce"], info["nonce"]);
    // To top up is to pay: no sign-in would do.
    let topup = house.gateway.post("/v1/topup").json(&json!({"amount": 5})).send().await.expect(402);
    assert_eq!(topup.decoded("payment-required")["extensions"].get("sign-in-with-x"), None);
}

#[tokio::test]
async fn a_signed_challenge_calls_a_model_once() {
    let house = House::open("1").await;
    let proof = house.proof().await;
    let answer = house.chat(&proof).await.expect(200);
    assert_eq!(answer.number("x-charged-usdc"), 11);
    assert_eq!(answer.number("x-balance-usdc"), 1_000_000 - 11);
    house.chat(&proof).await.error(401, "siwe_nonce_used");
    assert_eq!(house.gateway.balance(&house.wallet).await.balance, 1_000_000 - 11);
    // Ten at once are one.
    let proof = house.proof().await;
    let answers = futures_util::future::join_all((0..10).map(|_| house.chat(&proof))).await;
    let (paid, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 200);
    assert_eq!(paid.len(), 1);
    for answer in refused {
        answer.error(401, "siwe_nonce_used");
    }
    // It is used up also by a request that comes to nothing.
    let proof = house.proof().await;
    let call = house.gateway.post("/v1/chat/completions").header("sign-in-with-x", &header(&proof));
    call.json(&json!({"model": MODEL})).send().await.error(400, "missing_required_parameter");
    house.chat(&proof).await.error(401, "siwe_nonce_used");
    house.gateway.audit();
}

#[tokio::test]
async fn a_sign_in_header_decides_and_authorization_is_ignored() {
    let house = House::open("1").await;
    let gateway = &house.gateway;
    let poor = gateway.customer("0").await;
    for authorization in ["Bearer x402", "Bearer sk-wrong", "Basic x", &format!("Bearer {}", poor.key.secret)]
    {
        let call = gateway.post("/v1/chat/completions").json(&ask("Hello"));
        let call = call.header("authorization", authorization);
        call.header("sign-in-with-x", &header(&house.proof().await)).send().await.expect(200);
    }
    assert_eq!(gateway.balance(&house.wallet).await.balance, 1_000_000 - 44);
    // A refused one is not made good by a key.
    let mut wrong = house.proof().await;
    wrong["nonce"] = "00000000000000000000000000000000".into();
    let call = gateway.post("/v1/chat/completions").json(&ask("Hello")).key(&poor.key);
    call.header("sign-in-with-x", &header(&wrong)).send().await.error(401, "siwe_nonce_unknown");
    // By itself, what an SDK must be given in a key's place is no credential, and no wrong one either.
    let x402 =
        gateway.post("/v1/chat/completions").json(&ask("Hello")).header("authorization", "Bearer x402");
    x402.send().await.expect(402);
    let listed = gateway.get(&format!("/v1/requests{}", gateway.sign_in(&house.wallet).query()));
    listed.header("authorization", "Bearer x402").send().await.expect(200);
}

#[tokio::test]
async fn a_challenge_answered_to_read_is_good_for_reading() {
    let house = House::open("1").await;
    let gateway = &house.gateway;
    let proof = house.proof().await;
    let get = async |path: &str| gateway.get(path).header("sign-in-with-x", &header(&proof)).send().await;
    let wallet = house.wallet.address();
    for path in [
        format!("/v1/usage/{wallet}"),
        format!("/v1/topups/{wallet}"),
        "/v1/requests".into(),
        "/v1/auth/keys".into(),
    ] {
        get(&path).await.expect(200);
    }
    get(&format!("/v1/usage/{}", TestWallet::random().address())).await.error(403, "not_your_wallet");
    house.chat(&proof).await.error(401, "siwe_nonce_for_reading");
    // And one answered to change something makes a key.
    let make = gateway.post("/v1/auth/keys").header("sign-in-with-x", &header(&house.proof().await));
    let key = make.json(&json!({"label": "by header"})).send().await.expect(201).json();
    assert_eq!(key["label"], "by header");
    let revoke = gateway.delete(&format!("/v1/auth/keys/{}", key["id"]));
    revoke.header("sign-in-with-x", &header(&house.proof().await)).send().await.expect(200);
}

#[tokio::test]
async fn only_the_answer_to_a_challenge_of_ours_signs_in() {
    let house = House::open("1").await;
    let info = house.challenge().await["info"].clone();
    let signed = |name: &str, value: Value| {
        let mut info = info.clone();
        info[name] = value;
        house.wallet.siwx(&info)
    };
    let forged = |name: &str, value: Value| {
        let mut proof = house.wallet.siwx(&info);
        proof[name] = value;
        proof
    };
    let elsewhere = json!("http://evil.example/v1/chat/completions");
    for (proof, status, code) in [
        // Signed, but not what was asked.
        (signed("nonce", "iXr6gUokmzsk7f9tp".into()), 401, "siwe_nonce_unknown"),
        (signed("domain", "evil.example".into()), 401, "siwe_wrong_domain"),
        (signed("uri", elsewhere), 401, "siwe_wrong_uri"),
        (signed("issuedAt", in_seconds(-600).into()), 401, "siwe_stale"),
        (signed("issuedAt", in_seconds(600).into()), 401, "siwe_issued_in_future"),
        (signed("expirationTime", in_seconds(-1).into()), 401, "siwe_expired"),
        // Asked, but changed after it was signed.
        (forged("address", TestWallet::random().shown().into()), 401, "siwe_wrong_signature"),
        (forged("statement", "Give it all away.".into()), 401, "siwe_wrong_signature"),
        (forged("requestId", "one".into()), 401, "siwe_wrong_signature"),
        (forged("chainId", "eip155:1".into()), 401, "siwe_wrong_chain"),
        (forged("chainId", "solana:5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp".into()), 401, "siwx_unsupported_chain"),
        (forged("type", "ed25519".into()), 401, "siwx_unsupported_chain"),
        // Not readable.
        (forged("version", "2".into()), 400, "siwe_malformed"),
        (forged("issuedAt", "yesterday".into()), 400, "siwe_malformed"),
        (forged("domain", "a\nb".into()), 400, "siwe_malformed"),
        (forged("signature", "deadbeef".into()), 400, "siwe_signature_malformed"),
        (forged("signature", Value::Null), 400, "siwx_malformed"),
        (json!("hello"), 400, "siwx_malformed"),
    ] {
        println!("{code}: {proof}");
        house.chat(&proof).await.error(status, code);
    }
    let call = house.gateway.post("/v1/chat/completions").json(&ask("Hello"));
    call.header("sign-in-with-x", "{}").send().await.error(400, "siwx_malformed");
    // None of them has used the challenge up.
    house.chat(&house.wallet.siwx(&info)).await.expect(200);
}

/// Where browsers sign in elsewhere, the challenge still names the host that its client has called.
#[tokio::test]
async fn the_challenge_names_the_host_that_is_called() {
    let env = vec![("FAREBOX_SIWE_DOMAINS".to_owned(), "app.example.com".to_owned())];
    let gateway = Gateway::start_with(Setup { env, ..Setup::usual() }).await;
    let wallet = TestWallet::random();
    let signed = wallet.siwe("app.example.com").sign();
    let key = gateway.post("/v1/auth/keys").json(&signed.body()).send().await.expect(201).json();
    gateway.top_up(&wallet, "1").await;
    let mut dear = ask("Hello");
    dear["model"] = crate::support::gateway::DEAR.into();
    dear["max_tokens"] = 16_000.into();
    let call = gateway.post("/v1/chat/completions").json(&dear);
    let refused = call.header("x-api-key", key["key"].as_str().unwrap()).send().await;
    refused.error(402, "insufficient_balance");
    let info = refused.decoded("payment-required")["extensions"]["sign-in-with-x"]["info"].clone();
    assert_eq!(info["domain"], gateway.host);
    let call = gateway.post("/v1/chat/completions").json(&ask("Hello"));
    call.header("sign-in-with-x", &header(&wallet.siwx(&info))).send().await.expect(200);
    // A message in a body keeps to the configured domains.
    let body = gateway.sign_in(&wallet).body();
    gateway.post("/v1/auth/session").json(&body).send().await.error(401, "siwe_wrong_domain");
}
