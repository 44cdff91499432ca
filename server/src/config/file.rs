//! The configuration file: a flat YAML map whose keys are flag names.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::error::{ConfigError, Origin};

/// The largest file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Flags that take any text, so that YAML must not read it as a number first (`007`, `1.10`).
const TEXT_FLAGS: [&str; 2] = ["api-key", "served-model-name"];

/// One entry of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// As written.
    pub(super) key: String,
    /// As a flag is named.
    pub(super) flag: String,
    /// One value, or several for a list.
    pub(super) values: Vec<String>,
}

/// Reads a file whose keys must be among `known` (flag names, without dashes).
pub(super) fn read(path: &Path, known: &[String]) -> Result<Vec<Entry>, ConfigError> {
    let fail = |message: String| ConfigError::new(Origin::WholeFile(path.to_path_buf()), message);
    let mut text = String::new();
    let file = File::open(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
    file.take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|e| fail(format!("cannot be read: {e}")))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(fail("is larger than 1 MiB".to_owned()));
    }
    parse(&text, path, known)
}

fn parse(text: &str, path: &Path, known: &[String]) -> Result<Vec<Entry>, ConfigError> {
    let whole = |message: String| ConfigError::new(Origin::WholeFile(path.to_path_buf()), message);
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Vec::new());
    }
    let map: Map<String, Value> = serde_saphyr::from_str(text)
        .map_err(|e| whole(format!("is not a YAML map of flags: {}", first_line(&e.to_string()))))?;
    let mut entries: Vec<Entry> = Vec::new();
    for (key, value) in map {
        let here = |message: String| {
            ConfigError::new(Origin::File { path: path.to_path_buf(), key: key.clone() }, message)
        };
        let flag = key.replace('_', "-");
        if !known.contains(&flag) {
            return Err(here(format!("unknown key{}", nearest(&flag, known))));
        }
        if entries.iter().any(|entry| entry.flag == flag) {
            return Err(here("is given twice".to_owned()));
        }
        let numbers =
            value.is_number() || value.as_array().is_some_and(|items| items.iter().any(Value::is_number));
        if numbers && TEXT_FLAGS.contains(&flag.as_str()) {
            return Err(here("must be text; put it in quotes".to_owned()));
        }
        let values = match value {
            Value::Null => continue,
            Value::Array(items) => items.iter().map(scalar).collect::<Option<Vec<_>>>(),
            value => scalar(&value).map(|value| vec![value]),
        };
        let values = values.ok_or_else(|| here("must be a value or a list of values".to_owned()))?;
        entries.push(Entry { key, flag, values });
    }
    Ok(entries)
}

/// ` (did you mean …?)` for the most similar name, if one is similar.
pub(super) fn nearest(name: &str, known: &[String]) -> String {
    let similar = known.iter().map(|other| (strsim::jaro_winkler(name, other), other));
    match similar.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((score, other)) if score > 0.7 => format!(" (did you mean {other}?)"),
        _ => String::new(),
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

fn first_line(text: &str) -> &str {
    text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("syntax error")
}
