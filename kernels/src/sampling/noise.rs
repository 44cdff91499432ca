//! Gumbel noise from a counter-based generator: stateless, so a stream can resume anywhere, and any one value can be
//! computed alone.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with key = seed and counter =
//! (token id / 4, position, choice, 0) yields the 32 random bits of four tokens. Their upper 23 bits r give
//! u = (r + ½) / 2²³ in (0, 1), exact in f32, and the noise −ln(−ln u). The logarithm gives the same bits on every ISA.

use super::SPAN;
use crate::cpu::Cpu;
use crate::cpu::math::ln;
use crate::cpu::simd::{Kernel, Scalar, Simd, dispatch};

/// What the noise of a row depends on, besides the token id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseKey {
    pub seed: u64,
    /// Position of the token being drawn.
    pub position: u32,
    /// Which of the `n` choices of a request.
    pub choice: u32,
}

/// The noise of one token.
pub fn gumbel(key: NoiseKey, token: u32) -> f32 {
    let mut counters = [0; 16];
    counters[0] = token / 4;
    let bits = philox(key, counters);
    let mut lanes = [0; 16];
    lanes[0] = bits[(token % 4) as usize][0].cast_signed();
    // SAFETY: the scalar vector has no needs, and the kernel reads and writes its own arrays.
    unsafe { noise(Scalar, lanes)[0] }
}

/// The token with the largest `logit / temperature + gumbel(key, token)`: a draw from softmax(logits / temperature). Ties
/// go to the lowest id; `None` if a logit is NaN or +∞ or none is finite.
///
/// # Panics
/// If `temperature` is not positive.
pub fn gumbel_argmax(cpu: &Cpu, row: &[f32], temperature: f32, key: NoiseKey) -> Option<u32> {
    assert!(temperature > 0.0, "temperature {temperature}");
    super::argmax(cpu, row)?;
    let mut noisy = [0.0; SPAN];
    let mut best = (0, f32::NEG_INFINITY);
    for (index, span) in row.chunks(SPAN).enumerate() {
        let first = index * SPAN;
        let noisy = &mut noisy[..span.len()];
        let kernel =
            AddNoise { row: span, first_token: first as u32, inverse: 1.0 / temperature, key, out: noisy };
        // SAFETY: the kernel reads and writes its own slices.
        unsafe { dispatch(cpu.detected(), kernel) };
        if let Some((token, value)) = super::argmax(cpu, noisy)
            && value > best.1
        {
            best = (first + token as usize, value);
        }
    }
    best.1.is_finite().then_some(best.0 as u32)
}

struct AddNoise<'a> {
    row: &'a [f32],
    /// A multiple of 4.
    first_token: u32,
    inverse: f32,
    key: NoiseKey,
    out: &'a mut [f32],
}

impl Kernel for AddNoise<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for start in (0..self.row.len()).step_by(64) {
            let first = (self.first_token + start as u32) / 4;
            let words = philox(self.key, std::array::from_fn(|lane| first + lane as u32));
            let mut by_token = [0i32; 64];
            for lane in 0..16 {
                for word in 0..4 {
                    by_token[lane * 4 + word] = words[word][lane].cast_signed();
                }
            }
            for (part, bits) in by_token.as_chunks::<16>().0.iter().enumerate() {
                let at = start + part * 16;
                let n = self.row.len().saturating_sub(at).min(16);
                if n == 0 {
                    return;
                }
                let g = gumbel_of(s, s.load_i(bits.as_ptr().cast()));
                let x = s.mul(s.load_n(self.row.as_ptr().add(at), n), s.splat(self.inverse));
                s.store_n(self.out.as_mut_ptr().add(at), n, s.add(x, g));
            }
        }
    }
}

#[inline(always)]
unsafe fn noise<S: Simd>(s: S, bits: [i32; 16]) -> [f32; 16] {
    let mut out = [0.0; 16];
    s.store(out.as_mut_ptr(), gumbel_of(s, s.load_i(bits.as_ptr().cast())));
    out
}

/// −ln(−ln u) of random bits.
#[inline(always)]
unsafe fn gumbel_of<S: Simd>(s: S, bits: S::I) -> S::F {
    let u = s.mul(s.add(s.to_f(s.shr::<9>(bits)), s.splat(0.5)), s.splat(1.0 / (1 << 23) as f32));
    let zero = s.splat(0.0);
    let exponential = s.sub(zero, ln(s, u));
    s.sub(zero, ln(s, exponential))
}

