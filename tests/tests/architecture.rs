//! The shape of the project: which crate may use which, who owns which outside library, and where `unsafe` may stand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Arrows of the architecture: a crate and the crates of ours that it may use.
const ARROWS: &[(&str, &[&str])] = &[
    ("tandem-wire", &[]),
    ("tandem-kernels", &["tandem-wire"]),
    ("tandem-models", &["tandem-kernels"]),
    ("tandem-engine", &["tandem-kernels", "tandem-models", "tandem-wire"]),
    ("tandem-server", &["tandem-engine"]),
    ("tandem-tests", &["tandem-kernels", "tandem-models", "tandem-wire", "tandem-engine", "tandem-server"]),
];

/// Outside libraries that only one crate may name.
const OWNERS: &[(&str, &str)] = &[
    ("axum", "tandem-server"),
    ("hyper", "tandem-server"),
    ("tower-http", "tandem-server"),
    ("tokenizers", "tandem-server"),
    ("minijinja", "tandem-server"),
    ("clap", "tandem-server"),
    ("memmap2", "tandem-models"),
    ("cudarc", "tandem-kernels"),
    ("nvml-wrapper", "tandem-kernels"),
];

/// Files outside `kernels/` that may lift the ban on `unsafe`.
const UNSAFE_FILES: &[&str] = &["models/src/mmap.rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_path_buf()
}

fn packages() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let mut packages = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let dependencies = package["dependencies"].as_array().expect("dependencies");
        // Tests and benches may look at anything; the arrows are about what is built into the product.
        let names = dependencies.iter().filter(|d| d["kind"].is_null());
        let names = names.map(|d| d["name"].as_str().expect("name").to_owned()).collect();
        packages.insert(package["name"].as_str().expect("name").to_owned(), names);
    }
    packages
}

#[test]
fn crates_use_only_the_crates_below_them() {
    let packages = packages();
    let known: Vec<&str> = ARROWS.iter().map(|(name, _)| *name).collect();
    assert_eq!(packages.keys().map(String::as_str).collect::<Vec<_>>(), {
        let mut sorted = known.clone();
        sorted.sort_unstable();
        sorted
    });
    for (name, allowed) in ARROWS {
        for dependency in packages[*name].iter().filter(|d| known.contains(&d.as_str())) {
            assert!(allowed.contains(&dependency.as_str()), "{name} must not use {dependency}");
        }
    }
}

#[test]
fn outside_libraries_have_one_owner() {
    for (package, dependencies) in packages() {
        for (library, owner) in OWNERS.iter().filter(|(library, _)| dependencies.iter().any(|d| d == library))
        {
            assert!(
                package == *owner || package == "tandem-tests",
                "{library} belongs to {owner}, not to {package}"
            );
        }
    }
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("folder is readable") {
        let path = entry.expect("entry").path();
        if path.is_dir() && !path.ends_with("target") {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn hardware_and_unsafe_stay_in_their_places() {
    let root = root();
    let mut files = Vec::new();
    for folder in ["kernels", "models", "wire", "engine", "server"] {
        rust_files(&root.join(folder), &mut files);
    }
    assert!(files.len() > 20, "found only {} files", files.len());
    for path in files {
        let name = path.strip_prefix(&root).expect("below root").to_string_lossy().replace('\\', "/");
        let text = std::fs::read_to_string(&path).expect("source is UTF-8");
        if text.contains("std::arch::") || text.contains("core::arch::") {
            assert!(name.starts_with("kernels/src/cpu/"), "{name} uses std::arch");
        }
        if !name.starts_with("kernels/") {
            assert!(
                !text.contains("target_arch") && !text.contains("target_feature"),
                "{name} has a hardware condition"
            );
            let lifts_ban = text.contains("allow(unsafe_code)") || text.contains("expect(unsafe_code");
            assert!(!lifts_ban || UNSAFE_FILES.contains(&name.as_str()), "{name} allows unsafe code");
        }
    }
}
