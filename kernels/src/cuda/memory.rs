//! Memory: buffers on the device, pinned buffers on the host, and copies between them.
//!
//! A [`DeviceBuffer`] is bytes; a [`DeviceSlice`] is a typed range of one. Writing needs no exclusive borrow: device memory is
//! no memory of this program, and the one stream orders what is done to it. Pinned memory is, and the device reads and writes
//! it some time after the call, so a [`PinnedBuffer`] remembers its last copy and waits for it before it shows its contents.
//!
//! Buffers are made at load. Nothing can be allocated or copied from or to the host while a graph is captured.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;
use std::time::Duration;

use cudarc::driver::sys::{self, CUdeviceptr};
use cudarc::driver::{CudaEvent, DriverError, result};
use half::{bf16, f16};

use super::{Cuda, CudaError, Pause};

/// How long a pinned buffer that is dropped waits for its last copy.
const LAST_COPY: Duration = Duration::from_secs(5);
/// Every buffer starts on a multiple of this many bytes; the driver promises it.
const ALIGN: usize = 256;

/// A type that may lie on the device.
///
/// # Safety
/// Any bytes are a value of it, and it has no padding.
pub unsafe trait Element: Copy + Send + Sync + 'static {}

macro_rules! elements {
    ($($type:ty),+) => {
        $(
            // SAFETY: a plain number: any bytes are a value, and nothing lies between.
            unsafe impl Element for $type {}
        )+
    };
}
elements!(u8, i8, u16, i16, u32, i32, u64, i64, f32, bf16, f16);

/// Bytes on the device, freed when dropped; the driver waits for work that uses them then.
#[derive(Debug)]
pub struct DeviceBuffer {
    cuda: Cuda,
    ptr: CUdeviceptr,
    bytes: usize,
}

/// `len` values of a [`DeviceBuffer`].
#[derive(Debug)]
pub struct DeviceSlice<'a, T> {
    buffer: &'a DeviceBuffer,
    ptr: CUdeviceptr,
    len: usize,
    element: PhantomData<T>,
}

impl<T> Clone for DeviceSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<'_, T> {}

impl Cuda {
    /// `bytes` of device memory with whatever was in them.
    ///
    /// # Errors
    /// `DeviceMemory` with what is free, if there is no room; `InCapture`; `Driver`.
    pub fn alloc(&self, bytes: usize) -> Result<DeviceBuffer, CudaError> {
        self.forbid_in_capture("allocating")?;
        self.bind()?;
        // The driver refuses 0 bytes.
        // SAFETY: nothing is read from the memory before it was written, but by copies, for which any bytes are a value.
        let ptr = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return CudaError::driver("cuMemAlloc", error);
            }
            let (free_bytes, total_bytes) = result::mem_get_info().unwrap_or((0, 0));
            CudaError::DeviceMemory { asked_bytes: bytes, free_bytes, total_bytes }
        })?;
        Ok(DeviceBuffer { cuda: self.clone(), ptr, bytes })
    }

    /// As [`Cuda::alloc`], filled with zeros.
    ///
    /// # Errors
    /// As [`Cuda::alloc`].
    pub fn alloc_zeroed(&self, bytes: usize) -> Result<DeviceBuffer, CudaError> {
        let buffer = self.alloc(bytes)?;
        buffer.as_slice::<u8>().fill_bytes(0)?;
        Ok(buffer)
    }

    /// `bytes` of pinned host memory, zeroed.
    ///
    /// # Errors
    /// `PinnedMemory` if the system refuses; `InCapture`; `Driver`.
    pub fn alloc_pinned(&self, bytes: usize) -> Result<PinnedBuffer, CudaError> {
        self.forbid_in_capture("allocating")?;
        self.bind()?;
        let event = self
            .stream()
            .context()
            .new_event(None)
            .map_err(|error| CudaError::driver("cuEventCreate", error))?;
        let ptr = pin(bytes)?;
        Ok(PinnedBuffer { cuda: self.clone(), ptr, bytes, event, in_flight: false })
    }
}

