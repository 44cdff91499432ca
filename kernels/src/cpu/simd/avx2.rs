//! AVX2, FMA and F16C: two registers per vector of 16 lanes.

use std::arch::x86_64::*;

use super::{Kernel, Simd};
use crate::cpu::isa::Nearest;

/// Only [`enter`] makes one, so holding it means the features are there.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(Nearest);

type F = [__m256; 2];
type I = [__m256i; 2];

/// # Safety
/// The CPU has the features below, and the kernel's own duties are met.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K, prefetch: Nearest) -> K::Output {
    kernel.run(Avx2(prefetch))
}

/// Methods that are the same instruction on both halves.
macro_rules! halves {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)+) => {
        $(#[inline(always)]
        unsafe fn $name(self, $($arg: $ty),*) -> $ret {
            [{ $(let $arg = $arg[0];)* $body }, { $(let $arg = $arg[1];)* $body }]
        })+
    };
}

impl Simd for Avx2 {
    type F = F;
    type I = I;
    /// i16 sums of pairs: 8 steps of at most 2 · 15 · 127 stay below 2^15.
    type Dot4 = I;

    // 3 rows: 6 dot and 6 f32 accumulators (the latter touched once per block), 2 weights, 1 activation of 16 registers.
    const BLOCK_ROWS: usize = 3;
    // 6 rows: 12 accumulators, 2 weights, 1 activation of 16 registers.
    const PLAIN_ROWS: usize = 6;
    // 4 rows: 8 accumulators, the even and odd halves of 2 weights, and of 1 activation: 14 of 16 registers.
    const PAIR_ROWS: usize = 4;
    const PANELS: usize = 1;
    const BYTE_ZERO_POINT: i32 = 0;

