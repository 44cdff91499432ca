//! Paged causal attention with grouped query heads.
//!
//! # Order
//! Keys are walked in **spans** of 256 tokens from position 0. A span's partial softmax (maximum, sum, weighted values) is
//! computed on its own and partials are merged in order, so a query's result is the same bits whether it comes as
//! one token or inside a chunk, and whether one worker walks all spans or each span has its own.
//!
//! # Work
//! An item is (sequence, tile of query tokens, KV head): all query heads of the group and up to 12 rows share each load of a
//! key or value. When there are fewer items than workers could use (one long sequence decoding), items are split by span
//! into a partial buffer and merged by a second pass.
//!
//! # Precision
//! With a bf16 cache, each query and softmax weight is the sum of two bf16 numbers, multiplied by the bf16 dot product with
//! f32 sums: what the cache's own rounding costs is all that is lost. With f32 and f16 caches everything is f32.

mod span;

use std::ops::Range;

use span::{FinishRows, MergeSpan, SpanArgs, SpanKernel};

use super::activation::whole_rows;
use super::buffer::{Bytes, SharedMut};
use super::isa::Detected;
use super::kv_cache::{BLOCK_SIZE, KvCache, MAX_HEAD_DIM, UnitLayout};
use super::simd::dispatch;
use super::{Cpu, Scratch};

/// Keys whose softmax is taken together; part of the numeric class.
pub(crate) const SPAN: usize = 256;

/// Rows (query tokens × heads of the group) that share loads of keys and values.
const TILE_ROWS: usize = 12;

/// The most query heads per KV head that attention takes; bounds the scratch memory of a tile.
pub const MAX_GROUP: usize = 128;

