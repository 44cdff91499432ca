use super::*;
use crate::cuda::GRAPH_BUCKETS;
use crate::cuda::tests::{ALL, open};
use crate::stub::{Stub, counter, in_child, in_child_with, real};

/// Small whole numbers: exact in every type, and so are their sums.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7 + seed * 13 + i / 5) % 9) as f32 - 4.0).collect()
}

fn expected(m: usize, n: usize, k: usize, x: &[f32], w: &[f32]) -> Vec<f32> {
    let dot = |row: usize, col: usize| (0..k).map(|i| x[row * k + i] * w[col * k + i]).sum();
    (0..m * n).map(|i| dot(i / n, i % n)).collect()
}

fn bf16s(cuda: &Cuda, values: &[f32]) -> DeviceBuffer {
    let buffer = cuda.alloc(values.len() * 2).unwrap();
    let values: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
    buffer.as_slice().write(&values).unwrap();
    buffer
}

fn read_f32(buffer: &DeviceBuffer) -> Vec<f32> {
    let mut values = vec![0.0; buffer.bytes() / 4];
    buffer.as_slice().read(&mut values).unwrap();
    values
}

fn read_bf16(buffer: &DeviceBuffer) -> Vec<f32> {
    let mut values = vec![bf16::ZERO; buffer.bytes() / 2];
    buffer.as_slice().read(&mut values).unwrap();
    values.into_iter().map(bf16::to_f32).collect()
}

#[test]
fn products_are_row_by_row_for_any_number_of_rows() {
    in_child((module_path!(), "products_are_row_by_row_for_any_number_of_rows"), &ALL, &[], || {
        let cuda = open();
        let mut gemm = Gemm::new(&cuda, GemmOptions::default()).unwrap();
        let (n, k) = (6, 5);
        gemm.warm_up(&[GemmShape { m: 8, n, k, types: GemmTypes::Bf16ToF32 }]).unwrap();
        let w = numbers(n * k, 1);
        let w_device = bf16s(&cuda, &w);
        // Up and down inside of one bucket and across buckets.
        for m in [5, 8, 3, 1, 6, 17, 2, 7] {
            let x = numbers(m * k, m);
            let x_device = bf16s(&cuda, &x);
            let (wide, narrow) = (cuda.alloc(m * n * 4).unwrap(), cuda.alloc(m * n * 2).unwrap());
            let (x_in, w_in) = (x_device.as_slice(), w_device.as_slice());
            gemm.run((m, n, k), x_in, w_in, wide.as_slice::<f32>()).unwrap();
            gemm.run((m, n, k), x_in, w_in, narrow.as_slice::<bf16>()).unwrap();
            assert_eq!(read_f32(&wide), expected(m, n, k, &x, &w), "{m} rows");
            assert_eq!(read_bf16(&narrow), expected(m, n, k, &x, &w), "{m} rows");
        }
    });
}

#[test]
fn tuning_keeps_the_fastest_that_runs_and_happens_once() {
    in_child((module_path!(), "tuning_keeps_the_fastest_that_runs_and_happens_once"), &ALL, &[], || {
        let cuda = open();
        let mut gemm = Gemm::new(&cuda, GemmOptions::default()).unwrap();
        let shape = GemmShape { m: 5, n: 4, k: 3, types: GemmTypes::Bf16ToF32 };
        let tuned = gemm.warm_up(&[shape, GemmShape { m: 8, ..shape }]).unwrap();
        // Of the stand-in's five, one wants too much workspace and one does not run; the third takes least.
        assert_eq!(tuned.len(), 1);
        let TunedGemm { shape: bucket, candidates, best, best_us, first_us } = tuned[0];
        assert_eq!((bucket, candidates, best), (GemmShape { m: 8, ..shape }, 3, 2));
        assert!((best_us - 10.0).abs() < 0.01 && (first_us - 30.0).abs() < 0.01, "{tuned:?}");
        assert_eq!(gemm.warm_up(&[shape]).unwrap(), []);
        assert_eq!(counter(Stub::CublasLt, "heuristics"), 1);

        // A run neither asks again nor allocates nor waits; captured it does nothing yet.
        let (x, w) = (bf16s(&cuda, &numbers(15, 0)), bf16s(&cuda, &numbers(12, 1)));
        let y = cuda.alloc(5 * 4 * 4).unwrap();
        let counts = || {
            let driver = ["allocations", "waits"].map(|name| counter(Stub::Driver, name));
            (driver, counter(Stub::CublasLt, "heuristics"), counter(Stub::CublasLt, "products"))
        };
        let before = counts();
        let mut graph =
            cuda.capture(|| gemm.run((5, 4, 3), x.as_slice(), w.as_slice(), y.as_slice::<f32>())).unwrap();
        assert_eq!(counts(), before);
        // SAFETY: buffers and the product's workspace are alive.
        unsafe { graph.replay() }.unwrap();
        assert_eq!(read_f32(&y), expected(5, 4, 3, &numbers(15, 0), &numbers(12, 1)));
        assert_eq!(counter(Stub::CublasLt, "own_choices"), 0);
    });
}

