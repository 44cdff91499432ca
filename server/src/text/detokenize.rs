//! Token ids to text, one at a time.
//!
//! A token may end inside a character, so text is held back until it can no longer change. Byte-level vocabularies
//! keep the bytes of the unfinished character; others decode a short window twice, since what their decoder makes of
//! a token depends on the one before.

use std::sync::Arc;

use super::tokenizer::Tokenizer;

/// The longest window of ids that is decoded again and again before a decoder that never finishes a character is
/// taken at its word (four byte tokens make the longest character).
const MAX_WINDOW: usize = 32;

/// The text of one stream of ids. All that was pushed and finished together equals [`Tokenizer::decode`].
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Bytes of a character that is not complete.
    Bytes(Vec<u8>),
    /// Ids that are not final, after `context` ids whose text was given out already.
    Window { ids: Vec<u32>, context: usize },
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let state = match tokenizer.is_byte_level() {
            true => State::Bytes(Vec::new()),
            false => State::Window { ids: Vec::new(), context: 0 },
        };
        Self { tokenizer, skip_special, state }
    }

    /// The text that this token makes final; may be empty.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        match &mut self.state {
            State::Bytes(pending) => {
                pending.extend_from_slice(self.tokenizer.raw_bytes(id));
                take_complete(pending)
            }
            State::Window { ids, context } => {
                ids.push(id);
                let before = self.tokenizer.decode(&ids[..*context], false);
                let text = self.tokenizer.decode(ids, false);
                let new = text.strip_prefix(before.as_str()).unwrap_or("");
                let unfinished = new.is_empty() || new.ends_with(char::REPLACEMENT_CHARACTER);
                if unfinished && ids.len() - *context < MAX_WINDOW {
                    return String::new();
                }
                let new = new.to_owned();
                ids.drain(..*context);
                *context = ids.len();
                new
            }
        }
    }

    /// What was held back; an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        match &mut self.state {
            State::Bytes(pending) => String::from_utf8_lossy(&std::mem::take(pending)).into_owned(),
            State::Window { ids, context } => {
                let before = self.tokenizer.decode(&ids[..*context], false);
                let text = self.tokenizer.decode(ids, false);
                ids.clear();
                *context = 0;
                text.strip_prefix(before.as_str()).unwrap_or("").to_owned()
            }
        }
    }
}

/// Takes all complete characters out of `pending`, as `String::from_utf8_lossy` would read them, and leaves a
/// character that more bytes could complete.
fn take_complete(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    loop {
        match std::str::from_utf8(&pending[done..]) {
            Ok(rest) => {
                text.push_str(rest);
                pending.clear();
                return text;
            }
            Err(error) => {
                let valid = done + error.valid_up_to();
                text.push_str(std::str::from_utf8(&pending[done..valid]).unwrap_or(""));
                match error.error_len() {
                    Some(bad) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        done = valid + bad;
                    }
                    None => {
                        pending.drain(..valid);
                        return text;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn holds_back_the_bytes_of_an_unfinished_character() {
        let mut pending = "a€".as_bytes()[..3].to_vec();
        assert_eq!(take_complete(&mut pending), "a");
        pending.push(0xac);
        assert_eq!(take_complete(&mut pending), "€");
        assert!(pending.is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_read_as_the_whole(
            pieces in prop::collection::vec(prop::collection::vec(prop_oneof![any::<u8>(), 0x80u8..=0xf5], 0..5), 0..12),
        ) {
            let mut pending = Vec::new();
            let mut text = String::new();
            for piece in &pieces {
                pending.extend_from_slice(piece);
                text += &take_complete(&mut pending);
            }
            text += &String::from_utf8_lossy(&pending);
            let whole = pieces.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole).into_owned());
        }
    }
}
