//! The engine's speed without HTTP, as shares of limits measured in the same run, before
//! and after: the better of both counts, since other load on the machine only ever lowers one. Of a GPU they are those of
//! memory and of bf16; with weights in fp8 there are no shares.
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

use super::super::Exit;
use super::super::startup::{self, Running};
use super::local_report::{LimitsReport, Overhead, Report, Row, Work};
use super::prompts::Random;
use super::statistics::Summary;
use crate::config::{BenchLoad, CommonConfig, Quantization};

/// Tokens of the prompt that warms caches and thread pool up.
const WARM_UP_TOKENS: usize = 64;

/// Measures an engine on the model of `common`, whose sizes become those of the load where nobody asked for others.
///
/// # Errors
/// What does not fit together, and what loading or computing said.
pub(super) fn measure_engine(mut common: CommonConfig, load: &BenchLoad) -> Result<Report, Exit> {
    let length = load.prompt_tokens + load.output_tokens;
    let most = load.concurrency.iter().copied().max().unwrap_or(1);
    common.max_model_len.get_or_insert(length);
    let seqs = *common.max_num_seqs.insert(common.max_num_seqs.unwrap_or(64).max(most));
    common.max_num_batched_tokens = common.max_num_batched_tokens.map(|given| given.max(seqs));
    let prepared = startup::prepare(&common, None, most.max(16))?;
    let step_tokens = prepared.options.max_num_batched_tokens;
    let (fits, needed) = (prepared.plan.kv_tokens, most * length.next_multiple_of(common.block_size));
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
    let options = startup::model_options(&common);
    let measure_limits = || tandem_engine::measure_limits(&options).map_err(|e| startup::refusal(&common, e));
    // Products in fp8 are faster than the limit that is measured for a GPU, that of bf16.
    let has_limits = common.quantization != Some(Quantization::Fp8);
    let before = has_limits.then(measure_limits).transpose()?;
    let running = prepared.load(&common)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.map_err(|e| Exit::failed(format!("no runtime: {e}")))?;
    let results = runtime.block_on(measure(load, &running));
    running.engine.shutdown();
    let results = results?;
    // Again, in case the machine was busy with something else before; what it did once it can do.
    // On a GPU that the model has filled there may be no room for it.
    let limits = before.map(|before| measure_limits().map_or(before, |after| better(&before, &after)));
    Ok(report(
        load,
        &Machine { backend: &running.backend, limits: limits.as_ref(), step_tokens },
        &running,
        results,
    ))
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
    ttft_ms: Summary,
    tpot_ms: Summary,
    decode_times: StepTimes,
}

async fn measure(load: &BenchLoad, running: &Running) -> Result<Vec<Measured>, Exit> {
    // As the server does.
    tokio::spawn(running.engine.carry_wakes());
    let mut requests = Requests {
        engine: &running.engine,
        vocab_size: running.info.vocab_size as u64,
        random: Random::new(load.seed.unwrap_or(0)),
    };
    requests.round(1, WARM_UP_TOKENS.min(load.prompt_tokens), 2.min(load.output_tokens)).await?;
    let mut results = Vec::new();
    for &concurrency in &load.concurrency {
        tracing::info!(concurrency, "measuring");
        results.push(measure_one(load, &mut requests, concurrency).await?);
    }
    Ok(results)
}

/// What a measurement is compared with.
struct Machine<'a> {
    backend: &'a BackendInfo,
    /// None: nobody measured them.
    limits: Option<&'a Limits>,
    /// Tokens that one step takes at most.
    step_tokens: usize,
}

fn report(load: &BenchLoad, machine: &Machine<'_>, running: &Running, results: Vec<Measured>) -> Report {
    let backend = machine.backend;
    Report {
        model: running.info.name.clone(),
        weights: running.info.weights.clone(),
        backend: backend.backend,
        isa: backend.isa,
        threads: backend.threads,
        activations: backend.activations.name(),
        limits: machine.limits.map(LimitsReport::from),
        peak_operations_per_second: machine.peak(),
        results: results.into_iter().map(|measured| row(load, machine, measured)).collect(),
    }
}

async fn measure_one(
    load: &BenchLoad,
    requests: &mut Requests<'_>,
    concurrency: usize,
) -> Result<Measured, Exit> {
    let (prompt_tokens, output_tokens) = (load.prompt_tokens, load.output_tokens);
    let num_requests = load.num_requests.unwrap_or((2 * concurrency).max(3));
    let rounds = num_requests.div_ceil(concurrency);
    let (mut prefill, mut decode) = (Rate::default(), Rate::default());
    let (mut ttft, mut tpot) = (Vec::new(), Vec::new());
    let before = requests.engine.snapshot().decode_times;
    for _ in 0..rounds {
        let round = requests.round(concurrency, prompt_tokens, 1).await?;
        prefill.add(concurrency * prompt_tokens, round.iter().map(|t| t.first()).max().unwrap_or_default());
        let round = requests.round(concurrency, prompt_tokens, output_tokens).await?;
        let (tokens, time) = together(&round);
        decode.add(tokens, time);
        ttft.extend(round.iter().map(Timeline::first));
        tpot.extend(round.iter().filter_map(Timeline::per_output_token));
    }
    Ok(Measured {
        concurrency,
        prefill_tokens_per_second: prefill.per_second(),
        decode_tokens_per_second: decode.per_second(),
        ttft_ms: Summary::of(ttft),
        tpot_ms: Summary::of(tpot),
        decode_times: requests.engine.snapshot().decode_times.since(&before),
    })
}

