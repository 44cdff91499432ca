//! How many threads this process may really use: affinity, and the CPU quota of its control group.

use std::fs;
use std::path::Path;
use std::thread;

/// Whole CPUs of the quota and of the affinity mask, at least 1. Threads beyond the quota would be throttled in the
/// middle of a step, with every other worker waiting for them.
pub fn default_threads() -> usize {
    // Counts the affinity mask (and on Linux the v2 quota of the own group).
    let available = thread::available_parallelism().map_or(1, usize::from);
    quota(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"))
        .map_or(available, |cpus| cpus.min(available))
        .max(1)
}

/// The tightest quota of the process's groups, rounded down to whole CPUs; `None` without a limit.
fn quota(membership: &Path, root: &Path) -> Option<usize> {
    let membership = fs::read_to_string(membership).ok()?;
    membership.lines().filter_map(|line| group_quota(line, root)).min()
}

/// One line `id:controllers:/path`; controllers are empty in version 2.
fn group_quota(line: &str, root: &Path) -> Option<usize> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, group) = (fields.next()?, fields.next()?, fields.next()?);
    let v1 = controllers.split(',').any(|name| name == "cpu");
    if !v1 && !controllers.is_empty() {
        return None;
    }
    let base = if v1 { root.join(controllers) } else { root.to_owned() };
    // Inside a container the own group is often mounted as the root, so both are looked at, and every group between.
    let own = base.join(group.trim_start_matches('/'));
    own.ancestors()
        .take_while(|path| path.starts_with(&base))
        .filter_map(|path| if v1 { v1_limit(path) } else { v2_limit(path) })
        .min()
}

/// `cpu.max`: "quota period", quota "max" for none.
fn v2_limit(path: &Path) -> Option<usize> {
    let text = fs::read_to_string(path.join("cpu.max")).ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    whole_cpus(quota.parse().ok()?, period.parse().ok()?)
}

/// `cpu.cfs_quota_us`, −1 for none.
fn v1_limit(path: &Path) -> Option<usize> {
    let number = |name| fs::read_to_string(path.join(name)).ok()?.trim().parse().ok();
    whole_cpus(number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?)
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

    /// A fake `/proc/self/cgroup` and `/sys/fs/cgroup`.
    fn quota_of(name: &str, membership: &str, files: &[(&str, &str)]) -> Option<usize> {
        let root = std::env::temp_dir().join(format!("tandem-cgroup-{}-{name}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir_all(&root).unwrap();
        let file = root.join("self");
        fs::write(&file, membership).unwrap();
        let quota = quota(&file, &root);
        fs::remove_dir_all(&root).unwrap();
        quota
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
