//! Tokens from logits.

use super::{Address, Launch};

/// What [`argmax`] and [`sample`] say of a row, beside its token (−1 unless `OK`).
pub mod status {
    pub const OK: i32 = 0;
    /// A logit is NaN, or the largest is not finite.
    pub const NOT_FINITE: i32 = 1;
    /// Nothing is left to sample from.
    pub const ALL_MASKED: i32 = 2;
}

/// Where answers go: i32 [R] each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answers {
    pub tokens: Address,
    pub status: Address,
}

/// The largest logit of each row of f32 [R,V], in two launches. keys u64 [R] are zero before the first time, and again
/// after each.
pub fn argmax(
    answers: Answers,
    keys: Address,
    logits: Address,
    num_rows: usize,
    vocab: usize,
) -> [Launch; 2] {
    const SPAN: usize = 16 * 256;
    let args = [keys.into(), logits.into(), vocab.into()];
    let span = Launch::new("argmax", "argmax_span", [vocab.div_ceil(SPAN), num_rows, 1], 256, args);
    let args = [answers.tokens.into(), answers.status.into(), keys.into(), num_rows.into()];
    [span, Launch::new("argmax", "argmax_finish", [num_rows.div_ceil(256), 1, 1], 256, args)]
}

/// How one token is drawn. Lists are parts of [`SampleLists`]; each token is in a list at most once, and below V.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleRow {
    /// Row of the logits; several may share one, and −1 answers nothing.
    pub logits_row: i32,
    /// 0 takes the largest logit.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: i32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed_low: u32,
    pub seed_high: u32,
    pub position: u32,
    pub choice: u32,
    pub first_used: i32,
    pub num_used: i32,
    pub first_bias: i32,
    pub num_bias: i32,
    pub first_allowed: i32,
    /// −1 allows every token.
    pub num_allowed: i32,
    pub first_banned: i32,
    pub num_banned: i32,
}

/// A token of the sequence so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedToken {
    pub token: i32,
    pub in_prompt: i32,
    pub output_count: i32,
}

/// Added to a token's logit.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenBias {
    pub token: i32,
    pub bias: f32,
}

/// The lists of all rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleLists {
    /// [`UsedToken`].
    pub used: Address,
    /// [`TokenBias`].
    pub bias: Address,
    /// i32.
    pub allowed: Address,
    /// i32.
    pub banned: Address,
}

/// Draws a token for each of rows [`SampleRow`; n] from logits f32 [R,V]. The workspace is f32 [n,V].
pub fn sample(
    answers: Answers,
    workspace: Address,
    logits: Address,
    rows: Address,
    lists: SampleLists,
    num_rows: usize,
    vocab: usize,
) -> Launch {
    let args = [
        answers.tokens.into(),
        answers.status.into(),
        workspace.into(),
        logits.into(),
        rows.into(),
        lists.used.into(),
        lists.bias.into(),
        lists.allowed.into(),
        lists.banned.into(),
        vocab.into(),
    ];
    Launch::new("sample", "sample", [num_rows, 1, 1], 1024, args)
}

/// Where log-probabilities go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogProbs {
    /// f32 [n]: of the target.
    pub target: Address,
    /// i32 [n]: 1 + the number of larger logits.
    pub rank: Address,
    /// i32 [n][top]: the tokens with the largest logits, in order; −1 past the vocabulary.
    pub top_tokens: Address,
    /// f32 [n][top].
    pub top: Address,
}

/// What log-probabilities are wanted of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets {
    /// i32 [n]: rows of logits; −1 is left alone.
    pub rows: Address,
    /// i32 [n]: tokens; −1 − r is that of row r of `drawn`.
    pub tokens: Address,
    /// i32: tokens that were drawn; a negative one is left alone.
    pub drawn: Address,
}

/// Log-probabilities under rows of logits f32 [R,V] as the model made them: of targets, and of the `num_top` best tokens.
pub fn log_probs(
    out: LogProbs,
    logits: Address,
    targets: Targets,
    num_rows: usize,
    num_top: usize,
    vocab: usize,
) -> Launch {
    let args = [
        out.target.into(),
        out.rank.into(),
        out.top_tokens.into(),
        out.top.into(),
        logits.into(),
        targets.rows.into(),
        targets.tokens.into(),
        targets.drawn.into(),
        num_top.into(),
        vocab.into(),
    ];
    Launch::new("log_probs", "log_probs", [num_rows, 1, 1], 1024, args)
}
