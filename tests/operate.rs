//! The operator's commands, beside a gateway that serves.

use std::sync::Arc;

use serde_json::json;

use crate::support::chain::TestChain;
use crate::support::gateway::{Gateway, Setup, ask, ask_stream, micro};
use crate::support::postgres::fresh_database;
use crate::support::upstream::{Script, ScriptedUpstream, chunk, completion, usage, usage_chunk};
use crate::support::wallet::TestWallet;
use crate::support::{PATIENCE, eventually, unix_seconds};

/// Runs a test on a gateway with SQLite, then on one with PostgreSQL.
async fn on_both(setup: Setup, test: impl AsyncFn(&Gateway)) {
    for database_url in [None, Some(fresh_database().await)] {
        // Shown only where the test fails.
        println!("on {database_url:?}");
        // Nobody else's treasury, nor a relayer that has sent before.
        let (relayer, pay_to) = (TestWallet::random(), TestWallet::random().address());
        let setup = Setup { database_url, relayer, pay_to, ..setup.clone() };
        let gateway = Gateway::start_with(setup).await;
        test(&gateway).await;
        gateway.audit();
    }
}

/// What a command says that must succeed.
#[track_caller]
fn said(gateway: &Gateway, args: &[&str]) -> String {
    let output = gateway.run_with(args);
    assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The status and the sentence of a command that must fail, without a word of what cannot be helped.
#[track_caller]
fn refused(gateway: &Gateway, args: &[&str]) -> (i32, String) {
    let output = gateway.run_with(args);
    let sentence = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(!output.status.success() && output.stdout.is_empty(), "{args:?}: {output:?}");
    assert!(!sentence.trim().is_empty() && !sentence.contains("panicked"), "{args:?}: {output:?}");
    for internal in ["sqlx", "SELECT", "error returned from database"] {
        assert!(!sentence.contains(internal), "{args:?}: {sentence}");
    }
    (output.status.code().unwrap(), sentence)
}

/// The rest of the line that begins with `name`.
#[track_caller]
fn field<'a>(shown: &'a str, name: &str) -> &'a str {
    let line = shown.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in\n{shown}")).trim()
}

/// The words of each line after the first.
fn rows(listed: &str) -> Vec<Vec<&str>> {
    listed.lines().skip(1).map(|line| line.split_whitespace().collect()).collect()
}

#[tokio::test]
async fn payments_are_listed_and_shown() {
    on_both(Setup::usual(), async |gateway| {
        assert!(rows(&said(gateway, &["payments", "list"])).is_empty());
        let (first, second) = (TestWallet::random(), TestWallet::random());
        let of_first = gateway.top_up(&first, "1.5").await;
        let of_second = gateway.top_up(&second, "20").await;
        let listed = said(gateway, &["payments", "list"]);
        let listed = rows(&listed);
        let id = |topup: &serde_json::Value| topup["topup_id"].to_string();
        // Newest first.
        let expected = [(id(&of_second), "20000000", &second), (id(&of_first), "1500000", &first)];
        assert_eq!(listed.len(), expected.len());
        for (row, (id, micro, wallet)) in listed.iter().zip(&expected) {
            assert_eq!((row[0], row[2], row[3]), (id.as_str(), *micro, wallet.shown().as_str()));
            assert!(matches!(row[1], "credited" | "finalized"), "{row:?}");
            assert!(row[4].ends_with('Z'), "{row:?}");
        }
        assert_eq!(rows(&said(gateway, &["payments", "list", "--limit", "1"]))[0][0], expected[0].0);
        assert!(rows(&said(gateway, &["payments", "list", "--state", "expired"])).is_empty());

        let shown = said(gateway, &["payments", "show", &id(&of_first)]);
        assert_eq!(field(&shown, "id "), id(&of_first));
        assert_eq!(field(&shown, "wallet"), first.shown());
        assert_eq!(field(&shown, "to "), gateway.setup.pay_to.to_string());
        assert_eq!(field(&shown, "micro-USDC"), "1500000");
        assert_eq!(field(&shown, "transaction"), of_first["tx_hash"]);
        assert_eq!(field(&shown, "last note"), "-");
        let signed = format!("{} by {} nonce 0", field(&shown, "transaction"), gateway.setup.relayer.shown());
        assert_eq!(field(&shown, "signed"), signed);

        let (status, sentence) = refused(gateway, &["payments", "show", "4711"]);
        assert_eq!((status, sentence.as_str()), (1, "farebox: there is no payment 4711\n"));
        let (status, sentence) = refused(gateway, &["payments", "list", "--state", "lost"]);
        assert!(status == 1 && sentence.contains("no such state"), "{sentence}");
        for bad in [["payments", "list", "--limit", "0"], ["payments", "list", "--limit", "some"]] {
            let (status, sentence) = refused(gateway, &bad);
            assert!(status == 2 && sentence.contains("--limit"), "{sentence}");
        }
        refused(gateway, &["payments", "show", "one"]);
    })
    .await;
}

