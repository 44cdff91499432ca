//! `tandem bench --url` against a real worker on random weights, and against a peer that misbehaves on purpose.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tandem_tests::default_model;
use tandem_tests::server::{Server, binary, free_port};

/// What a run printed and how it ended.
struct Outcome {
    code: Option<i32>,
    report: Value,
    stderr: String,
}

impl Outcome {
    fn rows(&self) -> &[Value] {
        self.report["results"].as_array().unwrap_or_else(|| panic!("no results: {}", self.stderr))
    }
}

fn bench(url: &str, args: &[&str]) -> Outcome {
    let output = Command::new(binary())
        .args(["bench", "--url", url, "--format", "json"])
        .args(args)
        .stdin(Stdio::null())
        .env_remove("RUST_LOG")
        .output()
        .expect("the binary starts");
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    Outcome {
        code: output.status.code(),
        report,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A small model of random weights, without a tokenizer.
fn dummy_model(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).expect("the target folder is writable");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("the target folder is writable");
    folder
}

fn start_dummy(name: &str, args: &[&str]) -> Server {
    let folder = dummy_model(name);
    let path = folder.to_str().expect("the path is UTF-8");
    let fixed =
        [path, "--load-format", "dummy", "--served-model-name", "tiny", "--kv-cache-memory-bytes", "64MiB"];
    Server::start(&[&fixed[..], args].concat())
}

#[test]
fn requests_and_tokens_of_a_worker_are_counted_exactly() {
    let server = start_dummy("bench-exact", &[]);
    let plot = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-exact.svg");
    let sizes = ["--prompt-tokens", "40", "--output-tokens", "9", "--concurrency", "1,3", "--requests", "7"];
    let url = format!("http://127.0.0.1:{}/v1", server.port);
    let outcome = bench(&url, &[&sizes[..], &["--plot", plot.to_str().unwrap()]].concat());
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!((&outcome.report["model"], &outcome.report["prompts"]), (&json!("tiny"), &json!("token ids")));
    assert_eq!(outcome.rows().len(), 2);
    for row in outcome.rows() {
        assert_eq!((&row["num_requests"], &row["num_errors"]), (&json!(7), &json!(0)));
        assert_eq!((&row["total_prompt_tokens"], &row["total_output_tokens"]), (&json!(280), &json!(63)));
        assert_eq!(row["total_cached_tokens"], 0, "prompts are distinct");
        let number = |value: &Value| value.as_f64().expect("a number");
        let (wall, rate) = (number(&row["wall_seconds"]), number(&row["output_tokens_per_second"]));
        assert!((rate * wall - 63.0).abs() < 1e-6);
        for summary in [&row["ttft_ms"], &row["tpot_ms"]] {
            assert!(
                number(&summary["p50"]) > 0.0 && number(&summary["p50"]) <= number(&summary["p99"]),
                "{row}"
            );
        }
    }
    let svg = std::fs::read_to_string(plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("TTFT, median"));

    // The worker's own counters: 14 measured requests, one that warmed up, and those that tried vocabularies.
    let admitted = server.metric("llm_requests_admitted_total");
    assert_eq!(
        admitted, 16.0,
        "one probe was accepted (256 of 300 ids), the larger ones refused before admission"
    );
}

#[test]
fn words_are_fitted_where_ids_are_not_taken() {
    // A chat takes text only.
    let model = default_model();
    let model = model.to_str().expect("the cache path is UTF-8");
    let server = Server::start(&[model, "--served-model-name", "m", "--kv-cache-memory-bytes", "128MiB"]);
    let sizes = ["--prompt-tokens", "100", "--output-tokens", "4", "--concurrency", "2", "--requests", "4"];
    let url = format!("http://127.0.0.1:{}", server.port);
    let outcome = bench(&url, &[&sizes[..], &["--endpoint", "chat"]].concat());
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.report["prompts"], "words");
    let row = &outcome.rows()[0];
    assert_eq!(row["total_output_tokens"], 16);
    let prompt_tokens = row["total_prompt_tokens"].as_u64().unwrap();
    assert!(prompt_tokens.abs_diff(400) <= 20, "{prompt_tokens} tokens for 4 prompts of 100");
}

#[test]
fn refusals_are_counted_and_fail_the_run() {
    let server = start_dummy("bench-refusals", &["--api-key", "secret"]);
    let url = format!("http://127.0.0.1:{}", server.port);
    let sizes = ["--prompt-tokens", "8", "--output-tokens", "2", "--concurrency", "2", "--requests", "5"];
    let named = |name: &str, key: &str| {
        bench(&url, &[&sizes[..], &["--served-model-name", name, "--api-key", key]].concat())
    };
    let wrong_model = named("nobody", "secret");
    assert_eq!(wrong_model.code, Some(1), "{}", wrong_model.stderr);
    assert_eq!(wrong_model.rows()[0]["errors"], json!({ "status_404": 5 }));
    assert!(wrong_model.stderr.contains("5 of 5 requests failed"), "{}", wrong_model.stderr);

    let wrong_key = named("tiny", "guessed");
    assert_eq!((wrong_key.code, &wrong_key.rows()[0]["errors"]), (Some(1), &json!({ "status_401": 5 })));
    assert!(!wrong_key.stderr.contains("guessed"));
    assert_eq!(named("tiny", "secret").code, Some(0));

    let too_long = bench(
        &url,
        &["--api-key", "secret", "--prompt-tokens", "3000", "--requests", "1", "--concurrency", "1"],
    );
    assert_eq!((too_long.code, &too_long.rows()[0]["errors"]), (Some(1), &json!({ "status_400": 1 })));
}

