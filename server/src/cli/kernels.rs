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
    let (mut checks, mut failed) = (0, 0);
    let checked = tandem_engine::check_kernels(|result| {
        checks += 1;
        failed += usize::from(!result.passed);
        terminal::print(&format!("{}\n", result.line));
    });
    checked.map_err(Exit::refused)?;
    match failed {
        0 => Ok(()),
        _ => Err(Exit::failed(format!("{failed} of {checks} checks failed"))),
    }
}
