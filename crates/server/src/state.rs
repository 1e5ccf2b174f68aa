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
}

struct Inner {
    engine: EngineHandle,
    defaults: DefaultSampling,
    rows_format: Option<RowsFormat>,
    api_key: Option<String>,
    body_limit: usize,
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
        let stats = HttpStats::default();
        let body_limit = DEFAULT_BODY_LIMIT;
        Self { inner: Arc::new(Inner { engine, defaults, rows_format, api_key, body_limit, stats }) }
    }

    /// Refuses bodies of more than `bytes`; to be called before the state is shared.
    #[must_use]
    pub fn with_body_limit(self, bytes: usize) -> Self {
        let inner = Inner {
            engine: self.inner.engine.clone(),
            defaults: self.inner.defaults,
            rows_format: self.inner.rows_format,
            api_key: self.inner.api_key.clone(),
            body_limit: bytes,
            stats: self.inner.stats.clone(),
        };
        Self { inner: Arc::new(inner) }
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
        self.inner.body_limit
    }

    pub(crate) fn stats(&self) -> &HttpStats {
        &self.inner.stats
    }
}
