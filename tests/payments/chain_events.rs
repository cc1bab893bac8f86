//! What the chain does to a payment under way: late, dropped, emptied, cancelled.

use crate::payments::bench::*;

#[tokio::test]
async fn a_payment_not_mined_is_pending_and_the_same_later() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let pending = node.until(&payer, State::Broadcast).await;
        assert_eq!(pending.state.status(), "pending");
        assert_eq!(node.balance_of(&payer).await, 0);
        bench.chain.mine(1).await;
        let credited = node.pay(&payload).await;
        assert_eq!((credited.id, credited.tx_hash), (pending.id, pending.tx_hash));
        assert_eq!(credited.state, State::Credited);
        assert_eq!(bench.sent_by_relayer().await, "0x1");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_transaction_that_a_node_forgot_is_sent_again_byte_for_byte() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let sent = node.until(&payer, State::Broadcast).await;
        bench.chain.rpc("anvil_dropTransaction", json!([sent.tx_hash])).await;
        bench.chain.set_automine(true).await;
        let payment = node.pay(&payload).await;
        assert_eq!((payment.state, payment.tx_hash), (State::Credited, sent.tx_hash));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn as_many_confirmations_are_waited_for_as_configured() {
    each(async |bench| {
        let node = bench.node_with(|config| config.confirmations = 3).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        for _ in 0..2 {
            node.pay_and_leave(&payload).await;
            let sent = node.until(&payer, State::Mined).await;
            eventually("it is mined", async || {
                let receipt = bench.chain.rpc("eth_getTransactionReceipt", json!([sent.tx_hash])).await;
                (!receipt.is_null()).then_some(())
            })
            .await;
            assert_eq!(node.balance_of(&payer).await, 0);
            bench.chain.mine(1).await;
        }
        let payment = node.pay(&payload).await;
        assert_eq!(payment.state, State::Credited);
        let mined = u64::try_from(payment.block_number.unwrap()).unwrap();
        assert_eq!(bench.chain.head().await, mined + 2, "the block it is mined in is the first");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_credit_becomes_final_with_its_block() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let credited = node.pay(&payload(&bench.authorization(&payer))).await;
        assert_eq!(credited.state, State::Credited);
        // With one slot an epoch, a block is final after two more.
        bench.chain.mine(3).await;
        node.run();
        let finalized = node.until(&payer, State::Finalized).await;
        assert_eq!((finalized.id, finalized.tx_hash), (credited.id, credited.tx_hash));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
        node.crash().await;
    })
    .await;
}

#[tokio::test]
async fn a_payer_who_empties_the_wallet_in_time_is_not_credited() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let payload = payload(&authorization);
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let ours = node.until(&payer, State::Broadcast).await.tx_hash.unwrap();
        bench.chain.rpc("anvil_impersonateAccount", json!([payer.address()])).await;
        bench.chain.give_gas(payer.address()).await;
        let away = call(&transferCall { to: STRANGER, value: U256::from(FIVE_USD) });
        bench.send_dearly(payer.address(), away).await;
        bench.chain.mine(1).await;
        let receipt = bench.chain.rpc("eth_getTransactionReceipt", json!([ours])).await;
        assert_eq!(receipt["status"], "0x0", "there was nothing left to transfer");
        bench.chain.set_automine(true).await;

        // Until its time is over it may still go through, so it has not failed.
        node.pay_and_leave(&payload).await;
        assert_eq!(node.payment_of(&payer).await.unwrap().state.status(), "pending");
        bench.warp(1200).await;
        let ended = node.pay(&payload).await;
        assert_eq!((ended.state, ended.state.status()), (State::Expired, "failed"));
        assert_eq!(node.balance_of(&payer).await, 0);
        assert_eq!(bench.sent_by_relayer().await, "0x1", "our gas is spent on it once");

        // The next payer is served as ever.
        let next = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&self::payload(&valid_after_warp(bench, &next))).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn an_authorization_cancelled_in_time_is_not_credited() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let payload = payload(&authorization);
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        node.until(&payer, State::Broadcast).await;
        bench.send_dearly(BYSTANDER, cancel(&payer, authorization.nonce)).await;
        bench.chain.mine(1).await;
        bench.chain.set_automine(true).await;
        bench.warp(1200).await;
        let ended = node.pay(&payload).await;
        assert_eq!((ended.state, ended.state.status()), (State::Cancelled, "failed"));
        assert_eq!(node.balance_of(&payer).await, 0);
        bench.assert_reconciled(&node).await;
    })
    .await;
}
