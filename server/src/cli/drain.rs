//! The end of a server: what happens from the first signal to the exit.
//!
//! ```text
//! SIGTERM ─▶ not ready ─ 5 s, still accepting ─▶ new requests refused ─ until idle or the time-out ─▶ streams cut ─▶ exit
//! ```
//! Idle at SIGTERM, or SIGINT: exit at once. A second signal ends whatever wait is on. The router in front needs the
//! five seconds to notice; a request it sends meanwhile is answered like any other.

use std::io;
use std::time::Duration;

use tandem_engine::EngineHandle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::lifecycle::{Lifecycle, Phase};

/// How long requests are still accepted after SIGTERM.
const ACCEPT_MORE: Duration = Duration::from_secs(5);
/// How long the last bytes may take to leave once nothing runs.
pub(super) const FLUSH: Duration = Duration::from_secs(2);
/// How often idleness is looked for.
const POLL: Duration = Duration::from_millis(20);

/// Both signals that end a server; caught from the moment this exists.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// Which signal came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    Terminate,
    Interrupt,
}

impl Signals {
    /// Catches the signals; needs a runtime.
    pub(super) fn install() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next signal.
    pub(super) async fn next(&mut self) -> Cause {
        tokio::select! {
            _ = self.terminate.recv() => Cause::Terminate,
            _ = self.interrupt.recv() => Cause::Interrupt,
        }
    }
}

/// What is to be drained.
pub(super) struct Draining {
    pub(super) lifecycle: Lifecycle,
    pub(super) engine: EngineHandle,
    /// Tells the listeners to stop.
    pub(super) stop: watch::Sender<bool>,
    /// The listeners.
    pub(super) http: JoinHandle<io::Result<()>>,
    /// How long running requests may take.
    pub(super) limit: Duration,
}

impl Draining {
    /// Drains after SIGTERM; returns when the process may exit.
    pub(super) async fn run(self, signals: &mut Signals) {
        self.lifecycle.set_with_reason(Phase::Draining, "shutting down");
        if self.is_idle() {
            tracing::info!("idle, exiting");
            return;
        }
        tracing::info!(in_flight = self.lifecycle.in_flight(), "draining");
        let finished = tokio::select! {
            finished = self.wait() => finished,
            _ = signals.next() => false,
        };
        if !finished {
            tracing::warn!(in_flight = self.lifecycle.in_flight(), "requests are cut short");
        }
        self.finish(signals).await;
    }

    /// After the engine has failed: what ran has its errors, which still have to leave. Returns when the process may
    /// exit.
    pub(super) async fn fail(self, signals: &mut Signals) {
        self.lifecycle.set_with_reason(Phase::Failed, "the engine stopped");
        self.finish(signals).await;
    }

    /// Whether everything ended in time.
    async fn wait(&self) -> bool {
        // Who grants less for all of it wants no more of this either.
        sleep(ACCEPT_MORE.min(self.limit)).await;
        self.engine.begin_drain();
        let idle = async {
            while !self.is_idle() {
                sleep(POLL).await;
            }
        };
        timeout(self.limit, idle).await.is_ok()
    }

    /// Ends what still runs with a typed error, lets the bytes leave, and closes the listeners.
    async fn finish(self, signals: &mut Signals) {
        let engine = self.engine;
        // It waits for the present step, so it has a thread of its own; the process may exit under it.
        let shutdown = tokio::task::spawn_blocking(move || engine.shutdown());
        // The receiver is gone only if the listeners are.
        let _ = self.stop.send(true);
        let closed = async {
            let _ = shutdown.await;
            let _ = self.http.await;
        };
        tokio::select! {
            _ = timeout(FLUSH, closed) => {}
            _ = signals.next() => {}
        }
    }

    fn is_idle(&self) -> bool {
        self.lifecycle.in_flight() == 0 && self.engine.snapshot().in_flight == 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use tandem_engine::{
        EngineConfig, EngineState, Executor, ExecutorError, SampleRow, StepOutput, StepPlan,
    };

    use super::*;

    /// Never asked to compute.
    struct Unused;

    impl Executor for Unused {
        fn run(&mut self, _: &StepPlan, _: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
            unreachable!("no request was made")
        }

        fn abort(&mut self) {}

        fn poison_blocks(&mut self, _: &[u32]) {}
    }

    #[tokio::test]
    async fn after_a_failure_the_last_bytes_may_leave() {
        let lifecycle = Lifecycle::new();
        let (stop, mut stopped) = watch::channel(false);
        let (phase, left) = (lifecycle.clone(), Arc::new(AtomicBool::new(false)));
        let all_left = left.clone();
        let http = tokio::spawn(async move {
            stopped.wait_for(|stop| *stop).await.expect("the sender lives until all is closed");
            assert_eq!(phase.phase(), Phase::Failed, "requests are refused before the listeners close");
            sleep(Duration::from_millis(50)).await;
            all_left.store(true, Ordering::SeqCst);
            Ok(())
        });
        let config =
            EngineConfig { vocab_size: 8, max_model_len: 16, num_blocks: 4, ..EngineConfig::default() };
        let engine = tandem_engine::spawn(Box::new(Unused), config);
        let draining = Draining { lifecycle, engine: engine.clone(), stop, http, limit: Duration::ZERO };
        draining.fail(&mut Signals::install().unwrap()).await;
        assert!(left.load(Ordering::SeqCst));
        assert_eq!(engine.state(), EngineState::Stopped);
    }
}
