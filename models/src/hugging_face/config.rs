//! `config.json` and `generation_config.json`, as transformers 4 and 5 write them for `LlamaForCausalLM`.
//!
//! Absent fields have the defaults of transformers' `LlamaConfig`. What would change the network and is not computed
//! (another architecture, another activation, quantised storage, other RoPE scalings) is refused by name, never
//! ignored.

use crate::config::{FieldNames, GenerationConfig, ModelConfig};
use crate::error::ModelError;
use crate::json::Object;
use crate::rope::{RopeConfig, RopeScaling};
use std::path::Path;
use tandem_kernels::DType;

const MAX_CONFIG_BYTES: u64 = 1 << 20;

const NAMES: FieldNames = FieldNames {
    hidden_size: "hidden_size",
    intermediate_size: "intermediate_size",
    num_layers: "num_hidden_layers",
    num_heads: "num_attention_heads",
    num_kv_heads: "num_key_value_heads",
    head_dim: "head_dim",
    vocab_size: "vocab_size",
    max_position_embeddings: "max_position_embeddings",
    rms_norm_eps: "rms_norm_eps",
    rope_theta: "rope_theta",
    rope_scaling: "rope_parameters",
    rotary_dim: "head_dim",
    eos_token_id: "eos_token_id",
    bos_token_id: "bos_token_id",
};

/// Reads both files; `generation_config.json` may be missing. Its `eos_token_id` wins over the one in `config.json`,
/// as in transformers and vLLM: chat models list their end-of-turn tokens there.
pub(crate) fn read(
    config_json: &Path,
    generation_json: &Path,
) -> Result<(ModelConfig, GenerationConfig), ModelError> {
    let mut config = parse(&Object::read(config_json, MAX_CONFIG_BYTES)?)?;
    if !generation_json.is_file() {
        return Ok((config, GenerationConfig::default()));
    }
    let object = Object::read(generation_json, MAX_CONFIG_BYTES)?;
    let generation = parse_generation(&object)?;
    if let Some(ids) = object.token_ids("eos_token_id")? {
        config.eos_token_ids = ids;
        config.validate(&object.file, &NAMES)?;
    }
    Ok((config, generation))
}

fn parse(object: &Object) -> Result<ModelConfig, ModelError> {
    check_architecture(object)?;
    check_unsupported(object)?;

    let hidden_size = object.required_size("hidden_size")?;
    let num_heads = object.required_size("num_attention_heads")?;
    let head_dim = head_dim(object, hidden_size, num_heads)?;
    // One switch for all four attention projections; GGUF files can have them apart.
    let attention_bias = object.flag("attention_bias")?.unwrap_or(false);
    let config = ModelConfig {
        hidden_size,
        intermediate_size: object.required_size("intermediate_size")?,
        num_layers: object.required_size("num_hidden_layers")?,
        num_heads,
        num_kv_heads: object.size("num_key_value_heads")?.unwrap_or(num_heads),
        head_dim,
        vocab_size: object.required_size("vocab_size")?,
        max_position_embeddings: object.size("max_position_embeddings")?.unwrap_or(2048),
        rms_norm_eps: object.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope: rope(object, head_dim)?,
        attention_bias,
        attention_output_bias: attention_bias,
        mlp_bias: object.flag("mlp_bias")?.unwrap_or(false),
        tie_word_embeddings: object.flag("tie_word_embeddings")?.unwrap_or(false),
        eos_token_ids: token_ids(object, "eos_token_id", 2)?,
        bos_token_id: token_ids(object, "bos_token_id", 1)?.first().copied(),
        declared_dtype: declared_dtype(object)?,
    };
    config.validate(&object.file, &NAMES)?;
    Ok(config)
}

fn check_architecture(object: &Object) -> Result<(), ModelError> {
    match object.text("model_type")? {
        Some("llama") => {}
        Some(other) => return Err(object.unsupported("model_type", other)),
        None => return Err(object.refuse("model_type", "is missing")),
    }
    let Some(architectures) = object.get("architectures") else { return Ok(()) };
    let named = architectures.as_array().and_then(|list| list.first()).and_then(|first| first.as_str());
    match named {
        Some("LlamaForCausalLM") => Ok(()),
        Some(other) => Err(object.unsupported("architectures", other)),
        None => Err(object.refuse("architectures", "is not a list of names")),
    }
}

fn check_unsupported(object: &Object) -> Result<(), ModelError> {
    for field in ["quantization_config", "compression_config"] {
        if let Some(quantization) = object.object(field)? {
            let method = quantization.text("quant_method")?.unwrap_or("without quant_method");
            // What of them cannot be used, the shapes of their scales tell.
            let is_fp8 = match method {
                "fp8" => true,
                "compressed-tensors" => quantization.text("format")? == Some("float-quantized"),
                _ => false,
            };
            if !is_fp8 {
                return Err(object.unsupported(&format!("{field}.quant_method"), method));
            }
        }
    }
    let activation = object.text("hidden_act")?.unwrap_or("silu");
    // transformers knows the same function under both names.
    if !matches!(activation, "silu" | "swish") {
        return Err(object.unsupported("hidden_act", activation));
    }
    if let Some(window) =
        object.get("sliding_window").filter(|_| !matches!(object.flag("use_sliding_window"), Ok(Some(false))))
    {
        return Err(object.unsupported("sliding_window", &window.to_string()));
    }
    if let Some(factor) = object.number("partial_rotary_factor")?.filter(|&factor| factor != 1.0) {
        return Err(object.unsupported("partial_rotary_factor", &factor.to_string()));
    }
    Ok(())
}

