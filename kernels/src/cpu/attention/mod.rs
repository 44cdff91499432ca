//! Paged causal attention with grouped query heads.
//!
//! # Order
//! Keys are walked in **spans** of 256 tokens from position 0. A span's partial softmax (maximum, sum, weighted values) is
//! computed on its own and partials are merged in order, so a query's result is the same bits whether it comes as
//! one token or inside a chunk, and whether one worker walks all spans or each span has its own.
//!
//! # Work
//! An item is a [`tile`]: (sequence, tile of query tokens, KV head). All query heads of the group and up to 12 rows share
//! each load of a key or value, and up to 48 rows each fetch of a span into the near caches. When there are fewer items
//! than workers could use (one long sequence decoding), items are split by span into a partial buffer and merged by a
//! second pass. [`LayerAttention::rows`] does any rows of the step on one worker.
//!
//! # Precision
//! With a bf16 cache queries and softmax weights are bf16 numbers, or sums of two ([`AttentionPrecision`]), multiplied by the
//! bf16 dot product with f32 sums. The sum that divides is that of the rounded weights, so rounding does not bias. With f32
//! and f16 caches everything is f32. With an int8 cache queries and weights are integers as well: a row of queries has one
//! scale, and so has a row's span of weights, after each was multiplied with the scale of its value.

mod chunk;
mod operand;
mod tile;

use std::ops::Range;

use tile::{MergeKernel, Task, Tile, TileKernel, partial_stride, scratch_bytes};

use super::activation::whole_rows;
use super::buffer::{Bytes, SharedMut};
use super::isa::Detected;
use super::kv_cache::{BLOCK_SIZE, KvCache, KvLayer};
use super::simd::dispatch;
use super::{Cpu, Scratch};
use crate::AttentionPrecision;

/// Keys whose softmax is taken together; part of the numeric class.
pub(crate) const SPAN: usize = 256;

/// Rows (query tokens × heads of the group) of a tile: enough to read a long context seldom, and still many items.
const MAX_TILE_ROWS: usize = 48;
/// Rows of a tile when there is little to share out.
const MIN_TILE_ROWS: usize = 12;

/// The most query heads per KV head that attention takes; bounds the scratch memory of a tile.
pub const MAX_GROUP: usize = 128;

/// Scores times output width below which the caller is done before a worker would have started (about 2 µs).
const WORTH_A_FORK: usize = 128 * 1024;

/// The sequences of a step. `S` sequences, `T` tokens.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBatch<'a> {
    /// [S + 1]: where each sequence's tokens start among the T.
    pub cu_seqlens: &'a [u32],
    /// [S]: tokens cached before this step.
    pub context_lens: &'a [u32],
    /// The blocks of all sequences, one sequence after another.
    pub block_tables: &'a [u32],
    /// [S + 1]: where each sequence's blocks start.
    pub block_table_offsets: &'a [u32],
}

impl AttentionBatch<'_> {
    fn rows(&self) -> usize {
        *self.cu_seqlens.last().expect("cu_seqlens has an end") as usize
    }

    fn check(&self, num_blocks: usize) {
        let sequences = self.context_lens.len();
        assert_eq!(self.cu_seqlens.len(), sequences + 1, "cu_seqlens");
        assert_eq!(self.block_table_offsets.len(), sequences + 1, "block table offsets");
        assert_eq!(self.cu_seqlens[0], 0, "start of cu_seqlens");
        for sequence in 0..sequences {
            assert!(self.cu_seqlens[sequence] <= self.cu_seqlens[sequence + 1], "cu_seqlens decreases");
            let blocks = self.blocks(sequence);
            let needed = self.keys(sequence).div_ceil(BLOCK_SIZE);
            assert!(
                self.tokens(sequence).is_empty() || blocks.len() >= needed,
                "{} blocks where {needed} are needed",
                blocks.len()
            );
            assert!(blocks.iter().all(|&block| (block as usize) < num_blocks), "block outside the cache");
        }
    }

    /// Tokens cached when the step is done.
    fn keys(&self, sequence: usize) -> usize {
        self.context_lens[sequence] as usize + self.tokens(sequence).len()
    }

    fn tokens(&self, sequence: usize) -> Range<usize> {
        self.cu_seqlens[sequence] as usize..self.cu_seqlens[sequence + 1] as usize
    }

    fn blocks(&self, sequence: usize) -> &[u32] {
        let range =
            self.block_table_offsets[sequence] as usize..self.block_table_offsets[sequence + 1] as usize;
        &self.block_tables[range]
    }
}

