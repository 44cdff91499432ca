//! One TCP connection: HTTP/1.1 by hyper, under our own time-outs.
//!
//! hyper has one time-out for a whole header and none for a client that stops reading. Here the socket is wrapped so
//! that every read and write leaves a mark, and a coarse timer compares the marks with the limits:
//!
//! ```text
//! idle ── first byte ──▶ header ── request complete ──▶ busy ── answer gone ──▶ idle
//!   60 s, closed          10 s, 408                      30 s without reading enough of what waits, cut
//! ```
//!
//! "Enough" is a few kilobytes, or all that waits: a client that takes a byte now and then holds its request, its KV and
//! its buffers as one that takes none does. What counts is what the kernel takes over from us. It does so in strides of
//! a part of its own buffer, so a client far slower than [`limits::MIN_READ_BYTES`] in that time cannot be told from
//! one that has stopped.
//!
//! Cutting a connection drops its handler or response body, which cancels the request in the engine. hyper does the
//! same when it sees that the client has closed.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::limits;
use super::serve::stopped;
use super::state::Timeouts;

/// How a connection is used.
#[derive(Clone)]
pub(super) struct Terms {
    pub(super) router: Router,
    pub(super) timeouts: Timeouts,
    /// Whether a connection may carry more than one request.
    pub(super) keep_alive: bool,
}

/// Serves requests on `stream` until either side has enough. When `stop` turns true the request in flight, if any, is
/// finished and the connection closed.
pub(super) async fn serve(
    stream: TcpStream,
    terms: Terms,
    mut stop: watch::Receiver<bool>,
) -> Result<(), hyper::Error> {
    let Terms { router, timeouts, keep_alive } = terms;
    // Tokens are small and must not wait for more.
    let _ = stream.set_nodelay(true);
    // What the kernel buffers is unread output too; its default grows to megabytes.
    let _ = socket2::SockRef::from(&stream).set_send_buffer_size(limits::MAX_UNREAD_BYTES);

    let marks = Arc::new(Marks::new());
    let io = TokioIo::new(MarkedStream { stream, marks: marks.clone() });
    let router = TowerToHyperService::new(router);
    let service_marks = marks.clone();
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        let busy = Busy::new(service_marks.clone());
        request.extensions_mut().insert(busy);
        router.call(request)
    });
    let mut builder = http1::Builder::new();
    builder
        .keep_alive(keep_alive)
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(limits::MAX_UNREAD_BYTES);
    let mut connection = builder.serve_connection(io, service);

    let mut check = tokio::time::interval(timeouts.check_interval());
    // After a pause of the whole machine one check is enough.
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopping = false;
    loop {
        tokio::select! {
            biased;
            result = Pin::new(&mut connection) => return result,
            () = stopped(&mut stop), if !stopping => {
                stopping = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
            _ = check.tick() => match marks.overdue(&timeouts) {
                None => {}
                Some(Overdue::Header) => {
                    say_timeout(&connection.into_parts().io.into_inner().stream);
                    return Ok(());
                }
                Some(Overdue::Idle | Overdue::Reader) => return Ok(()),
            },
        }
    }
}

/// hyper has nothing to answer yet, so the 408 is written by hand; a client that cannot take it does not get it.
fn say_timeout(stream: &TcpStream) {
    let body = r#"{"error":{"message":"the request headers did not arrive in time","type":"RequestTimeoutError","param":null,"code":408}}"#;
    let head = "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close";
    let _ = stream.try_write(format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes());
}

const IDLE: u8 = 0;
const HEADER: u8 = 1;
const BUSY: u8 = 2;

/// What a connection is doing, and since when.
struct Marks {
    start: Instant,
    phase: AtomicU8,
    /// Milliseconds from `start` to the beginning of the phase.
    since_ms: AtomicU64,
    /// Milliseconds from `start` to the first write that found no room, or to the last progress since, plus one; 0 while
    /// nothing waits.
    stalled_ms: AtomicU64,
    /// Bytes written since then.
    progress: AtomicU64,
}

#[derive(Debug, PartialEq)]
enum Overdue {
    Header,
    Idle,
    Reader,
}

