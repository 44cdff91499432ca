//! One rank's communicator, its collectives, and the wait for them.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

use half::bf16;

use super::library::{Functions, RawComm, SUCCESS, SUM};
use super::life::{NcclAbort, Shared};
use super::{NcclError, NcclUniqueId};
use crate::cuda::{Cuda, CudaError, DeviceSlice, Element, Pause};

/// One rank's end of a group of GPUs. Dropped, it is given up. Graphs that hold collectives of it are dropped before.
#[derive(Debug)]
pub struct NcclCommunicator {
    shared: Arc<Shared>,
    rank: usize,
    size: usize,
    options: NcclOptions,
}

/// A wait for a step that is under way.
#[derive(Debug)]
pub struct NcclWait {
    pause: Pause,
    /// Of the time so far, when the communicator is to be looked at again.
    watched: Duration,
    timeout: Duration,
}

impl NcclWait {
    const WATCH: Duration = Duration::from_millis(1);

    pub fn begin(timeout: Duration) -> Self {
        Self { pause: Pause::new(), watched: Duration::ZERO, timeout }
    }
}

impl NcclCommunicator {
    /// Joins the communicator `id` as `rank` of `size`, with all others; the calling thread is bound to this rank's device
    /// ([`Cuda::bind`]). Waits until all have joined. `abort` gives it up meanwhile and afterwards, and is of no use for another.
    ///
    /// # Errors
    /// `Timeout` when not all have joined in time, `Aborted`, `Failed`.
    ///
    /// # Panics
    /// If `rank` is not below `size`, or if `abort` has had a communicator.
    pub fn init(
        abort: &NcclAbort,
        id: &NcclUniqueId,
        (rank, size): (usize, usize),
        options: NcclOptions,
    ) -> Result<Self, NcclError> {
        assert!(rank < size, "rank {rank} of {size}");
        let int = |value: usize| c_int::try_from(value).expect("a group has few ranks");
        let shared = abort.shared.clone();
        let code = shared.join(id, int(rank), int(size))?;
        shared.settle("ncclCommInitRankConfig", code, options.init_timeout)?;
        Ok(Self { shared, rank, size, options })
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn size(&self) -> usize {
        self.size
    }

    /// For the thread that may have to give the group up.
    pub fn abort_handle(&self) -> NcclAbort {
        NcclAbort { shared: self.shared.clone() }
    }

    /// Queues the sum of all ranks' `values`, in place. May be captured.
    ///
    /// # Errors
    /// `Failed`, `Timeout`, `Aborted`. Beyond queueing, failures show in [`NcclCommunicator::wait`].
    pub fn all_reduce<T: NcclElement>(&self, values: DeviceSlice<'_, T>) -> Result<(), NcclError> {
        let stream = self.bound(values)?;
        // SAFETY: the slice is that long, on the stream's device.
        unsafe { self.all_reduce_raw::<T>(values.address(), values.address(), values.len(), stream) }
    }

    /// Queues that every rank's `own` [N] comes to all, one after another in the order of ranks: `all` [size · N]. `own` may be
    /// this rank's part of `all`. May be captured.
    ///
    /// # Errors
    /// As [`NcclCommunicator::all_reduce`].
    ///
    /// # Panics
    /// If lengths do not fit.
    pub fn all_gather<T: NcclElement>(
        &self,
        own: DeviceSlice<'_, T>,
        all: DeviceSlice<'_, T>,
    ) -> Result<(), NcclError> {
        assert_eq!(all.len(), self.size * own.len(), "all ranks' values");
        let stream = self.bound(all)?;
        // SAFETY: the slices are that long, on the stream's device.
        unsafe { self.all_gather_raw::<T>(own.address(), all.address(), own.len(), stream) }
    }

    /// Queues that rank `root`'s `values` come to all, in place. May be captured.
    ///
    /// # Errors
    /// As [`NcclCommunicator::all_reduce`].
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn broadcast<T: NcclElement>(
        &self,
        values: DeviceSlice<'_, T>,
        root: usize,
    ) -> Result<(), NcclError> {
        let stream = self.bound(values)?;
        // SAFETY: the slice is that long, on the stream's device.
        unsafe { self.broadcast_raw::<T>(values.address(), values.len(), root, stream) }
    }

    /// As [`NcclCommunicator::all_reduce`], from `send` to `receive`, which may be the same.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// Both are addresses of `len` values on the device of `stream` (a `cudaStream_t`), until the collective is over.
    pub unsafe fn all_reduce_raw<T: NcclElement>(
        &self,
        send: u64,
        receive: u64,
        len: usize,
        stream: *mut c_void,
    ) -> Result<(), NcclError> {
        self.queue("ncclAllReduce", |nccl, comm| {
            // SAFETY: the handle is live; the rest is this function's contract.
            unsafe { (nccl.all_reduce)(at(send), at(receive), len, T::DATA_TYPE, SUM, comm, stream) }
        })
    }

    /// As [`NcclCommunicator::all_gather`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// `own` is the address of `len` values and `all` of `size · len`, on the device of `stream`, until the collective is over.
    pub unsafe fn all_gather_raw<T: NcclElement>(
        &self,
        own: u64,
        all: u64,
        len: usize,
        stream: *mut c_void,
    ) -> Result<(), NcclError> {
        self.queue("ncclAllGather", |nccl, comm| {
            // SAFETY: the handle is live; the rest is this function's contract.
            unsafe { (nccl.all_gather)(at(own), at(all), len, T::DATA_TYPE, comm, stream) }
        })
    }

    /// As [`NcclCommunicator::broadcast`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// If there is no such rank.
    ///
    /// # Safety
    /// `values` is the address of `len` values on the device of `stream`, until the collective is over.
    pub unsafe fn broadcast_raw<T: NcclElement>(
        &self,
        values: u64,
        len: usize,
        root: usize,
        stream: *mut c_void,
    ) -> Result<(), NcclError> {
        assert!(root < self.size, "rank {root} of {}", self.size);
        let root = c_int::try_from(root).expect("a group has few ranks");
        self.queue("ncclBroadcast", |nccl, comm| {
            // SAFETY: the handle is live; the rest is this function's contract.
            unsafe { (nccl.broadcast)(at(values), at(values), len, T::DATA_TYPE, root, comm, stream) }
        })
    }

    /// Waits until `is_done` says so ([`Cuda::is_idle`], or whether the step's results are there), while it watches the
    /// communicator. A failure, or `timeout` passed, gives it up.
    ///
    /// # Errors
    /// `Failed` for an asynchronous failure, `Timeout`, `Aborted`, and what `is_done` returns.
    pub fn wait(
        &self,
        timeout: Duration,
        mut is_done: impl FnMut() -> Result<bool, CudaError>,
    ) -> Result<(), NcclError> {
        let mut wait = NcclWait::begin(timeout);
        while !self.look(&mut wait, &mut is_done)? {
            wait.pause.wait();
        }
        Ok(())
    }

    /// One look of [`NcclCommunicator::wait`], for who has other things to do in between; whether the wait is over.
    ///
    /// # Errors
    /// As [`NcclCommunicator::wait`].
    pub fn look(
        &self,
        wait: &mut NcclWait,
        is_done: impl FnOnce() -> Result<bool, CudaError>,
    ) -> Result<bool, NcclError> {
        match is_done() {
            Ok(true) => return self.shared.look_at_flag().map(|()| true),
            Ok(false) => {}
            Err(error) => return self.shared.fail(error.into()),
        }
        let elapsed = wait.pause.elapsed();
        if elapsed >= wait.watched {
            // Work in progress beside the stream (a connection being made) is no failure.
            self.shared.is_ready("a collective")?;
            wait.watched = elapsed + NcclWait::WATCH;
        } else {
            self.shared.look_at_flag()?;
        }
        if elapsed >= wait.timeout {
            let ms = wait.timeout.as_millis();
            return self.shared.fail(NcclError::Timeout { what: "a step's collectives", ms });
        }
        Ok(false)
    }

    /// Leaves in order, with all other ranks: nothing of theirs that is in flight is lost. Graphs that hold collectives of this
    /// communicator have to be dropped before.
    ///
    /// # Errors
    /// `Timeout` if they do not, `Failed`, `Aborted`; the communicator is given up then.
    pub fn close(self, timeout: Duration) -> Result<(), NcclError> {
        let code = self.shared.call(|nccl, comm| {
            // SAFETY: the handle is live.
            unsafe { (nccl.comm_finalize)(comm) }
        })?;
        self.shared.settle("ncclCommFinalize", code, timeout)?;
        let code = self.shared.destroy()?;
        if code == SUCCESS { Ok(()) } else { Err(self.shared.nccl.failed("ncclCommDestroy", code)) }
    }

    fn queue(
        &self,
        what: &'static str,
        call: impl FnOnce(&Functions, RawComm) -> c_int,
    ) -> Result<(), NcclError> {
        let code = self.shared.call(call)?;
        self.shared.settle(what, code, self.options.call_timeout)
    }

    /// Binds the calling thread to the slice's device; its stream.
    fn bound<T: Element>(&self, values: DeviceSlice<'_, T>) -> Result<*mut c_void, NcclError> {
        let cuda: &Cuda = values.cuda();
        cuda.bind()?;
        Ok(cuda.stream_handle())
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        self.shared.abort();
    }
}

/// Deadlines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NcclOptions {
    /// For all ranks to join.
    pub init_timeout: Duration,
    /// For queueing one collective; the first ones also connect.
    pub call_timeout: Duration,
}

impl Default for NcclOptions {
    fn default() -> Self {
        Self { init_timeout: Duration::from_secs(120), call_timeout: Duration::from_secs(30) }
    }
}

/// Types of collectives.
pub trait NcclElement: Element {
    /// `ncclDataType_t`.
    const DATA_TYPE: i32;
}

impl NcclElement for u8 {
    const DATA_TYPE: i32 = 1;
}

impl NcclElement for i32 {
    const DATA_TYPE: i32 = 2;
}

impl NcclElement for f32 {
    const DATA_TYPE: i32 = 7;
}

impl NcclElement for bf16 {
    const DATA_TYPE: i32 = 9;
}

fn at(address: u64) -> *mut c_void {
    address as *mut c_void
}
