//! Elementary functions over vectors, the same polynomial on every ISA.

use super::simd::Simd;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
// ln 2 in two parts: the first has few bits, so that its product with a small integer is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// e^x within about 2 ULP for −87 ≤ x ≤ 88; clamped to that range outside (0 below −87.3), NaN stays NaN.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let underflow = s.splat(-87.3);
    // min and max give their second operand for NaN.
    let clamped = s.max(underflow, s.min(s.splat(88.0), x));
    let n = s.to_i(s.mul(clamped, s.splat(LOG2_E)));
    let nf = s.to_f(n);
    let r = s.fma(nf, s.splat(-LN2_LOW), s.fma(nf, s.splat(-LN2_HIGH), clamped));
    // Cephes' minimax polynomial of (e^r − 1 − r)/r² on |r| ≤ ln 2 / 2.
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let e = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    let scale = s.float_of_bits(s.shl::<23>(s.add_i(n, s.splat_i(127))));
    s.select_lt(x, underflow, s.splat(0.0), s.mul(e, scale))
}

/// Coefficients of r, r², … in minimax polynomials of 2^r − 1 on |r| ≤ 1/2, and the relative error of 2^r that they leave.
pub(crate) mod exp2_polynomial {
    /// 1.0e-4, far below the rounding of a bf16 number.
    pub(crate) const SHORT: [f32; 3] = [0.693_282_9, 0.242_211, 0.055_008_937];
    /// 9.2e-8.
    #[expect(clippy::approx_constant, reason = "fitted; ln 2 itself would double the error")]
    pub(crate) const LONG: [f32; 5] =
        [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];
}

/// 2^x for x ≤ 127; 0 from −127 down, exactly 1 at 0, NaN stays NaN.
#[inline(always)]
pub(crate) unsafe fn exp2<S: Simd, const N: usize>(s: S, x: S::F, polynomial: &[f32; N]) -> S::F {
    // Adding 1.5 · 2^23 rounds to an integer, which then stands in the low bits.
    let magic = s.splat(12_582_912.0);
    // max gives its second operand for NaN.
    let x = s.max(s.splat(-127.0), x);
    let shifted = s.add(x, magic);
    let r = s.sub(x, s.sub(shifted, magic));
    let mut p = s.splat(polynomial[N - 1]);
    for i in (0..N - 1).rev() {
        p = s.fma(p, r, s.splat(polynomial[i]));
    }
    let p = s.fma(p, r, s.splat(1.0));
    // The exponent field of 2^-127 is 0, and so is that power.
    let scale = s.float_of_bits(s.add_i(s.shl::<23>(s.bits(shifted)), s.splat_i(0x3f80_0000)));
    s.mul(p, scale)
}

/// x · sigmoid(x).
#[inline(always)]
pub(crate) unsafe fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

/// Natural logarithm of a positive normal number, within about 2 ULP. Multiplications and additions are not fused, so
/// that every ISA gives the same bits: sampled noise is the same everywhere.
#[inline(always)]
pub(crate) unsafe fn ln<S: Simd>(s: S, x: S::F) -> S::F {
    // x = 2^e · m with m in [sqrt(1/2), sqrt(2)).
    let bits = s.sub_i(s.bits(x), s.splat_i(0x3f35_04f3));
    let e = s.to_f(s.sar::<23>(bits));
    let mantissa = s.add_i(s.and(bits, s.splat_i(0x007f_ffff)), s.splat_i(0x3f35_04f3));
    let r = s.sub(s.float_of_bits(mantissa), s.splat(1.0));
    let mut p = s.splat(7.037_683_6e-2);
    for c in [
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ] {
        p = s.add(s.mul(p, r), s.splat(c));
    }
    let r2 = s.mul(r, r);
    let y = s.mul(s.mul(p, r), r2);
    let y = s.add(y, s.mul(e, s.splat(LN2_LOW)));
    let y = s.sub(y, s.mul(s.splat(0.5), r2));
    s.add(s.add(r, y), s.mul(e, s.splat(LN2_HIGH)))
}