#[tokio::test]
async fn a_payment_that_ended_is_looked_at_again_and_no_other_on_sqlite() {
    retry_what_ended(None).await;
}

#[tokio::test]
async fn a_payment_that_ended_is_looked_at_again_and_no_other_on_postgres() {
    retry_what_ended(Some(fresh_database().await)).await;
}

async fn retry_what_ended(database_url: Option<String>) {
    let chain = Arc::new(TestChain::start());
    let setup = Setup { database_url, ..Setup::new(&chain, "http://127.0.0.1:9/v1") };
    let gateway = &Gateway::start_with(setup).await;
    let credited = gateway.top_up(&TestWallet::random(), "1").await["topup_id"].to_string();
    let (status, sentence) = refused(gateway, &["payments", "retry", &credited]);
    assert!(status == 1 && sentence.contains("is not one that expired or was cancelled"), "{sentence}");
    refused(gateway, &["payments", "retry", "4711"]);

    // Its transaction is not mined before the time of its authorization is over.
    let wallet = TestWallet::random();
    chain.mint(wallet.address(), micro("1")).await;
    let mut authorization = wallet.authorization(gateway.setup.pay_to, micro("1"));
    authorization.valid_before = (unix_seconds() + 3000).to_string();
    let payment = authorization.sign().v2_header();
    chain.set_automine(false).await;
    let pay = || gateway.post("/v1/topup").header("x-payment", &payment).0.timeout(PATIENCE).send();
    let (answer, ()) = tokio::join!(pay(), async {
        chain.transaction_in_the_pool().await;
        chain.rpc("evm_increaseTime", json!([4000])).await;
        chain.mine(4).await;
        chain.set_automine(true).await;
    });
    assert_eq!(answer.unwrap().status(), 402);
    let listed = said(gateway, &["payments", "list", "--state", "expired"]);
    let id = rows(&listed)[0][0];
    let expired = said(gateway, &["payments", "show", id]);
    assert!(field(&expired, "last note").contains("expired before"), "{expired}");

    let moved = |logs: &str| logs.matches("from=\"verified\" to=\"expired\"").count();
    assert_eq!(moved(&gateway.logs()), 0);
    // So soon after it was verified it would be signed for again unseen.
    eventually("the payment is no longer fresh", async || {
        let created = field(&expired, "created");
        let now = farebox::clock::Clock::System.now().plus_seconds(-11).rfc3339();
        (created < now.as_str()).then_some(())
    })
    .await;
    let retried = said(gateway, &["payments", "retry", id]);
    assert!(retried.contains("looked at again"), "{retried}");
    eventually("the running server looks at it", async || (moved(&gateway.logs()) == 1).then_some(())).await;
    let again = said(gateway, &["payments", "show", id]);
    assert_eq!(again, expired);
    assert_eq!(gateway.balance(&wallet).await.balance, 0);
    gateway.audit();
}

