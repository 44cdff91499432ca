//! How queries and softmax weights are packed, and how they multiply stored keys and values.
//!
//! A **step** is one, two or four elements along the summed axis: the head dim for scores, slots for values. A stored
//! vector holds a step of 16 lanes; the packed row gives one step at a time, broadcast.

use crate::cpu::math::round_bf16;
use crate::cpu::simd::Simd;

/// Behind a packed row: room for what its finish needs, which also keeps rows from fighting for the same cache sets.
const ROW_END: usize = 64;

/// A packed row of up to `N` elements and the stored vectors that it multiplies.
pub(super) trait Operand {
    const STEP: usize;
    /// Bytes of a stored vector of 16 lanes × STEP elements.
    const VECTOR: usize;
    /// Bytes of a packed element in each of `PARTS` arrays that lie one behind the other.
    const BYTES: usize;
    const PARTS: usize;
    /// Vectors of a sum.
    const SUMS: usize;
    /// Whether AVX2 needs registers to take stored vectors apart.
    const EMULATED: bool;
    /// Whether what is stored are integers with a scale per slot. Zero times any of them is zero, so rows may share steps
    /// that not all of them see.
    const INTEGERS: bool;

    type Stored<S: Simd>: Copy;
    type Sum<S: Simd>: Copy;

    unsafe fn load<S: Simd>(s: S, p: *const u8) -> Self::Stored<S>;
    /// As `load`, with zeros for all but the first element of each step.
    unsafe fn load_first<S: Simd>(s: S, p: *const u8) -> Self::Stored<S>;
    /// The largest magnitude of each lane as the bits of an f32: infinity and NaN are on top.
    unsafe fn magnitude<S: Simd>(s: S, stored: Self::Stored<S>) -> S::I;
    unsafe fn zero<S: Simd>(s: S) -> Self::Sum<S>;
    /// Adds the product with the step at `x`; its other part lies `part` bytes behind.
    unsafe fn dot<S: Simd>(
        s: S,
        sum: Self::Sum<S>,
        stored: Self::Stored<S>,
        x: *const u8,
        part: usize,
    ) -> Self::Sum<S>;
    /// The value of a sum; `end` is the end of its packed row.
    unsafe fn finish<S: Simd>(s: S, sum: Self::Sum<S>, end: *const u8) -> S::F;

    /// Packs `vectors` of 16 values into the row at `row`.
    unsafe fn pack<S: Simd, const N: usize>(s: S, row: *mut u8, vectors: usize, source: &impl Source);
    /// The sum of `vectors` packed vectors, as they are multiplied.
    unsafe fn total<S: Simd, const N: usize>(s: S, row: *const u8, vectors: usize) -> f32;
}

/// Values to pack.
pub(super) trait Source {
    /// # Safety
    /// That of [`Simd`]; the vector is inside the row.
    unsafe fn vector<S: Simd>(&self, s: S, index: usize) -> S::F;
}

/// Bytes from one packed row of `N` elements to the next.
pub(super) const fn row_bytes<O: Operand, const N: usize>() -> usize {
    O::PARTS * N * O::BYTES + ROW_END
}

/// bf16 in pairs; rows are one bf16 number, or the sum of two, 16 bits of mantissa together.
pub(super) struct Pairs<const PARTS: usize>;

impl<const PARTS: usize> Operand for Pairs<PARTS> {
    const STEP: usize = 2;
    const VECTOR: usize = 64;
    const BYTES: usize = 2;
    const PARTS: usize = PARTS;
    const SUMS: usize = 1;
    const EMULATED: bool = true;
    const INTEGERS: bool = false;

    type Stored<S: Simd> = S::I;
    type Sum<S: Simd> = S::F;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::I {
        s.load_i(p)
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u8) -> S::I {
        s.and(s.load_i(p), s.splat_i(0xffff))
    }

    #[inline(always)]
    unsafe fn magnitude<S: Simd>(s: S, stored: S::I) -> S::I {
        let magnitude = s.splat_i(0x7fff_0000);
        s.max_u(s.and(stored, magnitude), s.and(s.shl::<16>(stored), magnitude))
    }

