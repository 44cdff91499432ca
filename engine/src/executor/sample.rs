//! Executes sampling rows on logits in host memory: the kernels' row operations in the order of the policy, rows shared
//! out over the backend's workers.

use tandem_kernels::cpu::Cpu;
use tandem_kernels::sampling::{
    self, Cut, Filters, NoisyDraw, Penalties, RowOps, SamplingScratch, TokenCount,
};

use super::SampledToken;
use crate::error::RowError;
use crate::sample_row::{Draw, NoiseKey, RowKind, SampleRow};
use crate::stream::TokenLogprobs;

/// Answers the rows of a step.
pub(crate) struct RowSampler {
    vocab_size: usize,
    /// One for each worker.
    workers: Vec<Scratch>,
}

/// Memory of one worker. Rows are adjusted in it: several may share one row of logits, which stays as the model made it.
#[derive(Default)]
struct Scratch {
    adjusted: Vec<f32>,
    counts: Vec<TokenCount>,
    filter: SamplingScratch,
}

impl RowSampler {
    pub(crate) fn new(cpu: &Cpu, vocab_size: usize) -> Self {
        let workers = (0..cpu.threads()).map(|_| Scratch::default()).collect();
        Self { vocab_size, workers }
    }

    /// Answers every row, in their order; `logits` is `[R, V]`.
    pub(crate) fn sample(
        &mut self,
        cpu: &Cpu,
        logits: &[f32],
        rows: &[SampleRow<'_>],
    ) -> Vec<Result<SampledToken, RowError>> {
        let mut answers = vec![Err(RowError::NotFinite); rows.len()];
        let vocab_size = self.vocab_size;
        sampling::for_each_row(cpu, &mut self.workers, &mut answers, |ops, scratch, row| {
            let row = &rows[row];
            let start = row.logits_row as usize * vocab_size;
            scratch.answer(ops, &logits[start..start + vocab_size], row)
        });
        answers
    }
}

impl Scratch {
    fn answer(&mut self, ops: RowOps, raw: &[f32], row: &SampleRow<'_>) -> Result<SampledToken, RowError> {
        let best = sampling::argmax(ops, raw).ok_or(RowError::NotFinite)?;
        let token = match &row.kind {
            RowKind::Score { target } => *target,
            RowKind::Sample(draw) => self.draw(ops, raw, best, draw)?,
        };
        let logprobs = row.logprobs.map(|top| logprobs(ops, raw, best.1, token, top));
        Ok(SampledToken { token, logprobs })
    }

    /// `best` is the raw row's arg-max.
    fn draw(
        &mut self,
        ops: RowOps,
        raw: &[f32],
        mut best: (u32, f32),
        draw: &Draw<'_>,
    ) -> Result<u32, RowError> {
        let mut row = raw;
        if adjusts(draw) {
            self.adjust(raw, draw);
            row = &self.adjusted;
            best = sampling::argmax(ops, row).ok_or(RowError::AllMasked)?;
        }
        if draw.temperature == 0.0 {
            return Ok(best.0);
        }
        let cut = match truncates(draw) {
            false => Cut::none(),
            true => sampling::filter(ops, row, best, &filters(draw), &mut self.filter),
        };
        let noisy = NoisyDraw { temperature: draw.temperature, key: noise_key(draw.key), cut };
        sampling::gumbel_argmax(ops, row, best, &noisy).ok_or(RowError::AllMasked)
    }

