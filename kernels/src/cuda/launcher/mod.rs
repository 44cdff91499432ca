//! How kernels are launched: an operation's shapes in, grid, block and arguments out.
//!
//! The functions of the submodules are pure: they check shapes and make a [`Launch`], and a [`Launcher`] carries it out.
//! So the geometry of every kernel is in one place, the same for the model, for checks on a GPU and for the emulator.
//! Pointers are device addresses, aligned to 16 bytes; rows of tensors are contiguous.
//!
//! # Panics
//! If a shape is one that a kernel does not do. Callers derive shapes from a validated configuration.

mod attention;
mod collective;
mod columns;
mod elementwise;
mod linear;
mod sampling;
mod skinny;

pub use attention::*;
pub use collective::*;
pub use columns::*;
pub use elementwise::*;
pub use linear::*;
pub use sampling::*;
pub use skinny::*;

/// The address of device memory.
pub type Address = u64;

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    Pointer(Address),
    I32(i32),
    F32(f32),
    U64(u64),
}

impl Arg {
    /// The value in the lowest of eight bytes, as a driver that is given addresses of arguments reads it.
    pub fn bits(self) -> u64 {
        match self {
            Self::Pointer(x) | Self::U64(x) => x,
            Self::I32(x) => u64::from(x.cast_unsigned()),
            Self::F32(x) => u64::from(x.to_bits()),
        }
    }
}

impl From<Address> for Arg {
    fn from(address: Address) -> Self {
        Self::Pointer(address)
    }
}

impl From<usize> for Arg {
    fn from(count: usize) -> Self {
        Self::I32(i32::try_from(count).expect("sizes of a step fit 31 bits"))
    }
}

impl From<i32> for Arg {
    fn from(x: i32) -> Self {
        Self::I32(x)
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Self::F32(x)
    }
}

/// No kernel has more parameters.
pub const MAX_ARGS: usize = 24;

/// One launch of a kernel. It owns no memory, so making one allocates nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launch {
    pub module: &'static str,
    pub kernel: &'static str,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, which is one-dimensional.
    pub threads: u32,
    /// Dynamic shared memory; above 48 KiB the function needs `MAX_DYNAMIC_SHARED_SIZE_BYTES` set to it once.
    pub shared_bytes: u32,
    args: [Arg; MAX_ARGS],
    num_args: usize,
}

impl Launch {
    fn new<const N: usize>(
        module: &'static str,
        kernel: &'static str,
        grid: [usize; 3],
        threads: usize,
        args: [Arg; N],
    ) -> Self {
        let mut all = [Arg::I32(0); MAX_ARGS];
        all[..N].copy_from_slice(&args);
        let grid = grid.map(|n| u32::try_from(n).expect("a grid fits 32 bits"));
        assert!(grid[1] <= 65_535 && grid[2] <= 65_535, "{kernel}: grid {grid:?}");
        Self { module, kernel, grid, threads: threads as u32, shared_bytes: 0, args: all, num_args: N }
    }

    fn push(&mut self, args: &[Arg]) {
        self.args[self.num_args..self.num_args + args.len()].copy_from_slice(args);
        self.num_args += args.len();
    }

    const fn with_shared_bytes(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes as u32;
        self
    }

    /// In the order of the kernel's parameters.
    pub fn args(&self) -> &[Arg] {
        &self.args[..self.num_args]
    }

    /// Whether there is nothing to do; drivers refuse an empty grid.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

/// Carries launches out, in order. Errors are words for a person: a launcher is for checks, not for serving.
pub trait Launcher {
    /// Memory aligned to 256 bytes.
    fn allocate(&mut self, bytes: usize) -> Result<Address, String>;
    /// Gives back what `allocate` gave.
    fn free(&mut self, address: Address);
    fn upload(&mut self, address: Address, bytes: &[u8]) -> Result<(), String>;
    /// Waits for the launches so far.
    fn download(&mut self, address: Address, bytes: &mut [u8]) -> Result<(), String>;
    fn launch(&mut self, launch: &Launch) -> Result<(), String>;
    /// Streams whose launches wait for each other: they must run at the same time, those of one stream in order.
    fn launch_together(&mut self, streams: &[Vec<Launch>]) -> Result<(), String>;
    /// Whether `launch_together` works here.
    fn has_streams(&self) -> bool;
}

/// Threads for a row of `len` values, `per_thread` at a time: whole warps, at most `most`.
fn threads_for(len: usize, per_thread: usize, most: usize) -> usize {
    len.div_ceil(per_thread).next_multiple_of(32).clamp(32, most)
}
