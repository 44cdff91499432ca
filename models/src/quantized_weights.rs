//! Weights rounded to a block format while they are loaded (`--quantization`).
//!
//! A matrix is rounded when it is asked for, from where it lies in its file, so that at most what is being packed exists
//! twice. Vectors (norms, biases) stay as they are. A matrix that has the type already is handed through; one that
//! has another block type is refused, since rounding it again would lose what neither type loses alone.

use crate::error::ModelError;
use crate::parallel::fill_units;
use crate::quantize::{Unfit, quantize};
use crate::tensor_table::TensorSpec;
use crate::weights::{Tensor, TensorInfo, WeightSource};
use std::borrow::Cow;
use std::collections::BTreeMap;
use tandem_kernels::{DType, Matrix};

/// Another source, its matrices in a block format.
pub(crate) struct QuantizedWeights {
    file: String,
    inner: Box<dyn WeightSource>,
    dtype: DType,
    threads: usize,
    /// The matrices that are rounded, as they are afterwards.
    rounded: BTreeMap<String, TensorInfo>,
}

impl QuantizedWeights {
    /// Those of `specs` that are matrices become `dtype`, on `threads` threads.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] for the first matrix that has another block type, or whose rows are no whole number of blocks.
    pub(crate) fn new(
        file: &str,
        inner: Box<dyn WeightSource>,
        specs: &[TensorSpec],
        dtype: DType,
        threads: usize,
    ) -> Result<Self, ModelError> {
        let mut rounded = BTreeMap::new();
        for TensorSpec { name, shape } in specs {
            let &[_, cols] = &shape[..] else { continue };
            let Some(info) = inner.info(name).filter(|info| info.dtype != dtype) else { continue };
            if info.dtype.is_quantized() {
                let reason = format!(
                    "is {} already and cannot become {dtype}: leave the quantization out, or take a file in BF16, F16 or F32",
                    info.dtype
                );
                return Err(ModelError::tensor(file, name, reason));
            }
            if dtype.row_bytes(cols).is_none() {
                let block = dtype.block_len();
                let reason =
                    format!("rows of {cols} values are no whole number of {dtype} blocks of {block}");
                return Err(ModelError::tensor(file, name, reason));
            }
            rounded.insert(name.clone(), TensorInfo { dtype, ..info.clone() });
        }
        Ok(Self { file: file.to_owned(), inner, dtype, threads, rounded })
    }

    /// All rows of a matrix, in the order of the file.
    fn round(&self, name: &str, matrix: &Matrix<'_>) -> Result<Vec<u8>, ModelError> {
        let refuse = |reason: String| ModelError::tensor(&self.file, name, reason);
        let cols = matrix.cols();
        let row_bytes = self.dtype.row_bytes(cols).expect("checked when the source was made");
        let mut data = vec![0; matrix.rows() * row_bytes];
        let fill = |first: usize, rows: &mut [u8]| {
            let mut values = vec![0.0; cols];
            for (row, out) in (first..).zip(rows.chunks_exact_mut(row_bytes)) {
                matrix.dequantize_row(row, &mut values);
                quantize(self.dtype, &values, out).map_err(|unfit| (row, unfit))?;
            }
            Ok(())
        };
        fill_units(self.threads, row_bytes, &mut data, fill).map_err(|(row, unfit): (usize, Unfit)| {
            refuse(format!("row {row} {unfit}; it cannot be rounded to {}", self.dtype))
        })?;
        Ok(data)
    }
}

impl WeightSource for QuantizedWeights {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.rounded.get(name).or_else(|| self.inner.info(name))
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        let tensor = self.inner.tensor(name)?;
        if !self.rounded.contains_key(name) {
            return Ok(tensor);
        }
        let matrix =
            tensor.matrix().map_err(|error| ModelError::tensor(&self.file, name, error.to_string()))?;
        let data = Cow::Owned(self.round(name, &matrix)?);
        Ok(Tensor { dtype: self.dtype, shape: tensor.shape.clone(), data, row_order: tensor.row_order })
    }

    fn names(&self) -> Vec<&str> {
        self.inner.names()
    }

    /// That of the values before rounding; the type stands in the fingerprint beside it.
    fn sample(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        self.inner.sample(name)
    }
}

#[cfg(test)]
#[path = "quantized_weights_tests.rs"]
mod tests;
