//! The secret that the processes of one model instance share.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::error::WireError;
use crate::handshake::Purpose;

const MIN_KEY: usize = 16;
const MAX_KEY: usize = 4096;

/// The group's shared secret, 16 to 4096 bytes. Only keys derived from it stay in memory, one per
/// [`Purpose`], and `Debug` shows none of them.
#[derive(Clone)]
pub struct GroupKey {
    control: [u8; 32],
    collective: [u8; 32],
}

impl GroupKey {
    /// Reads the key from a regular file; one newline at its end is not part of the key.
    ///
    /// # Errors
    /// [`WireError::KeyFile`] names the file and the reason: not readable, no regular file, empty, too short
    /// or long.
    pub fn from_file(path: &Path) -> Result<Self, WireError> {
        let refuse = |reason: String| WireError::KeyFile { file: path.display().to_string(), reason };
        // Asked before opening: to open a pipe would wait for its writer.
        if !fs::metadata(path).map_err(|e| refuse(e.to_string()))?.is_file() {
            return Err(refuse("not a regular file".to_owned()));
        }
        let mut bytes = Vec::new();
        let newline = 2;
        let file = File::open(path).map_err(|e| refuse(e.to_string()))?;
        let most = (MAX_KEY + newline + 1) as u64;
        file.take(most).read_to_end(&mut bytes).map_err(|e| refuse(e.to_string()))?;
        let secret = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        let secret =
            if secret.len() < bytes.len() { secret.strip_suffix(b"\r").unwrap_or(secret) } else { secret };
        check_length(secret).map_err(refuse)?;
        Ok(Self::derive(secret))
    }

    /// Takes every byte as part of the key.
    ///
    /// # Errors
    /// [`WireError::Key`] when there are fewer than 16 or more than 4096 bytes.
    pub fn from_bytes(secret: &[u8]) -> Result<Self, WireError> {
        check_length(secret).map_err(|reason| WireError::Key { reason })?;
        Ok(Self::derive(secret))
    }

    fn derive(secret: &[u8]) -> Self {
        Self {
            control: blake3::derive_key("tandem wire v1 handshake of a control connection", secret),
            collective: blake3::derive_key("tandem wire v1 handshake of a collective connection", secret),
        }
    }

    /// The key of handshakes for one purpose.
    pub(crate) fn for_purpose(&self, purpose: Purpose) -> &[u8; 32] {
        match purpose {
            Purpose::Control => &self.control,
            Purpose::Collective => &self.collective,
        }
    }
}

impl fmt::Debug for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupKey(..)")
    }
}

fn check_length(secret: &[u8]) -> Result<(), String> {
    match secret.len() {
        0 => Err("empty".to_owned()),
        len @ 1..MIN_KEY => Err(format!("{len} bytes are too few, give at least {MIN_KEY}")),
        MIN_KEY..=MAX_KEY => Ok(()),
        _ => Err(format!("longer than {MAX_KEY} bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_error(bytes: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("group.key");
        fs::write(&path, bytes).unwrap();
        let error = GroupKey::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("group.key"), "{error}");
        error
    }

    #[test]
    fn a_key_file_may_end_in_one_newline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let key = GroupKey::from_bytes(b"0123456789abcdef").unwrap();
        for end in ["", "\n", "\r\n"] {
            fs::write(&path, format!("0123456789abcdef{end}")).unwrap();
            assert_eq!(GroupKey::from_file(&path).unwrap().control, key.control, "{end:?}");
        }
        for other in ["0123456789abcdef\n\n", "0123456789abcdef\r", " 0123456789abcdef"] {
            fs::write(&path, other).unwrap();
            assert_ne!(GroupKey::from_file(&path).unwrap().control, key.control, "{other:?}");
        }
        fs::write(&path, [&[7; MAX_KEY][..], b"\r\n"].concat()).unwrap();
        let longest = GroupKey::from_file(&path).unwrap();
        assert_eq!(longest.control, GroupKey::from_bytes(&[7; MAX_KEY]).unwrap().control);
    }

    #[test]
    fn unfit_key_files_are_refused_by_name_and_reason() {
        assert!(file_error(b"").contains("empty"));
        assert!(file_error(b"\n").contains("empty"));
        assert!(file_error(b"0123456789abcde\n").contains("15 bytes are too few"));
        assert!(file_error(&[b'x'; MAX_KEY + 1]).contains("longer than 4096"));
        assert!(file_error(&[b'x'; 1 << 20]).contains("longer than 4096"));
        let folder = tempfile::tempdir().unwrap();
        let error = GroupKey::from_file(folder.path()).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
        let missing = GroupKey::from_file(&folder.path().join("absent")).unwrap_err().to_string();
        assert!(missing.contains("absent") && missing.contains("No such file"), "{missing}");
    }

    #[test]
    fn the_secret_is_neither_kept_nor_shown() {
        let key = GroupKey::from_bytes(b"a secret of some length").unwrap();
        assert_eq!(format!("{key:?}"), "GroupKey(..)");
        assert_ne!(key.for_purpose(Purpose::Control), key.for_purpose(Purpose::Collective));
        for len in [0, MIN_KEY - 1, MAX_KEY + 1] {
            assert!(matches!(GroupKey::from_bytes(&vec![1; len]), Err(WireError::Key { .. })), "{len}");
        }
    }
}
