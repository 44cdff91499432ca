//! `/metrics`: one snapshot of the engine, written under our own names and, on the serving port, under vLLM's too.
//!
//! Everything of the engine comes from a single [`Snapshot`], so the sums of one page balance to the integer. While the
//! model loads there is no engine and no such family: only what the process itself knows.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::IntoResponse;
use tandem_engine::{EngineState, FailureKind, Snapshot};

use super::errors::status_of;
use super::exposition::{Exposition, Kind, Number};
use super::gpus::GpuGauges;
use super::process::rss_bytes;
use super::state::{AppState, Serving};

/// The serving port: our names and vLLM's.
pub(super) async fn with_vllm(State(state): State<Arc<AppState>>) -> impl IntoResponse {
    respond(render(&state, true).await)
}

/// The metrics port: our names only. vLLM's have colons, which Prometheus' linter refuses.
pub(super) async fn own(State(state): State<Arc<AppState>>) -> impl IntoResponse {
    respond(render(&state, false).await)
}

fn respond(page: String) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"))], page)
}

async fn render(state: &AppState, with_vllm: bool) -> String {
    if let Some(gpus) = gpus(state) {
        gpus.refresh().await;
    }
    let model = ("model_name", state.model_name());
    let mut page = Exposition::new(&[model]);
    write_process(state, &mut page);
    if let Some(group) = &state.group {
        group.write_metrics(&mut page);
    }
    if let Some(serving) = state.serving() {
        let snapshot = serving.engine.snapshot();
        write_requests(&snapshot, &mut page);
        write_latencies(&snapshot, &mut page);
        write_resources(&snapshot, &mut page);
        if let Some(gpus) = gpus(state) {
            gpus.write(&mut page);
        }
        if with_vllm {
            page.set_common(&[model, ("engine", "0")]);
            write_vllm(&snapshot, serving, &mut page);
            write_vllm_histograms(&snapshot, &mut page);
        }
    }
    page.finish()
}

fn gpus(state: &AppState) -> Option<&GpuGauges> {
    state.serving()?.gpus.as_ref()
}

fn write_process(state: &AppState, page: &mut Exposition) {
    use Kind::Gauge;
    let build = [("version", env!("CARGO_PKG_VERSION"))];
    let help = "Always 1; labels say what is running.";
    page.many(Gauge, "llm_build_info", help, &[(&build, 1u64.into())]);
    let help = "CPU time of this process over wall time, in percent of one core.";
    page.one(Gauge, "llm_cpu_percent", help, state.process.cpu_percent());
    page.one(Gauge, "llm_memory_rss_bytes", "Resident memory of this process.", rss_bytes());
}

fn write_requests(s: &Snapshot, page: &mut Exposition) {
    use Kind::{Counter, Gauge};
    page.one(Gauge, "llm_queue_length", "Requests waiting, new and preempted.", s.waiting);
    page.one(Gauge, "llm_requests_running", "Requests being computed.", s.running);
    page.one(Gauge, "llm_requests_in_flight", "Requests admitted and not ended.", s.in_flight);
    page.one(Counter, "llm_requests_admitted_total", "Requests admitted.", s.admitted);
    let completed: [(&[(&str, &str)], Number); 2] = [
        (&[("finish_reason", "stop")], s.completed_stop.into()),
        (&[("finish_reason", "length")], s.completed_length.into()),
    ];
    let help = "Requests answered to their end, by what ended them.";
    page.many(Counter, "llm_requests_completed_total", help, &completed);

    // Both are always there, so that a rate over them starts at zero.
    let kinds = [FailureKind::Internal, FailureKind::Unavailable];
    let codes = kinds.map(status_of);
    let labels = [0, 1].map(|kind: usize| [("code", codes[kind].as_str())]);
    let count = |kind| s.errored.get(&kind).copied().unwrap_or(0);
    let errored: [(&[(&str, &str)], Number); 2] =
        [0, 1].map(|kind| (labels[kind].as_slice(), count(kinds[kind]).into()));
    page.many(Counter, "llm_requests_errored_total", "Requests failed, by status code.", &errored);
    let help = "Requests whose client left before the end.";
    page.one(Counter, "llm_requests_cancelled_total", help, s.cancelled);

    page.one(Counter, "llm_prompt_tokens_total", "Prompt tokens, cached ones included.", s.prompt_tokens);
    page.one(Counter, "llm_generation_tokens_total", "Output tokens.", s.generation_tokens);
    let help = "Output tokens per second over the last 10 s.";
    page.one(Gauge, "llm_tokens_per_second", help, s.tokens_per_second);
    page.one(Gauge, "llm_decode_tokens_per_second", help, s.tokens_per_second);
    let help = "Requests completed per second over the last 10 s.";
    page.one(Gauge, "llm_requests_per_second", help, s.requests_per_second);
}

