//! The wire formats that clients and upstreams speak, as parsers and renderers. Pure: no I/O.

pub mod answer;
pub mod chat;
pub mod conversation;
pub mod errors;
pub mod exchange;
#[cfg(test)]
mod golden;
pub mod json;
mod members;
pub mod messages;
pub mod request;
pub mod responses;
pub mod sse;
pub mod translate;
