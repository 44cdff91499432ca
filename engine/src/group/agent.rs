//! A rank's half of the group protocol: a state machine without sockets, threads or clock.
//!
//! It looks for the leader until it is taken in, hands what the leader says to the computing thread, and answers. What
//! happens comes in as calls with the time, what is to be done goes out as [`AgentAction`]s, so that a simulation drives it
//! as the sockets do. It makes no choice about the work: the leader decides, the computing thread computes.
//!
//! Invariants: nothing of two epochs is ever given to the computing thread at once; the leader is told `Idle`, and a
//! leader is called, only when the computing thread has nothing of any epoch; weights outlive epochs and leaders.

use std::time::{Duration, Instant};

use tandem_wire::Incarnation;

use super::leader::{HEARTBEAT, LinkId, MAX_EPOCH, SILENCE};
use super::message::{Answer, Hello, Loaded, MemberAddress, Phase, Step, Term, ToLeader, ToRank};

/// Wait between two calls for the leader: short at first, so that a new leader finds its ranks at once.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// How long the leader may take to answer a call.
const WELCOME: Duration = Duration::from_secs(10);
/// How long the computing thread may take to give up. One that does not come back by then hangs, and only a new process
/// helps.
const WATCHDOG: Duration = Duration::from_secs(10);

/// What the owner of sockets and threads is to do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum AgentAction {
    /// Look the leader up and connect; the outcome comes back as [`Agent::dialled`].
    Dial,
    Send {
        link: LinkId,
        epoch: u64,
        message: ToLeader,
    },
    /// Whatever was sent before may still go out.
    Close {
        link: LinkId,
    },
    /// For the computing thread, after all jobs before it; it ends with [`Agent::done`].
    Compute {
        epoch: u64,
        job: Job,
    },
    /// The computing thread is to give up everything of this epoch and older ones at once.
    Abort {
        epoch: u64,
    },
    /// The process is to end.
    Exit(Ending),
}

/// Work of the computing thread.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Job {
    /// Connect to the other ranks and take the memory for KV.
    Form {
        num_blocks: u64,
        members: Vec<MemberAddress>,
    },
    Step(Box<Step>),
    /// Overwrite the KV of these blocks with NaN.
    Poison(Vec<u32>),
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Done {
    Formed(Result<(), String>),
    Stepped {
        step: u64,
        result: Result<Answer, String>,
    },
    Poisoned,
    /// This process cannot compute any more, and why.
    Unfit(String),
    /// Given up, as it was told to.
    Aborted,
}

/// Why a rank's process ends by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It was asked to leave, and may.
    Left,
    /// Its computing thread does not come back.
    Hung,
    /// The group cannot use it as it is, and why.
    Unfit(String),
}

/// How a rank is, for its parent's probes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RankReport {
    /// Its weights are in memory.
    pub loaded: bool,
    /// It is connected to a leader that took it in.
    pub joined: bool,
    /// It is part of a group that serves.
    pub ready: bool,
    /// The highest epoch it was part of, and its KV blocks; 0 for none.
    pub epoch: u64,
    pub num_blocks: u64,
    /// Why it is not ready, a line for each reason.
    pub reasons: Vec<String>,
    /// Where clients find the leader; empty until a leader has said so.
    pub leader_http: String,
    /// Whether each rank of the group is up, as the leader said last.
    pub ranks_up: Vec<bool>,
    /// Messages of another leader or epoch.
    pub stale_messages: u64,
}

/// What does not change while the process lives.
#[derive(Debug, Clone)]
pub(crate) struct AgentConfig {
    pub(crate) rank: u32,
    /// Where it takes connections of its peers.
    pub(crate) port: u16,
    pub(crate) terms: Vec<Term>,
}

#[derive(Debug)]
pub(crate) struct Agent {
    config: AgentConfig,
    last_epoch: u64,
    loaded: Option<Loaded>,
    call: Call,
    retry: Duration,
    /// Jobs of the computing thread that have not ended.
    outstanding: usize,
    /// The live epoch, from its `Form` to its end.
    epoch: Option<u64>,
    /// Since when the computing thread gives up, and what.
    giving_up: Option<(Instant, u64)>,
    step: u64,
    phase: Phase,
    next_heartbeat: Instant,
    leaving: bool,
    report: RankReport,
}

