//! The gateway, and PostgreSQL under it, killed again and again, at every step of a settlement and at
//! moments of chance: each payment whose USDC reached the treasury is credited once, and no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farebox::id::Entropy;
use serde_json::{Value, json};

use crate::support::chain::TestChain;
use crate::support::gateway::{Gateway, Setup};
use crate::support::postgres::Postgres;
use crate::support::wallet::{SignedPayment, TestWallet};
use crate::support::{PATIENCE, eventually, unix_seconds};

/// The places where a settlement can be cut off: see the failpoints in `src/payments`.
const PLACES: [&str; 8] =
    ["verified", "signing", "signed", "sent", "broadcast", "mined", "crediting", "credited"];
/// Rounds in a run of the whole suite, each with a kill; `make torture` asks for more.
const ROUNDS: usize = 24;
/// Payments sent at what is about to die.
const PAYMENTS_A_ROUND: usize = 3;
const WALLETS: usize = 12;
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
    gateway: Gateway,
    rounds: usize,
    wallets: Vec<TestWallet>,
    /// All that were ever sent, each with its wallet's number.
    payments: Vec<(usize, SignedPayment)>,
    /// What each wallet was told that it has been credited.
    acknowledged: Vec<AtomicU64>,
    gateway_kills: usize,
    database_kills: usize,
}

impl Torture {
    async fn start(database: &'static str, server: Option<Postgres>) -> Self {
        let rounds = std::env::var("TORTURE_KILLS").map_or(ROUNDS, |text| text.parse().unwrap());
        let database_url = match &server {
            Some(server) => Some(server.fresh_database().await),
            None => None,
        };
        let chain = Arc::new(TestChain::start());
        let setup = Setup { database_url, ..Setup::new(&chain, "http://127.0.0.1:9/v1") };
        let gateway = Gateway::start_with(setup).await;
        let mut wallets = Vec::new();
        for _ in 0..WALLETS {
            let wallet = TestWallet::random();
            chain.mint(wallet.address(), u64::try_from(rounds * PAYMENTS_A_ROUND).unwrap() * MICRO).await;
            wallets.push(wallet);
        }
        let acknowledged = wallets.iter().map(|_| AtomicU64::new(0)).collect();
        let payments = Vec::new();
        let (gateway_kills, database_kills) = (0, 0);
        Self {
            database,
            server,
            chain,
            gateway,
            rounds,
            wallets,
            payments,
            acknowledged,
            gateway_kills,
            database_kills,
        }
    }

    async fn run(mut self) {
        let began = Instant::now();
        let mut rested = 0;
        for round in 0..self.rounds {
            match self.victim(round) {
                Victim::Gateway => self.kill_the_gateway(round).await,
                Victim::Database => self.kill_the_database(round).await,
                Victim::Both => self.kill_both(round).await,
            }
            if round % 10 == 9 {
                self.come_to_rest(rested).await;
                rested = self.payments.len();
            }
        }
        self.come_to_rest(0).await;

        let credited = u64::try_from(self.payments.len()).unwrap() * MICRO;
        let treasury = self.chain.usdc_of(self.gateway.setup.pay_to).await;
        let mut balances = 0;
        for wallet in &self.wallets {
            balances += self.gateway.balance(wallet).await.balance;
        }
        println!("| database | gateway kills | database kills | payments | lost | doubled | seconds |");
        println!("|---|---|---|---|---|---|---|");
        println!(
            "| {} | {} | {} | {} | {} | {} | {} |",
            self.database,
            self.gateway_kills,
            self.database_kills,
            self.payments.len(),
            credited.saturating_sub(balances) / MICRO,
            balances.saturating_sub(credited) / MICRO,
            began.elapsed().as_secs()
        );
        assert_eq!(balances, credited, "each payment is credited once");
        assert_eq!(treasury, credited, "the treasury holds what is credited");
        self.gateway.audit();
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
            return;
        }
        let sent = self.sign(round);
        let life = if place.is_some() { LONGEST_LIFE } else { a_moment(64) };
        let _ = tokio::time::timeout(life, self.send_all(&sent)).await;
        self.gateway.kill_9();
    }

    /// The gateway outlives its database, gives no false answer meanwhile, and goes on with the next.
    async fn kill_the_database(&mut self, round: usize) {
        assert!(self.start_gateway(None), "{}", self.gateway.logs());
        let sent = self.sign(round);
        let mut server = self.server.take().unwrap();
        let (answers, ()) = tokio::join!(self.send_all(&sent), async {
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
        let _ = tokio::time::timeout(a_moment(128), self.send_all(&sent)).await;
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
        self.gateway.setup.env =
            place.map(|place| ("FAREBOX_CRASH_AT".into(), place.into())).into_iter().collect();
        self.gateway.try_restart()
    }

    /// Starts the gateway without a failpoint, and sends the payments from number `first` on again until
    /// each is credited.
    async fn come_to_rest(&mut self, first: usize) {
        assert!(self.start_gateway(None), "{}", self.gateway.logs());
        self.assert_nothing_forgotten().await;
        self.send_until_credited(&self.payments[first..]).await;
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
        for (wallet, acknowledged) in self.wallets.iter().zip(&self.acknowledged) {
            let acknowledged = acknowledged.load(Ordering::Relaxed);
            if acknowledged > 0 {
                let balance = self.gateway.balance(wallet).await.balance;
                assert!(balance >= acknowledged, "{balance} of {acknowledged} that were credited");
            }
        }
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
    let answer = call.header("x-payment", &payment.v2_header()).0.timeout(PATIENCE).send().await.ok()?;
    let status = answer.status().as_u16();
    let body = serde_json::from_slice(&answer.bytes().await.ok()?).ok()?;
    Some((status, body))
}
