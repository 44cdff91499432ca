//! A word of the host's memory that kernels look at while they run.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::result;

use super::memory::pin;
use super::{Cuda, CudaError};

/// A u32 in pinned memory, zero at first, which the host may set at any moment and from any thread.
#[derive(Debug)]
pub struct HostFlag {
    cuda: Cuda,
    word: NonNull<AtomicU32>,
}

// SAFETY: it owns the word, which is atomic; the driver's functions take it from any thread.
unsafe impl Send for HostFlag {}
// SAFETY: as above.
unsafe impl Sync for HostFlag {}

impl Cuda {
    /// # Errors
    /// `PinnedMemory` if the system refuses; `InCapture`; `Driver`.
    pub fn host_flag(&self) -> Result<HostFlag, CudaError> {
        self.forbid_in_capture("allocating")?;
        self.bind()?;
        // Zeros are an atomic word of value 0, and pinned memory starts on a page.
        let word = NonNull::new(pin(size_of::<AtomicU32>())?.cast()).expect("the driver gives no null");
        Ok(HostFlag { cuda: self.clone(), word })
    }
}

impl HostFlag {
    pub fn set(&self, value: u32) {
        self.word().store(value, Ordering::SeqCst);
    }

    pub fn get(&self) -> u32 {
        self.word().load(Ordering::SeqCst)
    }

    /// The address of the word on the device, which is that on the host: both have one address space.
    pub fn address(&self) -> u64 {
        self.word.addr().get() as u64
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: it lives as long as `self`.
        unsafe { self.word.as_ref() }
    }
}

impl Drop for HostFlag {
    fn drop(&mut self) {
        // A kernel may still look at it: then it is left to the end of the process.
        if matches!(self.cuda.is_idle(), Ok(true)) {
            // SAFETY: this flag owns the memory, and no kernel runs.
            self.cuda.record(unsafe { result::free_host(self.word.as_ptr().cast()) });
        }
    }
}
