//! Tokenizers out of a Hugging Face `tokenizer.json`.
//!
//! The file is edited before the `tokenizers` crate sees it: added tokens are taken out (our own splitter finds
//! them), also out of the model's vocabulary, so that text can never become a special token; truncation and padding
//! are dropped, since a prompt is never cut silently.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;
use tokenizers::{Encoding, PostProcessor, Token};

use super::added::{AddedToken, AddedTokens};
use super::error::TextError;
use super::tokenizer::{Parts, Tokenizer};
use tandem_engine::HuggingFaceTokenizer;

/// The largest `tokenizer.json` that is read; the largest in use have about 35 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Ids above this are a mistake in the file (tables are as long as the largest id).
const MAX_ID: u32 = 16 << 20;

impl Tokenizer {
    /// Builds the tokenizer of a `tokenizer.json` and what `tokenizer_config.json` says beside it.
    ///
    /// # Errors
    /// [`TextError::File`] with the path and the reason.
    pub fn from_file(files: &HuggingFaceTokenizer) -> Result<Self, TextError> {
        let path = files.tokenizer_json.as_path();
        let fail = |reason: String| TextError::File { path: path.to_path_buf(), reason };
        let mut json = read_json(path).map_err(fail)?;
        let added = take_added_tokens(&mut json).map_err(fail)?;
        hide(&mut json, &added);
        let inner = parse(&json).map_err(fail)?;
        let inner_rest = match prepends_at_start_only(&mut json) {
            true => Some(parse(&json).map_err(fail)?),
            false => None,
        };
        let added = AddedTokens::new(added)?;
        let id_of = |text: &Option<String>| {
            text.as_deref().and_then(|text| added.id_of(text).or_else(|| inner.token_to_id(text)))
        };
        let (bos, eos) = (id_of(&files.bos_token), id_of(&files.eos_token));
        let (prefix, suffix) = around(&inner).map_err(fail)?;
        let vocab_size = inner.get_vocab(false).into_values().chain(added.iter().map(|t| t.id)).max();
        let vocab_size = match vocab_size {
            Some(id) if id <= MAX_ID => id as usize + 1,
            Some(id) => return Err(fail(format!("token id {id} is out of range"))),
            None => return Err(fail("the vocabulary is empty".to_owned())),
        };
        let byte_level = kinds(&json["decoder"]).iter().all(|&kind| kind == "ByteLevel")
            && !kinds(&json["decoder"]).is_empty();
        Ok(Tokenizer::new(Parts {
            vocab_size,
            byte_level,
            keeps_bytes: json["normalizer"].is_null(),
            prefix: adjusted(prefix, files.add_bos_token, bos),
            suffix: adjusted(suffix, files.add_eos_token, eos),
            bos,
            eos,
            pad: id_of(&files.pad_token),
            unknown: id_of(&files.unk_token)
                .or_else(|| json["model"]["unk_token"].as_str().and_then(|text| added.id_of(text))),
            inner,
            inner_rest,
            added,
        }))
    }
}

fn read_json(path: &Path) -> Result<Value, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|e| e.to_string())?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("larger than {MAX_FILE_BYTES} bytes"));
    }
    serde_json::from_str(&text).map_err(|e| e.to_string())
}

fn parse(json: &Value) -> Result<tokenizers::Tokenizer, String> {
    serde_json::from_value(json.clone()).map_err(|e| e.to_string())
}

/// Takes the added tokens out of the file, with truncation and padding.
fn take_added_tokens(json: &mut Value) -> Result<Vec<AddedToken>, String> {
    let Some(file) = json.as_object_mut() else { return Err("not a JSON object".to_owned()) };
    file.insert("truncation".to_owned(), Value::Null);
    file.insert("padding".to_owned(), Value::Null);
    let tokens = file.insert("added_tokens".to_owned(), Value::Array(Vec::new()));
    let Some(Value::Array(tokens)) = tokens else { return Ok(Vec::new()) };
    tokens
        .iter()
        .map(|token| added_token(token).ok_or_else(|| format!("added token {token} is malformed")))
        .collect()
}

fn added_token(token: &Value) -> Option<AddedToken> {
    let flag = |name: &str| token[name].as_bool().unwrap_or(false);
    Some(AddedToken {
        id: u32::try_from(token["id"].as_u64()?).ok().filter(|&id| id <= MAX_ID)?,
        text: token["content"].as_str()?.to_owned(),
        special: flag("special"),
        lstrip: flag("lstrip"),
        rstrip: flag("rstrip"),
        single_word: flag("single_word"),
    })
}

