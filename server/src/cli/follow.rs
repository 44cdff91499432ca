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
    left(ranks, lifecycle, limit, signals).await;
    Ok(())
}

/// Waits until the ranks have left and the last answers are out, or for another signal.
async fn left(ranks: &Ranks, lifecycle: &Lifecycle, limit: Duration, signals: &mut Signals) {
    let end = Instant::now() + limit;
    while !ranks.have_left() && Instant::now() < end {
        tokio::select! {
            () = sleep(POLL) => {}
            _ = signals.next() => return,
        }
    }
    // The leader let the ranks go when it had answered everything; the last bytes of it may still be on their way through here.
    let end = Instant::now() + FLUSH;
    while lifecycle.in_flight() > 0 && Instant::now() < end {
        tokio::select! {
            () = sleep(POLL) => {}
            _ = signals.next() => return,
        }
    }
}

/// Returns when a rank refuses the configuration, about which it has said why.
pub(super) async fn refusal(ranks: &Ranks) -> Exit {
    while !ranks.refused() {
        sleep(POLL).await;
    }
    Exit { code: REFUSED, problems: vec!["a rank of this pod was refused; see above".into()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_last_bytes_of_answers_are_waited_for_but_not_without_end() {
        let (ranks, lifecycle) = (Ranks::none(), Lifecycle::new());
        let mut signals = Signals::install().unwrap();
        let limit = Duration::from_secs(60);
        let start = Instant::now();
        left(&ranks, &lifecycle, limit, &mut signals).await;
        assert!(start.elapsed() < FLUSH / 2, "there is nothing to wait for");

        let answer = lifecycle.request_started();
        let ending = async {
            sleep(Duration::from_millis(300)).await;
            drop(answer);
        };
        tokio::join!(left(&ranks, &lifecycle, limit, &mut signals), ending);
        let waited = start.elapsed();
        assert!(waited >= Duration::from_millis(300) && waited < FLUSH, "{waited:?}");

        let _stuck = lifecycle.request_started();
        left(&ranks, &lifecycle, limit, &mut signals).await;
        assert!(start.elapsed() >= FLUSH);
    }
}
