//! Reading a request's body, whatever its content type says.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use futures::StreamExt;
use moetrail_api::ApiError;

use crate::rejection::Rejection;
use crate::state::AppState;

/// How long the rest of a body that is too large is read and thrown away.
///
/// Most clients look at the answer only after they have sent everything: one that finds the connection closed
/// before that reports a broken pipe instead of what it did wrong.
const LINGER: Duration = Duration::from_secs(10);

/// The bytes of a body within the limit.
pub(crate) struct RawBody(pub(crate) Bytes);

impl FromRequest<AppState> for RawBody {
    type Rejection = Rejection;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Rejection> {
        Ok(Self(read(request.into_body(), state.body_limit()).await?))
    }
}

async fn read(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let mut body = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(part) = body.next().await {
        let part = part.map_err(|error| ApiError::new(400, format!("the body cannot be read: {error}")))?;
        if bytes.len() + part.len() > limit {
            drop(bytes);
            // Whether all of it came makes no difference to the answer.
            let _ = tokio::time::timeout(LINGER, body.for_each(|_| std::future::ready(()))).await;
            return Err(ApiError::new(413, format!("the body is larger than this server's limit of {limit} bytes")));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes.into())
}
