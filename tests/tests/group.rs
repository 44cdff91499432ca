//! A whole engine over a group of ranks, all in this process, over real sockets: the answers are those of one rank.

use std::net::TcpListener;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tandem_engine::{
    EngineHandle, EngineOptions, GroupState, GroupStatus, LeadOptions, ModelOptions, RankEnd, RankOptions,
    RankOrder, Request, SamplingParams, inspect, run_rank, spawn,
};
use tandem_tests::default_model;
use tandem_tests::engine::{Answer, collect, greedy, model, request, small, start};

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("loopback has ports")
}

/// A rank on a thread, and the way to tell it to leave.
struct Rank {
    orders: Sender<RankOrder>,
    thread: JoinHandle<RankEnd>,
}

impl Rank {
    fn start(model: &ModelOptions, options: &EngineOptions, rank: usize, size: usize, leader: u16) -> Self {
        let (orders, inbox) = mpsc::channel();
        let (model, options) = (model.clone(), options.clone());
        let thread = thread::spawn(move || {
            let place = RankOptions {
                rank,
                size,
                local_ranks: size,
                leader: ("127.0.0.1".into(), leader),
                listener: listener(),
                key: None,
            };
            let inspected = inspect(&model).unwrap_or_else(|error| panic!("{error}"));
            run_rank(inspected, &options, place, inbox, |_| ()).unwrap_or_else(|error| panic!("{error}"))
        });
        Self { orders, thread }
    }

    fn leave(self) {
        self.orders.send(RankOrder::Leave).expect("the rank listens");
        assert_eq!(self.thread.join().expect("the rank does not panic"), RankEnd::Left);
    }
}

struct Group {
    engine: EngineHandle,
    status: GroupStatus,
    ranks: Vec<Option<Rank>>,
    leader: u16,
    model: ModelOptions,
    options: EngineOptions,
}

impl Group {
    fn start(model: ModelOptions, options: EngineOptions, size: usize) -> Self {
        let listener = listener();
        let leader = listener.local_addr().expect("it listens").port();
        let ranks = (0..size).map(|rank| Some(Rank::start(&model, &options, rank, size, leader))).collect();
        let status = GroupStatus::default();
        let lead = LeadOptions {
            size,
            gpus_per_pod: size,
            listener,
            key: None,
            peers: vec![],
            rank_port: 0,
            leader_http: String::new(),
        };
        let inspected = inspect(&model).unwrap_or_else(|error| panic!("{error}"));
        let gathering =
            inspected.lead(&options, lead, status.clone()).unwrap_or_else(|error| panic!("{error}"));
        let loaded = gathering.wait(Some(Duration::from_secs(60))).unwrap_or_else(|error| panic!("{error}"));
        Self { engine: spawn(loaded.executor, loaded.config), status, ranks, leader, model, options }
    }

    fn replace(&mut self, rank: usize) {
        let size = self.ranks.len();
        let new = Rank::start(&self.model, &self.options, rank, size, self.leader);
        self.ranks[rank] = Some(new);
    }

    fn stop(self) {
        self.engine.shutdown();
        drop(self.engine);
        for rank in self.ranks.into_iter().flatten() {
            rank.leave();
        }
    }
}

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

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        thread::sleep(Duration::from_millis(5));
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
    group.ranks[1].take().expect("it runs").leave();
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
