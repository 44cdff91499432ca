//! The vector that every operation of the CPU backend is written over: 16 lanes of 32 bits on every ISA.
//!
//! One [`Kernel`] is generic over [`Simd`]; [`dispatch`] compiles it once per ISA inside a function that enables the
//! ISA's features and inlines everything below it. Lanes are 16 on every ISA (AVX2 uses two registers), so layouts and
//! the order of additions do not depend on it; only rounding inside [`Simd::fma`] and the dot products does.
//!
//! # Safety
//! Every method of [`Simd`] is `unsafe`: the caller must be running on a CPU that has the ISA's features, which
//! [`dispatch`] proves by its [`Detected`] argument. Methods that take pointers need them valid for the bytes that they
//! name (a vector of `F` or `I` is 64 bytes); no alignment beyond that of the element is required.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use scalar::Scalar;

use super::isa::{Detected, Nearest};
use crate::Isa;

/// Sixteen lanes of f32 (`F`) and of i32 or 64 bytes (`I`).
pub(crate) trait Simd: Copy {
    type F: Copy;
    type I: Copy;
    /// Running sum of a block's 4-bit dot product; at most 8 steps between start and finish.
    type Dot4: Copy;

    /// Rows of a register tile of two panels in integer (and block-scaled) kernels.
    const BLOCK_ROWS: usize;
    /// The same for kernels with one accumulator per output.
    const PLAIN_ROWS: usize;
    /// The same for pairs of bf16.
    const PAIR_ROWS: usize;
    /// Panels of 16 columns in one register tile: 1 or 2.
    const PANELS: usize;
    /// What `dot8` takes for zero in a weight byte after its own conversion: its dot product is
    /// `Σ (w − (128 − BYTE_ZERO_POINT)) · a`.
    const BYTE_ZERO_POINT: i32;

