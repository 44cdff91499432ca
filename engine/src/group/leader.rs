//! The leader's half of the group protocol: a state machine without sockets, threads or clock.
//!
//! ```text
//!             all ranks here, loaded, idle                all connected
//!   joining ────────────────────────────────▶ forming ────────────────────▶ ready
//!      ▲                                          │                           │
//!      └──────── a rank is gone, silent, stuck or leaves: abort ◀─────────────┘
//! ```
//! What happens comes in as calls with the time ([`Leader::connected`], [`Leader::message`], [`Leader::closed`],
//! [`Leader::tick`]), what is to be done goes out as [`Action`]s. So a simulation drives it as the sockets do.
//!
//! Invariants: there is at most one epoch that is not aborted; an epoch begins only when every rank has said that nothing of an
//! older one runs in it; a message of another epoch or incarnation changes nothing and is counted.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use tandem_wire::Incarnation;

use super::message::{Answer, GroupNews, Hello, Loaded, MemberAddress, Phase, Term, ToLeader, ToRank};

/// How often both sides show that they live.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(500);
/// Silence that counts as death.
pub(crate) const SILENCE: Duration = Duration::from_millis(2500);
/// How long a new connection may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// How long ranks may take to connect to each other and to take what a step needs: on many GPUs steps are recorded meanwhile. One that
/// is gone or silent ends it before.
const FORMING: Duration = Duration::from_secs(180);
/// Epochs begin at most so often: what ends one at once may end the next one, too.
const REST: Duration = Duration::from_secs(1);
/// How long a rank may take to give up a step; longer than its own watchdog, which ends a process that hangs.
const GIVING_UP: Duration = Duration::from_secs(15);
/// How long requests hold up a rank that wants to leave.
const LEAVING: Duration = Duration::from_secs(110);
/// Connections that have not said who they are; more are turned away.
const MAX_STRANGERS: usize = 64;
/// Steps that may be under way at once.
const MAX_ANSWERS: usize = 2;
/// How much of what a peer says goes into logs and answers.
const MAX_QUOTED: usize = 256;
/// Epochs of a process that says it has been in more are made up, unless this leader has been there itself.
pub(crate) const MAX_EPOCH: u64 = 1 << 62;

/// A connection, numbered by whoever owns the sockets.
pub(crate) type LinkId = u64;

/// What the owner of the sockets is to do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    Send {
        link: LinkId,
        epoch: u64,
        message: ToRank,
    },
    /// Whatever was sent before may still go out.
    Close {
        link: LinkId,
    },
}

/// Where the group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Ranks are missing, load, or still give up the last epoch.
    Joining,
    /// All connect to each other, since this moment.
    Forming(Instant),
    Ready,
}

/// Sizes and terms that do not change.
#[derive(Debug, Clone)]
pub(crate) struct LeaderConfig {
    /// Ranks of the group.
    pub(crate) size: usize,
    /// Ranks of one pod: rank `r` is in the pod of ordinal `r / gpus_per_pod`.
    pub(crate) gpus_per_pod: usize,
    /// What every rank must agree to.
    pub(crate) terms: Vec<Term>,
    /// KV blocks that the leader would like; ranks may have room for fewer.
    pub(crate) wanted_blocks: u64,
    /// Where clients find the leader.
    pub(crate) leader_http: String,
}

