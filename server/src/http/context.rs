//! What is known about a request before its body is read: who sent it, under which id, when.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::http::{HeaderMap, HeaderName};

use super::access_log::RequestLog;
use super::limits;

/// The header that carries a request's id, in and out.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Travels with the request as an extension.
#[derive(Clone)]
pub(super) struct RequestContext {
    pub(super) log: Arc<RequestLog>,
    pub(super) arrival: Instant,
    /// Index of the API key that was presented; `None` when the server has none.
    pub(super) tenant: Option<usize>,
}

impl RequestContext {
    pub(super) fn id(&self) -> &str {
        self.log.id()
    }

    /// Separates the prefix caches of tenants, and within a tenant those of different `cache_salt`s. The key's index
    /// comes first and ends at the colon, so no salt can spell another tenant.
    pub(super) fn cache_salt(&self, asked: Option<&str>) -> Option<String> {
        match (self.tenant, asked) {
            (None, None) => None,
            (None, Some(salt)) => Some(format!(":{salt}")),
            (Some(tenant), None) => Some(format!("{tenant}")),
            (Some(tenant), Some(salt)) => Some(format!("{tenant}:{salt}")),
        }
    }
}

/// The client's id if it is short and plain, else a new one. It is echoed, logged and part of the answer's id.
pub(super) fn request_id(headers: &HeaderMap) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/@+=".contains(&byte);
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    given
        .filter(|id| (1..=limits::MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.bytes().all(plain))
        .map_or_else(new_id, str::to_owned)
}

/// Unique within the process and, by the random key of the hash, unlike those of other processes. Not a secret.
fn new_id() -> String {
    static KEY: OnceLock<RandomState> = OnceLock::new();
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let (key, serial) = (KEY.get_or_init(RandomState::new), COUNTER.fetch_add(1, Ordering::Relaxed));
    format!("{:016x}{:016x}", key.hash_one((serial, 0)), key.hash_one((serial, 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_of(value: &[u8]) -> String {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID, axum::http::HeaderValue::from_bytes(value).unwrap());
        request_id(&headers)
    }

    #[test]
    fn plain_ids_are_taken_over_and_others_replaced() {
        assert_eq!(id_of(b"3f2a-11:b/c"), "3f2a-11:b/c");
        for bad in [b"".as_slice(), b"a b", b"a\"b", b"\xc3\xa9", &[b'x'; 129]] {
            assert_eq!(id_of(bad).len(), 32);
        }
        assert_ne!(new_id(), new_id());
    }

    #[test]
    fn no_two_callers_share_a_salt_by_accident() {
        let salt = |tenant, asked| {
            let log = RequestLog::new(String::new(), String::new(), String::new(), Instant::now(), true);
            RequestContext { log, arrival: Instant::now(), tenant }.cache_salt(asked)
        };
        let salts = [
            salt(None, None),
            salt(None, Some("1")),
            salt(Some(1), None),
            salt(Some(1), Some("2")),
            salt(None, Some("1:2")),
        ];
        for (idx, one) in salts.iter().enumerate() {
            assert!(salts[idx + 1..].iter().all(|other| other != one), "{one:?}");
        }
    }
}
