//! The audit: nothing to say about books that agree, and a name for each thing that was tampered with.

use std::process::Output;

use farebox::audit::{self, Verdict};
use farebox::ledger::{Ending, Outcome};

use crate::support::books::{Books, balance, both, completion, hold, settled, wallet};
use crate::support::operator::farebox;

const TWO_SIDES: &str = "entries have two sides that sum to zero";
const CHAIN_OF_ENTRIES: &str = "entries follow one another without a gap";
const NEVER_NEGATIVE: &str = "balance >= locked >= 0";
const BALANCE: &str = "balance = the sum of the wallet's entries";
const LOCKED: &str = "locked = the sum of open holds and withdrawals";
const ENDS_ONCE: &str = "a hold ends at most once";
const CHARGES: &str = "each charge has its receipt, each receipt its charge";
const CREDITS: &str = "each credit has its payment, each payment its credit";
const WITHDRAWN: &str = "each withdrawal has its entry, and no other";
const TOTALS: &str = "usage totals = the sums of receipts";
const KEYS: &str = "spending of keys = their receipts and open holds";
const FIGURES: &str = "charges follow from usage and prices";

/// Books with something of everything in them.
async fn fill(books: &Books) {
    let ledger = books.ledger("a");
    for payer_id in [1, 2] {
        let payer = wallet(payer_id);
        books.credit(payer, 1000).await;
        books.credit(payer, 500).await;
        for (number, outcome) in
            [Outcome::Settled, Outcome::Estimated, Outcome::Released].into_iter().enumerate()
        {
            let mut held = hold(format!("req_{payer_id}_{number}"), payer, 300);
            held.api_key_id = Some(1);
            ledger.hold(&held).await.unwrap();
            let ending = match outcome {
                Outcome::Released => Ending::released(held, "upstream_failed"),
                outcome => Ending { outcome, ..settled(&held, completion(100)) },
            };
            ledger.end(&ending).await.unwrap();
        }
        let mut open = hold(format!("req_{payer_id}_open"), payer, 200);
        open.api_key_id = Some(1);
        ledger.hold(&open).await.unwrap();
        assert_eq!(ledger.balance(payer).await.unwrap(), balance(1500 - 2 * 72, 200));
    }
    // Payments 5 to 7.
    let saver = wallet(3);
    books.credit(saver, 1000).await;
    books.withdraw(saver, 300, "finalized").await;
    books.withdraw(saver, 200, "broadcast").await;
    assert_eq!(ledger.balance(saver).await.unwrap(), balance(700, 200));
}

/// The command that operators run. No chain answers.
fn audit_command(books: &Books) -> Output {
    farebox(books, &["audit"]).output().unwrap()
}

#[tokio::test]
async fn empty_books_agree() {
    both(async |books| {
        let report = audit::run(&books.db, None).await.unwrap();
        assert!(!report.has_drift(), "{report}");
        assert!(report.0.iter().all(|row| matches!(row.verdict, Verdict::Ok | Verdict::Skipped)), "{report}");
    })
    .await;
}

#[tokio::test]
async fn books_that_agree_pass() {
    both(async |books| {
        fill(books).await;
        let report = audit::run(&books.db, None).await.unwrap();
        assert!(!report.has_drift(), "{report}");
        let names: Vec<_> = report.0.iter().map(|row| row.check).collect();
        for check in [
            TWO_SIDES,
            CHAIN_OF_ENTRIES,
            NEVER_NEGATIVE,
            BALANCE,
            LOCKED,
            ENDS_ONCE,
            CHARGES,
            CREDITS,
            WITHDRAWN,
            TOTALS,
            KEYS,
            FIGURES,
        ] {
            assert!(names.contains(&check), "{check} was not checked: {report}");
        }

        let output = audit_command(books);
        let table = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{table}{}", String::from_utf8_lossy(&output.stderr));
        assert!(!table.contains("DRIFT"), "{table}");
        assert!(table.contains("10 entries"), "{table}");
        let of_the_chain = table.lines().find(|line| line.contains("on the chain")).unwrap();
        assert!(of_the_chain.starts_with("skipped"), "{table}");
    })
    .await;
}

