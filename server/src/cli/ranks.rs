//! The ranks of this pod: child processes of the same binary, watched and restarted one by one.
//!
//! Each has a thread that starts it, reads what it says and waits for its end. A rank that dies is started again, after a pause
//! that grows while it keeps dying. One that refuses the configuration before any process in its place has loaded is not, for it
//! would refuse it again; later a refusal is a matter of the moment: a file that cannot be read, a port that is still taken.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tandem_engine::RankReport;

use super::rank::{LEAVE, ReportLine};
use super::{Exit, REFUSED};

/// Pause before a rank is started again; doubled while it dies young.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// A rank that lived so long did not die of its start.
const OLD_AGE: Duration = Duration::from_secs(60);

/// The pod's ranks. Clones are the same; the processes end with this one.
#[derive(Clone)]
pub(super) struct Ranks {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    ranks: Vec<LocalRank>,
    leaving: bool,
    /// A rank refused the configuration.
    refused: bool,
}

#[derive(Default)]
struct LocalRank {
    report: RankReport,
    orders: Option<ChildStdin>,
    restarts: u64,
    /// A process in its place had the weights in memory.
    has_loaded: bool,
    /// The most KV blocks that a process in its place was told to have.
    held_blocks: u64,
    /// It left the group as it was told to.
    has_left: bool,
}

impl Ranks {
    /// Starts `count` ranks with the arguments of this process's `serve`. `master_port`: where the leader listens, if the
    /// configuration leaves it open.
    pub(super) fn start(
        arguments: &[OsString],
        count: usize,
        master_port: Option<u16>,
    ) -> Result<Self, Exit> {
        let program = std::env::current_exe().map_err(Exit::failed)?;
        let ranks = (0..count).map(|_| LocalRank::default()).collect();
        let shared = Arc::new(Mutex::new(Shared { ranks, leaving: false, refused: false }));
        for local_rank in 0..count {
            let mut command = Command::new(&program);
            command.args(rank_arguments(arguments, local_rank)).stdin(Stdio::piped()).stdout(Stdio::piped());
            command.envs(master_port.map(|port| ("TANDEM_MASTER_PORT", port.to_string())));
            // A terminal's interrupt is for the parent, which ends its ranks itself.
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name(format!("tandem-rank-{local_rank}"))
                .spawn(move || watch(&shared, local_rank, command))
                .map_err(Exit::failed)?;
        }
        Ok(Self { shared })
    }

    /// Of a pod that has none.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self { shared: Arc::new(Mutex::new(Shared { ranks: Vec::new(), leaving: false, refused: false })) }
    }

    /// How each rank is.
    pub(super) fn reports(&self) -> Vec<RankReport> {
        lock(&self.shared).ranks.iter().map(|rank| rank.report.clone()).collect()
    }

    /// How often each rank was started again.
    pub(super) fn restarts(&self) -> Vec<u64> {
        lock(&self.shared).ranks.iter().map(|rank| rank.restarts).collect()
    }

    /// Whether a rank refused the configuration: it has said why on standard error.
    pub(super) fn refused(&self) -> bool {
        lock(&self.shared).refused
    }

    /// Tells all ranks to leave the group and end.
    pub(super) fn leave(&self) {
        let mut shared = lock(&self.shared);
        shared.leaving = true;
        for rank in &mut shared.ranks {
            match &mut rank.orders {
                // A rank that is just dying leaves, too.
                Some(orders) => drop(writeln!(orders, "{LEAVE}")),
                None => rank.has_left = true,
            }
        }
    }

    /// Whether all ranks have ended as they were told to.
    pub(super) fn have_left(&self) -> bool {
        lock(&self.shared).ranks.iter().all(|rank| rank.has_left)
    }
}

/// The command line of a rank: that of `serve` under another name.
fn rank_arguments(arguments: &[OsString], local_rank: usize) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.iter().skip(1).cloned().collect();
    if let Some(command) = arguments.iter().position(|argument| argument == "serve") {
        arguments[command] = "rank".into();
        // Right behind it: the end may be behind a `--`.
        arguments.insert(command + 1, format!("--local-rank={local_rank}").into());
    }
    arguments
}

/// Starts a rank again and again, until it may end.
fn watch(shared: &Mutex<Shared>, local_rank: usize, mut command: Command) {
    let mut pause = FIRST_PAUSE;
    loop {
        let held = lock(shared).ranks[local_rank].held_blocks;
        if held > 0 {
            command.env("TANDEM_HELD_BLOCKS", held.to_string());
        }
        let born = Instant::now();
        let status = match command.spawn() {
            Ok(child) => attend(shared, local_rank, child),
            Err(error) => {
                tracing::error!(local_rank, %error, "a rank cannot be started");
                None
            }
        };
        let mut state = lock(shared);
        let leaving = state.leaving;
        let rank = &mut state.ranks[local_rank];
        rank.orders = None;
        rank.report = RankReport { reasons: vec!["the rank is restarted".into()], ..RankReport::default() };
        if leaving {
            rank.has_left = true;
            return;
        }
        if status == Some(i32::from(REFUSED)) && !rank.has_loaded {
            state.refused = true;
            return;
        }
        rank.restarts += 1;
        drop(state);
        pause = if born.elapsed() >= OLD_AGE { FIRST_PAUSE } else { pause };
        tracing::warn!(
            local_rank,
            ?status,
            pause_ms = pause.as_millis() as u64,
            "a rank has ended, starting it again"
        );
        thread::sleep(pause);
        pause = (2 * pause).min(LAST_PAUSE);
    }
}

/// Reads what a rank says until it ends; its exit code, if it was not killed.
fn attend(shared: &Mutex<Shared>, local_rank: usize, mut child: Child) -> Option<i32> {
    tracing::info!(local_rank, pid = child.id(), "a rank is started");
    let output = child.stdout.take().expect("it is piped");
    {
        let mut state = lock(shared);
        let leaving = state.leaving;
        let rank = &mut state.ranks[local_rank];
        rank.orders = child.stdin.take();
        if leaving && let Some(orders) = &mut rank.orders {
            let _ = writeln!(orders, "{LEAVE}");
        }
    }
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        match serde_json::from_str(&line) {
            Ok(ReportLine(report)) => take_report(&mut lock(shared).ranks[local_rank], report),
            Err(error) => tracing::warn!(local_rank, %error, "a rank says what cannot be understood"),
        }
    }
    child.wait().ok()?.code()
}

fn take_report(rank: &mut LocalRank, report: RankReport) {
    rank.has_loaded |= report.loaded;
    rank.held_blocks = rank.held_blocks.max(report.num_blocks);
    rank.report = report;
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // Nothing panics while it holds the lock.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_has_the_arguments_of_its_parent() {
        let arguments = ["tandem", "serve", "serve", "--tp", "2", "--", "model"].map(OsString::from);
        let expected = ["rank", "--local-rank=1", "serve", "--tp", "2", "--", "model"].map(OsString::from);
        assert_eq!(rank_arguments(&arguments, 1), expected);
    }
}
