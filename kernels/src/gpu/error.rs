/// What a device refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("GPU: {call}: {message}")]
pub struct GpuError {
    /// What was asked for.
    pub call: String,
    /// The answer.
    pub message: String,
}

impl GpuError {
    /// The answer to a call.
    pub fn new(call: impl Into<String>, message: impl Into<String>) -> GpuError {
        GpuError { call: call.into(), message: message.into() }
    }
}

impl From<GpuError> for candle_core::Error {
    fn from(error: GpuError) -> candle_core::Error {
        candle_core::Error::wrap(error)
    }
}
