//! The engine on its own thread: ends of all kinds, and nobody left waiting.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::{EngineHandle, EngineState, spawn_with};
use crate::config::EngineConfig;
use crate::environment::Environment;
use crate::error::{FailureKind, SubmitError};
use crate::stream::{Event, RequestStream};
use crate::testing::{FakeExecutor, Faults, Moment, config, request};

const GENEROUS: Duration = Duration::from_secs(20);

fn start(config: EngineConfig) -> (EngineHandle, Arc<Faults>) {
    let (executor, faults) = FakeExecutor::new(&config);
    (spawn_with(executor, config, Environment::system()), faults)
}

fn read_to_end(mut stream: RequestStream) -> Vec<Event> {
    std::iter::from_fn(|| stream.blocking_next()).flatten().collect()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + GENEROUS;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn failure_kind(events: &[Event]) -> Option<FailureKind> {
    match events.last() {
        Some(Event::Failed(failure)) => Some(failure.kind),
        _ => None,
    }
}

#[test]
fn handles_and_streams_go_anywhere() {
    fn goes_anywhere<T: Send + Sync + 'static>() {}
    goes_anywhere::<EngineHandle>();
    goes_anywhere::<RequestStream>();
}

#[test]
fn requests_from_many_threads_are_served_and_counted_before_their_end_is_read() {
    let (handle, _) = start(config());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let handle = &handle;
            scope.spawn(move || {
                for i in 0..20 {
                    let events = read_to_end(handle.submit(request(thread * 20 + i, 10, 5)).unwrap());
                    assert_eq!(events.len(), 7);
                    let snapshot = handle.snapshot();
                    assert!(snapshot.is_balanced());
                    assert!(snapshot.completed() > u64::from(i));
                }
            });
        }
        // Every snapshot balances, whoever looks and whenever.
        for _ in 0..2000 {
            assert!(handle.snapshot().is_balanced());
        }
    });
    let snapshot = handle.snapshot();
    assert_eq!((snapshot.admitted, snapshot.completed(), snapshot.in_flight), (160, 160, 0));
    handle.shutdown();
}

#[test]
fn an_async_reader_is_woken_and_makes_room() {
    let (handle, _) = start(EngineConfig { max_model_len: 1000, num_blocks: 300, ..config() });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut stream = handle.submit(request(1, 10, 900)).unwrap();
    // More than the stream holds: the request pauses, and goes on when it is read.
    wait_until("the stream fills up", || handle.snapshot().generation_tokens == 256);
    let events = runtime.block_on(async {
        let mut events = Vec::new();
        while let Some(step) = stream.next().await {
            events.extend(step);
        }
        events
    });
    assert_eq!(events.len(), 902);
    handle.shutdown();
}

#[test]
fn readers_whose_wakes_are_carried_read_everything() {
    let (handle, faults) = start(config());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let read = async |handle: EngineHandle, i| {
        let mut stream = handle.submit(request(i, 10, 20)).unwrap();
        let mut events = Vec::new();
        while let Some(step) = stream.next().await {
            events.extend(step);
        }
        events
    };
    runtime.block_on(async {
        let carrier = tokio::spawn(handle.carry_wakes());
        for round in 0..30 {
            let tasks: Vec<_> = (0..5).map(|i| tokio::spawn(read(handle.clone(), i))).collect();
            // Whether the carrier stays or goes, nobody sleeps on.
            if round == 20 {
                carrier.abort();
            }
            for task in tasks {
                assert_eq!(task.await.unwrap().len(), 22);
            }
        }
        // A failing engine's last words are carried, too.
        let carrier = tokio::spawn(handle.carry_wakes());
        let task = tokio::spawn(read(handle.clone(), 1));
        tokio::task::yield_now().await;
        faults.panic_at.store(faults.steps.load(Ordering::Relaxed) + 5, Ordering::Relaxed);
        assert!(matches!(task.await.unwrap().last(), Some(Event::Failed(_) | Event::Finished { .. })));
        carrier.abort();
    });
    handle.shutdown();
}