/// The bf16 nearest to each finite value (ties to even), in f32. A NaN may become anything: where that matters the stored
/// bf16 shows it.
#[inline(always)]
pub(crate) unsafe fn round_bf16<S: Simd>(s: S, x: S::F) -> S::F {
    let bits = s.bits(x);
    let odd = s.and(s.shr::<16>(bits), s.splat_i(1));
    let bits = s.add_i(bits, s.add_i(odd, s.splat_i(0x7fff)));
    s.float_of_bits(s.and(bits, s.splat_i(0xffff_0000_u32.cast_signed())))
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Kernel, dispatch};
    use super::super::testing::backends;
    use super::*;

    enum Function {
        Exp,
        Exp2,
        Exp2Short,
        Ln,
        Silu,
    }

    struct Apply<'a>(Function, &'a mut [f32; 16]);

    impl Kernel for Apply<'_> {
        type Output = ();

        #[inline(always)]
        unsafe fn run<S: Simd>(self, s: S) {
            let x = s.load(self.1.as_ptr());
            let y = match self.0 {
                Function::Exp => exp(s, x),
                Function::Exp2 => exp2(s, x, &exp2_polynomial::LONG),
                Function::Exp2Short => exp2(s, x, &exp2_polynomial::SHORT),
                Function::Ln => ln(s, x),
                Function::Silu => silu(s, x),
            };
            s.store(self.1.as_mut_ptr(), y);
        }
    }

    fn check(
        inputs: impl Iterator<Item = f32>,
        relative: f64,
        of: impl Fn() -> Function,
        exact: impl Fn(f64) -> f64,
    ) {
        let inputs: Vec<f32> = inputs.collect();
        for cpu in backends(1) {
            for chunk in inputs.as_chunks::<16>().0 {
                let mut x = *chunk;
                // SAFETY: the kernel reads and writes its own array.
                unsafe { dispatch(cpu.detected(), Apply(of(), &mut x)) };
                for (x, y) in chunk.iter().zip(x) {
                    let expected = exact(f64::from(*x));
                    let error = (f64::from(y) - expected).abs();
                    assert!(
                        error <= relative * expected.abs() + 1e-37,
                        "{} f({x}) = {y}, not {expected}",
                        cpu.isa()
                    );
                }
            }
        }
    }

    #[test]
    fn exp_is_within_3_ulp() {
        check((0..17_504).map(|i| i as f32 / 100.0 - 87.2), 3.6e-7, || Function::Exp, f64::exp);
    }

    #[test]
    fn exp2_is_as_close_as_its_polynomial() {
        let inputs = || (0..12_600).map(|i| 1.0 - i as f32 / 100.0);
        check(inputs(), 2.5e-7, || Function::Exp2, f64::exp2);
        check(inputs(), 1.1e-4, || Function::Exp2Short, f64::exp2);
    }

    #[test]
    fn ln_is_close_everywhere() {
        let inputs = (1..200_000)
            .map(|i| f32::from_bits(0x0080_0000 + i * 10_000))
            .filter(|x| x.is_finite() && (x - 1.0).abs() > 1e-3);
        check(inputs, 4e-7, || Function::Ln, f64::ln);
    }

    #[test]
    fn silu_saturates() {
        check((0..1600).map(|i| i as f32 / 10.0 - 80.0), 1e-6, || Function::Silu, |x| x / (1.0 + (-x).exp()));
    }

    #[test]
    fn nan_stays_and_the_ends_are_exact() {
        for cpu in backends(1) {
            let mut x = [0.0; 16];
            x[..4].copy_from_slice(&[f32::NAN, f32::NEG_INFINITY, -88.0, 0.0]);
            // SAFETY: as above.
            unsafe { dispatch(cpu.detected(), Apply(Function::Exp, &mut x)) };
            assert!(x[0].is_nan());
            assert_eq!(x[1..4], [0.0, 0.0, 1.0], "{}", cpu.isa());
            for function in [Function::Exp2, Function::Exp2Short] {
                x[..5].copy_from_slice(&[f32::NAN, f32::NEG_INFINITY, -127.0, 0.0, 1.0]);
                // SAFETY: as above.
                unsafe { dispatch(cpu.detected(), Apply(function, &mut x)) };
                assert!(x[0].is_nan());
                assert_eq!(x[1..4], [0.0, 0.0, 1.0], "{}", cpu.isa());
            }
        }
    }
}
