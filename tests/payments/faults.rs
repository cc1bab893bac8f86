//! Crashes, outages and an empty relayer: they delay, and lose nothing.

use crate::payments::bench::*;

#[tokio::test]
async fn without_a_chain_nothing_is_taken() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));

        // The chain was never reached …
        let mut config = bench.config();
        config.rpc_urls = vec!["http://127.0.0.1:1".parse().unwrap()];
        let blind = Node::new(&bench.books.db, config);
        assert!(matches!(blind.payments.check_chain().await, ChainHealth::Unreachable(_)));
        let result = in_time("an answer", blind.payments.pay(&payload, None)).await;
        assert!(matches!(result, Err(PaymentError::Unavailable(_))), "{result:?}");

        // … or went away, at any point before the payment is in the journal.
        let node = bench.node_with(|config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
        for method in ["eth_getBlockByNumber", "eth_call"] {
            rpc.break_methods(&[(method, Fault::Unreachable)]);
            let result = in_time("an answer", node.payments.pay(&payload, None)).await;
            assert!(matches!(result, Err(PaymentError::Unavailable(_))), "{method}: {result:?}");
            rpc.mend();
        }
        assert_eq!(bench.books.number("SELECT COUNT(*) AS n FROM payments").await, 0);
        assert_eq!(node.pay(&payload).await.state, State::Credited, "and it is good once the chain is back");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_second_endpoint_stands_in_for_the_first() {
    each(async |bench| {
        let clock = Clock::fixed(Clock::System.now());
        let node = bench
            .node_at(clock.clone(), |config| config.rpc_urls.insert(0, "http://127.0.0.1:1".parse().unwrap()))
            .await;
        let payer = bench.payer(FIVE_USD).await;
        // Only one of the two answers, and its word alone counts when the block is final.
        let payload = payload(&bench.authorization(&payer));
        node.pay_and_leave(&payload).await;
        node.until(&payer, State::Mined).await;
        // Finality is its own word too, so it must have stood by it for a while.
        bench.warp(700).await;
        clock.advance_seconds(700);
        assert_eq!(node.pay(&payload).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

/// Calls that fail, and the state in which they stop a payment on its way.
const STOPS: &[(&[(&str, Fault)], State)] = &[
    (&[("eth_getTransactionCount", Fault::Unreachable)], State::Verified),
    (&[("eth_sendRawTransaction", Fault::Unreachable)], State::Signed),
    // The endpoint has taken the transaction, and nobody hears of it.
    (&[("eth_sendRawTransaction", Fault::AnswerLost), ("eth_getLogs", Fault::Unreachable)], State::Signed),
    (&[("eth_getTransactionReceipt", Fault::Unreachable)], State::Broadcast),
    (&[("eth_getLogs", Fault::Unreachable)], State::Broadcast),
];

#[tokio::test]
async fn a_process_started_anew_finishes_what_the_last_one_began() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        for (number, (faults, stops_in)) in STOPS.iter().enumerate() {
            let before = bench.node_with(|config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
            let payer = bench.payer(10 * FIVE_USD).await;
            rpc.break_methods(faults);
            before.pay_and_leave(&payload(&bench.authorization(&payer))).await;
            let stopped = before.until(&payer, *stops_in).await;
            before.crash().await;
            rpc.mend();

            let after = bench.node().await;
            after.run();
            let credited = after.until(&payer, State::Credited).await;
            assert_eq!(credited.id, stopped.id);
            assert_eq!(after.balance_of(&payer).await, 5_000_000, "stopped in {stops_in:?}");
            assert_eq!(bench.chain.usdc_of(payer.address()).await, 9 * FIVE_USD);
            assert_eq!(bench.sent_by_relayer().await, format!("{:#x}", number + 1));
            after.crash().await;
        }
        bench.assert_reconciled(&bench.node().await).await;
    })
    .await;
}

#[tokio::test]
async fn an_outage_on_the_way_only_delays() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        let node = bench.node_with(|config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
        for (faults, stops_in) in STOPS {
            let payer = bench.payer(10 * FIVE_USD).await;
            let payload = payload(&bench.authorization(&payer));
            rpc.break_methods(faults);
            node.pay_and_leave(&payload).await;
            node.until(&payer, *stops_in).await;
            rpc.mend();
            assert_eq!(node.pay(&payload).await.state, State::Credited, "delayed in {stops_in:?}");
            assert_eq!(node.balance_of(&payer).await, 5_000_000);
        }
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_relayer_without_gas_delays_and_loses_nothing() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let paid = payload(&bench.authorization(&payer));
        bench.chain.rpc("anvil_setBalance", json!([bench.relayer.address(), "0x0"])).await;
        node.pay_and_leave(&paid).await;
        let stuck = node.until(&payer, State::Signed).await;
        assert!(stuck.last_error.is_some(), "the operator can see why");
        bench.chain.give_gas(bench.relayer.address()).await;
        let payment = node.pay(&paid).await;
        assert_eq!((payment.id, payment.state), (stuck.id, State::Credited));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_payment_that_could_never_be_sent_ends_and_the_next_one_goes_through() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let paid = payload(&authorization);
        bench.chain.rpc("anvil_setBalance", json!([bench.relayer.address(), "0x0"])).await;
        node.pay_and_leave(&paid).await;
        node.until(&payer, State::Signed).await;
        bench.warp(1200).await;
        assert_eq!(node.until(&payer, State::Expired).await.state.status(), "failed");

        // Its account nonce was never used: the next payment must not wait for it.
        bench.chain.give_gas(bench.relayer.address()).await;
        node.run();
        let next = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&payload(&valid_after_warp(bench, &next))).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn sent_by_somebody_else_when_we_cannot_send() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let paid = payload(&bench.authorization(&payer));
        bench.chain.rpc("anvil_setBalance", json!([bench.relayer.address(), "0x0"])).await;
        node.pay_and_leave(&paid).await;
        node.until(&payer, State::Signed).await;
        let theirs = bench.front_run(&paid).await;
        let payment = node.pay(&paid).await;
        assert_eq!((payment.state, payment.tx_hash), (State::Credited, Some(theirs)));
        bench.assert_reconciled(&node).await;
    })
    .await;
}
