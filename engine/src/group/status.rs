//! How a group is, for probes, metrics and people: written by the leader's step thread, read by anybody.

use std::sync::{Arc, Mutex, PoisonError};

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GroupState {
    /// Ranks of this pod read their weights.
    #[default]
    Loading,
    /// Ranks are missing or connect to each other.
    Joining,
    /// Steps run.
    Ready,
    /// A rank was lost: the others give up the step.
    Broken,
}

impl GroupState {
    /// All states, in the order of a group's life.
    pub const ALL: [Self; 4] = [Self::Loading, Self::Joining, Self::Ready, Self::Broken];

    /// The name in metrics and answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Joining => "joining",
            Self::Ready => "ready",
            Self::Broken => "broken",
        }
    }
}

/// One consistent picture of a group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GroupReport {
    pub state: GroupState,
    /// The live epoch, or the last one; 0 before the first.
    pub epoch: u64,
    /// Whether each rank is a member.
    pub ranks_up: Vec<bool>,
    /// Why the group does not serve, a line for each rank that is missing; empty when it does.
    pub reasons: Vec<String>,
    /// Messages of an older epoch, another incarnation or another leader, which changed nothing.
    pub stale_messages: u64,
    /// Connections that were refused: another model, setup or key, or a rank that is taken.
    pub refusals: u64,
    /// Epochs that ended.
    pub breaks: u64,
    /// Where clients find the leader, as the leader says; empty while that is unknown.
    pub leader_http: String,
}

/// The latest report. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct GroupStatus(Arc<Mutex<Arc<GroupReport>>>);

impl GroupStatus {
    pub fn report(&self) -> Arc<GroupReport> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Publishes a report.
    pub fn set(&self, report: GroupReport) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(report);
    }
}
