//! One step on a GPU, from a batch to answers.
//!
//! Tokens are drawn on the GPU, and only their ids come back. What also wants log-probabilities, or is no draw at all, gets its
//! row of logits to the host and is answered there, as on a CPU.

use tandem_kernels::comm::DeviceCommError;
use tandem_kernels::cpu::Cpu;
use tandem_kernels::cuda::launcher::{SampleRow as DeviceRow, TokenBias, UsedToken};
use tandem_kernels::cuda::{CudaError, Drawn, PinnedBuffer, QueuedDraws, Sampler};
use tandem_models::{CudaLlama, ForwardBatch, Others};

use super::SampledToken;
use crate::error::RowError;
use crate::executor::sample::RowSampler;
use crate::sample_row::{Draw, OwnedRow, RowKind, SampleRow};

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
    num_rows: usize,
    num_logits_rows: usize,
    /// Rows that the host answers, with their places among all.
    host_rows: Vec<(usize, OwnedRow)>,
}

/// Whether the GPU answers all of these rows, and the next step could take their tokens: not where the next draw depends on them.
pub(crate) fn keeps_tokens(rows: &[SampleRow<'_>]) -> bool {
    let (mut bias, mut allowed, mut banned) = (0, 0, 0);
    rows.iter().all(|row| {
        let RowKind::Sample(draw) = &row.kind else { return false };
        bias += draw.logit_bias.len();
        allowed += draw.allowed_token_ids.map_or(0, <[u32]>::len);
        banned += draw.banned_token_ids.len();
        row.logprobs.is_none()
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
        let host_rows = self.share_out(rows);
        self.on_device.upload()?;
        self.model.forward(batch, others)?;
        let num_logits_rows = batch.logits_rows.len();
        let draws = self.queue_answers(num_logits_rows, &host_rows)?;
        self.kept_tokens = if host_rows.is_empty() { rows.len() } else { 0 };
        Ok(QueuedStep { draws, num_rows: rows.len(), num_logits_rows, host_rows })
    }

    /// Decides who answers which row, and gives the GPU its own; the others.
    fn share_out(&mut self, rows: &[SampleRow<'_>]) -> Vec<(usize, OwnedRow)> {
        self.on_device.clear();
        let mut host_rows = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            match &row.kind {
                RowKind::Sample(draw) if row.logprobs.is_none() && has_room(&self.on_device, draw) => {
                    push(&mut self.on_device, row.logits_row, draw);
                }
                RowKind::Sample(_) | RowKind::Score { .. } => host_rows.push((index, OwnedRow::of(row))),
            }
        }
        host_rows
    }

    /// Queues the draws, and the way back of what comes of the step.
    fn queue_answers(
        &mut self,
        num_logits_rows: usize,
        host_rows: &[(usize, OwnedRow)],
    ) -> Result<QueuedDraws, CudaError> {
        let logits = self.model.logits(num_logits_rows);
        let vocab_size = self.model.config().vocab_size;
        let mut last = None;
        for (_, row) in host_rows {
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
        let mut answers = vec![Err(RowError::NotFinite); step.num_rows];
        let mut drawn = self.on_device.answers(step.draws)?;
        let mut host_rows = step.host_rows.iter().peekable();
        for (index, answer) in answers.iter_mut().enumerate() {
            if host_rows.next_if(|(row, _)| *row == index).is_none() {
                *answer = answer_of(drawn.next().expect("an answer for each row"));
            }
        }
        if !step.host_rows.is_empty() {
            let len = step.num_logits_rows * self.model.config().vocab_size;
            let logits = self.logits.read::<f32>(0, len)?;
            let wanted: Vec<SampleRow<'_>> = step.host_rows.iter().map(|(_, row)| row.borrow()).collect();
            let found = self.on_host.sample(&self.cpu, logits, &wanted);
            step.host_rows.iter().zip(found).for_each(|((index, _), found)| answers[*index] = found);
        }
        Ok(answers)
    }
}

fn has_room(sampler: &Sampler, draw: &Draw<'_>) -> bool {
    let allowed = draw.allowed_token_ids.map_or(0, <[u32]>::len);
    sampler.has_room(draw.used_tokens.len(), draw.logit_bias.len(), allowed, draw.banned_token_ids.len())
}

fn push(sampler: &mut Sampler, logits_row: u32, draw: &Draw<'_>) {
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
    });
}

fn answer_of(drawn: Drawn) -> Result<SampledToken, RowError> {
    match drawn {
        Drawn::Token(token) => Ok(SampledToken { token, logprobs: None }),
        Drawn::NotFinite => Err(RowError::NotFinite),
        Drawn::AllMasked => Err(RowError::AllMasked),
    }
}
