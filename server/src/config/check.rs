//! From raw flags to a configuration that holds together.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::{ConfigError, Origin};
use super::flags::{
    ComputeFlags, KernelsFlags, LogFlags, MemoryFlags, ModelFlags, ModelOptions, RankFlags, RunFlags,
    SchedulingFlags, ServeFlags,
};
use super::identity::{self, GroupConfig};
use super::layers::{Environment, Origins};
use super::secret::ApiKey;
use super::values::{
    Activations, AllowedOrigins, CustomAllReduce, Device, Dtype, Isa, KvCacheDtype, LoadFormat, LogFormat,
    Quantization, WeightType,
};

/// Tokens per KV block.
const BLOCK_SIZE: u32 = 16;
/// The most bytes of a chat template's file.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// The default model's place in the cache folder.
const DEFAULT_MODEL: &str = "models/SmolLM2-135M-Instruct.Q4_1.gguf";

/// What all commands need to know.
#[derive(Debug, Clone)]
pub struct CommonConfig {
    /// A GGUF file or a folder.
    pub model: PathBuf,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Type of random weights.
    pub dummy_weights: Option<WeightType>,
    /// Type that unquantised weights are rounded to at load.
    pub quantization: Option<Quantization>,
    /// Type of unquantised weights.
    pub dtype: Dtype,
    /// Type that quantised weights are multiplied with.
    pub activations: Activations,
    /// Type of KV.
    pub kv_cache_dtype: KvCacheDtype,
    /// Instruction set.
    pub isa: Isa,
    /// Threads that compute; `None`: as the machine has.
    pub threads: Option<usize>,
    /// Seed of random weights, of the answers of `run`, of the prompts of `bench`, and of the seeds that `serve` gives to requests.
    pub seed: Option<u64>,
    /// Text of the chat template that replaces the model's.
    pub chat_template: Option<String>,
    /// Tokens of prompt and output together; `None`: the model's.
    pub max_model_len: Option<usize>,
    /// Memory for KV in bytes; `None`: chosen.
    pub kv_cache_memory_bytes: Option<u64>,
    /// Tokens in a KV block.
    pub block_size: usize,
    /// Whether prompts that begin alike share KV.
    pub prefix_caching: bool,
    /// Sequences in one step.
    pub max_num_seqs: Option<usize>,
    /// What computes.
    pub device: Device,
    /// No graphs on a GPU.
    pub enforce_eager: bool,
    /// Steps are planned beside a GPU.
    pub async_scheduling: bool,
    /// Small sums over ranks by a kernel of our own.
    pub custom_all_reduce: CustomAllReduce,
    /// Share of a GPU's memory that may be used, 0 to 1.
    pub gpu_memory_utilization: f64,
    /// Query tokens in one step.
    pub max_num_batched_tokens: Option<usize>,
    /// Form of the log.
    pub log_format: LogFormat,
    /// Filter of the log, if one was given.
    pub log_level: Option<String>,
    /// Where each value was written, for refusals that come later.
    pub origins: Origins,
}

/// `tandem serve` and `tandem check`.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Model, machine, memory.
    pub common: CommonConfig,
    /// Address to listen on.
    pub host: IpAddr,
    /// Port of the API.
    pub port: u16,
    /// Port of the metrics alone.
    pub metrics_port: Option<u16>,
    /// Names of the model; the first is the one in answers. Empty until the model's own name is known, which
    /// `serve` fills in before anything reads it.
    pub served_model_names: Vec<String>,
    /// Keys of which requests must bring one, if there are any.
    pub api_keys: Vec<ApiKey>,
    /// Requests that may wait.
    pub max_num_queued_reqs: usize,
    /// How long running requests may take to finish after SIGTERM.
    pub allowed_origins: AllowedOrigins,
    pub shutdown_timeout: Duration,
    /// This pod's place in a tensor-parallel group, if there is one.
    pub group: Option<GroupConfig>,
}

/// `tandem kernels`.
#[derive(Debug, Clone)]
pub struct KernelsConfig {
    /// Architectures as the compiler names them.
    pub arch: Vec<String>,
    /// Check kernels on the GPU instead of compiling for others.
    pub check: bool,
    /// Form of the log.
    pub log_format: LogFormat,
    /// Filter of the log, if one was given.
    pub log_level: Option<String>,
    /// Where each value was written.
    pub origins: Origins,
}

