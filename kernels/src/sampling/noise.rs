//! Gumbel noise from a counter-based generator: stateless, so a stream can resume anywhere, and any one value can be
//! computed alone.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with key = seed and counter =
//! (token id / 4, position, choice, 0) yields the 32 random bits of four tokens. Their upper 23 bits r give
//! u = (r + ½) / 2²³ in (0, 1), exact in f32, and the noise −ln(−ln u). The logarithm gives the same bits on every ISA.

use super::{Cut, RowOps};
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
    unsafe { Noise(lanes).run(Scalar)[0] }
}

/// A draw from the tokens of a row that a cut keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoisyDraw {
    /// Above 0.
    pub temperature: f32,
    pub key: NoiseKey,
    pub cut: Cut,
}

/// The token with the largest `logit / temperature + gumbel(key, token)` of those that the cut keeps: a draw from
/// softmax(logits / temperature) over them. Ties go to the lowest id. `best` is the row's [`argmax`](super::argmax);
/// `None` if `logit / temperature` overflows.
///
/// Noise is computed only where it can matter: it has a largest value, and most random bits fall short of what a token
/// would need to beat the best one so far.
///
/// # Panics
/// If `temperature` is not positive.
pub fn gumbel_argmax(ops: RowOps, row: &[f32], best: (u32, f32), draw: &NoisyDraw) -> Option<u32> {
    let NoisyDraw { temperature, key, cut } = *draw;
    assert!(temperature > 0.0, "temperature {temperature}");
    let inverse = 1.0 / temperature;
    let (token, logit) = best;
    let leader = Leader::new(token, logit * inverse + gumbel(key, token));
    if !leader.value.is_finite() {
        return None;
    }
    // SAFETY: the kernel reads its own slice.
    let leader = unsafe { dispatch(ops.detected(), NoisyArgmax { ops, row, inverse, key, cut, leader }) };
    Some(leader.token)
}

/// No noise is larger: the largest 23 bits give −ln(−ln(1 − 2⁻²⁴)) = 16.6355.
const MAX_NOISE: f32 = 16.636;

/// The best token so far, and what others need.
#[derive(Clone, Copy)]
struct Leader {
    token: u32,
    value: f32,
    /// A little below `value`: more than all roundings of comparisons with it come to.
    bar: f32,
}

impl Leader {
    fn new(token: u32, value: f32) -> Self {
        Self { token, value, bar: value - (0.01 + value.abs() * (1.0 / (1 << 21) as f32)) }
    }
}

struct NoisyArgmax<'a> {
    ops: RowOps,
    row: &'a [f32],
    inverse: f32,
    key: NoiseKey,
    cut: Cut,
    leader: Leader,
}

impl Kernel for NoisyArgmax<'_> {
    type Output = Leader;

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self, s: S) -> Leader {
        let (blocks, rest) = self.row.as_chunks::<64>();
        let mut last = [f32::NEG_INFINITY; 64];
        last[..rest.len()].copy_from_slice(rest);
        for (index, block) in blocks.iter().chain([&last]).enumerate() {
            self.block(s, index, block);
        }
        self.leader
    }
}

impl NoisyArgmax<'_> {
    /// Looks at tokens `64 · index..64 · (index + 1)`.
    #[inline(always)]
    unsafe fn block<S: Simd>(&mut self, s: S, index: usize, logits: &[f32; 64]) {
        let inverse = s.splat(self.inverse);
        let scaled = |part: usize| s.mul(s.load(logits.as_ptr().add(16 * part)), inverse);
        let x = [scaled(0), scaled(1), scaled(2), scaled(3)];
        let largest = s.max(s.max(x[0], x[1]), s.max(x[2], x[3]));
        // Rounding keeps order: a logit that the cut keeps is not below this when it is scaled.
        let least = (self.leader.bar - MAX_NOISE).max(self.cut.logit * self.inverse);
        if s.less(largest, s.splat(least)) == 0xffff {
            return;
        }
        let bits = philox_of_64(s, self.key, 16 * index as u32);
        for part in 0..4 {
            let candidates = self.candidates(s, x[part], bits[part]);
            if candidates != 0 {
                let mut of_part = [0i32; 16];
                s.store_i(of_part.as_mut_ptr().cast(), bits[part]);
                self.contend(64 * index + 16 * part, candidates, of_part);
            }
        }
    }

    /// Lanes whose noise might be enough, found without a logarithm.
    ///
    /// G > t needs 1 − u < 1 − e^(−e^(−t)) ≤ e^(−t). That power is bounded from above by the number whose exponent and
    /// mantissa are the parts of its binary logarithm before and after the point: 2^f ≤ 1 + f.
    #[inline(always)]
    unsafe fn candidates<S: Simd>(&self, s: S, x: S::F, bits: S::I) -> u32 {
        const PER_NAT: f32 = std::f32::consts::LOG2_E * (1 << 23) as f32;
        const ONE: f32 = (127 << 23) as f32;
        // Above 0 any noise will do; far below, the conversion gives the least integer.
        let distance = s.min(s.sub(x, s.splat(self.leader.bar)), s.splat(0.0));
        let power = s.to_i(s.fma(distance, s.splat(PER_NAT), s.splat(ONE)));
        let flipped = s.shr::<9>(s.xor(bits, s.splat_i(-1)));
        let one_less_u = s.mul(s.add(s.to_f(flipped), s.splat(0.5)), s.splat(1.0 / (1 << 23) as f32));
        !s.less_i(power, s.bits(one_less_u)) & 0xffff
    }

    /// Compares the candidates among 16 tokens from `first` on with the leader. Out of line: there are few in a row.
    #[cold]
    #[inline(never)]
    fn contend(&mut self, first: usize, mut candidates: u32, bits: [i32; 16]) {
        // SAFETY: the kernel reads its own array.
        let noise = unsafe { dispatch(self.ops.detected(), Noise(bits)) };
        while candidates != 0 {
            let lane = candidates.trailing_zeros() as usize;
            candidates &= candidates - 1;
            let token = (first + lane) as u32;
            let logit = self.row[first + lane];
            let value = logit * self.inverse + noise[lane];
            let Leader { token: leading, value: best, .. } = self.leader;
            let wins = value > best || (value == best && token < leading);
            if wins && self.cut.keeps(token, logit) {
                self.leader = Leader::new(token, value);
            }
        }
    }
}

