//! Raw flags, as clap reads them. What they mean together is decided in [`super::check`].
//!
//! Names are those of `vllm serve` where the meaning is the same. Every long flag has a variable and a key of the
//! same name ([`super::layers`]); the help shows the variable.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::builder::TypedValueParser;
use clap::builder::styling::{AnsiColor, Styles};
use clap::{Arg, ArgAction, Args, CommandFactory, Parser, Subcommand};

use super::bench::{Endpoint, OutputFormat};
use super::layers;
use super::values::{
    Activations, AllowedOrigins, CustomAllReduce, Device, Dtype, Isa, KvCacheDtype, LoadFormat, LogFormat,
    Quantization, WeightType, byte_size, share,
};

const MODEL: &str = "Model";
const COMPUTE: &str = "Compute";
const MEMORY: &str = "Context and KV cache";
const SCHEDULING: &str = "Scheduling";
const SERVER: &str = "Server";
const SAMPLING: &str = "Sampling";
const GROUP: &str = "Tensor parallelism";
const BENCH: &str = "Benchmark";
const REMOTE: &str = "Benchmark of a server";
const CONFIGURATION: &str = "Configuration and logs";

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// Serve a large language model on this machine.
#[derive(Debug, Parser)]
#[command(
    name = "tandem",
    version,
    styles = STYLES,
    max_term_width = 110,
    disable_help_subcommand = true,
    after_help = "Every flag --foo-bar is also the variable TANDEM_FOO_BAR and the key foo-bar of the YAML file of \
                  --config. A flag wins over the variable, the variable over the file."
)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: CommandFlags,
}

#[derive(Debug, Subcommand)]
pub(super) enum CommandFlags {
    /// Answer OpenAI-compatible requests over HTTP.
    Serve(Box<ServeFlags>),
    /// Answer one prompt in the terminal, or chat when there is none.
    Run(Box<RunFlags>),
    /// Measure prefill and decode speed against this machine's limits, or any server's over HTTP.
    Bench(Box<BenchFlags>),
    /// Say whether machine, model and configuration fit, and what would be used.
    Check(Box<ServeFlags>),
    /// Compile the GPU kernels into the cache, for image builds: needs NVRTC, and no GPU.
    Kernels(Box<KernelsFlags>),
    /// One rank of a group; `serve` starts it.
    #[command(hide = true)]
    Rank(Box<RankFlags>),
}

/// The command with the variables' names in its help.
pub(super) fn command() -> clap::Command {
    let command = Cli::command();
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, |sub| {
            let sub = layers::show_variables(sub).mut_args(negative_numbers);
            sub.disable_help_flag(true).arg(help())
        })
    })
}

/// `--port -1` is about the port, not about an unknown flag -1.
fn negative_numbers(arg: Arg) -> Arg {
    let is_flag = arg.get_long().is_some() && arg.get_action().takes_values();
    if is_flag { arg.allow_negative_numbers(true) } else { arg }
}

/// Help that fits a screen: one line for each flag, its values in brackets.
fn help() -> Arg {
    Arg::new("help")
        .short('h')
        .long("help")
        .action(ArgAction::HelpShort)
        .help("Print this")
        .help_heading(CONFIGURATION)
}

#[derive(Debug, Args)]
pub(super) struct ModelFlags {
    /// A GGUF file or a folder in Hugging Face layout [default: the default model in the cache folder]
    #[arg(value_name = "MODEL", id = "model-positional", conflicts_with = "model")]
    pub(super) model_positional: Option<PathBuf>,
    #[command(flatten)]
    pub(super) options: ModelOptions,
}