/// Takes special tokens out of the model's vocabulary (they stay known as added tokens), except the one for what
/// cannot be expressed, which the model needs.
fn hide(json: &mut Value, added: &[AddedToken]) {
    let model = &mut json["model"];
    let unknown = model["unk_token"].as_str().map(str::to_owned);
    let unknown_id = model["unk_id"].as_u64();
    let hidden =
        |text: &str| Some(text) != unknown.as_deref() && added.iter().any(|t| t.special && t.text == text);
    match &mut model["vocab"] {
        Value::Object(vocab) => {
            for token in added.iter().filter(|t| hidden(&t.text)) {
                vocab.remove(&token.text);
            }
        }
        // Unigram: the position is the id, so the piece stays and gets a name that no text has (a noncharacter).
        Value::Array(pieces) => {
            for token in added.iter().filter(|t| t.special && Some(u64::from(t.id)) != unknown_id) {
                if let Some(piece) = pieces.get_mut(token.id as usize)
                    && piece[0].as_str() == Some(token.text.as_str())
                {
                    piece[0] = Value::String(format!("\u{fdd0}{}", token.id));
                }
            }
        }
        _ => {}
    }
    let special: HashSet<&str> = added.iter().filter(|t| t.special).map(|t| t.text.as_str()).collect();
    if special.is_empty() {
        return;
    }
    if let Value::Array(merges) = &mut model["merges"] {
        merges.retain(|merge| {
            let (left, right) = match merge {
                Value::String(pair) => pair.split_once(' ').unwrap_or((pair, "")),
                pair => (pair[0].as_str().unwrap_or(""), pair[1].as_str().unwrap_or("")),
            };
            let joined = format!("{left}{right}");
            ![left, right, joined.as_str()].iter().any(|text| special.contains(text))
        });
    }
}

/// Turns pre-tokenizers that put a mark before the very first piece only into ones that never do, for the pieces
/// after the first; whether there was one.
fn prepends_at_start_only(json: &mut Value) -> bool {
    fn walk(step: &mut Value) -> bool {
        if step["type"] == "Metaspace" && step["prepend_scheme"] == "first" {
            step["prepend_scheme"] = Value::String("never".to_owned());
            return true;
        }
        match step.get_mut("pretokenizers").and_then(Value::as_array_mut) {
            Some(steps) => steps.iter_mut().fold(false, |found, step| walk(step) | found),
            None => false,
        }
    }
    json.get_mut("pre_tokenizer").is_some_and(walk)
}

/// What the post-processor puts before and after a text.
fn around(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    let Some(post_processor) = inner.get_post_processor() else { return Ok((Vec::new(), Vec::new())) };
    let marker = Token::new(u32::MAX, String::new(), (0, 0));
    let encoding = Encoding::from_tokens(vec![marker], 0);
    let around = post_processor.process(encoding, None, true).map_err(|e| e.to_string())?;
    let ids = around.get_ids();
    let Some(at) = ids.iter().position(|&id| id == u32::MAX) else { return Ok((Vec::new(), Vec::new())) };
    Ok((ids[..at].to_vec(), ids[at + 1..].to_vec()))
}

/// `tokenizer_config.json` has the last word on BOS and EOS.
fn adjusted(ids: Vec<u32>, wanted: Option<bool>, id: Option<u32>) -> Vec<u32> {
    match (wanted, id) {
        (Some(true), Some(id)) if !ids.contains(&id) => vec![id],
        (Some(false), Some(id)) => ids.into_iter().filter(|&other| other != id).collect(),
        _ => ids,
    }
}

