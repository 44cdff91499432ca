//! Who runs when, and where KV lives: scheduler, block manager with prefix cache, sampling policy, the step
//! loop.
//!
//! Tokens go in ([`Request`]), tokens come out ([`Event`]); text stops in the crate above, tensors in the
//! crates below. One thread owns everything ([`spawn`] starts it); the rest of the process talks to it
//! through [`EngineHandle`].
//!
//! ```text
//! EngineHandle::submit ‖ channel ‖ Engine::step: receive → schedule (StepPlan) → Executor::run →
//!     account → publish (Snapshot) → emit ‖ RequestStream
//! ```
//!
//! Invariants:
//! * A request's tokens depend on its prompt, parameters and seed only: never on batch, chunking, cache hits,
//!   preemption or breaks of the executor's group.
//! * The step thread never waits for a client: streams are bounded, a full one pauses its own request.
//! * Every accepted request ends exactly once, and the published [`Snapshot`] balances to the integer.
//! * Between steps every block is on the free list, or cached and unreferenced, or in as many block tables as
//!   its count says.

mod block_manager;
mod config;
mod engine;
mod environment;
mod error;
pub mod executor;
mod gpu_usage;
mod group;
mod handle;
mod histogram;
mod load;
mod penalties;
mod prefix_cache;
mod recorder;
mod relay;
mod request;
mod request_state;
mod sample_row;
mod sampling_params;
mod scheduler;
mod sequence;
mod snapshot;
mod step_plan;
mod stream;
#[cfg(test)]
mod testing;

pub use config::EngineConfig;
pub use engine::{Engine, StepStatus};
pub use environment::{Clock, Environment, FixedSeeds, SeedSource, SystemClock, SystemSeeds};
pub use error::{
    ExecutorError, ExecutorErrorKind, FailureKind, InvalidParam, RequestFailure, RowError, SubmitError,
};
pub use executor::{Begun, Executor, ExecutorStatus, SampledToken, StepOutput};
pub use gpu_usage::{GpuMeter, GpuUsage};
pub use group::{
    CustomAllReduce, GroupReport, GroupState, GroupStatus, RankEnd, RankOptions, RankOrder, RankReport,
    run_rank,
};
pub use handle::{EngineHandle, EngineState, spawn, spawn_with};
pub use histogram::Histogram;
pub use load::{
    BackendInfo, DeviceChoice, EngineOptions, EnginePlan, Gathering, Inspected, KernelCheck, KvLayout,
    LeadOptions, LoadError, LoadFormat, Loaded, MachineInfo, ModelDType, ModelInfo, ModelOptions,
    check_kernels, compile_kernels, inspect, machine_info, measure_limits,
};
pub use penalties::TokenUse;
pub use request::Request;
pub use sample_row::{Draw, NoiseKey, RowKind, SampleRow};
pub use sampling_params::SamplingParams;
pub use snapshot::{Snapshot, StepTimes};
pub use step_plan::{BlockCopy, PlannedSequence, StepPlan};
pub use stream::{Event, FinishReason, RequestStream, TokenLogprobs};
/// What the crate above needs of the crates below, as plain data.
pub use tandem_kernels::{Activations, DType, Isa, KvDType, cache_folder, limits::Limits};
pub use tandem_models::{
    GenerationConfig, GgufTokenizer, HuggingFaceTokenizer, TensorParallel, TokenizerFiles,
};
pub use tandem_wire::{GroupKey, WireError};
