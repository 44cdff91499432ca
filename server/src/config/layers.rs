//! Flags over environment over file.
//!
//! Variables and file entries are put into the command line as `--flag=value` where no higher layer gave the flag, so
//! that one parser reads all of them alike; [`Origins`] remembers where each came from. clap's own reading of the
//! environment is not used: it cannot say in an error that a value came from there.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

use super::Stop;
use super::error::{COMMANDS, ConfigError, Origin, flag_of, one_line};
use super::file::{self, Entry};

/// The variables that matter: `TANDEM_*`, and those by which Kubernetes says which pod this is.
pub type Environment = BTreeMap<String, String>;

const PREFIX: &str = "TANDEM_";
/// Variables that say which pod this is.
const IDENTITY: [&str; 4] = ["POD_NAME", "POD_NAMESPACE", "POD_INDEX", "HOSTNAME"];
const LEADER_WORKER_SET: &str = "LWS_";
/// Where they are read from if no variable has them.
const HOST_NAME_FILE: &str = "/proc/sys/kernel/hostname";
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
/// Variables of the process that are no flags.
const OTHER_VARIABLES: [&str; 1] = ["TANDEM_CACHE_DIR"];
/// Flags that are each other's negation: given one, lower layers say nothing about the other.
const OPPOSITES: [(&str, &str); 2] =
    [("enable-prefix-caching", "no-enable-prefix-caching"), ("async-scheduling", "no-async-scheduling")];

/// Where the value of each flag was written.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    by_flag: HashMap<String, Origin>,
}

impl Origins {
    /// The origin of a flag's value.
    pub fn of(&self, flag: &str) -> Origin {
        self.by_flag.get(flag).cloned().unwrap_or_else(|| Origin::Default(flag.to_owned()))
    }

    /// Flags given on the command line, in the order of the alphabet.
    pub fn on_command_line(&self) -> impl Iterator<Item = &str> {
        let mut flags: Vec<&str> = self
            .by_flag
            .iter()
            .filter(|(_, origin)| matches!(origin, Origin::Flag(_)))
            .map(|(flag, _)| flag.as_str())
            .collect();
        flags.sort_unstable();
        flags.into_iter()
    }

    /// Whether anybody gave the flag.
    pub fn given(&self, flag: &str) -> bool {
        self.by_flag.contains_key(flag)
    }
}

/// All layers merged.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) matches: ArgMatches,
    pub(super) origins: Origins,
    pub(super) notes: Vec<String>,
}

/// The variables of this process that matter; values that are not UTF-8 are left out. Host name and namespace come from where the
/// system keeps them if no variable has them.
pub fn environment_of_process() -> Environment {
    let variables =
        std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    let matters = |name: &str| {
        name.starts_with(PREFIX) || name.starts_with(LEADER_WORKER_SET) || IDENTITY.contains(&name)
    };
    let mut environment: Environment =
        variables.filter(|(name, value)| matters(name) && !value.is_empty()).collect();
    for (name, path) in [("HOSTNAME", HOST_NAME_FILE), ("POD_NAMESPACE", NAMESPACE_FILE)] {
        if let Ok(text) = std::fs::read_to_string(path)
            && !text.trim().is_empty()
        {
            environment.entry(name.into()).or_insert_with(|| text.trim().to_owned());
        }
    }
    environment
}

/// Merges the layers.
pub(super) fn resolve(
    command: Command,
    arguments: Vec<OsString>,
    environment: &Environment,
) -> Result<Resolved, Stop> {
    let matches =
        command.clone().try_get_matches_from(&arguments).map_err(|e| stop(&e, &Origins::default()))?;
    let Some((name, given)) = matches.subcommand() else {
        return Err(stop(&clap::Error::new(clap::error::ErrorKind::MissingSubcommand), &Origins::default()));
    };
    let Some(subcommand) = command.find_subcommand(name) else { unreachable!("matched above") };
    let mut origins = Origins::default();
    for flag in flags_of(subcommand).filter(|arg| is_given(given, arg)).filter_map(Arg::get_long) {
        origins.by_flag.insert(flag.to_owned(), Origin::Flag(flag.to_owned()));
    }
    if given.try_contains_id("model-positional").unwrap_or(false) {
        origins.by_flag.insert("model".to_owned(), Origin::Flag("model".to_owned()));
    }
    let mut added: Vec<OsString> = Vec::new();
    let mut notes = Vec::new();

    add_environment(subcommand, environment, &mut origins, &mut added, &mut notes);
    note_unknown(&command, environment, &mut notes);
    if let Some(path) = config_path(given, environment) {
        let entries = file::read(&path, &known_flags(&command)).map_err(Stop::Refused)?;
        add_file(subcommand, &path, entries, &mut origins, &mut added).map_err(Stop::Refused)?;
    }

    let at = arguments.iter().position(|argument| argument == name).map_or(1, |at| at + 1);
    let merged = arguments[..at].iter().chain(&added).chain(&arguments[at..]).cloned();
    let matches = command.try_get_matches_from(merged).map_err(|e| stop(&e, &origins))?;
    Ok(Resolved { matches, origins, notes })
}

