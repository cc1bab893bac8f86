//! Credits whose block the chain gives up: sent again while that can help, taken back when it cannot.

use crate::payments::bench::*;
use crate::support::books::{completion, hold, settled};

#[tokio::test]
async fn a_credit_whose_block_was_reorganised_is_final_where_its_transfer_is_then() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let credited = node.pay(&payload(&bench.authorization(&payer))).await;
        bench.chain.mine(1).await;
        // The two last blocks are replaced, and the transfer is in the second of the new ones.
        let raw = bench.books.db.row("SELECT raw FROM payment_transactions", vec![]).await.unwrap().unwrap();
        bench.chain.rpc("anvil_reorg", json!([2, [[raw.text("raw").unwrap(), 1]]])).await;
        bench.chain.mine(3).await;
        node.run();
        let finalized = node.until(&payer, State::Finalized).await;
        assert_eq!(finalized.block_number, credited.block_number.map(|block| block + 1));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
        node.crash().await;
    })
    .await;
}

/// Replaces the newest blocks with empty ones.
async fn undo(bench: &Bench, blocks: u64) {
    bench.chain.rpc("anvil_reorg", json!([blocks, []])).await;
}

#[tokio::test]
async fn a_credit_that_was_undone_is_sent_again_byte_for_byte() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let credited = node.pay(&payload(&bench.authorization(&payer))).await;
        assert_eq!(credited.state, State::Credited);
        bench.chain.mine(1).await;
        undo(bench, 2).await;
        assert_eq!(bench.chain.usdc_of(bench.treasury).await, 0);
        node.payments.upkeep().await.unwrap();
        assert_eq!(bench.chain.usdc_of(bench.treasury).await, FIVE_USD);
        bench.chain.mine(3).await;
        node.payments.upkeep().await.unwrap();
        let finalized = node.payment_of(&payer).await.unwrap();
        assert_eq!((finalized.state, finalized.tx_hash), (State::Finalized, credited.tx_hash));
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        assert_eq!(bench.sent_by_relayer().await, "0x1");
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_credit_by_somebody_elses_transaction_that_was_undone_is_sent_by_us() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        let theirs = bench.front_run(&payload).await;
        assert_eq!(node.pay(&payload).await.tx_hash, Some(theirs));
        bench.chain.mine(1).await;
        undo(bench, 2).await;
        for _ in 0..2 {
            node.payments.upkeep().await.unwrap();
        }
        assert_eq!(bench.sent_by_relayer().await, "0x1", "there was none of ours, so one was made");
        bench.chain.mine(3).await;
        node.payments.upkeep().await.unwrap();
        assert_eq!(node.payment_of(&payer).await.unwrap().state, State::Finalized);
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_credit_undone_for_good_is_taken_back_and_what_was_spent_is_debt() {
    each(async |bench| {
        let node = bench.node().await;
        let payer = bench.payer(FIVE_USD).await;
        let wallet = Wallet(payer.address());
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let payload = payload(&authorization);
        let credited = node.pay(&payload).await;
        assert_eq!(credited.state, State::Credited);

        // $1.80 are spent, and half a dollar is held when the chain changes its mind.
        let spent = hold("req_spent", wallet, 2_000_000);
        node.ledger.hold(&spent).await.unwrap();
        node.ledger.end(&settled(&spent, completion(2_500_000))).await.unwrap();
        let open = hold("req_open", wallet, 500_000);
        node.ledger.hold(&open).await.unwrap();
        bench.chain.mine(1).await;
        undo(bench, 2).await;
        // The payer is quicker than we are, so that sending it again is in vain.
        bench.chain.rpc("anvil_impersonateAccount", json!([payer.address()])).await;
        bench.chain.give_gas(payer.address()).await;
        let away = call(&transferCall { to: STRANGER, value: U256::from(FIVE_USD) });
        bench.chain.send(payer.address(), USDC, &away).await;

        // While it could still come, nothing is taken back.
        node.payments.upkeep().await.unwrap();
        assert_eq!(node.payment_of(&payer).await.unwrap().state, State::Credited);
        bench.warp(1200).await;
        for _ in 0..2 {
            node.payments.upkeep().await.unwrap();
        }
        let reversed = node.payment_of(&payer).await.unwrap();
        assert_eq!(
            (reversed.id, reversed.state, reversed.state.status()),
            (credited.id, State::Reorged, "reversed")
        );
        // What is locked stays; the rest of what is missing is owed.
        let owing = node.ledger.balance(wallet).await.unwrap();
        assert_eq!(
            (owing.balance.get(), owing.locked.get(), owing.debt.get()),
            (500_000, 500_000, 2_300_000)
        );
        assert!(!bench.audit(&node).await.has_drift());
        assert_eq!(bench.chain.usdc_of(bench.treasury).await, 0);

        // Sent once more it is what it is, and takes nothing.
        assert_eq!(node.pay(&payload).await.state, State::Reorged);

        // The hold ends uncharged: what it set free is still the wallet's, and the debt is repaid first
        // by what comes next.
        node.ledger.end(&Ending::released(open, "upstream_failed")).await.unwrap();
        bench.chain.mint(payer.address(), FIVE_USD).await;
        let next = self::payload(&valid_after_warp(bench, &payer));
        assert_eq!(
            in_time("the next payment", node.payments.pay(&next, None)).await.unwrap().state,
            State::Credited
        );
        let repaid = node.ledger.balance(wallet).await.unwrap();
        assert_eq!((repaid.balance.get(), repaid.locked.get(), repaid.debt.get()), (3_200_000, 0, 0));
        assert!(!bench.audit(&node).await.has_drift());
    })
    .await;
}

#[tokio::test]
async fn a_wallets_credits_that_are_not_final_have_a_ceiling() {
    each(async |bench| {
        let node = bench.node_with(|config| config.max_unfinalized = MicroUsdc::new(7_000_000)).await;
        let payer = bench.payer(2 * FIVE_USD).await;
        let neighbour = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&payload(&bench.authorization(&payer))).await.state, State::Credited);
        let above = payload(&bench.authorization(&payer));
        node.pay_and_leave(&above).await;
        assert_eq!(node.balance_of(&payer).await, 5_000_000, "the second waits for the first to be final");
        assert_eq!(node.pay(&payload(&bench.authorization(&neighbour))).await.state, State::Credited);

        bench.chain.mine(3).await;
        node.payments.upkeep().await.unwrap();
        assert_eq!(
            in_time("the second", node.payments.pay(&above, None)).await.unwrap().state,
            State::Credited
        );
        assert_eq!(node.balance_of(&payer).await, 10_000_000);
        bench.assert_reconciled(&node).await;
    })
    .await;
}
