//! Endpoints that lie, lag, hang or contradict each other: no credit rests on one alone.

use std::time::Instant;

use crate::payments::bench::*;

/// Two endpoints on the same chain, and a node that asks both.
async fn with_two(bench: &Bench) -> (FaultyRpc, FaultyRpc, Node) {
    with_two_at(bench, Clock::System).await
}

async fn with_two_at(bench: &Bench, clock: Clock) -> (FaultyRpc, FaultyRpc, Node) {
    let (first, second) =
        (FaultyRpc::start(&bench.chain.url).await, FaultyRpc::start(&bench.chain.url).await);
    let urls = [&first, &second].map(|rpc| rpc.url.parse().unwrap());
    let node = bench.node_at(clock, |config| config.rpc_urls = urls.to_vec()).await;
    (first, second, node)
}

/// The word of one endpoint alone is believed after this.
const STOOD: i64 = 700;
/// Longer than every pause between two looks at a payment that somebody waits for.
const SEVERAL_LOOKS: Duration = Duration::from_secs(4);

/// Whatever is looked for was seen in block 2, if one believes this endpoint.
fn invented_logs(params: &Value, _: Value) -> Value {
    let filter = &params[0];
    let topics = filter["topics"].as_array().unwrap();
    let signature = topics[0].as_array().map_or(topics[0].clone(), |any| any[0].clone());
    let used = "0x98de503528ee59b575ef0c0a2576a82497bfc029a5685b209e9ec333479b10a5";
    let is_used = signature == used;
    let flat = |topic: &Value| topic.as_array().map_or(topic.clone(), |any| any[0].clone());
    json!([{
        "address": USDC,
        "topics": [signature, flat(&topics[1]), flat(&topics[2])],
        "data": if is_used { "0x".to_owned() } else { format!("0x{FIVE_USD:064x}") },
        "blockNumber": "0x2",
        "blockHash": format!("0x{:064x}", 2),
        "transactionHash": format!("0x{:064x}", 77),
        "transactionIndex": "0x0",
        "logIndex": if is_used { "0x0" } else { "0x1" },
        "removed": false,
    }])
}

