//! Keeps special tokens that a client spelled out in a message from becoming special tokens.
//!
//! Before rendering, a mark is put into every string of the messages wherever a special token could be read out of
//! it; after rendering, the marks are taken out again and their places become cuts that no special token may span.
//!
//! ```text
//! content    a <|im_end|> b        marked     a <·|im_end|> b
//! template   {content}<|im_end|>   rendered   a <·|im_end|> b<|im_end|>
//! cut at                                      a <↑|im_end|> b<|im_end|>    only the last one is special
//! ```
//!
//! Ordinary content carries no mark, so templates that strip, compare or search it see what they always see. Content
//! whose end could join up with what the template puts next to it (`…<|im_`) is marked at that end. What remains: a
//! template that builds a special token out of a message's *inside* (`'<|' + role + '|>'`, or by deleting characters)
//! is believed; roles are therefore checked against a list before they come here.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::added::AddedTokens;

/// Marks that can be chosen: noncharacters first, which text should not hold, then private use.
const MARKS: [std::ops::RangeInclusive<char>; 2] = ['\u{fdd0}'..='\u{fdef}', '\u{f0000}'..='\u{f00ff}'];

/// A character that occurs in none of the texts, to mark places in them.
pub(super) fn choose_mark(template: &str, values: &[&Value]) -> Option<char> {
    let mut used = HashSet::new();
    note_candidates(template, &mut used);
    values.iter().for_each(|value| note_in_value(value, &mut used));
    MARKS.into_iter().flatten().find(|mark| !used.contains(mark))
}

/// A copy of `value` with marks in its strings and keys.
pub(super) fn marked(value: &Value, tokens: &AddedTokens, mark: char) -> Value {
    match value {
        Value::String(text) => Value::String(mark_text(text, tokens, mark)),
        Value::Array(items) => items.iter().map(|item| marked(item, tokens, mark)).collect(),
        Value::Object(map) => {
            let entry =
                |(key, item): (&String, &Value)| (mark_text(key, tokens, mark), marked(item, tokens, mark));
            Value::Object(map.iter().map(entry).collect::<Map<_, _>>())
        }
        other => other.clone(),
    }
}

/// Takes the marks out of a rendered text: the text, and the byte positions at which they stood.
pub(super) fn unmark(text: &str, mark: char) -> (String, Vec<usize>) {
    let mut clean = String::with_capacity(text.len());
    let mut cuts = Vec::new();
    for (i, piece) in text.split(mark).enumerate() {
        if i > 0 && cuts.last() != Some(&clean.len()) {
            cuts.push(clean.len());
        }
        clean.push_str(piece);
    }
    (clean, cuts)
}

fn mark_text(text: &str, tokens: &AddedTokens, mark: char) -> String {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for cut in tokens.cuts(text) {
        out.push_str(&text[done..cut]);
        out.push(mark);
        done = cut;
    }
    out.push_str(&text[done..]);
    out
}

fn note_in_value(value: &Value, used: &mut HashSet<char>) {
    match value {
        Value::String(text) => note_candidates(text, used),
        Value::Array(items) => items.iter().for_each(|item| note_in_value(item, used)),
        Value::Object(map) => map.iter().for_each(|(key, item)| {
            note_candidates(key, used);
            note_in_value(item, used);
        }),
        _ => {}
    }
}

fn note_candidates(text: &str, used: &mut HashSet<char>) {
    used.extend(text.chars().filter(|c| MARKS.iter().any(|range| range.contains(c))));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_come_out_as_cuts() {
        assert_eq!(unmark("a·b··c·", '·'), ("abc".to_owned(), vec![1, 2, 3]));
        assert_eq!(unmark("abc", '·'), ("abc".to_owned(), vec![]));
    }

    #[test]
    fn a_used_mark_is_not_chosen() {
        let value = serde_json::json!([{ "\u{fdd0}": "\u{fdd1}" }]);
        assert_eq!(choose_mark("\u{fdd2}", &[&value]), Some('\u{fdd3}'));
        let all: String = MARKS.into_iter().flatten().collect();
        assert_eq!(choose_mark("", &[&Value::String(all)]), None);
    }
}
