//! Connections between the ranks of an epoch: every rank calls those below it and is called by those above.
//!
//! A call names its epoch, its rank and, as every message does, its incarnation, and is answered by a rank that is in the same
//! epoch and expects just this process. So a rank of an older epoch, or an older life of a rank, never becomes part of a group.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tandem_wire::codec::{Decoder, Encoder};
use tandem_wire::{GroupKey, HANDSHAKE_TIMEOUT, Incarnation, Link, LinkReader, LinkWriter, Message, Purpose};

use super::acceptor::{Acceptor, Arrival};
use super::message::MemberAddress;

/// How long the ranks may take to find each other; shorter than the leader's patience, so that it hears who is missing.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(2);
/// Pause between attempts.
const RETRY: Duration = Duration::from_millis(50);
/// How often a wait looks whether the epoch was given up.
const LOOK_UP: Duration = Duration::from_millis(50);
/// Calls of epochs to come that are kept.
const MAX_CALLS: usize = 1024;

const HELLO: u8 = 1;
const WELCOME: u8 = 2;

/// A rank's listener for its peers, and the calls that wait to be taken.
pub(crate) struct Mesh {
    rank: usize,
    incarnation: Incarnation,
    key: Option<GroupKey>,
    calls: Arc<Calls>,
    acceptor: Acceptor,
}

#[derive(Default)]
struct Calls {
    waiting: Mutex<HashMap<(u64, u32), Call>>,
    changed: Condvar,
}

struct Call {
    sender: Incarnation,
    reader: LinkReader,
    writer: LinkWriter,
}

impl Mesh {
    pub(crate) fn start(
        rank: usize,
        incarnation: Incarnation,
        listener: TcpListener,
        key: Option<GroupKey>,
    ) -> std::io::Result<Self> {
        let calls = Arc::new(Calls::default());
        let taken = Arc::clone(&calls);
        let take = move |arrival| match arrival {
            Arrival::Link { link, host } => {
                if let Err(reason) = taken.take(link) {
                    tracing::warn!(host, reason, "a rank's call is not understood");
                }
            }
            Arrival::Rejected { host, reason } => {
                // Anyone can trigger this at will, so it is no warning; failures between ranks are the leader's to report.
                tracing::debug!(host, reason, "a connection to a rank was rejected");
            }
        };
        let acceptor = Acceptor::start(listener, key.clone(), Purpose::Collective, take)?;
        Ok(Self { rank, incarnation, key, calls, acceptor })
    }

    /// Which life of this rank it connects.
    pub(crate) fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The port that it listens on.
    pub(crate) fn port(&self) -> u16 {
        self.acceptor.address().port()
    }

