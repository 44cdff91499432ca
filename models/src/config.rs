//! The shape and the constants of a model: one struct, whichever file it was read from.
//!
//! A [`ModelConfig`] made by this crate is valid: every size is non-zero and bounded, sizes divide as they must,
//! constants are finite, token ids lie below the vocabulary size. Layers, engine and kernels rely on that and do
//! not check again.

use crate::error::ModelError;
use crate::rope::{RopeConfig, RopeScaling};
use tandem_kernels::DType;
use tandem_kernels::cpu::{MAX_GROUP, MAX_HEAD_DIM};

/// A decoder of the Llama family. Differences between models of the family are data here, not code elsewhere.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `E`: width of the residual stream.
    pub hidden_size: usize,
    /// `I`: width of the gated MLP.
    pub intermediate_size: usize,
    /// `L`: number of decoder layers.
    pub num_layers: usize,
    /// `H`: number of query heads.
    pub num_heads: usize,
    /// `K`: number of KV heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// `D`: width of one head; even, not necessarily `E / H`.
    pub head_dim: usize,
    /// `V`: rows of the embedding and of the LM head.
    pub vocab_size: usize,
    /// The longest context the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// The query, key and value projections have biases.
    pub attention_bias: bool,
    /// The attention output projection has a bias.
    pub attention_output_bias: bool,
    /// The gate, up and down projections have biases.
    pub mlp_bias: bool,
    /// The LM head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Token ids that end a sequence, without repeats; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// Token id that starts a sequence, if the model has one.
    pub bos_token_id: Option<u32>,
    /// The type that the file declares for its weights; what lies in the tensors decides, this is a hint.
    pub declared_dtype: Option<DType>,
}

/// Sampling defaults that a model's author recommends. Absent fields leave the server's own defaults in force.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Softmax temperature, at least 0.
    pub temperature: Option<f32>,
    /// How many of the best tokens are kept; 0 = all.
    pub top_k: Option<u32>,
    /// Probability mass that is kept, in (0, 1].
    pub top_p: Option<f32>,
    /// Least share of the best token's probability, in [0, 1].
    pub min_p: Option<f32>,
    /// Penalty on repeated tokens, above 0; 1 = none.
    pub repetition_penalty: Option<f32>,
}

/// What a file calls the fields, so that a refusal names what the user can see.
#[derive(Debug)]
pub(crate) struct FieldNames {
    pub hidden_size: &'static str,
    pub intermediate_size: &'static str,
    pub num_layers: &'static str,
    pub num_heads: &'static str,
    pub num_kv_heads: &'static str,
    pub head_dim: &'static str,
    pub vocab_size: &'static str,
    pub max_position_embeddings: &'static str,
    pub rms_norm_eps: &'static str,
    pub rope_theta: &'static str,
    pub rope_scaling: &'static str,
    pub rotary_dim: &'static str,
    pub eos_token_id: &'static str,
    pub bos_token_id: &'static str,
}

// Bounds far above any known model and far below where products of three of them overflow 64 bits.
const MAX_HIDDEN: usize = 1 << 18;
const MAX_INTERMEDIATE: usize = 1 << 21;
const MAX_LAYERS: usize = 1024;
const MAX_HEADS: usize = 4096;
const MAX_VOCAB: usize = 1 << 22;
const MAX_POSITIONS: usize = 1 << 27;
const MAX_EOS_TOKENS: usize = 64;

impl ModelConfig {
    /// Width of all query heads together, `H × D`.
    pub fn query_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of all KV heads together, `K × D`.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Operations of all decoder layers' linear layers for one token, two per multiply-add.
    pub fn layer_flops_per_token(&self) -> u64 {
        let (hidden, query, kv) = (self.hidden_size, self.query_size(), self.kv_size());
        let per_layer = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * self.intermediate_size;
        2 * (self.num_layers * per_layer) as u64
    }

    /// Operations of the LM head for one row of logits.
    pub fn head_flops_per_row(&self) -> u64 {
        2 * (self.hidden_size * self.vocab_size) as u64
    }

