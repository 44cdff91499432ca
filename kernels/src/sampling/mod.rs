//! Operations on one row of f32 logits [V]. The policy of sampling lives above; here is only arithmetic.
//!
//! All of them are deterministic and run on the thread that calls; [`for_each_row`] shares rows out. Ties always go to
//! the lower token id. A logit of −∞ is an excluded token; a NaN or +∞ makes arg-max return `None`, so that a bad row
//! fails and is never sampled from. What takes the arg-max as an argument counts on a row without them.

// As in `cpu`: unsafe functions list their caller's duties.
#![allow(unsafe_op_in_unsafe_fn)]

mod filter;
mod noise;
mod rows;

pub use filter::{Cut, Filters, SamplingScratch, filter};
pub use noise::{NoiseKey, NoisyDraw, gumbel, gumbel_argmax};
pub use rows::for_each_row;

use crate::cpu::math::exp;
use crate::cpu::simd::{Kernel, Simd, dispatch};
use crate::cpu::{Cpu, Detected};

/// Logits whose exponentials are summed together; part of the numeric class.
const SPAN: usize = 4096;

/// What row operations run with: the instruction set of a [`Cpu`]. Unlike the backend it may be in many threads' hands.
#[derive(Clone, Copy, Debug)]
pub struct RowOps(Detected);

impl From<&Cpu> for RowOps {
    fn from(cpu: &Cpu) -> Self {
        Self(cpu.detected())
    }
}

impl RowOps {
    const fn detected(self) -> Detected {
        self.0
    }
}

/// The largest logit and its lowest token id; `None` if a logit is NaN or the largest is not finite.
pub fn argmax(ops: RowOps, row: &[f32]) -> Option<(u32, f32)> {
    let mut best = (0, f32::NEG_INFINITY);
    for (index, span) in row.chunks(SPAN).enumerate() {
        // SAFETY: the kernel reads its own slice.
        let maximum = unsafe { dispatch(ops.detected(), Max { row: span }) }?;
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

/// ln Σ e^x of a row with this largest logit, summed per span of 4096 logits and then in order, the latter in f64.
pub fn log_sum_exp(ops: RowOps, row: &[f32], maximum: f32) -> f32 {
    // SAFETY: the kernel reads its own slice.
    let span_sum = |row| unsafe { dispatch(ops.detected(), ExpSum { row, maximum }) };
    let sum: f64 = row.chunks(SPAN).map(|span| f64::from(span_sum(span))).sum();
    (f64::from(maximum) + sum.ln()) as f32
}

/// Log-probability of `token` given the row's [`log_sum_exp`].
pub fn log_prob(row: &[f32], log_sum_exp: f32, token: u32) -> f32 {
    row[token as usize] - log_sum_exp
}

/// 1 + the number of logits greater than that of `token`.
pub fn rank(ops: RowOps, row: &[f32], token: u32) -> u32 {
    // SAFETY: the kernel reads its own slice.
    1 + unsafe { dispatch(ops.detected(), CountGreater { row, than: row[token as usize] }) }
}

/// The `n` largest logits with their ids, largest first, equal ones by ascending id.
pub fn top_n(ops: RowOps, row: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut top = Vec::with_capacity(n.min(row.len()) + 1);
    if n > 0 {
        // SAFETY: the kernel reads its own slice.
        unsafe { dispatch(ops.detected(), TopN { row, n, top: &mut top }) };
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

struct Max<'a> {
    row: &'a [f32],
}

impl Kernel for Max<'_> {
    /// The largest logit, unless one is NaN.
    type Output = Option<f32>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> Option<f32> {
        let magnitude = s.splat_i(0x7fff_ffff);
        // Two of each: a chain of maxima through the whole row would wait for each of them.
        let mut maxima = [s.splat(f32::NEG_INFINITY); 2];
        let mut magnitudes = [s.splat_i(0); 2];
        let mut take = |at: usize, x: S::F| {
            maxima[at] = s.max(maxima[at], x);
            magnitudes[at] = s.max_u(magnitudes[at], s.and(s.bits(x), magnitude));
        };
        let (pairs, rest) = self.row.as_chunks::<32>();
        for pair in pairs {
            take(0, s.load(pair.as_ptr()));
            take(1, s.load(pair.as_ptr().add(16)));
        }
        for part in rest.chunks(16) {
            let x = s.load_n(part.as_ptr(), part.len());
            take(0, s.keep_first(part.len(), x, s.splat(f32::NEG_INFINITY)));
        }
        // Above the bits of infinity are only NaN.
        let has_nan = s.reduce_max_u(s.max_u(magnitudes[0], magnitudes[1])) > f32::INFINITY.to_bits();
        (!has_nan).then(|| s.reduce_max(s.max(maxima[0], maxima[1])))
    }
}

/// Σ e^(x − maximum).
struct ExpSum<'a> {
    row: &'a [f32],
    maximum: f32,
}

impl Kernel for ExpSum<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> f32 {
        let maximum = s.splat(self.maximum);
        let mut sum = s.splat(0.0);
        let (vectors, rest) = self.row.as_chunks::<16>();
        for vector in vectors {
            sum = s.add(sum, exp(s, s.sub(s.load(vector.as_ptr()), maximum)));
        }
        if !rest.is_empty() {
            let e = exp(s, s.sub(s.load_n(rest.as_ptr(), rest.len()), maximum));
            sum = s.add(sum, s.keep_first(rest.len(), e, s.splat(0.0)));
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
        let than = s.splat(self.than);
        let (vectors, rest) = self.row.as_chunks::<16>();
        let count: u32 = vectors.iter().map(|v| s.less(than, s.load(v.as_ptr())).count_ones()).sum();
        count + rest.iter().filter(|&&x| x > self.than).count() as u32
    }
}

struct TopN<'a> {
    row: &'a [f32],
    /// At least 1.
    n: usize,
    top: &'a mut Vec<(u32, f32)>,
}

impl Kernel for TopN<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { row, n, top } = self;
        let mut lowest = f32::NEG_INFINITY;
        for (index, part) in row.chunks(16).enumerate() {
            // Few logits are among the best so far, so most vectors end here.
            let x = s.load_n(part.as_ptr(), part.len());
            let greater = s.less(s.splat(lowest), x) & ((1 << part.len()) - 1);
            if greater == 0 && top.len() == n {
                continue;
            }
            for (token, &logit) in (16 * index as u32..).zip(part) {
                // Ids ascend, so an equal logit never displaces one that is already in.
                if logit > lowest || top.len() < n {
                    let at = top.partition_point(|&(_, other)| other >= logit);
                    top.insert(at, (token, logit));
                    top.truncate(n);
                    if top.len() == n {
                        lowest = top[n - 1].1;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
