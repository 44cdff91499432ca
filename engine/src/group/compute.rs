//! The computing thread of a rank: one job after another, until its epoch is given up.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tandem_kernels::cpu::BLOCK_SIZE;
use tandem_kernels::cuda::Pause;
use tandem_models::ForwardBatch;

use super::agent::{Done, Job};
use super::device::{Forming, ShardDevice, ShardError, ShardOutput};
use super::mesh::Mesh;
use super::message::{Answer, MemberAddress, Step};
use crate::executor::prepare::prepare;
use crate::sample_row::OwnedRow;
use crate::step_plan::PlannedSequence;

/// How long the computing thread stays awake for the next step.
const SPIN: Duration = Duration::from_micros(100);

/// What is given up, seen by the computing thread and whoever tells it to.
#[derive(Default)]
pub(crate) struct Aborts {
    /// Everything of this epoch and older ones.
    epoch: AtomicU64,
    /// Ends the collectives of the live epoch.
    handle: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Aborts {
    /// Makes whatever of `epoch` or an older one runs end at once.
    pub(super) fn abort(&self, epoch: u64) {
        self.epoch.fetch_max(epoch, Ordering::SeqCst);
        if let Some(abort) = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take() {
            abort();
        }
    }

    fn is_over(&self, epoch: u64) -> bool {
        self.epoch.load(Ordering::SeqCst) >= epoch
    }

    /// Puts what ends an epoch's collectives here; false if the epoch is over already.
    pub(super) fn watch(&self, epoch: u64, abort: impl FnOnce() + Send + 'static) -> bool {
        // Whoever aborts sets the number before it looks for a handle: one of the two sees the other.
        *self.handle.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(abort));
        !self.is_over(epoch)
    }
}

/// Steps that may be begun and not over.
const MAX_BEGUN: usize = 2;

/// A rank's share of the model, and its bounds.
pub(super) struct Compute<'a> {
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) device: Box<dyn ShardDevice>,
    /// Most tokens, and most rows of logits, of one step.
    pub(super) max_tokens: usize,
    pub(super) max_logits_rows: usize,
    /// Whether the rank has cores to itself.
    pub(super) spin: bool,
    pub(super) mesh: &'a Mesh,
    pub(super) aborts: &'a Aborts,
}

