//! What the gateway signs can be held against it: nothing of it can be changed, whoever keeps it, and however
//! old it is.

use std::fs;
use std::process::{Command, Output};

use farebox::attest::{self, Attestor, Kind, Refused};
use farebox::id::{Entropy, Wallet};
use secrecy::SecretString;
use serde_json::Value;

use crate::support::books::{NOW, both, completion, hold, settled, wallet};
use crate::support::gateway::{Customer, Gateway, MODEL, Setup, ask, members};
use crate::support::wallet::TestWallet;

/// The text of a request's receipt, as it was answered.
async fn receipt_text(gateway: &Gateway, customer: &Customer, id: &str) -> String {
    gateway.get(&format!("/v1/requests/{id}")).key(&customer.key).send().await.expect(200).text()
}

async fn asked(gateway: &Gateway, customer: &Customer) -> String {
    let answer = gateway.chat(customer, &ask("Hello")).await.expect(200);
    answer.header("x-request-id").unwrap().to_owned()
}

async fn signer_of(gateway: &Gateway) -> Wallet {
    let status = gateway.get("/v1/status").send().await.expect(200).json();
    status["receipt_signer"].as_str().unwrap().parse().unwrap()
}

/// Each bit of a text changed, one at a time: none of it may verify.
fn assert_every_bit_counts(text: &str) {
    let mut seen = 0;
    for at in 0..text.len() {
        for bit in 0..8 {
            let mut bytes = text.as_bytes().to_vec();
            bytes[at] ^= 1 << bit;
            // What is no UTF-8 any more is no JSON.
            let Ok(changed) = String::from_utf8(bytes) else { continue };
            let verified = attest::verify(&changed);
            assert!(verified.is_err(), "bit {bit} at {at}: {changed}\n{verified:?}");
            seen += 1;
        }
    }
    assert!(seen > text.len() * 6, "{seen} changes of {} bytes", text.len());
}

#[tokio::test]
async fn receipts_are_signed_by_the_key_that_status_names() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let id = asked(&gateway, &customer).await;
    let signer = signer_of(&gateway).await;
    let text = receipt_text(&gateway, &customer, &id).await;
    let verified = attest::verify(&text).unwrap();
    assert_eq!((verified.kind, verified.signer), (Kind::RequestReceipt, signer));
    assert_eq!(receipt_text(&gateway, &customer, &id).await, text, "signed again, it is the same");
    let shown = gateway.run_with(&["receipts", "show", &id]).stdout;
    assert_eq!(String::from_utf8(shown).unwrap(), format!("{text}\n"), "so it is by the operator's command");
    // Read and written by somebody else's program, all but its whitespace is the same.
    let pretty = text.replace(",\"", " ,\n\t\"").replace("\":", "\" : ");
    assert_eq!(attest::verify(&pretty).unwrap(), verified);

    let receipt: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(receipt["cost_pico_usd"], "8400000");
    assert_eq!(members(&receipt["signature"]), ["chain_id", "signer", "type", "value"]);
    let list = gateway.get("/v1/requests").key(&customer.key).send().await.expect(200).json();
    let mut row = list["data"][0].clone();
    assert!(row["signature"].is_null(), "{row}");
    row["signature"] = receipt["signature"].clone();
    assert_eq!(row, receipt, "but for the signature it is the same");

    // Without what the provider said, nothing is lost of what was signed; with other words of it, all is.
    let reported = format!(",\"usage_reported\":{}", receipt["usage_reported"]);
    assert!(receipt["usage_reported"].is_object(), "{receipt}");
    let start = text.find(",\"usage_reported\":{").unwrap();
    let end = text.find(",\"signature\":").unwrap();
    let without = format!("{}{}", &text[..start], &text[end..]);
    assert_eq!(reported.len(), end - start);
    assert_eq!(attest::verify(&without).unwrap(), verified);
    let other = text.replace("\"usage_reported\":{\"", "\"usage_reported\":{\"x\":1,\"");
    assert_eq!(attest::verify(&other), Err(Refused::OtherReport));
    let none = format!("{},\"usage_reported\":null{}", &text[..start], &text[end..]);
    assert_eq!(attest::verify(&none), Err(Refused::OtherReport));
    gateway.audit();
}

