//! A tensor-parallel group as this pod sees it: what probes and metrics tell of it.
//!
//! The leader knows the group itself; the other pods know what the leader has told their ranks.

use std::sync::Arc;

use tandem_engine::{GroupReport, GroupState, GroupStatus, RankReport};

use super::exposition::{Exposition, Kind, Number};

/// Where to look for how the group is.
#[derive(Clone)]
pub struct GroupView {
    /// The group's own status, if this pod leads it.
    pub leads: Option<GroupStatus>,
    /// How each rank of this pod is.
    pub local_ranks: Arc<dyn Fn() -> Vec<RankReport> + Send + Sync>,
    /// How often ranks of this pod were started again.
    pub restarts: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl GroupView {
    /// Whether all ranks of this pod have their weights.
    pub(super) fn is_loaded(&self) -> bool {
        (self.local_ranks)().iter().all(|rank| rank.loaded)
    }

    /// Whether a rank of this pod is connected to the leader.
    pub(super) fn hears_leader(&self) -> bool {
        (self.local_ranks)().iter().any(|rank| rank.joined)
    }

    /// How the group is, as far as this pod knows.
    pub(super) fn report(&self) -> GroupReport {
        let ranks = (self.local_ranks)();
        let is_loaded = ranks.iter().all(|rank| rank.loaded);
        if let Some(status) = &self.leads {
            let mut report = GroupReport::clone(&status.report());
            if !is_loaded && report.state == GroupState::Joining {
                report.state = GroupState::Loading;
            }
            return report;
        }
        let is_ready = ranks.iter().all(|rank| rank.ready);
        let was_ready = ranks.iter().any(|rank| rank.epoch > 0);
        let told = ranks.iter().find(|rank| rank.joined).or(ranks.first());
        let mut reasons: Vec<String> = ranks.iter().flat_map(|rank| rank.reasons.iter().cloned()).collect();
        reasons.dedup();
        GroupReport {
            state: match (is_loaded, is_ready) {
                (false, _) => GroupState::Loading,
                (true, true) => GroupState::Ready,
                (true, false) if was_ready => GroupState::Broken,
                (true, false) => GroupState::Joining,
            },
            epoch: ranks.iter().map(|rank| rank.epoch).max().unwrap_or(0),
            ranks_up: told.map(|rank| rank.ranks_up.clone()).unwrap_or_default(),
            reasons: if is_ready { Vec::new() } else { reasons },
            stale_messages: ranks.iter().map(|rank| rank.stale_messages).sum(),
            leader_http: told.map(|rank| rank.leader_http.clone()).unwrap_or_default(),
            ..GroupReport::default()
        }
    }

    /// Writes the group's series.
    pub(super) fn write_metrics(&self, page: &mut Exposition) {
        use Kind::{Counter, Gauge};
        let report = self.report();
        page.one(Gauge, "llm_tp_group_epoch", "The group's live epoch, or its last one.", report.epoch);
        let ranks: Vec<String> = (0..report.ranks_up.len()).map(|rank| rank.to_string()).collect();
        let labels: Vec<[(&str, &str); 1]> = ranks.iter().map(|rank| [("rank", rank.as_str())]).collect();
        let up: Vec<(&[(&str, &str)], Number)> = labels
            .iter()
            .zip(&report.ranks_up)
            .map(|(label, up)| (label.as_slice(), u64::from(*up).into()))
            .collect();
        page.many(Gauge, "llm_tp_rank_up", "Whether a rank is a member of the group.", &up);
        let labels = GroupState::ALL.map(|state| [("state", state.name())]);
        let states: Vec<(&[(&str, &str)], Number)> = labels
            .iter()
            .zip(GroupState::ALL)
            .map(|(label, state)| (label.as_slice(), u64::from(state == report.state).into()))
            .collect();
        page.many(Gauge, "llm_group_state", "1 for the state that the group is in.", &states);
        let help = "Messages of an older epoch or another process, which changed nothing.";
        page.one(Counter, "llm_group_stale_messages_total", help, report.stale_messages);
        let help = "Times that a rank of this pod was started again.";
        page.one(Counter, "llm_rank_restarts_total", help, (self.restarts)());
        if self.leads.is_some() {
            let help = "Epochs of the group that ended.";
            page.one(Counter, "llm_group_breaks_total", help, report.breaks);
            let help = "Ranks that were refused.";
            page.one(Counter, "llm_group_refusals_total", help, report.refusals);
        }
    }
}
