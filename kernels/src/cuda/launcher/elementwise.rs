//! Operations that take each row or value by itself.

use super::{Address, Launch, threads_for};

/// What KV caches hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    Bf16,
    /// e4m3, of scale 1.
    Fp8,
}

impl KvType {
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }
}

fn check_columns(name: &str, n: usize) {
    assert!(n > 0 && n.is_multiple_of(8), "{name} of {n} is no multiple of 8");
}

/// hidden f32 [T,E] = rows of table bf16 [`vocab`,E]; ids i32 [T] outside `vocab` give zeros. An id of −1 − r is that of row r of
/// `drawn`, i32.
pub fn embed(
    hidden: Address,
    table: Address,
    token_ids: Address,
    drawn: Address,
    num_tokens: usize,
    hidden_size: usize,
    vocab: std::ops::Range<usize>,
) -> Launch {
    check_columns("hidden size", hidden_size);
    let args = [
        hidden.into(),
        table.into(),
        token_ids.into(),
        drawn.into(),
        hidden_size.into(),
        vocab.start.into(),
        vocab.end.into(),
    ];
    Launch::new("embed", "embed", [num_tokens, 1, 1], threads_for(hidden_size, 8, 512), args)
}

/// The scale of an RMSNorm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// bf16 [E].
    pub weight: Address,
    pub hidden_size: usize,
    pub epsilon: f32,
}

impl Norm {
    fn threads(&self) -> usize {
        check_columns("hidden size", self.hidden_size);
        threads_for(self.hidden_size, 8, 512)
    }
}

/// out bf16 [T,E] = RMSNorm of hidden f32 [T,E].
pub fn rms_norm(out: Address, hidden: Address, num_tokens: usize, norm: Norm) -> Launch {
    let args = [out.into(), hidden.into(), norm.weight.into(), norm.hidden_size.into(), norm.epsilon.into()];
    Launch::new("norm", "rms_norm", [num_tokens, 1, 1], norm.threads(), args)
}

/// out bf16 [R,E] = RMSNorm of the rows of hidden f32 [T,E] that rows i32 [R] lists; −1 gives zeros.
pub fn gather_rms_norm(out: Address, hidden: Address, rows: Address, num_rows: usize, norm: Norm) -> Launch {
    let args = [
        out.into(),
        hidden.into(),
        rows.into(),
        norm.weight.into(),
        norm.hidden_size.into(),
        norm.epsilon.into(),
    ];
    Launch::new("norm", "gather_rms_norm", [num_rows, 1, 1], norm.threads(), args)
}

/// hidden f32 [T,E] += x bf16 [T,E]; out bf16 [T,E] = RMSNorm of that.
pub fn add_rms_norm_bf16(out: Address, hidden: Address, x: Address, num_tokens: usize, norm: Norm) -> Launch {
    add_rms_norm("add_rms_norm_bf16", out, hidden, x, num_tokens, norm)
}

/// The same with x f32 [T,E].
pub fn add_rms_norm_f32(out: Address, hidden: Address, x: Address, num_tokens: usize, norm: Norm) -> Launch {
    add_rms_norm("add_rms_norm_f32", out, hidden, x, num_tokens, norm)
}

fn add_rms_norm(
    kernel: &'static str,
    out: Address,
    hidden: Address,
    x: Address,
    num_tokens: usize,
    norm: Norm,
) -> Launch {
    let args = [
        out.into(),
        hidden.into(),
        x.into(),
        norm.weight.into(),
        norm.hidden_size.into(),
        norm.epsilon.into(),
    ];
    Launch::new("norm", kernel, [num_tokens, 1, 1], norm.threads(), args)
}

/// x bf16 [T,N] += bias bf16 [N].
pub fn add_bias_bf16(x: Address, bias: Address, num_tokens: usize, num_columns: usize) -> Launch {
    add_bias("add_bias_bf16", x, bias, num_tokens, num_columns)
}

/// x f32 [T,N] += bias bf16 [N]: of an output projection, whose product was added to the residual stream.
pub fn add_bias_f32(x: Address, bias: Address, num_tokens: usize, num_columns: usize) -> Launch {
    add_bias("add_bias_f32", x, bias, num_tokens, num_columns)
}

fn add_bias(
    kernel: &'static str,
    x: Address,
    bias: Address,
    num_tokens: usize,
    num_columns: usize,
) -> Launch {
    check_columns("row", num_columns);
    let threads = threads_for(num_columns, 8, 256);
    let grid = [num_tokens, num_columns.div_ceil(8 * threads), 1];
    Launch::new("norm", kernel, grid, threads, [x.into(), bias.into(), num_columns.into()])
}

/// Heads of the attention of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    /// 64 or 128 where attention is computed.
    pub head_dim: usize,
}

/// Keys and values of one layer, each [blocks][K][16][D].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCache {
    pub k: Address,
    pub v: Address,
    pub kv_type: KvType,
}

