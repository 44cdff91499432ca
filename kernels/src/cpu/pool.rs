//! Fork-join worker pool of the CPU backend.
//!
//! A decode step of a small model is a few hundred fork-joins, so one must cost about a microsecond: workers spin for
//! ~20 µs after a job before they park, a job is one pointer in shared memory, and nothing is allocated per run. The
//! calling thread is worker 0 and does its share. Only one thread at a time can hold the pool (it is not `Sync`), and a
//! job cannot start another one: a `&Pool` cannot get into a job, which must be `Sync`.
//!
//! # Order of a run
//! One atomic word, the gate, holds an epoch, whether the run is open, how many workers joined it and how many are inside.
//! ```text
//! caller:  job := f, gate := next epoch, open; unpark sleepers ── f(0) ── close the gate, wait until nobody is inside
//! worker:  wait for a new open epoch ── join (compare and swap) ── f(i) ── leave; the last one wakes a parked caller
//! ```
//! `job` is written only while the gate is closed and nobody inside, and read only by workers that joined. With
//! [`Pool::run_items`] and [`Pool::run_shares`] a worker that comes late (its core was taken, or it still wakes up) finds the gate closed and
//! is not waited for: whoever is there does the items. [`Pool::run`] waits until every worker has joined.
//!
//! # Shutdown
//! Drop raises the stop flag, unparks and joins every worker.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::KernelError;

const MAX_THREADS: usize = 256;

/// How long a waiting thread burns its core before it sleeps.
const SPIN: Duration = Duration::from_micros(20);

/// A job with its lifetime erased; `run` outlives every use of it.
type Job = *const (dyn Fn(usize) + Sync);

/// A value on its own cache line (pairs of lines are fetched together).
#[repr(align(128))]
struct Padded<T>(T);

struct Shared {
    gate: Padded<AtomicU64>,
    /// Next unclaimed item of [`Pool::run_items`].
    next_item: Padded<AtomicUsize>,
    /// Of each worker: its unclaimed items of [`Pool::run_shares`].
    shares: Vec<Padded<Share>>,
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    caller_parked: AtomicBool,
    caller: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The gate's fields: `epoch << 33 | open << 32 | joined << 16 | inside`. At most 256 threads fit into 16 bits each.
#[derive(Clone, Copy)]
struct Gate(u64);

impl Gate {
    const OPEN: u64 = 1 << 32;
    const JOIN: u64 = 1 << 16 | 1;

    const fn epoch(self) -> u64 {
        self.0 >> 33
    }

    const fn is_open(self) -> bool {
        self.0 & Self::OPEN != 0
    }

    const fn joined(self) -> usize {
        (self.0 >> 16 & 0xffff) as usize
    }

    const fn inside(self) -> usize {
        (self.0 & 0xffff) as usize
    }
}

/// Consecutive items that are still to do: `first << 32 | end`. The owner takes from the front, others from the end.
#[derive(Default)]
struct Share(AtomicU64);

impl Share {
    /// Published to the workers by the gate.
    fn set(&self, items: Range<usize>) {
        self.0.store((items.start as u64) << 32 | items.end as u64, Ordering::Relaxed);
    }

    const fn items(state: u64) -> Range<usize> {
        (state >> 32) as usize..(state & 0xffff_ffff) as usize
    }

    /// The next item of the owner, who moves past the end once at most.
    fn next(&self) -> Option<usize> {
        let items = Self::items(self.0.fetch_add(1 << 32, Ordering::Relaxed));
        (items.start < items.end).then_some(items.start)
    }

    /// The last item, for somebody else.
    fn steal(&self) -> Option<usize> {
        let shorter = |state| (!Self::items(state).is_empty()).then(|| state - 1);
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shorter).ok()?;
        Some(Self::items(before).end - 1)
    }
}

// SAFETY: `job` is written only by the caller while the gate is closed and empty, and read only by workers inside; the
// job behind it is Sync. Everything else is atomic or locked.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing belongs to one thread.
unsafe impl Send for Shared {}

pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Makes the pool `!Sync`: one caller at a time.
    _one_caller: PhantomData<Cell<()>>,
}