    unsafe fn splat(self, x: f32) -> Self::F;
    unsafe fn load(self, p: *const f32) -> Self::F;
    unsafe fn store(self, p: *mut f32, x: Self::F);
    /// The first `n` (≤ 16) values, zeros behind them.
    unsafe fn load_n(self, p: *const f32, n: usize) -> Self::F;
    unsafe fn store_n(self, p: *mut f32, n: usize, x: Self::F);
    unsafe fn add(self, a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`; rounded once, except on the scalar ISA.
    unsafe fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `b` where either is NaN.
    unsafe fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `b` where either is NaN.
    unsafe fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `x` where `a < b`, else `y` (also where unordered).
    unsafe fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// Bit `i` is set where lane `i` of `a` is less than that of `b`; never where they are unordered.
    unsafe fn less(self, a: Self::F, b: Self::F) -> u32;
    /// The same for signed integers.
    unsafe fn less_i(self, a: Self::I, b: Self::I) -> u32;
    /// The first `n` lanes of `x`, `fill` behind them; what stood there does not matter.
    unsafe fn keep_first(self, n: usize, x: Self::F, fill: Self::F) -> Self::F;
    /// Sum of the lanes in a fixed tree: halves onto each other, 16 → 8 → 4 → 2 → 1.
    unsafe fn reduce_add(self, x: Self::F) -> f32;
    unsafe fn reduce_max(self, x: Self::F) -> f32;

    unsafe fn splat_i(self, x: i32) -> Self::I;
    /// Broadcasts the 4 bytes at `p`.
    unsafe fn splat_bytes(self, p: *const u8) -> Self::I;
    unsafe fn load_i(self, p: *const u8) -> Self::I;
    unsafe fn store_i(self, p: *mut u8, x: Self::I);
    unsafe fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub_i(self, a: Self::I, b: Self::I) -> Self::I;
    unsafe fn and(self, a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(self, a: Self::I, b: Self::I) -> Self::I;
    unsafe fn xor(self, a: Self::I, b: Self::I) -> Self::I;
    /// Low and high halves of the 64-bit products of unsigned lanes.
    unsafe fn mul_wide(self, a: Self::I, b: Self::I) -> (Self::I, Self::I);
    /// Lane `4q + k` of vector `j` becomes lane `4q + j` of vector `k`, for each `q`: four transposes of 4 × 4.
    unsafe fn transpose_quads(self, x: [Self::I; 4]) -> [Self::I; 4];
    unsafe fn shl<const N: u32>(self, a: Self::I) -> Self::I;
    /// Logical shift of 32-bit lanes.
    unsafe fn shr<const N: u32>(self, a: Self::I) -> Self::I;
    /// Arithmetic shift of 32-bit lanes.
    unsafe fn sar<const N: u32>(self, a: Self::I) -> Self::I;
    /// Unsigned maximum of 32-bit lanes.
    unsafe fn max_u(self, a: Self::I, b: Self::I) -> Self::I;
    unsafe fn reduce_max_u(self, x: Self::I) -> u32;
    unsafe fn reduce_add_i(self, x: Self::I) -> i32;
    unsafe fn to_f(self, x: Self::I) -> Self::F;
    /// Nearest integer, ties to even.
    unsafe fn to_i(self, x: Self::F) -> Self::I;
    unsafe fn bits(self, x: Self::F) -> Self::I;
    unsafe fn float_of_bits(self, x: Self::I) -> Self::F;

    /// 16 values of f16 at `p` (32 bytes).
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    unsafe fn store_f16(self, p: *mut u16, x: Self::F);
    /// Writes 16 values of bf16, rounded to nearest even; NaN stays NaN.
    unsafe fn store_bf16(self, p: *mut u16, x: Self::F);
    /// Writes the low byte of each lane (16 bytes).
    unsafe fn store_bytes(self, p: *mut i8, x: Self::I);

    /// Adds to each lane the product of its pair of bf16 in `w` with the pair in `a`.
    unsafe fn dot_bf16(self, acc: Self::F, w: Self::I, a: Self::I) -> Self::F;
    /// The same for numbers that are sums of two bf16, `a + rest`.
    #[inline(always)]
    unsafe fn dot_bf16_split(self, acc: Self::F, w: Self::I, a: Self::I, rest: Self::I) -> Self::F {
        self.dot_bf16(self.dot_bf16(acc, w, a), w, rest)
    }
    /// Starts a 4-bit dot product whose result has `init` added.
    unsafe fn dot4_start(self, init: Self::I) -> Self::Dot4;
    /// Adds to each lane four products of unsigned bytes of `w` (≤ 15) and signed bytes of `a`.
    unsafe fn dot4(self, acc: Self::Dot4, w: Self::I, a: Self::I) -> Self::Dot4;
    /// `init` is that of `dot4_start`.
    unsafe fn dot4_finish(self, acc: Self::Dot4, init: Self::I) -> Self::I;
    /// Adds to each lane four products of stored bytes `w` (weight + 128) less `128 − BYTE_ZERO_POINT`, and signed
    /// bytes of `a` in −127..=127.
    unsafe fn dot8(self, acc: Self::I, w: Self::I, a: Self::I) -> Self::I;

    /// Asks for the line at `p`, which may be anything.
    unsafe fn prefetch(self, p: *const u8);
    /// The same for a line that will be written: no other core keeps it.
    unsafe fn prefetch_for_write(self, p: *const u8);

    /// Runs a kernel as a function of its own: what is inlined everywhere would be compiled everywhere.
    ///
    /// # Safety
    /// What the kernel itself asks for.
    unsafe fn call<K: Kernel>(self, kernel: K) -> K::Output;
}

/// A piece of work written over [`Simd`].
pub(crate) trait Kernel {
    type Output;
    /// Implementations are `#[inline(always)]`, so that they take on the features of the function around them.
    ///
    /// # Safety
    /// That of the [`Simd`] methods, and what the kernel itself asks for.
    unsafe fn run<S: Simd>(self, s: S) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(nearest: Nearest, p: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    // SAFETY: SSE is in the baseline, and a prefetch touches nothing that can fail.
    unsafe {
        match nearest {
            Nearest::L1 => _mm_prefetch::<_MM_HINT_T0>(p.cast()),
            Nearest::L2 => _mm_prefetch::<_MM_HINT_T1>(p.cast()),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch_for_write(p: *const u8) {
    // The intrinsic becomes a read without a target feature of its own. Where the instruction is not known it does nothing.
    // SAFETY: a prefetch touches nothing that can fail.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) p, options(nostack, preserves_flags, readonly));
    }
}

/// Runs a kernel with the instructions that `isa` proves to exist.
///
/// # Safety
/// What the kernel itself asks for (lengths behind its pointers).
#[inline]
pub(crate) unsafe fn dispatch<K: Kernel>(isa: Detected, kernel: K) -> K::Output {
    match isa.isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => avx512::enter(kernel, isa.prefetch()),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::enter(kernel, isa.prefetch()),
        _ => scalar::enter(kernel),
    }
}
