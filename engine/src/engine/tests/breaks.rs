//! The executor's group breaks, and comes back or does not.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Bench, PLAIN, with_n};
use crate::config::EngineConfig;
use crate::engine::StepStatus;
use crate::error::{FailureKind, RequestFailure, SubmitError};
use crate::request::Request;
use crate::stream::FinishReason;
use crate::testing::{Client, Moment, Outcome, config, request};

const MOMENTS: [Moment; 3] = [Moment::BetweenSteps, Moment::BeforeWrites, Moment::AfterWrites];
/// More polls than any test makes.
const FOREVER: u64 = u64::MAX;

impl Bench {
    fn break_group(&self, moment: Moment, polls: u64) {
        self.faults.group.break_group(moment, polls);
    }

    /// Breaks the group between steps, for good or until `heal`.
    fn lose_group(&mut self) {
        self.break_group(Moment::BetweenSteps, FOREVER);
        assert_eq!(self.step(), StepStatus::Idle);
        assert!(self.handle.snapshot().recovering);
    }

    fn heal(&self) {
        self.faults.group.heal();
    }

    fn cached(client: &Client) -> usize {
        client.started.as_ref().unwrap().0
    }
}

#[test]
fn a_break_at_any_moment_of_any_step_repeats_and_loses_nothing() {
    // Chunks of a scored prompt, a prompt that is forked, decodes of forked choices, penalties.
    let mut resumes = 0;
    for step in 0..16 {
        for moment in MOMENTS {
            for polls in [0, 3] {
                let small_chunks = EngineConfig { max_num_batched_tokens: 8, ..config() };
                let mut bench = Bench::new(EngineConfig { poison_freed_blocks: false, ..small_chunks });
                let mut scored = bench.submit(Request { prompt_logprobs: Some(2), ..request(1, 21, 4) });
                let mut forked = with_n(3, request(2, 10, 9));
                forked.params.frequency_penalty = 0.5;
                let mut forked = bench.submit(forked);
                let mut only_scored = bench.submit(Request { prompt_logprobs: Some(0), ..request(3, 9, 0) });
                bench.step();
                bench.steps(step);
                bench.break_group(moment, polls);
                bench.finish(&mut [&mut scored, &mut forked, &mut only_scored]);
                // The break may have come when all was done.
                bench.steps(5);
                for client in [&scored, &forked, &only_scored] {
                    assert_eq!(client.outcome, Outcome::Completed);
                    client.check(&PLAIN);
                }
                let snapshot = bench.handle.snapshot();
                assert_eq!((snapshot.prompt_tokens, snapshot.generation_tokens), (40, 31), "nothing twice");
                assert_eq!(snapshot.stream_resumes, bench.faults.group.resumes.load(Ordering::Relaxed));
                assert_eq!(snapshot.group_breaks, bench.faults.group.breaks.load(Ordering::Relaxed));
                assert_eq!(snapshot.preemptions, 0);
                assert!(!snapshot.recovering && bench.all_blocks_are_back());
                resumes += snapshot.stream_resumes;
            }
        }
    }
    assert!(resumes > 50, "{resumes} resumes");
}

#[test]
fn scores_that_were_taken_before_a_break_are_not_asked_for_again() {
    let mut bench = Bench::new(EngineConfig { max_num_batched_tokens: 8, ..config() });
    let mut client = bench.submit(Request { prompt_logprobs: Some(1), ..request(1, 30, 2) });
    bench.steps(2);
    let scores = |bench: &Bench| bench.engine.requests.values().next().unwrap().prompt_logprobs.clone();
    assert_eq!(scores(&bench).unwrap().len(), 17);
    bench.break_group(Moment::AfterWrites, 2);
    bench.steps(3);
    assert_eq!(scores(&bench).unwrap().len(), 17, "neither lost nor added to");
    // Two chunks are computed a second time without a row.
    bench.steps(2);
    assert_eq!(scores(&bench).unwrap().len(), 17);
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
    assert_eq!(bench.faults.scored_rows.load(Ordering::Relaxed), 29, "each once");
}

