//! USDC that is just sent to the treasury: credited once, when it is final, to a wallet that is known.

use std::sync::Arc;

use farebox::payments::Kind;

use crate::payments::bench::*;
use crate::payments::journal_model::cut_off;
use crate::support::gateway::{Gateway, Setup};
use crate::support::operator;

const THREE_USD: u64 = 3_000_000;
const TWICE: Address = address!("0000000000000000000000000000000000007217");

impl Bench {
    /// A process that looks for deposits of a dollar or more.
    async fn watcher(&self) -> Node {
        self.watcher_with(|_| {}).await
    }

    async fn watcher_with(&self, change: impl FnOnce(&mut config::Payments)) -> Node {
        self.watcher_at(Clock::System, change).await
    }

    async fn watcher_at(&self, clock: Clock, change: impl FnOnce(&mut config::Payments)) -> Node {
        let node = self
            .node_at(clock, |config| {
                config.deposits =
                    Some(config::Deposits { min: MicroUsdc::new(1_000_000), from_block: Some(1) });
                change(config);
            })
            .await;
        node.payments.look_for_deposits().await.unwrap();
        node
    }

    /// Sends USDC to the treasury as wallets do. Answers the transaction's hash.
    async fn deposit(&self, from: Address, micro: u64) -> String {
        self.transfer(from, self.treasury, micro).await
    }

    async fn transfer(&self, from: Address, to: Address, micro: u64) -> String {
        self.chain.rpc("anvil_impersonateAccount", json!([from])).await;
        self.chain.give_gas(from).await;
        self.chain.send(from, USDC, &call(&transferCall { to, value: U256::from(micro) })).await
    }

    /// A wallet with USDC that has signed in once.
    async fn known(&self, micro: u64) -> TestWallet {
        let wallet = self.payer(micro).await;
        self.know(wallet.address()).await;
        wallet
    }

    async fn know(&self, wallet: Address) {
        let sql = "INSERT INTO wallets (address, created_at_ms) VALUES ($1, 0)";
        self.books.sql_with(sql, vec![Wallet(wallet).into()]).await;
    }

    async fn finalize_deposits(&self, node: &Node) {
        self.chain.mine(3).await;
        node.payments.look_for_deposits().await.unwrap();
    }

    async fn deposits(&self) -> i64 {
        self.books.number("SELECT COUNT(*) AS n FROM payments WHERE kind = 'deposit'").await
    }
}

#[tokio::test]
async fn a_deposit_is_credited_once_when_it_is_final() {
    each(async |bench| {
        let (node, other) = (bench.watcher().await, bench.watcher().await);
        let wallet = bench.known(2 * THREE_USD).await;
        bench.chain.mine(3).await;
        let hash = bench.deposit(wallet.address(), THREE_USD).await;
        node.payments.look_for_deposits().await.unwrap();
        assert_eq!((bench.deposits().await, node.balance_of(&wallet).await), (0, 0), "it is not final");

        bench.chain.mine(3).await;
        // Two nodes look at once, and both again.
        for _ in 0..2 {
            let (a, b) = tokio::join!(node.payments.look_for_deposits(), other.payments.look_for_deposits());
            a.unwrap();
            b.unwrap();
            bench.chain.mine(1).await;
        }
        assert_eq!(node.balance_of(&wallet).await, 3_000_000);
        let deposit = node.payment_of(&wallet).await.unwrap();
        assert_eq!(
            (deposit.kind, deposit.state, deposit.tx_hash),
            (Kind::Deposit, State::Finalized, Some(hash))
        );

        // Another of the same value is another.
        bench.deposit(wallet.address(), THREE_USD).await;
        bench.finalize_deposits(&node).await;
        assert_eq!((bench.deposits().await, node.balance_of(&wallet).await), (2, 6_000_000));
        bench.assert_reconciled(&node).await;
        // Ids are given without a gap, also where two nodes found the same.
        assert_eq!(bench.books.number("SELECT MAX(id) AS n FROM payments").await, 2);
    })
    .await;
}