/// The connection to the leader.
#[derive(Debug)]
enum Call {
    /// Next try at this moment, if nothing else is in the way.
    None {
        retry_at: Instant,
    },
    Dialling,
    /// Hello is said.
    Asked {
        link: LinkId,
        since: Instant,
    },
    Member {
        link: LinkId,
        leader: Incarnation,
        last_heard: Instant,
    },
}

impl Agent {
    pub(crate) fn new(config: AgentConfig, now: Instant) -> Self {
        Self {
            config,
            last_epoch: 0,
            loaded: None,
            call: Call::None { retry_at: now },
            retry: FIRST_RETRY,
            outstanding: 0,
            epoch: None,
            giving_up: None,
            step: 0,
            phase: Phase::Loading,
            next_heartbeat: now,
            leaving: false,
            report: RankReport {
                reasons: vec!["the leader was not called yet".into()],
                ..RankReport::default()
            },
        }
    }

    pub(crate) fn report(&self) -> RankReport {
        let mut report = self.report.clone();
        report.loaded = self.loaded.is_some();
        report.joined = matches!(self.call, Call::Member { .. });
        report.ready &= report.joined && report.loaded;
        report.epoch = self.last_epoch;
        if !report.loaded {
            report.reasons.insert(0, "the model is loading".into());
        }
        report
    }

    /// How a call for the leader went.
    pub(crate) fn dialled(
        &mut self,
        now: Instant,
        result: Result<LinkId, String>,
        out: &mut Vec<AgentAction>,
    ) {
        let link = match result {
            Ok(link) => link,
            Err(reason) => return self.call_later(now, format!("the leader cannot be reached: {reason}")),
        };
        // While it was looked for, nothing of an old epoch can have begun: only a leader begins one.
        self.call = Call::Asked { link, since: now };
        let hello = Hello {
            rank: self.config.rank,
            last_epoch: self.last_epoch,
            port: self.config.port,
            terms: self.config.terms.clone(),
        };
        out.push(AgentAction::Send { link, epoch: self.last_epoch, message: ToLeader::Hello(hello) });
    }

    /// The weights are in memory.
    pub(crate) fn loaded(&mut self, loaded: Loaded, out: &mut Vec<AgentAction>) {
        self.loaded = Some(loaded);
        self.phase = Phase::Idle;
        if let Call::Member { link, .. } = self.call {
            out.push(AgentAction::Send { link, epoch: self.last_epoch, message: ToLeader::Loaded(loaded) });
        }
    }

    /// A message came over a connection.
    pub(crate) fn message(
        &mut self,
        now: Instant,
        link: LinkId,
        (epoch, sender): (u64, Incarnation),
        message: ToRank,
        out: &mut Vec<AgentAction>,
    ) {
        match &mut self.call {
            Call::Asked { link: asked, .. } if *asked == link => match message {
                ToRank::Welcome { leader_http } => self.join(now, link, sender, leader_http, out),
                ToRank::Refuse { reason } => {
                    out.push(AgentAction::Close { link });
                    self.retry = LAST_RETRY;
                    let reason = format!("the leader refused this rank: {reason}");
                    if self.last_epoch > MAX_EPOCH {
                        // No new leader believes that; a new process has been in none.
                        out.push(AgentAction::Exit(Ending::Unfit(reason.clone())));
                    }
                    self.call_later(now, reason);
                }
                _ => self.report.stale_messages += 1,
            },
            Call::Member { link: joined, leader, last_heard } if *joined == link && *leader == sender => {
                *last_heard = now;
                self.obey(now, link, epoch, message, out);
            }
            _ => self.report.stale_messages += 1,
        }
    }

    /// A connection ended.
    pub(crate) fn closed(&mut self, now: Instant, link: LinkId, reason: &str, out: &mut Vec<AgentAction>) {
        if self.link() == Some(link) {
            self.lose_leader(now, format!("the connection to the leader ended: {reason}"), out);
        }
    }

