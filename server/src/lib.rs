//! Text in, text out: tokenizer and templates, configuration, command line and HTTP.
//!
//! * [`text`]: tokenizer, detokenizer, stop strings, chat templates.
//! * [`http`]: OpenAI's API, probes and metrics.
//! * [`config`]: flags, environment and file, checked once.
//! * [`cli`]: the commands `serve`, `run`, `bench`, `check` and `kernels`.
//! * [`lifecycle`]: loading, ready, draining; requests in flight.
//!
//! This crate knows no tensors and no schedules: it hands token ids to the engine and gets token ids back.

pub mod cli;
pub mod config;
pub mod http;
pub mod lifecycle;
pub mod text;