/// One thing altered by hand: how on each database, and what the audit must say is wrong.
struct Alteration {
    what: &'static str,
    /// Statements that keep the database from refusing, on SQLite and …
    sqlite: &'static [&'static str],
    /// … on PostgreSQL.
    postgres: &'static [&'static str],
    statement: &'static str,
    drift: &'static [&'static str],
}

const OPEN_ENTRIES_SQLITE: &[&str] = &[
    "DROP TRIGGER entries_no_update",
    "DROP TRIGGER entries_no_delete",
    "PRAGMA ignore_check_constraints = ON",
];
const OPEN_ENTRIES_POSTGRES: &[&str] = &[
    "ALTER TABLE entries DISABLE TRIGGER entries_append_only",
    "ALTER TABLE entries DROP CONSTRAINT two_sides",
    "ALTER TABLE entries DROP CONSTRAINT running_balance",
];
const OPEN_RECEIPTS_SQLITE: &[&str] = &[
    "DROP TRIGGER receipts_no_update",
    "DROP TRIGGER receipts_no_delete",
    "PRAGMA ignore_check_constraints = ON",
];
const OPEN_RECEIPTS_POSTGRES: &[&str] = &[
    "ALTER TABLE receipts DISABLE TRIGGER receipts_append_only",
    "ALTER TABLE receipts DROP CONSTRAINT never_above_the_hold",
    "ALTER TABLE receipts DROP CONSTRAINT released_is_free",
];
const OPEN_WALLETS_SQLITE: &[&str] = &["PRAGMA ignore_check_constraints = ON"];
const OPEN_WALLETS_POSTGRES: &[&str] = &["ALTER TABLE wallets DROP CONSTRAINT never_negative"];

