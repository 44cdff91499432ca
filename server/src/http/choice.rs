//! One choice of an answer: tokens in, text out, up to its end.
//!
//! A choice ends once, by whichever comes first: the engine says so, or its text matches a stop string. Tokens that
//! the engine had already drawn when a stop string matched are neither shown nor counted.

use tandem_engine::{FinishReason, TokenLogprobs};

use crate::text::{Detokenizer, StopMatcher};

/// One output token.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct OutputToken {
    pub(super) id: u32,
    pub(super) logprobs: Option<TokenLogprobs>,
    /// Characters of text that were complete with this token and not before; stop strings are not yet cut off.
    pub(super) num_chars: usize,
}

/// Why a choice ended, in OpenAI's and vLLM's words.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Finish {
    /// `stop` or `length`.
    pub(super) reason: &'static str,
    pub(super) stop_reason: Option<StopReason>,
}

/// vLLM's `stop_reason`: the stop string or the id of the stop token; absent at the end of sequence.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub(super) enum StopReason {
    Text(String),
    Token(u32),
}

/// What is new in one choice since the last look.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Update {
    /// Index among all choices of the answer.
    pub(super) choice: usize,
    /// The first news of this choice: its prompt is computed.
    pub(super) first: bool,
    pub(super) text: String,
    pub(super) tokens: Vec<OutputToken>,
    pub(super) finish: Option<Finish>,
}

impl Update {
    /// Adds later news of the same choice.
    pub(super) fn append(&mut self, later: Self) {
        self.first |= later.first;
        self.text.push_str(&later.text);
        self.tokens.extend(later.tokens);
        self.finish = later.finish.or(self.finish.take());
    }
}

/// Turns a choice's tokens into text.
pub(super) struct Choice {
    /// None without a tokenizer: the text stays empty.
    detokenizer: Option<Detokenizer>,
    /// None without stop strings.
    stops: Option<Stops>,
    /// Shows the text of the token that stopped the choice.
    include_stop: bool,
    num_tokens: usize,
    done: bool,
}

/// Stop strings of one choice.
pub(super) struct Stops {
    pub(super) matcher: StopMatcher,
    pub(super) strings: std::sync::Arc<[String]>,
    /// Text of this many first tokens never matches.
    pub(super) min_tokens: usize,
}

impl Choice {
    pub(super) fn new(detokenizer: Option<Detokenizer>, stops: Option<Stops>, include_stop: bool) -> Self {
        Self { detokenizer, stops, include_stop, num_tokens: 0, done: false }
    }

    /// Tokens generated up to the end, the one that stopped it included.
    pub(super) fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Takes one token; `stops_here` says that the engine ended the choice with it. True when the text so far matched
    /// a stop string: the engine has to be told.
    pub(super) fn push(
        &mut self,
        id: u32,
        logprobs: Option<TokenLogprobs>,
        stops_here: bool,
        update: &mut Update,
    ) -> bool {
        if self.done {
            return false;
        }
        self.num_tokens += 1;
        let is_hidden = stops_here && !self.include_stop;
        let text = match &mut self.detokenizer {
            Some(detokenizer) if !is_hidden => detokenizer.push(id),
            _ => String::new(),
        };
        update.tokens.push(OutputToken { id, logprobs, num_chars: text.chars().count() });
        if is_hidden {
            return false;
        }
        self.push_text(&text, update);
        self.done
    }

    /// The engine ended the choice; without effect when a stop string did before.
    pub(super) fn finish(&mut self, reason: FinishReason, update: &mut Update) {
        if self.done {
            return;
        }
        let rest = self.detokenizer.as_mut().map_or_else(String::new, Detokenizer::finish);
        self.push_text(&rest, update);
        if self.done {
            return;
        }
        if let Some(stops) = &mut self.stops {
            update.text.push_str(&stops.matcher.finish());
        }
        self.done = true;
        update.finish = Some(match reason {
            FinishReason::Stop(id) => Finish { reason: "stop", stop_reason: id.map(StopReason::Token) },
            FinishReason::Length => Finish { reason: "length", stop_reason: None },
        });
    }

    fn push_text(&mut self, text: &str, update: &mut Update) {
        let Some(stops) = &mut self.stops else {
            update.text.push_str(text);
            return;
        };
        if self.num_tokens <= stops.min_tokens {
            update.text.push_str(&stops.matcher.skip(text));
            return;
        }
        let step = stops.matcher.push(text);
        update.text.push_str(&step.text);
        if let Some(matched) = step.matched {
            let stop_reason = stops.strings.get(matched).cloned().map(StopReason::Text);
            update.finish = Some(Finish { reason: "stop", stop_reason });
            self.done = true;
        }
    }
}
