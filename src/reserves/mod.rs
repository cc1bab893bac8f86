//! Proof of reserves: what all wallets are owed, as a Merkle sum tree in which each finds its own balance, beside
//! what the treasury holds in a block that anybody can look at.
//!
//! A publication is of one instant of the books. Its leaves stand in an order that is drawn anew each time, since
//! a leaf's neighbour is shown its balance: who it is must not follow from where it stands. The tree is kept in
//! pages of 256, so that a wallet's branch is read in a few rows and nothing is built again.

mod store;
pub mod tree;
mod wire;

pub use wire::{
    ProofBody, ProofRefused, ReservesBody, VerifiedProof, is_proof, proof_body, publication_body,
    verify_proof,
};

use std::time::Instant;

use crate::auth::SigningKey;
use crate::chain::{Chain, ChainError};
use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::db::{Db, DbError, DbTx};
use crate::failpoint;
use crate::id::{Entropy, Wallet};
use crate::money::MicroUsdc;
use tree::{Builder, Hash, Leaf, Node, PAGE, Page, Salt, TreeError, fold, siblings};

/// Publications that are kept: of one a day, a week. At a million wallets each takes about 60 MB.
pub const KEPT: usize = 7;
/// Wallets read at a time.
const READ_AT_ONCE: i64 = 10_000;
/// Pages written in one transaction, for which a settlement may have to wait: about a quarter of a megabyte.
const WRITTEN_AT_ONCE: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum ReservesError {
    #[error(
        "reading what the treasury holds in the newest final block, whose state an RPC endpoint must keep: {0}"
    )]
    Chain(#[from] ChainError),
    #[error("the tree cannot be made: {0}; `farebox audit` says what is wrong with the books")]
    Tree(#[from] TreeError),
    #[error("another publication was begun meanwhile and has ended before this one: it stands")]
    Overtaken,
    #[error("the branch was not worked out to its end")]
    CutOff,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What was published.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Publication {
    pub number: i64,
    pub root: Hash,
    pub wallets: u64,
    pub liabilities: MicroUsdc,
    pub in_motion: InMotion,
    pub reserves: MicroUsdc,
    pub chain_id: u64,
    pub asset: Wallet,
    pub pay_to: Wallet,
    pub block_number: i64,
    pub block_hash: String,
    pub block_time: Timestamp,
    pub taken_at: Timestamp,
    /// What the salts are made from.
    secret: [u8; 32],
}

/// What stands between the books at an instant and what the treasury held in a block, which are never of the
/// same moment.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct InMotion {
    /// In balances, and by transfers in later blocks: not in the treasury yet.
    pub credited_since: MicroUsdc,
    /// In balances, and by withdrawals in blocks up to this one out of the treasury. `None`, as what follows, in
    /// what was published before it was told.
    pub leaving: Option<MicroUsdc>,
    /// Out of balances, and by withdrawals in later blocks: still in the treasury.
    pub left_since: Option<MicroUsdc>,
    /// In the treasury, and in nobody's balance yet: deposits in suspense, payments that wait to be credited.
    pub uncredited: Option<MicroUsdc>,
}

/// What a treasury holds in a final block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holdings {
    pub chain_id: u64,
    pub asset: Wallet,
    pub pay_to: Wallet,
    pub balance: MicroUsdc,
    pub block_number: i64,
    pub block_hash: String,
    pub block_time: Timestamp,
}

/// A wallet's leaf, where it stands, and what leads from it to the root.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proof {
    pub leaf: Leaf,
    pub index: u64,
    pub branch: Vec<Node>,
}

/// The treasury's holdings in the newest final block.
pub async fn holdings(chain: &Chain, payments: &config::Payments) -> Result<Holdings, ReservesError> {
    let held = chain.final_balance(payments.pay_to).await?;
    let out_of_range = || ChainError::Nonsense("a block or a balance out of range".into());
    Ok(Holdings {
        chain_id: payments.chain_id,
        asset: payments.token.address,
        pay_to: payments.pay_to,
        balance: crate::chain::micro(held.balance).ok_or_else(out_of_range)?,
        block_number: i64::try_from(held.block.number).map_err(|_| out_of_range())?,
        block_hash: held.block_hash.to_string(),
        block_time: Timestamp::from_seconds(i64::try_from(held.block.timestamp).map_err(|_| out_of_range())?),
    })
}

