//! The routes and what surrounds them.

use std::any::Any;

use axum::Router;
use axum::http::{Method, Uri};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use moetrail_api::{ApiError, Dialect};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;

use crate::access::observe;
use crate::auth::require_key;
use crate::generation::endpoint;
use crate::rejection::Rejection;
use crate::state::AppState;
use crate::{control, meta};

/// The whole server as a service, for a listener or for a test.
pub fn app(state: AppState) -> Router {
    let with_key = Router::new()
        .route("/v1/models", get(meta::models))
        // Hub ids have a slash.
        .route("/v1/models/{*id}", get(meta::model))
        .route("/v1/completions", endpoint(Dialect::Completions))
        .route("/v1/chat/completions", endpoint(Dialect::Chat))
        .route("/inference/v1/generate", endpoint(Dialect::Generate))
        .route("/generate", endpoint(Dialect::Sglang))
        .route("/inference/v1/abort_requests", post(control::abort_requests))
        .route("/abort_requests", post(control::abort_requests))
        .route("/pause", post(control::pause))
        .route("/resume", post(control::resume))
        .route("/is_paused", get(control::is_paused))
        .route("/reset_prefix_cache", post(control::reset_cache))
        .route("/flush_cache", get(control::reset_cache).post(control::reset_cache))
        .route("/update_weights", post(control::update_weights))
        .route("/server_info", get(control::info))
        .route("/get_server_info", get(control::info))
        .route("/tokenize", post(meta::tokenize))
        .route("/detokenize", post(meta::detokenize))
        .route_layer(from_fn_with_state(state.clone(), require_key));
    let open = Router::new()
        .route("/health", get(meta::health))
        .route("/ping", get(meta::health).post(meta::health))
        .route("/version", get(meta::version))
        .route("/openapi.json", get(meta::openapi))
        .route("/metrics", get(meta::metrics));
    // From the inside out: the last layer sees a request first.
    with_key
        .merge(open)
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(after_panic))
        .layer(CorsLayer::permissive())
        .layer(from_fn_with_state(state.clone(), observe))
        .with_state(state)
}

async fn unknown_route(method: Method, uri: Uri) -> Rejection {
    ApiError::new(404, format!("there is no {method} {}", uri.path())).into()
}

async fn wrong_method(method: Method, uri: Uri) -> Rejection {
    ApiError::new(405, format!("{} does not answer to {method}", uri.path())).into()
}

fn after_panic(_panic: Box<dyn Any + Send>) -> Response {
    // The panic hook has logged it.
    Rejection::from(ApiError::new(500, "the server failed on this request")).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_a_500_in_the_usual_shape() {
        let response = after_panic(Box::new("boom"));
        assert_eq!(response.status(), 500);
        let body = to_bytes(response.into_body(), 1 << 10).await.expect("a short body");
        assert!(body.starts_with(br#"{"error":{"message":"the server failed"#), "{body:?}");
    }
}
