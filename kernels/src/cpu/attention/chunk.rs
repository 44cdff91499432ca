//! A chunk of a tile's rows over one span: scores, softmax weights, weighted values. Its buffers stay in the L1 cache.
//!
//! Scores run over blocks with lanes over slots, values over slots with lanes over the head dim. Each sum is one chain, in
//! the order of the head dim or of the slots, whatever the shape of the register tile.
//!
//! Scores of slots that a row does not see are never looked at. Its sum over values may pass finite values of later tokens of
//! the chunk with weights of zero; what is not finite, and what free slots hold, it never meets.
//!
//! # Register tiles
//! Two pipes with a latency of six cycles want twelve sums in flight, and a step of R rows and C vectors loads R + C times
//! for R · C dot products. AVX-512 has room for 24 sums: 12 × 2 in a prompt, 3 × 8 for a group of three decoding.

use std::marker::PhantomData;

use super::SPAN;
use super::operand::{Floats, Operand, Source, row_bytes};
use super::tile::{Numbers, partial_stride};
use crate::cpu::kv_cache::{BLOCK_SIZE, MAX_HEAD_DIM, UnitLayout};
use crate::cpu::math::{exp2, exp2_polynomial};
use crate::cpu::simd::{Kernel, Simd};

/// The most rows of a chunk.
pub(super) const MAX_ROWS: usize = 12;

/// Rows up to which keys and values are used too few times to hide where they come from.
const PREFETCH_ROWS: usize = 4;

/// Runs `$tile::<O, R, C>` with `$fields` for run-time rows and vectors.
macro_rules! register_tile {
    ($s:expr, $r:expr, $c:expr, $tile:ident::<$operand:ty> $fields:tt) => {
        register_tile!(@match $s, $r, $c, $tile, $operand, $fields,
            (1 1) (1 2) (1 4) (1 8) (2 1) (2 2) (2 4) (2 8) (3 1) (3 2) (3 4) (3 8)
            (4 1) (4 2) (4 4) (6 1) (6 2) (6 4) (12 1) (12 2))
    };
    (@match $s:expr, $r:expr, $c:expr, $tile:ident, $operand:ty, $fields:tt, $(($rs:literal $cs:literal))+) => {
        match ($r, $c) {
            $(($rs, $cs) => register_tile!(@call $s, $tile, $operand, $rs, $cs, $fields),)+
            _ => unreachable!("tiles of these rows and vectors only"),
        }
    };
    (@call $s:expr, $tile:ident, $operand:ty, $r:literal, $c:literal, { $($field:ident: $value:expr),+ }) => {
        $s.call($tile::<$operand, $r, $c> { $($field: $value,)+ operand: PhantomData })
    };
}

/// Sums that registers hold.
const fn sums<S: Simd, O: Operand>() -> usize {
    let vectors = if S::PANELS == 2 {
        24
    } else if O::EMULATED {
        S::BLOCK_ROWS
    } else {
        S::PLAIN_ROWS
    };
    vectors.div_ceil(O::SUMS)
}

/// The widest power of two that fits beside `rows` into registers.
const fn widest<S: Simd, O: Operand>(rows: usize) -> usize {
    let fit = sums::<S, O>() / rows;
    if fit >= 8 { 8 } else { 1 << fit.ilog2() }
}

/// How many of `left` rows the next chunk takes.
#[inline(always)]
pub(super) fn chunk_rows<S: Simd, K: Numbers>(left: usize) -> usize {
    match left.min(sums::<S, K::Operand>() / S::PANELS) {
        height @ (1..=6 | MAX_ROWS) => height,
        _ => 6,
    }
}

/// Rows of the register tile that computes `rows`; what it reads and makes of a sixth one is not used.
const fn tile_rows(rows: usize) -> usize {
    if rows == 5 { 6 } else { rows }
}

/// Memory of one chunk.
#[derive(Clone, Copy)]
pub(super) struct Buffers {
    /// [MAX_ROWS][SPAN]
    scores: *mut f32,
    /// [MAX_ROWS] packed rows
    weights: *mut u8,
    /// [MAX_ROWS][stride]: the chunk's partial results while they are not merged.
    pub(super) partials: *mut f32,
}

