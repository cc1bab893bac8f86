//! One database behind two drivers: an SQLite file to start with, PostgreSQL to grow.
//!
//! A statement is written once, in SQL that means the same to both: `$1` parameters, TEXT and
//! BIGINT columns, `RETURNING`, `ON CONFLICT`. Only the ledger's batches, which are most of what is
//! written, speak to each driver in its own way ([`Db::driver`]). Reads go to a pool. Writes are
//! transactions, and on SQLite they take turns, because two would only make each other wait.

use std::fs::File;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::OpenFlags;
use sqlx::error::{DatabaseError, ErrorKind};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgRow};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection as SqlxSqliteConnection, SqliteJournalMode, SqlitePool,
    SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Postgres, Row as _, SqlSafeStr as _, Sqlite, Transaction};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::clock::Timestamp;
use crate::id::{NotAnAddress, Wallet};
use crate::money::MicroUsdc;

/// How long a caller waits for a connection, or for SQLite's lock, before it is told to come back.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// A statement of ours takes milliseconds; one that takes this long is stuck.
const STATEMENT_TIMEOUT_MS: &str = "30000";
/// Nothing of ours waits inside a transaction but for the database itself.
const IDLE_TRANSACTION_TIMEOUT_MS: &str = "10000";
/// Readers of the SQLite file; more than the cores of a small machine gain nothing.
const SQLITE_READERS: u32 = 4;
/// Up to 16 MiB for the connection that writes batches; below zero it is in KiB. Each commit touches
/// several indexes.
const SQLITE_CACHE_KIB: i64 = -16_384;
/// A commit begins the log anew when it has grown to 64 MiB, and brings into the file what is not there yet.
const SQLITE_CHECKPOINT_PAGES: i64 = 16_384;
/// So much of it at most is to be left for that commit, and for all who wait behind it. The rest is brought there
/// from beside, the more often the quicker the log grows …
const SQLITE_LEFT_PAGES: i64 = 1024;
/// … between seldom enough that a page which many commits change is written there once, and as often as a disk takes.
const SQLITE_CHECKPOINT_PAUSE: RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_secs(1);
/// What SQLite says where a trigger has refused (SQLITE_CONSTRAINT_TRIGGER). On PostgreSQL they raise
/// `check_violation`.
const SQLITE_RAISED: &str = "1811";
/// Statements that are kept prepared for batches: all that they consist of, and a few to spare.
const SQLITE_STATEMENTS: usize = 32;
/// Connections to PostgreSQL: enough to keep a few cores busy, far below its default limit of 100.
const POSTGRES_CONNECTIONS: u32 = 16;

#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("the database address must begin with sqlite:// or postgres://")]
    UnknownScheme,
    #[error("{path} is in use by another farebox: stop it first, or use PostgreSQL for several nodes")]
    InUse { path: String },
    #[error("there is no database at {path}: `farebox serve` makes it when it first starts")]
    Missing { path: String },
    #[error("cannot open {path}: {source}")]
    Open { path: String, source: std::io::Error },
    #[error("the database holds a value that no farebox wrote: {0}")]
    Corrupt(String),
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
    #[error(transparent)]
    Sqlite(rusqlite::Error),
    #[error("migrating the database: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// What several operations failed of that were in one transaction.
    #[error(transparent)]
    Shared(Arc<DbError>),
    #[error("the transaction was abandoned before it said what came of it")]
    Abandoned,
}

impl DbError {
    /// Whether a unique constraint refused the statement: somebody else was first.
    pub fn is_unique_violation(&self) -> bool {
        self.refusal() == Some(Refusal::Unique)
    }

    /// Whether what the statement refers to is not there.
    pub fn is_foreign_key_violation(&self) -> bool {
        self.refusal() == Some(Refusal::ForeignKey)
    }

    /// Whether a CHECK constraint refused the statement, or one of our triggers, which say the same.
    pub fn is_check_violation(&self) -> bool {
        self.refusal() == Some(Refusal::Check)
    }

