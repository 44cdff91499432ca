//! A whole engine over a group of ranks, all in this process, over real sockets: the answers are those of one rank.

use tandem_engine::{EngineHandle, EngineOptions, GroupState, Request, SamplingParams};
use tandem_tests::default_model;
use tandem_tests::engine::{Answer, collect, greedy, model, request, small, start};
use tandem_tests::pods::wait_for;
use tandem_tests::ranks::Group;

fn requests() -> Vec<Request> {
    let prompt =
        |salt: u32, len: u32| (0..len).map(|at| 100 + (salt * 37 + at * 11) % 5000).collect::<Vec<_>>();
    let sampled = |seed| SamplingParams {
        max_tokens: 24,
        temperature: 0.9,
        top_p: 0.95,
        repetition_penalty: 1.1,
        seed: Some(seed),
        logprobs: Some(3),
        ignore_eos: true,
        n: if seed % 4 == 0 { 2 } else { 1 },
        ..SamplingParams::default()
    };
    let shared = prompt(7, 40);
    (0..8)
        .map(|index| match index % 3 {
            0 => request(&prompt(index, 20 + 30 * index), sampled(u64::from(index))),
            1 => request(&shared, SamplingParams { ignore_eos: true, ..greedy(30) }),
            _ => Request {
                prompt_logprobs: Some(0),
                ..request(&prompt(index, 50), SamplingParams { ignore_eos: true, ..greedy(16) })
            },
        })
        .collect()
}

fn answers(engine: &EngineHandle) -> Vec<Answer> {
    let streams: Vec<_> = requests()
        .into_iter()
        .map(|request| engine.submit(request).unwrap_or_else(|error| panic!("{error}")))
        .collect();
    streams.into_iter().map(collect).collect()
}

fn same(found: &[Answer], expected: &[Answer]) {
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.outcome(), expected.outcome(), "request {index}");
    }
}

#[test]
fn a_group_answers_as_one_rank_does_and_goes_on_after_a_rank_has_left() {
    let options = EngineOptions { max_num_batched_tokens: 96, ..small() };
    let alone = start(&model(default_model()), &options);
    let expected = answers(&alone);
    alone.shutdown();

    let mut group = Group::start(model(default_model()), options, 3);
    same(&answers(&group.engine), &expected);
    let epoch = group.status.report().epoch;

    // A rank leaves between two rounds: its successor's KV is empty, so no prefix may be found in it.
    group.leave(1);
    wait_for("the loss is seen", || !group.engine.is_accepting());
    assert_ne!(group.status.report().state, GroupState::Ready);
    assert!(!group.status.report().reasons.is_empty());
    group.replace(1);
    wait_for("the group forms again", || group.engine.is_accepting());
    let report = group.status.report();
    assert_eq!(
        (report.state, report.epoch > epoch, report.ranks_up.clone()),
        (GroupState::Ready, true, vec![true; 3])
    );
    same(&answers(&group.engine), &expected);
    assert!(group.engine.snapshot().is_balanced());
    group.stop();
}
