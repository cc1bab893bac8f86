//! Keys that can be handed to somebody else: what they may spend, call and how long, and how they are
//! changed and taken back.

use farebox::auth::{KeyError, KeyLimits, Keys, LimitChanges};
use farebox::id::Entropy;
use serde_json::{Value, json};

use crate::support::books::{NOW, both, wallet};
use crate::support::gateway::{Answer, ApiKey, Customer, DEAR, Gateway, MODEL, SMALL, Setup, ask, micro};
use crate::support::in_seconds;
use crate::support::postgres::fresh_database;
use crate::support::upstream::{Script, ScriptedUpstream, completion, usage};
use crate::support::wallet::TestWallet;

/// A signed body with more members.
fn signed(gateway: &Gateway, wallet: &TestWallet, more: &Value) -> Value {
    let mut body = gateway.sign_in(wallet).body();
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

async fn create(gateway: &Gateway, wallet: &TestWallet, limits: &Value) -> Answer {
    gateway.post("/v1/auth/keys").json(&signed(gateway, wallet, limits)).send().await
}

async fn limited(gateway: &Gateway, wallet: &TestWallet, limits: &Value) -> Customer {
    let made = create(gateway, wallet, limits).await.expect(201).json();
    let key = ApiKey { id: made["id"].as_i64().unwrap(), secret: made["key"].as_str().unwrap().to_owned() };
    Customer { wallet: wallet.clone(), key }
}

async fn change(gateway: &Gateway, customer: &Customer, changes: &Value) -> Answer {
    let path = format!("/v1/auth/keys/{}", customer.key.id);
    let call = gateway.request(reqwest::Method::PATCH, &path);
    call.json(&signed(gateway, &customer.wallet, changes)).send().await
}

async fn listed(gateway: &Gateway, customer: &Customer) -> Value {
    let path = format!("/v1/auth/keys{}", gateway.sign_in(&customer.wallet).query());
    let list = gateway.get(&path).send().await.expect(200).json();
    let rows = list["data"].as_array().unwrap();
    rows.iter().find(|row| row["id"] == customer.key.id).unwrap().clone()
}

/// On a dear model, so that what is held is much, and the same each time.
fn dear(max_tokens: u64) -> Value {
    let mut body = ask("Hello");
    body["model"] = DEAR.into();
    body["max_tokens"] = max_tokens.into();
    body
}

#[tokio::test]
async fn a_key_is_made_with_limits_and_shows_them() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let limits = json!({
        "label": "agent", "expires_at": "2100-01-02T03:04:05+01:00", "spend_cap_usdc": 5_000_000,
        "spend_cap_per_day_usdc": 1_000_000, "allowed_models": [SMALL, MODEL, SMALL],
        "requests_per_minute": 30,
    });
    let made = create(&gateway, &wallet, &limits).await.expect(201).json();
    assert_eq!(made["expires_at"], "2100-01-02T02:04:05.000Z");
    assert_eq!(made["spend_cap_usdc"], 5_000_000);
    assert_eq!(made["allowed_models"], json!([MODEL, SMALL]));
    let key = ApiKey { id: made["id"].as_i64().unwrap(), secret: String::new() };
    let customer = Customer { wallet, key };
    let row = listed(&gateway, &customer).await;
    for (name, value) in [
        ("label", json!("agent")),
        ("expires_at", json!("2100-01-02T02:04:05.000Z")),
        ("spend_cap_usdc", json!(5_000_000)),
        ("spend_cap_per_day_usdc", json!(1_000_000)),
        ("allowed_models", json!([MODEL, SMALL])),
        ("requests_per_minute", json!(30)),
        ("spent_usdc", json!(0)),
        ("spent_today_usdc", json!(0)),
        ("held_usdc", json!(0)),
    ] {
        assert_eq!(row[name], value, "{name} of {row}");
    }
    // A key without limits says so in the list.
    let plain = limited(&gateway, &customer.wallet, &json!({"spend_cap_usdc": null})).await;
    let row = listed(&gateway, &plain).await;
    for name in
        ["expires_at", "spend_cap_usdc", "spend_cap_per_day_usdc", "allowed_models", "requests_per_minute"]
    {
        assert_eq!(row.get(name), Some(&Value::Null), "{name} of {row}");
    }
}

