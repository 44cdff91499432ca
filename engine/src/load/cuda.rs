//! Which device computes, and loading on a GPU.

use std::time::Instant;

use tandem_kernels::comm::Nccl;
use tandem_kernels::cuda::{
    self, Cuda, DeviceInfo, DeviceLauncher, KernelCache, Origin, Runner, Target, Unavailable,
    launcher::KvType,
};
use tandem_kernels::limits::Limits;
use tandem_kernels::{Activations, KvDType};
use tandem_models::{CudaLlama, CudaLlamaOptions, CudaLoadError, Shard};

use super::plan::{self, Room};
use super::{
    BackendInfo, EngineOptions, EnginePlan, Inspected, LoadError, Loaded, LoadedShard, ModelOptions, make_cpu,
};
use crate::error::ExecutorError;
use crate::executor::cuda::CudaExecutor;
use crate::executor::cuda_step::CudaStep;
use crate::group::message::Loaded as GroupLoaded;
use crate::group::{CudaShard, Transport};

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// A GPU if there is one that can be used.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

/// Device memory that libraries, compiled kernels and a step's workspace take beside weights and KV, as far as is known before
/// they have taken it.
const WORKSPACE_BYTES: u64 = 1 << 30;
/// What recorded steps take, and NCCL with other ranks.
const GRAPH_BYTES: u64 = 256 << 20;
const NCCL_BYTES: u64 = 2 << 30;

/// A GPU, and how many ranks compute on it.
#[derive(Debug, Clone)]
pub(super) struct ChosenDevice {
    pub(super) info: DeviceInfo,
    sharing: u64,
}

impl ChosenDevice {
    /// Bytes that a rank may have of `bytes` free or to be had.
    fn share(&self, bytes: u64) -> u64 {
        bytes / self.sharing
    }

    /// What kernels are compiled for.
    pub(super) fn isa(&self) -> &'static str {
        let (major, minor) = self.info.capability;
        Target::for_capability(major, minor).map_or("none", Target::name)
    }

    /// What carries collectives: NCCL, unless it is not there or ranks share a GPU, which it does not do. All ranks of a group have
    /// to have the same.
    pub(super) fn transport(&self) -> Transport {
        match Nccl::open() {
            Ok(_) if self.sharing == 1 => Transport::Nccl,
            _ => Transport::Host,
        }
    }
}

/// The GPU that the options lead to, if any.
///
/// # Errors
/// [`LoadError::Option`] if a GPU is asked for and there is none, or if an option does not fit one.
pub(super) fn choose(options: &ModelOptions) -> Result<Option<ChosenDevice>, LoadError> {
    let chosen = find(options)?;
    let refuse = |option, what: &str| {
        let reason = format!("{what} in fp8 are for GPUs, and none is used");
        Err(LoadError::Option { option, reason })
    };
    match &chosen {
        None if options.fp8_weights => refuse("quantization", "weights"),
        None if options.fp8_kv_cache => refuse("kv-cache-dtype", "keys and values"),
        Some(device) if options.fp8_weights && device.info.capability < (8, 9) => {
            let reason = format!("{} multiplies no fp8; it takes compute capability 8.9", device.info.name);
            Err(LoadError::Option { option: "quantization", reason })
        }
        _ => Ok(chosen),
    }
}

