//! One point in time that all waits of an operation share.

use std::time::{Duration, Instant};

/// No wait is longer, whatever the caller asks for: an `Instant` cannot lie arbitrarily far ahead.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// When an operation has to be over.
#[derive(Clone, Copy)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout.min(LONGEST))
    }

    /// What is left, or `None` when the deadline has passed.
    pub(crate) fn remaining(self) -> Option<Duration> {
        Some(self.0.saturating_duration_since(Instant::now())).filter(|remaining| !remaining.is_zero())
    }
}

/// `timeout` for a socket: in whole milliseconds, rounded up, and at least one, since zero would mean to wait
/// forever. The kernel counts in ticks that are no finer; and what is left of one timeout is, mostly, the
/// value the socket has.
pub(crate) fn socket_timeout(timeout: Duration) -> Duration {
    let ms = timeout.min(LONGEST).as_nanos().div_ceil(1_000_000).max(1);
    Duration::from_millis(ms as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_passes_and_never_overflows() {
        assert_eq!(Deadline::after(Duration::ZERO).remaining(), None);
        let remaining = Deadline::after(Duration::MAX).remaining().unwrap();
        assert!(remaining <= LONGEST && remaining > LONGEST / 2);
    }

    #[test]
    fn a_socket_waits_whole_milliseconds() {
        let (ns, us, ms) = (Duration::from_nanos, Duration::from_micros, Duration::from_millis);
        for (timeout, expected) in [
            (Duration::ZERO, ms(1)),
            (ns(1), ms(1)),
            (ms(1), ms(1)),
            (us(1001), ms(2)),
            (ms(500) - ns(1), ms(500)),
            (Duration::MAX, LONGEST),
        ] {
            assert_eq!(socket_timeout(timeout), expected, "{timeout:?}");
        }
    }
}
