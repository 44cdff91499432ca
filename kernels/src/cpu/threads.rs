//! How many threads this process may really use: affinity, and the CPU quota of its control group.

use std::thread;

use crate::cgroup::{Cgroup, cgroups};

/// Whole CPUs of the quota and of the affinity mask, at least 1. Threads beyond the quota would be throttled in the
/// middle of a step, with every other worker waiting for them.
pub fn default_threads() -> usize {
    // Counts the affinity mask (and on Linux the v2 quota of the own group).
    let available = thread::available_parallelism().map_or(1, usize::from);
    quota(&cgroups("cpu")).map_or(available, |cpus| cpus.min(available)).max(1)
}

/// The tightest quota of the groups, rounded down to whole CPUs; `None` without a limit.
fn quota(groups: &[Cgroup]) -> Option<usize> {
    let limit = |group: &Cgroup| if group.is_v1 { v1_limit(group) } else { v2_limit(group) };
    groups.iter().filter_map(limit).min()
}

/// `cpu.max`: "quota period", quota "max" for none.
fn v2_limit(group: &Cgroup) -> Option<usize> {
    let text = group.read("cpu.max")?;
    let (quota, period) = text.trim().split_once(' ')?;
    whole_cpus(quota.parse().ok()?, period.parse().ok()?)
}

/// `cpu.cfs_quota_us`, −1 for none.
fn v1_limit(group: &Cgroup) -> Option<usize> {
    whole_cpus(group.number("cpu.cfs_quota_us")?, group.number("cpu.cfs_period_us")?)
}

fn whole_cpus(quota: i64, period: i64) -> Option<usize> {
    if quota <= 0 || period <= 0 {
        return None;
    }
    usize::try_from(quota / period).ok().map(|cpus| cpus.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::tests::with_fake;

    fn quota_of(name: &str, membership: &str, files: &[(&str, &str)]) -> Option<usize> {
        with_fake(name, ("cpu", membership), files, quota)
    }

    #[test]
    fn the_tightest_group_counts_in_whole_cpus() {
        let files = [("pod/cpu.max", "350000 100000\n"), ("pod/box/cpu.max", "max 100000\n")];
        assert_eq!(quota_of("v2", "0::/pod/box\n", &files), Some(3));
        let root_only = [("cpu.max", "50000 100000\n")];
        assert_eq!(quota_of("half", "0::/\n", &root_only), Some(1));
        assert_eq!(quota_of("none", "0::/pod\n", &[("pod/cpu.max", "max 100000\n")]), None);
    }

    #[test]
    fn version_1_groups_are_read() {
        let files = [
            ("cpu,cpuacct/a/cpu.cfs_quota_us", "200000\n"),
            ("cpu,cpuacct/a/cpu.cfs_period_us", "100000\n"),
            ("memory/a/cpu.cfs_quota_us", "100000\n"),
        ];
        assert_eq!(quota_of("v1", "4:memory:/a\n3:cpu,cpuacct:/a\n", &files), Some(2));
    }

    #[test]
    fn at_least_one_thread() {
        assert!(default_threads() >= 1);
    }
}