#[derive(Debug, Args)]
pub(super) struct ModelOptions {
    /// The same as MODEL
    #[arg(long, value_name = "PATH", help_heading = MODEL)]
    pub(super) model: Option<PathBuf>,
    /// Where weights come from; dummy makes random ones of the shapes that config.json gives
    #[arg(long, value_name = "FORMAT", default_value = "auto", hide_possible_values = false, help_heading = MODEL)]
    pub(super) load_format: LoadFormat,
    /// Type of random weights [default: as --quantization or --dtype, else bf16]
    #[arg(long, value_name = "TYPE", ignore_case = true, help_heading = MODEL)]
    pub(super) dummy_weights: Option<WeightType>,
    /// Round weights in BF16, F16 or F32 (linear layers, embedding, LM head) to this type while loading; fp8 is for GPUs, and
    /// for layers alone [default: leave them as they are]
    #[arg(long, value_name = "TYPE", ignore_case = true, help_heading = MODEL)]
    pub(super) quantization: Option<Quantization>,
    /// Type of unquantised weights; f32 means weights, activations and KV
    #[arg(long, value_name = "TYPE", default_value = "auto", help_heading = MODEL)]
    pub(super) dtype: Dtype,
    /// Chat template instead of the model's own: a file, or the template itself
    #[arg(long, value_name = "FILE|JINJA", help_heading = MODEL)]
    pub(super) chat_template: Option<String>,
    /// Seed of random weights and of bench's prompts [default: 0], and of the sequence that gives requests without a seed
    /// theirs [default: the system's randomness]
    #[arg(long, value_name = "N", value_parser = whole(0, u64::MAX), help_heading = MODEL)]
    pub(super) seed: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct ComputeFlags {
    /// What computes
    #[arg(long, value_name = "DEVICE", default_value = "auto", help_heading = COMPUTE)]
    pub(super) device: Device,
    /// On a GPU: queue every operation by itself instead of recorded steps
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_possible_values = true, help_heading = COMPUTE)]
    pub(super) enforce_eager: bool,
    /// On GPUs of one machine: whether small sums over ranks are made by a kernel of Tandem's own instead of NCCL
    #[arg(long, value_name = "WHEN", default_value = "auto", help_heading = COMPUTE)]
    pub(super) custom_all_reduce: CustomAllReduce,
    /// As --custom-all-reduce never
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_possible_values = true, hide = true, conflicts_with = "custom_all_reduce",
          help_heading = COMPUTE)]
    pub(super) disable_custom_all_reduce: bool,
    /// Type that quantised weights are multiplied with
    #[arg(long, value_name = "TYPE", default_value = "auto", help_heading = COMPUTE)]
    pub(super) activations: Activations,
    /// Instruction set
    #[arg(long, value_name = "ISA", default_value = "auto", help_heading = COMPUTE)]
    pub(super) isa: Isa,
    /// Threads that compute [default: whole CPUs of the quota]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), help_heading = COMPUTE)]
    pub(super) threads: Option<u16>,
}

#[derive(Debug, Args)]
pub(super) struct MemoryFlags {
    /// Tokens of prompt and answer together; 2k are 2000, 2K are 2048, auto is the default [default: the model's, as far as the KV cache holds it]
    #[arg(long, value_name = "TOKENS", value_parser = tokens, help_heading = MEMORY)]
    pub(super) max_model_len: Option<u64>,
    /// Memory for KV, e.g. 4GiB [default: what the limits below need, at most 25 % of free memory and 4 GiB]
    #[arg(long, value_name = "BYTES", value_parser = byte_size, help_heading = MEMORY)]
    pub(super) kv_cache_memory_bytes: Option<u64>,
    /// Share of a GPU's memory for weights, KV and workspace together
    #[arg(long, value_name = "SHARE", default_value = "0.9", value_parser = share, help_heading = MEMORY)]
    pub(super) gpu_memory_utilization: f64,
    /// Type of KV: a GPU takes bf16 and fp8, a CPU all but fp8; auto is f32 with --dtype f32, else bf16
    #[arg(long, value_name = "TYPE", default_value = "auto", help_heading = MEMORY)]
    pub(super) kv_cache_dtype: KvCacheDtype,
    /// Tokens in one KV block; only 16 is possible
    #[arg(long, value_name = "TOKENS", default_value = "16", help_heading = MEMORY)]
    pub(super) block_size: u32,
    /// Reuse KV of prompts that begin alike
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "true", help_heading = MEMORY)]
    pub(super) enable_prefix_caching: bool,
    /// Do not reuse KV of prompts that begin alike
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, hide_possible_values = true, help_heading = MEMORY)]
    pub(super) no_enable_prefix_caching: bool,
}