#[tokio::test]
async fn a_transfer_that_one_of_two_endpoints_invents_is_not_credited() {
    each(async |bench| {
        let (liar, _honest, node) = with_two(bench).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.mine(4).await;
        bench.chain.set_automine(false).await;
        liar.break_methods(&[("eth_getLogs", Fault::Lie(invented_logs))]);
        let waited = tokio::time::timeout(SEVERAL_LOOKS, node.payments.pay(&payload, None)).await;
        assert!(waited.is_err(), "{waited:?}");
        bench.chain.mine(3).await;
        assert_eq!(node.balance_of(&payer).await, 0);
        assert_eq!(node.payment_of(&payer).await.unwrap().state, State::Broadcast);

        // The truth, once both tell it, is good.
        liar.mend();
        bench.chain.set_automine(true).await;
        bench.chain.mine(1).await;
        let payment = in_time("the payment", node.payments.pay(&payload, None)).await.unwrap();
        assert_eq!(payment.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn finality_that_one_of_two_endpoints_declares_by_itself_is_none() {
    each(async |bench| {
        let clock = Clock::fixed(Clock::System.now());
        let (liar, _honest, node) = with_two_at(bench, clock.clone()).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.mine(4).await;
        bench.chain.set_automine(false).await;
        liar.break_methods(&[
            ("eth_getLogs", Fault::Lie(invented_in_the_newest_block)),
            ("eth_getBlockByNumber", Fault::Lie(all_is_final)),
        ]);
        let waited = tokio::time::timeout(A_MOMENT, node.payments.pay(&payload, None)).await;
        assert!(waited.is_err(), "{waited:?}");
        clock.advance_seconds(STOOD);
        let waited = tokio::time::timeout(SEVERAL_LOOKS, node.payments.pay(&payload, None)).await;
        assert!(waited.is_err(), "{waited:?}");
        assert_eq!(node.balance_of(&payer).await, 0);
    })
    .await;
}

/// What is looked for is in the last block that is asked about, where the other is not past it.
fn invented_in_the_newest_block(params: &Value, truth: Value) -> Value {
    let mut logs = invented_logs(params, truth);
    logs[0]["blockNumber"] = params[0]["toBlock"].clone();
    logs
}

/// Says of the final block that it is a later one than it is.
fn all_is_final(params: &Value, mut block: Value) -> Value {
    if params[0] == "finalized" {
        let number = u64::from_str_radix(block["number"].as_str().unwrap().trim_start_matches("0x"), 16);
        block["number"] = json!(format!("{:#x}", number.unwrap() + 2));
    }
    block
}

#[tokio::test]
async fn a_payment_has_not_failed_because_one_of_two_endpoints_says_so() {
    each(async |bench| {
        let (first, _second, node) = with_two(bench).await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let payload = payload(&authorization);
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let sent = node.until(&payer, State::Broadcast).await;
        bench.chain.rpc("anvil_dropTransaction", json!([sent.tx_hash])).await;
        for method in ["eth_getBlockByNumber", "eth_getLogs", "eth_call", "eth_sendRawTransaction"] {
            first.break_methods(&[(method, Fault::Unreachable)]);
        }
        bench.warp(1200).await;
        let waited = tokio::time::timeout(SEVERAL_LOOKS, node.payments.pay(&payload, None)).await;
        assert!(waited.is_err(), "{waited:?}");
        assert_eq!(node.payment_of(&payer).await.unwrap().state.status(), "pending");
        first.mend();
        assert_eq!(node.payments.check_chain().await, ChainHealth::Ok);
        let ended = in_time("its end", node.payments.pay(&payload, None)).await.unwrap();
        assert_eq!(ended.state, State::Expired);
    })
    .await;
}

/// A final block before all others', of a time after theirs.
fn behind_and_far_ahead(params: &Value, mut block: Value) -> Value {
    let number =
        |hex: &Value| u64::from_str_radix(hex.as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
    if params[0] == "finalized" {
        block["number"] = json!(format!("{:#x}", number(&block["number"]) - 1));
        block["timestamp"] = json!(format!("{:#x}", number(&block["timestamp"]) + 86_400));
    }
    block
}

#[tokio::test]
async fn no_time_is_over_because_one_of_two_endpoints_says_so() {
    each(async |bench| {
        let (liar, honest, node) = with_two(bench).await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let payload = payload(&authorization);
        bench.chain.mine(3).await;
        bench.chain.set_automine(false).await;
        node.pay_and_leave(&payload).await;
        let sent = node.until(&payer, State::Broadcast).await;
        // It is lost, and does not come back: only the time is left to end it.
        for endpoint in [&liar, &honest] {
            endpoint.break_methods(&[("eth_sendRawTransaction", Fault::Unreachable)]);
        }
        bench.chain.rpc("anvil_dropTransaction", json!([sent.tx_hash])).await;
        liar.break_methods(&[("eth_getBlockByNumber", Fault::Lie(behind_and_far_ahead))]);
        let looked = node.payments.step_once(sent.id).await;
        assert!(looked.is_err(), "having looked, it is to be sent again, which fails");
        assert_eq!(node.payment_of(&payer).await.unwrap().state, State::Broadcast);
        liar.mend();
        honest.mend();
        bench.chain.set_automine(true).await;
        bench.chain.mine(1).await;
        assert_eq!(node.pay(&payload).await.state, State::Credited);
    })
    .await;
}

#[tokio::test]
async fn a_transfer_that_one_of_two_endpoints_withholds_waits_for_it() {
    each(async |bench| {
        let (liar, _honest, node) = with_two(bench).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        liar.break_methods(&[("eth_getLogs", Fault::Lie(|_, _| json!([])))]);
        let waited = tokio::time::timeout(A_MOMENT, node.payments.pay(&payload, None)).await;
        assert!(waited.is_err(), "{waited:?}");
        // Both are long past the block: what one has not seen by now it denies.
        bench.chain.mine(5).await;
        let waited = tokio::time::timeout(SEVERAL_LOOKS, node.payments.pay(&payload, None)).await;
        assert!(waited.is_err(), "{waited:?}");
        assert_eq!(node.balance_of(&payer).await, 0);
        liar.mend();
        let payment = in_time("the payment", node.payments.pay(&payload, None)).await.unwrap();
        assert_eq!(payment.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn of_three_endpoints_the_one_that_contradicts_is_put_aside() {
    each(async |bench| {
        let liar = FaultyRpc::start(&bench.chain.url).await;
        let urls = [&liar.url, &bench.chain.url, &bench.chain.url].map(|url| url.parse().unwrap());
        let settings = |config: &mut config::Payments| {
            config.rpc_urls = urls.to_vec();
            config.confirmations = 4;
        };
        let node = bench.node_with(settings).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        liar.break_methods(&[("eth_getLogs", Fault::Lie(|_, _| json!([])))]);
        node.pay_and_leave(&payload).await;
        bench.chain.mine(3).await;
        assert_eq!(node.pay(&payload).await.state, State::Credited, "two that agree are enough");
        // The audit asks one endpoint for logs, and no longer this one.
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_denied_authorization_does_not_expire_while_another_endpoint_shows_its_transfer() {
    each(async |bench| {
        let (liar, _honest, node) = with_two(bench).await;
        let payer = bench.payer(FIVE_USD).await;
        let mut authorization = bench.authorization(&payer);
        authorization.valid_before = (unix_seconds() + 600).to_string();
        let payload = payload(&authorization);
        liar.break_methods(&[
            ("eth_getLogs", Fault::Lie(|_, _| json!([]))),
            ("eth_call", Fault::Lie(|_, truth| truth)),
        ]);
        let waited = tokio::time::timeout(A_MOMENT, node.payments.pay(&payload, None)).await;
        assert!(waited.is_err(), "{waited:?}");
        bench.warp(1200).await;
        let waited = tokio::time::timeout(SEVERAL_LOOKS, node.payments.pay(&payload, None)).await;
        assert!(waited.is_err(), "{waited:?}");
        assert_eq!(node.payment_of(&payer).await.unwrap().state.status(), "pending");
        liar.mend();
        let payment = in_time("the payment", node.payments.pay(&payload, None)).await.unwrap();
        assert_eq!(payment.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn an_endpoint_that_lags_is_put_aside_and_the_other_is_believed_when_final() {
    each(async |bench| {
        let clock = Clock::fixed(Clock::System.now());
        let (laggard, _honest, node) = with_two_at(bench, clock.clone()).await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        // A head of minutes ago, and no log since then.
        let stale = bench.chain.rpc("eth_getBlockByNumber", json!(["latest", false])).await;
        assert!(stale["timestamp"].is_string());
        laggard.break_methods(&[
            ("eth_getBlockByNumber", Fault::Lie(minutes_old)),
            ("eth_getLogs", Fault::Lie(|_, _| json!([]))),
        ]);
        let waited = tokio::time::timeout(A_MOMENT, node.payments.pay(&payload, None)).await;
        assert!(waited.is_err(), "{waited:?}");
        assert_eq!(node.balance_of(&payer).await, 0, "the word of one counts when the block is final");
        bench.warp(STOOD).await;
        clock.advance_seconds(STOOD);
        let payment = in_time("the payment", node.payments.pay(&payload, None)).await.unwrap();
        assert_eq!(payment.state, State::Credited);

        // It has caught up, and two agree again.
        laggard.mend();
        assert_eq!(node.payments.check_chain().await, ChainHealth::Ok);
        let next = bench.payer(FIVE_USD).await;
        assert_eq!(node.pay(&self::payload(&bench.authorization(&next))).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

fn minutes_old(_: &Value, mut block: Value) -> Value {
    let timestamp = u64::from_str_radix(block["timestamp"].as_str().unwrap().trim_start_matches("0x"), 16);
    block["timestamp"] = json!(format!("{:#x}", timestamp.unwrap() - 300));
    block
}

#[tokio::test]
async fn a_false_head_puts_no_other_endpoint_aside() {
    each(async |bench| {
        let clock = Clock::fixed(Clock::System.now());
        let (liar, _honest, node) = with_two_at(bench, clock.clone()).await;
        liar.break_methods(&[("eth_getBlockByNumber", Fault::Lie(far_ahead))]);
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        // The liar has no logs up to where it says it is, so the honest one's word counts when final.
        // Were that one taken for a laggard, nothing would ever be credited.
        node.pay_and_leave(&payload).await;
        bench.warp(STOOD).await;
        clock.advance_seconds(STOOD);
        assert_eq!(node.pay(&payload).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

fn far_ahead(_: &Value, mut block: Value) -> Value {
    let (height, days) = (1_000_000_000_u64, 30 * 86_400);
    block["number"] = json!(format!("{height:#x}"));
    let timestamp = u64::from_str_radix(block["timestamp"].as_str().unwrap().trim_start_matches("0x"), 16);
    block["timestamp"] = json!(format!("{:#x}", timestamp.unwrap() + days));
    block
}

#[tokio::test]
async fn an_endpoint_that_hangs_delays_one_look_and_not_each() {
    each(async |bench| {
        let clock = Clock::fixed(Clock::System.now());
        let (hanging, _honest, node) = with_two_at(bench, clock.clone()).await;
        for method in ["eth_getBlockByNumber", "eth_getLogs", "eth_call", "eth_getTransactionReceipt"] {
            hanging.break_methods(&[(method, Fault::Silent)]);
        }
        // The first call that meets it waits for the time-out.
        let head = in_time("a head", node.payments.chain().head()).await.unwrap();
        bench.chain.mine(1).await;
        assert_eq!(node.payments.chain().head().await.unwrap().number, head.number + 1);
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        let began = Instant::now();
        node.pay_and_leave(&payload).await;
        node.until(&payer, State::Mined).await;
        bench.warp(STOOD).await;
        clock.advance_seconds(STOOD);
        assert_eq!(node.pay(&payload).await.state, State::Credited);
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "a time-out was waited for: {:?}",
            began.elapsed()
        );
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn an_endpoint_on_another_chain_is_never_asked() {
    each(async |bench| {
        let other = FaultyRpc::start(&bench.chain.url).await;
        other.break_methods(&[("eth_chainId", Fault::Lie(|_, _| json!("0x1")))]);
        let urls = [&bench.chain.url, &other.url].map(|url| url.parse().unwrap());
        let mut config = bench.config();
        config.rpc_urls = urls.to_vec();
        let node = Node::new(&bench.books.db, config);
        let health = node.payments.check_chain().await;
        assert!(matches!(&health, ChainHealth::Mismatch(why) if why.contains("chain 1")), "{health:?}");
    })
    .await;
}
