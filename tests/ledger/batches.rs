//! Operations that come while others are being committed, and go into the books together.
//!
//! The tests here run on one thread: what is asked for before anything is waited for is one batch.

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};

use farebox::claims::Claim;
use farebox::clock::Clock;
use farebox::db::{Access, Arg, Db, DbTx, Driver};
use farebox::ledger::{Balance, Ended, Ending, Hold, Ledger, LedgerError, Outcome};
use farebox::money::MicroUsdc;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, join_all};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use super::{at_once, make_key};
use crate::support::books::{
    Books, NOW, assert_no_drift, balance, both, completion, credit, hold, settled, wallet,
};
use crate::support::in_time;
use crate::support::postgres::Postgres;

/// Operations that go together at most: see `ledger::writer`, as for the next two.
const BATCH: usize = 256;
const WAITING_HOLDS: usize = 4096;
const WAITING_HOLDS_OF_A_WALLET: usize = 1024;

/// The same on both of what a hold and an end come to.
type Answer = Result<Ended, LedgerError>;

#[derive(Clone, Debug)]
enum Operation {
    Hold(Hold),
    Claimed(Hold, Claim),
    End(Ending),
}

impl Operation {
    async fn run(&self, ledger: &Ledger) -> Answer {
        let held = |balance: Balance| Ended { charged: MicroUsdc::ZERO, balance };
        match self {
            Self::Hold(hold) => ledger.hold(hold).await.map(held),
            Self::Claimed(hold, claim) => ledger.hold_claimed(hold, claim).await.map(held),
            Self::End(ending) => ledger.end(ending).await,
        }
    }
}

/// Asks for all of it before any of it can be begun.
async fn together(books: &Books, ledger: &Ledger, operations: &[Operation]) -> Vec<Answer> {
    // On SQLite a thread waits for its turn; on PostgreSQL a task begins when this one waits.
    let turn = books.db.begin().await.unwrap();
    let mut asked = pin!(join_all(operations.iter().map(|operation| operation.run(ledger))));
    assert!(asked.as_mut().now_or_never().is_none() || operations.is_empty());
    drop(turn);
    asked.await
}

fn held(micro: i64, locked: i64) -> Ended {
    Ended { charged: MicroUsdc::ZERO, balance: balance(micro, locked) }
}

fn charged(micro: i64, left: i64, locked: i64) -> Ended {
    Ended { charged: MicroUsdc::new(micro), balance: balance(left, locked) }
}

fn named(name: &str, body: &[u8]) -> Claim {
    Claim::of_key(name, farebox::claims::request_hash("/v1/chat/completions", &[body]))
}

#[tokio::test]
async fn what_comes_together_is_one_transaction() {
    let books = Books::postgres().await;
    let ledger = books.ledger("a");
    let mut holds = Vec::new();
    for number in 0..100 {
        let payer = wallet(number);
        books.credit(payer, 1000).await;
        holds.push(Operation::Hold(hold(format!("req_{number}"), payer, 10)));
    }
    assert!(together(&books, &ledger, &holds).await.iter().all(Result::is_ok));
    assert_eq!(books.number("SELECT COUNT(DISTINCT CAST(xmin AS TEXT)) AS n FROM holds").await, 1);
    books.discard().await;
}

