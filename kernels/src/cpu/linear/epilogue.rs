//! From the partial sums of a tile to the output: the fixed tree over segments, bias, and what the caller asked for.

use super::tile::TILE_STRIDE;
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
    /// `out = silu(gate) · up`; only for gate and up packed together, which allow nothing else.
    SwiGlu,
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
        for row in 0..self.rows {
            let out = self.out.add(row * self.out_stride);
            if self.epilogue == Epilogue::SwiGlu {
                let gate = self.result(s, row, 0);
                let up = self.result(s, row, 1);
                s.store_n(out, self.columns.min(LANES), s.mul(silu(s, gate), up));
                continue;
            }
            for panel in 0..self.panels {
                let start = panel * LANES;
                let columns = self.columns.saturating_sub(start).min(LANES);
                let mut result = self.result(s, row, panel);
                if self.epilogue == Epilogue::Add {
                    result = s.add(s.load_n(out.add(start), columns), result);
                }
                s.store_n(out.add(start), columns, result);
            }
        }
    }
}

impl Finish {
    #[inline(always)]
    unsafe fn result<S: Simd>(&self, s: S, row: usize, panel: usize) -> S::F {
        let first = self.partials.add(row * TILE_STRIDE + panel * LANES);
        let sum = segment_sum(s, self.segments, |segment| s.load(first.add(segment * self.segment_stride)));
        if self.bias.is_null() { sum } else { s.add(sum, s.load(self.bias.add(panel * LANES))) }
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
    let mut total = s.splat(0.0);
    for first in (0..segments).step_by(group) {
        // A binary counter of finished subtrees: slot `level` holds the sum of 2^level segments.
        let mut subtrees = [s.splat(0.0); 8];
        for i in 0..group {
            let mut sum = load(first + i);
            let mut level = 0;
            while i >> level & 1 == 1 {
                sum = s.add(subtrees[level], sum);
                level += 1;
            }
            subtrees[level] = sum;
        }
        let sum = subtrees[group.trailing_zeros() as usize];
        total = if first == 0 { sum } else { s.add(total, sum) };
    }
    total
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
