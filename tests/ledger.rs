//! The books: each behaviour written once and run on SQLite and on PostgreSQL.

mod batches;
mod model;

use std::sync::Arc;

use farebox::clock::{Clock, Timestamp};
use farebox::db::{Access, Arg, Db, DbError};
use farebox::ledger::{Balance, Ended, Ending, HOLD_LOST, Hold, Ledger, LedgerError, Outcome, Spending};
use farebox::money::{MicroUsdc, PicoUsd};
use farebox::pricing::{Unit, Usage};
use tokio::sync::Barrier;

use crate::support::books::{
    Books, NOW, assert_no_drift, balance, both, completion, credit, hold, settled, terms, wallet,
};
use crate::support::eventually;

// ---- what holds, settlements, releases and credits do

#[tokio::test]
async fn a_hold_locks_and_its_settlement_charges() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        let mut held = hold("req_1", payer, 300);
        held.api_key_id = Some(7);
        assert_eq!(ledger.hold(&held).await.unwrap(), balance(1000, 300));
        assert_eq!(ledger.open_holds().await.unwrap(), (1, MicroUsdc::new(300)));

        books.clock.advance_seconds(5);
        let mut ending = settled(&held, Usage::tokens(12, 9).with(Unit::CachedPrompt, 8));
        ending.usage_raw = Some(r#"{"prompt_tokens":20,"completion_tokens":9}"#.into());
        // (12 × 0.15 + 8 × 0.075 + 9 × 0.60) × 1.2 = 9.36, rounded up once.
        let ended = ledger.end(&ending).await.unwrap();
        assert_eq!(ended, Ended { charged: MicroUsdc::new(10), balance: balance(990, 0) });
        assert_eq!(ledger.balance(payer).await.unwrap(), balance(990, 0));
        assert_eq!(ledger.open_holds().await.unwrap(), (0, MicroUsdc::ZERO));

        let receipt = ledger.receipt(payer, "req_1").await.unwrap().unwrap();
        assert_eq!(receipt.outcome, Outcome::Settled);
        assert_eq!((receipt.hold, receipt.charged), (MicroUsdc::new(300), MicroUsdc::new(10)));
        assert_eq!(receipt.cost, PicoUsd::new(7_800_000));
        assert_eq!(receipt.usage, ending.usage);
        assert_eq!(receipt.usage_raw, ending.usage_raw);
        assert_eq!(receipt.terms, terms());
        assert_eq!((receipt.created_at, receipt.ended_at), (NOW, NOW.plus_seconds(5)));
        assert_eq!((receipt.api_key_id, receipt.reason), (Some(7), None));
        assert_eq!(ledger.receipt(wallet(2), "req_1").await.unwrap(), None, "another's is not shown");

        let totals = ledger.usage_totals(payer).await.unwrap();
        assert_eq!(totals.len(), 1);
        assert_eq!((totals[0].api_key_id, totals[0].request_count), (Some(7), 1));
        assert_eq!((totals[0].prompt_tokens, totals[0].completion_tokens), (20, 9));
        assert_eq!(totals[0].charged, MicroUsdc::new(10));
        assert_eq!(totals[0].revenue, PicoUsd::new(10_000_000 - 7_800_000));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn a_release_charges_nothing_and_counts_as_no_request() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        let held = hold("req_1", payer, 1000);
        ledger.hold(&held).await.unwrap();
        let ended = ledger.end(&Ending::released(held, "upstream_failed")).await.unwrap();
        assert_eq!(ended, Ended { charged: MicroUsdc::ZERO, balance: balance(1000, 0) });
        let receipt = ledger.receipt(payer, "req_1").await.unwrap().unwrap();
        assert_eq!(receipt.outcome, Outcome::Released);
        assert_eq!(receipt.reason.as_deref(), Some("upstream_failed"));
        assert_eq!(ledger.usage_totals(payer).await.unwrap(), []);
        assert_eq!(books.number("SELECT COUNT(*) AS n FROM entries WHERE kind = 'charge'").await, 0);
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn an_estimate_is_marked_and_may_take_the_whole_hold() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        let held = hold("req_1", payer, 400);
        ledger.hold(&held).await.unwrap();
        let mut ending = settled(&held, completion(100));
        ending.outcome = Outcome::Estimated;
        ending.reason = Some("usage_missing".into());
        ending.charge.charged = held.amount;
        let ended = ledger.end(&ending).await.unwrap();
        assert_eq!(ended, Ended { charged: MicroUsdc::new(400), balance: balance(600, 0) });
        let receipt = ledger.receipt(payer, "req_1").await.unwrap().unwrap();
        assert_eq!(receipt.outcome, Outcome::Estimated);
        assert_eq!(ledger.usage_totals(payer).await.unwrap()[0].request_count, 1);
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_not_available_cannot_be_held() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 100).await;
        ledger.hold(&hold("req_1", payer, 60)).await.unwrap();
        let error = ledger.hold(&hold("req_2", payer, 41)).await.unwrap_err();
        let LedgerError::Insufficient { required, balance: left } = error else { panic!("{error}") };
        assert_eq!((required, left), (MicroUsdc::new(41), balance(100, 60)));
        assert_eq!(left.available(), MicroUsdc::new(40));
        assert_eq!(ledger.hold(&hold("req_3", payer, 40)).await.unwrap(), balance(100, 100));

        let stranger = ledger.hold(&hold("req_4", wallet(9), 1)).await.unwrap_err();
        assert!(matches!(stranger, LedgerError::Insufficient { balance: b, .. } if b == balance(0, 0)));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn a_charge_above_the_hold_is_refused_and_changes_nothing() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        let held = hold("req_1", payer, 100);
        ledger.hold(&held).await.unwrap();
        let mut ending = settled(&held, completion(100));
        ending.charge.charged = MicroUsdc::new(101);
        assert!(matches!(ledger.end(&ending).await, Err(LedgerError::OutOfRange)));
        assert_eq!(ledger.balance(payer).await.unwrap(), balance(1000, 100));
        // By the prices it is more than was held: the hold is the ceiling.
        let ended = ledger.end(&settled(&held, completion(1000))).await.unwrap();
        assert_eq!(ended, Ended { charged: MicroUsdc::new(100), balance: balance(900, 0) });
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn receipts_are_listed_newest_first_page_by_page() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        for number in 0..7 {
            let mut held = hold(format!("req_{number}"), payer, 10);
            // Two a second, so that the id has to decide as well.
            held.created_at = NOW.plus_seconds(number / 2);
            ledger.hold(&held).await.unwrap();
            ledger.end(&settled(&held, completion(1))).await.unwrap();
        }
        let mut seen = Vec::new();
        let mut before = None;
        loop {
            let page = ledger.receipts(payer, before, 3).await.unwrap();
            let Some(last) = page.last() else { break };
            before = Some((last.created_at, last.id.clone()));
            seen.extend(page.into_iter().map(|receipt| receipt.id));
        }
        assert_eq!(seen, ["req_6", "req_5", "req_4", "req_3", "req_2", "req_1", "req_0"]);
    })
    .await;
}

