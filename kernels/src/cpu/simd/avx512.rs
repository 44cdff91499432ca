//! AVX-512 F, BW, VL, DQ, BF16 and VNNI: one register per vector.

use std::arch::x86_64::*;

use super::{Kernel, Simd};
use crate::cpu::isa::Nearest;

/// Only [`enter`] makes one, so holding it means the features are there.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(Nearest);

/// # Safety
/// The CPU has the features below, and the kernel's own duties are met.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K, prefetch: Nearest) -> K::Output {
    kernel.run(Avx512(prefetch))
}

/// Methods that are one instruction.
macro_rules! direct {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)+) => {
        $(#[inline(always)]
        unsafe fn $name(self, $($arg: $ty),*) -> $ret {
            $body
        })+
    };
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type Dot4 = __m512i;

    // 6 rows x 2 panels: 12 integer and 12 f32 accumulators, 2 weights, 1 activation: 27 of 32 registers.
    const BLOCK_ROWS: usize = 6;
    // 12 rows x 2 panels: 24 accumulators, 2 weights, 1 activation; 14 loads per 24 multiplications.
    const PLAIN_ROWS: usize = 12;
    const PAIR_ROWS: usize = 12;
    const PANELS: usize = 2;
    const BYTE_ZERO_POINT: i32 = 128;

    direct! {
        splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        store(p: *mut f32, x: __m512) -> () = _mm512_storeu_ps(p, x);
        load_n(p: *const f32, n: usize) -> __m512 = _mm512_maskz_loadu_ps(first(n), p);
        store_n(p: *mut f32, n: usize, x: __m512) -> () = _mm512_mask_storeu_ps(p, first(n), x);
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        select_lt(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 =
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x);
        less(a: __m512, b: __m512) -> u32 = u32::from(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b));
        less_i(a: __m512i, b: __m512i) -> u32 = u32::from(_mm512_cmplt_epi32_mask(a, b));
        keep_first(n: usize, x: __m512, fill: __m512) -> __m512 = _mm512_mask_blend_ps(first(n), fill, x);

        splat_i(x: i32) -> __m512i = _mm512_set1_epi32(x);
        splat_bytes(p: *const u8) -> __m512i = _mm512_set1_epi32(p.cast::<i32>().read_unaligned());
        load_i(p: *const u8) -> __m512i = _mm512_loadu_si512(p.cast());
        store_i(p: *mut u8, x: __m512i) -> () = _mm512_storeu_si512(p.cast(), x);
        add_i(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        sub_i(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi32(a, b);
        and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
        or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        xor(a: __m512i, b: __m512i) -> __m512i = _mm512_xor_si512(a, b);
        max_u(a: __m512i, b: __m512i) -> __m512i = _mm512_max_epu32(a, b);
        reduce_max_u(x: __m512i) -> u32 = _mm512_reduce_max_epu32(x);
        reduce_add_i(x: __m512i) -> i32 = _mm512_reduce_add_epi32(x);
        to_f(x: __m512i) -> __m512 = _mm512_cvtepi32_ps(x);
        to_i(x: __m512) -> __m512i = _mm512_cvtps_epi32(x);
        bits(x: __m512) -> __m512i = _mm512_castps_si512(x);
        float_of_bits(x: __m512i) -> __m512 = _mm512_castsi512_ps(x);

        load_f16(p: *const u16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        store_f16(p: *mut u16, x: __m512) -> () =
            _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        store_bf16(p: *mut u16, x: __m512) -> () =
            _mm256_storeu_si256(p.cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)));
        store_bytes(p: *mut i8, x: __m512i) -> () = _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(x));

        dot_bf16(acc: __m512, w: __m512i, a: __m512i) -> __m512 =
            _mm512_dpbf16_ps(acc, std::mem::transmute::<__m512i, __m512bh>(w), std::mem::transmute::<__m512i, __m512bh>(a));
        dot4_start(init: __m512i) -> __m512i = init;
        dot4(acc: __m512i, w: __m512i, a: __m512i) -> __m512i = _mm512_dpbusd_epi32(acc, w, a);
        dot8(acc: __m512i, w: __m512i, a: __m512i) -> __m512i = _mm512_dpbusd_epi32(acc, w, a);
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
    unsafe fn dot4_finish(self, acc: __m512i, _init: __m512i) -> __m512i {
        acc
    }

    #[inline(always)]
    unsafe fn mul_wide(self, a: __m512i, b: __m512i) -> (__m512i, __m512i) {
        let even = _mm512_mul_epu32(a, b);
        let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(a), _mm512_srli_epi64::<32>(b));
        let low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64::<32>(odd));
        let high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64::<32>(even), odd);
        (low, high)
    }

    #[inline(always)]
    unsafe fn transpose_quads(self, x: [__m512i; 4]) -> [__m512i; 4] {
        let (a, b) = (_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
        let (c, d) = (_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
        [
            _mm512_unpacklo_epi64(a, c),
            _mm512_unpackhi_epi64(a, c),
            _mm512_unpacklo_epi64(b, d),
            _mm512_unpackhi_epi64(b, d),
        ]
    }

    #[inline(always)]
    unsafe fn shl<const N: u32>(self, a: __m512i) -> __m512i {
        _mm512_slli_epi32::<N>(a)
    }

    #[inline(always)]
    unsafe fn shr<const N: u32>(self, a: __m512i) -> __m512i {
        _mm512_srli_epi32::<N>(a)
    }

    #[inline(always)]
    unsafe fn sar<const N: u32>(self, a: __m512i) -> __m512i {
        _mm512_srai_epi32::<N>(a)
    }

    #[inline(always)]
    unsafe fn reduce_add(self, x: __m512) -> f32 {
        // Written out: the tree is part of the numeric class, the library's may change.
        let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }

    #[inline(always)]
    unsafe fn reduce_max(self, x: __m512) -> f32 {
        _mm512_reduce_max_ps(x)
    }

    #[inline(always)]
    unsafe fn call<K: Kernel>(self, kernel: K) -> K::Output {
        enter(kernel, self.0)
    }
}

#[inline(always)]
const fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as u16
}
