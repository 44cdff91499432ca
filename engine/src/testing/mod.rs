//! Stand-ins for the tests: an executor with a simulated paged KV store, its oracle, a clock that is set by
//! hand, and clients.

mod client;
mod fake_executor;
mod fake_group;
mod oracle;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(crate) use client::{Client, Outcome};
pub(crate) use fake_executor::{FakeExecutor, Faults};
pub(crate) use fake_group::Moment;
pub(crate) use oracle::Oracle;

use crate::config::EngineConfig;
use crate::environment::{Clock, Environment, SeedSource};
use crate::request::Request;
use crate::sampling_params::SamplingParams;

/// Tokens below this id exist.
pub(crate) const VOCAB: u32 = 40;
pub(crate) const EOS: u32 = 1;

/// Time that passes when a test says so.
pub(crate) struct ManualClock {
    now: Mutex<Instant>,
}

impl ManualClock {
    pub(crate) fn advance(&self, by: Duration) {
        *self.now.lock().unwrap() += by;
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Instant {
        *self.now.lock().unwrap()
    }
}

/// Seeds 1000, 1001, …
struct CountingSeeds(AtomicU64);

impl SeedSource for CountingSeeds {
    fn draw(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

pub(crate) fn environment() -> (Environment, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock { now: Mutex::new(Instant::now()) });
    let seeds = Arc::new(CountingSeeds(AtomicU64::new(1000)));
    (Environment { clock: clock.clone(), seeds, cache_secret: [3; 16] }, clock)
}

pub(crate) fn config() -> EngineConfig {
    EngineConfig {
        vocab_size: VOCAB as usize,
        max_model_len: 256,
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        block_size: 4,
        num_blocks: 64,
        eos_token_ids: vec![EOS],
        poison_freed_blocks: true,
        ..EngineConfig::default()
    }
}

/// A request of `prompt_len` tokens that depend on `salt`, for `max_tokens` greedy tokens whatever they are.
pub(crate) fn request(salt: u32, prompt_len: usize, max_tokens: usize) -> Request {
    Request {
        id: format!("request-{salt}"),
        prompt: (0..prompt_len as u32).map(|i| 2 + (salt * 7 + i * (salt + 3)) % (VOCAB - 2)).collect(),
        params: SamplingParams {
            max_tokens,
            temperature: 0.0,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        priority: 0,
        cache_salt: None,
        prompt_logprobs: None,
        arrival: Instant::now(),
    }
}

/// SplitMix64: the tests' own randomness.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
