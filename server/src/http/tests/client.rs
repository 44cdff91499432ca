//! A client that shows everything: one connection, raw bytes out, status, headers and body in.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Nothing in these tests takes longer; a hang is a failure.
const PATIENCE: Duration = Duration::from_secs(10);

/// An answer, read to its end.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Lower-case lines.
    pub(super) head: String,
    pub(super) body: String,
}

impl Answer {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The error's `(status, type, param)`, from the body.
    pub(super) fn error(&self) -> (u16, String, Value) {
        let error = &self.json()["error"];
        assert_eq!(error["code"], self.status, "{self:?}");
        assert!(error["message"].is_string());
        (self.status, error["type"].as_str().unwrap().to_owned(), error["param"].clone())
    }

    /// The data of a stream's events; checks the framing and that `[DONE]` came last.
    pub(super) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{self:?}");
        assert!(self.header("content-type").unwrap().starts_with("text/event-stream"));
        let blocks = self.body.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("{self:?}"));
        blocks
            .split_terminator("\n\n")
            .filter(|block| !block.starts_with(':'))
            .map(|block| serde_json::from_str(block.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }
}

/// An open connection.
pub(super) struct Connection {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Connection {
    pub(super) async fn open(address: SocketAddr) -> Self {
        Self { stream: TcpStream::connect(address).await.unwrap(), unread: Vec::new() }
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Reads until `text` has come; false when the connection ends before.
    pub(super) async fn read_until(&mut self, text: &str) -> bool {
        loop {
            if String::from_utf8_lossy(&self.unread).contains(text) {
                return true;
            }
            if !self.read_more().await {
                return false;
            }
        }
    }

    /// One whole answer; the connection can be used again.
    pub(super) async fn answer(&mut self) -> Answer {
        assert!(self.read_until("\r\n\r\n").await, "no answer: {:?}", String::from_utf8_lossy(&self.unread));
        let end = find(&self.unread, b"\r\n\r\n").unwrap() + 4;
        let head = String::from_utf8(self.unread.drain(..end).collect()).unwrap().to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut answer = Answer { status, head, body: String::new() };
        let body = if let Some(length) = answer.header("content-length") {
            let length = length.parse().unwrap();
            self.take(length).await
        } else {
            assert_eq!(answer.header("transfer-encoding"), Some("chunked"), "{answer:?}");
            self.take_chunks().await
        };
        answer.body = String::from_utf8(body).unwrap();
        answer
    }

    /// Whether the server closes without another byte.
    pub(super) async fn is_closed(&mut self) -> bool {
        self.unread.is_empty() && !self.read_more().await
    }

    async fn take_chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let line = loop {
                if let Some(end) = find(&self.unread, b"\r\n") {
                    break self.unread.drain(..end + 2).collect::<Vec<_>>();
                }
                assert!(self.read_more().await, "cut off after {:?}", String::from_utf8_lossy(&body));
            };
            let length = usize::from_str_radix(std::str::from_utf8(&line).unwrap().trim(), 16).unwrap();
            let chunk = self.take(length + 2).await;
            if length == 0 {
                return body;
            }
            body.extend_from_slice(&chunk[..length]);
        }
    }

    async fn take(&mut self, length: usize) -> Vec<u8> {
        while self.unread.len() < length {
            assert!(self.read_more().await, "cut off");
        }
        self.unread.drain(..length).collect()
    }

    /// False at the end.
    async fn read_more(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        let read = timeout(PATIENCE, self.stream.read(&mut buffer)).await.expect("the server is silent");
        // A reset is an end too.
        let length = read.unwrap_or(0);
        self.unread.extend_from_slice(&buffer[..length]);
        length > 0
    }
}

/// The bytes of a request with a JSON body.
pub(super) fn post(path: &str, body: &str, headers: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: toy\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    )
    .into_bytes()
}

pub(super) fn get(path: &str, headers: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: toy\r\n{headers}\r\n").into_bytes()
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
