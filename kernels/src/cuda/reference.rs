//! Plain loops: what the kernels compute, in f64, for comparison only.

use std::sync::LazyLock;

use super::launcher::SampleRow;
use crate::sampling::{NoiseKey, gumbel};

/// RMSNorm of rows of `weight.len()` values.
pub(super) fn rms_norm(hidden: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let size = weight.len();
    let row = |row: &[f64]| -> Vec<f64> {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / size as f64;
        row.iter().zip(weight).map(|(x, w)| x * w / (mean + epsilon).sqrt()).collect()
    };
    hidden.chunks(size).flat_map(row).collect()
}

pub(super) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Rotates the halves of each head of `x`, at a position with these cosines and sines.
pub(super) fn rope(x: &[f64], head_dim: usize, cos: &[f32], sin: &[f32]) -> Vec<f64> {
    let half = head_dim / 2;
    let mut out = x.to_vec();
    for (head, out) in x.chunks(head_dim).zip(out.chunks_mut(head_dim)) {
        for d in 0..half {
            let (c, s) = (f64::from(cos[d]), f64::from(sin[d]));
            out[d] = head[d] * c - head[d + half] * s;
            out[d + half] = head[d + half] * c + head[d] * s;
        }
    }
    out
}

/// The value of an e4m3 by its definition.
pub(super) fn f64_of_fp8(x: u8) -> f64 {
    let sign = if x >> 7 == 1 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(x >> 3 & 15), f64::from(x & 7));
    match (exponent, x & 7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * mantissa / 8.0 * (-6f64).exp2(),
        _ => sign * (1.0 + mantissa / 8.0) * f64::from(exponent - 7).exp2(),
    }
}

/// The nearest e4m3, the even one of two; at most 448.
pub(super) fn fp8_of_f64(x: f64) -> u8 {
    /// Ascending: all that are not negative.
    static MAGNITUDES: LazyLock<[f64; 0x7f]> =
        LazyLock::new(|| std::array::from_fn(|code| f64_of_fp8(code as u8)));
    let above = MAGNITUDES.partition_point(|magnitude| *magnitude < x.abs());
    let distance = |code: usize| (MAGNITUDES[code] - x.abs()).abs();
    let nearest = (above.saturating_sub(1)..=above.min(0x7e))
        .min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))))
        .expect("there are codes");
    nearest as u8 | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// Word `index` of SplitMix64 by counter.
