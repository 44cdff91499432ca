//! The forward pass of one rank of several.
//!
//! Every rank has its heads, its columns of the MLP and its rows of the vocabulary; the residual stream is on all of them.
//! Twice a layer the ranks add what their shares came to. The sums have the order that one rank would add in
//! ([`tandem_kernels::cpu::SegmentPlan`]), so where the number of ranks divides the number of segments the bits are the same.

use std::ops::Range;

use tandem_kernels::comm::{CommError, Communicator, Sum};
use tandem_kernels::cpu::{Activation, Buffer, Cpu, Epilogue, KvCache, Linear, Team};

use super::{Llama, LlamaOptions, geometry, inputs_of};
use crate::batch::ForwardBatch;
use crate::config::ModelConfig;
use crate::shard::{Shard, Share, vocab_rows};

/// What ranks give each other in one step.
pub(super) struct Exchange {
    /// `[S, T, E]`: sums of this rank's segments, where they are not added at once.
    segments: Buffer,
    /// `[P, T, E]`: the parts of a sum that this rank contributes.
    parts: Buffer,
    /// The parts of all ranks.
    gathered: Buffer,
    /// `[T, E]`: embedding rows in the order of their owners.
    embedded: Buffer,
    token_ids: Vec<u32>,
    /// `[R, V]` on rank 0.
    logits: Buffer,
    /// The other ranks' columns of it, one rank after another.
    logits_parts: Buffer,
}

impl Exchange {
    pub(super) fn new(config: &ModelConfig, share: &Share, options: &LlamaOptions) -> Self {
        let (tokens, rows) = (options.max_tokens, options.max_logits_rows);
        let values = tokens * config.hidden_size;
        let (run, parts) = parts(share.segments);
        let at_root = if options.shard.rank == 0 { rows * config.vocab_size } else { 0 };
        Self {
            segments: Buffer::zeroed(if run > 1 && parts > 1 { share.segments * values } else { 0 }),
            parts: Buffer::zeroed(parts * values),
            gathered: Buffer::zeroed(options.shard.size * parts * values),
            embedded: Buffer::zeroed(values),
            token_ids: Vec::with_capacity(tokens),
            logits: Buffer::zeroed(at_root),
            logits_parts: Buffer::zeroed(at_root),
        }
    }
}

/// How many neighbouring segments of a rank are whole subtrees of the sum, and how many such parts the rank has.
fn parts(segments: usize) -> (usize, usize) {
    let run = segments & segments.wrapping_neg();
    (run, segments / run)
}

impl Llama {
    /// As [`Llama::forward`], on one of several ranks: all of them must compute the same batches in the same order. The logits
    /// come to rank 0; the others get none.
    ///
    /// # Errors
    /// Any [`CommError`]; the step is not done then, and its KV is in doubt.
    ///
    /// # Panics
    /// As [`Llama::forward`]; also if the communicator is not that of the model's shard.
    pub fn forward_shard(
        &mut self,
        cpu: &Cpu,
        batch: &ForwardBatch,
        kv: &mut KvCache,
        comm: &mut dyn Communicator,
    ) -> Result<&mut [f32], CommError> {
        let shard = Shard { rank: comm.rank(), size: comm.size() };
        assert_eq!(self.options.shard, shard, "communicator of the model's shard");
        let num_tokens = self.begin(batch, kv);
        self.embed_shard(cpu, batch, comm)?;
        self.layers_shard(cpu, batch, num_tokens, kv, comm)?;
        self.head(cpu, batch, num_tokens);
        self.gather_logits(batch.logits_rows.len(), comm)
    }

    /// `hidden` = the embedding rows, each as its owner holds it.
    fn embed_shard(
        &mut self,
        cpu: &Cpu,
        batch: &ForwardBatch,
        comm: &mut dyn Communicator,
    ) -> Result<(), CommError> {
        let (hidden, Shard { size, .. }) = (self.config.hidden_size, self.options.shard);
        let vocab: Vec<Range<usize>> =
            (0..size).map(|rank| vocab_rows(self.config.vocab_size, Shard { rank, size })).collect();
        let owner = |id: u32| vocab.partition_point(|rows| rows.end <= id as usize);
        let work = &mut self.work;
        let exchange = work.exchange.as_mut().expect("one of several ranks");
        exchange.token_ids.clear();
        let own = |&&id: &&u32| self.share.vocab.contains(&(id as usize));
        let start = self.share.vocab.start as u32;
        exchange.token_ids.extend(batch.token_ids.iter().filter(own).map(|id| id - start));

        let mut end = 0;
        let ranges: Vec<Range<usize>> = (0..size)
            .map(|rank| {
                let rows = batch.token_ids.iter().filter(|&&id| owner(id) == rank).count();
                end += rows * hidden;
                end - rows * hidden..end
            })
            .collect();
        let embedded = &mut exchange.embedded[..end];
        let table = self.embedding.as_ref().unwrap_or(&self.lm_head);
        cpu.embed(table, &exchange.token_ids, &mut embedded[ranges[comm.rank()].clone()]);
        comm.all_gather(&ranges, embedded)?;
        let mut next: Vec<usize> = ranges.iter().map(|range| range.start).collect();
        for (row, &id) in work.hidden.chunks_exact_mut(hidden).zip(&batch.token_ids) {
            let from = &mut next[owner(id)];
            row.copy_from_slice(&embedded[*from..*from + hidden]);
            *from += hidden;
        }
        Ok(())
    }