    /// Whether the same may succeed later: it was not the data that was refused.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Corrupt(_) => false,
            Self::Shared(error) => error.may_pass(),
            // What is unique is there, whoever was first, and nothing takes it away again.
            _ => !matches!(self.refusal(), Some(Refusal::Unique | Refusal::Check | Refusal::ForeignKey)),
        }
    }

    /// Whether it was about the rows that a statement touched, so that others may well be taken: a
    /// constraint, a value that cannot be, or another transaction in the way (a deadlock).
    pub fn is_about_rows(&self) -> bool {
        match self {
            Self::Corrupt(_) => true,
            Self::Shared(error) => error.is_about_rows(),
            _ => self.refusal().is_some(),
        }
    }

    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Sql(sqlx::Error::Database(error)) => Refusal::of_sqlx(&**error),
            Self::Sqlite(rusqlite::Error::SqliteFailure(error, _)) => Refusal::of_sqlite(*error),
            Self::Shared(error) => error.refusal(),
            _ => None,
        }
    }
}

impl From<rusqlite::Error> for DbError {
    fn from(error: rusqlite::Error) -> Self {
        match error {
            rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::Utf8Error(..) => Self::Corrupt(error.to_string()),
            _ => Self::Sqlite(error),
        }
    }
}

/// Why the database itself did not take a row.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Refusal {
    Unique,
    Check,
    ForeignKey,
    Other,
}

impl Refusal {
    fn of_sqlx(error: &dyn DatabaseError) -> Option<Self> {
        // SQLSTATE's classes of data exceptions and of rollbacks. SQLite's codes are shorter.
        let of_rows = |code: &str| code.len() == 5 && (code.starts_with("22") || code.starts_with("40"));
        match error.kind() {
            ErrorKind::UniqueViolation => Some(Self::Unique),
            ErrorKind::CheckViolation => Some(Self::Check),
            ErrorKind::ForeignKeyViolation => Some(Self::ForeignKey),
            ErrorKind::Other => match error.code().as_deref() {
                Some(SQLITE_RAISED) => Some(Self::Check),
                Some(code) if of_rows(code) => Some(Self::Other),
                _ => None,
            },
            _ => Some(Self::Other),
        }
    }

    fn of_sqlite(error: rusqlite::ffi::Error) -> Option<Self> {
        use rusqlite::ffi;
        if error.code != rusqlite::ErrorCode::ConstraintViolation {
            return None;
        }
        Some(match error.extended_code {
            ffi::SQLITE_CONSTRAINT_UNIQUE | ffi::SQLITE_CONSTRAINT_PRIMARYKEY => Self::Unique,
            ffi::SQLITE_CONSTRAINT_CHECK | ffi::SQLITE_CONSTRAINT_TRIGGER => Self::Check,
            ffi::SQLITE_CONSTRAINT_FOREIGNKEY => Self::ForeignKey,
            _ => Self::Other,
        })
    }
}

/// What the database is opened for.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Access {
    /// To serve: migrates, and on SQLite keeps every other server off the file.
    Serve,
    /// To look, beside a server that may be running.
    Inspect,
}

#[derive(Clone)]
pub struct Db(Pools);

#[derive(Clone)]
enum Pools {
    Sqlite { write: SqlitePool, read: SqlitePool, file: SqliteFile, _lock: Option<Arc<File>> },
    Postgres(PgPool),
}

/// What the ledger's batches are written through.
pub enum Driver {
    Sqlite(SqliteFile),
    Postgres(PgPool),
}

/// An SQLite file, and whose turn it is to write to it.
#[derive(Clone)]
pub struct SqliteFile {
    path: Arc<Path>,
    /// With it goes the connection that batches are written through, once there is one.
    turn: Arc<Mutex<Option<SqliteConnection>>>,
}

struct SqliteConnection {
    connection: rusqlite::Connection,
    /// Whether its commits wait for the disk.
    waits_for_disk: bool,
}

impl SqliteFile {
    /// Waits in line, no longer than for a connection.
    pub async fn turn(&self) -> Result<SqliteTurn, DbError> {
        let turn = tokio::time::timeout(ACQUIRE_TIMEOUT, Arc::clone(&self.turn).lock_owned()).await;
        let slot = turn.map_err(|_| DbError::Sql(sqlx::Error::PoolTimedOut))?;
        Ok(SqliteTurn { path: Arc::clone(&self.path), slot })
    }
}

