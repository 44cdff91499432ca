//! Storage types of weight files and the named numeric classes.
//!
//! Block formats are ggml's, bit for bit: a block holds 32 consecutive values of a row.
//!
//! | type | bytes | contents | value |
//! |---|---|---|---|
//! | Q8_0 | 34 | f16 `d`, 32 × i8 `q` | `d·q` |
//! | Q4_0 | 18 | f16 `d`, 16 bytes: value `j` in the low, `16+j` in the high nibble of byte `j` | `d·(q − 8)` |
//! | Q4_1 | 20 | f16 `d`, f16 `m`, 16 bytes as above | `d·q + m` |

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::KernelError;

/// How a weight matrix is stored in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // the formats' own names
pub enum DType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
}

impl DType {
    /// Values in one block; 1 for types without blocks.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
        }
    }

    /// Bytes of a row of `cols` values; `None` if that is no whole number of blocks or overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A borrowed row-major matrix in its storage type; its length is checked on construction.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    dtype: DType,
    rows: usize,
    cols: usize,
    data: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// # Errors
    /// `PartialBlock` if `cols` is no multiple of the block, `MatrixSize` if `data` is not exactly the matrix.
    pub fn new(dtype: DType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self, KernelError> {
        let block_len = dtype.block_len();
        let row_bytes = match dtype.row_bytes(cols) {
            Some(bytes) => bytes,
            None if !cols.is_multiple_of(block_len) => {
                return Err(KernelError::PartialBlock { dtype, cols, block_len });
            }
            None => {
                return Err(KernelError::MatrixSize {
                    dtype,
                    rows,
                    cols,
                    expected: None,
                    actual: data.len(),
                });
            }
        };
        let expected = row_bytes.checked_mul(rows);
        if expected != Some(data.len()) {
            return Err(KernelError::MatrixSize { dtype, rows, cols, expected, actual: data.len() });
        }
        Ok(Self { dtype, rows, cols, data })
    }

    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    pub const fn rows(&self) -> usize {
        self.rows
    }

    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// The bytes of one row.
    ///
    /// # Panics
    /// If `row` is outside the matrix.
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let bytes = self.data.len() / self.rows;
        &self.data[row * bytes..(row + 1) * bytes]
    }

    /// Writes the f32 values of one row.
    ///
    /// # Panics
    /// If `row` is outside the matrix or `out` is not exactly one row long.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "one row of output");
        dequantize(self.dtype, self.row(row), out);
    }
}

/// Decodes whole blocks; `bytes` and `out` describe the same number of values.
pub(crate) fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let f16_at = |b: &[u8], i: usize| f16::from_le_bytes([b[i], b[i + 1]]).to_f32();
    let blocks = bytes.chunks_exact(dtype.block_bytes()).zip(out.chunks_exact_mut(dtype.block_len()));
    match dtype {
        DType::F32 => blocks.for_each(|(b, o)| o[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        DType::F16 => blocks.for_each(|(b, o)| o[0] = f16_at(b, 0)),
        DType::Bf16 => blocks.for_each(|(b, o)| o[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        DType::Q8_0 => blocks.for_each(|(b, o)| {
            let d = f16_at(b, 0);
            for (o, q) in o.iter_mut().zip(&b[2..]) {
                *o = d * f32::from(q.cast_signed());
            }
        }),
        DType::Q4_0 => blocks.for_each(|(b, o)| {
            let d = f16_at(b, 0);
            for j in 0..16 {
                o[j] = d * (f32::from(b[2 + j] & 15) - 8.0);
                o[j + 16] = d * (f32::from(b[2 + j] >> 4) - 8.0);
            }
        }),
        DType::Q4_1 => blocks.for_each(|(b, o)| {
            let (d, m) = (f16_at(b, 0), f16_at(b, 2));
            for j in 0..16 {
                o[j] = d * f32::from(b[4 + j] & 15) + m;
                o[j + 16] = d * f32::from(b[4 + j] >> 4) + m;
            }
        }),
    }
}

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident, $what:literal, $expected:literal, { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)+
        }

        impl $name {
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl FromStr for $name {
            type Err = KernelError;

            fn from_str(s: &str) -> Result<Self, KernelError> {
                match s {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(KernelError::UnknownName { what: $what, value: s.to_owned(), expected: $expected }),
                }
            }
        }
    };
}

named_enum!(
    /// The class of the values that multiply the weights; part of the numeric class.
    Activations, "activation class", "int8, int16, bf16, f32", {
        F32 = "f32",
        /// Rounded to bf16, for weights of float files.
        Bf16 = "bf16",
        /// 15-bit integers in two bytes, with one f32 scale per 32 values, for weights of block formats.
        Int16 = "int16",
        /// int8 with one f32 scale per 32 values.
        Int8 = "int8",
    }
);

named_enum!(
    /// How keys and values are stored.
    KvDType, "KV cache dtype", "f32, f16, bf16, int8", {
        F32 = "f32",
        F16 = "f16",
        Bf16 = "bf16",
        /// One f32 scale per token and KV head, for keys and for values.
        Int8 = "int8",
    }
);

impl KvDType {
    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }
}

