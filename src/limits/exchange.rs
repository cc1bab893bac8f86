//! Nodes of one database tell each other whom they have counted. So a limit holds for all of them
//! together, but for what came to the others since they last heard: about two rounds' worth.

use std::collections::HashMap;
use std::time::Duration;

use crate::clock::{Clock, Timestamp};
use crate::db::{Db, DbError};
use crate::limits::{Limits, Subject, store};

/// How often a node tells the others, and hears from them.
pub const EVERY: Duration = Duration::from_secs(1);
/// Rounds are looked for that are this old at most: two nodes' clocks may differ by as much.
const HEARD_SECONDS: i64 = 30;
/// After which they are of no use to anybody.
const KEPT_SECONDS: i64 = 60;
/// Subjects told of in one round; the others come in the next.
const MAX_TOLD: usize = 10_000;

/// One node's side of it.
pub struct Exchange {
    limits: Limits,
    db: Db,
    clock: Clock,
    node: String,
    round: i64,
    /// The last round that was heard of each other node, and when.
    heard: HashMap<String, (i64, Timestamp)>,
}

impl Exchange {
    pub fn new(limits: Limits, db: Db, clock: Clock, node: String) -> Self {
        Self { limits, db, clock, node, round: 0, heard: HashMap::new() }
    }

    /// Forgets what is of no use to anybody any more.
    pub async fn forget_old(db: &Db, clock: &Clock) -> Result<(), DbError> {
        let mut tx = db.begin().await?;
        store::forget(&mut tx, clock.now().plus_seconds(-KEPT_SECONDS)).await?;
        tx.commit().await
    }

    /// Tells what was counted here since the last round, and counts what others have told.
    pub async fn round(&mut self) -> Result<(), DbError> {
        let fresh = self.limits.take_fresh(MAX_TOLD);
        if let Err(error) = self.tell(&fresh).await {
            self.limits.give_back_fresh(fresh);
            return Err(error);
        }
        self.hear().await
    }

    async fn tell(&mut self, fresh: &[(Subject, u32)]) -> Result<(), DbError> {
        if fresh.is_empty() {
            return Ok(());
        }
        let counts: Vec<_> = fresh.iter().map(|(subject, count)| (subject.to_string(), count)).collect();
        let counts = serde_json::to_string(&counts).map_err(|e| DbError::Corrupt(e.to_string()))?;
        // A number is used once, whatever comes of it: a commit may come through and not be heard of.
        self.round = self.round.saturating_add(1);
        let mut tx = self.db.begin().await?;
        store::tell(&mut tx, &self.node, self.round, &counts, self.clock.now()).await?;
        tx.commit().await
    }

    async fn hear(&mut self) -> Result<(), DbError> {
        let now = self.clock.now();
        for round in store::told(&self.db, &self.node, now.plus_seconds(-HEARD_SECONDS)).await? {
            let last = self.heard.get(&round.node).map_or(0, |(last, _)| *last);
            if round.number <= last {
                continue;
            }
            let Some(counts) = store::counts(&self.db, &round).await? else { continue };
            // Whatever it says: one that cannot be read must not keep the next from being heard.
            self.heard.insert(round.node, (round.number, now));
            let counts: Vec<(String, u32)> =
                serde_json::from_str(&counts).map_err(|e| DbError::Corrupt(format!("limit_rounds: {e}")))?;
            // A subject that this version does not know is not one that it limits.
            let known = counts.iter().filter_map(|(subject, count)| Some((subject.parse().ok()?, *count)));
            self.limits.count_elsewhere(known);
        }
        self.heard.retain(|_, (_, at)| at.plus_seconds(KEPT_SECONDS) > now);
        Ok(())
    }
}
