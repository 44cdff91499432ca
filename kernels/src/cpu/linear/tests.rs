//! Every ISA against f64 over shapes around the tiles, and the invariance that the crate promises.

use super::super::reference::{dequantize, dot, integer_rounded, random_matrix};
use super::super::testing::{Random, backends};
use super::super::{Cpu, LinearSpec, Part, SegmentPlan};
use super::*;
use crate::{DType, Matrix};
use half::bf16;

const ALL: [DType; 6] = [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1];
const CLASSES: [Activations; 4] =
    [Activations::F32, Activations::Bf16, Activations::Int16, Activations::Int8];

fn spec(activations: Activations, segments: usize) -> LinearSpec {
    LinearSpec { activations, segments: SegmentPlan::new(segments), layout: Layout::Plain }
}

fn activation(cpu: &Cpu, x: &[f32], cols: usize, class: Activations) -> Activation {
    let mut out = Activation::new(x.len() / cols, cols, class);
    cpu.team().quantize(x, &mut out);
    out
}

fn multiply(cpu: &Cpu, weights: &Linear, x: &[f32]) -> Vec<f32> {
    let x = activation(cpu, x, weights.in_features(), weights.activations());
    let mut out = vec![f32::NAN; x.rows() * weights.out_features()];
    cpu.team().linear(weights, &x, &mut out, Epilogue::Store);
    out
}

/// What a class makes of a row of input.
fn rounded(x: &[f32], class: Activations) -> Vec<f32> {
    match class {
        Activations::F32 => x.to_vec(),
        Activations::Bf16 => x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
        Activations::Int8 => integer_rounded(x, 127.0),
        Activations::Int16 => integer_rounded(x, 16256.0),
    }
}

/// Compares with f64 on the rounded inputs: what is left is f32 rounding of K additions, of magnitudes that the sum of
/// absolute products bounds.
fn check(cpu: &Cpu, weights: &Linear, rows: &[Vec<f32>], x: &[f32], what: &str) {
    let (cols, n) = (weights.in_features(), weights.out_features());
    let got = multiply(cpu, weights, x);
    let class = weights.activations();
    for (t, x) in x.chunks(cols).enumerate() {
        let x = rounded(x, class);
        for (row, w) in rows.iter().enumerate() {
            let w: Vec<f32> = if weights.format() == "bf16" {
                w.iter().map(|&w| bf16::from_f32(w).to_f32()).collect()
            } else {
                w.clone()
            };
            let magnitude: f64 = w.iter().zip(&x).map(|(w, x)| f64::from((w * x).abs())).sum();
            // Minima and zero points make terms that cancel: allow for the largest weight everywhere.
            let largest = w.iter().fold(0.0f32, |a, w| a.max(w.abs()));
            let bound = f64::from(largest) * x.iter().map(|x| f64::from(x.abs())).sum::<f64>();
            let error = (f64::from(got[t * n + row]) - dot(&w, &x)).abs();
            let tolerance = 3e-7 * (cols as f64).sqrt() * (magnitude + bound) + 1e-30;
            assert!(error <= tolerance, "{} {what} [{t},{row}]: error {error:e} > {tolerance:e}", cpu.isa());
        }
    }
}

#[test]
fn every_isa_matches_f64_around_every_tile() {
    let mut random = Random::new(20);
    let shapes =
        [(1, 32), (15, 32), (16, 64), (17, 96), (31, 32), (32, 160), (33, 64), (47, 32), (48, 320), (49, 96)];
    for dtype in ALL {
        for (n, k) in shapes {
            // Float files take any K.
            let k = if dtype.is_quantized() { k } else { k - random.below(20) };
            let bytes = random_matrix(&mut random, dtype, n, k);
            let matrix = Matrix::new(dtype, n, k, &bytes).unwrap();
            let rows = dequantize(&matrix);
            let x = random.vec(19 * k);
            for cpu in backends(2) {
                for class in CLASSES {
                    let weights = cpu.pack_linear(&[Part::new(matrix)], &spec(class, 1)).unwrap();
                    for t in [1, 2, 3, 5, 6, 7, 12, 13, 19] {
                        check(&cpu, &weights, &rows, &x[..t * k], &format!("{dtype} {class} {t}x{n}x{k}"));
                    }
                }
            }
        }
    }
}

