//! The whole group protocol in simulated time: a leader, its ranks and the network between them, all from one seed.
//!
//! What runs is [`Leader`] and [`Agent`] themselves; only sockets, clocks and the model are made up. Connections delay, stall and
//! break; ranks and the leader are killed, paused, hung and doubled. The made-up model remembers in which epoch each token was
//! written, so a step on KV of another epoch is found. A seed that fails is printed and replays by
//! `TANDEM_SIM_SEED=… cargo test --package tandem-engine simulation`.
//!
//! Held in every run: an answer that is taken belongs to the live epoch and to a step that all of its ranks computed; no two epochs
//! compute at once; the stream has every token once and in order; and when faults end, the stream does too.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use tandem_wire::Incarnation;

use super::agent::{Agent, AgentAction, AgentConfig, Done, Job};
use super::leader::{Action, Leader, LeaderConfig, LinkId, State};
use super::message::{Answer, Loaded, Step, Term, ToLeader, ToRank};
use crate::executor::SampledToken;
use crate::step_plan::{PlannedSequence, StepPlan};
use crate::testing::{Rng, mix};

const TICK: Duration = Duration::from_millis(20);
/// Faults happen until then.
const FAULTS_END: Duration = Duration::from_secs(30);
/// Then the stream must come to its end.
const PATIENCE: Duration = Duration::from_secs(300);
const TOKENS: usize = 400;
/// The least that a computed step takes.
const STEP_DEADLINE: Duration = Duration::from_secs(10);

type Origin = (u64, Incarnation);

/// A connection, with what is on its way in both directions.
#[derive(Default)]
struct Link {
    to_leader: VecDeque<(Duration, Origin, ToLeader)>,
    to_rank: VecDeque<(Duration, Origin, ToRank)>,
    /// Nothing arrives before this time; what was sent is not lost.
    stalled_until: Duration,
    /// Broken, and when each side notices.
    broken: Option<(Duration, Duration)>,
    /// The leader has been told of it.
    announced: bool,
}

/// One process of a rank.
struct Rank {
    number: usize,
    agent: Agent,
    incarnation: Incarnation,
    link: Option<LinkId>,
    dials_at: Option<Duration>,
    loads_at: Option<Duration>,
    paused_until: Duration,
    jobs: VecDeque<(u64, Job)>,
    /// When the job in front is done, if nothing else is in the way.
    busy_until: Duration,
    aborted: u64,
    hangs: bool,
    /// Tokens in its KV, and the epoch that wrote them.
    kv: (u64, Vec<u32>),
    /// What its last step drew.
    drawn: Option<u32>,
    /// The epoch in which a step of it failed.
    failed: u64,
}

struct World {
    rng: Rng,
    now: Duration,
    base: Instant,
    size: usize,
    leader: Option<Leader>,
    leader_life: Incarnation,
    leader_back: Duration,
    leader_paused: Duration,
    ranks: Vec<Rank>,
    /// Ranks to be started again, and when.
    returns: Vec<(Duration, usize)>,
    links: BTreeMap<LinkId, Link>,
    next_id: u64,
    /// Ranks that have begun a step or a forming, by epoch and number of the step or hash of the members.
    begun: HashMap<(u64, u64), Vec<Incarnation>>,
    tokens: Vec<u32>,
    /// Steps that run, at most two.
    running: VecDeque<RunningStep>,
    next_step: u64,
    /// How many tokens the KV of the live epoch holds once these are over.
    planned: (u64, usize),
    /// Steps that were sent before the last was over, and steps that failed on a rank.
    overlapped: usize,
    failures: usize,
    /// Of this leader's life, and how many there were before it.
    epochs: Vec<u64>,
    num_epochs: usize,
}

/// A step that all ranks were sent.
struct RunningStep {
    number: u64,
    epoch: u64,
    since: Duration,
    /// What it should yield.
    token: u32,
}

