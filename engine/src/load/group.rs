//! Loading for a group: the share of one rank, and what the leader knows without weights.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use tandem_kernels::NUMERICS_VERSION;
use tandem_kernels::cpu::default_threads;
use tandem_models::{Llama, LlamaOptions, Shard, TensorParallel};
use tandem_wire::{GroupKey, Incarnation};

use super::plan::Room;
use super::{
    BackendInfo, EngineOptions, EnginePlan, Inspected, KvLayout, LoadError, Loaded, machine, make_cpu, plan,
};
use crate::error::ExecutorError;
use crate::group::executor::GroupExecutor;
use crate::group::leader::LeaderConfig;
use crate::group::message::{Loaded as GroupLoaded, PROTOCOL_VERSION, Term};
use crate::group::scout::Scout;
use crate::group::status::GroupStatus;
use crate::group::{CpuShard, ShardDevice};

/// How long a wait for ranks goes on before the caller may have a look.
const LOOK_UP: Duration = Duration::from_millis(50);

/// Where a leader takes ranks, and what they must bring.
#[derive(Debug)]
pub struct LeadOptions {
    /// Ranks of the group.
    pub size: usize,
    /// Ranks of one pod.
    pub gpus_per_pod: usize,
    /// Where ranks call.
    pub listener: TcpListener,
    pub key: Option<GroupKey>,
    /// Names of all pods, where they are known, and the port of the first rank of each: those that do not call are looked for.
    pub peers: Vec<String>,
    pub rank_port: u16,
    /// `host:port` where clients find this process.
    pub leader_http: String,
}

/// A leader that waits for its ranks.
pub struct Gathering {
    executor: GroupExecutor,
    inspected: Inspected,
    options: EngineOptions,
    plan: EnginePlan,
    threads: usize,
    size: usize,
}

/// What one rank may have of its machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MachineShare {
    /// Ranks that share memory and cores.
    pub(crate) local_ranks: usize,
    /// As in [`crate::RankOptions`].
    pub(crate) held_blocks: Option<u64>,
}

/// One rank's share of a model, loaded.
pub(crate) struct LoadedShard {
    pub(crate) device: Box<dyn ShardDevice>,
    /// What the leader hears of it.
    pub(crate) loaded: GroupLoaded,
    /// Most tokens, and most rows of logits, of one step.
    pub(crate) max_tokens: usize,
    pub(crate) max_logits_rows: usize,
    /// Whether the machine has a core for every worker of every rank on it.
    pub(crate) has_own_cores: bool,
}

