//! The SQL of publications.

use crate::db::{Db, DbError, DbRow, DbTx, args};
use crate::id::Wallet;
use crate::money::MicroUsdc;
use crate::reserves::tree::{Hash, Leaf, Node, Page, Salt};
use crate::reserves::{Holdings, InMotion, Publication};

/// Hex digits of a page's items: of a wallet and a balance, and of a hash and a sum.
const WALLET: usize = 40;
const HASH: usize = 64;
const AMOUNT: usize = 16;

/// The next wallets by address, each with its whole balance.
pub async fn balances_after(
    tx: &mut DbTx,
    after: Option<Wallet>,
    limit: i64,
) -> Result<Vec<(Wallet, MicroUsdc)>, DbError> {
    let sql = "SELECT address, balance_micro FROM wallets WHERE address > $1 ORDER BY address LIMIT $2";
    let after = after.map(Wallet::key).unwrap_or_default();
    let rows = tx.rows(sql, args![after, limit]).await?;
    rows.iter().map(|row| Ok((row.wallet("address")?, row.micro("balance_micro")?))).collect()
}

/// What is between the books and the block that the holdings are of.
pub async fn in_motion(tx: &mut DbTx, holdings: &Holdings) -> Result<InMotion, DbError> {
    let row = tx
        .row(
            "SELECT CAST(COALESCE(SUM(CASE WHEN kind <> 'withdrawal' AND to_wallet = $4 AND block_number > $1
                                            AND state IN ('credited', 'finalized')
                                           THEN value_micro END), 0) AS BIGINT) AS credited_since,
                    CAST(COALESCE(SUM(CASE WHEN kind = 'withdrawal' AND from_wallet = $4 AND block_number <= $1
                                            AND state = 'mined'
                                           THEN value_micro END), 0) AS BIGINT) AS leaving,
                    CAST(COALESCE(SUM(CASE WHEN kind = 'withdrawal' AND from_wallet = $4 AND block_number > $1
                                            AND state = 'finalized'
                                           THEN value_micro END), 0) AS BIGINT) AS left_since,
                    CAST(COALESCE(SUM(CASE WHEN kind <> 'withdrawal' AND to_wallet = $4 AND block_number <= $1
                                            AND state = 'mined'
                                           THEN value_micro END), 0) AS BIGINT) AS uncredited
             FROM payments
             WHERE chain_id = $2 AND asset = $3 AND (block_number > $1 OR state = 'mined')",
            args![holdings.block_number, int(holdings.chain_id)?, holdings.asset, holdings.pay_to],
        )
        .await?;
    let row = row.ok_or_else(|| corrupt("sum that is missing"))?;
    Ok(InMotion {
        credited_since: row.micro("credited_since")?,
        leaving: Some(row.micro("leaving")?),
        left_since: Some(row.micro("left_since")?),
        uncredited: Some(row.micro("uncredited")?),
    })
}

/// Writes a publication down before there are any pages of it, and gives it its number.
pub async fn begin(tx: &mut DbTx, new: &Publication) -> Result<i64, DbError> {
    let number = tx.next_id("reserves").await?;
    tx.execute(
        "INSERT INTO reserves (number, chain_id, asset, pay_to, block_number, block_hash, block_time_ms,
                               reserves_micro, taken_at_ms, wallets, liabilities_micro, credited_since_micro, leaving_micro,
                               left_since_micro, uncredited_micro, secret)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)",
        args![
            number,
            int(new.chain_id)?,
            new.asset,
            new.pay_to,
            new.block_number,
            new.block_hash.as_str(),
            new.block_time,
            new.reserves,
            new.taken_at,
            int(new.wallets)?,
            new.liabilities,
            new.in_motion.credited_since,
            new.in_motion.leaving.map(MicroUsdc::get),
            new.in_motion.left_since.map(MicroUsdc::get),
            new.in_motion.uncredited.map(MicroUsdc::get),
            hex::encode(new.secret)
        ],
    )
    .await?;
    Ok(number)
}

/// Says that all pages are there. Whether the publication was, too.
pub async fn complete(tx: &mut DbTx, number: i64, root: &Hash) -> Result<bool, DbError> {
    let sql = "UPDATE reserves SET root = $2 WHERE number = $1 AND root IS NULL";
    Ok(tx.execute(sql, args![number, hex::encode(root)]).await? == 1)
}

pub async fn write_leaves(
    tx: &mut DbTx,
    publication: i64,
    page: usize,
    leaves: &[Leaf],
) -> Result<(), DbError> {
    let mut text = String::with_capacity(leaves.len() * (WALLET + AMOUNT));
    for leaf in leaves {
        text += &hex::encode(leaf.wallet.0);
        text += &format!("{:016x}", leaf.balance.get());
    }
    let first = leaves.first().map(|leaf| hex::encode(leaf.salt));
    tx.execute(INSERT_PAGE, args![publication, 0, int(page)?, first, text]).await.map(drop)
}

pub async fn write_nodes(tx: &mut DbTx, publication: i64, page: &Page) -> Result<(), DbError> {
    let mut text = String::with_capacity(page.nodes.len() * (HASH + AMOUNT));
    for node in &page.nodes {
        text += &hex::encode(node.hash);
        text += &format!("{:016x}", node.sum.get());
    }
    let place = (int(page.level)?, int(page.number)?);
    tx.execute(INSERT_PAGE, args![publication, place.0, place.1, None::<String>, text]).await.map(drop)
}

const INSERT_PAGE: &str =
    "INSERT INTO reserves_pages (publication, level, page, first_salt, nodes) VALUES ($1, $2, $3, $4, $5)";

