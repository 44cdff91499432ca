//! What a leader does about peers that have the key and say what no rank of this version would.

use std::time::{Duration, Instant};

use tandem_wire::Incarnation;

use super::leader::{Action, Leader, LeaderConfig, LinkId, State};
use super::message::{Answer, Hello, Loaded, Term, ToLeader, ToRank};

fn leader(now: Instant) -> Leader {
    let config = LeaderConfig {
        size: 2,
        gpus_per_pod: 1,
        terms: vec![Term { name: "model".into(), value: "right".into() }],
        wanted_blocks: 10,
        leader_http: "leader:8000".into(),
    };
    Leader::new(config, now)
}

/// A process calls and says hello; what it is told.
fn greet(leader: &mut Leader, link: LinkId, rank: u32, last_epoch: u64, model: &str) -> Vec<Action> {
    let (now, mut out) = (Instant::now(), Vec::new());
    leader.connected(now, link, "10.0.0.1".into(), &mut out);
    let terms = vec![Term { name: "model".into(), value: model.into() }];
    let hello = Hello { rank, last_epoch, port: 7401, terms };
    let from = (last_epoch, Incarnation(u128::from(link)));
    leader.message(now, link, from, ToLeader::Hello(hello), &mut out);
    out
}

fn refusal(out: &[Action]) -> &str {
    match out {
        [Action::Send { message: ToRank::Refuse { reason }, .. }, Action::Close { .. }] => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_epoch_that_cannot_be_is_refused_and_the_next_one_still_counts_on() {
    let mut leader = leader(Instant::now());
    let out = greet(&mut leader, 1, 0, u64::MAX, "right");
    assert!(refusal(&out).contains("epoch 18446744073709551615"), "{}", refusal(&out));
    for link in [2, 3] {
        let out = greet(&mut leader, link, link as u32 - 2, 1 << 62, "right");
        assert!(matches!(out[..], [Action::Send { message: ToRank::Welcome { .. }, .. }]), "{out:?}");
        let loaded = ToLeader::Loaded(Loaded { max_blocks: 10, weight_bytes: 1, read_bytes: 1 });
        leader.message(Instant::now(), link, (0, Incarnation(u128::from(link))), loaded, &mut Vec::new());
    }
    let epoch = (1 << 62) + 1;
    assert_eq!((leader.epoch(), leader.state() == State::Joining), (epoch, false));
    // Who has been in it comes back.
    leader.closed(Instant::now(), 2, "is gone", &mut Vec::new());
    let out = greet(&mut leader, 4, 0, epoch, "right");
    assert!(matches!(out[..], [Action::Send { message: ToRank::Welcome { .. }, .. }]), "{out:?}");
}

#[test]
fn a_rank_without_memory_does_not_decide_for_the_group() {
    let mut leader = leader(Instant::now());
    greet(&mut leader, 1, 0, 0, "right");
    let loaded = ToLeader::Loaded(Loaded { max_blocks: 0, weight_bytes: 1, read_bytes: 1 });
    let mut out = Vec::new();
    leader.message(Instant::now(), 1, (0, Incarnation(1)), loaded, &mut out);
    assert!(refusal(&out).contains("memory for 0 KV blocks"), "{}", refusal(&out));
    assert_eq!(leader.num_blocks(), None);
}

#[test]
fn what_a_peer_says_is_quoted_in_part() {
    let mut leader = leader(Instant::now());
    let out = greet(&mut leader, 1, 0, 0, &"ä".repeat(30_000));
    let reason = refusal(&out);
    assert!(reason.starts_with("model: ordinal 0 (10.0.0.1) has ää") && reason.len() < 700, "{reason}");
    assert!(leader.missing().iter().all(|line| line.len() < 700));
    assert_eq!(leader.counters().refusals, 1);
    leader.rejected();
    assert_eq!(leader.counters().refusals, 2);
}

#[test]
fn answers_are_taken_in_the_order_of_steps_and_are_bounded() {
    let mut leader = leader(Instant::now());
    let say = |leader: &mut Leader, link: LinkId, epoch: u64, message: ToLeader| {
        let from = (epoch, Incarnation(u128::from(link)));
        leader.message(Instant::now(), link, from, message, &mut Vec::new());
    };
    for rank in 0..2 {
        let link = LinkId::from(rank) + 1;
        greet(&mut leader, link, rank, 0, "right");
        say(
            &mut leader,
            link,
            0,
            ToLeader::Loaded(Loaded { max_blocks: 10, weight_bytes: 1, read_bytes: 1 }),
        );
    }
    let epoch = leader.epoch();
    [1, 2].into_iter().for_each(|link| say(&mut leader, link, epoch, ToLeader::Formed));
    assert_eq!(leader.state(), State::Ready);
    let answer = |step| Answer { step, forward: Duration::ZERO, rows: Vec::new() };

    [4, 5].into_iter().for_each(|step| say(&mut leader, 1, epoch, ToLeader::Answer(answer(step))));
    assert_eq!(leader.take_answer(3), None);
    assert_eq!((leader.take_answer(4), leader.take_answer(5)), (Some(answer(4)), Some(answer(5))));
    // Of a step that the engine gave up nobody takes the answer.
    [6, 7].into_iter().for_each(|step| say(&mut leader, 1, epoch, ToLeader::Answer(answer(step))));
    assert_eq!((leader.take_answer(7), leader.take_answer(6)), (Some(answer(7)), None));

    (8..12).for_each(|step| say(&mut leader, 1, epoch, ToLeader::Answer(answer(step))));
    assert_eq!(leader.counters().stale_messages, 2, "more than are under way");
    assert_eq!((leader.take_answer(10), leader.take_answer(11)), (Some(answer(10)), Some(answer(11))));
    // Nor of another epoch, nor from another rank.
    say(&mut leader, 1, epoch - 1, ToLeader::Answer(answer(12)));
    say(&mut leader, 2, epoch, ToLeader::Answer(answer(12)));
    assert_eq!((leader.counters().stale_messages, leader.take_answer(12)), (4, None));
    say(&mut leader, 1, epoch, ToLeader::Answer(answer(12)));
    say(&mut leader, 1, epoch, ToLeader::StepFailed { step: 14, reason: "a reason".into() });
    assert_eq!(leader.take_answer(12), None, "the epoch is over");
}
