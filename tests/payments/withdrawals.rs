//! Balances that go back to their wallets: paid once, whatever is sent twice, dies, or is undone.

use std::sync::Arc;

use farebox::ledger::LedgerError;
use farebox::payments::{Kind, WithdrawalError};

use crate::payments::bench::*;
use crate::payments::journal_model::cut_off;
use crate::support::books::hold;
use crate::support::gateway::{Answer, Gateway, Setup, farebox_command};
use crate::support::operator;

const ONE: MicroUsdc = MicroUsdc::new(1_000_000);
const TWO: MicroUsdc = MicroUsdc::new(2_000_000);
/// Longer than a withdrawal's authorization is good.
const EXPIRED: i64 = 3700;

alloy::sol! {
    function unBlacklist(address account) external;
}

/// A gateway's chain and books, and the treasury's key.
struct Till {
    bench: Bench,
    key: TestWallet,
}

impl std::ops::Deref for Till {
    type Target = Bench;

    fn deref(&self) -> &Bench {
        &self.bench
    }
}

async fn each_till(test: impl AsyncFn(&Till)) {
    for books in [Books::sqlite().await, Books::postgres().await] {
        println!("on {}", books.db.kind());
        let key = TestWallet::random();
        let bench = Bench { treasury: key.address(), ..Bench::new(books).await };
        let till = Till { bench, key };
        test(&till).await;
        till.bench.books.discard().await;
    }
}

impl Till {
    /// A process that pays out.
    async fn payer_out(&self) -> Node {
        self.payer_out_at(Clock::System, |_| {}).await
    }

    async fn payer_out_at(&self, clock: Clock, change: impl FnOnce(&mut config::Payments)) -> Node {
        let key = self.key.private_key();
        let with_key = |config: &mut config::Payments| {
            config.treasury_key = Some(key.into());
            change(config);
        };
        self.node_at(clock, with_key).await
    }

    /// A wallet with a balance here that is final.
    async fn saver(&self, node: &Node, micro: u64) -> TestWallet {
        let saver = self.payer(micro).await;
        let paid = node.pay(&payload(&saver.authorization(self.treasury, micro))).await;
        assert_eq!(paid.state, State::Credited);
        self.chain.mine(3).await;
        node.payments.upkeep().await.unwrap();
        saver
    }

    /// What a withdrawal has come to, while the chain goes on.
    async fn until(&self, node: &Node, withdrawal: &Payment, state: State) -> Payment {
        eventually(&format!("the withdrawal is {}", state.as_str()), async || {
            self.chain.mine(1).await;
            let found = node.payments.withdrawal(withdrawal.wallet(), withdrawal.id).await.unwrap().unwrap();
            (found.state == state).then_some(found)
        })
        .await
    }

    async fn paid_to(&self, wallet: &TestWallet) -> u64 {
        self.chain.usdc_of(wallet.address()).await
    }

    /// The books agree with themselves and the chain, and the treasury holds just what wallets own.
    async fn assert_squared(&self, node: &Node) {
        let report = self.audit(node).await;
        assert!(report.0.iter().all(|row| row.verdict == Verdict::Ok), "{report}");
        let owned = "SELECT CAST(COALESCE(SUM(balance_micro), 0) AS BIGINT) AS n FROM wallets";
        let held = i64::try_from(self.chain.usdc_of(self.treasury).await).unwrap();
        assert_eq!(held, self.books.number(owned).await);
    }
}

impl Node {
    async fn withdraw(
        &self,
        wallet: &TestWallet,
        amount: MicroUsdc,
        name: &str,
    ) -> Result<Payment, WithdrawalError> {
        in_time("a withdrawal", self.payments.withdraw(Wallet(wallet.address()), amount, name)).await
    }

    /// Balance and what of it is locked.
    async fn owned(&self, wallet: &TestWallet) -> (i64, i64) {
        let balance = self.ledger.balance(Wallet(wallet.address())).await.unwrap();
        (balance.balance.get(), balance.locked.get())
    }
}

