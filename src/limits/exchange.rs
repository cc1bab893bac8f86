//! Nodes of one database tell each other whom they have counted. So a limit holds for all of them
//! together, but for what came to the others since they last heard: about two rounds' worth.

use std::collections::HashMap;
use std::time::Duration;

use crate::clock::{Clock, Timestamp};
use crate::db::{Db, DbError};
use crate::limits::store::{self, Round};
use crate::limits::{Limits, Subject};

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
        let (number, now) = (self.round.saturating_add(1), self.clock.now());
        let mut tx = self.db.begin().await?;
        store::tell(&mut tx, &Round { node: self.node.clone(), number, counts }, now).await?;
        store::forget(&mut tx, now.plus_seconds(-KEPT_SECONDS)).await?;
        tx.commit().await?;
        self.round = number;
        Ok(())
    }

    async fn hear(&mut self) -> Result<(), DbError> {
        let now = self.clock.now();
        for round in store::hear(&self.db, &self.node, now.plus_seconds(-HEARD_SECONDS)).await? {
            let last = self.heard.entry(round.node).or_insert((0, now));
            if round.number <= last.0 {
                continue;
            }
            *last = (round.number, now);
            let counts: Vec<(String, u32)> = serde_json::from_str(&round.counts)
                .map_err(|e| DbError::Corrupt(format!("limit_rounds: {e}")))?;
            // A subject that this version does not know is not one that it limits.
            let known = counts.iter().filter_map(|(subject, count)| Some((subject.parse().ok()?, *count)));
            self.limits.count_elsewhere(known);
        }
        self.heard.retain(|_, (_, at)| at.plus_seconds(KEPT_SECONDS) > now);
        Ok(())
    }
}
