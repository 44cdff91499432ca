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

/// A [`SampleRow`] with its own lists.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OwnedRow {
    pub(crate) logits_row: u32,
    pub(crate) kind: OwnedKind,
    pub(crate) logprobs: Option<u32>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum OwnedKind {
    Sample(Box<OwnedDraw>),
    Score { target: u32 },
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OwnedDraw {
    pub(crate) key: NoiseKey,
    pub(crate) used_tokens: Vec<TokenUse>,
    pub(crate) repetition_penalty: f32,
    pub(crate) presence_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) logit_bias: Vec<(u32, f32)>,
    pub(crate) allowed_token_ids: Option<Vec<u32>>,
    pub(crate) banned_token_ids: Vec<u32>,
    pub(crate) temperature: f32,
    pub(crate) top_k: u32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
}

impl OwnedRow {
    pub(crate) fn of(row: &SampleRow<'_>) -> Self {
        let kind = match &row.kind {
            RowKind::Score { target } => OwnedKind::Score { target: *target },
            RowKind::Sample(draw) => OwnedKind::Sample(Box::new(OwnedDraw::of(draw))),
        };
        Self { logits_row: row.logits_row, kind, logprobs: row.logprobs.map(|top| top as u32) }
    }

    pub(crate) fn borrow(&self) -> SampleRow<'_> {
        let kind = match &self.kind {
            OwnedKind::Score { target } => RowKind::Score { target: *target },
            OwnedKind::Sample(draw) => RowKind::Sample(draw.borrow()),
        };
        SampleRow { logits_row: self.logits_row, kind, logprobs: self.logprobs.map(|top| top as usize) }
    }

    /// Every token that it names.
    pub(crate) fn token_ids(&self) -> impl Iterator<Item = u32> {
        let (target, draw) = match &self.kind {
            OwnedKind::Score { target } => (Some(*target), None),
            OwnedKind::Sample(draw) => (None, Some(draw)),
        };
        let of_draw = draw.into_iter().flat_map(|draw| {
            let used = draw.used_tokens.iter().map(|used| used.token);
            let biased = draw.logit_bias.iter().map(|(token, _)| *token);
            let listed = draw.allowed_token_ids.iter().flatten().chain(&draw.banned_token_ids).copied();
            used.chain(biased).chain(listed)
        });
        target.into_iter().chain(of_draw)
    }
}

impl OwnedDraw {
    fn of(draw: &Draw<'_>) -> Self {
        Self {
            key: draw.key,
            used_tokens: draw.used_tokens.to_vec(),
            repetition_penalty: draw.repetition_penalty,
            presence_penalty: draw.presence_penalty,
            frequency_penalty: draw.frequency_penalty,
            logit_bias: draw.logit_bias.to_vec(),
            allowed_token_ids: draw.allowed_token_ids.map(<[u32]>::to_vec),
            banned_token_ids: draw.banned_token_ids.to_vec(),
            temperature: draw.temperature,
            top_k: draw.top_k,
            top_p: draw.top_p,
            min_p: draw.min_p,
        }
    }

    fn borrow(&self) -> Draw<'_> {
        Draw {
            key: self.key,
            used_tokens: &self.used_tokens,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: &self.logit_bias,
            allowed_token_ids: self.allowed_token_ids.as_deref(),
            banned_token_ids: &self.banned_token_ids,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
        }
    }
}
