//! What a client is told when something goes wrong: the only file that chooses the status codes of answers to requests.
//!
//! The body is OpenAI's, `{"error":{"message","type","param","code"}}`, with vLLM's type names and the status code
//! as `code`. What the client reads and what the log says are two things: a 500 carries the request's id and
//! nothing of the cause. No message holds a path, a prompt or a token's text.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tandem_engine::{FailureKind, InvalidParam, RequestFailure, SubmitError};

use super::limits;

/// A request that cannot be answered.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(super) enum ApiError {
    /// 400: malformed or impossible; `param` names the field.
    #[error("{message}")]
    Invalid { param: Option<String>, message: String },
    /// 401
    #[error("missing or wrong API key")]
    Unauthorized,
    /// 404: the named model is not served here.
    #[error("the model `{0}` does not exist")]
    ModelNotFound(String),
    /// 404
    #[error("there is no such route")]
    RouteNotFound,
    /// 405
    #[error("this route does not take that method")]
    MethodNotAllowed,
    /// 408
    #[error("the request body did not arrive in time")]
    BodyTimeout,
    /// 413
    #[error("the request body is larger than {} bytes", limits::MAX_BODY_BYTES)]
    BodyTooLarge,
    /// 415
    #[error("{0}")]
    UnsupportedMediaType(&'static str),
    /// 431
    #[error(
        "the request has more than {} headers or {} bytes of them",
        limits::MAX_HEADERS,
        limits::MAX_HEADER_BYTES
    )]
    HeadersTooLarge,
    /// 503: the queue is full.
    #[error("the server is overloaded, try again")]
    Overloaded,
    /// 503: loading, waiting for its group, draining, stopped or failed.
    #[error("the server is not ready: {0}")]
    NotReady(&'static str),
    /// 503 after the request was admitted, for example during a drain.
    #[error("{message}")]
    Interrupted { message: String },
    /// 500; `id` is the request's id, under which the log has the cause.
    #[error("internal error, id {id}")]
    Internal { id: String },
}

impl ApiError {
    /// A 400 about one field.
    pub(super) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.into()), message: message.into() }
    }

    /// A 400 about the request as a whole.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::Invalid { param: None, message: message.into() }
    }

    /// A 400 for a field whose meaning is known but not built.
    pub(super) fn unsupported(param: impl Into<String>) -> Self {
        let param = param.into();
        Self::Invalid { message: format!("`{param}` is not supported yet"), param: Some(param) }
    }

    /// A 500 whose cause goes to the log under the request's id.
    pub(super) fn internal(id: &str, cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(request_id = id, %cause, "internal error");
        Self::Internal { id: id.to_owned() }
    }

    /// The engine's refusal of a request.
    pub(super) fn from_submit(error: SubmitError) -> Self {
        match error {
            SubmitError::Invalid(InvalidParam { param, message }) => {
                Self::invalid(param, format!("`{param}` {message}"))
            }
            SubmitError::QueueFull => Self::Overloaded,
            SubmitError::NotReady => Self::NotReady("waiting for its group of ranks"),
            SubmitError::Draining => Self::NotReady("draining"),
            // Another worker can answer; this one is on its way out.
            SubmitError::Stopped => Self::NotReady("stopped"),
        }
    }

    /// The engine's failure of an admitted request.
    pub(super) fn from_failure(failure: RequestFailure, id: &str) -> Self {
        match failure.kind {
            FailureKind::Unavailable => Self::Interrupted { message: failure.message },
            FailureKind::Internal => {
                tracing::error!(request_id = id, cause = failure.message, "request failed");
                Self::Internal { id: id.to_owned() }
            }
        }
    }

    /// The HTTP status of this error.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. } => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::ModelNotFound(_) | Self::RouteNotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Overloaded | Self::NotReady(_) | Self::Interrupted { .. } => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// Whether the same request may succeed when it is sent again.
    pub(super) fn retryable(&self) -> bool {
        matches!(self, Self::Overloaded | Self::NotReady(_) | Self::Interrupted { .. } | Self::BodyTimeout)
    }

    /// The JSON body.
    pub(super) fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                message: self.to_string(),
                kind: self.kind(),
                param: self.param().map(str::to_owned),
                code: self.status().as_u16(),
                retryable: None,
            },
        }
    }

    /// The JSON body of an error inside a stream, which says whether to try again.
    pub(super) fn stream_body(&self) -> ErrorBody {
        let mut body = self.body();
        body.error.retryable = Some(self.retryable());
        body
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "BadRequestError",
            Self::Unauthorized => "AuthenticationError",
            Self::ModelNotFound(_) | Self::RouteNotFound => "NotFoundError",
            Self::MethodNotAllowed => "MethodNotAllowedError",
            Self::BodyTimeout => "RequestTimeoutError",
            Self::BodyTooLarge => "RequestTooLargeError",
            Self::UnsupportedMediaType(_) => "UnsupportedMediaTypeError",
            Self::HeadersTooLarge => "HeadersTooLargeError",
            Self::Overloaded | Self::NotReady(_) | Self::Interrupted { .. } => "ServiceUnavailableError",
            Self::Internal { .. } => "InternalServerError",
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } => param.as_deref(),
            Self::ModelNotFound(_) => Some("model"),
            _ => None,
        }
    }

    fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::Overloaded | Self::Interrupted { .. } => Some(limits::RETRY_AFTER_OVERLOAD_S),
            Self::NotReady(_) => Some(limits::RETRY_AFTER_NOT_READY_S),
            _ => None,
        }
    }
}

