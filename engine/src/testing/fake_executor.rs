//! An executor over a simulated paged KV store: each slot remembers the position and token that were written
//! to it, and a row's logits are computed from what the block table leads to. Anything stale, missing,
//! poisoned or misplaced is found here.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::fake_group::{FakeGroup, GroupFaults, Moment};
use super::oracle::{hash, logit, pick, repeat};
use super::{VOCAB, oracle};
use crate::config::EngineConfig;
use crate::error::{ExecutorError, ExecutorErrorKind, RowError};
use crate::executor::{Begun, Executor, ExecutorStatus, SampledToken, StepOutput};
use crate::sample_row::{Draw, OwnedRow, RowKind, SampleRow};
use crate::step_plan::{PlannedSequence, StepPlan};
use crate::stream::TokenLogprobs;

/// What shall go wrong, and what was seen; shared with the test.
#[derive(Default)]
pub(crate) struct Faults {
    /// A row right after this token answers `NotFinite`. 0 is none.
    pub(crate) bad_token: AtomicU64,
    /// The step of this number (from 1) panics. 0 is none.
    pub(crate) panic_at: AtomicU64,
    /// Steps of a number divisible by this fail. 0 is none.
    pub(crate) fail_every: AtomicU64,
    pub(crate) fail_fatally: AtomicBool,
    /// Steps are begun, and computed only when they are finished.
    pub(crate) computes_beside: AtomicBool,
    /// Steps whose tokens the next one could take.
    pub(crate) steps_overtaken: AtomicU64,
    /// Called while a step that was begun is under way.
    pub(crate) meanwhile: Mutex<Option<Box<dyn FnMut() + Send>>>,
    /// Milliseconds that each step takes.
    pub(crate) step_ms: AtomicU64,
    pub(crate) steps: AtomicU64,
    pub(crate) aborts: AtomicU64,
    /// Rows that scored a prompt token.
    pub(crate) scored_rows: AtomicU64,
    pub(crate) group: GroupFaults,
}

pub(crate) struct FakeExecutor {
    config: EngineConfig,
    max_logits_rows: usize,
    /// `None` is NaN.
    slots: Vec<Option<Slot>>,
    group: FakeGroup,
    /// What the device is to do, in order.
    queue: VecDeque<Order>,
    /// What each row of the last step drew.
    drawn: Vec<u32>,
    faults: Arc<Faults>,
}

/// What a device has been told.
enum Order {
    Step(StepPlan, Vec<OwnedRow>),
    Poison(Vec<u32>),
}

/// What stands in for one token's KV.
#[derive(Debug, Clone, Copy)]
struct Slot {
    position: u32,
    token: u32,
    /// Of the group that wrote it.
    epoch: u64,
}

/// Memory that nobody has written looks like somebody's KV until it is poisoned.
const GARBAGE: Slot = Slot { position: 0, token: 7, epoch: 0 };

impl FakeExecutor {
    pub(crate) fn new(config: &EngineConfig) -> (Box<Self>, Arc<Faults>) {
        Self::with_logits_rows(config, config.max_logits_rows())
    }

    /// One that is told how many rows of logits a step may ask for.
    pub(crate) fn with_logits_rows(
        config: &EngineConfig,
        max_logits_rows: usize,
    ) -> (Box<Self>, Arc<Faults>) {
        let faults = Arc::new(Faults::default());
        let executor = Self {
            config: config.clone(),
            max_logits_rows,
            slots: vec![Some(GARBAGE); config.num_blocks * config.block_size],
            group: FakeGroup::new(),
            queue: VecDeque::new(),
            drawn: Vec::new(),
            faults: faults.clone(),
        };
        (Box::new(executor), faults)
    }

    fn check_plan(&self, plan: &StepPlan) {
        let config = &self.config;
        assert!(!plan.sequences.is_empty());
        assert!(plan.sequences.len() <= config.max_num_seqs);
        assert!(plan.num_tokens() <= config.max_num_batched_tokens);
        assert!(plan.num_logits_rows() <= self.max_logits_rows);
        assert_eq!(plan.digest(), plan.clone().digest());
        let sources: HashSet<u32> = plan.block_copies.iter().map(|copy| copy.source).collect();
        let destinations: HashSet<u32> = plan.block_copies.iter().map(|copy| copy.destination).collect();
        assert_eq!(destinations.len(), plan.block_copies.len());
        assert!(sources.is_disjoint(&destinations));
        let names: HashSet<_> = plan.sequences.iter().map(|s| (s.request, s.choice)).collect();
        assert_eq!(names.len(), plan.sequences.len(), "a sequence is planned twice");
    }