/// Nobody else in this process writes to the file while it is held. The transaction begun in it is undone
/// where it is not committed.
pub struct SqliteTurn {
    path: Arc<Path>,
    slot: OwnedMutexGuard<Option<SqliteConnection>>,
}

impl SqliteTurn {
    /// Begins a transaction on the connection for batches. If it need not last, its commit does not wait for
    /// the disk: a power cut may take it, and then takes all that were committed after it as well, up to one
    /// that did wait.
    pub fn begin(&mut self, must_last: bool) -> Result<(), DbError> {
        // Put back only once it has begun: one that cannot is made anew.
        let mut taken = match self.slot.take() {
            Some(taken) => taken,
            None => SqliteConnection::open(&self.path)?,
        };
        taken.begin(must_last)?;
        *self.slot = Some(taken);
        Ok(())
    }

    pub fn prepare(&self, sql: &'static str) -> Result<rusqlite::CachedStatement<'_>, DbError> {
        let Some(SqliteConnection { connection, .. }) = &*self.slot else { return Err(DbError::Abandoned) };
        Ok(connection.prepare_cached(sql)?)
    }

    pub fn commit(&mut self) -> Result<(), DbError> {
        self.prepare("COMMIT")?.execute([])?;
        Ok(())
    }
}

impl Drop for SqliteTurn {
    fn drop(&mut self) {
        if self.slot.as_ref().is_some_and(|kept| kept.undo().is_err()) {
            // The end of its connection undoes it.
            *self.slot = None;
        }
    }
}

impl SqliteConnection {
    fn open(path: &Path) -> Result<Self, DbError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = rusqlite::Connection::open_with_flags(path, flags)?;
        // The farebox of another command may write as well.
        connection.busy_timeout(ACQUIRE_TIMEOUT)?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "cache_size", SQLITE_CACHE_KIB)?;
        connection.pragma_update(None, "wal_autocheckpoint", SQLITE_CHECKPOINT_PAGES)?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.set_prepared_statement_cache_capacity(SQLITE_STATEMENTS);
        Ok(Self { connection, waits_for_disk: true })
    }

    fn begin(&mut self, must_last: bool) -> Result<(), DbError> {
        self.undo()?;
        if self.waits_for_disk != must_last {
            let synchronous = if must_last { "FULL" } else { "NORMAL" };
            self.connection.pragma_update(None, "synchronous", synchronous)?;
            self.waits_for_disk = must_last;
        }
        self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        Ok(())
    }

    /// Undoes a transaction that was begun and not committed.
    fn undo(&self) -> Result<(), DbError> {
        if !self.connection.is_autocommit() {
            self.connection.prepare_cached("ROLLBACK")?.execute([])?;
        }
        Ok(())
    }
}

/// Brings the log of an SQLite file into it beside those who write and read, whom it takes nothing from.
struct Checkpointer {
    options: SqliteConnectOptions,
    connection: Option<SqlxSqliteConnection>,
    /// How long the log was.
    log_pages: i64,
    pause: Duration,
}

impl Checkpointer {
    fn new(file: &SqliteFile) -> Self {
        let options = SqliteConnectOptions::new().filename(&file.path).busy_timeout(ACQUIRE_TIMEOUT);
        Self { options, connection: None, log_pages: 0, pause: *SQLITE_CHECKPOINT_PAUSE.end() }
    }

    /// Brings what there is, and sets how long to wait before the next time.
    async fn checkpoint(&mut self) -> Result<(), DbError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.options.connect().await?,
        };
        let (_, log_pages, _): (i64, i64, i64) =
            sqlx::query_as("PRAGMA wal_checkpoint(PASSIVE)").fetch_one(&mut connection).await?;
        self.connection = Some(connection);
        // It is shorter where it was begun anew.
        let grown = log_pages.checked_sub(self.log_pages).filter(|grown| *grown >= 0).unwrap_or(log_pages);
        self.log_pages = log_pages;
        let (shortest, longest) = (*SQLITE_CHECKPOINT_PAUSE.start(), *SQLITE_CHECKPOINT_PAUSE.end());
        if grown > SQLITE_LEFT_PAGES {
            self.pause = (self.pause / 2).max(shortest);
        } else if grown < SQLITE_LEFT_PAGES / 4 {
            self.pause = (self.pause * 2).min(longest);
        }
        Ok(())
    }
}

