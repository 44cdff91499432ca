//! `general.*` and `llama.*` metadata to a configuration.

use super::reader::Gguf;
use super::tensors::{has, rope_factors};
use super::tokenizer::control_token;
use super::value::Value;
use crate::config::{FieldNames, GenerationConfig, ModelConfig};
use crate::error::ModelError;
use crate::rope::{RopeConfig, RopeScaling};

const NAMES: FieldNames = FieldNames {
    hidden_size: "llama.embedding_length",
    intermediate_size: "llama.feed_forward_length",
    num_layers: "llama.block_count",
    num_heads: "llama.attention.head_count",
    num_kv_heads: "llama.attention.head_count_kv",
    head_dim: "llama.attention.key_length",
    vocab_size: "llama.vocab_size",
    max_position_embeddings: "llama.context_length",
    rms_norm_eps: "llama.attention.layer_norm_rms_epsilon",
    rope_theta: "llama.rope.freq_base",
    rope_scaling: "llama.rope.scaling",
    rotary_dim: "llama.rope.dimension_count",
    eos_token_id: "tokenizer.ggml.eos_token_id",
    bos_token_id: "tokenizer.ggml.bos_token_id",
};

pub(super) fn read(gguf: &Gguf<'_>) -> Result<ModelConfig, ModelError> {
    check_architecture(gguf)?;
    check_unsupported(gguf)?;
    let hidden_size = gguf.required_size(NAMES.hidden_size)?;
    let num_heads = gguf.required_size(NAMES.num_heads)?;
    let head_dim = head_dim(gguf, hidden_size, num_heads)?;
    let config = ModelConfig {
        hidden_size,
        intermediate_size: gguf.required_size(NAMES.intermediate_size)?,
        num_layers: gguf.required_size(NAMES.num_layers)?,
        num_heads,
        num_kv_heads: gguf.size(NAMES.num_kv_heads)?.unwrap_or(num_heads),
        head_dim,
        vocab_size: vocab_size(gguf)?,
        max_position_embeddings: gguf.required_size(NAMES.max_position_embeddings)?,
        rms_norm_eps: gguf
            .number(NAMES.rms_norm_eps)?
            .ok_or_else(|| gguf.refuse(NAMES.rms_norm_eps, "is missing"))?,
        rope: rope(gguf, head_dim)?,
        // No key says so: the biases are there or not. That each layer has them is checked with the whole table.
        attention_bias: has(gguf, "blk.0.attn_q.bias"),
        attention_output_bias: has(gguf, "blk.0.attn_output.bias"),
        mlp_bias: has(gguf, "blk.0.ffn_gate.bias"),
        tie_word_embeddings: !has(gguf, "output.weight"),
        eos_token_ids: end_tokens(gguf)?,
        bos_token_id: gguf.token_id(NAMES.bos_token_id)?,
        declared_dtype: None,
    };
    config.validate(gguf.file, &NAMES)?;
    Ok(config)
}

/// Recommended sampling, where newer converters put the author's `generation_config.json`.
pub(super) fn generation(gguf: &Gguf<'_>) -> Result<GenerationConfig, ModelError> {
    const TOP_K: &str = "general.sampling.top_k";
    let top_k = gguf
        .size(TOP_K)?
        .map(|top_k| u32::try_from(top_k).map_err(|_| gguf.refuse(TOP_K, "is out of range")));
    let generation = GenerationConfig {
        temperature: gguf.number("general.sampling.temp")?,
        top_k: top_k.transpose()?,
        top_p: gguf.number("general.sampling.top_p")?,
        min_p: gguf.number("general.sampling.min_p")?,
        repetition_penalty: gguf.number("general.sampling.penalty_repeat")?,
    };
    generation.validate(gguf.file)?;
    Ok(generation)
}

fn check_architecture(gguf: &Gguf<'_>) -> Result<(), ModelError> {
    const ARCHITECTURE: &str = "general.architecture";
    match gguf.text(ARCHITECTURE)? {
        Some("llama") => {}
        Some(other) => return Err(gguf.unsupported(ARCHITECTURE, other)),
        None => return Err(gguf.refuse(ARCHITECTURE, "is missing")),
    }
    match gguf.text("general.type")? {
        None | Some("model") => Ok(()),
        Some(other) => Err(gguf.unsupported("general.type", other)),
    }
}

fn check_unsupported(gguf: &Gguf<'_>) -> Result<(), ModelError> {
    // Numbers that change the network unless they have this value.
    for (key, neutral) in
        [("llama.expert_count", 0), ("llama.attention.sliding_window", 0), ("split.count", 1)]
    {
        if let Some(count) = gguf.size(key)?.filter(|&count| count > neutral) {
            return Err(gguf.unsupported(key, &count.to_string()));
        }
    }
    if gguf.flag("llama.attention.causal")? == Some(false) {
        return Err(gguf.unsupported("llama.attention.causal", "false"));
    }
    Ok(())
}

