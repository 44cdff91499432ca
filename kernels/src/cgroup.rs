//! The control groups that this process is in, whose limits count beside the machine's.

use std::fs;
use std::path::{Path, PathBuf};

/// One group: where its files are, and of which version they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    pub folder: PathBuf,
    pub is_v1: bool,
}

/// The process's own group for a controller ("cpu", "memory") and all groups around it: each may have a limit.
pub fn cgroups(controller: &str) -> Vec<Cgroup> {
    of(controller, Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"))
}

pub(crate) fn of(controller: &str, membership: &Path, root: &Path) -> Vec<Cgroup> {
    let membership = fs::read_to_string(membership).unwrap_or_default();
    membership.lines().flat_map(|line| of_line(controller, line, root).unwrap_or_default()).collect()
}

/// One line `id:controllers:/path`; controllers are empty in version 2.
fn of_line(controller: &str, line: &str, root: &Path) -> Option<Vec<Cgroup>> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, group) = (fields.next()?, fields.next()?, fields.next()?);
    let is_v1 = controllers.split(',').any(|name| name == controller);
    if !is_v1 && !controllers.is_empty() {
        return None;
    }
    let base = if is_v1 { root.join(controllers) } else { root.to_owned() };
    // Inside a container the own group is often mounted as the root, so both are looked at, and every group between.
    let own = base.join(group.trim_start_matches('/'));
    let around = own.ancestors().take_while(|folder| folder.starts_with(&base));
    Some(around.map(|folder| Cgroup { folder: folder.to_owned(), is_v1 }).collect())
}

impl Cgroup {
    /// The text of one of its files, if it has it.
    pub fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(file)).ok()
    }

    /// A file that is one number; `None` also for "max".
    pub fn number<T: std::str::FromStr>(&self, file: &str) -> Option<T> {
        self.read(file)?.trim().parse().ok()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The groups in a fake `/proc/self/cgroup` and `/sys/fs/cgroup`, while `look` looks at them.
    pub(crate) fn with_fake<T>(
        name: &str,
        (controller, membership): (&str, &str),
        files: &[(&str, &str)],
        look: impl FnOnce(&[Cgroup]) -> T,
    ) -> T {
        let root = std::env::temp_dir().join(format!("tandem-cgroup-{}-{name}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir_all(&root).unwrap();
        let file = root.join("self");
        fs::write(&file, membership).unwrap();
        let seen = look(&of(controller, &file, &root));
        fs::remove_dir_all(&root).unwrap();
        seen
    }

    #[test]
    fn all_groups_around_the_own_one_are_found() {
        let folders = |groups: &[Cgroup]| -> Vec<String> {
            let name = |group: &Cgroup| group.folder.display().to_string();
            groups
                .iter()
                .map(|group| format!("{}{}", name(group), if group.is_v1 { " v1" } else { "" }))
                .collect()
        };
        let v2 = with_fake("around", ("memory", "0::/pod/box\n"), &[], folders);
        let root = v2[2].clone();
        assert_eq!(v2, [format!("{root}/pod/box"), format!("{root}/pod"), root]);
        let v1 = with_fake("v1s", ("memory", "4:memory:/a\n3:cpu,cpuacct:/b\n"), &[], folders);
        assert_eq!(v1.len(), 2);
        assert!(v1[0].ends_with("/memory/a v1") && v1[1].ends_with("/memory v1"), "{v1:?}");
    }
}
