//! Readers that are slow, leave, or end a choice themselves.

use super::{Bench, PLAIN, with_n};
use crate::config::EngineConfig;
use crate::engine::StepStatus;
use crate::error::SubmitError;
use crate::stream::FinishReason;
use crate::testing::{Client, config, request};

#[test]
fn a_client_that_leaves_frees_everything_within_two_steps() {
    // Queued, in the middle of its prompt, decoding, paused, preempted.
    let mut bench =
        Bench::with_stream_capacity(EngineConfig { max_num_seqs: 2, num_blocks: 100, ..config() }, 3);
    let mut prefilling = bench.submit(request(1, 100, 8));
    let mut queued = bench.submit(request(2, 100, 8));
    let mut unreceived = bench.submit(request(3, 10, 8));
    bench.step();
    unreceived.leave();
    bench.step();
    assert_eq!(bench.handle.snapshot().cancelled, 1);
    for client in [&mut queued, &mut prefilling] {
        assert!(client.started.is_none());
        client.leave();
    }
    bench.step();
    assert_eq!(bench.handle.snapshot().in_flight, 0);
    assert!(bench.all_blocks_are_back());

    let mut decoding = bench.submit(with_n(2, request(1, 10, 50)));
    bench.step();
    decoding.read();
    bench.step();
    decoding.read();
    assert_eq!(decoding.num_tokens(), 4);
    decoding.leave();
    bench.step();
    assert_eq!(bench.handle.snapshot().in_flight, 0);

    let mut paused = bench.submit(request(1, 10, 50));
    bench.steps(3);
    assert_eq!(bench.step(), StepStatus::Idle, "nobody reads");
    assert_eq!(bench.handle.snapshot().running, 1);
    paused.leave();
    bench.step();
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.cancelled, snapshot.admitted), (0, 5, 5));
    assert!(bench.all_blocks_are_back());
}

#[test]
fn a_slow_reader_holds_up_nobody_and_loses_nothing() {
    let mut bench = Bench::with_stream_capacity(config(), 4);
    let mut slow = bench.submit(request(1, 10, 60));
    let mut quick = bench.submit(request(2, 10, 60));
    bench.finish(&mut [&mut quick]);
    assert_eq!(bench.handle.snapshot().generation_tokens, 64, "four of the slow one's, all of the other's");
    bench.finish(&mut [&mut slow]);
    slow.check(&PLAIN);
    quick.check(&PLAIN);
}

#[test]
fn a_last_message_waits_for_its_reader() {
    let mut bench = Bench::with_stream_capacity(config(), 2);
    let mut client = bench.submit(request(1, 10, 9));
    bench.steps(4);
    client.finish_choice(0);
    bench.step();
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.completed_stop, snapshot.in_flight), (1, 0));
    bench.finish(&mut [&mut client]);
    assert_eq!(client.choices[0].finish, Some(FinishReason::Stop(None)));
    assert_eq!(client.num_tokens(), 2);
}

#[test]
fn a_stop_string_ends_its_choice_only() {
    let mut bench = Bench::new(config());
    let mut client = bench.submit(with_n(2, request(1, 10, 30)));
    bench.steps(5);
    client.read();
    client.finish_choice(1);
    client.finish_choice(1);
    client.finish_choice(7);
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
    assert_eq!(client.choices[1].finish, Some(FinishReason::Stop(None)));
    assert_eq!((client.choices[0].tokens.len(), client.choices[1].tokens.len()), (30, 5));
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.completed_stop, snapshot.completed_length), (0, 1));

    // Ending the last choice and going away is a completion, not a cancellation.
    let mut client = bench.submit(request(1, 10, 30));
    bench.step();
    client.read();
    client.finish_choice(0);
    client.leave();
    bench.step();
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.completed_stop, snapshot.cancelled), (1, 0));
}