fn find(options: &ModelOptions) -> Result<Option<ChosenDevice>, LoadError> {
    let refuse = |option, reason: String| Err(LoadError::Option { option, reason });
    let found = match options.device {
        DeviceChoice::Cpu => return Ok(None),
        DeviceChoice::Auto | DeviceChoice::Cuda => Cuda::probe(),
    };
    let devices = match (found, options.device) {
        (Ok(devices), _) => devices,
        (Err(error), DeviceChoice::Cuda) => return refuse("device", error.to_string()),
        (Err(Unavailable::NoDriver { .. } | Unavailable::NoDevice), _) => return Ok(None),
        // There is a GPU, and something is wrong with it: whoever has one wants to know.
        (Err(error), _) => {
            tracing::warn!(%error, "the GPU is not used");
            return Ok(None);
        }
    };
    let count = devices.len();
    // Ranks beyond the GPUs share them: of use for tests only, and said when they are loaded.
    let ordinal = options.device_ordinal % count;
    let Some(device) = devices.into_iter().nth(ordinal).filter(DeviceInfo::is_supported) else {
        return match options.device {
            DeviceChoice::Cuda => {
                refuse("device", format!("GPU {ordinal} is older than compute capability 8.0"))
            }
            _ => Ok(None),
        };
    };
    let cpu_only =
        |what: &str| format!("{what} is for the CPU, and the GPU is used; leave it out or add --device cpu");
    match options {
        ModelOptions { dtype: super::ModelDType::F32, .. } => {
            refuse("dtype", "GPU kernels compute in bf16: use bf16 or auto, or --device cpu".into())
        }
        ModelOptions { activations: Some(_), .. } => refuse("activations", cpu_only("a type of activations")),
        ModelOptions { isa: Some(_), .. } => refuse("isa", cpu_only("an instruction set")),
        ModelOptions { kv_cache_dtype: Some(dtype), .. } if *dtype != KvDType::Bf16 => {
            let reason = format!("{} is no type of KV on a GPU; use bf16 or auto", dtype.name());
            refuse("kv-cache-dtype", reason)
        }
        _ => Ok(Some(ChosenDevice {
            info: device,
            sharing: options.local_ranks.div_ceil(count).max(1) as u64,
        })),
    }
}

impl Inspected {
    /// Sizes that follow from what the device of one of `size` ranks will have free, as far as is known before anything is loaded.
    pub(super) fn plan_cuda(
        &self,
        device: &ChosenDevice,
        options: &EngineOptions,
        size: usize,
    ) -> Result<EnginePlan, LoadError> {
        let weights = self.device_weight_bytes() / size as u64;
        let usable = device.share((device.info.total_bytes as f64 * options.gpu_memory_utilization) as u64);
        let Some(free_bytes) = usable.checked_sub(weights + WORKSPACE_BYTES).filter(|bytes| *bytes > 0)
        else {
            let reason = format!(
                "{} × {} bytes of {} do not hold {weights} bytes of weights and what they need beside them",
                options.gpu_memory_utilization, device.info.total_bytes, device.info.name
            );
            return Err(LoadError::Option { option: "gpu-memory-utilization", reason });
        };
        self.plan_for_room(options, Room::of_device(free_bytes), size)
    }

    /// What the weights will take on devices: layers as the loader leaves them, all else in bf16.
    fn device_weight_bytes(&self) -> u64 {
        let weights = self.files.weights();
        let of = |name: &&str| {
            let Some(info) = weights.info(name) else { return 0 };
            let elements = info.num_elements().unwrap_or(0);
            let is_layer = name.starts_with("model.layers.") && info.shape.len() == 2;
            let is_fp8 = self.options.fp8_weights || weights.fp8(name).is_some();
            match is_layer {
                true if is_fp8 => elements + 4 * info.shape[0] as u64,
                true if info.dtype.is_quantized() => info.num_bytes().unwrap_or(0),
                _ => 2 * elements,
            }
        };
        weights.names().iter().map(of).sum()
    }

