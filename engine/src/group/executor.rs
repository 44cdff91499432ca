//! The engine's executor over a group of ranks: sockets, threads and the clock around [`Leader`].
//!
//! The step thread reads and writes all connections itself, so that a step costs no other thread's waking; only to accept and
//! authenticate there are others, which hand it new connections.

use std::collections::{BTreeMap, VecDeque};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use tandem_wire::{GroupKey, Incarnation, LinkReader, LinkWriter, MAX_MESSAGE, Purpose, wait_any};

use super::acceptor::{Acceptor, Arrival};
use super::leader::{Action, Leader, LeaderConfig, LinkId, State};
use super::message::{Answer, Loaded, ToLeader, ToRank, encode_step};
use super::pace::Pace;
use super::scout::Scout;
use super::status::{GroupReport, GroupState, GroupStatus};
use crate::error::{ExecutorError, ExecutorErrorKind};
use crate::executor::cuda_step::keeps_tokens;
use crate::executor::{Begun, Executor, ExecutorStatus, StepOutput};
use crate::sample_row::SampleRow;
use crate::step_plan::StepPlan;

/// New connections that may wait for the step thread.
const MAX_ARRIVALS: usize = 64;
/// How many of them it takes in at once: between two steps there is no time for more.
const ARRIVALS_OF_TURN: usize = 16;
/// The longest message of somebody who has not joined yet, and of a rank.
const MAX_HELLO: usize = 64 * 1024;
const MAX_ANSWER: usize = 16 << 20;
/// Messages that are taken from one connection before the others and the clock have their turn.
const MESSAGES_OF_TURN: usize = 64;
/// How long the step thread waits for its connections before it looks at the clock and for new ones.
const LOOK_UP: Duration = Duration::from_millis(20);
/// Rejected connections are told of for this long.
const REJECTION_SHOWN: Duration = Duration::from_secs(30);
const MAX_REJECTIONS: usize = 8;

/// A connection to a rank, or to somebody who has not said yet which.
struct Connection {
    reader: LinkReader,
    writer: LinkWriter,
}

/// A step that the ranks were sent.
struct BegunStep {
    number: u64,
    num_tokens: usize,
    start: Instant,
}

/// Runs plans on all ranks of a group.
pub(crate) struct GroupExecutor {
    leader: Leader,
    incarnation: Incarnation,
    arrivals: Receiver<Arrival>,
    links: BTreeMap<LinkId, Connection>,
    next_link: LinkId,
    rejections: VecDeque<(Instant, String)>,
    scout: Scout,
    pace: Pace,
    /// The ranks' devices compute beside them: steps are begun before the last is over.
    begins: bool,
    /// Steps that were begun, in order.
    begun: VecDeque<BegunStep>,
    /// When the last answer came.
    last_answer: Instant,
    status: GroupStatus,
    /// The engine was told to take no new requests.
    has_asked_for_rest: bool,
    actions: Vec<Action>,
    /// A connection has more than was taken of it at its last turn.
    has_more: bool,
    /// Ends with this value.
    _acceptor: Acceptor,
}

impl GroupExecutor {
    /// Listens for ranks, whose devices compute beside them if `begins`. `status` is kept up to date.
    pub(crate) fn start(
        config: LeaderConfig,
        begins: bool,
        listener: TcpListener,
        key: Option<GroupKey>,
        incarnation: Incarnation,
        scout: Scout,
        status: GroupStatus,
    ) -> std::io::Result<Self> {
        let (sender, arrivals) = sync_channel(MAX_ARRIVALS);
        let take = move |arrival: Arrival| match arrival {
            // The step thread is gone only when the process ends.
            Arrival::Link { .. } => drop(sender.send(arrival)),
            Arrival::Rejected { .. } => {
                if let Err(TrySendError::Full(Arrival::Rejected { host, .. })) = sender.try_send(arrival) {
                    tracing::debug!(host, "a rejected connection is not counted: there are too many");
                }
            }
        };
        let acceptor = Acceptor::start(listener, key, Purpose::Control, take)?;
        let executor = Self {
            leader: Leader::new(config, Instant::now()),
            incarnation,
            arrivals,
            links: BTreeMap::new(),
            next_link: 0,
            rejections: VecDeque::new(),
            scout,
            pace: Pace::default(),
            begins,
            begun: VecDeque::new(),
            last_answer: Instant::now(),
            status,
            has_asked_for_rest: false,
            actions: Vec::new(),
            has_more: false,
            _acceptor: acceptor,
        };
        executor.publish();
        Ok(executor)
    }

