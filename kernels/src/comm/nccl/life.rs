//! A communicator's life, and its end from any thread.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::library::{Config, Functions, IN_PROGRESS, RawComm, RawId, SUCCESS};
use super::{Nccl, NcclError, NcclUniqueId};
use crate::cuda::{BoundContext, Pause};

/// How long [`NcclAbort::abort`] waits for a call that is just being made, before it leaves the rest to that call's thread.
pub(super) const ABORT_PATIENCE: Duration = Duration::from_secs(2);

/// How long whoever gives a communicator up waits for NCCL to let it go. Usually that takes milliseconds; where graphs still hold
/// collectives it takes until they are dropped, perhaps by the waiting thread itself.
const RELEASE_PATIENCE: Duration = Duration::from_millis(500);

/// Gives one communicator up, from any thread, at any moment: before it exists, while ranks join, in a collective. Clones are the
/// same.
#[derive(Clone, Debug)]
pub struct NcclAbort {
    pub(super) shared: Arc<Shared>,
}

/// One communicator's life.
///
/// NCCL wants one thread at a time in a communicator's functions, so each call holds the lock. No call waits for other ranks, as
/// communicators are non-blocking, but queueing may wait for the device. So giving up does not wait for the lock for ever: the flag
/// is set first, whoever has the lock looks at the flag after releasing it, and so one of the two does it.
pub(super) struct Shared {
    pub(super) nccl: Nccl,
    aborted: AtomicBool,
    comm: Mutex<Comm>,
    released: Arc<Released>,
    /// Of the thread that joined.
    context: OnceLock<Option<BoundContext>>,
}

/// Whether NCCL has let a communicator go.
#[derive(Default)]
struct Released {
    done: Mutex<bool>,
    changed: Condvar,
}

