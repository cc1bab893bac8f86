//! What is refused before it costs anything, and with which code.

use crate::payments::bench::*;

#[tokio::test]
async fn every_spelling_of_a_good_signature_is_taken() {
    each(async |bench| {
        let node = bench.node().await;
        for (version, spell) in [(1, 0), (2, 27)] {
            let payer = bench.payer(FIVE_USD).await;
            let mut payload = payload(&bench.authorization(&payer));
            payload.version = version;
            *payload.signature.last_mut().unwrap() -= 27 - spell;
            assert_eq!(node.pay(&payload).await.state, State::Credited);
            assert_eq!(node.balance_of(&payer).await, 5_000_000);
        }
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_not_on_our_terms_is_refused_before_anything_is_asked_of_the_chain() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(10 * FIVE_USD).await;
        let good = payload(&bench.authorization(&payer));

        let version = Payload { version: 3, ..good.clone() };
        assert_eq!(node.refusal(&version).await.0, Reason::InvalidVersion);
        let scheme = Payload { scheme: "upto".into(), ..good.clone() };
        assert_eq!(node.refusal(&scheme).await.0, Reason::UnsupportedScheme);
        for network in ["base-sepolia", "eip155:1", ""] {
            let network = Payload { network: network.into(), ..good.clone() };
            assert_eq!(node.refusal(&network).await.0, Reason::InvalidNetwork);
        }
        let (reason, sentence) = node.refusal(&payload(&payer.authorization(STRANGER, FIVE_USD))).await;
        assert_eq!(reason, Reason::RecipientMismatch);
        assert!(sentence.contains(&bench.treasury.to_string()), "{sentence}");

        let other_amount = node.payments.pay(&good, Some(MicroUsdc::new(6_000_000))).await;
        assert!(matches!(other_amount, Err(PaymentError::Refused { reason: Reason::ValueMismatch, .. })));
        for value in [0, 999_999, 10_000_000_001] {
            let out_of_bounds = payload(&payer.authorization(bench.treasury, value));
            let result = node.payments.pay(&out_of_bounds, None).await;
            assert!(matches!(result, Err(PaymentError::OutOfBounds)), "{value}: {result:?}");
        }

        let mut early = bench.authorization(&payer);
        early.valid_after = (unix_seconds() + 60).to_string();
        assert_eq!(node.refusal(&payload(&early)).await.0, Reason::ValidAfter);
        for seconds in [-10, 3] {
            let mut late = bench.authorization(&payer);
            late.valid_before = (unix_seconds() + seconds).to_string();
            assert_eq!(node.refusal(&payload(&late)).await.0, Reason::ValidBefore);
        }
        assert_eq!(bench.books.number("SELECT COUNT(*) AS n FROM payments").await, 0);
        assert_eq!(bench.sent_by_relayer().await, "0x0");
    })
    .await;
}

