//! Rounding to blocks against a plain reading of the rules, golden blocks, and what any rounding must hold.

use super::*;
use tandem_kernels::Matrix;

const TYPES: [DType; 3] = [DType::Q8_0, DType::Q4_0, DType::Q4_1];

/// SplitMix64.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// In −1..1.
    fn float(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Blocks of every kind that weights have and of some that they should not: spread values, few levels with many ties,
/// constants, zeros of both signs, one outlier, tiny and huge magnitudes.
fn blocks() -> Vec<Block> {
    let mut random = Random(3);
    let mut blocks = vec![[0.0; 32], [-0.0; 32], [1.0; 32], [-3.5; 32], [1e-7; 32], [-6e4; 32]];
    for round in 0..3000 {
        let scale = 2.0f32.powi(round % 25 - 18);
        blocks.push(std::array::from_fn(|_| random.float() * scale));
        blocks.push(std::array::from_fn(|_| (random.float() * 9.0).round() * scale));
        blocks.push(std::array::from_fn(|at| if at as i32 == round % 32 { -scale } else { 0.0 }));
        blocks.push(std::array::from_fn(|_| if random.word() & 1 == 0 { 0.0 } else { -0.0 }));
        blocks.push(std::array::from_fn(|_| f32::from_bits((random.word() as u32) & 0x8000_00ff)));
    }
    blocks
}

fn rounded(dtype: DType, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0xaa; values.len() / 32 * dtype.block_bytes()];
    quantize(dtype, values, &mut out).unwrap();
    out
}

fn read_back(dtype: DType, blocks: &[u8]) -> Vec<f32> {
    let cols = blocks.len() / dtype.block_bytes() * 32;
    let mut values = vec![0.0; cols];
    Matrix::new(dtype, 1, cols, blocks).unwrap().dequantize_row(0, &mut values);
    values
}

/// The rules of the module's table, one value after another.
fn reference(dtype: DType, x: &Block) -> Vec<u8> {
    let d_and_m = |d: f32, m: Option<f32>| -> Vec<u8> {
        [Some(d), m].into_iter().flatten().flat_map(|v| f16::from_f32(v).to_le_bytes()).collect()
    };
    let times = |d: f32| if (1.0 / d).is_infinite() { 0.0 } else { 1.0 / d };
    let nibbles = |q: [u8; 32]| (0..16).map(move |j| q[j] | q[j + 16] << 4);
    let mut out;
    match dtype {
        DType::Q8_0 => {
            let mut largest = 0.0f32;
            for v in x {
                if v.abs() > largest {
                    largest = v.abs();
                }
            }
            let d = largest / 127.0;
            out = d_and_m(d, None);
            out.extend(x.map(|v| ((v * times(d)).round() as i8).cast_unsigned()));
        }
        DType::Q4_0 => {
            let mut largest = 0.0f32;
            for &v in x {
                if v.abs() > largest.abs() {
                    largest = v;
                }
            }
            let d = largest / -8.0;
            out = d_and_m(d, None);
            out.extend(nibbles(x.map(|v| ((v * times(d) + 8.5) as u8).min(15))));
        }
        _ => {
            let (mut min, mut max) = (f32::MAX, f32::MIN);
            for &v in x {
                if v < min {
                    min = v;
                }
                if v > max {
                    max = v;
                }
            }
            let d = (max - min) / 15.0;
            out = d_and_m(d, Some(min));
            out.extend(nibbles(x.map(|v| (((v - min) * times(d) + 0.5) as u8).min(15))));
        }
    }
    out
}

#[test]
fn blocks_are_those_of_the_plain_rules() {
    for dtype in TYPES {
        for block in blocks() {
            assert_eq!(rounded(dtype, &block), reference(dtype, &block), "{dtype} of {block:?}");
        }
        let all = blocks().concat();
        let one_by_one: Vec<u8> = blocks().iter().flat_map(|block| reference(dtype, block)).collect();
        assert_eq!(rounded(dtype, &all), one_by_one);
    }
}

