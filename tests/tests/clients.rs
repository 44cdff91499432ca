//! Clients that others wrote, from the package registry, against a running worker.

use std::path::{Path, PathBuf};
use std::process::Command;

use tandem_tests::default_model;
use tandem_tests::server::Server;

fn clients() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients")
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}");
}

/// A virtual environment with the pinned clients, made once and kept in the target folder.
fn python() -> PathBuf {
    let requirements = clients().join("requirements.txt");
    let pinned = std::fs::read_to_string(&requirements).expect("requirements are readable");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients-venv");
    let python = folder.join("bin/python");
    let stamp = folder.join("installed.txt");
    if std::fs::read_to_string(&stamp).ok().as_deref() != Some(&pinned) {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
        run(Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--requirement"])
            .arg(&requirements));
        std::fs::write(&stamp, pinned).expect("the target folder is writable");
    }
    python
}

#[test]
fn the_official_openai_client_works() {
    let python = python();
    let model = default_model();
    let server = Server::start(&[model.to_str().expect("UTF-8"), "--served-model-name", "smollm2"]);
    run(Command::new(python).arg(clients().join("openai_client.py")).arg(server.port.to_string()));
}
