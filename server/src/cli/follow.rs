//! `tandem serve` in a pod that does not lead: it keeps its ranks alive, answers probes and metrics, and passes requests on to
//! the leader. On SIGTERM its ranks ask the leader for leave, so that the group pauses between two steps.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::drain::{FLUSH, Signals};
use super::ranks::Ranks;
use super::{Exit, REFUSED};
use crate::lifecycle::{Lifecycle, Phase};

/// How often the ranks are looked after.
const POLL: Duration = Duration::from_millis(20);

/// Runs until a signal, and then until the ranks have left, `limit` at most.
pub(super) async fn follow(
    ranks: &Ranks,
    lifecycle: &Lifecycle,
    limit: Duration,
    signals: &mut Signals,
) -> Result<(), Exit> {
    let cause = tokio::select! {
        cause = signals.next() => cause,
        exit = refusal(ranks) => return Err(exit),
    };
    tracing::info!(?cause, "leaving the group");
    lifecycle.set_with_reason(Phase::Draining, "shutting down");
    ranks.leave();
    let end = Instant::now() + limit;
    while !ranks.have_left() && Instant::now() < end {
        tokio::select! {
            () = sleep(POLL) => {}
            _ = signals.next() => return Ok(()),
        }
    }
    // The leader let the ranks go when it had answered everything; the last bytes of it may still be on their way through here.
    let end = Instant::now() + FLUSH;
    while lifecycle.in_flight() > 0 && Instant::now() < end {
        tokio::select! {
            () = sleep(POLL) => {}
            _ = signals.next() => return Ok(()),
        }
    }
    Ok(())
}

/// Returns when a rank refuses the configuration, about which it has said why.
pub(super) async fn refusal(ranks: &Ranks) -> Exit {
    while !ranks.refused() {
        sleep(POLL).await;
    }
    Exit { code: REFUSED, problems: vec!["a rank of this pod was refused; see above".into()] }
}
