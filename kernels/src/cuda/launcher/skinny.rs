//! Linear layers of more tokens than a GEMV takes and fewer than make a product bound by arithmetic.

use super::{Address, Epilogue, Launch, Product, Weights};

/// Rows that [`skinny_gemm`] multiplies at once.
pub const MAX_SKINNY_TOKENS: usize = 64;
/// Rows of weights of one block.
const ROWS: usize = 64;
/// Bytes of a row of weights in one stage.
const ROW_BYTES: usize = 128;

/// K shared out over blocks that add up what they have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KSplits {
    pub num_splits: usize,
    /// f32, [`KSplits::partial_bytes`]; none is touched with one split.
    pub partials: Address,
    /// u32, [`KSplits::counter_bytes`], zero before the first launch and after each.
    pub counters: Address,
}

impl KSplits {
    /// Bytes of partial sums of so many blocks of a launch.
    pub const fn partial_bytes(num_blocks: usize) -> usize {
        num_blocks * ROWS * MAX_SKINNY_TOKENS * size_of::<f32>()
    }

    /// Bytes of counters for weights of so many rows.
    pub const fn counter_bytes(num_rows: usize) -> usize {
        num_rows.div_ceil(ROWS) * size_of::<u32>()
    }
}

/// Blocks of a launch with one split.
pub fn skinny_tiles(epilogue: Epilogue, num_columns: usize) -> usize {
    num_columns.div_ceil(if epilogue == Epilogue::SwiGlu { ROWS / 2 } else { ROWS })
}

/// out [M,N] = x bf16 [M,K] · Wᵀ for W in bf16 or e4m3 and at most [`MAX_SKINNY_TOKENS`] tokens; N a multiple of 8, K of 16.
///
/// # Panics
/// For other formats of weights, and to store f32.
pub fn skinny_gemm(
    out: Address,
    x: Address,
    weights: Weights,
    epilogue: Epilogue,
    product: Product,
    splits: KSplits,
) -> Launch {
    use {Epilogue as E, Weights as W};
    let Product { num_tokens, num_columns, size } = product;
    assert!((1..=MAX_SKINNY_TOKENS).contains(&num_tokens), "{num_tokens} tokens");
    assert!(num_columns.is_multiple_of(8) && size.is_multiple_of(16) && size > 0, "{product:?}");
    let tokens = [16, 32, 64].into_iter().find(|most| num_tokens <= *most).expect("checked above");
    let pick = |of: [&'static str; 3]| of[tokens.ilog2() as usize - 4];
    let kernel = match (weights, epilogue) {
        (W::Bf16 { .. }, E::StoreBf16) => {
            pick(["skinny_bf16_16_store_bf16", "skinny_bf16_32_store_bf16", "skinny_bf16_64_store_bf16"])
        }
        (W::Bf16 { .. }, E::AddF32) => {
            pick(["skinny_bf16_16_add_f32", "skinny_bf16_32_add_f32", "skinny_bf16_64_add_f32"])
        }
        (W::Bf16 { .. }, E::SwiGlu) => {
            pick(["skinny_bf16_16_swiglu", "skinny_bf16_32_swiglu", "skinny_bf16_64_swiglu"])
        }
        (W::Fp8 { .. }, E::StoreBf16) => {
            pick(["skinny_fp8_16_store_bf16", "skinny_fp8_32_store_bf16", "skinny_fp8_64_store_bf16"])
        }
        (W::Fp8 { .. }, E::AddF32) => {
            pick(["skinny_fp8_16_add_f32", "skinny_fp8_32_add_f32", "skinny_fp8_64_add_f32"])
        }
        (W::Fp8 { .. }, E::SwiGlu) => {
            pick(["skinny_fp8_16_swiglu", "skinny_fp8_32_swiglu", "skinny_fp8_64_swiglu"])
        }
        other => panic!("no skinny product of {other:?}"),
    };
    let is_fp8 = matches!(weights, W::Fp8 { .. });
    // Inputs beside 128 bytes of weights: 64 values of bf16, 128 of e4m3.
    let x_bytes = tokens * ROW_BYTES * if is_fp8 { 2 } else { 1 };
    let stages = if is_fp8 && tokens == 64 { 4 } else { 6 };
    let grid = [skinny_tiles(epilogue, num_columns), splits.num_splits, 1];
    let head = [out.into(), splits.partials.into(), splits.counters.into(), x.into()];
    let tail = [num_tokens.into(), num_columns.into(), size.into(), splits.num_splits.into()];
    let (weights, num_weights) = weights.args();
    let mut launch = Launch::new("skinny_gemm", kernel, grid, 128, head);
    launch.push(&weights[..num_weights]);
    launch.push(&tail);
    launch.with_shared_bytes(stages * (ROWS * ROW_BYTES + x_bytes))
}
