//! Python packages from the registry, for tests.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a command; its output.
///
/// # Panics
/// If it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}{errors}");
    text
}

/// The interpreter of a virtual environment with the pinned packages of `folder`'s `requirements.txt`, made once and kept
/// below `target`.
pub fn environment(target: &str, folder: &Path) -> PathBuf {
    let requirements = folder.join("requirements.txt");
    let pinned = std::fs::read_to_string(&requirements).expect("requirements are readable");
    let name = folder.file_name().expect("a folder has a name").to_string_lossy();
    let environment = Path::new(target).join(format!("{name}-venv"));
    let python = environment.join("bin/python");
    let stamp = environment.join("installed.txt");
    // Tests of one program and of several come here at once.
    let lock = std::fs::File::create(Path::new(target).join(format!("{name}-venv.lock")));
    let lock = lock.expect("the target folder is writable");
    lock.lock().expect("a file can be locked");
    if std::fs::read_to_string(&stamp).ok().as_deref() != Some(&pinned) {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment));
        let install = ["-m", "pip", "install", "--quiet", "--requirement"];
        run(Command::new(&python).args(install).arg(&requirements));
        std::fs::write(&stamp, pinned).expect("the target folder is writable");
    }
    python
}
