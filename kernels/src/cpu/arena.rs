//! Memory of packed weights: large mappings that layers share one behind the other.
//!
//! A decode step streams every weight once. On 4 KiB pages that costs a table walk per page and stops the hardware's
//! prefetch at each border; a small layer alone is too small for a huge page. So layers are cut from mappings that are
//! aligned to huge pages; what no layer has touched yet is not committed. A mapping is freed with its last layer.

use std::ops::Deref;
use std::sync::Arc;

use super::buffer::{ALIGN, Bytes, HUGE_PAGE};
use crate::KernelError;

const CHUNK: usize = 64 * 1024 * 1024;

/// Hands out memory front to back.
#[derive(Default)]
pub(crate) struct Arena {
    chunk: Option<Arc<Bytes>>,
    used: usize,
}

/// Bytes of one layer, zeroed when handed out.
pub(crate) struct Region {
    chunk: Arc<Bytes>,
    start: usize,
    len: usize,
}

impl Arena {
    /// # Errors
    /// `OutOfMemory` if the system refuses.
    pub(crate) fn take(&mut self, len: usize) -> Result<Region, KernelError> {
        let too_large = KernelError::OutOfMemory { bytes: len };
        let padded = len.checked_next_multiple_of(ALIGN).ok_or(too_large)?;
        let chunk = match &self.chunk {
            Some(chunk) if chunk.len() - self.used >= padded => Arc::clone(chunk),
            _ => {
                // One huge page more than asked for, to start on one.
                let bytes = padded.max(CHUNK).checked_add(HUGE_PAGE);
                let chunk = Bytes::try_zeroed(bytes.ok_or(KernelError::OutOfMemory { bytes: len })?)?;
                chunk.advise_huge();
                self.used = chunk.as_ptr().align_offset(HUGE_PAGE);
                let chunk = Arc::new(chunk);
                self.chunk = Some(Arc::clone(&chunk));
                chunk
            }
        };
        let start = self.used;
        self.used += padded;
        Ok(Region { chunk, start, len })
    }
}

impl Region {
    /// For filling it, before anything reads it.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.chunk.as_ptr().wrapping_add(self.start).cast_mut()
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: inside the chunk, which the region keeps alive. Only these bytes: others may be being filled. They were
        // zeroed by the system and are written only before the region is first read.
        unsafe { std::slice::from_raw_parts(self.chunk.as_ptr().add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_apart_and_zeroed() {
        let mut arena = Arena::default();
        let mut regions: Vec<Region> =
            [1, 64, 100, CHUNK - 1, CHUNK + 1, 7].into_iter().map(|len| arena.take(len).unwrap()).collect();
        drop(arena);
        for (i, region) in regions.iter_mut().enumerate() {
            assert!(region.as_ptr().addr().is_multiple_of(ALIGN));
            let (ends, len) = ([0, region.len() - 1], region.len());
            for end in ends {
                assert!(len == 1 || region[end] == 0);
                // SAFETY: inside the region, which nobody else borrows.
                unsafe { *region.as_mut_ptr().add(end) = i as u8 + 1 };
            }
        }
        for (i, region) in regions.iter().enumerate() {
            assert!(region[0] == i as u8 + 1 && region[region.len() - 1] == i as u8 + 1);
        }
        assert!(matches!(Arena::default().take(usize::MAX), Err(KernelError::OutOfMemory { .. })));
    }
}
