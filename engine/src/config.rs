//! The engine's configuration: plain data, put together and checked once by the caller, never written afterwards.

use std::time::Duration;

/// Sizes and switches of one engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// V: token ids are below it.
    pub vocab_size: usize,
    /// Tokens of prompt and output together that one sequence may reach.
    pub max_model_len: usize,
    /// Sequences (choices) in one step; at least 1.
    pub max_num_seqs: usize,
    /// Query tokens in one step; at least `max_num_seqs`, so that every decode has its token.
    pub max_num_batched_tokens: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks of the pool.
    pub num_blocks: usize,
    pub prefix_caching: bool,
    /// Where a device computes beside the engine: whether steps are begun before the last one is over.
    pub async_scheduling: bool,
    /// Requests that may wait for their first step. At most `max_num_seqs` more may be in flight: requests
    /// that were preempted or whose reader is behind are bounded by this sum.
    pub max_queued_requests: usize,
    /// Memory that the prompts and parameters of requests in flight may hold, waiting or not.
    pub max_queued_bytes: usize,
    /// Tokens that end a choice unless `ignore_eos` is set.
    pub eos_token_ids: Vec<u32>,
    /// Start of every prefix hash chain, so that keys of different models never meet.
    pub model_fingerprint: [u8; 16],
    /// How long a request in flight waits for an executor whose group of ranks broke before it fails.
    pub recovery_timeout: Duration,
    /// For tests: every block that is free is overwritten with NaN before it can be used again.
    pub poison_freed_blocks: bool,
}

impl Default for EngineConfig {
    /// The documented defaults of a CPU worker with a small pool; sizes of the model are to be filled in.
    fn default() -> Self {
        Self {
            vocab_size: 0,
            max_model_len: 2048,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            block_size: 16,
            num_blocks: 128,
            prefix_caching: true,
            async_scheduling: true,
            max_queued_requests: 1024,
            max_queued_bytes: 256 << 20,
            eos_token_ids: Vec::new(),
            model_fingerprint: [0; 16],
            recovery_timeout: Duration::from_secs(300),
            poison_freed_blocks: false,
        }
    }
}

impl EngineConfig {
    /// Blocks that hold the KV of `num_tokens` tokens.
    pub(crate) fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Rows of logits that one step may ask for: V × 4 bytes each, so a chunk whose prompt is scored is cut to this.
    pub(crate) fn max_logits_rows(&self) -> usize {
        max_logits_rows(self.max_num_seqs)
    }

    /// # Panics
    /// When a size is zero or a step could not hold one token of every running sequence.
    pub(crate) fn assert_valid(&self) {
        assert!(self.vocab_size > 0 && self.vocab_size <= u32::MAX as usize, "vocab_size out of range");
        assert!(
            self.max_model_len > 0 && self.max_model_len <= i32::MAX as usize,
            "max_model_len out of range"
        );
        assert!(self.max_num_seqs > 0, "max_num_seqs must not be zero");
        assert!(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens below max_num_seqs"
        );
        assert!(self.block_size > 0 && self.num_blocks > 0, "the KV pool must not be empty");
        assert!(self.num_blocks <= i32::MAX as usize, "num_blocks out of range");
    }
}

/// Rows of logits that one step may ask for.
pub(crate) fn max_logits_rows(max_num_seqs: usize) -> usize {
    max_num_seqs.max(256)
}
