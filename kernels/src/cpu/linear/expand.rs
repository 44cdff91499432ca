//! Unpacks integer weights of a panel into scratch memory, once per panel and stretch of K, for many rows to use.

use crate::cpu::simd::{Kernel, Simd};

/// Nibbles to one byte each: 256 bytes of a block become 512.
pub(super) struct ExpandNibbles {
    pub(super) from: *const u8,
    pub(super) to: *mut u8,
    pub(super) blocks: usize,
}

impl Kernel for ExpandNibbles {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let low = s.splat_i(0x0f0f_0f0f);
        for block in 0..self.blocks {
            let (from, to) = (self.from.add(block * 256), self.to.add(block * 512));
            for group in 0..4 {
                let w = s.load_i(from.add(group * 64));
                s.store_i(to.add(group * 64), s.and(w, low));
                s.store_i(to.add(256 + group * 64), s.and(s.shr::<4>(w), low));
            }
        }
    }
}
