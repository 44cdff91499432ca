//! Linear layers of more tokens than a GEMV takes and fewer than make a product bound by arithmetic.

use super::{Address, Epilogue, Launch, Product, Weights};

/// Rows that [`skinny_gemm`] multiplies at once.
pub const MAX_SKINNY_TOKENS: usize = 64;
/// Rows of weights of one block.
const ROWS: usize = 64;

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

/// Inputs of one stage.
pub const fn skinny_depth(weights: Weights) -> usize {
    if matches!(weights, Weights::Bf16 { .. }) { 64 } else { 128 }
}

/// out [M,N] = x bf16 [M,K] · Wᵀ for at most [`MAX_SKINNY_TOKENS`] tokens; N a multiple of 8, K of 16, of blocks a multiple of 32.
///
/// # Panics
/// To store f32.
pub fn skinny_gemm(
    out: Address,
    x: Address,
    weights: Weights,
    epilogue: Epilogue,
    product: Product,
    splits: KSplits,
) -> Launch {
    let Product { num_tokens, num_columns, size } = product;
    let depth = skinny_depth(weights);
    assert!((1..=MAX_SKINNY_TOKENS).contains(&num_tokens), "{num_tokens} tokens");
    let unit = if matches!(weights, Weights::Bf16 { .. } | Weights::Fp8 { .. }) { 16 } else { 32 };
    assert!(num_columns.is_multiple_of(8) && size.is_multiple_of(unit) && size > 0, "{product:?}");
    let tokens = [16, 32, 64].into_iter().find(|most| num_tokens <= *most).expect("checked above");
    macro_rules! kernel {
        ($format:literal) => {
            match (epilogue, tokens) {
                (Epilogue::StoreBf16, 16) => concat!("skinny_", $format, "_16_store_bf16"),
                (Epilogue::StoreBf16, 32) => concat!("skinny_", $format, "_32_store_bf16"),
                (Epilogue::StoreBf16, _) => concat!("skinny_", $format, "_64_store_bf16"),
                (Epilogue::AddF32, 16) => concat!("skinny_", $format, "_16_add_f32"),
                (Epilogue::AddF32, 32) => concat!("skinny_", $format, "_32_add_f32"),
                (Epilogue::AddF32, _) => concat!("skinny_", $format, "_64_add_f32"),
                (Epilogue::SwiGlu, 16) => concat!("skinny_", $format, "_16_swiglu"),
                (Epilogue::SwiGlu, 32) => concat!("skinny_", $format, "_32_swiglu"),
                (Epilogue::SwiGlu, _) => concat!("skinny_", $format, "_64_swiglu"),
                (Epilogue::StoreF32, _) => panic!("no skinny product is stored as f32"),
            }
        };
    }
    // Bytes of a row of weights in one stage.
    let (module, kernel, row_bytes) = match weights {
        Weights::Bf16 { .. } => ("skinny_bf16", kernel!("bf16"), 128),
        Weights::Fp8 { .. } => ("skinny_fp8", kernel!("fp8"), 128),
        Weights::Q8 { .. } => ("skinny_q8", kernel!("q8"), 128),
        Weights::Q4_0 { .. } => ("skinny_q4_0", kernel!("q4_0"), 64),
        Weights::Q4_1 { .. } => ("skinny_q4_1", kernel!("q4_1"), 64),
    };
    let stages = if depth == 128 && tokens == 64 { 4 } else { 6 };
    let grid = [skinny_tiles(epilogue, num_columns), splits.num_splits, 1];
    let head = [out.into(), splits.partials.into(), splits.counters.into(), x.into()];
    let tail = [num_tokens.into(), num_columns.into(), size.into(), splits.num_splits.into()];
    let (weights, num_weights) = weights.args();
    let mut launch = Launch::new(module, kernel, grid, 128, head);
    launch.push(&weights[..num_weights]);
    launch.push(&tail);
    launch.with_shared_bytes(stages * (ROWS * row_bytes + tokens * depth * 2))
}
