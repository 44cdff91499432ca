//! The tensor table: entries to types, shapes and byte ranges that lie in the file and do not overlap.

use super::names::{ROPE_FACTORS, canonical};
use super::reader::{Gguf, TensorEntry};
use crate::error::ModelError;
use crate::weights::{RowOrder, TensorInfo};
use std::collections::BTreeMap;
use std::ops::Range;
use tandem_kernels::DType;

/// All weights by canonical name.
pub(super) fn resolve(
    gguf: &Gguf<'_>,
    head_dim: usize,
) -> Result<BTreeMap<String, (TensorInfo, Range<usize>)>, ModelError> {
    let mut ranges = Vec::with_capacity(gguf.tensors.len());
    let mut tensors = BTreeMap::new();
    for entry in &gguf.tensors {
        let (mut info, range) = locate(gguf, entry)?;
        ranges.push((range.clone(), entry.name));
        if entry.name == ROPE_FACTORS {
            continue;
        }
        let (name, row_order) = canonical(entry.name, head_dim)
            .ok_or_else(|| ModelError::tensor(gguf.file, entry.name, "is no part of a Llama network"))?;
        info.row_order = row_order;
        tensors.insert(name, (info, range));
    }
    ranges.sort_by_key(|(range, _)| (range.start, range.end));
    for pair in ranges.windows(2) {
        let ((before, _), (after, name)) = (&pair[0], &pair[1]);
        if after.start < before.end {
            return Err(ModelError::tensor(gguf.file, name, "overlaps another tensor"));
        }
    }
    Ok(tensors)
}

/// The values of `rope_freqs.weight`, if the file has it.
pub(super) fn rope_factors(gguf: &Gguf<'_>) -> Result<Option<Vec<f32>>, ModelError> {
    let Some(entry) = gguf.tensors.iter().find(|entry| entry.name == ROPE_FACTORS) else { return Ok(None) };
    let (info, range) = locate(gguf, entry)?;
    if info.dtype != DType::F32 || info.shape.len() != 1 {
        return Err(ModelError::tensor(gguf.file, entry.name, "is not a vector of F32"));
    }
    let values = gguf.bytes[range].as_chunks().0.iter();
    Ok(Some(values.map(|&value| f32::from_le_bytes(value)).collect()))
}

/// Whether the file has a tensor of this name.
pub(super) fn has(gguf: &Gguf<'_>, name: &str) -> bool {
    gguf.tensors.iter().any(|entry| entry.name == name)
}

fn locate(gguf: &Gguf<'_>, entry: &TensorEntry<'_>) -> Result<(TensorInfo, Range<usize>), ModelError> {
    let refuse = |reason: String| ModelError::tensor(gguf.file, entry.name, reason);
    let dtype = dtype(entry.type_id)
        .ok_or_else(|| refuse(format!("type {} is not supported", type_name(entry.type_id))))?;
    let dims = entry.dims[..entry.num_dims].iter().rev();
    let shape: Option<Vec<usize>> = dims.map(|&dim| usize::try_from(dim).ok()).collect();
    let shape = shape.ok_or_else(|| refuse("its size overflows".into()))?;
    let info = TensorInfo { dtype, shape, row_order: RowOrder::Natural };
    let num_bytes = info.num_bytes().ok_or_else(|| {
        refuse(format!(
            "shape {:?} of {} is no whole number of blocks, or its size overflows",
            info.shape,
            dtype.name()
        ))
    })?;
    if !entry.offset.is_multiple_of(gguf.alignment) {
        return Err(refuse(format!(
            "offset {} is not a multiple of the alignment {}",
            entry.offset, gguf.alignment
        )));
    }
    let start = gguf.data_start.checked_add(entry.offset);
    let end =
        start.and_then(|start| start.checked_add(num_bytes)).filter(|&end| end <= gguf.bytes.len() as u64);
    match (start, end) {
        (Some(start), Some(end)) => Ok((info, start as usize..end as usize)),
        _ => Err(refuse(format!(
            "{num_bytes} bytes at offset {} reach past the end of the file",
            entry.offset
        ))),
    }
}

/// The types that can be loaded, by ggml's numbers.
fn dtype(type_id: u32) -> Option<DType> {
    Some(match type_id {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        8 => DType::Q8_0,
        30 => DType::Bf16,
        _ => return None,
    })
}

/// ggml's names of the other types, for messages.
fn type_name(type_id: u32) -> String {
    let name = match type_id {
        4 => "Q4_2",
        5 => "Q4_3",
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("number {type_id}"),
    };
    name.to_owned()
}
