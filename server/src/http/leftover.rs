//! What is left of a request's body when its answer is known.
//!
//! A connection that is closed with unread bytes is reset, and the client would never see the answer. So whatever a handler
//! has not read of a body is read on for a while and thrown away, beside the answer, which does not wait for it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, header};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::connection::Busy;
use super::limits;

/// A body that is read to its end even if it is dropped before.
pub(super) struct ReadOn {
    /// None after its end.
    body: Option<Body>,
    /// Tells the connection's timer that these bytes are no next request.
    busy: Option<Busy>,
    /// The client asked first, and sends nothing before it is told to.
    waits: bool,
    /// How long it is read on.
    limit: Duration,
}

impl ReadOn {
    pub(super) fn new(body: Body, headers: &HeaderMap, busy: Option<Busy>, limit: Duration) -> Self {
        Self { body: Some(body), busy, waits: headers.contains_key(header::EXPECT), limit }
    }
}

impl HttpBody for ReadOn {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.waits = false;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for ReadOn {
    fn drop(&mut self) {
        let (body, busy) = (self.body.take(), self.busy.take());
        let Some(body) = body.filter(|body| !self.waits && !body.is_end_stream()) else { return };
        // Without a runtime there is no connection either.
        if let Ok(runtime) = Handle::try_current() {
            let limit = self.limit;
            runtime.spawn(async move {
                discard(body, limit).await;
                drop(busy);
            });
        }
    }
}

/// Reads on for at most `limit`.
async fn discard(mut body: Body, limit: Duration) {
    let read_on = async {
        let mut left = limits::MAX_DISCARDED_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let len = frame.data_ref().map_or(0, Bytes::len);
            match left.checked_sub(len) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    // Late bytes are the client's loss.
    let _ = timeout(limit, read_on).await;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::{StreamExt, stream};

    use super::*;

    /// A body of `chunks` pieces, and how many of them were read.
    fn counted(chunks: usize) -> (Body, Arc<AtomicUsize>) {
        let read = Arc::new(AtomicUsize::new(0));
        let counter = read.clone();
        let pieces = stream::iter(0..chunks).map(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
            Ok::<_, std::io::Error>(Bytes::from_static(&[b'x'; 1024]))
        });
        (Body::from_stream(pieces), read)
    }

    async fn settle() {
        for _ in 0..32 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_was_not_read_is_read_on() {
        for read_before in [0, 1, 7] {
            let (body, read) = counted(7);
            let mut body = Body::new(ReadOn::new(body, &HeaderMap::new(), None, limits::DISCARD_TIMEOUT));
            for _ in 0..read_before {
                body.frame().await.unwrap().unwrap();
            }
            assert_eq!(read.load(Ordering::SeqCst), read_before);
            drop(body);
            settle().await;
            assert_eq!(read.load(Ordering::SeqCst), 7, "after {read_before}");
        }
    }

    #[tokio::test]
    async fn a_client_that_asked_first_has_sent_nothing() {
        let (body, read) = counted(7);
        let headers = HeaderMap::from_iter([(header::EXPECT, "100-continue".parse().unwrap())]);
        drop(ReadOn::new(body, &headers, None, limits::DISCARD_TIMEOUT));
        settle().await;
        assert_eq!(read.load(Ordering::SeqCst), 0);
    }
}
