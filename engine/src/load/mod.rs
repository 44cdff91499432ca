//! From a path and options to an executor, in two phases, so that a model is refused before any port opens.
//!
//! [`inspect`] reads headers, configuration and tokenizer metadata and checks the tensor table; [`Inspected::plan`]
//! turns the machine's memory into a number of KV blocks; [`Inspected::load`] packs the weights. What the crate above
//! needs of the crates below it gets here, as plain data.

mod cuda;
mod group;
mod kv_layout;
mod machine;
mod plan;

use std::path::PathBuf;

use tandem_kernels::cpu::{Cpu, CpuOptions, default_threads};
use tandem_kernels::cuda::launcher::KvType;
use tandem_kernels::limits::{self, Limits};
use tandem_kernels::{Activations, DType, Isa, KernelError, KvDType};
use tandem_models::{
    CudaLoadError, DummyOptions, GenerationConfig, Llama, LlamaOptions, ModelError, ModelFiles, Shard,
    TokenizerFiles,
};
use thiserror::Error;

use crate::group::CustomAllReduce;
use cuda::ChosenDevice;
pub use cuda::{DeviceChoice, KernelCheck, check_kernels, compile_kernels};
pub use group::{Gathering, LeadOptions};
pub(crate) use group::{LoadedShard, MachineShare};
pub use kv_layout::KvLayout;
pub use machine::{MachineInfo, machine_info};
pub use plan::EnginePlan;
use plan::Room;

use crate::config::{EngineConfig, max_logits_rows};
use crate::error::ExecutorError;
use crate::executor::Executor;
use crate::executor::local::LocalExecutor;

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The files at the path.
    #[default]
    Auto,
    /// Random weights in the shape of the path's `config.json`.
    Dummy,
}

/// `--dtype`: the precision that is asked of weights, activations and KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ModelDType {
    /// What the file's weights are made for: integer arithmetic for quantised weights, bf16 for BF16, f32 for the rest.
    #[default]
    Auto,
    /// Everything in f32; quantised weights are expanded.
    F32,
    /// bf16 activations; quantised weights stay quantised, others become bf16.
    Bf16,
}

/// What to load and how to compute with it.
#[derive(Debug, Clone, Default)]
pub struct ModelOptions {
    pub path: PathBuf,
    pub load_format: LoadFormat,
    /// Type of dummy weights; that of `quantization`, else BF16, if absent.
    pub dummy_weights: Option<DType>,
    /// Block format that matrices in BF16, F16 or F32 are rounded to while they are loaded.
    pub quantization: Option<DType>,
    pub dtype: ModelDType,
    /// What computes, and which of the GPUs, should it be one.
    pub device: DeviceChoice,
    pub device_ordinal: usize,
    /// Ranks on this machine, which share its GPUs out; 0 is 1.
    pub local_ranks: usize,
    /// Overrides the arithmetic class that `dtype` implies.
    pub activations: Option<Activations>,
    /// Overrides the KV type that `dtype` implies.
    pub kv_cache_dtype: Option<KvDType>,
    /// e4m3 for KV, and for the weights of layers, which are rounded while they are loaded: on GPUs only.
    pub fp8_kv_cache: bool,
    pub fp8_weights: bool,
    /// Overrides the detected instruction set.
    pub isa: Option<Isa>,
    /// Overrides the number of worker threads, which is the number of CPUs that the process may use.
    pub threads: Option<usize>,
    /// Seed of dummy weights.
    pub seed: u64,
}

/// Sizes of the engine; absent ones follow from model and machine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Tokens of prompt and output together; the model's own limit if absent.
    pub max_model_len: Option<usize>,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub block_size: usize,
    /// Memory of the KV pool; from the machine's free memory if absent.
    pub kv_cache_memory_bytes: Option<u64>,
    /// Share of a GPU's memory that may be used for everything together, 0 to 1.
    pub gpu_memory_utilization: f64,
    /// No graphs: every launch by itself.
    pub enforce_eager: bool,
    /// As [`EngineConfig::async_scheduling`].
    pub async_scheduling: bool,
    pub custom_all_reduce: CustomAllReduce,
    pub prefix_caching: bool,
    pub max_queued_requests: usize,
    pub max_queued_bytes: usize,
    /// For tests: see [`EngineConfig::poison_freed_blocks`].
    pub poison_freed_blocks: bool,
}

impl EngineOptions {
    /// As [`EngineConfig::max_logits_rows`].
    pub(crate) fn max_logits_rows(&self) -> usize {
        max_logits_rows(self.max_num_seqs)
    }
}

impl Default for EngineOptions {
    fn default() -> Self {
        let config = EngineConfig::default();
        Self {
            max_model_len: None,
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            block_size: config.block_size,
            kv_cache_memory_bytes: None,
            gpu_memory_utilization: 0.9,
            enforce_eager: false,
            async_scheduling: config.async_scheduling,
            custom_all_reduce: CustomAllReduce::default(),
            prefix_caching: config.prefix_caching,
            max_queued_requests: config.max_queued_requests,
            max_queued_bytes: config.max_queued_bytes,
            poison_freed_blocks: false,
        }
    }
}

