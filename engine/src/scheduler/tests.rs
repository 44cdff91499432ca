//! Single decisions, on sequences without a model.

use super::*;
use crate::config::EngineConfig;
use crate::prefix_cache::ChainHasher;

fn scheduler(num_blocks: usize, max_num_seqs: usize, budget: usize) -> Scheduler {
    let config = EngineConfig { num_blocks, block_size: 4, prefix_caching: false, ..EngineConfig::default() };
    let limits = Limits { max_num_seqs, max_num_batched_tokens: budget, max_logits_rows: 256, block_size: 4 };
    Scheduler::new(limits, BlockManager::new(&config, hasher()))
}

fn hasher() -> ChainHasher {
    ChainHasher::new([0; 16], [0; 16], 4)
}

fn add(scheduler: &mut Scheduler, priority: i32, serial: u64, prompt_len: usize) -> SequenceKey {
    let key = SequenceKey { priority, serial, choice: 0 };
    scheduler.add(Sequence {
        key,
        tokens: vec![1; prompt_len],
        prompt_len,
        context_len: 0,
        in_flight: 0,
        awaited: None,
        block_table: Vec::new(),
        chain: hasher().start(None),
        num_choices: 1,
        max_len: 1000,
        num_scored: None,
        cached_tokens: None,
    });
    key
}

/// Runs one step in which every sequence that reaches its end draws a token; (serial, query tokens) of the
/// plan.
fn step_with(scheduler: &mut Scheduler, is_ready: impl Fn(&Sequence) -> bool) -> Vec<(u64, usize)> {
    let schedule = scheduler.schedule(is_ready);
    scheduler.blocks_mut().finish_step();
    for (key, planned) in schedule.keys.iter().zip(&schedule.plan.sequences) {
        scheduler.commit(key, planned.token_ids.len());
        let sequence = scheduler.get_mut(key).unwrap();
        if sequence.num_unplanned() == 0 {
            sequence.tokens.push(2);
        }
    }
    scheduler.check_integrity().unwrap();
    schedule.plan.sequences.iter().map(|planned| (planned.request, planned.token_ids.len())).collect()
}

fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize)> {
    step_with(scheduler, |_| true)
}

#[test]
fn decodes_have_their_token_before_prompts_share_the_rest() {
    let mut scheduler = scheduler(100, 8, 10);
    add(&mut scheduler, 0, 0, 4);
    assert_eq!(step(&mut scheduler), [(0, 4)]);
    add(&mut scheduler, 0, 1, 15);
    add(&mut scheduler, 0, 2, 6);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 9)]);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 6), (2, 3)]);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1), (2, 3)]);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1), (2, 1)]);
}

#[test]
fn a_better_priority_goes_before_a_prompt_that_is_half_done() {
    let mut scheduler = scheduler(100, 8, 10);
    add(&mut scheduler, 0, 0, 30);
    assert_eq!(step(&mut scheduler), [(0, 10)]);
    add(&mut scheduler, 0, 1, 4);
    add(&mut scheduler, -1, 2, 6);
    assert_eq!(step(&mut scheduler), [(2, 6), (0, 4)]);
    assert_eq!(step(&mut scheduler), [(2, 1), (0, 9)]);
    assert_eq!(step(&mut scheduler), [(2, 1), (0, 7), (1, 2)]);
}

#[test]
fn lower_priorities_go_first_and_equals_in_order() {
    let mut scheduler = scheduler(100, 2, 100);
    for (serial, priority) in [(0, 5), (1, 0), (2, 0), (3, -1)] {
        add(&mut scheduler, priority, serial, 4);
    }
    assert_eq!(step(&mut scheduler), [(3, 4), (1, 4)]);
}

#[test]
fn the_newest_of_the_lowest_priority_is_preempted() {
    let mut scheduler = scheduler(6, 8, 100);
    let first = add(&mut scheduler, 0, 0, 3);
    add(&mut scheduler, 1, 1, 3);
    add(&mut scheduler, 0, 2, 3);
    assert_eq!(step(&mut scheduler), [(0, 3), (2, 3), (1, 3)]);
    // Each grows into a second block at its fourth token; six blocks hold all three.
    for _ in 0..5 {
        assert_eq!(step(&mut scheduler).len(), 3);
    }
    // The ninth token needs a third block each: request 1 makes way, though 2 is newer.
    assert_eq!(step(&mut scheduler), [(0, 1), (2, 1)]);
    assert_eq!(scheduler.num_preemptions(), 1);
    assert!(
        scheduler.get(&SequenceKey { priority: 1, serial: 1, choice: 0 }).unwrap().block_table.is_empty()
    );
    scheduler.remove(&first);
    // Back with all nine of its tokens.
    assert_eq!(step(&mut scheduler), [(2, 1)], "three blocks and one to spare do not fit yet");
    scheduler.remove(&SequenceKey { priority: 0, serial: 2, choice: 0 });
    assert_eq!(step(&mut scheduler), [(1, 9)]);
}

