//! What the machine has: instruction set, CPUs, memory.

use std::fs;

use super::{LoadError, ModelOptions, make_cpu};

/// The machine as this process may use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineInfo {
    pub isa: &'static str,
    pub threads: usize,
    /// Memory that can be taken now: the smaller of the system's and what the cgroup still allows.
    pub memory_available_bytes: u64,
    /// The cgroup's limit, if it has one.
    pub memory_limit_bytes: Option<u64>,
}

/// Looks at the machine with a model's backend options.
///
/// # Errors
/// If the options ask for an instruction set or a number of threads that cannot be had.
pub fn machine_info(options: &ModelOptions) -> Result<MachineInfo, LoadError> {
    let cpu = make_cpu(options)?;
    Ok(MachineInfo {
        isa: cpu.isa().name(),
        threads: cpu.threads(),
        memory_available_bytes: memory_available_bytes(),
        memory_limit_bytes: cgroup_memory().map(|(limit, _)| limit),
    })
}

/// Bytes that can be taken without swapping or being killed; a cautious guess where the system does not say.
pub(super) fn memory_available_bytes() -> u64 {
    const UNKNOWN: u64 = 2 << 30;
    let system = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available_in_meminfo(&text))
        .unwrap_or(UNKNOWN);
    match cgroup_memory() {
        Some((limit, used)) => system.min(limit.saturating_sub(used)),
        None => system,
    }
}

fn available_in_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Limit and use of this process's cgroup, version 2 or 1; the use does not count what the kernel can drop at once.
fn cgroup_memory() -> Option<(u64, u64)> {
    let read = |path: &str| fs::read_to_string(path).ok();
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let v2 = || {
        Some((
            number("/sys/fs/cgroup/memory.max")?,
            number("/sys/fs/cgroup/memory.current")?,
            "/sys/fs/cgroup/memory.stat",
        ))
    };
    let v1 = || {
        let folder = "/sys/fs/cgroup/memory";
        let limit = number(&format!("{folder}/memory.limit_in_bytes"))?;
        // Version 1 says "no limit" with a huge number.
        let usage = number(&format!("{folder}/memory.usage_in_bytes"))?;
        (limit < 1 << 60).then_some((limit, usage, "/sys/fs/cgroup/memory/memory.stat"))
    };
    let (limit, used, stat) = v2().or_else(v1)?;
    let reclaimable = read(stat).and_then(|text| inactive_file(&text)).unwrap_or(0);
    Some((limit, used.saturating_sub(reclaimable)))
}

fn inactive_file(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| {
        line.strip_prefix("total_inactive_file ").or_else(|| line.strip_prefix("inactive_file "))
    })?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_own_words_are_understood() {
        assert_eq!(available_in_meminfo("MemTotal: 5 kB\nMemAvailable:   24000 kB\n"), Some(24000 * 1024));
        assert_eq!(available_in_meminfo("MemTotal: 5 kB\n"), None);
        assert_eq!(inactive_file("anon 3\ninactive_file 4096\n"), Some(4096));
        assert!(memory_available_bytes() > 0);
    }
}
