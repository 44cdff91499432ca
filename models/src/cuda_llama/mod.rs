//! The decoder of the Llama family on a GPU.
//!
//! The same network as [`crate::Llama`], with the numbers that GPUs are made for: weights and what goes into a product are bf16,
//! the residual stream and all sums are f32. A step's arrays go to the device in one copy, its operations are queued one after
//! another, and nothing waits for them before the caller asks for what came out. Steps in which every sequence has one token, the
//! most frequent ones, are recorded once for each bucket of batch sizes and then replayed as a whole.
//!
//! Letters: `T` tokens of the step, `S` sequences, `R` rows that need logits, the others as in the crate's root.

mod load;
mod skinny;
mod step;
mod weight;

use std::collections::HashMap;
use std::sync::Arc;

use tandem_kernels::comm::{DeviceCollectives, DeviceCommError};
use tandem_kernels::cuda::launcher::{
    self, Address, ColumnParts, Heads, KvCache, KvType, MAX_GEMV_TOKENS, Norm, RopeTables, Splits,
};
use tandem_kernels::cuda::{
    CudaError, DeviceBuffer, DeviceSlice, GRAPH_BUCKETS, Gemm, Graph, Runner, TunedGemm, bucket_of,
};

use self::skinny::Skinny;
use self::step::StepArrays;
use self::weight::{Products, Scratch, Weight};
use crate::batch::ForwardBatch;
use crate::config::ModelConfig;
use crate::shard::{Shard, Share};

pub use load::CudaLoadError;
pub use skinny::TunedSkinny;

/// The most tokens of a sequence for which attention goes over its context in parallel, as decoding does.
const MAX_DECODE_TOKENS: usize = 8;

/// Sizes of a model on a GPU.
#[derive(Debug, Clone, Copy)]
pub struct CudaLlamaOptions {
    /// `T`: most tokens of one step.
    pub max_tokens: usize,
    /// `S`: most sequences of one step.
    pub max_seqs: usize,
    /// `R`: most rows of one step that need logits.
    pub max_logits_rows: usize,
    /// Most tokens of one sequence.
    pub max_model_len: usize,
    pub kv_type: KvType,
    /// Whether layers are rounded to e4m3 when they are loaded.
    pub fp8_weights: bool,
    /// Whether steps of one token for each sequence are recorded and replayed.
    pub graphs: bool,
    /// Which part of the model this is.
    pub shard: Shard,
}

/// A loaded model, its KV cache, and the working memory of one step.
pub struct CudaLlama {
    /// By bucket. First, for they hold functions of the runner's and addresses of buffers: fields are dropped in order.
    graphs: HashMap<usize, Graph>,
    /// Of this rank's share.
    config: ModelConfig,
    options: CudaLlamaOptions,
    share: Share,
    runner: Runner,
    gemm: Gemm,
    embedding: Weight,
    layers: Vec<Layer>,
    norm: DeviceBuffer,
    /// The embedding's table, if absent.
    lm_head: Option<Weight>,
    /// cos, then sin: f32 `[max_model_len, D / 2]` each.
    rope: DeviceBuffer,
    work: Workspace,
    scratch: Scratch,
    skinny: Skinny,
    kv: Option<KvPool>,
    /// i32: what the draws of the step before came to.
    drawn_tokens: Option<Arc<DeviceBuffer>>,
}

/// Weights of one decoder layer.
struct Layer {
    attention_norm: DeviceBuffer,
    qkv: Weight,
    attention_output: Weight,
    mlp_norm: DeviceBuffer,
    gate_up: Weight,
    down: Weight,
}

/// Device memory of one step, for the most rows that it may have.
struct Workspace {
    arrays: StepArrays,
    /// f32 `[T, E]` residual stream.
    hidden: DeviceBuffer,
    /// bf16 `[T, E]` input of the next product; the first `R` rows also that of the LM head.
    normed: DeviceBuffer,
    /// bf16 `[T, (H + 2K) · D]`.
    qkv: DeviceBuffer,
    /// bf16 `[T, H · D]`.
    attention: DeviceBuffer,
    /// Partial results of attention that goes over a context in parallel.
    partials: DeviceBuffer,
    /// bf16 `[T, E]`: what is added to the residual stream.
    delta: DeviceBuffer,
    /// bf16 `[T, 2I]` and `[T, I]`.
    gate_up: DeviceBuffer,
    gated: DeviceBuffer,
    /// f32 `[R, V]`, on this rank those of its vocabulary rows.
    logits: DeviceBuffer,
    /// Those of all ranks; none in a model of one rank.
    joined: Option<JoinedLogits>,
}

