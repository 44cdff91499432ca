//! Text in, token ids out, and back: everything of the server that knows what a character is.
//!
//! * [`Tokenizer`]: text ↔ ids, from a `tokenizer.json` or a GGUF file's metadata.
//! * [`Detokenizer`]: ids → text while they are generated; never splits a character.
//! * [`StopMatcher`]: stop strings across token boundaries.
//! * [`ChatTemplate`]: messages → the prompt's text, in which only the template's own special tokens are special; a
//!   [`Sandbox`] is a process that runs its program where neither memory nor time that it takes can hurt.
//!
//! Invariants: `decode` of all ids equals the concatenation of what a [`Detokenizer`] pushed and finished; text that
//! a client put into a message never becomes a special token. Everything here is hostile input (model files,
//! requests), so every size is bounded and nothing panics. What runs on which thread is the caller's business:
//! `encode` and `render` are CPU work without I/O.

mod added;
mod byte_level;
mod detokenize;
mod error;
mod gguf;
mod guard;
mod hugging_face;
mod sandbox;
mod stop;
mod template;
mod template_functions;
#[cfg(test)]
mod testing;
mod tokenizer;

pub use detokenize::Detokenizer;
pub use error::TextError;
pub use sandbox::{Sandbox, render_for_parent};
pub use stop::{MAX_STOP_BYTES, MAX_STOPS, StopMatcher, StopStep};
pub use tandem_engine::{GgufTokenizer, HuggingFaceTokenizer};
pub use template::{ChatInput, ChatTemplate, PreparedChat, RenderedChat};
pub use tokenizer::{MAX_TEXT_BYTES, SpecialTokens, Tokenizer};