    /// Puts what the step before drew in its places.
    fn resolve(&self, plan: &mut StepPlan) {
        for sequence in &mut plan.sequences {
            if let Some(row) = sequence.pending_row.take() {
                assert_eq!(sequence.token_ids[0], 0, "a place is kept");
                sequence.token_ids[0] = self.drawn[row as usize];
            }
        }
    }

    fn poison(&mut self, blocks: &[u32]) {
        self.group.assert_whole();
        let size = self.config.block_size;
        for block in blocks {
            self.slots[*block as usize * size..(*block as usize + 1) * size].fill(None);
        }
    }

    fn slot(&self, sequence: &PlannedSequence, position: usize) -> usize {
        let block = sequence.block_table[position / self.config.block_size] as usize;
        block * self.config.block_size + position % self.config.block_size
    }

    fn copy_blocks(&mut self, plan: &StepPlan) {
        let size = self.config.block_size;
        for copy in &plan.block_copies {
            let source = copy.source as usize * size;
            self.slots.copy_within(source..source + size, copy.destination as usize * size);
        }
    }

    fn write(&mut self, plan: &StepPlan) {
        let mut written = HashSet::new();
        for sequence in &plan.sequences {
            assert!(!sequence.token_ids.is_empty());
            assert!(sequence.logits_rows.windows(2).all(|pair| pair[0] < pair[1]));
            for (offset, token) in sequence.token_ids.iter().enumerate() {
                let position = sequence.context_len as usize + offset;
                let slot = self.slot(sequence, position);
                assert!(written.insert(slot), "two sequences write to one slot");
                let (position, epoch) = (position as u32, self.group.epoch());
                self.slots[slot] = Some(Slot { position, token: *token, epoch });
            }
        }
    }

    /// Tokens of positions `0..=position`, read back through the block table.
    fn history(&self, sequence: &PlannedSequence, position: usize) -> Vec<u32> {
        let read = |position: usize| {
            let slot = self.slots[self.slot(sequence, position)].expect("a poisoned slot is read");
            assert_eq!(slot.epoch, self.group.epoch(), "a slot of another epoch is read");
            assert_eq!(slot.position as usize, position, "a slot of another position is read");
            slot.token
        };
        (0..=position).map(read).collect()
    }

    fn answer(&self, history: &[u32], row: &SampleRow<'_>) -> Result<SampledToken, RowError> {
        let bad_token = self.faults.bad_token.load(Ordering::Relaxed) as u32;
        if bad_token > 0 && history.last() == Some(&bad_token) {
            return Err(RowError::NotFinite);
        }
        let token = match &row.kind {
            RowKind::Score { target } => {
                self.faults.scored_rows.fetch_add(1, Ordering::Relaxed);
                *target
            }
            RowKind::Sample(draw) => {
                assert_eq!(draw.key.position as usize, history.len());
                self.draw(history, draw)?
            }
        };
        Ok(SampledToken { token, logprobs: row.logprobs.map(|top| logprobs(history, token, top)) })
    }

    fn draw(&self, history: &[u32], draw: &Draw<'_>) -> Result<u32, RowError> {
        let penalised =
            draw.repetition_penalty != 1.0 || draw.presence_penalty != 0.0 || draw.frequency_penalty != 0.0;
        let distinct: HashSet<u32> = history.iter().copied().collect();
        assert_eq!(draw.used_tokens.len(), if penalised { distinct.len() } else { 0 });
        let adjust = |token: u32, mut logit: f32| {
            if draw.allowed_token_ids.is_some_and(|allowed| !allowed.contains(&token))
                || draw.banned_token_ids.contains(&token)
            {
                return None;
            }
            if let Some(used) = draw.used_tokens.iter().find(|used| used.token == token) {
                logit = repeat(logit, draw.repetition_penalty);
                if used.output_count > 0 {
                    logit -= draw.presence_penalty + draw.frequency_penalty * used.output_count as f32;
                }
            }
            let bias: f32 = draw.logit_bias.iter().filter(|(id, _)| *id == token).map(|(_, bias)| bias).sum();
            Some(logit + bias)
        };
        pick(hash(history), draw.temperature, draw.top_k, draw.key, adjust)
    }
}

