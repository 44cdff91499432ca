//! The four commands of `tandem`, and what they share.
//!
//! Exit codes: 0 done, 1 failed on the way, 2 configuration or model refused before any work. A refusal is one line on
//! standard error that names the flag, variable, key or file and what to do.

mod banner;
mod bench;
mod bench_report;
mod check;
mod drain;
mod logging;
mod numbers;
mod perplexity;
mod run;
mod serve;
mod startup;
mod terminal;

use std::ffi::OsString;
use std::fmt;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Instant;

use crate::config::{self, Command, Stop};

/// Done.
const DONE: u8 = 0;
/// Something failed while it ran.
const FAILED: u8 = 1;
/// The configuration or the model was refused.
const REFUSED: u8 = 2;

/// Runs the command line; `started` is when the process began.
pub fn main(arguments: Vec<OsString>, started: Instant) -> ExitCode {
    let parsed = match config::parse(arguments, &config::environment_of_process()) {
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
    let (common, level) = match &parsed.command {
        Command::Serve(config) => (&config.common, "info"),
        Command::Check(config) => (&config.common, "warn"),
        Command::Run(config) => (&config.common, "warn"),
        Command::Bench(config) => (&config.common, "warn"),
    };
    logging::init(common, level);
    for note in &parsed.notes {
        tracing::warn!("{note}");
    }
    let result = match parsed.command {
        Command::Serve(config) => serve::serve(*config, started),
        Command::Run(config) => run::run(*config),
        Command::Bench(mut config) => match config.perplexity.take() {
            Some(wanted) => perplexity::perplexity(*config, &wanted),
            None => bench::bench(*config),
        },
        Command::Check(config) => check::check(*config),
    };
    match result {
        Ok(()) => ExitCode::from(DONE),
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
            eprintln!("tandem: {}", problem.replace('\n', " "));
        }
        ExitCode::from(self.code)
    }
}