/// Scores times output width below which the caller is done before a worker would have started (about 2 µs).
const WORTH_A_FORK: usize = 96 * 1024;

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
    fn check(&self, rows: usize, num_blocks: usize) {
        let sequences = self.context_lens.len();
        assert_eq!(self.cu_seqlens.len(), sequences + 1, "cu_seqlens");
        assert_eq!(self.block_table_offsets.len(), sequences + 1, "block table offsets");
        assert!(self.cu_seqlens[0] == 0 && self.cu_seqlens[sequences] as usize == rows, "ends of cu_seqlens");
        for sequence in 0..sequences {
            let tokens = self.tokens(sequence).len();
            assert!(self.cu_seqlens[sequence] <= self.cu_seqlens[sequence + 1], "cu_seqlens decreases");
            let blocks = self.blocks(sequence);
            let needed = (self.context_lens[sequence] as usize + tokens).div_ceil(BLOCK_SIZE);
            assert!(
                tokens == 0 || blocks.len() >= needed,
                "{} blocks where {needed} are needed",
                blocks.len()
            );
            assert!(blocks.iter().all(|&block| (block as usize) < num_blocks), "block outside the cache");
        }
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
        out: &mut [f32],
    ) {
        let config = kv.config();
        let rows = *batch.cu_seqlens.last().expect("cu_seqlens has an end") as usize;
        batch.check(rows, config.num_blocks);
        if rows == 0 {
            return;
        }
        let (qkv_width, out_width) = (whole_rows(qkv.len(), rows), whole_rows(out.len(), rows));
        let head_dim = config.head_dim;
        let heads = out_width / head_dim;
        assert_eq!(out_width, heads * head_dim, "width of the attention output");
        assert_eq!(qkv_width, out_width + 2 * config.num_kv_heads * head_dim, "width of qkv");
        assert!(heads.is_multiple_of(config.num_kv_heads), "query heads per KV head");
        let group = heads / config.num_kv_heads;
        assert!((1..=MAX_GROUP).contains(&group), "{group} query heads per KV head");
        let job = Job {
            isa: self.detected(),
            qkv,
            qkv_width,
            out: SharedMut::new(out.as_mut_ptr()),
            out_width,
            batch,
            kv,
            layout: kv.layout(),
            layer,
            kv_heads: config.num_kv_heads,
            group,
            head_dim,
            scale,
            tile_tokens: (TILE_ROWS / group).max(1),
        };
        self.run_attention(&job);
    }

    fn run_attention(&self, job: &Job<'_>) {
        let mut tile_ends = self.tile_ends.borrow_mut();
        tile_ends.clear();
        let mut tiles = 0;
        let mut spans = 0;
        let mut scores = 0;
        for sequence in 0..job.batch.context_lens.len() {
            let tokens = job.batch.tokens(sequence).len();
            tiles += tokens.div_ceil(job.tile_tokens);
            tile_ends.push(tiles);
            scores += tokens * (job.batch.context_lens[sequence] as usize + tokens);
            spans = spans.max((job.batch.context_lens[sequence] as usize + tokens).div_ceil(SPAN));
        }
        let tile_ends = &tile_ends[..];
        let items = tiles * job.kv_heads;
        let scratch = &self.scratch;
        if scores * job.out_width < WORTH_A_FORK {
            for item in 0..items {
                // SAFETY: no job is running, so the caller is worker 0 and writes all of the output.
                unsafe { job.whole_tile(&job.tile(tile_ends, item), scratch.of(0)) };
            }
            return;
        }
        if items >= 2 * self.threads() || spans == 1 || self.threads() == 1 {
            // Late tiles see the most keys: they go first, so that the workers finish together.
            self.pool.run_items(items, |worker, item| {
                let tile = job.tile(tile_ends, items - 1 - item);
                // SAFETY: the scratch is this worker's; tiles write disjoint rows and heads of the output.
                unsafe { job.whole_tile(&tile, scratch.of(worker)) };
            });
            return;
        }
        let mut partials = self.span_partials.borrow_mut();
        let tile_floats = job.tile_rows() * job.partial_stride();
        let bytes = items * spans * tile_floats * size_of::<f32>();
        if partials.len() < bytes {
            *partials = Bytes::zeroed(bytes);
        }
        let partials = SharedMut::new(partials.as_mut_ptr().cast::<f32>());
        self.pool.run_items(items * spans, |worker, item| {
            let tile = job.tile(tile_ends, item / spans);
            if item % spans < tile.spans() {
                // SAFETY: every item has its own partials, the scratch is this worker's.
                unsafe {
                    job.span(&tile, item % spans, partials.get().add(item * tile_floats), scratch.of(worker))
                };
            }
        });
        self.pool.run_items(items, |_, item| {
            let tile = job.tile(tile_ends, item);
            // SAFETY: tiles write disjoint rows and heads, and merge only their own partials.
            unsafe {
                let first = partials.get().add(item * spans * tile_floats);
                for span in 1..tile.spans() {
                    job.merge(&tile, span, first, first.add(span * tile_floats));
                }
                job.finish(&tile, first);
            }
        });
    }
}

struct Job<'a> {
    isa: Detected,
    qkv: &'a [f32],
    qkv_width: usize,
    out: SharedMut<f32>,
    out_width: usize,
    batch: &'a AttentionBatch<'a>,
    kv: &'a KvCache,
    layout: UnitLayout,
    layer: usize,
    kv_heads: usize,
    /// Query heads per KV head.
    group: usize,
    head_dim: usize,
    scale: f32,
    tile_tokens: usize,
}

/// Query tokens of one sequence, and one KV head with its group of query heads. Row = token · group + head of the group.
struct Tile<'a> {
    blocks: &'a [u32],
    kv_head: usize,
    /// Rows of the step's T.
    tokens: Range<usize>,
    /// Keys that the first token sees; each later token sees one more.
    first_limit: usize,
}

impl Tile<'_> {
    fn last_limit(&self) -> usize {
        self.first_limit + self.tokens.len() - 1
    }

    fn spans(&self) -> usize {
        self.last_limit().div_ceil(SPAN)
    }
}

impl<'a> Job<'a> {
    fn tile_rows(&self) -> usize {
        self.tile_tokens * self.group
    }

