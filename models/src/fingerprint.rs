//! A model's identity in 16 bytes.
//!
//! Workers that exchange KV or form a group compare fingerprints first: two models that differ in configuration,
//! tokenizer, tensor table or sizes differ here for certain, and models of the same shape differ by the weights that
//! are sampled from each tensor. Reading all weights would double the time to start. Paths, names and chat templates
//! are no part of it: the same files under another name are the same model.

use std::path::PathBuf;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::json::read_bounded;
use crate::tensor_table::TensorSpec;
use crate::tokenizer_files::{GgufTokenizer, HuggingFaceTokenizer, TokenizerFiles};
use crate::weights::{RowOrder, WeightSource};
use blake3::Hasher;

/// The largest `tokenizer.json`, in bytes; the largest known ones have 35 MB.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// The digest of a checked model.
pub(crate) fn fingerprint(
    config: &ModelConfig,
    tokenizer: &TokenizerFiles,
    specs: &[TensorSpec],
    weights: &dyn WeightSource,
) -> Result<[u8; 16], ModelError> {
    let mut hasher = Hasher::new_derive_key("tandem model fingerprint v1");
    // The debug form names every field, so a new field can not be forgotten here.
    text(&mut hasher, &format!("{config:?}"));
    match tokenizer {
        TokenizerFiles::None => text(&mut hasher, "no tokenizer"),
        TokenizerFiles::Gguf(tokenizer) => gguf_tokenizer(&mut hasher, tokenizer),
        TokenizerFiles::HuggingFace(files) => {
            bytes(&mut hasher, &read_bounded(&files.tokenizer_json, MAX_TOKENIZER_BYTES)?);
            let rest = HuggingFaceTokenizer { tokenizer_json: PathBuf::new(), ..files.clone() };
            text(&mut hasher, &format!("{rest:?}"));
        }
    }
    for spec in specs {
        let Some(info) = weights.info(&spec.name) else { continue };
        text(&mut hasher, &spec.name);
        text(&mut hasher, info.dtype.name());
        number(&mut hasher, info.shape.len() as u64);
        info.shape.iter().for_each(|&size| number(&mut hasher, size as u64));
        match info.row_order {
            RowOrder::Natural => number(&mut hasher, 0),
            RowOrder::GgufRope { head_dim } => number(&mut hasher, head_dim as u64),
        }
        bytes(&mut hasher, &weights.sample(&spec.name)?);
    }
    let mut digest = [0; 16];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    Ok(digest)
}

fn gguf_tokenizer(hasher: &mut Hasher, tokenizer: &GgufTokenizer) {
    let GgufTokenizer { tokens, token_types, merges, scores, .. } = tokenizer;
    for list in [tokens, merges] {
        number(hasher, list.len() as u64);
        list.iter().for_each(|entry| text(hasher, entry));
    }
    number(hasher, token_types.len() as u64);
    token_types.iter().for_each(|kind| number(hasher, u64::from(kind.cast_unsigned())));
    number(hasher, scores.len() as u64);
    scores.iter().for_each(|score| number(hasher, u64::from(score.to_bits())));
    let rest = GgufTokenizer {
        tokens: Vec::new(),
        token_types: Vec::new(),
        merges: Vec::new(),
        scores: Vec::new(),
        ..tokenizer.clone()
    };
    text(hasher, &format!("{rest:?}"));
}

// Every piece is preceded by its length, so that no two sequences of pieces are the same bytes.

fn bytes(hasher: &mut Hasher, bytes: &[u8]) {
    number(hasher, bytes.len() as u64);
    hasher.update(bytes);
}

fn text(hasher: &mut Hasher, text: &str) {
    bytes(hasher, text.as_bytes());
}

fn number(hasher: &mut Hasher, number: u64) {
    hasher.update(&number.to_le_bytes());
}
