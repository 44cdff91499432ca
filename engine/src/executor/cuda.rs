//! One rank on a GPU, in the process of the engine: model, KV cache and sampler behind [`Executor`].
//!
//! Tokens are drawn on the GPU, and only their ids come back. What also wants log-probabilities, or is no draw at all, gets its
//! row of logits to the host and is answered there, as on a CPU.

use std::time::{Duration, Instant};

use tandem_kernels::cpu::Cpu;
use tandem_kernels::cuda::launcher::{SampleRow as DeviceRow, TokenBias, UsedToken};
use tandem_kernels::cuda::{CudaError, Drawn, PinnedBuffer, Sampler};
use tandem_models::{CudaLlama, ForwardBatch};

use super::prepare::prepare;
use super::sample::RowSampler;
use super::{Executor, SampledToken, StepOutput};
use crate::error::{ExecutorError, ExecutorErrorKind, RowError};
use crate::sample_row::{Draw, RowKind, SampleRow};
use crate::step_plan::StepPlan;

/// A step that takes longer hangs: the step thread counts as dead after two minutes, and this is to be said before.
const STEP_DEADLINE: Duration = Duration::from_secs(100);
/// How long the thread stays awake for the device before it lets others run.
const SPIN: Duration = Duration::from_millis(20);

/// Runs plans on a GPU.
pub(crate) struct CudaExecutor {
    /// Answers what the GPU does not.
    cpu: Cpu,
    model: CudaLlama,
    batch: ForwardBatch,
    on_device: Sampler,
    on_host: RowSampler,
    /// f32 `[R, V]`, of rows that the host answers.
    logits: PinnedBuffer,
    /// Of the step's rows, those that the host answers.
    host_rows: Vec<usize>,
}

impl CudaExecutor {
    /// Takes a loaded model with its KV memory; `max_rows`: the most rows to answer in one step.
    pub(crate) fn new(cpu: Cpu, model: CudaLlama, max_rows: usize) -> Result<Self, ExecutorError> {
        let vocab_size = model.config().vocab_size;
        let cuda = model.runner().cuda();
        let bytes = 4 * model.options().max_logits_rows * vocab_size;
        let logits = cuda.alloc_pinned(bytes).map_err(fatal)?;
        let on_device = Sampler::new(cuda, vocab_size, max_rows).map_err(fatal)?;
        let on_host = RowSampler::new(&cpu, vocab_size);
        let batch = ForwardBatch::default();
        Ok(Self { cpu, model, batch, on_device, on_host, logits, host_rows: Vec::new() })
    }

    fn step(&mut self, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        let start = Instant::now();
        self.share_out(rows);
        self.queue(rows).map_err(fatal)?;
        self.wait(start)?;
        let forward = start.elapsed();
        let mut answers = vec![Err(RowError::NotFinite); rows.len()];
        let mut drawn = self.on_device.answers().map_err(fatal)?;
        let mut host_rows = self.host_rows.iter().peekable();
        for (index, answer) in answers.iter_mut().enumerate() {
            if host_rows.next_if_eq(&&index).is_none() {
                *answer = answer_of(drawn.next().expect("an answer for each row"));
            }
        }
        if !self.host_rows.is_empty() {
            let len = self.batch.logits_rows.len() * self.model.config().vocab_size;
            let logits = self.logits.read::<f32>(0, len).map_err(fatal)?;
            let wanted: Vec<SampleRow<'_>> = self.host_rows.iter().map(|index| rows[*index]).collect();
            let found = self.on_host.sample(&self.cpu, logits, &wanted);
            self.host_rows.iter().zip(found).for_each(|(index, found)| answers[*index] = found);
        }
        Ok(StepOutput { rows: answers, forward })
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

    /// Queues the step, and the way back of what came of it.
    fn queue(&mut self, rows: &[SampleRow<'_>]) -> Result<(), CudaError> {
        self.model.forward(&self.batch)?;
        let logits = self.model.logits(self.batch.logits_rows.len());
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

    /// Waits for what was queued, until the deadline of a step.
    fn wait(&self, start: Instant) -> Result<(), ExecutorError> {
        while !(self.on_device.is_ready().map_err(fatal)? && self.is_idle()?) {
            let waited = start.elapsed();
            if waited >= STEP_DEADLINE {
                let message = format!("the GPU was not done with a step in {} s", waited.as_secs());
                return Err(ExecutorError { message, kind: ExecutorErrorKind::Fatal });
            }
            match waited < SPIN {
                true => std::hint::spin_loop(),
                false => std::thread::yield_now(),
            }
        }
        Ok(())
    }

    /// Whether nothing is under way. A step without a row that is answered has nothing to read that would tell.
    fn is_idle(&self) -> Result<bool, ExecutorError> {
        if self.host_rows.is_empty() && self.on_device.num_rows() > 0 {
            return Ok(true);
        }
        self.model.runner().cuda().is_idle().map_err(fatal)
    }
}

impl Executor for CudaExecutor {
    fn run(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        prepare(plan, &mut self.batch);
        self.step(rows)
    }

    // After an error the device is of no use to this process any more.
    fn abort(&mut self) {}

    fn poison_blocks(&mut self, blocks: &[u32]) {
        if let Err(error) = self.model.fill_nan(blocks) {
            tracing::error!(%error, "blocks cannot be overwritten");
        }
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

/// An error of the device says nothing of what else is wrong with it, and often nothing works afterwards: the process ends, and
/// a new one takes its place.
fn fatal(error: CudaError) -> ExecutorError {
    ExecutorError { message: error.to_string(), kind: ExecutorErrorKind::Fatal }
}
