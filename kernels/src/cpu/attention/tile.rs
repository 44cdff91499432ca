//! One tile: query tokens of a sequence with the query heads of one KV head, over all keys or over one span of them.
//!
//! Rows (token · group + head of the group) are taken in chunks, see [`super::chunk`]. A span's partial result of a row is
//! the weighted values [padded head dim], then the maximum of its scores (in powers of two) and the sum of its weights.

use std::ops::Range;

use super::SPAN;
use super::chunk::{Buffers, Chunk, MAX_ROWS, chunk_rows};
use super::operand::{Bytes, Floats, Halves, Operand, Pairs, Source, row_bytes};
use crate::cpu::kv_cache::{BLOCK_SIZE, KvLayer, MAX_HEAD_DIM};
use crate::cpu::math::{exp2, exp2_polynomial};
use crate::cpu::simd::{Kernel, Simd};
use crate::{AttentionPrecision, KvDType};

pub(super) struct Tile<'a> {
    pub(super) kv: KvLayer,
    pub(super) kv_head: usize,
    /// The sequence's blocks.
    pub(super) blocks: &'a [u32],
    /// First token, first head of the group.
    pub(super) queries: *const f32,
    pub(super) query_stride: usize,
    pub(super) num_tokens: usize,
    pub(super) group: usize,
    /// Keys that the first token sees; each later token sees one more.
    pub(super) first_limit: usize,
    /// Scale of the scores times log2 e.
    pub(super) scale: f32,
    pub(super) precision: AttentionPrecision,
}

impl Tile<'_> {
    pub(super) const fn num_spans(&self) -> usize {
        (self.first_limit + self.num_tokens - 1).div_ceil(SPAN)
    }

    const fn rows(&self) -> usize {
        self.num_tokens * self.group
    }

    /// Keys of a span that each of `rows` sees; the last repeats.
    #[inline(always)]
    fn valid(&self, span: usize, rows: Range<usize>) -> [usize; MAX_ROWS] {
        let (mut token, mut head) = (rows.start / self.group, rows.start % self.group);
        let mut valid = [0; MAX_ROWS];
        for row in 0..MAX_ROWS {
            valid[row] = (self.first_limit + token - span * SPAN).min(SPAN);
            if row + 1 < rows.len() {
                head += 1;
                if head == self.group {
                    (token, head) = (token + 1, 0);
                }
            }
        }
        valid
    }

    /// Rows that see no key of a span come first.
    fn hidden_rows(&self, span: usize) -> usize {
        (span * SPAN + 1).saturating_sub(self.first_limit).min(self.num_tokens) * self.group
    }
}

/// f32 values of a row's partial result: maximum and sum have a cache line of their own.
pub(super) const fn partial_stride(padded: usize) -> usize {
    padded + 16
}

/// Bytes of scratch memory for the largest tile of `rows` rows.
pub(super) const fn scratch_bytes(rows: usize) -> usize {
    // A row of queries has the same bytes in f32 and in two parts of bf16, the most there are.
    rows * row_bytes::<Floats, MAX_HEAD_DIM>() + rows * partial_stride(MAX_HEAD_DIM) * 4 + Buffers::MAX_BYTES
}

/// What to do with a tile.
#[derive(Clone, Copy)]
pub(super) enum Task {
    /// All spans in order, divided by the sums and written to the first token and first head of the group.
    Whole { out: *mut f32, out_stride: usize },
    /// The partial results of one span, [rows][stride], for the rows that see any of it.
    Span { index: usize, partials: *mut f32 },
}

/// Computes a task in a worker's scratch memory.
pub(super) struct TileKernel<'a> {
    pub(super) tile: &'a Tile<'a>,
    pub(super) task: Task,
    pub(super) scratch: *mut u8,
}