impl Buffers {
    pub(super) const MAX_BYTES: usize =
        MAX_ROWS * (SPAN * 4 + row_bytes::<Floats, SPAN>() + partial_stride(MAX_HEAD_DIM) * 4);

    pub(super) unsafe fn new<K: Numbers>(scratch: *mut u8) -> Self {
        let weights = scratch.add(MAX_ROWS * SPAN * 4);
        let partials = weights.add(MAX_ROWS * row_bytes::<K::Operand, SPAN>()).cast();
        Self { scores: scratch.cast(), weights, partials }
    }
}

pub(super) struct Chunk<'a> {
    /// Block 0 of the KV head.
    pub(super) head: *const u8,
    pub(super) layout: UnitLayout,
    pub(super) head_dim: usize,
    /// The sequence's blocks from the span's first one on.
    pub(super) blocks: &'a [u32],
    /// The first row's packed queries.
    pub(super) queries: *const u8,
    pub(super) rows: usize,
    /// Keys of the span that each row sees, at least one, never fewer than the row before; the last repeats.
    pub(super) valid: [usize; MAX_ROWS],
    /// Scale of the scores times log2 e.
    pub(super) scale: f32,
    /// [rows][stride]: weighted values, maximum, sum.
    pub(super) out: *mut f32,
    pub(super) stride: usize,
    pub(super) buffers: Buffers,
}

/// Softmax weights of one row.
struct Softmax<'a, const SHORT_EXP2: bool> {
    scores: *mut f32,
    scale: f32,
    /// Of the scores, scaled.
    maximum: f32,
    valid: &'a usize,
}

impl<const SHORT_EXP2: bool> Source for Softmax<'_, SHORT_EXP2> {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, s: S, index: usize) -> S::F {
        let score = s.load(self.scores.add(index * 16));
        let x = s.fma(score, s.splat(self.scale), s.splat(-self.maximum));
        let weight =
            if SHORT_EXP2 { exp2(s, x, &exp2_polynomial::SHORT) } else { exp2(s, x, &exp2_polynomial::LONG) };
        let left = self.valid.saturating_sub(index * 16);
        if left >= 16 { weight } else { s.keep_first(left, weight, s.splat(0.0)) }
    }
}

/// f32 values as they are.
struct Plain(*const f32);

impl Source for Plain {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, s: S, index: usize) -> S::F {
        s.load(self.0.add(index * 16))
    }
}

