//! Which device computes, and loading on a GPU.

use tandem_kernels::cuda::{
    self, Cuda, DeviceInfo, DeviceLauncher, KernelCache, Runner, Target, Unavailable, launcher::KvType,
};
use tandem_kernels::{Activations, KvDType};
use tandem_models::{CudaLlama, CudaLlamaOptions, CudaLoadError, Shard};

use super::plan::Room;
use super::{BackendInfo, EngineOptions, EnginePlan, Inspected, LoadError, Loaded, ModelOptions, make_cpu};
use crate::executor::cuda::CudaExecutor;

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

/// The GPU that the options lead to, if any.
///
/// # Errors
/// [`LoadError::Option`] if a GPU is asked for and there is none, or if an option does not fit one.
pub(super) fn choose(options: &ModelOptions) -> Result<Option<DeviceInfo>, LoadError> {
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
    let Some(device) = devices.into_iter().nth(options.device_ordinal).filter(DeviceInfo::is_supported)
    else {
        return match options.device {
            DeviceChoice::Cuda => {
                refuse("device", format!("there is no usable GPU {}", options.device_ordinal))
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
        _ => Ok(Some(device)),
    }
}

impl Inspected {
    /// Sizes that follow from what the device will have free, as far as is known before anything is loaded.
    pub(super) fn plan_cuda(
        &self,
        device: &DeviceInfo,
        options: &EngineOptions,
    ) -> Result<EnginePlan, LoadError> {
        let weights = 2 * self.info.num_parameters;
        let usable = (device.total_bytes as f64 * options.gpu_memory_utilization) as u64;
        let Some(free_bytes) = usable.checked_sub(weights + WORKSPACE_BYTES).filter(|bytes| *bytes > 0)
        else {
            let reason = format!(
                "{} × {} bytes of {} do not hold {weights} bytes of weights in bf16 and what they need beside them",
                options.gpu_memory_utilization, device.total_bytes, device.name
            );
            return Err(LoadError::Option { option: "gpu-memory-utilization", reason });
        };
        self.plan_for_room(options, Room::of_device(free_bytes))
    }

    /// Loads the weights on the device, sees what is left, and takes it for KV. May take seconds.
    ///
    /// # Errors
    /// As [`Inspected::load`].
    pub(super) fn load_cuda(self, device: &DeviceInfo, options: &EngineOptions) -> Result<Loaded, LoadError> {
        let before = self.plan_cuda(device, options)?;
        let cuda = Cuda::open(device.ordinal).map_err(CudaLoadError::from)?;
        let runner = Runner::load(&cuda, &KernelCache::from_env()).map_err(CudaLoadError::from)?;
        let llama_options = CudaLlamaOptions {
            max_tokens: options.max_num_batched_tokens,
            max_seqs: options.max_num_seqs,
            max_logits_rows: options.max_logits_rows(),
            max_model_len: before.max_model_len,
            kv_type: KvType::Bf16,
            fp8_weights: false,
            graphs: !options.enforce_eager,
            shard: Shard::WHOLE,
        };
        let (name, config) = (self.info.name.clone(), self.files.config.clone());
        let mut model = CudaLlama::load(runner, &name, config, self.files.weights(), llama_options)?;
        let memory = cuda.memory().map_err(CudaLoadError::from)?;
        let usable = (memory.total_bytes as f64 * options.gpu_memory_utilization) as u64;
        let free_bytes = usable.saturating_sub((memory.total_bytes - memory.free_bytes) as u64);
        let fixed = EngineOptions { max_model_len: Some(before.max_model_len), ..options.clone() };
        let plan = match self.plan_for_room(options, Room::of_device(free_bytes))? {
            // Tables and workspace are made for that length.
            plan if plan.max_model_len > before.max_model_len => {
                self.plan_for_room(&fixed, Room::of_device(free_bytes))?
            }
            plan => plan,
        };
        model.allocate_kv(plan.num_blocks).map_err(CudaLoadError::from)?;
        let engine = self.engine_config(options, &plan);
        let config = &self.files.config;
        let cpu = make_cpu(&self.options)?;
        let backend = BackendInfo {
            backend: "cuda",
            ranks: 1,
            isa: cuda.target().name(),
            device: Some(device.name.clone()),
            threads: cpu.threads(),
            activations: Activations::Bf16,
            layer_flops_per_token: config.layer_flops_per_token(),
            head_flops_per_row: config.head_flops_per_row(),
            weight_bytes: model.weight_bytes(),
            kv_bytes_per_token: plan.kv_bytes / plan.kv_tokens as u64,
        };
        let executor = CudaExecutor::new(cpu, model, options.max_logits_rows())?;
        Ok(Loaded { executor: Box::new(executor), config: engine, plan, backend })
    }
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

/// Inputs of the checks are drawn from it.
const CHECK_SEED: u64 = 1;

/// What the check of one kernel came to.
#[derive(Debug, Clone)]
pub struct KernelCheck {
    pub passed: bool,
    /// For people.
    pub line: String,
}

/// Runs every kernel on the first GPU beside plain loops.
///
/// # Errors
/// [`LoadError::Cuda`] if there is no GPU or nothing runs on it.
pub fn check_kernels() -> Result<Vec<KernelCheck>, LoadError> {
    let cuda = Cuda::open(0).map_err(CudaLoadError::from)?;
    let runner = Runner::load(&cuda, &KernelCache::from_env()).map_err(CudaLoadError::from)?;
    let results = cuda::check::check_all(&mut DeviceLauncher::new(&runner), CHECK_SEED);
    Ok(results
        .into_iter()
        .map(|result| {
            let outcome = match &result.failure {
                None => format!("ok, relative error {:.1e}", result.error),
                Some(reason) => format!("FAILED: {reason}"),
            };
            KernelCheck { passed: result.failure.is_none(), line: format!("{}: {outcome}", result.name) }
        })
        .collect())
}
