//! Receipts moved out of the database into files, a line of JSON each, so that their table stays small.
//!
//! An archive is *begun* by a row, from which on no hold of its times is made and none ends. Its file is
//! written beside its name, brought to the disk and then given the name; what is in it is written into the
//! row; and only then its receipts are *taken out*, a few at a time, with what they come to added up for the
//! audit in the same transaction. Whatever it is killed at, the next run goes on from there.

mod store;

pub use store::{Line, archived_before};

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use sha2::{Digest as _, Sha256};

use crate::claims::REMEMBERED_SECONDS;
use crate::clock::{Clock, Timestamp};
use crate::db::{Db, DbError};
use crate::failpoint;
use crate::id::Entropy;
use crate::ledger::Receipt;
use crate::money::MicroUsdc;

/// Receipts in a file at most: of about 700 bytes each, a third of a gigabyte.
pub const FILE_RECEIPTS: i64 = 500_000;
/// Read at a time.
const PAGE: i64 = 1000;
/// Taken out in one transaction, for which a settlement may have to wait.
const TAKEN_AT_ONCE: usize = 200;
/// A receipt stays for as long as its request may be sent again, and a day for clocks that are wrong.
pub const LEAST_AGE_SECONDS: i64 = 2 * REMEMBERED_SECONDS;

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("receipts are kept for {} days at least: {} is too late", LEAST_AGE_SECONDS / 86_400, .0.rfc3339())]
    TooLate(Timestamp),
    #[error(
        "a request that began at {} has not ended: only what began before it can be archived",
        .0.rfc3339()
    )]
    OpenHold(Timestamp),
    #[error("another farebox is archiving: let it finish")]
    Busy,
    #[error("archive {id} is not finished, and its file {file} is not in {}: put it there", .directory.display())]
    FileMissing { id: i64, file: String, directory: PathBuf },
    #[error("{file} is not what was written there: {why}")]
    FileChanged { file: String, why: String },
    #[error(
        "the receipts of {file} are not in the database as they are in the file: nothing more is taken out"
    )]
    NotThere { file: String },
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("an amount left the range of the books")]
    OutOfRange,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// A file of receipts, as the database knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Archive {
    pub id: i64,
    /// The file's name.
    pub file: String,
    /// Its receipts are of requests that began and ended before this.
    pub before: Timestamp,
    pub created_at: Timestamp,
    /// `None` until the file is whole.
    pub contents: Option<Contents>,
    /// How many of the file's first receipts are out of the table.
    pub removed: i64,
}

impl Archive {
    pub fn is_finished(&self) -> bool {
        self.contents.as_ref().is_some_and(|contents| contents.receipts == self.removed)
    }
}

/// What is in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Contents {
    /// Of the whole file, hex.
    pub sha256: String,
    pub receipts: i64,
    /// The sum of what the receipts charged.
    pub charged: MicroUsdc,
}

/// All archives there are, in the order they were made.
pub async fn list(db: &Db) -> Result<Vec<Archive>, ArchiveError> {
    Ok(store::all(db).await?)
}

/// Holds a file in a directory against what the database knows of it.
pub fn check(archive: &Archive, directory: &Path) -> Result<(), ArchiveError> {
    let Some(expected) = &archive.contents else { return Ok(()) };
    let path = directory.join(&archive.file);
    let changed = |why: String| ArchiveError::FileChanged { file: archive.file.clone(), why };
    if !path.exists() {
        return Err(changed("it is not there".into()));
    }
    let mut found = Tally::default();
    for text in lines_of(&path)? {
        let text = text.map_err(in_file(&path))?;
        let line = read_line(&text).map_err(|e| changed(format!("line {}: {e}", found.receipts + 1)))?;
        found.add(&text, &line)?;
    }
    let found = found.into_contents();
    if found != *expected {
        let Contents { sha256, receipts, charged } = found;
        return Err(changed(format!("{receipts} receipts, {charged} micro-USDC charged, sha256 {sha256}")));
    }
    Ok(())
}

