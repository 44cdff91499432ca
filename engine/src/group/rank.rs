//! A rank's process: sockets, threads and the clock around [`Agent`], and the computing thread beside it.
//!
//! The calling thread drives the state machine. One thread loads the model and then computes; one looks for the leader and then
//! reads what it says. All of them tell the calling thread, through one channel, what has happened.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use tandem_wire::{GroupKey, HANDSHAKE_TIMEOUT, Incarnation, Link, LinkReader, LinkWriter, Purpose};

use super::agent::{Agent, AgentAction, AgentConfig, Done, Ending, Job, RankReport};
use super::compute::{Aborts, Compute};
use super::leader::LinkId;
use super::mesh::Mesh;
use super::message::{Loaded, ToRank};
use crate::error::ExecutorError;
use crate::load::{EngineOptions, Inspected, LoadError};

/// How often deadlines are looked at.
const LOOK_UP: Duration = Duration::from_millis(50);
/// How long one attempt to connect to the leader may take.
const CONNECT: Duration = Duration::from_secs(2);
/// How long a reader waits before it looks again; only a closed connection ends it.
const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// A rank's place, and how it finds the others.
#[derive(Debug)]
pub struct RankOptions {
    pub rank: usize,
    /// Ranks of the group.
    pub size: usize,
    /// Ranks that share this machine's memory and cores.
    pub local_ranks: usize,
    /// Host and port where the leader takes ranks; the name is looked up at every attempt.
    pub leader: (String, u16),
    /// Where peers reach this rank.
    pub listener: TcpListener,
    pub key: Option<GroupKey>,
}

/// How a rank's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RankEnd {
    /// It was asked to leave, and did.
    Left,
    /// Its computing thread does not come back: the process must end, and a new one take its place.
    Hung,
}

/// What the parent process tells a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RankOrder {
    /// Ask the leader for leave, then end.
    Leave,
}

enum Event {
    Dialled(Result<(LinkId, LinkWriter), String>),
    Message { link: LinkId, from: (u64, Incarnation), message: ToRank },
    Closed { link: LinkId, reason: String },
    Loaded(Result<Loaded, LoadError>),
    Done { epoch: u64, done: Done },
    Order(RankOrder),
}

/// Loads this rank's share of a model, and computes what leaders say until it is told to leave. `report` is called with every
/// change of the rank's state.
///
/// # Errors
/// [`LoadError`] if the share cannot be loaded; [`LoadError::Executor`] if the rank cannot listen or start threads.
pub fn run_rank(
    inspected: Inspected,
    options: &EngineOptions,
    rank: RankOptions,
    orders: Receiver<RankOrder>,
    report: impl FnMut(&RankReport),
) -> Result<RankEnd, LoadError> {
    let fail = |error: &dyn std::fmt::Display| LoadError::Executor(ExecutorError::fatal(error.to_string()));
    let incarnation = Incarnation::random();
    let mesh = Mesh::start(rank.rank, incarnation, rank.listener, rank.key.clone());
    let mesh = Arc::new(mesh.map_err(|error| fail(&error))?);
    let config = AgentConfig {
        rank: rank.rank as u32,
        port: mesh.port(),
        terms: inspected.terms(options, rank.size)?,
    };
    let aborts = Arc::new(Aborts::default());
    let (events, inbox) = mpsc::channel();
    let (jobs, work) = mpsc::channel();

    let (told, shared, options) = (events.clone(), Arc::clone(&aborts), options.clone());
    let (number, size, local_ranks) = (rank.rank, rank.size, rank.local_ranks);
    let compute = move || {
        let shard = inspected.load_shard(&options, number, size, local_ranks);
        let shard = match shard {
            Ok(shard) => shard,
            Err(error) => return drop(told.send(Event::Loaded(Err(error)))),
        };
        let loaded = Loaded {
            max_blocks: shard.max_blocks as u64,
            weight_bytes: shard.model.loaded_bytes().kept,
            read_bytes: shard.model.loaded_bytes().read,
        };
        let compute = Compute {
            rank: number,
            spin: shard.has_own_cores,
            cpu: shard.cpu,
            model: shard.model,
            kv_dtype: shard.kv_dtype,
            mesh: &mesh,
            aborts: &shared,
        };
        drop(told.send(Event::Loaded(Ok(loaded))));
        compute.run(&work, |epoch, done| drop(told.send(Event::Done { epoch, done })));
    };
    thread::Builder::new().name("tandem-step".into()).spawn(compute).map_err(|error| fail(&error))?;
    let told = events.clone();
    let listen = move || orders.into_iter().for_each(|order| drop(told.send(Event::Order(order))));
    thread::Builder::new().name("tandem-orders".into()).spawn(listen).map_err(|error| fail(&error))?;

    let agent = Agent::new(config, Instant::now());
    let (leader, key) = (rank.leader, rank.key);
    Driver { agent, incarnation, leader, key, links: HashMap::new(), next_link: 0, events, jobs, aborts }
        .run(&inbox, report)
}

/// What the calling thread holds.
struct Driver {
    agent: Agent,
    incarnation: Incarnation,
    leader: (String, u16),
    key: Option<GroupKey>,
    links: HashMap<LinkId, LinkWriter>,
    next_link: LinkId,
    events: Sender<Event>,
    jobs: Sender<(u64, Job)>,
    aborts: Arc<Aborts>,
}

