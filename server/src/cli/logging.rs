//! The log: to standard error, as text or JSON.

use std::io::{self, IsTerminal, Write};

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts the log in its form and with the filter of `--log-level`, which wins over `RUST_LOG`, that over
/// `default_level`.
pub(super) fn init((format, filter): (LogFormat, Option<&str>), default_level: &str) {
    // The flag was checked with the configuration; a broken RUST_LOG is not worth refusing to start.
    let flag = filter.and_then(|filter| EnvFilter::try_new(filter).ok());
    let filter = flag.or_else(|| EnvFilter::try_from_default_env().ok());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|| EnvFilter::new(default_level)))
        .with_writer(|| Forgiving(io::stderr()))
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    // An error means that a log exists already, which only a test can do.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Takes what cannot be written: a log whose reader left or whose disk is full must not end the server. (What formats the log
/// reports a failed write on standard error as well, and that panics.)
struct Forgiving<W>(W);

impl<W: Write> Write for Forgiving<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(self.0.write(bytes).unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.0.flush();
        Ok(())
    }
}