fn write_latencies(s: &Snapshot, page: &mut Exposition) {
    page.histogram("llm_ttft_seconds", "Arrival to first token.", &s.ttft);
    let help = "First to last token over the number of tokens after the first.";
    page.histogram("llm_tpot_seconds", help, &s.tpot);
    let help = "Gap between two tokens of one choice.";
    page.histogram("llm_inter_token_latency_seconds", help, &s.inter_token_latency);
    page.histogram("llm_request_latency_seconds", "Arrival to end, of completed requests.", &s.e2e_latency);
    page.histogram("llm_queue_time_seconds", "Arrival to first step.", &s.queue_time);
    page.histogram("llm_prefill_latency_seconds", "First step to the end of the prompt.", &s.prefill_time);
    page.histogram(
        "llm_decode_latency_seconds",
        "Steps that held at least one decode.",
        &s.decode_step_latency,
    );
}

fn write_resources(s: &Snapshot, page: &mut Exposition) {
    use Kind::{Counter, Gauge};
    page.one(
        Gauge,
        "llm_prefill_queue_depth",
        "Requests that wait to run, preempted ones among them.",
        s.waiting,
    );
    page.one(Gauge, "llm_kv_cache_usage_ratio", "KV blocks in use over all.", s.kv_cache_usage);
    let blocks: [(&[(&str, &str)], Number); 3] = [
        (&[("state", "free")], (s.free_blocks as u64).into()),
        (&[("state", "used")], (s.used_blocks as u64).into()),
        (&[("state", "cached")], (s.cached_blocks as u64).into()),
    ];
    page.many(Gauge, "llm_kv_blocks", "KV blocks by state.", &blocks);
    let help = "Prompt tokens found in the prefix cache.";
    page.one(Counter, "llm_prefix_cache_hit_tokens_total", help, s.prefix_cache_hit_tokens);
    let help = "Prompt tokens looked up in the prefix cache.";
    page.one(Counter, "llm_prefix_cache_query_tokens_total", help, s.prefix_cache_query_tokens);
    let help = "Sequences put back because KV blocks ran out.";
    page.one(Counter, "llm_preemptions_total", help, s.preemptions);
    let help = "Decode steps that were begun on a device before the one before was over.";
    page.one(Counter, "llm_overlapped_steps_total", help, s.decode_times.overlapped);
    let help = "Requests with output that went on after the group of ranks broke, once per break.";
    page.one(Counter, "llm_stream_resumes_total", help, s.stream_resumes);
}

