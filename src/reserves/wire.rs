//! What is published, and a wallet's branch of it, as JSON; and how a branch is checked by nothing but itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::attest::{self, AttestError, Attestor, Kind, Refused, Signature};
use crate::id::Wallet;
use crate::money::MicroUsdc;
use crate::reserves::tree::{Hash, Leaf, Node, Salt, root_of};
use crate::reserves::{Proof, Publication};

/// What there is and what is owed, and who says so.
#[derive(Serialize, JsonSchema)]
pub struct ReservesBody {
    #[serde(flatten)]
    contents: ReservesContents,
    signature: Signature,
}

/// Amounts are micro-USDC.
#[derive(Serialize, Deserialize, JsonSchema)]
struct ReservesContents {
    object: String,
    /// Counts publications. Of one number there is one.
    number: i64,
    /// Of the Merkle sum tree of all wallets' balances: 32 bytes, hex.
    root: String,
    /// How many leaves it has.
    wallets: u64,
    /// What all wallets are owed: all balances, with what open requests hold of them.
    liabilities_usdc: i64,
    /// Of that, what was credited for transfers in later blocks, which are not in the reserves.
    credited_since_usdc: i64,
    /// Of that, what withdrawals in blocks up to that one have taken out of the reserves.
    #[serde(skip_serializing_if = "Option::is_none")]
    leaving_usdc: Option<i64>,
    /// Not of that any more: what withdrawals in later blocks have taken, which is still in the reserves.
    #[serde(skip_serializing_if = "Option::is_none")]
    left_since_usdc: Option<i64>,
    /// Nor of that: what is in the reserves and in nobody's balance yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    uncredited_usdc: Option<i64>,
    /// What the treasury held in that block.
    reserves_usdc: i64,
    /// CAIP-2.
    network: String,
    /// The token.
    asset: String,
    /// The treasury.
    pay_to: String,
    /// A final one.
    block_number: i64,
    block_hash: String,
    /// RFC 3339.
    block_time: String,
    /// RFC 3339: the instant that the balances are of.
    taken_at: String,
}

/// A wallet's leaf, and what leads from it to the root.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProofBody {
    object: String,
    wallet: String,
    /// Micro-USDC.
    balance_usdc: i64,
    /// 16 bytes, hex. It keeps others from finding out whose leaf this is.
    salt: String,
    /// The leaf's place among all, from 0.
    index: u64,
    /// The neighbours on the way to the root, lowest first.
    branch: Vec<NodeBody>,
    /// What was published, as `/v1/reserves` has it.
    #[schemars(with = "ReservesBody")]
    reserves: Box<RawValue>,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NodeBody {
    /// 32 bytes, hex.
    hash: String,
    /// What all leaves below it come to, micro-USDC.
    sum_usdc: i64,
}

const PROOF: &str = "reserves_proof";

pub fn publication_body(attestor: &Attestor, publication: &Publication) -> Result<ReservesBody, AttestError> {
    let in_motion = &publication.in_motion;
    let contents = ReservesContents {
        object: Kind::Reserves.object().to_owned(),
        number: publication.number,
        root: with_prefix(&publication.root),
        wallets: publication.wallets,
        liabilities_usdc: publication.liabilities.get(),
        credited_since_usdc: in_motion.credited_since.get(),
        leaving_usdc: in_motion.leaving.map(MicroUsdc::get),
        left_since_usdc: in_motion.left_since.map(MicroUsdc::get),
        uncredited_usdc: in_motion.uncredited.map(MicroUsdc::get),
        reserves_usdc: publication.reserves.get(),
        network: format!("eip155:{}", publication.chain_id),
        asset: publication.asset.to_string(),
        pay_to: publication.pay_to.to_string(),
        block_number: publication.block_number,
        block_hash: publication.block_hash.clone(),
        block_time: publication.block_time.rfc3339(),
        taken_at: publication.taken_at.rfc3339(),
    };
    let signature = attestor.sign(&text_of(&contents)?)?;
    Ok(ReservesBody { contents, signature })
}

pub fn proof_body(
    attestor: &Attestor,
    publication: &Publication,
    proof: &Proof,
) -> Result<ProofBody, AttestError> {
    let reserves = RawValue::from_string(text_of(&publication_body(attestor, publication)?)?);
    let node = |node: &Node| NodeBody { hash: with_prefix(&node.hash), sum_usdc: node.sum.get() };
    Ok(ProofBody {
        object: PROOF.to_owned(),
        wallet: proof.leaf.wallet.to_string(),
        balance_usdc: proof.leaf.balance.get(),
        salt: with_prefix(&proof.leaf.salt),
        index: proof.index,
        branch: proof.branch.iter().map(node).collect(),
        reserves: reserves.map_err(|e| AttestError::NotAStatement(e.to_string()))?,
    })
}

