//! Devices: what there is, and one opened for computing.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use super::driver;
use super::{CudaError, ImageForm, Pause, Target, Unavailable};

/// One GPU: its context on the device, and the one stream that all work goes to. Clones are the same device.
#[derive(Clone, Debug)]
pub struct Cuda {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    info: DeviceInfo,
    capturing: AtomicBool,
}

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number among the GPUs that this process sees.
    pub ordinal: usize,
    pub name: String,
    /// `GPU-` and 32 hexadecimal digits, as other tools name it.
    pub uuid: String,
    /// `domain:bus:device.function`.
    pub pci_bus_id: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    pub total_bytes: usize,
    /// Streaming multiprocessors.
    pub num_sms: usize,
    pub l2_bytes: usize,
    /// The most shared memory that a block may ask for.
    pub max_shared_bytes: usize,
}

/// Device memory in bytes, of all processes together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    pub free_bytes: usize,
    pub total_bytes: usize,
}

impl Cuda {
    /// The GPUs of this machine, those that are too old among them, if CUDA can be used at all: a driver, NVRTC and cuBLASLt that
    /// are new enough, and one GPU with compute capability 8.0. Makes no context.
    ///
    /// # Errors
    /// The first reason why not, in that order.
    pub fn probe() -> Result<Vec<DeviceInfo>, Unavailable> {
        let devices = list()?;
        driver::nvrtc()?;
        driver::cublaslt()?;
        let targets = || devices.iter().filter_map(DeviceInfo::target);
        let takes_assembly_only =
            targets().next().is_some() && targets().all(|target| target.form == ImageForm::Ptx);
        driver::driver_loads_what_nvrtc_makes(if takes_assembly_only {
            ImageForm::Ptx
        } else {
            ImageForm::Cubin
        })?;
        if targets().next().is_none() {
            let found: Vec<_> = devices.iter().map(DeviceInfo::to_string).collect();
            return Err(Unavailable::Capability { found: found.join(", ") });
        }
        Ok(devices)
    }

    /// Opens GPU `ordinal` and binds the calling thread to it.
    ///
    /// # Errors
    /// As [`Cuda::probe`]; `NoSuchDevice`, `Capability`, and `Driver` if there can be no context or stream.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let devices = Self::probe()?;
        let count = devices.len();
        let info = devices.into_iter().nth(ordinal).ok_or(CudaError::NoSuchDevice { ordinal, count })?;
        if !info.is_supported() {
            let (major, minor) = info.capability;
            return Err(CudaError::Capability { ordinal, name: info.name, major, minor });
        }
        let context = CudaContext::new(ordinal)
            .map_err(|error| CudaError::driver("cuDevicePrimaryCtxRetain", error))?;
        // The library would order uses of a buffer on different streams by events, which break the capture of a graph.
        // SAFETY: there is one stream, so there is nothing to order.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(|error| CudaError::driver("cuStreamCreate", error))?;
        let capturing = AtomicBool::new(false);
        Ok(Self { shared: Arc::new(Shared { stream, context, info, capturing }) })
    }

    /// The same device with a stream of its own, whose work runs beside that of `self`. Nothing orders the two but waiting; a buffer
    /// is copied on the stream of the `Cuda` that it was allocated by.
    ///
    /// # Errors
    /// `Driver`; `InCapture`.
    pub fn with_new_stream(&self) -> Result<Self, CudaError> {
        self.forbid_in_capture("making a stream")?;
        let context = self.shared.context.clone();
        let stream = context.new_stream().map_err(|error| CudaError::driver("cuStreamCreate", error))?;
        let (info, capturing) = (self.shared.info.clone(), AtomicBool::new(false));
        Ok(Self { shared: Arc::new(Shared { stream, context, info, capturing }) })
    }

    pub fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    /// What kernels are compiled for here.
    pub fn target(&self) -> Target {
        self.shared.info.target().expect("`open` refuses devices without a target")
    }

    /// Binds the calling thread. Every call does so by itself; called once before a loop it shows trouble early.
    ///
    /// # Errors
    /// `Driver`.
    pub fn bind(&self) -> Result<(), CudaError> {
        self.shared.context.bind_to_thread().map_err(|error| CudaError::driver("cuCtxSetCurrent", error))
    }

    /// # Errors
    /// `Driver`.
    pub fn memory(&self) -> Result<MemoryInfo, CudaError> {
        self.bind()?;
        let (free_bytes, total_bytes) =
            result::mem_get_info().map_err(|error| CudaError::driver("cuMemGetInfo", error))?;
        Ok(MemoryInfo { free_bytes, total_bytes })
    }

    /// Waits for all work given so far. It has no deadline: with a kernel or a collective that does not end it does not return.
    ///
    /// # Errors
    /// `Driver`, also for what went wrong in earlier work; `InCapture`.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.forbid_in_capture("waiting for the device")?;
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.cu_stream()) }
            .map_err(|error| CudaError::driver("cuStreamSynchronize", error))
    }

    /// Whether all work given so far is done, without waiting.
    ///
    /// # Errors
    /// As [`Cuda::synchronize`].
    pub fn is_idle(&self) -> Result<bool, CudaError> {
        self.forbid_in_capture("asking for the state of the device")?;
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        match unsafe { sys::cuStreamQuery(self.cu_stream()) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => Err(CudaError::driver("cuStreamQuery", DriverError(code))),
        }
    }

    /// The same, asked until it is so or `patience` is over.
    ///
    /// # Errors
    /// As [`Cuda::synchronize`].
    pub fn is_idle_within(&self, patience: Duration) -> Result<bool, CudaError> {
        Pause::until(patience, || self.is_idle())
    }

    /// The stream's handle (`cudaStream_t`), for libraries that queue work of their own. Not to be destroyed; lives as long as
    /// any clone of `self`.
    pub fn stream_handle(&self) -> *mut c_void {
        self.cu_stream().cast()
    }

    pub(super) fn cu_stream(&self) -> sys::CUstream {
        self.shared.stream.cu_stream()
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.shared.stream
    }

    /// Whether both are one device and one stream.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Whether both are one device, on whatever streams.
    pub(super) fn shares_context(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared.context, &other.shared.context)
    }

    pub(super) fn forbid_in_capture(&self, what: &'static str) -> Result<(), CudaError> {
        if self.shared.capturing.load(Ordering::Relaxed) {
            Err(CudaError::InCapture { what })
        } else {
            Ok(())
        }
    }

    /// Marks the device as capturing until the guard is dropped.
    pub(super) fn begin_capture_mark(&self) -> CaptureMark<'_> {
        self.shared.capturing.store(true, Ordering::Relaxed);
        CaptureMark { cuda: self }
    }

    /// Remembers what a drop could not return; the next call does.
    pub(super) fn record<T>(&self, result: Result<T, DriverError>) {
        self.shared.context.record_err(result);
    }
}

