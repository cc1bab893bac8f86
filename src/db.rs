//! One database behind two drivers: an SQLite file to start with, PostgreSQL to grow.
//!
//! A statement is written once, in SQL that means the same to both: `$1` parameters, TEXT and
//! BIGINT columns, `RETURNING`, `ON CONFLICT`. Only statements over many rows at once ([`SetWise`]) are
//! spelt for each. Reads go to a pool. Writes are transactions, and on SQLite there is one writing
//! connection, because two would only make each other wait.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use sqlx::error::{DatabaseError, ErrorKind};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgRow};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{AssertSqlSafe, Either, Executor as _, Postgres, Row as _, SqlSafeStr as _, Sqlite, Transaction};

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
/// Up to 24 MiB for the connection that writes; below zero it is in KiB. Each commit touches several indexes.
const SQLITE_CACHE_KIB: &str = "-24576";
/// Rows that the writing thread gets ahead of who reads them: those of a whole batch.
const SQLITE_ROWS_AT_ONCE: usize = 1024;
/// The log is brought into the file when it has grown by 64 MiB. A page that many commits have changed
/// meanwhile, as most have, is then written there once.
const SQLITE_CHECKPOINT_PAGES: &str = "16384";
/// What SQLite says where a trigger has refused (SQLITE_CONSTRAINT_TRIGGER). On PostgreSQL they raise
/// `check_violation`.
const SQLITE_RAISED: &str = "1811";
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
        self.refusal().is_some_and(|e| e.is_unique_violation())
    }

    /// Whether a CHECK constraint refused the statement, or one of our triggers, which say the same.
    pub fn is_check_violation(&self) -> bool {
        let by_trigger = |e: &dyn DatabaseError| e.code().is_some_and(|code| code == SQLITE_RAISED);
        self.refusal().is_some_and(|e| e.is_check_violation() || by_trigger(e))
    }

    /// Whether the same may succeed later: it was not the data that was refused.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Corrupt(_) => false,
            Self::Shared(error) => error.may_pass(),
            // What is unique is there, whoever was first, and nothing takes it away again.
            _ => !self.is_check_violation() && !self.refusal().is_some_and(is_about_other_rows),
        }
    }

    /// Whether it was about the rows that a statement touched, so that others may well be taken: a
    /// constraint, a value that cannot be, or another transaction in the way (a deadlock).
    pub fn is_about_rows(&self) -> bool {
        let Some(refusal) = self.refusal() else {
            return matches!(self, Self::Corrupt(_));
        };
        // SQLSTATE's classes of data exceptions and of rollbacks. SQLite's codes are shorter.
        let of_these = |code: &str| code.len() == 5 && (code.starts_with("22") || code.starts_with("40"));
        self.is_check_violation()
            || !matches!(refusal.kind(), ErrorKind::Other)
            || refusal.code().is_some_and(|code| of_these(&code))
    }

    /// What the database itself said.
    fn refusal(&self) -> Option<&dyn DatabaseError> {
        match self {
            Self::Sql(sqlx::Error::Database(e)) => Some(&**e),
            Self::Shared(error) => error.refusal(),
            _ => None,
        }
    }
}

fn is_about_other_rows(refusal: &dyn DatabaseError) -> bool {
    refusal.is_unique_violation() || refusal.is_foreign_key_violation()
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
    Sqlite { write: SqlitePool, read: SqlitePool, _lock: Option<Arc<File>> },
    Postgres(PgPool),
}