/// A measurement beside the limits.
fn row(load: &BenchLoad, machine: &Machine<'_>, measured: Measured) -> Row {
    let Measured { concurrency, prefill_tokens_per_second, decode_tokens_per_second, .. } = measured;
    let (prompt_tokens, output_tokens) = (load.prompt_tokens, load.output_tokens);
    let prefill = machine.prefill_work(prefill_tokens_per_second, prompt_tokens, concurrency);
    let context = prompt_tokens + output_tokens / 2;
    let decode = machine.decode_work(decode_tokens_per_second, concurrency, context);
    Row {
        concurrency,
        prompt_tokens,
        output_tokens,
        prefill_tokens_per_second,
        decode_tokens_per_second,
        ttft_ms: measured.ttft_ms,
        tpot_ms: measured.tpot_ms,
        prefill_share_of_limit: machine.peak().map(|peak| prefill.operations_per_second / peak),
        decode_share_of_limit: machine.share(&decode),
        prefill_work: prefill,
        decode_work: decode,
        overhead: Overhead::from(&measured.decode_times),
    }
}

impl Machine<'_> {
    /// Operations of linear layers, with one row of logits for each prompt; weights once a step.
    fn prefill_work(&self, tokens_per_second: f64, prompt_tokens: usize, concurrency: usize) -> Work {
        let backend = self.backend;
        let per_token =
            backend.layer_flops_per_token as f64 + backend.head_flops_per_row as f64 / prompt_tokens as f64;
        let step = self.step_tokens.min(prompt_tokens * concurrency) as f64;
        let bytes_per_token = backend.weight_bytes as f64 / step + backend.kv_bytes_per_token as f64;
        Work {
            operations_per_second: tokens_per_second * per_token,
            bytes_per_second: tokens_per_second * bytes_per_token,
        }
    }

    /// Weights once a step, KV of every context.
    fn decode_work(&self, tokens_per_second: f64, concurrency: usize, context: usize) -> Work {
        let backend = self.backend;
        let steps_per_second = tokens_per_second / concurrency as f64;
        let kv_bytes = concurrency as f64 * context as f64 * backend.kv_bytes_per_token as f64;
        let per_token = (backend.layer_flops_per_token + backend.head_flops_per_row) as f64;
        Work {
            operations_per_second: tokens_per_second * per_token,
            bytes_per_second: steps_per_second * (backend.weight_bytes as f64 + kv_bytes),
        }
    }

    /// The larger of bytes read over the read bandwidth and operations over the arithmetic peak.
    fn share(&self, work: &Work) -> Option<f64> {
        let of_bandwidth = work.bytes_per_second / (self.limits?.read_gb_per_s * 1e9);
        Some(of_bandwidth.max(work.operations_per_second / self.peak()?))
    }

    /// Operations a second that the activations' type allows.
    fn peak(&self) -> Option<f64> {
        let limits = self.limits?;
        let tera = match self.backend.activations {
            Activations::F32 => limits.f32_tflops,
            Activations::Bf16 => limits.bf16_tflops,
            Activations::Int8 => limits.int8_tops,
            // Two products of bytes for each of int16 by int8.
            Activations::Int16 => limits.int8_tops / 2.0,
        };
        Some(1e12 * tera)
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
struct Requests<'a> {
    engine: &'a EngineHandle,
    vocab_size: u64,
    random: Random,
}

impl Requests<'_> {
    /// Runs `concurrency` requests at once to their end.
    async fn round(
        &mut self,
        concurrency: usize,
        prompt_tokens: usize,
        output_tokens: usize,
    ) -> Result<Vec<Timeline>, Exit> {
        let prompts: Vec<Vec<u32>> =
            (0..concurrency).map(|_| self.random.token_ids(prompt_tokens, self.vocab_size)).collect();
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
            device: None,
            ranks: 1,
            isa: "scalar",
            threads: 1,
            activations: Activations::Int8,
            layer_flops_per_token: 900,
            head_flops_per_row: 100,
            weight_bytes: 1_000_000,
            kv_bytes_per_token: 0,
        };
        let limits = Limits { read_gb_per_s: 1.0, f32_tflops: 1.0, bf16_tflops: 1.0, int8_tops: 1e-6 };
        let machine = Machine { backend: &backend, limits: Some(&limits), step_tokens: 8 };
        // 1,000 tokens/s × (900 + 100/10) operations over 1e6 operations/s; the weights once in 8 tokens.
        let prefill = machine.prefill_work(1000.0, 10, 1);
        assert!((prefill.operations_per_second / machine.peak().unwrap() - 0.91).abs() < 1e-9);
        assert!((prefill.bytes_per_second - 125e6).abs() < 1e-3);
        // 500 steps/s × 1 MB over 1 GB/s; 500,000 operations/s are as much.
        let share = |rate, concurrency| machine.share(&machine.decode_work(rate, concurrency, 0)).unwrap();
        assert!((share(500.0, 1) - 0.5).abs() < 1e-9);
        assert!((share(800.0, 2) - 0.8).abs() < 1e-9);
        let unmeasured = Machine { limits: None, ..machine };
        assert_eq!(unmeasured.share(&prefill), None);
    }
}