#[tokio::test]
async fn each_of_a_batch_is_decided_as_if_it_came_alone() {
    both(async |books| {
        let (ledger, payer, other) = (books.ledger("a"), wallet(1), wallet(2));
        books.credit(payer, 1000).await;
        books.credit(other, 100).await;
        let (first, second) = (hold("req_1", payer, 300), hold("req_2", payer, 300));
        ledger.hold(&first).await.unwrap();
        ledger.hold(&second).await.unwrap();

        let third = hold("req_3", payer, 400);
        let answers = together(
            books,
            &ledger,
            &[
                // Of the payer, one after the other.
                Operation::Hold(hold("req_9", payer, 401)),
                Operation::Hold(third.clone()),
                Operation::Hold(hold("req_8", payer, 1)),
                Operation::End(settled(&first, completion(100))),
                Operation::End(Ending::released(first.clone(), "late")),
                Operation::Hold(hold("req_7", payer, 228)),
                Operation::Hold(first.clone()),
                Operation::Hold(third.clone()),
                Operation::End(settled(&hold("req_2", payer, 299), completion(1))),
                Operation::End(Ending::released(second.clone(), "upstream_failed")),
                // Of another, in the midst of it.
                Operation::Hold(hold("req_6", other, 60)),
                Operation::Hold(hold("req_5", other, 60)),
                Operation::End(settled(&hold("req_4", other, 70), completion(100))),
            ],
        )
        .await;
        let answers: Vec<_> = answers.iter().map(|answer| format!("{answer:?}")).collect();
        let insufficient =
            |required, balance| LedgerError::Insufficient { required: MicroUsdc::new(required), balance };
        let conflict = |id: &str| Err(LedgerError::Conflict(id.into()));
        let expected: [Answer; 13] = [
            Err(insufficient(401, balance(1000, 600))),
            Ok(held(1000, 1000)),
            Err(insufficient(1, balance(1000, 1000))),
            Ok(charged(72, 928, 700)),
            conflict("req_1"),
            Ok(held(928, 928)),
            conflict("req_1"),
            Ok(held(928, 928)),
            conflict("req_2"),
            Ok(charged(0, 928, 628)),
            Ok(held(100, 60)),
            Err(insufficient(60, balance(100, 60))),
            // Its hold was lost: what is available, at most.
            Ok(charged(40, 60, 60)),
        ];
        assert_eq!(answers, expected.map(|answer| format!("{answer:?}")));
        assert_eq!(ledger.balance(payer).await.unwrap(), balance(928, 628));
        assert_eq!(ledger.open_holds().await.unwrap(), (3, MicroUsdc::new(688)));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn a_hold_and_its_end_may_come_together() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        make_key(books, 1, Some(500), None).await;
        let keyed = Hold { api_key_id: Some(1), ..hold("req_1", payer, 400) };
        let next = Hold { id: "req_2".into(), ..keyed.clone() };
        let ending = settled(&keyed, completion(100));
        let answers = together(
            books,
            &ledger,
            &[
                Operation::Hold(keyed.clone()),
                Operation::End(ending.clone()),
                Operation::End(ending),
                Operation::Hold(next),
            ],
        )
        .await;
        let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
        assert_eq!(answers, [held(1000, 400), charged(72, 928, 0), charged(72, 928, 0), held(928, 400)]);
        assert_eq!(ledger.receipt(payer, "req_1").await.unwrap().unwrap().reason, None, "it was not lost");
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn of_a_name_that_many_claim_together_one_gets_it() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        let claim = named("once", b"{}");
        let other = named("once", b"{ }");
        let mut operations: Vec<_> = (0..20)
            .map(|number| Operation::Claimed(hold(format!("req_{number}"), payer, 10), claim.clone()))
            .collect();
        operations.push(Operation::Claimed(hold("req_20", payer, 10), other.clone()));
        // Also where there is nothing left to hold: what is there already is worth asking for.
        operations.push(Operation::Claimed(hold("req_21", payer, 5000), claim.clone()));
        let answers = together(books, &ledger, &operations).await;
        assert_eq!(*answers[0].as_ref().unwrap(), held(1000, 10));
        for (number, answer) in answers.iter().enumerate().skip(1) {
            let Err(LedgerError::Claimed(claimed)) = answer else { panic!("{answer:?}") };
            assert_eq!((claimed.request_id.as_str(), claimed.is_same_request), ("req_0", number != 20));
        }

        // What comes to nothing gives its name back, in the same batch as well; to the same request alone.
        let answers = together(
            books,
            &ledger,
            &[
                Operation::End(Ending::released(hold("req_0", payer, 10), "upstream_failed")),
                Operation::Claimed(hold("req_30", payer, 10), other),
                Operation::Claimed(hold("req_31", payer, 10), claim.clone()),
                Operation::Claimed(hold("req_32", payer, 10), claim.clone()),
            ],
        )
        .await;
        assert_eq!((answers[0].is_ok(), answers[2].is_ok()), (true, true), "{answers:?}");
        for (answer, has_it) in [(&answers[1], "req_0"), (&answers[3], "req_31")] {
            assert!(matches!(answer, Err(LedgerError::Claimed(c)) if c.request_id == has_it), "{answer:?}");
        }
        let again = ledger.hold_claimed(&hold("req_33", payer, 10), &claim).await;
        assert!(matches!(again, Err(LedgerError::Claimed(c)) if c.request_id == "req_31"));
        assert_no_drift(&books.db).await;
    })
    .await;
}

// ---- whatever comes together, against the same one after the other

