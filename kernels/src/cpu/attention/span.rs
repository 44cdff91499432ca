//! One span of one tile: scores, softmax weights and weighted values.
//!
//! Scores run over blocks with lanes over slots, values over slots with lanes over the head dim. Lanes of slots that a row
//! does not see are replaced by −∞ before anything else looks at them, and the loop over values ends at the row's last
//! slot, so what free slots hold never meets arithmetic that counts.

use std::ops::Range;

use super::SPAN;
use crate::KvDType;
use crate::cpu::kv_cache::{BLOCK_SIZE, UnitLayout};
use crate::cpu::math::{exp, round_bf16};
use crate::cpu::simd::{Kernel, Simd};

pub(super) struct SpanArgs<'a> {
    /// Block 0 of the KV head.
    pub(super) head: *const u8,
    pub(super) layout: UnitLayout,
    pub(super) head_dim: usize,
    /// Blocks of the span, up to the last key that any row sees.
    pub(super) blocks: &'a [u32],
    /// First token, first head of the group.
    pub(super) queries: *const f32,
    pub(super) query_stride: usize,
    pub(super) tokens: usize,
    pub(super) group: usize,
    /// Keys of this span that the first token sees; negative if the span starts after it.
    pub(super) first_limit: isize,
    pub(super) scale: f32,
    /// [rows][partial_stride]: weighted values [padded], maximum, sum.
    pub(super) partials: *mut f32,
    pub(super) partial_stride: usize,
    pub(super) scratch: *mut u8,
}

/// Computes the partials of all rows that see any key of the span.
pub(super) struct SpanKernel<'a>(pub(super) &'a SpanArgs<'a>);

impl Kernel for SpanKernel<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        match self.0.layout.dtype() {
            KvDType::Bf16 => self.0.run::<S, Pairs>(s),
            KvDType::F32 => self.0.run::<S, Floats>(s),
            KvDType::F16 => self.0.run::<S, Halves>(s),
        }
    }
}

/// How keys and values of a dtype are multiplied. A step is one or two elements along the summed axis.
trait Storage {
    /// Elements per step: of the head dim for scores, slots for values.
    const STEP: usize;
    /// Bytes of a vector of 16 lanes × STEP elements.
    const VECTOR: usize;
    /// Bytes of a query element and of a softmax weight in scratch, in each of `PARTS` arrays that lie one behind the other.
    const BYTES: usize;
    const PARTS: usize;

    type Weight<S: Simd>: Copy;
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> Self::Weight<S>;
    /// As `load`, with only the first element of each step.
    unsafe fn load_first<S: Simd>(s: S, p: *const u8) -> Self::Weight<S>;
    /// Adds `w` times the step at `x`, broadcast; a second part lies `part` bytes behind.
    unsafe fn dot<S: Simd>(s: S, acc: S::F, w: Self::Weight<S>, x: *const u8, part: usize) -> S::F;
    /// Writes a vector of queries or weights as `dot` reads it.
    unsafe fn store<S: Simd>(s: S, p: *mut u8, x: S::F, part: usize);
}

/// bf16 in pairs. Queries and weights are the sum of two bf16 numbers, 16 bits of mantissa together: rounding them to one
/// would cost more than the rounding of the cache itself.
struct Pairs;

impl Storage for Pairs {
    const STEP: usize = 2;
    const VECTOR: usize = 64;
    const BYTES: usize = 2;
    const PARTS: usize = 2;

    type Weight<S: Simd> = S::I;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::I {
        s.load_i(p)
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u8) -> S::I {
        s.and(s.load_i(p), s.splat_i(0xffff))
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, acc: S::F, w: S::I, x: *const u8, part: usize) -> S::F {
        let acc = s.dot_bf16(acc, w, s.splat_bytes(x));
        s.dot_bf16(acc, w, s.splat_bytes(x.add(part)))
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, p: *mut u8, x: S::F, part: usize) {
        s.store_bf16(p.cast(), x);
        // Exact: the difference of a number and its rounding is a float.
        s.store_bf16(p.add(part).cast(), s.sub(x, round_bf16(s, x)));
    }
}

struct Floats;

impl Storage for Floats {
    const STEP: usize = 1;
    const VECTOR: usize = 64;
    const BYTES: usize = 4;
    const PARTS: usize = 1;

