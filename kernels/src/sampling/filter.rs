//! Min-p, top-k and top-p: which tokens stay candidates.
//!
//! Each of them keeps a beginning of the vocabulary in descending order of logits, so what is left of a row is told by
//! the last token kept, and nothing is written to the row. Finding that token takes no sort of the vocabulary: a pass
//! counts or weighs the tokens above a few thresholds, one more collects those that matter, and only they are ordered.

use super::RowOps;
use crate::cpu::math::exp;
use crate::cpu::simd::{Kernel, Simd, dispatch};

/// Thresholds on softmax(logits / temperature); the neutral values keep everything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filters {
    /// Above 0.
    pub temperature: f32,
    /// Keeps the k largest; 0 is off.
    pub top_k: u32,
    /// Keeps the shortest prefix, in descending order, whose share of the candidates so far reaches p; 1 is off.
    pub top_p: f32,
    /// Keeps tokens at least this share as probable as the most probable one; 0 is off.
    pub min_p: f32,
}

/// The tokens of a row with a logit above `logit`, and those with just this logit up to id `last`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    pub(super) logit: f32,
    pub(super) last: u32,
}

impl Cut {
    /// Keeps every token.
    pub const fn none() -> Self {
        Self { logit: f32::NEG_INFINITY, last: u32::MAX }
    }

    /// Whether a token with this logit is kept.
    pub fn keeps(&self, token: u32, logit: f32) -> bool {
        logit > self.logit || (logit == self.logit && token <= self.last)
    }
}

/// Memory that filtering reuses.
#[derive(Debug, Default)]
pub struct SamplingScratch {
    candidates: Vec<Candidate>,
    weights: Vec<f32>,
}

/// What `filters` leave of a row: min-p first, then top-k, then top-p among what is left. Tokens are ordered by
/// descending logit, equal ones by ascending id, so exactly k stay and a tie at an edge is cut by id. The most probable
/// token always stays. `best` is the row's [`argmax`](super::argmax).
pub fn filter(
    ops: RowOps,
    row: &[f32],
    best: (u32, f32),
    filters: &Filters,
    scratch: &mut SamplingScratch,
) -> Cut {
    let (token, maximum) = best;
    let mut cut = Cut::none();
    if filters.min_p > 0.0 {
        // p ≥ min_p · p_max in logits.
        cut.logit = maximum + filters.min_p.ln() * filters.temperature;
        if cut.logit > maximum {
            // min_p = 1 with rounding must not exclude the best itself.
            return Cut { logit: maximum, last: token };
        }
    }
    let row = Row { ops, logits: row, floor: cut.logit, maximum, inverse: 1.0 / filters.temperature };
    let cuts_p = filters.top_p < 1.0;
    if filters.top_k > 0 && (filters.top_k as usize) < row.logits.len() {
        row.top_k(filters.top_k as usize, cuts_p.then_some(filters.top_p), scratch).unwrap_or(cut)
    } else if cuts_p {
        row.top_p(filters.top_p, scratch).unwrap_or(cut)
    } else {
        cut
    }
}

/// A token in an integer that is larger the earlier the token stands in the order: the logit's bits, turned so that
/// integers order them, above the complement of the id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate(u64);

impl Candidate {
    fn new(token: u32, logit: f32) -> Self {
        // −0 becomes 0: they are equal.
        let bits = (logit + 0.0).to_bits();
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        Self(u64::from(ordered) << 32 | u64::from(!token))
    }

    fn logit(self) -> f32 {
        let ordered = (self.0 >> 32) as u32;
        f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
    }

    /// Keeps the tokens up to this one.
    fn cut(self) -> Cut {
        Cut { logit: self.logit(), last: !(self.0 as u32) }
    }
}

/// Tokens in descending order start with the largest integer.
fn descending(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.cmp(a)
}

/// Thresholds that one pass looks at.
const LEVELS: usize = 8;
/// Up to here collecting and ordering candidates costs less than another pass.
const FEW: usize = 1024;
/// The exponent of weights as integers, which add up to the same in any order. Sums have 128 bits: 64 would hold 2¹⁸ tokens
/// of weight 1, and vocabularies may be larger.
const WEIGHT_BITS: i32 = 46;

/// A row to be filtered; tokens below `floor` are out already.
struct Row<'a> {
    ops: RowOps,
    logits: &'a [f32],
    floor: f32,
    maximum: f32,
    inverse: f32,
}

