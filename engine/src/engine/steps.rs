//! Planning steps, having them computed, and planning the next one beside that.
//!
//! Where a device computes beside the engine, a step is begun and left pending; the engine meanwhile sends out what the one before
//! brought. If everything that the next plan needs of the pending step is known or stays on the device, the next step is begun before
//! the pending one is over, so that the device never waits for the engine: its input tokens are "row r of the pending step". So much
//! is known of steps in which every sequence decodes, unless a draw depends on earlier tokens (penalties). A sequence that then turns out to
//! have ended, by a token or by its reader, is computed once more for nothing; what comes of that is dropped.
//!
//! Steps with prompts are not overtaken: they are long beside the planning, and whoever comes meanwhile is to be in the next one.

use std::collections::HashMap;
use std::time::Instant;

use super::Engine;
use crate::error::{ExecutorError, ExecutorErrorKind, RequestFailure};
use crate::executor::{Begun, StepOutput};
use crate::recorder::StepClock;
use crate::request_state::RequestState;
use crate::sample_row::{RowKind, SampleRow};
use crate::scheduler::{Schedule, Scheduler};
use crate::sequence::{AwaitedToken, Sequence, SequenceKey};

/// A step that was begun.
pub(super) struct PendingStep {
    schedule: Schedule,
    targets: Vec<RowTarget>,
    /// Before it was planned.
    begin: Instant,
    /// The executor was called.
    start: Instant,
    /// The next step can be planned before this one is over.
    may_be_overtaken: bool,
    /// It was planned while another one was computed.
    overtook: bool,
}

/// What became of a step that was planned.
enum Started {
    Pending { keeps_tokens: bool },
    Ran(StepOutput),
}

/// What the answer to a row is for.
#[derive(Clone, Copy)]
pub(super) enum RowTarget {
    /// Of planned sequence `planned`, scored prompt token.
    Score { planned: usize },
    /// Of planned sequence `planned`, a token of `choice`.
    Draw { planned: usize, choice: u32 },
}

impl Engine {
    /// Finishes a pending step whose outcome the next plan has to know. False if there is none.
    pub(super) fn settle(&mut self) -> bool {
        let Some(step) = self.pending.take_if(|step| !step.may_be_overtaken) else { return false };
        self.conclude(step);
        self.recorder.step_ended(self.shared.environment.clock.now());
        true
    }

    /// Plans a step and begins it, or computes it; then finishes the one that it overtook. `settled`: another was finished right before, and
    /// what it brought goes out once this one is begun. False when there was nothing to do.
    pub(super) fn run_step(&mut self, begin: Instant, settled: bool) -> bool {
        let overtaken = self.pending.take();
        let schedule = self.plan_step(settled);
        if schedule.keys.is_empty() {
            let Some(step) = overtaken else {
                self.note_nothing_to_resume();
                return schedule.preempted;
            };
            self.conclude(step);
            return true;
        }
        self.note_first_steps(&schedule);
        let poisoned = self.scheduler.blocks_mut().take_blocks_to_poison();
        if !poisoned.is_empty() {
            self.executor.poison_blocks(&poisoned);
        }

        let start = self.shared.environment.clock.now();
        let (started, targets) = self.start(&schedule);
        // Whatever is planned from here on is computed after these copies.
        self.scheduler.blocks_mut().finish_step();
        let overtook = overtaken.is_some();
        let mut step = PendingStep { schedule, targets, begin, start, may_be_overtaken: false, overtook };
        match started {
            Ok(Started::Pending { keeps_tokens }) => {
                self.await_tokens(&step);
                step.may_be_overtaken = self.shared.config.async_scheduling
                    && keeps_tokens
                    && self.can_be_overtaken(&step.schedule);
                self.pending = Some(step);
                if let Some(overtaken) = overtaken {
                    self.conclude(overtaken);
                }
            }
            Ok(Started::Ran(output)) => {
                assert!(!overtook, "an executor that leaves steps pending does so with all");
                self.take_outcome(step, Ok(output));
            }
            Err(error) => {
                self.pending = overtaken;
                self.take_outcome(step, Err(error));
            }
        }
        true
    }

    /// Begins a step if a device computes beside the engine, else computes it.
    fn start(&mut self, schedule: &Schedule) -> (Result<Started, ExecutorError>, Vec<RowTarget>) {
        let (rows, targets) = rows_of(schedule, &self.scheduler, &self.requests);
        let started = match self.executor.begin(&schedule.plan, &rows) {
            Ok(Begun::Step { keeps_tokens }) => Ok(Started::Pending { keeps_tokens }),
            Ok(Begun::Nothing) => self.executor.run(&schedule.plan, &rows).map(Started::Ran),
            Err(error) => Err(error),
        };
        (started, targets)
    }

    fn plan_step(&mut self, settled: bool) -> Schedule {
        let requests = &self.requests;
        let has_room = |sequence: &Sequence| {
            let outlet = &requests[&sequence.key.serial].outlet;
            outlet.has_room(sequence.in_flight > 0 || (settled && !outlet.is_flushed()))
        };
        let mut schedule = self.scheduler.schedule(has_room);
        if !schedule.keys.is_empty() {
            schedule.plan.step = self.num_steps;
            self.num_steps += 1;
        }
        schedule
    }

