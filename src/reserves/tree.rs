//! A Merkle sum tree: each node commits to what all leaves below it come to.
//!
//! A node's hash is over both children's hashes *and* both their sums. In Maxwell's first form it was over the
//! sum of the two alone, so that a subtree could be shown at different sums to different wallets (Hu, Zhang and
//! Guo, *Breaking the Binding*, IACR ePrint 2018/1139; Chalkias, Chatzigiannis and Ji, *Broken Proofs of Solvency
//! in Blockchain Custodial Wallets and Exchanges*, FC 2022 workshops, LNCS 13412). Sums are not below zero and do
//! not overflow, for whoever builds and for whoever checks: a leaf below zero would hide what others are owed. A
//! leaf commits to whose it is, so that no two wallets can be shown the same one. There is no padding: a node
//! without a neighbour goes up as it is, and where that happens follows from how many leaves there are, which is
//! published; so a branch has one shape. Leaves and nodes are hashed apart (RFC 6962, section 2.1).

use sha2::{Digest as _, Sha256};

use crate::id::Wallet;
use crate::money::MicroUsdc;

pub type Hash = [u8; 32];
/// As many random bytes as nobody can guess.
pub type Salt = [u8; 16];

/// What is hashed before a leaf, before a node, and for a tree without leaves.
const LEAF: [u8; 1] = [0];
const NODE: [u8; 1] = [1];
const EMPTY: [u8; 1] = [2];

/// Nodes in a page.
pub const PAGE: usize = 256;
/// Levels from a page's nodes up to the one that they come to.
pub const PAGE_LEVELS: u32 = 8;

#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TreeError {
    #[error("an amount below zero")]
    Negative,
    #[error("a sum out of range")]
    OutOfRange,
}

/// What a wallet is owed.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Leaf {
    pub wallet: Wallet,
    pub balance: MicroUsdc,
    pub salt: Salt,
}

impl Leaf {
    /// SHA-256 of 0, the wallet's 20 bytes, its balance in 8 bytes (big-endian), and 16 bytes of salt.
    pub fn node(&self) -> Result<Node, TreeError> {
        let balance = amount(self.balance)?;
        let hash = Sha256::new_with_prefix(LEAF)
            .chain_update(self.wallet.0)
            .chain_update(balance)
            .chain_update(self.salt);
        Ok(Node { hash: hash.finalize().into(), sum: self.balance })
    }
}

/// A node of the tree: the root, should it be the only one.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Node {
    pub hash: Hash,
    pub sum: MicroUsdc,
}

impl Node {
    /// The root of a tree without leaves.
    pub fn empty() -> Self {
        Self { hash: Sha256::digest(EMPTY).into(), sum: MicroUsdc::ZERO }
    }

    /// SHA-256 of 1, and of the left child and then the right one its sum in 8 bytes (big-endian) and its hash.
    pub fn over(left: &Self, right: &Self) -> Result<Self, TreeError> {
        let sums = (amount(left.sum)?, amount(right.sum)?);
        let sum = left.sum.checked_add(right.sum).ok_or(TreeError::OutOfRange)?;
        let hash = Sha256::new_with_prefix(NODE)
            .chain_update(sums.0)
            .chain_update(left.hash)
            .chain_update(sums.1)
            .chain_update(right.hash);
        Ok(Self { hash: hash.finalize().into(), sum })
    }
}

/// An amount that is not below zero.
fn amount(micro: MicroUsdc) -> Result<[u8; 8], TreeError> {
    u64::try_from(micro.get()).map(u64::to_be_bytes).map_err(|_| TreeError::Negative)
}

/// The level above.
fn above(nodes: &[Node]) -> Result<Vec<Node>, TreeError> {
    nodes
        .chunks(2)
        .map(|pair| match pair {
            [left, right] => Node::over(left, right),
            _ => Ok(pair.first().copied().unwrap_or_else(Node::empty)),
        })
        .collect()
}

