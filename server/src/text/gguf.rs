//! Tokenizers out of a GGUF file's metadata.
//!
//! GGUF names its pre-tokenizer instead of describing it, so only names whose exact rules are written here are
//! accepted; a near miss would give plausible and wrong tokens.

use std::collections::HashSet;

use ahash::AHashMap;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use super::added::{AddedToken, AddedTokens};
use super::error::TextError;
use super::tokenizer::{Parts, Tokenizer};
use tandem_engine::GgufTokenizer;

/// Token types of GGUF that matter here: the others are plain vocabulary.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// The expression by which Llama 3 splits text; `llama-bpe` in GGUF files.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// [`TextError::Unsupported`] names a model or pre-tokenizer that is not known; [`TextError::Malformed`] says
    /// what is wrong with the metadata.
    pub fn from_gguf(vocabulary: &GgufTokenizer) -> Result<Self, TextError> {
        if vocabulary.model != "gpt2" {
            return Err(TextError::Unsupported(format!(
                "GGUF tokenizer model {:?} is not supported (only \"gpt2\", byte-level BPE)",
                vocabulary.model
            )));
        }
        let (pre_tokenizer, ignore_merges) = pre_tokenizer(&vocabulary.pre)?;
        check(vocabulary)?;
        let added = added_tokens(vocabulary);
        let hidden: HashSet<&str> = added.iter().map(|t| t.text.as_str()).collect();
        let model = BPE::builder()
            .vocab_and_merges(vocab(vocabulary, &hidden), merges(vocabulary, &hidden)?)
            .ignore_merges(ignore_merges)
            .build()
            .map_err(|e| TextError::Malformed(e.to_string()))?;
        let mut inner = tokenizers::Tokenizer::new(model);
        inner.with_pre_tokenizer(Some(pre_tokenizer));
        Ok(Tokenizer::new(Parts {
            inner,
            inner_rest: None,
            vocab_size: vocabulary.tokens.len(),
            byte_level: true,
            keeps_bytes: true,
            prefix: vocabulary.bos.filter(|_| vocabulary.add_bos).into_iter().collect(),
            suffix: vocabulary.eos.filter(|_| vocabulary.add_eos).into_iter().collect(),
            bos: vocabulary.bos,
            eos: vocabulary.eos,
            pad: vocabulary.padding,
            unknown: vocabulary.unknown,
            added: AddedTokens::new(added)?,
        }))
    }
}

/// The pre-tokenizer of a name, and whether words of the vocabulary are taken whole before merging.
fn pre_tokenizer(name: &str) -> Result<(PreTokenizerWrapper, bool), TextError> {
    let bytes = |use_regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, use_regex));
    let split = |pattern: &str| -> Result<PreTokenizerWrapper, TextError> {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|e| TextError::Malformed(e.to_string()))?;
        Ok(PreTokenizerWrapper::Split(split))
    };
    let sequence = |steps| PreTokenizerWrapper::Sequence(Sequence::new(steps));
    Ok(match name {
        "smollm" => (sequence(vec![PreTokenizerWrapper::Digits(Digits::new(true)), bytes(true)]), false),
        "gpt-2" => (bytes(true), false),
        "llama-bpe" | "llama3" | "llama-v3" => (sequence(vec![split(LLAMA3)?, bytes(false)]), true),
        other => {
            return Err(TextError::Unsupported(format!(
                "GGUF pre-tokenizer {other:?} is not supported (known: smollm, gpt-2, llama-bpe)"
            )));
        }
    })
}

fn check(vocabulary: &GgufTokenizer) -> Result<(), TextError> {
    let count = vocabulary.tokens.len();
    let malformed = |what: String| Err(TextError::Malformed(what));
    if count == 0 || count > u32::MAX as usize {
        return malformed(format!("{count} tokens in tokenizer.ggml.tokens"));
    }
    if !vocabulary.token_types.is_empty() && vocabulary.token_types.len() != count {
        let types = vocabulary.token_types.len();
        return malformed(format!("{types} entries in tokenizer.ggml.token_type for {count} tokens"));
    }
    let ids = [("bos", vocabulary.bos), ("eos", vocabulary.eos), ("unknown", vocabulary.unknown)];
    for (name, id) in ids {
        if let Some(id) = id.filter(|&id| id as usize >= count) {
            return malformed(format!(
                "tokenizer.ggml.{name}_token_id {id} is outside the vocabulary of {count}"
            ));
        }
    }
    Ok(())
}

fn added_tokens(vocabulary: &GgufTokenizer) -> Vec<AddedToken> {
    let typed = vocabulary.tokens.iter().zip(&vocabulary.token_types).enumerate();
    typed
        .filter(|(_, (_, kind))| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind))
        .map(|(id, (text, &kind))| AddedToken {
            id: id as u32,
            text: text.clone(),
            special: kind != USER_DEFINED,
            ..AddedToken::default()
        })
        .collect()
}

/// The plain vocabulary. Added tokens are left out, so that the model can never make one out of text.
fn vocab(vocabulary: &GgufTokenizer, hidden: &HashSet<&str>) -> AHashMap<String, u32> {
    let tokens = vocabulary.tokens.iter().enumerate().rev();
    // Reversed, so that of two equal tokens the first id wins.
    tokens.filter(|(_, t)| !hidden.contains(t.as_str())).map(|(id, t)| (t.clone(), id as u32)).collect()
}

fn merges(vocabulary: &GgufTokenizer, hidden: &HashSet<&str>) -> Result<Vec<(String, String)>, TextError> {
    let mut merges = Vec::with_capacity(vocabulary.merges.len());
    for (rank, merge) in vocabulary.merges.iter().enumerate() {
        let Some((left, right)) = merge.split_once(' ').filter(|(l, r)| !l.is_empty() && !r.is_empty())
        else {
            return Err(TextError::Malformed(format!("entry {rank} of tokenizer.ggml.merges is no pair")));
        };
        let touches_added = !hidden.is_empty()
            && (hidden.contains(left)
                || hidden.contains(right)
                || hidden.contains(format!("{left}{right}").as_str()));
        if !touches_added {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(merges)
}