    /// A job of the computing thread ended.
    pub(crate) fn done(&mut self, now: Instant, epoch: u64, done: Done, out: &mut Vec<AgentAction>) {
        self.outstanding -= 1;
        if let Done::Unfit(reason) = done {
            return out.push(AgentAction::Exit(Ending::Unfit(reason)));
        }
        if self.outstanding == 0 {
            self.phase = Phase::Idle;
        }
        let is_live = self.epoch == Some(epoch);
        if let Call::Member { link, .. } = self.call
            && is_live
        {
            let message = match done {
                Done::Formed(Ok(())) => Some(ToLeader::Formed),
                Done::Formed(Err(reason)) => Some(ToLeader::NotFormed { reason }),
                // The leader waits for the rank that draws; where the others are, their heartbeats say.
                Done::Stepped { result: Ok(answer), .. } if self.config.rank == 0 => {
                    Some(ToLeader::Answer(answer))
                }
                Done::Stepped { step, result: Err(reason) } => Some(ToLeader::StepFailed { step, reason }),
                Done::Stepped { result: Ok(_), .. } | Done::Poisoned | Done::Aborted => None,
                Done::Unfit(_) => unreachable!("it was looked for above"),
            };
            out.extend(message.map(|message| AgentAction::Send { link, epoch, message }));
        }
        self.rest_if_idle(now, out);
    }

    /// The pod is to stop: ask the leader for leave.
    pub(crate) fn leave(&mut self, out: &mut Vec<AgentAction>) {
        self.leaving = true;
        match self.call {
            Call::Member { link, .. } => {
                out.push(AgentAction::Send { link, epoch: self.last_epoch, message: ToLeader::Leaving });
            }
            _ => out.push(AgentAction::Exit(Ending::Left)),
        }
    }

    /// Time has passed: everything that has a deadline.
    pub(crate) fn tick(&mut self, now: Instant, out: &mut Vec<AgentAction>) {
        if let Some((since, _)) = self.giving_up
            && now.saturating_duration_since(since) >= WATCHDOG
        {
            return out.push(AgentAction::Exit(Ending::Hung));
        }
        match self.call {
            Call::None { retry_at } if now >= retry_at && self.giving_up.is_none() => {
                self.call = Call::Dialling;
                out.push(AgentAction::Dial);
            }
            Call::Asked { link, since } if now.saturating_duration_since(since) >= WELCOME => {
                out.push(AgentAction::Close { link });
                self.lose_leader(now, "the leader did not answer".into(), out);
            }
            Call::Member { link, last_heard, .. } if now.saturating_duration_since(last_heard) >= SILENCE => {
                out.push(AgentAction::Close { link });
                self.lose_leader(now, "the leader is silent".into(), out);
            }
            Call::Member { link, .. } if now >= self.next_heartbeat => {
                self.next_heartbeat = now + HEARTBEAT;
                let message = ToLeader::Heartbeat { step: self.step, phase: self.phase };
                out.push(AgentAction::Send { link, epoch: self.last_epoch, message });
            }
            _ => {}
        }
    }

    fn link(&self) -> Option<LinkId> {
        match self.call {
            Call::Asked { link, .. } | Call::Member { link, .. } => Some(link),
            Call::None { .. } | Call::Dialling => None,
        }
    }

    fn join(
        &mut self,
        now: Instant,
        link: LinkId,
        leader: Incarnation,
        leader_http: String,
        out: &mut Vec<AgentAction>,
    ) {
        tracing::info!(rank = self.config.rank, %leader, "joined the leader");
        self.call = Call::Member { link, leader, last_heard: now };
        self.retry = FIRST_RETRY;
        self.report.leader_http = leader_http;
        self.report.reasons = vec!["the group is not whole yet".into()];
        let say = |message| AgentAction::Send { link, epoch: self.last_epoch, message };
        out.extend(self.loaded.map(|loaded| say(ToLeader::Loaded(loaded))));
        if self.leaving {
            out.push(say(ToLeader::Leaving));
        }
    }

