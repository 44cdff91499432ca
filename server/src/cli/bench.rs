//! `tandem bench`: the engine's speed without HTTP, as shares of limits measured in the same run, before
//! and after: the better of both counts, since other load on the machine only ever lowers one.
//!
//! For each concurrency c, rounds of c requests with random, distinct prompts, prefix cache off, end tokens ignored:
//! * **prefill**: c requests that want one token each; prompt tokens over the time until the last has it.
//! * **decode**: c requests that want `output_tokens`; tokens that arrive while all c decode (from the last first
//!   token to the first finish), over that time.
//!
//! TTFT and TPOT are those of the decode rounds' requests. The share of a limit: operations of linear layers against
//! the arithmetic peak of the activations' type; for decode the larger of that and bytes read (packed weights once a
//! step, KV of the contexts) against the measured read bandwidth. Overhead is what the step thread does outside of the
//! model, as a share of the time of steps in which all sequences decode.

use std::time::{Duration, Instant};

use tandem_engine::{
    Activations, BackendInfo, EngineHandle, Event, Limits, Request, RequestStream, SamplingParams, StepTimes,
};
use tokio::task::JoinSet;

use super::bench_report::{self, Overhead, Percentiles, Report, Row};
use super::startup::{self, Running};
use super::{Exit, terminal};
use crate::config::{BenchConfig, OutputFormat};

/// Tokens of the prompt that warms caches and thread pool up.
const WARM_UP_TOKENS: usize = 64;

/// Runs the command.
pub(super) fn bench(mut config: BenchConfig) -> Result<(), Exit> {
    let length = config.prompt_tokens + config.output_tokens;
    let most = config.concurrency.iter().copied().max().unwrap_or(1);
    // Sizes that nobody asked for are those of the measurement.
    config.common.max_model_len.get_or_insert(length);
    config.common.max_num_seqs = config.common.max_num_seqs.max(most);
    config.common.max_num_batched_tokens =
        config.common.max_num_batched_tokens.max(config.common.max_num_seqs);
    let prepared = startup::prepare(&config.common, startup::engine_options(&config.common, most.max(16)))?;
    let (fits, needed) = (prepared.plan.kv_tokens, most * length.next_multiple_of(config.common.block_size));
    if prepared.plan.max_model_len < length {
        return Err(Exit::refused(format!(
            "prompt and output have {length} tokens, the context {}",
            prepared.plan.max_model_len
        )));
    }
    if fits < needed {
        return Err(Exit::refused(format!(
            "--concurrency: {most} requests need KV of {needed} tokens, there is room for {fits}; raise --kv-cache-memory-bytes"
        )));
    }
    // Before the weights are there: the limits are the machine's, and its memory is free.
    let options = startup::model_options(&config.common);
    let measure_limits =
        || tandem_engine::measure_limits(&options).map_err(|e| startup::refusal(&config.common, e));
    let before = measure_limits()?;
    let running = prepared.load(&config.common)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.map_err(|e| Exit::failed(format!("no runtime: {e}")))?;
    let result = runtime.block_on(measure(&config, &running));
    running.engine.shutdown();
    let results = result?;
    // Again, in case the machine was busy with something else before; what it did once it can do.
    let limits = better(&before, &measure_limits()?);
    let report = report(&config, &running, &limits, results);
    terminal::print(&match config.format {
        OutputFormat::Json => report.json(),
        OutputFormat::Text => report.text(),
    });
    report.check().map_err(Exit::failed)
}

/// The larger of two measurements, limit by limit.
fn better(one: &Limits, other: &Limits) -> Limits {
    Limits {
        read_gb_per_s: one.read_gb_per_s.max(other.read_gb_per_s),
        f32_tflops: one.f32_tflops.max(other.f32_tflops),
        bf16_tflops: one.bf16_tflops.max(other.bf16_tflops),
        int8_tops: one.int8_tops.max(other.int8_tops),
    }
}