#[derive(Debug)]
pub(crate) struct Leader {
    config: LeaderConfig,
    epoch: u64,
    state: State,
    strangers: HashMap<LinkId, Stranger>,
    /// By rank.
    members: Vec<Option<Member>>,
    /// Why the member that is not there is not, as far as is known.
    absences: Vec<String>,
    /// Fixed when the group first forms: the engine's block manager counts on it.
    num_blocks: Option<u64>,
    next_heartbeat: Instant,
    /// When the next epoch may begin.
    rest_until: Instant,
    /// Those that nobody has taken yet, at most [`MAX_ANSWERS`].
    answers: VecDeque<Answer>,
    counters: Counters,
    /// Why the last epoch ended.
    last_break: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counters {
    /// Messages of another epoch or incarnation.
    pub(crate) stale_messages: u64,
    /// Connections that were refused.
    pub(crate) refusals: u64,
    /// Epochs that ended.
    pub(crate) breaks: u64,
}

/// A connection that has not said who it is.
#[derive(Debug)]
struct Stranger {
    /// Where it comes from, without the port.
    host: String,
    since: Instant,
}

#[derive(Debug)]
struct Member {
    link: LinkId,
    incarnation: Incarnation,
    /// Where its peers reach it.
    address: String,
    last_epoch: u64,
    loaded: Option<Loaded>,
    last_heard: Instant,
    /// Nothing of any epoch runs in it.
    idle: bool,
    /// Connected to all others of this epoch.
    formed: bool,
    /// When it was told to give up its epoch, until it says that it has.
    aborted: Option<Instant>,
    leaving: Option<Instant>,
    step: u64,
    phase: Phase,
}

impl Leader {
    pub(crate) fn new(config: LeaderConfig, now: Instant) -> Self {
        let size = config.size;
        Self {
            config,
            epoch: 0,
            state: State::Joining,
            strangers: HashMap::new(),
            members: (0..size).map(|_| None).collect(),
            absences: vec!["has not called".to_owned(); size],
            num_blocks: None,
            next_heartbeat: now,
            rest_until: now,
            answers: VecDeque::new(),
            counters: Counters::default(),
            last_break: None,
        }
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// The live epoch while ready, else the last one.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// KV blocks of every rank; known once the group has formed for the first time.
    pub(crate) fn num_blocks(&self) -> Option<u64> {
        self.num_blocks
    }

    /// Why the last epoch ended.
    pub(crate) fn last_break(&self) -> Option<&str> {
        self.last_break.as_deref()
    }

    /// Connections of the members, in the order of ranks.
    pub(crate) fn links(&self) -> impl Iterator<Item = LinkId> {
        self.members.iter().flatten().map(|member| member.link)
    }

    /// Ranks of the group.
    pub(crate) fn size(&self) -> usize {
        self.config.size
    }

    pub(crate) fn num_pods(&self) -> usize {
        self.config.size / self.config.gpus_per_pod
    }

    /// Whether no rank of a pod is a member.
    pub(crate) fn misses_pod(&self, ordinal: usize) -> bool {
        let local = self.config.gpus_per_pod;
        self.members[ordinal * local..(ordinal + 1) * local].iter().all(Option::is_none)
    }

    pub(crate) fn leader_http(&self) -> &str {
        &self.config.leader_http
    }

    pub(crate) fn rank_is_up(&self, rank: usize) -> bool {
        self.members[rank].is_some()
    }

    pub(crate) fn loaded(&self, rank: usize) -> Option<Loaded> {
        self.members[rank].as_ref()?.loaded
    }

    /// Whether a rank waits to leave.
    pub(crate) fn wants_rest(&self) -> bool {
        self.members.iter().flatten().any(|member| member.leaving.is_some())
    }

    /// Whether a rank has yet to give up a step of an epoch that ended.
    pub(crate) fn is_giving_up(&self) -> bool {
        self.members.iter().flatten().any(|member| member.aborted.is_some())
    }

    /// What is missing before steps can run, a line for each rank; empty when ready.
    pub(crate) fn missing(&self) -> Vec<String> {
        if self.state == State::Ready {
            return Vec::new();
        }
        let line = |(rank, member): (usize, &Option<Member>)| {
            let reason = match member {
                None => self.absences[rank].as_str(),
                Some(member) if member.leaving.is_some() => "is leaving",
                Some(member) if member.loaded.is_none() => "is loading",
                Some(member) if member.aborted.is_some() => "is giving up its last step",
                Some(member) if self.state != State::Joining && !member.formed => {
                    "is connecting to the others"
                }
                Some(_) => return None,
            };
            Some(format!("{} {reason}", self.name(rank)))
        };
        self.members.iter().enumerate().filter_map(line).collect()
    }

    /// A connection was turned away before it could say anything: it has another key, for example.
    pub(crate) fn rejected(&mut self) {
        self.counters.refusals += 1;
    }

    /// A connection was accepted and authenticated; `host` is where it comes from.
    pub(crate) fn connected(&mut self, now: Instant, link: LinkId, host: String, out: &mut Vec<Action>) {
        if self.strangers.len() >= MAX_STRANGERS {
            out.push(Action::Close { link });
            return;
        }
        self.strangers.insert(link, Stranger { host, since: now });
    }

    /// A message came over a connection.
    pub(crate) fn message(
        &mut self,
        now: Instant,
        link: LinkId,
        (epoch, sender): (u64, Incarnation),
        message: ToLeader,
        out: &mut Vec<Action>,
    ) {
        if let Some(stranger) = self.strangers.remove(&link) {
            match message {
                ToLeader::Hello(hello) => self.greet(now, link, &stranger.host, sender, hello, out),
                _ => out.push(Action::Close { link }),
            }
            return;
        }
        let Some(rank) = self.rank_of(link) else { return };
        let member = self.members[rank].as_mut().expect("a link's rank is a member");
        if member.incarnation != sender {
            self.counters.stale_messages += 1;
            return;
        }
        member.last_heard = now;
        match message {
            // Once is enough.
            ToLeader::Hello(_) => self.drop_member(now, rank, "said hello twice", out),
            ToLeader::Loaded(loaded) => self.take_loaded(now, rank, loaded, out),
            ToLeader::Heartbeat { step, phase } => (member.step, member.phase) = (step, phase),
            ToLeader::Leaving => {
                member.leaving.get_or_insert(now);
                tracing::info!(rank, "a rank wants to leave");
            }
            _ if epoch != self.epoch => self.counters.stale_messages += 1,
            ToLeader::Idle => {
                (member.idle, member.aborted) = (true, None);
                self.form_if_whole(now, out);
            }
            _ if member.aborted.is_some() => self.counters.stale_messages += 1,
            ToLeader::Formed => {
                member.formed = true;
                self.begin_if_formed();
            }
            ToLeader::NotFormed { reason } => {
                let reason = format!("{} could not join the others: {}", self.name(rank), quoted(&reason));
                self.end_epoch(now, reason, out);
            }
            ToLeader::Answer(answer) if rank == 0 => {
                member.step = answer.step;
                if self.answers.len() == MAX_ANSWERS {
                    self.answers.pop_front();
                    self.counters.stale_messages += 1;
                }
                self.answers.push_back(answer);
            }
            ToLeader::Answer(_) => self.counters.stale_messages += 1,
            ToLeader::StepFailed { step, reason } => {
                let reason = format!("{} failed in step {step}: {}", self.name(rank), quoted(&reason));
                self.end_epoch(now, reason, out);
            }
        }
    }

    /// A connection ended, or nothing more can be sent over it.
    pub(crate) fn closed(&mut self, now: Instant, link: LinkId, reason: &str, out: &mut Vec<Action>) {
        self.strangers.remove(&link);
        if let Some(rank) = self.rank_of(link) {
            self.drop_member(now, rank, reason, out);
        }
    }

    /// Time has passed: everything that has a deadline.
    pub(crate) fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        self.strangers.retain(|&link, stranger| {
            let waits = now.saturating_duration_since(stranger.since) < GREETING;
            if !waits {
                out.push(Action::Close { link });
            }
            waits
        });
        for rank in 0..self.members.len() {
            let Some(member) = &self.members[rank] else { continue };
            let passed = |since: Instant| now.saturating_duration_since(since);
            if passed(member.last_heard) >= SILENCE {
                let silent_ms = passed(member.last_heard).as_millis();
                self.drop_member(now, rank, &format!("was silent for {silent_ms} ms"), out);
            } else if member.aborted.is_some_and(|since| passed(since) >= GIVING_UP) {
                self.drop_member(now, rank, "did not give up its last step", out);
            }
        }
        if let State::Forming(since) = self.state
            && now.saturating_duration_since(since) >= FORMING
        {
            self.end_epoch(
                now,
                format!("the ranks were not ready for steps in {} s", FORMING.as_secs()),
                out,
            );
        }
        self.form_if_whole(now, out);
        if now >= self.next_heartbeat {
            self.next_heartbeat = now + HEARTBEAT;
            self.send_news(out);
        }
    }

