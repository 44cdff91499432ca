//! Keeps the counts that become snapshots. Only the step thread writes here.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::EngineConfig;
use crate::error::FailureKind;
use crate::request_state::{Choice, RequestState};
use crate::scheduler::{Schedule, Scheduler};
use crate::snapshot::{Snapshot, StepTimes};
use crate::stream::FinishReason;

pub(crate) struct Recorder {
    totals: Snapshot,
    prefix_caching: bool,
    tokens: RateWindow,
    requests: RateWindow,
    /// When the executor was done with a step that counts in `decode_times` and has not ended.
    unended: Option<Instant>,
}

/// Moments of one step.
pub(crate) struct StepClock {
    /// Before anything was received.
    pub(crate) begin: Instant,
    /// The executor was called.
    pub(crate) start: Instant,
    /// It came back.
    pub(crate) end: Instant,
    /// What it spent in the model.
    pub(crate) forward: Duration,
    /// A device computed while the step was planned.
    pub(crate) plans_beside: bool,
    /// A device computes while its tokens are brought to requests.
    pub(crate) ends_beside: bool,
}

impl Recorder {
    pub(crate) fn new(config: &EngineConfig, start: Instant) -> Self {
        Self {
            totals: Snapshot::new(config),
            prefix_caching: config.prefix_caching,
            tokens: RateWindow::new(start),
            requests: RateWindow::new(start),
            unended: None,
        }
    }

    /// All counts as they are now. `in_flight` is what the engine holds, counted by it.
    pub(crate) fn snapshot(&mut self, in_flight: usize, scheduler: &Scheduler, now: Instant) -> Snapshot {
        let totals = &mut self.totals;
        totals.in_flight = in_flight as u64;
        totals.running = scheduler.num_running_requests() as u64;
        totals.waiting = totals.in_flight - totals.running;
        totals.preemptions = scheduler.num_preemptions();
        totals.tokens_per_second = self.tokens.rate(now);
        totals.requests_per_second = self.requests.rate(now);
        let blocks = scheduler.blocks().counts();
        totals.free_blocks = blocks.free;
        totals.used_blocks = blocks.used;
        totals.cached_blocks = blocks.cached;
        totals.kv_cache_usage = blocks.used as f64 / totals.num_blocks as f64;
        totals.clone()
    }

    /// The last counts of an engine whose state is not to be trusted: what had not ended has failed as
    /// `kind` says.
    pub(crate) fn final_snapshot(&mut self, kind: FailureKind) -> Snapshot {
        let totals = &mut self.totals;
        let ended = totals.completed() + totals.errored_total() + totals.cancelled;
        if totals.admitted > ended {
            *totals.errored.entry(kind).or_default() += totals.admitted - ended;
        }
        (totals.in_flight, totals.running, totals.waiting) = (0, 0, 0);
        totals.clone()
    }

    pub(crate) fn admitted(&mut self) {
        self.totals.admitted += 1;
    }

    pub(crate) fn cancelled(&mut self) {
        self.totals.cancelled += 1;
    }

    pub(crate) fn errored(&mut self, kind: FailureKind) {
        *self.totals.errored.entry(kind).or_default() += 1;
    }

    /// A request is in a step for the first time.
    pub(crate) fn first_scheduled(&mut self, request: &RequestState, cached_tokens: usize, now: Instant) {
        self.totals.queue_time.observe(seconds(request.arrival, now));
        // Requests whose prompt is scored do not look.
        if self.prefix_caching && request.prompt_logprobs.is_none() {
            self.totals.prefix_cache_query_tokens += request.prompt_len as u64;
            self.totals.prefix_cache_hit_tokens += cached_tokens as u64;
        }
    }

    /// A step ran.
    pub(crate) fn step(&mut self, schedule: &Schedule, times: &StepClock) {
        let totals = &mut self.totals;
        let plan = &schedule.plan;
        totals.steps += 1;
        totals.max_step_sequences = totals.max_step_sequences.max(plan.sequences.len());
        totals.block_copies += plan.block_copies.len() as u64;
        totals.iteration_tokens.observe(plan.num_tokens() as f64);
        let (has_decodes, chunks) = (schedule.num_decodes > 0, &plan.sequences[schedule.num_decodes..]);
        for planned in chunks {
            if totals.chunk_sizes.len() < 64 {
                totals.chunk_sizes.insert(planned.token_ids.len());
            }
        }
        let run = times.end.saturating_duration_since(times.start);
        if has_decodes {
            totals.decode_step_latency.observe(run.as_secs_f64());
        }
        if chunks.is_empty() {
            let scheduling = times.start.saturating_duration_since(times.begin);
            totals.decode_times.add(&StepTimes {
                steps: 1,
                overlapped: u64::from(times.plans_beside),
                scheduling: if times.plans_beside { Duration::ZERO } else { scheduling },
                forward: times.forward,
                sampling: run.saturating_sub(times.forward),
                emitting: Duration::ZERO,
            });
            self.unended = Some(times.end).filter(|_| !times.ends_beside);
        }
    }

