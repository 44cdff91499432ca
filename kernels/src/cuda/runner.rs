//! The project's kernels on a device.

use std::cell::RefCell;

use super::driver;
use super::launcher::Launch;
use super::sources::{PRELUDE, SOURCES};
use super::{Cuda, CudaError, Graph, KernelCache, KernelSet, LaunchShape, Target};

/// A device with all kernels.
#[derive(Debug)]
pub struct Runner {
    cuda: Cuda,
    kernels: RefCell<KernelSet>,
    /// Whether launches begin while the one before still runs.
    overlaps: bool,
}

/// Drivers from this one on record launches that overlap.
const DRIVER_THAT_RECORDS_OVERLAPS: i32 = 12_030;

impl Runner {
    /// Compiles the kernels for the device, or finds them in `cache`, and loads them.
    ///
    /// # Errors
    /// [`CudaError`] of the compiler or the driver.
    pub fn load(cuda: &Cuda, cache: &KernelCache) -> Result<Self, CudaError> {
        let kernels = RefCell::new(KernelSet::load(cuda, cache, PRELUDE, sources())?);
        let overlaps =
            cuda.target().waits_for_launches() && driver::driver_version()? >= DRIVER_THAT_RECORDS_OVERLAPS;
        Ok(Self { cuda: cuda.clone(), kernels, overlaps })
    }

    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// Queues a launch.
    ///
    /// The memory of a device is none of this program: an address that is none, or of something else, makes the device fail or
    /// compute nonsense, but harms no value of Rust's. Whoever makes launches answers for their addresses.
    ///
    /// # Errors
    /// [`CudaError`] of the driver; what the kernel does wrong comes when something waits for it.
    ///
    /// # Panics
    /// If there is no such module.
    pub fn launch(&self, launch: &Launch) -> Result<(), CudaError> {
        if launch.is_empty() {
            return Ok(());
        }
        let shape = LaunchShape {
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            shared_bytes: launch.shared_bytes,
            // All of the project's kernels wait by themselves, which the emulator checks.
            overlaps: self.overlaps,
        };
        let words = launch.args().iter().map(|arg| arg.bits());
        // SAFETY: the launcher's functions give every kernel its parameters, which the emulator compares with the source; for the
        // addresses see above.
        unsafe { self.kernels.borrow_mut().launch_words(launch.module, launch.kernel, shape, words) }
    }

    /// Queues a graph's work; for its addresses [`Runner::launch`]'s words hold.
    ///
    /// # Errors
    /// [`CudaError`] of the driver.
    pub fn replay(&self, graph: &mut Graph) -> Result<(), CudaError> {
        // SAFETY: as in `launch`; the kernels live as long as `self`, which recorded them.
        unsafe { graph.replay() }
    }
}

/// Compiles every source for a target into `cache`; how many there are. Needs no GPU.
///
/// # Errors
/// [`CudaError`] of the compiler.
pub fn fill_cache(cache: &KernelCache, target: Target) -> Result<usize, CudaError> {
    KernelSet::fill_cache(cache, PRELUDE, sources(), &[target])?;
    Ok(SOURCES.len())
}

/// Names and texts.
fn sources() -> impl Iterator<Item = (&'static str, &'static str)> {
    SOURCES.iter().map(|source| (source.module, source.text))
}