/// A write transaction. Dropped without [`DbTx::commit`], it never happened.
pub enum DbTx {
    Sqlite(Transaction<'static, Sqlite>),
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
            .pragma("wal_autocheckpoint", SQLITE_CHECKPOINT_PAGES)
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
        let writing =
            options.clone().pragma("cache_size", SQLITE_CACHE_KIB).row_buffer_size(SQLITE_ROWS_AT_ONCE);
        let write = pool(1).connect_with(writing).await?;
        if serve {
            migrator(Driver::Sqlite).run(&write).await?;
        }
        let read = pool(SQLITE_READERS).connect_with(options.read_only(true)).await?;
        Ok(Self(Pools::Sqlite { write, read, _lock: lock }))
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
            migrator(Driver::Postgres).run(&pool).await?;
        }
        Ok(Self(Pools::Postgres(pool)))
    }

    pub fn kind(&self) -> &'static str {
        match &self.0 {
            Pools::Sqlite { .. } => "sqlite",
            Pools::Postgres(_) => "postgres",
        }
    }

    /// Whether this process is the only one that serves from this database.
    pub fn is_exclusive(&self) -> bool {
        matches!(&self.0, Pools::Sqlite { _lock: Some(_), .. })
    }

    /// A transaction that is on the disk when its commit returns.
    pub async fn begin(&self) -> Result<DbTx, DbError> {
        // The one connection that writes is told each time: nothing can leave it relaxed.
        self.begin_with("PRAGMA synchronous = FULL; BEGIN IMMEDIATE", "BEGIN").await
    }

    /// A transaction for [`SetWise`] statements. If it need not last, its commit does not wait for the disk:
    /// a power cut may take it, and then takes all that were committed after it as well, up to one that did
    /// wait.
    pub async fn begin_batch(&self, must_last: bool) -> Result<DbTx, DbError> {
        // PostgreSQL plans these statements for good when a table is still small, and would read it whole
        // ever after.
        if must_last {
            self.begin_with(
                "PRAGMA synchronous = FULL; BEGIN IMMEDIATE",
                "BEGIN; SET LOCAL enable_seqscan = off",
            )
            .await
        } else {
            self.begin_with(
                "PRAGMA synchronous = NORMAL; BEGIN IMMEDIATE",
                "BEGIN; SET LOCAL enable_seqscan = off; SET LOCAL synchronous_commit = off",
            )
            .await
        }
    }

    async fn begin_with(&self, sqlite: &'static str, postgres: &'static str) -> Result<DbTx, DbError> {
        Ok(match &self.0 {
            Pools::Sqlite { write, .. } => DbTx::Sqlite(write.begin_with(sqlite).await?),
            Pools::Postgres(pool) => DbTx::Postgres(begin_postgres(pool, postgres).await?),
        })
    }

    /// A transaction that sees one instant of the database, for reading all of it.
    pub async fn snapshot(&self) -> Result<DbTx, DbError> {
        Ok(match &self.0 {
            Pools::Sqlite { read, .. } => DbTx::Sqlite(read.begin().await?),
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
            Pools::Sqlite { write, read, .. } => {
                read.close().await;
                write.close().await;
            }
            Pools::Postgres(pool) => pool.close().await,
        }
    }
}

impl DbTx {
    /// Runs a statement and returns how many rows it touched.
    pub async fn execute(&mut self, sql: &'static str, args: Vec<Arg>) -> Result<u64, DbError> {
        Ok(match self {
            Self::Sqlite(tx) => sqlite(sql, args).execute(&mut **tx).await?.rows_affected(),
            Self::Postgres(tx) => postgres(sql, args).execute(&mut **tx).await?.rows_affected(),
        })
    }

    pub async fn rows(&mut self, sql: &'static str, args: Vec<Arg>) -> Result<Vec<DbRow>, DbError> {
        Ok(match self {
            Self::Sqlite(tx) => collect(sqlite(sql, args).fetch_all(&mut **tx).await?, DbRow::Sqlite),
            Self::Postgres(tx) => collect(postgres(sql, args).fetch_all(&mut **tx).await?, DbRow::Postgres),
        })
    }

    pub async fn row(&mut self, sql: &'static str, args: Vec<Arg>) -> Result<Option<DbRow>, DbError> {
        Ok(self.rows(sql, args).await?.into_iter().next())
    }

    /// Runs each statement over the JSON list of its place.
    pub async fn all(
        &mut self,
        statements: &'static Several,
        lists: Vec<String>,
    ) -> Result<Vec<Outcome>, DbError> {
        let mut outcomes = Vec::with_capacity(lists.len());
        match self {
            Self::Sqlite(tx) => {
                let query = sqlite(&statements.sqlite, lists.into_iter().map(Arg::from).collect());
                let mut answers = (&mut **tx).fetch_many(query);
                let mut rows = Vec::new();
                while let Some(answer) = answers.try_next().await? {
                    match answer {
                        Either::Right(row) => rows.push(DbRow::Sqlite(row)),
                        Either::Left(done) => {
                            let rows = std::mem::take(&mut rows);
                            outcomes.push(Outcome { rows, touched: done.rows_affected() });
                        }
                    }
                }
            }
            Self::Postgres(tx) => {
                for (statement, list) in statements.each.iter().zip(lists) {
                    let mut outcome = Outcome::default();
                    if list != NOTHING {
                        let query = postgres(statement.postgres, args![list]);
                        let mut answers = (&mut **tx).fetch_many(query);
                        while let Some(answer) = answers.try_next().await? {
                            match answer {
                                Either::Right(row) => outcome.rows.push(DbRow::Postgres(row)),
                                Either::Left(done) => outcome.touched += done.rows_affected(),
                            }
                        }
                    }
                    outcomes.push(outcome);
                }
            }
        }
        if outcomes.len() == statements.each.len() {
            return Ok(outcomes);
        }
        Err(DbError::Corrupt(format!("{} of {} statements were run", outcomes.len(), statements.each.len())))
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
            Self::Sqlite(tx) => tx.commit().await?,
            Self::Postgres(tx) => tx.commit().await?,
        }
        Ok(())
    }
}

