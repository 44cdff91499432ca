//! A rank's process: sockets, threads and the clock around [`Agent`], and the computing thread beside it.
//!
//! One thread loads the model and then computes; one looks for the leader and then reads what it says; the calling thread keeps the
//! time. Each of them drives the state machine itself, under one lock: what the leader says reaches the computing thread, and its
//! answer the leader, without waking a third.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tandem_wire::{GroupKey, HANDSHAKE_TIMEOUT, Incarnation, Link, LinkReader, LinkWriter, Purpose};

use super::agent::{Agent, AgentAction, AgentConfig, Ending, Job, RankReport};
use super::compute::{Aborts, Compute};
use super::leader::LinkId;
use super::mesh::Mesh;
use super::message::ToRank;
use crate::error::ExecutorError;
use crate::load::{EngineOptions, Inspected, LoadError, LoadedShard, MachineShare};

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
    /// KV blocks that this rank's process had before it was started again: the other ranks on this machine still hold theirs.
    pub held_blocks: Option<u64>,
}

/// How a rank's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RankEnd {
    /// It was asked to leave, and did.
    Left,
    /// Its computing thread does not come back: the process must end, and a new one take its place.
    Hung,
    /// The leader turned it away after it had joined, and why: a new process may find what this one lacks.
    Unfit(String),
}