/// A write transaction. Dropped without [`DbTx::commit`], it never happened.
pub enum DbTx {
    Sqlite {
        tx: Transaction<'static, Sqlite>,
        /// Given back when the transaction is over; who only reads needs none.
        _turn: Option<SqliteTurn>,
    },
    Postgres(Transaction<'static, Postgres>),
}

impl Db {
    pub async fn open(url: &str, access: Access) -> Result<Self, DbError> {
        if let Some(path) = url.strip_prefix("sqlite://") {
            Self::open_sqlite(Path::new(path), access).await
        } else if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            Self::open_postgres(url, access).await
        } else {
            Err(DbError::UnknownScheme)
        }
    }

    /// Keeps bringing SQLite's log into its file, so that no commit, nor who waits for one, has to stand by while
    /// that is done for a long one. PostgreSQL sees to its own.
    pub async fn keep_checkpointed(&self) {
        let Pools::Sqlite { file, .. } = &self.0 else { return };
        let mut checkpointer = Checkpointer::new(file);
        loop {
            tokio::time::sleep(checkpointer.pause).await;
            if let Err(error) = checkpointer.checkpoint().await {
                tracing::warn!(%error, "a checkpoint failed; it is tried again");
            }
        }
    }

    async fn open_sqlite(path: &Path, access: Access) -> Result<Self, DbError> {
        let serve = access == Access::Serve;
        let lock = if serve { Some(Arc::new(lock_file(path)?)) } else { None };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(serve)
            .journal_mode(SqliteJournalMode::Wal)
            // Money is on the disk before anybody is told of it.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .pragma("wal_autocheckpoint", SQLITE_CHECKPOINT_PAGES.to_string())
            .busy_timeout(ACQUIRE_TIMEOUT);
        let pool = |connections| {
            SqlitePoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .idle_timeout(None)
                .max_lifetime(None)
        };
        if !serve && !path.exists() {
            return Err(DbError::Missing { path: path.display().to_string() });
        }
        let write = pool(1).connect_with(options.clone()).await?;
        if serve {
            migrator(Dialect::Sqlite).run(&write).await?;
        }
        let read = pool(SQLITE_READERS).connect_with(options.read_only(true)).await?;
        let file = SqliteFile { path: path.into(), turn: Arc::default() };
        Ok(Self(Pools::Sqlite { write, read, file, _lock: lock }))
    }

    async fn open_postgres(url: &str, access: Access) -> Result<Self, DbError> {
        let options: PgConnectOptions = url.parse().map_err(DbError::Sql)?;
        let pool = PgPoolOptions::new()
            .max_connections(POSTGRES_CONNECTIONS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_with(options.options([
                ("statement_timeout", STATEMENT_TIMEOUT_MS),
                // A node that froze in mid-transaction must not keep its rows from the others.
                ("idle_in_transaction_session_timeout", IDLE_TRANSACTION_TIMEOUT_MS),
            ]))
            .await?;
        if access == Access::Serve {
            migrator(Dialect::Postgres).run(&pool).await?;
        }
        Ok(Self(Pools::Postgres(pool)))
    }

    pub fn kind(&self) -> &'static str {
        match &self.0 {
            Pools::Sqlite { .. } => "sqlite",
            Pools::Postgres(_) => "postgres",
        }
    }

    /// The driver itself, for who writes to each in its own way.
    pub fn driver(&self) -> Driver {
        match &self.0 {
            Pools::Sqlite { file, .. } => Driver::Sqlite(file.clone()),
            Pools::Postgres(pool) => Driver::Postgres(pool.clone()),
        }
    }

    /// Whether this process is the only one that serves from this database.
    pub fn is_exclusive(&self) -> bool {
        matches!(&self.0, Pools::Sqlite { _lock: Some(_), .. })
    }

