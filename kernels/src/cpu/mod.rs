//! The CPU backend: a worker pool, the instruction set chosen at start, and the operations of a step.
//!
//! # Where things are
//! * [`simd`] is the vector that operations are written over; `std::arch` appears only below it.
//! * [`pack`] repacks weights once at load, [`linear`] multiplies them, [`embed`] reads rows back.
//! * [`activation`] holds the input of a linear layer in its numeric class; [`norm`] and `quantize` fill it.
//! * [`kv_cache`], [`rope`] and [`attention`] are the paged cache and what writes and reads it.
//! * [`team`] says who does an operation: all workers, or each its own rows.
//! * [`reference`] is the plain oracle that tests compare with.
//!
//! # Threads
//! [`Cpu`] is `Send` but not `Sync`: the step thread owns it, calls operations one after another and is worker 0 of
//! each. Scratch memory per worker is reserved when the backend starts, and operations do not
//! allocate, with one exception: the partial results of a long context whose spans are shared out grow with the longest
//! context seen.

// An unsafe function lists its caller's duties; saying them again line by line inside would hide the arithmetic.
#![allow(unsafe_op_in_unsafe_fn)]

mod activation;
mod arena;
mod attention;
mod buffer;
mod embed;
mod isa;
mod kv_cache;
mod linear;
pub(crate) mod math;
mod norm;
mod pack;
mod peak;
mod pool;
#[cfg(test)]
pub(crate) mod reference;
mod rope;
pub(crate) mod simd;
mod team;
mod threads;

use std::cell::RefCell;

pub use activation::Activation;
pub use attention::{AttentionBatch, MAX_GROUP};
pub use buffer::Buffer;
pub use kv_cache::{BLOCK_SIZE, KvCache, KvCacheConfig, MAX_HEAD_DIM};
pub use linear::Epilogue;
pub use pack::{Layout, Linear, LinearSpec, MAX_SEGMENTS, Part, SegmentPlan};
pub use rope::Rope;
pub use team::{BLOCK_ROWS, Team};
pub use threads::default_threads;

pub(crate) use buffer::{Bytes, SharedMut};
pub(crate) use isa::Detected;
pub(crate) use peak::{Peak, measure_peak, read_all};

use self::arena::Arena;
use self::pool::Pool;
use crate::{Isa, KernelError};

/// How to start the backend; the default is the widest instruction set and [`default_threads`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    pub isa: Option<Isa>,
    pub threads: Option<usize>,
}

/// The CPU backend. Its operations are in the modules of what they compute.
pub struct Cpu {
    isa: Detected,
    pool: Pool,
    scratch: Scratch,
    /// Partial results of attention spans; grows with the longest context seen.
    span_partials: RefCell<Bytes>,
    /// Running count of attention tiles per sequence of the step.
    tile_ends: RefCell<Vec<usize>>,
    /// Where the next packed layer goes.
    weights: RefCell<Arena>,
}

impl Cpu {
    /// # Errors
    /// `UnsupportedIsa` if a forced ISA is not there, `InvalidThreads`, `SpawnWorker`.
    pub fn new(options: CpuOptions) -> Result<Self, KernelError> {
        let isa = options.isa.map_or_else(|| Ok(isa::best()), isa::require)?;
        let pool = Pool::new(options.threads.unwrap_or_else(default_threads))?;
        let scratch = Scratch::new(pool.threads());
        let span_partials = RefCell::new(Bytes::zeroed(0));
        Ok(Self {
            isa,
            pool,
            scratch,
            span_partials,
            tile_ends: RefCell::default(),
            weights: RefCell::default(),
        })
    }

    /// Whether a backend with this ISA can be made.
    ///
    /// # Errors
    /// `UnsupportedIsa`.
    pub fn check_isa(isa: Isa) -> Result<(), KernelError> {
        isa::require(isa).map(drop)
    }

    pub const fn isa(&self) -> Isa {
        self.isa.isa()
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// As [`Team`]'s, on all workers.
    pub(crate) fn for_row_ranges(
        &self,
        rows: usize,
        cols: usize,
        job: impl Fn(std::ops::Range<usize>) + Sync,
    ) {
        self.team().for_row_ranges(rows, cols, job);
    }

    pub(crate) const fn detected(&self) -> Detected {
        self.isa
    }

    /// As [`Pool::run_items`].
    pub(crate) fn run_items(&self, items: usize, job: impl Fn(usize, usize) + Sync) {
        self.pool.run_items(items, job);
    }
}

/// Private memory of each worker, reserved at start and committed when touched.
struct Scratch {
    bytes: buffer::SharedMut<u8>,
    _owner: Bytes,
}

impl Scratch {
    /// Enough for the partial sums of `linear` and for one item of `attention`.
    const PER_WORKER: usize = 4 * 1024 * 1024;

    fn new(workers: usize) -> Self {
        let mut owner = Bytes::zeroed(workers * Self::PER_WORKER);
        Self { bytes: buffer::SharedMut::new(owner.as_mut_ptr()), _owner: owner }
    }

    /// The worker's own `PER_WORKER` bytes, aligned to cache lines, contents left over from before.
    ///
    /// # Safety
    /// Only worker `worker` of the running job uses the pointer.
    unsafe fn of(&self, worker: usize) -> *mut u8 {
        self.bytes.get().add(worker * Self::PER_WORKER)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Backends of every ISA that the machine has, and deterministic data.

    use super::*;

    pub(crate) fn backends(threads: usize) -> Vec<Cpu> {
        Isa::ALL
            .into_iter()
            .filter(|&isa| isa::require(isa).is_ok())
            .map(|isa| Cpu::new(CpuOptions { isa: Some(isa), threads: Some(threads) }).unwrap())
            .collect()
    }

    /// xorshift64*; every test names its seed.
    pub(crate) struct Random(u64);

    impl Random {
        pub(crate) fn new(seed: u64) -> Self {
            Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
        }

        pub(crate) fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        /// In −1..1.
        pub(crate) fn f32(&mut self) -> f32 {
            (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }

        pub(crate) fn below(&mut self, n: usize) -> usize {
            (self.next() % n as u64) as usize
        }

        pub(crate) fn vec(&mut self, len: usize) -> Vec<f32> {
            (0..len).map(|_| self.f32()).collect()
        }
    }
}
