use std::cmp::Ordering;

use crate::gpu::SampleParams;

/// Higher first, ties by lower id.
fn best_first(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn weight(logit: f32, max: f32) -> f64 {
    f64::from((logit - max).exp())
}

fn argmax(logits: &[f32]) -> Option<u32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let best = (max > f32::NEG_INFINITY).then(|| logits.iter().position(|logit| *logit == max))?;
    best.map(|id| id as u32)
}

/// The tokens that may be sampled, with their weights, in the order in which the random number walks through them: by id if
/// nothing truncates, else best first.
pub fn sample_candidates(logits: &[f32], params: &SampleParams) -> Vec<(u32, f64)> {
    let logits: Vec<f32> = logits.iter().map(|logit| logit / params.temperature).collect();
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let floor = if params.min_p > 0.0 { max + params.min_p.ln() } else { f32::NEG_INFINITY };
    let all = logits.iter().enumerate().map(|(id, logit)| (id as u32, *logit));
    let mut kept: Vec<(u32, f32)> = all.filter(|(_, logit)| *logit >= floor && *logit > f32::NEG_INFINITY).collect();
    let top_k = if params.top_k == 0 { kept.len() } else { (params.top_k as usize).min(kept.len()) };
    let weighed =
        |kept: Vec<(u32, f32)>| -> Vec<(u32, f64)> { kept.iter().map(|(id, l)| (*id, weight(*l, max))).collect() };
    if top_k == kept.len() && params.top_p >= 1.0 {
        return weighed(kept);
    }
    kept.sort_by(best_first);
    kept.truncate(top_k);
    let mut kept = weighed(kept);
    if params.top_p < 1.0 {
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut mass = 0.0;
        let end = kept.iter().position(|(_, weight)| {
            mass += weight;
            mass >= f64::from(params.top_p) * total
        });
        kept.truncate(end.map_or(kept.len(), |end| end + 1));
    }
    kept
}

/// The token of one row; `None` if there is none to be sampled.
pub fn sample_token(logits: &[f32], params: &SampleParams) -> Option<u32> {
    let best = argmax(logits)?;
    if params.is_greedy() {
        return Some(best);
    }
    let candidates = sample_candidates(logits, params);
    let mut left = params.uniform * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
    for (id, weight) in &candidates {
        left -= weight;
        if left < 0.0 {
            return Some(*id);
        }
    }
    candidates.iter().rev().find(|(_, weight)| *weight > 0.0).map(|(id, _)| *id)
}

/// The log-softmax of raw logits at `token`, its rank, and the `num_top` most likely tokens with theirs.
pub fn token_logprobs(logits: &[f32], token: u32, num_top: usize) -> (f32, u32, Vec<(u32, f32)>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| weight(*logit, max)).sum();
    let log_sum = sum.ln() as f32;
    let own = logits[token as usize];
    let rank = 1 + logits.iter().filter(|logit| **logit > own).count() as u32;
    let mut top: Vec<(u32, f32)> = logits.iter().enumerate().map(|(id, logit)| (id as u32, *logit)).collect();
    top.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0)));
    top.truncate(num_top);
    (own - max - log_sum, rank, top.into_iter().map(|(id, logit)| (id, logit - max - log_sum)).collect())
}