#[test]
fn an_algorithm_that_refuses_some_rows_gives_way() {
    in_child((module_path!(), "an_algorithm_that_refuses_some_rows_gives_way"), &ALL, &[], || {
        let cuda = open();
        let mut gemm = Gemm::new(&cuda, GemmOptions::default()).unwrap();
        let shape = GemmShape { m: 8, n: 4, k: 3, types: GemmTypes::Bf16ToF32 };
        gemm.warm_up(&[shape]).unwrap();
        let refusals = counter(Stub::CublasLt, "refusals");
        let (x, w) = (numbers(7 * 3, 0), numbers(12, 1));
        let (x_device, w_device) = (bf16s(&cuda, &x), bf16s(&cuda, &w));
        let y = cuda.alloc(7 * 4 * 4).unwrap();
        for _ in 0..3 {
            gemm.run((7, 4, 3), x_device.as_slice(), w_device.as_slice(), y.as_slice::<f32>()).unwrap();
            assert_eq!(read_f32(&y), expected(7, 4, 3, &x, &w));
        }
        // Refused once, then not asked again.
        assert_eq!(counter(Stub::CublasLt, "refusals") - refusals, 1);
        assert_eq!(counter(Stub::CublasLt, "own_choices"), 3);
    });
}

/// e4m3 of a small whole number.
fn e4m3(value: f32) -> u8 {
    let sign = if value < 0.0 { 0x80 } else { 0 };
    let bits = match value.abs() as u32 {
        0 => 0,
        1 => 7 << 3,
        2 => 8 << 3,
        3 => 8 << 3 | 4,
        4 => 9 << 3,
        other => panic!("{other}"),
    };
    sign | bits
}

#[test]
fn fp8_products_are_scaled_as_a_whole_or_by_rows() {
    in_child((module_path!(), "fp8_products_are_scaled_as_a_whole_or_by_rows"), &ALL, &[], || {
        let cuda = open();
        let mut gemm = Gemm::new(&cuda, GemmOptions::default()).unwrap();
        let (m, n, k) = (3, 16, 32);
        let (x, w) = (numbers(m * k, 2), numbers(n * k, 3));
        let bytes = |values: &[f32]| {
            let buffer = cuda.alloc(values.len()).unwrap();
            buffer.as_slice().write(&values.iter().map(|&value| e4m3(value)).collect::<Vec<_>>()).unwrap();
            buffer
        };
        let floats = |values: &[f32]| {
            let buffer = cuda.alloc(values.len() * 4).unwrap();
            buffer.as_slice().write(values).unwrap();
            buffer
        };
        let (x_device, w_device, y) = (bytes(&x), bytes(&w), cuda.alloc(m * n * 2).unwrap());
        let rounded = |value: f32| bf16::from_f32(value).to_f32();
        let plain = expected(m, n, k, &x, &w);

        let (scale_x, scale_w) = (floats(&[0.5]), floats(&[4.0]));
        let scales = Fp8Scales::PerTensor { x: scale_x.as_slice(), w: scale_w.as_slice() };
        gemm.run_fp8((m, n, k), x_device.as_slice(), w_device.as_slice(), y.as_slice(), scales).unwrap();
        assert_eq!(read_bf16(&y), plain.iter().map(|&sum| rounded(2.0 * sum)).collect::<Vec<_>>());

        let rows_x: Vec<f32> = (0..m).map(|i| 0.5 + i as f32).collect();
        let rows_w: Vec<f32> = (0..n).map(|i| 1.0 - i as f32).collect();
        let (scale_x, scale_w) = (floats(&rows_x), floats(&rows_w));
        let scales = Fp8Scales::PerRow { x: scale_x.as_slice(), w: scale_w.as_slice() };
        gemm.warm_up(&[GemmShape { m, n, k, types: GemmTypes::Fp8RowsToBf16 }]).unwrap();
        gemm.run_fp8((m, n, k), x_device.as_slice(), w_device.as_slice(), y.as_slice(), scales).unwrap();
        let scaled = (0..m * n).map(|i| rounded(plain[i] * rows_w[i % n] * rows_x[i / n]));
        assert_eq!(read_bf16(&y), scaled.collect::<Vec<_>>());
    });
}

