//! What can go wrong between a client's request and the executor, by who has to act on it.
//!
//! [`SubmitError`] is for the caller of `submit`, [`RequestFailure`] ends a stream, [`ExecutorError`] and
//! [`RowError`] come up from the executor. Messages never hold prompts, tokens or paths.

use std::time::Duration;

use thiserror::Error;

/// A parameter that no engine of this configuration could honour; the field is for the client to correct.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{param}: {message}")]
pub struct InvalidParam {
    /// The field's name as the client wrote it, for example `max_tokens`.
    pub param: &'static str,
    /// Short, lowercase, without the field's name in front.
    pub message: String,
}

impl InvalidParam {
    pub(crate) fn new(param: &'static str, message: impl Into<String>) -> Self {
        Self { param, message: message.into() }
    }
}

/// Why a request was not taken. Nothing of it is counted or kept.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// It could never run.
    #[error(transparent)]
    Invalid(#[from] InvalidParam),
    /// As many requests wait or are in flight as may, or as many bytes.
    #[error("the queue is full")]
    QueueFull,
    /// The executor's group of ranks is not whole, or a rank is about to leave it.
    #[error("the worker waits for its group of ranks")]
    NotReady,
    /// The worker is shutting down and takes nothing new.
    #[error("the worker is draining")]
    Draining,
    /// The step thread has ended.
    #[error("the engine has stopped")]
    Stopped,
}

/// How an accepted request failed; the last event of its stream.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct RequestFailure {
    pub kind: FailureKind,
    /// For the client: no internals.
    pub message: String,
}

/// Whose matter a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureKind {
    /// Something is wrong with this worker or its model: the same request would fail again.
    Internal,
    /// Of the moment: the same request may succeed elsewhere or later.
    Unavailable,
}

impl RequestFailure {
    pub(crate) fn stopped() -> Self {
        Self::unavailable("the engine has stopped")
    }

    pub(crate) fn panicked() -> Self {
        Self { kind: FailureKind::Internal, message: "internal engine failure".into() }
    }

    pub(crate) fn step_failed() -> Self {
        Self::unavailable("the step could not be executed")
    }

    pub(crate) fn not_recovered(timeout: Duration) -> Self {
        Self::unavailable(format!(
            "the group of ranks was not whole again within {} s",
            timeout.as_secs_f64()
        ))
    }

    pub(crate) fn drained_without_group() -> Self {
        Self::unavailable("the worker is shutting down and its group of ranks is not whole")
    }

    fn unavailable(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Unavailable, message: message.into() }
    }
}

impl From<RowError> for RequestFailure {
    fn from(error: RowError) -> Self {
        Self { kind: FailureKind::Internal, message: error.to_string() }
    }
}

/// A whole step that could not be run.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct ExecutorError {
    /// For the log.
    pub message: String,
    pub kind: ExecutorErrorKind,
}

impl ExecutorError {
    pub(crate) fn fatal(message: impl Into<String>) -> Self {
        Self { message: message.into(), kind: ExecutorErrorKind::Fatal }
    }
}

/// How far a failed step reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecutorErrorKind {
    /// Every request of the step fails, to be tried again; the others go on.
    Step,
    /// The group of ranks broke, and all KV is gone. No request fails: what was not computed to its end is
    /// computed again once the executor is ready.
    GroupLost,
    /// No later step can succeed either: every request fails, to be tried elsewhere, and the engine stops.
    Fatal,
}

/// A logits row from which nothing can be drawn. Only its own request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RowError {
    #[error("the model produced values that are not finite")]
    NotFinite,
    #[error("no token is allowed at this position")]
    AllMasked,
    /// The executor answered with a token id outside of the vocabulary.
    #[error("the sampled token is outside of the vocabulary")]
    OutsideVocabulary,
}
