//! NCCL's library: where it is looked for, the functions used of it, and its types.
//!
//! Results are integers here and stay integers: a newer library may return what this file has no name for.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

use super::NcclError;

/// Names the library, and nothing else is tried then.
pub const LIBRARY_VARIABLE: &str = "TANDEM_NCCL_LIBRARY";
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The first with all functions used here, and with a configuration at least as long as [`Config`].
const MIN_VERSION: i32 = 21_800;

pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;
pub(super) const SUM: c_int = 0;

pub(super) type RawComm = *mut c_void;

/// `ncclUniqueId`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawId(pub(super) [u8; 128]);

/// `ncclConfig_t` as of 2.18. The library takes what is missing at the end of a shorter one from its defaults.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls return before they are done.
    pub(super) const fn non_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: MIN_VERSION as u32,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

macro_rules! functions {
    ($($field:ident: $symbol:literal = fn($($arg:ty),*) -> $result:ty;)+) => {
        /// The functions, all there.
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> $result,)+
        }

        impl Functions {
            fn find(library: &Library) -> Result<Self, NcclError> {
                $(
                    // SAFETY: the type is that of the function in nccl.h, with integers for its enumerations.
                    let $field = unsafe {
                        library.get::<unsafe extern "C" fn($($arg),*) -> $result>(concat!($symbol, "\0").as_bytes())
                    };
                    let $field = *$field.map_err(|_| NcclError::NoSymbol { symbol: $symbol })?;
                )+
                Ok(Self { $($field),+ })
            }
        }
    };
}

functions! {
    get_version: "ncclGetVersion" = fn(*mut c_int) -> c_int;
    get_unique_id: "ncclGetUniqueId" = fn(*mut RawId) -> c_int;
    get_last_error: "ncclGetLastError" = fn(RawComm) -> *const c_char;
    comm_init_rank_config: "ncclCommInitRankConfig" = fn(*mut RawComm, c_int, RawId, c_int, *mut Config) -> c_int;
    comm_get_async_error: "ncclCommGetAsyncError" = fn(RawComm, *mut c_int) -> c_int;
    comm_finalize: "ncclCommFinalize" = fn(RawComm) -> c_int;
    comm_destroy: "ncclCommDestroy" = fn(RawComm) -> c_int;
    comm_abort: "ncclCommAbort" = fn(RawComm) -> c_int;
    all_reduce: "ncclAllReduce" = fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
    all_gather: "ncclAllGather" = fn(*const c_void, *mut c_void, usize, c_int, RawComm, *mut c_void) -> c_int;
    broadcast: "ncclBroadcast" = fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
}

/// The library, opened once and never closed: it has threads of its own.
pub(super) struct Loaded {
    pub(super) functions: Functions,
    pub(super) version: i32,
}

pub(super) fn open() -> Result<&'static Loaded, NcclError> {
    static FOUND: OnceLock<Result<Loaded, NcclError>> = OnceLock::new();
    FOUND.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn load() -> Result<Loaded, NcclError> {
    let chosen = std::env::var(LIBRARY_VARIABLE).ok().filter(|name| !name.is_empty());
    let names: Vec<&str> = chosen.as_deref().map_or_else(|| NAMES.to_vec(), |name| vec![name]);
    let mut tried = Vec::new();
    for name in names {
        // SAFETY: opening the library runs its initialisers, which it is made for.
        match unsafe { Library::new(name) } {
            Ok(library) => return check(library),
            Err(error) => tried.push(reason(name, &error)),
        }
    }
    Err(NcclError::NoLibrary { tried })
}

fn check(library: Library) -> Result<Loaded, NcclError> {
    let functions = Functions::find(&library)?;
    std::mem::forget(library);
    let mut version = 0;
    // SAFETY: one integer is written.
    let code = unsafe { (functions.get_version)(&raw mut version) };
    if code != SUCCESS || version < MIN_VERSION {
        return Err(NcclError::TooOld { found: version_text(version), needed: version_text(MIN_VERSION) });
    }
    Ok(Loaded { functions, version })
}

/// The loader's words, in one line.
fn reason(name: &str, error: &libloading::Error) -> String {
    use std::error::Error as _;
    let words = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let words = words.replace('\n', " ");
    if words.contains(name) { words } else { format!("{name}: {words}") }
}

impl Functions {
    /// What the library said about its last failure.
    pub(super) fn last_words(&self) -> String {
        // SAFETY: the argument is not looked at; a string of the library's own comes back, or nothing.
        let text = unsafe { (self.get_last_error)(std::ptr::null_mut()) };
        if text.is_null() {
            return String::new();
        }
        // SAFETY: it is a string with an end.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
    }
}

/// The names of nccl.h.
pub(super) const fn result_name(code: c_int) -> &'static str {
    match code {
        0 => "ncclSuccess",
        1 => "ncclUnhandledCudaError",
        2 => "ncclSystemError",
        3 => "ncclInternalError",
        4 => "ncclInvalidArgument",
        5 => "ncclInvalidUsage",
        6 => "ncclRemoteError",
        7 => "ncclInProgress",
        _ => "a result without a name here",
    }
}

/// `10000 · major + 100 · minor + patch` as text.
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}
