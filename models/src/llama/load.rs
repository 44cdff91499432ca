//! From tensors by name to packed weights.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Mutex;

use tandem_kernels::cpu::{
    Activation, BLOCK_ROWS, Buffer, Cpu, Layout, Linear, LinearSpec, Part, Rope, SegmentPlan,
};
use tandem_kernels::{Activations, KernelError};

use super::{Exchange, Inputs, Layer, Llama, LlamaOptions, Workspace};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::shard::{Shard, Share, Slice, TensorParallel};
use crate::weights::{RowOrder, Tensor, WeightSource};

/// What loading a model, or a rank's share of it, came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadedBytes {
    /// Packed weights in memory.
    pub kept: u64,
    /// Bytes of the tensors that were touched. A rank's stripe of the columns of a matrix touches every page that it crosses,
    /// which is all of them where rows are short.
    pub read: u64,
}

impl Llama {
    /// Packs a model's weights for `cpu`, those of the options' shard, and takes the working memory of one step.
    ///
    /// `name` is what errors call the model's file. Each tensor is read once and may be dropped by the source after.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if a tensor is missing or cannot be packed, [`ModelError::Field`] if the model cannot be split
    /// so.
    pub fn load(
        cpu: &Cpu,
        name: &str,
        config: ModelConfig,
        weights: &dyn WeightSource,
        options: LlamaOptions,
    ) -> Result<Self, ModelError> {
        TensorParallel::plan(name, &config, options.shard.size)?;
        let share = Share::new(&config, options.shard);
        let (activations, shard) = (options.activations, options.shard);
        let loader = Loader { cpu, name, weights, activations, shard, share: &share, bytes: Cell::default() };
        let plain = loader.plain();
        let vocab = |tensor: &str, spec| loader.linear(&[Slice::rows(tensor, &share.vocab)], spec);
        let embedding =
            (!config.tie_word_embeddings).then(|| vocab("model.embed_tokens", plain)).transpose()?;
        let head = if config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        let lm_head = vocab(head, loader.precise())?;
        let last = config.num_layers - 1;
        let layer = |index| {
            let spec = if index == 0 || index == last { loader.precise() } else { plain };
            loader.layer(index, spec)
        };
        let layers = (0..config.num_layers).map(layer).collect::<Result<_, _>>()?;
        let norm = loader.vector("model.norm.weight")?;
        let loaded = loader.bytes.get();
        let config = share.config(&config);
        let work = Workspace::new(&config, &share, &options, cpu.threads());
        Ok(Self { config, options, share, loaded, embedding, layers, norm, lm_head, work })
    }
}

struct Loader<'a> {
    cpu: &'a Cpu,
    name: &'a str,
    weights: &'a dyn WeightSource,
    activations: Activations,
    shard: Shard,
    share: &'a Share,
    bytes: Cell<LoadedBytes>,
}

