//! The SQL of archives.

use serde::{Deserialize, Serialize};

use crate::archive::{Archive, Contents};
use crate::clock::Timestamp;
use crate::db::{Db, DbError, DbRow, DbTx, args};
use crate::ledger::{Receipt, read_receipt};
use crate::money::MicroUsdc;

/// A receipt's whole row, by the names of its columns: what a line of a file is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    pub id: String,
    pub wallet: String,
    pub api_key_id: Option<i64>,
    pub model: String,
    pub outcome: String,
    pub reason: Option<String>,
    pub hold_micro: i64,
    pub charged_micro: i64,
    pub cost_pico: i64,
    pub prompt_tokens: i64,
    pub cached_tokens: i64,
    pub completion_tokens: i64,
    pub usage_raw: Option<String>,
    pub usage_units: Option<String>,
    pub upstream_cost_pico: Option<i64>,
    pub terms: String,
    pub created_at_ms: i64,
    pub ended_at_ms: i64,
}

impl Line {
    pub fn charged(&self) -> MicroUsdc {
        MicroUsdc::new(self.charged_micro)
    }
}

/// Receipts of requests that began and ended before `before`, in the order of their ids, which is that of
/// their times. Those stay that a claim still asks what became of its request: claims of payments do for
/// ever.
pub async fn lines_after(db: &Db, after: &str, before: Timestamp, limit: i64) -> Result<Vec<Line>, DbError> {
    let rows = db
        .rows(
            "SELECT * FROM receipts r
             WHERE id > $1 AND id < $2 AND created_at_ms < $3 AND ended_at_ms < $3
               AND NOT EXISTS (SELECT 1 FROM claims c WHERE c.request_id = r.id)
             ORDER BY id LIMIT $4",
            args![after, crate::id::first_request_id(before.millis()), before, limit],
        )
        .await?;
    rows.iter().map(read_line).collect()
}

/// When the oldest hold was made that has not ended.
pub async fn oldest_hold(tx: &mut DbTx) -> Result<Option<Timestamp>, DbError> {
    let row = tx.row("SELECT MIN(created_at_ms) AS oldest FROM holds", args![]).await?;
    row.map_or(Ok(None), |row| row.time_or_null("oldest"))
}

const SELECT_UNFINISHED: &str =
    "SELECT * FROM receipt_archives WHERE sha256 IS NULL OR removed < receipts ORDER BY id LIMIT 1";

/// The archive whose receipts are not all in its file and out of the table. There is one at most.
pub async fn unfinished(db: &Db) -> Result<Option<Archive>, DbError> {
    db.row(SELECT_UNFINISHED, args![]).await?.as_ref().map(read_archive).transpose()
}

/// Writes an archive down before there is anything in its file; `None` where another is unfinished.
pub async fn begin(
    tx: &mut DbTx,
    file: &str,
    before: Timestamp,
    now: Timestamp,
) -> Result<Option<Archive>, DbError> {
    // Who draws a number keeps others from drawing one until the end of the transaction.
    let id = tx.next_id("receipt_archives").await?;
    if tx.row(SELECT_UNFINISHED, args![]).await?.is_some() {
        return Ok(None);
    }
    let row = tx
        .row(
            "INSERT INTO receipt_archives (id, file, before_ms, created_at_ms) VALUES ($1, $2, $3, $4)
             RETURNING *",
            args![id, file, before, now],
        )
        .await?;
    row.as_ref().map(read_archive).transpose()
}

/// Says what is in an archive's file, now that it is whole. Whether nobody had said so before.
pub async fn complete(tx: &mut DbTx, id: i64, contents: &Contents) -> Result<bool, DbError> {
    let sql = "UPDATE receipt_archives SET sha256 = $2, receipts = $3, charged_micro = $4
               WHERE id = $1 AND sha256 IS NULL";
    let Contents { sha256, receipts, charged } = contents;
    Ok(tx.execute(sql, args![id, sha256.as_str(), *receipts, *charged]).await? == 1)
}