// ---- the same again is the same; something else under its name is a conflict

#[tokio::test]
async fn the_same_hold_again_is_the_same_hold() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 100).await;
        let held = hold("req_1", payer, 60);
        let first = ledger.hold(&held).await.unwrap();
        // Also where the rest of the balance would not do for a second one.
        assert_eq!(ledger.hold(&held).await.unwrap(), first);
        books.credit(payer, 900).await;
        assert_eq!(ledger.hold(&held).await.unwrap(), balance(1000, 60));
        for other in [hold("req_1", payer, 61), hold("req_1", payer, 5000), hold("req_1", wallet(2), 60)] {
            assert!(matches!(ledger.hold(&other).await, Err(LedgerError::Conflict(id)) if id == "req_1"));
        }
        assert_eq!(ledger.balance(payer).await.unwrap(), balance(1000, 60));

        ledger.end(&settled(&held, completion(10))).await.unwrap();
        assert!(matches!(ledger.hold(&held).await, Err(LedgerError::Conflict(_))), "its id has ended");
        assert_eq!(ledger.balance(payer).await.unwrap().locked, MicroUsdc::ZERO);
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn the_same_end_again_is_the_same_end() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        let held = hold("req_1", payer, 500);
        ledger.hold(&held).await.unwrap();
        let ending = settled(&held, completion(100));
        let first = ledger.end(&ending).await.unwrap();
        assert_eq!(ledger.end(&ending).await.unwrap(), first);
        for other in [settled(&held, completion(200)), Ending::released(held.clone(), "late")] {
            assert!(matches!(ledger.end(&other).await, Err(LedgerError::Conflict(_))));
        }
        let receipt = ledger.receipt(payer, "req_1").await.unwrap().unwrap();
        assert_eq!(
            (receipt.outcome, receipt.charged),
            (Outcome::Settled, MicroUsdc::new(72)),
            "the first stands"
        );
        assert_eq!(ledger.balance(payer).await.unwrap(), balance(928, 0));
        assert_eq!(ledger.usage_totals(payer).await.unwrap()[0].request_count, 1);
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn an_end_of_another_amount_than_was_held_is_a_conflict() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 1000).await;
        ledger.hold(&hold("req_1", payer, 500)).await.unwrap();
        let other = settled(&hold("req_1", payer, 600), completion(100));
        assert!(matches!(ledger.end(&other).await, Err(LedgerError::Conflict(_))));
        assert_eq!(ledger.balance(payer).await.unwrap(), balance(1000, 500));
    })
    .await;
}

