//! Payments against a real chain with Circle's real USDC: credited once, whatever happens around them.

mod bench;
mod chain_events;
mod deposits;
mod facilitator;
mod faults;
mod faulty_rpc;
mod journal_model;
mod pipeline;
mod reconciliation;
mod relayers;
mod reorgs;
mod rpc_endpoints;
mod settlement;
mod smart_wallets;
mod verification;
mod withdrawals;