fn head_dim(gguf: &Gguf<'_>, hidden_size: usize, num_heads: usize) -> Result<usize, ModelError> {
    let (key, value) = (gguf.size(NAMES.head_dim)?, gguf.size("llama.attention.value_length")?);
    let from_hidden = match hidden_size.checked_div(num_heads) {
        None => return Err(gguf.refuse(NAMES.num_heads, "must not be zero")),
        Some(head_dim) => head_dim,
    };
    let head_dim = key.unwrap_or(from_hidden);
    if key.is_none() && head_dim * num_heads != hidden_size {
        return Err(gguf.refuse(
            NAMES.num_heads,
            format!("{num_heads} does not divide {}, {hidden_size}", NAMES.hidden_size),
        ));
    }
    match value {
        Some(value) if value != head_dim => {
            Err(gguf
                .refuse("llama.attention.value_length", format!("{value} is not the key length, {head_dim}")))
        }
        _ => Ok(head_dim),
    }
}

fn vocab_size(gguf: &Gguf<'_>) -> Result<usize, ModelError> {
    if let Some(vocab_size) = gguf.size(NAMES.vocab_size)? {
        return Ok(vocab_size);
    }
    match gguf.metadata.get("tokenizer.ggml.tokens") {
        Some(Value::Array(tokens)) => Ok(tokens.len()),
        _ => Err(gguf.refuse(NAMES.vocab_size, "is missing")),
    }
}

fn rope(gguf: &Gguf<'_>, head_dim: usize) -> Result<RopeConfig, ModelError> {
    let rotary_dim = gguf.size(NAMES.rotary_dim)?.unwrap_or(head_dim);
    // The row order of query and key is defined over whole heads.
    if rotary_dim != head_dim {
        return Err(gguf.unsupported(NAMES.rotary_dim, &format!("{rotary_dim} in heads of {head_dim}")));
    }
    let theta = gguf.number(NAMES.rope_theta)?.unwrap_or(10_000.0);
    let scaling = match (scaling(gguf)?, rope_factors(gguf)?) {
        (scaling, None) => scaling,
        (RopeScaling::Default, Some(factors)) => RopeScaling::Factors(factors),
        (_, Some(_)) => return Err(gguf.unsupported(NAMES.rope_scaling, "together with rope_freqs.weight")),
    };
    Ok(RopeConfig { theta, rotary_dim, scaling })
}

/// A factor without a type means linear scaling, as in llama.cpp; 0 means none.
fn scaling(gguf: &Gguf<'_>) -> Result<RopeScaling, ModelError> {
    const TYPE: &str = "llama.rope.scaling.type";
    let factor = match gguf.number("llama.rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => gguf.number("llama.rope.scale_linear")?,
    };
    match (gguf.text(TYPE)?, factor) {
        (Some("none"), _) | (None, None | Some(0.0 | 1.0)) => Ok(RopeScaling::Default),
        (None | Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
        (Some("linear"), None) => Err(gguf.refuse("llama.rope.scaling.factor", "is missing")),
        (Some(other), _) => Err(gguf.unsupported(TYPE, other)),
    }
}

/// The end of the text, and for chat models the end of a turn and of a message. Many files name only the first: then a
/// control token that is spelled like an end of turn counts, as in llama.cpp, or chats would never stop.
fn end_tokens(gguf: &Gguf<'_>) -> Result<Vec<u32>, ModelError> {
    let end_of_turn = match gguf.token_id("tokenizer.ggml.eot_token_id")? {
        Some(id) => Some(id),
        None => control_token(gguf, &["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"]),
    };
    let end_of_text = gguf.token_id(NAMES.eos_token_id)?;
    let end_of_message = gguf.token_id("tokenizer.ggml.eom_token_id")?;
    let mut ids = Vec::new();
    for id in [end_of_text, end_of_turn, end_of_message].into_iter().flatten() {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// Typed access to metadata, with errors that name the key.
impl<'a> Gguf<'a> {
    pub(super) fn refuse(&self, key: &str, reason: impl Into<String>) -> ModelError {
        ModelError::field(self.file, key, reason)
    }

    pub(super) fn unsupported(&self, key: &str, value: &str) -> ModelError {
        ModelError::unsupported(self.file, key, value)
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<u64>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Unsigned(number)) => Ok(Some(number)),
            Some(&Value::Signed(number)) if number >= 0 => Ok(Some(number.cast_unsigned())),
            Some(_) => Err(self.refuse(key, "is not a whole number")),
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let size = self.integer(key)?.map(usize::try_from).transpose();
        size.map_err(|_| self.refuse(key, "is out of range"))
    }

    pub(super) fn required_size(&self, key: &str) -> Result<usize, ModelError> {
        self.size(key)?.ok_or_else(|| self.refuse(key, "is missing"))
    }

    pub(super) fn token_id(&self, key: &str) -> Result<Option<u32>, ModelError> {
        let id = self.integer(key)?.map(u32::try_from).transpose();
        id.map_err(|_| self.refuse(key, "is not a token id"))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Float(number)) if (number as f32).is_finite() => Ok(Some(number as f32)),
            Some(&Value::Unsigned(number)) => Ok(Some(number as f32)),
            Some(&Value::Signed(number)) => Ok(Some(number as f32)),
            Some(_) => Err(self.refuse(key, "is not a finite number")),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(self.refuse(key, "is not true or false")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.refuse(key, "is not a string")),
        }
    }
}