/// What one concurrency reached.
struct Measured {
    concurrency: usize,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    ttft_ms: Percentiles,
    tpot_ms: Percentiles,
    decode_times: StepTimes,
}

async fn measure(config: &BenchConfig, running: &Running) -> Result<Vec<Measured>, Exit> {
    // As the server does.
    tokio::spawn(running.engine.carry_wakes());
    let mut load = Load {
        engine: &running.engine,
        vocab_size: running.info.vocab_size as u64,
        state: config.common.seed.unwrap_or(0),
    };
    load.round(1, WARM_UP_TOKENS.min(config.prompt_tokens), 2.min(config.output_tokens)).await?;
    let mut results = Vec::new();
    for &concurrency in &config.concurrency {
        tracing::info!(concurrency, "measuring");
        results.push(measure_one(config, &mut load, concurrency).await?);
    }
    Ok(results)
}

fn report(config: &BenchConfig, running: &Running, limits: &Limits, results: Vec<Measured>) -> Report {
    let backend = &running.backend;
    Report {
        model: running.info.name.clone(),
        weights: running.info.weights.clone(),
        backend: backend.backend,
        isa: backend.isa,
        threads: backend.threads,
        limits: bench_report::LimitsReport::from(limits),
        results: results.into_iter().map(|measured| row(config, backend, limits, measured)).collect(),
    }
}

async fn measure_one(
    config: &BenchConfig,
    load: &mut Load<'_>,
    concurrency: usize,
) -> Result<Measured, Exit> {
    let (prompt_tokens, output_tokens) = (config.prompt_tokens, config.output_tokens);
    let num_requests = config.num_requests.unwrap_or((2 * concurrency).max(3));
    let rounds = num_requests.div_ceil(concurrency);
    let (mut prefill, mut decode) = (Rate::default(), Rate::default());
    let (mut ttft, mut tpot) = (Vec::new(), Vec::new());
    let before = load.engine.snapshot().decode_times;
    for _ in 0..rounds {
        let round = load.round(concurrency, prompt_tokens, 1).await?;
        prefill.add(concurrency * prompt_tokens, round.iter().map(|t| t.first()).max().unwrap_or_default());
        let round = load.round(concurrency, prompt_tokens, output_tokens).await?;
        let (tokens, time) = together(&round);
        decode.add(tokens, time);
        ttft.extend(round.iter().map(Timeline::first));
        tpot.extend(round.iter().filter_map(Timeline::per_output_token));
    }
    Ok(Measured {
        concurrency,
        prefill_tokens_per_second: prefill.per_second(),
        decode_tokens_per_second: decode.per_second(),
        ttft_ms: Percentiles::of(ttft),
        tpot_ms: Percentiles::of(tpot),
        decode_times: load.engine.snapshot().decode_times.since(&before),
    })
}

/// A measurement beside the limits.
fn row(config: &BenchConfig, backend: &BackendInfo, limits: &Limits, measured: Measured) -> Row {
    let Measured { concurrency, prefill_tokens_per_second, decode_tokens_per_second, .. } = measured;
    let (prompt_tokens, output_tokens) = (config.prompt_tokens, config.output_tokens);
    let context = prompt_tokens + output_tokens / 2;
    Row {
        concurrency,
        prompt_tokens,
        output_tokens,
        prefill_tokens_per_second,
        decode_tokens_per_second,
        ttft_ms: measured.ttft_ms,
        tpot_ms: measured.tpot_ms,
        prefill_share_of_limit: prefill_share(prefill_tokens_per_second, prompt_tokens, backend, limits),
        decode_share_of_limit: decode_share(decode_tokens_per_second, concurrency, context, backend, limits),
        overhead: Overhead::from(&measured.decode_times),
    }
}