#[tokio::test]
async fn limits_that_cannot_be_read_are_named_and_change_nothing() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("0").await;
    let path = format!("/v1/auth/keys/{}", customer.key.id);
    for (limit, code, param) in [
        (json!({"expires_at": "tomorrow"}), "invalid_value", "expires_at"),
        (json!({"expires_at": in_seconds(-1)}), "invalid_value", "expires_at"),
        (json!({"expires_at": 4_102_444_800u64}), "invalid_value", "expires_at"),
        (json!({"spend_cap_usdc": -1}), "invalid_value", "spend_cap_usdc"),
        (json!({"spend_cap_usdc": 1.5}), "invalid_value", "spend_cap_usdc"),
        (json!({"spend_cap_usdc": "5"}), "invalid_value", "spend_cap_usdc"),
        (json!({"spend_cap_usdc": u64::MAX}), "invalid_value", "spend_cap_usdc"),
        (json!({"spend_cap_per_day_usdc": true}), "invalid_value", "spend_cap_per_day_usdc"),
        (json!({"allowed_models": []}), "invalid_value", "allowed_models"),
        (json!({"allowed_models": MODEL}), "invalid_value", "allowed_models"),
        (json!({"allowed_models": [MODEL, 1]}), "invalid_value", "allowed_models"),
        (json!({"allowed_models": [MODEL, "openai/none"]}), "invalid_value", "allowed_models"),
        (json!({"requests_per_minute": 0}), "invalid_value", "requests_per_minute"),
        (json!({"requests_per_minute": -5}), "invalid_value", "requests_per_minute"),
        (json!({"requests_per_minute": 1_000_001}), "invalid_value", "requests_per_minute"),
        // A cap that is misspelt would be none.
        (json!({"spend_cap": 5}), "unsupported_parameter", "spend_cap"),
    ] {
        let body = signed(&gateway, &customer.wallet, &limit);
        let refused = gateway.post("/v1/auth/keys").json(&body).send().await;
        assert_eq!(refused.error(400, code)["param"], param, "{limit}");
        let body = signed(&gateway, &customer.wallet, &limit);
        let refused = gateway.request(reqwest::Method::PATCH, &path).json(&body).send().await;
        assert_eq!(refused.error(400, code)["param"], param, "{limit}");
    }
    let unchanged = signed(&gateway, &customer.wallet, &json!({}));
    let key = gateway.request(reqwest::Method::PATCH, &path).json(&unchanged).send().await.expect(200).json();
    for limit in ["expires_at", "spend_cap_usdc", "spend_cap_per_day_usdc", "allowed_models"] {
        assert!(key[limit].is_null(), "{key}");
    }
}

#[tokio::test]
async fn sixty_four_calls_at_once_never_overrun_a_cap() {
    sixty_four(Setup::usual()).await;
}

#[tokio::test]
async fn sixty_four_calls_at_once_never_overrun_a_cap_on_postgres() {
    sixty_four(Setup { database_url: Some(fresh_database().await), ..Setup::usual() }).await;
}

async fn sixty_four(setup: Setup) {
    let upstream = ScriptedUpstream::start().await;
    let setup = Setup { upstream_url: upstream.base_url.clone(), ..setup };
    let gateway = Gateway::start_with(setup).await;
    let owner = gateway.customer("50").await;
    // Charged 20 × 100 + 9 × 1000 pico-USD a token and 20 %: one call tells what is held for it.
    let probe = gateway.chat(&owner, &dear(100)).await.expect(200);
    let charge = probe.number("x-charged-usdc");
    let hold =
        gateway.receipt(&owner, probe.header("x-request-id").unwrap()).await["hold_usdc"].as_u64().unwrap();
    assert!(hold > charge);

    // Room for seven holds, but for one micro-USDC: six are made, while the upstream answers nobody.
    let cap = hold * 7 - 1;
    let agent = limited(&gateway, &owner.wallet, &json!({"spend_cap_usdc": cap})).await;
    upstream.play(Script::held_back(Script::json(200, &completion(Some(usage(20, 9))))));
    let before = upstream.received().len();
    let gateway = std::sync::Arc::new(gateway);
    let calls: Vec<_> = (0..64)
        .map(|_| {
            let (gateway, agent) = (gateway.clone(), agent.clone());
            tokio::spawn(async move { gateway.chat(&agent, &dear(100)).await })
        })
        .collect();
    crate::support::eventually("all others are refused", async || {
        (calls.iter().filter(|call| call.is_finished()).count() == 58).then_some(())
    })
    .await;
    crate::support::eventually("six are at the upstream", async || {
        (upstream.received().len() == before + 6).then_some(())
    })
    .await;
    let row = listed(&gateway, &agent).await;
    assert_eq!((&row["spent_usdc"], &row["held_usdc"]), (&json!(0), &json!(hold * 6)));
    for _ in 0..6 {
        upstream.open_gate();
    }
    let mut paid = 0;
    for call in calls {
        let answer = call.await.unwrap();
        if answer.status == 200 {
            paid += answer.number("x-charged-usdc");
            continue;
        }
        let error = answer.error(402, "key_spend_cap_reached");
        assert!(answer.header("payment-required").is_none(), "a payment would not help: {answer:?}");
        assert!(error["message"].as_str().unwrap().contains("PATCH /v1/auth/keys"), "{error}");
    }
    assert_eq!(paid, charge * 6);
    assert_eq!(gateway.settled(&agent).await.balance, micro("50") - charge - paid);

    // What was released is there again, so calls go on, one at a time, until no hold fits any more.
    upstream.play(Script::json(200, &completion(Some(usage(20, 9)))));
    let mut spent = paid;
    while spent + hold <= cap {
        spent += gateway.chat(&agent, &dear(100)).await.expect(200).number("x-charged-usdc");
    }
    let last = gateway.chat(&agent, &dear(100)).await;
    let message = last.error(402, "key_spend_cap_reached")["message"].as_str().unwrap().to_owned();
    for amount in [cap, spent] {
        let usd = format!("{}.{:06}", amount / 1_000_000, amount % 1_000_000);
        let usd = usd.trim_end_matches('0').trim_end_matches('.').to_owned();
        assert!(message.contains(&usd), "{usd} is not in {message}");
    }
    let row = listed(&gateway, &agent).await;
    assert_eq!((&row["spent_usdc"], &row["held_usdc"]), (&json!(spent), &json!(0)));
    assert!(spent <= cap);
    // The owner's other key is not bound by it.
    gateway.chat(&owner, &dear(100)).await.expect(200);
    gateway.audit();
}

