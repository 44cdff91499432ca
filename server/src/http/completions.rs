//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;
use serde::Serialize;

use super::answer::{AnswerMeta, Usage};
use super::body::read_parsed;
use super::choice::{StopReason, Update};
use super::completion_request::CompletionRequest;
use super::context::RequestContext;
use super::encode::{EncodedPrompt, PromptOptions, encode_prompts};
use super::errors::{ApiError, json};
use super::generation::{Generation, Job, PromptJob};
use super::limits;
use super::logprobs::{CompletionLogprobs, PromptLogprob};
use super::sse::{self, Dialect, Events};
use super::state::AppState;

/// Output tokens when the client does not say.
const DEFAULT_MAX_TOKENS: usize = 16;

pub(super) async fn handle(
    State(state): State<Arc<AppState>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let serving = state.require_serving()?;
    let rules = serving.rules();
    let parse = move |body: &[u8]| CompletionRequest::parse(body, &rules);
    let (request, room) = read_parsed(&state, request, context.id(), parse).await?;
    let CompletionRequest { mut params, prompts, echo, add_special_tokens } = request;
    state.check_model(params.model.as_deref())?;

    let options = PromptOptions { add_special_tokens, truncate: params.truncate_prompt_tokens, echo };
    let encoded = encode_prompts(&state, serving, prompts, options, context.id()).await?;
    let mut jobs = Vec::with_capacity(encoded.len());
    let mut echoes = Vec::with_capacity(encoded.len());
    for EncodedPrompt { token_ids, text } in encoded {
        if token_ids.is_empty() {
            return Err(ApiError::invalid("prompt", "`prompt` has no tokens"));
        }
        let max_tokens =
            params.resolve_max_tokens(token_ids.len(), DEFAULT_MAX_TOKENS, "prompt", &serving.rules())?;
        jobs.push(PromptJob { token_ids, max_tokens });
        echoes.push(text);
    }

    let prompt_logprobs = params.prompt_logprobs;
    if echo && let Some(count) = params.sampling.logprobs {
        // The echoed prompt is scored as the output is; the larger count serves both.
        params.prompt_logprobs = Some(prompt_logprobs.unwrap_or(0).max(count));
    }
    let meta = AnswerMeta::new("cmpl", context.id(), &state, serving, &params, prompt_logprobs);
    let log = context.log.clone();
    let mut generation = Generation::start(Job {
        serving,
        params: &params,
        prompts: jobs,
        cache_salt: context.cache_salt(params.cache_salt.as_deref()),
        arrival: context.arrival,
        log: log.clone(),
    })?;
    drop(room);
    let mut answer = Answer { meta, echoes: echo.then_some(echoes), offsets: Vec::new() };
    if params.stream.is_some() {
        return sse::respond(state, generation, answer).await;
    }
    let updates = generation.collect().await?;
    let is_long = answer.meta.num_listed(&generation) > limits::INLINE_LISTED_TOKENS;
    let write = move || {
        let choices = updates.into_iter().map(|update| answer.choice(&generation, update)).collect();
        let usage = Some(Some(generation.counts().into()));
        json(&answer.body(choices, usage))
    };
    state.helpers.run(is_long, log.id(), write).await
}

/// Writes answers of this route.
struct Answer {
    meta: AnswerMeta,
    /// The prompts' texts when they are to be repeated.
    echoes: Option<Vec<String>>,
    /// Per choice: characters written so far, for `text_offset`.
    offsets: Vec<usize>,
}

#[derive(Serialize)]
struct Body<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptLogprob>>>,
}

impl Answer {
    fn body(&self, choices: Vec<Choice>, usage: Option<Option<Usage>>) -> Body<'_> {
        Body {
            id: &self.meta.id,
            object: "text_completion",
            created: self.meta.created,
            model: &self.meta.model,
            system_fingerprint: &self.meta.fingerprint,
            choices,
            usage,
        }
    }

    fn choice(&mut self, generation: &Generation, update: Update) -> Choice {
        let logprobs = self.logprobs(generation, &update);
        let prompt_idx = generation.prompt_idx(update.choice);
        let prompt = update.first.then(|| generation.prompt_of(update.choice));
        let mut text = match (&self.echoes, update.first) {
            (Some(echoes), true) => echoes[prompt_idx].clone(),
            _ => String::new(),
        };
        text.push_str(&update.text);
        let (finish_reason, stop_reason) =
            update.finish.map_or((None, None), |finish| (Some(finish.reason), finish.stop_reason));
        let ids = self.meta.return_token_ids;
        Choice {
            index: update.choice,
            text,
            logprobs,
            finish_reason,
            stop_reason,
            token_ids: ids.then(|| update.tokens.iter().map(|token| token.id).collect()),
            prompt_token_ids: prompt.filter(|_| ids).map(|prompt| prompt.token_ids.clone()),
            prompt_logprobs: prompt.and_then(|_| self.meta.prompt_logprobs(generation, prompt_idx)),
        }
    }

    fn logprobs(&mut self, generation: &Generation, update: &Update) -> Option<CompletionLogprobs> {
        let count = self.meta.logprobs?;
        if self.offsets.len() <= update.choice {
            self.offsets.resize(update.choice + 1, 0);
        }
        let (mut list, mut offset) = (CompletionLogprobs::default(), self.offsets[update.choice]);
        let names = &self.meta.names;
        if update.first
            && let Some(echoes) = &self.echoes
        {
            let prompt = generation.prompt_of(update.choice);
            let scores = prompt.logprobs.as_deref().unwrap_or_default();
            let echoed = echoes[generation.prompt_idx(update.choice)].chars().count();
            let starts = names.starts(&prompt.token_ids, echoed);
            for (idx, (id, start)) in prompt.token_ids.iter().zip(starts).enumerate() {
                let score = scores.get(idx).and_then(Option::as_ref);
                list.push(names, *id, score, count, start);
            }
            offset = echoed;
        }
        for token in &update.tokens {
            list.push(names, token.id, token.logprobs.as_ref(), count, offset);
            offset += token.num_chars;
        }
        self.offsets[update.choice] = offset;
        Some(list)
    }
}

impl Dialect for Answer {
    fn meta(&self) -> &AnswerMeta {
        &self.meta
    }

    fn write_update(&mut self, generation: &Generation, update: Update, events: &mut Events) {
        let says_something = !update.text.is_empty()
            || update.finish.is_some()
            || update.first && (self.echoes.is_some() || self.meta.return_token_ids)
            || !update.tokens.is_empty() && self.meta.counts_tokens();
        if says_something {
            let choice = self.choice(generation, update);
            events.push(&self.body(vec![choice], self.meta.chunk_usage(generation)));
        }
    }

    fn write_end(&mut self, generation: &Generation, events: &mut Events) {
        if self.meta.stream.include_usage {
            events.push(&self.body(Vec::new(), Some(Some(generation.counts().into()))));
        }
    }
}
