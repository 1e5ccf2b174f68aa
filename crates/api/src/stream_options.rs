//! Whether and how an answer is streamed.

use serde::Deserialize;

use crate::body::Object;
use crate::error::ApiError;

/// The fields that decide about streaming.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StreamFields {
    stream: Option<bool>,
    stream_options: Option<Object<StreamOptions>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// How an answer is streamed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Streaming {
    /// Server-sent events instead of one body.
    pub(crate) enabled: bool,
    /// A last chunk without choices carries the usage.
    pub(crate) include_usage: bool,
    /// Every chunk carries the usage so far.
    pub(crate) continuous_usage: bool,
}

impl StreamFields {
    /// Checks that options come with streaming.
    pub(crate) fn resolve(&self) -> Result<Streaming, ApiError> {
        let enabled = self.stream.unwrap_or(false);
        let Some(Object(options)) = &self.stream_options else {
            return Ok(Streaming { enabled, ..Streaming::default() });
        };
        if !enabled {
            return Err(ApiError::invalid("stream_options", "stream_options is given, but stream is not true"));
        }
        let include_usage = options.include_usage.unwrap_or(false);
        // As in vLLM, usage in every chunk needs usage at the end.
        let continuous_usage = include_usage && options.continuous_usage_stats.unwrap_or(false);
        Ok(Streaming { enabled, include_usage, continuous_usage })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::read;

    fn resolve(body: &str) -> Result<Streaming, ApiError> {
        read::<StreamFields>(body.as_bytes())?.resolve()
    }

    #[test]
    fn options_need_a_stream() {
        assert_eq!(resolve("{}"), Ok(Streaming::default()));
        let all = resolve(r#"{"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true}}"#);
        assert_eq!(all, Ok(Streaming { enabled: true, include_usage: true, continuous_usage: true }));
        let error = resolve(r#"{"stream_options":{"include_usage":true}}"#).expect_err("no stream");
        assert_eq!(error.param.as_deref(), Some("stream_options"));
        let error = resolve(r#"{"stream":true,"stream_options":{"include_usage":1}}"#).expect_err("no bool");
        assert_eq!(error.param.as_deref(), Some("stream_options.include_usage"));
    }
}