const ALTERATIONS: &[Alteration] = &[
    Alteration {
        what: "an entry's amount",
        sqlite: OPEN_ENTRIES_SQLITE,
        postgres: OPEN_ENTRIES_POSTGRES,
        statement: "UPDATE entries SET amount_micro = amount_micro + 1 WHERE reference = '1' AND kind = 'topup'",
        drift: &[TWO_SIDES, CHAIN_OF_ENTRIES, BALANCE, CREDITS],
    },
    Alteration {
        what: "both sides of an entry",
        sqlite: OPEN_ENTRIES_SQLITE,
        postgres: OPEN_ENTRIES_POSTGRES,
        statement: "UPDATE entries SET amount_micro = amount_micro + 1, contra_micro = contra_micro - 1,
                        balance_after_micro = balance_after_micro + 1
                    WHERE reference = 'req_1_1' AND kind = 'charge'",
        drift: &[BALANCE, CHARGES],
    },
    Alteration {
        what: "whom an entry is for",
        sqlite: OPEN_ENTRIES_SQLITE,
        postgres: OPEN_ENTRIES_POSTGRES,
        statement: "UPDATE entries SET reference = 'req_9_9' WHERE reference = 'req_1_1' AND kind = 'charge'",
        drift: &[CHARGES],
    },
    Alteration {
        what: "the last entry deleted",
        sqlite: OPEN_ENTRIES_SQLITE,
        postgres: OPEN_ENTRIES_POSTGRES,
        statement: "DELETE FROM entries WHERE reference = 'req_2_1'",
        drift: &[BALANCE, CHARGES],
    },
    Alteration {
        what: "an earlier entry deleted",
        sqlite: OPEN_ENTRIES_SQLITE,
        postgres: OPEN_ENTRIES_POSTGRES,
        statement: "DELETE FROM entries WHERE reference = '2' AND kind = 'topup'",
        drift: &[CHAIN_OF_ENTRIES, BALANCE, CREDITS],
    },
    Alteration {
        what: "a wallet's balance",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE wallets SET balance_micro = balance_micro + 1
                    WHERE address = '0x0101010101010101010101010101010101010101'",
        drift: &[BALANCE],
    },
    Alteration {
        what: "a balance below zero",
        sqlite: OPEN_WALLETS_SQLITE,
        postgres: OPEN_WALLETS_POSTGRES,
        statement: "UPDATE wallets SET balance_micro = -1
                    WHERE address = '0x0101010101010101010101010101010101010101'",
        drift: &[NEVER_NEGATIVE, BALANCE],
    },
    Alteration {
        what: "what a wallet has locked",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE wallets SET locked_micro = locked_micro - 1
                    WHERE address = '0x0202020202020202020202020202020202020202'",
        drift: &[LOCKED],
    },
    Alteration {
        what: "a hold deleted",
        sqlite: &[],
        postgres: &[],
        statement: "DELETE FROM holds WHERE id = 'req_1_open'",
        drift: &[LOCKED, KEYS],
    },
    Alteration {
        what: "a hold that is open again",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE holds SET id = 'req_1_0' WHERE id = 'req_1_open'",
        drift: &[ENDS_ONCE],
    },
    Alteration {
        what: "a receipt's charge",
        sqlite: OPEN_RECEIPTS_SQLITE,
        postgres: OPEN_RECEIPTS_POSTGRES,
        statement: "UPDATE receipts SET charged_micro = charged_micro - 1 WHERE id = 'req_1_0'",
        drift: &[CHARGES, FIGURES, TOTALS, KEYS],
    },
    Alteration {
        what: "a receipt charged above its hold",
        sqlite: OPEN_RECEIPTS_SQLITE,
        postgres: OPEN_RECEIPTS_POSTGRES,
        statement: "UPDATE receipts SET charged_micro = hold_micro + 1 WHERE id = 'req_1_0'",
        drift: &[ENDS_ONCE, CHARGES, FIGURES, TOTALS, KEYS],
    },
    Alteration {
        what: "a receipt's cost",
        sqlite: OPEN_RECEIPTS_SQLITE,
        postgres: OPEN_RECEIPTS_POSTGRES,
        statement: "UPDATE receipts SET cost_pico = cost_pico + 1 WHERE id = 'req_1_0'",
        drift: &[FIGURES, TOTALS],
    },
    Alteration {
        what: "a receipt's tokens",
        sqlite: OPEN_RECEIPTS_SQLITE,
        postgres: OPEN_RECEIPTS_POSTGRES,
        statement: "UPDATE receipts SET completion_tokens = completion_tokens - 1 WHERE id = 'req_1_1'",
        drift: &[FIGURES, TOTALS],
    },
    Alteration {
        what: "a receipt deleted",
        sqlite: OPEN_RECEIPTS_SQLITE,
        postgres: OPEN_RECEIPTS_POSTGRES,
        statement: "DELETE FROM receipts WHERE id = 'req_1_0'",
        drift: &[CHARGES, TOTALS, KEYS],
    },
    Alteration {
        what: "a charge passed off as a release",
        sqlite: OPEN_RECEIPTS_SQLITE,
        postgres: OPEN_RECEIPTS_POSTGRES,
        statement: "UPDATE receipts SET outcome = 'released' WHERE id = 'req_1_0'",
        drift: &[ENDS_ONCE, TOTALS],
    },
    Alteration {
        what: "a payment's state",
        sqlite: &["DROP TRIGGER payments_legal_moves"],
        postgres: &["ALTER TABLE payments DISABLE TRIGGER payments_legal_moves"],
        statement: "UPDATE payments SET state = 'failed' WHERE id = 1",
        drift: &[CREDITS],
    },
    Alteration {
        what: "a payment's value",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE payments SET value_micro = value_micro + 1 WHERE id = 1",
        drift: &[CREDITS],
    },
    Alteration {
        what: "a payment deleted",
        sqlite: &[],
        postgres: &[],
        statement: "DELETE FROM payments WHERE id = 1",
        drift: &[CREDITS],
    },
    Alteration {
        what: "what a withdrawal came to",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE payments SET value_micro = value_micro + 1 WHERE id = 6",
        drift: &[WITHDRAWN],
    },
    Alteration {
        what: "a withdrawal that was paid passed off as given back",
        sqlite: &["DROP TRIGGER payments_legal_moves", "DROP TRIGGER withdrawals_end_once"],
        postgres: &[
            "ALTER TABLE payments DISABLE TRIGGER payments_legal_moves",
            "ALTER TABLE payments DISABLE TRIGGER withdrawals_end_once",
        ],
        statement: "UPDATE payments SET state = 'expired' WHERE id = 6",
        drift: &[WITHDRAWN],
    },
    Alteration {
        what: "whose a withdrawal was",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE payments SET to_wallet = '0x0101010101010101010101010101010101010101' WHERE id = 6",
        drift: &[WITHDRAWN],
    },
    Alteration {
        what: "a withdrawal passed off as a payment",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE payments SET kind = 'authorization' WHERE id = 6",
        drift: &[CREDITS, WITHDRAWN],
    },
    Alteration {
        what: "a withdrawal under way deleted",
        sqlite: &[],
        postgres: &[],
        statement: "DELETE FROM payments WHERE id = 7",
        drift: &[LOCKED],
    },
    Alteration {
        what: "a usage total",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE usage_totals SET charged_micro = charged_micro + 1
                    WHERE wallet = '0x0101010101010101010101010101010101010101'",
        drift: &[TOTALS],
    },
    Alteration {
        what: "a usage total's revenue",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE usage_totals SET revenue_pico = revenue_pico - 1",
        drift: &[TOTALS],
    },
    Alteration {
        what: "a usage total deleted",
        sqlite: &[],
        postgres: &[],
        statement: "DELETE FROM usage_totals WHERE wallet = '0x0101010101010101010101010101010101010101'",
        drift: &[TOTALS],
    },
    Alteration {
        what: "what a key has spent in all",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE key_spending SET spent_micro = spent_micro - 1 WHERE day = 0",
        drift: &[KEYS],
    },
    Alteration {
        what: "what a key has spent in a day",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE key_spending SET spent_micro = 0 WHERE day > 0",
        drift: &[KEYS],
    },
    Alteration {
        what: "what a key holds",
        sqlite: &[],
        postgres: &[],
        statement: "UPDATE key_spending SET held_micro = held_micro + 1 WHERE day = 0",
        drift: &[KEYS],
    },
    Alteration {
        what: "the spending of a key deleted",
        sqlite: &[],
        postgres: &[],
        statement: "DELETE FROM key_spending",
        drift: &[KEYS],
    },
];

