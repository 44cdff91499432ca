//! Log-probabilities in the two dialects of OpenAI's API, and vLLM's `prompt_logprobs`.
//!
//! JSON has no infinity: a probability of zero is written as [`FLOOR`], as vLLM does.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::ser::{Serialize, SerializeMap, Serializer};
use tandem_engine::TokenLogprobs;

use crate::text::Tokenizer;

/// The lowest log-probability that is written.
const FLOOR: f32 = -9999.0;

/// How tokens are spelled in an answer.
#[derive(Clone)]
pub(super) struct TokenNames {
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    /// `token_id:7` instead of text, which names a token exactly.
    pub(super) as_ids: bool,
}

/// Completions: parallel lists.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub(super) struct CompletionLogprobs {
    pub(super) text_offset: Vec<usize>,
    pub(super) token_logprobs: Vec<Option<f32>>,
    pub(super) tokens: Vec<String>,
    pub(super) top_logprobs: Vec<Option<TopByText>>,
}

/// Chat: one object per token.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub(super) struct ChatLogprobs {
    pub(super) content: Vec<ChatTokenLogprob>,
}

/// A token of a chat answer.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub(super) struct ChatTokenLogprob {
    #[serde(flatten)]
    pub(super) token: NamedLogprob,
    pub(super) top_logprobs: Vec<NamedLogprob>,
}

/// A token's text, bytes and log-probability.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub(super) struct NamedLogprob {
    pub(super) token: String,
    pub(super) logprob: f32,
    pub(super) bytes: Vec<u8>,
}

/// An object from token text to log-probability, best first. Of several tokens with the same text the best is kept.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TopByText(pub(super) Vec<(String, f32)>);

/// vLLM: an object from token id to what is known about it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PromptLogprob(pub(super) Vec<(u32, RankedLogprob)>);

/// An entry of [`PromptLogprob`].
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub(super) struct RankedLogprob {
    pub(super) logprob: f32,
    pub(super) rank: u32,
    pub(super) decoded_token: String,
}

impl TokenNames {
    pub(super) fn text(&self, id: u32) -> String {
        match &self.tokenizer {
            Some(tokenizer) if !self.as_ids => tokenizer.token_text(id),
            _ => format!("token_id:{id}"),
        }
    }

    fn bytes(&self, id: u32) -> Vec<u8> {
        match &self.tokenizer {
            Some(tokenizer) if !self.as_ids => tokenizer.token_bytes(id),
            _ => self.text(id).into_bytes(),
        }
    }

    fn named(&self, id: u32, logprob: f32) -> NamedLogprob {
        NamedLogprob { token: self.text(id), logprob: logprob.max(FLOOR), bytes: self.bytes(id) }
    }

    /// Where each token starts in the text of a prompt that has `num_chars` characters. A token that was put before the
    /// client's text is no part of it and starts where the text does.
    pub(super) fn starts(&self, ids: &[u32], num_chars: usize) -> Vec<usize> {
        let Some(tokenizer) = &self.tokenizer else { return vec![0; ids.len()] };
        let mut detokenizer = tokenizer.detokenizer(false);
        let mut end = 0;
        let starts = ids.iter().map(|id| {
            let start = end;
            end += detokenizer.push(*id).chars().count();
            start
        });
        let starts: Vec<usize> = starts.collect();
        let added = end.saturating_sub(num_chars);
        starts.into_iter().map(|start| start.saturating_sub(added)).collect()
    }

    /// One entry of a chat answer with `count` alternatives.
    pub(super) fn chat(&self, logprobs: &TokenLogprobs, count: usize) -> ChatTokenLogprob {
        ChatTokenLogprob {
            token: self.named(logprobs.token, logprobs.logprob),
            top_logprobs: logprobs
                .top
                .iter()
                .take(count)
                .map(|(id, logprob)| self.named(*id, *logprob))
                .collect(),
        }
    }

