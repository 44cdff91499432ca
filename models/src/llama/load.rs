//! From tensors by name to packed weights.

use std::sync::Mutex;

use tandem_kernels::cpu::{
    Activation, BLOCK_ROWS, Buffer, Cpu, Layout, Linear, LinearSpec, MAX_SEGMENTS, Part, Rope, SegmentPlan,
};
use tandem_kernels::{Activations, KernelError};

use super::{Inputs, Layer, Llama, LlamaOptions, Workspace};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::weights::{RowOrder, Tensor, WeightSource};

impl Llama {
    /// Packs a model's weights for `cpu` and takes the working memory of one step.
    ///
    /// `name` is what errors call the model's file. Each tensor is read once and may be dropped by the source after.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if a tensor is missing or cannot be packed.
    pub fn load(
        cpu: &Cpu,
        name: &str,
        config: ModelConfig,
        weights: &dyn WeightSource,
        options: LlamaOptions,
    ) -> Result<Self, ModelError> {
        let loader = Loader { cpu, name, weights, activations: options.activations };
        let segments = SegmentPlan::new(row_parallel_segments(&config));
        let plain = loader.plain();
        let embedding = (!config.tie_word_embeddings)
            .then(|| loader.linear(&["model.embed_tokens"], plain))
            .transpose()?;
        let head = if config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        let lm_head = loader.linear(&[head], loader.precise())?;
        let last = config.num_layers - 1;
        let layer = |index| {
            let spec = if index == 0 || index == last { loader.precise() } else { plain };
            loader.layer(index, spec, segments)
        };
        let layers = (0..config.num_layers).map(layer).collect::<Result<_, _>>()?;
        let norm = loader.vector("model.norm.weight")?;
        let work = Workspace::new(&config, &options, cpu.threads());
        Ok(Self { config, options, embedding, layers, norm, lm_head, work })
    }
}

/// `G`: into how many segments the inputs of row-parallel layers are split, so that every tensor-parallel size that
/// divides `G` adds in the same order: `gcd(K, I / 32, H · D / 32)`, or 1 where these are not whole. Where that is more than
/// the kernels take, its largest divisor that they do.
fn row_parallel_segments(config: &ModelConfig) -> usize {
    const UNIT: usize = 32;
    let (intermediate, query) = (config.intermediate_size, config.query_size());
    if !intermediate.is_multiple_of(UNIT) || !query.is_multiple_of(UNIT) {
        return 1;
    }
    let common = gcd(config.num_kv_heads, gcd(intermediate / UNIT, query / UNIT));
    (1..=common.min(MAX_SEGMENTS)).rev().find(|&count| common.is_multiple_of(count)).unwrap_or(1)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

struct Loader<'a> {
    cpu: &'a Cpu,
    name: &'a str,
    weights: &'a dyn WeightSource,
    activations: Activations,
}

impl Loader<'_> {
    fn layer(&self, index: usize, plain: LinearSpec, segments: SegmentPlan) -> Result<Layer, ModelError> {
        let in_layer = |part: &str| format!("model.layers.{index}.{part}");
        let linear = |parts: &[&str], spec| {
            let names: Vec<String> = parts.iter().map(|part| in_layer(part)).collect();
            self.linear(&names, spec)
        };
        let row_parallel = LinearSpec { segments, ..plain };
        Ok(Layer {
            attention_norm: self.vector(&in_layer("input_layernorm.weight"))?,
            qkv: linear(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], plain)?,
            attention_output: linear(&["self_attn.o_proj"], row_parallel)?,
            mlp_norm: self.vector(&in_layer("post_attention_layernorm.weight"))?,
            gate_up: linear(
                &["mlp.gate_proj", "mlp.up_proj"],
                LinearSpec { layout: Layout::GateUp, ..plain },
            )?,
            down: linear(&["mlp.down_proj"], row_parallel)?,
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

    /// One packed linear layer from the tensors `{name}.weight` and, where they exist, `{name}.bias`.
    fn linear<S: AsRef<str>>(&self, names: &[S], spec: LinearSpec) -> Result<Linear, ModelError> {
        let sources = names.iter().map(|name| self.source(name.as_ref())).collect::<Result<Vec<_>, _>>()?;
        let parts = sources.iter().map(LinearSource::part).collect::<Result<Vec<_>, _>>();
        let packed = parts.and_then(|parts| self.cpu.pack_linear(&parts, &spec));
        packed.map_err(|error| ModelError::tensor(self.name, names[0].as_ref(), error.to_string()))
    }

    fn source(&self, name: &str) -> Result<LinearSource<'_>, ModelError> {
        let weight = self.weights.tensor(&format!("{name}.weight"))?;
        let order = weight.row_order;
        let bias_name = format!("{name}.bias");
        let bias = match self.weights.contains(&bias_name) {
            true => Some(in_file_order(&self.vector(&bias_name)?, order)),
            false => None,
        };
        Ok(LinearSource { weight, bias, file_row: Box::new(move |row| order.file_row(row)) })
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
    file_row: Box<dyn Fn(usize) -> usize + Sync>,
}

impl LinearSource<'_> {
    fn part(&self) -> Result<Part<'_>, KernelError> {
        let mut part = Part::new(self.weight.matrix()?);
        if let Some(bias) = &self.bias {
            part = part.bias(bias);
        }
        Ok(match self.weight.row_order {
            RowOrder::Natural => part,
            RowOrder::GgufRope { .. } => part.permute(&*self.file_row),
        })
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
    fn new(config: &ModelConfig, options: &LlamaOptions, workers: usize) -> Self {
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
            logits: Buffer::zeroed(rows * config.vocab_size),
            rope: Rope::new(&config.rope.inverse_frequencies(), 1.0, tokens),
        }
    }
}
