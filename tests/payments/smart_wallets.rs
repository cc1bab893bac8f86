//! Payers and sign-ins whose wallet is a contract: its code decides, be it there or still to be deployed.

use crate::payments::bench::*;
use crate::support::gateway::{Answer, Gateway, Setup};
use crate::support::smart_wallets::{SAFE_FACTORY, SIMPLE_7702_ACCOUNT, Safe, delegate};

/// Runs until its gas is gone.
const ENDLESS: &str = "0x5b5f56";
/// Ends in the way of no contract that works, with all its gas.
const INVALID: &str = "0xfe";
/// Answers EIP-1271's yes, in 400,000 bytes.
const LENGTHY: &str = "0x7f1626ba7e000000000000000000000000000000000000000000000000000000005f5262061a805ff3";
/// The same in 16 million, for which no gas would suffice.
const ENORMOUS: &str = "0x7f1626ba7e000000000000000000000000000000000000000000000000000000005f5262ffffff5ff3";

/// A wallet's payment of five dollars, to be signed.
fn authorization_of(bench: &Bench, address: Address) -> Authorization {
    let mut authorization = bench.authorization(&TestWallet::random());
    authorization.from = address;
    authorization
}

/// What a Safe pays with: five dollars, by its owner.
fn paid_by(bench: &Bench, safe: &Safe) -> Payload {
    let authorization = authorization_of(bench, safe.address);
    signed_payload(&authorization, &safe.sign(authorization.hash()))
}

/// The same with the Safe's deployment.
fn paid_with_deployment_by(bench: &Bench, safe: &Safe) -> Payload {
    let authorization = authorization_of(bench, safe.address);
    signed_payload(&authorization, &safe.wrap(safe.sign(authorization.hash())))
}

async fn each_with_factory(test: impl AsyncFn(&Bench, &Node)) {
    each(async |bench| {
        let node = bench.node_with(|config| config.erc6492_factories = vec![Wallet(SAFE_FACTORY)]).await;
        test(bench, &node).await;
        bench.assert_reconciled(&node).await;
    })
    .await;
}

// --- Deployed: EIP-1271 ---

