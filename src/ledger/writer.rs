//! Group commit: operations that come while a commit is under way wait for it, and then go together in
//! one transaction. Nobody waits for a batch to fill, and under load the disk is waited for once for many.
//!
//! Each wallet has a queue of its own, and a batch takes one operation of each in turn, so that a wallet
//! with a thousand waiting delays its own.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::clock::Clock;
use crate::db::{Db, DbError};
use crate::id::Wallet;
use crate::ledger::batch::Operation;
use crate::ledger::batch::store::{self, Loaded};
use crate::ledger::{Ended, LedgerError};
use crate::tasks::Tasks;

/// Operations in one transaction. More hardly make each of them cheaper and all wait longer; and with fewer
/// than there are callers the next batch fills while one is under way.
const BATCH: usize = 256;
/// Holds that wait at most. They are a second's work or so: who would wait longer is told at once …
const WAITING_HOLDS: usize = 4096;
/// … and of one wallet, so that there is room for the others'.
const WAITING_HOLDS_OF_A_WALLET: usize = 1024;
/// Batches under way at the same time: on PostgreSQL one is prepared while another waits for the disk, or
/// for a wallet that somebody else has taken.
const POSTGRES_WRITERS: usize = 2;

/// What an operation came to.
type Answer = Result<Ended, LedgerError>;

struct Waiting {
    operation: Operation,
    answer: oneshot::Sender<Answer>,
}

/// Takes operations and answers them. Cheap to clone.
#[derive(Clone)]
pub struct Writer(Arc<Inner>);

struct Inner {
    db: Db,
    clock: Clock,
    node: String,
    tasks: Tasks,
    most_writers: usize,
    queue: Mutex<Queue>,
}

impl Writer {
    pub fn new(db: Db, clock: Clock, node: String) -> Self {
        let most_writers = if db.kind() == "postgres" { POSTGRES_WRITERS } else { 1 };
        let (tasks, queue) = (Tasks::default(), Mutex::default());
        Self(Arc::new(Inner { db, clock, node, tasks, most_writers, queue }))
    }

    /// Has an operation done, and returns what it came to when that is committed. It is done also if the
    /// caller does not wait for it.
    pub async fn submit(&self, operation: Operation) -> Answer {
        let (answer, answered) = oneshot::channel();
        {
            let mut queue = self.0.queue();
            queue.push(Waiting { operation, answer })?;
            if queue.writers < self.0.most_writers && !queue.ready.is_empty() {
                queue.writers += 1;
                let writing = Writing { inner: Arc::clone(&self.0), has_ended: false };
                self.0.tasks.spawn(writing.write_until_empty());
            }
        }
        answered.await.unwrap_or(Err(LedgerError::Db(DbError::Abandoned)))
    }

    /// Resolves when all that was submitted has been answered.
    pub async fn idle(&self) {
        self.0.tasks.idle().await;
    }
}

impl Inner {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does operations in one transaction, and returns what each came to, in their order.
    async fn apply(&self, batch: &[Waiting]) -> Result<Vec<Answer>, Failure> {
        let operations: Vec<_> = batch.iter().map(|waiting| &waiting.operation).collect();
        let must_last = operations.iter().any(|operation| operation.must_last());
        loop {
            let mut tx = self.db.begin_batch(must_last).await.map_err(Failure::Begin)?;
            let now = self.clock.now();
            let mut page = match store::load(&mut tx, &operations).await.map_err(Failure::Within)? {
                Loaded::Page(page) => page,
                // Written alone: an insertion among rows that are taken in order would break the order.
                Loaded::NoWallets(wallets) => {
                    store::insert_wallets(&mut tx, &wallets, now).await.map_err(Failure::Within)?;
                    tx.commit().await.map_err(Failure::Commit)?;
                    continue;
                }
            };
            let answers = operations.iter().map(|operation| page.decide(operation)).collect();
            if page.is_changed() {
                store::write(&mut tx, &page, &self.node, now).await.map_err(Failure::Within)?;
                tx.commit().await.map_err(Failure::Commit)?;
                metrics::counter!("farebox_ledger_commits_total").increment(1);
            }
            return Ok(answers);
        }
    }
}

/// Where a batch failed.
enum Failure {
    /// There is no connection, or SQLite's lock is another's: nothing that waits can be done.
    Begin(DbError),
    /// It is undone.
    Within(DbError),
    /// Nobody knows whether it was done.
    Commit(DbError),
}

impl Failure {
    /// Whether one operation is to blame, and the others would be done without it.
    fn is_about_rows(&self) -> bool {
        matches!(self, Self::Within(error) if error.is_about_rows())
    }

    fn into_error(self) -> DbError {
        match self {
            Self::Begin(error) | Self::Within(error) | Self::Commit(error) => error,
        }
    }
}

/// A writer's place. However the writer ends, another can take it.
struct Writing {
    inner: Arc<Inner>,
    has_ended: bool,
}

impl Writing {
    async fn write_until_empty(mut self) {
        while let Some(batch) = self.next_batch() {
            batch.write().await;
        }
    }