    /// Penalties, bias, allowed and banned ids, on a copy.
    fn adjust(&mut self, raw: &[f32], draw: &Draw<'_>) {
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

fn filters(draw: &Draw<'_>) -> Filters {
    Filters { temperature: draw.temperature, top_k: draw.top_k, top_p: draw.top_p, min_p: draw.min_p }
}

fn noise_key(key: NoiseKey) -> sampling::NoiseKey {
    sampling::NoiseKey { seed: key.seed, position: key.position, choice: key.choice }
}

/// `maximum` is the row's largest logit.
fn logprobs(ops: RowOps, raw: &[f32], maximum: f32, token: u32, top: usize) -> TokenLogprobs {
    let log_sum = sampling::log_sum_exp(ops, raw, maximum);
    let best = sampling::top_n(ops, raw, top);
    TokenLogprobs {
        token,
        logprob: sampling::log_prob(raw, log_sum, token),
        rank: sampling::rank(ops, raw, token),
        top: best.into_iter().map(|(id, logit)| (id, logit - log_sum)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::penalties::TokenUse;
    use tandem_kernels::cpu::CpuOptions;

    const VOCAB: usize = 8;
    const LOGITS: [f32; VOCAB] = [0.5, 2.0, -1.0, 1.9, 0.0, -3.0, 1.0, 0.9];

    fn plain() -> Draw<'static> {
        Draw {
            key: NoiseKey { seed: 1, choice: 0, position: 5 },
            used_tokens: &[],
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: &[],
            allowed_token_ids: None,
            banned_token_ids: &[],
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
        }
    }

    fn answer(logits: &[f32], kind: RowKind<'_>, logprobs: Option<usize>) -> Result<SampledToken, RowError> {
        let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).expect("a CPU");
        let row = SampleRow { logits_row: (logits.len() / VOCAB - 1) as u32, kind, logprobs };
        RowSampler::new(&cpu, VOCAB).sample(&cpu, logits, &[row]).remove(0)
    }

    fn token(draw: Draw<'_>) -> u32 {
        answer(&LOGITS, RowKind::Sample(draw), None).expect("something can be drawn").token
    }

    /// How often each token is drawn over many positions.
    fn shares(draw: Draw<'_>) -> [f64; VOCAB] {
        const DRAWS: u32 = 4000;
        let mut counts = [0.0; VOCAB];
        for position in 0..DRAWS {
            let key = NoiseKey { position, ..draw.key };
            counts[token(Draw { key, ..draw }) as usize] += 1.0 / f64::from(DRAWS);
        }
        counts
    }

    fn softmax(logits: impl Iterator<Item = f32>) -> Vec<f64> {
        let weights: Vec<f64> = logits.map(|logit| f64::from(logit).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / sum).collect()
    }

    #[test]
    fn greedy_follows_each_adjustment() {
        assert_eq!(token(plain()), 1);
        assert_eq!(token(Draw { logit_bias: &[(4, 2.5)], ..plain() }), 4);
        assert_eq!(token(Draw { banned_token_ids: &[1, 3], ..plain() }), 6);
        assert_eq!(token(Draw { allowed_token_ids: Some(&[5, 2]), ..plain() }), 2);
        assert_eq!(token(Draw { allowed_token_ids: Some(&[5, 2]), banned_token_ids: &[2], ..plain() }), 5);
    }

    #[test]
    fn penalties_see_prompt_and_output() {
        let used = |in_prompt, output_count| [TokenUse { token: 1, in_prompt, output_count }];
        let repeated =
            |used: &[TokenUse]| token(Draw { used_tokens: used, repetition_penalty: 1.1, ..plain() });
        assert_eq!((repeated(&used(true, 0)), repeated(&used(false, 1))), (3, 3));
        let present = |used: &[TokenUse]| token(Draw { used_tokens: used, presence_penalty: 0.2, ..plain() });
        assert_eq!((present(&used(true, 0)), present(&used(false, 1))), (1, 3));
        let frequent =
            |used: &[TokenUse]| token(Draw { used_tokens: used, frequency_penalty: 0.06, ..plain() });
        assert_eq!((frequent(&used(false, 1)), frequent(&used(false, 2))), (1, 3));
    }

    #[test]
    fn draws_follow_the_distribution_that_is_left() {
        let close = |found: [f64; VOCAB], expected: &[f64]| {
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.03 && (*b > 0.0 || *a == 0.0))
        };
        let warm = Draw { temperature: 0.7, ..plain() };
        assert!(close(shares(warm), &softmax(LOGITS.iter().map(|logit| logit / 0.7))));
        let kept = |ids: &[usize]| {
            let masked = LOGITS.iter().enumerate();
            softmax(masked.map(|(id, logit)| if ids.contains(&id) { *logit } else { f32::NEG_INFINITY }))
        };
        let full = Draw { temperature: 1.0, ..plain() };
        assert!(close(shares(Draw { top_k: 2, ..full }), &kept(&[1, 3])));
        assert!(close(shares(Draw { top_p: 0.5, ..full }), &kept(&[1, 3])));
        assert!(close(shares(Draw { min_p: 0.35, ..full }), &kept(&[1, 3, 6])));
        assert!(close(shares(Draw { top_k: 2, banned_token_ids: &[1], ..full }), &kept(&[3, 6])));
    }

    #[test]
    fn the_same_key_draws_the_same_and_choices_differ() {
        let draw = |choice| {
            (0..64).map(move |position| {
                token(Draw { key: NoiseKey { seed: 9, choice, position }, temperature: 1.0, ..plain() })
            })
        };
        assert!(draw(0).eq(draw(0)));
        assert!(!draw(0).eq(draw(1)));
    }

    #[test]
    fn log_probabilities_are_those_of_the_raw_row() {
        let expected = softmax(LOGITS.into_iter());
        let draw = Draw { banned_token_ids: &[1], logit_bias: &[(6, 9.0)], ..plain() };
        // The second row of two: the first must not matter.
        let logits: Vec<f32> = [[f32::NAN; VOCAB], LOGITS].concat();
        for (kind, id) in [(RowKind::Sample(draw), 6), (RowKind::Score { target: 2 }, 2)] {
            let sampled = answer(&logits, kind, Some(3)).expect("a good row");
            let logprobs = sampled.logprobs.expect("asked for");
            assert_eq!((sampled.token, logprobs.token), (id, id));
            assert!((f64::from(logprobs.logprob) - expected[id as usize].ln()).abs() < 1e-5);
            assert_eq!(
                logprobs.rank,
                1 + LOGITS.iter().filter(|logit| **logit > LOGITS[id as usize]).count() as u32
            );
            assert_eq!(logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 6]);
        }
    }