/// Forgets an archive for which there was nothing.
pub async fn forget(tx: &mut DbTx, id: i64) -> Result<(), DbError> {
    let sql = "DELETE FROM receipt_archives WHERE id = $1 AND sha256 IS NULL";
    tx.execute(sql, args![id]).await.map(drop)
}

/// Takes receipts out of the table, adds them to what was taken out so far, and counts them as the next
/// of their archive. Whether it was these that were next, and all were there.
pub async fn remove(tx: &mut DbTx, archive: &Archive, lines: &[Line]) -> Result<bool, DbError> {
    let out_of_range = || DbError::Corrupt("an archive's sum out of range".into());
    let count = i64::try_from(lines.len()).map_err(|_| out_of_range())?;
    let charged = lines.iter().try_fold(MicroUsdc::ZERO, |sum, line| sum.checked_add(line.charged()));
    // Its row is taken first, so that of two who try the second finds that these were not next.
    let sql = "UPDATE receipt_archives
               SET removed = removed + $3, removed_charged_micro = removed_charged_micro + $4
               WHERE id = $1 AND removed = $2 AND removed + $3 <= receipts";
    let charged = charged.ok_or_else(out_of_range)?;
    if tx.execute(sql, args![archive.id, archive.removed, count, charged]).await? != 1 {
        return Ok(false);
    }
    for line in lines {
        let sql = "INSERT INTO receipts_leaving (id, archive) VALUES ($1, $2)";
        tx.execute(sql, args![line.id.as_str(), archive.id]).await?;
    }
    tx.execute(ADD_TOTALS, args![]).await?;
    tx.execute(ADD_SPENDING, args![]).await?;
    let sql = "DELETE FROM receipts WHERE id IN (SELECT id FROM receipts_leaving)";
    let removed = tx.execute(sql, args![]).await?;
    tx.execute("DELETE FROM receipts_leaving", args![]).await?;
    Ok(Ok(removed) == u64::try_from(count))
}

const ADD_TOTALS: &str =
    "INSERT INTO archived_totals (wallet, api_key_id, receipts, charges, request_count, prompt_tokens,
                                  completion_tokens, charged_micro, revenue_pico)
     SELECT wallet, COALESCE(api_key_id, 0), COUNT(*),
            SUM(CASE WHEN charged_micro > 0 THEN 1 ELSE 0 END),
            SUM(CASE WHEN outcome = 'released' THEN 0 ELSE 1 END),
            SUM(CASE WHEN outcome = 'released' THEN 0 ELSE prompt_tokens END),
            SUM(CASE WHEN outcome = 'released' THEN 0 ELSE completion_tokens END),
            SUM(charged_micro),
            SUM(CASE WHEN outcome = 'released' THEN 0 ELSE charged_micro * 1000000 - cost_pico END)
     FROM receipts WHERE id IN (SELECT id FROM receipts_leaving)
     GROUP BY wallet, COALESCE(api_key_id, 0)
     ON CONFLICT (wallet, api_key_id) DO UPDATE SET
         receipts = archived_totals.receipts + excluded.receipts,
         charges = archived_totals.charges + excluded.charges,
         request_count = archived_totals.request_count + excluded.request_count,
         prompt_tokens = archived_totals.prompt_tokens + excluded.prompt_tokens,
         completion_tokens = archived_totals.completion_tokens + excluded.completion_tokens,
         charged_micro = archived_totals.charged_micro + excluded.charged_micro,
         revenue_pico = archived_totals.revenue_pico + excluded.revenue_pico";

const ADD_SPENDING: &str = "INSERT INTO archived_spending (api_key_id, day, spent_micro)
     SELECT api_key_id, created_at_ms / 86400000, SUM(charged_micro)
     FROM receipts WHERE api_key_id IS NOT NULL AND id IN (SELECT id FROM receipts_leaving)
     GROUP BY api_key_id, created_at_ms / 86400000
     ON CONFLICT (api_key_id, day) DO UPDATE
     SET spent_micro = archived_spending.spent_micro + excluded.spent_micro";