pub async fn latest(db: &Db) -> Result<Option<Publication>, DbError> {
    let sql = "SELECT * FROM reserves WHERE root IS NOT NULL ORDER BY number DESC LIMIT 1";
    db.row(sql, args![]).await?.as_ref().map(read).transpose()
}

/// The page that a leaf of this salt is in, if there is such a leaf, and its number.
pub async fn leaves_around(
    db: &Db,
    publication: i64,
    salt: &Salt,
) -> Result<Option<(usize, Vec<(Wallet, MicroUsdc)>)>, DbError> {
    let row = db
        .row(
            "SELECT page, nodes FROM reserves_pages
             WHERE publication = $1 AND level = 0 AND first_salt <= $2 ORDER BY first_salt DESC LIMIT 1",
            args![publication, hex::encode(salt)],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    let page = usize::try_from(row.int("page")?).map_err(|_| corrupt("number"))?;
    let text = row.text("nodes")?;
    let read = |item: &[u8]| {
        let (wallet, balance) = item.split_at_checked(WALLET)?;
        let wallet: [u8; 20] = hex::decode(wallet).ok()?.try_into().ok()?;
        Some((Wallet(wallet.into()), read_amount(balance)?))
    };
    let leaves: Option<Vec<_>> = text.as_bytes().chunks(WALLET + AMOUNT).map(read).collect();
    Ok(Some((page, leaves.ok_or_else(|| corrupt("leaf"))?)))
}

pub async fn nodes(db: &Db, publication: i64, level: usize, page: usize) -> Result<Vec<Node>, DbError> {
    let sql = "SELECT nodes FROM reserves_pages WHERE publication = $1 AND level = $2 AND page = $3";
    let row = db.row(sql, args![publication, int(level)?, int(page)?]).await?;
    let text = row.ok_or_else(|| corrupt("page that is missing"))?.text("nodes")?;
    let read = |item: &[u8]| {
        let (hash, sum) = item.split_at_checked(HASH)?;
        let hash: Hash = hex::decode(hash).ok()?.try_into().ok()?;
        Some(Node { hash, sum: read_amount(sum)? })
    };
    let nodes: Option<Vec<_>> = text.as_bytes().chunks(HASH + AMOUNT).map(read).collect();
    nodes.ok_or_else(|| corrupt("node"))
}

fn read_amount(digits: &[u8]) -> Option<MicroUsdc> {
    let bytes: [u8; 8] = hex::decode(digits).ok()?.try_into().ok()?;
    Some(MicroUsdc::new(i64::from_be_bytes(bytes)))
}

/// Which publications are to go once the one of this number is there: those beyond the newest few, and those
/// of before that were never completed.
pub async fn numbers_to_forget(db: &Db, newest: i64, kept: usize) -> Result<Vec<i64>, DbError> {
    let rows = db
        .rows(
            "SELECT number FROM reserves WHERE number < $1 AND root IS NULL
             UNION ALL
             SELECT number FROM (
                 SELECT number FROM reserves WHERE root IS NOT NULL ORDER BY number DESC LIMIT 1000000 OFFSET $2
             ) old",
            args![newest, int(kept)?],
        )
        .await?;
    rows.iter().map(|row| row.int("number")).collect()
}

/// Removes some of a publication's pages, and returns how many.
pub async fn remove_pages(tx: &mut DbTx, publication: i64, most: usize) -> Result<u64, DbError> {
    tx.execute(
        "DELETE FROM reserves_pages WHERE publication = $1 AND (level, page) IN (
             SELECT level, page FROM reserves_pages WHERE publication = $1 ORDER BY level, page LIMIT $2)",
        args![publication, int(most)?],
    )
    .await
}

pub async fn remove(tx: &mut DbTx, number: i64) -> Result<(), DbError> {
    tx.execute("DELETE FROM reserves WHERE number = $1", args![number]).await.map(drop)
}

fn read(row: &DbRow) -> Result<Publication, DbError> {
    let bytes = |column: &str| -> Result<[u8; 32], DbError> {
        let bytes = hex::decode(row.text(column)?).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| DbError::Corrupt(format!("{column} of reserves")))
    };
    let uint = |column: &str| u64::try_from(row.int(column)?).map_err(|_| corrupt("number below zero"));
    Ok(Publication {
        number: row.int("number")?,
        root: bytes("root")?,
        wallets: uint("wallets")?,
        liabilities: row.micro("liabilities_micro")?,
        in_motion: InMotion {
            credited_since: row.micro("credited_since_micro")?,
            leaving: row.int_or_null("leaving_micro")?.map(MicroUsdc::new),
            left_since: row.int_or_null("left_since_micro")?.map(MicroUsdc::new),
            uncredited: row.int_or_null("uncredited_micro")?.map(MicroUsdc::new),
        },
        reserves: row.micro("reserves_micro")?,
        chain_id: uint("chain_id")?,
        asset: row.wallet("asset")?,
        pay_to: row.wallet("pay_to")?,
        block_number: row.int("block_number")?,
        block_hash: row.text("block_hash")?,
        block_time: row.time("block_time_ms")?,
        taken_at: row.time("taken_at_ms")?,
        secret: bytes("secret")?,
    })
}

fn corrupt(what: &str) -> DbError {
    DbError::Corrupt(format!("a {what} of published reserves"))
}

fn int(value: impl TryInto<i64>) -> Result<i64, DbError> {
    value.try_into().map_err(|_| corrupt("number out of range"))
}
