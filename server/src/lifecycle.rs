//! Where the process stands between start and exit, and how many requests are inside it.
//!
//! `serve` sets the phase, probes and the drain read it. A request counts from its admission until the last byte of
//! its answer was handed over, so a drain that waits for zero loses nothing.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Weights are being read.
    Loading,
    /// Requests are answered.
    Ready,
    /// Asked to stop: what runs is finished, new work is refused soon.
    Draining,
    /// Loading failed or the engine has stopped; the process is about to exit.
    Failed,
}

/// The shared state. Clones are the same state.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    phase: Mutex<(Phase, Option<String>)>,
    in_flight: AtomicUsize,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self::new()
    }
}

impl Lifecycle {
    /// Starts in [`Phase::Loading`].
    pub fn new() -> Self {
        let phase = Mutex::new((Phase::Loading, None));
        Self { state: Arc::new(State { phase, in_flight: AtomicUsize::new(0) }) }
    }

    /// The present phase.
    pub fn phase(&self) -> Phase {
        self.lock().0
    }

    /// Why the phase is what it is, for `/readyz`; safe to show.
    pub fn reason(&self) -> Option<String> {
        self.lock().1.clone()
    }

    /// Goes to a phase.
    pub fn set(&self, phase: Phase) {
        *self.lock() = (phase, None);
    }

    /// Goes to a phase and says why.
    pub fn set_with_reason(&self, phase: Phase, reason: impl Into<String>) {
        *self.lock() = (phase, Some(reason.into()));
    }

    /// Counts a request until the guard is dropped; move it into the answer's body.
    pub fn request_started(&self) -> InFlight {
        self.state.in_flight.fetch_add(1, Ordering::AcqRel);
        InFlight { state: Arc::clone(&self.state) }
    }

    /// Requests inside the process.
    pub fn in_flight(&self) -> usize {
        self.state.in_flight.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, (Phase, Option<String>)> {
        // Nothing panics while it holds the lock, and a phase is whole at any time.
        self.state.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request inside the process.
#[derive(Debug)]
pub struct InFlight {
    state: Arc<State>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.state.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_requests_until_their_guards_drop() {
        let lifecycle = Lifecycle::new();
        let first = lifecycle.request_started();
        let second = lifecycle.clone().request_started();
        assert_eq!(lifecycle.in_flight(), 2);
        drop(first);
        assert_eq!(lifecycle.in_flight(), 1);
        drop(second);
        assert_eq!(lifecycle.in_flight(), 0);
    }

    #[test]
    fn a_new_phase_forgets_the_old_reason() {
        let lifecycle = Lifecycle::new();
        assert_eq!(lifecycle.phase(), Phase::Loading);
        lifecycle.set_with_reason(Phase::Failed, "weights");
        assert_eq!(lifecycle.reason().as_deref(), Some("weights"));
        lifecycle.set(Phase::Ready);
        assert_eq!((lifecycle.phase(), lifecycle.reason()), (Phase::Ready, None));
    }
}