    #[test]
    fn bad_rows_are_errors_of_their_own() {
        let nan = [[0.0, f32::NAN].as_slice(), &[0.0; 6]].concat();
        assert_eq!(answer(&nan, RowKind::Sample(plain()), None), Err(RowError::NotFinite));
        let masked = Draw { allowed_token_ids: Some(&[2]), banned_token_ids: &[2], ..plain() };
        for temperature in [0.0, 1.0] {
            let draw = RowKind::Sample(Draw { temperature, ..masked });
            assert_eq!(answer(&LOGITS, draw, None), Err(RowError::AllMasked));
        }
    }

    #[test]
    fn rows_are_answered_in_order_and_fail_alone() {
        let masked = Draw { allowed_token_ids: Some(&[2]), banned_token_ids: &[2], ..plain() };
        let warm = Draw { temperature: 1.0, top_k: 4, ..plain() };
        // Rows 0 and 2 are good, row 1 is not; more rows than workers, each logits row several times.
        let bad = [f32::INFINITY; VOCAB];
        let logits: Vec<f32> = [LOGITS, bad, LOGITS.map(|logit| -logit)].concat();
        let draws = [plain(), masked, warm, Draw { logit_bias: &[(4, 9.0)], ..plain() }];
        let rows: Vec<SampleRow<'_>> = (0..48)
            .map(|i| SampleRow {
                logits_row: i % 3,
                kind: match i % 5 {
                    0 => RowKind::Score { target: i % 8 },
                    kind => RowKind::Sample(Draw {
                        key: NoiseKey { position: i, ..plain().key },
                        ..draws[kind as usize - 1]
                    }),
                },
                logprobs: (i % 4 == 0).then_some(2),
            })
            .collect();
        for threads in [1, 2, 3] {
            let cpu =
                Cpu::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() }).expect("a CPU");
            let answers = RowSampler::new(&cpu, VOCAB).sample(&cpu, &logits, &rows);
            assert_eq!(answers.len(), rows.len());
            for (row, found) in rows.iter().zip(answers) {
                let alone = RowSampler::new(&cpu, VOCAB).sample(&cpu, &logits, &[*row]).remove(0);
                assert_eq!(found, alone, "{row:?}");
                let is_masked =
                    matches!(&row.kind, RowKind::Sample(draw) if draw.allowed_token_ids.is_some());
                let expected = match row.logits_row {
                    1 => Some(RowError::NotFinite),
                    _ => is_masked.then_some(RowError::AllMasked),
                };
                assert_eq!(found.err(), expected);
            }
        }
    }
}
