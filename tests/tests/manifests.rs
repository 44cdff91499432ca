//! The Kubernetes manifests against the schemas, the rules of a group and of a server with a GPU, and the program itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tandem_tests::pods::wait_for;
use tandem_tests::server::Server;
use tandem_tests::{default_model, python, stand_in};

const GROUP: &str = "tensor-parallel";
const GPU: &str = "single-gpu";
const GPU_GROUP: &str = "tensor-parallel-gpu";

fn check(manifests: &str, options: &[&str]) -> String {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tests.join("manifests");
    let python = python::environment(env!("CARGO_TARGET_TMPDIR"), &folder);
    let manifests = tests.join("../deploy/kubernetes").join(manifests);
    python::run(Command::new(python).arg(folder.join("check.py")).arg(manifests).args(options))
}

/// The variables of the pod of this ordinal.
fn environment(manifests: &str, ordinal: &str) -> Vec<(String, String)> {
    let pod: Value = serde_json::from_str(&check(manifests, &["--pod", ordinal])).expect("JSON");
    let args: Vec<&str> =
        pod["args"].as_array().expect("arguments").iter().filter_map(Value::as_str).collect();
    assert_eq!(args, ["serve", "/models/model"]);
    let variables = pod["env"].as_object().expect("variables").iter();
    variables.map(|(name, value)| (name.clone(), value.as_str().expect("text").to_owned())).collect()
}

/// Starts what the StatefulSet starts as the pod of this ordinal, with files that are on this machine.
fn start_pod(ordinal: &str, key: &Path) -> Server {
    let mut environment = environment(GROUP, ordinal);
    for (name, value) in &mut environment {
        if name == "TANDEM_GROUP_KEY_FILE" {
            *value = key.display().to_string();
        }
    }
    environment.retain(|(name, _)| name != "TANDEM_CACHE_DIR");
    // A model that splits in two.
    let model = tandem_tests::golden_path("tiny-tp8");
    assert!(default_model().is_file());
    Server::spawn_with(&[model.to_str().expect("UTF-8")], &environment)
}

#[test]
fn manifests_are_valid_and_every_rule_can_fail() {
    for manifests in [GROUP, GPU, GPU_GROUP] {
        check(manifests, &[]);
        check(manifests, &["--mutations"]);
    }
}

/// On a stand-in, whose compiled kernels are where an image has them; and nowhere else than on a GPU.
#[test]
fn the_server_of_the_manifest_computes_on_a_gpu() {
    let model = tandem_tests::golden_path("dummy-d64");
    // Small, for a GPU that is a CPU.
    let sizes = ["--max-model-len", "128", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"];
    let args = [&[model.to_str().expect("UTF-8"), "--load-format", "dummy"][..], &sizes].concat();
    let mut with_gpu = environment(GPU, "0");
    with_gpu.extend(stand_in::environment(1, 4 << 30));
    let server = Server::spawn_with(&args, &with_gpu);
    server.wait_until_ready();
    assert!(server.output().contains("\"backend\":\"cuda\""), "{}", server.output());

    let mut without = Server::spawn_with(&args, &environment(GPU, "0"));
    assert_eq!(without.wait(Duration::from_secs(30)).code(), Some(2), "{}", without.output());
}

/// No cluster's DNS is here, so the pods cannot meet; but each knows who it is, whom it misses and where it looks.
#[test]
fn pods_of_the_manifest_know_their_places() {
    let key: PathBuf = std::env::temp_dir().join(format!("tandem-manifest-key-{}", std::process::id()));
    std::fs::write(&key, "the secret of a manifest's group").expect("a file");
    let leader = start_pod("0", &key);
    wait_for("pod 0 leads and misses the others", || {
        let report = leader.peek("/readyz");
        report.contains("ordinal 1 has not called")
            && report.contains("tandem-1.tandem-group.default.svc.cluster.local does not resolve")
    });
    drop(leader);
    let follower = start_pod("1", &key);
    wait_for("pod 1 looks for pod 0", || {
        let report = follower.peek("/readyz");
        report.contains("tandem-0.tandem-group.default.svc.cluster.local cannot be looked up")
    });
    wait_for("its own load is over", || follower.peek("/startupz").contains("started"));
    assert!(follower.peek("/livez").contains("live"));
    let _ = std::fs::remove_file(key);
}
