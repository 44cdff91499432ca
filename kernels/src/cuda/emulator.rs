//! Runs the kernels' sources on the CPU, for tests: each module is built by the system's C++ compiler on top of
//! `emulate.h`, which says what such a run finds that a GPU would let pass.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};

use super::launcher::{Address, Arg, Launch, Launcher};
use super::sources::{PRELUDE, SOURCES};

/// Libraries keep their variables to themselves: else the linker would give all of them the same ones.
const OPTIONS: [&str; 7] = [
    "-std=c++20",
    "-O2",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
];

const EMULATION: &str = include_str!("../../cu/emulate.h");

/// Device memory that is host memory, and kernels that are functions.
pub(super) struct Emulator {
    memory: HashMap<Address, Vec<u128>>,
    seed: u64,
}

impl Emulator {
    /// `None`, said on standard error, where there is no C++ compiler. The seed decides in which order threads run.
    pub(super) fn new(seed: u64) -> Option<Self> {
        match Command::new(compiler()).arg("--version").output() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                eprintln!("skipped: no C++ compiler to emulate kernels with (CXX names one)");
                None
            }
            _ => Some(Self { memory: HashMap::new(), seed }),
        }
    }

    fn run(&mut self, streams: &[Vec<Launch>]) -> Result<(), String> {
        self.seed += 1;
        let launches: Vec<&Launch> = streams.iter().flatten().collect();
        let numbers = streams.iter().zip(0..).flat_map(|(stream, number)| stream.iter().map(move |_| number));
        let first = launches.first().ok_or("nothing to launch")?;
        let module = module(first.module)?;
        let names: Vec<CString> = launches.iter().map(|l| CString::new(l.kernel).unwrap()).collect();
        let args: Vec<Vec<u64>> =
            launches.iter().map(|l| l.args().iter().map(|&arg| Arg::bits(arg)).collect()).collect();
        let raw: Vec<RawLaunch> = (launches.iter().zip(&names).zip(&args).zip(numbers))
            .map(|(((launch, name), args), stream)| RawLaunch {
                kernel: name.as_ptr(),
                grid: launch.grid,
                threads: launch.threads,
                shared_bytes: launch.shared_bytes,
                args: args.as_ptr(),
                num_args: args.len() as u32,
                stream,
            })
            .collect();
        let run = module.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: the function has this signature in `emulate.h`; the lock keeps other threads out of the library;
        // what the launches point at outlives the call, and kernels stay in the buffers they are given, or the guards
        // around these tell.
        let error = unsafe { run(raw.as_ptr(), raw.len() as u32, self.seed) };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: it is a C string of the library, which nobody changes while the lock is held.
        let error = unsafe { CStr::from_ptr(error) };
        Err(error.to_string_lossy().into_owned())
    }
}

impl Launcher for Emulator {
    fn allocate(&mut self, bytes: usize) -> Result<Address, String> {
        // As aligned as a device's memory, and never at the same place as what was freed a moment ago.
        let memory = vec![u128::MAX; bytes.div_ceil(16) + 16];
        let address = (memory.as_ptr() as u64).next_multiple_of(256);
        self.memory.insert(address, memory);
        Ok(address)
    }

    fn free(&mut self, address: Address) {
        self.memory.remove(&address);
    }

    fn upload(&mut self, address: Address, bytes: &[u8]) -> Result<(), String> {
        // SAFETY: the address is in memory of `allocate`, whose callers stay in its size.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&mut self, address: Address, bytes: &mut [u8]) -> Result<(), String> {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn launch(&mut self, launch: &Launch) -> Result<(), String> {
        self.run(&[vec![*launch]])
    }

    fn launch_together(&mut self, streams: &[Vec<Launch>]) -> Result<(), String> {
        self.run(streams)
    }

    fn has_streams(&self) -> bool {
        true
    }
}

/// `emulate::Launch`.
#[repr(C)]
struct RawLaunch {
    kernel: *const c_char,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    args: *const u64,
    num_args: u32,
    stream: u32,
}

type Run = unsafe extern "C" fn(*const RawLaunch, u32, u64) -> *const c_char;

/// A library that stays open until the process ends.
struct Module {
    run: Mutex<Run>,
}

type Slot = Arc<Mutex<Option<Result<Arc<Module>, String>>>>;

/// The module of this name, built on its first use; tests wait for their own module only.
fn module(name: &'static str) -> Result<Arc<Module>, String> {
    static MODULES: LazyLock<Mutex<HashMap<&'static str, Slot>>> = LazyLock::new(Mutex::default);
    let slot = MODULES.lock().unwrap().entry(name).or_default().clone();
    slot.lock().unwrap().get_or_insert_with(|| build(name).and_then(|path| open(&path))).clone()
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// The library of a module, beside the test binary; it is named for its text, so that the next run finds it.
fn build(name: &str) -> Result<PathBuf, String> {
    let source = SOURCES.iter().find(|source| source.module == name).ok_or(format!("no module {name}"))?;
    let mut hasher = DefaultHasher::new();
    (EMULATION, PRELUDE, source.text, OPTIONS).hash(&mut hasher);
    let binary = std::env::current_exe().map_err(|error| error.to_string())?;
    let name = format!("{name}-{:016x}", hasher.finish());
    let library = binary.with_file_name("emulated-kernels").join(format!("{name}.so"));
    if library.exists() {
        return Ok(library);
    }
    let folder = library.with_file_name(format!("{name}.{}", std::process::id()));
    let write = |file: &str, text: &str| std::fs::write(folder.join(file), text);
    (std::fs::create_dir_all(&folder))
        .and_then(|()| write("emulate.h", EMULATION))
        .and_then(|()| write("common.cuh", PRELUDE))
        .and_then(|()| write("kernels.cu", source.text))
        .map_err(|error| format!("{}: {error}", folder.display()))?;
    let output = Command::new(compiler())
        .args(OPTIONS)
        .args([
            "-include",
            "emulate.h",
            "-include",
            "common.cuh",
            "-x",
            "c++",
            "kernels.cu",
            "-o",
            "kernels.so",
        ])
        .current_dir(&folder)
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    // Another run may be at the same: each sees the whole library or none.
    std::fs::rename(folder.join("kernels.so"), &library).map_err(|error| error.to_string())?;
    std::fs::remove_dir_all(&folder).map_err(|error| error.to_string())?;
    Ok(library)
}

fn open(path: &std::path::Path) -> Result<Arc<Module>, String> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: the library was built above; its constructors only link a list.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Err(format!("cannot open {}", path.display()));
    }
    // SAFETY: the library is open, and the name is a C string.
    let symbol = unsafe { libc::dlsym(library, c"tandem_emulate".as_ptr()) };
    if symbol.is_null() {
        return Err(format!("no entry in {}", path.display()));
    }
    // SAFETY: the symbol is the function of this signature in `emulate.h`.
    let run = unsafe { std::mem::transmute::<*mut c_void, Run>(symbol) };
    Ok(Arc::new(Module { run: Mutex::new(run) }))
}
