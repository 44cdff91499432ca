//! One step on a GPU, from a batch to answers.
//!
//! Tokens are drawn on the GPU, and only their ids come back, with log-probabilities where they are wanted. What is too much for the
//! GPU's sampler gets its row of logits to the host and is answered there, as on a CPU.

use tandem_kernels::comm::DeviceCommError;
use tandem_kernels::cpu::Cpu;
use tandem_kernels::cuda::launcher::{SampleRow as DeviceRow, TokenBias, UsedToken};
use tandem_kernels::cuda::{CudaError, Drawn, PinnedBuffer, QueuedDraws, Sampler, ScoreTarget, Scored};
use tandem_models::{CudaLlama, ForwardBatch, Others};

use super::SampledToken;
use crate::error::RowError;
use crate::executor::sample::RowSampler;
use crate::sample_row::{Draw, OwnedRow, RowKind, SampleRow};
use crate::stream::TokenLogprobs;

/// A model on a GPU, and what draws from its logits.
pub(crate) struct CudaStep {
    /// Answers what the GPU does not.
    cpu: Cpu,
    pub(crate) model: CudaLlama,
    on_device: Sampler,
    on_host: RowSampler,
    /// f32 `[R, V]`, of rows that the host answers.
    logits: PinnedBuffer,
    /// Rows of the step that was queued last whose tokens stay on the device: all of them or none.
    kept_tokens: usize,
}

/// A step that was queued.
pub(crate) struct QueuedStep {
    draws: QueuedDraws,
    num_logits_rows: usize,
    /// Who answers each row.
    answers: Vec<AnswerAt>,
    /// Rows that the host answers, in their order.
    host_rows: Vec<OwnedRow>,
}

/// Where the answer to a row is found.
#[derive(Clone, Copy)]
enum AnswerAt {
    /// By numbers among those of the step, a draw and its log-probabilities.
    Drawn {
        draw: usize,
        score: Option<ScoreAt>,
    },
    Scored {
        target: u32,
        score: ScoreAt,
    },
    /// At this place of `host_rows`.
    Host(usize),
}

#[derive(Clone, Copy)]
struct ScoreAt {
    number: usize,
    /// Best tokens that are wanted.
    num_top: usize,
}

