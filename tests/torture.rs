//! The gateway, and PostgreSQL under it, killed again and again, at every step of a settlement and at
//! moments of chance: each payment and each deposit whose USDC reached the treasury is credited once, and no
//! other; each withdrawal is paid once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farebox::id::Entropy;
use serde_json::{Value, json};

use crate::support::chain::{TestChain, USDC, word};
use crate::support::gateway::{Call, Gateway, Setup};
use crate::support::postgres::Postgres;
use crate::support::wallet::{SignedPayment, TestWallet};
use crate::support::{PATIENCE, eventually, unix_seconds};

/// The places where money on its way in or out can be cut off: see the failpoints in `src/payments`.
const PLACES: [&str; 17] = [
    "verified",
    "signing",
    "signed",
    "sent",
    "broadcast",
    "mined",
    "crediting",
    "credited",
    "deposit_noted",
    "deposits_noted",
    "deposits_searched",
    "deposit_crediting",
    "deposit_credited",
    "withdrawal_holding",
    "withdrawal_held",
    "withdrawing",
    "withdrawn",
];
/// Rounds in a run of the whole suite, each with a kill; `make torture` asks for more.
const ROUNDS: usize = 24;
/// Payments sent at what is about to die.
const PAYMENTS_A_ROUND: usize = 3;
const WALLETS: usize = 12;
/// The first round with a withdrawal: by then every wallet has paid.
const FIRST_WITHDRAWAL: usize = 4;
const MICRO: u64 = 1_000_000;
/// A gateway that reaches no failpoint within this is killed from outside.
const LONGEST_LIFE: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_kill_loses_or_doubles_a_payment_on_sqlite() {
    Torture::start("sqlite", None).await.run().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_kill_loses_or_doubles_a_payment_on_postgres() {
    Torture::start("postgres", Some(Postgres::durable().await)).await.run().await;
}

/// What a round kills.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Victim {
    Gateway,
    Database,
    Both,
}

struct Torture {
    database: &'static str,
    /// PostgreSQL, where it is the database.
    server: Option<Postgres>,
    chain: Arc<TestChain>,
    treasury: TestWallet,
    gateway: Gateway,
    rounds: usize,
    wallets: Vec<TestWallet>,
    /// All that were ever sent, each with its wallet's number.
    payments: Vec<(usize, SignedPayment)>,
    /// How many deposits were sent on the chain.
    deposits: u64,
    /// All that were ever asked for, each with its wallet's number and its name.
    withdrawals: Vec<(usize, String)>,
    /// What each wallet was told that it has been credited.
    acknowledged: Vec<AtomicU64>,
    gateway_kills: usize,
    database_kills: usize,
    /// How often it died by itself at each place.
    died_at: BTreeMap<&'static str, usize>,
}

impl Torture {
    async fn start(database: &'static str, server: Option<Postgres>) -> Self {
        let rounds = std::env::var("TORTURE_KILLS").map_or(ROUNDS, |text| text.parse().unwrap());
        let database_url = match &server {
            Some(server) => Some(server.fresh_database().await),
            None => None,
        };
        let chain = Arc::new(TestChain::start());
        let treasury = TestWallet::random();
        let setup = Setup {
            database_url,
            pay_to: treasury.address(),
            payments: "deposits = true\ndeposits_from_block = 1\nwithdrawals_per_wallet_day_usd = \"0\""
                .into(),
            env: vec![treasury_key(&treasury)],
            ..Setup::new(&chain, "http://127.0.0.1:9/v1")
        };
        let gateway = Gateway::start_with(setup).await;
        let mut wallets = Vec::new();
        for _ in 0..WALLETS {
            let wallet = TestWallet::random();
            chain.mint(wallet.address(), funds(rounds)).await;
            chain.rpc("anvil_impersonateAccount", json!([wallet.address()])).await;
            chain.give_gas(wallet.address()).await;
            wallets.push(wallet);
        }
        let acknowledged = wallets.iter().map(|_| AtomicU64::new(0)).collect();
        let (payments, withdrawals) = (Vec::new(), Vec::new());
        let (gateway_kills, database_kills) = (0, 0);
        Self {
            database,
            server,
            chain,
            treasury,
            gateway,
            rounds,
            wallets,
            payments,
            deposits: 0,
            withdrawals,
            acknowledged,
            gateway_kills,
            database_kills,
            died_at: BTreeMap::new(),
        }
    }