/// A statement over many rows at once, which are a JSON list in its one parameter. Integers in it are
/// exact: both databases read them as such, never as floats.
pub struct SetWise {
    pub sqlite: &'static str,
    pub postgres: &'static str,
}

/// A JSON list of no rows.
const NOTHING: &str = "[]";

/// Statements that go together. SQLite's driver hands each of what it is given over to a thread of its own
/// and waits for it, which takes longer than a small statement does: so there they are one text.
pub struct Several {
    each: &'static [SetWise],
    sqlite: String,
}

impl Several {
    pub fn new(each: &'static [SetWise]) -> Self {
        let numbered = |(place, statement): (usize, &SetWise)| {
            statement.sqlite.replace("$1", &format!("${}", place.saturating_add(1)))
        };
        let sqlite = each.iter().enumerate().map(numbered).collect::<Vec<_>>().join(";\n");
        Self { each, sqlite }
    }
}

/// What a statement has found, and how many rows of the database it touched.
#[derive(Default)]
pub struct Outcome {
    pub rows: Vec<DbRow>,
    pub touched: u64,
}

/// A [`SetWise`] statement: what comes before its rows, their columns (which are the members of the JSON
/// objects) and types, and what comes after, on both or on each. The rows are called `r`.
macro_rules! set_wise {
    ($before:literal, [$($columns:tt)*], $after:literal) => {
        $crate::db::set_wise!($before, [$($columns)*], $after, $after)
    };
    (
        $before:literal, [$first:ident $its_type:ident $(, $column:ident $type:ident)*],
        $after_sqlite:literal, $after_postgres:literal
    ) => {
        $crate::db::SetWise {
            sqlite: concat!(
                $before, " (SELECT value ->> '", stringify!($first), "' AS ", stringify!($first),
                $(", value ->> '", stringify!($column), "' AS ", stringify!($column),)*
                " FROM json_each($1)) AS r ", $after_sqlite,
            ),
            postgres: concat!(
                $before, " jsonb_to_recordset($1::jsonb) AS r (", stringify!($first), " ", stringify!($its_type),
                $(", ", stringify!($column), " ", stringify!($type),)*
                ") ", $after_postgres,
            ),
        }
    };
}
pub(crate) use set_wise;

/// A [`SetWise`] statement over the rows whose column, the last word of `$before`, is in a JSON list of texts
/// or of integers. On PostgreSQL the list is made an array first: each of it is then looked up in the index.
macro_rules! those_in {
    ($before:literal, $type:ident, $after_sqlite:literal, $after_postgres:literal) => {
        $crate::db::SetWise {
            sqlite: concat!($before, " IN (SELECT value FROM json_each($1)) ", $after_sqlite),
            postgres: concat!(
                $before,
                " = ANY(ARRAY(SELECT value::",
                stringify!($type),
                " FROM jsonb_array_elements_text($1::jsonb))) ",
                $after_postgres,
            ),
        }
    };
    ($before:literal, $type:ident) => {
        $crate::db::those_in!($before, $type, "", "")
    };
}
pub(crate) use those_in;

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
enum Driver {
    Sqlite,
    Postgres,
}

/// The numbered migrations: those of both databases first, then what each spells its own way.
fn migrator(driver: Driver) -> Migrator {
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
    ];
    let own = match driver {
        Driver::Sqlite => [
            (1001, "guards", include_str!("../migrations/sqlite/1001_guards.sql")),
            (1002, "payment moves", include_str!("../migrations/sqlite/1002_payment_moves.sql")),
            (1003, "receipt archives", include_str!("../migrations/sqlite/1003_receipt_archives.sql")),
        ],
        Driver::Postgres => [
            (1001, "guards", include_str!("../migrations/postgres/1001_guards.sql")),
            (1002, "payment moves", include_str!("../migrations/postgres/1002_payment_moves.sql")),
            (1003, "receipt archives", include_str!("../migrations/postgres/1003_receipt_archives.sql")),
        ],
    };
    let migrations = shared.into_iter().chain(own).map(|(version, name, sql)| {
        let sql = AssertSqlSafe(sql).into_sql_str();
        Migration::new(version, name.into(), MigrationType::Simple, sql, false)
    });
    Migrator::with_migrations(migrations.collect())
}
