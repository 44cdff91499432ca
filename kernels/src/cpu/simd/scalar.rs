//! Plain Rust arrays: runs everywhere, and what the compiler makes of them on the baseline instruction set.

use half::{bf16, f16};

use super::{Kernel, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

type F = [f32; 16];
type I = [i32; 16];

/// # Safety
/// The kernel's own duties are met.
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Scalar)
}

/// Methods that are one expression per lane.
macro_rules! lanes {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)+) => {
        $(#[inline(always)]
        unsafe fn $name(self, $($arg: $ty),*) -> $ret {
            // A plain loop: the compiler turns it into vectors of the baseline, which it does not do for `from_fn`.
            let mut out = <$ret>::default();
            for i in 0..16 {
                out[i] = { $(let $arg = $arg[i];)* $body };
            }
            out
        })+
    };
}

impl Simd for Scalar {
    type F = F;
    type I = I;
    type Dot4 = I;

    const BLOCK_ROWS: usize = 2;
    const PLAIN_ROWS: usize = 2;
    const PAIR_ROWS: usize = 2;
    const PANELS: usize = 1;
    const BYTE_ZERO_POINT: i32 = 0;

    lanes! {
        add(a: F, b: F) -> F = a + b;
        sub(a: F, b: F) -> F = a - b;
        mul(a: F, b: F) -> F = a * b;
        div(a: F, b: F) -> F = a / b;
        // Two roundings: a fused one would be a library call per lane.
        fma(a: F, b: F, c: F) -> F = a * b + c;
        max(a: F, b: F) -> F = if a > b { a } else { b };
        min(a: F, b: F) -> F = if a < b { a } else { b };
        select_lt(a: F, b: F, x: F, y: F) -> F = if a < b { x } else { y };
        add_i(a: I, b: I) -> I = a.wrapping_add(b);
        sub_i(a: I, b: I) -> I = a.wrapping_sub(b);
        and(a: I, b: I) -> I = a & b;
        or(a: I, b: I) -> I = a | b;
        xor(a: I, b: I) -> I = a ^ b;
        max_u(a: I, b: I) -> I = a.cast_unsigned().max(b.cast_unsigned()).cast_signed();
        to_f(x: I) -> F = x as f32;
        to_i(x: F) -> I = x.round_ties_even() as i32;
        bits(x: F) -> I = x.to_bits().cast_signed();
        float_of_bits(x: I) -> F = f32::from_bits(x.cast_unsigned());
        dot4(acc: I, w: I, a: I) -> I = {
            let (w, a) = (w.to_le_bytes(), a.to_le_bytes());
            (0..4).fold(acc, |acc, k| acc.wrapping_add(i32::from(w[k]) * i32::from(a[k].cast_signed())))
        };
        dot8(acc: I, w: I, a: I) -> I = {
            let (w, a) = (w.to_le_bytes(), a.to_le_bytes());
            (0..4).fold(acc, |acc, k| acc + (i32::from(w[k]) - 128) * i32::from(a[k].cast_signed()))
        };
        dot_bf16(acc: F, w: I, a: I) -> F = {
            let pair = |x: i32| {
                let x = x.cast_unsigned();
                (f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000))
            };
            let ((w0, w1), (a0, a1)) = (pair(w), pair(a));
            acc + w0 * a0 + w1 * a1
        };
    }

    #[inline(always)]
    unsafe fn splat(self, x: f32) -> F {
        [x; 16]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        p.cast::<F>().read_unaligned()
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: F) {
        p.cast::<F>().write_unaligned(x);
    }

    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> F {
        std::array::from_fn(|i| if i < n { *p.add(i) } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize, x: F) {
        for i in 0..n {
            *p.add(i) = x[i];
        }
    }

    #[inline(always)]
    unsafe fn less(self, a: F, b: F) -> u32 {
        (0..16).fold(0, |mask, i| mask | u32::from(a[i] < b[i]) << i)
    }

    #[inline(always)]
    unsafe fn less_i(self, a: I, b: I) -> u32 {
        (0..16).fold(0, |mask, i| mask | u32::from(a[i] < b[i]) << i)
    }

    #[inline(always)]
    unsafe fn mul_wide(self, a: I, b: I) -> (I, I) {
        products(a, b)
    }

    #[inline(always)]
    unsafe fn transpose_quads(self, x: [I; 4]) -> [I; 4] {
        std::array::from_fn(|k| std::array::from_fn(|lane| x[lane % 4][lane / 4 * 4 + k]))
    }

    #[inline(always)]
    unsafe fn keep_first(self, n: usize, x: F, fill: F) -> F {
        std::array::from_fn(|i| if i < n { x[i] } else { fill[i] })
    }

    #[inline(always)]
    unsafe fn reduce_add(self, mut x: F) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] += x[i + half];
            }
        }
        x[0]
    }

    #[inline(always)]
    unsafe fn reduce_max(self, x: F) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn splat_i(self, x: i32) -> I {
        [x; 16]
    }

    #[inline(always)]
    unsafe fn splat_bytes(self, p: *const u8) -> I {
        [i32::from_le(p.cast::<i32>().read_unaligned()); 16]
    }

    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> I {
        p.cast::<I>().read_unaligned()
    }

    #[inline(always)]
    unsafe fn store_i(self, p: *mut u8, x: I) {
        p.cast::<I>().write_unaligned(x);
    }

    #[inline(always)]
    unsafe fn shl<const N: u32>(self, a: I) -> I {
        a.map(|a| a << N)
    }

    #[inline(always)]
    unsafe fn shr<const N: u32>(self, a: I) -> I {
        a.map(|a| (a.cast_unsigned() >> N).cast_signed())
    }

    #[inline(always)]
    unsafe fn sar<const N: u32>(self, a: I) -> I {
        a.map(|a| a >> N)
    }

    #[inline(always)]
    unsafe fn reduce_max_u(self, x: I) -> u32 {
        x.into_iter().map(i32::cast_unsigned).fold(0, u32::max)
    }

    #[inline(always)]
    unsafe fn reduce_add_i(self, x: I) -> i32 {
        x.into_iter().sum()
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F {
        std::array::from_fn(|i| f16::from_bits(*p.add(i)).to_f32())
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: F) {
        for i in 0..16 {
            *p.add(i) = f16::from_f32(x[i]).to_bits();
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, x: F) {
        for i in 0..16 {
            *p.add(i) = bf16::from_f32(x[i]).to_bits();
        }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8, x: I) {
        for i in 0..16 {
            *p.add(i) = x[i] as i8;
        }
    }

    #[inline(always)]
    unsafe fn dot4_start(self, init: I) -> I {
        init
    }

    #[inline(always)]
    unsafe fn dot4_finish(self, acc: I, _init: I) -> I {
        acc
    }

    #[inline(always)]
    unsafe fn prefetch(self, _p: *const u8) {}

    #[inline(always)]
    unsafe fn prefetch_for_write(self, _p: *const u8) {}

    #[inline(always)]
    unsafe fn call<K: Kernel>(self, kernel: K) -> K::Output {
        enter(kernel)
    }
}

/// Out of line: inlined before a transpose of quads, LLVM 22 merges the shuffles of both and loses lanes of the high
/// halves (baseline x86-64; a test of the noise's bits shows it).
#[inline(never)]
fn products(a: I, b: I) -> (I, I) {
    let (mut low, mut high) = ([0; 16], [0; 16]);
    for i in 0..16 {
        let product = u64::from(a[i].cast_unsigned()) * u64::from(b[i].cast_unsigned());
        low[i] = (product as u32).cast_signed();
        high[i] = ((product >> 32) as u32).cast_signed();
    }
    (low, high)
}
