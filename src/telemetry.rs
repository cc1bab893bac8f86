//! Logs and metrics: what an operator sees of a running gateway. No secret is in either.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use metrics::{Counter, Histogram, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use crate::app::App;
use crate::config::LogFormat;
use crate::ledger::LedgerError;
use crate::payments::{ChainHealth, PaymentError, State};

/// Seconds, from the time of one memory access to that of a long answer.
const LATENCY_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Sends logs to standard error, so that standard output is free for what programs read.
pub fn start_logs(format: LogFormat) {
    let filter = EnvFilter::try_from_env("FAREBOX_LOG");
    let filter = filter.unwrap_or_else(|_| EnvFilter::new("farebox=info,warn"));
    // These would write whole addresses of RPC endpoints, which may hold a key.
    let filter = ["alloy_transport_http=warn", "alloy_rpc_client=warn", "hyper_util=warn", "reqwest=warn"]
        .into_iter()
        .filter_map(|directive| directive.parse().ok())
        .fold(filter, EnvFilter::add_directive);
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = match format {
        LogFormat::Text => logs.with_ansi(false).try_init(),
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
}

/// Installs the recorder that counts; what it returns renders the Prometheus text format.
pub fn start_metrics() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), LATENCY_BUCKETS)?
        .install_recorder()?;
    describe_counter!("farebox_http_requests_total", "Requests answered, by route and status");
    describe_histogram!("farebox_http_request_seconds", "From a request's head to its answer's head");
    describe_counter!("farebox_limited_total", "Requests refused by a limit, by code");
    describe_counter!("farebox_reversed_micro_total", "Micro-USDC of credits that the chain undid");
    describe_counter!("farebox_rpc_put_aside_total", "Times that an RPC endpoint was put aside");
    describe_counter!("farebox_facilitator_calls_total", "Calls to the facilitator, by endpoint and outcome");
    describe_histogram!("farebox_facilitator_seconds", "One call to the facilitator, by endpoint");
    describe_counter!("farebox_holds_total", "Holds made");
    describe_counter!("farebox_holds_ended_total", "Holds ended, by model and outcome");
    describe_counter!("farebox_charged_micro_total", "Micro-USDC charged, by model and outcome");
    describe_counter!("farebox_tokens_total", "Tokens charged for, by model and kind");
    describe_counter!("farebox_unpriced_requests_total", "Requests that used what has no price, by model");
    describe_counter!("farebox_reloads_total", "Times that the models were read again, by outcome");
    describe_counter!("farebox_above_hold_micro_total", "Micro-USDC that requests cost above their holds");
    describe_histogram!("farebox_upstream_seconds", "From sending a request to the upstream's answer's head");
    describe_histogram!("farebox_ledger_seconds", "One ledger operation, its commit included");
    describe_counter!("farebox_ledger_commits_total", "Transactions that holds and ends went together in");
    describe_gauge!("farebox_open_holds", "Holds that have not ended");
    describe_gauge!("farebox_locked_micro", "Micro-USDC locked by open holds");
    describe_gauge!("farebox_payments", "Payments in the journal, by state");
    describe_gauge!("farebox_deposits_suspense", "Deposits that wait for their wallets");
    describe_gauge!("farebox_deposits_suspense_micro", "Micro-USDC of deposits that wait for their wallets");
    describe_gauge!("farebox_deposits_block", "The block that the search for deposits goes on at");
    describe_counter!("farebox_deposits_credited_micro_total", "Micro-USDC of deposits credited");
    describe_gauge!("farebox_withdrawals_open", "Withdrawals that have not ended");
    describe_gauge!("farebox_withdrawals_open_micro", "Micro-USDC that withdrawals lock");
    describe_counter!("farebox_withdrawn_micro_total", "Micro-USDC of withdrawals that are final");
    describe_gauge!("farebox_relayer_gas_gwei", "What the relayer has left for gas, in gwei");
    describe_gauge!("farebox_chain_up", "1 while the chain answers and its token is checked");
    Ok(handle)
}

/// How often what histograms have been told is summed up. Until then each of it is remembered by itself.
const UPKEEP: Duration = Duration::from_secs(5);

/// Keeps the memory of the recorder bounded, also where nobody reads it.
pub async fn keep_up(metrics: PrometheusHandle) {
    loop {
        tokio::time::sleep(UPKEEP).await;
        metrics.run_upkeep();
    }
}

/// Method, route and status.
type Kind = (&'static str, &'static str, u16);
type OfRequests = (Counter, Histogram);

/// Counters of requests, each looked up by its labels once. These are words of this program, so there is a
/// bounded number of them.
static REQUESTS: LazyLock<Mutex<HashMap<Kind, OfRequests>>> = LazyLock::new(Mutex::default);

/// Counts a request that was answered. Only once the recorder is installed is it heard of.
pub fn count_request(method: &'static str, route: &'static str, status: u16, elapsed: Duration) {
    let mut known = REQUESTS.lock().unwrap_or_else(PoisonError::into_inner);
    let (requests, seconds) = known.entry((method, route, status)).or_insert_with(|| {
        let labels = [("method", method.into()), ("route", route.into()), ("status", status.to_string())];
        let seconds = metrics::histogram!("farebox_http_request_seconds", "route" => route);
        (metrics::counter!("farebox_http_requests_total", &labels), seconds)
    });
    requests.increment(1);
    seconds.record(elapsed);
}

#[derive(Debug, thiserror::Error)]
pub enum GaugeError {
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Payments(#[from] PaymentError),
}

/// Reads the gauges that no event updates.
pub async fn update_gauges(app: &App) -> Result<(), GaugeError> {
    let (holds, locked) = app.ledger.open_holds().await?;
    metrics::gauge!("farebox_open_holds").set(gauge(holds));
    metrics::gauge!("farebox_locked_micro").set(gauge(locked.get()));
    let counts = app.payments.count_by_state().await?;
    for state in State::ALL {
        let count = counts.iter().find(|(name, _)| name == state.as_str()).map_or(0, |(_, count)| *count);
        metrics::gauge!("farebox_payments", "state" => state.as_str()).set(gauge(count));
    }
    let (deposits, micro) = app.payments.suspense().await?;
    metrics::gauge!("farebox_deposits_suspense").set(gauge(deposits));
    metrics::gauge!("farebox_deposits_suspense_micro").set(gauge(micro.get()));
    if let Some(block) = app.payments.deposits_searched_to().await? {
        metrics::gauge!("farebox_deposits_block").set(gauge(i64::try_from(block).unwrap_or(i64::MAX)));
    }
    let (withdrawals, micro) = app.payments.open_withdrawals().await?;
    metrics::gauge!("farebox_withdrawals_open").set(gauge(withdrawals));
    metrics::gauge!("farebox_withdrawals_open_micro").set(gauge(micro.get()));
    let up = app.payments.health() == ChainHealth::Ok;
    metrics::gauge!("farebox_chain_up").set(if up { 1.0 } else { 0.0 });
    Ok(())
}

/// A gauge is a float in the Prometheus format; it is read by people, and no sum rests on it.
#[expect(clippy::cast_precision_loss, reason = "shown, never reckoned with")]
fn gauge(value: i64) -> f64 {
    value as f64
}