#[derive(Debug, Args)]
pub(super) struct SchedulingFlags {
    /// Sequences that run at once [default: 64, on a GPU 256]
    #[arg(long, value_name = "N", value_parser = count(), help_heading = SCHEDULING)]
    pub(super) max_num_seqs: Option<u64>,
    /// Tokens of one step, prompts and answers together [default: 512, on a GPU 8192]
    #[arg(long, value_name = "TOKENS", value_parser = count(), help_heading = SCHEDULING)]
    pub(super) max_num_batched_tokens: Option<u64>,
    /// On a GPU: plan and begin a step while the one before is computed
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "true", hide_possible_values = true, help_heading = SCHEDULING)]
    pub(super) async_scheduling: bool,
    /// Plan each step when the one before is over
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, hide_possible_values = true, help_heading = SCHEDULING)]
    pub(super) no_async_scheduling: bool,
}

#[derive(Debug, Args)]
pub(super) struct LogFlags {
    /// YAML file with flags as keys
    #[arg(long, value_name = "FILE", help_heading = CONFIGURATION)]
    pub(super) config: Option<PathBuf>,
    /// Form of the log on standard error; with json, serve says in it what it otherwise prints when it is ready
    #[arg(long, value_name = "FORMAT", default_value = "text", help_heading = CONFIGURATION)]
    pub(super) log_format: LogFormat,
    /// What to log: error, warn, info, debug, trace, off, or a filter such as info,tandem_engine=debug [default:
    /// RUST_LOG, else info for serve and warn for the others]
    #[arg(long, value_name = "LEVEL", help_heading = CONFIGURATION)]
    pub(super) log_level: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ServeFlags {
    #[command(flatten)]
    pub(super) model: ModelFlags,
    #[command(flatten)]
    pub(super) compute: ComputeFlags,
    #[command(flatten)]
    pub(super) memory: MemoryFlags,
    #[command(flatten)]
    pub(super) scheduling: SchedulingFlags,
    /// Requests that may wait; beyond, and beyond this and --max-num-seqs together in flight, they are refused
    #[arg(long, value_name = "N", default_value = "1024", value_parser = count(), help_heading = SCHEDULING)]
    pub(super) max_num_queued_reqs: u64,
    #[command(flatten)]
    pub(super) group: GroupFlags,
    /// Address to listen on, or localhost
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0", value_parser = host, help_heading = SERVER)]
    pub(super) host: IpAddr,
    /// Port of the API and of /metrics
    #[arg(long, value_name = "PORT", default_value = "8000", help_heading = SERVER)]
    pub(super) port: u16,
    /// Port of the metrics alone; 0 for none
    #[arg(long, value_name = "PORT", default_value = "9090", help_heading = SERVER)]
    pub(super) metrics_port: u16,
    /// Names that requests may use for the model [default: the model's own]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',', help_heading = SERVER)]
    pub(super) served_model_name: Vec<String>,
    /// Keys, one of which requests must bring; better set by the variable, which other users cannot see
    #[arg(long, value_name = "KEY", num_args = 1.., value_delimiter = ',', help_heading = SERVER)]
    pub(super) api_key: Vec<String>,
    /// Origins whose pages may call the API from a browser: *, none, or a list, also in JSON
    #[arg(long, value_name = "ORIGIN,…", default_value = "*", value_parser = AllowedOrigins::parse, help_heading = SERVER)]
    pub(super) allowed_origins: AllowedOrigins,
    /// Seconds that running requests get to finish on SIGTERM, after 5 (or as many, if those are fewer) in which new ones are
    /// still accepted
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = whole(0, 86_400), help_heading = SERVER)]
    pub(super) shutdown_timeout: u64,
    #[command(flatten)]
    pub(super) log: LogFlags,
}

