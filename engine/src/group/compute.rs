//! The computing thread of a rank: one job after another, until its epoch is given up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tandem_kernels::cpu::BLOCK_SIZE;
use tandem_models::ForwardBatch;

use super::agent::{Done, Job};
use super::device::{Forming, ShardDevice, ShardError};
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
        let mut batch = ForwardBatch::default();
        // KV blocks of the live epoch, once it has formed.
        let mut num_blocks = None;
        while let Some((epoch, job)) = self.next(jobs) {
            let outcome = match self.aborts.is_over(epoch) {
                true => Ok(Done::Aborted),
                false => self.perform(epoch, job, &mut num_blocks, &mut batch),
            };
            done(
                epoch,
                match outcome {
                    Err(reason) => Done::Unfit(reason),
                    Ok(_) if self.aborts.is_over(epoch) => Done::Aborted,
                    Ok(outcome) => outcome,
                },
            );
        }
    }

    /// Does one job; `Err` says why this rank is not fit for any.
    fn perform(
        &mut self,
        epoch: u64,
        job: Job,
        num_blocks: &mut Option<usize>,
        batch: &mut ForwardBatch,
    ) -> Result<Done, String> {
        match (job, *num_blocks) {
            (Job::Form { num_blocks: wanted, members }, _) => {
                *num_blocks = None;
                let formed = of_moment(self.form(epoch, wanted as usize, &members))?;
                *num_blocks = formed.is_ok().then_some(wanted as usize);
                Ok(Done::Formed(formed))
            }
            (Job::Step(step), Some(num_blocks)) => {
                let result = of_moment(self.step(&step, num_blocks, batch))?;
                Ok(Done::Stepped { step: step.plan.step, result })
            }
            (Job::Poison(blocks), Some(_)) => {
                self.device.fill_nan(&blocks);
                Ok(Done::Poisoned)
            }
            // The agent hands out work of an epoch only after it has formed.
            (Job::Step(_) | Job::Poison(_), None) => Ok(Done::Aborted),
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
        let is_block = |block: &u32| (*block as usize) < num_blocks;
        let fits = |sequence: &PlannedSequence| {
            let end = sequence.context_len as usize + sequence.token_ids.len();
            !sequence.token_ids.is_empty()
                && sequence.token_ids.iter().all(|id| (*id as usize) < vocab_size)
                // A rank has finished every step before it is given the next.
                && sequence.pending_row.is_none()
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

    fn step(
        &mut self,
        step: &Step,
        num_blocks: usize,
        batch: &mut ForwardBatch,
    ) -> Result<Answer, ShardError> {
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
        let output = self.device.step(batch, &rows)?;
        Ok(Answer { step: step.plan.step, forward: output.forward, rows: output.rows })
    }
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