#[tokio::test]
async fn a_withdrawal_leaves_the_balance_once_it_is_final() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let saver = till.saver(&node, FIVE_USD).await;
        let asked = node.withdraw(&saver, TWO, "rent").await.unwrap();
        assert_eq!(
            (asked.kind, asked.wallet(), asked.value),
            (Kind::Withdrawal, Wallet(saver.address()), TWO)
        );
        // Sent, and not final: the money is locked, and the books are as they should be all the while.
        eventually("it is mined", async || {
            let found = node.payments.withdrawal(asked.wallet(), asked.id).await.unwrap().unwrap();
            (found.state == State::Mined).then_some(())
        })
        .await;
        assert_eq!(
            (till.paid_to(&saver).await, node.owned(&saver).await),
            (2_000_000, (5_000_000, 2_000_000))
        );
        assert!(till.audit(&node).await.0.iter().all(|row| row.verdict == Verdict::Ok));

        let done = till.until(&node, &asked, State::Finalized).await;
        assert_eq!(node.owned(&saver).await, (3_000_000, 0));
        assert_eq!(till.paid_to(&saver).await, 2_000_000);
        let entries = node.ledger.entries(done.wallet(), 1).await.unwrap();
        assert_eq!(
            (entries[0].kind.as_str(), entries[0].amount.get(), &entries[0].reference),
            ("withdrawal", -2_000_000, &done.id.to_string())
        );
        assert_eq!(till.sent_by_relayer().await, "0x2");
        assert_eq!(till.chain.sent_by(till.treasury).await, 0, "the treasury needs no gas");
        till.assert_squared(&node).await;

        // A list of payments in does not show it, nor does anything drive it any more.
        assert_eq!(node.payments.of_wallet(Wallet(till.treasury), None, 10).await.unwrap(), []);
        assert_eq!(node.payments.open_withdrawals().await.unwrap(), (0, MicroUsdc::ZERO));
    })
    .await;
}

#[tokio::test]
async fn a_withdrawal_asked_for_many_times_is_one() {
    each_till(async |till| {
        let nodes = [till.payer_out().await, till.payer_out().await];
        let saver = till.saver(&nodes[0], FIVE_USD).await;
        let asked = (0..10).map(|number: usize| {
            let node = &nodes[number % 2];
            node.withdraw(&saver, TWO, "rent")
        });
        let mut ids: Vec<_> =
            futures_util::future::join_all(asked).await.into_iter().map(|asked| asked.unwrap().id).collect();
        ids.dedup();
        assert_eq!(ids.len(), 1, "{ids:?}");
        assert_eq!(nodes[0].owned(&saver).await.1, 2_000_000);
        assert!(matches!(nodes[1].withdraw(&saver, ONE, "rent").await, Err(WithdrawalError::NameReused)));
        // Another wallet's of the same name is another.
        let other = till.saver(&nodes[0], FIVE_USD).await;
        assert_ne!(nodes[0].withdraw(&other, TWO, "rent").await.unwrap().id, ids[0]);

        let first = nodes[0].withdraw(&saver, TWO, "rent").await.unwrap();
        let done = till.until(&nodes[0], &first, State::Finalized).await;
        assert_eq!(nodes[1].withdraw(&saver, TWO, "rent").await.unwrap(), done);
        assert_eq!((till.paid_to(&saver).await, nodes[0].owned(&saver).await), (2_000_000, (3_000_000, 0)));
        // Ids are given without a gap.
        let gaps = "SELECT MAX(id) - COUNT(*) AS n FROM payments";
        assert_eq!(till.books.number(gaps).await, 0);
    })
    .await;
}

#[tokio::test]
async fn one_that_is_overtaken_by_the_same_is_the_same() {
    each_till(async |till| {
        let quick = till.payer_out().await;
        let saver = till.saver(&quick, FIVE_USD).await;
        let rpc = FaultyRpc::start(&till.chain.url).await;
        let slow = |config: &mut config::Payments| config.rpc_urls = vec![rpc.url.parse().unwrap()];
        let slow = till.payer_out_at(Clock::System, slow).await;
        // Which is asked of the chain once it is seen that there is no such withdrawal yet.
        rpc.break_methods(&[("eth_call", Fault::HeldBack(|_| true))]);
        let (asked, first) = tokio::join!(slow.withdraw(&saver, TWO, "rent"), async {
            rpc.held_back().await;
            let first = quick.withdraw(&saver, TWO, "rent").await.unwrap();
            let done = till.until(&quick, &first, State::Finalized).await;
            rpc.mend();
            done
        });
        assert_eq!(asked.unwrap(), first);
        assert_eq!((till.paid_to(&saver).await, quick.owned(&saver).await), (2_000_000, (3_000_000, 0)));
    })
    .await;
}

