//! The gateway killed again and again, at every step of a settlement and at moments of chance: each
//! payment whose USDC reached the treasury is credited once, and no other.

use std::time::{Duration, Instant};

use farebox::id::Entropy;
use serde_json::json;

use crate::support::chain::TestChain;
use crate::support::gateway::{Gateway, Setup};
use crate::support::wallet::{SignedPayment, TestWallet};
use crate::support::{PATIENCE, postgres, unix_seconds};

/// The places where a settlement can be cut off: see the failpoints in `src/payments`.
const PLACES: [&str; 8] =
    ["verified", "signing", "signed", "sent", "broadcast", "mined", "crediting", "credited"];
/// Kills in a run of the whole suite; `make torture` asks for more.
const KILLS: usize = 24;
/// Payments sent at a gateway that is about to die.
const PAYMENTS_A_ROUND: usize = 3;
const WALLETS: usize = 12;
const MICRO: u64 = 1_000_000;
/// A gateway that reaches no failpoint within this is killed from outside.
const LONGEST_LIFE: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_kill_loses_or_doubles_a_payment_on_sqlite() {
    torture("sqlite", None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_kill_loses_or_doubles_a_payment_on_postgres() {
    let url = postgres::fresh_database().await;
    torture("postgres", Some(url)).await;
}

async fn torture(database: &str, database_url: Option<String>) {
    let kills = std::env::var("TORTURE_KILLS").map_or(KILLS, |text| text.parse().unwrap());
    let began = Instant::now();
    let chain = std::sync::Arc::new(TestChain::start());
    let mut gateway =
        Gateway::start_with(Setup { database_url, ..Setup::new(&chain, "http://127.0.0.1:9/v1") }).await;
    let mut wallets = Vec::new();
    for _ in 0..WALLETS {
        let wallet = TestWallet::random();
        chain.mint(wallet.address(), u64::try_from(kills * PAYMENTS_A_ROUND).unwrap() * MICRO).await;
        wallets.push(wallet);
    }
    let mut payments: Vec<SignedPayment> = Vec::new();
    for kill in 0..kills {
        // One in three dies at a moment of chance, the others at each place in turn.
        let place = (kill % 3 != 2).then(|| PLACES[kill % PLACES.len()]);
        gateway.kill_9();
        gateway.setup.env =
            place.map(|place| ("FAREBOX_CRASH_AT".into(), place.into())).into_iter().collect();
        // It may die while it picks up what the last one left: that is a kill as well.
        if !gateway.try_restart() {
            continue;
        }
        let round: Vec<_> = (0..PAYMENTS_A_ROUND)
            .map(|i| {
                let wallet = &wallets[(kill * PAYMENTS_A_ROUND + i) % WALLETS];
                wallet.authorization(gateway.setup.pay_to, MICRO).sign()
            })
            .collect();
        payments.extend(round.iter().cloned());
        let sent = futures_util::future::join_all(round.iter().map(|payment| send(&gateway, payment)));
        let life = match place {
            Some(_) => LONGEST_LIFE,
            None => Duration::from_millis(u64::from(Entropy.bytes::<1>()[0]) / 4),
        };
        let _ = tokio::time::timeout(life, sent).await;
        if kill % 10 == 9 {
            gateway.kill_9();
            come_to_rest(&mut gateway, &payments).await;
        }
    }
    gateway.kill_9();
    come_to_rest(&mut gateway, &payments).await;

    let credited = u64::try_from(payments.len()).unwrap() * MICRO;
    let treasury = chain.usdc_of(gateway.setup.pay_to).await;
    let mut balances = 0;
    for wallet in &wallets {
        balances += gateway.balance(wallet).await.balance;
    }
    println!("| database | kills | payments | lost | doubled | seconds |");
    println!("|---|---|---|---|---|---|");
    println!(
        "| {database} | {kills} | {} | {} | {} | {} |",
        payments.len(),
        credited.saturating_sub(balances) / MICRO,
        balances.saturating_sub(credited) / MICRO,
        began.elapsed().as_secs()
    );
    assert_eq!(balances, credited, "each payment is credited once");
    assert_eq!(treasury, credited, "the treasury holds what is credited");
    gateway.audit();
}

/// Sends a payment; what the answer is, or whether there is one, is all the same here.
async fn send(gateway: &Gateway, payment: &SignedPayment) -> Option<(u16, serde_json::Value)> {
    let call = gateway.post("/v1/topup").json(&json!({"amount": 1}));
    let answer = call.header("x-payment", &payment.v2_header()).0.timeout(PATIENCE).send().await.ok()?;
    let status = answer.status().as_u16();
    let body = serde_json::from_slice(&answer.bytes().await.ok()?).ok()?;
    Some((status, body))
}

/// Starts the gateway without a failpoint, and sends every payment again until it is credited.
async fn come_to_rest(gateway: &mut Gateway, payments: &[SignedPayment]) {
    gateway.setup.env.clear();
    gateway.restart();
    let deadline = unix_seconds() + 120;
    for payment in payments {
        loop {
            match send(gateway, payment).await {
                Some((200, body)) => {
                    assert_eq!(body["credited_usdc"], MICRO, "{body}");
                    break;
                }
                other => assert!(
                    unix_seconds() < deadline && matches!(other, Some((202 | 429 | 503, _)) | None),
                    "a payment does not come to rest: {other:?}\n{}",
                    gateway.logs()
                ),
            }
        }
    }
}
