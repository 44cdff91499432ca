//! The binary from outside: exit codes, refusals, and the life of a server from start to signal. Weights are random,
//! so no model is needed.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// Long enough for a debug build on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn tandem(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(arguments).env_remove("RUST_LOG").env("TANDEM_CACHE_DIR", "/nowhere");
    command
}

fn run(arguments: &[&str]) -> Output {
    tandem(arguments).output().expect("the binary runs")
}

/// Asserts that it refused in one line, and returns the line.
fn refusal(arguments: &[&str]) -> String {
    let output = run(arguments);
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{line}");
    assert!(output.stdout.is_empty());
    line
}

/// The lines of a refusal by `check`, which says what it can besides.
fn refusal_of(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(2));
    String::from_utf8(output.stderr).unwrap()
}

/// A folder with a `config.json` from which random weights can be made; slow enough that a long answer takes a while.
fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    });
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

struct Server {
    child: Child,
    stdout: BufReader<ChildStdout>,
    address: SocketAddr,
    _model: tempfile::TempDir,
}

impl Server {
    /// Starts on a free port and waits for the banner.
    fn start(arguments: &[&str]) -> Self {
        Self::start_with_log(arguments, Stdio::null())
    }

    fn start_with_log(arguments: &[&str], log: Stdio) -> Self {
        let model = model();
        let path = model.path().to_str().unwrap();
        let fixed = ["serve", path, "--load-format", "dummy", "--host", "127.0.0.1", "--port", "0"];
        let sizes = ["--metrics-port", "0", "--kv-cache-memory-bytes", "512MiB", "--served-model-name", "m"];
        let mut command = tandem(&[&fixed[..], &sizes, arguments].concat());
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut banner = String::new();
        let address = loop {
            let mut line = String::new();
            assert!(stdout.read_line(&mut line).unwrap() > 0, "the server left: {banner}");
            banner += &line;
            if let Some(url) = line.trim().strip_prefix("API") {
                let url = url.trim().trim_start_matches("http://");
                break url.split('/').next().unwrap().parse().unwrap();
            }
        };
        assert!(banner.starts_with(&format!("tandem {} ready in ", env!("CARGO_PKG_VERSION"))), "{banner}");
        Self { child, stdout, address, _model: model }
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// The exit status, and how long it took.
    fn wait(&mut self) -> (ExitStatus, Duration) {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status, started.elapsed());
            }
            assert!(started.elapsed() < PATIENCE, "the server does not leave");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn request(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(stream, "{head} HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
        stream
    }

    fn status(&self, path: &str) -> String {
        let mut answer = String::new();
        self.request(&format!("GET {path}"), "").read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap_or_default().to_owned()
    }

    /// A completion of token ids that goes on for so many tokens.
    fn complete(&self, max_tokens: usize, stream: bool) -> TcpStream {
        let body = serde_json::json!({
            "model": "m", "prompt": [5, 6, 7], "max_tokens": max_tokens, "stream": stream, "ignore_eos": true,
        });
        self.request("POST /v1/completions", &body.to_string())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn refusals_are_one_line_and_exit_code_2() {
    assert!(refusal(&[]).contains("a command is missing"));
    assert!(refusal(&["serv"]).contains("unknown command \"serv\""));
    assert!(refusal(&["serve", "m.gguf", "--port", "eight"]).contains("--port: invalid value \"eight\""));
    assert!(refusal(&["serve"]).contains("make model"));
    assert!(refusal(&["serve", "/nowhere.gguf"]).contains("/nowhere.gguf"));
    assert!(refusal(&["run", "/nowhere.gguf", "hi"]).contains("/nowhere.gguf"));
}

/// The same with a tokenizer of single bytes, written as their Unicode stand-ins.
fn model_with_tokenizer() -> tempfile::TempDir {
    let folder = model();
    let stand_in = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=b' ' => char::from_u32(0x100 + u32::from(byte)).unwrap(),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte) - 0x7f).unwrap(),
        0xad => '\u{143}',
    };
    let vocabulary: serde_json::Map<String, serde_json::Value> = (0..=255u8)
        .map(|byte| (stand_in(byte).to_string(), serde_json::json!(u32::from(byte) + 3)))
        .collect();
    let bytes = serde_json::json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": [] },
    });
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder
}