impl Row<'_> {
    /// `None` if there are no more than k candidates and all stay.
    fn top_k(&self, k: usize, top_p: Option<f32>, scratch: &mut SamplingScratch) -> Option<Cut> {
        self.collect(self.level_of_count(k), &mut scratch.candidates);
        let candidates = &mut scratch.candidates[..];
        let kept = if candidates.len() > k {
            candidates.select_nth_unstable_by(k - 1, descending);
            &mut candidates[..k]
        } else {
            candidates
        };
        match top_p {
            None if kept.len() < k => None,
            None => kept.iter().min().map(|last| last.cut()),
            Some(p) => {
                let total = self.mass(kept, &mut scratch.weights);
                self.cut_by_mass(kept, needed(p, total as f64), &mut scratch.weights)
                    .or_else(|| kept.iter().min().map(|last| last.cut()))
            }
        }
    }

    /// `None` if all candidates together do not come to more than p.
    fn top_p(&self, p: f32, scratch: &mut SamplingScratch) -> Option<Cut> {
        // Flat rows have nothing within a few nats that the least of these leaves out.
        const DISTANCES: [f32; LEVELS] = [0.5, 1.0, 2.0, 3.0, 4.5, 6.5, 9.0, 12.0];
        let levels = DISTANCES.map(|distance| self.maximum - distance / self.inverse);
        let Masses { total, above } = self.masses(levels);
        let needed_mass = f64::from(p) * total;
        // These sums are rounded otherwise than the exact ones below: a little more is taken.
        let level = levels.into_iter().zip(above).find(|&(_, mass)| mass > needed_mass * 1.001);
        self.collect(level.map_or(f32::NEG_INFINITY, |(level, _)| level), &mut scratch.candidates);
        let needed = needed(p, total * f64::from(WEIGHT_BITS).exp2());
        self.cut_by_mass(&mut scratch.candidates, needed, &mut scratch.weights)
    }

    /// A threshold with at least `k` tokens above it, and not many more where a few passes find one; −∞ if there is none.
    fn level_of_count(&self, k: usize) -> f32 {
        const DISTANCES: [f32; LEVELS] = [0.25, 1.0, 2.0, 4.0, 6.0, 9.0, 12.0, 16.0];
        let mut levels = DISTANCES.map(|distance| self.maximum - distance);
        let mut low = f32::NEG_INFINITY;
        for _ in 0..4 {
            let counts = self.counts(levels);
            let at = counts.iter().position(|&count| count as usize >= k);
            let Some(at) = at else { return low };
            low = levels[at];
            if counts[at] as usize <= k + FEW {
                return low;
            }
            let high = if at == 0 { self.maximum } else { levels[at - 1] };
            let step = (high - low) / (LEVELS + 1) as f32;
            levels = std::array::from_fn(|level| high - step * (level + 1) as f32);
        }
        low
    }

    /// All candidates above `level`, which is below the largest logit.
    fn collect(&self, level: f32, candidates: &mut Vec<Candidate>) {
        candidates.clear();
        let kernel = Collect { row: self, above: level, candidates };
        // SAFETY: the kernel reads its own slice.
        unsafe { dispatch(self.ops.detected(), kernel) };
    }

    fn counts(&self, levels: [f32; LEVELS]) -> [u32; LEVELS] {
        // SAFETY: as above.
        unsafe { dispatch(self.ops.detected(), Counts { row: self, levels }) }
    }

    fn masses(&self, levels: [f32; LEVELS]) -> Masses {
        let mut sum = Masses { total: 0.0, above: [0.0; LEVELS] };
        for logits in self.logits.chunks(super::SPAN) {
            let span = Row { logits, ..*self };
            // SAFETY: as above.
            let masses = unsafe { dispatch(self.ops.detected(), SpanMasses { row: &span, levels }) };
            sum.total += f64::from(masses[LEVELS]);
            sum.above.iter_mut().zip(masses).for_each(|(sum, mass)| *sum += f64::from(mass));
        }
        sum
    }

    /// Sum of the candidates' weights e^((logit − maximum) / temperature).
    fn mass(&self, candidates: &[Candidate], weights: &mut Vec<f32>) -> u128 {
        weights.clear();
        weights.extend(candidates.iter().map(|candidate| candidate.logit()));
        let kernel = Weigh { logits: weights, maximum: self.maximum, inverse: self.inverse };
        // SAFETY: the kernel reads and writes its own slice.
        unsafe { dispatch(self.ops.detected(), kernel) };
        weights.iter().map(|&weight| u128::from(integer(weight))).sum()
    }

    /// The first candidate, in order, at which the sum of weights reaches `needed`; `None` if none does.
    fn cut_by_mass(
        &self,
        mut candidates: &mut [Candidate],
        needed: f64,
        weights: &mut Vec<f32>,
    ) -> Option<Cut> {
        let mut sum: u128 = 0;
        while candidates.len() > FEW {
            let half = candidates.len() / 2;
            candidates.select_nth_unstable_by(half - 1, descending);
            let (upper, lower) = candidates.split_at_mut(half);
            let mass = self.mass(upper, weights);
            if (sum + mass) as f64 >= needed {
                candidates = upper;
            } else {
                sum += mass;
                candidates = lower;
            }
        }
        candidates.sort_unstable_by(descending);
        self.mass(candidates, weights);
        let reaches = weights.iter().position(|&weight| {
            sum += u128::from(integer(weight));
            sum as f64 >= needed
        });
        reaches.map(|last| candidates[last].cut())
    }
}