    fn next_batch(&mut self) -> Option<Batch> {
        let mut queue = self.inner.queue();
        let waiting = queue.take();
        if waiting.is_empty() {
            queue.writers -= 1;
            self.has_ended = true;
            return None;
        }
        let wallets = waiting.iter().map(|waiting| waiting.operation.wallet()).collect();
        Some(Batch { inner: Arc::clone(&self.inner), wallets, waiting })
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.has_ended {
            // Cut off by a panic, or with its runtime. Who waits is told, rather than left to wait.
            let mut queue = self.inner.queue();
            queue.writers -= 1;
            drop(queue.take_all());
        }
    }
}

/// Operations that go together. Their wallets' other operations wait until it is gone.
struct Batch {
    inner: Arc<Inner>,
    wallets: HashSet<Wallet>,
    waiting: Vec<Waiting>,
}

impl Batch {
    async fn write(mut self) {
        let batch = std::mem::take(&mut self.waiting);
        match self.inner.apply(&batch).await {
            Ok(answers) => {
                for (waiting, answer) in batch.into_iter().zip(answers) {
                    waiting.say(answer);
                }
            }
            Err(failure) if failure.is_about_rows() => {
                let error = failure.into_error();
                tracing::warn!(%error, operations = batch.len(), "a batch was refused; each is tried alone");
                self.write_one_by_one(batch).await;
            }
            Err(failure) => self.fail(batch, failure),
        }
    }

    /// What was decided in memory should be taken. Where it is not, it is one operation that fails.
    async fn write_one_by_one(&self, batch: Vec<Waiting>) {
        let mut batch = batch.into_iter();
        while let Some(waiting) = batch.next() {
            match self.inner.apply(std::slice::from_ref(&waiting)).await {
                Ok(mut answers) => waiting.say(answers.pop().unwrap_or(Err(DbError::Abandoned.into()))),
                Err(failure) if failure.is_about_rows() => waiting.say(Err(failure.into_error().into())),
                Err(failure) => {
                    let rest = std::iter::once(waiting).chain(batch).collect();
                    return self.fail(rest, failure);
                }
            }
        }
    }

    fn fail(&self, mut batch: Vec<Waiting>, failure: Failure) {
        if matches!(failure, Failure::Begin(_)) {
            // It has been waited for as long as one waits for a connection: nobody waits for that in turn.
            batch.extend(self.inner.queue().take_all());
        }
        let error = Arc::new(failure.into_error());
        for waiting in batch {
            waiting.say(Err(LedgerError::Db(DbError::Shared(Arc::clone(&error)))));
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.inner.queue().give_back(&self.wallets);
    }
}

impl Waiting {
    fn say(self, answer: Answer) {
        // If nobody waits for it any more, it is done all the same.
        drop(self.answer.send(answer));
    }
}

/// What waits, by wallet.
#[derive(Default)]
struct Queue {
    lines: HashMap<Wallet, Line>,
    /// The wallets whose turn it is, one after the other: something waits, and nothing is under way.
    ready: VecDeque<Wallet>,
    /// Holds that wait. Ends are not counted, and never refused: each is of a hold that was let in.
    holds: usize,
    writers: usize,
}

/// What waits of one wallet, in the order it came in.
#[derive(Default)]
struct Line {
    waiting: VecDeque<Waiting>,
    holds: usize,
    is_under_way: bool,
}

impl Queue {
    fn push(&mut self, waiting: Waiting) -> Result<(), LedgerError> {
        let (wallet, is_hold) = (waiting.operation.wallet(), waiting.operation.is_hold());
        let of_wallet = self.lines.get(&wallet).map_or(0, |line| line.holds);
        if is_hold && (self.holds >= WAITING_HOLDS || of_wallet >= WAITING_HOLDS_OF_A_WALLET) {
            return Err(LedgerError::Overloaded);
        }
        let line = self.lines.entry(wallet).or_default();
        line.waiting.push_back(waiting);
        if is_hold {
            line.holds += 1;
            self.holds += 1;
        }
        if line.waiting.len() == 1 && !line.is_under_way {
            self.ready.push_back(wallet);
        }
        Ok(())
    }

    /// The next batch: of each wallet one, and again, until it is full.
    fn take(&mut self) -> Vec<Waiting> {
        let mut batch = Vec::new();
        while batch.len() < BATCH
            && let Some(wallet) = self.ready.pop_front()
        {
            let Some(line) = self.lines.get_mut(&wallet) else { continue };
            line.is_under_way = true;
            if let Some(waiting) = line.waiting.pop_front() {
                let holds = usize::from(waiting.operation.is_hold());
                line.holds -= holds;
                self.holds -= holds;
                batch.push(waiting);
            }
            if !line.waiting.is_empty() {
                self.ready.push_back(wallet);
            }
        }
        self.ready.retain(|wallet| self.lines.get(wallet).is_some_and(|line| !line.is_under_way));
        batch
    }

    /// All that waits.
    fn take_all(&mut self) -> Vec<Waiting> {
        self.ready.clear();
        self.holds = 0;
        let mut all = Vec::new();
        self.lines.retain(|_, line| {
            line.holds = 0;
            all.extend(line.waiting.drain(..));
            line.is_under_way
        });
        all
    }

    /// Lets the next operations of these wallets have their turn.
    fn give_back(&mut self, wallets: &HashSet<Wallet>) {
        for wallet in wallets {
            let Some(line) = self.lines.get_mut(wallet) else { continue };
            line.is_under_way = false;
            if line.waiting.is_empty() {
                self.lines.remove(wallet);
            } else {
                self.ready.push_back(*wallet);
            }
        }
    }
}
