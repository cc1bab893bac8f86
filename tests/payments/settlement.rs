//! From a signed authorization to a credit, once: at once, on two nodes, and when others send it first.

use crate::payments::bench::*;

#[tokio::test]
async fn a_top_up_is_credited_once_from_the_chains_logs() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD + 1).await;
        let payload = payload(&bench.authorization(&payer));
        let payment = node.pay(&payload).await;
        assert_eq!((payment.state, payment.value), (State::Credited, MicroUsdc::new(5_000_000)));
        assert_eq!(payment.authorization, payload.authorization);
        assert_eq!(node.ledger.balance(Wallet(payer.address())).await.unwrap(), balance(5_000_000, 0));
        assert_eq!(bench.chain.usdc_of(payer.address()).await, 1);

        let receipt =
            bench.chain.rpc("eth_getTransactionReceipt", json!([payment.tx_hash.as_ref().unwrap()])).await;
        assert_eq!(receipt["status"], "0x1");
        assert_eq!(receipt["blockNumber"], format!("{:#x}", payment.block_number.unwrap()));
        let log = &receipt["logs"][1];
        assert_eq!(log["logIndex"], format!("{:#x}", payment.log_index.unwrap()));
        assert_eq!(log["topics"][2], format!("0x{}", word(bench.treasury)));

        // Again, in the other envelope, with the amount said: the same payment.
        let again = Payload { version: 1, network: "base".into(), ..payload };
        let amount = Some(MicroUsdc::new(5_000_000));
        assert_eq!(node.payments.pay(&again, amount).await.unwrap(), payment);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.sent_by_relayer().await, "0x1");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_times_the_same_payload_at_once_is_one_payment() {
    each(async |bench| {
        let node = bench.node().await;
        // Enough for several, so that only we stand in the way.
        let payer = bench.payer(10 * FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        let payments = at_once(100, |_| (node.clone(), payload.clone())).await;
        assert!(payments.iter().all(|payment| *payment == payments[0]), "{payments:?}");
        assert_eq!(payments[0].state, State::Credited);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.sent_by_relayer().await, "0x1");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_payload_to_two_nodes_at_once_is_one_payment() {
    let bench = Bench::new(Books::postgres().await).await;
    let elsewhere = Db::open(&bench.books.url, Access::Serve).await.unwrap();
    let nodes = [bench.node().await, Node::new(&elsewhere, bench.config())];
    assert_eq!(nodes[1].payments.check_chain().await, ChainHealth::Ok);
    let payer = bench.payer(10 * FIVE_USD).await;
    let payload = payload(&bench.authorization(&payer));
    let payments = at_once(100, |number| (nodes[number % 2].clone(), payload.clone())).await;
    assert!(payments.iter().all(|payment| *payment == payments[0]), "{payments:?}");
    assert_eq!(payments[0].state, State::Credited);
    assert_eq!(nodes[0].balance_of(&payer).await, 5_000_000);
    assert_eq!(bench.sent_by_relayer().await, "0x1");
    bench.assert_reconciled(&nodes[0]).await;
    elsewhere.close().await;
    bench.books.discard().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_payers_at_two_nodes_share_one_relayer() {
    let bench = Bench::new(Books::postgres().await).await;
    let elsewhere = Db::open(&bench.books.url, Access::Serve).await.unwrap();
    let nodes = [bench.node().await, Node::new(&elsewhere, bench.config())];
    assert_eq!(nodes[1].payments.check_chain().await, ChainHealth::Ok);
    let mut payers = Vec::new();
    for _ in 0..24 {
        payers.push(bench.payer(FIVE_USD).await);
    }
    let payloads: Vec<_> = payers.iter().map(|payer| payload(&bench.authorization(payer))).collect();
    let payments = at_once(24, |number| (nodes[number % 2].clone(), payloads[number].clone())).await;
    assert!(payments.iter().all(|payment| payment.state == State::Credited), "{payments:?}");
    assert_eq!(bench.sent_by_relayer().await, "0x18");
    bench.assert_reconciled(&nodes[0]).await;
    elsewhere.close().await;
    bench.books.discard().await;
}

// ---- somebody else sends it first

#[tokio::test]
async fn sent_by_somebody_else_before_we_hear_of_it() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        let theirs = bench.front_run(&payload).await;
        bench.chain.mine(5).await;
        let payment = node.pay(&payload).await;
        assert_eq!((payment.state, payment.tx_hash), (State::Credited, Some(theirs)));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.sent_by_relayer().await, "0x0", "there was nothing left to spend gas on");
        assert_eq!(node.pay(&payload).await.id, payment.id);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn carried_out_in_time_and_heard_of_too_late() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(2 * FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        // Time enough for the chain, and too little for us.
        authorization.valid_before = (unix_seconds() + 5).to_string();
        let late = payload(&authorization);
        assert_eq!(node.refusal(&late).await.0, Reason::ValidBefore);
        let theirs = bench.front_run(&late).await;
        let payment = node.pay(&late).await;
        assert_eq!((payment.state, payment.tx_hash), (State::Credited, Some(theirs)));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.sent_by_relayer().await, "0x0");
        // What the payer has cancelled in time was not carried out.
        let mut cancelled = bench.authorization(&payer);
        cancelled.valid_before = (unix_seconds() + 5).to_string();
        bench.chain.send(BYSTANDER, USDC, &cancel(&payer, cancelled.nonce)).await;
        assert_eq!(node.refusal(&payload(&cancelled)).await.0, Reason::ValidBefore);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn sent_by_somebody_else_while_ours_waits_to_be_mined() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let ours = node.until(&payer, State::Broadcast).await.tx_hash.unwrap();
        bench.send_dearly(BYSTANDER, transfer_call(&payload)).await;
        bench.chain.mine(1).await;
        let receipt = bench.chain.rpc("eth_getTransactionReceipt", json!([ours])).await;
        assert_eq!(receipt["status"], "0x0", "theirs came first and ours reverted");

        let payment = node.pay(&payload).await;
        assert_eq!(payment.state, State::Credited);
        assert_ne!(payment.tx_hash, Some(ours), "credited by the transaction that paid");
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn sent_by_somebody_else_after_ours_was_dropped() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let paid = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&paid).await;
        let ours = node.until(&payer, State::Broadcast).await.tx_hash.unwrap();
        bench.chain.rpc("anvil_dropTransaction", json!([ours])).await;
        bench.send_dearly(BYSTANDER, transfer_call(&paid)).await;
        bench.chain.mine(1).await;
        bench.chain.set_automine(true).await;
        let payment = node.pay(&paid).await;
        assert_eq!(payment.state, State::Credited);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);

        // Ours left a gap in the relayer's account nonces: nobody else's payment may hang on it.
        node.run();
        let next = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&payload(&bench.authorization(&next))).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_coins_authorised_many_times_at_once_are_sent_once() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payloads: Vec<_> = (0..8).map(|_| payload(&bench.authorization(&payer))).collect();
        let barrier = std::sync::Arc::new(tokio::sync::Barrier::new(payloads.len()));
        let tasks: Vec<_> = payloads
            .into_iter()
            .map(|payload| {
                let (node, barrier) = (node.clone(), barrier.clone());
                tokio::spawn(async move {
                    barrier.wait().await;
                    node.payments.pay(&payload, None).await
                })
            })
            .collect();
        let mut credited = 0;
        for task in tasks {
            match task.await.unwrap() {
                Ok(payment) => {
                    assert_eq!(payment.state, State::Credited);
                    credited += 1;
                }
                Err(PaymentError::Refused { reason: Reason::InsufficientBalance, .. }) => {}
                Err(PaymentError::Unavailable(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(credited, 1);
        assert_eq!(bench.sent_by_relayer().await, "0x1", "our gas is spent once");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

/// `balanceOf` of the token.
fn asks_for_a_balance(params: &Value) -> bool {
    let input = params[0]["input"].as_str().or(params[0]["data"].as_str());
    input.is_some_and(|input| input.starts_with("0x70a08231"))
}

#[tokio::test]
async fn what_leaves_the_wallet_while_a_payment_is_verified_is_not_missed() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        let slow = bench.node_with(|config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
        // It waits for a confirmation that nobody mines, so the payment is not at rest …
        let other = bench.node_with(|config| config.confirmations = 2).await;
        let payer = bench.payer(2 * FIVE_USD).await;
        let (first, second) = (bench.authorization(&payer), bench.authorization(&payer));

        rpc.break_methods(&[("eth_call", Fault::HeldBack(asks_for_a_balance))]);
        let verifying = tokio::spawn(async move { slow.pay(&payload(&second)).await });
        rpc.held_back().await;
        // … though its five dollars have left the wallet, of which the other one asks just now.
        other.pay_and_leave(&payload(&first)).await;
        eventually("the transfer is in the chain", async || {
            (bench.chain.usdc_of(payer.address()).await == FIVE_USD).then_some(())
        })
        .await;
        rpc.mend();
        assert_eq!(in_time("the second payment", verifying).await.unwrap().state, State::Credited);
        bench.chain.mine(1).await;
        assert_eq!(other.pay(&payload(&first)).await.state, State::Credited);
        assert_eq!(other.balance_of(&payer).await, 10_000_000);
        bench.assert_reconciled(&other).await;
    })
    .await;
}
