//! One point in time that all waits of an operation share.

use std::time::{Duration, Instant};

/// No wait is longer, whatever the caller asks for: an `Instant` cannot lie arbitrarily far ahead.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// The shortest timeout that a socket takes for one: zero would mean to wait forever.
const SHORTEST: Duration = Duration::from_micros(1);

/// When an operation has to be over.
#[derive(Clone, Copy)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout.min(LONGEST))
    }

    /// What a socket may still wait, or `None` when the deadline has passed.
    pub(crate) fn remaining(self) -> Option<Duration> {
        let remaining = self.0.saturating_duration_since(Instant::now());
        (remaining >= SHORTEST).then_some(remaining)
    }
}

/// `timeout` as a socket takes it.
pub(crate) fn socket_timeout(timeout: Duration) -> Duration {
    timeout.clamp(SHORTEST, LONGEST)
}