impl Cpu {
    /// `out` f32 [T, H·D] = attention of the query heads of `qkv` f32 [T, (H + 2K)·D] over the cached keys and values of
    /// `layer`, which hold the step's own tokens already. The query at position p sees keys 0..=p.
    ///
    /// # Panics
    /// If shapes do not match the cache, a block table is too short or names a block outside the cache.
    pub fn attention(
        &self,
        qkv: &[f32],
        batch: &AttentionBatch<'_>,
        layer: usize,
        kv: &KvCache,
        scale: f32,
        precision: AttentionPrecision,
        out: &mut [f32],
    ) {
        let rows = batch.rows();
        if rows == 0 {
            return;
        }
        let (qkv_width, out_width) = (whole_rows(qkv.len(), rows), whole_rows(out.len(), rows));
        let layer = LayerAttention::new(
            SharedMut::new(qkv.as_ptr().cast_mut()),
            qkv_width,
            batch,
            kv.layer_for_reading(layer),
            scale,
            precision,
        );
        assert_eq!(out_width, layer.out_width(), "width of the attention output");
        let out = SharedMut::new(out.as_mut_ptr());
        let scores: usize = (0..batch.context_lens.len())
            .map(|sequence| batch.tokens(sequence).len() * batch.keys(sequence))
            .sum();
        if self.threads() == 1 || scores * out_width < WORTH_A_FORK {
            // SAFETY: qkv and out have all rows; no job is running, so the caller is worker 0.
            unsafe { layer.rows(self.detected(), self.scratch.of(0), 0..rows, out.get()) };
            return;
        }
        self.share_out_attention(&layer, out);
    }

    fn share_out_attention(&self, layer: &LayerAttention<'_>, out: SharedMut<f32>) {
        let (batch, isa, scratch) = (layer.batch, self.detected(), &self.scratch);
        // About eight items per worker, so that they finish together.
        let rows_per_item = batch.rows() * layer.group * layer.kv.num_kv_heads / (8 * self.threads());
        let tile_tokens = (rows_per_item.clamp(MIN_TILE_ROWS, MAX_TILE_ROWS) / layer.group).max(1);
        let mut tile_ends = self.tile_ends.borrow_mut();
        tile_ends.clear();
        let (mut tiles, mut spans) = (0, 0);
        for sequence in 0..batch.context_lens.len() {
            tiles += batch.tokens(sequence).len().div_ceil(tile_tokens);
            tile_ends.push(tiles);
            spans = spans.max(batch.keys(sequence).div_ceil(SPAN));
        }
        let tile_ends = &tile_ends[..];
        let items = tiles * layer.kv.num_kv_heads;
        let tile = |item: usize| layer.tile(tile_ends, tile_tokens, item);
        if items >= 2 * self.threads() || spans == 1 {
            // Late tiles see the most keys: they go first, so that the workers finish together.
            self.pool.run_items(items, |worker, item| {
                let (tile, at) = tile(items - 1 - item);
                // SAFETY: the scratch is this worker's; tiles write disjoint rows and heads of the output.
                unsafe { layer.whole_tile(isa, &tile, out.get().add(at), scratch.of(worker)) };
            });
            return;
        }
        let mut partials = self.span_partials.borrow_mut();
        let tile_floats = tile_tokens * layer.group * partial_stride(layer.kv.layout.padded());
        let bytes = items * spans * tile_floats * size_of::<f32>();
        if partials.len() < bytes {
            *partials = Bytes::zeroed(bytes);
        }
        let partials = SharedMut::new(partials.as_mut_ptr().cast::<f32>());
        self.pool.run_items(items * spans, |worker, item| {
            let (tile, _) = tile(item / spans);
            let index = item % spans;
            if index < tile.num_spans() {
                // SAFETY: every item has its own partials, the scratch is this worker's.
                unsafe {
                    let task = Task::Span { index, partials: partials.get().add(item * tile_floats) };
                    dispatch(isa, TileKernel { tile: &tile, task, scratch: scratch.of(worker) });
                }
            }
        });
        self.pool.run_items(items, |_, item| {
            let (tile, at) = tile(item);
            // SAFETY: tiles write disjoint rows and heads, and merge only their own partials.
            unsafe {
                let kernel = MergeKernel {
                    tile: &tile,
                    partials: partials.get().add(item * spans * tile_floats),
                    span_stride: tile_floats,
                    out: out.get().add(at),
                    out_stride: layer.out_width(),
                };
                dispatch(isa, kernel);
            }
        });
    }
}

/// Attention of a step in one layer, checked; workers call [`Self::rows`].
pub(crate) struct LayerAttention<'a> {
    qkv: SharedMut<f32>,
    qkv_width: usize,
    batch: &'a AttentionBatch<'a>,
    kv: KvLayer,
    /// Query heads per KV head.
    group: usize,
    /// Scale of the scores times log2 e.
    scale: f32,
    precision: AttentionPrecision,
}

