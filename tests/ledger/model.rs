//! The same random trace applied to a plain model in memory, to SQLite and to PostgreSQL: they must
//! not differ in any answer, nor in any balance, receipt or total.

use std::collections::BTreeMap;

use farebox::db::DbError;
use farebox::ledger::{
    Balance, Ended, Ending, HOLD_LOST, Hold, KeyCap, LedgerError, Outcome, Receipt, Spending, UsageTotal,
};
use farebox::money::{MicroUsdc, PicoUsd};
use farebox::pricing::{Unit, Usage};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use crate::support::books::{self, Books, NOW, wallet};

const WALLETS: u8 = 3;
/// The keys that holds are made with: one capped in all, one a day. Both are shared by all wallets, as
/// real ones are not.
const KEYS: [Key; 2] =
    [Key { id: 1, cap: Some(9000), cap_per_day: None }, Key { id: 2, cap: None, cap_per_day: Some(4000) }];
/// From one call to the next, so that a trace is several days long.
const SECONDS_BETWEEN_HOLDS: i64 = 900;
const NODES: [&str; 2] = ["one", "two"];
/// Traces of at least …
const TRACES: u32 = 40;
/// … so many steps: 10,000 together.
const STEPS: usize = 250;

#[test]
fn a_random_trace_is_the_same_in_the_model_on_sqlite_and_on_postgres() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = Config {
        cases: TRACES,
        failure_persistence: None,
        // Each try of a shorter trace needs two new databases.
        max_shrink_iters: 300,
        max_shrink_time: 60_000,
        ..Config::default()
    };
    let traces = prop::collection::vec(step(), STEPS..=STEPS + 50);
    let steps_taken = std::cell::Cell::new(0);
    TestRunner::new(config)
        .run(&traces, |trace| {
            steps_taken.set(steps_taken.get() + trace.len());
            runtime.block_on(run(&trace))
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
    assert!(steps_taken.get() >= 10_000);
}

async fn run(trace: &[Step]) -> Result<(), TestCaseError> {
    let mut model = Model::default();
    // The keys are this one's, so that it is in the books before it is credited: it can hold nothing, but that.
    model.wallets.insert(1, Balance::default());
    let (sqlite, postgres) = tokio::join!(Books::sqlite(), Books::postgres());
    for books in [&sqlite, &postgres] {
        for key in KEYS {
            super::make_key(books, key.id, key.cap, key.cap_per_day).await;
        }
    }
    for step in trace {
        let Some(call) = model.plan(step) else { continue };
        let expected = model.answer(&call);
        let expected = (expected, (0..WALLETS).map(|number| model.balance(number)).collect());
        let (on_sqlite, on_postgres) = tokio::join!(apply(&sqlite, &call), apply(&postgres, &call));
        prop_assert_eq!(&on_sqlite, &expected, "sqlite to {:?}", &call);
        prop_assert_eq!(&on_postgres, &expected, "postgres to {:?}", &call);
    }
    for books in [sqlite, postgres] {
        let ledger = books.ledger("reader");
        let rows = books.db.rows("SELECT * FROM key_spending", vec![]).await.unwrap();
        for row in rows {
            let key = (row.int("api_key_id").unwrap(), row.int("day").unwrap());
            let expected = model.spending.get(&key).copied().unwrap_or_default();
            let kept =
                Spending { spent: row.micro("spent_micro").unwrap(), held: row.micro("held_micro").unwrap() };
            prop_assert_eq!(kept, expected, "{} key and day {:?}", books.db.kind(), key);
        }
        for number in 0..WALLETS {
            let owner = wallet(number);
            let receipts = ledger.receipts(owner, None, 10_000).await.unwrap();
            prop_assert_eq!(receipts, model.receipts(number), "{}", books.db.kind());
            let totals = ledger.usage_totals(owner).await.unwrap();
            prop_assert_eq!(totals, model.totals(number), "{}", books.db.kind());
        }
        let locked: i64 = model.open.values().map(|open| open.hold.amount.get()).sum();
        let open = (i64::try_from(model.open.len()).unwrap(), MicroUsdc::new(locked));
        prop_assert_eq!(ledger.open_holds().await.unwrap(), open);
        let report = farebox::audit::run(&books.db, None).await.unwrap();
        prop_assert!(!report.has_drift(), "{}: {}", books.db.kind(), report);
        books.discard().await;
    }
    Ok(())
}

/// Makes a call; returns its answer and then every wallet's balance.
async fn apply(books: &Books, call: &Call) -> (Answer, Vec<Balance>) {
    books.clock.advance_seconds(1);
    let answer = answer(books, call).await;
    let mut balances = vec![Balance::default(); WALLETS.into()];
    for row in books.db.rows("SELECT * FROM wallets", vec![]).await.unwrap() {
        let number = row.wallet("address").unwrap().0[0];
        let (balance, locked) = (row.micro("balance_micro").unwrap(), row.micro("locked_micro").unwrap());
        balances[usize::from(number)] = Balance { balance, locked, debt: MicroUsdc::ZERO };
    }
    (answer, balances)
}

struct Key {
    id: i64,
    cap: Option<i64>,
    cap_per_day: Option<i64>,
}

/// What may happen next. Which hold or payment is meant depends on what there is by then.
#[derive(Clone, Debug)]
enum Step {
    Credit {
        wallet: u8,
        micro: i64,
    },
    CreditAgain {
        payment: Index,
    },
    Hold {
        wallet: u8,
        micro: i64,
        key: Option<i64>,
        node: usize,
    },
    HoldAgain {
        hold: Index,
        node: usize,
    },
    HoldOther {
        hold: Index,
        wallet: u8,
        micro: i64,
    },
    End {
        hold: Index,
        how: How,
    },
    EndAgain {
        end: Index,
    },
    EndOther {
        end: Index,
        how: How,
    },
    EndAbove {
        hold: Index,
    },
    /// The database loses a hold in a crash …
    Lose {
        hold: Index,
    },
    /// … and the gateway, which lived on, ends it.
    EndLost {
        hold: Index,
        how: How,
    },
    /// One node finds the other dead.
    Sweep {
        node: usize,
    },
}

#[derive(Clone, Debug)]
enum How {
    Settle(Usage),
    Estimate(Usage),
    /// Tokens may have been used unseen: the whole hold.
    EstimateAll(Usage),
    Release,
}

fn step() -> impl Strategy<Value = Step> {
    let a_wallet = || 0..WALLETS;
    let node = || 0..NODES.len();
    let index = any::<Index>;
    prop_oneof![
        2 => (a_wallet(), 1..2500i64).prop_map(|(wallet, micro)| Step::Credit { wallet, micro }),
        1 => index().prop_map(|payment| Step::CreditAgain { payment }),
        8 => (a_wallet(), 0..2000i64, prop::option::of(1..3i64), node())
            .prop_map(|(wallet, micro, key, node)| Step::Hold { wallet, micro, key, node }),
        2 => (index(), node()).prop_map(|(hold, node)| Step::HoldAgain { hold, node }),
        1 => (index(), a_wallet(), 0..2000i64)
            .prop_map(|(hold, wallet, micro)| Step::HoldOther { hold, wallet, micro }),
        6 => (index(), how()).prop_map(|(hold, how)| Step::End { hold, how }),
        2 => index().prop_map(|end| Step::EndAgain { end }),
        2 => (index(), how()).prop_map(|(end, how)| Step::EndOther { end, how }),
        1 => index().prop_map(|hold| Step::EndAbove { hold }),
        2 => index().prop_map(|hold| Step::Lose { hold }),
        2 => (index(), how()).prop_map(|(hold, how)| Step::EndLost { hold, how }),
        1 => node().prop_map(|node| Step::Sweep { node }),
    ]
}

fn how() -> impl Strategy<Value = How> {
    let others =
        proptest::option::of((proptest::sample::select(Unit::all().collect::<Vec<_>>()), 0..2000u64));
    let usage =
        (0..2000u64, 0..2000u64, 0..2000u64, others).prop_map(|(prompt, cached, completion, other)| {
            let usage = Usage::tokens(prompt, completion).with(Unit::CachedPrompt, cached);
            // Of half of them the columns do not say all.
            other.map_or(usage, |(unit, count)| usage.with(unit, count))
        });
    prop_oneof![
        4 => usage.clone().prop_map(How::Settle),
        1 => usage.clone().prop_map(How::Estimate),
        1 => usage.prop_map(How::EstimateAll),
        2 => Just(How::Release),
    ]
}

/// A step made definite.
#[derive(Clone, Debug)]
enum Call {
    Credit { wallet: u8, amount: MicroUsdc, payment: i64 },
    Hold { hold: Hold, node: usize },
    End(Ending),
    Lose(Hold),
    Sweep { node: usize },
}

#[derive(Clone, PartialEq, Debug)]
enum Answer {
    Balance(Balance),
    Ended(Ended),
    Insufficient { required: MicroUsdc, balance: Balance },
    KeyCap(KeyCap),
    Conflict,
    OutOfRange,
    CreditedBefore,
    Lost,
    Swept(usize),
    Unexpected(String),
}

async fn answer(books: &Books, call: &Call) -> Answer {
    let ledger = |node: usize| books.ledger(NODES[node]);
    match call {
        Call::Credit { wallet: number, amount, payment } => {
            let mut tx = books.db.begin().await.unwrap();
            match books::credit(&ledger(0), &mut tx, wallet(*number), *amount, *payment).await {
                Ok(balance) => {
                    tx.commit().await.unwrap();
                    Answer::Balance(balance)
                }
                Err(error) => refusal(error),
            }
        }
        Call::Hold { hold, node } => ledger(*node).hold(hold).await.map_or_else(refusal, Answer::Balance),
        Call::End(ending) => ledger(0).end(ending).await.map_or_else(refusal, Answer::Ended),
        Call::Lose(hold) => {
            super::lose(books, hold).await;
            Answer::Lost
        }
        // No node ever renewed a lease, so each takes the other for dead, on either database.
        Call::Sweep { node } => ledger(*node).sweep().await.map_or_else(refusal, Answer::Swept),
    }
}

fn refusal(error: LedgerError) -> Answer {
    match error {
        LedgerError::Insufficient { required, balance } => Answer::Insufficient { required, balance },
        LedgerError::KeyCap(cap) => Answer::KeyCap(cap),
        LedgerError::Conflict(_) => Answer::Conflict,
        LedgerError::OutOfRange => Answer::OutOfRange,
        LedgerError::Frozen(_)
        | LedgerError::UnknownWallet(_)
        | LedgerError::Claimed(_)
        | LedgerError::Overloaded => Answer::Unexpected(error.to_string()),
        LedgerError::Db(error) if DbError::is_unique_violation(&error) => Answer::CreditedBefore,
        LedgerError::Db(error) => Answer::Unexpected(error.to_string()),
    }
}

/// The books as one would write them without a database.
#[derive(Default)]
struct Model {
    /// Credits so far; a payment's id is its place, from 1.
    credits: Vec<(u8, MicroUsdc)>,
    /// Balances of the wallets that are in the books: those that were ever credited, and that of the keys.
    wallets: BTreeMap<u8, Balance>,
    /// Every hold that was ever made, as it was asked for.
    asked: Vec<Hold>,
    open: BTreeMap<String, Open>,
    /// Of each key, by day; 0 is all days.
    spending: BTreeMap<(i64, i64), Spending>,
    /// Every end that was accepted, as it was asked for, and what it came to.
    ends: BTreeMap<String, (Ending, Receipt)>,
    /// Calls so far, which is also how many seconds have passed.
    calls: i64,
    ids: usize,
}

struct Open {
    hold: Hold,
    node: usize,
}

impl Model {
    fn balance(&self, number: u8) -> Balance {
        self.wallets.get(&number).copied().unwrap_or_default()
    }

    /// Makes a step definite; `None` where there is nothing yet that it could be about.
    fn plan(&mut self, step: &Step) -> Option<Call> {
        let pick = |index: &Index| (!self.asked.is_empty()).then(|| index.get(&self.asked).clone());
        Some(match step {
            Step::Credit { wallet, micro } => Call::Credit {
                wallet: *wallet,
                amount: MicroUsdc::new(*micro),
                payment: i64::try_from(self.credits.len()).unwrap() + 1,
            },
            Step::CreditAgain { payment } => {
                let place = (!self.credits.is_empty()).then(|| payment.index(self.credits.len()))?;
                let (wallet, amount) = self.credits[place];
                Call::Credit { wallet, amount, payment: i64::try_from(place).unwrap() + 1 }
            }
            Step::Hold { wallet: number, micro, key, node } => {
                self.ids += 1;
                // Mixed up, so that the order of ids is not the order of time.
                let id = format!("req_{:02}_{}", (self.ids * 37) % 100, self.ids);
                let mut hold = books::hold(id, wallet(*number), *micro);
                hold.api_key_id = *key;
                hold.created_at = NOW.plus_seconds(self.calls * SECONDS_BETWEEN_HOLDS);
                Call::Hold { hold, node: *node }
            }
            Step::HoldAgain { hold, node } => Call::Hold { hold: pick(hold)?, node: *node },
            Step::HoldOther { hold, wallet: number, micro } => {
                let mut hold = pick(hold)?;
                (hold.wallet, hold.amount) = (wallet(*number), MicroUsdc::new(*micro));
                Call::Hold { hold, node: 0 }
            }
            Step::End { hold, how } => Call::End(how.of(&self.pick_open(hold)?)),
            Step::EndAgain { end } => Call::End(self.pick_end(end)?),
            Step::EndOther { end, how } => Call::End(self.other_end(end, how)?),
            Step::EndAbove { hold } => {
                let hold = self.pick_open(hold)?;
                let mut ending = How::Settle(Usage::default()).of(&hold);
                ending.charge.charged = MicroUsdc::new(hold.amount.get() + 1);
                Call::End(ending)
            }
            Step::Lose { hold } => Call::Lose(self.pick_open(hold)?),
            Step::EndLost { hold, how } => {
                let gone =
                    |hold: &&Hold| !self.open.contains_key(&hold.id) && !self.ends.contains_key(&hold.id);
                let lost: Vec<_> = self.asked.iter().filter(gone).collect();
                let place = (!lost.is_empty()).then(|| hold.index(lost.len()))?;
                Call::End(how.of(lost[place]))
            }
            Step::Sweep { node } => Call::Sweep { node: *node },
        })
    }

    fn pick_open(&self, index: &Index) -> Option<Hold> {
        let place = (!self.open.is_empty()).then(|| index.index(self.open.len()))?;
        self.open.values().nth(place).map(|open| open.hold.clone())
    }

    fn pick_end(&self, index: &Index) -> Option<Ending> {
        let place = (!self.ends.is_empty()).then(|| index.index(self.ends.len()))?;
        self.ends.values().nth(place).map(|(ending, _)| ending.clone())
    }

    /// An end that differs from the first one in what can be told from its receipt: the outcome, or
    /// a charge that was not cut down to what was available.
    fn other_end(&self, index: &Index, how: &How) -> Option<Ending> {
        let first = self.pick_end(index)?;
        let (_, receipt) = &self.ends[&first.hold.id];
        let other = how.of(&first.hold);
        let was_lost = receipt.reason.as_deref() == Some(HOLD_LOST);
        let differs =
            other.outcome != first.outcome || (!was_lost && other.charge.charged != first.charge.charged);
        differs.then_some(other)
    }

    fn answer(&mut self, call: &Call) -> Answer {
        self.calls += 1;
        match call {
            Call::Credit { wallet, amount, payment } => {
                let place = usize::try_from(*payment).unwrap() - 1;
                if place < self.credits.len() {
                    return Answer::CreditedBefore;
                }
                self.credits.push((*wallet, *amount));
                let balance = self.wallets.entry(*wallet).or_default();
                balance.balance = plus(balance.balance, *amount);
                Answer::Balance(*balance)
            }
            Call::Hold { hold, node } => self.hold(hold, *node),
            Call::End(ending) => self.end(ending),
            Call::Lose(hold) => {
                self.open.remove(&hold.id);
                let balance = self.wallets.get_mut(&number_of(hold)).unwrap();
                balance.locked = minus(balance.locked, hold.amount);
                self.count(hold, MicroUsdc::ZERO, minus(MicroUsdc::ZERO, hold.amount));
                Answer::Lost
            }
            Call::Sweep { node } => {
                let others = self.open.values().filter(|open| open.node != *node);
                let others: Vec<_> = others.map(|open| open.hold.clone()).collect();
                for hold in &others {
                    self.end(&Ending::released(hold.clone(), "gateway_stopped"));
                }
                Answer::Swept(others.len())
            }
        }
    }

    fn hold(&mut self, hold: &Hold, node: usize) -> Answer {
        let balance = self.balance(number_of(hold));
        match self.open.get(&hold.id) {
            Some(open) if open.hold == *hold => return Answer::Balance(balance),
            Some(_) => return Answer::Conflict,
            None if self.ends.contains_key(&hold.id) => return Answer::Conflict,
            None => {}
        }
        if let Some(cap) = self.cap_reached(hold) {
            return Answer::KeyCap(cap);
        }
        let Some(balance) = self.wallets.get_mut(&number_of(hold)) else {
            return Answer::Insufficient { required: hold.amount, balance };
        };
        if balance.balance.get() - balance.locked.get() < hold.amount.get() {
            return Answer::Insufficient { required: hold.amount, balance: *balance };
        }
        balance.locked = plus(balance.locked, hold.amount);
        let held = *balance;
        self.count(hold, MicroUsdc::ZERO, hold.amount);
        self.open.insert(hold.id.clone(), Open { hold: hold.clone(), node });
        if self.asked.iter().all(|asked| asked.id != hold.id) {
            self.asked.push(hold.clone());
        }
        Answer::Balance(held)
    }

    fn count(&mut self, hold: &Hold, spent: MicroUsdc, held: MicroUsdc) {
        let Some(key) = hold.api_key_id else { return };
        for day in [0, hold.created_at.utc_day()] {
            let total = self.spending.entry((key, day)).or_default();
            *total = Spending { spent: plus(total.spent, spent), held: plus(total.held, held) };
        }
    }

    fn cap_reached(&self, hold: &Hold) -> Option<KeyCap> {
        let key = KEYS.iter().find(|key| Some(key.id) == hold.api_key_id)?;
        let over = |cap: Option<i64>, day, resets_at| {
            let cap = MicroUsdc::new(cap?);
            let spending = self.spending.get(&(key.id, day)).copied().unwrap_or_default();
            let total = plus(plus(spending.spent, spending.held), hold.amount);
            (total > cap).then_some(KeyCap { cap, spending, required: hold.amount, resets_at })
        };
        let day = hold.created_at.utc_day();
        over(key.cap, 0, None).or_else(|| over(key.cap_per_day, day, Some(hold.created_at.end_of_utc_day())))
    }

    fn end(&mut self, ending: &Ending) -> Answer {
        let hold = &ending.hold;
        if ending.charge.charged > hold.amount {
            return Answer::OutOfRange;
        }
        if let Some((first, receipt)) = self.ends.get(&hold.id) {
            let same = first.outcome == ending.outcome && first.charge.charged == ending.charge.charged;
            let balance = self.balance(number_of(hold));
            return if same {
                Answer::Ended(Ended { charged: receipt.charged, balance })
            } else {
                Answer::Conflict
            };
        }
        let held = self.open.remove(&hold.id);
        let balance = self.wallets.get_mut(&number_of(hold)).unwrap();
        let was_held = held.as_ref().map_or(MicroUsdc::ZERO, |open| open.hold.amount);
        let (charged, reason) = match held {
            Some(open) => {
                balance.locked = minus(balance.locked, open.hold.amount);
                (ending.charge.charged, ending.reason.clone())
            }
            None => (ending.charge.charged.min(balance.available()), Some(HOLD_LOST.to_owned())),
        };
        balance.balance = minus(balance.balance, charged);
        let ended = Ended { charged, balance: *balance };
        self.count(hold, charged, minus(MicroUsdc::ZERO, was_held));
        let receipt = Receipt {
            id: hold.id.clone(),
            wallet: hold.wallet,
            api_key_id: hold.api_key_id,
            outcome: ending.outcome,
            reason,
            terms: hold.terms.clone(),
            hold: hold.amount,
            charged,
            cost: ending.charge.cost,
            usage: ending.usage,
            usage_raw: None,
            upstream_cost: ending.upstream_cost,
            created_at: hold.created_at,
            ended_at: NOW.plus_seconds(self.calls),
        };
        self.ends.insert(hold.id.clone(), (ending.clone(), receipt));
        Answer::Ended(ended)
    }

    fn receipts(&self, number: u8) -> Vec<Receipt> {
        let of_wallet = self.ends.values().map(|(_, receipt)| receipt).filter(|r| r.wallet == wallet(number));
        let mut receipts: Vec<_> = of_wallet.cloned().collect();
        receipts.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        receipts
    }

    fn totals(&self, number: u8) -> Vec<UsageTotal> {
        let mut totals = BTreeMap::new();
        for receipt in self.receipts(number) {
            if receipt.outcome == Outcome::Released {
                continue;
            }
            let total = totals.entry(receipt.api_key_id).or_insert(UsageTotal {
                api_key_id: receipt.api_key_id,
                request_count: 0,
                prompt_tokens: 0,
                completion_tokens: 0,
                charged: MicroUsdc::ZERO,
                revenue: PicoUsd::ZERO,
            });
            total.request_count += 1;
            total.prompt_tokens += i64::try_from(receipt.usage.prompt_tokens()).unwrap();
            total.completion_tokens += i64::try_from(receipt.usage.completion_tokens()).unwrap();
            total.charged = plus(total.charged, receipt.charged);
            let revenue = i128::from(receipt.charged.get()) * 1_000_000 - receipt.cost.get();
            total.revenue = PicoUsd::new(total.revenue.get() + revenue);
        }
        totals.into_values().collect()
    }
}

impl How {
    fn of(&self, hold: &Hold) -> Ending {
        let estimated = |usage: &Usage| Ending {
            outcome: Outcome::Estimated,
            reason: Some("usage_missing".into()),
            ..books::settled(hold, *usage)
        };
        match self {
            Self::Settle(usage) => {
                let upstream_cost = Some(PicoUsd::new(usage.prompt_tokens().into()));
                Ending { upstream_cost, ..books::settled(hold, *usage) }
            }
            Self::Estimate(usage) => estimated(usage),
            Self::EstimateAll(usage) => {
                let mut ending = estimated(usage);
                ending.charge.charged = hold.amount;
                ending
            }
            Self::Release => Ending::released(hold.clone(), "upstream_failed"),
        }
    }
}

fn number_of(hold: &Hold) -> u8 {
    hold.wallet.0[0]
}

fn plus(a: MicroUsdc, b: MicroUsdc) -> MicroUsdc {
    MicroUsdc::new(a.get() + b.get())
}

fn minus(a: MicroUsdc, b: MicroUsdc) -> MicroUsdc {
    MicroUsdc::new(a.get() - b.get())
}