/// Logits of several ranks.
struct JoinedLogits {
    /// f32: one rank's part after another.
    parts: DeviceBuffer,
    /// i32 `[P + 1]`: where each rank's columns begin.
    starts: DeviceBuffer,
    /// f32 `[R, V]`.
    logits: DeviceBuffer,
    /// The most columns of a rank.
    widest: usize,
}

/// The other ranks, where there are any.
pub type Others<'a> = Option<&'a mut dyn DeviceCollectives>;

/// Keys and values of all layers.
struct KvPool {
    num_blocks: usize,
    /// `[L][2][blocks][K][16][D]`.
    memory: DeviceBuffer,
    /// u64 `[2L]`: addresses of the parts of `memory`.
    addresses: DeviceBuffer,
    /// Bytes of one layer's keys.
    part_bytes: usize,
    block_bytes: usize,
}

/// How the operations of a step are shaped: what a graph has fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    tokens: usize,
    logits_rows: usize,
}

/// Neighbouring sequences whose attention is computed in one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: usize,
    count: usize,
    /// Of all of them.
    tokens: usize,
    /// The most tokens of one of them.
    max_tokens: usize,
}

impl CudaLlama {
    /// The configuration of this rank's share.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn options(&self) -> &CudaLlamaOptions {
        &self.options
    }

    /// The device and its kernels.
    pub fn runner(&self) -> &Runner {
        &self.runner
    }

    /// Where tokens are found that the step before draws ([`ForwardBatch::pending_tokens`]), i32. Steps have to be recorded afterwards.
    pub fn set_drawn_tokens(&mut self, tokens: Arc<DeviceBuffer>) {
        self.forget_graphs();
        self.drawn_tokens = Some(tokens);
    }

    /// Bytes of weights that a step for one token reads: all linear layers and the LM head.
    pub fn bytes_per_step(&self) -> u64 {
        let lm_head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        self.layers.iter().flat_map(Layer::weights).chain([lm_head]).map(Weight::bytes).sum()
    }

    /// Bytes of one block of KV in all layers of a model, or of a rank's share of it.
    pub fn bytes_per_block_of(config: &ModelConfig, kv_type: KvType) -> usize {
        2 * config.num_layers * block_bytes(config, kv_type)
    }

    /// Takes the memory of `num_blocks` blocks of KV in place of what was there, unless that was as many. What is in the blocks is
    /// undefined, and no step is recorded any more ([`CudaLlama::record`]).
    ///
    /// # Errors
    /// [`CudaError`]: memory above all.
    pub fn allocate_kv(&mut self, num_blocks: usize) -> Result<(), CudaError> {
        self.forget_graphs();
        if self.num_blocks() == num_blocks {
            return Ok(());
        }
        self.kv = None;
        self.kv = Some(KvPool::new(&self.runner, &self.config, self.options.kv_type, num_blocks)?);
        Ok(())
    }

    /// Records the steps that can be, if the options ask for it, together with all others.
    ///
    /// # Errors
    /// [`DeviceCommError`].
    pub fn record(&mut self, mut others: Others<'_>) -> Result<(), DeviceCommError> {
        self.forget_graphs();
        let can_be = others.as_ref().is_none_or(|others| others.is_queued());
        if self.options.graphs && can_be {
            self.record_graphs(&mut others)?;
        }
        Ok(())
    }

    /// Lets go of what was recorded; a communicator that recorded steps hold cannot end.
    pub fn forget_graphs(&mut self) {
        self.graphs.clear();
    }

    /// Queues one step: afterwards the logits `[R, V]` of `batch.logits_rows` are on the device ([`CudaLlama::logits`]), on every
    /// rank. All ranks compute the same batches in the same order.
    ///
    /// # Errors
    /// [`DeviceCommError`]; the step is not done then, and its KV is in doubt.
    ///
    /// # Panics
    /// If the batch is larger than the options allow or its arrays do not fit together, if there is no memory for KV yet, or if
    /// `others` are not those of the model's shard.
    pub fn forward(&mut self, batch: &ForwardBatch, mut others: Others<'_>) -> Result<(), DeviceCommError> {
        let Shard { rank, size } = self.options.shard;
        let place = others.as_ref().map_or((0, 1), |others| others.place());
        assert_eq!(place, (rank, size), "the others of the model's shard");
        let tokens = batch.num_tokens();
        let logits_rows = batch.logits_rows.len();
        assert!(tokens <= self.options.max_tokens, "step of {tokens} tokens");
        assert!(logits_rows <= self.options.max_logits_rows, "step with {logits_rows} rows of logits");
        let num_drawn = self.drawn_tokens.as_ref().map_or(0, |drawn| drawn.as_slice::<i32>().len());
        assert!(
            batch.pending_tokens.iter().all(|(_, row)| (*row as usize) < num_drawn),
            "of rows that are drawn"
        );
        self.copy_blocks(&batch.block_copies)?;
        let is_decode = batch.num_sequences() == tokens && logits_rows == tokens;
        let bucket = if is_decode { bucket_of(tokens) } else { None };
        if let Some((bucket, graph)) = bucket.and_then(|rows| Some((rows, self.graphs.get_mut(&rows)?))) {
            self.work.arrays.upload(batch, bucket)?;
            return Ok(self.runner.replay(graph)?);
        }
        self.work.arrays.upload(batch, tokens)?;
        self.operations(Shape { tokens, logits_rows }, &runs(batch), &mut others)
    }

    /// f32 `[R, V]`: what the last step came to, in so many rows.
    ///
    /// # Panics
    /// If there are not so many rows.
    pub fn logits(&self, num_rows: usize) -> DeviceSlice<'_, f32> {
        let logits = self.work.joined.as_ref().map_or(&self.work.logits, |joined| &joined.logits);
        logits.slice(0, num_rows * self.config.vocab_size)
    }

    /// Overwrites blocks with NaN.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn fill_nan(&mut self, blocks: &[u32]) -> Result<(), CudaError> {
        let Some(kv) = &self.kv else { return Ok(()) };
        for blocks in blocks.chunks(self.work.arrays.max_pairs()) {
            let at = self.work.arrays.upload_blocks(blocks)?;
            self.runner.launch(&launcher::fill_blocks(kv.caches(), at, blocks.len(), NAN_PATTERN))?;
        }
        Ok(())
    }

    fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), CudaError> {
        let kv = self.kv.as_ref().expect("memory for KV");
        for copies in copies.chunks(self.work.arrays.max_pairs()) {
            let pairs: Vec<u32> = copies.iter().flat_map(|&(from, to)| [from, to]).collect();
            let at = self.work.arrays.upload_blocks(&pairs)?;
            self.runner.launch(&launcher::copy_blocks(kv.caches(), at, copies.len()))?;
        }
        Ok(())
    }

    /// Queues the operations of a step whose arrays are on the device.
    fn operations(
        &mut self,
        shape: Shape,
        runs: &[Run],
        others: &mut Others<'_>,
    ) -> Result<(), DeviceCommError> {
        let Self { config, options, share, runner, gemm, work, scratch, skinny, .. } = self;
        let kv = self.kv.as_ref().expect("memory for KV");
        let (tokens, arrays) = (shape.tokens, &work.arrays);
        let heads = heads(config);
        let hidden = address(&work.hidden);
        let normed = address(&work.normed);
        let norm = |weight: &DeviceBuffer| Norm {
            weight: address(weight),
            hidden_size: config.hidden_size,
            epsilon: config.rms_norm_eps,
        };
        let table_bytes = self.rope.bytes() / 2;
        let tables = RopeTables { cos: address(&self.rope), sin: address(&self.rope) + table_bytes as u64 };
        let scale = 1.0 / (config.head_dim as f32).sqrt();

        let mut products = Products { runner, gemm, scratch, skinny };
        let vocab = share.vocab.clone();
        let table = self.embedding.bf16_address();
        // Without draws no token refers to any.
        let drawn = self.drawn_tokens.as_ref().map_or(0, |drawn| address(drawn));
        runner.launch(&launcher::embed(
            hidden,
            table,
            arrays.token_ids(),
            drawn,
            tokens,
            config.hidden_size,
            vocab,
        ))?;
        if let Some(others) = others {
            others.all_reduce_f32(runner, work.hidden.slice(0, tokens * config.hidden_size))?;
        }
        runner.launch(&launcher::rms_norm(normed, hidden, tokens, norm(&self.layers[0].attention_norm)))?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.qkv.multiply(&mut products, tokens, &work.normed, &work.qkv)?;
            let cache = kv.layer(index, options.kv_type);
            runner.launch(&launcher::rope_and_store_kv(
                address(&work.qkv),
                cache,
                tables,
                arrays.positions(),
                arrays.slot_mapping(),
                tokens,
                heads,
            ))?;
            let (qkv, out) = (address(&work.qkv), address(&work.attention));
            let of = launcher::Attention { qkv, out, cache, heads, scale };
            for run in runs {
                attention(runner, work, *run, of)?;
            }
            let mut add = |products: &mut Products<'_>,
                           layer: &Weight,
                           x: &DeviceBuffer,
                           weight: &DeviceBuffer| {
                if others.is_none() && layer.add(products, tokens, x, &work.hidden)? {
                    return Ok(runner.launch(&launcher::rms_norm(normed, hidden, tokens, norm(weight)))?);
                }
                layer.multiply(products, tokens, x, &work.delta)?;
                if let Some(others) = others {
                    others.all_reduce_bf16(runner, work.delta.slice(0, tokens * config.hidden_size))?;
                }
                let delta = address(&work.delta);
                runner.launch(&launcher::add_rms_norm_bf16(normed, hidden, delta, tokens, norm(weight)))?;
                Ok::<_, DeviceCommError>(())
            };
            add(&mut products, &layer.attention_output, &work.attention, &layer.mlp_norm)?;
            layer.gate_up.swiglu(&mut products, tokens, &work.normed, &work.gate_up, &work.gated)?;
            let next = self.layers.get(index + 1).map_or(&self.norm, |next| &next.attention_norm);
            // The last layer's rows are normed again below, as far as they are wanted: what counts here is the addition.
            add(&mut products, &layer.down, &work.gated, next)?;
        }
        if shape.logits_rows > 0 {
            let rows = shape.logits_rows;
            let at = arrays.logits_rows();
            runner.launch(&launcher::gather_rms_norm(normed, hidden, at, rows, norm(&self.norm)))?;
            let lm_head = self.lm_head.as_ref().unwrap_or(&self.embedding);
            lm_head.multiply_f32(&mut products, rows, &work.normed, &work.logits)?;
            if let (Some(others), Some(joined)) = (others, &work.joined) {
                joined.gather(runner, *others, &work.logits, rows, config.vocab_size)?;
            }
        }
        Ok(())
    }

    /// Times the library's products for the shapes that steps have, before KV takes the memory that this needs for a moment; what
    /// came of each.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn tune(&mut self) -> Result<Vec<TunedGemm>, CudaError> {
        let rows: Vec<usize> = GRAPH_BUCKETS
            .into_iter()
            .filter(|rows| *rows > MAX_GEMV_TOKENS)
            .chain([384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, self.options.max_tokens])
            .filter(|rows| *rows <= self.options.max_tokens)
            .collect();
        let layer = &self.layers[0];
        let mut shapes = Vec::new();
        for weight in [&layer.qkv, &layer.attention_output, &layer.gate_up, &layer.down] {
            weight.shapes(&rows, &mut shapes);
        }
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let logits_rows: Vec<usize> =
            rows.iter().copied().filter(|rows| *rows <= self.options.max_logits_rows).collect();
        head.shapes_f32(&logits_rows, &mut shapes);
        self.gemm.warm_up(&shapes)
    }

    /// Records a step of every bucket. Each is run once before, on dummy rows that write to no block.
    fn record_graphs(&mut self, others: &mut Others<'_>) -> Result<(), DeviceCommError> {
        let most = self.options.max_tokens.min(self.options.max_seqs).min(self.options.max_logits_rows);
        let buckets = || GRAPH_BUCKETS.into_iter().filter(|rows| *rows <= most);
        let dummies = ForwardBatch { cu_seqlens: vec![0], ..ForwardBatch::default() };
        // Other ranks would have to time as many steps.
        if others.is_none() {
            for rows in buckets() {
                self.work.arrays.upload(&dummies, rows)?;
                self.choose_by_steps(rows, |model| {
                    let mut graph = model.record_graph(rows, &mut None)?;
                    Ok::<_, DeviceCommError>(model.replays_us(&mut graph)?)
                })?;
            }
        }
        for rows in buckets() {
            self.work.arrays.upload(&dummies, rows)?;
            let graph = self.record_graph(rows, others)?;
            self.graphs.insert(rows, graph);
        }
        Ok(self.runner.cuda().synchronize()?)
    }

    fn record_graph(&mut self, rows: usize, others: &mut Others<'_>) -> Result<Graph, DeviceCommError> {
        let shape = Shape { tokens: rows, logits_rows: rows };
        let runs = [Run { first: 0, count: rows, tokens: rows, max_tokens: 1 }];
        self.operations(shape, &runs, others)?;
        let cuda = self.runner.cuda().clone();
        let mut outcome = Ok(());
        let graph = cuda.capture(|| {
            outcome = self.operations(shape, &runs, others);
            Ok(())
        });
        outcome?;
        Ok(graph?)
    }
}