/// What the nodes of a page come to.
pub fn fold(nodes: &[Node]) -> Result<Node, TreeError> {
    let mut level = nodes.to_vec();
    while level.len() > 1 {
        level = above(&level)?;
    }
    Ok(level.first().copied().unwrap_or_else(Node::empty))
}

/// The neighbours that a page's node meets on its way up, lowest first.
pub fn siblings(nodes: &[Node], at: usize) -> Result<Vec<Node>, TreeError> {
    let (mut level, mut at, mut met) = (nodes.to_vec(), at, Vec::new());
    while level.len() > 1 {
        met.extend(level.get(at ^ 1));
        level = above(&level)?;
        at /= 2;
    }
    Ok(met)
}

/// The root that a leaf at a place among so many comes to by a branch of neighbours, lowest first. `None` where
/// there is no such place, or the branch has another shape.
pub fn root_of(leaf: Node, index: u64, leaves: u64, branch: &[Node]) -> Result<Option<Node>, TreeError> {
    if index >= leaves {
        return Ok(None);
    }
    let (mut node, mut index, mut width) = (leaf, index, leaves);
    let mut branch = branch.iter();
    while width > 1 {
        if index ^ 1 < width {
            let Some(sibling) = branch.next() else { return Ok(None) };
            let is_left = index % 2 == 0;
            node = if is_left { Node::over(&node, sibling)? } else { Node::over(sibling, &node)? };
        }
        index /= 2;
        width = width.div_ceil(2);
    }
    Ok(branch.next().is_none().then_some(node))
}

/// A page of nodes above the leaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// Of pages: this one's nodes are so many times [`PAGE_LEVELS`] above the leaves.
    pub level: usize,
    pub number: usize,
    pub nodes: Vec<Node>,
}

/// Builds what is above the leaves, with no more than a page of each level in memory.
#[derive(Default)]
pub struct Builder {
    levels: Vec<Level>,
    whole: Vec<Page>,
}

#[derive(Default)]
struct Level {
    pages: usize,
    nodes: Vec<Node>,
}

impl Builder {
    /// Adds what the next page of leaves comes to.
    pub fn push(&mut self, node: Node) -> Result<(), TreeError> {
        self.push_to(0, node)
    }

    fn push_to(&mut self, level: usize, node: Node) -> Result<(), TreeError> {
        if self.levels.len() <= level {
            self.levels.resize_with(level + 1, Level::default);
        }
        let Some(at) = self.levels.get_mut(level) else { return Ok(()) };
        at.nodes.push(node);
        if at.nodes.len() == PAGE { self.close_page(level) } else { Ok(()) }
    }

    fn close_page(&mut self, level: usize) -> Result<(), TreeError> {
        let Some(at) = self.levels.get_mut(level) else { return Ok(()) };
        let nodes = std::mem::take(&mut at.nodes);
        let root = fold(&nodes)?;
        self.whole.push(Page { level: level + 1, number: at.pages, nodes });
        at.pages += 1;
        self.push_to(level + 1, root)
    }

    /// The pages that have become whole since this was last asked.
    pub fn take_pages(&mut self) -> Vec<Page> {
        std::mem::take(&mut self.whole)
    }