#[test]
fn a_prefix_of_the_old_memory_is_no_hit_in_the_new() {
    for poison_freed_blocks in [false, true] {
        let mut bench = Bench::new(EngineConfig { poison_freed_blocks, ..config() });
        let mut before = bench.submit(request(1, 16, 9));
        bench.finish(&mut [&mut before]);
        assert_eq!(bench.handle.snapshot().cached_blocks, 6);
        bench.break_group(Moment::BetweenSteps, 2);
        bench.steps(3);
        let snapshot = bench.handle.snapshot();
        assert_eq!((snapshot.cached_blocks, snapshot.free_blocks), (0, snapshot.num_blocks));

        let mut after = bench.submit(request(1, 16, 9));
        bench.finish(&mut [&mut after]);
        let mut again = bench.submit(request(1, 16, 9));
        bench.finish(&mut [&mut again]);
        let clients = [&before, &after, &again];
        assert_eq!(clients.map(Bench::cached), [0, 0, 12]);
        clients.into_iter().for_each(|client| client.check(&PLAIN));
        assert_eq!(bench.handle.snapshot().stream_resumes, 0, "nothing was interrupted");
    }
}

#[test]
fn another_epoch_without_a_failed_step_is_a_break_too() {
    let mut bench = Bench::new(EngineConfig { poison_freed_blocks: false, ..config() });
    let mut client = bench.submit(with_n(2, request(1, 18, 12)));
    bench.steps(4);
    bench.break_group(Moment::BetweenSteps, 0);
    assert_eq!(bench.step(), StepStatus::Worked, "the group is whole again at once");
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.group_breaks, snapshot.stream_resumes), (1, 1), "once for both choices");
}

#[test]
fn what_the_cache_gave_before_a_break_is_what_the_client_hears() {
    let mut bench = Bench::new(config());
    let mut first = bench.submit(request(1, 16, 9));
    bench.finish(&mut [&mut first]);
    let mut second = bench.submit(request(1, 16, 9));
    bench.break_group(Moment::AfterWrites, 1);
    bench.finish(&mut [&mut second]);
    assert_eq!(Bench::cached(&second), 12);
    second.check(&PLAIN);
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.prefix_cache_query_tokens, snapshot.prefix_cache_hit_tokens), (32, 12));
    assert_eq!((snapshot.queue_time.count(), snapshot.stream_resumes), (2, 0));
}

#[test]
fn while_the_group_is_away_new_requests_are_refused() {
    let mut bench = Bench::new(config());
    let mut client = bench.submit(request(1, 10, 5));
    bench.step();
    assert!(bench.handle.is_accepting());
    bench.break_group(Moment::BeforeWrites, 2);
    assert_eq!(bench.step(), StepStatus::Worked);
    for _ in 0..2 {
        // From the step that was lost on.
        assert!(!bench.handle.is_accepting());
        assert_eq!(bench.refusal(request(2, 10, 5)), SubmitError::NotReady);
        assert_eq!(bench.step(), StepStatus::Idle);
    }
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.admitted, snapshot.waiting, snapshot.used_blocks), (1, 1, 0));
    assert!(snapshot.recovering);
    bench.step();
    assert!(bench.handle.is_accepting());
    let mut other = bench.submit(request(2, 10, 5));
    bench.finish(&mut [&mut client, &mut other]);
    [&client, &other].into_iter().for_each(|client| client.check(&PLAIN));
}

#[test]
fn readers_are_served_and_may_leave_while_the_group_is_away() {
    let mut bench = Bench::with_stream_capacity(config(), 2);
    let mut leaving = bench.submit(with_n(2, request(1, 10, 50)));
    let mut stopping = bench.submit(request(2, 10, 50));
    let mut staying = bench.submit(request(3, 10, 50));
    bench.steps(3);
    // Its stream is full; the end waits for room.
    stopping.finish_choice(0);
    bench.lose_group();
    assert_eq!(bench.handle.snapshot().completed_stop, 1);
    stopping.read();
    assert!(stopping.is_open());
    leaving.leave();
    assert_eq!(bench.step(), StepStatus::Idle);
    stopping.read();
    assert_eq!(stopping.choices[0].finish, Some(FinishReason::Stop(None)));
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.cancelled, snapshot.in_flight), (1, 1));
    assert_eq!(bench.engine.requests.len(), 1, "nothing of the one who left is kept");
    bench.heal();
    bench.finish(&mut [&mut staying]);
    staying.check(&PLAIN);
    assert_eq!(bench.handle.snapshot().stream_resumes, 1);
}