    async fn run(mut self) {
        let began = Instant::now();
        let mut rested = (0, 0);
        for round in 0..self.rounds {
            self.deposit(round).await;
            match self.victim(round) {
                Victim::Gateway => self.kill_the_gateway(round).await,
                Victim::Database => self.kill_the_database(round).await,
                Victim::Both => self.kill_both(round).await,
            }
            if round % 10 == 9 {
                self.come_to_rest(rested).await;
                rested = (self.payments.len(), self.withdrawals.len());
            }
        }
        self.come_to_rest((0, 0)).await;

        let arrived = (u64::try_from(self.payments.len()).unwrap() + self.deposits) * MICRO;
        let left = u64::try_from(self.withdrawals.len()).unwrap() * MICRO;
        let credited = arrived - left;
        self.wait_for_deposits(credited).await;
        let treasury = self.chain.usdc_of(self.gateway.setup.pay_to).await;
        let (mut balances, mut on_chain) = (0, 0);
        for wallet in &self.wallets {
            balances += self.gateway.balance(wallet).await.balance;
            on_chain += self.chain.usdc_of(wallet.address()).await;
        }
        let paid_out = on_chain + arrived - u64::try_from(WALLETS).unwrap() * funds(self.rounds);
        println!(
            "| database | gateway kills | database kills | payments | deposits | withdrawals | lost | doubled | \
             sent twice | seconds |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|");
        println!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            self.database,
            self.gateway_kills,
            self.database_kills,
            self.payments.len(),
            self.deposits,
            self.withdrawals.len(),
            credited.saturating_sub(balances) / MICRO,
            balances.saturating_sub(credited) / MICRO,
            paid_out.saturating_sub(left) / MICRO,
            began.elapsed().as_secs()
        );
        println!("died at: {:?}", self.died_at);
        assert_eq!(paid_out, left, "each withdrawal is paid once");
        assert_eq!(balances, credited, "each payment and each deposit is credited once");
        assert_eq!(treasury, credited, "the treasury holds what is credited");
        self.gateway.audit();
    }

    /// A wallet just sends USDC to the treasury.
    async fn deposit(&mut self, round: usize) {
        let from = self.wallets[round % WALLETS].address();
        let transfer = format!("0xa9059cbb{}{MICRO:064x}", word(self.treasury.address()));
        self.chain.send(from, USDC, &transfer).await;
        self.deposits += 1;
    }

    /// The last deposits are found when they are final.
    async fn wait_for_deposits(&self, credited: u64) {
        self.chain.mine(3).await;
        let deadline = unix_seconds() + 60;
        loop {
            let mut balances = 0;
            for wallet in &self.wallets {
                balances += self.gateway.balance(wallet).await.balance;
            }
            // What is missing then is said by whoever called.
            if balances >= credited || unix_seconds() > deadline {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// One round in five is PostgreSQL's, and of those every other one the gateway's as well.
    fn victim(&self, round: usize) -> Victim {
        match round % 10 {
            4 if self.server.is_some() => Victim::Database,
            9 if self.server.is_some() => Victim::Both,
            _ => Victim::Gateway,
        }
    }

    async fn kill_the_gateway(&mut self, round: usize) {
        // One in three dies at a moment of chance, the others at each place in turn.
        let place = (round % 3 != 2).then(|| PLACES[round % PLACES.len()]);
        self.gateway_kills += 1;
        // It may die while it picks up what the last one left: that is a kill as well.
        if !self.start_gateway(place) {
            self.died_at.entry(place.unwrap_or("start")).and_modify(|times| *times += 1).or_insert(1);
            return;
        }
        let sent = self.sign(round);
        let asked = self.name_withdrawal(round);
        let life = if place.is_some() { LONGEST_LIFE } else { a_moment(64) };
        let work = async { tokio::join!(self.send_all(&sent), self.withdraw_all(&asked)) };
        let _ = tokio::time::timeout(life, work).await;
        if let Some(place) = place {
            // Deposits are looked for, and withdrawals become final, after the answers are there.
            let died = async {
                while !self.gateway.has_ended() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            if tokio::time::timeout(LONGEST_LIFE, died).await.is_ok() {
                self.died_at.entry(place).and_modify(|times| *times += 1).or_insert(1);
            }
        }
        self.gateway.kill_9();
    }

    /// The gateway outlives its database, gives no false answer meanwhile, and goes on with the next.
    async fn kill_the_database(&mut self, round: usize) {
        assert!(self.start_gateway(None), "{}", self.gateway.logs());
        let sent = self.sign(round);
        let asked = self.name_withdrawal(round);
        let mut server = self.server.take().unwrap();
        let (answers, (), ()) = tokio::join!(self.send_all(&sent), self.withdraw_all(&asked), async {
            tokio::time::sleep(a_moment(200)).await;
            server.kill_9();
            server.restart().await;
        });
        self.server = Some(server);
        self.database_kills += 1;
        for answer in answers {
            assert!(may_come_to_rest(answer.as_ref()), "{answer:?}\n{}", self.gateway.logs());
        }
        let gateway = &self.gateway;
        eventually("the gateway has found its database again", async || {
            (gateway.get("/ready").send().await.status == 200).then_some(())
        })
        .await;
        self.assert_nothing_forgotten().await;
        self.send_until_credited(&sent).await;
        assert!(!self.gateway.has_ended(), "{}", self.gateway.logs());
        self.gateway.kill_9();
    }

    /// As when the machine goes down: in either order.
    async fn kill_both(&mut self, round: usize) {
        assert!(self.start_gateway(None), "{}", self.gateway.logs());
        let sent = self.sign(round);
        let asked = self.name_withdrawal(round);
        let work = async { tokio::join!(self.send_all(&sent), self.withdraw_all(&asked)) };
        let _ = tokio::time::timeout(a_moment(128), work).await;
        let server = self.server.as_mut().unwrap();
        if Entropy.bytes::<1>()[0].is_multiple_of(2) {
            server.kill_9();
            self.gateway.kill_9();
        } else {
            self.gateway.kill_9();
            server.kill_9();
        }
        server.restart().await;
        self.gateway_kills += 1;
        self.database_kills += 1;
    }

    /// Starts the gateway, which has been killed, so that it dies at `place`; whether it comes to be ready.
    fn start_gateway(&mut self, place: Option<&str>) -> bool {
        self.gateway.kill_9();
        let crash = place.map(|place| ("FAREBOX_CRASH_AT".into(), place.into()));
        self.gateway.setup.env = crash.into_iter().chain([treasury_key(&self.treasury)]).collect();
        self.gateway.try_restart()
    }

    /// Starts the gateway without a failpoint, and sends the payments and withdrawals from these numbers on
    /// again until each is credited, or final.
    async fn come_to_rest(&mut self, (payment, withdrawal): (usize, usize)) {
        assert!(self.start_gateway(None), "{}", self.gateway.logs());
        self.assert_nothing_forgotten().await;
        self.send_until_credited(&self.payments[payment..]).await;
        for (wallet, name) in &self.withdrawals[withdrawal..] {
            eventually("a withdrawal is final", async || {
                self.chain.mine(1).await;
                let answer = withdraw(&self.gateway, &self.wallets[*wallet], name).await;
                match answer {
                    Some((200, body)) => {
                        assert_eq!(
                            (&body["status"], &body["amount_usdc"]),
                            (&json!("finalized"), &json!(MICRO))
                        );
                        Some(())
                    }
                    other => {
                        assert!(is_no_refusal(other.as_ref()), "{other:?}\n{}", self.gateway.logs());
                        None
                    }
                }
            })
            .await;
        }
    }

    /// The withdrawal of a round, which is written down to be asked for again.
    fn name_withdrawal(&mut self, round: usize) -> Vec<(usize, String)> {
        if round < FIRST_WITHDRAWAL {
            return Vec::new();
        }
        let named = (round % WALLETS, format!("round-{round}"));
        self.withdrawals.push(named.clone());
        vec![named]
    }

    /// Asks for withdrawals, each twice at once.
    async fn withdraw_all(&self, withdrawals: &[(usize, String)]) {
        for (wallet, name) in withdrawals {
            let wallet = &self.wallets[*wallet];
            let (a, b) =
                tokio::join!(withdraw(&self.gateway, wallet, name), withdraw(&self.gateway, wallet, name));
            for answer in [a, b] {
                assert!(is_no_refusal(answer.as_ref()), "{answer:?}\n{}", self.gateway.logs());
            }
        }
    }

    /// The payments of a round, which are written down to be sent again.
    fn sign(&mut self, round: usize) -> Vec<(usize, SignedPayment)> {
        let sign = |i: usize| {
            let wallet = (round * PAYMENTS_A_ROUND + i) % WALLETS;
            (wallet, self.wallets[wallet].authorization(self.gateway.setup.pay_to, MICRO).sign())
        };
        let signed: Vec<_> = (0..PAYMENTS_A_ROUND).map(sign).collect();
        self.payments.extend(signed.iter().cloned());
        signed
    }

    /// Sends payments at once, and keeps in mind which are said to be credited.
    async fn send_all(&self, payments: &[(usize, SignedPayment)]) -> Vec<Option<(u16, Value)>> {
        let send_one = async |(wallet, payment): &(usize, SignedPayment)| {
            let answer = send(&self.gateway, payment).await;
            if let Some((200, body)) = &answer {
                assert_eq!(body["credited_usdc"], MICRO, "{body}");
                self.acknowledged[*wallet].fetch_add(MICRO, Ordering::Relaxed);
            }
            answer
        };
        futures_util::future::join_all(payments.iter().map(send_one)).await
    }

    async fn send_until_credited(&self, payments: &[(usize, SignedPayment)]) {
        let deadline = unix_seconds() + 120;
        for (_, payment) in payments {
            loop {
                match send(&self.gateway, payment).await {
                    Some((200, body)) => {
                        assert_eq!(body["credited_usdc"], MICRO, "{body}");
                        break;
                    }
                    other => assert!(
                        unix_seconds() < deadline && may_come_to_rest(other.as_ref()),
                        "a payment does not come to rest: {other:?}\n{}",
                        self.gateway.logs()
                    ),
                }
            }
        }
    }

    /// What somebody was told is credited no kill undoes.
    async fn assert_nothing_forgotten(&self) {
        for (number, (wallet, acknowledged)) in self.wallets.iter().zip(&self.acknowledged).enumerate() {
            let acknowledged = acknowledged.load(Ordering::Relaxed);
            let withdrawn = self.withdrawals.iter().filter(|(of, _)| *of == number).count();
            let least = acknowledged.saturating_sub(u64::try_from(withdrawn).unwrap() * MICRO);
            if least > 0 {
                let balance = self.gateway.balance(wallet).await.balance;
                assert!(balance >= least, "{balance} of {acknowledged} that were credited");
            }
        }
    }
}

/// What a wallet has at first: more than it is to send.
fn funds(rounds: usize) -> u64 {
    u64::try_from(rounds * (PAYMENTS_A_ROUND + 1)).unwrap() * MICRO
}

fn treasury_key(treasury: &TestWallet) -> (String, String) {
    ("FAREBOX_TREASURY_KEY".into(), treasury.private_key())
}

/// Asks for a withdrawal of a dollar.
async fn withdraw(gateway: &Gateway, wallet: &TestWallet, name: &str) -> Option<(u16, Value)> {
    let mut body = gateway.sign_in(wallet).body();
    body["amount"] = json!(1);
    let call = gateway.post("/v1/withdrawals").json(&body).header("idempotency-key", name);
    read(call).await
}

/// Whether a withdrawal is on its way, or can be asked for again: what it takes may not be final yet.
fn is_no_refusal(answer: Option<&(u16, Value)>) -> bool {
    match answer {
        Some((409, body)) => body["error"]["code"] == "not_withdrawable",
        other => matches!(other, Some((200 | 202 | 429 | 503, _)) | None),
    }
}

/// At most so many milliseconds.
fn a_moment(longest_ms: u64) -> Duration {
    Duration::from_micros(u64::from(Entropy.bytes::<1>()[0]) * longest_ms * 1000 / 256)
}

/// Whether an answer, or none, leaves it open that the payment is credited. A refusal would make its
/// payer sign another.
fn may_come_to_rest(answer: Option<&(u16, Value)>) -> bool {
    matches!(answer, Some((200 | 202 | 429 | 503, _)) | None)
}

/// Sends a payment; what the answer is, or whether there is one, is its sender's affair.
async fn send(gateway: &Gateway, payment: &SignedPayment) -> Option<(u16, Value)> {
    let call = gateway.post("/v1/topup").json(&json!({"amount": 1}));
    read(call.header("x-payment", &payment.v2_header())).await
}

async fn read(call: Call) -> Option<(u16, Value)> {
    let answer = call.0.timeout(PATIENCE).send().await.ok()?;
    let status = answer.status().as_u16();
    let body = serde_json::from_slice(&answer.bytes().await.ok()?).ok()?;
    Some((status, body))
}
