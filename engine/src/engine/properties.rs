//! Random runs of whole engines against the oracle: whatever the batch, chunks, pool, cache, priorities,
//! readers, departures and breaks of the executor's group, every request gets the tokens it would get alone;
//! blocks come back, the ledger balances, nobody starves.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::config::EngineConfig;
use crate::engine::{Bounds, Engine};
use crate::error::{FailureKind, SubmitError};
use crate::request::Request;
use crate::sampling_params::SamplingParams;
use crate::snapshot::Snapshot;
use crate::testing::{
    Client, EOS, FakeExecutor, Faults, Moment, Oracle, Outcome, Rng, VOCAB, config, environment,
};

const MODEL_LEN: usize = 96;

/// How a client of these runs behaves.
struct Behaviour {
    /// Reads in every so-manieth step.
    reads_every: usize,
    /// Goes away after so many tokens.
    leaves_after: Option<usize>,
    /// Ends its first choice after so many of its tokens.
    stops_after: Option<usize>,
}

fn random_config(rng: &mut Rng) -> EngineConfig {
    let block_size = rng.pick(&[1, 2, 3, 4, 16]);
    let max_num_seqs = rng.pick(&[1, 2, 4, 8]);
    EngineConfig {
        max_model_len: MODEL_LEN,
        block_size,
        max_num_seqs,
        max_num_batched_tokens: max_num_seqs + rng.pick(&[0, 1, 5, 24, 100]),
        // From just enough for one sequence to plenty.
        num_blocks: MODEL_LEN.div_ceil(block_size) + rng.pick(&[0, 1, 3, 20, 200]),
        prefix_caching: rng.once_in(2),
        async_scheduling: !rng.once_in(8),
        ..config()
    }
}

fn random_request(rng: &mut Rng, config: &EngineConfig) -> Request {
    // Prompts grow from few stems, so that prefixes are shared.
    let stem = rng.below(3) as u32;
    let (shared_len, own_len) = (rng.below(30), 1 + rng.below(20));
    let mut prompt: Vec<u32> =
        (0..shared_len as u32).map(|i| 2 + (i * (stem + 2) + stem) % (VOCAB - 2)).collect();
    prompt.extend((0..own_len).map(|_| 2 + rng.below(VOCAB as usize - 2) as u32));
    let max_tokens = if rng.once_in(12) { 0 } else { 1 + rng.below(MODEL_LEN - prompt.len()) };
    let temperature = rng.pick(&[0.0, 0.7, 1.3]);
    let penalised = rng.once_in(3);
    let params = SamplingParams {
        n: 1 + rng.below(config.max_num_seqs.min(4)) as u32,
        max_tokens,
        min_tokens: rng.below(max_tokens.min(6) + 1),
        temperature,
        top_k: rng.pick(&[0, 0, 5]),
        repetition_penalty: if penalised { 1.3 } else { 1.0 },
        presence_penalty: if penalised { 0.4 } else { 0.0 },
        frequency_penalty: if penalised { 0.2 } else { 0.0 },
        logit_bias: if rng.once_in(4) { vec![(5, 1.5), (EOS, -3.0), (5, 0.5)] } else { Vec::new() },
        allowed_token_ids: rng.once_in(6).then(|| (0..20).collect()),
        banned_token_ids: if rng.once_in(4) { vec![3, 4] } else { Vec::new() },
        stop_token_ids: if rng.once_in(3) { vec![9, 17] } else { Vec::new() },
        ignore_eos: rng.once_in(2),
        seed: rng.once_in(2).then(|| rng.next()),
        logprobs: rng.pick(&[None, None, Some(0), Some(3)]),
        ..SamplingParams::default()
    };
    Request {
        id: "random".into(),
        prompt,
        params,
        priority: rng.pick(&[0, 0, 0, 1, -1]),
        cache_salt: rng.pick(&[None, None, Some("a"), Some("b")]).map(str::to_owned),
        prompt_logprobs: rng.pick(&[None, None, None, Some(0), Some(2)]),
        arrival: Instant::now(),
    }
}

fn random_behaviour(rng: &mut Rng) -> Behaviour {
    Behaviour {
        reads_every: rng.pick(&[1, 1, 1, 7, 40]),
        leaves_after: rng.once_in(6).then(|| rng.below(20)),
        stops_after: rng.once_in(6).then(|| 1 + rng.below(10)),
    }
}