impl Inspected {
    /// How the model is split over `size` ranks.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn tensor_parallel(&self, size: usize) -> Result<TensorParallel, LoadError> {
        Ok(TensorParallel::plan(&self.info.name, &self.files.config, size)?)
    }

    /// As [`Inspected::plan`], for one of `size` ranks of which `local_ranks` share this machine's memory.
    ///
    /// # Errors
    /// As [`Inspected::plan`]; also if the model cannot be split.
    pub fn plan_shard(
        &self,
        options: &EngineOptions,
        size: usize,
        local_ranks: usize,
    ) -> Result<EnginePlan, LoadError> {
        self.tensor_parallel(size)?;
        if let Some(device) = &self.device {
            return self.plan_cuda(device, options, size);
        }
        let config = Shard { rank: 0, size }.config(&self.files.config);
        let free_bytes = machine::memory_available_bytes() / local_ranks.max(1) as u64;
        plan::plan(&config, self.activations(), self.kv_layout(), options, Room::of_machine(free_bytes))
    }

    /// Everything that all ranks of a group and their leader must have alike.
    pub(crate) fn terms(&self, options: &EngineOptions, size: usize) -> Result<Vec<Term>, LoadError> {
        let split = self.tensor_parallel(size)?;
        let fingerprint: String = self.info.fingerprint.iter().map(|byte| format!("{byte:02x}")).collect();
        let terms = [
            ("protocol", PROTOCOL_VERSION.to_string()),
            ("numerics version", NUMERICS_VERSION.to_string()),
            ("tensor-parallel-size", size.to_string()),
            ("model", fingerprint),
            ("isa", self.isa()?.to_owned()),
            ("activations", self.activations().name().to_owned()),
            ("kv-cache-dtype", self.kv_layout().name().to_owned()),
            ("weights", if self.options.fp8_weights { "fp8" } else { "as in the file" }.to_owned()),
            ("segments", split.segments.to_string()),
            ("block-size", options.block_size.to_string()),
            ("max-num-seqs", options.max_num_seqs.to_string()),
            ("max-num-batched-tokens", options.max_num_batched_tokens.to_string()),
        ];
        let transport =
            self.device.as_ref().map(|device| ("collectives", device.transport().name().to_owned()));
        let sums =
            self.device.as_ref().map(|_| ("custom-all-reduce", options.custom_all_reduce.name().to_owned()));
        let terms = terms.into_iter().chain(transport).chain(sums);
        Ok(terms.map(|(name, value)| Term { name: name.to_owned(), value }).collect())
    }

    /// Packs the share of one rank and sees how many KV blocks fit beside it. May take seconds.
    ///
    /// # Errors
    /// As [`Inspected::load`].
    pub(crate) fn load_shard(
        self,
        options: &EngineOptions,
        rank: usize,
        size: usize,
        MachineShare { local_ranks, held_blocks }: MachineShare,
    ) -> Result<LoadedShard, LoadError> {
        if let Some(device) = self.device.clone() {
            return self.load_cuda_shard(&device, options, Shard { rank, size });
        }
        let kv_dtype = self.kv_dtype();
        let llama_options = LlamaOptions {
            activations: self.activations(),
            max_tokens: options.max_num_batched_tokens,
            max_logits_rows: options.max_logits_rows(),
            shard: Shard { rank, size },
        };
        let mut model_options = self.options.clone();
        let cores = default_threads();
        let threads = *model_options.threads.get_or_insert((cores / local_ranks.max(1)).max(1));
        let cpu = make_cpu(&model_options)?;
        let name = self.info.name.clone();
        let model = Llama::load(&cpu, &name, self.files.config.clone(), self.files.weights(), llama_options)?;
        // After the weights are in memory: what is free now can hold KV.
        let free_bytes = machine::memory_available_bytes();
        let layout = KvLayout::Cpu(kv_dtype);
        let capacity = |bytes| plan::capacity(model.config(), layout, options, bytes);
        let held = held_again(held_blocks, capacity(free_bytes));
        if held == 0 {
            self.plan_shard(options, size, local_ranks)?;
        }
        let max_blocks = held.max(capacity(free_bytes / local_ranks.max(1) as u64));
        let has_own_cores = threads * local_ranks <= cores;
        let LlamaOptions { max_tokens, max_logits_rows, .. } = llama_options;
        let bytes = model.loaded_bytes();
        let loaded = GroupLoaded { max_blocks, weight_bytes: bytes.kept, read_bytes: bytes.read };
        let device = Box::new(CpuShard::new(cpu, model, kv_dtype, has_own_cores));
        Ok(LoadedShard { device, loaded, max_tokens, max_logits_rows, has_own_cores })
    }

    /// Begins to take ranks; needs no weights. `status` is kept up to date from now on.
    ///
    /// # Errors
    /// If the model cannot be split or the options cannot be honoured.
    pub fn lead(
        self,
        options: &EngineOptions,
        group: LeadOptions,
        status: GroupStatus,
    ) -> Result<Gathering, LoadError> {
        let plan = self.plan_shard(options, group.size, group.gpus_per_pod)?;
        let config = LeaderConfig {
            size: group.size,
            gpus_per_pod: group.gpus_per_pod,
            terms: self.terms(options, group.size)?,
            wanted_blocks: plan.num_blocks as u64,
            leader_http: group.leader_http,
        };
        let failed = |error: String| LoadError::Executor(ExecutorError::fatal(error));
        let incarnation = Incarnation::random();
        let scout = Scout::start(group.peers, group.rank_port).map_err(|error| failed(error.to_string()))?;
        let begins = self.device.is_some();
        let executor =
            GroupExecutor::start(config, begins, group.listener, group.key, incarnation, scout, status);
        let executor = executor.map_err(|error| failed(error.to_string()))?;
        let threads = self.options.threads.unwrap_or((default_threads() / group.gpus_per_pod).max(1));
        Ok(Gathering { executor, inspected: self, options: options.clone(), plan, threads, size: group.size })
    }
}

