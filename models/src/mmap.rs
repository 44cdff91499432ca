//! Files mapped into memory for reading: weights are used where they lie in the page cache.
//!
//! This is the crate's only `unsafe`. A mapping shows what the file holds at the time of each read: if another
//! process truncates the file while it is mapped, a read ends the process with SIGBUS. Files of a model are replaced
//! by renaming, never rewritten in place; parsers copy what they decide on (names, sizes, offsets) out of the mapping
//! once and do not read it twice.
#![allow(unsafe_code)]

use crate::error::ModelError;
use std::fs::File;
use std::ops::Deref;
use std::path::Path;

/// A whole file, mapped read-only; unmapped on drop.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps a regular, non-empty file.
    ///
    /// # Errors
    /// [`ModelError::Io`] if the system refuses, [`ModelError::Malformed`] for what is no regular file or is empty.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let shown = crate::error::shown(path);
        // Before opening: to open a named pipe would wait for a writer.
        let metadata = std::fs::metadata(path).map_err(|source| ModelError::io(path, source))?;
        if !metadata.is_file() {
            return Err(ModelError::malformed(&shown, "not a regular file"));
        }
        let file = File::open(path).map_err(|source| ModelError::io(path, source))?;
        if metadata.len() == 0 {
            return Err(ModelError::malformed(&shown, "the file is empty"));
        }
        // SAFETY: the mapping is private and read-only, so this process never writes through it. Undefined
        // behaviour would need another process to change the file while it is read; the module's docs state that
        // requirement on how model files are replaced, and no value read from the mapping is trusted for memory
        // safety: all accesses are slices of its fixed length.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|source| ModelError::io(path, source))?;
        Ok(Self { map })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
