//! The step loop: receive, schedule, run, account, publish, emit. How steps are run, one after another or one beside the next, is
//! `steps`.
//!
//! Everything here belongs to one thread. A step's counts are published before its events go out, so whoever
//! has read the end of a stream finds it counted. Events of a step leave together, one message per request.

mod recovery;
mod steps;

use std::collections::HashMap;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use self::recovery::Group;
use self::steps::{PendingStep, RowTarget};
use crate::block_manager::BlockManager;
use crate::config::EngineConfig;
use crate::environment::Environment;
use crate::error::{RequestFailure, RowError};
use crate::executor::{Executor, SampledToken, StepOutput};
use crate::handle::{Command, EngineHandle, Shared, Submission};
use crate::prefix_cache::ChainHasher;
use crate::recorder::Recorder;
use crate::request_state::{Choice, RequestState};
use crate::scheduler::{Limits, Schedule, Scheduler};
use crate::sequence::{Sequence, SequenceKey};
use crate::stream::{Event, FinishReason, Outlet, STREAM_CAPACITY};

/// The step thread's state. [`crate::spawn`] drives it; tests call [`Engine::step`] themselves.
pub struct Engine {
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    executor: Box<dyn Executor>,
    group: Group,
    hasher: ChainHasher,
    scheduler: Scheduler,
    /// By serial number.
    requests: HashMap<u64, RequestState>,
    recorder: Recorder,
    num_steps: u64,
    stopping: bool,
    /// Begun, and not finished.
    pending: Option<PendingStep>,
    /// When the last step was over.
    last_end: Option<Instant>,
    /// Requests in flight with something to say, until it is said.
    touched: Vec<u64>,
    /// Outlets of ended requests, until their last events are out.
    departing: Vec<(Outlet, Option<RequestFailure>)>,
}

/// Bounds that the configuration decides, unless a test wants them tighter.
pub(crate) struct Bounds {
    /// Step messages that may wait in one stream before its request pauses.
    pub(crate) stream_capacity: usize,
    /// Rows of logits in one step; at least `max_num_seqs`, so that every decode has its row.
    pub(crate) max_logits_rows: usize,
}

impl Bounds {
    pub(crate) fn of(config: &EngineConfig) -> Self {
        Self { stream_capacity: STREAM_CAPACITY, max_logits_rows: config.max_logits_rows() }
    }
}

/// What a call of [`Engine::step`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepStatus {
    /// Something was computed; there may be more.
    Worked,
    /// Nothing can run before a command comes or the executor is ready again.
    Idle,
    /// The engine has been shut down or cannot go on; every request has been ended.
    Stopped,
}

impl Engine {
    /// An engine that steps when it is told to, and the way to talk to it.
    ///
    /// # Panics
    /// When the configuration's sizes make no engine.
    pub fn new(
        executor: Box<dyn Executor>,
        config: EngineConfig,
        environment: Environment,
    ) -> (Self, EngineHandle) {
        let bounds = Bounds::of(&config);
        Self::with_bounds(executor, config, environment, bounds)
    }

