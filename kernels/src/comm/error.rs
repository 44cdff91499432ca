//! Why a collective did not happen.

/// The other ranks of a message are named by their number in the group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommError {
    /// Somebody gave the group up from another thread.
    #[error("the collective was given up")]
    Aborted,
    #[error("the connection to rank {rank} is lost: {reason}")]
    PeerLost { rank: usize, reason: String },
    #[error("rank {rank} did not answer within {seconds} s")]
    Timeout { rank: usize, seconds: u64 },
    /// The ranks do not compute the same.
    #[error(
        "rank {rank} is at collective {theirs} with {their_bytes} bytes, this one at {ours} with {our_bytes}"
    )]
    Diverged { rank: usize, ours: u64, theirs: u64, our_bytes: u64, their_bytes: u64 },
    #[error("connections of the group cannot be used: {0}")]
    Setup(String),
}
