//! `POST /tokenize` and `POST /detokenize`, as in vLLM: a prompt or messages to token ids, and back.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;
use serde::Serialize;

use super::body::read_parsed;
use super::chat_request::Conversation;
use super::completion_request::{Prompt, no_tokenizer};
use super::context::RequestContext;
use super::encode::{PromptOptions, encode_chat, encode_prompts};
use super::errors::{ApiError, json};
use super::fields::Fields;
use super::limits;
use super::params::Rules;
use super::state::AppState;
use crate::text::Tokenizer;

#[derive(Serialize)]
struct Tokenized {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Detokenized {
    prompt: String,
}

/// A checked body of `/tokenize`.
struct TokenizeRequest {
    model: Option<String>,
    wants_texts: bool,
    source: Source,
}

enum Source {
    Chat(Conversation),
    Prompt { text: String, add_special_tokens: bool },
}

pub(super) async fn tokenize(
    State(state): State<Arc<AppState>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let serving = state.require_serving()?;
    let rules = serving.rules();
    let max_model_len = rules.max_model_len;
    let parse = move |body: &[u8]| TokenizeRequest::parse(body, &rules);
    let (request, _room) = read_parsed(&state, request, context.id(), parse).await?;
    let TokenizeRequest { model, wants_texts, source } = request;
    state.check_model(model.as_deref())?;
    // The text may be longer than the context: counting is what this route is for.
    let tokens = match source {
        Source::Chat(conversation) => encode_chat(&state, serving, conversation, true, context.id()).await?,
        Source::Prompt { text, add_special_tokens } => {
            let options = PromptOptions { add_special_tokens, truncate: Some(usize::MAX), echo: false };
            let prompts = vec![Prompt::Text(text)];
            let encoded = encode_prompts(&state, serving, prompts, options, context.id()).await?;
            encoded.into_iter().flat_map(|prompt| prompt.token_ids).collect()
        }
    };
    if wants_texts && tokens.len() > limits::MAX_LISTED_TOKENS {
        let message =
            format!("`return_token_strs` is for texts of at most {} tokens", limits::MAX_LISTED_TOKENS);
        return Err(ApiError::invalid("return_token_strs", message));
    }
    let tokenizer = serving.tokenizer.clone().filter(|_| wants_texts);
    let is_long = tokens.len() > limits::INLINE_LISTED_TOKENS;
    let write = move || {
        let text_of = |tokenizer: &Tokenizer| tokens.iter().map(|id| tokenizer.token_text(*id)).collect();
        let token_strs = tokenizer.as_deref().map(text_of);
        json(&Tokenized { count: tokens.len(), max_model_len, tokens, token_strs })
    };
    state.helpers.run(is_long, context.id(), write).await
}

impl TokenizeRequest {
    fn parse(body: &[u8], rules: &Rules) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?;
        let wants_texts = fields.boolean("return_token_strs")?.unwrap_or(false);
        let source = if fields.peek("messages").is_some() {
            Source::Chat(Conversation::read(&mut fields, rules)?)
        } else {
            let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
            let text = fields.string("prompt")?;
            let text = text.ok_or_else(|| fields.invalid("prompt", "or `messages` is needed"))?;
            Source::Prompt { text, add_special_tokens }
        };
        fields.finish();
        Ok(Self { model, wants_texts, source })
    }
}

/// A checked body of `/detokenize`.
struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

pub(super) async fn detokenize(
    State(state): State<Arc<AppState>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let serving = state.require_serving()?;
    let tokenizer = serving.tokenizer.clone().ok_or_else(|| no_tokenizer("tokens"))?;
    let vocab_size = serving.engine.config().vocab_size;
    let parse = move |body: &[u8]| DetokenizeRequest::parse(body, vocab_size);
    let (request, _room) = read_parsed(&state, request, context.id(), parse).await?;
    let DetokenizeRequest { model, tokens } = request;
    state.check_model(model.as_deref())?;
    let is_long = tokens.len() > limits::INLINE_LISTED_TOKENS;
    let write = move || json(&Detokenized { prompt: tokenizer.decode(&tokens, false) });
    state.helpers.run(is_long, context.id(), write).await
}

impl DetokenizeRequest {
    fn parse(body: &[u8], vocab_size: usize) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?;
        let tokens = fields
            .token_ids("tokens", vocab_size, limits::MAX_LISTED_TOKENS)?
            .ok_or_else(|| fields.invalid("tokens", "is missing"))?;
        fields.finish();
        Ok(Self { model, tokens })
    }
}
