//! Writing to a terminal that may be a pipe that closes.

use std::io::{self, Write};

/// Writes to standard output at once. A reader that left is no failure of ours.
pub(super) fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Writes text of a model: control characters that could drive the terminal are left out.
pub(super) fn print_generated(text: &str) {
    print(&printable(text));
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n\tc\r\u{9b}1m"), "a[2Jb\n\tc1m");
    }
}
