//! What can go wrong with text, and whose fault it is.

use std::borrow::Cow;
use std::path::PathBuf;

use thiserror::Error;

/// An error of the text layer. The message may be shown to a client where [`TextError::is_client_error`] holds.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TextError {
    /// The text is longer than this layer accepts.
    #[error("text is longer than {limit} bytes")]
    TooLong {
        /// The most bytes accepted.
        limit: usize,
    },
    /// `raise_exception` was called, or the template cannot be applied to these messages.
    #[error("the chat template refused these messages: {0}")]
    Template(String),
    /// Rendering took too long by the clock. What it may do is bounded otherwise: it is the machine that is busy.
    #[error("the chat template was not done in {limit_ms} ms: the server is busy, try again")]
    TemplateTime {
        /// How long it may take.
        limit_ms: u64,
    },
    /// Rendering went past a limit of work or output.
    #[error("the chat template went past its limit of {0}")]
    TemplateLimit(Cow<'static, str>),
    /// The process that renders templates cannot be used.
    #[error("chat templates cannot be rendered: {0}")]
    Sandbox(String),
    /// The messages are not of a form that a chat template takes.
    #[error("{0}")]
    InvalidMessages(String),
    /// A stop string is empty, too long, or one too many.
    #[error("{0}")]
    Stop(String),
    /// The tokenizer failed on this text.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// The template does not parse (start-up).
    #[error("chat template: {0}")]
    TemplateSyntax(String),
    /// The model's tokenizer is of a kind that is not supported (start-up).
    #[error("tokenizer: {0}")]
    Unsupported(String),
    /// The model's tokenizer is malformed (start-up).
    #[error("tokenizer: {0}")]
    Malformed(String),
    /// A tokenizer file cannot be read (start-up).
    #[error("{}: {reason}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl TextError {
    /// Whether the request caused it (HTTP 400); otherwise the model's files did, or the moment.
    pub fn is_client_error(&self) -> bool {
        match self {
            TextError::TooLong { .. }
            | TextError::Template(_)
            | TextError::TemplateLimit(_)
            | TextError::InvalidMessages(_)
            | TextError::Stop(_)
            | TextError::Encode(_) => true,
            TextError::TemplateTime { .. }
            | TextError::Sandbox(_)
            | TextError::TemplateSyntax(_)
            | TextError::Unsupported(_)
            | TextError::Malformed(_)
            | TextError::File { .. } => false,
        }
    }
}
