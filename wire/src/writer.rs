//! The sending half of a link.

use std::io::{IoSlice, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::deadline::{Deadline, socket_timeout};
use crate::error::{WireError, is_timeout};
use crate::frame::{MAX_MESSAGE, frames};
use crate::message::Incarnation;

/// How long a frame may wait for the peer to take it, unless [`LinkWriter::set_write_timeout`] says
/// otherwise.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(1);

/// Sends messages over a link. Clones send over the same link; messages never mix.
#[derive(Debug)]
pub struct LinkWriter {
    stream: TcpStream,
    timeout: Duration,
    /// Held while a message is written: the write timeout the socket has, so that it is set only when it
    /// changes.
    armed: Arc<Mutex<Option<Duration>>>,
}

impl LinkWriter {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, timeout: WRITE_TIMEOUT, armed: Arc::default() }
    }

    /// Hands a message to the socket: one system call for a small one, one per frame of at most
    /// [`MAX_FRAME`](crate::MAX_FRAME) for a long one.
    ///
    /// After an error other than [`WireError::MessageTooLarge`] the connection is shut down in both
    /// directions, as a message may have been cut.
    ///
    /// # Errors
    /// [`WireError::MessageTooLarge`] past [`MAX_MESSAGE`]; [`WireError::Stalled`] when the peer left no room
    /// for a frame within the write timeout; [`WireError::Closed`] when the connection has ended.
    pub fn send(
        &mut self,
        epoch: u64,
        sender: Incarnation,
        kind: u8,
        payload: &[u8],
    ) -> Result<(), WireError> {
        if payload.len() > MAX_MESSAGE {
            return Err(WireError::MessageTooLarge { len: payload.len(), limit: MAX_MESSAGE });
        }
        let mut armed = self.armed.lock().expect("nothing panics while a message is written");
        for (header, part) in frames(epoch, sender, kind, payload) {
            let written = write_all(&self.stream, &mut armed, self.timeout, [&header, part]);
            if let Err(error) = written {
                // What follows a cut frame would not be understood: from here on the socket refuses to send.
                self.close();
                return Err(error);
            }
        }
        Ok(())
    }

    /// How long each frame of this writer's messages may wait for the peer to take it: the whole wait of a
    /// message that fits a frame. At least the kernel's clock tick, at most a day.
    pub fn set_write_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Ends the connection in both directions, for all readers and writers of it on both sides. Calls that
    /// wait on it return at once. What was sent before still arrives, unless the peer is sending too: that
    /// resets the connection.
    pub fn close(&self) {
        // The only failure is that the connection is down already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Another writer for the same link, for another thread. A send waits while another one's message is
    /// being written.
    ///
    /// # Errors
    /// [`WireError::Io`] when the process has no file descriptor left.
    pub fn try_clone(&self) -> Result<Self, WireError> {
        let stream = self.stream.try_clone().map_err(WireError::Io)?;
        Ok(Self { stream, timeout: self.timeout, armed: Arc::clone(&self.armed) })
    }
}

/// Writes `parts` one after the other, within `timeout` for all of them.
fn write_all(
    mut stream: &TcpStream,
    armed: &mut Option<Duration>,
    timeout: Duration,
    parts: [&[u8]; 2],
) -> Result<(), WireError> {
    let deadline = Deadline::after(timeout);
    let mut remaining = timeout;
    let mut slices = &mut parts.map(IoSlice::new)[..];
    loop {
        let wait = socket_timeout(remaining);
        if *armed != Some(wait) {
            stream.set_write_timeout(Some(wait)).map_err(WireError::io)?;
            *armed = Some(wait);
        }
        match stream.write_vectored(slices) {
            Ok(0) => return Err(WireError::Closed),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(WireError::io(error)),
        }
        if slices.is_empty() {
            return Ok(());
        }
        remaining = deadline.remaining().ok_or(WireError::Stalled)?;
    }
}