/// Why a model was not loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// An option that this model or machine cannot honour.
    #[error("{option}: {reason}")]
    Option {
        /// The flag's name without dashes, for example `max-model-len`.
        option: &'static str,
        reason: String,
    },
    #[error(transparent)]
    Cuda(#[from] CudaLoadError),
    #[error("the executor could not be made: {0}")]
    Executor(#[from] ExecutorError),
}

/// Facts about a model for people, routers and clients.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// What the path calls the model.
    pub name: String,
    pub architecture: String,
    /// Storage type of most weights, for example `Q4_1`.
    pub weights: String,
    pub num_parameters: u64,
    /// Size of the weights as stored.
    pub file_bytes: u64,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub num_layers: usize,
    pub hidden_size: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
    pub fingerprint: [u8; 16],
}

/// How a loaded model is computed, with what a benchmark needs to compare it with the machine's limits.
#[derive(Debug, Clone, PartialEq)]
pub struct BackendInfo {
    pub backend: &'static str,
    /// Processes that compute one step together.
    pub ranks: usize,
    pub isa: &'static str,
    /// The GPU's name.
    pub device: Option<String>,
    /// Of each rank.
    pub threads: usize,
    /// Arithmetic class of the linear layers.
    pub activations: Activations,
    /// Operations of all linear layers for one token, two per multiply-add; the LM head is not in it.
    pub layer_flops_per_token: u64,
    /// Operations of the LM head for one row of logits.
    pub head_flops_per_row: u64,
    /// Bytes of packed weights that a step reads.
    pub weight_bytes: u64,
    /// Bytes of KV that one token of context adds to what a decode step reads.
    pub kv_bytes_per_token: u64,
}

/// A model that was checked but not loaded.
pub struct Inspected {
    options: ModelOptions,
    files: ModelFiles,
    info: ModelInfo,
    /// The GPU that computes, if one does.
    device: Option<ChosenDevice>,
}

/// A model that is ready to run.
pub struct Loaded {
    pub executor: Box<dyn Executor>,
    pub config: EngineConfig,
    pub plan: EnginePlan,
    pub backend: BackendInfo,
}

/// Reads and checks everything but the weights themselves.
///
/// # Errors
/// The first reason to refuse the model, naming file, field and value.
pub fn inspect(options: &ModelOptions) -> Result<Inspected, LoadError> {
    let device = cuda::choose(options)?;
    if let Some(isa) = options.isa.filter(|_| device.is_none()) {
        Cpu::check_isa(isa)
            .map_err(|error| LoadError::Option { option: "isa", reason: error.to_string() })?;
    }
    let files = open(options)?;
    let config = &files.config;
    let info = ModelInfo {
        name: files.name.clone(),
        architecture: "llama".into(),
        weights: files.summary.dtype.name().into(),
        num_parameters: files.summary.num_parameters,
        file_bytes: files.summary.num_bytes,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        num_layers: config.num_layers,
        hidden_size: config.hidden_size,
        num_heads: config.num_heads,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        bos_token_id: config.bos_token_id,
        eos_token_ids: config.eos_token_ids.clone(),
        fingerprint: files.fingerprint,
    };
    Ok(Inspected { options: options.clone(), files, info, device })
}

/// The model's files, with weights as they are to be loaded.
fn open(options: &ModelOptions) -> Result<ModelFiles, LoadError> {
    let threads = options.threads.unwrap_or_else(default_threads);
    let files = match options.load_format {
        LoadFormat::Auto => tandem_models::open(&options.path)?,
        LoadFormat::Dummy => {
            let dtype = options.dummy_weights.or(options.quantization).unwrap_or(DType::Bf16);
            let dummy = DummyOptions { dtype, seed: options.seed, threads };
            tandem_models::open_dummy(&options.path, dummy)?
        }
    };
    let refuse = |reason: String| LoadError::Option { option: "quantization", reason };
    match options.quantization {
        None => Ok(files),
        Some(dtype) if !dtype.is_quantized() => Err(refuse(format!("{dtype} is no block format"))),
        Some(dtype) => files.quantized(dtype, threads).map_err(|error| refuse(error.to_string())),
    }
}

/// Measures what the machine can do at most, with the backend's own instructions and threads.
///
/// # Errors
/// If the backend cannot be made with these options.
pub fn measure_limits(options: &ModelOptions) -> Result<Limits, LoadError> {
    match cuda::choose(options)? {
        Some(device) => cuda::measure_limits(&device),
        None => Ok(limits::measure(&make_cpu(options)?)),
    }
}

impl Inspected {
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The GPU that computes, for people; none where the CPU does.
    pub fn device(&self) -> Option<String> {
        let device = self.device.as_ref()?;
        let info = &device.info;
        Some(format!("{info}, {} MiB, {} SMs", info.total_bytes >> 20, info.num_sms))
    }

