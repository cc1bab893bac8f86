#!/usr/bin/env bash
# Runs the main job end to end on this machine, from an empty checkout: see tests/clients/demo.mjs.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh demo
cargo build --release --bin farebox
# In place of this shell, so that an interrupt reaches the program that ends what it started.
exec node tests/clients/demo.mjs "${CARGO_TARGET_DIR:-target}/release/farebox"
