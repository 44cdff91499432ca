//! The rest of the process's way to the engine: submit, look, drain, stop.
//!
//! Handles and streams hold the sending side of one channel of commands; the step thread holds the receiving
//! side and takes it down with it when it ends. A submission that is still in the channel then, or comes
//! later, is dropped unread, and its drop fails its stream: no order of events leaves a client waiting.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::EngineConfig;
use crate::engine::{Engine, StepStatus};
use crate::environment::Environment;
use crate::error::{RequestFailure, SubmitError};
use crate::executor::Executor;
use crate::relay::{self, Relay};
use crate::request::Request;
use crate::snapshot::Snapshot;
use crate::stream::{Outlet, RequestStream, stream};

/// Starts the step thread. It ends with [`EngineHandle::shutdown`], or when every handle and stream is gone.
///
/// # Panics
/// When the configuration's sizes make no engine, or the thread cannot be started.
pub fn spawn(executor: Box<dyn Executor>, config: EngineConfig) -> EngineHandle {
    spawn_with(executor, config, Environment::system())
}

/// The same with the caller's time and randomness.
///
/// # Panics
/// As [`spawn`].
pub fn spawn_with(
    executor: Box<dyn Executor>,
    config: EngineConfig,
    environment: Environment,
) -> EngineHandle {
    let (engine, handle) = Engine::new(executor, config, environment);
    let thread = std::thread::Builder::new()
        .name("tandem-step".into())
        .spawn(move || drive(engine))
        .expect("the step thread starts");
    *lock(&handle.thread) = Some(thread);
    handle
}

/// Cheap to clone; all clones talk to the same engine.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// Whether the step thread lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineState {
    Running,
    /// Shut down, or its executor said that it cannot go on.
    Stopped,
    /// Panicked.
    Failed,
}

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>, commands: mpsc::Sender<Command>) -> Self {
        Self { shared, commands, thread: Arc::default() }
    }

    /// Takes a request or says why not; never blocks.
    pub fn submit(&self, request: Request) -> Result<RequestStream, SubmitError> {
        // A drain may have ended in a stop; it is the drain that clients shall hear of.
        if self.shared.is_draining() {
            return Err(SubmitError::Draining);
        }
        if self.state() != EngineState::Running {
            return Err(SubmitError::Stopped);
        }
        request.validate(&self.shared.config)?;
        let ticket = Ticket::take(&self.shared, request.held_bytes()).ok_or(SubmitError::QueueFull)?;
        // After the ticket is taken: whoever has stopped admission and then counts finds every request that got in.
        if !self.shared.admits.load(Ordering::SeqCst) {
            return Err(SubmitError::NotReady);
        }

        let seed = request.params.seed.unwrap_or_else(|| self.shared.environment.seeds.draw());
        let serial = self.shared.submitted.fetch_add(1, Ordering::SeqCst);
        let (commands, relay) = (self.commands.clone(), self.shared.relay.clone());
        let (outlet, reader) =
            stream(serial, seed, request.params.n, commands, relay, self.shared.stream_capacity);
        let parts = SubmissionParts { request, serial, seed, outlet, ticket };
        let submission = Submission { parts: Some(Box::new(parts)), shared: self.shared.clone() };
        // The engine may have stopped since: the submission comes back in the error, and its drop fails the
        // stream.
        let _ = self.commands.send(Command::Submit(submission));
        Ok(reader)
    }

    /// Whether a request would be looked at now: the engine runs, is not draining, and its executor is ready
    /// and admits requests. Says nothing of the queue's bounds.
    pub fn is_accepting(&self) -> bool {
        !self.shared.is_draining()
            && self.state() == EngineState::Running
            && self.shared.admits.load(Ordering::SeqCst)
    }

    /// The latest published counts, with requests that have not reached the step thread yet.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        // In this order: every failed submission seen is among the submitted, and so is every received one.
        let failed = self.shared.failed_unreceived.load(Ordering::SeqCst);
        let (published, received) = lock(&self.shared.published).clone();
        let unreceived = self.shared.submitted.load(Ordering::SeqCst) - received;
        if unreceived == 0 { published } else { Arc::new(published.with_unreceived(unreceived, failed)) }
    }

    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// Refuses new requests from now on; those accepted run to their end.
    pub fn begin_drain(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
    }

    /// Fails everything in flight as unavailable, stops the step thread after its current step, and
    /// waits for it.
    pub fn shutdown(&self) {
        let _ = self.commands.send(Command::Shutdown);
        if let Some(thread) = lock(&self.thread).take() {
            // The thread catches its own panics.
            let _ = thread.join();
        }
    }

    /// Carries the wakes of a step's readers over to their runtime, so that the step thread wakes one task and not each.
    /// To be spawned on the runtime that reads the streams; never ends. Streams work without it, too.
    pub fn carry_wakes(&self) -> impl Future<Output = ()> + Send + use<> {
        relay::carry(self.shared.relay.clone())
    }

    /// Time since the step loop last came around. It does so at least ten times a second when idle or waiting
    /// for its executor, and after every step.
    pub fn last_tick_age(&self) -> Duration {
        let last = Duration::from_nanos(self.shared.last_tick_nanos.load(Ordering::Acquire));
        self.shared.since_start().saturating_sub(last)
    }

    pub fn state(&self) -> EngineState {
        match self.shared.state.load(Ordering::SeqCst) {
            STOPPED => EngineState::Stopped,
            FAILED => EngineState::Failed,
            _ => EngineState::Running,
        }
    }
}