#[test]
fn who_waits_too_long_ends_with_a_retryable_failure_and_the_engine_waits_on() {
    let timeout = Duration::from_secs(5);
    let mut bench = Bench::new(EngineConfig { recovery_timeout: timeout, max_num_seqs: 1, ..config() });
    let mut running = bench.submit(request(1, 10, 20));
    let mut queued = bench.submit(request(2, 10, 20));
    bench.steps(3);
    bench.lose_group();
    bench.clock.advance(Duration::from_secs(2));
    // One that passed the check before the group was known to be gone.
    bench.engine.shared().set_admits(true);
    let mut late = bench.submit(request(3, 10, 20));
    bench.step();
    bench.clock.advance(Duration::from_millis(2999));
    bench.step();
    let mut all = [&mut running, &mut queued, &mut late];
    all.iter_mut().for_each(|client| client.read());
    assert!(all.iter().all(|client| client.is_open()));

    bench.clock.advance(Duration::from_millis(1));
    bench.step();
    for client in [&mut running, &mut queued] {
        client.read();
        let Outcome::Failed(RequestFailure { kind: FailureKind::Unavailable, message }) = &client.outcome
        else {
            panic!("{:?}", client.outcome);
        };
        assert!(message.contains("within 5 s"), "{message}");
        client.check(&PLAIN);
    }
    assert_eq!(running.num_tokens(), 3, "what was sent before stays sent");
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.errored[&FailureKind::Unavailable], snapshot.in_flight), (2, 1));

    // An outage that is over does not count for the next.
    bench.heal();
    bench.steps(3);
    assert_eq!(bench.handle.snapshot().last_recovery, Some(timeout));
    bench.clock.advance(timeout);
    bench.lose_group();
    bench.engine.shared().set_admits(true);
    let mut later = bench.submit(request(4, 10, 20));
    bench.step();
    bench.heal();
    bench.steps(2);
    late.read();
    assert_eq!((late.is_open(), late.num_tokens()), (true, 5));
    bench.lose_group();
    bench.engine.shared().set_admits(true);
    let mut latest = bench.submit(request(5, 10, 20));
    bench.step();
    bench.clock.advance(timeout);
    bench.step();
    for client in [&mut late, &mut later, &mut latest] {
        client.read();
        assert!(matches!(
            &client.outcome,
            Outcome::Failed(RequestFailure { kind: FailureKind::Unavailable, .. })
        ));
        client.check(&PLAIN);
    }
    let snapshot = bench.handle.snapshot();
    assert_eq!(
        (snapshot.errored[&FailureKind::Unavailable], snapshot.in_flight, snapshot.stream_resumes),
        (5, 0, 1)
    );
}

#[test]
fn a_group_that_breaks_again_before_a_step_is_one_wait() {
    let timeout = Duration::from_secs(5);
    let mut bench = Bench::new(EngineConfig { recovery_timeout: timeout, ..config() });
    let mut client = bench.submit(request(1, 10, 20));
    bench.steps(3);
    for _ in 0..2 {
        bench.break_group(Moment::BeforeWrites, 1);
        bench.step();
        bench.clock.advance(Duration::from_secs(2));
        assert_eq!(bench.step(), StepStatus::Idle);
    }
    bench.step();
    client.read();
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.group_breaks, snapshot.stream_resumes, client.num_tokens()), (2, 1, 4));
    assert_eq!(snapshot.last_recovery, Some(Duration::from_secs(4)));

    for _ in 0..2 {
        bench.break_group(Moment::BeforeWrites, 1);
        bench.step();
        bench.clock.advance(Duration::from_secs(3));
        bench.step();
    }
    client.read();
    assert!(matches!(
        &client.outcome,
        Outcome::Failed(RequestFailure { kind: FailureKind::Unavailable, .. })
    ));
    client.check(&PLAIN);
    assert_eq!(bench.handle.snapshot().stream_resumes, 1);
}

