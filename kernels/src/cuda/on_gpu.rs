//! What only a GPU can tell. Without one each test says that it was skipped, and why.

use std::time::Duration;

use half::bf16;

use super::*;
use crate::comm::{Nccl, NcclAbort, NcclCommunicator, NcclError, NcclOptions};
use crate::cuda::launcher::ALL_REDUCE_BLOCKS;

const KERNELS: &str = r#"
extern "C" __global__ void add(int *out, const int *in, int add, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i] + add;
}
extern "C" __global__ void types(unsigned long long *out, int a, unsigned b, float c, long long d, unsigned long long e) {
    out[0] = (unsigned)a;
    out[1] = b;
    out[2] = __float_as_uint(c);
    out[3] = d;
    out[4] = e;
}
extern "C" __global__ void reverse(int *values, int n) {
    extern __shared__ int shared[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) shared[i] = values[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) values[i] = shared[n - 1 - i];
}
"#;

fn gpu() -> Option<Cuda> {
    match Cuda::open(0) {
        Ok(cuda) => Some(cuda),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn kernels(cuda: &Cuda) -> KernelSet {
    let cache = KernelCache::at(crate::stub::build_dir().join("on-gpu-kernels"));
    KernelSet::load(cuda, &cache, "", [("on_gpu.cu", KERNELS)]).unwrap()
}

/// Numbers of a few bits from −1 to 1.
fn numbers(len: usize, mut seed: u64) -> Vec<f32> {
    let next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((seed >> 59) as f32 - 15.5) / 16.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[test]
fn the_device_describes_itself() {
    let Some(cuda) = gpu() else { return };
    let info = cuda.info();
    println!("{info:?}");
    assert!(info.num_sms > 0 && info.l2_bytes > 0 && info.max_shared_bytes >= 99 << 10);
    let memory = cuda.memory().unwrap();
    assert!(memory.free_bytes <= memory.total_bytes && memory.total_bytes <= info.total_bytes);
    match GpuWatch::open(info) {
        Ok(watch) => assert!(watch.sample().used_bytes.is_some()),
        Err(reason) => println!("no metrics: {reason}"),
    }
}

#[test]
fn weights_arrive() {
    let Some(cuda) = gpu() else { return };
    // More than one round of both chunks, and a part of one.
    let values: Vec<u32> = (0..20_000_001).collect();
    let buffer = cuda.alloc(4 * values.len()).unwrap();
    let mut timer = Timer::new(&cuda).unwrap();
    timer.start().unwrap();
    Uploader::new(&cuda).unwrap().write(buffer.as_slice(), &values).unwrap();
    let us = timer.stop_us().unwrap();
    println!("{:.1} GB/s", buffer.bytes() as f32 / us / 1e3);
    let mut got = vec![0; values.len()];
    buffer.as_slice().read(&mut got).unwrap();
    assert!(got == values);
}

#[test]
fn a_step_runs_and_replays_on_another_thread() {
    let Some(cuda) = gpu() else { return };
    let mut set = kernels(&cuda);
    const N: usize = 10_000;
    let (input, output) = (cuda.alloc_zeroed(4 * N).unwrap(), cuda.alloc_zeroed(4 * N).unwrap());
    let mut pinned = (cuda.alloc_pinned(4 * N).unwrap(), cuda.alloc_pinned(4 * N).unwrap());
    let args =
        [output.as_slice::<i32>().into(), input.as_slice::<i32>().into(), 10.into(), (N as i32).into()];
    let mut launch = || {
        let shape = LaunchShape::linear(N.div_ceil(256) as u32, 256);
        // SAFETY: the kernel's parameters; both buffers hold N integers.
        unsafe { set.launch("on_gpu.cu", "add", shape, &args) }
    };
    launch().unwrap();
    cuda.synchronize().unwrap();
    let mut graph = cuda.capture(&mut launch).unwrap();
    std::thread::spawn(move || {
        for step in 0..5i32 {
            for (i, value) in pinned.0.write::<i32>(0, N).unwrap().iter_mut().enumerate() {
                *value = step * 1000 + i as i32;
            }
            input.as_slice::<i32>().upload(&mut pinned.0, 0).unwrap();
            // SAFETY: buffers and module are alive.
            unsafe { graph.replay() }.unwrap();
            output.as_slice::<i32>().download(&mut pinned.1, 0).unwrap();
            let got = pinned.1.read::<i32>(0, N).unwrap();
            assert!(got.iter().enumerate().all(|(i, &value)| value == step * 1000 + i as i32 + 10));
        }
    })
    .join()
    .unwrap();
}

#[test]
fn arguments_and_much_shared_memory_arrive() {
    let Some(cuda) = gpu() else { return };
    let mut set = kernels(&cuda);
    let out = cuda.alloc(40).unwrap();
    let args = [
        out.as_slice::<u64>().into(),
        Arg::I32(-2),
        Arg::U32(u32::MAX),
        Arg::F32(1.5),
        Arg::I64(-3),
        Arg::U64(1 << 60),
    ];
    // SAFETY: the kernel's parameters; it writes five words.
    unsafe { set.launch("on_gpu.cu", "types", LaunchShape::linear(1, 1), &args) }.unwrap();
    let mut got = [0; 5];
    out.as_slice::<u64>().read(&mut got).unwrap();
    let words = [0xffff_fffe, 0xffff_ffff, u64::from(1.5f32.to_bits()), (-3i64).cast_unsigned(), 1 << 60];
    assert_eq!(got, words);

    const N: usize = 24_000;
    let values = cuda.alloc(4 * N).unwrap();
    values.as_slice::<i32>().write(&(0..N as i32).collect::<Vec<_>>()).unwrap();
    let shape = LaunchShape::linear(1, 1024).with_shared(4 * N as u32);
    let args = [values.as_slice::<i32>().into(), (N as i32).into()];
    // SAFETY: the kernel's parameters; the buffer and the shared memory hold N integers.
    unsafe { set.launch("on_gpu.cu", "reverse", shape, &args) }.unwrap();
    let mut got = vec![0; N];
    values.as_slice::<i32>().read(&mut got).unwrap();
    assert!(got.iter().enumerate().all(|(i, &value)| value == (N - 1 - i) as i32));
    let kernel = set.kernel("on_gpu.cu", "reverse").unwrap();
    assert!(kernel.num_registers() > 0 && kernel.blocks_per_sm(256, 0).unwrap() > 0);
    assert!(matches!(kernel.allow_shared(1 << 30), Err(CudaError::SharedMemory { .. })));
}

#[test]
fn what_does_not_fit_is_an_error_and_the_device_goes_on() {
    let Some(cuda) = gpu() else { return };
    let asked = cuda.info().total_bytes * 2;
    let error = cuda.alloc(asked).unwrap_err();
    assert!(
        matches!(error, CudaError::DeviceMemory { asked_bytes, total_bytes, .. } if asked_bytes == asked && total_bytes > 0),
        "{error}"
    );
    let mut set = kernels(&cuda);
    // SAFETY: refused before the kernel sees its arguments.
    let error = unsafe { set.launch("on_gpu.cu", "reverse", LaunchShape::linear(1, 5000), &[Arg::NULL; 2]) };
    assert!(error.unwrap_err().to_string().contains("CUDA_ERROR_INVALID_VALUE"));
    let buffer = cuda.alloc_zeroed(16).unwrap();
    let error = cuda.capture(|| cuda.synchronize()).unwrap_err();
    assert!(matches!(error, CudaError::InCapture { .. }), "{error}");
    let mut got = [1u8; 16];
    buffer.as_slice::<u8>().read(&mut got).unwrap();
    assert_eq!(got, [0; 16]);
}

/// Σ over K of products of a few bits each is exact in f32; what is left is the output's own rounding.
fn check(got: &[f32], expected: &[f32], relative: f32, what: &str) {
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let close = (got - expected).abs() <= relative * expected.abs() + 1e-3;
        assert!(close, "{what}, value {i}: {got} and not {expected}");
    }
}

fn product((m, n, k): (usize, usize, usize), x: &[f32], w: &[f32]) -> Vec<f32> {
    let dot = |row: usize, col: usize| (0..k).map(|i| x[row * k + i] * w[col * k + i]).sum();
    (0..m * n).map(|i| dot(i / n, i % n)).collect()
}

#[test]
fn products_of_bf16_are_right_for_any_number_of_rows() {
    let Some(cuda) = gpu() else { return };
    let mut gemm = Gemm::new(&cuda, GemmOptions::default()).unwrap();
    let (n, k) = (192, 256);
    let w = numbers(n * k, 1);
    let upload = |values: &[f32]| {
        let buffer = cuda.alloc(2 * values.len()).unwrap();
        let values: Vec<bf16> = values.iter().copied().map(bf16::from_f32).collect();
        buffer.as_slice().write(&values).unwrap();
        buffer
    };
    let w_device = upload(&w);
    let rows = [1, 2, 7, 16, 17, 100, 256, 300];
    let shape = |m, types| GemmShape { m, n, k, types };
    let shapes = [shape(16, GemmTypes::Bf16ToF32), shape(256, GemmTypes::Bf16ToBf16)];
    for tuned in gemm.warm_up(&shapes).unwrap() {
        println!("{tuned:?}");
        assert!(tuned.candidates > 0 && tuned.best_us > 0.0 && tuned.best_us <= tuned.first_us);
    }
    for m in rows {
        let x = numbers(m * k, m as u64);
        let x_device = upload(&x);
        let (wide, narrow) = (cuda.alloc(4 * m * n).unwrap(), cuda.alloc(2 * m * n).unwrap());
        let (x_in, w_in) = (x_device.as_slice(), w_device.as_slice());
        gemm.run((m, n, k), x_in, w_in, wide.as_slice::<f32>()).unwrap();
        // Nothing is looked up or loaded in a capture.
        gemm.run((m, n, k), x_in, w_in, narrow.as_slice::<bf16>()).unwrap();
        let mut graph = cuda.capture(|| gemm.run((m, n, k), x_in, w_in, narrow.as_slice::<bf16>())).unwrap();
        // SAFETY: operands and workspace are alive.
        unsafe { graph.replay() }.unwrap();
        let expected = product((m, n, k), &x, &w);
        let mut got = vec![0.0; m * n];
        wide.as_slice().read(&mut got).unwrap();
        check(&got, &expected, 1e-5, &format!("f32 of {m} rows"));
        let mut got = vec![bf16::ZERO; m * n];
        narrow.as_slice().read(&mut got).unwrap();
        let got: Vec<f32> = got.into_iter().map(bf16::to_f32).collect();
        check(&got, &expected, 1.0 / 200.0, &format!("bf16 of {m} rows"));
    }
}

#[test]
fn products_of_fp8_are_right_where_the_device_has_them() {
    let Some(cuda) = gpu() else { return };
    let capability = cuda.info().capability;
    if capability < (8, 9) {
        println!("skipped: {} has no fp8", cuda.info());
        return;
    }
    let mut gemm = Gemm::new(&cuda, GemmOptions::default()).unwrap();
    let (m, n, k) = (48, 128, 256);
    // Powers of two are exact in e4m3: 2^(e − 7), here from 1/8 to 2.
    let codes = |len: usize, seed: u64| -> Vec<u8> {
        numbers(len, seed)
            .iter()
            .map(|x| ((4 + (x.abs() * 4.99) as u8) << 3) | u8::from(*x < 0.0) << 7)
            .collect()
    };
    let value = |code: &u8| {
        let size = f32::from(code >> 3 & 15) - 7.0;
        if code & 0x80 == 0 { size.exp2() } else { -size.exp2() }
    };
    let (x, w) = (codes(m * k, 1), codes(n * k, 2));
    let floats = |codes: &[u8]| codes.iter().map(value).collect::<Vec<f32>>();
    let plain = product((m, n, k), &floats(&x), &floats(&w));
    let bytes = |values: &[u8]| {
        let buffer = cuda.alloc(values.len()).unwrap();
        buffer.as_slice().write(values).unwrap();
        buffer
    };
    let scales = |values: &[f32]| {
        let buffer = cuda.alloc(4 * values.len()).unwrap();
        buffer.as_slice().write(values).unwrap();
        buffer
    };
    let (x, w, y) = (bytes(&x), bytes(&w), cuda.alloc(2 * m * n).unwrap());
    let read = || {
        let mut got = vec![bf16::ZERO; m * n];
        y.as_slice().read(&mut got).unwrap();
        got.into_iter().map(bf16::to_f32).collect::<Vec<f32>>()
    };
    let (one_x, one_w) = (scales(&[0.5]), scales(&[3.0]));
    let tensor = Fp8Scales::PerTensor { x: one_x.as_slice(), w: one_w.as_slice() };
    gemm.run_fp8((m, n, k), x.as_slice(), w.as_slice(), y.as_slice(), tensor).unwrap();
    let expected: Vec<f32> = plain.iter().map(|sum| sum * 1.5).collect();
    check(&read(), &expected, 1.0 / 100.0, "fp8 scaled as a whole");

    let rows = |len: usize| (0..len).map(|i| 0.5 + i as f32 / 16.0).collect::<Vec<f32>>();
    let (rows_x, rows_w) = (scales(&rows(m)), scales(&rows(n)));
    let by_rows = Fp8Scales::PerRow { x: rows_x.as_slice(), w: rows_w.as_slice() };
    match gemm.run_fp8((m, n, k), x.as_slice(), w.as_slice(), y.as_slice(), by_rows) {
        Ok(()) => {
            let scaled = (0..m * n).map(|i| plain[i] * rows(m)[i / n] * rows(n)[i % n]);
            check(&read(), &scaled.collect::<Vec<_>>(), 1.0 / 100.0, "fp8 scaled by rows");
        }
        // Only 9.0 has these, and only a newer library.
        Err(error) => {
            println!("not by rows: {error}");
            assert!(matches!(error, CudaError::NoGemm { .. }), "{error}");
        }
    }
}

#[test]
fn a_lone_rank_of_nccl_sums_and_gives_up() {
    let Some(cuda) = gpu() else { return };
    let nccl = match Nccl::open() {
        Ok(nccl) => nccl,
        Err(error) => return println!("skipped: {error}"),
    };
    let options = NcclOptions::default();
    let abort = NcclAbort::new(nccl);
    let comm = NcclCommunicator::init(&abort, &nccl.unique_id().unwrap(), (0, 1), options).unwrap();
    let (own, all) = (cuda.alloc(4 * 64).unwrap(), cuda.alloc(4 * 64).unwrap());
    let values = numbers(64, 3);
    own.as_slice::<f32>().write(&values).unwrap();
    let work = || {
        comm.all_reduce(own.as_slice::<f32>()).unwrap();
        comm.all_gather(own.as_slice::<f32>(), all.as_slice()).unwrap();
        comm.broadcast(all.as_slice::<f32>(), 0).unwrap();
        Ok(())
    };
    work().unwrap();
    comm.wait(Duration::from_secs(60), || cuda.is_idle()).unwrap();
    all.as_slice::<u8>().fill_bytes(0).unwrap();
    let mut graph = cuda.capture(work).unwrap();
    // SAFETY: buffers and communicator are alive.
    unsafe { graph.replay() }.unwrap();
    comm.wait(Duration::from_secs(60), || cuda.is_idle()).unwrap();
    let mut got = vec![0.0; 64];
    all.as_slice::<f32>().read(&mut got).unwrap();
    assert_eq!(got, values);
    // With other ranks NCCL does not let go of it before its graphs are gone; with one it may.
    abort.abort();
    drop(graph);
    assert!(abort.wait_released(Duration::from_secs(60)));
    assert_eq!(comm.all_reduce(own.as_slice::<f32>()).unwrap_err(), NcclError::Aborted);

    // The other rank never comes.
    let options = NcclOptions { init_timeout: Duration::from_secs(3), ..options };
    let id = nccl.unique_id().unwrap();
    let error = NcclCommunicator::init(&NcclAbort::new(nccl), &id, (0, 2), options).unwrap_err();
    assert!(matches!(error, NcclError::Timeout { .. }), "{error}");
    // The device is as good as before.
    let comm =
        NcclCommunicator::init(&NcclAbort::new(nccl), &nccl.unique_id().unwrap(), (0, 1), options).unwrap();
    comm.close(Duration::from_secs(60)).unwrap();
}

/// The other rank never comes: what waits for it ends when it is given up, what is queued behind ends too, and nothing more is
/// told to the other.
#[test]
fn sums_that_wait_end_when_they_are_given_up() {
    const CAPACITY: usize = 4096;
    const FLAGS: usize = 2 * ALL_REDUCE_BLOCKS;
    let Some(cuda) = gpu() else { return };
    let runner =
        Runner::load(&cuda, &KernelCache::at(crate::stub::build_dir().join("on-gpu-kernels"))).unwrap();
    let abort = cuda.host_flag().unwrap();
    let shared: Vec<DeviceBuffer> =
        (0..2).map(|_| cuda.alloc_zeroed(2 * CAPACITY + FLAGS * size_of::<u32>()).unwrap()).collect();
    let buffers: Vec<u64> = shared.iter().map(|memory| memory.as_slice::<u8>().address()).collect();
    let flags: Vec<u64> = buffers.iter().map(|address| address + 2 * CAPACITY as u64).collect();
    let lists = cuda.alloc(4 * size_of::<u64>()).unwrap();
    lists.as_slice::<u64>().write(&[&buffers[..], &flags[..]].concat()).unwrap();
    let epochs = cuda.alloc_zeroed(FLAGS * size_of::<u32>()).unwrap();
    let group = launcher::Group {
        rank: 0,
        world_size: 2,
        buffers: lists.as_slice::<u64>().address(),
        capacity: CAPACITY,
        num_blocks: ALL_REDUCE_BLOCKS,
        flags: lists.slice::<u64>(2 * size_of::<u64>(), 2).address(),
        epochs: epochs.as_slice::<u32>().address(),
        abort: abort.address(),
    };
    let (first, later) = (cuda.alloc_zeroed(4 * 512).unwrap(), cuda.alloc(4 * 512).unwrap());
    later.as_slice::<u8>().fill_bytes(1).unwrap();
    cuda.synchronize().unwrap();
    for values in [&first, &later, &later] {
        let at = values.as_slice::<f32>().address();
        runner.launch(&launcher::one_shot_all_reduce(at, at, launcher::Reduced::F32, 512, group)).unwrap();
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            abort.set(1);
        });
        std::thread::sleep(Duration::from_millis(100));
        assert!(!cuda.is_idle().unwrap(), "it does not wait");
        let start = std::time::Instant::now();
        while !cuda.is_idle().unwrap() {
            assert!(start.elapsed() < Duration::from_secs(5), "it waits on");
        }
        assert_eq!(abort.get(), 1, "it ended by itself");
    });
    let mut told = [0u32; FLAGS];
    shared[1].slice::<u32>(2 * CAPACITY, FLAGS).read(&mut told).unwrap();
    assert!(told.chunks(2).all(|of_block| of_block == [1, 0]), "{told:?}");
    // Epoch 1 is in the second half.
    let mut given = [1.0f32; 512];
    shared[0].slice::<f32>(CAPACITY, 512).read(&mut given).unwrap();
    assert_eq!(given, [0.0; 512], "what was given for the first sum is something else now");
}
