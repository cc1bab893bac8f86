//! The books against the chain.

use crate::payments::bench::*;

#[tokio::test]
async fn the_audit_compares_the_books_with_the_chain() {
    each(async |bench| {
        const ON_CHAIN: &str = "each credit has its transfer on the chain";
        let node = bench.node().await;
        let payer = bench.payer(3 * FIVE_USD).await;
        node.pay(&payload(&bench.authorization(&payer))).await;
        bench.assert_reconciled(&node).await;
        let verdict_of = async |check: &str| {
            let report = bench.audit(&node).await;
            report.0.iter().find(|row| row.check == check).map(|row| (row.verdict, row.detail.clone()))
        };

        // Money that came without a payment, and money the operator has taken: to be known, no drift.
        bench.front_run(&payload(&bench.authorization(&payer))).await;
        let (verdict, _) = verdict_of("each transfer to the treasury is credited").await.unwrap();
        assert_eq!(verdict, Verdict::Warning);
        bench.chain.rpc("anvil_impersonateAccount", json!([bench.treasury])).await;
        bench.chain.give_gas(bench.treasury).await;
        let away = call(&transferCall { to: STRANGER, value: U256::from(2 * FIVE_USD) });
        bench.chain.send(bench.treasury, USDC, &away).await;
        let (verdict, detail) = verdict_of("the treasury holds what wallets are owed").await.unwrap();
        assert_eq!((verdict, detail.as_str()), (Verdict::Warning, "0 micro-USDC held, 5000000 owed"));
        assert!(!bench.audit(&node).await.has_drift());

        // A credit that the chain does not know.
        assert_eq!(bench.books.sql("UPDATE payments SET log_index = log_index + 7").await.unwrap(), 1);
        assert_eq!(verdict_of(ON_CHAIN).await.unwrap().0, Verdict::Drift);
    })
    .await;
}