#[tokio::test]
async fn a_frozen_wallet_makes_no_hold_until_it_is_unfrozen() {
    let upstream = ScriptedUpstream::start().await;
    let setup = Setup::new(&TestChain::shared(), &upstream.base_url);
    on_both(setup, async |gateway| {
        let customer = gateway.customer("1").await;
        let wallet = customer.wallet.shown();
        let show = || said(gateway, &["wallet", "show", &wallet]);
        let shown = show();
        assert_eq!(field(&shown, "wallet"), wallet);
        assert_eq!((field(&shown, "balance"), field(&shown, "frozen")), ("1 USDC", "no"));
        assert_eq!((field(&shown, "locked"), field(&shown, "debt")), ("0 USDC", "0 USDC"));

        // A stream under way goes on to its end.
        let script = Script::stream().event(&chunk("A wallet")).gate();
        upstream.play(script.event(&usage_chunk(usage(20, 9))).done());
        let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
        stream.next().await.unwrap();
        assert_ne!(field(&show(), "locked"), "0 USDC");
        said(gateway, &["wallet", "freeze", &wallet, "chargebacks, case 17"]);
        assert_eq!(field(&show(), "frozen"), "chargebacks, case 17");
        upstream.open_gate();
        assert_eq!(stream.rest().await, ["[DONE]"]);
        assert_eq!(gateway.receipt(&customer, &stream.id).await["charged_usdc"], 11);

        upstream.play(Script::json(200, &completion(Some(usage(20, 9)))));
        let asked = upstream.received().len();
        for body in [ask("Hello"), ask_stream("Hello")] {
            let error = gateway.chat(&customer, &body).await.error(403, "wallet_frozen");
            assert!(error["message"].as_str().unwrap().contains("chargebacks, case 17"), "{error}");
        }
        assert_eq!(upstream.received().len(), asked, "a frozen wallet's request has gone out");
        // It may still pay, and others are not meant.
        gateway.top_up(&customer.wallet, "2").await;
        let other = gateway.customer("1").await;
        gateway.chat(&other, &ask("Hello")).await.expect(200);

        said(gateway, &["wallet", "unfreeze", &wallet]);
        gateway.chat(&customer, &ask("Hello")).await.expect(200);
        let shown = show();
        assert_eq!((field(&shown, "balance"), field(&shown, "frozen")), ("2.999978 USDC", "no"));
        let entries: Vec<_> =
            shown.lines().skip(6).map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        // Newest first: number, kind, amount, balance after, and what it is for.
        let amounts: Vec<_> = entries.iter().map(|entry| entry[..4].to_vec()).collect();
        assert_eq!(
            amounts,
            [
                ["4", "charge", "-11", "2999978"],
                ["3", "topup", "2000000", "2999989"],
                ["2", "charge", "-11", "999989"],
                ["1", "topup", "1000000", "1000000"],
            ]
        );
        assert_eq!(entries[2][4], stream.id);

        let unknown = TestWallet::random().shown();
        for command in [&["freeze", &unknown, "why"][..], &["unfreeze", &unknown]] {
            let (status, sentence) = refused(gateway, &[&["wallet"], command].concat());
            assert!(status == 2 && sentence.contains("there is no wallet"), "{sentence}");
        }
        let (_, sentence) = refused(gateway, &["wallet", "freeze", &wallet, " "]);
        assert!(sentence.contains("must not be blank"), "{sentence}");
        assert_eq!(field(&show(), "frozen"), "no");
    })
    .await;
}

