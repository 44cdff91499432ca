//! A small byte-level vocabulary for tests: the 256 bytes, a few merges, special and added tokens.

use std::sync::Arc;

use tandem_engine::GgufTokenizer;

use super::byte_level::byte_to_char;
use super::tokenizer::Tokenizer;

pub(super) const BOS: u32 = 0;
pub(super) const IM_START: u32 = 1;
pub(super) const IM_END: u32 = 2;
/// Added, but not special.
pub(super) const THINK: u32 = 3;

pub(super) fn metadata() -> GgufTokenizer {
    let mut tokens: Vec<String> =
        ["<s>", "<|im_start|>", "<|im_end|>", "<think>"].map(str::to_owned).to_vec();
    let mut token_types = vec![3, 3, 3, 4];
    tokens.extend((0..=255u8).map(|byte| byte_to_char(byte).to_string()));
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "â Ĥ"].map(str::to_owned).to_vec();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    token_types.resize(tokens.len(), 1);
    GgufTokenizer {
        model: "gpt2".to_owned(),
        pre: "smollm".to_owned(),
        tokens,
        token_types,
        merges,
        bos: Some(BOS),
        eos: Some(IM_END),
        add_bos: true,
        ..GgufTokenizer::default()
    }
}

pub(super) fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_gguf(&metadata()).unwrap())
}
