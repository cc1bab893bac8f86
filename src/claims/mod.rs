//! Requests that may be sent again and are run once: by an idempotency key, or by the payment they
//! came with.
//!
//! A claim is made in the transaction that makes the request's hold (`ledger::batch`), so there is none
//! without the other, and of two at once one waits for the other's hold. What the upstream answered is kept before
//! the hold is settled: a crash in between releases the hold, and the request can be run anew.

mod store;

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::clock::Clock;
use crate::db::{Db, DbError};

/// For so long an idempotency key is remembered, and an answer kept.
pub const REMEMBERED_SECONDS: i64 = 86_400;
/// A stream larger than this is not kept: until it ends, it is in memory …
pub const MAX_KEPT_BYTES: usize = 1 << 20;
/// … and a whole answer larger than this is not: a picture has some millions of bytes.
const MAX_KEPT_WHOLE_BYTES: usize = 8 << 20;
/// What the names begin with of requests that a payment was made for: these are remembered for ever,
/// so that no payment buys a second request.
const OF_PAYMENT: &str = "payment:";
const OF_KEY: &str = "key:";

/// The name that a request may be sent again by, and what it asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claim {
    pub name: String,
    pub request_hash: String,
}

impl Claim {
    pub fn of_key(key: &str, request_hash: String) -> Self {
        Self { name: format!("{OF_KEY}{key}"), request_hash }
    }

    pub fn of_payment(payment_id: i64, request_hash: String) -> Self {
        Self { name: format!("{OF_PAYMENT}{payment_id}"), request_hash }
    }
}

/// What a request asks for, in short: two that differ in a byte of a piece, or are cut into others, differ here.
pub fn request_hash(path: &str, pieces: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    hash.update(path.as_bytes());
    hash.update([0]);
    for piece in pieces {
        // One piece is all there is: nobody need know where it ends.
        if pieces.len() > 1 {
            hash.update(u64::try_from(piece.len()).unwrap_or(u64::MAX).to_le_bytes());
        }
        hash.update(piece);
    }
    hex::encode(hash.finalize())
}

/// A request that has the name already.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claimed {
    pub request_id: String,
    pub is_same_request: bool,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    Json,
    Stream,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Stream => "stream",
        }
    }
}

/// An answer as the client was sent it; of a stream its events.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeptAnswer {
    pub kind: Kind,
    /// As what it was sent, if not as JSON or events.
    pub content_type: Option<String>,
    pub body: Bytes,
}

/// The answers that are kept.
#[derive(Clone)]
pub struct KeptAnswers {
    db: Db,
    clock: Clock,
}

impl KeptAnswers {
    pub fn new(db: Db, clock: Clock) -> Self {
        Self { db, clock }
    }

    /// Keeps an answer, if it is small enough, and JSON or of another type that is named.
    pub async fn keep(
        &self,
        request_id: &str,
        kind: Kind,
        content_type: Option<&str>,
        body: &[u8],
    ) -> Result<(), DbError> {
        let most = match kind {
            Kind::Json => MAX_KEPT_WHOLE_BYTES,
            Kind::Stream => MAX_KEPT_BYTES,
        };
        if body.len() > most {
            return Ok(());
        }
        // What has a type of its own need not be text.
        let text = match content_type {
            Some(_) => Some(Cow::Owned(STANDARD.encode(body))),
            // PostgreSQL holds no NUL in a text.
            None => std::str::from_utf8(body).ok().filter(|text| !text.contains('\0')).map(Cow::Borrowed),
        };
        let Some(text) = text else { return Ok(()) };
        let mut tx = self.db.begin().await?;
        store::keep(&mut tx, request_id, (kind, content_type), &text, self.clock.now()).await?;
        tx.commit().await
    }

    pub async fn find(&self, request_id: &str) -> Result<Option<KeptAnswer>, DbError> {
        store::kept(&self.db, request_id).await
    }

    /// Forgets what is a day old.
    pub async fn forget_old(&self) -> Result<(), DbError> {
        let before = self.clock.now().plus_seconds(-REMEMBERED_SECONDS);
        let mut tx = self.db.begin().await?;
        store::forget(&mut tx, before, &format!("{OF_KEY}%")).await?;
        tx.commit().await
    }
}