/// Attention of neighbouring sequences of a step.
fn attention(runner: &Runner, work: &Workspace, run: Run, of: launcher::Attention) -> Result<(), CudaError> {
    let sequences = work.arrays.sequences(run.first, run.count);
    if run.max_tokens > MAX_DECODE_TOKENS {
        return runner.launch(&launcher::attention_prefill(of, sequences, run.max_tokens));
    }
    let num_splits = num_splits(runner.cuda().info().num_sms, run, of.heads);
    let splits = Splits { num_splits, workspace: address(&work.partials) };
    runner.launch(&launcher::attention_decode(of, sequences, run.max_tokens, run.tokens, splits))?;
    if num_splits > 1 {
        runner.launch(&launcher::attention_combine(of, sequences, run.tokens, splits))?;
    }
    Ok(())
}

/// Into how many parts the contexts of a run are split, so that the device is full and the partial results have room.
fn num_splits(num_sms: usize, run: Run, heads: Heads) -> usize {
    let tiles = (run.max_tokens * heads.num_heads / heads.num_kv_heads).div_ceil(16);
    let blocks = (run.count * heads.num_kv_heads * tiles).max(1);
    let room = PARTIAL_BYTES / launcher::splits_bytes(run.tokens.max(1), heads, 1);
    // No more than run at once: one block keeps a multiprocessor's share of the memory busy, and partial results cost a launch.
    (BLOCKS_PER_SM * num_sms / blocks).min(MAX_SPLITS).min(room).max(1)
}

