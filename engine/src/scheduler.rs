//! Which sequences run in the next step, and on which blocks.
//!
//! Continuous batching under a budget of tokens and sequences. Sequences are ordered by (priority,
//! submission, choice), and memory follows that order strictly: who runs short of blocks takes them from the
//! last in order, itself included. Decodes have their token of the budget first, the rest goes to prompts in
//! order, running and waiting ones alike. A new sequence is admitted only while nobody was preempted in the
//! same step and its whole prompt fits with a block to spare for everyone running, and nobody overtakes it. So
//! the first in order always advances, and nobody starves within a priority.
//!
//! A sequence whose reader is behind is paused: it keeps its blocks until somebody needs them, and is the
//! first to lose them. Preemption forgets computed KV, never tokens: prompt and output are computed again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use crate::block_manager::BlockManager;
use crate::sequence::{AwaitedToken, Sequence, SequenceKey};
use crate::step_plan::{PlannedSequence, StepPlan};

pub(crate) struct Scheduler {
    limits: Limits,
    blocks: BlockManager,
    sequences: BTreeMap<SequenceKey, Sequence>,
    /// Sequences that hold blocks.
    running: BTreeSet<SequenceKey>,
    /// Sequences that hold none: new or preempted.
    waiting: BTreeSet<SequenceKey>,
    num_preemptions: u64,
}

/// Bounds of one step, and the block size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) max_num_seqs: usize,
    pub(crate) max_num_batched_tokens: usize,
    pub(crate) max_logits_rows: usize,
    pub(crate) block_size: usize,
}

/// A plan and whose it is.
#[derive(Default)]
pub(crate) struct Schedule {
    pub(crate) plan: StepPlan,
    /// One per planned sequence.
    pub(crate) keys: Vec<SequenceKey>,
    /// The first so many of them decode; the others compute prompts, or what was preempted.
    pub(crate) num_decodes: usize,
    /// Somebody lost its blocks.
    pub(crate) preempted: bool,
}

/// What one call of `schedule` has left to give, and whom it may take from.
struct Pass {
    prompt_tokens: usize,
    prompt_rows: usize,
    /// Running sequences whose readers are behind; the last goes first.
    paused: Vec<SequenceKey>,
    schedule: Schedule,
}

