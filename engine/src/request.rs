//! What a client asked for, in tokens, and whether it could ever run.

use std::time::Instant;

use crate::config::EngineConfig;
use crate::error::InvalidParam;
use crate::sampling_params::SamplingParams;

/// One request: a prompt and how to continue it, `params.n` times.
#[derive(Debug, Clone)]
pub struct Request {
    /// For logs only; need not be unique.
    pub id: String,
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    /// Lower goes first; first come, first served among equals.
    pub priority: i32,
    /// Requests share cached prefixes only with requests of the same salt.
    pub cache_salt: Option<String>,
    /// `Some(n)`: score every prompt token and list the `n` best tokens of each position.
    pub prompt_logprobs: Option<usize>,
    /// When the client's request came in; latencies count from here.
    pub arrival: Instant,
}

impl Request {
    /// Refuses what could never run under `config`.
    pub(crate) fn validate(&self, config: &EngineConfig) -> Result<(), InvalidParam> {
        self.params.validate(config.vocab_size, &config.eos_token_ids)?;
        if self.prompt.is_empty() {
            return Err(InvalidParam::new("prompt", "must not be empty"));
        }
        if let Some(token) = self.prompt.iter().find(|token| **token as usize >= config.vocab_size) {
            return Err(InvalidParam::new(
                "prompt",
                format!("token id {token} is outside of the vocabulary"),
            ));
        }
        if self.prompt_logprobs.is_some_and(|top| top > config.vocab_size) {
            return Err(InvalidParam::new("prompt_logprobs", "must not exceed the vocabulary"));
        }
        if self.params.n as usize > config.max_num_seqs {
            let message = format!("must be at most {} on this worker", config.max_num_seqs);
            return Err(InvalidParam::new("n", message));
        }
        self.validate_length(config)
    }

    fn validate_length(&self, config: &EngineConfig) -> Result<(), InvalidParam> {
        let (prompt, output) = (self.prompt.len(), self.params.max_tokens);
        let blame = if prompt > config.max_model_len { "prompt" } else { "max_tokens" };
        let total = prompt.saturating_add(output);
        if total > config.max_model_len {
            let message = format!(
                "{prompt} prompt tokens and {output} output tokens exceed the context length of {}",
                config.max_model_len
            );
            return Err(InvalidParam::new(blame, message));
        }
        // The last token's KV is never stored. A single choice is enough to look at: choices are preempted
        // one by one.
        let stored = if output == 0 { prompt } else { total - 1 };
        if config.blocks_for(stored) > config.num_blocks {
            let capacity = config.num_blocks * config.block_size;
            let message = format!(
                "{prompt} prompt tokens and {output} output tokens exceed the KV cache of {capacity} tokens"
            );
            let blame = if prompt > capacity { "prompt" } else { "max_tokens" };
            return Err(InvalidParam::new(blame, message));
        }
        Ok(())
    }

    /// Memory that the request brings and holds to its end.
    pub(crate) fn held_bytes(&self) -> usize {
        let params = &self.params;
        size_of::<Self>()
            + self.id.len()
            + self.cache_salt.as_ref().map_or(0, String::len)
            + size_of_val(self.prompt.as_slice())
            + size_of_val(params.logit_bias.as_slice())
            + size_of_val(params.allowed_token_ids.as_deref().unwrap_or_default())
            + size_of_val(params.banned_token_ids.as_slice())
            + size_of_val(params.stop_token_ids.as_slice())
    }
}