/// Of each wallet: ids and names are its own, so that only the order of its own operations matters.
#[derive(Clone, Debug)]
enum Step {
    Hold { wallet: u8, id: u8, other_amount: bool, claim: Option<(u8, bool)> },
    End { wallet: u8, id: u8, other_amount: bool, tokens: Option<u64>, above: bool },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let rarely = || prop::bool::weighted(0.1);
    // Of the last wallet nobody has heard.
    let hold = (0u8..4, 0u8..12, rarely(), prop::option::of((0u8..3, rarely())));
    let hold =
        hold.prop_map(|(wallet, id, other_amount, claim)| Step::Hold { wallet, id, other_amount, claim });
    let tokens = prop::option::weighted(0.7, prop::sample::select(vec![0u64, 1, 100, 10_000]));
    let end = (0u8..4, 0u8..12, rarely(), tokens, rarely());
    let end = end.prop_map(|(wallet, id, other_amount, tokens, above)| Step::End {
        wallet,
        id,
        other_amount,
        tokens,
        above,
    });
    prop::collection::vec(prop_oneof![hold, end], 150)
}

impl Step {
    fn operation(&self) -> Operation {
        let hold_of = |number: u8, id: u8, other_amount: bool| {
            let amount = 40 + 30 * i64::from(id) + i64::from(other_amount);
            let mut hold = hold(format!("req_{number}_{id}"), wallet(number), amount);
            // The end of a hold is of the same key.
            let is_keyed = number < 3 && id.is_multiple_of(2);
            hold.api_key_id = is_keyed.then_some(i64::from(number) + 1);
            hold
        };
        match *self {
            Self::Hold { wallet, id, other_amount, claim } => {
                let hold = hold_of(wallet, id, other_amount);
                match claim {
                    None => Operation::Hold(hold),
                    Some((name, other)) => {
                        let body: &[u8] = if other { b"other" } else { b"same" };
                        Operation::Claimed(hold, named(&name.to_string(), body))
                    }
                }
            }
            Self::End { wallet, id, other_amount, tokens, above } => {
                let hold = hold_of(wallet, id, other_amount);
                let mut ending = match tokens {
                    Some(tokens) => settled(&hold, completion(tokens)),
                    None => Ending::released(hold.clone(), "upstream_failed"),
                };
                if above {
                    ending.outcome = Outcome::Estimated;
                    ending.charge.charged = MicroUsdc::new(hold.amount.get() + 1);
                }
                Operation::End(ending)
            }
        }
    }
}

#[test]
fn a_batch_comes_to_what_its_operations_come_to_one_by_one() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = Config {
        cases: 12,
        failure_persistence: None,
        max_shrink_iters: 60,
        max_shrink_time: 60_000,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&steps(), |steps| runtime.block_on(compare(&steps)))
        .unwrap_or_else(|failure| panic!("{failure}"));
}

async fn compare(steps: &[Step]) -> Result<(), TestCaseError> {
    let operations: Vec<_> = steps.iter().map(Step::operation).collect();
    let (alone, sqlite, postgres) = tokio::join!(Books::sqlite(), Books::sqlite(), Books::postgres());
    for books in [&alone, &sqlite, &postgres] {
        for number in 0..3u8 {
            books.credit(wallet(number), 1000 + 500 * i64::from(number)).await;
            let insert = "INSERT INTO api_keys (id, wallet, key_sha256, created_at_ms, spend_cap_micro)
                          VALUES ($1, $2, $3, 0, 900)";
            let key = i64::from(number) + 1;
            let mut tx = books.db.begin().await.unwrap();
            let args = vec![Arg::from(key), Arg::from(wallet(number)), Arg::from(format!("hash of {key}"))];
            tx.execute(insert, args).await.unwrap();
            tx.commit().await.unwrap();
        }
    }
    let mut expected = Vec::new();
    let ledger = alone.ledger("a");
    for operation in &operations {
        expected.push(format!("{:?}", operation.run(&ledger).await));
    }
    let expected_rows = rows(&alone).await;
    for books in [&sqlite, &postgres] {
        let ledger = books.ledger("a");
        let mut answers = Vec::new();
        // The first few alone, then ever more together.
        let mut rest = operations.as_slice();
        for size in [1, 2, 5, 30, 112] {
            let (batch, left) = rest.split_at(size);
            answers.extend(
                together(books, &ledger, batch).await.into_iter().map(|answer| format!("{answer:?}")),
            );
            rest = left;
        }
        for (number, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
            let asked = &operations[number];
            prop_assert_eq!(answer, expected, "{} to the {}th, {:?}", books.db.kind(), number, asked);
        }
        prop_assert_eq!(rows(books).await, expected_rows.clone(), "{}", books.db.kind());
    }
    for books in [alone, sqlite, postgres] {
        let report = farebox::audit::run(&books.db, None).await.unwrap();
        prop_assert!(!report.has_drift(), "{}: {}", books.db.kind(), report);
        books.discard().await;
    }
    Ok(())
}

