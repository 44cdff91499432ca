//! Pages of metrics, read back as Prometheus would.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use serde_json::json;

use super::client::{Connection, post};
use super::{Server, get, streamed_text};

/// A page taken apart: type by family, value by series.
struct Page {
    kinds: BTreeMap<String, String>,
    series: BTreeMap<String, f64>,
}

impl Page {
    /// Checks that every family has HELP and TYPE once and before its samples, and no series comes twice.
    fn parse(text: &str) -> Self {
        let (mut kinds, mut helped, mut series) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(helped.insert(name.to_owned()) && !help.is_empty(), "{line}");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(helped.contains(name), "{line}");
                assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{line}");
            } else {
                let (name, value) = line.rsplit_once(' ').unwrap();
                let family = family_of(name.split('{').next().unwrap(), &kinds);
                assert!(kinds.contains_key(&family), "{line}");
                assert!(series.insert(name.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
            }
        }
        Self { kinds, series }
    }

    fn value(&self, series: &str) -> f64 {
        *self.series.get(series).unwrap_or_else(|| panic!("{series} among {:?}", self.series.keys()))
    }
}

/// Samples of a histogram carry a suffix that their family does not.
fn family_of(sample: &str, kinds: &BTreeMap<String, String>) -> String {
    let suffixes = ["_bucket", "_sum", "_count"];
    let stem = suffixes.iter().find_map(|suffix| sample.strip_suffix(suffix));
    match stem.filter(|stem| kinds.get(*stem).is_some_and(|kind| kind == "histogram")) {
        Some(stem) => stem.to_owned(),
        None => sample.to_owned(),
    }
}

#[tokio::test]
async fn both_pages_parse_and_agree() {
    let server = Server::plain().await;
    for _ in 0..3 {
        server.complete(json!({"prompt": vec![97; 40], "max_tokens": 4})).await;
    }
    let both = Page::parse(&server.get("/metrics").await.body);
    let mut connection = Connection::open(server.metrics).await;
    connection.send(&get("/metrics", "")).await;
    let answer = connection.answer().await;
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let own = Page::parse(&answer.body);
    assert!(own.kinds.keys().all(|name| name.starts_with("llm_")), "{:?}", own.kinds.keys());
    assert!(own.kinds.iter().all(|(name, kind)| name.ends_with("_total") == (kind == "counter")));

    let model = r#"{model_name="toy"}"#;
    for page in [&both, &own] {
        assert_eq!(page.value(&format!("llm_requests_admitted_total{model}")), 3.0);
        assert_eq!(
            page.value(r#"llm_requests_completed_total{model_name="toy",finish_reason="length"}"#),
            3.0
        );
        assert_eq!(page.value(&format!("llm_generation_tokens_total{model}")), 12.0);
        assert_eq!(page.value(&format!("llm_ttft_seconds_count{model}")), 3.0);
        assert_eq!(page.value(r#"llm_ttft_seconds_bucket{model_name="toy",le="+Inf"}"#), 3.0);
        assert!(page.value(&format!("llm_prefix_cache_hit_tokens_total{model}")) >= 32.0);
        let blocks: f64 = ["free", "used", "cached"]
            .iter()
            .map(|state| page.value(&format!(r#"llm_kv_blocks{{model_name="toy",state="{state}"}}"#)))
            .sum();
        assert_eq!(blocks, 128.0);
    }
    let labels = r#"{model_name="toy",engine="0"}"#;
    assert_eq!(both.value(&format!("vllm:prompt_tokens_total{labels}")), 120.0);
    assert_eq!(both.value(&format!("vllm:e2e_request_latency_seconds_count{labels}")), 3.0);
    let required = [
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:lora_requests_info",
    ];
    for name in required {
        assert_eq!(both.kinds.get(name).map(String::as_str), Some("gauge"), "{name}");
    }
    let config = both.series.keys().find(|series| series.starts_with("vllm:cache_config_info")).unwrap();
    assert!(config.contains(r#"block_size="16""#) && config.contains(r#"num_gpu_blocks="128""#), "{config}");
}

#[tokio::test]
async fn the_metrics_port_answers_probes_too() {
    let server = Server::plain().await;
    let mut connection = Connection::open(server.metrics).await;
    for (path, status) in [("/readyz", 200), ("/livez", 200), ("/v1/models", 404)] {
        connection.send(&get(path, "")).await;
        assert_eq!(connection.answer().await.status, status, "{path}");
    }
}

#[tokio::test]
async fn a_stream_outlives_a_break_of_the_group_and_is_counted() {
    let server = Server::plain().await;
    server.slow_down(20);
    let body = json!({"prompt": [97], "max_tokens": 60, "ignore_eos": true, "stream": true});
    let mut connection = server.connect().await;
    connection.send(&post("/v1/completions", &body.to_string(), "")).await;
    assert!(connection.read_until("data: ").await);

    server.knobs.group_away.store(true, Ordering::Relaxed);
    server.until("the break is noticed", |snapshot| snapshot.recovering).await;
    let refused = server.complete(json!({"prompt": [97], "max_tokens": 1})).await;
    assert_eq!(refused.error().0, 503);
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    let series = r#"llm_stream_resumes_total{model_name="toy"}"#;
    let resumes = async || Page::parse(&server.get("/metrics").await.body).value(series);
    assert_eq!(resumes().await, 0.0);

    server.slow_down(0);
    server.knobs.group_away.store(false, Ordering::Relaxed);
    let answer = connection.answer().await;
    // Two of the sixty are the ignored end after a `z`, which has no text.
    let expected: String = ('b'..='z').chain('a'..='z').chain('a'..='z').take(58).collect();
    assert_eq!(streamed_text(&answer.events(), 0), expected);
    assert_eq!(resumes().await, 1.0);
    assert_eq!(server.complete(json!({"prompt": [97], "max_tokens": 1})).await.status, 200);
}
