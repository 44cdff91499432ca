//! The decoder of the Llama family: embedding, layers of attention and gated MLP, LM head.
//!
//! One code path serves prefill chunks, decodes and draft verifications: [`Llama::forward`] sees only flat arrays
//! and device memory. All working memory is taken once, for the largest step; a step allocates nothing here. Who
//! runs when, which blocks hold what, and what is drawn from the logits is the engine's business.
//!
//! Letters: `T` tokens of the step, `R` rows that need logits, `E`, `I`, `H`, `K`, `D`, `V` as in the crate's root.

mod load;
mod tensor_parallel;

use std::sync::{Mutex, MutexGuard, PoisonError};

use tandem_kernels::cpu::{
    Activation, AttentionBatch, Buffer, Cpu, Epilogue, KvCache, KvCacheConfig, Linear, Rope, Team,
};
use tandem_kernels::{Activations, AttentionPrecision, KvDType};

use crate::batch::ForwardBatch;
use crate::config::ModelConfig;
use crate::shard::{Shard, Share};

pub use load::LoadedBytes;
use tensor_parallel::Exchange;

/// How a model is laid out in memory and computed.
#[derive(Debug, Clone, Copy)]
pub struct LlamaOptions {
    /// Arithmetic class of the linear layers. What a layer's weights cannot do falls back to a more exact class, and with
    /// int8 the first layer, the last one and the LM head take int16.
    pub activations: Activations,
    /// `T`: most tokens of one step.
    pub max_tokens: usize,
    /// `R`: most rows of one step that need logits.
    pub max_logits_rows: usize,
    /// Which part of the model this is.
    pub shard: Shard,
}

/// A loaded model: packed weights and the working memory of one step.
pub struct Llama {
    /// Of this rank's share: its heads and its width of the MLP; the vocabulary is the whole model's.
    config: ModelConfig,
    options: LlamaOptions,
    share: Share,
    loaded: LoadedBytes,
    /// The embedding matrix, unless the LM head is the same matrix.
    embedding: Option<Linear>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    lm_head: Linear,
    work: Workspace,
}

/// Weights of one decoder layer. Query, key and value projections are one matrix, as are gate and up.
struct Layer {
    attention_norm: Vec<f32>,
    qkv: Linear,
    attention_output: Linear,
    /// Of row-parallel layers that several ranks add up: added once, after the sum.
    attention_output_bias: Option<Vec<f32>>,
    mlp_norm: Vec<f32>,
    gate_up: Linear,
    down: Linear,
    down_bias: Option<Vec<f32>>,
}

/// Buffers of one step, each for the most rows that a step may have.
struct Workspace {
    /// `[T, E]` residual stream.
    hidden: Buffer,
    /// `[T, (H + 2K) · D]`.
    qkv: Buffer,
    /// Inputs of linear layers, one set per worker; the first is also that of all workers together.
    inputs: Vec<Mutex<Inputs>>,
    /// `[R, E]` normalised rows that need logits.
    final_normed: Activation,
    /// `[R, V]`.
    logits: Buffer,
    rope: Rope,
    /// What ranks give each other; none in a model of one rank.
    exchange: Option<Exchange>,
}

/// Inputs of linear layers for the rows that a team works on.
struct Inputs {
    /// `[rows, E]` normalised residual stream.
    normed: Activation,
    /// `[rows, H · D]` attention output, and the same as a linear layer's input.
    attention: Buffer,
    attended: Activation,
    /// `[rows, I]` gated MLP.
    gated: Activation,
}

impl Llama {
    /// The configuration of this rank's share: its heads and its width of the MLP; all else is the whole model's.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What loading kept and read.
    pub fn loaded_bytes(&self) -> LoadedBytes {
        self.loaded
    }

    /// The sizes of the KV cache that a model, or a rank's share of it, needs for `num_blocks` blocks.
    pub fn kv_cache_config(config: &ModelConfig, num_blocks: usize, dtype: KvDType) -> KvCacheConfig {
        KvCacheConfig {
            num_layers: config.num_layers,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            num_blocks,
            dtype,
        }
    }