/// Breaks the group now and then, and lets a rank announce that it will leave. A break throws all prompts
/// back, so that a run ends only when breaks do.
struct Troublemaker {
    breaks_left: usize,
}

impl Troublemaker {
    fn act(&mut self, rng: &mut Rng, faults: &Faults) {
        if self.breaks_left > 0 && rng.once_in(15) {
            self.breaks_left -= 1;
            let moment = rng.pick(&[Moment::BetweenSteps, Moment::BeforeWrites, Moment::AfterWrites]);
            faults.group.break_group(moment, rng.pick(&[0, 1, 2, 9]));
        }
        let leaving = &faults.group.leaving;
        let is_leaving = leaving.load(Ordering::Relaxed);
        leaving.store(if is_leaving { !rng.once_in(8) } else { rng.once_in(60) }, Ordering::Relaxed);
    }
}

/// One whole run; for what happened in it, the last snapshot, and how many steps were begun before the last was over.
fn run(seed: u64, with_breaks: bool) -> (Snapshot, u64) {
    let mut rng = Rng(seed);
    let mut config = random_config(&mut rng);
    let mut troublemaker = with_breaks.then(|| {
        // Without poison it is the epoch of the slots that tells old KV from new.
        config.poison_freed_blocks = rng.once_in(2);
        Troublemaker { breaks_left: rng.below(9) }
    });
    let (environment, clock) = environment();
    let bounds = Bounds {
        stream_capacity: rng.pick(&[2, 5, 1000]),
        // From one for each decode, so that scored prompts use up the rows before the tokens, to plenty.
        max_logits_rows: config.max_num_seqs + rng.pick(&[0, 1, 10, 1000]),
    };
    let (executor, faults) = FakeExecutor::with_logits_rows(&config, bounds.max_logits_rows);
    let oracle = Oracle { bad_token: rng.once_in(4).then_some(30) };
    faults.computes_beside.store(rng.once_in(2), Ordering::Relaxed);
    faults.bad_token.store(oracle.bad_token.unwrap_or(0).into(), Ordering::Relaxed);
    let (mut engine, handle) = Engine::with_bounds(executor, config.clone(), environment, bounds);

    let mut clients: Vec<(Client, Behaviour)> = Vec::new();
    let num_clients = 1 + rng.below(14);
    let mut round = 0;
    while clients.len() < num_clients || clients.iter().any(|(client, _)| client.is_open()) {
        round += 1;
        // Alone in steps of one token the slowest run needs a few thousand steps; a starving request would
        // never end.
        assert!(round < 60_000, "seed {seed}: somebody starves");
        while clients.len() < num_clients && rng.once_in(4) {
            let request = random_request(&mut rng, &config);
            if !handle.is_accepting() {
                assert_eq!(handle.submit(request).err(), Some(SubmitError::NotReady));
                continue;
            }
            clients.push((Client::submit(&handle, request), random_behaviour(&mut rng)));
        }
        // A group that has never been whole cannot break.
        if let Some(troublemaker) = troublemaker.as_mut().filter(|_| round > 1) {
            troublemaker.act(&mut rng, &faults);
        }
        engine.step();
        clock.advance(Duration::from_millis(7));
        engine.check_integrity().unwrap_or_else(|message| panic!("seed {seed}, round {round}: {message}"));
        let snapshot = handle.snapshot();
        assert!(snapshot.is_balanced(), "seed {seed}, round {round}: {snapshot:?}");
        for (client, behaviour) in &mut clients {
            behave(client, behaviour, round);
        }
    }
    // Those who left are noticed by the next step.
    engine.step();
    engine.check_integrity().unwrap();
    let snapshot = handle.snapshot();
    check_totals(&snapshot, &clients, seed);
    clients.iter().for_each(|(client, _)| client.check(&oracle));
    assert_eq!(snapshot.group_breaks, faults.group.breaks.load(Ordering::Relaxed), "seed {seed}");
    assert_eq!(snapshot.stream_resumes, faults.group.resumes.load(Ordering::Relaxed), "seed {seed}");
    assert!(!snapshot.errored.contains_key(&FailureKind::Unavailable), "seed {seed}: a break fails nobody");
    ((*snapshot).clone(), faults.steps_overtaken.load(Ordering::Relaxed))
}

