//! One rank on a GPU, in the process of the engine, behind [`Executor`].

use std::time::{Duration, Instant};

use tandem_kernels::comm::DeviceCommError;
use tandem_kernels::cuda::{CudaError, Pause};
use tandem_models::ForwardBatch;

use super::cuda_step::CudaStep;
use super::prepare::prepare;
use super::{Executor, StepOutput};
use crate::error::{ExecutorError, ExecutorErrorKind};
use crate::sample_row::SampleRow;
use crate::step_plan::StepPlan;

/// A step that takes longer hangs: the step thread counts as dead after two minutes, and this is to be said before.
pub(crate) const STEP_DEADLINE: Duration = Duration::from_secs(100);

/// Runs plans on a GPU.
pub(crate) struct CudaExecutor {
    step: CudaStep,
    batch: ForwardBatch,
    /// When the step was begun.
    start: Instant,
}

impl CudaExecutor {
    /// Takes a model that has its KV memory.
    pub(crate) fn new(step: CudaStep) -> Self {
        Self { step, batch: ForwardBatch::default(), start: Instant::now() }
    }
}

impl Executor for CudaExecutor {
    fn run(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        self.begin(plan, rows)?;
        self.finish(plan, rows)
    }

    fn begin(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<bool, ExecutorError> {
        prepare(plan, &mut self.batch);
        self.start = Instant::now();
        self.step.queue(&self.batch, rows, None)?;
        Ok(true)
    }

    fn finish(&mut self, _: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        if !wait_for_device(&self.step)? {
            let message = format!("the GPU was not done with a step in {} s", STEP_DEADLINE.as_secs());
            return Err(ExecutorError { message, kind: ExecutorErrorKind::Fatal });
        }
        let forward = self.start.elapsed();
        Ok(StepOutput { rows: self.step.collect(&self.batch, rows)?, forward })
    }

    // After an error the device is of no use to this process any more.
    fn abort(&mut self) {}

    fn poison_blocks(&mut self, blocks: &[u32]) {
        if let Err(error) = self.step.model.fill_nan(blocks) {
            tracing::error!(%error, "blocks cannot be overwritten");
        }
    }
}

/// Waits until a step is done; false if that takes too long.
pub(crate) fn wait_for_device(step: &CudaStep) -> Result<bool, CudaError> {
    Pause::until(STEP_DEADLINE, || step.is_done())
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
