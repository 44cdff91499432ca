//! Text to token ids and back.
//!
//! The `tokenizers` crate does normalising, pre-tokenising and the model; added tokens are found by our own splitter
//! ([`super::added`]), because which special tokens may be read out of a text depends on where the text came from.
//! Byte-level vocabularies (all that GGUF files bring here, and most others) are decoded by a table of bytes, so that
//! a token's bytes are exact; others by the crate's decoder.

use std::sync::Arc;

use tandem_engine::TokenizerFiles;
use tokenizers::{Decoder, EncodeInput};

use super::added::{AddedTokens, Piece, Specials};
use super::byte_level;
use super::detokenize::Detokenizer;
use super::error::TextError;
use super::template::RenderedChat;

/// The most bytes of text that are tokenized at once: what a chat template may write.
pub const MAX_TEXT_BYTES: usize = 4 << 20;

/// How special tokens that are spelled out in a text are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// They become the special tokens.
    Parse,
    /// They are text like any other.
    AsText,
}

/// A model's tokenizer. Shared by `Arc`; all methods take `&self` and block no one.
#[derive(Debug)]
pub struct Tokenizer {
    pub(super) parts: Parts,
    /// Token id to bytes; `None` where the vocabulary is not byte-level.
    bytes: Option<Vec<Box<[u8]>>>,
    /// Longest token in bytes, where a text cannot take fewer tokens than its bytes over that.
    longest: Option<usize>,
}

/// What a tokenizer is built from, whatever file it came from.
#[derive(Debug)]
pub(super) struct Parts {
    /// Without added tokens; its vocabulary holds no special token that its model could produce from text.
    pub(super) inner: tokenizers::Tokenizer,
    /// For every piece but the first, where pre-tokenising differs there.
    pub(super) inner_rest: Option<tokenizers::Tokenizer>,
    pub(super) added: AddedTokens,
    pub(super) vocab_size: usize,
    pub(super) byte_level: bool,
    /// Nothing in the text disappears before the model sees it.
    pub(super) keeps_bytes: bool,
    /// Put around a plain prompt.
    pub(super) prefix: Vec<u32>,
    pub(super) suffix: Vec<u32>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) pad: Option<u32>,
    pub(super) unknown: Option<u32>,
}

impl Tokenizer {
    /// The tokenizer that a model's files describe; `None` if the model comes without one.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`] and [`Tokenizer::from_file`].
    pub fn from_model(files: &TokenizerFiles) -> Result<Option<Self>, TextError> {
        match files {
            TokenizerFiles::None => Ok(None),
            TokenizerFiles::Gguf(metadata) => Self::from_gguf(metadata).map(Some),
            TokenizerFiles::HuggingFace(files) => Self::from_file(files).map(Some),
        }
    }

    pub(super) fn new(parts: Parts) -> Self {
        let bytes = parts.byte_level.then(|| byte_table(&parts));
        let longest = match &bytes {
            Some(table) if parts.keeps_bytes => table.iter().map(|b| b.len()).max().filter(|&n| n > 0),
            _ => None,
        };
        Self { parts, bytes, longest }
    }

