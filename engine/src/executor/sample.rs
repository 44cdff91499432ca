//! Executes sampling rows on logits in host memory: the kernels' row operations in the order of the policy.

use tandem_kernels::cpu::Cpu;
use tandem_kernels::sampling::{self, Filters, Penalties, SamplingScratch, TokenCount};

use super::SampledToken;
use crate::error::RowError;
use crate::sample_row::{Draw, NoiseKey, RowKind, SampleRow};
use crate::stream::TokenLogprobs;

/// Memory that rows are adjusted in: several rows may share one row of logits, which stays as the model made it.
pub(super) struct RowSampler {
    vocab_size: usize,
    adjusted: Vec<f32>,
    counts: Vec<TokenCount>,
    filter: SamplingScratch,
}

impl RowSampler {
    pub(super) fn new(vocab_size: usize) -> Self {
        Self { vocab_size, adjusted: Vec::new(), counts: Vec::new(), filter: SamplingScratch::default() }
    }

    /// Answers one row; `logits` is `[R, V]`.
    pub(super) fn sample(
        &mut self,
        cpu: &Cpu,
        logits: &[f32],
        row: &SampleRow<'_>,
    ) -> Result<SampledToken, RowError> {
        let start = row.logits_row as usize * self.vocab_size;
        let raw = &logits[start..start + self.vocab_size];
        let (best, _) = sampling::argmax(cpu, raw).ok_or(RowError::NotFinite)?;
        let token = match &row.kind {
            RowKind::Score { target } => *target,
            RowKind::Sample(draw) => self.draw(cpu, raw, best, draw)?,
        };
        let logprobs = row.logprobs.map(|top| logprobs(cpu, raw, token, top));
        Ok(SampledToken { token, logprobs })
    }

    fn draw(&mut self, cpu: &Cpu, raw: &[f32], best: u32, draw: &Draw<'_>) -> Result<u32, RowError> {
        let row = match adjusts(draw) {
            false => raw,
            true => self.adjust(raw, draw),
        };
        if draw.temperature == 0.0 {
            return match adjusts(draw) {
                false => Ok(best),
                true => sampling::argmax(cpu, row).map(|(token, _)| token).ok_or(RowError::AllMasked),
            };
        }
        let key = noise_key(draw.key);
        let filters = Filters {
            temperature: draw.temperature,
            top_k: draw.top_k,
            top_p: draw.top_p,
            min_p: draw.min_p,
        };
        let drawn = match truncates(draw) {
            false => sampling::gumbel_argmax(cpu, row, draw.temperature, key),
            true => {
                if !adjusts(draw) {
                    self.adjusted.clear();
                    self.adjusted.extend_from_slice(raw);
                }
                sampling::filter(cpu, &mut self.adjusted, &filters, &mut self.filter);
                sampling::gumbel_argmax(cpu, &self.adjusted, draw.temperature, key)
            }
        };
        drawn.ok_or(RowError::AllMasked)
    }

    /// Penalties, bias, allowed and banned ids, on a copy.
    fn adjust(&mut self, raw: &[f32], draw: &Draw<'_>) -> &[f32] {
        self.adjusted.clear();
        self.adjusted.extend_from_slice(raw);
        self.counts.clear();
        self.counts.extend(draw.used_tokens.iter().map(|used| TokenCount {
            token: used.token,
            in_prompt: used.in_prompt,
            in_output: used.output_count,
        }));
        let penalties = Penalties {
            repetition: draw.repetition_penalty,
            presence: draw.presence_penalty,
            frequency: draw.frequency_penalty,
        };
        sampling::apply_penalties(&mut self.adjusted, &self.counts, &penalties);
        sampling::add_bias(&mut self.adjusted, draw.logit_bias);
        if let Some(allowed) = draw.allowed_token_ids {
            sampling::allow_only(&mut self.adjusted, allowed);
        }
        sampling::ban(&mut self.adjusted, draw.banned_token_ids);
        &self.adjusted
    }
}

fn adjusts(draw: &Draw<'_>) -> bool {
    let plain = draw.used_tokens.is_empty()
        && draw.logit_bias.is_empty()
        && draw.allowed_token_ids.is_none()
        && draw.banned_token_ids.is_empty();
    !plain
}

fn truncates(draw: &Draw<'_>) -> bool {
    draw.top_k != 0 || draw.top_p < 1.0 || draw.min_p > 0.0
}

fn noise_key(key: NoiseKey) -> sampling::NoiseKey {
    sampling::NoiseKey { seed: key.seed, position: key.position, choice: key.choice }
}

fn logprobs(cpu: &Cpu, raw: &[f32], token: u32, top: usize) -> TokenLogprobs {
    let log_sum = sampling::log_sum_exp(cpu, raw);
    let best = sampling::top_n(raw, top);
    TokenLogprobs {
        token,
        logprob: sampling::log_prob(raw, log_sum, token),
        rank: sampling::rank(cpu, raw, token),
        top: best.into_iter().map(|(id, logit)| (id, logit - log_sum)).collect(),
    }
}
