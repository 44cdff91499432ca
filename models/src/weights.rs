//! Tensors by canonical name, whatever file they lie in.
//!
//! Canonical names are those of Hugging Face's Llama (`model.layers.0.self_attn.q_proj.weight`). Data is handed out
//! as the file stores it: little-endian, possibly quantised in blocks, at any alignment, rows possibly in the file's
//! own order. Packing for a backend is the kernels' business.

use crate::error::ModelError;
use half::{bf16, f16};
use std::borrow::Cow;
use tandem_kernels::{DType, KernelError, Matrix};

/// Where weights come from: a GGUF file, safetensors shards, or a random generator.
pub trait WeightSource: Send + Sync {
    /// Type, shape and row order of a tensor; `None` if there is no such tensor.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// A tensor with its data: borrowed from a mapped file, or made on the spot.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if there is no such tensor.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError>;

    /// A matrix as the file has it, if that is in e4m3; [`WeightSource::tensor`] hands it out as bf16.
    fn fp8(&self, _name: &str) -> Option<Fp8Matrix<'_>> {
        None
    }

    /// A matrix in bf16 that nobody has to read, for it is drawn: whoever can, makes it where it is needed. [`WeightSource::tensor`] hands
    /// out the same values.
    fn random(&self, _name: &str) -> Option<RandomMatrix> {
        None
    }

    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool {
        self.info(name).is_some()
    }

    /// All canonical names, sorted.
    fn names(&self) -> Vec<&str>;

    /// A few bytes that tell this tensor's data from another's of the same shape: windows of a mapped file, the
    /// seed of a generator. They enter the model's fingerprint.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if there is no such tensor.
    fn sample(&self, name: &str) -> Result<Vec<u8>, ModelError>;
}

/// A matrix in e4m3.
#[derive(Debug, Clone, Copy)]
pub struct Fp8Matrix<'a> {
    /// `[rows, cols]`.
    pub codes: &'a [u8],
    pub cols: usize,
    pub scales: Fp8Scales<'a>,
}

/// A matrix whose values are draws from a table: element `e`, row after row, is the entry that bits 16 · (e mod 4) and up of word ⌊e / 4⌋
/// name, modulo the length of the table. Word `i` is SplitMix64's hash of `key + i · 0x9e3779b97f4a7c15`.
#[derive(Debug, Clone)]
pub struct RandomMatrix {
    pub rows: usize,
    pub cols: usize,
    pub key: u64,
    pub table: Vec<bf16>,
}

/// What codes are multiplied with.
#[derive(Debug, Clone, Copy)]
pub enum Fp8Scales<'a> {
    Matrix(f32),
    /// One for each row.
    Rows(&'a [f32]),
}

impl Fp8Scales<'_> {
    pub fn of_row(&self, row: usize) -> f32 {
        match self {
            Self::Matrix(scale) => *scale,
            Self::Rows(scales) => scales[row],
        }
    }
}

/// Four windows of 64 bytes, the first at the start and the last at the end; all of it if there is less.
pub(crate) fn spread(data: &[u8]) -> Vec<u8> {
    const WINDOWS: usize = 4;
    const WINDOW_BYTES: usize = 64;
    if data.len() <= WINDOWS * WINDOW_BYTES {
        return data.to_vec();
    }
    let last = data.len() - WINDOW_BYTES;
    let starts = (0..WINDOWS - 1).map(|window| last / (WINDOWS - 1) * window);
    let mut sample: Vec<u8> = starts.flat_map(|start| &data[start..start + WINDOW_BYTES]).copied().collect();
    sample.extend_from_slice(&data[last..]);
    sample
}

/// What is known of a tensor without touching its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Storage type.
    pub dtype: DType,
    /// `[rows, cols]` of a matrix (`cols` lie side by side), `[len]` of a vector.
    pub shape: Vec<usize>,
    /// How the rows lie in the file.
    pub row_order: RowOrder,
}

/// A tensor and its data.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Storage type.
    pub dtype: DType,
    /// `[rows, cols]` of a matrix, `[len]` of a vector.
    pub shape: Vec<usize>,
    /// Exactly `num_bytes` of the shape and type, at any alignment.
    pub data: Cow<'a, [u8]>,
    /// How the rows (elements, for a vector) lie in `data`.
    pub row_order: RowOrder,
}

/// The order of a tensor's rows in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// Row `r` of the file is row `r`.
    Natural,
    /// Query and key rows of Llama GGUF files: within each head the two halves that RoPE couples lie interleaved
    /// (natural row `t · D/2 + j` of a head, `t` in {0, 1}, lies at `2 · j + t`).
    GgufRope {
        /// `D`: rows per head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// Where natural row `row` lies in the file.
    pub fn file_row(self, row: usize) -> usize {
        match self {
            Self::Natural => row,
            Self::GgufRope { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + half
            }
        }
    }
}

