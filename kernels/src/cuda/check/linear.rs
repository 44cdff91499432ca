//! Checks of linear layers and of formats of weights.

use half::{bf16, f16};

use super::super::launcher::{self, Address, Epilogue, KSplits, Launch, Product, Weights};
use super::super::reference;
use super::{Case, Checks, wide};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Format {
    Bf16,
    Fp8,
    Q8,
    Q4_0,
    Q4_1,
}

/// Weights of a format, and what they are worth.
fn random_weights(
    case: &mut Case<'_>,
    format: Format,
    n: usize,
    k: usize,
) -> Result<(Weights, Vec<f64>), String> {
    let num_blocks = n * k / 32;
    let scales: Vec<f16> = case.random.f32s(num_blocks, 0.1).into_iter().map(f16::from_f32).collect();
    let mins: Vec<f16> = case.random.f32s(num_blocks, 0.5).into_iter().map(f16::from_f32).collect();
    let bytes: Vec<u8> = (0..n * k).map(|_| case.random.next() as u8).collect();
    let scale = |i: usize| scales[i / 32].to_f64();
    let nibble = |i: usize| {
        let byte = bytes[i / 32 * 16 + i % 16];
        f64::from(if i % 32 < 16 { byte & 15 } else { byte >> 4 })
    };
    Ok(match format {
        Format::Bf16 => {
            let values = case.random.bf16s(n * k, 1.0);
            (Weights::Bf16 { values: case.input(&values)?.address }, wide(&values))
        }
        Format::Fp8 => {
            let values: Vec<u8> = bytes.iter().map(|&x| if x & 0x7f == 0x7f { 0x80 } else { x }).collect();
            let scales = case.random.f32s(n, 0.1);
            let worth =
                (0..n * k).map(|i| reference::f64_of_fp8(values[i]) * f64::from(scales[i / k])).collect();
            let (values, scales) = (case.input(&values)?.address, case.input(&scales)?.address);
            (Weights::Fp8 { values, scales }, worth)
        }
        Format::Q8 => {
            let worth = (0..n * k).map(|i| f64::from(bytes[i].cast_signed()) * scale(i)).collect();
            let (values, scales) = (case.input(&bytes)?.address, case.input(&scales)?.address);
            (Weights::Q8 { values, scales }, worth)
        }
        Format::Q4_0 => {
            let worth = (0..n * k).map(|i| (nibble(i) - 8.0) * scale(i)).collect();
            let (values, scales) = (case.input(&bytes[..n * k / 2])?.address, case.input(&scales)?.address);
            (Weights::Q4_0 { values, scales }, worth)
        }
        Format::Q4_1 => {
            let worth = (0..n * k).map(|i| nibble(i) * scale(i) + mins[i / 32].to_f64()).collect();
            let values = case.input(&bytes[..n * k / 2])?.address;
            let (scales, mins) = (case.input(&scales)?.address, case.input(&mins)?.address);
            (Weights::Q4_1 { values, scales, mins }, worth)
        }
    })
}

pub(super) fn gemv(checks: &mut Checks<'_>) {
    // One unit, a tail of a group, less than all warps, more than once around, and tails of columns.
    let shapes = [(1, 16, 32), (2, 40, 576), (8, 24, 1312), (3, 17, 96), (5, 64, 2080)];
    for format in [Format::Bf16, Format::Fp8, Format::Q8, Format::Q4_0, Format::Q4_1] {
        for epilogue in [Epilogue::StoreBf16, Epilogue::StoreF32, Epilogue::AddF32, Epilogue::SwiGlu] {
            for (num_tokens, num_columns, size) in shapes {
                let product = Product { num_tokens, num_columns, size };
                checks.case(format!("gemv {format:?} {epilogue:?} {product:?}"), |case| {
                    gemv_case(case, format, epilogue, product)
                });
            }
        }
    }
}

pub(super) fn skinny_gemm(checks: &mut Checks<'_>) {
    // Less than a stage, a tail of one, more than all stages at once; tails of columns; fewer stages than splits. They come before
    // the first start on a GPU too, so they are small.
    let shapes: [(usize, usize, usize, usize); 5] =
        [(1, 8, 16, 1), (16, 72, 208, 2), (17, 64, 1040, 3), (33, 40, 576, 4), (64, 136, 656, 1)];
    for format in [Format::Bf16, Format::Fp8, Format::Q8, Format::Q4_0, Format::Q4_1] {
        let in_blocks = !matches!(format, Format::Bf16 | Format::Fp8);
        for epilogue in [Epilogue::StoreBf16, Epilogue::AddF32, Epilogue::SwiGlu] {
            for (num_tokens, num_columns, size, num_splits) in shapes {
                let size = if in_blocks { size.next_multiple_of(32) } else { size };
                let product = Product { num_tokens, num_columns, size };
                let name = format!("skinny_gemm {format:?} {epilogue:?} {product:?}, {num_splits} splits");
                checks.case(name, |case| skinny_case(case, format, epilogue, product, num_splits));
            }
        }
    }
}

fn skinny_case(
    case: &mut Case<'_>,
    format: Format,
    epilogue: Epilogue,
    product: Product,
    num_splits: usize,
) -> Result<(), String> {
    let tiles = launcher::skinny_tiles(epilogue, product.num_columns);
    let partials = case.output::<f32>(KSplits::partial_bytes(tiles * num_splits) / 4)?;
    let zeros = vec![0u32; tiles];
    let counters = case.input(&zeros)?;
    let splits = KSplits { num_splits, partials: partials.address, counters: counters.address };
    let in_blocks = !matches!(format, Format::Bf16 | Format::Fp8);
    linear_case(case, (format, in_blocks), epilogue, product, |out, x, weights| {
        launcher::skinny_gemm(out, x, weights, epilogue, product, splits)
    })?;
    case.expect_equal("counters", counters, &zeros)
}