    /// One entry of vLLM's `prompt_logprobs`: the prompt's token and the `count` best ones.
    pub(super) fn prompt(&self, logprobs: &TokenLogprobs, count: usize) -> PromptLogprob {
        let ranked = |id, logprob: f32, rank| {
            (id, RankedLogprob { logprob: logprob.max(FLOOR), rank, decoded_token: self.text(id) })
        };
        let mut entries = vec![ranked(logprobs.token, logprobs.logprob, logprobs.rank)];
        let top = logprobs.top.iter().take(count).enumerate();
        let others = top.filter(|(_, (id, _))| *id != logprobs.token);
        entries.extend(others.map(|(place, (id, logprob))| ranked(*id, *logprob, place as u32 + 1)));
        PromptLogprob(entries)
    }
}

impl CompletionLogprobs {
    /// Appends a token before which the answer's text has `offset` characters. The names of tokens do not tell: they may
    /// be ids, and a token may end inside a character. `logprobs` is `None` for the first token of a prompt, which nothing precedes.
    pub(super) fn push(
        &mut self,
        names: &TokenNames,
        id: u32,
        logprobs: Option<&TokenLogprobs>,
        count: usize,
        offset: usize,
    ) {
        self.text_offset.push(offset);
        self.token_logprobs.push(logprobs.map(|logprobs| logprobs.logprob.max(FLOOR)));
        self.top_logprobs.push(logprobs.map(|logprobs| TopByText::new(names, logprobs, count)));
        self.tokens.push(names.text(id));
    }
}

impl TopByText {
    /// The `count` best tokens, and the drawn one if it is not among them.
    fn new(names: &TokenNames, logprobs: &TokenLogprobs, count: usize) -> Self {
        let drawn = (logprobs.token, logprobs.logprob);
        let top = logprobs.top.iter().copied().take(count);
        let mut seen = BTreeSet::new();
        let named = top.chain([drawn]).filter(|(id, _)| seen.insert(*id)).collect::<Vec<_>>();
        let mut texts = BTreeSet::new();
        let named = named.into_iter().map(|(id, logprob)| (names.text(id), logprob.max(FLOOR)));
        Self(named.filter(|(text, _)| texts.insert(text.clone())).collect())
    }
}

impl Serialize for TopByText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_map(self.0.iter().map(|(text, logprob)| (text, logprob)), serializer)
    }
}

impl Serialize for PromptLogprob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Keys of JSON objects are strings; serde_json writes integer keys as such.
        serialize_map(self.0.iter().map(|(id, entry)| (id, entry)), serializer)
    }
}

fn serialize_map<S: Serializer>(
    entries: impl Iterator<Item = (impl Serialize, impl Serialize)>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    for (key, value) in entries {
        map.serialize_entry(&key, &value)?;
    }
    map.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NAMES: TokenNames = TokenNames { tokenizer: None, as_ids: true };

    fn logprobs() -> TokenLogprobs {
        TokenLogprobs { token: 7, logprob: -3.0, rank: 3, top: vec![(1, -0.5), (2, -1.0)] }
    }

    #[test]
    fn completions_have_parallel_lists_and_the_drawn_token_among_the_best() {
        let mut list = CompletionLogprobs::default();
        list.push(&NAMES, 3, None, 2, 0);
        list.push(&NAMES, 7, Some(&logprobs()), 1, 4);
        let expected = json!({
            "text_offset": [0, 4],
            "token_logprobs": [null, -3.0],
            "tokens": ["token_id:3", "token_id:7"],
            "top_logprobs": [null, {"token_id:1": -0.5, "token_id:7": -3.0}],
        });
        assert_eq!(serde_json::to_value(&list).unwrap(), expected);
    }

    #[test]
    fn chat_has_one_object_per_token() {
        let mut impossible = logprobs();
        impossible.logprob = f32::NEG_INFINITY;
        let entry = serde_json::to_value(NAMES.chat(&impossible, 1)).unwrap();
        let expected = json!({
            "token": "token_id:7", "logprob": -9999.0, "bytes": b"token_id:7",
            "top_logprobs": [{"token": "token_id:1", "logprob": -0.5, "bytes": b"token_id:1"}],
        });
        assert_eq!(entry, expected);
    }

    #[test]
    fn prompts_have_objects_by_token_id() {
        let entry = serde_json::to_value(NAMES.prompt(&logprobs(), 1)).unwrap();
        let expected = json!({
            "7": {"logprob": -3.0, "rank": 3, "decoded_token": "token_id:7"},
            "1": {"logprob": -0.5, "rank": 1, "decoded_token": "token_id:1"},
        });
        assert_eq!(entry, expected);
    }
}