impl Released {
    fn set(&self) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    fn wait(&self, timeout: Duration) -> bool {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(done, timeout, |done| !*done);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

enum Comm {
    NotYet,
    Live(NonNull<c_void>),
    Gone,
}

// SAFETY: a communicator's handle may be used from any thread, one at a time, which the lock sees to.
unsafe impl Send for Comm {}

impl NcclAbort {
    /// For a communicator that is about to be made.
    pub fn new(nccl: Nccl) -> Self {
        let (aborted, comm) = (AtomicBool::new(false), Mutex::new(Comm::NotYet));
        let (released, context) = (Arc::default(), OnceLock::new());
        Self { shared: Arc::new(Shared { nccl, aborted, comm, released, context }) }
    }

    /// Makes everything that runs on the communicator, and all that comes, end with [`NcclError::Aborted`]; its kernels on the device
    /// end too. Returns when that has begun, at the latest after two and a half seconds. Doing it again does nothing.
    ///
    /// A call that is stuck because the device's queue is full is left alone: it ends the communicator when it comes back, and a
    /// process in which it does not come back has to end.
    pub fn abort(&self) {
        self.shared.abort();
    }

    pub fn is_aborted(&self) -> bool {
        self.shared.aborted.load(Ordering::SeqCst)
    }

    /// Waits until NCCL has let the communicator go, which it does not before every graph that holds collectives of it is dropped:
    /// drop them first. False if that has not happened in time, and as long as the communicator is in use.
    pub fn wait_released(&self, timeout: Duration) -> bool {
        self.shared.released.wait(timeout)
    }
}

impl Shared {
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + ABORT_PATIENCE;
        while !self.reap() {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        self.released.wait(RELEASE_PATIENCE);
    }

    /// Takes the communicator away and gives it up, unless somebody is in a call: false then.
    fn reap(&self) -> bool {
        let mut comm = match self.comm.try_lock() {
            Ok(comm) => comm,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => return false,
        };
        let taken = std::mem::replace(&mut *comm, Comm::Gone);
        drop(comm);
        match taken {
            Comm::Live(raw) => self.give_up(raw),
            Comm::NotYet => self.released.set(),
            Comm::Gone => {}
        }
        true
    }

    /// NCCL's abort first tells kernels and threads to end, then waits for graphs that hold collectives. The thread that is here may be
    /// the one to drop those, so another does the waiting.
    fn give_up(&self, raw: NonNull<c_void>) {
        struct Owned(NonNull<c_void>);
        // SAFETY: a communicator's handle may be used from any thread, and nobody else has this one.
        unsafe impl Send for Owned {}
        let (owned, functions, released) = (Owned(raw), self.nccl.functions(), self.released.clone());
        let context = self.context.get().copied().flatten();
        let abort = move || {
            let Owned(raw) = { owned };
            // A thread without a context is on GPU 0 for NCCL, which would make itself a context there, whatever GPU is ours.
            if let Some(context) = context {
                context.bind();
            }
            // Its result does not matter: the communicator is gone either way.
            // SAFETY: the handle is live and nobody else has it any more.
            unsafe { (functions.comm_abort)(raw.as_ptr()) };
            released.set();
        };
        let thread = std::thread::Builder::new().name("nccl-abort".into()).spawn(abort);
        if thread.is_err() {
            // SAFETY: as above; the other thread never began.
            unsafe { (self.nccl.functions().comm_abort)(raw.as_ptr()) };
            self.released.set();
        }
    }

    /// Makes the communicator, without waiting for the other ranks. Gives NCCL's result.
    ///
    /// # Panics
    /// If there was one.
    pub(super) fn join(&self, id: &NcclUniqueId, rank: c_int, size: c_int) -> Result<c_int, NcclError> {
        let mut comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        if self.aborted.load(Ordering::SeqCst) {
            return Err(NcclError::Aborted);
        }
        assert!(matches!(*comm, Comm::NotYet), "an abort handle is for one communicator");
        let _ = self.context.set(BoundContext::of_this_thread());
        let mut raw = std::ptr::null_mut();
        let mut config = Config::non_blocking();
        let init = self.nccl.functions().comm_init_rank_config;
        // SAFETY: a handle is written; the configuration tells its own size and is read before the call returns.
        let code = unsafe { init(&raw mut raw, size, RawId(id.0), rank, &raw mut config) };
        *comm = NonNull::new(raw).map_or(Comm::Gone, Comm::Live);
        drop(comm);
        if raw.is_null() {
            self.released.set();
        }
        self.look_at_flag()?;
        Ok(code)
    }

    /// Lets a communicator go that is finalised. Gives NCCL's result.
    pub(super) fn destroy(&self) -> Result<c_int, NcclError> {
        let mut comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Comm::Live(raw) = std::mem::replace(&mut *comm, Comm::Gone) else {
            return Err(NcclError::Aborted);
        };
        drop(comm);
        // SAFETY: the handle is live, finalised, and nobody else has it any more.
        let code = unsafe { (self.nccl.functions().comm_destroy)(raw.as_ptr()) };
        self.released.set();
        Ok(code)
    }

    /// One call of the library. Gives its result, whatever that says.
    pub(super) fn call(&self, call: impl FnOnce(&Functions, RawComm) -> c_int) -> Result<c_int, NcclError> {
        if self.aborted.load(Ordering::SeqCst) {
            return Err(NcclError::Aborted);
        }
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Comm::Live(raw) = *comm else { return Err(NcclError::Aborted) };
        let code = call(self.nccl.functions(), raw.as_ptr());
        drop(comm);
        self.look_at_flag()?;
        Ok(code)
    }

    /// After the lock was released: what `abort` may have left to do.
    pub(super) fn look_at_flag(&self) -> Result<(), NcclError> {
        if self.aborted.load(Ordering::SeqCst) {
            self.reap();
            return Err(NcclError::Aborted);
        }
        Ok(())
    }

    /// Gives the communicator up because of `error`, which is what the caller gets.
    pub(super) fn fail<T>(&self, error: NcclError) -> Result<T, NcclError> {
        self.abort();
        Err(error)
    }

    /// Whether the communicator has nothing to do any more; a failure gives it up.
    pub(super) fn is_ready(&self, what: &'static str) -> Result<bool, NcclError> {
        let mut state = SUCCESS;
        let code = self.call(|nccl, comm| {
            // SAFETY: the handle is live, and an integer is written.
            unsafe { (nccl.comm_get_async_error)(comm, &raw mut state) }
        })?;
        let (call, code) = if code == SUCCESS { (what, state) } else { ("ncclCommGetAsyncError", code) };
        match code {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => self.fail(self.nccl.failed(call, code)),
        }
    }

    /// Polls until the communicator has done what `code`, the result of `what`, left to do.
    pub(super) fn settle(&self, what: &'static str, code: c_int, timeout: Duration) -> Result<(), NcclError> {
        match code {
            SUCCESS => return Ok(()),
            IN_PROGRESS => {}
            code => return self.fail(self.nccl.failed(what, code)),
        }
        let pause = Pause::new();
        while !self.is_ready(what)? {
            if pause.elapsed() >= timeout {
                return self.fail(NcclError::Timeout { what, ms: timeout.as_millis() });
            }
            pause.wait();
        }
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // What an abort did not come to because the communicator was being made.
        self.reap();
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("aborted", &self.aborted).finish_non_exhaustive()
    }
}
