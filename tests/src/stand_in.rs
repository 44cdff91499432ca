//! A GPU that is none: NVIDIA's libraries replaced by ones that run everything, kernels too, on the CPU. The binary under test does
//! not know.

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
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/cu/emulate.h");
    [
        ("LD_LIBRARY_PATH", libraries.to_str().expect("UTF-8").to_owned()),
        ("STUB_EMULATE", header.to_str().expect("UTF-8").to_owned()),
        ("STUB_DEVICES", num_gpus.to_string()),
        ("STUB_MEMORY", memory.to_string()),
        ("TANDEM_CACHE_DIR", kernel_cache().to_str().expect("UTF-8").to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

fn kernel_cache() -> PathBuf {
    tandem_kernels::stub::build_dir().join("emulated-kernels")
}
