//! Asks at a fixed rate, however long answers take, and counts each answer's time from the moment its
//! request was due: a server that stalls is charged for all who would have come meanwhile.
//!
//!   openloop RATE SECONDS URL BODY [KEY …]      prints `requests errors p50_us p90_us p99_us max_us cpu_us`
#![allow(clippy::disallowed_methods, reason = "a program of its own, which nothing shuts down with grace")]

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use reqwest::header::CONTENT_TYPE;

/// A request that takes longer is an error.
const TIMEOUT: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut args = std::env::args().skip(1);
    let mut next = || args.next().ok_or("say RATE SECONDS URL BODY [KEY …]");
    let (rate, seconds): (u32, u32) = (next()?.parse()?, next()?.parse()?);
    let (url, body) = (next()?, next()?);
    let keys: Vec<String> = args.collect();
    let client = reqwest::Client::builder().tcp_nodelay(true).timeout(TIMEOUT).build()?;
    let gap = Duration::from_secs(1) / rate;
    let begin = Instant::now() + gap;
    let mut asked = Vec::new();
    let mut turn = keys.iter().cycle();
    for number in 0..rate * seconds {
        let due = begin + gap * number;
        let mut request = client.post(&url).header(CONTENT_TYPE, "application/json").body(body.clone());
        if let Some(key) = turn.next() {
            request = request.bearer_auth(key);
        }
        // The runtime's own timer is up to a millisecond late, which is as much as there is to measure. Here, beside
        // its workers, this thread may sleep.
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        asked.push(tokio::spawn(async move {
            let answer = request.send().await.ok()?;
            let is_ok = answer.status() == StatusCode::OK;
            answer.bytes().await.ok().filter(|_| is_ok)?;
            Some(due.elapsed())
        }));
    }
    let mut times = Vec::new();
    let mut errors = 0_u32;
    for answer in asked {
        match answer.await? {
            Some(time) => times.push(time.as_micros()),
            None => errors += 1,
        }
    }
    times.sort_unstable();
    let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len().saturating_sub(1)));
    let at = |percent| at(percent).copied().unwrap_or_default();
    let cpu_us = cpu_us().unwrap_or_default();
    println!("{} {errors} {} {} {} {} {cpu_us}", times.len(), at(50), at(90), at(99), at(100));
    Ok(())
}

/// Processor time that this process has used: proc(5), in ticks of a hundredth of a second.
fn cpu_us() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).take(2);
    fields.map(|ticks| ticks.parse::<u64>().ok()).sum::<Option<u64>>().map(|ticks| ticks * 10_000)
}
