//! `tandem check`: would `serve` work with this configuration, and what would it use?
//!
//! Goes on after a problem as far as it can, so that one run names them all.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use tandem_engine::Inspected;

use super::numbers::{bytes, grouped, parameters};
use super::startup;
use super::{Exit, REFUSED, serve, terminal};
use crate::config::ServeConfig;
use crate::text::{ChatInput, SpecialTokens, Tokenizer};

/// How long a peer's port may take to answer.
const REACH_TIMEOUT: Duration = Duration::from_secs(1);

/// What is printed, and what is wrong.
#[derive(Default)]
struct Findings {
    text: String,
    problems: Vec<String>,
}

/// Runs the command.
pub(super) fn check(config: ServeConfig) -> Result<(), Exit> {
    let mut findings = Findings::default();
    let inspected = startup::inspect(&config.common, config.group.as_ref(), 0);
    machine(&config, inspected.as_ref().ok().and_then(Inspected::device), &mut findings);
    group(&config, &mut findings);
    match inspected {
        Ok(inspected) => {
            model(&config, &inspected, &mut findings);
            text(&config, &inspected, &mut findings);
        }
        Err(exit) => findings.problems.extend(exit.problems),
    }
    ports(&config, &mut findings);
    terminal::print(&findings.text);
    if findings.problems.is_empty() {
        terminal::print("ok\n");
        return Ok(());
    }
    Err(Exit { code: REFUSED, problems: findings.problems })
}

impl Findings {
    fn line(&mut self, what: &str, found: impl AsRef<str>) {
        self.text += &format!("{what:<10} {}\n", found.as_ref());
    }

    /// The value, or its error among the problems.
    fn take<T>(&mut self, result: Result<T, Exit>) -> Option<T> {
        result.map_err(|exit| self.problems.extend(exit.problems)).ok()
    }
}

/// The machine, and what of it computes: the GPU, if there is one for it.
fn machine(config: &ServeConfig, gpu: Option<String>, findings: &mut Findings) {
    let machine = tandem_engine::machine_info(&startup::model_options(&config.common));
    let machine = machine.map_err(|e| startup::refusal(&config.common, e));
    let Some(machine) = findings.take(machine) else { return };
    let limit =
        machine.memory_limit_bytes.map_or("no limit".to_owned(), |limit| format!("limit {}", bytes(limit)));
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    findings.line("machine", format!("{}, {cpus} CPUs to use", processor()));
    let cpu = format!("cpu {}, {} threads", machine.isa, machine.threads);
    findings.line("backend", gpu.map_or(cpu, |gpu| format!("cuda, {gpu}")));
    findings.line("memory", format!("{} free, {limit}", bytes(machine.memory_available_bytes)));
}

/// The processor's name where the system tells it, else the architecture's.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn model(config: &ServeConfig, inspected: &Inspected, findings: &mut Findings) {
    let info = inspected.info();
    findings
        .line("model", format!("{}: {}, {}", info.name, info.architecture, parameters(info.num_parameters)));
    findings.line("weights", format!("{} ({})", info.weights, bytes(info.file_bytes)));
    findings.line(
        "shape",
        format!(
            "{} layers, hidden size {}, {} heads ({} for KV) of {}, vocabulary of {}, context of {}",
            info.num_layers,
            grouped(info.hidden_size as u64),
            info.num_heads,
            info.num_kv_heads,
            info.head_dim,
            grouped(info.vocab_size as u64),
            grouped(info.max_position_embeddings as u64),
        ),
    );
    let options = startup::engine_options(&config.common, config.max_num_queued_reqs, inspected);
    let plan = startup::plan(&config.common, config.group.as_ref(), inspected, &options);
    let Some(plan) = findings.take(plan) else { return };
    findings.line(
        "KV cache",
        format!(
            "{} tokens in {} blocks ({}, {}): {} requests of {} tokens",
            grouped(plan.kv_tokens as u64),
            grouped(plan.num_blocks as u64),
            bytes(plan.kv_bytes),
            plan.kv_layout.name(),
            plan.kv_tokens / plan.max_model_len.max(1),
            grouped(plan.max_model_len as u64),
        ),
    );
    findings.line("compute", format!("{} activations", plan.activations.name()));
    if let Some(group) = &config.group {
        let split = inspected.tensor_parallel(group.size());
        let split = split.map_err(|e| startup::refusal(&config.common, e));
        if let Some(split) = findings.take(split) {
            let bits = if split.exact {
                "the bits of one rank"
            } else {
                "right answers, but not the bits of one rank"
            };
            findings.line("split", format!("{} ranks, {} segments: {bits}", split.size, split.segments));
        }
    }
    plan.notes.iter().for_each(|note| findings.line("note", note));
}

