//! The plain oracle: what each operation means, in the simplest loops, with sums in f64.

use half::{bf16, f16};

use super::testing::Random;
use super::{Activation, AttentionBatch};
use crate::{DType, Matrix};

/// Random weights of a storage type; block scales are small, nibbles and bytes use their whole range.
pub(crate) fn random_matrix(random: &mut Random, dtype: DType, rows: usize, cols: usize) -> Vec<u8> {
    let blocks = rows * cols / dtype.block_len();
    let mut bytes = Vec::with_capacity(blocks * dtype.block_bytes());
    for _ in 0..blocks {
        let x = random.f32();
        let scale = f16::from_f32(x * 0.02).to_le_bytes();
        match dtype {
            DType::F32 => bytes.extend(x.to_le_bytes()),
            DType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
            DType::Bf16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
            DType::Q8_0 | DType::Q4_0 => bytes.extend(scale),
            DType::Q4_1 => {
                bytes.extend(scale);
                bytes.extend(f16::from_f32(random.f32() * 0.1).to_le_bytes());
            }
        }
        let quants = match dtype {
            DType::Q8_0 => 32,
            DType::Q4_0 | DType::Q4_1 => 16,
            _ => 0,
        };
        bytes.extend((0..quants).map(|_| random.next() as u8));
    }
    bytes
}

/// Σ w · x in f64 over the values given.
pub(crate) fn dot(w: &[f32], x: &[f32]) -> f64 {
    w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
}

pub(crate) fn dequantize(matrix: &Matrix<'_>) -> Vec<Vec<f32>> {
    (0..matrix.rows())
        .map(|row| {
            let mut out = vec![0.0; matrix.cols()];
            matrix.dequantize_row(row, &mut out);
            out
        })
        .collect()
}

/// int8 with one scale per 32 values, as f32: what the int8 class multiplies.
pub(crate) fn integer_rounded(x: &[f32], max: f32) -> Vec<f32> {
    x.chunks(32)
        .flat_map(|group| {
            let amax = group.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            let inverse = if amax == 0.0 { 0.0 } else { max / amax };
            group.iter().map(move |x| (x * inverse).round_ties_even() * (amax / max))
        })
        .collect()
}

pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32).collect()
}

/// A row of an f32 activation.
pub(crate) fn f32_row(activation: &Activation, row: usize) -> Vec<f32> {
    let view = activation.view();
    assert!(activation.class() == crate::Activations::F32 && row < activation.rows());
    // SAFETY: the row is inside the activation, which is borrowed.
    unsafe {
        let row = view.values.add(row * view.row_bytes).cast::<f32>();
        std::slice::from_raw_parts(row, activation.cols()).to_vec()
    }
}

/// Causal attention; `read(head, slot, d)` gives key and value.
pub(crate) fn attention(
    qkv: &[f32],
    batch: &AttentionBatch<'_>,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    scale: f32,
    read: impl Fn(usize, usize, usize) -> (f32, f32),
) -> Vec<f32> {
    let width = (heads + 2 * kv_heads) * head_dim;
    let mut out = Vec::new();
    for sequence in 0..batch.context_lens.len() {
        let blocks = &batch.block_tables[batch.block_table_offsets[sequence] as usize..];
        let tokens = batch.cu_seqlens[sequence]..batch.cu_seqlens[sequence + 1];
        for (i, t) in tokens.enumerate() {
            let keys = batch.context_lens[sequence] as usize + i + 1;
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let query = &qkv[t as usize * width + head * head_dim..][..head_dim];
                let slot = |key: usize| blocks[key / 16] as usize * 16 + key % 16;
                let scores: Vec<f64> = (0..keys)
                    .map(|key| {
                        let dot: f64 = (0..head_dim)
                            .map(|d| f64::from(query[d]) * f64::from(read(kv_head, slot(key), d).0))
                            .sum();
                        dot * f64::from(scale)
                    })
                    .collect();
                let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - maximum).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let sum: f64 =
                        (0..keys).map(|key| weights[key] * f64::from(read(kv_head, slot(key), d).1)).sum();
                    out.push((sum / total) as f32);
                }
            }
        }
    }
    out
}
