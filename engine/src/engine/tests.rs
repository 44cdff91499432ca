//! Single properties of the step loop, each in a run made for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Bounds, Engine, StepStatus};
use crate::config::EngineConfig;
use crate::environment::Clock;
use crate::error::{FailureKind, InvalidParam, RequestFailure, SubmitError};
use crate::handle::EngineHandle;
use crate::request::Request;
use crate::stream::FinishReason;
use crate::testing::{
    Client, EOS, FakeExecutor, Faults, ManualClock, Oracle, Outcome, config, environment, request,
};

struct Bench {
    engine: Engine,
    handle: EngineHandle,
    faults: Arc<Faults>,
    clock: Arc<ManualClock>,
}

const PLAIN: Oracle = Oracle { bad_token: None };

impl Bench {
    fn new(config: EngineConfig) -> Self {
        Self::with_stream_capacity(config, 64)
    }

    fn with_stream_capacity(config: EngineConfig, capacity: usize) -> Self {
        let (environment, clock) = environment();
        let (executor, faults) = FakeExecutor::new(&config);
        let bounds = Bounds { stream_capacity: capacity, ..Bounds::of(&config) };
        let (engine, handle) = Engine::with_bounds(executor, config, environment, bounds);
        Self { engine, handle, faults, clock }
    }

    fn submit(&self, request: Request) -> Client {
        Client::submit(&self.handle, request)
    }

    fn step(&mut self) -> StepStatus {
        let status = self.engine.step();
        self.engine.check_integrity().unwrap();
        assert!(self.handle.snapshot().is_balanced());
        status
    }

    fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
        }
    }

    /// Steps until these clients have read their ends.
    fn finish(&mut self, clients: &mut [&mut Client]) {
        for _ in 0..10_000 {
            if clients.iter().all(|client| !client.is_open()) {
                return;
            }
            self.step();
            clients.iter_mut().for_each(|client| client.read());
        }
        panic!("somebody starves");
    }

    fn refusal(&self, request: Request) -> SubmitError {
        self.handle.submit(request).map(|_| ()).unwrap_err()
    }

    fn all_blocks_are_back(&self) -> bool {
        let snapshot = self.handle.snapshot();
        snapshot.used_blocks == 0 && snapshot.free_blocks + snapshot.cached_blocks == snapshot.num_blocks
    }
}

fn with_n(n: u32, mut request: Request) -> Request {
    request.params.n = n;
    request.params.temperature = 1.0;
    request
}

#[test]
fn what_can_never_run_is_refused_by_name() {
    let bench = Bench::new(EngineConfig { num_blocks: 10, max_model_len: 64, ..config() });
    let param = |request: Request| match bench.refusal(request) {
        SubmitError::Invalid(InvalidParam { param, .. }) => param,
        other => panic!("{other}"),
    };
    assert_eq!(param(request(0, 0, 4)), "prompt");
    assert_eq!(param(request(0, 65, 0)), "prompt");
    assert_eq!(param(request(0, 60, 5)), "max_tokens");
    assert_eq!(param(request(0, 60, usize::MAX)), "max_tokens");
    assert_eq!(param(request(0, 41, 0)), "prompt", "more than the pool holds");
    assert_eq!(param(request(0, 40, 2)), "max_tokens");
    assert_eq!(param(with_n(9, request(0, 4, 4))), "n");
    assert_eq!(param(Request { prompt: vec![40], ..request(0, 4, 4) }), "prompt");
    let mut endless = request(0, 4, 4);
    endless.params.allowed_token_ids = Some(vec![EOS]);
    endless.params.min_tokens = 1;
    endless.params.ignore_eos = false;
    assert_eq!(param(endless), "allowed_token_ids");
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.admitted, snapshot.waiting), (0, 0), "a refusal is not counted");
    // The last token's KV is never stored: this fills the pool exactly.
    let mut bench = bench;
    let mut client = bench.submit(request(0, 40, 1));
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
}

