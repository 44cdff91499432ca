//! What the whole-system tests share: the default model, reference data, engines on chosen settings, a running server.

pub mod engine;
pub mod golden;
pub mod pods;
pub mod proxy;
pub mod python;
pub mod ranks;
pub mod server;
pub mod stand_in;

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

/// The instruction sets that this machine has; says which it has not, for a test says nothing of those.
///
/// # Panics
/// If one is missing where `TANDEM_TEST_ALL_ISAS` is set: on a machine that was chosen for having all of them.
pub fn instruction_sets() -> Vec<Isa> {
    let (available, missing): (Vec<Isa>, Vec<Isa>) = Isa::ALL.into_iter().partition(|isa| isa.is_available());
    assert!(
        missing.is_empty() || std::env::var_os("TANDEM_TEST_ALL_ISAS").is_none(),
        "this machine has no {missing:?}"
    );
    if !missing.is_empty() {
        println!("not tested, for this machine has them not: {missing:?}");
    }
    available
}

/// A file or folder of the reference data.
pub fn golden_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}
