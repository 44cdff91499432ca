//! An executor over a simulated paged KV store: each slot remembers the position and token that were written
//! to it, and a row's logits are computed from what the block table leads to. Anything stale, missing,
//! poisoned or misplaced is found here.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::oracle::{hash, logit, pick, repeat};
use super::{VOCAB, oracle};
use crate::config::EngineConfig;
use crate::error::{ExecutorError, RowError};
use crate::executor::{Executor, SampledToken, StepOutput};
use crate::sample_row::{Draw, RowKind, SampleRow};
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
    /// Milliseconds that each step takes.
    pub(crate) step_ms: AtomicU64,
    pub(crate) steps: AtomicU64,
    pub(crate) aborts: AtomicU64,
}

pub(crate) struct FakeExecutor {
    config: EngineConfig,
    max_logits_rows: usize,
    /// (position, token) by slot; `None` is NaN.
    slots: Vec<Option<(u32, u32)>>,
    faults: Arc<Faults>,
}

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
        // Fresh memory looks like somebody's KV until it is poisoned.
        let slots = vec![Some((0, 7)); config.num_blocks * config.block_size];
        (Box::new(Self { config: config.clone(), max_logits_rows, slots, faults: faults.clone() }), faults)
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
                self.slots[slot] = Some((position as u32, *token));
            }
        }
    }

    /// Tokens of positions `0..=position`, read back through the block table.
    fn history(&self, sequence: &PlannedSequence, position: usize) -> Vec<u32> {
        let read = |position: usize| {
            let (stored, token) = self.slots[self.slot(sequence, position)].expect("a poisoned slot is read");
            assert_eq!(stored as usize, position, "a slot of another position is read");
            token
        };
        (0..=position).map(read).collect()
    }

    fn answer(&self, history: &[u32], row: &SampleRow<'_>) -> Result<SampledToken, RowError> {
        let bad_token = self.faults.bad_token.load(Ordering::Relaxed) as u32;
        if bad_token > 0 && history.last() == Some(&bad_token) {
            return Err(RowError::NotFinite);
        }
        let token = match &row.kind {
            RowKind::Score { target } => *target,
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

impl Executor for FakeExecutor {
    fn run(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        let step = self.faults.steps.fetch_add(1, Ordering::Relaxed) + 1;
        assert_ne!(step, self.faults.panic_at.load(Ordering::Relaxed), "a step that was told to panic");
        std::thread::sleep(std::time::Duration::from_millis(self.faults.step_ms.load(Ordering::Relaxed)));
        self.check_plan(plan);
        self.copy_blocks(plan);
        self.write(plan);
        let every = self.faults.fail_every.load(Ordering::Relaxed);
        if every > 0 && step.is_multiple_of(every) {
            let fatal = self.faults.fail_fatally.load(Ordering::Relaxed);
            return Err(ExecutorError { message: "told to fail".into(), fatal });
        }

        let mut histories = Vec::new();
        for sequence in &plan.sequences {
            // The whole context is read in every step, as attention does.
            self.history(sequence, sequence.context_len as usize + sequence.token_ids.len() - 1);
            for offset in &sequence.logits_rows {
                histories.push(self.history(sequence, (sequence.context_len + offset) as usize));
            }
        }
        assert_eq!(histories.len(), plan.num_logits_rows());
        Ok(StepOutput {
            rows: rows.iter().map(|row| self.answer(&histories[row.logits_row as usize], row)).collect(),
            ..StepOutput::default()
        })
    }

    fn abort(&mut self) {
        self.faults.aborts.fetch_add(1, Ordering::Relaxed);
    }

    fn poison_blocks(&mut self, blocks: &[u32]) {
        let size = self.config.block_size;
        for block in blocks {
            self.slots[*block as usize * size..(*block as usize + 1) * size].fill(None);
        }
    }
}
