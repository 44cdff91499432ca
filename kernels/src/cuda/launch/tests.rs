use super::*;
use crate::cuda::tests::{ALL, module, open};
use crate::cuda::{Compiler, KernelCache, Source};
use crate::stub::{Stub, counter, in_child};

#[test]
fn arguments_arrive_whatever_their_types() {
    in_child((module_path!(), "arguments_arrive_whatever_their_types"), &ALL, &[], || {
        let cuda = open();
        let out = cuda.alloc(40).unwrap();
        let types = module(&cuda).kernel("types").unwrap();
        let args = [
            out.as_slice::<u64>().into(),
            Arg::I32(-2),
            Arg::U32(u32::MAX),
            Arg::F32(1.5),
            Arg::I64(-3),
            Arg::U64(1 << 60),
        ];
        // SAFETY: the kernel's parameters; it writes five words.
        unsafe { types.launch(LaunchShape::linear(1, 1), &args) }.unwrap();
        let mut got = [0; 5];
        out.as_slice::<u64>().read(&mut got).unwrap();
        assert_eq!(
            got,
            [0xffff_fffe, 0xffff_ffff, u64::from(1.5f32.to_bits()), (-3i64).cast_unsigned(), 1 << 60]
        );
    });
}

#[test]
fn shapes_arrive_and_empty_ones_launch_nothing() {
    in_child((module_path!(), "shapes_arrive_and_empty_ones_launch_nothing"), &ALL, &[], || {
        let cuda = open();
        let out = cuda.alloc(28).unwrap();
        let shape = module(&cuda).kernel("shape").unwrap();
        let asked = LaunchShape { grid: [2, 3, 4], block: [5, 6, 7], shared_bytes: 8, overlaps: true };
        let args = [out.as_slice::<u32>().into()];
        // SAFETY: the kernel's parameter; it writes seven words.
        unsafe { shape.launch(asked, &args) }.unwrap();
        let mut got = [0; 7];
        out.as_slice::<u32>().read(&mut got).unwrap();
        assert_eq!(got, [2, 3, 4, 5, 6, 7, 8]);
        // SAFETY: as above.
        unsafe { shape.launch(LaunchShape::linear(0, 32), &args) }.unwrap();
        cuda.synchronize().unwrap();
        assert_eq!(counter(Stub::Driver, "launches"), 1);
        // SAFETY: as above.
        let error = unsafe { shape.launch(LaunchShape::linear(1, 2000), &args) }.unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel shape of test.cu: cuLaunchKernelEx failed: CUDA_ERROR_INVALID_VALUE (words of the driver)"
        );
        // SAFETY: refused before the kernel sees them.
        let error = unsafe { shape.launch(asked, &[Arg::NULL; MAX_ARGS + 1]) }.unwrap_err();
        assert!(matches!(error, CudaError::Arguments { actual: 33, .. }), "{error}");
    });
}

#[test]
fn much_shared_memory_has_to_be_asked_for() {
    in_child((module_path!(), "much_shared_memory_has_to_be_asked_for"), &ALL, &[], || {
        let cuda = open();
        let out = cuda.alloc(28).unwrap();
        let mut shape = module(&cuda).kernel("shape").unwrap();
        // The stand-in's kernels have 1 KiB of their own.
        let launch = |kernel: &Kernel, bytes| {
            // SAFETY: the kernel's parameter; it writes seven words.
            unsafe {
                let args = [out.as_slice::<u32>().into()];
                kernel.launch(LaunchShape::linear(1, 1).with_shared(bytes), &args)
            }
        };
        launch(&shape, 47 << 10).unwrap();
        let error = launch(&shape, (47 << 10) + 1).unwrap_err();
        assert!(matches!(error, CudaError::SharedMemory { limit_bytes: 48_128, .. }), "{error}");
        let error = shape.allow_shared(100 << 10).unwrap_err();
        assert!(matches!(error, CudaError::SharedMemory { limit_bytes: 102_400, .. }), "{error}");
        shape.allow_shared(99 << 10).unwrap();
        launch(&shape, 99 << 10).unwrap();
        assert_eq!((shape.num_registers(), shape.local_bytes(), shape.max_threads()), (40, 16, 1024));
        assert_eq!(shape.blocks_per_sm(256, 0).unwrap(), 8);
        cuda.synchronize().unwrap();
    });
}

#[test]
fn a_kernel_keeps_its_module_and_a_missing_one_is_named() {
    let test = "a_kernel_keeps_its_module_and_a_missing_one_is_named";
    in_child((module_path!(), test), &ALL, &[], || {
        let cuda = open();
        let loaded = module(&cuda);
        let error = loaded.kernel("subtract").unwrap_err().to_string();
        assert!(error.starts_with("kernel subtract of test.cu: cuModuleGetFunction failed"), "{error}");
        let add = loaded.kernel("add").unwrap();
        drop(loaded);
        let unloads = || counter(Stub::Driver, "unloads");
        assert_eq!(unloads(), 0);
        drop(add);
        assert_eq!(unloads(), 1);
    });
}

#[test]
fn an_image_that_the_driver_refuses_is_an_error() {
    in_child((module_path!(), "an_image_that_the_driver_refuses_is_an_error"), &ALL, &[], || {
        let cuda = open();
        let source = Source { name: "bad.cu", prelude: "", text: "" };
        let nowhere = KernelCache::at("/dev/null/nowhere");
        let mut image = Compiler::open().unwrap().compile(&nowhere, &source, cuda.target()).unwrap();
        image.bytes[0] ^= 1;
        let error = Module::load(&cuda, &image).unwrap_err().to_string();
        assert!(error.contains("bad.cu") && error.contains("CUDA_ERROR_INVALID_IMAGE"), "{error}");
    });
}
