//! One consistent set of everything the engine counts.
//!
//! The step thread publishes a new one at the end of every step, before the step's events go out: whoever has
//! read the end of a stream finds it counted. `admitted = completed + errored + cancelled + in flight` holds
//! in every one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::config::EngineConfig;
use crate::error::FailureKind;
use crate::histogram::{CHOICES, FIRST_TOKEN, Histogram, PER_REQUEST, PER_TOKEN, STEP_TOKENS, up_to};

/// Counters since start, and gauges of the moment. Times are in seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Requests accepted.
    pub admitted: u64,
    /// Requests whose choices all ended by a stop token, an end-of-sequence token or a stop string.
    pub completed_stop: u64,
    /// Requests of which a choice ended at `max_tokens`.
    pub completed_length: u64,
    /// Requests failed, by status code.
    pub errored: BTreeMap<FailureKind, u64>,
    /// Requests whose stream was dropped before its end.
    pub cancelled: u64,
    pub in_flight: u64,
    /// Requests in flight of which nothing runs: new ones and preempted ones.
    pub waiting: u64,
    /// Requests in flight of which at least one sequence holds blocks.
    pub running: u64,

    /// Prompt tokens of requests whose prompt is computed, cached ones included.
    pub prompt_tokens: u64,
    /// Output tokens of all choices.
    pub generation_tokens: u64,
    /// Prompt tokens looked up in the prefix cache (once per request).
    pub prefix_cache_query_tokens: u64,
    /// Prompt tokens found there.
    pub prefix_cache_hit_tokens: u64,
    pub preemptions: u64,
    /// Times the executor's group of ranks was lost.
    pub group_breaks: u64,
    /// Whether nothing has run since the group was lost, or since the start when it has never been whole.
    pub recovering: bool,
    /// The last break that is over: from its notice to the end of the first step after it, or, when nothing
    /// was to be run, until steps could run again.
    pub last_recovery: Option<Duration>,
    /// Requests that had output when the group broke and went on after it, once per break.
    pub stream_resumes: u64,
    /// Output tokens per second over the last 10 s.
    pub tokens_per_second: f64,
    /// Requests completed per second over the last 10 s.
    pub requests_per_second: f64,

    pub num_blocks: usize,
    /// Neither used nor cached.
    pub free_blocks: usize,
    /// In the block table of a sequence.
    pub used_blocks: usize,
    /// Kept for their content only; given up when needed.
    pub cached_blocks: usize,
    /// `used_blocks / num_blocks`.
    pub kv_cache_usage: f64,

    /// Steps that succeeded.
    pub steps: u64,
    /// The most sequences one step held.
    pub max_step_sequences: usize,
    /// Distinct numbers of query tokens of sequences that were not decoding (prompts, and what preemption
    /// made to be computed again), the first 64 of them.
    pub chunk_sizes: BTreeSet<usize>,
    /// Blocks copied because forked choices wrote to a shared one.
    pub block_copies: u64,
    /// Where the time went of steps in which every sequence decoded.
    pub decode_times: StepTimes,

    /// Arrival to first token.
    pub ttft: Histogram,
    /// Gap between two tokens of one choice.
    pub inter_token_latency: Histogram,
    /// First to last token over (output tokens − 1), once per choice with at least two.
    pub tpot: Histogram,
    /// Arrival to end, of completed requests.
    pub e2e_latency: Histogram,
    /// Arrival to first step.
    pub queue_time: Histogram,
    /// First step to end of prompt.
    pub prefill_time: Histogram,
    /// End of prompt to end.
    pub decode_time: Histogram,
    /// First step to end.
    pub inference_time: Histogram,
    /// Wall time of steps that held at least one decode.
    pub decode_step_latency: Histogram,
    /// Query tokens per step.
    pub iteration_tokens: Histogram,
    /// Of completed requests, as are the four below.
    pub request_prompt_tokens: Histogram,
    /// All choices together.
    pub request_generation_tokens: Histogram,
    /// The longest choice.
    pub request_max_generation_tokens: Histogram,
    pub request_params_n: Histogram,
    pub request_params_max_tokens: Histogram,
}

