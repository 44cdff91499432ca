//! The libraries: which of them are there, whether they are new enough, and whether they have every function used here.
//!
//! The bindings panic on a missing library and on a missing function, and they look each up at its first call. So this file
//! looks all of them up beforehand. A panic after [`driver`], [`nvrtc`] and [`cublaslt`] said `Ok` would be a mistake in the lists
//! below; the tests' stand-in libraries have the functions of these lists and no others.

use std::sync::OnceLock;

use cudarc::driver::sys::{CUcontext, CUevent};
use libloading::Library;

use super::compile::ImageForm;
use super::error::words;

/// Why there is no CUDA on this machine. Each is one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    #[error("no CUDA driver: none of {} can be opened", .tried.join(", "))]
    NoDriver { tried: Vec<String> },
    #[error("the CUDA driver does not start: {code} ({reason})")]
    Init { code: String, reason: String },
    #[error("the CUDA driver is too old: it supports CUDA {found}, and {needed} is needed{because}")]
    DriverTooOld { found: String, needed: String, because: &'static str },
    #[error("the CUDA driver sees no GPU")]
    NoDevice,
    #[error("no {library} library: none of {} can be opened", .tried.join(", "))]
    NoLibrary { library: &'static str, tried: Vec<String> },
    #[error("the {library} library is too old or not the real one: it has no {symbol}")]
    NoSymbol { library: &'static str, symbol: &'static str },
    #[error("the {library} library is too old: it is version {found}, and {needed} is needed")]
    LibraryTooOld { library: &'static str, found: String, needed: &'static str },
    #[error("no GPU has compute capability 8.0 or more; found {found}")]
    Capability { found: String },
}

/// CUDA 12.0 in the driver's numbering.
const MIN_DRIVER: i32 = 12_000;

const DRIVER_SYMBOLS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDeviceGetPCIBusId",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuCtxGetCurrent",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamQuery",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuIpcCloseMemHandle",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuLaunchKernelEx",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuGraphInstantiateWithFlags",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphLaunch",
    "cuGraphUpload",
];

const NVRTC_SYMBOLS: &[&str] = &[
    "nvrtcVersion",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcCompileProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetPTX",
    "nvrtcGetPTXSize",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
];

const CUBLASLT_SYMBOLS: &[&str] = &[
    "cublasLtGetVersion",
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cublasLtMatrixLayoutSetAttribute",
];

/// The driver is there, started, and no older than CUDA 12. Found out once.
///
/// # Errors
/// `NoDriver`, `NoSymbol`, `Init` and `DriverTooOld`.
pub(super) fn driver() -> Result<(), Unavailable> {
    static FOUND: OnceLock<Result<(), Unavailable>> = OnceLock::new();
    FOUND.get_or_init(start_driver).clone()
}

fn start_driver() -> Result<(), Unavailable> {
    // SAFETY: opening the driver's library runs its initialisers, which it is made for.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        let mut tried = names("cuda");
        tried.extend(names("nvcuda").into_iter().take(1));
        return Err(Unavailable::NoDriver { tried });
    }
    // SAFETY: the library was just found.
    let library = unsafe { cudarc::driver::sys::culib() };
    check_symbols(library, "CUDA driver", DRIVER_SYMBOLS)?;
    cudarc::driver::result::init().map_err(|error| {
        let (code, reason) = words(error);
        Unavailable::Init { code, reason }
    })?;
    let version = driver_version()?;
    if version < MIN_DRIVER {
        let (found, needed) = (version_text(version), version_text(MIN_DRIVER));
        return Err(Unavailable::DriverTooOld { found, needed, because: "" });
    }
    Ok(())
}

/// The newest CUDA that the driver supports, as `1000 · major + 10 · minor`.
pub(super) fn driver_version() -> Result<i32, Unavailable> {
    let mut version = 0;
    // SAFETY: the function exists, as `start_driver` found, and writes one integer.
    let result = unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) }.result();
    result.map_err(|error| {
        let (code, reason) = words(error);
        Unavailable::Init { code, reason }
    })?;
    Ok(version)
}

/// NVRTC is there; its version. Needs no driver.
///
/// # Errors
/// `NoLibrary`, `NoSymbol` and `LibraryTooOld`.
pub(super) fn nvrtc() -> Result<(i32, i32), Unavailable> {
    static FOUND: OnceLock<Result<(i32, i32), Unavailable>> = OnceLock::new();
    FOUND.get_or_init(open_nvrtc).clone()
}

fn open_nvrtc() -> Result<(i32, i32), Unavailable> {
    const NAME: &str = "NVRTC";
    // SAFETY: opening the library runs its initialisers, which it is made for.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(Unavailable::NoLibrary { library: NAME, tried: names("nvrtc") });
    }
    // SAFETY: the library was just found.
    check_symbols(unsafe { cudarc::nvrtc::sys::culib() }, NAME, NVRTC_SYMBOLS)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the function exists and writes two integers.
    let result = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result();
    // The conversion to e4m3 of 8.9 came with 12.1.
    if result.is_err() || (major, minor) < (12, 1) {
        let found = format!("{major}.{minor}");
        return Err(Unavailable::LibraryTooOld { library: NAME, found, needed: "12.1" });
    }
    Ok((major, minor))
}

