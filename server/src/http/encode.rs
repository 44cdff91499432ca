//! Text to tokens for requests: short texts at once, long ones on a helper thread, over-long ones not at all.

use std::sync::Arc;

use super::chat_request::Conversation;
use super::completion_request::no_tokenizer;
use super::errors::ApiError;
use super::limits;
use super::params::Rules;
use super::state::{AppState, Serving};
use crate::text::{ChatInput, TextError, Tokenizer};

/// Encodes one prompt. `truncates` says that an over-long one is welcome because only its end will be kept.
pub(super) async fn encode_prompt(
    state: &AppState,
    serving: &Arc<Serving>,
    text: String,
    add_special_tokens: bool,
    truncates: bool,
    request_id: &str,
) -> Result<Vec<u32>, ApiError> {
    let tokenizer = serving.tokenizer.clone().ok_or_else(|| no_tokenizer("prompt"))?;
    let rules = (!truncates).then(|| serving.rules());
    let num_bytes = text.len();
    let encode = move || {
        refuse_overlong(&tokenizer, &text, rules.as_ref(), "prompt")?;
        tokenizer.encode_prompt(&text, add_special_tokens).map_err(|error| Failure::Text(error, "prompt"))
    };
    run(state, num_bytes, encode, request_id).await
}

/// Renders a conversation with the model's template and encodes it.
pub(super) async fn encode_chat(
    state: &AppState,
    serving: &Arc<Serving>,
    conversation: Conversation,
    truncates: bool,
    request_id: &str,
) -> Result<Vec<u32>, ApiError> {
    let tokenizer = serving.tokenizer.clone().ok_or_else(|| no_tokenizer("messages"))?;
    let Some(template) = serving.template.clone() else {
        return Err(ApiError::invalid("messages", "this model has no chat template: use /v1/completions"));
    };
    let rules = (!truncates).then(|| serving.rules());
    let num_bytes = conversation.num_bytes;
    let encode = move || {
        let input = ChatInput {
            messages: &conversation.messages,
            add_generation_prompt: conversation.add_generation_prompt,
            kwargs: conversation.template_kwargs.as_ref(),
        };
        let rendered = template.render(&input).map_err(|error| Failure::Text(error, "messages"))?;
        refuse_overlong(&tokenizer, rendered.text(), rules.as_ref(), "messages")?;
        tokenizer.encode_chat(&rendered).map_err(|error| Failure::Text(error, "messages"))
    };
    run(state, num_bytes, encode, request_id).await
}

/// Why a text became no tokens.
enum Failure {
    Refused(ApiError),
    /// The tokenizer's or template's error, and the field that the text came from.
    Text(TextError, &'static str),
}

/// A text that cannot fit, whatever its tokens are, is not worth encoding.
fn refuse_overlong(
    tokenizer: &Tokenizer,
    text: &str,
    rules: Option<&Rules>,
    param: &'static str,
) -> Result<(), Failure> {
    let at_least = tokenizer.min_tokens(text);
    match rules {
        Some(rules) if at_least > rules.max_model_len => {
            Err(Failure::Refused(rules.too_long(param, at_least)))
        }
        _ => Ok(()),
    }
}

/// Runs `encode` here when it is short, else on a helper thread.
async fn run(
    state: &AppState,
    num_bytes: usize,
    encode: impl FnOnce() -> Result<Vec<u32>, Failure> + Send + 'static,
    request_id: &str,
) -> Result<Vec<u32>, ApiError> {
    let encoded = if num_bytes <= limits::INLINE_TEXT_BYTES {
        encode()
    } else {
        let _permit =
            state.encoders.acquire().await.map_err(|error| ApiError::internal(request_id, &error))?;
        let task = tokio::task::spawn_blocking(encode);
        task.await.map_err(|error| ApiError::internal(request_id, &error))?
    };
    encoded.map_err(|failure| match failure {
        Failure::Refused(error) => error,
        Failure::Text(error, param) if error.is_client_error() => ApiError::invalid(param, error.to_string()),
        Failure::Text(error, _) => ApiError::internal(request_id, &error),
    })
}