/// What the parent process tells a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RankOrder {
    /// Ask the leader for leave, then end.
    Leave,
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
    report: impl FnMut(&RankReport) + Send + 'static,
) -> Result<RankEnd, LoadError> {
    let fail = |error: &dyn std::fmt::Display| LoadError::Executor(ExecutorError::fatal(error.to_string()));
    let incarnation = Incarnation::random();
    let mesh = Mesh::start(rank.rank, incarnation, rank.listener, rank.key.clone());
    let mesh = mesh.map_err(|error| fail(&error))?;
    let config = AgentConfig {
        rank: rank.rank as u32,
        port: mesh.port(),
        terms: inspected.terms(options, rank.size)?,
    };
    let (jobs, work) = mpsc::channel();
    let (end, ended) = mpsc::channel();
    let state = State {
        agent: Agent::new(config, Instant::now()),
        links: HashMap::new(),
        next_link: 0,
        last_report: None,
        report: Box::new(report),
    };
    let driver = Arc::new(Driver {
        state: Mutex::new(state),
        incarnation,
        leader: rank.leader,
        key: rank.key,
        jobs,
        aborts: Aborts::default(),
        end,
    });

    let (shared, options) = (Arc::clone(&driver), options.clone());
    let (number, size) = (rank.rank, rank.size);
    let machine = MachineShare { local_ranks: rank.local_ranks, held_blocks: rank.held_blocks };
    let compute = move || match inspected.load_shard(&options, number, size, machine) {
        Ok(shard) => run_shard(&shared, shard, (number, size), &mesh, &work),
        // Nobody listens only if the rank has ended.
        Err(error) => drop(shared.end.send(Err(error))),
    };
    thread::Builder::new().name("tandem-step".into()).spawn(compute).map_err(|error| fail(&error))?;
    let shared = Arc::clone(&driver);
    let listen =
        move || orders.into_iter().for_each(|RankOrder::Leave| shared.drive(|agent, out| agent.leave(out)));
    thread::Builder::new().name("tandem-orders".into()).spawn(listen).map_err(|error| fail(&error))?;
    loop {
        driver.drive(|agent, out| agent.tick(Instant::now(), out));
        match ended.recv_timeout(LOOK_UP) {
            Ok(end) => return end,
            // The driver holds a sender: the channel does not end by itself.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }
}

/// Tells that the share is loaded, and does jobs until the process ends.
fn run_shard(
    driver: &Arc<Driver>,
    shard: LoadedShard,
    (rank, size): (usize, usize),
    mesh: &Mesh,
    work: &Receiver<(u64, Job)>,
) {
    let loaded = shard.loaded;
    let compute = Compute {
        rank,
        size,
        spin: shard.has_own_cores,
        device: shard.device,
        max_tokens: shard.max_tokens,
        max_logits_rows: shard.max_logits_rows,
        mesh,
        aborts: &driver.aborts,
    };
    driver.drive(|agent, out| agent.loaded(loaded, out));
    compute.run(work, |epoch, done| {
        driver.drive(|agent, out| agent.done(Instant::now(), epoch, done, out));
    });
}

/// What the threads of a rank share.
struct Driver {
    state: Mutex<State>,
    incarnation: Incarnation,
    leader: (String, u16),
    key: Option<GroupKey>,
    jobs: Sender<(u64, Job)>,
    aborts: Aborts,
    end: Sender<Result<RankEnd, LoadError>>,
}

/// What one of them at a time may touch.
struct State {
    agent: Agent,
    links: HashMap<LinkId, LinkWriter>,
    next_link: LinkId,
    last_report: Option<RankReport>,
    report: Box<dyn FnMut(&RankReport) + Send>,
}

impl Driver {
    /// Lets something happen to the state machine, and does what it wants done. Blocks at most for as long as a connection may
    /// take nothing.
    fn drive(self: &Arc<Self>, happen: impl FnOnce(&mut Agent, &mut Vec<AgentAction>)) {
        // Nothing panics while it holds the lock, but for a bug in the state machine; then the process is of no use.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        let mut actions = Vec::new();
        happen(&mut state.agent, &mut actions);
        while !actions.is_empty() {
            let mut more = Vec::new();
            actions.drain(..).for_each(|action| self.act(state, action, &mut more));
            actions = more;
        }
        let report = state.agent.report();
        if state.last_report.as_ref() != Some(&report) {
            (state.report)(&report);
            state.last_report = Some(report);
        }
    }

    fn act(self: &Arc<Self>, state: &mut State, action: AgentAction, more: &mut Vec<AgentAction>) {
        match action {
            AgentAction::Dial => self.dial(state, more),
            AgentAction::Send { link, epoch, message } => {
                let (kind, payload) = message.encode();
                let Some(writer) = state.links.get_mut(&link) else { return };
                if let Err(error) = writer.send(epoch, self.incarnation, kind, &payload) {
                    state.links.remove(&link);
                    state.agent.closed(Instant::now(), link, &error.to_string(), more);
                }
            }
            AgentAction::Close { link } => {
                if let Some(writer) = state.links.remove(&link) {
                    writer.close();
                }
            }
            // The computing thread, and whoever waits for the end, go with the process only.
            AgentAction::Compute { epoch, job } => drop(self.jobs.send((epoch, job))),
            AgentAction::Abort { epoch } => self.aborts.abort(epoch),
            AgentAction::Exit(Ending::Left) => drop(self.end.send(Ok(RankEnd::Left))),
            AgentAction::Exit(Ending::Hung) => drop(self.end.send(Ok(RankEnd::Hung))),
            AgentAction::Exit(Ending::Unfit(reason)) => drop(self.end.send(Ok(RankEnd::Unfit(reason)))),
        }
    }

    /// Looks for the leader on a thread of its own, which then reads what the leader says.
    fn dial(self: &Arc<Self>, state: &mut State, more: &mut Vec<AgentAction>) {
        state.next_link += 1;
        let (link, driver) = (state.next_link, Arc::clone(self));
        let look = move || match connect(&driver.leader, driver.key.as_ref()) {
            Err(reason) => driver.drive(|agent, out| agent.dialled(Instant::now(), Err(reason), out)),
            Ok((mut reader, writer)) => {
                driver.links(|links| drop(links.insert(link, writer)));
                driver.drive(|agent, out| agent.dialled(Instant::now(), Ok(link), out));
                let reason = driver.read(link, &mut reader);
                driver.links(|links| drop(links.remove(&link)));
                driver.drive(|agent, out| agent.closed(Instant::now(), link, &reason, out));
            }
        };
        if let Err(error) = thread::Builder::new().name("tandem-leader".into()).spawn(look) {
            state.agent.dialled(Instant::now(), Err(format!("no thread: {error}")), more);
        }
    }

    fn links(&self, change: impl FnOnce(&mut HashMap<LinkId, LinkWriter>)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).links);
    }

    /// Reads a connection to its end; why it ended.
    fn read(self: &Arc<Self>, link: LinkId, reader: &mut LinkReader) -> String {
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
            self.drive(|agent, out| agent.message(Instant::now(), link, from, message, out));
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