/// Wall time of some steps by what the step thread did. The parts add up to the time from the beginning of a step to the
/// beginning of the next, if that follows at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepTimes {
    pub steps: u64,
    /// Those that were planned and begun while a device computed the one before; what that takes is in the model's time.
    pub overlapped: u64,
    /// Receiving requests and deciding what runs.
    pub scheduling: Duration,
    /// The model.
    pub forward: Duration,
    /// Flattening the plan, and from logits to tokens.
    pub sampling: Duration,
    /// Bringing tokens to requests, publishing counts and sending events.
    pub emitting: Duration,
}

impl StepTimes {
    pub fn total(&self) -> Duration {
        self.scheduling + self.forward + self.sampling + self.emitting
    }

    /// What came after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            steps: self.steps - earlier.steps,
            overlapped: self.overlapped - earlier.overlapped,
            scheduling: self.scheduling - earlier.scheduling,
            forward: self.forward - earlier.forward,
            sampling: self.sampling - earlier.sampling,
            emitting: self.emitting - earlier.emitting,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.overlapped += other.overlapped;
        self.scheduling += other.scheduling;
        self.forward += other.forward;
        self.sampling += other.sampling;
        self.emitting += other.emitting;
    }
}

impl Snapshot {
    pub(crate) fn new(config: &EngineConfig) -> Self {
        let lengths = up_to(config.max_model_len);
        Self {
            admitted: 0,
            completed_stop: 0,
            completed_length: 0,
            errored: BTreeMap::new(),
            cancelled: 0,
            in_flight: 0,
            waiting: 0,
            running: 0,
            prompt_tokens: 0,
            generation_tokens: 0,
            prefix_cache_query_tokens: 0,
            prefix_cache_hit_tokens: 0,
            preemptions: 0,
            group_breaks: 0,
            recovering: false,
            last_recovery: None,
            stream_resumes: 0,
            tokens_per_second: 0.0,
            requests_per_second: 0.0,
            num_blocks: config.num_blocks,
            free_blocks: config.num_blocks,
            used_blocks: 0,
            cached_blocks: 0,
            kv_cache_usage: 0.0,
            steps: 0,
            max_step_sequences: 0,
            chunk_sizes: BTreeSet::new(),
            block_copies: 0,
            decode_times: StepTimes::default(),
            ttft: Histogram::new(FIRST_TOKEN),
            inter_token_latency: Histogram::new(PER_TOKEN),
            tpot: Histogram::new(PER_TOKEN),
            e2e_latency: Histogram::new(PER_REQUEST),
            queue_time: Histogram::new(PER_REQUEST),
            prefill_time: Histogram::new(PER_REQUEST),
            decode_time: Histogram::new(PER_REQUEST),
            inference_time: Histogram::new(PER_REQUEST),
            decode_step_latency: Histogram::new(PER_TOKEN),
            iteration_tokens: Histogram::new(STEP_TOKENS),
            request_prompt_tokens: Histogram::new(lengths),
            request_generation_tokens: Histogram::new(lengths),
            request_max_generation_tokens: Histogram::new(lengths),
            request_params_n: Histogram::new(CHOICES),
            request_params_max_tokens: Histogram::new(lengths),
        }
    }

    /// Requests that ended as they should.
    pub fn completed(&self) -> u64 {
        self.completed_stop + self.completed_length
    }

    /// Requests failed, whatever the code.
    pub fn errored_total(&self) -> u64 {
        self.errored.values().sum()
    }

    /// `admitted = completed + errored + cancelled + in flight`, and what is in flight is waiting or running.
    pub fn is_balanced(&self) -> bool {
        self.admitted == self.completed() + self.errored_total() + self.cancelled + self.in_flight
            && self.in_flight == self.waiting + self.running
    }

    /// Adds requests that were submitted but have not reached the step thread: `failed` of them never will.
    pub(crate) fn with_unreceived(&self, unreceived: u64, failed: u64) -> Self {
        let mut snapshot = self.clone();
        snapshot.admitted += unreceived;
        snapshot.in_flight += unreceived - failed;
        snapshot.waiting += unreceived - failed;
        if failed > 0 {
            *snapshot.errored.entry(FailureKind::Unavailable).or_default() += failed;
        }
        snapshot
    }
}
