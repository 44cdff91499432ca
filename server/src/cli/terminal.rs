//! Writing to a terminal that may be a pipe that closes.

use std::io::{self, Write};
use std::sync::OnceLock;

/// Why something could not be written.
static FAILURE: OnceLock<io::Error> = OnceLock::new();

/// Writes to standard output at once. A reader that left is no failure of ours; others are kept for [`failure`], for whoever
/// computed for minutes has better things to do than to stop.
pub(super) fn print(text: &str) {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => drop(FAILURE.set(error)),
        _ => {}
    }
}

/// The first error of writing.
pub(super) fn failure() -> Option<&'static io::Error> {
    FAILURE.get()
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
