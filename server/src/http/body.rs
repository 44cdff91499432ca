//! Reading a request's body: the right type, not too long, not too slow.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::Busy;
use super::errors::ApiError;
use super::limits;

/// The whole JSON body of a request.
///
/// Errors: 415 for another type, 413 when it is longer than the limit, 408 when it takes longer than `deadline`, 400
/// when the client breaks off.
///
/// What is left of an over-long body is read and thrown away beside the 413, which does not wait for it.
pub(super) async fn read_json(mut request: Request, deadline: Duration) -> Result<Bytes, ApiError> {
    check_type(request.headers())?;
    let busy = request.extensions_mut().remove::<Busy>();
    let expects_continue = request.headers().contains_key(header::EXPECT);
    let body = request.into_body();
    let announced = body.size_hint().lower();
    if announced > limits::MAX_BODY_BYTES as u64 {
        // A client that asked first has sent nothing yet and will not.
        if !expects_continue {
            discard_later(body, busy);
        }
        return Err(ApiError::BodyTooLarge);
    }
    read(body, busy, announced as usize, Instant::now() + deadline).await
}

async fn read(
    mut body: Body,
    busy: Option<Busy>,
    announced: usize,
    deadline: Instant,
) -> Result<Bytes, ApiError> {
    let mut bytes = BytesMut::with_capacity(announced.min(64 * 1024));
    loop {
        let frame = timeout_at(deadline, body.frame()).await.map_err(|_| ApiError::BodyTimeout)?;
        let Some(frame) = frame else { return Ok(bytes.freeze()) };
        let frame = frame.map_err(|_| ApiError::malformed("the body could not be read to its end"))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limits::MAX_BODY_BYTES {
            discard_later(body, busy);
            return Err(ApiError::BodyTooLarge);
        }
        bytes.extend_from_slice(&data);
    }
}

/// Discards beside the answer. `busy` tells the connection's timer that these bytes are no next request.
fn discard_later(body: Body, busy: Option<Busy>) {
    tokio::spawn(async move {
        discard(body, limits::DISCARD_TIMEOUT).await;
        drop(busy);
    });
}

/// Reads on for a while: a connection closed with unread bytes is reset, and the client would never see the answer.
pub(super) async fn discard(mut body: Body, limit: Duration) {
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
    use super::*;

    fn request(content_type: &str, body: impl Into<Body>) -> Request {
        Request::builder().header(header::CONTENT_TYPE, content_type).body(body.into()).unwrap()
    }

    async fn read_all(request: Request) -> Result<Bytes, ApiError> {
        read_json(request, Duration::from_millis(50)).await
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
}
