//! Rotary position embedding: which angle per position each pair of a head turns by.
//!
//! The numbers are those of transformers (`modeling_rope_utils.py`), computed in `f32` and in its order of
//! operations, because reference outputs were made with them. How the angles are applied to queries and keys belongs
//! to the kernels.

/// RoPE of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f32,
    /// How many leading dimensions of a head turn; even, at most the head dim.
    pub rotary_dim: usize,
    /// How the series is stretched for contexts longer than the one the base model was trained on.
    pub scaling: RopeScaling,
}

/// Stretching of the RoPE frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// The plain series.
    Default,
    /// Every frequency divided by `factor` (position interpolation).
    Linear {
        /// Divisor of every frequency.
        factor: f32,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth passage between.
    Llama3 {
        /// Divisor of the lowest frequencies.
        factor: f32,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched in full.
        low_freq_factor: f32,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context length before stretching, in tokens.
        original_max_position_embeddings: usize,
    },
    /// One divisor per frequency, `rotary_dim / 2` of them: a GGUF file's `rope_freqs.weight`.
    Factors(Vec<f32>),
}

impl RopeConfig {
    /// Radians per position for each of the `rotary_dim / 2` pairs; pair `i` couples the dimensions `i` and
    /// `i + rotary_dim / 2` of a head in natural row order.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let mut frequencies = self.plain_frequencies();
        match &self.scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => {
                frequencies.iter_mut().for_each(|frequency| *frequency /= factor);
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = *original_max_position_embeddings as f32;
                for frequency in &mut frequencies {
                    *frequency = llama3(*frequency, *factor, *low_freq_factor, *high_freq_factor, context);
                }
            }
            RopeScaling::Factors(factors) => {
                for (frequency, factor) in frequencies.iter_mut().zip(factors) {
                    *frequency /= factor;
                }
            }
        }
        frequencies
    }

    fn plain_frequencies(&self) -> Vec<f32> {
        let dim = self.rotary_dim as f32;
        (0..self.rotary_dim / 2).map(|pair| 1.0 / self.theta.powf((2 * pair) as f32 / dim)).collect()
    }
}

/// `scalar / tensor` in torch is the reciprocal times the scalar, hence the two quotients written as products.
fn llama3(frequency: f32, factor: f32, low_freq_factor: f32, high_freq_factor: f32, context: f32) -> f32 {
    let wavelength = (1.0 / frequency) * (2.0 * std::f64::consts::PI) as f32;
    if wavelength < context / high_freq_factor {
        return frequency;
    }
    if wavelength > context / low_freq_factor {
        return frequency / factor;
    }
    let smooth = ((1.0 / wavelength) * context - low_freq_factor) / (high_freq_factor - low_freq_factor);
    (1.0 - smooth) * frequency / factor + smooth * frequency
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f32, rotary_dim: usize, scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta, rotary_dim, scaling }
    }

    fn assert_close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (pair, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs() / expected;
            assert!(error < 5e-7, "pair {pair}: {found} is not {expected}");
        }
    }

    fn plain(theta: f64, dim: usize) -> Vec<f64> {
        (0..dim / 2).map(|pair| theta.powf(-(2.0 * pair as f64) / dim as f64)).collect()
    }

    #[test]
    fn default_is_the_geometric_series() {
        let found = rope(10_000.0, 8, RopeScaling::Default).inverse_frequencies();
        assert_close(&found, &[1.0, 0.1, 0.01, 0.001]);
        let found = rope(100_000.0, 64, RopeScaling::Default).inverse_frequencies();
        assert_close(&found, &plain(100_000.0, 64));
    }

    #[test]
    fn linear_divides_every_frequency() {
        let found = rope(10_000.0, 8, RopeScaling::Linear { factor: 4.0 }).inverse_frequencies();
        assert_close(&found, &[0.25, 0.025, 0.0025, 0.00025]);
    }

    #[test]
    fn llama3_keeps_short_waves_and_divides_long_ones() {
        // Llama 3.1 8B: theta 500,000, head dim 128, factor 8, 1 and 4, trained on 8,192 tokens.
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let found = rope(500_000.0, 128, scaling).inverse_frequencies();
        let expected: Vec<f64> = plain(500_000.0, 128)
            .into_iter()
            .map(|frequency| {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                let smooth = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
                (1.0 - smooth) * frequency / 8.0 + smooth * frequency
            })
            .collect();
        assert_close(&found, &expected);
        // Waves under 2,048 tokens are kept bit for bit, those over 8,192 divided, and some lie between.
        let plain = rope(500_000.0, 128, RopeScaling::Default).inverse_frequencies();
        let num_kept = plain.iter().zip(&found).filter(|(plain, found)| plain == found).count();
        let num_divided = plain.iter().zip(&found).filter(|(plain, found)| **plain / 8.0 == **found).count();
        assert_eq!((num_kept, num_divided), (29, 29));
    }

    #[test]
    fn factors_divide_one_by_one() {
        let found = rope(10_000.0, 8, RopeScaling::Factors(vec![1.0, 2.0, 4.0, 8.0])).inverse_frequencies();
        assert_close(&found, &[1.0, 0.05, 0.0025, 0.000125]);
    }
}
