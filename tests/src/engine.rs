//! Engines without HTTP, and what a request made of them in a comparable form.

use std::path::PathBuf;
use std::time::Instant;

use tandem_engine::{
    EngineHandle, EngineOptions, Event, FinishReason, ModelOptions, Request, RequestStream, SamplingParams,
    TokenLogprobs, inspect, spawn,
};

use crate::default_model;

/// Options for the default model; tests change what they are about.
pub fn model(path: PathBuf) -> ModelOptions {
    ModelOptions { path, ..ModelOptions::default() }
}

/// Sizes that fit a small machine running other tests at the same time. Free KV blocks hold NaN.
pub fn small() -> EngineOptions {
    EngineOptions {
        max_model_len: Some(1024),
        max_num_seqs: 64,
        kv_cache_memory_bytes: Some(64 << 20),
        poison_freed_blocks: true,
        ..EngineOptions::default()
    }
}

/// Starts an engine.
pub fn start(model: &ModelOptions, options: &EngineOptions) -> EngineHandle {
    let inspected = inspect(model).unwrap_or_else(|error| panic!("{error}"));
    let loaded = inspected.load(options).unwrap_or_else(|error| panic!("{error}"));
    spawn(loaded.executor, loaded.config)
}

/// Starts an engine on the default model.
pub fn start_default(options: &EngineOptions) -> EngineHandle {
    start(&model(default_model()), options)
}

/// A request with the defaults of a test.
pub fn request(prompt: &[u32], params: SamplingParams) -> Request {
    Request {
        id: String::new(),
        prompt: prompt.to_vec(),
        params,
        priority: 0,
        cache_salt: None,
        prompt_logprobs: None,
        arrival: Instant::now(),
    }
}

/// Greedy, with log-probabilities.
pub fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens, temperature: 0.0, logprobs: Some(0), ..SamplingParams::default() }
}

/// Everything that a request's stream said, with floats as bits so that equal means bit-identical.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    pub cached_tokens: usize,
    /// Log-probabilities of the prompt's tokens; `None` for the first.
    pub prompt_logprobs: Vec<Option<u32>>,
    /// Per choice: tokens, the bits of their log-probabilities, how it ended.
    pub choices: Vec<Choice>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Choice {
    pub tokens: Vec<u32>,
    pub logprob_bits: Vec<u32>,
    pub stopped: bool,
}

impl Answer {
    /// What must not depend on how the engine went about it.
    pub fn outcome(&self) -> (&[Option<u32>], &[Choice]) {
        (&self.prompt_logprobs, &self.choices)
    }
}

/// Submits and waits for the end.
pub fn answer(engine: &EngineHandle, request: Request) -> Answer {
    collect(engine.submit(request).unwrap_or_else(|error| panic!("{error}")))
}

/// Waits for the end of a stream.
pub fn collect(mut stream: RequestStream) -> Answer {
    let mut answer = Answer::default();
    while let Some(events) = stream.blocking_next() {
        for event in events {
            record(&mut answer, event);
        }
    }
    answer
}

fn record(answer: &mut Answer, event: Event) {
    let bits = |logprobs: &TokenLogprobs| logprobs.logprob.to_bits();
    match event {
        Event::Started { cached_tokens, prompt_logprobs } => {
            answer.cached_tokens = cached_tokens;
            answer.prompt_logprobs =
                prompt_logprobs.unwrap_or_default().iter().map(|entry| entry.as_ref().map(bits)).collect();
        }
        Event::Token { choice, token, logprobs } => {
            let choice = choice_mut(answer, choice);
            choice.tokens.push(token);
            choice.logprob_bits.extend(logprobs.as_ref().map(bits));
        }
        Event::Finished { choice, reason } => {
            choice_mut(answer, choice).stopped = matches!(reason, FinishReason::Stop(_));
        }
        Event::Failed(failure) => panic!("request failed: {failure:?}"),
    }
}

fn choice_mut(answer: &mut Answer, index: u32) -> &mut Choice {
    let index = index as usize;
    if answer.choices.len() <= index {
        answer.choices.resize_with(index + 1, Choice::default);
    }
    &mut answer.choices[index]
}
