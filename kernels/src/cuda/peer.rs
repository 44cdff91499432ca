//! Memory of another process's GPU, for kernels that read what other ranks wrote.
//!
//! A rank hands the handle of one of its buffers to the others, each of which opens it: its kernels then read and write the buffer
//! over the link between the two GPUs. Possible on one machine, between GPUs that reach each other, and not in the process that made
//! the handle. What orders the accesses is up to the kernels.

use cudarc::driver::DriverError;
use cudarc::driver::sys::{self, CUdeviceptr, CUipcMem_flags, CUipcMemHandle};

use super::{Arg, Cuda, CudaError, DeviceBuffer};

/// Names a buffer among the processes of a machine; of use for as long as the buffer is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpcHandle {
    bytes: [u8; Self::BYTES],
}

impl IpcHandle {
    pub const BYTES: usize = 64;

    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.bytes
    }

    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self { bytes }
    }
}

impl DeviceBuffer {
    /// For other processes.
    ///
    /// # Errors
    /// `Driver`; `InCapture`.
    pub fn ipc_handle(&self) -> Result<IpcHandle, CudaError> {
        let cuda = self.cuda();
        cuda.forbid_in_capture("sharing memory")?;
        cuda.bind()?;
        let mut handle = CUipcMemHandle { reserved: [0; IpcHandle::BYTES] };
        // SAFETY: the address is the start of a live allocation; a handle is written.
        unsafe { sys::cuIpcGetMemHandle(&raw mut handle, self.as_slice::<u8>().address()) }
            .result()
            .map_err(|error| CudaError::driver("cuIpcGetMemHandle", error))?;
        Ok(IpcHandle { bytes: handle.reserved.map(|byte| byte as u8) })
    }
}

/// Another process's buffer, reachable from this device until it is dropped. The owner keeps it at least as long.
#[derive(Debug)]
pub struct PeerBuffer {
    cuda: Cuda,
    ptr: CUdeviceptr,
}

impl Cuda {
    /// Opens what another process on this machine shares.
    ///
    /// # Errors
    /// `Driver`, among others if the two GPUs do not reach each other; `InCapture`.
    pub fn open_peer(&self, handle: &IpcHandle) -> Result<PeerBuffer, CudaError> {
        self.forbid_in_capture("sharing memory")?;
        self.bind()?;
        let mut ptr = 0;
        let raw = CUipcMemHandle { reserved: handle.bytes.map(|byte| byte as std::ffi::c_char) };
        let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: an address is written; the driver checks the handle.
        unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut ptr, raw, flags) }
            .result()
            .map_err(|error: DriverError| CudaError::driver("cuIpcOpenMemHandle", error))?;
        Ok(PeerBuffer { cuda: self.clone(), ptr })
    }
}

impl PeerBuffer {
    /// The buffer's address on this device.
    pub fn address(&self) -> u64 {
        self.ptr
    }
}

impl From<&PeerBuffer> for Arg {
    fn from(buffer: &PeerBuffer) -> Self {
        Self::Ptr(buffer.ptr)
    }
}

impl Drop for PeerBuffer {
    fn drop(&mut self) {
        if self.cuda.bind().is_ok() {
            // SAFETY: opened by this value, and closed once.
            self.cuda.record(unsafe { sys::cuIpcCloseMemHandle(self.ptr) }.result());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::{ALL, open};
    use crate::stub::{Stub, counter, in_child};

    #[test]
    fn a_handle_travels_as_bytes_and_opens_the_buffer() {
        in_child((module_path!(), "a_handle_travels_as_bytes_and_opens_the_buffer"), &ALL, &[], || {
            let cuda = open();
            let buffer = cuda.alloc(64).unwrap();
            let handle = buffer.ipc_handle().unwrap();
            assert!(handle.as_bytes()[32..].iter().any(|&byte| byte != 0));
            // The stand-in gives the address that it has for it.
            let peer = cuda.open_peer(&IpcHandle::from_bytes(*handle.as_bytes())).unwrap();
            assert_eq!(peer.address(), buffer.as_slice::<u8>().address());
            assert_eq!(counter(Stub::Driver, "peers"), 1);
            drop(peer);
            assert_eq!(counter(Stub::Driver, "peers"), 0);
            let error = cuda.open_peer(&IpcHandle::from_bytes([1; 64])).unwrap_err();
            assert!(error.to_string().contains("CUDA_ERROR_INVALID_VALUE"), "{error}");
        });
    }
}