/// f32 [max position][D/2] each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeTables {
    pub cos: Address,
    pub sin: Address,
}

/// Rotates the queries of qkv bf16 [T, (H + 2K)·D] in place and the keys into the cache, and copies the values there.
/// positions and slot_mapping are i32 [T]; slot −1 writes nothing.
pub fn rope_and_store_kv(
    qkv: Address,
    cache: KvCache,
    tables: RopeTables,
    positions: Address,
    slot_mapping: Address,
    num_tokens: usize,
    heads: Heads,
) -> Launch {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    assert!(head_dim.is_multiple_of(16), "head dim {head_dim}");
    let kernel = match cache.kv_type {
        KvType::Bf16 => "rope_and_store_kv_bf16",
        KvType::Fp8 => "rope_and_store_kv_fp8",
    };
    let args = [
        qkv.into(),
        cache.k.into(),
        cache.v.into(),
        tables.cos.into(),
        tables.sin.into(),
        positions.into(),
        slot_mapping.into(),
        num_heads.into(),
        num_kv_heads.into(),
        head_dim.into(),
    ];
    let threads = threads_for((num_heads + num_kv_heads) * head_dim, 16, 512);
    Launch::new("rope", kernel, [num_tokens, 1, 1], threads, args)
}

/// out bf16 [T,I] = silu(gate) · up of gate_up bf16 [T,2I].
pub fn silu_mul(out: Address, gate_up: Address, num_tokens: usize, intermediate_size: usize) -> Launch {
    check_columns("intermediate size", intermediate_size);
    let threads = threads_for(intermediate_size, 8, 256);
    let grid = [num_tokens, intermediate_size.div_ceil(8 * threads), 1];
    let args = [out.into(), gate_up.into(), intermediate_size.into()];
    Launch::new("activation", "silu_mul", grid, threads, args)
}

/// KV caches that block operations go over: their addresses are in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheList {
    /// u64 [`num_caches`]: keys and values of all layers.
    pub addresses: Address,
    pub num_caches: usize,
    /// K·16·D·bytes of a value; a multiple of 16.
    pub block_bytes: usize,
}

/// Copies blocks in every cache; pairs is i32 [`num_pairs`][from, to].
pub fn copy_blocks(caches: CacheList, pairs: Address, num_pairs: usize) -> Launch {
    let args = [caches.addresses.into(), pairs.into(), super::Arg::U64(caches.block_bytes as u64)];
    Launch::new("blocks", "copy_blocks", [num_pairs, caches.num_caches, 1], 256, args)
}

/// Fills blocks i32 [`num_blocks`] of every cache with a pattern of four bytes; all ones is NaN.
pub fn fill_blocks(caches: CacheList, blocks: Address, num_blocks: usize, pattern: u32) -> Launch {
    let args = [
        caches.addresses.into(),
        blocks.into(),
        super::Arg::U64(caches.block_bytes as u64),
        pattern.cast_signed().into(),
    ];
    Launch::new("blocks", "fill_blocks", [num_blocks, caches.num_caches, 1], 256, args)
}

/// Values `first..first + count` of a random tensor, bf16, uniform in ±`scale`; both counts are multiples of 8.
pub fn fill_random(out: Address, count: usize, first: u64, seed: u64, scale: f32) -> Launch {
    check_columns("count", count);
    assert!(first.is_multiple_of(8), "first value {first}");
    let args = [
        out.into(),
        super::Arg::U64(count as u64),
        super::Arg::U64(first),
        super::Arg::U64(seed),
        scale.into(),
    ];
    Launch::new("blocks", "fill_random", [count.div_ceil(8 * 256).min(4096), 1, 1], 256, args)
}

/// A random matrix whose values are draws from a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomMatrix {
    /// Names the sequence of 64-bit words that the draws take their bits from: word `i` is SplitMix64's hash of
    /// key + i · 0x9e3779b97f4a7c15.
    pub key: u64,
    /// bf16 [[`DRAW_TABLE`]].
    pub table: Address,
    /// Columns of the whole matrix.
    pub num_columns: usize,
}

/// Entries of the table that values are drawn from.
pub const DRAW_TABLE: usize = 4096;

/// out bf16 [rows, columns] = that part of a random matrix: element `e` of the matrix takes bits 16 · (e mod 4) and up of word ⌊e / 4⌋.
pub fn draw_weights(
    out: Address,
    matrix: RandomMatrix,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
) -> Launch {
    check_columns("columns", columns.len());
    let threads = threads_for(columns.len(), 8, 256);
    let args = [
        out.into(),
        matrix.table.into(),
        super::Arg::U64(matrix.key),
        super::Arg::U64(rows.start as u64),
        super::Arg::U64(columns.start as u64),
        super::Arg::U64(matrix.num_columns as u64),
        columns.len().into(),
    ];
    let grid = [rows.len(), columns.len().div_ceil(8 * threads), 1];
    Launch::new("blocks", "draw_weights", grid, threads, args)
}
