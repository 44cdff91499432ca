//! What this machine can do at most: every speed that Tandem reports is a share of one of these.

use std::time::{Duration, Instant};

use crate::cpu::{Bytes, Cpu, Peak, measure_peak, read_all};

/// Measured limits of all workers together, with the backend's instruction set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Streaming read of memory far larger than the caches, in 10⁹ bytes per second.
    pub read_gb_per_s: f64,
    /// f32 fused multiply-add, 10¹² operations per second (a multiplication and an addition are two).
    pub f32_tflops: f64,
    /// bf16 dot products; where they are made of f32 multiply-adds, at least what those reach.
    pub bf16_tflops: f64,
    /// int8 dot products.
    pub int8_tops: f64,
}

const READ_BYTES: usize = 256 << 20;
const ROUND: Duration = Duration::from_millis(4);
const ROUNDS: usize = 12;

/// Measures for about a quarter of a second. Each limit is the best of several rounds: a share computed against it should
/// not exceed 1.
pub fn measure(cpu: &Cpu) -> Limits {
    let f32_tflops = peak(cpu, Peak::F32) / 1e12;
    Limits {
        f32_tflops,
        bf16_tflops: (peak(cpu, Peak::Bf16) / 1e12).max(f32_tflops),
        int8_tops: peak(cpu, Peak::Int8) / 1e12,
        read_gb_per_s: read(cpu) / 1e9,
    }
}

/// Operations per second.
fn peak(cpu: &Cpu, peak: Peak) -> f64 {
    let timed = |iterations| {
        let start = Instant::now();
        let operations = measure_peak(cpu, peak, iterations);
        (operations, start.elapsed())
    };
    // Long enough that starting the workers does not count.
    let mut iterations = 64;
    while timed(iterations).1 < ROUND / 2 {
        iterations *= 2;
    }
    (0..ROUNDS)
        .map(|_| timed(iterations))
        .map(|(operations, time)| operations / time.as_secs_f64())
        .fold(0.0, f64::max)
}

/// Bytes per second.
fn read(cpu: &Cpu) -> f64 {
    let mut bytes = Bytes::zeroed(READ_BYTES);
    bytes.advise_huge();
    // Memory that was never written is one shared page of zeros.
    bytes.fill(1);
    let mut best = 0.0f64;
    for round in 0..ROUNDS {
        let start = Instant::now();
        read_all(cpu, &bytes, [1, 2, 4][round % 3]);
        best = best.max(READ_BYTES as f64 / start.elapsed().as_secs_f64());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuOptions;

    #[test]
    fn limits_are_plausible() {
        let cpu = Cpu::new(CpuOptions::default()).unwrap();
        let limits = measure(&cpu);
        for value in [limits.read_gb_per_s / 1000.0, limits.f32_tflops, limits.bf16_tflops, limits.int8_tops]
        {
            assert!(value.is_finite() && value > 1e-4 && value < 1e3, "{limits:?}");
        }
    }
}