/// The random bits of 64 tokens from counter `first` (token `4 · first`) on, in order.
#[inline(always)]
unsafe fn philox_of_64<S: Simd>(s: S, key: NoiseKey, first: u32) -> [S::I; 4] {
    // Lane 4q + j takes counter 4j + q, so that transposing quads puts the tokens in order.
    const LANES: [u32; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
    let word = |x: u32| s.splat_i(x.cast_signed());
    let counters = s.add_i(s.load_i(LANES.as_ptr().cast()), word(first));
    let mut x = [counters, word(key.position), word(key.choice), word(0)];
    let mut k = [key.seed as u32, (key.seed >> 32) as u32];
    for _ in 0..ROUNDS {
        let (a_low, a_high) = s.mul_wide(x[0], word(MULTIPLIERS[0]));
        let (b_low, b_high) = s.mul_wide(x[2], word(MULTIPLIERS[1]));
        x = [s.xor(s.xor(b_high, x[1]), word(k[0])), b_low, s.xor(s.xor(a_high, x[3]), word(k[1])), a_low];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    s.transpose_quads(x)
}

/// The noise of 16 tokens from their random bits.
struct Noise([i32; 16]);

impl Kernel for Noise {
    type Output = [f32; 16];

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> [f32; 16] {
        let mut out = [0.0; 16];
        s.store(out.as_mut_ptr(), gumbel_of(s, s.load_i(self.0.as_ptr().cast())));
        out
    }
}

/// −ln(−ln u) of random bits.
#[inline(always)]
unsafe fn gumbel_of<S: Simd>(s: S, bits: S::I) -> S::F {
    let u = s.mul(s.add(s.to_f(s.shr::<9>(bits)), s.splat(0.5)), s.splat(1.0 / (1 << 23) as f32));
    let zero = s.splat(0.0);
    let exponential = s.sub(zero, ln(s, u));
    s.sub(zero, ln(s, exponential))
}

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// Ten rounds for 16 counters, in plain loops.
fn philox(key: NoiseKey, counters: [u32; 16]) -> [[u32; 16]; 4] {
    let mut x = [counters, [key.position; 16], [key.choice; 16], [0; 16]];
    let mut k = [key.seed as u32, (key.seed >> 32) as u32];
    for _ in 0..ROUNDS {
        let mut next = [[0; 16]; 4];
        for lane in 0..16 {
            let a = u64::from(MULTIPLIERS[0]) * u64::from(x[0][lane]);
            let b = u64::from(MULTIPLIERS[1]) * u64::from(x[2][lane]);
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

    struct Bits<'a>(NoiseKey, u32, &'a mut [u32; 64]);

    impl Kernel for Bits<'_> {
        type Output = ();

        #[inline(always)]
        unsafe fn run<S: Simd>(self, s: S) {
            for (part, bits) in philox_of_64(s, self.0, self.1).into_iter().enumerate() {
                s.store_i(self.2.as_mut_ptr().add(16 * part).cast(), bits);
            }
        }
    }

    #[test]
    fn bits_of_64_tokens_are_those_of_each_alone() {
        let key = NoiseKey { seed: 0x1234_5678_9abc_def0, position: 77, choice: 3 };
        for cpu in backends(1) {
            for first in [0, 16, 12_272, u32::MAX / 4 - 15] {
                let mut bits = [0; 64];
                // SAFETY: the kernel writes its own array.
                unsafe { dispatch(cpu.detected(), Bits(key, first, &mut bits)) };
                for (token, &bits) in bits.iter().enumerate() {
                    let words = philox(key, [first + token as u32 / 4; 16]);
                    assert_eq!(bits, words[token % 4][0], "{} {first} {token}", cpu.isa());
                }
            }
        }
    }

    /// The largest noise of all 2²³ values of the 23 bits that count, and the smallest.
    struct Extremes;

    impl Kernel for Extremes {
        type Output = (f32, f32);

        #[inline(always)]
        unsafe fn run<S: Simd>(self, s: S) -> (f32, f32) {
            let (mut least, mut most) = (s.splat(f32::INFINITY), s.splat(f32::NEG_INFINITY));
            for r in 0..1 << 23 {
                let g = gumbel_of(s, s.splat_i(r << 9));
                (least, most) = (s.min(least, g), s.max(most, g));
            }
            (-s.reduce_max(s.sub(s.splat(0.0), least)), s.reduce_max(most))
        }
    }

    #[test]
    fn no_noise_is_beyond_the_bounds() {
        for cpu in backends(1) {
            // SAFETY: the kernel touches no memory.
            let (least, most) = unsafe { dispatch(cpu.detected(), Extremes) };
            assert!(most <= MAX_NOISE && most > MAX_NOISE - 0.001, "{most}");
            assert!((-2.812..-2.811).contains(&least), "{least}");
        }
    }

    /// Noise for every token, in order.
    fn plain(row: &[f32], draw: &NoisyDraw) -> Option<u32> {
        let inverse = 1.0 / draw.temperature;
        let mut best = (0, f32::NEG_INFINITY);
        for (token, &logit) in (0..).zip(row) {
            let value = logit * inverse + gumbel(draw.key, token);
            if draw.cut.keeps(token, logit) && value > best.1 {
                best = (token, value);
            }
        }
        best.1.is_finite().then_some(best.0)
    }

    #[test]
    fn draws_are_those_of_noise_for_every_token() {
        let mut random = Random::new(8);
        let mut winners_elsewhere = 0;
        for round in 0..400 {
            let len = [1 + random.below(200), 1000 + random.below(3000)][round % 2];
            // Flat, like a language model's, peaked, and beyond all noise; rounded, so that values are equal.
            let spread = [0.0, 3.0, 12.0, 1000.0, 1e6][random.below(5)];
            let mut row: Vec<f32> = (0..len).map(|_| (random.f32() * spread * 4.0).round() / 4.0).collect();
            for _ in 0..random.below(len + 1) {
                row[random.below(len)] = [f32::NEG_INFINITY, 0.0, -0.0, -3e38][random.below(4)];
            }
            let key = NoiseKey { seed: random.next(), position: round as u32, choice: 1 };
            let temperature = [1.0, 0.7, 1.3, 0.001, 100.0][random.below(5)];
            let plain_cut = Cut::none();
            let edge = row[random.below(len)];
            let some_cut = Cut { logit: edge, last: random.below(len) as u32 };
            for cpu in backends(1) {
                let Some(best) = super::super::argmax((&cpu).into(), &row) else { continue };
                for cut in [plain_cut, some_cut] {
                    // A cut keeps the best token.
                    if !cut.keeps(best.0, best.1) {
                        continue;
                    }
                    let draw = NoisyDraw { temperature, key, cut };
                    let expected = plain(&row, &draw);
                    assert!(expected.is_some());
                    assert_eq!(
                        gumbel_argmax((&cpu).into(), &row, best, &draw),
                        expected,
                        "{} {round}",
                        cpu.isa()
                    );
                    winners_elsewhere += u32::from(expected != Some(best.0));
                }
            }
        }
        assert!(winners_elsewhere > 400, "{winners_elsewhere}");
    }

    #[test]
    fn equal_values_go_to_the_lowest_id() {
        // A spacing of logits so wide that noise is rounded away.
        for cpu in backends(1) {
            let mut row = [0.0; 300];
            (row[290], row[100], row[101]) = (1e9, 1e9, 1e9);
            let key = NoiseKey { seed: 3, position: 1, choice: 0 };
            let draw = NoisyDraw { temperature: 1.0, key, cut: Cut::none() };
            for best in [100, 101, 290] {
                assert_eq!(gumbel_argmax((&cpu).into(), &row, (best, 1e9), &draw), Some(100));
            }
            row[7] = 3e38;
            let hot = NoisyDraw { temperature: 0.5, ..draw };
            assert_eq!(gumbel_argmax((&cpu).into(), &row, (7, 3e38), &hot), None);
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
                let draw = NoisyDraw { temperature: 0.7, key, cut: Cut::none() };
                counts[gumbel_argmax((&cpu).into(), &row, (3, 2.0), &draw).unwrap() as usize] += 1;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                let p = weight / total;
                let error = (f64::from(*count) / f64::from(draws) - p).abs();
                assert!(error <= 5.0 * (p * (1.0 - p) / f64::from(draws)).sqrt(), "{counts:?}");
            }
            assert_eq!(*expected.get_or_insert(counts), counts);
        }
    }
}
