//! How tokens are drawn and when a choice ends, as the client said it.

use std::collections::HashSet;

use crate::error::InvalidParam;

/// Below this a temperature means greedy: dividing by it would overflow before it changed the winner.
pub(crate) const GREEDY_BELOW: f32 = 1e-5;

/// Sampling parameters with the meaning that vLLM's users expect.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Choices drawn from one prompt.
    pub n: u32,
    /// Output tokens of each choice; 0 computes (and scores) the prompt only.
    pub max_tokens: usize,
    /// Stop and end-of-sequence tokens cannot be drawn before this many output tokens.
    pub min_tokens: usize,
    /// 0 (or below 1e-5) is greedy: arg-max, ties to the lowest id.
    pub temperature: f32,
    /// Keep the `top_k` best tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of best tokens whose probability reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than `min_p` × the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive (multiplies negative) logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// When set, nothing else can be drawn.
    pub allowed_token_ids: Option<Vec<u32>>,
    pub banned_token_ids: Vec<u32>,
    /// Tokens that end the choice, in addition to the model's end-of-sequence tokens; `ignore_eos` leaves
    /// them in force.
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    /// Key of the noise; drawn once at submission when absent.
    pub seed: Option<u64>,
    /// `Some(n)`: report each token's log-probability and rank, and the `n` best tokens.
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    /// One choice of 16 tokens from the unchanged distribution.
    fn default() -> Self {
        Self {
            n: 1,
            max_tokens: 16,
            min_tokens: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            banned_token_ids: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            seed: None,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Refuses what has no meaning for a model of `vocab_size` tokens that ends texts with `eos_token_ids`. Bounds of
    /// taste (how many choices, how large a temperature) are the caller's.
    pub fn validate(&self, vocab_size: usize, eos_token_ids: &[u32]) -> Result<(), InvalidParam> {
        check(self.n >= 1, "n", "must be at least 1")?;
        check(self.min_tokens <= self.max_tokens, "min_tokens", "must not exceed max_tokens")?;
        check(self.temperature.is_finite() && self.temperature >= 0.0, "temperature", "must be 0 or more")?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "must be above 0 and at most 1")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", "must be between 0 and 1")?;
        let repetition = self.repetition_penalty;
        check(repetition.is_finite() && repetition > 0.0, "repetition_penalty", "must be above 0")?;
        let additive = -2.0..=2.0;
        check(additive.contains(&self.presence_penalty), "presence_penalty", "must be between -2 and 2")?;
        check(additive.contains(&self.frequency_penalty), "frequency_penalty", "must be between -2 and 2")?;
        check(self.logprobs.unwrap_or(0) <= vocab_size, "logprobs", "must not exceed the vocabulary")?;
        self.validate_token_ids(vocab_size)?;
        self.validate_candidates(vocab_size, eos_token_ids)
    }

    fn validate_token_ids(&self, vocab_size: usize) -> Result<(), InvalidParam> {
        let biased: Vec<u32> = self.logit_bias.iter().map(|(token, _)| *token).collect();
        check_ids(&biased, vocab_size, "logit_bias")?;
        check(self.logit_bias.iter().all(|(_, bias)| bias.is_finite()), "logit_bias", "must be finite")?;
        check_ids(&self.banned_token_ids, vocab_size, "banned_token_ids")?;
        check_ids(&self.stop_token_ids, vocab_size, "stop_token_ids")?;
        if let Some(allowed) = &self.allowed_token_ids {
            check(!allowed.is_empty(), "allowed_token_ids", "must not be empty")?;
            check_ids(allowed, vocab_size, "allowed_token_ids")?;
        }
        Ok(())
    }

    /// Refuses what leaves no token to draw, at any time or while `min_tokens` keeps the choice from ending.
    fn validate_candidates(&self, vocab_size: usize, eos_token_ids: &[u32]) -> Result<(), InvalidParam> {
        let allowed = self.allowed_token_ids.as_deref();
        let is_any_outside = |excluded: &HashSet<u32>| match allowed {
            Some(allowed) => allowed.iter().any(|token| !excluded.contains(token)),
            None => (0..vocab_size as u32).any(|token| !excluded.contains(&token)),
        };
        let param = if allowed.is_some() { "allowed_token_ids" } else { "banned_token_ids" };
        let mut excluded: HashSet<u32> = self.banned_token_ids.iter().copied().collect();
        check(is_any_outside(&excluded), param, "must leave a token that is not banned")?;
        if self.min_tokens == 0 {
            return Ok(());
        }
        excluded.extend(&self.stop_token_ids);
        if !self.ignore_eos {
            excluded.extend(eos_token_ids);
        }
        check(is_any_outside(&excluded), param, "must leave a token that does not stop, for min_tokens")
    }

    pub(crate) fn is_penalised(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

fn check(holds: bool, param: &'static str, message: &str) -> Result<(), InvalidParam> {
    if holds { Ok(()) } else { Err(InvalidParam::new(param, message)) }
}

fn check_ids(ids: &[u32], vocab_size: usize, param: &'static str) -> Result<(), InvalidParam> {
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        Some(id) => Err(InvalidParam::new(param, format!("token id {id} is outside of the vocabulary"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Edit = fn(&mut SamplingParams);

    #[test]
    fn the_default_is_valid() {
        assert_eq!(SamplingParams::default().validate(8, &[]), Ok(()));
    }

    #[test]
    fn every_bad_value_names_its_field() {
        let cases: Vec<(&str, Edit)> = vec![
            ("n", |p| p.n = 0),
            ("min_tokens", |p| p.min_tokens = 17),
            ("temperature", |p| p.temperature = -0.1),
            ("temperature", |p| p.temperature = f32::NAN),
            ("temperature", |p| p.temperature = f32::INFINITY),
            ("top_p", |p| p.top_p = 0.0),
            ("top_p", |p| p.top_p = 1.01),
            ("top_p", |p| p.top_p = f32::NAN),
            ("min_p", |p| p.min_p = -0.1),
            ("min_p", |p| p.min_p = f32::NAN),
            ("repetition_penalty", |p| p.repetition_penalty = 0.0),
            ("repetition_penalty", |p| p.repetition_penalty = f32::INFINITY),
            ("presence_penalty", |p| p.presence_penalty = 2.5),
            ("frequency_penalty", |p| p.frequency_penalty = f32::NAN),
            ("logit_bias", |p| p.logit_bias = vec![(8, 1.0)]),
            ("logit_bias", |p| p.logit_bias = vec![(1, f32::NAN)]),
            ("banned_token_ids", |p| p.banned_token_ids = vec![9]),
            ("stop_token_ids", |p| p.stop_token_ids = vec![8]),
            ("allowed_token_ids", |p| p.allowed_token_ids = Some(vec![])),
            ("allowed_token_ids", |p| p.allowed_token_ids = Some(vec![u32::MAX])),
            ("allowed_token_ids", |p| {
                p.allowed_token_ids = Some(vec![1, 2]);
                p.banned_token_ids = vec![2, 1];
            }),
            ("allowed_token_ids", |p| {
                p.min_tokens = 1;
                p.allowed_token_ids = Some(vec![1, 2]);
                p.banned_token_ids = vec![2];
                p.stop_token_ids = vec![1];
            }),
            ("banned_token_ids", |p| p.banned_token_ids = (0..8).collect()),
            ("banned_token_ids", |p| {
                p.min_tokens = 1;
                p.banned_token_ids = (1..8).collect();
                p.stop_token_ids = vec![0];
            }),
            ("logprobs", |p| p.logprobs = Some(9)),
        ];
        for (field, edit) in cases {
            let mut params = SamplingParams::default();
            edit(&mut params);
            assert_eq!(params.validate(8, &[]).unwrap_err().param, field);
        }
    }

    #[test]
    fn tokens_that_end_a_choice_do_not_count_while_min_tokens_keeps_it_open() {
        let outcome = |min_tokens, ignore_eos, stop_token_ids| {
            let allowed_token_ids = Some(vec![1, 2]);
            let params = SamplingParams {
                min_tokens,
                ignore_eos,
                stop_token_ids,
                allowed_token_ids,
                ..SamplingParams::default()
            };
            params.validate_candidates(8, &[1, 5]).map_err(|error| error.param)
        };
        assert_eq!(outcome(1, false, vec![2]), Err("allowed_token_ids"));
        assert_eq!(outcome(1, true, vec![2, 1]), Err("allowed_token_ids"));
        assert_eq!(outcome(1, true, vec![2]), Ok(()));
        assert_eq!(outcome(1, false, vec![3]), Ok(()));
        assert_eq!(outcome(0, false, vec![2, 1]), Ok(()));
    }
}
