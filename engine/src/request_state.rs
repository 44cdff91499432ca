//! A request in flight: its reader, its choices, and the sampling policy of each draw.
//!
//! Blocks and scheduling are the sequences'; what stays here survives preemption untouched.

use std::time::Instant;

use crate::handle::{SubmissionParts, Ticket};
use crate::penalties::UsedTokens;
use crate::sample_row::{Draw, NoiseKey};
use crate::sampling_params::{GREEDY_BELOW, SamplingParams};
use crate::sequence::SequenceKey;
use crate::stream::{FinishReason, Outlet, TokenLogprobs};

pub(crate) struct RequestState {
    pub(crate) id: String,
    pub(crate) priority: i32,
    pub(crate) serial: u64,
    pub(crate) arrival: Instant,
    pub(crate) prompt_len: usize,
    pub(crate) params: SamplingParams,
    pub(crate) seed: u64,
    pub(crate) outlet: Outlet,
    pub(crate) choices: Vec<Choice>,
    /// Scores gathered so far, one entry per prompt token that has been reached; the first is `None`.
    pub(crate) prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// How many top tokens each of those lists.
    pub(crate) prompt_top: usize,
    pub(crate) first_scheduled: Option<Instant>,
    pub(crate) prompt_computed: Option<Instant>,
    /// Since when the request waits for an executor that cannot run steps; says nothing while it can.
    pub(crate) stranded_since: Option<Instant>,
    /// The longest context that was computed for one of its choices.
    furthest: usize,
    /// The group broke in a step with it, and it has not got any further since.
    pub(crate) is_suspect: bool,
    /// A break of the executor's group stopped it between two tokens, and it has not run since.
    pub(crate) is_interrupted: bool,
    pub(crate) ticket: Ticket,
    /// Banned tokens while `min_tokens` is not reached: with all tokens that would end the choice.
    banned_at_first: Vec<u32>,
    /// Tokens that end a choice silently.
    eos: Vec<u32>,
}

pub(crate) struct Choice {
    pub(crate) finish: Option<FinishReason>,
    pub(crate) num_output: usize,
    pub(crate) first_token: Option<Instant>,
    pub(crate) last_token: Option<Instant>,
    /// Empty when no penalty needs it, and until the request runs.
    used: UsedTokens,
}

impl RequestState {
    /// Takes a submission apart; the prompt goes to the first sequence.
    pub(crate) fn new(
        submission: SubmissionParts,
        eos_token_ids: &[u32],
    ) -> (Self, Vec<u32>, Option<String>) {
        let SubmissionParts { request, serial, seed, outlet, ticket } = submission;
        let params = request.params;
        let eos = if params.ignore_eos { Vec::new() } else { eos_token_ids.to_vec() };
        let banned_at_first = [&params.banned_token_ids[..], &params.stop_token_ids, &eos].concat();
        let choice = |_| Choice {
            finish: None,
            num_output: 0,
            first_token: None,
            last_token: None,
            used: UsedTokens::default(),
        };
        let state = Self {
            id: request.id,
            priority: request.priority,
            serial,
            arrival: request.arrival,
            prompt_len: request.prompt.len(),
            seed,
            outlet,
            choices: (0..params.n).map(choice).collect(),
            params,
            prompt_logprobs: request.prompt_logprobs.map(|_| vec![None]),
            prompt_top: request.prompt_logprobs.unwrap_or(0),
            first_scheduled: None,
            prompt_computed: None,
            stranded_since: None,
            furthest: 0,
            is_suspect: false,
            is_interrupted: false,
            ticket,
            banned_at_first,
            eos,
        };
        (state, request.prompt, request.cache_salt)
    }

    /// It runs for the first time. What penalties need is made now only: it takes several times the prompt's memory, which is
    /// what the queue counts.
    pub(crate) fn begin(&mut self, prompt: &[u32], now: Instant) {
        self.first_scheduled = Some(now);
        self.ticket.leave_queue();
        if self.params.is_penalised() {
            let used = UsedTokens::of_prompt(prompt);
            self.choices.iter_mut().for_each(|choice| choice.used.clone_from(&used));
        }
    }

    pub(crate) fn key(&self, choice: u32) -> SequenceKey {
        SequenceKey { priority: self.priority, serial: self.serial, choice }
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = SequenceKey> {
        (0..self.params.n).map(|choice| self.key(choice))
    }

    pub(crate) fn has_output(&self) -> bool {
        self.choices.iter().any(|choice| choice.num_output > 0)
    }

    /// The first `context_len` tokens of a choice are computed.
    pub(crate) fn reach(&mut self, context_len: usize) {
        if context_len > self.furthest {
            self.furthest = context_len;
            self.is_suspect = false;
        }
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// How the token at `position` of a choice is drawn.
    pub(crate) fn draw(&self, choice: u32, position: usize) -> Draw<'_> {
        let params = &self.params;
        let state = &self.choices[choice as usize];
        // Not by the tokens that are known: the one before may still be drawn.
        let is_early = position - self.prompt_len < params.min_tokens;
        Draw {
            key: NoiseKey { seed: self.seed, choice, position: position as u32 },
            used_tokens: state.used.as_slice(),
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: &params.logit_bias,
            allowed_token_ids: params.allowed_token_ids.as_deref(),
            banned_token_ids: if is_early { &self.banned_at_first } else { &params.banned_token_ids },
            temperature: if params.temperature < GREEDY_BELOW { 0.0 } else { params.temperature },
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
        }
    }

    /// Counts a drawn token and says whether it is the choice's last. A token that stops does so even where
    /// the length ends too.
    pub(crate) fn accept(&mut self, choice: u32, token: u32, now: Instant) -> Option<FinishReason> {
        let is_penalised = self.params.is_penalised();
        // It is further than before: what is replayed is not drawn again.
        self.is_suspect = false;
        let state = &mut self.choices[choice as usize];
        state.num_output += 1;
        state.first_token.get_or_insert(now);
        state.last_token = Some(now);
        if is_penalised {
            state.used.count_output(token);
        }
        state.finish = if self.params.stop_token_ids.contains(&token) {
            Some(FinishReason::Stop(Some(token)))
        } else if self.eos.contains(&token) {
            Some(FinishReason::Stop(None))
        } else if state.num_output >= self.params.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        state.finish
    }
}