    /// A transaction that is on the disk when its commit returns.
    pub async fn begin(&self) -> Result<DbTx, DbError> {
        Ok(match &self.0 {
            Pools::Sqlite { write, file, .. } => {
                let turn = file.turn().await?;
                DbTx::Sqlite { tx: write.begin_with("BEGIN IMMEDIATE").await?, _turn: Some(turn) }
            }
            Pools::Postgres(pool) => DbTx::Postgres(begin_postgres(pool, "BEGIN").await?),
        })
    }

    /// The same for statements about a few rows of large tables, which PostgreSQL might read whole.
    pub async fn begin_for_few(&self) -> Result<DbTx, DbError> {
        match &self.0 {
            Pools::Sqlite { .. } => self.begin().await,
            Pools::Postgres(pool) => {
                Ok(DbTx::Postgres(begin_postgres(pool, "BEGIN; SET LOCAL enable_seqscan = off").await?))
            }
        }
    }

    /// A transaction that sees one instant of the database, for reading all of it.
    pub async fn snapshot(&self) -> Result<DbTx, DbError> {
        Ok(match &self.0 {
            Pools::Sqlite { read, .. } => DbTx::Sqlite { tx: read.begin().await?, _turn: None },
            Pools::Postgres(pool) => DbTx::Postgres(
                begin_postgres(pool, "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY").await?,
            ),
        })
    }

    pub async fn rows(&self, sql: &'static str, args: Vec<Arg>) -> Result<Vec<DbRow>, DbError> {
        Ok(match &self.0 {
            Pools::Sqlite { read, .. } => collect(sqlite(sql, args).fetch_all(read).await?, DbRow::Sqlite),
            Pools::Postgres(pool) => collect(postgres(sql, args).fetch_all(pool).await?, DbRow::Postgres),
        })
    }

    pub async fn row(&self, sql: &'static str, args: Vec<Arg>) -> Result<Option<DbRow>, DbError> {
        Ok(self.rows(sql, args).await?.into_iter().next())
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), DbError> {
        self.rows("SELECT 1 AS one", args![]).await.map(drop)
    }

    pub async fn close(&self) {
        match &self.0 {
            Pools::Sqlite { write, read, file, .. } => {
                read.close().await;
                write.close().await;
                // The last to close brings the log into the file.
                if let Ok(mut turn) = file.turn().await {
                    *turn.slot = None;
                }
            }
            Pools::Postgres(pool) => pool.close().await,
        }
    }
}

impl DbTx {
    /// Runs a statement and returns how many rows it touched.
    pub async fn execute(&mut self, sql: &'static str, args: Vec<Arg>) -> Result<u64, DbError> {
        Ok(match self {
            Self::Sqlite { tx, .. } => sqlite(sql, args).execute(&mut **tx).await?.rows_affected(),
            Self::Postgres(tx) => postgres(sql, args).execute(&mut **tx).await?.rows_affected(),
        })
    }

    pub async fn rows(&mut self, sql: &'static str, args: Vec<Arg>) -> Result<Vec<DbRow>, DbError> {
        Ok(match self {
            Self::Sqlite { tx, .. } => collect(sqlite(sql, args).fetch_all(&mut **tx).await?, DbRow::Sqlite),
            Self::Postgres(tx) => collect(postgres(sql, args).fetch_all(&mut **tx).await?, DbRow::Postgres),
        })
    }

    pub async fn row(&mut self, sql: &'static str, args: Vec<Arg>) -> Result<Option<DbRow>, DbError> {
        Ok(self.rows(sql, args).await?.into_iter().next())
    }

    /// The next number of a named sequence. The row it updates orders those who ask.
    pub async fn next_id(&mut self, sequence: &'static str) -> Result<i64, DbError> {
        let row = self
            .row(
                "INSERT INTO sequences (name, value) VALUES ($1, 1)
                 ON CONFLICT (name) DO UPDATE SET value = sequences.value + 1 RETURNING value",
                args![sequence],
            )
            .await?;
        row.ok_or_else(|| DbError::Corrupt("a sequence gave no number".into()))?.int("value")
    }

