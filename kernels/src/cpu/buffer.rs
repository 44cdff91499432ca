//! Memory for tensors: aligned to cache lines, zeroed, and committed by the system only where it is touched.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::KernelError;

/// Every tensor starts on a cache line, which is also the width of the widest vector.
pub(crate) const ALIGN: usize = 64;

/// From here on memory comes straight from the system: zeroed lazily, page by page.
const MAP_FROM: usize = 256 * 1024;
pub(crate) const HUGE_PAGE: usize = 2 * 1024 * 1024;

/// Zeroed, cache-line aligned bytes.
pub(crate) struct Bytes {
    ptr: NonNull<u8>,
    len: usize,
    mapped: bool,
}

// SAFETY: Bytes owns its memory like a Vec<u8>; nothing in it is tied to a thread.
unsafe impl Send for Bytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for Bytes {}

impl Bytes {
    /// # Errors
    /// `OutOfMemory` if the system refuses.
    pub(crate) fn try_zeroed(len: usize) -> Result<Self, KernelError> {
        if len >= MAP_FROM { Self::map(len) } else { Ok(Self::allocate(len)) }
    }

    /// As `try_zeroed`, for sizes that a running step cannot do without.
    pub(crate) fn zeroed(len: usize) -> Self {
        match Self::try_zeroed(len) {
            Ok(bytes) => bytes,
            Err(error) => panic!("{error}"),
        }
    }

    /// Asks for huge pages: weights are streamed whole, and 4 KiB pages cost a table walk each.
    pub(crate) fn advise_huge(&self) {
        if self.mapped && self.len >= HUGE_PAGE {
            // SAFETY: the range is our own mapping. The call is advice: its result does not matter.
            unsafe { libc::madvise(self.ptr.as_ptr().cast(), self.len, libc::MADV_HUGEPAGE) };
        }
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) const fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    pub(crate) const fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    fn allocate(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout has a non-zero size.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Self { ptr, len, mapped: false }
    }

    fn map(len: usize) -> Result<Self, KernelError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the system's choice touches no memory of ours.
        let ptr = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if ptr == libc::MAP_FAILED {
            return Err(KernelError::OutOfMemory { bytes: len });
        }
        let ptr = NonNull::new(ptr.cast()).ok_or(KernelError::OutOfMemory { bytes: len })?;
        Ok(Self { ptr, len, mapped: true })
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), ALIGN).expect("below MAP_FROM, so far below isize::MAX")
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if self.mapped {
            // SAFETY: made by `map` with this length, and nobody borrows it any more.
            unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
        } else {
            // SAFETY: made by `allocate` with the same layout.
            unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) };
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` zero-initialised bytes that we own.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

/// Zeroed f32 values for step buffers, aligned for the widest vector. Untouched parts cost no memory.
pub struct Buffer {
    bytes: Bytes,
}

impl Buffer {
    /// # Panics
    /// If the system has no room for `len` values.
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<f32>()).expect("buffer length in bytes");
        Self { bytes: Bytes::zeroed(bytes) }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: aligned to 64 bytes, every bit pattern is an f32, the length rounds down.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr().cast(), self.bytes.len() / 4) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.bytes.as_mut_ptr().cast(), self.bytes.len() / 4) }
    }
}

/// A pointer that workers share to write disjoint parts of one output.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: a plain address; whoever dereferences it keeps the parts disjoint (stated at each use).
unsafe impl<T> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) const fn new(ptr: *mut T) -> Self {
        Self(ptr)
    }

    /// The pointer; a method, so that closures capture the wrapper and not the bare pointer.
    pub(crate) const fn get(&self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_every_size_are_zeroed_and_aligned() {
        for len in [0, 1, 63, 1000, MAP_FROM / 4, MAP_FROM] {
            let mut buffer = Buffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().cast::<u8>().addr().is_multiple_of(ALIGN));
            assert!(buffer.iter().all(|&x| x == 0.0));
            buffer.fill(1.0);
        }
        assert!(matches!(Bytes::try_zeroed(1 << 60), Err(KernelError::OutOfMemory { .. })));
    }
}
