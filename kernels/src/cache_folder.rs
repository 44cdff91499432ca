//! Where this user keeps what can be made again.

use std::ffi::OsString;
use std::path::PathBuf;

/// `TANDEM_CACHE_DIR`, else `tandem` in the user's cache folder; `None` if no variable says where that is.
pub fn cache_folder() -> Option<PathBuf> {
    of(|name| std::env::var_os(name))
}

fn of(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let folder = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("TANDEM_CACHE_DIR")
        .or_else(|| folder("XDG_CACHE_HOME").map(|folder| folder.join("tandem")))
        .or_else(|| folder("HOME").map(|home| home.join(".cache").join("tandem")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_comes_from_the_environment() {
        let dir = |vars: &[(&str, &str)]| {
            of(|name| vars.iter().find(|(var, _)| *var == name).map(|(_, value)| value.into()))
        };
        let home = ("HOME", "/h");
        assert_eq!(dir(&[("TANDEM_CACHE_DIR", "/t"), ("XDG_CACHE_HOME", "/x"), home]), Some("/t".into()));
        assert_eq!(
            dir(&[("TANDEM_CACHE_DIR", ""), ("XDG_CACHE_HOME", "/x"), home]),
            Some("/x/tandem".into())
        );
        assert_eq!(dir(&[home]), Some("/h/.cache/tandem".into()));
        assert_eq!(dir(&[]), None);
    }
}