    /// Token ids of a text; adds no BOS.
    ///
    /// # Errors
    /// [`TextError::TooLong`] past 4 MiB, [`TextError::Encode`] where the model cannot express the text.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TextError> {
        match special {
            SpecialTokens::Parse => self.encode_pieces(text, Specials::Between(&[])),
            SpecialTokens::AsText => self.encode_pieces(text, Specials::Nowhere),
        }
    }

    /// Token ids of a plain prompt: special tokens are parsed, and with `add_special_tokens` the model's own BOS (and
    /// what else its post-processor adds) is put around it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let ids = self.encode(text, SpecialTokens::Parse)?;
        if !add_special_tokens {
            return Ok(ids);
        }
        Ok([self.parts.prefix.as_slice(), &ids, &self.parts.suffix].concat())
    }

    /// What the model wants in front of a plain prompt: its BOS, or nothing.
    pub fn prefix(&self) -> &[u32] {
        &self.parts.prefix
    }

    /// Token ids of a rendered chat: the template's special tokens are parsed, those in the messages are text. Adds
    /// no BOS; a template writes its own.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_chat(&self, chat: &RenderedChat) -> Result<Vec<u32>, TextError> {
        self.encode_pieces(chat.text(), Specials::Between(chat.cuts()))
    }

    /// No fewer tokens than this can hold `text`; costs nothing, so over-long prompts can be refused first.
    pub fn min_tokens(&self, text: &str) -> usize {
        self.longest.map_or(0, |longest| text.len().div_ceil(longest))
    }

    /// The text of token ids, invalid UTF-8 replaced. Ids outside the vocabulary decode to nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let ids = ids.iter().copied().filter(|&id| !(skip_special && self.is_special(id)));
        if self.bytes.is_some() {
            let bytes: Vec<u8> = ids.flat_map(|id| self.raw_bytes(id)).copied().collect();
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        let tokens: Vec<String> = ids.filter_map(|id| self.raw_token(id)).collect();
        match self.parts.inner.get_decoder() {
            // A decoder that fails on a vocabulary's own tokens has nothing better to show than the tokens.
            Some(decoder) => decoder.decode(tokens.clone()).unwrap_or_else(|_| tokens.concat()),
            None => tokens.join(" "),
        }
    }

    /// The text of one token as shown beside its log-probability: bytes that are no whole character are replaced.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// The bytes that one token stands for; none for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        if self.bytes.is_some() {
            return self.raw_bytes(id).to_vec();
        }
        let Some(token) = self.raw_token(id) else { return Vec::new() };
        if self.parts.added.get(id).is_some() {
            return token.into_bytes();
        }
        match byte_fallback(&token) {
            Some(byte) => vec![byte],
            // SentencePiece's mark for a space.
            None => token.replace('▁', " ").into_bytes(),
        }
    }

    /// Whether `skip_special` leaves this token out.
    pub fn is_special(&self, id: u32) -> bool {
        self.parts.added.get(id).is_some_and(|token| token.special)
    }

    /// The id of a token given as the vocabulary spells it (`"<|im_end|>"`, `"Ġhello"`).
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.parts.added.id_of(token).or_else(|| self.parts.inner.token_to_id(token))
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.parts.vocab_size
    }

    /// A decoder for one stream of ids.
    pub fn detokenizer(self: &Arc<Self>, skip_special: bool) -> Detokenizer {
        Detokenizer::new(Arc::clone(self), skip_special)
    }

    pub(super) fn is_byte_level(&self) -> bool {
        self.bytes.is_some()
    }

    /// A byte-level token's bytes.
    pub(super) fn raw_bytes(&self, id: u32) -> &[u8] {
        self.bytes.as_ref().and_then(|table| table.get(id as usize)).map_or(&[], |bytes| bytes)
    }

    pub(super) fn added(&self) -> &AddedTokens {
        &self.parts.added
    }

    fn raw_token(&self, id: u32) -> Option<String> {
        match self.parts.added.get(id) {
            Some(token) => Some(token.text.clone()),
            None => self.parts.inner.id_to_token(id),
        }
    }

    fn encode_pieces(&self, text: &str, specials: Specials<'_>) -> Result<Vec<u32>, TextError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TextError::TooLong { limit: MAX_TEXT_BYTES });
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        for piece in self.parts.added.split(text, specials) {
            match piece {
                Piece::Token(id) => ids.push(id),
                Piece::Text(range) => self.encode_piece(&text[range.clone()], range.start == 0, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// Encodes text without added tokens.
    fn encode_piece(&self, text: &str, first: bool, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let inner = match &self.parts.inner_rest {
            Some(rest) if !first => rest,
            _ => &self.parts.inner,
        };
        let failed = |e: tokenizers::Error| TextError::Encode(e.to_string());
        let encoding = inner.encode_fast(EncodeInput::Single(text.into()), false).map_err(failed)?;
        // The vocabulary was stripped of special tokens, so this cannot happen with any known kind of model; a client
        // must not be able to write one all the same.
        let forbidden = |&id: &u32| self.is_special(id) && Some(id) != self.parts.unknown;
        if encoding.get_ids().iter().any(forbidden) {
            return Err(TextError::Encode("special token in plain text".to_owned()));
        }
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

/// Bytes of every id; empty for ids that the vocabulary leaves out.
fn byte_table(parts: &Parts) -> Vec<Box<[u8]>> {
    let mut table = vec![Box::default(); parts.vocab_size];
    for (token, id) in parts.inner.get_vocab(false) {
        if let Some(slot) = table.get_mut(id as usize) {
            *slot = byte_level::token_bytes(&token).into_boxed_slice();
        }
    }
    for token in parts.added.iter() {
        if let Some(slot) = table.get_mut(token.id as usize) {
            *slot = byte_level::token_bytes(&token.text).into_boxed_slice();
        }
    }
    table
}

/// `<0x0A>` and its like.
fn byte_fallback(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 { None } else { u8::from_str_radix(hex, 16).ok() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{BOS, IM_END, IM_START, THINK, metadata, tokenizer};
    use super::*;

    #[test]
    fn specials_are_parsed_or_text_as_asked() {
        let tokenizer = tokenizer();
        let hello = tokenizer.id_of("hello").unwrap();
        let parsed = tokenizer.encode("<|im_start|>hello<|im_end|>", SpecialTokens::Parse).unwrap();
        assert_eq!(parsed, [IM_START, hello, IM_END]);
        let text = tokenizer.encode("<|im_start|>hello<think>", SpecialTokens::AsText).unwrap();
        assert!(text.iter().all(|&id| !tokenizer.is_special(id)));
        assert_eq!(text.last(), Some(&THINK));
        assert_eq!(tokenizer.decode(&text, true), "<|im_start|>hello<think>");
        assert_eq!(tokenizer.decode(&parsed, true), "hello");
    }

    #[test]
    fn a_prompt_gets_the_bos_that_the_model_wants() {
        let tokenizer = tokenizer();
        assert_eq!(tokenizer.encode_prompt("", true).unwrap(), [BOS]);
        assert_eq!(tokenizer.encode_prompt("", false).unwrap(), [] as [u32; 0]);
    }

    #[test]
    fn one_token_shows_its_text_and_its_bytes() {
        let tokenizer = tokenizer();
        let half = tokenizer.id_of("âĤ").unwrap();
        assert_eq!(tokenizer.token_bytes(half), [0xe2, 0x82]);
        assert_eq!(tokenizer.token_text(half), "\u{fffd}");
        assert_eq!(tokenizer.token_text(tokenizer.id_of("Ġhello").unwrap()), " hello");
        assert_eq!(tokenizer.token_text(IM_END), "<|im_end|>");
        assert!(tokenizer.token_bytes(1 << 20).is_empty());
        assert_eq!(tokenizer.decode(&[1 << 20], false), "");
    }

    #[test]
    fn texts_past_the_limit_are_refused() {
        let long = "a".repeat(MAX_TEXT_BYTES + 1);
        assert!(matches!(tokenizer().encode(&long, SpecialTokens::Parse), Err(TextError::TooLong { .. })));
    }

    #[test]
    fn unknown_kinds_are_refused_by_name() {
        let refused = |change: fn(&mut tandem_engine::GgufTokenizer)| {
            let mut metadata = metadata();
            change(&mut metadata);
            Tokenizer::from_gguf(&metadata).unwrap_err().to_string()
        };
        assert!(refused(|m| m.pre = "poro".to_owned()).contains("\"poro\""));
        assert!(refused(|m| m.model = "llama".to_owned()).contains("\"llama\""));
        assert!(refused(|m| m.merges.push("ab".to_owned())).contains("merges"));
        assert!(refused(|m| m.token_types.truncate(3)).contains("token_type"));
        assert!(refused(|m| m.eos = Some(9999)).contains("9999"));
    }

    #[test]
    fn a_merge_cannot_make_a_special_token() {
        let mut metadata = metadata();
        metadata.merges = ["< s", "<s >"].map(str::to_owned).to_vec();
        metadata.tokens.push("<s".to_owned());
        metadata.token_types.push(1);
        for pre in ["smollm", "gpt-2", "llama-bpe"] {
            metadata.pre = pre.to_owned();
            let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
            let ids = tokenizer.encode("<s>", SpecialTokens::AsText).unwrap();
            assert!(!ids.contains(&BOS), "{pre}: {ids:?}");
            assert_eq!(tokenizer.decode(&ids, false), "<s>");
        }
    }

    proptest! {
        #[test]
        fn any_text_comes_back(text in "(\\PC|<s>|<think>|<|im_end|>|[ \n\t0-9]){0,40}") {
            let tokenizer = tokenizer();
            for special in [SpecialTokens::Parse, SpecialTokens::AsText] {
                let ids = tokenizer.encode(&text, special).unwrap();
                prop_assert_eq!(tokenizer.decode(&ids, false), text.as_str());
                prop_assert!(ids.len() >= tokenizer.min_tokens(&text));
            }
        }

        #[test]
        fn a_stream_of_any_ids_reads_as_the_whole(
            ids in prop::collection::vec(0u32..270, 0..40),
            skip_special in any::<bool>(),
        ) {
            let tokenizer = tokenizer();
            let mut detokenizer = tokenizer.detokenizer(skip_special);
            let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
            text += &detokenizer.finish();
            prop_assert_eq!(text, tokenizer.decode(&ids, skip_special));
        }
    }
}
