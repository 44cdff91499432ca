//! Passing requests on to the leader, in pods of a group that do not lead: for pools that pick any pod.
//!
//! One hop, on a connection of its own, so that a client that leaves is gone for the leader too: the answer's body holds the
//! connection, and takes it down when it is dropped. A request that was passed on already goes no further.

use std::future::Future;
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
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};

use super::context::{REQUEST_ID, RequestContext};
use super::errors::ApiError;
use super::limits::KEEP_ALIVE_INTERVAL;
use super::state::AppState;

/// Marks a request that was passed on once.
const FORWARDED: HeaderName = HeaderName::from_static("x-tandem-forwarded");
/// How long the leader may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(2);
/// A leader whose machine is gone says so no more: its silence on the connection has to, in about half a minute.
const FIRST_PROBE: Duration = Duration::from_secs(10);
const NEXT_PROBE: Duration = Duration::from_secs(5);
const PROBES: u32 = 4;
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);
/// A leader that lives sends something on every stream more often than this.
const SILENCE: Duration = KEEP_ALIVE_INTERVAL.saturating_mul(4);
/// A leader that this pod's ranks have not heard for this long gives no answer any more, however its machine is. They notice
/// its silence in seconds; but a rank that is started again hears nobody until it has looked at the model.
const UNHEARD: Duration = Duration::from_secs(60);
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
    let passed = tokio::select! {
        passed = pass(request, &report.leader_http, SILENCE) => passed,
        () = unheard(|| group.hears_leader(), UNHEARD) => Err("the group does not hear it".to_owned()),
    };
    passed.map_err(|error| {
        tracing::warn!(leader = report.leader_http, error, "a request could not be passed on");
        ApiError::NotReady("the leader of its group does not answer")
    })
}

/// Waits until the leader was not heard for `limit`. An answer that is no stream may take any time, so that nothing else bounds
/// the wait for it.
async fn unheard(hears_leader: impl Fn() -> bool, limit: Duration) {
    let mut heard = Instant::now();
    while heard.elapsed() < limit {
        sleep(limit / 10).await;
        if hears_leader() {
            heard = Instant::now();
        }
    }
}

/// `silence`: how long nothing may come of an event stream.
async fn pass(request: Request, leader: &str, silence: Duration) -> Result<Response, String> {
    let connected = timeout(CONNECT, TcpStream::connect(leader)).await;
    let stream =
        connected.map_err(|_| "it does not accept".to_owned())?.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).and_then(|()| watch(&stream)).map_err(|error| error.to_string())?;
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
    let is_stream = parts
        .headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|of| of.as_bytes().starts_with(b"text/event-stream"));
    let silence = is_stream.then(|| (silence, Box::pin(sleep_until(Instant::now() + silence))));
    Ok(Response::from_parts(parts, Body::new(Passed { incoming, silence, _connection: guard })))
}

/// Has the system find out when the other machine is gone.
fn watch(stream: &TcpStream) -> std::io::Result<()> {
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(FIRST_PROBE).with_interval(NEXT_PROBE).with_retries(PROBES);
    socket.set_tcp_keepalive(&probes)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
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
    /// How long nothing may come, and the end of the present wait.
    silence: Option<(Duration, Pin<Box<Sleep>>)>,
    _connection: Connection,
}

impl HttpBody for Passed {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.incoming).poll_frame(context) {
            if let Some((silence, end)) = &mut this.silence {
                end.as_mut().reset(Instant::now() + *silence);
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        match &mut this.silence {
            Some((_, end)) => {
                end.as_mut().poll(context).map(|()| Some(Err("the leader of the group is silent".into())))
            }
            None => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_leader_that_falls_silent_in_a_stream_ends_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let leader = listener.local_addr().unwrap().to_string();
        let answering = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await.unwrap();
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).await.unwrap();
            for _ in 0..4 {
                stream.write_all(b"3\r\n:\n\n\r\n").await.unwrap();
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            // Open, and nothing more.
            tokio::time::sleep(Duration::from_secs(60)).await;
        });
        let request = Request::builder().uri("/v1/completions").body(Body::empty()).unwrap();
        let answer = pass(request, &leader, Duration::from_secs(1)).await.unwrap();
        let mut body = answer.into_body();
        let mut frames = 0;
        let error = loop {
            match timeout(Duration::from_secs(20), body.frame())
                .await
                .expect("it ends")
                .expect("with an error")
            {
                Ok(_) => frames += 1,
                Err(error) => break error.to_string(),
            }
        };
        answering.abort();
        assert_eq!(frames, 4, "a second passes between none of them");
        assert!(error.contains("silent"), "{error}");
    }

    #[tokio::test]
    async fn a_leader_that_is_not_heard_is_given_up() {
        let (start, limit) = (Instant::now(), Duration::from_secs(1));
        // For two limits every other look hears it, then none does.
        let looks = std::cell::Cell::new(0);
        let hears = || {
            looks.set(looks.get() + 1);
            looks.get() <= 20 && looks.get() % 2 == 0
        };
        unheard(hears, limit).await;
        assert!(looks.get() > 20, "{} looks", looks.get());
        assert!((3 * limit..30 * limit).contains(&start.elapsed()), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn a_machine_that_is_gone_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        watch(&stream).unwrap();
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        let all = socket.tcp_keepalive_time().unwrap() + PROBES * socket.tcp_keepalive_interval().unwrap();
        assert_eq!((all, socket.tcp_keepalive_retries().unwrap()), (UNACKNOWLEDGED, PROBES));
        #[cfg(target_os = "linux")]
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(UNACKNOWLEDGED));
    }
}
