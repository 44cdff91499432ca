//! Added tokens: those that are found in the text before the tokenizer's model sees it.
//!
//! One splitter serves both ways of reading a text. Parsing specials and taking them as text differ only in where
//! special tokens may be found, so the two agree on everything else. Matching is leftmost-longest, as the reference
//! implementation's is; ordinary added tokens are always found.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use aho_corasick::{AhoCorasick, Input, MatchKind};

use super::error::TextError;

/// The most added tokens accepted from a model's files.
const MAX_ADDED_TOKENS: usize = 65_536;
/// The longest added token accepted, in bytes.
const MAX_ADDED_BYTES: usize = 1_024;

/// One added token as the model's files describe it.
#[derive(Debug, Clone, Default)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) text: String,
    /// Never produced from text of a client where specials are text; skipped when decoding for people.
    pub(super) special: bool,
    /// Swallows whitespace on its left, on its right.
    pub(super) lstrip: bool,
    pub(super) rstrip: bool,
    /// Only between non-word characters.
    pub(super) single_word: bool,
}

/// Where special tokens may be found.
#[derive(Debug, Clone, Copy)]
pub(super) enum Specials<'a> {
    /// Nowhere.
    Nowhere,
    /// Everywhere, except that none spans one of these byte positions (sorted).
    Between(&'a [usize]),
}

/// A piece of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    Text(Range<usize>),
    Token(u32),
}

/// All added tokens of a tokenizer.
#[derive(Debug)]
pub(super) struct AddedTokens {
    tokens: Vec<AddedToken>,
    by_id: HashMap<u32, usize>,
    by_text: HashMap<String, usize>,
    special: Option<Finder>,
    ordinary: Option<Finder>,
    /// Every proper beginning and ending of a special token's text, and every place where one occurs in a string.
    beginnings: HashSet<String>,
    endings: HashSet<String>,
    occurrences: Option<AhoCorasick>,
}

#[derive(Debug)]
struct Finder {
    automaton: AhoCorasick,
    /// Pattern number to index in `tokens`.
    tokens: Vec<usize>,
}

#[derive(Debug, Clone, Copy)]
struct Found {
    start: usize,
    end: usize,
    token: usize,
}

impl AddedTokens {
    pub(super) fn new(tokens: Vec<AddedToken>) -> Result<Self, TextError> {
        if tokens.len() > MAX_ADDED_TOKENS {
            return Err(TextError::Malformed(format!("more than {MAX_ADDED_TOKENS} added tokens")));
        }
        let tokens: Vec<AddedToken> = tokens.into_iter().filter(|t| !t.text.is_empty()).collect();
        if let Some(long) = tokens.iter().find(|t| t.text.len() > MAX_ADDED_BYTES) {
            return Err(TextError::Malformed(format!("added token {} is too long", long.id)));
        }
        let special_texts: Vec<&str> = tokens.iter().filter(|t| t.special).map(|t| t.text.as_str()).collect();
        let occurrences = match special_texts.is_empty() {
            true => None,
            false => Some(AhoCorasick::new(&special_texts).map_err(build_error)?),
        };
        let boundaries = |text: &str| text.char_indices().map(|(i, _)| i).skip(1).collect::<Vec<_>>();
        let beginnings =
            special_texts.iter().flat_map(|t| boundaries(t).into_iter().map(|i| t[..i].to_owned())).collect();
        let endings =
            special_texts.iter().flat_map(|t| boundaries(t).into_iter().map(|i| t[i..].to_owned())).collect();
        Ok(Self {
            special: Finder::new(&tokens, true)?,
            ordinary: Finder::new(&tokens, false)?,
            by_id: tokens.iter().enumerate().map(|(i, t)| (t.id, i)).collect(),
            by_text: tokens.iter().enumerate().map(|(i, t)| (t.text.clone(), i)).collect(),
            beginnings,
            endings,
            occurrences,
            tokens,
        })
    }

    pub(super) fn get(&self, id: u32) -> Option<&AddedToken> {
        self.by_id.get(&id).map(|&i| &self.tokens[i])
    }

