//! What the operating system says about this process: CPU share and resident memory.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Ticks per second of `/proc/*/stat`. The kernel's interface fixes it at 100 on every architecture Rust runs on.
const TICKS_PER_SECOND: f64 = 100.0;
/// Shortest span over which a CPU share is computed. Readers in between get the last value, so that two of them do not
/// shorten each other's span.
const MIN_SPAN: Duration = Duration::from_secs(1);

/// Measures between two looks.
#[derive(Debug)]
pub(super) struct ProcessMeter {
    last: Mutex<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    cpu_s: f64,
    percent: f64,
}

impl ProcessMeter {
    pub(super) fn new() -> Self {
        let sample = Sample { at: Instant::now(), cpu_s: cpu_seconds().unwrap_or(0.0), percent: 0.0 };
        Self { last: Mutex::new(sample) }
    }

    /// CPU time over wall time since the last look, in percent of one core.
    pub(super) fn cpu_percent(&self) -> f64 {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let span = last.at.elapsed();
        if span >= MIN_SPAN
            && let Some(cpu_s) = cpu_seconds()
        {
            let percent = (cpu_s - last.cpu_s) / span.as_secs_f64() * 100.0;
            *last = Sample { at: Instant::now(), cpu_s, percent };
        }
        last.percent
    }
}

/// Resident memory in bytes; 0 where `/proc` is not there.
pub(super) fn rss_bytes() -> u64 {
    let read = || {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    read().unwrap_or(0) * 1024
}

/// How many files and sockets this process may have open; `None` where `/proc` is not there or sets no bound.
pub(super) fn max_open_files() -> Option<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// User and system time of the process.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name in parentheses and may hold anything; count from its end.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(ticks as f64 / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_running_process_has_memory_and_cpu_time() {
        assert!(rss_bytes() > 1 << 20);
        assert!(max_open_files().is_none_or(|files| files > 16));
        let start = Instant::now();
        while cpu_seconds().unwrap() < 0.02 && start.elapsed() < Duration::from_secs(5) {}
        assert!(cpu_seconds().unwrap() >= 0.02);
        assert_eq!(ProcessMeter::new().cpu_percent(), 0.0, "no span yet");
    }
}
