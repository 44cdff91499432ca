//! Checkpoints whose layers are e4m3 with a scale for each matrix or row (vLLM's `fp8` and `compressed-tensors` in
//! `float-quantized` form): their matrices are handed out as bf16, and as they are to whoever multiplies e4m3.

use half::bf16;

use crate::parallel::fill_units;
use crate::weights::{Fp8Scales, spread};

/// What ends the names of tensors beside a matrix in e4m3: its scale is used, scales of inputs and of KV are not.
pub(super) const SCALE: &str = "_scale";

/// Scales of a matrix in e4m3.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scales {
    Matrix(f32),
    Rows(Vec<f32>),
}

impl Scales {
    /// For a matrix of `shape`, from the values and the shape of its scale; why not, if they do not fit.
    pub(super) fn new(shape: &[usize], values: Vec<f32>, scale_shape: &[usize]) -> Result<Self, String> {
        if let Some(value) = values.iter().find(|value| !value.is_finite() || **value <= 0.0) {
            return Err(format!("has a scale of {value}"));
        }
        let rows = shape.first().copied().unwrap_or(0);
        match (scale_shape, &values[..]) {
            ([] | [1] | [1, 1], [scale]) => Ok(Self::Matrix(*scale)),
            ([n] | [n, 1], _) if *n == rows && shape.len() == 2 => Ok(Self::Rows(values)),
            _ => Err(format!(
                "has scales of shape {scale_shape:?}: one for the matrix or one for each of {rows} rows can be used"
            )),
        }
    }

    /// A few bytes that tell them from others.
    pub(super) fn sample(&self) -> Vec<u8> {
        match self {
            Self::Matrix(scale) => scale.to_le_bytes().to_vec(),
            Self::Rows(scales) => {
                spread(&scales.iter().flat_map(|scale| scale.to_le_bytes()).collect::<Vec<_>>())
            }
        }
    }

    pub(super) fn as_slice(&self) -> Fp8Scales<'_> {
        match self {
            Self::Matrix(scale) => Fp8Scales::Matrix(*scale),
            Self::Rows(scales) => Fp8Scales::Rows(scales),
        }
    }
}

/// A matrix of `cols` columns in bf16, little-endian.
pub(super) fn to_bf16(codes: &[u8], cols: usize, scales: &Scales) -> Vec<u8> {
    let scales = scales.as_slice();
    let table: Vec<f32> = (0..=u8::MAX).map(decode).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut out = vec![0; 2 * codes.len()];
    if out.is_empty() {
        return out;
    }
    let filled = fill_units(threads, 2 * cols, &mut out, |first, rows| {
        for (row, out) in (first..).zip(rows.chunks_exact_mut(2 * cols)) {
            let scale = scales.of_row(row);
            let (out, _) = out.as_chunks_mut::<2>();
            for (to, code) in out.iter_mut().zip(&codes[row * cols..]) {
                *to = bf16::from_f32(table[usize::from(*code)] * scale).to_le_bytes();
            }
        }
        Ok::<(), std::convert::Infallible>(())
    });
    let Ok(()) = filled;
    out
}

/// The value of an e4m3 (OCP 8-bit floating point, 2023): no infinities, and NaN where all bits but the sign are set.
fn decode(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * (-9.0f32).exp2(),
        _ => sign * (1.0 + mantissa / 8.0) * ((exponent - 7) as f32).exp2(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_standards() {
        let known =
            [(0x00, 0.0), (0x38, 1.0), (0xb8, -1.0), (0x7e, 448.0), (0x01, 0.001_953_125), (0x08, 0.015_625)];
        known.into_iter().for_each(|(code, value)| assert_eq!(decode(code), value, "{code:x}"));
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan());
        let finite: Vec<f32> = (0..0x7f).map(decode).collect();
        assert!(finite.windows(2).all(|pair| pair[0] < pair[1]), "they grow");
    }

    #[test]
    fn each_row_has_its_scale() {
        let values = |bytes: &[u8]| -> Vec<f32> {
            bytes.as_chunks::<2>().0.iter().map(|pair| bf16::from_le_bytes(*pair).to_f32()).collect()
        };
        let codes = [0x38, 0xb8, 0x40, 0x30];
        assert_eq!(values(&to_bf16(&codes, 2, &Scales::Rows(vec![0.5, 4.0]))), [0.5, -0.5, 8.0, 2.0]);
        assert_eq!(values(&to_bf16(&codes, 2, &Scales::Matrix(2.0))), [2.0, -2.0, 4.0, 1.0]);
    }

    #[test]
    fn scales_must_fit_the_matrix() {
        for shape in [&[][..], &[1], &[1, 1]] {
            assert_eq!(Scales::new(&[3, 4], vec![0.5], shape), Ok(Scales::Matrix(0.5)));
        }
        for shape in [&[3][..], &[3, 1]] {
            assert_eq!(Scales::new(&[3, 4], vec![1.0; 3], shape), Ok(Scales::Rows(vec![1.0; 3])));
        }
        let refusal = |values: Vec<f32>, shape: &[usize]| Scales::new(&[256, 4], values, shape).unwrap_err();
        assert!(refusal(vec![1.0; 2], &[2, 1]).contains("[2, 1]"), "blocks of 128");
        assert!(refusal(vec![0.0], &[1]).contains("scale of 0"));
        assert!(refusal(vec![f32::NAN], &[1]).contains("NaN"));
    }
}