#[tokio::test]
async fn not_a_bit_of_a_receipt_can_be_changed() {
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let id = asked(&gateway, &customer).await;
    let text = receipt_text(&gateway, &customer, &id).await;
    let path = format!("/v1/topups/{}", customer.wallet.address());
    let topups = gateway.get(&path).key(&customer.key).send().await.expect(200).text();
    let row = &topups[topups.find("[{").unwrap() + 1..topups.rfind("}]").unwrap() + 1];
    assert_eq!(attest::verify(row).unwrap().kind, Kind::PaymentReceipt);
    // Each takes a recovered key or two a bit: on both cores.
    let both = [text, row.to_owned()].map(|text| std::thread::spawn(move || assert_every_bit_counts(&text)));
    both.into_iter().for_each(|checked| checked.join().unwrap());
}

#[tokio::test]
async fn what_is_no_signed_object_is_told_from_what_was_changed() {
    for text in ["", "{}", "[]", "null", r#"{"object":"request"}"#, r#"{"signature":{}}"#] {
        assert!(matches!(attest::verify(text), Err(Refused::Unreadable(_))), "{text}");
    }
    let gateway = Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let id = asked(&gateway, &customer).await;
    let text = receipt_text(&gateway, &customer, &id).await;
    // A reader that takes the first of two, and one that takes the last.
    for twice in
        [text.replacen('{', "{\"charged_usdc\":1,", 1), text.replacen('{', "{\"Charged_usdc\":1,", 1)]
    {
        assert!(matches!(attest::verify(&twice), Err(Refused::Unreadable(_))), "{twice}");
    }
    let more = text.replacen('{', "{\"discount_usdc\":1,", 1);
    assert!(matches!(attest::verify(&more), Err(Refused::OtherText(_))), "{more}");
    let huge = format!("{}{text}", " ".repeat(1 << 20));
    assert!(matches!(attest::verify(&huge), Err(Refused::Unreadable(_))));
}

#[tokio::test]
async fn a_topup_is_answered_with_a_receipt_that_its_list_repeats() {
    let gateway = Gateway::usual().await;
    let payer = TestWallet::random();
    let topup = gateway.top_up(&payer, "2").await;
    let receipt = &topup["receipt"];
    assert_eq!(receipt["wallet"], payer.shown());
    assert_eq!(receipt["amount_usdc"], 2_000_000);
    assert_eq!(receipt["tx_hash"], topup["tx_hash"]);
    assert_eq!(receipt["pay_to"], gateway.setup.pay_to.to_string());
    let path = format!("/v1/topups/{}{}", payer.address(), gateway.sign_in(&payer).query());
    let list = gateway.get(&path).send().await.expect(200).json();
    let row = &list["topups"][0];
    if row["status"] == receipt["status"] {
        assert_eq!(row, receipt);
    }
    assert_eq!((&row["id"], &row["network"]), (&topup["topup_id"], &"eip155:8453".into()));
}

/// `farebox ARGS`, by nothing but its arguments.
fn alone(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farebox"));
    command.args(args).env_clear().current_dir("/").output().unwrap()
}