/// This pod's place in its group, and who can be found and reached from here. Peers that are not there yet are no problem of
/// this pod.
fn group(config: &ServeConfig, findings: &mut Findings) {
    let Some(group) = &config.group else { return };
    group.sources.iter().for_each(|source| findings.line("group", source));
    let ranks: Vec<String> = (0..group.gpus_per_pod).map(|local| group.rank(local).to_string()).collect();
    findings.line("ranks", format!("{} of {} here", ranks.join(", "), group.size()));
    let key =
        if group.key.is_some() { "a shared secret" } else { "none: the group cannot leave this machine" };
    findings.line("key", key);
    if !group.is_leader() {
        findings.line("leader", reach(&group.leader_host, &[group.master_port]));
    }
    let ports: Vec<u16> =
        (0..group.gpus_per_pod as u16).map(|local| group.rank_port.saturating_add(local)).collect();
    for (ordinal, peer) in group.peers.iter().enumerate().filter(|(ordinal, _)| *ordinal != group.ordinal) {
        findings.line(&format!("pod {ordinal}"), reach(peer, &ports));
    }
}

/// What is found at a host: its addresses, and whether somebody listens.
fn reach(host: &str, ports: &[u16]) -> String {
    let mut found = host.to_owned();
    for (index, &port) in ports.iter().enumerate() {
        let addresses: Vec<SocketAddr> = match (host, port).to_socket_addrs() {
            Ok(addresses) => addresses.collect(),
            Err(error) => return format!("{host}: its name does not resolve ({error})"),
        };
        if index == 0 {
            let ips: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
            found += &format!(" is {}", ips.join(", "));
        }
        let answers = |address: &SocketAddr| TcpStream::connect_timeout(address, REACH_TIMEOUT);
        let state = match addresses.iter().map(answers).reduce(|first, next| first.or(next)) {
            Some(Ok(_)) => "answers".to_owned(),
            Some(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => {
                "has no listener yet".to_owned()
            }
            Some(Err(error)) => format!("cannot be reached: {error}"),
            None => "has no address".to_owned(),
        };
        found += &format!("; port {port} {state}");
    }
    found
}

/// Tokenizer and template, each tried once.
fn text(config: &ServeConfig, inspected: &Inspected, findings: &mut Findings) {
    let tokenizer = Tokenizer::from_model(inspected.tokenizer()).map_err(Exit::refused);
    let Some(tokenizer) = findings.take(tokenizer).map(|found| found.map(Arc::new)) else { return };
    let Some(tokenizer) = tokenizer else {
        return findings.line("tokenizer", "none: prompts are token ids only");
    };
    let sample = "Hello, world!";
    let ids = tokenizer.encode(sample, SpecialTokens::AsText).map_err(Exit::refused);
    if let Some(ids) = findings.take(ids) {
        findings.line(
            "tokenizer",
            format!("{} tokens; {sample:?} is {ids:?}", grouped(tokenizer.vocab_size() as u64)),
        );
    }
    if let Some(note) = startup::vocabulary_note(inspected, &tokenizer) {
        findings.line("note", note);
    }
    let template = startup::template(&config.common, inspected, Some(&tokenizer)).map_err(Exit::refused);
    match findings.take(template) {
        Some(Some(template)) => {
            let messages = serde_json::json!([{ "role": "user", "content": sample }]);
            let chat = ChatInput { messages: &messages, add_generation_prompt: true, kwargs: None };
            let rendered = super::sandbox::render_once(&template, &chat);
            if let Some(rendered) = findings.take(rendered) {
                findings.line(
                    "template",
                    format!("{} bytes; renders {} bytes", template.source().len(), rendered.text().len()),
                );
            }
        }
        Some(None) => findings.line("template", "none: /v1/chat/completions is refused"),
        None => {}
    }
}

fn ports(config: &ServeConfig, findings: &mut Findings) {
    let wanted = [("port", Some(config.port)), ("metrics-port", config.metrics_port)];
    for (flag, port) in wanted {
        let Some(port) = port else { continue };
        if findings.take(serve::bind(config, flag, port)).is_some() {
            findings.line(flag, format!("{port} on {} is free", config.host));
        }
    }
}
