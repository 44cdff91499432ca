//! The GPU's backend in the real server, on a stand-in that runs its kernels on the CPU: what it computes, that its ways of computing
//! agree, and what happens where there is no GPU.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tandem_tests::golden_path;
use tandem_tests::pods::{kill, rank_processes, replace_flags, stream};
use tandem_tests::server::{Server, binary};
use tandem_tests::stand_in;

/// Of a stand-in's GPU.
const MEMORY: u64 = 4 << 30;
const SMALL: [&str; 10] = [
    "--max-model-len",
    "256",
    "--max-num-seqs",
    "12",
    "--max-num-batched-tokens",
    "48",
    "--kv-cache-memory-bytes",
    "8MiB",
    "--load-format",
    "dummy",
];

/// One at a time: a GPU that is a CPU leaves nothing for others.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start_on(num_gpus: usize, model: &str, arguments: &[&str]) -> Server {
    start_with(model, "cuda", arguments, &stand_in::environment(num_gpus, MEMORY))
}

fn start(model: &str, device: &str, arguments: &[&str]) -> Server {
    let environment = if device == "cpu" { vec![] } else { stand_in::environment(1, MEMORY) };
    start_with(model, device, arguments, &environment)
}

fn start_with(model: &str, device: &str, arguments: &[&str], environment: &[(String, String)]) -> Server {
    let server = spawn_with(model, device, arguments, environment);
    server.wait_until_ready();
    server
}

fn spawn_with(model: &str, device: &str, arguments: &[&str], environment: &[(String, String)]) -> Server {
    let model = golden_path(model);
    let mut all = [model.to_str().expect("UTF-8"), "--device", device].map(str::to_owned).to_vec();
    all.extend(SMALL.map(str::to_owned));
    replace_flags(&mut all, arguments);
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    Server::spawn_with(&all, environment)
}

fn prompt(seed: usize, len: usize) -> Vec<usize> {
    (0..len).map(|i| 3 + (seed * 7919 + i * i * 31 + i * 17) % 490).collect()
}

fn complete(server: &Server, body: Value) -> Value {
    let response = server.post("/v1/completions", &body);
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()
}

/// Log-probabilities of a prompt's tokens but the first.
fn scores(server: &Server, prompt: &[usize]) -> Vec<f64> {
    let body = json!({ "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 0 });
    let answer = complete(server, body);
    let all = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("scores").clone();
    all[1..prompt.len()].iter().map(|score| score.as_f64().expect("a number")).collect()
}

fn tokens(answer: &Value) -> Vec<u64> {
    let ids = answer["choices"][0]["token_ids"].as_array().expect("token ids");
    ids.iter().map(|id| id.as_u64().expect("an id")).collect()
}

fn sampled(server: &Server, seed: usize, more: Value) -> Vec<u64> {
    let mut body = json!({
        "prompt": prompt(seed, 5 + 9 * seed), "max_tokens": 12, "seed": seed, "ignore_eos": true, "return_token_ids": true,
    });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    tokens(&complete(server, body))
}

#[test]
fn a_gpu_gives_the_numbers_of_a_cpu() {
    let _turn = turn();
    for (model, weights) in [
        ("dummy-d64", &["--dummy-weights", "bf16"][..]),
        ("dummy-d128", &["--dummy-weights", "bf16"]),
        ("dummy-d64", &["--dummy-weights", "q8_0"]),
        ("dummy-d64", &["--dummy-weights", "q4_0"]),
        ("dummy-d128", &["--dummy-weights", "q4_1"]),
    ] {
        let exact = start(model, "cpu", &[weights, &["--dtype", "f32"]].concat());
        let gpu = start(model, "cuda", weights);
        // Of a chunk, of several, and of so few tokens that products read their weights by themselves.
        for len in [5, 40, 130] {
            let prompt = prompt(len, len);
            let (expected, found) = (scores(&exact, &prompt), scores(&gpu, &prompt));
            let apart: Vec<f64> = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).collect();
            let worst = apart.iter().copied().fold(0.0, f64::max);
            let mean = apart.iter().sum::<f64>() / apart.len() as f64;
            println!("{model} {weights:?}, {len} tokens: {mean:.4} apart on average, {worst:.4} at most");
            // What rounding to bf16 does; a wrong kernel is apart by whole units.
            assert!(mean < 0.02 && worst < 0.12, "{model} {weights:?}: {worst} apart in {len} tokens");
            assert!(worst > 0.0, "the same bits: this was no GPU");
        }
    }
}

/// e4m3 has three bits of mantissa: more apart, but not by units.
#[test]
fn weights_and_kv_in_fp8_are_near() {
    let _turn = turn();
    let exact = start("dummy-d128", "cpu", &["--dtype", "f32"]);
    // 9.0 multiplies fp8 itself, 8.9 reads it.
    for (capability, arguments) in [
        ("90", ["--quantization", "fp8"]),
        ("89", ["--quantization", "fp8"]),
        ("90", ["--kv-cache-dtype", "fp8"]),
    ] {
        let mut environment = stand_in::environment(1, MEMORY);
        environment.push(("STUB_CAPABILITY".into(), capability.into()));
        let gpu = start_with("dummy-d128", "cuda", &arguments, &environment);
        for len in [5, 130] {
            let prompt = prompt(len, len);
            let (expected, found) = (scores(&exact, &prompt), scores(&gpu, &prompt));
            let apart: f64 = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).sum();
            let mean = apart / found.len() as f64;
            println!("{capability} {arguments:?}, {len} tokens: {mean:.4} apart on average");
            assert!(mean > 0.004 && mean < 0.15, "{capability} {arguments:?}: {mean} apart in {len} tokens");
        }
    }
}

