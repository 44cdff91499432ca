//! Why a link could not be made, or ended.

use std::io;
use std::net::SocketAddr;

use crate::codec::DecodeError;
use crate::handshake::Purpose;

/// Everything that can go wrong with a key, a handshake or a link.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A group key that is no use as one.
    #[error("group key: {reason}")]
    Key {
        /// What is wrong with it.
        reason: String,
    },
    /// A file that should hold the group key.
    #[error("group key file {file}: {reason}")]
    KeyFile {
        /// The file, as shown to the user.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Neither side has a key, and the connection leaves the machine.
    #[error("no group key, and {local} to {peer} leaves this machine: give all processes the same key")]
    KeyRequired {
        /// This side's address.
        local: SocketAddr,
        /// The peer's address.
        peer: SocketAddr,
    },
    /// The peer has a group key and this process has none.
    #[error("the peer has a group key and this process has none: give both the same key")]
    LocalKeyMissing,
    /// This process has a group key and the peer has none.
    #[error("this process has a group key and the peer has none: give both the same key")]
    PeerKeyMissing,
    /// The peer's group key is another one; also what the side that dialled sees when its own proof was
    /// refused.
    #[error("the peer's group key is another one: give both the same key")]
    WrongKey,
    /// The two sides speak different versions of this protocol.
    #[error("protocol version {local} here, {peer} at the peer: run the same release on both")]
    Version {
        /// This side's version.
        local: u16,
        /// The peer's version.
        peer: u16,
    },
    /// The two sides want this connection for different things.
    #[error("the connection is for {local} here, for {peer} at the peer: check the ports")]
    Purpose {
        /// What this side wants.
        local: Purpose,
        /// What the peer wants.
        peer: Purpose,
    },
    /// The peer's first bytes are no hello of this protocol.
    #[error("not a hello of this protocol: {reason}")]
    Hello {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The handshake was not over at its deadline.
    #[error("the peer did not finish the handshake in time")]
    HandshakeTimeout,
    /// The connection has ended, whether in order, by a reset, or by an earlier error of this reader or
    /// writer.
    #[error("the connection is closed")]
    Closed,
    /// The peer did not take a frame within the write timeout.
    #[error("the peer does not take data in time")]
    Stalled,
    /// A message longer than [`MAX_MESSAGE`](crate::MAX_MESSAGE), to be sent or arriving, or than the reader wants any to be.
    #[error("a message of at least {len} bytes, the limit is {limit}")]
    MessageTooLarge {
        /// Bytes of payload known so far.
        len: usize,
        /// The most that there may be.
        limit: usize,
    },
    /// A frame whose length is impossible or past [`MAX_FRAME`](crate::MAX_FRAME).
    #[error("a frame with length {len} is malformed")]
    FrameLength {
        /// The length field as it came.
        len: u32,
    },
    /// A frame that breaks the protocol in another way.
    #[error("malformed frame: {reason}")]
    Frame {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A payload that is not what its kind of message should hold.
    #[error("malformed payload: {0}")]
    Decode(#[from] DecodeError),
    /// The operating system refused an operation on the socket.
    #[error("socket: {0}")]
    Io(io::Error),
}

impl WireError {
    /// An error of a socket, with the many ways to learn of its end made one.
    pub(crate) fn io(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, WriteZero};
        match error.kind() {
            BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | WriteZero => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// Whether a read or write ended because its timeout passed or a signal came, so that the caller's deadline
/// decides.
pub(crate) fn is_timeout(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}