/// The receipt of an id in the files of a directory. A file is held against what the database knows of it
/// before anything in it is believed.
pub async fn find(db: &Db, directory: &Path, id: &str) -> Result<Option<Receipt>, ArchiveError> {
    // As every line has it at its beginning.
    let beginning = format!("{{\"id\":{}", serde_json::Value::from(id));
    for archive in store::all(db).await?.iter().filter(|archive| archive.contents.is_some()) {
        let path = directory.join(&archive.file);
        if !path.exists() {
            continue;
        }
        for text in lines_of(&path)? {
            let text = text.map_err(in_file(&path))?;
            if text.starts_with(&beginning) {
                check(archive, directory)?;
                let line = read_line(&text).map_err(|e| in_file(&path)(e.into()))?;
                return Ok(Some(store::receipt_of(db, line).await?));
            }
        }
    }
    Ok(None)
}

/// Makes archives, of a database, in a directory. One at a time: it is locked.
pub struct Archiver {
    db: Db,
    clock: Clock,
    directory: PathBuf,
    _lock: File,
}

impl Archiver {
    pub fn new(db: Db, clock: Clock, directory: PathBuf) -> Result<Self, ArchiveError> {
        fs::create_dir_all(&directory).map_err(in_file(&directory))?;
        let path = directory.join(".farebox-archive.lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(in_file(&path))?;
        lock.try_lock().map_err(|_| ArchiveError::Busy)?;
        Ok(Self { db, clock, directory, _lock: lock })
    }

    /// Finishes the archive that an earlier run began, if there is one.
    pub async fn resume(&self) -> Result<Option<Archive>, ArchiveError> {
        match store::unfinished(&self.db).await? {
            Some(archive) => self.finish(archive).await,
            None => Ok(None),
        }
    }

    /// Moves up to `most` receipts of requests that began and ended before a time into a file; `None`
    /// where there are none.
    pub async fn archive(&self, before: Timestamp, most: i64) -> Result<Option<Archive>, ArchiveError> {
        let now = self.clock.now();
        if before > now.plus_seconds(-LEAST_AGE_SECONDS) {
            return Err(ArchiveError::TooLate(before));
        }
        if store::lines_after(&self.db, "", before, 1).await?.is_empty() {
            return Ok(None);
        }
        let day = before.rfc3339().get(..10).unwrap_or_default().to_owned();
        // Of a database that was restored, numbers are given again: names never are.
        let file = format!("receipts-before-{day}-{}.jsonl", hex::encode(Entropy.bytes::<6>()));
        let mut tx = self.db.begin().await?;
        let begun = store::begin(&mut tx, &file, before, now).await?.ok_or(ArchiveError::Busy)?;
        if let Some(oldest) = store::oldest_hold(&mut tx).await?.filter(|oldest| *oldest < before) {
            return Err(ArchiveError::OpenHold(oldest));
        }
        tx.commit().await?;
        failpoint::reached("archive-begun");
        self.write_and_finish(begun, most).await
    }

    /// Goes on with an archive from where it is.
    async fn finish(&self, archive: Archive) -> Result<Option<Archive>, ArchiveError> {
        match archive.contents {
            None => self.write_and_finish(archive, FILE_RECEIPTS).await,
            Some(_) => self.take_out(archive).await.map(Some),
        }
    }

    async fn write_and_finish(
        &self,
        mut archive: Archive,
        most: i64,
    ) -> Result<Option<Archive>, ArchiveError> {
        let contents = self.write(&archive, most).await?;
        let mut tx = self.db.begin().await?;
        if contents.receipts == 0 {
            store::forget(&mut tx, archive.id).await?;
            tx.commit().await?;
            let path = self.path(&archive);
            fs::remove_file(&path).map_err(in_file(&path))?;
            return Ok(None);
        }
        if !store::complete(&mut tx, archive.id, &contents).await? {
            return Err(ArchiveError::Busy);
        }
        tx.commit().await?;
        archive.contents = Some(contents);
        failpoint::reached("archive-written");
        self.take_out(archive).await.map(Some)
    }

    fn path(&self, archive: &Archive) -> PathBuf {
        self.directory.join(&archive.file)
    }

    /// Writes an archive's file. When this returns it is on the disk, whole, under its name.
    async fn write(&self, archive: &Archive, most: i64) -> Result<Contents, ArchiveError> {
        let path = self.path(archive);
        let partial = path.with_extension("partial");
        let mut out = BufWriter::new(File::create(&partial).map_err(in_file(&partial))?);
        let mut written = Tally::default();
        let mut after = String::new();
        while written.receipts < most {
            let limit = PAGE.min(most - written.receipts);
            let page = store::lines_after(&self.db, &after, archive.before, limit).await?;
            let Some(last) = page.last() else { break };
            after = last.id.clone();
            for line in &page {
                let text = serde_json::to_string(line).map_err(|e| in_file(&partial)(e.into()))? + "\n";
                out.write_all(text.as_bytes()).map_err(in_file(&partial))?;
                written.add(&text, line)?;
            }
        }
        let file = out.into_inner().map_err(|e| in_file(&partial)(e.into_error()))?;
        file.sync_all().map_err(in_file(&partial))?;
        failpoint::reached("archive-synced");
        fs::rename(&partial, &path).map_err(in_file(&path))?;
        let directory = File::open(&self.directory).map_err(in_file(&self.directory))?;
        directory.sync_all().map_err(in_file(&self.directory))?;
        failpoint::reached("archive-named");
        Ok(written.into_contents())
    }

    /// Takes the receipts that are in an archive's file out of the table, once the file was read again and
    /// is what was written.
    async fn take_out(&self, mut archive: Archive) -> Result<Archive, ArchiveError> {
        let path = self.path(&archive);
        if !path.exists() {
            let Archive { id, file, .. } = archive;
            return Err(ArchiveError::FileMissing { id, file, directory: self.directory.clone() });
        }
        check(&archive, &self.directory)?;
        let done = usize::try_from(archive.removed).map_err(|_| ArchiveError::OutOfRange)?;
        let mut rest = lines_of(&path)?.skip(done);
        loop {
            let mut batch = Vec::with_capacity(TAKEN_AT_ONCE);
            for text in rest.by_ref().take(TAKEN_AT_ONCE) {
                let text = text.map_err(in_file(&path))?;
                batch.push(read_line(&text).map_err(|e| in_file(&path)(e.into()))?);
            }
            let count = i64::try_from(batch.len()).map_err(|_| ArchiveError::OutOfRange)?;
            if count == 0 {
                return Ok(archive);
            }
            let began = Instant::now();
            let mut tx = self.db.begin_for_few().await?;
            if !store::remove(&mut tx, &archive, &batch).await? {
                return Err(ArchiveError::NotThere { file: archive.file });
            }
            tx.commit().await?;
            archive.removed += count;
            failpoint::reached("archive-taking-out");
            // The server's turn: on SQLite there is one who writes, and who waits looks only now and then.
            tokio::time::sleep(began.elapsed()).await;
        }
    }
}

/// What a file comes to.
#[derive(Default)]
struct Tally {
    hash: Sha256,
    receipts: i64,
    charged: MicroUsdc,
}

impl Tally {
    fn add(&mut self, text: &str, line: &Line) -> Result<(), ArchiveError> {
        self.hash.update(text);
        self.receipts += 1;
        self.charged = self.charged.checked_add(line.charged()).ok_or(ArchiveError::OutOfRange)?;
        Ok(())
    }

    fn into_contents(self) -> Contents {
        let Self { hash, receipts, charged } = self;
        Contents { sha256: hex::encode(hash.finalize()), receipts, charged }
    }
}

/// A file's lines, each with its end.
fn lines_of(path: &Path) -> Result<impl Iterator<Item = io::Result<String>> + use<>, ArchiveError> {
    let mut file = BufReader::new(File::open(path).map_err(in_file(path))?);
    Ok(std::iter::from_fn(move || {
        let mut line = String::new();
        match file.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(Ok(line)),
            Err(error) => Some(Err(error)),
        }
    }))
}

fn read_line(text: &str) -> Result<Line, serde_json::Error> {
    serde_json::from_str(text)
}

fn in_file(path: &Path) -> impl Fn(io::Error) -> ArchiveError + use<> {
    let path = path.to_owned();
    move |source| ArchiveError::File { path: path.clone(), source }
}