/// `tests/golden/quantize`: made by the `gguf` package's own rounding, which is ggml's.
#[test]
fn blocks_are_those_of_ggml() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/quantize");
    let read = |name: &str| std::fs::read(format!("{folder}/{name}")).unwrap();
    let values: Vec<f32> =
        read("values.bf16").as_chunks().0.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect();
    assert_eq!(values.len(), 96 * 32);
    for (dtype, name) in TYPES.into_iter().zip(["q8_0", "q4_0", "q4_1"]) {
        assert!(rounded(dtype, &values) == read(name), "{dtype}");
    }
}

#[test]
fn no_value_moves_farther_than_half_a_step() {
    for dtype in TYPES {
        for block in blocks() {
            let (min, max) = block.iter().fold((f32::MAX, f32::MIN), |(a, b), &v| (a.min(v), b.max(v)));
            let magnitude = min.abs().max(max.abs());
            // Half a step; in Q4_0 a whole one, where 8 steps up are cut to 7.
            let step = match dtype {
                DType::Q8_0 => magnitude / 127.0 / 2.0,
                DType::Q4_0 => magnitude / 8.0,
                _ => (max - min) / 15.0 / 2.0,
            };
            // Scale and minimum are f16: 11 bits, and nothing below 2⁻²⁴, in up to 128 steps.
            let slack = magnitude * 2.0f32.powi(-10) + 128.0 * 2.0f32.powi(-24);
            for (was, is) in block.iter().zip(read_back(dtype, &rounded(dtype, &block))) {
                assert!((was - is).abs() <= step + slack, "{dtype}: {was} became {is}");
            }
        }
    }
}

#[test]
fn zeros_and_constants_come_back() {
    for dtype in TYPES {
        for zero in [0.0, -0.0] {
            assert!(read_back(dtype, &rounded(dtype, &[zero; 32])).iter().all(|&v| v == 0.0), "{dtype}");
        }
        for constant in [1.0f32, -2.0, 0.25] {
            let back = read_back(dtype, &rounded(dtype, &[constant; 32]));
            let close = |v: &f32| (v - constant).abs() <= constant.abs() * 2.0f32.powi(-10);
            assert!(back.iter().all(close), "{dtype}: {constant} became {back:?}");
        }
    }
}

/// What blocks say exactly is said again by their rounding: a file of a type is that file after another rounding.
#[test]
fn rounding_twice_is_rounding_once_where_scales_are_exact() {
    let mut random = Random(9);
    for dtype in TYPES {
        for _ in 0..500 {
            let levels = if dtype == DType::Q8_0 { 127 } else { 7 };
            let mut block: Block = std::array::from_fn(|_| {
                0.5 * (random.word() % (2 * levels + 1)) as f32 - 0.5 * levels as f32
            });
            block[5] = if dtype == DType::Q4_0 { -4.0 } else { -0.5 * levels as f32 };
            block[7] = if dtype == DType::Q4_1 { 4.0 } else { block[7] };
            assert_eq!(read_back(dtype, &rounded(dtype, &block)), block, "{dtype}");
        }
    }
}

#[test]
fn what_no_block_can_hold_is_refused() {
    for dtype in TYPES {
        let with = |value: f32| {
            let mut values = [1.0; 64];
            values[40] = value;
            quantize(dtype, &values, &mut vec![0; 2 * dtype.block_bytes()])
        };
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(with(bad), Err(Unfit::NotFinite), "{dtype}");
        }
        assert_eq!(with(f32::MAX), Err(Unfit::TooLarge), "{dtype}");
        assert_eq!(with(f32::MIN), Err(Unfit::TooLarge), "{dtype}");
        assert_eq!(with(6e4), Ok(()), "{dtype}");
    }
}

#[test]
fn rounding_is_that_of_the_standard_library() {
    let halves = (-300..=300).map(|half| half as f32 * 0.5);
    for value in halves.flat_map(|half| [half.next_down(), half, half.next_up()]) {
        assert_eq!(round(value), value.round() as i32, "{value}");
    }
    let mut random = Random(1);
    for _ in 0..100_000 {
        let value = random.float() * 128.0;
        assert_eq!(round(value), value.round() as i32, "{value}");
    }
    assert_eq!((round(f32::NAN), round(f32::INFINITY)), (0, i32::MAX));
}