fn behave(client: &mut Client, behaviour: &Behaviour, round: usize) {
    if round.is_multiple_of(behaviour.reads_every) {
        // A slow reader takes one message at a time.
        if behaviour.reads_every == 1 {
            client.read();
        } else {
            client.read_one();
        }
    }
    if behaviour.leaves_after.is_some_and(|tokens| client.num_tokens() >= tokens) {
        client.leave();
    }
    if behaviour.stops_after.is_some_and(|tokens| client.choices[0].tokens.len() >= tokens)
        && client.choices[0].finish.is_none()
        && client.ended_by_us.is_empty()
    {
        client.finish_choice(0);
    }
}

fn check_totals(snapshot: &Snapshot, clients: &[(Client, Behaviour)], seed: u64) {
    let count =
        |matches: fn(&Outcome) -> bool| clients.iter().filter(|(c, _)| matches(&c.outcome)).count() as u64;
    assert!(snapshot.is_balanced());
    assert_eq!(snapshot.in_flight, 0, "seed {seed}");
    assert_eq!(snapshot.admitted, clients.len() as u64);
    assert!(snapshot.errored_total() >= count(|o| matches!(o, Outcome::Failed(_))));
    // Who leaves may have been served to the end without having read it.
    let left = count(|o| *o == Outcome::Left);
    let completed = count(|o| *o == Outcome::Completed);
    assert!(snapshot.completed() >= completed && snapshot.completed() <= completed + left, "seed {seed}");
    assert!(snapshot.cancelled <= left);
    assert_eq!(snapshot.used_blocks, 0, "seed {seed}");
    assert_eq!(snapshot.free_blocks + snapshot.cached_blocks, snapshot.num_blocks);
    let received: usize = clients.iter().map(|(client, _)| client.num_tokens()).sum();
    assert!(snapshot.generation_tokens >= received as u64);
}

#[test]
fn random_runs_give_every_request_the_tokens_it_would_get_alone() {
    let (snapshots, overtaken): (Vec<Snapshot>, Vec<u64>) = (0..400).map(|seed| run(seed, false)).unzip();
    assert!(overtaken.iter().filter(|steps| **steps > 5).count() > 100, "{overtaken:?}");
    let sum = |count: fn(&Snapshot) -> u64| snapshots.iter().map(count).sum::<u64>();
    // The runs are worth something only if these happened, often.
    assert!(sum(|s| s.preemptions) > 200, "{} preemptions", sum(|s| s.preemptions));
    assert!(sum(|s| s.block_copies) > 200, "{} copies", sum(|s| s.block_copies));
    assert!(sum(|s| s.prefix_cache_hit_tokens) > 1000, "{} hits", sum(|s| s.prefix_cache_hit_tokens));
    assert!(sum(|s| s.cancelled) > 50, "{} cancelled", sum(|s| s.cancelled));
    assert!(sum(|s| s.errored_total()) > 50, "{} errored", sum(|s| s.errored_total()));
    assert!(sum(|s| s.completed_stop) > 100 && sum(|s| s.completed_length) > 100);
    assert!(snapshots.iter().any(|s| s.max_step_sequences == 8));
    assert!(snapshots.iter().filter(|s| s.chunk_sizes.len() >= 3).count() > 100);
}

#[test]
fn breaks_of_the_group_change_no_token_and_end_no_stream() {
    let (snapshots, overtaken): (Vec<Snapshot>, Vec<u64>) = (1000..1500).map(|seed| run(seed, true)).unzip();
    assert!(overtaken.iter().filter(|steps| **steps > 5).count() > 100, "{overtaken:?}");
    let sum = |count: fn(&Snapshot) -> u64| snapshots.iter().map(count).sum::<u64>();
    assert!(sum(|s| s.group_breaks) > 1000, "{} breaks", sum(|s| s.group_breaks));
    assert!(sum(|s| s.stream_resumes) > 1000, "{} resumes", sum(|s| s.stream_resumes));
    assert!(sum(|s| s.preemptions) > 200, "{} preemptions", sum(|s| s.preemptions));
    assert!(sum(|s| s.block_copies) > 200, "{} copies", sum(|s| s.block_copies));
    assert!(sum(|s| s.prefix_cache_hit_tokens) > 1000, "{} hits", sum(|s| s.prefix_cache_hit_tokens));
    assert!(sum(|s| s.cancelled) > 50, "{} cancelled", sum(|s| s.cancelled));
    assert!(snapshots.iter().any(|s| s.last_recovery.is_some_and(|gap| gap > Duration::from_millis(50))));
}
