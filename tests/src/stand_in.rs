//! A GPU that is none: NVIDIA's libraries replaced by ones that run everything, kernels too, on the CPU. The binary under test does
//! not know.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use tandem_kernels::stub::Stub;

use crate::server::binary;

/// Variables for a process that shall find `num_gpus` GPUs of `memory` bytes. The kernels are compiled before, once for all tests.
pub fn environment(num_gpus: usize, memory: u64) -> Vec<(String, String)> {
    static COMPILED: Once = Once::new();
    let environment = variables(num_gpus, memory);
    COMPILED.call_once(|| {
        let output = Command::new(binary())
            .args(["kernels", "--arch", "sm_90a"])
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .output()
            .expect("the binary starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    });
    environment
}

fn variables(num_gpus: usize, memory: u64) -> Vec<(String, String)> {
    let folders =
        [Stub::Driver, Stub::Nvrtc, Stub::CublasLt, Stub::NcclProcesses, Stub::Nvml].map(Stub::folder);
    let libraries = std::env::join_paths(folders).expect("folders without colons");
    let header = emulation();
    [
        ("LD_LIBRARY_PATH", libraries.to_str().expect("UTF-8").to_owned()),
        ("STUB_EMULATE", header.to_str().expect("UTF-8").to_owned()),
        ("STUB_DEVICES", num_gpus.to_string()),
        ("STUB_MEMORY", memory.to_string()),
        ("STUB_SHARED", "1".to_owned()),
        ("TANDEM_CACHE_DIR", kernel_cache().to_str().expect("UTF-8").to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// What a GPU does wrong.
pub struct Wrong {
    /// Files of kernels that are compiled anew, by the beginnings of their names.
    pub anew: &'static [&'static str],
    /// What the emulation does, and what it does instead.
    pub instead: [&'static str; 2],
}

/// Norms come out a little too large, and whether kernels were checked is forgotten.
pub const WRONG_NORMS: Wrong =
    Wrong { anew: &["norm-", "checked-"], instead: ["1.0f / sqrtf(x)", "1.02f / sqrtf(x)"] };

/// What other ranks have is read as zeros.
pub const WRONG_SUMS: Wrong = Wrong {
    anew: &["all_reduce-"],
    instead: [
        "load16_volatile(const void* p) { return load16(p); }",
        "load16_volatile(const void*) { return uint4{}; }",
    ],
};

/// As [`environment`], for GPUs that do something wrong: `dir` gets kernels of its own for it.
pub fn wrong_environment(dir: &Path, num_gpus: usize, memory: u64, what: &Wrong) -> Vec<(String, String)> {
    let mut environment = environment(num_gpus, memory);
    let copies = dir.join("kernels");
    fs::create_dir_all(&copies).expect("a folder");
    for entry in fs::read_dir(kernel_cache().join("kernels")).expect("compiled kernels") {
        let entry = entry.expect("a file");
        let name = entry.file_name();
        let stays = !what.anew.iter().any(|start| name.to_string_lossy().starts_with(start));
        if stays {
            fs::copy(entry.path(), copies.join(name)).expect("room for kernels");
        }
    }
    let header = fs::read_to_string(emulation()).expect("the header");
    let wrong = header.replace(what.instead[0], what.instead[1]);
    assert_ne!(header, wrong);
    let wrong_header = dir.join("emulate.h");
    fs::write(&wrong_header, wrong).expect("room for a header");
    for (name, value) in &mut environment {
        match name.as_str() {
            "STUB_EMULATE" => wrong_header.to_str().expect("UTF-8").clone_into(value),
            "TANDEM_CACHE_DIR" => dir.to_str().expect("UTF-8").clone_into(value),
            _ => {}
        }
    }
    environment
}

fn emulation() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/cu/emulate.h")
}

/// Of this emulation: kernels are kept by their own source.
fn kernel_cache() -> PathBuf {
    let mut hasher = DefaultHasher::new();
    fs::read(emulation()).expect("the header").hash(&mut hasher);
    tandem_kernels::stub::build_dir().join(format!("emulated-kernels-{:016x}", hasher.finish()))
}
