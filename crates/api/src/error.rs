//! The error body of every endpoint: `{"error":{"message","type","param","code"}}`.

use moetrail_engine::{RequestError, SubmitError};
use moetrail_text::{ChatError, TextError};
use serde::Serialize;

use crate::body::write;

/// Why a request is refused or failed, with the HTTP status that says so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status, 4xx or 5xx; also the `code` of the body, as in vLLM.
    pub status: u16,
    /// What is wrong, with the offending value.
    pub message: String,
    /// The parameter at fault as the client spelled it, dotted where nested.
    pub param: Option<String>,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Detail<'a>,
}

#[derive(Serialize)]
struct Detail<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: u16,
}

impl ApiError {
    /// A 400 that names a parameter.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status: 400, message: message.into(), param: Some(param.into()) }
    }

    /// An error of any status that concerns no parameter.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None }
    }

    /// The `type` of the body, which follows from the status.
    pub fn kind(&self) -> &'static str {
        match self.status {
            401 => "AuthenticationError",
            404 => "NotFoundError",
            405 => "MethodNotAllowedError",
            408 => "TimeoutError",
            413 => "RequestTooLargeError",
            400..=499 => "BadRequestError",
            503 => "ServiceUnavailableError",
            _ => "InternalServerError",
        }
    }

    /// The JSON body.
    pub fn to_json(&self) -> Vec<u8> {
        let detail =
            Detail { message: &self.message, r#type: self.kind(), param: self.param.as_deref(), code: self.status };
        write(&Body { error: detail })
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Invalid { param, .. } => Self::invalid(param, message),
            SubmitError::Full { .. } | SubmitError::Paused | SubmitError::Closed => Self::new(503, message),
        }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        Self::new(500, error.to_string())
    }
}

impl From<ChatError> for ApiError {
    fn from(error: ChatError) -> Self {
        Self::invalid(error.param(), error.to_string())
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        Self::invalid("prompt", error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_the_four_fields() {
        let body = ApiError::invalid("n", "n is 0").to_json();
        let expect = r#"{"error":{"message":"n is 0","type":"BadRequestError","param":"n","code":400}}"#;
        assert_eq!(String::from_utf8_lossy(&body), expect);
    }

    #[test]
    fn the_engine_s_refusals_have_their_status() {
        let status = |error: SubmitError| ApiError::from(error).status;
        assert_eq!(status(SubmitError::Full { limit: 3 }), 503);
        assert_eq!(status(SubmitError::Closed), 503);
        let invalid = ApiError::from(SubmitError::Invalid { param: "n", message: "n is 9".into() });
        assert_eq!((invalid.status, invalid.param.as_deref()), (400, Some("n")));
        assert_eq!(ApiError::from(RequestError::Engine("x".into())).kind(), "InternalServerError");
    }
}