impl DeviceBuffer {
    pub(super) fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// All of it. Bytes at the end that make no whole value are left out.
    pub fn as_slice<T: Element>(&self) -> DeviceSlice<'_, T> {
        self.slice(0, self.bytes / size_of::<T>())
    }

    /// `len` values from byte `offset_bytes` on.
    ///
    /// # Panics
    /// If they reach past the end, or if the offset is no multiple of a value's size.
    pub fn slice<T: Element>(&self, offset_bytes: usize, len: usize) -> DeviceSlice<'_, T> {
        const { assert!(ALIGN.is_multiple_of(size_of::<T>())) };
        assert!(offset_bytes.is_multiple_of(size_of::<T>()), "a slice starts on one of its values");
        check_range(offset_bytes, len, size_of::<T>(), self.bytes);
        DeviceSlice { buffer: self, ptr: self.ptr + offset_bytes as u64, len, element: PhantomData }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let Err(error) = self.cuda.bind() {
            // Nothing can be freed without the context, and nothing is left of the memory without it.
            debug_assert!(std::thread::panicking() || error.poisons_context(), "{error}");
            return;
        }
        // SAFETY: this buffer owns the memory, and slices of it cannot outlive it.
        self.cuda.record(unsafe { result::free_sync(self.ptr) });
    }
}

