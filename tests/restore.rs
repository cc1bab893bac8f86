//! The books lost and restored from a backup, as `docs/OPERATIONS.md` tells an operator to do it.

use std::process::Command;
use std::sync::Arc;

use serde_json::Value;

use crate::support::chain::TestChain;
use crate::support::eventually;
use crate::support::gateway::{Customer, Gateway, Setup, ask, micro};
use crate::support::model_server::ModelServer;
use crate::support::postgres;
use crate::support::wallet::{SignedPayment, TestWallet};

const OPERATIONS: &str = include_str!("../docs/OPERATIONS.md");

const SQLITE_BACKUP: &str = "sqlite3 farebox.db \"VACUUM INTO 'copy.db'\"\n";
const SQLITE_RESTORE: &str = "rm -f farebox.db farebox.db-wal farebox.db-shm\ncp copy.db farebox.db\n";

const POSTGRES_BACKUP: &str = "pg_dump --format=custom --file=copy.dump \"$FAREBOX_DATABASE_URL\"\n";
const POSTGRES_RESTORE: &str =
    "pg_restore --exit-on-error --no-owner --dbname=\"$FAREBOX_DATABASE_URL\" copy.dump\n";

#[tokio::test]
async fn the_books_are_restored_from_a_backup_on_sqlite() {
    rehearse(None, SQLITE_BACKUP, SQLITE_RESTORE).await;
}

#[tokio::test]
async fn the_books_are_restored_from_a_backup_on_postgres() {
    rehearse(Some(postgres::fresh_database().await), POSTGRES_BACKUP, POSTGRES_RESTORE).await;
}

async fn rehearse(database_url: Option<String>, backup: &str, restore: &str) {
    for commands in [backup, restore] {
        assert!(OPERATIONS.contains(commands), "the manual does not say:\n{commands}");
    }
    let chain = Arc::new(TestChain::start());
    let model_server = ModelServer::shared();
    let setup = Setup { database_url, ..Setup::new(&chain, &model_server.base_url) };
    let mut gateway = Gateway::start_with(Setup { model_server: Some(model_server), ..setup }).await;
    let customer = gateway.customer("5").await;
    let wallet = &customer.wallet;
    chain.mint(wallet.address(), micro("20")).await;

    // One payment is under way while the backup is made, and credited after it.
    let under_way = sign(&gateway, wallet, "4");
    chain.set_automine(false).await;
    let (credited, ()) = tokio::join!(pay(&gateway, &under_way), async {
        chain.transaction_in_the_pool().await;
        run(&gateway, backup);
        chain.set_automine(true).await;
        chain.mine(1).await;
    });
    assert_eq!(credited["credited_usdc"], micro("4"));
    // Of two more, and a request, the backup knows nothing.
    let (later, last) = (sign(&gateway, wallet, "3"), sign(&gateway, wallet, "2"));
    let later_credit = pay(&gateway, &later).await;
    pay(&gateway, &last).await;
    let chat = gateway.chat(&customer, &ask("Hello")).await.expect(200);
    assert_eq!(chat.number("x-charged-usdc"), 11);
    let chat = chat.header("x-request-id").unwrap().to_owned();
    assert_eq!(gateway.balance(wallet).await.balance, micro("14") - 11);
    assert_eq!(transfers(&gateway).await, 4);

    gateway.kill_9();
    if let Some(url) = &gateway.setup.database_url {
        postgres::empty_database(url).await;
    }
    run(&gateway, restore);
    gateway.restart();

    // What was before the backup is there; the payment that was under way then is found on the chain.
    eventually("the payment under way is credited", async || {
        Some(gateway.balance(wallet).await.balance).filter(|balance| *balance == micro("9"))
    })
    .await;
    let lost = gateway.get(&format!("/v1/requests/{chat}")).key(&customer.key).send().await;
    lost.error(404, "request_not_found");
    assert_eq!(uncredited(&gateway), Some("2 transfers to the treasury belong to no credit".into()));

    // A payment of later is found on the chain as well, once it is sent again.
    let found = pay(&gateway, &later).await;
    assert_eq!(found["tx_hash"], later_credit["tx_hash"]);
    assert_eq!(found["balance_usdc"], micro("12"));
    assert_eq!(pay(&gateway, &later).await, found);
    assert_eq!(transfers(&gateway).await, 4);
    assert_eq!(uncredited(&gateway), Some("1 transfers to the treasury belong to no credit".into()));

    // A new one is sent with the account nonce that the chain expects.
    assert_eq!(pay(&gateway, &sign(&gateway, wallet, "1")).await["balance_usdc"], micro("13"));
    assert_eq!(transfers(&gateway).await, 5);
    serves(&gateway, &customer).await;
    assert_eq!(pay(&gateway, &last).await["credited_usdc"], micro("2"));
    assert_eq!(uncredited(&gateway), None);
    assert_eq!(gateway.balance(wallet).await.balance, micro("15") - 11);
    assert_eq!(chain.usdc_of(gateway.setup.pay_to).await, micro("15"));
    assert_eq!(transfers(&gateway).await, 5);
}

/// Runs the manual's commands, as it says: in the gateway's directory, with its database's address.
fn run(gateway: &Gateway, commands: &str) {
    let mut shell = Command::new("sh");
    let path = std::env::var("PATH").unwrap_or_default();
    shell
        .args(["-eu", "-c", commands])
        .current_dir(gateway.directory())
        .env("PATH", format!("{}:{path}", postgres::binaries().display()))
        .envs(gateway.setup.database_url.iter().map(|url| ("FAREBOX_DATABASE_URL", url)));
    let done = shell.output().unwrap();
    assert!(done.status.success() && done.stderr.is_empty(), "{commands}: {done:?}");
}

fn sign(gateway: &Gateway, wallet: &TestWallet, usd: &str) -> SignedPayment {
    wallet.authorization(gateway.setup.pay_to, micro(usd)).sign()
}

/// Sends a payment, for whatever it is worth, until it is credited.
async fn pay(gateway: &Gateway, payment: &SignedPayment) -> Value {
    eventually("the payment is credited", async || {
        let call = gateway.post("/v1/topup").header("x-payment", &payment.v2_header());
        let answer = call.send().await;
        assert!(matches!(answer.status, 200 | 202), "{answer:?}");
        (answer.status == 200).then(|| answer.json())
    })
    .await
}

async fn serves(gateway: &Gateway, customer: &Customer) {
    let answer = gateway.chat(customer, &ask("Hello")).await.expect(200);
    assert_eq!(answer.number("x-charged-usdc"), 11);
}

/// How many transactions the relayer has sent.
async fn transfers(gateway: &Gateway) -> u64 {
    gateway.chain().sent_by(gateway.setup.relayer.address()).await
}

/// What `farebox audit`, which finds no drift, says of transfers that belong to no credit.
fn uncredited(gateway: &Gateway) -> Option<String> {
    const CHECK: &str = "each transfer to the treasury is credited";
    let audit = gateway.run("audit");
    assert!(audit.status.success(), "{audit:#?}");
    let report = String::from_utf8(audit.stdout).unwrap();
    // Shown only where the test fails.
    println!("{report}");
    let line = report.lines().find(|line| line.contains(CHECK))?;
    assert!(line.starts_with("warning "), "{line}");
    Some(line.split_once(CHECK)?.1.trim().to_owned())
}