    #[inline(always)]
    unsafe fn zero<S: Simd>(s: S) -> S::F {
        s.splat(0.0)
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, sum: S::F, stored: S::I, x: *const u8, part: usize) -> S::F {
        if PARTS == 1 {
            return s.dot_bf16(sum, stored, s.splat_bytes(x));
        }
        s.dot_bf16_split(sum, stored, s.splat_bytes(x), s.splat_bytes(x.add(part)))
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(_s: S, sum: S::F, _end: *const u8) -> S::F {
        sum
    }

    #[inline(always)]
    unsafe fn pack<S: Simd, const N: usize>(s: S, row: *mut u8, vectors: usize, source: &impl Source) {
        for index in 0..vectors {
            let x = source.vector(s, index);
            let out = row.cast::<u16>().add(index * 16);
            s.store_bf16(out, x);
            if PARTS == 2 {
                // Exact: the difference of a number and its rounding is a float.
                s.store_bf16(out.add(N), s.sub(x, round_bf16(s, x)));
            }
        }
    }

    #[inline(always)]
    unsafe fn total<S: Simd, const N: usize>(s: S, row: *const u8, vectors: usize) -> f32 {
        let ones = s.splat_i(0x3f80_3f80);
        let mut sums = [s.splat(0.0); PARTS];
        for part in 0..PARTS {
            let row = row.add(part * N * 2);
            for pair in 0..vectors / 2 {
                sums[part] = s.dot_bf16(sums[part], s.load_i(row.add(pair * 64)), ones);
            }
            if !vectors.is_multiple_of(2) {
                let mut last = [0u16; 32];
                row.add((vectors - 1) * 32).cast::<u16>().copy_to_nonoverlapping(last.as_mut_ptr(), 16);
                sums[part] = s.dot_bf16(sums[part], s.load_i(last.as_ptr().cast()), ones);
            }
        }
        s.reduce_add(if PARTS == 1 { sums[0] } else { s.add(sums[0], sums[PARTS - 1]) })
    }
}

pub(super) struct Floats;

impl Operand for Floats {
    const STEP: usize = 1;
    const VECTOR: usize = 64;
    const BYTES: usize = 4;
    const PARTS: usize = 1;
    const SUMS: usize = 1;
    const EMULATED: bool = false;
    const INTEGERS: bool = false;

    type Stored<S: Simd> = S::F;
    type Sum<S: Simd> = S::F;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        s.load(p.cast())
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u8) -> S::F {
        Self::load(s, p)
    }

    #[inline(always)]
    unsafe fn magnitude<S: Simd>(s: S, stored: S::F) -> S::I {
        s.and(s.bits(stored), s.splat_i(0x7fff_ffff))
    }

    #[inline(always)]
    unsafe fn zero<S: Simd>(s: S) -> S::F {
        s.splat(0.0)
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, sum: S::F, stored: S::F, x: *const u8, _part: usize) -> S::F {
        s.fma(stored, s.splat(*x.cast::<f32>()), sum)
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(_s: S, sum: S::F, _end: *const u8) -> S::F {
        sum
    }

    #[inline(always)]
    unsafe fn pack<S: Simd, const N: usize>(s: S, row: *mut u8, vectors: usize, source: &impl Source) {
        for index in 0..vectors {
            s.store(row.cast::<f32>().add(index * 16), source.vector(s, index));
        }
    }

    #[inline(always)]
    unsafe fn total<S: Simd, const N: usize>(s: S, row: *const u8, vectors: usize) -> f32 {
        let mut sum = s.splat(0.0);
        for index in 0..vectors {
            sum = s.add(sum, s.load(row.cast::<f32>().add(index * 16)));
        }
        s.reduce_add(sum)
    }
}

/// f16, widened when loaded; rows are f32.
pub(super) struct Halves;

impl Operand for Halves {
    const STEP: usize = 1;
    const VECTOR: usize = 32;
    const BYTES: usize = 4;
    const PARTS: usize = 1;
    const SUMS: usize = 1;
    const EMULATED: bool = false;
    const INTEGERS: bool = false;

    type Stored<S: Simd> = S::F;
    type Sum<S: Simd> = S::F;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        s.load_f16(p.cast())
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u8) -> S::F {
        Self::load(s, p)
    }

    #[inline(always)]
    unsafe fn magnitude<S: Simd>(s: S, stored: S::F) -> S::I {
        s.and(s.bits(stored), s.splat_i(0x7fff_ffff))
    }

