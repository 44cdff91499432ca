//! Which path leads to which handler, and what surrounds all of them: ids, header limits, keys, panics, the log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Serialize;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::access_log::{ObservedBody, RequestLog};
use super::connection::Busy;
use super::context::{REQUEST_ID, RequestContext, request_id};
use super::errors::{ApiError, json};
use super::leftover::ReadOn;
use super::state::AppState;
use super::{chat, completions, forward, limits, metrics, models, panics, probes, tokenize};
use crate::config::AllowedOrigins;

/// How long a browser may remember what it asked.
const PREFLIGHT_AGE: Duration = Duration::from_secs(600);
/// Routes that say how the process is, not what its model answers: open to all, logged at debug level.
const QUIET_ROUTES: &[&str] = &["/health", "/livez", "/readyz", "/startupz", "/ping", "/metrics"];

/// Everything on the serving port.
pub(super) fn api(state: Arc<AppState>) -> Router {
    let protected = Router::new()
        .route("/v1/completions", post(completions::handle))
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/models", get(models::list))
        // Served names may hold slashes.
        .route("/v1/models/{*id}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .method_not_allowed_fallback(method_not_allowed)
        .route_layer(from_fn_with_state(state.clone(), forward::unless_leader))
        .route_layer(from_fn_with_state(state.clone(), authenticate));
    let routes =
        probes().route("/metrics", get(metrics::with_vllm)).route("/version", get(version)).merge(protected);
    let cors = cors(&state.config.allowed_origins);
    finish(routes.fallback(route_not_found), state, limits::DISCARD_TIMEOUT).layer(cors)
}

/// Which pages in browsers may call the API. Browsers ask with requests of their own first, which this answers.
fn cors(allowed: &AllowedOrigins) -> CorsLayer {
    let origins = match allowed {
        AllowedOrigins::Any => AllowOrigin::any(),
        AllowedOrigins::List(origins) => {
            AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
        }
    };
    let layer = CorsLayer::new().allow_origin(origins).expose_headers([REQUEST_ID, header::RETRY_AFTER]);
    layer
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .max_age(PREFLIGHT_AGE)
}

/// What the serving port offers when it has too many connections: probes, and a 503 for all else.
pub(super) fn overloaded(state: Arc<AppState>) -> Router {
    finish(probes().fallback(refuse_overload), state, limits::OVERLOAD_DISCARD_TIMEOUT)
}

/// Everything on the metrics port.
pub(super) fn metrics_only(state: Arc<AppState>) -> Router {
    let routes = probes().route("/metrics", get(metrics::own)).fallback(route_not_found);
    finish(routes, state, limits::DISCARD_TIMEOUT)
}

fn probes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/health", get(probes::ready))
        .route("/ping", get(probes::ready).post(probes::ready))
        .route("/readyz", get(probes::ready))
        .route("/livez", get(probes::live))
        .route("/startupz", get(probes::startup))
}

/// `read_on`: how long a body that no handler wants is read beside its answer.
fn finish(routes: Router<Arc<AppState>>, state: Arc<AppState>, read_on: Duration) -> Router {
    routes
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state((state.clone(), read_on), observe))
        .with_state(state)
}

async fn method_not_allowed() -> ApiError {
    ApiError::MethodNotAllowed
}

async fn route_not_found() -> ApiError {
    ApiError::RouteNotFound
}

async fn refuse_overload() -> ApiError {
    ApiError::Overloaded
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
}

async fn version() -> Response {
    json(&Version { version: env!("CARGO_PKG_VERSION") })
}

/// Gives the request its id and log, and the answer both of them; turns a panic into a 500.
async fn observe(
    State((state, read_on)): State<(Arc<AppState>, Duration)>,
    mut request: Request,
    next: Next,
) -> Response {
    let arrival = Instant::now();
    let id = request_id(request.headers());
    let route = request.extensions().get::<MatchedPath>().map_or("(none)", MatchedPath::as_str).to_owned();
    let quiet = QUIET_ROUTES.contains(&route.as_str());
    let log = RequestLog::new(id.clone(), request.method().to_string(), route, arrival, quiet);
    let busy = request.extensions().get::<Busy>().cloned();
    // A drain waits until answers are out, not just until they are known.
    let in_flight = (!quiet).then(|| state.lifecycle.request_started());
    request.extensions_mut().insert(RequestContext { log: log.clone(), arrival, tenant: None });
    let (parts, body) = request.into_parts();
    let body = Body::new(ReadOn::new(body, &parts.headers, busy.clone(), read_on));
    let request = Request::from_parts(parts, body);

    let response = if headers_fit(request.uri(), request.headers()) {
        let answered = panics::catch(next.run(request)).await;
        answered.unwrap_or_else(|panicked| ApiError::internal(&id, &panicked).into_response())
    } else {
        ApiError::HeadersTooLarge.into_response()
    };
    log.set_status(response.status().as_u16());
    let (mut parts, body) = response.into_parts();
    if let Ok(id) = HeaderValue::from_str(&id) {
        parts.headers.insert(REQUEST_ID, id);
    }
    Response::from_parts(parts, Body::new(ObservedBody::new(body, log, (busy, in_flight))))
}

/// Lets a request pass that shows one of the keys, if there are any.
async fn authenticate(
    State(state): State<Arc<AppState>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if !state.config.api_keys.is_empty() {
        let presented = bearer(request.headers()).ok_or(ApiError::Unauthorized)?;
        // Every key is compared, so that the time tells nothing about which one came close.
        let keys = state.config.api_keys.iter().enumerate();
        let tenant =
            keys.fold(None, |found, (idx, key)| if key.matches(presented) { Some(idx) } else { found });
        let context = request.extensions_mut().get_mut::<RequestContext>();
        match (tenant, context) {
            (Some(_), Some(context)) => context.tenant = tenant,
            _ => return Err(ApiError::Unauthorized),
        }
    }
    Ok(next.run(request).await)
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

fn headers_fit(uri: &Uri, headers: &HeaderMap) -> bool {
    let path = uri.path_and_query().map_or(0, |path| path.as_str().len());
    // A colon, a space and a line end besides name and value.
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    headers.len() <= limits::MAX_HEADERS && path + bytes <= limits::MAX_HEADER_BYTES
}
