//! `tokenizer.*` metadata to plain, checked data.

use super::reader::Gguf;
use super::value::{Array, Value};
use crate::error::ModelError;
use crate::tokenizer_files::{GgufTokenizer, TokenizerFiles};

/// The longest chat template, in bytes; real ones have up to 20 KB.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const TEMPLATE: &str = "tokenizer.chat_template";

/// The tokenizer and the chat template of a file whose configuration has `vocab_size` tokens.
pub(super) fn read(
    gguf: &Gguf<'_>,
    vocab_size: usize,
) -> Result<(TokenizerFiles, Option<String>), ModelError> {
    let chat_template = gguf.text(TEMPLATE)?;
    if chat_template.is_some_and(|template| template.len() > MAX_TEMPLATE_BYTES) {
        return Err(gguf.refuse(TEMPLATE, format!("larger than the limit of {MAX_TEMPLATE_BYTES} bytes")));
    }
    let tokenizer = match gguf.text("tokenizer.ggml.model")? {
        None | Some("none" | "no_vocab") => TokenizerFiles::None,
        Some(model) => TokenizerFiles::Gguf(Box::new(tokenizer(gguf, model, vocab_size)?)),
    };
    Ok((tokenizer, chat_template.map(str::to_owned)))
}

/// The first control token with one of these spellings.
pub(super) fn control_token(gguf: &Gguf<'_>, spellings: &[&str]) -> Option<u32> {
    const CONTROL: i32 = 3;
    let (Value::Array(tokens), Value::Array(types)) =
        (gguf.metadata.get(TOKENS)?, gguf.metadata.get(TOKEN_TYPES)?)
    else {
        return None;
    };
    let mut typed = tokens.strings()?.zip(types.i32s()?);
    let id = typed.position(|(token, kind)| kind == CONTROL && spellings.contains(&token))?;
    u32::try_from(id).ok()
}

fn tokenizer(gguf: &Gguf<'_>, model: &str, vocab_size: usize) -> Result<GgufTokenizer, ModelError> {
    let tokens = strings(gguf, TOKENS)?.ok_or_else(|| gguf.refuse(TOKENS, "is missing"))?;
    // Fewer is fine: embeddings are often padded to a round number of rows.
    if tokens.is_empty() || tokens.len() > vocab_size {
        return Err(gguf.refuse(TOKENS, format!("{} tokens for a vocabulary of {vocab_size}", tokens.len())));
    }
    let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or_default();
    let num_tokens = tokens.len();
    let id = |key: &str| match gguf.token_id(key)? {
        Some(id) if id as usize >= num_tokens => {
            Err(gguf.refuse(key, format!("{id} is not below the number of tokens, {num_tokens}")))
        }
        id => Ok(id),
    };
    Ok(GgufTokenizer {
        tokens,
        token_types: token_types(gguf, num_tokens)?,
        merges: merges(gguf)?,
        scores: scores(gguf, num_tokens)?,
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        unknown: id("tokenizer.ggml.unknown_token_id")?,
        padding: id("tokenizer.ggml.padding_token_id")?,
        add_bos: gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or_else(|| adds_bos(model, pre)),
        add_eos: gguf.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
        add_space_prefix: gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(model == "llama"),
        model: model.to_owned(),
        pre: pre.to_owned(),
    })
}

/// Where the file is silent, what llama.cpp does: SentencePiece models and the Llama 3 family start with `bos`.
fn adds_bos(model: &str, pre: &str) -> bool {
    model == "llama" || matches!(pre, "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral")
}

fn list<'a>(gguf: &Gguf<'a>, key: &str) -> Result<Option<Array<'a>>, ModelError> {
    match gguf.metadata.get(key) {
        None => Ok(None),
        Some(&Value::Array(array)) => Ok(Some(array)),
        Some(_) => Err(gguf.refuse(key, "is not a list")),
    }
}

fn strings(gguf: &Gguf<'_>, key: &str) -> Result<Option<Vec<String>>, ModelError> {
    let Some(array) = list(gguf, key)? else { return Ok(None) };
    let strings = array.strings().ok_or_else(|| gguf.refuse(key, "is not a list of strings"))?;
    Ok(Some(strings.map(str::to_owned).collect()))
}

fn token_types(gguf: &Gguf<'_>, num_tokens: usize) -> Result<Vec<i32>, ModelError> {
    let Some(array) = list(gguf, TOKEN_TYPES)? else { return Ok(Vec::new()) };
    let types: Vec<i32> =
        array.i32s().ok_or_else(|| gguf.refuse(TOKEN_TYPES, "is not a list of 32-bit numbers"))?.collect();
    check_length(gguf, TOKEN_TYPES, types.len(), num_tokens)?;
    match types.iter().find(|kind| !(0..=6).contains(*kind)) {
        Some(kind) => Err(gguf.refuse(TOKEN_TYPES, format!("{kind} is no kind of token"))),
        None => Ok(types),
    }
}

fn scores(gguf: &Gguf<'_>, num_tokens: usize) -> Result<Vec<f32>, ModelError> {
    let Some(array) = list(gguf, SCORES)? else { return Ok(Vec::new()) };
    let scores: Vec<f32> = array.f32s().ok_or_else(|| gguf.refuse(SCORES, "is not a list of F32"))?.collect();
    check_length(gguf, SCORES, scores.len(), num_tokens)?;
    if scores.iter().any(|score| score.is_nan()) {
        return Err(gguf.refuse(SCORES, "a score is not a number"));
    }
    Ok(scores)
}

fn merges(gguf: &Gguf<'_>) -> Result<Vec<String>, ModelError> {
    let merges = strings(gguf, MERGES)?.unwrap_or_default();
    // Byte-level BPE writes a space inside a piece as another letter, so the one space separates.
    let well_formed = |merge: &str| {
        merge
            .split_once(' ')
            .is_some_and(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '))
    };
    match merges.iter().position(|merge| !well_formed(merge)) {
        Some(idx) => {
            Err(gguf.refuse(MERGES, format!("entry {idx} is not two pieces with one space between")))
        }
        None => Ok(merges),
    }
}

fn check_length(gguf: &Gguf<'_>, key: &str, len: usize, num_tokens: usize) -> Result<(), ModelError> {
    if len == num_tokens {
        return Ok(());
    }
    Err(gguf.refuse(key, format!("{len} entries for {num_tokens} tokens")))
}