impl Kernel for TileKernel<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        match (self.tile.kv.layout.dtype(), self.tile.precision) {
            (KvDType::Bf16, AttentionPrecision::Rounded) => self.compute::<S, RoundedPairs>(s),
            (KvDType::Bf16, AttentionPrecision::Split) => self.compute::<S, SplitPairs>(s),
            (KvDType::Int8, _) => self.compute::<S, Integers>(s),
            (KvDType::F32, _) => self.compute::<S, Single>(s),
            (KvDType::F16, _) => self.compute::<S, Half>(s),
        }
    }
}

/// What the cache's dtype and the precision make of a tile.
pub(super) trait Numbers {
    /// Queries beside keys, and softmax weights beside values.
    type Operand: Operand;
    /// Whether weights are rounded so much that a short polynomial gives the same.
    const SHORT_EXP2: bool;
}

macro_rules! numbers {
    ($($name:ident: $operand:ty, $short:literal;)+) => {
        $(struct $name;

        impl Numbers for $name {
            type Operand = $operand;
            const SHORT_EXP2: bool = $short;
        })+
    };
}

numbers! {
    RoundedPairs: Pairs<1>, true;
    SplitPairs: Pairs<2>, false;
    Integers: Bytes, false;
    Single: Floats, false;
    Half: Halves, false;
}

/// A query head.
struct Query {
    values: *const f32,
    head_dim: usize,
}

impl Source for Query {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, s: S, index: usize) -> S::F {
        s.load_n(self.values.add(index * 16), (self.head_dim - index * 16).min(16))
    }
}

impl TileKernel<'_> {
    #[inline(always)]
    unsafe fn compute<S: Simd, K: Numbers>(&self, s: S) {
        let rows = self.tile.rows();
        let query_bytes = rows * row_bytes::<K::Operand, MAX_HEAD_DIM>();
        self.pack_queries::<S, K>(s);
        let totals = self.scratch.add(query_bytes).cast::<f32>();
        let rest = self.scratch.add(query_bytes + rows * self.stride() * 4);
        // One loop for both tasks, so that the code of a span stands here once.
        let (spans, partials) = match self.task {
            Task::Whole { .. } => (0..self.tile.num_spans(), totals),
            Task::Span { index, partials } => (index..index + 1, partials),
        };
        for span in spans.clone() {
            self.span::<S, K>(s, span, partials, span > spans.start, rest);
        }
        if let Task::Whole { out, out_stride } = self.task {
            finish_rows(s, self.tile, totals, out, out_stride);
        }
    }

    #[inline(always)]
    fn stride(&self) -> usize {
        partial_stride(self.tile.kv.layout.padded())
    }

    #[inline(always)]
    unsafe fn pack_queries<S: Simd, K: Numbers>(&self, s: S) {
        let tile = self.tile;
        let head_dim = tile.kv.head_dim;
        for token in 0..tile.num_tokens {
            for head in 0..tile.group {
                let row = token * tile.group + head;
                let packed = self.scratch.add(row * row_bytes::<K::Operand, MAX_HEAD_DIM>());
                let values = tile.queries.add(token * tile.query_stride + head * head_dim);
                let vectors = tile.kv.layout.padded() / 16;
                K::Operand::pack::<S, MAX_HEAD_DIM>(s, packed, vectors, &Query { values, head_dim });
            }
        }
    }

    /// One span for every row that sees any of it: added to `partials` if `merge`, else written there.
    #[inline(always)]
    unsafe fn span<S: Simd, K: Numbers>(
        &self,
        s: S,
        span: usize,
        partials: *mut f32,
        merge: bool,
        scratch: *mut u8,
    ) {
        let tile = self.tile;
        let start = span * SPAN;
        let buffers = Buffers::new::<K>(scratch);
        let mut row = tile.hidden_rows(span);
        while row < tile.rows() {
            let height = chunk_rows::<S, K>(tile.rows() - row);
            let rows = row..row + height;
            let out = partials.add(row * self.stride());
            let chunk = Chunk {
                head: tile.kv.head(tile.kv_head),
                layout: tile.kv.layout,
                head_dim: tile.kv.head_dim,
                blocks: &tile.blocks[start / BLOCK_SIZE..],
                queries: self.scratch.add(row * row_bytes::<K::Operand, MAX_HEAD_DIM>()),
                rows: height,
                valid: tile.valid(span, rows.clone()),
                scale: tile.scale,
                out: if merge { buffers.partials } else { out },
                stride: self.stride(),
                buffers,
            };
            chunk.run::<S, K>(s);
            if merge {
                merge_rows(s, out, buffers.partials, 0..height, tile.kv.layout.padded());
            }
            row = rows.end;
        }
    }
}