/// Blocks of attention of head dim 128 that are in flight on one multiprocessor.
const BLOCKS_PER_SM: usize = 2;
/// The most parts that a context is split into: with eight KV heads a block for each multiprocessor, which leaves room for blocks of
/// the next product, whose weights are on their way meanwhile.
const MAX_SPLITS: usize = 16;
/// Memory of their partial results.
const PARTIAL_BYTES: usize = 64 << 20;

impl JoinedLogits {
    /// Queues that the columns of all ranks, `own` of this one, come together.
    fn gather(
        &self,
        runner: &Runner,
        others: &mut dyn DeviceCollectives,
        own: &DeviceBuffer,
        num_rows: usize,
        vocab_size: usize,
    ) -> Result<(), DeviceCommError> {
        let (_, world_size) = others.place();
        let part_values = num_rows * self.widest;
        others.all_gather_f32(own.slice(0, part_values), self.parts.slice(0, world_size * part_values))?;
        let (parts, starts) = (address(&self.parts), address(&self.starts));
        let of = ColumnParts { parts, starts, part_values, world_size };
        Ok(runner.launch(&launcher::join_columns(address(&self.logits), of, num_rows, vocab_size))?)
    }
}

/// All ones is NaN in every type that KV has.
const NAN_PATTERN: u32 = u32::MAX;

