//! A connection whose other end is known.

use std::net::{SocketAddr, TcpStream};

use crate::error::WireError;
use crate::reader::LinkReader;
use crate::writer::LinkWriter;

/// An authenticated connection, made by [`dial`](crate::dial) or [`accept`](crate::accept). Dropping it
/// closes it.
#[derive(Debug)]
pub struct Link {
    stream: TcpStream,
    local: SocketAddr,
    peer: SocketAddr,
}

impl Link {
    pub(crate) fn new(stream: TcpStream, local: SocketAddr, peer: SocketAddr) -> Self {
        Self { stream, local, peer }
    }

    /// The two directions, each for a thread of its own. The connection ends when both are dropped, or when
    /// either side closes it ([`LinkWriter::close`]).
    ///
    /// # Errors
    /// [`WireError::Io`] when the process has no file descriptor left.
    pub fn split(self) -> Result<(LinkReader, LinkWriter), WireError> {
        let writing = self.stream.try_clone().map_err(WireError::Io)?;
        Ok((LinkReader::new(self.stream), LinkWriter::new(writing)))
    }

    /// The bare stream, for a protocol other than messages: no delay of small writes, no timeouts, nothing
    /// read ahead.
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// This side's address.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The other side's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer
    }
}