    halves! {
        add(a: F, b: F) -> F = _mm256_add_ps(a, b);
        sub(a: F, b: F) -> F = _mm256_sub_ps(a, b);
        mul(a: F, b: F) -> F = _mm256_mul_ps(a, b);
        div(a: F, b: F) -> F = _mm256_div_ps(a, b);
        fma(a: F, b: F, c: F) -> F = _mm256_fmadd_ps(a, b, c);
        max(a: F, b: F) -> F = _mm256_max_ps(a, b);
        min(a: F, b: F) -> F = _mm256_min_ps(a, b);
        select_lt(a: F, b: F, x: F, y: F) -> F = _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b));
        add_i(a: I, b: I) -> I = _mm256_add_epi32(a, b);
        sub_i(a: I, b: I) -> I = _mm256_sub_epi32(a, b);
        and(a: I, b: I) -> I = _mm256_and_si256(a, b);
        or(a: I, b: I) -> I = _mm256_or_si256(a, b);
        max_u(a: I, b: I) -> I = _mm256_max_epu32(a, b);
        to_f(x: I) -> F = _mm256_cvtepi32_ps(x);
        to_i(x: F) -> I = _mm256_cvtps_epi32(x);
        xor(a: I, b: I) -> I = _mm256_xor_si256(a, b);
        bits(x: F) -> I = _mm256_castps_si256(x);
        float_of_bits(x: I) -> F = _mm256_castsi256_ps(x);
        dot4(acc: I, w: I, a: I) -> I = _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, a));
        dot4_finish(acc: I, init: I) -> I = _mm256_add_epi32(init, _mm256_madd_epi16(acc, _mm256_set1_epi16(1)));
        // |w| <= 128 and |a| <= 127: a pair is at most 32512, no saturation; the sign of w moves to a, and -a is exact.
        dot8(acc: I, w: I, a: I) -> I = {
            let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
        dot_bf16(acc: F, w: I, a: I) -> F = {
            let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let w_even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
            let a_even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a));
            let w_odd = _mm256_castsi256_ps(_mm256_and_si256(w, high));
            let a_odd = _mm256_castsi256_ps(_mm256_and_si256(a, high));
            // The pair first: one addition from step to step is a shorter chain than two multiply-adds.
            _mm256_add_ps(acc, _mm256_fmadd_ps(w_odd, a_odd, _mm256_mul_ps(w_even, a_even)))
        };
    }

    /// The sum of the two is exact in f32: one product takes the place of two.
    #[inline(always)]
    unsafe fn dot_bf16_split(self, acc: F, w: I, a: I, rest: I) -> F {
        let high = self.splat_i(0xffff_0000_u32.cast_signed());
        let even = |x: I| self.float_of_bits(self.shl::<16>(x));
        let odd = |x: I| self.float_of_bits(self.and(x, high));
        let (a_even, a_odd) = (self.add(even(a), even(rest)), self.add(odd(a), odd(rest)));
        self.add(acc, self.fma(odd(w), a_odd, self.mul(even(w), a_even)))
    }

    #[inline(always)]
    unsafe fn splat(self, x: f32) -> F {
        [_mm256_set1_ps(x); 2]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: F) {
        _mm256_storeu_ps(p, x[0]);
        _mm256_storeu_ps(p.add(8), x[1]);
    }

    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> F {
        let mask = first(n);
        // Masked-out lanes are not accessed; `wrapping_add` because the second half may lie past the end.
        [_mm256_maskload_ps(p, mask[0]), _mm256_maskload_ps(p.wrapping_add(8), mask[1])]
    }

    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize, x: F) {
        let mask = first(n);
        _mm256_maskstore_ps(p, mask[0], x[0]);
        _mm256_maskstore_ps(p.wrapping_add(8), mask[1], x[1]);
    }

    #[inline(always)]
    unsafe fn less(self, a: F, b: F) -> u32 {
        let mask = |i: usize| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a[i], b[i])).cast_unsigned();
        mask(0) | mask(1) << 8
    }

    #[inline(always)]
    unsafe fn less_i(self, a: I, b: I) -> u32 {
        let mask = |i: usize| {
            _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b[i], a[i]))).cast_unsigned()
        };
        mask(0) | mask(1) << 8
    }

    #[inline(always)]
    unsafe fn mul_wide(self, a: I, b: I) -> (I, I) {
        let half = |a: __m256i, b: __m256i| {
            let even = _mm256_mul_epu32(a, b);
            let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(a), _mm256_srli_epi64::<32>(b));
            let low = _mm256_blend_epi32::<0xaa>(even, _mm256_slli_epi64::<32>(odd));
            let high = _mm256_blend_epi32::<0xaa>(_mm256_srli_epi64::<32>(even), odd);
            (low, high)
        };
        let (first, second) = (half(a[0], b[0]), half(a[1], b[1]));
        ([first.0, second.0], [first.1, second.1])
    }

    #[inline(always)]
    unsafe fn transpose_quads(self, x: [I; 4]) -> [I; 4] {
        let half = |i: usize| {
            let (a, b) = (_mm256_unpacklo_epi32(x[0][i], x[1][i]), _mm256_unpackhi_epi32(x[0][i], x[1][i]));
            let (c, d) = (_mm256_unpacklo_epi32(x[2][i], x[3][i]), _mm256_unpackhi_epi32(x[2][i], x[3][i]));
            [
                _mm256_unpacklo_epi64(a, c),
                _mm256_unpackhi_epi64(a, c),
                _mm256_unpacklo_epi64(b, d),
                _mm256_unpackhi_epi64(b, d),
            ]
        };
        let (first, second) = (half(0), half(1));
        [[first[0], second[0]], [first[1], second[1]], [first[2], second[2]], [first[3], second[3]]]
    }

    #[inline(always)]
    unsafe fn keep_first(self, n: usize, x: F, fill: F) -> F {
        let mask = first(n);
        [
            _mm256_blendv_ps(fill[0], x[0], _mm256_castsi256_ps(mask[0])),
            _mm256_blendv_ps(fill[1], x[1], _mm256_castsi256_ps(mask[1])),
        ]
    }

    #[inline(always)]
    unsafe fn reduce_add(self, x: F) -> f32 {
        let x = _mm256_add_ps(x[0], x[1]);
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }

    #[inline(always)]
    unsafe fn reduce_max(self, x: F) -> f32 {
        let x = _mm256_max_ps(x[0], x[1]);
        let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
    }

    #[inline(always)]
    unsafe fn splat_i(self, x: i32) -> I {
        [_mm256_set1_epi32(x); 2]
    }

    #[inline(always)]
    unsafe fn splat_bytes(self, p: *const u8) -> I {
        [_mm256_set1_epi32(p.cast::<i32>().read_unaligned()); 2]
    }

    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> I {
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())]
    }

    #[inline(always)]
    unsafe fn store_i(self, p: *mut u8, x: I) {
        _mm256_storeu_si256(p.cast(), x[0]);
        _mm256_storeu_si256(p.add(32).cast(), x[1]);
    }

    #[inline(always)]
    unsafe fn shl<const N: u32>(self, a: I) -> I {
        let n = _mm_cvtsi32_si128(N.cast_signed());
        [_mm256_sll_epi32(a[0], n), _mm256_sll_epi32(a[1], n)]
    }

    #[inline(always)]
    unsafe fn shr<const N: u32>(self, a: I) -> I {
        let n = _mm_cvtsi32_si128(N.cast_signed());
        [_mm256_srl_epi32(a[0], n), _mm256_srl_epi32(a[1], n)]
    }

    #[inline(always)]
    unsafe fn sar<const N: u32>(self, a: I) -> I {
        let n = _mm_cvtsi32_si128(N.cast_signed());
        [_mm256_sra_epi32(a[0], n), _mm256_sra_epi32(a[1], n)]
    }

    #[inline(always)]
    unsafe fn reduce_max_u(self, x: I) -> u32 {
        let x = _mm256_max_epu32(x[0], x[1]);
        let x = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
        let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x));
        _mm_cvtsi128_si32(x).cast_unsigned()
    }

    #[inline(always)]
    unsafe fn reduce_add_i(self, x: I) -> i32 {
        let x = _mm256_add_epi32(x[0], x[1]);
        let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
        _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F {
        [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))]
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: F) {
        _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]));
        _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]));
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, x: F) {
        let (low, high) = (bf16_of(x[0]), bf16_of(x[1]));
        // packus works within 128-bit halves: put the four quarters back in order.
        let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
        _mm256_storeu_si256(p.cast(), packed);
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8, x: I) {
        let mut lanes = [0i32; 16];
        self.store_i(lanes.as_mut_ptr().cast(), x);
        for i in 0..16 {
            *p.add(i) = lanes[i] as i8;
        }
    }

    #[inline(always)]
    unsafe fn dot4_start(self, _init: I) -> I {
        [_mm256_setzero_si256(); 2]
    }

    #[inline(always)]
    unsafe fn prefetch(self, p: *const u8) {
        super::prefetch(self.0, p);
    }

    #[inline(always)]
    unsafe fn prefetch_for_write(self, p: *const u8) {
        super::prefetch_for_write(p);
    }

    #[inline(always)]
    unsafe fn call<K: Kernel>(self, kernel: K) -> K::Output {
        enter(kernel, self.0)
    }
}

/// bf16 in the low half of each 32-bit lane, rounded to nearest even; a NaN keeps its top bits and becomes quiet.
#[inline(always)]
unsafe fn bf16_of(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
}

#[inline(always)]
unsafe fn first(n: usize) -> I {
    let n = _mm256_set1_epi32(n as i32);
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    [_mm256_cmpgt_epi32(n, lanes), _mm256_cmpgt_epi32(n, _mm256_add_epi32(lanes, _mm256_set1_epi32(8)))]
}
