//! The checks when an engine starts: once for each kind of GPU, driver and compiler.

use super::super::sources::{PRELUDE, SOURCES};
use super::super::{CacheKey, Cuda, CudaError, DeviceLauncher, KernelCache, Origin, Runner, driver};
use super::check_all;

/// Inputs of checks outside tests are drawn from it.
pub const SEED: u64 = 1;

/// What the cache keeps of checks that passed.
const PASSED: &[u8] = b"passed";

/// Runs all checks, unless `cache` holds that they passed in this version of the program, on a GPU of this name, with this driver
/// and compiler. Where they did not come from the cache they took seconds.
///
/// # Errors
/// [`CudaError::WrongResults`] if a kernel computes what a plain loop does not; nothing is kept then. Those of the driver.
pub fn check_once(runner: &Runner, cache: &KernelCache) -> Result<Origin, CudaError> {
    let key = key_of(runner.cuda())?;
    let (_, origin) = cache.get_or_compile(&key, || {
        let (mut checks, mut failures) = (0, Vec::new());
        check_all(&mut DeviceLauncher::new(runner), SEED, |result| {
            checks += 1;
            failures.extend(result.failure.map(|reason| format!("{}: {reason}", result.name)));
        });
        match failures.first() {
            None => Ok(PASSED.to_vec()),
            Some(first) => Err(CudaError::WrongResults {
                gpu: runner.cuda().info().name.clone(),
                failed: failures.len(),
                checks,
                first: first.clone(),
            }),
        }
    })?;
    Ok(origin)
}

fn key_of(cuda: &Cuda) -> Result<CacheKey, CudaError> {
    let mut source = PRELUDE.to_owned();
    SOURCES.iter().for_each(|module| source.push_str(module.text));
    let driver = format!("driver {}", driver::driver_version()?);
    let options = [env!("CARGO_PKG_VERSION"), cuda.info().name.as_str(), driver.as_str()];
    Ok(CacheKey::new("checked", &source, cuda.target().name(), &options, driver::nvrtc()?))
}