#[tokio::test]
async fn a_cap_per_day_says_when_it_begins_anew() {
    let gateway = Gateway::usual().await;
    let owner = gateway.customer("5").await;
    let agent = limited(&gateway, &owner.wallet, &json!({"spend_cap_per_day_usdc": 0})).await;
    let error = gateway.chat(&agent, &ask("Hello")).await.error(402, "key_spend_cap_reached");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(" a day") && message.contains("T00:00:00.000Z"), "{message}");
    change(&gateway, &agent, &json!({"spend_cap_per_day_usdc": 5_000_000})).await.expect(200);
    let charged = gateway.chat(&agent, &ask("Hello")).await.expect(200).number("x-charged-usdc");
    let row = listed(&gateway, &agent).await;
    assert_eq!((&row["spent_usdc"], &row["spent_today_usdc"]), (&json!(charged), &json!(charged)));
}

#[tokio::test]
async fn a_streamed_call_counts_like_any_other() {
    let gateway = Gateway::usual().await;
    let owner = gateway.customer("5").await;
    let agent = limited(&gateway, &owner.wallet, &json!({"spend_cap_usdc": 1_000_000})).await;
    let mut stream = gateway.stream(&agent, &crate::support::gateway::ask_stream("Hello")).await;
    assert_eq!(stream.rest().await.last().unwrap(), "[DONE]");
    let charged = gateway.receipt(&agent, &stream.id).await["charged_usdc"].clone();
    assert_eq!(listed(&gateway, &agent).await["spent_usdc"], charged);
    change(&gateway, &agent, &json!({"spend_cap_usdc": charged})).await.expect(200);
    let refused = gateway.chat(&agent, &crate::support::gateway::ask_stream("Hello")).await;
    refused.error(402, "key_spend_cap_reached");
    gateway.audit();
}

#[tokio::test]
async fn a_key_calls_the_models_it_may() {
    let gateway = Gateway::usual().await;
    let owner = gateway.customer("5").await;
    let agent = limited(&gateway, &owner.wallet, &json!({"allowed_models": [SMALL]})).await;
    let refused = gateway.chat(&agent, &ask("Hello")).await.error(403, "model_not_allowed");
    assert_eq!(refused["param"], "model");
    assert!(refused["message"].as_str().unwrap().contains(SMALL), "{refused}");
    let mut body = ask("Hello");
    body["model"] = SMALL.into();
    gateway.chat(&agent, &body).await.expect(200);
    body["model"] = "openai/none".into();
    gateway.chat(&agent, &body).await.error(404, "model_not_found");
    change(&gateway, &agent, &json!({"allowed_models": null})).await.expect(200);
    gateway.chat(&agent, &ask("Hello")).await.expect(200);
}

#[tokio::test]
async fn a_change_touches_what_it_names_and_only_its_owner_makes_it() {
    let gateway = Gateway::usual().await;
    let wallet = TestWallet::random();
    let limits = json!({"spend_cap_usdc": 5, "requests_per_minute": 7});
    let agent = limited(&gateway, &wallet, &limits).await;
    let changed =
        change(&gateway, &agent, &json!({"spend_cap_usdc": null, "spend_cap_per_day_usdc": 3})).await;
    let changed = changed.expect(200).json();
    assert_eq!(changed["spend_cap_usdc"], Value::Null);
    assert_eq!(changed["spend_cap_per_day_usdc"], 3);
    assert_eq!(changed["requests_per_minute"], 7);
    assert_eq!(changed.get("key"), None);
    assert_eq!(listed(&gateway, &agent).await, changed);
    let stranger = Customer { wallet: TestWallet::random(), ..agent.clone() };
    change(&gateway, &stranger, &limits).await.error(404, "key_not_found");
    let path = format!("/v1/auth/keys/{}", agent.key.id);
    let by_key = gateway.request(reqwest::Method::PATCH, &path).key(&agent.key).json(&limits);
    by_key.send().await.error(400, "missing_required_parameter");
    assert_eq!(listed(&gateway, &agent).await, changed);
}

