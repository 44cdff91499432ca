//! Every bound that the HTTP side puts on what a client may send, hold open or leave unread.
//!
//! They stand in one file so that an operator can read them at once. Nothing here is a secret or a tuning knob:
//! each bound is far above honest use and far below what would hurt the other clients of the process.

use std::time::Duration;

use crate::text;

/// Largest request body, in bytes.
pub const MAX_BODY_BYTES: usize = 2 * 1024 * 1024;
/// Largest memory of all request bodies together that the engine has not taken yet, in bytes.
pub const MAX_BODY_MEMORY_BYTES: usize = 256 * 1024 * 1024;
/// How much of a body is read and thrown away once its answer is known, so that the client gets to read that.
pub const MAX_DISCARDED_BYTES: usize = 64 * 1024 * 1024;
/// How long that may take beside the answer.
pub const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);
/// The same beside the 503 of a full server.
pub const OVERLOAD_DISCARD_TIMEOUT: Duration = Duration::from_secs(2);
/// Deepest nesting of arrays and objects in a request body.
pub const MAX_JSON_DEPTH: usize = 64;
/// Largest number of header lines in one request.
pub const MAX_HEADERS: usize = 64;
/// Largest request line and header block together, in bytes.
pub const MAX_HEADER_BYTES: usize = 32 * 1024;
/// Longest `x-request-id` that is taken over.
pub const MAX_REQUEST_ID_BYTES: usize = 128;

/// Largest number of chat messages in one request.
pub const MAX_MESSAGES: usize = 1024;
/// Largest number of prompts in one completion request.
pub const MAX_PROMPTS: usize = 128;
/// Largest number of stop strings.
pub const MAX_STOP_STRINGS: usize = text::MAX_STOPS;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = text::MAX_STOP_BYTES;
/// Largest number of `logit_bias` entries, and of `stop_token_ids`.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Largest number of choices for one prompt.
pub const MAX_CHOICES: i64 = 8;
/// Largest number of alternatives per token with log-probabilities.
pub const MAX_LOGPROBS: i64 = 20;
/// Longest `cache_salt`, in bytes.
pub const MAX_CACHE_SALT_BYTES: usize = 1024;
/// Largest integer that every JSON reader keeps exactly (2^53).
pub const MAX_EXACT_INTEGER: i64 = 1 << 53;

/// Largest number of connections on the API's port that take requests. The metrics port has its own.
pub const MAX_CONNECTIONS: usize = 4096;
/// Connections on the API's port beyond those: each gets one answer, a probe's or a 503, and is closed. When these are
/// taken too, the next wait in the kernel until one is free.
pub const SPARE_CONNECTIONS: usize = 64;
/// File descriptors that connections to the API leave for the metrics port, the listeners and the model's files.
pub const RESERVED_FILES: usize = 128;

/// [`MAX_CONNECTIONS`], or fewer where the process may have `max_open_files` open and no more.
pub fn max_connections(max_open_files: Option<usize>) -> usize {
    let files = max_open_files.unwrap_or(usize::MAX).saturating_sub(SPARE_CONNECTIONS + RESERVED_FILES);
    files.clamp(1, MAX_CONNECTIONS)
}

/// Unread output of one stream above which it pauses, in bytes.
pub const MAX_UNREAD_BYTES: usize = 64 * 1024;
/// A connection is cut when output waits and its client has, in this long, neither read [`MIN_READ_BYTES`] nor all of it.
pub const WRITE_STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Progress that keeps a slow reader's connection, in bytes.
pub const MIN_READ_BYTES: u64 = 4 * 1024;
/// From the first byte of a request to the end of its headers.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// From the end of the headers to the end of the body.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection without a request on it is closed after this long.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A stream on which nothing was sent for this long gets an SSE comment; also the longest wait for the first
/// event before the response header is sent.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// Largest number of tokens that /detokenize takes and that /tokenize spells out one by one.
pub const MAX_LISTED_TOKENS: usize = 1 << 17;
/// A request's texts are encoded on a helper thread when they are longer than this together, so that probes keep
/// answering.
pub const INLINE_TEXT_BYTES: usize = 8 * 1024;
/// A request's body is parsed on a helper thread when it is longer than this.
pub const INLINE_JSON_BYTES: usize = 32 * 1024;
/// An answer is written on a helper thread when it lists more tokens than this, alternatives included.
pub const INLINE_LISTED_TOKENS: usize = 4096;
/// Pieces of work on helper threads at once.
pub const MAX_LONG_WORK: usize = 2;
/// The step loop counts as dead when it has not ticked for this long.
pub const LIVENESS_TIMEOUT: Duration = Duration::from_secs(120);
/// `Retry-After` of an overloaded server, in seconds.
pub const RETRY_AFTER_OVERLOAD_S: u32 = 1;
/// `Retry-After` of a server that is loading, draining or failed, in seconds.
pub const RETRY_AFTER_NOT_READY_S: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_the_rest() {
        assert_eq!(max_connections(None), MAX_CONNECTIONS);
        assert_eq!(max_connections(Some(1 << 20)), MAX_CONNECTIONS);
        assert_eq!(max_connections(Some(1024)), 1024 - 64 - 128);
        assert_eq!(max_connections(Some(10)), 1);
    }
}
