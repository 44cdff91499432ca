//! Tensor names of Llama GGUF files, in the spelling of Hugging Face.

use crate::weights::RowOrder;

/// The divisors of the RoPE frequencies: part of the configuration, not a weight.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Canonical name and row order of a tensor; `None` for a name that no Llama has.
pub(super) fn canonical(name: &str, head_dim: usize) -> Option<(String, RowOrder)> {
    let whole = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some((whole.to_owned(), RowOrder::Natural));
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.split_once('.')?;
    // Only the plain spelling of a number: `00` would be a second name for layer 0.
    let layer: u32 = layer.parse().ok().filter(|number: &u32| number.to_string() == layer)?;
    let module = match (part, kind) {
        ("attn_norm", "weight") => "input_layernorm",
        ("ffn_norm", "weight") => "post_attention_layernorm",
        ("attn_q", "weight" | "bias") => "self_attn.q_proj",
        ("attn_k", "weight" | "bias") => "self_attn.k_proj",
        ("attn_v", "weight" | "bias") => "self_attn.v_proj",
        ("attn_output", "weight" | "bias") => "self_attn.o_proj",
        ("ffn_gate", "weight" | "bias") => "mlp.gate_proj",
        ("ffn_up", "weight" | "bias") => "mlp.up_proj",
        ("ffn_down", "weight" | "bias") => "mlp.down_proj",
        _ => return None,
    };
    let row_order =
        if matches!(part, "attn_q" | "attn_k") { RowOrder::GgufRope { head_dim } } else { RowOrder::Natural };
    Some((format!("model.layers.{layer}.{module}.{kind}"), row_order))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_one_to_one() {
        let name = |name| canonical(name, 64).map(|(name, _)| name);
        assert_eq!(name("token_embd.weight").as_deref(), Some("model.embed_tokens.weight"));
        assert_eq!(name("blk.11.attn_output.bias").as_deref(), Some("model.layers.11.self_attn.o_proj.bias"));
        assert_eq!(
            name("blk.0.ffn_norm.weight").as_deref(),
            Some("model.layers.0.post_attention_layernorm.weight")
        );
        for unknown in [
            "blk.00.attn_q.weight",
            "blk.+1.attn_q.weight",
            "blk.0.attn_q_norm.weight",
            "blk.0.attn_norm.bias",
            "blk.0.attn_q.weight.x",
            "blk.attn_q.weight",
            "blk.99999999999.attn_q.weight",
            "output",
            "model.norm.weight",
            "",
        ] {
            assert_eq!(name(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn only_query_and_key_rows_are_permuted() {
        let order = |name| canonical(name, 64).unwrap().1;
        for name in ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_q.bias", "blk.0.attn_k.bias"] {
            assert_eq!(order(name), RowOrder::GgufRope { head_dim: 64 });
        }
        for name in ["blk.0.attn_v.weight", "blk.0.attn_output.weight", "output.weight"] {
            assert_eq!(order(name), RowOrder::Natural);
        }
    }
}
