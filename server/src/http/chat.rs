//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;
use serde::Serialize;

use super::answer::{AnswerMeta, Usage};
use super::body::read_parsed;
use super::chat_request::ChatRequest;
use super::choice::{OutputToken, StopReason, Update};
use super::context::RequestContext;
use super::encode::encode_chat;
use super::errors::{ApiError, json};
use super::generation::{Generation, Job, PromptJob};
use super::limits;
use super::logprobs::{ChatLogprobs, PromptLogprob};
use super::sse::{self, Dialect, Events};
use super::state::AppState;

pub(super) async fn handle(
    State(state): State<Arc<AppState>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let serving = state.require_serving()?;
    let rules = serving.rules();
    let parse = move |body: &[u8]| ChatRequest::parse(body, &rules);
    let (request, room) = read_parsed(&state, request, context.id(), parse).await?;
    let ChatRequest { params, conversation } = request;
    state.check_model(params.model.as_deref())?;

    let truncate = params.truncate_prompt_tokens;
    let mut token_ids = encode_chat(&state, serving, conversation, truncate.is_some(), context.id()).await?;
    if let Some(len) = truncate {
        token_ids.drain(..token_ids.len().saturating_sub(len));
    }
    if token_ids.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` have no tokens"));
    }
    // Without a limit of the client's the rest of the context is free.
    let max_tokens = params.resolve_max_tokens(token_ids.len(), usize::MAX, "messages", &serving.rules())?;

    let meta = AnswerMeta::new("chatcmpl", context.id(), &state, serving, &params, params.prompt_logprobs);
    let log = context.log.clone();
    let mut generation = Generation::start(Job {
        serving,
        params: &params,
        prompts: vec![PromptJob { token_ids, max_tokens }],
        cache_salt: context.cache_salt(params.cache_salt.as_deref()),
        arrival: context.arrival,
        log: log.clone(),
    })?;
    drop(room);
    let answer = Answer { meta };
    if params.stream.is_some() {
        return sse::respond(state, generation, answer).await;
    }
    let updates = generation.collect().await?;
    let is_long = answer.meta.num_listed(&generation) > limits::INLINE_LISTED_TOKENS;
    let write = move || json(&answer.whole(&generation, updates));
    state.helpers.run(is_long, log.id(), write).await
}

/// Writes answers of this route.
struct Answer {
    meta: AnswerMeta,
}

/// An answer or a chunk: they differ in `C`.
#[derive(Serialize)]
struct Body<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptLogprob>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    message: Message,
    #[serde(flatten)]
    rest: ChoiceRest,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    #[serde(flatten)]
    rest: ChoiceRest,
}

#[derive(Serialize)]
struct ChoiceRest {
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

impl Answer {
    fn whole(&self, generation: &Generation, updates: Vec<Update>) -> Body<'_, Choice> {
        let choices = updates.into_iter().map(|mut update| {
            let content = std::mem::take(&mut update.text);
            let message = Message { role: "assistant", content, refusal: None };
            Choice { index: update.choice, message, rest: self.rest(update) }
        });
        Body {
            object: "chat.completion",
            prompt_logprobs: self.meta.prompt_logprobs(generation, 0),
            prompt_token_ids: self.prompt_token_ids(generation),
            ..self.body(choices.collect(), Some(Some(generation.counts().into())))
        }
    }

    fn body<C>(&self, choices: Vec<C>, usage: Option<Option<Usage>>) -> Body<'_, C> {
        Body {
            id: &self.meta.id,
            object: "chat.completion.chunk",
            created: self.meta.created,
            model: &self.meta.model,
            system_fingerprint: &self.meta.fingerprint,
            choices,
            usage,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }

    fn rest(&self, update: Update) -> ChoiceRest {
        let (finish_reason, stop_reason) =
            update.finish.map_or((None, None), |finish| (Some(finish.reason), finish.stop_reason));
        let ids = self.meta.return_token_ids;
        ChoiceRest {
            logprobs: self.logprobs(&update.tokens),
            finish_reason,
            stop_reason,
            token_ids: ids.then(|| update.tokens.iter().map(|token| token.id).collect()),
        }
    }

    fn logprobs(&self, tokens: &[OutputToken]) -> Option<ChatLogprobs> {
        let count = self.meta.logprobs?;
        let scored = tokens.iter().filter_map(|token| token.logprobs.as_ref());
        Some(ChatLogprobs { content: scored.map(|scored| self.meta.names.chat(scored, count)).collect() })
    }

    fn prompt_token_ids(&self, generation: &Generation) -> Option<Vec<u32>> {
        self.meta.return_token_ids.then(|| generation.prompt_of(0).token_ids.clone())
    }
}

impl Dialect for Answer {
    fn meta(&self) -> &AnswerMeta {
        &self.meta
    }

    fn write_update(&mut self, generation: &Generation, mut update: Update, events: &mut Events) {
        let usage = self.meta.chunk_usage(generation);
        if update.first {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            let rest = ChoiceRest { logprobs: None, finish_reason: None, stop_reason: None, token_ids: None };
            let choice = ChunkChoice { index: update.choice, delta, rest };
            let prompt_token_ids = self.prompt_token_ids(generation);
            events.push(&Body { prompt_token_ids, ..self.body(vec![choice], usage) });
        }
        let text = std::mem::take(&mut update.text);
        let counts = !update.tokens.is_empty() && self.meta.counts_tokens();
        if text.is_empty() && update.finish.is_none() && !counts {
            return;
        }
        let delta = Delta { role: None, content: (!text.is_empty() || counts).then_some(text) };
        let choice = ChunkChoice { index: update.choice, delta, rest: self.rest(update) };
        events.push(&self.body(vec![choice], usage));
    }

    fn write_end(&mut self, generation: &Generation, events: &mut Events) {
        if self.meta.stream.include_usage {
            events.push(&self.body(Vec::<ChunkChoice>::new(), Some(Some(generation.counts().into()))));
        }
    }
}