/// All that the books say.
async fn rows(books: &Books) -> Vec<String> {
    let mut rows = Vec::new();
    for query in [
        "SELECT address || ' ' || balance_micro || ' ' || locked_micro || ' ' || seq AS row FROM wallets
         WHERE seq > 0 OR locked_micro > 0",
        "SELECT id || ' ' || wallet || ' ' || amount_micro || ' ' || terms AS row FROM holds",
        "SELECT id || ' ' || wallet || ' ' || outcome || ' ' || COALESCE(reason, '') || ' ' || hold_micro
             || ' ' || charged_micro || ' ' || cost_pico || ' ' || terms AS row FROM receipts",
        "SELECT wallet || ' ' || seq || ' ' || kind || ' ' || reference || ' ' || amount_micro || ' '
             || balance_after_micro AS row FROM entries",
        "SELECT wallet || ' ' || api_key_id || ' ' || request_count || ' ' || completion_tokens || ' '
             || charged_micro || ' ' || revenue_pico AS row FROM usage_totals",
        "SELECT api_key_id || ' ' || day || ' ' || spent_micro || ' ' || held_micro AS row FROM key_spending",
        "SELECT wallet || ' ' || name || ' ' || request_hash || ' ' || request_id AS row FROM claims",
    ] {
        for row in books.db.rows(query, vec![]).await.unwrap() {
            rows.push(row.text("row").unwrap());
        }
    }
    rows.sort();
    rows
}

// ---- what the database refuses

#[tokio::test]
async fn an_operation_that_the_database_refuses_fails_alone() {
    both(async |books| {
        let ledger = books.ledger("a");
        for payer in 1..=3 {
            books.credit(wallet(payer), 1000).await;
        }
        let open = hold("req_1", wallet(1), 300);
        ledger.hold(&open).await.unwrap();
        let answers = together(
            books,
            &ledger,
            &[
                Operation::End(settled(&open, completion(100))),
                Operation::Hold(hold("req_2", wallet(2), -1)),
                Operation::Hold(hold("req_3", wallet(2), 100)),
                Operation::Hold(hold("req_4", wallet(3), 100)),
            ],
        )
        .await;
        assert_eq!(*answers[0].as_ref().unwrap(), charged(72, 928, 0));
        let refused = matches!(&answers[1], Err(LedgerError::Db(error)) if error.is_check_violation());
        assert!(refused, "{:?}", answers[1]);
        assert_eq!(*answers[2].as_ref().unwrap(), held(1000, 100));
        assert_eq!(*answers[3].as_ref().unwrap(), held(1000, 100));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn an_error_in_mid_batch_fails_all_of_it_and_leaves_nothing_half_done() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        books.credit(wallet(2), 1000).await;
        let open = hold("req_1", payer, 300);
        ledger.hold(&open).await.unwrap();
        let before = rows(books).await;
        let operations = [
            Operation::Hold(hold("req_2", wallet(2), 100)),
            Operation::End(settled(&open, completion(100))),
            Operation::Hold(hold("req_3", payer, 100)),
        ];
        // One of the last to be written.
        books.sql("ALTER TABLE usage_totals RENAME TO elsewhere").await.unwrap();
        let answers = together(books, &ledger, &operations).await;
        for answer in answers {
            assert!(matches!(&answer, Err(LedgerError::Db(error)) if error.may_pass()), "{answer:?}");
        }
        books.sql("ALTER TABLE elsewhere RENAME TO usage_totals").await.unwrap();
        assert_eq!(rows(books).await, before);
        assert!(together(books, &ledger, &operations).await.iter().all(Result::is_ok));
        assert_no_drift(&books.db).await;
    })
    .await;
}

// ---- too many, and of one wallet

