//! What `serve` says on standard output when it is ready.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::numbers::{bytes, grouped, parameters};
use super::startup::Running;
use crate::config::ServeConfig;

/// The banner. `api` is where the server really listens.
pub(super) fn text(
    config: &ServeConfig,
    running: &Running,
    api: SocketAddr,
    metrics: Option<SocketAddr>,
    ready_in: Duration,
) -> String {
    let Running { info, plan, backend, .. } = running;
    let requests = plan.kv_tokens / plan.max_model_len.max(1);
    let metrics = metrics.map_or(String::new(), |address| format!("   metrics {}/metrics", url(address)));
    format!(
        "tandem {version} ready in {seconds:.1} s\n\
         \x20 model     {name}: {architecture}, {parameters}, {weights} ({size})\n\
         \x20 backend   {backend} {isa}, {threads}, {activations} activations, {kv} KV\n\
         \x20 KV cache  {tokens} tokens ({kv_size}): {requests} requests of {length} tokens\n\
         \x20 API       {api}/v1{metrics}\n\
         \n\
         {curl}\n\n",
        version = env!("CARGO_PKG_VERSION"),
        seconds = ready_in.as_secs_f64(),
        name = config.served_model_names[0],
        architecture = info.architecture,
        parameters = parameters(info.num_parameters),
        weights = info.weights,
        size = bytes(info.file_bytes),
        backend = backend.backend,
        isa = backend.isa,
        threads = match backend.ranks {
            1 => format!("{} threads", backend.threads),
            ranks => format!("{ranks} ranks with {} threads each", backend.threads),
        },
        activations = backend.activations.name(),
        kv = plan.kv_layout.name(),
        tokens = grouped(plan.kv_tokens as u64),
        kv_size = bytes(plan.kv_bytes),
        length = grouped(plan.max_model_len as u64),
        api = url(api),
        curl = curl(config, running, api),
    )
}

/// A line to paste that gets an answer.
fn curl(config: &ServeConfig, running: &Running, api: SocketAddr) -> String {
    let model = &config.served_model_names[0];
    let (route, body) = match (&running.template, &running.tokenizer) {
        (Some(_), _) => (
            "chat/completions",
            serde_json::json!({ "model": model, "messages": [{ "role": "user", "content": "Why is the sky blue?" }] }),
        ),
        (None, Some(_)) => {
            ("completions", serde_json::json!({ "model": model, "prompt": "The sky is", "max_tokens": 32 }))
        }
        (None, None) => {
            ("completions", serde_json::json!({ "model": model, "prompt": [1, 2, 3], "max_tokens": 32 }))
        }
    };
    let key = if config.api_keys.is_empty() { "" } else { " -H \"Authorization: Bearer $TANDEM_API_KEY\"" };
    // A quote inside the single quotes of a shell.
    let body = body.to_string().replace('\'', r"'\''");
    format!("curl {}/v1/{route} -H 'Content-Type: application/json'{key} -d '{body}'", url(api))
}

/// An address that this machine's user can open: the unspecified one is reached at loopback.
fn url(address: SocketAddr) -> String {
    let host = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
        IpAddr::V6(ip) if ip.is_unspecified() => "[::1]".to_owned(),
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    format!("http://{host}:{}", address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_can_be_opened() {
        let url = |text: &str| url(text.parse().unwrap());
        assert_eq!(url("0.0.0.0:8000"), "http://127.0.0.1:8000");
        assert_eq!(url("[::]:80"), "http://[::1]:80");
        assert_eq!(url("10.1.2.3:1"), "http://10.1.2.3:1");
    }
}
