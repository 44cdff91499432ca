//! A device that computes beside the engine: steps that are begun before the last one is over.

use std::sync::mpsc;

use super::*;

fn bench() -> Bench {
    let bench = Bench::new(config());
    bench.faults.computes_beside.store(true, Ordering::Relaxed);
    bench
}

fn overtaken(bench: &Bench) -> u64 {
    bench.faults.steps_overtaken.load(Ordering::Relaxed)
}

fn computed(bench: &Bench) -> u64 {
    bench.faults.steps.load(Ordering::Relaxed)
}

#[test]
fn every_step_of_decodes_is_overtaken_and_none_is_computed_for_nothing() {
    let mut bench = bench();
    let mut client = bench.submit(request(1, 8, 12));
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
    assert_eq!(computed(&bench), 12, "its length says which is the last");
    // Its prompt and the last of its decodes are waited for.
    assert_eq!(overtaken(&bench), 10);
    assert!(bench.all_blocks_are_back());
    assert_eq!(bench.step(), StepStatus::Idle);
}

#[test]
fn a_draw_that_depends_on_earlier_tokens_waits_for_them() {
    let mut penalised = request(1, 8, 12);
    penalised.params.presence_penalty = 0.5;
    let mut bench = bench();
    let mut clients = [bench.submit(penalised), bench.submit(request(2, 8, 12))];
    bench.finish(&mut clients.iter_mut().collect::<Vec<_>>());
    clients.iter().for_each(|client| client.check(&PLAIN));
    assert_eq!((computed(&bench), overtaken(&bench)), (12, 0));
}

#[test]
fn log_probabilities_of_a_token_come_when_it_is_known() {
    let mut with_logprobs = request(1, 8, 12);
    with_logprobs.params.logprobs = Some(2);
    let mut bench = bench();
    let mut clients = [bench.submit(with_logprobs), bench.submit(request(2, 8, 12))];
    bench.finish(&mut clients.iter_mut().collect::<Vec<_>>());
    clients.iter().for_each(|client| client.check(&PLAIN));
    assert_eq!((computed(&bench), overtaken(&bench)), (12, 10));
}

#[test]
fn what_is_drawn_after_the_last_token_is_dropped() {
    let mut plain = Bench::new(config());
    let mut free = plain.submit(request(1, 8, 30));
    plain.finish(&mut [&mut free]);
    let tokens = free.choices[0].tokens.clone();
    let at = (5..30).find(|at| !tokens[..*at].contains(&tokens[*at])).expect("some token is new");

    let mut bench = bench();
    let mut stopping = request(1, 8, 30);
    stopping.params.stop_token_ids = vec![tokens[at]];
    let mut client = bench.submit(stopping);
    bench.finish(&mut [&mut client]);
    client.check(&PLAIN);
    assert_eq!(client.choices[0].tokens, tokens[..=at]);
    let num_tokens = at as u64 + 1;
    assert_eq!(bench.handle.snapshot().generation_tokens, num_tokens);
    bench.step();
    assert_eq!(computed(&bench), num_tokens + 1, "one step for nothing");
    assert!(bench.all_blocks_are_back());
    assert_eq!(bench.step(), StepStatus::Idle);
}

#[test]
fn a_row_after_the_last_token_of_a_choice_does_not_fail_the_others() {
    let mut bench = bench();
    let mut client = bench.submit(with_n(2, request(1, 8, 20)));
    bench.steps(6);
    client.read();
    // The step that is pending has a row of the choice that ends here.
    client.finish_choice(0);
    let last = *client.choices[0].tokens.last().unwrap();
    bench.faults.bad_token.store(u64::from(last), Ordering::Relaxed);
    bench.step();
    bench.faults.bad_token.store(0, Ordering::Relaxed);
    bench.finish(&mut [&mut client]);
    assert_eq!(client.outcome, Outcome::Completed);
    assert_eq!(client.choices[1].tokens.len(), 20);
    assert!(bench.all_blocks_are_back());
}

#[test]
fn who_leaves_while_a_step_is_pending_takes_its_blocks_along() {
    let mut bench = bench();
    let mut stays = bench.submit(request(1, 8, 20));
    let mut leaves = bench.submit(request(2, 8, 20));
    bench.steps(5);
    leaves.leave();
    // Gets the blocks, to which the pending step still writes.
    let mut comes = bench.submit(request(3, 40, 20));
    bench.finish(&mut [&mut stays, &mut comes]);
    [&stays, &comes].into_iter().for_each(|client| client.check(&PLAIN));
    assert_eq!(bench.handle.snapshot().cancelled, 1);
    assert!(bench.all_blocks_are_back());
}

