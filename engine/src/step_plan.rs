//! What one step computes: the scheduler's decision as plain data.
//!
//! A plan is complete in itself: whoever executes it (this process, or every rank of a group) needs no clock
//! and makes no choice. Flattening it into arrays for the model is the executor's. Prefill chunks and decodes
//! (and verified drafts) look the same: `n ≥ 1` query tokens on top of `context_len` cached ones.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// Counts steps that were begun, from 0.
    pub step: u64,
    /// Tokens per block.
    pub block_size: u32,
    pub sequences: Vec<PlannedSequence>,
    /// Whole-block copies, done before anything else. No block is both a source and a destination.
    pub block_copies: Vec<BlockCopy>,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PlannedSequence {
    /// Serial number of the request, in order of submission.
    pub request: u64,
    /// Which of the request's choices; 0 while the shared prompt is computed.
    pub choice: u32,
    /// Tokens whose KV is in the blocks already.
    pub context_len: u32,
    /// Query tokens at positions `context_len..context_len + token_ids.len()`; never empty.
    pub token_ids: Vec<u32>,
    /// `Some(row)`: the first of them is what this row of the step before draws, which is not over yet; its place in `token_ids` holds 0.
    pub pending_row: Option<u32>,
    /// Blocks of positions `0..context_len + token_ids.len()`.
    pub block_table: Vec<u32>,
    /// Query tokens (indices into `token_ids`, ascending) whose logits are wanted.
    pub logits_rows: Vec<u32>,
}

/// Copy-on-write of a block that forked choices share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub source: u32,
    pub destination: u32,
}

impl StepPlan {
    /// T: query tokens of all sequences.
    pub fn num_tokens(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.token_ids.len()).sum()
    }

    /// R: rows of logits, numbered through all sequences in plan order.
    pub fn num_logits_rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.logits_rows.len()).sum()
    }

    /// A hash that is the same for equal plans on every machine and build of one version; ranks compare it.
    pub fn digest(&self) -> u64 {
        let mut hasher = SipHasher13::new();
        hasher.write_u64(self.step.to_le());
        hasher.write_u32(self.block_size.to_le());
        hasher.write_u64((self.sequences.len() as u64).to_le());
        for sequence in &self.sequences {
            hasher.write_u64(sequence.request.to_le());
            hasher.write_u32(sequence.choice.to_le());
            hasher.write_u32(sequence.context_len.to_le());
            write_list(&mut hasher, sequence.token_ids.iter().copied());
            write_list(&mut hasher, sequence.pending_row.into_iter());
            write_list(&mut hasher, sequence.block_table.iter().copied());
            write_list(&mut hasher, sequence.logits_rows.iter().copied());
        }
        write_list(&mut hasher, self.block_copies.iter().flat_map(|copy| [copy.source, copy.destination]));
        hasher.finish()
    }
}

/// Length first, so that neighbouring lists cannot trade elements.
fn write_list(hasher: &mut SipHasher13, values: impl Iterator<Item = u32> + Clone) {
    hasher.write_u64((values.clone().count() as u64).to_le());
    values.for_each(|value| hasher.write_u32(value.to_le()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> StepPlan {
        let sequence = PlannedSequence {
            request: 3,
            choice: 1,
            context_len: 16,
            token_ids: vec![5, 6],
            pending_row: None,
            block_table: vec![2, 9],
            logits_rows: vec![1],
        };
        StepPlan {
            step: 7,
            block_size: 16,
            sequences: vec![sequence],
            block_copies: vec![BlockCopy { source: 1, destination: 9 }],
        }
    }

    #[test]
    fn the_digest_is_stable_and_sees_every_field() {
        // The value is part of what ranks compare: a change here is a change of the protocol.
        assert_eq!(plan().digest(), plan().digest());
        type Edit = fn(&mut StepPlan);
        let edits: [Edit; 10] = [
            |p| p.step = 8,
            |p| p.block_size = 32,
            |p| p.sequences[0].request = 4,
            |p| p.sequences[0].choice = 0,
            |p| p.sequences[0].context_len = 17,
            |p| p.sequences[0].token_ids = vec![5],
            |p| p.sequences[0].pending_row = Some(0),
            |p| p.sequences[0].block_table = vec![9, 2],
            |p| p.sequences[0].logits_rows = vec![],
            |p| p.block_copies.clear(),
        ];
        for edit in edits {
            let mut changed = plan();
            edit(&mut changed);
            assert_ne!(changed.digest(), plan().digest());
        }
    }

    #[test]
    fn rows_and_tokens_are_counted_over_all_sequences() {
        let mut plan = plan();
        plan.sequences.push(plan.sequences[0].clone());
        assert_eq!((plan.num_tokens(), plan.num_logits_rows()), (4, 2));
    }
}
