//! Loaded modules and launches of their kernels.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUfunction_attribute as Attribute};

use super::{Cuda, CudaError, DeviceSlice, Image};

/// Arguments that a kernel can take here: they lie on the stack during a launch.
pub const MAX_ARGS: usize = 32;

/// A block may have this much shared memory without asking.
const PLAIN_SHARED_BYTES: usize = 48 * 1024;

/// A compiled source, loaded on a device.
#[derive(Clone, Debug)]
pub struct Module {
    loaded: Arc<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    cuda: Cuda,
    name: String,
    module: sys::CUmodule,
}

// SAFETY: a module is a handle that the driver's functions take from any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above; nothing changes a loaded module.
unsafe impl Sync for Loaded {}

/// One `extern "C" __global__` function of a module; keeps the module loaded.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Whose stream launches go to.
    cuda: Cuda,
    #[expect(dead_code, reason = "the function is gone with its module")]
    loaded: Arc<Loaded>,
    function: sys::CUfunction,
    name: Arc<str>,
    /// The most dynamic shared memory that a launch may have.
    max_shared_bytes: usize,
    static_shared_bytes: usize,
    num_registers: usize,
    local_bytes: usize,
    max_threads: usize,
}

// SAFETY: a function is a handle into its module, which `loaded` keeps.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Whether blocks may begin while the launch before still runs (compute capability 9.0 on). The kernel then has to wait for it
    /// by itself, in every thread, before it reads or writes what others do: `griddepcontrol.wait`.
    pub overlaps: bool,
}

impl LaunchShape {
    /// A row of `blocks` blocks of `threads` threads.
    pub const fn linear(blocks: u32, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 0, overlaps: false }
    }

    pub const fn with_shared(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// An address on the device.
    Ptr(u64),
    I32(i32),
    U32(u32),
    F32(f32),
    I64(i64),
    U64(u64),
}

impl Arg {
    /// The address of no memory, for what a kernel may go without.
    pub const NULL: Self = Self::Ptr(0);

    /// The value's bytes from the lowest address on; a kernel reads as many as its parameter has. Hosts of GPUs are
    /// little-endian.
    pub fn word(self) -> u64 {
        match self {
            Self::Ptr(value) | Self::U64(value) => value,
            Self::I64(value) => value.cast_unsigned(),
            Self::I32(value) => u64::from(value.cast_unsigned()),
            Self::U32(value) => u64::from(value),
            Self::F32(value) => u64::from(value.to_bits()),
        }
    }
}

macro_rules! arg_from {
    ($($type:ty => $variant:ident),+) => {
        $(impl From<$type> for Arg {
            fn from(value: $type) -> Self {
                Self::$variant(value)
            }
        })+
    };
}
arg_from!(i32 => I32, u32 => U32, f32 => F32, i64 => I64, u64 => U64);

impl<T: super::Element> From<DeviceSlice<'_, T>> for Arg {
    fn from(slice: DeviceSlice<'_, T>) -> Self {
        Self::Ptr(slice.address())
    }
}

impl Module {
    /// Loads `image` on the device.
    ///
    /// # Errors
    /// `Kernel` with the source's name if the driver refuses the image; `InCapture`.
    pub fn load(cuda: &Cuda, image: &Image) -> Result<Self, CudaError> {
        cuda.forbid_in_capture("loading a module")?;
        cuda.bind()?;
        // SAFETY: the image is a whole cubin, which tells its own length, or PTX with a zero at its end.
        let module = unsafe { result::module::load_data(image.bytes().as_ptr().cast()) }
            .map_err(|error| CudaError::kernel(&image.name, "cuModuleLoadData", error))?;
        Ok(Self { loaded: Arc::new(Loaded { cuda: cuda.clone(), name: image.name.clone(), module }) })
    }

    /// The function `name`.
    ///
    /// # Errors
    /// `Kernel` with the function's name if the module has none.
    pub fn kernel(&self, name: &str) -> Result<Kernel, CudaError> {
        let Loaded { cuda, module, .. } = &*self.loaded;
        cuda.bind()?;
        let full = format!("{name} of {}", self.loaded.name);
        let name_c = CString::new(name).map_err(|_| CudaError::Kernel {
            kernel: full.clone(),
            call: "cuModuleGetFunction",
            code: "CUDA_ERROR_NOT_FOUND".into(),
            reason: "the name has a zero in it".into(),
        })?;
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(*module, name_c) }
            .map_err(|error| CudaError::kernel(&full, "cuModuleGetFunction", error))?;
        let attribute = |attribute| {
            // SAFETY: the function is of the loaded module.
            unsafe { result::function::get_function_attribute(function, attribute) }
                .map(|value| usize::try_from(value).unwrap_or(0))
                .map_err(|error| CudaError::kernel(&full, "cuFuncGetAttribute", error))
        };
        let static_shared_bytes = attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        Ok(Kernel {
            cuda: cuda.clone(),
            loaded: self.loaded.clone(),
            function,
            name: full.as_str().into(),
            max_shared_bytes: PLAIN_SHARED_BYTES.saturating_sub(static_shared_bytes),
            static_shared_bytes,
            num_registers: attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            max_threads: attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if self.cuda.bind().is_ok() {
            // SAFETY: nothing else has the module: every kernel keeps it.
            self.cuda.record(unsafe { result::module::unload(self.module) });
        }
    }
}

impl Kernel {
    /// The function's name and its source's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Registers of a thread.
    pub fn num_registers(&self) -> usize {
        self.num_registers
    }