impl Marks {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            phase: AtomicU8::new(IDLE),
            since_ms: AtomicU64::new(0),
            stalled_ms: AtomicU64::new(0),
            progress: AtomicU64::new(0),
        }
    }

    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    fn enter(&self, phase: u8) {
        // One thread drives a connection: nobody sees the two stores apart.
        self.since_ms.store(self.now_ms(), Ordering::Relaxed);
        self.phase.store(phase, Ordering::Relaxed);
    }

    fn has_read(&self) {
        if self.phase.load(Ordering::Relaxed) == IDLE {
            self.enter(HEADER);
        }
    }

    fn has_written(&self, polled: &Poll<io::Result<usize>>) {
        let waits = self.stalled_ms.load(Ordering::Relaxed) > 0;
        match polled {
            Poll::Pending if !waits => self.restart_stall(),
            Poll::Ready(Ok(written)) if waits => {
                let progress = self.progress.load(Ordering::Relaxed) + *written as u64;
                self.progress.store(progress, Ordering::Relaxed);
                if progress >= limits::MIN_READ_BYTES {
                    self.restart_stall();
                }
            }
            _ => {}
        }
    }

    fn restart_stall(&self) {
        self.stalled_ms.store(self.now_ms() + 1, Ordering::Relaxed);
        self.progress.store(0, Ordering::Relaxed);
    }

    /// hyper flushes the socket when it has written all it had.
    fn has_flushed(&self) {
        self.stalled_ms.store(0, Ordering::Relaxed);
    }

    fn overdue(&self, timeouts: &Timeouts) -> Option<Overdue> {
        let elapsed = |since_ms: u64| Duration::from_millis(self.now_ms().saturating_sub(since_ms));
        let stalled_ms = self.stalled_ms.load(Ordering::Relaxed);
        if stalled_ms > 0 && elapsed(stalled_ms - 1) > timeouts.write_stall {
            return Some(Overdue::Reader);
        }
        let in_phase = elapsed(self.since_ms.load(Ordering::Relaxed));
        match self.phase.load(Ordering::Relaxed) {
            HEADER if in_phase > timeouts.header => Some(Overdue::Header),
            IDLE if in_phase > timeouts.idle => Some(Overdue::Idle),
            _ => None,
        }
    }
}

impl Timeouts {
    /// Often enough to be a small part of the shortest limit, seldom enough to cost nothing.
    fn check_interval(&self) -> Duration {
        let shortest = self.header.min(self.idle).min(self.write_stall);
        (shortest / 8).clamp(Duration::from_millis(10), Duration::from_secs(1))
    }
}

/// Held from the end of a request's headers to the end of its answer.
#[derive(Clone)]
pub(super) struct Busy {
    _mark: Arc<BusyMark>,
}

struct BusyMark(Arc<Marks>);

impl Busy {
    fn new(marks: Arc<Marks>) -> Self {
        marks.enter(BUSY);
        Self { _mark: Arc::new(BusyMark(marks)) }
    }
}

impl Drop for BusyMark {
    fn drop(&mut self) {
        self.0.enter(IDLE);
    }
}

/// A socket that leaves marks.
struct MarkedStream {
    stream: TcpStream,
    marks: Arc<Marks>,
}

impl AsyncRead for MarkedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.marks.has_read();
        }
        polled
    }
}

impl AsyncWrite for MarkedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.marks.has_written(&polled);
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.marks.has_written(&polled);
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.marks.has_flushed();
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_own_limit() {
        let timeouts = Timeouts {
            header: Duration::ZERO,
            idle: Duration::from_secs(60),
            write_stall: Duration::from_secs(60),
            ..Timeouts::default()
        };
        let marks = Arc::new(Marks::new());
        let wait = || std::thread::sleep(Duration::from_millis(3));
        wait();
        assert_eq!(marks.overdue(&timeouts), None);
        marks.has_read();
        wait();
        assert_eq!(marks.overdue(&timeouts), Some(Overdue::Header));
        let busy = Busy::new(marks.clone());
        wait();
        assert_eq!(marks.overdue(&timeouts), None, "a request may take its time");
        marks.has_written(&Poll::Pending);
        wait();
        let impatient = Timeouts { write_stall: Duration::ZERO, ..timeouts };
        assert_eq!(marks.overdue(&impatient), Some(Overdue::Reader));
        marks.has_flushed();
        assert_eq!(marks.overdue(&impatient), None);
        drop(busy);
        wait();
        assert_eq!(marks.overdue(&Timeouts { idle: Duration::ZERO, ..timeouts }), Some(Overdue::Idle));
    }

    #[test]
    fn a_reader_must_take_kilobytes_or_everything() {
        let timeouts = Timeouts { write_stall: Duration::from_millis(20), ..Timeouts::default() };
        let marks = Marks::new();
        let wait = || std::thread::sleep(Duration::from_millis(25));
        let write = |bytes| marks.has_written(&Poll::Ready(Ok(bytes)));

        write(1);
        wait();
        assert_eq!(marks.overdue(&timeouts), None, "nothing waited");
        marks.has_written(&Poll::Pending);
        wait();
        // A few bytes, more to come.
        write(100);
        marks.has_written(&Poll::Pending);
        assert_eq!(marks.overdue(&timeouts), Some(Overdue::Reader));
        // The rest of the kilobytes: the time starts anew.
        write(limits::MIN_READ_BYTES as usize - 100);
        assert_eq!(marks.overdue(&timeouts), None);
        wait();
        assert_eq!(marks.overdue(&timeouts), Some(Overdue::Reader), "and the count with it");
        write(10);
        marks.has_flushed();
        assert_eq!(marks.overdue(&timeouts), None, "all was taken");
    }
}