impl Compute<'_> {
    /// Does jobs until nobody sends any.
    pub(super) fn run(mut self, jobs: &Receiver<(u64, Job)>, done: impl Fn(u64, Done)) {
        let mut work = Work::default();
        loop {
            let job = match work.begun.len() {
                0 => match self.next(jobs) {
                    None => return,
                    job => job,
                },
                // A device that computes beside this thread has the next step queued by then.
                begun if begun < MAX_BEGUN && self.device.computes_beside() => jobs.try_recv().ok(),
                _ => None,
            };
            if let Some((epoch, job)) = job {
                let outcome = match self.aborts.is_over(epoch) {
                    true => Ok(Some(Done::Aborted)),
                    false => self.perform(epoch, job, &mut work),
                };
                if let Some(outcome) = outcome.transpose() {
                    done(epoch, self.told(epoch, outcome));
                }
            }
            self.look(&mut work, &done);
        }
    }

    /// Tells of the first of the begun steps if it is over. If it failed, so did those behind it.
    fn look(&mut self, work: &mut Work, done: impl Fn(u64, Done)) {
        let Some(first) = work.begun.front_mut() else { return };
        let result = match self.device.poll() {
            Ok(None) => return first.pause.get_or_insert_with(Pause::new).wait(),
            Ok(Some(ShardOutput { forward, rows })) => Ok(Answer { step: first.step, forward, rows }),
            Err(error) => Err(error),
        };
        let has_failed = result.is_err();
        let BegunStep { epoch, step, .. } = work.begun.pop_front().expect("looked at above");
        let outcome = of_moment(result).map(|result| Done::Stepped { step, result });
        done(epoch, self.told(epoch, outcome));
        if has_failed {
            work.num_blocks = None;
            work.begun.drain(..).for_each(|behind| done(behind.epoch, Done::Aborted));
        }
    }

    /// How a job ended, for the agent.
    fn told(&self, epoch: u64, outcome: Result<Done, String>) -> Done {
        match outcome {
            Err(reason) => Done::Unfit(reason),
            Ok(_) if self.aborts.is_over(epoch) => Done::Aborted,
            Ok(outcome) => outcome,
        }
    }

    /// Does one job, or begins it: then there is nothing to tell yet. `Err` says why this rank is not fit for any.
    fn perform(&mut self, epoch: u64, job: Job, work: &mut Work) -> Result<Option<Done>, String> {
        match (job, work.num_blocks) {
            (Job::Form { num_blocks: wanted, members }, _) => {
                work.num_blocks = None;
                let formed = of_moment(self.form(epoch, wanted as usize, &members))?;
                work.num_blocks = formed.is_ok().then_some(wanted as usize);
                Ok(Some(Done::Formed(formed)))
            }
            (Job::Step(step), Some(num_blocks)) => {
                let number = step.plan.step;
                Ok(match of_moment(self.begin(&step, num_blocks, &mut work.batch))? {
                    Ok(()) => {
                        work.begun.push_back(BegunStep { epoch, step: number, pause: None });
                        None
                    }
                    Err(reason) => {
                        work.num_blocks = None;
                        Some(Done::Stepped { step: number, result: Err(reason) })
                    }
                })
            }
            (Job::Poison(blocks), Some(_)) => {
                self.device.fill_nan(&blocks);
                Ok(Some(Done::Poisoned))
            }
            // The agent hands out work of an epoch only after it has formed. After a step that failed nothing of the epoch is right,
            // which the leader may not know yet.
            (Job::Step(_) | Job::Poison(_), None) => Ok(Some(Done::Aborted)),
        }
    }

    /// The next job. In a group that decodes it follows the last one within microseconds, for which a rank with cores of its own
    /// stays awake.
    fn next(&self, jobs: &Receiver<(u64, Job)>) -> Option<(u64, Job)> {
        let start = Instant::now();
        while self.spin && start.elapsed() < SPIN {
            if let Ok(job) = jobs.try_recv() {
                return Some(job);
            }
            std::hint::spin_loop();
        }
        jobs.recv().ok()
    }

    fn form(&mut self, epoch: u64, num_blocks: usize, members: &[MemberAddress]) -> Result<(), ShardError> {
        let own = members.get(self.rank);
        if own.is_none_or(|member| member.incarnation != self.mesh.incarnation())
            || members.len() != self.size
        {
            let reason = "the group's members do not list this process in its place";
            return Err(ShardError::Failed(reason.into()));
        }
        let peers = self.mesh.connect(epoch, members, &|| self.aborts.is_over(epoch));
        let peers = peers.map_err(ShardError::Failed)?;
        let (rank, size, aborts) = (self.rank, self.size, self.aborts);
        self.device.form(Forming { rank, size, epoch, num_blocks, peers, aborts })
    }

    /// Whether a step can be computed at all: what a leader of this version would never send must end in words, not in a panic.
    fn check(&self, step: &Step, num_blocks: usize) -> Result<(), String> {
        let (plan, vocab_size) = (&step.plan, self.device.vocab_size());
        let block_size = plan.block_size as usize;
        let kept_tokens = self.device.kept_tokens();
        let is_block = |block: &u32| (*block as usize) < num_blocks;
        let fits = |sequence: &PlannedSequence| {
            let end = sequence.context_len as usize + sequence.token_ids.len();
            !sequence.token_ids.is_empty()
                && sequence.token_ids.iter().all(|id| (*id as usize) < vocab_size)
                && sequence.pending_row.is_none_or(|row| (row as usize) < kept_tokens)
                && sequence.block_table.len() == end.div_ceil(block_size)
                && sequence.block_table.iter().all(is_block)
                && sequence.logits_rows.iter().all(|row| (*row as usize) < sequence.token_ids.len())
        };
        let copies = &plan.block_copies;
        let holds = block_size == BLOCK_SIZE
            && plan.num_tokens() <= self.max_tokens
            && plan.num_logits_rows() <= self.max_logits_rows
            && plan.sequences.iter().all(fits)
            && copies.iter().all(|copy| is_block(&copy.source) && is_block(&copy.destination));
        if !holds {
            return Err("its plan does not fit this rank".into());
        }
        let num_rows = plan.num_logits_rows();
        let row_fits = |row: &OwnedRow| {
            (row.logits_row as usize) < num_rows && row.token_ids().all(|id| (id as usize) < vocab_size)
        };
        if step.rows.iter().all(row_fits) {
            Ok(())
        } else {
            Err("a sampling row does not fit the step".into())
        }
    }

    fn begin(&mut self, step: &Step, num_blocks: usize, batch: &mut ForwardBatch) -> Result<(), ShardError> {
        let digest = step.plan.digest();
        if digest != step.digest {
            let reason = format!("its plan's digest is {digest:x}, the leader's {:x}", step.digest);
            return Err(ShardError::Failed(reason));
        }
        self.check(step, num_blocks).map_err(ShardError::Failed)?;
        #[cfg(debug_assertions)]
        faults::before_step(step.plan.step);
        prepare(&step.plan, batch);
        let rows: Vec<_> = step.rows.iter().map(OwnedRow::borrow).collect();
        self.device.begin(batch, &rows)
    }
}

/// What the computing thread keeps from job to job.
#[derive(Default)]
struct Work {
    batch: ForwardBatch,
    /// KV blocks of the live epoch, once it has formed and until a step of it fails.
    num_blocks: Option<usize>,
    /// Steps that are not over, in order.
    begun: VecDeque<BegunStep>,
}

struct BegunStep {
    epoch: u64,
    step: u64,
    /// Since it was first looked at.
    pause: Option<Pause>,
}

/// Faults that tests of debug builds ask for by environment variables.
#[cfg(debug_assertions)]
mod faults {
    use std::thread;
    use std::time::Duration;

    /// `TANDEM_TEST_HANG_AT_STEP` and `TANDEM_TEST_PANIC_AT_STEP` name a step in which the computing thread of the first rank that
    /// gets there hangs for ever or panics, if the file of `TANDEM_TEST_FAULT_ONCE` is still there to be removed: a restarted
    /// process does not do it again.
    pub(super) fn before_step(step: u64) {
        let variable = |name| std::env::var(name).ok();
        let is_due = |name| {
            let at = variable(name).and_then(|step| step.parse::<u64>().ok());
            let takes_turn =
                || variable("TANDEM_TEST_FAULT_ONCE").is_some_and(|file| std::fs::remove_file(file).is_ok());
            at.is_some_and(|at| step >= at) && takes_turn()
        };
        assert!(!is_due("TANDEM_TEST_PANIC_AT_STEP"), "a test asked for this");
        if is_due("TANDEM_TEST_HANG_AT_STEP") {
            loop {
                thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

/// A result that the group is told of; `Err` if the rank is not fit for any other.
fn of_moment<T>(result: Result<T, ShardError>) -> Result<Result<T, String>, String> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(ShardError::Failed(reason)) => Ok(Err(reason)),
        Err(ShardError::Unfit(reason)) => Err(reason),
    }
}

#[cfg(test)]
mod tests;