    fn layers_shard(
        &mut self,
        cpu: &Cpu,
        batch: &ForwardBatch,
        num_tokens: usize,
        kv: &mut KvCache,
        comm: &mut dyn Communicator,
    ) -> Result<(), CommError> {
        let precision = self.attention_precision();
        let (config, work, geometry, team) = (&self.config, &mut self.work, geometry(batch), cpu.team());
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let hidden = &mut work.hidden[..num_tokens * config.hidden_size];
        let qkv = &mut work.qkv[..num_tokens * (config.query_size() + 2 * config.kv_size())];
        let inputs = &mut *inputs_of(&work.inputs, &team);
        let exchange = work.exchange.as_mut().expect("one of several ranks");
        cpu.prepare_rope(&mut work.rope, &batch.positions);
        for (index, layer) in self.layers.iter().enumerate() {
            layer.project(&team, config, inputs, hidden, qkv);
            cpu.rope_and_store_kv(qkv, &work.rope, &batch.slot_mapping, index, kv);
            let attention = &mut inputs.attention[..num_tokens * config.query_size()];
            team.attention(qkv, 0..num_tokens, &geometry, index, kv, scale, precision, attention);
            layer.round_attention(&team, inputs, num_tokens);
            let bias = layer.attention_output_bias.as_deref();
            exchange.add(&team, &layer.attention_output, &inputs.attended, bias, hidden, comm)?;
            layer.gate(&team, config, inputs, hidden);
            exchange.add(&team, &layer.down, &inputs.gated, layer.down_bias.as_deref(), hidden, comm)?;
        }
        Ok(())
    }

    /// Puts the columns of all ranks together on rank 0.
    fn gather_logits(
        &mut self,
        num_rows: usize,
        comm: &mut dyn Communicator,
    ) -> Result<&mut [f32], CommError> {
        let (vocab_size, Shard { rank, size }) = (self.config.vocab_size, self.options.shard);
        let own = &self.work.logits[..num_rows * self.share.vocab.len()];
        let exchange = self.work.exchange.as_mut().expect("one of several ranks");
        if num_rows == 0 {
            return Ok(&mut []);
        }
        if rank > 0 {
            comm.gather(own, &mut [])?;
            return Ok(&mut []);
        }
        let vocab: Vec<Range<usize>> =
            (0..size).map(|rank| vocab_rows(vocab_size, Shard { rank, size })).collect();
        let mut rest = &mut exchange.logits_parts[..];
        let mut parts: Vec<&mut [f32]> = vocab
            .iter()
            .map(|rows| rest.split_off_mut(..num_rows * rows.len()).expect("room for all ranks"))
            .collect();
        comm.gather(own, &mut parts)?;
        let logits = &mut exchange.logits[..num_rows * vocab_size];
        for (from, columns) in vocab.iter().enumerate() {
            let part = if from == 0 { own } else { &*parts[from] };
            for (row, values) in logits.chunks_exact_mut(vocab_size).zip(part.chunks_exact(columns.len())) {
                row[columns.clone()].copy_from_slice(values);
            }
        }
        Ok(logits)
    }
}

impl Exchange {
    /// `hidden` += the sum over all ranks' `weights · x`, plus `bias`, in the fixed tree over segments.
    fn add(
        &mut self,
        team: &Team<'_>,
        weights: &Linear,
        x: &Activation,
        bias: Option<&[f32]>,
        hidden: &mut [f32],
        comm: &mut dyn Communicator,
    ) -> Result<(), CommError> {
        let len = hidden.len();
        let segments = weights.segments().count();
        let (run, num_parts) = parts(segments);
        let own = &mut self.parts[..num_parts * len];
        if num_parts == 1 {
            // The rank's segments are one subtree: it is added where it is computed.
            team.linear(weights, x, own, Epilogue::Store);
        } else if run == 1 {
            team.linear_segments(weights, x, own);
        } else {
            let sums = &mut self.segments[..segments * len];
            team.linear_segments(weights, x, sums);
            for (part, sums) in own.chunks_exact_mut(len).zip(sums.chunks_exact(run * len)) {
                team.reduce_segments(sums, run, None, part, Epilogue::Store);
            }
        }
        let sum = Sum { parts: num_parts, columns: weights.out_features(), bias };
        comm.all_reduce(team, own, &sum, &mut self.gathered, hidden)
    }
}