#[tokio::test]
async fn only_what_is_final_free_and_the_wallets_own_can_leave() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let nothing = |asked: Result<Payment, WithdrawalError>, left: i64| match asked {
            Err(WithdrawalError::NotWithdrawable { withdrawable }) => assert_eq!(withdrawable.get(), left),
            other => panic!("{other:?}"),
        };
        let saver = till.payer(FIVE_USD).await;
        let wallet = Wallet(saver.address());
        nothing(node.withdraw(&saver, ONE, "a").await, 0);
        assert_eq!(node.pay(&payload(&till.authorization(&saver))).await.state, State::Credited);
        nothing(node.withdraw(&saver, ONE, "a").await, 0);
        till.chain.mine(3).await;
        node.payments.upkeep().await.unwrap();

        node.ledger.hold(&hold("req_open", wallet, 3_500_000)).await.unwrap();
        nothing(node.withdraw(&saver, TWO, "a").await, 1_500_000);
        node.ledger.end(&Ending::released(hold("req_open", wallet, 3_500_000), "test")).await.unwrap();

        node.ledger.freeze(wallet, Some("stolen".into())).await.unwrap();
        let frozen = node.withdraw(&saver, TWO, "a").await;
        assert!(matches!(frozen, Err(WithdrawalError::Ledger(LedgerError::Frozen(_)))), "{frozen:?}");
        till.books.sql("UPDATE wallets SET frozen_reason = NULL, debt_micro = 1").await.unwrap();
        let in_debt = node.withdraw(&saver, TWO, "a").await;
        assert!(matches!(in_debt, Err(WithdrawalError::InDebt(_))), "{in_debt:?}");
        assert_eq!(node.payments.withdrawable(wallet).await.unwrap(), MicroUsdc::ZERO);
        till.books.sql("UPDATE wallets SET debt_micro = 0").await.unwrap();
        assert_eq!(node.owned(&saver).await, (5_000_000, 0));
        assert!(matches!(
            node.withdraw(&saver, MicroUsdc::new(999_999), "a").await,
            Err(WithdrawalError::TooLittle(ONE))
        ));

        // Of many at once there are as many as fit, and what they lock cannot be spent.
        let names: Vec<_> = (0..5).map(|number| format!("at once {number}")).collect();
        let asked = names.iter().map(|name| node.withdraw(&saver, TWO, name));
        let asked = futures_util::future::join_all(asked).await;
        assert_eq!(asked.iter().filter(|asked| asked.is_ok()).count(), 2, "{asked:?}");
        let refused = node.ledger.hold(&hold("req_more", wallet, 1_000_001)).await;
        assert!(matches!(refused, Err(LedgerError::Insufficient { .. })), "{refused:?}");
        for withdrawal in asked.into_iter().flatten() {
            till.until(&node, &withdrawal, State::Finalized).await;
        }
        assert_eq!((till.paid_to(&saver).await, node.owned(&saver).await), (4_000_000, (1_000_000, 0)));
        till.assert_squared(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_wallet_frozen_or_in_debt_when_its_row_is_taken_takes_nothing_out() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let saver = till.saver(&node, FIVE_USD).await;
        // The first look is past when the chain is asked; then the operator is quicker.
        for (change, undo) in [
            ("UPDATE wallets SET frozen_reason = 'stolen'", "UPDATE wallets SET frozen_reason = NULL"),
            ("UPDATE wallets SET debt_micro = 1", "UPDATE wallets SET debt_micro = 0"),
            ("UPDATE wallets SET locked_micro = 4000000", "UPDATE wallets SET locked_micro = 0"),
        ] {
            let rpc = FaultyRpc::start(&till.chain.url).await;
            let slow =
                till.payer_out_at(Clock::System, |config| config.rpc_urls = vec![rpc.url.parse().unwrap()]);
            let slow = slow.await;
            rpc.break_methods(&[("eth_call", Fault::HeldBack(|_| true))]);
            let asked = slow.withdraw(&saver, TWO, "rent");
            let (asked, ()) = tokio::join!(asked, async {
                rpc.held_back().await;
                till.books.sql(change).await.unwrap();
                rpc.mend();
            });
            assert!(
                matches!(
                    asked,
                    Err(WithdrawalError::Ledger(LedgerError::Frozen(_))
                        | WithdrawalError::InDebt(_)
                        | WithdrawalError::NotWithdrawable { .. })
                ),
                "{change}: {asked:?}"
            );
            till.books.sql(undo).await.unwrap();
        }
        assert_eq!(
            till.books.number("SELECT COUNT(*) AS n FROM payments WHERE kind = 'withdrawal'").await,
            0
        );
        assert_eq!(node.owned(&saver).await, (5_000_000, 0));
    })
    .await;
}