#[test]
fn nobody_there_is_said_at_once() {
    let port = free_port();
    let outcome = bench(&format!("http://127.0.0.1:{port}"), &[]);
    assert_eq!((outcome.code, outcome.stderr.trim().lines().count()), (Some(1), 1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("connection") && outcome.report.is_null(), "{}", outcome.stderr);
    // With a name there is nothing to ask for beforehand, so every request fails for itself.
    let named = bench(
        &format!("http://127.0.0.1:{port}"),
        &["--model", "m", "--requests", "3", "--concurrency", "1"],
    );
    assert_eq!((named.code, &named.rows()[0]["errors"]), (Some(1), &json!({ "connection": 3 })));
}

/// What the peer does with a request.
#[derive(Clone, Copy)]
enum Act {
    Answer,
    /// Answers without counting tokens.
    AnswerWithoutUsage,
    /// Cuts the connection after two tokens.
    Cut,
    /// Ends the stream properly, two tokens short.
    Short,
    Busy,
    /// Says nothing more after the first token.
    Hang,
    /// An error in the middle of the stream.
    Report,
}

const PEER_TOKENS: usize = 4;

/// A server by script: the first requests are probe and warm-up, which it answers; then one act for each request.
fn peer(acts: &'static [Act]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
    let port = listener.local_addr().expect("it is bound").port();
    let count = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let count = count.clone();
            std::thread::spawn(move || {
                // A client that gave up is what some acts are about.
                let _ = serve_one(stream, acts, &count);
            });
        }
    });
    port
}

fn serve_one(stream: TcpStream, acts: &[Act], count: &AtomicUsize) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length is a number");
        }
        if line.trim().is_empty() {
            break;
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let mut out = stream;
    if head.starts_with("GET ") {
        let list = json!({ "object": "list", "data": [{ "id": "peer" }] }).to_string();
        return write!(out, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{list}", list.len());
    }
    let body: Value = serde_json::from_slice(&body).expect("the client sends JSON");
    let asked = body["max_tokens"].as_u64().expect("a count") as usize;
    let act = count
        .fetch_add(1, Ordering::SeqCst)
        .checked_sub(2)
        .map_or(Act::Answer, |index| acts[index % acts.len()]);
    if let Act::Busy = act {
        let error = json!({ "error": { "message": "full" } }).to_string();
        return write!(out, "HTTP/1.1 503 Busy\r\ncontent-length: {}\r\n\r\n{error}", error.len());
    }
    write!(out, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")?;
    let mut send = |event: &str| {
        let data = format!("data: {event}\n\n");
        write!(out, "{:x}\r\n{data}\r\n", data.len())
    };
    let tokens = match act {
        Act::Cut | Act::Report | Act::Short => 2,
        Act::Hang => 1,
        _ => asked,
    };
    for index in 0..tokens {
        let last = index + 1 == tokens && matches!(act, Act::Answer | Act::AnswerWithoutUsage | Act::Short);
        let reason = if last { json!("length") } else { Value::Null };
        send(&json!({ "choices": [{ "text": "a", "finish_reason": reason }] }).to_string())?;
    }
    match act {
        Act::Cut => return Ok(()),
        Act::Report => return send(&json!({ "error": { "message": "out of memory" } }).to_string()),
        Act::Hang => {
            // Until the client leaves.
            return reader.read(&mut [0; 1]).map(drop);
        }
        _ => {}
    }
    if !matches!(act, Act::AnswerWithoutUsage) {
        let usage = json!({ "prompt_tokens": 5, "completion_tokens": tokens });
        send(&json!({ "choices": [], "usage": usage }).to_string())?;
    }
    send("[DONE]")?;
    write!(out, "0\r\n\r\n")
}

/// Runs one request for each act.
fn against(acts: &'static [Act]) -> Outcome {
    let (requests, tokens) = (acts.len().to_string(), PEER_TOKENS.to_string());
    let url = format!("http://127.0.0.1:{}", peer(acts));
    bench(
        &url,
        &[
            "--prompt-tokens",
            "6",
            "--output-tokens",
            &tokens,
            "--requests",
            &requests,
            "--concurrency",
            "1",
            "--timeout",
            "2",
        ],
    )
}

#[test]
fn every_way_to_fail_is_counted_by_its_kind() {
    use Act::{Answer, Busy, Cut, Hang, Report, Short};
    let started = Instant::now();
    let outcome = against(&[Answer, Cut, Busy, Short, Hang, Report, Busy, Answer]);
    assert!(started.elapsed() < Duration::from_secs(30), "a peer that hangs holds nothing up");
    assert_eq!(outcome.code, Some(1));
    let row = &outcome.rows()[0];
    let errors = json!({ "early_end": 2, "reported": 1, "status_503": 2, "timeout": 1 });
    assert_eq!((&row["num_requests"], &row["num_errors"], &row["errors"]), (&json!(8), &json!(6), &errors));
    // Only complete answers count, with the peer's own numbers.
    assert_eq!((&row["total_output_tokens"], &row["total_prompt_tokens"]), (&json!(8), &json!(10)));
    assert!(outcome.stderr.contains("6 of 8 requests failed"), "{}", outcome.stderr);
}

#[test]
fn a_peer_that_counts_nothing_is_counted_by_its_events() {
    let outcome = against(&[Act::AnswerWithoutUsage, Act::AnswerWithoutUsage]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let row = &outcome.rows()[0];
    // The prompts had the length that was asked for, as far as anybody knows.
    assert_eq!((&row["total_output_tokens"], &row["total_prompt_tokens"]), (&json!(8), &json!(12)));
}

#[test]
fn the_comparison_with_a_peer_reads_and_fails_as_it_should() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches");
    let output = Command::new("python3").arg(folder.join("test_peers.py")).output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