/// It gets as far as its first chunk each time; another request goes on beside it.
#[test]
fn a_request_that_breaks_every_group_is_not_tried_without_end() {
    let timeout = Duration::from_secs(5);
    let mut bench = Bench::new(EngineConfig {
        recovery_timeout: timeout,
        max_num_batched_tokens: 8,
        poison_freed_blocks: false,
        ..config()
    });
    let mut running = bench.submit(request(1, 4, 40));
    bench.steps(3);
    let mut bad = bench.submit(request(2, 21, 5));
    let mut breaks = 0;
    while bad.is_open() {
        // The first chunk, then the one that breaks.
        bench.steps(2);
        bench.break_group(Moment::BeforeWrites, 1);
        bench.step();
        breaks += 1;
        bench.clock.advance(Duration::from_secs(2));
        assert_eq!(bench.step(), StepStatus::Idle);
        bad.read();
        assert!(breaks <= 4, "it is tried again and again");
    }
    assert_eq!(breaks, 3, "5 s after the first break");
    assert!(matches!(&bad.outcome, Outcome::Failed(RequestFailure { kind: FailureKind::Unavailable, .. })));
    running.read();
    assert!(running.is_open(), "it got further between the breaks");
    bench.finish(&mut [&mut running]);
    running.check(&PLAIN);
}

#[test]
fn who_was_in_a_step_that_broke_is_not_charged_for_a_later_break_without_it() {
    let timeout = Duration::from_secs(5);
    let mut bench = Bench::with_stream_capacity(EngineConfig { recovery_timeout: timeout, ..config() }, 2);
    let mut client = bench.submit(request(1, 10, 20));
    // It pauses, for nobody reads; then breaks in a step that goes no further.
    bench.step();
    bench.break_group(Moment::BeforeWrites, 1);
    bench.steps(3);
    bench.steps(10);
    bench.clock.advance(2 * timeout);
    bench.lose_group();
    client.read();
    assert!(client.is_open(), "{:?}", client.outcome);
    bench.heal();
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
}

#[test]
fn a_step_that_breaks_after_a_wait_does_not_begin_it_anew() {
    let timeout = Duration::from_secs(5);
    let mut bench = Bench::new(EngineConfig { recovery_timeout: timeout, ..config() });
    let mut client = bench.submit(request(1, 10, 20));
    bench.steps(3);
    bench.lose_group();
    bench.clock.advance(Duration::from_secs(3));
    bench.heal();
    // Whole again, and the first step breaks it.
    bench.break_group(Moment::BeforeWrites, FOREVER);
    bench.step();
    bench.clock.advance(Duration::from_secs(2));
    bench.step();
    client.read();
    assert!(
        matches!(&client.outcome, Outcome::Failed(RequestFailure { kind: FailureKind::Unavailable, .. })),
        "{:?}",
        client.outcome
    );
}

#[test]
fn before_a_rank_leaves_what_was_taken_ends_and_nothing_new_is_taken() {
    let mut bench = Bench::new(EngineConfig { max_num_seqs: 2, ..config() });
    let mut clients: Vec<Client> = (0..3).map(|i| bench.submit(request(i, 10, 4 + i as usize))).collect();
    bench.step();
    bench.faults.group.leaving.store(true, Ordering::Relaxed);
    bench.step();
    assert_eq!(bench.refusal(request(6, 10, 5)), SubmitError::NotReady);
    assert!(!bench.handle.is_accepting() && !bench.handle.snapshot().recovering);
    let told = |bench: &Bench| bench.faults.group.in_flight.load(Ordering::Relaxed);
    assert_eq!((told(&bench), bench.handle.snapshot().waiting), (3, 1));
    bench.finish(&mut clients.iter_mut().collect::<Vec<_>>());
    assert_eq!(bench.step(), StepStatus::Idle);
    assert_eq!(told(&bench), 0, "now the rank can go");
    clients.iter().for_each(|client| client.check(&PLAIN));
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.completed(), snapshot.waiting, snapshot.group_breaks), (3, 0, 0));
    // A rank that changes its mind is no break.
    bench.faults.group.leaving.store(false, Ordering::Relaxed);
    bench.step();
    assert!(bench.handle.is_accepting());
    assert_eq!(bench.handle.snapshot().group_breaks, 0);
}