    pub async fn commit(self) -> Result<(), DbError> {
        match self {
            Self::Sqlite { tx, .. } => tx.commit().await?,
            Self::Postgres(tx) => tx.commit().await?,
        }
        Ok(())
    }
}

/// A statement's parameter. NULL keeps its type, which PostgreSQL insists on.
#[derive(Clone, Debug)]
pub enum Arg {
    Int(Option<i64>),
    Text(Option<String>),
}

/// The parameters of a statement, in order: `args![wallet, amount, now]`.
macro_rules! args {
    ($($value:expr),* $(,)?) => { vec![$($crate::db::Arg::from($value)),*] };
}
pub(crate) use args;

impl From<i64> for Arg {
    fn from(value: i64) -> Self {
        Self::Int(Some(value))
    }
}

impl From<Option<i64>> for Arg {
    fn from(value: Option<i64>) -> Self {
        Self::Int(value)
    }
}

impl From<&str> for Arg {
    fn from(value: &str) -> Self {
        Self::Text(Some(value.to_owned()))
    }
}

impl From<String> for Arg {
    fn from(value: String) -> Self {
        Self::Text(Some(value))
    }
}

impl From<Option<String>> for Arg {
    fn from(value: Option<String>) -> Self {
        Self::Text(value)
    }
}

impl From<MicroUsdc> for Arg {
    fn from(value: MicroUsdc) -> Self {
        Self::Int(Some(value.get()))
    }
}

impl From<Timestamp> for Arg {
    fn from(value: Timestamp) -> Self {
        Self::Int(Some(value.millis()))
    }
}

impl From<Wallet> for Arg {
    fn from(value: Wallet) -> Self {
        Self::Text(Some(value.key()))
    }
}

/// A row of either database, read by column name.
pub enum DbRow {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl DbRow {
    pub fn int(&self, column: &str) -> Result<i64, DbError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn int_or_null(&self, column: &str) -> Result<Option<i64>, DbError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn text(&self, column: &str) -> Result<String, DbError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn text_or_null(&self, column: &str) -> Result<Option<String>, DbError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub fn micro(&self, column: &str) -> Result<MicroUsdc, DbError> {
        self.int(column).map(MicroUsdc::new)
    }

    pub fn time(&self, column: &str) -> Result<Timestamp, DbError> {
        self.int(column).map(Timestamp::from_millis)
    }

    pub fn time_or_null(&self, column: &str) -> Result<Option<Timestamp>, DbError> {
        Ok(self.int_or_null(column)?.map(Timestamp::from_millis))
    }

    pub fn wallet(&self, column: &str) -> Result<Wallet, DbError> {
        let text = self.text(column)?;
        text.parse().map_err(|NotAnAddress| DbError::Corrupt(format!("{column} {text}")))
    }

    /// A column whose text one of our types can read.
    pub fn parsed<T: std::str::FromStr>(&self, column: &str) -> Result<T, DbError> {
        let text = self.text(column)?;
        text.parse().map_err(|_| DbError::Corrupt(format!("{column} {text}")))
    }
}

fn collect<R>(rows: Vec<R>, wrap: fn(R) -> DbRow) -> Vec<DbRow> {
    rows.into_iter().map(wrap).collect()
}

/// Begins a transaction in a task of its own. A caller that goes away while BEGIN is under way would
/// otherwise leave a connection behind that is inside a transaction nobody knows of.
#[expect(clippy::disallowed_methods, reason = "ends by itself within the acquire and statement time-outs")]
async fn begin_postgres(
    pool: &PgPool,
    statement: &'static str,
) -> Result<Transaction<'static, Postgres>, DbError> {
    let pool = pool.clone();
    let begun = tokio::spawn(async move { pool.begin_with(statement).await });
    Ok(begun.await.map_err(|_| sqlx::Error::WorkerCrashed)??)
}

type Query<'q, D> = sqlx::query::Query<'q, D, <D as sqlx::Database>::Arguments>;