#[derive(Debug, Args)]
pub(super) struct KernelsFlags {
    /// Compute capabilities to compile for
    #[arg(long, value_name = "ARCH", num_args = 1.., value_delimiter = ',',
          default_value = "sm_80,sm_89,sm_90a,sm_100a", help_heading = COMPUTE)]
    pub(super) arch: Vec<String>,
    /// Check every kernel on the GPU against plain loops instead
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_possible_values = true, help_heading = COMPUTE)]
    pub(super) check: bool,
    #[command(flatten)]
    pub(super) log: LogFlags,
}

#[derive(Debug, Args)]
pub(super) struct RankFlags {
    #[command(flatten)]
    pub(super) serve: ServeFlags,
    /// Which of this pod's ranks
    #[arg(long, value_name = "N", value_parser = whole(0, 1023))]
    pub(super) local_rank: u64,
    /// KV blocks that this rank's process had before it was started again
    #[arg(long, value_name = "N")]
    pub(super) held_blocks: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct GroupFlags {
    /// Ranks that compute one model together [default: --replicas × --gpus-per-pod]
    #[arg(long, visible_alias = "tp", value_name = "N", value_parser = whole(1, 1024), help_heading = GROUP)]
    pub(super) tensor_parallel_size: Option<u64>,
    /// Pods of the StatefulSet [default: 1]
    #[arg(long, value_name = "N", value_parser = whole(1, 1024), help_heading = GROUP)]
    pub(super) replicas: Option<u64>,
    /// Ranks of each pod, on CPUs too [default: what --tensor-parallel-size leaves, else 1]
    #[arg(long, value_name = "N", value_parser = whole(1, 1024), help_heading = GROUP)]
    pub(super) gpus_per_pod: Option<u64>,
    /// Secret that all pods share; needed where the group leaves this machine
    #[arg(long, value_name = "FILE", help_heading = GROUP)]
    pub(super) group_key_file: Option<PathBuf>,
    /// Headless Service through which the pods of the StatefulSet find each other
    #[arg(long, value_name = "NAME", help_heading = GROUP)]
    pub(super) service_name: Option<String>,
    /// Namespace of the pods [default: POD_NAMESPACE, else the service account's]
    #[arg(long, value_name = "NAME", help_heading = GROUP)]
    pub(super) namespace: Option<String>,
    /// Domain of the cluster's names
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local", help_heading = GROUP)]
    pub(super) cluster_domain: String,
    /// Instead of a StatefulSet: how many nodes there are
    #[arg(long, value_name = "N", value_parser = whole(1, 1024), help_heading = GROUP)]
    pub(super) nnodes: Option<u64>,
    /// Which of --nnodes this is
    #[arg(long, value_name = "N", value_parser = whole(0, 1023), help_heading = GROUP)]
    pub(super) node_rank: Option<u64>,
    /// Where node 0 is
    #[arg(long, value_name = "HOST", help_heading = GROUP)]
    pub(super) master_addr: Option<String>,
    /// Where ranks call the leader [default: 7400; any free one if all ranks are local]
    #[arg(long, value_name = "PORT", value_parser = port(), help_heading = GROUP)]
    pub(super) master_port: Option<u16>,
    /// Where the first local rank takes calls of the others, the next one port further [default: 7401; any free ones with
    /// --nnodes]
    #[arg(long, value_name = "PORT", value_parser = port(), help_heading = GROUP)]
    pub(super) rank_port: Option<u16>,
    /// Seconds to wait for the first full group [default: for ever]
    #[arg(long, value_name = "SECONDS", value_parser = whole(1, 86_400), help_heading = GROUP)]
    pub(super) join_timeout: Option<u64>,
    /// Seconds that running requests wait for a lost rank
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = whole(1, 86_400), help_heading = GROUP)]
    pub(super) recovery_timeout: u64,
}

