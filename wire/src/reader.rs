//! The receiving half of a link.

use std::fmt;
use std::io::Read;
use std::net::TcpStream;
use std::ops::Range;
use std::time::Duration;

use crate::deadline::{Deadline, socket_timeout};
use crate::error::{WireError, is_timeout};
use crate::frame::Assembler;
use crate::message::Message;

/// Bytes asked of the socket at once. Small messages come many to a read, a long one takes a read per 64 KiB.
const BUFFER: usize = 64 * 1024;

/// Receives messages from a link.
pub struct LinkReader {
    stream: TcpStream,
    buffer: Box<[u8]>,
    /// Bytes of `buffer` that have been read and belong to messages not asked for yet.
    unread: Range<usize>,
    assembler: Assembler,
    /// The read timeout the socket has, so that it is set only when it changes.
    armed: Option<Duration>,
    failed: bool,
}

impl LinkReader {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let buffer = vec![0; BUFFER].into_boxed_slice();
        Self { stream, buffer, unread: 0..0, assembler: Assembler::default(), armed: None, failed: false }
    }

    /// The next message, or `None` when it is not whole within `timeout`. What has arrived of it is kept: the next call
    /// goes on there. A message that came together with an earlier one costs no system call.
    ///
    /// The wait is at least a tick of the kernel's clock (1 to 4 ms), also for a timeout of zero, and at most a day.
    ///
    /// # Errors
    /// [`WireError::Closed`] at the end of the connection, in order or not, and after any other error, each of which
    /// means that the peer broke the protocol: the caller should then drop or close the link.
    pub fn recv(&mut self, timeout: Duration) -> Result<Option<Message>, WireError> {
        if self.failed {
            return Err(WireError::Closed);
        }
        let received = self.receive(timeout);
        self.failed = received.is_err();
        received
    }

    fn receive(&mut self, timeout: Duration) -> Result<Option<Message>, WireError> {
        if let Some(message) = self.take_unread()? {
            return Ok(Some(message));
        }
        let deadline = Deadline::after(timeout);
        let mut wait = socket_timeout(timeout);
        loop {
            if self.armed != Some(wait) {
                self.stream.set_read_timeout(Some(wait)).map_err(WireError::io)?;
                self.armed = Some(wait);
            }
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(WireError::Closed),
                Ok(read) => self.unread = 0..read,
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(WireError::io(error)),
            }
            if let Some(message) = self.take_unread()? {
                return Ok(Some(message));
            }
            let Some(remaining) = deadline.remaining() else { return Ok(None) };
            wait = remaining;
        }
    }

    /// A message that the bytes read so far make whole. Without one, all of them are taken.
    fn take_unread(&mut self) -> Result<Option<Message>, WireError> {
        let mut bytes = &self.buffer[self.unread.clone()];
        let message = self.assembler.take(&mut bytes);
        self.unread.start = self.unread.end - bytes.len();
        message
    }
}

impl fmt::Debug for LinkReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkReader").field("stream", &self.stream).finish_non_exhaustive()
    }
}