impl Loader<'_> {
    fn layer(&self, index: usize, plain: LinearSpec) -> Result<Layer, ModelError> {
        let in_layer = |part: &str| format!("model.layers.{index}.{part}");
        let column_parallel = |parts: &[(&str, &Range<usize>)], spec| {
            let names: Vec<String> = parts.iter().map(|(part, _)| in_layer(part)).collect();
            let slices: Vec<Slice<'_>> =
                names.iter().zip(parts).map(|(name, (_, rows))| Slice::rows(name, rows)).collect();
            self.linear(&slices, spec)
        };
        let segments = SegmentPlan::new(self.share.segments);
        let row_parallel = |part: &str, cols: &Range<usize>| {
            let name = in_layer(part);
            let linear = self.linear(&[Slice::cols(&name, cols)], LinearSpec { segments, ..plain })?;
            Ok::<_, ModelError>((linear, self.bias_of_sum(&name)?))
        };
        let Share { queries, keys, intermediate, .. } = self.share;
        let (attention_output, attention_output_bias) = row_parallel("self_attn.o_proj", queries)?;
        let (down, down_bias) = row_parallel("mlp.down_proj", intermediate)?;
        let qkv = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)];
        let gate_up = [("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)];
        Ok(Layer {
            attention_norm: self.vector(&in_layer("input_layernorm.weight"))?,
            qkv: column_parallel(&qkv, plain)?,
            attention_output,
            attention_output_bias,
            mlp_norm: self.vector(&in_layer("post_attention_layernorm.weight"))?,
            gate_up: column_parallel(&gate_up, LinearSpec { layout: Layout::GateUp, ..plain })?,
            down,
            down_bias,
        })
    }

    fn plain(&self) -> LinearSpec {
        LinearSpec { activations: self.activations, segments: SegmentPlan::whole(), layout: Layout::Plain }
    }

    /// For the first layer, the last one and the LM head: what the first gets wrong all others build on, and what the last
    /// gets wrong none averages out. Int8 there would be a third of all that int8 costs (measured on SmolLM2 Q4_1:
    /// docs/performance.md).
    fn precise(&self) -> LinearSpec {
        let activations = match self.activations {
            Activations::Int8 => Activations::Int16,
            other => other,
        };
        LinearSpec { activations, ..self.plain() }
    }

    /// One packed linear layer from the tensors `{name}.weight` and, where they exist and belong to the rows, `{name}.bias`.
    fn linear(&self, slices: &[Slice<'_>], spec: LinearSpec) -> Result<Linear, ModelError> {
        let sources = slices.iter().map(|slice| self.source(slice)).collect::<Result<Vec<_>, _>>()?;
        let parts = sources.iter().map(LinearSource::part).collect::<Result<Vec<_>, _>>();
        let packed = parts.and_then(|parts| self.cpu.pack_linear(&parts, &spec));
        let packed =
            packed.map_err(|error| ModelError::tensor(self.name, slices[0].name, error.to_string()))?;
        let LoadedBytes { kept, read } = self.bytes.get();
        let touched: u64 = sources.iter().map(LinearSource::bytes_touched).sum();
        self.bytes.set(LoadedBytes { kept: kept + packed.bytes() as u64, read: read + touched });
        Ok(packed)
    }

    fn source(&self, slice: &Slice<'_>) -> Result<LinearSource<'_>, ModelError> {
        let name = slice.name;
        let weight = self.weights.tensor(&format!("{name}.weight"))?;
        let order = weight.row_order;
        let rows = slice.rows_of(&weight);
        let cols = slice.cols_of(&weight);
        // The bias of a sum over ranks is nobody's share.
        let is_sum_of_ranks = slice.cols.is_some() && self.shard.size > 1;
        let bias = match self.bias(name)? {
            Some(bias) if !is_sum_of_ranks => Some(in_file_order(&bias, order)),
            _ => None,
        };
        Ok(LinearSource { weight, bias, rows, cols, file_row: Box::new(move |row| order.file_row(row)) })
    }

    /// The bias that is added once after the sum over ranks.
    fn bias_of_sum(&self, name: &str) -> Result<Option<Vec<f32>>, ModelError> {
        if self.shard.size > 1 { self.bias(name) } else { Ok(None) }
    }

    fn bias(&self, name: &str) -> Result<Option<Vec<f32>>, ModelError> {
        let name = format!("{name}.bias");
        self.weights.contains(&name).then(|| self.vector(&name)).transpose()
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let tensor = self.weights.tensor(name)?;
        tensor.to_f32_vector().ok_or_else(|| ModelError::tensor(self.name, name, "is not a vector of floats"))
    }
}

/// What one part of a fused linear layer is packed from.
struct LinearSource<'a> {
    weight: Tensor<'a>,
    /// In the order of the weight's rows.
    bias: Option<Vec<f32>>,
    rows: Range<usize>,
    cols: Range<usize>,
    file_row: Box<dyn Fn(usize) -> usize + Sync>,
}

impl LinearSource<'_> {
    fn part(&self) -> Result<Part<'_>, KernelError> {
        let mut part = Part::new(self.weight.matrix()?).rows(self.rows.clone()).cols(self.cols.clone());
        if let Some(bias) = &self.bias {
            part = part.bias(bias);
        }
        Ok(match self.weight.row_order {
            RowOrder::Natural => part,
            RowOrder::GgufRope { .. } => part.permute(&*self.file_row),
        })
    }

    /// Bytes of the tensor on pages that packing reads.
    fn bytes_touched(&self) -> u64 {
        const PAGE: usize = 4096;
        let row_bytes = self.weight.data.len() / self.weight.rows();
        let touched = if self.cols.len() == self.weight.cols() {
            row_bytes
        } else {
            let stripe = row_bytes * self.cols.len() / self.weight.cols();
            (stripe + PAGE).min(row_bytes)
        };
        (self.rows.len() * touched) as u64
    }
}

fn in_file_order(natural: &[f32], order: RowOrder) -> Vec<f32> {
    let mut in_file = vec![0.0; natural.len()];
    for (row, &value) in natural.iter().enumerate() {
        in_file[order.file_row(row)] = value;
    }
    in_file
}

impl Workspace {
    fn new(config: &ModelConfig, share: &Share, options: &LlamaOptions, workers: usize) -> Self {
        let (tokens, rows) = (options.max_tokens, options.max_logits_rows);
        let (hidden, query) = (config.hidden_size, config.query_size());
        let input = |rows, cols| Activation::new(rows, cols, options.activations);
        let inputs = |rows| Inputs {
            normed: input(rows, hidden),
            attention: Buffer::zeroed(rows * query),
            attended: input(rows, query),
            gated: input(rows, config.intermediate_size),
        };
        let of_worker =
            |worker| Mutex::new(inputs(if worker == 0 { tokens } else { tokens.min(BLOCK_ROWS) }));
        Self {
            hidden: Buffer::zeroed(tokens * hidden),
            qkv: Buffer::zeroed(tokens * (query + 2 * config.kv_size())),
            inputs: (0..workers).map(of_worker).collect(),
            final_normed: input(rows, hidden),
            logits: Buffer::zeroed(rows * share.vocab.len()),
            rope: Rope::new(&config.rope.inverse_frequencies(), 1.0, tokens),
            exchange: (options.shard.size > 1).then(|| Exchange::new(config, share, options)),
        }
    }
}
