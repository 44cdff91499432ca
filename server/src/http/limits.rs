//! Every bound that the HTTP side puts on what a client may send, hold open or leave unread.
//!
//! They stand in one file so that an operator can read them at once. Nothing here is a secret or a tuning knob:
//! each bound is far above honest use and far below what would hurt the other clients of the process.

use std::time::Duration;

/// Largest request body, in bytes.
pub const MAX_BODY_BYTES: usize = 2 * 1024 * 1024;
/// How much of an over-long body is read and thrown away, so that the client gets to read its 413.
pub const MAX_DISCARDED_BYTES: usize = 8 * 1024 * 1024;
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
/// Largest number of stop strings, and the longest one in bytes.
pub const MAX_STOP_STRINGS: usize = 4;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 64;
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

/// Unread output of one stream above which it pauses, in bytes.
pub const MAX_UNREAD_BYTES: usize = 64 * 1024;
/// A connection whose client has read nothing for this long while output waits is cut.
pub const WRITE_STALL_TIMEOUT: Duration = Duration::from_secs(30);
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
/// Text longer than this is encoded on a helper thread, so that probes keep answering.
pub const INLINE_TEXT_BYTES: usize = 8 * 1024;
/// The step loop counts as dead when it has not ticked for this long.
pub const LIVENESS_TIMEOUT: Duration = Duration::from_secs(120);
/// `Retry-After` of an overloaded server, in seconds.
pub const RETRY_AFTER_OVERLOAD_S: u32 = 1;
/// `Retry-After` of a server that is loading, draining or failed, in seconds.
pub const RETRY_AFTER_NOT_READY_S: u32 = 5;
