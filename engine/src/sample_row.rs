//! What is wanted from a row of logits: the sampling policy of one draw, or the score of a known token.
//!
//! The policy is put together here and executed by the executor, which owns the logits. A draw is
//! `argmax(logit / temperature + G(key, token))` over the tokens that survive, so it has no state: the same
//! key and the same logits give the same token wherever and whenever the step runs.

use crate::penalties::TokenUse;

/// One thing wanted from one row. Several may share a row: the choices of one prompt draw from it with
/// different keys.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// Index into the step's rows of logits (`StepPlan::num_logits_rows`).
    pub logits_row: u32,
    pub kind: RowKind<'a>,
    /// `Some(n)`: log-probability and rank of the token, and the `n` best tokens, all of the raw
    /// distribution. Always set for [`RowKind::Score`].
    pub logprobs: Option<usize>,
}

#[derive(Debug, Clone, Copy)]
pub enum RowKind<'a> {
    /// Draw a token.
    Sample(Draw<'a>),
    /// Report the log-probability of a token that is known.
    Score { target: u32 },
}

/// Applied in the order of the fields, penalties to min-p; then noise.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    pub key: NoiseKey,
    /// Tokens of the sequence so far; empty when all three penalties are off.
    pub used_tokens: &'a [TokenUse],
    /// For tokens of prompt or output: positive logits are divided, negative multiplied. 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output. 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens in the output, times their count. 0 is off.
    pub frequency_penalty: f32,
    /// Added to logits; a token listed twice gets both.
    pub logit_bias: &'a [(u32, f32)],
    /// When set, every other token is masked.
    pub allowed_token_ids: Option<&'a [u32]>,
    /// Masked. Holds stop and end-of-sequence tokens while `min_tokens` is not reached.
    pub banned_token_ids: &'a [u32],
    /// Exactly 0 is greedy: no noise, no truncation, arg-max with ties to the lowest id.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
}

/// Key of the noise of one draw; the token id is the fourth part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NoiseKey {
    pub seed: u64,
    pub choice: u32,
    /// Position of the token being drawn: the prompt's length for the first output token.
    pub position: u32,
}
