//! The CUDA backend's host side: devices, memory, compiled kernels, launches, matrix products, graphs.
//!
//! NVIDIA's libraries (driver, NVRTC, cuBLASLt, NVML) are opened at run time; nothing of CUDA is needed to build. What is not
//! there, or too old, is one typed line ([`Unavailable`]). [`Cuda::probe`] is the gate: the bindings below panic on a library
//! or a function that is missing, so nothing here calls them before the probe found every function that this module uses.
//!
//! # A step
//! Everything is allocated, compiled, tuned and captured at load. A step is one [`DeviceSlice::upload`] from pinned memory,
//! launches or one [`Graph::replay`], one [`DeviceSlice::download`] into pinned memory, and one [`PinnedBuffer::read`], which is
//! its only wait. All work goes to one stream, so it happens in the order of the calls and nothing else orders it.
//!
//! # Threads
//! A context belongs to threads one by one. Every call binds the calling thread if it is not bound, which costs tens of
//! nanoseconds; [`Cuda`] can be cloned and sent. Two threads that use one `Cuda` share its stream and have to agree on the order.
//!
//! # What has been checked
//! The tests run this code against stand-ins for the libraries, compiled from C at test time, which do on the CPU what the
//! calls ask for, and against the real NVRTC and cuBLASLt as far as they go without a GPU, where they are installed. The tests in
//! `on_gpu.rs` need a GPU and say that they were skipped without one. Nothing here was run on a GPU yet.
//!
//! # Weak points
//! The bindings turn the driver's results into a Rust enumeration of CUDA 13.0's codes, without looking; a newer driver could return
//! one that is none of them.
//!
//! # Kernels
//! The kernels are CUDA C in `kernels/cu`, part of the binary as text ([`sources`]). [`launcher`] turns an operation on device
//! addresses into a [`Launch`](launcher::Launch): name, grid, block, arguments; a [`Runner`] carries it out. [`check`] compares
//! every kernel with a plain loop (`reference`) on a GPU, or in tests on an emulator that runs the same sources on the CPU.

mod cache;
pub mod check;
mod compile;
mod device;
mod device_launcher;
mod driver;
#[cfg(test)]
mod emulator;
mod error;
mod flag;
mod gemm;
mod graph;
mod kernel_set;
mod launch;
pub mod launcher;
pub mod limits;
mod memory;
mod nvml;
#[cfg(test)]
mod on_gpu;
mod pause;
mod peer;
mod reference;
mod runner;
mod sampler;
pub mod sources;
#[cfg(test)]
mod tests;
mod timer;
mod uploader;

pub use cache::{CacheKey, KernelCache, Origin};
pub use compile::{Architecture, Compiler, Image, ImageForm, Source, Target};
pub use device::{Cuda, DeviceInfo, MemoryInfo};
pub use device_launcher::DeviceLauncher;
pub(crate) use driver::BoundContext;
pub use driver::Unavailable;
pub use error::CudaError;
pub use flag::HostFlag;
pub use gemm::{Fp8Scales, Gemm, GemmOptions, GemmOutput, GemmShape, GemmTypes, MAX_TUNED_ROWS, TunedGemm};
pub use graph::{GRAPH_BUCKETS, Graph, bucket_of};
pub use kernel_set::KernelSet;
pub use launch::{Arg, Kernel, LaunchShape, MAX_ARGS, Module};
pub use memory::{DeviceBuffer, DeviceSlice, Element, PinnedBuffer};
pub use nvml::{GpuSample, GpuWatch};
pub use pause::Pause;
pub use peer::{IpcHandle, PeerBuffer};
pub use runner::{Runner, fill_cache};
pub use sampler::{Drawn, QueuedDraws, Sampler, ScoreTarget, Scored};
pub use timer::Timer;
pub use uploader::Uploader;
