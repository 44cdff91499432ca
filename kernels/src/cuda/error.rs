//! The error type of the CUDA backend.

use cudarc::driver::DriverError;

use super::Unavailable;

/// What can go wrong on a device. `code` is CUDA's own name of an error (`CUDA_ERROR_…`), `reason` the library's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error("there is no GPU {ordinal}; this machine has {count}")]
    NoSuchDevice { ordinal: usize, count: usize },
    #[error(
        "GPU {ordinal} ({name}) has compute capability {major}.{minor}; 8.0 is the least that is supported"
    )]
    Capability { ordinal: usize, name: String, major: i32, minor: i32 },
    #[error("{call} failed: {code} ({reason})")]
    Driver { call: &'static str, code: String, reason: String },
    #[error("the GPU has no room for {asked_bytes} bytes: {free_bytes} of {total_bytes} are free")]
    DeviceMemory { asked_bytes: usize, free_bytes: usize, total_bytes: usize },
    #[error("the system refused {asked_bytes} bytes of pinned host memory")]
    PinnedMemory { asked_bytes: usize },
    #[error("{what} is not possible while a graph is captured")]
    InCapture { what: &'static str },
    #[error("the graph was not captured: {reason}")]
    Capture { reason: String },
    #[error("kernel source {source_name} does not compile for {target}:\n{log}")]
    Compile { source_name: String, target: String, log: String },
    #[error("NVRTC cannot compile {source_name} for {target}: {reason}")]
    Compiler { source_name: String, target: String, reason: String },
    #[error("kernel {kernel}: {call} failed: {code} ({reason})")]
    Kernel { kernel: String, call: &'static str, code: String, reason: String },
    #[error(
        "kernel {kernel} wants {asked_bytes} bytes of shared memory; this GPU gives a block {limit_bytes}"
    )]
    SharedMemory { kernel: String, asked_bytes: usize, limit_bytes: usize },
    #[error("kernel {kernel} was given {actual} arguments; at most {max} are possible")]
    Arguments { kernel: String, actual: usize, max: usize },
    #[error("cuBLASLt: {call} failed for {shape}: {code}")]
    Gemm { call: &'static str, shape: String, code: String },
    #[error("cuBLASLt has no algorithm for {shape} on this GPU")]
    NoGemm { shape: String },
    #[error(
        "{failed} of {checks} checks of kernels fail on this {gpu}, which would answer wrong (all: `tandem kernels --check`; \
         `--device cpu` serves without it): {first}"
    )]
    WrongResults { gpu: String, failed: usize, checks: usize, first: String },
}

impl CudaError {
    /// A driver's error with the driver's words. Only for errors that came from the driver, which is therefore loaded.
    pub(super) fn driver(call: &'static str, error: DriverError) -> Self {
        let (code, reason) = words(error);
        Self::Driver { call, code, reason }
    }

    pub(super) fn kernel(kernel: &str, call: &'static str, error: DriverError) -> Self {
        let (code, reason) = words(error);
        Self::Kernel { kernel: kernel.to_owned(), call, code, reason }
    }

    /// Whether the context is of no use any more: every later call fails in the same way, and only a new process helps.
    pub fn poisons_context(&self) -> bool {
        let (Self::Driver { code, .. } | Self::Kernel { code, .. }) = self else { return false };
        matches!(
            code.as_str(),
            "CUDA_ERROR_ILLEGAL_ADDRESS"
                | "CUDA_ERROR_ILLEGAL_INSTRUCTION"
                | "CUDA_ERROR_MISALIGNED_ADDRESS"
                | "CUDA_ERROR_INVALID_ADDRESS_SPACE"
                | "CUDA_ERROR_INVALID_PC"
                | "CUDA_ERROR_HARDWARE_STACK_ERROR"
                | "CUDA_ERROR_LAUNCH_FAILED"
                | "CUDA_ERROR_LAUNCH_TIMEOUT"
                | "CUDA_ERROR_ASSERT"
                | "CUDA_ERROR_ECC_UNCORRECTABLE"
                | "CUDA_ERROR_NVLINK_UNCORRECTABLE"
                | "CUDA_ERROR_CONTAINED"
                | "CUDA_ERROR_CONTEXT_IS_DESTROYED"
                | "CUDA_ERROR_DEINITIALIZED"
                | "CUDA_ERROR_UNKNOWN"
        )
    }
}

/// CUDA's name of an error and its explanation.
pub(super) fn words(error: DriverError) -> (String, String) {
    let text =
        |text: Result<&std::ffi::CStr, DriverError>| text.map(|text| text.to_string_lossy().into_owned());
    let code = text(error.error_name()).unwrap_or_else(|_| format!("error {}", error.0 as u32));
    let reason = text(error.error_string()).unwrap_or_else(|_| "no explanation".to_owned());
    (code, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_of_a_kernel_ends_the_context_and_a_full_device_does_not() {
        let fault = CudaError::Driver {
            call: "cuStreamSynchronize",
            code: "CUDA_ERROR_ILLEGAL_ADDRESS".into(),
            reason: String::new(),
        };
        assert!(fault.poisons_context());
        let full = CudaError::DeviceMemory { asked_bytes: 3, free_bytes: 2, total_bytes: 9 };
        assert!(!full.poisons_context());
        assert_eq!(full.to_string(), "the GPU has no room for 3 bytes: 2 of 9 are free");
    }
}
