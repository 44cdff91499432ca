//! What the machine has: instruction set, CPUs, memory.

use std::fs;

use tandem_kernels::cgroup::{Cgroup, cgroups};

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
        memory_limit_bytes: cgroup_memory().map(|memory| memory.limit),
    })
}

/// Bytes that can be taken without swapping or being killed; a cautious guess where the system does not say.
pub(super) fn memory_available_bytes() -> u64 {
    const UNKNOWN: u64 = 2 << 30;
    let system = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available_in_meminfo(&text))
        .unwrap_or(UNKNOWN);
    cgroup_memory().map_or(system, |memory| memory.left.min(system))
}

fn available_in_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The limit of a control group, and what is left of it: what the kernel can drop at once is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct GroupMemory {
    limit: u64,
    left: u64,
}

/// Of the process's groups the one with the least left.
fn cgroup_memory() -> Option<GroupMemory> {
    cgroups("memory").iter().filter_map(group_memory).min_by_key(|memory| memory.left)
}

fn group_memory(group: &Cgroup) -> Option<GroupMemory> {
    let [limit, used] = match group.is_v1 {
        true => ["memory.limit_in_bytes", "memory.usage_in_bytes"],
        false => ["memory.max", "memory.current"],
    };
    let (limit, used) = (group.number::<u64>(limit)?, group.number::<u64>(used)?);
    // Version 1 says "no limit" with a huge number.
    if limit >= 1 << 60 {
        return None;
    }
    let reclaimable = group.read("memory.stat").and_then(|text| inactive_file(&text)).unwrap_or(0);
    Some(GroupMemory { limit, left: limit.saturating_sub(used.saturating_sub(reclaimable)) })
}

fn inactive_file(stat: &str) -> Option<u64> {
    // Version 1 has both, and its use counts groups below.
    let find = |name| stat.lines().find_map(|line| line.strip_prefix(name));
    find("total_inactive_file ").or_else(|| find("inactive_file "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_own_words_are_understood() {
        assert_eq!(available_in_meminfo("MemTotal: 5 kB\nMemAvailable:   24000 kB\n"), Some(24000 * 1024));
        assert_eq!(available_in_meminfo("MemTotal: 5 kB\n"), None);
        assert_eq!(inactive_file("anon 3\ninactive_file 4096\n"), Some(4096));
        assert_eq!(inactive_file("inactive_file 1\ntotal_inactive_file 4096\n"), Some(4096));
        assert!(memory_available_bytes() > 0);
    }

    #[test]
    fn a_groups_memory_is_what_its_limit_leaves() {
        let folder = std::env::temp_dir().join(format!("tandem-group-memory-{}", std::process::id()));
        let memory = |is_v1, files: &[(&str, &str)]| {
            fs::create_dir_all(&folder).unwrap();
            files.iter().for_each(|(name, text)| fs::write(folder.join(name), text).unwrap());
            let found = group_memory(&Cgroup { folder: folder.clone(), is_v1 });
            fs::remove_dir_all(&folder).unwrap();
            found
        };
        let used = ("memory.current", "700\n");
        let stat = ("memory.stat", "anon 3\ninactive_file 100\n");
        let expected = Some(GroupMemory { limit: 1000, left: 400 });
        assert_eq!(memory(false, &[("memory.max", "1000\n"), used, stat]), expected);
        assert_eq!(memory(false, &[("memory.max", "max\n"), used, stat]), None);
        let v1 = [("memory.limit_in_bytes", "1000\n"), ("memory.usage_in_bytes", "600\n")];
        assert_eq!(memory(true, &v1), expected);
        let free = [("memory.limit_in_bytes", "9223372036854771712\n"), v1[1]];
        assert_eq!(memory(true, &free), None);
    }
}