/// cuBLASLt is there; its version as `10000 · major + 100 · minor + patch`.
///
/// # Errors
/// `NoLibrary`, `NoSymbol` and `LibraryTooOld`.
pub(super) fn cublaslt() -> Result<usize, Unavailable> {
    static FOUND: OnceLock<Result<usize, Unavailable>> = OnceLock::new();
    FOUND.get_or_init(open_cublaslt).clone()
}

fn open_cublaslt() -> Result<usize, Unavailable> {
    const NAME: &str = "cuBLASLt";
    // SAFETY: opening the library runs its initialisers, which it is made for.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Err(Unavailable::NoLibrary { library: NAME, tried: names("cublasLt") });
    }
    // SAFETY: the library was just found.
    check_symbols(unsafe { cudarc::cublaslt::sys::culib() }, NAME, CUBLASLT_SYMBOLS)?;
    // SAFETY: the function exists and takes nothing.
    let version = unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() };
    if version < 120_000 {
        let found = format!("{}.{}", version / 10_000, version / 100 % 100);
        return Err(Unavailable::LibraryTooOld { library: NAME, found, needed: "12.0" });
    }
    Ok(version)
}

/// Cubins of NVRTC 13 need a driver of CUDA 13; within a major version they load on any. Assembly (PTX) does not: its language grows
/// with minor versions too.
///
/// # Errors
/// `DriverTooOld`.
pub(super) fn driver_loads_what_nvrtc_makes(form: ImageForm) -> Result<(), Unavailable> {
    let (driver, (major, minor)) = (driver_version()?, nvrtc()?);
    let needed = match form {
        ImageForm::Cubin => major * 1000,
        ImageForm::Ptx => major * 1000 + minor * 10,
    };
    if driver < needed {
        return Err(Unavailable::DriverTooOld {
            found: version_text(driver),
            needed: version_text(needed),
            because: " for the kernels that this NVRTC makes; install a newer driver or an older NVRTC",
        });
    }
    Ok(())
}

/// The context that a thread is bound to, for another thread that works in its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BoundContext(CUcontext);

// SAFETY: a context may be current on several threads at once.
unsafe impl Send for BoundContext {}
// SAFETY: as above; nothing changes it.
unsafe impl Sync for BoundContext {}

impl BoundContext {
    /// That of this thread, if there is a driver and it has one.
    pub(crate) fn of_this_thread() -> Option<Self> {
        driver().ok()?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver is there, and writes a pointer.
        let result = unsafe { cudarc::driver::sys::cuCtxGetCurrent(&raw mut context) }.result();
        (result.is_ok() && !context.is_null()).then_some(Self(context))
    }

    /// Binds this thread to it. The context must still be there: the caller owns what keeps it.
    pub(crate) fn bind(self) {
        // A failure leaves the thread as it was.
        // SAFETY: the driver was there when this was made.
        let _ = unsafe { cudarc::driver::sys::cuCtxSetCurrent(self.0) };
    }
}

/// Milliseconds between two events that have happened; `Err` is CUDA's number of the error.
///
/// # Safety
/// Both are events of the current context, made with timing, recorded and waited for.
pub(super) unsafe fn event_elapsed_ms(start: CUevent, end: CUevent) -> Result<f32, i32> {
    // The bindings' function of this name is one that drivers before CUDA 12.8 do not have.
    type Elapsed = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> i32;
    // SAFETY: there are events, so the driver is loaded.
    let library = unsafe { cudarc::driver::sys::culib() };
    // SAFETY: the type is that of the function in cuda.h. Its result is read as an integer.
    let elapsed = unsafe { library.get::<Elapsed>(b"cuEventElapsedTime\0") }.map_err(|_| -1)?;
    let mut ms = 0.0;
    // SAFETY: by this function's contract.
    match unsafe { elapsed(&raw mut ms, start, end) } {
        0 => Ok(ms),
        code => Err(code),
    }
}

fn check_symbols(library: &Library, name: &'static str, symbols: &[&'static str]) -> Result<(), Unavailable> {
    for symbol in symbols {
        // SAFETY: the address is looked at only for being there.
        if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
            return Err(Unavailable::NoSymbol { library: name, symbol });
        }
    }
    Ok(())
}

/// The names under which the bindings look for a library here, without those of other systems.
fn names(library: &str) -> Vec<String> {
    let plain = format!("lib{library}.so");
    cudarc::get_lib_name_candidates(library).into_iter().filter(|name| name.starts_with(&plain)).collect()
}

/// `1000 · major + 10 · minor` as text.
fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