/// How queries and softmax weights are rounded beside a bf16 cache; part of the numeric class. Beside f32 and f16 caches both
/// are f32, beside int8 15-bit integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttentionPrecision {
    /// To one bf16 number.
    Rounded,
    /// To the sum of two, 16 bits of mantissa: what the cache's own rounding costs is all that is lost, for twice the dot
    /// products.
    Split,
}

named_enum!(
    /// Instruction set class of the CPU backend; part of the numeric class.
    Isa, "instruction set", "scalar, avx2, avx512, amx", {
        /// Plain Rust; on every machine.
        Scalar = "scalar",
        /// AVX2, FMA and F16C.
        Avx2 = "avx2",
        /// AVX-512 F, BW, VL, DQ, BF16 and VNNI, or not at all.
        Avx512 = "avx512",
        /// The same with AMX (BF16) for linear layers of bf16 weights.
        Amx = "amx",
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q4_1_block_takes_low_nibbles_first() {
        let mut block = vec![0u8; 20];
        block[0..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        block[2..4].copy_from_slice(&f16::from_f32(-1.0).to_le_bytes());
        block[4] = 0xf3;
        let mut out = [0.0; 32];
        Matrix::new(DType::Q4_1, 1, 32, &block).unwrap().dequantize_row(0, &mut out);
        assert_eq!((out[0], out[16], out[1]), (0.5, 6.5, -1.0));
    }

    #[test]
    fn q4_0_and_q8_0_blocks_are_signed() {
        let mut block = vec![0u8; 18];
        block[0..2].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        block[2 + 15] = 0x0f;
        let mut out = [0.0; 32];
        Matrix::new(DType::Q4_0, 1, 32, &block).unwrap().dequantize_row(0, &mut out);
        assert_eq!((out[0], out[15], out[31]), (-16.0, 14.0, -16.0));
        let mut block = vec![0x80u8; 34];
        block[0..2].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
        Matrix::new(DType::Q8_0, 1, 32, &block).unwrap().dequantize_row(0, &mut out);
        assert_eq!(out, [-32.0; 32]);
    }

    #[test]
    fn wrong_sizes_are_errors() {
        assert_eq!(
            Matrix::new(DType::Q8_0, 1, 33, &[0; 68]).unwrap_err(),
            KernelError::PartialBlock { dtype: DType::Q8_0, cols: 33, block_len: 32 }
        );
        assert!(matches!(Matrix::new(DType::F32, 2, 2, &[0; 15]), Err(KernelError::MatrixSize { .. })));
        assert!(matches!(
            Matrix::new(DType::F32, usize::MAX, usize::MAX, &[]),
            Err(KernelError::MatrixSize { expected: None, .. })
        ));
    }

    #[test]
    fn names_parse_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        assert!("sse9".parse::<Isa>().is_err());
    }
}
