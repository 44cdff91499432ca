//! Looks for pods that have not called: whether their names resolve, and whether anybody listens there.
//!
//! A rank that cannot be found can say nothing itself, so the leader goes and looks, on a thread of its own: names and connections
//! may take seconds. The thread ends when the [`Scout`] is dropped, after the look that it is having.

use std::io::ErrorKind;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Pause between two looks at everybody who is missing.
const PAUSE: Duration = Duration::from_secs(2);
/// How long a pod may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(1);

/// What is known of pods that have not called.
#[derive(Debug)]
pub(crate) struct Scout {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// By ordinal.
    missing: Vec<bool>,
    findings: Vec<Option<String>>,
    is_over: bool,
}

impl Scout {
    /// Looks for `peers` by name, at the port of their first rank. Without peers it has nothing to do.
    pub(crate) fn start(peers: Vec<String>, port: u16) -> std::io::Result<Self> {
        let missing = vec![false; peers.len()];
        let findings = vec![None; peers.len()];
        let shared = Arc::new(Mutex::new(Shared { missing, findings, is_over: false }));
        if !peers.is_empty() {
            let looks = Arc::clone(&shared);
            thread::Builder::new().name("tandem-scout".into()).spawn(move || {
                while !lock(&looks).is_over {
                    for (ordinal, peer) in peers.iter().enumerate() {
                        let is_missing = lock(&looks).missing[ordinal];
                        // Without the lock: this takes its time.
                        let finding = is_missing.then(|| look(peer, port));
                        lock(&looks).findings[ordinal] = finding;
                    }
                    thread::sleep(PAUSE);
                }
            })?;
        }
        Ok(Self { shared })
    }

    /// Says who is missing, by ordinal; pods beyond the known ones are nobody's.
    pub(crate) fn miss(&self, is_missing: impl Fn(usize) -> bool) {
        let mut shared = lock(&self.shared);
        shared.missing.iter_mut().enumerate().for_each(|(ordinal, missing)| *missing = is_missing(ordinal));
    }

    /// What was found of a pod that is missing.
    pub(crate) fn finding(&self, ordinal: usize) -> Option<String> {
        let shared = lock(&self.shared);
        shared.missing.get(ordinal).filter(|missing| **missing)?;
        shared.findings[ordinal].clone()
    }
}

impl Drop for Scout {
    fn drop(&mut self) {
        lock(&self.shared).is_over = true;
    }
}

fn look(peer: &str, port: u16) -> String {
    let addresses = match (peer, port).to_socket_addrs() {
        Ok(addresses) => addresses,
        Err(_) => return format!("{peer} does not resolve: is there such a pod, and the headless Service?"),
    };
    let mut last = format!("{peer} has no address");
    for address in addresses {
        last = match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(_) => {
                return format!(
                    "{peer} is {}, where a rank listens: it will say itself why it does not join",
                    address.ip()
                );
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                format!("{peer} is {}, where nothing listens on port {port} yet", address.ip())
            }
            Err(error) => format!("{peer} is {}, which cannot be reached: {error}", address.ip()),
        };
    }
    last
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // Nothing panics while it holds the lock.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn names_ports_and_listeners_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(look("localhost", port).contains("a rank listens"));
        drop(listener);
        assert!(look("127.0.0.1", port).contains("nothing listens on port"));
        assert!(look("no-such-pod.invalid", port).contains("does not resolve"));
    }

    #[test]
    fn only_those_who_are_missing_are_looked_for() {
        let scout = Scout::start(vec!["127.0.0.1".into(), "no-such-pod.invalid".into()], 1).unwrap();
        scout.miss(|ordinal| ordinal == 1);
        let start = std::time::Instant::now();
        while scout.finding(1).is_none() {
            assert!(start.elapsed() < Duration::from_secs(30), "it looks every two seconds");
            thread::sleep(Duration::from_millis(20));
        }
        assert!(scout.finding(1).unwrap().contains("does not resolve"));
        assert_eq!((scout.finding(0), scout.finding(2)), (None, None));
    }
}