    /// Loads a share of the weights on a device; the plan that it was made for, and the device's memory for KV.
    fn load_on_device(
        &self,
        device: &ChosenDevice,
        options: &EngineOptions,
        shard: Shard,
    ) -> Result<(CudaStep, EnginePlan, u64), LoadError> {
        let before = self.plan_cuda(device, options, shard.size)?;
        let cache = KernelCache::from_env();
        let mut phases = Phases::start();
        let runner = open(device.info.ordinal, &cache)?;
        phases.end("opening the GPU and its kernels");
        let cuda = runner.cuda().clone();
        // No answer is better than a wrong one.
        let checked = cuda::check::check_once(&runner, &cache).map_err(CudaLoadError::from)?;
        if checked != Origin::Cache {
            tracing::info!(gpu = %device.info.name, "kernels were checked on this GPU, and compute what they should");
        }
        phases.end("checking kernels");
        let llama_options = CudaLlamaOptions {
            max_tokens: options.max_num_batched_tokens,
            max_seqs: options.max_num_seqs,
            max_logits_rows: options.max_logits_rows(),
            max_model_len: before.max_model_len,
            kv_type: if self.options.fp8_kv_cache { KvType::Fp8 } else { KvType::Bf16 },
            fp8_weights: self.options.fp8_weights,
            graphs: !options.enforce_eager,
            shard,
        };
        let (name, config) = (self.info.name.clone(), self.files.config.clone());
        let mut model = CudaLlama::load(runner, &name, config, self.files.weights(), llama_options)?;
        phases.end("weights");
        for tuned in model.tune().map_err(CudaLoadError::from)? {
            tracing::debug!(%tuned, "matrix product");
        }
        for tuned in model.tune_skinny().map_err(CudaLoadError::from)? {
            tracing::debug!(%tuned, "matrix product of few tokens");
        }
        phases.end("choosing among matrix products");
        let step = CudaStep::new(make_cpu(&self.options)?, model, options.max_logits_rows());
        let step = step.map_err(CudaLoadError::from)?;
        let memory = cuda.memory().map_err(CudaLoadError::from)?;
        let usable = (memory.total_bytes as f64 * options.gpu_memory_utilization) as u64;
        // What is still to be taken besides KV.
        let graphs = if options.enforce_eager { 0 } else { GRAPH_BYTES };
        let collectives = if shard.size > 1 { NCCL_BYTES } else { 0 };
        let used = (memory.total_bytes - memory.free_bytes) as u64 + graphs + collectives;
        let free_bytes = device.share(usable.saturating_sub(used));
        Ok((step, before, free_bytes))
    }

    /// Loads the weights on the device, sees what is left, and takes it for KV. May take seconds.
    ///
    /// # Errors
    /// As [`Inspected::load`].
    pub(super) fn load_cuda(
        self,
        device: &ChosenDevice,
        options: &EngineOptions,
    ) -> Result<Loaded, LoadError> {
        let (mut step, before, free_bytes) = self.load_on_device(device, options, Shard::WHOLE)?;
        let room = Room::of_device(free_bytes);
        let plan = match self.plan_for_room(options, room, 1)? {
            // Tables and workspace are made for that length.
            plan if plan.max_model_len > before.max_model_len => {
                let max_model_len = Some(before.max_model_len);
                self.plan_for_room(&EngineOptions { max_model_len, ..options.clone() }, room, 1)?
            }
            plan => plan,
        };
        let mut phases = Phases::start();
        step.model.allocate_kv(plan.num_blocks).map_err(CudaLoadError::from)?;
        step.model.record(None).map_err(|error| ExecutorError::fatal(error.to_string()))?;
        phases.end("memory for KV, recording steps");
        for product in step.model.skinny_products() {
            tracing::debug!(%product, "by the kernel for few tokens");
        }
        let engine = self.engine_config(options, &plan);
        let config = &self.files.config;
        let backend = BackendInfo {
            backend: "cuda",
            ranks: 1,
            isa: device.isa(),
            device: Some(device.info.name.clone()),
            threads: step.threads(),
            activations: Activations::Bf16,
            layer_flops_per_token: config.layer_flops_per_token(),
            head_flops_per_row: config.head_flops_per_row(),
            weight_bytes: step.model.bytes_per_step(),
            kv_bytes_per_token: plan.kv_bytes / plan.kv_tokens as u64,
        };
        Ok(Loaded { executor: Box::new(CudaExecutor::new(step)), config: engine, plan, backend })
    }