    /// Bytes of packed weights that a step for one token reads: all linear layers and the LM head.
    pub fn bytes_per_step(&self) -> u64 {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.attention_output, &l.gate_up, &l.down]);
        layers.chain([&self.lm_head]).map(|linear| linear.bytes() as u64).sum()
    }

    /// Arithmetic class of most of the model's linear layers, by weight.
    pub fn activations(&self) -> Activations {
        self.layers[self.layers.len() / 2].gate_up.activations()
    }

    /// Computes one step and returns the logits, `[R, V]`, of `batch.logits_rows`.
    ///
    /// Keys and values of the step's tokens are written to `kv` at `batch.slot_mapping`; block copies come first.
    ///
    /// # Panics
    /// If the batch is larger than the options allow or its arrays do not fit together; what makes batches must not. Also
    /// if this is one of several ranks: those go through [`Llama::forward_shard`].
    pub fn forward(&mut self, cpu: &Cpu, batch: &ForwardBatch, kv: &mut KvCache) -> &mut [f32] {
        assert_eq!(self.options.shard, Shard::WHOLE, "one of several ranks");
        let num_tokens = self.begin(batch, kv);
        let precision = self.attention_precision();
        let config = &self.config;
        let work = &mut self.work;
        let hidden = &mut work.hidden[..num_tokens * config.hidden_size];
        let qkv = &mut work.qkv[..num_tokens * (config.query_size() + 2 * config.kv_size())];
        let inputs = &work.inputs;
        cpu.embed(self.embedding.as_ref().unwrap_or(&self.lm_head), &batch.token_ids, hidden);
        cpu.prepare_rope(&mut work.rope, &batch.positions);
        let geometry = geometry(batch);
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        // From one write of keys and values to the next every operation works row by row: one region, which ends with the
        // next layer's queries, keys and values.
        let block_rows = cpu.block_rows(num_tokens, self.layers[0].bytes());
        cpu.for_row_blocks(num_tokens, block_rows, [&mut *hidden, &mut *qkv], |team, _, [hidden, qkv]| {
            self.layers[0].project(team, config, &mut inputs_of(inputs, team), hidden, qkv);
        });
        for (index, layer) in self.layers.iter().enumerate() {
            cpu.rope_and_store_kv(qkv, &work.rope, &batch.slot_mapping, index, kv);
            let (kv, buffers) = (&*kv, [&mut *hidden, &mut *qkv]);
            cpu.for_row_blocks(num_tokens, block_rows, buffers, |team, rows, [hidden, qkv]| {
                let inputs = &mut *inputs_of(inputs, team);
                let attention = &mut inputs.attention[..rows.len() * config.query_size()];
                team.attention(qkv, rows, &geometry, index, kv, scale, precision, attention);
                layer.attention_output(team, inputs, hidden);
                layer.feed_forward(team, config, inputs, hidden);
                if let Some(next) = self.layers.get(index + 1) {
                    next.project(team, config, inputs, hidden, qkv);
                }
            });
        }
        self.head(cpu, batch, num_tokens)
    }

    /// Copies blocks and checks the step's size; the number of its tokens.
    fn begin(&self, batch: &ForwardBatch, kv: &mut KvCache) -> usize {
        for &(from, to) in &batch.block_copies {
            kv.copy_block(from, to);
        }
        let num_tokens = batch.num_tokens();
        assert!(num_tokens <= self.options.max_tokens, "step of {num_tokens} tokens");
        assert!(batch.pending_tokens.is_empty(), "here the step before is over");
        num_tokens
    }

    fn attention_precision(&self) -> AttentionPrecision {
        match self.activations() {
            Activations::Int8 => AttentionPrecision::Rounded,
            _ => AttentionPrecision::Split,
        }
    }

    /// Final norm and LM head, for the rows that need logits only: `[R, V]`, or the columns of this rank's vocabulary rows.
    fn head(&mut self, cpu: &Cpu, batch: &ForwardBatch, num_tokens: usize) -> &mut [f32] {
        let num_rows = batch.logits_rows.len();
        assert!(num_rows <= self.options.max_logits_rows, "step with {num_rows} rows of logits");
        let work = &mut self.work;
        let logits = &mut work.logits[..num_rows * self.share.vocab.len()];
        if num_rows > 0 {
            let hidden = &work.hidden[..num_tokens * self.config.hidden_size];
            work.final_normed.set_class(self.lm_head.activations());
            let eps = self.config.rms_norm_eps;
            let team = cpu.team();
            team.rms_norm_rows(hidden, &batch.logits_rows, &self.norm, eps, &mut work.final_normed);
            team.linear(&self.lm_head, &work.final_normed, logits, Epilogue::Store);
        }
        logits
    }
}

