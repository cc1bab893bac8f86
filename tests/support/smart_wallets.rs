//! Wallets that are contracts, made of the bytecode that is on Base: see `tests/clients/devchain.mjs`.

use alloy::eips::eip7702::Authorization as Delegation;
use alloy::primitives::{Address, B256, Bytes, Signature, U256, address, hex, keccak256};
use alloy::sol_types::{SolCall as _, SolStruct as _, SolValue as _, eip712_domain};
use serde_json::json;

use super::chain::{BYSTANDER, CHAIN_ID, TestChain};
use super::wallet::TestWallet;

/// Makes Safes.
pub const SAFE_FACTORY: Address = address!("4e1DCf7AD4e460CfD30791CCC4F9c8a4f820ec67");
/// The code that all Safes share.
pub const SAFE: Address = address!("41675C099F32341bf84BFc5382aF534df5C7461a");
const SAFE_FALLBACK_HANDLER: Address = address!("fd0732Dc9E303f09fCEf3a7388Ad10A83459Ec99");
/// Code for accounts that keep their key: it takes that key's signatures.
pub const SIMPLE_7702_ACCOUNT: Address = address!("e6Cae83BdE06E4c305530e199D7217f42808555B");
/// What a signature ends with that brings its wallet's deployment along (ERC-6492).
const WRAPPED: [u8; 32] = hex!("6492649264926492649264926492649264926492649264926492649264926492");

alloy::sol! {
    function proxyCreationCode() external pure returns (bytes);
    function createProxyWithNonce(address singleton, bytes initializer, uint256 salt_nonce) external returns (address);
    function setup(
        address[] owners, uint256 threshold, address to, bytes data,
        address fallback_handler, address payment_token, uint256 payment, address payment_receiver
    ) external;

    struct SafeMessage {
        bytes message;
    }
}

/// A Safe of one owner, which may or may not be deployed.
pub struct Safe {
    pub address: Address,
    pub factory: Address,
    owner: TestWallet,
    creation: Bytes,
}

impl Safe {
    /// Not deployed yet.
    pub async fn planned(chain: &TestChain) -> Self {
        Self::by_factory(chain, SAFE_FACTORY, Address::ZERO).await
    }

    pub async fn deployed(chain: &TestChain) -> Self {
        let safe = Self::planned(chain).await;
        safe.deploy(chain).await;
        safe
    }

    /// To be made by a factory at some address, and to run the code at `module` when it is set up.
    pub async fn by_factory(chain: &TestChain, factory: Address, module: Address) -> Self {
        let owner = TestWallet::random();
        let initializer = initializer(owner.address(), module);
        let call = json!([{"to": SAFE_FACTORY, "data": Bytes::from(proxyCreationCodeCall {}.abi_encode())}, "latest"]);
        let code: Bytes = chain.rpc("eth_call", call).await.as_str().unwrap().parse().unwrap();
        let code = proxyCreationCodeCall::abi_decode_returns(&code).unwrap();
        let salt = keccak256((keccak256(&initializer), U256::ZERO).abi_encode());
        let address = factory.create2_from_code(salt, [code.as_ref(), SAFE.into_word().as_slice()].concat());
        let creation =
            createProxyWithNonceCall { singleton: SAFE, initializer, salt_nonce: U256::ZERO }.abi_encode();
        Self { address, factory, owner, creation: creation.into() }
    }

    /// An account that has delegated to a Safe's code and made somebody else its owner.
    pub async fn of_account(chain: &TestChain, account: &TestWallet) -> Self {
        let owner = TestWallet::random();
        delegate(chain, account, SAFE).await;
        let initializer = initializer(owner.address(), Address::ZERO);
        chain.send(BYSTANDER, account.address(), &initializer.to_string()).await;
        Self { address: account.address(), factory: SAFE_FACTORY, owner, creation: Bytes::new() }
    }

    pub async fn deploy(&self, chain: &TestChain) {
        chain.send(BYSTANDER, self.factory, &self.creation.to_string()).await;
        assert!(self.is_deployed(chain).await, "{} came out somewhere else", self.address);
    }

    pub async fn is_deployed(&self, chain: &TestChain) -> bool {
        !chain.code_of(self.address).await.is_empty()
    }

    /// The owner's signature, as the Safe takes it for its own.
    pub fn sign(&self, hash: B256) -> Vec<u8> {
        self.sign_by(&self.owner, hash)
    }

    /// The same by anybody.
    pub fn sign_by(&self, signer: &TestWallet, hash: B256) -> Vec<u8> {
        let domain = eip712_domain! { chain_id: CHAIN_ID, verifying_contract: self.address, };
        let message = SafeMessage { message: hash.abi_encode().into() };
        signer.sign_hash(message.eip712_signing_hash(&domain))
    }

    /// What the owner signs for itself is no word of the Safe's.
    pub fn sign_for_itself(&self, hash: B256) -> Vec<u8> {
        self.owner.sign_hash(hash)
    }

    /// The call of the factory that makes this Safe.
    pub fn creation(&self) -> String {
        self.creation.to_string()
    }

    /// A signature with this Safe's deployment around it (ERC-6492).
    pub fn wrap(&self, signature: Vec<u8>) -> Vec<u8> {
        let deployment = (self.factory, self.creation.clone(), Bytes::from(signature)).abi_encode_params();
        [deployment.as_slice(), &WRAPPED].concat()
    }
}

fn initializer(owner: Address, module: Address) -> Bytes {
    let setup = setupCall {
        owners: vec![owner],
        threshold: U256::from(1),
        to: module,
        data: Bytes::new(),
        fallback_handler: SAFE_FALLBACK_HANDLER,
        payment_token: Address::ZERO,
        payment: U256::ZERO,
        payment_receiver: Address::ZERO,
    };
    setup.abi_encode().into()
}

/// Gives a fresh account the code at `to` (EIP-7702): its key signs, somebody else sends.
pub async fn delegate(chain: &TestChain, account: &TestWallet, to: Address) {
    let delegation = Delegation { chain_id: U256::from(CHAIN_ID), address: to, nonce: 0 };
    let signature = Signature::from_raw(&account.sign_hash(delegation.signature_hash())).unwrap();
    let signed = delegation.into_signed(signature);
    chain
        .send_transaction(json!({
            "from": BYSTANDER, "to": account.address(), "gas": "0x100000", "type": "0x4",
            "authorizationList": [signed],
        }))
        .await;
    let marked = [hex!("ef0100").as_slice(), to.as_slice()].concat();
    assert_eq!(chain.code_of(account.address()).await, marked, "the account has not delegated to {to}");
}