fn gemv_case(
    case: &mut Case<'_>,
    format: Format,
    epilogue: Epilogue,
    product: Product,
) -> Result<(), String> {
    linear_case(case, (format, false), epilogue, product, |out, x, weights| {
        launcher::gemv(out, x, weights, epilogue, product)
    })
}

/// A layer of random weights, which the kernel rounds to bf16 first or not, launched by `launch(out, x, weights)`.
fn linear_case(
    case: &mut Case<'_>,
    (format, rounds_weights): (Format, bool),
    epilogue: Epilogue,
    product: Product,
    launch: impl Fn(Address, Address, Weights) -> Launch,
) -> Result<(), String> {
    let Product { num_tokens, num_columns, size } = product;
    let num_rows = num_columns * if epilogue == Epilogue::SwiGlu { 2 } else { 1 };
    let (weights, mut worth) = random_weights(case, format, num_rows, size)?;
    if rounds_weights {
        worth.iter_mut().for_each(|worth| *worth = bf16::from_f64(*worth).to_f64());
    }
    let x_values = case.random.bf16s(num_tokens * size, 0.2);
    let y = reference::linear(&wide(&x_values), &worth, size);
    let x = case.input(&x_values)?.address;
    let len = num_tokens * num_columns;
    match epilogue {
        Epilogue::StoreBf16 => {
            let out = case.output::<bf16>(len)?;
            case.launch(launch(out.address, x, weights))?;
            case.expect_bf16("out", out, &y)
        }
        Epilogue::StoreF32 => {
            let out = case.output::<f32>(len)?;
            case.launch(launch(out.address, x, weights))?;
            case.expect_f32("out", out, &y)
        }
        Epilogue::AddF32 => {
            let before = case.random.f32s(len, 2.0);
            let out = case.input(&before)?;
            case.launch(launch(out.address, x, weights))?;
            let sum: Vec<f64> = y.iter().zip(&before).map(|(y, &before)| y + f64::from(before)).collect();
            case.expect_f32("out", out, &sum)
        }
        Epilogue::SwiGlu => {
            let out = case.output::<bf16>(len)?;
            case.launch(launch(out.address, x, weights))?;
            let expected: Vec<f64> = (y.chunks(2 * num_columns))
                .flat_map(|row| (0..num_columns).map(|n| reference::silu(row[n]) * row[num_columns + n]))
                .collect();
            case.expect_bf16("out", out, &expected)
        }
    }
}

pub(super) fn quantize(checks: &mut Checks<'_>) {
    for (num_rows, size) in [(1, 32), (3, 576), (2, 2080)] {
        for format in [Format::Fp8, Format::Q8, Format::Q4_0, Format::Q4_1] {
            checks.case(format!("dequantize {format:?} {num_rows}x{size}"), |case| {
                let (weights, worth) = random_weights(case, format, num_rows, size)?;
                let out = case.output::<bf16>(num_rows * size)?;
                case.launch(launcher::dequantize(out.address, weights, num_rows, size))?;
                case.expect_bf16("out", out, &worth)
            });
        }
        checks.case(format!("quantize_fp8 {num_rows}x{size}"), |case| quantize_case(case, num_rows, size));
    }
    checks.case("quantize_fp8 of every bf16 below 448".into(), every_bf16);
}

fn quantize_case(case: &mut Case<'_>, num_rows: usize, size: usize) -> Result<(), String> {
    let mut x_values = case.random.bf16s(num_rows * size, 5.0);
    if num_rows > 1 {
        x_values[..size].fill(bf16::ZERO);
    }
    let (values, scales) = (case.output::<u8>(num_rows * size)?, case.output::<f32>(num_rows)?);
    let x = case.input(&x_values)?;
    case.launch(launcher::quantize_fp8(values.address, scales.address, x.address, num_rows, size))?;
    let expected: Vec<f64> = (x_values.chunks(size))
        .map(|row| row.iter().fold(0f64, |max, x| max.max(x.to_f64().abs())))
        .map(|largest| if largest == 0.0 { 1.0 } else { largest / 448.0 })
        .collect();
    case.expect_f32("scales", scales, &expected)?;
    let (found, scales) = (case.read(values)?, case.read(scales)?);
    for (at, (&found, x)) in found.iter().zip(&x_values).enumerate() {
        let scaled = x.to_f32() / scales[at / size];
        // Division on a device may round the last bit otherwise, which matters half way between two codes.
        let near = [scaled, scaled.next_up(), scaled.next_down()];
        if !near.iter().any(|&x| reference::fp8_of_f64(f64::from(x)) == found) {
            return Err(format!("values[{at}] of {scaled} is {found:#x}"));
        }
    }
    Ok(())
}

/// With 448 in each row the scale is 1, so that codes can be compared exactly.
fn every_bf16(case: &mut Case<'_>) -> Result<(), String> {
    let mut x_values: Vec<bf16> =
        (0..=u16::MAX).map(bf16::from_bits).filter(|x| x.to_f32().abs() <= 448.0).collect();
    x_values.resize(x_values.len().next_multiple_of(8), bf16::from_f32(-448.0));
    let expected: Vec<u8> = x_values.iter().map(|x| reference::fp8_of_f64(x.to_f64())).collect();
    let (values, scales) = (case.output::<u8>(x_values.len())?, case.output::<f32>(1)?);
    let x = case.input(&x_values)?;
    case.launch(launcher::quantize_fp8(values.address, scales.address, x.address, 1, x_values.len()))?;
    case.expect_equal("values", values, &expected)
}