/// `tandem rank`.
#[derive(Debug, Clone)]
pub struct RankConfig {
    /// That of the pod's `serve`.
    pub serve: ServeConfig,
    /// The group of it.
    pub group: GroupConfig,
    /// Which of the pod's ranks this is.
    pub local_rank: usize,
    /// KV blocks that its process had before it was started again.
    pub held_blocks: Option<u64>,
}

/// `tandem run`.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// Model, machine, memory.
    pub common: CommonConfig,
    /// The prompt; `None`: a chat.
    pub prompt: Option<String>,
    /// Instruction before the chat.
    pub system: Option<String>,
    /// No chat template.
    pub raw: bool,
    /// Tokens of an answer; `None`: the rest of the context.
    pub max_tokens: Option<usize>,
    /// The model's own where `None`.
    pub temperature: Option<f32>,
    /// The model's own where `None`.
    pub top_p: Option<f32>,
    /// The model's own where `None`.
    pub top_k: Option<u32>,
    /// The model's own where `None`; 0 is off.
    pub min_p: Option<f32>,
    /// The model's own where `None`.
    pub repetition_penalty: Option<f32>,
}

impl CommonConfig {
    /// Form and filter of the log.
    pub(crate) fn log(&self) -> (LogFormat, Option<&str>) {
        (self.log_format, self.log_level.as_deref())
    }
}

pub(super) fn kernels(flags: KernelsFlags, origins: &Origins) -> Result<KernelsConfig, ConfigError> {
    if let Some(filter) = &flags.log.log_level {
        check_log_filter(filter).map_err(|message| refuse(origins, "log-level", &message))?;
    }
    Ok(KernelsConfig {
        arch: flags.arch,
        check: flags.check,
        log_format: flags.log.log_format,
        log_level: flags.log.log_level,
        origins: origins.clone(),
    })
}

pub(super) fn rank(
    flags: RankFlags,
    origins: &Origins,
    environment: &Environment,
) -> Result<RankConfig, ConfigError> {
    let (local_rank, held_blocks) = (flags.local_rank as usize, flags.held_blocks);
    let serve = serve(flags.serve, origins, environment)?;
    match serve.group.clone().filter(|group| local_rank < group.gpus_per_pod) {
        Some(group) => Ok(RankConfig { serve, group, local_rank, held_blocks }),
        None => Err(refuse(origins, "local-rank", "is no rank of this pod; serve starts its ranks itself")),
    }
}

pub(super) fn serve(
    flags: ServeFlags,
    origins: &Origins,
    environment: &Environment,
) -> Result<ServeConfig, ConfigError> {
    let group = identity::group(&flags.group, origins, environment)?;
    let ServeFlags { model, compute, memory, scheduling, log, .. } = flags;
    let (model, options) = split(model);
    if flags.metrics_port != 0 && flags.metrics_port == flags.port {
        return Err(refuse(origins, "metrics-port", "is the API's port too; give another, or 0 for none"));
    }
    if let Some(name) = flags.served_model_name.iter().find(|name| name.trim().is_empty() || name.len() > 256)
    {
        return Err(refuse(origins, "served-model-name", format!("{name:?} is no name")));
    }
    if flags.api_key.iter().any(|key| key.is_empty() || key.len() > 1024) {
        return Err(refuse(origins, "api-key", "a key must have 1 to 1024 bytes"));
    }
    let common = common(model, options, compute, memory, scheduling, log, origins)?;
    Ok(ServeConfig {
        common,
        host: flags.host,
        port: flags.port,
        metrics_port: (flags.metrics_port != 0).then_some(flags.metrics_port),
        served_model_names: flags.served_model_name,
        api_keys: flags.api_key.into_iter().map(ApiKey::new).collect(),
        allowed_origins: flags.allowed_origins,
        max_num_queued_reqs: flags.max_num_queued_reqs as usize,
        shutdown_timeout: Duration::from_secs(flags.shutdown_timeout),
        group,
    })
}

