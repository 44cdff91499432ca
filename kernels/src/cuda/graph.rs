//! Graphs: a step's launches captured once for each batch bucket, then replayed with one call.
//!
//! What a graph holds are addresses and sizes; values that change from step to step lie in device buffers that are written
//! before the replay. A step of `n` rows replays the graph of [`bucket_of`]`(n)` rows, whose spare rows are dummies.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::{Cuda, CudaError};

/// Rows for which graphs are captured.
pub const GRAPH_BUCKETS: [usize; 15] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256];

/// The smallest bucket that holds `rows`; none for no rows and for more than the largest.
pub fn bucket_of(rows: usize) -> Option<usize> {
    if rows == 0 {
        return None;
    }
    GRAPH_BUCKETS.into_iter().find(|&bucket| rows <= bucket)
}

/// Captured work, ready to replay on its device's stream.
pub struct Graph {
    cuda: Cuda,
    /// Some until it is dropped.
    graph: Option<CudaGraph>,
}

// SAFETY: a graph may be used by any thread, one at a time; `replay` takes it exclusively.
unsafe impl Send for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Cuda {
    /// Records what `work` queues on the stream, without doing it, and makes it ready to replay. Inside `work`, launches, matrix
    /// products, fills and copies on the device are recorded; whatever else is `InCapture`. A matrix product should have been
    /// tuned before, and everything should have run once uncaptured, so that nothing is loaded lazily inside.
    ///
    /// # Errors
    /// That of `work`; `Capture` if it broke the capture; `InCapture` in a capture; `Driver`. The stream is usable afterwards in
    /// each case.
    ///
    /// # Panics
    /// If `work` does; the capture is ended before.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        self.forbid_in_capture("capturing")?;
        self.bind()?;
        let stream = self.stream();
        // Of this thread only: others may go on allocating and asking, as a collective's own threads do.
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(|error| CudaError::driver("cuStreamBeginCapture", error))?;
        let mark = self.begin_capture_mark();
        let done = catch_unwind(AssertUnwindSafe(work));
        drop(mark);
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        done.unwrap_or_else(|panic| resume_unwind(panic))?;
        match graph {
            Ok(Some(graph)) => {
                let graph = Graph { cuda: self.clone(), graph: Some(graph) };
                graph.upload()?;
                Ok(graph)
            }
            Ok(None) => Err(CudaError::Capture { reason: "there is no graph".into() }),
            Err(error) => {
                let (code, reason) = super::error::words(error);
                Err(CudaError::Capture { reason: format!("{code} ({reason})") })
            }
        }
    }
}

impl Graph {
    /// Queues the captured work. Does not wait and does not allocate.
    ///
    /// # Errors
    /// `Driver`; `InCapture`.
    ///
    /// # Safety
    /// Every buffer, module and communicator that the captured work uses still exists, and stays until the work is over.
    pub unsafe fn replay(&mut self) -> Result<(), CudaError> {
        self.cuda.forbid_in_capture("replaying a graph")?;
        self.graph().launch().map_err(|error| CudaError::driver("cuGraphLaunch", error))
    }

    /// Moves to the device what the first replay would have to.
    fn upload(&self) -> Result<(), CudaError> {
        self.graph().upload().map_err(|error| CudaError::driver("cuGraphUpload", error))
    }

    fn graph(&self) -> &CudaGraph {
        self.graph.as_ref().expect("a graph is there until it is dropped")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.cuda.bind().is_ok() {
            drop(self.graph.take());
        } else {
            // Without its context the driver has nothing left to free.
            std::mem::forget(self.graph.take());
        }
    }
}

#[cfg(test)]
mod tests;