#[test]
fn what_the_device_or_the_library_cannot_do_is_named() {
    let env = [("STUB_CAPABILITY", "80")];
    in_child((module_path!(), "what_the_device_or_the_library_cannot_do_is_named"), &ALL, &env, || {
        let cuda = open();
        let mut gemm = Gemm::new(&cuda, GemmOptions::default()).unwrap();
        let fp8 = GemmShape { m: 16, n: 16, k: 16, types: GemmTypes::Fp8ToBf16 };
        let error = gemm.warm_up(&[fp8]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cuBLASLt has no algorithm for [16, 16] · [16, 16]ᵀ (Fp8ToBf16) on this GPU"
        );
        // The stand-in has none for such K.
        let large = GemmShape { m: 16, n: 16, k: 4096, types: GemmTypes::Bf16ToBf16 };
        assert!(matches!(gemm.warm_up(&[large]), Err(CudaError::NoGemm { .. })));
        // No rows are nothing, and wrong sizes are a bug.
        let none = cuda.alloc(0).unwrap();
        let w = cuda.alloc(32).unwrap();
        gemm.run((0, 4, 4), none.as_slice(), w.as_slice(), none.as_slice::<f32>()).unwrap();
        let wrong = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            gemm.run((1, 4, 4), none.as_slice(), w.as_slice(), none.as_slice::<f32>())
        }));
        assert!(wrong.is_err());
        let unaligned = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let x = w.slice::<bf16>(8, 4);
            gemm.run((1, 4, 4), x, w.as_slice(), cuda.alloc(16).unwrap().as_slice::<f32>())
        }));
        assert!(unaligned.is_err());
    });
}

#[test]
fn row_buckets_hold_their_rows_with_little_to_spare() {
    for bucket in GRAPH_BUCKETS {
        assert_eq!(row_bucket(bucket), bucket);
    }
    let mut last = 0;
    for rows in 1..=MAX_TUNED_ROWS {
        let bucket = row_bucket(rows);
        assert!(bucket >= rows && bucket >= last && bucket <= rows * 2, "{rows} in {bucket}");
        assert!(rows <= 256 || bucket * 2 < rows * 3, "{rows} in {bucket}");
        last = bucket;
    }
    assert_eq!(row_bucket(MAX_TUNED_ROWS * 3), MAX_TUNED_ROWS);
}

/// Whether the real library takes the attributes, by their numbers and sizes; it needs no device for that.
#[test]
fn the_real_cublaslt_takes_the_descriptions() {
    let Some(folder) = real("cu13", "libcublasLt.so.13") else { return };
    in_child_with((module_path!(), "the_real_cublaslt_takes_the_descriptions"), &[folder], &[], || {
        driver::cublaslt().unwrap();
        let all =
            [GemmTypes::Bf16ToBf16, GemmTypes::Bf16ToF32, GemmTypes::Fp8ToBf16, GemmTypes::Fp8RowsToBf16];
        for types in all {
            for fast in [false, true] {
                let mut plan = Plan::describe(GemmShape { m: 64, n: 128, k: 256, types }, fast).unwrap();
                plan.set_rows(50).unwrap();
            }
        }
        plan::Preference::new(32 << 20).unwrap();
    });
}