    /// Does what the leader of this connection says.
    fn obey(&mut self, now: Instant, link: LinkId, epoch: u64, message: ToRank, out: &mut Vec<AgentAction>) {
        match message {
            ToRank::Form { num_blocks, members } => {
                let may = self.epoch.is_none() && self.outstanding == 0 && epoch > self.last_epoch;
                if !may {
                    self.report.stale_messages += 1;
                    return;
                }
                (self.epoch, self.last_epoch) = (Some(epoch), epoch);
                self.report.num_blocks = num_blocks;
                self.compute(epoch, Job::Form { num_blocks, members }, Phase::Forming, out);
            }
            ToRank::Step(step) if self.epoch == Some(epoch) && self.giving_up.is_none() => {
                self.step = step.plan.step;
                self.compute(epoch, Job::Step(step), Phase::Computing, out);
            }
            ToRank::Poison { blocks } if self.epoch == Some(epoch) && self.giving_up.is_none() => {
                self.compute(epoch, Job::Poison(blocks), Phase::Computing, out);
            }
            ToRank::Abort if epoch >= self.last_epoch => self.give_up(now, out),
            ToRank::Heartbeat(news) => {
                self.report.ready = news.ready;
                self.report.ranks_up = news.ranks_up;
                self.report.reasons = news.reasons;
            }
            ToRank::Release if self.leaving => out.push(AgentAction::Exit(Ending::Left)),
            // It has loaded and lacks something, memory for example, that is measured once in the life of a process.
            ToRank::Refuse { reason } => {
                out.push(AgentAction::Close { link });
                self.retry = LAST_RETRY;
                let reason = format!("the leader refused this rank: {reason}");
                self.lose_leader(now, reason.clone(), out);
                out.push(AgentAction::Exit(Ending::Unfit(reason)));
            }
            ToRank::Step(_)
            | ToRank::Poison { .. }
            | ToRank::Abort
            | ToRank::Welcome { .. }
            | ToRank::Release => {
                self.report.stale_messages += 1;
            }
        }
    }

    fn compute(&mut self, epoch: u64, job: Job, phase: Phase, out: &mut Vec<AgentAction>) {
        self.outstanding += 1;
        self.phase = phase;
        out.push(AgentAction::Compute { epoch, job });
    }

    /// The live epoch is over; says so to the leader when nothing of it runs any more.
    fn give_up(&mut self, now: Instant, out: &mut Vec<AgentAction>) {
        if self.giving_up.is_none() {
            self.giving_up = Some((now, self.last_epoch));
            out.push(AgentAction::Abort { epoch: self.last_epoch });
        }
        self.epoch = None;
        self.report.ready = false;
        self.rest_if_idle(now, out);
    }

    fn rest_if_idle(&mut self, now: Instant, out: &mut Vec<AgentAction>) {
        if self.outstanding > 0 || self.giving_up.is_none() {
            return;
        }
        self.giving_up = None;
        match self.call {
            Call::Member { link, .. } => {
                out.push(AgentAction::Send { link, epoch: self.last_epoch, message: ToLeader::Idle });
            }
            // A leader that went away is looked for at once.
            Call::None { .. } => self.call = Call::None { retry_at: now },
            Call::Dialling | Call::Asked { .. } => {}
        }
    }

    fn lose_leader(&mut self, now: Instant, reason: String, out: &mut Vec<AgentAction>) {
        if self.leaving {
            return out.push(AgentAction::Exit(Ending::Left));
        }
        let was_in_epoch = self.epoch.is_some();
        self.call_later(now, reason);
        self.report.ranks_up.clear();
        if was_in_epoch {
            self.give_up(now, out);
        }
    }

    fn call_later(&mut self, now: Instant, reason: String) {
        if self.report.reasons.first() != Some(&reason) {
            tracing::warn!(rank = self.config.rank, reason, "not part of a group");
        }
        self.report.ready = false;
        self.report.reasons = vec![reason];
        self.call = Call::None { retry_at: now + self.retry };
        self.retry = (self.retry * 2).min(LAST_RETRY);
    }
}