#[tokio::test]
async fn a_days_withdrawals_are_bounded() {
    each_till(async |till| {
        let clock = Clock::fixed(Clock::System.now());
        let capped = |config: &mut config::Payments| {
            config.withdrawals.wallet_daily = MicroUsdc::new(3_000_000);
            config.withdrawals.daily = MicroUsdc::new(5_000_000);
        };
        let nodes =
            [till.payer_out_at(clock.clone(), capped).await, till.payer_out_at(clock.clone(), capped).await];
        let node = &nodes[0];
        let savers = [till.saver(node, FIVE_USD).await, till.saver(node, FIVE_USD).await];
        let third = till.saver(node, FIVE_USD).await;
        let cap_of = |asked: Result<Payment, WithdrawalError>| match asked {
            Err(WithdrawalError::DailyCap { cap, retry_after_s, .. }) => (cap.get(), retry_after_s),
            other => panic!("{other:?}"),
        };
        let first = node.withdraw(&savers[0], TWO, "a").await.unwrap();
        clock.advance_seconds(100);
        assert_eq!(cap_of(node.withdraw(&savers[0], TWO, "b").await), (3_000_000, 86_300));
        // Two at once, on two nodes, and there is room for one.
        let (a, b) =
            tokio::join!(nodes[0].withdraw(&savers[1], TWO, "a"), nodes[1].withdraw(&third, TWO, "a"));
        let (taken, refused) = if a.is_ok() { (a, b) } else { (b, a) };
        assert_eq!(cap_of(refused).0, 5_000_000);
        // How long its own cap lasts, a wallet's own first withdrawal says.
        let owner =
            if taken.as_ref().unwrap().wallet() == Wallet(third.address()) { &third } else { &savers[1] };
        assert_eq!(cap_of(node.withdraw(owner, TWO, "b").await), (3_000_000, 86_400));
        // What comes to nothing does not count; what was asked for a day ago does not either.
        assert_eq!(node.withdraw(&savers[0], TWO, "a").await.unwrap().id, first.id);
        till.until(node, &first, State::Finalized).await;
        till.until(node, &taken.unwrap(), State::Finalized).await;
        clock.advance_seconds(86_400);
        assert!(node.withdraw(&savers[0], TWO, "b").await.is_ok());
    })
    .await;
}

#[tokio::test]
async fn what_the_token_will_not_pay_is_the_wallets_again() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let (at_once, later) = (till.saver(&node, FIVE_USD).await, till.saver(&node, FIVE_USD).await);
        till.chain.send(BLACKLISTER, USDC, &call(&blacklistCall { account: at_once.address() })).await;
        let refused = node.withdraw(&at_once, TWO, "a").await;
        assert!(
            matches!(&refused, Err(WithdrawalError::Refused(why)) if why.contains("blacklist")),
            "{refused:?}"
        );
        assert_eq!(node.owned(&at_once).await, (5_000_000, 0));

        // Blacklisted while its transaction waits: that reverts.
        till.chain.set_automine(false).await;
        let asked = node.withdraw(&later, TWO, "a").await.unwrap();
        till.chain.transaction_in_the_pool().await;
        till.send_dearly(BLACKLISTER, call(&blacklistCall { account: later.address() })).await;
        till.chain.mine(1).await;
        till.chain.set_automine(true).await;
        assert_eq!(node.owned(&later).await, (5_000_000, 2_000_000));
        till.warp(EXPIRED).await;
        let ended = till.until(&node, &asked, State::Expired).await;
        assert_eq!((ended.withdrawal_status(), node.owned(&later).await), ("failed", (5_000_000, 0)));
        till.assert_squared(&node).await;

        // It stays so: not asked for again under the same name, not by the operator, not by hand.
        till.chain.send(BLACKLISTER, USDC, &call(&unBlacklistCall { account: later.address() })).await;
        assert_eq!(node.withdraw(&later, TWO, "a").await.unwrap(), ended);
        let id = ended.id.to_string();
        assert!(operator::refused(&till.books, &["payments", "retry", &id]).contains("only those"));
        let by_hand =
            till.books.sql("UPDATE payments SET state = 'verified' WHERE kind = 'withdrawal'").await;
        assert!(by_hand.unwrap_err().to_string().contains("has ended"));
        // Nobody can carry the old authorization out any more.
        let old = ended.authorization.transfer_call(&ended.signature).to_string();
        till.chain.submit(BYSTANDER, USDC, &old, true).await;
        till.chain.mine(1).await;
        assert_eq!(till.paid_to(&later).await, 0);
        till.assert_squared(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_withdrawal_whose_block_is_undone_is_sent_again_byte_for_byte() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let saver = till.saver(&node, FIVE_USD).await;
        let asked = node.withdraw(&saver, TWO, "a").await.unwrap();
        let mined = eventually("it is mined", async || {
            let found = node.payments.withdrawal(asked.wallet(), asked.id).await.unwrap().unwrap();
            (found.state == State::Mined).then_some(found)
        })
        .await;
        till.chain.rpc("anvil_reorg", json!([1, []])).await;
        assert_eq!(till.paid_to(&saver).await, 0);
        let done = till.until(&node, &asked, State::Finalized).await;
        assert_eq!(done.tx_hash, mined.tx_hash);
        assert_eq!((till.paid_to(&saver).await, node.owned(&saver).await), (2_000_000, (3_000_000, 0)));
        assert_eq!(till.sent_by_relayer().await, "0x2");
        till.assert_squared(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_withdrawal_that_somebody_else_carries_out_is_that_withdrawal() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let saver = till.saver(&node, FIVE_USD).await;
        till.chain.set_automine(false).await;
        let asked = node.withdraw(&saver, TWO, "a").await.unwrap();
        till.chain.transaction_in_the_pool().await;
        till.send_dearly(BYSTANDER, asked.authorization.transfer_call(&asked.signature).to_string()).await;
        till.chain.mine(1).await;
        till.chain.set_automine(true).await;
        till.until(&node, &asked, State::Finalized).await;
        assert_eq!((till.paid_to(&saver).await, node.owned(&saver).await), (2_000_000, (3_000_000, 0)));
        till.assert_squared(&node).await;
    })
    .await;
}

