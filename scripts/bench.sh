#!/usr/bin/env bash
# Measures a release build on this machine, from an empty checkout; docs/PERFORMANCE.md says how to read it.
#
#   scripts/bench.sh throughput | latency | streams | bodies
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh bench
cargo build --release --bin farebox --example passthrough --example openloop
# A stream has a descriptor at each end of each connection.
ulimit -n "$(ulimit -Hn)"
# In place of this shell, so that an interrupt reaches the program that ends what it started.
exec node "benches/${1:?say throughput, latency, streams or bodies}.mjs" "${CARGO_TARGET_DIR:-target}/release"