#[test]
fn a_large_request_is_not_overtaken() {
    let mut scheduler = scheduler(6, 8, 100);
    let first = add(&mut scheduler, 0, 0, 4);
    step(&mut scheduler);
    add(&mut scheduler, 0, 1, 21);
    add(&mut scheduler, 0, 2, 1);
    assert_eq!(step(&mut scheduler), [(0, 1)]);
    scheduler.remove(&first);
    assert_eq!(step(&mut scheduler), [(1, 21)]);
}

#[test]
fn paused_sequences_keep_their_blocks_until_somebody_needs_them() {
    let mut scheduler = scheduler(8, 2, 100);
    add(&mut scheduler, 0, 0, 9);
    add(&mut scheduler, 0, 1, 3);
    assert_eq!(step(&mut scheduler), [(0, 9), (1, 3)]);
    let only_others = |sequence: &Sequence| sequence.key.serial != 0;
    assert_eq!(step_with(&mut scheduler, only_others), [(1, 1)]);
    assert_eq!(scheduler.num_preemptions(), 0);
    // The paused one is first in order, yet it makes way for a newcomer: both places are taken.
    add(&mut scheduler, 0, 2, 3);
    assert_eq!(step_with(&mut scheduler, only_others), [(1, 1), (2, 3)]);
    assert_eq!(scheduler.num_preemptions(), 1);
    scheduler.remove(&SequenceKey { priority: 0, serial: 1, choice: 0 });
    assert_eq!(step_with(&mut scheduler, |_| true), [(2, 1), (0, 10)]);
}

#[test]
fn paused_sequences_do_not_make_way_in_vain() {
    let mut scheduler = scheduler(8, 8, 100);
    add(&mut scheduler, 0, 0, 4);
    let active = add(&mut scheduler, 0, 1, 12);
    step(&mut scheduler);
    // 24 tokens need six blocks; with the paused one's there would be four.
    add(&mut scheduler, 0, 2, 24);
    let only_others = |sequence: &Sequence| sequence.key.serial != 0;
    assert_eq!(step_with(&mut scheduler, only_others), [(1, 1)]);
    assert_eq!(scheduler.num_preemptions(), 0);
    scheduler.remove(&active);
    assert_eq!(step_with(&mut scheduler, only_others), [(2, 24)]);
}

#[test]
fn forked_choices_share_full_blocks_and_copy_the_partial_one() {
    let mut scheduler = scheduler(16, 8, 100);
    let key = add(&mut scheduler, 0, 0, 6);
    scheduler.get_mut(&key).unwrap().num_choices = 3;
    step(&mut scheduler);
    for choice in [1, 2] {
        scheduler.fork(&key, choice);
    }
    let schedule = scheduler.schedule(|_| true);
    let tables: Vec<&Vec<u32>> = schedule.plan.sequences.iter().map(|s| &s.block_table).collect();
    assert!(tables.iter().all(|table| table[0] == tables[0][0]));
    let mut second: Vec<u32> = tables.iter().map(|table| table[1]).collect();
    second.sort_unstable();
    second.dedup();
    assert_eq!(second.len(), 3);
    assert_eq!(schedule.plan.block_copies.len(), 2, "the last holder writes in place");
    scheduler.blocks_mut().finish_step();
    (0..3).for_each(|choice| scheduler.remove(&SequenceKey { choice, ..key }));
    scheduler.check_integrity().unwrap();
    assert_eq!(scheduler.blocks().counts().free, 16);
}

#[test]
fn all_choices_of_a_prompt_need_a_place() {
    let mut scheduler = scheduler(16, 3, 100);
    add(&mut scheduler, 0, 0, 2);
    step(&mut scheduler);
    let key = add(&mut scheduler, 0, 1, 2);
    scheduler.get_mut(&key).unwrap().num_choices = 3;
    assert_eq!(step(&mut scheduler), [(0, 1)]);
    scheduler.get_mut(&key).unwrap().num_choices = 2;
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 2)]);
}

#[test]
fn new_memory_sends_everyone_back_with_all_their_tokens() {
    let mut scheduler = scheduler(16, 8, 100);
    let key = add(&mut scheduler, 0, 0, 6);
    scheduler.get_mut(&key).unwrap().num_choices = 2;
    step(&mut scheduler);
    scheduler.fork(&key, 1);
    add(&mut scheduler, 0, 1, 5);
    step(&mut scheduler);
    // A plan with a copy in it is void, too.
    scheduler.schedule(|_| true);
    scheduler.reset();
    scheduler.check_integrity().unwrap();
    assert_eq!((scheduler.num_running_requests(), scheduler.num_preemptions()), (0, 0));
    assert_eq!(scheduler.blocks().counts().free, 16);
    assert_eq!(step(&mut scheduler), [(0, 8), (0, 8), (1, 6)]);
    scheduler.check_integrity().unwrap();
}
