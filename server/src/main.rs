//! The binary `tandem`: everything is in the library, where tests can reach it.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    tandem_server::cli::main(std::env::args_os().collect(), Instant::now())
}
