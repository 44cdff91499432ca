//! Reading a request's body: the right type, not too long, not too slow, and not too much beside all others.

use std::sync::Arc;
use std::time::Duration;

use axum::body::HttpBody;
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};
use tokio::time::{Instant, timeout_at};

use super::errors::ApiError;
use super::limits;
use super::state::AppState;

/// Bounds the memory of all bodies that have arrived and are not yet the engine's.
#[derive(Debug)]
pub(super) struct BodyMemory(Arc<Semaphore>);

/// A body's share of that memory, until it is dropped.
#[must_use]
pub(super) struct Room(OwnedSemaphorePermit);

impl BodyMemory {
    pub(super) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes)))
    }

    fn room(&self, bytes: usize) -> Result<Room, ApiError> {
        let bytes = u32::try_from(bytes).map_err(|_| ApiError::BodyTooLarge)?;
        self.0
            .clone()
            .try_acquire_many_owned(bytes)
            .map(Room)
            .map_err(|(TryAcquireError::NoPermits | TryAcquireError::Closed)| ApiError::Overloaded)
    }
}

/// Reads and parses a request's JSON body; a long one is parsed on a helper thread. The room is to be kept for as long as what
/// was parsed is.
///
/// Errors: 415 for another type, 413 when it is longer than the limit, 408 when it takes too long, 503 when all bodies together
/// are too much, 400 when the client breaks off; and those of `parse`.
pub(super) async fn read_parsed<T: Send + 'static>(
    state: &AppState,
    request: Request,
    request_id: &str,
    parse: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
) -> Result<(T, Room), ApiError> {
    let (body, room) = read_json(request, state.timeouts.body, &state.body_memory).await?;
    let is_long = body.len() > limits::INLINE_JSON_BYTES;
    let parsed = state.helpers.run(is_long, request_id, move || parse(&body)).await??;
    Ok((parsed, room))
}

async fn read_json(
    request: Request,
    deadline: Duration,
    memory: &BodyMemory,
) -> Result<(Bytes, Room), ApiError> {
    check_type(request.headers())?;
    let deadline = Instant::now() + deadline;
    let mut body = request.into_body();
    let announced = body.size_hint().lower();
    if announced > limits::MAX_BODY_BYTES as u64 {
        return Err(ApiError::BodyTooLarge);
    }
    let mut bytes = BytesMut::with_capacity((announced as usize).min(64 * 1024));
    let mut room = memory.room(0)?;
    loop {
        let frame = timeout_at(deadline, body.frame()).await.map_err(|_| ApiError::BodyTimeout)?;
        let Some(frame) = frame else { return Ok((bytes.freeze(), room)) };
        let frame = frame.map_err(|_| ApiError::malformed("the body could not be read to its end"))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limits::MAX_BODY_BYTES {
            return Err(ApiError::BodyTooLarge);
        }
        room.0.merge(memory.room(data.len())?.0);
        bytes.extend_from_slice(&data);
    }
}

fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let media_type = content_type.split(';').next().unwrap_or("").trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::UnsupportedMediaType("the content type must be application/json"));
    }
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            Err(ApiError::UnsupportedMediaType("compressed request bodies are not supported"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn request(content_type: &str, body: impl Into<Body>) -> Request {
        Request::builder().header(header::CONTENT_TYPE, content_type).body(body.into()).unwrap()
    }

    async fn read_all(request: Request) -> Result<Bytes, ApiError> {
        let memory = BodyMemory::new(2 * limits::MAX_BODY_BYTES);
        read_json(request, Duration::from_millis(50), &memory).await.map(|(body, _)| body)
    }

    #[tokio::test]
    async fn only_plain_json_is_taken() {
        for good in ["application/json", "Application/JSON; charset=utf-8"] {
            assert_eq!(read_all(request(good, "{}")).await.unwrap(), "{}");
        }
        for bad in ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonx"] {
            assert_eq!(read_all(request(bad, "{}")).await.unwrap_err().status(), 415, "{bad}");
        }
        let mut packed = request("application/json", "{}");
        packed.headers_mut().insert(header::CONTENT_ENCODING, "gzip".parse().unwrap());
        assert_eq!(read_all(packed).await.unwrap_err().status(), 415);
    }

    #[tokio::test]
    async fn long_bodies_are_refused_announced_or_not() {
        let fits = vec![b' '; limits::MAX_BODY_BYTES];
        assert_eq!(read_all(request("application/json", fits.clone())).await.unwrap().len(), fits.len());
        let long = vec![b' '; limits::MAX_BODY_BYTES + 1];
        assert_eq!(read_all(request("application/json", long)).await.unwrap_err(), ApiError::BodyTooLarge);
        let chunk = Ok::<_, std::io::Error>(Bytes::from(fits));
        let chunks = futures_util::stream::iter([chunk, Ok(Bytes::from_static(b"x"))]);
        let unannounced = request("application/json", Body::from_stream(chunks));
        assert_eq!(read_all(unannounced).await.unwrap_err(), ApiError::BodyTooLarge);
    }

    #[tokio::test]
    async fn slow_bodies_time_out() {
        let never = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
        let error = read_all(request("application/json", Body::from_stream(never))).await.unwrap_err();
        assert_eq!(error, ApiError::BodyTimeout);
    }

    #[tokio::test]
    async fn all_bodies_together_are_bounded() {
        let memory = BodyMemory::new(10);
        let read = |len| {
            let body = request("application/json", vec![b' '; len]);
            read_json(body, Duration::from_secs(1), &memory)
        };
        let (_, first) = read(6).await.unwrap();
        assert_eq!(read(5).await.err().unwrap(), ApiError::Overloaded);
        let (_, second) = read(4).await.unwrap();
        drop(first);
        let (_, third) = read(6).await.unwrap();
        drop((second, third));
        assert!(read(10).await.is_ok());
    }
}
