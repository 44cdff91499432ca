//! `tandem kernels`: the GPU kernels compiled into the cache, or checked on a GPU.

use super::{Exit, terminal};
use crate::config::{ConfigError, KernelsConfig};

/// Runs the command.
pub(super) fn kernels(config: KernelsConfig) -> Result<(), Exit> {
    if config.check {
        return check();
    }
    for arch in &config.arch {
        let count = tandem_engine::compile_kernels(arch).map_err(|error| match error {
            tandem_engine::LoadError::Option { reason, .. } => {
                Exit::refused(ConfigError::new(config.origins.of("arch"), reason))
            }
            other => Exit::failed(other),
        })?;
        terminal::print(&format!("{arch}: {count} files of kernels are in the cache\n"));
    }
    Ok(())
}

/// Every kernel against plain loops, a line for each.
fn check() -> Result<(), Exit> {
    let results = tandem_engine::check_kernels().map_err(Exit::refused)?;
    let mut failed = 0;
    for result in &results {
        failed += usize::from(!result.passed);
        terminal::print(&format!("{}\n", result.line));
    }
    match failed {
        0 => Ok(()),
        _ => Err(Exit::failed(format!("{failed} of {} checks failed", results.len()))),
    }
}