    /// Lets leaving ranks go if nothing holds them up: `in_flight` requests have not ended.
    pub(crate) fn release_leaving(&mut self, now: Instant, in_flight: usize, out: &mut Vec<Action>) {
        let oldest = self.members.iter().flatten().filter_map(|member| member.leaving).min();
        let Some(oldest) = oldest else { return };
        let waited = now.saturating_duration_since(oldest);
        if self.state == State::Ready && in_flight > 0 && waited < LEAVING {
            return;
        }
        let leaving =
            |rank: &usize| self.members[*rank].as_ref().is_some_and(|member| member.leaving.is_some());
        let ranks: Vec<usize> = (0..self.members.len()).filter(leaving).collect();
        self.end_epoch(now, format!("{} leaves", self.name(ranks[0])), out);
        for rank in ranks {
            let link = self.members[rank].as_ref().expect("looked at above").link;
            out.push(Action::Send { link, epoch: self.epoch, message: ToRank::Release });
            self.drop_member(now, rank, "has left", out);
        }
    }

    /// The answer to a step of the live epoch, if it has come. Steps are asked for in their order: what came to earlier ones is dropped.
    pub(crate) fn take_answer(&mut self, step: u64) -> Option<Answer> {
        while self.answers.pop_front_if(|answer| answer.step < step).is_some() {}
        self.answers.pop_front_if(|answer| answer.step == step)
    }

