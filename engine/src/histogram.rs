//! Fixed-bucket histograms, with the bucket bounds that vLLM's dashboards expect.

/// Time to first token, seconds.
pub(crate) const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Gaps between tokens, time per output token, and single steps, seconds.
pub(crate) const PER_TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Whole requests and their phases, seconds.
pub(crate) const PER_REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// Tokens computed in one step.
pub(crate) const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
/// Choices of one request.
pub(crate) const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
/// The 1-2-5 series; cut at the model's length by [`up_to`].
const ONE_TWO_FIVE: &[f64] = &[
    1.0, 2.0, 5.0, 1e1, 2e1, 5e1, 1e2, 2e2, 5e2, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6,
    1e7,
];

/// Bounds of the 1-2-5 series that do not exceed `max`, at least one.
pub(crate) fn up_to(max: usize) -> &'static [f64] {
    let len = ONE_TWO_FIVE.partition_point(|bound| *bound <= max as f64);
    &ONE_TWO_FIVE[..len.max(1)]
}

/// Observations by bucket.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    /// Upper bounds (inclusive), ascending; +Inf is not among them.
    pub bounds: &'static [f64],
    /// Observations per bucket, not cumulative; one more than `bounds`, the last is +Inf.
    pub counts: Vec<u64>,
    /// Sum of all observations.
    pub sum: f64,
}

impl Histogram {
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    pub(crate) fn observe(&mut self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket] += 1;
        self.sum += value;
    }

    /// Observations in all.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_on_a_bound_belongs_to_it() {
        let mut histogram = Histogram::new(CHOICES);
        [1.0, 2.0, 2.5, 20.0, 21.0].into_iter().for_each(|value| histogram.observe(value));
        assert_eq!(histogram.counts, [1, 1, 1, 0, 1, 1]);
        assert_eq!((histogram.count(), histogram.sum), (5, 46.5));
    }

    #[test]
    fn bounds_ascend_and_the_series_is_cut_at_the_models_length() {
        for bounds in [FIRST_TOKEN, PER_TOKEN, PER_REQUEST, STEP_TOKENS, CHOICES, ONE_TWO_FIVE] {
            assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]));
        }
        assert_eq!(up_to(8192).last(), Some(&5000.0));
        assert_eq!(up_to(10_000).last(), Some(&10_000.0));
        assert_eq!(up_to(0), [1.0]);
    }
}