/// Merges the partial results of a tile's spans, [spans][rows][stride], in order, and writes the output.
pub(super) struct MergeKernel<'a> {
    pub(super) tile: &'a Tile<'a>,
    pub(super) partials: *mut f32,
    /// f32 values from one span's partials to the next.
    pub(super) span_stride: usize,
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
}

impl Kernel for MergeKernel<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let tile = self.tile;
        for span in 1..tile.num_spans() {
            let next = self.partials.add(span * self.span_stride);
            let rows = tile.hidden_rows(span)..tile.rows();
            merge_rows(s, self.partials, next, rows, tile.kv.layout.padded());
        }
        finish_rows(s, tile, self.partials, self.out, self.out_stride);
    }
}

/// Adds a later span to the running total of each row.
#[inline(always)]
unsafe fn merge_rows<S: Simd>(s: S, total: *mut f32, next: *const f32, rows: Range<usize>, padded: usize) {
    let stride = partial_stride(padded);
    for row in rows {
        let (total, next) = (total.add(row * stride), next.add(row * stride));
        let (stats, next_stats) = (total.add(padded), next.add(padded));
        let (maximum, next_maximum) = (s.splat(*stats), s.splat(*next_stats));
        // The larger maximum keeps its weights; a NaN on either side makes one of the factors NaN.
        let one = s.splat(1.0);
        let down = exp2(s, s.sub(next_maximum, maximum), &exp2_polynomial::LONG);
        let up = exp2(s, s.sub(maximum, next_maximum), &exp2_polynomial::LONG);
        let keep = s.select_lt(maximum, next_maximum, up, one);
        let scale = s.select_lt(maximum, next_maximum, one, down);
        let merged = s.select_lt(maximum, next_maximum, next_maximum, maximum);
        let sum = combine(s, s.splat(*stats.add(1)), keep, s.splat(*next_stats.add(1)), scale);
        s.store_n(stats, 1, merged);
        s.store_n(stats.add(1), 1, sum);
        for d in (0..padded).step_by(16) {
            s.store(total.add(d), combine(s, s.load(total.add(d)), keep, s.load(next.add(d)), scale));
        }
    }
}

#[inline(always)]
unsafe fn combine<S: Simd>(s: S, a: S::F, keep: S::F, b: S::F, scale: S::F) -> S::F {
    s.add(s.mul(a, keep), s.mul(b, scale))
}

/// Divides by the sum of weights and writes the heads.
#[inline(always)]
unsafe fn finish_rows<S: Simd>(s: S, tile: &Tile<'_>, totals: *const f32, out: *mut f32, out_stride: usize) {
    let (head_dim, padded) = (tile.kv.head_dim, tile.kv.layout.padded());
    for token in 0..tile.num_tokens {
        for head in 0..tile.group {
            let total = totals.add((token * tile.group + head) * partial_stride(padded));
            let out = out.add(token * out_stride + head * head_dim);
            let inverse = s.div(s.splat(1.0), s.splat(*total.add(padded + 1)));
            for d in (0..head_dim).step_by(16) {
                let n = (head_dim - d).min(16);
                s.store_n(out.add(d), n, s.mul(s.load(total.add(d)), inverse));
            }
        }
    }
}
