//! Requests by which the commands themselves try the engine.

use moetrail_engine::{GenerateRequest, SamplingParams};

/// Greedy, exactly `max_tokens` long, ids alone; all rows if `rows`.
pub fn greedy(prompt: Vec<u32>, max_tokens: usize, rows: bool) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.into(),
        sampling: SamplingParams {
            max_tokens,
            temperature: 0.0,
            ignore_eos: true,
            detokenize: false,
            ..SamplingParams::default()
        },
        routed_experts_start: rows.then_some(0),
        ..GenerateRequest::default()
    }
}
