//! From the probe to a step, against stand-ins for the libraries.

use super::*;
use crate::stub::{Stub, counter, in_child, in_child_with, real};

/// The three libraries.
pub(super) const ALL: [Stub; 3] = [Stub::Driver, Stub::Nvrtc, Stub::CublasLt];

/// Names of kernels that the stand-in driver has.
const KERNELS: &str = "add types shape fault";

pub(super) fn open() -> Cuda {
    Cuda::open(0).unwrap()
}

/// A module with the stand-in's kernels.
pub(super) fn module(cuda: &Cuda) -> Module {
    let source = Source { name: "test.cu", prelude: "", text: KERNELS };
    let nowhere = KernelCache::at("/dev/null/nowhere");
    let image = Compiler::open().unwrap().compile(&nowhere, &source, cuda.target()).unwrap();
    Module::load(cuda, &image).unwrap()
}

fn in_probe(test: &str, stubs: &[Stub], env: &[(&str, &str)], check: impl FnOnce(Unavailable)) {
    in_child((module_path!(), test), stubs, env, || check(Cuda::probe().unwrap_err()));
}

/// On a machine that has the library, the tests of its absence cannot hide it.
fn is_installed(names: &[&str]) -> bool {
    // SAFETY: looks whether there is such a library, whose initialisers are made to be run.
    let found = names.iter().find(|name| unsafe { libloading::Library::new(**name) }.is_ok());
    if let Some(name) = found {
        println!("skipped: this machine has {name}");
    }
    found.is_some()
}

#[test]
fn without_a_driver_the_probe_names_what_it_tried() {
    if is_installed(&["libcuda.so", "libcuda.so.1"]) {
        return;
    }
    let error = Cuda::probe().unwrap_err();
    let Unavailable::NoDriver { tried } = &error else { panic!("{error}") };
    assert!(tried.iter().any(|name| name == "libcuda.so.1"), "{tried:?}");
    let line = error.to_string();
    assert!(line.starts_with("no CUDA driver: none of libcuda.so, ") && !line.contains('\n'), "{line}");
    assert_eq!(Cuda::open(0).unwrap_err(), CudaError::Unavailable(error));
}

#[test]
fn a_driver_that_does_not_start_is_quoted() {
    in_probe("a_driver_that_does_not_start_is_quoted", &ALL, &[("STUB_INIT", "803")], |error| {
        assert_eq!(
            error.to_string(),
            "the CUDA driver does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (words of the driver)"
        );
    });
}

#[test]
fn a_driver_of_cuda_11_is_too_old() {
    in_probe("a_driver_of_cuda_11_is_too_old", &ALL, &[("STUB_DRIVER_VERSION", "11080")], |error| {
        assert_eq!(
            error.to_string(),
            "the CUDA driver is too old: it supports CUDA 11.8, and 12.0 is needed"
        );
    });
}

#[test]
fn a_driver_older_than_nvrtc_is_too_old_for_its_kernels() {
    let test = "a_driver_older_than_nvrtc_is_too_old_for_its_kernels";
    in_probe(test, &ALL, &[("STUB_DRIVER_VERSION", "12080")], |error| {
        let Unavailable::DriverTooOld { found, needed, because } = error else { panic!("{error}") };
        assert_eq!((found.as_str(), needed.as_str()), ("12.8", "13.0"));
        assert!(because.contains("NVRTC"));
    });
}

#[test]
fn a_driver_of_one_major_version_takes_any_minor_one_of_nvrtc() {
    let test = "a_driver_of_one_major_version_takes_any_minor_one_of_nvrtc";
    let env = [("STUB_DRIVER_VERSION", "12020"), ("STUB_NVRTC_VERSION", "12.8")];
    in_child((module_path!(), test), &ALL, &env, || assert_eq!(Cuda::probe().unwrap().len(), 1));
}

