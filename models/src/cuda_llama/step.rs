//! The arrays of a step on their way to the device.
//!
//! They lie at fixed places of one buffer, so that a recorded step finds the next one's: what all steps have in front, which goes
//! over in one copy, the block tables behind it, of which only what has changed does.

use std::ops::Range;

use tandem_kernels::cuda::launcher::{Address, Sequences};
use tandem_kernels::cuda::{Cuda, CudaError, DeviceBuffer, PinnedBuffer};

use super::CudaLlamaOptions;
use crate::batch::ForwardBatch;

/// Arrays start on a multiple of this many values.
const ALIGN: usize = 64;
/// A token whose keys and values go nowhere.
const NO_SLOT: i32 = -1;

/// Step arrays, on the host and on the device.
pub(super) struct StepArrays {
    host: PinnedBuffer,
    /// Pairs of blocks: apart, for a buffer is written to only when its last copy is over.
    host_pairs: PinnedBuffer,
    device: DeviceBuffer,
    at: Places,
    max: CudaLlamaOptions,
    /// Parts of block tables that have to go over, counted in values.
    changed: Vec<Range<usize>>,
}

/// Where each array begins, counted in values.
#[derive(Debug, Clone, Copy)]
struct Places {
    token_ids: usize,
    positions: usize,
    slot_mapping: usize,
    logits_rows: usize,
    cu_seqlens: usize,
    context_lens: usize,
    block_tables: usize,
    /// Values from one sequence's block table to the next one's.
    stride: usize,
    pairs: usize,
    end: usize,
}

/// Block copies of one launch: all that a step may have, for a second list would wait for the step that is computed.
fn max_pairs(max: &CudaLlamaOptions) -> usize {
    max.max_seqs.max(256)
}

impl Places {
    fn new(max: &CudaLlamaOptions) -> Self {
        let mut end = 0;
        let mut place = |values: usize| {
            let at = end;
            end += values.next_multiple_of(ALIGN);
            at
        };
        let stride = max.max_model_len.div_ceil(super::BLOCK_SIZE).next_multiple_of(4);
        Self {
            token_ids: place(max.max_tokens),
            positions: place(max.max_tokens),
            slot_mapping: place(max.max_tokens),
            logits_rows: place(max.max_logits_rows),
            cu_seqlens: place(max.max_seqs + 1),
            context_lens: place(max.max_seqs),
            block_tables: place(max.max_seqs * stride),
            stride,
            pairs: place(2 * max_pairs(max)),
            end,
        }
    }
}

impl StepArrays {
    pub(super) fn new(cuda: &Cuda, max: CudaLlamaOptions) -> Result<Self, CudaError> {
        let at = Places::new(&max);
        let bytes = 4 * at.end;
        Ok(Self {
            host: cuda.alloc_pinned(bytes)?,
            host_pairs: cuda.alloc_pinned(4 * 2 * max_pairs(&max))?,
            device: cuda.alloc_zeroed(bytes)?,
            at,
            max,
            changed: Vec::new(),
        })
    }

