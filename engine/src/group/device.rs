//! What a rank computes with: its share of a model on a CPU or a GPU, the memory of its KV, and its connections to the others.

use std::net::TcpStream;
use std::time::Duration;

use tandem_models::ForwardBatch;

use super::compute::Aborts;
use crate::error::RowError;
use crate::executor::SampledToken;
use crate::sample_row::SampleRow;

/// A loaded share of a model. Made and used by the computing thread.
pub(crate) trait ShardDevice {
    /// Takes memory for `num_blocks` blocks of KV, again or for the first time, with whatever is in them, and makes of the
    /// connections to the other ranks what collectives need. Until the next call, steps are computed with those.
    ///
    /// # Errors
    /// In words; what was formed before is gone, too.
    fn form(&mut self, forming: Forming<'_>) -> Result<(), ShardError>;

    /// Begins a step together with all others; what comes of it [`ShardDevice::poll`] tells.
    ///
    /// # Errors
    /// In words; the others cannot go on either.
    fn begin(&mut self, batch: &ForwardBatch, rows: &[SampleRow<'_>]) -> Result<(), ShardError>;

    /// What the step came to that was begun first of those not over, if it is over: on rank 0 with answers to the rows. Does not wait.
    ///
    /// # Errors
    /// In words; the others cannot go on either, and no step that was begun is over any more.
    fn poll(&mut self) -> Result<Option<ShardOutput>, ShardError>;

    /// Whether one more step can be begun before the last is over.
    fn computes_beside(&self) -> bool {
        false
    }

    /// Rows of the step that was begun last whose tokens the next one can take ([`ForwardBatch::pending_tokens`]).
    fn kept_tokens(&self) -> usize {
        0
    }

    /// Overwrites the KV of these blocks with NaN.
    fn fill_nan(&mut self, blocks: &[u32]);

    fn vocab_size(&self) -> usize;
}

/// What a step came to.
pub(crate) struct ShardOutput {
    pub(crate) forward: Duration,
    pub(crate) rows: Vec<Result<SampledToken, RowError>>,
}

/// The beginning of an epoch.
pub(crate) struct Forming<'a> {
    pub(crate) rank: usize,
    pub(crate) size: usize,
    pub(crate) epoch: u64,
    pub(crate) num_blocks: usize,
    /// A connection to every other rank.
    pub(crate) peers: Vec<Option<TcpStream>>,
    /// Where to put what ends collectives that are under way.
    pub(crate) aborts: &'a Aborts,
}

/// Why a rank did not compute.
#[derive(Debug)]
pub(crate) enum ShardError {
    /// It can again, once the group is whole.
    Failed(String),
    /// This process never will: a new one has to take its place.
    Unfit(String),
}

impl<E: std::error::Error> From<E> for ShardError {
    fn from(error: E) -> Self {
        Self::Failed(error.to_string())
    }
}
