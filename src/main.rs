//! The `farebox` program: reads the command line, starts, stops.

mod catalogue;
mod operate;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use farebox::app::App;
use farebox::attest;
use farebox::audit;
use farebox::chain::{Chain, TokenCheckError};
use farebox::clock::Clock;
use farebox::config::{self, Config, DEFAULT_PATH, RELAYER_KEY};
use farebox::db::{Access, Db};
use farebox::id::Entropy;
use farebox::{http, reserves, telemetry};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// How long requests and settlements may take to finish once the program is told to stop.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);

/// An AI gateway where the wallet is the account.
#[derive(Parser)]
#[command(name = "farebox", version, about, subcommand_required = false)]
struct Cli {
    /// The configuration file.
    #[arg(long, global = true, default_value = DEFAULT_PATH, value_name = "FILE")]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the API. This is the default.
    Serve,
    /// Write a commented farebox.toml and a fresh relayer key, and say what to do next.
    Init,
    /// Check the configuration and print what would be served, at which billed prices.
    CheckConfig,
    /// Recompute every invariant of the books and compare them with the chain. Exits 1 on drift.
    Audit {
        /// Where nothing is wrong, also publish what all wallets are owed and what the treasury holds: a Merkle
        /// sum tree, in which each wallet finds its balance (GET /v1/reserves). The newest seven are kept.
        #[arg(long)]
        publish: bool,
    },
    /// Read public price lists: print their models for the configuration, or compare prices with them.
    #[command(subcommand)]
    Catalog(catalogue::CatalogCommand),
    /// Look at the payments journal, or have a payment that ended looked at again.
    #[command(subcommand)]
    Payments(operate::PaymentsCommand),
    /// Look at a wallet's books, freeze it, or adjust them with a reason.
    #[command(subcommand)]
    Wallet(operate::WalletCommand),
    /// Move old receipts out of the database into files, list those files, and check them.
    #[command(subcommand)]
    Receipts(operate::ReceiptsCommand),
    /// Check a receipt, or a wallet's proof of reserves: offline, and without a configuration. Exits 1 if anything
    /// in it was changed.
    VerifyProof {
        /// The JSON, as it was answered.
        file: PathBuf,
        /// The key that it must be signed by, one of the `receipt_signers` of /v1/status.
        #[arg(long, value_name = "ADDRESS")]
        signer: Option<String>,
        /// Of a proof of reserves: the root that it must lead to, as /v1/reserves shows it to others.
        #[arg(long, value_name = "HASH")]
        root: Option<String>,
        /// The wallet that it must be about.
        #[arg(long, value_name = "ADDRESS")]
        wallet: Option<String>,
    },
}