impl Driver {
    fn run(
        mut self,
        inbox: &Receiver<Event>,
        mut report: impl FnMut(&RankReport),
    ) -> Result<RankEnd, LoadError> {
        let mut last = self.agent.report();
        report(&last);
        loop {
            let mut out = Vec::new();
            // The channel cannot end: this thread holds a sender of it.
            if let Ok(event) = inbox.recv_timeout(LOOK_UP) {
                self.take(event, &mut out)?;
            }
            while let Ok(event) = inbox.try_recv() {
                self.take(event, &mut out)?;
            }
            self.agent.tick(Instant::now(), &mut out);
            if let Some(end) = self.act(out) {
                return Ok(end);
            }
            let now = self.agent.report();
            if now != last {
                report(&now);
                last = now;
            }
        }
    }

    fn take(&mut self, event: Event, out: &mut Vec<AgentAction>) -> Result<(), LoadError> {
        let now = Instant::now();
        match event {
            Event::Dialled(result) => {
                let link = result.map(|(link, writer)| {
                    self.links.insert(link, writer);
                    link
                });
                self.agent.dialled(now, link, out);
            }
            Event::Message { link, from, message } => self.agent.message(now, link, from, message, out),
            Event::Closed { link, reason } => {
                self.links.remove(&link);
                self.agent.closed(now, link, &reason, out);
            }
            Event::Loaded(loaded) => self.agent.loaded(loaded?, out),
            Event::Done { epoch, done } => self.agent.done(now, epoch, done, out),
            Event::Order(RankOrder::Leave) => self.agent.leave(out),
        }
        Ok(())
    }

    /// Does what the state machine wants; how the process ends, if it is to end.
    fn act(&mut self, mut actions: Vec<AgentAction>) -> Option<RankEnd> {
        while !actions.is_empty() {
            let mut more = Vec::new();
            for action in actions {
                match action {
                    AgentAction::Dial => self.dial(&mut more),
                    AgentAction::Send { link, epoch, message } => {
                        let (kind, payload) = message.encode();
                        let Some(writer) = self.links.get_mut(&link) else { continue };
                        if let Err(error) = writer.send(epoch, self.incarnation, kind, &payload) {
                            self.links.remove(&link);
                            self.agent.closed(Instant::now(), link, &error.to_string(), &mut more);
                        }
                    }
                    AgentAction::Close { link } => {
                        if let Some(writer) = self.links.remove(&link) {
                            writer.close();
                        }
                    }
                    // The computing thread ends with the process only.
                    AgentAction::Compute { epoch, job } => drop(self.jobs.send((epoch, job))),
                    AgentAction::Abort { epoch } => self.aborts.abort(epoch),
                    AgentAction::Exit(Ending::Left) => return Some(RankEnd::Left),
                    AgentAction::Exit(Ending::Hung) => return Some(RankEnd::Hung),
                }
            }
            actions = more;
        }
        None
    }

    fn dial(&mut self, out: &mut Vec<AgentAction>) {
        self.next_link += 1;
        let (link, events, key) = (self.next_link, self.events.clone(), self.key.clone());
        let leader = self.leader.clone();
        let look = move || match connect(&leader, key.as_ref()) {
            Err(reason) => drop(events.send(Event::Dialled(Err(reason)))),
            Ok((reader, writer)) => {
                if events.send(Event::Dialled(Ok((link, writer)))).is_ok() {
                    let reason = read(link, reader, &events);
                    drop(events.send(Event::Closed { link, reason }));
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("tandem-leader".into()).spawn(look) {
            self.agent.dialled(Instant::now(), Err(format!("no thread: {error}")), out);
        }
    }
}

/// Looks the leader up, which may have another address than last time, and proves who this is.
fn connect((host, port): &(String, u16), key: Option<&GroupKey>) -> Result<(LinkReader, LinkWriter), String> {
    let addresses = (host.as_str(), *port).to_socket_addrs();
    let addresses = addresses.map_err(|error| format!("{host} cannot be looked up: {error}"))?;
    let mut last = format!("{host} has no address");
    let connected = addresses.into_iter().find_map(|address| {
        let stream = TcpStream::connect_timeout(&address, CONNECT);
        stream.map_err(|error| last = format!("{host} at {address}: {error}")).ok()
    });
    let link = tandem_wire::dial(connected.ok_or(last)?, key, Purpose::Control, HANDSHAKE_TIMEOUT);
    link.and_then(Link::split).map_err(|error| format!("{host}:{port}: {error}"))
}

/// Reads a connection to its end; why it ended.
fn read(link: LinkId, mut reader: LinkReader, events: &Sender<Event>) -> String {
    loop {
        let message = match reader.recv(READ_TIMEOUT) {
            Ok(None) => continue,
            Ok(Some(message)) => message,
            Err(error) => return error.to_string(),
        };
        let from = (message.epoch, message.sender);
        let message = match ToRank::decode(message.kind, &message.payload) {
            Ok(message) => message,
            Err(error) => return format!("it says what cannot be understood: {error}"),
        };
        if events.send(Event::Message { link, from, message }).is_err() {
            return "the rank has ended".into();
        }
    }
}