    /// Local memory of a thread: spilled registers and arrays with computed indices.
    pub fn local_bytes(&self) -> usize {
        self.local_bytes
    }

    /// The most threads that a block of this kernel can have.
    pub fn max_threads(&self) -> usize {
        self.max_threads
    }

    /// The same kernel, launched on the stream of `cuda`, another one of the device ([`Cuda::with_new_stream`]).
    ///
    /// # Panics
    /// If it is of another device.
    pub fn on(&self, cuda: &Cuda) -> Self {
        assert!(self.cuda.shares_context(cuda), "a kernel stays on its device");
        Self { cuda: cuda.clone(), ..self.clone() }
    }

    /// The most dynamic shared memory that a launch may have at the moment.
    pub fn max_shared_bytes(&self) -> usize {
        self.max_shared_bytes
    }

    /// Lets launches have `bytes` of dynamic shared memory. Needed once above 48 KiB less what the kernel has of its own.
    ///
    /// # Errors
    /// `SharedMemory` with the device's limit, `Kernel`.
    pub fn allow_shared(&mut self, bytes: usize) -> Result<(), CudaError> {
        let cuda = &self.cuda;
        let limit_bytes = cuda.info().max_shared_bytes;
        let too_much =
            || CudaError::SharedMemory { kernel: self.name.to_string(), asked_bytes: bytes, limit_bytes };
        if bytes.saturating_add(self.static_shared_bytes) > limit_bytes {
            return Err(too_much());
        }
        let value = i32::try_from(bytes).map_err(|_| too_much())?;
        cuda.bind()?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of the loaded module.
        unsafe { result::function::set_function_attribute(self.function, attribute, value) }
            .map_err(|error| CudaError::kernel(&self.name, "cuFuncSetAttribute", error))?;
        self.max_shared_bytes = self.max_shared_bytes.max(bytes);
        Ok(())
    }

    /// Blocks of `threads` threads and `shared_bytes` of dynamic shared memory that fit on one SM together.
    ///
    /// # Errors
    /// `Kernel`.
    pub fn blocks_per_sm(&self, threads: u32, shared_bytes: usize) -> Result<usize, CudaError> {
        self.cuda.bind()?;
        let threads = i32::try_from(threads).unwrap_or(i32::MAX);
        // SAFETY: the function is of the loaded module.
        unsafe {
            result::occupancy::max_active_block_per_multiprocessor(self.function, threads, shared_bytes)
        }
        .map(|blocks| usize::try_from(blocks).unwrap_or(0))
        .map_err(|error| CudaError::kernel(&self.name, "cuOccupancyMaxActiveBlocksPerMultiprocessor", error))
    }

    /// Queues a launch. Does not wait and does not allocate; may be captured. A grid or block with a 0 in it launches nothing.
    ///
    /// What the launch itself does wrong (sizes) comes back here, what the kernel does wrong when something waits for it.
    ///
    /// # Errors
    /// `Arguments`, `SharedMemory`, `Kernel`.
    ///
    /// # Safety
    /// `args` are the kernel's parameters in their number, order and types. Every address is of memory of this device that
    /// stays allocated until the launch is over (and a graph that holds it is gone), and covers what the kernel reads and writes.
    /// A kernel that overlaps waits as [`LaunchShape::overlaps`] says.
    pub unsafe fn launch(&self, shape: LaunchShape, args: &[Arg]) -> Result<(), CudaError> {
        // SAFETY: this function's contract.
        unsafe { self.launch_words(shape, args.iter().map(|arg| arg.word())) }
    }

    /// As [`Kernel::launch`], with each argument's bytes from the lowest address of a word on.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn launch_words(
        &self,
        shape: LaunchShape,
        args: impl ExactSizeIterator<Item = u64>,
    ) -> Result<(), CudaError> {
        let num_args = args.len();
        if num_args > MAX_ARGS {
            let kernel = self.name.to_string();
            return Err(CudaError::Arguments { kernel, actual: num_args, max: MAX_ARGS });
        }
        if shape.shared_bytes as usize > self.max_shared_bytes {
            return Err(CudaError::SharedMemory {
                kernel: self.name.to_string(),
                asked_bytes: shape.shared_bytes as usize,
                limit_bytes: self.max_shared_bytes,
            });
        }
        let ([x, y, z], [bx, by, bz]) = (shape.grid, shape.block);
        if [x, y, z, bx, by, bz].contains(&0) {
            return Ok(());
        }
        let cuda = &self.cuda;
        cuda.bind()?;
        let mut words = [0u64; MAX_ARGS];
        for (word, arg) in words.iter_mut().zip(args) {
            *word = arg;
        }
        // A kernel reads as many of the addresses as it has parameters.
        // The list ends with nothing, which a driver does not need and a stand-in for one counts by.
        let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_ARGS];
        for (pointer, word) in pointers.iter_mut().zip(&mut words).take(num_args) {
            *pointer = (word as *mut u64).cast();
        }
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: shape.shared_bytes,
            hStream: cuda.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(shape.overlaps),
        };
        // SAFETY: the function is of the loaded module; the driver copies configuration and arguments before it returns; the rest
        // is this function's contract.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|error| CudaError::kernel(&self.name, "cuLaunchKernelEx", error))
    }
}

#[cfg(test)]
mod tests;
