//! How a thread waits for a GPU.

use std::time::{Duration, Instant};

/// Between two looks at a device. A step takes milliseconds and its end should not wait for a timer, so a thread that has nothing
/// else to do goes on asking for as long as steps of decodes take. What takes longer, such as a long prompt, is not to cost a core.
#[derive(Debug)]
pub struct Pause {
    start: Instant,
}

impl Pause {
    const SPINNING: Duration = Duration::from_millis(1);
    const ASKING: Duration = Duration::from_millis(50);

    #[allow(clippy::new_without_default, reason = "it begins to wait")]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }

    /// Looks again and again until `is_done` says yes; false if it has not within `limit`.
    ///
    /// # Errors
    /// Those of `is_done`.
    pub fn until<E>(limit: Duration, mut is_done: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        let pause = Self::new();
        while !is_done()? {
            if pause.elapsed() >= limit {
                return Ok(false);
            }
            pause.wait();
        }
        Ok(true)
    }

    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub fn wait(&self) {
        match self.elapsed() {
            waited if waited < Self::SPINNING => std::hint::spin_loop(),
            waited if waited < Self::ASKING => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}
