//! What a link carries.

use std::fmt;

/// One message, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The group epoch the sender was in; what is stale is for the receiver to say.
    pub epoch: u64,
    /// Which process sent it.
    pub sender: Incarnation,
    /// What the payload is; its meaning belongs to the link's two users.
    pub kind: u8,
    /// At most [`MAX_MESSAGE`](crate::MAX_MESSAGE) bytes.
    pub payload: Vec<u8>,
}

/// One life of a process: a number drawn when it starts, so that a restarted peer is never taken for its
/// predecessor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u128);

impl Incarnation {
    /// Draws a new one.
    ///
    /// # Panics
    /// If the operating system has no random bytes, which it does not let a running process see.
    pub fn random() -> Self {
        Self(u128::from_le_bytes(random_bytes()))
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes that nobody can guess.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system has random bytes once a process runs");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incarnation_is_shown_as_32_hex_digits() {
        assert_eq!(Incarnation(0xab).to_string(), "000000000000000000000000000000ab");
        assert_eq!(format!("{:?}", Incarnation(u128::MAX)), "f".repeat(32));
        assert_ne!(Incarnation::random(), Incarnation::random());
    }
}