    /// The same with bounds that do not follow from the configuration.
    pub(crate) fn with_bounds(
        executor: Box<dyn Executor>,
        config: EngineConfig,
        environment: Environment,
        bounds: Bounds,
    ) -> (Self, EngineHandle) {
        config.assert_valid();
        let hasher = ChainHasher::new(environment.cache_secret, config.model_fingerprint, config.block_size);
        let limits = Limits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_logits_rows: bounds.max_logits_rows,
            block_size: config.block_size,
        };
        let scheduler = Scheduler::new(limits, BlockManager::new(&config, hasher.clone()));
        let recorder = Recorder::new(&config, environment.clock.now());
        let shared = Arc::new(Shared::new(config, environment, bounds.stream_capacity));
        let (sender, commands) = mpsc::channel();
        let handle = EngineHandle::new(shared.clone(), sender);
        let engine = Self {
            shared,
            commands,
            executor,
            group: Group::default(),
            hasher,
            scheduler,
            requests: HashMap::new(),
            recorder,
            num_steps: 0,
            stopping: false,
            pending: None,
            last_end: None,
            touched: Vec::new(),
            departing: Vec::new(),
        };
        (engine, handle)
    }

    /// Takes in what was submitted and cancelled, asks how the executor is, and runs one step if anything can
    /// run. Where a device computes beside the engine, the step is only begun, and the tokens that come out are those of the
    /// one before.
    pub fn step(&mut self) -> StepStatus {
        let settled = self.settle();
        let begin = self.shared.environment.clock.now();
        self.receive();
        self.poll_executor();
        let ran = !self.stopping && self.group.is_ready() && self.run_step(begin, settled);
        if self.stopping {
            self.release_all();
            return StepStatus::Stopped;
        }
        self.publish();
        self.emit();
        self.recorder.step_ended(self.shared.environment.clock.now());
        if settled || ran { StepStatus::Worked } else { StepStatus::Idle }
    }

    /// Checks, between steps, that blocks, tables and queues agree; the message names the first
    /// contradiction.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.scheduler.check_integrity()
    }

    /// Sleeps until a command comes, at most `timeout`.
    pub(crate) fn wait(&mut self, timeout: Duration) {
        match self.commands.recv_timeout(timeout) {
            Ok(command) => self.obey(command),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            // Nobody is left who could ask for or read anything.
            Err(mpsc::RecvTimeoutError::Disconnected) => self.stopping = true,
        }
    }

    /// Ends every stream, those of submissions not received and still to come too, and counts what had not
    /// ended as failed. Looks at nothing that a panic may have left half done.
    pub(crate) fn fail_all(&mut self, failure: RequestFailure) {
        self.shared.publish(self.recorder.final_snapshot(failure.kind));
        for (mut outlet, own_failure) in self.departing.drain(..) {
            outlet.flush();
            outlet.end(own_failure);
        }
        for (_, request) in self.requests.drain() {
            let mut outlet = request.outlet;
            outlet.flush();
            outlet.end(Some(failure.clone()));
        }
        // Takes the channel down: the submissions in it are dropped, and so is every later one.
        self.commands = mpsc::channel().1;
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn receive(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.add(submission),
            Command::Cancel { serial } => self.cancel(serial),
            Command::FinishChoice { serial, choice } => self.finish_by_reader(serial, choice),
            Command::Wake => {}
            Command::Shutdown => self.stopping = true,
        }
    }

    fn add(&mut self, submission: Submission) {
        let (mut request, prompt, salt) =
            RequestState::new(submission.accept(), &self.shared.config.eos_token_ids);
        tracing::debug!(id = request.id, prompt_tokens = request.prompt_len, "request admitted");
        self.recorder.admitted();
        request.stranded_since = (!self.group.is_ready()).then(|| self.shared.environment.clock.now());
        self.scheduler.add(Sequence {
            key: request.key(0),
            prompt_len: request.prompt_len,
            tokens: prompt,
            context_len: 0,
            in_flight: 0,
            awaited: None,
            block_table: Vec::new(),
            chain: self.hasher.start(salt.as_deref()),
            num_choices: request.params.n as usize,
            max_len: request.prompt_len + request.params.max_tokens,
            num_scored: request.prompt_logprobs.as_ref().map(|_| 1),
            cached_tokens: None,
        });
        self.requests.insert(request.serial, request);
    }

    fn cancel(&mut self, serial: u64) {
        // A request that ended before its reader went away is counted already.
        if let Some(request) = self.requests.remove(&serial) {
            request.keys().for_each(|key| self.scheduler.remove(&key));
            self.recorder.cancelled();
            tracing::debug!(id = request.id, "request cancelled");
        }
    }

    /// The reader found a stop string in a choice's text.
    fn finish_by_reader(&mut self, serial: u64, choice: u32) {
        let Some(request) = self.requests.get_mut(&serial) else { return };
        // A choice that has drawn nothing has no text: the shared prompt is never ended this way.
        let is_open = |state: &&mut Choice| state.finish.is_none() && state.num_output > 0;
        let Some(state) = request.choices.get_mut(choice as usize).filter(is_open) else { return };
        let reason = FinishReason::Stop(None);
        state.finish = Some(reason);
        request.outlet.push(Event::Finished { choice, reason });
        let key = request.key(choice);
        self.scheduler.remove(&key);
        self.touched.push(serial);
        self.complete_if_finished(serial);
    }

    /// Brings the answers of a step to their requests.
    fn account(&mut self, schedule: &Schedule, targets: Vec<RowTarget>, output: StepOutput) {
        self.fail_bad_rows(schedule, &targets, &output);
        for (key, planned) in schedule.keys.iter().zip(&schedule.plan.sequences) {
            // Failed requests are gone by now.
            if let Some(request) = self.requests.get_mut(&key.serial) {
                self.scheduler.commit(key, planned.token_ids.len());
                request.reach(planned.context_len as usize + planned.token_ids.len());
                self.touched.push(key.serial);
            }
        }
        let mut draws = Vec::new();
        for (target, answer) in targets.into_iter().zip(output.rows) {
            let Ok(answer) = answer else { continue };
            match target {
                RowTarget::Score { planned } => self.score(&schedule.keys[planned], answer),
                RowTarget::Draw { planned, choice } => draws.push((schedule.keys[planned], choice, answer)),
            }
        }
        // Scores are complete now, and tokens come after them.
        schedule.keys.iter().for_each(|key| self.start_choices(key));
        for (key, choice, answer) in draws {
            self.take_token(&SequenceKey { choice, ..key }, answer, schedule.plan.step);
        }
        schedule.keys.iter().for_each(|key| self.complete_if_finished(key.serial));
    }

    /// A row from which nothing could be drawn ends its request, and its request only.
    fn fail_bad_rows(&mut self, schedule: &Schedule, targets: &[RowTarget], output: &StepOutput) {
        let vocab_size = self.shared.config.vocab_size;
        for (target, answer) in targets.iter().zip(&output.rows) {
            let (RowTarget::Score { planned } | RowTarget::Draw { planned, .. }) = *target;
            // What ended before its step was over is of no interest.
            if self.scheduler.get(&schedule.keys[planned]).is_none() {
                continue;
            }
            let error = match answer {
                Ok(answer) if (answer.token as usize) < vocab_size => continue,
                Ok(_) => RowError::OutsideVocabulary,
                Err(error) => *error,
            };
            self.fail(schedule.keys[planned].serial, error.into());
        }
    }

    fn score(&mut self, key: &SequenceKey, answer: SampledToken) {
        let Some(request) = self.requests.get_mut(&key.serial) else { return };
        let Some(scores) = &mut request.prompt_logprobs else { return };
        scores.push(answer.logprobs);
        let num_scored = scores.len();
        if let Some(sequence) = self.scheduler.get_mut(key) {
            sequence.num_scored = Some(num_scored);
        }
    }

    /// When the prompt has just been computed: says so, and forks its further choices.
    fn start_choices(&mut self, key: &SequenceKey) {
        let Some(request) = self.requests.get_mut(&key.serial) else { return };
        let Some(sequence) = self.scheduler.get(key) else { return };
        if request.prompt_computed.is_some() || sequence.context_len < request.prompt_len {
            return;
        }
        let now = self.shared.environment.clock.now();
        self.recorder.prompt_computed(request, now);
        request.prompt_computed = Some(now);
        request.outlet.push(Event::Started {
            cached_tokens: sequence.cached_tokens.unwrap_or(0),
            prompt_logprobs: request.prompt_logprobs.take(),
        });
        if sequence.samples() {
            (1..request.params.n).for_each(|choice| self.scheduler.fork(key, choice));
            return;
        }
        for (choice, state) in request.choices.iter_mut().enumerate() {
            state.finish = Some(FinishReason::Length);
            request.outlet.push(Event::Finished { choice: choice as u32, reason: FinishReason::Length });
        }
    }

    fn take_token(&mut self, key: &SequenceKey, answer: SampledToken, step: u64) {
        let Some(request) = self.requests.get_mut(&key.serial) else { return };
        let Some(sequence) = self.scheduler.get_mut(key) else { return };
        let SampledToken { token, logprobs } = answer;
        let choice = key.choice;
        sequence.tokens.push(token);
        // The next step may draw another already.
        sequence.awaited.take_if(|awaited| awaited.step == step);

        let now = self.shared.environment.clock.now();
        self.recorder.token(request.arrival, !request.has_output(), &request.choices[choice as usize], now);
        request.outlet.push(Event::Token { choice, token, logprobs });
        if let Some(reason) = request.accept(choice, token, now) {
            request.outlet.push(Event::Finished { choice, reason });
            self.scheduler.remove(key);
        }
    }

    fn complete_if_finished(&mut self, serial: u64) {
        if !self.requests.get(&serial).is_some_and(RequestState::is_finished) {
            return;
        }
        let Some(request) = self.requests.remove(&serial) else { return };
        request.keys().for_each(|key| self.scheduler.remove(&key));
        self.recorder.completed(&request, self.shared.environment.clock.now());
        tracing::debug!(id = request.id, "request completed");
        self.departing.push((request.outlet, None));
    }

    fn fail(&mut self, serial: u64, failure: RequestFailure) {
        let Some(request) = self.requests.remove(&serial) else { return };
        request.keys().for_each(|key| self.scheduler.remove_doubtful(&key));
        self.recorder.errored(failure.kind);
        tracing::warn!(id = request.id, kind = ?failure.kind, reason = failure.message, "request failed");
        self.departing.push((request.outlet, Some(failure)));
    }

    /// Stops: every request ends with a retryable failure, every block comes back.
    fn release_all(&mut self) {
        let serials: Vec<u64> = self.requests.keys().copied().collect();
        serials.into_iter().for_each(|serial| self.fail(serial, RequestFailure::stopped()));
        self.pending = None;
        self.publish();
        self.emit();
        // It may wait for its device, which nobody else has to.
        self.executor.abort();
    }

    fn publish(&mut self) {
        let now = self.shared.environment.clock.now();
        self.shared.publish(self.recorder.snapshot(self.requests.len(), &self.scheduler, now));
    }

    /// Sends what the step brought. Never waits: what finds no room stays in its outlet.
    fn emit(&mut self) {
        let _one_wake = self.shared.relay.gather();
        let requests = &mut self.requests;
        // What finds no room is tried again in every step; the reader that makes room wakes the step thread.
        self.touched.retain(|serial| requests.get_mut(serial).is_some_and(|request| !request.outlet.flush()));
        for (mut outlet, failure) in std::mem::take(&mut self.departing) {
            if outlet.flush() || outlet.is_closed() || failure.is_some() {
                outlet.end(failure);
            } else {
                self.departing.push((outlet, failure));
            }
        }
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