    #[inline(always)]
    unsafe fn zero<S: Simd>(s: S) -> S::F {
        s.splat(0.0)
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, sum: S::F, stored: S::F, x: *const u8, part: usize) -> S::F {
        Floats::dot(s, sum, stored, x, part)
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(_s: S, sum: S::F, _end: *const u8) -> S::F {
        sum
    }

    #[inline(always)]
    unsafe fn pack<S: Simd, const N: usize>(s: S, row: *mut u8, vectors: usize, source: &impl Source) {
        Floats::pack::<S, N>(s, row, vectors, source);
    }

    #[inline(always)]
    unsafe fn total<S: Simd, const N: usize>(s: S, row: *const u8, vectors: usize) -> f32 {
        Floats::total::<S, N>(s, row, vectors)
    }
}

/// int8; rows are integers `128 · high + low` of two bytes with one scale.
pub(super) struct Bytes;

/// What stands at the end of a packed row of integers.
#[derive(Clone, Copy)]
struct IntegerEnd {
    scale: f32,
    sum: i32,
}

impl Operand for Bytes {
    const STEP: usize = 4;
    const VECTOR: usize = 64;
    const BYTES: usize = 1;
    const PARTS: usize = 2;
    const SUMS: usize = 2;
    const EMULATED: bool = true;
    const INTEGERS: bool = true;

    type Stored<S: Simd> = S::I;
    type Sum<S: Simd> = [S::I; 2];

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::I {
        s.load_i(p)
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u8) -> S::I {
        s.and(s.load_i(p), s.splat_i(0xff))
    }

    #[inline(always)]
    unsafe fn magnitude<S: Simd>(s: S, _stored: S::I) -> S::I {
        s.splat_i(0)
    }

    #[inline(always)]
    unsafe fn zero<S: Simd>(s: S) -> [S::I; 2] {
        [s.splat_i(0); 2]
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(s: S, sum: [S::I; 2], stored: S::I, x: *const u8, part: usize) -> [S::I; 2] {
        [s.dot8(sum[0], stored, s.splat_bytes(x)), s.dot8(sum[1], stored, s.splat_bytes(x.add(part)))]
    }

    /// No sum overflows: 512 · 255 · 16256 is below 2^31.
    #[inline(always)]
    unsafe fn finish<S: Simd>(s: S, sum: [S::I; 2], end: *const u8) -> S::F {
        let end = *end.cast::<IntegerEnd>();
        let whole = s.add_i(s.shl::<7>(sum[0]), sum[1]);
        let signed = s.sub_i(whole, s.splat_i(S::BYTE_ZERO_POINT * end.sum));
        s.mul(s.to_f(signed), s.splat(end.scale))
    }

    /// A NaN or infinity makes the scale NaN.
    #[inline(always)]
    unsafe fn pack<S: Simd, const N: usize>(s: S, row: *mut u8, vectors: usize, source: &impl Source) {
        // 127 · 128, so that the high byte stays in ±127.
        let max = 16256.0;
        let mut amax = s.splat_i(0);
        for index in 0..vectors {
            amax = s.max_u(amax, s.and(s.bits(source.vector(s, index)), s.splat_i(0x7fff_ffff)));
        }
        let amax = f32::from_bits(s.reduce_max_u(amax));
        let (scale, inverse) = if !amax.is_finite() {
            (f32::NAN, 0.0)
        } else if amax < 1e-33 {
            // The reciprocal would overflow.
            (0.0, 0.0)
        } else {
            (amax / max, max / amax)
        };
        let mut sum = s.splat_i(0);
        for index in 0..vectors {
            let scaled = s.mul(source.vector(s, index), s.splat(inverse));
            let value = if inverse == 0.0 { s.splat_i(0) } else { s.to_i(scaled) };
            sum = s.add_i(sum, value);
            let out = row.cast::<i8>().add(index * 16);
            // Nearest multiple of 128, so that what is left is in -64..64.
            let high = s.sar::<7>(s.add_i(value, s.splat_i(64)));
            s.store_bytes(out, high);
            s.store_bytes(out.add(N), s.sub_i(value, s.shl::<7>(high)));
        }
        let end = IntegerEnd { scale, sum: s.reduce_add_i(sum) };
        row.add(2 * N).cast::<IntegerEnd>().write(end);
    }

    #[inline(always)]
    unsafe fn total<S: Simd, const N: usize>(_s: S, row: *const u8, _vectors: usize) -> f32 {
        let end = *row.add(2 * N).cast::<IntegerEnd>();
        end.scale * end.sum as f32
    }
}