pub(super) fn run(flags: RunFlags, origins: &Origins) -> Result<RunConfig, ConfigError> {
    let RunFlags { arguments, model: options, compute, memory, scheduling, log, .. } = flags;
    let (model, prompt) = model_and_prompt(arguments, options.model.is_some())?;
    if flags.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
        return Err(refuse(origins, "top-p", "must be above 0 and at most 1"));
    }
    if flags.min_p.is_some_and(|p| !(0.0..=1.0).contains(&p)) {
        return Err(refuse(origins, "min-p", "must lie between 0 and 1"));
    }
    if flags.temperature.is_some_and(|t| !(0.0..=100.0).contains(&t)) {
        return Err(refuse(origins, "temperature", "must lie between 0 and 100"));
    }
    if flags.repetition_penalty.is_some_and(|p| !(p > 0.0 && p.is_finite())) {
        return Err(refuse(origins, "repetition-penalty", "must be above 0"));
    }
    Ok(RunConfig {
        common: common(model, options, compute, memory, scheduling, log, origins)?,
        prompt,
        system: flags.system,
        raw: flags.raw,
        max_tokens: flags.max_tokens.map(|n| n as usize),
        temperature: flags.temperature,
        top_p: flags.top_p,
        // -1 and 0 both mean "all tokens", as in the API.
        top_k: flags.top_k.map(|k| u32::try_from(k).unwrap_or(0)),
        min_p: flags.min_p,
        repetition_penalty: flags.repetition_penalty,
    })
}

pub(super) fn split(flags: ModelFlags) -> (Option<PathBuf>, ModelOptions) {
    (flags.model_positional, flags.options)
}

pub(super) fn common(
    model: Option<PathBuf>,
    options: ModelOptions,
    compute: ComputeFlags,
    memory: MemoryFlags,
    scheduling: SchedulingFlags,
    log: LogFlags,
    origins: &Origins,
) -> Result<CommonConfig, ConfigError> {
    let refuse = |flag: &str, message: &str| refuse(origins, flag, message);
    if memory.block_size != BLOCK_SIZE {
        return Err(refuse("block-size", "only 16 is possible; leave the flag out"));
    }
    if compute.isa == Isa::Neon {
        return Err(refuse("isa", "neon is not supported by this build; use auto or scalar"));
    }
    if options.dtype == Dtype::F16 {
        return Err(refuse("dtype", "the CPU does not compute in float16; use bfloat16, float32 or auto"));
    }
    if options.dummy_weights.is_some() && options.load_format != LoadFormat::Dummy {
        return Err(refuse("dummy-weights", "needs --load-format dummy"));
    }
    if let (Some(tokens), Some(seqs)) = (scheduling.max_num_batched_tokens, scheduling.max_num_seqs)
        && tokens < seqs
    {
        let message =
            format!("{tokens} is less than max-num-seqs {seqs}; every running sequence needs its token");
        return Err(refuse("max-num-batched-tokens", &message));
    }
    if let Some(filter) = &log.log_level {
        check_log_filter(filter).map_err(|message| refuse("log-level", &message))?;
    }
    let model = options.model.or(model).map_or_else(default_model, Ok)?;
    let is_gguf = model.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if options.load_format == LoadFormat::Dummy && is_gguf && !model.is_dir() {
        let message = format!(
            "dummy takes shapes from a config.json, {} is a GGUF file; name a folder with a config.json",
            model.display()
        );
        return Err(refuse("load-format", &message));
    }
    Ok(CommonConfig {
        model,
        load_format: options.load_format,
        dummy_weights: options.dummy_weights,
        quantization: options.quantization,
        dtype: options.dtype,
        activations: compute.activations,
        kv_cache_dtype: memory.kv_cache_dtype,
        device: compute.device,
        enforce_eager: compute.enforce_eager,
        async_scheduling: switch(
            ("async-scheduling", scheduling.async_scheduling),
            ("no-async-scheduling", scheduling.no_async_scheduling),
            origins,
        )?,
        custom_all_reduce: match compute.disable_custom_all_reduce {
            true => CustomAllReduce::Never,
            false => compute.custom_all_reduce,
        },
        gpu_memory_utilization: memory.gpu_memory_utilization,
        isa: compute.isa,
        threads: compute.threads.map(usize::from),
        seed: options.seed,
        chat_template: options.chat_template.map(|given| template_text(given, origins)).transpose()?,
        max_model_len: memory.max_model_len.filter(|n| *n > 0).map(|n| n as usize),
        kv_cache_memory_bytes: memory.kv_cache_memory_bytes,
        block_size: memory.block_size as usize,
        prefix_caching: switch(
            ("enable-prefix-caching", memory.enable_prefix_caching),
            ("no-enable-prefix-caching", memory.no_enable_prefix_caching),
            origins,
        )?,
        max_num_seqs: scheduling.max_num_seqs.map(|n| n as usize),
        max_num_batched_tokens: scheduling.max_num_batched_tokens.map(|n| n as usize),
        log_format: log.log_format,
        log_level: log.log_level,
        origins: origins.clone(),
    })
}

