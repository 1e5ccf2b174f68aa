//! What the server itself counts, under the names of vLLM's HTTP metrics.

use std::time::Duration;

use axum::http::Method;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Upper bounds in seconds.
const BUCKETS: [f64; 8] = [0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Requests {
    handler: String,
    method: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Handler {
    handler: String,
}

/// Counts and times of HTTP requests; cheap to clone, all clones count together.
#[derive(Debug, Clone)]
pub(crate) struct HttpStats {
    requests: Family<Requests, Counter>,
    /// Until the response begins; a stream goes on after that.
    seconds: Family<Handler, Histogram, fn() -> Histogram>,
}

impl Default for HttpStats {
    fn default() -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
        Self { requests: Family::default(), seconds: Family::new_with_constructor(histogram) }
    }
}

impl HttpStats {
    pub(crate) fn record(&self, route: &str, method: &Method, status: u16, elapsed: Duration) {
        let requests = Requests { handler: route.to_owned(), method: method_name(method), status };
        self.requests.get_or_create(&requests).inc();
        self.seconds.get_or_create(&Handler { handler: route.to_owned() }).observe(elapsed.as_secs_f64());
    }

    /// The engine's metrics and these in one text.
    pub(crate) fn encode_after(&self, engine: &str) -> String {
        let mut registry = Registry::default();
        registry.register("http_requests", "HTTP requests by route, method and status", self.requests.clone());
        registry.register("http_request_duration_seconds", "Until the response begins", self.seconds.clone());
        // The mark of the end must stand at the end only.
        let mut out = engine.trim_end().trim_end_matches("# EOF").to_owned();
        text::encode(&mut out, &registry).expect("writing to a string does not fail");
        out
    }
}

/// Methods that clients make up must not become labels.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_texts_make_one_with_one_end() {
        let stats = HttpStats::default();
        stats.record("/health", &Method::GET, 200, Duration::from_millis(2));
        let text = stats.encode_after("# TYPE a counter\na_total 1\n# EOF\n");
        assert!(text.starts_with("# TYPE a counter\na_total 1\n# HELP http_requests"), "{text}");
        assert!(text.contains(r#"http_requests_total{handler="/health",method="GET",status="200"} 1"#), "{text}");
        assert!(text.contains(r#"http_request_duration_seconds_count{handler="/health"} 1"#), "{text}");
        assert_eq!(text.matches("# EOF").count(), 1);
        assert!(text.ends_with("# EOF\n"));
    }
}