    pub fn tokenizer(&self) -> &TokenizerFiles {
        &self.files.tokenizer
    }

    pub fn chat_template(&self) -> Option<&str> {
        self.files.chat_template.as_deref()
    }

    pub fn generation(&self) -> &GenerationConfig {
        &self.files.generation
    }

    /// Sizes that follow from model, machine and options. Needs no weights.
    ///
    /// # Errors
    /// [`LoadError::Option`] if the options cannot be honoured.
    pub fn plan(&self, options: &EngineOptions) -> Result<EnginePlan, LoadError> {
        match &self.device {
            Some(device) => self.plan_cuda(device, options, 1),
            None => self.plan_for_room(options, Room::of_machine(machine::memory_available_bytes()), 1),
        }
    }

    /// A plan for one of `size` ranks.
    fn plan_for_room(
        &self,
        options: &EngineOptions,
        room: Room,
        size: usize,
    ) -> Result<EnginePlan, LoadError> {
        let config = Shard { rank: 0, size }.config(&self.files.config);
        plan::plan(&config, self.activations(), self.kv_layout(), options, room)
    }

    /// Packs the weights and takes the memory of the KV pool. May take seconds.
    ///
    /// # Errors
    /// As [`Inspected::plan`]; also what packing finds.
    pub fn load(self, options: &EngineOptions) -> Result<Loaded, LoadError> {
        if let Some(device) = self.device.clone() {
            return self.load_cuda(&device, options);
        }
        let plan = self.plan(options)?;
        let config = self.engine_config(options, &plan);
        let llama_options = LlamaOptions {
            activations: plan.activations,
            max_tokens: config.max_num_batched_tokens,
            max_logits_rows: config.max_logits_rows(),
            shard: Shard::WHOLE,
        };
        let (cpu, kv_dtype) = (make_cpu(&self.options)?, self.kv_dtype());
        let name = self.info.name.clone();
        let model_config = self.files.config.clone();
        // The files' weights are dropped at the end of this function: what was packed needs them no longer.
        let model = Llama::load(&cpu, &name, model_config, self.files.weights(), llama_options)?;
        let backend = BackendInfo {
            backend: "cpu",
            ranks: 1,
            isa: cpu.isa().name(),
            device: None,
            threads: cpu.threads(),
            activations: model.activations(),
            layer_flops_per_token: model.config().layer_flops_per_token(),
            head_flops_per_row: model.config().head_flops_per_row(),
            weight_bytes: model.bytes_per_step(),
            kv_bytes_per_token: plan.kv_bytes / plan.kv_tokens as u64,
        };
        let executor = LocalExecutor::new(cpu, model, plan.num_blocks, kv_dtype)?;
        Ok(Loaded { executor: Box::new(executor), config, plan, backend })
    }

    fn engine_config(&self, options: &EngineOptions, plan: &EnginePlan) -> EngineConfig {
        EngineConfig {
            vocab_size: self.info.vocab_size,
            max_model_len: plan.max_model_len,
            max_num_seqs: options.max_num_seqs,
            max_num_batched_tokens: options.max_num_batched_tokens,
            block_size: plan.block_size,
            num_blocks: plan.num_blocks,
            prefix_caching: options.prefix_caching,
            async_scheduling: options.async_scheduling,
            max_queued_requests: options.max_queued_requests,
            max_queued_bytes: options.max_queued_bytes,
            eos_token_ids: self.info.eos_token_ids.clone(),
            model_fingerprint: self.info.fingerprint,
            recovery_timeout: EngineConfig::default().recovery_timeout,
            poison_freed_blocks: options.poison_freed_blocks,
        }
    }

    fn activations(&self) -> Activations {
        if self.device.is_some() {
            return Activations::Bf16;
        }
        let of_file = match self.files.summary.dtype {
            DType::Bf16 => Activations::Bf16,
            DType::F32 | DType::F16 => Activations::F32,
            DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => Activations::Int8,
        };
        self.options.activations.unwrap_or(match self.options.dtype {
            ModelDType::Auto => of_file,
            ModelDType::F32 => Activations::F32,
            ModelDType::Bf16 => Activations::Bf16,
        })
    }

    /// The type of KV where it will be.
    fn kv_layout(&self) -> KvLayout {
        match &self.device {
            Some(_) if self.options.fp8_kv_cache => KvLayout::Gpu(KvType::Fp8),
            Some(_) => KvLayout::Gpu(KvType::Bf16),
            None => KvLayout::Cpu(self.kv_dtype()),
        }
    }

    fn kv_dtype(&self) -> KvDType {
        self.options.kv_cache_dtype.unwrap_or(match self.options.dtype {
            ModelDType::F32 => KvDType::F32,
            ModelDType::Auto | ModelDType::Bf16 => KvDType::Bf16,
        })
    }
}

fn make_cpu(options: &ModelOptions) -> Result<Cpu, LoadError> {
    Ok(Cpu::new(CpuOptions { isa: options.isa, threads: options.threads })?)
}
