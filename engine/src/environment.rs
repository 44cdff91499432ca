//! Time and randomness, handed in so that a test can replay a run.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Where the engine reads time.
pub trait Clock: Send + Sync {
    fn now(&self) -> Instant;
}

/// Where seeds of requests that bring none come from.
pub trait SeedSource: Send + Sync {
    fn draw(&self) -> u64;
}

/// Everything outside of an engine that it depends on, besides its executor.
#[derive(Clone)]
pub struct Environment {
    pub clock: Arc<dyn Clock>,
    pub seeds: Arc<dyn SeedSource>,
    /// Key of the prefix cache's hashes: nobody outside can aim at a collision.
    pub cache_secret: [u8; 16],
}

impl Environment {
    /// The process's clock and the operating system's randomness.
    pub fn system() -> Self {
        let seeds = SystemSeeds::default();
        let mut cache_secret = [0; 16];
        for half in cache_secret.chunks_exact_mut(8) {
            half.copy_from_slice(&seeds.draw().to_le_bytes());
        }
        Self { clock: Arc::new(SystemClock), seeds: Arc::new(seeds), cache_secret }
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// A keyed hash of a counter; the key is 128 bits from the operating system, by way of the standard library's
/// hash maps.
#[derive(Debug, Default)]
pub struct SystemSeeds {
    key: RandomState,
    counter: AtomicU64,
}

impl SeedSource for SystemSeeds {
    fn draw(&self) -> u64 {
        self.key.hash_one(self.counter.fetch_add(1, Ordering::Relaxed))
    }
}