    /// Waits for news, at most `timeout`, and takes it in; whether the group is ready.
    pub(crate) fn wait(&mut self, timeout: Duration) -> bool {
        self.rest(timeout.min(LOOK_UP));
        self.turn();
        // Without an engine there are no requests to wait for.
        self.leader.release_leaving(Instant::now(), 0, &mut self.actions);
        self.act();
        self.leader.state() == State::Ready
    }

    /// Why the group is not ready, a line for each reason.
    pub(crate) fn missing(&self) -> Vec<String> {
        let rejections = self.rejections.iter().map(|(_, rejection)| rejection.clone());
        let looked_for = (0..self.leader.num_pods()).filter_map(|ordinal| self.scout.finding(ordinal));
        self.leader.missing().into_iter().chain(looked_for).chain(rejections).collect()
    }

    /// KV blocks of every rank, once the group has been ready.
    pub(crate) fn num_blocks(&self) -> Option<u64> {
        self.leader.num_blocks()
    }

    /// What rank 0 has loaded, while it is a member.
    pub(crate) fn loaded(&self) -> Option<Loaded> {
        self.leader.loaded(0)
    }

    /// Takes in what has come, and does what is due.
    fn turn(&mut self) {
        let arrivals: Vec<Arrival> = self.arrivals.try_iter().take(ARRIVALS_OF_TURN).collect();
        arrivals.into_iter().for_each(|arrival| self.arrive(arrival));
        self.hear();
        let now = Instant::now();
        self.rejections.retain(|(since, _)| now.duration_since(*since) < REJECTION_SHOWN);
        self.leader.tick(now, &mut self.actions);
        self.scout.miss(|ordinal| self.leader.misses_pod(ordinal));
        self.act();
        self.publish();
    }

    fn arrive(&mut self, arrival: Arrival) {
        let now = Instant::now();
        let (host, reason) = match arrival {
            Arrival::Link { link, host } => match link.split() {
                Ok((mut reader, writer)) => {
                    reader.set_limit(MAX_HELLO);
                    self.next_link += 1;
                    self.links.insert(self.next_link, Connection { reader, writer });
                    self.leader.connected(now, self.next_link, host, &mut self.actions);
                    return self.act();
                }
                Err(error) => (host, error.to_string()),
            },
            Arrival::Rejected { host, reason } => (host, reason),
        };
        self.leader.rejected();
        let line = format!("a connection from {host} was rejected: {reason}");
        // Once for each reason: who tries again and again shall not fill the log.
        if !self.rejections.iter().any(|(_, old)| *old == line) {
            tracing::warn!(host, reason, "a connection to the group was rejected");
        }
        self.rejections.retain(|(_, old)| *old != line);
        self.rejections.truncate(MAX_REJECTIONS - 1);
        self.rejections.push_front((now, line));
    }

    /// Waits until a connection brings something.
    fn rest(&self, timeout: Duration) {
        if !self.has_more {
            wait_any(self.links.values().map(|link| &link.reader), timeout);
        }
    }