#[test]
fn a_stop_string_that_finds_a_full_stream_gets_through_later() {
    let mut bench = Bench::with_stream_capacity(config(), 2);
    let mut client = bench.submit(with_n(2, request(0, 8, 40)));
    bench.steps(10);
    assert!(client.read_one());
    // Fills the room that the reader made.
    assert_eq!(bench.step(), StepStatus::Worked);
    client.finish_choice(0);
    assert_eq!(bench.step(), StepStatus::Idle);
    assert!(client.read_one());
    assert_eq!(bench.step(), StepStatus::Worked, "room is noticed in the step that hears of it");
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
    assert_eq!(client.choices[0].finish, Some(FinishReason::Stop(None)));
    assert_eq!(client.choices[1].tokens.len(), 40);
}

#[test]
fn a_stop_string_of_a_preempted_request_gets_through_while_nothing_of_it_runs() {
    // Room for one request at a time: the second pushes the first, whose reader is behind, out.
    let mut bench = Bench::with_stream_capacity(EngineConfig { max_num_seqs: 2, ..config() }, 2);
    let mut slow = bench.submit(with_n(2, request(0, 8, 40)));
    bench.steps(3);
    let mut other = bench.submit(with_n(2, request(1, 8, 40)));
    bench.step();
    assert_eq!(bench.handle.snapshot().preemptions, 2);
    slow.finish_choice(0);
    bench.step();
    slow.read();
    assert_eq!(slow.choices[0].finish, None, "there was no room");
    bench.step();
    slow.read();
    assert_eq!(slow.choices[0].finish, Some(FinishReason::Stop(None)));
    bench.finish(&mut [&mut slow, &mut other]);
    slow.check(&PLAIN);
    other.check(&PLAIN);
}

#[test]
fn a_stop_string_does_not_pause_the_other_choices() {
    let mut bench = Bench::new(config());
    let mut client = bench.submit(with_n(2, request(0, 8, 40)));
    bench.steps(3);
    client.read();
    client.finish_choice(0);
    assert_eq!(bench.step(), StepStatus::Worked);
    client.read();
    assert_eq!(client.choices[0].finish, Some(FinishReason::Stop(None)));
    assert_eq!(client.choices[1].tokens.len(), 4);
}

#[test]
fn requests_that_nobody_reads_are_bounded_too() {
    let one_runs_two_wait = EngineConfig { max_num_seqs: 1, max_queued_requests: 2, ..config() };
    let mut bench = Bench::with_stream_capacity(one_runs_two_wait, 2);
    let mut clients = Vec::new();
    for i in 0..3 {
        // Each pushes the one before out, which pauses: the queue is empty again.
        clients.push(bench.submit(request(i, 10, 20)));
        bench.steps(4);
    }
    let snapshot = bench.handle.snapshot();
    assert_eq!((snapshot.preemptions, snapshot.running, snapshot.waiting), (2, 1, 2));
    assert_eq!(bench.refusal(request(3, 10, 20)), SubmitError::QueueFull);
    // Who leaves, and who is served to the end, makes room for one.
    clients.remove(0);
    bench.step();
    clients.push(bench.submit(request(4, 10, 20)));
    assert_eq!(bench.refusal(request(5, 10, 20)), SubmitError::QueueFull);
    bench.finish(&mut clients.iter_mut().collect::<Vec<_>>());
    clients.iter().for_each(|client| client.check(&PLAIN));
    let _again: Vec<Client> = (0..2).map(|i| bench.submit(request(i, 10, 2))).collect();

    let bytes = request(0, 100, 2).held_bytes();
    let mut bench = Bench::new(EngineConfig { max_queued_bytes: bytes, ..config() });
    let mut running = bench.submit(request(0, 100, 2));
    bench.step();
    assert_eq!(bench.refusal(request(0, 1, 2)), SubmitError::QueueFull, "bytes are held to the end");
    bench.finish(&mut [&mut running]);
    bench.submit(request(0, 1, 2));
}