impl KvPool {
    fn new(
        runner: &Runner,
        config: &ModelConfig,
        kv_type: KvType,
        num_blocks: usize,
    ) -> Result<Self, CudaError> {
        let block_bytes = block_bytes(config, kv_type);
        let part_bytes = num_blocks * block_bytes;
        let memory = runner.cuda().alloc_zeroed(2 * config.num_layers * part_bytes)?;
        let at = address(&memory);
        let parts: Vec<u64> =
            (0..2 * config.num_layers).map(|part| at + (part * part_bytes) as u64).collect();
        let addresses = runner.cuda().alloc(8 * parts.len())?;
        addresses.as_slice::<u64>().write(&parts)?;
        Ok(Self { num_blocks, memory, addresses, part_bytes, block_bytes })
    }

    fn layer(&self, index: usize, kv_type: KvType) -> KvCache {
        let k = address(&self.memory) + (2 * index * self.part_bytes) as u64;
        KvCache { k, v: k + self.part_bytes as u64, kv_type }
    }

    fn caches(&self) -> launcher::CacheList {
        launcher::CacheList {
            addresses: address(&self.addresses),
            num_caches: self.addresses.bytes() / 8,
            block_bytes: self.block_bytes,
        }
    }
}

impl CudaLlama {
    /// Blocks of KV that there is memory for.
    pub fn num_blocks(&self) -> usize {
        self.kv.as_ref().map_or(0, |kv| kv.num_blocks)
    }
}

