//! The model that the fake executor pretends to run, and what a request must get from it, computed alone and
//! in one piece.
//!
//! Logits are a hash of the whole token history, so a single wrong, missing or stale slot changes everything
//! after it.

use std::cmp::Reverse;

use super::{EOS, VOCAB, mix};
use crate::error::RowError;
use crate::request::Request;
use crate::sample_row::NoiseKey;

/// How one choice must end when nobody interferes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Stop(Option<u32>),
    Length,
    /// The row after the last of its tokens is bad: the request fails.
    Bad,
}

pub(crate) struct Oracle {
    /// A row right after this token cannot be drawn from.
    pub(crate) bad_token: Option<u32>,
}

impl Oracle {
    /// Tokens and ending of one choice.
    pub(crate) fn choice(&self, request: &Request, seed: u64, choice: u32) -> (Vec<u32>, Ending) {
        let params = &request.params;
        let mut history = request.prompt.clone();
        let output = |history: &[u32]| history[request.prompt.len()..].to_vec();
        loop {
            let drawn = output(&history);
            if drawn.len() == params.max_tokens {
                return (drawn, Ending::Length);
            }
            let Ok(token) = self.next(request, seed, choice, &history) else { return (drawn, Ending::Bad) };
            history.push(token);
            if params.stop_token_ids.contains(&token) {
                return (output(&history), Ending::Stop(Some(token)));
            }
            if token == EOS && !params.ignore_eos {
                return (output(&history), Ending::Stop(None));
            }
        }
    }

    fn next(&self, request: &Request, seed: u64, choice: u32, history: &[u32]) -> Result<u32, RowError> {
        if history.last() == self.bad_token.as_ref() {
            return Err(RowError::NotFinite);
        }
        let params = &request.params;
        let (prompt, output) = history.split_at(request.prompt.len());
        let is_early = output.len() < params.min_tokens;
        let ends =
            |token: u32| params.stop_token_ids.contains(&token) || (token == EOS && !params.ignore_eos);
        let adjust = |token: u32, mut logit: f32| {
            if params.allowed_token_ids.as_ref().is_some_and(|allowed| !allowed.contains(&token))
                || params.banned_token_ids.contains(&token)
                || (is_early && ends(token))
            {
                return None;
            }
            let count = output.iter().filter(|drawn| **drawn == token).count();
            if count > 0 || prompt.contains(&token) {
                logit = repeat(logit, params.repetition_penalty);
            }
            if count > 0 {
                logit -= params.presence_penalty + params.frequency_penalty * count as f32;
            }
            let bias: f32 =
                params.logit_bias.iter().filter(|(id, _)| *id == token).map(|(_, bias)| bias).sum();
            Some(logit + bias)
        };
        let key = NoiseKey { seed, choice, position: history.len() as u32 };
        pick(hash(history), params.temperature, params.top_k, key, adjust)
    }
}

/// Repetition penalty on one logit.
pub(crate) fn repeat(logit: f32, penalty: f32) -> f32 {
    if logit > 0.0 { logit / penalty } else { logit * penalty }
}

pub(crate) fn hash(history: &[u32]) -> u64 {
    history
        .iter()
        .fold(0, |hash, token| mix(hash ^ (u64::from(*token) + 1).wrapping_mul(0xff51_afd7_ed55_8ccd)))
}

/// The raw logit of a token.
pub(crate) fn logit(hash: u64, token: u32) -> f32 {
    (mix(hash ^ u64::from(token)) >> 40) as f32 / (1 << 22) as f32 - 2.0
}

/// The sampler, as far as the tests need one: adjusted logits, top-k, Gumbel noise, ties to the lowest id.
pub(crate) fn pick(
    hash: u64,
    temperature: f32,
    top_k: u32,
    key: NoiseKey,
    adjust: impl Fn(u32, f32) -> Option<f32>,
) -> Result<u32, RowError> {
    let mut candidates: Vec<(u32, f32)> = (0..VOCAB)
        .filter_map(|token| adjust(token, logit(hash, token)).map(|adjusted| (token, adjusted)))
        .collect();
    if temperature > 0.0 {
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
        if top_k > 0 {
            candidates.truncate(top_k as usize);
        }
        candidates.iter_mut().for_each(|(token, logit)| *logit = *logit / temperature + gumbel(key, *token));
    }
    let best =
        candidates.into_iter().max_by(|a, b| a.1.total_cmp(&b.1).then(Reverse(a.0).cmp(&Reverse(b.0))));
    best.map(|(token, _)| token).ok_or(RowError::AllMasked)
}

fn gumbel(key: NoiseKey, token: u32) -> f32 {
    let place = (u64::from(key.choice) << 48) ^ (u64::from(key.position) << 16) ^ u64::from(token);
    let uniform = ((mix(mix(key.seed) ^ place) >> 40) as f32 + 0.5) / (1 << 24) as f32;
    -(-uniform.ln()).ln()
}
