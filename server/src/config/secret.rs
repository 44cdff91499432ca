//! A secret that cannot be printed.

use std::fmt;
use std::hint::black_box;

/// An API key. It shows itself to nobody: not in `Debug`, not in logs, not in errors.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(Box<str>);

impl ApiKey {
    /// Wraps a key.
    pub fn new(key: impl Into<Box<str>>) -> Self {
        Self(key.into())
    }

    /// The key itself, for the request that has to bring it.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether `presented` is this key; takes the same time wherever they differ (their lengths may show).
    pub fn matches(&self, presented: &[u8]) -> bool {
        let key = self.0.as_bytes();
        if key.len() != presented.len() {
            return false;
        }
        // black_box keeps the compiler from leaving the loop early.
        let difference = key.iter().zip(presented).fold(0u8, |all, (a, b)| black_box(all | (a ^ b)));
        difference == 0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_itself_only_and_shows_nothing() {
        let key = ApiKey::new("secret");
        assert!(key.matches(b"secret"));
        for other in [&b"secreT"[..], b"secre", b"secret ", b""] {
            assert!(!key.matches(other));
        }
        assert!(!format!("{key:?}").contains("secret"));
    }
}