/// Whether the GPU answers all of these rows, and the next step could take their tokens: not where the next draw depends on them.
pub(crate) fn keeps_tokens(rows: &[SampleRow<'_>]) -> bool {
    let (mut bias, mut allowed, mut banned) = (0, 0, 0);
    rows.iter().all(|row| {
        let RowKind::Sample(draw) = &row.kind else { return false };
        bias += draw.logit_bias.len();
        allowed += draw.allowed_token_ids.map_or(0, <[u32]>::len);
        banned += draw.banned_token_ids.len();
        row.logprobs.is_none_or(|num_top| num_top <= Sampler::MAX_TOP)
            && draw.used_tokens.is_empty()
            && [bias, allowed, banned].iter().all(|len| *len <= Sampler::MAX_ENTRIES)
    })
}

impl CudaStep {
    /// `max_rows`: the most rows to answer in one step.
    ///
    /// # Errors
    /// [`CudaError`]: memory.
    pub(crate) fn new(cpu: Cpu, mut model: CudaLlama, max_rows: usize) -> Result<Self, CudaError> {
        let vocab_size = model.config().vocab_size;
        let cuda = model.runner().cuda();
        let logits = cuda.alloc_pinned(4 * model.options().max_logits_rows * vocab_size)?;
        let on_device = Sampler::new(cuda, vocab_size, max_rows)?;
        let on_host = RowSampler::new(&cpu, vocab_size);
        model.set_drawn_tokens(on_device.drawn_tokens().clone());
        Ok(Self { cpu, model, on_device, on_host, logits, kept_tokens: 0 })
    }

    /// Threads that answer what the GPU does not.
    pub(crate) fn threads(&self) -> usize {
        self.cpu.threads()
    }

    /// Rows of the step that was queued last whose tokens the next one can take.
    pub(crate) fn kept_tokens(&self) -> usize {
        self.kept_tokens
    }

    /// Queues a step, and the way back of what comes of it. Two may be queued and not collected, if the first keeps its tokens.
    ///
    /// # Errors
    /// Those of the GPU and of the other ranks.
    pub(crate) fn queue(
        &mut self,
        batch: &ForwardBatch,
        rows: &[SampleRow<'_>],
        others: Others<'_>,
    ) -> Result<QueuedStep, DeviceCommError> {
        let (answers, host_rows) = self.share_out(rows);
        self.on_device.upload()?;
        self.model.forward(batch, others)?;
        let num_logits_rows = batch.logits_rows.len();
        let draws = self.queue_answers(num_logits_rows, &host_rows)?;
        // Whoever refers to a row means that draw.
        let all_draw = answers.iter().all(|answer| matches!(answer, AnswerAt::Drawn { .. }));
        self.kept_tokens = if all_draw { rows.len() } else { 0 };
        Ok(QueuedStep { draws, num_logits_rows, answers, host_rows })
    }

    /// Decides who answers which row, and gives the GPU its own; what is left for the host.
    fn share_out(&mut self, rows: &[SampleRow<'_>]) -> (Vec<AnswerAt>, Vec<OwnedRow>) {
        let sampler = &mut self.on_device;
        sampler.clear();
        let mut host_rows = Vec::new();
        let on_device = !is_all_on_host();
        let answers = rows.iter().map(|row| {
            let may_score = row.logprobs.is_none_or(|num_top| sampler.has_room_for_score(num_top));
            match &row.kind {
                RowKind::Sample(draw) if on_device && may_score && has_room(sampler, draw) => {
                    let number = push(sampler, row.logits_row, draw);
                    let target = ScoreTarget::Drawn(number);
                    let score = row.logprobs.map(|num_top| score(sampler, row.logits_row, target, num_top));
                    AnswerAt::Drawn { draw: number, score }
                }
                RowKind::Score { target } if on_device && may_score => {
                    let num_top = row.logprobs.unwrap_or(0);
                    let score = score(sampler, row.logits_row, ScoreTarget::Token(*target), num_top);
                    AnswerAt::Scored { target: *target, score }
                }
                RowKind::Sample(_) | RowKind::Score { .. } => {
                    host_rows.push(OwnedRow::of(row));
                    AnswerAt::Host(host_rows.len() - 1)
                }
            }
        });
        (answers.collect(), host_rows)
    }

    /// Queues the draws, and the way back of what comes of the step.
    fn queue_answers(
        &mut self,
        num_logits_rows: usize,
        host_rows: &[OwnedRow],
    ) -> Result<QueuedDraws, CudaError> {
        let logits = self.model.logits(num_logits_rows);
        let vocab_size = self.model.config().vocab_size;
        let mut last = None;
        for row in host_rows {
            let row = row.logits_row as usize;
            // Neighbours often want the same row.
            if last.replace(row) != Some(row) {
                let values = row * vocab_size..(row + 1) * vocab_size;
                logits.slice(values.clone()).download(&mut self.logits, 4 * values.start)?;
            }
        }
        // What comes back last tells that all is done.
        self.on_device.draw(self.model.runner(), logits)
    }

    /// Whether a queued step is done.
    ///
    /// # Errors
    /// [`CudaError`], also for what went wrong in it.
    pub(crate) fn is_done(&self, step: &QueuedStep) -> Result<bool, CudaError> {
        self.on_device.is_ready(step.draws)
    }

    /// What came of each row of a queued step.
    ///
    /// # Errors
    /// [`CudaError`].
    pub(crate) fn collect(
        &mut self,
        step: &QueuedStep,
    ) -> Result<Vec<Result<SampledToken, RowError>>, CudaError> {
        let drawn: Vec<Drawn> = self.on_device.answers(step.draws)?.collect();
        let scores = self.on_device.scores(step.draws)?;
        let of_host = self.answer_on_host(step)?;
        let answer = |at: &AnswerAt| match *at {
            AnswerAt::Host(place) => of_host[place].clone(),
            AnswerAt::Drawn { draw, score } => {
                let token = token_of(drawn[draw])?;
                Ok(SampledToken { token, logprobs: score.map(|score| score.of(&scores, token)) })
            }
            AnswerAt::Scored { target, score } => {
                let logprobs = score.of(&scores, target);
                // Of a row without a distribution there are none.
                if logprobs.logprob.is_nan() {
                    return Err(RowError::NotFinite);
                }
                Ok(SampledToken { token: target, logprobs: Some(logprobs) })
            }
        };
        Ok(step.answers.iter().map(answer).collect())
    }

    fn answer_on_host(
        &mut self,
        step: &QueuedStep,
    ) -> Result<Vec<Result<SampledToken, RowError>>, CudaError> {
        if step.host_rows.is_empty() {
            return Ok(Vec::new());
        }
        let len = step.num_logits_rows * self.model.config().vocab_size;
        let logits = self.logits.read::<f32>(0, len)?;
        let wanted: Vec<SampleRow<'_>> = step.host_rows.iter().map(OwnedRow::borrow).collect();
        Ok(self.on_host.sample(&self.cpu, logits, &wanted))
    }
}

impl ScoreAt {
    fn of(self, scores: &[Scored], token: u32) -> TokenLogprobs {
        let Scored { log_prob, rank, top } = &scores[self.number];
        let top = top[..self.num_top.min(top.len())].to_vec();
        TokenLogprobs { token, logprob: *log_prob, rank: *rank, top }
    }
}

fn score(sampler: &mut Sampler, logits_row: u32, target: ScoreTarget, num_top: usize) -> ScoreAt {
    ScoreAt { number: sampler.score(logits_row, target, num_top), num_top }
}

/// Whether tests of debug builds ask for answers of the host's alone, by `TANDEM_TEST_SAMPLE_ON_HOST`.
fn is_all_on_host() -> bool {
    cfg!(debug_assertions) && std::env::var_os("TANDEM_TEST_SAMPLE_ON_HOST").is_some()
}

fn has_room(sampler: &Sampler, draw: &Draw<'_>) -> bool {
    let allowed = draw.allowed_token_ids.map_or(0, <[u32]>::len);
    sampler.has_room(draw.used_tokens.len(), draw.logit_bias.len(), allowed, draw.banned_token_ids.len())
}

/// The number of the draw among those of the step.
fn push(sampler: &mut Sampler, logits_row: u32, draw: &Draw<'_>) -> usize {
    let used = draw.used_tokens.iter().map(|used| UsedToken {
        token: used.token.cast_signed(),
        in_prompt: i32::from(used.in_prompt),
        output_count: used.output_count.cast_signed(),
    });
    let bias = draw.logit_bias.iter().map(|&(token, bias)| TokenBias { token: token.cast_signed(), bias });
    let (first_used, num_used) = sampler.used(used);
    let (first_bias, num_bias) = sampler.bias(bias);
    let (first_allowed, num_allowed) =
        draw.allowed_token_ids.map_or((0, -1), |allowed| sampler.allowed(allowed));
    let (first_banned, num_banned) = sampler.banned(draw.banned_token_ids);
    sampler.push(DeviceRow {
        logits_row: logits_row.cast_signed(),
        temperature: draw.temperature,
        top_k: i32::try_from(draw.top_k).unwrap_or(i32::MAX),
        top_p: draw.top_p,
        min_p: draw.min_p,
        repetition_penalty: draw.repetition_penalty,
        presence_penalty: draw.presence_penalty,
        frequency_penalty: draw.frequency_penalty,
        seed_low: draw.key.seed as u32,
        seed_high: (draw.key.seed >> 32) as u32,
        position: draw.key.position,
        choice: draw.key.choice,
        first_used,
        num_used,
        first_bias,
        num_bias,
        first_allowed,
        num_allowed,
        first_banned,
        num_banned,
    })
}

fn token_of(drawn: Drawn) -> Result<u32, RowError> {
    match drawn {
        Drawn::Token(token) => Ok(token),
        Drawn::NotFinite => Err(RowError::NotFinite),
        Drawn::AllMasked => Err(RowError::AllMasked),
    }
}
