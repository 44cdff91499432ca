//! Operations on one row of f32 logits [V]. The policy of sampling lives above; here is only arithmetic.
//!
//! All of them are deterministic and run on the calling thread. Ties always go to the lower token id. A logit of −∞ is an
//! excluded token; a NaN or +∞ makes arg-max return `None`, so that a bad row fails and is never sampled from.

// As in `cpu`: unsafe functions list their caller's duties.
#![allow(unsafe_op_in_unsafe_fn)]

mod filter;
mod noise;

pub use filter::{Filters, SamplingScratch, filter};
pub use noise::{NoiseKey, gumbel, gumbel_argmax};

use std::cmp::Ordering;

use crate::cpu::Cpu;
use crate::cpu::math::exp;
use crate::cpu::simd::{Kernel, Simd, dispatch};

/// Logits whose exponentials are summed together; part of the numeric class.
const SPAN: usize = 4096;

/// The largest logit and its lowest token id; `None` if a logit is NaN or the largest is not finite.
pub fn argmax(cpu: &Cpu, row: &[f32]) -> Option<(u32, f32)> {
    let mut best = (0, f32::NEG_INFINITY);
    for (index, span) in row.chunks(SPAN).enumerate() {
        let maximum = span_max(cpu, span)?;
        if maximum > best.1 {
            best = (index * SPAN, maximum);
        }
    }
    let (start, maximum) = best;
    if !maximum.is_finite() {
        return None;
    }
    let offset = row[start..].iter().position(|&x| x == maximum)?;
    Some(((start + offset) as u32, maximum))
}

/// ln Σ e^x, summed per span of 4096 logits and then in order, the latter in f64. −∞ for a row without candidates, NaN for
/// a row with NaN or +∞.
pub fn log_sum_exp(cpu: &Cpu, row: &[f32]) -> f32 {
    let Some(maximum) =
        row.chunks(SPAN).map(|span| span_max(cpu, span)).try_fold(f32::NEG_INFINITY, |a, b| Some(a.max(b?)))
    else {
        return f32::NAN;
    };
    if maximum == f32::NEG_INFINITY {
        return maximum;
    }
    let sum: f64 = row.chunks(SPAN).map(|span| f64::from(exp_sum(cpu, span, maximum, 1.0, None))).sum();
    (f64::from(maximum) + sum.ln()) as f32
}

/// Log-probability of `token` given the row's [`log_sum_exp`].
pub fn log_prob(row: &[f32], log_sum_exp: f32, token: u32) -> f32 {
    row[token as usize] - log_sum_exp
}

/// 1 + the number of logits greater than that of `token`.
pub fn rank(cpu: &Cpu, row: &[f32], token: u32) -> u32 {
    // SAFETY: the kernel reads its own slice.
    1 + unsafe { dispatch(cpu.detected(), CountGreater { row, than: row[token as usize] }) }
}

/// The `n` largest logits with their ids, largest first, equal ones by ascending id. NaN counts as the smallest.
pub fn top_n(row: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(n.min(row.len()) + 1);
    if n == 0 {
        return top;
    }
    let mut lowest = f32::NEG_INFINITY;
    for (id, &logit) in row.iter().enumerate() {
        // Ids ascend, so an equal logit never displaces one that is already in.
        if logit > lowest || top.len() < n {
            let at = top.partition_point(|&(_, other)| {
                !matches!(logit.partial_cmp(&other), Some(Ordering::Greater)) && !other.is_nan()
            });
            top.insert(at, (id as u32, logit));
            top.truncate(n);
            if top.len() == n {
                lowest = top[n - 1].1;
            }
        }
    }
    top
}

/// How often a token occurred in the sequence so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenCount {
    pub token: u32,
    pub in_prompt: bool,
    pub in_output: u32,
}

/// 1, 0 and 0 change nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// Divides positive and multiplies negative logits of tokens in prompt or output.
    pub repetition: f32,
    /// Subtracted once from tokens in the output.
    pub presence: f32,
    /// Subtracted per occurrence in the output.
    pub frequency: f32,
}

/// Applies repetition, then frequency, then presence penalty to the tokens listed, each listed once.
///
/// # Panics
/// If a token is outside the row, here and below.
pub fn apply_penalties(row: &mut [f32], counts: &[TokenCount], penalties: &Penalties) {
    for count in counts {
        let logit = &mut row[count.token as usize];
        if count.in_prompt || count.in_output > 0 {
            *logit = if *logit > 0.0 { *logit / penalties.repetition } else { *logit * penalties.repetition };
        }
        if count.in_output > 0 {
            *logit -= penalties.frequency * count.in_output as f32;
            *logit -= penalties.presence;
        }
    }
}

