//! One model over several processes: a leader that decides, ranks that compute, and how they find each other again.
//!
//! ```text
//!   leader's process                                        every rank's process
//!   step thread: Engine ─▶ GroupExecutor ─▶ Leader    ‖    control: Agent ─▶ computing thread: Llama
//!        one control connection for each rank ◀───────‖──▶       Mesh: a connection to every other rank
//! ```
//! * [`leader`] and [`agent`] are the protocol as state machines without sockets, threads or clock; a simulation drives both.
//! * [`executor`] and [`rank`] are the sockets and threads around them; [`compute`] is the rank's computing thread, over a CPU or
//!   a GPU ([`device`]).
//! * [`message`] and [`rows`] are what they say; [`mesh`] connects ranks to each other; [`acceptor`] lets peers in; [`scout`] looks
//!   for those that do not come; [`pace`] says how long a step may take.
//!
//! Only the leader decides and reads a clock that matters; ranks execute plans in order and check each one's digest. KV belongs to
//! one epoch: when a rank is lost, the others give the step up, keep their weights, and a new epoch begins once all are there.

mod acceptor;
mod agent;
mod compute;
mod cpu_shard;
mod cuda_shard;
mod device;
pub(crate) mod executor;
pub(crate) mod leader;
#[cfg(test)]
mod leader_tests;
mod mesh;
pub(crate) mod message;
mod pace;
mod rank;
mod rows;
pub(crate) mod scout;
#[cfg(test)]
mod simulation;
pub(crate) mod status;

pub(crate) use cpu_shard::CpuShard;
pub use cuda_shard::CustomAllReduce;
pub(crate) use cuda_shard::{CudaShard, Transport};
pub(crate) use device::ShardDevice;

pub use agent::RankReport;
pub use rank::{RankEnd, RankOptions, RankOrder, run_rank};
pub use status::{GroupReport, GroupState, GroupStatus};
