//! The error type of this crate.

use crate::{DType, Isa};

/// What can go wrong with inputs that this crate cannot trust: files, options, geometry.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KernelError {
    #[error("this machine has no {isa}; it supports {supported}")]
    UnsupportedIsa { isa: Isa, supported: Isa },
    #[error("the number of threads must be between 1 and {max}, not {threads}")]
    InvalidThreads { threads: usize, max: usize },
    #[error("could not start a worker thread: {0}")]
    SpawnWorker(String),
    #[error("a row of {cols} {dtype} values is not a whole number of blocks of {block_len}")]
    PartialBlock { dtype: DType, cols: usize, block_len: usize },
    #[error("a {dtype} matrix of {rows} x {cols} needs {expected:?} bytes, got {actual}")]
    MatrixSize { dtype: DType, rows: usize, cols: usize, expected: Option<usize>, actual: usize },
    #[error("a linear layer needs at least one part, one row and one column")]
    EmptyLinear,
    #[error("parts of one linear layer have {first} and {other} input columns")]
    InputMismatch { first: usize, other: usize },
    #[error("rows {start}..{end} are outside a matrix of {rows} rows")]
    RowRange { start: usize, end: usize, rows: usize },
    #[error("columns {start}..{end} of a {dtype} matrix of {cols} columns cannot be taken")]
    ColumnRange { start: usize, end: usize, cols: usize, dtype: DType },
    #[error("a bias of {actual} values does not fit a matrix of {rows} rows")]
    BiasLength { actual: usize, rows: usize },
    #[error("{cols} input columns cannot be split into {segments} segments of a multiple of 32")]
    Segments { cols: usize, segments: usize },
    #[error("gate and up need two parts of equal rows")]
    GateUpParts,
    #[error("head dim {head_dim} is not supported: it must be even and between 2 and {max}")]
    HeadDim { head_dim: usize, max: usize },
    #[error("the cache geometry is empty or too large")]
    CacheGeometry,
    #[error("could not reserve {bytes} bytes of memory")]
    OutOfMemory { bytes: usize },
    #[error("unknown {what} {value:?}; expected one of {expected}")]
    UnknownName { what: &'static str, value: String, expected: &'static str },
}
