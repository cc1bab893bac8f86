//! Payers that are contracts: their code decides.

use crate::payments::bench::*;

#[tokio::test]
async fn of_a_wallet_with_code_its_code_decides() {
    each(async |bench| {
        let node = bench.node().await;
        // Answers EIP-1271's magic value, whatever it is asked.
        let agreeing = format!("0x7f1626ba7e{}5f5260205ff3", "00".repeat(28));
        let payer = bench.payer(FIVE_USD).await;
        bench.chain.rpc("anvil_setCode", json!([payer.address(), agreeing])).await;
        let mut taken = payload(&bench.authorization(&payer));
        taken.signature = vec![0x12; 100];
        assert_eq!(node.pay(&taken).await.state, State::Credited);

        // Answers zero: then its key's good signature is worth nothing, because the token asks the code.
        let payer = bench.payer(FIVE_USD).await;
        bench.chain.rpc("anvil_setCode", json!([payer.address(), "0x60205ff3"])).await;
        let refused = payload(&bench.authorization(&payer));
        assert_eq!(node.refusal(&refused).await.0, Reason::InvalidSignature);
        bench.assert_reconciled(&node).await;
    })
    .await;
}
