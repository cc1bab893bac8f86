.PHONY: build demo test lint

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

lint:
	cargo fmt --check
	cargo clippy --release --all-targets -- -D warnings