/// The kinds of a decoder's steps.
fn kinds(decoder: &Value) -> Vec<&str> {
    match decoder["decoders"].as_array() {
        Some(steps) => steps.iter().flat_map(kinds).collect(),
        None => decoder["type"].as_str().into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{metadata, tokenizer};
    use super::super::tokenizer::SpecialTokens;
    use super::*;

    /// The test vocabulary of GGUF as a `tokenizer.json`.
    fn byte_level_file() -> Value {
        let metadata = metadata();
        let vocab: serde_json::Map<String, Value> =
            metadata.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let added = |id: usize, special: bool| json!({ "id": id, "content": metadata.tokens[id], "special": special, "normalized": false });
        json!({
            "version": "1.0",
            "truncation": { "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 },
            "padding": null,
            "added_tokens": [added(0, true), added(1, true), added(2, true), added(3, false)],
            "normalizer": null,
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                { "type": "Digits", "individual_digits": true },
                { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            ] },
            "post_processor": { "type": "TemplateProcessing",
                "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
                "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } } },
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
            "model": { "type": "BPE", "vocab": vocab, "merges": metadata.merges, "unk_token": null },
        })
    }

    /// A SentencePiece-like vocabulary with bytes as a fallback.
    fn metaspace_file() -> Value {
        let mut vocab = serde_json::Map::new();
        for token in ["<unk>", "<s>", "</s>"] {
            vocab.insert(token.to_owned(), json!(vocab.len()));
        }
        for byte in 0..=255u8 {
            vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
        }
        for token in ["▁", "a", "b", "▁a", "ab", "▁ab"] {
            vocab.insert(token.to_owned(), json!(vocab.len()));
        }
        let added = |id: usize, text: &str| json!({ "id": id, "content": text, "special": true });
        json!({
            "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
            "normalizer": null,
            "pre_tokenizer": { "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false },
            "post_processor": null,
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "ByteFallback" }, { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
            ] },
            "model": { "type": "BPE", "vocab": vocab, "merges": ["▁ a", "a b", "▁a b"], "unk_token": "<unk>",
                "byte_fallback": true, "fuse_unk": true },
        })
    }

    fn load(json: &Value, change: impl FnOnce(&mut HuggingFaceTokenizer)) -> Result<Tokenizer, TextError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), json.to_string()).unwrap();
        let mut files = HuggingFaceTokenizer {
            tokenizer_json: file.path().to_path_buf(),
            ..HuggingFaceTokenizer::default()
        };
        change(&mut files);
        Tokenizer::from_file(&files)
    }

    #[test]
    fn agrees_with_the_same_vocabulary_from_gguf() {
        let (a, b) = (load(&byte_level_file(), |_| {}).unwrap(), tokenizer());
        for text in ["hello hello €12", "<|im_start|>x<think> <s>", ""] {
            for special in [SpecialTokens::Parse, SpecialTokens::AsText] {
                let ids = a.encode(text, special).unwrap();
                assert_eq!(ids, b.encode(text, special).unwrap(), "{text}");
                assert_eq!(a.decode(&ids, true), b.decode(&ids, true));
            }
        }
        assert_eq!(a.vocab_size(), b.vocab_size());
        assert_eq!(a.encode_prompt("hello", true).unwrap(), b.encode_prompt("hello", true).unwrap());
    }

    #[test]
    fn tokenizer_config_has_the_last_word_on_bos() {
        let bos = |add| {
            let tokenizer = load(&byte_level_file(), |files| {
                files.bos_token = Some("<s>".to_owned());
                files.add_bos_token = add;
            });
            tokenizer.unwrap().encode_prompt("", true).unwrap()
        };
        assert_eq!((bos(None), bos(Some(true)), bos(Some(false))), (vec![0], vec![0], vec![]));
    }

    #[test]
    fn metaspace_vocabularies_stream_and_keep_specials_out_of_text() {
        let tokenizer = std::sync::Arc::new(load(&metaspace_file(), |_| {}).unwrap());
        let parsed = tokenizer.encode("ab</s>ab", SpecialTokens::Parse).unwrap();
        let token = |text: &str| tokenizer.id_of(text).unwrap();
        // Only the very first piece gets the mark.
        assert_eq!(parsed, [token("▁ab"), 2, token("ab")]);
        for text in ["ab a€b", "<s></s>", "é"] {
            let ids = tokenizer.encode(text, SpecialTokens::AsText).unwrap();
            assert!(!ids.iter().any(|&id| tokenizer.is_special(id)), "{text}: {ids:?}");
            assert_eq!(tokenizer.decode(&ids, false), text);
            let mut detokenizer = tokenizer.detokenizer(false);
            let pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
            assert!(!pieces.concat().contains('\u{fffd}'));
            assert_eq!(pieces.concat() + &detokenizer.finish(), text);
        }
        assert_eq!(tokenizer.token_bytes(token("<0xE2>")), [0xe2]);
        assert_eq!(tokenizer.token_text(token("▁ab")), " ab");
        assert_eq!(tokenizer.token_bytes(1), b"<s>");
    }

    #[test]
    fn broken_files_are_refused_with_their_path() {
        for json in [
            json!([]),
            json!({}),
            json!({ "added_tokens": [{}] }),
            json!({ "model": { "type": "BPE", "vocab": 3 } }),
        ] {
            let error = load(&json, |_| {}).unwrap_err();
            assert!(matches!(&error, TextError::File { .. }), "{error}");
        }
        let missing = HuggingFaceTokenizer {
            tokenizer_json: "/nowhere.json".into(),
            ..HuggingFaceTokenizer::default()
        };
        assert!(Tokenizer::from_file(&missing).unwrap_err().to_string().starts_with("/nowhere.json"));
    }
}
