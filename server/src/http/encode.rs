//! Text to tokens for requests: short texts at once, long ones on a helper thread, over-long ones not at all.
//!
//! What is short is decided by all of a request's texts together: a hundred short prompts are a long text.

use std::sync::Arc;

use super::chat_request::Conversation;
use super::completion_request::{Prompt, no_tokenizer};
use super::errors::ApiError;
use super::limits;
use super::params::Rules;
use super::state::{AppState, Serving};
use crate::text::{ChatInput, TextError, Tokenizer};

/// How prompts become tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct PromptOptions {
    pub(super) add_special_tokens: bool,
    /// How many tokens are kept, from the end; `None`: all, and one that cannot fit is refused.
    pub(super) truncate: Option<usize>,
    /// The text of what was kept is wanted too.
    pub(super) echo: bool,
}

/// A prompt in tokens, and its text if that is to be repeated.
#[derive(Debug)]
pub(super) struct EncodedPrompt {
    pub(super) token_ids: Vec<u32>,
    pub(super) text: String,
}

/// Encodes the prompts of a request.
pub(super) async fn encode_prompts(
    state: &AppState,
    serving: &Arc<Serving>,
    prompts: Vec<Prompt>,
    options: PromptOptions,
    request_id: &str,
) -> Result<Vec<EncodedPrompt>, ApiError> {
    let num_bytes = prompts.iter().map(|prompt| cost(prompt, options)).sum();
    let tokenizer = serving.tokenizer.clone();
    let rules = options.truncate.is_none().then(|| serving.rules());
    let encode = move || {
        prompts
            .into_iter()
            .map(|prompt| encode_prompt(tokenizer.as_deref(), prompt, options, rules.as_ref()))
            .collect()
    };
    run(state, num_bytes, encode, request_id).await
}

/// Renders a conversation with the model's template and encodes it. `truncates` says that an over-long one is welcome
/// because only its end will be kept.
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
    let program = template.clone();
    let prepare = move || {
        let input = ChatInput {
            messages: &conversation.messages,
            add_generation_prompt: conversation.add_generation_prompt,
            kwargs: conversation.template_kwargs.as_ref(),
        };
        template.prepare(&input).map_err(|error| Failure::Text(error, "messages"))
    };
    let chat = run(state, num_bytes, prepare, request_id).await?;
    // Elsewhere if there is such a place, else below.
    let rendered = match &serving.sandbox {
        Some(sandbox) => Some(sandbox.run(&chat).await),
        None => None,
    };
    let num_bytes = rendered.iter().flatten().map(String::len).fold(num_bytes, usize::max);
    let encode = move || {
        let rendered = rendered.unwrap_or_else(|| program.run(&chat));
        let rendered = chat.finish(rendered).map_err(|error| Failure::Text(error, "messages"))?;
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

/// The work of a prompt, in bytes of text that take about as long to encode.
fn cost(prompt: &Prompt, options: PromptOptions) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(token_ids) if options.echo => 4 * token_ids.len(),
        Prompt::Tokens(_) => 0,
    }
}

fn encode_prompt(
    tokenizer: Option<&Tokenizer>,
    prompt: Prompt,
    options: PromptOptions,
    rules: Option<&Rules>,
) -> Result<EncodedPrompt, Failure> {
    let (mut token_ids, mut text) = match prompt {
        Prompt::Tokens(token_ids) => (token_ids, None),
        Prompt::Text(text) => {
            let tokenizer = tokenizer.ok_or_else(|| Failure::Refused(no_tokenizer("prompt")))?;
            refuse_overlong(tokenizer, &text, rules, "prompt")?;
            let token_ids = tokenizer.encode_prompt(&text, options.add_special_tokens);
            (token_ids.map_err(|error| Failure::Text(error, "prompt"))?, Some(text))
        }
    };
    if let Some(len) = options.truncate
        && token_ids.len() > len
    {
        token_ids.drain(..token_ids.len() - len);
        text = None;
    }
    let text = match (options.echo, text, tokenizer) {
        (true, Some(text), _) => text,
        (true, None, Some(tokenizer)) => tokenizer.decode(&token_ids, false),
        _ => String::new(),
    };
    Ok(EncodedPrompt { token_ids, text })
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
async fn run<T: Send + 'static>(
    state: &AppState,
    num_bytes: usize,
    encode: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    request_id: &str,
) -> Result<T, ApiError> {
    let is_long = num_bytes > limits::INLINE_TEXT_BYTES;
    let encoded = state.helpers.run(is_long, request_id, encode).await?;
    encoded.map_err(|failure| match failure {
        Failure::Refused(error) => error,
        Failure::Text(error, param) if error.is_client_error() => ApiError::invalid(param, error.to_string()),
        Failure::Text(error @ TextError::TemplateTime { .. }, _) => {
            tracing::warn!(request_id, %error);
            ApiError::Interrupted { message: error.to_string() }
        }
        Failure::Text(error, _) => ApiError::internal(request_id, &error),
    })
}