impl Chunk<'_> {
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd, K: Numbers>(&self, s: S) {
        self.scores::<S, K>(s);
        for row in 0..self.rows {
            self.softmax::<S, K>(s, row);
        }
        self.values::<S, K>(s);
    }

    fn last(&self) -> usize {
        self.valid[MAX_ROWS - 1]
    }

    /// Scores before scaling, for every block that the last row sees.
    #[inline(always)]
    unsafe fn scores<S: Simd, K: Numbers>(&self, s: S) {
        let blocks = self.last().div_ceil(BLOCK_SIZE);
        let rows = tile_rows(self.rows);
        let widest = widest::<S, K::Operand>(rows);
        let mut block = 0;
        while block < blocks {
            let width = widest.min(1 << (blocks - block).ilog2());
            register_tile!(s, rows, width, ScoreTile::<K::Operand> { chunk: self, block: block });
            block += width;
        }
    }

    /// Weights, their maximum and their sum.
    #[inline(always)]
    unsafe fn softmax<S: Simd, K: Numbers>(&self, s: S, row: usize) {
        let scores = self.buffers.scores.add(row * SPAN);
        let valid = self.valid[row];
        let hidden = s.splat(f32::NEG_INFINITY);
        let mut maxima = [hidden; 4];
        let whole = valid / 16;
        for fourth in 0..whole / 4 {
            for i in 0..4 {
                maxima[i] = s.max(maxima[i], s.load(scores.add(fourth * 64 + i * 16)));
            }
        }
        for index in whole / 4 * 4..whole {
            maxima[0] = s.max(maxima[0], s.load(scores.add(index * 16)));
        }
        if !valid.is_multiple_of(16) {
            let seen = s.keep_first(valid % 16, s.load(scores.add(whole * 16)), hidden);
            maxima[0] = s.max(maxima[0], seen);
        }
        let maximum = s.max(s.max(maxima[0], maxima[1]), s.max(maxima[2], maxima[3]));
        let maximum = s.reduce_max(maximum) * self.scale;
        let weights = self.buffers.weights.add(row * row_bytes::<K::Operand, SPAN>());
        let stats = self.out.add(row * self.stride + self.layout.padded());
        stats.write(maximum);
        // Behind its last key a row has weights of zero, as far as other rows go.
        let vectors = self.last().div_ceil(16);
        if K::Operand::INTEGERS {
            let source = Softmax::<false> { scores, scale: self.scale, maximum, valid: &valid };
            stats.add(1).write(self.scale_weights(s, source, vectors));
            K::Operand::pack::<S, SPAN>(s, weights, vectors, &Plain(scores));
            return;
        }
        if K::SHORT_EXP2 {
            let source = Softmax::<true> { scores, scale: self.scale, maximum, valid: &valid };
            K::Operand::pack::<S, SPAN>(s, weights, vectors, &source);
        } else {
            let source = Softmax::<false> { scores, scale: self.scale, maximum, valid: &valid };
            K::Operand::pack::<S, SPAN>(s, weights, vectors, &source);
        }
        stats.add(1).write(K::Operand::total::<S, SPAN>(s, weights, vectors));
    }

    /// Puts weights times the scales of their values into the place of a row's scores; returns the sum of the weights.
    #[inline(always)]
    unsafe fn scale_weights<S: Simd>(&self, s: S, softmax: Softmax<'_, false>, vectors: usize) -> f32 {
        let mut sum = s.splat(0.0);
        for index in 0..vectors {
            let weight = softmax.vector(s, index);
            sum = s.add(sum, weight);
            let scales = self.unit(index).add(self.layout.scales_at()).cast::<f32>().add(BLOCK_SIZE);
            // Slots that the row does not see may have any scale.
            let left = softmax.valid.saturating_sub(index * 16).min(16);
            let scaled = s.keep_first(left, s.mul(weight, s.load(scales)), s.splat(0.0));
            s.store(softmax.scores.add(index * 16), scaled);
        }
        s.reduce_add(sum)
    }

    /// Weighted values. Rows go together to the last slot that any of them sees, with weights of zero where one sees less:
    /// that adds nothing if those values are finite. If they are not, each row goes alone.
    #[inline(always)]
    unsafe fn values<S: Simd, K: Numbers>(&self, s: S) {
        if K::Operand::INTEGERS
            || self.valid[0] == self.last()
            || self.unshared_are_finite::<S, K::Operand>(s)
        {
            return self.values_together::<S, K>(s);
        }
        for row in 0..self.rows {
            let weights = self.buffers.weights.add(row * row_bytes::<K::Operand, SPAN>());
            let alone = Chunk {
                rows: 1,
                valid: [self.valid[row]; MAX_ROWS],
                out: self.out.add(row * self.stride),
                buffers: Buffers { weights, ..self.buffers },
                ..*self
            };
            alone.values_together::<S, K>(s);
        }
    }

    /// Whether all values are finite that some rows see and others do not (and, in the same step, one that all see).
    #[inline(always)]
    unsafe fn unshared_are_finite<S: Simd, O: Operand>(&self, s: S) -> bool {
        let vectors = self.layout.padded() / 16;
        let per_block = BLOCK_SIZE / O::STEP;
        let mut largest = s.splat_i(0);
        for step in self.valid[0] / O::STEP..self.last().div_ceil(O::STEP) {
            let values = self
                .unit(step / per_block)
                .add(self.layout.keys_bytes() + step % per_block * vectors * O::VECTOR);
            let whole = (step + 1) * O::STEP <= self.last();
            for vector in 0..vectors {
                let values = values.add(vector * O::VECTOR);
                let stored = if whole { O::load(s, values) } else { O::load_first(s, values) };
                largest = s.max_u(largest, O::magnitude(s, stored));
            }
        }
        f32::from_bits(s.reduce_max_u(largest)).is_finite()
    }

    #[inline(always)]
    unsafe fn values_together<S: Simd, K: Numbers>(&self, s: S) {
        let rows = tile_rows(self.rows);
        let widest = widest::<S, K::Operand>(rows);
        let vectors = self.layout.padded() / 16;
        let mut vector = 0;
        while vector < vectors {
            let width = widest.min(1 << (vectors - vector).ilog2());
            register_tile!(s, rows, width, ValueTile::<K::Operand> { chunk: self, vector: vector });
            vector += width;
        }
    }

    /// What is read `ahead` blocks after the keys of a block: further keys of the span, then its first values.
    #[inline(always)]
    unsafe fn after_keys(&self, block: usize, ahead: usize) -> *const u8 {
        let blocks = self.last().div_ceil(BLOCK_SIZE);
        if block + ahead < blocks {
            self.unit(block + ahead)
        } else {
            self.unit((block + ahead - blocks).min(blocks - 1)).add(self.layout.keys_bytes())
        }
    }

    /// What is read some blocks after the values of a block: further values, then the next span's first keys.
    #[inline(always)]
    unsafe fn after_values(&self, block: usize) -> *const u8 {
        const AHEAD: usize = 4;
        let blocks = self.last().div_ceil(BLOCK_SIZE);
        if block + AHEAD < blocks {
            self.unit(block + AHEAD).add(self.layout.keys_bytes())
        } else {
            // A span that is not full is the last one: what lies behind it is not read.
            self.unit((SPAN / BLOCK_SIZE + block + AHEAD - blocks).min(self.blocks.len() - 1))
        }
    }

    #[inline(always)]
    unsafe fn unit(&self, block: usize) -> *const u8 {
        self.head.add(*self.blocks.get_unchecked(block) as usize * self.layout.unit_bytes())
    }
}