#[test]
fn a_panic_ends_every_stream() {
    let (handle, faults) = start(EngineConfig { max_num_seqs: 1, ..config() });
    faults.panic_at.store(5, Ordering::Relaxed);
    let streams: Vec<_> = (0..3).map(|i| handle.submit(request(i, 10, 50)).unwrap()).collect();
    for stream in streams {
        assert_eq!(failure_kind(&read_to_end(stream)), Some(FailureKind::Internal));
    }
    wait_until("the thread ends", || handle.state() == EngineState::Failed);
    assert_eq!(handle.submit(request(0, 10, 5)).err(), Some(SubmitError::Stopped));
    let snapshot = handle.snapshot();
    assert!(snapshot.is_balanced());
    assert_eq!((snapshot.errored[&FailureKind::Internal], snapshot.in_flight), (3, 0));
    handle.shutdown();
}

#[test]
fn whoever_sees_the_engine_failed_finds_every_stream_ended() {
    for round in 0..50 {
        let (handle, faults) = start(EngineConfig { max_num_seqs: 1, ..config() });
        faults.panic_at.store(1 + round % 3, Ordering::Relaxed);
        let streams: Vec<_> = (0..300).map_while(|i| handle.submit(request(i, 10, 50)).ok()).collect();
        let deadline = Instant::now() + GENEROUS;
        // Without a pause: a state that came too early is true soon after.
        while handle.state() != EngineState::Failed {
            assert!(Instant::now() < deadline, "the thread ends");
            std::hint::spin_loop();
        }
        for mut stream in streams {
            // What can be had without waiting, to the failure.
            let mut last = None;
            while let Poll::Ready(Some(events)) =
                pin!(stream.next()).poll(&mut Context::from_waker(Waker::noop()))
            {
                last = events.last().cloned();
            }
            assert!(matches!(last, Some(Event::Failed(_))), "round {round}: {last:?}");
        }
    }
}

#[test]
fn shutdown_ends_everything_whatever_its_order() {
    for round in 0..50 {
        let (handle, faults) = start(config());
        faults.step_ms.store(round % 3, Ordering::Relaxed);
        let submitting = handle.clone();
        let submitter = std::thread::spawn(move || {
            let mut accepted = 0;
            for i in 0..200 {
                match submitting.submit(request(i, 10, 5)) {
                    Ok(stream) => {
                        accepted += 1;
                        let events = read_to_end(stream);
                        assert!(matches!(events.last(), Some(Event::Failed(_) | Event::Finished { .. })));
                    }
                    Err(error) => {
                        assert_eq!(error, SubmitError::Stopped);
                        break;
                    }
                }
            }
            accepted
        });
        std::thread::sleep(Duration::from_micros(300 * round));
        handle.shutdown();
        let accepted: u64 = submitter.join().unwrap();
        assert_eq!(handle.state(), EngineState::Stopped);
        let snapshot = handle.snapshot();
        assert!(snapshot.is_balanced());
        assert_eq!((snapshot.admitted, snapshot.in_flight), (accepted, 0));
    }
}

#[test]
fn a_fatal_executor_stops_the_engine() {
    let (handle, faults) = start(config());
    faults.fail_every.store(2, Ordering::Relaxed);
    faults.fail_fatally.store(true, Ordering::Relaxed);
    let stream = handle.submit(request(1, 10, 20)).unwrap();
    assert_eq!(failure_kind(&read_to_end(stream)), Some(FailureKind::Unavailable));
    wait_until("the thread ends", || handle.state() == EngineState::Stopped);
}

#[test]
fn a_drain_refuses_the_new_and_finishes_the_old() {
    let (handle, faults) = start(config());
    faults.step_ms.store(2, Ordering::Relaxed);
    let stream = handle.submit(request(1, 10, 20)).unwrap();
    handle.begin_drain();
    assert_eq!(handle.submit(request(2, 10, 20)).err(), Some(SubmitError::Draining));
    let events = read_to_end(stream);
    assert!(matches!(events.last(), Some(Event::Finished { .. })));
    handle.shutdown();
    assert_eq!(handle.state(), EngineState::Stopped);
    assert_eq!(handle.submit(request(3, 10, 20)).err(), Some(SubmitError::Draining), "not a failure");
}