/// Operations done over the arithmetic peak.
fn prefill_share(
    tokens_per_second: f64,
    prompt_tokens: usize,
    backend: &BackendInfo,
    limits: &Limits,
) -> f64 {
    // One row of logits for each prompt.
    let per_token =
        backend.layer_flops_per_token as f64 + backend.head_flops_per_row as f64 / prompt_tokens as f64;
    tokens_per_second * per_token / peak(backend, limits)
}

/// The larger of bytes read over the read bandwidth and operations over the arithmetic peak.
fn decode_share(
    tokens_per_second: f64,
    concurrency: usize,
    context: usize,
    backend: &BackendInfo,
    limits: &Limits,
) -> f64 {
    let steps_per_second = tokens_per_second / concurrency as f64;
    let kv_bytes = concurrency as f64 * context as f64 * backend.kv_bytes_per_token as f64;
    let bytes_per_second = steps_per_second * (backend.weight_bytes as f64 + kv_bytes);
    let operations = tokens_per_second * (backend.layer_flops_per_token + backend.head_flops_per_row) as f64;
    (bytes_per_second / (limits.read_gb_per_s * 1e9)).max(operations / peak(backend, limits))
}

/// Operations a second that the activations' type allows.
fn peak(backend: &BackendInfo, limits: &Limits) -> f64 {
    1e12 * match backend.activations {
        Activations::F32 => limits.f32_tflops,
        Activations::Bf16 => limits.bf16_tflops,
        Activations::Int8 => limits.int8_tops,
        // Two products of bytes for each of int16 by int8.
        Activations::Int16 => limits.int8_tops / 2.0,
    }
}

/// Tokens that arrived while every request of the round was decoding, and how long that was.
fn together(round: &[Timeline]) -> (usize, Duration) {
    let from = round.iter().map(Timeline::first).max().unwrap_or_default();
    let until = round.iter().map(Timeline::last).min().unwrap_or_default();
    if until <= from {
        return (0, Duration::ZERO);
    }
    let tokens = round.iter().flat_map(|t| &t.tokens).filter(|&&at| at > from && at <= until).count();
    (tokens, until - from)
}

/// Tokens over time, summed over rounds.
#[derive(Default)]
struct Rate {
    tokens: usize,
    time: Duration,
}

impl Rate {
    fn add(&mut self, tokens: usize, time: Duration) {
        self.tokens += tokens;
        self.time += time;
    }

    /// 0 where nothing was measured (one output token has no decode).
    fn per_second(&self) -> f64 {
        if self.time.is_zero() { 0.0 } else { self.tokens as f64 / self.time.as_secs_f64() }
    }
}

/// When the tokens of one request came, since its submission.
struct Timeline {
    tokens: Vec<Duration>,
}

impl Timeline {
    fn first(&self) -> Duration {
        self.tokens.first().copied().unwrap_or_default()
    }

    fn last(&self) -> Duration {
        self.tokens.last().copied().unwrap_or_default()
    }

    fn per_output_token(&self) -> Option<Duration> {
        let gaps = u32::try_from(self.tokens.len()).ok()?.checked_sub(1).filter(|&n| n > 0)?;
        Some((self.last() - self.first()) / gaps)
    }
}

/// Makes requests.
struct Load<'a> {
    engine: &'a EngineHandle,
    vocab_size: u64,
    state: u64,
}

