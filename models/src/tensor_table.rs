//! Which tensors a configuration needs, and whether a source has exactly those.
//!
//! The check runs on names, shapes and types alone, before any weight is read, so that a model that cannot be
//! computed is refused while the worker starts. A tensor that the configuration has no use for is refused too: the
//! network was trained with it, and leaving it out would compute another network.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::weights::{TensorInfo, WeightSource};
use tandem_kernels::DType;

/// A tensor that the forward pass reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Canonical name.
    pub name: String,
    /// `[rows, cols]` or `[len]`.
    pub shape: Vec<usize>,
}

/// All tensors that `config` needs: embedding, layers in order, final norm, LM head unless tied.
pub fn required_tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.query_size(), config.kv_size());
    let (attention, output, mlp) = (config.attention_bias, config.attention_output_bias, config.mlp_bias);
    let linears = [
        ("self_attn.q_proj", query, hidden, attention),
        ("self_attn.k_proj", kv, hidden, attention),
        ("self_attn.v_proj", kv, hidden, attention),
        ("self_attn.o_proj", hidden, query, output),
        ("mlp.gate_proj", intermediate, hidden, mlp),
        ("mlp.up_proj", intermediate, hidden, mlp),
        ("mlp.down_proj", hidden, intermediate, mlp),
    ];

    let mut specs = Vec::new();
    let mut push = |name: String, shape: &[usize]| specs.push(TensorSpec { name, shape: shape.to_vec() });
    push("model.embed_tokens.weight".into(), &[config.vocab_size, hidden]);
    for layer in 0..config.num_layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            push(format!("model.layers.{layer}.{norm}.weight"), &[hidden]);
        }
        for (linear, rows, cols, has_bias) in linears {
            push(format!("model.layers.{layer}.{linear}.weight"), &[rows, cols]);
            if has_bias {
                push(format!("model.layers.{layer}.{linear}.bias"), &[rows]);
            }
        }
    }
    push("model.norm.weight".into(), &[hidden]);
    if !config.tie_word_embeddings {
        push("lm_head.weight".into(), &[config.vocab_size, hidden]);
    }
    specs
}

/// Compares a source with the configuration: every needed tensor in its exact shape, vectors in a plain
/// floating-point type, nothing left over.
///
/// # Errors
/// [`ModelError::Tensor`] for the first tensor that is missing, of the wrong shape or type, or without use.
pub(crate) fn check(
    file: &str,
    config: &ModelConfig,
    source: &dyn WeightSource,
) -> Result<Vec<TensorSpec>, ModelError> {
    let specs = required_tensors(config);
    for spec in &specs {
        let info =
            source.info(&spec.name).ok_or_else(|| ModelError::tensor(file, &spec.name, "is missing"))?;
        check_one(file, spec, info)?;
    }
    if let Some(name) = first_unused(config, &specs, source) {
        return Err(ModelError::tensor(file, &name, "has no use in this configuration"));
    }
    Ok(specs)
}

fn check_one(file: &str, spec: &TensorSpec, info: &TensorInfo) -> Result<(), ModelError> {
    if info.shape != spec.shape {
        let reason = format!("shape {:?}, expected {:?} from the configuration", info.shape, spec.shape);
        return Err(ModelError::tensor(file, &spec.name, reason));
    }
    if spec.shape.len() == 1 && !matches!(info.dtype, DType::F32 | DType::F16 | DType::Bf16) {
        let reason = format!("type {} of a vector is not supported", info.dtype.name());
        return Err(ModelError::tensor(file, &spec.name, reason));
    }
    Ok(())
}

fn first_unused(config: &ModelConfig, specs: &[TensorSpec], source: &dyn WeightSource) -> Option<String> {
    let mut needed: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    needed.sort_unstable();
    let harmless = |name: &str| {
        // Old checkpoints store the RoPE frequencies, which follow from the configuration; and some store the tied
        // LM head a second time.
        name.ends_with(".rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight")
    };
    let unused = |name: &&str| needed.binary_search(name).is_err() && !harmless(name);
    source.names().into_iter().find(unused).map(str::to_owned)
}
