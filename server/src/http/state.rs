//! What every handler sees: the checked configuration, the process's lifecycle, and the model once it is loaded.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tandem_engine::{EngineHandle, GenerationConfig};

use super::body::BodyMemory;
use super::errors::ApiError;
use super::gpus::GpuGauges;
use super::group::GroupView;
use super::helpers::Helpers;
use super::limits;
use super::params::Rules;
use super::process::{ProcessMeter, max_open_files};
use crate::config::ServeConfig;
use crate::lifecycle::{Lifecycle, Phase};
use crate::text::{ChatTemplate, Sandbox, Tokenizer};

/// Shared by all connections of the process.
pub struct AppState {
    pub config: Arc<ServeConfig>,
    pub lifecycle: Lifecycle,
    /// The tensor-parallel group that this pod is part of.
    pub(super) group: Option<GroupView>,
    serving: OnceLock<Arc<Serving>>,
    pub(super) created_s: u64,
    pub(super) process: ProcessMeter,
    pub(super) timeouts: Timeouts,
    /// Bounds how many long texts are worked on at once, so that they cannot take every core from the step loop.
    pub(super) helpers: Helpers,
    pub(super) body_memory: BodyMemory,
    /// Most connections on the API's port that take requests.
    pub(super) max_connections: usize,
}

/// A loaded model.
pub struct Serving {
    pub engine: EngineHandle,
    /// None: token ids only.
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub template: Option<Arc<ChatTemplate>>,
    /// Runs the template. None: this process does, in tests that have no program to start.
    pub sandbox: Option<Sandbox>,
    pub generation: GenerationConfig,
    /// None: no GPU computes, or none that can be looked at.
    pub gpus: Option<GpuGauges>,
}

/// The waiting times of [`limits`]; tests shorten them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    pub(super) header: Duration,
    pub(super) body: Duration,
    pub(super) idle: Duration,
    pub(super) write_stall: Duration,
    pub(super) keep_alive: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            header: limits::HEADER_TIMEOUT,
            body: limits::BODY_TIMEOUT,
            idle: limits::IDLE_TIMEOUT,
            write_stall: limits::WRITE_STALL_TIMEOUT,
            keep_alive: limits::KEEP_ALIVE_INTERVAL,
        }
    }
}

impl AppState {
    pub fn new(config: Arc<ServeConfig>, lifecycle: Lifecycle, group: Option<GroupView>) -> Arc<Self> {
        let max_connections = limits::max_connections(max_open_files());
        Self::with_limits(config, lifecycle, group, Timeouts::default(), max_connections)
    }

    pub(super) fn with_limits(
        config: Arc<ServeConfig>,
        lifecycle: Lifecycle,
        group: Option<GroupView>,
        timeouts: Timeouts,
        max_connections: usize,
    ) -> Arc<Self> {
        // A clock before 1970 is wrong, not a reason to stop.
        let created_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Arc::new(Self {
            config,
            lifecycle,
            group,
            serving: OnceLock::new(),
            created_s,
            process: ProcessMeter::new(),
            timeouts,
            helpers: Helpers::new(limits::MAX_LONG_WORK),
            body_memory: BodyMemory::new(limits::MAX_BODY_MEMORY_BYTES),
            max_connections,
        })
    }

    /// Hands over the loaded model, once, before the phase becomes `Ready`.
    ///
    /// # Panics
    /// On the second call.
    pub fn install(&self, serving: Serving) {
        assert!(self.serving.set(Arc::new(serving)).is_ok(), "a model is installed once");
    }

    /// The loaded model, if it is there.
    pub fn serving(&self) -> Option<&Arc<Serving>> {
        self.serving.get()
    }

    /// The loaded model for a request that needs it. A draining server still takes requests: the engine refuses them
    /// when the time to accept is over.
    pub(super) fn require_serving(&self) -> Result<&Arc<Serving>, ApiError> {
        if self.group.is_some() && self.serving().is_none() && self.lifecycle.phase() == Phase::Loading {
            return Err(ApiError::NotReady("waiting for its group of ranks"));
        }
        match (self.lifecycle.phase(), self.serving()) {
            (Phase::Failed, _) => Err(ApiError::NotReady("failed")),
            (Phase::Ready | Phase::Draining, Some(serving)) => Ok(serving),
            _ => Err(ApiError::NotReady("loading")),
        }
    }

    /// The name that answers carry.
    pub(super) fn model_name(&self) -> &str {
        self.config.served_model_names.first().map_or("", String::as_str)
    }

    /// Refuses a model that is not served here; no name means the served one.
    pub(super) fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(asked) if !self.config.served_model_names.iter().any(|name| name == asked) => {
                Err(ApiError::ModelNotFound(asked.chars().take(256).collect()))
            }
            _ => Ok(()),
        }
    }
}

impl Serving {
    /// What requests are checked against.
    pub(super) fn rules(&self) -> Rules {
        let config = self.engine.config();
        Rules {
            vocab_size: config.vocab_size,
            max_model_len: config.max_model_len,
            has_tokenizer: self.tokenizer.is_some(),
            generation: self.generation.clone(),
        }
    }

    /// OpenAI's `system_fingerprint`: equal for equal model files and builds.
    pub(super) fn fingerprint(&self) -> String {
        let hex: String =
            self.engine.config().model_fingerprint.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        format!("tandem-{}-{hex}", env!("CARGO_PKG_VERSION"))
    }
}