impl TensorInfo {
    /// Number of elements; `None` on overflow.
    pub fn num_elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size as u64))
    }

    /// Size of the data in bytes; `None` on overflow or if a row is not a whole number of blocks.
    pub fn num_bytes(&self) -> Option<u64> {
        let (&cols, rows) = self.shape.split_last()?;
        let row_bytes = self.dtype.row_bytes(cols)? as u64;
        rows.iter().try_fold(row_bytes, |product, &size| product.checked_mul(size as u64))
    }
}

impl Tensor<'_> {
    /// Number of rows; 1 for a vector.
    pub fn rows(&self) -> usize {
        if self.shape.len() < 2 { 1 } else { self.shape[0] }
    }

    /// Elements of a row; the length of a vector.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// The data as the kernels see it, rows in the file's order (see [`RowOrder::file_row`]).
    ///
    /// # Errors
    /// What [`Matrix::new`] refuses; it cannot happen for a tensor that this crate handed out.
    pub fn matrix(&self) -> Result<Matrix<'_>, KernelError> {
        Matrix::new(self.dtype, self.rows(), self.cols(), &self.data)
    }

    /// Bytes of natural row `row` of a matrix.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[u8] {
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        let row_bytes = self.data.len() / self.rows();
        let start = self.row_order.file_row(row) * row_bytes;
        &self.data[start..start + row_bytes]
    }

    /// All values in the order of the file as f32; `None` for a quantised type.
    pub fn to_f32_values(&self) -> Option<Vec<f32>> {
        Some(match self.dtype {
            DType::F32 => self.data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
            DType::F16 => {
                self.data.as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect()
            }
            DType::Bf16 => {
                self.data.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect()
            }
            _ => return None,
        })
    }

    /// A vector (norm weight, bias) in natural order as f32; `None` for a matrix or a quantised type.
    pub fn to_f32_vector(&self) -> Option<Vec<f32>> {
        let [len] = self.shape[..] else { return None };
        let in_file_order = self.to_f32_values()?;
        Some((0..len).map(|element| in_file_order[self.row_order.file_row(element)]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rope_rows_follow_the_definition_of_the_gguf_permutation() {
        // The converter writes `w.reshape(H, 2, D/2, E).swapaxes(1, 2).reshape(w.shape)`: file row
        // ((h · D/2) + j) · 2 + t holds natural row ((h · 2) + t) · D/2 + j.
        for (heads, head_dim) in [(1, 2), (3, 4), (9, 64), (2, 6), (4, 128)] {
            let half = head_dim / 2;
            let mut file = vec![usize::MAX; heads * head_dim];
            for (h, t, j) in
                (0..heads).flat_map(|h| (0..2).flat_map(move |t| (0..half).map(move |j| (h, t, j))))
            {
                file[(h * half + j) * 2 + t] = (h * 2 + t) * half + j;
            }
            let order = RowOrder::GgufRope { head_dim };
            for row in 0..heads * head_dim {
                assert_eq!(file[order.file_row(row)], row, "H {heads}, D {head_dim}");
            }
        }
        assert_eq!(RowOrder::Natural.file_row(17), 17);
    }

    #[test]
    fn rows_and_vectors_come_in_natural_order() {
        let order = RowOrder::GgufRope { head_dim: 4 };
        let data: Vec<u8> = [0.0f32, 2.0, 1.0, 3.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        // Unaligned on purpose: one byte in front.
        let shifted = [&[0xff], &data[..]].concat();
        let data = Cow::Borrowed(&shifted[1..]);
        let vector = Tensor { dtype: DType::F32, shape: vec![4], data: data.clone(), row_order: order };
        assert_eq!(vector.to_f32_vector().unwrap(), [0.0, 1.0, 2.0, 3.0]);
        let matrix = Tensor { dtype: DType::F32, shape: vec![4, 1], data, row_order: order };
        assert_eq!(matrix.row(1), 1.0f32.to_le_bytes());
        assert_eq!(matrix.to_f32_vector(), None);
        assert_eq!(matrix.matrix().unwrap().rows(), 4);
    }

    #[test]
    fn sizes_never_overflow() {
        let info = |dtype, shape: &[usize]| TensorInfo {
            dtype,
            shape: shape.to_vec(),
            row_order: RowOrder::Natural,
        };
        assert_eq!(info(DType::Q4_1, &[3, 64]).num_bytes(), Some(120));
        assert_eq!(info(DType::Q4_1, &[3, 33]).num_bytes(), None);
        assert_eq!(info(DType::F32, &[usize::MAX, usize::MAX]).num_bytes(), None);
        assert_eq!(info(DType::F32, &[usize::MAX, usize::MAX]).num_elements(), None);
    }

    #[test]
    fn samples_reach_both_ends() {
        let data: Vec<u8> = (0..10_000u32).map(|value| (value % 251) as u8).collect();
        let sample = spread(&data);
        assert_eq!(sample.len(), 256);
        assert_eq!((&sample[..64], &sample[192..]), (&data[..64], &data[9936..]));
        assert_eq!(spread(&data[..100]), &data[..100]);
    }
}
