//! Old receipts moved into files: nothing is lost or doubled whenever it is interrupted, the books still agree,
//! and what has ended cannot end again.

use std::fs;
use std::path::{Path, PathBuf};

use farebox::audit::{self, Verdict};
use farebox::claims::Claim;
use farebox::clock::{Clock, Timestamp};
use farebox::db::Db;
use farebox::id::{Entropy, Wallet};
use farebox::ledger::{Ending, Hold, Ledger, LedgerError, Outcome};
use farebox::money::{MicroUsdc, PicoUsd};
use farebox::pricing::{Unit, Usage};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::books::{Books, NOW, assert_no_drift, both, completion, settled, terms, wallet};
use crate::support::gateway::{Gateway, Setup, ask, members};
use crate::support::operator::{farebox, refused, said};
use crate::support::postgres::fresh_database;

/// After [`NOW`] by three weeks, and long ago.
const BEFORE: &str = "2026-05-01";
/// After [`BEFORE`], and long enough ago.
const LATER: Timestamp = NOW.plus_seconds(40 * 86_400);
/// Taken out in one transaction: see `archive`.
const TAKEN_AT_ONCE: usize = 200;

/// A hold as the gateway makes them, of a key or of none.
fn hold_at(at: Timestamp, owner: Wallet, api_key_id: Option<i64>) -> Hold {
    Hold {
        id: Entropy.request_id(at.millis()),
        wallet: owner,
        api_key_id,
        amount: MicroUsdc::new(300),
        terms: terms(),
        created_at: at,
    }
}