#[derive(Debug, Args)]
pub(super) struct RunFlags {
    /// The model (as --model), then the prompt. One argument alone is the model if it is a file or folder, else the
    /// prompt. Without a prompt: a chat
    #[arg(value_name = "MODEL] [PROMPT", num_args = 0..=2)]
    pub(super) arguments: Vec<String>,
    #[command(flatten)]
    pub(super) model: ModelOptions,
    #[command(flatten)]
    pub(super) compute: ComputeFlags,
    #[command(flatten)]
    pub(super) memory: MemoryFlags,
    #[command(flatten)]
    pub(super) scheduling: SchedulingFlags,
    /// Tokens of the answer [default: the rest of the context]
    #[arg(long, value_name = "N", value_parser = count(), help_heading = SAMPLING)]
    pub(super) max_tokens: Option<u64>,
    /// 0 always takes the likeliest token [default: the model's, else 1]
    #[arg(long, value_name = "X", help_heading = SAMPLING)]
    pub(super) temperature: Option<f32>,
    /// Draw from the likeliest tokens that together reach this share [default: the model's, else 1]
    #[arg(long, value_name = "X", help_heading = SAMPLING)]
    pub(super) top_p: Option<f32>,
    /// Draw from this many likeliest tokens; 0 or -1 for all [default: the model's, else 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(-1..=i64::from(u32::MAX)),
          help_heading = SAMPLING)]
    pub(super) top_k: Option<i64>,
    /// Draw from tokens at least this share as likely as the likeliest [default: the model's, else 0]
    #[arg(long, value_name = "X", help_heading = SAMPLING)]
    pub(super) min_p: Option<f32>,
    /// Above 1 makes repetition less likely [default: the model's, else 1]
    #[arg(long, value_name = "X", help_heading = SAMPLING)]
    pub(super) repetition_penalty: Option<f32>,
    /// Instruction before the chat
    #[arg(long, value_name = "TEXT", help_heading = SAMPLING)]
    pub(super) system: Option<String>,
    /// Give the prompt to the model as it is, without a chat template
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", hide_default_value = true, hide_possible_values = true, help_heading = SAMPLING)]
    pub(super) raw: bool,
    #[command(flatten)]
    pub(super) log: LogFlags,
}

