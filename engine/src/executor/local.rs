//! One rank on a CPU, in the process of the engine: model, KV cache and sampler behind [`Executor`].

use std::time::Instant;

use tandem_kernels::KvDType;
use tandem_kernels::cpu::{Cpu, KvCache};
use tandem_models::{ForwardBatch, Llama};

use super::prepare::prepare;
use super::sample::RowSampler;
use super::{Executor, StepOutput};
use crate::error::{ExecutorError, ExecutorErrorKind};
use crate::sample_row::SampleRow;
use crate::step_plan::StepPlan;

/// Runs plans on the calling thread, which is worker 0 of the backend's pool.
pub(crate) struct LocalExecutor {
    cpu: Cpu,
    model: Llama,
    kv: KvCache,
    batch: ForwardBatch,
    sampler: RowSampler,
}

impl LocalExecutor {
    /// Takes a loaded model and the memory for `num_blocks` blocks of KV.
    pub(crate) fn new(
        cpu: Cpu,
        model: Llama,
        num_blocks: usize,
        kv_dtype: KvDType,
    ) -> Result<Self, ExecutorError> {
        let kv = KvCache::new(Llama::kv_cache_config(model.config(), num_blocks, kv_dtype))
            .map_err(|error| ExecutorError { message: error.to_string(), kind: ExecutorErrorKind::Fatal })?;
        let sampler = RowSampler::new(&cpu, model.config().vocab_size);
        Ok(Self { cpu, model, kv, batch: ForwardBatch::default(), sampler })
    }
}

impl Executor for LocalExecutor {
    fn run(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        prepare(plan, &mut self.batch);
        let start = Instant::now();
        let logits = self.model.forward(&self.cpu, &self.batch, &mut self.kv);
        let forward = start.elapsed();
        Ok(StepOutput { rows: self.sampler.sample(&self.cpu, logits, rows), forward })
    }

    // A step either ran to its end on this thread or panicked with the whole engine: nothing is left half done.
    fn abort(&mut self) {}

    fn poison_blocks(&mut self, blocks: &[u32]) {
        self.kv.fill_nan(blocks);
    }
}