/// What ends the program, and the exit status it ends with.
struct Failure {
    status: u8,
    message: String,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { status: 2, message: error.to_string() }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(&cli.config).await,
        Command::Init => init(&cli.config),
        Command::CheckConfig => check_config(&cli.config),
        Command::Audit { publish } => run_audit(&cli.config, publish).await,
        Command::Catalog(command) => catalogue::run(&cli.config, command).await,
        Command::Payments(command) => operate::payments(&cli.config, command).await,
        Command::Wallet(command) => operate::wallet(&cli.config, command).await,
        Command::Receipts(command) => operate::receipts(&cli.config, command).await,
        Command::VerifyProof { file, signer, root, wallet } => {
            operate::verify(&file, signer.as_deref(), root.as_deref(), wallet.as_deref())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("farebox: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

fn load(path: &Path) -> Result<Config, config::ConfigError> {
    Config::load(path, &std::env::vars().collect())
}

async fn serve(path: &Path) -> Result<(), Failure> {
    let config = load(path)?;
    telemetry::start_logs(config.log_format);
    let metrics = telemetry::start_metrics()?;
    // Signals are caught from the first moment, also while the database is being opened.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let listener = listen(&config.listen).await?;
    let metrics_listener = match config.metrics_listen.as_str() {
        "" => None,
        address => Some(listen(address).await?),
    };
    let app = App::start(config, Clock::System).await?;
    app.tasks.spawn_service(telemetry::keep_up(metrics.clone()));
    if let Some(listener) = metrics_listener {
        app.tasks.spawn_service(http::serve(listener, http::metrics_router(metrics), app.tasks.clone()));
    }
    let address = listener.local_addr()?;
    app.tasks.spawn_service(http::serve(listener, http::router(app.clone()), app.tasks.clone()));
    println!("farebox listens on http://{address}");
    std::io::stdout().flush()?;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => reload(path, &app),
        }
    }
    tracing::info!("stopping: requests and settlements under way are finished first");
    app.shut_down(SHUTDOWN_GRACE).await;
    Ok(())
}

/// Serves the models that the configuration lists now. Whatever is wrong with it, what is served stays.
fn reload(path: &Path, app: &App) {
    let done = load(path).map_err(|e| e.to_string()).and_then(|config| app.reload(&config));
    metrics::counter!("farebox_reloads_total", "outcome" => if done.is_ok() { "ok" } else { "refused" })
        .increment(1);
    match done {
        Ok(version) => tracing::info!(prices = %version, "the models are read again"),
        Err(why) => tracing::error!(why, "the models are not read again; those of before are served"),
    }
}

async fn listen(address: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(address)
        .await
        .map_err(|e| Failure { status: 2, message: format!("cannot listen on {address}: {e}") })
}

fn init(path: &Path) -> Result<(), Failure> {
    if path.exists() {
        let message = format!("{} is there already; it is left as it is", path.display());
        return Err(Failure { status: 2, message });
    }
    std::fs::write(path, config::starter())?;
    let key = Chain::generate_relayer_key(&Entropy);
    println!(
        "Wrote {path}.\n\n\
         Next:\n\
         1. In {path} set payments.pay_to to the address that shall receive USDC, and the providers and\n   \
            models you serve.\n\
         2. Export the secrets; they are read from the environment and kept in no file:\n\n     \
            export {RELAYER_KEY}={key}\n     \
            export OPENAI_API_KEY=…\n\n   \
            The relayer key is fresh. Keep it, and send a little ETH on Base to its address, which pays\n   \
            the gas of top-ups: {address}\n\
         3. farebox check-config    says what would be served, and at which prices\n\
         4. farebox                 serves",
        path = path.display(),
        key = key.secret,
        address = key.address,
    );
    Ok(())
}

fn check_config(path: &Path) -> Result<(), Failure> {
    let config = load(path)?;
    farebox::install_crypto();
    let chain = Chain::new(&config.payments, Clock::System)?;
    print!("{}", config::summary(&config));
    for relayer in chain.relayers() {
        println!("{relayer} pays the gas of top-ups.");
    }
    match &config.receipt_key {
        Some(key) => println!("{} signs receipts.", attest::check_key(key)?),
        None => println!("A key that the database keeps signs receipts: /v1/status names it."),
    }
    if chain.has_treasury_key() {
        println!("{} pays withdrawals.", config.payments.pay_to);
    }
    Ok(())
}

async fn run_audit(path: &Path, publish: bool) -> Result<(), Failure> {
    let config = load(path)?;
    let db = Db::open(&config.database_url, Access::Inspect).await?;
    farebox::install_crypto();
    let chain = Chain::new(&config.payments, Clock::System)?;
    // No endpoint is asked for anything before it was seen to serve the right chain. One that cannot
    // be reached leaves that part of the report out.
    if let Err(TokenCheckError::Mismatch(mismatch)) = chain.check_token().await {
        return Err(mismatch.into());
    }
    let report = audit::run(&db, Some((&chain, config.payments.pay_to))).await?;
    print!("{report}");
    if report.has_drift() {
        return Err(Failure {
            status: 1,
            message: "the books do not agree with themselves or the chain".into(),
        });
    }
    if publish {
        if !report.is_whole() {
            return Err(Failure {
                status: 2,
                message: "nothing is published: the books could not be compared with the chain".into(),
            });
        }
        publish_reserves(&config, &db, &chain).await?;
    }
    Ok(())
}

async fn publish_reserves(config: &Config, db: &Db, chain: &Chain) -> Result<(), Failure> {
    let holdings = reserves::holdings(chain, &config.payments).await?;
    let published = reserves::publish(db, &Clock::System, &Entropy, holdings).await?;
    println!(
        "published reserves {}: {} micro-USDC owed to {} wallets, {} held in block {}, root 0x{}",
        published.number,
        published.liabilities,
        published.wallets,
        published.reserves,
        published.block_number,
        hex::encode(published.root)
    );
    Ok(())
}