pub(super) struct CaptureMark<'a> {
    cuda: &'a Cuda,
}

impl Drop for CaptureMark<'_> {
    fn drop(&mut self) {
        self.cuda.shared.capturing.store(false, Ordering::Relaxed);
    }
}

impl DeviceInfo {
    /// Whether this backend has kernels for it.
    pub fn is_supported(&self) -> bool {
        self.target().is_some()
    }

    fn target(&self) -> Option<Target> {
        Target::for_capability(self.capability.0, self.capability.1)
    }
}

impl std::fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (major, minor) = self.capability;
        write!(f, "GPU {} {} ({major}.{minor})", self.ordinal, self.name)
    }
}

/// Everything that the driver shows.
fn list() -> Result<Vec<DeviceInfo>, Unavailable> {
    driver::driver()?;
    let count = match result::device::get_count() {
        Ok(count) => usize::try_from(count).unwrap_or(0),
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
        Err(error) => return Err(init_error(error)),
    };
    if count == 0 {
        return Err(Unavailable::NoDevice);
    }
    (0..count).map(|ordinal| describe(ordinal).map_err(init_error)).collect()
}

fn init_error(error: DriverError) -> Unavailable {
    let (code, reason) = super::error::words(error);
    Unavailable::Init { code, reason }
}

fn describe(ordinal: usize) -> Result<DeviceInfo, DriverError> {
    let device = result::device::get(i32::try_from(ordinal).expect("CUDA counts devices in an int"))?;
    let attribute = |attribute| {
        // SAFETY: `device` is from the driver.
        unsafe { result::device::get_attribute(device, attribute) }
    };
    let size = |value: i32| usize::try_from(value).unwrap_or(0);
    // SAFETY: `device` is from the driver.
    let total_bytes = unsafe { result::device::total_mem(device) }?;
    Ok(DeviceInfo {
        ordinal,
        name: result::device::get_name(device)?,
        uuid: uuid_text(&result::device::get_uuid(device)?.bytes.map(|byte| byte as u8)),
        pci_bus_id: pci_bus_id(device)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        total_bytes,
        num_sms: size(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?),
        l2_bytes: size(attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        max_shared_bytes: size(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?),
    })
}

fn pci_bus_id(device: sys::CUdevice) -> Result<String, DriverError> {
    let mut text = [0u8; 32];
    // SAFETY: the driver writes at most the length given, with a zero at the end.
    unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), 31, device) }.result()?;
    let text = std::ffi::CStr::from_bytes_until_nul(&text).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

fn uuid_text(bytes: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    format!(
        "GPU-{}-{}-{}-{}-{}",
        hex(&bytes[..4]),
        hex(&bytes[4..6]),
        hex(&bytes[6..8]),
        hex(&bytes[8..10]),
        hex(&bytes[10..])
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_other_tools_write_it() {
        let bytes = std::array::from_fn(|i| i as u8 * 17);
        assert_eq!(uuid_text(&bytes), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }
}