    type Weight<S: Simd> = S::F;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        s.load(p.cast())
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u8) -> S::F {
        s.load(p.cast())
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, acc: S::F, w: S::F, x: *const u8, _part: usize) -> S::F {
        s.fma(w, s.splat(*x.cast::<f32>()), acc)
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, p: *mut u8, x: S::F, _part: usize) {
        s.store(p.cast(), x);
    }
}

/// f16, widened when loaded.
struct Halves;

impl Storage for Halves {
    const STEP: usize = 1;
    const VECTOR: usize = 32;
    const BYTES: usize = 4;
    const PARTS: usize = 1;

    type Weight<S: Simd> = S::F;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        s.load_f16(p.cast())
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u8) -> S::F {
        s.load_f16(p.cast())
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, acc: S::F, w: S::F, x: *const u8, part: usize) -> S::F {
        Floats::dot(s, acc, w, x, part)
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, p: *mut u8, x: S::F, _part: usize) {
        s.store(p.cast(), x);
    }
}

/// Calls `$call::<S, K, R, C>($args)` for run-time `$r` in 1..=6 and `$c` in 1..=4.
macro_rules! tile {
    ($r:expr, $c:expr, [$($cs:literal)+], $this:ident.$call:ident($($arg:expr),*)) => {
        tile!(@rows $r, $c, $this.$call($($arg),*), 1 [$($cs)+] 2 [$($cs)+] 3 [$($cs)+] 4 [$($cs)+] 5 [$($cs)+] 6 [$($cs)+])
    };
    (@rows $r:expr, $c:expr, $this:ident.$call:ident $args:tt, $($rs:literal [$($cs:literal)+])+) => {
        match ($r, $c) {
            $($(($rs, $cs) => tile!(@call $this.$call, $rs, $cs, $args),)+)+
            _ => unreachable!("tile of 6 rows and few vectors"),
        }
    };
    (@call $this:ident.$call:ident, $r:literal, $c:literal, ($($arg:expr),*)) => {
        $this.$call::<S, K, $r, $c>($($arg),*)
    };
}

