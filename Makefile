.PHONY: build demo test torture topups lint bench bench-latency bench-streams bench-bodies bench-ledger bench-growth bench-micro

# What scripts/setup.sh installs and the tests start.
export ANVIL ?= $(CURDIR)/tests/clients/node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil
export USDC_STATE ?= $(CURDIR)/build/usdc-state.json
export CLIENTS_PYTHON ?= $(CURDIR)/build/venv/bin/python

build:
	cargo build --release

# KEEP=1 leaves everything up; with OPENAI_API_KEY set it asks the real provider.
demo:
	scripts/demo.sh

test:
	scripts/setup.sh test
	POSTGRES_BIN=$${POSTGRES_BIN:-$$(ls -d /usr/lib/postgresql/*/bin | tail -1)} cargo test --release

# 500 kills in mid-settlement on each database, of the gateway and of PostgreSQL itself, and what became of
# the payments.
torture:
	scripts/setup.sh test
	POSTGRES_BIN=$${POSTGRES_BIN:-$$(ls -d /usr/lib/postgresql/*/bin | tail -1)} TORTURE_KILLS=$${TORTURE_KILLS:-500} \
		cargo test --release --test it -- torture:: --nocapture --test-threads=1

# 50 top-ups at once and 50 one after another, on a chain that makes a block a second.
topups:
	scripts/setup.sh test
	POSTGRES_BIN=$${POSTGRES_BIN:-$$(ls -d /usr/lib/postgresql/*/bin | tail -1)} TOPUPS_IN_SEQUENCE=50 \
		cargo test --release --test it -- pipeline --nocapture

# Holds settled a second on both databases, beside what PostgreSQL does with a transaction for each change.
bench-ledger:
	scripts/setup.sh test
	POSTGRES_BIN=$${POSTGRES_BIN:-$$(ls -d /usr/lib/postgresql/*/bin | tail -1)} cargo bench --bench ledger

# The same requests and reads on books that are nearly empty and on books of ten million entries. About 10 GB of disk.
bench-growth:
	scripts/setup.sh test
	POSTGRES_BIN=$${POSTGRES_BIN:-$$(ls -d /usr/lib/postgresql/*/bin | tail -1)} cargo bench --bench growth

# What single steps of a request take, on one core.
bench-micro:
	cargo bench --bench micro

lint:
	cargo fmt --check
	cargo clippy --release --all-targets -- -D warnings

# What Farebox costs beside nginx and a plain pass-through, and beside LiteLLM's gateway where BENCH_PEERS=litellm has
# installed it: docs/PERFORMANCE.md says what the figures mean.
bench:
	scripts/bench.sh throughput

bench-latency:
	scripts/bench.sh latency

bench-streams:
	scripts/bench.sh streams

bench-bodies:
	scripts/bench.sh bodies
