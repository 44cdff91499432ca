//! Messages between the processes of one model instance: authenticated, bounded, never waiting
//! without a deadline.
//!
//! A connection is an ordinary [`TcpStream`](std::net::TcpStream) that its owner has dialled or accepted.
//! [`dial`] and [`accept`] make a [`Link`] of it: before that, nothing of the peer is looked at but one hello
//! and one proof of fixed size. A link is split into a [`LinkReader`] and a [`LinkWriter`], which carry
//! [`Message`]s; [`codec`] writes and reads what a payload holds.
//!
//! Invariants:
//! * Every wait ends at a deadline that the caller gave, also against a peer that sends a byte at a time.
//! * Memory grows only with bytes that have arrived, up to [`MAX_MESSAGE`]; no input makes the crate panic.
//! * A reader or writer that has failed stays failed: after a cut frame nothing is read or written.
//!
//! What it does not give: the handshake says who is at the other end when the connection begins. After it,
//! bytes are neither encrypted nor authenticated one by one, so somebody who can change packets between two
//! pods can change messages. What messages mean, who connects to whom, and when to try again is left to the
//! crates above.

mod deadline;
mod error;
mod frame;
mod handshake;
mod key;
mod link;
mod message;
mod reader;
mod writer;

pub mod codec;

pub use codec::DecodeError;
pub use error::WireError;
pub use frame::{MAX_FRAME, MAX_MESSAGE};
pub use handshake::{HANDSHAKE_TIMEOUT, PROTOCOL_VERSION, Purpose, accept, dial};
pub use key::GroupKey;
pub use link::Link;
pub use message::{Incarnation, Message};
pub use reader::{LinkReader, wait_any};
pub use writer::{LinkWriter, WRITE_TIMEOUT};