#[test]
fn a_step_that_fails_takes_the_one_that_overtook_it_along() {
    let mut bench = bench();
    bench.faults.fail_every.store(6, Ordering::Relaxed);
    let mut clients: Vec<Client> = (0..2).map(|i| bench.submit(request(i, 10, 20))).collect();
    bench.steps(5);
    // Its prompt is in the step that overtakes the failing one.
    clients.push(bench.submit(request(2, 10, 20)));
    bench.finish(&mut clients.iter_mut().collect::<Vec<_>>());
    assert!(clients.iter().all(|client| matches!(&client.outcome, Outcome::Failed(_))));
    assert_eq!(bench.faults.aborts.load(Ordering::Relaxed), 1);
    bench.faults.fail_every.store(0, Ordering::Relaxed);
    let mut next = bench.submit(request(0, 10, 5));
    bench.finish(&mut [&mut next]);
    next.check(&PLAIN);
    assert_eq!(next.started.unwrap().0, 0, "nothing of a failed step is reused");
    assert!(bench.all_blocks_are_back());
}

#[test]
fn a_pending_step_is_given_up_when_the_engine_stops() {
    let mut bench = bench();
    let mut client = bench.submit(request(1, 8, 20));
    bench.steps(4);
    bench.handle.shutdown();
    assert_eq!(bench.step(), StepStatus::Stopped);
    client.read();
    assert!(matches!(client.outcome, Outcome::Failed(_)));
    assert_eq!(bench.faults.aborts.load(Ordering::Relaxed), 1);
    assert!(bench.all_blocks_are_back());
}

#[test]
fn whoever_comes_while_a_prompt_is_computed_is_in_the_next_step() {
    let mut bench = Bench::new(EngineConfig { max_num_batched_tokens: 16, ..config() });
    bench.faults.computes_beside.store(true, Ordering::Relaxed);
    let mut long = bench.submit(request(1, 64, 2));
    bench.step();
    let (sender, seen) = mpsc::channel();
    *bench.faults.meanwhile.lock().unwrap() = Some(Box::new(move || sender.send(()).unwrap_or_default()));
    let mut urgent = bench.submit(Request { priority: -1, ..request(2, 8, 2) });
    bench.step();
    assert!(seen.try_recv().is_ok(), "the chunk is over before the next step is planned");
    bench.step();
    urgent.read();
    assert_eq!(urgent.num_tokens(), 1);
    bench.finish(&mut [&mut long, &mut urgent]);
    [&long, &urgent].into_iter().for_each(|client| client.check(&PLAIN));
}

#[test]
fn whoever_waits_for_a_place_has_it_when_the_last_token_of_another_is_on_its_way() {
    let mut bench = Bench::new(EngineConfig { max_num_seqs: 1, ..config() });
    bench.faults.computes_beside.store(true, Ordering::Relaxed);
    let mut first = bench.submit(request(1, 8, 12));
    let mut second = bench.submit(request(2, 8, 12));
    bench.finish(&mut [&mut first, &mut second]);
    [&first, &second].into_iter().for_each(|client| client.check(&PLAIN));
    // Of each all decodes but the last are overtaken by the next, and the last of the first by the prompt of the second.
    assert_eq!((computed(&bench), overtaken(&bench)), (24, 10 + 1 + 10));
}

/// A step is planned only if its events, and those of the one that is pending, find room.
#[test]
fn what_was_drawn_for_a_slow_reader_is_not_lost_when_the_engine_stops() {
    for stream_capacity in [1, 2, 3] {
        let mut bench = Bench::with_stream_capacity(config(), stream_capacity);
        bench.faults.computes_beside.store(true, Ordering::Relaxed);
        let mut client = bench.submit(request(1, 8, 20));
        bench.steps(10);
        let drawn = bench.handle.snapshot().generation_tokens;
        bench.handle.shutdown();
        assert_eq!(bench.step(), StepStatus::Stopped);
        client.read();
        assert_eq!(client.num_tokens() as u64, drawn, "{stream_capacity} messages");
    }
}
