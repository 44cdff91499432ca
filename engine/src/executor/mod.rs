//! The one thing the engine knows about computing: a step plan goes in, tokens come out.

pub(crate) mod cuda;
pub(crate) mod cuda_step;
pub(crate) mod local;
pub(crate) mod prepare;
pub(crate) mod sample;

use std::time::Duration;

use crate::error::{ExecutorError, ExecutorErrorKind, RowError};
use crate::sample_row::SampleRow;
use crate::step_plan::StepPlan;
use crate::stream::TokenLogprobs;

/// Runs step plans, in the order given, on KV memory of its own.
pub trait Executor: Send {
    /// Copies blocks, computes the plan's tokens, and answers every row of `rows`.
    ///
    /// Only slots below each sequence's context and the plan's own may be read: the rest may hold anything,
    /// NaN included.
    fn run(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError>;

    /// The first half of [`Executor::run`], where a device computes beside the engine: begins a step and does not wait. One more may be
    /// begun before it is finished; the device computes them in this order, and what else it is told in between too.
    fn begin(&mut self, _plan: &StepPlan, _rows: &[SampleRow<'_>]) -> Result<Begun, ExecutorError> {
        Ok(Begun::Nothing)
    }

    /// The other half: waits for the step that was begun first of those not finished.
    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        Err(ExecutorError { message: "no step was begun".into(), kind: ExecutorErrorKind::Fatal })
    }

    /// How the executor is. Called before every step, and at least ten times a second while nothing runs;
    /// must not wait. `in_flight`: requests that were taken and have not ended. When the last answer did not
    /// admit any, and none is left, the group can pause.
    fn poll(&mut self, _in_flight: usize) -> ExecutorStatus {
        ExecutorStatus::Ready { epoch: 0, admits: true }
    }

    /// Gives up whatever failed steps left half done, and all that were begun; called after one failed, when the group was lost, and when
    /// the engine stops.
    fn abort(&mut self);

    /// Overwrites the KV of these blocks with NaN (tests switch it on). Called between steps, before the plan
    /// that may use them again.
    fn poison_blocks(&mut self, blocks: &[u32]);
}

/// What [`Executor::begin`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// No device computes beside the engine: nothing was begun, and [`Executor::run`] does it all.
    Nothing,
    /// The step.
    Step {
        /// Every token that it draws stays on the device, where the next step finds it ([`StepPlan`]'s `pending_row`).
        keeps_tokens: bool,
    },
}

/// Whether an executor can run steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecutorStatus {
    /// Steps can run.
    Ready {
        /// Names the KV memory: when it changes, nothing computed before exists any more.
        epoch: u64,
        /// False while the group wants requests to end before it pauses, because a rank is about to leave: those
        /// that were taken go on, new ones are refused.
        admits: bool,
    },
    /// No step can run until the group is whole again, with another epoch. The reason is for logs and
    /// clients.
    Waiting { reason: String },
    /// It will never be ready again: the engine stops.
    Failed { reason: String },
}

/// Answers to the rows of a step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    /// One per [`SampleRow`], in their order.
    pub rows: Vec<Result<SampledToken, RowError>>,
    /// Time spent in the model; the rest of the call was preparing and sampling. What the engine does meanwhile, between
    /// [`Executor::begin`] and [`Executor::finish`], is in it.
    pub forward: Duration,
}

/// A token drawn, or the target of a scored row.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    pub token: u32,
    /// Set when the row asked for it.
    pub logprobs: Option<TokenLogprobs>,
}
