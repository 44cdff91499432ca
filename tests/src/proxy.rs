//! A bad network between two processes: connections through it stall, fall silent on one side, and break.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

/// What the network does to everything that goes through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Weather {
    Fine,
    /// Nothing arrives; what was sent comes when the weather is fine again, as after a partition.
    Partition,
    /// What is said to the calling side does not arrive; what it says does.
    Deaf,
    /// What the calling side says does not arrive; what is said to it does.
    Mute,
    /// Everything arrives a fifth of a second late.
    Slow,
    /// Connections end for the accepting side, and the calling side is not told.
    HalfOpen,
    /// Connections end for both sides.
    Cut,
}

/// A port that leads to another one.
pub struct Proxy {
    pub port: u16,
    weather: Arc<AtomicU8>,
}

impl Proxy {
    /// Leads to `target` on this machine, in fine weather.
    pub fn start(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
        let port = listener.local_addr().expect("it listens").port();
        let weather = Arc::new(AtomicU8::new(Weather::Fine as u8));
        let shared = Arc::clone(&weather);
        thread::spawn(move || {
            for caller in listener.incoming().flatten() {
                let Ok(callee) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                let copies = || Some((caller.try_clone().ok()?, callee.try_clone().ok()?));
                let Some((caller2, callee2)) = copies() else { continue };
                let (there, back) = (Arc::clone(&shared), Arc::clone(&shared));
                thread::spawn(move || carry(&caller, &callee, &there, true));
                thread::spawn(move || carry(&callee2, &caller2, &back, false));
            }
        });
        Self { port, weather }
    }

    pub fn set(&self, weather: Weather) {
        self.weather.store(weather as u8, Ordering::SeqCst);
    }
}

/// Carries bytes one way until the connection ends.
fn carry(mut from: &TcpStream, mut to: &TcpStream, weather: &AtomicU8, from_caller: bool) {
    let is = |what: Weather| weather.load(Ordering::SeqCst) == what as u8;
    from.set_read_timeout(Some(Duration::from_millis(10))).expect("a timeout can be set");
    let mut buffer = vec![0; 64 * 1024];
    loop {
        if is(Weather::Cut) {
            let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            return;
        }
        if is(Weather::HalfOpen) {
            let accepting = if from_caller { to } else { from };
            let _ = accepting.shutdown(Shutdown::Both);
            if from_caller {
                // The calling side's connection stays, with nobody behind it.
                thread::sleep(Duration::from_secs(30));
            }
            return;
        }
        if is(Weather::Partition) || is(Weather::Mute) && from_caller || is(Weather::Deaf) && !from_caller {
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => {
                let _ = to.shutdown(Shutdown::Both);
                return;
            }
            Ok(read) => {
                if is(Weather::Slow) {
                    thread::sleep(Duration::from_millis(200));
                }
                if to.write_all(&buffer[..read]).is_err() {
                    return;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}