/// A weight of at most 1 in units of 2^−[`WEIGHT_BITS`]; exact above 2⁻²², rounded down below.
fn integer(weight: f32) -> u64 {
    (f64::from(weight) * f64::from(WEIGHT_BITS).exp2()) as u64
}

/// What a share of `total` comes to.
fn needed(p: f32, total: f64) -> f64 {
    f64::from(p) * total
}

/// Sums of weights: of all candidates, and of those above each level.
struct Masses {
    total: f64,
    above: [f64; LEVELS],
}

struct Collect<'a> {
    row: &'a Row<'a>,
    above: f32,
    candidates: &'a mut Vec<Candidate>,
}

impl Kernel for Collect<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Row { logits, floor, .. } = *self.row;
        let above = s.splat(self.above);
        for start in (0..logits.len()).step_by(16) {
            let n = (logits.len() - start).min(16);
            let x = s.load_n(logits.as_ptr().add(start), n);
            let mut lanes = s.less(above, x) & ((1 << n) - 1);
            while lanes != 0 {
                let token = start + lanes.trailing_zeros() as usize;
                lanes &= lanes - 1;
                let logit = logits[token];
                if logit >= floor {
                    self.candidates.push(Candidate::new(token as u32, logit));
                }
            }
        }
    }
}

struct Counts<'a> {
    row: &'a Row<'a>,
    levels: [f32; LEVELS],
}

impl Kernel for Counts<'_> {
    type Output = [u32; LEVELS];

    /// Levels below the floor count what is between, too: that only makes the search end earlier.
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> [u32; LEVELS] {
        let logits = self.row.logits;
        let levels = self.levels.map(|level| s.splat(level.max(self.row.floor)));
        let (one, zero) = (s.float_of_bits(s.splat_i(1)), s.splat(0.0));
        let mut counts = [s.splat_i(0); LEVELS];
        for start in (0..logits.len()).step_by(16) {
            let n = (logits.len() - start).min(16);
            let lowest = s.splat(f32::NEG_INFINITY);
            let x = s.keep_first(n, s.load_n(logits.as_ptr().add(start), n), lowest);
            for (count, level) in counts.iter_mut().zip(levels) {
                *count = s.add_i(*count, s.bits(s.select_lt(level, x, one, zero)));
            }
        }
        counts.map(|count| s.reduce_add_i(count).cast_unsigned())
    }
}

struct SpanMasses<'a> {
    row: &'a Row<'a>,
    levels: [f32; LEVELS],
}

impl Kernel for SpanMasses<'_> {
    /// Above each level, and the total in the last place.
    type Output = [f32; LEVELS + 1];

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> [f32; LEVELS + 1] {
        let Row { logits, floor, maximum, inverse, .. } = *self.row;
        let (floor, maximum, inverse, zero) =
            (s.splat(floor), s.splat(maximum), s.splat(inverse), s.splat(0.0));
        let levels = self.levels.map(|level| s.splat(level));
        let mut sums = [zero; LEVELS + 1];
        for start in (0..logits.len()).step_by(16) {
            let n = (logits.len() - start).min(16);
            let x = s.load_n(logits.as_ptr().add(start), n);
            let e = exp(s, s.mul(s.sub(x, maximum), inverse));
            let e = s.keep_first(n, s.select_lt(x, floor, zero, e), zero);
            for (sum, level) in sums.iter_mut().zip(levels) {
                *sum = s.add(*sum, s.select_lt(level, x, e, zero));
            }
            sums[LEVELS] = s.add(sums[LEVELS], e);
        }
        sums.map(|sum| s.reduce_add(sum))
    }
}

/// Turns logits into weights.
struct Weigh<'a> {
    logits: &'a mut [f32],
    maximum: f32,
    inverse: f32,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let (maximum, inverse) = (s.splat(self.maximum), s.splat(self.inverse));
        for start in (0..self.logits.len()).step_by(16) {
            let n = (self.logits.len() - start).min(16);
            let at = self.logits.as_mut_ptr().add(start);
            s.store_n(at, n, exp(s, s.mul(s.sub(s.load_n(at, n), maximum), inverse)));
        }
    }
}
