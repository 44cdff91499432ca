//! The commands of `tandem`, and what they share.
//!
//! Exit codes: 0 done, 1 failed on the way, 2 configuration or model refused before any work, 70 a rank that its parent has to
//! start again. A refusal is one line on standard error that names the flag, variable, key or file and what to do.

mod banner;
mod bench;
mod check;
mod drain;
mod follow;
mod kernels;
mod logging;
mod numbers;
mod rank;
mod ranks;
mod run;
mod sandbox;
mod serve;
mod startup;
mod terminal;

use std::ffi::OsString;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use crate::config::{self, Command, Stop};

/// Done.
const DONE: u8 = 0;
/// Something failed while it ran.
const FAILED: u8 = 1;
/// The configuration or the model was refused.
const REFUSED: u8 = 2;
/// A rank's computing thread does not come back: a new process is needed (`EX_SOFTWARE`).
const REPLACE: u8 = 70;

/// Runs the command line; `started` is when the process began.
pub fn main(arguments: Vec<OsString>, started: Instant) -> ExitCode {
    if sandbox::is_asked_for(&arguments) {
        return match sandbox::render() {
            Ok(()) => ExitCode::from(DONE),
            Err(exit) => exit.report(),
        };
    }
    let parsed = match config::parse(arguments.clone(), &config::environment_of_process()) {
        Ok(parsed) => parsed,
        Err(Stop::Shown(text)) => {
            terminal::print(&match io::stdout().is_terminal() {
                true => text.ansi().to_string(),
                false => text.to_string(),
            });
            return ExitCode::from(DONE);
        }
        Err(Stop::Refused(error)) => return Exit::refused(error).report(),
    };
    let (log, level) = match &parsed.command {
        Command::Serve(config) => (config.common.log(), "info"),
        Command::Check(config) => (config.common.log(), "warn"),
        Command::Rank(config) => (config.serve.common.log(), "info"),
        Command::Run(config) => (config.common.log(), "warn"),
        Command::Bench(config) => (config.log(), "warn"),
        Command::Kernels(config) => ((config.log_format, config.log_level.as_deref()), "warn"),
    };
    logging::init(log, level);
    for note in &parsed.notes {
        tracing::warn!("{note}");
    }
    let prints_results = !matches!(parsed.command, Command::Serve(_) | Command::Rank(_));
    let result = match parsed.command {
        Command::Serve(config) => serve::serve(*config, &arguments, started),
        Command::Rank(config) => rank::rank(*config),
        Command::Run(config) => run::run(*config),
        Command::Bench(config) => bench::bench(*config),
        Command::Check(config) => check::check(*config),
        Command::Kernels(config) => kernels::kernels(config),
    };
    match result {
        Ok(()) => match terminal::failure().filter(|_| prints_results) {
            Some(error) => Exit::failed(format!("standard output: {error}")).report(),
            None => ExitCode::from(DONE),
        },
        Err(exit) => exit.report(),
    }
}

/// Why a command did not end well.
#[derive(Debug)]
struct Exit {
    code: u8,
    /// One line each.
    problems: Vec<String>,
}

impl Exit {
    /// Refused before any work.
    fn refused(problem: impl fmt::Display) -> Self {
        Self { code: REFUSED, problems: vec![problem.to_string()] }
    }

    /// Failed on the way.
    fn failed(problem: impl fmt::Display) -> Self {
        Self { code: FAILED, problems: vec![problem.to_string()] }
    }

    fn report(&self) -> ExitCode {
        for problem in &self.problems {
            // Nobody may be there to read it; the exit code says it too.
            let _ = writeln!(io::stderr(), "tandem: {}", problem.replace('\n', " "));
        }
        ExitCode::from(self.code)
    }
}