/// Steps that are replayed and steps that are queued operation by operation are the same operations.
/// A checkpoint in e4m3: layer 0 with a scale for each matrix, layer 1 with one for each row.
fn write_fp8_checkpoint(folder: &Path) {
    let config =
        std::fs::read_to_string(golden_path("dummy-d64").join("config.json")).expect("a configuration");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    config["quantization_config"] = json!({ "quant_method": "fp8", "activation_scheme": "dynamic" });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("written");
    let (hidden, inner, wide, narrow) = (192, 320, 6 * 64, 2 * 64);
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let bf16 = |values: &[f32]| values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
    let f32s = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let embedding: Vec<f32> = (0..500 * hidden).map(|_| (f32::from(random()) / 128.0 - 1.0) / 8.0).collect();
    tensors.push(("model.embed_tokens.weight".into(), Dtype::BF16, vec![500, hidden], bf16(&embedding)));
    let mut norm = |name: String| tensors.push((name, Dtype::BF16, vec![hidden], bf16(&vec![1.0; hidden])));
    norm("model.norm.weight".into());
    for layer in 0..2 {
        norm(format!("model.layers.{layer}.input_layernorm.weight"));
        norm(format!("model.layers.{layer}.post_attention_layernorm.weight"));
    }
    for layer in 0..2 {
        for (part, rows, cols) in [
            ("self_attn.q_proj", wide, hidden),
            ("self_attn.k_proj", narrow, hidden),
            ("self_attn.v_proj", narrow, hidden),
            ("self_attn.o_proj", hidden, wide),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ] {
            let name = format!("model.layers.{layer}.{part}.weight");
            // Either sign, exponents of 1/8 to 1.
            let codes = (0..rows * cols).map(|_| random() & 0x9f | 0x20).collect();
            // A power of two for each row: what the CPU makes of it in bf16 is exact.
            let scales: Vec<f32> =
                (0..if layer == 0 { 1 } else { rows }).map(|i| [0.125, 0.0625][i % 2]).collect();
            let shape = if layer == 0 { vec![] } else { vec![rows, 1] };
            tensors.push((format!("{name}_scale"), Dtype::F32, shape, f32s(&scales)));
            tensors.push((name, Dtype::F8_E4M3, vec![rows, cols], codes));
        }
    }
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).expect("written");
}

/// Its layers stay as they are: exact, but for what rounding inputs to e4m3 does where that is asked for.
#[test]
fn a_checkpoint_in_fp8_gives_the_numbers_of_a_cpu() {
    let _turn = turn();
    let folder = tempfile::tempdir().expect("a folder");
    write_fp8_checkpoint(folder.path());
    let model = folder.path().to_str().expect("UTF-8");
    let auto = ["--load-format", "auto"];
    let exact = start(model, "cpu", &[&auto[..], &["--dtype", "f32"]].concat());
    for (ranks, more, most) in
        [("1", &[][..], 0.02), ("2", &[], 0.02), ("1", &["--quantization", "fp8"], 0.15)]
    {
        let arguments = [&auto[..], &["--tensor-parallel-size", ranks], more].concat();
        let gpu = start(model, "cuda", &arguments);
        for len in [5, 40, 130] {
            let prompt = prompt(len, len);
            let (expected, found) = (scores(&exact, &prompt), scores(&gpu, &prompt));
            let apart: f64 = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).sum();
            let mean = apart / found.len() as f64;
            println!("{ranks} ranks, {more:?}, {len} tokens: {mean:.4} apart on average");
            assert!(mean > 0.0 && mean < most, "{ranks} ranks, {more:?}: {mean} apart in {len} tokens");
        }
    }
}