/// What routers and dashboards made for vLLM look for.
fn write_vllm(s: &Snapshot, serving: &Serving, page: &mut Exposition) {
    use Kind::{Counter, Gauge};
    page.one(Gauge, "vllm:num_requests_waiting", "Requests waiting.", s.waiting);
    page.one(Gauge, "vllm:num_requests_running", "Requests running.", s.running);
    page.one(Gauge, "vllm:kv_cache_usage_perc", "KV cache usage, 1 is full.", s.kv_cache_usage);
    let healthy = u64::from(serving.engine.state() == EngineState::Running);
    page.one(Gauge, "vllm:engine_healthy", "Whether the engine runs.", healthy);

    let config = serving.engine.config();
    let (block_size, num_blocks) = (config.block_size.to_string(), config.num_blocks.to_string());
    let prefix_caching = if config.prefix_caching { "True" } else { "False" };
    let labels = [
        ("block_size", block_size.as_str()),
        ("num_gpu_blocks", num_blocks.as_str()),
        ("enable_prefix_caching", prefix_caching),
    ];
    page.many(Gauge, "vllm:cache_config_info", "The KV cache's configuration.", &[(&labels, 1u64.into())]);
    let labels = [("max_lora", "0"), ("running_lora_adapters", ""), ("waiting_lora_adapters", "")];
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    page.many(Gauge, "vllm:lora_requests_info", "LoRA adapters: none.", &[(&labels, now.into())]);

    page.one(Counter, "vllm:prompt_tokens_total", "Prompt tokens.", s.prompt_tokens);
    let (all, hits) = (s.prompt_tokens, s.prefix_cache_hit_tokens);
    let by_source: [(&[(&str, &str)], Number); 2] = [
        // A hit is counted when it is found, the prompt when it is computed: the difference may lag.
        (&[("source", "local_compute")], all.saturating_sub(hits).into()),
        (&[("source", "local_cache_hit")], hits.into()),
    ];
    page.many(Counter, "vllm:prompt_tokens_by_source_total", "Prompt tokens by origin.", &by_source);
    page.one(Counter, "vllm:generation_tokens_total", "Output tokens.", s.generation_tokens);
    let finished: [(&[(&str, &str)], Number); 4] = [
        (&[("finished_reason", "stop")], s.completed_stop.into()),
        (&[("finished_reason", "length")], s.completed_length.into()),
        (&[("finished_reason", "abort")], s.cancelled.into()),
        (&[("finished_reason", "error")], s.errored_total().into()),
    ];
    page.many(Counter, "vllm:request_success_total", "Requests ended, by reason.", &finished);
    page.one(Counter, "vllm:num_preemptions_total", "Preemptions.", s.preemptions);
    let help = "Tokens looked up in the prefix cache.";
    page.one(Counter, "vllm:prefix_cache_queries_total", help, s.prefix_cache_query_tokens);
    page.one(Counter, "vllm:prefix_cache_hits_total", "Tokens found in the prefix cache.", hits);
}

fn write_vllm_histograms(s: &Snapshot, page: &mut Exposition) {
    let gaps = "Gap between two tokens.";
    let families = [
        ("vllm:time_to_first_token_seconds", "Arrival to first token.", &s.ttft),
        ("vllm:inter_token_latency_seconds", gaps, &s.inter_token_latency),
        ("vllm:time_per_output_token_seconds", gaps, &s.inter_token_latency),
        ("vllm:request_time_per_output_token_seconds", "Mean gap of a request.", &s.tpot),
        ("vllm:e2e_request_latency_seconds", "Arrival to end.", &s.e2e_latency),
        ("vllm:request_queue_time_seconds", "Arrival to first step.", &s.queue_time),
        ("vllm:request_inference_time_seconds", "First step to end.", &s.inference_time),
        ("vllm:request_prefill_time_seconds", "First step to the end of the prompt.", &s.prefill_time),
        ("vllm:request_decode_time_seconds", "End of the prompt to end.", &s.decode_time),
        ("vllm:iteration_tokens_total", "Tokens per step.", &s.iteration_tokens),
        ("vllm:request_prompt_tokens", "Prompt tokens of a request.", &s.request_prompt_tokens),
        ("vllm:request_generation_tokens", "Output tokens of a request.", &s.request_generation_tokens),
        (
            "vllm:request_max_num_generation_tokens",
            "Output tokens of a request's longest choice.",
            &s.request_max_generation_tokens,
        ),
        ("vllm:request_params_n", "Choices asked for.", &s.request_params_n),
        ("vllm:request_params_max_tokens", "Output tokens allowed.", &s.request_params_max_tokens),
    ];
    for (name, help, histogram) in families {
        page.histogram(name, help, histogram);
    }
}
