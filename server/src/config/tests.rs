//! The layers together, without touching the process's own environment.

use super::*;

fn environment(variables: &[(&str, &str)]) -> Environment {
    variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn parse_with(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Parsed, Stop> {
    let arguments = ["tandem"].iter().chain(arguments).map(OsString::from).collect();
    parse(arguments, &environment(variables))
}

fn serve(arguments: &[&str], variables: &[(&str, &str)]) -> ServeConfig {
    match parse_with(&[&["serve", "model.gguf"], arguments].concat(), variables) {
        Ok(Parsed { command: Command::Serve(config), .. }) => *config,
        other => panic!("{other:?}"),
    }
}

fn refusal(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    match parse_with(&[&["serve", "model.gguf"], arguments].concat(), variables) {
        Err(Stop::Refused(error)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = serve(&[], &[]);
    assert_eq!(
        (config.host.to_string().as_str(), config.port, config.metrics_port),
        ("0.0.0.0", 8000, Some(9090))
    );
    assert_eq!((config.common.max_num_seqs, config.common.max_num_batched_tokens), (None, None));
    assert_eq!((config.max_num_queued_reqs, config.shutdown_timeout.as_secs()), (1024, 120));
    assert!(config.common.prefix_caching && config.api_keys.is_empty() && config.common.seed.is_none());
}

#[test]
fn flag_wins_over_environment_over_file_over_default() {
    let file = file("port: 1\nmax_num_seqs: 2\nhost: 127.0.0.1\nserved-model-name: [a, b]\n");
    let path = file.path().to_str().unwrap();
    let config =
        serve(&["--config", path, "--port", "3"], &[("TANDEM_PORT", "4"), ("TANDEM_MAX_NUM_SEQS", "5")]);
    assert_eq!(
        (config.port, config.common.max_num_seqs, config.host.to_string().as_str()),
        (3, Some(5), "127.0.0.1")
    );
    assert_eq!(config.served_model_names, ["a", "b"]);
    let config = serve(&[], &[("TANDEM_CONFIG", path), ("TANDEM_SERVED_MODEL_NAME", "x,y")]);
    assert_eq!((config.port, config.common.max_num_seqs), (1, Some(2)));
    assert_eq!(config.served_model_names, ["x", "y"]);
}

#[test]
fn a_flag_and_its_negation_are_one_setting() {
    let file = file("enable-prefix-caching: false\n");
    let path = file.path().to_str().unwrap();
    assert!(!serve(&["--config", path], &[]).common.prefix_caching);
    assert!(
        serve(&["--config", path], &[("TANDEM_NO_ENABLE_PREFIX_CACHING", "false")]).common.prefix_caching
    );
    assert!(
        !serve(&["--no-enable-prefix-caching"], &[("TANDEM_ENABLE_PREFIX_CACHING", "true")])
            .common
            .prefix_caching
    );
    assert!(serve(&["--enable-prefix-caching", "--config", path], &[]).common.prefix_caching);
    assert!(refusal(&["--enable-prefix-caching", "--no-enable-prefix-caching"], &[]).contains("contradicts"));
    assert!(
        serve(&[], &[]).common.async_scheduling
            && !serve(&["--no-async-scheduling"], &[]).common.async_scheduling
    );
    assert!(!serve(&["--async-scheduling=false"], &[]).common.async_scheduling);
    assert!(refusal(&["--async-scheduling", "--no-async-scheduling"], &[]).contains("contradicts"));
}

#[test]
fn refusals_name_where_the_value_stands() {
    assert!(refusal(&["--port", "x"], &[]).starts_with("--port: invalid value \"x\""));
    assert!(
        refusal(&[], &[("TANDEM_PORT", "70000")])
            .starts_with("environment variable TANDEM_PORT: invalid value")
    );
    let bad = file("block-size: 32\n");
    let path = bad.path().to_str().unwrap();
    let expected = format!("{path}: key block-size: only 16 is possible; leave the flag out");
    assert_eq!(refusal(&["--config", path], &[]), expected);
    let bad = file("max_sequences: 3\n");
    let message = refusal(&["--config", bad.path().to_str().unwrap()], &[]);
    assert!(message.contains("unknown key (did you mean max-num-seqs?)"), "{message}");
    for (text, part) in [
        ("api-key: [007]", "key api-key: must be text"),
        ("port: 1\nport: 2", "YAML"),
        ("port: [1, 2]", "key port: takes one value"),
        ("port: {a: 1}", "key port: must be a value"),
        ("- port", "YAML"),
        ("config: other.yaml", "cannot name another"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "given twice"),
    ] {
        let bad = file(text);
        let message = refusal(&["--config", bad.path().to_str().unwrap()], &[]);
        assert!(message.contains(part) && !message.contains('\n'), "{text}: {message}");
    }
    let message = refusal(&["--config", "/nowhere.yaml"], &[]);
    assert!(message.starts_with("/nowhere.yaml: cannot be read"), "{message}");
    let message = refusal(&["--max-num-sequences", "3"], &[]);
    assert!(message.starts_with("command line: unknown argument"), "{message}");
    for message in [refusal(&["--isa", "sse"], &[]), refusal(&["--config", path, "--device", "cuda"], &[])] {
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn names_of_vllm_are_understood() {
    let config = serve(
        &["--dtype", "bfloat16", "--kv-cache-dtype", "float16", "--kv-cache-memory-bytes", "4GiB"],
        &[],
    );
    assert_eq!((config.common.dtype, config.common.kv_cache_dtype), (Dtype::Bf16, KvCacheDtype::F16));
    assert_eq!(config.common.kv_cache_memory_bytes, Some(4 << 30));
    assert!(refusal(&["--dtype", "half"], &[]).contains("float16"));
    assert_eq!(serve(&["--kv-cache-dtype", "int8"], &[]).common.kv_cache_dtype, KvCacheDtype::Int8);
    let both = ["--max-num-batched-tokens", "8", "--max-num-seqs", "9"];
    assert!(refusal(&both, &[]).contains("max-num-seqs 9"));
}

#[test]
fn keys_show_in_no_message_and_no_debug_output() {
    let config = serve(&["--api-key", "s3cret", "other"], &[]);
    assert_eq!(config.api_keys.len(), 2);
    assert!(config.api_keys[0].matches(b"s3cret"));
    assert!(!format!("{config:?}").contains("s3cret"));
    let long = "s3cret".repeat(200);
    assert!(!refusal(&[], &[("TANDEM_API_KEY", &long)]).contains("s3cret"));
}

#[test]
fn variables_that_set_nothing_are_noted() {
    let variables =
        [("TANDEM_PORT", "tcp://10.0.0.1:80"), ("TANDEM_PROT", "1"), ("TANDEM_SERVICE_HOST", "h")];
    let parsed = parse_with(&["serve", "model.gguf"], &variables).unwrap();
    assert_eq!(parsed.notes.len(), 2, "{:?}", parsed.notes);
    assert!(parsed.notes.iter().any(|note| note.contains("TANDEM_PROT (did you mean TANDEM_PORT?)")));
    assert!(matches!(parsed.command, Command::Serve(config) if config.port == 8000));
}

#[test]
fn run_takes_a_model_a_prompt_or_both() {
    let run = |arguments: &[&str]| match parse_with(&[&["run"], arguments].concat(), &[]) {
        Ok(Parsed { command: Command::Run(config), .. }) => (config.common.model, config.prompt),
        other => panic!("{other:?}"),
    };
    let prompt = || Some("hi there".to_owned());
    assert_eq!(run(&["m.gguf", "hi there"]), ("m.gguf".into(), prompt()));
    assert_eq!(run(&["m.gguf"]), ("m.gguf".into(), None));
    assert_eq!(run(&["--model", "m.gguf", "hi there"]), ("m.gguf".into(), prompt()));
    assert_eq!(run(&["/"]), ("/".into(), None));
}

#[test]
fn sampling_that_nobody_set_is_left_to_the_model() {
    let run = |arguments: &[&str]| match parse_with(&[&["run", "m.gguf"], arguments].concat(), &[]) {
        Ok(Parsed { command: Command::Run(config), .. }) => (config.top_p, config.min_p),
        other => panic!("{other:?}"),
    };
    assert_eq!(run(&[]), (None, None));
    assert_eq!(run(&["--top-p", "0.9", "--min-p", "0"]), (Some(0.9), Some(0.0)));
    assert!(parse_with(&["run", "m.gguf", "--min-p", "1.5"], &[]).is_err());
}

fn run_refusal(arguments: &[&str]) -> String {
    match parse_with(&[&["run", "m.gguf", "hi"], arguments].concat(), &[]) {
        Err(Stop::Refused(error)) => error.to_string(),
        other => panic!("{arguments:?}: {other:?}"),
    }
}

#[test]
fn negative_numbers_are_values_of_their_flag() {
    for (flag, range) in [
        ("--port", "-1 is not in 0..=65535"),
        ("--seed", "-1 is not in 0..=18446744073709551615"),
        ("--max-num-seqs", "-1 is not in 1..=4294967295"),
        ("--shutdown-timeout", "-1 is not in 0..=86400"),
        ("--threads", "-1 is not in 1..=256"),
    ] {
        let message = refusal(&[flag, "-1"], &[]);
        assert!(message.starts_with(&format!("{flag}: ")) && message.contains(range), "{message}");
    }
    assert!(refusal(&["--seed", "1.5"], &[]).starts_with("--seed: invalid value"));
    assert_eq!(run_refusal(&["--temperature", "-1"]), "--temperature: must lie between 0 and 100");
    assert!(run_refusal(&["--top-k", "-2"]).contains("-2 is not in -1..=4294967295"));
    assert!(run_refusal(&["-1"]).contains("unknown argument"));
    let parsed = parse_with(&["run", "m.gguf", "hi", "--top-k", "-1"], &[]).unwrap();
    assert!(matches!(parsed.command, Command::Run(config) if config.top_k == Some(0)));
}

#[test]
fn impossible_sampling_is_refused_with_the_configuration() {
    for (flag, value) in
        [("--top-p", "0"), ("--top-p", "NaN"), ("--min-p", "-0.1"), ("--repetition-penalty", "0")]
    {
        let message = run_refusal(&[flag, value]);
        assert!(message.starts_with(&format!("{flag}: must ")), "{message}");
    }
}

#[test]
fn a_word_that_is_no_level_is_refused() {
    for good in ["info", "OFF", "warn,tandem_engine=debug", "tandem_engine=trace", "[span{a=1}]=info"] {
        assert_eq!(serve(&["--log-level", good], &[]).common.log_level.as_deref(), Some(good));
    }
    for bad in ["inf", "tandem_engine", "inf,tandem_engine=debug", "tandem_engine=loud"] {
        assert!(refusal(&["--log-level", bad], &[]).starts_with("--log-level: "), "{bad}");
    }
}

#[test]
fn random_weights_need_a_config_json() {
    let message = refusal(&["--load-format", "dummy"], &[]);
    assert!(message.starts_with("--load-format: ") && message.contains("config.json"), "{message}");
}

fn bench(arguments: &[&str], variables: &[(&str, &str)]) -> BenchConfig {
    match parse_with(&[&["bench"], arguments].concat(), variables) {
        Ok(Parsed { command: Command::Bench(config), .. }) => *config,
        other => panic!("{other:?}"),
    }
}

#[test]
fn bench_turns_the_prefix_cache_off() {
    let BenchConfig { load, format, plot, target, .. } =
        bench(&["m.gguf", "--concurrency", "1,4", "--format", "json", "--requests", "7"], &[]);
    assert_eq!((load.concurrency, load.num_requests), (vec![1, 4], Some(7)));
    assert_eq!((load.prompt_tokens, load.output_tokens, format, plot), (512, 128, OutputFormat::Json, None));
    let BenchTarget::Engine(common) = target else { panic!() };
    assert!(!common.prefix_caching);
}

#[test]
fn bench_of_a_server_needs_no_model() {
    let server = |arguments: &[&str], variables: &[(&str, &str)]| {
        let all = [&["--url", "http://h:81/v1"], arguments].concat();
        let BenchTarget::Server(server) = bench(&all, variables).target else { panic!() };
        server
    };
    let plain = server(&[], &[]);
    assert_eq!((plain.url.port, plain.endpoint, plain.timeout.as_secs()), (81, Endpoint::Completions, 600));
    assert!(plain.model.is_none() && plain.api_key.is_none());
    assert_eq!(server(&["--model", "org/m"], &[]).model.as_deref(), Some("org/m"));
    assert_eq!(server(&["--model", "a", "--served-model-name", "b"], &[]).model.as_deref(), Some("b"));
    // The path that `serve` takes from there is no name.
    let variables = [("TANDEM_MODEL", "/models/m.gguf"), ("TANDEM_API_KEY", "k,l"), ("TANDEM_THREADS", "2")];
    let from_variables = server(&["--endpoint", "chat"], &variables);
    assert_eq!((from_variables.model, from_variables.endpoint), (None, Endpoint::Chat));
    assert!(from_variables.api_key.unwrap().matches(b"k"));
}

#[test]
fn bench_refuses_flags_that_would_do_nothing() {
    let refused = |arguments: &[&str]| match parse_with(&[&["bench"], arguments].concat(), &[]) {
        Err(Stop::Refused(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let with_url = |rest: &[&str]| refused(&[&["--url", "http://h"], rest].concat());
    assert!(with_url(&["--isa", "avx2"]).starts_with("--isa: "));
    assert!(with_url(&["--max-num-seqs", "8"]).starts_with("--max-num-seqs: "));
    assert!(with_url(&["--timeout", "0"]).starts_with("--timeout: "));
    assert!(with_url(&["--api-key", "a\nb"]).starts_with("--api-key: "));
    assert!(with_url(&["--concurrency", "4097"]).starts_with("--concurrency: "));
    assert!(refused(&["m.gguf", "--timeout", "5"]).starts_with("--timeout: "));
    assert!(refused(&["m.gguf", "--api-key", "k"]).contains("--url"));
    assert!(refused(&["--url", "https://h"]).starts_with("--url: "));
}

#[test]
fn bench_scores_a_text_instead_when_there_is_one() {
    let bench = |arguments: &[&str], variables: &[(&str, &str)]| match parse_with(
        &[&["bench", "m.gguf"], arguments].concat(),
        variables,
    ) {
        Ok(Parsed { command: Command::Bench(config), .. }) => Ok(match config.target {
            BenchTarget::Perplexity(_, wanted) => Some((wanted.file, wanted.context)),
            _ => None,
        }),
        Err(Stop::Refused(error)) => Err(error.to_string()),
        other => panic!("{other:?}"),
    };
    assert_eq!(bench(&[], &[]), Ok(None));
    assert_eq!(bench(&["--perplexity", "t.txt"], &[]), Ok(Some(("t.txt".into(), 512))));
    let found = bench(&["--perplexity", "t.txt"], &[("TANDEM_CONTEXT", "64")]);
    assert_eq!(found, Ok(Some(("t.txt".into(), 64))));
    assert_eq!(bench(&["--context", "64"], &[]), Err("--context: needs --perplexity".to_owned()));
    assert!(
        bench(&["--perplexity", "t.txt", "--context", "3"], &[]).unwrap_err().contains("3 is not in 4..=")
    );
}

#[test]
fn quantization_is_a_flag_a_variable_and_a_key() {
    assert_eq!(serve(&[], &[]).common.quantization, None);
    assert_eq!(serve(&["--quantization", "Q4_0"], &[]).common.quantization, Some(Quantization::Q4_0));
    let variable = [("TANDEM_QUANTIZATION", "q8_0")];
    assert_eq!(serve(&[], &variable).common.quantization, Some(Quantization::Q8_0));
    let file = file("quantization: q4_1\n");
    let config = serve(&["--config", file.path().to_str().unwrap()], &[]);
    assert_eq!(config.common.quantization, Some(Quantization::Q4_1));
    let message = refusal(&["--quantization", "awq"], &[]);
    assert!(message.starts_with("--quantization: ") && message.contains("q4_0"), "{message}");
}

#[test]
fn help_names_every_variable() {
    for name in ["serve", "run", "bench", "check"] {
        let Err(Stop::Shown(help)) = parse_with(&[name, "--help"], &[]) else { panic!() };
        let help = help.to_string();
        assert!(help.contains("TANDEM_KV_CACHE_MEMORY_BYTES"), "{help}");
    }
    let mut command = flags::command();
    command.build();
    command.debug_assert();
}

#[test]
fn command_lines_of_vllm_are_understood() {
    let familiar = "--max-model-len 2k --trust-remote-code -tp 1 --load-format safetensors --host localhost \
         --allowed-origins [\"https://a.example\",\"http://b:1\"]";
    let arguments: Vec<&str> = familiar.split_whitespace().collect();
    let parsed = parse_with(&[&["serve", "m.gguf"], &arguments[..]].concat(), &[]).unwrap();
    assert_eq!(parsed.notes, ["--trust-remote-code changes nothing here"]);
    let Command::Serve(config) = parsed.command else { panic!("serve") };
    assert_eq!((config.common.max_model_len, config.host.to_string()), (Some(2000), "127.0.0.1".into()));
    let origins = ["https://a.example", "http://b:1"].map(str::to_owned).to_vec();
    assert_eq!(config.allowed_origins, AllowedOrigins::List(origins));

    assert!(
        refusal(&["--tool-call-parser", "hermes"], &[]).contains("--tool-call-parser is not supported yet")
    );
    assert!(refusal(&["--pipeline-parallel-size", "2"], &[]).contains("is not supported yet"));
    let auto = parse_with(&["serve", "m.gguf", "--max-model-len", "auto"], &[("TANDEM_MAX_MODEL_LEN", "64")]);
    assert!(matches!(auto.unwrap().command, Command::Serve(config) if config.common.max_model_len.is_none()));
    assert!(refusal(&["--max-model-len", "2x"], &[]).contains("x is no unit"));
    assert!(refusal(&["--max-model-len", "0"], &[]).contains("0 is not in 1..=4294967295"));
    assert!(refusal(&["--host", "example.org"], &[]).contains("it is no IP address, nor localhost"));
    for origins in ["https://a.example/", "a.example", "[1]"] {
        assert!(
            refusal(&["--allowed-origins", origins], &[]).starts_with("--allowed-origins: "),
            "{origins}"
        );
    }
}
