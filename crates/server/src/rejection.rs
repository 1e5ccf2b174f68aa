//! Refusals as responses.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use moetrail_api::ApiError;
use moetrail_engine::SubmitError;

/// A refusal with everything that its response says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rejection {
    error: ApiError,
    /// Whether the same request may succeed soon.
    retry: bool,
}

impl From<ApiError> for Rejection {
    fn from(error: ApiError) -> Self {
        Self { error, retry: false }
    }
}

impl From<SubmitError> for Rejection {
    fn from(error: SubmitError) -> Self {
        let retry = matches!(error, SubmitError::Full { .. } | SubmitError::Paused);
        Self { error: error.into(), retry }
    }
}

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::warn!(status = status.as_u16(), message = self.error.message, "refused");
        } else {
            tracing::debug!(status = status.as_u16(), message = self.error.message, "refused");
        }
        let mut response = json(status, self.error.to_json());
        if self.retry {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A response with a JSON body.
pub(crate) fn json(status: StatusCode, body: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