/// Ten rounds for 16 counters; plain loops over lanes, which the compiler turns into vectors of the ISA around it.
#[inline(always)]
fn philox(key: NoiseKey, counters: [u32; 16]) -> [[u32; 16]; 4] {
    const MULTIPLIERS: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    let mut x = [counters, [key.position; 16], [key.choice; 16], [0; 16]];
    let mut k = [key.seed as u32, (key.seed >> 32) as u32];
    for _ in 0..10 {
        let mut next = [[0; 16]; 4];
        for lane in 0..16 {
            let a = MULTIPLIERS[0] * u64::from(x[0][lane]);
            let b = MULTIPLIERS[1] * u64::from(x[2][lane]);
            next[0][lane] = (b >> 32) as u32 ^ x[1][lane] ^ k[0];
            next[1][lane] = b as u32;
            next[2][lane] = (a >> 32) as u32 ^ x[3][lane] ^ k[1];
            next[3][lane] = a as u32;
        }
        x = next;
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Random, backends};

    /// Known answers of the reference implementation (Random123, kat_vectors): all-zero and the digits of pi.
    #[test]
    fn philox_matches_the_published_vectors() {
        let zero = philox(NoiseKey { seed: 0, position: 0, choice: 0 }, [0; 16]);
        assert_eq!(zero.map(|word| word[3]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    }

    #[test]
    fn one_value_alone_equals_its_place_in_a_row() {
        let mut random = Random::new(8);
        let key = NoiseKey { seed: 0x1234_5678_9abc_def0, position: 77, choice: 3 };
        for len in [1, 3, 15, 64, 65, 130, 4097] {
            let row: Vec<f32> = random.vec(len);
            for cpu in backends(1) {
                let mut out = vec![0.0; len];
                let kernel = AddNoise { row: &row, first_token: 8192, inverse: 1.0, key, out: &mut out };
                // SAFETY: slices of equal length.
                unsafe { dispatch(cpu.detected(), kernel) };
                for (i, out) in out.iter().enumerate() {
                    assert_eq!(*out, row[i] + gumbel(key, 8192 + i as u32), "{} {i}", cpu.isa());
                }
            }
        }
    }

    #[test]
    fn noise_has_the_gumbel_distribution() {
        let n = 100_000u32;
        let values: Vec<f64> = (0..n)
            .map(|i| f64::from(gumbel(NoiseKey { seed: 9, position: i / 1000, choice: 0 }, i % 1000)))
            .collect();
        let mean = values.iter().sum::<f64>() / f64::from(n);
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n);
        // Euler's constant and π²/6; five standard errors.
        assert!((mean - 0.577_2).abs() < 5.0 * 1.283 / f64::from(n).sqrt(), "mean {mean}");
        assert!((variance - 1.644_9).abs() < 0.05, "variance {variance}");
        assert!(values.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn draws_follow_the_softmax_and_agree_between_isas() {
        let row = [0.0, 1.0, f32::NEG_INFINITY, 2.0, 0.5];
        let weights: Vec<f64> = row.iter().map(|&x| f64::from(x / 0.7).exp()).collect();
        let total: f64 = weights.iter().sum();
        let draws = 20_000u32;
        let mut expected = None;
        for cpu in backends(1) {
            let mut counts = [0u32; 5];
            for position in 0..draws {
                let key = NoiseKey { seed: 5, position, choice: 1 };
                counts[gumbel_argmax(&cpu, &row, 0.7, key).unwrap() as usize] += 1;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                let p = weight / total;
                let error = (f64::from(*count) / f64::from(draws) - p).abs();
                assert!(error <= 5.0 * (p * (1.0 - p) / f64::from(draws)).sqrt(), "{counts:?}");
            }
            assert_eq!(*expected.get_or_insert(counts), counts);
        }
    }

    #[test]
    fn bad_rows_are_not_sampled() {
        let key = NoiseKey { seed: 1, position: 2, choice: 0 };
        for cpu in backends(1) {
            for bad in [[f32::NAN, 1.0], [f32::INFINITY, 1.0], [f32::NEG_INFINITY; 2]] {
                assert_eq!(gumbel_argmax(&cpu, &bad, 1.0, key), None);
            }
        }
    }
}