fn token_after(tokens: &[u32]) -> u32 {
    tokens.iter().fold(17u32, |hash, token| hash.wrapping_mul(31).wrapping_add(*token)) % 1000
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let size = 2 + rng.below(3);
        let base = Instant::now();
        let mut world = Self {
            now: Duration::ZERO,
            base,
            size,
            leader: None,
            leader_life: Incarnation(0),
            leader_back: Duration::ZERO,
            leader_paused: Duration::ZERO,
            ranks: Vec::new(),
            returns: (0..size).map(|rank| (Duration::from_millis(rng.below(500) as u64), rank)).collect(),
            links: BTreeMap::new(),
            next_id: 1,
            begun: HashMap::new(),
            tokens: vec![5],
            running: VecDeque::new(),
            next_step: 0,
            planned: (0, 0),
            overlapped: 0,
            failures: 0,
            epochs: Vec::new(),
            num_epochs: 0,
            rng,
        };
        world.start_leader();
        world
    }

    fn instant(&self) -> Instant {
        self.base + self.now
    }

    fn soon(&mut self, most_ms: usize) -> Duration {
        self.now + Duration::from_millis(1 + self.rng.below(most_ms) as u64)
    }

    fn start_leader(&mut self) {
        let config = LeaderConfig {
            size: self.size,
            gpus_per_pod: 1,
            terms: vec![Term { name: "model".into(), value: "m".into() }],
            wanted_blocks: 100,
            leader_http: "leader:8000".into(),
        };
        self.next_id += 1;
        self.leader_life = Incarnation(u128::from(self.next_id) << 64);
        self.leader = Some(Leader::new(config, self.instant()));
        // A new leader knows nothing: its stream is the engine's, which starts anew with it.
        self.running.clear();
        self.planned = (0, 0);
        self.num_epochs += self.epochs.drain(..).count();
    }

    fn start_rank(&mut self, number: usize) {
        self.next_id += 1;
        let incarnation = Incarnation(u128::from(self.next_id));
        let terms = vec![Term { name: "model".into(), value: "m".into() }];
        let config = AgentConfig { rank: number as u32, port: 7401, terms };
        let loads_at = self.soon(2000);
        self.ranks.push(Rank {
            number,
            agent: Agent::new(config, self.instant()),
            incarnation,
            link: None,
            dials_at: None,
            loads_at: Some(loads_at),
            paused_until: Duration::ZERO,
            jobs: VecDeque::new(),
            busy_until: Duration::ZERO,
            aborted: 0,
            hangs: false,
            kv: (0, Vec::new()),
            drawn: None,
            failed: 0,
        });
    }

    fn kill_rank(&mut self, index: usize) {
        let rank = self.ranks.remove(index);
        if let Some(link) = rank.link.and_then(|link| self.links.get_mut(&link)) {
            // The system closes a dead process's connections.
            link.broken.get_or_insert((self.now + TICK, self.now));
        }
        let back = self.soon(5000);
        if self.ranks.iter().all(|other| other.number != rank.number) {
            self.returns.push((back, rank.number));
        }
    }

    fn fault(&mut self) {
        if self.now > FAULTS_END || !self.rng.once_in(60) {
            return;
        }
        match self.rng.below(9) {
            0 | 1 if !self.ranks.is_empty() => {
                let index = self.rng.below(self.ranks.len());
                self.kill_rank(index);
            }
            2 if self.leader.is_some() && self.rng.once_in(3) => {
                self.leader = None;
                self.leader_back = self.soon(4000);
                let now = self.now;
                self.links.values_mut().for_each(|link| {
                    link.broken.get_or_insert((now, now + TICK));
                });
            }
            3 if !self.ranks.is_empty() => {
                let index = self.rng.below(self.ranks.len());
                self.ranks[index].paused_until = self.soon(10_000);
            }
            4 if !self.links.is_empty() => {
                let index = self.rng.below(self.links.len());
                let until = self.soon(6000);
                self.links.values_mut().nth(index).expect("it is there").stalled_until = until;
            }
            5 if !self.links.is_empty() => {
                let index = self.rng.below(self.links.len());
                // Each side may notice late: a half-open connection.
                let noticed = (self.soon(8000), self.soon(8000));
                self.links.values_mut().nth(index).expect("it is there").broken.get_or_insert(noticed);
            }
            6 if !self.ranks.is_empty() => {
                let index = self.rng.below(self.ranks.len());
                self.ranks[index].hangs = self.rng.once_in(3);
            }
            7 => {
                let number = self.rng.below(self.size);
                self.start_rank(number);
            }
            8 => self.leader_paused = self.soon(4000),
            _ => {}
        }
    }

    fn step_world(&mut self) {
        self.now += TICK;
        self.fault();
        if self.leader.is_none() && self.now >= self.leader_back {
            self.start_leader();
        }
        let due: Vec<usize> =
            self.returns.extract_if(.., |(at, _)| *at <= self.now).map(|(_, rank)| rank).collect();
        due.into_iter().for_each(|rank| self.start_rank(rank));
        self.run_leader();
        for index in (0..self.ranks.len()).rev() {
            if self.now >= self.ranks[index].paused_until {
                self.run_rank(index);
            }
        }
        self.check_doubles();
    }

    /// The leader's side of every connection, its clock, and the engine on top of it.
    fn run_leader(&mut self) {
        let Some(mut leader) = self.leader.take() else { return };
        if self.now < self.leader_paused {
            self.leader = Some(leader);
            return;
        }
        let (now, instant) = (self.now, self.instant());
        let mut out = Vec::new();
        for id in self.links.keys().copied().collect::<Vec<_>>() {
            let link = self.links.get_mut(&id).expect("it is there");
            if !link.announced {
                link.announced = true;
                leader.connected(instant, id, "host".into(), &mut out);
            }
            while let Some((_, from, message)) =
                link.to_leader.pop_front_if(|(at, _, _)| *at <= now && now >= link.stalled_until)
            {
                leader.message(instant, id, from, message, &mut out);
            }
            if link.broken.is_some_and(|(at, _)| at <= now) {
                leader.closed(instant, id, "is gone", &mut out);
                if link.broken.is_some_and(|(_, at)| at <= now) {
                    self.links.remove(&id);
                }
            }
        }
        leader.tick(instant, &mut out);
        self.drive_stream(&mut leader, &mut out);
        leader.release_leaving(instant, 0, &mut out);
        self.leader = Some(leader);
        self.perform(out);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let from = self.leader_life;
        for action in actions {
            match action {
                Action::Send { link, epoch, message } => {
                    let at = self.soon(30);
                    if let Some(link) = self.links.get_mut(&link).filter(|link| link.broken.is_none()) {
                        let at = link.to_rank.back().map_or(at, |(last, _, _)| at.max(*last));
                        link.to_rank.push_back((at, (epoch, from), message));
                    }
                }
                Action::Close { link } => {
                    // What was sent before still arrives.
                    let at = self.soon(60);
                    if let Some(link) = self.links.get_mut(&link) {
                        let at = link.to_rank.back().map_or(at, |(last, _, _)| at.max(*last));
                        link.broken.get_or_insert((self.now, at + TICK));
                    }
                }
            }
        }
    }

    /// What the engine does: one step after another, anew from its tokens when the epoch changes.
    fn drive_stream(&mut self, leader: &mut Leader, out: &mut Vec<Action>) {
        if leader.state() != State::Ready {
            self.running.clear();
            return;
        }
        let epoch = leader.epoch();
        if self.planned.0 != epoch {
            assert!(
                self.epochs.last().is_none_or(|last| *last < epoch),
                "epochs grow: {:?}, {epoch}",
                self.epochs
            );
            self.epochs.push(epoch);
            self.planned = (epoch, 0);
            self.running.clear();
        }
        while let Some(step) = self.running.front() {
            assert_eq!(step.epoch, epoch);
            let Some(answer) = leader.take_answer(step.number) else {
                let waited = self.now - step.since;
                if waited >= STEP_DEADLINE {
                    leader.step_overdue(self.instant(), step.number, waited, out);
                    self.running.clear();
                    return;
                }
                break;
            };
            let token = answer.rows[0].as_ref().expect("the model answers").token;
            assert_eq!(token, step.token, "the token of another context");
            assert_eq!(self.begun[&(epoch, step.number)].len(), self.size, "all ranks computed it");
            self.tokens.push(token);
            self.running.pop_front();
        }
        let is_full = self.running.len() == 2 || (self.running.len() == 1 && self.rng.once_in(3));
        if is_full || self.tokens.len() + self.running.len() > TOKENS {
            return;
        }
        let context = self.planned.1;
        let mut known = self.tokens.clone();
        known.extend(self.running.iter().map(|step| step.token));
        self.overlapped += self.running.len();
        let (token_ids, pending_row) = match self.running.is_empty() {
            true => (known[context..].to_vec(), None),
            false => (vec![0], Some(0)),
        };
        self.planned.1 += token_ids.len();
        assert_eq!(self.planned.1, known.len(), "every token is planned once");
        let sequence = PlannedSequence {
            context_len: context as u32,
            token_ids,
            pending_row,
            logits_rows: vec![0],
            ..PlannedSequence::default()
        };
        self.next_step += 1;
        let plan = StepPlan {
            step: self.next_step,
            block_size: 16,
            sequences: vec![sequence],
            block_copies: vec![],
        };
        let digest = plan.digest();
        for link in leader.links() {
            let step = Step { plan: plan.clone(), digest, rows: Vec::new() };
            out.push(Action::Send { link, epoch, message: ToRank::Step(Box::new(step)) });
        }
        let token = token_after(&known);
        self.running.push_back(RunningStep { number: self.next_step, epoch, since: self.now, token });
    }

    fn run_rank(&mut self, index: usize) {
        let (now, instant) = (self.now, self.instant());
        let mut out = Vec::new();
        let rank = &mut self.ranks[index];
        if rank.loads_at.take_if(|at| *at <= now).is_some() {
            rank.agent.loaded(Loaded { max_blocks: 100, weight_bytes: 1, read_bytes: 1 }, &mut out);
        }
        if rank.dials_at.take_if(|at| *at <= now).is_some() {
            if self.leader.is_some() {
                self.next_id += 1;
                self.links.insert(self.next_id, Link::default());
                let rank = &mut self.ranks[index];
                rank.link = Some(self.next_id);
                rank.agent.dialled(instant, Ok(self.next_id), &mut out);
            } else {
                rank.agent.dialled(instant, Err("refused".into()), &mut out);
            }
        }
        self.hear(index, &mut out);
        self.compute(index, &mut out);
        self.ranks[index].agent.tick(instant, &mut out);
        self.obey(index, out);
    }

    /// The rank's side of its connection.
    fn hear(&mut self, index: usize, out: &mut Vec<AgentAction>) {
        let (now, instant) = (self.now, self.instant());
        let rank = &mut self.ranks[index];
        let Some((id, link)) = rank.link.and_then(|id| Some((id, self.links.get_mut(&id)?))) else { return };
        while let Some((_, from, message)) =
            link.to_rank.pop_front_if(|(at, _, _)| *at <= now && now >= link.stalled_until)
        {
            rank.agent.message(instant, id, from, message, out);
        }
        if link.broken.is_some_and(|(_, at)| at <= now) && link.to_rank.is_empty() {
            rank.link = None;
            rank.agent.closed(instant, id, "closed", out);
            if link.broken.is_some_and(|(at, _)| at <= now) && self.leader.is_none() {
                self.links.remove(&id);
            }
        }
    }

    /// The computing thread: the job in front, if it can end.
    fn compute(&mut self, index: usize, out: &mut Vec<AgentAction>) {
        let (now, instant, size) = (self.now, self.instant(), self.size);
        let fails = self.now < FAULTS_END && self.rng.once_in(200);
        let rank = &mut self.ranks[index];
        let Some((epoch, job)) = rank.jobs.front().cloned() else { return };
        if rank.hangs {
            return;
        }
        if rank.aborted >= epoch || rank.failed == epoch {
            rank.jobs.pop_front();
            return rank.agent.done(instant, epoch, Done::Aborted, out);
        }
        if now < rank.busy_until {
            return;
        }
        // A job takes all ranks of its epoch, each in this very life.
        let number = match &job {
            // An epoch's number may come again after everybody who knew it is gone: never with the same members.
            Job::Form { members, .. } => {
                members.iter().fold(u64::MAX, |hash, member| mix(hash ^ member.incarnation.0 as u64))
            }
            Job::Step(step) => step.plan.step,
            Job::Poison(_) => unreachable!("the stream poisons nothing"),
        };
        let begun = self.begun.entry((epoch, number)).or_default();
        if !begun.contains(&rank.incarnation) {
            begun.push(rank.incarnation);
        }
        assert!(begun.len() <= size, "an epoch of more ranks than there are");
        if begun.len() < size {
            return;
        }
        rank.jobs.pop_front();
        let done = match job {
            Job::Step(step) if fails => {
                rank.failed = epoch;
                self.failures += 1;
                Done::Stepped { step: step.plan.step, result: Err("told to".into()) }
            }
            Job::Form { .. } => {
                (rank.kv, rank.drawn) = ((epoch, Vec::new()), None);
                Done::Formed(Ok(()))
            }
            Job::Step(step) => {
                let sequence = &step.plan.sequences[0];
                assert_eq!(rank.kv.0, epoch, "KV of another epoch");
                assert_eq!(rank.kv.1.len(), sequence.context_len as usize, "KV of another context");
                match sequence.pending_row {
                    None => rank.kv.1.extend(&sequence.token_ids),
                    Some(row) => {
                        rank.kv.1.push(rank.drawn.filter(|_| row == 0).expect("a step before this one"))
                    }
                }
                let token = SampledToken { token: token_after(&rank.kv.1), logprobs: None };
                rank.drawn = Some(token.token);
                let rows = if rank.number == 0 { vec![Ok(token)] } else { Vec::new() };
                let answer = Answer { step: step.plan.step, forward: Duration::ZERO, rows };
                Done::Stepped { step: step.plan.step, result: Ok(answer) }
            }
            Job::Poison(_) => Done::Poisoned,
        };
        rank.agent.done(instant, epoch, done, out);
    }

    fn obey(&mut self, index: usize, actions: Vec<AgentAction>) {
        let mut ends = false;
        for action in actions {
            match action {
                AgentAction::Dial => {
                    let at = self.soon(300);
                    self.ranks[index].dials_at = Some(at);
                }
                AgentAction::Send { link, epoch, message } => {
                    let (at, from) = (self.soon(30), self.ranks[index].incarnation);
                    if let Some(link) = self.links.get_mut(&link).filter(|link| link.broken.is_none()) {
                        let at = link.to_leader.back().map_or(at, |(last, _, _)| at.max(*last));
                        link.to_leader.push_back((at, (epoch, from), message));
                    }
                }
                AgentAction::Close { link } => {
                    let at = self.soon(60);
                    if let Some(link) = self.links.get_mut(&link) {
                        link.broken.get_or_insert((at, self.now));
                    }
                }
                AgentAction::Compute { epoch, job } => {
                    let until = self.soon(60);
                    let rank = &mut self.ranks[index];
                    assert!(rank.jobs.iter().all(|(other, _)| *other == epoch), "work of two epochs at once");
                    rank.jobs.push_back((epoch, job));
                    rank.busy_until = until;
                }
                AgentAction::Abort { epoch } => {
                    let rank = &mut self.ranks[index];
                    rank.aborted = rank.aborted.max(epoch);
                }
                AgentAction::Exit(_) => ends = true,
            }
        }
        if ends {
            self.kill_rank(index);
        }
    }

    /// Two processes of one rank: the cluster ends one of them, sooner or later.
    fn check_doubles(&mut self) {
        for number in 0..self.size {
            let of_rank: Vec<usize> =
                (0..self.ranks.len()).filter(|&index| self.ranks[index].number == number).collect();
            if of_rank.len() > 1 && self.rng.once_in(150) {
                let index = of_rank[self.rng.below(of_rank.len())];
                self.kill_rank(index);
            }
        }
    }

    fn run(&mut self) {
        while self.tokens.len() <= TOKENS || self.now < FAULTS_END {
            self.step_world();
            let missing = || self.leader.as_ref().map(|leader| (leader.state(), leader.missing()));
            assert!(
                self.now < FAULTS_END + PATIENCE,
                "the stream does not end: {} tokens, {:?}",
                self.tokens.len(),
                missing()
            );
        }
        // Every token once and in order: each follows from those before it.
        for end in 1..self.tokens.len() {
            assert_eq!(self.tokens[end], token_after(&self.tokens[..end]));
        }
    }
}

#[test]
fn a_stream_survives_whatever_a_seed_makes_of_the_world() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("TANDEM_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("TANDEM_SIM_SEEDS").unwrap_or(1000),
    };
    let (mut epochs, mut overlapped, mut failures, runs) = (0, 0, 0, seeds.end - seeds.start);
    for seed in seeds {
        let mut world = World::new(seed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run()));
        if let Err(panic) = outcome {
            eprintln!("TANDEM_SIM_SEED={seed} fails at {:?}", world.now);
            std::panic::resume_unwind(panic);
        }
        epochs += (world.num_epochs + world.epochs.len()) as u64;
        overlapped += world.overlapped as u64;
        failures += world.failures as u64;
    }
    assert!(runs < 10 || failures > runs / 2, "{failures} steps failed in {runs} runs");
    assert!(overlapped > runs * TOKENS as u64 / 4, "{overlapped} steps overlapped in {runs} runs");
    // Faults that break nothing would show nothing.
    assert!(runs < 10 || epochs > 2 * runs, "{epochs} epochs in {runs} runs");
}