/// Scores of R rows and C blocks.
struct ScoreTile<'a, O, const R: usize, const C: usize> {
    chunk: &'a Chunk<'a>,
    block: usize,
    operand: PhantomData<O>,
}

impl<O: Operand, const R: usize, const C: usize> Kernel for ScoreTile<'_, O, R, C> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { chunk, block, .. } = self;
        if const { R * C > sums::<S, O>() } {
            unreachable!("no such tile on this ISA");
        }
        let row_bytes = const { row_bytes::<O, MAX_HEAD_DIM>() };
        let part = MAX_HEAD_DIM * O::BYTES;
        let mut keys = [chunk.head; C];
        let mut ahead = [chunk.head; C];
        for c in 0..C {
            keys[c] = chunk.unit(block + c);
            ahead[c] = chunk.after_keys(block + c, C);
        }
        let mut sums = [[O::zero(s); C]; R];
        for step in 0..chunk.head_dim.div_ceil(O::STEP) {
            let query = chunk.queries.add(step * O::STEP * O::BYTES);
            let offset = step * O::VECTOR;
            if R <= PREFETCH_ROWS {
                for c in 0..C {
                    s.prefetch(ahead[c].wrapping_add(offset));
                }
            }
            let mut stored = keys;
            for c in 0..C {
                stored[c] = keys[c].add(offset);
            }
            dots::<S, O, R, C>(s, &mut sums, stored, query, row_bytes, part);
        }
        for r in 0..R {
            if r < chunk.rows {
                let end = chunk.queries.add(r * row_bytes + O::PARTS * part);
                for c in 0..C {
                    let mut score = O::finish(s, sums[r][c], end);
                    if O::INTEGERS {
                        score = s.mul(score, s.load(keys[c].add(chunk.layout.scales_at()).cast()));
                    }
                    s.store(chunk.buffers.scores.add(r * SPAN + (block + c) * BLOCK_SIZE), score);
                }
            }
        }
    }
}

