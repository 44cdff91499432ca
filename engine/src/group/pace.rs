//! How long a step may take, from how long steps took.

use std::time::Duration;

/// The least, and the most: a step thread that does not come back for two minutes counts as dead to Kubernetes, which would take the
/// leader away with the rank that hangs.
const MIN_DEADLINE: Duration = Duration::from_secs(10);
const MAX_DEADLINE: Duration = Duration::from_secs(100);
/// A step may take this many times what one like it took.
const FACTOR: u32 = 10;
/// From so many tokens on, a step's time may grow with them; one of fewer takes at most so many times what one token takes, which
/// the factor covers.
const MANY_TOKENS: usize = 8;

/// How long steps take, as far as is known: the slowest recent times, forgotten slowly.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Of a step of few tokens.
    per_step: Option<Duration>,
    /// Of a token in a step of many.
    per_token: Option<Duration>,
}

impl Pace {
    /// A step was done.
    pub(crate) fn note(&mut self, num_tokens: usize, took: Duration) {
        let (known, now) = match num_tokens < MANY_TOKENS {
            true => (&mut self.per_step, took),
            false => (&mut self.per_token, took / num_tokens as u32),
        };
        let before = known.unwrap_or_default();
        *known = Some(now.max(before - before / 64));
    }

    /// A step was given up after it had waited this long: the next like it may take twice as long, for perhaps it was only slow.
    pub(crate) fn overdue(&mut self, num_tokens: usize, waited: Duration) {
        self.note(num_tokens, 2 * waited / FACTOR);
    }

    /// How long a step may take. The first of its kind finds cold caches and nothing to go by.
    pub(crate) fn deadline(&self, num_tokens: usize) -> Duration {
        let expected = match num_tokens < MANY_TOKENS {
            true => self.per_step,
            false => self.per_token.map(|time| time * num_tokens as u32 + self.per_step.unwrap_or_default()),
        };
        expected.map_or(MAX_DEADLINE, |time| (FACTOR * time).clamp(MIN_DEADLINE, MAX_DEADLINE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_step_has_ten_times_its_time_within_bounds() {
        let mut pace = Pace::default();
        assert_eq!((pace.deadline(1), pace.deadline(512)), (MAX_DEADLINE, MAX_DEADLINE));
        pace.note(1, ms(100));
        assert_eq!((pace.deadline(1), pace.deadline(7)), (MIN_DEADLINE, MIN_DEADLINE));
        pace.note(7, ms(3000));
        assert_eq!((pace.deadline(2), pace.deadline(8)), (ms(30_000), MAX_DEADLINE));
        pace.note(100, ms(400));
        assert_eq!(
            pace.deadline(1000),
            ms(70_000),
            "a step of few tokens says nothing of many but what it takes itself"
        );
        (0..1000).for_each(|_| pace.note(1, ms(1)));
        assert_eq!((pace.deadline(2), pace.deadline(1000)), (MIN_DEADLINE, ms(40_010)));
        pace.note(1, ms(60_000));
        assert_eq!(pace.deadline(1), MAX_DEADLINE);
    }

    #[test]
    fn a_step_that_was_given_up_may_take_twice_as_long_the_next_time() {
        let mut pace = Pace::default();
        pace.note(1, ms(1));
        pace.note(100, ms(100));
        for (num_tokens, waited) in [(1, ms(10_000)), (100, ms(12_000))] {
            pace.overdue(num_tokens, waited);
            let deadline = pace.deadline(num_tokens);
            assert!(deadline >= 2 * waited && deadline < 5 * waited, "{deadline:?}");
        }
    }
}
