//! A running answer: one engine request per prompt, merged into one sequence of updates.
//!
//! Dropping a [`Generation`] drops the engine's streams, which cancels what has not ended: that is the whole of the
//! handling of clients that leave, queued or running. It ends when every engine stream has ended, so whoever has read
//! the end of an answer finds it in the counters.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tandem_engine::{
    EngineConfig, Event, FinishReason, Request, RequestStream, SamplingParams, TokenLogprobs,
};

use super::access_log::RequestLog;
use super::choice::{Choice, Stops, Update};
use super::errors::ApiError;
use super::params::Params;
use super::state::Serving;
use crate::text::StopMatcher;

/// What to run.
pub(super) struct Job<'a> {
    pub(super) serving: &'a Serving,
    pub(super) params: &'a Params,
    pub(super) prompts: Vec<PromptJob>,
    /// Isolates the prefix cache of one tenant from another's.
    pub(super) cache_salt: Option<String>,
    pub(super) arrival: Instant,
    pub(super) log: Arc<RequestLog>,
}

/// One prompt in tokens.
pub(super) struct PromptJob {
    pub(super) token_ids: Vec<u32>,
    pub(super) max_tokens: usize,
}

/// A prompt of a running answer.
pub(super) struct PromptState {
    pub(super) token_ids: Vec<u32>,
    pub(super) cached_tokens: usize,
    /// One per token when asked for; the first is `None`.
    pub(super) logprobs: Option<Vec<Option<TokenLogprobs>>>,
}

/// Token counts of an answer so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct TokenCounts {
    pub(super) prompt: usize,
    pub(super) cached: usize,
    pub(super) output: usize,
}

/// A running answer.
pub(super) struct Generation {
    turns: FuturesUnordered<Pin<Box<dyn Future<Output = Turn> + Send>>>,
    /// News of a later step than the one that was given out last.
    held: VecDeque<Turn>,
    prompts: Vec<PromptState>,
    /// `num_choices` for each prompt, in order.
    choices: Vec<Choice>,
    num_choices: usize,
    log: Arc<RequestLog>,
}

/// An engine stream and what it said.
struct Turn {
    prompt_idx: usize,
    stream: RequestStream,
    events: Option<Vec<Event>>,
}

impl Generation {
    /// Submits every prompt, or none: a refusal drops (and so cancels) those taken before it.
    pub(super) fn start(job: Job<'_>) -> Result<Self, ApiError> {
        refuse_long_list(job.prompts.len(), job.serving.engine.config())?;
        let num_choices = job.params.sampling.n as usize;
        let turns = FuturesUnordered::new();
        let mut choices = Vec::with_capacity(job.prompts.len() * num_choices);
        let mut prompts = Vec::with_capacity(job.prompts.len());
        let strings: Arc<[String]> = job.params.stop.as_slice().into();
        for (prompt_idx, PromptJob { token_ids, max_tokens }) in job.prompts.into_iter().enumerate() {
            let request = Request {
                id: job.log.id().to_owned(),
                prompt: token_ids.clone(),
                params: SamplingParams { max_tokens, ..job.params.sampling.clone() },
                priority: job.params.priority,
                cache_salt: job.cache_salt.clone(),
                prompt_logprobs: job.params.prompt_logprobs,
                arrival: job.arrival,
            };
            let submitted = job.serving.engine.submit(request);
            let stream = submitted.map_err(ApiError::from_submit)?;
            turns.push(turn(prompt_idx, stream));
            for _ in 0..num_choices {
                choices.push(new_choice(job.serving, job.params, &strings)?);
            }
            job.log.add_prompt_tokens(token_ids.len());
            prompts.push(PromptState { token_ids, cached_tokens: 0, logprobs: None });
        }
        let held = VecDeque::new();
        Ok(Self { turns, held, prompts, choices, num_choices, log: job.log })
    }