impl Load<'_> {
    /// Runs `concurrency` requests at once to their end.
    async fn round(
        &mut self,
        concurrency: usize,
        prompt_tokens: usize,
        output_tokens: usize,
    ) -> Result<Vec<Timeline>, Exit> {
        let prompts: Vec<Vec<u32>> = (0..concurrency).map(|_| self.prompt(prompt_tokens)).collect();
        let started = Instant::now();
        let mut requests = JoinSet::new();
        let mut streams = Vec::with_capacity(concurrency);
        for prompt in prompts {
            let request = request(prompt, output_tokens);
            streams.push(self.engine.submit(request).map_err(Exit::failed)?);
        }
        for stream in streams {
            requests.spawn(follow(stream, started));
        }
        let mut timelines = Vec::with_capacity(concurrency);
        while let Some(done) = requests.join_next().await {
            timelines.push(done.map_err(Exit::failed)??);
        }
        match timelines.iter().all(|t| t.tokens.len() == output_tokens) {
            true => Ok(timelines),
            false => Err(Exit::failed("a request ended before its tokens were out")),
        }
    }

    fn prompt(&mut self, length: usize) -> Vec<u32> {
        (0..length).map(|_| (self.random() % self.vocab_size) as u32).collect()
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

fn request(prompt: Vec<u32>, output_tokens: usize) -> Request {
    let params = SamplingParams {
        max_tokens: output_tokens,
        temperature: 0.0,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let (id, arrival) = ("bench".to_owned(), Instant::now());
    Request { id, prompt, params, priority: 0, cache_salt: None, prompt_logprobs: None, arrival }
}

async fn follow(mut stream: RequestStream, started: Instant) -> Result<Timeline, Exit> {
    let mut tokens = Vec::new();
    while let Some(events) = stream.next().await {
        for event in events {
            match event {
                Event::Token { .. } => tokens.push(started.elapsed()),
                Event::Failed(failure) => return Err(Exit::failed(failure.message)),
                Event::Started { .. } | Event::Finished { .. } => {}
            }
        }
    }
    Ok(Timeline { tokens })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(ms: &[u64]) -> Timeline {
        Timeline { tokens: ms.iter().map(|&ms| Duration::from_millis(ms)).collect() }
    }

    #[test]
    fn decode_is_measured_while_all_decode() {
        // The first decodes alone until the second has its first token at 30, and finishes at 50.
        let round = [timeline(&[10, 20, 30, 40, 50]), timeline(&[30, 40, 50, 60, 70])];
        assert_eq!(together(&round), (4, Duration::from_millis(20)));
        assert_eq!(together(&[timeline(&[10])]), (0, Duration::ZERO));
        assert_eq!(round[0].per_output_token(), Some(Duration::from_millis(10)));
        assert_eq!(timeline(&[10]).per_output_token(), None);
    }

    #[test]
    fn the_better_measurement_of_each_limit_counts() {
        let one = Limits { read_gb_per_s: 10.0, f32_tflops: 0.1, bf16_tflops: 0.4, int8_tops: 2.0 };
        let other = Limits { read_gb_per_s: 8.0, f32_tflops: 0.2, bf16_tflops: 0.3, int8_tops: 3.0 };
        let both = better(&one, &other);
        let all = [both.read_gb_per_s, both.f32_tflops, both.bf16_tflops, both.int8_tops];
        assert_eq!(all, [10.0, 0.2, 0.4, 3.0]);
    }

    #[test]
    fn shares_are_against_the_limit_that_binds() {
        let backend = BackendInfo {
            backend: "cpu",
            isa: "scalar",
            threads: 1,
            activations: Activations::Int8,
            layer_flops_per_token: 900,
            head_flops_per_row: 100,
            weight_bytes: 1_000_000,
            kv_bytes_per_token: 0,
        };
        let limits = Limits { read_gb_per_s: 1.0, f32_tflops: 1.0, bf16_tflops: 1.0, int8_tops: 1e-6 };
        // 1,000 tokens/s × (900 + 100/10) operations over 1e6 operations/s.
        assert!((prefill_share(1000.0, 10, &backend, &limits) - 0.91).abs() < 1e-9);
        // 500 steps/s × 1 MB over 1 GB/s; 500,000 operations/s are as much.
        assert!((decode_share(500.0, 1, 0, &backend, &limits) - 0.5).abs() < 1e-9);
        assert!((decode_share(800.0, 2, 0, &backend, &limits) - 0.8).abs() < 1e-9);
    }
}