#[tokio::test]
async fn a_bad_signature_is_refused() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let authorization = bench.authorization(&payer);
        let good = payload(&authorization);

        let mut other_domain = authorization.clone();
        other_domain.domain_version = "1".into();
        let (reason, sentence) = node.refusal(&payload(&other_domain)).await;
        assert_eq!(reason, Reason::InvalidSignature);
        assert!(sentence.contains("USD Coin") && sentence.contains("\"2\""), "{sentence}");

        let mut of_another = authorization.clone();
        of_another.from = bench.payer(FIVE_USD).await.address();
        assert_eq!(node.refusal(&payload(&of_another)).await.0, Reason::InvalidSignature);

        // The other half of the curve says the same thing, and the token refuses it.
        let order = U256::from_be_bytes(
            alloy::primitives::b256!("fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141").0,
        );
        let mut high_s = good.clone();
        let s = U256::from_be_slice(&good.signature[32..64]);
        high_s.signature[32..64].copy_from_slice(&(order - s).to_be_bytes::<32>());
        high_s.signature[64] = if good.signature[64] == 27 { 28 } else { 27 };
        assert_eq!(node.refusal(&high_s).await.0, Reason::InvalidSignature);

        for v in [2, 26, 29, 37, 255] {
            let mut odd = good.clone();
            odd.signature[64] = v;
            assert_eq!(node.refusal(&odd).await.0, Reason::InvalidSignature, "v {v}");
        }
        for length in [0, 64, 66] {
            let mut cut = good.clone();
            cut.signature.resize(length, 0);
            assert_eq!(node.refusal(&cut).await.0, Reason::UnparseableSignature, "{length} bytes");
        }
        assert_eq!(bench.books.number("SELECT COUNT(*) AS n FROM payments").await, 0);

        // None of it stands in the way of the good one.
        assert_eq!(node.pay(&good).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn what_the_token_would_refuse_is_refused_and_says_why() {
    each(async |bench| {
        let node = bench.node().await;
        let poor = bench.payer(FIVE_USD - 1).await;
        let (reason, sentence) = node.refusal(&payload(&bench.authorization(&poor))).await;
        assert_eq!(reason, Reason::InsufficientBalance);
        assert!(sentence.contains("4999999"), "{sentence}");

        // Its nonce went to another transfer.
        let spent = bench.payer(2 * FIVE_USD).await;
        let first = spent.authorization(STRANGER, 1_000_000);
        let mut second = bench.authorization(&spent);
        second.nonce = first.nonce;
        bench.front_run(&payload(&first)).await;
        assert_eq!(node.refusal(&payload(&second)).await.0, Reason::NonceAlreadyUsed);

        // Cancelling sets the same flag as using.
        let cancelling = bench.payer(FIVE_USD).await;
        let cancelled = bench.authorization(&cancelling);
        bench.chain.send(BYSTANDER, USDC, &cancel(&cancelling, cancelled.nonce)).await;
        assert_eq!(node.refusal(&payload(&cancelled)).await.0, Reason::NonceAlreadyUsed);

        let blacklisted = bench.payer(FIVE_USD).await;
        let blacklist = call(&blacklistCall { account: blacklisted.address() });
        bench.chain.send(BLACKLISTER, USDC, &blacklist).await;
        let (reason, sentence) = node.refusal(&payload(&bench.authorization(&blacklisted))).await;
        assert_eq!(reason, Reason::SimulationFailed);
        assert!(sentence.contains("blacklisted"), "{sentence}");

        let payer = bench.payer(FIVE_USD).await;
        bench.chain.send(PAUSER, USDC, &call(&pauseCall {})).await;
        let (reason, sentence) = node.refusal(&payload(&bench.authorization(&payer))).await;
        assert_eq!(reason, Reason::SimulationFailed);
        assert!(sentence.contains("paused"), "{sentence}");

        assert_eq!(bench.books.number("SELECT COUNT(*) AS n FROM payments").await, 0);
        assert_eq!(bench.sent_by_relayer().await, "0x0", "no gas was spent on any of it");
    })
    .await;
}

#[tokio::test]
async fn a_nonce_is_good_for_one_authorization() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(10 * FIVE_USD).await;
        let first = bench.authorization(&payer);
        let mut other = payer.authorization(bench.treasury, 2 * FIVE_USD);
        other.nonce = first.nonce;

        // While the first is under way …
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload(&first)).await;
        assert_eq!(node.refusal(&payload(&other)).await.0, Reason::NonceAlreadyUsed);
        // … and once it has arrived.
        bench.chain.set_automine(true).await;
        bench.chain.mine(1).await;
        assert_eq!(node.pay(&payload(&first)).await.state, State::Credited);
        assert_eq!(node.refusal(&payload(&other)).await.0, Reason::NonceAlreadyUsed);

        // Another's with the same nonce is another.
        let neighbour = bench.payer(FIVE_USD).await;
        let mut same_nonce = bench.authorization(&neighbour);
        same_nonce.nonce = first.nonce;
        assert_eq!(node.pay(&payload(&same_nonce)).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}