fn head_dim(object: &Object, hidden_size: usize, num_heads: usize) -> Result<usize, ModelError> {
    if let Some(head_dim) = object.size("head_dim")? {
        return Ok(head_dim);
    }
    match hidden_size.checked_div(num_heads) {
        None => Err(object.refuse("num_attention_heads", "must not be zero")),
        Some(head_dim) if head_dim * num_heads == hidden_size => Ok(head_dim),
        Some(_) => Err(object.refuse(
            "num_attention_heads",
            format!("{num_heads} does not divide hidden_size, {hidden_size}"),
        )),
    }
}

/// A null means none; an absent field has `LlamaConfig`'s default, unless a small vocabulary has no such token.
fn token_ids(object: &Object, field: &str, default: u32) -> Result<Vec<u32>, ModelError> {
    if object.mentions(field) {
        return Ok(object.token_ids(field)?.unwrap_or_default());
    }
    let exists = object.required_size("vocab_size")? > default as usize;
    Ok(if exists { vec![default] } else { Vec::new() })
}

fn declared_dtype(object: &Object) -> Result<Option<DType>, ModelError> {
    // `torch_dtype` until transformers 4.56, `dtype` since.
    let field = if object.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    let Some(name) = object.text(field)? else { return Ok(None) };
    match name.strip_prefix("torch.").unwrap_or(name) {
        "float32" | "float" => Ok(Some(DType::F32)),
        "float16" | "half" => Ok(Some(DType::F16)),
        "bfloat16" => Ok(Some(DType::Bf16)),
        "auto" => Ok(None),
        _ => Err(object.unsupported(field, name)),
    }
}

/// `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5). Files written for both
/// carry both; they must agree.
fn rope(object: &Object, head_dim: usize) -> Result<RopeConfig, ModelError> {
    let old_theta = object.number("rope_theta")?;
    let old_scaling = object
        .object("rope_scaling")?
        .map(|scaling| rope_scaling(object, "rope_scaling", &scaling))
        .transpose()?;
    let Some(parameters) = object.object("rope_parameters")? else {
        let scaling = old_scaling.unwrap_or(RopeScaling::Default);
        return Ok(RopeConfig { theta: old_theta.unwrap_or(10_000.0), rotary_dim: head_dim, scaling });
    };
    let theta = parameters.number("rope_theta")?;
    if let Some((new, old)) = theta.zip(old_theta).filter(|(new, old)| new != old) {
        return Err(
            object.refuse("rope_theta", format!("{old} contradicts rope_parameters.rope_theta, {new}"))
        );
    }
    let scaling = rope_scaling(object, "rope_parameters", &parameters)?;
    if old_scaling.is_some_and(|old| old != scaling) {
        return Err(object.refuse("rope_scaling", "contradicts rope_parameters"));
    }
    Ok(RopeConfig { theta: theta.or(old_theta).unwrap_or(10_000.0), rotary_dim: head_dim, scaling })
}

fn rope_scaling(object: &Object, field: &str, parameters: &Object) -> Result<RopeScaling, ModelError> {
    // One set of parameters per kind of layer: no Llama has that.
    if let Some((key, _)) = parameters.iter().find(|(_, value)| value.is_object()) {
        return Err(object.unsupported(field, &format!("for {key}")));
    }
    if let Some(factor) = parameters.number("partial_rotary_factor")?.filter(|&factor| factor != 1.0) {
        return Err(parameters.unsupported("partial_rotary_factor", &factor.to_string()));
    }
    // `type` is the older name; Llama 3.1's first files had both.
    let named = match parameters.text("rope_type")? {
        Some(named) => Some(("rope_type", named)),
        None => parameters.text("type")?.map(|named| ("type", named)),
    };
    let required = |key: &str| parameters.number(key)?.ok_or_else(|| parameters.refuse(key, "is missing"));
    match named {
        None if field == "rope_scaling" => Err(parameters.refuse("rope_type", "is missing")),
        None | Some((_, "default")) => Ok(RopeScaling::Default),
        Some((_, "linear")) => Ok(RopeScaling::Linear { factor: required("factor")? }),
        Some((_, "llama3")) => Ok(RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_max_position_embeddings: parameters.required_size("original_max_position_embeddings")?,
        }),
        Some((key, other)) => Err(parameters.unsupported(key, other)),
    }
}

fn parse_generation(object: &Object) -> Result<GenerationConfig, ModelError> {
    let top_k = object
        .size("top_k")?
        .map(|top_k| u32::try_from(top_k).map_err(|_| object.refuse("top_k", "is out of range")));
    let generation = GenerationConfig {
        temperature: object.number("temperature")?,
        top_k: top_k.transpose()?,
        top_p: object.number("top_p")?,
        min_p: object.number("min_p")?,
        repetition_penalty: object.number("repetition_penalty")?,
    };
    generation.validate(&object.file)?;
    Ok(generation)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
