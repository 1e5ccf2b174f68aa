//! Request ids, the access log and the counts of requests.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use uuid::Uuid;

use crate::state::AppState;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// How a request is called.
#[derive(Debug, Clone)]
pub(crate) struct RequestId {
    /// By the client.
    pub(crate) given: Option<Arc<str>>,
    /// By the server, never the same twice.
    pub(crate) unique: Arc<str>,
}

/// Names the request, says its name in the response, and writes the access log.
pub(crate) async fn observe(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let given = request.headers().get(X_REQUEST_ID).cloned();
    let id = RequestId {
        given: given.as_ref().and_then(|id| id.to_str().ok()).map(Into::into),
        unique: Uuid::new_v4().simple().to_string().into(),
    };
    let echoed = given.or_else(|| HeaderValue::from_str(&id.unique).ok());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    // The route, not the path: a label must not take every value that a client can think of.
    let route = request.extensions().get::<MatchedPath>().cloned();
    request.extensions_mut().insert(id);
    let mut response = next.run(request).await;
    if let Some(id) = echoed {
        response.headers_mut().insert(X_REQUEST_ID, id);
    }
    let (status, elapsed) = (response.status().as_u16(), began.elapsed());
    let route = route.as_ref().map_or("unknown", MatchedPath::as_str);
    state.stats().record(route, &method, status, elapsed);
    let milliseconds = elapsed.as_micros() as f64 / 1e3;
    // Probes come every few seconds and say nothing.
    if matches!(route, "/health" | "/ping" | "/metrics") {
        tracing::debug!(%method, path, status, milliseconds, "request");
    } else {
        tracing::info!(%method, path, status, milliseconds, "request");
    }
    response
}
