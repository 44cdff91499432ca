//! Loops that reach the machine's limits with the instructions of the kernels: register tiles without scales or
//! conversions and a matrix unit, on operands in the L1 cache, and a streaming read.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(target_arch = "x86_64")]
use super::linear::saturate_matrix_unit;
use super::simd::{Kernel, Simd, dispatch};
use super::{Bytes, Cpu};

/// Which limit a loop measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peak {
    F32,
    Bf16,
    Int8,
}

/// Runs the loop of `peak` on every worker; returns the number of multiplications and additions done in all.
pub(crate) fn measure_peak(cpu: &Cpu, peak: Peak, iterations: usize) -> f64 {
    let isa = cpu.detected();
    let operations = AtomicUsize::new(0);
    cpu.pool.run(&|_| {
        // SAFETY: the kernels read their own arrays.
        let done = unsafe {
            match peak {
                Peak::F32 => dispatch(isa, PeakLoop::<F32> { iterations }),
                #[cfg(target_arch = "x86_64")]
                Peak::Bf16 if let Some(unit) = isa.matrix_unit() => saturate_matrix_unit(unit, iterations),
                Peak::Bf16 => dispatch(isa, PeakLoop::<BF16> { iterations }),
                Peak::Int8 => dispatch(isa, PeakLoop::<INT8> { iterations }),
            }
        };
        operations.fetch_add(done, Ordering::Relaxed);
    });
    operations.into_inner() as f64
}

/// Reads all of `bytes` once, each worker its own stretch; `streams` of them side by side per worker.
pub(crate) fn read_all(cpu: &Cpu, bytes: &Bytes, streams: usize) {
    let isa = cpu.detected();
    let share = bytes.len() / cpu.threads() / streams / 512 * 512;
    cpu.pool.run(&|worker| {
        let start = &bytes[worker * share * streams..][..share * streams];
        // SAFETY: the kernel reads exactly this slice.
        unsafe { dispatch(isa, ReadLoop { bytes: start, streams }) };
    });
}

const STEPS: usize = 16;
/// Times one or two panels: enough independent sums to hide the latency of two pipes.
const ROWS: usize = 6;

/// A register tile over operands that stay in the L1 cache. Every sum has operands of its own, read anew in every
/// iteration through pointers that the compiler knows nothing about, so that no work is shared or hoisted.
struct PeakLoop<const PEAK: u8> {
    iterations: usize,
}

const F32: u8 = Peak::F32 as u8;
const BF16: u8 = Peak::Bf16 as u8;
const INT8: u8 = Peak::Int8 as u8;

impl<const PEAK: u8> Kernel for PeakLoop<PEAK> {
    type Output = usize;

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> usize {
        if S::PANELS == 2 { self.tile::<S, 2>(s) } else { self.tile::<S, 1>(s) }
    }
}

impl<const PEAK: u8> PeakLoop<PEAK> {
    /// Returns the operations done.
    #[inline(always)]
    unsafe fn tile<S: Simd, const C: usize>(&self, s: S) -> usize {
        let weights = [1u8; STEPS * 2 * 64];
        let rows = [1u8; STEPS * ROWS * 4];
        let mut sums = [[s.splat(0.0); C]; ROWS];
        let mut dots = [[s.dot4_start(s.splat_i(0)); C]; ROWS];
        for _ in 0..self.iterations {
            let (weights, rows) = (black_box(weights.as_ptr()), black_box(rows.as_ptr()));
            for step in 0..STEPS {
                let mut w = [s.splat_i(0); C];
                for c in 0..C {
                    w[c] = s.load_i(weights.add((step * C + c) * 64));
                }
                for r in 0..ROWS {
                    let x = s.splat_bytes(rows.add((step * ROWS + r) * 4));
                    for c in 0..C {
                        if PEAK == F32 {
                            sums[r][c] = s.fma(s.float_of_bits(w[c]), s.float_of_bits(x), sums[r][c]);
                        } else if PEAK == BF16 {
                            sums[r][c] = s.dot_bf16(sums[r][c], w[c], x);
                        } else {
                            // Sums wrap around, which costs nothing.
                            dots[r][c] = s.dot4(dots[r][c], w[c], x);
                        }
                    }
                }
            }
        }
        for r in 0..ROWS {
            for c in 0..C {
                let dot = s.dot4_finish(dots[r][c], s.splat_i(0));
                keep(s, [if PEAK == INT8 { dot } else { s.bits(sums[r][c]) }]);
            }
        }
        let per_lane = match PEAK {
            F32 => 2,
            BF16 => 4,
            _ => 8,
        };
        self.iterations * STEPS * ROWS * C * 16 * per_lane
    }
}

/// Makes the results needed.
#[inline(always)]
unsafe fn keep<S: Simd, const N: usize>(s: S, results: [S::I; N]) {
    let mut out = [[0u8; 64]; N];
    for n in 0..N {
        s.store_i(out[n].as_mut_ptr(), results[n]);
    }
    black_box(out);
}

struct ReadLoop<'a> {
    bytes: &'a [u8],
    streams: usize,
}

impl Kernel for ReadLoop<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let share = self.bytes.len() / self.streams;
        let mut acc = [s.splat_i(0); 8];
        for at in (0..share).step_by(512) {
            for stream in 0..self.streams {
                let p = self.bytes.as_ptr().add(stream * share + at);
                for i in 0..8 {
                    acc[i] = s.or(acc[i], s.load_i(p.add(i * 64)));
                }
            }
        }
        keep(s, acc);
    }
}