/// How holds end, in turn: at 72 micro-USDC, estimated at as much, at nothing, and released.
fn ending(hold: &Hold, number: usize) -> Ending {
    let usage_raw = Some(r#"{"prompt_tokens":0,"completion_tokens":100,"é":"\"quoted\""}"#.to_owned());
    match number % 4 {
        0 => {
            // With what only some receipts have: a unit of its own, and the upstream's cost.
            let usage = completion(60).with(Unit::Reasoning, 40);
            let upstream_cost = Some(PicoUsd::new(123));
            Ending { usage_raw, upstream_cost, ..settled(hold, usage) }
        }
        1 => {
            let reason = Some("client_gone".to_owned());
            Ending { outcome: Outcome::Estimated, reason, ..settled(hold, completion(100)) }
        }
        2 => settled(hold, Usage::default()),
        _ => Ending::released(hold.clone(), "upstream_failed"),
    }
}

/// Receipts of two wallets, each with a key and without, over an hour from a time on.
async fn fill(books: &Books, from: Timestamp, count: usize) -> Vec<Ending> {
    let ledger = books.ledger("a");
    for number in [1, 2] {
        books.credit(wallet(number), 1_000_000).await;
    }
    let holds: Vec<_> = (0..count)
        .map(|number| {
            let payer = u8::try_from(number % 2 + 1).unwrap();
            let key = (number % 3 > 0).then_some(i64::from(payer));
            let seconds = i64::try_from(number * 3600 / count).unwrap();
            hold_at(from.plus_seconds(seconds), wallet(payer), key)
        })
        .collect();
    let endings: Vec<_> = holds.iter().enumerate().map(|(number, hold)| ending(hold, number)).collect();
    for part in endings.chunks(500) {
        join_all(part.iter().map(async |ending| ledger.hold(&ending.hold).await.unwrap())).await;
        join_all(part.iter().map(async |ending| ledger.end(ending).await.unwrap())).await;
    }
    endings
}

const COLUMNS: [&str; 18] = [
    "id",
    "wallet",
    "api_key_id",
    "model",
    "outcome",
    "reason",
    "hold_micro",
    "charged_micro",
    "cost_pico",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "usage_raw",
    "usage_units",
    "upstream_cost_pico",
    "terms",
    "created_at_ms",
    "ended_at_ms",
];

/// All receipts there are, as a file has them, by id.
async fn receipts(db: &Db) -> Vec<Value> {
    let rows = db.rows("SELECT * FROM receipts ORDER BY id", vec![]).await.unwrap();
    let read = |row: &farebox::db::DbRow| {
        let value = |column: &str| match row.int_or_null(column) {
            Ok(number) => json!(number),
            Err(_) => json!(row.text_or_null(column).unwrap()),
        };
        COLUMNS.iter().map(|column| ((*column).to_owned(), value(column))).collect()
    };
    rows.iter().map(read).map(Value::Object).collect()
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<_> = all.filter(|path| path.extension().is_some_and(|end| end == "jsonl")).collect();
    files.sort();
    files
}

/// What is in a directory's files, by id.
fn archived(directory: &Path) -> Vec<Value> {
    let texts = files(directory).into_iter().map(|path| fs::read_to_string(path).unwrap());
    let mut lines: Vec<Value> = texts
        .flat_map(|text| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>())
        .collect();
    lines.sort_by_key(|line| line["id"].as_str().unwrap().to_owned());
    lines
}

/// What is kept of usage and spending, and the balances.
async fn totals(books: &Books) -> Vec<String> {
    let mut totals = Vec::new();
    for query in [
        "SELECT wallet || ' ' || api_key_id || ' ' || request_count || ' ' || completion_tokens || ' '
             || charged_micro || ' ' || revenue_pico AS row FROM usage_totals ORDER BY wallet, api_key_id",
        "SELECT api_key_id || ' ' || day || ' ' || spent_micro || ' ' || held_micro AS row FROM key_spending
         ORDER BY api_key_id, day",
        "SELECT address || ' ' || balance_micro || ' ' || locked_micro AS row FROM wallets ORDER BY address",
    ] {
        let rows = books.db.rows(query, vec![]).await.unwrap();
        totals.extend(rows.iter().map(|row| row.text("row").unwrap()));
    }
    totals
}

fn out(books: &Books) -> PathBuf {
    books.scratch.path().join("archive")
}

fn archive(books: &Books, before: &str) -> String {
    said(books, &["receipts", "archive", "--before", before, "--out", out(books).to_str().unwrap()])
}

#[tokio::test]
async fn old_receipts_go_into_files_and_the_books_still_agree() {
    both(async |books| {
        fill(books, NOW, 90).await;
        fill(books, LATER, 20).await;
        let (before, kept) = (receipts(&books.db).await, totals(books).await);
        assert_eq!(before.len(), 110);
        let directory = out(books);
        let dir = directory.to_str().unwrap();
        let first =
            said(books, &["receipts", "archive", "--before", BEFORE, "--out", dir, "--per-file", "40"]);
        assert_eq!(first.lines().count(), 3, "{first}");
        for (line, (id, count)) in first.lines().zip([(1, 40), (2, 40), (3, 10)]) {
            let expected = format!("{count} receipts of before 2026-05-01T00:00:00.000Z, 0.00");
            assert!(line.trim_start().starts_with(&id.to_string()) && line.contains(&expected), "{line}");
        }
        // Whole rows, in the order of their times.
        assert_eq!(files(&directory).len(), 3);
        assert_eq!(archived(&directory), before[..90]);
        assert_eq!(receipts(&books.db).await, before[90..]);
        assert_eq!(totals(books).await, kept);
        assert_no_drift(&books.db).await;
        assert_eq!(said(books, &["receipts", "archives"]), first);
        assert_eq!(said(books, &["receipts", "check", "--dir", dir]), "3 files are as they were written\n");

        let again = archive(books, BEFORE);
        assert_eq!(again, "there is no receipt to archive of before 2026-05-01T00:00:00.000Z\n");
        // The rest, by days. What was archived stays as it was.
        let rest = archive(books, "30");
        assert!(rest.contains(" 20 receipts of before "), "{rest}");
        assert_eq!(archived(&directory), before);
        assert!(receipts(&books.db).await.is_empty());
        assert_eq!(totals(books).await, kept);
        assert_no_drift(&books.db).await;
        // And the books go on.
        fill(books, Clock::System.now().plus_seconds(-3600), 12).await;
        assert_no_drift(&books.db).await;

        let file = files(&directory).remove(0);
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replacen("\"charged_micro\":72", "\"charged_micro\":71", 1)).unwrap();
        let output = farebox(books, &["receipts", "check", "--dir", dir]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let found = String::from_utf8(output.stdout).unwrap();
        assert!(found.contains("is not what was written there"), "{found}");
        assert_eq!(found.lines().count(), 1, "{found}");
    })
    .await;
}

#[tokio::test]
async fn killed_at_any_step_it_loses_nothing_and_the_next_run_goes_on() {
    both(async |books| {
        let directory = out(books);
        let dir = directory.to_str().unwrap();
        let (mut expected, mut kept) = (Vec::new(), 0);
        for (round, step) in
            ["archive-begun", "archive-synced", "archive-named", "archive-written", "archive-taking-out"]
                .into_iter()
                .enumerate()
        {
            let day = NOW.plus_seconds(i64::try_from(round).unwrap() * 86_400);
            let before = &day.plus_seconds(43_200).rfc3339();
            fill(books, day, TAKEN_AT_ONCE * 2 + 10).await;
            let here = receipts(&books.db).await;
            let args = ["receipts", "archive", "--before", before, "--out", dir];
            let killed = farebox(books, &args).env("FAREBOX_CRASH_AT", step).output().unwrap();
            assert!(killed.status.code().is_none(), "it was not killed at {step}: {killed:?}");
            let left = receipts(&books.db).await;
            let taken = if step == "archive-taking-out" { TAKEN_AT_ONCE } else { 0 };
            assert_eq!(left, here[taken..], "{step}");
            assert_no_drift(&books.db).await;
            let finished = archive(books, before);
            assert!(finished.contains(&format!(" {} receipts of before ", here.len())), "{finished}");
            assert_eq!(finished.lines().count(), 1, "{finished}");
            assert!(receipts(&books.db).await.is_empty(), "{step}");
            expected.extend(here);
            kept += 1;
            assert_eq!(files(&directory).len(), kept, "{step}");
            assert_no_drift(&books.db).await;
        }
        assert_eq!(archived(&directory), expected);
        let checked = said(books, &["receipts", "check", "--dir", dir]);
        assert_eq!(checked, "5 files are as they were written\n");
    })
    .await;
}

#[tokio::test]
async fn what_is_not_in_its_file_is_not_taken_out() {
    both(async |books| {
        fill(books, NOW, TAKEN_AT_ONCE * 2).await;
        let directory = out(books);
        let args = ["receipts", "archive", "--before", BEFORE, "--out", directory.to_str().unwrap()];
        let killed = farebox(books, &args).env("FAREBOX_CRASH_AT", "archive-taking-out").output().unwrap();
        assert!(killed.status.code().is_none(), "{killed:?}");
        let left = receipts(&books.db).await;
        let file = files(&directory).remove(0);
        let text = fs::read_to_string(&file).unwrap();

        // Altered, cut short, or elsewhere.
        for (damaged, why) in [
            (text.replacen("client_gone", "client_went", 1), "is not what was written there"),
            (text.lines().next().unwrap().to_owned() + "\n", "is not what was written there"),
        ] {
            fs::write(&file, damaged).unwrap();
            let sentence = refused(books, &args);
            assert!(sentence.contains(why), "{sentence}");
        }
        fs::remove_file(&file).unwrap();
        let sentence = refused(books, &args);
        assert!(sentence.contains("archive 1 is not finished, and its file"), "{sentence}");
        let elsewhere = ["receipts", "archive", "--before", BEFORE, "--out", "/dev/null/nowhere"];
        refused(books, &elsewhere);
        assert_eq!(receipts(&books.db).await, left);
        assert_no_drift(&books.db).await;

        fs::write(&file, text).unwrap();
        archive(books, BEFORE);
        assert!(receipts(&books.db).await.is_empty());
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_archived_neither_ends_nor_is_held_again() {
    both(async |books| {
        let ledger = books.ledger("a");
        let endings = fill(books, NOW, 8).await;
        // Held before, and lost with the database's last moments, so that it has not ended at all.
        let lost = hold_at(NOW.plus_seconds(60), wallet(1), None);
        archive(books, BEFORE);
        let kept = totals(books).await;
        for archived in &endings {
            // The same end, another, and the hold: of each kind of end, and from another node as well.
            let other = Ending::released(archived.hold.clone(), "gateway_stopped");
            let more = settled(&archived.hold, completion(200));
            for ending in [archived, &other, &more] {
                let again = books.ledger("b").end(ending).await;
                let refused = matches!(&again, Err(LedgerError::Db(error)) if !error.may_pass());
                assert!(refused, "{ending:?}: {again:?}");
            }
            let again = ledger.hold(&archived.hold).await;
            assert!(matches!(&again, Err(LedgerError::Db(e)) if e.is_check_violation()), "{again:?}");
        }
        assert!(ledger.end(&settled(&lost, completion(100))).await.is_err());
        assert_eq!(totals(books).await, kept);
        assert_no_drift(&books.db).await;

        // Others that come together with such a one are not concerned.
        let fresh = hold_at(LATER, wallet(2), None);
        let again = settled(&endings[0].hold, completion(100));
        let (held, refused) = tokio::join!(ledger.hold(&fresh), ledger.end(&again));
        assert_eq!((held.is_ok(), refused.is_err()), (true, true));
        let (refused, ended) =
            tokio::join!(ledger.end(&again), async { ledger.end(&settled(&fresh, completion(100))).await });
        assert_eq!((refused.is_err(), ended.unwrap().charged), (true, MicroUsdc::new(72)));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn a_receipt_stays_while_its_request_is_open_or_may_be_sent_again() {
    both(async |books| {
        let ledger = books.ledger("a");
        fill(books, NOW, 4).await;
        let directory = out(books);
        let args = ["receipts", "archive", "--before", BEFORE, "--out", directory.to_str().unwrap()];
        let open = hold_at(NOW.plus_seconds(5), wallet(1), None);
        ledger.hold(&open).await.unwrap();
        let sentence = refused(books, &args);
        assert!(
            sentence.contains("a request that began at 2026-04-07T12:00:05.000Z has not ended"),
            "{sentence}"
        );
        assert_eq!(books.number("SELECT COUNT(*) AS n FROM receipt_archives").await, 0);
        // Before it there may be an archive.
        assert!(archive(books, "2026-04-07T12:00:05Z").contains(" 1 receipts of before "));
        ledger.end(&settled(&open, completion(100))).await.unwrap();

        // What a payment bought, and what came to nothing: the payment may be sent again for ever.
        let hash = farebox::claims::request_hash("/v1/chat/completions", &[b"{}"]);
        let bought = [true, false].map(|is_settled| {
            let hold = hold_at(NOW.plus_seconds(10), wallet(1), None);
            let claim = Claim::of_payment(i64::from(is_settled) + 10, hash.clone());
            (hold, claim, is_settled)
        });
        for (hold, claim, is_settled) in &bought {
            ledger.hold_claimed(hold, claim).await.unwrap();
            let released = Ending::released(hold.clone(), "upstream_failed");
            let ending = if *is_settled { settled(hold, completion(100)) } else { released };
            ledger.end(&ending).await.unwrap();
        }
        assert!(archive(books, BEFORE).contains(" 4 receipts of before "));
        let left: Vec<_> = receipts(&books.db).await.iter().map(|row| row["id"].clone()).collect();
        let mut expected: Vec<_> = bought.iter().map(|(hold, ..)| json!(hold.id)).collect();
        expected.sort_by_key(|id| id.as_str().unwrap().to_owned());
        assert_eq!(left, expected);
        for (_, claim, is_settled) in &bought {
            let again = ledger.hold_claimed(&hold_at(LATER, wallet(1), None), claim).await;
            assert_eq!(matches!(again, Err(LedgerError::Claimed(_))), *is_settled, "{again:?}");
        }
        assert_no_drift(&books.db).await;

        for too_late in ["1", "0d", "2999-01-01", &Clock::System.now().rfc3339()] {
            let args = ["receipts", "archive", "--before", too_late, "--out", directory.to_str().unwrap()];
            let sentence = refused(books, &args);
            assert!(sentence.contains("receipts are kept for 2 days at least"), "{too_late}: {sentence}");
        }
        let args = ["receipts", "archive", "--before", "spring", "--out", directory.to_str().unwrap()];
        assert!(refused(books, &args).contains("\"spring\" is no day"));
    })
    .await;
}

#[tokio::test]
async fn nobody_takes_out_a_receipt_by_hand() {
    both(async |books| {
        fill(books, NOW, 8).await;
        fill(books, LATER, 4).await;
        let (before, directory) = (receipts(&books.db).await, out(books));
        let args = ["receipts", "archive", "--before", BEFORE, "--out", directory.to_str().unwrap()];
        let killed = farebox(books, &args).env("FAREBOX_CRASH_AT", "archive-written").output().unwrap();
        assert!(killed.status.code().is_none(), "{killed:?}");
        for statement in [
            "DELETE FROM receipts",
            "DELETE FROM receipts WHERE created_at_ms < (SELECT MAX(before_ms) FROM receipt_archives)",
            "UPDATE receipts SET charged_micro = 0",
            "UPDATE receipts SET charged_micro = 0 WHERE created_at_ms < (SELECT MAX(before_ms) FROM receipt_archives)",
        ] {
            let error = books.sql(statement).await.unwrap_err();
            assert!(error.is_check_violation() && error.to_string().contains("append-only"), "{error}");
        }
        assert_eq!(receipts(&books.db).await, before);
        archive(books, BEFORE);
        assert_eq!(receipts(&books.db).await, before[8..]);
    })
    .await;
}

/// With the words that let them go, and then in what is kept of them.
#[tokio::test]
async fn an_archive_that_is_tampered_with_is_found_by_the_audit() {
    const CHARGES: &str = "each charge has its receipt, each receipt its charge";
    const TOTALS: &str = "usage totals = the sums of receipts";
    const KEYS: &str = "spending of keys = their receipts and open holds";
    const ARCHIVES: &str = "what archives took out = the sums of their receipts";
    const ENDS_ONCE: &str = "a hold ends at most once";
    let cases: &[(&[&'static str], &[&str])] = &[
        (
            &[
                "INSERT INTO receipts_leaving SELECT id, 1 FROM receipts WHERE charged_micro > 0",
                "DELETE FROM receipts WHERE charged_micro > 0",
                "DELETE FROM receipts_leaving",
            ],
            &[CHARGES, TOTALS, KEYS],
        ),
        (&["INSERT INTO receipts_leaving SELECT id, 1 FROM receipts"], &[ARCHIVES]),
        (&["UPDATE archived_totals SET charged_micro = charged_micro + 1"], &[CHARGES, TOTALS, ARCHIVES]),
        (&["UPDATE archived_totals SET charges = charges - 1"], &[CHARGES]),
        (&["UPDATE archived_totals SET receipts = receipts - 1"], &[ARCHIVES]),
        (&["UPDATE archived_totals SET revenue_pico = revenue_pico - 1"], &[TOTALS]),
        (&["DELETE FROM archived_totals WHERE api_key_id = 2"], &[CHARGES, TOTALS, ARCHIVES]),
        (&["UPDATE archived_spending SET spent_micro = 0"], &[KEYS]),
        (&["UPDATE receipt_archives SET removed_charged_micro = 1"], &[ARCHIVES]),
        (&["UPDATE receipt_archives SET charged_micro = charged_micro + 1"], &[ARCHIVES]),
        (
            &["UPDATE holds SET created_at_ms = (SELECT MIN(before_ms) FROM receipt_archives) - 1"],
            &[ENDS_ONCE],
        ),
    ];
    for (statements, drift) in cases {
        both(async |books| {
            fill(books, NOW, 24).await;
            fill(books, LATER, 24).await;
            books.ledger("a").hold(&hold_at(LATER, wallet(1), None)).await.unwrap();
            archive(books, BEFORE);
            assert_no_drift(&books.db).await;
            for statement in *statements {
                assert!(books.sql(statement).await.unwrap() > 0, "{statement}");
            }
            let report = audit::run(&books.db, None).await.unwrap();
            let found: Vec<_> =
                report.0.iter().filter(|row| row.verdict == Verdict::Drift).map(|row| row.check).collect();
            assert_eq!(found, *drift, "{statements:?}:\n{report}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_a_server_that_serves_on_sqlite() {
    beside_a_server(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_a_server_that_serves_on_postgres() {
    beside_a_server(Some(fresh_database().await)).await;
}

async fn beside_a_server(database_url: Option<String>) {
    let gateway = Gateway::start_with(Setup { database_url, ..Setup::usual() }).await;
    let url = gateway.setup.database_url.clone();
    let url = url.unwrap_or_else(|| format!("sqlite://{}", gateway.database().display()));
    let customer = gateway.customer("1").await;
    let owner = Wallet(customer.wallet.address());
    // As the gateway wrote them long ago.
    let db = Db::open(&url, farebox::db::Access::Inspect).await.unwrap();
    let ledger = Ledger::new(db.clone(), Clock::fixed(NOW), "long-ago".into());
    let mut old = Vec::new();
    for number in 0..1000 {
        let hold = hold_at(NOW.plus_seconds(number), owner, Some(customer.key.id));
        old.push(ending(&hold, usize::try_from(number).unwrap()));
    }
    for part in old.chunks(200) {
        join_all(part.iter().map(async |ending| ledger.hold(&ending.hold).await.unwrap())).await;
        join_all(part.iter().map(async |ending| ledger.end(ending).await.unwrap())).await;
    }
    let list = async |query: &str| {
        let call = gateway.get(&format!("/v1/requests{query}")).key(&customer.key);
        call.send().await.expect(200).json()
    };
    let usage_path = format!("/v1/usage/{}", customer.wallet.address());
    let usage = async || gateway.get(&usage_path).key(&customer.key).send().await.expect(200).json();
    let (first, last) = (&old[0].hold.id, &old[999].hold.id);
    assert_eq!(gateway.receipt(&customer, first).await["charged_usdc"], 72);
    assert_eq!(members(&list("").await), ["data", "next_cursor"]);
    let used = usage().await;

    // Requests go on meanwhile, and none fails.
    let directory = gateway.directory().join("archive");
    let args = ["receipts", "archive", "--before", "90", "--out", directory.to_str().unwrap()];
    let output = std::thread::scope(|scope| {
        let archiving = scope.spawn(|| gateway.run_with(&args));
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                let mut answers = 0;
                while answers < 5 || (answers < 90 && !archiving.is_finished()) {
                    gateway.chat(&customer, &ask("Hello")).await.expect(200);
                    answers += 1;
                }
            });
        });
        archiving.join().unwrap()
    });
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8(output.stdout).unwrap().contains(" 1000 receipts of before "));
    assert_eq!(archived(&directory).len(), 1000);

    let mut error = Value::Null;
    for id in [first, last] {
        let answer = gateway.get(&format!("/v1/requests/{id}")).key(&customer.key).send().await;
        error = answer.error(410, "request_archived");
    }
    let listed = list("?limit=100").await;
    let horizon = listed["archived_before"].as_str().unwrap();
    assert!(error["message"].as_str().unwrap().contains(horizon), "{error}");
    let data = listed["data"].as_array().unwrap();
    assert!(data.iter().all(|receipt| receipt["created_at"].as_str().unwrap() > horizon), "{listed}");
    assert_eq!(listed["next_cursor"], Value::Null);
    let newest = data[0]["id"].as_str().unwrap();
    assert_eq!(gateway.receipt(&customer, newest).await["charged_usdc"], data[0]["charged_usdc"]);
    for unknown in [&Entropy.request_id(Clock::System.now().millis()), "req_1"] {
        let answer = gateway.get(&format!("/v1/requests/{unknown}")).key(&customer.key).send().await;
        answer.error(404, "request_not_found");
    }
    let count = |usage: &Value| usage["keys"][0]["request_count"].as_u64().unwrap();
    let settled = u64::try_from(data.len()).unwrap();
    assert_eq!(count(&usage().await), count(&used) + settled);
    db.close().await;
    gateway.audit();
}