    /// Takes in what the connections have brought.
    fn hear(&mut self) {
        self.has_more = false;
        let ids: Vec<LinkId> = self.links.keys().copied().collect();
        for link in ids {
            let mut taken = 0;
            // Closed meanwhile, it has nothing to say any more.
            while let Some(connection) = self.links.get_mut(&link) {
                if taken == MESSAGES_OF_TURN {
                    self.has_more = true;
                    break;
                }
                taken += 1;
                let now = Instant::now();
                match read_one(&mut connection.reader) {
                    Ok(None) => break,
                    Ok(Some((from, message))) => {
                        if matches!(message, ToLeader::Hello(_)) {
                            connection.reader.set_limit(MAX_ANSWER);
                        }
                        self.leader.message(now, link, from, message, &mut self.actions);
                    }
                    Err(reason) => {
                        self.links.remove(&link);
                        self.leader.closed(now, link, &reason, &mut self.actions);
                    }
                }
                self.act();
            }
        }
    }

    /// Does what the state machine wants, also what that brings about.
    fn act(&mut self) {
        while !self.actions.is_empty() {
            for action in std::mem::take(&mut self.actions) {
                match action {
                    Action::Close { link } => {
                        if let Some(connection) = self.links.remove(&link) {
                            connection.writer.close();
                        }
                    }
                    Action::Send { link, epoch, message } => {
                        let (kind, payload) = message.encode();
                        self.send(link, epoch, kind, &payload);
                    }
                }
            }
        }
    }

    fn send(&mut self, link: LinkId, epoch: u64, kind: u8, payload: &[u8]) {
        let Some(connection) = self.links.get_mut(&link) else { return };
        if let Err(error) = connection.writer.send(epoch, self.incarnation, kind, payload) {
            self.links.remove(&link);
            let reason = format!("takes nothing: {error}");
            self.leader.closed(Instant::now(), link, &reason, &mut self.actions);
        }
    }

    /// To all members; rank 0 gets a payload of its own.
    fn broadcast(&mut self, kind: u8, first: &[u8], others: &[u8]) {
        let links: Vec<LinkId> = self.leader.links().collect();
        let epoch = self.leader.epoch();
        for (rank, link) in links.into_iter().enumerate() {
            self.send(link, epoch, kind, if rank == 0 { first } else { others });
        }
        self.act();
    }

    /// Sends a step to all ranks. Rows go to the one that answers, and to all if their tokens stay on the devices.
    fn send_step(
        &mut self,
        plan: &StepPlan,
        rows: &[SampleRow<'_>],
        to_all: bool,
    ) -> Result<BegunStep, ExecutorError> {
        let start = Instant::now();
        let (kind, with_rows, without) = encode_step(plan, rows, to_all);
        if with_rows.len() > MAX_MESSAGE {
            let message = format!(
                "a step of {} bytes is more than ranks take, {MAX_MESSAGE}: fewer requests with long lists of tokens at once",
                with_rows.len()
            );
            return Err(ExecutorError { message, kind: ExecutorErrorKind::Step });
        }
        self.broadcast(kind, &with_rows, without.as_ref().unwrap_or(&with_rows));
        Ok(BegunStep { number: plan.step, num_tokens: plan.num_tokens(), start })
    }

    /// Waits for the answer to a step, the first of those that are not over.
    fn answer_to(&mut self, step: &BegunStep) -> Result<StepOutput, ExecutorError> {
        // Until then the ranks were at the one before.
        let start = step.start.max(self.last_answer);
        let deadline = self.pace.deadline(step.num_tokens);
        let mut looked_up = Instant::now();
        let epoch = self.leader.epoch();
        loop {
            if self.leader.state() != State::Ready || self.leader.epoch() != epoch {
                let message = self.leader.last_break().unwrap_or("the group broke").to_owned();
                // Whoever learns from the engine that it waits shall find the reason here.
                self.publish();
                return Err(ExecutorError { message, kind: ExecutorErrorKind::GroupLost });
            }
            if let Some(Answer { forward, rows, .. }) = self.leader.take_answer(step.number) {
                self.last_answer = Instant::now();
                self.pace.note(step.num_tokens, self.last_answer - start);
                return Ok(StepOutput { rows, forward });
            }
            if start.elapsed() >= deadline {
                self.pace.overdue(step.num_tokens, start.elapsed());
                self.leader.step_overdue(Instant::now(), step.number, start.elapsed(), &mut self.actions);
                self.act();
                continue;
            }
            self.rest(LOOK_UP);
            self.hear();
            if looked_up.elapsed() >= LOOK_UP {
                looked_up = Instant::now();
                self.turn();
            }
        }
    }

    fn publish(&self) {
        let counters = self.leader.counters();
        let state = match self.leader.state() {
            State::Ready => GroupState::Ready,
            _ if self.leader.is_giving_up() => GroupState::Broken,
            _ if self.leader.loaded(0).is_none() && self.leader.num_blocks().is_none() => GroupState::Loading,
            _ => GroupState::Joining,
        };
        let report = GroupReport {
            state,
            epoch: self.leader.epoch(),
            ranks_up: (0..self.leader.size()).map(|rank| self.leader.rank_is_up(rank)).collect(),
            // Who was turned away does not keep a group from serving.
            reasons: if state == GroupState::Ready { Vec::new() } else { self.missing() },
            stale_messages: counters.stale_messages,
            refusals: counters.refusals,
            breaks: counters.breaks,
            leader_http: self.leader.leader_http().to_owned(),
        };
        if *self.status.report() != report {
            self.status.set(report);
        }
    }
}

impl Executor for GroupExecutor {
    fn run(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        let step = self.send_step(plan, rows, false)?;
        self.answer_to(&step)
    }

