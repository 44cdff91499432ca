//! Why a model was refused. Each message is one line that names the file, the field or tensor, and the reason.
//!
//! Names and values in the messages come from hostile files: they pass through [`printable`], which escapes control
//! characters and cuts long text, so that a file cannot forge or flood a log.

use std::path::Path;

/// Everything that can go wrong while a model's files are read.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused to open, read or map a file.
    #[error("{file}: {source}")]
    Io {
        /// The file or folder, as shown to the user.
        file: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A value of the configuration or metadata is missing, of the wrong type, or out of range.
    #[error("{file}: {field}: {reason}")]
    Field {
        /// The file that holds the field.
        file: String,
        /// The field's name in that file.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A well-formed value that asks for something this crate does not compute.
    #[error("{file}: {field} {value} is not supported")]
    Unsupported {
        /// The file that holds the field.
        file: String,
        /// The field's name in that file.
        field: String,
        /// The value that was found.
        value: String,
    },
    /// The file's structure is broken, or it is not a file of this kind.
    #[error("{file}: {reason}")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is broken, missing, unexpected, or of the wrong shape or type.
    #[error("{file}: tensor {tensor}: {reason}")]
    Tensor {
        /// The file, or the folder when shards are meant together.
        file: String,
        /// The tensor's name in that file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { file: printable(&path.to_string_lossy()), source }
    }

    pub(crate) fn field(file: &str, field: &str, reason: impl Into<String>) -> Self {
        Self::Field { file: file.to_owned(), field: printable(field), reason: reason.into() }
    }

    pub(crate) fn unsupported(file: &str, field: &str, value: &str) -> Self {
        Self::Unsupported { file: file.to_owned(), field: printable(field), value: printable(value) }
    }

    pub(crate) fn malformed(file: &str, reason: impl Into<String>) -> Self {
        Self::Malformed { file: file.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tensor(file: &str, tensor: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { file: file.to_owned(), tensor: printable(tensor), reason: reason.into() }
    }
}

/// The longest piece of a file's text that a message repeats, in characters.
const PRINTABLE_CHARS: usize = 160;

/// Text from a file, made fit for one line of a message.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::new();
    for (num_chars, c) in text.chars().enumerate() {
        if num_chars == PRINTABLE_CHARS {
            out.push('…');
            break;
        }
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// A path as messages show it.
pub(crate) fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_stays_on_one_short_line() {
        assert_eq!(printable("a\nb\u{7}"), "a\\nb\\u{7}");
        assert_eq!(printable("naïve 日本"), "naïve 日本");
        let long = printable(&"x".repeat(100_000));
        assert_eq!(long.chars().count(), PRINTABLE_CHARS + 1);
    }

    #[test]
    fn messages_name_file_field_and_reason() {
        let error = ModelError::field("config.json", "hidden_size", "must not be zero");
        assert_eq!(error.to_string(), "config.json: hidden_size: must not be zero");
        let error = ModelError::unsupported("config.json", "model_type", "mamba");
        assert_eq!(error.to_string(), "config.json: model_type mamba is not supported");
    }
}
