//! Takes connections from other processes of the group: each is authenticated on a thread of its own before anything
//! else of it is read.
//!
//! The thread that accepts ends when its [`Acceptor`] is dropped: the drop raises a flag and connects once, which ends the wait.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tandem_wire::{GroupKey, HANDSHAKE_TIMEOUT, Link, Purpose};

/// Connections that may be authenticated at once, in all and of one address; more are closed unread. An address is a pod: it has
/// as many ranks as accelerators, and calls again after a pause. Whoever holds the places of one address does not hold those of others.
const MAX_HANDSHAKES: usize = 256;
const MAX_HANDSHAKES_OF_ADDRESS: usize = 32;
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
        let handshakes = Handshakes::default();
        thread::Builder::new().name("tandem-accept".into()).spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let Ok((stream, from)) = listener.accept() else {
                    thread::sleep(AFTER_FAILURE);
                    continue;
                };
                if stopped.load(Ordering::SeqCst) {
                    continue;
                }
                let address = from.ip().to_canonical();
                let Some(place) = handshakes.begin(network_of(address)) else { continue };
                let shared = Arc::clone(&shared);
                let spawned = thread::Builder::new().name("tandem-link".into()).spawn(move || {
                    let (key, take) = &*shared;
                    let host = address.to_string();
                    let result = tandem_wire::accept(stream, key.as_ref(), Some(purpose), HANDSHAKE_TIMEOUT);
                    take(match result {
                        Ok((link, _)) => Arrival::Link { link, host },
                        Err(error) => Arrival::Rejected { host, reason: error.to_string() },
                    });
                    // Only now: what nobody has taken yet counts, too.
                    drop(place);
                });
                if spawned.is_err() {
                    // The closure is gone, with the connection and its place.
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

/// How many connections of each address are authenticated at the moment.
#[derive(Clone, Default)]
struct Handshakes(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of them, until it is dropped.
struct Handshake {
    all: Handshakes,
    address: IpAddr,
}

impl Handshakes {
    /// `None` if there are as many as may be.
    fn begin(&self, address: IpAddr) -> Option<Handshake> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.values().sum::<usize>() >= MAX_HANDSHAKES {
            return None;
        }
        let count = counts.entry(address).or_default();
        if *count >= MAX_HANDSHAKES_OF_ADDRESS {
            return None;
        }
        *count += 1;
        Some(Handshake { all: self.clone(), address })
    }
}

/// Whoever has one address of IPv6 has those of its network.
fn network_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut counts = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_hold_the_places_of_others() {
        let handshakes = Handshakes::default();
        let address = |last| IpAddr::from([10, 0, 0, last]);
        let mut held: Vec<Handshake> = std::iter::from_fn(|| handshakes.begin(address(1))).collect();
        assert_eq!(held.len(), MAX_HANDSHAKES_OF_ADDRESS);
        assert!(handshakes.begin(address(2)).is_some());
        held.pop();
        assert!(handshakes.begin(address(1)).is_some(), "its place is free again");
        held.extend((2..).flat_map(|last| handshakes.begin(address(last))).take(MAX_HANDSHAKES - held.len()));
        assert!(handshakes.begin(address(0)).is_none(), "there are as many as may be");
        let [a, b] = ["2001:db8::1", "2001:db8::ffff:1"].map(|text| network_of(text.parse().unwrap()));
        assert_eq!(a, b);
        drop(held);
        assert!(handshakes.0.lock().unwrap().is_empty());
    }
}