#[tokio::test]
async fn a_rotated_key_has_its_limits_and_its_old_secret_stops_at_once() {
    let gateway = Gateway::usual().await;
    let owner = gateway.customer("5").await;
    let old = limited(&gateway, &owner.wallet, &json!({"label": "agent", "spend_cap_usdc": 1_000_000})).await;
    let charged = gateway.chat(&old, &ask("Hello")).await.expect(200).number("x-charged-usdc");
    let path = format!("/v1/auth/keys/{}/rotate", old.key.id);
    let rotated = gateway.post(&path).json(&gateway.sign_in(&owner.wallet).body()).send().await.expect(200);
    assert_eq!(rotated.header("cache-control"), Some("no-store"));
    let rotated = rotated.json();
    assert_eq!((&rotated["id"], &rotated["label"]), (&json!(old.key.id), &json!("agent")));
    assert_eq!(rotated["spend_cap_usdc"], 1_000_000);
    let secret = rotated["key"].as_str().unwrap().to_owned();
    assert_ne!(secret, old.key.secret);
    gateway.chat(&old, &ask("Hello")).await.error(401, "invalid_api_key");
    let new = Customer { key: ApiKey { secret, ..old.key.clone() }, ..old.clone() };
    let more = gateway.chat(&new, &ask("Hello")).await.expect(200).number("x-charged-usdc");
    assert_eq!(listed(&gateway, &new).await["spent_usdc"], charged + more);

    // Nobody else rotates it, and a revoked key is not brought back.
    let stranger = gateway.sign_in(&TestWallet::random()).body();
    gateway.post(&path).json(&stranger).send().await.error(404, "key_not_found");
    let delete = gateway.delete(&format!("/v1/auth/keys/{}", old.key.id));
    delete.json(&gateway.sign_in(&owner.wallet).body()).send().await.expect(200);
    gateway.post(&path).json(&gateway.sign_in(&owner.wallet).body()).send().await.error(409, "key_revoked");
    change(&gateway, &new, &json!({"spend_cap_usdc": 1})).await.error(409, "key_revoked");
    gateway.chat(&new, &ask("Hello")).await.error(401, "invalid_api_key");
}

#[tokio::test]
async fn an_expired_key_is_refused_with_a_code_of_its_own() {
    let gateway = Gateway::usual().await;
    let owner = gateway.customer("5").await;
    let agent = limited(&gateway, &owner.wallet, &json!({"expires_at": in_seconds(2)})).await;
    crate::support::eventually("the key has expired", async || {
        let answer = gateway.chat(&agent, &ask("Hello")).await;
        (answer.status != 200).then(|| answer.error(401, "api_key_expired"))
    })
    .await;
    gateway.get("/v1/requests").key(&agent.key).send().await.error(401, "api_key_expired");
    change(&gateway, &agent, &json!({"expires_at": null})).await.expect(200);
    gateway.chat(&agent, &ask("Hello")).await.expect(200);
}

#[tokio::test]
async fn keys_expire_at_their_time_and_then_make_room() {
    both(async |books| {
        let keys = Keys::new(books.db.clone(), books.clock.clone(), Entropy, 1);
        let limits = KeyLimits { expires_at: Some(NOW.plus_seconds(60)), ..KeyLimits::default() };
        let (key, secret) = keys.create(wallet(1), None, limits.clone()).await.unwrap();
        books.clock.advance_seconds(59);
        let caller = keys.authenticate(&secret).await.unwrap().unwrap();
        assert_eq!(caller.key_limits, limits);
        let another = keys.create(wallet(1), None, KeyLimits::default()).await;
        assert!(matches!(another, Err(KeyError::TooMany(1))));
        books.clock.advance_seconds(1);
        assert!(matches!(keys.authenticate(&secret).await, Err(KeyError::Expired(_))));
        let past = keys.create(wallet(1), None, limits).await;
        assert!(matches!(past, Err(KeyError::ExpiresInThePast)));
        // An expired key is not live, so another can be made; then it cannot come back beside that.
        keys.create(wallet(1), None, KeyLimits::default()).await.unwrap();
        let revive = LimitChanges { expires_at: Some(None), ..LimitChanges::default() };
        assert!(matches!(keys.change(wallet(1), key.id, revive).await, Err(KeyError::TooMany(1))));
    })
    .await;
}