    /// Query heads that share one KV head, `H / K`.
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Checks everything that the rest of the worker takes for granted.
    ///
    /// # Errors
    /// [`ModelError::Field`] with the first field that is wrong.
    pub(crate) fn validate(&self, file: &str, names: &FieldNames) -> Result<(), ModelError> {
        let refuse = |field: &str, reason: String| Err(ModelError::field(file, field, reason));
        for (field, value, max) in [
            (names.hidden_size, self.hidden_size, MAX_HIDDEN),
            (names.intermediate_size, self.intermediate_size, MAX_INTERMEDIATE),
            (names.num_layers, self.num_layers, MAX_LAYERS),
            (names.num_heads, self.num_heads, MAX_HEADS),
            (names.num_kv_heads, self.num_kv_heads, MAX_HEADS),
            (names.head_dim, self.head_dim, MAX_HEAD_DIM),
            (names.vocab_size, self.vocab_size, MAX_VOCAB),
            (names.max_position_embeddings, self.max_position_embeddings, MAX_POSITIONS),
        ] {
            if value == 0 {
                return refuse(field, "must not be zero".into());
            }
            if value > max {
                return refuse(field, format!("{value} is above the limit of {max}"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let (kv, heads) = (self.num_kv_heads, self.num_heads);
            return refuse(names.num_kv_heads, format!("{kv} does not divide {}, {heads}", names.num_heads));
        }
        if self.group_size() > MAX_GROUP {
            let reason =
                format!("{} query heads share a KV head, the limit is {MAX_GROUP}", self.group_size());
            return refuse(names.num_kv_heads, reason);
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse(names.head_dim, format!("{} is odd", self.head_dim));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return refuse(names.rms_norm_eps, format!("{} is not between 0 and 1", self.rms_norm_eps));
        }
        self.validate_rope(file, names)?;
        self.validate_token_ids(file, names)
    }

    fn validate_rope(&self, file: &str, names: &FieldNames) -> Result<(), ModelError> {
        let refuse = |field: &str, reason: String| Err(ModelError::field(file, field, reason));
        let rope = &self.rope;
        if !(rope.theta.is_finite() && rope.theta >= 1.0) {
            return refuse(names.rope_theta, format!("{} is not a finite number of at least 1", rope.theta));
        }
        if rope.rotary_dim == 0 || !rope.rotary_dim.is_multiple_of(2) || rope.rotary_dim > self.head_dim {
            let (rotary, head) = (rope.rotary_dim, self.head_dim);
            return refuse(names.rotary_dim, format!("{rotary} is not an even number from 2 to {head}"));
        }
        let positive = |value: f32| value.is_finite() && value > 0.0;
        match &rope.scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => {
                if !positive(*factor) {
                    return refuse(names.rope_scaling, format!("factor {factor} is not a positive number"));
                }
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                for (key, value) in [
                    ("factor", *factor),
                    ("low_freq_factor", *low_freq_factor),
                    ("high_freq_factor", *high_freq_factor),
                ] {
                    if !positive(value) {
                        return refuse(names.rope_scaling, format!("{key} {value} is not a positive number"));
                    }
                }
                if low_freq_factor >= high_freq_factor {
                    return refuse(
                        names.rope_scaling,
                        "low_freq_factor is not below high_freq_factor".into(),
                    );
                }
                if *original == 0 || *original > MAX_POSITIONS {
                    let reason = format!("original_max_position_embeddings {original} is out of range");
                    return refuse(names.rope_scaling, reason);
                }
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != rope.rotary_dim / 2 {
                    let reason = format!("{} factors, expected {}", factors.len(), rope.rotary_dim / 2);
                    return refuse(names.rope_scaling, reason);
                }
                if let Some(factor) = factors.iter().find(|&&factor| !positive(factor)) {
                    return refuse(names.rope_scaling, format!("factor {factor} is not a positive number"));
                }
            }
        }
        Ok(())
    }

    fn validate_token_ids(&self, file: &str, names: &FieldNames) -> Result<(), ModelError> {
        let refuse = |field: &str, reason: String| Err(ModelError::field(file, field, reason));
        if self.eos_token_ids.len() > MAX_EOS_TOKENS {
            return refuse(names.eos_token_id, format!("more than {MAX_EOS_TOKENS} token ids"));
        }
        let outside = |id: u32| id as usize >= self.vocab_size;
        if let Some(id) = self.eos_token_ids.iter().copied().find(|&id| outside(id)) {
            return refuse(
                names.eos_token_id,
                format!("{id} is not below the vocabulary size {}", self.vocab_size),
            );
        }
        if let Some(id) = self.bos_token_id.filter(|&id| outside(id)) {
            return refuse(
                names.bos_token_id,
                format!("{id} is not below the vocabulary size {}", self.vocab_size),
            );
        }
        Ok(())
    }
}

impl GenerationConfig {
    /// Checks that each recommendation is one a sampler can follow.
    ///
    /// # Errors
    /// [`ModelError::Field`] with the first field that is out of range.
    pub(crate) fn validate(&self, file: &str) -> Result<(), ModelError> {
        type Rule = (&'static str, Option<f32>, fn(f32) -> bool);
        let rules: [Rule; 4] = [
            ("temperature", self.temperature, |value| value >= 0.0),
            ("top_p", self.top_p, |value| value > 0.0 && value <= 1.0),
            ("min_p", self.min_p, |value| (0.0..=1.0).contains(&value)),
            ("repetition_penalty", self.repetition_penalty, |value| value > 0.0),
        ];
        for (field, value, allowed) in rules {
            if let Some(value) = value.filter(|&value| !value.is_finite() || !allowed(value)) {
                return Err(ModelError::field(file, field, format!("{value} is out of range")));
            }
        }
        Ok(())
    }
}
