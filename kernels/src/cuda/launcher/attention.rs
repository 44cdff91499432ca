//! Attention over the paged KV cache.

use super::{Address, Heads, KvCache, KvType, Launch};

/// The sequences of a step and where their keys and values are. Lengths are read on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequences {
    /// S; those without tokens in the step are passed over.
    pub num_sequences: usize,
    /// i32 [S+1]: where the tokens of each sequence begin in the step.
    pub cu_seqlens: Address,
    /// i32 [S]: tokens cached before those of this step.
    pub context_lens: Address,
    /// i32 [S][stride].
    pub block_tables: Address,
    pub table_stride: usize,
}

impl Sequences {
    /// Some of them.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn part(self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.num_sequences, "{range:?} of {self:?}");
        let after = |address: Address, values: usize| address + 4 * values as u64;
        Self {
            num_sequences: range.len(),
            cu_seqlens: after(self.cu_seqlens, range.start),
            context_lens: after(self.context_lens, range.start),
            block_tables: after(self.block_tables, range.start * self.table_stride),
            table_stride: self.table_stride,
        }
    }
}

/// What attention reads and writes: qkv bf16 [T, (H + 2K)·D] with queries rotated, out bf16 [T, H·D].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    pub qkv: Address,
    pub out: Address,
    pub cache: KvCache,
    pub heads: Heads,
    /// Of the scores: usually D^−½.
    pub scale: f32,
}

impl Attention {
    fn group(&self) -> usize {
        let Heads { num_heads, num_kv_heads, .. } = self.heads;
        assert!(num_heads.is_multiple_of(num_kv_heads), "{num_heads} heads in {num_kv_heads} groups");
        num_heads / num_kv_heads
    }

    fn variant(&self, of: [&'static str; 4]) -> &'static str {
        let dim = match self.heads.head_dim {
            64 => 0,
            128 => 1,
            other => panic!("attention of head dim {other}"),
        };
        of[dim + if self.cache.kv_type == KvType::Fp8 { 2 } else { 0 }]
    }
}

/// Attention of sequences with any number of tokens, at most `max_tokens` each.
pub fn attention_prefill(attention: Attention, sequences: Sequences, max_tokens: usize) -> Launch {
    const ROWS: usize = 128;
    const KEYS: usize = 64;
    let kernel = attention.variant([
        "attention_prefill_bf16_d64",
        "attention_prefill_bf16_d128",
        "attention_prefill_fp8_d64",
        "attention_prefill_fp8_d128",
    ]);
    let Heads { num_heads, num_kv_heads, head_dim } = attention.heads;
    let tiles = (max_tokens * attention.group()).div_ceil(ROWS);
    let args = [
        attention.out.into(),
        attention.qkv.into(),
        attention.cache.k.into(),
        attention.cache.v.into(),
        sequences.cu_seqlens.into(),
        sequences.context_lens.into(),
        sequences.block_tables.into(),
        num_heads.into(),
        num_kv_heads.into(),
        sequences.table_stride.into(),
        attention.scale.into(),
    ];
    Launch::new("attention_prefill", kernel, [num_kv_heads, tiles, sequences.num_sequences], 128, args)
        // Queries; keys and values, two buffers; bf16.
        .with_shared_bytes((ROWS + 2 * 2 * KEYS) * head_dim * 2)
}

/// Work shared out over parts of a sequence's context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splits {
    pub num_splits: usize,
    /// [`splits_bytes`] of memory; none is touched with one split.
    pub workspace: Address,
}

/// Bytes of workspace of [`attention_decode`] for T tokens.
pub fn splits_bytes(num_tokens: usize, heads: Heads, num_splits: usize) -> usize {
    num_tokens * heads.num_heads * num_splits * (heads.head_dim + 2) * size_of::<f32>()
}

/// Attention of sequences with at most `max_tokens` tokens each, few of them (a tile of 16 rows holds the tokens of all
/// heads of a KV head, and each tile reads the cache). T is the tokens that the workspace is laid out for, at least those
/// of the sequences. More than one split needs [`attention_combine`] afterwards.
pub fn attention_decode(
    attention: Attention,
    sequences: Sequences,
    max_tokens: usize,
    num_tokens: usize,
    splits: Splits,
) -> Launch {
    let kernel = attention.variant([
        "attention_decode_bf16_d64",
        "attention_decode_bf16_d128",
        "attention_decode_fp8_d64",
        "attention_decode_fp8_d128",
    ]);
    let Heads { num_heads, num_kv_heads, .. } = attention.heads;
    let tiles = (max_tokens * attention.group()).div_ceil(16);
    let [acc, max, sum] = partials(attention.heads, num_tokens, splits);
    let args = [
        attention.out.into(),
        acc.into(),
        max.into(),
        sum.into(),
        attention.qkv.into(),
        attention.cache.k.into(),
        attention.cache.v.into(),
        sequences.cu_seqlens.into(),
        sequences.context_lens.into(),
        sequences.block_tables.into(),
        num_heads.into(),
        num_kv_heads.into(),
        splits.num_splits.into(),
        sequences.table_stride.into(),
        attention.scale.into(),
    ];
    let grid = [tiles * splits.num_splits, num_kv_heads, sequences.num_sequences];
    Launch::new("attention_decode", kernel, grid, 128, args)
}

/// Merges what [`attention_decode`] left in the workspace; `num_tokens` is the same as there.
pub fn attention_combine(
    attention: Attention,
    sequences: Sequences,
    num_tokens: usize,
    splits: Splits,
) -> Launch {
    let [acc, max, sum] = partials(attention.heads, num_tokens, splits);
    let args = [
        attention.out.into(),
        acc.into(),
        max.into(),
        sum.into(),
        sequences.cu_seqlens.into(),
        sequences.num_sequences.into(),
        splits.num_splits.into(),
        attention.heads.head_dim.into(),
    ];
    Launch::new(
        "attention_decode",
        "attention_combine",
        [num_tokens, attention.heads.num_heads, 1],
        128,
        args,
    )
}

/// f32 [T][H][splits][D], then maxima and sums [T][H][splits].
fn partials(heads: Heads, num_tokens: usize, splits: Splits) -> [Address; 3] {
    let places = (num_tokens * heads.num_heads * splits.num_splits * size_of::<f32>()) as u64;
    let maxima = splits.workspace + places * heads.head_dim as u64;
    [splits.workspace, maxima, maxima + places]
}