/// Made up, but a function of history, token and `top` alone.
pub(crate) fn logprobs(history: &[u32], token: u32, top: usize) -> TokenLogprobs {
    let hash = oracle::hash(history);
    let mut all: Vec<(u32, f32)> = (0..VOCAB).map(|id| (id, logit(hash, id) - 5.0)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let rank = all.iter().position(|(id, _)| *id == token).expect("token is in the vocabulary");
    TokenLogprobs { token, logprob: all[rank].1, rank: rank as u32 + 1, top: all[..top].to_vec() }
}

fn group_lost() -> ExecutorError {
    ExecutorError { message: "told to break".into(), kind: ExecutorErrorKind::GroupLost }
}

impl Executor for FakeExecutor {
    fn run(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        let step = self.faults.steps.fetch_add(1, Ordering::Relaxed) + 1;
        assert_ne!(step, self.faults.panic_at.load(Ordering::Relaxed), "a step that was told to panic");
        std::thread::sleep(std::time::Duration::from_millis(self.faults.step_ms.load(Ordering::Relaxed)));
        self.group.assert_whole();
        self.check_plan(plan);
        if self.group.breaks_at(Moment::BeforeWrites, &self.faults.group) {
            return Err(group_lost());
        }
        self.copy_blocks(plan);
        self.write(plan);
        if self.group.breaks_at(Moment::AfterWrites, &self.faults.group) {
            return Err(group_lost());
        }
        let every = self.faults.fail_every.load(Ordering::Relaxed);
        if every > 0 && step.is_multiple_of(every) {
            let fatal = self.faults.fail_fatally.load(Ordering::Relaxed);
            let kind = if fatal { ExecutorErrorKind::Fatal } else { ExecutorErrorKind::Step };
            return Err(ExecutorError { message: "told to fail".into(), kind });
        }

        let (mut histories, mut owners) = (Vec::new(), Vec::new());
        for sequence in &plan.sequences {
            // The whole context is read in every step, as attention does.
            self.history(sequence, sequence.context_len as usize + sequence.token_ids.len() - 1);
            for offset in &sequence.logits_rows {
                histories.push(self.history(sequence, (sequence.context_len + offset) as usize));
                owners.push(sequence.request);
            }
        }
        assert_eq!(histories.len(), plan.num_logits_rows());
        let answers: Vec<_> =
            rows.iter().map(|row| self.answer(&histories[row.logits_row as usize], row)).collect();
        let drew = rows
            .iter()
            .zip(&answers)
            .filter(|(row, answer)| matches!(row.kind, RowKind::Sample(_)) && answer.is_ok());
        let drew = drew.map(|(row, _)| owners[row.logits_row as usize]).collect();
        // A row that cannot be drawn leaves something behind too.
        self.drawn =
            answers.iter().map(|answer| answer.as_ref().map_or(VOCAB - 1, |answer| answer.token)).collect();
        self.group.ran(plan.sequences.iter().map(|sequence| sequence.request), drew, &self.faults.group);
        Ok(StepOutput { rows: answers, ..StepOutput::default() })
    }

    fn begin(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<Begun, ExecutorError> {
        if !self.faults.computes_beside.load(Ordering::Relaxed) {
            return Ok(Begun::Nothing);
        }
        self.group.assert_whole();
        let pending = self.queue.iter().filter(|order| matches!(order, Order::Step(..))).count();
        assert!(pending < 2, "two steps are begun and not finished");
        let takes_tokens = plan.sequences.iter().any(|sequence| sequence.pending_row.is_some());
        assert!(pending == 1 || !takes_tokens, "tokens of a step that is over");
        self.faults.steps_overtaken.fetch_add(pending as u64, Ordering::Relaxed);
        self.queue.push_back(Order::Step(plan.clone(), rows.iter().map(OwnedRow::of).collect()));
        // Of a step whose rows are not all draws a device would have to be asked by another number.
        Ok(Begun::Step { keeps_tokens: rows.iter().all(|row| matches!(row.kind, RowKind::Sample(_))) })
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        if let Some(meanwhile) = self.faults.meanwhile.lock().expect("no test panics in it").as_mut() {
            meanwhile();
        }
        loop {
            match self.queue.pop_front().expect("a step was begun") {
                Order::Poison(blocks) => self.poison(&blocks),
                Order::Step(mut plan, rows) => {
                    self.resolve(&mut plan);
                    let rows: Vec<SampleRow<'_>> = rows.iter().map(OwnedRow::borrow).collect();
                    return self.run(&plan, &rows);
                }
            }
        }
    }

    fn poll(&mut self, in_flight: usize) -> ExecutorStatus {
        let epoch = self.group.epoch();
        let status = self.group.poll(in_flight, &self.faults.group);
        if self.group.epoch() != epoch {
            // The new memory is full of what looks like the KV of others.
            self.slots.rotate_left(self.config.block_size);
            self.slots.iter_mut().for_each(|slot| {
                slot.get_or_insert(GARBAGE);
            });
        }
        status
    }

    fn abort(&mut self) {
        self.group.abort();
        self.queue.clear();
        self.faults.aborts.fetch_add(1, Ordering::Relaxed);
    }

    fn poison_blocks(&mut self, blocks: &[u32]) {
        match self.faults.computes_beside.load(Ordering::Relaxed) {
            true => self.queue.push_back(Order::Poison(blocks.to_vec())),
            false => self.poison(blocks),
        }
    }
}