/// Adds a bias to single logits.
pub fn add_bias(row: &mut [f32], bias: &[(u32, f32)]) {
    for &(token, bias) in bias {
        row[token as usize] += bias;
    }
}

/// Excludes tokens.
pub fn ban(row: &mut [f32], tokens: &[u32]) {
    for &token in tokens {
        row[token as usize] = f32::NEG_INFINITY;
    }
}

/// Excludes every token that is not listed.
pub fn allow_only(row: &mut [f32], tokens: &[u32]) {
    // Kept values wait outside the row; a token listed twice is kept once.
    let kept: Vec<(u32, f32)> = tokens.iter().map(|&token| (token, row[token as usize])).collect();
    row.fill(f32::NEG_INFINITY);
    for (token, logit) in kept {
        row[token as usize] = logit;
    }
}

/// The largest of a few logits, `None` if one is NaN or +∞.
fn span_max(cpu: &Cpu, span: &[f32]) -> Option<f32> {
    // SAFETY: the kernel reads its own slice.
    let maximum = unsafe { dispatch(cpu.detected(), Max { row: span }) }?;
    (maximum < f32::INFINITY).then_some(maximum)
}

/// Σ e^((x − maximum) · inverse_temperature), each term also written to `out` if given.
fn exp_sum(cpu: &Cpu, span: &[f32], maximum: f32, inverse_temperature: f32, out: Option<&mut [f32]>) -> f32 {
    if let Some(out) = &out {
        assert_eq!(out.len(), span.len(), "one exponential per logit");
    }
    let out = out.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr);
    // SAFETY: the kernel reads its own slice and writes as many values.
    unsafe { dispatch(cpu.detected(), ExpSum { row: span, maximum, inverse_temperature, out }) }
}

struct Max<'a> {
    row: &'a [f32],
}

impl Kernel for Max<'_> {
    type Output = Option<f32>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> Option<f32> {
        let lowest = s.splat(f32::NEG_INFINITY);
        let magnitude = s.splat_i(0x7fff_ffff);
        let (mut maximum, mut magnitudes) = (lowest, s.splat_i(0));
        for start in (0..self.row.len()).step_by(16) {
            let n = (self.row.len() - start).min(16);
            let x = s.keep_first(n, s.load_n(self.row.as_ptr().add(start), n), lowest);
            maximum = s.max(maximum, x);
            magnitudes = s.max_u(magnitudes, s.and(s.bits(x), magnitude));
        }
        // Above the bits of infinity are only NaN.
        (s.reduce_max_u(magnitudes) <= f32::INFINITY.to_bits()).then(|| s.reduce_max(maximum))
    }
}

struct ExpSum<'a> {
    row: &'a [f32],
    maximum: f32,
    inverse_temperature: f32,
    out: *mut f32,
}

impl Kernel for ExpSum<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> f32 {
        let (maximum, scale) = (s.splat(self.maximum), s.splat(self.inverse_temperature));
        let mut sum = s.splat(0.0);
        for start in (0..self.row.len()).step_by(16) {
            let n = (self.row.len() - start).min(16);
            let x = s.load_n(self.row.as_ptr().add(start), n);
            let e = exp(s, s.mul(s.sub(x, maximum), scale));
            let e = s.keep_first(n, e, s.splat(0.0));
            if !self.out.is_null() {
                s.store_n(self.out.add(start), n, e);
            }
            sum = s.add(sum, e);
        }
        s.reduce_add(sum)
    }
}

struct CountGreater<'a> {
    row: &'a [f32],
    than: f32,
}

impl Kernel for CountGreater<'_> {
    type Output = u32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> u32 {
        let (one, zero) = (s.float_of_bits(s.splat_i(1)), s.splat(0.0));
        let mut count = s.splat_i(0);
        for start in (0..self.row.len()).step_by(16) {
            let n = (self.row.len() - start).min(16);
            let x = s.load_n(self.row.as_ptr().add(start), n);
            let greater = s.keep_first(n, s.select_lt(s.splat(self.than), x, one, zero), zero);
            count = s.add_i(count, s.bits(greater));
        }
        s.reduce_add_i(count).cast_unsigned()
    }
}

#[cfg(test)]
mod tests;