/// Publishes what all wallets are owed at this instant, beside what the treasury holds. The books may be written
/// to meanwhile; for its time it takes about 50 bytes a wallet.
pub async fn publish(
    db: &Db,
    clock: &Clock,
    entropy: &Entropy,
    holdings: Holdings,
) -> Result<Publication, ReservesError> {
    let secret = entropy.bytes::<32>();
    let (taken_at, books) = (clock.now(), read_books(db, &secret, &holdings).await?);
    let mut publication = Publication {
        number: 0,
        root: Node::empty().hash,
        wallets: u64::try_from(books.leaves.len()).map_err(|_| TreeError::OutOfRange)?,
        liabilities: books.liabilities,
        in_motion: books.in_motion,
        reserves: holdings.balance,
        chain_id: holdings.chain_id,
        asset: holdings.asset,
        pay_to: holdings.pay_to,
        block_number: holdings.block_number,
        block_hash: holdings.block_hash,
        block_time: holdings.block_time,
        taken_at,
        secret,
    };
    let mut tx = db.begin().await?;
    publication.number = store::begin(&mut tx, &publication).await?;
    tx.commit().await?;
    failpoint::reached("reserves-begun");
    let root = match write_tree(db, publication.number, &books.leaves).await {
        // It was taken for one that was cut off, and removed.
        Err(ReservesError::Db(error)) if error.is_foreign_key_violation() => {
            return Err(ReservesError::Overtaken);
        }
        root => root?,
    };
    if root.sum != publication.liabilities {
        return Err(TreeError::OutOfRange.into());
    }
    publication.root = root.hash;
    let mut tx = db.begin().await?;
    if !store::complete(&mut tx, publication.number, &publication.root).await? {
        return Err(ReservesError::Overtaken);
    }
    tx.commit().await?;
    failpoint::reached("reserves-complete");
    forget_old(db, publication.number).await?;
    Ok(publication)
}

/// One instant of the books.
struct Books {
    /// In the order of their salts.
    leaves: Vec<Leaf>,
    liabilities: MicroUsdc,
    in_motion: InMotion,
}

async fn read_books(db: &Db, secret: &[u8], holdings: &Holdings) -> Result<Books, ReservesError> {
    let key = SigningKey::new(secret);
    let mut tx = db.snapshot().await?;
    let in_motion = store::in_motion(&mut tx, holdings).await?;
    let (mut leaves, mut liabilities) = (Vec::new(), MicroUsdc::ZERO);
    let mut after = None;
    loop {
        let page = store::balances_after(&mut tx, after, READ_AT_ONCE).await?;
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        for (wallet, balance) in page {
            liabilities = liabilities.checked_add(balance).ok_or(TreeError::OutOfRange)?;
            leaves.push(Leaf { wallet, balance, salt: salt_of(&key, wallet) });
        }
    }
    drop(tx);
    leaves.sort_unstable_by_key(|leaf| (leaf.salt, leaf.wallet));
    Ok(Books { leaves, liabilities, in_motion })
}

/// The first 16 bytes of HMAC-SHA-256 of the wallet's address.
fn salt_of(key: &SigningKey, wallet: Wallet) -> Salt {
    let mut salt = Salt::default();
    for (byte, of_hash) in salt.iter_mut().zip(key.sign(wallet.0.as_slice())) {
        *byte = of_hash;
    }
    salt
}