/// Keeps wallets' operations from being done: on PostgreSQL theirs, on SQLite all.
async fn take(books: &Books, wallets: impl IntoIterator<Item = u8>) -> DbTx {
    let mut tx = books.db.begin().await.unwrap();
    for number in wallets {
        let sql = "UPDATE wallets SET locked_micro = locked_micro WHERE address = $1";
        tx.execute(sql, vec![Arg::from(wallet(number))]).await.unwrap();
    }
    tx
}

type Held = BoxFuture<'static, Result<Balance, LedgerError>>;

/// Asks for holds of one micro-USDC; returns those that wait, and how many were refused at once.
fn ask_for(ledger: &Ledger, payer: u8, count: usize) -> (Vec<Held>, usize) {
    let (mut waiting, mut refused) = (Vec::new(), 0);
    for number in 0..count {
        let (ledger, hold) = (ledger.clone(), hold(format!("req_{payer}_{number}"), wallet(payer), 1));
        let mut held = async move { ledger.hold(&hold).await }.boxed();
        match (&mut held).now_or_never() {
            None => waiting.push(held),
            Some(Err(LedgerError::Overloaded)) => refused += 1,
            Some(other) => panic!("it was to wait or to be refused: {other:?}"),
        }
    }
    (waiting, refused)
}

