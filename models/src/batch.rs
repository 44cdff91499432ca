//! What one step feeds to a model: flat arrays, no decisions.
//!
//! A sequence contributes `n ≥ 1` query tokens on top of `context` cached ones; prefill chunks, decodes and draft
//! verifications look the same here. Letters: `T` tokens in the step, `S` sequences, `R` rows that need logits.

/// One step, flattened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForwardBatch {
    /// `[T]` input tokens, sequence after sequence.
    pub token_ids: Vec<u32>,
    /// Tokens that are still being drawn, `(index, row)`: `token_ids[index]` is what row `row` of the draws of the step before comes to.
    pub pending_tokens: Vec<(u32, u32)>,
    /// `[T]` position of each token in its sequence.
    pub positions: Vec<u32>,
    /// `[S + 1]` where each sequence's tokens begin in the step.
    pub cu_seqlens: Vec<u32>,
    /// `[S]` tokens of each sequence whose KV was in the cache before this step.
    pub context_lens: Vec<u32>,
    /// Blocks of all sequences, one after another; sequence `s` owns `block_table_offsets[s]..block_table_offsets[s + 1]`.
    pub block_tables: Vec<u32>,
    /// `[S + 1]` offsets into `block_tables`.
    pub block_table_offsets: Vec<u32>,
    /// `[T]` slot (`block × block_size + offset`) that each token's KV is written to.
    pub slot_mapping: Vec<u32>,
    /// `[R]` indices into the step's tokens whose logits are wanted, ascending.
    pub logits_rows: Vec<u32>,
    /// Blocks to copy before anything else, `(from, to)`: the copies of copy-on-write.
    pub block_copies: Vec<(u32, u32)>,
}

impl ForwardBatch {
    /// `T`: tokens in the step.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// `S`: sequences in the step.
    pub fn num_sequences(&self) -> usize {
        self.context_lens.len()
    }

    /// Blocks of sequence `s`, in order of position.
    pub fn block_table(&self, s: usize) -> &[u32] {
        &self.block_tables[self.block_table_offsets[s] as usize..self.block_table_offsets[s + 1] as usize]
    }
}
