//! Collectives over TCP, for ranks on CPUs.
//!
//! Every pair of ranks has a connection. A collective writes to and reads from all of them at once without ever blocking on
//! one, so no sizes can deadlock. Each transfer begins with a header of 16 bytes, its number and its length: ranks that do not
//! do the same are found out. While it waits, a rank spins on its sockets for some microseconds if it has a core to itself,
//! then sleeps in `poll`.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{CommError, Communicator};

/// How long a rank with a core to itself looks at its sockets before it sleeps: a small sum between two ranks of one machine
/// takes less.
const SPIN: Duration = Duration::from_micros(50);
const HEADER: usize = 16;

/// How a communicator waits.
#[derive(Clone, Copy, Debug)]
pub struct TcpOptions {
    /// How long one collective may take.
    pub timeout: Duration,
    /// Whether this rank has a core to itself.
    pub spin: bool,
}

/// One rank's connections to all others.
pub struct TcpCommunicator {
    rank: usize,
    /// By rank; `None` is this one.
    peers: Vec<Option<TcpStream>>,
    transfers: Vec<Transfer>,
    options: TcpOptions,
    /// Number of the next collective.
    sequence: u64,
    aborted: AbortHandle,
    failure: Option<CommError>,
}

/// Gives a group up from another thread. Clones are the same.
#[derive(Clone, Debug)]
pub struct AbortHandle {
    shared: Arc<Aborted>,
}

#[derive(Debug)]
struct Aborted {
    flag: AtomicBool,
    streams: Vec<TcpStream>,
}

impl AbortHandle {
    /// Makes the collective that runs, and every later one, end with [`CommError::Aborted`].
    pub fn abort(&self) {
        self.shared.flag.store(true, Ordering::SeqCst);
        for stream in &self.shared.streams {
            // Wakes whoever waits in `poll`; fails only if the connection is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn is_aborted(&self) -> bool {
        self.shared.flag.load(Ordering::SeqCst)
    }
}

/// What is left to do with one peer in one collective.
#[derive(Clone, Copy, Default)]
struct Transfer {
    /// Bytes written and read, headers included.
    written: usize,
    read: usize,
    /// What the other side announced.
    header: [u8; HEADER],
    done: bool,
}

impl TcpCommunicator {
    /// `peers` are authenticated connections by rank, `None` for this one.
    ///
    /// # Errors
    /// [`CommError::Setup`] if a connection cannot be set up.
    ///
    /// # Panics
    /// If a connection is missing or one too many.
    pub fn new(rank: usize, peers: Vec<Option<TcpStream>>, options: TcpOptions) -> Result<Self, CommError> {
        for (peer, stream) in peers.iter().enumerate() {
            assert_eq!(stream.is_none(), peer == rank, "connection to rank {peer} of rank {rank}");
        }
        let set_up = |stream: &TcpStream| -> io::Result<TcpStream> {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            stream.try_clone()
        };
        let streams = peers.iter().flatten().map(set_up).collect::<Result<_, _>>();
        let streams = streams.map_err(|error| CommError::Setup(error.to_string()))?;
        let transfers = vec![Transfer::default(); peers.len()];
        let aborted = AbortHandle { shared: Arc::new(Aborted { flag: AtomicBool::new(false), streams }) };
        Ok(Self { rank, peers, transfers, options, sequence: 0, aborted, failure: None })
    }

    /// For the thread that may have to give the group up.
    pub fn abort_handle(&self) -> AbortHandle {
        self.aborted.clone()
    }

    fn run(&mut self, outgoing: &[&[f32]], incoming: &mut [&mut [f32]]) -> Result<(), CommError> {
        let sequence = self.sequence;
        self.sequence += 1;
        self.transfers.fill(Transfer::default());
        let start = Instant::now();
        loop {
            let (mut open, mut progress) = (0, false);
            for peer in 0..self.peers.len() {
                let Some(stream) = &self.peers[peer] else { continue };
                let transfer = &mut self.transfers[peer];
                if transfer.done {
                    continue;
                }
                let sent = bytes_of(outgoing[peer]);
                let result = transfer.advance(stream, sequence, sent, bytes_of_mut(incoming[peer]));
                match result {
                    Ok(moved) => progress |= moved,
                    Err(_) if self.aborted.is_aborted() => return Err(CommError::Aborted),
                    Err(failure) => return Err(failure.of_rank(peer, sequence)),
                }
                open += usize::from(!transfer.done);
            }
            if open == 0 {
                return Ok(());
            }
            if progress {
                continue;
            }
            if self.aborted.is_aborted() {
                return Err(CommError::Aborted);
            }
            let waited = start.elapsed();
            if waited >= self.options.timeout {
                let rank = self.first_open().expect("something is open");
                return Err(CommError::Timeout { rank, seconds: self.options.timeout.as_secs() });
            }
            if self.options.spin && waited < SPIN {
                std::hint::spin_loop();
            } else {
                self.sleep(outgoing, self.options.timeout - waited);
            }
        }
    }

