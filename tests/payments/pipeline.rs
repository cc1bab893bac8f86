//! Many top-ups at once take about as many blocks as one: they are signed, sent and credited side by
//! side, not one after another.

use std::sync::Arc;
use std::time::Instant;

use crate::payments::bench::*;
use crate::support::gateway::Gateway;
use crate::support::wallet::SignedPayment;

const AT_ONCE: usize = 50;
/// One after another, where the figures are not asked for: each takes a block or two.
const IN_SEQUENCE: usize = 3;
/// From the first request to the last credit.
const MOST_BLOCKS: u64 = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_top_ups_at_once_take_few_blocks() {
    let in_sequence = std::env::var("TOPUPS_IN_SEQUENCE").map_or(IN_SEQUENCE, |text| text.parse().unwrap());
    let chain = Arc::new(TestChain::start());
    let gateway = Gateway::start(&chain, "http://127.0.0.1:9/v1").await;
    let mut payments = Vec::new();
    for _ in 0..AT_ONCE + in_sequence {
        let wallet = TestWallet::random();
        chain.mint(wallet.address(), FIVE_USD).await;
        payments.push(wallet.authorization(gateway.setup.pay_to, FIVE_USD).sign());
    }
    chain.set_automine(false).await;
    chain.rpc("evm_setIntervalMining", json!([1])).await;

    let (at_once, one_by_one) = payments.split_at(AT_ONCE);
    let (began, first_block) = (Instant::now(), chain.head().await);
    futures_util::future::join_all(at_once.iter().map(|payment| credited(&gateway, payment))).await;
    let (together, blocks) = (began.elapsed(), chain.head().await - first_block);

    let began = Instant::now();
    for payment in one_by_one {
        credited(&gateway, payment).await;
    }
    let apart = began.elapsed();
    chain.rpc("evm_setIntervalMining", json!([0])).await;
    println!("| top-ups | at once | seconds | blocks of 1 s |");
    println!("|---|---|---|---|");
    println!("| {AT_ONCE} | yes | {:.1} | {blocks} |", together.as_secs_f64());
    println!("| {in_sequence} | no | {:.1} | |", apart.as_secs_f64());
    assert!(blocks <= MOST_BLOCKS, "{AT_ONCE} top-ups took {blocks} blocks");
    gateway.audit();
}

/// Sends a payment until it is credited, as a client does.
async fn credited(gateway: &Gateway, payment: &SignedPayment) {
    loop {
        let call = gateway.post("/v1/topup").json(&json!({"amount": 5}));
        let answer = call.header("x-payment", &payment.v2_header()).send().await;
        match answer.status {
            200 => return,
            202 => {}
            _ => panic!("{answer:?}"),
        }
    }
}
