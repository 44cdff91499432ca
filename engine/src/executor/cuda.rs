//! One rank on a GPU, in the process of the engine, behind [`Executor`].

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tandem_kernels::comm::DeviceCommError;
use tandem_kernels::cuda::{CudaError, Pause};
use tandem_models::ForwardBatch;

use super::cuda_step::{CudaStep, QueuedStep};
use super::prepare::prepare;
use super::{Begun, Executor, StepOutput};
use crate::error::{ExecutorError, ExecutorErrorKind};
use crate::sample_row::SampleRow;
use crate::step_plan::StepPlan;

/// A step that takes longer hangs: the step thread counts as dead after two minutes, and this is to be said before.
pub(crate) const STEP_DEADLINE: Duration = Duration::from_secs(100);

/// How long the engine waits for what nobody wants any more.
const LAST_STEPS: Duration = Duration::from_secs(5);

/// Runs plans on a GPU.
pub(crate) struct CudaExecutor {
    step: CudaStep,
    batch: ForwardBatch,
    /// Steps that were begun, and when.
    queued: VecDeque<(QueuedStep, Instant)>,
    /// When the last step was done.
    last_done: Instant,
}

impl CudaExecutor {
    /// Takes a model that has its KV memory.
    pub(crate) fn new(step: CudaStep) -> Self {
        Self { step, batch: ForwardBatch::default(), queued: VecDeque::new(), last_done: Instant::now() }
    }
}

impl Executor for CudaExecutor {
    fn run(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        self.begin(plan, rows)?;
        self.finish()
    }

    fn begin(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<Begun, ExecutorError> {
        prepare(plan, &mut self.batch);
        let start = Instant::now();
        let queued = self.step.queue(&self.batch, rows, None)?;
        self.queued.push_back((queued, start));
        Ok(Begun::Step { keeps_tokens: self.step.kept_tokens() == rows.len() })
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        let (queued, start) = self.queued.pop_front().expect("a step was begun");
        if !wait_for_device(&self.step, &queued)? {
            let message = format!("the GPU was not done with a step in {} s", STEP_DEADLINE.as_secs());
            return Err(ExecutorError { message, kind: ExecutorErrorKind::Fatal });
        }
        let since = start.max(self.last_done);
        self.last_done = Instant::now();
        Ok(StepOutput { rows: self.step.collect(&queued)?, forward: self.last_done - since })
    }

    // After an error the device is of no use to this process any more. What is still queued when the engine stops is waited for, or
    // buffers would go under it.
    fn abort(&mut self) {
        self.queued.clear();
        if !self.step.model.runner().cuda().is_idle_within(LAST_STEPS).unwrap_or(true) {
            tracing::warn!("the GPU is not done with the last steps");
        }
    }

    fn poison_blocks(&mut self, blocks: &[u32]) {
        if let Err(error) = self.step.model.fill_nan(blocks) {
            tracing::error!(%error, "blocks cannot be overwritten");
        }
    }
}

/// Waits until a queued step is done; false if that takes too long.
fn wait_for_device(step: &CudaStep, queued: &QueuedStep) -> Result<bool, CudaError> {
    Pause::until(STEP_DEADLINE, || step.is_done(queued))
}

/// An error of the device says nothing of what else is wrong with it, and often nothing works afterwards: the process ends, and
/// a new one takes its place.
impl From<CudaError> for ExecutorError {
    fn from(error: CudaError) -> Self {
        Self { message: error.to_string(), kind: ExecutorErrorKind::Fatal }
    }
}

impl From<DeviceCommError> for ExecutorError {
    fn from(error: DeviceCommError) -> Self {
        Self { message: error.to_string(), kind: ExecutorErrorKind::Fatal }
    }
}
