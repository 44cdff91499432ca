//! Everything that touches device memory: storage types, packed weights, operations, the KV cache and row sampling.
//!
//! This crate knows tensors and machines, not models: it imports no other crate of the workspace, reads no file and
//! makes no policy. One backend exists so far, [`cpu`]; an operation is a method of [`cpu::Cpu`], which owns the worker
//! pool and the instruction set chosen at start.
//!
//! # The promise that shapes the code
//! Within one numeric class (instruction set, activation class, dtypes, segments) the result of a row is bit-identical
//! whatever else is in the batch, however a prompt is chunked and however many threads run. So every reduction has a
//! fixed order that depends on the row's own data only, and work is split over outputs, never over a sum (sums that
//! are split have a fixed tree: segments of a linear layer, spans of attention).
//!
//! # Panics
//! Operations check the shapes of their arguments and panic on a mismatch: callers derive shapes from a validated
//! configuration, so a mismatch is a bug. What comes from files or options is checked with a [`KernelError`].

mod cache_folder;
pub mod cgroup;
pub mod comm;
pub mod cpu;
pub mod cuda;
mod dtype;
mod error;
pub mod limits;
pub mod sampling;
#[cfg(any(test, feature = "stand-ins"))]
#[doc(hidden)]
pub mod stub;

pub use cache_folder::cache_folder;
pub use dtype::{Activations, AttentionPrecision, DType, Isa, KvDType, Matrix};
pub use error::KernelError;

/// Grows with every change of an operation's order or rounding: two processes whose results may meet have the same.
pub const NUMERICS_VERSION: u32 = 1;