    /// The step that was sent takes longer than it may.
    pub(crate) fn step_overdue(&mut self, now: Instant, step: u64, waited: Duration, out: &mut Vec<Action>) {
        let busy = |(rank, member): (usize, &Option<Member>)| {
            let member = member.as_ref()?;
            let place = match member.phase {
                Phase::Computing => format!("in step {}", member.step),
                Phase::Idle => format!("after step {}", member.step),
                Phase::Loading | Phase::Forming => "elsewhere".to_owned(),
            };
            Some(format!("{} {place}", self.name(rank)))
        };
        let busy: Vec<String> = self.members.iter().enumerate().filter_map(busy).collect();
        let reason = format!("step {step} was not done in {} s ({})", waited.as_secs(), busy.join(", "));
        self.end_epoch(now, reason, out);
    }

    /// How messages and people call a rank.
    pub(crate) fn name(&self, rank: usize) -> String {
        match self.config.gpus_per_pod {
            1 => format!("ordinal {rank}"),
            local => format!("ordinal {} rank {rank}", rank / local),
        }
    }

    fn rank_of(&self, link: LinkId) -> Option<usize> {
        self.members.iter().position(|member| member.as_ref().is_some_and(|member| member.link == link))
    }

    /// Takes a stranger in, or says why not.
    fn greet(
        &mut self,
        now: Instant,
        link: LinkId,
        host: &str,
        incarnation: Incarnation,
        hello: Hello,
        out: &mut Vec<Action>,
    ) {
        if let Err(reason) = self.admit(now, host, incarnation, &hello, out) {
            tracing::warn!(rank = hello.rank, host, reason, "a rank is refused");
            self.counters.refusals += 1;
            let rank = hello.rank as usize;
            if self.members.get(rank).is_some_and(Option::is_none) {
                self.absences[rank] = format!("was refused: {reason}");
            }
            out.push(Action::Send { link, epoch: self.epoch, message: ToRank::Refuse { reason } });
            out.push(Action::Close { link });
            return;
        }
        let rank = hello.rank as usize;
        tracing::info!(rank, host, %incarnation, "a rank joins");
        self.members[rank] = Some(Member {
            link,
            incarnation,
            address: join_host_port(host, hello.port),
            last_epoch: hello.last_epoch,
            loaded: None,
            last_heard: now,
            // A rank calls only when nothing of an older epoch runs in it.
            idle: true,
            formed: false,
            aborted: None,
            leaving: None,
            step: 0,
            phase: Phase::Loading,
        });
        let leader_http = self.config.leader_http.clone();
        out.push(Action::Send { link, epoch: self.epoch, message: ToRank::Welcome { leader_http } });
    }

    /// Whether a rank may join; makes room where its own older connection is in the way.
    fn admit(
        &mut self,
        now: Instant,
        host: &str,
        incarnation: Incarnation,
        hello: &Hello,
        out: &mut Vec<Action>,
    ) -> Result<(), String> {
        let rank = hello.rank as usize;
        if rank >= self.config.size {
            return Err(format!(
                "rank {rank} is outside of a group of {}: check ordinal and tensor-parallel-size on both sides",
                self.config.size
            ));
        }
        if hello.last_epoch > MAX_EPOCH.max(self.epoch) {
            return Err(format!("{} says that it was part of epoch {}", self.name(rank), hello.last_epoch));
        }
        compare_terms(&self.config.terms, &hello.terms, &self.name(rank), host)?;
        match &self.members[rank] {
            Some(member) if member.incarnation == incarnation => {
                self.drop_member(now, rank, "called again", out);
                Ok(())
            }
            Some(member) => Err(format!(
                "{} is taken by {} (incarnation {}), which lives; this is incarnation {incarnation}",
                self.name(rank),
                member.address,
                member.incarnation
            )),
            None => Ok(()),
        }
    }

    fn take_loaded(&mut self, now: Instant, rank: usize, loaded: Loaded, out: &mut Vec<Action>) {
        let needed = self.num_blocks.unwrap_or(1);
        if loaded.max_blocks < needed {
            let has = loaded.max_blocks;
            let reason = format!("has memory for {has} KV blocks, the group uses {needed}");
            let link = self.members[rank].as_ref().expect("a member has loaded").link;
            out.push(Action::Send {
                link,
                epoch: self.epoch,
                message: ToRank::Refuse { reason: reason.clone() },
            });
            self.counters.refusals += 1;
            return self.drop_member(now, rank, &format!("was refused: {reason}"), out);
        }
        self.members[rank].as_mut().expect("a member has loaded").loaded = Some(loaded);
        self.form_if_whole(now, out);
    }

