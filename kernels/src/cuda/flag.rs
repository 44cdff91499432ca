//! A word of the host's memory that kernels look at while they run.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{result, sys};

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
        let bytes = size_of::<AtomicU32>();
        // SAFETY: the word is written right below.
        let ptr = unsafe { result::malloc_host(bytes, 0) }.map_err(|error| {
            if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                CudaError::PinnedMemory { asked_bytes: bytes }
            } else {
                CudaError::driver("cuMemHostAlloc", error)
            }
        })?;
        let word = NonNull::new(ptr.cast::<AtomicU32>()).expect("the driver gives no null");
        // SAFETY: memory of our own, which starts on a page.
        unsafe { word.write(AtomicU32::new(0)) };
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