    fn note_first_steps(&mut self, schedule: &Schedule) {
        let now = self.shared.environment.clock.now();
        for key in &schedule.keys {
            let request = self.requests.get_mut(&key.serial).expect("planned sequences have a request");
            if request.first_scheduled.is_none() {
                let sequence = self.scheduler.get(key).expect("planned sequences exist");
                request.begin(&sequence.tokens[..request.prompt_len], now);
                self.recorder.first_scheduled(request, sequence.cached_tokens.unwrap_or(0), now);
            }
        }
    }

    /// The next tokens of what decodes are on their way.
    fn await_tokens(&mut self, step: &PendingStep) {
        let number = step.schedule.plan.step;
        for (row, target) in step.targets.iter().enumerate() {
            match *target {
                RowTarget::Draw { planned, .. } if planned < step.schedule.num_decodes => {
                    let token = AwaitedToken { step: number, row: row as u32 };
                    self.scheduler.await_token(&step.schedule.keys[planned], token);
                }
                RowTarget::Draw { .. } | RowTarget::Score { .. } => {}
            }
        }
    }

    fn can_be_overtaken(&self, schedule: &Schedule) -> bool {
        let needs_tokens = |key: &SequenceKey| self.requests[&key.serial].params.is_penalised();
        schedule.num_decodes == schedule.keys.len() && !schedule.keys.iter().any(needs_tokens)
    }

    /// Waits for a step and draws the consequences.
    fn conclude(&mut self, step: PendingStep) {
        let result = self.executor.finish();
        self.take_outcome(step, result);
    }

    fn take_outcome(&mut self, step: PendingStep, result: Result<StepOutput, ExecutorError>) {
        let PendingStep { schedule, targets, begin, start, overtook, .. } = step;
        let end = self.shared.environment.clock.now();
        match result.and_then(|output| check_output(output, targets.len())) {
            Ok(output) => {
                let (is_overtaken, last_end) = (self.pending.is_some(), self.last_end.replace(end));
                let times = StepClock {
                    begin,
                    // The device was at the one before until then.
                    start: last_end.filter(|_| overtook).map_or(start, |last_end| last_end.max(start)),
                    end,
                    forward: output.forward,
                    plans_beside: overtook,
                    ends_beside: is_overtaken,
                };
                self.recorder.step(&schedule, &times);
                self.note_resumes(&schedule);
                self.account(&schedule, targets, output);
            }
            Err(error) => {
                let lost: Vec<Schedule> =
                    [schedule].into_iter().chain(self.pending.take().map(|step| step.schedule)).collect();
                self.fail_steps(&lost, &error);
            }
        }
    }

    /// Nothing of these steps can be trusted.
    fn fail_steps(&mut self, schedules: &[Schedule], error: &ExecutorError) {
        let step = schedules[0].plan.step;
        tracing::error!(step, reason = error.message, kind = ?error.kind, "step failed");
        self.executor.abort();
        let keys: Vec<SequenceKey> =
            schedules.iter().flat_map(|schedule| schedule.keys.iter().copied()).collect();
        if error.kind == ExecutorErrorKind::GroupLost {
            return self.lose_group(&keys);
        }
        // Their requests fail, the others go on.
        for key in keys {
            self.fail(key.serial, RequestFailure::step_failed());
        }
        self.stopping |= error.kind == ExecutorErrorKind::Fatal;
    }

    /// Gives up the pending step, if there is one.
    pub(super) fn forget_pending(&mut self) {
        if self.pending.take().is_some() {
            self.executor.abort();
        }
    }
}

/// Everything wanted from the plan's rows of logits.
fn rows_of<'a>(
    schedule: &Schedule,
    scheduler: &Scheduler,
    requests: &'a HashMap<u64, RequestState>,
) -> (Vec<SampleRow<'a>>, Vec<RowTarget>) {
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    let mut logits_row = 0;
    for (planned, (key, plan)) in schedule.keys.iter().zip(&schedule.plan.sequences).enumerate() {
        let request = &requests[&key.serial];
        let sequence = scheduler.get(key).expect("planned sequences exist");
        for offset in &plan.logits_rows {
            let position = (plan.context_len + offset) as usize;
            if sequence.wants_score(position) {
                let kind = RowKind::Score { target: sequence.tokens[position + 1] };
                rows.push(SampleRow { logits_row, kind, logprobs: Some(request.prompt_top) });
                targets.push(RowTarget::Score { planned });
            } else {
                // While the prompt is computed, all choices draw their first token from its last row.
                for choice in key.choice..key.choice + sequence.num_choices as u32 {
                    let kind = RowKind::Sample(request.draw(choice, position + 1));
                    rows.push(SampleRow { logits_row, kind, logprobs: request.params.logprobs });
                    targets.push(RowTarget::Draw { planned, choice });
                }
            }
            logits_row += 1;
        }
    }
    (rows, targets)
}

/// An executor that answers too little or too much has not run this plan.
fn check_output(output: StepOutput, expected: usize) -> Result<StepOutput, ExecutorError> {
    if output.rows.len() == expected {
        return Ok(output);
    }
    let message = format!("{} answers to {expected} rows", output.rows.len());
    Err(ExecutorError { message, kind: ExecutorErrorKind::Step })
}
