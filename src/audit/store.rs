//! The audit's SQL: each statement selects what contradicts an invariant, and so should select nothing.

use crate::db::{DbError, DbTx, args};
use crate::ledger::{Receipt, read_receipt};
use crate::money::MicroUsdc;

/// Receipts read at a time.
const PAGE: i64 = 1000;

pub struct Check {
    pub name: &'static str,
    /// What is counted by `count`.
    pub of: &'static str,
    count: &'static str,
    /// Selects a text `what` for each contradiction.
    at_odds: &'static str,
}

pub struct AtOdds {
    pub looked_at: i64,
    pub rows: Vec<String>,
}

pub const CHECKS: &[Check] = &[
    Check {
        name: "entries have two sides that sum to zero",
        of: "entries",
        count: "SELECT COUNT(*) AS n FROM entries",
        at_odds: "SELECT wallet || ' entry ' || seq AS what FROM entries
                  WHERE amount_micro + contra_micro <> 0 OR amount_micro = 0",
    },
    Check {
        name: "entries follow one another without a gap",
        of: "entries",
        count: "SELECT COUNT(*) AS n FROM entries",
        at_odds: "SELECT wallet || ' entry ' || seq AS what FROM (
                      SELECT wallet, seq, amount_micro, balance_before_micro, balance_after_micro,
                             LAG(seq, 1, 0) OVER (PARTITION BY wallet ORDER BY seq) AS previous_seq,
                             LAG(balance_after_micro, 1, 0) OVER (PARTITION BY wallet ORDER BY seq) AS previous
                      FROM entries) e
                  WHERE seq <> previous_seq + 1 OR balance_before_micro <> previous
                     OR balance_after_micro <> balance_before_micro + amount_micro",
    },
    Check {
        name: "balance >= locked >= 0",
        of: "wallets",
        count: "SELECT COUNT(*) AS n FROM wallets",
        at_odds: "SELECT address AS what FROM wallets WHERE locked_micro < 0 OR balance_micro < locked_micro",
    },
    Check {
        name: "balance = the sum of the wallet's entries",
        of: "wallets",
        count: "SELECT COUNT(*) AS n FROM wallets",
        at_odds: "SELECT w.address || ' has ' || w.balance_micro || ', entries say ' || COALESCE(e.total, 0) AS what
                  FROM wallets w LEFT JOIN (
                      SELECT wallet, CAST(SUM(amount_micro) AS BIGINT) AS total, COUNT(*) AS entries
                      FROM entries GROUP BY wallet) e ON e.wallet = w.address
                  WHERE w.balance_micro <> COALESCE(e.total, 0) OR w.seq <> COALESCE(e.entries, 0)",
    },
    Check {
        name: "locked = the sum of open holds and withdrawals",
        of: "holds and withdrawals",
        count: "SELECT (SELECT COUNT(*) FROM holds) + (SELECT COUNT(*) FROM payments WHERE kind = 'withdrawal'
                    AND state IN ('verified', 'signed', 'broadcast', 'mined', 'credited')) AS n",
        at_odds: "SELECT w.address || ' has ' || w.locked_micro || ' locked, holds say ' || COALESCE(h.total, 0) AS what
                  FROM wallets w LEFT JOIN (
                      SELECT wallet, CAST(SUM(locked) AS BIGINT) AS total FROM (
                          SELECT wallet, amount_micro AS locked FROM holds
                          UNION ALL
                          SELECT to_wallet, value_micro FROM payments WHERE kind = 'withdrawal'
                             AND state IN ('verified', 'signed', 'broadcast', 'mined', 'credited')
                      ) open GROUP BY wallet
                  ) h ON h.wallet = w.address
                  WHERE w.locked_micro <> COALESCE(h.total, 0)",
    },
    Check {
        name: "a hold ends at most once",
        of: "receipts",
        count: "SELECT COUNT(*) AS n FROM receipts",
        at_odds: "SELECT h.id || ' is open and ended' AS what FROM holds h JOIN receipts r ON r.id = h.id
                  UNION ALL
                  SELECT id || ' charged ' || charged_micro || ' of ' || hold_micro AS what FROM receipts
                  WHERE charged_micro > hold_micro OR charged_micro < 0
                     OR (outcome = 'released' AND charged_micro <> 0)
                  UNION ALL
                  SELECT id || ' is open, and of a time that is archived' AS what FROM holds
                  WHERE created_at_ms < (SELECT MAX(before_ms) FROM receipt_archives)",
    },
    Check {
        name: "each charge has its receipt, each receipt its charge",
        of: "charges",
        count: "SELECT COUNT(*) AS n FROM entries WHERE kind = 'charge'",
        at_odds: "SELECT r.id || ' charged without an entry' AS what
                  FROM receipts r LEFT JOIN entries e
                    ON e.kind = 'charge' AND e.reference = r.id AND e.wallet = r.wallet
                   AND e.amount_micro = -r.charged_micro
                  WHERE r.charged_micro > 0 AND e.reference IS NULL
                  UNION ALL
                  SELECT 'charges of ' || wallet || ' without a receipt, or archived without a charge: '
                      || SUM(charges) || ', of ' || SUM(charged) AS what
                  FROM (
                      SELECT e.wallet, 1 AS charges, -e.amount_micro AS charged
                      FROM entries e LEFT JOIN receipts r ON r.id = e.reference AND r.charged_micro > 0
                      WHERE e.kind = 'charge' AND r.id IS NULL
                      UNION ALL
                      SELECT wallet, -charges, -charged_micro FROM archived_totals
                  ) both_sides GROUP BY wallet HAVING SUM(charges) <> 0 OR SUM(charged) <> 0",
    },
    Check {
        name: "each credit has its payment, each payment its credit",
        of: "credits",
        count: "SELECT COUNT(*) AS n FROM entries WHERE kind = 'topup'",
        at_odds: "SELECT 'payment ' || p.id || ' credited without an entry' AS what
                  FROM payments p LEFT JOIN entries e
                    ON e.kind = 'topup' AND e.reference = CAST(p.id AS TEXT)
                   AND e.wallet = COALESCE(p.beneficiary, p.from_wallet) AND e.amount_micro = p.value_micro
                  WHERE p.state IN ('credited', 'finalized', 'reorged') AND p.kind <> 'withdrawal'
                    AND e.reference IS NULL
                  UNION ALL
                  SELECT 'entry of payment ' || e.reference || ' without a credited payment' AS what
                  FROM entries e LEFT JOIN payments p
                    ON CAST(p.id AS TEXT) = e.reference AND p.state IN ('credited', 'finalized', 'reorged')
                   AND p.kind <> 'withdrawal'
                  WHERE e.kind = 'topup' AND p.id IS NULL",
    },
    Check {
        name: "each withdrawal has its entry, and no other",
        of: "withdrawals",
        count: "SELECT COUNT(*) AS n FROM entries WHERE kind = 'withdrawal'",
        at_odds: "SELECT 'withdrawal ' || p.id || ' is final without an entry' AS what
                  FROM payments p LEFT JOIN entries e
                    ON e.kind = 'withdrawal' AND e.reference = CAST(p.id AS TEXT) AND e.wallet = p.to_wallet
                   AND e.amount_micro = -p.value_micro
                  WHERE p.kind = 'withdrawal' AND p.state = 'finalized' AND e.reference IS NULL
                  UNION ALL
                  SELECT 'entry of withdrawal ' || e.reference || ' without one that is final' AS what
                  FROM entries e LEFT JOIN payments p
                    ON CAST(p.id AS TEXT) = e.reference AND p.kind = 'withdrawal' AND p.state = 'finalized'
                  WHERE e.kind = 'withdrawal' AND p.id IS NULL",
    },
    Check {
        name: "each undone payment is reversed, and no other",
        of: "reversals",
        count: "SELECT COUNT(*) AS n FROM entries WHERE kind = 'reversal'",
        at_odds: "SELECT 'payment ' || p.id || ' undone and not reversed' AS what
                  FROM payments p LEFT JOIN entries e
                    ON e.kind = 'reversal' AND e.reference = CAST(p.id AS TEXT) AND e.wallet = p.from_wallet
                   AND e.amount_micro = -p.value_micro
                  WHERE p.state = 'reorged' AND e.reference IS NULL
                  UNION ALL
                  SELECT 'payment ' || e.reference || ' reversed and not undone' AS what
                  FROM entries e LEFT JOIN payments p ON CAST(p.id AS TEXT) = e.reference AND p.state = 'reorged'
                  WHERE e.kind = 'reversal' AND p.id IS NULL",
    },
    Check {
        name: "debt = what was lent for reversals and not repaid",
        of: "wallets",
        count: "SELECT COUNT(*) AS n FROM wallets",
        at_odds: "SELECT w.address || ' owes ' || w.debt_micro || ', entries say ' || COALESCE(e.total, 0) AS what
                  FROM wallets w LEFT JOIN (
                      SELECT wallet, CAST(SUM(amount_micro) AS BIGINT) AS total FROM entries
                      WHERE contra_account = 'debt' GROUP BY wallet
                  ) e ON e.wallet = w.address
                  WHERE w.debt_micro <> COALESCE(e.total, 0)",
    },
    Check {
        name: "usage totals = the sums of receipts",
        of: "totals",
        count: "SELECT COUNT(*) AS n FROM usage_totals",
        at_odds: "SELECT wallet || ' key ' || api_key_id AS what FROM (
                      SELECT wallet, api_key_id, request_count AS requests, prompt_tokens AS prompt,
                             completion_tokens AS completion, charged_micro AS charged, revenue_pico AS revenue
                      FROM usage_totals
                      UNION ALL
                      SELECT wallet, COALESCE(api_key_id, 0), -1, -prompt_tokens, -completion_tokens,
                             -charged_micro, cost_pico - charged_micro * 1000000
                      FROM receipts WHERE outcome <> 'released'
                      UNION ALL
                      SELECT wallet, api_key_id, -request_count, -prompt_tokens, -completion_tokens,
                             -charged_micro, -revenue_pico
                      FROM archived_totals
                  ) both_sides GROUP BY wallet, api_key_id
                  HAVING SUM(requests) <> 0 OR SUM(prompt) <> 0 OR SUM(completion) <> 0
                      OR SUM(charged) <> 0 OR SUM(revenue) <> 0",
    },
    Check {
        name: "spending of keys = their receipts and open holds",
        of: "totals of keys",
        count: "SELECT COUNT(*) AS n FROM key_spending",
        at_odds: "SELECT 'key ' || api_key_id || ' day ' || day AS what FROM (
                      SELECT api_key_id, day, spent_micro AS spent, held_micro AS held FROM key_spending
                      UNION ALL
                      SELECT api_key_id, 0, -charged_micro, 0 FROM receipts
                      UNION ALL
                      SELECT api_key_id, created_at_ms / 86400000, -charged_micro, 0 FROM receipts
                      UNION ALL
                      SELECT api_key_id, 0, -spent_micro, 0 FROM archived_spending
                      UNION ALL
                      SELECT api_key_id, day, -spent_micro, 0 FROM archived_spending
                      UNION ALL
                      SELECT api_key_id, 0, 0, -amount_micro FROM holds
                      UNION ALL
                      SELECT api_key_id, created_at_ms / 86400000, 0, -amount_micro FROM holds
                  ) both_sides WHERE api_key_id IS NOT NULL GROUP BY api_key_id, day
                  HAVING SUM(spent) <> 0 OR SUM(held) <> 0",
    },
    Check {
        name: "what archives took out = the sums of their receipts",
        of: "archives",
        count: "SELECT COUNT(*) AS n FROM receipt_archives",
        at_odds: "SELECT 'archives took out ' || SUM(receipts) || ' receipts and ' || SUM(charged)
                      || ' micro-USDC more than is kept of them' AS what
                  FROM (
                      SELECT removed AS receipts, removed_charged_micro AS charged FROM receipt_archives
                      UNION ALL
                      SELECT -receipts, -charged_micro FROM archived_totals
                  ) both_sides HAVING SUM(receipts) <> 0 OR SUM(charged) <> 0
                  UNION ALL
                  SELECT 'archive ' || id || ' took out ' || removed_charged_micro || ' of ' || charged_micro AS what
                  FROM receipt_archives WHERE removed = receipts AND removed_charged_micro <> charged_micro
                  UNION ALL
                  SELECT id || ' was left where only what is being archived is' AS what FROM receipts_leaving",
    },
];

pub async fn at_odds(tx: &mut DbTx, check: &Check) -> Result<AtOdds, DbError> {
    let counted = tx.row(check.count, args![]).await?;
    let looked_at = counted.map_or(Ok(0), |row| row.int("n"))?;
    let rows = tx.rows(check.at_odds, args![]).await?;
    let rows = rows.iter().map(|row| row.text("what")).collect::<Result<_, _>>()?;
    Ok(AtOdds { looked_at, rows })
}

/// The next receipts by id.
pub async fn receipts_after(tx: &mut DbTx, after: &str) -> Result<Vec<Receipt>, DbError> {
    let sql = "SELECT * FROM receipts WHERE id > $1 ORDER BY id LIMIT $2";
    tx.rows(sql, args![after, PAGE]).await?.iter().map(read_receipt).collect()
}

/// What all wallets together are owed.
pub async fn owed(tx: &mut DbTx) -> Result<MicroUsdc, DbError> {
    let sql = "SELECT CAST(COALESCE(SUM(balance_micro), 0) AS BIGINT) AS owed FROM wallets";
    tx.row(sql, args![]).await?.map_or(Ok(MicroUsdc::ZERO), |row| row.micro("owed"))
}