/// A request and the steps after it take about as many polls.
const POLLS: u32 = 40;

#[tokio::test]
async fn a_withdrawal_cut_off_anywhere_is_paid_once() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let saver = till.saver(&node, u64::from(POLLS) * 1_000_000).await;
        for polls in 0..POLLS {
            let name = format!("cut off after {polls}");
            let dying = till.payer_out().await;
            cut_off(polls, dying.payments.withdraw(Wallet(saver.address()), ONE, &name)).await;
            dying.crash().await;
            let next = till.payer_out().await;
            let asked = next.withdraw(&saver, ONE, &name).await.unwrap();
            next.run();
            eventually("it is sent", async || {
                let found = next.payments.withdrawal(asked.wallet(), asked.id).await.unwrap().unwrap();
                (found.withdrawal_status() != "pending").then_some(())
            })
            .await;
            next.crash().await;
        }
        node.run();
        eventually("all are final", async || {
            till.chain.mine(1).await;
            (node.payments.open_withdrawals().await.unwrap().0 == 0).then_some(())
        })
        .await;
        let count = "SELECT COUNT(*) AS n FROM payments WHERE kind = 'withdrawal' AND state = 'finalized'";
        assert_eq!(till.books.number(count).await, i64::from(POLLS));
        assert_eq!(till.paid_to(&saver).await, u64::from(POLLS) * 1_000_000);
        assert_eq!(node.owned(&saver).await, (0, 0));
        till.assert_squared(&node).await;
        node.crash().await;
    })
    .await;
}

#[tokio::test]
async fn a_database_that_has_forgotten_a_withdrawal_does_not_pay_it_again() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let saver = till.saver(&node, FIVE_USD).await;
        let asked = node.withdraw(&saver, TWO, "rent").await.unwrap();
        till.until(&node, &asked, State::Finalized).await;
        // As restored from a backup: the balance is there again, and so would be the request.
        let older = Books::sqlite().await;
        older.credit(Wallet(saver.address()), 5_000_000).await;
        older.sql("UPDATE payments SET state = 'finalized'").await.unwrap();
        let mut config = till.config();
        config.treasury_key = Some(till.key.private_key().into());
        let restored = Node::new(&older.db, config);
        assert_eq!(restored.payments.check_chain().await, ChainHealth::Ok);
        till.chain.mint(till.treasury, FIVE_USD).await;
        let again = restored.withdraw(&saver, TWO, "rent").await;
        assert!(
            matches!(&again, Err(WithdrawalError::Refused(why)) if why.contains("was paid")),
            "{again:?}"
        );
        assert_eq!(till.paid_to(&saver).await, 2_000_000);
        // And the audit tells of it, though the database knows of no withdrawal at all.
        let chain = Some((restored.payments.chain().as_ref(), Wallet(till.treasury)));
        let report = audit::run(&older.db, chain).await.unwrap();
        let told =
            |row: &audit::Row| row.verdict == Verdict::Warning && row.detail.contains("no withdrawal here");
        assert!(report.0.iter().any(told), "{report}");
        older.discard().await;
    })
    .await;
}

