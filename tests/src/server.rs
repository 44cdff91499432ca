//! A real `tandem serve` process on ports of its own, and plain HTTP to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Generous: a loaded machine runs several tests and an unoptimised build.
const START_DEADLINE: Duration = Duration::from_secs(60);
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pub port: u16,
    pub metrics_port: u16,
    output: Arc<Mutex<String>>,
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn is_event_stream(&self) -> bool {
        self.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream"))
    }

    /// `data:` lines of an event stream, in order.
    pub fn events(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }

    /// The events but the last, which must be `[DONE]`, as JSON.
    pub fn chunks(&self) -> Vec<Value> {
        let events = self.events();
        let (last, chunks) = events.split_last().expect("a stream has events");
        assert_eq!(*last, "[DONE]", "{}", self.body);
        chunks.iter().map(|chunk| serde_json::from_str(chunk).expect("chunks are JSON")).collect()
    }
}

/// The binary under test, built beside the tests.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("tests know their own path");
    let folder = test.parent().and_then(|deps| deps.parent()).expect("tests lie in target/<profile>/deps");
    let binary = folder.join("tandem");
    assert!(binary.is_file(), "{} is not there: run `cargo build --package tandem-server`", binary.display());
    binary
}

/// A port that was free a moment ago. It lies below those that the system gives to outgoing connections, so that none of the
/// many of a test can take it before the process does that it is meant for.
pub fn free_port() -> u16 {
    const FIRST: u32 = 20_000;
    const NUM: u32 = 12_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        // Processes of tests begin at places of their own.
        let offset = std::process::id().wrapping_mul(97).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = (FIRST + offset % NUM) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Server {
    /// Starts `tandem serve` with `args` and waits until it is ready.
    pub fn start(args: &[&str]) -> Self {
        let server = Self::spawn(args);
        server.wait_until_ready();
        server
    }

    /// Starts `tandem serve` without waiting.
    pub fn spawn(args: &[&str]) -> Self {
        Self::spawn_with(args, &[])
    }

    /// The same with variables in its environment.
    pub fn spawn_with(args: &[&str], environment: &[(String, String)]) -> Self {
        let (port, metrics_port) = (free_port(), free_port());
        let mut child = Command::new(binary())
            .arg("serve")
            .args(args)
            .args([
                "--host",
                "127.0.0.1",
                "--port",
                &port.to_string(),
                "--metrics-port",
                &metrics_port.to_string(),
            ])
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let output = Arc::new(Mutex::new(String::new()));
        collect_lines(child.stdout.take().expect("piped"), output.clone());
        collect_lines(child.stderr.take().expect("piped"), output.clone());
        Self { child, port, metrics_port, output }
    }

    /// Waits until `/readyz` says 200.
    pub fn wait_until_ready(&self) {
        assert!(self.becomes_ready(), "not ready after {START_DEADLINE:?}; it said:\n{}", self.output());
    }

    /// Whether `/readyz` says 200 in time.
    pub fn becomes_ready(&self) -> bool {
        let start = Instant::now();
        while start.elapsed() < START_DEADLINE {
            if try_exchange(self.port, &get_request("/readyz")).is_ok_and(|response| response.status == 200) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// What the process printed so far.
    pub fn output(&self) -> String {
        self.output.lock().expect("no reader panicked").clone()
    }

    pub fn get(&self, path: &str) -> Response {
        exchange(self.port, &get_request(path))
    }

    /// The body of an answer, empty as long as nothing listens.
    pub fn peek(&self, path: &str) -> String {
        try_exchange(self.port, &get_request(path)).map(|response| response.body).unwrap_or_default()
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        exchange(self.port, &post_request(path, &body.to_string()))
    }

    /// Sends a request and returns the open connection, to be read or dropped.
    pub fn open(&self, path: &str, body: &Value) -> TcpStream {
        send(self.port, &post_request(path, &body.to_string())).expect("the server accepts")
    }

    pub fn get_metrics(&self) -> Response {
        exchange(self.metrics_port, &get_request("/metrics"))
    }

    /// The value of an unlabelled-but-for-the-model series, summed over its other labels.
    pub fn metric(&self, name: &str) -> f64 {
        let body = self.get("/metrics").body;
        let values = body.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let rest = if rest.starts_with('{') { rest.split_once('}')?.1 } else { rest };
            rest.strip_prefix(' ')?.trim().parse::<f64>().ok()
        });
        let values: Vec<f64> = values.collect();
        assert!(!values.is_empty(), "no series {name} in\n{body}");
        values.iter().sum()
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name, as `kill` does.
    pub fn signal(&self, name: &str) {
        let done = Command::new("kill")
            .args([&format!("-{name}"), &self.id().to_string()])
            .status()
            .expect("kill runs");
        assert!(done.success());
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the process can be waited for") {
                return status;
            }
            assert!(
                start.elapsed() < deadline,
                "still running after {deadline:?}; it said:\n{}",
                self.output()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// `true` while the process runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the process can be waited for").is_none()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect_lines(source: impl Read + Send + 'static, output: Arc<Mutex<String>>) {
    std::thread::spawn(move || {
        for line in BufReader::new(source).lines().map_while(Result::ok) {
            let mut output = output.lock().expect("no reader panicked");
            output.push_str(&line);
            output.push('\n');
        }
    });
}

/// A GET request as bytes on the wire.
pub fn get_request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
}

/// A POST request with a JSON body as bytes on the wire.
pub fn post_request(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Sends raw bytes and reads the answer to its end.
pub fn exchange(port: u16, request: &str) -> Response {
    try_exchange(port, request).unwrap_or_else(|error| panic!("{error}"))
}

fn send(port: u16, request: &str) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    Ok(stream)
}

fn try_exchange(port: u16, request: &str) -> std::io::Result<Response> {
    read_response(send(port, request)?)
}

/// Reads an answer whose connection the server closes.
pub fn read_response(stream: TcpStream) -> std::io::Result<Response> {
    let malformed = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned());
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status =
        line.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(|| malformed("no status line"))?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((key, value)) => headers.push((key.to_owned(), value.trim().to_owned())),
            None => break,
        }
    }
    let chunked = headers.iter().any(|(k, v)| k.eq_ignore_ascii_case("transfer-encoding") && v == "chunked");
    let body = if chunked { read_chunks(&mut reader)? } else { read_rest(&mut reader)? };
    let body = String::from_utf8(body).map_err(|_| malformed("the body is not UTF-8"))?;
    Ok(Response { status, headers, body })
}

fn read_rest(reader: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    reader.read_to_end(&mut body)?;
    Ok(body)
}

fn read_chunks(reader: &mut impl BufRead) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let size = usize::from_str_radix(line.trim(), 16)
            .map_err(|_| std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the stream was cut"))?;
        let mut chunk = vec![0; size + 2];
        reader.read_exact(&mut chunk)?;
        if size == 0 {
            return Ok(body);
        }
        body.extend_from_slice(&chunk[..size]);
    }
}