    pub(super) fn id_of(&self, text: &str) -> Option<u32> {
        self.by_text.get(text).map(|&i| self.tokens[i].id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &AddedToken> {
        self.tokens.iter()
    }

    /// Splits a text into added tokens and the text between them, in order and without gaps (but for whitespace that
    /// a token swallows).
    pub(super) fn split(&self, text: &str, specials: Specials<'_>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut done = 0;
        let mut special =
            Search::new(self.special.as_ref().filter(|_| !matches!(specials, Specials::Nowhere)));
        let mut ordinary = Search::new(self.ordinary.as_ref());
        let cuts = match specials {
            Specials::Nowhere => &[][..],
            Specials::Between(cuts) => cuts,
        };
        loop {
            let a = special.next(&self.tokens, text, done, cuts);
            let b = ordinary.next(&self.tokens, text, done, &[]);
            let Some(found) = earlier(a, b) else { break };
            let token = &self.tokens[found.token];
            let start = match token.lstrip {
                true => done + text[done..found.start].trim_end().len(),
                false => found.start,
            };
            let end = match token.rstrip {
                true => text.len() - text[found.end..].trim_start().len(),
                false => found.end,
            };
            if done < start {
                pieces.push(Piece::Text(done..start));
            }
            pieces.push(Piece::Token(token.id));
            done = end;
        }
        if done < text.len() {
            pieces.push(Piece::Text(done..text.len()));
        }
        pieces
    }

    /// Byte positions at which `text` must be cut so that no special token can be read out of it, nor out of it and
    /// what a template puts around it; sorted. Empty for ordinary text.
    ///
    /// A special token of a single character is cut on both sides ([`AddedTokens::split`] does not look between cuts
    /// one character apart).
    pub(super) fn cuts(&self, text: &str) -> Vec<usize> {
        let Some(occurrences) = &self.occurrences else { return Vec::new() };
        let mut cuts = Vec::new();
        for found in occurrences.find_overlapping_iter(text) {
            let first = text[found.start()..].chars().next().map_or(1, char::len_utf8);
            if found.start() + first == found.end() {
                cuts.push(found.start());
            }
            cuts.push(found.start() + first);
        }
        // A template may strip whitespace, so the ends are those of the stripped text.
        let inner = text.trim();
        let start = text.len() - text.trim_start().len();
        let end = start + inner.len();
        let mut boundaries = inner.char_indices().map(|(i, _)| i).chain([inner.len()]).skip(1);
        if boundaries.by_ref().take(MAX_ADDED_BYTES).any(|i| self.endings.contains(&inner[..i])) {
            cuts.push(start);
        }
        let mut boundaries = inner.char_indices().rev().map(|(i, _)| i);
        if boundaries.by_ref().take(MAX_ADDED_BYTES).any(|i| self.beginnings.contains(&inner[i..])) {
            cuts.push(end);
        }
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    }
}

impl Finder {
    fn new(tokens: &[AddedToken], special: bool) -> Result<Option<Self>, TextError> {
        let chosen: Vec<usize> = (0..tokens.len()).filter(|&i| tokens[i].special == special).collect();
        if chosen.is_empty() {
            return Ok(None);
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(chosen.iter().map(|&i| &tokens[i].text))
            .map_err(build_error)?;
        Ok(Some(Self { automaton, tokens: chosen }))
    }
}

/// Looks for the next match of one finder, and remembers it while the text before it is dealt with.
struct Search<'f> {
    finder: Option<&'f Finder>,
    next: Option<Found>,
    /// Nothing more is to be found in this text.
    exhausted: bool,
}

impl<'f> Search<'f> {
    fn new(finder: Option<&'f Finder>) -> Self {
        Self { finder, next: None, exhausted: finder.is_none() }
    }

    /// The first match that starts at or after `from` and spans none of the cuts.
    fn next(&mut self, tokens: &[AddedToken], text: &str, from: usize, cuts: &[usize]) -> Option<Found> {
        if self.exhausted || self.next.is_some_and(|found| found.start >= from) {
            return self.next.filter(|_| !self.exhausted);
        }
        let finder = self.finder?;
        let mut start = from;
        while start < text.len() {
            let cut = cuts.partition_point(|&cut| cut <= start);
            let end = cuts.get(cut).copied().unwrap_or(text.len());
            let guarded = cut > 0
                && cuts[cut - 1] == start
                && cut < cuts.len()
                && text[start..end].chars().nth(1).is_none();
            if !guarded && let Some(found) = find(finder, tokens, text, start..end) {
                self.next = Some(found);
                return self.next;
            }
            start = end;
        }
        self.exhausted = true;
        None
    }
}

fn find(finder: &Finder, tokens: &[AddedToken], text: &str, range: Range<usize>) -> Option<Found> {
    let mut start = range.start;
    while start < range.end {
        let found = finder.automaton.find(Input::new(text).range(start..range.end))?;
        let token = finder.tokens[found.pattern().as_usize()];
        if !tokens[token].single_word || stands_alone(text, found.start(), found.end()) {
            return Some(Found { start: found.start(), end: found.end(), token });
        }
        start = found.end();
    }
    None
}

fn stands_alone(text: &str, start: usize, end: usize) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    !text[..start].chars().next_back().is_some_and(word) && !text[end..].chars().next().is_some_and(word)
}

fn earlier(a: Option<Found>, b: Option<Found>) -> Option<Found> {
    match (a, b) {
        (Some(a), Some(b)) if (b.start, std::cmp::Reverse(b.end)) < (a.start, std::cmp::Reverse(a.end)) => {
            Some(b)
        }
        (Some(a), _) => Some(a),
        (None, b) => b,
    }
}

fn build_error(error: aho_corasick::BuildError) -> TextError {
    TextError::Malformed(format!("added tokens: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, text: &str, special: bool) -> AddedToken {
        AddedToken { id, text: text.to_owned(), special, ..AddedToken::default() }
    }

    fn tokens() -> AddedTokens {
        AddedTokens::new(vec![
            token(1, "<s>", true),
            token(2, "<s><t>", true),
            token(3, "  ", false),
            token(4, "<think>", false),
        ])
        .unwrap()
    }

    fn show(text: &str, specials: Specials<'_>) -> Vec<String> {
        let piece = |p| match p {
            Piece::Text(range) => text[range].to_owned(),
            Piece::Token(id) => format!("#{id}"),
        };
        tokens().split(text, specials).into_iter().map(piece).collect()
    }

    #[test]
    fn takes_the_leftmost_longest() {
        assert_eq!(show("a<s><t>b<s>", Specials::Between(&[])), ["a", "#2", "b", "#1"]);
        assert_eq!(show("<s>  <think>", Specials::Between(&[])), ["#1", "#3", "#4"]);
    }

    #[test]
    fn as_text_finds_ordinary_ones_only() {
        assert_eq!(show("<s>  <think>", Specials::Nowhere), ["<s>", "#3", "#4"]);
        assert_eq!(show("<s", Specials::Nowhere), ["<s"]);
        assert!(show("", Specials::Nowhere).is_empty());
    }

    #[test]
    fn no_special_spans_a_cut() {
        assert_eq!(show("<s><t>", Specials::Between(&[3])), ["#1", "<t>"]);
        assert_eq!(show("<s><s>", Specials::Between(&[1])), ["<s>", "#1"]);
        assert_eq!(show("<s><s>", Specials::Between(&[0, 1, 3, 4, 6])), ["<s><s>"]);
    }

    #[test]
    fn options_of_a_token_are_honoured() {
        let tokens = AddedTokens::new(vec![
            AddedToken { lstrip: true, rstrip: true, ..token(1, "[M]", true) },
            AddedToken { single_word: true, ..token(2, "day", false) },
        ])
        .unwrap();
        let pieces = tokens.split("a \t[M]\n [M] b", Specials::Between(&[]));
        assert_eq!(pieces, [Piece::Text(0..1), Piece::Token(1), Piece::Token(1), Piece::Text(12..13)]);
        assert_eq!(tokens.split("monday", Specials::Nowhere), [Piece::Text(0..6)]);
        assert_eq!(tokens.split("a day", Specials::Nowhere), [Piece::Text(0..2), Piece::Token(2)]);
    }

    #[test]
    fn cuts_leave_no_special_in_a_text_alone_or_between_others() {
        let tokens = AddedTokens::new(vec![
            token(1, "<s>", true),
            token(2, "<<s>", true),
            token(3, "x", true),
            token(4, "ss", true),
        ])
        .unwrap();
        for text in ["<s>", "<<s>", "x", "axb", "a<<s>x<s>", "sss", "<", " <", "s> ", "é<s>é", "plain", ""]
        {
            for (before, after) in [("", ""), ("<", ">"), ("<s", "s>"), ("s", "s")] {
                let whole = format!("{before}{text}{after}");
                let cuts: Vec<usize> = tokens.cuts(text).iter().map(|c| c + before.len()).collect();
                for piece in tokens.split(&whole, Specials::Between(&cuts)) {
                    assert!(
                        matches!(piece, Piece::Text(_)) || text.is_empty() || text == "plain",
                        "{whole:?} cut at {cuts:?} gave {piece:?}"
                    );
                }
            }
        }
        assert!(tokens.cuts("plain teet").is_empty());
    }
}
