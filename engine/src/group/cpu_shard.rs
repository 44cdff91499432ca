//! A rank's share on a CPU.

use std::time::{Duration, Instant};

use tandem_kernels::KvDType;
use tandem_kernels::comm::{TcpCommunicator, TcpOptions};
use tandem_kernels::cpu::{Cpu, KvCache};
use tandem_models::{ForwardBatch, Llama};

use super::device::{Forming, ShardDevice, ShardError, ShardOutput};
use crate::executor::sample::RowSampler;
use crate::sample_row::SampleRow;

/// How long a collective may take. The leader ends a step that hangs long before; this is for a rank that is alone with a
/// connection that nobody ends.
pub(super) const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(600);

/// Model, KV and connections.
pub(crate) struct CpuShard {
    cpu: Cpu,
    model: Llama,
    kv_dtype: KvDType,
    /// Whether every worker of this rank has a core to itself.
    spin: bool,
    sampler: RowSampler,
    kv: Option<KvCache>,
    comm: Option<TcpCommunicator>,
    /// What the last step came to.
    output: Option<ShardOutput>,
}

impl CpuShard {
    pub(crate) fn new(cpu: Cpu, model: Llama, kv_dtype: KvDType, spin: bool) -> Self {
        let sampler = RowSampler::new(&cpu, model.config().vocab_size);
        Self { cpu, model, kv_dtype, spin, sampler, kv: None, comm: None, output: None }
    }
}

impl ShardDevice for CpuShard {
    fn form(&mut self, forming: Forming<'_>) -> Result<(), ShardError> {
        self.comm = None;
        let options = TcpOptions { timeout: COLLECTIVE_TIMEOUT, spin: self.spin };
        let comm = TcpCommunicator::new(forming.rank, forming.peers, options)?;
        let handle = comm.abort_handle();
        if !forming.aborts.watch(forming.epoch, move || handle.abort()) {
            return Err(ShardError::Failed("given up".into()));
        }
        let config = Llama::kv_cache_config(self.model.config(), forming.num_blocks, self.kv_dtype);
        // The memory of the last epoch is used again, whatever is in it.
        if self.kv.as_ref().is_none_or(|kv| *kv.config() != config) {
            self.kv = None;
            self.kv = Some(KvCache::new(config)?);
        }
        self.comm = Some(comm);
        Ok(())
    }

    fn begin(&mut self, batch: &ForwardBatch, rows: &[SampleRow<'_>]) -> Result<(), ShardError> {
        let (Some(kv), Some(comm)) = (&mut self.kv, &mut self.comm) else {
            return Err(ShardError::Failed("no group was formed".into()));
        };
        let start = Instant::now();
        let logits = self.model.forward_shard(&self.cpu, batch, kv, comm)?;
        let forward = start.elapsed();
        self.output = Some(ShardOutput { forward, rows: self.sampler.sample(&self.cpu, logits, rows) });
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<ShardOutput>, ShardError> {
        Ok(self.output.take())
    }

    fn fill_nan(&mut self, blocks: &[u32]) {
        if let Some(kv) = &mut self.kv {
            kv.fill_nan(blocks);
        }
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }
}
