//! Embedding rows read from packed weights, so that tied embeddings and LM head share one copy.

use half::{bf16, f16};

use super::buffer::SharedMut;
use super::pack::{Format, LANES};
use super::{Cpu, Layout, Linear};

impl Cpu {
    /// Row t of `out` f32 [T, E] = row `token_ids[t]` of `table` [V, E], with the exact values that the packed format
    /// holds (those of the file, unless a float file was rounded to bf16).
    ///
    /// # Panics
    /// If shapes do not match or an id is outside the table.
    pub fn embed(&self, table: &Linear, token_ids: &[u32], out: &mut [f32]) {
        let (rows, cols) = (token_ids.len(), table.in_features());
        assert_eq!(table.layout(), Layout::Plain, "an embedding table is plain");
        assert_eq!(out.len(), rows * cols, "output of an embedding");
        assert!(
            token_ids.iter().all(|&id| (id as usize) < table.out_features()),
            "token id outside the table"
        );
        let out = SharedMut::new(out.as_mut_ptr());
        self.for_row_ranges(rows, cols, |range| {
            for row in range {
                // SAFETY: rows are inside the output and written by one worker each.
                let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(row * cols), cols) };
                table.read_row(token_ids[row] as usize, out);
            }
        });
    }
}

impl Linear {
    /// Unpacks output row `row` (K values).
    fn read_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / LANES, row % LANES);
        let panel = &self.data[panel * self.panel_bytes..(panel + 1) * self.panel_bytes];
        let (weights, scales) = panel.split_at(self.scales_offset);
        // The four bytes of this lane in each vector of 64.
        let words =
            |bytes: &[u8]| -> [u8; 4] { bytes[lane * 4..lane * 4 + 4].try_into().expect("four bytes") };
        match self.format {
            Format::F32 => {
                for (out, step) in out.iter_mut().zip(weights.chunks_exact(64)) {
                    *out = f32::from_ne_bytes(words(step));
                }
            }
            Format::Bf16 => {
                for (out, step) in out.chunks_mut(2).zip(weights.chunks_exact(64)) {
                    let [a, b, c, d] = words(step);
                    out[0] = bf16::from_le_bytes([a, b]).to_f32();
                    if let Some(out) = out.get_mut(1) {
                        *out = bf16::from_le_bytes([c, d]).to_f32();
                    }
                }
            }
            Format::Int4 { zero_point, minima } => {
                let scales = scales.chunks_exact(self.format.scale_bytes());
                for ((out, block), scales) in
                    out.chunks_exact_mut(32).zip(weights.chunks_exact(256)).zip(scales)
                {
                    let scale = Scale::read(scales, lane, minima);
                    for (group, bytes) in block.chunks_exact(64).enumerate() {
                        for (i, byte) in words(bytes).into_iter().enumerate() {
                            let value = |nibble: u8| scale.apply(f32::from(nibble) - f32::from(zero_point));
                            out[group * 4 + i] = value(byte & 15);
                            out[16 + group * 4 + i] = value(byte >> 4);
                        }
                    }
                }
            }
            Format::Int8 { minima } => {
                let scales = scales.chunks_exact(self.format.scale_bytes());
                for ((out, block), scales) in
                    out.chunks_exact_mut(32).zip(weights.chunks_exact(512)).zip(scales)
                {
                    let scale = Scale::read(scales, lane, minima);
                    for (out, bytes) in out.chunks_exact_mut(4).zip(block.chunks_exact(64)) {
                        for (out, byte) in out.iter_mut().zip(words(bytes)) {
                            *out = scale.apply(f32::from(byte) - 128.0);
                        }
                    }
                }
            }
        }
    }
}

struct Scale {
    d: f32,
    m: Option<f32>,
}

impl Scale {
    fn read(scales: &[u8], lane: usize, minima: bool) -> Self {
        let at = |start: usize| {
            let start = start + lane * 2;
            f16::from_le_bytes([scales[start], scales[start + 1]]).to_f32()
        };
        Self { d: at(0), m: minima.then(|| at(32)) }
    }

    fn apply(&self, q: f32) -> f32 {
        let scaled = self.d * q;
        self.m.map_or(scaled, |m| scaled + m)
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference::random_matrix;
    use super::super::testing::{Random, backends};
    use super::super::{LinearSpec, Part, SegmentPlan};
    use super::*;
    use crate::{Activations, DType, Matrix};

    /// Packing and reading back is exact for every file type that its class does not round.
    #[test]
    fn packed_rows_read_back_exactly() {
        let mut random = Random::new(4);
        let all = [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1];
        let cpu = backends(2).pop().unwrap();
        for dtype in all {
            for (rows, cols) in [(1, 32), (15, 64), (16, 96), (17, 32), (50, 576)] {
                let cols = if dtype.is_quantized() { cols } else { cols - 1 };
                let bytes = random_matrix(&mut random, dtype, rows, cols);
                let matrix = Matrix::new(dtype, rows, cols, &bytes).unwrap();
                for class in [Activations::F32, Activations::Bf16, Activations::Int8] {
                    let spec = LinearSpec {
                        activations: class,
                        segments: SegmentPlan::whole(),
                        layout: Layout::Plain,
                    };
                    let table = cpu.pack_linear(&[Part::new(matrix)], &spec).unwrap();
                    let ids: Vec<u32> = (0..rows as u32).rev().collect();
                    let mut out = vec![0.0; rows * cols];
                    cpu.embed(&table, &ids, &mut out);
                    let mut expected = vec![0.0; cols];
                    for (id, out) in ids.iter().zip(out.chunks(cols)) {
                        matrix.dequantize_row(*id as usize, &mut expected);
                        if table.format() == "bf16" {
                            expected.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
                        }
                        assert_eq!(out, expected, "{dtype} {class} row {id}");
                    }
                }
            }
        }
    }

    #[test]
    fn permuted_sliced_and_mixed_parts_land_where_they_should() {
        let mut random = Random::new(5);
        let cpu = backends(2).pop().unwrap();
        let (a, b) =
            (random_matrix(&mut random, DType::Q4_1, 24, 96), random_matrix(&mut random, DType::Q8_0, 5, 96));
        let a = Matrix::new(DType::Q4_1, 24, 96, &a).unwrap();
        let b = Matrix::new(DType::Q8_0, 5, 96, &b).unwrap();
        let reversed = |row| 23 - row;
        let parts = [Part::new(a).permute(&reversed).rows(3..20).cols(32..96), Part::new(b).cols(32..96)];
        let spec = LinearSpec {
            activations: Activations::Int8,
            segments: SegmentPlan::whole(),
            layout: Layout::Plain,
        };
        let table = cpu.pack_linear(&parts, &spec).unwrap();
        assert_eq!((table.out_features(), table.in_features()), (22, 64));
        let mut out = vec![0.0; 22 * 64];
        cpu.embed(&table, &(0..22).collect::<Vec<_>>(), &mut out);
        let mut row = vec![0.0; 96];
        for n in 0..22 {
            if n < 17 {
                a.dequantize_row(23 - (n + 3), &mut row)
            } else {
                b.dequantize_row(n - 17, &mut row)
            }
            assert_eq!(out[n * 64..(n + 1) * 64], row[32..], "row {n}");
        }
    }
}