#[test]
fn graphs_change_nothing() {
    let _turn = turn();
    let [with, without] = [&[][..], &["--enforce-eager"]].map(|more| start("dummy-d64", "cuda", more));
    for seed in 0..3 {
        let settings = json!({ "temperature": 0.8, "top_p": 0.9 });
        assert_eq!(sampled(&with, seed, settings.clone()), sampled(&without, seed, settings));
    }
    let prompt = prompt(1, 60);
    assert_eq!(scores(&with, &prompt), scores(&without, &prompt));
}

/// A step is begun before the tokens of the last one are known, which it takes on the GPU.
#[test]
fn steps_are_planned_beside_the_gpu() {
    let _turn = turn();
    let overlapped = |more: &[&str]| -> f64 {
        let mut bench = Command::new(binary());
        bench.arg("bench").arg(golden_path("dummy-d64")).args(SMALL);
        bench.args("--device cuda --format json --prompt-tokens 8 --output-tokens 24".split(' '));
        bench.args("--concurrency 2 --num-requests 2".split(' '));
        let output =
            bench.args(more).envs(stand_in::environment(1, MEMORY)).output().expect("the binary runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        report["results"][0]["overhead"]["overlapped_steps"].as_f64().expect("a share")
    };
    choices_do_not_depend_on_overlap(&start("dummy-d64", "cuda", &["--enable-prefix-caching=false"]));
    // The first step after a prompt has to wait for it.
    let share = overlapped(&[]);
    assert!(share > 0.8 && share < 1.0, "{share}");
    assert_eq!(overlapped(&["--no-async-scheduling"]), 0.0);
}

/// Changes no logit, and makes a step wait for the tokens of the one before.
const WAITING: f64 = 1e-20;

/// Choices of one request are rows of one step, whether it is begun before the last is over or after, and whether log-probabilities
/// are wanted.
fn choices_do_not_depend_on_overlap(server: &Server) {
    for seed in 0..3 {
        let [beside, after, scored] = [(0.0, Value::Null), (WAITING, Value::Null), (0.0, json!(2))].map(|(penalty, logprobs)| {
            let body = json!({
                "prompt": prompt(seed, 20), "max_tokens": 24, "n": 4, "temperature": 1.0, "seed": seed, "ignore_eos": true,
                "return_token_ids": true, "logprobs": logprobs, "frequency_penalty": penalty,
            });
            let answer = complete(server, body);
            let choices = answer["choices"].as_array().expect("choices").iter();
            choices.map(|choice| choice["token_ids"].clone()).collect::<Vec<Value>>()
        });
        assert_eq!((&beside, &beside), (&after, &scored), "seed {seed}");
        assert!(beside.windows(2).all(|pair| pair[0] != pair[1]), "choices are told apart");
    }
}

/// What the GPU draws and scores is what the host does with the same logits.
#[test]
fn tokens_are_drawn_as_on_the_host() {
    let _turn = turn();
    let device = start("dummy-d64", "cuda", &["--enable-prefix-caching=false"]);
    let mut environment = stand_in::environment(1, MEMORY);
    environment.push(("TANDEM_TEST_SAMPLE_ON_HOST".into(), "1".into()));
    let host = start_with("dummy-d64", "cuda", &["--enable-prefix-caching=false"], &environment);
    let settings = [
        json!({ "temperature": 0 }),
        json!({ "temperature": 1.0 }),
        json!({ "temperature": 0.7, "top_k": 20 }),
        json!({ "temperature": 1.3, "top_p": 0.8, "min_p": 0.02 }),
        json!({ "temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4 }),
        json!({ "temperature": 0, "frequency_penalty": 1.5, "logit_bias": { "17": 5.0, "40": -100.0 } }),
        json!({ "temperature": 1.0, "allowed_token_ids": [9, 8, 7, 300, 301, 302] }),
        json!({ "temperature": 0, "min_tokens": 8, "stop_token_ids": [285, 20, 52] }),
    ];
    for (seed, settings) in settings.into_iter().enumerate() {
        let expected = sampled(&host, seed, settings.clone());
        assert_eq!(sampled(&device, seed, settings.clone()), expected, "{settings}");
        // Of each token's scores another number; of the prompt's too, whose rows are no draws.
        let mut scored = settings.clone();
        scored["logprobs"] = json!(seed % 6);
        scored["echo"] = json!(seed % 2 == 0);
        scored["n"] = json!(1 + seed % 3);
        scored["prompt"] = json!(prompt(seed, 12 + seed));
        scored["max_tokens"] = json!(9);
        scored["seed"] = json!(seed);
        // Ranks come with these, and another number in the rows beside.
        scored["prompt_logprobs"] = json!((seed + 3) % 6);
        let overlapped = device.metric("llm_overlapped_steps_total");
        let [answer, expected] = [&device, &host].map(|server| complete(server, scored.clone()));
        assert_eq!(answer["choices"].as_array().expect("choices").len(), 1 + seed % 3);
        are_near(&answer["choices"], &expected["choices"]);
        // No step waits for log-probabilities, only for what penalties count.
        let waits = settings.get("frequency_penalty").is_some();
        assert_eq!(device.metric("llm_overlapped_steps_total") > overlapped + 3.0, !waits, "{settings}");
    }
    assert_eq!(host.metric("llm_overlapped_steps_total"), 0.0);
}

/// The same but for the last bits of numbers.
fn are_near(found: &Value, expected: &Value) {
    match (found, expected) {
        (Value::Number(a), Value::Number(b)) => {
            let [a, b] = [a, b].map(|number| number.as_f64().expect("a number"));
            assert!((a - b).abs() < 1e-4, "{a} instead of {b}");
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{found} instead of {expected}");
            a.iter().zip(b).for_each(|(a, b)| are_near(a, b));
        }
        (Value::Object(a), Value::Object(b)) => {
            assert!(a.keys().eq(b.keys()), "{found} instead of {expected}");
            a.iter().for_each(|(key, value)| are_near(value, &b[key]));
        }
        _ => assert_eq!(found, expected),
    }
}

/// Those of NVML's second GPU: it counts in another order than CUDA.
#[test]
fn metrics_tell_of_the_gpu() {
    let _turn = turn();
    let server = start("dummy-d64", "cuda", &[]);
    for page in [server.get("/metrics"), server.get_metrics()] {
        for line in [
            "llm_gpu_utilization_ratio{model_name=\"dummy-d64\",gpu=\"0\"} 0.5",
            "llm_gpu_memory_used_bytes{model_name=\"dummy-d64\",gpu=\"0\"} 800",
            "llm_gpu_memory_total_bytes{model_name=\"dummy-d64\",gpu=\"0\"} 2000",
        ] {
            assert!(page.body.lines().any(|found| found == line), "{line} is not in\n{}", page.body);
        }
    }
    drop(server);
    let cpu = start("dummy-d64", "cpu", &[]);
    assert!(!cpu.get("/metrics").body.contains("llm_gpu_"));
}

/// Requests of all kinds at once: prompts in chunks beside decodes, choices that share a prompt, cached prefixes, preemption.
#[test]
fn many_requests_at_once_are_all_answered() {
    let _turn = turn();
    let server = start("dummy-d64", "cuda", &["--kv-cache-memory-bytes", "640KiB"]);
    let alone: Vec<Vec<u64>> =
        (0..6).map(|seed| sampled(&server, seed, json!({ "temperature": 0 }))).collect();
    std::thread::scope(|scope| {
        let requests: Vec<_> = (0..12)
            .map(|request| {
                let server = &server;
                let more = json!({ "temperature": 0, "n": 1 + request % 2 });
                scope.spawn(move || sampled(server, request % 6, more))
            })
            .collect();
        for (request, answer) in requests.into_iter().enumerate() {
            let (answer, alone) = (answer.join().expect("an answer"), &alone[request % 6]);
            assert_eq!(answer.len(), alone.len());
            // Other products for other numbers of rows round otherwise; where the first tokens differ, more than rounding does.
            assert_eq!(answer[0], alone[0], "request {request}");
        }
    });
    assert_eq!(server.metric("llm_requests_errored_total"), 0.0);
    assert_eq!(server.metric("llm_requests_completed_total"), 18.0);
}

#[test]
fn without_a_gpu_the_cpu_computes_or_the_reason_is_told() {
    let _turn = turn();
    let model = golden_path("dummy-d64");
    let all = [&[model.to_str().expect("UTF-8"), "--device", "cuda"][..], &SMALL].concat();
    let refuse = |environment: &[(String, String)]| {
        let mut server = Server::spawn_with(&all, environment);
        let status = server.wait(Duration::from_secs(30));
        assert_eq!(status.code(), Some(2), "{}", server.output());
        server.output()
    };
    let no_driver = refuse(&[]);
    assert!(no_driver.contains("--device") && no_driver.contains("no CUDA driver"), "{no_driver}");
    let nothing = refuse(&stand_in::environment(0, MEMORY));
    assert!(nothing.contains("sees no GPU"), "{nothing}");
    let small = refuse(&stand_in::environment(1, 1 << 28));
    assert!(small.contains("gpu-memory-utilization"), "{small}");

    let automatic = Server::start(&[&[model.to_str().expect("UTF-8")][..], &SMALL].concat());
    assert!(automatic.output().contains("backend   cpu"), "{}", automatic.output());
}

#[test]
fn a_gpu_that_computes_wrong_is_refused() {
    let _turn = turn();
    let (model, dir) = (golden_path("dummy-d64"), tempfile::tempdir().expect("a folder"));
    let all = [&[model.to_str().expect("UTF-8"), "--device", "cuda"][..], &SMALL].concat();
    let environment = stand_in::wrong_environment(dir.path(), 1, MEMORY, &stand_in::WRONG_NORMS);
    for _ in 0..2 {
        let mut server = Server::spawn_with(&all, &environment);
        let status = server.wait(Duration::from_secs(300));
        assert!(status.code().is_some_and(|code| code != 0), "{status}: {}", server.output());
        let output = server.output();
        assert!(output.contains("checks of kernels fail") && output.contains("norm"), "{output}");
    }
}

#[test]
fn what_would_compute_is_told_beforehand() {
    let model = golden_path("dummy-d64");
    let says = |environment: &[(String, String)]| {
        let output = Command::new(binary())
            .args(["check", model.to_str().expect("UTF-8"), "--load-format", "dummy", "--port", "0"])
            .args(["--metrics-port", "0"])
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .output()
            .expect("the binary starts");
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(says(&stand_in::environment(1, MEMORY)).contains("backend    cuda, GPU 0 Stub 0"));
    assert!(says(&[]).contains("backend    cpu"));
}

#[test]
fn options_of_the_cpu_are_refused_on_a_gpu() {
    let _turn = turn();
    let model = golden_path("dummy-d64");
    for (option, value) in [("--dtype", "f32"), ("--activations", "int8"), ("--kv-cache-dtype", "int8")] {
        let all = [&[model.to_str().expect("UTF-8"), option, value][..], &SMALL].concat();
        let mut server = Server::spawn_with(&all, &stand_in::environment(1, MEMORY));
        assert_eq!(server.wait(Duration::from_secs(30)).code(), Some(2));
        assert!(server.output().contains(option), "{}", server.output());
    }
}

/// Ranks of a group on GPUs compute the numbers of one rank but for rounding, and one that dies is replaced while its stream waits:
/// by way of the host where they share a GPU, by NCCL, also in recorded steps, where each has its own, and either way with small sums
/// by a kernel that reads the other's memory.
#[test]
fn ranks_on_gpus_compute_one_model_and_heal() {
    let _turn = turn();
    let alone = start_on(1, "dummy-d64", &[]);
    for (num_gpus, custom, in_one_shot) in
        [(1, "auto", false), (1, "always", true), (2, "never", false), (2, "auto", true)]
    {
        // A cached prompt is computed in other products than one that is not.
        let group =
            start_on(num_gpus, "dummy-d64", &[&TWO_RANKS[..], &["--custom-all-reduce", custom]].concat());
        let output = group.output();
        assert_eq!(output.contains("go by way of the host"), num_gpus == 1, "{output}");
        assert_eq!(output.contains(IN_ONE_SHOT), in_one_shot, "{num_gpus} GPUs, {custom}: {output}");
        assert!(are_of_one_model(&alone, &group));
        until_output_contains(&group, "2 ranks");
        assert_eq!(group.metric("llm_overlapped_steps_total"), 0.0, "there were prompts only");
        choices_do_not_depend_on_overlap(&group);
        let overlapped = group.metric("llm_overlapped_steps_total");
        // Of nine answers of 24 steps three wait, and so does the first step after each prompt.
        assert!(overlapped > 100.0 && overlapped < 138.0, "{overlapped}");
        heal(&group, WAITING);
        heal(&group, 0.0);
        // Each rank says so for each epoch.
        let times = group.output().matches(IN_ONE_SHOT).count();
        assert_eq!(times, if in_one_shot { 6 } else { 0 }, "{}", group.output());
    }
}

const TWO_RANKS: [&str; 3] = ["--tensor-parallel-size", "2", "--enable-prefix-caching=false"];
const IN_ONE_SHOT: &str = "small sums over ranks are made in one shot";

fn are_of_one_model(one: &Server, other: &Server) -> bool {
    [5, 70].into_iter().all(|len| {
        let prompt = prompt(len, len);
        let (expected, found) = (scores(one, &prompt), scores(other, &prompt));
        let worst = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        println!("{worst} apart in {len} tokens");
        worst < 0.12
    })
}

/// Where GPUs do not reach each other's memory, what is read there is wrong, or NCCL is faster, sums go by NCCL, and who wants them
/// otherwise is told why they do not.
#[test]
fn sums_in_one_shot_are_tried_before_they_are_used() {
    let _turn = turn();
    let alone = start_on(1, "dummy-d64", &[]);
    let dir = tempfile::tempdir().expect("a folder");
    let wrong = stand_in::wrong_environment(dir.path(), 2, MEMORY, &stand_in::WRONG_SUMS);
    let mut out_of_reach = stand_in::environment(2, MEMORY);
    out_of_reach.push(("STUB_NO_PEERS".into(), "1".into()));
    let mut slower = stand_in::environment(2, MEMORY);
    slower.push(("STUB_NCCL_US".into(), "2".into()));
    let environments =
        [(&wrong, "came out wrong"), (&out_of_reach, "is out of reach"), (&slower, "it is faster")];
    for (environment, reason) in environments {
        let group = start_with("dummy-d64", "cuda", &TWO_RANKS, environment);
        let output = group.output();
        assert!(output.contains(reason) && !output.contains(IN_ONE_SHOT), "{output}");
        assert!(are_of_one_model(&alone, &group), "{reason}");
    }
    let always = [&TWO_RANKS[..], &["--custom-all-reduce", "always"]].concat();
    let group = spawn_with("dummy-d64", "cuda", &always, &out_of_reach);
    until_output_contains(&group, "custom-all-reduce is always, and cannot be: the memory of rank");
}

/// What a server says comes a moment after what it does.
fn until_output_contains(server: &Server, text: &str) {
    let start = Instant::now();
    while !server.output().contains(text) {
        assert!(start.elapsed() < Duration::from_secs(60), "{}", server.output());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A rank is killed in the middle of a stream, which goes on, whether a penalty makes every step wait for the one before or not.
fn heal(group: &Server, penalty: f64) {
    let body = json!({
        "prompt": prompt(3, 20), "max_tokens": 60, "temperature": 0, "ignore_eos": true, "stream": true, "return_token_ids": true,
        "logprobs": 1, "frequency_penalty": penalty,
    });
    let resumes = group.metric("llm_stream_resumes_total");
    let undisturbed = stream(group.port, &body, |_| ());
    let ranks = rank_processes(group.id());
    let mut killed_at = None;
    let resumed = stream(group.port, &body, |so_far| {
        if so_far.token_ids.len() >= 20 && killed_at.is_none() {
            killed_at = Some(so_far.token_ids.len());
            kill("KILL", ranks[1]);
        }
    });
    assert!(undisturbed.done && resumed.done, "{resumed:?}\n{}", group.output());
    // What was sent stays; what follows was computed anew, in other products, and may round otherwise.
    let before = killed_at.expect("it was killed in mid-stream");
    assert_eq!(resumed.token_ids[..before], undisturbed.token_ids[..before]);
    assert_eq!((undisturbed.token_ids.len(), resumed.token_ids.len()), (60, 60));
    assert_eq!(resumed.logprobs[..before], undisturbed.logprobs[..before]);
    assert_eq!(group.metric("llm_stream_resumes_total"), resumes + 1.0);
}

#[test]
fn options_of_a_gpu_are_refused_on_a_cpu() {
    let _turn = turn();
    let model = golden_path("dummy-d64");
    for (option, value) in [("--quantization", "fp8"), ("--kv-cache-dtype", "fp8")] {
        let all = [&[model.to_str().expect("UTF-8"), option, value][..], &SMALL].concat();
        let mut server = Server::spawn(&all);
        assert_eq!(server.wait(Duration::from_secs(30)).code(), Some(2));
        assert!(
            server.output().contains(option) && server.output().contains("for GPUs"),
            "{}",
            server.output()
        );
    }
}
