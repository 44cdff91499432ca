//! The parts that answers of both routes have in common.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::generation::{Generation, TokenCounts};
use super::logprobs::{PromptLogprob, TokenNames};
use super::params::{Params, StreamParams};
use super::state::{AppState, Serving};

/// What stands at the top of every answer and chunk, and how its parts are to be written.
pub(super) struct AnswerMeta {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
    pub(super) names: TokenNames,
    /// Alternatives per output token; `None` without log-probabilities.
    pub(super) logprobs: Option<usize>,
    /// Alternatives per prompt token; `None` without.
    pub(super) prompt_logprobs: Option<usize>,
    pub(super) return_token_ids: bool,
    pub(super) stream: StreamParams,
}

/// OpenAI's `usage`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) total_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) prompt_tokens_details: PromptTokensDetails,
}

/// Part of [`Usage`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct PromptTokensDetails {
    pub(super) cached_tokens: usize,
}

impl From<TokenCounts> for Usage {
    fn from(counts: TokenCounts) -> Self {
        Self {
            prompt_tokens: counts.prompt,
            total_tokens: counts.prompt + counts.output,
            completion_tokens: counts.output,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: counts.cached },
        }
    }
}

impl AnswerMeta {
    /// `prefix` is `cmpl` or `chatcmpl`; `prompt_logprobs` what the client itself asked for.
    pub(super) fn new(
        prefix: &str,
        request_id: &str,
        state: &AppState,
        serving: &Arc<Serving>,
        params: &Params,
        prompt_logprobs: Option<usize>,
    ) -> Self {
        Self {
            id: format!("{prefix}-{request_id}"),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            model: state.model_name().to_owned(),
            fingerprint: serving.fingerprint(),
            names: TokenNames { tokenizer: serving.tokenizer.clone(), as_ids: params.tokens_as_ids },
            logprobs: params.sampling.logprobs,
            prompt_logprobs,
            return_token_ids: params.return_token_ids,
            stream: params.stream.unwrap_or_default(),
        }
    }

    /// `usage` of a chunk: absent, null, or the counts so far.
    pub(super) fn chunk_usage(&self, generation: &Generation) -> Option<Option<Usage>> {
        match self.stream {
            StreamParams { continuous_usage: true, .. } => Some(Some(generation.counts().into())),
            StreamParams { include_usage: true, .. } => Some(None),
            _ => None,
        }
    }

    /// Whether a chunk says something even when its text is empty.
    pub(super) fn counts_tokens(&self) -> bool {
        self.logprobs.is_some() || self.return_token_ids || self.stream.continuous_usage
    }

    /// How many tokens the whole answer lists, alternatives included: tells a short answer from a long one.
    pub(super) fn num_listed(&self, generation: &Generation) -> usize {
        let (counts, prompts) = (generation.counts(), generation.prompts());
        let scored = prompts.iter().filter_map(|prompt| prompt.logprobs.as_ref()?.iter().flatten().next());
        let per_prompt_token =
            scored.map(|scored| 1 + scored.top.len()).max().unwrap_or(0) + usize::from(self.return_token_ids);
        // Each choice may repeat its prompt.
        let repeats = generation.choices_per_prompt();
        counts.prompt * per_prompt_token * repeats + counts.output * (1 + self.logprobs.map_or(0, |n| 1 + n))
    }

    /// vLLM's `prompt_logprobs` of one prompt, when asked for.
    pub(super) fn prompt_logprobs(
        &self,
        generation: &Generation,
        prompt_idx: usize,
    ) -> Option<Vec<Option<PromptLogprob>>> {
        let count = self.prompt_logprobs?;
        let logprobs = generation.prompts()[prompt_idx].logprobs.as_ref()?;
        Some(
            logprobs
                .iter()
                .map(|entry| entry.as_ref().map(|entry| self.names.prompt(entry, count)))
                .collect(),
        )
    }
}
