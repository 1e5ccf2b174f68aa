//! Reading a request's body, whatever its content type says.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use moetrail_api::ApiError;

use crate::rejection::Rejection;
use crate::state::AppState;

/// The bytes of a body within the limit.
pub(crate) struct RawBody(pub(crate) Bytes);

impl FromRequest<AppState> for RawBody {
    type Rejection = Rejection;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Rejection> {
        Bytes::from_request(request, state).await.map(Self).map_err(|error| refuse(&error, state.body_limit()).into())
    }
}

fn refuse(error: &BytesRejection, limit: usize) -> ApiError {
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::new(413, format!("the body is larger than this server's limit of {limit} bytes"))
        }
        _ => ApiError::new(400, format!("the body cannot be read: {}", error.body_text())),
    }
}
