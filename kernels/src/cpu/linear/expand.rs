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

/// Nibbles less their zero point, as bf16: a block becomes 1024 bytes, `[16 pairs][16][2]`. Small integers are exact.
pub(super) struct NibblesToBf16 {
    pub(super) from: *const u8,
    pub(super) to: *mut u8,
    pub(super) blocks: usize,
    pub(super) zero_point: u8,
    /// Bytes ahead that are prefetched.
    pub(super) ahead: usize,
}

impl Kernel for NibblesToBf16 {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let low = s.splat_i(0x0f0f_0f0f);
        let zero_point = i32::from(self.zero_point);
        for block in 0..self.blocks {
            let (from, to) = (self.from.add(block * 256), self.to.add(block * 1024));
            for group in 0..4 {
                s.prefetch(from.wrapping_add(group * 64 + self.ahead));
                let w = s.load_i(from.add(group * 64));
                bytes_to_bf16(s, s.and(w, low), zero_point, to.add(group * 128));
                bytes_to_bf16(s, s.and(s.shr::<4>(w), low), zero_point, to.add(512 + group * 128));
            }
        }
    }
}

/// Bytes (weight + 128) to bf16, as above.
pub(super) struct BytesToBf16 {
    pub(super) from: *const u8,
    pub(super) to: *mut u8,
    pub(super) blocks: usize,
    pub(super) ahead: usize,
}

impl Kernel for BytesToBf16 {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for group in 0..self.blocks * 8 {
            s.prefetch(self.from.wrapping_add(group * 64 + self.ahead));
            bytes_to_bf16(s, s.load_i(self.from.add(group * 64)), 128, self.to.add(group * 128));
        }
    }
}

/// One k-group (4 unsigned bytes per lane) to two vectors of pairs. The upper half of an f32 that holds an integer of
/// at most 8 bits is that integer in bf16.
#[inline(always)]
unsafe fn bytes_to_bf16<S: Simd>(s: S, w: S::I, zero_point: i32, to: *mut u8) {
    let values = [
        integer_bits(s, w, zero_point),
        integer_bits(s, s.shr::<8>(w), zero_point),
        integer_bits(s, s.shr::<16>(w), zero_point),
        integer_bits(s, s.shr::<24>(w), zero_point),
    ];
    let upper = s.splat_i(0xffff_0000_u32.cast_signed());
    s.store_i(to, s.or(s.shr::<16>(values[0]), s.and(values[1], upper)));
    s.store_i(to.add(64), s.or(s.shr::<16>(values[2]), s.and(values[3], upper)));
}

/// The low byte of each lane less the zero point, as the bits of an f32. (A function, not a closure: closures are not
/// forced inline, and a call per vector costs more than the work.)
#[inline(always)]
unsafe fn integer_bits<S: Simd>(s: S, w: S::I, zero_point: i32) -> S::I {
    let value = s.sub_i(s.and(w, s.splat_i(0xff)), s.splat_i(zero_point));
    s.bits(s.to_f(value))
}
