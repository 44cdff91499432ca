//! A group of ranks as threads of this process, over real sockets: for what needs no signals.

use std::net::TcpListener;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tandem_engine::{
    EngineHandle, EngineOptions, GroupStatus, LeadOptions, ModelOptions, RankEnd, RankOptions, RankOrder,
    inspect, run_rank, spawn,
};

/// An engine and its ranks.
pub struct Group {
    pub engine: EngineHandle,
    pub status: GroupStatus,
    ranks: Vec<Option<Rank>>,
    leader: u16,
    model: ModelOptions,
    options: EngineOptions,
}

/// A rank on a thread, and the way to tell it to leave.
struct Rank {
    orders: Sender<RankOrder>,
    thread: JoinHandle<RankEnd>,
}

impl Group {
    /// Starts `size` ranks and waits until they are a group.
    pub fn start(model: ModelOptions, options: EngineOptions, size: usize) -> Self {
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

    /// Makes a rank leave the group.
    pub fn leave(&mut self, rank: usize) {
        self.ranks[rank].take().expect("it runs").leave();
    }

    /// Starts a new rank in the place of one that has left.
    pub fn replace(&mut self, rank: usize) {
        let size = self.ranks.len();
        self.ranks[rank] = Some(Rank::start(&self.model, &self.options, rank, size, self.leader));
    }

    /// Ends the engine and the ranks.
    pub fn stop(self) {
        self.engine.shutdown();
        drop(self.engine);
        self.ranks.into_iter().flatten().for_each(Rank::leave);
    }
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
                held_blocks: None,
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

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("loopback has ports")
}
