//! Why NCCL did not do something.

use crate::comm::CommError;
use crate::cuda::CudaError;

/// `name` is NCCL's own name of a result, as far as it is known here; `reason` its last words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    #[error("no NCCL: {}", .tried.join("; "))]
    NoLibrary { tried: Vec<String> },
    #[error("the NCCL library is too old or not the real one: it has no {symbol}")]
    NoSymbol { symbol: &'static str },
    #[error("NCCL is too old: it is version {found}, and {needed} is needed")]
    TooOld { found: String, needed: String },
    #[error("a NCCL id has {expected} bytes, not {actual}")]
    UniqueId { expected: usize, actual: usize },
    #[error("{call} failed: {name} ({code}): {reason}")]
    Failed { call: &'static str, code: i32, name: &'static str, reason: String },
    #[error("{what} did not end within {ms} ms")]
    Timeout { what: &'static str, ms: u128 },
    /// Somebody gave the communicator up, or it failed before.
    #[error("the communicator was given up")]
    Aborted,
    /// The work beside the collectives failed.
    #[error(transparent)]
    Device(#[from] CudaError),
}

impl From<NcclError> for CommError {
    fn from(error: NcclError) -> Self {
        match error {
            NcclError::Aborted => Self::Aborted,
            other => Self::Setup(other.to_string()),
        }
    }
}
