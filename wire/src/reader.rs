//! The receiving half of a link.

use std::fmt;
use std::io::{self, Read};
use std::net::TcpStream;
use std::ops::Range;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;

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
    spin: Duration,
    failed: bool,
}

impl LinkReader {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let buffer = vec![0; BUFFER].into_boxed_slice();
        Self {
            stream,
            buffer,
            unread: 0..0,
            assembler: Assembler::default(),
            armed: None,
            spin: Duration::ZERO,
            failed: false,
        }
    }

    /// How long [`recv`](Self::recv) asks the socket again and again, from its start and from each arrival of
    /// bytes, before it sleeps. Zero at first. To wake a sleeping thread takes 10 to 100 µs, the more the
    /// deeper its CPU sleeps and on virtual machines; spinning avoids that and is worth a CPU only to a
    /// reader whose peer is about to send.
    pub fn set_spin(&mut self, spin: Duration) {
        self.spin = spin;
    }

    /// Messages with a payload of more than `limit` bytes are refused from the next frame on; at first and at most,
    /// [`MAX_MESSAGE`](crate::MAX_MESSAGE).
    pub fn set_limit(&mut self, limit: usize) {
        self.assembler.set_limit(limit);
    }

    /// The next message, or `None` when it is not whole within `timeout`. What has arrived of it is kept: the
    /// next call goes on there. A message that came together with an earlier one costs no system call.
    ///
    /// A timeout of zero takes what is there and does not wait. Any other is at least a tick of the kernel's
    /// clock (1 to 10 ms) and at most a day.
    ///
    /// # Errors
    /// [`WireError::Closed`] at the end of the connection, in order or not, and after any other error, each
    /// of which means that the peer broke the protocol: the caller should then drop or close the link.
    pub fn recv(&mut self, timeout: Duration) -> Result<Option<Message>, WireError> {
        if self.failed {
            return Err(WireError::Closed);
        }
        let received = self.receive(timeout);
        self.failed = received.is_err();
        received
    }

    /// The bare stream, for a protocol other than messages; `None` when bytes were read that belong to no message
    /// taken so far.
    pub fn into_stream(self) -> Option<TcpStream> {
        (self.unread.is_empty() && self.assembler.is_empty()).then_some(self.stream)
    }

    fn receive(&mut self, timeout: Duration) -> Result<Option<Message>, WireError> {
        if let Some(message) = self.take_unread()? {
            return Ok(Some(message));
        }
        let deadline = Deadline::after(timeout);
        let mut spinning_ends = Deadline::after(self.spin);
        let mut remaining = deadline.remaining();
        loop {
            let read = match remaining.filter(|_| spinning_ends.remaining().is_none()) {
                Some(wait) => self.read_within(wait),
                None => self.read_at_once(),
            };
            match read {
                Ok(0) => return Err(WireError::Closed),
                Ok(read) => {
                    self.unread = 0..read;
                    if let Some(message) = self.take_unread()? {
                        return Ok(Some(message));
                    }
                    spinning_ends = Deadline::after(self.spin);
                }
                Err(error) if is_timeout(&error) => std::hint::spin_loop(),
                Err(error) => return Err(WireError::io(error)),
            }
            remaining = deadline.remaining();
            if remaining.is_none() {
                return Ok(None);
            }
        }
    }

    fn read_within(&mut self, wait: Duration) -> io::Result<usize> {
        let wait = socket_timeout(wait);
        if self.armed != Some(wait) {
            self.stream.set_read_timeout(Some(wait))?;
            self.armed = Some(wait);
        }
        self.stream.read(&mut self.buffer)
    }

    fn read_at_once(&mut self) -> io::Result<usize> {
        let (_, read) = rustix::net::recv(&self.stream, &mut self.buffer[..], RecvFlags::DONTWAIT)?;
        Ok(read)
    }

    /// A message that the bytes read so far make whole. Without one, all of them are taken.
    fn take_unread(&mut self) -> Result<Option<Message>, WireError> {
        let mut bytes = &self.buffer[self.unread.clone()];
        let message = self.assembler.take(&mut bytes);
        self.unread.start = self.unread.end - bytes.len();
        message
    }
}

/// Waits until one of the readers has bytes or has ended, at most `timeout`. Whole messages that a reader holds already do not
/// count: ask each with a timeout of zero first.
pub fn wait_any<'a>(readers: impl IntoIterator<Item = &'a LinkReader>, timeout: Duration) {
    let mut wanted: Vec<PollFd<'_>> =
        readers.into_iter().map(|reader| PollFd::new(&reader.stream, PollFlags::IN)).collect();
    let timeout = Timespec::try_from(timeout).ok();
    // Every outcome, an interruption too, is found out by asking the readers.
    let _ = rustix::event::poll(&mut wanted, timeout.as_ref());
}

impl fmt::Debug for LinkReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkReader").field("stream", &self.stream).finish_non_exhaustive()
    }
}
