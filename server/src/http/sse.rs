//! Server-sent events: framing, the wait for the first news, keep-alives, the end.
//!
//! The response header goes out once the first step of the request has happened, so a failure before it has its proper
//! status; if nothing happened for the length of a keep-alive, the header and a comment go out instead. All events of
//! a step are one chunk, which the connection hands to the socket in one write. hyper asks for the next chunk only
//! while little is unread, so a slow reader stops this body, then the engine's bounded stream, then its own request.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use super::access_log::RequestLog;
use super::answer::AnswerMeta;
use super::choice::Update;
use super::errors::ApiError;
use super::generation::Generation;
use super::state::AppState;
use super::{limits, panics};

/// How the chunks of one route look.
pub(super) trait Dialect: Send + Sync + 'static {
    /// What the chunks have in common.
    fn meta(&self) -> &AnswerMeta;

    /// Writes the events that tell of `update`, possibly none.
    fn write_update(&mut self, generation: &Generation, update: Update, events: &mut Events);

    /// Writes what comes after all choices have ended, before `[DONE]`.
    fn write_end(&mut self, generation: &Generation, events: &mut Events);
}

/// Events on their way into one chunk.
#[derive(Debug, Default)]
pub(super) struct Events(Vec<u8>);

impl Events {
    /// `data: {json}` and an empty line. JSON has no raw line breaks, so one line it is.
    pub(super) fn push(&mut self, value: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        // Our answers are structs of strings and numbers; serialising one into memory cannot fail.
        serde_json::to_writer(&mut self.0, value).expect("answers serialise");
        self.0.extend_from_slice(b"\n\n");
    }

    /// Says that the answer is complete.
    fn push_done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// A line that clients skip.
    fn push_keep_alive(&mut self) {
        self.0.extend_from_slice(b": keep-alive\n\n");
    }

    fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.0).into()
    }
}

/// Waits for the first news and answers with a stream, or with the error that came instead.
pub(super) async fn respond<D: Dialect>(
    state: Arc<AppState>,
    generation: Generation,
    dialect: D,
) -> Result<Response, ApiError> {
    let log = generation.log().clone();
    let mut streaming = Streaming { state, log, parts: Some((generation, dialect)), ended: false };
    let first = streaming.step().await?;
    let body = stream::unfold((streaming, Some(first)), |(mut streaming, first)| async move {
        let chunk = match first {
            Some(first) => first,
            None => streaming.next_chunk().await?,
        };
        Some((Ok::<Bytes, Infallible>(chunk), (streaming, None)))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // nginx would hold the events back.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, Body::from_stream(body)).into_response())
}

struct Streaming<D> {
    state: Arc<AppState>,
    log: Arc<RequestLog>,
    /// Away while a helper writes; gone after a panic.
    parts: Option<(Generation, D)>,
    ended: bool,
}

impl<D: Dialect> Streaming<D> {
    /// The next chunk; errors become an event, after which the stream is over.
    async fn next_chunk(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let error = match panics::catch(self.step()).await {
            Ok(Ok(chunk)) => return Some(chunk),
            Ok(Err(error)) => error,
            Err(panicked) => ApiError::internal(self.log.id(), &panicked),
        };
        self.ended = true;
        self.log.set_status(error.status().as_u16());
        let mut events = Events::default();
        events.push(&error.stream_body());
        events.push_done();
        Some(events.take())
    }

    /// Waits until there is something to send: the events of a step, or a keep-alive.
    async fn step(&mut self) -> Result<Bytes, ApiError> {
        let deadline = Instant::now() + self.state.timeouts.keep_alive;
        let mut events = Events::default();
        while events.0.is_empty() {
            let (mut generation, dialect) = self.parts.take().expect("a stream that has failed is over");
            let news = timeout_at(deadline, generation.next()).await;
            let parts = (generation, dialect);
            let Ok(updates) = news else {
                self.parts = Some(parts);
                events.push_keep_alive();
                break;
            };
            self.write(parts, updates?.unwrap_or_default(), &mut events).await?;
        }
        Ok(events.take())
    }

    /// Writes the events of a step. The first may repeat a whole prompt with its scores, for each choice: that is long.
    async fn write(
        &mut self,
        (generation, mut dialect): (Generation, D),
        updates: Vec<Update>,
        events: &mut Events,
    ) -> Result<(), ApiError> {
        let is_long = updates.iter().any(|update| update.first)
            && dialect.meta().num_listed(&generation) > limits::INLINE_LISTED_TOKENS;
        let ends = generation.is_over();
        let write = move || {
            let mut events = Events::default();
            for update in updates {
                dialect.write_update(&generation, update, &mut events);
            }
            if ends {
                dialect.write_end(&generation, &mut events);
                events.push_done();
            }
            (events, (generation, dialect))
        };
        let (written, parts) = self.state.helpers.run(is_long, self.log.id(), write).await?;
        *events = written;
        self.parts = Some(parts);
        self.ended = ends;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_single_lines_followed_by_an_empty_one() {
        let mut events = Events::default();
        events.push(&serde_json::json!({"text": "a\nb\r\n\u{2028}\u{1f600}"}));
        events.push_keep_alive();
        events.push_done();
        let text = String::from_utf8(events.take().to_vec()).unwrap();
        let blocks: Vec<&str> = text.split_terminator("\n\n").collect();
        assert_eq!(blocks.len(), 3);
        let value: serde_json::Value =
            serde_json::from_str(blocks[0].strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(value["text"], "a\nb\r\n\u{2028}\u{1f600}");
        assert!(!blocks[0].contains(['\n', '\r']));
        assert!(blocks[1].starts_with(':'));
        assert_eq!(blocks[2], "data: [DONE]");
    }
}