/// A waiting sequence against what is there.
struct Admission {
    /// Cached blocks of its tokens.
    hits: Vec<u32>,
    /// Blocks to be allocated besides.
    num_new: usize,
    missing_places: usize,
    missing_blocks: usize,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits, blocks: BlockManager) -> Self {
        Self {
            limits,
            blocks,
            sequences: BTreeMap::new(),
            running: BTreeSet::new(),
            waiting: BTreeSet::new(),
            num_preemptions: 0,
        }
    }

    /// Queues a sequence; it must be able to fit alone.
    pub(crate) fn add(&mut self, sequence: Sequence) {
        self.waiting.insert(sequence.key);
        self.sequences.insert(sequence.key, sequence);
    }

    /// Decides the next step. `is_ready` says whether a request's reader has room for what the step brings.
    ///
    /// Steps are computed in the order of their plans, so one may be planned before the last is over. What that one computes and draws
    /// counts as there; a block that it still writes to may be anybody's afterwards.
    pub(crate) fn schedule(&mut self, is_ready: impl Fn(&Sequence) -> bool) -> Schedule {
        let (active, paused): (Vec<_>, Vec<_>) =
            self.running.iter().copied().partition(|key| is_ready(&self.sequences[key]));
        let num_decodes = active.iter().filter(|key| self.sequences[*key].is_decoding()).count();
        let mut pass = Pass {
            prompt_tokens: self.limits.max_num_batched_tokens - num_decodes,
            prompt_rows: self.limits.max_logits_rows - num_decodes,
            paused,
            schedule: Schedule::default(),
        };
        let (decodes, prompts): (Vec<_>, Vec<_>) =
            active.into_iter().partition(|key| self.sequences[key].is_decoding());
        for key in decodes {
            // One further up may have taken its blocks.
            if self.running.contains(&key) && self.secure_blocks(&key, 1, &mut pass) {
                self.plan(key, 1, false, &mut pass);
            }
        }
        pass.schedule.num_decodes = pass.schedule.keys.len();
        let admits = !pass.schedule.preempted;
        self.share_prompt_budget(prompts, admits, &is_ready, &mut pass);
        let mut schedule = pass.schedule;
        schedule.plan.block_size = self.limits.block_size as u32;
        schedule.plan.block_copies = self.blocks.copies().to_vec();
        schedule
    }

    /// A step that was planned ran: `num_tokens` more of the sequence are computed, and blocks that are full now can be
    /// shared. Of a sequence that is gone, or was preempted for the next step, nothing is left.
    pub(crate) fn commit(&mut self, key: &SequenceKey, num_tokens: usize) {
        let Some(sequence) = self.sequences.get_mut(key).filter(|sequence| sequence.in_flight > 0) else {
            return;
        };
        let full_before = sequence.context_len / self.limits.block_size;
        sequence.in_flight -= num_tokens;
        sequence.context_len += num_tokens;
        for block_idx in full_before..sequence.context_len / self.limits.block_size {
            let block = sequence.block_table[block_idx];
            self.blocks.cache_block(&mut sequence.chain, &sequence.tokens, block_idx, block);
        }
    }

    /// A step that was begun draws the next token of a sequence.
    pub(crate) fn await_token(&mut self, key: &SequenceKey, token: AwaitedToken) {
        self.sequences.get_mut(key).expect("planned sequences exist").awaited = Some(token);
    }

    /// A further choice of a computed prompt, on the same blocks.
    ///
    /// # Panics
    /// If the parent is planned further.
    pub(crate) fn fork(&mut self, key: &SequenceKey, choice: u32) {
        let parent = self.sequences.get_mut(key).expect("the parent runs");
        assert_eq!(parent.in_flight, 0, "a choice begins where its prompt ends");
        parent.num_choices = 1;
        parent.block_table.iter().for_each(|block| self.blocks.share(*block));
        let key = SequenceKey { choice, ..*key };
        let child = Sequence {
            key,
            tokens: parent.tokens.clone(),
            block_table: parent.block_table.clone(),
            chain: parent.chain.clone(),
            ..*parent
        };
        self.sequences.insert(key, child);
        self.running.insert(key);
    }

    /// The KV memory is gone: every sequence waits, with all its tokens, as if it had been preempted.
    pub(crate) fn reset(&mut self) {
        for key in std::mem::take(&mut self.running) {
            let sequence = self.sequences.get_mut(&key).expect("running sequences exist");
            sequence.block_table.clear();
            sequence.forget_computed();
            self.waiting.insert(key);
        }
        self.sequences.values_mut().for_each(|sequence| sequence.awaited = None);
        self.blocks.reset();
    }

    pub(crate) fn get(&self, key: &SequenceKey) -> Option<&Sequence> {
        self.sequences.get(key)
    }

    pub(crate) fn get_mut(&mut self, key: &SequenceKey) -> Option<&mut Sequence> {
        self.sequences.get_mut(key)
    }

    /// Takes a sequence out and frees its blocks; nothing happens when there is none.
    pub(crate) fn remove(&mut self, key: &SequenceKey) {
        self.running.remove(key);
        self.waiting.remove(key);
        if let Some(mut sequence) = self.sequences.remove(key) {
            self.blocks.release_table(&mut sequence.block_table);
        }
    }

    /// The same for a sequence whose KV is in doubt: nothing it holds will be found in the prefix cache.
    pub(crate) fn remove_doubtful(&mut self, key: &SequenceKey) {
        if let Some(sequence) = self.sequences.get(key) {
            self.blocks.forget(&sequence.block_table);
        }
        self.remove(key);
    }

    pub(crate) fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    pub(crate) fn blocks_mut(&mut self) -> &mut BlockManager {
        &mut self.blocks
    }

    pub(crate) fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }

    /// Requests of which at least one sequence runs.
    pub(crate) fn num_running_requests(&self) -> usize {
        // Choices of one request are neighbours in this order.
        let mut serials: Vec<u64> = self.running.iter().map(|key| key.serial).collect();
        serials.dedup();
        serials.len()
    }

    /// Checks, between steps, that blocks, tables and queues agree.
    pub(crate) fn check_integrity(&self) -> Result<(), String> {
        self.blocks
            .check_integrity(self.sequences.values().map(|sequence| sequence.block_table.as_slice()))?;
        for (key, sequence) in &self.sequences {
            let (running, waiting) = (self.running.contains(key), self.waiting.contains(key));
            if running == waiting {
                return Err(format!("{key:?} is in both queues or in none"));
            }
            if waiting && !(sequence.block_table.is_empty() && sequence.planned_len() == 0) {
                return Err(format!("{key:?} waits and holds blocks"));
            }
            if sequence.block_table.len() < sequence.planned_len().div_ceil(self.limits.block_size) {
                return Err(format!("{key:?} has fewer blocks than its context needs"));
            }
        }
        if self.running.len() + self.waiting.len() != self.sequences.len() {
            return Err("a queue names a sequence that does not exist".into());
        }
        Ok(())
    }

    /// Gives what the decodes left to prompts in order, whether they run already (`prompts`) or wait: a newcomer of a
    /// better priority goes before a prompt that is half done.
    fn share_prompt_budget(
        &mut self,
        prompts: Vec<SequenceKey>,
        mut admits: bool,
        is_ready: &impl Fn(&Sequence) -> bool,
        pass: &mut Pass,
    ) {
        let mut newcomer = Bound::Unbounded;
        for key in prompts {
            admits = admits && self.admit((newcomer, Bound::Excluded(key)), is_ready, pass);
            newcomer = Bound::Excluded(key);
            // Preempted by a decode.
            if self.running.contains(&key) {
                self.continue_prompt(key, pass);
            }
        }
        if admits {
            self.admit((newcomer, Bound::Unbounded), is_ready, pass);
        }
    }

    /// The next chunk of a prompt, which has had its blocks since it was admitted.
    fn continue_prompt(&mut self, key: SequenceKey, pass: &mut Pass) {
        let sequence = &self.sequences[&key];
        let num_tokens = sequence.chunk_len(sequence.planned_len(), pass.prompt_tokens, pass.prompt_rows);
        if num_tokens > 0 {
            self.plan(key, num_tokens, true, pass);
        }
    }

    /// Makes the blocks of the next `num_tokens` tokens present and writable, at the cost of those behind
    /// `key` in order. False when `key` itself was the last and had to go.
    fn secure_blocks(&mut self, key: &SequenceKey, num_tokens: usize, pass: &mut Pass) -> bool {
        let sequence = &self.sequences[key];
        let end = (sequence.planned_len() + num_tokens).div_ceil(self.limits.block_size);
        let num_missing = end.saturating_sub(sequence.block_table.len());
        loop {
            // Looked at anew after each preemption: the other holders of a shared block may be gone.
            let needs_copy = self.block_to_copy(key).is_some();
            if num_missing + usize::from(needs_copy) <= self.blocks.available() {
                break;
            }
            // Everyone behind `key` is unscheduled, so no planned sequence loses its blocks.
            let victim = pass.paused.pop().unwrap_or(*self.running.last().expect("`key` runs"));
            self.preempt(&victim, pass);
            if victim == *key {
                return false;
            }
        }
        let copied = self.block_to_copy(key).map(|(idx, shared)| (idx, self.blocks.copy_on_write(shared)));
        let table = &mut self.sequences.get_mut(key).expect("`key` runs").block_table;
        if let Some((idx, copy)) = copied {
            table[idx] = copy;
        }
        table.extend((0..num_missing).map(|_| self.blocks.allocate()));
        true
    }

    /// The block that the next token goes into, when it is partly filled and somebody else's too.
    fn block_to_copy(&self, key: &SequenceKey) -> Option<(usize, u32)> {
        let sequence = &self.sequences[key];
        if sequence.planned_len().is_multiple_of(self.limits.block_size) {
            return None;
        }
        let idx = sequence.planned_len() / self.limits.block_size;
        let block = sequence.block_table[idx];
        self.blocks.is_shared(block).then_some((idx, block))
    }

    fn preempt(&mut self, key: &SequenceKey, pass: &mut Pass) {
        let sequence = self.sequences.get_mut(key).expect("running sequences exist");
        self.blocks.release_table(&mut sequence.block_table);
        sequence.forget_computed();
        self.running.remove(key);
        self.waiting.insert(*key);
        self.num_preemptions += 1;
        pass.schedule.preempted = true;
    }

    /// Takes waiting sequences of a range in, in order, as long as they fit and budget is left. False when nobody
    /// further is to be taken in: whoever does not fit is not overtaken.
    fn admit(
        &mut self,
        range: (Bound<SequenceKey>, Bound<SequenceKey>),
        is_ready: &impl Fn(&Sequence) -> bool,
        pass: &mut Pass,
    ) -> bool {
        let (mut seen, end) = range;
        while let Some(&key) = self.waiting.range((seen, end)).find(|key| is_ready(&self.sequences[*key])) {
            seen = Bound::Excluded(key);
            // Said before the cache is searched for a prompt that could not run anyway. What was preempted with a token on its way
            // is computed again when that is known.
            if pass.prompt_tokens == 0 || self.sequences[&key].awaited.is_some() {
                return false;
            }
            // Paused sequences make way, if that helps.
            let (admission, num_tokens) = loop {
                let admission = self.look(&key);
                // What the cache leaves of a prompt may be one token, which needs a row when all are given.
                let context_len = admission.hits.len() * self.limits.block_size;
                let num_tokens =
                    self.sequences[&key].chunk_len(context_len, pass.prompt_tokens, pass.prompt_rows);
                if num_tokens == 0 {
                    return false;
                }
                if admission.missing_places == 0 && admission.missing_blocks == 0 {
                    break (admission, num_tokens);
                }
                if !self.paused_cover(&pass.paused, &admission) {
                    return false;
                }
                let victim = pass.paused.pop().expect("nobody covers nothing");
                self.preempt(&victim, pass);
            };
            self.take_in(&key, admission);
            self.plan(key, num_tokens, true, pass);
        }
        true
    }

    /// What a waiting sequence would get and what it would lack.
    fn look(&mut self, key: &SequenceKey) -> Admission {
        // Of those whose last token is awaited nothing more is planned.
        let goes_on = |sequence: &&Sequence| sequence.awaited.is_none() || sequence.num_unplanned() > 0;
        let running = self.running.iter().map(|key| &self.sequences[key]).filter(goes_on);
        let num_running: usize = running.map(|sequence| sequence.num_choices).sum();
        let sequence = self.sequences.get_mut(key).expect("waiting sequences exist");
        let num_tokens = sequence.tokens.len();
        // At least one token has to be computed for its logits. Scores need the logits of all.
        let max_hits = if sequence.is_being_scored() { 0 } else { (num_tokens - 1) / self.limits.block_size };
        let hits = self.blocks.find_prefix(&mut sequence.chain, &sequence.tokens, max_hits);
        let num_new = num_tokens.div_ceil(self.limits.block_size) - hits.len();
        // A block to spare for each running sequence: otherwise the newcomer would soon be preempted for
        // them.
        let num_wanted = num_new + self.blocks.count_idle(&hits) + num_running;
        Admission {
            hits,
            num_new,
            missing_places: (num_running + sequence.num_choices).saturating_sub(self.limits.max_num_seqs),
            missing_blocks: num_wanted.saturating_sub(self.blocks.available()),
        }
    }

    /// Whether preempting all paused sequences could make up for what is missing; shared blocks may prove it
    /// wrong.
    fn paused_cover(&self, paused: &[SequenceKey], admission: &Admission) -> bool {
        let paused = paused.iter().map(|key| &self.sequences[key]);
        let (mut places, mut blocks) = (0, 0);
        for sequence in paused {
            places += sequence.num_choices;
            // Its own blocks, and those spared for it.
            blocks += sequence.block_table.len() + sequence.num_choices;
        }
        places >= admission.missing_places && blocks >= admission.missing_blocks
    }

    /// Moves a sequence from waiting to running, on cached blocks as far as there are any, with blocks for
    /// all its tokens.
    fn take_in(&mut self, key: &SequenceKey, admission: Admission) {
        let sequence = self.sequences.get_mut(key).expect("waiting sequences exist");
        admission.hits.iter().for_each(|block| self.blocks.share(*block));
        sequence.context_len = admission.hits.len() * self.limits.block_size;
        sequence.cached_tokens.get_or_insert(sequence.context_len);
        sequence.block_table = admission.hits;
        sequence.block_table.extend((0..admission.num_new).map(|_| self.blocks.allocate()));
        self.waiting.remove(key);
        self.running.insert(*key);
    }

    /// Writes a sequence into the plan.
    fn plan(&mut self, key: SequenceKey, num_tokens: usize, from_prompt_budget: bool, pass: &mut Pass) {
        let sequence = self.sequences.get_mut(&key).expect("planned sequences exist");
        let start = sequence.planned_len();
        let logits_rows: Vec<u32> =
            (0..num_tokens as u32).filter(|offset| sequence.wants_logits(start + *offset as usize)).collect();
        // An awaited token is all that is left to plan.
        let pending_row = sequence.awaited.take().map(|awaited| awaited.row);
        let token_ids = match pending_row {
            Some(_) => vec![0],
            None => sequence.tokens[start..start + num_tokens].to_vec(),
        };
        sequence.in_flight += num_tokens;
        if from_prompt_budget {
            pass.prompt_tokens -= num_tokens;
            pass.prompt_rows -= logits_rows.len();
        }
        pass.schedule.plan.sequences.push(PlannedSequence {
            request: key.serial,
            choice: key.choice,
            context_len: start as u32,
            token_ids,
            pending_row,
            // A prompt's later blocks are taken already, and are not this step's business.
            block_table: sequence.block_table[..(start + num_tokens).div_ceil(self.limits.block_size)]
                .to_vec(),
            logits_rows,
        });
        pass.schedule.keys.push(key);
    }
}

#[cfg(test)]
mod tests;