fn sqlite(sql: &'static str, args: Vec<Arg>) -> Query<'static, Sqlite> {
    args.into_iter().fold(sqlx::query(sql), |query, arg| match arg {
        Arg::Int(value) => query.bind(value),
        Arg::Text(value) => query.bind(value),
    })
}

fn postgres(sql: &'static str, args: Vec<Arg>) -> Query<'static, Postgres> {
    args.into_iter().fold(sqlx::query(sql), |query, arg| match arg {
        Arg::Int(value) => query.bind(value),
        Arg::Text(value) => query.bind(value),
    })
}

/// Held for as long as a server has the file open; the system lets go of it if the server dies.
fn lock_file(database: &Path) -> Result<File, DbError> {
    let mut name = database.as_os_str().to_owned();
    name.push(".lock");
    let path = PathBuf::from(name);
    let open_error = |source| DbError::Open { path: path.display().to_string(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(open_error)?;
    file.try_lock().map_err(|_| DbError::InUse { path: database.display().to_string() })?;
    Ok(file)
}

#[derive(Copy, Clone, PartialEq, Eq)]
enum Dialect {
    Sqlite,
    Postgres,
}

/// The numbered migrations: those of both databases first, then what each spells its own way.
fn migrator(dialect: Dialect) -> Migrator {
    let shared = [
        (1, "ledger", include_str!("../migrations/0001_ledger.sql")),
        (2, "auth", include_str!("../migrations/0002_auth.sql")),
        (3, "payments", include_str!("../migrations/0003_payments.sql")),
        (4, "recovery", include_str!("../migrations/0004_recovery.sql")),
        (5, "pay_per_call", include_str!("../migrations/0005_pay_per_call.sql")),
        (6, "key limits", include_str!("../migrations/0006_key_limits.sql")),
        (7, "sessions", include_str!("../migrations/0007_sessions.sql")),
        (8, "payment identifiers", include_str!("../migrations/0008_payment_identifiers.sql")),
        (9, "limit rounds", include_str!("../migrations/0009_limit_rounds.sql")),
        (10, "receipt archives", include_str!("../migrations/0010_receipt_archives.sql")),
        (20, "usage units", include_str!("../migrations/0020_usage_units.sql")),
        (30, "kept answer types", include_str!("../migrations/0030_kept_answer_types.sql")),
        (40, "receipt keys", include_str!("../migrations/0040_receipt_keys.sql")),
        (41, "reserves", include_str!("../migrations/0041_reserves.sql")),
        (50, "deposits", include_str!("../migrations/0050_deposits.sql")),
        (51, "withdrawals", include_str!("../migrations/0051_withdrawals.sql")),
        (60, "facilitator", include_str!("../migrations/0060_facilitator.sql")),
        (61, "reserves in motion", include_str!("../migrations/0061_reserves_in_motion.sql")),
        (62, "receipt keys in use", include_str!("../migrations/0062_receipt_keys_in_use.sql")),
    ];
    let own = match dialect {
        Dialect::Sqlite => [
            (1001, "guards", include_str!("../migrations/sqlite/1001_guards.sql")),
            (1002, "payment moves", include_str!("../migrations/sqlite/1002_payment_moves.sql")),
            (1003, "receipt archives", include_str!("../migrations/sqlite/1003_receipt_archives.sql")),
            (1010, "checks", include_str!("../migrations/sqlite/1010_checks_without_lists.sql")),
            (1030, "withdrawals", include_str!("../migrations/sqlite/1030_withdrawals.sql")),
        ]
        .as_slice(),
        Dialect::Postgres => [
            (1001, "guards", include_str!("../migrations/postgres/1001_guards.sql")),
            (1002, "payment moves", include_str!("../migrations/postgres/1002_payment_moves.sql")),
            (1003, "receipt archives", include_str!("../migrations/postgres/1003_receipt_archives.sql")),
            (1030, "withdrawals", include_str!("../migrations/postgres/1030_withdrawals.sql")),
        ]
        .as_slice(),
    };
    let migrations = shared.iter().chain(own).map(|&(version, name, sql)| {
        let sql = AssertSqlSafe(sql).into_sql_str();
        Migration::new(version, name.into(), MigrationType::Simple, sql, false)
    });
    Migrator::with_migrations(migrations.collect())
}
