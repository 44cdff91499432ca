//! When the executor's group of ranks breaks, and when it is whole again.
//!
//! KV belongs to one epoch of the group: with the epoch every block goes, but no token. All sequences go back
//! to waiting with what they have emitted, as if they had been preempted, and are computed again when steps
//! can run. No request fails for it, unless the group stays away longer than the configuration allows.
//!
//! An outage lasts from the notice of a break to the first step after it. The group may be ready and break
//! again in between; to the requests, that is one wait. To a request whose own step broke the group the wait goes on until it is
//! computed further than before: one that breaks every group would otherwise be tried again without end.

use std::time::Instant;

use super::Engine;
use crate::error::RequestFailure;
use crate::executor::ExecutorStatus;
use crate::request_state::RequestState;
use crate::scheduler::Schedule;
use crate::sequence::SequenceKey;

/// What the executor last said of its group.
pub(super) struct Group {
    /// Of the last time it was ready.
    epoch: Option<u64>,
    phase: Phase,
    outage: Option<Outage>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Ready {
        admits: bool,
    },
    /// A step or a new epoch told of a break; the executor has not been asked since.
    Lost,
    Waiting,
}

#[derive(Clone, Copy)]
struct Outage {
    since: Instant,
    /// The group had been whole before.
    is_break: bool,
}

impl Default for Group {
    /// Nothing bad has been heard.
    fn default() -> Self {
        Self { epoch: None, phase: Phase::Ready { admits: true }, outage: None }
    }
}

impl Group {
    /// Whether a step can run.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready { .. })
    }

    /// Whether new requests are taken.
    pub(super) fn admits(&self) -> bool {
        self.phase == Phase::Ready { admits: true }
    }
}

impl Engine {
    /// Asks how the executor is, and draws the consequences.
    pub(super) fn poll_executor(&mut self) {
        match self.executor.poll(self.shared.requests_in_flight()) {
            ExecutorStatus::Ready { epoch, admits } => self.be_ready(epoch, admits),
            ExecutorStatus::Waiting { reason } => self.wait_for_group(&reason),
            ExecutorStatus::Failed { reason } => {
                tracing::error!(reason, "the executor has failed");
                self.stopping = true;
            }
        }
        self.shared.set_admits(self.group.admits());
        self.fail_overdue();
    }

    /// All KV is gone. Nothing is left of a step that was half done; no request ends. `in_step`: what was planned, if it was a step
    /// that told.
    pub(super) fn lose_group(&mut self, in_step: &[SequenceKey]) {
        if !self.group.is_ready() {
            return;
        }
        self.forget_pending();
        self.scheduler.reset();
        self.group.phase = Phase::Lost;
        self.shared.set_admits(false);
        let now = self.shared.environment.clock.now();
        let is_break = self.group.epoch.is_some();
        self.recorder.outage_began(is_break);
        let is_new = self.group.outage.is_none();
        self.group.outage.get_or_insert(Outage { since: now, is_break });
        for request in self.requests.values_mut() {
            let was_in_step = in_step.iter().any(|key| key.serial == request.serial);
            // An outage before the last one counts no more, but for those that may have caused both.
            if is_new && !(request.is_suspect && was_in_step) {
                request.stranded_since = Some(now);
            }
            request.stranded_since.get_or_insert(now);
            request.is_suspect |= was_in_step;
            request.is_interrupted |= request.has_output();
        }
    }

    fn be_ready(&mut self, epoch: u64, admits: bool) {
        if self.group.epoch.is_some_and(|last| last != epoch) {
            self.lose_group(&[]);
        }
        if !self.group.is_ready() {
            tracing::info!(epoch, requests = self.requests.len(), "the group of ranks is whole");
        }
        self.group.epoch = Some(epoch);
        self.group.phase = Phase::Ready { admits };
    }

    fn wait_for_group(&mut self, reason: &str) {
        self.lose_group(&[]);
        if self.group.phase != Phase::Waiting {
            tracing::warn!(reason, requests = self.requests.len(), "waiting for the group of ranks");
        }
        self.group.phase = Phase::Waiting;
    }

    /// Ends requests that have waited for the group as long as any may. While the worker drains, those that have given nothing
    /// yet do not wait: another worker can answer them from the start.
    fn fail_overdue(&mut self) {
        if self.group.is_ready() {
            return;
        }
        let now = self.shared.environment.clock.now();
        let timeout = self.shared.config.recovery_timeout;
        let is_draining = self.shared.is_draining();
        let failure_of = |request: &RequestState| {
            let since = request.stranded_since?;
            if now.saturating_duration_since(since) >= timeout {
                return Some(RequestFailure::not_recovered(timeout));
            }
            (is_draining && !request.has_output()).then(RequestFailure::drained_without_group)
        };
        let failures: Vec<(u64, RequestFailure)> = (self.requests.values())
            .filter_map(|request| Some((request.serial, failure_of(request)?)))
            .collect();
        failures.into_iter().for_each(|(serial, failure)| self.fail(serial, failure));
    }

    /// A step has run: its interrupted requests go on.
    pub(super) fn note_resumes(&mut self, schedule: &Schedule) {
        self.end_outage();
        for key in &schedule.keys {
            // Who left while the step was computed does not go on.
            let request = self.requests.get_mut(&key.serial);
            if request.is_some_and(|request| std::mem::take(&mut request.is_interrupted)) {
                self.recorder.resumed();
            }
        }
    }

    /// Steps can run, and there is none to be run.
    pub(super) fn note_nothing_to_resume(&mut self) {
        self.end_outage();
    }

    fn end_outage(&mut self) {
        if let Some(outage) = self.group.outage.take() {
            let gap = self.shared.environment.clock.now().saturating_duration_since(outage.since);
            self.recorder.outage_ended(outage.is_break.then_some(gap));
        }
    }
}