#[tokio::test]
async fn an_adjustment_is_one_entry_and_takes_no_more_than_there_is() {
    on_both(Setup::usual(), async |gateway| {
        let customer = gateway.customer("1").await;
        let wallet = customer.wallet.shown();
        let adjust = |more: &[&'static str]| {
            let mut args = vec!["wallet", "adjust", &wallet];
            args.extend(more);
            said(gateway, &args)
        };
        let refuse = |more: &[&'static str]| {
            let mut args = vec!["wallet", "adjust", &wallet];
            args.extend(more);
            refused(gateway, &args)
        };
        let given = &["0.25", "made good: outage", "--reference", "outage-7"];
        for _ in 0..3 {
            assert_eq!(adjust(given), "outage-7: the balance is 1.25 USDC now\n");
        }
        // Under that name there is no other, for this wallet or another.
        for other in [["0.26", "why", "--reference", "outage-7"], ["-0.25", "why", "--reference", "outage-7"]]
        {
            let (status, sentence) = refuse(&other);
            assert!(status == 2 && sentence.contains("outage-7 exists with other terms"), "{sentence}");
        }
        let other = TestWallet::random().shown();
        refused(gateway, &["wallet", "adjust", &other, "0.25", "why", "--reference", "outage-7"]);

        assert!(adjust(&["-0.5", "paid back by hand"]).ends_with(": the balance is 0.75 USDC now\n"));
        let (status, sentence) = refuse(&["-0.750001", "too much"]);
        assert!(status == 2 && sentence.contains("750000 are available"), "{sentence}");
        // What was taken under a name is not taken, or refused, again.
        for _ in 0..2 {
            let taken = adjust(&["-0.7", "nearly all", "--reference", "nearly-all"]);
            assert_eq!(taken, "nearly-all: the balance is 0.05 USDC now\n");
        }
        for (bad, why) in [
            (&["0", "nothing"][..], "other than zero"),
            (&["lots", "why"], "\"lots\" is no amount of USD"),
            (&["1e3", "why"], "is no amount of USD"),
            (&["0.0000001", "why"], "more than 6 decimals"),
            (&["99999999999999999999", "why"], "out of range"),
            (&["9223372036854.775807", "why"], "left the range of the books"),
            (&["1"], "<REASON>"),
            (&["1", ""], "must not be blank"),
            (&["1", "why", "--reference", " "], "must not be blank"),
        ] {
            let (_, sentence) = refuse(bad);
            assert!(sentence.contains(why), "{bad:?}: {sentence}");
        }
        let (_, sentence) = refused(gateway, &["wallet", "adjust", "0x12", "1", "why"]);
        assert!(sentence.contains("not an address"), "{sentence}");
        refused(gateway, &["wallet", "show", "me"]);
        // One letter's case is another: the checksum tells.
        let mistyped = "0xD8dA6BF26964aF9D7eEd9e03E53415D37aA96045";
        let (_, sentence) = refused(gateway, &["wallet", "adjust", mistyped, "1", "why"]);
        assert!(sentence.contains("checksum"), "{sentence}");
        said(gateway, &["wallet", "show", "0xd8dA6BF26964aF9D7eEd9e03E53415D37aA96045"]);

        let shown = said(gateway, &["wallet", "show", &wallet]);
        let entries: Vec<_> = shown.lines().skip(6).collect();
        assert_eq!(entries.len(), 4, "{shown}");
        for (entry, part) in
            entries.iter().zip(["nearly-all", "paid back by hand", "outage-7 made good: outage"])
        {
            assert!(entry.contains(" adjustment ") && entry.contains(part), "{shown}");
        }
        assert_eq!(gateway.balance(&customer.wallet).await.available, 50_000);
        assert!(said(gateway, &["wallet", "show", &other]).contains("balance     0 USDC"));

        assert_eq!(adjust(&["-0.05", "the rest"]).split(": ").nth(1), Some("the balance is 0 USDC now\n"));
        gateway.chat(&customer, &ask("Hello")).await.error(402, "insufficient_balance");
    })
    .await;
}

#[tokio::test]
async fn what_a_request_has_locked_an_adjustment_cannot_take() {
    let upstream = ScriptedUpstream::start().await;
    let setup = Setup::new(&TestChain::shared(), &upstream.base_url);
    on_both(setup, async |gateway| {
        let customer = gateway.customer("1").await;
        let wallet = customer.wallet.shown();
        let script = Script::stream().event(&chunk("A wallet")).gate();
        upstream.play(script.event(&usage_chunk(usage(20, 9))).done());
        let mut stream = gateway.stream(&customer, &ask_stream("Hello")).await;
        stream.next().await.unwrap();
        // The request goes on when its hold is written, which others see when it is committed.
        let locked = eventually("the hold is committed", async || {
            Some(gateway.balance(&customer.wallet).await.locked).filter(|locked| *locked > 11)
        })
        .await;
        let (_, sentence) = refused(gateway, &["wallet", "adjust", &wallet, "-1", "all of it"]);
        assert!(sentence.contains(&format!("{} are available", 1_000_000 - locked)), "{sentence}");
        let rest = format!("-0.{:06}", 1_000_000 - locked);
        said(gateway, &["wallet", "adjust", &wallet, &rest, "all that is available"]);
        upstream.open_gate();
        assert_eq!(stream.rest().await, ["[DONE]"]);
        assert_eq!(gateway.settled(&customer).await.balance, locked - 11);
    })
    .await;
}