#[tokio::test]
async fn a_deposit_waits_until_its_wallet_is_known() {
    each(async |bench| {
        let clock = Clock::fixed(Clock::System.now());
        let node = bench.watcher_at(clock.clone(), |_| {}).await;
        let payer = bench.payer(2 * FIVE_USD).await;
        bench.deposit(payer.address(), FIVE_USD).await;
        bench.finalize_deposits(&node).await;
        let waiting = node.payment_of(&payer).await.unwrap();
        assert_eq!((waiting.state, waiting.state.status()), (State::Mined, "pending"));
        assert_eq!(node.balance_of(&payer).await, 0);
        assert_eq!(node.payments.suspense().await.unwrap(), (1, MicroUsdc::new(5_000_000)));
        // The server finishes what is under way; this is not.
        node.run();
        clock.advance_seconds(700);
        assert_eq!(node.payments.slow().await.unwrap(), 0);

        assert_eq!(
            in_time("a payment", node.payments.pay(&payload(&bench.authorization(&payer)), None))
                .await
                .unwrap()
                .state,
            State::Credited
        );
        eventually("the deposit is credited", async || {
            (node.balance_of(&payer).await == 10_000_000).then_some(())
        })
        .await;
        assert_eq!(node.payments.suspense().await.unwrap().0, 0);
        bench.assert_reconciled(&node).await;
        node.crash().await;
    })
    .await;
}

