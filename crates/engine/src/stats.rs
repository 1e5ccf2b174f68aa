//! Counters and histograms of one engine, in Prometheus' text form.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Upper bounds of the latency histograms, in seconds (vLLM's).
const LATENCY_BUCKETS: [f64; 19] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];

/// Upper bounds of the gather histogram, in seconds.
const GATHER_BUCKETS: [f64; 10] = [1e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 0.1, 1.0];

/// The label of `vllm:request_success_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct FinishedReason {
    pub(crate) finished_reason: &'static str,
}

/// The label of `moetrail_routed_experts_moved_bytes_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct MovedTo {
    pub(crate) to: &'static str,
}

/// The labels of `moetrail_expert_load_total`; `layer` is the decoder's index.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ExpertLabel {
    pub(crate) layer: usize,
    pub(crate) expert: usize,
}

type FloatGauge = Gauge<f64, AtomicU64>;

/// Everything the engine counts. vLLM's names where vLLM has them; the feature's own begin with `moetrail_`.
pub struct EngineStats {
    registry: Registry,
    pub(crate) num_requests_running: Gauge,
    pub(crate) num_requests_waiting: Gauge,
    pub(crate) kv_cache_usage_perc: FloatGauge,
    pub(crate) prefix_cache_queries: Counter,
    pub(crate) prefix_cache_hits: Counter,
    pub(crate) prompt_tokens: Counter,
    pub(crate) prompt_tokens_cached: Counter,
    pub(crate) generation_tokens: Counter,
    pub(crate) num_preemptions: Counter,
    pub(crate) iterations: Counter,
    pub(crate) steps_ahead: Counter,
    pub(crate) logits_d2h_bytes: Counter,
    pub(crate) request_success: Family<FinishedReason, Counter>,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token_latency: Histogram,
    pub(crate) request_queue_time: Histogram,
    pub(crate) e2e_request_latency: Histogram,
    pub(crate) rows_captured: Counter,
    pub(crate) rows_returned: Counter,
    pub(crate) d2h_bytes: Counter,
    pub(crate) rows_trimmed: Counter,
    pub(crate) rows_deduplicated: Counter,
    pub(crate) rows_prefix_cached: Counter,
    pub(crate) generation_mismatch: Counter,
    pub(crate) gather_seconds: Histogram,
    pub(crate) reprefill_rows_compared: Counter,
    pub(crate) reprefill_rows_differing: Counter,
    pub(crate) replay_rows: Counter,
    pub(crate) replay_cells_changed: Counter,
    pub(crate) expert_load: Family<ExpertLabel, Counter>,
    moved_bytes: Family<MovedTo, Counter>,
}

impl EngineStats {
    /// All zero, labelled with the model's name as vLLM's are.
    pub(crate) fn new(model_name: &str) -> Self {
        let labels = [("model_name", model_name.to_owned()), ("engine", "0".to_owned())];
        let mut registry = Registry::with_labels(labels.into_iter().map(|(key, value)| (key.into(), value.into())));
        let latency = || Histogram::new(LATENCY_BUCKETS);
        let mut stats = Self {
            registry: Registry::default(),
            num_requests_running: Gauge::default(),
            num_requests_waiting: Gauge::default(),
            kv_cache_usage_perc: FloatGauge::default(),
            prefix_cache_queries: Counter::default(),
            prefix_cache_hits: Counter::default(),
            prompt_tokens: Counter::default(),
            prompt_tokens_cached: Counter::default(),
            generation_tokens: Counter::default(),
            num_preemptions: Counter::default(),
            iterations: Counter::default(),
            steps_ahead: Counter::default(),
            logits_d2h_bytes: Counter::default(),
            request_success: Family::default(),
            time_to_first_token: latency(),
            inter_token_latency: latency(),
            request_queue_time: latency(),
            e2e_request_latency: latency(),
            rows_captured: Counter::default(),
            rows_returned: Counter::default(),
            d2h_bytes: Counter::default(),
            rows_trimmed: Counter::default(),
            rows_deduplicated: Counter::default(),
            rows_prefix_cached: Counter::default(),
            generation_mismatch: Counter::default(),
            gather_seconds: Histogram::new(GATHER_BUCKETS),
            reprefill_rows_compared: Counter::default(),
            reprefill_rows_differing: Counter::default(),
            replay_rows: Counter::default(),
            replay_cells_changed: Counter::default(),
            expert_load: Family::default(),
            moved_bytes: Family::default(),
        };
        stats.register(&mut registry);
        // A reason that has not occurred yet should read 0, not be absent.
        for finished_reason in ["stop", "length", "abort"] {
            let _ = stats.request_success.get_or_create(&FinishedReason { finished_reason });
        }
        for to in ["host", "device"] {
            stats.count_moved(to, 0);
        }
        stats.registry = registry;
        stats
    }