    /// The step's events are out.
    pub(crate) fn step_ended(&mut self, now: Instant) {
        if let Some(end) = self.unended.take() {
            self.totals.decode_times.emitting += now.saturating_duration_since(end);
        }
    }

    /// No step can run; `is_break` unless none could so far.
    pub(crate) fn outage_began(&mut self, is_break: bool) {
        self.totals.recovering = true;
        self.totals.group_breaks += u64::from(is_break);
    }

    /// Steps run again; `gap` is how long a break kept them from it.
    pub(crate) fn outage_ended(&mut self, gap: Option<Duration>) {
        self.totals.recovering = false;
        self.totals.last_recovery = gap.or(self.totals.last_recovery);
    }

    /// A request whose output a break had interrupted goes on.
    pub(crate) fn resumed(&mut self) {
        self.totals.stream_resumes += 1;
    }

    /// A prompt is computed.
    pub(crate) fn prompt_computed(&mut self, request: &RequestState, now: Instant) {
        self.totals.prompt_tokens += request.prompt_len as u64;
        if let Some(first) = request.first_scheduled {
            self.totals.prefill_time.observe(seconds(first, now));
        }
    }

    /// A choice drew a token; `choice` is as it was before.
    pub(crate) fn token(&mut self, arrival: Instant, is_first: bool, choice: &Choice, now: Instant) {
        self.totals.generation_tokens += 1;
        self.tokens.add(now, 1);
        if is_first {
            self.totals.ttft.observe(seconds(arrival, now));
        }
        if let Some(last) = choice.last_token {
            self.totals.inter_token_latency.observe(seconds(last, now));
        }
    }

    /// All choices of a request ended.
    pub(crate) fn completed(&mut self, request: &RequestState, now: Instant) {
        let totals = &mut self.totals;
        let by_length = request.choices.iter().any(|choice| choice.finish == Some(FinishReason::Length));
        *(if by_length { &mut totals.completed_length } else { &mut totals.completed_stop }) += 1;
        self.requests.add(now, 1);

        totals.e2e_latency.observe(seconds(request.arrival, now));
        if let Some(first) = request.first_scheduled {
            totals.inference_time.observe(seconds(first, now));
        }
        if let Some(start) = request.prompt_computed {
            totals.decode_time.observe(seconds(start, now));
        }
        for choice in &request.choices {
            if let (Some(first), Some(last), 2..) = (choice.first_token, choice.last_token, choice.num_output)
            {
                totals.tpot.observe(seconds(first, last) / (choice.num_output - 1) as f64);
            }
        }
        let outputs = request.choices.iter().map(|choice| choice.num_output);
        totals.request_prompt_tokens.observe(request.prompt_len as f64);
        totals.request_generation_tokens.observe(outputs.clone().sum::<usize>() as f64);
        totals.request_max_generation_tokens.observe(outputs.max().unwrap_or(0) as f64);
        totals.request_params_n.observe(f64::from(request.params.n));
        totals.request_params_max_tokens.observe(request.params.max_tokens as f64);
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}

/// Events per second over the last ten seconds, in tenths.
struct RateWindow {
    start: Instant,
    /// (tenth since start, events), ascending.
    tenths: VecDeque<(u128, u64)>,
}

const WINDOW_TENTHS: u128 = 100;

impl RateWindow {
    fn new(start: Instant) -> Self {
        Self { start, tenths: VecDeque::new() }
    }

    fn add(&mut self, now: Instant, events: u64) {
        let tenth = self.tenth(now);
        match self.tenths.back_mut() {
            Some((last, count)) if *last >= tenth => *count += events,
            _ => self.tenths.push_back((tenth, events)),
        }
        self.forget_before(tenth);
    }

    fn rate(&mut self, now: Instant) -> f64 {
        self.forget_before(self.tenth(now));
        let events: u64 = self.tenths.iter().map(|(_, events)| events).sum();
        events as f64 * 10.0 / WINDOW_TENTHS as f64
    }

    fn forget_before(&mut self, tenth: u128) {
        while self.tenths.front().is_some_and(|(first, _)| first + WINDOW_TENTHS <= tenth) {
            self.tenths.pop_front();
        }
    }

    fn tenth(&self, now: Instant) -> u128 {
        now.saturating_duration_since(self.start).as_millis() / 100
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_cover_ten_seconds_and_no_more() {
        let start = Instant::now();
        let mut window = RateWindow::new(start);
        let at = |ms| start + Duration::from_millis(ms);
        window.add(at(0), 30);
        window.add(at(5_000), 20);
        assert_eq!(window.rate(at(5_000)), 5.0);
        assert_eq!(window.rate(at(9_999)), 5.0);
        assert_eq!(window.rate(at(10_000)), 2.0);
        assert_eq!(window.rate(at(15_000)), 0.0);
        assert!(window.tenths.is_empty());
    }
}
