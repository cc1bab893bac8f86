//! The wire formats that clients and upstreams speak, as parsers and renderers. Pure: no I/O.

pub mod answer;
pub mod chat;
pub mod completions;
pub mod conversation;
pub mod embeddings;
pub mod errors;
pub mod exchange;
#[cfg(test)]
mod golden;
pub mod goods;
pub mod images;
pub mod json;
pub mod media;
mod members;
pub mod messages;
pub mod multipart;
pub mod request;
pub mod responses;
pub mod sound;
pub mod speech;
pub mod sse;
pub mod transcription;
pub mod translate;