    /// The registry adds `_total` to the names of counters.
    fn register(&self, registry: &mut Registry) {
        let r = registry;
        r.register("vllm:num_requests_running", "Sequences with a seat", self.num_requests_running.clone());
        r.register("vllm:num_requests_waiting", "Sequences without a seat", self.num_requests_waiting.clone());
        r.register(
            "vllm:kv_cache_usage_perc",
            "Share of KV blocks referenced, 0 to 1",
            self.kv_cache_usage_perc.clone(),
        );
        r.register(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache",
            self.prefix_cache_queries.clone(),
        );
        r.register("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", self.prefix_cache_hits.clone());
        r.register(
            "vllm:prompt_tokens",
            "Prompt tokens of requests whose prompt was computed",
            self.prompt_tokens.clone(),
        );
        r.register(
            "vllm:prompt_tokens_cached",
            "Of these, tokens found in the prefix cache",
            self.prompt_tokens_cached.clone(),
        );
        r.register("vllm:generation_tokens", "Tokens sampled", self.generation_tokens.clone());
        r.register("vllm:num_preemptions", "Sequences that lost their blocks to others", self.num_preemptions.clone());
        r.register("moetrail_iterations", "Forward passes", self.iterations.clone());
        let ahead = "Forward passes issued before the one before them had ended";
        r.register("moetrail_steps_ahead", ahead, self.steps_ahead.clone());
        r.register(
            "moetrail_logits_d2h_bytes",
            "Bytes of logits copied from the device, for settings that only the host samples under",
            self.logits_d2h_bytes.clone(),
        );
        r.register("vllm:request_success", "Choices ended, by reason", self.request_success.clone());
        r.register(
            "vllm:time_to_first_token_seconds",
            "From arrival to the first token",
            self.time_to_first_token.clone(),
        );
        r.register("vllm:inter_token_latency_seconds", "Between tokens of a choice", self.inter_token_latency.clone());
        r.register(
            "vllm:request_queue_time_seconds",
            "From arrival to the first forward",
            self.request_queue_time.clone(),
        );
        r.register("vllm:e2e_request_latency_seconds", "From arrival to the end", self.e2e_request_latency.clone());
        r.register(
            "moetrail_routed_experts_rows_captured",
            "Positions forwarded under capture, recomputation included",
            self.rows_captured.clone(),
        );
        r.register("moetrail_routed_experts_rows_returned", "Rows in replies, per choice", self.rows_returned.clone());
        r.register(
            "moetrail_routed_experts_d2h_bytes",
            "Bytes drained from the ring: rows * moe_layers * top_k * itemsize",
            self.d2h_bytes.clone(),
        );
        r.register(
            "moetrail_routed_experts_rows_trimmed",
            "Rows below the start, per choice that returns rows",
            self.rows_trimmed.clone(),
        );
        r.register(
            "moetrail_routed_experts_rows_deduplicated",
            "Positions forwarded again whose row the host had",
            self.rows_deduplicated.clone(),
        );
        r.register(
            "moetrail_routed_experts_rows_prefix_cached",
            "Returned rows whose block another request computed",
            self.rows_prefix_cached.clone(),
        );
        r.register(
            "moetrail_routed_experts_generation_mismatch",
            "Gathers refused because a block had a new owner",
            self.generation_mismatch.clone(),
        );
        r.register(
            "moetrail_routed_experts_moved_bytes",
            "Bytes of rows moved whole with their blocks",
            self.moved_bytes.clone(),
        );
        r.register(
            "moetrail_routed_experts_reprefill_rows_compared",
            "Rows computed again that were compared with the first ones",
            self.reprefill_rows_compared.clone(),
        );
        r.register(
            "moetrail_routed_experts_reprefill_rows_differing",
            "Of these, rows that differ",
            self.reprefill_rows_differing.clone(),
        );
        r.register(
            "moetrail_routed_experts_replay_rows",
            "Positions whose routing was given by a request",
            self.replay_rows.clone(),
        );
        r.register(
            "moetrail_routed_experts_replay_cells_changed",
            "Their (layer, token) cells for which the free router would have chosen another set",
            self.replay_cells_changed.clone(),
        );
        r.register("moetrail_expert_load", "Selections by layer and expert", self.expert_load.clone());
        r.register("moetrail_routed_experts_gather_seconds", "Time of one drain", self.gather_seconds.clone());
    }

    /// Rows moved with their blocks to the host or the device.
    pub(crate) fn count_moved(&self, to: &'static str, bytes: usize) {
        self.moved_bytes.get_or_create(&MovedTo { to }).inc_by(bytes as u64);
    }

    /// Forward passes so far, and how many of them were issued before the one before them had ended.
    pub fn num_steps(&self) -> (u64, u64) {
        (self.iterations.get(), self.steps_ahead.get())
    }

    /// The text that Prometheus scrapes.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_promised_ones() {
        let stats = EngineStats::new("m");
        stats.d2h_bytes.inc_by(12);
        let text = stats.encode();
        for line in [
            r#"vllm:num_requests_running{model_name="m",engine="0"} 0"#,
            r#"vllm:request_success_total{model_name="m",engine="0",finished_reason="abort"} 0"#,
            r#"moetrail_routed_experts_d2h_bytes_total{model_name="m",engine="0"} 12"#,
            r#"vllm:time_to_first_token_seconds_count{model_name="m",engine="0"} 0"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
