//! One log line per request, written when the last byte of its answer is gone or its client is.
//!
//! A [`RequestLog`] is shared by everything that works on the request and writes its line when the last of them lets
//! go. That makes the line true for clients that leave as well: whatever dropped the answer, a request whose body did
//! not reach its end is logged as 499. Probes and scrapes are logged at debug level only. Prompts never are.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// Status logged for a client that left before the end; it is never sent.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// What is known about a request when it is over.
#[derive(Debug)]
pub(super) struct RequestLog {
    id: String,
    method: String,
    /// The route's pattern, not the client's path.
    route: String,
    arrival: Instant,
    quiet: bool,
    prompt_tokens: AtomicU64,
    output_tokens: AtomicU64,
    status: AtomicU16,
    complete: AtomicBool,
}

impl RequestLog {
    pub(super) fn new(id: String, method: String, route: String, arrival: Instant, quiet: bool) -> Arc<Self> {
        Arc::new(Self {
            id,
            method,
            route,
            arrival,
            quiet,
            prompt_tokens: AtomicU64::new(0),
            output_tokens: AtomicU64::new(0),
            status: AtomicU16::new(0),
            complete: AtomicBool::new(false),
        })
    }

    /// The request's id, as the client sees it.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn add_prompt_tokens(&self, tokens: usize) {
        self.prompt_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    pub(super) fn add_output_tokens(&self, tokens: usize) {
        self.output_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// What was answered; an error inside a stream overwrites the 200 it began with.
    pub(super) fn set_status(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }

    fn outcome(&self) -> u16 {
        if self.complete.load(Ordering::Relaxed) {
            self.status.load(Ordering::Relaxed)
        } else {
            CLIENT_CLOSED_REQUEST
        }
    }
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        let status = self.outcome();
        let ms = self.arrival.elapsed().as_millis() as u64;
        let (prompt_tokens, output_tokens) = (*self.prompt_tokens.get_mut(), *self.output_tokens.get_mut());
        let Self { id, method, route, .. } = &*self;
        if self.quiet {
            tracing::debug!(request_id = id, method, route, status, ms, "request");
        } else {
            tracing::info!(
                request_id = id,
                method,
                route,
                status,
                ms,
                prompt_tokens,
                output_tokens,
                "request"
            );
        }
    }
}

/// A response body that tells its log when it reached its end, and lets go of `guard` then.
pub(super) struct ObservedBody<G> {
    inner: Body,
    log: Arc<RequestLog>,
    _guard: G,
}

impl<G> ObservedBody<G> {
    pub(super) fn new(inner: Body, log: Arc<RequestLog>, guard: G) -> Self {
        Self { inner, log, _guard: guard }
    }
}

impl<G: Unpin> HttpBody for ObservedBody<G> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        if matches!(polled, Poll::Ready(None)) {
            self.log.complete.store(true, Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<G> Drop for ObservedBody<G> {
    fn drop(&mut self) {
        // A body of known size is taken whole and never asked for its end.
        if self.inner.is_end_stream() {
            self.log.complete.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    fn log() -> Arc<RequestLog> {
        let log = RequestLog::new("id".into(), "GET".into(), "/".into(), Instant::now(), false);
        log.set_status(200);
        log
    }

    #[tokio::test]
    async fn a_body_read_to_its_end_is_complete() {
        let log = log();
        ObservedBody::new(Body::from("hello"), log.clone(), ()).collect().await.unwrap();
        assert_eq!(log.outcome(), 200);
    }

    #[tokio::test]
    async fn a_body_dropped_before_its_end_is_a_client_that_left() {
        let log = log();
        drop(ObservedBody::new(Body::from("hello"), log.clone(), ()));
        assert_eq!(log.outcome(), 499);
        let empty = self::log();
        drop(ObservedBody::new(Body::empty(), empty.clone(), ()));
        assert_eq!(empty.outcome(), 200);
    }
}