    /// Connects to all other members of an epoch; by rank, `None` for this one. Gives up when `is_over` says so.
    pub(crate) fn connect(
        &self,
        epoch: u64,
        members: &[MemberAddress],
        is_over: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<TcpStream>>, String> {
        let end = Instant::now() + TIMEOUT;
        let others = members.iter().enumerate().map(|(peer, member)| {
            let stream = match peer.cmp(&self.rank) {
                std::cmp::Ordering::Equal => return Ok(None),
                std::cmp::Ordering::Less => self.call(epoch, member, end, is_over),
                std::cmp::Ordering::Greater => self.answer(epoch, peer as u32, member, end, is_over),
            };
            stream.map(Some).map_err(|reason| format!("rank {peer} at {}: {reason}", member.address))
        });
        let streams = others.collect();
        self.calls.forget_until(epoch);
        streams
    }

    /// Calls a rank until it answers.
    fn call(
        &self,
        epoch: u64,
        member: &MemberAddress,
        end: Instant,
        is_over: &dyn Fn() -> bool,
    ) -> Result<TcpStream, String> {
        loop {
            let reason = match self.try_call(epoch, member, end, is_over) {
                Ok(stream) => return Ok(stream),
                Err(reason) => reason,
            };
            if is_over() {
                return Err("given up".into());
            }
            if Instant::now() + RETRY >= end {
                return Err(reason);
            }
            thread::sleep(RETRY);
        }
    }

    fn try_call(
        &self,
        epoch: u64,
        member: &MemberAddress,
        end: Instant,
        is_over: &dyn Fn() -> bool,
    ) -> Result<TcpStream, String> {
        let say = |error: &dyn std::fmt::Display| error.to_string();
        let addresses = member.address.to_socket_addrs().map_err(|error| say(&error))?;
        let mut last = "its address is empty".to_owned();
        let connected = addresses.into_iter().find_map(|address| {
            TcpStream::connect_timeout(&address, CONNECT).map_err(|error| last = say(&error)).ok()
        });
        let stream = connected.ok_or(last)?;
        let link = tandem_wire::dial(stream, self.key.as_ref(), Purpose::Collective, HANDSHAKE_TIMEOUT);
        let (mut reader, mut writer) = link.and_then(Link::split).map_err(|error| say(&error))?;
        let mut hello = Encoder::new();
        hello.u32(self.rank as u32);
        writer.send(epoch, self.incarnation, HELLO, hello.as_bytes()).map_err(|error| say(&error))?;
        loop {
            match reader.recv(LOOK_UP).map_err(|error| say(&error))? {
                None if is_over() || Instant::now() >= end => return Err("it does not answer".into()),
                None => {}
                Some(welcome) => {
                    let expected = (WELCOME, epoch, member.incarnation);
                    if (welcome.kind, welcome.epoch, welcome.sender) != expected {
                        return Err("another process, or one of another epoch, answers there".into());
                    }
                    return reader.into_stream().ok_or_else(|| "it says more than it should".into());
                }
            }
        }
    }

    /// Takes the call of a rank.
    fn answer(
        &self,
        epoch: u64,
        peer: u32,
        member: &MemberAddress,
        end: Instant,
        is_over: &dyn Fn() -> bool,
    ) -> Result<TcpStream, String> {
        let mut waiting = self.calls.lock();
        loop {
            if let Some(Call { sender, reader, mut writer }) = waiting.remove(&(epoch, peer)) {
                drop(waiting);
                let is_expected = sender == member.incarnation;
                if is_expected && writer.send(epoch, self.incarnation, WELCOME, &[]).is_ok() {
                    return reader.into_stream().ok_or_else(|| "it says more than it should".into());
                }
                // Another life of the rank, or one that has gone again: the right one may still call.
                waiting = self.calls.lock();
                continue;
            }
            if is_over() {
                return Err("given up".into());
            }
            if Instant::now() >= end {
                return Err("it has not called".into());
            }
            let waited = self.calls.changed.wait_timeout(waiting, LOOK_UP);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, HashMap<(u64, u32), Call>> {
        // Nothing panics while it holds the lock.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears who calls, and keeps the call until it is answered.
    fn take(&self, link: Link) -> Result<(), String> {
        let (mut reader, writer) = link.split().map_err(|error| error.to_string())?;
        let hello = reader.recv(HANDSHAKE_TIMEOUT).map_err(|error| error.to_string())?;
        let hello = hello.ok_or("it says nothing")?;
        let rank = caller(&hello)?;
        let mut waiting = self.lock();
        if waiting.len() < MAX_CALLS {
            waiting.insert((hello.epoch, rank), Call { sender: hello.sender, reader, writer });
            self.changed.notify_all();
        }
        Ok(())
    }

    /// Calls of this epoch and older ones are of no use any more.
    fn forget_until(&self, epoch: u64) {
        self.lock().retain(|(of, _), _| *of > epoch);
    }
}

fn caller(hello: &Message) -> Result<u32, String> {
    if hello.kind != HELLO {
        return Err("it does not say who it is".into());
    }
    let mut input = Decoder::new(&hello.payload);
    let rank = input.u32().map_err(|error| error.to_string())?;
    input.finish().map_err(|error| error.to_string())?;
    Ok(rank)
}