/// What the step thread is told.
pub(crate) enum Command {
    Submit(Submission),
    /// The stream was dropped.
    Cancel {
        serial: u64,
    },
    FinishChoice {
        serial: u64,
        choice: u32,
    },
    /// A stream that was full has room.
    Wake,
    Shutdown,
}

/// A request on its way to the step thread. Dropped unread, it fails its stream.
pub(crate) struct Submission {
    parts: Option<Box<SubmissionParts>>,
    shared: Arc<Shared>,
}

pub(crate) struct SubmissionParts {
    pub(crate) request: Request,
    pub(crate) serial: u64,
    pub(crate) seed: u64,
    pub(crate) outlet: Outlet,
    pub(crate) ticket: Ticket,
}

impl Submission {
    pub(crate) fn accept(mut self) -> SubmissionParts {
        *self.parts.take().expect("taken once: `accept` consumes the submission")
    }
}

impl Drop for Submission {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            self.shared.failed_unreceived.fetch_add(1, Ordering::SeqCst);
            parts.outlet.end(Some(RequestFailure::stopped()));
        }
    }
}

/// A request's share of what is bounded: a place in the queue, given back when its first step is scheduled,
/// and a place and bytes in flight, given back at its end.
///
/// The second place is for those that are in flight but do not run. A paused request makes way for newcomers,
/// so slow readers would otherwise gather without end behind an empty queue.
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    bytes: usize,
    is_queued: bool,
}

impl Ticket {
    fn take(shared: &Arc<Shared>, bytes: usize) -> Option<Self> {
        // Taken first and checked after: two submissions at once may both be refused at the brink, never both
        // accepted.
        let queued = shared.queued_requests.fetch_add(1, Ordering::SeqCst) + 1;
        let in_flight = shared.requests_in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        let total_bytes = shared.bytes_in_flight.fetch_add(bytes, Ordering::SeqCst).saturating_add(bytes);
        let ticket = Self { shared: shared.clone(), bytes, is_queued: true };
        let config = &shared.config;
        let fits = queued <= config.max_queued_requests
            && in_flight <= config.max_num_seqs.saturating_add(config.max_queued_requests)
            && total_bytes <= config.max_queued_bytes;
        fits.then_some(ticket)
    }