/// The receipt that a line is, read as if its row were still in the table.
pub async fn receipt_of(db: &Db, line: Line) -> Result<Receipt, DbError> {
    let row = db
        .row(
            "SELECT CAST($1 AS TEXT) AS id, CAST($2 AS TEXT) AS wallet, CAST($3 AS BIGINT) AS api_key_id,
                    CAST($4 AS TEXT) AS outcome, CAST($5 AS TEXT) AS reason, CAST($6 AS BIGINT) AS hold_micro,
                    CAST($7 AS BIGINT) AS charged_micro, CAST($8 AS BIGINT) AS cost_pico,
                    CAST($9 AS BIGINT) AS prompt_tokens, CAST($10 AS BIGINT) AS cached_tokens,
                    CAST($11 AS BIGINT) AS completion_tokens, CAST($12 AS TEXT) AS usage_raw,
                    CAST($13 AS TEXT) AS usage_units, CAST($14 AS BIGINT) AS upstream_cost_pico,
                    CAST($15 AS TEXT) AS terms, CAST($16 AS BIGINT) AS created_at_ms,
                    CAST($17 AS BIGINT) AS ended_at_ms",
            args![
                line.id,
                line.wallet,
                line.api_key_id,
                line.outcome,
                line.reason,
                line.hold_micro,
                line.charged_micro,
                line.cost_pico,
                line.prompt_tokens,
                line.cached_tokens,
                line.completion_tokens,
                line.usage_raw,
                line.usage_units,
                line.upstream_cost_pico,
                line.terms,
                line.created_at_ms,
                line.ended_at_ms
            ],
        )
        .await?;
    read_receipt(&row.ok_or_else(|| DbError::Corrupt("a query of one row has none".into()))?)
}

pub async fn all(db: &Db) -> Result<Vec<Archive>, DbError> {
    db.rows("SELECT * FROM receipt_archives ORDER BY id", args![]).await?.iter().map(read_archive).collect()
}

/// Before when receipts may have been moved into files.
pub async fn archived_before(db: &Db) -> Result<Option<Timestamp>, DbError> {
    let sql = "SELECT MAX(before_ms) AS before_ms FROM receipt_archives";
    db.row(sql, args![]).await?.map_or(Ok(None), |row| row.time_or_null("before_ms"))
}

fn read_archive(row: &DbRow) -> Result<Archive, DbError> {
    let contents = match row.text_or_null("sha256")? {
        None => None,
        Some(sha256) => {
            Some(Contents { sha256, receipts: row.int("receipts")?, charged: row.micro("charged_micro")? })
        }
    };
    Ok(Archive {
        id: row.int("id")?,
        file: row.text("file")?,
        before: row.time("before_ms")?,
        created_at: row.time("created_at_ms")?,
        contents,
        removed: row.int("removed")?,
    })
}

fn read_line(row: &DbRow) -> Result<Line, DbError> {
    Ok(Line {
        id: row.text("id")?,
        wallet: row.text("wallet")?,
        api_key_id: row.int_or_null("api_key_id")?,
        model: row.text("model")?,
        outcome: row.text("outcome")?,
        reason: row.text_or_null("reason")?,
        hold_micro: row.int("hold_micro")?,
        charged_micro: row.int("charged_micro")?,
        cost_pico: row.int("cost_pico")?,
        prompt_tokens: row.int("prompt_tokens")?,
        cached_tokens: row.int("cached_tokens")?,
        completion_tokens: row.int("completion_tokens")?,
        usage_raw: row.text_or_null("usage_raw")?,
        usage_units: row.text_or_null("usage_units")?,
        upstream_cost_pico: row.int_or_null("upstream_cost_pico")?,
        terms: row.text("terms")?,
        created_at_ms: row.int("created_at_ms")?,
        ended_at_ms: row.int("ended_at_ms")?,
    })
}