#[test]
fn the_idle_thread_ticks_and_a_busy_one_shows_its_age() {
    let (handle, faults) = start(config());
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(30));
        assert!(handle.last_tick_age() < Duration::from_secs(5));
    }
    faults.step_ms.store(300, Ordering::Relaxed);
    let stream = handle.submit(request(1, 4, 1)).unwrap();
    wait_until("a long step is noticed", || handle.last_tick_age() > Duration::from_millis(200));
    read_to_end(stream);
    handle.shutdown();
}

#[test]
fn a_thread_that_waits_for_its_group_ticks_without_spinning() {
    let (handle, faults) = start(config());
    faults.step_ms.store(5, Ordering::Relaxed);
    let stream = handle.submit(request(1, 10, 200)).unwrap();
    wait_until("output comes", || handle.snapshot().generation_tokens > 3);
    faults.group.break_group(Moment::AfterWrites, u64::MAX);
    wait_until("the break is noticed", || handle.snapshot().recovering && !handle.is_accepting());
    let polls = || faults.group.polls.load(Ordering::Relaxed);
    let (start, first) = (Instant::now(), polls());
    wait_until("polls go on", || {
        assert!(handle.last_tick_age() < Duration::from_secs(5));
        polls() > first + 6
    });
    // One poll may have been under way, and a wait may end a little early.
    let most = start.elapsed().as_millis() as u64 / 45 + 2;
    assert!(polls() - first <= most, "{} polls where {most} are enough", polls() - first);
    assert_eq!(handle.submit(request(2, 10, 5)).err(), Some(SubmitError::NotReady));
    faults.step_ms.store(0, Ordering::Relaxed);
    faults.group.heal();
    let events = read_to_end(stream);
    assert_eq!(events.len(), 202, "{:?}", events.last());
    assert!(handle.is_accepting());
    assert_eq!(handle.snapshot().stream_resumes, 1);
    handle.begin_drain();
    assert!(!handle.is_accepting());

    // The end comes through while the group is away.
    let (handle, faults) = start_away();
    let waited = handle.state();
    handle.shutdown();
    assert_eq!((waited, handle.state()), (EngineState::Running, EngineState::Stopped));
    assert!(faults.aborts.load(Ordering::Relaxed) > 0);
}

/// An engine whose group is not whole from the start on.
fn start_away() -> (EngineHandle, Arc<Faults>) {
    let (executor, faults) = FakeExecutor::new(&config());
    faults.group.break_group(Moment::BetweenSteps, u64::MAX);
    let handle = spawn_with(executor, config(), Environment::system());
    wait_until("the engine knows", || !handle.is_accepting());
    (handle, faults)
}

#[test]
fn the_thread_ends_when_nobody_is_left() {
    let (handle, faults) = start(config());
    faults.step_ms.store(1, Ordering::Relaxed);
    let stream = handle.submit(request(1, 10, 100)).unwrap();
    let thread = super::lock(&handle.thread).take().unwrap();
    drop(handle);
    drop(stream);
    let deadline = Instant::now() + GENEROUS;
    while !thread.is_finished() {
        assert!(Instant::now() < deadline, "the thread outlives everyone");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn clients_that_leave_at_random_disturb_nobody() {
    let (handle, faults) = start(EngineConfig { num_blocks: 80, ..config() });
    faults.step_ms.store(1, Ordering::Relaxed);
    std::thread::scope(|scope| {
        for i in 0..32 {
            let handle = &handle;
            scope.spawn(move || {
                let mut stream = handle.submit(request(i, 10, 40)).unwrap();
                if i % 3 == 0 {
                    std::thread::sleep(Duration::from_millis(u64::from(i)));
                    stream.blocking_next();
                    return;
                }
                let events = read_to_end(stream);
                assert_eq!(events.len(), 42, "{:?}", events.last());
            });
        }
    });
    wait_until("all blocks come back", || {
        let snapshot = handle.snapshot();
        snapshot.in_flight == 0 && snapshot.used_blocks == 0
    });
    let snapshot = handle.snapshot();
    assert!(snapshot.is_balanced());
    assert_eq!((snapshot.completed(), snapshot.cancelled), (21, 11));
    handle.shutdown();
}