    /// Loads one rank's share on its device.
    ///
    /// # Errors
    /// As [`Inspected::load`].
    pub(super) fn load_cuda_shard(
        self,
        device: &ChosenDevice,
        options: &EngineOptions,
        shard: Shard,
    ) -> Result<LoadedShard, LoadError> {
        let (step, _, free_bytes) = self.load_on_device(device, options, shard)?;
        let max_blocks = plan::capacity(step.model.config(), self.kv_layout(), options, free_bytes);
        let bytes = step.model.bytes_per_step();
        let loaded = GroupLoaded { max_blocks, weight_bytes: bytes, read_bytes: bytes };
        let transport = device.transport();
        if transport == Transport::Host {
            let reason = if device.sharing > 1 { "ranks share a GPU" } else { "there is no NCCL" };
            tracing::warn!(reason, "collectives go by way of the host, which is slow");
        }
        Ok(LoadedShard {
            device: Box::new(CudaShard::new(step, transport, options.custom_all_reduce)),
            loaded,
            max_tokens: options.max_num_batched_tokens,
            max_logits_rows: options.max_logits_rows(),
            has_own_cores: false,
        })
    }
}

/// Tells in the log where the time of a start goes.
struct Phases {
    since: Instant,
}

impl Phases {
    fn start() -> Self {
        Self { since: Instant::now() }
    }

    fn end(&mut self, phase: &str) {
        let now = Instant::now();
        tracing::debug!(phase, ms = (now - self.since).as_millis(), "loading");
        self.since = now;
    }
}

/// GPU `ordinal` with all kernels.
fn open(ordinal: usize, cache: &KernelCache) -> Result<Runner, CudaLoadError> {
    let cuda = Cuda::open(ordinal)?;
    Ok(Runner::load(&cuda, cache)?)
}

/// What a GPU can do at most.
pub(super) fn measure_limits(device: &ChosenDevice) -> Result<Limits, LoadError> {
    let runner = open(device.info.ordinal, &KernelCache::from_env())?;
    Ok(cuda::limits::measure(&runner).map_err(CudaLoadError::from)?)
}

/// Compiles every kernel for an architecture, for example `sm_90a`, into the cache; how many files there are. Needs no GPU.
///
/// # Errors
/// [`LoadError::Option`] for an architecture without kernels; [`LoadError::Cuda`] if the compiler is not there or refuses.
pub fn compile_kernels(arch: &str) -> Result<usize, LoadError> {
    let Some(target) = Target::ALL.into_iter().find(|target| target.name() == arch) else {
        let reason =
            format!("there are no kernels for {arch}; there are for sm_80, sm_89, sm_90a and sm_100a");
        return Err(LoadError::Option { option: "arch", reason });
    };
    Ok(cuda::fill_cache(&KernelCache::from_env(), target).map_err(CudaLoadError::from)?)
}

/// What the check of one kernel came to.
#[derive(Debug, Clone)]
pub struct KernelCheck {
    pub passed: bool,
    /// For people.
    pub line: String,
}

/// Runs every kernel on the first GPU beside plain loops; `seen` is called as soon as a case is over, so that one that hangs is the one
/// after the last.
///
/// # Errors
/// [`LoadError::Cuda`] if there is no GPU or nothing runs on it.
pub fn check_kernels(mut seen: impl FnMut(KernelCheck)) -> Result<(), LoadError> {
    let runner = open(0, &KernelCache::from_env())?;
    cuda::check::check_all(&mut DeviceLauncher::new(&runner), cuda::check::SEED, |result| {
        let outcome = match &result.failure {
            None => format!("ok, relative error {:.1e}", result.error),
            Some(reason) => format!("FAILED: {reason}"),
        };
        seen(KernelCheck { passed: result.failure.is_none(), line: format!("{}: {outcome}", result.name) });
    });
    Ok(())
}
