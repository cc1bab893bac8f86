//! The integration tests: one binary, a file per capability.
#![allow(
    clippy::unwrap_used,
    clippy::float_arithmetic,
    clippy::disallowed_methods,
    reason = "tests may fail loudly and start tasks of their own; the lints guard what serves"
)]
#![allow(dead_code, reason = "what a test can say is more than what each test says")]

mod support;

mod api_keys;
mod archive;
mod audit;
mod clients;
mod contract;
mod fallbacks;
mod ledger;
mod limits;
mod modalities;
mod nodes;
mod openapi;
mod operate;
mod overload;
mod pay_per_call;
mod payments;
mod prices;
mod program;
mod proofs;
mod races;
mod reserves;
mod restore;
mod sessions;
mod siwx;
mod streams;
mod structure;
mod torture;
mod upstream_faults;
mod wire_formats;
