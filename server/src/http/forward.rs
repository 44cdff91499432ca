//! Passing requests on to the leader, in pods of a group that do not lead: for pools that pick any pod.
//!
//! One hop, on a connection of its own, so that a client that leaves is gone for the leader too: the answer's body holds the
//! connection, and takes it down when it is dropped. A request that was passed on already goes no further.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::context::{REQUEST_ID, RequestContext};
use super::errors::ApiError;
use super::state::AppState;

/// Marks a request that was passed on once.
const FORWARDED: HeaderName = HeaderName::from_static("x-tandem-forwarded");
/// How long the leader may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(2);
/// Headers of one connection, not of the request.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// Passes a request on if this pod does not lead, else lets it be answered here.
pub(super) async fn unless_leader(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let Some(group) = state.group.as_ref().filter(|group| group.leads.is_none()) else {
        return Ok(next.run(request).await);
    };
    if request.headers().contains_key(FORWARDED) {
        return Err(ApiError::NotReady(
            "this pod does not lead its group, and the request was passed on already",
        ));
    }
    let report = group.report();
    if report.leader_http.is_empty() {
        return Err(ApiError::NotReady("the leader of its group is not known yet"));
    }
    pass(request, &report.leader_http).await.map_err(|error| {
        tracing::warn!(leader = report.leader_http, error, "a request could not be passed on");
        ApiError::NotReady("the leader of its group does not answer")
    })
}

async fn pass(request: Request, leader: &str) -> Result<Response, String> {
    let connected = timeout(CONNECT, TcpStream::connect(leader)).await;
    let stream =
        connected.map_err(|_| "it does not accept".to_owned())?.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    let guard = Connection(tokio::spawn(async move {
        // The request or its answer tells of the failure.
        let _ = connection.await;
    }));
    let answer =
        sender.send_request(readdressed(request, leader)?).await.map_err(|error| error.to_string())?;
    let (mut parts, incoming) = answer.into_parts();
    HOP_BY_HOP.iter().for_each(|name| drop(parts.headers.remove(name)));
    Ok(Response::from_parts(parts, Body::new(Passed { incoming, _connection: guard })))
}

/// The same request, for the leader.
fn readdressed(request: Request, leader: &str) -> Result<hyper::Request<Body>, String> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    parts.uri = path.parse::<Uri>().map_err(|error| error.to_string())?;
    HOP_BY_HOP.iter().for_each(|name| drop(parts.headers.remove(name)));
    insert(&mut parts.headers, header::HOST, leader);
    insert(&mut parts.headers, FORWARDED, "1");
    if let Some(context) = parts.extensions.get::<RequestContext>() {
        insert(&mut parts.headers, REQUEST_ID, context.log.id());
    }
    Ok(hyper::Request::from_parts(parts, body))
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    // Ids and hosts were checked where they came from; one that is no header value is left out.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Ends the connection when it is dropped.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The leader's answer as it comes.
struct Passed {
    incoming: Incoming,
    _connection: Connection,
}

impl HttpBody for Passed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.incoming).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
