//! Configuration: what a person wrote (flags, environment, file), and what the program runs with.
//!
//! [`flags`] are raw and belong to clap; [`ServeConfig`], [`RunConfig`] and [`BenchConfig`] are checked once and never
//! written to afterwards. Precedence: flag, environment (`TANDEM_PORT` for `--port`), file of `--config` (key
//! `port`), default. Every refusal names where the value came from.

mod bench;
mod check;
mod error;
mod familiar;
mod file;
mod flags;
mod identity;
mod layers;
mod secret;
mod values;

pub use bench::{
    BaseUrl, BenchConfig, BenchLoad, BenchTarget, Endpoint, OutputFormat, PerplexityConfig, ServerTarget,
};
pub use check::{CommonConfig, KernelsConfig, RankConfig, RunConfig, ServeConfig};
pub use error::{ConfigError, Origin};
pub use identity::GroupConfig;
pub use layers::{Environment, Origins, environment_of_process};
pub use secret::ApiKey;
pub use values::{
    Activations, AllowedOrigins, CustomAllReduce, Device, Dtype, Isa, KvCacheDtype, LoadFormat, LogFormat,
    Quantization, WeightType,
};

use clap::FromArgMatches;
use std::ffi::OsString;

/// A command with its checked configuration.
#[derive(Debug)]
pub enum Command {
    /// `tandem serve`
    Serve(Box<ServeConfig>),
    /// `tandem run`
    Run(Box<RunConfig>),
    /// `tandem bench`
    Bench(Box<BenchConfig>),
    /// `tandem check`: the configuration of `serve`.
    Check(Box<ServeConfig>),
    /// `tandem kernels`
    Kernels(KernelsConfig),
    /// `tandem rank`: one rank of a group, started by its pod's `serve`.
    Rank(Box<RankConfig>),
}

/// Why there is no command to run.
#[derive(Debug)]
pub enum Stop {
    /// Help or version was asked for: the text for standard output.
    Shown(Box<clap::builder::StyledStr>),
    /// The configuration was refused.
    Refused(ConfigError),
}

/// A command and what should be logged about how it was configured.
#[derive(Debug)]
pub struct Parsed {
    /// What to do.
    pub command: Command,
    /// Things that look like mistakes but refuse nothing.
    pub notes: Vec<String>,
}

/// Reads the command line with its environment.
///
/// # Errors
/// [`Stop::Refused`] names the flag, variable or key and what to do about it.
pub fn parse(arguments: Vec<OsString>, environment: &Environment) -> Result<Parsed, Stop> {
    let (arguments, needless) = familiar::without_needless(arguments);
    let mut resolved = layers::resolve(flags::command(), arguments, environment)?;
    resolved.notes.extend(needless);
    let cli = flags::Cli::from_arg_matches(&resolved.matches)
        .map_err(|e| Stop::Refused(ConfigError::new(Origin::CommandLine, error::one_line(&e))))?;
    let origins = &resolved.origins;
    let command = match cli.command {
        flags::CommandFlags::Serve(flags) => {
            check::serve(*flags, origins, environment).map(|c| Command::Serve(Box::new(c)))
        }
        flags::CommandFlags::Check(flags) => {
            check::serve(*flags, origins, environment).map(|c| Command::Check(Box::new(c)))
        }
        flags::CommandFlags::Rank(flags) => {
            check::rank(*flags, origins, environment).map(|c| Command::Rank(Box::new(c)))
        }
        flags::CommandFlags::Kernels(flags) => check::kernels(*flags, origins).map(Command::Kernels),
        flags::CommandFlags::Run(flags) => check::run(*flags, origins).map(|c| Command::Run(Box::new(c))),
        flags::CommandFlags::Bench(flags) => {
            bench::bench(*flags, origins).map(|c| Command::Bench(Box::new(c)))
        }
    };
    Ok(Parsed { command: command.map_err(Stop::Refused)?, notes: resolved.notes })
}

#[cfg(test)]
mod tests;
