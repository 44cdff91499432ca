//! Clients that leave, stall or wait; the phases of the process.

use std::time::{Duration, Instant};

use futures_util::FutureExt;
use serde_json::json;
use tandem_engine::EngineConfig;

use super::toy::{self, engine_config};
use super::{Server, Setup, Timeouts, get, post, streamed_text};
use crate::http::limits;
use crate::lifecycle::Phase;

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request() {
    let server = Server::plain().await;
    server.slow_down(20);
    for stream in [true, false] {
        let before = server.snapshot().cancelled;
        let mut connection = server.connect().await;
        let body =
            json!({"prompt": [97], "max_tokens": 200, "ignore_eos": true, "stream": stream}).to_string();
        connection.send(&post("/v1/completions", &body, "")).await;
        if stream {
            assert!(connection.read_until("data: ").await);
        } else {
            server.until("running", |snapshot| snapshot.running == 1).await;
        }
        assert_eq!(server.state.lifecycle.in_flight(), 1);
        drop(connection);
        server
            .until("cancelled", |s| s.cancelled == before + 1 && s.in_flight == 0 && s.used_blocks == 0)
            .await;
    }
    let start = Instant::now();
    while server.state.lifecycle.in_flight() > 0 {
        assert!(start.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_long_wait_is_bridged_by_comments() {
    let timeouts = Timeouts { keep_alive: Duration::from_millis(40), ..Timeouts::default() };
    let server = Server::start(Setup { timeouts, ..Setup::default() }).await;
    server.slow_down(150);
    let answer = server.complete(json!({"prompt": [97], "max_tokens": 2, "stream": true})).await;
    assert!(answer.body.starts_with(": keep-alive\n\n"), "{answer:?}");
    assert_eq!(streamed_text(&answer.events(), 0), "bc");
}

#[tokio::test]
async fn slow_clients_are_cut_off() {
    let timeouts = Timeouts {
        header: Duration::from_millis(200),
        body: Duration::from_millis(200),
        idle: Duration::from_millis(400),
        write_stall: Duration::from_millis(300),
        ..Timeouts::default()
    };
    let server = Server::start(Setup { timeouts, ..Setup::default() }).await;
    let mut slow_header = server.connect().await;
    slow_header.send(b"GET /version HT").await;
    assert_eq!(slow_header.answer().await.error().0, 408);
    assert!(slow_header.is_closed().await);

    let mut slow_body = server.connect().await;
    let bytes = post("/v1/completions", r#"{"prompt":[97]}"#, "");
    slow_body.send(&bytes[..bytes.len() - 3]).await;
    assert_eq!(slow_body.answer().await.error().0, 408);

    let mut idle = server.connect().await;
    idle.send(&get("/version", "")).await;
    assert_eq!(idle.answer().await.status, 200);
    idle.send(&get("/version", "")).await;
    assert_eq!(idle.answer().await.status, 200, "connections are kept");
    assert!(idle.is_closed().await);
}

#[tokio::test]
async fn a_reader_that_stops_is_cut_and_its_request_ends() {
    let timeouts = Timeouts { write_stall: Duration::from_millis(300), ..Timeouts::default() };
    let engine = EngineConfig { max_model_len: 100_000, num_blocks: 6300, ..engine_config() };
    let server = Server::start(Setup { timeouts, engine, ..Setup::default() }).await;
    let mut connection = server.connect().await;
    // Twenty alternatives per token are some megabytes in all, more than any buffer on the way holds.
    let body =
        json!({"prompt": [97], "max_tokens": 60_000, "ignore_eos": true, "stream": true, "logprobs": 20});
    connection.send(&post("/v1/completions", &body.to_string(), "")).await;
    server.until("cancelled", |snapshot| snapshot.cancelled == 1 && snapshot.in_flight == 0).await;
    assert!(server.snapshot().generation_tokens < 60_000);
}

#[tokio::test]
async fn long_work_is_done_elsewhere_and_probes_answer_meanwhile() {
    let server = Server::plain().await;
    let mut gates = Vec::new();
    for _ in 0..limits::MAX_LONG_WORK {
        let (gate, closed) = std::sync::mpsc::channel::<()>();
        // Polled once and dropped: the work goes on until the test drops the gate.
        let work = move || closed.recv().is_err();
        assert!(server.state.helpers.run(true, "r", work).now_or_never().is_none());
        gates.push(gate);
    }
    let prompts = vec!["x".repeat(200); limits::MAX_PROMPTS];
    let messages = vec![json!({"role": "user", "content": "x"}); limits::MAX_MESSAGES];
    let waiting = [
        // Each is short, together they are not.
        ("/v1/completions", json!({"prompt": prompts, "max_tokens": 1}).to_string(), 200),
        ("/v1/chat/completions", json!({"messages": messages}).to_string(), 400),
        ("/v1/completions", format!("{{\"prompt\": [{}", "1, ".repeat(20_000)), 400),
        ("/tokenize", json!({"prompt": "x".repeat(50_000)}).to_string(), 200),
        ("/detokenize", json!({"tokens": vec![97; 10_000]}).to_string(), 200),
    ];
    let mut connections = Vec::new();
    for (path, body, _) in &waiting {
        let mut connection = server.connect().await;
        connection.send(&post(path, body, "")).await;
        connections.push(connection);
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(server.get(path).await.status, 200);
    }
    assert_eq!(server.complete(json!({"prompt": "a", "max_tokens": 1})).await.status, 200);
    for connection in &mut connections {
        let early = tokio::time::timeout(Duration::from_millis(20), connection.answer()).await;
        assert!(early.is_err(), "{early:?}");
    }
    drop(gates);
    for (connection, (path, _, status)) in connections.iter_mut().zip(&waiting) {
        assert_eq!(connection.answer().await.status, *status, "{path}");
    }
}

#[tokio::test]
async fn beyond_the_limit_connections_get_probes_and_refusals() {
    let server = Server::start(Setup { max_connections: 2, ..Setup::default() }).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut connection = server.connect().await;
        connection.send(&get("/version", "")).await;
        assert_eq!(connection.answer().await.status, 200);
        held.push(connection);
    }
    assert_eq!(server.get("/readyz").await.status, 200);
    let mut refused = server.connect().await;
    let body = json!({"prompt": "x".repeat(100_000)}).to_string();
    refused.send(&post("/v1/completions", &body, "")).await;
    let answer = refused.answer().await;
    assert_eq!((answer.error().0, answer.header("retry-after")), (503, Some("1")));
    assert!(refused.is_closed().await, "a spare connection is for one request");

    held.pop();
    let start = Instant::now();
    while server.complete(json!({"prompt": [97], "max_tokens": 1})).await.status != 200 {
        assert!(start.elapsed() < Duration::from_secs(5), "its place was not given back");
    }
}

#[tokio::test]
async fn probes_follow_the_phases() {
    let server = Server::start(Setup { loaded: false, ..Setup::default() }).await;
    let status = async |path: &str| server.get(path).await.status;
    let all = async || [status("/startupz").await, status("/readyz").await, status("/livez").await];
    assert_eq!(all().await, [503, 503, 200]);
    assert!(!server.get("/readyz").await.json()["reasons"].as_array().unwrap().is_empty());
    let early = server.complete(json!({"prompt": [97]})).await;
    assert_eq!((early.error().0, early.header("retry-after")), (503, Some("5")));
    let page = server.get("/metrics").await;
    assert!(page.status == 200 && page.body.contains("llm_memory_rss_bytes"));

    server.state.install(toy::serving(engine_config(), true).0);
    server.state.lifecycle.set(Phase::Ready);
    assert_eq!(all().await, [200, 200, 200]);
    for path in ["/health", "/ping"] {
        assert_eq!(server.get(path).await.json(), json!({"status": "ready"}));
    }

    // While it drains it still answers, until the engine refuses.
    server.state.lifecycle.set(Phase::Draining);
    assert_eq!(all().await, [200, 503, 200]);
    assert_eq!(server.complete(json!({"prompt": [97]})).await.status, 200);
    server.state.serving().unwrap().engine.begin_drain();
    assert_eq!(server.complete(json!({"prompt": [97]})).await.error().0, 503);

    server.state.lifecycle.set_with_reason(Phase::Failed, "weights are gone");
    assert_eq!(all().await, [503, 503, 200]);
    assert_eq!(server.get("/readyz").await.json()["reasons"], json!(["weights are gone"]));
}

#[tokio::test]
async fn stopping_finishes_what_runs_and_closes_the_rest() {
    let server = Server::plain().await;
    server.slow_down(20);
    let mut idle = server.connect().await;
    idle.send(&get("/version", "")).await;
    idle.answer().await;
    let mut busy = server.connect().await;
    busy.send(&post("/v1/completions", r#"{"prompt":[97],"max_tokens":8,"stream":true}"#, "")).await;
    assert!(busy.read_until("data: ").await);

    server.stop.send(true).unwrap();
    assert!(idle.is_closed().await);
    assert_eq!(streamed_text(&busy.answer().await.events(), 0), "bcdefghi");
    assert!(busy.is_closed().await);
    tokio::time::timeout(Duration::from_secs(5), server.served).await.unwrap().unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(server.api).await.is_err());
}
