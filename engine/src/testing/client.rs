//! A client that reads its stream without waiting, and checks what the oracle says it must get.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use super::fake_executor::logprobs;
use super::oracle::{Ending, Oracle};
use crate::error::{FailureKind, RequestFailure};
use crate::handle::EngineHandle;
use crate::request::Request;
use crate::stream::{Event, FinishReason, RequestStream, TokenLogprobs};

pub(crate) struct Client {
    pub(crate) request: Request,
    pub(crate) seed: u64,
    stream: Option<RequestStream>,
    pub(crate) started: Option<(usize, Option<Vec<Option<TokenLogprobs>>>)>,
    pub(crate) choices: Vec<ChoiceSeen>,
    pub(crate) outcome: Outcome,
    /// Choices that this client ended by a stop string.
    pub(crate) ended_by_us: Vec<u32>,
}

#[derive(Default)]
pub(crate) struct ChoiceSeen {
    pub(crate) tokens: Vec<u32>,
    logprobs: Vec<Option<TokenLogprobs>>,
    pub(crate) finish: Option<FinishReason>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Open,
    Completed,
    Failed(RequestFailure),
    /// The stream was dropped before its end.
    Left,
}

impl Client {
    pub(crate) fn submit(handle: &EngineHandle, request: Request) -> Self {
        let stream = handle.submit(request.clone()).expect("the request is taken");
        Self {
            seed: stream.seed(),
            choices: (0..request.params.n).map(|_| ChoiceSeen::default()).collect(),
            request,
            stream: Some(stream),
            started: None,
            outcome: Outcome::Open,
            ended_by_us: Vec::new(),
        }
    }

    /// Reads what is there.
    pub(crate) fn read(&mut self) {
        while self.read_one() {}
    }

    /// Reads one message; false when there is none now, or ever.
    pub(crate) fn read_one(&mut self) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        let polled = pin!(stream.next()).poll(&mut Context::from_waker(Waker::noop()));
        match polled {
            Poll::Pending => false,
            Poll::Ready(Some(events)) => {
                assert!(!events.is_empty(), "an empty message");
                events.into_iter().for_each(|event| self.take(event));
                true
            }
            Poll::Ready(None) => {
                self.stream = None;
                if self.outcome == Outcome::Open {
                    assert!(
                        self.choices.iter().all(|choice| choice.finish.is_some()),
                        "an end without a word"
                    );
                    self.outcome = Outcome::Completed;
                }
                false
            }
        }
    }

    pub(crate) fn leave(&mut self) {
        self.stream = None;
        if self.outcome == Outcome::Open {
            self.outcome = Outcome::Left;
        }
    }

    pub(crate) fn finish_choice(&mut self, choice: u32) {
        if let Some(stream) = &self.stream {
            stream.finish_choice(choice);
            self.ended_by_us.push(choice);
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.outcome == Outcome::Open
    }

    pub(crate) fn num_tokens(&self) -> usize {
        self.choices.iter().map(|choice| choice.tokens.len()).sum()
    }

    fn take(&mut self, event: Event) {
        assert!(!matches!(self.outcome, Outcome::Failed(_)), "an event after a failure");
        match event {
            Event::Started { cached_tokens, prompt_logprobs } => {
                assert!(self.started.is_none(), "started twice");
                assert!(cached_tokens < self.request.prompt.len());
                self.started = Some((cached_tokens, prompt_logprobs));
            }
            Event::Token { choice, token, logprobs } => {
                assert!(self.started.is_some(), "a token before the start");
                let seen = &mut self.choices[choice as usize];
                assert!(seen.finish.is_none(), "a token after the end");
                seen.tokens.push(token);
                seen.logprobs.push(logprobs);
            }
            Event::Finished { choice, reason } => {
                let seen = &mut self.choices[choice as usize];
                assert!(seen.finish.is_none(), "finished twice");
                seen.finish = Some(reason);
            }
            Event::Failed(failure) => self.outcome = Outcome::Failed(failure),
        }
    }

    /// Everything received is what the oracle says, as far as it goes; what completed is complete.
    pub(crate) fn check(&self, oracle: &Oracle) {
        let expected: Vec<(Vec<u32>, Ending)> = (0..self.request.params.n)
            .map(|choice| oracle.choice(&self.request, self.seed, choice))
            .collect();
        for (choice, (seen, (tokens, ending))) in self.choices.iter().zip(&expected).enumerate() {
            assert!(tokens.starts_with(&seen.tokens), "choice {choice}: {:?} for {tokens:?}", seen.tokens);
            self.check_logprobs(seen);
            let ended_by_us = self.ended_by_us.contains(&(choice as u32));
            match seen.finish {
                None => {}
                Some(FinishReason::Stop(None)) if ended_by_us => {}
                Some(reason) => {
                    assert_eq!(seen.tokens, *tokens);
                    let expected = match reason {
                        FinishReason::Stop(token) => Ending::Stop(token),
                        FinishReason::Length => Ending::Length,
                    };
                    assert_eq!(expected, *ending);
                }
            }
        }
        let any_bad = expected.iter().any(|(_, ending)| *ending == Ending::Bad);
        if let Outcome::Failed(failure) = &self.outcome
            && failure.kind == FailureKind::Internal
        {
            assert!(
                any_bad || self.request.prompt_logprobs.is_some(),
                "failed without a reason: {failure:?}"
            );
        }
        if self.outcome == Outcome::Completed && self.ended_by_us.is_empty() {
            assert!(!any_bad);
        }
        self.check_prompt_logprobs();
    }

    fn check_logprobs(&self, seen: &ChoiceSeen) {
        let mut history = self.request.prompt.clone();
        for (token, found) in seen.tokens.iter().zip(&seen.logprobs) {
            let expected = self.request.params.logprobs.map(|top| logprobs(&history, *token, top));
            assert_eq!(*found, expected);
            history.push(*token);
        }
    }

    fn check_prompt_logprobs(&self) {
        let Some((cached_tokens, found)) = &self.started else { return };
        let prompt = &self.request.prompt;
        let expected = self.request.prompt_logprobs.map(|top| {
            assert_eq!(*cached_tokens, 0, "scored prompts skip the cache");
            let score = |i: usize| (i > 0).then(|| logprobs(&prompt[..i], prompt[i], top));
            (0..prompt.len()).map(score).collect::<Vec<_>>()
        });
        assert_eq!(*found, expected);
    }
}