impl Gathering {
    /// Waits until all ranks are there and connected to each other.
    ///
    /// # Errors
    /// After `timeout`, naming who is missing and why; if the ranks have too little memory for the options.
    pub fn wait(mut self, timeout: Option<Duration>) -> Result<Loaded, LoadError> {
        let start = Instant::now();
        while !self.executor.wait(LOOK_UP) {
            if timeout.is_some_and(|timeout| start.elapsed() >= timeout) {
                let message = format!(
                    "the group was not whole within {} s: {}",
                    start.elapsed().as_secs(),
                    self.executor.missing().join("; ")
                );
                return Err(LoadError::Executor(ExecutorError::fatal(message)));
            }
        }
        let Self { executor, inspected, options, mut plan, threads, size } = self;
        let num_blocks = executor.num_blocks().expect("the group has formed") as usize;
        fit_blocks(&mut plan, num_blocks, &options)?;
        let loaded = executor.loaded();
        let config = inspected.engine_config(&options, &plan);
        let model = &inspected.files.config;
        let backend = BackendInfo {
            backend: if inspected.device.is_some() { "cuda" } else { "cpu" },
            ranks: size,
            isa: inspected.isa()?,
            device: inspected.device.as_ref().map(|device| device.info.name.clone()),
            threads,
            activations: plan.activations,
            layer_flops_per_token: model.layer_flops_per_token(),
            head_flops_per_row: model.head_flops_per_row(),
            weight_bytes: loaded.map_or(0, |loaded| loaded.weight_bytes).saturating_mul(size as u64),
            kv_bytes_per_token: plan.kv_bytes / plan.kv_tokens.max(1) as u64,
        };
        Ok(Loaded { executor: Box::new(executor), config, plan, backend })
    }
}

/// The blocks that a rank has again after it was started again; 0 for none. The other ranks of the machine hold theirs, touched or
/// not, as they did before, so what is free need not be shared with them: what fitted beside them fits again, if there is as much
/// at all.
fn held_again(held_blocks: Option<u64>, capacity: u64) -> u64 {
    held_blocks.filter(|held| *held <= capacity).unwrap_or(0)
}

/// The plan with the blocks that all ranks have memory for.
fn fit_blocks(plan: &mut EnginePlan, num_blocks: usize, options: &EngineOptions) -> Result<(), LoadError> {
    let block_bytes = plan.kv_bytes / plan.num_blocks as u64;
    let kv_tokens = num_blocks * plan.block_size;
    if kv_tokens < plan.max_model_len {
        if options.max_model_len.is_some() || kv_tokens == 0 {
            let reason = format!(
                "{} tokens do not fit the {kv_tokens} that every rank has memory for: lower it",
                plan.max_model_len
            );
            return Err(LoadError::Option { option: "max-model-len", reason });
        }
        plan.notes.push(format!(
            "max-model-len is lowered from {} to {kv_tokens}: a rank has no memory for more",
            plan.max_model_len
        ));
        plan.max_model_len = kv_tokens;
    }
    (plan.num_blocks, plan.kv_tokens) = (num_blocks, kv_tokens);
    plan.kv_bytes = num_blocks as u64 * block_bytes;
    Ok(())
}

impl Inspected {
    /// What code is made for, on the GPU if there is one, else on this machine.
    fn isa(&self) -> Result<&'static str, LoadError> {
        if let Some(device) = &self.device {
            return Ok(device.isa());
        }
        let options = super::ModelOptions { threads: Some(1), ..self.options.clone() };
        Ok(make_cpu(&options)?.isa().name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_is_started_again_has_what_it_had_if_that_is_there() {
        assert_eq!(held_again(None, 1000), 0);
        assert_eq!(held_again(Some(400), 1000), 400, "though half of what is free is less than it had");
        assert_eq!(held_again(Some(1000), 1000), 1000);
        assert_eq!(held_again(Some(1001), 1000), 0, "the machine has less than before");
    }
}