/// Products of int8 blocks are exact integers: with powers of two as scales every ISA must give the exact result.
#[test]
fn extremes_are_exact() {
    let one = half::f16::from_f32(1.0).to_le_bytes();
    let block = |dtype: DType, fill: &dyn Fn(usize) -> u8| {
        let mut bytes = one.to_vec();
        if dtype == DType::Q4_1 {
            bytes.extend(half::f16::from_f32(-2.0).to_le_bytes());
        }
        let quants = if dtype == DType::Q8_0 { 32 } else { 16 };
        bytes.extend((0..quants).map(fill));
        bytes
    };
    let fills: [&dyn Fn(usize) -> u8; 5] =
        [&|_| 0x80, &|_| 0x7f, &|_| 0xff, &|_| 0x00, &|i| if i % 2 == 0 { 0x80 } else { 0x7f }];
    for dtype in [DType::Q8_0, DType::Q4_0, DType::Q4_1] {
        for fill in fills {
            let bytes = block(dtype, fill).repeat(17 * 2);
            let matrix = Matrix::new(dtype, 17, 64, &bytes).unwrap();
            let rows = dequantize(&matrix);
            for sign in [1.0f32, -1.0, 0.0] {
                // ±127 everywhere: the scale is 1. Alternating signs too.
                let x: Vec<f32> = (0..8 * 64)
                    .map(|i| if i / 64 % 2 == 1 && i % 2 == 1 { -127.0 } else { 127.0 } * sign)
                    .collect();
                for cpu in backends(1) {
                    for class in [Activations::Int8, Activations::Int16] {
                        let weights = cpu.pack_linear(&[Part::new(matrix)], &spec(class, 1)).unwrap();
                        let got = multiply(&cpu, &weights, &x);
                        for (t, x) in x.chunks(64).enumerate() {
                            for (n, w) in rows.iter().enumerate() {
                                assert_eq!(
                                    f64::from(got[t * 17 + n]),
                                    dot(w, x),
                                    "{} {dtype} {class}",
                                    cpu.isa()
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// One row or many, one thread or several, few panels or many: the same bits.
#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut random = Random::new(21);
    let (n, k) = (83, 192);
    for dtype in ALL {
        let bytes = random_matrix(&mut random, dtype, n, k);
        let matrix = Matrix::new(dtype, n, k, &bytes).unwrap();
        let x = random.vec(150 * k);
        for class in CLASSES {
            for segments in [1, 3, 6] {
                let mut machines: Vec<Vec<Cpu>> = (1..=3).map(backends).collect();
                while let Some(cpu) = machines[0].pop() {
                    let others = [machines[1].pop().unwrap(), machines[2].pop().unwrap()];
                    let weights = cpu.pack_linear(&[Part::new(matrix)], &spec(class, segments)).unwrap();
                    let whole = multiply(&cpu, &weights, &x);
                    for other in &others {
                        assert_eq!(multiply(other, &weights, &x), whole, "{} threads", other.threads());
                    }
                    for t in [1, 2, 4, 6, 7, 11, 16, 127] {
                        let part = multiply(&others[0], &weights, &x[k..(t + 1) * k]);
                        assert_eq!(
                            part,
                            whole[n..(t + 1) * n],
                            "{} {dtype} {class} {segments} {t}",
                            cpu.isa()
                        );
                    }
                }
            }
        }
    }
}

/// What the module of the matrix unit says of its rounding.
#[test]
fn the_matrix_unit_adds_even_and_odd_products_apart() {
    let mut random = Random::new(28);
    let (n, k) = (40, 100);
    let bytes = random_matrix(&mut random, DType::Bf16, n, k);
    let matrix = Matrix::new(DType::Bf16, n, k, &bytes).unwrap();
    let rows = dequantize(&matrix);
    let x = random.vec(50 * k);
    for cpu in backends(1).into_iter().filter(|cpu| cpu.isa() == Isa::Amx) {
        let weights = cpu.pack_linear(&[Part::new(matrix)], &spec(Activations::Bf16, 1)).unwrap();
        let got = multiply(&cpu, &weights, &x);
        for (t, x) in x.chunks(k).enumerate() {
            let x = rounded(x, Activations::Bf16);
            for (row, w) in rows.iter().enumerate() {
                let mut sum = 0.0f32;
                for (x, w) in x.chunks(32).zip(w.chunks(32)) {
                    let chain = |first: usize| {
                        let pairs = x.iter().zip(w).skip(first).step_by(2);
                        pairs.fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum))
                    };
                    sum += chain(0) + chain(1);
                }
                assert_eq!(got[t * n + row], sum, "[{t},{row}]");
            }
        }
    }
}

/// A K beyond what the caches hold of a panel, and more rows than one block of partial sums.
#[test]
fn long_inputs_match_too() {
    let mut random = Random::new(22);
    let (n, k) = (33, 4416);
    for dtype in [DType::Q4_1, DType::Q8_0, DType::Bf16] {
        let bytes = random_matrix(&mut random, dtype, n, k);
        let matrix = Matrix::new(dtype, n, k, &bytes).unwrap();
        let rows = dequantize(&matrix);
        let x = random.vec(40 * k);
        for cpu in backends(2) {
            for class in [Activations::Bf16, Activations::Int16, Activations::Int8] {
                let weights = cpu.pack_linear(&[Part::new(matrix)], &spec(class, 1)).unwrap();
                check(&cpu, &weights, &rows, &x[..3 * k], "long");
                let whole = multiply(&cpu, &weights, &x);
                assert_eq!(multiply(&cpu, &weights, &x[..k]), whole[..n]);
            }
        }
    }
}

#[test]
fn segments_add_up_in_their_tree() {
    let mut random = Random::new(23);
    let (n, t) = (21, 9);
    for segments in [1, 2, 3, 4, 5, 6, 8, 12] {
        let k = segments * 32;
        let bytes = random_matrix(&mut random, DType::Q4_1, n, k);
        let matrix = Matrix::new(DType::Q4_1, n, k, &bytes).unwrap();
        let bias = random.vec(n);
        let x = random.vec(t * k);
        let residual = random.vec(t * n);
        for cpu in backends(2) {
            let parts = [Part::new(matrix).bias(&bias)];
            let weights = cpu.pack_linear(&parts, &spec(Activations::Int8, segments)).unwrap();
            let packed = activation(&cpu, &x, k, Activations::Int8);
            let mut partials = vec![0.0; segments * t * n];
            cpu.team().linear_segments(&weights, &packed, &mut partials);
            // Each segment alone is a layer over its own columns.
            for segment in 0..segments {
                let cols = segment * 32..(segment + 1) * 32;
                let alone = cpu
                    .pack_linear(&[Part::new(matrix).cols(cols.clone())], &spec(Activations::Int8, 1))
                    .unwrap();
                let x: Vec<f32> = x.chunks(k).flat_map(|x| x[cols.clone()].to_vec()).collect();
                assert_eq!(multiply(&cpu, &alone, &x), partials[segment * t * n..(segment + 1) * t * n]);
            }
            // The tree, written out recursively.
            fn tree(values: &[f32]) -> f32 {
                match values {
                    [one] => *one,
                    _ => tree(&values[..values.len() / 2]) + tree(&values[values.len() / 2..]),
                }
            }
            let group = 1 << segments.trailing_zeros();
            let expected: Vec<f32> = (0..t * n)
                .map(|i| {
                    let values: Vec<f32> =
                        (0..segments).map(|segment| partials[segment * t * n + i]).collect();
                    let sum = values.chunks(group).map(tree).reduce(|a, b| a + b).unwrap();
                    sum + bias[i % n]
                })
                .collect();
            assert_eq!(multiply(&cpu, &weights, &x), expected, "{} {segments}", cpu.isa());
            let mut reduced = vec![0.0; t * n];
            cpu.team().reduce_segments(&partials, segments, weights.bias(), &mut reduced, Epilogue::Store);
            assert_eq!(reduced, expected);
            let (mut a, mut b) = (residual.clone(), residual.clone());
            cpu.team().linear(&weights, &packed, &mut a, Epilogue::Add);
            cpu.team().reduce_segments(&partials, segments, Some(&bias), &mut b, Epilogue::Add);
            assert_eq!(a, b);
            assert!(a.iter().zip(&residual).zip(&expected).all(|((a, r), e)| *a == r + e));
            let (mut c, mut d) = (vec![0.0; t * n], expected.clone());
            cpu.team().reduce_segments(&partials, segments, None, &mut c, Epilogue::Store);
            d.iter_mut().enumerate().for_each(|(i, d)| *d -= bias[i % n]);
            assert!(c.iter().zip(&d).all(|(c, d)| (c - d).abs() < 1e-4));
        }
    }
}

/// A row of an f32 activation with its padding.
fn f32_row(a: &Activation, row: usize) -> Vec<f32> {
    let view = a.view();
    let len = a.cols().next_multiple_of(GROUP);
    // SAFETY: rows are padded to whole groups, and the row was written.
    unsafe { std::slice::from_raw_parts(view.values.add(row * view.row_bytes).cast(), len).to_vec() }
}

/// Rounding inside the layer is rounding after it, and padding is zero.
#[test]
fn gated_outputs_are_rounded_as_plain_ones() {
    let mut random = Random::new(27);
    for (n, k, t) in [(16, 32, 1), (24, 64, 7), (40, 96, 13), (96, 64, 140)] {
        let data = [(), ()].map(|()| random_matrix(&mut random, DType::Q4_1, n, k));
        let parts = data.each_ref().map(|bytes| Part::new(Matrix::new(DType::Q4_1, n, k, bytes).unwrap()));
        let x = random.vec(t * k);
        for cpu in backends(3) {
            let spec = LinearSpec { layout: Layout::GateUp, ..spec(Activations::Int8, 1) };
            let packed = cpu.pack_linear(&parts, &spec).unwrap();
            let input = activation(&cpu, &x, k, Activations::Int8);
            let mut plain = Activation::new(t, n, Activations::F32);
            cpu.team().gated_linear(&packed, &input, &mut plain);
            let rows: Vec<Vec<f32>> = (0..t).map(|row| f32_row(&plain, row)).collect();
            assert!(rows.iter().all(|row| row[n..].iter().all(|&x| x == 0.0)), "padding");
            let values: Vec<f32> = rows.iter().flat_map(|row| row[..n].to_vec()).collect();
            for class in CLASSES {
                let expected = activation(&cpu, &values, n, class);
                let mut got = Activation::new(t, n, class);
                cpu.team().gated_linear(&packed, &input, &mut got);
                let bytes = |a: &Activation| {
                    let view = a.view();
                    // SAFETY: both were written with `t` rows.
                    unsafe { std::slice::from_raw_parts(view.values, t * view.row_bytes).to_vec() }
                };
                assert_eq!(bytes(&got), bytes(&expected), "{} {class}", cpu.isa());
            }
        }
    }
}

#[test]
fn gate_and_up_make_swiglu() {
    let mut random = Random::new(24);
    for (n, k, t) in [(16, 32, 1), (24, 64, 7), (40, 96, 13)] {
        let (gate, up) =
            (random_matrix(&mut random, DType::Q4_0, n, k), random_matrix(&mut random, DType::Q8_0, n, k));
        let gate = Matrix::new(DType::Q4_0, n, k, &gate).unwrap();
        let up = Matrix::new(DType::Q8_0, n, k, &up).unwrap();
        let bias = random.vec(n);
        let x = random.vec(t * k);
        for cpu in backends(2) {
            for class in CLASSES {
                let parts = [Part::new(gate).bias(&bias), Part::new(up)];
                let packed = cpu
                    .pack_linear(&parts, &LinearSpec { layout: Layout::GateUp, ..spec(class, 1) })
                    .unwrap();
                assert_eq!(packed.out_features(), n);
                let input = activation(&cpu, &x, k, packed.activations());
                let mut gated = Activation::new(t, n, Activations::F32);
                cpu.team().gated_linear(&packed, &input, &mut gated);
                let out: Vec<f32> = (0..t).flat_map(|row| f32_row(&gated, row)[..n].to_vec()).collect();
                // Apart, in the same format, so that only the epilogue differs.
                let plain = cpu.pack_linear(&parts, &spec(class, 1)).unwrap();
                let both = multiply(&cpu, &plain, &x);
                for (i, out) in out.iter().enumerate() {
                    let (row, col) = (i / n, i % n);
                    let (g, u) = (both[row * 2 * n + col], both[row * 2 * n + n + col]);
                    let expected = f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u);
                    assert!(
                        (f64::from(*out) - expected).abs() <= 1e-6 * (1.0 + expected.abs()),
                        "{}",
                        cpu.isa()
                    );
                }
            }
        }
    }
}

#[test]
fn mixed_parts_and_zero_scales_work() {
    let mut random = Random::new(25);
    let k = 96;
    let mut data: Vec<(DType, Vec<u8>)> = [DType::Q4_1, DType::Q8_0, DType::Q4_0]
        .map(|dtype| (dtype, random_matrix(&mut random, dtype, 10, k)))
        .to_vec();
    // A block of zero scale among the others.
    data[0].1[..2].fill(0);
    let parts: Vec<Matrix<'_>> =
        data.iter().map(|(dtype, bytes)| Matrix::new(*dtype, 10, k, bytes).unwrap()).collect();
    let rows: Vec<Vec<f32>> = parts.iter().flat_map(dequantize).collect();
    let x = random.vec(8 * k);
    for cpu in backends(1) {
        for class in CLASSES {
            let parts: Vec<Part<'_>> = parts.iter().copied().map(Part::new).collect();
            let weights = cpu.pack_linear(&parts, &spec(class, 1)).unwrap();
            check(&cpu, &weights, &rows, &x, &format!("mixed {class}"));
        }
    }
}

#[test]
fn bad_values_show_in_their_row_only() {
    let mut random = Random::new(26);
    let (n, k, t) = (20, 64, 8);
    for dtype in ALL {
        let mut bytes = random_matrix(&mut random, dtype, n, k);
        // Zero scales must not hide it.
        bytes[..2].fill(0);
        let matrix = Matrix::new(dtype, n, k, &bytes).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let clean = random.vec(t * k);
            let mut x = clean.clone();
            x[3 * k + 5] = bad;
            for cpu in backends(1) {
                for class in CLASSES {
                    let weights = cpu.pack_linear(&[Part::new(matrix)], &spec(class, 1)).unwrap();
                    let (expected, got) = (multiply(&cpu, &weights, &clean), multiply(&cpu, &weights, &x));
                    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                        if i / n == 3 {
                            assert!(!got.is_finite(), "{} {dtype} {class} {bad}", cpu.isa());
                        } else {
                            assert_eq!(got, expected);
                        }
                    }
                }
            }
        }
    }
}
