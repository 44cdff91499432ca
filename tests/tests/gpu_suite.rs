//! The script that checks and measures a build on a GPU, on a stand-in with shapes that say nothing of speed: so that it works on
//! the day that there is one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tandem_tests::server::binary;
use tandem_tests::stand_in;

/// Runs the script; what came of it, and its report.
fn run(name: &str, environment: &[(String, String)]) -> (Output, Value) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/gpu-suite.sh");
    let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&out);
    let output = Command::new(script)
        .arg(binary())
        .arg(&out)
        .arg("--small")
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .output()
        .expect("the script starts");
    let text = std::fs::read_to_string(out.join("report.json"))
        .unwrap_or_else(|error| panic!("no report: {error}\n{}", String::from_utf8_lossy(&output.stderr)));
    (output, serde_json::from_str(&text).expect("JSON"))
}

/// Names of the entries with a status.
fn with_status<'a>(report: &'a Value, kind: &str, status: &str) -> Vec<&'a str> {
    let entries = report[kind].as_array().expect("entries").iter();
    entries.filter(|entry| entry["status"] == status).filter_map(|entry| entry["name"].as_str()).collect()
}

#[test]
fn every_check_and_benchmark_works() {
    let (output, report) = run("gpu-suite", &stand_in::environment(1, 4 << 30));
    let said = format!(
        "{}{}\n{report:#}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{said}");
    assert_eq!(report["finished"], true);
    assert_eq!(report["machine"]["gpu"]["name"], "Stub 0", "{said}");
    assert!(report["limits"]["copy_bytes_per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{said}");
    let passed = with_status(&report, "checks", "pass");
    for name in
        ["kernels beside plain loops", "graphs on and off", "tokens with and without log-probabilities"]
    {
        assert!(passed.contains(&name), "{name}: {said}");
    }
    assert_eq!(with_status(&report, "checks", "skipped"), ["the real model beside transformers"]);
    let measured = with_status(&report, "measurements", "measured");
    for name in [
        "decode, batch 1, context 24",
        "decode, batch 3, context 24",
        "start to ready",
        "time to first token, 48 tokens",
        "served, 3 at once, 20 in, 6 out",
    ] {
        assert!(measured.contains(&name), "{name}: {said}");
    }
    let decode = &report["measurements"][0];
    let number = |name: &str| decode[name].as_f64().unwrap_or_else(|| panic!("no {name}: {said}"));
    assert!((number("share") - number("value") / number("limit")).abs() < 1e-9, "{said}");
}

#[test]
fn a_machine_without_a_gpu_is_told_apart() {
    let (output, report) = run("gpu-suite-without", &[]);
    assert_eq!(output.status.code(), Some(1));
    let reason = report["checks"][0]["reason"].as_str().expect("a reason");
    assert!(reason.contains("no CUDA driver"), "{reason}");
}