#[test]
fn a_prompt_without_output_is_computed_and_scored() {
    let mut bench = Bench::new(EngineConfig { max_num_batched_tokens: 8, ..config() });
    let mut client = bench.submit(Request { prompt_logprobs: Some(2), ..with_n(2, request(1, 30, 0)) });
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
    assert_eq!(client.outcome, Outcome::Completed);
    assert!(client.choices.iter().all(|choice| choice.finish == Some(FinishReason::Length)));
    assert_eq!(client.started.unwrap().1.unwrap().len(), 30);
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.prompt_tokens, snapshot.generation_tokens, snapshot.completed_length), (30, 0, 1));
    assert!(bench.all_blocks_are_back());
}

#[test]
fn a_scored_prompt_is_cut_to_the_rows_of_a_step() {
    let long = EngineConfig { max_model_len: 2000, num_blocks: 600, max_num_batched_tokens: 700, ..config() };
    let mut bench = Bench::new(long);
    let mut client = bench.submit(Request { prompt_logprobs: Some(0), ..request(1, 600, 1) });
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
    assert_eq!(bench.handle.snapshot().chunk_sizes.iter().copied().collect::<Vec<_>>(), [88, 256]);
}

#[test]
fn a_cached_prompt_waits_while_a_scored_one_takes_all_rows() {
    let wide = EngineConfig { max_model_len: 600, num_blocks: 400, max_num_batched_tokens: 512, ..config() };
    let mut bench = Bench::new(wide);
    let mut first = bench.submit(request(5, 97, 1));
    bench.finish(&mut [&mut first]);
    let mut scored = bench.submit(Request { prompt_logprobs: Some(1), ..request(1, 400, 0) });
    // All but its last token is cached, and that one needs a row. The step has tokens left, but no row.
    let mut cached = bench.submit(request(5, 97, 1));
    bench.step();
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.running, snapshot.waiting), (1, 1));
    bench.finish(&mut [&mut scored, &mut cached]);
    assert_eq!(cached.started.as_ref().unwrap().0, 96);
    [&first, &scored, &cached].into_iter().for_each(|client| client.check(&PLAIN));
}

#[test]
fn the_second_of_two_equal_prompts_is_a_cache_hit() {
    let mut bench = Bench::new(config());
    let mut first = bench.submit(request(1, 16, 9));
    bench.finish(&mut [&mut first]);
    let mut second = bench.submit(request(1, 16, 9));
    bench.finish(&mut [&mut second]);
    let cached = |client: &Client| client.started.as_ref().unwrap().0;
    assert_eq!((cached(&first), cached(&second)), (0, 12), "the last prompt token is always computed");
    // Output is cached too: 16 prompt and 8 output tokens are stored, six full blocks.
    let mut longer = request(1, 16, 4);
    longer.prompt.extend(&first.choices[0].tokens);
    let mut third = bench.submit(longer.clone());
    bench.finish(&mut [&mut third]);
    assert_eq!(cached(&third), 24);
    let mut salted = bench.submit(Request { cache_salt: Some("tenant".into()), ..longer.clone() });
    let mut scored = bench.submit(Request { prompt_logprobs: Some(1), ..longer });
    bench.finish(&mut [&mut salted, &mut scored]);
    assert_eq!((cached(&salted), cached(&scored)), (0, 0));
    for client in [&first, &second, &third, &salted, &scored] {
        client.check(&PLAIN);
    }
    let snapshot = bench.handle.snapshot();
    assert_eq!(
        (snapshot.prefix_cache_query_tokens, snapshot.prefix_cache_hit_tokens),
        (16 + 16 + 25 + 25, 36)
    );
    assert!(bench.all_blocks_are_back());
}