#[tokio::test]
async fn a_wallet_with_too_many_waiting_is_refused_at_once_and_neither_its_ends_nor_others_are() {
    both(async |books| {
        let ledger = books.ledger("a");
        books.credit(wallet(1), 100_000).await;
        books.credit(wallet(2), 1000).await;
        let open = hold("req_1", wallet(1), 300);
        ledger.hold(&open).await.unwrap();
        let taken = take(books, [1]).await;
        let (waiting, refused) = ask_for(&ledger, 1, 2000);
        assert_eq!(waiting.len(), WAITING_HOLDS_OF_A_WALLET);
        assert_eq!(waiting.len() + refused, 2000);
        let ending = settled(&open, completion(100));
        let mut end = pin!(ledger.end(&ending));
        assert!(end.as_mut().now_or_never().is_none(), "it waits");
        let another = hold("req_2", wallet(2), 100);
        let mut other = pin!(ledger.hold(&another));
        if books.is_postgres() {
            // Only the one wallet is taken, so that others do not even wait.
            assert_eq!(in_time("another wallet's hold", other).await.unwrap(), balance(1000, 100));
            drop(taken);
        } else {
            assert!(other.as_mut().now_or_never().is_none(), "it waits");
            drop(taken);
            assert_eq!(in_time("another wallet's hold", other).await.unwrap(), balance(1000, 100));
        }
        let locked = i64::try_from(waiting.len()).unwrap();
        for held in in_time("the holds that wait", join_all(waiting)).await {
            held.unwrap();
        }
        assert_eq!(in_time("the end", end).await.unwrap().charged, MicroUsdc::new(72));
        assert_eq!(ledger.balance(wallet(1)).await.unwrap(), balance(100_000 - 72, locked));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn when_too_many_wait_altogether_holds_are_refused_at_once_and_ends_are_not() {
    both(async |books| {
        let ledger = books.ledger("a");
        for payer in 1..=5 {
            books.credit(wallet(payer), 100_000).await;
        }
        let open = hold("req_1", wallet(5), 300);
        ledger.hold(&open).await.unwrap();
        let taken = take(books, 1..=5).await;
        let mut waiting = Vec::new();
        for payer in 1..=4 {
            waiting.extend(ask_for(&ledger, payer, WAITING_HOLDS_OF_A_WALLET).0);
        }
        assert_eq!(waiting.len(), WAITING_HOLDS);
        let (more, refused) = ask_for(&ledger, 5, 10);
        assert_eq!((more.len(), refused), (0, 10), "there is room no more");
        let ending = settled(&open, completion(100));
        let mut end = pin!(ledger.end(&ending));
        assert!(end.as_mut().now_or_never().is_none(), "it waits");
        drop(taken);
        assert_eq!(in_time("the end", end).await.unwrap(), charged(72, 100_000 - 72, 0));
        for held in in_time("the holds that wait", join_all(waiting)).await {
            held.unwrap();
        }
        ledger.hold(&hold("req_2", wallet(5), 300)).await.unwrap();
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn a_wallet_with_many_waiting_does_not_delay_another() {
    // Where the writer is a task of this thread, so that it is seen after which of the many the other came.
    let books = Books::postgres().await;
    let ledger = books.ledger("a");
    books.credit(wallet(1), 1000).await;
    books.credit(wallet(2), 1000).await;
    let done = AtomicUsize::new(0);
    let many = join_all((0..1000).map(async |number| {
        ledger.hold(&hold(format!("req_{number}"), wallet(1), 1)).await.unwrap();
        done.fetch_add(1, Ordering::Relaxed);
    }));
    let one = async {
        ledger.hold(&hold("req_other", wallet(2), 1)).await.unwrap();
        done.load(Ordering::Relaxed)
    };
    let (_, done_before) = tokio::join!(many, one);
    assert!(done_before < BATCH, "{done_before} of the thousand were done before");
    books.discard().await;
}

// ---- nodes, the disk, and the end

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_with_the_same_wallets_agree() {
    let books = Books::postgres().await;
    // The second has connections of its own, as another process would.
    let elsewhere = Db::open(&books.url, Access::Serve).await.unwrap();
    let nodes = [books.ledger("one"), Ledger::new(elsewhere.clone(), books.clock.clone(), "two".into())];
    const WALLETS: usize = 8;
    for payer in 1..=8 {
        books.credit(wallet(payer), 5000).await;
    }
    let charged = at_once(64, |caller| {
        let node = nodes[caller % 2].clone();
        async move {
            let mut charged = 0;
            for round in 0..15 {
                let payer = wallet(u8::try_from((caller * 7 + round * 3) % WALLETS + 1).unwrap());
                let held = hold(format!("req_{caller}_{round}"), payer, 144);
                match node.hold(&held).await {
                    Ok(_) => {
                        charged += node.end(&settled(&held, completion(100))).await.unwrap().charged.get()
                    }
                    Err(LedgerError::Insufficient { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            charged
        }
    });
    let charged: i64 = in_time("two nodes", charged).await.into_iter().sum();
    let mut left = 0;
    for payer in 1..=8 {
        let payer = nodes[0].balance(wallet(payer)).await.unwrap();
        assert_eq!(payer.locked, MicroUsdc::ZERO);
        assert!(payer.balance.get() < 144, "there was money left, and holds were refused");
        left += payer.balance.get();
    }
    assert_eq!(left + charged, 8 * 5000);
    assert_no_drift(&books.db).await;
    elsewhere.close().await;
    books.discard().await;
}

#[tokio::test]
async fn on_postgres_only_holds_without_a_name_do_not_wait_for_the_disk() {
    let server = Postgres::durable().await;
    let db = Db::open(&server.fresh_database().await, Access::Serve).await.unwrap();
    let ledger = Ledger::new(db.clone(), Clock::fixed(NOW), "a".into());
    let mut tx = db.begin().await.unwrap();
    credit(&ledger, &mut tx, wallet(1), MicroUsdc::new(100_000), 1).await.unwrap();
    tx.commit().await.unwrap();
    let is_on_disk = async || {
        // Where a page begins the two differ by its header.
        let query = "SELECT CAST(pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn() AS BIGINT) AS n";
        db.row(query, vec![]).await.unwrap().unwrap().int("n").unwrap() < 64
    };
    let mut relaxed = 0;
    for number in 0..10 {
        let held = hold(format!("req_{number}"), wallet(1), 300);
        ledger.hold(&held).await.unwrap();
        relaxed += usize::from(!is_on_disk().await);
        ledger.end(&settled(&held, completion(1))).await.unwrap();
        assert!(is_on_disk().await, "the {number}th end");
        let claim = named(&number.to_string(), b"{}");
        ledger.hold_claimed(&hold(format!("req_named_{number}"), wallet(1), 1), &claim).await.unwrap();
        assert!(is_on_disk().await, "the {number}th hold with a name");
    }
    // The server writes by itself as well, five times a second.
    assert!(relaxed >= 5, "{relaxed} of 10 holds were not waited for");
    db.close().await;
}

#[tokio::test]
async fn on_sqlite_only_what_must_last_waits_for_the_disk() {
    let books = Books::sqlite().await;
    let Driver::Sqlite(file) = books.db.driver() else { panic!("it is SQLite") };
    let mut turn = file.turn().await.unwrap();
    // In turn, on the same connection: whatever was before, each has its own.
    for must_last in [false, true, true, false, false, true] {
        turn.begin(must_last).unwrap();
        let setting = turn
            .prepare("SELECT synchronous FROM pragma_synchronous")
            .unwrap()
            .query_row([], |row| row.get(0));
        assert_eq!(setting, Ok(if must_last { 2 } else { 1 }));
        turn.commit().unwrap();
    }
    // Whoever writes otherwise always waits, on a connection of its own.
    drop(turn);
    let mut tx = books.db.begin().await.unwrap();
    let row = tx.row("SELECT synchronous AS n FROM pragma_synchronous", vec![]).await.unwrap().unwrap();
    assert_eq!(row.int("n").unwrap(), 2);
    drop(tx);
    books.discard().await;
}

#[tokio::test]
async fn a_hold_is_told_early_once_nobody_can_take_its_money_and_before_it_is_committed() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        // Whoever is told early may end it at once: the end waits for the commit.
        let mut ends = Vec::new();
        for number in 0..20 {
            let held = hold(format!("req_{number}"), payer, 50);
            assert_eq!(ledger.hold_early(&held).await.unwrap(), balance(1000, 50 * (number + 1)));
            ends.push(settled(&held, completion(10)));
        }
        let none_left = ledger.hold_early(&hold("req_20", payer, 1)).await;
        assert!(matches!(none_left, Err(LedgerError::Insufficient { .. })), "{none_left:?}");
        for ending in &ends {
            assert_eq!(ledger.end(ending).await.unwrap().charged, ending.charge.charged);
            let receipt = ledger.receipt(payer, &ending.hold.id).await.unwrap().unwrap();
            assert_eq!(receipt.reason, None, "it was not lost");
        }
        assert_no_drift(&books.db).await;
    })
    .await;
}

/// A plan made while the tables were empty is kept; it must do when they are not.
#[tokio::test]
async fn no_table_is_read_whole_for_a_batch() {
    let books = Books::postgres().await;
    let ledger = books.ledger("a");
    books.credit(wallet(1), 1_000_000).await;
    for round in 0..20 {
        let holds: Vec<_> =
            (0..30).map(|number| hold(format!("req_{round}_{number}"), wallet(1), 100)).collect();
        let ends: Vec<_> = holds.iter().map(|hold| Operation::End(settled(hold, completion(1)))).collect();
        let claim = |number: usize| named(&format!("{round} {number}"), b"{}");
        let claimed = |(number, hold)| Operation::Claimed(hold, claim(number));
        let holds: Vec<_> = holds.into_iter().enumerate().map(claimed).collect();
        for operations in [holds, ends] {
            assert!(together(&books, &ledger, &operations).await.iter().all(Result::is_ok));
        }
    }
    // What a connection did is counted when it ends.
    books.db.close().await;
    let look = Db::open(&books.url, Access::Inspect).await.unwrap();
    let read_whole = crate::support::eventually("all is counted", async || {
        let query = "SELECT CAST(SUM(seq_tup_read) AS BIGINT) AS n,
                            CAST(SUM(CASE WHEN relname = 'receipts' THEN n_tup_ins END) AS BIGINT) AS receipts
                     FROM pg_stat_user_tables WHERE relname IN ('wallets', 'holds', 'receipts', 'claims')";
        let row = look.row(query, vec![]).await.unwrap().unwrap();
        (row.int("receipts").unwrap() == 600).then(|| row.int("n").unwrap())
    });
    assert_eq!(read_whole.await, 0);
    look.close().await;
    books.discard().await;
}

/// However long the history is, a page of it costs a page.
#[tokio::test]
async fn a_page_in_the_midst_of_a_long_history_is_not_counted_off() {
    const RECEIPTS: i64 = 2000;
    let books = Books::postgres().await;
    let ledger = books.ledger("a");
    books.credit(wallet(1), 1_000_000).await;
    let hold_at = |number: i64| Hold {
        created_at: books.clock.now().plus_seconds(number),
        ..hold(format!("req_{number:04}"), wallet(1), 100)
    };
    let holds: Vec<_> = (0..RECEIPTS).map(hold_at).collect();
    for part in holds.chunks(500) {
        let held: Vec<_> = part.iter().cloned().map(Operation::Hold).collect();
        let ends: Vec<_> = part.iter().map(|hold| Operation::End(settled(hold, completion(1)))).collect();
        for operations in [held, ends] {
            assert!(together(&books, &ledger, &operations).await.iter().all(Result::is_ok));
        }
    }
    books.sql("ANALYZE receipts").await.unwrap();
    let read = "SELECT CAST(COALESCE(SUM(idx_tup_read), 0) AS BIGINT) AS n FROM pg_stat_user_indexes
                WHERE relname = 'receipts'";
    // What a connection did is counted when it ends.
    books.db.close().await;
    let look = Db::open(&books.url, Access::Inspect).await.unwrap();
    let before = look.row(read, vec![]).await.unwrap().unwrap().int("n").unwrap();
    let reader = Db::open(&books.url, Access::Inspect).await.unwrap();
    let midst = &holds[1000];
    let from = Some((midst.created_at, midst.id.clone()));
    let page =
        Ledger::new(reader.clone(), books.clock.clone(), "b".into()).receipts(wallet(1), from, 20).await;
    let ids: Vec<_> = page.unwrap().into_iter().map(|receipt| receipt.id).collect();
    assert_eq!(ids, holds[980..1000].iter().rev().map(|hold| hold.id.clone()).collect::<Vec<_>>());
    reader.close().await;
    let read_of_it = crate::support::eventually("it is counted", async || {
        let now = look.row(read, vec![]).await.unwrap().unwrap().int("n").unwrap();
        (now > before).then_some(now - before)
    });
    let read_of_it = read_of_it.await;
    assert!(read_of_it <= 40, "{read_of_it} entries of the index were read for a page of 20");
    look.close().await;
    books.discard().await;
}

#[tokio::test]
async fn what_was_asked_for_is_done_though_nobody_waits() {
    both(async |books| {
        let ledger = books.ledger("a");
        books.credit(wallet(1), 1000).await;
        let held = hold("req_1", wallet(1), 300);
        {
            let mut asked = pin!(ledger.hold(&held));
            assert!(asked.as_mut().now_or_never().is_none());
        }
        in_time("what is on its way", ledger.idle()).await;
        assert_eq!(ledger.balance(wallet(1)).await.unwrap(), balance(1000, 300));
        // And it goes on from there.
        ledger.end(&settled(&held, completion(100))).await.unwrap();
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn nothing_is_left_in_sqlites_log_by_who_closes_last() {
    let books = Books::sqlite().await;
    let log = books.scratch.path().join("books.db-wal");
    let ledger = books.ledger("a");
    books.credit(wallet(1), 1000).await;
    ledger.hold(&hold("req_1", wallet(1), 300)).await.unwrap();
    assert!(log.exists());
    books.db.close().await;
    assert!(!log.exists(), "who copies the file alone would miss what is in its log");
}

/// SQLite makes a table of a list of more than two for each row that it is compared with.
#[tokio::test]
async fn sqlite_makes_no_tables_to_check_what_every_request_writes() {
    let books = Books::sqlite().await;
    // Of a connection that only reads, SQLite leaves out what it would never come to.
    let mut tx = books.db.begin().await.unwrap();
    for insert in [
        "EXPLAIN INSERT INTO entries (wallet, seq, kind, reference, amount_micro, balance_before_micro,
             balance_after_micro, contra_account, contra_micro, created_at_ms)
         VALUES ('', 1, 'charge', '', -1, 1, 0, 'revenue', 1, 0)",
        "EXPLAIN INSERT INTO receipts (id, wallet, model, outcome, hold_micro, charged_micro, cost_pico,
             prompt_tokens, cached_tokens, completion_tokens, terms, created_at_ms, ended_at_ms)
         VALUES ('', '', '', 'settled', 0, 0, 0, 0, 0, 0, '', 0, 0)",
    ] {
        let steps = tx.rows(insert, vec![]).await.unwrap();
        let steps: Vec<_> = steps.iter().map(|step| step.text("opcode").unwrap()).collect();
        assert!(steps.iter().any(|step| step == "Insert"), "{steps:?}");
        assert!(!steps.iter().any(|step| step == "OpenEphemeral"), "{insert}");
    }
    // And what they refused they refuse.
    let wallet = "INSERT INTO wallets (address, balance_micro, seq, created_at_ms) VALUES ('0x', 1, 1, 0)";
    tx.execute(wallet, vec![]).await.unwrap();
    for (kind, contra) in [("gift", "revenue"), ("charge", "nobody")] {
        let entry = "INSERT INTO entries (wallet, seq, kind, reference, amount_micro, balance_before_micro,
                         balance_after_micro, contra_account, contra_micro, created_at_ms)
                     VALUES ('0x', 1, $1, '', -1, 1, 0, $2, 1, 0)";
        let refused = tx.execute(entry, vec![Arg::from(kind), Arg::from(contra)]).await.unwrap_err();
        assert!(refused.is_check_violation(), "{refused}");
    }
    drop(tx);
    books.discard().await;
}
