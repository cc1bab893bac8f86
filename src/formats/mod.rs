//! The wire formats that clients and upstreams speak, as parsers and renderers. Pure: no I/O.

pub mod answer;
pub mod chat;
pub mod json;
pub mod request;
pub mod sse;
