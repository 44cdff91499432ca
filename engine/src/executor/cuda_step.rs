//! One step on a GPU, from a batch to answers.
//!
//! Tokens are drawn on the GPU, and only their ids come back. What also wants log-probabilities, or is no draw at all, gets its
//! row of logits to the host and is answered there, as on a CPU.

use tandem_kernels::comm::DeviceCommError;
use tandem_kernels::cpu::Cpu;
use tandem_kernels::cuda::launcher::{SampleRow as DeviceRow, TokenBias, UsedToken};
use tandem_kernels::cuda::{CudaError, Drawn, PinnedBuffer, Sampler};
use tandem_models::{CudaLlama, ForwardBatch, Others};

use super::SampledToken;
use crate::error::RowError;
use crate::executor::sample::RowSampler;
use crate::sample_row::{Draw, RowKind, SampleRow};

/// A model on a GPU, and what draws from its logits.
pub(crate) struct CudaStep {
    /// Answers what the GPU does not.
    cpu: Cpu,
    pub(crate) model: CudaLlama,
    on_device: Sampler,
    on_host: RowSampler,
    /// f32 `[R, V]`, of rows that the host answers.
    logits: PinnedBuffer,
    /// Of the step's rows, those that the host answers.
    host_rows: Vec<usize>,
}

impl CudaStep {
    /// `max_rows`: the most rows to answer in one step.
    ///
    /// # Errors
    /// [`CudaError`]: memory.
    pub(crate) fn new(cpu: Cpu, model: CudaLlama, max_rows: usize) -> Result<Self, CudaError> {
        let vocab_size = model.config().vocab_size;
        let cuda = model.runner().cuda();
        let logits = cuda.alloc_pinned(4 * model.options().max_logits_rows * vocab_size)?;
        let on_device = Sampler::new(cuda, vocab_size, max_rows)?;
        let on_host = RowSampler::new(&cpu, vocab_size);
        Ok(Self { cpu, model, on_device, on_host, logits, host_rows: Vec::new() })
    }

    /// Threads that answer what the GPU does not.
    pub(crate) fn threads(&self) -> usize {
        self.cpu.threads()
    }

    /// Queues a step, and the way back of what comes of it.
    ///
    /// # Errors
    /// Those of the GPU and of the other ranks.
    pub(crate) fn queue(
        &mut self,
        batch: &ForwardBatch,
        rows: &[SampleRow<'_>],
        others: Others<'_>,
    ) -> Result<(), DeviceCommError> {
        self.share_out(rows);
        self.model.forward(batch, others)?;
        Ok(self.queue_answers(batch, rows)?)
    }

    /// Decides who answers which row, and gives the GPU its own.
    fn share_out(&mut self, rows: &[SampleRow<'_>]) {
        self.on_device.clear();
        self.host_rows.clear();
        for (index, row) in rows.iter().enumerate() {
            match &row.kind {
                RowKind::Sample(draw) if row.logprobs.is_none() && has_room(&self.on_device, draw) => {
                    push(&mut self.on_device, row.logits_row, draw);
                }
                RowKind::Sample(_) | RowKind::Score { .. } => self.host_rows.push(index),
            }
        }
    }

    /// Queues the draws, and the way back of what comes of the step.
    fn queue_answers(&mut self, batch: &ForwardBatch, rows: &[SampleRow<'_>]) -> Result<(), CudaError> {
        if rows.is_empty() {
            return Ok(());
        }
        let logits = self.model.logits(batch.logits_rows.len());
        self.on_device.draw(self.model.runner(), logits)?;
        let vocab_size = self.model.config().vocab_size;
        let mut last = None;
        for index in &self.host_rows {
            let row = rows[*index].logits_row as usize;
            // Neighbours often want the same row.
            if last.replace(row) != Some(row) {
                let values = row * vocab_size..(row + 1) * vocab_size;
                logits.slice(values.clone()).download(&mut self.logits, 4 * values.start)?;
            }
        }
        Ok(())
    }

    /// Whether what was queued is done.
    ///
    /// # Errors
    /// [`CudaError`], also for what went wrong in it.
    pub(crate) fn is_done(&self) -> Result<bool, CudaError> {
        // What comes back last tells, and costs less to ask; but not every step brings something back.
        match self.host_rows.is_empty() && self.on_device.num_rows() > 0 {
            true => self.on_device.is_ready(),
            false => self.model.runner().cuda().is_idle(),
        }
    }

    /// What came of each row of the step that was queued last.
    ///
    /// # Errors
    /// [`CudaError`].
    pub(crate) fn collect(
        &mut self,
        batch: &ForwardBatch,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Result<SampledToken, RowError>>, CudaError> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let mut answers = vec![Err(RowError::NotFinite); rows.len()];
        let mut drawn = self.on_device.answers()?;
        let mut host_rows = self.host_rows.iter().peekable();
        for (index, answer) in answers.iter_mut().enumerate() {
            if host_rows.next_if_eq(&&index).is_none() {
                *answer = answer_of(drawn.next().expect("an answer for each row"));
            }
        }
        if !self.host_rows.is_empty() {
            let len = batch.logits_rows.len() * self.model.config().vocab_size;
            let logits = self.logits.read::<f32>(0, len)?;
            let wanted: Vec<SampleRow<'_>> = self.host_rows.iter().map(|index| rows[*index]).collect();
            let found = self.on_host.sample(&self.cpu, logits, &wanted);
            self.host_rows.iter().zip(found).for_each(|(index, found)| answers[*index] = found);
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