/// Names the variable of each flag in the help.
pub(super) fn show_variables(subcommand: Command) -> Command {
    subcommand.mut_args(|arg| {
        let Some(variable) = arg.get_long().map(variable) else { return arg };
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        arg.help(format!("{help} [env: {variable}]"))
    })
}

fn add_environment(
    subcommand: &Command,
    environment: &Environment,
    origins: &mut Origins,
    added: &mut Vec<OsString>,
    notes: &mut Vec<String>,
) {
    let mut found = Vec::new();
    for flag in flags_of(subcommand).filter_map(Arg::get_long) {
        let name = variable(flag);
        let Some(value) = environment.get(&name).filter(|_| !is_settled(flag, origins)) else { continue };
        // Kubernetes sets TANDEM_PORT=tcp://… in every pod of a namespace with a Service named tandem.
        if value.starts_with("tcp://") || value.starts_with("udp://") {
            notes.push(format!("{name} looks like a Kubernetes service link and is ignored"));
            continue;
        }
        added.push(format!("--{flag}={value}").into());
        found.push((flag.to_owned(), Origin::Environment(name)));
    }
    origins.by_flag.extend(found);
}

fn add_file(
    subcommand: &Command,
    path: &Path,
    entries: Vec<Entry>,
    origins: &mut Origins,
    added: &mut Vec<OsString>,
) -> Result<(), ConfigError> {
    let mut found = Vec::new();
    for Entry { key, flag, values } in entries {
        let origin = Origin::File { path: path.to_path_buf(), key };
        if flag == "config" {
            return Err(ConfigError::new(origin, "a configuration file cannot name another"));
        }
        // A key of another command is fine: one file may serve all of them.
        let Some(arg) = flags_of(subcommand).find(|arg| arg.get_long() == Some(&flag)) else { continue };
        if is_settled(&flag, origins) {
            continue;
        }
        let takes_many = arg.get_num_args().is_some_and(|range| range.max_values() > 1);
        if values.len() != 1 && !takes_many {
            return Err(ConfigError::new(origin, "takes one value, not a list"));
        }
        added.extend(values.iter().map(|value| OsString::from(format!("--{flag}={value}"))));
        found.push((flag, origin));
    }
    origins.by_flag.extend(found);
    Ok(())
}

/// Whether a higher layer gave the flag or its opposite.
fn is_settled(flag: &str, origins: &Origins) -> bool {
    let opposite = OPPOSITES.iter().find_map(|&(yes, no)| match flag {
        _ if flag == yes => Some(no),
        _ if flag == no => Some(yes),
        _ => None,
    });
    origins.given(flag) || opposite.is_some_and(|opposite| origins.given(opposite))
}

fn config_path(given: &ArgMatches, environment: &Environment) -> Option<PathBuf> {
    let flag = given.get_one::<PathBuf>("config").cloned();
    flag.or_else(|| environment.get(&variable("config")).map(PathBuf::from))
}

/// Variables that are nobody's flag are noted: a misspelt one would otherwise be a setting that silently is not set.
fn note_unknown(command: &Command, environment: &Environment, notes: &mut Vec<String>) {
    let known: Vec<String> = known_flags(command).iter().map(|flag| variable(flag)).collect();
    for name in environment.keys().filter(|name| name.starts_with(PREFIX)) {
        let service_link = name.contains("_SERVICE_") || name.contains("_PORT_");
        if !known.contains(name) && !OTHER_VARIABLES.contains(&name.as_str()) && !service_link {
            notes.push(format!("unknown variable {name}{}", file::nearest(name, &known)));
        }
    }
}

fn known_flags(command: &Command) -> Vec<String> {
    let mut flags: Vec<String> =
        command.get_subcommands().flat_map(flags_of).filter_map(Arg::get_long).map(str::to_owned).collect();
    flags.sort_unstable();
    flags.dedup();
    flags
}

fn flags_of(subcommand: &Command) -> impl Iterator<Item = &Arg> {
    subcommand.get_arguments().filter(|arg| !matches!(arg.get_long(), None | Some("help" | "version")))
}

fn is_given(matches: &ArgMatches, arg: &Arg) -> bool {
    matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
}

fn variable(flag: &str) -> String {
    format!("{PREFIX}{}", flag.replace('-', "_").to_uppercase())
}

fn stop(error: &clap::Error, origins: &Origins) -> Stop {
    use clap::error::ErrorKind::{
        DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion, MissingSubcommand,
    };
    match error.kind() {
        DisplayHelp | DisplayVersion => Stop::Shown(Box::new(error.render())),
        DisplayHelpOnMissingArgumentOrSubcommand | MissingSubcommand => Stop::Refused(ConfigError::new(
            Origin::CommandLine,
            format!("a command is missing ({COMMANDS}); see --help"),
        )),
        _ => {
            let origin = match flag_of(error) {
                Some(flag) if origins.given(&flag) => origins.of(&flag),
                Some(flag) => Origin::Flag(flag),
                None => Origin::CommandLine,
            };
            Stop::Refused(ConfigError::new(origin, one_line(error)))
        }
    }
}