#[tokio::test]
async fn receipts_of_old_stay_good_when_the_key_is_changed() {
    let gateway = &mut Gateway::usual().await;
    let customer = gateway.customer("1").await;
    let id = asked(gateway, &customer).await;
    let (kept, text) = (signer_of(gateway).await, receipt_text(gateway, &customer, &id).await);
    gateway.terminate();
    gateway.wait_for_exit().await;
    gateway.restart();
    assert_eq!(signer_of(gateway).await, kept, "the database keeps the key");

    let key = TestWallet::random();
    let other = Wallet(key.address());
    gateway.reconfigure(|setup| setup.env.push(("FAREBOX_RECEIPT_KEY".into(), key.private_key())));
    assert_eq!(signer_of(gateway).await, other);
    let again = receipt_text(gateway, &customer, &id).await;
    let (old, new) = (attest::verify(&text).unwrap(), attest::verify(&again).unwrap());
    assert_eq!((old.signer, new.signer), (kept, other), "each says who signed it");
    assert_eq!(old.contents, new.contents);
    let status = gateway.get("/v1/status").send().await.expect(200).json();
    let signers = status["receipt_signers"].as_array().unwrap();
    let addresses: Vec<_> = signers.iter().map(|row| row["address"].as_str().unwrap()).collect();
    assert_eq!(addresses, [other.to_string(), kept.to_string()], "newest first");
    assert!(signers.iter().all(|row| row["revoked_at"].is_null()), "{status}");

    let file = gateway.directory().join("receipt.json");
    fs::write(&file, &text).unwrap();
    let file = file.to_str().unwrap();
    let (kept, other) = (kept.to_string(), other.to_string());
    assert!(alone(&["verify-proof", file]).status.success());
    assert!(alone(&["verify-proof", file, "--signer", &kept]).status.success());
    let by_another = alone(&["verify-proof", file, "--signer", &other]);
    assert_eq!(by_another.status.code(), Some(1));
    assert!(String::from_utf8(by_another.stderr).unwrap().contains(&kept));

    // The operator says that it was stolen: within seconds the running server says so too.
    let revoked = gateway.run_with(&["receipts", "revoke-key", &kept]);
    assert!(revoked.status.success(), "{revoked:?}");
    let keys = String::from_utf8(gateway.run_with(&["receipts", "keys"]).stdout).unwrap();
    assert_eq!(keys.lines().count(), 2);
    assert!(keys.lines().all(|line| line.starts_with(&kept) == line.contains("revoked")), "{keys}");
    gateway.terminate();
    gateway.wait_for_exit().await;
    gateway.restart();
    let status = gateway.get("/v1/status").send().await.expect(200).json();
    assert!(status["receipt_signers"][0]["revoked_at"].is_null(), "{status}");
    assert!(status["receipt_signers"][1]["revoked_at"].is_string(), "{status}");
    let unknown = gateway.run_with(&["receipts", "revoke-key", &TestWallet::random().shown()]);
    assert_eq!(unknown.status.code(), Some(1));
}

#[tokio::test]
async fn a_key_that_is_none_and_a_relayers_are_refused_at_start() {
    let gateway = Gateway::usual().await;
    let relayer = gateway.setup.relayer.private_key();
    let digits = relayer.trim_start_matches("0x").to_uppercase();
    for (key, why) in [
        ("", None),
        ("0x12", Some("is not a private key")),
        (relayer.as_str(), Some("must be another key than FAREBOX_RELAYER_KEY")),
        (digits.as_str(), Some("must be another key than FAREBOX_RELAYER_KEY")),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_farebox"));
        command.arg("check-config").arg("--config").arg(gateway.config()).env_clear();
        command.env("FAREBOX_RELAYER_KEY", &relayer).env("UPSTREAM_KEY", "sk-test");
        let output = command.env("FAREBOX_RECEIPT_KEY", key).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        match why {
            None => assert!(output.status.success(), "{said}"),
            Some(why) => assert!(!output.status.success() && said.contains(why), "{said}"),
        }
        assert!(key.is_empty() || !said.contains(key), "{said}");
    }
}

/// Whoever has the database could sign with one that a command had drawn, and the server would name it.
#[tokio::test]
async fn a_command_signs_with_the_servers_key_or_not_at_all() {
    let env = || vec![("FAREBOX_RECEIPT_KEY".into(), TestWallet::random().private_key())];
    let keyed = Gateway::start_with(Setup { env: env(), ..Setup::usual() }).await;
    // The database of one of them keeps a key that is used no longer.
    let mut rekeyed = Gateway::usual().await;
    rekeyed.reconfigure(|setup| setup.env = env());
    for (mut gateway, known) in [(keyed, 1), (rekeyed, 2)] {
        let customer = gateway.customer("1").await;
        let id = asked(&gateway, &customer).await;
        let shown = gateway.run_with(&["receipts", "show", &id]);
        assert!(shown.status.success(), "{shown:?}");
        for env in [Vec::new(), env()] {
            gateway.setup.env = env;
            let refused = gateway.run_with(&["receipts", "show", &id]);
            assert!(!refused.status.success() && refused.stdout.is_empty(), "{refused:?}");
            assert!(String::from_utf8(refused.stderr).unwrap().contains("set FAREBOX_RECEIPT_KEY as"));
        }
        let keys = String::from_utf8(gateway.run_with(&["receipts", "keys"]).stdout).unwrap();
        assert_eq!(keys.lines().count(), known, "{keys}");
    }
}

