//! From the partial sums of a tile to the output: the fixed tree over segments, bias, and what the caller asked for.

use super::tile::TILE_STRIDE;
use crate::cpu::activation::RowWriter;
use crate::cpu::math::silu;
use crate::cpu::pack::LANES;
use crate::cpu::simd::{Kernel, Simd};

/// What happens to a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = result`
    Store,
    /// `out = out + result`: the residual.
    Add,
}

/// Finishes the rows of one panel group.
pub(super) struct Finish {
    pub(super) epilogue: Epilogue,
    /// [segments][rows][TILE_STRIDE]
    pub(super) partials: *const f32,
    pub(super) segments: usize,
    /// f32 values from one segment to the next.
    pub(super) segment_stride: usize,
    pub(super) rows: usize,
    /// Panels in the group: 1 or 2.
    pub(super) panels: usize,
    /// Of the group's first packed row; null without bias.
    pub(super) bias: *const f32,
    /// First row, first column of the group.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Real columns from the group's first column on.
    pub(super) columns: usize,
}

impl Kernel for Finish {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        match self.epilogue {
            Epilogue::Store => self.rows::<S, false>(s),
            Epilogue::Add => self.rows::<S, true>(s),
        }
    }
}

impl Finish {
    #[inline(always)]
    unsafe fn rows<S: Simd, const ADD: bool>(&self, s: S) {
        for panel in 0..self.panels {
            let start = panel * LANES;
            let columns = self.columns.saturating_sub(start).min(LANES);
            let bias = if self.bias.is_null() { s.splat(0.0) } else { s.load(self.bias.add(start)) };
            let (partials, out) = (self.partials.add(start), self.out.add(start));
            for row in 0..self.rows {
                let (partials, out) = (partials.add(row * TILE_STRIDE), out.add(row * self.out_stride));
                let load = |segment| s.load(partials.add(segment * self.segment_stride));
                let mut result = segment_sum(s, self.segments, load);
                if !self.bias.is_null() {
                    result = s.add(result, bias);
                }
                if columns == LANES {
                    if ADD {
                        result = s.add(s.load(out), result);
                    }
                    s.store(out, result);
                } else {
                    if ADD {
                        result = s.add(s.load_n(out, columns), result);
                    }
                    s.store_n(out, columns, result);
                }
            }
        }
    }
}

/// silu(gate) · up, rounded straight into the input of the next layer: one group of 32 values per row, from up to two
/// pairs of panels.
pub(super) struct FinishGated {
    /// [pairs][rows][TILE_STRIDE]: gate, then up.
    pub(super) partials: *const f32,
    pub(super) pairs: usize,
    /// f32 values from one pair to the next.
    pub(super) pair_stride: usize,
    pub(super) rows: std::ops::Range<usize>,
    /// Of the first packed row of the first pair; null without bias.
    pub(super) bias: *const f32,
    /// Real columns from the group's first on.
    pub(super) columns: usize,
    pub(super) group: usize,
    pub(super) out: RowWriter,
}

impl Kernel for FinishGated {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for (index, row) in self.rows.enumerate() {
            let mut gated = [s.splat(0.0); 2];
            for pair in 0..self.pairs {
                let first = self.partials.add(pair * self.pair_stride + index * TILE_STRIDE);
                let (mut gate, mut up) = (s.load(first), s.load(first.add(LANES)));
                if !self.bias.is_null() {
                    let bias = self.bias.add(pair * 2 * LANES);
                    gate = s.add(gate, s.load(bias));
                    up = s.add(up, s.load(bias.add(LANES)));
                }
                let columns = self.columns.saturating_sub(pair * LANES).min(LANES);
                gated[pair] = s.keep_first(columns, s.mul(silu(s, gate), up), s.splat(0.0));
            }
            self.out.write_group(s, row, self.group, gated);
        }
    }
}

/// Adds the segments in their fixed tree: balanced within groups of the power-of-two factor of their number (at most
/// 128), then the groups in order.
#[inline(always)]
pub(super) unsafe fn segment_sum<S: Simd>(s: S, segments: usize, load: impl Fn(usize) -> S::F) -> S::F {
    if segments == 1 {
        return load(0);
    }
    let group = segments & segments.wrapping_neg();
    let mut total = subtree(s, 0, group, &load);
    let mut first = group;
    while first < segments {
        total = s.add(total, subtree(s, first, group, &load));
        first += group;
    }
    total
}

/// The sum of `count` segments, a power of two, as a balanced tree.
#[inline(always)]
unsafe fn subtree<S: Simd>(s: S, first: usize, count: usize, load: &impl Fn(usize) -> S::F) -> S::F {
    match count {
        1 => load(first),
        2 => s.add(load(first), load(first + 1)),
        4 => four(s, first, load),
        _ => {
            // A binary counter of finished subtrees of four: slot `level` holds the sum of 4 · 2^level segments.
            let mut subtrees = [s.splat(0.0); 6];
            for i in 0..count / 4 {
                let mut sum = four(s, first + 4 * i, load);
                let mut level = 0;
                while i >> level & 1 == 1 {
                    sum = s.add(subtrees[level], sum);
                    level += 1;
                }
                subtrees[level] = sum;
            }
            subtrees[(count / 4).trailing_zeros() as usize]
        }
    }
}

#[inline(always)]
unsafe fn four<S: Simd>(s: S, first: usize, load: &impl Fn(usize) -> S::F) -> S::F {
    s.add(s.add(load(first), load(first + 1)), s.add(load(first + 2), load(first + 3)))
}

/// Sums [segments, T, N] of one stretch of the flattened [T, N].
pub(super) struct Reduce {
    pub(super) partials: *const f32,
    pub(super) segments: usize,
    pub(super) segment_stride: usize,
    /// [N] or null.
    pub(super) bias: *const f32,
    pub(super) out: *mut f32,
    pub(super) rows: std::ops::Range<usize>,
    pub(super) columns: usize,
    pub(super) add: bool,
}

impl Kernel for Reduce {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            for column in (0..self.columns).step_by(LANES) {
                let n = (self.columns - column).min(LANES);
                let at = row * self.columns + column;
                let mut sum = segment_sum(s, self.segments, |segment| {
                    s.load_n(self.partials.add(segment * self.segment_stride + at), n)
                });
                if !self.bias.is_null() {
                    sum = s.add(sum, s.load_n(self.bias.add(column), n));
                }
                if self.add {
                    sum = s.add(s.load_n(self.out.add(at), n), sum);
                }
                s.store_n(self.out.add(at), n, sum);
            }
        }
    }
}