#[test]
fn a_refused_request_is_not_counted_as_in_flight() {
    let mut bench = Bench::new(config());
    bench.faults.group.leaving.store(true, Ordering::Relaxed);
    bench.step();
    assert_eq!(bench.refusal(request(1, 10, 5)), SubmitError::NotReady);
    bench.step();
    assert_eq!(bench.faults.group.in_flight.load(Ordering::Relaxed), 0);
}

#[test]
fn a_drain_without_a_group_keeps_only_streams_that_have_begun() {
    let mut bench = Bench::new(EngineConfig { max_num_seqs: 1, ..config() });
    let mut running = bench.submit(request(1, 10, 20));
    let mut queued = bench.submit(request(2, 10, 20));
    bench.steps(3);
    bench.lose_group();
    bench.step();
    [&mut running, &mut queued].into_iter().for_each(|client| client.read());
    assert!(running.is_open() && queued.is_open());
    bench.handle.begin_drain();
    bench.step();
    [&mut running, &mut queued].into_iter().for_each(|client| client.read());
    assert!(running.is_open());
    let Outcome::Failed(RequestFailure { kind: FailureKind::Unavailable, message }) = &queued.outcome else {
        panic!("{:?}", queued.outcome);
    };
    assert!(message.contains("shutting down"), "{message}");
    bench.heal();
    bench.finish(&mut [&mut running]);
    running.check(&PLAIN);
}

#[test]
fn an_executor_that_is_beyond_help_stops_the_engine() {
    for is_away in [false, true] {
        let mut bench = Bench::new(config());
        let mut client = bench.submit(request(1, 10, 20));
        bench.steps(3);
        if is_away {
            bench.lose_group();
        }
        bench.faults.group.failed.store(true, Ordering::Relaxed);
        assert_eq!(bench.step(), StepStatus::Stopped);
        client.read();
        assert_eq!(client.outcome, Outcome::Failed(RequestFailure::stopped()));
        client.check(&PLAIN);
        assert!(bench.all_blocks_are_back());
    }
}

#[test]
fn the_time_to_recover_is_that_of_the_clock() {
    let mut bench = Bench::new(config());
    // Not whole from the start on: no break.
    bench.lose_group();
    bench.clock.advance(Duration::from_secs(60));
    bench.heal();
    bench.step();
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.group_breaks, snapshot.last_recovery, snapshot.recovering), (0, None, false));

    let mut client = bench.submit(request(1, 10, 20));
    bench.steps(3);
    bench.lose_group();
    bench.clock.advance(Duration::from_secs(3));
    bench.heal();
    bench.step();
    assert_eq!(bench.handle.snapshot().last_recovery, Some(Duration::from_secs(3)));
    bench.finish(&mut [&mut client]);

    // With nothing to do it is over as soon as steps can run.
    bench.lose_group();
    bench.clock.advance(Duration::from_secs(7));
    bench.heal();
    bench.step();
    bench.clock.advance(Duration::from_secs(100));
    let mut client = bench.submit(request(1, 10, 20));
    bench.finish(&mut [&mut client]);
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.group_breaks, snapshot.last_recovery), (2, Some(Duration::from_secs(7))));
    assert!(!snapshot.recovering);
}

#[test]
fn a_full_queue_of_preempted_and_paused_requests_survives_breaks() {
    let tight =
        EngineConfig { num_blocks: 20, prefix_caching: false, poison_freed_blocks: false, ..config() };
    let mut bench = Bench::with_stream_capacity(tight, 3);
    let mut clients: Vec<Client> = (0..8).map(|i| bench.submit(request(i, 10, 40))).collect();
    for round in 0..10 {
        bench.break_group(MOMENTS[round % 3], round as u64 % 4);
        for _ in 0..9 {
            bench.step();
            // Half of them read one message at a time.
            clients.iter_mut().step_by(2).for_each(Client::read);
            clients[round % 8].read_one();
        }
    }
    bench.finish(&mut clients.iter_mut().collect::<Vec<_>>());
    clients.iter().for_each(|client| client.check(&PLAIN));
    let snapshot = bench.handle.snapshot();
    assert!(clients.iter().all(|client| client.outcome == Outcome::Completed));
    assert!(snapshot.preemptions > 3 && snapshot.group_breaks >= 8 && snapshot.stream_resumes > 8);
}
