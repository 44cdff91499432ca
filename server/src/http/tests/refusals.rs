//! What bad, unknown and unlucky requests get.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tandem_engine::EngineConfig;

use super::toy::engine_config;
use super::{Server, Setup, get, post};
use crate::http::state::Timeouts;

#[tokio::test]
async fn refusals_have_their_status_type_and_param() {
    let server = Server::plain().await;
    let bad = "BadRequestError";
    let too_long = "x".repeat(20_000);
    let cases = [
        ("/v1/completions", json!({"prompt": "a", "model": "other"}), 404, "NotFoundError", json!("model")),
        ("/v1/completions", json!({"prompt": "a", "max_tokens": 256}), 400, bad, json!("max_tokens")),
        ("/v1/completions", json!({"prompt": too_long}), 400, bad, json!("prompt")),
        ("/v1/completions", json!({"prompt": vec![97; 256]}), 400, bad, json!("prompt")),
        ("/v1/completions", json!({"prompt": ""}), 400, bad, json!("prompt")),
        ("/v1/completions", json!([1]), 400, bad, Value::Null),
        (
            "/v1/completions",
            json!({"prompt": [97], "stream": true, "temperature": -1}),
            400,
            bad,
            json!("temperature"),
        ),
        ("/v1/chat/completions", json!({"messages": []}), 400, bad, json!("messages")),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": too_long}]}),
            400,
            bad,
            json!("messages"),
        ),
        ("/v1/nothing", json!({}), 404, "NotFoundError", Value::Null),
        ("/v1/models", json!({}), 405, "MethodNotAllowedError", Value::Null),
        ("/health", json!({}), 405, "MethodNotAllowedError", Value::Null),
    ];
    for (path, body, status, kind, param) in cases {
        assert_eq!(server.post(path, body.clone()).await.error(), (status, kind.into(), param), "{path}");
    }
    assert_eq!(server.get("/v1/completions").await.error().0, 405);
    assert_eq!(server.get("/").await.error().0, 404);
    assert_eq!(server.get("/v1/models/other").await.error(), (404, "NotFoundError".into(), json!("model")));
    let plain_text =
        "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}";
    assert_eq!(server.request(plain_text.into()).await.error().0, 415);
    let nan = post("/v1/completions", r#"{"prompt":[97],"top_p":NaN}"#, "");
    assert_eq!(server.request(nan).await.error(), (400, bad.into(), json!("top_p")));
    let many_headers: String = (0..70).map(|idx| format!("x-{idx}: 1\r\n")).collect();
    assert_eq!(server.request(get("/version", &many_headers)).await.error().0, 431);
    let long_header = format!("x-long: {}\r\n", "x".repeat(33 * 1024));
    assert_eq!(server.request(get("/version", &long_header)).await.error().0, 431);
    let long_body = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(2 << 20));
    assert_eq!(server.request(post("/v1/completions", &long_body, "")).await.error().0, 413);
    assert_eq!(server.snapshot().admitted, 0, "nothing of this reached the engine");
}

#[tokio::test]
async fn an_over_long_body_is_refused_before_it_has_come() {
    let timeouts = Timeouts { header: Duration::from_millis(50), ..Timeouts::default() };
    let server = Server::start(Setup { timeouts, ..Setup::default() }).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n";
    let length = 4 << 20;
    let mut connection = server.connect().await;
    connection.send(format!("{head}content-length: {length}\r\n\r\nx").as_bytes()).await;
    let started = Instant::now();
    let answer = connection.answer().await;
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!((answer.error().0, answer.header("connection")), (413, Some("close")));
    // The rest is taken, in peace, before the connection ends.
    tokio::time::sleep(Duration::from_millis(200)).await;
    connection.send(&vec![b'x'; length - 1]).await;
    assert!(connection.is_closed().await);

    // Of a length that nobody announced: it is known to be too long when it is.
    let mut connection = server.connect().await;
    let chunk = [format!("{:x}\r\n", 3 << 20).into_bytes(), vec![b'x'; 3 << 20], b"\r\n".to_vec()].concat();
    connection.send(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes()).await;
    connection.send(&chunk).await;
    assert_eq!(connection.answer().await.error().0, 413);
}