impl<'a, T: Element> DeviceSlice<'a, T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The address on the device.
    pub fn address(&self) -> u64 {
        self.ptr
    }

    /// # Panics
    /// If `range` is not inside.
    pub fn slice(&self, range: Range<usize>) -> DeviceSlice<'a, T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} values", self.len);
        let ptr = self.ptr + (range.start * size_of::<T>()) as u64;
        DeviceSlice { ptr, len: range.len(), ..*self }
    }

    pub(crate) fn cuda(&self) -> &'a Cuda {
        &self.buffer.cuda
    }

    /// Queues a copy of the pinned bytes from `offset_bytes` on into the whole slice. Does not wait and does not allocate.
    ///
    /// # Errors
    /// `InCapture`, `Driver`.
    ///
    /// # Panics
    /// If `from` has not that many bytes there, or is of another device.
    pub fn upload(&self, from: &mut PinnedBuffer, offset_bytes: usize) -> Result<(), CudaError> {
        self.cuda().forbid_in_capture("a copy from the host")?;
        self.cuda().bind()?;
        let source = from.part(self.cuda(), offset_bytes, self.bytes());
        let (bytes, stream) = (self.bytes(), self.cuda().cu_stream());
        // SAFETY: both ranges were checked and live; `from` shows its contents and goes only after its event.
        unsafe { sys::cuMemcpyHtoDAsync_v2(self.ptr, source, bytes, stream) }
            .result()
            .map_err(|error| CudaError::driver("cuMemcpyHtoDAsync", error))?;
        from.mark()
    }

    /// Queues a copy of the whole slice into pinned bytes from `offset_bytes` on. Does not wait and does not allocate.
    ///
    /// # Errors
    /// `InCapture`, `Driver`.
    ///
    /// # Panics
    /// If `to` has not that many bytes there, or is of another device.
    pub fn download(&self, to: &mut PinnedBuffer, offset_bytes: usize) -> Result<(), CudaError> {
        self.cuda().forbid_in_capture("a copy to the host")?;
        self.cuda().bind()?;
        let target = to.part(self.cuda(), offset_bytes, self.bytes());
        let (bytes, stream) = (self.bytes(), self.cuda().cu_stream());
        // SAFETY: as in `upload`.
        unsafe { sys::cuMemcpyDtoHAsync_v2(target, self.ptr, bytes, stream) }
            .result()
            .map_err(|error| CudaError::driver("cuMemcpyDtoHAsync", error))?;
        to.mark()
    }

    /// Copies ordinary host memory here and waits: for small things at load. Weights go faster by [`super::Uploader`].
    ///
    /// # Errors
    /// `InCapture`, `Driver`.
    ///
    /// # Panics
    /// If `values` is not as long as the slice.
    pub fn write(&self, values: &[T]) -> Result<(), CudaError> {
        assert_eq!(values.len(), self.len, "a slice is written whole");
        self.cuda().forbid_in_capture("a copy from the host")?;
        self.cuda().bind()?;
        // SAFETY: both are as long; `values` is borrowed until the copy is over.
        unsafe { result::memcpy_htod_async(self.ptr, values, self.cuda().cu_stream()) }
            .map_err(|error| CudaError::driver("cuMemcpyHtoDAsync", error))?;
        self.cuda().synchronize()
    }

    /// Copies this to ordinary host memory and waits: for tests and diagnosis.
    ///
    /// # Errors
    /// `InCapture`, `Driver`.
    ///
    /// # Panics
    /// If `values` is not as long as the slice.
    pub fn read(&self, values: &mut [T]) -> Result<(), CudaError> {
        assert_eq!(values.len(), self.len, "a slice is read whole");
        self.cuda().forbid_in_capture("a copy to the host")?;
        self.cuda().bind()?;
        // SAFETY: both are as long; `values` is borrowed until the copy is over.
        unsafe { result::memcpy_dtoh_async(values, self.ptr, self.cuda().cu_stream()) }
            .map_err(|error| CudaError::driver("cuMemcpyDtoHAsync", error))?;
        self.cuda().synchronize()
    }

    /// Queues a fill of every byte. May be captured.
    ///
    /// # Errors
    /// `Driver`.
    pub fn fill_bytes(&self, value: u8) -> Result<(), CudaError> {
        if self.is_empty() {
            return Ok(());
        }
        self.cuda().bind()?;
        // SAFETY: the range is inside the buffer, and any bytes are a value of `T`.
        unsafe { result::memset_d8_async(self.ptr, value, self.bytes(), self.cuda().cu_stream()) }
            .map_err(|error| CudaError::driver("cuMemsetD8Async", error))
    }

    /// Queues a copy of `from`, which must not overlap. May be captured.
    ///
    /// # Errors
    /// `Driver`.
    ///
    /// # Panics
    /// If lengths or devices differ, or the ranges overlap.
    pub fn copy_from(&self, from: &DeviceSlice<'_, T>) -> Result<(), CudaError> {
        assert_eq!(from.len, self.len, "a copy has one length");
        assert!(self.cuda().is_same(from.cuda()), "a copy stays on its device");
        if self.is_empty() {
            return Ok(());
        }
        let bytes = self.bytes() as u64;
        assert!(self.ptr + bytes <= from.ptr || from.ptr + bytes <= self.ptr, "copies do not overlap");
        self.cuda().bind()?;
        // SAFETY: both ranges are inside their buffers, as long as each other, and apart.
        unsafe { result::memcpy_dtod_async(self.ptr, from.ptr, self.bytes(), self.cuda().cu_stream()) }
            .map_err(|error| CudaError::driver("cuMemcpyDtoDAsync", error))
    }
}

/// Page-locked host memory that the device copies from and to by itself.
#[derive(Debug)]
pub struct PinnedBuffer {
    cuda: Cuda,
    ptr: *mut c_void,
    bytes: usize,
    /// Recorded behind the last copy.
    event: CudaEvent,
    in_flight: bool,
}