#[tokio::test]
async fn what_is_altered_by_hand_is_found_and_named_on_sqlite() {
    for alteration in ALTERATIONS {
        alter_and_audit(Books::sqlite().await, alteration).await;
    }
}

#[tokio::test]
async fn what_is_altered_by_hand_is_found_and_named_on_postgres() {
    for alteration in ALTERATIONS {
        alter_and_audit(Books::postgres().await, alteration).await;
    }
}

async fn alter_and_audit(books: Books, alteration: &Alteration) {
    let Alteration { what, sqlite, postgres, statement, drift } = alteration;
    fill(&books).await;
    for unlock in if books.is_postgres() { *postgres } else { *sqlite } {
        books.sql(unlock).await.unwrap();
    }
    assert!(books.sql(statement).await.unwrap() > 0, "nothing was altered: {what}");
    let report = audit::run(&books.db, None).await.unwrap();
    let found: Vec<_> =
        report.0.iter().filter(|row| row.verdict == Verdict::Drift).map(|row| row.check).collect();
    for check in *drift {
        assert!(found.contains(check), "{what} is not found by {check:?}:\n{report}");
    }
    assert_eq!(found.len(), drift.len(), "{what} is found by more than {drift:?}:\n{report}");

    let output = audit_command(&books);
    let table = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{what}:\n{table}");
    assert!(
        drift.iter().all(|check| table.lines().any(|l| l.starts_with("DRIFT") && l.contains(check))),
        "{table}"
    );
    books.discard().await;
}