#[tokio::test]
async fn keys_protect_the_model_and_nothing_else() {
    let server = Server::start(Setup { keys: &["first-key", "second"], ..Setup::default() }).await;
    let body = r#"{"prompt":[97],"max_tokens":1}"#;
    for header in [
        "",
        "authorization: Bearer wrong\r\n",
        "authorization: second\r\n",
        "authorization: Basic second\r\n",
    ] {
        let answer = server.request(post("/v1/completions", body, header)).await;
        assert_eq!(answer.error(), (401, "AuthenticationError".into(), Value::Null), "{header}");
        assert!(answer.header("www-authenticate").is_some());
    }
    for header in ["authorization: Bearer first-key\r\n", "Authorization: bearer second\r\n"] {
        assert_eq!(server.request(post("/v1/completions", body, header)).await.status, 200, "{header}");
    }
    for path in ["/v1/models", "/v1/models/toy"] {
        assert_eq!(server.get(path).await.status, 401, "{path}");
    }
    for path in ["/tokenize", "/detokenize", "/v1/chat/completions"] {
        assert_eq!(server.post(path, json!({})).await.status, 401, "{path}");
    }
    for path in ["/health", "/livez", "/readyz", "/startupz", "/ping", "/metrics", "/version"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn tenants_do_not_share_cached_prefixes() {
    let server = Server::start(Setup { keys: &["one", "two"], ..Setup::default() }).await;
    let cached = async |key: &str, salt: &str| {
        let prompt = vec![98; 64];
        let body = json!({"prompt": prompt, "max_tokens": 1, "cache_salt": salt}).to_string();
        let header = format!("authorization: Bearer {key}\r\n");
        let body = server.request(post("/v1/completions", &body, &header)).await.json();
        body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached("one", "s").await, 0);
    assert_eq!(cached("one", "s").await, 48, "a hit covers whole blocks of all but the last token");
    assert_eq!(cached("one", "t").await, 0);
    assert_eq!(cached("two", "s").await, 0);
}

#[tokio::test]
async fn overload_is_a_503_and_queued_clients_may_leave() {
    let engine = EngineConfig { max_num_seqs: 1, max_queued_requests: 1, ..engine_config() };
    let server = Server::start(Setup { engine, ..Setup::default() }).await;
    server.slow_down(20);
    let body = json!({"prompt": [97], "max_tokens": 200, "ignore_eos": true, "stream": true});
    let bytes = post("/v1/completions", &body.to_string(), "");
    let mut running = server.connect().await;
    running.send(&bytes).await;
    assert!(running.read_until("data: ").await);
    let mut queued = server.connect().await;
    queued.send(&bytes).await;
    server.until("queued", |snapshot| snapshot.waiting == 1).await;

    let refused = server.complete(body.clone()).await;
    assert_eq!(refused.error(), (503, "ServiceUnavailableError".into(), Value::Null));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(server.get("/readyz").await.status, 200, "overload is no reason to leave the pool");
    drop(queued);
    server.until("left the queue", |s| s.cancelled == 1 && s.waiting == 0 && s.running == 1).await;
    drop(running);
    server.until("all gone", |s| s.cancelled == 2 && s.in_flight == 0).await;
}

#[tokio::test]
async fn a_list_longer_than_the_queue_is_no_overload() {
    let engine = EngineConfig { max_queued_requests: 2, ..engine_config() };
    let server = Server::start(Setup { engine, ..Setup::default() }).await;
    let list = |length: usize| json!({"prompt": vec!["a"; length], "max_tokens": 1});
    assert_eq!(server.complete(list(3)).await.error(), (400, "BadRequestError".into(), json!("prompt")));
    assert_eq!(server.complete(list(2)).await.status, 200);
}

#[tokio::test]
async fn failures_before_the_first_byte_have_their_status_and_later_ones_an_event() {
    let server = Server::plain().await;
    server.knobs.fail_rows.store(true, Ordering::Relaxed);
    for stream in [true, false] {
        let answer = server.complete(json!({"prompt": [97], "stream": stream})).await;
        assert_eq!(answer.error().0, 500);
        let id = answer.header("x-request-id").unwrap().to_owned();
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(&id));
    }
    server.knobs.fail_rows.store(false, Ordering::Relaxed);
    server.slow_down(20);
    let mut connection = server.connect().await;
    let body = json!({"prompt": [97], "max_tokens": 200, "ignore_eos": true, "stream": true}).to_string();
    connection.send(&post("/v1/completions", &body, "")).await;
    assert!(connection.read_until("data: ").await);
    server.knobs.fail_rows.store(true, Ordering::Relaxed);
    let answer = connection.answer().await;
    let events = answer.events();
    let error = &events.last().unwrap()["error"];
    assert_eq!((&error["code"], &error["retryable"]), (&json!(500), &json!(false)));
    assert!(events[0]["choices"].is_array());
}

#[tokio::test]
async fn a_refusal_that_needs_no_body_is_read_by_a_client_that_sends_a_long_one() {
    let server = Server::start(Setup { keys: &["key"], ..Setup::default() }).await;
    let body = "x".repeat(1 << 20);
    let refused = [
        (post("/v1/completions", &body, ""), 401),
        (post("/v1/completions", &body, "authorization: Bearer key\r\ncontent-encoding: gzip\r\n"), 415),
        (post("/nowhere", &body, ""), 404),
        (post("/v1/models", &body, "authorization: Bearer key\r\n"), 405),
    ];
    for (request, status) in refused {
        let mut connection = server.connect().await;
        connection.send(&request).await;
        assert_eq!(connection.answer().await.error().0, status);
        // All of it was read: the connection serves on.
        connection.send(&get("/version", "")).await;
        assert_eq!(connection.answer().await.status, 200, "after {status}");
    }
}

#[tokio::test]
async fn pages_of_allowed_origins_may_call() {
    let preflight = |origin: &str| {
        let asks = "access-control-request-method: POST\r\naccess-control-request-headers: authorization\r\n";
        format!("OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: t\r\norigin: {origin}\r\n{asks}\r\n")
            .into_bytes()
    };
    const ALLOWED: &str = "access-control-allow-origin";
    for (flags, origin, allowed) in [
        (&[][..], "https://a.example", Some("*")),
        (
            &["--allowed-origins", "https://a.example,https://b.example"][..],
            "https://a.example",
            Some("https://a.example"),
        ),
        (&["--allowed-origins", "https://b.example"][..], "https://a.example", None),
        (&["--allowed-origins", "none"][..], "https://a.example", None),
    ] {
        // A browser asks without the key.
        let server = Server::start(Setup { keys: &["key"], flags, ..Setup::default() }).await;
        let asked = server.request(preflight(origin)).await;
        assert_eq!((asked.status, asked.header(ALLOWED)), (200, allowed), "{flags:?}");
        // By name: a star does not speak of this one.
        assert_eq!(asked.header("access-control-allow-headers"), Some("authorization"));
        let headers = format!("origin: {origin}\r\n");
        // A refusal too is for the page to read.
        let refused = server.request(post("/v1/completions", "{}", &headers)).await;
        assert_eq!((refused.status, refused.header(ALLOWED)), (401, allowed), "{flags:?}");
    }
}