    /// The root, and the pages that were not whole.
    pub fn finish(mut self) -> Result<(Node, Vec<Page>), TreeError> {
        let mut level = 0;
        while let Some(at) = self.levels.get(level) {
            // One node alone in its level is what all come to.
            if let ([root], 0) = (at.nodes.as_slice(), at.pages) {
                return Ok((*root, self.whole));
            }
            if !at.nodes.is_empty() {
                self.close_page(level)?;
            }
            level += 1;
        }
        Ok((Node::empty(), self.whole))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn leaf(number: u64) -> Leaf {
        let mut wallet = [0; 20];
        wallet[..8].copy_from_slice(&number.to_be_bytes());
        let mut salt = [7; 16];
        salt[..8].copy_from_slice(&number.to_le_bytes());
        let balance = MicroUsdc::new(i64::try_from(number * 31 % 1000).unwrap());
        Leaf { wallet: Wallet(wallet.into()), balance, salt }
    }

    fn nodes(count: u64) -> Vec<Node> {
        (0..count).map(|number| leaf(number).node().unwrap()).collect()
    }

    /// As the definition says it, whatever the pages do.
    fn plain_root(nodes: &[Node]) -> Node {
        fold(nodes).unwrap()
    }

    /// The root and all pages, as a publication makes them.
    fn build(nodes: &[Node]) -> (Node, Vec<Page>) {
        let mut builder = Builder::default();
        let mut pages = Vec::new();
        for page in nodes.chunks(PAGE) {
            builder.push(fold(page).unwrap()).unwrap();
            pages.extend(builder.take_pages());
        }
        let (root, rest) = builder.finish().unwrap();
        pages.extend(rest);
        (root, pages)
    }

    /// A leaf's branch, out of pages.
    fn branch(nodes: &[Node], pages: &[Page], index: usize) -> Vec<Node> {
        let page = nodes.chunks(PAGE).nth(index / PAGE).unwrap();
        let mut branch = siblings(page, index % PAGE).unwrap();
        let (mut at, mut width, mut level) = (index / PAGE, nodes.len().div_ceil(PAGE), 1);
        while width > 1 {
            let page = pages.iter().find(|page| (page.level, page.number) == (level, at / PAGE)).unwrap();
            branch.extend(siblings(&page.nodes, at % PAGE).unwrap());
            (at, width, level) = (at / PAGE, width.div_ceil(PAGE), level + 1);
        }
        branch
    }

    #[test]
    fn every_leaf_of_a_tree_of_any_size_leads_to_the_root() {
        for count in [0, 1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 511, 512, 513, 1000, 65_536, 65_537, 70_000] {
            let nodes = nodes(count);
            let (root, pages) = build(&nodes);
            assert_eq!(root, plain_root(&nodes), "{count}");
            let total: i64 = nodes.iter().map(|node| node.sum.get()).sum();
            assert_eq!(root.sum.get(), total);
            let step = if count > 1000 { 997 } else { 1 };
            for index in (0..nodes.len()).step_by(step).chain(nodes.len().checked_sub(1)) {
                let branch = branch(&nodes, &pages, index);
                let at = u64::try_from(index).unwrap();
                let found = root_of(nodes[index], at, count, &branch).unwrap();
                assert_eq!(found, Some(root), "{index} of {count}");
                assert!(branch.len() <= 17, "{count}");
            }
        }
    }

    #[test]
    fn a_branch_has_one_shape() {
        let nodes = nodes(11);
        let (root, pages) = build(&nodes);
        for index in 0..11 {
            let whole = branch(&nodes, &pages, index);
            let at = u64::try_from(index).unwrap();
            let root_at = |at, count, branch: &[Node]| root_of(nodes[index], at, count, branch).unwrap();
            // At another place, among another number, and with more or fewer neighbours.
            for other in (0..20).filter(|other| *other != at) {
                assert_ne!(root_at(other, 11, &whole), Some(root), "{index} at {other}");
            }
            for count in (0..40).filter(|count| *count != 11) {
                let shape = |count: u64| {
                    let (mut at, mut width, mut shape) = (at, count, Vec::new());
                    while width > 1 {
                        shape.extend((at ^ 1 < width).then_some(at % 2));
                        (at, width) = (at / 2, width.div_ceil(2));
                    }
                    shape
                };
                // Where a tree of another size has this very branch, only the count that is signed tells them apart.
                if at >= count || shape(count) != shape(11) {
                    assert_ne!(root_at(at, count, &whole), Some(root), "{index} of {count}");
                }
            }
            assert_eq!(root_at(at, 11, &whole[1..]), None);
            assert_eq!(root_at(at, 11, &[whole.as_slice(), &whole[..1]].concat()), None);
        }
        // A leaf that stands twice at the end is another tree (CVE-2012-2459).
        let doubled = [nodes.as_slice(), &nodes[10..]].concat();
        assert_ne!(plain_root(&doubled), root);
    }

    #[test]
    fn amounts_below_zero_and_sums_beyond_the_range_are_refused() {
        let with = |micro| Leaf { balance: MicroUsdc::new(micro), ..leaf(1) };
        assert_eq!(with(-1).node(), Err(TreeError::Negative));
        assert_eq!(with(i64::MIN).node(), Err(TreeError::Negative));
        let (most, one) = (with(i64::MAX).node().unwrap(), with(1).node().unwrap());
        assert_eq!(Node::over(&most, &one), Err(TreeError::OutOfRange));
        assert_eq!(Node::over(&one, &most), Err(TreeError::OutOfRange));
        assert_eq!(fold(&[one, one, most]), Err(TreeError::OutOfRange));
        let below = Node { sum: MicroUsdc::new(-5), ..one };
        assert_eq!(Node::over(&below, &most), Err(TreeError::Negative), "whatever the two come to");
        assert_eq!(Node::over(&most, &below), Err(TreeError::Negative));
        assert_eq!(root_of(one, 0, 2, &[below]), Err(TreeError::Negative));
        let mut builder = Builder::default();
        for _ in 1..PAGE {
            builder.push(most).unwrap();
        }
        assert_eq!(builder.push(one), Err(TreeError::OutOfRange));
    }

    /// What was wrong with the first form: of two children only the sum of their sums counted.
    #[test]
    fn a_node_commits_to_each_of_its_childrens_sums() {
        let (a, b) = (leaf(1).node().unwrap(), leaf(2).node().unwrap());
        let node = Node::over(&a, &b).unwrap();
        let one = |n: &Node, by| Node { sum: MicroUsdc::new(n.sum.get() + by), ..*n };
        assert_ne!(Node::over(&one(&a, 1), &one(&b, -1)).unwrap().hash, node.hash);
        assert_ne!(Node::over(&b, &a).unwrap().hash, node.hash);
        assert_ne!(Node::over(&a, &a).unwrap().hash, node.hash);
        // A leaf is no node, nor is nothing.
        assert_ne!(Node::empty().hash, Node::over(&Node::empty(), &Node::empty()).unwrap().hash);
    }

    #[test]
    fn a_leaf_commits_to_wallet_balance_and_salt() {
        let known = leaf(1);
        let other_wallet = Leaf { wallet: Wallet([9; 20].into()), ..known };
        let other_balance = Leaf { balance: MicroUsdc::new(32), ..known };
        let other_salt = Leaf { salt: [9; 16], ..known };
        for other in [other_wallet, other_balance, other_salt] {
            assert_ne!(other.node().unwrap().hash, known.node().unwrap().hash, "{other:?}");
        }
        // SHA-256 by another program, of 00, twenty bytes 01, 0000000000000005, sixteen bytes 02.
        let leaf = Leaf { wallet: Wallet([1; 20].into()), balance: MicroUsdc::new(5), salt: [2; 16] };
        assert_eq!(
            hex::encode(leaf.node().unwrap().hash),
            "167e84d12abb4052a88632398215501169b3aa1850fb630a02220c27967225c3"
        );
        let node = Node::over(&leaf.node().unwrap(), &leaf.node().unwrap()).unwrap();
        assert_eq!(
            hex::encode(node.hash),
            "23dc7c1122cf71fac035cd49e88860faddc4a33e60df6e700baeab859ffd7e3d"
        );
        assert_eq!(
            hex::encode(Node::empty().hash),
            "dbc1b4c900ffe48d575b5da5c638040125f65db0fe3e24494b76ea986457d986"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Pages are a way to keep the tree, and no other tree.
        #[test]
        fn pages_come_to_what_the_definition_says(count in 0u64..1500) {
            let nodes = nodes(count);
            prop_assert_eq!(build(&nodes).0, plain_root(&nodes));
        }
    }
}