/// Writes all pages of a tree, a few at a time, and returns its root.
async fn write_tree(db: &Db, number: i64, leaves: &[Leaf]) -> Result<Node, ReservesError> {
    let mut builder = Builder::default();
    for (at, pages) in leaves.chunks(PAGE * WRITTEN_AT_ONCE).enumerate() {
        let began = Instant::now();
        let mut tx = db.begin().await?;
        for (within, page) in pages.chunks(PAGE).enumerate() {
            let page_number = at * WRITTEN_AT_ONCE + within;
            store::write_leaves(&mut tx, number, page_number, page).await?;
            builder.push(fold(&nodes_of(page)?)?)?;
        }
        write_nodes(&mut tx, number, builder.take_pages()).await?;
        tx.commit().await?;
        // The server's turn: on SQLite there is one who writes, and who waits looks only now and then.
        tokio::time::sleep(began.elapsed()).await;
    }
    let (root, rest) = builder.finish()?;
    let mut tx = db.begin().await?;
    write_nodes(&mut tx, number, rest).await?;
    tx.commit().await?;
    Ok(root)
}

async fn write_nodes(tx: &mut DbTx, number: i64, pages: Vec<Page>) -> Result<(), DbError> {
    for page in pages {
        store::write_nodes(tx, number, &page).await?;
    }
    Ok(())
}

fn nodes_of(leaves: &[Leaf]) -> Result<Vec<Node>, TreeError> {
    leaves.iter().map(Leaf::node).collect()
}

/// Removes all but the newest publications, and what an earlier run began and did not end.
async fn forget_old(db: &Db, newest: i64) -> Result<(), DbError> {
    for number in store::numbers_to_forget(db, newest, KEPT).await? {
        loop {
            let began = Instant::now();
            let mut tx = db.begin().await?;
            let removed = store::remove_pages(&mut tx, number, WRITTEN_AT_ONCE).await?;
            if removed == 0 {
                store::remove(&mut tx, number).await?;
            }
            tx.commit().await?;
            if removed == 0 {
                break;
            }
            tokio::time::sleep(began.elapsed()).await;
        }
    }
    Ok(())
}

/// What was published last.
pub async fn latest(db: &Db) -> Result<Option<Publication>, DbError> {
    store::latest(db).await
}

/// A wallet's place in a publication; `None` where the books did not know it yet.
pub async fn proof_of(
    db: &Db,
    publication: &Publication,
    wallet: Wallet,
) -> Result<Option<Proof>, ReservesError> {
    let key = SigningKey::new(&publication.secret);
    let salt = salt_of(&key, wallet);
    let Some((page, leaves)) = store::leaves_around(db, publication.number, &salt).await? else {
        return Ok(None);
    };
    let wallets = usize::try_from(publication.wallets).map_err(|_| TreeError::OutOfRange)?;
    let (mut place, mut width, mut above) = (page, wallets.div_ceil(PAGE), Vec::new());
    while width > 1 {
        let nodes = store::nodes(db, publication.number, above.len() + 1, place / PAGE).await?;
        above.push((nodes, place % PAGE));
        (place, width) = (place / PAGE, width.div_ceil(PAGE));
    }
    // A thousand hashes or two, for which others should not wait.
    let found = tokio::task::spawn_blocking(move || find(&key, wallet, page, leaves, &above));
    found.await.map_err(|_| ReservesError::CutOff)?
}

/// A wallet's place, where it is in this page of leaves, and its branch through the pages above.
fn find(
    key: &SigningKey,
    wallet: Wallet,
    page: usize,
    leaves: Vec<(Wallet, MicroUsdc)>,
    above: &[(Vec<Node>, usize)],
) -> Result<Option<Proof>, ReservesError> {
    let leaf = |(wallet, balance)| Leaf { wallet, balance, salt: salt_of(key, wallet) };
    let leaves: Vec<Leaf> = leaves.into_iter().map(leaf).collect();
    let found = leaves.iter().enumerate().find(|(_, leaf)| leaf.wallet == wallet);
    let Some((at, leaf)) = found else { return Ok(None) };
    let mut branch = siblings(&nodes_of(&leaves)?, at)?;
    for (nodes, place) in above {
        branch.extend(siblings(nodes, *place)?);
    }
    let index = page.checked_mul(PAGE).and_then(|first| first.checked_add(at));
    let index = index.and_then(|index| u64::try_from(index).ok()).ok_or(TreeError::OutOfRange)?;
    Ok(Some(Proof { leaf: *leaf, index, branch }))
}
