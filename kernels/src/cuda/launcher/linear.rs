//! Linear layers of few tokens, and weights from one format into another.

use super::{Address, Arg, Launch, threads_for};

/// Rows that [`gemv`] multiplies at once.
pub const MAX_GEMV_TOKENS: usize = 8;

/// Weights [N,K] of a linear layer. Blocks of GGUF formats are taken apart: values, scales and mins are arrays of their
/// own, in the order of rows and of blocks of 32 along K.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// bf16 [N,K].
    Bf16 { values: Address },
    /// e4m3 [N,K], scales f32 [N].
    Fp8 { values: Address, scales: Address },
    /// Q8_0: int8 [N,K], scales f16 [N,K/32].
    Q8 { values: Address, scales: Address },
    /// Q4_0: [N,K/2], scales f16 [N,K/32].
    Q4_0 { values: Address, scales: Address },
    /// Q4_1: [N,K/2], scales and mins f16 [N,K/32].
    Q4_1 { values: Address, scales: Address, mins: Address },
}

impl Weights {
    /// The arguments, of which the first few count.
    pub(super) fn args(self) -> ([Arg; 3], usize) {
        let none = Arg::Pointer(0);
        match self {
            Self::Bf16 { values } => ([values.into(), none, none], 1),
            Self::Fp8 { values, scales } | Self::Q8 { values, scales } | Self::Q4_0 { values, scales } => {
                ([values.into(), scales.into(), none], 2)
            }
            Self::Q4_1 { values, scales, mins } => ([values.into(), scales.into(), mins.into()], 3),
        }
    }
}

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// out bf16 [M,N].
    StoreBf16,
    /// out f32 [M,N].
    StoreF32,
    /// out f32 [M,N] += y: the residual stream.
    AddF32,
    /// out bf16 [M,N] = silu(gate) · up; the weights have N rows of gates, then N of ups.
    SwiGlu,
}

/// The shape of a product: M tokens, N columns of the output, K inputs, for [`gemv`] at most [`MAX_GEMV_TOKENS`] tokens and a
/// multiple of 32 inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    pub num_tokens: usize,
    pub num_columns: usize,
    pub size: usize,
}

/// out [M,N] = x bf16 [M,K] · Wᵀ.
pub fn gemv(out: Address, x: Address, weights: Weights, epilogue: Epilogue, product: Product) -> Launch {
    use {Epilogue as E, Weights as W};
    let Product { num_tokens, num_columns, size } = product;
    assert!((1..=MAX_GEMV_TOKENS).contains(&num_tokens), "{num_tokens} tokens");
    assert!(size > 0 && size.is_multiple_of(32), "input size {size} is no multiple of 32");
    let kernel = match (weights, epilogue) {
        (W::Bf16 { .. }, E::StoreBf16) => "gemv_bf16_store_bf16",
        (W::Bf16 { .. }, E::StoreF32) => "gemv_bf16_store_f32",
        (W::Bf16 { .. }, E::AddF32) => "gemv_bf16_add_f32",
        (W::Bf16 { .. }, E::SwiGlu) => "gemv_bf16_swiglu",
        (W::Fp8 { .. }, E::StoreBf16) => "gemv_fp8_store_bf16",
        (W::Fp8 { .. }, E::StoreF32) => "gemv_fp8_store_f32",
        (W::Fp8 { .. }, E::AddF32) => "gemv_fp8_add_f32",
        (W::Fp8 { .. }, E::SwiGlu) => "gemv_fp8_swiglu",
        (W::Q8 { .. }, E::StoreBf16) => "gemv_q8_store_bf16",
        (W::Q8 { .. }, E::StoreF32) => "gemv_q8_store_f32",
        (W::Q8 { .. }, E::AddF32) => "gemv_q8_add_f32",
        (W::Q8 { .. }, E::SwiGlu) => "gemv_q8_swiglu",
        (W::Q4_0 { .. }, E::StoreBf16) => "gemv_q4_0_store_bf16",
        (W::Q4_0 { .. }, E::StoreF32) => "gemv_q4_0_store_f32",
        (W::Q4_0 { .. }, E::AddF32) => "gemv_q4_0_add_f32",
        (W::Q4_0 { .. }, E::SwiGlu) => "gemv_q4_0_swiglu",
        (W::Q4_1 { .. }, E::StoreBf16) => "gemv_q4_1_store_bf16",
        (W::Q4_1 { .. }, E::StoreF32) => "gemv_q4_1_store_f32",
        (W::Q4_1 { .. }, E::AddF32) => "gemv_q4_1_add_f32",
        (W::Q4_1 { .. }, E::SwiGlu) => "gemv_q4_1_swiglu",
    };
    let head = [out.into(), x.into()];
    let tail = [num_tokens.into(), num_columns.into(), size.into()];
    let (weights, num_weights) = weights.args();
    let mut launch = Launch::new("gemv", kernel, [num_columns.div_ceil(16), 1, 1], 256, head);
    launch.push(&weights[..num_weights]);
    launch.push(&tail);
    launch
}

/// out bf16 [N,K] of quantised weights.
///
/// # Panics
/// For weights that are bf16.
pub fn dequantize(out: Address, weights: Weights, num_rows: usize, size: usize) -> Launch {
    assert!(size > 0 && size.is_multiple_of(32), "input size {size} is no multiple of 32");
    let kernel = match weights {
        Weights::Bf16 { .. } => panic!("bf16 weights are not quantised"),
        Weights::Fp8 { .. } => "dequantize_fp8",
        Weights::Q8 { .. } => "dequantize_q8",
        Weights::Q4_0 { .. } => "dequantize_q4_0",
        Weights::Q4_1 { .. } => "dequantize_q4_1",
    };
    let threads = threads_for(size, 8, 256);
    let grid = [num_rows, size.div_ceil(8 * threads), 1];
    let mut launch = Launch::new("quantize", kernel, grid, threads, [out.into()]);
    let (weights, num_weights) = weights.args();
    launch.push(&weights[..num_weights]);
    launch.push(&[size.into()]);
    launch
}

/// values e4m3 [N,K] and scales f32 [N] of x bf16 [N,K], each row by its largest magnitude: weights at load, or
/// activations of a step, a row a token. K is a multiple of 8.
pub fn quantize_fp8(values: Address, scales: Address, x: Address, num_rows: usize, size: usize) -> Launch {
    assert!(size > 0 && size.is_multiple_of(8), "row of {size} is no multiple of 8");
    let args = [values.into(), scales.into(), x.into(), size.into()];
    Launch::new("quantize", "quantize_fp8", [num_rows, 1, 1], threads_for(size, 8, 512), args)
}
