//! From a checked configuration to a model that runs: the only file of the server that knows how the engine loads.
//!
//! Two phases. [`prepare`] reads headers, configuration, tokenizer and template and refuses what cannot work, before
//! any port opens; [`Prepared::load`] reads the weights and starts the step thread.

use std::net::TcpListener;
use std::sync::Arc;

use tandem_engine::{
    BackendInfo, DType, DeviceChoice, EngineConfig, EngineHandle, EngineOptions, EnginePlan, Environment,
    FixedSeeds, GenerationConfig, GpuMeter, GroupStatus, Inspected, LeadOptions, LoadError, ModelDType,
    ModelInfo, ModelOptions,
};

use super::Exit;
use crate::config::{
    Activations, CommonConfig, ConfigError, CustomAllReduce, Device, Dtype, GroupConfig, Isa, KvCacheDtype,
    LoadFormat, Quantization, WeightType,
};
use crate::text::{ChatTemplate, TextError, Tokenizer};

/// Bytes of requests that may wait.
const MAX_QUEUED_BYTES: usize = 256 << 20;

/// A model that was checked.
pub(super) struct Prepared {
    pub(super) inspected: Inspected,
    pub(super) options: EngineOptions,
    pub(super) plan: EnginePlan,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    pub(super) template: Option<Arc<ChatTemplate>>,
}

/// A model that runs.
pub(super) struct Running {
    pub(super) engine: EngineHandle,
    pub(super) info: ModelInfo,
    pub(super) plan: EnginePlan,
    pub(super) backend: BackendInfo,
    pub(super) generation: GenerationConfig,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    pub(super) template: Option<Arc<ChatTemplate>>,
    /// Looks at the GPUs that compute.
    pub(super) gpus: Option<GpuMeter>,
}

/// Checks the model, its tokenizer and template, and the sizes that follow from model and machine.
///
/// # Errors
/// The first refusal, in one line.
pub(super) fn prepare(
    config: &CommonConfig,
    group: Option<&GroupConfig>,
    max_queued_requests: usize,
) -> Result<Prepared, Exit> {
    let inspected = inspect(config, group, 0)?;
    let options = engine_options(config, max_queued_requests, &inspected);
    let tokenizer = Tokenizer::from_model(inspected.tokenizer()).map_err(Exit::refused)?.map(Arc::new);
    if let Some(note) = tokenizer.as_ref().and_then(|tokenizer| vocabulary_note(&inspected, tokenizer)) {
        tracing::warn!("{note}");
    }
    let template = template(config, &inspected, tokenizer.as_ref()).map_err(Exit::refused)?.map(Arc::new);
    let plan = plan(config, group, &inspected, &options)?;
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
    Ok(Prepared { inspected, options, plan, tokenizer, template })
}

/// Sizes that follow from model, machine and options, for this process or for each rank of its group.
pub(super) fn plan(
    config: &CommonConfig,
    group: Option<&GroupConfig>,
    inspected: &Inspected,
    options: &EngineOptions,
) -> Result<EnginePlan, Exit> {
    let plan = match group {
        Some(group) => inspected.plan_shard(options, group.size(), group.gpus_per_pod),
        None => inspected.plan(options),
    };
    plan.map_err(|e| refusal(config, e))
}

/// Reads the model's headers and configuration, for a local rank of a group or the only one.
pub(super) fn inspect(
    config: &CommonConfig,
    group: Option<&GroupConfig>,
    local_rank: usize,
) -> Result<Inspected, Exit> {
    let local_ranks = group.map_or(1, |group| group.gpus_per_pod);
    let options = ModelOptions { device_ordinal: local_rank, local_ranks, ..model_options(config) };
    tandem_engine::inspect(&options).map_err(|e| refusal(config, e))
}

/// What is to be said of a tokenizer with more tokens than the model: prompts that use them are refused one by one.
pub(super) fn vocabulary_note(inspected: &Inspected, tokenizer: &Tokenizer) -> Option<String> {
    let (has, model) = (tokenizer.vocab_size(), inspected.info().vocab_size);
    (has > model).then(|| {
        format!("the tokenizer has {has} tokens, the model {model}: prompts with the others are refused")
    })
}

/// The chat template: the configuration's, else the model's. Without a tokenizer there is nothing to render for.
pub(super) fn template(
    config: &CommonConfig,
    inspected: &Inspected,
    tokenizer: Option<&Arc<Tokenizer>>,
) -> Result<Option<ChatTemplate>, TextError> {
    let source = config.chat_template.as_deref().or(inspected.chat_template());
    let Some((source, tokenizer)) = source.zip(tokenizer) else { return Ok(None) };
    ChatTemplate::new(source, Arc::clone(tokenizer)).map(Some)
}

