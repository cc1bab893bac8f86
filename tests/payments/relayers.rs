//! The relayers: account nonces without gaps, fees that rise to a cap, keys that change.

use crate::payments::bench::*;

const GWEI: u64 = 1_000_000_000;
/// Longer than a transaction may be stuck.
const STUCK: i64 = 30;

/// What the next blocks ask for a unit of gas.
async fn set_base_fee(bench: &Bench, wei: u64) {
    bench.chain.rpc("anvil_setNextBlockBaseFeePerGas", json!([format!("{wei:#x}")])).await;
    bench.chain.mine(1).await;
}

fn clock() -> Clock {
    Clock::fixed(Clock::System.now())
}

async fn signed_for(bench: &Bench) -> i64 {
    bench.books.number("SELECT COUNT(*) AS n FROM payment_transactions").await
}

#[tokio::test]
async fn a_stuck_transaction_is_replaced_at_a_higher_fee() {
    each(async |bench| {
        let clock = clock();
        let node = bench.node_at(clock.clone(), |config| config.max_fee_gwei = 100).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let first = node.until(&payer, State::Broadcast).await.tx_hash;
        set_base_fee(bench, 20 * GWEI).await;
        node.payments.upkeep().await.unwrap();
        assert_eq!(signed_for(bench).await, 1, "it is not stuck yet");

        clock.advance_seconds(STUCK);
        node.payments.upkeep().await.unwrap();
        let second = node.payment_of(&payer).await.unwrap().tx_hash;
        assert_ne!(first, second);
        bench.chain.mine(1).await;
        let payment = in_time("the payment", node.payments.pay(&payload, None)).await.unwrap();
        assert_eq!((payment.state, payment.tx_hash), (State::Credited, second));
        assert_eq!(bench.sent_by_relayer().await, "0x1", "both had the same account nonce");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn no_fee_is_offered_above_the_cap() {
    each(async |bench| {
        let clock = clock();
        let node = bench.node_at(clock.clone(), |config| config.max_fee_gwei = 5).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        node.until(&payer, State::Broadcast).await;
        set_base_fee(bench, 20 * GWEI).await;
        for _ in 0..3 {
            clock.advance_seconds(STUCK);
            node.payments.upkeep().await.unwrap();
            bench.chain.mine(1).await;
        }
        let offered = "SELECT MAX(CAST(max_fee_wei AS BIGINT)) AS n FROM payment_transactions";
        assert!(bench.books.number(offered).await <= 5 * i64::try_from(GWEI).unwrap());
        assert_eq!(node.payment_of(&payer).await.unwrap().state.status(), "pending");

        bench.chain.set_automine(true).await;
        set_base_fee(bench, GWEI).await;
        let payment = in_time("the payment", node.payments.pay(&payload, None)).await.unwrap();
        assert_eq!(payment.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_gap_before_an_account_nonce_is_filled() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        let clock = clock();
        let node =
            bench.node_at(clock.clone(), |config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        // The endpoint counts transactions that nobody has sent.
        rpc.break_methods(&[("eth_getTransactionCount", Fault::Lie(|_, _| json!("0x3")))]);
        node.pay_and_leave(&payload).await;
        node.until(&payer, State::Broadcast).await;
        rpc.mend();
        assert_eq!(bench.sent_by_relayer().await, "0x0");
        clock.advance_seconds(STUCK);
        node.payments.upkeep().await.unwrap();
        let payment = in_time("the payment", node.payments.pay(&payload, None)).await.unwrap();
        assert_eq!(payment.state, State::Credited);
        assert_eq!(bench.sent_by_relayer().await, "0x4", "three that do nothing, and the payment");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn several_relayers_take_turns_and_one_without_gas_is_left_out() {
    each(async |bench| {
        let second = TestWallet::random();
        bench.chain.give_gas(second.address()).await;
        let keys = format!("{},{}", bench.relayer.private_key(), second.private_key());
        let node = bench.node_with(|config| config.relayer_keys = keys.clone().into()).await;
        let sent = async |relayer: &TestWallet| {
            bench.chain.rpc("eth_getTransactionCount", json!([relayer.address(), "latest"])).await
        };
        for _ in 0..4 {
            let payer = bench.payer(FIVE_USD).await;
            assert_eq!(node.pay(&payload(&bench.authorization(&payer))).await.state, State::Credited);
        }
        assert_eq!((sent(&bench.relayer).await, sent(&second).await), (json!("0x2"), json!("0x2")));

        bench.chain.rpc("anvil_setBalance", json!([second.address(), "0x1"])).await;
        node.payments.upkeep().await.unwrap();
        let low: Vec<_> = node.payments.gas().into_iter().filter(|gas| gas.is_low).collect();
        assert_eq!(low.len(), 1);
        assert_eq!((low[0].relayer, low[0].wei), (Wallet(second.address()), U256::from(1)));
        for _ in 0..2 {
            let payer = bench.payer(FIVE_USD).await;
            assert_eq!(node.pay(&payload(&bench.authorization(&payer))).await.state, State::Credited);
        }
        assert_eq!((sent(&bench.relayer).await, sent(&second).await), (json!("0x4"), json!("0x2")));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_payment_whose_relayer_was_changed_is_sent_by_the_new_one() {
    each(async |bench| {
        let before = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        before.pay_and_leave(&payload).await;
        let lost = before.until(&payer, State::Broadcast).await;
        before.crash().await;
        bench.chain.rpc("anvil_dropTransaction", json!([lost.tx_hash])).await;
        // The old key is gone, and so is its gas: nothing of its can get through any more.
        bench.chain.rpc("anvil_setBalance", json!([bench.relayer.address(), "0x0"])).await;
        bench.chain.set_automine(true).await;

        let new = TestWallet::random();
        bench.chain.give_gas(new.address()).await;
        let after = bench.node_with(|config| config.relayer_keys = new.private_key().into()).await;
        let payment = in_time("the payment", after.payments.pay(&payload, None)).await.unwrap();
        assert_eq!((payment.id, payment.state), (lost.id, State::Credited));
        assert_eq!(bench.sent_by_relayer().await, "0x0");
        after.payments.upkeep().await.unwrap();
        bench.assert_reconciled(&after).await;
    })
    .await;
}

#[tokio::test]
async fn a_payer_who_lets_us_send_in_vain_is_refused_for_a_day() {
    each(async |bench| {
        let clock = clock();
        let node = bench.node_at(clock.clone(), |_| {}).await;
        let payer = bench.payer(FIVE_USD).await;
        bench.chain.rpc("anvil_impersonateAccount", json!([payer.address()])).await;
        bench.chain.give_gas(payer.address()).await;
        let move_to = |to| call(&transferCall { to, value: U256::from(FIVE_USD) });
        let authorization = || {
            let mut authorization = bench.authorization(&payer);
            authorization.valid_before = (clock.now().seconds() + 60).to_string();
            payload(&authorization)
        };
        for _ in 0..5 {
            let in_vain = authorization();
            bench.chain.set_automine(false).await;
            node.pay_and_leave(&in_vain).await;
            eventually("ours is sent", async || {
                let payments = node.payments.of_wallet(Wallet(payer.address()), None, 10).await.unwrap();
                (payments[0].state == State::Broadcast).then_some(())
            })
            .await;
            bench.send_dearly(payer.address(), move_to(STRANGER)).await;
            bench.chain.mine(1).await;
            bench.chain.set_automine(true).await;
            clock.advance_seconds(120);
            bench.warp(120).await;
            let ended = in_time("its end", node.payments.pay(&in_vain, None)).await.unwrap();
            assert_eq!(ended.state, State::Expired);
            node.payments.upkeep().await.unwrap();
            bench.chain.mint(payer.address(), FIVE_USD).await;
        }
        let result = node.payments.pay(&authorization(), None).await;
        assert!(matches!(result, Err(PaymentError::TooManyFailed)), "{result:?}");
        assert_eq!(bench.sent_by_relayer().await, "0x5");

        // Nobody else is, and tomorrow is another day.
        let neighbour = bench.payer(FIVE_USD).await;
        let mut theirs = bench.authorization(&neighbour);
        theirs.valid_before = (clock.now().seconds() + 60).to_string();
        assert_eq!(node.pay(&payload(&theirs)).await.state, State::Credited);
        clock.advance_seconds(86_400);
        bench.warp(86_400).await;
        let good = in_time("a day later", node.payments.pay(&authorization(), None)).await.unwrap();
        assert_eq!(good.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}
