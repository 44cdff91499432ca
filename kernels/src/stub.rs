//! Stand-ins for NVIDIA's libraries, so that tests reach the code around them on a machine without a GPU.
//!
//! Each is a file of C in `kernels/stub`, compiled by the system's `cc` beside the test binary. A process opens a library once
//! and its environment decides which, so a test that needs stand-ins runs its body in a child: the same binary, told to run that
//! test only, with the stand-ins first on the loader's path.

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CString, c_char, c_longlong};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// A library to stand in for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stub {
    Driver,
    Nvrtc,
    CublasLt,
    Nccl,
    /// NCCL again, between processes.
    NcclProcesses,
    Nvml,
}

impl Stub {
    const fn source(self) -> &'static str {
        match self {
            Self::Driver => include_str!("../stub/cuda.c"),
            Self::Nvrtc => include_str!("../stub/nvrtc.c"),
            Self::CublasLt => include_str!("../stub/cublaslt.c"),
            Self::Nccl => include_str!("../stub/nccl.c"),
            Self::NcclProcesses => include_str!("../stub/nccl_processes.c"),
            Self::Nvml => include_str!("../stub/nvml.c"),
        }
    }

    /// The library's file name; the name that is looked for first, so that a real library does not come before it.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Driver => "libcuda.so",
            Self::Nvrtc => "libnvrtc.so",
            Self::CublasLt => "libcublasLt.so",
            Self::Nccl | Self::NcclProcesses => "libnccl.so.2",
            Self::Nvml => "libnvidia-ml.so.1",
        }
    }

    /// The folder with the compiled library, alone.
    pub fn folder(self) -> PathBuf {
        static BUILDS: Mutex<()> = Mutex::new(());
        let _one_at_a_time = BUILDS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut hasher = DefaultHasher::new();
        self.source().hash(&mut hasher);
        let base = build_dir().join("stub-libraries");
        let folder = base.join(format!("{self:?}-{:016x}", hasher.finish()));
        if !folder.join(self.file_name()).exists() {
            self.build(&base, &folder);
        }
        folder
    }

    /// Other processes may build the same: whole folders are renamed into place.
    fn build(self, base: &Path, folder: &Path) {
        let temporary = base.join(format!("{self:?}-{}.tmp", std::process::id()));
        std::fs::create_dir_all(&temporary).expect("the build folder can be written");
        let source = temporary.join("stub.c");
        std::fs::write(&source, self.source()).expect("the build folder can be written");
        let output = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wno-unused", "-pthread", "-o"])
            .arg(temporary.join(self.file_name()))
            .arg(&source)
            .args(["-ldl", "-lm"])
            .output()
            .expect("these tests need a C compiler called cc");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{self:?} does not compile:\n{words}");
        if std::fs::rename(&temporary, folder).is_err() {
            assert!(folder.join(self.file_name()).exists(), "somebody else built it");
            let _ = std::fs::remove_dir_all(&temporary);
        }
    }
}

/// A folder below the target folder.
pub fn build_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("tests run from a file");
    exe.parent().expect("a file is in a folder").to_path_buf()
}

/// The folder of a real library of NVIDIA's, if its wheel was put into `cuda-wheels` of the target folder
/// (`pip install --no-deps --target target/cuda-wheels nvidia-cuda-nvrtc==13.0.88 nvidia-cublas nvidia-nccl-cu13`), or into the
/// folder that `TANDEM_TEST_WHEELS` names. Says so if it was not.
pub fn real(wheel: &str, library: &str) -> Option<PathBuf> {
    // The test binary is in target/debug/deps.
    let wheels = std::env::var_os("TANDEM_TEST_WHEELS")
        .map_or_else(|| build_dir().join("../../cuda-wheels"), PathBuf::from);
    let folder = wheels.join("nvidia").join(wheel).join("lib");
    if !folder.join(library).exists() {
        println!("skipped: there is no {library} in {}", folder.display());
        return None;
    }
    Some(folder)
}

const MARK: &str = "TANDEM_STUB_TEST";

/// Runs `body` in a child process that finds `stubs` and has `env`. `module` is `module_path!()` and `test` the function's name.
///
/// # Panics
/// If the body does.
pub fn in_child((module, test): (&str, &str), stubs: &[Stub], env: &[(&str, &str)], body: impl FnOnce()) {
    let folders: Vec<_> = stubs.iter().map(|stub| stub.folder()).collect();
    in_child_with((module, test), &folders, env, body);
}

/// The same with libraries of any folders.
pub fn in_child_with(
    (module, test): (&str, &str),
    folders: &[PathBuf],
    env: &[(&str, &str)],
    body: impl FnOnce(),
) {
    let (_, inside) = module.split_once("::").expect("tests are in a module");
    let name = format!("{inside}::{test}");
    if std::env::var(MARK).is_ok_and(|mark| mark == name) {
        return body();
    }
    let mut path: Vec<_> = folders.to_vec();
    path.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
    let child = Command::new(std::env::current_exe().expect("tests run from a file"))
        .args([&name, "--exact", "--nocapture", "--test-threads=1"])
        .env(MARK, &name)
        .env("LD_LIBRARY_PATH", std::env::join_paths(path).expect("folders without colons"))
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the test binary starts");
    let output = output_in_time(child);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // Also if the child found no test of that name, which would be no failure by itself.
    assert!(
        output.status.success() && out.contains("1 passed"),
        "{name} in its child: {}\n{out}\n{err}",
        output.status
    );
}

/// A test that hangs fails: its child is killed.
fn output_in_time(child: Child) -> Output {
    const PATIENCE: Duration = Duration::from_secs(180);
    let pid = i32::try_from(child.id()).expect("a process id");
    let (ended, end) = mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if end.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            // SAFETY: a signal to our own child, which nobody has waited for yet: the other thread is still reading its output.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    });
    let output = child.wait_with_output().expect("a child can be waited for");
    drop(ended);
    watch.join().expect("the watch does not panic");
    output
}

/// A number that the stand-in in this process counts or lets be set.
///
/// # Panics
/// If the library is not there.
pub fn counter(stub: Stub, name: &str) -> i64 {
    let library = open(stub);
    // SAFETY: the stand-ins have this function.
    let read = unsafe { library.get::<unsafe extern "C" fn(*const c_char) -> c_longlong>(b"stub_counter\0") }
        .expect("a stand-in counts");
    let name_c = CString::new(name).expect("a name");
    // SAFETY: a string is read, a number comes back.
    let value = unsafe { read(name_c.as_ptr()) };
    assert!(value >= 0, "{stub:?} has no counter {name}");
    value
}

/// Sets a switch of the stand-in in this process.
///
/// # Panics
/// If the library is not there.
pub fn set(stub: Stub, name: &str, value: i64) {
    let library = open(stub);
    type Set = unsafe extern "C" fn(*const c_char, c_longlong);
    // SAFETY: the stand-ins have this function.
    let set = unsafe { library.get::<Set>(b"stub_set\0") }.expect("a stand-in has switches");
    let name_c = CString::new(name).expect("a name");
    // SAFETY: a string is read, a number is stored.
    unsafe { set(name_c.as_ptr(), value) };
}

/// The loader gives the library that is already open.
fn open(stub: Stub) -> libloading::Library {
    // SAFETY: the stand-ins have no initialisers.
    unsafe { libloading::Library::new(stub.file_name()) }.expect("the stand-in is on the loader's path")
}