fn text_of(value: &impl Serialize) -> Result<String, AttestError> {
    serde_json::to_string(value).map_err(|e| AttestError::NotAStatement(e.to_string()))
}

fn with_prefix(bytes: &[u8]) -> String {
    format!("0x{}", hex::encode(bytes))
}

/// What a branch that leads to its root shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifiedProof {
    pub wallet: Wallet,
    pub balance: MicroUsdc,
    pub number: i64,
    pub root: String,
    pub wallets: u64,
    pub liabilities: MicroUsdc,
    pub reserves: MicroUsdc,
    pub pay_to: String,
    pub block_number: i64,
    /// Who signed what was published.
    pub signer: Wallet,
}

/// Why a branch shows nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProofRefused {
    #[error("it is not a proof of reserves: {0}")]
    Unreadable(String),
    #[error("what was published: {0}")]
    Reserves(#[from] Refused),
    #[error("the branch does not lead to the root that was published: something in it was changed")]
    AnotherRoot,
}

/// Whether a text is a wallet's branch, good or bad.
pub fn is_proof(text: &str) -> bool {
    #[derive(Deserialize)]
    struct Object {
        object: String,
    }
    serde_json::from_str::<Object>(text).is_ok_and(|read| read.object == PROOF)
}

/// Checks a wallet's branch, given as its JSON: that it is written as we write it, that what was published is
/// signed, and that leaf and branch come to its root and to its sum.
pub fn verify_proof(text: &str) -> Result<VerifiedProof, ProofRefused> {
    let unreadable = |why: String| ProofRefused::Unreadable(why);
    let compact = attest::without_whitespace(text);
    let proof: ProofBody = serde_json::from_str(&compact).map_err(|e| unreadable(e.to_string()))?;
    // One proof has one spelling.
    if proof.object != PROOF || serde_json::to_string(&proof).ok().as_deref() != Some(compact.as_str()) {
        return Err(unreadable("it is not written as a gateway writes it".into()));
    }
    let verified = attest::verify(proof.reserves.get())?;
    let published: ReservesContents =
        serde_json::from_str(&verified.contents).map_err(|e| unreadable(e.to_string()))?;
    let leaf = read_leaf(&proof).ok_or_else(|| unreadable("wallet, salt or balance".into()))?;
    let branch: Option<Vec<Node>> = proof.branch.iter().map(read_node).collect();
    let branch = branch.ok_or_else(|| unreadable("a node of the branch".into()))?;
    let node = leaf.node().map_err(|e| unreadable(e.to_string()))?;
    let root =
        root_of(node, proof.index, published.wallets, &branch).map_err(|e| unreadable(e.to_string()))?;
    let root = root.filter(|root| with_prefix(&root.hash) == published.root);
    let root = root.filter(|root| root.sum.get() == published.liabilities_usdc);
    root.ok_or(ProofRefused::AnotherRoot)?;
    Ok(VerifiedProof {
        wallet: leaf.wallet,
        balance: leaf.balance,
        number: published.number,
        root: published.root,
        wallets: published.wallets,
        liabilities: MicroUsdc::new(published.liabilities_usdc),
        reserves: MicroUsdc::new(published.reserves_usdc),
        pay_to: published.pay_to,
        block_number: published.block_number,
        signer: verified.signer,
    })
}

fn read_leaf(proof: &ProofBody) -> Option<Leaf> {
    let wallet: Wallet = proof.wallet.parse().ok()?;
    let salt: Salt = read_hex(&proof.salt)?;
    (wallet.to_string() == proof.wallet).then_some(Leaf {
        wallet,
        balance: MicroUsdc::new(proof.balance_usdc),
        salt,
    })
}

fn read_node(node: &NodeBody) -> Option<Node> {
    let hash: Hash = read_hex(&node.hash)?;
    Some(Node { hash, sum: MicroUsdc::new(node.sum_usdc) })
}

/// So many bytes, in lower case.
fn read_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let bytes: [u8; N] = hex::decode(text.strip_prefix("0x")?).ok()?.try_into().ok()?;
    (with_prefix(&bytes) == text).then_some(bytes)
}
