//! Stop strings across token boundaries.
//!
//! Text that could still become part of a match is held back; everything else is handed on at once. The match that
//! completes first wins, and of those that complete together the longest, so the result does not depend on how the
//! text was cut into tokens.

use super::error::TextError;

/// The most stop strings of a request.
pub const MAX_STOPS: usize = 4;
/// The longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 64;

/// Looks for stop strings in one stream of text.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    /// Text not given out yet: always a proper beginning of a stop string.
    held: String,
    stopped: bool,
}

/// What became final with a piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopStep {
    /// Safe to send: it can no longer be part of a match.
    pub text: String,
    /// Index of the stop string that matched; the stream is over.
    pub matched: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops`; with `include_in_output` the matched stop string is part of the text.
    ///
    /// # Errors
    /// [`TextError::Stop`] for more than [`MAX_STOPS`] strings, an empty one, or one over [`MAX_STOP_BYTES`].
    pub fn new(stops: &[String], include_in_output: bool) -> Result<Self, TextError> {
        if stops.len() > MAX_STOPS {
            return Err(TextError::Stop(format!("at most {MAX_STOPS} stop strings are allowed")));
        }
        if stops.iter().any(String::is_empty) {
            return Err(TextError::Stop("a stop string must not be empty".to_owned()));
        }
        if stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
            return Err(TextError::Stop(format!("a stop string has at most {MAX_STOP_BYTES} bytes")));
        }
        Ok(Self { stops: stops.to_vec(), include: include_in_output, held: String::new(), stopped: false })
    }

    /// Takes the next piece of text. After a match, further pieces give nothing.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.stopped {
            return StopStep { text: String::new(), matched: None };
        }
        self.held.push_str(text);
        if let Some((start, end, stop)) = self.first_match() {
            self.stopped = true;
            self.held.truncate(if self.include { end } else { start });
            return StopStep { text: std::mem::take(&mut self.held), matched: Some(stop) };
        }
        let keep = self.longest_beginning();
        let rest = self.held.split_off(self.held.len() - keep);
        StopStep { text: std::mem::replace(&mut self.held, rest), matched: None }
    }

    /// Takes text in which no stop string counts (before `min_tokens`): everything is final.
    pub fn skip(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        std::mem::take(&mut self.held)
    }

    /// What was held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// (start, end, index) of the match that completes first; the longest of those.
    fn first_match(&self) -> Option<(usize, usize, usize)> {
        let matches = self.stops.iter().enumerate().filter_map(|(i, stop)| {
            self.held.find(stop.as_str()).map(|start| (start, start + stop.len(), i))
        });
        matches.min_by_key(|&(start, end, _)| (end, start))
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn longest_beginning(&self) -> usize {
        let begins = |stop: &String| {
            let longest = self.held.len().min(stop.len() - 1);
            (1..=longest).rev().find(|&n| self.held.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
        };
        self.stops.iter().map(begins).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matcher(stops: &[&str], include: bool) -> StopMatcher {
        StopMatcher::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>(), include).unwrap()
    }

    /// All that comes out of pushing the pieces, and the match.
    fn run(mut matcher: StopMatcher, pieces: &[&str]) -> (String, Option<usize>) {
        let mut out = String::new();
        for piece in pieces {
            let step = matcher.push(piece);
            out += &step.text;
            if step.matched.is_some() {
                assert_eq!(matcher.push("more"), StopStep { text: String::new(), matched: None });
                return (out + &matcher.finish(), step.matched);
            }
        }
        (out + &matcher.finish(), None)
    }

    #[test]
    fn matches_across_pieces_and_cuts_the_text() {
        assert_eq!(run(matcher(&["STOP"], false), &["a S", "TO", "P b"]), ("a ".to_owned(), Some(0)));
        assert_eq!(run(matcher(&["STOP"], true), &["a S", "TO", "P b"]), ("a STOP".to_owned(), Some(0)));
        assert_eq!(run(matcher(&["STOP"], false), &["a S", "TO"]), ("a STO".to_owned(), None));
        assert_eq!(run(matcher(&["é€"], false), &["xé", "€"]), ("x".to_owned(), Some(0)));
    }

    #[test]
    fn hands_on_what_cannot_match_at_once() {
        let mut matcher = matcher(&["\n\n"], false);
        assert_eq!(matcher.push("line\n").text, "line");
        assert_eq!(matcher.push("next").text, "\nnext");
        assert_eq!(matcher.skip("\n"), "\n");
        assert_eq!(matcher.push("\n").text, "");
        assert_eq!(matcher.finish(), "\n");
    }

    #[test]
    fn the_first_to_complete_wins() {
        assert_eq!(run(matcher(&["abc", "b"], false), &["abc"]), ("a".to_owned(), Some(1)));
        assert_eq!(run(matcher(&["bc", "abc"], false), &["xabc"]), ("x".to_owned(), Some(1)));
    }

    #[test]
    fn limits_are_checked() {
        let new = |stops: &[&str]| {
            StopMatcher::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>(), false)
        };
        assert!(new(&["a"; 4]).is_ok());
        assert!(new(&["a"; 5]).is_err());
        assert!(new(&[""]).is_err());
        assert!(new(&[&"x".repeat(64)]).is_ok());
        assert!(new(&[&"x".repeat(65)]).is_err());
    }

    proptest! {
        #[test]
        fn the_cut_into_pieces_does_not_matter(
            stops in prop::collection::vec("[ab€]{1,3}", 0..4),
            pieces in prop::collection::vec("[abc€]{0,3}", 0..10),
            include in any::<bool>(),
        ) {
            let matcher = StopMatcher::new(&stops, include).unwrap();
            let whole = pieces.concat();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let chars: Vec<String> = whole.chars().map(String::from).collect();
            let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
            let result = run(matcher.clone(), &pieces);
            prop_assert_eq!(&result, &run(matcher.clone(), &chars));
            prop_assert_eq!(&result, &run(matcher, &[&whole]));
            if result.1.is_none() {
                prop_assert!(stops.iter().all(|stop| !whole.contains(stop)));
                prop_assert_eq!(result.0, whole);
            }
        }
    }
}