/// A filter takes any word for a module to log, so that a mistyped level would log nothing: a word by itself must be
/// a level.
pub(super) fn check_log_filter(filter: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    let is_level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
    // Fields of spans have commas of their own.
    let mut words = filter.split(',').map(str::trim).filter(|word| !word.contains('='));
    if !filter.contains('[')
        && let Some(word) = words.find(|word| !is_level(word))
    {
        return Err(format!("{word:?} is no level (one of: {})", LEVELS.join(", ")));
    }
    let checked = tracing_subscriber::EnvFilter::try_new(filter);
    checked.map(drop).map_err(|e| format!("{filter:?} is no log filter: {e}"))
}

/// A flag and its negation are one setting; layers see to it that only one layer speaks.
fn switch(
    (yes, enabled): (&str, bool),
    (no, disabled): (&str, bool),
    origins: &Origins,
) -> Result<bool, ConfigError> {
    if origins.given(yes) && origins.given(no) && enabled == disabled {
        return Err(refuse(origins, no, format!("contradicts {}", origins.of(yes))));
    }
    Ok(if origins.given(no) { !disabled } else { enabled })
}

/// The template's text: the argument itself if it is one, else the file that it names.
fn template_text(given: String, origins: &Origins) -> Result<String, ConfigError> {
    let refuse = |message: String| refuse(origins, "chat-template", message);
    if given.contains("{{") || given.contains("{%") {
        return Ok(given);
    }
    let path = Path::new(&given);
    match std::fs::metadata(path) {
        Err(e) => Err(refuse(format!("{given:?} is neither a template nor a file that can be read: {e}"))),
        Ok(facts) if facts.len() > MAX_TEMPLATE_BYTES => {
            Err(refuse(format!("{given:?} is larger than 1 MiB")))
        }
        Ok(_) => std::fs::read_to_string(path).map_err(|e| refuse(format!("{given:?} cannot be read: {e}"))),
    }
}

/// `[MODEL] [PROMPT]`, where one argument alone may be either.
fn model_and_prompt(
    arguments: Vec<String>,
    model_given: bool,
) -> Result<(Option<PathBuf>, Option<String>), ConfigError> {
    let mut arguments = arguments.into_iter();
    match (arguments.next(), arguments.next()) {
        (Some(_), Some(_)) if model_given => Err(ConfigError::new(
            Origin::CommandLine,
            "the model is given twice; leave out --model or the first argument",
        )),
        (Some(model), Some(prompt)) => Ok((Some(PathBuf::from(model)), Some(prompt))),
        (Some(one), None) if !model_given && looks_like_model(&one) => Ok((Some(PathBuf::from(one)), None)),
        (prompt, _) => Ok((None, prompt)),
    }
}

fn looks_like_model(argument: &str) -> bool {
    let path = Path::new(argument);
    path.exists()
        || (path.extension().is_some_and(|e| e == "gguf") && !argument.contains(char::is_whitespace))
}

/// The default model, where the cache folder has it.
fn default_model() -> Result<PathBuf, ConfigError> {
    let path = tandem_engine::cache_folder().map(|folder| folder.join(DEFAULT_MODEL));
    path.filter(|path| path.exists()).ok_or_else(|| {
        ConfigError::new(
            Origin::CommandLine,
            "no model: name a GGUF file or a folder (tandem serve MODEL), or run `make model`, which fetches the \
             default one",
        )
    })
}

pub(super) fn refuse(origins: &Origins, flag: &str, message: impl Into<String>) -> ConfigError {
    ConfigError::new(origins.of(flag), message)
}