#[test]
fn choices_differ_and_share_their_prompt() {
    let mut bench = Bench::new(config());
    let mut client = bench.submit(with_n(4, request(1, 18, 12)));
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.prompt_tokens, snapshot.block_copies), (18, 3));
    assert_eq!(snapshot.iteration_tokens.sum, 18.0 + 4.0 * 11.0, "the prompt is computed once");
    assert!(client.choices.windows(2).all(|pair| pair[0].tokens != pair[1].tokens));
}

#[test]
fn preempted_requests_go_on_where_they_stopped() {
    let mut bench = Bench::new(EngineConfig { num_blocks: 20, prefix_caching: false, ..config() });
    let mut clients: Vec<Client> = (0..6).map(|i| bench.submit(request(i, 10, 40))).collect();
    bench.finish(&mut clients.iter_mut().collect::<Vec<_>>());
    clients.iter().for_each(|client| client.check(&PLAIN));
    assert!(bench.handle.snapshot().preemptions > 3);
    assert!(clients.iter().all(|client| client.outcome == Outcome::Completed));
}

#[test]
fn a_bad_row_fails_its_own_request_and_leaves_nothing_in_the_cache() {
    let mut bench = Bench::new(config());
    let mut good = bench.submit(request(2, 12, 20));
    let mut unlucky = with_n(3, request(1, 12, 20));
    // 0 is how the executor is told that no token is bad.
    unlucky.params.banned_token_ids = vec![0];
    let mut bad = bench.submit(unlucky);
    bench.step();
    good.read();
    bad.read();
    let last = bad.choices[2].tokens[0];
    assert!(!good.choices[0].tokens.contains(&last));
    bench.faults.bad_token.store(last.into(), Ordering::Relaxed);
    bench.step();
    bench.faults.bad_token.store(0, Ordering::Relaxed);
    bench.finish(&mut [&mut bad, &mut good]);
    assert!(matches!(&bad.outcome, Outcome::Failed(RequestFailure { kind: FailureKind::Internal, .. })));
    assert_eq!(good.outcome, Outcome::Completed);
    good.check(&PLAIN);
    assert_eq!(bench.handle.snapshot().errored[&FailureKind::Internal], 1);
    assert!(bench.all_blocks_are_back());
    let mut again = bench.submit(request(1, 12, 20));
    bench.finish(&mut [&mut again]);
    assert_eq!(again.started.unwrap().0, 0, "KV of a failed request is not reused");
}

#[test]
fn a_failed_step_fails_its_requests_and_the_engine_goes_on() {
    let mut bench = Bench::new(EngineConfig { max_num_seqs: 2, ..config() });
    bench.faults.fail_every.store(3, Ordering::Relaxed);
    let mut clients: Vec<Client> = (0..3).map(|i| bench.submit(request(i, 10, 5))).collect();
    bench.finish(&mut clients.iter_mut().collect::<Vec<_>>());
    for client in &clients[..2] {
        assert!(matches!(
            &client.outcome,
            Outcome::Failed(RequestFailure { kind: FailureKind::Unavailable, .. })
        ));
        assert_eq!(client.num_tokens(), 2, "what was sent before stays sent");
        client.check(&PLAIN);
    }
    assert_eq!(bench.faults.aborts.load(Ordering::Relaxed), 2);
    assert!(bench.all_blocks_are_back());
    assert_eq!(bench.handle.snapshot().cached_blocks, 0, "nothing of a failed step is reused");

    bench.faults.fail_fatally.store(true, Ordering::Relaxed);
    let mut queued = bench.submit(request(9, 10, 5));
    while bench.step() != StepStatus::Stopped {}
    queued.read();
    assert!(matches!(
        &queued.outcome,
        Outcome::Failed(RequestFailure { kind: FailureKind::Unavailable, .. })
    ));
    assert_eq!(bench.handle.snapshot().errored[&FailureKind::Unavailable], 4);
}