    /// Waits for the next step that has news and returns what is there, at most one step of each prompt and one update
    /// per choice; `None` at the end. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<Update>>, ApiError> {
        let mut updates = Vec::new();
        let mut seen = Vec::new();
        let mut held = std::mem::take(&mut self.held);
        if held.is_empty() {
            let Some(turn) = self.turns.next().await else { return Ok(None) };
            held.push_back(turn);
        }
        for turn in held {
            seen.push(turn.prompt_idx);
            self.take(turn, &mut updates)?;
        }
        // Prompts of one request usually run in the same step: their news goes out in the same write.
        while let Some(Some(turn)) = self.turns.next().now_or_never() {
            if turn.events.is_some() && seen.contains(&turn.prompt_idx) {
                self.held.push_back(turn);
            } else {
                seen.push(turn.prompt_idx);
                self.take(turn, &mut updates)?;
            }
        }
        Ok(Some(updates))
    }

    /// Whether every engine stream has ended.
    pub(super) fn is_over(&self) -> bool {
        self.turns.is_empty() && self.held.is_empty()
    }

    /// The whole answer: one update per choice with everything in it, in order.
    pub(super) async fn collect(&mut self) -> Result<Vec<Update>, ApiError> {
        let mut whole: Vec<Update> =
            (0..self.choices.len()).map(|choice| Update { choice, ..Update::default() }).collect();
        while let Some(updates) = self.next().await? {
            for update in updates {
                whole[update.choice].append(update);
            }
        }
        Ok(whole)
    }

    /// Which prompt a choice continues.
    pub(super) fn prompt_idx(&self, choice: usize) -> usize {
        choice / self.num_choices
    }

    /// How many choices continue each prompt.
    pub(super) fn choices_per_prompt(&self) -> usize {
        self.num_choices
    }

    /// The prompt that a choice continues.
    pub(super) fn prompt_of(&self, choice: usize) -> &PromptState {
        &self.prompts[self.prompt_idx(choice)]
    }

    pub(super) fn prompts(&self) -> &[PromptState] {
        &self.prompts
    }

    pub(super) fn log(&self) -> &Arc<RequestLog> {
        &self.log
    }

    pub(super) fn counts(&self) -> TokenCounts {
        TokenCounts {
            prompt: self.prompts.iter().map(|prompt| prompt.token_ids.len()).sum(),
            cached: self.prompts.iter().map(|prompt| prompt.cached_tokens).sum(),
            output: self.choices.iter().map(Choice::num_tokens).sum(),
        }
    }

    /// Applies what one stream said, and waits for more of it.
    fn take(&mut self, taken: Turn, updates: &mut Vec<Update>) -> Result<(), ApiError> {
        let Turn { prompt_idx, stream, events } = taken;
        let Some(events) = events else { return Ok(()) };
        let mut events = events.into_iter();
        while let Some(event) = events.next() {
            match event {
                Event::Started { cached_tokens, prompt_logprobs } => {
                    self.prompts[prompt_idx].cached_tokens = cached_tokens;
                    self.prompts[prompt_idx].logprobs = prompt_logprobs;
                    for idx in prompt_idx * self.num_choices..(prompt_idx + 1) * self.num_choices {
                        update_of(updates, idx).first = true;
                    }
                }
                Event::Token { choice, token, logprobs } => {
                    let stops_here = stops_next(events.as_slice(), choice);
                    let idx = prompt_idx * self.num_choices + choice as usize;
                    let num_before = self.choices[idx].num_tokens();
                    if self.choices[idx].push(token, logprobs, stops_here, update_of(updates, idx)) {
                        stream.finish_choice(choice);
                    }
                    self.log.add_output_tokens(self.choices[idx].num_tokens() - num_before);
                }
                Event::Finished { choice, reason } => {
                    let idx = prompt_idx * self.num_choices + choice as usize;
                    self.choices[idx].finish(reason, update_of(updates, idx));
                }
                Event::Failed(failure) => return Err(ApiError::from_failure(failure, self.log.id())),
            }
        }
        self.turns.push(turn(prompt_idx, stream));
        Ok(())
    }
}

/// Every prompt of a list waits, if only until the next step: a list longer than the queue would not fit later either.
fn refuse_long_list(num_prompts: usize, config: &EngineConfig) -> Result<(), ApiError> {
    let most = config.max_queued_requests;
    if num_prompts > 1 && num_prompts > most {
        let message =
            format!("`prompt` holds {num_prompts} prompts; this server takes at most {most} at once");
        return Err(ApiError::invalid("prompt", message));
    }
    Ok(())
}

fn turn(prompt_idx: usize, mut stream: RequestStream) -> Pin<Box<dyn Future<Output = Turn> + Send>> {
    Box::pin(async move {
        let events = stream.next().await;
        Turn { prompt_idx, stream, events }
    })
}

/// Whether the token that was just taken is the one that stopped its choice: the next event of the choice says so.
fn stops_next(rest: &[Event], of: u32) -> bool {
    let next = rest.iter().find(|event| match event {
        Event::Token { choice, .. } | Event::Finished { choice, .. } => *choice == of,
        _ => false,
    });
    matches!(next, Some(Event::Finished { reason: FinishReason::Stop(_), .. }))
}

/// The update of a choice in this step; a step has few.
fn update_of(updates: &mut Vec<Update>, choice: usize) -> &mut Update {
    let position = updates.iter().position(|update| update.choice == choice);
    let position = position.unwrap_or_else(|| {
        updates.push(Update { choice, ..Update::default() });
        updates.len() - 1
    });
    &mut updates[position]
}

fn new_choice(serving: &Serving, params: &Params, strings: &Arc<[String]>) -> Result<Choice, ApiError> {
    let detokenizer =
        serving.tokenizer.as_ref().map(|tokenizer| tokenizer.detokenizer(params.skip_special_tokens));
    let stops = if strings.is_empty() {
        None
    } else {
        let matcher = StopMatcher::new(strings, params.include_stop_in_output)
            .map_err(|error| ApiError::invalid("stop", error.to_string()))?;
        Some(Stops { matcher, strings: strings.clone(), min_tokens: params.sampling.min_tokens })
    };
    Ok(Choice::new(detokenizer, stops, params.include_stop_in_output))
}
