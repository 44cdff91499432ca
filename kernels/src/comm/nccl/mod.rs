//! Collectives between GPUs by NCCL, through a thin layer of our own that cannot panic and has an end for every wait.
//!
//! NCCL's collectives have no deadline: one rank that dies leaves the others' kernels spinning. So communicators are made
//! non-blocking, every wait here polls the communicator's state beside its clock, and [`NcclAbort`] ends whatever is going on from
//! another thread. Whoever finds a failure or a deadline passed gives the communicator up by itself, so that the device's stream
//! comes free; afterwards everything is [`NcclError::Aborted`], and the group's next epoch makes a new one with a new id.
//!
//! NCCL lets a communicator go only when no graph holds collectives of it any more. So when a call returns an error, drop the
//! graphs, then ask [`NcclAbort::wait_released`] before the next epoch.
//!
//! Use one process for each GPU. All ranks call the same collectives in the same order.
//!
//! NCCL sums in an order of its own: unlike [`super::Communicator`], results are not the same for every number of ranks.
//!
//! The tests run this against a stand-in library with ranks in one process, and against NCCL itself, where that is installed, as far as
//! it goes without a GPU: up to a failing init. No collective of NCCL's own was run yet.

mod communicator;
mod error;
mod library;
mod life;

use std::ffi::c_int;
use std::fmt;

use self::library::{Functions, Loaded, RawId, SUCCESS};

pub use communicator::{NcclCommunicator, NcclElement, NcclOptions, NcclWait};
pub use error::NcclError;
pub use library::LIBRARY_VARIABLE as NCCL_LIBRARY_VARIABLE;
pub use life::NcclAbort;

/// NCCL, found and checked.
#[derive(Clone, Copy)]
pub struct Nccl {
    loaded: &'static Loaded,
}

impl Nccl {
    /// Opens what `TANDEM_NCCL_LIBRARY` names, else `libnccl.so.2`, else `libnccl.so`. The first result holds for the process.
    ///
    /// # Errors
    /// `NoLibrary`, `NoSymbol`, `TooOld`.
    pub fn open() -> Result<Self, NcclError> {
        library::open().map(|loaded| Self { loaded })
    }

    /// As `major.minor.patch`. Ranks of a group have the same.
    pub fn version(&self) -> String {
        library::version_text(self.loaded.version)
    }

    /// A new id for one communicator. Made by one rank, which has to live until all have joined, and handed to all.
    ///
    /// # Errors
    /// `Failed`.
    pub fn unique_id(&self) -> Result<NcclUniqueId, NcclError> {
        let mut id = RawId([0; 128]);
        // SAFETY: an id is written.
        let code = unsafe { (self.functions().get_unique_id)(&raw mut id) };
        if code == SUCCESS { Ok(NcclUniqueId(id.0)) } else { Err(self.failed("ncclGetUniqueId", code)) }
    }

    fn functions(&self) -> &'static Functions {
        &self.loaded.functions
    }

    fn failed(&self, call: &'static str, code: c_int) -> NcclError {
        let reason = self.functions().last_words();
        NcclError::Failed { call, code, name: library::result_name(code), reason }
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Nccl").field(&self.version()).finish()
    }
}

/// Names a communicator among the ranks that make it. Whoever has it can join, so it travels over authenticated connections and
/// is not printed.
#[derive(Clone, PartialEq, Eq)]
pub struct NcclUniqueId([u8; 128]);

impl NcclUniqueId {
    pub const BYTES: usize = 128;

    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// # Errors
    /// `UniqueId` for any other length.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NcclError> {
        let wrong = |_| NcclError::UniqueId { expected: Self::BYTES, actual: bytes.len() };
        bytes.try_into().map(Self).map_err(wrong)
    }
}

impl fmt::Debug for NcclUniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NcclUniqueId(..)")
    }
}

#[cfg(test)]
mod tests;
