//! Which instructions this machine has, proven by values that only detection can make.

use crate::{Isa, KernelError};

/// An ISA class that was found on this machine. There is no other way to get one than [`best`] and [`require`], so
/// whoever holds one may run its instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Detected {
    isa: Isa,
    prefetch: Nearest,
}

/// The nearest cache that is asked to fetch what will be read soon.
///
/// AMD's cores wait for few lines at a time in the first level and for many in the second: on a Zen 4 one core streams
/// weights at 12 GB/s through the first and at 22 GB/s through the second. Elsewhere it is the first, where they are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nearest {
    L1,
    L2,
}

/// The right to use AMX: it is there, and the system lets this process have its registers.
#[derive(Clone, Copy)]
pub(crate) struct MatrixUnit(());

impl Detected {
    pub(crate) const fn isa(self) -> Isa {
        self.isa
    }

    pub(crate) const fn prefetch(self) -> Nearest {
        self.prefetch
    }

    /// The matrix unit, if it belongs to the class.
    pub(crate) const fn matrix_unit(self) -> Option<MatrixUnit> {
        match self.isa {
            Isa::Amx => Some(MatrixUnit(())),
            _ => None,
        }
    }
}

/// The widest class of this machine.
pub(crate) fn best() -> Detected {
    Detected { isa: best_class(), prefetch: nearest_for_prefetch() }
}

fn best_class() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512vnni");
        if avx512 && has_matrix_unit() {
            return Isa::Amx;
        }
        if avx512 {
            return Isa::Avx512;
        }
        if avx2 {
            return Isa::Avx2;
        }
    }
    Isa::Scalar
}

#[cfg(target_arch = "x86_64")]
fn nearest_for_prefetch() -> Nearest {
    let vendor = std::arch::x86_64::__cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
    if name == b"AuthenticAMD" || name == b"HygonGenuine" { Nearest::L2 } else { Nearest::L1 }
}

#[cfg(not(target_arch = "x86_64"))]
fn nearest_for_prefetch() -> Nearest {
    Nearest::L1
}

/// Whether the CPU has AMX with bf16, in tiles of 16 rows of 64 bytes, and the system gives this process its registers. They
/// are large, so Linux saves them only for processes that have asked.
#[cfg(target_arch = "x86_64")]
fn has_matrix_unit() -> bool {
    use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
    use std::sync::OnceLock;

    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;

    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        if __get_cpuid_max(0).0 < 0x1d {
            return false;
        }
        let features = __cpuid_count(7, 0).edx;
        let (has_bf16, has_tiles) = (features >> 22 & 1 == 1, features >> 24 & 1 == 1);
        if !has_bf16 || !has_tiles {
            return false;
        }
        let palette = __cpuid_count(0x1d, 1);
        let (bytes_per_row, tiles, rows) = (palette.ebx & 0xffff, palette.ebx >> 16, palette.ecx & 0xffff);
        if bytes_per_row != 64 || tiles < 8 || rows < 16 {
            return false;
        }
        // SAFETY: the call asks for a permission and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    })
}

/// Proof for a class that was asked for by name.
///
/// # Errors
/// `UnsupportedIsa` if the machine lacks it.
pub(crate) fn require(isa: Isa) -> Result<Detected, KernelError> {
    let best = best();
    let supported = best.isa();
    // The classes are nested: each asks for everything that the one before it does.
    if (isa as u8) <= (supported as u8) {
        return Ok(Detected { isa, ..best });
    }
    Err(KernelError::UnsupportedIsa { isa, supported })
}

impl Isa {
    /// All classes, from the plainest to the widest.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Amx];

    /// Whether this machine can run the backend in this class.
    pub fn is_available(self) -> bool {
        require(self).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_narrower_class_is_supported() {
        let supported = best().isa() as u8;
        for isa in Isa::ALL {
            match require(isa) {
                Ok(detected) => assert!(detected.isa() == isa && isa as u8 <= supported),
                Err(KernelError::UnsupportedIsa { isa: asked, .. }) => {
                    assert!(asked == isa && isa as u8 > supported);
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}
