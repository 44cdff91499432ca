//! Reference data from Hugging Face transformers; `golden/README.md` says how it was made.

use serde::Deserialize;

use crate::golden_path;

/// `smollm2/golden.json`.
#[derive(Debug, Deserialize)]
pub struct Golden {
    pub cases: Vec<Case>,
    pub tokenizer: Vec<TokenizerCase>,
}

/// One prompt with what the reference made of it.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// The conversation, for chat prompts.
    pub messages: Option<serde_json::Value>,
    /// The prompt's text, after the chat template.
    pub text: String,
    pub ids: Vec<u32>,
    pub greedy: Vec<u32>,
    pub greedy_text: String,
    /// Distance between the two best logits at each greedy step.
    pub greedy_margin: Vec<f32>,
    /// Log-probability of each prompt token but the first.
    pub prompt_logprobs: Vec<f32>,
}

/// A text, its tokens, and the text of those tokens.
#[derive(Debug, Deserialize)]
pub struct TokenizerCase {
    pub text: String,
    pub ids: Vec<u32>,
    pub decoded: String,
}

/// Loads the real model's reference data.
pub fn load() -> Golden {
    let text =
        std::fs::read_to_string(golden_path("smollm2/golden.json")).expect("reference data is readable");
    serde_json::from_str(&text).expect("reference data is well-formed")
}