impl Prepared {
    /// Waits for the ranks of the group and starts the step thread; may take for ever.
    ///
    /// # Errors
    /// If the model or the options do not fit the group, in one line.
    pub(super) fn gather(
        self,
        config: &CommonConfig,
        group: &GroupConfig,
        listener: TcpListener,
        status: GroupStatus,
        leader_http: String,
    ) -> Result<Running, Exit> {
        let info = self.inspected.info().clone();
        let generation = self.inspected.generation().clone();
        let (size, gpus_per_pod) = (group.size(), group.gpus_per_pod);
        let split = self.inspected.tensor_parallel(size).map_err(|e| refusal(config, e))?;
        if !split.exact {
            tracing::warn!(
                "{size} ranks do not divide the {} segments of this model's sums: answers are right, but not the bits that \
                 another number of ranks gives",
                split.segments
            );
        }
        let lead = LeadOptions {
            size,
            gpus_per_pod,
            listener,
            key: group.key.clone(),
            peers: group.peers.clone(),
            rank_port: group.rank_port,
            leader_http,
        };
        let gathering = self.inspected.lead(&self.options, lead, status).map_err(|e| refusal(config, e))?;
        let loaded = gathering.wait(group.join_timeout).map_err(|e| refusal(config, e))?;
        for note in &loaded.plan.notes {
            tracing::warn!("{note}");
        }
        let gpus = gpus(&loaded.backend, gpus_per_pod);
        let engine = EngineConfig { recovery_timeout: group.recovery_timeout, ..loaded.config };
        Ok(Running {
            engine: tandem_engine::spawn_with(loaded.executor, engine, environment(config)),
            info,
            plan: loaded.plan,
            backend: loaded.backend,
            generation,
            tokenizer: self.tokenizer,
            template: self.template,
            gpus,
        })
    }

    /// Reads the weights and starts the step thread; may take seconds.
    ///
    /// # Errors
    /// What loading found, in one line.
    pub(super) fn load(self, config: &CommonConfig) -> Result<Running, Exit> {
        let info = self.inspected.info().clone();
        let generation = self.inspected.generation().clone();
        let loaded = self.inspected.load(&self.options).map_err(|e| refusal(config, e))?;
        let gpus = gpus(&loaded.backend, 1);
        Ok(Running {
            engine: tandem_engine::spawn_with(loaded.executor, loaded.config, environment(config)),
            info,
            plan: loaded.plan,
            backend: loaded.backend,
            generation,
            tokenizer: self.tokenizer,
            template: self.template,
            gpus,
        })
    }
}

/// What looks at this process's GPUs, if it computes on some; a machine without NVML only has no such metrics.
fn gpus(backend: &BackendInfo, count: usize) -> Option<GpuMeter> {
    if backend.backend != "cuda" {
        return None;
    }
    let meter = GpuMeter::open(0..count);
    meter.inspect_err(|reason| tracing::warn!(reason, "no metrics of the GPU")).ok()
}

/// The system's time, and the seeds that the configuration fixes or none.
fn environment(config: &CommonConfig) -> Environment {
    let system = Environment::system();
    match config.seed {
        Some(seed) => Environment { seeds: Arc::new(FixedSeeds::new(seed)), ..system },
        None => system,
    }
}

/// The engine's view of the model flags.
pub(super) fn model_options(config: &CommonConfig) -> ModelOptions {
    ModelOptions {
        path: config.model.clone(),
        load_format: match config.load_format {
            LoadFormat::Auto => tandem_engine::LoadFormat::Auto,
            LoadFormat::Dummy => tandem_engine::LoadFormat::Dummy,
        },
        dummy_weights: dummy_weights(config),
        quantization: config.quantization.and_then(|quantization| match quantization {
            Quantization::Q8_0 => Some(DType::Q8_0),
            Quantization::Q4_0 => Some(DType::Q4_0),
            Quantization::Q4_1 => Some(DType::Q4_1),
            Quantization::Fp8 => None,
        }),
        fp8_weights: config.quantization == Some(Quantization::Fp8),
        fp8_kv_cache: config.kv_cache_dtype == KvCacheDtype::Fp8,
        dtype: match config.dtype {
            Dtype::F32 => ModelDType::F32,
            Dtype::Bf16 => ModelDType::Bf16,
            // f16 was refused with the configuration.
            Dtype::Auto | Dtype::F16 => ModelDType::Auto,
        },
        activations: match config.activations {
            Activations::Auto => None,
            Activations::Int8 => Some(tandem_engine::Activations::Int8),
            Activations::Bf16 => Some(tandem_engine::Activations::Bf16),
            Activations::F32 => Some(tandem_engine::Activations::F32),
        },
        kv_cache_dtype: match config.kv_cache_dtype {
            KvCacheDtype::F32 => Some(tandem_engine::KvDType::F32),
            KvCacheDtype::Bf16 => Some(tandem_engine::KvDType::Bf16),
            KvCacheDtype::F16 => Some(tandem_engine::KvDType::F16),
            KvCacheDtype::Int8 => Some(tandem_engine::KvDType::Int8),
            KvCacheDtype::Auto | KvCacheDtype::Fp8 => None,
        },
        device: match config.device {
            Device::Auto => DeviceChoice::Auto,
            Device::Cpu => DeviceChoice::Cpu,
            Device::Cuda => DeviceChoice::Cuda,
        },
        device_ordinal: 0,
        local_ranks: 1,
        isa: match config.isa {
            Isa::Auto => None,
            Isa::Amx => Some(tandem_engine::Isa::Amx),
            Isa::Avx512 => Some(tandem_engine::Isa::Avx512),
            Isa::Avx2 => Some(tandem_engine::Isa::Avx2),
            Isa::Scalar => Some(tandem_engine::Isa::Scalar),
            // neon was refused with the configuration.
            Isa::Neon => None,
        },
        threads: config.threads,
        seed: config.seed.unwrap_or(0),
    }
}

