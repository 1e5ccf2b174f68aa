//! What every handler needs.

use std::sync::Arc;

use moetrail_api::{DefaultSampling, RowsFormat};
use moetrail_engine::{EngineHandle, EngineInfo};

use crate::metrics::HttpStats;

/// Bytes of a request body, at most, unless said otherwise: room for some ten million token ids.
const DEFAULT_BODY_LIMIT: usize = 64 << 20;

/// The engine and the server's settings, shared by all requests.
#[derive(Clone)]
pub struct AppState {
    inner: Arc<Inner>,
    body_limit: usize,
}

struct Inner {
    engine: EngineHandle,
    defaults: DefaultSampling,
    rows_format: Option<RowsFormat>,
    api_key: Option<String>,
    stats: HttpStats,
}

impl AppState {
    /// Serves an engine. `rows_format` is `--routed-experts-format` (`None` leaves each endpoint its own), `api_key`
    /// is `--api-key`.
    pub fn new(
        engine: EngineHandle,
        defaults: DefaultSampling,
        rows_format: Option<RowsFormat>,
        api_key: Option<String>,
    ) -> Self {
        let inner = Inner { engine, defaults, rows_format, api_key, stats: HttpStats::default() };
        Self { inner: Arc::new(inner), body_limit: DEFAULT_BODY_LIMIT }
    }

    /// Refuses bodies of more than `bytes`.
    #[must_use]
    pub fn with_body_limit(self, bytes: usize) -> Self {
        Self { body_limit: bytes, ..self }
    }

    pub(crate) fn engine(&self) -> &EngineHandle {
        &self.inner.engine
    }

    pub(crate) fn info(&self) -> &EngineInfo {
        self.inner.engine.info()
    }

    pub(crate) fn defaults(&self) -> &DefaultSampling {
        &self.inner.defaults
    }

    pub(crate) fn rows_format(&self) -> Option<RowsFormat> {
        self.inner.rows_format
    }

    pub(crate) fn api_key(&self) -> Option<&str> {
        self.inner.api_key.as_deref()
    }

    pub(crate) fn body_limit(&self) -> usize {
        self.body_limit
    }

    pub(crate) fn stats(&self) -> &HttpStats {
        &self.inner.stats
    }
}