    /// The request's first step is scheduled.
    pub(crate) fn leave_queue(&mut self) {
        if std::mem::take(&mut self.is_queued) {
            self.shared.queued_requests.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leave_queue();
        self.shared.requests_in_flight.fetch_sub(1, Ordering::SeqCst);
        self.shared.bytes_in_flight.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

const RUNNING: u8 = 0;
const STOPPED: u8 = 1;
const FAILED: u8 = 2;

/// What handles and the step thread both see.
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) environment: Environment,
    /// Step messages that may wait in one stream before its request pauses.
    stream_capacity: usize,
    pub(crate) relay: Arc<Relay>,
    /// The latest snapshot, and how many submissions it has received. Held for a pointer's copy only.
    published: Mutex<(Arc<Snapshot>, u64)>,
    submitted: AtomicU64,
    failed_unreceived: AtomicU64,
    queued_requests: AtomicUsize,
    requests_in_flight: AtomicUsize,
    bytes_in_flight: AtomicUsize,
    draining: AtomicBool,
    /// Whether the executor is ready and takes requests, as the step thread last heard.
    admits: AtomicBool,
    state: AtomicU8,
    start: Instant,
    last_tick_nanos: AtomicU64,
}

impl Shared {
    pub(crate) fn new(config: EngineConfig, environment: Environment, stream_capacity: usize) -> Self {
        let start = environment.clock.now();
        let empty = Arc::new(Snapshot::new(&config));
        Self {
            config,
            environment,
            stream_capacity,
            relay: Arc::default(),
            published: Mutex::new((empty, 0)),
            submitted: AtomicU64::new(0),
            failed_unreceived: AtomicU64::new(0),
            queued_requests: AtomicUsize::new(0),
            requests_in_flight: AtomicUsize::new(0),
            bytes_in_flight: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            admits: AtomicBool::new(true),
            state: AtomicU8::new(RUNNING),
            start,
            last_tick_nanos: AtomicU64::new(0),
        }
    }

    pub(crate) fn publish(&self, snapshot: Snapshot) {
        let received = snapshot.admitted;
        let new = (Arc::new(snapshot), received);
        // The old snapshot is freed after the lock is.
        let _old = std::mem::replace(&mut *lock(&self.published), new);
        self.tick();
    }

    /// A submission that has passed the check already counts as in flight.
    pub(crate) fn set_admits(&self, admits: bool) {
        self.admits.store(admits, Ordering::SeqCst);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Requests that were taken and have not ended, those too that the step thread has not received yet.
    pub(crate) fn requests_in_flight(&self) -> usize {
        self.requests_in_flight.load(Ordering::SeqCst)
    }

    pub(crate) fn tick(&self) {
        self.last_tick_nanos.store(self.since_start().as_nanos() as u64, Ordering::Release);
    }

    fn since_start(&self) -> Duration {
        self.environment.clock.now().saturating_duration_since(self.start)
    }
}

/// The step thread: steps while there is work, waits for commands when there is none, and leaves no stream
/// open.
fn drive(mut engine: Engine) {
    let shared = engine.shared().clone();
    let result = catch_unwind(AssertUnwindSafe(|| {
        loop {
            match engine.step() {
                StepStatus::Worked => {}
                StepStatus::Idle => engine.wait(IDLE_TICK),
                StepStatus::Stopped => break,
            }
        }
    }));
    let (failure, state) = match result {
        Ok(()) => (RequestFailure::stopped(), STOPPED),
        Err(_) => {
            tracing::error!("the step thread panicked");
            (RequestFailure::panicked(), FAILED)
        }
    };
    // The state last: whoever sees it finds every stream ended.
    engine.fail_all(failure);
    shared.state.store(state, Ordering::SeqCst);
}

/// How long the step thread waits for commands before it shows that it lives and asks how its executor is.
const IDLE_TICK: Duration = Duration::from_millis(50);

/// Every critical section is a plain move: a panic elsewhere leaves the value whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
