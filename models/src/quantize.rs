//! Floats to ggml's block formats, with the roundings of ggml's reference, so that weights rounded at load are the bits that
//! `llama-quantize` would have written. The layouts stand in `tandem_kernels::DType`.
//!
//! | type | scale `d` | minimum `m` | integer of a value `x` |
//! |---|---|---|---|
//! | Q8_0 | max abs / 127 | – | `x / d` to the nearest, ties away from zero |
//! | Q4_0 | the value of largest magnitude / −8 | – | `x / d + 8.5` cut off, at most 15 |
//! | Q4_1 | (max − min) / 15 | min | `(x − m) / d + 0.5` cut off, at most 15 |
//!
//! Integers are found with the f32 `d` and `m`, of which the block keeps the f16; dividing means multiplying by `1 / d` (by
//! 0 if that is infinite), a product and a sum that round apart. Every block is rounded by itself.

use half::f16;
use tandem_kernels::DType;
use thiserror::Error;

/// Values of a block.
const BLOCK: usize = 32;
type Block = [f32; BLOCK];

/// Why values cannot be rounded into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum Unfit {
    #[error("holds NaN or infinity")]
    NotFinite,
    #[error("holds values beyond the reach of a block's f16 scale")]
    TooLarge,
}

/// Rounds `values` into blocks of `dtype`.
///
/// # Errors
/// [`Unfit`] for the first block that cannot be; `out` then holds anything.
///
/// # Panics
/// If `dtype` is no block format, or `values` and `out` are not the same whole number of blocks.
pub(crate) fn quantize(dtype: DType, values: &[f32], out: &mut [u8]) -> Result<(), Unfit> {
    let (values, rest) = values.as_chunks::<BLOCK>();
    let (num_blocks, block_bytes) = (values.len(), dtype.block_bytes());
    assert!(rest.is_empty() && out.len() == num_blocks * block_bytes, "whole blocks of {dtype}");
    let quantize_block = match dtype {
        DType::Q8_0 => q8_0,
        DType::Q4_0 => q4_0,
        DType::Q4_1 => q4_1,
        DType::F32 | DType::F16 | DType::Bf16 => panic!("{dtype} is no block format"),
    };
    values.iter().zip(out.chunks_exact_mut(block_bytes)).try_for_each(|(x, out)| quantize_block(x, out))
}

fn q8_0(values: &Block, out: &mut [u8]) -> Result<(), Unfit> {
    let d = magnitude(values)? / 127.0;
    let inverse = inverse(d);
    put_f16(d, &mut out[..2])?;
    for (out, x) in out[2..].iter_mut().zip(values) {
        *out = (round(x * inverse) as i8).cast_unsigned();
    }
    Ok(())
}

fn q4_0(values: &Block, out: &mut [u8]) -> Result<(), Unfit> {
    let largest = magnitude(values)?;
    // Of two values of that magnitude the first one gives the sign; zeros give none.
    let signed = values.iter().copied().find(|x| x.abs() == largest && largest > 0.0).unwrap_or(0.0);
    let d = signed / -8.0;
    let inverse = inverse(d);
    put_f16(d, &mut out[..2])?;
    put_nibbles(values.map(|x| x * inverse + 8.5), &mut out[2..]);
    Ok(())
}

fn q4_1(values: &Block, out: &mut [u8]) -> Result<(), Unfit> {
    magnitude(values)?;
    let max = first_of(values, values.iter().copied().fold(f32::MIN, f32::max));
    let min = first_of(values, values.iter().copied().fold(f32::MAX, f32::min));
    let d = (max - min) / 15.0;
    let inverse = inverse(d);
    put_f16(d, &mut out[..2])?;
    put_f16(min, &mut out[2..4])?;
    put_nibbles(values.map(|x| (x - min) * inverse + 0.5), &mut out[4..]);
    Ok(())
}

/// The largest magnitude. That of the bits of finite floats without their sign is the same.
fn magnitude(values: &Block) -> Result<f32, Unfit> {
    const INFINITY: i32 = 0x7f80_0000;
    let bits = values.iter().map(|x| (x.to_bits() & 0x7fff_ffff).cast_signed()).fold(0, i32::max);
    if bits < INFINITY { Ok(f32::from_bits(bits.cast_unsigned())) } else { Err(Unfit::NotFinite) }
}

/// An extreme value as it stands first in the block: 0 and −0 are equal, but their f16 are not.
fn first_of(values: &Block, extreme: f32) -> f32 {
    if extreme != 0.0 {
        return extreme;
    }
    values.iter().copied().find(|&x| x == extreme).unwrap_or(extreme)
}

/// 0 where a quotient has no meaning: `d` is 0, or so small that its f16 is.
fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// To the nearest integer, ties away from zero, as `f32::round`, which is a call for every value on processors that are
/// not known to have an instruction for it. With one half itself the float below it would become 1.
fn round(x: f32) -> i32 {
    const BELOW_HALF: f32 = 0.5f32.next_down();
    (x + BELOW_HALF.copysign(x)) as i32
}

fn put_f16(value: f32, out: &mut [u8]) -> Result<(), Unfit> {
    let rounded = f16::from_f32(value);
    out.copy_from_slice(&rounded.to_le_bytes());
    if rounded.is_finite() { Ok(()) } else { Err(Unfit::TooLarge) }
}

/// Cuts fractions off and writes value `j` into the low and `16 + j` into the high nibble of byte `j`.
fn put_nibbles(scaled: Block, out: &mut [u8]) {
    let nibbles = scaled.map(|x| (x as i32).clamp(0, 15) as u8);
    let (low, high) = nibbles.split_at(BLOCK / 2);
    for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
        *out = low | high << 4;
    }
}

#[cfg(test)]
#[path = "quantize_tests.rs"]
mod tests;