impl SpanArgs<'_> {
    /// Keys of the span that a row sees.
    #[inline(always)]
    fn valid(&self, row: usize) -> usize {
        (self.first_limit + (row / self.group) as isize).clamp(0, SPAN as isize) as usize
    }

    fn rows(&self) -> usize {
        self.tokens * self.group
    }

    /// Bytes from the first part of the queries to the second.
    #[inline(always)]
    fn query_part<K: Storage>(&self) -> usize {
        self.rows() * self.layout.padded() * K::BYTES
    }

    /// The same for the weights.
    #[inline(always)]
    fn weight_part<K: Storage>(&self) -> usize {
        self.rows() * SPAN * K::BYTES
    }

    #[inline(always)]
    unsafe fn run<S: Simd, K: Storage>(&self, s: S) {
        let rows = self.rows();
        let padded = self.layout.padded();
        let scores = self.scratch.cast::<f32>();
        let queries = self.scratch.add(rows * SPAN * 4);
        let weights = queries.add(K::PARTS * self.query_part::<K>());
        for row in 0..rows {
            let (token, head) = (row / self.group, row % self.group);
            let query = self.queries.add(token * self.query_stride + head * self.head_dim);
            for d in (0..padded).step_by(16) {
                let x = s.load_n(query.wrapping_add(d), self.head_dim.saturating_sub(d).min(16));
                K::store(s, queries.add((row * padded + d) * K::BYTES), x, self.query_part::<K>());
            }
        }
        let first_seen = (0..rows).find(|&row| self.valid(row) > 0).unwrap_or(rows);
        let mut row = first_seen;
        while row < rows {
            let height = (rows - row).min(S::BLOCK_ROWS);
            let chunk = row..row + height;
            self.scores::<S, K>(s, chunk.clone(), queries, scores);
            for row in chunk.clone() {
                self.softmax::<S, K>(s, row, scores.add(row * SPAN), weights.add(row * SPAN * K::BYTES));
            }
            self.values::<S, K>(s, chunk, weights);
            row += height;
        }
    }

    /// Raw scores of a chunk of rows, for every block that its last row sees.
    #[inline(always)]
    unsafe fn scores<S: Simd, K: Storage>(
        &self,
        s: S,
        rows: Range<usize>,
        queries: *const u8,
        scores: *mut f32,
    ) {
        let blocks = self.valid(rows.end - 1).div_ceil(BLOCK_SIZE);
        let queries = queries.add(rows.start * self.layout.padded() * K::BYTES);
        let scores = scores.add(rows.start * SPAN);
        for block in (0..blocks).step_by(S::PANELS) {
            let width = (blocks - block).min(S::PANELS);
            tile!(rows.len(), width, [1 2], self.score_tile(s, block, queries, scores.add(block * BLOCK_SIZE)));
        }
    }

    #[inline(always)]
    unsafe fn score_tile<S: Simd, K: Storage, const R: usize, const C: usize>(
        &self,
        s: S,
        block: usize,
        queries: *const u8,
        scores: *mut f32,
    ) {
        if const { R > S::BLOCK_ROWS || C > S::PANELS } {
            unreachable!("no such tile on this ISA");
        }
        let mut keys = [self.head; C];
        for c in 0..C {
            keys[c] = self.unit(block + c);
        }
        let query_bytes = self.layout.padded() * K::BYTES;
        let part = self.query_part::<K>();
        let mut acc = [[s.splat(0.0); C]; R];
        for step in 0..self.head_dim / K::STEP {
            for c in 0..C {
                let w = K::load(s, keys[c].add(step * K::VECTOR));
                for r in 0..R {
                    let x = queries.add(r * query_bytes + step * K::STEP * K::BYTES);
                    acc[r][c] = K::dot(s, acc[r][c], w, x, part);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                s.store(scores.add(r * SPAN + c * BLOCK_SIZE), acc[r][c]);
            }
        }
    }

    /// Maximum, weights and their sum of one row.
    #[inline(always)]
    unsafe fn softmax<S: Simd, K: Storage>(&self, s: S, row: usize, scores: *mut f32, weights: *mut u8) {
        let valid = self.valid(row);
        let scale = s.splat(self.scale);
        let hidden = s.splat(f32::NEG_INFINITY);
        let mut maximum = hidden;
        for start in (0..valid).step_by(16) {
            let scaled = s.mul(s.load(scores.add(start)), scale);
            let seen = s.keep_first((valid - start).min(16), scaled, hidden);
            s.store(scores.add(start), seen);
            maximum = s.max(maximum, seen);
        }
        let maximum = s.reduce_max(maximum);
        let mut sum = s.splat(0.0);
        for start in (0..valid).step_by(16) {
            let weight = exp(s, s.sub(s.load(scores.add(start)), s.splat(maximum)));
            K::store(s, weights.add(start * K::BYTES), weight, self.weight_part::<K>());
            sum = s.add(sum, weight);
        }
        let partial = self.partials.add(row * self.partial_stride + self.layout.padded());
        partial.write(maximum);
        partial.add(1).write(s.reduce_add(sum));
    }

    /// Weighted values of a chunk of rows: together up to the last step that all rows see whole, then row by row.
    #[inline(always)]
    unsafe fn values<S: Simd, K: Storage>(&self, s: S, rows: Range<usize>, weights: *const u8) {
        let shared = self.valid(rows.start) / K::STEP;
        let vectors = self.layout.padded() / 16;
        let width = 2 * S::PANELS;
        for vector in (0..vectors).step_by(width) {
            let c = (vectors - vector).min(width);
            let out = self.partials.add(rows.start * self.partial_stride + vector * 16);
            let first = weights.add(rows.start * SPAN * K::BYTES);
            tile!(rows.len(), c, [1 2 3 4], self.value_tile(s, vector, 0..shared, first, out));
            for row in rows.clone() {
                let valid = self.valid(row);
                if shared * K::STEP == valid {
                    continue;
                }
                let out = self.partials.add(row * self.partial_stride + vector * 16);
                let weights = weights.add(row * SPAN * K::BYTES);
                for c in 0..c {
                    self.value_tail::<S, K>(s, vector + c, shared, valid, weights, out.add(c * 16));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn value_tile<S: Simd, K: Storage, const R: usize, const C: usize>(
        &self,
        s: S,
        vector: usize,
        steps: Range<usize>,
        weights: *const u8,
        out: *mut f32,
    ) {
        if const { R > S::BLOCK_ROWS || C > 2 * S::PANELS } {
            unreachable!("no such tile on this ISA");
        }
        let mut acc = [[s.splat(0.0); C]; R];
        let per_block = BLOCK_SIZE / K::STEP;
        let step_bytes = self.layout.padded() / 16 * K::VECTOR;
        let part = self.weight_part::<K>();
        let mut step = steps.start;
        while step < steps.end {
            let values = self.unit(step / per_block).add(self.layout.keys_bytes() + vector * K::VECTOR);
            let end = steps.end.min((step / per_block + 1) * per_block);
            for step in step..end {
                let values = values.add(step % per_block * step_bytes);
                let weights = weights.add(step * K::STEP * K::BYTES);
                let mut w = [K::load(s, values); C];
                for c in 1..C {
                    w[c] = K::load(s, values.add(c * K::VECTOR));
                }
                for r in 0..R {
                    for c in 0..C {
                        acc[r][c] = K::dot(s, acc[r][c], w[c], weights.add(r * SPAN * K::BYTES), part);
                    }
                }
            }
            step = end;
        }
        for r in 0..R {
            for c in 0..C {
                s.store(out.add(r * self.partial_stride + c * 16), acc[r][c]);
            }
        }
    }

    /// Continues one row and one vector of the head dim from step `start` to its last key.
    #[inline(always)]
    unsafe fn value_tail<S: Simd, K: Storage>(
        &self,
        s: S,
        vector: usize,
        start: usize,
        valid: usize,
        weights: *const u8,
        out: *mut f32,
    ) {
        let per_block = BLOCK_SIZE / K::STEP;
        let step_bytes = self.layout.padded() / 16 * K::VECTOR;
        let mut acc = s.load(out);
        for step in start..valid.div_ceil(K::STEP) {
            let values = self.unit(step / per_block).add(self.layout.keys_bytes() + vector * K::VECTOR);
            let values = values.add(step % per_block * step_bytes);
            let whole = (step + 1) * K::STEP <= valid;
            let w = if whole { K::load(s, values) } else { K::load_first(s, values) };
            acc = K::dot(s, acc, w, weights.add(step * K::STEP * K::BYTES), self.weight_part::<K>());
        }
        s.store(out, acc);
    }

    #[inline(always)]
    unsafe fn unit(&self, block: usize) -> *const u8 {
        self.head.add(*self.blocks.get_unchecked(block) as usize * self.layout.unit_bytes())
    }
}

/// Adds a later span to the running total of each row.
pub(super) struct MergeSpan {
    pub(super) total: *mut f32,
    pub(super) next: *const f32,
    pub(super) rows: Range<usize>,
    pub(super) stride: usize,
    pub(super) padded: usize,
}

impl Kernel for MergeSpan {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            let (total, next) = (self.total.add(row * self.stride), self.next.add(row * self.stride));
            let (stats, next_stats) = (total.add(self.padded), next.add(self.padded));
            let (maximum, next_maximum) = (s.splat(*stats), s.splat(*next_stats));
            let merged = s.max(maximum, next_maximum);
            let keep = exp(s, s.sub(maximum, merged));
            let scale = exp(s, s.sub(next_maximum, merged));
            let sum = combine(s, s.splat(*stats.add(1)), keep, s.splat(*next_stats.add(1)), scale);
            s.store_n(stats, 1, merged);
            s.store_n(stats.add(1), 1, sum);
            for d in (0..self.padded).step_by(16) {
                s.store(total.add(d), combine(s, s.load(total.add(d)), keep, s.load(next.add(d)), scale));
            }
        }
    }
}

#[inline(always)]
unsafe fn combine<S: Simd>(s: S, a: S::F, keep: S::F, b: S::F, scale: S::F) -> S::F {
    s.add(s.mul(a, keep), s.mul(b, scale))
}

/// Divides by the sum of weights and writes the head.
pub(super) struct FinishRows {
    pub(super) total: *const f32,
    pub(super) stride: usize,
    pub(super) padded: usize,
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    pub(super) tokens: usize,
    pub(super) group: usize,
    pub(super) head_dim: usize,
}

impl Kernel for FinishRows {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for row in 0..self.tokens * self.group {
            let (token, head) = (row / self.group, row % self.group);
            let total = self.total.add(row * self.stride);
            let out = self.out.add(token * self.out_stride + head * self.head_dim);
            let sum = s.splat(*total.add(self.padded + 1));
            for d in (0..self.head_dim).step_by(16) {
                let n = (self.head_dim - d).min(16);
                s.store_n(out.add(d), n, s.div(s.load(total.add(d)), sum));
            }
        }
    }
}