#[tokio::test]
async fn a_safe_pays_by_its_owners_signature() {
    each(async |bench| {
        let node = bench.node().await;
        let safe = Safe::deployed(&bench.chain).await;
        bench.chain.mint(safe.address, FIVE_USD).await;
        let authorization = authorization_of(bench, safe.address);

        // A stranger's, and the owner's own over what only the Safe may sign for.
        let by_stranger = safe.sign_by(&TestWallet::random(), authorization.hash());
        let bare = safe.sign_for_itself(authorization.hash());
        for signature in [by_stranger, bare, vec![], vec![0x12; 100]] {
            let refused = signed_payload(&authorization, &signature);
            assert_eq!(node.refusal(&refused).await.0, Reason::InvalidSignature, "{signature:02x?}");
        }
        bench.assert_untouched().await;

        let good = signed_payload(&authorization, &safe.sign(authorization.hash()));
        assert_eq!(node.pay(&good).await.state, State::Credited);
        assert_eq!(node.balance_at(safe.address).await, 5_000_000);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn what_the_token_refuses_a_safe_is_not_blamed_on_its_signature() {
    each(async |bench| {
        let node = bench.node().await;
        let safe = Safe::deployed(&bench.chain).await;
        assert_eq!(node.refusal(&paid_by(bench, &safe)).await.0, Reason::InsufficientBalance);

        // Who is asked first decides: the wallet, as in the token.
        let authorization = authorization_of(bench, safe.address);
        let by_stranger = safe.sign_by(&TestWallet::random(), authorization.hash());
        let refused = signed_payload(&authorization, &by_stranger);
        assert_eq!(node.refusal(&refused).await.0, Reason::InvalidSignature);

        bench.chain.mint(safe.address, FIVE_USD).await;
        bench.chain.send(BLACKLISTER, USDC, &call(&blacklistCall { account: safe.address })).await;
        let (reason, sentence) = node.refusal(&paid_by(bench, &safe)).await;
        assert_eq!(reason, Reason::SimulationFailed);
        assert!(sentence.contains("blacklisted"), "{sentence}");
        bench.assert_untouched().await;
    })
    .await;
}

// --- Delegated: EIP-7702 ---

#[tokio::test]
async fn of_an_account_with_delegated_code_the_code_decides() {
    each(async |bench| {
        let node = bench.node().await;
        // Made its Safe's owner, somebody else signs for the account, and its own good key is worth nothing.
        let account = bench.payer(FIVE_USD).await;
        let safe = Safe::of_account(&bench.chain, &account).await;
        let by_its_key = payload(&bench.authorization(&account));
        assert_eq!(node.refusal(&by_its_key).await.0, Reason::InvalidSignature);
        bench.assert_untouched().await;
        assert_eq!(node.pay(&paid_by(bench, &safe)).await.state, State::Credited);
        assert_eq!(node.balance_of(&account).await, 5_000_000);

        // This code takes the key's signatures.
        let account = bench.payer(FIVE_USD).await;
        delegate(&bench.chain, &account, SIMPLE_7702_ACCOUNT).await;
        let mut by_another = bench.authorization(&TestWallet::random());
        by_another.from = account.address();
        assert_eq!(node.refusal(&payload(&by_another)).await.0, Reason::InvalidSignature);
        assert_eq!(node.pay(&payload(&bench.authorization(&account))).await.state, State::Credited);
        assert_eq!(node.balance_of(&account).await, 5_000_000);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

// --- Not deployed yet: ERC-6492 ---

#[tokio::test]
async fn a_safe_is_deployed_by_its_first_payment() {
    each_with_factory(async |bench, node| {
        let safe = Safe::planned(&bench.chain).await;
        bench.chain.mint(safe.address, 3 * FIVE_USD).await;
        let first = node.pay(&paid_with_deployment_by(bench, &safe)).await;
        assert_eq!(first.state, State::Credited);
        assert!(safe.is_deployed(&bench.chain).await);
        assert_eq!(bench.sent_by_relayer().await, "0x1", "deployed and paid in one transaction");

        // What brings its deployment along again is not harmed by that.
        assert_eq!(node.pay(&paid_with_deployment_by(bench, &safe)).await.state, State::Credited);
        assert_eq!(node.pay(&paid_by(bench, &safe)).await.state, State::Credited);
        assert_eq!(bench.sent_by_relayer().await, "0x3");
        assert_eq!(node.balance_at(safe.address).await, 15_000_000);
    })
    .await;
}

#[tokio::test]
async fn a_safe_deployed_by_somebody_else_meanwhile_still_pays() {
    each_with_factory(async |bench, node| {
        let safe = Safe::planned(&bench.chain).await;
        bench.chain.mint(safe.address, FIVE_USD).await;
        bench.chain.set_automine(false).await;
        let payment = paid_with_deployment_by(bench, &safe);
        node.pay_and_leave(&payment).await;
        bench.send_dearly_to(BYSTANDER, safe.factory, safe.creation()).await;
        bench.chain.mine(1).await;
        bench.chain.set_automine(true).await;
        eventually("the payment is sent again, without the deployment", async || {
            Some(node.pay(&payment).await).filter(|payment| payment.state == State::Credited)
        })
        .await;
        assert_eq!(bench.sent_by_relayer().await, "0x2");
        assert_eq!(node.balance_at(safe.address).await, 5_000_000);
    })
    .await;
}

#[tokio::test]
async fn a_deployment_is_no_signature() {
    each_with_factory(async |bench, node| {
        let safe = Safe::planned(&bench.chain).await;
        bench.chain.mint(safe.address, FIVE_USD).await;
        let authorization = authorization_of(bench, safe.address);
        let by_stranger = safe.sign_by(&TestWallet::random(), authorization.hash());
        for signature in [by_stranger, vec![]] {
            let refused = signed_payload(&authorization, &safe.wrap(signature));
            assert_eq!(node.refusal(&refused).await.0, Reason::InvalidSignature);
        }
        // Another Safe's deployment makes another wallet.
        let other = Safe::planned(&bench.chain).await;
        let refused = signed_payload(&authorization, &other.wrap(safe.sign(authorization.hash())));
        assert_eq!(node.refusal(&refused).await.0, Reason::InvalidSignature);
        // Without its deployment it is no wallet at all.
        assert_eq!(node.refusal(&paid_by(bench, &safe)).await.0, Reason::InvalidSignature);
        bench.assert_untouched().await;
        assert!(!safe.is_deployed(&bench.chain).await);
    })
    .await;
}

#[tokio::test]
async fn a_factory_that_is_not_allowed_is_not_called() {
    each_with_factory(async |bench, node| {
        // The same factory, where nobody has allowed it.
        let foreign = TestWallet::random().address();
        let code = bench.chain.code_of(SAFE_FACTORY).await;
        bench.chain.rpc("anvil_setCode", json!([foreign, code])).await;
        let safe = Safe::by_factory(&bench.chain, foreign, Address::ZERO).await;
        bench.chain.mint(safe.address, FIVE_USD).await;
        let payment = paid_with_deployment_by(bench, &safe);
        let (reason, sentence) = node.refusal(&payment).await;
        assert_eq!(reason, Reason::UnparseableSignature);
        assert!(sentence.contains(&format!("factory {foreign}")), "{sentence}");
        bench.assert_untouched().await;
        assert!(!safe.is_deployed(&bench.chain).await);

        // Once the wallet is there, nothing of the factory's is needed.
        safe.deploy(&bench.chain).await;
        assert_eq!(node.pay(&payment).await.state, State::Credited);
        assert_eq!(node.balance_at(safe.address).await, 5_000_000);
    })
    .await;
}

// --- Bounds ---

#[tokio::test]
async fn a_wallet_that_wastes_gas_or_answers_at_length_is_refused() {
    each_with_factory(async |bench, node| {
        for code in [ENDLESS, INVALID, LENGTHY, ENORMOUS] {
            let payer = bench.payer(FIVE_USD).await;
            bench.chain.rpc("anvil_setCode", json!([payer.address(), code])).await;
            let authorization = bench.authorization(&payer);
            for signature in [vec![0x12; 100], authorization.signature()] {
                let refused = signed_payload(&authorization, &signature);
                assert_eq!(node.refusal(&refused).await.0, Reason::InvalidSignature, "{code}");
            }
        }
        // One that wastes it while it is being deployed, by a factory that is allowed.
        let waster = TestWallet::random().address();
        bench.chain.rpc("anvil_setCode", json!([waster, ENDLESS])).await;
        let safe = Safe::by_factory(&bench.chain, SAFE_FACTORY, waster).await;
        bench.chain.mint(safe.address, FIVE_USD).await;
        let refused = paid_with_deployment_by(bench, &safe);
        assert_eq!(node.refusal(&refused).await.0, Reason::InvalidSignature);
        bench.assert_untouched().await;
    })
    .await;
}

// --- Signing in ---

async fn gateway() -> Gateway {
    let payments = format!("erc6492_factories = [\"{SAFE_FACTORY}\"]");
    Gateway::start_with(Setup { payments, ..Setup::usual() }).await
}

/// Asks for an API key with a message of an address, signed by whatever means.
async fn sign_in(gateway: &Gateway, address: Address, sign: impl FnOnce(B256) -> Vec<u8>) -> Answer {
    let mut message = TestWallet::random().siwe(&gateway.host);
    message.address = address.to_string();
    gateway.post("/v1/auth/keys").json(&message.sign_with(sign).body()).send().await
}

#[tokio::test]
async fn a_safe_signs_in_by_its_owner() {
    let gateway = gateway().await;
    let safe = Safe::deployed(gateway.chain()).await;
    let stranger = TestWallet::random();
    sign_in(&gateway, safe.address, |hash| safe.sign(hash)).await.expect(201);
    sign_in(&gateway, safe.address, |hash| safe.wrap(safe.sign(hash))).await.expect(201);
    let refused = sign_in(&gateway, safe.address, |hash| safe.sign_by(&stranger, hash)).await;
    refused.error(401, "siwe_wrong_signature");
    let bare = sign_in(&gateway, safe.address, |hash| safe.sign_for_itself(hash)).await;
    bare.error(401, "siwe_wrong_signature");

    // The key is the Safe's: it may read what is the Safe's.
    let mut message = stranger.siwe(&gateway.host);
    message.address = safe.address.to_string();
    let query = message.sign_with(|hash| safe.sign(hash)).query();
    let keys = gateway.get(&format!("/v1/auth/keys{query}")).send().await.expect(200).json();
    assert_eq!(keys["data"].as_array().map(Vec::len), Some(2), "{keys}");
}

#[tokio::test]
async fn a_safe_signs_in_before_it_is_deployed() {
    let gateway = gateway().await;
    let chain = gateway.chain();
    let safe = Safe::planned(chain).await;
    let stranger = TestWallet::random();
    sign_in(&gateway, safe.address, |hash| safe.wrap(safe.sign(hash))).await.expect(201);
    for refused in [
        sign_in(&gateway, safe.address, |hash| safe.wrap(safe.sign_by(&stranger, hash))).await,
        sign_in(&gateway, stranger.address(), |hash| safe.wrap(safe.sign(hash))).await,
        sign_in(&gateway, safe.address, |hash| safe.sign(hash)).await,
    ] {
        refused.error(401, "siwe_wrong_signature");
    }
    assert!(!safe.is_deployed(chain).await, "nobody has paid for that");

    let foreign = TestWallet::random().address();
    chain.rpc("anvil_setCode", json!([foreign, chain.code_of(SAFE_FACTORY).await])).await;
    let safe = Safe::by_factory(chain, foreign, Address::ZERO).await;
    let refused = sign_in(&gateway, safe.address, |hash| safe.wrap(safe.sign(hash))).await;
    refused.error(401, "siwe_wrong_signature");
    // Deployed by whomever, it is asked.
    safe.deploy(chain).await;
    sign_in(&gateway, safe.address, |hash| safe.wrap(safe.sign(hash))).await.expect(201);
}

#[tokio::test]
async fn an_account_with_delegated_code_signs_in_by_its_key_or_its_code() {
    let gateway = gateway().await;
    let stranger = TestWallet::random();
    let account = TestWallet::random();
    delegate(gateway.chain(), &account, SIMPLE_7702_ACCOUNT).await;
    sign_in(&gateway, account.address(), |hash| account.sign_hash(hash)).await.expect(201);
    let refused = sign_in(&gateway, account.address(), |hash| stranger.sign_hash(hash)).await;
    refused.error(401, "siwe_wrong_signature");

    // Its key still is the account's, whatever its code says of it.
    let account = TestWallet::random();
    let safe = Safe::of_account(gateway.chain(), &account).await;
    sign_in(&gateway, account.address(), |hash| account.sign_hash(hash)).await.expect(201);
    sign_in(&gateway, account.address(), |hash| safe.sign(hash)).await.expect(201);
    let refused = sign_in(&gateway, account.address(), |hash| safe.sign_by(&stranger, hash)).await;
    refused.error(401, "siwe_wrong_signature");
}

#[tokio::test]
async fn a_wallet_that_wastes_gas_or_answers_at_length_does_not_sign_in() {
    let gateway = gateway().await;
    let chain = gateway.chain();
    for code in [ENDLESS, INVALID, LENGTHY, ENORMOUS] {
        let wallet = TestWallet::random().address();
        chain.rpc("anvil_setCode", json!([wallet, code])).await;
        for length in [65, 100] {
            let refused = sign_in(&gateway, wallet, |_| vec![0x12; length]).await;
            refused.error(401, "siwe_wrong_signature");
        }
    }
    let waster = TestWallet::random().address();
    chain.rpc("anvil_setCode", json!([waster, ENDLESS])).await;
    let safe = Safe::by_factory(chain, SAFE_FACTORY, waster).await;
    let refused = sign_in(&gateway, safe.address, |hash| safe.wrap(safe.sign(hash))).await;
    refused.error(401, "siwe_wrong_signature");
}