impl<'a> LayerAttention<'a> {
    /// `qkv` f32 [T, (H + 2K)·D] is the step's first row; rows may be filled later, before [`Self::rows`] reads them.
    ///
    /// # Panics
    /// As [`Cpu::attention`].
    pub(crate) fn new(
        qkv: SharedMut<f32>,
        qkv_width: usize,
        batch: &'a AttentionBatch<'a>,
        kv: KvLayer,
        scale: f32,
        precision: AttentionPrecision,
    ) -> Self {
        batch.check(kv.num_blocks);
        let heads = (qkv_width / kv.head_dim).saturating_sub(2 * kv.num_kv_heads);
        assert_eq!(qkv_width, (heads + 2 * kv.num_kv_heads) * kv.head_dim, "width of qkv");
        assert!(heads.is_multiple_of(kv.num_kv_heads), "query heads per KV head");
        let group = heads / kv.num_kv_heads;
        assert!((1..=MAX_GROUP).contains(&group), "{group} query heads per KV head");
        let scale = scale * std::f32::consts::LOG2_E;
        Self { qkv, qkv_width, batch, kv, group, scale, precision }
    }

    fn out_width(&self) -> usize {
        self.kv.num_kv_heads * self.group * self.kv.head_dim
    }

    /// All heads of some rows of the step on the calling worker: `out` f32 [rows, H·D]. The same bits as
    /// [`Cpu::attention`]; the range may start and end inside a sequence's tokens.
    ///
    /// # Safety
    /// These rows of qkv and `out` are valid, keys and values that they see are written, nobody writes any of them
    /// meanwhile, and `scratch` is `Scratch::PER_WORKER` bytes of this worker.
    pub(crate) unsafe fn rows(&self, isa: Detected, scratch: *mut u8, rows: Range<usize>, out: *mut f32) {
        let batch = self.batch;
        assert!(rows.end <= batch.rows(), "rows of the step");
        let tile_tokens = (MAX_TILE_ROWS / self.group).max(1);
        let mut sequence = batch.cu_seqlens.partition_point(|&start| start as usize <= rows.start) - 1;
        let mut start = rows.start;
        while start < rows.end {
            let end = batch.tokens(sequence).end.min(rows.end);
            while start < end {
                let tokens = start..end.min(start + tile_tokens);
                start = tokens.end;
                for kv_head in 0..self.kv.num_kv_heads {
                    let (tile, at) = self.tile_of(sequence, tokens.clone(), kv_head);
                    self.whole_tile(isa, &tile, out.add(at - rows.start * self.out_width()), scratch);
                }
            }
            sequence += 1;
        }
    }

    /// A tile of the whole step and where its output starts.
    fn tile(&self, tile_ends: &[usize], tile_tokens: usize, item: usize) -> (Tile<'a>, usize) {
        let (tile, kv_head) = (item / self.kv.num_kv_heads, item % self.kv.num_kv_heads);
        let sequence = tile_ends.partition_point(|&end| end <= tile);
        let before = if sequence == 0 { 0 } else { tile_ends[sequence - 1] };
        let tokens = self.batch.tokens(sequence);
        let start = tokens.start + (tile - before) * tile_tokens;
        self.tile_of(sequence, start..tokens.end.min(start + tile_tokens), kv_head)
    }

    fn tile_of(&self, sequence: usize, tokens: Range<usize>, kv_head: usize) -> (Tile<'a>, usize) {
        let offset = tokens.start - self.batch.tokens(sequence).start;
        let head = kv_head * self.group * self.kv.head_dim;
        let tile = Tile {
            kv: self.kv,
            kv_head,
            blocks: self.batch.blocks(sequence),
            queries: self.qkv.get().wrapping_add(tokens.start * self.qkv_width + head),
            query_stride: self.qkv_width,
            num_tokens: tokens.len(),
            group: self.group,
            first_limit: self.batch.context_lens[sequence] as usize + offset + 1,
            scale: self.scale,
            precision: self.precision,
        };
        (tile, tokens.start * self.out_width() + head)
    }

    /// # Safety
    /// `scratch` is this worker's alone, nobody else writes the tile's rows and heads, which start at `out`.
    unsafe fn whole_tile(&self, isa: Detected, tile: &Tile<'_>, out: *mut f32, scratch: *mut u8) {
        let task = Task::Whole { out, out_stride: self.out_width() };
        dispatch(isa, TileKernel { tile, task, scratch });
    }
}

// Queries, partial results and buffers of the largest tile fit into a worker's scratch.
const _: () = assert!(MAX_GROUP >= MAX_TILE_ROWS && scratch_bytes(MAX_GROUP) <= Scratch::PER_WORKER);

#[cfg(test)]
mod tests;