/// The status under which a failed request is counted.
pub(super) fn status_of(kind: FailureKind) -> StatusCode {
    match kind {
        FailureKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        FailureKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), json(&self.body())).into_response();
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self == Self::BodyTooLarge {
            // The client may still be sending.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if self == Self::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// `{"error": …}`
#[derive(Debug, Serialize)]
pub(super) struct ErrorBody {
    pub(super) error: ErrorDetail,
}

/// What stands inside `error`.
#[derive(Debug, Serialize)]
pub(super) struct ErrorDetail {
    pub(super) message: String,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) param: Option<String>,
    pub(super) code: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) retryable: Option<bool>,
}

/// A JSON body with its content type.
pub(super) fn json(value: &impl Serialize) -> Response {
    // Our answers are structs of strings and numbers; serialising one into memory cannot fail.
    let bytes = serde_json::to_vec(value).expect("answers serialise");
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], bytes).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_refusals_map_to_their_status() {
        let invalid = SubmitError::Invalid(InvalidParam { param: "top_p", message: "bad".into() });
        let cases = [
            (ApiError::from_submit(invalid), 400, Some("top_p"), false),
            (ApiError::from_submit(SubmitError::QueueFull), 503, None, true),
            (ApiError::from_submit(SubmitError::NotReady), 503, None, true),
            (ApiError::from_submit(SubmitError::Draining), 503, None, true),
            (ApiError::from_submit(SubmitError::Stopped), 503, None, true),
            (ApiError::ModelNotFound("x".into()), 404, Some("model"), false),
        ];
        for (error, status, param, retryable) in cases {
            assert_eq!(error.status().as_u16(), status, "{error:?}");
            assert_eq!(error.body().error.code, status);
            assert_eq!(error.param(), param);
            assert_eq!(error.retryable(), retryable);
            let has_retry_after = error.into_response().headers().contains_key(header::RETRY_AFTER);
            assert_eq!(has_retry_after, status == 503);
        }
    }

    #[test]
    fn a_500_has_an_id_and_no_cause() {
        let failure = RequestFailure { kind: FailureKind::Internal, message: "pointer 0xdead".into() };
        let text = serde_json::to_string(&ApiError::from_failure(failure, "req-7").body()).unwrap();
        assert!(text.contains("req-7") && !text.contains("0xdead"), "{text}");
    }

    #[test]
    fn errors_inside_a_stream_say_whether_to_retry() {
        let body = serde_json::to_value(ApiError::NotReady("draining").stream_body()).unwrap();
        assert_eq!(body["error"]["retryable"], true);
        let plain = serde_json::to_value(ApiError::Unauthorized.body()).unwrap();
        assert!(plain["error"].get("retryable").is_none());
        assert!(plain["error"]["param"].is_null());
    }
}
