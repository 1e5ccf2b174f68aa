//! `--api-key`: who may generate.

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use moetrail_api::ApiError;

use crate::rejection::Rejection;
use crate::state::AppState;

/// Lets a request through that carries the key as a bearer token, or any request where there is no key.
pub(crate) async fn require_key(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let Some(key) = state.api_key() else { return next.run(request).await };
    let header = request.headers().get(AUTHORIZATION).map(|value| value.as_bytes());
    match bearer_token(header) {
        Some(token) if equal(token, key.as_bytes()) => next.run(request).await,
        Some(_) => refuse("the API key is not this server's"),
        None => refuse("an API key is needed: Authorization: Bearer KEY"),
    }
}

fn bearer_token(header: Option<&[u8]>) -> Option<&[u8]> {
    let (scheme, token) = header?.split_at_checked(b"Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token.trim_ascii())
}

/// Compares all bytes, so that the time taken does not tell how many of them were right.
fn equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

fn refuse(message: &str) -> Response {
    Rejection::from(ApiError::new(401, message)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_behind_their_scheme() {
        assert_eq!(bearer_token(Some(b"Bearer key")), Some(&b"key"[..]));
        assert_eq!(bearer_token(Some(b"bearer  key ")), Some(&b"key"[..]));
        assert_eq!(bearer_token(Some(b"Basic key")), None);
        assert_eq!(bearer_token(Some(b"Bearer")), None);
        assert_eq!(bearer_token(None), None);
    }

    #[test]
    fn only_the_same_bytes_are_equal() {
        assert!(equal(b"key", b"key"));
        assert!(!equal(b"key", b"kez"));
        assert!(!equal(b"key", b"keys"));
        assert!(!equal(b"", b"k"));
    }
}