/// A signature of the treasury's is money to whoever reads it.
#[tokio::test]
async fn no_endpoint_sees_a_signature_for_what_is_refused() {
    // `transferWithAuthorization` with a signature, as the token's calls begin.
    const CARRIED_OUT: &str = "cf092995";
    each_till(async |till| {
        let (saver, poor) = {
            let node = till.payer_out().await;
            (till.saver(&node, FIVE_USD).await, till.saver(&node, FIVE_USD).await)
        };
        let rpc = FaultyRpc::start(&till.chain.url).await;
        let node = till
            .payer_out_at(Clock::System, |config| {
                config.rpc_urls = vec![rpc.url.parse().unwrap()];
                config.withdrawals.wallet_daily = TWO;
            })
            .await;
        till.chain.send(BLACKLISTER, USDC, &call(&blacklistCall { account: poor.address() })).await;
        let refused = node.withdraw(&poor, TWO, "a").await;
        assert!(
            matches!(&refused, Err(WithdrawalError::Refused(why)) if why.contains("blacklist")),
            "{refused:?}"
        );
        for name in ["a", "b"] {
            let capped = node.withdraw(&saver, MicroUsdc::new(3_000_000), name).await;
            assert!(matches!(capped, Err(WithdrawalError::DailyCap { .. })), "{capped:?}");
        }
        assert!(!rpc.heard().contains(CARRIED_OUT));
        let taken = node.withdraw(&saver, TWO, "c").await.unwrap();
        till.until(&node, &taken, State::Finalized).await;
        assert!(rpc.heard().contains(CARRIED_OUT));
        till.assert_squared(&node).await;
    })
    .await;
}

#[tokio::test]
async fn a_withdrawal_that_was_given_back_and_paid_is_found_by_the_audit() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let saver = till.saver(&node, FIVE_USD).await;
        till.chain.set_automine(false).await;
        let asked = node.withdraw(&saver, TWO, "rent").await.unwrap();
        eventually("it is sent", async || {
            let found = node.payments.withdrawal(asked.wallet(), asked.id).await.unwrap().unwrap();
            (found.state == State::Broadcast).then_some(())
        })
        .await;
        node.clone().crash().await;
        // As if an endpoint had told that its time was over.
        till.books.sql("UPDATE payments SET state = 'expired' WHERE kind = 'withdrawal'").await.unwrap();
        till.books.sql("UPDATE wallets SET locked_micro = 0").await.unwrap();
        till.chain.set_automine(true).await;
        till.chain.mine(1).await;
        assert_eq!(till.paid_to(&saver).await, 2_000_000);
        let report = till.audit(&node).await;
        let told = |row: &audit::Row| row.verdict == Verdict::Drift && row.detail.contains("given back");
        assert!(report.0.iter().any(told), "{report}");
    })
    .await;
}

#[tokio::test]
async fn a_name_stays_taken_when_another_treasury_pays() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let saver = till.saver(&node, FIVE_USD).await;
        let asked = node.withdraw(&saver, TWO, "rent").await.unwrap();
        till.until(&node, &asked, State::Finalized).await;
        let other = TestWallet::random();
        let moved = till.payer_out_at(Clock::System, |config| {
            config.pay_to = Wallet(other.address());
            config.treasury_key = Some(other.private_key().into());
        });
        till.chain.mint(other.address(), FIVE_USD).await;
        assert_eq!(moved.await.withdraw(&saver, TWO, "rent").await.unwrap().id, asked.id);
        assert_eq!(till.paid_to(&saver).await, 2_000_000);
    })
    .await;
}

#[tokio::test]
async fn what_the_treasury_does_not_hold_is_not_promised() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let (saver, other) = (till.saver(&node, FIVE_USD).await, till.saver(&node, FIVE_USD).await);
        // The operator has paid a bill of seven dollars.
        till.chain.rpc("anvil_impersonateAccount", json!([till.treasury])).await;
        till.chain.give_gas(till.treasury).await;
        let away = call(&transferCall { to: STRANGER, value: U256::from(7_000_000) });
        till.chain.send(till.treasury, USDC, &away).await;
        let all = MicroUsdc::new(5_000_000);
        assert!(matches!(node.withdraw(&saver, all, "a").await, Err(WithdrawalError::TreasuryShort)));
        // Three are left, and two of them are promised already.
        till.chain.set_automine(false).await;
        let promised = node.withdraw(&saver, TWO, "b").await.unwrap();
        assert!(matches!(node.withdraw(&other, TWO, "c").await, Err(WithdrawalError::TreasuryShort)));
        assert_eq!(node.owned(&other).await, (5_000_000, 0));
        till.chain.set_automine(true).await;
        till.until(&node, &promised, State::Finalized).await;
    })
    .await;
}