    /// f32 values per row of partials: weighted values, then maximum and sum on their own cache line.
    const fn partial_stride(&self) -> usize {
        self.layout.padded() + 16
    }

    fn tile(&self, tile_ends: &[usize], item: usize) -> Tile<'a> {
        let (tile, kv_head) = (item / self.kv_heads, item % self.kv_heads);
        let sequence = tile_ends.partition_point(|&end| end <= tile);
        let before = if sequence == 0 { 0 } else { tile_ends[sequence - 1] };
        let tokens = self.batch.tokens(sequence);
        let offset = (tile - before) * self.tile_tokens;
        let start = tokens.start + offset;
        Tile {
            blocks: self.batch.blocks(sequence),
            kv_head,
            tokens: start..tokens.end.min(start + self.tile_tokens),
            first_limit: self.batch.context_lens[sequence] as usize + offset + 1,
        }
    }

    /// All spans of a tile in order.
    ///
    /// # Safety
    /// `scratch` is this worker's alone, and nobody else writes the tile's rows and heads.
    unsafe fn whole_tile(&self, tile: &Tile<'_>, scratch: *mut u8) {
        let total = scratch.cast::<f32>();
        let next = total.add(self.tile_rows() * self.partial_stride());
        let rest = scratch.add(2 * self.tile_rows() * self.partial_stride() * size_of::<f32>());
        self.span(tile, 0, total, rest);
        for span in 1..tile.spans() {
            self.span(tile, span, next, rest);
            self.merge(tile, span, total, next);
        }
        self.finish(tile, total);
    }

    /// One span's partials for every row of the tile that sees any of it.
    unsafe fn span(&self, tile: &Tile<'_>, span: usize, partials: *mut f32, scratch: *mut u8) {
        let start = span * SPAN;
        let keys = (tile.last_limit() - start).min(SPAN);
        let first_block = start / BLOCK_SIZE;
        let blocks = &tile.blocks[first_block..first_block + keys.div_ceil(BLOCK_SIZE)];
        let queries = self
            .qkv
            .as_ptr()
            .add(tile.tokens.start * self.qkv_width + tile.kv_head * self.group * self.head_dim);
        let args = SpanArgs {
            head: self.kv.head_ptr(self.layer, tile.kv_head),
            layout: self.layout,
            head_dim: self.head_dim,
            blocks,
            queries,
            query_stride: self.qkv_width,
            tokens: tile.tokens.len(),
            group: self.group,
            first_limit: tile.first_limit as isize - start as isize,
            scale: self.scale,
            partials,
            partial_stride: self.partial_stride(),
            scratch,
        };
        dispatch(self.isa, SpanKernel(&args));
    }

    /// Merges a later span's partials into the total, for the rows that see that span.
    unsafe fn merge(&self, tile: &Tile<'_>, span: usize, total: *mut f32, next: *const f32) {
        let hidden = (span * SPAN + 1).saturating_sub(tile.first_limit).min(tile.tokens.len());
        let rows = hidden * self.group..tile.tokens.len() * self.group;
        let (stride, padded) = (self.partial_stride(), self.layout.padded());
        dispatch(self.isa, MergeSpan { total, next, rows, stride, padded });
    }

    unsafe fn finish(&self, tile: &Tile<'_>, total: *const f32) {
        let out = self
            .out
            .get()
            .add(tile.tokens.start * self.out_width + tile.kv_head * self.group * self.head_dim);
        let kernel = FinishRows {
            total,
            stride: self.partial_stride(),
            padded: self.layout.padded(),
            out,
            out_stride: self.out_width,
            tokens: tile.tokens.len(),
            group: self.group,
            head_dim: self.head_dim,
        };
        dispatch(self.isa, kernel);
    }
}

// Two partials, queries, scores and weights of the largest tile fit into a worker's scratch.
const _: () = assert!(
    MAX_GROUP * (2 * (MAX_HEAD_DIM + 16) * 4 + MAX_HEAD_DIM * 4 + SPAN * 4 + SPAN * 4) <= Scratch::PER_WORKER
);

#[cfg(test)]
mod tests;
