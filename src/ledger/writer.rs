//! Group commit: operations that come while a commit is under way wait for it, and then go together in
//! one transaction. Nobody waits for a batch to fill, and under load the disk is waited for once for many.
//!
//! Who asks is told when it is committed. Who holds may ask to be told already when it is certain to fit
//! ([`Told::WhenDecided`]): a hold that is lost after that costs nobody but the operator, and the request
//! need not wait for the disk.
//!
//! Each wallet has a queue of its own, and a batch takes one operation of each in turn, so that a wallet
//! with a thousand waiting delays its own.

use std::collections::{HashMap, HashSet, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::clock::Clock;
use crate::db::{Db, DbError, Driver};
use crate::id::Wallet;
use crate::ledger::batch::{Loaded, Operation, PostgresStore, SqliteStore, Store};
use crate::ledger::{Ended, LedgerError};
use crate::tasks::Tasks;

/// Operations in one transaction. More hardly make each of them cheaper and all wait longer; and with fewer
/// than there are callers the next batch fills while one is under way.
const BATCH: usize = 256;
/// Holds that wait at most. They are a second's work or so: who would wait longer is told at once …
const WAITING_HOLDS: usize = 4096;
/// … and of one wallet, so that there is room for the others'.
const WAITING_HOLDS_OF_A_WALLET: usize = 1024;
/// Batches under way at the same time on PostgreSQL. One is enough for as long as it gets on: two of half the
/// size cost the server half as much again. Where one waits, for a slow disk or for a wallet that somebody else
/// has taken, another begins.
const POSTGRES_WRITERS: usize = 4;
/// For so long one gets on: several times what a batch takes.
const PATIENCE: Duration = Duration::from_millis(20);

/// What an operation came to.
type Answer = Result<Ended, LedgerError>;

/// When who asks is to be told.
#[derive(Copy, Clone, PartialEq, Eq)]
pub enum Told {
    WhenDecided,
    WhenCommitted,
}

struct Waiting {
    operation: Operation,
    asker: Asker,
}

/// Who waits for an answer, until it has been told.
struct Asker {
    answer: Option<oneshot::Sender<Answer>>,
    told: Told,
}

impl Asker {
    fn tell(&mut self, answer: Answer) {
        if let Some(waiting) = self.answer.take() {
            // If nobody waits for it any more, it is done all the same.
            drop(waiting.send(answer));
        }
    }
}

/// Takes operations and answers them. Cheap to clone.
#[derive(Clone)]
pub struct Writer(Arc<Inner>);

struct Inner {
    driver: Driver,
    clock: Clock,
    node: String,
    tasks: Tasks,
    most_writers: usize,
    queue: Mutex<Queue>,
}

impl Writer {
    pub fn new(db: &Db, clock: Clock, node: String) -> Self {
        let driver = db.driver();
        let most_writers = match driver {
            Driver::Sqlite(_) => 1,
            Driver::Postgres(_) => POSTGRES_WRITERS,
        };
        let (tasks, queue) = (Tasks::default(), Mutex::default());
        Self(Arc::new(Inner { driver, clock, node, tasks, most_writers, queue }))
    }

    /// Has an operation done, and returns what it came to. It is done also if the caller does not wait.
    pub async fn submit(&self, operation: Operation, told: Told) -> Answer {
        let (answer, answered) = oneshot::channel();
        self.0.queue().push(Waiting { operation, asker: Asker { answer: Some(answer), told } })?;
        self.0.write_if_need_be();
        answered.await.unwrap_or(Err(LedgerError::Db(DbError::Abandoned)))
    }

    /// Resolves when all that was submitted has been answered and written.
    pub async fn idle(&self) {
        self.0.tasks.idle().await;
    }
}

impl Inner {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a writer where there is something to write and nobody who gets on with it.
    fn write_if_need_be(self: &Arc<Self>) {
        {
            let mut queue = self.queue();
            if queue.ready.is_empty() || queue.writers > queue.stuck || queue.writers >= self.most_writers {
                return;
            }
            queue.writers += 1;
        }
        // With the queue let go of: what cannot be started any more is dropped at once, and takes it.
        let (inner, has_ended) = (Arc::clone(self), false);
        match &self.driver {
            Driver::Postgres(pool) => {
                let writing = Writing::<PostgresStore> { inner, home: pool.clone(), has_ended };
                self.tasks.spawn(writing.write_until_empty());
            }
            // A thread of its own while there is something to write: it computes, and waits for the disk.
            Driver::Sqlite(file) => {
                let writing = Writing::<SqliteStore> { inner, home: file.clone(), has_ended };
                let runtime = Handle::current();
                self.tasks.spawn_blocking(move || runtime.block_on(writing.write_until_empty()));
            }
        }
    }

    /// Does operations in one transaction, and tells who asked.
    async fn apply(
        &self,
        store: &mut impl Store,
        operations: &[Operation],
        askers: &mut [Asker],
    ) -> Result<(), Failure> {
        let must_last = operations.iter().any(Operation::must_last);
        loop {
            store.begin(must_last).await.map_err(Failure::Begin)?;
            let now = self.clock.now();
            let mut page = match store.load(operations, now).await.map_err(Failure::Within)? {
                Loaded::Page(page) => page,
                Loaded::NewWallets => {
                    store.commit().await.map_err(Failure::Commit)?;
                    continue;
                }
            };
            let answers: Vec<_> = operations.iter().map(|operation| page.decide(operation)).collect();
            if page.is_changed() {
                store.write(&page, &self.node, now).await.map_err(Failure::Within)?;
                tell_early(operations, &answers, askers);
                store.commit().await.map_err(Failure::Commit)?;
                metrics::counter!("farebox_ledger_commits_total").increment(1);
            }
            for (asker, answer) in askers.iter_mut().zip(answers) {
                asker.tell(answer);
            }
            return Ok(());
        }
    }
}

/// Tells who need not wait for the commit, now that the database has taken what it is about.
fn tell_early(operations: &[Operation], answers: &[Answer], askers: &mut [Asker]) {
    for ((operation, answer), asker) in operations.iter().zip(answers).zip(askers) {
        if let Ok(held) = answer
            && asker.told == Told::WhenDecided
            && !operation.must_last()
        {
            asker.tell(Ok(*held));
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
struct Writing<S: Store> {
    inner: Arc<Inner>,
    home: S::Home,
    has_ended: bool,
}

impl<S: Store> Writing<S> {
    async fn write_until_empty(mut self) {
        loop {
            // What comes while the turn is waited for goes with the others.
            let store = match S::turn(&self.home).await {
                Ok(store) => store,
                Err(error) => return self.give_up(error),
            };
            let Some(batch) = self.next_batch() else { return };
            let mut written = pin!(batch.write(store));
            if tokio::time::timeout(PATIENCE, &mut written).await.is_err() {
                let stuck = Stuck::new(&self.inner);
                written.await;
                drop(stuck);
            }
        }
    }

    /// Ends with all that wait told why.
    fn give_up(&mut self, error: DbError) {
        let waiting = {
            let mut queue = self.inner.queue();
            queue.writers -= 1;
            self.has_ended = true;
            queue.take_all()
        };
        let mut askers: Vec<_> = waiting.into_iter().map(|waiting| waiting.asker).collect();
        tell_all(&mut askers, &Arc::new(error));
    }

    fn next_batch(&mut self) -> Option<Batch> {
        let mut queue = self.inner.queue();
        // Of two that get on, one is enough.
        let is_needed = queue.writers <= queue.stuck + 1;
        let waiting = if is_needed { queue.take() } else { Vec::new() };
        if waiting.is_empty() {
            queue.writers -= 1;
            self.has_ended = true;
            return None;
        }
        let wallets = waiting.iter().map(|waiting| waiting.operation.wallet()).collect();
        let (operations, askers) =
            waiting.into_iter().map(|waiting| (waiting.operation, waiting.asker)).unzip();
        Some(Batch { inner: Arc::clone(&self.inner), wallets, operations, askers })
    }
}

impl<S: Store> Drop for Writing<S> {
    fn drop(&mut self) {
        if !self.has_ended {
            // Cut off by a panic, or with its runtime. Who waits is told, rather than left to wait.
            let mut queue = self.inner.queue();
            queue.writers -= 1;
            drop(queue.take_all());
        }
    }
}

/// Told of a writer that does not get on, for as long as it does not.
struct Stuck<'a>(&'a Arc<Inner>);

impl<'a> Stuck<'a> {
    fn new(inner: &'a Arc<Inner>) -> Self {
        inner.queue().stuck += 1;
        inner.write_if_need_be();
        Self(inner)
    }
}

impl Drop for Stuck<'_> {
    fn drop(&mut self) {
        self.0.queue().stuck -= 1;
    }
}

/// Operations that go together. Their wallets' other operations wait until it is gone.
struct Batch {
    inner: Arc<Inner>,
    wallets: HashSet<Wallet>,
    operations: Vec<Operation>,
    /// Of each operation.
    askers: Vec<Asker>,
}

impl Batch {
    async fn write(mut self, mut store: impl Store) {
        match self.inner.apply(&mut store, &self.operations, &mut self.askers).await {
            Ok(()) => {}
            Err(failure) if failure.is_about_rows() => {
                let (error, operations) = (failure.into_error(), self.operations.len());
                tracing::warn!(%error, operations, "a batch was refused; each is tried alone");
                self.write_one_by_one(store).await;
            }
            Err(failure) => self.inner.fail(std::mem::take(&mut self.askers), failure),
        }
    }

    /// What was decided in memory should be taken. Where it is not, it is one operation that fails.
    async fn write_one_by_one(&mut self, mut store: impl Store) {
        let mut askers = std::mem::take(&mut self.askers);
        for at in 0..self.operations.len() {
            let (Some(operation), Some(asker)) = (self.operations.get(at..=at), askers.get_mut(at..=at))
            else {
                return;
            };
            match self.inner.apply(&mut store, operation, asker).await {
                Ok(()) => {}
                Err(failure) if failure.is_about_rows() => {
                    let error = Arc::new(failure.into_error());
                    tell_all(asker, &error);
                }
                Err(failure) => return self.inner.fail(askers.split_off(at), failure),
            }
        }
    }
}

impl Inner {
    /// Tells those who asked that it failed, and where nothing could be begun all that wait as well: it has
    /// been waited for as long as one waits for a connection, and nobody waits for that in turn.
    fn fail(&self, mut askers: Vec<Asker>, failure: Failure) {
        if matches!(failure, Failure::Begin(_)) {
            askers.extend(self.queue().take_all().into_iter().map(|waiting| waiting.asker));
        }
        tell_all(&mut askers, &Arc::new(failure.into_error()));
    }
}

fn tell_all(askers: &mut [Asker], error: &Arc<DbError>) {
    for asker in askers {
        asker.tell(Err(LedgerError::Db(DbError::Shared(Arc::clone(error)))));
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.inner.queue().give_back(&self.wallets);
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
    /// Of these, who are at one batch for longer than it should take.
    stuck: usize,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::ledger::{Ending, Hold};
    use crate::money::{MicroUsdc, UnitPrice};
    use crate::pricing::{Prices, Terms};

    fn waiting(number: u8, id: usize) -> Waiting {
        let price = UnitPrice::new(1);
        let hold = Hold {
            id: id.to_string(),
            wallet: Wallet([number; 20].into()),
            api_key_id: None,
            amount: MicroUsdc::new(1),
            terms: Terms {
                model: String::new(),
                provider: String::new(),
                upstream_model: String::new(),
                prices: Arc::new(Prices::of_text(price, price, price)),
                markup_bps: 0,
                price_version: None,
            },
            created_at: Timestamp::from_millis(0),
        };
        let operation = Operation::End(Ending::released(hold, "test"));
        Waiting { operation, asker: Asker { answer: None, told: Told::WhenCommitted } }
    }

    /// Of which wallets the next batch is, in its order.
    fn next(queue: &mut Queue) -> Vec<u8> {
        queue.take().iter().map(|waiting| waiting.operation.wallet().0[0]).collect()
    }

    #[test]
    fn a_batch_takes_of_each_wallet_one_in_turn() {
        let mut queue = Queue::default();
        for id in 0..1000 {
            queue.push(waiting(1, id)).unwrap();
        }
        for (number, id) in [(2, 1000), (3, 1001), (2, 1002)] {
            queue.push(waiting(number, id)).unwrap();
        }
        let batch = next(&mut queue);
        assert_eq!((batch.len(), &batch[..7]), (BATCH, [1, 2, 3, 1, 2, 1, 1].as_slice()));
        // While it is under way, nothing else of its wallets is begun, and others are.
        assert!(next(&mut queue).is_empty());
        queue.push(waiting(2, 1003)).unwrap();
        queue.push(waiting(4, 1004)).unwrap();
        assert_eq!(next(&mut queue), [4]);
        queue.give_back(&HashSet::from([1, 2, 3].map(|number| Wallet([number; 20].into()))));
        let batch = next(&mut queue);
        assert_eq!(batch.iter().filter(|number| **number == 2).count(), 1);
        assert_eq!(batch.len(), BATCH);
    }
}