/// Bytes of the keys, or of the values, of one block in one layer.
fn block_bytes(config: &ModelConfig, kv_type: KvType) -> usize {
    config.num_kv_heads * BLOCK_SIZE * config.head_dim * kv_type.bytes()
}

/// Slots of a block.
const BLOCK_SIZE: usize = tandem_kernels::cpu::BLOCK_SIZE;

fn heads(config: &ModelConfig) -> Heads {
    Heads { num_heads: config.num_heads, num_kv_heads: config.num_kv_heads, head_dim: config.head_dim }
}

fn address(buffer: &DeviceBuffer) -> Address {
    buffer.as_slice::<u8>().address()
}

/// The sequences of a step, neighbours with few tokens together and neighbours with many.
fn runs(batch: &ForwardBatch) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (first, bounds) in batch.cu_seqlens.windows(2).enumerate() {
        let tokens = (bounds[1] - bounds[0]) as usize;
        let is_decode = |tokens: usize| tokens <= MAX_DECODE_TOKENS;
        match runs.last_mut() {
            Some(run) if is_decode(run.max_tokens) == is_decode(tokens) => {
                run.count += 1;
                run.tokens += tokens;
                run.max_tokens = run.max_tokens.max(tokens);
            }
            _ => runs.push(Run { first, count: 1, tokens, max_tokens: tokens }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_a_kind_are_one_run() {
        let batch = ForwardBatch { cu_seqlens: vec![0, 1, 3, 12, 40, 41], ..ForwardBatch::default() };
        let expected = [(0, 2, 3, 2), (2, 2, 37, 28), (4, 1, 1, 1)]
            .map(|(first, count, tokens, max_tokens)| Run { first, count, tokens, max_tokens });
        assert_eq!(runs(&batch), expected);
        assert!(runs(&ForwardBatch::default()).is_empty());
    }

    #[test]
    fn few_sequences_are_split_and_partial_results_fit() {
        let heads = Heads { num_heads: 32, num_kv_heads: 8, head_dim: 128 };
        let run = |count, max_tokens| Run { first: 0, count, tokens: count * max_tokens, max_tokens };
        let of = |count, max_tokens| num_splits(132, run(count, max_tokens), heads);
        assert_eq!([of(1, 1), of(4, 1), of(24, 1), of(256, 1)], [MAX_SPLITS, 8, 1, 1]);
        assert_eq!(of(4, 8), 4, "eight tokens of four heads are two tiles");
        let splits = of(2048, 8);
        assert!(
            splits >= 1 && launcher::splits_bytes(2048 * 8, heads, splits) >= PARTIAL_BYTES,
            "one always goes"
        );
    }
}