// SAFETY: it owns its memory like a Vec<u8>; the driver's functions take it from any thread.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access does nothing but tell its size.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// `len` values from byte `offset_bytes` on, for writing. Waits until the last copy from or to this buffer is over: not
    /// long, if it was queued in front of a step and the step before that has been read.
    ///
    /// # Errors
    /// `Driver`, also for what went wrong in earlier work.
    ///
    /// # Panics
    /// If they reach past the end, or if the offset is no multiple of a value's size.
    pub fn write<T: Element>(&mut self, offset_bytes: usize, len: usize) -> Result<&mut [T], CudaError> {
        assert!(offset_bytes.is_multiple_of(size_of::<T>()), "a slice starts on one of its values");
        check_range(offset_bytes, len, size_of::<T>(), self.bytes);
        self.wait()?;
        // SAFETY: inside the buffer, aligned (pinned memory starts on a page), exclusively borrowed, and no copy is in flight.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr.byte_add(offset_bytes).cast(), len) })
    }

    /// As [`PinnedBuffer::write`], for reading: the one wait at a step's end.
    ///
    /// # Errors
    /// As [`PinnedBuffer::write`].
    ///
    /// # Panics
    /// As [`PinnedBuffer::write`].
    pub fn read<T: Element>(&mut self, offset_bytes: usize, len: usize) -> Result<&[T], CudaError> {
        self.write(offset_bytes, len).map(|values| &*values)
    }

    /// Whether the last copy is over, without waiting. With a deadline beside it, this is a wait that ends.
    ///
    /// # Errors
    /// `Driver`, also for what went wrong in earlier work.
    pub fn is_ready(&self) -> Result<bool, CudaError> {
        if !self.in_flight {
            return Ok(true);
        }
        self.cuda.bind()?;
        // SAFETY: the event lives as long as `self`.
        match unsafe { result::event::query(self.event.cu_event()) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(CudaError::driver("cuEventQuery", error)),
        }
    }

    fn wait(&mut self) -> Result<(), CudaError> {
        if self.in_flight {
            self.event.synchronize().map_err(|error| CudaError::driver("cuEventSynchronize", error))?;
            self.in_flight = false;
        }
        Ok(())
    }

    /// The address of a range that the device is about to copy.
    fn part(&self, cuda: &Cuda, offset_bytes: usize, bytes: usize) -> *mut c_void {
        assert!(self.cuda.is_same(cuda), "a copy stays with its device");
        check_range(offset_bytes, bytes, 1, self.bytes);
        // SAFETY: inside the buffer.
        unsafe { self.ptr.byte_add(offset_bytes) }
    }

    /// A copy has been queued.
    fn mark(&mut self) -> Result<(), CudaError> {
        self.in_flight = true;
        self.event.record(self.cuda.stream()).map_err(|error| CudaError::driver("cuEventRecord", error))
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // What the device does not end to copy to or from is left to the end of the process: a kernel may hang before it. An error
        // means that the context is gone, and every copy with it.
        if matches!(Pause::until(LAST_COPY, || self.is_ready()), Ok(false)) {
            return;
        }
        if self.cuda.bind().is_ok() {
            // SAFETY: this buffer owns the memory, and no copy is in flight.
            self.cuda.record(unsafe { result::free_host(self.ptr) });
        }
    }
}

/// `bytes` of pinned host memory, zeroed, on the context that the thread is bound to.
pub(super) fn pin(bytes: usize) -> Result<*mut c_void, CudaError> {
    // SAFETY: the memory is filled right below.
    let ptr = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(|error| {
        if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            CudaError::PinnedMemory { asked_bytes: bytes }
        } else {
            CudaError::driver("cuMemHostAlloc", error)
        }
    })?;
    // SAFETY: `ptr` is `bytes` of our own.
    unsafe { ptr.cast::<u8>().write_bytes(0, bytes) };
    Ok(ptr)
}

fn check_range(offset_bytes: usize, len: usize, size: usize, bytes: usize) {
    let end = len.checked_mul(size).and_then(|len| len.checked_add(offset_bytes));
    assert!(
        end.is_some_and(|end| end <= bytes),
        "{len} values from byte {offset_bytes} of a buffer of {bytes} bytes"
    );
}

#[cfg(test)]
mod tests;
