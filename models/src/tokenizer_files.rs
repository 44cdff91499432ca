//! The tokenizer's data as it lies in a model's files. Turning it into a tokenizer is the server's job.

use std::path::PathBuf;

/// Where a model's tokenizer is.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizerFiles {
    /// The model comes without one: prompts are token ids.
    None,
    /// Inside the GGUF file's metadata.
    Gguf(Box<GgufTokenizer>),
    /// Beside the weights in a Hugging Face folder.
    HuggingFace(HuggingFaceTokenizer),
}

/// The `tokenizer.ggml.*` metadata of a GGUF file. Checked: `token_types` and `scores` are empty or as long as
/// `tokens`, each merge is two pieces with one space between, all ids lie below the number of tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufTokenizer {
    /// Kind of tokenizer: `gpt2` is byte-level BPE, `llama` is SentencePiece.
    pub model: String,
    /// Name of the pre-tokenizer (`smollm`, `llama-bpe`, …); empty if the file names none.
    pub pre: String,
    /// The vocabulary, in the spelling of `model`; index = token id.
    pub tokens: Vec<String>,
    /// Kind of each token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// BPE merges, best first.
    pub merges: Vec<String>,
    /// SentencePiece scores.
    pub scores: Vec<f32>,
    /// Token that starts a sequence.
    pub bos: Option<u32>,
    /// Token that ends a sequence.
    pub eos: Option<u32>,
    /// Token for what the vocabulary lacks.
    pub unknown: Option<u32>,
    /// Token for padding.
    pub padding: Option<u32>,
    /// A prompt starts with `bos`.
    pub add_bos: bool,
    /// A prompt ends with `eos`.
    pub add_eos: bool,
    /// SentencePiece: a space is put before the text.
    pub add_space_prefix: bool,
}

/// Tokenizer files of a Hugging Face folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HuggingFaceTokenizer {
    /// Path of `tokenizer.json`.
    pub tokenizer_json: PathBuf,
    /// Text of the token that starts a sequence, as templates use it (`tokenizer_config.json`).
    pub bos_token: Option<String>,
    /// Text of the token that ends a sequence.
    pub eos_token: Option<String>,
    /// Text of the token for what the vocabulary lacks.
    pub unk_token: Option<String>,
    /// Text of the padding token.
    pub pad_token: Option<String>,
    /// Whether a prompt starts with `bos_token`, if the file says so; else `tokenizer.json` decides.
    pub add_bos_token: Option<bool>,
    /// Whether a prompt ends with `eos_token`, if the file says so.
    pub add_eos_token: Option<bool>,
}