/// Sequences at once and tokens of a step where no flag says so, on a CPU and on a GPU: a step of a CPU that is to end in a tenth of a
/// second has few tokens, and a GPU that is to be busy many.
const BATCH: (usize, usize) = (64, 512);
const GPU_BATCH: (usize, usize) = (256, 8192);

/// The engine's view of the size flags.
pub(super) fn engine_options(
    config: &CommonConfig,
    max_queued_requests: usize,
    inspected: &Inspected,
) -> EngineOptions {
    let (seqs, tokens) = if inspected.device().is_some() { GPU_BATCH } else { BATCH };
    let (seqs, tokens) = batch(config.max_num_seqs, config.max_num_batched_tokens, (seqs, tokens));
    EngineOptions {
        max_model_len: config.max_model_len,
        max_num_seqs: seqs,
        max_num_batched_tokens: tokens,
        block_size: config.block_size,
        kv_cache_memory_bytes: config.kv_cache_memory_bytes,
        gpu_memory_utilization: config.gpu_memory_utilization,
        enforce_eager: config.enforce_eager,
        async_scheduling: config.async_scheduling,
        custom_all_reduce: match config.custom_all_reduce {
            CustomAllReduce::Auto => tandem_engine::CustomAllReduce::Auto,
            CustomAllReduce::Always => tandem_engine::CustomAllReduce::Always,
            CustomAllReduce::Never => tandem_engine::CustomAllReduce::Never,
        },
        prefix_caching: config.prefix_caching,
        max_queued_requests,
        max_queued_bytes: MAX_QUEUED_BYTES,
        poison_freed_blocks: false,
    }
}

/// Sequences and tokens of a step: what is given moves the other's default, should they not fit together.
fn batch(
    seqs: Option<usize>,
    tokens: Option<usize>,
    (default_seqs, default_tokens): (usize, usize),
) -> (usize, usize) {
    let num_seqs = seqs.unwrap_or(default_seqs.min(tokens.unwrap_or(default_seqs)));
    (num_seqs, tokens.unwrap_or(default_tokens.max(num_seqs)))
}

fn dummy_weights(config: &CommonConfig) -> Option<DType> {
    if config.load_format != LoadFormat::Dummy {
        return None;
    }
    Some(match config.dummy_weights {
        Some(WeightType::F32) => DType::F32,
        Some(WeightType::F16) => DType::F16,
        Some(WeightType::Bf16) => DType::Bf16,
        Some(WeightType::Q8_0) => DType::Q8_0,
        Some(WeightType::Q4_0) => DType::Q4_0,
        Some(WeightType::Q4_1) => DType::Q4_1,
        // Random weights of that type are as good as rounded ones, and quicker made.
        None if config.quantization.is_some() => return None,
        None if config.dtype == Dtype::F32 => DType::F32,
        None => DType::Bf16,
    })
}

/// A refusal that names where the value of a flag was written.
pub(super) fn refusal(config: &CommonConfig, error: LoadError) -> Exit {
    match error {
        LoadError::Option { option, reason } => {
            Exit::refused(ConfigError::new(config.origins.of(option), reason))
        }
        other => Exit::refused(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_that_is_given_moves_the_default_of_the_other() {
        for default in [BATCH, GPU_BATCH] {
            assert_eq!(batch(None, None, default), default);
            assert_eq!(batch(Some(9000), None, default), (9000, 9000.max(default.1)));
            assert_eq!(batch(None, Some(8), default), (8, 8));
            assert_eq!(batch(Some(2), Some(16), default), (2, 16));
        }
    }
}
