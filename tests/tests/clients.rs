//! Clients that others wrote, from the package registry, against a running worker.

use std::path::{Path, PathBuf};
use std::process::Command;

use tandem_tests::server::Server;
use tandem_tests::{default_model, python};

fn clients() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients")
}

#[test]
fn the_official_openai_client_works() {
    let python = python::environment(env!("CARGO_TARGET_TMPDIR"), &clients());
    let model = default_model();
    let server = Server::start(&[model.to_str().expect("UTF-8"), "--served-model-name", "smollm2"]);
    python::run(Command::new(python).arg(clients().join("openai_client.py")).arg(server.port.to_string()));
}
