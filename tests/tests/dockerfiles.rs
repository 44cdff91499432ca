//! The recipes of images, by hadolint: no container is built here.

use std::path::Path;
use std::process::Command;

use tandem_tests::python;

#[test]
fn dockerfiles_pass_the_linter() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = python::environment(env!("CARGO_TARGET_TMPDIR"), &tests.join("dockerfiles"));
    let linter = python.with_file_name("hadolint");
    let recipes = ["../Dockerfile", "../Dockerfile.cuda"].map(|recipe| tests.join(recipe));
    for recipe in &recipes {
        python::run(Command::new(&linter).arg("--no-color").arg(recipe));
    }

    // And it looks: a cd that may fail unseen, and packages of any version.
    let broken = std::fs::read_to_string(&recipes[1]).expect("it is readable")
        + "RUN cd /tmp && apt-get install foo\n";
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("broken.Dockerfile");
    std::fs::write(&file, broken).expect("the target folder is writable");
    let output = Command::new(linter).arg("--no-color").arg(file).output().expect("the linter starts");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("DL3008"));
}