impl Pool {
    /// Starts `threads − 1` workers; the caller is the remaining one.
    ///
    /// # Errors
    /// `InvalidThreads`, or `SpawnWorker` if the system refuses a thread.
    pub(crate) fn new(threads: usize) -> Result<Self, KernelError> {
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(KernelError::InvalidThreads { threads, max: MAX_THREADS });
        }
        let shared = Arc::new(Shared {
            gate: Padded(AtomicU64::new(0)),
            next_item: Padded(AtomicUsize::new(0)),
            shares: (0..threads).map(|_| Padded(Share::default())).collect(),
            job: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            caller_parked: AtomicBool::new(false),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
        });
        // Made before the threads, so that a refused thread stops those already running (Drop).
        let mut pool = Self { shared, workers: Vec::with_capacity(threads - 1), _one_caller: PhantomData };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let handle = thread::Builder::new()
                .name(format!("tandem-cpu-{worker}"))
                .spawn(move || work(&shared, worker))
                .map_err(|error| KernelError::SpawnWorker(error.to_string()))?;
            pool.workers.push(handle);
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(worker)` once on every worker and returns when all are done.
    ///
    /// # Panics
    /// With the panic of a worker, after all have finished.
    pub(crate) fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        self.fork(job, self.workers.len());
    }

    /// Calls `job` on the caller and on every worker that comes before the caller is done, but on `at_least` in any case.
    fn fork(&self, job: &(dyn Fn(usize) + Sync), at_least: usize) {
        if self.workers.is_empty() {
            return job(0);
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `job` outlives its use because this function waits for all workers inside,
        // also when its own share panics.
        let erased = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job) };
        // SAFETY: the gate is closed and empty (one caller), so nobody reads the cell.
        unsafe { *shared.job.get() = Some(erased) };
        let epoch = Gate(shared.gate.0.load(Ordering::Relaxed)).epoch() + 1;
        shared.gate.0.store(epoch << 33 | Gate::OPEN, Ordering::SeqCst);
        for worker in &self.workers {
            // One swap if the worker is awake, a system call only if it sleeps.
            worker.thread().unpark();
        }
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        self.wait(|gate| gate.joined() >= at_least);
        shared.gate.0.fetch_and(!Gate::OPEN, Ordering::SeqCst);
        self.wait(|gate| gate.inside() == 0);
        let panicked = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if let Some(panic) = panicked {
            resume_unwind(panic);
        }
    }

    /// Calls `job(worker, item)` for every item in `0..items`, each once, on whichever worker is free. Items are handed
    /// out in ascending order. Which worker gets one must not matter to the result.
    pub(crate) fn run_items(&self, items: usize, job: impl Fn(usize, usize) + Sync) {
        if items == 1 || self.workers.is_empty() {
            return (0..items).for_each(|item| job(0, item));
        }
        let next = &self.shared.next_item.0;
        // Published to the workers by the gate.
        next.store(0, Ordering::Relaxed);
        let share = |worker| {
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    return;
                }
                job(worker, item);
            }
        };
        self.fork(&share, 0);
    }

    /// As [`Pool::run_items`], but every worker begins with consecutive items of its own, which it does in ascending order, and
    /// then takes over the last ones of others: for items that stream through memory one behind the other.
    pub(crate) fn run_shares(&self, items: usize, job: impl Fn(usize, usize) + Sync) {
        let threads = self.threads();
        if items == 1 || threads == 1 {
            return (0..items).for_each(|item| job(0, item));
        }
        // The owner's number goes one past the end at most.
        assert!(items < u32::MAX as usize, "{items} items");
        let shares = &self.shared.shares;
        for (worker, share) in shares.iter().enumerate() {
            share.0.set(items * worker / threads..items * (worker + 1) / threads);
        }
        let work = |worker: usize| {
            while let Some(item) = shares[worker].0.next() {
                job(worker, item);
            }
            for other in (1..threads).map(|distance| (worker + distance) % threads) {
                while let Some(item) = shares[other].0.steal() {
                    job(worker, item);
                }
            }
        };
        self.fork(&work, 0);
    }

    /// Waits until the gate looks as wanted. Workers wake a parked caller whenever one joins or the last one leaves.
    fn wait(&self, wanted: impl Fn(Gate) -> bool) {
        let shared = &*self.shared;
        let done = || wanted(Gate(shared.gate.0.load(Ordering::SeqCst)));
        if spin_until(done) {
            return;
        }
        *shared.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        shared.caller_parked.store(true, Ordering::SeqCst);
        // Checked after the flag is up: a worker either sees the flag or has already made this true.
        while !done() {
            thread::park();
        }
        shared.caller_parked.store(false, Ordering::SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in &self.workers {
            worker.thread().unpark();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its jobs, so it ends normally.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        let stopped = || shared.stop.load(Ordering::SeqCst);
        let invited = || {
            let gate = Gate(shared.gate.0.load(Ordering::SeqCst));
            gate.is_open() && gate.epoch() != seen
        };
        if !spin_until(|| invited() || stopped()) {
            // An unpark between the check and the park is kept by the token, so no run is slept through.
            while !invited() && !stopped() {
                thread::park();
            }
        }
        if stopped() {
            return;
        }
        let gate = Gate(shared.gate.0.load(Ordering::SeqCst));
        let joined = gate.0 + Gate::JOIN;
        let join =
            || shared.gate.0.compare_exchange(gate.0, joined, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if !gate.is_open() || gate.epoch() == seen || !join() {
            continue;
        }
        seen = gate.epoch();
        wake_caller(shared);
        // SAFETY: published by the gate, and valid until this worker leaves.
        let job = unsafe { (*shared.job.get()).map(|job| &*job) };
        let job = job.expect("an open gate has a job");
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(worker))) {
            *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        if Gate(shared.gate.0.fetch_sub(1, Ordering::SeqCst)).inside() == 1 {
            wake_caller(shared);
        }
    }
}

fn wake_caller(shared: &Shared) {
    if shared.caller_parked.load(Ordering::SeqCst)
        && let Some(caller) = &*shared.caller.lock().unwrap_or_else(PoisonError::into_inner)
    {
        caller.unpark();
    }
}

/// Whether `done` became true within [`SPIN`]. The clock is read once per 32 looks: it costs more than a look.
fn spin_until(done: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..32 {
            if done() {
                return true;
            }
            spin_loop();
        }
        match start {
            None => start = Some(Instant::now()),
            Some(start) if start.elapsed() >= SPIN => return false,
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_runs_every_job_once() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads).unwrap();
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..=2000 {
                pool.run(&|worker| {
                    counts[worker].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == round));
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let pool = Pool::new(3).unwrap();
        let count = AtomicUsize::new(0);
        for _ in 0..20 {
            thread::sleep(Duration::from_micros(200));
            pool.run(&|worker| {
                if worker == 2 {
                    thread::sleep(Duration::from_micros(200)); // long enough that the caller parks
                }
                count.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(count.into_inner(), 60);
    }

    #[test]
    fn every_item_is_done_once_whatever_the_number_of_threads() {
        for threads in 1..=4 {
            let pool = Pool::new(threads).unwrap();
            for items in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                let count = |_, item: usize| {
                    counts[item].fetch_add(1, Ordering::Relaxed);
                };
                pool.run_items(items, count);
                pool.run_shares(items, count);
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 2));
            }
        }
    }

    #[test]
    fn a_share_is_done_in_order_and_the_rest_of_a_slow_one_by_others() {
        let pool = Pool::new(2).unwrap();
        for slow in 0..2 {
            let done = [const { Mutex::new(Vec::new()) }; 2];
            pool.run_shares(100, |worker, item| {
                done[worker].lock().unwrap().push(item);
                while worker == slow && done[1 - slow].lock().unwrap().len() < 90 {
                    thread::yield_now();
                }
            });
            let [front, back] = done.map(|items| items.into_inner().unwrap());
            let (slow, fast) = if slow == 0 { (front, back) } else { (back, front) };
            let (own, stolen) = fast.split_at(50);
            assert!(slow.is_sorted() && own.is_sorted() && stolen.is_sorted_by(|a, b| a > b));
            assert!(stolen.len() >= 40 && slow.len() + fast.len() == 100);
        }
    }

    /// Many tiny runs with more threads than cores: workers come late all the time, and jobs borrow the caller's stack.
    #[test]
    fn late_workers_never_see_a_finished_run() {
        let pool = Pool::new(5).unwrap();
        for round in 0..20_000usize {
            let items = [const { AtomicUsize::new(0) }; 3];
            let add = |_, item: usize| {
                items[item].fetch_add(round + 1, Ordering::Relaxed);
            };
            if round % 2 == 0 {
                pool.run_items(3, add)
            } else {
                pool.run_shares(3, add)
            }
            assert!(items.iter().all(|item| item.load(Ordering::Relaxed) == round + 1));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2).unwrap();
        for failing in 0..2 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|worker| assert!(worker != failing, "worker {failing}"));
            }));
            let message = *result.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("worker {failing}"));
            let count = AtomicUsize::new(0);
            pool.run(&|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 2);
        }
    }

    #[test]
    fn zero_threads_is_an_error() {
        assert!(matches!(Pool::new(0), Err(KernelError::InvalidThreads { threads: 0, .. })));
    }
}