#[test]
fn assembly_needs_a_driver_of_nvrtcs_minor_version() {
    let test = "assembly_needs_a_driver_of_nvrtcs_minor_version";
    let versions = [("STUB_DRIVER_VERSION", "12080"), ("STUB_NVRTC_VERSION", "12.9")];
    let env = [&versions[..], &[("STUB_CAPABILITY", "120")]].concat();
    in_probe(test, &ALL, &env, |error| {
        let Unavailable::DriverTooOld { found, needed, .. } = error else { panic!("{error}") };
        assert_eq!((found.as_str(), needed.as_str()), ("12.8", "12.9"));
    });
}

#[test]
fn no_gpu_is_a_reason() {
    in_probe("no_gpu_is_a_reason", &ALL, &[("STUB_DEVICES", "0")], |error| {
        assert_eq!(error, Unavailable::NoDevice);
    });
}

#[test]
fn an_init_that_finds_no_gpu_is_quoted() {
    in_probe("an_init_that_finds_no_gpu_is_quoted", &ALL, &[("STUB_INIT", "100")], |error| {
        assert!(error.to_string().contains("CUDA_ERROR_NO_DEVICE"), "{error}");
    });
}

#[test]
fn without_nvrtc_the_probe_names_what_it_tried() {
    let test = "without_nvrtc_the_probe_names_what_it_tried";
    in_child((module_path!(), test), &[Stub::Driver, Stub::CublasLt], &[], || {
        if is_installed(&["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]) {
            return;
        }
        let Unavailable::NoLibrary { library, tried } = Cuda::probe().unwrap_err() else { panic!() };
        assert_eq!(library, "NVRTC");
        assert!(tried.iter().any(|name| name == "libnvrtc.so.13"), "{tried:?}");
    });
}

#[test]
fn without_cublaslt_the_probe_names_what_it_tried() {
    let test = "without_cublaslt_the_probe_names_what_it_tried";
    in_child((module_path!(), test), &[Stub::Driver, Stub::Nvrtc], &[], || {
        if is_installed(&["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"]) {
            return;
        }
        let error = Cuda::probe().unwrap_err();
        assert!(error.to_string().starts_with("no cuBLASLt library: none of libcublasLt.so, "), "{error}");
    });
}

#[test]
fn libraries_of_cuda_11_are_too_old() {
    let test = "libraries_of_cuda_11_are_too_old";
    in_probe(test, &ALL, &[("STUB_CUBLASLT_VERSION", "111103")], |error| {
        assert_eq!(
            error.to_string(),
            "the cuBLASLt library is too old: it is version 11.11, and 12.0 is needed"
        );
    });
}

#[test]
fn a_gpu_below_8_0_is_shown_and_refused() {
    let test = "a_gpu_below_8_0_is_shown_and_refused";
    in_probe(test, &ALL, &[("STUB_DEVICES", "2"), ("STUB_CAPABILITY", "75,70")], |error| {
        assert_eq!(
            error.to_string(),
            "no GPU has compute capability 8.0 or more; found GPU 0 Stub 0 (7.5), GPU 1 Stub 1 (7.0)"
        );
    });
}

#[test]
fn of_several_gpus_only_able_ones_open() {
    let test = "of_several_gpus_only_able_ones_open";
    let env = [("STUB_DEVICES", "2"), ("STUB_CAPABILITY", "75,86")];
    in_child((module_path!(), test), &ALL, &env, || {
        let devices = Cuda::probe().unwrap();
        assert_eq!(devices.iter().map(DeviceInfo::is_supported).collect::<Vec<_>>(), [false, true]);
        let error = Cuda::open(0).unwrap_err();
        assert!(matches!(error, CudaError::Capability { ordinal: 0, major: 7, minor: 5, .. }), "{error}");
        assert_eq!(Cuda::open(2).unwrap_err(), CudaError::NoSuchDevice { ordinal: 2, count: 2 });
        let cuda = Cuda::open(1).unwrap();
        let info = cuda.info();
        assert_eq!((info.name.as_str(), info.num_sms, info.l2_bytes), ("Stub 1", 7, 64 << 10));
        assert_eq!((info.capability, info.max_shared_bytes), ((8, 6), 100 << 10));
        assert_eq!(info.uuid, "GPU-02020202-0202-0202-0202-020202020202");
        assert_eq!(info.pci_bus_id, "0000:01:00.0");
        assert_eq!(cuda.target().name(), "sm_80");
        assert_eq!(cuda.memory().unwrap(), MemoryInfo { free_bytes: 1 << 30, total_bytes: 1 << 30 });
    });
}

#[test]
fn a_library_without_a_function_is_named() {
    // Some library under the driver's name.
    let folder = crate::stub::build_dir().join(format!("stub-libraries/not-a-driver-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(Stub::Nvrtc.folder().join("libnvrtc.so"), folder.join("libcuda.so")).unwrap();
    let test = (module_path!(), "a_library_without_a_function_is_named");
    in_child_with(test, std::slice::from_ref(&folder), &[], || {
        let error = Cuda::probe().unwrap_err();
        assert_eq!(error, Unavailable::NoSymbol { library: "CUDA driver", symbol: "cuInit" });
    });
    let _ = std::fs::remove_dir_all(folder);
}

/// What the integrator of a model does, with counters.
#[test]
fn a_step_allocates_nothing_and_waits_once() {
    in_child((module_path!(), "a_step_allocates_nothing_and_waits_once"), &ALL, &[], || {
        let cuda = open();
        let add = module(&cuda).kernel("add").unwrap();
        let (input, output) = (cuda.alloc(64).unwrap(), cuda.alloc(64).unwrap());
        let mut pinned = (cuda.alloc_pinned(64).unwrap(), cuda.alloc_pinned(64).unwrap());
        let args = [output.as_slice::<i32>().into(), input.as_slice::<i32>().into(), 10.into(), 16.into()];
        let mut graph = cuda
            .capture(|| {
                // SAFETY: the kernel's parameters; both buffers hold 16 integers.
                unsafe { add.launch(LaunchShape::linear(1, 16), &args) }
            })
            .unwrap();
        // On a thread that the context was never bound to, as a step thread is.
        std::thread::spawn(move || {
            let memory = || ["allocations", "pinned", "loads"].map(|name| counter(Stub::Driver, name));
            let before = (memory(), counter(Stub::Driver, "waits"));
            for step in 0..3i32 {
                for (i, value) in pinned.0.write::<i32>(0, 16).unwrap().iter_mut().enumerate() {
                    *value = step * 100 + i as i32;
                }
                input.as_slice::<i32>().upload(&mut pinned.0, 0).unwrap();
                // SAFETY: buffers and module are alive.
                unsafe { graph.replay() }.unwrap();
                output.as_slice::<i32>().download(&mut pinned.1, 0).unwrap();
                let got = pinned.1.read::<i32>(0, 16).unwrap();
                let expected: Vec<i32> = (0..16).map(|i| step * 100 + i + 10).collect();
                assert_eq!(got, expected);
            }
            assert_eq!(memory(), before.0);
            // One of each step, and one of each later write for the copy that the read before has waited for.
            assert_eq!(counter(Stub::Driver, "waits") - before.1, 3 + 2);
            assert_eq!(counter(Stub::Driver, "replays"), 3);
        })
        .join()
        .unwrap();
    });
}

#[test]
fn a_fault_of_a_kernel_shows_at_the_wait_and_stays() {
    in_child((module_path!(), "a_fault_of_a_kernel_shows_at_the_wait_and_stays"), &ALL, &[], || {
        let cuda = open();
        let fault = module(&cuda).kernel("fault").unwrap();
        let buffer = cuda.alloc(4).unwrap();
        // SAFETY: it takes nothing.
        unsafe { fault.launch(LaunchShape::linear(1, 1), &[]) }.unwrap();
        let error = cuda.synchronize().unwrap_err();
        assert!(error.poisons_context(), "{error}");
        assert!(buffer.as_slice::<u8>().fill_bytes(0).unwrap_err().poisons_context());
        // Nothing can be freed any more, which is no reason to panic.
        drop((buffer, fault, cuda));
    });
}

#[test]
fn the_real_cublaslt_has_every_function() {
    let Some(folder) = real("cu13", "libcublasLt.so.13") else { return };
    in_child_with((module_path!(), "the_real_cublaslt_has_every_function"), &[folder], &[], || {
        let version = driver::cublaslt().unwrap();
        assert!((130_000..140_000).contains(&version), "{version}");
    });
}
