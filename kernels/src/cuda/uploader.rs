//! Weights to the device.

use super::{Cuda, CudaError, DeviceSlice, Element, PinnedBuffer};

/// Bytes that are copied at once.
const CHUNK_BYTES: usize = 16 << 20;

/// Copies ordinary host memory to the device by two pinned buffers: while one is on its way, the other is filled, which for a mapped
/// file is when it is read. Dropped when the weights are there.
#[derive(Debug)]
pub struct Uploader {
    chunks: [PinnedBuffer; 2],
    next: usize,
}

impl Uploader {
    /// # Errors
    /// `PinnedMemory`, `InCapture`, `Driver`.
    pub fn new(cuda: &Cuda) -> Result<Self, CudaError> {
        Self::with_chunks(cuda, CHUNK_BYTES)
    }

    fn with_chunks(cuda: &Cuda, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self { chunks: [cuda.alloc_pinned(bytes)?, cuda.alloc_pinned(bytes)?], next: 0 })
    }

    /// Copies `values` to all of `to`. They have been read when this returns, and are on the device for whatever is queued afterwards.
    ///
    /// # Errors
    /// `InCapture`, `Driver`.
    ///
    /// # Panics
    /// If `to` is not as long as `values`, or of another device.
    pub fn write<T: Element>(&mut self, to: DeviceSlice<'_, T>, values: &[T]) -> Result<(), CudaError> {
        assert_eq!(to.len(), values.len(), "a slice is written whole");
        let most = self.chunks[0].bytes() / size_of::<T>();
        for (i, part) in values.chunks(most).enumerate() {
            let chunk = &mut self.chunks[self.next];
            self.next = 1 - self.next;
            chunk.write(0, part.len())?.copy_from_slice(part);
            to.slice(i * most..i * most + part.len()).upload(chunk, 0)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::{ALL, open};
    use crate::stub::{Stub, counter, in_child};

    #[test]
    fn everything_arrives_and_chunks_alternate() {
        in_child((module_path!(), "everything_arrives_and_chunks_alternate"), &ALL, &[], || {
            let cuda = open();
            let mut uploader = Uploader::with_chunks(&cuda, 64).unwrap();
            let buffer = cuda.alloc(4 * 100).unwrap();
            for len in [0, 1, 15, 16, 17, 32, 33, 100] {
                let values: Vec<i32> = (0..len).map(|i| i * 3 + len).collect();
                let to = buffer.slice::<i32>(0, values.len());
                uploader.write(to, &values).unwrap();
                let mut got = vec![0; values.len()];
                to.read(&mut got).unwrap();
                assert_eq!(got, values);
            }
            // The first two chunks wait for nothing; each later one for the one two before it.
            let mut uploader = Uploader::with_chunks(&cuda, 64).unwrap();
            let waits = counter(Stub::Driver, "waits");
            uploader.write(buffer.slice::<i32>(0, 80), &[7; 80]).unwrap();
            assert_eq!(counter(Stub::Driver, "waits") - waits, 3);
        });
    }
}
