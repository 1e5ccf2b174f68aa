//! Why a payload cannot be read or written.

/// What is wrong, and with which field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FormatError {
    field: &'static str,
    message: String,
}

impl FormatError {
    pub(crate) fn new(field: &'static str, message: impl Into<String>) -> Self {
        Self { field, message: message.into() }
    }

    /// The field at fault: `data`, `shape`, `start`, `dtype` or `format`.
    pub fn field(&self) -> &'static str {
        self.field
    }

    /// What is wrong with it, with the offending value.
    pub fn message(&self) -> &str {
        &self.message
    }
}