#[test]
fn bench_scores_a_text() {
    let model = model_with_tokenizer();
    let text = model.path().join("text.txt");
    fs::write(&text, "The quick brown fox jumps over the lazy dog, and over it again. ".repeat(10)).unwrap();
    let (path, text) = (model.path().to_str().unwrap(), text.to_str().unwrap());
    let dummy = ["bench", path, "--load-format", "dummy", "--kv-cache-memory-bytes", "64MiB"];
    let score = |arguments: &[&str]| {
        let arguments = [&dummy[..], &["--perplexity", text, "--format", "json"], arguments].concat();
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let report = score(&["--quantization", "q4_0", "--context", "50"]);
    // A token for each of 640 bytes.
    assert_eq!((&report["weights"], &report["context"]), (&"Q4_0".into(), &50.into()));
    assert_eq!(
        (&report["windows"], &report["tokens"], &report["scored_tokens"]),
        (&12.into(), &600.into(), &288.into())
    );
    // Random weights know nothing: about as good as an even choice among 1,024 tokens.
    let perplexity = report["perplexity"].as_f64().unwrap();
    assert!((500.0..4000.0).contains(&perplexity), "{perplexity}");
    assert!(report["standard_error"].as_f64().unwrap() > 0.0);
    // The same for any batch of windows; another for other weights.
    let chunked = score(&[
        "--quantization",
        "q4_0",
        "--context",
        "50",
        "--max-num-batched-tokens",
        "16",
        "--max-num-seqs",
        "1",
    ]);
    assert_eq!(chunked["perplexity"], report["perplexity"]);
    assert_ne!(score(&["--quantization", "q8_0", "--context", "50"])["perplexity"], report["perplexity"]);

    let scored = |arguments: &[&str]| refusal(&[&dummy[..], arguments].concat());
    let line = scored(&["--perplexity", text]);
    assert!(line.contains("--perplexity: the text has 640 tokens, two windows of 512 need 1024"), "{line}");
    let line = scored(&["--perplexity", text, "--context", "40000"]);
    assert!(line.contains("--context: 40000 tokens are more than the model's context, 32768"), "{line}");
    assert!(scored(&["--perplexity", "/nowhere.txt"]).contains("--perplexity: /nowhere.txt cannot be read"));
    let (nothing, empty) = (self::model(), model.path().join("empty.txt"));
    fs::write(&empty, "\n").unwrap();
    assert!(scored(&["--perplexity", empty.to_str().unwrap()]).contains("empty.txt is empty"));
    let without = ["bench", nothing.path().to_str().unwrap(), "--load-format", "dummy", "--perplexity", text];
    assert!(refusal(&without).contains("--perplexity: the model has no tokenizer"));
}

#[test]
fn weights_that_cannot_be_rounded_are_refused_with_the_flag() {
    let model = model();
    let path = model.path().to_str().unwrap();
    let check = [
        "check",
        path,
        "--load-format",
        "dummy",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--host",
        "127.0.0.1",
    ];
    let output = run(&[&check[..], &["--quantization", "q4_1"]].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("weights    Q4_1"), "{text}");
    let line = refusal_of(&[&check[..], &["--quantization", "q4_1", "--dummy-weights", "q8_0"]].concat());
    assert!(
        line.contains("--quantization: ")
            && line.contains("tensor model.embed_tokens.weight: is Q8_0 already"),
        "{line}"
    );
}

#[test]
fn version_and_help_are_answers() {
    let output = run(&["--version"]);
    let expected = format!("tandem {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!((output.status.code(), String::from_utf8(output.stdout).unwrap()), (Some(0), expected));
    let help = String::from_utf8(run(&["serve", "--help"]).stdout).unwrap();
    assert!(help.contains("KV cache") && help.contains("--port <PORT>") && !help.contains('\u{1b}'));
}

#[test]
fn check_lists_every_problem() {
    let model = model();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let path = model.path().to_str().unwrap();
    let common = ["check", path, "--load-format", "dummy", "--host", "127.0.0.1", "--metrics-port", "0"];
    let output = run(&[&common[..], &["--port", "0"]].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("8 layers") && text.ends_with("ok\n"), "{text}");

    let output = run(&[&common[..], &["--port", &port, "--max-model-len", "99999"]].concat());
    let problems = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), problems.lines().count()), (Some(2), 2), "{problems}");
    assert!(
        problems.contains("--port: cannot listen") && problems.contains("--max-model-len: 99999"),
        "{problems}"
    );
}

#[test]
fn an_idle_server_leaves_at_once() {
    for signal in ["TERM", "INT"] {
        let mut server = Server::start(&[]);
        assert_eq!(server.status("/readyz"), "200");
        server.signal(signal);
        let (status, took) = server.wait();
        assert_eq!(status.code(), Some(0));
        assert!(took < Duration::from_secs(2), "{took:?}");
        let mut rest = String::new();
        server.stdout.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("curl http://127.0.0.1:"), "{rest}");
    }
}

/// Before the port opens, or there is no such machine here.
#[test]
fn an_instruction_set_that_is_not_there_is_refused_with_its_flag() {
    if std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("amx_tile")) {
        println!("skipped: this machine has all instruction sets");
        return;
    }
    let model = model();
    let path = model.path().to_str().unwrap();
    let line = refusal(&["serve", path, "--load-format", "dummy", "--port", "0", "--isa", "amx"]);
    assert!(line.starts_with("tandem: --isa: this machine has no amx; it supports "), "{line}");
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut server = Server::start_with_log(&[], full.into());
    for _ in 0..2 {
        // Each is logged.
        assert_eq!(server.status("/v1/models"), "200");
    }
    server.signal("TERM");
    assert_eq!(server.wait().0.code(), Some(0));
}

#[test]
fn a_busy_server_finishes_what_runs_and_accepts_a_little_longer() {
    let mut server = Server::start(&[]);
    let mut stream = BufReader::new(server.complete(400, true));
    let mut first = String::new();
    while !first.starts_with("data: ") {
        first.clear();
        assert!(stream.read_line(&mut first).unwrap() > 0);
    }
    server.signal("TERM");
    while server.status("/readyz") != "503" {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut late = String::new();
    server.complete(2, false).read_to_string(&mut late).unwrap();
    assert!(late.starts_with("HTTP/1.1 200"), "{late}");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "{rest}");
    assert_eq!(server.wait().0.code(), Some(0));
}

#[test]
fn a_second_signal_ends_the_drain_with_a_typed_error() {
    let mut server = Server::start(&[]);
    let mut stream = BufReader::new(server.complete(30_000, true));
    let mut first = String::new();
    while !first.starts_with("data: ") {
        first.clear();
        assert!(stream.read_line(&mut first).unwrap() > 0);
    }
    server.signal("TERM");
    while server.status("/readyz") != "503" {
        std::thread::sleep(Duration::from_millis(5));
    }
    server.signal("TERM");
    let (status, took) = server.wait();
    assert_eq!(status.code(), Some(0));
    assert!(took < Duration::from_secs(3), "{took:?}");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"retryable\":true"), "{}", &rest[rest.len().saturating_sub(500)..]);
}
