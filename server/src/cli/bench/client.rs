//! A client of OpenAI's API over HTTP/1.1, with one connection and one deadline for each request.

use std::future::Future;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::stream::{Answer, Completion, message};
use crate::config::ServerTarget;

/// What is read of an answer that is no stream.
const MAX_BODY_BYTES: usize = 4 << 20;

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum Failure {
    /// Another status than 200.
    #[error("status {status}: {message}")]
    Status {
        /// The status.
        status: u16,
        /// What the server said with it.
        message: String,
    },
    /// No connection, or one that broke.
    #[error("connection: {0}")]
    Connection(String),
    /// Not complete at the deadline.
    #[error("not complete after {} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// Cut, or fewer tokens than asked for.
    #[error("early end: {0}")]
    EarlyEnd(String),
    /// An error in the stream.
    #[error("the server reported: {0}")]
    Reported(String),
    /// No answer of this API.
    #[error("malformed answer: {0}")]
    Malformed(String),
}

impl Failure {
    /// What failures are counted by.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::Status { status, .. } => format!("status_{status}"),
            Self::Connection(_) => "connection".to_owned(),
            Self::Timeout(_) => "timeout".to_owned(),
            Self::EarlyEnd(_) => "early_end".to_owned(),
            Self::Reported(_) => "reported".to_owned(),
            Self::Malformed(_) => "malformed".to_owned(),
        }
    }

    fn connection(error: impl std::fmt::Display) -> Self {
        Self::Connection(error.to_string())
    }
}

/// Asks one server.
#[derive(Debug)]
pub(super) struct Client {
    target: ServerTarget,
}

impl Client {
    pub(super) fn new(target: ServerTarget) -> Self {
        Self { target }
    }

    pub(super) fn target(&self) -> &ServerTarget {
        &self.target
    }

    /// The name of the first model that the server has.
    ///
    /// # Errors
    /// What kept it from saying so.
    pub(super) async fn first_model(&self) -> Result<String, Failure> {
        let name = async {
            let (_connection, response) = self.send(Method::GET, "/v1/models", Bytes::new()).await?;
            let (status, body) = read_whole(response).await?;
            if status != 200 {
                return Err(refusal((status, body)));
            }
            let list: Value = serde_json::from_slice(&body)
                .map_err(|e| Failure::Malformed(format!("the list of models is no JSON: {e}")))?;
            let name = list["data"][0]["id"].as_str();
            name.map(str::to_owned)
                .ok_or_else(|| Failure::Malformed("the list of models is empty".to_owned()))
        };
        self.within_deadline(name).await
    }

    /// Sends a request for `output_tokens` tokens as a stream and reads the answer; times count from before the
    /// connection is opened.
    ///
    /// # Errors
    /// Whatever kept the answer from being complete.
    pub(super) async fn complete(&self, body: Bytes, output_tokens: usize) -> Result<Completion, Failure> {
        let started = Instant::now();
        let completion = async {
            let (_connection, response) = self.send(Method::POST, self.target.endpoint.path(), body).await?;
            if response.status() != 200 {
                return Err(refusal(read_whole(response).await?));
            }
            let mut answer = Answer::new(self.target.endpoint);
            let mut body = response.into_body();
            while !answer.is_done() {
                match body.frame().await {
                    Some(Ok(frame)) => {
                        if let Some(data) = frame.data_ref() {
                            answer.push(data, started.elapsed())?;
                        }
                    }
                    Some(Err(e)) => return Err(Failure::EarlyEnd(format!("the stream was cut: {e}"))),
                    None => break,
                }
            }
            answer.finish(output_tokens)
        };
        self.within_deadline(completion).await
    }

    async fn within_deadline<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let timeout = self.target.timeout;
        tokio::time::timeout(timeout, work).await.unwrap_or(Err(Failure::Timeout(timeout)))
    }

    /// Opens a connection and sends a request; the answer can be read while the connection is held.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Connection, Response<Incoming>), Failure> {
        let url = &self.target.url;
        let stream = TcpStream::connect((url.host.as_str(), url.port)).await.map_err(Failure::connection)?;
        stream.set_nodelay(true).map_err(Failure::connection)?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(Failure::connection)?;
        // Its errors reach the request too.
        let connection = Connection(tokio::spawn(async { drop(connection.await) }));
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", url.prefix))
            .header(HOST, &url.authority)
            .header(ACCEPT, "application/json, text/event-stream")
            .header(CONTENT_TYPE, "application/json")
            .header(CONNECTION, "close");
        if let Some(key) = &self.target.api_key {
            request = request.header(AUTHORIZATION, format!("Bearer {}", key.reveal()));
        }
        let request = request.body(Full::new(body)).map_err(Failure::connection)?;
        let response = sender.send_request(request).await.map_err(Failure::connection)?;
        Ok((connection, response))
    }
}

/// Drives a connection until it is dropped.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn read_whole(response: Response<Incoming>) -> Result<(u16, Vec<u8>), Failure> {
    let status = response.status().as_u16();
    let (mut body, mut bytes) = (response.into_body(), Vec::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(Failure::connection)?;
        bytes.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        if bytes.len() > MAX_BODY_BYTES {
            return Err(Failure::Malformed("the answer is too long".to_owned()));
        }
    }
    Ok((status, bytes))
}

fn refusal((status, body): (u16, Vec<u8>)) -> Failure {
    let message = match serde_json::from_slice::<Value>(&body) {
        Ok(body) if !body["error"].is_null() => message(&body["error"]),
        _ => String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned(),
    };
    Failure::Status { status, message }
}
