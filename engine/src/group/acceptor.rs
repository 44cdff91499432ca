//! Takes connections from other processes of the group: each is authenticated on a thread of its own before anything
//! else of it is read.
//!
//! The thread that accepts ends when its [`Acceptor`] is dropped: the drop raises a flag and connects once, which ends the wait.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tandem_wire::{GroupKey, HANDSHAKE_TIMEOUT, Link, Purpose};

/// Connections that may be authenticated at once; more are closed unread.
const MAX_HANDSHAKES: usize = 64;
/// Pause after the system refused a connection, for example for want of descriptors.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

/// A listener with the thread that serves it.
#[derive(Debug)]
pub(crate) struct Acceptor {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
}

/// What becomes of a connection.
pub(crate) enum Arrival {
    /// Authenticated, with where it comes from.
    Link { link: Link, host: String },
    /// Turned away, and why.
    Rejected { host: String, reason: String },
}

impl Acceptor {
    /// Accepts connections of one purpose for ever; `take` is called on the connection's own thread and may keep it.
    pub(crate) fn start(
        listener: TcpListener,
        key: Option<GroupKey>,
        purpose: Purpose,
        take: impl Fn(Arrival) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let shared = Arc::new((key, take));
        let handshakes = Arc::new(AtomicUsize::new(0));
        thread::Builder::new().name("tandem-accept".into()).spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let Ok((stream, from)) = listener.accept() else {
                    thread::sleep(AFTER_FAILURE);
                    continue;
                };
                if stopped.load(Ordering::SeqCst) || handshakes.load(Ordering::SeqCst) >= MAX_HANDSHAKES {
                    continue;
                }
                handshakes.fetch_add(1, Ordering::SeqCst);
                let (shared, left) = (Arc::clone(&shared), Arc::clone(&handshakes));
                let spawned = thread::Builder::new().name("tandem-link".into()).spawn(move || {
                    let (key, take) = &*shared;
                    let host = from.ip().to_canonical().to_string();
                    let result = tandem_wire::accept(stream, key.as_ref(), Some(purpose), HANDSHAKE_TIMEOUT);
                    left.fetch_sub(1, Ordering::SeqCst);
                    take(match result {
                        Ok((link, _)) => Arrival::Link { link, host },
                        Err(error) => Arrival::Rejected { host, reason: error.to_string() },
                    });
                });
                if spawned.is_err() {
                    // The closure, and the connection in it, are gone.
                    handshakes.fetch_sub(1, Ordering::SeqCst);
                    tracing::warn!("no thread for a connection of the group");
                }
            }
        })?;
        Ok(Self { address, stop })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        // Fails only if the listener is gone already.
        let _ = TcpStream::connect_timeout(&address, AFTER_FAILURE);
    }
}