#[derive(Debug, Args)]
pub(super) struct BenchFlags {
    #[command(flatten)]
    pub(super) model: ModelFlags,
    #[command(flatten)]
    pub(super) compute: ComputeFlags,
    #[command(flatten)]
    pub(super) memory: MemoryFlags,
    #[command(flatten)]
    pub(super) scheduling: SchedulingFlags,
    /// Tokens of each prompt, random and distinct
    #[arg(long, value_name = "N", default_value = "512", value_parser = count(), help_heading = BENCH)]
    pub(super) prompt_tokens: u64,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value = "128", value_parser = count(), help_heading = BENCH)]
    pub(super) output_tokens: u64,
    /// Requests at once, one measurement for each
    #[arg(long, value_name = "N,…", num_args = 1.., value_delimiter = ',', default_value = "1,16",
          value_parser = count(), help_heading = BENCH)]
    pub(super) concurrency: Vec<u64>,
    /// Requests of each measurement [default: twice the concurrency, at least 3; with --url four times, at least 8]
    #[arg(long, visible_alias = "requests", value_name = "N", value_parser = count(), help_heading = BENCH)]
    pub(super) num_requests: Option<u64>,
    /// Instead of speed, measure how well the model predicts the text of this file
    #[arg(long, value_name = "FILE", help_heading = BENCH)]
    pub(super) perplexity: Option<PathBuf>,
    /// Tokens of the windows that --perplexity cuts the text into [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = whole(4, u64::from(u32::MAX)), help_heading = BENCH)]
    pub(super) context: Option<u64>,
    /// Form of the result on standard output
    #[arg(long, value_name = "FORMAT", default_value = "text", help_heading = BENCH)]
    pub(super) format: OutputFormat,
    /// Also draw the result into this SVG file
    #[arg(long, value_name = "FILE", help_heading = BENCH)]
    pub(super) plot: Option<PathBuf>,
    /// Measure the server at this address (http://host:port), any that speaks OpenAI's API, instead of the engine
    #[arg(long, value_name = "URL", help_heading = REMOTE)]
    pub(super) url: Option<String>,
    /// Route that is asked
    #[arg(long, value_name = "ROUTE", default_value = "completions", help_heading = REMOTE)]
    pub(super) endpoint: Endpoint,
    /// The model's name in requests; also --model [default: the first of /v1/models]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',', help_heading = REMOTE)]
    pub(super) served_model_name: Vec<String>,
    /// Key that requests bring; of several the first. Better set by the variable, which other users cannot see
    #[arg(long, value_name = "KEY", num_args = 1.., value_delimiter = ',', help_heading = REMOTE)]
    pub(super) api_key: Vec<String>,
    /// Seconds from opening a connection to the answer's end after which a request has failed
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = whole(1, 86_400), help_heading = REMOTE)]
    pub(super) timeout: u64,
    #[command(flatten)]
    pub(super) log: LogFlags,
}

/// An address, or the one name that means the same everywhere.
fn host(text: &str) -> Result<IpAddr, String> {
    match text {
        "localhost" => Ok(Ipv4Addr::LOCALHOST.into()),
        _ => text.parse().map_err(|_| "it is no IP address, nor localhost".to_owned()),
    }
}

/// A number of tokens, as vLLM takes it: with k, m and g for thousands, K, M and G for 1024s. 0 stands for auto, which it also calls -1.
fn tokens(text: &str) -> Result<u64, String> {
    if matches!(text, "auto" | "-1") {
        return Ok(0);
    }
    let (digits, unit) = match text.char_indices().last() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => {
            let power = "kmg".find(suffix.to_ascii_lowercase()).map(|power| power as u32 + 1);
            let power = power.ok_or_else(|| format!("{suffix} is no unit: k, m, g, K, M or G"))?;
            (&text[..at], if suffix.is_ascii_lowercase() { 1000_u64 } else { 1024 }.pow(power))
        }
        _ => (text, 1),
    };
    let number = digits.parse::<i128>().map_err(|error| error.to_string())?;
    let tokens = number.checked_mul(i128::from(unit)).and_then(|tokens| u64::try_from(tokens).ok());
    let limits = 1..=u64::from(u32::MAX);
    tokens.filter(|tokens| limits.contains(tokens)).ok_or_else(|| format!("{text} is not in {limits:?}"))
}

/// A whole number from 1 on.
fn count() -> impl TypedValueParser<Value = u64> {
    whole(1, u64::from(u32::MAX))
}

/// A whole number from `low` to `high`. clap's own parser of `u64` calls -1 an invalid digit and names no range.
fn whole(low: u64, high: u64) -> impl TypedValueParser<Value = u64> {
    clap::builder::StringValueParser::new().try_map(move |text| match text.parse::<i128>() {
        Ok(number) => u64::try_from(number)
            .ok()
            .filter(|number| (low..=high).contains(number))
            .ok_or_else(|| format!("{number} is not in {low}..={high}")),
        Err(error) => Err(error.to_string()),
    })
}

/// A port that somebody can be told of.
fn port() -> impl TypedValueParser<Value = u16> {
    clap::value_parser!(u16).range(1..)
}