#[tokio::test]
async fn nodes_of_one_database_sign_alike() {
    both(async |books| {
        let load = async |key: Option<&SecretString>| {
            Attestor::load(&books.db, &Entropy, NOW, key, 8453).await.unwrap()
        };
        let (one, two) = tokio::join!(load(None), load(None));
        assert_eq!(one.signer(), two.signer());
        let contents = r#"{"id":1,"object":"topup","wallet":"0x0101010101010101010101010101010101010101","amount_usdc":5,"status":"credited","tx_hash":null,"network":"eip155:8453","asset":"0x0101010101010101010101010101010101010101","pay_to":"0x0101010101010101010101010101010101010101","created_at":"a","updated_at":"b"}"#;
        assert_eq!(one.sign(contents).unwrap(), two.sign(contents).unwrap());
        assert!(one.sign(r#"{"object":"topup"}"#).is_err());
        let configured = SecretString::from(TestWallet::random().private_key());
        let other = load(Some(&configured)).await;
        assert_ne!(other.signer(), one.signer());
        one.refresh().await.unwrap();
        assert_eq!(one.known_keys().len(), 2);
    })
    .await;
}

#[tokio::test]
async fn archived_receipts_are_found_in_their_files_and_signed() {
    both(async |books| {
        let ledger = books.ledger("a");
        Attestor::load(&books.db, &Entropy, NOW, None, 8453).await.unwrap();
        books.credit(wallet(1), 1_000_000).await;
        let mut ids = Vec::new();
        for number in 0..3 {
            let mut held = hold(Entropy.request_id(NOW.millis() + number), wallet(1), 300);
            held.api_key_id = (number > 0).then_some(number);
            ledger.hold(&held).await.unwrap();
            let mut ending = settled(&held, completion(100));
            ending.usage_raw =
                Some(format!(r#"{{"completion_tokens": 100, "n": {number}.50, "é": "\"{MODEL}\""}}"#));
            ledger.end(&ending).await.unwrap();
            ids.push(held.id);
        }
        let directory = books.scratch.path().join("archive");
        let directory = directory.to_str().unwrap();
        let said = |args: &[&str]| crate::support::operator::said(books, args);
        let before: Vec<_> = ids.iter().map(|id| said(&["receipts", "show", id])).collect();
        for text in &before {
            assert_eq!(attest::verify(text).unwrap().kind, Kind::RequestReceipt, "{text}");
        }
        said(&["receipts", "archive", "--before", "2026-05-01", "--out", directory]);
        assert_eq!(books.number("SELECT COUNT(*) AS n FROM receipts").await, 0);
        for (id, text) in ids.iter().zip(&before) {
            let refused = crate::support::operator::refused(books, &["receipts", "show", id]);
            assert!(refused.contains("--dir"), "{refused}");
            assert_eq!(said(&["receipts", "show", id, "--dir", directory]), *text);
        }
        // Nothing is signed out of a file that somebody has changed.
        let file = fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path());
        let file = file.into_iter().find(|path| path.extension().is_some_and(|end| end == "jsonl")).unwrap();
        let changed =
            fs::read_to_string(&file).unwrap().replacen("\"charged_micro\":72", "\"charged_micro\":71", 1);
        fs::write(&file, changed).unwrap();
        let refused =
            crate::support::operator::refused(books, &["receipts", "show", &ids[2], "--dir", directory]);
        assert!(refused.contains("is not what was written there"), "{refused}");
    })
    .await;
}