    fn first_open(&self) -> Option<usize> {
        (0..self.peers.len()).find(|&peer| self.peers[peer].is_some() && !self.transfers[peer].done)
    }

    /// Waits until a socket has something for this rank, or room for what it has; wakes at the latest after a while to look at
    /// the clock.
    fn sleep(&self, outgoing: &[&[f32]], at_most: Duration) {
        const LOOK_UP: Duration = Duration::from_millis(100);
        let wanted = |(peer, stream): (usize, &Option<TcpStream>)| {
            let transfer = &self.transfers[peer];
            let stream = stream.as_ref().filter(|_| !transfer.done)?;
            let has_more = transfer.written < HEADER + size_of_val(outgoing[peer]);
            let events = libc::POLLIN | if has_more { libc::POLLOUT } else { 0 };
            Some(libc::pollfd { fd: stream.as_raw_fd(), events, revents: 0 })
        };
        let mut wanted: Vec<libc::pollfd> = self.peers.iter().enumerate().filter_map(wanted).collect();
        // Rounded up, so that a short rest is not spun away.
        let timeout_ms = at_most.min(LOOK_UP).as_millis() as i32 + 1;
        // SAFETY: the pointer and the length describe the vector, which lives until the call returns; the descriptors are open,
        // their streams are borrowed. Every outcome, an interruption too, is found out by trying the sockets.
        unsafe { libc::poll(wanted.as_mut_ptr(), wanted.len() as libc::nfds_t, timeout_ms) };
    }
}

impl Communicator for TcpCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.peers.len()
    }

    fn exchange(&mut self, outgoing: &[&[f32]], incoming: &mut [&mut [f32]]) -> Result<(), CommError> {
        assert_eq!((outgoing.len(), incoming.len()), (self.size(), self.size()), "one entry for each rank");
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let result = self.run(outgoing, incoming);
        if let Err(error) = &result {
            // The others must not wait for what will never come.
            self.aborted.abort();
            self.failure = Some(error.clone());
        }
        result
    }
}

/// What went wrong with a peer that is not named yet.
enum Failure {
    Lost(String),
    Diverged { theirs: u64, our_bytes: u64, their_bytes: u64 },
}

impl Failure {
    fn of_rank(self, rank: usize, ours: u64) -> CommError {
        match self {
            Self::Lost(reason) => CommError::PeerLost { rank, reason },
            Self::Diverged { theirs, our_bytes, their_bytes } => {
                CommError::Diverged { rank, ours, theirs, our_bytes, their_bytes }
            }
        }
    }
}

impl Transfer {
    /// Writes and reads what goes at once; whether anything did.
    fn advance(
        &mut self,
        mut stream: &TcpStream,
        sequence: u64,
        outgoing: &[u8],
        incoming: &mut [u8],
    ) -> Result<bool, Failure> {
        let mut moved = false;
        let (to_write, to_read) = (HEADER + outgoing.len(), HEADER + incoming.len());
        if self.written < to_write {
            let header = header(sequence, outgoing.len());
            let (head, body) = rest_of(&header, outgoing, self.written);
            let result = match head.is_empty() {
                true => stream.write(body),
                false => stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]),
            };
            if let Some(written) = would_block(result)? {
                self.written += written;
                moved = true;
            }
        }
        if self.read < to_read {
            let expected = incoming.len();
            let had_header = self.read >= HEADER;
            let result = if had_header {
                stream.read(&mut incoming[self.read - HEADER..])
            } else {
                let head = &mut self.header[self.read..];
                stream.read_vectored(&mut [IoSliceMut::new(head), IoSliceMut::new(incoming)])
            };
            if let Some(read) = would_block(result)? {
                if read == 0 {
                    return Err(Failure::Lost("it was closed".into()));
                }
                self.read += read;
                moved = true;
                if !had_header && self.read >= HEADER {
                    check_header(&self.header, sequence, expected)?;
                }
            }
        }
        self.done = self.written == to_write && self.read == to_read;
        Ok(moved)
    }
}

fn header(sequence: u64, bytes: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&sequence.to_le_bytes());
    header[8..].copy_from_slice(&(bytes as u64).to_le_bytes());
    header
}

fn check_header(found: &[u8; HEADER], sequence: u64, bytes: usize) -> Result<(), Failure> {
    if *found == header(sequence, bytes) {
        return Ok(());
    }
    let number = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("eight bytes"));
    Err(Failure::Diverged { theirs: number(0), our_bytes: bytes as u64, their_bytes: number(8) })
}

/// What of header and body is left after `done` bytes.
fn rest_of<'a>(header: &'a [u8], body: &'a [u8], done: usize) -> (&'a [u8], &'a [u8]) {
    (&header[done.min(HEADER)..], &body[done.saturating_sub(HEADER)..])
}

/// `None` if the socket has nothing, or no room, right now.
fn would_block(result: io::Result<usize>) -> Result<Option<usize>, Failure> {
    match result {
        Ok(moved) => Ok(Some(moved)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(Failure::Lost(error.to_string())),
    }
}

fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: every f32 is four initialised bytes, bytes have no alignment, and the borrow is the same.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_of_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as above; any four bytes are an f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
