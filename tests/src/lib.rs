//! What the whole-system tests share: the default model, reference data, engines on chosen settings, a running server.

pub mod engine;
pub mod golden;
pub mod pods;
pub mod server;

use std::path::{Path, PathBuf};

use tandem_kernels::Isa;

/// The default model's file in the cache folder.
///
/// # Panics
/// If it is not there: tests of the real model fail without it, they are never skipped.
pub fn default_model() -> PathBuf {
    let cache = std::env::var_os("TANDEM_CACHE_DIR").map(PathBuf::from).unwrap_or_else(|| {
        let xdg = std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        xdg.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"))
            .join("tandem")
    });
    let path = cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "the default model is not in the cache: run `make model`");
    path
}

/// The instruction sets that this machine has.
///
/// # Panics
/// In CI, if one is missing: a test that says nothing of an instruction set must not pass there.
pub fn instruction_sets() -> Vec<Isa> {
    let all = [Isa::Scalar, Isa::Avx2, Isa::Avx512];
    let available: Vec<Isa> = all.into_iter().filter(|isa| isa.is_available()).collect();
    let in_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!in_ci || available == all, "this machine has {available:?} only");
    available
}

/// A file or folder of the reference data.
pub fn golden_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}
