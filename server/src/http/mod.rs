//! HTTP: OpenAI's API in front of the engine, with probes and metrics.
//!
//! ```text
//! serve ─▶ connection ─▶ router ─▶ body ─▶ *_request (fields, params) ─▶ encode ─▶ generation ─▶ answer | sse
//! ```
//!
//! Invariants:
//! * A failure that is known before the first byte has its proper status, chosen in `errors` alone.
//! * Every request is answered, ends with a typed error, or was left by its client; dropping its handler or body is all
//!   it takes to cancel it in the engine.
//! * Nothing a client sends makes a handler wait for the engine's step, and no probe waits for anything.
//! * No prompt, token or path in an error or a log line.
//!
//! Text is `crate::text`'s, sequences are the engine's; here is only the traffic between the two.

mod access_log;
mod answer;
mod body;
mod chat;
mod chat_request;
mod choice;
mod completion_request;
mod completions;
mod connection;
mod context;
mod encode;
mod errors;
mod exposition;
mod fields;
mod forward;
mod generation;
mod gpus;
mod group;
mod helpers;
mod leftover;
pub mod limits;
mod logprobs;
mod metrics;
mod models;
mod panics;
mod params;
mod probes;
mod process;
mod router;
mod serve;
mod sse;
mod state;
#[cfg(test)]
mod tests;
mod tokenize;

pub use gpus::GpuGauges;
pub use group::GroupView;
pub use serve::serve;
pub use state::{AppState, Serving};
