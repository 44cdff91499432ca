//! `POST /tokenize` and `POST /detokenize`, as in vLLM: a prompt or messages to token ids, and back.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;
use serde::Serialize;

use super::body::read_json;
use super::chat_request::Conversation;
use super::completion_request::no_tokenizer;
use super::context::RequestContext;
use super::encode::{encode_chat, encode_prompt};
use super::errors::{ApiError, json};
use super::fields::Fields;
use super::limits;
use super::state::AppState;

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

pub(super) async fn tokenize(
    State(state): State<Arc<AppState>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let serving = state.require_serving()?;
    let rules = serving.rules();
    let body = read_json(request, state.timeouts.body).await?;
    let mut fields = Fields::parse(&body)?;
    state.check_model(fields.string("model")?.as_deref())?;
    let wants_texts = fields.boolean("return_token_strs")?.unwrap_or(false);
    // The text may be longer than the context: counting is what this route is for.
    let tokens = if fields.peek("messages").is_some() {
        let conversation = Conversation::read(&mut fields, &rules)?;
        encode_chat(&state, serving, conversation, true, context.id()).await?
    } else {
        let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
        let text =
            fields.string("prompt")?.ok_or_else(|| fields.invalid("prompt", "or `messages` is needed"))?;
        encode_prompt(&state, serving, text, add_special_tokens, true, context.id()).await?
    };
    fields.finish();
    if wants_texts && tokens.len() > limits::MAX_LISTED_TOKENS {
        let message =
            format!("`return_token_strs` is for texts of at most {} tokens", limits::MAX_LISTED_TOKENS);
        return Err(ApiError::invalid("return_token_strs", message));
    }
    let texts = |tokens: &[u32]| {
        let tokenizer = serving.tokenizer.as_ref()?;
        Some(tokens.iter().map(|id| tokenizer.token_text(*id)).collect())
    };
    let token_strs = if wants_texts { texts(&tokens) } else { None };
    Ok(json(&Tokenized { count: tokens.len(), max_model_len: rules.max_model_len, tokens, token_strs }))
}

pub(super) async fn detokenize(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let serving = state.require_serving()?;
    let tokenizer = serving.tokenizer.as_ref().ok_or_else(|| no_tokenizer("tokens"))?;
    let body = read_json(request, state.timeouts.body).await?;
    let mut fields = Fields::parse(&body)?;
    state.check_model(fields.string("model")?.as_deref())?;
    let vocab_size = serving.engine.config().vocab_size;
    let tokens = fields
        .token_ids("tokens", vocab_size, limits::MAX_LISTED_TOKENS)?
        .ok_or_else(|| fields.invalid("tokens", "is missing"))?;
    fields.finish();
    Ok(json(&Detokenized { prompt: tokenizer.decode(&tokens, false) }))
}
