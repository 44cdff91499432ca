//! Refusals of a configuration: one line that says where the value stands and what to do.

use std::fmt;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The command line as a whole.
    CommandLine,
    /// A flag, by its name without dashes.
    Flag(String),
    /// An environment variable.
    Environment(String),
    /// A key of the configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The key as written there.
        key: String,
    },
    /// The configuration file as a whole.
    WholeFile(PathBuf),
    /// Nobody wrote it.
    Default(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::CommandLine => write!(f, "command line"),
            Origin::Flag(name) => write!(f, "--{name}"),
            Origin::Environment(name) => write!(f, "environment variable {name}"),
            Origin::File { path, key } => write!(f, "{}: key {key}", path.display()),
            Origin::WholeFile(path) => write!(f, "{}", path.display()),
            Origin::Default(name) => write!(f, "--{name}"),
        }
    }
}

/// A refused configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Where the mistake is.
    pub origin: Origin,
    /// What is wrong and what to do; one line.
    pub message: String,
}

impl ConfigError {
    /// A refusal.
    pub fn new(origin: Origin, message: impl Into<String>) -> Self {
        Self { origin, message: message.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

impl std::error::Error for ConfigError {}

/// A clap error in one line, without the name of the argument (the origin has it) where it has one.
pub(super) fn one_line(error: &clap::Error) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    match error.kind() {
        ErrorKind::InvalidValue if value.is_empty() => "a value is missing".to_owned(),
        ErrorKind::InvalidValue => {
            let valid = context(ContextKind::ValidValue).unwrap_or_default();
            format!("invalid value {value:?} (one of: {valid})")
        }
        ErrorKind::ValueValidation => {
            let reason = std::error::Error::source(error).map_or(String::new(), |e| format!(": {e}"));
            format!("invalid value {value:?}{reason}")
        }
        ErrorKind::UnknownArgument => {
            let argument = context(ContextKind::InvalidArg).unwrap_or_default();
            if super::familiar::is_not_built_yet(argument.split('=').next().unwrap_or_default()) {
                return format!("{argument} is not supported yet; see --help");
            }
            let nearest = context(ContextKind::SuggestedArg);
            let nearest = nearest.map_or(String::new(), |s| format!(" (did you mean {s}?)"));
            format!("unknown argument {argument:?}{nearest}; see --help")
        }
        ErrorKind::InvalidSubcommand => {
            let name = context(ContextKind::InvalidSubcommand).unwrap_or_default();
            format!("unknown command {name:?} ({COMMANDS})")
        }
        _ => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or("invalid arguments");
            line.strip_prefix("error: ").unwrap_or(line).to_owned()
        }
    }
}

/// The commands that users call.
pub(super) const COMMANDS: &str = "serve, run, bench, check, kernels";

/// The flag that a clap error is about, by its long name.
pub(super) fn flag_of(error: &clap::Error) -> Option<String> {
    if error.kind() == ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else { return None };
    let name = argument.strip_prefix("--")?;
    name.split([' ', '=', '<', '[']).next().map(str::to_owned)
}