    fn begin(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<Begun, ExecutorError> {
        if !self.begins {
            return Ok(Begun::Nothing);
        }
        // One with prompts is never followed before it is over, so nobody but rank 0 needs its tokens.
        let is_decode = plan.sequences.iter().all(|sequence| sequence.token_ids.len() == 1);
        let keeps_tokens = is_decode && keeps_tokens(rows);
        let step = self.send_step(plan, rows, keeps_tokens)?;
        self.begun.push_back(step);
        Ok(Begun::Step { keeps_tokens })
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        let step = self.begun.pop_front().expect("a step was begun");
        self.answer_to(&step)
    }

    fn poll(&mut self, in_flight: usize) -> ExecutorStatus {
        self.turn();
        // Until the engine knows, one more request may get in after it has counted.
        if self.has_asked_for_rest || self.leader.state() != State::Ready {
            self.leader.release_leaving(Instant::now(), in_flight, &mut self.actions);
            self.act();
        }
        self.has_asked_for_rest = self.leader.wants_rest();
        self.publish();
        match self.leader.state() {
            State::Ready => {
                ExecutorStatus::Ready { epoch: self.leader.epoch(), admits: !self.has_asked_for_rest }
            }
            _ => ExecutorStatus::Waiting { reason: self.missing().join("; ") },
        }
    }

    // The state machine has told the ranks already when it found the group broken. What else was begun they compute for nothing.
    fn abort(&mut self) {
        self.begun.clear();
    }

    fn poison_blocks(&mut self, blocks: &[u32]) {
        let (kind, payload) = ToRank::Poison { blocks: blocks.to_vec() }.encode();
        self.broadcast(kind, &payload, &payload);
    }
}

/// A message with its epoch and sender, if there is one.
fn read_one(reader: &mut LinkReader) -> Result<Option<(Origin, ToLeader)>, String> {
    let message = reader.recv(Duration::ZERO).map_err(|error| format!("is gone: {error}"))?;
    let Some(message) = message else { return Ok(None) };
    let decoded = ToLeader::decode(message.kind, &message.payload);
    let decoded = decoded.map_err(|error| format!("sent what cannot be understood: {error}"))?;
    Ok(Some(((message.epoch, message.sender), decoded)))
}

type Origin = (u64, Incarnation);
