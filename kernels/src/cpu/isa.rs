//! Which instructions this machine has, proven by a value that only detection can make.

use crate::{Isa, KernelError};

/// An ISA class that was found on this machine. There is no other way to get one than [`best`] and [`require`], so
/// whoever holds one may run its instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Detected(Isa);

impl Detected {
    pub(crate) const fn isa(self) -> Isa {
        self.0
    }
}

/// The widest class of this machine.
pub(crate) fn best() -> Detected {
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
        if avx512 {
            return Detected(Isa::Avx512);
        }
        if avx2 {
            return Detected(Isa::Avx2);
        }
    }
    Detected(Isa::Scalar)
}

/// Proof for a class that was asked for by name.
///
/// # Errors
/// `UnsupportedIsa` if the machine lacks it.
pub(crate) fn require(isa: Isa) -> Result<Detected, KernelError> {
    let supported = best().isa();
    // The classes are nested: avx512 asks for everything that avx2 does.
    if (isa as u8) <= (supported as u8) {
        return Ok(Detected(isa));
    }
    Err(KernelError::UnsupportedIsa { isa, supported })
}

impl Isa {
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
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512] {
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