#[test]
fn a_long_prompt_and_a_stream_of_short_ones_both_advance() {
    let mut bench = Bench::new(EngineConfig { max_num_batched_tokens: 12, max_num_seqs: 4, ..config() });
    let mut short: Vec<Client> = (0..4).map(|i| bench.submit(request(i, 6, 3))).collect();
    let mut long = bench.submit(request(50, 200, 3));
    let mut steps = 0;
    while long.is_open() {
        bench.step();
        short.push(bench.submit(request(100 + steps, 6, 3)));
        short.iter_mut().for_each(Client::read);
        long.read();
        steps += 1;
        assert!(steps < 60, "the long prompt starves");
    }
    long.check(&PLAIN);
    // Those that came after the long one go on once it is through its prompt.
    bench.finish(&mut short.iter_mut().collect::<Vec<_>>());
    short.iter().for_each(|client| client.check(&PLAIN));
}

#[test]
fn the_queue_is_bounded_in_requests_and_bytes() {
    let mut bench = Bench::new(EngineConfig { max_queued_requests: 3, max_num_seqs: 1, ..config() });
    let mut clients: Vec<Client> = (0..3).map(|i| bench.submit(request(i, 10, 2))).collect();
    assert_eq!(bench.refusal(request(4, 10, 2)), SubmitError::QueueFull);
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.admitted, snapshot.waiting, snapshot.in_flight), (3, 3, 3));
    bench.step();
    // One runs, two wait; a place is free.
    clients.push(bench.submit(request(4, 10, 2)));
    assert_eq!(bench.refusal(request(5, 10, 2)), SubmitError::QueueFull);
    clients.pop();
    bench.step();
    clients.push(bench.submit(request(6, 10, 2)));
    bench.finish(&mut clients.iter_mut().collect::<Vec<_>>());

    let bytes = request(0, 100, 2).held_bytes();
    let bench = Bench::new(EngineConfig { max_queued_bytes: 2 * bytes, ..config() });
    let _clients: Vec<Client> = (0..2).map(|_| bench.submit(request(0, 100, 2))).collect();
    assert_eq!(bench.refusal(request(0, 1, 2)), SubmitError::QueueFull);
}

#[test]
fn seeds_are_kept_or_drawn_once() {
    let bench = Bench::new(config());
    let mut seeded = request(1, 4, 4);
    seeded.params.seed = Some(17);
    assert_eq!(bench.submit(seeded).seed, 17);
    assert_eq!(bench.submit(request(1, 4, 4)).seed, 1000);
    assert_eq!(bench.submit(request(1, 4, 4)).seed, 1001);
}

#[test]
fn latencies_and_rates_are_those_of_the_clock() {
    let mut bench = Bench::new(EngineConfig { max_num_batched_tokens: 8, ..config() });
    let arrival = bench.clock.now();
    let mut client = bench.submit(Request { arrival, ..request(1, 16, 3) });
    bench.clock.advance(Duration::from_millis(500));
    while client.is_open() {
        bench.step();
        bench.clock.advance(Duration::from_millis(200));
        client.read();
    }
    let snapshot = bench.handle.snapshot();
    let near = |sum: f64, expected: f64| assert!((sum - expected).abs() < 1e-6, "{sum} for {expected}");
    near(snapshot.queue_time.sum, 0.5);
    near(snapshot.ttft.sum, 0.7);
    near(snapshot.prefill_time.sum, 0.2);
    near(snapshot.inter_token_latency.sum, 0.4);
    near(snapshot.tpot.sum, 0.2);
    near(snapshot.decode_time.sum, 0.4);
    near(snapshot.inference_time.sum, 0.6);
    near(snapshot.e2e_latency.sum, 1.1);
    near(snapshot.tokens_per_second, 0.3);
    near(snapshot.requests_per_second, 0.1);
    assert_eq!((snapshot.steps, snapshot.decode_step_latency.count(), snapshot.ttft.count()), (4, 2, 1));
    bench.clock.advance(Duration::from_secs(10));
    bench.step();
    assert_eq!(bench.handle.snapshot().tokens_per_second, 0.0);
}

mod beside;
mod breaks;
mod readers;