#[tokio::test]
async fn nobody_ends_a_hold_of_another_wallet() {
    both(async |books| {
        let (ledger, payer, other) = (books.ledger("a"), wallet(1), wallet(2));
        books.credit(payer, 1000).await;
        books.credit(other, 1000).await;
        ledger.hold(&hold("req_1", payer, 500)).await.unwrap();
        let foreign = settled(&hold("req_1", other, 500), completion(100));
        assert!(matches!(ledger.end(&foreign).await, Err(LedgerError::Conflict(_))));
        assert_eq!(ledger.balance(other).await.unwrap(), balance(1000, 0));
        ledger.end(&settled(&hold("req_1", payer, 500), completion(100))).await.unwrap();
        assert!(matches!(ledger.end(&foreign).await, Err(LedgerError::Conflict(_))));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn a_payment_is_credited_once() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        let id = books.credit(payer, 1000).await;
        let mut tx = books.db.begin().await.unwrap();
        let error = ledger.credit(&mut tx, payer, MicroUsdc::new(1000), id).await.unwrap_err();
        assert!(matches!(&error, LedgerError::Db(e) if e.is_unique_violation()), "{error}");
        drop(tx);
        let mut tx = books.db.begin().await.unwrap();
        // Nor is it to another wallet.
        assert!(ledger.credit(&mut tx, wallet(2), MicroUsdc::new(1), id).await.is_err());
        drop(tx);
        assert_eq!(ledger.balance(payer).await.unwrap(), balance(1000, 0));
        assert_eq!(ledger.balance(wallet(2)).await.unwrap(), balance(0, 0));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn a_credit_not_committed_never_was() {
    both(async |books| {
        let ledger = books.ledger("a");
        let mut tx = books.db.begin().await.unwrap();
        credit(&ledger, &mut tx, wallet(1), MicroUsdc::new(1000), 1).await.unwrap();
        drop(tx);
        assert_eq!(ledger.balance(wallet(1)).await.unwrap(), balance(0, 0));
        assert_eq!(books.number("SELECT COUNT(*) AS n FROM entries").await, 0);
    })
    .await;
}

#[tokio::test]
async fn the_same_hold_many_times_at_once_locks_once() {
    both(async |books| {
        let ledger = books.ledger("a");
        books.credit(wallet(1), 1000).await;
        let held = hold("req_1", wallet(1), 300);
        let results = at_once(20, |_| {
            let (ledger, held) = (ledger.clone(), held.clone());
            async move { ledger.hold(&held).await }
        })
        .await;
        for result in results {
            assert_eq!(result.unwrap(), balance(1000, 300));
        }
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn the_same_end_many_times_at_once_charges_once() {
    both(async |books| {
        let ledger = books.ledger("a");
        books.credit(wallet(1), 1000).await;
        let held = hold("req_1", wallet(1), 300);
        ledger.hold(&held).await.unwrap();
        let ending = settled(&held, completion(100));
        let results = at_once(20, |_| {
            let (ledger, ending) = (ledger.clone(), ending.clone());
            async move { ledger.end(&ending).await }
        })
        .await;
        for result in results {
            assert_eq!(result.unwrap(), Ended { charged: MicroUsdc::new(72), balance: balance(928, 0) });
        }
        assert_no_drift(&books.db).await;
    })
    .await;
}

// ---- keys and their caps

/// A key of wallet 1's with these caps, as `POST /v1/auth/keys` would leave it.
async fn make_key(books: &Books, id: i64, cap: Option<i64>, cap_per_day: Option<i64>) {
    let mut tx = books.db.begin().await.unwrap();
    tx.execute(
        "INSERT INTO wallets (address, created_at_ms) VALUES ($1, 0) ON CONFLICT DO NOTHING",
        vec![Arg::from(wallet(1))],
    )
    .await
    .unwrap();
    tx.execute(
        "INSERT INTO api_keys (id, wallet, key_sha256, created_at_ms, spend_cap_micro, spend_cap_per_day_micro)
         VALUES ($1, $2, $3, 0, $4, $5)",
        vec![
            Arg::from(id),
            Arg::from(wallet(1)),
            Arg::from(format!("hash of {id}")),
            Arg::from(cap),
            Arg::from(cap_per_day),
        ],
    )
    .await
    .unwrap();
    tx.commit().await.unwrap();
}

fn keyed(id: &str, micro: i64, created_at: Timestamp) -> Hold {
    Hold { api_key_id: Some(1), created_at, ..hold(id, wallet(1), micro) }
}

fn assert_capped(refused: Result<Balance, LedgerError>, spent: i64, held: i64, resets_at: Option<Timestamp>) {
    match refused {
        Err(LedgerError::KeyCap(cap)) => {
            let spending = Spending { spent: MicroUsdc::new(spent), held: MicroUsdc::new(held) };
            assert_eq!((cap.spending, cap.resets_at), (spending, resets_at));
        }
        other => panic!("not capped: {other:?}"),
    }
}

#[tokio::test]
async fn a_cap_counts_what_is_spent_and_what_is_held() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 10_000).await;
        make_key(books, 1, Some(500), None).await;
        ledger.hold(&keyed("req_1", 300, NOW)).await.unwrap();
        assert_capped(ledger.hold(&keyed("req_2", 201, NOW)).await, 0, 300, None);
        // The same hold again is the same, though the cap has no room for another.
        ledger.hold(&keyed("req_1", 300, NOW)).await.unwrap();
        ledger.hold(&keyed("req_2", 200, NOW)).await.unwrap();
        // What is settled below its hold, and what is released, makes room again.
        ledger.end(&settled(&keyed("req_1", 300, NOW), completion(100))).await.unwrap();
        assert_capped(ledger.hold(&keyed("req_3", 229, NOW)).await, 72, 200, None);
        ledger.end(&Ending::released(keyed("req_2", 200, NOW), "upstream_failed")).await.unwrap();
        ledger.hold(&keyed("req_3", 428, NOW)).await.unwrap();
        assert_capped(ledger.hold(&keyed("req_4", 1, NOW)).await, 72, 428, None);
        // Calls without the key are not its affair, and a refusal left nothing locked.
        ledger.hold(&hold("req_5", payer, 1000)).await.unwrap();
        assert_eq!(ledger.balance(payer).await.unwrap(), balance(10_000 - 72, 1428));
        // A wallet that cannot cover it either is told of the cap: a top-up would not help.
        assert_capped(ledger.hold(&keyed("req_6", 50_000, NOW)).await, 72, 428, None);
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn a_cap_per_day_begins_anew_at_midnight_utc() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 10_000).await;
        make_key(books, 1, None, Some(300)).await;
        let midnight = NOW.end_of_utc_day();
        let last_second = midnight.plus_seconds(-1);
        ledger.hold(&keyed("req_1", 300, last_second)).await.unwrap();
        assert_capped(ledger.hold(&keyed("req_2", 1, last_second)).await, 0, 300, Some(midnight));
        ledger.hold(&keyed("req_2", 300, midnight)).await.unwrap();
        // What ends after midnight still counts on the day it was held on.
        ledger.end(&settled(&keyed("req_1", 300, last_second), completion(100))).await.unwrap();
        let next_midnight = midnight.end_of_utc_day();
        assert_capped(ledger.hold(&keyed("req_3", 1, midnight)).await, 0, 300, Some(next_midnight));
        ledger.end(&Ending::released(keyed("req_2", 300, midnight), "upstream_failed")).await.unwrap();
        ledger.hold(&keyed("req_3", 300, midnight)).await.unwrap();
        // Another node's clock may be a little behind: its holds count on its day.
        ledger.hold(&keyed("req_4", 228, last_second)).await.unwrap();
        assert_capped(ledger.hold(&keyed("req_5", 1, last_second)).await, 72, 228, Some(midnight));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn sixty_four_holds_at_once_cannot_overrun_a_cap() {
    both(async |books| {
        let payer = wallet(1);
        books.credit(payer, 1_000_000).await;
        make_key(books, 1, Some(1000), None).await;
        let nodes = [books.ledger("a"), books.ledger("b")];
        let holds: Vec<_> = (0..64).map(|number| keyed(&format!("req_{number}"), 99, NOW)).collect();
        let made = holds.iter().enumerate().map(|(number, hold)| nodes[number % 2].hold(hold));
        let made = futures_util::future::join_all(made).await;
        assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 10);
        assert!(made.iter().all(|made| matches!(made, Ok(_) | Err(LedgerError::KeyCap(_)))), "{made:?}");
        assert_eq!(nodes[0].balance(payer).await.unwrap(), balance(1_000_000, 990));
        let kept = nodes[0].spending_of_keys(payer).await.unwrap()[&1].0;
        assert_eq!(kept, Spending { spent: MicroUsdc::ZERO, held: MicroUsdc::new(990) });
        assert_no_drift(&books.db).await;
    })
    .await;
}

// ---- a hold that the database lost

/// Takes a hold's row and its lock away, as a database does that crashed before it wrote them to disk.
async fn lose(books: &Books, held: &Hold) {
    let mut tx = books.db.begin().await.unwrap();
    let lost = tx.execute("DELETE FROM holds WHERE id = $1", vec![Arg::from(held.id.as_str())]).await;
    assert_eq!(lost.unwrap(), 1);
    tx.execute(
        "UPDATE wallets SET locked_micro = locked_micro - $2 WHERE address = $1",
        vec![Arg::from(held.wallet), Arg::from(held.amount)],
    )
    .await
    .unwrap();
    if let Some(key) = held.api_key_id {
        tx.execute(
            "UPDATE key_spending SET held_micro = held_micro - $2 WHERE api_key_id = $1 AND day IN (0, $3)",
            vec![Arg::from(key), Arg::from(held.amount), Arg::from(held.created_at.utc_day())],
        )
        .await
        .unwrap();
    }
    tx.commit().await.unwrap();
}

#[tokio::test]
async fn a_settlement_whose_hold_was_lost_charges_what_is_available() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 100).await;
        let (first, second, third) =
            (hold("req_1", payer, 100), hold("req_2", payer, 60), hold("req_3", payer, 100));
        ledger.hold(&first).await.unwrap();
        lose(books, &first).await;
        ledger.hold(&second).await.unwrap();

        let ending = settled(&first, completion(100));
        assert_eq!(ending.charge.charged, MicroUsdc::new(72));
        let ended = ledger.end(&ending).await.unwrap();
        assert_eq!(ended, Ended { charged: MicroUsdc::new(40), balance: balance(60, 60) });
        let receipt = ledger.receipt(payer, "req_1").await.unwrap().unwrap();
        assert_eq!(receipt.reason.as_deref(), Some(HOLD_LOST));
        assert_eq!((receipt.charged, receipt.outcome), (MicroUsdc::new(40), Outcome::Settled));

        // With nothing left it is written down, and free.
        let ended = ledger.end(&settled(&third, completion(10))).await.unwrap();
        assert_eq!(ended, Ended { charged: MicroUsdc::ZERO, balance: balance(60, 60) });
        ledger.end(&settled(&second, completion(10))).await.unwrap();
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn an_estimate_whose_hold_was_lost_is_no_drift() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 100).await;
        // The whole hold was to be charged; less than that is there, and more than the estimate.
        let mut ending = settled(&hold("req_1", payer, 300), completion(100));
        ending.outcome = Outcome::Estimated;
        ending.charge.charged = MicroUsdc::new(300);
        let ended = ledger.end(&ending).await.unwrap();
        assert_eq!(ended, Ended { charged: MicroUsdc::new(100), balance: balance(0, 0) });
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn the_end_of_a_lost_hold_again_is_the_same_end() {
    both(async |books| {
        let (ledger, payer) = (books.ledger("a"), wallet(1));
        books.credit(payer, 40).await;
        let ending = settled(&hold("req_1", payer, 100), completion(100));
        let first = ledger.end(&ending).await.unwrap();
        assert_eq!(first, Ended { charged: MicroUsdc::new(40), balance: balance(0, 0) });
        assert_eq!(ledger.end(&ending).await.unwrap(), first);
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test]
async fn the_end_of_a_lost_hold_many_times_at_once_charges_once() {
    both(async |books| {
        let ledger = books.ledger("a");
        books.credit(wallet(1), 1000).await;
        let ending = settled(&hold("req_1", wallet(1), 300), completion(100));
        let results = at_once(20, |_| {
            let (ledger, ending) = (ledger.clone(), ending.clone());
            async move { ledger.end(&ending).await }
        })
        .await;
        for result in results {
            assert_eq!(result.unwrap(), Ended { charged: MicroUsdc::new(72), balance: balance(928, 0) });
        }
        assert_no_drift(&books.db).await;
    })
    .await;
}

// ---- what the database itself refuses

#[tokio::test]
async fn the_database_refuses_what_the_books_must_never_say() {
    both(async |books| {
        let ledger = books.ledger("a");
        books.credit(wallet(1), 1000).await;
        let held = hold("req_1", wallet(1), 300);
        ledger.hold(&held).await.unwrap();
        ledger.end(&settled(&held, completion(100))).await.unwrap();
        ledger.hold(&hold("req_2", wallet(1), 300)).await.unwrap();

        let checked = [
            ("a negative balance", "UPDATE wallets SET balance_micro = -1"),
            ("a balance below what is locked", "UPDATE wallets SET balance_micro = locked_micro - 1"),
            ("more locked than there is", "UPDATE wallets SET locked_micro = balance_micro + 1"),
            ("less than nothing locked", "UPDATE wallets SET locked_micro = -1"),
            (
                "an entry with one side",
                "INSERT INTO entries SELECT wallet, seq + 10, kind, 'x', 5, balance_after_micro,
                     balance_after_micro + 5, contra_account, -4, 0, NULL FROM entries WHERE kind = 'topup'",
            ),
            (
                "an entry that does not add up",
                "INSERT INTO entries SELECT wallet, seq + 10, kind, 'x', 5, balance_after_micro,
                     balance_after_micro + 6, contra_account, -5, 0, NULL FROM entries WHERE kind = 'topup'",
            ),
            (
                "an entry below zero",
                "INSERT INTO entries SELECT wallet, seq + 10, kind, 'x', -5, 4, -1, contra_account, 5, 0, NULL
                 FROM entries WHERE kind = 'charge'",
            ),
            (
                "a charge that adds",
                "INSERT INTO entries SELECT wallet, seq + 10, kind, 'x', 5, 0, 5, contra_account, -5, 0, NULL
                 FROM entries WHERE kind = 'charge'",
            ),
            ("a hold below zero", "UPDATE holds SET amount_micro = -1"),
            (
                "a receipt above its hold",
                "INSERT INTO receipts (id, wallet, api_key_id, model, outcome, reason, hold_micro, charged_micro, cost_pico,
                     prompt_tokens, cached_tokens, completion_tokens, usage_raw, terms, created_at_ms, ended_at_ms)
                 SELECT 'x', wallet, api_key_id, model, outcome, reason, hold_micro,
                     hold_micro + 1, cost_pico, prompt_tokens, cached_tokens, completion_tokens, usage_raw,
                     terms, created_at_ms, ended_at_ms FROM receipts",
            ),
            (
                "a release that charges",
                "INSERT INTO receipts (id, wallet, api_key_id, model, outcome, reason, hold_micro, charged_micro, cost_pico,
                     prompt_tokens, cached_tokens, completion_tokens, usage_raw, terms, created_at_ms, ended_at_ms)
                 SELECT 'x', wallet, api_key_id, model, 'released', reason, hold_micro,
                     1, cost_pico, prompt_tokens, cached_tokens, completion_tokens, usage_raw,
                     terms, created_at_ms, ended_at_ms FROM receipts",
            ),
        ];
        for (what, statement) in checked {
            let error = books.sql(statement).await.expect_err(what);
            assert!(error.is_check_violation(), "{what}: {error}");
        }
        let refused = [
            ("a changed entry", "UPDATE entries SET created_at_ms = 0"),
            ("a deleted entry", "DELETE FROM entries"),
            ("a changed receipt", "UPDATE receipts SET model = 'x'"),
            ("a deleted receipt", "DELETE FROM receipts"),
        ];
        for (what, statement) in refused {
            let error = books.sql(statement).await.expect_err(what);
            assert!(error.to_string().contains("append-only"), "{what}: {error}");
        }
        let unique = [
            (
                "a second credit for a payment",
                "INSERT INTO entries SELECT wallet, seq + 10, kind, reference, amount_micro,
                     balance_before_micro, balance_after_micro, contra_account, contra_micro, 0, NULL
                 FROM entries WHERE kind = 'topup'",
            ),
            (
                "a second charge for a request",
                "INSERT INTO entries SELECT wallet, seq + 10, kind, reference, amount_micro,
                     balance_before_micro, balance_after_micro, contra_account, contra_micro, 0, NULL
                 FROM entries WHERE kind = 'charge'",
            ),
            (
                "a second entry in the same place",
                "INSERT INTO entries SELECT wallet, seq, kind, 'x', amount_micro, balance_before_micro,
                     balance_after_micro, contra_account, contra_micro, 0, NULL FROM entries WHERE kind = 'topup'",
            ),
            (
                "a transfer that pays for two payments",
                "INSERT INTO payments SELECT id + 1, chain_id, asset, from_wallet, 'x', to_wallet, value_micro,
                     valid_after, valid_before, signature, state, seen_block, tx_hash, block_number, block_hash,
                     log_index, last_error, created_at_ms, updated_at_ms, NULL, NULL, kind, NULL, 0, 0, NULL
                 FROM payments",
            ),
            (
                "an authorization written down twice",
                "INSERT INTO payments SELECT id + 1, chain_id, asset, from_wallet, nonce, to_wallet, value_micro,
                     valid_after, valid_before, signature, 'verified', seen_block, NULL, NULL, NULL,
                     NULL, last_error, created_at_ms, updated_at_ms, NULL, NULL, kind, NULL, 0, 0, NULL
                 FROM payments",
            ),
        ];
        for (what, statement) in unique {
            let error = books.sql(statement).await.expect_err(what);
            assert!(error.is_unique_violation(), "{what}: {error}");
        }
        assert_eq!(ledger.balance(wallet(1)).await.unwrap(), balance(928, 300));
        assert_no_drift(&books.db).await;
    })
    .await;
}

// ---- many at once

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_holds_at_once_on_a_balance_for_fifty() {
    both(async |books| {
        let ledger = books.ledger("a");
        books.credit(wallet(1), 50 * 72).await;
        let held = at_once(200, |number| {
            let ledger = ledger.clone();
            async move {
                let held = hold(format!("req_{number}"), wallet(1), 72);
                ledger.hold(&held).await.map(|_| held)
            }
        })
        .await;
        let (held, refused): (Vec<_>, Vec<_>) = held.into_iter().partition(Result::is_ok);
        assert_eq!((held.len(), refused.len()), (50, 150));
        for error in refused {
            assert!(matches!(error, Err(LedgerError::Insufficient { required, .. }) if required.get() == 72));
        }
        assert_eq!(ledger.balance(wallet(1)).await.unwrap(), balance(3600, 3600));

        let held: Vec<Hold> = held.into_iter().map(Result::unwrap).collect();
        let settlements = at_once(50, |number| {
            let (ledger, ending) = (ledger.clone(), settled(&held[number], completion(100)));
            async move { ledger.end(&ending).await }
        })
        .await;
        for ended in settlements {
            assert_eq!(ended.unwrap().charged, MicroUsdc::new(72));
        }
        assert_eq!(ledger.balance(wallet(1)).await.unwrap(), balance(0, 0));
        assert_eq!(ledger.open_holds().await.unwrap(), (0, MicroUsdc::ZERO));
        assert_no_drift(&books.db).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn holds_settlements_releases_and_credits_at_once_lose_nothing() {
    both(async |books| {
        let ledger = books.ledger("a");
        for payer in 1..=3 {
            books.credit(wallet(payer), 1000).await;
        }
        let charges = at_once(120, |number| {
            let (ledger, db) = (ledger.clone(), books.db.clone());
            async move {
                let payer = wallet(u8::try_from(number % 3).unwrap() + 1);
                if number % 10 == 0 {
                    let mut tx = db.begin().await.unwrap();
                    let id = 1000 + i64::try_from(number).unwrap();
                    credit(&ledger, &mut tx, payer, MicroUsdc::new(50), id).await.unwrap();
                    tx.commit().await.unwrap();
                    return 50;
                }
                let held = hold(format!("req_{number}"), payer, 144);
                match ledger.hold(&held).await {
                    Ok(_) if number % 4 == 0 => {
                        ledger.end(&Ending::released(held, "upstream_failed")).await.unwrap();
                        0
                    }
                    Ok(_) => -ledger.end(&settled(&held, completion(100))).await.unwrap().charged.get(),
                    Err(LedgerError::Insufficient { .. }) => 0,
                    Err(other) => panic!("{other}"),
                }
            }
        })
        .await;
        let mut left = 0;
        for payer in 1..=3 {
            let payer = ledger.balance(wallet(payer)).await.unwrap();
            assert_eq!(payer.locked, MicroUsdc::ZERO);
            left += payer.balance.get();
        }
        assert_eq!(left, 3000 + charges.iter().sum::<i64>());
        assert_no_drift(&books.db).await;
    })
    .await;
}

// ---- nodes and their leases

#[tokio::test]
async fn only_one_server_may_have_an_sqlite_file() {
    let books = Books::sqlite().await;
    let second = Db::open(&books.url, Access::Serve).await;
    assert!(matches!(second.err(), Some(DbError::InUse { path }) if books.url.ends_with(&path)));
    // Looking is fine.
    let look = Db::open(&books.url, Access::Inspect).await.unwrap();
    assert_no_drift(&look).await;
    look.close().await;
    // The file is free once the first has gone.
    let (url, _scratch) = (books.url.clone(), books.scratch);
    books.db.close().await;
    drop(books.db);
    Db::open(&url, Access::Serve).await.unwrap();
}

/// A commit that brings a long log there by itself holds up all who wait for it.
#[tokio::test]
async fn the_log_is_brought_into_the_sqlite_file_from_beside() {
    let books = Books::sqlite().await;
    books.credit(wallet(1), 5).await;
    assert_eq!(without_its_log(&books, "before.db").await, Some(MicroUsdc::ZERO));
    let db = books.db.clone();
    let keeping = tokio::spawn(async move { db.keep_checkpointed().await });
    eventually("the file has it", async || {
        without_its_log(&books, "after.db").await.filter(|balance| *balance == MicroUsdc::new(5))
    })
    .await;
    keeping.abort();
}

/// What wallet 1 has according to the file alone; `None` while that is being written to.
async fn without_its_log(books: &Books, copy: &str) -> Option<MicroUsdc> {
    let copy = books.scratch.path().join(copy);
    std::fs::copy(books.url.trim_start_matches("sqlite://"), &copy).unwrap();
    // Migrates what is empty.
    let db = Db::open(&format!("sqlite://{}", copy.display()), Access::Serve).await.ok()?;
    let ledger = Ledger::new(db.clone(), books.clock.clone(), "copy".into());
    let balance = ledger.balance(wallet(1)).await.ok()?;
    db.close().await;
    Some(balance.balance)
}

#[tokio::test]
async fn a_restarted_server_releases_what_it_left_on_sqlite() {
    let books = Books::sqlite().await;
    books.credit(wallet(1), 1000).await;
    let (before, after) = (books.ledger("before"), books.ledger("after"));
    before.renew_lease().await.unwrap();
    before.hold(&hold("req_1", wallet(1), 300)).await.unwrap();
    after.renew_lease().await.unwrap();
    after.hold(&hold("req_2", wallet(1), 200)).await.unwrap();
    // No other process can be alive, whatever the lease says.
    assert_eq!(after.sweep().await.unwrap(), 1);
    assert_eq!(after.balance(wallet(1)).await.unwrap(), balance(1000, 200));
    assert_eq!(after.sweep().await.unwrap(), 0);
    assert_no_drift(&books.db).await;
}

#[tokio::test]
async fn the_holds_of_a_live_node_are_left_alone_and_those_of_a_dead_one_released() {
    let books = Books::postgres().await;
    books.credit(wallet(1), 1000).await;
    let (dying, living) = (books.ledger("dying"), books.ledger("living"));
    dying.renew_lease().await.unwrap();
    living.renew_lease().await.unwrap();
    dying.hold(&hold("req_1", wallet(1), 300)).await.unwrap();
    living.hold(&hold("req_2", wallet(1), 200)).await.unwrap();
    assert_eq!(living.sweep().await.unwrap(), 0);
    books.clock.advance_seconds(59);
    living.renew_lease().await.unwrap();
    assert_eq!(living.sweep().await.unwrap(), 0, "its lease is for a minute");

    books.clock.advance_seconds(2);
    assert_eq!(living.sweep().await.unwrap(), 1);
    let receipt = living.receipt(wallet(1), "req_1").await.unwrap().unwrap();
    assert_eq!((receipt.outcome, receipt.charged), (Outcome::Released, MicroUsdc::ZERO));
    assert_eq!(receipt.reason.as_deref(), Some("gateway_stopped"));
    assert_eq!(living.balance(wallet(1)).await.unwrap(), balance(1000, 200), "its own hold is still open");

    // The dead one was only slow: what it then settles is refused, the release stands.
    let late = settled(&hold("req_1", wallet(1), 300), completion(100));
    assert!(matches!(dying.end(&late).await, Err(LedgerError::Conflict(_))));
    assert_no_drift(&books.db).await;
    books.discard().await;
}

#[tokio::test]
async fn a_node_that_says_goodbye_is_swept_at_once() {
    let books = Books::postgres().await;
    books.credit(wallet(1), 1000).await;
    let (leaving, staying) = (books.ledger("leaving"), books.ledger("staying"));
    leaving.renew_lease().await.unwrap();
    leaving.hold(&hold("req_1", wallet(1), 300)).await.unwrap();
    assert_eq!(staying.sweep().await.unwrap(), 0);
    leaving.drop_lease().await.unwrap();
    assert_eq!(staying.sweep().await.unwrap(), 1);
    books.discard().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_who_sweep_at_once_release_each_hold_once() {
    let books = Books::postgres().await;
    books.credit(wallet(1), 1000).await;
    let dead = books.ledger("dead");
    for number in 0..40 {
        dead.hold(&hold(format!("req_{number}"), wallet(1), 20)).await.unwrap();
    }
    // The second has connections of its own, as another process would.
    let elsewhere = Db::open(&books.url, Access::Serve).await.unwrap();
    let sweepers = [books.ledger("one"), Ledger::new(elsewhere.clone(), Clock::fixed(NOW), "two".into())];
    let released = at_once(2, |number| {
        let sweeper = sweepers[number].clone();
        async move { sweeper.sweep().await.unwrap() }
    })
    .await;
    assert!(released.iter().sum::<usize>() >= 40, "{released:?}");
    assert_eq!(dead.balance(wallet(1)).await.unwrap(), balance(1000, 0));
    let receipts = dead.receipts(wallet(1), None, 1000).await.unwrap();
    assert_eq!(receipts.len(), 40);
    assert!(receipts.iter().all(|receipt| receipt.outcome == Outcome::Released));
    assert_no_drift(&books.db).await;
    elsewhere.close().await;
    books.discard().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_settled_and_swept_at_once_ends_once() {
    both(async |books| {
        let (owner, sweeper) = (books.ledger("owner"), books.ledger("sweeper"));
        let rounds = 25;
        books.credit(wallet(1), rounds * 300).await;
        let mut charged = 0;
        for round in 0..rounds {
            let held = hold(format!("req_{round}"), wallet(1), 300);
            owner.hold(&held).await.unwrap();
            let ending = settled(&held, completion(100));
            // Both start together; which one is first differs from round to round.
            let barrier = Barrier::new(2);
            let (ended, swept) = tokio::join!(
                async {
                    barrier.wait().await;
                    owner.end(&ending).await
                },
                async {
                    barrier.wait().await;
                    sweeper.sweep().await
                },
            );
            swept.unwrap();
            let receipt = owner.receipt(wallet(1), &held.id).await.unwrap().unwrap();
            match ended {
                Ok(ended) => {
                    assert_eq!((receipt.outcome, receipt.charged), (Outcome::Settled, ended.charged));
                    charged += ended.charged.get();
                }
                Err(LedgerError::Conflict(_)) => assert_eq!(receipt.outcome, Outcome::Released),
                Err(other) => panic!("{other}"),
            }
            assert_eq!(owner.balance(wallet(1)).await.unwrap(), balance(rounds * 300 - charged, 0));
        }
        assert_no_drift(&books.db).await;
    })
    .await;
}

/// Starts `count` tasks that all begin at the same moment, and returns what each came to.
async fn at_once<T, F>(count: usize, task: impl Fn(usize) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let barrier = Arc::new(Barrier::new(count));
    let tasks: Vec<_> = (0..count)
        .map(|number| {
            let (barrier, task) = (barrier.clone(), task(number));
            tokio::spawn(async move {
                barrier.wait().await;
                task.await
            })
        })
        .collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.unwrap());
    }
    results
}