pub(super) fn splitmix(key: u64, index: u64) -> u64 {
    let mut word = key.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Four words of Philox4x32-10.
pub(super) fn philox(key: u64, counter: [u32; 4]) -> [u32; 4] {
    let mut x = counter;
    let mut k = [key as u32, (key >> 32) as u32];
    for _ in 0..10 {
        let a = u64::from(x[0]) * 0xd251_1f53;
        let b = u64::from(x[2]) * 0xcd9e_8d57;
        x = [(b >> 32) as u32 ^ x[1] ^ k[0], b as u32, (a >> 32) as u32 ^ x[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9e37_79b9), k[1].wrapping_add(0xbb67_ae85)];
    }
    x
}

/// x [M,K] · Wᵀ [N,K].
pub(super) fn linear(x: &[f64], weights: &[f64], size: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    x.chunks(size).flat_map(|x| weights.chunks(size).map(move |row| dot(x, row))).collect()
}

/// One query [D] over keys and values [positions][D].
pub(super) fn attention(query: &[f64], keys: &[f64], values: &[f64], scale: f64) -> Vec<f64> {
    let head_dim = query.len();
    let dot = |key: &[f64]| -> f64 { key.iter().zip(query).map(|(a, b)| a * b).sum() };
    let scores: Vec<f64> = keys.chunks(head_dim).map(|key| dot(key) * scale).collect();
    let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|x| (x - maximum).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![0.0; head_dim];
    for (weight, value) in weights.iter().zip(values.chunks(head_dim)) {
        out.iter_mut().zip(value).for_each(|(out, x)| *out += weight / total * x);
    }
    out
}

/// The lowest id of the largest logit, if all are numbers and it is finite.
pub(super) fn argmax(row: &[f32]) -> Option<u32> {
    if row.iter().any(|x| x.is_nan()) {
        return None;
    }
    let best = (0..row.len()).rev().max_by(|&a, &b| row[a].partial_cmp(&row[b]).expect("no NaN"))?;
    row[best].is_finite().then_some(best as u32)
}

/// A token of a row whose lists were applied, by sorting all of it.
pub(super) fn sample(row: &[f32], options: &SampleRow) -> Option<u32> {
    let best = argmax(row)?;
    let maximum = row[best as usize];
    let temperature = options.temperature;
    if temperature == 0.0 {
        return Some(best);
    }
    let mut kept: Vec<u32> = (0..row.len() as u32).filter(|&t| row[t as usize] > f32::NEG_INFINITY).collect();
    kept.sort_by(|&a, &b| row[b as usize].partial_cmp(&row[a as usize]).expect("no NaN").then(a.cmp(&b)));
    if options.min_p > 0.0 {
        let floor = maximum + options.min_p.ln() * temperature;
        kept.retain(|&t| row[t as usize] >= floor);
    }
    if options.top_k > 0 {
        kept.truncate(options.top_k as usize);
    }
    if options.top_p < 1.0 {
        let weight = |&t: &u32| f64::from((row[t as usize] - maximum) / temperature).exp();
        let needed = f64::from(options.top_p) * kept.iter().map(weight).sum::<f64>();
        let mut sum = 0.0;
        let reaches = kept.iter().position(|t| {
            sum += weight(t);
            sum >= needed
        });
        kept.truncate(reaches.map_or(kept.len(), |last| last + 1));
    }
    let seed = u64::from(options.seed_high) << 32 | u64::from(options.seed_low);
    let key = NoiseKey { seed, position: options.position, choice: options.choice };
    let value = |t: u32| row[t as usize] * (1.0 / temperature) + gumbel(key, t);
    kept.sort_unstable();
    let winner = kept.into_iter().reduce(|a, b| if value(b) > value(a) { b } else { a })?;
    value(winner).is_finite().then_some(winner)
}

/// Of one row.
pub(super) struct RowLogProbs {
    pub(super) target: f64,
    pub(super) rank: i32,
    /// (−1, −∞) past the vocabulary.
    pub(super) top: Vec<(i32, f64)>,
}

pub(super) fn log_probs(row: &[f32], target: usize, num_top: usize) -> RowLogProbs {
    let maximum = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let log_sum = maximum + row.iter().map(|&x| (f64::from(x) - maximum).exp()).sum::<f64>().ln();
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).expect("no NaN").then(a.cmp(&b)));
    let best = |i: usize| order.get(i).map(|&token| (token as i32, f64::from(row[token]) - log_sum));
    RowLogProbs {
        target: f64::from(row[target]) - log_sum,
        rank: 1 + row.iter().filter(|&&x| x > row[target]).count() as i32,
        top: (0..num_top).map(|i| best(i).unwrap_or((-1, f64::NEG_INFINITY))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn the_nearest_e4m3_is_that_of_all() {
        let distance = |code: u8, x: f64| (f64_of_fp8(code) - x.abs()).abs();
        // Of far larger values all are as far in f64.
        let values = (0..0x7f80).step_by(3).map(|bits| bf16::from_bits(bits).to_f64());
        for x in values.filter(|x| *x < 1e6) {
            let nearest = (0..0x7f)
                .min_by(|&a, &b| distance(a, x).total_cmp(&distance(b, x)).then((a & 1).cmp(&(b & 1))));
            assert_eq!((Some(fp8_of_f64(x)), Some(fp8_of_f64(-x) & 0x7f)), (nearest, nearest), "{x}");
        }
    }
}
