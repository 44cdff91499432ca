//! What a GPU can do at most, measured: the speeds of the backend are shares of it.

use half::bf16;

use super::launcher;
use super::{CudaError, Gemm, GemmOptions, GemmShape, GemmTypes, Runner, Timer};
use crate::limits::Limits;

/// Of memory, and of the sides of a product, for each multiprocessor: far more than caches hold, and enough to fill the device.
const BYTES_PER_SM: usize = 4 << 20;
const SIDE_PER_SM: usize = 64;
const ROUNDS: usize = 10;

/// Copies memory and multiplies large matrices in bf16, random ones: zeros are faster. What the backend does not use is 0.
///
/// # Errors
/// [`CudaError`]: memory above all.
pub fn measure(runner: &Runner) -> Result<Limits, CudaError> {
    Ok(Limits {
        read_gb_per_s: copy_rate(runner)? / 1e9,
        f32_tflops: 0.0,
        bf16_tflops: product_rate(runner)? / 1e12,
        int8_tops: 0.0,
    })
}

/// Bytes a second, read and written together.
fn copy_rate(runner: &Runner) -> Result<f64, CudaError> {
    let cuda = runner.cuda();
    let bytes = BYTES_PER_SM * cuda.info().num_sms;
    let (from, to) = (cuda.alloc_zeroed(bytes)?, cuda.alloc_zeroed(bytes)?);
    let best = fastest(runner, || to.as_slice::<u8>().copy_from(&from.as_slice()))?;
    Ok(2.0 * bytes as f64 / best)
}

/// Operations a second, two for each multiply-add.
fn product_rate(runner: &Runner) -> Result<f64, CudaError> {
    let cuda = runner.cuda();
    let side = SIDE_PER_SM * cuda.info().num_sms;
    let random = |seed| {
        let buffer = cuda.alloc(2 * side * side)?;
        let address = buffer.as_slice::<bf16>().address();
        runner.launch(&launcher::fill_random(address, side * side, 0, seed, 1.0))?;
        Ok::<_, CudaError>(buffer)
    };
    let (x, w, y) = (random(1)?, random(2)?, cuda.alloc(2 * side * side)?);
    let mut gemm = Gemm::new(cuda, GemmOptions::default())?;
    gemm.warm_up(&[GemmShape { m: side, n: side, k: side, types: GemmTypes::Bf16ToBf16 }])?;
    let best =
        fastest(runner, || gemm.run((side, side, side), x.as_slice(), w.as_slice(), y.as_slice::<bf16>()))?;
    Ok(2.0 * (side as f64).powi(3) / best)
}

/// The shortest time of several, in seconds.
fn fastest(runner: &Runner, mut work: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let mut timer = Timer::new(runner.cuda())?;
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        timer.start()?;
        work()?;
        best = best.min(f64::from(timer.stop_us()?) / 1e6);
    }
    Ok(best)
}