/// Weighted values of R rows and C vectors of the head dim, up to the last slot that any row sees.
struct ValueTile<'a, O, const R: usize, const C: usize> {
    chunk: &'a Chunk<'a>,
    vector: usize,
    operand: PhantomData<O>,
}

impl<O: Operand, const R: usize, const C: usize> Kernel for ValueTile<'_, O, R, C> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { chunk, vector, .. } = self;
        if const { R * C > sums::<S, O>() } {
            unreachable!("no such tile on this ISA");
        }
        let row_bytes = const { row_bytes::<O, SPAN>() };
        let part = SPAN * O::BYTES;
        let per_block = BLOCK_SIZE / O::STEP;
        let step_bytes = chunk.layout.padded() / 16 * O::VECTOR;
        let first = chunk.layout.keys_bytes() + vector * O::VECTOR;
        let last = chunk.last();
        // Of integers a last step may hold slots that no row sees: their weights are zero.
        let steps = if O::INTEGERS { last.div_ceil(O::STEP) } else { last / O::STEP };
        let mut sums = [[O::zero(s); C]; R];
        for block in 0..steps.div_ceil(per_block) {
            let values = chunk.unit(block).add(first);
            let ahead = chunk.after_values(block).wrapping_add(vector * O::VECTOR);
            let start = block * per_block;
            let weights = chunk.buffers.weights.add(start * O::STEP * O::BYTES);
            for step in 0..per_block.min(steps - start) {
                let values = values.add(step * step_bytes);
                if R <= PREFETCH_ROWS {
                    for c in 0..C {
                        s.prefetch(ahead.wrapping_add(step * step_bytes + c * O::VECTOR));
                    }
                }
                let weights = weights.add(step * O::STEP * O::BYTES);
                let mut stored = [values; C];
                for c in 1..C {
                    stored[c] = values.add(c * O::VECTOR);
                }
                dots::<S, O, R, C>(s, &mut sums, stored, weights, row_bytes, part);
            }
        }
        if steps * O::STEP < last {
            let values = chunk.unit(steps / per_block).add(first + steps % per_block * step_bytes);
            let weights = chunk.buffers.weights.add(steps * O::STEP * O::BYTES);
            for c in 0..C {
                let stored = O::load_first(s, values.add(c * O::VECTOR));
                for r in 0..R {
                    sums[r][c] = O::dot(s, sums[r][c], stored, weights.add(r * row_bytes), part);
                }
            }
        }
        for r in 0..R {
            if r < chunk.rows {
                let end = chunk.buffers.weights.add(r * row_bytes + O::PARTS * part);
                let out = chunk.out.add(r * chunk.stride + vector * 16);
                for c in 0..C {
                    // Adding zero takes the sign from a zero: it may hang on slots that the row does not see.
                    s.store(out.add(c * 16), s.add(O::finish(s, sums[r][c], end), s.splat(0.0)));
                }
            }
        }
    }
}

/// One step of a register tile. The fewer of rows and vectors stay in registers.
#[inline(always)]
unsafe fn dots<S: Simd, O: Operand, const R: usize, const C: usize>(
    s: S,
    sums: &mut [[O::Sum<S>; C]; R],
    stored: [*const u8; C],
    row: *const u8,
    row_bytes: usize,
    part: usize,
) {
    if R < C {
        for c in 0..C {
            let vector = O::load(s, stored[c]);
            for r in 0..R {
                sums[r][c] = O::dot(s, sums[r][c], vector, row.add(r * row_bytes), part);
            }
        }
        return;
    }
    let mut vectors = [O::load(s, stored[0]); C];
    for c in 1..C {
        vectors[c] = O::load(s, stored[c]);
    }
    for r in 0..R {
        for c in 0..C {
            sums[r][c] = O::dot(s, sums[r][c], vectors[c], row.add(r * row_bytes), part);
        }
    }
}
