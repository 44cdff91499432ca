//! A group of ranks that breaks when a test says so, stays away for some polls, and comes back with other
//! memory.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::executor::ExecutorStatus;

/// What shall happen to the group, and what was seen; shared with the test.
#[derive(Default)]
pub(crate) struct GroupFaults {
    next_break: Mutex<Option<(Moment, u64)>>,
    heals: AtomicBool,
    /// A rank wants to leave: nobody is admitted.
    pub(crate) leaving: AtomicBool,
    /// The group is beyond help.
    pub(crate) failed: AtomicBool,
    pub(crate) polls: AtomicU64,
    /// What the last poll was told.
    pub(crate) in_flight: AtomicU64,
    pub(crate) breaks: AtomicU64,
    /// Requests that drew a token before a break and were in a step after it, once per break.
    pub(crate) resumes: AtomicU64,
}

/// When a break is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// At the next poll.
    BetweenSteps,
    /// In the next step, of which nothing has been done.
    BeforeWrites,
    /// In the next step, whose KV has been written.
    AfterWrites,
}

impl GroupFaults {
    /// The group breaks at the next such moment and is away for `polls` polls.
    pub(crate) fn break_group(&self, moment: Moment, polls: u64) {
        *self.next_break.lock().unwrap() = Some((moment, polls));
    }

    /// A group that is away is whole at the next poll.
    pub(crate) fn heal(&self) {
        self.heals.store(true, Ordering::Relaxed);
    }

    fn take_break(&self, at: Moment) -> Option<u64> {
        self.next_break.lock().unwrap().take_if(|(moment, _)| *moment == at).map(|(_, polls)| polls)
    }
}

/// The executor's side.
pub(crate) struct FakeGroup {
    epoch: u64,
    /// Polls until the group is whole, when it is not.
    missing_polls: Option<u64>,
    /// A step was lost and not given up yet.
    wants_abort: bool,
    /// Requests that drew a token.
    with_output: HashSet<u64>,
    /// Those that have not been in a step since the last break.
    interrupted: HashSet<u64>,
}

impl FakeGroup {
    pub(crate) fn new() -> Self {
        Self {
            epoch: 1,
            missing_polls: None,
            wants_abort: false,
            with_output: HashSet::new(),
            interrupted: HashSet::new(),
        }
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn assert_whole(&self) {
        assert!(self.missing_polls.is_none(), "work for a group that is not whole");
        assert!(!self.wants_abort, "a lost step was not given up");
    }

    pub(crate) fn abort(&mut self) {
        self.wants_abort = false;
    }

    /// Whether the step breaks at this moment of it.
    pub(crate) fn breaks_at(&mut self, moment: Moment, faults: &GroupFaults) -> bool {
        let Some(polls) = faults.take_break(moment) else { return false };
        self.wants_abort = true;
        self.lose(polls, faults);
        true
    }

    /// A step went through: it held these requests, and these of them drew a token.
    pub(crate) fn ran(&mut self, held: impl Iterator<Item = u64>, drew: Vec<u64>, faults: &GroupFaults) {
        let resumed = held.filter(|request| self.interrupted.remove(request)).count();
        faults.resumes.fetch_add(resumed as u64, Ordering::Relaxed);
        self.with_output.extend(drew);
    }

    pub(crate) fn poll(&mut self, in_flight: usize, faults: &GroupFaults) -> ExecutorStatus {
        faults.polls.fetch_add(1, Ordering::Relaxed);
        faults.in_flight.store(in_flight as u64, Ordering::Relaxed);
        if faults.failed.load(Ordering::Relaxed) {
            return ExecutorStatus::Failed { reason: "told to".into() };
        }
        if self.missing_polls.is_none()
            && let Some(polls) = faults.take_break(Moment::BetweenSteps)
        {
            self.lose(polls, faults);
        }
        if faults.heals.swap(false, Ordering::Relaxed) {
            self.missing_polls = self.missing_polls.map(|_| 0);
        }
        match &mut self.missing_polls {
            Some(0) => {
                self.missing_polls = None;
                self.epoch += 1;
            }
            Some(polls) => {
                *polls -= 1;
                return ExecutorStatus::Waiting { reason: "a rank is missing".into() };
            }
            None => {}
        }
        ExecutorStatus::Ready { epoch: self.epoch, admits: !faults.leaving.load(Ordering::Relaxed) }
    }

    fn lose(&mut self, polls: u64, faults: &GroupFaults) {
        faults.breaks.fetch_add(1, Ordering::Relaxed);
        self.missing_polls = Some(polls);
        self.interrupted.clone_from(&self.with_output);
    }
}