/// Whether a signature is good, the token then asks the account itself (EIP-7702, EIP-1271).
#[tokio::test]
async fn a_treasury_that_has_code_pays_nothing_out_and_locks_nothing() {
    each_till(async |till| {
        let node = till.payer_out().await;
        let saver = till.saver(&node, FIVE_USD).await;
        till.chain.rpc("anvil_setCode", json!([till.treasury, "0x00"])).await;
        let refused = node.withdraw(&saver, TWO, "a").await;
        assert!(matches!(refused, Err(WithdrawalError::Unavailable(_))), "{refused:?}");
        assert_eq!(node.owned(&saver).await, (5_000_000, 0));
        till.chain.rpc("anvil_setCode", json!([till.treasury, "0x"])).await;
        let asked = node.withdraw(&saver, TWO, "a").await.unwrap();
        till.until(&node, &asked, State::Finalized).await;
    })
    .await;
}

#[tokio::test]
async fn without_its_key_the_treasury_pays_nothing() {
    each_till(async |till| {
        let node = till.node().await;
        let saver = till.saver(&node, FIVE_USD).await;
        assert!(matches!(node.withdraw(&saver, TWO, "a").await, Err(WithdrawalError::Off)));
        // What was asked for before the key was taken away is finished.
        let with_key = till.payer_out().await;
        till.chain.set_automine(false).await;
        let asked = with_key.withdraw(&saver, TWO, "a").await.unwrap();
        with_key.crash().await;
        till.chain.set_automine(true).await;
        node.run();
        till.until(&node, &asked, State::Finalized).await;
        till.assert_squared(&node).await;
        node.crash().await;
    })
    .await;
}

fn setup(chain: &Arc<TestChain>, treasury: &TestWallet) -> Setup {
    Setup {
        pay_to: treasury.address(),
        payments: "withdrawals_per_wallet_day_usd = \"100\"".into(),
        env: vec![("FAREBOX_TREASURY_KEY".into(), treasury.private_key())],
        ..Setup::new(chain, "http://127.0.0.1:9/v1")
    }
}

async fn ask(gateway: &Gateway, wallet: &TestWallet, usd: &str, key: Option<&str>) -> Answer {
    let mut body = gateway.sign_in(wallet).body();
    body["amount"] = usd.into();
    let call = gateway.post("/v1/withdrawals").json(&body);
    match key {
        Some(key) => call.header("idempotency-key", key).send().await,
        None => call.send().await,
    }
}