    /// Begins an epoch if everybody is there and has nothing else to do.
    fn form_if_whole(&mut self, now: Instant, out: &mut Vec<Action>) {
        let ready = |member: &Option<Member>| {
            member.as_ref().is_some_and(|m| m.loaded.is_some() && m.idle && m.leaving.is_none())
        };
        let rests = now < self.rest_until;
        if rests || self.state != State::Joining || !self.members.iter().all(ready) {
            return;
        }
        self.rest_until = now + REST;
        let members = || self.members.iter().flatten();
        let highest = members().map(|member| member.last_epoch).max().unwrap_or(0);
        let room = members().filter_map(|member| Some(member.loaded?.max_blocks)).min().unwrap_or(0);
        let num_blocks = *self.num_blocks.get_or_insert(room.min(self.config.wanted_blocks));
        self.epoch = self.epoch.max(highest) + 1;
        self.state = State::Forming(now);
        let addresses: Vec<MemberAddress> = self
            .members
            .iter()
            .flatten()
            .map(|m| MemberAddress { address: m.address.clone(), incarnation: m.incarnation })
            .collect();
        for member in self.members.iter_mut().flatten() {
            (member.idle, member.formed, member.last_epoch) = (false, false, self.epoch);
            let message = ToRank::Form { num_blocks, members: addresses.clone() };
            out.push(Action::Send { link: member.link, epoch: self.epoch, message });
        }
        tracing::info!(epoch = self.epoch, ranks = self.config.size, "forming the group");
    }

    fn begin_if_formed(&mut self) {
        let formed = self.members.iter().all(|member| member.as_ref().is_some_and(|member| member.formed));
        if matches!(self.state, State::Forming(_)) && formed {
            self.state = State::Ready;
            tracing::info!(epoch = self.epoch, ranks = self.config.size, "the group is ready");
        }
    }

    /// A member is gone for the group, whatever its connection does.
    fn drop_member(&mut self, now: Instant, rank: usize, reason: &str, out: &mut Vec<Action>) {
        let Some(member) = self.members[rank].take() else { return };
        self.absences[rank] = match member.leaving {
            Some(_) => "has left".to_owned(),
            None => reason.to_owned(),
        };
        out.push(Action::Close { link: member.link });
        let reason = format!("{} {}", self.name(rank), self.absences[rank]);
        self.end_epoch(now, reason, out);
    }

    /// Ends the live epoch, if there is one: every member gives it up and says so.
    fn end_epoch(&mut self, now: Instant, reason: String, out: &mut Vec<Action>) {
        if self.state == State::Joining {
            return;
        }
        tracing::warn!(epoch = self.epoch, reason, "the group breaks");
        self.state = State::Joining;
        self.answers.clear();
        self.counters.breaks += 1;
        self.last_break = Some(reason);
        for member in self.members.iter_mut().flatten() {
            member.formed = false;
            member.aborted = Some(now);
            out.push(Action::Send { link: member.link, epoch: self.epoch, message: ToRank::Abort });
        }
        self.send_news(out);
    }

    fn send_news(&self, out: &mut Vec<Action>) {
        let news = GroupNews {
            ready: self.state == State::Ready && !self.wants_rest(),
            reasons: self.missing(),
            ranks_up: self.members.iter().map(Option::is_some).collect(),
        };
        for member in self.members.iter().flatten() {
            let message = ToRank::Heartbeat(news.clone());
            out.push(Action::Send { link: member.link, epoch: self.epoch, message });
        }
    }
}

/// The first thing on which the two sides do not agree, with what each has.
fn compare_terms(ours: &[Term], theirs: &[Term], name: &str, host: &str) -> Result<(), String> {
    for our in ours {
        let their = theirs.iter().find(|their| their.name == our.name).map_or("nothing", |t| &t.value);
        if their != our.value {
            let their = quoted(their);
            return Err(format!("{}: {name} ({host}) has {their}, the leader {}", our.name, our.value));
        }
    }
    Ok(())
}

/// What a peer said, or its beginning.
fn quoted(text: &str) -> &str {
    text.char_indices().nth(MAX_QUOTED).map_or(text, |(end, _)| &text[..end])
}

/// `host:port`, with brackets around an IPv6 address.
fn join_host_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}
