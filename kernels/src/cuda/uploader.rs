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
        self.fill(to, 1, |first, part| part.copy_from_slice(&values[first..first + part.len()]))
    }

    /// The same of values that `fill` puts straight into pinned memory: those from a number on, always whole units of `unit` values.
    ///
    /// # Errors
    /// As [`Uploader::write`].
    ///
    /// # Panics
    /// If `to` is no number of units, or of another device; if a unit is larger than a pinned buffer.
    pub fn fill<T: Element>(
        &mut self,
        to: DeviceSlice<'_, T>,
        unit: usize,
        mut fill: impl FnMut(usize, &mut [T]),
    ) -> Result<(), CudaError> {
        assert!(to.len().is_multiple_of(unit), "units are written whole");
        let most = self.chunks[0].bytes() / size_of::<T>() / unit * unit;
        assert!(most > 0, "a unit of {unit} values is too large");
        for first in (0..to.len()).step_by(most) {
            let len = most.min(to.len() - first);
            let chunk = &mut self.chunks[self.next];
            self.next = 1 - self.next;
            fill(first, chunk.write(0, len)?);
            to.slice(first..first + len).upload(chunk, 0)?;
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
            let triples = buffer.slice::<i32>(0, 99);
            uploader
                .fill(triples, 3, |first, part| {
                    assert!(first.is_multiple_of(3) && part.len().is_multiple_of(3) && part.len() <= 15);
                    part.iter_mut().enumerate().for_each(|(i, value)| *value = (first + i) as i32);
                })
                .unwrap();
            let mut got = vec![0; 99];
            triples.read(&mut got).unwrap();
            assert_eq!(got, (0..99).collect::<Vec<i32>>());
            // The first two chunks wait for nothing; each later one for the one two before it.
            let mut uploader = Uploader::with_chunks(&cuda, 64).unwrap();
            let waits = counter(Stub::Driver, "waits");
            uploader.write(buffer.slice::<i32>(0, 80), &[7; 80]).unwrap();
            assert_eq!(counter(Stub::Driver, "waits") - waits, 3);
        });
    }
}