#[tokio::test]
async fn a_wallet_withdraws_over_http() {
    let chain = Arc::new(TestChain::start());
    let treasury = TestWallet::random();
    let gateway = Gateway::start_with(setup(&chain, &treasury)).await;
    let customer = gateway.customer("5").await;
    let wallet = &customer.wallet;
    let status = gateway.get("/v1/status").send().await.expect(200).json();
    assert_eq!(status["withdrawals"], json!({"min_usd": "1", "wallet_day_usd": "100"}));
    ask(&gateway, wallet, "2", Some("rent")).await.error(409, "not_withdrawable");
    let list = async || gateway.get("/v1/withdrawals").key(&customer.key).send().await.expect(200).json();
    eventually("the top-up is final", async || {
        chain.mine(1).await;
        (list().await["withdrawable_usdc"] == 5_000_000).then_some(())
    })
    .await;

    // A message is good once, a key for one withdrawal.
    let asked = ask(&gateway, wallet, "2", Some("rent")).await.expect(202).json();
    assert_eq!((&asked["wallet"], &asked["amount_usdc"]), (&json!(wallet.shown()), &json!(2_000_000)));
    let again = ask(&gateway, wallet, "2", Some("rent")).await.expect(202).json();
    assert_eq!(again["id"], asked["id"]);
    ask(&gateway, wallet, "3", Some("rent")).await.error(409, "idempotency_key_reused");
    let mut body = gateway.sign_in(wallet).body();
    body["amount"] = json!(1);
    let post = || gateway.post("/v1/withdrawals").json(&body);
    let first = post().send().await.expect(202).json();
    assert_ne!(first["id"], asked["id"]);
    post().send().await.error(401, "siwe_nonce_used");

    // What is refused before the signature is looked at does not use it up.
    let mut body = gateway.sign_in(wallet).body();
    for amount in [json!(0.5), json!("0.000001"), json!(-2), json!("2e0"), json!(null)] {
        body["amount"] = amount;
        gateway.post("/v1/withdrawals").json(&body).send().await.error(400, "invalid_amount");
    }
    body["amount"] = json!(100);
    gateway.post("/v1/withdrawals").json(&body).send().await.error(409, "not_withdrawable");
    // A key alone takes nothing out.
    let call = gateway.post("/v1/withdrawals").key(&customer.key).json(&json!({"amount": 1}));
    call.send().await.error(400, "missing_required_parameter");

    let path = format!("/v1/withdrawals/{}", asked["id"]);
    let done = eventually("it is final", async || {
        chain.mine(1).await;
        let found = gateway.get(&path).key(&customer.key).send().await.expect(200).json();
        (found["status"] == "finalized").then_some(found)
    })
    .await;
    assert!(
        done["tx_hash"].as_str().unwrap().len() == 66 && done["block_number"].as_u64().is_some(),
        "{done}"
    );
    assert_eq!(ask(&gateway, wallet, "2", Some("rent")).await.expect(200).json(), done);
    eventually("both are final", async || {
        chain.mine(1).await;
        (list().await["withdrawals"][0]["status"] == "finalized").then_some(())
    })
    .await;
    assert_eq!(chain.usdc_of(wallet.address()).await, 3_000_000);
    assert_eq!(gateway.balance(wallet).await.available, 2_000_000);

    // Pages, and whose they are.
    let page = gateway.get("/v1/withdrawals?limit=1").key(&customer.key).send().await.expect(200).json();
    let next = format!("/v1/withdrawals?limit=1&cursor={}", page["next_cursor"].as_str().unwrap());
    let last = gateway.get(&next).key(&customer.key).send().await.expect(200).json();
    assert_eq!((&last["withdrawals"][0]["id"], &last["next_cursor"]), (&asked["id"], &Value::Null));
    let other = gateway.customer("0").await;
    gateway.get(&path).key(&other.key).send().await.error(404, "withdrawal_not_found");
    gateway.get("/v1/withdrawals/x").key(&customer.key).send().await.error(404, "withdrawal_not_found");
    let topups = gateway.get(&format!("/v1/topups/{}", wallet.address())).key(&customer.key).send().await;
    assert_eq!(topups.expect(200).json()["topups"].as_array().unwrap().len(), 1);
    let logs = gateway.logs();
    assert!(!logs.contains(treasury.private_key().trim_start_matches("0x")), "a secret is in the log");
    gateway.audit();
}

#[tokio::test]
async fn withdrawals_need_the_treasurys_own_key() {
    let chain = TestChain::shared();
    let treasury = TestWallet::random();
    let off = Gateway::start_with(Setup { env: Vec::new(), ..setup(&chain, &treasury) }).await;
    let wallet = TestWallet::random();
    ask(&off, &wallet, "2", None).await.error(501, "withdrawals_off");
    assert_eq!(off.get("/v1/status").send().await.expect(200).json().get("withdrawals"), None);

    // Nor is it the key that receipts are signed with.
    let output = farebox_command()
        .args(["check-config", "--config"])
        .arg(off.config())
        .env("FAREBOX_RELAYER_KEY", off.setup.relayer.private_key())
        .env("UPSTREAM_KEY", "sk-test")
        .env("FAREBOX_TREASURY_KEY", treasury.private_key())
        .env("FAREBOX_RECEIPT_KEY", treasury.private_key())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("FAREBOX_RECEIPT_KEY: must be another key than FAREBOX_TREASURY_KEY"), "{said}");

    let stranger = TestWallet::random();
    for (relayer, key, says) in [
        (&off.setup.relayer, stranger.private_key(), "payments.pay_to is"),
        (&off.setup.relayer, "0x1234".into(), "FAREBOX_TREASURY_KEY is not a private key"),
        (&treasury, treasury.private_key(), "is one of the relayers' keys"),
    ] {
        for subcommand in ["check-config", "serve"] {
            let output = farebox_command()
                .args([subcommand, "--config"])
                .arg(off.config())
                .env("FAREBOX_RELAYER_KEY", relayer.private_key())
                .env("UPSTREAM_KEY", "sk-test")
                .env("FAREBOX_TREASURY_KEY", &key)
                .env("FAREBOX_LISTEN", "127.0.0.1:0")
                .env("FAREBOX_DATABASE_URL", format!("sqlite://{}/other.db", off.directory().display()))
                .output()
                .unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(!output.status.success() && said.contains(says), "{says}: {said}");
            assert!(!said.contains(key.trim_start_matches("0x")), "a secret is told");
        }
    }
}