    /// Queues the arrays of a step for operations on `rows` tokens, and as many sequences and rows of logits where these are more
    /// than the step has. Spare tokens write nothing; spare sequences have no tokens.
    pub(super) fn upload(&mut self, batch: &ForwardBatch, rows: usize) -> Result<(), CudaError> {
        let Self { host, device, at, max, changed, .. } = self;
        let num_seqs = batch.num_sequences();
        assert!(num_seqs <= max.max_seqs, "step of {num_seqs} sequences");
        let values = host.write::<i32>(0, at.end)?;
        let mut fill = |place: usize, most: usize, from: &[u32], spare: i32| {
            let len = rows.max(from.len()).min(most);
            let to = &mut values[place..place + len];
            let (used, rest) = to.split_at_mut(from.len());
            used.iter_mut().zip(from).for_each(|(to, from)| *to = *from as i32);
            rest.fill(spare);
        };
        fill(at.token_ids, max.max_tokens, &batch.token_ids, 0);
        fill(at.positions, max.max_tokens, &batch.positions, 0);
        fill(at.slot_mapping, max.max_tokens, &batch.slot_mapping, NO_SLOT);
        fill(at.logits_rows, max.max_logits_rows, &batch.logits_rows, NO_SLOT);
        fill(at.context_lens, max.max_seqs, &batch.context_lens, 0);
        // As the kernel reads them.
        for &(token, row) in &batch.pending_tokens {
            values[at.token_ids + token as usize] = -1 - row as i32;
        }
        let ends = &mut values[at.cu_seqlens..at.cu_seqlens + (rows.max(num_seqs)).min(max.max_seqs) + 1];
        let last = batch.cu_seqlens.last().copied().unwrap_or(0);
        for (index, to) in ends.iter_mut().enumerate() {
            *to = batch.cu_seqlens.get(index).copied().unwrap_or(last) as i32;
        }
        // Long contexts have long tables, of which a step changes few: the host's copy is what the device has.
        changed.clear();
        for sequence in 0..num_seqs {
            let table = batch.block_table(sequence);
            assert!(table.len() <= at.stride, "{} blocks of a sequence", table.len());
            let place = at.block_tables + sequence * at.stride;
            let on_device = &mut values[place..place + table.len()];
            let same = on_device.iter().zip(table).take_while(|(old, new)| **old == **new as i32).count();
            if same < table.len() {
                on_device[same..].iter_mut().zip(&table[same..]).for_each(|(to, from)| *to = *from as i32);
                changed.push(place + same..place + table.len());
            }
        }
        let queued = device.slice::<i32>(0, at.block_tables).upload(host, 0).and_then(|()| {
            changed.iter().try_for_each(|range| {
                device.slice::<i32>(4 * range.start, range.len()).upload(host, 4 * range.start)
            })
        });
        if queued.is_err() {
            // What the device has is not known: nothing that comes may be taken for the same.
            host.write::<i32>(4 * at.block_tables, at.pairs - at.block_tables)?.fill(NO_SLOT);
        }
        queued
    }

    /// Queues a list of blocks, or of pairs of blocks; where it will be.
    ///
    /// # Panics
    /// If it is longer than twice [`StepArrays::max_pairs`].
    pub(super) fn upload_blocks(&mut self, blocks: &[u32]) -> Result<Address, CudaError> {
        let to = self.host_pairs.write::<i32>(0, blocks.len())?;
        to.iter_mut().zip(blocks).for_each(|(to, from)| *to = *from as i32);
        self.device.slice::<i32>(4 * self.at.pairs, blocks.len()).upload(&mut self.host_pairs, 0)?;
        Ok(self.address(self.at.pairs))
    }

    pub(super) fn max_pairs(&self) -> usize {
        max_pairs(&self.max)
    }

    pub(super) fn token_ids(&self) -> Address {
        self.address(self.at.token_ids)
    }

    pub(super) fn positions(&self) -> Address {
        self.address(self.at.positions)
    }

    pub(super) fn slot_mapping(&self) -> Address {
        self.address(self.at.slot_mapping)
    }

    pub(super) fn logits_rows(&self) -> Address {
        self.address(self.at.logits_rows)
    }

    /// `count` sequences from `first` on.
    pub(super) fn sequences(&self, first: usize, count: usize) -> Sequences {
        let Places { cu_seqlens, context_lens, block_tables, stride, .. } = self.at;
        Sequences {
            num_sequences: count,
            cu_seqlens: self.address(cu_seqlens + first),
            context_lens: self.address(context_lens + first),
            block_tables: self.address(block_tables + first * stride),
            table_stride: stride,
        }
    }

    fn address(&self, place: usize) -> Address {
        self.device.slice::<i32>(4 * place, 0).address()
    }
}