#[tokio::test]
async fn each_of_several_transfers_of_a_transaction_is_a_deposit() {
    each(async |bench| {
        let node = bench.watcher().await;
        // Calls the token twice with whatever it is called with.
        let usdc = hex::encode(USDC);
        let code = format!("0x365f5f37{0}{0}00", format!("5f5f365f5f73{usdc}5af150"));
        bench.chain.rpc("anvil_setCode", json!([TWICE, code])).await;
        bench.chain.mint(TWICE, 2 * THREE_USD).await;
        bench.know(TWICE).await;
        let transfer = call(&transferCall { to: bench.treasury, value: U256::from(THREE_USD) });
        bench.chain.send(BYSTANDER, TWICE, &transfer).await;
        bench.finalize_deposits(&node).await;
        assert_eq!((bench.deposits().await, node.balance_at(TWICE).await), (2, 6_000_000));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn the_transfer_of_a_payment_in_the_journal_is_no_deposit() {
    each(async |bench| {
        let node = bench.watcher().await;
        // Sent by us, by somebody else, and by somebody else while ours waits.
        let (ours, theirs, late) =
            (bench.known(FIVE_USD).await, bench.known(FIVE_USD).await, bench.known(FIVE_USD).await);
        node.pay(&payload(&bench.authorization(&ours))).await;
        bench.chain.set_automine(false).await;
        let front_run = payload(&bench.authorization(&theirs));
        node.pay_and_leave(&front_run).await;
        bench.send_dearly(BYSTANDER, transfer_call(&front_run)).await;
        bench.chain.set_automine(true).await;
        bench.chain.mine(1).await;
        node.until(&theirs, State::Credited).await;
        let late_payload = payload(&bench.authorization(&late));
        let id = in_time("an admission", node.payments.accept(&late_payload, None)).await.unwrap();
        bench.front_run(&late_payload).await;

        bench.finalize_deposits(&node).await;
        assert_eq!(bench.deposits().await, 0);
        assert_eq!(node.balance_of(&late).await, 0, "its payment has not moved yet");
        assert_eq!(node.pay(&late_payload).await.id, id);
        for wallet in [&ours, &theirs, &late] {
            assert_eq!(node.balance_of(wallet).await, 5_000_000);
        }
        bench.finalize_deposits(&node).await;
        assert_eq!(bench.deposits().await, 0);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_payment_that_ended_before_its_transfer_was_seen_goes_on() {
    each(async |bench| {
        let node = bench.watcher().await;
        let payer = bench.known(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        in_time("an admission", node.payments.accept(&payload, None)).await.unwrap();
        bench.front_run(&payload).await;
        // As an endpoint that denied the transfer would have it.
        bench.books.sql("UPDATE payments SET state = 'expired'").await.unwrap();
        bench.finalize_deposits(&node).await;
        assert_eq!(
            (bench.deposits().await, node.payment_of(&payer).await.unwrap().state),
            (0, State::Verified)
        );
        node.run();
        node.until(&payer, State::Finalized).await;
        assert_eq!(node.balance_of(&payer).await, 5_000_000);
        bench.assert_reconciled(&node).await;
        node.crash().await;
    })
    .await;
}

#[tokio::test]
async fn a_payload_that_comes_after_its_transfer_is_the_deposit() {
    each(async |bench| {
        let node = bench.watcher().await;
        let (known, unknown) = (bench.known(FIVE_USD).await, bench.payer(FIVE_USD).await);
        for (wallet, waits) in [(&known, false), (&unknown, true)] {
            let authorization = bench.authorization(wallet);
            let sent_late = payload(&authorization);
            bench.front_run(&sent_late).await;
            bench.finalize_deposits(&node).await;
            let deposit = node.payment_of(wallet).await.unwrap();
            assert_eq!(deposit.state, if waits { State::Mined } else { State::Finalized });

            // Not by who has read it off the chain and changed it, nor for a request: that is what its payer
            // would have sent to us first.
            let mut longer = authorization.clone();
            longer.valid_before = (unix_seconds() + 7200).to_string();
            let forged = signed_payload(&longer, &authorization.signature());
            assert_eq!(node.refusal(&forged).await.0, Reason::InvalidSignature);
            let inline = node.payments.recognise(&sent_late, Some("a request")).await;
            assert!(matches!(inline, Err(PaymentError::MadeForAnother)), "{inline:?}");

            let paid = node.pay(&sent_late).await;
            assert_eq!((paid.id, paid.state), (deposit.id, State::Finalized));
            assert_eq!(node.pay(&sent_late).await, paid);
            bench.finalize_deposits(&node).await;
            assert_eq!(node.balance_of(wallet).await, 5_000_000);
        }
        bench.assert_reconciled(&node).await;
    })
    .await;
}

/// Until it is final it is in no journal, and anybody can read it off the chain.
#[tokio::test]
async fn a_payload_that_is_in_the_chain_already_buys_nothing_and_is_its_payers() {
    each(async |bench| {
        for node in [bench.node().await, bench.watcher().await] {
            let payer = bench.payer(FIVE_USD).await;
            let public = payload(&bench.authorization(&payer));
            bench.front_run(&public).await;
            for _ in 0..2 {
                let known = node.payments.recognise(&public, Some("a request")).await;
                let bought = match known {
                    Ok(known) => node.payments.pay_for(&public, "a request", known).await,
                    Err(refusal) => Err(refusal),
                };
                assert!(matches!(bought, Err(PaymentError::MadeForAnother)), "{bought:?}");
            }
            assert_eq!(node.until(&payer, State::Credited).await.request_hash, None);
            bench.finalize_deposits(&node).await;
            assert_eq!((node.balance_of(&payer).await, bench.deposits().await), (5_000_000, 0));
        }
        let node = bench.node().await;
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_nonce_that_was_used_for_another_transfer_than_the_one_sent_to_us_is_a_deposit() {
    each(async |bench| {
        let node = bench.watcher().await;
        let payer = bench.known(FIVE_USD + THREE_USD).await;
        let mut sent = bench.authorization(&payer);
        sent.valid_before = (unix_seconds() + 600).to_string();
        let mut used = payer.authorization(bench.treasury, THREE_USD);
        used.nonce = sent.nonce;
        in_time("an admission", node.payments.accept(&payload(&sent), None)).await.unwrap();
        bench.front_run(&payload(&used)).await;
        bench.finalize_deposits(&node).await;
        bench.finalize_deposits(&node).await;
        assert_eq!((bench.deposits().await, node.balance_of(&payer).await), (1, 3_000_000));
        assert_eq!(node.refusal(&payload(&used)).await.0, Reason::NonceAlreadyUsed);
        // What was sent to us can never be carried out.
        bench.warp(1200).await;
        let ended = in_time("its end", node.payments.pay(&payload(&sent), None)).await.unwrap();
        assert_eq!(ended.state, State::Cancelled);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_no_customers_money_is_kept_and_shown() {
    each(async |bench| {
        let node = bench.watcher().await;
        let relayer = bench.relayer.address();
        let dust = bench.known(THREE_USD).await;
        let stranger = bench.payer(THREE_USD).await;
        bench.know(relayer).await;
        bench.chain.mint(relayer, THREE_USD).await;
        bench.chain.mint(bench.treasury, THREE_USD).await;
        // Of these the minted, the relayer's, the stranger's and what is too little are kept.
        bench.transfer(bench.treasury, bench.treasury, THREE_USD).await;
        bench.deposit(dust.address(), 0).await;
        bench.deposit(dust.address(), 999_999).await;
        bench.deposit(dust.address(), 1_000_000).await;
        bench.deposit(stranger.address(), THREE_USD).await;
        bench.deposit(relayer, THREE_USD).await;
        bench.finalize_deposits(&node).await;
        assert_eq!(node.payments.suspense().await.unwrap(), (4, MicroUsdc::new(9_999_999)));
        assert_eq!(bench.deposits().await, 5);
        assert_eq!(node.balance_of(&dust).await, 1_000_000);

        let report = bench.audit(&node).await;
        let not_ok: Vec<_> = report.0.iter().filter(|row| row.verdict != Verdict::Ok).collect();
        assert!(!report.has_drift() && not_ok.len() == 1, "{report}");
        assert_eq!((not_ok[0].check, not_ok[0].verdict), ("each deposit is credited", Verdict::Warning));

        // The operator decides.
        let listed = operator::said(&bench.books, &["payments", "suspense"]);
        assert!(
            listed.contains(&stranger.shown()) && listed.contains("4 deposits of 9.999999 USDC"),
            "{listed}"
        );
        let id_of = |wallet: Address| {
            let line = listed.lines().find(|line| line.contains(&wallet.to_string())).unwrap();
            line.split_whitespace().next().unwrap().to_owned()
        };
        let friend = TestWallet::random();
        let to = ["--to", &friend.shown()];
        let attribute =
            |wallet| ["payments".to_owned(), "attribute".into(), id_of(wallet), "a ticket".into()];
        let [a, b, c, d] = attribute(stranger.address());
        let args = [a.as_str(), &b, &c, &d, to[0], to[1]];
        operator::said(&bench.books, &args);
        assert!(operator::refused(&bench.books, &args).contains("is not a deposit in suspense"));
        let [a, b, c, d] = attribute(dust.address());
        operator::said(&bench.books, &[&a, &b, &c, &d]);
        assert_eq!(node.balance_of(&stranger).await, 0);
        assert_eq!(node.balance_of(&friend).await, 3_000_000);
        assert_eq!(node.balance_of(&dust).await, 1_999_999);
        // Each is in the list of whom it was given to.
        assert_eq!(node.payment_of(&stranger).await, None);
        assert_eq!(node.payment_of(&friend).await.unwrap().last_error.as_deref(), Some("a ticket"));
        bench.finalize_deposits(&node).await;
        assert_eq!(node.payments.suspense().await.unwrap().0, 2);
        assert!(!bench.audit(&node).await.has_drift());
    })
    .await;
}

#[tokio::test]
async fn the_first_search_begins_where_it_is_told_to() {
    each(async |bench| {
        let wallet = bench.known(3 * THREE_USD).await;
        bench.deposit(wallet.address(), THREE_USD).await;
        bench.chain.mine(3).await;
        // With what becomes final from now on.
        let node = bench
            .watcher_with(|config| {
                config.deposits = Some(config::Deposits { min: MicroUsdc::new(1), from_block: None });
            })
            .await;
        bench.deposit(wallet.address(), THREE_USD).await;
        bench.finalize_deposits(&node).await;
        bench.finalize_deposits(&node).await;
        assert_eq!(node.balance_of(&wallet).await, 3_000_000, "what was before is not searched");

        // A search that is under way is not begun anew, whatever the file says.
        let told = bench.watcher().await;
        bench.finalize_deposits(&told).await;
        assert_eq!(told.balance_of(&wallet).await, 3_000_000);
        // Of an address that was never searched, from there on.
        bench.books.sql("DELETE FROM deposit_cursors").await.unwrap();
        bench.finalize_deposits(&told).await;
        assert_eq!(told.balance_of(&wallet).await, 6_000_000);
        bench.assert_reconciled(&told).await;
    })
    .await;
}

/// A provider with a limit of ten blocks.
fn more_than_ten_blocks(params: &Value) -> bool {
    let block = |name: &str| {
        u64::from_str_radix(params[0][name].as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
    };
    block("toBlock") - block("fromBlock") >= 10
}

#[tokio::test]
async fn a_long_outage_is_made_up_for_within_a_providers_limits() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        rpc.break_methods(&[("eth_getLogs", Fault::Refused(more_than_ten_blocks))]);
        let node = bench.watcher_with(|config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
        let wallet = bench.known(4 * THREE_USD).await;
        for _ in 0..4 {
            bench.deposit(wallet.address(), THREE_USD).await;
            bench.chain.mine(120).await;
        }
        bench.finalize_deposits(&node).await;
        assert_eq!((bench.deposits().await, node.balance_of(&wallet).await), (4, 12_000_000));
        let head = i64::try_from(bench.chain.head().await).unwrap();
        assert_eq!(bench.books.number("SELECT next_block AS n FROM deposit_cursors").await, head - 1);
    })
    .await;
}

fn asks_for_transfers(params: &Value) -> bool {
    params[0]["topics"]
        .to_string()
        .contains("0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef")
}

/// The receipts of a block as Base has them: of the first there is no such type on Ethereum.
fn of_a_rollup(_: &Value, mut receipts: Value) -> Value {
    let list = receipts.as_array_mut().unwrap();
    let Some(mut attributes) = list.first().cloned() else { return receipts };
    attributes["type"] = json!("0x7e");
    attributes["logs"] = json!([]);
    attributes["depositNonce"] = json!("0x1f4b0a2");
    attributes["depositReceiptVersion"] = json!("0x1");
    list.insert(0, attributes);
    receipts
}

/// Anybody can fill a block with more transfers than a provider has an answer for.
#[tokio::test]
async fn a_block_whose_transfers_are_refused_is_searched_by_its_receipts() {
    each(async |bench| {
        let rpc = FaultyRpc::start(&bench.chain.url).await;
        let node = bench.watcher_with(|config| config.rpc_urls = vec![rpc.url.parse().unwrap()]).await;
        let wallets = [bench.known(FIVE_USD).await, bench.known(FIVE_USD).await];
        rpc.break_methods(&[
            ("eth_getLogs", Fault::Refused(asks_for_transfers)),
            ("eth_getBlockReceipts", Fault::Lie(of_a_rollup)),
        ]);
        for wallet in &wallets {
            bench.deposit(wallet.address(), FIVE_USD).await;
            bench.transfer(MINTER, STRANGER, 0).await;
        }
        bench.finalize_deposits(&node).await;
        assert_eq!(bench.deposits().await, 2);
        for wallet in &wallets {
            assert_eq!(node.balance_of(wallet).await, 5_000_000);
        }
        assert!(rpc.heard().contains("eth_getBlockReceipts"));
        rpc.mend();
        bench.assert_reconciled(&node).await;
    })
    .await;
}

/// An endpoint may show an authorization's log at one time, and not at another.
#[tokio::test]
async fn a_transfer_that_is_seen_otherwise_than_before_holds_nobody_up() {
    each(async |bench| {
        let node = bench.watcher().await;
        let stranger = bench.payer(FIVE_USD).await;
        bench.front_run(&payload(&bench.authorization(&stranger))).await;
        bench.finalize_deposits(&node).await;
        let other = "UPDATE payments SET nonce = '0x00000000000000000000000000000000000000000000000000000000000000aa'";
        assert_eq!(bench.books.sql(other).await.unwrap(), 1);
        let wallet = bench.known(FIVE_USD).await;
        bench.deposit(wallet.address(), FIVE_USD).await;
        bench.finalize_deposits(&node).await;
        assert_eq!((node.balance_of(&wallet).await, bench.deposits().await), (5_000_000, 2));
        bench.know(stranger.address()).await;
        node.payments.look_for_deposits().await.unwrap();
        assert_eq!(node.balance_of(&stranger).await, 5_000_000);
    })
    .await;
}

/// Where one endpoint alone has shown a payment's transfer, another may be.
#[tokio::test]
async fn a_final_deposit_is_not_kept_out_by_a_payment_that_was_seen_in_its_place() {
    each(async |bench| {
        let first = bench.watcher().await;
        let payer = bench.payer(FIVE_USD).await;
        let payload = payload(&bench.authorization(&payer));
        bench.chain.set_automine(false).await;
        first.pay_and_leave(&payload).await;
        let sent = first.until(&payer, State::Broadcast).await;
        first.crash().await;
        bench.chain.rpc("anvil_dropTransaction", json!([sent.tx_hash])).await;
        bench.chain.set_automine(true).await;
        let wallet = bench.known(FIVE_USD).await;
        let hash = bench.deposit(wallet.address(), FIVE_USD).await;
        let seen = "UPDATE payments SET state = 'mined', tx_hash = $2, block_number = 1, block_hash = '0x01', log_index = 0
                    WHERE id = $1";
        bench.books.sql_with(seen, vec![sent.id.into(), hash.into()]).await;

        let node = bench.watcher().await;
        bench.finalize_deposits(&node).await;
        assert_eq!((node.balance_of(&wallet).await, bench.deposits().await), (5_000_000, 1));
        // The payment goes on, and ends elsewhere.
        assert_eq!(node.pay(&payload).await.state, State::Credited);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

/// A final block that stands still while the head moves.
fn final_long_ago(params: &Value, mut block: Value) -> Value {
    if params[0] == "finalized" {
        block["number"] = json!("0x1");
    }
    block
}

#[tokio::test]
async fn of_three_endpoints_one_whose_final_block_stands_still_holds_nothing_up() {
    each(async |bench| {
        let stuck = FaultyRpc::start(&bench.chain.url).await;
        let urls = [&stuck.url, &bench.chain.url, &bench.chain.url].map(|url| url.parse().unwrap());
        let node = bench.watcher_with(|config| config.rpc_urls = urls.to_vec()).await;
        let wallet = bench.known(FIVE_USD).await;
        stuck.break_methods(&[("eth_getBlockByNumber", Fault::Lie(final_long_ago))]);
        bench.deposit(wallet.address(), FIVE_USD).await;
        bench.finalize_deposits(&node).await;
        assert_eq!(node.balance_of(&wallet).await, 5_000_000);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

/// It begins there for good: what arrived before may have been dealt with by hand.
#[tokio::test]
async fn the_first_search_does_not_begin_where_one_of_two_endpoints_has_stopped() {
    each(async |bench| {
        let (stuck, other) =
            (FaultyRpc::start(&bench.chain.url).await, FaultyRpc::start(&bench.chain.url).await);
        let urls = [&stuck, &other].map(|rpc| rpc.url.parse().unwrap());
        bench.chain.mine(400).await;
        let node = bench
            .node_with(|config| {
                config.rpc_urls = urls.to_vec();
                config.deposits = Some(config::Deposits { min: MicroUsdc::new(1), from_block: None });
            })
            .await;
        stuck.break_methods(&[("eth_getBlockByNumber", Fault::Lie(final_long_ago))]);
        let refused = node.payments.look_for_deposits().await.unwrap_err();
        assert!(refused.to_string().contains("apart"), "{refused}");
        other.break_methods(&[("eth_getBlockByNumber", Fault::Unreachable)]);
        assert!(node.payments.look_for_deposits().await.is_err(), "one alone does not say where");
        assert_eq!(bench.books.number("SELECT COUNT(*) AS n FROM deposit_cursors").await, 0);
        stuck.mend();
        other.mend();
        eventually("both are asked again", async || {
            node.payments.check_chain().await;
            node.payments.look_for_deposits().await.ok()
        })
        .await;
        assert!(bench.books.number("SELECT first_block AS n FROM deposit_cursors").await > 300);
    })
    .await;
}

/// A transfer to the treasury in block 3, by a wallet that is known.
fn invented_deposit(params: &Value, _: Value) -> Value {
    let topics = &params[0]["topics"];
    let flat = |topic: &Value| topic.as_array().map_or(topic.clone(), |any| any[0].clone());
    if flat(&topics[0]) != "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef" {
        return json!([]);
    }
    json!([{
        "address": USDC,
        "topics": [flat(&topics[0]), format!("0x{}", word(LIARS_FRIEND)), flat(&topics[2])],
        "data": format!("0x{FIVE_USD:064x}"),
        "blockNumber": "0x3",
        "blockHash": format!("0x{:064x}", 3),
        "transactionHash": format!("0x{:064x}", 77),
        "transactionIndex": "0x0",
        "logIndex": "0x1",
        "removed": false,
    }])
}

const LIARS_FRIEND: Address = address!("000000000000000000000000000000000000f1e9");

fn nothing(_: &Value, _: Value) -> Value {
    json!([])
}

/// The same logs, of another block of that number.
fn in_another_block(_: &Value, mut logs: Value) -> Value {
    for log in logs.as_array_mut().into_iter().flatten() {
        log["blockHash"] = json!(format!("0x{:064x}", 4));
    }
    logs
}

#[tokio::test]
async fn no_deposit_rests_on_one_endpoint_of_two() {
    each(async |bench| {
        let (liar, honest) =
            (FaultyRpc::start(&bench.chain.url).await, FaultyRpc::start(&bench.chain.url).await);
        let urls = [&liar, &honest].map(|rpc| rpc.url.parse().unwrap());
        let node = bench.watcher_with(|config| config.rpc_urls = urls.to_vec()).await;
        bench.know(LIARS_FRIEND).await;
        let wallet = bench.known(FIVE_USD).await;
        bench.chain.mine(3).await;
        node.payments.look_for_deposits().await.unwrap();
        bench.deposit(wallet.address(), FIVE_USD).await;
        bench.chain.mine(3).await;
        let cursor = bench.books.number("SELECT next_block AS n FROM deposit_cursors").await;

        for lie in [invented_deposit, nothing, in_another_block] {
            liar.break_methods(&[("eth_getLogs", Fault::Lie(lie))]);
            node.payments.look_for_deposits().await.unwrap();
            assert_eq!(bench.deposits().await, 0);
        }
        // Nor on one that is alone: the other may know better.
        liar.mend();
        honest.break_methods(&[("eth_getLogs", Fault::Unreachable)]);
        assert!(node.payments.look_for_deposits().await.is_err());
        honest.break_methods(&[("eth_getBlockByNumber", Fault::Unreachable)]);
        assert!(node.payments.look_for_deposits().await.is_err());
        assert_eq!(bench.deposits().await, 0);
        // The search has not gone past what they contradicted each other about.
        let now = bench.books.number("SELECT next_block AS n FROM deposit_cursors").await;
        assert!(now <= i64::try_from(bench.chain.head().await).unwrap() - 3 && now >= cursor, "{now}");

        honest.mend();
        eventually("both are asked again", async || {
            node.payments.check_chain().await;
            bench.chain.mine(1).await;
            node.payments.look_for_deposits().await.ok()?;
            (node.balance_of(&wallet).await == 5_000_000).then_some(())
        })
        .await;
        assert_eq!((bench.deposits().await, node.balance_at(LIARS_FRIEND).await), (1, 0));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn of_three_endpoints_the_one_that_invents_a_deposit_is_put_aside() {
    each(async |bench| {
        let liar = FaultyRpc::start(&bench.chain.url).await;
        let urls = [&liar.url, &bench.chain.url, &bench.chain.url].map(|url| url.parse().unwrap());
        let node = bench.watcher_with(|config| config.rpc_urls = urls.to_vec()).await;
        bench.know(LIARS_FRIEND).await;
        let wallet = bench.known(FIVE_USD).await;
        bench.deposit(wallet.address(), FIVE_USD).await;
        liar.break_methods(&[("eth_getLogs", Fault::Lie(invented_deposit))]);
        bench.finalize_deposits(&node).await;
        assert_eq!((node.balance_of(&wallet).await, node.balance_at(LIARS_FRIEND).await), (5_000_000, 0));
        // The audit asks one endpoint for logs, and no longer this one.
        bench.assert_reconciled(&node).await;
    })
    .await;
}

/// How many polls a search takes at the most: some are cut off at each.
const POLLS: u32 = 60;
const BLOCKS: u32 = 40;

#[tokio::test]
async fn a_search_begun_anew_at_every_block_of_a_chain_with_reorgs_finds_each_deposit_once() {
    each(async |bench| {
        let (known, unknown) = (bench.known(BLOCKS.into()).await, bench.payer(BLOCKS.into()).await);
        bench.chain.mine(4).await;
        let mut sent = 0_u32;
        for block in 0..BLOCKS {
            let a_micro = |config: &mut config::Payments| {
                config.deposits = Some(config::Deposits { min: MicroUsdc::new(1), from_block: Some(1) });
            };
            let node = bench.node_with(a_micro).await;
            match block % 4 {
                // What was not final is gone, some of it for good.
                3 => drop(bench.chain.rpc("anvil_reorg", json!([2, []])).await),
                2 => bench.chain.mine(1).await,
                _ => {
                    let from = if block % 8 < 4 { &known } else { &unknown };
                    bench.deposit(from.address(), 1).await;
                    sent += 1;
                }
            }
            // Dies somewhere in its search.
            cut_off(block * POLLS / BLOCKS, node.payments.look_for_deposits()).await;
            if block == BLOCKS / 2 {
                bench.know(unknown.address()).await;
            }
            node.crash().await;
        }
        let node = bench.watcher_with(|config| {
            config.deposits = Some(config::Deposits { min: MicroUsdc::new(1), from_block: Some(1) });
        });
        let node = node.await;
        bench.finalize_deposits(&node).await;
        let arrived = i64::try_from(bench.chain.usdc_of(bench.treasury).await).unwrap();
        assert!(arrived > 5 && arrived < i64::from(sent), "{arrived} of {sent} are to be there");
        assert_eq!(bench.deposits().await, arrived);
        assert_eq!(node.balance_of(&known).await + node.balance_of(&unknown).await, arrived);
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_search_cut_off_anywhere_loses_nothing() {
    each(async |bench| {
        let wallet = bench.known(POLLS.into()).await;
        let a_micro = |config: &mut config::Payments| {
            config.deposits = Some(config::Deposits { min: MicroUsdc::new(1), from_block: Some(1) });
        };
        for polls in 0..POLLS {
            bench.deposit(wallet.address(), 1).await;
            bench.chain.mine(3).await;
            let node = bench.node_with(a_micro).await;
            cut_off(polls, node.payments.look_for_deposits()).await;
            // Further than what is searched twice, so that nothing makes up for a cursor that is ahead.
            bench.chain.mine(70).await;
        }
        let node = bench.node_with(a_micro).await;
        node.payments.look_for_deposits().await.unwrap();
        assert_eq!(bench.deposits().await, i64::from(POLLS));
        assert_eq!(node.balance_of(&wallet).await, i64::from(POLLS));
        bench.assert_reconciled(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_deposit_is_its_wallets_once_it_has_signed_in() {
    let chain = Arc::new(TestChain::start());
    let payments = "deposits = true\nmin_deposit_usd = \"0.50\"\ndeposits_from_block = 1".to_owned();
    let gateway =
        Gateway::start_with(Setup { payments, ..Setup::new(&chain, "http://127.0.0.1:9/v1") }).await;
    let wallet = TestWallet::random();
    chain.mint(wallet.address(), THREE_USD).await;
    chain.rpc("anvil_impersonateAccount", json!([wallet.address()])).await;
    chain.give_gas(wallet.address()).await;
    let transfer = call(&transferCall { to: gateway.setup.pay_to, value: U256::from(THREE_USD) });
    let hash = chain.send(wallet.address(), USDC, &transfer).await;
    chain.mine(3).await;
    let listed = || async {
        let path = format!("/v1/topups/{}{}", wallet.address(), gateway.sign_in(&wallet).query());
        gateway.get(&path).send().await.expect(200).json()["topups"].clone()
    };
    let credited = eventually("the deposit is credited", async || {
        Some(listed().await).filter(|rows| rows[0]["status"] == "finalized")
    })
    .await;
    assert_eq!(credited.as_array().unwrap().len(), 1, "{credited}");
    let row = &credited[0];
    assert_eq!(
        (&row["kind"], &row["amount_usdc"], &row["tx_hash"]),
        (&json!("deposit"), &json!(THREE_USD), &json!(hash))
    );
    assert_eq!(gateway.balance(&wallet).await.available, THREE_USD);
    assert_eq!(gateway.get("/v1/status").send().await.expect(200).json()["deposits"]["min_usd"], "0.5");

    // What a stranger has sent, and the operator gives to this wallet, is this wallet's: so it is signed.
    let stranger = TestWallet::random();
    chain.mint(stranger.address(), THREE_USD).await;
    let authorization = stranger.authorization(gateway.setup.pay_to, THREE_USD);
    chain.send(BYSTANDER, USDC, &transfer_call(&payload(&authorization))).await;
    chain.mine(3).await;
    let id = eventually("it is in suspense", async || {
        let listed = gateway.run_with(&["payments", "suspense"]).stdout;
        let listed = String::from_utf8(listed).unwrap();
        let line = listed.lines().find(|line| line.contains(&stranger.shown()))?;
        line.split_whitespace().next().map(str::to_owned)
    })
    .await;
    let given = gateway.run_with(&["payments", "attribute", &id, "a ticket", "--to", &wallet.shown()]);
    assert!(given.status.success(), "{given:?}");
    let row = &listed().await[0];
    assert_eq!((&row["wallet"], &row["from"]), (&json!(wallet.shown()), &json!(stranger.shown())));
    assert_eq!(gateway.balance(&wallet).await.available, 2 * THREE_USD);
    let sent = gateway.post("/v1/topup").header("x-payment", &authorization.sign().v1_header()).send().await;
    assert_eq!(sent.expect(402).decoded("payment-required")["error"], "invalid_exact_evm_nonce_already_used");
    gateway.audit();
}
