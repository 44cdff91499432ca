//! Times of many requests in few numbers.

use std::time::Duration;

use serde::Serialize;

/// Mean and percentiles in milliseconds, by nearest rank; 0 where nothing was measured.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
}

impl Summary {
    pub(super) fn of(mut times: Vec<Duration>) -> Self {
        if times.is_empty() {
            return Self::default();
        }
        times.sort_unstable();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let at = |percent: usize| ms(times[(times.len() * percent).div_ceil(100).max(1) - 1]);
        let mean = ms(times.iter().sum()) / times.len() as f64;
        Self { mean, p50: at(50), p90: at(90), p95: at(95), p99: at(99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let hundred = Summary::of((1..=100).rev().map(Duration::from_millis).collect());
        assert_eq!(hundred, Summary { mean: 50.5, p50: 50.0, p90: 90.0, p95: 95.0, p99: 99.0 });
        let few = Summary::of([3, 1, 2].map(Duration::from_millis).to_vec());
        assert_eq!(few, Summary { mean: 2.0, p50: 2.0, p90: 3.0, p95: 3.0, p99: 3.0 });
        assert_eq!(Summary::of(Vec::new()), Summary::default());
    }
}