fn geometry(batch: &ForwardBatch) -> AttentionBatch<'_> {
    AttentionBatch {
        cu_seqlens: &batch.cu_seqlens,
        context_lens: &batch.context_lens,
        block_tables: &batch.block_tables,
        block_table_offsets: &batch.block_table_offsets,
    }
}

/// The inputs of the worker that a team is, which no other team uses at the same time.
fn inputs_of<'a>(inputs: &'a [Mutex<Inputs>], team: &Team<'_>) -> MutexGuard<'a, Inputs> {
    inputs[team.worker()].lock().unwrap_or_else(PoisonError::into_inner)
}

impl Layer {
    /// Bytes of packed weights.
    fn bytes(&self) -> usize {
        [&self.qkv, &self.attention_output, &self.gate_up, &self.down].map(Linear::bytes).iter().sum()
    }

    /// `qkv = [q, k, v](norm(hidden))`.
    fn project(
        &self,
        team: &Team<'_>,
        config: &ModelConfig,
        inputs: &mut Inputs,
        hidden: &[f32],
        qkv: &mut [f32],
    ) {
        inputs.normed.set_class(self.qkv.activations());
        team.rms_norm(hidden, &self.attention_norm, config.rms_norm_eps, &mut inputs.normed);
        team.linear(&self.qkv, &inputs.normed, qkv, Epilogue::Store);
    }

    /// `hidden += output(attention)`.
    fn attention_output(&self, team: &Team<'_>, inputs: &mut Inputs, hidden: &mut [f32]) {
        let rows = hidden.len() / self.attention_output.out_features();
        self.round_attention(team, inputs, rows);
        team.linear(&self.attention_output, &inputs.attended, hidden, Epilogue::Add);
    }

    /// The attention of `rows` as input of the output projection.
    fn round_attention(&self, team: &Team<'_>, inputs: &mut Inputs, rows: usize) {
        inputs.attended.set_class(self.attention_output.activations());
        let width = self.attention_output.in_features();
        team.quantize(&inputs.attention[..rows * width], &mut inputs.attended);
    }

    /// `hidden += down(silu(gate(norm(hidden))) · up(norm(hidden)))`.
    fn feed_forward(&self, team: &Team<'_>, config: &ModelConfig, inputs: &mut Inputs, hidden: &mut [f32]) {
        self.gate(team, config, inputs, hidden);
        team.linear(&self.down, &inputs.gated, hidden, Epilogue::Add);
    }

    /// `silu(gate(norm(hidden))) · up(norm(hidden))` as input of the down projection.
    fn gate(&self, team: &Team<'_>, config: &ModelConfig, inputs: &mut Inputs, hidden: &[f32]) {
        inputs.normed.set_class(self.gate_up.activations());
        team.rms_norm(hidden, &self.mlp_norm, config.rms_norm_eps, &mut inputs.normed);
        inputs.gated.set_class(self.down.activations());
        team.gated_linear(&self.gate_up, &inputs.normed, &mut inputs.gated);
    }
}
